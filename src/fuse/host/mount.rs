//! Mounting a FUSE device on a directory of the host, and unmounting it.
//!
//! With `mount(2)` where this process may, else with the set-uid program `fusermount3`.

use std::fs;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
    recvmsg, socketpair,
};

/// What the kernel and tools call the file system.
const TYPE: &str = "fuse.rafsd";
const HELPERS: [&str; 2] = ["fusermount3", "fusermount"];

/// Why a directory was not mounted on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MountHostError {
    #[error("mountpoint {}", path.display())]
    Mountpoint { path: PathBuf, source: io::Error },
    #[error("mountpoint {} is not a directory", path.display())]
    NotADirectory { path: PathBuf },
    #[error("/dev/fuse")]
    Device(#[source] io::Error),
    #[error("mounting on {}", path.display())]
    Mount { path: PathBuf, source: io::Error },
    #[error("mounting on {} with {program}: {reason}", path.display())]
    Helper { path: PathBuf, program: &'static str, reason: String },
}

/// A directory of the host on which a FUSE device is mounted.
#[derive(Clone, Debug)]
pub struct HostMount {
    path: PathBuf,
}

impl HostMount {
    /// Mounts on `path`. A mount there whose daemon is gone is taken away first. Returns the device
    /// on which requests will come, with INIT as the first.
    ///
    /// # Errors
    ///
    /// The directory is missing, or the kernel refuses.
    pub fn new(path: &Path, writable: bool) -> Result<(HostMount, OwnedFd), MountHostError> {
        let path = std::path::absolute(path)
            .map_err(|source| MountHostError::Mountpoint { path: path.to_owned(), source })?;
        let mount = HostMount { path };
        mount.check()?;
        let device = super::open_device().map_err(MountHostError::Device)?;
        match mount.mount(&device, writable) {
            Ok(()) => Ok((mount, device)),
            Err(Errno::PERM) => mount.mount_with_helper(writable).map(|device| (mount, device)),
            Err(e) => Err(MountHostError::Mount { path: mount.path, source: e.into() }),
        }
    }

    /// A mount that another process made.
    pub fn adopt(path: &Path) -> io::Result<HostMount> {
        Ok(HostMount { path: std::path::absolute(path)? })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    fn check(&self) -> Result<(), MountHostError> {
        let path = &self.path;
        let meta = match fs::metadata(path) {
            // A daemon has died there.
            Err(e) if e.raw_os_error() == Some(libc::ENOTCONN) => {
                log::warn!(
                    "mountpoint {}: taking away a mount whose daemon is gone",
                    path.display()
                );
                self.unmount();
                fs::metadata(path)
            }
            other => other,
        };
        match meta {
            Ok(meta) if meta.is_dir() => Ok(()),
            Ok(_) => Err(MountHostError::NotADirectory { path: path.clone() }),
            Err(source) => Err(MountHostError::Mountpoint { path: path.clone(), source }),
        }
    }

    fn mount(&self, device: &OwnedFd, writable: bool) -> rustix::io::Result<()> {
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other",
            device.as_raw_fd()
        );
        let options = std::ffi::CString::new(options).map_err(|_| Errno::INVAL)?;
        let mut flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOATIME;
        if !writable {
            flags |= MountFlags::RDONLY;
        }
        rustix::mount::mount("rafsd", &self.path, TYPE, flags, options.as_c_str())
    }

    /// The helper opens and mounts the device, and sends it back over a socket.
    fn mount_with_helper(&self, writable: bool) -> Result<OwnedFd, MountHostError> {
        let failed = |program, reason: String| MountHostError::Helper {
            path: self.path.clone(),
            program,
            reason,
        };
        let io_failed = |e: io::Error| failed(HELPERS[0], e.to_string());
        // Inherited by the helper: without CLOEXEC.
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::empty(), None)
                .map_err(|e| io_failed(e.into()))?;
        rustix::io::fcntl_setfd(&ours, rustix::io::FdFlags::CLOEXEC)
            .map_err(|e| io_failed(e.into()))?;
        let access = if writable { "rw" } else { "ro" };
        let options =
            format!("fsname=rafsd,subtype=rafsd,default_permissions,noatime,nosuid,nodev,{access}");
        let mut program = HELPERS[0];
        let mut output = Err(io::ErrorKind::NotFound.into());
        for helper in HELPERS {
            program = helper;
            output = Command::new(helper)
                .args(["-o", &options, "--"])
                .arg(&self.path)
                .env("_FUSE_COMMFD", theirs.as_raw_fd().to_string())
                .stdin(Stdio::null())
                .output();
            if !matches!(&output, Err(e) if e.kind() == io::ErrorKind::NotFound) {
                break;
            }
        }
        drop(theirs);
        let output = output.map_err(|e| failed(program, e.to_string()))?;
        if !output.status.success() {
            let reason = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
            return Err(failed(program, reason));
        }
        receive_fd(&ours, &mut [0; 16])
            .map_err(|e| failed(program, e.to_string()))?
            .1
            .ok_or_else(|| failed(program, "it sent no descriptor".into()))
    }

    /// Takes the mount out of the tree at once, even if it is busy: who has files open there keeps
    /// them as long as somebody answers.
    pub fn unmount(&self) {
        let error = match rustix::mount::unmount(&self.path, UnmountFlags::DETACH) {
            // EINVAL: it is mounted no more.
            Ok(()) | Err(Errno::INVAL) => return,
            Err(Errno::PERM) => match self.unmount_with_helper() {
                Ok(()) => return,
                Err(e) => e,
            },
            Err(e) => e.into(),
        };
        log::error!("mountpoint {}: unmounting: {error}", self.path.display());
    }

    fn unmount_with_helper(&self) -> io::Result<()> {
        let mut last = io::ErrorKind::NotFound.into();
        for helper in HELPERS {
            let mut command = Command::new(helper);
            command.args(["-u", "-z", "-q", "--"]).arg(&self.path).stdin(Stdio::null());
            match command.status() {
                Ok(status) if status.success() => return Ok(()),
                Ok(status) => last = io::Error::other(format!("{helper}: {status}")),
                Err(e) => last = e,
            }
        }
        Err(last)
    }
}

