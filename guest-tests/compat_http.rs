//! The HTTP API: statements 21 to 24, 33 to 37 and 40 to 50 of `docs/compatibility.md`.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is how a test fails")]

mod compat;
mod daemon;
mod support;

use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use compat::{KataGo, KataRs, Nydusctl, is_time, numbers, rafs, send, snapshotter_config};
use daemon::quick::ends_at_once;
use daemon::{Daemon, golden, rafsd, scratch};
use serde_json::{Value, json};
use support::frontend::Vm;
use support::hang_fs::{HangFs, Mode};
use support::image::Image;

/// A daemon as Kata starts it, and its client.
fn kata(dir: &Path) -> (Daemon, KataGo) {
    let daemon = Daemon::start(dir, rafsd(dir, "virtiofs --log-level info --apisock A --sock S"));
    let kata = KataGo::connect(&dir.join("A"));
    (daemon, kata)
}

/// Mounts a golden image at `/rafs/c1/lowerdir`, with the config id `/3`.
fn mount_golden(kata: &KataGo, dir: &Path) {
    let image = golden("v6-zstd");
    let config = snapshotter_config("/3", &image.join("blobs"), &dir.join("cache"));
    let answer = kata.mount("/rafs/c1/lowerdir", &rafs(&image.join("bootstrap"), &config));
    assert_eq!(answer.status, 204, "{answer:?}");
}

#[test]
fn s21_daemon_info_has_what_every_client_wants() {
    let dir = scratch();
    let args = "virtiofs --apisock A --sock S --id d1 --supervisor /run/s";
    let _daemon = Daemon::start(dir.path(), rafsd(dir.path(), args));
    let info = KataRs::connect(&dir.path().join("A")).info();
    assert_eq!((info.id.as_deref(), info.supervisor.as_deref()), (Some("d1"), Some("/run/s")));
    assert_eq!(info.backend_collection, Some(json!({})));
    assert!(!info.version.package_ver.is_empty() && !info.version.rustc.is_empty());
}

#[test]
fn s22_states_are_upper_case() {
    let dir = scratch();
    let (_daemon, kata) = kata(dir.path());
    assert_eq!(kata.call("GET", "/api/v1/daemon", None).json()["state"], "RUNNING");
    assert_eq!(kata.call("GET", "/api/v2/daemon", None).json()["state"], "RUNNING");
}

#[test]
fn s23_and_s24_a_mount_is_shown_with_its_time_and_without_secrets() {
    let dir = scratch();
    let (_daemon, kata) = kata(dir.path());
    mount_golden(&kata, dir.path());
    let info = kata.call("GET", "/api/v1/daemon", None).json();
    let mount = &info["backend_collection"]["/rafs/c1/lowerdir"];
    assert!(is_time(mount["mounted_time"].as_str().unwrap()), "{mount}");
    assert_eq!(mount["config"]["id"], "/3");
}

#[test]
fn s33_every_error_has_code_and_message() {
    let dir = scratch();
    let (_daemon, kata) = kata(dir.path());
    let cases = [
        ("GET", "/no/such/route", 404),
        ("GET", "/api/v1/metrics", 404),
        ("GET", "/api/v1/metrics?id=/x", 404),
        ("GET", "/api/v1/metrics/backend?id=x", 404),
        ("POST", "/api/v1/daemon", 400),
        ("DELETE", "/api/v1/mount", 400),
        ("GET", "/api/v1/daemon/backend", 400),
        ("GET", "/api/v1/daemon/backend?mountpoint=/x", 500),
        ("PUT", "/api/v1/daemon/fuse/takeover", 501),
        ("PATCH", "/api/v1/metrics", 400),
    ];
    for (method, path, status) in cases {
        let answer = kata.call(method, path, None);
        assert_eq!(answer.status, status, "{method} {path}: {answer:?}");
        answer.message();
        assert!(answer.headers.contains("content-type: application/json"), "{answer:?}");
        assert!(answer.headers.contains("server: nydus api"), "{answer:?}");
    }
    let answer = kata.call("POST", "/api/v1/mount?mountpoint=/x", Some(&json!(["no command"])));
    assert_eq!(answer.status, 400);
    answer.message();
}

