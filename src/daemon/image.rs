//! Images, from the names in a request or on the command line to file systems that can be mounted.
//!
//! An image can be opened at any time; nothing is fetched or walked, so it takes milliseconds. All
//! images with the same `work_dir` share one cache, with its budgets and counters.

use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;

use super::DaemonError;
use super::config::{self, BackendConfig, Config};
use super::metrics::CacheTotals;
use crate::backend::{Backend, LocalFs, Metered, Outage, Remote};
use crate::blob::{Blob, Prefetch, PrefetchConfig, Store, StoreConfig};
use crate::fuse::{RafsFs, RafsOptions};
use crate::oci::names::Resolver;
use crate::rafs::Bootstrap;

/// How long a read waits that is told to wait for as long as it takes.
const FOREVER: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// What an image is made of.
#[derive(Debug)]
pub struct Source {
    pub bootstrap: PathBuf,
    /// Where its data comes from and where it is kept.
    pub config: Config,
    /// What logs call it: where it is mounted.
    pub name: String,
    /// Paths in the image to fetch early; none: what the image says.
    pub prefetch_files: Vec<String>,
}

/// An image that can be mounted.
pub struct Image {
    pub fs: RafsFs,
    pub parts: ImageParts,
}

/// What belongs to an image as long as it is mounted.
pub struct ImageParts {
    pub bootstrap: Bootstrap,
    /// By blob index.
    pub blobs: Vec<Arc<Blob>>,
    pub backend: Arc<Metered>,
    pub store: Arc<Store>,
    /// Name under which the API finds its config; may be empty.
    pub config_id: String,
    pub work_dir: PathBuf,
}

/// Opens images, and keeps the caches that they use.
pub struct Images {
    runtime: Handle,
    read_timeout: Duration,
    /// Threads that decompress and verify; 0: chosen by the number of processors.
    workers: usize,
    /// Of the backends of all images.
    resolver: Resolver,
    caches: Mutex<Caches>,
}

#[derive(Default)]
struct Caches {
    /// By `work_dir`.
    stores: HashMap<PathBuf, Arc<Store>>,
    /// What was counted by caches that are no longer used.
    retired: CacheTotals,
    /// Bytes in all blobs that were opened in them.
    retired_bytes: u64,
}

impl Images {
    /// Waits for chunks run on `runtime`; `workers` as for `--thread-num`.
    pub fn new(runtime: Handle, read_timeout: Duration, workers: u16) -> Images {
        Images {
            runtime,
            read_timeout,
            workers: workers.into(),
            resolver: Resolver::default(),
            caches: Mutex::default(),
        }
    }

    /// Opens an image. Reads the super block and tables of the bootstrap, and may wait for the disk
    /// that it is on.
    ///
    /// # Errors
    ///
    /// The bootstrap or the cache directory cannot be used.
    pub fn open(&self, source: Source) -> Result<Image, DaemonError> {
        let begin = Instant::now();
        let Source { bootstrap: path, config, name, prefetch_files } = source;
        for note in &config.notes {
            log::info!("{name}: config: ignored: {note}");
        }
        let bad = |source| DaemonError::Bootstrap { path: path.clone(), source };
        let bootstrap = Bootstrap::open(&path).map_err(bad)?;
        let store = self.store(&config.work_dir)?;
        let backend = Arc::new(Metered::new(self.backend(&config.backend)?));
        let blobs = bootstrap
            .blobs()
            .iter()
            .map(|blob| store.open_blob(&bootstrap, blob.index, backend.clone()))
            .collect::<Result<Vec<_>, _>>()?;
        describe(&name, &path, &bootstrap, backend.name(), &config, begin);
        let read_timeout = match backend.outage() {
            Outage::Wait => FOREVER,
            Outage::Deadline | Outage::Fail { .. } => self.read_timeout,
        };
        blobs.iter().for_each(|blob| blob.set_amplify(config.amplify));
        let prefetch = prefetch(&config.prefetch, &name, prefetch_files)
            .map(|wanted| Prefetch::start(&store, &bootstrap, &blobs, wanted));
        let file_stats = config.file_stats;
        let options = RafsOptions { name, read_timeout, file_stats, ..RafsOptions::default() };
        let fs = RafsFs::new(bootstrap.clone(), blobs.clone(), options).with_prefetch(prefetch);
        let Config { id: config_id, work_dir, .. } = config;
        Ok(Image {
            fs,
            parts: ImageParts { bootstrap, blobs, backend, store, config_id, work_dir },
        })
    }

    /// Bytes fetched so far, and bytes of chunk data in all blobs opened so far.
    pub fn fetched(&self) -> (u64, u64) {
        let caches = self.lock();
        let before = (caches.retired.fetched_bytes(), caches.retired_bytes);
        caches.stores.values().fold(before, |(fetched, total), store| {
            let (more, of) = store.fetched();
            (fetched + more, total + of)
        })
    }

