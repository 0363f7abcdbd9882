//! Where blobs come from, beside files: real registries with each kind of access, object stores, plain
//! servers, OCI layouts, and what is asked before them: mirrors and proxies.

mod support;

use std::fs;
use std::net::{Ipv6Addr, SocketAddr};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use reqwest::header::LOCATION;
use serde_json::json;
use support::daemon::Launch;
use support::fault_registry::{BlackHole, Fault, FaultRegistry, Redirect};
use support::frontend::VmConfig;
use support::golden::{self, How};
use support::parts::{Parts, run};
use support::registry::{Registry, Setup};
use support::stage::{DEADLINE, PATIENT, Stage, image, registry_at};

/// Uploads the files in `blobs`, named by their SHA-256, into repository `repo` of a real registry.
fn upload(registry: &Registry, user: Option<(&str, &str)>, repo: &str, blobs: &Path) {
    rustls::crypto::ring::default_provider().install_default().ok();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let client = reqwest::Client::builder()
            .tls_danger_accept_invalid_certs(true)
            .no_proxy()
            .build()
            .expect("a client");
        let base = format!("{}://{}", registry.scheme(), registry.host());
        for file in fs::read_dir(blobs).expect("a directory").map(|f| f.expect("readable").path()) {
            let id = file.file_name().and_then(|n| n.to_str()).expect("a name").to_owned();
            let send = async |request: reqwest::RequestBuilder| {
                let request = match user {
                    Some((name, password)) => request.basic_auth(name, Some(password)),
                    None => request,
                };
                let answer = request.send().await.expect("an answer");
                assert!(answer.status().is_success(), "{answer:?}");
                answer
            };
            let begun = send(client.post(format!("{base}/v2/{repo}/blobs/uploads/"))).await;
            let location = begun.headers()[LOCATION].to_str().expect("an address").to_owned();
            let mark = if location.contains('?') { '&' } else { '?' };
            let put = client.put(format!("{location}{mark}digest=sha256:{id}"));
            send(put.body(fs::read(&file).expect("a blob"))).await;
        }
    });
}

/// A guest reads all of a golden image and finds what `tree.json` says.
fn reads_as_written(case: &golden::Case, launch: &Launch, context: &str) -> String {
    let daemon = launch.spawn().unwrap_or_else(|e| panic!("{context}: {e}"));
    let mut vm = daemon.boot(VmConfig::default()).expect("a guest");
    let mut fuse = vm.fuse(1);
    fuse.init().expect("INIT");
    let found = golden::check(&mut fuse, &case.tree(), How::ReaddirPlus, 128 << 10);
    found.unwrap_or_else(|e| panic!("{context}: {e:?}\n{}", daemon.log())).assert_none(context);
    daemon.log()
}

/// The only file of a directory.
fn only_file(dir: &Path) -> String {
    let mut files = fs::read_dir(dir).expect("a directory");
    let file = files.next().expect("a file").expect("readable").file_name();
    assert!(files.next().is_none(), "{} has one file", dir.display());
    file.into_string().expect("a name")
}

