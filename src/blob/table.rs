//! The context table of a blob and the digests of its chunks: made or loaded once, with the first chunk.
//!
//! Where the chunk table of the bootstrap has a record of each chunk, as nearly always, it stands for the
//! context table, and nothing is fetched. Digests tell whether it was right about where chunks are;
//! if one does not match, whatever is asked, the blob's own table has the last word.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, PoisonError};

use sha2::{Digest, Sha256};
use tokio::sync::OnceCell;
use zerocopy::FromBytes;

use super::claim::Claim;
use super::error::{ChunkFailure, chain};
use super::flight::{Slot, within};
use super::store::{Blob, DigestSource};
use crate::rafs::ci::{ChunkForm, ChunkInfo, ChunkInfos};
use crate::rafs::id::ChunkIndex;
use crate::rafs::layout::{BlobFeatures, CI_HEADER_SIZE, CiHeader, MAX_CHUNKS};
use crate::rafs::toc::{PackedBlob, SectionKind, Source};
use crate::rafs::{BlobInfo, Bootstrap, ChunkDigests, FormatError};

/// Most bytes of context table for one chunk: its entry and a batch context of its own.
const MAX_TABLE_BYTES_PER_CHUNK: u64 = 64;
/// Bytes at the end of a packed blob that hold any table of contents.
const TOC_TAIL: u64 = 4096;

/// The load of the table on its way.
pub type TableSlot = Slot<Result<(), ChunkFailure>>;

/// Where the chunks of a blob are and what they must be.
pub struct Table {
    pub infos: ChunkInfos,
    /// `infos` are what the chunk table of the bootstrap says.
    of_records: bool,
    /// What the blob itself says, if it was asked and says something else about stored bytes.
    own: OnceCell<Option<ChunkInfos>>,
    /// SHA-256 of the context table: images that agree on it may share a cache file.
    pub layout: [u8; 32],
    digests: ChunkDigests,
    /// Of `blob.digest`, 32 bytes for each chunk; loaded when a chunk has no record.
    section: OnceLock<Vec<u8>>,
    pub digest_source: DigestSource,
    /// False as long as the table is only known from the cache, where another image may have put
    /// it. Digests make up for that, so it matters for chunks that have none.
    confirmed: AtomicBool,
}

/// What a chunk is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proof {
    /// By the blob's digester.
    Digest([u8; 32]),
    Crc32c(u32),
    Nothing,
}

impl Table {
    /// Parses the table and compares it with the chunk table of the bootstrap.
    ///
    /// `strict`: it must agree with every record in every field, not only in what readers rely
    /// on, as it does in every image of the reference builder.
    fn new(
        image: &Bootstrap,
        blob: &BlobInfo,
        header: &CiHeader,
        table: Vec<u8>,
        strict: bool,
    ) -> Result<Table, FormatError> {
        let layout = Sha256::digest(&table).into();
        let infos = ChunkInfos::parse(blob, table, header)?;
        let digests = image.chunk_digests(blob.index)?;
        Table::checked(blob, layout, infos, digests, strict)
    }

    /// The table that the records of the bootstrap stand for; `None` if they do not say enough, or contradict
    /// each other.
    fn of_records(image: &Bootstrap, blob: &BlobInfo) -> Option<Table> {
        let digests = image.chunk_digests(blob.index).ok()?;
        let entries = digests.entries(blob)?;
        let layout = Sha256::digest(&entries).into();
        let infos = ChunkInfos::of_entries(blob, entries)
            .inspect_err(|e| log::debug!("blob {}: chunk table: {}", blob.id, chain(e)))
            .ok()?;
        let mut table = Table::checked(blob, layout, infos, digests, true).ok()?;
        (table.of_records, table.confirmed) = (true, AtomicBool::new(true));
        Some(table)
    }

    fn checked(
        blob: &BlobInfo,
        layout: [u8; 32],
        infos: ChunkInfos,
        digests: ChunkDigests,
        strict: bool,
    ) -> Result<Table, FormatError> {
        let (mut records, mut checksums) = (0u32, 0u32);
        for i in 0..infos.len() {
            let index = ChunkIndex(i);
            let info = infos.get(index).expect("below the length");
            checksums += u32::from(info.crc32c.is_some());
            let Some(record) = digests.record(index) else { continue };
            records += 1;
            let placed = record.uncompressed_offset.get() == info.uncompressed_offset
                && record.uncompressed_size.get() == info.uncompressed_size;
            // Members of a batch have no place of their own in the blob file.
            let stored = matches!(info.form, ChunkForm::Batch { .. })
                || (record.compressed_offset.get() == info.compressed_offset
                    && record.compressed_size.get() == info.compressed_size);
            if !placed || (strict && !stored) {
                return Err(invalid(
                    "context table",
                    0,
                    format!("chunk {i} is elsewhere than its record in the chunk table says"),
                ));
            }
        }
        let digest_source = match () {
            () if records > 0 || infos.is_empty() => DigestSource::ChunkTable,
            () if has_section(blob) => DigestSource::BlobDigest,
            () if checksums > 0 => DigestSource::Crc32c,
            () => DigestSource::Nothing,
        };
        let section = OnceLock::new();
        let confirmed = AtomicBool::new(false);
        let (of_records, own) = (false, OnceCell::new());
        Ok(Table { infos, of_records, own, layout, digests, section, digest_source, confirmed })
    }

