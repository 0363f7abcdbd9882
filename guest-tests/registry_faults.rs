//! What a guest reads while its registry fails: right bytes, or EIO by the deadline with the cause in
//! the log; never wrong bytes, and all is well again once the registry is.

mod support;

use std::collections::HashMap;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use support::fault_registry::{Auth, Fault, FaultRegistry, Redirect};
use support::rng::Rng;
use support::say;
use support::stage::{DEADLINE, PATIENT, SLACK, Stage, image, registry_at};

/// What the guest gets while a fault lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Right,
    /// EIO before the deadline: repeating is no use.
    AtOnce,
    /// EIO at the deadline.
    AtDeadline,
}

/// Every fault, for as long as it lasts: what the guest gets, what the log says why, and the `cause` under
/// which `/metrics` counts it.
const FAULTS: [(Fault, Outcome, &str, &str); 22] = [
    (Fault::Hang, Outcome::AtDeadline, "did not answer in 1000 ms", "timeout"),
    (Fault::HangMidBody, Outcome::AtDeadline, "did not answer in 1000 ms", "timeout"),
    (Fault::ResetMidBody, Outcome::AtDeadline, "broke off", "broken"),
    (Fault::Truncate, Outcome::AtDeadline, "broke off", "broken"),
    (Fault::ResetAtOnce, Outcome::AtDeadline, "the request failed", "broken"),
    (Fault::WrongBytes, Outcome::AtOnce, "do not match the digest", ""),
    (Fault::WrongRange, Outcome::AtDeadline, "in place of", "protocol"),
    (Fault::NoContentRange, Outcome::AtDeadline, "without saying which", "protocol"),
    (Fault::WholeBlob, Outcome::Right, "sends whole blobs", ""),
    (Fault::Status(401), Outcome::AtOnce, "denies access", "denied"),
    (Fault::Status(403), Outcome::AtOnce, "denies access: HTTP status 403: on command", "denied"),
    (Fault::Status(404), Outcome::AtOnce, "has no blob", "not_found"),
    (Fault::Status(416), Outcome::AtOnce, "were asked for", "out_of_range"),
    (
        Fault::RetryAfter(429, 1),
        Outcome::AtDeadline,
        "429, too many requests, asks to wait 1 s",
        "throttled",
    ),
    (Fault::RetryAfter(429, 3600), Outcome::AtOnce, "asks to wait 3600 s", "throttled"),
    (
        Fault::RetryAfter(503, u64::MAX),
        Outcome::AtOnce,
        "asks to wait 18446744073709551615 s",
        "server",
    ),
    (Fault::Status(500), Outcome::AtDeadline, "HTTP status 500", "server"),
    (Fault::Status(503), Outcome::AtDeadline, "HTTP status 503", "server"),
    (Fault::Status(204), Outcome::AtDeadline, "HTTP status 204", "protocol"),
    (Fault::RedirectLoop, Outcome::AtDeadline, "more than 5 redirects", "protocol"),
    (Fault::SlowLoris, Outcome::AtDeadline, " bytes in ", "timeout"),
    (Fault::Garbage, Outcome::AtDeadline, "invalid HTTP version", "broken"),
];