#[test]
fn golden_images_come_from_a_real_registry_with_each_kind_of_access() {
    let (user, password) = ("someone", "s3cret-word");
    let plain = Registry::plain().expect("a registry");
    let closed = Registry::with_htpasswd(user, password).expect("a registry for one user");
    let user_and_tls = Some((user.to_owned(), password.to_owned()));
    let secure =
        Registry::start(Setup { user: user_and_tls, tls: true }).expect("a registry with TLS");
    let auth = base64_of(&format!("{user}:{password}"));
    for name in ["v6-oci-packed", "v6-merged"] {
        let case = golden::case(name);
        upload(&plain, None, "a/b", &case.blobs);
        for registry in [&closed, &secure] {
            upload(registry, Some((user, password)), "a/b", &case.blobs);
        }
        let ca = json!([secure.ca()]);
        type Change<'a> = &'a dyn Fn(Launch) -> Launch;
        let as_is: Change = &|launch| launch;
        let from_file: Change = &|launch| launch.env("DOCKER_CONFIG", closed.docker_config());
        let from_env: Change = &|launch| launch.env("IMAGE_PULL_AUTH", &auth);
        // (what, registry, keys, what else)
        let cases = [
            ("plain", &plain, json!({}), as_is),
            ("auth", &closed, json!({ "auth": auth }), as_is),
            ("~/.docker/config.json", &closed, json!({}), from_file),
            ("IMAGE_PULL_AUTH", &closed, json!({ "auth": "d3Jvbmc6d3Jvbmc=" }), from_env),
            ("TLS with its CA", &secure, json!({ "auth": auth, "ca_cert_files": ca }), as_is),
            ("TLS unverified", &secure, json!({ "auth": auth, "skip_verify": true }), as_is),
            (
                "no TLS where TLS is said",
                &plain,
                json!({ "scheme": "https", "skip_verify": true }),
                as_is,
            ),
        ];
        for (what, registry, mut keys, change) in cases {
            let context = format!("{name}, {what}");
            let scratch = tempfile::tempdir().expect("a directory");
            if name == "v6-oci-packed" {
                keys["blob_id"] = only_file(&case.blobs).into();
            }
            if keys.get("scheme").is_none() {
                keys["scheme"] = registry.scheme().into();
            }
            keys["repo"] = "a/b".into();
            let backend = registry_at(&registry.host(), keys);
            let launch = Launch::new(&case.bootstrap, &case.blobs, scratch.path());
            let launch = change(launch.backend("registry", backend));
            let launch = launch.env("HOME", scratch.path());
            let log = reads_as_written(&case, &launch, &context);
            assert!(!log.contains(password) && !log.contains(&auth), "{context}: a secret: {log}");
        }
    }
    let log = fs::read_to_string(secure.dir().join("access.log")).expect("an access log");
    assert!(log.contains("HTTP/2.0\" 206"), "TLS with HTTP/2: {log}");
}

#[test]
fn a_registry_that_may_not_be_trusted_or_entered_is_an_error_with_its_reason() {
    let secure = Registry::with_tls().expect("a registry with TLS");
    let closed = Registry::with_htpasswd("someone", "right").expect("a registry for one user");
    let (scratch, image) = image(2);
    let wrong = base64_of("someone:wr0ng");
    let cases = [
        (&secure, json!({ "scheme": "https" }), "UnknownIssuer"),
        (&closed, json!({}), "wants a user and a password, none are configured"),
        (
            &closed,
            json!({ "auth": wrong }),
            "denies access: HTTP status 401: authentication required",
        ),
        (&closed, json!({ "registry_token": "t0ken" }), "the token that was configured is refused"),
    ];
    for (i, (registry, keys, reason)) in cases.into_iter().enumerate() {
        let launch = image.launch(scratch.path()).named(&format!("d{i}"));
        let launch = launch.backend("registry", registry_at(&registry.host(), keys));
        let launch = launch.read_timeout(DEADLINE).env("HOME", scratch.path());
        let daemon = launch.spawn().expect("a daemon");
        let mut vm = daemon.boot(VmConfig::default()).expect("a guest");
        let mut fuse = vm.fuse(1);
        fuse.init().expect("INIT");
        let node = image.nodes(&mut fuse).expect("lookups")[0];
        let error = fuse.read(node, 0, 0, 4096).expect_err(reason);
        assert_eq!(error.errno(), Some(libc::EIO), "{reason}");
        daemon.expect_log(reason);
        let log = daemon.log();
        assert!(!log.contains("wr0ng") && !log.contains(&wrong) && !log.contains("t0ken"), "{log}");
    }
}

