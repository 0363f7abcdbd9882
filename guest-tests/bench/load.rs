//! The load: requests of one guest, so many in flight, whatever comes back answered by the next one.
//!
//! A [`Load`] says what each of its tasks asks for next; [`drive`] keeps the tasks busy on one queue and measures.
//! A task stands for a thread of the guest: it shows a request to the device as soon as it is in the ring, and sleeps
//! on the call eventfd when nobody has anything to do.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use zerocopy::{FromBytes, IntoBytes};

use crate::support::fuse_abi::{
    AttrOut, DirentHeader, EntryOut, OpenIn, OpenOut, ROOT_ID, ReadIn, ReleaseIn, op,
};
use crate::support::fuse_client::{Fuse, Reply, Ticket};
use crate::support::rng::Rng;
use crate::support::{to_u32, to_usize};

/// How long a request may take before the run fails.
const STUCK: Duration = Duration::from_secs(60);

/// What `getdents` of glibc asks for, and so what Linux puts into READDIRPLUS.
const DIR_BUFFER: usize = 32 << 10;

/// A request that was put into the ring; `None`: the task has nothing to do now.
pub type Next = Result<Option<Ticket>>;

/// What a guest's threads do.
pub trait Load {
    /// Puts the next request of a task into the ring; `answer` is that to the one before, or `None` if the task has
    /// nothing under way.
    fn next(&mut self, fuse: &mut Fuse, task: usize, answer: Option<&Reply>) -> Next;

    /// Work done so far, in the load's own unit, and bytes read.
    fn done(&self) -> (u64, u64);
}

/// What a load did.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    pub units: u64,
    pub bytes: u64,
    pub requests: u64,
    pub time: Duration,
    /// From submission to answer, sorted; only at depth 1.
    pub waits: Vec<Duration>,
}

/// Runs a load with `depth` tasks on one queue until none of them has anything to do.
pub fn drive(fuse: &mut Fuse, depth: usize, load: &mut dyn Load) -> Result<Outcome> {
    let mut tasks: Vec<Option<Ticket>> = vec![None; depth];
    let mut outcome = Outcome::default();
    let mut flying = 0;
    let start = Instant::now();
    let mut sent = start;
    loop {
        for (task, ticket) in tasks.iter_mut().enumerate().filter(|(_, ticket)| ticket.is_none()) {
            *ticket = load.next(fuse, task, None)?;
            if ticket.is_some() {
                flying += 1;
                sent = Instant::now();
                fuse.flush();
            }
        }
        if flying == 0 {
            break;
        }
        let mut answer = Some(fuse.complete(Instant::now() + STUCK)?);
        while let Some(reply) = answer {
            let task = tasks.iter().position(|ticket| *ticket == Some(reply.ticket));
            let Some(task) = task else {
                // To what somebody else has put into the ring.
                fuse.recycle(reply);
                answer = fuse.try_complete()?;
                continue;
            };
            if depth == 1 {
                outcome.waits.push(sent.elapsed());
            }
            outcome.requests += 1;
            tasks[task] = load.next(fuse, task, Some(&reply))?;
            fuse.recycle(reply);
            if tasks[task].is_some() {
                sent = Instant::now();
                fuse.flush();
            } else {
                flying -= 1;
            }
            answer = fuse.try_complete()?;
        }
    }
    outcome.time = start.elapsed();
    (outcome.units, outcome.bytes) = load.done();
    outcome.waits.sort();
    Ok(outcome)
}

/// An open file as the guest knows it.
#[derive(Clone, Copy, Debug)]
pub struct Opened {
    pub node: u64,
    pub fh: u64,
    pub size: u64,
}

/// The place of the next read: an index of a file and an offset in it.
pub trait Places {
    fn next(&mut self) -> Option<(usize, u64)>;
}

/// Anywhere in the files, at multiples of `block`, until `end`.
pub struct Anywhere {
    rng: Rng,
    /// Blocks before each file, and in all of them.
    before: Vec<u64>,
    blocks: u64,
    block: u64,
    end: Instant,
}

