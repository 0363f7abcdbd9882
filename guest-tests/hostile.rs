//! A guest that lies: malformed rings, chains, headers and bodies.
//!
//! After each of them every descriptor that can be returned has been returned, the next correct
//! read on the same queue is right, other queues answer, and the process is the same one.

mod support;

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};
use support::daemon::Daemon;
use support::frontend::{Vm, VmConfig};
use support::fuse_abi::*;
use support::fuse_client::Fuse;
use support::image::{Image, pattern};
use support::memory::{GuestBuf, Layout, MIB, PAGE};
use support::rng::Rng;
use support::virtqueue::{
    DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Desc, Used, Virtqueue, put_desc,
};
use support::{assert_same, say, to_u32};
use zerocopy::{FromBytes, IntoBytes};

/// How long the device may take to give a malformed chain back, on a machine that is busy.
const LIMIT: Duration = Duration::from_secs(60);

struct Stage {
    daemon: Daemon,
    vm: Vm,
    image: Image,
    /// The queue that is abused.
    fuse: Fuse,
    /// A queue that must not notice.
    other: Fuse,
    node: u64,
    /// Buffers for hand-written chains: request, answer, indirect table.
    input: GuestBuf,
    output: GuestBuf,
    table: GuestBuf,
    /// A guest-physical address that no region covers.
    hole: u64,
    /// Where guest memory ends.
    end: u64,
    pid: u32,
    cases: usize,
    _scratch: tempfile::TempDir,
}

impl Stage {
    fn set(indirect: bool, event_idx: bool) -> Stage {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let image = Image::build(scratch.path(), 2, 300_000, 64 << 10, "none").expect("an image");
        let daemon = image.launch(scratch.path()).request_queues(2).spawn().expect("a daemon");
        let config = VmConfig {
            request_queues: 2,
            queue_size: 256,
            indirect,
            event_idx,
            memory: Layout::scattered(3, 64 * MIB),
            ..VmConfig::default()
        };
        let mut vm = daemon.boot(config).expect("a guest");
        let mut fuse = vm.fuse(1);
        fuse.init().expect("INIT");
        let node = fuse.resolve(b"/f0000").expect("a file");
        Stage {
            other: vm.fuse(2),
            fuse,
            node,
            input: vm.memory.alloc(2 * PAGE),
            output: vm.memory.alloc(16 * PAGE),
            table: vm.memory.alloc(64 * PAGE),
            hole: vm.memory.hole(),
            end: vm.memory.end(),
            pid: daemon.pid(),
            daemon,
            vm,
            image,
            cases: 0,
            _scratch: scratch,
        }
    }

    fn queue(&mut self) -> &mut Virtqueue {
        &mut self.fuse.queue
    }

    /// The bytes of a correct request, `unique` 77.
    fn request(opcode: u32, nodeid: u64, body: &[u8]) -> Vec<u8> {
        let header = InHeader {
            len: to_u32(size_of::<InHeader>() + body.len()),
            opcode,
            unique: 77,
            nodeid,
            ..InHeader::default()
        };
        [header.as_bytes(), body].concat()
    }

    fn getattr(&self) -> Vec<u8> {
        Stage::request(op::GETATTR, self.node, GetattrIn::default().as_bytes())
    }

    fn read_request(&self, offset: u64, size: u32) -> Vec<u8> {
        let body = ReadIn { offset, size, ..ReadIn::default() };
        Stage::request(op::READ, self.node, body.as_bytes())
    }

    /// Offers `head` and waits until it comes back.
    fn offer(&mut self, name: &str, head: u16, owned: Vec<u16>) -> Used {
        let queue = self.queue();
        queue.track(head, owned);
        queue.offer(head);
        queue.flush();
        self.returned(name, head)
    }

