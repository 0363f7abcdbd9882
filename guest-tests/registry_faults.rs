//! What a guest reads while its registry fails: right bytes, or EIO by the deadline with the cause in
//! the log; never wrong bytes, and all is well again once the registry is.

mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use support::fault_registry::{Fault, FaultRegistry};

/// The registry of these tests does what its faults say, seen with nothing but a socket.
#[test]
fn each_fault_looks_on_the_wire_as_it_should() {
    let blobs = tempfile::tempdir().expect("a directory");
    let id = "ab".repeat(32);
    fs::write(blobs.path().join(&id), b"0123456789").expect("a blob");
    let registry = FaultRegistry::start(blobs.path()).expect("a registry");
    let ask = || {
        let mut stream = TcpStream::connect(registry.addr()).expect("it listens");
        stream.set_read_timeout(Some(Duration::from_millis(500))).expect("a time limit");
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
