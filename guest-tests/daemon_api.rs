//! The HTTP API as its clients use it.

mod daemon;

use std::os::unix::net::UnixStream;

use daemon::quick::ends_at_once;
use daemon::{Daemon, exchange, rafsd, raw, scratch, small_image};
use serde_json::Value;

#[test]
fn daemon_info_has_what_strict_clients_want() {
    let dir = scratch();
    let args = format!("virtiofs --sock S --apisock A --id d1 --supervisor /s {}", small_image());
    let daemon = Daemon::start(dir.path(), rafsd(dir.path(), &args));
    let (status, body) = daemon.call("GET", "/api/v1/daemon", "");
    assert_eq!(status, 200);
    let info: Value = serde_json::from_str(&body).unwrap();
    let members = ["version", "id", "supervisor", "state", "backend_collection"];
    assert_eq!(info.as_object().unwrap().len(), members.len(), "{body}");
    for member in ["package_ver", "git_commit", "build_time", "profile", "rustc"] {
        assert!(info["version"][member].is_string(), "{body}");
    }
    assert_eq!((&info["id"], &info["supervisor"]), (&"d1".into(), &"/s".into()));
    assert_eq!(info["state"], "RUNNING");
    let mount = &info["backend_collection"]["/"];
    assert_eq!((&mount["backend_type"], &mount["mountpoint"]), (&"Rafs".into(), &"/".into()));
    let time = mount["mounted_time"].as_str().unwrap();
    assert_eq!((time.len(), &time[10..11], &time[29..]), (39, " ", " +00:00:00"), "{time}");
    // nydusctl reads these without asking whether they are there.
    let config = &mount["config"];
    assert!(config["rafs"]["mode"].is_string(), "{config}");
    assert!(config["cache"]["prefetch"]["enable"].is_boolean(), "{config}");
    assert!(config["cache"]["prefetch"]["batch_size"].is_number(), "{config}");
    assert_eq!(config["rafs"]["enable_xattr"], true);

    let (status, body) = daemon.call("GET", "/api/v2/daemon", "");
    assert_eq!(status, 200);
    let info: Value = serde_json::from_str(&body).unwrap();
    assert!(info["backend_collection"].is_null(), "{body}");
}

/// A body that is well-formed and cannot be mounted.
const MOUNT: &str = r#"{"fs_type":"rafs","source":"/no/such/file","config":"{}"}"#;

