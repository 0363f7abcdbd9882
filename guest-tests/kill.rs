//! kill -9 at any moment: whatever is in the cache directory afterwards, no wrong byte is served.

mod support;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use support::frontend::{Vm, VmConfig, Vmm};
use support::fuse_client::{Fuse, FuseError, Ticket};
use support::hang_fs::{HangFs, Mode};
use support::image::{Image, pattern};
use support::rng::Rng;
use support::{assert_same, say};

const ROUNDS: u64 = 50;
const READ: usize = 16 << 10;

/// Reads on their way: which file, at which offset.
type Sent = HashMap<Ticket, (usize, u64)>;

/// Reads at random places, eight at a time, and compares, until the daemon is gone; those in `sent`
/// are on their way already, and those that are when it ends. Returns how many were compared.
fn load_until(
    fuse: &mut Fuse,
    nodes: &[u64],
    image: &Image,
    rng: &mut Rng,
    sent: &mut Sent,
    until: Instant,
) -> usize {
    let mut checked = 0;
    while Instant::now() < until {
        while sent.len() < 8 {
            let file = rng.index(nodes.len());
            let offset = rng.below(image.file_size);
            let ticket = fuse.submit_read(nodes[file], 0, offset, READ).expect("room in the ring");
            sent.insert(ticket, (file, offset));
        }
        fuse.flush();
        if !compare_next(fuse, image, sent, until) {
            break;
        }
        checked += 1;
    }
    checked
}

/// Compares the next answer. False if none has come in time.
fn compare_next(fuse: &mut Fuse, image: &Image, sent: &mut Sent, until: Instant) -> bool {
    match fuse.complete(until) {
        Ok(reply) => {
            let (file, offset) = sent.remove(&reply.ticket).expect("one of ours, once");
            let left = usize::try_from(image.file_size - offset).expect("small");
            assert_eq!(reply.errno, 0, "read of file {file} at {offset}");
            assert_same(&reply.bytes(), &pattern(file, offset, READ.min(left)), "under load");
            fuse.recycle(reply);
            true
        }
        Err(FuseError::Timeout) => false,
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn fifty_kills_leave_no_wrong_byte() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let seed = u64::from(std::process::id());
    let mut rng = Rng::new(seed);
    let image = Image::build(scratch.path(), 28, 4 << 20, 64 << 10, "zstd").expect("an image");
    let backend = HangFs::mount(&image.blobs, &scratch.path().join("backend")).expect("a backend");
    // Slow enough that every round finds work that is not done yet.
    backend.set(Mode::Slow(Duration::from_millis(15)));
    let launch = image.launch_over(backend.path(), scratch.path());
    let mut checked = 0;
    for round in 0..ROUNDS {
        let daemon = launch.spawn().unwrap_or_else(|e| panic!("round {round}, seed {seed}: {e:#}"));
        let mut vm = Vm::boot(&daemon.sock, VmConfig::default()).expect("a guest");
        let mut fuse = vm.fuse(1);
        fuse.init().expect("INIT");
        let nodes = image.nodes(&mut fuse).expect("lookups");
        let until = Instant::now() + Duration::from_micros(rng.below(120_000));
        checked += load_until(&mut fuse, &nodes, &image, &mut rng, &mut Sent::new(), until);
        let log = daemon.kill();
        assert!(!log.contains("panicked"), "round {round}, seed {seed}: {log}");
    }
    let cold = backend.total();
    backend.set(Mode::Pass);
    let daemon = launch.spawn().expect("the last daemon");
    let mut vm = daemon.boot(VmConfig::default()).expect("a guest");
    let mut fuse = vm.fuse(1);
    fuse.init().expect("INIT");
    image.check_all(&mut fuse).expect("every byte after 50 kills");
    say(format!(
        "{ROUNDS} kills (seed {seed}), {checked} reads compared, {} of {} bytes fetched before the last start",
        cold.bytes,
        image.bytes()
    ));
}

/// As under cloud-hypervisor: the VMM connects again and hands over the record of requests in
/// flight, and the guest, whose requests all get their one answer, notices nothing.
#[test]
fn a_guest_reads_on_through_fifty_kills() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let seed = u64::from(std::process::id());
    let mut rng = Rng::new(seed);
    let image = Image::build(scratch.path(), 28, 4 << 20, 64 << 10, "zstd").expect("an image");
    let backend = HangFs::mount(&image.blobs, &scratch.path().join("backend")).expect("a backend");
    backend.set(Mode::Slow(Duration::from_millis(15)));
    let launch = image.launch_over(backend.path(), scratch.path());
    let mut daemon = launch.spawn().expect("a daemon");
    let config = VmConfig {
        vmm: Vmm::CloudHypervisor,
        queue_size: 64,
        event_idx: false,
        ..VmConfig::default()
    };
    let mut vm = daemon.boot(config).expect("a guest");
    let mut fuse = vm.fuse(1);
    fuse.init().expect("INIT, the only one");
    let nodes = image.nodes(&mut fuse).expect("lookups");
    let mut sent = Sent::new();
    let (mut checked, mut in_flight) = (0, 0);
    for round in 0..ROUNDS {
        let until = Instant::now() + Duration::from_micros(rng.below(120_000));
        checked += load_until(&mut fuse, &nodes, &image, &mut rng, &mut sent, until);
        in_flight += sent.len();
        let log = daemon.kill();
        assert!(!log.contains("panicked"), "round {round}, seed {seed}: {log}");
        // What the guest asks for while nobody is there.
        load_until(&mut fuse, &nodes, &image, &mut rng, &mut sent, Instant::now());
        daemon = launch.spawn().unwrap_or_else(|e| panic!("round {round}, seed {seed}: {e:#}"));
        vm.reconnect(&daemon.sock).unwrap_or_else(|e| panic!("round {round}, seed {seed}: {e:#}"));
    }
    let until = Instant::now() + Duration::from_secs(30);
    while !sent.is_empty() {
        let left = sent.len();
        assert!(
            compare_next(&mut fuse, &image, &mut sent, until),
            "seed {seed}: {left} requests were lost\n{}",
            daemon.log()
        );
    }
    backend.set(Mode::Pass);
    image.check_all(&mut fuse).expect("every byte after 50 kills, and no answer too many");
    assert!(in_flight > 0, "nothing was in flight at any kill");
    say(format!(
        "{ROUNDS} kills (seed {seed}), {checked} reads compared, {in_flight} in flight when killed"
    ));
}
