//! Unix sockets that the daemon listens on: bound in place of stale ones, removed at the end.

use std::fs;
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::net::{AddressFamily, sockopt};

/// Why a path cannot become a socket.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SocketError {
    #[error("socket {}: another process listens there", path.display())]
    InUse { path: PathBuf },
    #[error("socket {}: there is a file that is not a socket", path.display())]
    NotASocket { path: PathBuf },
    #[error("socket {}: the daemon is ending", path.display())]
    Ending { path: PathBuf },
    #[error("socket: there is no group {group}")]
    NoGroup { group: String },
    #[error("descriptor {fd}: {reason}")]
    Inherited { fd: RawFd, reason: String },
    #[error("socket {}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

/// The sockets of this process, so that any phase of its life can remove them.
#[derive(Debug, Default)]
pub struct Sockets(Mutex<Files>);

#[derive(Debug, Default)]
struct Files {
    bound: Vec<Bound>,
    /// No more sockets: they have been removed.
    ending: bool,
}

/// A socket file as we made it: device and inode tell it from one that replaced it.
#[derive(Debug)]
struct Bound {
    path: PathBuf,
    dev: u64,
    ino: u64,
}

impl Sockets {
    /// Listens on `path`, relative to the working directory. A socket that nobody listens on is
    /// replaced.
    ///
    /// # Errors
    ///
    /// Another process listens there, the file is of another kind, or the kernel refuses: most often
    /// because the directory is missing or the path has more than 107 bytes.
    pub fn listen(&self, path: &Path) -> Result<UnixListener, SocketError> {
        let fail = |source| SocketError::Io { path: path.to_owned(), source };
        let path = std::path::absolute(path).map_err(fail)?;
        match fs::symlink_metadata(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(fail(e)),
            Ok(meta) if !meta.file_type().is_socket() => {
                return Err(SocketError::NotASocket { path });
            }
            Ok(_) if UnixStream::connect(&path).is_ok() => return Err(SocketError::InUse { path }),
            Ok(_) => match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(fail(e)),
                _ => {}
            },
        }
        let listener = UnixListener::bind(&path).map_err(fail)?;
        let meta = fs::symlink_metadata(&path).map_err(fail)?;
        let bound = Bound { path, dev: meta.dev(), ino: meta.ino() };
        let mut files = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if files.ending {
            drop(files);
            bound.remove();
            return Err(SocketError::Ending { path: bound.path });
        }
        files.bound.push(bound);
        Ok(listener)
    }

    /// Lets members of `group`, a name or a number, connect to the socket at `path`.
    ///
    /// # Errors
    ///
    /// There is no such group, or the kernel refuses.
    pub fn give_to_group(path: &Path, group: &str) -> Result<(), SocketError> {
        let fail = |source| SocketError::Io { path: path.to_owned(), source };
        let gid = match group.parse() {
            Ok(gid) => gid,
            Err(_) => group_id(&fs::read_to_string("/etc/group").map_err(fail)?, group)
                .ok_or_else(|| SocketError::NoGroup { group: group.to_owned() })?,
        };
        std::os::unix::fs::chown(path, None, Some(gid)).map_err(fail)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o660)).map_err(fail)
    }

    /// A socket that the parent has left open as descriptor `fd`.
    ///
    /// # Errors
    ///
    /// It is no unix socket that listens.
    pub fn inherited(fd: RawFd) -> Result<UnixListener, SocketError> {
        let bad = |reason: String| SocketError::Inherited { fd, reason };
        if fd < 0 {
            return Err(bad("not a descriptor".into()));
        }
        // SAFETY: only borrowed for the questions below; if it is not open they fail with EBADF.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
        let domain = sockopt::socket_domain(borrowed).map_err(|e| bad(e.to_string()))?;
        let listens = sockopt::socket_acceptconn(borrowed).map_err(|e| bad(e.to_string()))?;
        if domain != AddressFamily::UNIX || !listens {
            return Err(bad("not a unix socket that listens".into()));
        }
        // A copy, so that nothing else that is open under this number is closed with it.
        let copy = borrowed.try_clone_to_owned().map_err(|e| bad(e.to_string()))?;
        Ok(copy.into())
    }

    /// Removes the sockets that are still ours, and lets no new one be made. A missing one is fine.
    pub fn remove_all(&self) {
        let mut files = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        files.ending = true;
        let bound = std::mem::take(&mut files.bound);
        drop(files);
        bound.iter().for_each(Bound::remove);
    }
}

