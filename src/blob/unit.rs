//! A unit: what comes out of one decompression, a chunk or a batch of chunks, on its way to being
//! readable.
//!
//! Everything here that touches bytes runs on the blocking pool.

use std::fs::File;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use super::cache_file::ChunkMap;
use super::claim::Claim;
use super::counters::add;
use super::error::{ChunkError, ChunkFailure};
use super::flight::Slot;
use super::gate::Class;
use super::plan::Piece;
use super::store::{Blob, ChunkData, Store};
use super::table::{Proof, Table};
use crate::rafs::ci::{ChunkForm, ChunkInfo};
use crate::rafs::codec::{CodecError, Compressor};
use crate::rafs::id::{BlobId, ChunkIndex};
use crate::rafs::layout::BLOCK_SIZE;

/// A chunk, or why it cannot be had.
pub type ChunkResult = Result<ChunkData, Arc<ChunkError>>;

/// A unit on its way: results of its chunks, in order.
pub type UnitSlot = Slot<Arc<[ChunkResult]>>;

/// What chunks are padded to in the cache file, in bytes.
const BLOCK: usize = 4096;
const _: () = assert!(BLOCK as u64 == BLOCK_SIZE);

/// Largest buffer that is kept for the next chunk, in bytes.
const MAX_KEPT_BUFFER: usize = 4 << 20;

/// Where the bytes of a unit may go.
pub enum Keep {
    /// To its waiters only.
    Nowhere,
    /// To the nameless cache file of this process.
    Private,
    /// To the shared cache file: no other process writes these chunks.
    Claimed(#[expect(dead_code, reason = "held, not read: dropping it ends the claim")] Claim),
}

/// Why the bytes at hand are not those of the unit.
pub enum Bad {
    Digest,
    Codec(CodecError),
}

/// The task that makes a unit readable owns this; dropping it fails the waiters.
pub struct Unit {
    pub blob: Arc<Blob>,
    pub slot: Arc<UnitSlot>,
    /// Chunks of the unit: one, or the members of a batch.
    pub chunks: Range<u32>,
    /// Place of the stored bytes in the blob file.
    pub stored: Range<u64>,
    /// Bytes after decompression.
    pub uncompressed: u64,
    pub keep: Keep,
    /// The cache holds something else than it should.
    pub suspect: bool,
    /// What was wrong with the bytes the backend gave the first time.
    pub bad: Option<Bad>,
}

/// What is under a unit in the cache file.
pub enum Cached {
    /// The right bytes; the unit is finished.
    Right,
    /// Not the right bytes.
    Wrong,
    /// The right bytes of another image.
    Foreign,
}

impl Unit {
    /// `chunks` come from [`ChunkInfos::unit`](crate::rafs::ci::ChunkInfos::unit).
    pub fn new(blob: Arc<Blob>, slot: Arc<UnitSlot>, chunks: Range<u32>) -> Self {
        let mut unit = Unit {
            blob,
            slot,
            chunks,
            stored: 0..0,
            uncompressed: 0,
            keep: Keep::Nowhere,
            suspect: false,
            bad: None,
        };
        let info = unit.info(unit.chunks.start);
        unit.stored = info.compressed_offset..info.compressed_end();
        unit.uncompressed = match info.form {
            ChunkForm::Batch { index, .. } => unit.batch_size(index).into(),
            _ => info.uncompressed_size.into(),
        };
        unit
    }

    /// Looks again where the unit is stored, after that turned out to be another place; false if it is the
    /// same.
    pub fn relocate(&mut self) -> bool {
        let info = self.info(self.chunks.start);
        let before = self.stored.clone();
        self.stored = info.compressed_offset..info.compressed_end();
        self.stored != before
    }

    pub fn piece(&self) -> Piece {
        Piece { stored: self.stored.clone(), uncompressed: self.uncompressed }
    }

    fn table(&self) -> &Table {
        self.blob.table.get().expect("units are made from the table")
    }

    fn info(&self, index: u32) -> ChunkInfo {
        self.table().place(ChunkIndex(index)).expect("units lie inside the table")
    }

    fn batch_size(&self, batch: u32) -> u32 {
        let context = self.table().infos.batch(batch).expect("checked with the table");
        context.uncompressed_size.get()
    }

    /// Are all chunks marked as being in the cache file?
    pub fn marked_ready(&self, map: &ChunkMap) -> io::Result<bool> {
        Ok(map.ready(&self.chunks)?.into_iter().all(|ready| ready))
    }

