//! The queue never waits: a backend that hangs delays nothing but the reads that need it.

#[path = "support/quick.rs"]
mod quick;
mod support;

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use quick::ends_at_once;
use support::daemon::Daemon;
use support::frontend::{Vm, VmConfig};
use support::fuse_client::{Fuse, FuseError, Ticket};
use support::hang_fs::{HangFs, Mode};
use support::image::{Image, pattern};
use support::{assert_same, say};

const COLD_READS: usize = 256;
const READ: usize = 4096;
/// For what an idle machine does at once.
const LIMIT: Duration = Duration::from_secs(60);
/// `--read-timeout` where reads wait for a backend that hangs: far beyond the limit above.
const READ_TIMEOUT: Duration = Duration::from_secs(600);

/// An image on a backend that hangs on command, and a guest that has warmed up its first file.
struct Stage {
    image: Image,
    backend: HangFs,
    daemon: Daemon,
    vm: Vm,
    fuse: Fuse,
    hiprio: Fuse,
    nodes: Vec<u64>,
}

impl Stage {
    /// 32 files of 2 MiB in chunks of 64 KiB.
    fn set(scratch: &Path, read_timeout: Duration) -> Stage {
        let image = Image::build(scratch, 32, 2 << 20, 64 << 10, "none").expect("an image");
        let backend = HangFs::mount(&image.blobs, &scratch.join("backend")).expect("a backend");
        let daemon = image
            .launch_over(backend.path(), scratch)
            .read_timeout(read_timeout)
            .request_queues(2)
            .spawn()
            .expect("a daemon");
        let config = VmConfig { request_queues: 2, ..VmConfig::default() };
        let mut vm = daemon.boot(config).expect("a guest");
        let hiprio = vm.fuse(0);
        let mut fuse = vm.fuse(1);
        fuse.init().expect("INIT");
        let nodes = image.nodes(&mut fuse).expect("lookups");
        image.check_file(&mut fuse, 0, nodes[0]).expect("the first file, warm from here on");
        Stage { image, backend, daemon, vm, fuse, hiprio, nodes }
    }

    /// Place of cold read `i`: every one in a chunk of its own, far from the first file.
    fn cold(&self, i: usize) -> (usize, u64) {
        let per_file = 16;
        let first = self.image.files - COLD_READS / per_file;
        let offset = (i % per_file) as u64 * 2 * self.image.chunk_size + 100;
        (first + i / per_file, offset)
    }

    fn submit_cold(&mut self, range: std::ops::Range<usize>) -> HashMap<Ticket, usize> {
        let mut parked = HashMap::new();
        for i in range {
            let (file, offset) = self.cold(i);
            let node = self.nodes[file];
            let ticket = self.fuse.submit_read(node, 0, offset, READ).expect("room in the ring");
            parked.insert(ticket, i);
        }
        self.fuse.flush();
        parked
    }

    /// Warm reads and GETATTRs, eight at a time, while others are parked. None of those may end.
    fn run_warm(&mut self, count: usize, parked: &HashMap<Ticket, usize>) {
        let deadline = Instant::now() + LIMIT;
        let want = pattern(0, 0, usize::try_from(self.image.file_size).expect("small"));
        let (mut sent, mut done) = (0, 0);
        let mut reads = HashMap::new();
        while done < count {
            while sent < count && sent - done < 8 {
                let ticket = if sent % 2 == 0 {
                    let offset = sent * 1009 % (want.len() - READ);
                    let ticket = self.fuse.submit_read(self.nodes[0], 0, offset as u64, READ);
                    reads.insert(ticket.expect("room in the ring"), offset);
                    ticket
                } else {
                    self.fuse.submit_getattr(self.nodes[sent % self.nodes.len()])
                };
                ticket.expect("room in the ring");
                sent += 1;
            }
            self.fuse.flush();
            let reply = self.fuse.complete(deadline).expect("warm requests are answered");
            assert!(!parked.contains_key(&reply.ticket), "a cold read ended without its backend");
            assert_eq!(reply.errno, 0);
            if let Some(offset) = reads.remove(&reply.ticket) {
                assert_same(&reply.bytes(), &want[offset..offset + READ], "a warm read");
            }
            self.fuse.recycle(reply);
            done += 1;
        }
    }
}

