//! The socket a VMM connects to.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use super::DeviceError;

/// Longest socket path the kernel takes, in bytes, without the NUL behind it.
const MAX_PATH_LEN: usize = 107;

/// A listening socket. The file of one that was bound here is removed with it, unless another
/// process has put its own in that place.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    file: Option<SocketFile>,
}

#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    /// Device and inode, to know it again.
    identity: (u64, u64),
}

impl Listener {
    /// Binds a socket to `path`, in place of a socket that was there. VMMs can connect as soon as
    /// this returns; they are served when `Device::serve` runs.
    pub fn bind(path: &Path) -> Result<Listener, DeviceError> {
        let len = path.as_os_str().as_bytes().len();
        if len > MAX_PATH_LEN {
            return Err(DeviceError::PathTooLong { path: path.to_owned(), len });
        }
        let failed = |source| DeviceError::Listen { path: path.to_owned(), source };
        match std::fs::symlink_metadata(path) {
            Ok(meta) if !meta.file_type().is_socket() => {
                return Err(DeviceError::NotASocket(path.to_owned()));
            }
            Ok(_) => remove(path).map_err(failed)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(failed(e)),
        }
        let socket = UnixListener::bind(path).map_err(failed)?;
        let meta = std::fs::symlink_metadata(path).map_err(failed)?;
        let mut listener = Listener::from_socket(socket).map_err(failed)?;
        listener.file =
            Some(SocketFile { path: path.to_owned(), identity: (meta.dev(), meta.ino()) });
        Ok(listener)
    }

    /// Takes over a socket that listens already, for instance one that was passed to the process.
    pub fn from_socket(socket: UnixListener) -> io::Result<Listener> {
        socket.set_nonblocking(true)?;
        Ok(Listener { socket, file: None })
    }

    /// The next VMM. `None` if it went away again before it was its turn.
    pub(super) fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.socket.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                Ok(Some(stream))
            }
            Err(e) if is_transient(&e) => Ok(None),
            Err(e) => Err(e),
        }
    }
}

fn is_transient(e: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    matches!(e.kind(), ConnectionAborted | Interrupted | WouldBlock)
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let Some(file) = &self.file else { return };
        let ours = std::fs::symlink_metadata(&file.path)
            .is_ok_and(|meta| (meta.dev(), meta.ino()) == file.identity);
        if ours && let Err(e) = remove(&file.path) {
            log::warn!("socket {:?}: removing it: {e}", file.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_socket_is_replaced_and_ours_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fs.sock");
        let stale = UnixListener::bind(&path).unwrap();
        drop(stale);
        let listener = Listener::bind(&path).unwrap();
        let _vmm = UnixStream::connect(&path).unwrap();
        assert!(listener.accept().unwrap().is_some());
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn the_socket_of_a_successor_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fs.sock");
        let first = Listener::bind(&path).unwrap();
        let second = Listener::bind(&path).unwrap();
        drop(first);
        assert!(UnixStream::connect(&path).is_ok());
        assert!(second.accept().unwrap().is_some());
    }

    #[test]
    fn what_cannot_be_listened_on() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "kept").unwrap();
        assert!(matches!(Listener::bind(&file), Err(DeviceError::NotASocket(_))));
        assert_eq!(std::fs::read(&file).unwrap(), b"kept");
        let long = dir.path().join("s".repeat(108));
        assert!(matches!(Listener::bind(&long), Err(DeviceError::PathTooLong { .. })));
        assert!(matches!(
            Listener::bind(&dir.path().join("no/such/dir")),
            Err(DeviceError::Listen { .. })
        ));
    }
}
