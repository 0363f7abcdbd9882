//! Log lines to standard error or a file, without ever holding up the thread that logs.
//!
//! A line goes into a bounded queue; one thread writes. When the reader of a pipe is slow or gone,
//! lines are dropped and counted, nothing waits. Each call site may log [`BURST`] lines per second
//! (ten times as many at debug and trace): a guest that provokes an error a million times gets a
//! hundred lines and a count. A record is one line of valid UTF-8, at most [`MAX_LINE`] bytes, with control
//! characters escaped, so that names chosen by a guest cannot forge lines. The level can be changed
//! while running.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use log::{Level, LevelFilter, Log, Metadata, Record};

/// Longest line in bytes, newline included. Kata stops the virtual machine at 64 KiB.
pub const MAX_LINE: usize = 60 * 1024;
/// Lines per second that one call site may log at error, warn and info.
pub const BURST: u32 = 100;
/// Lines that may wait for the writer.
const QUEUE_LINES: usize = 1024;

/// Where lines go.
#[derive(Debug)]
pub enum Target {
    Stderr,
    /// Appended to; renamed to `FILE.1` when it has `rotate_at` bytes (0: never).
    File {
        path: PathBuf,
        rotate_at: u64,
    },
}

/// Keeps the end of the log: [`flush`](LogGuard::flush) before the process ends.
#[derive(Debug)]
pub struct LogGuard {
    lines: Sender<Line>,
    events: Arc<Events>,
}

/// Starts logging at `level`; to be called once.
///
/// # Errors
///
/// The file cannot be opened, the writer thread cannot be started, or a logger is already there.
pub fn init(level: LevelFilter, target: Target) -> io::Result<LogGuard> {
    let sink = match target {
        Target::Stderr => Sink::Fd(Box::new(io::stderr())),
        Target::File { path, rotate_at } => Sink::file(path, rotate_at)?,
    };
    let events = Arc::<Events>::default();
    let (logger, lines) = start(sink, Arc::clone(&events))?;
    log::set_boxed_logger(Box::new(logger)).map_err(io::Error::other)?;
    log::set_max_level(level);
    Ok(LogGuard { lines, events })
}

impl LogGuard {
    /// The errors that were logged last.
    pub fn events(&self) -> &Arc<Events> {
        &self.events
    }

    /// Waits until the lines logged so far are written, at most `timeout`.
    pub fn flush(&self, timeout: Duration) {
        let (done, wait) = bounded(1);
        let deadline = Instant::now() + timeout;
        if self.lines.send_deadline(Line::Flush(done), deadline).is_ok() {
            let _ = wait.recv_deadline(deadline);
        }
    }
}

/// The last errors, for `GET /api/v1/daemon/events`.
#[derive(Debug, Default)]
pub struct Events(Mutex<Recent>);

#[derive(Debug, Default)]
struct Recent {
    messages: VecDeque<String>,
    /// Their length.
    bytes: usize,
}

impl Events {
    /// Errors that are kept.
    pub const MAX_ERRORS: usize = 500;
    /// Bytes of errors that are kept.
    pub const MAX_SIZE: usize = 50 * 1024;

    /// Those that are kept, the oldest first.
    pub fn messages(&self) -> Vec<String> {
        self.lock().messages.iter().cloned().collect()
    }

