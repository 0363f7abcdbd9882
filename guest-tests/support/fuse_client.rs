//! A guest kernel's FUSE over one virtqueue: many requests in flight, answered in any order.
//!
//! [`Fuse::submit`] puts a request into the ring, [`Fuse::flush`] shows everything submitted to the
//! device with one kick, [`Fuse::try_complete`] polls and [`Fuse::wait`] sleeps. The operations
//! below them (`lookup`, `read`, …) do all of it for one request. Buffers are recycled, so that a
//! request in steady state allocates nothing in guest memory.
//!
//! Every answer is checked for what holds for all of them: used length equal to the header's
//! length, the request's own unique number, an error number in range.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::fuse_abi::*;
use super::memory::{GuestBuf, GuestMemory, PAGE};
use super::virtqueue::{Segment, Used, Virtqueue};
use super::{to_u32, to_usize};

/// How long a single operation may take before the test fails.
pub const REPLY_TIMEOUT: Duration = Duration::from_secs(60);

/// Longest header plus body of a request; the answer's header lies behind it in the same page.
pub const REQUEST_MAX: usize = 2048;
/// Where the answer's header lies in a request's page, in bytes.
const OUT_HEADER: usize = REQUEST_MAX;
const OUT_HEADER_LEN: usize = size_of::<OutHeader>();
/// Where a small answer's body lies in that page.
const OUT_SMALL: usize = OUT_HEADER + OUT_HEADER_LEN;
const OUT_SMALL_MAX: usize = PAGE - OUT_SMALL;

/// How a request is cut into descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// As Linux does: header, arguments; answer header, answer.
    Linux,
    /// As Linux does for pages that are not neighbours: 4 KiB pieces of the answer.
    Pages,
    /// One readable, one writable descriptor.
    Joined,
    /// Pieces of so many bytes on either side.
    Slivers(usize),
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FuseError {
    #[error("errno {0}")]
    Errno(i32),
    #[error("no answer within the time limit")]
    Timeout,
    #[error("{0}")]
    Protocol(String),
}

impl FuseError {
    pub fn errno(&self) -> Option<i32> {
        match self {
            FuseError::Errno(errno) => Some(*errno),
            _ => None,
        }
    }
}

pub type FuseResult<T> = Result<T, FuseError>;

/// A request in flight: its `unique`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket(pub u64);

/// A request's memory: one page for headers and small bodies, more if the answer may be long.
struct Slot {
    page: GuestBuf,
    data: Option<GuestBuf>,
    /// The answer's header lies at the start of `data`, not in `page`.
    joined: bool,
    unique: u64,
    opcode: u32,
    reply_max: usize,
    expects: Expects,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expects {
    Reply,
    /// FORGET: there is no room for an answer.
    Nothing,
    /// INTERRUPT: answered if it cannot be done, silent if it can.
    Silence,
}

impl Slot {
    /// Buffer and offset of the answer's header.
    fn out_header(&self) -> (&GuestBuf, usize) {
        match &self.data {
            Some(data) if self.joined => (data, 0),
            _ => (&self.page, OUT_HEADER),
        }
    }

    /// Buffer and offset of what follows the answer's header.
    fn out_body(&self) -> (&GuestBuf, usize) {
        match &self.data {
            Some(data) if self.joined => (data, OUT_HEADER_LEN),
            Some(data) => (data, 0),
            None => (&self.page, OUT_SMALL),
        }
    }
}

/// An answer, or for FORGET the fact that the device took it. Give it back with
/// [`Fuse::recycle`] when its bytes have been looked at.
pub struct Reply {
    pub ticket: Ticket,
    /// 0 or a positive errno.
    pub errno: i32,
    /// Bytes behind the answer's header.
    pub len: usize,
    /// What the used ring said.
    pub used: Used,
    slot: Slot,
}

impl Reply {
    pub fn bytes(&self) -> Vec<u8> {
        let (buffer, at) = self.slot.out_body();
        buffer.to_vec(at, self.len)
    }