#[test]
fn mirrors_are_asked_in_order_and_left_out_while_they_fail() {
    let (scratch, image) = image(12);
    let start = || FaultRegistry::start(&image.blobs).expect("a registry");
    let (first, second, origin) = (start(), start(), start());
    let hole = BlackHole::dig(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a black hole");
    let mirrors = json!([
        { "host": format!("http://{}", hole.addr), "health_check_interval": 60 },
        { "host": first.url(), "headers": {"X-Registry": "of the operator"},
            "health_check_interval": 1, "failure_limit": 2 },
        { "host": format!("{}/prefix", second.url()), "ping_url": format!("{}/ping", second.url()),
            "health_check_interval": 1, "failure_limit": 1 },
    ]);
    let keys = json!({ "mirrors": mirrors, "timeout": 20, "connect_timeout": 3 });
    let mut stage = Stage::set_with(PATIENT, registry_at(origin.host(), keys), scratch, image);
    let count = || [first.served().0, second.served().0, origin.served().0];

    stage.read_right("past a mirror that does not answer");
    stage.expect_log("is left out for now");
    let begin = Instant::now();
    for _ in 0..8 {
        stage.read_right("from the first mirror that is well");
    }
    assert!(begin.elapsed() < Duration::from_secs(20), "the black hole costs one timeout");
    let [at_first, 0, 0] = count() else { panic!("others were asked: {:?}", count()) };
    assert!(at_first >= 9);
    let seen = first.seen();
    let seen = seen.iter().find(|seen| seen.is_blob()).expect("a request");
    assert_eq!(seen.headers.get("x-registry").map(String::as_str), Some("of the operator"));

    first.set(Fault::Status(500));
    for _ in 0..3 {
        stage.read_right("from the second mirror");
    }
    let [tried, at_second, 0] = count() else { panic!("the origin was asked: {:?}", count()) };
    assert!(tried <= at_first + 3 && at_second >= 3, "tried twice, or thrice after a pause");
    assert!(second.seen().iter().any(|seen| seen.target.starts_with("/prefix/v2/r/blobs/")));

    first.set(Fault::None);
    let (before, limit) = (count(), Instant::now() + PATIENT);
    while count()[0] == before[0] {
        assert!(Instant::now() < limit, "a trial brings it back: {before:?} {:?}", count());
        std::thread::sleep(Duration::from_millis(700));
        stage.read_right("from one of the mirrors");
    }
    let before = count();
    stage.read_right("from the first mirror again");
    assert_eq!(count(), [before[0] + 1, before[1], 0]);

    first.set(Fault::Status(404));
    second.set(Fault::Status(404));
    stage.read_right("from the origin, as no mirror has the blob");
    let [a, b, 1] = count() else { panic!("{:?}", count()) };
    stage.read_right("which is remembered");
    assert_eq!(count(), [a, b, 2], "mirrors without the blob are not asked again at once");
}

#[test]
fn a_mirror_that_gives_wrong_bytes_is_not_asked_for_the_blob_again() {
    let (scratch, image) = image(4);
    let start = || FaultRegistry::start(&image.blobs).expect("a registry");
    let (liar, second_liar, origin) = (start(), start(), start());
    liar.set(Fault::WrongBytes);
    second_liar.set(Fault::WrongBytes);
    let mirrors = json!([{ "host": liar.url() }, { "host": second_liar.url() }]);
    let keys = json!({ "mirrors": mirrors, "timeout": 20, "connect_timeout": 20 });
    let backend = registry_at(origin.host(), keys);
    let mut stage = Stage::set_with(Duration::from_secs(10), backend, scratch, image);
    for _ in 0..4 {
        stage.read_right("from the origin");
    }
    stage.expect_log("gave wrong bytes");
    // While the origin fails, liars are not worth asking.
    origin.set(Fault::Status(503));
    let place = stage.cold();
    assert_eq!(stage.read(place, "only liars answer"), Err(libc::EIO));
    origin.set(Fault::None);
    stage.recovers(place, "the origin is well");
    let (lies, more_lies) = (liar.served().0, second_liar.served().0);
    assert!(lies <= 2 && more_lies <= 2, "asked {lies} and {more_lies} times, of 5 reads or so");
}

#[test]
fn a_proxy_is_asked_first_and_passed_over_while_it_fails() {
    let (scratch, image) = image(16);
    let proxy = FaultRegistry::start(&image.blobs).expect("a proxy");
    let origin = FaultRegistry::start(&image.blobs).expect("a registry");
    let settings = json!({ "url": proxy.url(), "ping_url": format!("{}/ping", proxy.url()),
        "check_interval": 1 });
    let keys = json!({ "proxy": settings, "timeout": 3, "connect_timeout": 3 });
    let mut stage = Stage::set_with(PATIENT, registry_at(origin.host(), keys), scratch, image);
    stage.read_right("through the proxy");
    let seen = proxy.seen();
    let seen = seen.iter().find(|seen| seen.is_blob()).expect("the proxy was asked");
    let url = format!("http://{}/v2/r/blobs/", origin.host());
    assert!(seen.target.starts_with(&url), "a proxy is sent whole addresses: {}", seen.target);
    assert_eq!(origin.served().0, 0);
    proxy.set(Fault::Hang);
    stage.read_right("past a proxy that hangs");
    let (begin, before) = (Instant::now(), proxy.faults_met());
    for _ in 0..3 {
        stage.read_right("past the proxy, at once");
    }
    let asked = proxy.faults_met() - before;
    assert!(asked <= 1 + begin.elapsed().as_secs(), "asked {asked} times more, pings included");
    proxy.set(Fault::None);
    let limit = Instant::now() + PATIENT;
    let before = proxy.served().0;
    while proxy.served().0 == before {
        assert!(Instant::now() < limit, "the proxy is not used again: {}", stage.new_log());
        std::thread::sleep(Duration::from_millis(700));
        stage.read_right("through the proxy again, once a ping says so");
    }
}

#[test]
fn mirrors_and_the_proxy_change_while_a_guest_reads() {
    let (scratch, image) = image(8);
    let start = || FaultRegistry::start(&image.blobs).expect("a registry");
    let (origin, mirror, proxy) = (start(), start(), start());
    let keys = json!({ "readahead": false, "timeout": 20, "connect_timeout": 20 });
    let mut stage = Stage::set_with(PATIENT, registry_at(origin.host(), keys), scratch, image);
    let put = |stage: &Stage, body: serde_json::Value| {
        stage.call("PUT", "/api/v1/config", &body.to_string())
    };
    stage.read_right("from the origin");
    assert_eq!(put(&stage, json!({ "mirrors": mirror.url() })).0, 204);
    let before = origin.served().0;
    stage.read_right("from the mirror");
    assert_eq!((origin.served().0, mirror.served().0), (before, 1));
    assert_eq!(put(&stage, json!({ "proxy_url": proxy.url(), "mirrors": "" })).0, 204);
    stage.read_right("from the proxy");
    assert_eq!((mirror.served().0, proxy.served().0), (1, 1));
    let (status, body) = put(&stage, json!({ "proxy_url": "", "mirrors": "S3CRET" }));
    assert!(status >= 400 && body.contains("mirrors") && !body.contains("S3CRET"), "{body}");
    stage.read_right("from the proxy still: all of a change or nothing");
    assert_eq!(proxy.served().0, 2);
    let (_, shown) = stage.call("GET", "/api/v1/config", "");
    assert!(shown.contains(&proxy.url()), "{shown}");
    let bytes = format!("rafsd_source_read_bytes_total{{source=\"mirror {}\"}}", mirror.url());
    assert!(stage.metric(&bytes) > 0, "what a mirror gave that is no more still counts");
}

#[test]
fn a_proxy_without_fallback_is_the_only_way_and_sees_https_as_http_if_it_should() {
    let (scratch, image) = image(2);
    let proxy = FaultRegistry::start(&image.blobs).expect("a proxy");
    let settings = json!({ "url": proxy.url(), "fallback": false, "use_http": true });
    // No such host: only the proxy knows the way.
    let keys = json!({ "scheme": "https", "proxy": settings });
    let mut stage = Stage::set(registry_at("r.invalid", keys), scratch, image);
    stage.read_right("through the proxy");
    let seen = proxy.seen();
    let target = &seen.iter().find(|seen| seen.is_blob()).expect("a request").target;
    assert!(target.starts_with("http://r.invalid/v2/r/blobs/"), "{target}");
    proxy.set(Fault::Status(502));
    let place = stage.cold();
    assert_eq!(stage.read(place, "the proxy fails"), Err(libc::EIO));
    stage.expect_log("HTTP status 502");
    proxy.set(Fault::None);
    stage.recovers(place, "the proxy is well");
}

#[test]
fn what_to_do_while_nothing_answers_is_the_operator_s_choice() {
    // At once, after so many repetitions.
    let (scratch, image_1) = image(2);
    let registry = FaultRegistry::start(&image_1.blobs).expect("a registry");
    let keys = json!({ "on_outage": "fail", "retry_limit": 2, "timeout": 20 });
    let mut stage = Stage::set_with(PATIENT, registry_at(registry.host(), keys), scratch, image_1);
    stage.read_right("all is well");
    registry.set(Fault::Status(503));
    registry.forget_seen();
    let place = stage.cold();
    let begin = Instant::now();
    assert_eq!(stage.read(place, "fail"), Err(libc::EIO));
    assert!(begin.elapsed() < PATIENT, "before the deadline");
    assert_eq!(registry.served().0, 3, "asked once and repeated twice");
    drop(stage);

    // For as long as it takes, also past the time limit of reads.
    let (scratch, image_2) = image(2);
    let registry = FaultRegistry::start(&image_2.blobs).expect("a registry");
    let keys = json!({ "on_outage": "wait" });
    let mut stage = Stage::set(registry_at(registry.host(), keys), scratch, image_2);
    stage.read_right("all is well");
    for fault in [Fault::Status(503), Fault::Status(403), Fault::Hang] {
        registry.set(fault);
        let place = stage.cold();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(DEADLINE + Duration::from_secs(1));
                registry.set(Fault::None);
            });
            stage.read(place, "wait").unwrap_or_else(|e| panic!("{fault:?}: errno {e}"));
        });
    }
}