    fn returned(&mut self, name: &str, head: u16) -> Used {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(used) = self.queue().pop() {
                assert_eq!(used.head, head, "{name}: another chain came back");
                return used;
            }
            let came = self.queue().wait(deadline);
            assert!(came, "{name}: the chain was not returned\n{}", self.daemon.log());
        }
    }

    /// A chain written out by hand, in the queue's table or an indirect one, and its return.
    /// `next` of each descriptor counts within the chain; the caller's flags are taken as they are.
    fn chain(&mut self, name: &str, descs: &[Desc], indirect: bool) {
        let writable: u64 =
            descs.iter().filter(|d| d.flags & DESC_F_WRITE != 0).map(|d| u64::from(d.len)).sum();
        let used = if indirect {
            for (i, desc) in descs.iter().enumerate() {
                put_desc(&self.table, i, *desc);
            }
            let entry = Desc {
                addr: self.table.addr(),
                len: to_u32(16 * descs.len()),
                flags: DESC_F_INDIRECT,
                next: 0,
            };
            self.entry(name, entry)
        } else {
            let owned = self.queue().reserve(descs.len()).expect("room in the table");
            for (desc, &index) in descs.iter().zip(&owned) {
                // Numbers past the chain stand for numbers past the table.
                let next = owned.get(usize::from(desc.next)).copied().unwrap_or(desc.next);
                self.queue().write_desc(index, Desc { next, ..*desc });
            }
            let head = owned[0];
            self.offer(name, head, owned)
        };
        assert!(u64::from(used.len) <= writable, "{name}: {used:?} of {writable} writable bytes");
        self.after(name);
    }

    /// One descriptor of the queue's own table, as it is.
    fn entry(&mut self, name: &str, desc: Desc) -> Used {
        let owned = self.queue().reserve(1).expect("room in the table");
        let head = owned[0];
        self.queue().write_desc(head, desc);
        self.offer(name, head, owned)
    }

    /// Any bytes as request, `room` bytes for the answer. Gives the answer back, if there is one.
    fn message(&mut self, name: &str, request: &[u8], room: usize) -> Option<(OutHeader, Vec<u8>)> {
        self.input.write(0, request);
        self.output.fill(0xee);
        let mut descs = Vec::new();
        if !request.is_empty() {
            descs.push(readable(self.input.addr(), to_u32(request.len()), 1));
        }
        if room > 0 {
            descs.push(writable(self.output.addr(), to_u32(room)));
        } else if let Some(last) = descs.last_mut() {
            last.flags = 0;
        }
        let owned = self.queue().reserve(descs.len()).expect("room in the table");
        for (i, desc) in descs.iter().enumerate() {
            let next = owned.get(i + 1).copied().unwrap_or(0);
            self.queue().write_desc(owned[i], Desc { next, ..*desc });
        }
        let head = owned[0];
        let used = self.offer(name, head, owned);
        let len = usize::try_from(used.len).expect("small");
        assert!(len <= room, "{name}: {len} bytes written into {room}");
        let written = self.output.to_vec(0, self.output.len());
        assert!(
            written[room..].iter().all(|&b| b == 0xee),
            "{name}: bytes behind the writable part changed"
        );
        let (header, body) = OutHeader::read_from_prefix(&written[..len]).ok()?;
        assert_eq!(header.len, used.len, "{name}: the header's length");
        assert!((-4095..=0).contains(&header.error), "{name}: error {}", header.error);
        assert!(header.error == 0 || body.is_empty(), "{name}: an error with a body");
        Some((header, body.to_vec()))
    }

    fn must_fail(&mut self, name: &str, request: &[u8], room: usize) {
        if let Some((header, body)) = self.message(name, request, room) {
            assert_ne!(header.error, 0, "{name}: answered with {} bytes", body.len());
        }
        self.after(name);
    }

    fn must_end(&mut self, name: &str, request: &[u8], room: usize) {
        self.message(name, request, room);
        self.after(name);
    }

    /// Every completion was asked for, and was looked at.
    fn nothing_more(&mut self, name: &str) {
        let queue = self.queue();
        assert_eq!(queue.used_idx(), queue.last_used(), "{name}: more came back than was offered");
        assert!(queue.bogus().is_empty(), "{name}: {:?} was not in flight", queue.bogus());
    }

    /// What must hold after each case.
    fn after(&mut self, name: &str) {
        self.cases += 1;
        self.nothing_more(name);
        let offset = 1000 + self.cases as u64 % 200_000;
        let got = self.fuse.read(self.node, 0, offset, 5000);
        let got = got.unwrap_or_else(|e| panic!("{name}: next read: {e}\n{}", self.daemon.log()));
        assert_same(&got, &pattern(0, offset, 5000), format_args!("{name}: next read"));
        self.nothing_more(name);
        if self.cases.is_multiple_of(8) {
            let attr = self.other.getattr(self.node);
            let attr = attr.unwrap_or_else(|e| panic!("{name}: other queue: {e}"));
            assert_eq!(attr.size, self.image.file_size, "{name}: other queue");
        }
    }

    fn finish(mut self, what: &str) -> usize {
        assert!(self.daemon.is_running(), "{what}: the daemon ended");
        assert_eq!(self.daemon.pid(), self.pid);
        self.other.getattr(self.node).expect("the other queue");
        // The next guest finds everything in order.
        drop(self.vm);
        let mut vm = self.daemon.boot(VmConfig::default()).expect("another guest");
        let mut fuse = vm.fuse(1);
        fuse.init().expect("INIT");
        self.image.check_all(&mut fuse).expect("another guest reads");
        say(format!("{what}: {} cases, then {}", self.cases, self.daemon.usage()));
        self.cases
    }
}

