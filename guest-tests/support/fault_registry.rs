//! A registry that fails on command: HTTP/1.1 over plain TCP, one thread for each connection.
//!
//! It serves the files of one directory as blobs, by the last part of the path (`…/sha256:<id>` or
//! `…/<id>`), so that it also stands in for an object store, a mirror or a proxy that is sent whole
//! URLs. [`FaultRegistry::set`] says what goes wrong with requests for blobs and with pings,
//! [`FaultRegistry::link`] how slow the way to it is, [`FaultRegistry::set_auth`] and
//! [`FaultRegistry::set_redirect`] what a client has to go through. [`FaultRegistry::seen`] is what
//! was asked, in order. It speaks the wire by itself: resets, truncated bodies and single bytes
//! are what it is for, and an HTTP server library exists to prevent them.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::{to_u32, to_usize};

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing: the registry is well.
    None,
    /// Takes the request and never answers.
    Hang,
    /// Answers, sends half of the body and then nothing.
    HangMidBody,
    /// Sends half of the body, then resets the connection.
    ResetMidBody,
    /// Sends half of the body, then closes the connection in order.
    Truncate,
    /// Resets the connection in place of an answer.
    ResetAtOnce,
    /// All of the body, with every byte changed.
    WrongBytes,
    /// 206 with bytes, and a Content-Range, from elsewhere.
    WrongRange,
    /// 206 without a Content-Range.
    NoContentRange,
    /// 200 with the whole blob, as from a server that knows no ranges.
    WholeBlob,
    /// This status and a short body.
    Status(u16),
    /// This status, with `Retry-After` in seconds.
    RetryAfter(u16, u64),
    /// A redirect to itself, without end.
    RedirectLoop,
    /// The body, one byte each 200 ms.
    SlowLoris,
    /// What is no HTTP at all.
    Garbage,
}

/// What a client has to show for a blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Auth {
    None,
    Basic {
        user: String,
        password: String,
    },
    /// Tokens from `/token`, for anybody or for this user. Each is good for so many requests for
    /// blobs; its `expires_in` says five minutes.
    Bearer {
        user: Option<(String, String)>,
        uses: u32,
    },
    /// One fixed token.
    Token(String),
}

/// Where blobs are sent for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Redirect {
    None,
    /// `Location: /store/…`
    Relative,
    /// `Location: BASE/store/…`, as another [`FaultRegistry::url`] gives it.
    To(String),
}

/// A request that came.
#[derive(Clone, Debug)]
pub struct Seen {
    pub at: Instant,
    pub method: String,
    /// Path and query; the whole URL if a proxy was meant.
    pub target: String,
    /// Bytes asked for with `Range`.
    pub range: Option<Range<u64>>,
    pub headers: BTreeMap<String, String>,
    pub status: u16,
    /// Bytes of the body that were sent.
    pub sent: u64,
}

impl Seen {
    /// Is it a request for bytes of a blob?
    pub fn is_blob(&self) -> bool {
        self.method == "GET" && blob_id(path_of(&self.target)).is_some()
    }
}

/// What a line may have missed and makes up for.
const LATE: Duration = Duration::from_millis(1);

struct State {
    blobs: PathBuf,
    settings: Mutex<Settings>,
    seen: Mutex<Vec<Arc<Mutex<Seen>>>>,
    connections: Mutex<HashMap<u64, TcpStream>>,
    /// When the line is free again, if it has a bandwidth.
    line: Mutex<Instant>,
    accepted: AtomicU64,
    faults_met: AtomicU64,
    stop: AtomicBool,
    host: String,
}

struct Settings {
    fault: Fault,
    /// Requests that the fault still hits.
    left: u64,
    token_fault: Fault,
    auth: Auth,
    redirect: Redirect,
    latency: Duration,
    bytes_per_second: Option<u64>,
    /// Tokens handed out, and how many requests they are good for.
    tokens: HashMap<String, u32>,
    /// Signatures of redirects that the store takes.
    signatures: HashSet<String>,
    takes_all_signatures: bool,
    made: u64,
}

