//! A file system over a directory of blobs that hangs, dawdles, fails and lies on command.
//!
//! It stands under a `localfs` backend and counts every byte the daemon asks for: files are opened
//! for direct I/O, so that no page cache answers in its place. A hanging read holds nothing but its
//! request; it ends when [`HangFs::set`] changes the mode, or when the kernel interrupts it because
//! its reader was killed, which is what a network file system does too.
//!
//! Speaks the kernel's protocol over `/dev/fuse` itself: the libraries for it do not handle
//! interrupts, and a process with a read that cannot be interrupted cannot be killed. Needs root.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vmm_sys_util::eventfd::EventFd;
use zerocopy::{FromBytes, IntoBytes};

use super::fuse_abi::*;
use super::{to_u32, to_usize};

const FOPEN_DIRECT_IO: u32 = 1;
const MAX_WRITE: u32 = 128 << 10;

/// What happens to reads of file content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mode {
    Pass,
    /// No answer until the mode changes.
    Hang,
    /// Each read takes so long.
    Slow(Duration),
    /// Each read ends with this errno.
    Fail(i32),
    /// Bytes of these ranges of every file come out inverted.
    Flip(Vec<std::ops::Range<u64>>),
}

/// Reads of one file that were answered with data, and those now hanging.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    pub reads: u64,
    pub bytes: u64,
}

struct Pending {
    unique: u64,
    node: u64,
    offset: u64,
    size: u32,
}

struct Entry {
    name: Vec<u8>,
    file: File,
}

struct State {
    mode: Mode,
    parked: Vec<Pending>,
    counts: BTreeMap<Vec<u8>, Count>,
    /// Node 1 is the directory, node `i + 2` is `entries[i]`.
    entries: Vec<Entry>,
}

struct Shared {
    device: OwnedFd,
    source: PathBuf,
    state: Mutex<State>,
    /// Signalled when a read is parked.
    parked: Condvar,
    stop: EventFd,
}

pub struct HangFs {
    shared: Arc<Shared>,
    mount: PathBuf,
    thread: Option<JoinHandle<()>>,
}

impl HangFs {
    /// Shows the files of `source` at `mount`, a directory that is made if it is not there.
    pub fn mount(source: &Path, mount: &Path) -> Result<HangFs> {
        fs::create_dir_all(mount)?;
        let device = File::options()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .context("opening /dev/fuse: needs root and the fuse module")?;
        let options =
            format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
        let target = CString::new(mount.as_os_str().as_bytes())?;
        let options = CString::new(options)?;
        // SAFETY: all pointers are C strings that live across the call.
        let failed = unsafe {
            libc::mount(
                c"hang_fs".as_ptr(),
                target.as_ptr(),
                c"fuse".as_ptr(),
                libc::MS_NODEV | libc::MS_NOSUID,
                options.as_ptr().cast(),
            )
        };
        if failed != 0 {
            return Err(io::Error::last_os_error()).context("mounting hang_fs: needs root");
        }
        let shared = Arc::new(Shared {
            device: device.into(),
            source: source.to_owned(),
            state: Mutex::new(State {
                mode: Mode::Pass,
                parked: Vec::new(),
                counts: BTreeMap::new(),
                entries: Vec::new(),
            }),
            parked: Condvar::new(),
            stop: EventFd::new(0)?,
        });
        let server = shared.clone();
        Ok(HangFs {
            shared,
            mount: mount.to_owned(),
            thread: Some(std::thread::spawn(move || server.run())),
        })
    }

    pub fn path(&self) -> &Path {
        &self.mount
    }

    /// Changes what happens to reads. Reads that hang are answered now, in the new mode.
    pub fn set(&self, mode: Mode) {
        let woken = {
            let mut state = self.shared.lock();
            state.mode = mode;
            if state.mode == Mode::Hang { Vec::new() } else { std::mem::take(&mut state.parked) }
        };
        for read in woken {
            self.shared.read(read);
        }
    }