#[test]
fn redirects_go_where_the_operator_says_and_relative_ones_are_understood() {
    let (scratch, image) = image(2);
    let registry = FaultRegistry::start(&image.blobs).expect("a registry");
    let store = FaultRegistry::start(&image.blobs).expect("an object store");
    store.accept_signatures();
    registry.set_redirect(Redirect::To("https://internal.invalid:1".into()));
    let keys = json!({ "blob_url_scheme": "http", "blob_redirected_host": store.host() });
    let mut stage = Stage::set_with(PATIENT, registry_at(registry.host(), keys), scratch, image);
    stage.read_right("from the host that is reachable");
    assert!(store.served().0 > 0);
    assert!(!stage.new_log().contains("signature="), "queries stay out of the log");
    let asked = store.served().0;
    registry.set_redirect(Redirect::Relative);
    store.set(Fault::Status(403));
    stage.read_right("from an address that is relative");
    assert!(registry.seen().iter().any(|seen| seen.target.starts_with("/store/")));
    assert_eq!(store.served().0, asked + 1, "the address that had expired");
}

#[test]
fn a_name_with_a_dead_address_is_reached_by_the_other() {
    let (scratch, image) = image(2);
    let registry = FaultRegistry::start(&image.blobs).expect("a registry");
    let dead = SocketAddr::from((Ipv6Addr::LOCALHOST, registry.addr().port()));
    let hole = BlackHole::dig(dead).expect("an IPv6 address that does not answer");
    // A name with both addresses, for the daemon alone.
    let hosts = scratch.path().join("hosts");
    fs::write(&hosts, "::1 two.test\n127.0.0.1 two.test\n").expect("a file");
    let program = scratch.path().join("rafsd-with-hosts");
    let script = format!(
        "#!/bin/sh\nexec unshare -m sh -c 'mount --bind {} /etc/hosts && exec \"$0\" \"$@\"' {} \"$@\"\n",
        hosts.display(),
        env!("CARGO_BIN_EXE_rafsd")
    );
    fs::write(&program, script).expect("a script");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(&program, mode).expect("its mode");
    let host = format!("two.test:{}", registry.addr().port());
    let mut launch =
        image.launch(scratch.path()).backend("registry", registry_at(&host, json!({})));
    launch.program = program;
    let mut stage = Stage::launch(&launch.read_timeout(PATIENT), scratch, image);
    stage.read_right("by IPv4");
    drop(hole);
}

