//! Memory and queues of every layout a VMM may set up, and may change while requests wait.

mod support;

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use support::assert_same;
use support::daemon::Daemon;
use support::frontend::{CONFIG_SPACE, Step, Vm, VmConfig, Vmm};
use support::fuse_client::{Fuse, FuseError, Shape, Ticket};
use support::hang_fs::{HangFs, Mode};
use support::image::{Image, pattern};
use support::memory::{Layout, MIB};
use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures};

const READ: usize = 64 << 10;
/// For what an idle machine does at once.
const LIMIT: Duration = Duration::from_secs(60);
/// `--read-timeout` where reads wait for a backend that hangs: far beyond the limit above.
const READ_TIMEOUT: Duration = Duration::from_secs(600);

fn image(scratch: &Path) -> Image {
    Image::build(scratch, 4, 4 << 20, 64 << 10, "none").expect("an image")
}

fn check_read(fuse: &mut Fuse, node: u64, file: usize, offset: u64, len: usize) {
    let got = fuse.read(node, 0, offset, len).expect("a read");
    assert_same(&got, &pattern(file, offset, len), format_args!("file {file} at {offset}"));
}

/// One guest, several kinds of requests on every queue.
fn use_all_queues(vm: &mut Vm, shape: Shape) {
    let mut hiprio = vm.fuse(0);
    for queue in 1..vm.rings.len() {
        let mut fuse = vm.fuse(queue);
        fuse.shape = shape;
        if queue == 1 {
            fuse.init().expect("INIT");
        }
        let node = fuse.resolve(b"/f0002").expect("a file");
        let room = usize::from(fuse.queue.size());
        let len = match shape {
            Shape::Slivers(cut) if !vm.config.indirect => cut * room / 4,
            Shape::Pages if !vm.config.indirect => 4096 * (room / 2).min(16),
            _ => READ,
        };
        let needed = match shape {
            Shape::Joined => 2,
            _ => 4,
        };
        if vm.config.indirect || room >= needed {
            check_read(&mut fuse, node, 2, 12_345 * queue as u64, len.max(1));
        }
        hiprio.forget(node, 1).expect("FORGET");
    }
}

#[test]
fn every_layout_of_memory_and_queues() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let image = image(scratch.path());
    let daemon = image.launch(scratch.path()).request_queues(64).spawn().expect("a daemon");
    let layouts = [
        ("flat", Layout::flat(256 * MIB)),
        ("a PC", Layout::pc(256 * MIB)),
        ("20 pieces", Layout::scattered(20, 16 * MIB)),
    ];
    let shapes = [Shape::Linux, Shape::Pages, Shape::Joined, Shape::Slivers(333)];
    for (queues, size) in [(1, 1024), (1, 128), (2, 512), (4, 16), (64, 64)] {
        for (indirect, event_idx) in [(false, false), (true, false), (false, true), (true, true)] {
            for (at, (what, memory)) in layouts.iter().enumerate() {
                let shape = shapes[(at + queues + usize::from(indirect)) % shapes.len()];
                let config = VmConfig {
                    vmm: Vmm::ALL[(at + queues) % 4],
                    memory: memory.clone(),
                    request_queues: queues,
                    queue_size: size,
                    hiprio_size: (at == 1).then_some(8),
                    indirect,
                    event_idx,
                    window: None,
                };
                let context = format!("{config:?}, {what}, {shape:?}");
                let mut vm = daemon.boot(config).unwrap_or_else(|e| panic!("{context}: {e:#}"));
                // Small rings without indirect descriptors hold short chains only.
                let shape = if size < 64 && !indirect { Shape::Joined } else { shape };
                use_all_queues(&mut vm, shape);
            }
        }
    }
}