    /// Copies the first bytes of the answer without an allocation.
    pub fn copy_to(&self, bytes: &mut [u8]) {
        let (buffer, at) = self.slot.out_body();
        buffer.read(at, bytes);
    }

    pub fn result(&self) -> FuseResult<()> {
        if self.errno == 0 { Ok(()) } else { Err(FuseError::Errno(self.errno)) }
    }
}

/// One directory entry; with attributes if it came from READDIRPLUS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dirent {
    pub ino: u64,
    pub off: u64,
    pub kind: u32,
    pub name: Vec<u8>,
    pub entry: Option<EntryOut>,
}

pub struct Fuse {
    pub queue: Virtqueue,
    pub shape: Shape,
    pub init: Option<InitOut>,
    /// Spin for an answer instead of sleeping.
    pub busy_poll: bool,
    /// Whether used lengths count. A device that gives every chain back with 0 is measured, but not tested.
    pub used_len_is_true: bool,
    memory: GuestMemory,
    /// Where data buffers come from, if not from anywhere in memory.
    data_region: Option<u64>,
    slots: Vec<Option<Slot>>,
    pages: Vec<GuestBuf>,
    /// Free data buffers by size in pages, powers of two.
    buffers: HashMap<usize, Vec<GuestBuf>>,
    arrived: VecDeque<Reply>,
    next_unique: u64,
    segments: Vec<Segment>,
}

impl Fuse {
    pub fn new(memory: &GuestMemory, queue: Virtqueue) -> Fuse {
        Fuse {
            slots: (0..queue.size()).map(|_| None).collect(),
            queue,
            shape: Shape::Linux,
            init: None,
            busy_poll: false,
            used_len_is_true: true,
            memory: memory.clone(),
            data_region: None,
            pages: Vec::new(),
            buffers: HashMap::new(),
            arrived: VecDeque::new(),
            // Linux counts in steps of two; bit 0 marks interrupts.
            next_unique: 2,
            segments: Vec::new(),
        }
    }

    /// Takes data buffers from the region at this guest address from now on.
    pub fn use_region(&mut self, guest_addr: Option<u64>) {
        self.data_region = guest_addr;
        self.buffers.clear();
    }

    fn page(&mut self) -> GuestBuf {
        self.pages.pop().unwrap_or_else(|| self.memory.alloc(PAGE))
    }

    fn buffer(&mut self, len: usize) -> GuestBuf {
        let pages = len.div_ceil(PAGE).next_power_of_two();
        if let Some(buffer) = self.buffers.get_mut(&pages).and_then(Vec::pop) {
            return buffer;
        }
        match self.data_region {
            Some(region) => self.memory.alloc_in(region, pages * PAGE),
            None => self.memory.alloc(pages * PAGE),
        }
    }

    /// Puts a request into the ring: `body` in pieces, room for `reply_max` bytes behind the
    /// answer's header. `None` if the ring is full. The device does not see it before `flush`.
    pub fn submit(
        &mut self,
        opcode: u32,
        nodeid: u64,
        body: &[&[u8]],
        reply_max: usize,
    ) -> Option<Ticket> {
        let expects = match opcode {
            op::FORGET | op::BATCH_FORGET => Expects::Nothing,
            op::INTERRUPT => Expects::Silence,
            _ => Expects::Reply,
        };
        let unique = self.next_unique;
        let body_len: usize = body.iter().map(|b| b.len()).sum();
        let total = size_of::<InHeader>() + body_len;
        assert!(total <= REQUEST_MAX, "requests are short: {total} bytes");
        let page = self.page();
        let header = InHeader {
            len: to_u32(total),
            opcode,
            unique,
            nodeid,
            uid: 0,
            gid: 0,
            pid: 1,
            total_extlen: 0,
            padding: 0,
        };
        page.write(0, header.as_bytes());
        let mut at = size_of::<InHeader>();
        for piece in body {
            page.write(at, piece);
            at += piece.len();
        }
        let joined = self.shape == Shape::Joined;
        let data = (reply_max > OUT_SMALL_MAX).then(|| {
            let front = if joined { OUT_HEADER_LEN } else { 0 };
            self.buffer(front + reply_max)
        });
        let slot = Slot { page, data, joined, unique, opcode, reply_max, expects };
        // An answer that was not written must not look like one left by an earlier request.
        let (buffer, at) = slot.out_header();
        buffer.write(at, &[0xff; OUT_HEADER_LEN]);
        self.describe(&slot, total);
        match self.queue.add(&self.segments) {
            Some(head) => {
                self.slots[usize::from(head)] = Some(slot);
                self.next_unique += 2;
                Some(Ticket(unique))
            }
            None => {
                self.take_back(slot);
                None
            }
        }
    }