    /// Where chunk `index` is, stored and uncompressed.
    pub fn place(&self, index: ChunkIndex) -> Option<ChunkInfo> {
        self.own.get().and_then(Option::as_ref).unwrap_or(&self.infos).get(index)
    }

    /// What chunk `index` is compared with.
    pub fn proof(&self, index: ChunkIndex) -> Proof {
        if let Some(digest) =
            self.digests.get(index).copied().or_else(|| self.section_digest(index))
        {
            return Proof::Digest(digest);
        }
        match self.infos.get(index).and_then(|info| info.crc32c) {
            Some(crc) => Proof::Crc32c(crc),
            None => Proof::Nothing,
        }
    }

    fn section_digest(&self, index: ChunkIndex) -> Option<[u8; 32]> {
        let at = usize::try_from(index.0).ok()?.checked_mul(32)?;
        self.section.get()?.get(at..at + 32)?.try_into().ok()
    }

    /// Whether the cache file may be shared with other processes: only if there are digests, which
    /// tell their chunks from ours.
    pub fn shareable(&self) -> bool {
        matches!(self.digest_source, DigestSource::ChunkTable | DigestSource::BlobDigest)
    }
}

fn has_section(blob: &BlobInfo) -> bool {
    blob.features.contains(BlobFeatures::INLINED_CHUNK_DIGEST)
}

impl Proof {
    /// Are these the bytes of the chunk, as far as can be told?
    pub fn holds(&self, blob: &BlobInfo, bytes: &[u8]) -> bool {
        match self {
            Proof::Digest(digest) => blob.digester.digest(bytes) == *digest,
            Proof::Crc32c(crc) => crc32c::crc32c(bytes) == *crc,
            Proof::Nothing => true,
        }
    }
}

impl Blob {
    /// What must still be loaded before `chunks` can be fetched?
    fn lacks(&self, chunks: &[ChunkIndex]) -> bool {
        let Some(table) = self.table.get() else { return true };
        has_section(&self.info)
            && table.section.get().is_none()
            && chunks
                .iter()
                .any(|&index| index.0 < table.infos.len() && table.digests.get(index).is_none())
    }

    /// Joins or starts the load of what is needed for `chunks`; `None` if all is there.
    pub(super) fn load_table(
        self: &Arc<Self>,
        chunks: &[ChunkIndex],
        deadline: std::time::Instant,
    ) -> Option<Arc<TableSlot>> {
        if !self.lacks(chunks) {
            return None;
        }
        let mut loading = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.lacks(chunks) {
            return None;
        }
        if let Some(slot) = &*loading {
            slot.extend(deadline);
            return Some(slot.clone());
        }
        let slot = Arc::new(TableSlot::new(self.store.epoch, deadline));
        *loading = Some(slot.clone());
        let load = Load { blob: self.clone(), slot: slot.clone() };
        self.store.runtime.spawn(load.run());
        Some(slot)
    }
}

/// A load on its way; its slot is filled however it ends.
struct Load {
    blob: Arc<Blob>,
    slot: Arc<TableSlot>,
}

impl Drop for Load {
    fn drop(&mut self) {
        self.finish(Err(ChunkFailure::Abandoned)); // the first result counts
    }
}

impl Load {
    async fn run(self) {
        let result = self.load().await;
        self.finish(result);
    }

    fn finish(&self, result: Result<(), ChunkFailure>) {
        let mut loading = self.blob.loading.lock().unwrap_or_else(PoisonError::into_inner);
        if loading.as_ref().is_some_and(|slot| Arc::ptr_eq(slot, &self.slot)) {
            *loading = None;
        }
        drop(loading);
        self.slot.finish(result);
    }

    async fn load(&self) -> Result<(), ChunkFailure> {
        let blob = &self.blob;
        if blob.table.get().is_none() {
            let table = self.table().await?;
            blob.say_what_protects(&table);
            drop(blob.table.set(table)); // only one load is on its way at a time
            let opener = blob.clone();
            blob.on_worker(move || opener.cache_files().is_some()).await?;
            if blob.digest_source() != Some(DigestSource::BlobDigest) {
                return Ok(()); // a chunk without record makes the reader ask again
            }
        }
        let table = blob.table.get().ok_or(ChunkFailure::Abandoned)?;
        if has_section(&blob.info) {
            drop(table.section.set(self.good_section().await?));
        } else if !table.confirmed.load(Ordering::Acquire) {
            if self.fetch().await?.layout != table.layout {
                let reason = "the saved one is not the blob's".into();
                return Err(table_error(invalid("context table", blob.info.ci_offset, reason)));
            }
            table.confirmed.store(true, Ordering::Release);
        }
        Ok(())
    }