    /// Reads that hang right now.
    pub fn hanging(&self) -> usize {
        self.shared.lock().parked.len()
    }

    /// Sleeps until at least `count` reads hang.
    pub fn wait_hanging(&self, count: usize, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        let mut state = self.shared.lock();
        while state.parked.len() < count {
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "{} reads hang, {count} should", state.parked.len());
            state = self.shared.parked.wait_timeout(state, left).expect("no panic under it").0;
        }
        Ok(())
    }

    /// What was read of each file since the last [`HangFs::reset_counts`].
    pub fn counts(&self) -> BTreeMap<String, Count> {
        let state = self.shared.lock();
        let show = |name: &[u8]| String::from_utf8_lossy(name).into_owned();
        state.counts.iter().map(|(name, count)| (show(name), *count)).collect()
    }

    pub fn total(&self) -> Count {
        let state = self.shared.lock();
        state.counts.values().fold(Count::default(), |sum, c| Count {
            reads: sum.reads + c.reads,
            bytes: sum.bytes + c.bytes,
        })
    }

    pub fn reset_counts(&self) {
        self.shared.lock().counts.clear();
    }
}

impl Drop for HangFs {
    fn drop(&mut self) {
        self.set(Mode::Fail(libc::EIO));
        if let Ok(target) = CString::new(self.mount.as_os_str().as_bytes()) {
            // Lazily: a daemon that still has a blob open must not keep the directory.
            // SAFETY: a C string that lives across the call.
            unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
        }
        let _ = self.shared.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while the state is locked")
    }