fn readable(addr: u64, len: u32, next: u16) -> Desc {
    Desc { addr, len, flags: DESC_F_NEXT, next }
}

fn writable(addr: u64, len: u32) -> Desc {
    Desc { addr, len, flags: DESC_F_WRITE, next: 0 }
}

/// Chains that no driver would build, each as GETATTR and as READ.
fn malformed_chains(stage: &mut Stage, indirect: bool) {
    let (hole, end) = (stage.hole, stage.end);
    for (kind, request) in [("GETATTR", stage.getattr()), ("READ", stage.read_request(10, 4096))] {
        stage.input.write(0, &request);
        let (i, o) = (stage.input.addr(), stage.output.addr());
        let len = to_u32(request.len());
        let good = readable(i, len, 1);
        let answer = writable(o, 8192);
        let r = readable;
        let w = |addr, len, next| Desc { addr, len, flags: DESC_F_WRITE | DESC_F_NEXT, next };
        let last = |addr, len| Desc { addr, len, flags: 0, next: 0 };
        let bits = |desc: Desc, more: u16| Desc { flags: desc.flags | more, ..desc };
        let cases: Vec<(&str, Vec<Desc>)> = vec![
            ("request in a hole", vec![r(hole, len, 1), answer]),
            ("request at the last address", vec![r(u64::MAX, len, 1), answer]),
            ("request wraps around", vec![r(u64::MAX - 10, len, 1), answer]),
            ("request crosses the end of memory", vec![r(end - 8, len, 1), answer]),
            ("request of 4 GiB", vec![r(i, u32::MAX, 1), answer]),
            ("empty request", vec![r(i, 0, 1), answer]),
            ("empty request in a hole", vec![r(hole, 0, 1), answer]),
            ("request of 1 byte", vec![r(i, 1, 1), answer]),
            ("request of 39 bytes", vec![r(i, 39, 1), answer]),
            ("request without its body", vec![r(i, 40, 1), answer]),
            ("request longer than its header says", vec![r(i, len + 100, 1), answer]),
            (
                "second half of the request in a hole",
                vec![r(i, 40, 1), r(hole, len - 40, 2), answer],
            ),
            ("answer in a hole", vec![good, writable(hole, 8192)]),
            ("answer at the last address", vec![good, writable(u64::MAX, 8192)]),
            ("answer wraps around", vec![good, writable(u64::MAX - 100, 8192)]),
            ("answer crosses the end of memory", vec![good, writable(end - 64, 8192)]),
            ("answer of 4 GiB", vec![good, writable(o, u32::MAX)]),
            ("empty answer", vec![good, writable(o, 0)]),
            ("answer of 1 byte", vec![good, writable(o, 1)]),
            ("answer of 15 bytes", vec![good, writable(o, 15)]),
            ("answer of a header", vec![good, writable(o, 16)]),
            ("answer of a header and 1 byte", vec![good, writable(o, 17)]),
            ("half of the answer in a hole", vec![good, w(o, 16, 2), writable(hole, 8192)]),
            ("no readable part", vec![answer]),
            ("no writable part", vec![last(i, len)]),
            ("no part at all", vec![last(i, 0)]),
            ("writable before readable", vec![w(o, 8192, 1), last(i, len)]),
            ("readable between writable", vec![good, w(o, 64, 2), r(i, len, 3), writable(o, 8192)]),
            ("the same bytes are request and answer", vec![good, writable(i, 4096)]),
            ("loop of one", vec![r(i, len, 0)]),
            ("loop of two", vec![good, w(o, 8192, 0)]),
            ("loop in the answer", vec![good, w(o, 64, 2), w(o, 64, 1)]),
            ("next past the table", vec![r(i, len, 300)]),
            ("next 65535", vec![good, w(o, 64, 0xffff)]),
            ("unknown flags", vec![bits(good, 0xfff8), bits(answer, 0xfff8)]),
            ("indirect inside", vec![good, bits(answer, DESC_F_INDIRECT)]),
            ("indirect first", vec![bits(good, DESC_F_INDIRECT), answer]),
            ("answer over the descriptor table's end", vec![good, w(o, 16, 2), writable(end, 1)]),
        ];
        for (name, descs) in cases {
            stage.chain(&format!("{kind}: {name}"), &descs, indirect);
        }
        // Long chains of single bytes.
        for count in [2, 100, 200] {
            let mut descs: Vec<Desc> = (0..count)
                .map(|n| {
                    let at = u64::from(n);
                    if n < len.min(count / 2) {
                        r(i + at, 1, u16::try_from(n + 1).expect("small"))
                    } else {
                        w(o + at, 1, u16::try_from(n + 1).expect("small"))
                    }
                })
                .collect();
            let tail = descs.last_mut().expect("not empty");
            tail.flags &= !DESC_F_NEXT;
            stage.chain(&format!("{kind}: {count} descriptors of 1 byte"), &descs, indirect);
        }
    }
}