    /// Reads the unit from the cache file and compares it with its digests; finishes it if all is
    /// right.
    pub fn verify_cached(&mut self, data: &File, map: &ChunkMap) -> Cached {
        let store = self.blob.store.clone();
        let mut foreign = false;
        for i in self.chunks.clone() {
            if self.blob.verified.get(i) {
                continue;
            }
            let (info, index) = (self.info(i), ChunkIndex(i));
            let proof @ Proof::Digest(_) = self.table().proof(index) else { return Cached::Wrong };
            let size = usize::try_from(info.uncompressed_size).expect("24 bits");
            let padded = size.next_multiple_of(BLOCK);
            let mut buffer = store.buffer(padded);
            let read = data.read_exact_at(&mut buffer, info.uncompressed_offset);
            let zeros = buffer[size..].iter().all(|&byte| byte == 0);
            let right = read.is_ok() && zeros && proof.holds(&self.blob.info, &buffer[..size]);
            if !right && read.is_ok() {
                let digest = self.blob.info.digester.digest(&buffer[..size]);
                foreign |= zeros && map.seal(index).is_ok_and(|seal| seal == digest);
            }
            store.give_back(buffer);
            if !right {
                if foreign {
                    continue; // the others may be right, but the unit is not ours to replace
                }
                let reason = read.map_or_else(|e| e.to_string(), |()| "its digest".into());
                if !std::mem::replace(&mut self.suspect, true) {
                    add(&store.counters.cache_damage_total, 1);
                    log::warn!(
                        "blob {}: chunk {i} in the cache is damaged and fetched again: {reason}",
                        self.blob.info.id
                    );
                }
                return Cached::Wrong;
            }
            self.blob.verified.set(i);
            add(&store.counters.chunks_verified_total, 1);
            add(&store.counters.cache_hits_total, 1);
        }
        if foreign {
            return Cached::Foreign;
        }
        self.finish(self.chunks.clone().map(|_| Ok(ChunkData::Cached)).collect());
        Cached::Right
    }

    /// Takes the stored bytes: decompresses, verifies, writes, marks. Finishes the unit unless they
    /// are bad.
    pub fn accept(&mut self, stored: &[u8]) -> Result<(), Bad> {
        let store = self.blob.store.clone();
        let size = usize::try_from(self.uncompressed).expect("at most 16 MiB");
        let first = self.info(self.chunks.start);
        let plain = match first.form {
            ChunkForm::Plain => true,
            ChunkForm::Compressed => self.blob.info.compressor == Compressor::None,
            ChunkForm::Batch { .. } => stored.len() == size,
        };
        if plain {
            if stored.len() != size {
                return Err(Bad::Codec(CodecError::WrongSize {
                    compressor: Compressor::None,
                    got: stored.len(),
                    want: size,
                }));
            }
            return self.accept_plain(stored);
        }
        let mut buffer = store.buffer(size);
        let result = self
            .blob
            .info
            .compressor
            .decompress(stored, &mut buffer)
            .map_err(Bad::Codec)
            .and_then(|()| self.accept_plain(&buffer));
        store.give_back(buffer);
        result
    }

    fn accept_plain(&mut self, bytes: &[u8]) -> Result<(), Bad> {
        let mut results = Vec::with_capacity(self.chunks.len());
        let mut bad = false;
        for i in self.chunks.clone() {
            let info = self.info(i);
            let start = match info.form {
                ChunkForm::Batch { offset, .. } => offset,
                _ => 0,
            };
            let start = usize::try_from(start).expect("24 bits");
            let size = usize::try_from(info.uncompressed_size).expect("24 bits");
            let chunk = &bytes[start..start + size];
            let proof = self.table().proof(ChunkIndex(i));
            if !proof.holds(&self.blob.info, chunk) {
                add(&self.blob.store.counters.digest_mismatches_total, 1);
                bad = true;
                continue;
            }
            if proof != Proof::Nothing {
                add(&self.blob.store.counters.chunks_verified_total, 1);
            }
            results.push(Ok(self.keep_chunk(ChunkIndex(i), &info, &proof, chunk)));
        }
        if bad {
            return Err(Bad::Digest);
        }
        if self.slot.class() == Class::ReadAhead && results.iter().all(is_cached) {
            add(&self.blob.store.counters.read_ahead_chunk_bytes_total, self.stored_len());
            self.blob.ahead.came(self.chunks.clone());
        }
        self.finish(results.into());
        Ok(())
    }

    /// Puts a verified chunk where it may go.
    fn keep_chunk(
        &self,
        index: ChunkIndex,
        info: &ChunkInfo,
        proof: &Proof,
        bytes: &[u8],
    ) -> ChunkData {
        let blob = &self.blob;
        if blob.verified.get(index.0) {
            return ChunkData::Cached; // a member of a batch that was there before
        }
        let written = match (&self.keep, blob.cache.get(), proof) {
            (Keep::Private, Some(cache), _) => write_chunk(&cache.data, info, bytes),
            (Keep::Claimed(_), Some(cache), Proof::Digest(digest)) => match &cache.map {
                Some(map) => map
                    .set_seal(index, digest)
                    .and_then(|()| write_chunk(&cache.data, info, bytes))
                    .and_then(|()| map.set_ready(index)),
                None => Err(io::ErrorKind::NotFound.into()),
            },
            _ => {
                add(&blob.store.counters.uncached_chunks_total, 1);
                return ChunkData::Memory(bytes.into());
            }
        };
        match written {
            Ok(()) => {
                blob.store.write_worked(&blob.info.id);
                blob.verified.set(index.0);
                ChunkData::Cached
            }
            Err(e) => {
                blob.store.write_failed(&blob.info.id, &e);
                add(&blob.store.counters.uncached_chunks_total, 1);
                ChunkData::Memory(bytes.into())
            }
        }
    }

