//! VMMs come and go, cleanly or not: the next one is served, and nothing is left behind.

mod support;

use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use support::daemon::{Daemon, Usage};
use support::frontend::{Vm, VmConfig, Vmm};
use support::hang_fs::{HangFs, Mode};
use support::image::{Image, pattern};
use support::memory::{Layout, MIB};
use support::rng::Rng;
use support::{assert_same, say};

fn small_guest(vmm: Vmm) -> VmConfig {
    VmConfig { vmm, queue_size: 128, memory: Layout::flat(64 * MIB), ..VmConfig::default() }
}

/// Boots a guest that reads something and compares.
fn visit(daemon: &Daemon, vmm: Vmm, image: &Image) -> Vm {
    let mut vm = daemon
        .boot(small_guest(vmm))
        .unwrap_or_else(|e| panic!("{vmm:?} cannot boot: {e:#}\n{}", daemon.log()));
    let mut fuse = vm.fuse(1);
    fuse.init().expect("INIT");
    let node = fuse.resolve(b"/f0000").expect("a file");
    let got = fuse.read(node, 0, 777, 4096).expect("a read");
    assert_same(&got, &pattern(0, 777, 4096), "a visitor's read");
    let mut hiprio = vm.fuse(0);
    hiprio.forget(node, 1).expect("FORGET");
    assert_eq!(image.files, 4);
    vm
}

/// For what an idle machine does at once.
const LIMIT: Duration = Duration::from_secs(60);
/// Threads that have nothing to do end within this time.
const IDLE: Duration = Duration::from_secs(2);