/// Indirect descriptors whose table is wrong.
fn malformed_tables(stage: &mut Stage) {
    let (table, hole, end) = (stage.table.addr(), stage.hole, stage.end);
    for (kind, request) in [("GETATTR", stage.getattr()), ("READ", stage.read_request(10, 4096))] {
        stage.input.write(0, &request);
        let good = readable(stage.input.addr(), to_u32(request.len()), 1);
        let answer = writable(stage.output.addr(), 8192);
        put_desc(&stage.table, 0, good);
        put_desc(&stage.table, 1, answer);
        let t = |addr, len| Desc { addr, len, flags: DESC_F_INDIRECT, next: 0 };
        let with = |more, next| Desc { flags: DESC_F_INDIRECT | more, next, ..t(table, 32) };
        let cases = [
            ("table in a hole", t(hole, 32)),
            ("table at the last address", t(u64::MAX, 32)),
            ("table wraps around", t(u64::MAX - 15, 32)),
            ("table crosses the end of memory", t(end - 16, 32)),
            ("table of 0 bytes", t(table, 0)),
            ("table of 8 bytes", t(table, 8)),
            ("table of 17 bytes", t(table, 17)),
            ("table of 31 bytes", t(table, 31)),
            ("table of 33 bytes", t(table, 33)),
            ("table cut after the request", t(table, 16)),
            ("table of 65,536 entries", t(table, 16 << 16)),
            ("table of 4 GiB", t(table, !15)),
            ("table at an odd address", t(table + 1, 32)),
            ("table and next", with(DESC_F_NEXT, 3)),
            ("table, and next is itself", with(DESC_F_NEXT, 0)),
            ("table, and next past the queue", with(DESC_F_NEXT, 9999)),
            ("writable table", with(DESC_F_WRITE, 0)),
            ("table, unknown flags", with(0xff00, 0)),
        ];
        for (name, desc) in cases {
            let name = format!("{kind}: {name}");
            let used = stage.entry(&name, desc);
            assert!(used.len <= 8192, "{name}: {used:?}");
            stage.after(&name);
        }
        // A table whose entries point to it, or to one another.
        let nested = Desc { addr: table, len: 32, flags: DESC_F_INDIRECT, next: 0 };
        stage.chain(&format!("{kind}: a table inside itself"), &[nested], true);
        let nested = Desc { flags: DESC_F_INDIRECT | DESC_F_NEXT, next: 1, ..nested };
        stage.chain(&format!("{kind}: a table inside a table"), &[nested, answer], true);
        // More entries than the queue has.
        for count in [256u16, 257, 1024, 4096] {
            let (i, o) = (stage.input.addr(), stage.output.addr());
            for n in 0..count {
                let at = u64::from(n);
                let desc = if at < request.len() as u64 {
                    readable(i + at, 1, n + 1)
                } else {
                    let more = if n + 1 == count { 0 } else { DESC_F_NEXT };
                    Desc { addr: o + at, len: 1, flags: DESC_F_WRITE | more, next: n + 1 }
                };
                put_desc(&stage.table, usize::from(n), desc);
            }
            let name = format!("{kind}: table of {count} single bytes");
            let used = stage.entry(&name, t(table, 16 * u32::from(count)));
            assert!(used.len <= u32::from(count), "{name}: {used:?}");
            stage.after(&name);
        }
    }
}

