//! What is in the window, range by range.
//!
//! A range holds a few mappings of cache files, or one part of `copies`, a nameless file of the
//! window's size. With policy `private` the VMM maps that file once, whole, and the ranges are only
//! filled and emptied. A range is emptied before it is used again.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate, memfd_create,
};
use smallvec::SmallVec;

use super::mapper::{Extent, Source};
use super::{MapError, Mapping, PAGE, RANGE, SharedMemory};

/// Mappings that may be live at once. QEMU ends when there are more than 512 with those of the
/// guest's memory.
const MAX_MAPS: usize = 480;
/// Bytes copied at once: they stay in the processor's cache in between.
const STEP: usize = 256 << 10;

/// A mapping of the VMM's: offset in the window and length, in bytes.
type Live = (u64, u64);

/// What one range holds.
#[derive(Default)]
struct Range {
    live: SmallVec<[Live; 2]>,
    /// Some of `copies` is filled.
    copied: bool,
}

/// A window that is open.
pub(super) struct Window {
    mapping: Mapping,
    size: u64,
    copies: File,
    /// The same file as the VMM gets it: with `Mapping::Shared` for reading only.
    shown: File,
    ranges: Vec<Range>,
    buffer: Vec<u8>,
}

/// Why a range is not filled.
#[derive(Debug, thiserror::Error)]
pub(super) enum FillError {
    /// The cache file does not hold what was verified.
    #[error("the cache file does not hold what was verified")]
    Damaged,
    #[error("writing the guest's copy")]
    Copy(#[source] io::Error),
    #[error(transparent)]
    Map(#[from] MapError),
}

/// How a range was filled.
pub(super) enum Filled {
    /// By so many mappings of cache files.
    Mapped(u64),
    /// By a copy of so many bytes.
    Copied(u64),
}

impl Window {
    /// An empty window. Nothing must be mapped.
    pub(super) fn open(memory: &dyn SharedMemory, mapping: Mapping) -> Result<Window, FillError> {
        let size = memory.size();
        let copies = File::from(nameless(size).map_err(FillError::Copy)?);
        let shown = match mapping {
            Mapping::Shared => crate::blob::reopen_read_only(copies.as_fd()),
            _ => copies.try_clone(),
        };
        let ranges = usize::try_from(size / RANGE).unwrap_or(0);
        let window = Window {
            mapping,
            size,
            copies,
            shown: shown.map_err(FillError::Copy)?,
            ranges: std::iter::repeat_with(Range::default).take(ranges).collect(),
            buffer: Vec::new(),
        };
        if mapping == Mapping::Private {
            memory.map(0, size, window.shown.as_fd(), 0)?;
        }
        Ok(window)
    }

    pub(super) fn mapping(&self) -> Mapping {
        self.mapping
    }

    /// Ranges that hold something.
    pub(super) fn used(&self) -> u64 {
        let used = self.ranges.iter().filter(|range| range.copied || !range.live.is_empty());
        used.count() as u64
    }

    /// Takes away all mappings. The VMM may have done so long ago: when its guest was reset, it said
    /// nothing. The memory of copies goes with the window.
    pub(super) fn close(mut self, memory: &dyn SharedMemory) {
        if self.mapping == Mapping::Private {
            let _ = memory.unmap(0, self.size);
        }
        for (offset, len) in self.ranges.iter_mut().flat_map(|range| range.live.drain(..)) {
            let _ = memory.unmap(offset, len);
        }
    }

    /// Makes `extents` appear from `offset`, the start of a range, on; the rest of the range is empty.
    pub(super) fn fill(
        &mut self,
        memory: &dyn SharedMemory,
        offset: u64,
        extents: &[Extent],
    ) -> Result<Filled, FillError> {
        self.empty(memory, offset)?;
        if self.mapping == Mapping::Shared && self.may_map(extents) {
            match self.map(memory, offset, extents) {
                Ok(maps) => return Ok(Filled::Mapped(maps)),
                Err(FillError::Map(MapError::Refused)) => self.empty(memory, offset)?,
                Err(e) => {
                    self.empty(memory, offset)?;
                    return Err(e);
                }
            }
        }
        let filled = self.copy(memory, offset, extents);
        if filled.is_err() {
            self.empty(memory, offset)?;
        }
        filled.map(Filled::Copied)
    }

    /// Empties the range that begins at `offset`.
    pub(super) fn empty(&mut self, memory: &dyn SharedMemory, offset: u64) -> Result<(), MapError> {
        let size = self.size;
        let Some(range) = range_of(&mut self.ranges, offset) else { return Ok(()) };
        while let Some(&(at, len)) = range.live.last() {
            match memory.unmap(at, len) {
                // Not there any more, which is what was wanted.
                Ok(()) | Err(MapError::Refused) => {}
                Err(e) => return Err(e),
            }
            range.live.pop();
        }
        if range.copied {
            // The memory goes back to the host, and zeros are there.
            let len = RANGE.min(size - offset);
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(&self.copies, flags, offset, len).map_err(|e| MapError::Channel(e.into()))?;
            range.copied = false;
        }
        Ok(())
    }

    /// Whether there can be a mapping for each of `extents`, and one for each of the other ranges still.
    fn may_map(&self, extents: &[Extent]) -> bool {
        let more =
            self.ranges.iter().map(|range| range.live.len().saturating_sub(1)).sum::<usize>();
        let aligned = |extent: &Extent| {
            extent.at.is_multiple_of(PAGE)
                && matches!(&extent.source, Source::Cached { offset, .. } if offset.is_multiple_of(PAGE))
        };
        let wanted = more + extents.len().saturating_sub(1);
        self.ranges.len() + wanted <= MAX_MAPS && extents.iter().all(aligned)
    }

    fn map(
        &mut self,
        memory: &dyn SharedMemory,
        offset: u64,
        extents: &[Extent],
    ) -> Result<u64, FillError> {
        let mut files = SmallVec::<[_; 4]>::new();
        for extent in extents {
            let Source::Cached { blob, offset: from, .. } = &extent.source else {
                return Err(MapError::Refused.into());
            };
            let Ok(file) = blob.read_only_file() else { return Err(MapError::Refused.into()) };
            let len = extent.len.next_multiple_of(PAGE);
            let reaches = file.metadata().is_ok_and(|meta| from + len <= meta.len());
            if !reaches {
                return Err(MapError::Refused.into());
            }
            files.push((file, *from, offset + extent.at, len));
        }
        let Some(range) = range_of(&mut self.ranges, offset) else { return Ok(0) };
        for (file, from, at, len) in &files {
            memory.map(*at, *len, file.as_fd(), *from)?;
            range.live.push((*at, *len));
        }
        Ok(files.len() as u64)
    }

    fn copy(
        &mut self,
        memory: &dyn SharedMemory,
        offset: u64,
        extents: &[Extent],
    ) -> Result<u64, FillError> {
        let Some(range) = range_of(&mut self.ranges, offset) else { return Ok(0) };
        range.copied = true;
        let mut copied = 0;
        for extent in extents {
            copy_extent(&self.copies, offset + extent.at, extent, &mut self.buffer)?;
            copied += extent.len;
        }
        if self.mapping == Mapping::Shared && copied > 0 {
            let end = extents.iter().map(|extent| extent.at + extent.len).max().unwrap_or(0);
            let len = end.next_multiple_of(PAGE);
            memory.map(offset, len, self.shown.as_fd(), offset)?;
            range.live.push((offset, len));
        }
        Ok(copied)
    }
}

fn range_of(ranges: &mut [Range], offset: u64) -> Option<&mut Range> {
    usize::try_from(offset / RANGE).ok().and_then(|index| ranges.get_mut(index))
}

/// Copies one extent to `to`.
fn copy_extent(
    into: &File,
    to: u64,
    extent: &Extent,
    buffer: &mut Vec<u8>,
) -> Result<(), FillError> {
    match &extent.source {
        Source::Memory { bytes, from } => {
            let end = usize::try_from(extent.len).ok().and_then(|len| from.checked_add(len));
            let bytes = end.and_then(|end| bytes.get(*from..end)).ok_or(FillError::Damaged)?;
            into.write_all_at(bytes, to).map_err(FillError::Copy)
        }
        Source::Cached { blob, offset, .. } => {
            buffer.resize(STEP, 0);
            let mut done = 0;
            while done < extent.len {
                let len = usize::try_from(extent.len - done).map_or(STEP, |left| left.min(STEP));
                let step = &mut buffer[..len];
                let read = rustix::io::pread(blob.cache_file(), &mut *step, offset + done);
                let read = match read {
                    Ok(0) => return Err(FillError::Damaged),
                    Ok(read) => read,
                    Err(rustix::io::Errno::INTR) => continue,
                    Err(e) => {
                        log::warn!("blob {}: reading the cache file: {e}", blob.id());
                        return Err(FillError::Damaged);
                    }
                };
                into.write_all_at(&step[..read], to + done).map_err(FillError::Copy)?;
                done += read as u64;
            }
            Ok(())
        }
    }
}

/// A file of zeros without a name that keeps its size: who maps it cannot be hurt by that changing.
fn nameless(size: u64) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = memfd_create("rafsd-dax", flags)?;
    ftruncate(&file, size)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

/// Whether the VMM maps a file that is open for reading only: tries it with a page of zeros.
pub(super) fn maps_read_only(memory: &dyn SharedMemory) -> Result<bool, FillError> {
    let file = nameless(PAGE).map_err(FillError::Copy)?;
    let file = crate::blob::reopen_read_only(file.as_fd()).map_err(FillError::Copy)?;
    match memory.map(0, PAGE, file.as_fd(), 0) {
        Ok(()) => {
            memory.unmap(0, PAGE)?;
            Ok(true)
        }
        Err(MapError::Refused) => Ok(false),
        Err(e) => Err(e.into()),
    }
}
