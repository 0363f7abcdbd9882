//! The other side, for tests: a guest that writes rings by hand, a VMM that speaks vhost-user, and
//! a service whose requests do what the test says.

// The numbers are the tests' own, and small.
#![allow(clippy::cast_possible_truncation)]

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::guest_memory::FileOffset;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, VolatileSlice};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{BusyPoll, Counters, Device, DeviceConfig, Listener, Outcome, Serve, Stop, Wait};

pub const HEADER: usize = 40;
pub const LIMIT: Duration = Duration::from_secs(60);

/// Copies its body into the answer.
pub const ECHO: u32 = 1;
/// Is never answered.
pub const FORGET: u32 = 2;
/// Waits until the test says so, then echoes.
pub const WAIT: u32 = 3;
pub const PANIC: u32 = 4;
/// Cuts short the request whose id is in its body.
pub const INTERRUPT: u32 = 5;
/// Agrees on the number in its body.
pub const AGREE: u32 = 6;
/// Answers what was agreed on.
pub const AGREED: u32 = 7;
/// Is not over before another one has begun, on another thread; answers whether one has.
pub const MEET: u32 = 8;

/// A request: length, operation, id, then a body at `HEADER`.
pub fn request(op: u32, unique: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; HEADER];
    bytes[..4].copy_from_slice(&((HEADER + body.len()) as u32).to_le_bytes());
    bytes[4..8].copy_from_slice(&op.to_le_bytes());
    bytes[8..16].copy_from_slice(&unique.to_le_bytes());
    bytes.extend_from_slice(body);
    bytes
}

/// An answer: length, negative errno, id, then a body.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    pub errno: i32,
    pub unique: u64,
    pub body: Vec<u8>,
}

#[derive(Default)]
pub struct World {
    waits: Mutex<HashMap<u64, oneshot::Sender<()>>>,
    met: (Mutex<u32>, Condvar),
    pub services: AtomicU32,
}

impl World {
    /// Lets the waiting request go on. False if it does not wait (any more).
    pub fn release(&self, unique: u64) -> bool {
        let sender = self.waits.lock().unwrap().remove(&unique);
        sender.is_some_and(|s| s.send(()).is_ok())
    }

    /// Lets the wait end without a result.
    pub fn lose(&self, unique: u64) {
        self.waits.lock().unwrap().remove(&unique);
    }

    fn meet(&self) -> bool {
        let mut begun = self.met.0.lock().unwrap();
        *begun += 1;
        self.met.1.notify_all();
        let alone = |begun: &mut u32| *begun < 2;
        !self.met.1.wait_timeout_while(begun, LIMIT, alone).unwrap().1.timed_out()
    }

    pub fn waiting(&self) -> usize {
        let mut waits = self.waits.lock().unwrap();
        waits.retain(|_, sender| !sender.is_closed());
        waits.len()
    }
}

pub struct Toy(Arc<World>, AtomicU64);

impl Drop for Toy {
    fn drop(&mut self) {
        self.0.services.fetch_sub(1, Ordering::SeqCst);
    }
}

pub struct ToyRequest {
    op: u32,
    unique: u64,
    body: Vec<u8>,
}