#[test]
fn s34_content_type_without_a_body_and_a_body_of_length_0_are_fine() {
    let dir = scratch();
    let (_daemon, _) = kata(dir.path());
    let stream = || UnixStream::connect(dir.path().join("A")).unwrap();
    let with_type = "\r\nHost: unix\r\nContent-Type: application/json";
    let get = send(&stream(), &format!("GET /api/v1/daemon HTTP/1.1{with_type}"), "");
    assert_eq!(get.status, 200);
    let delete = format!("DELETE /api/v1/mount?mountpoint=/x HTTP/1.1{with_type}");
    assert!(send(&stream(), &delete, "").message().contains("doesn't exist"));
    let put = "PUT /api/v1/daemon/start HTTP/1.1\r\nHost: unix\r\nContent-Length: 0";
    assert!(send(&stream(), put, "").message().contains("UnexpectedEvent"));
}

#[test]
fn s35_three_hundred_connections_of_clients_that_never_close_them() {
    let dir = scratch();
    let (_daemon, kata) = kata(dir.path());
    for _ in 0..300 {
        assert_eq!(kata.call("GET", "/api/v1/daemon", None).status, 200);
    }
}

#[test]
fn s36_an_idle_connection_stays_open() {
    let dir = scratch();
    let (daemon, kata) = kata(dir.path());
    // The snapshotter waits for HUP on a connection on which it never says anything.
    let mut silent = UnixStream::connect(dir.path().join("A")).unwrap();
    let used = UnixStream::connect(dir.path().join("A")).unwrap();
    let head = "GET /api/v1/daemon HTTP/1.1\r\nHost: unix";
    assert_eq!(send(&used, head, "").status, 200);
    // No timer in the code can be waited for; this outlasts those of common servers' headers.
    silent.set_read_timeout(Some(Duration::from_secs(12))).unwrap();
    let error = silent.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock, "nothing came, not even an end");
    assert_eq!(send(&silent, head, "").status, 200);
    assert_eq!(send(&used, head, "").status, 200);
    drop(kata);
    // It is closed when the daemon ends, which is what the snapshotter waits for.
    daemon.signal(libc::SIGKILL);
    assert_eq!(silent.read(&mut [0]).unwrap(), 0);
}

#[test]
fn s37_long_bodies_and_request_lines() {
    let dir = scratch();
    let (_daemon, kata) = kata(dir.path());
    let image = golden("v6-none");
    let config = snapshotter_config("/1", &image.join("blobs"), &dir.path().join("cache"));
    let mut body = rafs(&image.join("bootstrap"), &config);
    body["more"] = Value::String("c".repeat(1 << 20));
    // A name may have 255 bytes: sixteen of them make a line of 4 KiB.
    let at = format!("/{}", ["n".repeat(255).as_str(); 15].join("/"));
    let answer = kata.mount(&at, &body);
    assert_eq!(answer.status, 204, "{answer:?}");
    let info = kata.call("GET", "/api/v1/daemon", None).json();
    assert_eq!(info["backend_collection"][&at]["backend_type"], "Rafs");
    assert_eq!(kata.umount(&at).status, 204);
}

#[test]
fn s40_the_log_level_changes_at_once() {
    let dir = scratch();
    let (daemon, kata) = kata(dir.path());
    let put = |level: &str| kata.call("PUT", "/api/v1/daemon", Some(&json!({"log_level": level})));
    assert_eq!(put("debug").status, 204);
    kata.call("GET", "/marked", None);
    for level in ["loud", "", "DEBUGGING"] {
        assert!(put(level).status >= 400, "{level}");
    }
    for level in ["off", "error", "warn", "info", "trace", "debug"] {
        assert_eq!(put(level).status, 204, "{level}");
    }
    daemon.signal(libc::SIGTERM);
    assert!(daemon.end().2.contains("api: GET /marked: 404"));
}

