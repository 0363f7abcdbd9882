//! Blobs as files of this host: in directories (config `localfs`), in an OCI image layout (`oci`), or
//! in partitions (`localdisk`, see [`local_disk`](super::local_disk)).
//!
//! The directory may be on a network or FUSE file system that stops answering. Then at most
//! [`MAX_THREADS`] threads of the blocking pool are stuck in it; later reads wait as futures, and
//! all go on once it answers again.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, StreamExt};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use super::local_disk::{self, LocalDiskConfig};
use super::{Backend, BackendError, ByteStream};
use crate::rafs::id::BlobId;

/// Threads of the blocking pool that one backend may occupy.
pub const MAX_THREADS: usize = 16;

/// Most bytes read, and so held, in one piece.
const PIECE: u64 = 1 << 20;

/// Where to look for blobs, in this order. Empty fields are skipped.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LocalFsConfig {
    /// One file that is the blob, whatever its id.
    pub blob_file: Option<PathBuf>,
    /// Directory with files named by blob id.
    pub dir: Option<PathBuf>,
    /// Further such directories.
    pub alt_dirs: Vec<PathBuf>,
}

/// Blobs as files of this host. See the module's documentation.
pub struct LocalFs {
    shared: Arc<Shared>,
}

struct Shared {
    place: Place,
    name: String,
    runtime: Handle,
    threads: Arc<Semaphore>,
    /// Files found so far; at most one for each blob of the image.
    open: Mutex<HashMap<BlobId, Arc<OpenFile>>>,
}

enum Place {
    Files(LocalFsConfig),
    Disk(LocalDiskConfig),
}

struct OpenFile {
    file: File,
    path: String,
    /// Where the blob begins.
    base: u64,
    /// Bytes, when it was opened.
    size: u64,
}

impl LocalFs {
    /// Looks at no file yet. Reads run on the blocking pool of `runtime`.
    pub fn new(config: LocalFsConfig, runtime: Handle) -> LocalFs {
        let place = [&config.blob_file, &config.dir]
            .into_iter()
            .flatten()
            .chain(&config.alt_dirs)
            .next()
            .map_or("without a directory".into(), |path| path.display().to_string());
        LocalFs::at(Place::Files(config), format!("localfs {place}"), runtime)
    }

    /// The blobs of the OCI image layout in `dir`.
    pub fn oci_layout(dir: &Path, runtime: Handle) -> LocalFs {
        let config =
            LocalFsConfig { dir: Some(dir.join("blobs/sha256")), ..LocalFsConfig::default() };
        LocalFs::at(Place::Files(config), format!("oci {}", dir.display()), runtime)
    }

    /// The blobs in partitions of a disk.
    pub fn disk(config: LocalDiskConfig, runtime: Handle) -> LocalFs {
        let name = format!("localdisk {}", config.device_path.display());
        LocalFs::at(Place::Disk(config), name, runtime)
    }

    fn at(place: Place, name: String, runtime: Handle) -> LocalFs {
        LocalFs {
            shared: Arc::new(Shared {
                place,
                name,
                runtime,
                threads: Arc::new(Semaphore::new(MAX_THREADS)),
                open: Mutex::default(),
            }),
        }
    }
}

impl Backend for LocalFs {
    fn read(
        &self,
        blob: &BlobId,
        range: Range<u64>,
    ) -> BoxFuture<'_, Result<ByteStream, BackendError>> {
        let blob = *blob;
        Box::pin(async move {
            let file = self.shared.find(blob).await?;
            if range.end > file.size {
                self.shared.forget(blob, &file);
                return Err(BackendError::OutOfRange {
                    source_name: file.path.clone(),
                    size: file.size,
                    start: range.start,
                    end: range.end,
                });
            }
            let start = Pieces { shared: self.shared.clone(), blob, file, range };
            Ok(stream::try_unfold(start, Pieces::next).boxed())
        })
    }

    fn read_here(&self, blob: &BlobId, range: Range<u64>) -> Option<Bytes> {
        let shared = &self.shared;
        let known = shared.open.lock().unwrap_or_else(PoisonError::into_inner).get(blob).cloned();
        let file = known.filter(|file| range.end <= file.size)?;
        // This thread may get stuck as well.
        let _permit = shared.threads.try_acquire().ok()?;
        read_piece(&file, range).ok()
    }

    fn size(&self, blob: &BlobId) -> BoxFuture<'_, Result<u64, BackendError>> {
        let blob = *blob;
        Box::pin(async move { Ok(self.shared.find(blob).await?.size) })
    }

    fn name(&self) -> &str {
        &self.shared.name
    }
}