    fn run(&self) {
        let mut buffer = vec![0u8; to_usize(u64::from(MAX_WRITE)) + (64 << 10)];
        loop {
            let mut fds = [self.device.as_raw_fd(), self.stop.as_raw_fd()].map(|fd| libc::pollfd {
                fd,
                events: libc::POLLIN,
                revents: 0,
            });
            // SAFETY: two pollfds that live across the call.
            unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) };
            if fds[1].revents != 0 {
                return;
            }
            // SAFETY: the buffer is ours and as long as we say.
            let n = unsafe {
                libc::read(self.device.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len())
            };
            let Ok(n) = usize::try_from(n) else {
                match io::Error::last_os_error().raw_os_error() {
                    Some(libc::EINTR | libc::EAGAIN | libc::ENOENT) => continue,
                    // ENODEV: unmounted.
                    _ => return,
                }
            };
            self.serve(&buffer[..n]);
        }
    }

    fn serve(&self, request: &[u8]) {
        let Ok((header, body)) = InHeader::read_from_prefix(request) else {
            return;
        };
        let unique = header.unique;
        match header.opcode {
            op::INIT => {
                let asked = InitIn::read_from_prefix(body).map(|(i, _)| i).unwrap_or_default();
                let wanted = init::ASYNC_READ | init::MAX_PAGES | init::ASYNC_DIO;
                let flags = u32::try_from(wanted).expect("in the low word") & asked.flags;
                let out = InitOut {
                    major: KERNEL_VERSION,
                    minor: 31,
                    max_readahead: asked.max_readahead,
                    flags,
                    max_background: 256,
                    congestion_threshold: 256,
                    max_write: MAX_WRITE,
                    time_gran: 1,
                    max_pages: 256,
                    ..InitOut::default()
                };
                self.answer(unique, out.as_bytes());
            }
            op::LOOKUP => match self.lookup(body) {
                Ok(entry) => self.answer(unique, entry.as_bytes()),
                Err(errno) => self.fail(unique, errno),
            },
            op::GETATTR => match self.attr(header.nodeid) {
                Ok(attr) => {
                    let out = AttrOut { attr_valid: 1, attr_valid_nsec: 0, dummy: 0, attr };
                    self.answer(unique, out.as_bytes());
                }
                Err(errno) => self.fail(unique, errno),
            },
            op::OPEN => {
                let out = OpenOut { open_flags: FOPEN_DIRECT_IO, ..OpenOut::default() };
                self.answer(unique, out.as_bytes());
            }
            op::OPENDIR => self.answer(unique, OpenOut::default().as_bytes()),
            op::READDIR => match ReadIn::read_from_prefix(body) {
                Ok((ask, _)) => {
                    let listing = self.listing(ask.offset, to_usize(u64::from(ask.size)));
                    self.answer(unique, &listing);
                }
                Err(_) => self.fail(unique, libc::EINVAL),
            },
            op::READ => match ReadIn::read_from_prefix(body) {
                Ok((ask, _)) => self.read(Pending {
                    unique,
                    node: header.nodeid,
                    offset: ask.offset,
                    size: ask.size,
                }),
                Err(_) => self.fail(unique, libc::EINVAL),
            },
            op::RELEASE | op::RELEASEDIR | op::ACCESS | op::DESTROY => self.answer(unique, &[]),
            op::STATFS => self.answer(unique, StatfsOut::default().as_bytes()),
            op::INTERRUPT => {
                if let Ok((ask, _)) = InterruptIn::read_from_prefix(body) {
                    self.interrupt(ask.unique);
                }
            }
            op::FORGET | op::BATCH_FORGET => {}
            _ => self.fail(unique, libc::ENOSYS),
        }
    }

    /// Ends a hanging read; one that is being answered anyway needs nothing.
    fn interrupt(&self, unique: u64) {
        let found = {
            let mut state = self.lock();
            let at = state.parked.iter().position(|r| r.unique == unique);
            at.map(|at| state.parked.swap_remove(at))
        };
        if found.is_some() {
            self.fail(unique, libc::EINTR);
        }
    }

    fn lookup(&self, body: &[u8]) -> Result<EntryOut, i32> {
        let name = body.strip_suffix(b"\0").unwrap_or(body);
        let path = self.source.join(std::ffi::OsStr::from_bytes(name));
        let file = File::open(&path).map_err(|e| e.raw_os_error().unwrap_or(libc::EIO))?;
        let nodeid = {
            let mut state = self.lock();
            let at = match state.entries.iter().position(|e| e.name == name) {
                Some(at) => {
                    // A blob that was repaired or replaced is another file by now.
                    state.entries[at].file = file;
                    at
                }
                None => {
                    state.entries.push(Entry { name: name.to_vec(), file });
                    state.entries.len() - 1
                }
            };
            at as u64 + 2
        };
        Ok(EntryOut { nodeid, attr: self.attr(nodeid)?, ..EntryOut::default() })
    }

    fn attr(&self, nodeid: u64) -> Result<Attr, i32> {
        let errno = |e: io::Error| e.raw_os_error().unwrap_or(libc::EIO);
        let meta = if nodeid == ROOT_ID {
            fs::metadata(&self.source).map_err(errno)?
        } else {
            let state = self.lock();
            let entry = state.entries.get(to_usize(nodeid - 2)).ok_or(libc::ENOENT)?;
            entry.file.metadata().map_err(errno)?
        };
        Ok(Attr {
            ino: nodeid,
            size: meta.size(),
            blocks: meta.blocks(),
            mode: meta.mode(),
            nlink: 1,
            blksize: 4096,
            ..Attr::default()
        })
    }

    fn listing(&self, offset: u64, size: usize) -> Vec<u8> {
        let mut names: Vec<_> = fs::read_dir(&self.source)
            .into_iter()
            .flatten()
            .filter_map(|e| Some(e.ok()?.file_name()))
            .collect();
        names.sort();
        let mut out = Vec::new();
        for (i, name) in names.iter().enumerate().skip(to_usize(offset)) {
            let name = name.as_bytes();
            let head = DirentHeader {
                ino: i as u64 + 2,
                off: i as u64 + 1,
                namelen: to_u32(name.len()),
                kind: libc::S_IFREG >> 12,
            };
            let len = (size_of::<DirentHeader>() + name.len()).next_multiple_of(8);
            if out.len() + len > size {
                break;
            }
            let end = out.len() + len;
            out.extend_from_slice(head.as_bytes());
            out.extend_from_slice(name);
            out.resize(end, 0);
        }
        out
    }

    /// Answers a read, or parks it.
    fn read(&self, read: Pending) {
        let mode = {
            let mut state = self.lock();
            if state.mode == Mode::Hang {
                state.parked.push(read);
                self.parked.notify_all();
                return;
            }
            state.mode.clone()
        };
        match mode {
            Mode::Fail(errno) => self.fail(read.unique, errno),
            Mode::Slow(pause) => {
                // The file system's own thread goes on; only this read dawdles. The descriptor is
                // duplicated, so that a late answer never meets a reused number.
                let Ok(late) = Late::new(self, read) else { return };
                std::thread::spawn(move || {
                    std::thread::sleep(pause);
                    late.send();
                });
            }
            Mode::Pass | Mode::Hang => match self.content(&read) {
                Ok(bytes) => self.answer(read.unique, &bytes),
                Err(errno) => self.fail(read.unique, errno),
            },
            Mode::Flip(ranges) => match self.content(&read) {
                Ok(mut bytes) => {
                    for (at, byte) in (read.offset..).zip(&mut bytes) {
                        if ranges.iter().any(|range| range.contains(&at)) {
                            *byte = !*byte;
                        }
                    }
                    self.answer(read.unique, &bytes);
                }
                Err(errno) => self.fail(read.unique, errno),
            },
        }
    }

    fn content(&self, read: &Pending) -> Result<Vec<u8>, i32> {
        let mut state = self.lock();
        let at = to_usize(read.node.wrapping_sub(2));
        let entry = state.entries.get(at).ok_or(libc::ENOENT)?;
        let name = entry.name.clone();
        let mut bytes = vec![0; to_usize(u64::from(read.size))];
        let mut have = 0;
        while have < bytes.len() {
            match entry.file.read_at(&mut bytes[have..], read.offset + have as u64) {
                Ok(0) => break,
                Ok(n) => have += n,
                Err(error) => return Err(error.raw_os_error().unwrap_or(libc::EIO)),
            }
        }
        bytes.truncate(have);
        let count = state.counts.entry(name).or_default();
        count.reads += 1;
        count.bytes += have as u64;
        Ok(bytes)
    }

    fn answer(&self, unique: u64, body: &[u8]) {
        send(self.device.as_raw_fd(), unique, 0, body);
    }

    fn fail(&self, unique: u64, errno: i32) {
        send(self.device.as_raw_fd(), unique, -errno, &[]);
    }
}

/// An answer that is ready but sent later.
struct Late {
    device: OwnedFd,
    unique: u64,
    body: Result<Vec<u8>, i32>,
}

impl Late {
    fn new(shared: &Shared, read: Pending) -> io::Result<Late> {
        // SAFETY: `dup` of an open descriptor; what comes back is ours alone.
        let device = unsafe {
            let fd = libc::fcntl(shared.device.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 0);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(fd)
        };
        let body = shared.content(&read);
        Ok(Late { device, unique: read.unique, body })
    }

    fn send(self) {
        match self.body {
            Ok(body) => send(self.device.as_raw_fd(), self.unique, 0, &body),
            Err(errno) => send(self.device.as_raw_fd(), self.unique, -errno, &[]),
        }
    }
}

/// One answer. The kernel refuses it if the request is gone (ENOENT): nobody waits for it then.
fn send(device: i32, unique: u64, error: i32, body: &[u8]) {
    let header = OutHeader { len: to_u32(size_of::<OutHeader>() + body.len()), error, unique };
    let parts = [header.as_bytes(), body]
        .map(|part| libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() });
    // SAFETY: both parts live across the call, and `writev` only reads them.
    unsafe { libc::writev(device, parts.as_ptr(), 2) };
}