/// Whether a FUSE file system is mounted on `path`. Does not ask it, so it may be one whose daemon
/// is gone or hangs.
///
/// # Errors
///
/// The list of mounts cannot be read.
pub fn is_mounted(path: &Path) -> io::Result<bool> {
    let path = std::path::absolute(path)?;
    let mounts = fs::read("/proc/self/mountinfo")?;
    Ok(mounts.split(|&b| b == b'\n').any(|line| {
        let mut fields = line.split(|&b| b == b' ');
        let at = fields.nth(4).map(unescape);
        let kind = fields.skip_while(|field| *field != b"-").nth(1);
        at.as_deref() == Some(path.as_os_str().as_bytes())
            && kind.is_some_and(|kind| kind.starts_with(b"fuse"))
    }))
}

/// A path as it is in mountinfo, where blanks are written as octal numbers.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, behind)) = rest.split_first() {
        let number = |digits: &[u8]| {
            digits.iter().try_fold(0_u8, |n, digit| match digit {
                b'0'..=b'7' => n.checked_mul(8)?.checked_add(digit - b'0'),
                _ => None,
            })
        };
        match behind.split_at_checked(3) {
            Some((digits, behind)) if first == b'\\' && number(digits).is_some() => {
                bytes.extend(number(digits));
                rest = behind;
            }
            _ => {
                bytes.push(first);
                rest = behind;
            }
        }
    }
    bytes
}

/// Receives bytes and at most one descriptor.
fn receive_fd(socket: impl AsFd, bytes: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(bytes)];
    let received = recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    Ok((received.bytes, fds.next().and_then(|mut fds| fds.next())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_in_the_list_of_mounts_are_read() {
        // (as written, as meant)
        let cases: [(&[u8], &[u8]); 4] = [
            (b"/mnt", b"/mnt"),
            (b"/with\\040blank", b"/with blank"),
            (b"/back\\134slash\\", b"/back\\slash\\"),
            (b"\\0411\\999", b"!1\\999"),
        ];
        for (written, meant) in cases {
            assert_eq!(unescape(written), meant);
        }
        assert!(!is_mounted(Path::new("/")).unwrap(), "no FUSE file system");
    }
}