#[test]
fn a_fault_that_lasts_gives_right_bytes_or_eio_with_the_cause_and_leaves_nothing_behind() {
    let (scratch, image) = image(12);
    let registry = FaultRegistry::start(&image.blobs).expect("a registry");
    let mut stage = Stage::set(registry_at(registry.host(), json!({})), scratch, image);
    let warm = stage.cold();
    stage.read(warm, "the first read").expect("all is well");
    for (fault, outcome, cause, label) in FAULTS {
        let what = format!("{fault:?}");
        stage.new_log();
        let metric = match fault {
            Fault::WrongBytes => "rafsd_digest_mismatches_total".to_owned(),
            _ => format!("rafsd_backend_errors_total{{cause=\"{label}\"}}"),
        };
        let counted = stage.metric(&metric);
        registry.set(fault);
        let place = stage.cold();
        let begin = Instant::now();
        let mut got = stage.read(place, &what);
        if outcome == Outcome::Right && got.is_err() {
            // On a busy machine it may take longer than a read waits.
            got = stage.read(place, &what);
        }
        let took = begin.elapsed();
        say(format!("{what}: {got:?} after {took:?}"));
        match outcome {
            Outcome::Right => assert_eq!(got, Ok(()), "{what}"),
            Outcome::AtOnce | Outcome::AtDeadline => {
                assert_eq!(got, Err(libc::EIO), "{what}");
                assert!(took < DEADLINE + SLACK, "{what}: took {took:?}");
            }
        }
        if outcome == Outcome::AtDeadline {
            assert!(took > DEADLINE / 2, "{what}: given up after {took:?}");
        }
        stage.expect_log(cause);
        assert!(outcome == Outcome::Right || stage.metric(&metric) > counted, "{what}: {metric}");
        stage.read(warm, &what).expect("what is there is served");
        registry.set(Fault::None);
        stage.recovers(place, &what);
    }
}

#[test]
fn a_fault_that_passes_is_not_noticed() {
    let (scratch, image) = image(12);
    let registry = FaultRegistry::start(&image.blobs).expect("a registry");
    let mut stage =
        Stage::set_with(PATIENT, registry_at(registry.host(), json!({})), scratch, image);
    for (fault, _, cause, _) in FAULTS {
        let for_good = matches!(fault, Fault::Status(401..=416) | Fault::RetryAfter(_, 3600..));
        if for_good || fault == Fault::WholeBlob {
            continue;
        }
        stage.new_log();
        registry.set_next(fault, 1);
        stage.read_right(&format!("{fault:?}, once"));
        if !matches!(fault, Fault::WrongBytes | Fault::RedirectLoop) {
            stage.expect_log(cause);
        }
    }
}

#[test]
fn a_slow_line_is_no_fault() {
    let (scratch, image) = image(4);
    let registry = FaultRegistry::start(&image.blobs).expect("a registry");
    let timeouts = json!({ "timeout": 5, "connect_timeout": 5 });
    let backend = registry_at(registry.host(), timeouts);
    let mut stage = Stage::set_with(PATIENT, backend, scratch, image);
    stage.read_right("all is well");
    registry.link(Duration::from_millis(300), None);
    stage.read_right("with 300 ms of latency");
    registry.link(Duration::ZERO, Some(10 << 10));
    stage.read_right("with 10 KiB/s: a chunk takes longer than the time for an answer");
    assert!(!stage.new_log().contains("WARN"), "nothing to warn about");
}