/// Heads and indices that no driver would publish.
fn malformed_avail_rings(stage: &mut Stage) {
    // A jump within the ring repeats old entries; the device serves whatever they name now.
    for jump in [1u16, 2, 100, 256] {
        let name = format!("available index jumps by {jump}");
        let at = stage.queue().avail_idx();
        stage.queue().set_avail_idx(at.wrapping_add(jump));
        stage.queue().kick();
        let deadline = Instant::now() + LIMIT;
        let ahead = |q: &Virtqueue| q.used_idx().wrapping_sub(q.last_used());
        while ahead(stage.queue()) < jump && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(ahead(stage.queue()), jump, "{name}: old entries come back");
        stage.queue().pop();
        stage.queue().clear_bogus();
        stage.after(&name);
    }
    // Heads outside the table cannot be returned; what follows them must be served all the same.
    for head in [256u16, 257, 300, 0x7fff, 0x8000, 0xffff] {
        let name = format!("head {head} of 256");
        stage.queue().offer(head);
        stage.queue().flush();
        stage.after(&name);
    }
    for many in [2, 10, 200] {
        let name = format!("{many} heads outside the table at once");
        for n in 0..many {
            stage.queue().offer(1000 + n);
        }
        stage.queue().flush();
        stage.after(&name);
    }
    // The same head twice: both uses may come back, the second unasked for.
    let request = stage.getattr();
    stage.input.write(0, &request);
    let owned = stage.queue().reserve(2).expect("room in the table");
    let (first, second) = (owned[0], owned[1]);
    let (input, output) = (stage.input.addr(), stage.output.addr());
    stage.queue().write_desc(first, readable(input, to_u32(request.len()), second));
    stage.queue().write_desc(second, writable(output, 4096));
    stage.queue().offer(first);
    stage.offer("the same head twice", first, owned);
    let came = stage.queue().wait(Instant::now() + LIMIT);
    assert!(came, "the same head twice: came back once");
    assert!(stage.queue().pop().is_none() && stage.queue().bogus().len() == 1);
    stage.queue().clear_bogus();
    stage.after("the same head twice");
    // An index further ahead than the ring is long names no valid entries: once it is mended, the
    // queue goes on where it stood.
    for jump in [257u16, 300, 0x7fff, 0x8000, 0xfe00] {
        let name = format!("available index jumps by {jump}");
        let at = stage.queue().avail_idx();
        stage.queue().set_avail_idx(at.wrapping_add(jump));
        stage.queue().kick();
        std::thread::sleep(Duration::from_millis(20));
        stage.queue().set_avail_idx(at);
        stage.queue().kick();
        stage.after(&name);
    }
    // Flags and event words are hints: any value is one.
    for word in [0u16, 1, 2, 0x7fff, 0xffff] {
        let size = usize::from(stage.queue().size());
        stage.queue().rings.avail.u16_at(0).store(word & !1, Ordering::SeqCst);
        stage.queue().rings.avail.u16_at(4 + 2 * size).store(word, Ordering::SeqCst);
        stage.after(&format!("event word {word}"));
    }
    for _ in 0..100 {
        stage.queue().kick();
    }
    stage.after("kicks without requests");
}