    /// Cuts a request into `self.segments`.
    fn describe(&mut self, slot: &Slot, request_len: usize) {
        let header = size_of::<InHeader>();
        let page = slot.page.addr();
        let locate = |(buffer, at): (&GuestBuf, usize)| buffer.addr() + at as u64;
        let out_addr = locate(slot.out_header());
        let body_addr = locate(slot.out_body());
        let segments = &mut self.segments;
        segments.clear();
        let mut piece = |addr: u64, len: usize, writable: bool, cut: usize| {
            let mut done = 0;
            while done < len {
                let part = cut.min(len - done);
                segments.push(Segment { addr: addr + done as u64, len: to_u32(part), writable });
                done += part;
            }
        };
        let whole = usize::MAX;
        match self.shape {
            Shape::Joined => piece(page, request_len, false, whole),
            Shape::Slivers(cut) => piece(page, request_len, false, cut),
            Shape::Linux | Shape::Pages => {
                piece(page, header, false, whole);
                piece(page + header as u64, request_len - header, false, whole);
            }
        }
        if slot.expects == Expects::Nothing {
            return;
        }
        let cut = match self.shape {
            Shape::Joined => {
                piece(out_addr, OUT_HEADER_LEN + slot.reply_max, true, whole);
                return;
            }
            Shape::Linux => whole,
            Shape::Pages => PAGE,
            Shape::Slivers(cut) => cut,
        };
        piece(out_addr, OUT_HEADER_LEN, true, cut);
        piece(body_addr, slot.reply_max, true, cut);
    }

    /// Shows everything submitted to the device; one kick if it wants one.
    pub fn flush(&mut self) {
        self.queue.flush();
    }

    /// The next answer that has arrived, in order of arrival. Does not sleep.
    pub fn try_complete(&mut self) -> FuseResult<Option<Reply>> {
        if let Some(reply) = self.arrived.pop_front() {
            return Ok(Some(reply));
        }
        self.pop()
    }

    fn pop(&mut self) -> FuseResult<Option<Reply>> {
        let Some(used) = self.queue.pop() else {
            if let Some(bogus) = self.queue.bogus().first() {
                return Err(FuseError::Protocol(format!("{bogus:?} was not in flight")));
            }
            return Ok(None);
        };
        let slot = self.slots[usize::from(used.head)]
            .take()
            .ok_or_else(|| FuseError::Protocol(format!("{used:?} is not a request")))?;
        self.check(slot, used).map(Some)
    }

    fn check(&self, slot: Slot, mut used: Used) -> FuseResult<Reply> {
        let ticket = Ticket(slot.unique);
        let wrong = |what: String| {
            let op = slot.opcode;
            Err(FuseError::Protocol(format!("opcode {op}, unique {}: {what}", ticket.0)))
        };
        if slot.expects == Expects::Nothing && used.len != 0 {
            return wrong(format!("{} bytes written for a FORGET", used.len));
        }
        if slot.expects != Expects::Reply && used.len == 0 {
            return Ok(Reply { ticket, errno: 0, len: 0, used, slot });
        }
        let mut raw = [0; OUT_HEADER_LEN];
        let (buffer, at) = slot.out_header();
        buffer.read(at, &mut raw);
        let header = OutHeader::read_from_bytes(&raw).expect("16 bytes");
        if !self.used_len_is_true {
            used.len = header.len;
        }
        let used_len = to_usize(u64::from(used.len));
        if header.len != used.len {
            return wrong(format!("used length {used_len}, header says {}", header.len));
        }
        if used_len < raw.len() || used_len > raw.len() + slot.reply_max {
            return wrong(format!("{used_len} bytes used of {}", raw.len() + slot.reply_max));
        }
        if header.unique != slot.unique {
            return wrong(format!("answer to unique {}", header.unique));
        }
        if !(-4095..=0).contains(&header.error) {
            return wrong(format!("error {}", header.error));
        }
        let len = used_len - raw.len();
        if header.error != 0 && len != 0 {
            return wrong(format!("error {} with {len} bytes of body", header.error));
        }
        Ok(Reply { ticket, errno: -header.error, len, used, slot })
    }