/// The number of `group` in the text of `/etc/group`.
fn group_id(text: &str, group: &str) -> Option<u32> {
    let mut lines = text.lines().map(|line| line.split(':'));
    lines.find_map(|mut fields| {
        let name = fields.next()?;
        let id = fields.nth(1)?;
        (name == group).then(|| id.parse().ok())?
    })
}

impl Bound {
    fn remove(&self) {
        let Bound { path, dev, ino } = self;
        match fs::symlink_metadata(path) {
            Ok(meta) if (meta.dev(), meta.ino()) == (*dev, *ino) => {
                if let Err(e) = fs::remove_file(path) {
                    log::warn!("socket {}: not removed: {e}", path.display());
                }
            }
            _ => log::debug!("socket {}: is gone or no longer ours", path.display()),
        }
    }
}

impl Drop for Sockets {
    fn drop(&mut self) {
        self.remove_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stale_sockets_are_replaced_live_ones_and_files_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "a stale socket");
        let sockets = Sockets::default();
        let listener = sockets.listen(&path).unwrap();
        let again = Sockets::default().listen(&path);
        assert!(matches!(again, Err(SocketError::InUse { .. })), "{again:?}");
        drop(listener);
        sockets.remove_all();
        assert!(!path.exists());
        let late = sockets.listen(&path);
        assert!(matches!(late, Err(SocketError::Ending { .. })), "{late:?}");
        assert!(!path.exists());

        fs::write(&path, "precious").unwrap();
        let file = Sockets::default().listen(&path);
        assert!(matches!(file, Err(SocketError::NotASocket { .. })), "{file:?}");
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_socket_that_replaced_ours_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let sockets = Sockets::default();
        let _ours = sockets.listen(&path).unwrap();
        fs::rename(&path, dir.path().join("moved")).unwrap();
        let _theirs = UnixListener::bind(&path).unwrap();
        sockets.remove_all();
        assert!(path.exists());
    }

    #[test]
    fn a_group_is_a_name_or_a_number() {
        let text = "root:x:0:\nkvm:x:104:libvirt,qemu\nbroken\nkvm2:x:nonsense:\n";
        assert_eq!(group_id(text, "kvm"), Some(104));
        assert_eq!(group_id(text, "root"), Some(0));
        assert_eq!((group_id(text, "kv"), group_id(text, "kvm2")), (None, None));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let sockets = Sockets::default();
        let _listener = sockets.listen(&path).unwrap();
        let own = fs::metadata(&path).unwrap().gid();
        Sockets::give_to_group(&path, &own.to_string()).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o660);
        let error = Sockets::give_to_group(&path, "no such group").unwrap_err();
        assert!(matches!(error, SocketError::NoGroup { .. }), "{error}");
    }

    #[test]
    fn an_inherited_socket_must_listen() {
        use std::os::fd::AsRawFd;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let taken = Sockets::inherited(listener.as_raw_fd()).unwrap();
        let _client = UnixStream::connect(&path).unwrap();
        taken.accept().unwrap();
        let file = tempfile::tempfile().unwrap();
        let (one, _other) = UnixStream::pair().unwrap();
        for fd in [file.as_raw_fd(), one.as_raw_fd(), 999_999, -1] {
            assert!(Sockets::inherited(fd).is_err(), "{fd}");
        }
    }

    #[test]
    fn an_impossible_path_is_named() {
        let error = Sockets::default().listen(Path::new("/no/such/dir/s")).unwrap_err();
        assert!(error.to_string().contains("/no/such/dir/s"), "{error}");
        let long = format!("/tmp/{}", "x".repeat(120));
        assert!(matches!(Sockets::default().listen(Path::new(&long)), Err(SocketError::Io { .. })));
    }
}
