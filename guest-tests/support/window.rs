//! The DAX window of our own VMM: maps what the back end asks for, as strictly as QEMU 11.1 does, and
//! keeps a record. It may take descriptors that are open for reading only, which QEMU 11.1 does not.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vhost::VhostUserMemoryRegionInfo;
use vhost::vhost_user::message::VhostUserMMap;
use vhost::vhost_user::{FrontendReqHandler, HandlerResult, VhostUserFrontendReqHandler};

use super::to_usize;

/// What the VMM does with descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Takes {
    /// As QEMU 11.1.3: everything is mapped for writing, or not at all.
    OnlyWritable,
    ReadOnly,
}

/// What the back end asked for, and what became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Offset in the window, length, and whether the descriptor is open for reading only.
    Map(u64, u64, bool),
    RefusedMap(u64, u64),
    Unmap(u64, u64),
    RefusedUnmap(u64, u64),
}

/// Shared memory region 0.
pub struct Window {
    size: u64,
    addr: usize,
    takes: Takes,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Length by offset.
    live: BTreeMap<u64, u64>,
    /// What is mapped there: the file, and where in it.
    files: BTreeMap<u64, (OwnedFd, u64)>,
    events: Vec<Event>,
    /// Messages are answered only when this is false.
    silent: bool,
}