fn write(reply: &[VolatileSlice<'_>], bytes: &[u8]) -> bool {
    let room: usize = reply.iter().map(|s| s.len()).sum();
    let mut rest = bytes;
    for slice in reply {
        let n = rest.len().min(slice.len());
        slice.copy_from(&rest[..n]);
        rest = &rest[n..];
    }
    room >= bytes.len()
}

fn answer(unique: u64, errno: i32, body: &[u8], reply: &[VolatileSlice<'_>]) -> u32 {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&((16 + body.len()) as u32).to_le_bytes());
    bytes.extend_from_slice(&(-errno).to_le_bytes());
    bytes.extend_from_slice(&unique.to_le_bytes());
    bytes.extend_from_slice(body);
    if reply.iter().map(|s| s.len()).sum::<usize>() < bytes.len() {
        return 0;
    }
    assert!(write(reply, &bytes));
    bytes.len() as u32
}

impl Serve for Toy {
    type Request = ToyRequest;
    type Pins = bool;
    const MAX_REQUEST_LEN: usize = 64 * 1024;

    fn agreed(&self) -> u64 {
        self.1.load(Ordering::SeqCst)
    }

    fn resume(&self, agreed: u64) -> Result<(), &'static str> {
        self.1.store(agreed, Ordering::SeqCst);
        Ok(())
    }

    fn parse(&self, bytes: &[u8]) -> Result<ToyRequest, i32> {
        let word = |i| bytes.get(i..i + 4).map(|b| u32::from_le_bytes(b.try_into().unwrap()));
        if bytes.len() < HEADER || word(0) != u32::try_from(bytes.len()).ok() {
            return Err(libc::EINVAL);
        }
        Ok(ToyRequest {
            op: word(4).unwrap(),
            unique: u64::from_le_bytes(bytes[8..16].try_into().unwrap()),
            body: bytes[HEADER..].to_vec(),
        })
    }

    fn unique(request: &ToyRequest) -> u64 {
        request.unique
    }

    fn subject(request: &ToyRequest) -> (u64, u32) {
        (1, request.op)
    }

    fn handle(
        &self,
        request: &ToyRequest,
        reply: &[VolatileSlice<'_>],
        ready: &bool,
    ) -> Outcome<bool> {
        match request.op {
            ECHO => Outcome::Reply(answer(request.unique, 0, &request.body, reply)),
            FORGET => Outcome::NoReply,
            WAIT if *ready => Outcome::Reply(answer(request.unique, 0, &request.body, reply)),
            WAIT => {
                let (send, receive) = oneshot::channel();
                self.0.waits.lock().unwrap().insert(request.unique, send);
                // A sender that is gone makes this panic: a task that ends without a result.
                let work = Box::pin(async move { receive.await.map(|()| true).unwrap() });
                Outcome::Wait(Wait { work, interruptible: true })
            }
            INTERRUPT => {
                Outcome::Interrupt(u64::from_le_bytes(request.body[..8].try_into().unwrap()))
            }
            AGREE => {
                self.1.store(
                    u64::from_le_bytes(request.body[..8].try_into().unwrap()),
                    Ordering::SeqCst,
                );
                Outcome::Reply(answer(request.unique, 0, &[], reply))
            }
            AGREED => {
                Outcome::Reply(answer(request.unique, 0, &self.agreed().to_le_bytes(), reply))
            }
            MEET => {
                let met = self.0.meet();
                Outcome::Reply(answer(request.unique, 0, &[met.into()], reply))
            }
            PANIC => panic!("as the test wants it"),
            _ => Outcome::Reply(self.error(request.unique, libc::ENOSYS, reply)),
        }
    }

    fn error(&self, unique: u64, errno: i32, reply: &[VolatileSlice<'_>]) -> u32 {
        answer(unique, errno, &[], reply)
    }

    fn refuse(&self, bytes: &[u8], errno: i32, reply: &[VolatileSlice<'_>]) -> u32 {
        match bytes.get(..HEADER) {
            Some(header) => {
                self.error(u64::from_le_bytes(header[8..16].try_into().unwrap()), errno, reply)
            }
            None => 0,
        }
    }
}

/// A device that serves on a socket of its own.
pub struct Daemon {
    pub path: PathBuf,
    pub world: Arc<World>,
    pub stop: Stop,
    pub counters: Arc<Counters>,
    thread: Option<JoinHandle<()>>,
    _runtime: tokio::runtime::Runtime,
    _dir: tempfile::TempDir,
}

impl Daemon {
    pub fn start(request_queues: u16) -> Daemon {
        Daemon::start_polling(request_queues, BusyPoll::default())
    }

    /// With queues that look for the next request as `busy_poll` says.
    pub fn start_polling(request_queues: u16, busy_poll: BusyPoll) -> Daemon {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fs.sock");
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
        let world = Arc::new(World::default());
        let config = DeviceConfig {
            tag: "toy".to_owned(),
            request_queues,
            advised_queues: request_queues,
            busy_poll,
            window: None,
            memory_slots: true,
        };
        let device = Device::with_service(config, runtime.handle().clone(), {
            let world = Arc::clone(&world);
            move |_| {
                world.services.fetch_add(1, Ordering::SeqCst);
                Toy(Arc::clone(&world), AtomicU64::new(0))
            }
        })
        .unwrap();
        let listener = Listener::bind(&path).unwrap();
        let (stop, counters) = (Stop::new().unwrap(), Arc::clone(device.counters()));
        let thread = std::thread::spawn({
            let stop = stop.clone();
            move || device.serve(&listener, &stop).unwrap()
        });
        Daemon { path, world, stop, counters, thread: Some(thread), _runtime: runtime, _dir: dir }
    }

    /// Stops the device and returns how long that took.
    pub fn end(&mut self) -> Duration {
        let start = Instant::now();
        self.stop.raise();
        self.thread.take().unwrap().join().unwrap();
        start.elapsed()
    }

    /// Waits until no connection is served.
    pub fn await_idle(&self) {
        eventually("the connection is released", || {
            self.world.services.load(Ordering::SeqCst) == 0
        });
    }

    pub fn count(&self, counter: impl Fn(&Counters) -> &AtomicU64) -> u64 {
        counter(&self.counters).load(Ordering::SeqCst)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.end();
        }
    }
}

pub fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < LIMIT, "not within {LIMIT:?}: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Two regions that are neighbours for the guest, and far apart for everyone else.
pub const LOW: u64 = 0x10_0000;
pub const HALF: u64 = 4 << 20;
pub const BORDER: u64 = LOW + HALF;
pub const END: u64 = BORDER + HALF;
const USER: [u64; 2] = [0x7f00_0000_0000, 0x7e00_0000_0000];

/// The memory of a guest.
#[derive(Clone)]
pub struct Guest {
    pub file: Arc<File>,
    pub memory: GuestMemoryMmap,
}

impl Guest {
    pub fn new() -> Guest {
        let file = tempfile::tempfile().unwrap();
        file.set_len(2 * HALF).unwrap();
        let part = |start| Some(FileOffset::new(file.try_clone().unwrap(), start));
        let half = HALF as usize;
        let memory = GuestMemoryMmap::from_ranges_with_files([
            (GuestAddress(LOW), half, part(HALF)),
            (GuestAddress(BORDER), half, part(0)),
        ])
        .unwrap();
        Guest { file: Arc::new(file), memory }
    }

    /// Another guest with the same memory.
    pub fn copy(&self) -> Guest {
        let copy = Guest::new();
        copy.write(LOW, &self.read(LOW, 2 * HALF as usize));
        copy
    }

    pub fn regions(&self) -> [VhostUserMemoryRegionInfo; 2] {
        let region = |guest, user, offset| VhostUserMemoryRegionInfo {
            guest_phys_addr: guest,
            memory_size: HALF,
            userspace_addr: user,
            mmap_offset: offset,
            mmap_handle: self.file.as_raw_fd(),
        };
        [region(LOW, USER[0], HALF), region(BORDER, USER[1], 0)]
    }

    pub fn write(&self, addr: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(addr)).unwrap();
    }

    pub fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        bytes
    }

    fn u16(&self, addr: u64) -> u16 {
        self.memory.load::<u16>(GuestAddress(addr), Ordering::SeqCst).unwrap()
    }

    fn set_u16(&self, addr: u64, value: u16) {
        self.memory.store(value, GuestAddress(addr), Ordering::SeqCst).unwrap();
    }
}

pub fn user_addr(guest_addr: u64) -> u64 {
    if guest_addr < BORDER { guest_addr - LOW + USER[0] } else { guest_addr - BORDER + USER[1] }
}

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// A ring as its driver sees it. Descriptors 3n, 3n+1 make up the chain of slot n, with 8 KiB of
/// guest memory for the request and 8 KiB for the answer.
#[derive(Clone)]
pub struct DriverRing {
    pub guest: Guest,
    pub index: usize,
    pub size: u16,
    base: u64,
    pub avail: u16,
    pub used: u16,
}

impl DriverRing {
    pub fn new(guest: &Guest, index: usize, size: u16) -> DriverRing {
        DriverRing {
            guest: guest.clone(),
            index,
            size,
            base: LOW + index as u64 * 0x10_0000,
            avail: 0,
            used: 0,
        }
    }

    pub fn table(&self) -> u64 {
        self.base
    }

    pub fn avail_ring(&self) -> u64 {
        self.base + 0x8000
    }

    pub fn used_ring(&self) -> u64 {
        self.base + 0xa000
    }

    /// Memory for the slot: 16 KiB.
    pub fn buffer(&self, slot: u16) -> u64 {
        self.base + 0x1_0000 + u64::from(slot) * 0x4000
    }

    pub fn describe(&self, i: u16, addr: u64, len: u32, flags: u16, next: u16) {
        self.describe_at(self.table() + u64::from(i) * 16, addr, len, flags, next);
    }

    pub fn describe_at(&self, at: u64, addr: u64, len: u32, flags: u16, next: u16) {
        self.guest.write(at, &addr.to_le_bytes());
        self.guest.write(at + 8, &len.to_le_bytes());
        self.guest.write(at + 12, &flags.to_le_bytes());
        self.guest.write(at + 14, &next.to_le_bytes());
    }

    /// Writes a request and its two descriptors; returns the head.
    pub fn prepare(&self, slot: u16, request: &[u8], room: u32) -> u16 {
        let buffer = self.buffer(slot);
        self.guest.write(buffer, request);
        let head = slot * 3;
        let more = if room > 0 { NEXT } else { 0 };
        self.describe(head, buffer, request.len() as u32, more, head + 1);
        self.describe(head + 1, buffer + 0x2000, room, WRITE, 0);
        head
    }

    /// Makes a head available.
    pub fn publish(&mut self, head: u16) {
        self.publish_all(&[head]);
    }

    /// Makes several chains available, all at once.
    pub fn publish_all(&mut self, heads: &[u16]) {
        let mut avail = self.avail;
        for &head in heads {
            let entry = self.avail_ring() + 4 + 2 * u64::from(avail % self.size);
            self.guest.set_u16(entry, head);
            avail = avail.wrapping_add(1);
        }
        self.set_avail(avail);
    }

    /// Moves the available index, whatever is in the entries.
    pub fn set_avail(&mut self, avail: u16) {
        self.avail = avail;
        self.guest.set_u16(self.avail_ring() + 2, avail);
    }

    /// The driver's wish not to be told before the used index passes this.
    pub fn set_used_event(&self, value: u16) {
        let at = self.avail_ring() + 4 + 2 * u64::from(self.size);
        self.guest.set_u16(at, value);
    }

    pub fn used_index(&self) -> u16 {
        self.guest.u16(self.used_ring() + 2)
    }

    /// The next chain that was given back: head and length.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        if self.used_index() == self.used {
            return None;
        }
        let entry = self.used_ring() + 4 + 8 * u64::from(self.used % self.size);
        self.used = self.used.wrapping_add(1);
        let bytes = self.guest.read(entry, 8);
        let word = |i: usize| u32::from_le_bytes(bytes[i..i + 4].try_into().unwrap());
        Some((word(0) as u16, word(4)))
    }

    pub fn await_used(&mut self) -> (u16, u32) {
        let mut used = None;
        eventually("a chain is given back", || {
            used = self.take_used();
            used.is_some()
        });
        used.unwrap()
    }

    /// The answer in a slot, as long as the used length says.
    pub fn answer(&self, slot: u16, len: u32) -> Answer {
        let bytes = self.guest.read(self.buffer(slot) + 0x2000, len as usize);
        let word = |i: usize| u32::from_le_bytes(bytes[i..i + 4].try_into().unwrap());
        assert_eq!(word(0), len, "the answer's own length");
        Answer {
            errno: -(word(4) as i32),
            unique: u64::from_le_bytes(bytes[8..16].try_into().unwrap()),
            body: bytes[16..].to_vec(),
        }
    }

    /// What a driver does when it starts over.
    pub fn reset(&mut self) {
        self.avail = 0;
        self.used = 0;
        self.guest.set_u16(self.avail_ring() + 2, 0);
        self.guest.set_u16(self.used_ring() + 2, 0);
    }
}

