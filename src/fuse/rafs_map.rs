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

/// Chunks that are looked at to tell how many pieces a file is made of.
const LOOK_AT: u64 = 1 << 14;
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
                let chunk_size = u64::from(self.image.chunk_size());
                let most = usize::try_from((LOOK_AT * chunk_size).div_ceil(RANGE)).unwrap_or(1);
                let (mut ranges, mut pieces) = (0, 0);
                for found in inode.pieces(RANGE).take(most) {
                    let Ok(found) = found else { return false };
                    ranges += 1;
                    pieces += u64::from(found);
                }
                pieces <= PIECES * ranges
            }
        }
    }
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