#[test]
fn the_smallest_rings_work() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let image = image(scratch.path());
    let daemon = image.launch(scratch.path()).spawn().expect("a daemon");
    for (size, indirect) in [(2, true), (2, false), (4, false), (4, true), (1024, true)] {
        let config = VmConfig { queue_size: size, indirect, ..VmConfig::default() };
        let mut vm = daemon.boot(config).expect("a guest");
        let mut fuse = vm.fuse(1);
        fuse.shape = Shape::Joined;
        // Joined requests whose answer fits beside them are chains of two.
        fuse.init().expect("INIT");
        let node = fuse.resolve(b"/f0001").expect("a file");
        for i in 0..3 * u64::from(size) {
            check_read(&mut fuse, node, 1, i * 77, 1000);
        }
    }
}

#[test]
fn every_vmm_shakes_hands_in_its_own_order() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let image = image(scratch.path());
    let launch = image.launch(scratch.path()).request_queues(3).arg("--tag").arg("myfs");
    let daemon = launch.spawn().expect("a daemon");
    for vmm in Vmm::ALL {
        for request_queues in [1, 3] {
            let config = VmConfig { vmm, request_queues, ..VmConfig::default() };
            let mut vm = daemon.boot(config).unwrap_or_else(|e| panic!("{vmm:?}: {e:#}"));
            use_all_queues(&mut vm, Shape::Linux);
            if let Some(queues) = vm.queue_num {
                assert_eq!(queues, 4, "{vmm:?}: hiprio and three request queues");
            }
            if let Some(slots) = vm.mem_slots {
                assert!(slots >= 32, "{vmm:?}: {slots} memory slots");
            }
            if let Some(space) = &vm.config_space {
                assert_config_space(space);
                let told = &space[36..];
                let set_up = u32::try_from(request_queues).expect("a few").to_le_bytes();
                // It may have asked before it has set its queues up.
                assert!(told == set_up || told == 3u32.to_le_bytes(), "{vmm:?}: {told:?}");
                assert_eq!(vm.get_config(36, 4).expect("a part of it"), set_up);
                assert_eq!(vm.get_config(2, 5).expect("a part of it"), b"fs\0\0\0");
            }
        }
    }
}

fn assert_config_space(space: &[u8]) {
    assert_eq!(space.len(), CONFIG_SPACE);
    assert_eq!(&space[..5], b"myfs\0");
    assert!(space[4..36].iter().all(|&b| b == 0), "the tag is padded with NUL");
}

/// A daemon over a backend that hangs on command, and a guest with reads parked on it.
struct Parked {
    image: Image,
    backend: HangFs,
    daemon: Daemon,
    vm: Vm,
    fuse: Fuse,
    nodes: Vec<u64>,
    sent: HashMap<Ticket, (usize, u64)>,
}

impl Parked {
    fn new(scratch: &Path, config: VmConfig) -> Parked {
        let image = Image::build(scratch, 4, 8 << 20, 64 << 10, "none").expect("an image");
        let backend = HangFs::mount(&image.blobs, &scratch.join("backend")).expect("a backend");
        let daemon = image
            .launch_over(backend.path(), scratch)
            .read_timeout(READ_TIMEOUT)
            .spawn()
            .expect("a daemon");
        let mut vm = daemon.boot(config).expect("a guest");
        let mut fuse = vm.fuse(1);
        fuse.init().expect("INIT");
        let nodes = image.nodes(&mut fuse).expect("lookups");
        check_read(&mut fuse, nodes[0], 0, 0, READ);
        Parked { image, backend, daemon, vm, fuse, nodes, sent: HashMap::new() }
    }

    /// Reads that cannot be answered before the backend is let go, of every second chunk.
    fn park(&mut self, file: usize, chunks: std::ops::Range<u64>) {
        self.backend.set(Mode::Hang);
        for i in chunks {
            let offset = i * 2 * self.image.chunk_size + 3;
            let ticket = self.fuse.submit_read(self.nodes[file], 0, offset, READ);
            self.sent.insert(ticket.expect("room in the ring"), (file, offset));
        }
        self.fuse.flush();
        self.backend.wait_hanging(1, LIMIT).expect("the daemon asks");
        std::thread::sleep(Duration::from_millis(20));
    }