#[test]
fn warm_requests_pass_256_parked_reads() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let mut stage = Stage::set(scratch.path(), READ_TIMEOUT);
    let idle = Instant::now();
    stage.run_warm(2000, &HashMap::new());
    let idle = idle.elapsed();
    stage.backend.set(Mode::Hang);
    let mut parked = stage.submit_cold(0..COLD_READS);
    stage.backend.wait_hanging(1, LIMIT).expect("the daemon asks its backend");

    let start = Instant::now();
    stage.run_warm(2000, &parked);
    let beside = start.elapsed();
    say(format!("2000 warm requests: {idle:?} alone, {beside:?} beside {COLD_READS} parked reads"));

    let start = Instant::now();
    let node = stage.nodes[3];
    stage.hiprio.forget(node, 1).expect("FORGET on hiprio");
    assert!(start.elapsed() < LIMIT, "FORGET took {:?}", start.elapsed());
    let mut other = stage.vm.fuse(2);
    assert_eq!(other.getattr(stage.nodes[0]).expect("another queue").size, stage.image.file_size);
    assert_eq!(stage.fuse.in_flight(), COLD_READS);

    stage.backend.set(Mode::Pass);
    let deadline = Instant::now() + LIMIT;
    while !parked.is_empty() {
        let reply = stage.fuse.complete(deadline).expect("parked reads end");
        let i = parked.remove(&reply.ticket).expect("one of the parked reads");
        let (file, offset) = stage.cold(i);
        assert_eq!(reply.errno, 0, "cold read {i}: {}", stage.daemon.log());
        assert_same(&reply.bytes(), &pattern(file, offset, READ), "a cold read");
        stage.fuse.recycle(reply);
    }
}

#[test]
fn reads_of_a_dead_backend_end_with_eio_at_their_deadline() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let limit = Duration::from_secs(2);
    let mut stage = Stage::set(scratch.path(), limit);
    stage.backend.set(Mode::Hang);
    // Half of them join downloads that hang already, and still get their own full time.
    let first = (Instant::now(), stage.submit_cold(0..COLD_READS / 2));
    std::thread::sleep(limit / 2);
    let second = (Instant::now(), stage.submit_cold(COLD_READS / 4..COLD_READS * 3 / 4));
    let mut left = first.1.len() + second.1.len();
    let (mut soonest, mut latest) = (Duration::MAX, Duration::ZERO);
    while left > 0 {
        let deadline = Instant::now() + LIMIT;
        let reply = stage.fuse.complete(deadline).expect("reads end at their deadline");
        let sent = if first.1.contains_key(&reply.ticket) { first.0 } else { second.0 };
        assert_eq!(reply.errno, libc::EIO);
        let took = sent.elapsed();
        (soonest, latest) = (soonest.min(took), latest.max(took));
        stage.fuse.recycle(reply);
        left -= 1;
    }
    say(format!("EIO after {soonest:?} to {latest:?} with a limit of {limit:?}"));
    assert!(soonest >= limit - Duration::from_millis(20), "EIO after {soonest:?} already");
    assert!(latest < limit + LIMIT, "EIO only after {latest:?}");
    stage.run_warm(100, &HashMap::new());

    stage.backend.set(Mode::Pass);
    for i in 0..COLD_READS {
        let (file, offset) = stage.cold(i);
        // On a busy machine a read may take longer than its limit.
        let deadline = Instant::now() + LIMIT;
        let got = loop {
            match stage.fuse.read(stage.nodes[file], 0, offset, READ) {
                Err(FuseError::Errno(libc::EIO)) if Instant::now() < deadline => {}
                got => break got.expect("the backend is back"),
            }
        };
        assert_same(&got, &pattern(file, offset, READ), "a cold read");
    }
}

#[test]
fn an_interrupted_read_ends_and_its_neighbours_do_not() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let mut stage = Stage::set(scratch.path(), READ_TIMEOUT);
    stage.backend.set(Mode::Hang);
    let parked = stage.submit_cold(0..8);
    let victim = *parked.iter().find(|(_, i)| **i == 5).expect("number 5").0;
    // An interrupt that overtakes its request finds nothing to cut short, so it is sent again.
    let deadline = Instant::now() + LIMIT;
    let reply = loop {
        stage.hiprio.interrupt(victim).expect("INTERRUPT");
        match stage.fuse.wait(victim, Duration::from_millis(100)) {
            Ok(reply) => break reply,
            Err(e) => assert!(Instant::now() < deadline, "the read was not cut short: {e}"),
        }
    };
    assert_eq!(reply.errno, libc::EINTR);
    stage.fuse.recycle(reply);
    stage.backend.set(Mode::Pass);
    for (ticket, i) in parked.into_iter().filter(|(ticket, _)| *ticket != victim) {
        let reply = stage.fuse.wait(ticket, LIMIT).expect("the others end");
        let (file, offset) = stage.cold(i);
        assert_eq!(reply.errno, 0);
        assert_same(&reply.bytes(), &pattern(file, offset, READ), "a neighbour");
    }
}

#[test]
fn sigterm_ends_a_daemon_whose_backend_hangs() {
    ends_at_once("SIGTERM with parked reads", || {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let mut stage = Stage::set(scratch.path(), READ_TIMEOUT);
        stage.backend.set(Mode::Hang);
        stage.submit_cold(0..COLD_READS);
        stage.backend.wait_hanging(1, LIMIT).expect("the daemon asks its backend");
        let Stage { daemon, vm, backend, .. } = stage;
        let (status, took, log) = daemon.terminate(LIMIT).expect("an end");
        say(format!("SIGTERM with {COLD_READS} parked reads: gone after {took:?}"));
        assert_eq!(status.code(), Some(0), "{log}");
        drop((vm, backend));
        took
    });
}