/// See the module's documentation. Ends when it is dropped.
pub struct FaultRegistry {
    state: Arc<State>,
    addr: SocketAddr,
    acceptor: Option<JoinHandle<()>>,
}

impl FaultRegistry {
    /// Serves the files in `blobs` on a free port of 127.0.0.1.
    pub fn start(blobs: &Path) -> Result<FaultRegistry> {
        FaultRegistry::listen(blobs, SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))
    }

    /// The same on an address of the caller's choice.
    pub fn listen(blobs: &Path, addr: SocketAddr) -> Result<FaultRegistry> {
        let listener = TcpListener::bind(addr).with_context(|| format!("listening on {addr}"))?;
        let addr = listener.local_addr()?;
        let state = Arc::new(State {
            blobs: blobs.to_owned(),
            settings: Mutex::new(Settings {
                fault: Fault::None,
                left: 0,
                token_fault: Fault::None,
                auth: Auth::None,
                redirect: Redirect::None,
                latency: Duration::ZERO,
                bytes_per_second: None,
                tokens: HashMap::new(),
                signatures: HashSet::new(),
                takes_all_signatures: false,
                made: 0,
            }),
            seen: Mutex::default(),
            connections: Mutex::default(),
            line: Mutex::new(Instant::now()),
            accepted: AtomicU64::new(0),
            faults_met: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            host: addr.to_string(),
        });
        let serving = state.clone();
        let acceptor = thread::spawn(move || accept(&listener, &serving));
        Ok(FaultRegistry { state, addr, acceptor: Some(acceptor) })
    }

    /// `127.0.0.1:PORT`: the `host` of a registry config.
    pub fn host(&self) -> &str {
        &self.state.host
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// `http://127.0.0.1:PORT`
    pub fn url(&self) -> String {
        format!("http://{}", self.state.host)
    }

    /// From now on every request for a blob, and every ping, meets `fault`.
    pub fn set(&self, fault: Fault) {
        self.set_next(fault, u64::MAX);
    }

    /// The next `count` requests for a blob meet `fault`, those after them do not.
    pub fn set_next(&self, fault: Fault, count: u64) {
        let mut settings = self.state.settings();
        settings.fault = fault;
        settings.left = count;
    }

    /// What goes wrong with requests for tokens.
    pub fn set_token_fault(&self, fault: Fault) {
        self.state.settings().token_fault = fault;
    }

    /// Tokens handed out before are worth nothing from now on.
    pub fn set_auth(&self, auth: Auth) {
        let mut settings = self.state.settings();
        settings.auth = auth;
        settings.tokens.clear();
    }

    /// Requests for blobs are sent elsewhere.
    pub fn set_redirect(&self, redirect: Redirect) {
        self.state.settings().redirect = redirect;
    }

    /// As an object store: takes whatever another registry has signed.
    pub fn accept_signatures(&self) {
        self.state.settings().takes_all_signatures = true;
    }

    /// Where redirects led before is refused with 403 from now on.
    pub fn expire_redirects(&self) {
        self.state.settings().signatures.clear();
    }

    /// Each answer begins `latency` after its request; all bodies together get so many bytes per
    /// second.
    pub fn link(&self, latency: Duration, bytes_per_second: Option<u64>) {
        let mut settings = self.state.settings();
        settings.latency = latency;
        settings.bytes_per_second = bytes_per_second;
    }

    /// All requests so far. What was sent is counted before it is.
    pub fn seen(&self) -> Vec<Seen> {
        let seen = self.state.seen.lock().expect("no panic under this lock");
        seen.iter().map(|seen| seen.lock().expect("no panic under this lock").clone()).collect()
    }

    /// Requests for bytes of blobs, and bytes sent for them.
    pub fn served(&self) -> (usize, u64) {
        let seen = self.seen();
        let blobs = seen.iter().filter(|seen| seen.is_blob());
        blobs.fold((0, 0), |(count, sent), seen| (count + 1, sent + seen.sent))
    }

    pub fn forget_seen(&self) {
        self.state.seen.lock().expect("no panic under this lock").clear();
    }

    /// Requests so far that met a fault.
    pub fn faults_met(&self) -> u64 {
        self.state.faults_met.load(Ordering::Relaxed)
    }

    /// Connections that were made so far.
    pub fn connections(&self) -> u64 {
        self.state.accepted.load(Ordering::Relaxed)
    }
}