impl Window {
    /// Address space for a window, and the thread that answers the back end, on the socket whose other
    /// end is returned. The thread ends when the back end closes it.
    pub fn open(size: u64, takes: Takes) -> io::Result<(Arc<Window>, RawFd)> {
        // SAFETY: a new mapping, at no address in particular, that nobody may touch.
        let addr = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                to_usize(size),
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if addr == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let window = Arc::new(Window {
            size,
            addr: addr as usize,
            takes,
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let mut handler = FrontendReqHandler::new(Arc::clone(&window)).map_err(io::Error::other)?;
        handler.set_reply_ack_flag(true);
        // SAFETY: the descriptor is the handler's and open.
        let theirs = unsafe { BorrowedFd::borrow_raw(handler.get_tx_raw_fd()) };
        let sent = rustix::io::dup(theirs)?;
        std::thread::spawn(move || {
            loop {
                match handler.handle_request() {
                    Ok(_) | Err(vhost::vhost_user::Error::ReqHandlerError(_)) => {}
                    Err(_) => return,
                }
            }
        });
        Ok((window, std::os::fd::IntoRawFd::into_raw_fd(sent)))
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    /// Address of the window in this process.
    pub fn addr(&self) -> usize {
        self.addr
    }

    /// What has been asked for since this was called last.
    pub fn events(&self) -> Vec<Event> {
        std::mem::take(&mut self.lock().events)
    }

    /// Offset and length of what is mapped, in order.
    pub fn live(&self) -> Vec<(u64, u64)> {
        self.lock().live.iter().map(|(&offset, &len)| (offset, len)).collect()
    }

    /// What is mapped, as guest memory from `guest_addr` on: what QEMU 11.1 shows to the back end. With
    /// the descriptors, which must live until they were sent.
    pub fn regions(
        &self,
        guest_addr: u64,
    ) -> io::Result<Vec<(VhostUserMemoryRegionInfo, OwnedFd)>> {
        let state = self.lock();
        let region = |(&offset, (file, file_offset)): (&u64, &(OwnedFd, u64))| {
            let file = rustix::io::dup(file)?;
            let info = VhostUserMemoryRegionInfo {
                guest_phys_addr: guest_addr + offset,
                memory_size: state.live[&offset],
                userspace_addr: self.addr as u64 + offset,
                mmap_offset: *file_offset,
                mmap_handle: file.as_raw_fd(),
            };
            Ok((info, file))
        };
        state.files.iter().map(region).collect()
    }

    /// Stops answering, or goes on.
    pub fn be_silent(&self, silent: bool) {
        self.lock().silent = silent;
        self.changed.notify_all();
    }

    /// Waits until so many questions have come since the last look.
    pub fn wait_for_events(&self, count: usize, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut state = self.lock();
        while state.events.len() < count {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .map_or_else(|e| e.into_inner().0, |(state, _)| state);
        }
        true
    }

    /// What the guest sees: bytes of the window, all of which must be mapped.
    pub fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let state = self.lock();
        let mut at = offset;
        while at < offset + len as u64 {
            let (&start, &length) = state.live.range(..=at).next_back().expect("it is mapped");
            assert!(at < start + length, "{at:#x} is not mapped");
            at = start + length;
        }
        let mut bytes = vec![0; len];
        // SAFETY: the loop has found it mapped, and the lock keeps it so.
        unsafe {
            std::ptr::copy_nonoverlapping(
                (self.addr + to_usize(offset)) as *const u8,
                bytes.as_mut_ptr(),
                len,
            );
        }
        bytes
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, event: Event) {
        let mut state = self.lock();
        state.events.push(event);
        self.changed.notify_all();
        while state.silent {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn try_map(&self, request: &VhostUserMMap, fd: RawFd) -> io::Result<bool> {
        let (offset, len) = (request.shm_offset, request.len);
        // SAFETY: the descriptor came with the message and is open.
        let file = unsafe { BorrowedFd::borrow_raw(fd) };
        let flags = rustix::fs::fcntl_getfl(file)?;
        let writable = flags.contains(rustix::fs::OFlags::RDWR);
        let len_of_file = u64::try_from(rustix::fs::fstat(file)?.st_size).unwrap_or(0);
        let mut state = self.lock();
        let free =
            state.live.range(..offset + len).next_back().is_none_or(|(o, l)| o + l <= offset);
        let fits = offset + len <= self.size && request.fd_offset + len <= len_of_file;
        let aligned = (offset | len | request.fd_offset).is_multiple_of(4096);
        if request.shmid != 0 || !free || !fits || !aligned {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if !writable && self.takes == Takes::OnlyWritable {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let prot = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        self.place(offset, len, prot, libc::MAP_SHARED, fd, request.fd_offset)?;
        state.live.insert(offset, len);
        state.files.insert(offset, (rustix::io::dup(file)?, request.fd_offset));
        Ok(!writable)
    }

    fn place(
        &self,
        offset: u64,
        len: u64,
        prot: i32,
        flags: i32,
        fd: RawFd,
        from: u64,
    ) -> io::Result<()> {
        let from = i64::try_from(from).map_err(io::Error::other)?;
        // SAFETY: the range lies in the window, which is ours.
        let done = unsafe {
            let at = (self.addr + to_usize(offset)) as *mut libc::c_void;
            libc::mmap(at, to_usize(len), prot, flags | libc::MAP_FIXED, fd, from)
        };
        if done == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl VhostUserFrontendReqHandler for Window {
    fn shmem_map(&self, request: &VhostUserMMap, fd: &dyn AsRawFd) -> HandlerResult<u64> {
        let (offset, len) = (request.shm_offset, request.len);
        match self.try_map(request, fd.as_raw_fd()) {
            Ok(read_only) => {
                self.note(Event::Map(offset, len, read_only));
                Ok(0)
            }
            Err(e) => {
                self.note(Event::RefusedMap(offset, len));
                Err(e)
            }
        }
    }

    fn shmem_unmap(&self, request: &VhostUserMMap) -> HandlerResult<u64> {
        let (offset, len) = (request.shm_offset, request.len);
        let mut state = self.lock();
        let there = state.live.get(&offset) == Some(&len);
        if there {
            state.live.remove(&offset);
            state.files.remove(&offset);
        }
        drop(state);
        if !there {
            self.note(Event::RefusedUnmap(offset, len));
            return Err(io::ErrorKind::NotFound.into());
        }
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        self.place(offset, len, libc::PROT_NONE, flags, -1, 0)?;
        self.note(Event::Unmap(offset, len));
        Ok(0)
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: the window is ours, and nobody can use it any more.
        unsafe { libc::munmap(self.addr as *mut libc::c_void, to_usize(self.size)) };
    }
}
