//! Reading whole images through the cache, and backends that misbehave on purpose.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is how a test fails")]
#![allow(dead_code, reason = "each test program uses a part of it")]

#[path = "../support/golden_cases.rs"]
mod golden_cases;

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
#[allow(unused_imports, reason = "each test program uses a part of it")]
pub use golden_cases::{READABLE, golden};
use rafsd::backend::{Backend, BackendError, ByteStream, LocalFs, LocalFsConfig};
use rafsd::blob::{Blob, ChunkData, ChunkError, ChunkRef, Store, StoreConfig};
use rafsd::rafs::id::{BlobId, BlobIndex, ChunkIndex};
use rafsd::rafs::{Bootstrap, FileKind};
use sha2::{Digest, Sha256};
use tokio::runtime::Runtime;

/// Long enough for anything that is meant to succeed, also on a busy machine.
pub const PATIENT: Duration = Duration::from_secs(60);

pub fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// SHA-256 of each regular file by path, as `tree` (a `tree.json`) has it.
pub fn expected(tree: &Path) -> BTreeMap<String, String> {
    let entries: Vec<serde_json::Value> =
        serde_json::from_slice(&std::fs::read(tree).unwrap()).unwrap();
    let files = entries.iter().filter(|e| e["type"] == "file");
    files
        .map(|e| {
            // Names that are not UTF-8 go by their content.
            let sha256 = e["sha256"].as_str().unwrap();
            let path = e.get("path").map_or(sha256, |path| path.as_str().unwrap());
            (path.to_owned(), sha256.to_owned())
        })
        .collect()
}

/// A backend over the blobs of a golden case. A bootstrap that does not know the id of its blob
/// gets the only file there is.
pub fn local(case: &str, image: &Bootstrap, runtime: &Runtime) -> Arc<LocalFs> {
    let dir = golden(case).join("blobs");
    let mut config = LocalFsConfig::default();
    if image.blobs().iter().any(|blob| blob.id == BlobId::UNKNOWN) {
        let mut files = std::fs::read_dir(&dir).unwrap();
        config.blob_file = Some(files.next().unwrap().unwrap().path());
    } else {
        config.dir = Some(dir);
    }
    Arc::new(LocalFs::new(config, runtime.handle().clone()))
}

pub fn store(cache: &Path, runtime: &Runtime) -> Arc<Store> {
    Store::new(StoreConfig::new(cache), runtime.handle().clone()).unwrap()
}

pub fn open_blobs(
    store: &Arc<Store>,
    image: &Bootstrap,
    backend: &Arc<impl Backend + 'static>,
) -> Vec<Arc<Blob>> {
    (0..image.blobs().len())
        .map(|i| {
            let index = BlobIndex(u8::try_from(i).unwrap());
            store.open_blob(image, index, backend.clone()).unwrap()
        })
        .collect()
}

/// One regular file: path as in [`expected`] if it is UTF-8, and its chunks by blob.
pub struct FileChunks {
    pub path: Option<String>,
    pub chunks: Vec<(usize, ChunkRef)>,
}

pub fn files(image: &Bootstrap) -> Vec<FileChunks> {
    let mut files = Vec::new();
    for item in image.walk() {
        let item = item.unwrap();
        if item.inode.kind() != FileKind::Regular {
            continue;
        }
        let chunks = (0..item.inode.chunk_count())
            .map(|i| {
                let addr = item.inode.chunk(i).unwrap();
                let chunk = ChunkRef {
                    index: ChunkIndex(addr.chunk_index()),
                    start_block: addr.start_block(),
                    size: item.inode.chunk_len(i),
                };
                (usize::from(addr.device() - 1), chunk)
            })
            .collect();
        files.push(FileChunks { path: String::from_utf8(item.path()).ok(), chunks });
    }
    files
}

/// The bytes of one chunk, by the way a reader takes them.
pub fn chunk_bytes(
    blob: &Blob,
    chunk: ChunkRef,
    data: &ChunkData,
) -> Result<Vec<u8>, std::io::Error> {
    match data {
        ChunkData::Memory(bytes) => Ok(bytes.to_vec()),
        ChunkData::Cached => {
            let offset = blob.verified(chunk).expect("fetched as cached");
            let mut bytes = vec![0; usize::try_from(chunk.size).unwrap()];
            let mut done = 0;
            while done < bytes.len() {
                let at = offset + done as u64;
                match rustix::io::pread(blob.cache_file().as_fd(), &mut bytes[done..], at)? {
                    0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                    n => done += n,
                }
            }
            Ok(bytes)
        }
    }
}