impl Drop for FaultRegistry {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.addr); // wakes the acceptor
        let open = std::mem::take(&mut *self.state.connections.lock().expect("no panic"));
        for stream in open.into_values() {
            let _ = stream.shutdown(Shutdown::Both);
        }
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

impl State {
    fn settings(&self) -> MutexGuard<'_, Settings> {
        self.settings.lock().expect("no panic under this lock")
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Waits until the line has carried `len` bytes.
    fn carry(&self, len: usize) {
        let Some(rate) = self.settings().bytes_per_second else { return };
        let takes = Duration::from_secs_f64(len as f64 / rate as f64);
        let mut line = self.line.lock().expect("no panic under this lock");
        // A thread that woke a little late has not made the line slower.
        let now = Instant::now();
        *line = (*line).max(now.checked_sub(LATE).unwrap_or(now)) + takes;
        let until = *line;
        drop(line);
        thread::sleep(until.saturating_duration_since(Instant::now()));
    }
}

fn accept(listener: &TcpListener, state: &Arc<State>) {
    for number in 0.. {
        let Ok((stream, _)) = listener.accept() else { return };
        if state.stopped() {
            return;
        }
        let Ok(twin) = stream.try_clone() else { continue };
        state.accepted.fetch_add(1, Ordering::Relaxed);
        state.connections.lock().expect("no panic under this lock").insert(number, twin);
        let state = state.clone();
        thread::spawn(move || {
            let _ = stream.set_nodelay(true);
            let mut connection = Connection { stream, state: &state, pending: Vec::new() };
            // An error is the end of the connection, mostly one that was asked for.
            let _ = connection.run();
            state.connections.lock().expect("no panic under this lock").remove(&number);
        });
    }
}

struct Connection<'a> {
    stream: TcpStream,
    state: &'a State,
    /// Bytes behind the last request.
    pending: Vec<u8>,
}

/// A request, without a body: clients of a registry that is read send none.
struct Request {
    method: String,
    target: String,
    headers: BTreeMap<String, String>,
}

/// An answer as far as it is decided before its body is sent.
struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Body,
}

enum Body {
    Text(String),
    /// Part of a file, with each byte changed or not.
    File {
        file: File,
        range: Range<u64>,
        wrong: bool,
    },
}

impl Answer {
    fn text(status: u16, text: impl Into<String>) -> Answer {
        Answer { status, headers: Vec::new(), body: Body::Text(text.into()) }
    }

    fn header(mut self, name: &'static str, value: impl Into<String>) -> Answer {
        self.headers.push((name, value.into()));
        self
    }
}