    /// Sleeps until any answer arrives.
    pub fn complete(&mut self, deadline: Instant) -> FuseResult<Reply> {
        loop {
            if let Some(reply) = self.try_complete()? {
                return Ok(reply);
            }
            self.pause(deadline)?;
        }
    }

    /// Sleeps until the answer to `ticket` arrives; others wait for their turn.
    pub fn wait(&mut self, ticket: Ticket, limit: Duration) -> FuseResult<Reply> {
        let deadline = Instant::now() + limit;
        if let Some(at) = self.arrived.iter().position(|r| r.ticket == ticket) {
            return Ok(self.arrived.remove(at).expect("just found"));
        }
        loop {
            match self.pop()? {
                Some(reply) if reply.ticket == ticket => return Ok(reply),
                Some(reply) => self.arrived.push_back(reply),
                None => self.pause(deadline)?,
            }
        }
    }

    fn pause(&mut self, deadline: Instant) -> FuseResult<()> {
        if self.busy_poll {
            std::hint::spin_loop();
            if Instant::now() >= deadline {
                return Err(FuseError::Timeout);
            }
            return Ok(());
        }
        if self.queue.wait(deadline) { Ok(()) } else { Err(FuseError::Timeout) }
    }

    /// Takes an answer's buffers back for the next request.
    pub fn recycle(&mut self, reply: Reply) {
        self.take_back(reply.slot);
    }

    fn take_back(&mut self, slot: Slot) {
        self.pages.push(slot.page);
        if let Some(data) = slot.data {
            self.buffers.entry(data.len() / PAGE).or_default().push(data);
        }
    }

