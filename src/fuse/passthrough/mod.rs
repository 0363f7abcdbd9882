//! A directory of the host as a file system that guests can write: what Kata Containers calls its
//! shared directory.
//!
//! The guest's kernel has checked permissions; the host's kernel does the work, on descriptors and
//! never on paths. A name is one component, looked up below a descriptor of its directory without
//! following links, so nothing outside the shared directory is reached, whatever the guest asks.
//! Other file systems mounted below it are shown, also those that are mounted later.
//!
//! A system call that may wait for a disk or another process is made by a thread of a bounded pool
//! (`pool`), and the request waits like a read that needs chunks; what is known to be quick is done
//! at once. Both ways run the same code, `Calls::answer`.

mod calls;
mod credentials;
mod data;
mod file_handle;
mod inode;
mod names;
mod pool;
mod request;
mod stat;
mod xattrs;

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{CWD, Mode, OFlags};
use vm_memory::VolatileSlice;

use self::calls::Calls;
use self::inode::{ROOT, Table};
use self::pool::Pool;
use self::request::Ask;
use self::stat::{InodeNumbers, Stat};
use super::abi::{self, Attr};
use super::file_system::{Call, FileSystem, FsError};
use super::reply::Reply;
use super::wait::{Answer, Pins, Wait};

/// What a guest may keep of a shared directory without asking.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cache {
    /// Nothing: every read and every look goes to the host. For files that the host changes while
    /// guests have them open.
    Never,
    /// Names and attributes for a second, no data.
    Metadata,
    /// Names and attributes for a second, data from one open to the next.
    #[default]
    Auto,
    /// Everything for a day: for directories that nobody else changes.
    Always,
}

impl Cache {
    /// Seconds for which names and attributes may be kept.
    fn valid_secs(self) -> u64 {
        match self {
            Cache::Never => 0,
            Cache::Metadata | Cache::Auto => 1,
            Cache::Always => 86_400,
        }
    }
}

/// How a directory is shared.
#[derive(Clone, Debug)]
pub struct PassthroughOptions {
    /// What logs call it, such as its mountpoint.
    pub name: String,
    pub cache: Cache,
    /// Inodes that are kept open for speed. Further ones are known by file handles, which cost no
    /// descriptor; only where the host's file system has none, or this process lacks
    /// `CAP_DAC_READ_SEARCH`, all are kept open.
    pub open_inodes: usize,
}

impl Default for PassthroughOptions {
    fn default() -> Self {
        PassthroughOptions { name: "/".to_owned(), cache: Cache::Auto, open_inodes: 8192 }
    }
}

/// Why a directory cannot be shared.
#[derive(Debug, thiserror::Error)]
#[error("directory {}", path.display())]
pub struct PassthroughError {
    pub path: PathBuf,
    pub source: io::Error,
}

/// A shared directory.
pub struct PassthroughFs {
    options: PassthroughOptions,
    calls: Arc<Calls>,
    pool: Pool,
}

impl PassthroughFs {
    /// Shares `dir`, which stays the shared directory even if another one takes its name.
    ///
    /// # Errors
    ///
    /// It is no directory, or cannot be opened.
    pub fn new(dir: &Path, options: PassthroughOptions) -> Result<PassthroughFs, PassthroughError> {
        let open = || -> io::Result<_> {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let root = rustix::fs::openat(CWD, dir, flags, Mode::empty())?;
            let stat = Stat::of(root.as_fd())?;
            Ok((root, stat))
        };
        let (root, stat) =
            open().map_err(|source| PassthroughError { path: dir.to_owned(), source })?;
        if !credentials::may_change() {
            let name = &options.name;
            log::warn!("{name}: without CAP_SETUID all that guests make here belongs to this user");
        }
        let local = stat::is_local(&root);
        let calls = Calls {
            cache: options.cache,
            numbers: InodeNumbers::new(stat.dev),
            local,
            root_dev: stat.dev,
            table: Table::new(root, &stat, options.open_inodes),
        };
        Ok(PassthroughFs {
            options,
            calls: Arc::new(calls),
            pool: Pool::new(|| {
                if let Err(e) = credentials::prepare_thread() {
                    log::error!("a thread for host files keeps the rights of the process: {e}");
                }
            }),
        })
    }