#[test]
fn statuses_are_those_of_nydusd_and_errors_have_code_and_message() {
    let dir = scratch();
    let daemon = Daemon::small(dir.path());
    let cases = [
        ("GET", "/api/v1/daemon", "", 200),
        ("GET", "http://localhost/api/v1/daemon", "", 200),
        ("PUT", "/api/v1/daemon", r#"{"log_level":"debug"}"#, 204),
        ("PUT", "/api/v2/daemon", r#"{"log_level":"info"}"#, 204),
        ("PUT", "/api/v1/daemon", r#"{"log_level":"loud"}"#, 500),
        ("PUT", "/api/v1/daemon", "{", 400),
        ("PUT", "/api/v1/daemon", "{}", 400),
        ("PUT", "/api/v1/daemon", "", 400),
        ("GET", "/api/v1/daemon", "{}", 400),
        ("POST", "/api/v1/daemon", "", 400),
        ("DELETE", "/api/v1/daemon", "", 400),
        ("PATCH", "/api/v1/daemon", "", 400),
        ("GET", "/api/v1/daemon/exit", "", 400),
        ("PUT", "/api/v1/daemon/exit", "{}", 400),
        ("PUT", "/api/v1/daemon/start", "", 400),
        ("GET", "/api/v2/blobs", "", 501),
        ("PUT", "/api/v2/blobs", "{}", 501),
        ("DELETE", "/api/v2/blobs?blob_id=x", "", 501),
        ("POST", "/api/v2/blobs", "", 400),
        ("GET", "/api/v1/mount?mountpoint=/x", "", 400),
        ("POST", "/api/v1/mount", MOUNT, 400),
        ("POST", "/api/v1/mount?mountpoint=/x", "", 400),
        ("POST", "/api/v1/mount?mountpoint=/x", "{", 400),
        ("POST", "/api/v1/mount?mountpoint=/x", r#"{"source":"/"}"#, 400),
        ("POST", "/api/v1/mount?mountpoint=%2", MOUNT, 400),
        ("POST", "/api/v1/mount?mountpoint=x", MOUNT, 500),
        ("POST", "/api/v1/mount?mountpoint=/", MOUNT, 500),
        ("POST", "/api/v1/mount?mountpoint=/x", r#"{"source":"/","config":"{}"}"#, 500),
        ("DELETE", "/api/v1/mount?mountpoint=/x", "", 500),
        ("DELETE", "/api/v1/mount?mountpoint=/x", "{}", 400),
        ("PUT", "/api/v1/mount?mountpoint=/x", MOUNT, 500),
        ("GET", "/api/v3/daemon", "", 404),
        ("GET", "/", "", 404),
        ("GET", "/api/v1/daemon/", "", 404),
    ];
    // On one connection, so that a request whose body was not read cannot spoil the next.
    let stream = daemon.connect();
    for (method, path, body, want) in cases {
        let (status, answer) = exchange(&stream, method, path, body);
        assert_eq!(status, want, "{method} {path} {body}: {answer}");
        match status {
            204 => assert_eq!(answer, ""),
            200 => {}
            _ => {
                let error: Value = serde_json::from_str(&answer).unwrap();
                assert!(error["code"].is_string() && error["message"].is_string(), "{answer}");
            }
        }
    }
}

#[test]
fn the_log_level_changes_while_running() {
    let dir = scratch();
    let daemon = Daemon::small(dir.path());
    daemon.call("GET", "/before", "");
    assert_eq!(daemon.call("PUT", "/api/v1/daemon", r#"{"log_level":"debug"}"#).0, 204);
    daemon.call("GET", "/during", "");
    assert_eq!(daemon.call("PUT", "/api/v1/daemon", r#"{"log_level":"off"}"#).0, 204);
    daemon.call("GET", "/after", "");
    daemon.signal(libc::SIGTERM);
    let (_, _, log) = daemon.end();
    assert!(!log.contains("DEBUG rafsd::daemon::api] api: GET /before"), "{log}");
    assert!(log.contains("DEBUG rafsd::daemon::api] api: GET /during"), "{log}");
    assert!(!log.contains("/after"), "{log}");
}

#[test]
fn exit_answers_first_and_then_ends() {
    ends_at_once("asked by the API", || {
        let dir = scratch();
        let daemon = Daemon::small(dir.path());
        let _idle: Vec<UnixStream> = (0..20).map(|_| daemon.connect()).collect();
        assert_eq!(daemon.call("PUT", "/api/v1/daemon/exit", "").0, 204);
        let (status, took, log) = daemon.end();
        assert_eq!(status.code(), Some(0));
        assert!(log.contains("stopping: asked by the API"), "{log}");
        assert!(!dir.path().join("A").exists());
        took
    });
}

#[test]
fn hundreds_of_connections_stay_open() {
    let dir = scratch();
    let daemon = Daemon::small(dir.path());
    // Kata's Go client makes a connection for each call and leaves it open.
    let open: Vec<UnixStream> = (0..300)
        .map(|_| {
            let stream = daemon.connect();
            assert_eq!(exchange(&stream, "GET", "/api/v1/daemon", "").0, 200);
            stream
        })
        .collect();
    for stream in &open {
        assert_eq!(exchange(stream, "GET", "/api/v1/daemon", "").0, 200);
    }
}

#[test]
fn long_lines_bodies_and_expectations_are_fine() {
    let dir = scratch();
    let daemon = Daemon::small(dir.path());
    let path = format!("/api/v1/mount?mountpoint=/{}", "m".repeat(8000));
    let (status, answer) = daemon.call("POST", &path, &" ".repeat(1 << 20));
    assert_eq!(status, 400, "{answer}");
    assert!(answer.contains("ParseBody"), "{answer}");
    // A client that waits for leave to send its body.
    let head = "PUT /api/v1/daemon HTTP/1.1\r\nHost: unix\r\nExpect: 100-continue\r\n\
                Content-Length: 20\r\n\r\n{\"log_level\":\"info\"}";
    assert_eq!(raw(&daemon.connect(), head.as_bytes()).0, 204);
    // HTTP/1.0, and a request that says nothing of a body.
    assert_eq!(raw(&daemon.connect(), b"GET /api/v1/daemon HTTP/1.0\r\n\r\n").0, 200);
    let put = b"PUT /api/v1/daemon/start HTTP/1.1\r\nHost: unix\r\n\r\n";
    assert_eq!(raw(&daemon.connect(), put).0, 400);
}
