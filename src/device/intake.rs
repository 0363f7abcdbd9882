//! Vhost-user messages, one whole message at a time.
//!
//! The `vhost` crate reads a message's header, then its body, and gives up on the connection where
//! the two do not come together or the header is not to its liking. Here is what stands before it:
//! a message is handed on only when all of it has arrived, so nothing blocks in the middle of one
//! and the connection can be ended at any time; and one that the crate does not know is taken off the
//! socket and refused, and the next is read.

use std::io::{self, IoSliceMut, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, epoll, poll};
use rustix::net::{RecvAncillaryBuffer, RecvFlags, ReturnFlags, recvmsg};
use vhost::vhost_user::message::{FrontendReq, MAX_MSG_SIZE};

use super::stop::Stop;

/// Length of a message header in bytes: request, flags, size of the body; each u32, native-endian.
const HEADER_LEN: usize = 12;
const VERSION_MASK: u32 = 0x3;
const VERSION: u32 = 0x1;
const REPLY: u32 = 0x4;
const NEED_REPLY: u32 = 0x8;

/// The header of a message that has arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    request: u32,
    flags: u32,
    /// Bytes of the body.
    size: u32,
    /// Whether file descriptors lie in the socket with it.
    sees_files: bool,
}

impl Header {
    /// What is asked for. `None` if we do not know it.
    pub(super) fn request(&self) -> Option<FrontendReq> {
        FrontendReq::try_from(self.request).ok()
    }

    /// Number of the request, also of one we do not know.
    pub(super) fn number(&self) -> u32 {
        self.request
    }

    /// Whether the front end waits for an answer that says if it worked.
    pub(super) fn needs_reply(&self) -> bool {
        self.flags & NEED_REPLY != 0
    }

    /// Whether file descriptors seem to have come where none belong. They may also be those of the
    /// next message: the kernel shows them, too, where that one is in the socket already.
    pub(super) fn has_stray_files(&self) -> bool {
        use FrontendReq as R;
        self.sees_files
            && !matches!(
                self.request(),
                Some(
                    R::SET_MEM_TABLE
                        | R::SET_VRING_CALL
                        | R::SET_VRING_KICK
                        | R::SET_VRING_ERR
                        | R::SET_LOG_BASE
                        | R::SET_LOG_FD
                        | R::SET_BACKEND_REQ_FD
                        | R::SET_INFLIGHT_FD
                        | R::ADD_MEM_REG
                        | R::REM_MEM_REG
                        | R::SET_DEVICE_STATE_FD
                        | R::GPU_SET_SOCKET
                )
            )
    }
}

/// What came next on a connection.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Arrival {
    /// A whole message is in the socket, and there is room for its answer.
    Message(Header),
    /// The front end has gone.
    Gone,
    /// What came is no vhost-user, or the front end went in the middle of a message.
    Broken(&'static str),
    /// We are to end.
    Stopped,
}

/// Waits for messages on a connection.
pub(super) struct Intake {
    stream: UnixStream,
    epoll: OwnedFd,
    /// The front end will not send any more.
    gone: bool,
}

const STREAM: u64 = 0;

impl Intake {
    pub(super) fn new(stream: UnixStream, stop: &Stop) -> io::Result<Intake> {
        use epoll::EventFlags as F;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        // By edge: half a message must not wake us again and again.
        let edge = F::IN | F::RDHUP | F::ET;
        epoll::add(&epoll, &stream, epoll::EventData::new_u64(STREAM), edge)?;
        epoll::add(&epoll, stop, epoll::EventData::new_u64(1), F::IN)?;
        Ok(Intake { stream, epoll, gone: false })
    }

    /// Waits for the next message.
    pub(super) fn next(&mut self, stop: &Stop) -> io::Result<Arrival> {
        loop {
            if stop.is_raised() {
                return Ok(Arrival::Stopped);
            }
            let have = usize::try_from(rustix::io::ioctl_fionread(&self.stream)?)
                .map_err(io::Error::other)?;
            if have >= HEADER_LEN {
                let header = self.peek()?;
                if header.flags & VERSION_MASK != VERSION || header.flags & REPLY != 0 {
                    return Ok(Arrival::Broken("a header that is none"));
                }
                if header.size as usize > MAX_MSG_SIZE {
                    return Ok(Arrival::Broken("a message that is too long"));
                }
                if have >= HEADER_LEN + header.size as usize {
                    return self.await_room(stop, header);
                }
            }
            if self.gone {
                return Ok(match have {
                    0 => Arrival::Gone,
                    _ => Arrival::Broken("the front end went in the middle of a message"),
                });
            }
            self.wait()?;
        }
    }

    fn wait(&mut self) -> io::Result<()> {
        use epoll::EventFlags as F;
        let mut events = Vec::with_capacity(2);
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        for event in &events {
            let flags = event.flags;
            if event.data.u64() == STREAM && flags.intersects(F::RDHUP | F::HUP | F::ERR) {
                self.gone = true;
            }
        }
        Ok(())
    }

    /// A front end that does not read its answers must not keep us from ending: so before a message
    /// is handled, the socket must have room for the answer.
    fn await_room(&self, stop: &Stop, header: Header) -> io::Result<Arrival> {
        let mut fds = [PollFd::new(&self.stream, PollFlags::OUT), PollFd::new(stop, PollFlags::IN)];
        loop {
            match poll(&mut fds, None) {
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        if stop.is_raised() {
            return Ok(Arrival::Stopped);
        }
        Ok(Arrival::Message(header))
    }

    /// Looks at the next header without taking it.
    fn peek(&self) -> io::Result<Header> {
        let mut bytes = [0u8; HEADER_LEN];
        let message = recvmsg(
            &self.stream,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut RecvAncillaryBuffer::default(),
            RecvFlags::PEEK | RecvFlags::DONTWAIT,
        )?;
        let word =
            |i: usize| u32::from_ne_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
        Ok(Header {
            request: word(0),
            flags: word(4),
            size: word(8),
            // We left no room for descriptors: if any were there, they were cut off.
            sees_files: message.flags.contains(ReturnFlags::CTRUNC),
        })
    }

    /// Takes the message that `next` returned off the socket, unread.
    pub(super) fn skip(&mut self, header: Header) -> io::Result<()> {
        let mut rest = [0u8; HEADER_LEN + MAX_MSG_SIZE];
        self.stream.read_exact(&mut rest[..HEADER_LEN + header.size as usize])
    }

    /// Tells the front end that a message did not work.
    pub(super) fn refuse(&mut self, header: Header) -> io::Result<()> {
        let mut answer = [0u8; HEADER_LEN + 8];
        answer[..4].copy_from_slice(&header.request.to_ne_bytes());
        answer[4..8].copy_from_slice(&(VERSION | REPLY).to_ne_bytes());
        answer[8..12].copy_from_slice(&8u32.to_ne_bytes());
        answer[12..].copy_from_slice(&1u64.to_ne_bytes());
        self.stream.write_all(&answer)
    }
}