impl Anywhere {
    pub fn new(sizes: impl Iterator<Item = u64>, block: usize, seed: u64, end: Instant) -> Self {
        let (block, mut blocks, mut before) = (block as u64, 0, Vec::new());
        for size in sizes {
            before.push(blocks);
            blocks += size / block;
        }
        Anywhere { rng: Rng::new(seed), before, blocks, block, end }
    }
}

impl Places for Anywhere {
    fn next(&mut self) -> Option<(usize, u64)> {
        if Instant::now() >= self.end {
            return None;
        }
        let block = self.rng.below(self.blocks);
        let file = self.before.partition_point(|before| *before <= block) - 1;
        Some((file, (block - self.before[file]) * self.block))
    }
}

/// One file after the other, from start to end, whole blocks; again from the first until `end`, or once.
pub struct InOrder {
    sizes: Vec<u64>,
    block: u64,
    at: (usize, u64),
    end: Option<Instant>,
}

impl InOrder {
    pub fn new(sizes: impl Iterator<Item = u64>, block: usize, end: Option<Instant>) -> Self {
        InOrder { sizes: sizes.collect(), block: block as u64, at: (0, 0), end }
    }
}

impl Places for InOrder {
    fn next(&mut self) -> Option<(usize, u64)> {
        if self.end.is_some_and(|end| Instant::now() >= end) {
            return None;
        }
        // Until an end in time only whole blocks are read, otherwise all there is.
        let least = if self.end.is_some() { self.block } else { 1 };
        while self.at.1 + least > *self.sizes.get(self.at.0)? {
            self.at = (self.at.0 + 1, 0);
            if self.at.0 == self.sizes.len() && self.end.is_some() {
                self.at.0 = 0;
            }
        }
        let place = self.at;
        self.at.1 += self.block;
        Some(place)
    }
}

/// READs of `block` bytes.
pub struct Reads<'a, P> {
    pub files: &'a [Opened],
    pub places: P,
    pub block: usize,
    /// Bytes that each task waits for.
    wanted: Vec<usize>,
    done: (u64, u64),
}

impl<'a, P: Places> Reads<'a, P> {
    pub fn new(files: &'a [Opened], places: P, block: usize) -> Reads<'a, P> {
        Reads { files, places, block, wanted: Vec::new(), done: (0, 0) }
    }
}

impl<P: Places> Load for Reads<'_, P> {
    fn next(&mut self, fuse: &mut Fuse, task: usize, answer: Option<&Reply>) -> Next {
        if let Some(reply) = answer {
            reply.result()?;
            let wanted = self.wanted[task];
            ensure!(reply.len == wanted, "{} bytes of {wanted}", reply.len);
            self.done.0 += 1;
            self.done.1 += wanted as u64;
        }
        let Some((file, offset)) = self.places.next() else { return Ok(None) };
        let file = self.files[file];
        if self.wanted.len() <= task {
            self.wanted.resize(task + 1, 0);
        }
        self.wanted[task] = self.block.min(to_usize(file.size - offset));
        fuse.submit_read(file.node, file.fh, offset, self.block).context("a full ring").map(Some)
    }

    fn done(&self) -> (u64, u64) {
        self.done
    }
}

/// OPEN, one READ of all of it, RELEASE; OPEN and RELEASE only until the server says that it wants none.
pub struct SmallFiles<'a> {
    files: std::slice::Iter<'a, Opened>,
    no_open: bool,
    tasks: Vec<(Opened, Doing)>,
    done: (u64, u64),
}

#[derive(Clone, Copy, PartialEq)]
enum Doing {
    Open,
    Read,
    Release,
}

