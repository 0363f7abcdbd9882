//! Config documents and where data comes from: statements 28, 46 and 51 to 60 of
//! `docs/compatibility.md`.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is how a test fails")]

mod compat;
mod daemon;
mod support;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use compat::{KataGo, eventually, rafs, snapshotter_config};
use daemon::quick::ends_at_once;
use daemon::{Daemon, golden, rafsd, scratch};
use serde_json::{Value, json};
use support::fault_registry::{Auth, Fault, FaultRegistry, Redirect};
use support::frontend::Vm;
use support::image::Image;

fn start(dir: &Path) -> (Daemon, KataGo) {
    start_with(dir, "60s")
}

fn start_with(dir: &Path, read_timeout: &str) -> (Daemon, KataGo) {
    let args = "virtiofs --log-level info --apisock A --sock S --read-timeout";
    let daemon = Daemon::start(dir, rafsd(dir, &format!("{args} {read_timeout}")));
    (daemon, KataGo::connect(&dir.join("A")))
}

/// The snapshotter's document for a registry, with more keys of its backend.
fn registry(host: &str, cache: &Path, more: Value) -> String {
    let mut config: Value = serde_json::from_str(&snapshotter_config("/3", cache, cache)).unwrap();
    let mut own = json!({"readahead": false, "scheme": "http", "host": host, "repo": "r",
        "timeout": 5, "connect_timeout": 5, "retry_limit": 2});
    own.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config["device"]["backend"] = json!({"type": "registry", "config": own});
    // No read-ahead, so that nothing is there that nobody has read.
    config["amplify_io"] = json!(0);
    config.to_string()
}

/// `user:password` as a config carries it.
fn basic(user: &str, password: &str) -> String {
    use std::io::Write;
    let mut base64 =
        Command::new("base64").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    write!(base64.stdin.take().unwrap(), "{user}:{password}").unwrap();
    String::from_utf8(base64.wait_with_output().unwrap().stdout).unwrap().trim().to_owned()
}

#[test]
fn s28_a_mount_does_not_wait_for_what_it_prefetches() {
    ends_at_once("a prefetch", mounts_that_prefetch);
}

fn mounts_that_prefetch() -> Duration {
    let dir = scratch();
    let image = Image::build(dir.path(), 2, 400_000, 64 << 10, "none").unwrap();
    let server = FaultRegistry::start(&image.blobs).unwrap();
    server.set(Fault::Hang);
    let (daemon, kata) = start(dir.path());
    let config = registry(server.host(), &dir.path().join("cache"), json!({}));
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config["fs_prefetch"] = json!({"enable": true, "prefetch_all": true, "threads_count": 8,
        "merging_size": 1_048_576, "bandwidth_rate": 0});
    let mut body = rafs(&image.bootstrap, &config.to_string());
    body["prefetch_files"] = json!(["/f0000"]);
    for _ in 0..3 {
        let answer = kata.mount("/m", &body);
        assert_eq!(answer.status, 204, "{answer:?}");
        assert_eq!(kata.umount("/m").status, 204, "what is prefetched holds nothing up");
    }
    assert_eq!(kata.mount("/m", &body).status, 204);
    let (_vm, mut fuse) = Vm::mounted(&dir.path().join("S"));
    assert!(fuse.resolve(b"/m/f0001").is_ok(), "names do not wait either");
    daemon.signal(libc::SIGTERM);
    let (status, took, log) = daemon.end();
    assert_eq!(status.code(), Some(0), "{log}");
    took
}

#[test]
fn s46_rotated_credentials_take_effect_at_the_next_request() {
    let dir = scratch();
    let image = Image::build(dir.path(), 4, 400_000, 64 << 10, "none").unwrap();
    let server = FaultRegistry::start(&image.blobs).unwrap();
    let auth = |password: &str| Auth::Basic { user: "u".into(), password: password.into() };
    server.set_auth(auth("old"));
    let (_daemon, kata) = start(dir.path());
    let cache = dir.path().join("cache");
    let config = registry(server.host(), &cache, json!({"auth": basic("u", "old")}));
    assert_eq!(kata.mount("/m", &rafs(&image.bootstrap, &config)).status, 204);
    let (_vm, mut fuse) = Vm::mounted(&dir.path().join("S"));
    let nodes: Vec<u64> = (0..4)
        .map(|n| fuse.resolve(format!("/m/{}", support::image::name(n)).as_bytes()).unwrap())
        .collect();
    image.check_file(&mut fuse, 0, nodes[0]).unwrap();
    server.set_auth(auth("new"));
    assert_eq!(fuse.read(nodes[3], 0, 0, 100).unwrap_err().errno(), Some(libc::EIO));
    let path = "/api/v1/config?id=%2F3";
    let put = |body: Value| kata.call("PUT", path, Some(&body));
    let answer = put(json!({"registry_auth": basic("u", "new")}));
    assert_eq!(answer.status, 204, "{answer:?}");
    image.check_file(&mut fuse, 3, nodes[3]).unwrap();
    let shown = kata.call("GET", path, None);
    assert!(!shown.body.contains(&basic("u", "new")), "{shown:?}");
    assert!(put(json!({"registry_auth": "not base64!"})).status >= 400);
    assert_eq!(put(json!({"proxy_url": ""})).status, 204);
    // Known, and without effect.
    let scheduler = |url: &str| put(json!({"dragonfly_scheduler_endpoint": url})).status;
    assert_eq!((scheduler("http://127.0.0.1:8002"), scheduler("")), (204, 204));
    assert!(scheduler("no address") >= 400);
    image.check_file(&mut fuse, 2, nodes[2]).unwrap();
}