    async fn table(&self) -> Result<Table, ChunkFailure> {
        let blob = self.blob.clone();
        let of_records = move || Table::of_records(&blob.image, &blob.info);
        if let Some(table) = self.blob.on_worker(of_records).await? {
            return Ok(table);
        }
        if let Some(table) = self.saved().await? {
            return Ok(table);
        }
        let claim = self.claim().await?;
        if claim.is_some()
            && let Some(table) = self.saved().await?
        {
            return Ok(table); // whoever held the claim has fetched it
        }
        self.fetch().await
    }

    /// Fetches the table from the backend, a second time if what comes is damaged.
    async fn fetch(&self) -> Result<Table, ChunkFailure> {
        let info = &self.blob.info;
        let size = info.ci_uncompressed_size;
        let count = u64::from(info.chunk_count.max(1));
        if (size > count * MAX_TABLE_BYTES_PER_CHUNK && size > u64::from(MAX_CHUNKS))
            || info.ci_compressed_size > size
        {
            let reason = format!("{size} bytes for {} chunks", info.chunk_count);
            return Err(table_error(invalid("context table", info.ci_offset, reason)));
        }
        let mut second_try = false;
        loop {
            let stored = info
                .ci_offset
                .checked_add(info.ci_compressed_size)
                .and_then(|end| end.checked_add(CI_HEADER_SIZE))
                .map(|end| info.ci_offset..end)
                .ok_or_else(|| {
                    table_error(invalid(
                        "context table",
                        info.ci_offset,
                        "its end overflows".into(),
                    ))
                })?;
            let bytes = self.blob.read_all(stored.clone(), &self.slot).await?;
            let blob = self.blob.clone();
            let parsed = self.blob.on_worker(move || blob.parse_table(&bytes, !second_try)).await?;
            match parsed {
                Ok(table) => return Ok(table),
                Err(e) if matches!(e, FormatError::Unsupported { .. }) => {
                    return Err(table_error(e));
                }
                Err(e) => {
                    let another = self.blob.backend.mistrust(&info.id, stored);
                    if second_try && !another {
                        return Err(table_error(e));
                    }
                    log::warn!("blob {}: fetching the context table again: {}", info.id, chain(&e));
                    second_try = true;
                }
            }
        }
    }

    async fn saved(&self) -> Result<Option<Table>, ChunkFailure> {
        let blob = self.blob.clone();
        self.blob
            .on_worker(move || {
                let (header, table) = blob.store.dir()?.load_table(&blob.info)?;
                Table::new(&blob.image, &blob.info, &header, table, true)
                    .inspect_err(|e| {
                        log::warn!("blob {}: saved context table: {}", blob.info.id, chain(e));
                    })
                    .ok()
                    .filter(Table::shareable) // without digests it could be anybody's
            })
            .await
    }

    /// The claim on fetching the table; `None` if there is no cache to save it in, or another
    /// process holds it for too long.
    async fn claim(&self) -> Result<Option<Claim>, ChunkFailure> {
        let blob = self.blob.clone();
        let taken = self
            .blob
            .on_worker(move || {
                let (file, range) = blob.store.dir()?.table_lock(&blob.info.id).ok()?;
                let claim = Claim::try_take(&file, range.clone()).ok()?;
                Some((file, range, claim))
            })
            .await?;
        let Some((file, range, claim)) = taken else { return Ok(None) };
        if claim.is_some() {
            return Ok(claim);
        }
        self.blob.store.counters.claim_waits_total.fetch_add(1, Ordering::Relaxed);
        let until = self.slot.claim_patience();
        let wait = self.blob.store.waiters.wait(file, range);
        Ok(within(&self.blob.store, || until, wait).await.and_then(Result::ok))
    }

    /// The digests of the blob's `blob.digest` section, from another source if what comes is
    /// damaged and there is one.
    async fn good_section(&self) -> Result<Vec<u8>, ChunkFailure> {
        let info = &self.blob.info;
        loop {
            match self.section().await {
                Err(ChunkFailure::Table(e)) if self.blob.backend.mistrust(&info.id, 0..0) => {
                    log::warn!("blob {}: fetching the digests again: {}", info.id, chain(&*e));
                }
                other => return other,
            }
        }
    }