    /// Stops the rings as a VMM does that pauses its guest, and lets them go on.
    ///
    /// The VMM waits for GET_VRING_BASE in its main loop, so that must not wait for the backend.
    /// Requests that were taken and not answered stay with the device until `cont`.
    fn stop_and_cont(&mut self, what: &str) {
        let start = Instant::now();
        let base = self.vm.stop().expect("stop")[1];
        let took = start.elapsed();
        assert!(took < LIMIT, "{what}: stop took {took:?}");
        let log = self.daemon.log();
        assert!(!log.contains("hangs in a request"), "{what}: given up after {took:?}: {log}");
        let used = self.fuse.queue.used_idx();
        let kept = usize::from(base.wrapping_sub(used));
        assert!(kept <= self.sent.len(), "{what}: base {base}, used {used}");
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(self.fuse.queue.used_idx(), used, "{what}: answered while stopped");
        self.vm.cont().expect("cont");
    }

    /// Lets the backend go and compares all parked reads.
    fn finish(&mut self) {
        self.backend.set(Mode::Pass);
        let deadline = Instant::now() + LIMIT;
        while !self.sent.is_empty() {
            let reply = self.fuse.complete(deadline).unwrap_or_else(|e| {
                panic!("{} reads never ended: {e}\n{}", self.sent.len(), self.daemon.log())
            });
            let (file, offset) = self.sent.remove(&reply.ticket).expect("one of ours");
            assert_eq!(reply.errno, 0, "file {file} at {offset}");
            assert_same(&reply.bytes(), &pattern(file, offset, READ), "a parked read");
            self.fuse.recycle(reply);
        }
    }
}

#[test]
fn memory_comes_and_goes_while_reads_are_parked() {
    for vmm in [Vmm::Qemu, Vmm::Crosvm] {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let config = VmConfig { vmm, memory: Layout::flat(128 * MIB), ..VmConfig::default() };
        let mut stage = Parked::new(scratch.path(), config);
        let far = 0x1_0000_0000;
        stage.vm.plug(far, 64 * MIB).expect("hot-plug");
        // Parked reads with their buffers in the new memory, and in the old.
        stage.fuse.use_region(Some(far));
        stage.park(1, 0..20);
        stage.fuse.use_region(Some(0));
        stage.park(2, 0..20);
        for i in 1..8 {
            stage.vm.plug(far + i * 64 * MIB, 64 * MIB).expect("more hot-plug");
        }
        // The region goes although reads will still be answered into it: a guest that does so gets
        // its answers into memory that it gave away, and nobody else notices.
        stage.vm.unplug(far).expect("hot-unplug under parked reads");
        stage.fuse.use_region(Some(far + 3 * 64 * MIB));
        check_read(&mut stage.fuse, stage.nodes[0], 0, 10, 5000);
        stage.vm.unplug(far + 2 * 64 * MIB).expect("hot-unplug");
        stage.backend.set(Mode::Pass);
        let deadline = Instant::now() + LIMIT;
        while !stage.sent.is_empty() {
            let reply = stage.fuse.complete(deadline).expect("parked reads end");
            let (file, offset) = stage.sent.remove(&reply.ticket).expect("one of ours");
            if file == 2 {
                assert_eq!(reply.errno, 0);
                assert_same(&reply.bytes(), &pattern(file, offset, READ), "a parked read");
            }
            stage.fuse.recycle(reply);
        }
        // Gone means gone: a buffer there is answered with an error or with nothing at all.
        stage.fuse.use_region(Some(far + 3 * 64 * MIB));
        stage.fuse.read(stage.nodes[0], 0, 0, READ).expect("memory that is still there");
        stage.vm.unplug(far + 3 * 64 * MIB).expect("hot-unplug");
        let gone = stage.fuse.read(stage.nodes[0], 0, 0, READ);
        assert!(gone.is_err(), "a read into memory that is gone: {} bytes", gone.unwrap().len());
        stage.fuse.use_region(Some(0));
        check_read(&mut stage.fuse, stage.nodes[3], 3, 1 << 20, READ);
    }
}

