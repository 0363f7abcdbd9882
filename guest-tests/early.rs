//! Fetching before anybody reads: prefetch and read-ahead, and that they stand in nobody's way.

#[path = "support/quick.rs"]
mod quick;
mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, Instant};

use quick::ends_at_once;
use serde_json::{Value, json};
use support::daemon::Launch;
use support::fault_registry::{Fault, FaultRegistry};
use support::frontend::VmConfig;
use support::image::{Guest, Image};
use support::registry::Registry;
use support::say;

const MIB: u64 = 1 << 20;
const CHUNK: u64 = 64 << 10;
/// Long enough for anything that is meant to happen, on a busy machine.
const PATIENT: Duration = Duration::from_secs(60);

/// `files` of 1 MiB each.
fn image(scratch: &Path, files: usize) -> Image {
    Image::build(scratch, files, MIB, CHUNK, "none").expect("an image")
}

fn over(registry: &str, image: &Image, scratch: &Path) -> Launch {
    let backend = json!({"scheme": "http", "host": registry, "repo": "r", "timeout": 5});
    image.launch(scratch).backend("registry", backend).read_ahead()
}

fn list(dir: &Path, lines: &[&str]) -> std::path::PathBuf {
    let path = dir.join("list");
    fs::write(&path, lines.join("\n")).expect("a list");
    path
}

#[test]
fn listed_files_are_there_before_they_are_read() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let image = image(scratch.path(), 16);
    let registry = FaultRegistry::start(&image.blobs).expect("a registry");
    let list = list(scratch.path(), &["/f0003", "", "relative", "/f0011/../f0007", "/nothing"]);
    let launch = over(registry.host(), &image, scratch.path()).arg("--prefetch-files").arg(list);
    let mut guest = Guest::boot(&launch, &image);
    guest.daemon.expect_log("prefetch of /: done");
    let log = guest.daemon.log();
    assert!(log.contains("1 lines are no absolute paths"), "{log}");
    assert!(log.contains("1 listed paths are not in the image, the first is /nothing"), "{log}");
    let (_, bytes) = registry.served();
    assert!((2 * MIB..2 * MIB + MIB / 2).contains(&bytes), "{bytes} bytes for two files");
    registry.set(Fault::Hang);
    guest.check(&image, [3, 7]);
}

#[test]
fn a_whole_image_is_fetched_at_the_rate_that_is_set() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let image = image(scratch.path(), 8);
    let registry = FaultRegistry::start(&image.blobs).expect("a registry");
    let rate = 8 * MIB;
    let launch = over(registry.host(), &image, scratch.path()).prefetch(json!({
        "enable": true, "threads_count": 2, "merging_size": MIB, "bandwidth_rate": rate,
        "prefetch_all": true}));
    let begin = Instant::now();
    let mut guest = Guest::boot(&launch, &image);
    guest.daemon.expect_log("prefetch of /: done");
    // The first requests are sent at once, the others as the rate allows.
    let least = Duration::from_millis(700);
    assert!(begin.elapsed() > least, "8 MiB at 8 MiB/s took {:?}", begin.elapsed());
    registry.set(Fault::Hang);
    guest.check(&image, 0..8);
    let (_, bytes) = registry.served();
    assert!(bytes < 8 * MIB + MIB / 4, "{bytes} bytes of an image of 8 MiB");
}

