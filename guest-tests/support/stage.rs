//! An image that comes over the network, and a guest that reads it one cold chunk at a time.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::daemon::{Daemon, Launch};
use super::frontend::{Vm, VmConfig};
use super::fuse_client::{Fuse, Ticket};
use super::image::{Image, pattern};
use super::{assert_same, to_usize};

pub const CHUNK: u64 = 64 << 10;
pub const CHUNKS_PER_FILE: u64 = 16;
pub const READ: usize = 4096;
/// `--read-timeout` of daemons whose reads are to fail, and what is added to it for a machine that is busy.
pub const DEADLINE: Duration = Duration::from_secs(3);
pub const SLACK: Duration = Duration::from_secs(60);
/// `--read-timeout` of daemons whose reads are to succeed, however busy the machine is.
pub const PATIENT: Duration = Duration::from_secs(60);

/// An image in a registry, and a guest that reads it.
pub struct Stage {
    pub image: Image,
    pub daemon: Daemon,
    _vm: Vm,
    pub fuse: Fuse,
    nodes: Vec<u64>,
    /// The next chunk that nobody has read.
    next: u64,
    /// Bytes of the log that were looked at.
    seen: usize,
    /// Socket of the daemon's API.
    api: PathBuf,
    pub scratch: tempfile::TempDir,
}

/// Files of 16 chunks of 64 KiB.
pub fn image(files: usize) -> (tempfile::TempDir, Image) {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let image = Image::build(scratch.path(), files, CHUNKS_PER_FILE * CHUNK, CHUNK, "none");
    (scratch, image.expect("an image"))
}

/// The `registry` backend at `host`, with limits fit for tests and whatever else.
pub fn registry_at(host: &str, more: Value) -> Value {
    let mut config = json!({"scheme": "http", "host": host, "repo": "r", "timeout": 1,
        "connect_timeout": 1});
    let Value::Object(more) = more else { panic!("keys of a config") };
    config.as_object_mut().expect("a table").extend(more);
    config
}

impl Stage {
    pub fn set(backend: Value, scratch: tempfile::TempDir, image: Image) -> Stage {
        Stage::set_with(DEADLINE, backend, scratch, image)
    }

    /// With another `--read-timeout`.
    pub fn set_with(
        read_timeout: Duration,
        backend: Value,
        scratch: tempfile::TempDir,
        image: Image,
    ) -> Stage {
        let launch = image.launch(scratch.path()).backend("registry", backend);
        Stage::launch(&launch.read_timeout(read_timeout), scratch, image)
    }

    pub fn launch(launch: &Launch, scratch: tempfile::TempDir, image: Image) -> Stage {
        let api = launch.sock.with_extension("api");
        let launch = launch.clone().arg("--apisock").arg(&api);
        let daemon = launch.spawn().expect("a daemon");
        let mut vm = daemon.boot(VmConfig::default()).expect("a guest");
        let mut fuse = vm.fuse(1);
        fuse.init().expect("INIT");
        let nodes = image.nodes(&mut fuse).expect("lookups");
        Stage { image, daemon, _vm: vm, fuse, nodes, next: 0, seen: 0, api, scratch }
    }

    /// A chunk that nobody has read: file and offset.
    pub fn cold(&mut self) -> (usize, u64) {
        let chunk = self.next;
        self.next += 2; // so that no two are fetched together
        let file = to_usize(chunk / CHUNKS_PER_FILE);
        assert!(file < self.image.files, "the image has no cold chunk left");
        (file, chunk % CHUNKS_PER_FILE * CHUNK + 100)
    }

    /// Another place in the chunk that [`Stage::cold`] gave last.
    pub fn neighbour(&self) -> (usize, u64) {
        let chunk = self.next - 2;
        let file = to_usize(chunk / CHUNKS_PER_FILE);
        (file, chunk % CHUNKS_PER_FILE * CHUNK + CHUNK / 2)
    }

    /// Puts a read into the ring.
    pub fn submit(&mut self, (file, offset): (usize, u64)) -> Option<Ticket> {
        self.fuse.submit_read(self.nodes[file], 0, offset, READ)
    }

    /// Compares what was read.
    #[track_caller]
    pub fn check(&self, (file, offset): (usize, u64), bytes: &[u8], what: &str) {
        assert_same(bytes, &pattern(file, offset, READ), what);
    }

    /// Reads from a chunk: its right bytes or an errno. Anything else is a failure of the test.
    pub fn read(&mut self, (file, offset): (usize, u64), what: &str) -> Result<(), i32> {
        match self.fuse.read(self.nodes[file], 0, offset, READ) {
            Ok(bytes) => {
                assert_same(&bytes, &pattern(file, offset, READ), what);
                Ok(())
            }
            Err(e) => Err(e.errno().unwrap_or_else(|| panic!("{what}: {e}"))),
        }
    }

    #[track_caller]
    pub fn read_right(&mut self, what: &str) {
        let place = self.cold();
        if let Err(errno) = self.read(place, what) {
            panic!("{what}: errno {errno}: {}", self.new_log());
        }
    }

    /// Reads from a chunk that failed before, now that nothing is wrong any more. On a busy machine that
    /// may take longer than a read waits, so there is more than one try.
    #[track_caller]
    pub fn recovers(&mut self, place: (usize, u64), what: &str) {
        let limit = Instant::now() + PATIENT;
        while let Err(errno) = self.read(place, what) {
            let late = Instant::now() > limit;
            assert!(!late, "{what}: errno {errno} although all is well: {}", self.new_log());
        }
    }

    /// One request to the daemon's API: status and body.
    pub fn call(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let mut stream = UnixStream::connect(&self.api).expect("the API listens");
        let len = body.len();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len}\r\n\r\n{body}"
        );
        stream.write_all(request.as_bytes()).expect("it reads");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        (status.expect("a status"), body.to_owned())
    }

    /// A number of `GET /metrics`, as `NAME{LABELS}`; 0 if it is not there.
    pub fn metric(&self, name: &str) -> u64 {
        let (status, text) = self.call("GET", "/metrics", "");
        assert_eq!(status, 200, "{text}");
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.map_or(0, |value| value.parse().expect("a number"))
    }

    /// Waits until something that was logged since the last look says `what`.
    #[track_caller]
    pub fn expect_log(&self, what: &str) {
        self.daemon.expect_log_after(self.seen, what);
    }

    /// What was logged since this was called last.
    pub fn new_log(&mut self) -> String {
        let log = self.daemon.log();
        let new = log[self.seen..].to_owned();
        self.seen = log.len();
        new
    }
}