impl<'a> SmallFiles<'a> {
    pub fn new(files: &'a [Opened]) -> SmallFiles<'a> {
        SmallFiles { files: files.iter(), no_open: false, tasks: Vec::new(), done: (0, 0) }
    }
}

impl Load for SmallFiles<'_> {
    fn next(&mut self, fuse: &mut Fuse, task: usize, answer: Option<&Reply>) -> Next {
        let mut now = None;
        if let Some(reply) = answer {
            let (file, doing) = &mut self.tasks[task];
            match doing {
                Doing::Open if reply.errno == libc::ENOSYS => {
                    self.no_open = true;
                    (file.fh, now) = (0, Some(Doing::Read));
                }
                Doing::Open => {
                    reply.result()?;
                    (file.fh, now) = (opened(reply)?, Some(Doing::Read));
                }
                Doing::Read => {
                    reply.result()?;
                    ensure!(reply.len as u64 == file.size, "{} bytes of {file:?}", reply.len);
                    self.done.0 += 1;
                    self.done.1 += file.size;
                    now = (!self.no_open).then_some(Doing::Release);
                }
                Doing::Release => reply.result()?,
            }
        }
        let now = match now {
            Some(doing) => doing,
            None => {
                let Some(file) = self.files.next() else { return Ok(None) };
                let first = if self.no_open { Doing::Read } else { Doing::Open };
                if self.tasks.len() <= task {
                    self.tasks.resize(task + 1, (*file, first));
                }
                self.tasks[task].0 = *file;
                first
            }
        };
        let (file, doing) = &mut self.tasks[task];
        *doing = now;
        match now {
            Doing::Open => open(fuse, op::OPEN, file.node),
            Doing::Read => {
                let pages = to_usize(file.size).next_multiple_of(4096);
                fuse.submit_read(file.node, file.fh, 0, pages)
            }
            Doing::Release => release(fuse, op::RELEASE, file.node, file.fh),
        }
        .context("a full ring")
        .map(Some)
    }

    fn done(&self) -> (u64, u64) {
        self.done
    }
}

fn open(fuse: &mut Fuse, opcode: u32, node: u64) -> Option<Ticket> {
    fuse.submit(opcode, node, &[OpenIn::default().as_bytes()], size_of::<OpenOut>())
}

fn release(fuse: &mut Fuse, opcode: u32, node: u64, fh: u64) -> Option<Ticket> {
    let body = ReleaseIn { fh, ..ReleaseIn::default() };
    fuse.submit(opcode, node, &[body.as_bytes()], 0)
}

fn opened(reply: &Reply) -> Result<u64> {
    let mut bytes = [0; size_of::<OpenOut>()];
    ensure!(reply.len == bytes.len(), "{} bytes of fuse_open_out", reply.len);
    reply.copy_to(&mut bytes);
    Ok(OpenOut::read_from_bytes(&bytes).map(|out| out.fh).unwrap_or_default())
}

/// READDIRPLUS of the whole tree, directories in any order. Its unit is an entry.
pub struct Walk {
    todo: Vec<u64>,
    no_opendir: bool,
    tasks: Vec<Listing>,
    scratch: Vec<u8>,
    entries: u64,
    bytes: u64,
    /// Nodes that were looked up on the way, once for each time.
    pub known: Vec<u64>,
}

#[derive(Clone, Copy)]
struct Listing {
    node: u64,
    fh: u64,
    offset: u64,
    doing: Doing,
}

impl Walk {
    pub fn new() -> Walk {
        Walk {
            todo: vec![ROOT_ID],
            no_opendir: false,
            tasks: Vec::new(),
            scratch: vec![0; DIR_BUFFER],
            entries: 0,
            bytes: 0,
            known: Vec::new(),
        }
    }

    /// Takes the entries of an answer: the offset of the last one, if there is one.
    fn take(&mut self, reply: &Reply) -> Result<Option<u64>> {
        let mut bytes = &mut self.scratch[..reply.len];
        reply.copy_to(bytes);
        self.bytes += reply.len as u64;
        let mut last = None;
        while !bytes.is_empty() {
            let short = "an entry that ends early";
            let (entry, rest) = EntryOut::read_from_prefix(bytes).ok().context(short)?;
            let (head, name) = DirentHeader::read_from_prefix(rest).ok().context(short)?;
            let len = to_usize(u64::from(head.namelen));
            let name = name.get(..len).context(short)?;
            if name != b"." && name != b".." {
                self.entries += 1;
                if entry.nodeid != 0 {
                    self.known.push(entry.nodeid);
                }
                if head.kind == libc::S_IFDIR >> 12 {
                    ensure!(entry.nodeid != 0, "a directory without its node");
                    self.todo.push(entry.nodeid);
                }
            }
            last = Some(head.off);
            let whole = size_of::<EntryOut>() + size_of::<DirentHeader>() + len;
            bytes = bytes.get_mut(whole.next_multiple_of(8)..).context(short)?;
        }
        Ok(last)
    }
}