/// A VMM with rings.
pub struct Vmm {
    pub frontend: Frontend,
    pub guest: Guest,
    pub rings: Vec<DriverRing>,
    pub kicks: Vec<EventFd>,
    pub calls: Vec<EventFd>,
}

pub const EVENT_IDX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;
const PROTOCOL_FEATURES: u64 = 1 << 30;

impl Vmm {
    /// Connects and negotiates, as QEMU does.
    pub fn connect(path: &Path, queues: usize) -> Vmm {
        Self::on(UnixStream::connect(path).unwrap(), queues)
    }

    pub fn on(stream: UnixStream, queues: usize) -> Vmm {
        let mut frontend = Frontend::from_stream(stream, 65);
        frontend.get_features().unwrap();
        frontend.set_owner().unwrap();
        // The crate's front end wants this before protocol features may be used.
        frontend.set_features(VERSION_1 | PROTOCOL_FEATURES).unwrap();
        let offered = frontend.get_protocol_features().unwrap();
        frontend.set_protocol_features(offered).unwrap();
        frontend.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
        assert!(offered.contains(VhostUserProtocolFeatures::MQ));
        let guest = Guest::new();
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        Vmm {
            frontend,
            rings: (0..queues).map(|i| DriverRing::new(&guest, i, 64)).collect(),
            kicks: (0..queues).map(|_| event()).collect(),
            calls: (0..queues).map(|_| event()).collect(),
            guest,
        }
    }

