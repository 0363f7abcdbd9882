//! File data of an image for a DAX window: which parts of cache files make up a range of a file.
//!
//! As for a read, every chunk is verified before it is named, or what is missing is waited for.

use smallvec::smallvec;

use super::dax::{Extent, Mapping, RANGE, Source};
use super::file_system::FsError;
use super::rafs_fs::RafsFs;
use super::rafs_read::Wanted;
use super::wait::{Pinned, Pins};
use crate::rafs::Inode;
use crate::rafs::layout::BLOCK_SIZE;

/// Chunks that are looked at to tell how many pieces a file is made of.
const LOOK_AT: u32 = 1 << 14;
/// Mappings of cache files that a range may take on average.
const PIECES: u64 = 2;

impl RafsFs {
    /// The parts of a regular file from `offset` on, at most `len` bytes, as far as it goes. All are
    /// verified, and lie one behind the other.
    pub(super) fn file_extents(
        &self,
        inode: &Inode<'_>,
        offset: u64,
        len: u64,
        pins: &Pins,
    ) -> Result<Vec<Extent>, FsError> {
        let end = offset.saturating_add(len).min(inode.size());
        let chunk_size = u64::from(self.image.chunk_size());
        let (mut extents, mut missing) = (Vec::new(), Vec::new());
        let mut at = offset;
        while at < end {
            let within = at % chunk_size;
            let len = (chunk_size - within).min(end - at);
            let wanted = self.wanted(inode, at / chunk_size)?;
            match (pins.get(wanted.number), wanted.blob.verified(wanted.chunk)) {
                (Some(Pinned::Failed(error)), _) => {
                    let (node, chunk) = (inode.nid().0, wanted.number);
                    return Err(FsError::Unreadable { node, chunk, source: error.clone() });
                }
                (Some(Pinned::Memory(bytes)), _) => {
                    let from = usize::try_from(within).map_err(|_| FsError::InvalidArgument)?;
                    let source = Source::Memory { bytes: bytes.clone(), from };
                    extents.push(Extent { at: at - offset, len, source });
                }
                (None, Some(place)) => {
                    add_cached(&mut extents, &wanted, at - offset, place + within, len);
                }
                (None, None) => missing.push(wanted),
            }
            at += len;
        }
        match missing.is_empty() {
            true => Ok(extents),
            false => Err(self.wait_for(inode, &missing, pins)),
        }
    }

    /// Whether the ranges of a regular file are few enough pieces.
    pub(super) fn maps_well(&self, inode: &Inode<'_>, mapping: Mapping) -> bool {
        match mapping {
            Mapping::None => false,
            Mapping::Private => true,
            Mapping::Shared => {
                let looked = inode.chunk_count().min(LOOK_AT);
                let bytes = u64::from(looked) * u64::from(self.image.chunk_size());
                let pieces = pieces(inode, self.image.chunk_size(), looked);
                pieces.is_some_and(|pieces| pieces <= PIECES * bytes.div_ceil(RANGE))
            }
        }
    }
}

/// Mappings that the first `chunks` chunks of a file take, range by range. `None`: it is damaged.
fn pieces(inode: &Inode<'_>, chunk_size: u32, chunks: u32) -> Option<u64> {
    let (mut pieces, mut next) = (0, None);
    for i in 0..chunks {
        let addr = inode.chunk(i).ok()?;
        let here = (addr.blob()?.0, u64::from(addr.start_block()) * BLOCK_SIZE);
        let starts_range = (u64::from(i) * u64::from(chunk_size)).is_multiple_of(RANGE);
        if starts_range || next != Some(here) {
            pieces += 1;
        }
        next = Some((here.0, here.1 + u64::from(chunk_size)));
    }
    Some(pieces)
}

/// Adds `len` bytes at byte `offset` of the cache file, to the last extent if they follow it.
fn add_cached(extents: &mut Vec<Extent>, wanted: &Wanted<'_>, at: u64, offset: u64, len: u64) {
    if let Some(last) = extents.last_mut()
        && let Source::Cached { blob, offset: start, chunks } = &mut last.source
        && std::sync::Arc::ptr_eq(blob, wanted.blob)
        && *start + last.len == offset
    {
        last.len += len;
        chunks.push(wanted.chunk);
        return;
    }
    let blob = wanted.blob.clone();
    let source = Source::Cached { blob, offset, chunks: smallvec![wanted.chunk] };
    extents.push(Extent { at, len, source });
}