#[test]
fn s51_the_snapshotter_s_document_mounts_and_unknown_keys_do_no_harm() {
    let dir = scratch();
    let (_daemon, kata) = start(dir.path());
    let image = golden("v6-zstd");
    let config = snapshotter_config("/3", &image.join("blobs"), &dir.path().join("cache"));
    let mut config: Value = serde_json::from_str(&config).unwrap();
    for (key, value) in [
        ("id_mapping", json!([0, 1000, 1])),
        ("warmup", json!(0)),
        ("id", json!("x")),
        ("from_the_future", json!({"a": [1]})),
    ] {
        config[key] = value;
    }
    config["device"]["backend"]["config"]["unheard_of"] = json!(true);
    let body = rafs(&image.join("bootstrap"), &config.to_string());
    let answer = kata.mount("/m", &body);
    assert_eq!(answer.status, 204, "{answer:?}");
}

#[test]
fn s52_version_2_is_taken_by_the_mount_call() {
    let dir = scratch();
    let (_daemon, kata) = start(dir.path());
    let image = golden("v6-zstd");
    let config = json!({"version": 2, "id": "/3",
        "backend": {"type": "localfs", "localfs": {"dir": image.join("blobs")}},
        "cache": {"type": "filecache", "filecache": {"work_dir": dir.path().join("cache")}},
        "rafs": {"mode": "direct", "enable_xattr": true}});
    let answer = kata.mount("/m", &rafs(&image.join("bootstrap"), &config.to_string()));
    assert_eq!(answer.status, 204, "{answer:?}");
}

#[test]
fn s53_every_way_to_a_registry_that_the_snapshotter_configures() {
    let dir = scratch();
    let image = Image::build(dir.path(), 1, 400_000, 64 << 10, "none").unwrap();
    let server = FaultRegistry::start(&image.blobs).unwrap();
    let store = FaultRegistry::start(&image.blobs).unwrap();
    let user = || ("u".to_owned(), "p".to_owned());
    let (own, elsewhere) = (server.host().to_owned(), store.host().to_owned());
    let cases = [
        ("anonymous", Auth::None, Redirect::None, json!({})),
        ("anonymous token", Auth::Bearer { user: None, uses: 100 }, Redirect::None, json!({})),
        (
            "basic",
            Auth::Basic { user: "u".into(), password: "p".into() },
            Redirect::None,
            json!({"auth": basic("u", "p")}),
        ),
        (
            "token for a user",
            Auth::Bearer { user: Some(user()), uses: 2 },
            Redirect::None,
            json!({"auth": basic("u", "p")}),
        ),
        ("registry_token", Auth::Token("t".into()), Redirect::None, json!({"registry_token": "t"})),
        ("redirect", Auth::None, Redirect::To(store.url()), json!({})),
        ("relative redirect", Auth::None, Redirect::Relative, json!({})),
        (
            "redirected host and scheme",
            Auth::None,
            Redirect::To("https://store.invalid".into()),
            json!({"blob_redirected_host": elsewhere, "blob_url_scheme": "http"}),
        ),
        (
            "proxy with fallback",
            Auth::None,
            Redirect::None,
            json!({"proxy": {"url": "http://127.0.0.1:9", "fallback": true}}),
        ),
        ("skip_verify", Auth::None, Redirect::None, json!({"skip_verify": true})),
    ];
    store.accept_signatures();
    for (what, auth, redirect, more) in cases {
        server.set_auth(auth);
        server.set_redirect(redirect);
        let dir = scratch();
        let (daemon, kata) = start(dir.path());
        let config = registry(&own, &dir.path().join("cache"), more);
        let answer = kata.mount("/m", &rafs(&image.bootstrap, &config));
        assert_eq!(answer.status, 204, "{what}: {answer:?}");
        let (vm, mut fuse) = Vm::mounted(&dir.path().join("S"));
        let node = fuse.resolve(b"/m/f0000").unwrap();
        if let Err(e) = image.check_file(&mut fuse, 0, node) {
            drop((vm, fuse));
            panic!("{what}: {e:#}: {}", daemon.kill());
        }
    }
}