#[test]
fn s41_metrics_of_a_mount_count_what_the_guest_does() {
    let dir = scratch();
    let image = Image::build(dir.path(), 2, 300_000, 64 << 10, "zstd").unwrap();
    let (_daemon, kata) = kata(dir.path());
    let config = snapshotter_config("/1", &image.blobs, &dir.path().join("cache"));
    assert_eq!(kata.mount("/m/one", &rafs(&image.bootstrap, &config)).status, 204);
    let (_vm, mut fuse) = Vm::mounted(&dir.path().join("S"));
    let node = fuse.resolve(b"/m/one/f0001").unwrap();
    for (offset, size) in [(0, 100), (0, 4096), (10_000, 131_072)] {
        fuse.read(node, 0, offset, size).unwrap();
    }
    fuse.read(node, 0, 1 << 40, 10).unwrap();
    fuse.getattr(node).unwrap();
    assert!(fuse.readlink(node).is_err());
    for path in ["/api/v1/metrics", "/api/v1/metrics?id=/m/one", "/api/v1/metrics?id=%2Fm%2Fone"] {
        let stats = kata.call("GET", path, None).json();
        assert_eq!((&stats["id"], &stats["data_read"]), (&json!("/m/one"), &json!(135_268)));
        assert_eq!(numbers(&stats["block_count_read"]), [2, 0, 1, 0, 0, 1, 0, 0]);
        let hits = numbers(&stats["fop_hits"]);
        assert_eq!((hits.len(), hits[0], hits[1], hits[4]), (15, 1, 1, 4), "{stats}");
        let errors = numbers(&stats["fop_errors"]);
        assert_eq!((errors.len(), errors[1], errors[4]), (15, 1, 0), "{stats}");
        assert_eq!(numbers(&stats["read_latency_dist"]).iter().sum::<u64>(), 4);
        assert!(numbers(&stats["fop_cumulative_latency_total"])[4] > 0);
    }
    assert_eq!(kata.call("GET", "/api/v1/metrics?id=/m", None).status, 404);
    assert_eq!(kata.mount("/m/two", &rafs(&image.bootstrap, &config)).status, 204);
    assert_eq!(kata.call("GET", "/api/v1/metrics", None).status, 404, "which of the two?");
    assert_eq!(kata.call("GET", "/api/v1/metrics?id=/m/two", None).status, 200);
}

#[test]
fn s42_and_s43_cache_and_backend_of_a_config() {
    let dir = scratch();
    let image = Image::build(dir.path(), 2, 300_000, 64 << 10, "zstd").unwrap();
    let (_daemon, kata) = kata(dir.path());
    let cache = dir.path().join("cache");
    let config = snapshotter_config("/3", &image.blobs, &cache);
    assert_eq!(kata.mount("/m", &rafs(&image.bootstrap, &config)).status, 204);
    let (_vm, mut fuse) = Vm::mounted(&dir.path().join("S"));
    let node = fuse.resolve(b"/m/f0000").unwrap();
    image.check_file(&mut fuse, 0, node).unwrap();
    let nydusctl = Nydusctl::new(&dir.path().join("A"));
    // Each of five chunks of the file; a chunk may bring its neighbours.
    assert!(nydusctl.cache() >= 5);
    assert!(nydusctl.backend() >= 1);
    let stats = kata.call("GET", "/api/v1/metrics/blobcache?id=/3", None).json();
    let blob = image.blob().file_name().unwrap().to_str().unwrap().to_owned();
    assert_eq!(stats["underlying_files"], json!([format!("{blob}.blob.data")]));
    assert_eq!((&stats["id"], &stats["store_path"]), (&json!("/3"), &json!(cache)));
    let stats = kata.call("GET", "/api/v1/metrics/backend?id=%2F3", None).json();
    assert_eq!((&stats["backend_type"], &stats["read_errors"]), (&json!("localfs"), &json!(0)));
    assert!(stats["read_amount_total"].as_u64().unwrap() > 0);
    assert_eq!(kata.call("GET", "/api/v1/metrics/blobcache?id=/4", None).status, 404);
}

