//! The store of one daemon, and a blob as one image sees it.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;

use super::ahead::Ahead;
use super::cache_file::{CacheDir, CacheFiles, DirError};
use super::claim::Waiters;
use super::counters::Counters;
use super::error::StoreError;
use super::gate::Gate;
use super::link::Link;
use super::neighbours::ImageFiles;
use super::paging;
use super::readiness::Bitmap;
use super::table::{Table, TableSlot};
use super::unit::UnitSlot;
use crate::backend::Backend;
use crate::rafs::ci::ChunkInfo;
use crate::rafs::id::{BlobId, BlobIndex, ChunkIndex};
use crate::rafs::layout::BLOCK_SIZE;
use crate::rafs::{BlobInfo, Bootstrap};

/// Most bytes asked for early because of one chunk unless a config says otherwise: nydusd's default.
const DEFAULT_AMPLIFY: u64 = 1 << 20;

/// How a [`Store`] works. [`StoreConfig::new`] gives the defaults.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// The cache's files go to the directory `rafsd` below this one (config `work_dir`).
    pub cache_dir: PathBuf,
    /// How long a reader should wait for a chunk: [`Store::deadline`] is this far away.
    pub read_timeout: Duration,
    /// How long a backend may send nothing before its request is given up and sent anew. For
    /// backends that do not notice themselves, so longer than their own timeouts.
    pub stall_timeout: Duration,
    /// Most bytes of chunks, stored and uncompressed, that are on their way at once. A single
    /// larger chunk is let through alone.
    pub in_flight_bytes: u64,
    /// Chunks decompressed, verified or written at once.
    pub workers: usize,
}

impl StoreConfig {
    /// 30 s, 10 s, 64 MiB, two workers for each processor.
    pub fn new(cache_dir: impl Into<PathBuf>) -> Self {
        let processors = std::thread::available_parallelism().map_or(2, usize::from);
        StoreConfig {
            cache_dir: cache_dir.into(),
            read_timeout: Duration::from_secs(30),
            stall_timeout: Duration::from_secs(10),
            in_flight_bytes: 64 << 20,
            workers: (2 * processors).clamp(4, 64),
        }
    }
}

/// The cache of one daemon: its directory, its budgets, its counters.
pub struct Store {
    pub(super) config: StoreConfig,
    pub(super) runtime: Handle,
    pub(super) counters: Counters,
    /// The cache directory; empty as long as it cannot be made on a full or read-only disk.
    dir: OnceLock<CacheDir>,
    /// Start of the clock that deadlines are kept in.
    pub(super) epoch: Instant,
    /// One permit for each of `in_flight_bytes`.
    pub(super) budget: Arc<Gate>,
    pub(super) workers: Arc<Gate>,
    /// Threads that wait for the disk of the cache.
    pub(super) paging: Arc<Gate>,
    /// By [`Backend::name`]: blobs of one source share what was measured.
    links: Mutex<HashMap<String, Weak<Link>>>,
    /// The images that are open.
    images: Mutex<Vec<Weak<ImageFiles>>>,
    pub(super) waiters: Waiters,
    /// Buffers for decompression, kept to spare their pages being cleared again.
    pub(super) buffers: Mutex<Vec<Vec<u8>>>,
    next_error_id: AtomicU64,
    /// Whether the last write to the cache failed.
    pub(super) degraded: AtomicBool,
    /// Chunk data of each blob opened so far, in bytes.
    opened_bytes: Mutex<HashMap<BlobId, u64>>,
    /// What [`Blob::cache_file`] gives before there is one.
    no_file: OwnedFd,
}

impl Store {
    /// Makes or opens the cache directory.
    ///
    /// On a full or read-only disk the store works without a cache and says so in the log.
    ///
    /// # Errors
    ///
    /// If the directory cannot be used, or belongs to or is writable for someone else.
    pub fn new(config: StoreConfig, runtime: Handle) -> Result<Arc<Store>, StoreError> {
        let cache_error = |source| StoreError::CacheDir { path: config.cache_dir.clone(), source };
        let no_file = rustix::fs::memfd_create("no-cache", rustix::fs::MemfdFlags::CLOEXEC)
            .map_err(|e| cache_error(e.into()))?;
        let dir = OnceLock::new();
        match CacheDir::open(&config.cache_dir) {
            Ok(found) => drop(dir.set(found)),
            Err(DirError::NoRoom(e)) => log::warn!(
                "cache {}: {e}; chunks are served without caching",
                config.cache_dir.display()
            ),
            Err(DirError::Unsafe { path, reason }) => {
                return Err(StoreError::UnsafeCacheDir { path, reason });
            }
            Err(DirError::Io(e)) => return Err(cache_error(e)),
        }
        // What nobody waits for gets a part, so that demand finds room at once.
        let (bytes, workers) = (config.in_flight_bytes.max(1), config.workers.max(1) as u64);
        let some = workers.div_ceil(2);
        Ok(Arc::new(Store {
            budget: Gate::new([bytes, bytes / 2, bytes / 2, bytes / 4]),
            workers: Gate::new([workers, some, some, some]),
            paging: Gate::new([paging::MAX_THREADS; 4]),
            links: Mutex::default(),
            images: Mutex::default(),
            waiters: Waiters::default(),
            buffers: Mutex::default(),
            counters: Counters::default(),
            dir,
            epoch: Instant::now(),
            next_error_id: AtomicU64::new(1),
            degraded: AtomicBool::new(false),
            opened_bytes: Mutex::default(),
            no_file,
            runtime,
            config,
        }))
    }