impl Load for Walk {
    fn next(&mut self, fuse: &mut Fuse, task: usize, answer: Option<&Reply>) -> Next {
        let mut now = None;
        if let Some(reply) = answer {
            match self.tasks[task].doing {
                Doing::Open if reply.errno == libc::ENOSYS => {
                    self.no_opendir = true;
                    now = Some(Doing::Read);
                }
                Doing::Open => {
                    reply.result()?;
                    self.tasks[task].fh = opened(reply)?;
                    now = Some(Doing::Read);
                }
                Doing::Read => {
                    reply.result()?;
                    now = match self.take(reply)? {
                        Some(offset) => {
                            self.tasks[task].offset = offset;
                            Some(Doing::Read)
                        }
                        None => (!self.no_opendir).then_some(Doing::Release),
                    };
                }
                Doing::Release => reply.result()?,
            }
        }
        let now = match now {
            Some(doing) => doing,
            None => {
                let Some(node) = self.todo.pop() else { return Ok(None) };
                let doing = if self.no_opendir { Doing::Read } else { Doing::Open };
                let listing = Listing { node, fh: 0, offset: 0, doing };
                if self.tasks.len() <= task {
                    self.tasks.resize(task + 1, listing);
                }
                self.tasks[task] = listing;
                doing
            }
        };
        let listing = &mut self.tasks[task];
        listing.doing = now;
        match now {
            Doing::Open => open(fuse, op::OPENDIR, listing.node),
            Doing::Read => {
                let Listing { node, fh, offset, .. } = *listing;
                let body = ReadIn { fh, offset, size: to_u32(DIR_BUFFER), ..ReadIn::default() };
                fuse.submit(op::READDIRPLUS, node, &[body.as_bytes()], DIR_BUFFER)
            }
            Doing::Release => release(fuse, op::RELEASEDIR, listing.node, listing.fh),
        }
        .context("a full ring")
        .map(Some)
    }

    fn done(&self) -> (u64, u64) {
        (self.entries, self.bytes)
    }
}

/// LOOKUP in a known directory, then GETATTR, for each name once. Its unit is a request.
pub struct Stat<'a> {
    names: std::slice::Iter<'a, (u64, Vec<u8>)>,
    requests: u64,
    /// For each task whether its request is a LOOKUP.
    lookups: Vec<bool>,
    /// Nodes that were looked up, once for each time.
    pub known: Vec<u64>,
}

impl<'a> Stat<'a> {
    /// `names`: node of the directory, and the name in it.
    pub fn new(names: &'a [(u64, Vec<u8>)]) -> Stat<'a> {
        Stat { names: names.iter(), requests: 0, lookups: Vec::new(), known: Vec::new() }
    }
}

impl Load for Stat<'_> {
    fn next(&mut self, fuse: &mut Fuse, task: usize, answer: Option<&Reply>) -> Next {
        if let Some(reply) = answer {
            reply.result()?;
            self.requests += 1;
            if self.lookups[task] {
                let mut bytes = [0; size_of::<EntryOut>()];
                reply.copy_to(&mut bytes);
                let entry = EntryOut::read_from_bytes(&bytes).ok().context("fuse_entry_out")?;
                ensure!(entry.nodeid != 0, "a name that is not there");
                self.known.push(entry.nodeid);
                self.lookups[task] = false;
                return fuse.submit_getattr(entry.nodeid).context("a full ring").map(Some);
            }
            ensure!(reply.len == size_of::<AttrOut>(), "{} bytes of fuse_attr_out", reply.len);
        }
        let Some((parent, name)) = self.names.next() else { return Ok(None) };
        if self.lookups.len() <= task {
            self.lookups.resize(task + 1, true);
        }
        self.lookups[task] = true;
        let ticket = fuse.submit(op::LOOKUP, *parent, &[name, b"\0"], size_of::<EntryOut>());
        ticket.context("a full ring").map(Some)
    }

    fn done(&self) -> (u64, u64) {
        (self.requests, 0)
    }
}