#[test]
fn plain_servers_are_read_over_tcp_and_unix_sockets() {
    let (scratch, image) = image(2);
    let server = FaultRegistry::start(&image.blobs).expect("a server");
    let tcp = json!({ "addr": format!("{}/base", server.url()), "path": "/some/where/" });
    let launch = image.launch(scratch.path()).backend("http-proxy", tcp);
    let mut stage = Stage::launch(&launch, scratch, image.clone());
    stage.read_right("over TCP");
    let seen = server.seen();
    assert!(seen[0].target.starts_with("/base/some/where/"), "{}", seen[0].target);
    let Stage { scratch, daemon, .. } = stage;
    drop(daemon);

    let path = scratch.path().join("server.sock");
    let listener = UnixListener::bind(&path).expect("a socket");
    let addr = server.addr();
    std::thread::spawn(move || {
        // Each connection is handed on to the server's port.
        for stream in listener.incoming().flatten() {
            let Ok(server) = std::net::TcpStream::connect(addr) else { return };
            let copies = [
                (stream.try_clone().map(Io::Unix), server.try_clone().map(Io::Tcp)),
                (Ok(Io::Tcp(server)).map_err(|e: std::io::Error| e), Ok(Io::Unix(stream))),
            ];
            for (from, to) in copies {
                let (Ok(mut from), Ok(mut to)) = (from, to) else { return };
                std::thread::spawn(move || std::io::copy(&mut from, &mut to));
            }
        }
    });
    let cache = scratch.path().join("another cache");
    let launch = image.launch(scratch.path()).named("unix").work_dir(&cache);
    let launch = launch.backend("http-proxy", json!({ "addr": path, "path": "x" }));
    let mut stage = Stage::launch(&launch, scratch, image);
    server.forget_seen();
    stage.read_right("over a unix socket");
    assert!(server.seen()[0].target.starts_with("/x/"));
}

