//! What a mounted file system does for the server.
//!
//! A file system names its nodes by numbers below `1 << 40`; `mounts` turns them into the node ids
//! a guest sees. The numbers it gets come from a guest: one it did not hand out is
//! [`FsError::Stale`].

use std::borrow::Cow;
use std::error::Error;
use std::sync::Arc;

use super::abi::{self, Attr};
use super::listing::Listing;
use super::reply::Payload;
use super::wait::{Pins, Wait};
use crate::rafs::FormatError;

/// A node and what a guest is told with it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub(super) node: u64,
    pub(super) attr: Attr,
}

/// Operations of one mounted file system. None of them blocks.
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

    /// `None`: there is no such name, and a guest may remember so.
    fn lookup(&self, parent: u64, name: &[u8]) -> Result<Option<Entry>, FsError>;

    /// The directory that holds directory `node`; for the root the root itself.
    fn parent(&self, node: u64) -> Result<Entry, FsError>;

    /// A guest gives back `lookups` of the times it was told about `node`.
    fn forget(&self, node: u64, lookups: u64);

    fn attr(&self, node: u64) -> Result<Attr, FsError>;

    fn readlink(&self, node: u64) -> Result<Cow<'_, [u8]>, FsError>;

    /// `flags` as for `open(2)`.
    fn open(&self, node: u64, flags: u32) -> Result<abi::OpenOut, FsError>;

    fn opendir(&self, node: u64) -> Result<abi::OpenOut, FsError>;

    /// Fills `into` with the bytes from `offset` on, as far as the file goes.
    fn read(
        &self,
        node: u64,
        offset: u64,
        into: &mut Payload<'_>,
        pins: &Pins,
    ) -> Result<(), FsError>;

    /// `whence` is `SEEK_DATA` or `SEEK_HOLE`.
    fn lseek(&self, node: u64, offset: u64, whence: i32) -> Result<u64, FsError>;

    /// Writes entries from `cookie` on until `out` takes no more.
    fn readdir(&self, node: u64, cookie: u64, out: &mut Listing<'_>) -> Result<(), FsError>;

    fn statfs(&self) -> abi::StatfsOut;

    /// Whether `mask` (as for `access(2)`) makes sense on `node`; identities are checked by the
    /// guest's kernel.
    fn access(&self, node: u64, mask: u32) -> Result<(), FsError>;

    fn getxattr(&self, node: u64, name: &[u8]) -> Result<Cow<'_, [u8]>, FsError>;

    /// Calls `each` with the parts of every name, without a NUL.
    fn listxattr(&self, node: u64, each: &mut dyn FnMut(&str, &[u8])) -> Result<(), FsError>;
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
    #[error("no session: INIT has not been sent")]
    NoSession,
    #[error("inode {node} is damaged")]
    Damaged { node: u64, source: FormatError },
    #[error("inode {node}: its chunk {chunk} cannot be read")]
    Unreadable { node: u64, chunk: u32, source: Arc<dyn Error + Send + Sync> },
    #[error("inode {node}: {reason}")]
    Broken { node: u64, reason: &'static str },
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
