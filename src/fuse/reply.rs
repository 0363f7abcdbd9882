//! Where an answer goes.
//!
//! Answers are written piece by piece into the writable part of a descriptor chain, which lies in
//! guest memory and is cut anywhere. File data goes there straight from the file. The length that
//! comes back is what was written, and the header says the same.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use smallvec::SmallVec;
use vm_memory::VolatileSlice;
use zerocopy::{Immutable, IntoBytes};

use super::abi::OutHeader;

/// Bytes of the header that starts every answer.
const HEADER: usize = size_of::<OutHeader>();
/// Most buffers one `preadv` takes: `UIO_MAXIOV`.
const IOV_MAX: usize = 1024;

/// The buffers for one answer.
pub struct Reply<'a> {
    slices: &'a [VolatileSlice<'a>],
    /// Bytes of all slices together.
    capacity: usize,
    /// What was sent: errno, and bytes behind the header.
    sent: (i32, u32),
}

impl<'a> Reply<'a> {
    /// An answer into `slices`, in this order; they may be few, short or none.
    pub fn new(slices: &'a [VolatileSlice<'a>]) -> Self {
        let capacity = slices.iter().fold(0, |sum: usize, slice| sum.saturating_add(slice.len()));
        Reply { slices, capacity, sent: (0, 0) }
    }

    /// What was sent: errno (0: none) and bytes behind the header.
    pub(super) fn sent(&self) -> (i32, u32) {
        self.sent
    }

    /// Bytes there are for what follows the header.
    pub(super) fn room(&self) -> usize {
        self.capacity.saturating_sub(HEADER)
    }

    /// Place for at most `limit` bytes behind the header. [`Reply::finish`] sends them.
    pub(super) fn payload(&mut self, limit: usize) -> Payload<'a> {
        Payload::new(self.slices, HEADER, limit.min(self.room()))
    }

    /// Sends what a [`Payload`] got: writes the header. Returns the bytes of the whole answer.
    pub(super) fn finish(&mut self, unique: u64, payload: &Payload<'_>) -> u32 {
        self.header(unique, 0, payload.written)
    }

    /// Sends `value`.
    pub(super) fn send<T: IntoBytes + Immutable>(&mut self, unique: u64, value: &T) -> u32 {
        self.bytes(unique, value.as_bytes())
    }

    /// Sends `payload`, or ERANGE if the guest left too little room.
    pub(super) fn bytes(&mut self, unique: u64, payload: &[u8]) -> u32 {
        if !self.payload(usize::MAX).put(payload) {
            return self.error(unique, libc::ERANGE);
        }
        self.header(unique, 0, payload.len())
    }

    /// Sends an answer without a body.
    pub(super) fn done(&mut self, unique: u64) -> u32 {
        self.header(unique, 0, 0)
    }

    /// Sends `errno`, which is positive.
    pub(super) fn error(&mut self, unique: u64, errno: i32) -> u32 {
        self.header(unique, -errno, 0)
    }

    /// Nothing is written, and 0 returned, where not even a header fits.
    fn header(&mut self, unique: u64, error: i32, payload: usize) -> u32 {
        let Ok(len) = u32::try_from(HEADER + payload) else {
            return self.error(unique, libc::EIO);
        };
        let header = OutHeader { len, error, unique };
        self.sent = (-error, u32::try_from(payload).unwrap_or(0));
        let fits = Payload::new(self.slices, 0, self.capacity).put(header.as_bytes());
        if fits { len } else { 0 }
    }
}

/// A place in guest memory that is filled from front to end.
pub(super) struct Payload<'a> {
    /// Buffers that are not full; of the first, `filled` bytes are.
    slices: &'a [VolatileSlice<'a>],
    filled: usize,
    /// Bytes that may still be written; the slices have them.
    room: usize,
    written: usize,
}

