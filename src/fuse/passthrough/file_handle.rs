//! File handles: names of inodes that outlive every descriptor.
//!
//! With a handle, an inode that a guest knows costs no open descriptor and pins nothing in the
//! host's memory. Not every file system has them, and opening one needs `CAP_DAC_READ_SEARCH`.

use std::ffi::{c_int, c_uint};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use smallvec::SmallVec;

/// Bytes of a handle at most: `MAX_HANDLE_SZ`.
const MAX_LEN: usize = 128;

/// Names an inode of one mounted file system, generation included, so it is never used again.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct FileHandle {
    kind: c_int,
    bytes: SmallVec<[u8; 32]>,
}

/// `struct file_handle` of `<fcntl.h>` with room for any handle.
#[repr(C)]
struct RawHandle {
    len: c_uint,
    kind: c_int,
    bytes: [u8; MAX_LEN],
}

impl FileHandle {
    /// The handle of what `fd` refers to; `None` if its file system has none.
    pub(super) fn of(fd: BorrowedFd<'_>) -> io::Result<Option<FileHandle>> {
        let room = c_uint::try_from(MAX_LEN).expect("a small constant");
        let mut raw = RawHandle { len: room, kind: 0, bytes: [0; MAX_LEN] };
        let mut mount_id: c_int = 0;
        // SAFETY: the path is a string that ends with NUL; the kernel writes at most `raw.len` bytes
        // behind the two fields, which is the size of `raw.bytes`, and one `int`.
        let result = unsafe {
            libc::syscall(
                libc::SYS_name_to_handle_at,
                fd.as_raw_fd(),
                c"".as_ptr(),
                &raw mut raw,
                &raw mut mount_id,
                libc::AT_EMPTY_PATH,
            )
        };
        if result < 0 {
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                // ENOSYS and EPERM: a sandbox around us.
                Some(libc::EOPNOTSUPP | libc::EOVERFLOW | libc::ENOSYS | libc::EPERM) => Ok(None),
                _ => Err(error),
            };
        }
        let len = usize::try_from(raw.len).unwrap_or(MAX_LEN).min(MAX_LEN);
        Ok(Some(FileHandle { kind: raw.kind, bytes: SmallVec::from_slice(&raw.bytes[..len]) }))
    }

    /// Opens the inode with `flags` as for `open(2)`; `mount` is any open file of its mount.
    pub(super) fn open(&self, mount: impl AsFd, flags: i32) -> io::Result<OwnedFd> {
        let mut raw = RawHandle {
            len: c_uint::try_from(self.bytes.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
            kind: self.kind,
            bytes: [0; MAX_LEN],
        };
        raw.bytes[..self.bytes.len()].copy_from_slice(&self.bytes);
        // SAFETY: the kernel reads `raw.len` bytes behind the two fields, and `raw.bytes` has them.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_open_by_handle_at,
                mount.as_fd().as_raw_fd(),
                &raw mut raw,
                flags | libc::O_CLOEXEC,
            )
        };
        let fd = c_int::try_from(fd).unwrap_or(-1);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}