#[test]
fn a_directory_in_the_prefetch_table_means_all_below_it() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let tree = scratch.path().join("tree");
    let files = [("a/one", 300_000), ("a/b/two", 300_000), ("c/three", 2_000_000)];
    for (number, (path, len)) in files.into_iter().enumerate() {
        let path = tree.join(path);
        fs::create_dir_all(path.parent().expect("a directory")).expect("a directory");
        fs::write(&path, support::image::pattern(number, 0, len)).expect("a file");
    }
    let (bootstrap, blobs) = (scratch.path().join("bootstrap"), scratch.path().join("blobs"));
    fs::create_dir_all(&blobs).expect("a directory");
    let mut create = std::process::Command::new(env!("CARGO_BIN_EXE_rafs"));
    create.args(["create", "--prefetch-policy", "fs", "--compressor", "none", "--blob-dir"]);
    create.arg(&blobs).arg("--bootstrap").arg(&bootstrap).arg(&tree);
    let mut child = create.stdin(std::process::Stdio::piped()).spawn().expect("rafs");
    child.stdin.take().expect("piped").write_all(b"/a\n").expect("patterns");
    assert!(child.wait().expect("rafs ends").success());

    let registry = FaultRegistry::start(&blobs).expect("a registry");
    let backend = json!({"scheme": "http", "host": registry.host(), "repo": "r"});
    let launch = Launch::new(&bootstrap, &blobs, scratch.path())
        .backend("registry", backend)
        .prefetch(json!({"enable": true, "prefetch_all": false}));
    let daemon = launch.spawn().expect("a daemon");
    let mut vm = daemon.boot(VmConfig::default()).expect("a guest");
    let mut fuse = vm.fuse(1);
    fuse.init().expect("INIT");
    daemon.expect_log("prefetch of /: done, 600000");
    registry.set(Fault::Hang);
    for path in ["a/one", "a/b/two"] {
        let node = fuse.resolve(path.as_bytes()).expect(path);
        assert_eq!(fuse.read_all(node, 128 << 10).expect(path).len(), 300_000);
    }
}

#[test]
fn a_prefetch_that_fails_is_said_once_and_harms_no_read() {
    for (what, fault) in [
        ("500", Fault::Status(500)),
        ("404", Fault::Status(404)),
        ("reset", Fault::ResetAtOnce),
        ("wrong bytes", Fault::WrongBytes),
    ] {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let image = image(scratch.path(), 6);
        let registry = FaultRegistry::start(&image.blobs).expect("a registry");
        // What tells where the chunks are comes, the chunks do not.
        let mut first = Guest::boot(&over(registry.host(), &image, scratch.path()), &image);
        first.check(&image, [0]);
        drop(first);
        registry.set(fault);
        let launch = over(registry.host(), &image, scratch.path())
            .prefetch(json!({"enable": true, "prefetch_all": true}));
        let mut guest = Guest::boot(&launch, &image);
        let expected =
            if fault == Fault::WrongBytes { "wrong digest" } else { "trying again later" };
        guest.daemon.expect_log(expected);
        registry.set(Fault::None);
        guest.check(&image, 0..6);
        let log = guest.daemon.log();
        assert!(!log.contains("ERROR"), "{what}: a prefetch is nobody's failure:\n{log}");
        assert!(log.matches("trying again later").count() <= 1, "{what}: {log}");
    }
}

#[test]
fn demand_passes_a_prefetch_that_is_on_its_way() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let image = image(scratch.path(), 32);
    let registry = FaultRegistry::start(&image.blobs).expect("a registry");
    registry.link(Duration::from_millis(20), Some(4 * MIB));
    let launch = over(registry.host(), &image, scratch.path())
        .prefetch(json!({"enable": true, "prefetch_all": true, "threads_count": 64}));
    let mut guest = Guest::boot(&launch, &image);
    let served = || registry.served().1;
    let start = Instant::now();
    while served() < 2 * MIB {
        assert!(start.elapsed() < PATIENT, "the prefetch does not start");
        std::thread::sleep(Duration::from_millis(5));
    }
    let before = served();
    let (file, offset) = (31, 5 * CHUNK);
    let node = guest.nodes[file];
    guest.fuse.read(node, 0, offset, 4096).expect("a chunk at the far end of the blob");
    let passed = served() - before;
    // What was on its way when the read came, and what went beside it: not the 29 MiB in between.
    say(format!("{passed} bytes were served until a demanded chunk was there"));
    assert!(passed < 16 * MIB, "{passed} bytes came before a chunk that somebody waits for");
    // Who reads in the middle of what is being fetched joins it: nothing comes twice.
    guest.check(&image, [2, 3, 4, 30]);
    guest.daemon.expect_log("prefetch of /: done");
    let whole = served();
    assert!(whole < 32 * MIB + MIB / 2, "{whole} bytes of an image of 32 MiB");
}

