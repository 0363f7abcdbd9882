//! The programs that drive the daemon, as they behave: what they start, how they probe, what they
//! send and what they take for an answer. Tests are named after the numbered statements of
//! `docs/compatibility.md`.

// Each test program uses its own part of this.
#![allow(dead_code)]

use std::cell::RefCell;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Value, json};

/// An answer as it came.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: String,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    /// What an error says; checks that it has the form clients parse.
    pub fn message(&self) -> String {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct ErrorBody {
            code: String,
            message: String,
        }
        assert!(self.status >= 400, "{self:?}");
        let error: ErrorBody = serde_json::from_str(&self.body)
            .unwrap_or_else(|e| panic!("no error that clients can read: {e}: {self:?}"));
        assert!(!error.code.is_empty() && !error.message.is_empty());
        error.message
    }
}

/// Sends one request and reads its answer; the connection stays open.
pub fn send(mut stream: &UnixStream, head: &str, body: &str) -> Answer {
    stream.write_all(format!("{head}\r\n\r\n{body}").as_bytes()).expect("the request is taken");
    let mut reader = BufReader::new(stream);
    let (mut status, mut headers) = (0, String::new());
    loop {
        let mut line = String::new();
        assert!(reader.read_line(&mut line).expect("an answer") > 0, "no answer to {head}");
        if line == "\r\n" {
            break;
        }
        if status == 0 {
            status = line.split(' ').nth(1).expect("a status").parse().expect("a number");
            continue;
        }
        headers += &line.to_lowercase();
    }
    let len = headers.lines().find_map(|line| line.strip_prefix("content-length: "));
    let mut body = vec![0; len.map_or(0, |len| len.trim().parse().expect("a number"))];
    reader.read_exact(&mut body).expect("the whole body");
    if status == 204 {
        assert_eq!(body, b"", "204 has no body");
    }
    Answer { status, headers, body: String::from_utf8(body).expect("UTF-8") }
}

/// `%2F` for everything that a strict encoder does not leave alone.
pub fn encode(text: &str) -> String {
    text.bytes()
        .map(|b| match b {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                char::from(b).to_string()
            }
            _ => format!("%{b:02X}"),
        })
        .collect()
}

/// Kata's Go runtime: a connection for each call, left open; mountpoints as they are.
pub struct KataGo {
    socket: PathBuf,
    /// Each stays open until the client's own timer ends it.
    idle: RefCell<Vec<UnixStream>>,
}

impl KataGo {
    /// Waits as Kata does: 20 attempts with longer and longer pauses, each a `stat` and a GET whose
    /// `state` alone counts.
    pub fn connect(socket: &Path) -> KataGo {
        let kata = KataGo { socket: socket.to_owned(), idle: RefCell::default() };
        for attempt in 0..12 {
            if socket.exists() && UnixStream::connect(socket).is_ok() {
                let info = kata.call("GET", "/api/v1/daemon", None);
                if info.json()["state"] == "RUNNING" {
                    return kata;
                }
            }
            std::thread::sleep(Duration::from_millis(20 << attempt));
        }
        panic!("the daemon is not RUNNING");
    }

    pub fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Answer {
        let stream = UnixStream::connect(&self.socket).expect("the API takes connections");
        stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a timeout");
        let mut head = format!(
            "{method} {path} HTTP/1.1\r\nHost: unix\r\nUser-Agent: Go-http-client/1.1\r\n\
             Accept-Encoding: gzip"
        );
        let body = body.map(Value::to_string).unwrap_or_default();
        if method != "GET" {
            head +=
                &format!("\r\nContent-Type: application/json\r\nContent-Length: {}", body.len());
        }
        let answer = send(&stream, &head, &body);
        self.idle.borrow_mut().push(stream);
        answer
    }

    pub fn mount(&self, at: &str, body: &Value) -> Answer {
        self.call("POST", &format!("/api/v1/mount?mountpoint={at}"), Some(body))
    }

    pub fn umount(&self, at: &str) -> Answer {
        self.call("DELETE", &format!("/api/v1/mount?mountpoint={at}"), None)
    }
}

/// Kata's runtime-rs: strict about status and JSON; mountpoints are encoded.
pub struct KataRs {
    socket: PathBuf,
}

/// What runtime-rs insists on in the daemon's answer.
#[derive(Debug, Deserialize)]
pub struct StrictInfo {
    pub version: StrictVersion,
    pub id: Option<String>,
    pub supervisor: Option<String>,
    pub state: String,
    #[serde(default)]
    pub backend_collection: Option<Value>,
}

