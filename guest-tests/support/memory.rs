//! Guest memory: memfds that are mapped here and handed to the device.
//!
//! A guest-physical address is looked up when a buffer is allocated; afterwards a [`GuestBuf`]
//! knows where its bytes are, so the load generator pays nothing for the translation. Buffers keep
//! their region mapped: unplugging a region takes it from the device, not from the test.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64};
use std::sync::{Arc, Mutex};

use vhost::VhostUserMemoryRegionInfo;

use super::to_usize;

pub const PAGE: usize = 4096;
pub const MIB: u64 = 1 << 20;

/// Where guest memory lies: `(guest-physical address, length)` in bytes, each a multiple of a page.
#[derive(Clone, Debug)]
pub struct Layout {
    pub regions: Vec<(u64, u64)>,
    /// All regions are windows of one memfd, one behind the other, as QEMU's RAM block is.
    pub one_file: bool,
}

impl Layout {
    /// One region from address 0.
    pub fn flat(len: u64) -> Layout {
        Layout { regions: vec![(0, len)], one_file: false }
    }

    /// What a PC has: a hole for VGA and ROMs below 1 MiB and one for PCI below 4 GiB.
    pub fn pc(len: u64) -> Layout {
        Layout {
            regions: vec![(0, 0xa_0000), (0xc_0000, 2 * MIB), (4096 * MIB, len)],
            one_file: true,
        }
    }

    /// `count` regions of `len` bytes with a hole of one page behind each.
    pub fn scattered(count: u64, len: u64) -> Layout {
        let regions = (0..count).map(|i| (0x1000_0000 + i * (len + PAGE as u64), len)).collect();
        Layout { regions, one_file: false }
    }
}

/// One mapped piece of guest memory.
pub struct Region {
    pub guest_addr: u64,
    pub len: u64,
    /// Where the region starts in `file`, in bytes.
    pub file_offset: u64,
    file: Arc<File>,
    map: NonNull<u8>,
}

// SAFETY: the mapping is shared memory that another process writes anyway; every access goes
// through atomics or through copies of bytes that the ring's ordering has handed to one side.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    fn map(guest_addr: u64, len: u64, file: Arc<File>, file_offset: u64) -> io::Result<Region> {
        let offset = libc::off_t::try_from(file_offset).expect("small offsets");
        // SAFETY: a fresh shared mapping of a file we own; no address is asked for.
        let map = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                to_usize(len),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                offset,
            )
        };
        if map == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Region {
            guest_addr,
            len,
            file_offset,
            file,
            map: NonNull::new(map.cast()).expect("mmap does not return null"),
        })
    }

    /// Address of the region in this process, which vhost-user calls its user address.
    pub fn user_addr(&self) -> u64 {
        self.map.as_ptr() as u64
    }

    pub fn info(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: self.guest_addr,
            memory_size: self.len,
            userspace_addr: self.user_addr(),
            mmap_offset: self.file_offset,
            mmap_handle: self.file.as_raw_fd(),
        }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: `map` and `len` are those of the mapping this value made, and every `GuestBuf`
        // holds an `Arc` of the region, so nothing points into it any more.
        unsafe { libc::munmap(self.map.as_ptr().cast(), to_usize(self.len)) };
    }
}