/// Requests in sound chains that say something wrong.
fn malformed_requests(stage: &mut Stage) {
    let known: &[(&str, u32, Vec<u8>, usize)] = &[
        ("LOOKUP", op::LOOKUP, b"f0000\0".to_vec(), 128),
        ("GETATTR", op::GETATTR, vec![0; 16], 104),
        ("READLINK", op::READLINK, vec![], 4095),
        ("OPEN", op::OPEN, vec![0; 8], 16),
        ("READ", op::READ, ReadIn { size: 100, ..ReadIn::default() }.as_bytes().to_vec(), 100),
        ("STATFS", op::STATFS, vec![], 80),
        ("RELEASE", op::RELEASE, vec![0; 24], 0),
        ("GETXATTR", op::GETXATTR, [&[0; 8][..], b"user.x\0"].concat(), 8),
        ("LISTXATTR", op::LISTXATTR, vec![0; 8], 8),
        ("FLUSH", op::FLUSH, vec![0; 24], 0),
        ("OPENDIR", op::OPENDIR, vec![0; 8], 16),
        (
            "READDIR",
            op::READDIR,
            ReadIn { size: 4096, ..ReadIn::default() }.as_bytes().to_vec(),
            4096,
        ),
        (
            "READDIRPLUS",
            op::READDIRPLUS,
            ReadIn { size: 4096, ..ReadIn::default() }.as_bytes().to_vec(),
            4096,
        ),
        ("RELEASEDIR", op::RELEASEDIR, vec![0; 24], 0),
        ("ACCESS", op::ACCESS, vec![0; 8], 0),
        ("LSEEK", op::LSEEK, vec![0; 24], 8),
        ("SYNCFS", op::SYNCFS, vec![0; 8], 0),
        ("STATX", op::STATX, vec![0; 24], 288),
    ];
    let mut rng = Rng::new(1);
    let without_node = [
        op::STATFS,
        op::SYNCFS,
        op::RELEASE,
        op::RELEASEDIR,
        op::FLUSH,
        op::ACCESS,
        op::OPEN,
        op::OPENDIR,
    ];
    for (name, opcode, body, reply) in known {
        // Node ids that no LOOKUP gave. Some operations need not look at theirs.
        for node in [
            0,
            2,
            3,
            0x1234,
            u64::from(u32::MAX),
            1 << 40,
            1 << 40 | 0xff_ffff_ffff,
            2 << 40 | 36,
            0xffff << 40 | 1,
            i64::MAX.cast_unsigned(),
            u64::MAX,
            stage.node ^ 1 << 40,
            stage.node ^ 1 << 50,
        ] {
            let request = Stage::request(*opcode, node, body);
            let name = format!("{name} of node {node:#x}");
            if without_node.contains(opcode) {
                stage.must_end(&name, &request, 16 + reply);
            } else {
                stage.must_fail(&name, &request, 16 + reply);
            }
        }
        let node = stage.node;
        // Bodies that end too early.
        for cut in [0, 1, body.len() / 2, body.len().saturating_sub(1)] {
            if cut < body.len() {
                let request = Stage::request(*opcode, node, &body[..cut]);
                stage.must_end(&format!("{name} with {cut} bytes of body"), &request, 16 + reply);
            }
        }
        // Bodies that go on too long, and bodies of noise.
        let request = Stage::request(*opcode, node, &[body.as_slice(), &[0xff; 64]].concat());
        stage.must_end(&format!("{name} with bytes behind its body"), &request, 16 + reply);
        for _ in 0..3 {
            let request = Stage::request(*opcode, node, &rng.bytes(body.len()));
            stage.must_end(&format!("{name} with a body of noise"), &request, 16 + reply);
        }
        // No room for the answer.
        for room in [0, 1, 15, 16, 17, 16 + reply.saturating_sub(1)] {
            let request = Stage::request(*opcode, node, body);
            stage.must_end(&format!("{name} with {room} bytes for the answer"), &request, room);
        }
        // Headers whose length is wrong.
        for len in [0, 1, 39, 40 + to_u32(body.len()) + 1, 1 << 20, u32::MAX] {
            let mut request = Stage::request(*opcode, node, body);
            request[..4].copy_from_slice(&len.to_le_bytes());
            stage.must_end(&format!("{name} that says it has {len} bytes"), &request, 16 + reply);
        }
    }
    for opcode in [0, 7, 19, 37, 54, 55, 100, 4096, 0x1000_0000, u32::MAX] {
        let request = Stage::request(opcode, stage.node, &[0; 64]);
        stage.must_fail(&format!("opcode {opcode}"), &request, 4096);
    }
    let writes = [
        op::SETATTR,
        op::SYMLINK,
        op::MKNOD,
        op::MKDIR,
        op::UNLINK,
        op::RMDIR,
        op::RENAME,
        op::LINK,
        op::WRITE,
        op::SETXATTR,
        op::REMOVEXATTR,
        op::CREATE,
        op::FALLOCATE,
        op::RENAME2,
        op::COPY_FILE_RANGE,
        op::TMPFILE,
        op::IOCTL,
        op::SETUPMAPPING,
        op::REMOVEMAPPING,
    ];
    for opcode in writes {
        for body in [vec![0; 128], vec![], rng.bytes(80)] {
            let request = Stage::request(opcode, ROOT_ID, &body);
            stage.must_fail(&format!("opcode {opcode}, which changes things"), &request, 4096);
        }
    }
    for name in [
        &b""[..],
        b"\0",
        b"f0000",
        b"/\0",
        b"a/b\0",
        b"../f0000\0",
        b"f00\x0000",
        &[b'x'; 256],
        &[b'x'; 1500],
    ] {
        let request = Stage::request(op::LOOKUP, ROOT_ID, name);
        stage.must_end(&format!("LOOKUP of {name:?}"), &request, 16 + 128);
    }
    for (offset, size) in [
        (u64::MAX, 4096),
        (i64::MAX.cast_unsigned(), 4096),
        (u64::MAX - 4095, 4096),
        (299_999, u32::MAX),
        (0, u32::MAX),
        (0, 0),
        (0, 1),
        (300_000, 1),
    ] {
        let request = stage.read_request(offset, size);
        for room in [16, 17, 200, 65_536] {
            let name = format!("READ of {size} at {offset} into {room}");
            if let Some((header, body)) = stage.message(&name, &request, room) {
                let have = 300_000u64.saturating_sub(offset).min(u64::from(size));
                if header.error == 0 {
                    assert!(body.len() as u64 <= have, "{name}");
                    assert_same(&body, &pattern(0, offset.min(300_000), body.len()), &name);
                }
            }
            stage.after(&name);
        }
    }
    for cookie in [1, 2, 3, 77, 4096, 1 << 20, 1 << 32, 1 << 63, u64::MAX] {
        for opcode in [op::READDIR, op::READDIRPLUS] {
            let ask = ReadIn { offset: cookie, size: 4096, ..ReadIn::default() };
            let request = Stage::request(opcode, ROOT_ID, ask.as_bytes());
            stage.must_end(&format!("directory from {cookie}"), &request, 16 + 4096);
        }
    }
    // Lookups taken back that were never made. The file is still there afterwards.
    for (node, count) in [
        (stage.node, 1),
        (stage.node, u64::MAX),
        (stage.node, 1 << 32),
        (ROOT_ID, u64::MAX),
        (0, 1),
        (u64::MAX, 1),
        (0x1234, 7),
    ] {
        let request = Stage::request(op::FORGET, node, ForgetIn { nlookup: count }.as_bytes());
        for room in [0, 16, 4096] {
            stage.must_end(&format!("FORGET of {count} × {node:#x}, room {room}"), &request, room);
        }
        let list = ForgetOne { nodeid: node, nlookup: count };
        for claimed in [0, 1, 2, 1 << 28, u32::MAX] {
            let head = BatchForgetIn { count: claimed, dummy: 0 };
            let body = [head.as_bytes(), list.as_bytes()].concat();
            let request = Stage::request(op::BATCH_FORGET, 0, &body);
            stage.must_end(&format!("BATCH_FORGET that claims {claimed}"), &request, 0);
        }
    }
    for target in [0, 77, 78, u64::MAX] {
        let body = InterruptIn { unique: target };
        let request = Stage::request(op::INTERRUPT, 0, body.as_bytes());
        stage.must_end(&format!("INTERRUPT of {target}, which is not there"), &request, 16);
    }
    let init = |major, minor| InitIn { major, minor, flags: u32::MAX, ..InitIn::default() };
    for (major, minor) in [(7, 45), (7, 0), (7, 5), (7, 22), (7, 99), (6, 0), (8, 0), (0, 0)] {
        let request = Stage::request(op::INIT, 0, init(major, minor).as_bytes());
        for room in [16, 24, 80] {
            let name = format!("second INIT, protocol {major}.{minor}, room {room}");
            stage.message(&name, &request, room);
            stage.fuse.init().expect("and INIT once more, as a guest that booted again");
            stage.after(&name);
        }
    }
    for len in [0, 1, 8, 15, 16, 63] {
        let request = Stage::request(op::INIT, 0, &init(7, 45).as_bytes()[..len]);
        stage.message("INIT with a short body", &request, 80);
        stage.fuse.init().expect("INIT");
        stage.after("INIT with a short body");
    }
    let request = Stage::request(op::DESTROY, 0, &[]);
    stage.message("DESTROY in the middle", &request, 16);
    let request = stage.getattr();
    stage.message("GETATTR between DESTROY and INIT", &request, 16 + 104);
    stage.fuse.init().expect("INIT after DESTROY");
    stage.after("DESTROY in the middle");
    for _ in 0..50 {
        let len = 1 + rng.index(200);
        let noise = rng.bytes(len);
        stage.must_end("noise", &noise, 200);
    }
}