#[test]
fn s44_requests_that_wait_are_listed() {
    let dir = scratch();
    let image = Image::build(dir.path(), 1, 300_000, 64 << 10, "none").unwrap();
    let backend = HangFs::mount(&image.blobs, &dir.path().join("backend")).unwrap();
    let (_daemon, kata) = kata(dir.path());
    let config = snapshotter_config("/3", backend.path(), &dir.path().join("cache"));
    assert_eq!(kata.mount("/m", &rafs(&image.bootstrap, &config)).status, 204);
    let idle = kata.call("GET", "/api/v1/metrics/inflight", None);
    assert_eq!((idle.status, idle.body.as_str()), (204, ""));
    let (_vm, mut fuse) = Vm::mounted(&dir.path().join("S"));
    let node = fuse.resolve(b"/m/f0000").unwrap();
    backend.set(Mode::Hang);
    let ticket = fuse.submit_read(node, 0, 0, 4096).unwrap();
    fuse.flush();
    compat::eventually("the read waits", || {
        kata.call("GET", "/api/v1/metrics/inflight", None).status == 200
    });
    let list = kata.call("GET", "/api/v1/metrics/inflight", None).json();
    let [request] = &list.as_array().unwrap()[..] else { panic!("{list}") };
    assert_eq!(request.as_object().unwrap().len(), 4, "{list}");
    assert_eq!((&request["inode"], &request["opcode"]), (&json!(node), &json!(15)));
    assert_eq!(request["unique"], json!(ticket.0));
    assert!(request["timestamp_secs"].as_u64().unwrap() > 1_700_000_000);
    backend.set(Mode::Pass);
    let reply = fuse.wait(ticket, Duration::from_secs(60)).unwrap();
    assert_eq!(reply.errno, 0);
    fuse.recycle(reply);
    compat::eventually("nothing waits", || {
        kata.call("GET", "/api/v1/metrics/inflight", None).status == 204
    });
}

#[test]
fn s45_what_people_look_at_answers() {
    let dir = scratch();
    let (_daemon, kata) = kata(dir.path());
    mount_golden(&kata, dir.path());
    let get = |path: &str| {
        let answer = kata.call("GET", path, None);
        assert_eq!(answer.status, 200, "{path}: {answer:?}");
        answer.json()
    };
    assert_eq!(get("/api/v1/metrics/files"), json!({}));
    assert_eq!(get("/api/v1/metrics/files?id=/rafs/c1/lowerdir&latest=true"), json!([]));
    assert_eq!(get("/api/v1/metrics/pattern"), json!([]));
    let events = get("/api/v1/daemon/events");
    assert_eq!((&events["max_errors"], &events["max_size"]), (&json!(500), &json!(51_200)));
    assert_eq!((&events["total_errors"], &events["errors"]), (&json!(0), &json!([])));
    let meta = get("/api/v1/daemon/backend?mountpoint=%2Frafs%2Fc1%2Flowerdir");
    assert_eq!(meta["magic"], 0xE0F5_E1E2_u64);
    assert!(meta["chunk_size"].as_u64().unwrap() >= 4096);
    assert_eq!(meta["attr_timeout"], json!({"secs": u32::MAX, "nanos": 0}));
    assert_eq!(meta.as_object().unwrap().len(), 25, "{meta}");
}

#[test]
fn s45_what_was_done_with_each_file_is_recorded_where_the_config_asks_for_it() {
    let dir = scratch();
    let image = Image::build(dir.path(), 3, 300_000, 64 << 10, "zstd").unwrap();
    let (_daemon, kata) = kata(dir.path());
    let config = snapshotter_config("/1", &image.blobs, &dir.path().join("cache"));
    let mut config: Value = serde_json::from_str(&config).unwrap();
    for key in ["iostats_files", "access_pattern", "latest_read_files"] {
        config[key] = json!(true);
    }
    assert_eq!(kata.mount("/m", &rafs(&image.bootstrap, &config.to_string())).status, 204);
    let (_vm, mut fuse) = Vm::mounted(&dir.path().join("S"));
    let [first, second, never] =
        ["/m/f0001", "/m/f0000", "/m/f0002"].map(|path| fuse.resolve(path.as_bytes()).unwrap());
    // In an image's own numbers; those that a guest sees have the mount in their upper bits.
    let [ino_1, ino_2, ino_3] = [first, second, never].map(|node| node & ((1 << 40) - 1));
    fuse.read(first, 0, 0, 100).unwrap();
    fuse.read(first, 0, 0, 4096).unwrap();
    fuse.read(second, 0, 10_000, 131_072).unwrap();
    fuse.getattr(never).unwrap();
    assert!(fuse.readlink(never).is_err());

    let get = |path: &str| kata.call("GET", path, None).json();
    let stats = get("/api/v1/metrics");
    for key in
        ["files_account_enabled", "access_pattern_enabled", "record_latest_read_files_enabled"]
    {
        assert_eq!(stats[key], json!(true), "{key}");
    }
    let files = get("/api/v1/metrics/files?id=/m");
    let one = &files[ino_1.to_string()];
    assert_eq!((&one["total_fops"], &one["data_read"]), (&json!(2), &json!(4196)), "{files}");
    assert_eq!(numbers(&one["block_count_read"]), [1, 0, 1, 0, 0, 0, 0, 0]);
    let three = &files[ino_3.to_string()];
    let (hits, errors) = (numbers(&three["fop_hits"]), numbers(&three["fop_errors"]));
    assert_eq!((hits.len(), hits[0], hits[1], errors.len(), errors[1]), (15, 1, 1, 15, 1));
    let pattern = get("/api/v1/metrics/pattern");
    let read: Vec<_> =
        pattern.as_array().unwrap().iter().map(|a| (&a["ino"], &a["nr_read"])).collect();
    assert_eq!(read, [(&json!(ino_1), &json!(2)), (&json!(ino_2), &json!(1))], "in this order");
    assert!(pattern[0]["first_access_time_secs"].as_u64().unwrap() > 1_700_000_000);
    assert!(pattern[0]["first_access_time_nanos"].as_u64().unwrap() < 1_000_000_000);
    let mut read = [ino_1, ino_2];
    read.sort_unstable();
    assert_eq!(get("/api/v1/metrics/files?latest=true"), json!(read));
    assert_eq!(get("/api/v1/metrics/files?latest=true"), json!([]), "only what is new");
    let info = kata.call("GET", "/api/v1/daemon", None).json();
    assert_eq!(info["backend_collection"]["/m"]["config"]["rafs"]["access_pattern"], json!(true));
}