    /// What all caches have counted since the daemon started.
    pub fn cache_totals(&self) -> CacheTotals {
        let caches = self.lock();
        let mut totals = caches.retired.clone();
        caches.stores.values().for_each(|store| totals.add(store.counters()));
        totals
    }

    /// Lets go of caches that no image uses any more.
    pub fn sweep(&self) {
        let mut caches = self.lock();
        let Caches { stores, retired, retired_bytes } = &mut *caches;
        stores.retain(|_, store| {
            let used = Arc::strong_count(store) > 1;
            if !used {
                retired.add(store.counters());
                *retired_bytes += store.fetched().1;
            }
            used
        });
    }

    fn backend(&self, config: &BackendConfig) -> Result<Arc<dyn Backend>, DaemonError> {
        let runtime = self.runtime.clone();
        Ok(match config {
            BackendConfig::LocalFs(localfs) => Arc::new(LocalFs::new(localfs.clone(), runtime)),
            BackendConfig::Oci(dir) => Arc::new(LocalFs::oci_layout(dir, runtime)),
            BackendConfig::LocalDisk(disk) => Arc::new(LocalFs::disk(disk.clone(), runtime)),
            BackendConfig::Remote(remote) => {
                let resolver = self.resolver.clone();
                let remote = Remote::new(*remote.clone(), self.read_timeout, resolver);
                Arc::new(remote.map_err(|source| DaemonError::Backend { source })?)
            }
        })
    }

    fn store(&self, work_dir: &Path) -> Result<Arc<Store>, DaemonError> {
        // Two names of one directory give two stores: they then deal with each other as two
        // processes would.
        if let Some(store) = self.lock().stores.get(work_dir) {
            return Ok(Arc::clone(store));
        }
        let mut config = StoreConfig::new(work_dir);
        config.read_timeout = self.read_timeout;
        if self.workers > 0 {
            config.workers = self.workers;
        }
        // Without the lock: the directory may be on a file system that hangs.
        let store = Store::new(config, self.runtime.clone())?;
        let mut caches = self.lock();
        Ok(Arc::clone(caches.stores.entry(work_dir.to_owned()).or_insert(store)))
    }

    fn lock(&self) -> MutexGuard<'_, Caches> {
        self.caches.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Longest list of files, in bytes.
const MAX_LIST_LEN: u64 = 16 << 20;

/// Reads a list of absolute paths, one on each line (`--prefetch-files`). What is no such path is said
/// in the log and left out.
///
/// # Errors
///
/// The file cannot be read, or is longer than [`MAX_LIST_LEN`].
pub fn read_list(path: &Path) -> Result<Vec<String>, DaemonError> {
    let failed = |source| DaemonError::PrefetchFiles { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(MAX_LIST_LEN + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_LIST_LEN {
        let reason = format!("longer than {MAX_LIST_LEN} bytes");
        return Err(failed(std::io::Error::other(reason)));
    }
    let mut files = Vec::new();
    let mut wrong = 0;
    for line in bytes.split(|&byte| byte == b'\n').map(<[u8]>::trim_ascii) {
        match std::str::from_utf8(line) {
            Ok("") => (),
            Ok(line) if line.starts_with('/') => files.push(line.to_owned()),
            _ => wrong += 1,
        }
    }
    if wrong > 0 {
        log::warn!(
            "prefetch files {}: {wrong} lines are no absolute paths in UTF-8 and are left out",
            path.display()
        );
    }
    Ok(files)
}

/// What to fetch early, if anything. Files that somebody names are wanted unless the config forbids it.
fn prefetch(config: &config::Prefetch, name: &str, files: Vec<String>) -> Option<PrefetchConfig> {
    let listed = !files.is_empty();
    match config.enable {
        Some(true) => (),
        None if listed => (),
        _ if listed => {
            log::info!("{name}: ignored: files to prefetch: the config says that prefetch is off");
            return None;
        }
        _ => return None,
    }
    Some(PrefetchConfig {
        name: name.to_owned(),
        requests: config.threads,
        request_bytes: config.batch_size,
        bytes_per_second: (config.bandwidth_limit > 0).then_some(config.bandwidth_limit),
        paths: listed.then(|| files.into_iter().map(String::into_bytes).collect()),
        everything: config.prefetch_all,
    })
}

/// One line for the operator.
fn describe(
    name: &str,
    path: &Path,
    image: &Bootstrap,
    source: &str,
    config: &Config,
    begin: Instant,
) {
    let (blobs, bytes) =
        (image.blobs().len(), image.blobs().iter().map(|b| b.data_end).sum::<u64>());
    log::info!(
        "{name}: image {}: {} inodes, {blobs} blobs of {bytes} bytes from {source}, cache below {}, \
         opened in {:?}",
        path.display(),
        image.path_count(),
        config.work_dir.display(),
        begin.elapsed()
    );
}