/// What the daemon uses once it is idle: waits until `enough` is true, or for as long as `limit`.
fn settled(daemon: &Daemon, limit: Duration, enough: impl Fn(Usage) -> bool) -> Usage {
    let deadline = Instant::now() + limit;
    loop {
        let usage = daemon.usage();
        if enough(usage) || Instant::now() > deadline {
            return usage;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn assert_no_growth(daemon: &Daemon, before: Usage, cycles: usize, what: &str) {
    let most = before.anon_kib + 2048;
    let after = settled(daemon, LIMIT, |u| {
        u.fds <= before.fds && u.threads <= before.threads && u.anon_kib <= most
    });
    say(format!("{what}: {cycles} cycles, from {before} to {after}"));
    assert!(after.fds <= before.fds, "{what}: fds\n{}", daemon.log());
    assert!(after.threads <= before.threads, "{what}: threads");
    assert!(
        after.anon_kib <= most,
        "{what}: memory grew by {} KiB in {cycles} cycles",
        after.anon_kib - before.anon_kib
    );
}

#[test]
fn vmms_come_and_go_and_leave_nothing_behind() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let image = Image::build(scratch.path(), 4, 1 << 20, 64 << 10, "none").expect("an image");
    let daemon = image.launch(scratch.path()).spawn().expect("a daemon");
    // The first visits start threads and caches that stay.
    for vmm in Vmm::ALL.into_iter().cycle().take(10) {
        visit(&daemon, vmm, &image).stop().expect("a clean stop");
    }
    let idle = settled(&daemon, IDLE, |_| false);

    for cycle in 0..60 {
        let vmm = Vmm::ALL[cycle % Vmm::ALL.len()];
        let mut vm = visit(&daemon, vmm, &image);
        if cycle % 2 == 0 {
            vm.stop().expect("a clean stop");
        }
    }
    assert_no_growth(&daemon, idle, 60, "clean and abrupt");

    let mut cycles = 0;
    for vmm in Vmm::ALL {
        let steps = vmm.handshake(2).len();
        for stop_after in (0..=steps).step_by(3) {
            let mut vm = Vm::connect(&daemon.sock, small_guest(vmm)).expect("a connection");
            for step in vm.handshake().into_iter().take(stop_after) {
                vm.step(step).expect("the handshake so far");
            }
            cycles += 1;
        }
        visit(&daemon, vmm, &image);
    }
    assert_no_growth(&daemon, idle, cycles, "gone in the middle of the handshake");
}

#[test]
fn a_vmm_that_talks_nonsense_does_not_keep_the_next_one_out() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let image = Image::build(scratch.path(), 4, 1 << 20, 64 << 10, "none").expect("an image");
    let daemon = image.launch(scratch.path()).spawn().expect("a daemon");
    for vmm in Vmm::ALL {
        visit(&daemon, vmm, &image);
    }
    let idle = settled(&daemon, IDLE, |_| false);
    let mut rng = Rng::new(7);
    let mut cycles = 0;
    for round in 0..3 {
        // Messages cut short: the header alone, half a body, half a header.
        for (code, body) in [(2u32, 8), (5, 8), (8, 8), (9, 40), (37, 40), (24, 52)] {
            for sent in [5, 12, 12 + body / 2] {
                let mut vm = after_some_steps(&daemon, round * 4);
                let len = u32::try_from(body).expect("small");
                let mut bytes: Vec<u8> =
                    [code, 1, len].iter().flat_map(|w| w.to_le_bytes()).collect();
                bytes.resize(12 + body, 0);
                vm.send_bytes(&[&bytes[..sent]], &[]).expect("sent");
                cycles += 1;
            }
        }
        // Every message with a body of noise, of no bytes, and far too long; with fds nobody wants.
        for code in (0..48).chain([1000, u32::MAX]) {
            let mut vm = after_some_steps(&daemon, round * 5);
            let len = rng.index(64);
            let noise = rng.bytes(len);
            let fd = std::fs::File::open("/dev/null").expect("/dev/null");
            let fds = [fd.as_raw_fd(); 3];
            // The daemon may hang up in between: then the rest cannot be sent.
            let _ = vm.send_raw(code, 1, &noise, &fds[..rng.index(4)]);
            let _ = vm.send_raw(code, 1, &[], &[]);
            let _ = vm.send_bytes(&[&code.to_le_bytes(), &[1, 0, 0, 0], &[0xff; 4]], &[]);
            let _ = vm.send_bytes(&[&noise], &fds);
            cycles += 1;
        }
        visit(&daemon, Vmm::ALL[usize::try_from(round).expect("small")], &image);
    }
    assert_no_growth(&daemon, idle, cycles, "nonsense");
}

/// A connection with the first so many steps of QEMU's handshake behind it.
fn after_some_steps(daemon: &Daemon, steps: i32) -> Vm {
    let mut vm = Vm::connect(&daemon.sock, small_guest(Vmm::Qemu)).expect("a connection");
    let steps = usize::try_from(steps).expect("not negative");
    for step in vm.handshake().into_iter().take(steps) {
        vm.step(step).expect("the handshake so far");
    }
    vm
}

#[test]
fn guests_that_vanish_with_parked_reads_leave_nothing_behind() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let image = Image::build(scratch.path(), 4, 16 << 20, 64 << 10, "none").expect("an image");
    let backend = HangFs::mount(&image.blobs, &scratch.path().join("backend")).expect("a backend");
    let daemon = image
        .launch_over(backend.path(), scratch.path())
        .read_timeout(10 * LIMIT)
        .spawn()
        .expect("a daemon");
    let mut idle = None;
    let cycles = 30;
    for cycle in 0..cycles {
        backend.set(Mode::Pass);
        let mut vm = visit(&daemon, Vmm::ALL[cycle % Vmm::ALL.len()], &image);
        let mut fuse = {
            // The visitor's queue is gone with it: a guest that boots again on the same connection.
            drop(vm);
            vm = daemon.boot(small_guest(Vmm::Qemu)).expect("a guest");
            vm.fuse(1)
        };
        fuse.init().expect("INIT");
        let node = fuse.resolve(b"/f0003").expect("a file");
        backend.set(Mode::Hang);
        let mut parked = 0;
        // Each cycle in a part of the file of its own: nothing of it is cached yet.
        for i in 0..30u64 {
            let offset = (cycle as u64 * 8 + i % 8) * image.chunk_size + 5;
            parked += usize::from(fuse.submit_read(node, 0, offset, 4096).is_some());
        }
        fuse.flush();
        assert_eq!(parked, 30);
        backend.wait_hanging(1, LIMIT).expect("the daemon asks its backend");
        if cycle % 3 == 0 {
            drop(vm);
            backend.set(Mode::Pass);
        } else if cycle % 3 == 1 {
            backend.set(Mode::Pass);
            drop(vm);
        } else {
            backend.set(Mode::Fail(libc::EIO));
            drop(vm);
        }
        if cycle == 5 {
            backend.set(Mode::Pass);
            idle = Some(settled(&daemon, IDLE, |_| false));
        }
    }
    backend.set(Mode::Pass);
    let mut vm = daemon.boot(small_guest(Vmm::Qemu)).expect("a guest");
    let mut fuse = vm.fuse(1);
    fuse.init().expect("INIT");
    image.check_all(&mut fuse).expect("all of it");
    drop(vm);
    // Buffers of downloads that were under way may stay pooled: more room than for idle visits.
    let idle = idle.expect("after the sixth cycle");
    let before = Usage { anon_kib: idle.anon_kib + 8192, ..idle };
    assert_no_growth(&daemon, before, cycles, "gone with parked reads");
}