#[test]
fn no_request_is_lost_between_stop_and_cont() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let mut stage = Parked::new(scratch.path(), VmConfig::default());
    for round in 0..10 {
        // Load that is under way when the rings stop.
        for i in 0..64u64 {
            let offset = (round * 64 + i) * 4096;
            let ticket = stage.fuse.submit_read(stage.nodes[1], 0, offset, READ);
            stage.sent.insert(ticket.expect("room in the ring"), (1, offset));
        }
        stage.fuse.flush();
        stage.stop_and_cont(&format!("round {round}"));
        stage.finish();
    }
}

#[test]
fn parked_reads_outlive_stop_and_cont() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let mut stage = Parked::new(scratch.path(), VmConfig::default());
    stage.park(1, 0..40);
    stage.stop_and_cont("the backend hangs");
    check_read(&mut stage.fuse, stage.nodes[0], 0, 99, 5000);
    assert_eq!(stage.fuse.in_flight(), 40);
    // The backend comes back while the rings are stopped.
    let before = stage.fuse.queue.used_idx();
    stage.vm.stop().expect("stop");
    stage.backend.set(Mode::Pass);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(stage.fuse.queue.used_idx(), before, "answered while stopped");
    stage.vm.cont().expect("cont");
    stage.finish();
}

#[test]
fn a_disabled_ring_holds_its_requests_until_it_is_enabled() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let config = VmConfig { vmm: Vmm::CloudHypervisor, ..VmConfig::default() };
    let mut stage = Parked::new(scratch.path(), config);
    for round in 0..5u64 {
        for queue in 0..2 {
            stage.vm.enable(queue, false).expect("pause");
        }
        let ticket = stage.fuse.submit_read(stage.nodes[2], 0, round * 9999, READ).expect("room");
        stage.fuse.flush();
        let held = stage.fuse.wait(ticket, Duration::from_millis(50));
        assert_eq!(held.err(), Some(FuseError::Timeout), "round {round}: served while disabled");
        for queue in 0..2 {
            stage.vm.enable(queue, true).expect("resume");
        }
        // A request that was published during the pause needs no second kick.
        let reply = stage.fuse.wait(ticket, LIMIT).expect("served after resume");
        assert_eq!(reply.errno, 0);
        assert_same(&reply.bytes(), &pattern(2, round * 9999, READ), "after resume");
        stage.fuse.recycle(reply);
    }
}

#[test]
fn a_guest_reboots_on_the_same_connection() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let mut stage = Parked::new(scratch.path(), VmConfig::default());
    for (round, reset) in [false, true, true, false].into_iter().enumerate() {
        // Chunks of its own for each round: those of the last one are cached by now.
        let first = round as u64 * 15;
        stage.park(3, first..first + 10);
        stage.vm.stop().expect("stop");
        if reset {
            stage.vm.reset_device().expect("RESET_DEVICE");
        }
        stage.backend.set(Mode::Pass);
        // A new driver: empty rings from index 0, and an INIT.
        stage.fuse.reset();
        stage.sent.clear();
        stage.vm.bases.fill(0);
        let mut steps = vec![Step::SetFeatures, Step::MemoryTable];
        for q in 0..2 {
            let ring = [Step::Num(q), Step::Base(q), Step::Addr(q), Step::Kick(q), Step::Call(q)];
            steps.extend(ring);
        }
        steps.extend([Step::Enable(0), Step::Enable(1)]);
        for step in steps {
            stage.vm.step(step).expect("the second handshake");
        }
        stage.fuse.init().expect("INIT of the guest that booted again");
        let node = stage.fuse.resolve(b"/f0003").expect("a lookup");
        check_read(&mut stage.fuse, node, 3, 100, READ);
        stage.nodes = stage.image.nodes(&mut stage.fuse).expect("lookups");
    }
}

