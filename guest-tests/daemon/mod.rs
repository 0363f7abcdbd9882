//! A daemon in a directory of its own, started with any arguments and looked at from outside.

// Each test program uses its own part of this.
#![allow(dead_code)]

#[path = "../support/quick.rs"]
pub mod quick;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

/// Time limit for what takes milliseconds on an idle machine, and may take long on a busy one.
pub const SOON: Duration = Duration::from_secs(60);

/// A command that runs the program under test in `dir`, with its arguments split at blanks.
pub fn rafsd(dir: &Path, args: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rafsd"));
    command
        .args(args.split_whitespace())
        .current_dir(dir)
        .env("XDG_CACHE_HOME", dir.join("xdg"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Runs a command that should end by itself: exit code, standard output, standard error.
pub fn output(mut command: Command) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = command.output().expect("the program starts");
    let text = |bytes| String::from_utf8(bytes).expect("output is UTF-8");
    (status.code(), text(stdout), text(stderr))
}

/// An image of the reference builder.
pub fn golden(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("guest-tests/golden").join(case)
}

/// `--bootstrap FILE` of an image with a file or two.
pub fn small_image() -> String {
    format!("--bootstrap {}", golden("v6-none").join("bootstrap").display())
}

/// A daemon that is killed when the test ends.
pub struct Daemon {
    pub child: Child,
    dir: PathBuf,
}

impl Daemon {
    /// Starts `command` in `dir` with the API on `A`, and waits until it says RUNNING.
    pub fn start(dir: &Path, mut command: Command) -> Daemon {
        let daemon = Daemon { child: command.spawn().expect("it starts"), dir: dir.to_owned() };
        let begin = Instant::now();
        loop {
            if let Ok(stream) = UnixStream::connect(dir.join("A")) {
                let (status, body) = exchange(&stream, "GET", "/api/v1/daemon", "");
                assert_eq!(status, 200, "{body}");
                if body.contains(r#""state":"RUNNING""#) {
                    return daemon;
                }
            }
            assert!(begin.elapsed() < SOON, "not RUNNING: {}", daemon.kill());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// As most tests want it: a small image, API on `A`, VMM's socket on `S`.
    pub fn small(dir: &Path) -> Daemon {
        Daemon::start(dir, rafsd(dir, &format!("virtiofs --sock S --apisock A {}", small_image())))
    }

    pub fn connect(&self) -> UnixStream {
        UnixStream::connect(self.dir.join("A")).expect("the API listens")
    }

    /// One request on a connection of its own: status and body.
    pub fn call(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        exchange(&self.connect(), method, path, body)
    }

    pub fn signal(&self, signal: i32) {
        let pid = libc::pid_t::try_from(self.child.id()).expect("pids fit");
        // SAFETY: the child was not waited for yet, so the pid is still its own.
        unsafe { libc::kill(pid, signal) };
    }

    /// Waits for the end: status, how long it took, what the log says.
    pub fn end(mut self) -> (ExitStatus, Duration, String) {
        let begin = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("it is our child") {
                break status;
            }
            assert!(begin.elapsed() < SOON, "it does not end: {}", self.kill());
            std::thread::sleep(Duration::from_millis(1));
        };
        let took = begin.elapsed();
        let mut log = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            stderr.read_to_string(&mut log).expect("the log is UTF-8");
        }
        (status, took, log)
    }

    /// Kills it and returns its log.
    pub fn kill(mut self) -> String {
        let _ = self.child.kill();
        let mut log = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            stderr.read_to_string(&mut log).expect("the log is UTF-8");
        }
        log
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends a request as Kata's and the snapshotter's clients do, and reads the answer.
pub fn exchange(stream: &UnixStream, method: &str, path: &str, body: &str) -> (u16, String) {
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: unix\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let (status, headers, body) = raw(stream, request.as_bytes());
    assert!(headers.contains("server: nydus api"), "{headers}");
    (status, body)
}

/// Sends bytes; reads status, headers (in lower case) and body of one answer.
pub fn raw(mut stream: &UnixStream, request: &[u8]) -> (u16, String, String) {
    stream.write_all(request).expect("the request is taken");
    let mut reader = BufReader::new(stream);
    let (mut status, mut headers) = (0, String::new());
    loop {
        let mut line = String::new();
        assert!(reader.read_line(&mut line).expect("an answer") > 0, "no answer: {headers}");
        if line == "\r\n" {
            break;
        }
        if status == 0 {
            status = line.split(' ').nth(1).expect("a status").parse().expect("a number");
            // 100 Continue comes before the answer itself.
            if status == 100 {
                status = 0;
                reader.read_line(&mut line).expect("an empty line");
            }
            continue;
        }
        headers += &line.to_lowercase();
    }
    let len = headers.lines().find_map(|l| l.strip_prefix("content-length: "));
    let mut body = vec![0; len.map_or(0, |l| l.parse().expect("a number"))];
    reader.read_exact(&mut body).expect("the whole body");
    (status, headers, String::from_utf8(body).expect("UTF-8"))
}

/// A directory for sockets and caches.
pub fn scratch() -> tempfile::TempDir {
    let dir = tempfile::Builder::new().prefix("rafsd-").tempdir().expect("a directory");
    fs::create_dir(dir.path().join("xdg")).expect("a directory");
    dir
}