    /// The digests of the blob's `blob.digest` section.
    async fn section(&self) -> Result<Vec<u8>, ChunkFailure> {
        let blob = &self.blob;
        let size = blob.blob_size(&self.slot).await?;
        let start = size.saturating_sub(TOC_TAIL);
        let bytes = blob.read_all(start..size, &self.slot).await?;
        let packed = PackedBlob::read(&Tail { size, start, bytes }).map_err(table_error)?;
        let wrong = |reason: &str| table_error(invalid("blob.digest", start, reason.to_owned()));
        let section = packed
            .section(SectionKind::BlobDigest)
            .ok_or_else(|| wrong("the blob has no such section"))?;
        let table = blob.table.get().ok_or(ChunkFailure::Abandoned)?;
        let want = u64::from(table.infos.len()) * 32;
        if section.uncompressed_size != want || section.stored.end - section.stored.start != want {
            return Err(wrong("it has not 32 bytes for each chunk"));
        }
        let digests = blob.read_all(section.stored.clone(), &self.slot).await?;
        if section.digest.is_some_and(|d| d != <[u8; 32]>::from(Sha256::digest(&digests))) {
            return Err(wrong("it does not match its digest"));
        }
        Ok(digests)
    }
}

impl Blob {
    /// A chunk does not match its digest, whoever is asked. If the chunk table of the bootstrap told where it
    /// is, the blob is asked for its own context table: true if that says something else about any
    /// chunk. Once for each blob and process, unless the backend fails.
    pub(super) async fn is_stored_elsewhere<R: Clone>(self: &Arc<Self>, waiter: &Slot<R>) -> bool {
        let Some(table) = self.table.get().filter(|table| table.of_records) else { return false };
        let ask = || async {
            let slot = Arc::new(TableSlot::new(self.store.epoch, waiter.until()));
            let own = Load { blob: self.clone(), slot }.fetch().await?;
            if own.layout == table.layout {
                return Ok(None);
            }
            log::warn!(
                "blob {}: its context table says something else about where chunks are stored than \
                 the bootstrap, and is believed",
                self.info.id
            );
            Ok::<_, ChunkFailure>(Some(own.infos))
        };
        table.own.get_or_try_init(ask).await.is_ok_and(Option::is_some)
    }

    /// Decompresses, checks and saves what was fetched: the stored table and its header.
    fn parse_table(&self, bytes: &[u8], strict: bool) -> Result<Table, FormatError> {
        let info = &self.info;
        let wrong = |reason: String| invalid("context table", info.ci_offset, reason);
        let split = bytes.len().checked_sub(size_of::<CiHeader>());
        let (stored, header) = split
            .and_then(|at| bytes.split_at_checked(at))
            .ok_or_else(|| wrong("no room for its header".into()))?;
        let header = CiHeader::read_from_bytes(header).map_err(|_| wrong("no header".into()))?;
        let size = usize::try_from(info.ci_uncompressed_size)
            .map_err(|_| wrong("too large for memory".into()))?;
        let mut table = vec![0; size];
        info.ci_compressor.decompress(stored, &mut table).map_err(|e| wrong(e.to_string()))?;
        let table = Table::new(&self.image, info, &header, table, strict)?;
        table.confirmed.store(true, Ordering::Release);
        if let Some(dir) = self.store.dir()
            && let Err(e) = dir.save_table(&info.id, &header, table.infos.as_bytes())
        {
            self.store.write_failed(&self.info.id, &e);
        }
        Ok(table)
    }

    /// Tells the operator, once for each blob, if its chunks are protected by less than digests.
    fn say_what_protects(&self, table: &Table) {
        let id = &self.info.id;
        match table.digest_source {
            DigestSource::ChunkTable => log::debug!("blob {id}: digests of the bootstrap"),
            DigestSource::BlobDigest => log::info!(
                "blob {id}: the bootstrap has no chunk digests, those in the blob are used"
            ),
            DigestSource::Crc32c => log::warn!(
                "blob {id}: the image has no chunk digests, only CRC-32C checksums: accidents are \
                 found, forgery is not; the cache is not shared"
            ),
            DigestSource::Nothing => log::warn!(
                "blob {id}: the image has neither chunk digests nor checksums: its data cannot be \
                 verified; the cache is not shared"
            ),
        }
    }
}

fn invalid(what: &'static str, offset: u64, reason: String) -> FormatError {
    FormatError::Invalid { what, offset, reason }
}

fn table_error(e: FormatError) -> ChunkFailure {
    ChunkFailure::Table(Arc::new(e))
}

/// The end of a packed blob, where its table of contents is.
struct Tail {
    size: u64,
    start: u64,
    bytes: Vec<u8>,
}

impl Source for Tail {
    fn size(&self) -> std::io::Result<u64> {
        Ok(self.size)
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        let at = offset.checked_sub(self.start).ok_or(std::io::ErrorKind::UnexpectedEof)?;
        self.bytes[..].read_exact_at(buf, at)
    }
}