/// One end of a connection, of either kind.
enum Io {
    Unix(std::os::unix::net::UnixStream),
    Tcp(std::net::TcpStream),
}

impl std::io::Read for Io {
    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Io::Unix(stream) => stream.read(bytes),
            Io::Tcp(stream) => stream.read(bytes),
        }
    }
}

impl std::io::Write for Io {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match self {
            Io::Unix(stream) => stream.write(bytes),
            Io::Tcp(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn an_oci_layout_needs_no_server_and_no_config() {
    let case = golden::case("v6-merged");
    let scratch = tempfile::tempdir().expect("a directory");
    let layout = scratch.path().join("layout");
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs).expect("a directory");
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).expect("a file");
    for blob in fs::read_dir(&case.blobs).expect("blobs").flatten() {
        fs::copy(blob.path(), blobs.join(blob.file_name())).expect("a copy");
    }
    let launch = Launch::new(&case.bootstrap, &case.blobs, scratch.path());
    let launch = launch.backend("oci", json!({ "dir": layout }));
    reads_as_written(&case, &launch, "with a config");

    // The bootstrap lies where no blobs are.
    let bootstrap = scratch.path().join("image.boot");
    fs::copy(&case.bootstrap, &bootstrap).expect("a copy");
    let sock = scratch.path().join("bare.sock");
    let mut command = Command::new(env!("CARGO_BIN_EXE_rafsd"));
    command.arg("virtiofs").arg("--sock").arg(&sock).arg("--bootstrap").arg(&bootstrap);
    command.arg("--localfs-dir").arg(&layout).env("XDG_CACHE_HOME", scratch.path().join("xdg"));
    let daemon = support::daemon::Daemon::spawn(command, &sock).expect("a daemon");
    let mut vm = daemon.boot(VmConfig::default()).expect("a guest");
    let mut fuse = vm.fuse(1);
    fuse.init().expect("INIT");
    let found = golden::check(&mut fuse, &case.tree(), How::Lookup, 64 << 10).expect("an answer");
    found.assert_none("without a config");