    /// Drops `gone` where closing files may take as long as it takes.
    fn drop_later<T: Send + 'static>(&self, gone: T) {
        // If there is no thread for it, it is dropped here.
        let _ = self.pool.run(0, move || drop(gone));
    }

    /// Has the answer found by a thread of the pool, or here and now if too much is under way.
    fn wait(&self, call: &Call<'_>, ask: &Ask<'_>, reply: &mut Reply<'_>) -> Result<u32, FsError> {
        let room = call_room(ask).min(reply.room());
        let calls = Arc::clone(&self.calls);
        let (terms, naming, request) = (call.terms, call.naming, call.request.clone());
        let (send, receive) = tokio::sync::oneshot::channel();
        let held = room + request.body().len();
        let job = move || {
            let call = Call { terms, naming, request: &request };
            // An error means that the ring is gone that the request came from.
            let _ = send.send(calls.owned_answer(&call, room));
        };
        if self.pool.run(held, job).is_err() {
            return self.calls.answer(call, ask, reply);
        }
        let work = async move {
            // An error means that the job panicked.
            Pins::answer(receive.await.unwrap_or(Answer::Errno(libc::EIO)))
        };
        Err(FsError::Wait(match ask {
            Ask::Read { .. } => Wait::new(work),
            _ => Wait::uninterruptible(work),
        }))
    }
}

/// Bytes that an answer may need behind its header.
fn call_room(ask: &Ask<'_>) -> usize {
    let size = |size: u32| usize::try_from(size).unwrap_or(usize::MAX);
    match ask {
        Ask::Read { size: bytes, .. } | Ask::Readdir { size: bytes, .. } => size(*bytes),
        Ask::Getxattr { size: bytes, .. } | Ask::Listxattr { size: bytes } => size(*bytes).max(8),
        Ask::Readlink => 4096,
        _ => size_of::<abi::StatxOut>(),
    }
}

impl Calls {
    /// The answer to a request, in memory of ours.
    fn owned_answer(&self, call: &Call<'_>, room: usize) -> Answer {
        const HEADER: usize = size_of::<abi::OutHeader>();
        let ask = match Ask::of(call.request, &call.terms) {
            Ok(ask) => ask,
            Err(error) => return Answer::Errno(error.errno()),
        };
        let mut bytes = vec![0; HEADER + room];
        let slices = [VolatileSlice::from(&mut bytes[..])];
        let mut reply = Reply::new(&slices);
        let len = match self.answer(call, &ask, &mut reply) {
            Ok(len) => len,
            Err(error) => return Answer::Errno(error.errno()),
        };
        let errno = i32::from_ne_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
        if errno != 0 {
            return Answer::Errno(-errno);
        }
        bytes.truncate(usize::try_from(len).unwrap_or(0));
        Answer::Body(bytes.split_off(HEADER.min(bytes.len())))
    }
}

impl FileSystem for PassthroughFs {
    fn name(&self) -> &str {
        &self.options.name
    }

    fn root(&self) -> u64 {
        ROOT
    }

    /// Its numbers are given out anew by each process.
    fn identity(&self) -> Option<[u8; 32]> {
        None
    }

    fn counts_inodes(&self) -> bool {
        false
    }

    fn valid_secs(&self) -> u64 {
        self.options.cache.valid_secs()
    }

    fn immutable(&self) -> bool {
        false
    }

    fn has_xattrs(&self) -> bool {
        true
    }

    fn attr(&self, node: u64) -> Result<Attr, FsError> {
        self.calls.attr(node)
    }

    fn forget(&self, node: u64, lookups: u64) {
        if let Some(gone) = self.calls.table.forget(node, lookups)
            && gone.kept().is_some()
        {
            self.drop_later(gone);
        }
    }

    fn remembers(&self) -> bool {
        self.calls.table.len() > 1
    }

    fn end_session(&self) {
        self.drop_later(self.calls.table.clear());
    }

    fn serve(
        &self,
        call: &Call<'_>,
        reply: &mut Reply<'_>,
        pins: &Pins,
    ) -> Option<Result<u32, FsError>> {
        let unique = call.request.header.unique;
        if let Some(answer) = &pins.answer {
            return Some(Ok(match &**answer {
                Answer::Body(bytes) => reply.bytes(unique, bytes),
                Answer::Errno(errno) => reply.error(unique, *errno),
            }));
        }
        let ask = match Ask::of(call.request, &call.terms) {
            Ok(ask) => ask,
            Err(error) => return Some(Err(FsError::BadRequest(error))),
        };
        match ask {
            // Above the root is what the table of mounts says.
            Ask::Lookup { name: b".." }
                if call.naming.node(call.request.header.nodeid) == Some(ROOT) =>
            {
                return None;
            }
            Ask::Release { fh } => {
                let node = call.naming.node(call.request.header.nodeid).unwrap_or(0);
                if let Some(handle) = self.calls.table.close(node, fh) {
                    self.drop_later(handle);
                }
                return Some(Ok(reply.done(unique)));
            }
            _ => {}
        }
        if let Some(answer) = self.calls.quick(call, &ask, reply) {
            return Some(answer);
        }
        Some(self.wait(call, &ask, reply))
    }
}