#[test]
fn four_hundred_lies_are_survived() {
    let mut total = 0;
    for (indirect, event_idx) in [(true, true), (false, false)] {
        let mut stage = Stage::set(indirect, event_idx);
        malformed_chains(&mut stage, false);
        if indirect {
            malformed_chains(&mut stage, true);
            malformed_tables(&mut stage);
        }
        malformed_avail_rings(&mut stage);
        malformed_requests(&mut stage);
        total += stage.finish(&format!("indirect {indirect}, event_idx {event_idx}"));
    }
    assert!(total >= 400, "only {total} cases");
}

/// What random cases begin with: `RAFSD_FUZZ_SEED`, or the same in each run.
fn fuzz_seed() -> u64 {
    std::env::var("RAFSD_FUZZ_SEED").map_or(1, |seed| seed.parse().expect("a number"))
}

/// How long each fuzzing test runs: `RAFSD_FUZZ_SECONDS`, or a moment.
fn fuzz_time() -> Duration {
    let seconds = std::env::var("RAFSD_FUZZ_SECONDS").ok().and_then(|s| s.parse().ok());
    Duration::from_secs(seconds.unwrap_or(5))
}

/// A descriptor of nothing sensible: addresses in buffers, in holes, at borders; any length.
fn any_desc(rng: &mut Rng, stage: &Stage) -> Desc {
    let base = match rng.below(6) {
        0 => stage.input.addr(),
        1 | 2 => stage.output.addr(),
        3 => stage.table.addr(),
        4 => stage.hole,
        _ => rng.next(),
    };
    let addr = if rng.chance(4) { base.wrapping_add(rng.below(9000)) } else { base };
    let len = match rng.below(6) {
        0 => 0,
        1 => rng.u32(),
        2 => 40,
        3 => to_u32(rng.index(100)),
        _ => to_u32(rng.index(8192)),
    };
    let flags = if rng.chance(10) { rng.u16() } else { rng.u16() & 7 };
    let next = if rng.chance(10) { rng.u16() } else { rng.u16() % 256 };
    Desc { addr, len, flags, next }
}

