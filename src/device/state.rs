//! What a device hands to the one that goes on with the guest from a snapshot.
//!
//! The VMM stops the rings and has the state written to a descriptor (SAVE); the process that serves
//! the restored guest is given the same bytes (LOAD) before anything else. It is little: what was
//! agreed at INIT, and the chains that each ring holds. Memory and the place of each ring are the
//! VMM's to keep. The bytes move on a thread of their own, which does not wait for a VMM that does
//! not come to take them.
//!
//! A state is (integers little-endian): `rafsd\0\0\x02`, u64 agreed, then for each ring u16 index,
//! u16 used index, u16 number of heads, and u16 each head, the oldest first.

use std::fs::File;
use std::io;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

const MAGIC: [u8; 8] = *b"rafsd\0\0\x02";
/// Longest state: all rings with all their descriptors held are less.
const MAX_LEN: usize = 1 << 20;
/// How long the VMM may take for the next piece.
const LIMIT: Duration = Duration::from_secs(10);
/// A piece that a pipe with room for anything has room for.
const PIECE: usize = 4096;

/// What a device knows about a guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct State {
    /// What was agreed at INIT; 0 if no session is open.
    pub agreed: u64,
    pub rings: Vec<RingState>,
}

/// The chains that a ring holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RingState {
    pub index: u16,
    /// Index of the used ring.
    pub used: u16,
    /// The oldest first.
    pub heads: Vec<u16>,
}

impl State {
    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(self.agreed.to_le_bytes());
        for ring in &self.rings {
            let count = u16::try_from(ring.heads.len()).unwrap_or(u16::MAX);
            let heads = ring.heads.iter().take(usize::from(count));
            for word in [&ring.index, &ring.used, &count].into_iter().chain(heads) {
                bytes.extend(word.to_le_bytes());
            }
        }
        bytes
    }

    /// `None` if these bytes are no state of ours.
    fn from_bytes(bytes: &[u8]) -> Option<State> {
        let (agreed, mut rest) = bytes.strip_prefix(&MAGIC)?.split_first_chunk::<8>()?;
        let mut state = State { agreed: u64::from_le_bytes(*agreed), rings: Vec::new() };
        let mut word = || {
            let (word, left) = rest.split_first_chunk::<2>()?;
            rest = left;
            Some(u16::from_le_bytes(*word))
        };
        while let Some(index) = word() {
            let (used, count) = (word()?, word()?);
            let heads = (0..count).map(|_| word()).collect::<Option<_>>()?;
            state.rings.push(RingState { index, used, heads });
        }
        rest.is_empty().then_some(state)
    }
}

/// A state on its way.
pub(super) enum Transfer {
    Save(Receiver<io::Result<()>>),
    Load(Receiver<io::Result<State>>),
}

impl Transfer {
    /// Begins to write `state` to `file`; the end of the file is the end of the state.
    pub(super) fn save(state: &State, file: File) -> io::Result<Transfer> {
        let bytes = state.to_bytes();
        on_a_thread(move || write(&file, &bytes)).map(Transfer::Save)
    }

    /// Begins to read a state from `file`, up to its end.
    pub(super) fn load(file: File) -> io::Result<Transfer> {
        let work = move || {
            let bytes = read(&file)?;
            let no_state = || io::Error::new(io::ErrorKind::InvalidData, "not a state of rafsd");
            State::from_bytes(&bytes).ok_or_else(no_state)
        };
        on_a_thread(work).map(Transfer::Load)
    }

    /// Waits for its end; returns what was loaded, if something was to be.
    pub(super) fn finish(self) -> io::Result<Option<State>> {
        let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
        match self {
            Transfer::Save(end) => end.recv().map_err(gone)?.map(|()| None),
            Transfer::Load(end) => end.recv().map_err(gone)?.map(Some),
        }
    }
}

fn on_a_thread<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<Receiver<io::Result<T>>> {
    let (send, end) = bounded(1);
    let work = move || drop(send.send(work()));
    std::thread::Builder::new().name("state".into()).spawn(work)?;
    Ok(end)
}

fn write(file: &File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        ready(file, PollFlags::OUT)?;
        let n = rustix::io::write(file, &bytes[..bytes.len().min(PIECE)])?;
        bytes = &bytes[n..];
    }
    Ok(())
}

fn read(file: &File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut piece = [0; PIECE];
    while bytes.len() <= MAX_LEN {
        ready(file, PollFlags::IN)?;
        match rustix::io::read(file, &mut piece)? {
            0 => return Ok(bytes),
            n => bytes.extend_from_slice(&piece[..n]),
        }
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "longer than any state"))
}

/// Waits until the other side has done something, at most [`LIMIT`].
fn ready(file: &File, what: PollFlags) -> io::Result<()> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(file, what)], Some(&left)) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::OwnedFd;

    use super::*;

    fn state(heads: u16) -> State {
        let ring = |index| RingState { index, used: 65_535, heads: (0..heads).rev().collect() };
        State { agreed: 0x1_0002_0003, rings: (0..3).map(ring).collect() }
    }

    fn pipe() -> (File, File) {
        let (read, write) = std::io::pipe().unwrap();
        (File::from(OwnedFd::from(read)), File::from(OwnedFd::from(write)))
    }

    #[test]
    fn the_bytes_of_a_state() {
        let state = State {
            agreed: 0x0102,
            rings: vec![RingState { index: 1, used: 0x0304, heads: vec![7, 0x0506] }],
        };
        let bytes = b"rafsd\0\0\x02\x02\x01\0\0\0\0\0\0\x01\0\x04\x03\x02\0\x07\0\x06\x05";
        assert_eq!(state.to_bytes(), bytes);
        assert_eq!(State::from_bytes(bytes), Some(state));
        for len in 0..bytes.len() {
            let whole = len == 16;
            assert_eq!(State::from_bytes(&bytes[..len]).is_some(), whole, "{len} bytes");
        }
        assert_eq!(State::from_bytes(b"rafsd\0\0\x03\0\0\0\0\0\0\0\0"), None);
    }

    #[test]
    fn a_state_longer_than_a_pipe_goes_through_one() {
        let state = State { rings: vec![state(1024).rings[0].clone(); 65], agreed: 1 };
        let (out, into) = pipe();
        let save = Transfer::save(&state, into).unwrap();
        let load = Transfer::load(out).unwrap();
        assert_eq!(save.finish().unwrap(), None);
        assert_eq!(load.finish().unwrap(), Some(state));
    }

    #[test]
    fn a_vmm_that_goes_and_one_that_sends_something_else() {
        let (out, into) = pipe();
        drop(out);
        assert!(Transfer::save(&state(5), into).unwrap().finish().is_err());
        for bytes in [&b""[..], b"something else", &[0; 2 << 20]] {
            let (out, mut into) = pipe();
            let load = Transfer::load(out).unwrap();
            let _ = into.write_all(bytes);
            drop(into);
            assert!(load.finish().is_err(), "{} bytes", bytes.len());
        }
    }
}