    /// Blob `index` of `image`, whose bytes come from `backend`. Does no I/O: the context table is
    /// loaded with the first chunk.
    ///
    /// # Errors
    ///
    /// If the image has no such blob.
    pub fn open_blob(
        self: &Arc<Self>,
        image: &Bootstrap,
        index: BlobIndex,
        backend: Arc<dyn Backend>,
    ) -> Result<Arc<Blob>, StoreError> {
        let count = image.blobs().len();
        let info = image
            .blobs()
            .get(usize::from(index.0))
            .ok_or(StoreError::NoSuchBlob { index, count })?
            .clone();
        let (link, files) = (self.link(backend.name()), self.files(image));
        let mut opened = self.opened_bytes.lock().unwrap_or_else(PoisonError::into_inner);
        opened.insert(info.id, info.data_end);
        drop(opened);
        Ok(Arc::new_cyclic(|me| Blob {
            me: me.clone(),
            store: self.clone(),
            image: image.clone(),
            verified: Bitmap::new(info.chunk_count),
            ahead: Ahead::new(info.chunk_count),
            amplify: AtomicU64::new(DEFAULT_AMPLIFY),
            info,
            backend,
            link,
            files,
            table: OnceLock::new(),
            cache: OnceLock::new(),
            cache_retry: Mutex::default(),
            flights: Mutex::default(),
            loading: Mutex::default(),
            backend_down: AtomicBool::new(false),
            said_conflict: AtomicBool::new(false),
            read_only: OnceLock::new(),
            can_peek: AtomicBool::new(true),
        }))
    }

    /// The way to the source of this name.
    fn link(&self, source: &str) -> Arc<Link> {
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(link) = links.get(source).and_then(Weak::upgrade) {
            return link;
        }
        links.retain(|_, link| link.strong_count() > 0);
        let link = Arc::new(Link::new(self.epoch));
        links.insert(source.to_owned(), Arc::downgrade(&link));
        link
    }

    /// What was measured of the ways to sources in use: the source's name, the time until an answer
    /// begins (`None`: nothing has come yet), and bytes per second.
    pub fn links(&self) -> Vec<(String, Option<Duration>, u64)> {
        let links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        let open = links.iter().filter_map(|(name, link)| Some((name, link.upgrade()?)));
        let estimates = open.map(|(name, link)| {
            let (latency, bandwidth) = link.estimate();
            (name.clone(), latency, bandwidth)
        });
        let mut estimates: Vec<_> = estimates.collect();
        estimates.sort();
        estimates
    }

    fn files(&self, image: &Bootstrap) -> Arc<ImageFiles> {
        let mut images = self.images.lock().unwrap_or_else(PoisonError::into_inner);
        images.retain(|files| files.strong_count() > 0);
        if let Some(files) = images.iter().filter_map(Weak::upgrade).find(|f| f.is_of(image)) {
            return files;
        }
        let files = Arc::new(ImageFiles::new(image));
        images.push(Arc::downgrade(&files));
        files
    }

    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// When a read that starts now should give up.
    pub fn deadline(&self) -> Instant {
        Instant::now() + self.config.read_timeout
    }

    /// Bytes fetched so far, tables and repeated fetches included, and bytes of chunk data in all
    /// blobs opened so far: `fetched N of M bytes`.
    pub fn fetched(&self) -> (u64, u64) {
        let opened = self.opened_bytes.lock().unwrap_or_else(PoisonError::into_inner);
        (self.counters.fetched_bytes_total.load(Ordering::Relaxed), opened.values().sum())
    }

    pub(super) fn error_id(&self) -> u64 {
        self.next_error_id.fetch_add(1, Ordering::Relaxed)
    }

    /// The cache directory; tries again to make it if it could not be made before. Does I/O.
    pub(super) fn dir(&self) -> Option<&CacheDir> {
        if self.dir.get().is_none()
            && let Ok(found) = CacheDir::open(&self.config.cache_dir)
        {
            drop(self.dir.set(found)); // of two that were opened at once one is as good
        }
        self.dir.get()
    }
}

/// The same file, open for reading only.
pub fn reopen_read_only(file: BorrowedFd<'_>) -> io::Result<File> {
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// What a reader wants of one chunk, as the inode describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkRef {
    pub index: ChunkIndex,
    /// Start of the chunk in the uncompressed blob, in blocks of 4096 bytes.
    pub start_block: u32,
    /// Bytes of the chunk that belong to the file: all of them.
    pub size: u32,
}