/// Whatever happens, in whatever order and while many wait: right bytes or EIO, each in time.
#[test]
fn faults_that_come_and_go_under_load_never_give_wrong_bytes() {
    const READS: usize = 600;
    let (scratch, image) = image(48);
    let registry = FaultRegistry::start(&image.blobs).expect("a registry");
    let other = FaultRegistry::start(&image.blobs).expect("another");
    let mirrors = json!([{ "host": other.url(), "health_check_interval": 1, "failure_limit": 3 }]);
    let backend = registry_at(registry.host(), json!({ "mirrors": mirrors }));
    let mut stage = Stage::set(backend, scratch, image);
    let stop = AtomicBool::new(false);
    let (mut right, mut failed) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut rng = Rng::new(7);
            let mut choose = || {
                let pick = support::to_usize(rng.next() % (2 * FAULTS.len() as u64));
                match FAULTS.get(pick) {
                    // For a while a mirror would not be asked again.
                    None | Some((Fault::Status(404), ..)) => Fault::None,
                    Some((fault, ..)) => *fault,
                }
            };
            while !stop.load(Ordering::Relaxed) {
                registry.set(choose());
                other.set(choose());
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        let mut waiting = HashMap::new();
        let mut sent = 0;
        while right + failed < READS {
            while sent < READS && waiting.len() < 32 {
                // Each chunk is asked for twice in a row, from different places.
                let place = if sent % 2 == 0 { stage.cold() } else { stage.neighbour() };
                let ticket = stage.submit(place).expect("room in the ring");
                waiting.insert(ticket, (place, Instant::now()));
                sent += 1;
            }
            stage.fuse.flush();
            let reply = stage.fuse.complete(Instant::now() + DEADLINE + SLACK).expect("an answer");
            let (place, begin) = waiting.remove(&reply.ticket).expect("one that waits");
            let took = begin.elapsed();
            assert!(took < DEADLINE + SLACK, "{place:?} took {took:?}");
            match reply.errno {
                0 => {
                    stage.check(place, &reply.bytes(), "under load");
                    right += 1;
                }
                libc::EIO => failed += 1,
                other => panic!("{place:?}: errno {other}"),
            }
            stage.fuse.recycle(reply);
        }
        stop.store(true, Ordering::Relaxed);
    });
    let met = registry.faults_met() + other.faults_met();
    say(format!("{right} reads right, {failed} failed with EIO; {met} requests met a fault"));
    assert!(met > 10, "faults were met: {met}");
    assert!(right > READS / 2, "most reads find a source that is well: {right}");
    registry.set(Fault::None);
    other.set(Fault::None);
    for _ in 0..4 {
        let place = stage.cold();
        stage.recovers(place, "all is well again");
    }
}

#[test]
fn tokens_that_expire_all_the_time_are_replaced() {
    let (scratch, image) = image(4);
    let registry = FaultRegistry::start(&image.blobs).expect("a registry");
    let user = Some(("u".to_owned(), "p".to_owned()));
    registry.set_auth(Auth::Bearer { user, uses: 3 });
    let keys = json!({ "auth": "dTpw", "timeout": 20, "connect_timeout": 20 });
    let backend = registry_at(registry.host(), keys);
    let mut stage = Stage::set_with(Duration::from_secs(10), backend, scratch, image);
    for _ in 0..20 {
        stage.read_right("with tokens that are good for three requests");
    }
    let tokens = registry.seen().iter().filter(|s| s.target.starts_with("/token")).count();
    assert!((6..=12).contains(&tokens), "{tokens} tokens for 21 requests or so");
    let log = stage.new_log();
    assert!(!log.contains("dTpw") && !log.contains("token-"), "a secret in the log: {log}");
    let connections = registry.connections();
    assert!(connections <= 3, "{connections} connections for one read after the other");
    registry.set_token_fault(Fault::Status(503));
    registry.set_auth(Auth::Bearer { user: None, uses: 3 });
    let place = stage.cold();
    assert_eq!(stage.read(place, "without a token service"), Err(libc::EIO));
    stage.expect_log("HTTP status 503");
    registry.set_token_fault(Fault::None);
    stage.recovers(place, "with a token service");
}

#[test]
fn redirects_are_followed_kept_and_asked_for_again() {
    let (scratch, image) = image(4);
    let registry = FaultRegistry::start(&image.blobs).expect("a registry");
    let store = FaultRegistry::start(&image.blobs).expect("an object store");
    registry.set_auth(Auth::Basic { user: "u".into(), password: "p".into() });
    // The store knows the signatures of its own redirects only, so it makes them itself.
    registry.set_redirect(Redirect::To(store.url()));
    store.accept_signatures();
    let keys = json!({ "auth": "dTpw", "timeout": 20, "connect_timeout": 20 });
    let mut stage = Stage::set_with(PATIENT, registry_at(registry.host(), keys), scratch, image);
    for _ in 0..4 {
        stage.read_right("from the store");
    }
    let (asked, _) = registry.served();
    let (gave, _) = store.served();
    assert!(asked <= 3 && gave >= 4, "{asked} questions, {gave} answers from the store");
    let leaked = store.seen().into_iter().find(|s| s.headers.contains_key("authorization"));
    assert!(leaked.is_none(), "credentials sent along: {leaked:?}");
    store.set_next(Fault::Status(403), 1);
    stage.read_right("from an address that has expired");
    let (again, _) = registry.served();
    assert!(again > asked, "the registry is asked where the blob is now");
    store.set(Fault::Status(403));
    let place = stage.cold();
    assert_eq!(stage.read(place, "refused everywhere"), Err(libc::EIO));
    store.set(Fault::None);
    stage.recovers(place, "the store is well again");
}