#[derive(Debug, Deserialize)]
pub struct StrictVersion {
    pub package_ver: String,
    pub git_commit: String,
    pub build_time: String,
    pub profile: String,
    pub rustc: String,
}

impl KataRs {
    /// Waits as runtime-rs does: probes, 100 ms apart. It gives up after 100 of them; a test on a busy
    /// machine has more patience.
    pub fn connect(socket: &Path) -> KataRs {
        let kata = KataRs { socket: socket.to_owned() };
        for _ in 0..600 {
            if UnixStream::connect(socket).is_ok() && kata.info().state == "RUNNING" {
                return kata;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        panic!("the daemon is not RUNNING");
    }

    pub fn info(&self) -> StrictInfo {
        let answer = self.call("GET", "/api/v1/daemon", "");
        assert_eq!(answer.status, 200, "{answer:?}");
        serde_json::from_str(&answer.body).unwrap_or_else(|e| panic!("{e}: {answer:?}"))
    }

    pub fn call(&self, method: &str, path: &str, body: &str) -> Answer {
        let stream = UnixStream::connect(&self.socket).expect("the API takes connections");
        stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a timeout");
        let mut head = format!(
            "{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json"
        );
        if !body.is_empty() {
            head += &format!("\r\ncontent-length: {}", body.len());
        }
        send(&stream, &head, body)
    }

    /// Success is 204 and nothing else; an error must be JSON.
    pub fn mount(&self, at: &str, body: &Value) -> Result<(), String> {
        let path = format!("/api/v1/mount?mountpoint={}", encode(at));
        Self::done(&self.call("POST", &path, &body.to_string()))
    }

    pub fn umount(&self, at: &str) -> Result<(), String> {
        let path = format!("/api/v1/mount?mountpoint={}", encode(at));
        Self::done(&self.call("DELETE", &path, ""))
    }

    fn done(answer: &Answer) -> Result<(), String> {
        if answer.status == 204 { Ok(()) } else { Err(answer.message()) }
    }
}

/// `nydusctl`: encodes nothing, names no instance, reads members without asking whether they are
/// there, and takes every error for JSON.
pub struct Nydusctl {
    socket: PathBuf,
}

impl Nydusctl {
    pub fn new(socket: &Path) -> Nydusctl {
        Nydusctl { socket: socket.to_owned() }
    }

    fn call(&self, method: &str, path: &str, body: &str) -> Value {
        let stream = UnixStream::connect(&self.socket).expect("the API takes connections");
        let mut head = format!("{method} /api/{path} HTTP/1.1\r\nhost: localhost");
        if !body.is_empty() {
            head +=
                &format!("\r\ncontent-type: application/json\r\ncontent-length: {}", body.len());
        }
        let answer = send(&stream, &head, body);
        match answer.status {
            204 => Value::Null,
            200 => answer.json(),
            _ => panic!("{method} {path}: {}", answer.message()),
        }
    }

    /// What it prints of each mount: mountpoint, type, time, mode and prefetch of an image.
    pub fn info(&self) -> Vec<String> {
        let info = self.call("GET", "v1/daemon", "");
        for member in ["package_ver", "git_commit", "build_time", "profile", "rustc"] {
            info["version"][member].as_str().expect(member);
        }
        info["state"].as_str().expect("state");
        let mounts = info["backend_collection"].as_object().expect("a table of mounts");
        mounts
            .iter()
            .map(|(at, mount)| {
                assert_eq!(mount["mountpoint"], *at);
                let time = mount["mounted_time"].as_str().expect("a time");
                assert!(is_time(time), "{time}");
                let kind = mount["backend_type"].as_str().expect("a type");
                if kind == "Rafs" {
                    let config = &mount["config"];
                    config["rafs"]["mode"].as_str().expect("a mode");
                    config["rafs"]["enable_xattr"].as_bool().expect("a switch");
                    config["cache"]["prefetch"]["enable"].as_bool().expect("a switch");
                    config["cache"]["prefetch"]["batch_size"].as_u64().expect("a number");
                }
                format!("{at} {kind}")
            })
            .collect()
    }

    pub fn set_log_level(&self, level: &str) {
        self.call("PUT", "v1/daemon", &json!({"log_level": level}).to_string());
    }

    /// Figures of the only image: reads by size, and reads by time.
    pub fn fsstats(&self) -> (Vec<u64>, Vec<u64>) {
        let stats = self.call("GET", "v1/metrics", "");
        stats["data_read"].as_u64().expect("a number");
        stats["nr_opens"].as_u64().expect("a number");
        assert_eq!(numbers(&stats["fop_hits"]).len(), 15);
        assert_eq!(numbers(&stats["fop_errors"]).len(), 15);
        assert_eq!(numbers(&stats["fop_cumulative_latency_total"]).len(), 15);
        (numbers(&stats["block_count_read"]), numbers(&stats["read_latency_dist"]))
    }

    /// Reads of the backend so far, asked for twice as with `--interval`.
    pub fn backend(&self) -> u64 {
        let ask = || {
            let stats = self.call("GET", "v1/metrics/backend", "");
            stats["backend_type"].as_str().expect("a type");
            for member in [
                "read_count",
                "read_errors",
                "read_amount_total",
                "read_cumulative_latency_millis_total",
            ] {
                stats[member].as_u64().expect(member);
            }
            for member in ["read_cumulative_latency_millis_dist", "read_count_block_size_dist"] {
                assert_eq!(numbers(&stats[member]).len(), 8, "{member}");
            }
            let rows = stats["read_latency_sizes_dist"].as_array().expect("rows");
            assert!(rows.len() == 8 && rows.iter().all(|row| numbers(row).len() == 8));
            stats["read_count"].as_u64().expect("a number")
        };
        ask();
        ask()
    }

    /// Chunks in the cache.
    pub fn cache(&self) -> u64 {
        let stats = self.call("GET", "v1/metrics/blobcache", "");
        for member in [
            "partial_hits",
            "whole_hits",
            "total",
            "entries_count",
            "prefetch_data_amount",
            "prefetch_requests_count",
            "prefetch_workers",
            "prefetch_unmerged_chunks",
            "prefetch_cumulative_time_millis",
            "prefetch_begin_time_secs",
            "prefetch_begin_time_millis",
            "prefetch_end_time_secs",
            "prefetch_end_time_millis",
            "buffered_backend_size",
        ] {
            stats[member].as_u64().unwrap_or_else(|| panic!("{member}: {stats}"));
        }
        stats["id"].as_str().expect("an id");
        stats["store_path"].as_str().expect("a path");
        stats["data_all_ready"].as_bool().expect("a switch");
        stats["entries_count"].as_u64().expect("a number")
    }

    pub fn mount(&self, source: &Path, config: &str, at: &str, fs_type: &str) {
        let body = json!({"source": source, "fs_type": fs_type, "config": config});
        self.call("POST", &format!("v1/mount?mountpoint={at}"), &body.to_string());
    }

    pub fn umount(&self, at: &str) {
        self.call("DELETE", &format!("v1/mount?mountpoint={at}"), "");
    }
}

/// All numbers of a list.
pub fn numbers(list: &Value) -> Vec<u64> {
    let list = list.as_array().unwrap_or_else(|| panic!("a list: {list}"));
    list.iter().map(|number| number.as_u64().expect("a number")).collect()
}

/// `YYYY-MM-DD HH:MM:SS.f+ +00:00:00`
pub fn is_time(text: &str) -> bool {
    let parts: Vec<&str> = text.split(' ').collect();
    let [date, time, zone] = parts[..] else { return false };
    let (time, fraction) = time.split_once('.').unwrap_or((time, ""));
    let shape = |text: &str, like: &str| {
        text.len() == like.len()
            && text.bytes().zip(like.bytes()).all(|(c, l)| match l {
                b'0' => c.is_ascii_digit(),
                _ => c == l,
            })
    };
    shape(date, "0000-00-00")
        && shape(time, "00:00:00")
        && !fraction.is_empty()
        && fraction.bytes().all(|c| c.is_ascii_digit())
        && zone == "+00:00:00"
}

/// The config document that nydus-snapshotter writes and Kata passes on, for blobs in a directory.
pub fn snapshotter_config(id: &str, blobs: &Path, cache: &Path) -> String {
    json!({
        "device": {
            "id": id,
            "backend": {"type": "localfs", "config": {"readahead": false, "dir": blobs}},
            "cache": {"type": "blobcache",
                      "config": {"work_dir": cache, "disable_indexed_map": false}},
        },
        "mode": "direct", "digest_validate": false, "iostats_files": false, "enable_xattr": true,
        "fs_prefetch": {"enable": false, "prefetch_all": false, "threads_count": 8,
                        "merging_size": 1_048_576, "bandwidth_rate": 0},
    })
    .to_string()
}

/// Body of a mount request for an image.
pub fn rafs(bootstrap: &Path, config: &str) -> Value {
    json!({"fs_type": "rafs", "source": bootstrap, "config": config})
}

/// Waits until `done` holds; panics after a while.
#[track_caller]
pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < Duration::from_secs(60), "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