    let no_layout = launch.backend("oci", json!({ "dir": scratch.path() })).named("none");
    let (status, log) = no_layout.run_to_end().expect("an end");
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains("oci.dir: ") && log.contains("is not an OCI image layout"), "{log}");
}

#[test]
fn an_object_store_checks_our_signatures() {
    let (scratch, image) = image(2);
    let store = ObjectStore::start(scratch.path(), &image.blobs);
    let keys = |secret: &str| {
        json!({ "scheme": "http", "endpoint": store.host, "region": "eu-central-1", "timeout": 20,
            "connect_timeout": 20, "bucket_name": "bucket", "object_prefix": "some/prefix-",
            "access_key_id": store.key.0, "access_key_secret": secret })
    };
    let wrong = image.launch(scratch.path()).named("wrong").backend("s3", keys("wr0ng"));
    let (scratch_2, launch) = (
        tempfile::tempdir().expect("a directory"),
        image.launch(scratch.path()).backend("s3", keys(&store.key.1)),
    );
    let mut stage = Stage::launch(&launch, scratch_2, image.clone());
    stage.read_right("with the right key");
    assert!(!stage.new_log().contains(&store.key.1));
    drop(stage);
    let cache = scratch.path().join("another cache");
    let scratch_3 = tempfile::tempdir().expect("a directory");
    let mut stage = Stage::launch(&wrong.work_dir(&cache), scratch_3, image);
    let place = stage.cold();
    assert_eq!(stage.read(place, "with a wrong key"), Err(libc::EIO));
    stage.expect_log("denies access: HTTP status 403");
    assert!(!stage.new_log().contains("wr0ng"));
}

/// moto's S3, which checks signatures with the code of AWS's own client.
struct ObjectStore {
    child: Child,
    host: String,
    /// Id and secret of a key that may do everything.
    key: (String, String),
}

impl ObjectStore {
    /// Puts the files of `blobs` into `bucket`, as `some/prefix-NAME`.
    fn start(scratch: &Path, blobs: &Path) -> ObjectStore {
        let parts = Parts::install(&["moto"]).expect("moto");
        let python: PathBuf = parts.path("moto_python").expect("its interpreter");
        let path = scratch.join("moto.log");
        let log = fs::File::create(&path).expect("a log");
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(&python)
            .args(["-m", "moto.server", "-H", "127.0.0.1", "-p", "0"])
            // Making the user and the key is free, everything after that is checked.
            .env("INITIAL_NO_AUTH_ACTION_COUNT", "3")
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log"))
            .stderr(log)
            .spawn()
            .expect("moto starts");
        let mut store =
            ObjectStore { child, host: String::new(), key: (String::new(), String::new()) };
        let limit = Instant::now() + Duration::from_secs(120);
        while store.host.is_empty() {
            let said = fs::read_to_string(&path).expect("its log");
            assert!(Instant::now() < limit, "moto does not listen:\n{said}");
            // It says which port it has found as soon as it listens there.
            let line = said.lines().find_map(|line| line.split_once("Running on http://"));
            match line.filter(|_| said.ends_with('\n')) {
                Some((_, address)) => store.host = address.trim().to_owned(),
                None => std::thread::sleep(Duration::from_millis(50)),
            }
        }
        let script = format!("http://{}", store.host);
        let output = run(Command::new(&python)
            .args(["-c", FILL_STORE, &script])
            .arg(blobs)
            .arg("some/prefix-"))
        .unwrap_or_else(|e| panic!("{e:?}"));
        let output = String::from_utf8(output).expect("text");
        let (id, secret) = output.trim().split_once(' ').expect("a key");
        store.key = (id.to_owned(), secret.to_owned());
        store
    }
}

