//! File data of an image: from the cache file straight to the guest, if it is there.
//!
//! A read is served when every chunk it touches is verified; else it waits for all that are not,
//! at once. What is served was verified since this process started, or came with the wait.

use std::sync::Arc;
use std::time::Instant;

use futures_util::future::join_all;
use rustix::io::Errno;
use smallvec::SmallVec;

use super::file_system::FsError;
use super::rafs_fs::RafsFs;
use super::reply::Payload;
use super::wait::{Pinned, Pins, Wait};
use crate::blob::{Blob, ChunkData, ChunkRef};
use crate::rafs::Inode;
use crate::rafs::id::ChunkIndex;

/// Waits of one read for chunks. More than one is needed only if the cache file is damaged meanwhile.
const MAX_ROUNDS: u32 = 4;
/// Waits of one read for the disk of the cache. If the page cache drops again what was just read, the
/// next try waits where it is.
const MAX_PAGED: u32 = 2;

/// A chunk that a read touches.
#[derive(Clone)]
pub(super) struct Wanted<'a> {
    /// Position in the file.
    pub(super) number: u32,
    pub(super) blob: &'a Arc<Blob>,
    pub(super) chunk: ChunkRef,
}

/// Bytes of a read that lie together.
enum Piece<'a> {
    /// In the cache file of a blob: bytes from `offset` on, of chunks `first..=last` of the file.
    Cached {
        blob: &'a Arc<Blob>,
        offset: u64,
        len: usize,
        first: u32,
        last: u32,
    },
    Memory(&'a [u8]),
}