#[test]
fn a_guest_goes_on_from_a_snapshot_in_another_process() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let image = Image::build(scratch.path(), 4, 1 << 20, 64 << 10, "none").expect("an image");
    let backend = HangFs::mount(&image.blobs, &scratch.path().join("backend")).expect("a backend");
    let launch = image.launch_over(backend.path(), scratch.path());
    let daemon = launch.spawn().expect("a daemon");
    let mut vm = daemon.boot(small_guest(Vmm::CloudHypervisor)).expect("a guest");
    let mut fuse = vm.fuse(1);
    fuse.init().expect("INIT, the only one");
    let nodes = image.nodes(&mut fuse).expect("lookups");
    backend.set(Mode::Hang);
    let mut sent = Vec::new();
    for (file, node) in nodes.iter().enumerate() {
        let ticket = fuse.submit_read(*node, 0, 70_000, 4096).expect("room in the ring");
        sent.push((file, ticket));
    }
    fuse.flush();
    backend.wait_hanging(1, LIMIT).expect("the daemon asks its backend");
    assert!(vm.save_state().is_err(), "a guest that runs");
    vm.stop().expect("all rings stop");
    let state = vm.save_state().expect("the state");
    let log = daemon.kill();
    assert!(!log.contains("panicked"), "{log}");
    backend.set(Mode::Pass);
    let daemon = launch.spawn().expect("another daemon");
    vm.restore(&daemon.sock, &state).expect("the guest goes on");
    for (file, ticket) in sent {
        let reply = fuse.wait(ticket, LIMIT).expect("its answer");
        assert_eq!(reply.errno, 0);
        assert_same(&reply.bytes(), &pattern(file, 70_000, 4096), "a read that was held");
        fuse.recycle(reply);
    }
    image.check_all(&mut fuse).expect("the rest, and no answer twice");
    say(format!("a state of {} bytes", state.len()));
}

#[test]
fn a_guest_that_knows_files_of_a_shared_directory_is_not_saved() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let image = Image::build(scratch.path(), 4, 1 << 20, 64 << 10, "none").expect("an image");
    let shared = scratch.path().join("shared");
    std::fs::create_dir(&shared).expect("a directory");
    std::fs::write(shared.join("file"), "text").expect("a file");
    let daemon =
        image.launch(scratch.path()).arg("--shared-dir").arg(&shared).spawn().expect("a daemon");
    let mut vm = daemon.boot(small_guest(Vmm::CloudHypervisor)).expect("a guest");
    let mut fuse = vm.fuse(1);
    fuse.init().expect("INIT");
    let saved = |vm: &mut Vm| {
        vm.stop().expect("all rings stop");
        let state = vm.save_state();
        vm.cont().expect("and go on");
        state.is_ok()
    };
    assert!(saved(&mut vm), "nothing is known yet");
    let node = fuse.resolve(b"/file").expect("a file");
    assert!(!saved(&mut vm), "another process would not know the file");
    daemon.expect_log("the guest knows files of a shared directory");
    fuse.getattr(node).expect("the guest goes on");
    fuse.forget(node, 1).expect("FORGET");
    assert!(saved(&mut vm), "it has been forgotten");
}
