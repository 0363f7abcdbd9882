//! kill -9 at any moment: whatever is in the cache directory afterwards, no wrong byte is served.

mod support;

use std::time::{Duration, Instant};

use support::frontend::{Vm, VmConfig};
use support::fuse_client::{Fuse, FuseError};
use support::hang_fs::{HangFs, Mode};
use support::image::{Image, pattern};
use support::rng::Rng;
use support::say;

const ROUNDS: u64 = 50;
const READ: usize = 16 << 10;

/// Reads at random places, eight at a time, and compares, until the daemon is gone.
fn load_until(
    fuse: &mut Fuse,
    nodes: &[u64],
    image: &Image,
    rng: &mut Rng,
    until: Instant,
) -> usize {
    let mut sent = std::collections::HashMap::new();
    let mut checked = 0;
    while Instant::now() < until {
        while sent.len() < 8 {
            let file = rng.index(nodes.len());
            let offset = rng.below(image.file_size);
            let ticket = fuse.submit_read(nodes[file], 0, offset, READ).expect("room in the ring");
            sent.insert(ticket, (file, offset));
        }
        fuse.flush();
        match fuse.complete(until) {
            Ok(reply) => {
                let (file, offset) = sent.remove(&reply.ticket).expect("one of ours");
                let left = usize::try_from(image.file_size - offset).expect("small");
                assert_eq!(reply.errno, 0, "read of file {file} at {offset}");
                assert_eq!(
                    reply.bytes(),
                    pattern(file, offset, READ.min(left)),
                    "{file} at {offset}"
                );
                fuse.recycle(reply);
                checked += 1;
            }
            Err(FuseError::Timeout) => break,
            Err(error) => panic!("{error}"),
        }
    }
    checked
}

#[test]
fn fifty_kills_leave_no_wrong_byte() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    // Two blobs' worth of work on either path: chunks that are copied and chunks that are unpacked.
    let seed = u64::from(std::process::id());
    let mut rng = Rng::new(seed);
    let image = Image::build(scratch.path(), 12, 4 << 20, 64 << 10, "zstd").expect("an image");
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
        checked += load_until(&mut fuse, &nodes, &image, &mut rng, until);
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