#[test]
fn s46_the_config_of_what_is_mounted_is_shown_and_changed() {
    let dir = scratch();
    let (_daemon, kata) = kata(dir.path());
    mount_golden(&kata, dir.path());
    let answer = kata.call("GET", "/api/v1/config?id=%2F3", None);
    assert_eq!(answer.status, 200);
    let _: BTreeMap<String, String> = serde_json::from_str(&answer.body).unwrap();
    let put = |body: Value| kata.call("PUT", "/api/v1/config?id=/3", Some(&body));
    let unknown = put(json!({"colour": "c2VjcmV0"}));
    assert!(unknown.status >= 400);
    assert!(unknown.message().contains("colour") && !unknown.message().contains("c2VjcmV0"));
    assert_eq!(put(json!({"registry_auth": 5})).status, 400);
    assert_eq!(put(json!({})).status, 204, "nothing to change");
    // The snapshotter gives the mountpoint of a daemon with one image, whatever the id of its config.
    let path = "/api/v1/config?id=%2Frafs%2Fc1%2Flowerdir";
    assert_eq!(kata.call("PUT", path, Some(&json!({}))).status, 204, "a mountpoint");
    assert_eq!(kata.call("GET", "/api/v1/config?id=/4", None).status, 404);
}

#[test]
fn s47_exit_ends_the_process_and_start_when_running_does_not() {
    ends_at_once("asked by the API", || {
        let dir = scratch();
        let (daemon, kata) = kata(dir.path());
        let start = kata.call("PUT", "/api/v1/daemon/start", None);
        assert_eq!(start.status, 400);
        assert!(start.message().contains("UnexpectedEvent"));
        assert_eq!(kata.call("PUT", "/api/v1/daemon/exit", None).status, 204);
        let (status, took, _) = daemon.end();
        assert_eq!(status.code(), Some(0));
        assert!(!dir.path().join("A").exists() && !dir.path().join("S").exists());
        took
    });
}

#[test]
fn s48_sendfd_connects_to_the_supervisor_and_passes_a_descriptor() {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    let dir = scratch();
    let listener = UnixListener::bind(dir.path().join("super")).unwrap();
    let args = "virtiofs --apisock A --sock S --supervisor super --id d";
    let _daemon = Daemon::start(dir.path(), rafsd(dir.path(), args));
    // As nydus-snapshotter's supervisor: it waits for ever, and wants a control message.
    let manager = std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let (mut bytes, mut fds) = (Vec::new(), Vec::new());
        loop {
            let mut buffer = vec![0; 32 * 1024];
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut iov = [std::io::IoSliceMut::new(&mut buffer)];
            let message = recvmsg(&stream, &mut iov, &mut control, RecvFlags::empty()).unwrap();
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(received) = message {
                    fds.extend(received);
                }
            }
            if message.bytes == 0 {
                return (bytes, fds);
            }
            bytes.extend_from_slice(&buffer[..message.bytes]);
        }
    });
    let kata = KataGo::connect(&dir.path().join("A"));
    let answer = kata.call("PUT", "/api/v1/daemon/fuse/sendfd", None);
    assert_eq!(answer.status, 204, "{answer:?}");
    let (bytes, fds) = manager.join().unwrap();
    assert_eq!(fds.len(), 1);
    assert_eq!(serde_json::from_slice::<Value>(&bytes).unwrap()["rafsd"], 1);
    // Nobody listens any more: an error, soon.
    assert_eq!(kata.call("PUT", "/api/v1/daemon/fuse/sendfd", None).status, 500);
}