#[test]
fn random_rings_never_stop_a_queue() {
    let seed = fuzz_seed();
    say(format!("random rings: seed {seed}"));
    let mut rng = Rng::new(seed);
    let mut stage = Stage::set(true, true);
    let until = Instant::now() + fuzz_time();
    let mut rounds = 0u64;
    while Instant::now() < until {
        // The whole table is noise, and so is a table that some of it may point to. The request
        // bytes begin like requests.
        let opcode = 1 + u32::from(rng.u16() % 53);
        let body = rng.bytes(64);
        let request = Stage::request(opcode, stage.node, &body);
        stage.input.write(0, &request);
        for index in 0..256 {
            let desc = any_desc(&mut rng, &stage);
            stage.queue().write_desc(index, desc);
            put_desc(&stage.table, usize::from(index), any_desc(&mut rng, &stage));
        }
        let count = 1 + rng.u16() % 64;
        let before = stage.queue().used_idx();
        let first = rng.u16() % 256;
        for n in 0..count {
            stage.queue().offer((first + n) % 256);
        }
        stage.queue().flush();
        let deadline = Instant::now() + LIMIT;
        while stage.queue().used_idx().wrapping_sub(before) < count {
            assert!(
                Instant::now() < deadline,
                "round {rounds} of seed {seed}: {} of {count} heads returned\n{}",
                stage.queue().used_idx().wrapping_sub(before),
                stage.daemon.log()
            );
            std::hint::spin_loop();
        }
        while stage.queue().pop().is_some() {}
        stage.queue().clear_bogus();
        // Noise may hold a DESTROY or an INIT of another protocol.
        stage.fuse.init().unwrap_or_else(|e| panic!("round {rounds} of seed {seed}: INIT: {e}"));
        stage.after(&format!("round {rounds} of seed {seed}"));
        rounds += 1;
    }
    stage.finish(&format!("random rings of seed {seed}"));
}

#[test]
fn random_requests_are_answered() {
    let mut stage = Stage::set(true, true);
    let runs = std::cell::RefCell::new(&mut stage);
    let until = Instant::now() + fuzz_time();
    let request = (
        prop_oneof![4 => 1u32..54, 1 => any::<u32>()],
        prop_oneof![3 => Just(0u64), 1 => Just(u64::MAX), 1 => any::<u64>(), 1 => 0u64..64],
        prop::collection::vec(any::<u8>(), 0..256),
        prop_oneof![Just(0usize), Just(16), Just(144), 0..4096usize, Just(65536)],
        prop_oneof![8 => Just(None), 1 => any::<u32>().prop_map(Some)],
    );
    let config = ProptestConfig {
        cases: u32::MAX,
        failure_persistence: None,
        max_shrink_iters: 200,
        ..ProptestConfig::default()
    };
    let seed = [fuzz_seed().to_le_bytes(); 4].concat();
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
    let mut runner = TestRunner::new_with_rng(config, rng);
    let outcome = runner.run(&request, |(opcode, node, body, room, length)| {
        if Instant::now() > until {
            return Err(TestCaseError::fail("time is up"));
        }
        let mut stage = runs.borrow_mut();
        // 0 stands for a node that exists.
        let node = if node == 0 { stage.node } else { node };
        let mut bytes = Stage::request(opcode, node, &body);
        if let Some(length) = length {
            bytes[..4].copy_from_slice(&length.to_le_bytes());
        }
        stage.message(&format!("{opcode} {node:#x} {body:?} {room}"), &bytes, room);
        stage.cases += 1;
        if stage.cases.is_multiple_of(16) {
            stage.fuse.init().expect("INIT");
            stage.after("noise");
        }
        Ok(())
    });
    match outcome {
        Err(proptest::test_runner::TestError::Fail(reason, _))
            if reason.message() == "time is up" => {}
        Err(error) => panic!("{error}"),
        Ok(()) => {}
    }
    stage.fuse.init().expect("INIT");
    stage.after("all of it");
    stage.finish("random requests");
}