    /// Requests that the device has not answered.
    pub fn in_flight(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    /// Forgets all requests in flight and starts with empty rings, after a reset of the device.
    pub fn reset(&mut self) {
        self.queue.reset();
        self.slots.iter_mut().for_each(|slot| *slot = None);
        self.arrived.clear();
        self.init = None;
    }

    /// One request from start to end; waits for room in the ring.
    pub fn call(
        &mut self,
        opcode: u32,
        nodeid: u64,
        body: &[&[u8]],
        reply_max: usize,
    ) -> FuseResult<Vec<u8>> {
        let deadline = Instant::now() + REPLY_TIMEOUT;
        let ticket = loop {
            if let Some(ticket) = self.submit(opcode, nodeid, body, reply_max) {
                break ticket;
            }
            self.flush();
            match self.pop()? {
                Some(reply) => self.arrived.push_back(reply),
                None => self.pause(deadline)?,
            }
        };
        self.flush();
        let reply = self.wait(ticket, REPLY_TIMEOUT)?;
        let result = reply.result().map(|()| reply.bytes());
        self.recycle(reply);
        result
    }

    fn call_fixed<T>(&mut self, opcode: u32, nodeid: u64, body: &[&[u8]]) -> FuseResult<T>
    where
        T: FromBytes + KnownLayout + Immutable,
    {
        let bytes = self.call(opcode, nodeid, body, size_of::<T>())?;
        T::read_from_bytes(&bytes).map_err(|_| {
            FuseError::Protocol(format!(
                "opcode {opcode}: {} bytes of answer instead of {}",
                bytes.len(),
                size_of::<T>()
            ))
        })
    }

    pub fn init_with(&mut self, flags: u64) -> FuseResult<InitOut> {
        let halves = [flags & 0xffff_ffff, flags >> 32]
            .map(|half| u32::try_from(half).expect("half of 64 bits"));
        let body = InitIn {
            major: KERNEL_VERSION,
            minor: KERNEL_MINOR,
            max_readahead: 128 << 10,
            flags: halves[0],
            flags2: halves[1],
            unused: [0; 11],
        };
        let out: InitOut = self.call_fixed(op::INIT, 0, &[body.as_bytes()])?;
        self.init = Some(out);
        Ok(out)
    }

    /// INIT as Linux 7.x sends it.
    pub fn init(&mut self) -> FuseResult<InitOut> {
        self.init_with(init::LINUX_7)
    }

    pub fn destroy(&mut self) -> FuseResult<()> {
        self.call(op::DESTROY, 0, &[], 0).map(drop)
    }

    /// SETUPMAPPING as Linux sends it, for reading: of 2 MiB of the file.
    pub fn map(&mut self, node: u64, foffset: u64, moffset: u64) -> FuseResult<()> {
        self.call(op::SETUPMAPPING, node, &[&setup_mapping(foffset, 2 << 20, 2, moffset)], 0)
            .map(drop)
    }

    /// REMOVEMAPPING of (offset in the window, length).
    pub fn unmap(&mut self, ranges: &[(u64, u64)]) -> FuseResult<()> {
        let count = to_u32(ranges.len()).to_ne_bytes();
        let list: Vec<u8> = ranges
            .iter()
            .flat_map(|&(offset, len)| [offset.to_ne_bytes(), len.to_ne_bytes()].concat())
            .collect();
        self.call(op::REMOVEMAPPING, 1, &[&count, &list], 0).map(drop)
    }

    pub fn lookup(&mut self, parent: u64, name: &[u8]) -> FuseResult<EntryOut> {
        self.call_fixed(op::LOOKUP, parent, &[name, b"\0"])
    }

    pub fn submit_lookup(&mut self, parent: u64, name: &[u8]) -> Option<Ticket> {
        self.submit(op::LOOKUP, parent, &[name, b"\0"], size_of::<EntryOut>())
    }

    /// LOOKUP of each component of an absolute path, from the root.
    pub fn resolve(&mut self, path: &[u8]) -> FuseResult<u64> {
        let mut node = ROOT_ID;
        for name in path.split(|&b| b == b'/').filter(|n| !n.is_empty()) {
            let entry = self.lookup(node, name)?;
            if entry.nodeid == 0 {
                return Err(FuseError::Errno(libc::ENOENT));
            }
            node = entry.nodeid;
        }
        Ok(node)
    }

    pub fn getattr(&mut self, node: u64) -> FuseResult<Attr> {
        let body = GetattrIn::default();
        let out: AttrOut = self.call_fixed(op::GETATTR, node, &[body.as_bytes()])?;
        Ok(out.attr)
    }

    pub fn statx(&mut self, node: u64) -> FuseResult<Statx> {
        let body = StatxIn { sx_mask: 0xfff, ..StatxIn::default() };
        let out: StatxOut = self.call_fixed(op::STATX, node, &[body.as_bytes()])?;
        Ok(out.stat)
    }

    pub fn readlink(&mut self, node: u64) -> FuseResult<Vec<u8>> {
        self.call(op::READLINK, node, &[], PAGE - 1)
    }

    pub fn statfs(&mut self) -> FuseResult<StatfsOut> {
        self.call_fixed(op::STATFS, ROOT_ID, &[])
    }

    /// The open handle, or 0 if the server wants no OPEN.
    pub fn open(&mut self, node: u64) -> FuseResult<u64> {
        self.open_as(op::OPEN, node)
    }

    pub fn opendir(&mut self, node: u64) -> FuseResult<u64> {
        self.open_as(op::OPENDIR, node)
    }

    fn open_as(&mut self, opcode: u32, node: u64) -> FuseResult<u64> {
        let body = OpenIn::default();
        match self.call_fixed::<OpenOut>(opcode, node, &[body.as_bytes()]) {
            Ok(out) => Ok(out.fh),
            Err(FuseError::Errno(libc::ENOSYS)) => Ok(0),
            Err(error) => Err(error),
        }
    }

    pub fn release(&mut self, node: u64, fh: u64) -> FuseResult<()> {
        let body = ReleaseIn { fh, ..ReleaseIn::default() };
        match self.call(op::RELEASE, node, &[body.as_bytes()], 0) {
            Ok(_) | Err(FuseError::Errno(libc::ENOSYS)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    pub fn submit_read(&mut self, node: u64, fh: u64, offset: u64, size: usize) -> Option<Ticket> {
        let body = ReadIn { fh, offset, size: to_u32(size), ..ReadIn::default() };
        self.submit(op::READ, node, &[body.as_bytes()], size)
    }

    pub fn submit_getattr(&mut self, node: u64) -> Option<Ticket> {
        let body = GetattrIn::default();
        self.submit(op::GETATTR, node, &[body.as_bytes()], size_of::<AttrOut>())
    }

    pub fn read(&mut self, node: u64, fh: u64, offset: u64, size: usize) -> FuseResult<Vec<u8>> {
        let body = ReadIn { fh, offset, size: to_u32(size), ..ReadIn::default() };
        self.call(op::READ, node, &[body.as_bytes()], size)
    }

    /// A whole file in pieces of `step` bytes, until a short read.
    pub fn read_all(&mut self, node: u64, step: usize) -> FuseResult<Vec<u8>> {
        let fh = self.open(node)?;
        let mut all = Vec::new();
        loop {
            let piece = self.read(node, fh, all.len() as u64, step)?;
            all.extend_from_slice(&piece);
            if piece.len() < step {
                break;
            }
        }
        self.release(node, fh)?;
        Ok(all)
    }

    /// One READDIR or READDIRPLUS.
    pub fn readdir(
        &mut self,
        node: u64,
        fh: u64,
        offset: u64,
        size: usize,
        plus: bool,
    ) -> FuseResult<Vec<Dirent>> {
        let opcode = if plus { op::READDIRPLUS } else { op::READDIR };
        let body = ReadIn { fh, offset, size: to_u32(size), ..ReadIn::default() };
        let bytes = self.call(opcode, node, &[body.as_bytes()], size)?;
        parse_dirents(&bytes, plus)
    }

    /// A whole directory, in buffers of `size` bytes; `.` and `..` included if the server has them.
    pub fn list(&mut self, node: u64, size: usize, plus: bool) -> FuseResult<Vec<Dirent>> {
        let fh = self.opendir(node)?;
        let mut all: Vec<Dirent> = Vec::new();
        loop {
            let offset = all.last().map_or(0, |e| e.off);
            let more = self.readdir(node, fh, offset, size, plus)?;
            if more.is_empty() {
                break;
            }
            if all.len() > 10_000_000 {
                return Err(FuseError::Protocol("a directory without end".into()));
            }
            all.extend(more);
        }
        let body = ReleaseIn { fh, ..ReleaseIn::default() };
        match self.call(op::RELEASEDIR, node, &[body.as_bytes()], 0) {
            Ok(_) | Err(FuseError::Errno(libc::ENOSYS)) => Ok(all),
            Err(error) => Err(error),
        }
    }

    /// Value of an extended attribute, asked for as the kernel does: size first, then value.
    pub fn getxattr(&mut self, node: u64, name: &[u8]) -> FuseResult<Vec<u8>> {
        let ask = GetxattrIn::default();
        let out: GetxattrOut =
            self.call_fixed(op::GETXATTR, node, &[ask.as_bytes(), name, b"\0"])?;
        if out.size == 0 {
            return Ok(Vec::new());
        }
        let ask = GetxattrIn { size: out.size, padding: 0 };
        let max = to_usize(u64::from(out.size));
        let value = self.call(op::GETXATTR, node, &[ask.as_bytes(), name, b"\0"], max)?;
        if value.len() != max {
            return Err(FuseError::Protocol(format!(
                "GETXATTR said {max} bytes and gave {}",
                value.len()
            )));
        }
        Ok(value)
    }

    /// Names of all extended attributes.
    pub fn listxattr(&mut self, node: u64) -> FuseResult<Vec<Vec<u8>>> {
        let ask = GetxattrIn::default();
        let out: GetxattrOut = self.call_fixed(op::LISTXATTR, node, &[ask.as_bytes()])?;
        if out.size == 0 {
            return Ok(Vec::new());
        }
        let ask = GetxattrIn { size: out.size, padding: 0 };
        let max = to_usize(u64::from(out.size));
        let names = self.call(op::LISTXATTR, node, &[ask.as_bytes()], max)?;
        if names.len() != max || names.last() != Some(&0) {
            return Err(FuseError::Protocol("LISTXATTR: wrong length or no NUL".into()));
        }
        Ok(names[..max - 1].split(|&b| b == 0).map(<[u8]>::to_vec).collect())
    }

    pub fn lseek(&mut self, node: u64, offset: u64, whence: i32) -> FuseResult<u64> {
        let body = LseekIn {
            fh: 0,
            offset,
            whence: u32::try_from(whence).expect("SEEK_* are small"),
            padding: 0,
        };
        let out: LseekOut = self.call_fixed(op::LSEEK, node, &[body.as_bytes()])?;
        Ok(out.offset)
    }

    /// FORGET: no answer, but the device gives the descriptors back.
    pub fn forget(&mut self, node: u64, nlookup: u64) -> FuseResult<()> {
        let body = ForgetIn { nlookup };
        self.call(op::FORGET, node, &[body.as_bytes()], 0).map(drop)
    }

    pub fn batch_forget(&mut self, nodes: &[(u64, u64)]) -> FuseResult<()> {
        let head = BatchForgetIn { count: to_u32(nodes.len()), dummy: 0 };
        let list: Vec<u8> = nodes
            .iter()
            .flat_map(|&(nodeid, nlookup)| ForgetOne { nodeid, nlookup }.as_bytes().to_vec())
            .collect();
        self.call(op::BATCH_FORGET, 0, &[head.as_bytes(), &list], 0).map(drop)
    }

    /// INTERRUPT of another request; Linux sends it on hiprio.
    pub fn interrupt(&mut self, target: Ticket) -> FuseResult<()> {
        let body = InterruptIn { unique: target.0 };
        match self.call(op::INTERRUPT, 0, &[body.as_bytes()], 0) {
            Ok(_) | Err(FuseError::Errno(libc::EAGAIN | libc::ENOSYS)) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// The body of a SETUPMAPPING, without a handle.
pub fn setup_mapping(foffset: u64, len: u64, flags: u64, moffset: u64) -> Vec<u8> {
    [u64::MAX, foffset, len, flags, moffset].iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// Entries of a READDIR or READDIRPLUS answer, checked for what the kernel checks.
pub fn parse_dirents(mut bytes: &[u8], plus: bool) -> FuseResult<Vec<Dirent>> {
    let short = || FuseError::Protocol("directory answer ends inside an entry".into());
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let start = bytes.len();
        let entry = if plus {
            let (entry, rest) = EntryOut::read_from_prefix(bytes).map_err(|_| short())?;
            bytes = rest;
            Some(entry)
        } else {
            None
        };
        let (head, rest) = DirentHeader::read_from_prefix(bytes).map_err(|_| short())?;
        let namelen = to_usize(u64::from(head.namelen));
        if namelen == 0 || namelen > 255 {
            return Err(FuseError::Protocol(format!("name of {namelen} bytes")));
        }
        let name = rest.get(..namelen).ok_or_else(short)?.to_vec();
        if name.contains(&b'/') || name.contains(&0) {
            return Err(FuseError::Protocol(format!("name {name:?}")));
        }
        let head_len = start - bytes.len() + size_of::<DirentHeader>();
        let padded = (head_len + namelen).next_multiple_of(8) - head_len;
        bytes = rest.get(padded..).ok_or_else(short)?;
        all.push(Dirent { ino: head.ino, off: head.off, kind: head.kind, name, entry });
    }
    Ok(all)
}