impl RafsFs {
    /// Fills `into` with bytes of a regular file from `offset` on, up to the end of either.
    pub(super) fn read_file(
        &self,
        inode: &Inode<'_>,
        offset: u64,
        into: &mut Payload<'_>,
        pins: &Pins,
    ) -> Result<(), FsError> {
        if pins.late {
            return Err(broken(inode, "the disk of the cache has not answered in time"));
        }
        let room = u64::try_from(into.room()).unwrap_or(u64::MAX);
        let end = offset.saturating_add(room).min(inode.size());
        let chunk_size = u64::from(self.image.chunk_size());
        let mut pieces: SmallVec<[Piece<'_>; 4]> = SmallVec::new();
        let mut missing: Vec<Wanted<'_>> = Vec::new();
        let mut at = offset;
        while at < end {
            let within = at % chunk_size;
            let len = (chunk_size - within).min(end - at);
            let wanted = self.wanted(inode, at / chunk_size)?;
            match pins.get(wanted.number) {
                Some(pinned) => pieces.push(memory(inode, wanted.number, pinned, within, len)?),
                None => match wanted.blob.verified(wanted.chunk) {
                    Some(place) => add_cached(&mut pieces, &wanted, place + within, len)?,
                    None => missing.push(wanted),
                },
            }
            at += len;
        }
        if !missing.is_empty() {
            return Err(self.wait_for(inode, &missing, pins));
        }
        for piece in &pieces {
            match *piece {
                Piece::Memory(bytes) => {
                    if !into.put(bytes) {
                        return Err(broken(inode, "the reply has shrunk"));
                    }
                }
                Piece::Cached { blob, offset, len, first, last } => {
                    let patient = pins.paged >= MAX_PAGED || !blob.can_peek();
                    let done = match patient {
                        true => into.put_file(blob.cache_file(), offset, len),
                        false => into.put_cached(blob.cache_file(), offset, len),
                    };
                    let error = match &done {
                        Ok(done) if *done == len => continue,
                        Ok(_) => None,
                        Err(error) => Errno::from_io_error(error),
                    };
                    match error {
                        Some(Errno::AGAIN) if !patient => {
                            return Err(self.wait_for_pages(&pieces, pins));
                        }
                        Some(Errno::OPNOTSUPP) if !patient => {
                            blob.cannot_peek();
                            return Err(self.wait_for_pages(&pieces, pins));
                        }
                        _ => {}
                    }
                    let size = blob.info().uncompressed_size;
                    log::warn!(
                        "blob {}: {done:?} of {len} bytes at {offset} of {size} from the cache \
                         file; its chunks are verified again",
                        blob.id()
                    );
                    return Err(self.start_over(inode, first, last, pins));
                }
            }
        }
        Ok(())
    }

    /// What a read waits for of whose `pieces` some have left the page cache.
    #[cold]
    fn wait_for_pages(&self, pieces: &[Piece<'_>], pins: &Pins) -> FsError {
        let mut pins = pins.clone();
        pins.paged += 1;
        let deadline = self.deadline(&mut pins);
        let places: Vec<_> = pieces
            .iter()
            .filter_map(|piece| match *piece {
                Piece::Cached { blob, offset, len, .. } => {
                    let end = offset.saturating_add(u64::try_from(len).ok()?);
                    Some((blob.clone(), offset..end))
                }
                Piece::Memory(_) => None,
            })
            .collect();
        FsError::Wait(Wait::new(async move {
            let reads = places.into_iter().map(|(blob, bytes)| blob.page_in(bytes, deadline));
            pins.late = join_all(reads).await.contains(&false);
            pins
        }))
    }

    /// When a read has waited long enough.
    fn deadline(&self, pins: &mut Pins) -> Instant {
        *pins.deadline.get_or_insert_with(|| Instant::now() + self.options.read_timeout)
    }

    /// Chunk `number` of a file, which has so many.
    pub(super) fn wanted(&self, inode: &Inode<'_>, number: u64) -> Result<Wanted<'_>, FsError> {
        let number = u32::try_from(number).map_err(|_| broken(inode, "too many chunks"))?;
        let addr = inode
            .chunk(number)
            .map_err(|source| FsError::Damaged { node: inode.nid().0, source })?;
        let blob = addr
            .blob()
            .and_then(|index| self.blobs.get(usize::from(index.0)))
            .ok_or_else(|| broken(inode, "a blob of the image has not been opened"))?;
        let chunk = ChunkRef {
            index: ChunkIndex(addr.chunk_index()),
            start_block: addr.start_block(),
            size: inode.chunk_len(number),
        };
        Ok(Wanted { number, blob, chunk })
    }

    /// The cache file did not give chunks `first..=last` of a file: somebody else changed it.
    fn start_over(&self, inode: &Inode<'_>, first: u32, last: u32, pins: &Pins) -> FsError {
        let wanted: Result<Vec<_>, _> =
            (first..=last).map(|number| self.wanted(inode, number.into())).collect();
        match wanted {
            Ok(wanted) => {
                wanted.iter().for_each(|wanted| wanted.blob.distrust(wanted.chunk));
                self.wait_for(inode, &wanted, pins)
            }
            Err(error) => error,
        }
    }

    /// What a read waits for that needs the chunks `missing`.
    pub(super) fn wait_for(
        &self,
        inode: &Inode<'_>,
        missing: &[Wanted<'_>],
        pins: &Pins,
    ) -> FsError {
        let mut pins = pins.clone();
        pins.rounds += 1;
        if pins.rounds > MAX_ROUNDS {
            return broken(inode, "the cache file is damaged again and again");
        }
        let deadline = self.deadline(&mut pins);
        // One list for each blob; a read seldom touches two.
        let mut lists: Vec<(Arc<Blob>, Vec<u32>, Vec<ChunkRef>)> = Vec::new();
        for Wanted { number, blob, chunk } in missing {
            let list = match lists.iter().position(|(other, ..)| Arc::ptr_eq(other, blob)) {
                Some(i) => &mut lists[i],
                None => {
                    lists.push(((*blob).clone(), Vec::new(), Vec::new()));
                    lists.last_mut().expect("just pushed")
                }
            };
            list.1.push(*number);
            list.2.push(*chunk);
        }
        FsError::Wait(Wait::new(async move {
            let fetches = lists.into_iter().map(|(blob, numbers, chunks)| async move {
                numbers.into_iter().zip(blob.fetch(chunks, deadline).await)
            });
            for (number, result) in join_all(fetches).await.into_iter().flatten() {
                match result {
                    Ok(ChunkData::Cached) => {}
                    Ok(ChunkData::Memory(bytes)) => pins.pin(number, Pinned::Memory(bytes)),
                    Err(error) => pins.pin(number, Pinned::Failed(error)),
                }
            }
            pins
        }))
    }
}

/// `len` bytes of chunk `chunk` of a file, which came with a wait, from byte `within` on.
fn memory<'a>(
    inode: &Inode<'_>,
    chunk: u32,
    pinned: &'a Pinned,
    within: u64,
    len: u64,
) -> Result<Piece<'a>, FsError> {
    let bytes = match pinned {
        Pinned::Memory(bytes) => bytes,
        Pinned::Failed(error) => {
            let node = inode.nid().0;
            return Err(FsError::Unreadable { node, chunk, source: error.clone() });
        }
    };
    let find = || {
        let start = usize::try_from(within).ok()?;
        bytes.get(start..start.checked_add(usize::try_from(len).ok()?)?)
    };
    find().map(Piece::Memory).ok_or_else(|| broken(inode, "a chunk is shorter than its file says"))
}

/// Adds `len` bytes at byte `offset` of the cache file, to the last piece if they follow it.
fn add_cached<'a>(
    pieces: &mut SmallVec<[Piece<'a>; 4]>,
    wanted: &Wanted<'a>,
    offset: u64,
    len: u64,
) -> Result<(), FsError> {
    let more = usize::try_from(len).map_err(|_| FsError::InvalidArgument)?;
    if let Some(Piece::Cached { blob, offset: start, len, last, .. }) = pieces.last_mut()
        && Arc::ptr_eq(blob, wanted.blob)
        && u64::try_from(*len).ok().and_then(|len| start.checked_add(len)) == Some(offset)
    {
        *len += more;
        *last = wanted.number;
    } else {
        let number = wanted.number;
        pieces.push(Piece::Cached {
            blob: wanted.blob,
            offset,
            len: more,
            first: number,
            last: number,
        });
    }
    Ok(())
}

fn broken(inode: &Inode<'_>, reason: &'static str) -> FsError {
    FsError::Broken { node: inode.nid().0, reason }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::blob::{ChunkError, ChunkFailure};
    use crate::fuse::file_system::chain;
    use crate::rafs::Bootstrap;
    use crate::rafs::id::{BlobId, Nid};

    #[test]
    fn what_a_wait_brought_is_checked() {
        let path = "guest-tests/golden/v6-none/bootstrap";
        let image = Bootstrap::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap();
        let inode = image.inode(Nid(135)).unwrap();
        let pinned = Pinned::Memory((*b"0123456789").into());
        // (within, len, bytes)
        let cases: [(u64, u64, Option<&[u8]>); 5] = [
            (0, 10, Some(b"0123456789")),
            (3, 4, Some(b"3456")),
            (0, 11, None),
            (11, 0, None),
            (u64::MAX, 2, None),
        ];
        for (within, len, want) in cases {
            match (memory(&inode, 0, &pinned, within, len), want) {
                (Ok(Piece::Memory(bytes)), Some(want)) => assert_eq!(bytes, want),
                (Err(error), None) => assert_eq!(error.errno(), libc::EIO),
                _ => panic!("{within} {len}"),
            }
        }
        let error = ChunkError {
            id: 17,
            blob: BlobId::UNKNOWN,
            index: ChunkIndex(5),
            source: ChunkFailure::Abandoned,
        };
        let failed = Pinned::Failed(Arc::new(error));
        let error = memory(&inode, 2, &failed, 0, 1).err().unwrap();
        assert_eq!(error.errno(), libc::EIO);
        assert_eq!(
            chain(&error),
            format!(
                "inode 135: its chunk 2 cannot be read: chunk 5 of blob {} (error 17): \
                 the download was given up",
                BlobId::UNKNOWN
            )
        );
    }
}
