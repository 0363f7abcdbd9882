//! Handing something to the manager that supervises this daemon.
//!
//! The manager listens; the daemon connects, sends bytes with one descriptor and closes. Source:
//! nydus-snapshotter's supervisor, which waits without a limit for a daemon that was told to send,
//! and insists on a control message.

use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Bytes that a state may have: a thousand mounts with long configs.
const MAX_STATE: usize = 64 << 20;
/// How long the manager may leave what is sent to it unread.
const PATIENCE: Duration = Duration::from_secs(5);

/// Sends `state` with `fd` to the manager that listens on `socket`. Waits, so it belongs on a thread
/// that may.
///
/// # Errors
///
/// Nobody listens there, or does not read within 5 s.
pub fn send(socket: &Path, state: &[u8], fd: BorrowedFd<'_>) -> io::Result<()> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [fd];
    if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::Error::other("no room for a descriptor"));
    }
    let sent = sendmsg(&stream, &[IoSlice::new(state)], &mut control, SendFlags::NOSIGNAL)?;
    stream.write_all(state.get(sent..).unwrap_or_default())
}

/// Receives what the manager that listens on `socket` keeps: its bytes, and its descriptor if there
/// is one. Waits, so it belongs on a thread that may.
///
/// # Errors
///
/// Nobody listens there, nothing comes within 5 s, or more than [`MAX_STATE`] bytes do.
pub fn receive(socket: &Path) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
    let stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let (mut state, mut fd) = (Vec::new(), None);
    let mut buffer = vec![0; 32 * 1024];
    loop {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let received = match recvmsg(&stream, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => continue,
            received => received?,
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                fd = fd.or(fds.into_iter().next());
            }
        }
        if received.bytes == 0 {
            return Ok((state, fd));
        }
        state.extend_from_slice(&buffer[..received.bytes]);
        if state.len() > MAX_STATE {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "more than any state has"));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn bytes_and_one_descriptor_arrive() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let file = tempfile::tempfile().unwrap();
        let (state, sender) = (vec![b'x'; 300_000], path.clone());
        let sending = std::thread::spawn(move || send(&sender, &state, file.as_fd()));
        let (stream, _) = listener.accept().unwrap();
        let (mut got, mut fds) = (0, 0);
        loop {
            let mut buffer = vec![0; 32 * 1024];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut iov = [IoSliceMut::new(&mut buffer)];
            let message = recvmsg(&stream, &mut iov, &mut control, RecvFlags::empty()).unwrap();
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(received) = message {
                    fds += received.count();
                }
            }
            if message.bytes == 0 {
                break;
            }
            got += message.bytes;
        }
        sending.join().unwrap().unwrap();
        assert_eq!((got, fds), (300_000, 1));
        drop(listener);
        assert!(send(&path, b"x", std::io::stdin().as_fd()).is_err(), "nobody listens");
    }
}