    fn add(&self, message: String) {
        let mut recent = self.lock();
        recent.bytes += message.len();
        recent.messages.push_back(message);
        while recent.messages.len() > Self::MAX_ERRORS || recent.bytes > Self::MAX_SIZE {
            let Some(oldest) = recent.messages.pop_front() else { break };
            recent.bytes -= oldest.len();
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Recent> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

enum Line {
    Text(Vec<u8>),
    Flush(Sender<()>),
}

/// Builds the logger and starts its writer thread.
fn start(sink: Sink, events: Arc<Events>) -> io::Result<(Limited, Sender<Line>)> {
    let (lines, queue) = bounded(QUEUE_LINES);
    let dropped = Arc::new(AtomicU64::new(0));
    let writer = Writer { queue, sink, dropped: Arc::clone(&dropped) };
    thread::Builder::new().name("log".into()).spawn(move || writer.run())?;
    let inner = env_logger::Builder::new()
        .filter_level(LevelFilter::Trace)
        .format(|out, record| out.write_all(format_line(record, out.timestamp_millis()).as_bytes()))
        .target(env_logger::Target::Pipe(Box::new(Enqueue { lines: lines.clone(), dropped })))
        .build();
    Ok((Limited { inner, sites: Mutex::new(HashMap::new()), events }, lines))
}

/// One line: time, level, module, message.
fn format_line(record: &Record<'_>, time: impl std::fmt::Display) -> String {
    let mut line = format!("[{time} {:<5} {}] ", record.level(), record.target());
    let message = record.args().to_string();
    for c in message.chars() {
        if line.len() > MAX_LINE - 32 {
            line.push_str("… (cut)");
            break;
        }
        if c.is_control() { line.extend(c.escape_default()) } else { line.push(c) }
    }
    line.push('\n');
    line
}

/// Hands each finished line to the writer, or drops and counts it.
struct Enqueue {
    lines: Sender<Line>,
    dropped: Arc<AtomicU64>,
}

impl Write for Enqueue {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.lines.try_send(Line::Text(line.to_vec())).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Limits each call site, then passes on.
struct Limited {
    inner: env_logger::Logger,
    sites: Mutex<HashMap<(&'static str, u32), Site>>,
    events: Arc<Events>,
}

/// One call site in the current second.
struct Site {
    since: Instant,
    lines: u32,
    suppressed: u64,
}

/// What to do with a line.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// Log it. `missed` lines of this site were not logged in the last busy second.
    Pass {
        missed: u64,
    },
    /// Log it: it is the last of this second.
    Last,
    Suppress,
}

impl Site {
    fn admit(&mut self, now: Instant, limit: u32) -> Verdict {
        let mut missed = 0;
        if now.duration_since(self.since) >= Duration::from_secs(1) {
            missed = self.suppressed;
            *self = Site { since: now, lines: 0, suppressed: 0 };
        }
        self.lines = self.lines.saturating_add(1);
        if self.lines > limit {
            self.suppressed += 1;
            Verdict::Suppress
        } else if self.lines == limit {
            Verdict::Last
        } else {
            Verdict::Pass { missed }
        }
    }
}

impl Limited {
    fn admit(&self, record: &Record<'_>) -> Verdict {
        let limit = if record.level() >= Level::Debug { 10 * BURST } else { BURST };
        let site = (record.file_static().unwrap_or(""), record.line().unwrap_or(0));
        let now = Instant::now();
        let mut sites = self.sites.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        sites
            .entry(site)
            .or_insert_with(|| Site { since: now, lines: 0, suppressed: 0 })
            .admit(now, limit)
    }
}

impl Log for Limited {
    /// Other crates talk about their internals at debug: they are heard at trace only.
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let ours = metadata.target().starts_with("rafs");
        ours || metadata.level() <= Level::Warn || log::max_level() == LevelFilter::Trace
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let again = |args: std::fmt::Arguments<'_>| {
            self.inner
                .log(&Record::builder().metadata(record.metadata().clone()).args(args).build());
        };
        let verdict = self.admit(record);
        if record.level() == Level::Error && verdict != Verdict::Suppress {
            let seconds = humantime::format_rfc3339_seconds(std::time::SystemTime::now());
            let message = format!("{seconds} {}", record.args());
            self.events.add(message.chars().take(1024).collect());
        }
        match verdict {
            Verdict::Suppress => {}
            Verdict::Pass { missed: 0 } => self.inner.log(record),
            Verdict::Pass { missed } => {
                again(format_args!("{} ({missed} like this were not logged)", record.args()));
            }
            Verdict::Last => {
                again(format_args!("{} (too many: no more like this for a second)", record.args()));
            }
        }
    }

    fn flush(&self) {}
}

/// The thread that writes.
struct Writer {
    queue: Receiver<Line>,
    sink: Sink,
    dropped: Arc<AtomicU64>,
}

impl Writer {
    fn run(mut self) {
        while let Ok(line) = self.queue.recv() {
            match line {
                Line::Text(text) => {
                    let dropped = self.dropped.swap(0, Ordering::Relaxed);
                    if dropped > 0 {
                        let text =
                            format!("[rafsd] {dropped} log lines were dropped: nobody read them\n");
                        self.write(text.as_bytes());
                    }
                    self.write(&text);
                }
                Line::Flush(done) => {
                    let _ = done.try_send(());
                }
            }
        }
    }

    /// Writes `line`, or counts it as dropped if nobody can read it any more.
    fn write(&mut self, line: &[u8]) {
        if self.sink.write(line).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

enum Sink {
    Fd(Box<dyn WriteFd>),
    File { file: File, path: PathBuf, len: u64, rotate_at: u64 },
}

/// A stream that can also be polled.
trait WriteFd: Write + AsFd + Send {}
impl<T: Write + AsFd + Send> WriteFd for T {}

impl Sink {
    fn file(path: PathBuf, rotate_at: u64) -> io::Result<Sink> {
        let file = open_append(&path)
            .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))?;
        let len = file.metadata()?.len();
        Ok(Sink::File { file, path, len, rotate_at })
    }

    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        match self {
            Sink::Fd(stream) => write_all(stream.as_mut(), line),
            Sink::File { file, path, len, rotate_at } => {
                let line_len = line.len() as u64;
                if *rotate_at > 0 && *len > 0 && *len + line_len > *rotate_at {
                    let mut old = path.clone().into_os_string();
                    old.push(".1");
                    std::fs::rename(&*path, old)?;
                    *file = open_append(path)?;
                    *len = 0;
                }
                *len += line_len;
                file.write_all(line)
            }
        }
    }
}

/// Makes the directories that are missing, too: nydus-snapshotter names a file in one of its own for each daemon.
fn open_append(path: &Path) -> io::Result<File> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    File::options().create(true).append(true).open(path)
}