impl<'a> Payload<'a> {
    /// `skip + room` bytes must be in the slices.
    fn new(slices: &'a [VolatileSlice<'a>], skip: usize, room: usize) -> Self {
        let mut payload = Payload { slices, filled: 0, room, written: 0 };
        payload.skip(skip);
        payload
    }

    /// Bytes that may still be written.
    pub(super) fn room(&self) -> usize {
        self.room
    }

    /// Moves over `len` bytes of the buffers.
    fn skip(&mut self, mut len: usize) {
        while let Some((first, rest)) = self.slices.split_first() {
            let left = first.len() - self.filled;
            if len < left {
                self.filled += len;
                return;
            }
            len -= left;
            self.slices = rest;
            self.filled = 0;
        }
    }

    /// Counts `len` bytes as written, once they are.
    fn advance(&mut self, len: usize) {
        self.skip(len);
        self.room -= len;
        self.written += len;
    }

    /// Writes all of `bytes`, or nothing and returns false if there is too little room.
    #[must_use]
    pub(super) fn put(&mut self, mut bytes: &[u8]) -> bool {
        if bytes.len() > self.room {
            return false;
        }
        while !bytes.is_empty() {
            let Some(Ok(target)) = self.slices.first().map(|s| s.offset(self.filled)) else {
                return false;
            };
            let len = target.len().min(bytes.len());
            target.copy_from(&bytes[..len]);
            bytes = &bytes[len..];
            self.advance(len);
        }
        true
    }

    /// Writes `len` bytes of `file` from `offset` (bytes) on, as far as there is room; fewer are
    /// written only if the file ends before.
    pub(super) fn put_file(
        &mut self,
        file: BorrowedFd<'_>,
        offset: u64,
        len: usize,
    ) -> io::Result<usize> {
        self.put_from(file, offset, len, 0)
    }

    /// As [`Self::put_file`] from the host's page cache only: [`io::ErrorKind::WouldBlock`] if
    /// something is not there, and then it does not matter what was written;
    /// [`io::ErrorKind::Unsupported`] if the file system cannot tell.
    pub(super) fn put_cached(
        &mut self,
        file: BorrowedFd<'_>,
        offset: u64,
        len: usize,
    ) -> io::Result<usize> {
        self.put_from(file, offset, len, libc::RWF_NOWAIT)
    }

    /// `flags` as for `preadv2(2)`.
    fn put_from(
        &mut self,
        file: BorrowedFd<'_>,
        offset: u64,
        len: usize,
        flags: libc::c_int,
    ) -> io::Result<usize> {
        let len = len.min(self.room);
        let mut done = 0;
        while done < len {
            let iov = self.buffers(len - done);
            let at = u64::try_from(done)
                .ok()
                .and_then(|done| offset.checked_add(done))
                .and_then(|at| i64::try_from(at).ok())
                .ok_or(io::ErrorKind::InvalidInput)?;
            // SAFETY: `buffers` took every element from a `VolatileSlice` that lives for 'a, so it
            // is mapped and writable until the call returns.
            match unsafe { read_into_guest(file, &iov, at, flags) } {
                Ok(0) => break,
                Ok(n) => {
                    self.advance(n);
                    done += n;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(done)
    }

    /// The next `len` bytes of the buffers, or as many as one system call takes.
    fn buffers(&self, mut len: usize) -> SmallVec<[libc::iovec; 40]> {
        let mut iov: SmallVec<[libc::iovec; 40]> = SmallVec::new();
        let mut filled = self.filled;
        for slice in self.slices {
            let Ok(target) = slice.offset(std::mem::take(&mut filled)) else { break };
            let take = target.len().min(len);
            let start = target.ptr_guard_mut().as_ptr();
            len -= take;
            let full = iov.len() == IOV_MAX;
            match iov.last_mut() {
                // The guest's pages often lie one behind the other.
                Some(last) if last.iov_base.cast::<u8>().wrapping_add(last.iov_len) == start => {
                    last.iov_len += take;
                }
                _ if full => break,
                _ => iov.push(libc::iovec { iov_base: start.cast(), iov_len: take }),
            }
            if len == 0 {
                break;
            }
        }
        iov
    }
}

/// Reads from `file` at `offset` (bytes) into guest memory described by `iov`; `flags` as for
/// `preadv2(2)`.
///
/// # Safety
///
/// Every element of `iov` must lie in a mapping that stays mapped until the call returns.
unsafe fn read_into_guest(
    file: BorrowedFd<'_>,
    iov: &[libc::iovec],
    offset: i64,
    flags: libc::c_int,
) -> io::Result<usize> {
    let count = libc::c_int::try_from(iov.len()).expect("at most IOV_MAX buffers");
    // SAFETY: the caller keeps the targets mapped, and we hold no Rust reference to guest memory,
    // so a guest that writes to it meanwhile races only with itself.
    let n = unsafe {
        match flags {
            0 => libc::preadv(file.as_raw_fd(), iov.as_ptr(), count, offset),
            _ => libc::preadv2(file.as_raw_fd(), iov.as_ptr(), count, offset, flags),
        }
    };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;

    use super::*;

    /// Buffers of these lengths, one behind the other in memory or not.
    struct Buffers(Vec<Vec<u8>>);

    impl Buffers {
        fn new(lens: &[usize]) -> Self {
            Buffers(lens.iter().map(|&len| vec![0xAA; len]).collect())
        }

        fn slices(&mut self) -> Vec<VolatileSlice<'_>> {
            self.0.iter_mut().map(|buffer| VolatileSlice::from(&mut buffer[..])).collect()
        }

        fn bytes(&self) -> Vec<u8> {
            self.0.concat()
        }
    }

    /// Ways to cut 40 bytes.
    const CUTS: [&[usize]; 5] = [&[40], &[16, 24], &[1, 0, 38, 1], &[7, 7, 7, 7, 7, 5], &[1; 40]];

    #[test]
    fn an_answer_is_whole_however_its_buffers_are_cut() {
        for cut in CUTS {
            let mut buffers = Buffers::new(cut);
            let len = Reply::new(&buffers.slices()).bytes(0x0102, b"payload");
            assert_eq!(len, 23, "{cut:?}");
            let mut want = vec![23, 0, 0, 0, 0, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0];
            want.extend(b"payload");
            assert_eq!(buffers.bytes()[..23], want, "{cut:?}");
            assert!(buffers.bytes()[23..].iter().all(|&b| b == 0xAA), "{cut:?}: written beyond");
        }
    }

    #[test]
    fn too_little_room_gives_an_error_or_nothing() {
        // (room, bytes written, errno)
        for (room, len, error) in
            [(0, 0, None), (15, 0, None), (16, 16, Some(-libc::ERANGE)), (23, 23, Some(0))]
        {
            let mut buffers = Buffers::new(&[room]);
            let got = Reply::new(&buffers.slices()).bytes(1, b"payload");
            assert_eq!(got, len, "{room} bytes");
            let bytes = buffers.bytes();
            match error {
                Some(error) => assert_eq!(bytes[4..8], i32::to_ne_bytes(error), "{room} bytes"),
                None => assert!(bytes.iter().all(|&b| b == 0xAA), "{room} bytes"),
            }
        }
    }

    #[test]
    fn a_file_is_read_into_the_buffers_up_to_their_end_or_its_own() {
        let mut file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..100).collect();
        file.write_all(&content).unwrap();
        // (offset, asked, got), with 24 bytes of room
        for (offset, asked, got) in
            [(0, 24, 24), (3, 10, 10), (50, 100, 24), (95, 24, 5), (100, 1, 0)]
        {
            for cut in CUTS {
                let mut buffers = Buffers::new(cut);
                let slices = buffers.slices();
                let mut reply = Reply::new(&slices);
                let mut payload = reply.payload(usize::MAX);
                let n = payload.put_file(file.as_fd(), offset, asked).unwrap();
                let len = reply.finish(9, &payload);
                assert_eq!((n, len as usize), (got, 16 + got), "{offset} {asked} {cut:?}");
                let start = usize::try_from(offset).unwrap();
                let bytes = buffers.bytes();
                assert_eq!(bytes[16..16 + got], content[start..start + got], "{cut:?}");
                assert!(bytes[16 + got..].iter().all(|&b| b == 0xAA), "written beyond");
            }
        }
    }

    #[test]
    fn more_buffers_than_one_call_takes() {
        let mut file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..3000u32).map(|n| u8::try_from(n % 251).unwrap()).collect();
        file.write_all(&content).unwrap();
        // Every other byte of memory, so that no two buffers touch.
        let mut memory = vec![0; 6032];
        let slices: Vec<_> =
            memory.chunks_mut(2).map(|two| VolatileSlice::from(&mut two[..1])).collect();
        let mut reply = Reply::new(&slices);
        let mut payload = reply.payload(usize::MAX);
        assert_eq!(payload.put_file(file.as_fd(), 0, 3000).unwrap(), 3000);
        assert_eq!(reply.finish(1, &payload), 3016);
        let got: Vec<u8> = memory.chunks(2).skip(16).map(|two| two[0]).collect();
        assert_eq!(got, content);
    }
}