fn memfd(len: u64) -> io::Result<Arc<File>> {
    // SAFETY: the name is a C string, and the descriptor that comes back is ours alone.
    let file = unsafe {
        let fd = libc::memfd_create(c"guest-memory".as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        File::from_raw_fd(fd)
    };
    file.set_len(len)?;
    Ok(Arc::new(file))
}

struct Allocator {
    regions: Vec<Arc<Region>>,
    /// First byte of each region that was never handed out, same order as `regions`.
    used: Vec<u64>,
}

/// All of a guest's memory, and an allocator over it that never takes anything back: sessions are
/// short, and clients recycle their own buffers.
#[derive(Clone)]
pub struct GuestMemory(Arc<Mutex<Allocator>>);

impl GuestMemory {
    pub fn new(layout: &Layout) -> io::Result<GuestMemory> {
        let mut regions = Vec::new();
        let total = layout.regions.iter().map(|r| r.1).sum();
        let shared = if layout.one_file { Some(memfd(total)?) } else { None };
        let mut at = 0;
        for &(guest_addr, len) in &layout.regions {
            let region = match &shared {
                Some(file) => Region::map(guest_addr, len, file.clone(), at)?,
                None => Region::map(guest_addr, len, memfd(len)?, 0)?,
            };
            at += len;
            regions.push(Arc::new(region));
        }
        let used = vec![0; regions.len()];
        Ok(GuestMemory(Arc::new(Mutex::new(Allocator { regions, used }))))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Allocator> {
        self.0.lock().expect("no panic while the allocator is locked")
    }

    pub fn regions(&self) -> Vec<Arc<Region>> {
        self.lock().regions.clone()
    }

    /// Adds a region to the guest; telling the device is the caller's part.
    pub fn plug(&self, guest_addr: u64, len: u64) -> io::Result<Arc<Region>> {
        let region = Arc::new(Region::map(guest_addr, len, memfd(len)?, 0)?);
        let mut all = self.lock();
        all.regions.push(region.clone());
        all.used.push(0);
        Ok(region)
    }

    /// Takes the region at `guest_addr` from the guest. Buffers in it stay mapped here.
    pub fn unplug(&self, guest_addr: u64) -> Option<Arc<Region>> {
        let mut all = self.lock();
        let at = all.regions.iter().position(|r| r.guest_addr == guest_addr)?;
        all.used.remove(at);
        Some(all.regions.remove(at))
    }

    /// `len` bytes from whichever region has room, the emptiest first, so that a guest with several
    /// regions uses them all. Aligned to a page if it is a page or more, otherwise to 64 bytes.
    pub fn alloc(&self, len: usize) -> GuestBuf {
        let mut all = self.lock();
        let best = (0..all.regions.len())
            .max_by_key(|&i| all.regions[i].len - all.used[i])
            .expect("a guest has memory");
        take(&mut all, best, len)
    }

    /// `len` bytes from the region at `guest_addr`.
    pub fn alloc_in(&self, guest_addr: u64, len: usize) -> GuestBuf {
        let mut all = self.lock();
        let at = all
            .regions
            .iter()
            .position(|r| r.guest_addr == guest_addr)
            .expect("the region is plugged");
        take(&mut all, at, len)
    }

    /// A guest-physical address that no region covers, with at least a page of nothing behind it.
    pub fn hole(&self) -> u64 {
        let all = self.lock();
        all.regions.iter().map(|r| r.guest_addr + r.len).max().expect("a guest has memory")
            + 0x10_0000
    }

    /// End of the last region: the first address past all guest memory.
    pub fn end(&self) -> u64 {
        let all = self.lock();
        all.regions.iter().map(|r| r.guest_addr + r.len).max().expect("a guest has memory")
    }
}

fn take(all: &mut Allocator, at: usize, len: usize) -> GuestBuf {
    let align = if len >= PAGE { PAGE as u64 } else { 64 };
    let start = all.used[at].next_multiple_of(align);
    let end = start + len as u64;
    let region = all.regions[at].clone();
    assert!(end <= region.len, "guest memory is too small for this test");
    all.used[at] = end;
    GuestBuf { region, offset: to_usize(start), len }
}

/// A piece of guest memory inside one region.
#[derive(Clone)]
pub struct GuestBuf {
    region: Arc<Region>,
    offset: usize,
    len: usize,
}

impl GuestBuf {
    /// Guest-physical address, which descriptors carry.
    pub fn addr(&self) -> u64 {
        self.region.guest_addr + self.offset as u64
    }

    /// Address in the front end's process, which SET_VRING_ADDR carries.
    pub fn user_addr(&self) -> u64 {
        self.region.user_addr() + self.offset as u64
    }

    pub fn len(&self) -> usize {
        self.len
    }

    fn ptr(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= self.len),
            "{len} bytes at {offset} of a buffer of {}",
            self.len
        );
        // SAFETY: the buffer lies inside the region (checked when it was allocated) and the range
        // inside the buffer (checked above).
        unsafe { self.region.map.as_ptr().add(self.offset + offset) }
    }

    pub fn write(&self, offset: usize, bytes: &[u8]) {
        let to = self.ptr(offset, bytes.len());
        // SAFETY: `to` is valid for `bytes.len()` bytes, and a slice of ours is never guest memory.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }

    pub fn read(&self, offset: usize, bytes: &mut [u8]) {
        let from = self.ptr(offset, bytes.len());
        // SAFETY: as in `write`, the other way round.
        unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
    }

    pub fn to_vec(&self, offset: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.read(offset, &mut bytes);
        bytes
    }

    pub fn fill(&self, byte: u8) {
        let to = self.ptr(0, self.len);
        // SAFETY: `ptr` has checked the whole range.
        unsafe { std::ptr::write_bytes(to, byte, self.len) };
    }

    /// The 16-bit little-endian word at `offset`, a multiple of 2.
    pub fn u16_at(&self, offset: usize) -> &AtomicU16 {
        let at = self.ptr(offset, 2);
        assert!(at.cast::<AtomicU16>().is_aligned());
        // SAFETY: in bounds, aligned, mapped as long as `self`; other processes may write it, which
        // is what atomics are for.
        unsafe { AtomicU16::from_ptr(at.cast()) }
    }

    /// The 32-bit little-endian word at `offset`, a multiple of 4.
    pub fn u32_at(&self, offset: usize) -> &AtomicU32 {
        let at = self.ptr(offset, 4);
        assert!(at.cast::<AtomicU32>().is_aligned());
        // SAFETY: as in `u16_at`.
        unsafe { AtomicU32::from_ptr(at.cast()) }
    }

    /// The 64-bit little-endian word at `offset`, a multiple of 8.
    pub fn u64_at(&self, offset: usize) -> &AtomicU64 {
        let at = self.ptr(offset, 8);
        assert!(at.cast::<AtomicU64>().is_aligned());
        // SAFETY: as in `u16_at`.
        unsafe { AtomicU64::from_ptr(at.cast()) }
    }

    /// A part of this buffer.
    pub fn slice(&self, offset: usize, len: usize) -> GuestBuf {
        let _ = self.ptr(offset, len);
        GuestBuf { region: self.region.clone(), offset: self.offset + offset, len }
    }
}