/// Writes all of `line`, also to a pipe that another process made non-blocking.
fn write_all(stream: &mut dyn WriteFd, mut line: &[u8]) -> io::Result<()> {
    while !line.is_empty() {
        match stream.write(line) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => line = &line[n..],
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                use rustix::event::{PollFd, PollFlags, poll};
                let fd = stream.as_fd();
                poll(&mut [PollFd::new(&fd, PollFlags::OUT)], None)?;
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Read};

    /// Long enough for anything that is meant to happen, on a busy machine.
    const PATIENT: Duration = Duration::from_secs(60);

    /// A logger of its own on a pipe; the global one is not touched.
    fn on_pipe() -> (Limited, LogGuard, io::PipeReader) {
        let (reader, writer) = io::pipe().unwrap();
        let events = Arc::<Events>::default();
        let (logger, lines) = start(Sink::Fd(Box::new(writer)), events.clone()).unwrap();
        (logger, LogGuard { lines, events }, reader)
    }

    fn say(logger: &Limited, level: Level, line: u32, message: &str) {
        logger.log(
            &Record::builder()
                .level(level)
                .target("rafsd::test")
                .file_static(Some("test.rs"))
                .line(Some(line))
                .args(format_args!("{message}"))
                .build(),
        );
    }

    #[test]
    fn a_line_has_time_level_module_and_message() {
        let (logger, guard, reader) = on_pipe();
        say(&logger, Level::Info, 1, "blob 9f2c: open");
        guard.flush(PATIENT);
        let mut line = String::new();
        BufReader::new(reader).read_line(&mut line).unwrap();
        assert!(line.starts_with("[20"), "{line}");
        assert!(line.ends_with("Z INFO  rafsd::test] blob 9f2c: open\n"), "{line}");
    }

    #[test]
    fn a_message_is_one_bounded_line() {
        let long = "é\n\u{1b}[31m".repeat(60_000);
        let record = Record::builder().level(Level::Warn).args(format_args!("")).build();
        assert_eq!(format_line(&record, "T"), "[T WARN  ] \n");
        let line = format_line(
            &Record::builder().level(Level::Warn).args(format_args!("{long}")).build(),
            "T",
        );
        assert!(line.len() <= MAX_LINE, "{}", line.len());
        assert_eq!(line.matches('\n').count(), 1);
        assert!(line.starts_with(r"[T WARN  ] é\n\u{1b}[31mé\n"), "{}", &line[..80]);
        assert!(line.ends_with("… (cut)\n"));
    }

    #[test]
    fn a_call_site_cannot_flood() {
        let (logger, guard, mut reader) = on_pipe();
        for i in 0..100_000 {
            say(&logger, Level::Error, 1, &format!("bad request {i}"));
        }
        say(&logger, Level::Error, 2, "another site still speaks");
        guard.flush(PATIENT);
        drop((logger, guard));
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        // A slow machine may see more than one second.
        assert!(lines.len() >= 101 && lines.len() < 2000, "{} lines", lines.len());
        assert!(text.contains("(too many: no more like this for a second)"));
        assert!(lines.last().unwrap().ends_with("another site still speaks"));
    }

    #[test]
    fn a_site_tells_how_much_was_missed() {
        let start = Instant::now();
        let mut site = Site { since: start, lines: 0, suppressed: 0 };
        let verdicts: Vec<Verdict> = (0..5).map(|_| site.admit(start, 3)).collect();
        let pass = || Verdict::Pass { missed: 0 };
        assert_eq!(verdicts, [pass(), pass(), Verdict::Last, Verdict::Suppress, Verdict::Suppress]);
        let later = start + Duration::from_secs(1);
        assert_eq!(site.admit(later, 3), Verdict::Pass { missed: 2 });
        assert_eq!(site.admit(later, 3), pass());
    }

    #[test]
    fn a_reader_that_stalls_holds_up_nobody() {
        let (logger, guard, mut reader) = on_pipe();
        let begin = Instant::now();
        for i in 0..4 * u32::try_from(QUEUE_LINES).unwrap() {
            say(&logger, Level::Info, i, &"x".repeat(1000));
        }
        guard.flush(Duration::from_millis(50));
        assert!(begin.elapsed() < PATIENT, "{:?}", begin.elapsed());
        // When it reads again, the log goes on and says what is missing.
        let rest = thread::spawn(move || {
            let mut text = String::new();
            reader.read_to_string(&mut text).unwrap();
            text
        });
        guard.flush(PATIENT);
        say(&logger, Level::Info, 0, "again");
        guard.flush(PATIENT);
        drop((logger, guard));
        let text = rest.join().unwrap();
        assert!(text.contains(" log lines were dropped"));
        assert!(text.trim_end().ends_with("again"));
    }

    #[test]
    fn a_reader_that_is_gone_does_not_matter() {
        let (logger, guard, reader) = on_pipe();
        drop(reader);
        for i in 0..10 {
            say(&logger, Level::Info, i, "into the void");
        }
        guard.flush(PATIENT);
    }

    #[test]
    fn the_last_errors_are_kept() {
        let (logger, guard, _reader) = on_pipe();
        say(&logger, Level::Warn, 1, "no error");
        for i in 0..600 {
            say(&logger, Level::Error, i, &format!("error {i}"));
        }
        let messages = guard.events().messages();
        assert_eq!(messages.len(), Events::MAX_ERRORS);
        assert!(messages[0].starts_with("20") && messages[0].ends_with("Z error 100"));
        for i in 0..100 {
            say(&logger, Level::Error, 1000 + i, &"é".repeat(2000));
        }
        let messages = guard.events().messages();
        let bytes: usize = messages.iter().map(String::len).sum();
        assert!(bytes <= Events::MAX_SIZE && bytes > Events::MAX_SIZE - 3000, "{bytes}");
    }

    #[test]
    fn other_crates_are_heard_at_warn() {
        let (logger, ..) = on_pipe();
        let enabled = |target: &str, level| {
            logger.enabled(&Metadata::builder().target(target).level(level).build())
        };
        assert!(enabled("hyper::proto", Level::Warn));
        assert!(!enabled("hyper::proto", Level::Debug));
        assert!(enabled("rafsd::blob", Level::Debug));
    }

    #[test]
    fn a_log_file_is_appended_to_and_rotated() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("logs/d1/rafsd.log");
        Sink::file(path.clone(), 0).unwrap().write(b"before\n").unwrap();
        let mut sink = Sink::file(path.clone(), 20).unwrap();
        for line in ["second\n", "third\n", "fourth\n"] {
            sink.write(line.as_bytes()).unwrap();
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "fourth\n");
        let old = std::fs::read_to_string(path.with_extension("log.1")).unwrap();
        assert_eq!(old, "before\nsecond\nthird\n");
    }
}