    /// Ends the unit: its claim, its flight, its waiters.
    pub fn finish(&mut self, results: Arc<[ChunkResult]>) {
        self.keep = Keep::Nowhere;
        self.end(results);
    }

    /// Ends the unit with one error for all of its chunks that are not verified.
    pub fn fail(mut self, error: &Arc<ChunkError>) {
        let results = self.failed(error);
        self.finish(results);
    }

    fn failed(&self, error: &Arc<ChunkError>) -> Arc<[ChunkResult]> {
        let result = |i| match self.blob.verified.get(i) {
            true => Ok(ChunkData::Cached),
            false => Err(error.clone()),
        };
        self.chunks.clone().map(result).collect()
    }

    /// Ends the unit with an error if its last reader gives up by `now`; gives it back if one has
    /// come who waits for longer.
    pub fn expire(self, error: &Arc<ChunkError>, now: Instant) -> Option<Unit> {
        let ended = self.end_if(|slot| slot.until() <= now, || self.failed(error));
        (!ended).then_some(self)
    }

    /// Ends the unit without a result, as nobody waits for it; gives it back if somebody does, to be
    /// looked for again: it is not claimed any more.
    pub fn release(mut self) -> Option<Unit> {
        // First, as claims of one process are one: a later flight must not lose its own.
        self.keep = Keep::Nowhere;
        if self.slot.is_done() {
            return None;
        }
        let error = || Arc::new(self.blob.error(self.chunks.start, ChunkFailure::Abandoned));
        let ended = self.end_if(|slot| slot.class() != Class::Demand, || self.failed(&error()));
        (!ended).then_some(self)
    }

    /// Stored bytes.
    pub fn stored_len(&self) -> u64 {
        self.stored.end - self.stored.start
    }

    fn end(&self, results: Arc<[ChunkResult]>) {
        self.end_if(|_| true, || results);
    }

    /// Ends the unit with `results` if it is `over`; tells whether it did.
    fn end_if(
        &self,
        over: impl FnOnce(&UnitSlot) -> bool,
        results: impl FnOnce() -> Arc<[ChunkResult]>,
    ) -> bool {
        let mut flights = self.blob.flights.lock().unwrap_or_else(PoisonError::into_inner);
        // Readers join under this lock: none can come between the look and the end.
        if !over(&self.slot) {
            return false;
        }
        // Only our own: a waiter may have found the result and started a new flight already.
        if flights.get(&self.chunks.start).is_some_and(|slot| Arc::ptr_eq(slot, &self.slot)) {
            flights.remove(&self.chunks.start);
        }
        drop(flights);
        self.slot.finish(results());
        true
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        if !self.slot.is_done() {
            let error = self.blob.error(self.chunks.start, ChunkFailure::Abandoned);
            self.end(self.failed(&Arc::new(error)));
        }
    }
}

fn is_cached(result: &ChunkResult) -> bool {
    matches!(result, Ok(ChunkData::Cached))
}

/// Writes the chunk and zeros up to the end of its last block.
fn write_chunk(data: &File, info: &ChunkInfo, bytes: &[u8]) -> io::Result<()> {
    static ZEROS: [u8; BLOCK] = [0; BLOCK];
    let offset = info.uncompressed_offset;
    let padding = bytes.len().next_multiple_of(BLOCK) - bytes.len();
    let parts = [IoSlice::new(bytes), IoSlice::new(&ZEROS[..padding])];
    let written = rustix::io::pwritev(data, &parts, offset)?;
    if written < bytes.len() {
        data.write_all_at(&bytes[written..], offset + written as u64)?;
    }
    let written = written.max(bytes.len());
    data.write_all_at(&ZEROS[..bytes.len() + padding - written], offset + written as u64)
}

impl Blob {
    pub(super) fn error(&self, index: u32, source: ChunkFailure) -> ChunkError {
        let id = self.store.error_id();
        ChunkError { id, blob: self.info.id, index: ChunkIndex(index), source }
    }
}

impl Store {
    /// A buffer of `len` bytes with any content.
    pub(super) fn buffer(&self, len: usize) -> Vec<u8> {
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut buffer = buffers.pop().unwrap_or_default();
        drop(buffers);
        buffer.resize(len, 0);
        buffer
    }

    pub(super) fn give_back(&self, buffer: Vec<u8>) {
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        if buffer.capacity() <= MAX_KEPT_BUFFER && buffers.len() < self.config.workers {
            buffers.push(buffer);
        }
    }

    /// Says once that the cache does not take what it should, until it does again.
    pub(super) fn write_failed(&self, blob: &BlobId, e: &io::Error) {
        add(&self.counters.cache_write_errors_total, 1);
        if !self.degraded.swap(true, Ordering::Relaxed) {
            log::warn!(
                "blob {blob}: cannot write to the cache, chunks are served without caching: {e}"
            );
        }
    }

    pub(super) fn write_worked(&self, blob: &BlobId) {
        if self.degraded.load(Ordering::Relaxed) && self.degraded.swap(false, Ordering::Relaxed) {
            log::info!("blob {blob}: the cache can be written to again");
        }
    }
}
