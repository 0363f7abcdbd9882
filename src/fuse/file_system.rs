//! What a mounted file system does for the server.
//!
//! A file system names its nodes by numbers below `1 << 40`; `mounts` turns them into the node ids
//! a guest sees. The numbers it gets come from a guest: one it did not hand out is
//! [`FsError::Stale`].

use std::borrow::Cow;
use std::error::Error;
use std::io;
use std::sync::Arc;

use rustix::io::Errno;

use super::abi::{self, Attr};
use super::dax::{Extent, Mapping};
use super::file_stats::FileStats;
use super::listing::Listing;
use super::mounts::Naming;
use super::reply::{Payload, Reply};
use super::request::{Request, RequestError};
use super::session::Terms;
use super::wait::{Pins, Wait};
use crate::rafs::FormatError;

/// A node and what a guest is told with it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub(super) node: u64,
    pub(super) attr: Attr,
}

/// A request that a file system serves whole.
#[derive(Clone, Copy)]
pub(super) struct Call<'a> {
    pub(super) request: &'a Request,
    pub(super) terms: Terms,
    pub(super) naming: Naming,
}

/// Operations of one mounted file system. None of them blocks.
///
/// One that can be written serves requests whole; the methods from `lookup` on are not asked then,
/// but for `attr` of its root.
pub(super) trait FileSystem: Send + Sync {
    /// What logs call it.
    fn name(&self) -> &str;

    /// Its root directory.
    fn root(&self) -> u64;

    /// What tells it from every other file system, now and when the daemon is started again: with
    /// the same identity, the same numbers mean the same nodes. `None`: it has no lasting numbers.
    fn identity(&self) -> Option<[u8; 32]>;

    /// Whether `Attr::ino` are numbers of its own, which another file system of the kind uses as
    /// well.
    fn counts_inodes(&self) -> bool;

    /// Seconds for which a guest may remember names, also missing ones, and attributes.
    fn valid_secs(&self) -> u64;

    /// Never changes, so that nothing need be asked twice.
    fn immutable(&self) -> bool;

    /// Whether some node may have extended attributes.
    fn has_xattrs(&self) -> bool;

    /// Where to record what is done with each file, if somebody wants to know.
    fn file_stats(&self) -> Option<Arc<FileStats>> {
        None
    }

    /// Whether the guest knows numbers here that mean nothing to another process.
    fn remembers(&self) -> bool {
        false
    }

    /// A guest has come or gone: it knows no nodes and has nothing open.
    fn end_session(&self) {}

    /// Answers a request itself; `None`: by the methods below. Returns the bytes written.
    fn serve(
        &self,
        _call: &Call<'_>,
        _reply: &mut Reply<'_>,
        _pins: &Pins,
    ) -> Option<Result<u32, FsError>> {
        None
    }

    /// `None`: there is no such name, and a guest may remember so.
    fn lookup(&self, _parent: u64, _name: &[u8]) -> Result<Option<Entry>, FsError> {
        Err(FsError::Unknown)
    }

    /// The directory that holds directory `node`; for the root the root itself.
    fn parent(&self, _node: u64) -> Result<Entry, FsError> {
        Err(FsError::Unknown)
    }

    /// A guest gives back `lookups` of the times it was told about `node`.
    fn forget(&self, node: u64, lookups: u64);

    fn attr(&self, node: u64) -> Result<Attr, FsError>;