impl Shared {
    /// The open file of `blob`, looked up on the blocking pool the first time.
    async fn find(self: &Arc<Self>, blob: BlobId) -> Result<Arc<OpenFile>, BackendError> {
        let known = self.open.lock().unwrap_or_else(PoisonError::into_inner).get(&blob).cloned();
        if let Some(file) = known {
            return Ok(file);
        }
        let shared = self.clone();
        let found = self.on_thread(move || shared.look_up(blob)).await??;
        let file = Arc::new(found);
        self.open.lock().unwrap_or_else(PoisonError::into_inner).insert(blob, file.clone());
        Ok(file)
    }

    /// Drops `file`, so that the next read looks the blob up again.
    fn forget(&self, blob: BlobId, file: &Arc<OpenFile>) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.get(&blob).is_some_and(|known| Arc::ptr_eq(known, file)) {
            open.remove(&blob);
        }
    }

    fn look_up(&self, blob: BlobId) -> Result<OpenFile, BackendError> {
        let config = match &self.place {
            Place::Files(config) => config,
            Place::Disk(config) => {
                let found = local_disk::find(config, &blob);
                let found = found.map_err(|source| BackendError::Io {
                    source_name: self.name.clone(),
                    source,
                })?;
                let (file, base, size) =
                    found.ok_or_else(|| not_found(blob, &config.device_path))?;
                return Ok(OpenFile { file, path: self.name.clone(), base, size });
            }
        };
        if let Some(path) = &config.blob_file {
            return open_file(path).and_then(|found| found.ok_or_else(|| not_found(blob, path)));
        }
        for dir in config.dir.iter().chain(&config.alt_dirs) {
            if let Some(found) = open_file(&dir.join(blob.as_str()))? {
                return Ok(found);
            }
        }
        Err(BackendError::NotFound { blob, source_name: self.name.clone() })
    }

    /// Runs `work` on the blocking pool. If the caller goes away, the thread keeps its permit until
    /// the system call returns: that is what bounds the threads.
    async fn on_thread<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, BackendError> {
        let failed = |what: &'static str| BackendError::Io {
            source_name: self.name.clone(),
            source: io::Error::other(what),
        };
        let permit = self.threads.clone().acquire_owned().await;
        let permit = permit.map_err(|_| failed("the backend is closed"))?;
        let thread = self.runtime.spawn_blocking(move || {
            let result = work();
            drop(permit);
            result
        });
        thread.await.map_err(|_| failed("the daemon is ending"))
    }
}

fn not_found(blob: BlobId, path: &Path) -> BackendError {
    BackendError::NotFound { blob, source_name: path.display().to_string() }
}

/// `None` if there is no such file.
fn open_file(path: &Path) -> Result<Option<OpenFile>, BackendError> {
    let io = |source| BackendError::Io { source_name: path.display().to_string(), source };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(io(e)),
    };
    let metadata = file.metadata().map_err(io)?;
    if metadata.is_dir() {
        return Err(io(io::ErrorKind::IsADirectory.into()));
    }
    Ok(Some(OpenFile { file, path: path.display().to_string(), base: 0, size: metadata.len() }))
}

/// A read on its way: `range` is what is still to come.
struct Pieces {
    shared: Arc<Shared>,
    blob: BlobId,
    file: Arc<OpenFile>,
    range: Range<u64>,
}

impl Pieces {
    async fn next(mut self) -> Result<Option<(Bytes, Pieces)>, BackendError> {
        if self.range.is_empty() {
            return Ok(None);
        }
        let piece = self.range.start..self.range.end.min(self.range.start + PIECE);
        let (file, wanted) = (self.file.clone(), piece.clone());
        let read = self.shared.on_thread(move || read_piece(&file, wanted)).await;
        match read.and_then(|bytes| bytes) {
            Ok(bytes) => {
                self.range.start = piece.end;
                Ok(Some((bytes, self)))
            }
            Err(e) => {
                self.shared.forget(self.blob, &self.file);
                Err(e)
            }
        }
    }
}

fn read_piece(file: &OpenFile, range: Range<u64>) -> Result<Bytes, BackendError> {
    let want = usize::try_from(range.end - range.start).expect("a piece is small");
    let mut bytes = Vec::with_capacity(want);
    while bytes.len() < want {
        let at = file.base + range.start + bytes.len() as u64;
        let io = |source| BackendError::Io { source_name: file.path.clone(), source };
        let before = bytes.len();
        match rustix::io::pread(&file.file, rustix::buffer::spare_capacity(&mut bytes), at) {
            Ok(_) if bytes.len() > before => (),
            Ok(_) => {
                return Err(BackendError::ShortRead {
                    source_name: file.path.clone(),
                    got: before as u64,
                    want: want as u64,
                });
            }
            Err(rustix::io::Errno::INTR) => (),
            Err(e) => return Err(io(e.into())),
        }
    }
    Ok(bytes.into())
}