/// The registry of these tests does what its faults say, seen with nothing but a socket.
#[test]
fn each_fault_looks_on_the_wire_as_it_should() {
    let blobs = tempfile::tempdir().expect("a directory");
    let id = "ab".repeat(32);
    fs::write(blobs.path().join(&id), b"0123456789").expect("a blob");
    let registry = FaultRegistry::start(blobs.path()).expect("a registry");
    let ask = || {
        let mut stream = TcpStream::connect(registry.addr()).expect("it listens");
        stream.set_read_timeout(Some(PATIENT)).expect("a time limit");
        let request = format!("GET /v2/r/blobs/sha256:{id} HTTP/1.1\r\nRange: bytes=2-5\r\n\r\n");
        stream.write_all(request.as_bytes()).expect("it reads");
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let end = stream.read_to_end(&mut answer);
        let text = String::from_utf8_lossy(&answer).into_owned();
        (text, end.err().map(|e| e.kind()))
    };
    use std::io::ErrorKind::ConnectionReset;
    // (fault, start, end, how the stream ends)
    let cases = [
        (Fault::None, "HTTP/1.1 206 X", "\r\n\r\n2345", None),
        (Fault::Hang, "", "", None),
        (Fault::HangMidBody, "HTTP/1.1 206 X", "\r\n\r\n23", None),
        (Fault::ResetMidBody, "HTTP/1.1 206 X", "\r\n\r\n23", Some(ConnectionReset)),
        (Fault::Truncate, "HTTP/1.1 206 X", "\r\n\r\n23", None),
        (Fault::ResetAtOnce, "", "", Some(ConnectionReset)),
        (Fault::WrongBytes, "HTTP/1.1 206 X", "\r\n\r\ngfa`", None),
        (Fault::WrongRange, "HTTP/1.1 206 X", "Content-Range: bytes 0-3/10\r\n\r\n0123", None),
        (Fault::NoContentRange, "HTTP/1.1 206 X\r\nContent-Length: 4\r\n\r\n", "2345", None),
        (Fault::WholeBlob, "HTTP/1.1 200 X", "\r\n\r\n0123456789", None),
        (Fault::Status(503), "HTTP/1.1 503 X", "on command\n", None),
        (Fault::RetryAfter(429, 7), "HTTP/1.1 429 X", "Retry-After: 7\r\n\r\non command\n", None),
        (Fault::RedirectLoop, "HTTP/1.1 307 X", &format!("/sha256:{id}\r\n\r\n"), None),
        (Fault::SlowLoris, "HTTP/1.1 206 X", "\r\n\r\n2345", None),
        (Fault::Garbage, "this is", "looking for\n\n", None),
    ];
    for (fault, start, end, stops) in cases {
        registry.set(fault);
        let begin = Instant::now();
        let (answer, error) = ask();
        assert!(answer.starts_with(start), "{fault:?}: {answer:?}");
        if fault == Fault::SlowLoris {
            assert!(begin.elapsed() >= 4 * Duration::from_millis(200), "byte by byte");
        }
        assert!(answer.ends_with(end), "{fault:?}: {answer:?}");
        assert_eq!(error, stops, "{fault:?}: {answer:?}");
    }
    registry.set_next(Fault::Status(500), 1);
    assert!(ask().0.starts_with("HTTP/1.1 500"), "hit once");
    assert!(ask().0.starts_with("HTTP/1.1 206"), "and no more");
}