#[test]
fn s54_malformed_credentials_fail_the_mount_and_not_the_daemon() {
    let dir = scratch();
    let (_daemon, kata) = start(dir.path());
    let cache = dir.path().join("cache");
    for auth in ["!!!", "bm8tY29sb24=x", "c2VjcmV0"] {
        let config = registry("localhost:1", &cache, json!({"auth": auth}));
        let answer = kata.mount("/m", &rafs(&golden("v6-none").join("bootstrap"), &config));
        assert_eq!(answer.status, 500, "{auth}");
        assert!(answer.message().contains("auth"), "{answer:?}");
        assert!(!answer.body.contains(auth), "{answer:?}");
    }
    assert_eq!(kata.call("GET", "/api/v1/daemon", None).json()["state"], "RUNNING");
}

#[test]
fn s55_secrets_show_up_nowhere() {
    let dir = scratch();
    let image = Image::build(dir.path(), 1, 100_000, 64 << 10, "none").unwrap();
    let server = FaultRegistry::start(&image.blobs).unwrap();
    server.set_auth(Auth::Basic { user: "u".into(), password: "another".into() });
    let args = "virtiofs --log-level trace --apisock A --sock S --read-timeout 300ms";
    let daemon = Daemon::start(dir.path(), rafsd(dir.path(), args));
    let kata = KataGo::connect(&dir.path().join("A"));
    let cache = dir.path().join("cache");
    let secrets = [basic("u", "hush-one"), "hush-two".to_owned(), basic("u", "hush-three")];
    let own = json!({"auth": secrets[0],
        "proxy": {"url": "http://proxyuser:hush-two@127.0.0.1:9", "fallback": true}});
    let config = registry(server.host(), &cache, own);
    let mut seen = format!("{:?}", kata.mount("/m", &rafs(&image.bootstrap, &config)));
    let (_vm, mut fuse) = Vm::mounted(&dir.path().join("S"));
    if let Ok(node) = fuse.resolve(b"/m/f0000") {
        assert!(fuse.read(node, 0, 0, 10).is_err(), "the password is wrong");
    }
    let bad = config.replace(&secrets[0], "hush-four!");
    seen += &format!("{:?}", kata.mount("/n", &rafs(&image.bootstrap, &bad)));
    seen += &format!("{:?}", kata.mount("/n", &rafs(&image.bootstrap, &format!("{config},"))));
    let rotated = json!({"registry_auth": secrets[2]});
    seen += &format!("{:?}", kata.call("PUT", "/api/v1/config?id=/3", Some(&rotated)));
    for path in [
        "/api/v1/daemon",
        "/api/v1/config?id=/3",
        "/api/v1/daemon/events",
        "/api/v1/metrics/backend",
        "/metrics",
    ] {
        seen += &format!("{:?}", kata.call("GET", path, None));
    }
    daemon.signal(libc::SIGTERM);
    seen += &daemon.end().2;
    for secret in secrets.iter().map(String::as_str).chain(["hush"]) {
        let at = seen.find(secret);
        assert!(
            at.is_none(),
            "{secret}: …{}…",
            &seen[at.unwrap().saturating_sub(200)..at.unwrap()]
        );
    }
}

#[test]
fn s56_a_version_6_image_without_a_cache_is_a_clear_error() {
    let dir = scratch();
    let (_daemon, kata) = start(dir.path());
    let image = golden("v6-none");
    for kind in ["dummycache", ""] {
        let config = snapshotter_config("/3", &image.join("blobs"), dir.path());
        let config = config.replace("\"blobcache\"", &format!("{kind:?}"));
        let answer = kata.mount("/m", &rafs(&image.join("bootstrap"), &config));
        assert_eq!(answer.status, 500);
        assert!(answer.message().contains("needs a cache"), "{answer:?}");
    }
}