impl Connection<'_> {
    fn run(&mut self) -> io::Result<()> {
        while let Some(request) = self.request()? {
            let at = Instant::now();
            let seen = Arc::new(Mutex::new(Seen {
                at,
                range: request.headers.get("range").and_then(|text| parse_range(text)),
                method: request.method.clone(),
                target: request.target.clone(),
                headers: request.headers.clone(),
                status: 0,
                sent: 0,
            }));
            self.state.seen.lock().expect("no panic under this lock").push(seen.clone());
            self.respond(&request, &seen)?;
        }
        Ok(())
    }

    fn request(&mut self) -> io::Result<Option<Request>> {
        let end = loop {
            if let Some(at) = self.pending.windows(4).position(|w| w == b"\r\n\r\n") {
                break at;
            }
            let mut buffer = [0; 4096];
            match self.stream.read(&mut buffer)? {
                0 => return Ok(None),
                n => self.pending.extend_from_slice(&buffer[..n]),
            }
        };
        let head: Vec<u8> = self.pending.drain(..end + 4).collect();
        let head = String::from_utf8_lossy(&head);
        let mut lines = head.lines();
        let mut first = lines.next().unwrap_or_default().split(' ').map(str::to_owned);
        let (method, target) = (first.next().unwrap_or_default(), first.next().unwrap_or_default());
        let headers = lines
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
            .collect();
        Ok(Some(Request { method, target, headers }))
    }

    fn respond(&mut self, request: &Request, seen: &Mutex<Seen>) -> io::Result<()> {
        let path = path_of(&request.target);
        let latency = self.state.settings().latency;
        thread::sleep(latency);
        if path == "/token" {
            let fault = self.state.settings().token_fault;
            return match self.broken(fault, request)? {
                Some(answer) => self.send(request, answer, Fault::None, seen),
                None => self.send(request, self.token(request), Fault::None, seen),
            };
        }
        let fault = self.next_fault();
        if let Some(answer) = self.broken(fault, request)? {
            return self.send(request, answer, Fault::None, seen);
        }
        let answer = match blob_id(path) {
            None => Answer::text(200, "well\n"),
            Some(id) => self.blob(request, path, id, fault),
        };
        self.send(request, answer, fault, seen)
    }

    fn next_fault(&self) -> Fault {
        let mut settings = self.state.settings();
        match settings.left {
            0 => Fault::None,
            left => {
                if settings.fault != Fault::None {
                    self.state.faults_met.fetch_add(1, Ordering::Relaxed);
                }
                settings.left = if left == u64::MAX { left } else { left - 1 };
                settings.fault
            }
        }
    }

    /// Faults in place of an answer, whatever was asked.
    fn broken(&mut self, fault: Fault, request: &Request) -> io::Result<Option<Answer>> {
        Ok(match fault {
            Fault::Hang => {
                self.hang()?;
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            Fault::ResetAtOnce => {
                self.reset()?;
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            Fault::Garbage => {
                self.stream.write_all(b"this is not the protocol that you are looking for\n\n")?;
                return Err(io::ErrorKind::InvalidData.into());
            }
            Fault::Status(status) => Some(Answer::text(status, "on command\n")),
            Fault::RetryAfter(status, seconds) => Some(
                Answer::text(status, "on command\n").header("Retry-After", seconds.to_string()),
            ),
            Fault::RedirectLoop => {
                Some(Answer::text(307, "").header("Location", request.target.clone()))
            }
            _ => None,
        })
    }

    /// Waits until the client, or the registry, is gone.
    fn hang(&self) -> io::Result<()> {
        self.stream.set_read_timeout(Some(Duration::from_millis(50)))?;
        while !self.state.stopped() {
            match self.stream.peek(&mut [0]) {
                Ok(0) => break,
                Ok(_) => thread::sleep(Duration::from_millis(50)), // a request behind this one
                Err(e)
                    if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// The next close of the connection is a reset.
    fn reset(&self) -> io::Result<()> {
        use std::os::fd::AsRawFd;
        let linger = libc::linger { l_onoff: 1, l_linger: 0 };
        // SAFETY: the option is read from a struct of the length that is given.
        let failed = unsafe {
            libc::setsockopt(
                self.stream.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_LINGER,
                (&raw const linger).cast(),
                to_u32(size_of::<libc::linger>()),
            )
        };
        if failed != 0 {
            return Err(io::Error::last_os_error());
        }
        // The twin in the table keeps the socket open; a reset comes with the last close.
        let mut open = self.state.connections.lock().expect("no panic under this lock");
        let peer = self.stream.peer_addr().ok();
        open.retain(|_, twin| twin.peer_addr().ok() != peer);
        Ok(())
    }

    fn token(&self, request: &Request) -> Answer {
        let mut settings = self.state.settings();
        let Auth::Bearer { user, uses } = settings.auth.clone() else {
            return Answer::text(404, "no tokens here\n");
        };
        if let Some((user, password)) = user
            && request.headers.get("authorization") != Some(&basic(&user, &password))
        {
            return Answer::text(401, "who are you?\n")
                .header("WWW-Authenticate", "Basic realm=\"tokens\"");
        }
        settings.made += 1;
        let token = format!("token-{}", settings.made);
        settings.tokens.insert(token.clone(), uses);
        let body = format!(r#"{{"token":"{token}","access_token":"{token}","expires_in":300}}"#);
        Answer::text(200, body).header("Content-Type", "application/json")
    }

    /// `None` if the client may have what it asks for.
    fn refused(&self, request: &Request) -> Option<Answer> {
        let mut settings = self.state.settings();
        let shown = request.headers.get("authorization").map(String::as_str);
        let challenge = match &settings.auth {
            Auth::None => return None,
            Auth::Basic { user, password } => {
                if shown == Some(&basic(user, password)) {
                    return None;
                }
                "Basic realm=\"registry\"".to_owned()
            }
            Auth::Token(token) => {
                if shown == Some(&format!("Bearer {token}")) {
                    return None;
                }
                "Bearer realm=\"http://127.0.0.1:1/token\"".to_owned()
            }
            Auth::Bearer { .. } => {
                let token = shown.and_then(|text| text.strip_prefix("Bearer ")).unwrap_or_default();
                if let Some(left) = settings.tokens.get_mut(token)
                    && *left > 0
                {
                    *left -= 1;
                    return None;
                }
                format!(
                    "Bearer realm=\"http://{}/token\",service=\"registry\",\
                     scope=\"repository:r:pull\"",
                    self.state.host
                )
            }
        };
        Some(Answer::text(401, "{}").header("WWW-Authenticate", challenge))
    }

    fn blob(&self, request: &Request, path: &str, id: &str, fault: Fault) -> Answer {
        if path.starts_with("/store/") {
            // As object stores do: two kinds of credentials are one too many.
            if request.headers.contains_key("authorization") {
                return Answer::text(400, "both a signature and Authorization\n");
            }
            let signature = request.target.split_once("signature=").map(|(_, text)| text);
            let settings = self.state.settings();
            let known = settings.signatures.contains(signature.unwrap_or_default());
            if !known && !settings.takes_all_signatures {
                return Answer::text(403, "the signature has expired\n");
            }
        } else {
            if let Some(answer) = self.refused(request) {
                return answer;
            }
            let mut settings = self.state.settings();
            let base = match settings.redirect.clone() {
                Redirect::None => None,
                Redirect::Relative => Some(String::new()),
                Redirect::To(base) => Some(base),
            };
            if let Some(base) = base {
                settings.made += 1;
                let signature = settings.made.to_string();
                settings.signatures.insert(signature.clone());
                let location = format!("{base}/store/{id}?signature={signature}");
                return Answer::text(307, "").header("Location", location);
            }
        }
        let file = match File::open(self.state.blobs.join(id)) {
            Ok(file) => file,
            Err(_) => return Answer::text(404, "{\"errors\":[{\"code\":\"BLOB_UNKNOWN\"}]}"),
        };
        let size = file.metadata().map_or(0, |m| m.len());
        let wrong = fault == Fault::WrongBytes;
        let asked = request.headers.get("range").and_then(|text| parse_range(text));
        let Some(asked) = asked.filter(|_| fault != Fault::WholeBlob) else {
            let body = Body::File { file, range: 0..size, wrong };
            return Answer { status: 200, headers: Vec::new(), body };
        };
        if asked.start >= size {
            return Answer::text(416, "").header("Content-Range", format!("bytes */{size}"));
        }
        let mut range = asked.start..asked.end.min(size);
        if fault == Fault::WrongRange {
            let len = range.end - range.start;
            range = if range.start > 0 { 0..len } else { 1..len.max(2).min(size) };
        }
        let headers = match fault {
            Fault::NoContentRange => Vec::new(),
            _ => vec![("Content-Range", format!("bytes {}-{}/{size}", range.start, range.end - 1))],
        };
        Answer { status: 206, headers, body: Body::File { file, range, wrong } }
    }

    fn send(
        &mut self,
        request: &Request,
        answer: Answer,
        fault: Fault,
        seen: &Mutex<Seen>,
    ) -> io::Result<()> {
        let note = |change: &dyn Fn(&mut Seen)| change(&mut seen.lock().expect("no panic"));
        note(&|seen| seen.status = answer.status);
        let len = match &answer.body {
            Body::Text(text) => text.len() as u64,
            Body::File { range, .. } => range.end - range.start,
        };
        let mut head = format!("HTTP/1.1 {} X\r\nContent-Length: {len}\r\n", answer.status);
        for (name, value) in &answer.headers {
            head += &format!("{name}: {value}\r\n");
        }
        head += "\r\n";
        self.stream.write_all(head.as_bytes())?;
        if request.method == "HEAD" {
            return Ok(());
        }
        match answer.body {
            Body::Text(text) => {
                note(&|seen| seen.sent = len);
                self.stream.write_all(text.as_bytes())
            }
            Body::File { file, range, wrong } => self.send_file(&file, range, wrong, fault, seen),
        }
    }

    fn send_file(
        &mut self,
        file: &File,
        range: Range<u64>,
        wrong: bool,
        fault: Fault,
        seen: &Mutex<Seen>,
    ) -> io::Result<()> {
        let stop_at = match fault {
            Fault::HangMidBody | Fault::ResetMidBody | Fault::Truncate => {
                range.start + (range.end - range.start) / 2
            }
            _ => range.end,
        };
        let step = if fault == Fault::SlowLoris { 1 } else { 16 << 10 };
        let mut at = range.start;
        while at < stop_at {
            let mut piece = vec![0; to_usize((stop_at - at).min(step))];
            file.read_exact_at(&mut piece, at)?;
            if wrong {
                piece.iter_mut().for_each(|byte| *byte ^= 0x55);
            }
            self.state.carry(piece.len());
            if fault == Fault::SlowLoris {
                thread::sleep(Duration::from_millis(200));
            }
            seen.lock().expect("no panic").sent += piece.len() as u64;
            self.stream.write_all(&piece)?;
            at += piece.len() as u64;
        }
        match fault {
            Fault::HangMidBody => self.hang()?,
            Fault::ResetMidBody => {
                // What was written should arrive before the reset does.
                thread::sleep(Duration::from_millis(20));
                self.reset()?;
            }
            Fault::Truncate => self.stream.shutdown(Shutdown::Both)?,
            _ => return Ok(()),
        }
        Err(io::ErrorKind::ConnectionAborted.into())
    }
}

/// The path of a request's target, which is a whole URL when a proxy is meant.
fn path_of(target: &str) -> &str {
    let path = match target.split_once("://") {
        Some((_, rest)) => rest.find('/').map_or("/", |at| &rest[at..]),
        None => target,
    };
    path.split('?').next().unwrap_or(path)
}

/// The blob that a path means: its last part, if that looks like an id.
fn blob_id(path: &str) -> Option<&str> {
    let last = path.rsplit('/').next()?;
    let id = last.strip_prefix("sha256:").unwrap_or(last);
    (id.len() == 64 && id.bytes().all(|b| b.is_ascii_alphanumeric())).then_some(id)
}

/// `bytes=a-b` or `bytes=a-`
fn parse_range(text: &str) -> Option<Range<u64>> {
    let (start, end) = text.strip_prefix("bytes=")?.split_once('-')?;
    let start = start.parse().ok()?;
    let end = if end.is_empty() { u64::MAX } else { end.parse::<u64>().ok()?.checked_add(1)? };
    Some(start..end)
}

fn basic(user: &str, password: &str) -> String {
    use base64::Engine;
    let text = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
    format!("Basic {text}")
}

/// An address where no connection ever comes about: the queue of connections is full, so that not
/// even the first packet is answered.
pub struct BlackHole {
    pub addr: SocketAddr,
    _listener: TcpListener,
    _fill: Vec<TcpStream>,
}

impl BlackHole {
    pub fn dig(addr: SocketAddr) -> Result<BlackHole> {
        use std::os::fd::AsRawFd;
        let listener = TcpListener::bind(addr).with_context(|| format!("listening on {addr}"))?;
        let addr = listener.local_addr()?;
        // SAFETY: no memory is involved; the socket is ours and listens already.
        anyhow::ensure!(unsafe { libc::listen(listener.as_raw_fd(), 0) } == 0, "listen");
        let mut fill = Vec::new();
        while let Ok(stream) = TcpStream::connect_timeout(&addr, Duration::from_millis(300)) {
            fill.push(stream);
            anyhow::ensure!(fill.len() < 64, "{addr} takes every connection");
        }
        Ok(BlackHole { addr, _listener: listener, _fill: fill })
    }
}