#[test]
fn handshakes_out_of_the_ordinary() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let image = image(scratch.path());
    let daemon = image.launch(scratch.path()).spawn().expect("a daemon");

    // cloud-hypervisor restores a snapshot without asking for protocol features first.
    let config = VmConfig { vmm: Vmm::CloudHypervisor, ..VmConfig::default() };
    let mut vm = Vm::connect(&daemon.sock, config).expect("a connection");
    vm.step(Step::SetOwner).expect("SET_OWNER");
    vm.step(Step::GetFeatures).expect("GET_FEATURES");
    vm.protocol = VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
    vm.step(Step::SetProtocolFeatures).expect("SET_PROTOCOL_FEATURES");
    let asked = [Step::SetOwner, Step::GetFeatures, Step::GetProtocolFeatures];
    let rest = vm.handshake().into_iter().filter(|s| !asked.contains(s));
    for step in rest.filter(|s| *s != Step::SetProtocolFeatures).collect::<Vec<_>>() {
        vm.step(step).expect("the rest of the handshake");
    }
    // Features once more, in the middle of everything.
    vm.need_reply(false).expect("no message");
    vm.step(Step::GetFeatures).expect("GET_FEATURES again");
    use_all_queues(&mut vm, Shape::Linux);

    // A message that nobody knows is refused by a nonzero answer, and the connection stays.
    for code in [45u32, 46, 99, 1000, 1 << 30] {
        vm.send_raw(code, 0x1 | 0x8, &[1, 2, 3, 4], &[]).expect("sent");
        let (got, flags, body) = vm.recv_raw().expect("an answer");
        assert_eq!((got, flags, body.len()), (code, 0x5, 8), "message {code}");
        assert_ne!(body, [0; 8], "message {code} is not known");
        vm.send_raw(code, 0x1, &[], &[]).expect("sent, no answer wanted");
    }
    // Messages that are known but wrong, too; those that are right are acknowledged by zero.
    let state = |index: u32, num: u32| [index.to_le_bytes(), num.to_le_bytes()].concat();
    for (code, body, works) in [
        (FrontendReq::SET_VRING_NUM, state(70, 128), false),
        (FrontendReq::SET_VRING_NUM, state(0, 100), false),
        (FrontendReq::SET_VRING_NUM, state(0, 0), false),
        (FrontendReq::SET_VRING_NUM, state(0, 65_536), false),
        (FrontendReq::SET_VRING_BASE, state(0, 65_536), false),
        (FrontendReq::SET_VRING_ENABLE, state(4000, 1), false),
        (FrontendReq::SET_VRING_ENABLE, state(0, 1), true),
        (FrontendReq::SET_FEATURES, u64::MAX.to_le_bytes().to_vec(), false),
        (FrontendReq::SET_OWNER, Vec::new(), true),
    ] {
        let value = vm.ask_ack(code, &body).unwrap_or_else(|e| panic!("{code:?}, {body:?}: {e:#}"));
        assert_eq!(value == 0, works, "{code:?}, {body:?}: {value}");
    }
    drop(vm);
    let mut vm = daemon.boot(VmConfig::default()).expect("the next guest");
    use_all_queues(&mut vm, Shape::Linux);
}

#[test]
fn rings_without_eventfds_are_polled() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let image = image(scratch.path());
    let daemon = image.launch(scratch.path()).spawn().expect("a daemon");
    let mut vm = Vm::connect(&daemon.sock, VmConfig::default()).expect("a connection");
    for step in vm.handshake() {
        match step {
            // Bit 8: no descriptor comes with this message.
            Step::Kick(q) | Step::Call(q) => {
                let code = if matches!(step, Step::Kick(_)) {
                    FrontendReq::SET_VRING_KICK
                } else {
                    FrontendReq::SET_VRING_CALL
                };
                let value = q as u64 | 0x100;
                vm.send_raw(code.into(), 0x1, &value.to_le_bytes(), &[]).expect("sent");
            }
            step => vm.step(step).expect("the handshake"),
        }
    }
    let mut fuse = vm.fuse(1);
    fuse.busy_poll = true;
    fuse.init().expect("INIT");
    let node = fuse.resolve(b"/f0001").expect("a file");
    check_read(&mut fuse, node, 1, 4321, READ);
}