    /// Connects and starts `queues` rings.
    pub fn started(path: &Path, queues: usize) -> Vmm {
        let mut vmm = Vmm::connect(path, queues);
        vmm.set_features(0);
        vmm.frontend.set_mem_table(&vmm.guest.regions()).unwrap();
        for i in 0..queues {
            vmm.start_ring(i, 0);
        }
        vmm
    }

    pub fn set_features(&mut self, more: u64) {
        let features = VERSION_1 | PROTOCOL_FEATURES | more;
        self.frontend.set_features(features).unwrap();
    }

    pub fn config(&self, i: usize) -> VringConfigData {
        let ring = &self.rings[i];
        VringConfigData {
            queue_max_size: 1024,
            queue_size: ring.size,
            flags: 0,
            desc_table_addr: user_addr(ring.table()),
            used_ring_addr: user_addr(ring.used_ring()),
            avail_ring_addr: user_addr(ring.avail_ring()),
            log_addr: None,
        }
    }

    pub fn start_ring(&mut self, i: usize, base: u16) {
        let config = self.config(i);
        let f = &mut self.frontend;
        f.set_vring_num(i, self.rings[i].size).unwrap();
        f.set_vring_base(i, base).unwrap();
        f.set_vring_addr(i, &config).unwrap();
        f.set_vring_kick(i, &self.kicks[i]).unwrap();
        f.set_vring_call(i, &self.calls[i]).unwrap();
        f.set_vring_enable(i, true).unwrap();
    }