#[test]
fn s57_files_of_others_in_the_cache_directory_are_left_alone() {
    let dir = scratch();
    let image = Image::build(dir.path(), 1, 400_000, 64 << 10, "zstd").unwrap();
    let cache = dir.path().join("cache");
    fs::create_dir(&cache).unwrap();
    let blob = image.blob().file_name().unwrap().to_str().unwrap().to_owned();
    // As nydusd leaves them, half-done; the last one is the snapshotter's, for images of another kind.
    let theirs = [".blob.data", ".blob.data.chunk_map", ".chunk_map", ".blob.meta", ".layer.disk"];
    for suffix in theirs {
        fs::write(cache.join(format!("{blob}{suffix}")), suffix).unwrap();
    }
    let config = snapshotter_config("/3", &image.blobs, &cache);
    let other = scratch();
    let daemons = [start(dir.path()), start(other.path())];
    for (dir, (_, kata)) in [&dir, &other].into_iter().zip(&daemons) {
        assert_eq!(kata.mount("/m", &rafs(&image.bootstrap, &config)).status, 204);
        let (_vm, mut fuse) = Vm::mounted(&dir.path().join("S"));
        let node = fuse.resolve(b"/m/f0000").unwrap();
        image.check_file(&mut fuse, 0, node).unwrap();
    }
    for suffix in theirs {
        let text = fs::read_to_string(cache.join(format!("{blob}{suffix}"))).unwrap();
        assert_eq!(text, suffix, "untouched");
    }
}

#[test]
fn s59_backends_parse_and_local_ones_read() {
    let dir = scratch();
    let image = Image::build(dir.path(), 1, 400_000, 64 << 10, "zstd").unwrap();
    let (_daemon, kata) = start(dir.path());
    let cache = dir.path().join("cache");
    fs::create_dir(dir.path().join("empty")).unwrap();
    let empty = dir.path().join("empty");
    let cases = [
        ("localfs", json!({"dir": image.blobs}), true),
        ("localfs", json!({"blob_file": image.blob()}), true),
        ("localfs", json!({"dir": empty, "alt_dirs": [empty, image.blobs]}), true),
        (
            "oss",
            json!({"endpoint": "oss.example.com", "bucket_name": "b", "object_prefix": "p/",
                "access_key_id": "i", "access_key_secret": "s"}),
            false,
        ),
        (
            "s3",
            json!({"region": "eu-1", "bucket_name": "b", "access_key_id": "i",
                "access_key_secret": "s"}),
            false,
        ),
        ("http-proxy", json!({"addr": "http://127.0.0.1:9", "path": "/x"}), false),
    ];
    let (_vm, mut fuse) = Vm::mounted(&dir.path().join("S"));
    for (i, (kind, own, reads)) in cases.into_iter().enumerate() {
        let config = json!({"device": {"id": "/3", "backend": {"type": kind, "config": own},
            "cache": {"type": "blobcache", "config": {"work_dir": cache.join(i.to_string())}}},
            "mode": "direct"});
        let answer = kata.mount("/m", &rafs(&image.bootstrap, &config.to_string()));
        assert_eq!(answer.status, 204, "{kind} {config}: {answer:?}");
        if reads {
            let node = fuse.resolve(b"/m/f0000").unwrap();
            image.check_file(&mut fuse, 0, node).unwrap();
        }
        assert_eq!(kata.umount("/m").status, 204);
    }
}

#[test]
fn s60_an_outage_gives_eio_and_passes() {
    let dir = scratch();
    let image = Image::build(dir.path(), 4, 400_000, 64 << 10, "none").unwrap();
    let server = FaultRegistry::start(&image.blobs).unwrap();
    let (_daemon, kata) = start_with(dir.path(), "10s");
    let config = registry(server.host(), &dir.path().join("cache"), json!({}));
    assert_eq!(kata.mount("/m", &rafs(&image.bootstrap, &config)).status, 204);
    let (_vm, mut fuse) = Vm::mounted(&dir.path().join("S"));
    let first = fuse.resolve(b"/m/f0000").unwrap();
    let last = fuse.resolve(b"/m/f0003").unwrap();
    image.check_file(&mut fuse, 0, first).unwrap();
    server.set(Fault::Status(503));
    assert_eq!(fuse.read(last, 0, 0, 10).unwrap_err().errno(), Some(libc::EIO));
    assert!(server.seen().iter().filter(|seen| seen.status == 503).count() > 1, "it tries again");
    image.check_file(&mut fuse, 0, first).unwrap();
    assert_eq!(kata.call("GET", "/api/v1/daemon", None).json()["state"], "RUNNING");
    let metrics = kata.call("GET", "/metrics", None).body;
    let errors: f64 = metrics
        .lines()
        .filter(|line| line.starts_with("rafsd_backend_errors_total{"))
        .map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap())
        .sum();
    assert!(errors > 0.0, "{metrics}");
    server.set(Fault::None);
    eventually("the backend is back", || image.check_file(&mut fuse, 3, last).is_ok());
}