#[test]
fn s48_sendfd_without_a_supervisor_is_unsupported() {
    let dir = scratch();
    let (_daemon, kata) = kata(dir.path());
    let answer = kata.call("PUT", "/api/v1/daemon/fuse/sendfd", None);
    assert_eq!(answer.status, 501);
    answer.message();
}

#[test]
fn s49_blob_objects_are_unsupported() {
    let dir = scratch();
    let (_daemon, kata) = kata(dir.path());
    let body = json!({"type": "bootstrap", "id": "b", "domain_id": "d", "config": null});
    for (method, body) in [("GET", None), ("PUT", Some(&body)), ("DELETE", None)] {
        let answer = kata.call(method, "/api/v2/blobs?domain_id=d&blob_id=b", body);
        assert_eq!(answer.status, 501);
        answer.message();
    }
}

#[test]
fn prometheus_reads_metrics_with_units() {
    let dir = scratch();
    let image = Image::build(dir.path(), 1, 300_000, 64 << 10, "zstd").unwrap();
    let (_daemon, kata) = kata(dir.path());
    let config = snapshotter_config("/3", &image.blobs, &dir.path().join("cache"));
    assert_eq!(kata.mount("/m", &rafs(&image.bootstrap, &config)).status, 204);
    let (_vm, mut fuse) = Vm::mounted(&dir.path().join("S"));
    let node = fuse.resolve(b"/m/f0000").unwrap();
    image.check_file(&mut fuse, 0, node).unwrap();
    let value = |text: &str, name: &str| -> f64 {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in\n{text}")).parse().unwrap()
    };
    let answer = kata.call("GET", "/metrics", None);
    assert_eq!(answer.status, 200);
    assert!(answer.headers.contains("content-type: application/openmetrics-text"), "{answer:?}");
    let text = answer.body;
    assert!(text.ends_with("# EOF\n"), "{text}");
    let read = value(&text, r#"rafsd_fuse_requests_total{opcode="read"}"#);
    assert!(read >= 3.0);
    assert_eq!(value(&text, "rafsd_fuse_read_bytes_total"), 300_000.0);
    assert_eq!(value(&text, "rafsd_mounts"), 1.0);
    assert_eq!(value(&text, "rafsd_parked_requests"), 0.0);
    assert_eq!(value(&text, "rafsd_fetched_bytes_total"), 300_000.0);
    assert_eq!(value(&text, "rafsd_vmm_connections_total"), 1.0);
    assert_eq!(value(&text, r#"rafsd_backend_errors_total{cause="timeout"}"#), 0.0);
    assert_eq!(value(&text, r#"rafsd_ring_errors_total{kind="chain"}"#), 0.0);
    let seconds = r#"rafsd_fuse_request_duration_seconds_count{opcode="read"}"#;
    assert_eq!(value(&text, seconds), read);
    let last = text.lines().find(|line| {
        line.starts_with("rafsd_fuse_request_duration_seconds_bucket{")
            && line.contains(r#"opcode="read""#)
            && line.contains(r#"le="+Inf""#)
    });
    assert!(last.unwrap().ends_with(&format!(" {read}")), "{last:?}");
    let source = format!("localfs {}", image.blobs.display());
    let source = format!("rafsd_source_read_bytes_total{{source=\"{source}\"}}");
    assert_eq!(value(&text, &source), 300_000.0);
    // What is unmounted still counts.
    assert_eq!(kata.umount("/m").status, 204);
    let text = kata.call("GET", "/metrics", None).body;
    assert_eq!(value(&text, "rafsd_fuse_read_bytes_total"), 300_000.0);
    assert_eq!(value(&text, "rafsd_fetched_bytes_total"), 300_000.0);
    assert_eq!(value(&text, &source), 300_000.0);
    assert_eq!(value(&text, "rafsd_mounts"), 0.0);
}