/// Reads every file; content by path. Fails with the first error.
pub async fn read_tree(
    image: &Bootstrap,
    blobs: &[Arc<Blob>],
    timeout: Duration,
) -> Result<BTreeMap<String, String>, Arc<ChunkError>> {
    let mut out = BTreeMap::new();
    for file in files(image) {
        let mut hash = Sha256::new();
        // As a reader of 1 MiB requests: neighbours of one blob together.
        for run in file.chunks.chunk_by(|a, b| a.0 == b.0) {
            let blob = &blobs[run[0].0];
            let refs: Vec<_> = run.iter().map(|&(_, chunk)| chunk).collect();
            let fetched = blob.fetch(refs.clone(), Instant::now() + timeout).await;
            for (chunk, data) in refs.into_iter().zip(fetched) {
                hash.update(chunk_bytes(blob, chunk, &data?).unwrap());
            }
        }
        let hash = hex::encode(hash.finalize());
        out.insert(file.path.unwrap_or_else(|| hash.clone()), hash);
    }
    Ok(out)
}

/// What a [`Scripted`] backend does.
#[derive(Clone, Debug)]
pub enum Mode {
    Good,
    /// Never answers.
    Hang,
    /// Never answers behind the first piece.
    HangMidway,
    /// A transient error each time.
    Fail,
    /// Ends after half of the bytes.
    Short,
    /// One byte of the blob, at this offset, is wrong.
    Flip(u64),
    /// As `Flip`, until mistrusted.
    FlipOnce(u64),
}

/// Blobs in memory, handed out in small pieces, by a script.
pub struct Scripted {
    pub blobs: BTreeMap<BlobId, Bytes>,
    pub mode: Mutex<Mode>,
    pub requests: Mutex<Vec<(BlobId, Range<u64>)>>,
    pub mistrusted: AtomicU64,
    pub piece: usize,
    pub latency: Duration,
}

impl Scripted {
    pub fn new(case: &str, image: &Bootstrap) -> Scripted {
        let dir = golden(case).join("blobs");
        let blobs = image.blobs().iter().map(|blob| {
            let path = dir.join(blob.id.as_str());
            let bytes = std::fs::read(&path).or_else(|_| {
                std::fs::read(std::fs::read_dir(&dir).unwrap().next().unwrap().unwrap().path())
            });
            (blob.id, Bytes::from(bytes.unwrap()))
        });
        Scripted {
            blobs: blobs.collect(),
            mode: Mutex::new(Mode::Good),
            requests: Mutex::default(),
            mistrusted: AtomicU64::new(0),
            piece: 1000,
            latency: Duration::ZERO,
        }
    }

    pub fn set(&self, mode: Mode) {
        *self.mode.lock().unwrap() = mode;
    }

    fn io(&self) -> BackendError {
        let source = std::io::Error::other("as scripted");
        BackendError::Io { source_name: "script".into(), source }
    }
}

impl Backend for Scripted {
    fn read(
        &self,
        blob: &BlobId,
        range: Range<u64>,
    ) -> BoxFuture<'_, Result<ByteStream, BackendError>> {
        let blob = *blob;
        Box::pin(async move {
            self.requests.lock().unwrap().push((blob, range.clone()));
            if !self.latency.is_zero() {
                tokio::time::sleep(self.latency).await;
            }
            let whole = &self.blobs[&blob];
            let place = |at: u64| usize::try_from(at).unwrap();
            let mut bytes = whole.slice(place(range.start)..place(range.end));
            let mode = self.mode.lock().unwrap().clone();
            match mode {
                Mode::Hang => std::future::pending().await,
                Mode::Fail => return Err(self.io()),
                Mode::Short => bytes.truncate(bytes.len() / 2),
                Mode::Flip(at) | Mode::FlipOnce(at) if range.contains(&at) => {
                    let mut wrong = bytes.to_vec();
                    wrong[place(at - range.start)] ^= 0x10;
                    bytes = wrong.into();
                }
                _ => {}
            }
            let mut pieces: Vec<Result<Bytes, BackendError>> = Vec::new();
            while !bytes.is_empty() {
                pieces.push(Ok(bytes.split_to(self.piece.min(bytes.len()))));
            }
            if matches!(mode, Mode::HangMidway) {
                pieces.truncate(1);
                return Ok(futures_util::stream::iter(pieces)
                    .chain(futures_util::stream::pending())
                    .boxed());
            }
            if matches!(mode, Mode::Short) {
                pieces.push(Err(BackendError::ShortRead {
                    source_name: "script".into(),
                    got: range.end / 2,
                    want: range.end,
                }));
            }
            Ok(futures_util::stream::iter(pieces).boxed())
        })
    }

    fn size(&self, blob: &BlobId) -> BoxFuture<'_, Result<u64, BackendError>> {
        let size = self.blobs[blob].len() as u64;
        Box::pin(async move { Ok(size) })
    }

    fn name(&self) -> &str {
        "script"
    }

    fn mistrust(&self, _: &BlobId, _: Range<u64>) -> bool {
        self.mistrusted.fetch_add(1, Ordering::Relaxed);
        let mut mode = self.mode.lock().unwrap();
        if matches!(*mode, Mode::FlipOnce(_)) {
            *mode = Mode::Good;
        }
        false
    }
}

/// The message of an error and its causes.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        line = format!("{line}: {cause}");
        next = cause.source();
    }
    line
}