#[test]
fn a_prefetch_ends_with_the_daemon_at_once() {
    ends_at_once("a prefetch", || {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let image = image(scratch.path(), 8);
        let registry = FaultRegistry::start(&image.blobs).expect("a registry");
        registry.link(Duration::from_millis(20), Some(MIB));
        let launch = over(registry.host(), &image, scratch.path())
            .prefetch(json!({"enable": true, "prefetch_all": true}));
        let daemon = launch.spawn().expect("a daemon");
        let start = Instant::now();
        while registry.seen().is_empty() && registry.connections() == 0 {
            assert!(start.elapsed() < PATIENT, "the prefetch does not start");
            std::thread::sleep(Duration::from_millis(5));
        }
        let (status, took, log) = daemon.terminate(PATIENT).expect("an end");
        assert_eq!(status.code(), Some(0), "{log}");
        took
    });
}

#[test]
fn a_reader_in_order_waits_less_the_further_it_goes() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let image = image(scratch.path(), 8);
    let registry = FaultRegistry::start(&image.blobs).expect("a registry");
    registry.link(Duration::from_millis(20), Some(64 * MIB));
    let mut guest = Guest::boot(&over(registry.host(), &image, scratch.path()), &image);
    guest.check(&image, 0..8);
    let (requests, bytes) = registry.served();
    say(format!("8 MiB in order: {requests} requests, {bytes} bytes"));
    // 128 chunks, one by one, were 128 requests.
    assert!(requests < 64, "{requests} requests");
    assert!(bytes < 8 * MIB + MIB / 2, "{bytes} bytes: some came twice");
}

/// Puts `file` into the repository `name` of a registry.
fn upload(registry: &Registry, name: &str, file: &Path) {
    let digest = file.file_name().expect("a blob").to_str().expect("hex");
    let bytes = fs::read(file).expect("the blob");
    let call = |head: String, body: &[u8]| -> String {
        let mut stream = TcpStream::connect(registry.host()).expect("the registry");
        stream.write_all(head.as_bytes()).expect("a request");
        stream.write_all(body).expect("its body");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        answer
    };
    let host = registry.host();
    let begun = call(
        format!(
            "POST /v2/{name}/blobs/uploads/ HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\n\
             Connection: close\r\n\r\n"
        ),
        b"",
    );
    let place = begun.lines().find_map(|line| line.strip_prefix("Location: ")).expect(&begun);
    let path = place.split_once(&host).map_or(place, |(_, path)| path);
    let done = call(
        format!(
            "PUT {path}&digest=sha256:{digest} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {}\r\n\
             Content-Type: application/octet-stream\r\nConnection: close\r\n\r\n",
            bytes.len()
        ),
        &bytes,
    );
    assert!(done.starts_with("HTTP/1.1 201"), "{done}");
}

#[test]
fn eight_daemons_that_start_one_image_together_have_each_chunk_served_once() {
    for prefetch in [Value::Null, json!({"enable": true, "prefetch_all": true})] {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let image = image(scratch.path(), 24);
        let registry = Registry::plain().expect("a registry");
        upload(&registry, "r", &image.blob());
        let mut launch = over(&registry.host(), &image, scratch.path());
        if !prefetch.is_null() {
            launch = launch.prefetch(prefetch.clone());
        }
        std::thread::scope(|scope| {
            for n in 0..8 {
                let (launch, image) = (launch.clone().named(&format!("d{n}")), &image);
                // In step, backwards, and from the middle.
                let order: Vec<usize> = match n % 4 {
                    2 => (0..24).rev().collect(),
                    3 => (12..24).chain(0..12).collect(),
                    _ => (0..24).collect(),
                };
                scope.spawn(move || Guest::boot(&launch, image).check(image, order));
            }
        });
        let traffic = registry.traffic(0);
        let blob = fs::metadata(image.blob()).expect("the blob").len();
        say(format!(
            "prefetch {prefetch}: 8 daemons: {} requests, {} bytes of a blob of {blob}",
            traffic.requests, traffic.bytes
        ));
        assert!(traffic.bytes <= blob, "{} bytes served of {blob}", traffic.bytes);
        assert!(traffic.bytes >= image.bytes(), "{} bytes cannot be all", traffic.bytes);
    }
}