impl Drop for ObjectStore {
    fn drop(&mut self) {
        // An error means that it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Makes a user, a key and a bucket, and uploads a directory.
const FILL_STORE: &str = r#"
import json, os, sys
import boto3
endpoint, directory, prefix = sys.argv[1:]
common = dict(endpoint_url=endpoint, region_name="eu-central-1")
iam = boto3.client("iam", aws_access_key_id="x", aws_secret_access_key="y", **common)
iam.create_user(UserName="u")
everything = {"Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}
iam.put_user_policy(UserName="u", PolicyName="p", PolicyDocument=json.dumps(everything))
key = iam.create_access_key(UserName="u")["AccessKey"]
s3 = boto3.client("s3", aws_access_key_id=key["AccessKeyId"],
    aws_secret_access_key=key["SecretAccessKey"], **common)
s3.create_bucket(Bucket="bucket",
    CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
for name in os.listdir(directory):
    s3.upload_file(os.path.join(directory, name), "bucket", prefix + name)
print(key["AccessKeyId"], key["SecretAccessKey"])
"#;

#[test]
fn an_aliyun_bucket_is_the_first_part_of_the_host_and_requests_are_signed() {
    let (scratch, image) = image(2);
    // As a proxy it is sent the whole address, so that the host need not exist.
    let proxy = FaultRegistry::start(&image.blobs).expect("a proxy");
    let keys = json!({ "scheme": "http", "endpoint": "oss.invalid", "bucket_name": "bucket",
        "object_prefix": "p/", "access_key_id": "an-id", "access_key_secret": "a-s3cret",
        "proxy": { "url": proxy.url() } });
    let launch = image.launch(scratch.path()).backend("oss", keys);
    let mut stage = Stage::launch(&launch, scratch, image);
    stage.read_right("through the proxy");
    let seen = proxy.seen();
    let seen = seen.iter().find(|seen| seen.is_blob()).expect("a request");
    let id = seen.target.strip_prefix("http://bucket.oss.invalid/p/").expect("the address");
    let (date, shown) = (&seen.headers["date"], &seen.headers["authorization"]);
    // https://www.alibabacloud.com/help/en/oss/developer-reference/include-signatures-in-the-authorization-header
    let text = format!("GET\n\n\n{date}\n/bucket/p/{id}");
    let script = "import base64, hashlib, hmac, sys\nprint(base64.b64encode(hmac.new(\
                  sys.argv[1].encode(), sys.argv[2].encode(), hashlib.sha1).digest()).decode())";
    let parts = Parts::install(&["python"]);
    parts.expect("Python");
    let want = run(Command::new("python3").args(["-c", script, "a-s3cret", &text])).expect("a sum");
    let want = String::from_utf8(want).expect("text");
    assert_eq!(*shown, format!("OSS an-id:{}", want.trim()));
    assert!(!stage.new_log().contains("a-s3cret"));
}

#[test]
fn a_disk_with_partitions_is_read() {
    let (scratch, image) = image(2);
    let blob = image.blob();
    let id = blob.file_name().and_then(|name| name.to_str()).expect("an id").to_owned();
    let size = fs::metadata(&blob).expect("a blob").len().next_multiple_of(1 << 20);
    let disk = scratch.path().join("disk");
    fs::File::create(&disk).and_then(|file| file.set_len(size + (4 << 20))).expect("a disk");
    let (name, guid) = id.split_at(32);
    let mut table = gpt::GptConfig::new().writable(true).create(&disk).expect("a table");
    let kind = gpt::partition_types::LINUX_FS;
    table.add_partition_at(name, 1, 4096, size / 512, kind, 0).expect("a partition");
    let mut partitions = table.take_partitions();
    partitions.get_mut(&1).expect("it").part_guid = guid.parse().expect("32 digits");
    table.update_partitions(partitions).expect("a table");
    table.write().expect("a table on the disk");
    let file = fs::OpenOptions::new().write(true).open(&disk).expect("the disk");
    let bytes = fs::read(&blob).expect("the blob");
    std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 4096 * 512).expect("written");
    let launch = image.launch(scratch.path()).backend("localdisk", json!({ "device_path": disk }));
    let mut stage = Stage::launch(&launch, scratch, image);
    stage.read_right("from a partition");
}

fn base64_of(text: &str) -> String {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.encode(text)
}