impl ChunkRef {
    /// Does the context table say the same about the chunk as the inode?
    pub(super) fn agrees(&self, info: &ChunkInfo) -> bool {
        info.uncompressed_offset == u64::from(self.start_block) * BLOCK_SIZE
            && info.uncompressed_size == self.size
    }
}

/// How a fetched chunk can be read.
#[derive(Clone, Debug)]
pub enum ChunkData {
    /// From the cache file: [`Blob::verified`] gives the place.
    Cached,
    /// From here: the cache could not take it.
    Memory(Arc<[u8]>),
}

/// What the chunks of a blob are compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DigestSource {
    /// Digests of the chunk table in the bootstrap.
    ChunkTable,
    /// Digests of the blob's own `blob.digest` section.
    BlobDigest,
    /// Only the CRC-32C of the context table: finds accidents, not intent.
    Crc32c,
    /// Nothing: the image has neither digests nor checksums.
    Nothing,
}

/// One blob as one image sees it. Two images with the same blob have two of these; they share the
/// cache's files, and each believes only its own digests.
pub struct Blob {
    pub(super) me: Weak<Blob>,
    pub(super) store: Arc<Store>,
    pub(super) image: Bootstrap,
    pub(super) info: BlobInfo,
    pub(super) backend: Arc<dyn Backend>,
    /// The way to the backend.
    pub(super) link: Arc<Link>,
    pub(super) files: Arc<ImageFiles>,
    /// Chunks whose bytes in the cache file this process has verified.
    pub(super) verified: Bitmap,
    pub(super) ahead: Ahead,
    /// Most bytes asked for early because of one chunk.
    pub(super) amplify: AtomicU64,
    pub(super) table: OnceLock<Table>,
    pub(super) cache: OnceLock<CacheFiles>,
    /// Held while the cache files are opened; when that may be tried again, if it was tried.
    pub(super) cache_retry: Mutex<Option<Instant>>,
    /// Downloads and checks on their way, by the first chunk of their unit.
    pub(super) flights: Mutex<HashMap<u32, Arc<UnitSlot>>>,
    /// The load of the context table on its way.
    pub(super) loading: Mutex<Option<Arc<TableSlot>>>,
    pub(super) backend_down: AtomicBool,
    pub(super) said_conflict: AtomicBool,
    read_only: OnceLock<Arc<File>>,
    /// The file system of the cache file can tell what is in the page cache, as far as is known.
    pub(super) can_peek: AtomicBool,
}

impl Blob {
    /// Where the chunk is in the cache file, in bytes, if this process has verified it and the
    /// inode and the context table agree about it. No lock, no system call, no allocation.
    pub fn verified(&self, chunk: ChunkRef) -> Option<u64> {
        if !self.verified.get(chunk.index.0) {
            return None;
        }
        if self.ahead.take_unread(chunk.index.0) {
            self.follow(chunk.index.0);
        }
        let info = self.table.get()?.infos.get(chunk.index)?;
        chunk.agrees(&info).then_some(info.uncompressed_offset)
    }

    /// Sets how many bytes may be fetched early because a reader wants a chunk, until it goes on in
    /// order; 0: there is no read-ahead at all. 1 MiB if it is never called.
    pub fn set_amplify(&self, bytes: u64) {
        self.amplify.store(bytes, Ordering::Relaxed);
    }

    /// The uncompressed blob. May be shorter than a verified chunk reaches if somebody shortened
    /// it: see [`Blob::distrust`]. Before any chunk is verified this is an empty file.
    pub fn cache_file(&self) -> BorrowedFd<'_> {
        match self.cache.get() {
            Some(cache) => cache.data.as_fd(),
            None => self.store.no_file.as_fd(),
        }
    }

    /// The cache file, open for reading only: what a guest gets to see through it cannot be changed.
    ///
    /// # Errors
    ///
    /// It cannot be opened a second time.
    pub fn read_only_file(&self) -> io::Result<Arc<File>> {
        if let Some(file) = self.read_only.get() {
            return Ok(file.clone());
        }
        let file = Arc::new(reopen_read_only(self.cache_file())?);
        if self.cache.get().is_none() {
            return Ok(file); // not the cache file yet
        }
        Ok(self.read_only.get_or_init(|| file).clone())
    }

    /// Forgets that the chunk is verified, because reading the cache file failed or came back
    /// short. The next [`Blob::fetch`] reads and verifies it again, and replaces it if it must.
    pub fn distrust(&self, chunk: ChunkRef) {
        self.verified.clear(chunk.index.0);
    }

    pub fn id(&self) -> &BlobId {
        &self.info.id
    }

    /// The blob as the image's blob table has it.
    pub fn info(&self) -> &BlobInfo {
        &self.info
    }

    /// What this blob's chunks are compared with; `None` before the first chunk is asked for.
    pub fn digest_source(&self) -> Option<DigestSource> {
        self.table.get().map(|table| table.digest_source)
    }

    /// Chunks of the blob that are verified, of how many.
    pub fn ready_chunks(&self) -> (u32, u32) {
        (self.verified.count(), self.info.chunk_count)
    }
}

impl std::fmt::Debug for Blob {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Blob").field("id", &self.info.id).finish_non_exhaustive()
    }
}