    fn readlink(&self, _node: u64) -> Result<Cow<'_, [u8]>, FsError> {
        Err(FsError::Unknown)
    }

    /// `flags` as for `open(2)`.
    fn open(&self, _node: u64, _flags: u32) -> Result<abi::OpenOut, FsError> {
        Err(FsError::Unknown)
    }

    fn opendir(&self, _node: u64) -> Result<abi::OpenOut, FsError> {
        Err(FsError::Unknown)
    }

    /// Fills `into` with the bytes from `offset` on, as far as the file goes.
    fn read(
        &self,
        _node: u64,
        _offset: u64,
        _into: &mut Payload<'_>,
        _pins: &Pins,
    ) -> Result<(), FsError> {
        Err(FsError::Unknown)
    }

    /// The parts of cache files that hold `len` bytes from `offset` on, as far as the file goes.
    fn extents(
        &self,
        _node: u64,
        _offset: u64,
        _len: u64,
        _pins: &Pins,
    ) -> Result<Vec<Extent>, FsError> {
        Err(FsError::Unknown)
    }

    /// Whether a regular file should be read through a DAX window.
    fn maps_well(&self, _node: u64, _mapping: Mapping) -> bool {
        false
    }

    /// `whence` is `SEEK_DATA` or `SEEK_HOLE`.
    fn lseek(&self, _node: u64, _offset: u64, _whence: i32) -> Result<u64, FsError> {
        Err(FsError::Unknown)
    }

    /// Writes entries from `cookie` on until `out` takes no more.
    fn readdir(&self, _node: u64, _cookie: u64, _out: &mut Listing<'_>) -> Result<(), FsError> {
        Err(FsError::Unknown)
    }

    fn statfs(&self) -> abi::StatfsOut {
        abi::StatfsOut::default()
    }

    /// Whether `mask` (as for `access(2)`) makes sense on `node`; identities are checked by the
    /// guest's kernel.
    fn access(&self, _node: u64, _mask: u32) -> Result<(), FsError> {
        Err(FsError::Unknown)
    }

    fn getxattr(&self, _node: u64, _name: &[u8]) -> Result<Cow<'_, [u8]>, FsError> {
        Err(FsError::Unknown)
    }

    /// Calls `each` with the parts of every name, without a NUL.
    fn listxattr(&self, _node: u64, _each: &mut dyn FnMut(&str, &[u8])) -> Result<(), FsError> {
        Err(FsError::Unknown)
    }
}

/// Why an operation did not give an answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum FsError {
    /// Not an error: the answer is not ready.
    #[error("waits")]
    Wait(Wait),
    #[error("no such node")]
    Stale,
    #[error("no such name")]
    NoEntry,
    #[error("no such attribute")]
    NoAttribute,
    #[error("not a directory")]
    NotDirectory,
    #[error("a directory")]
    IsDirectory,
    #[error("not possible on a node of this type")]
    WrongType,
    #[error("not a possible argument")]
    InvalidArgument,
    #[error("behind the end of the file")]
    PastEnd,
    #[error("the buffer is too small")]
    SmallBuffer,
    #[error("not executable")]
    NotExecutable,
    #[error("the file system cannot be written")]
    ReadOnly,
    #[error("the server does not know the operation")]
    Unknown,
    /// The host's kernel said no.
    #[error("{0}")]
    Host(#[from] Errno),
    #[error(transparent)]
    BadRequest(RequestError),
    #[error("no session: INIT has not been sent")]
    NoSession,
    #[error("inode {node} is damaged")]
    Damaged { node: u64, source: FormatError },
    #[error("inode {node}: its chunk {chunk} cannot be read")]
    Unreadable { node: u64, chunk: u32, source: Arc<dyn Error + Send + Sync> },
    #[error("inode {node}: {reason}")]
    Broken { node: u64, reason: &'static str },
}

impl From<io::Error> for FsError {
    fn from(error: io::Error) -> FsError {
        FsError::Host(Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }
}

impl FsError {
    /// What a guest is told; positive.
    pub(super) fn errno(&self) -> i32 {
        match self {
            FsError::Stale => libc::ESTALE,
            FsError::NoEntry => libc::ENOENT,
            FsError::NoAttribute => libc::ENODATA,
            FsError::NotDirectory => libc::ENOTDIR,
            FsError::IsDirectory => libc::EISDIR,
            FsError::WrongType | FsError::InvalidArgument => libc::EINVAL,
            FsError::PastEnd => libc::ENXIO,
            FsError::SmallBuffer => libc::ERANGE,
            FsError::NotExecutable => libc::EACCES,
            FsError::ReadOnly => libc::EROFS,
            FsError::Unknown => libc::ENOSYS,
            FsError::Host(errno) => errno.raw_os_error(),
            FsError::BadRequest(error) => error.errno(),
            FsError::Wait(_)
            | FsError::NoSession
            | FsError::Damaged { .. }
            | FsError::Unreadable { .. }
            | FsError::Broken { .. } => libc::EIO,
        }
    }

    /// Whether an operator should hear of it: something here is broken, not the request.
    pub(super) fn is_fault(&self) -> bool {
        matches!(
            self,
            FsError::Damaged { .. } | FsError::Unreadable { .. } | FsError::Broken { .. }
        )
    }
}

/// An error with all its causes on one line.
pub(super) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