    /// Stops a ring; returns its base.
    pub fn stop_ring(&mut self, i: usize) -> u16 {
        u16::try_from(self.frontend.get_vring_base(i).unwrap()).unwrap()
    }

    /// Puts a request into a slot of a ring and kicks.
    pub fn send(&mut self, ring: usize, slot: u16, request: &[u8], room: u32) {
        let head = self.rings[ring].prepare(slot, request, room);
        self.rings[ring].publish(head);
        self.kick(ring);
    }

    pub fn kick(&self, ring: usize) {
        self.kicks[ring].write(1).unwrap();
    }

    /// Waits for the next answer of a ring, which must be to the request in `slot`.
    pub fn receive(&mut self, ring: usize, slot: u16) -> Answer {
        let (head, len) = self.rings[ring].await_used();
        assert_eq!(head, slot * 3, "the head that is given back");
        self.rings[ring].answer(slot, len)
    }

    /// A request that must work, for whatever happened before.
    pub fn echo(&mut self, ring: usize, slot: u16) {
        let unique = 0xec40_0000 + u64::from(self.rings[ring].avail);
        self.send(ring, slot, &request(ECHO, unique, b"is it right?"), 4096);
        let want = Answer { errno: 0, unique, body: b"is it right?".to_vec() };
        assert_eq!(self.receive(ring, slot), want);
    }

    /// Whether the guest was called since the last time.
    pub fn called(&self, ring: usize) -> bool {
        self.calls[ring].read().is_ok()
    }
}
