//! One image, from the names on the command line to a file system that can be served.

use std::path::Path;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use tokio::runtime::Handle;

use super::DaemonError;
use super::cli::Options;
use super::config::{BackendConfig, Config};
use super::state::MountInfo;
use crate::backend::{Backend, LocalFs};
use crate::blob::{Store, StoreConfig};
use crate::fuse::{Mounts, RafsFs, RafsOptions};
use crate::rafs::Bootstrap;

/// An image that is ready to be served at `/`.
pub struct Image {
    pub mounts: Arc<Mounts>,
    pub store: Arc<Store>,
    pub info: MountInfo,
}

/// Opens the image that `options` name. Takes milliseconds: nothing is fetched or walked.
///
/// # Errors
///
/// The config, the bootstrap or the cache directory cannot be used.
pub fn open(options: &Options, runtime: &Handle) -> Result<Image, DaemonError> {
    let begin = Instant::now();
    let config = match &options.config {
        Some(file) => Config::load(file)?,
        None => Config::beside(&options.bootstrap, options.localfs_dir.as_deref())?,
    };
    if let Some(file) = &options.config {
        log::info!("config {}: {}", file.display(), config.form);
    }
    for note in &config.notes {
        log::info!("config: ignored: {note}");
    }
    let path = &options.bootstrap;
    let bad = |source| DaemonError::Bootstrap { path: path.clone(), source };
    let bootstrap = Bootstrap::open(path).map_err(bad)?;

    let mut store_config = StoreConfig::new(config.work_dir.clone());
    store_config.read_timeout = options.read_timeout;
    if options.workers > 0 {
        store_config.workers = usize::from(options.workers);
    }
    let store = Store::new(store_config, runtime.clone())?;
    let backend = backend(&config.backend, runtime);
    let blobs = bootstrap
        .blobs()
        .iter()
        .map(|blob| store.open_blob(&bootstrap, blob.index, Arc::clone(&backend)))
        .collect::<Result<Vec<_>, _>>()?;
    describe(path, &bootstrap, backend.name(), &config, begin);

    let fs_options = RafsOptions { read_timeout: options.read_timeout, ..RafsOptions::default() };
    let fs = RafsFs::new(bootstrap, blobs, fs_options);
    Ok(Image {
        mounts: Mounts::single(fs),
        store,
        info: MountInfo {
            backend_type: "Rafs",
            mountpoint: "/".into(),
            mounted_time: SystemTime::now(),
            config: config.public(),
        },
    })
}

fn backend(config: &BackendConfig, runtime: &Handle) -> Arc<dyn Backend> {
    match config {
        BackendConfig::LocalFs(localfs) => Arc::new(LocalFs::new(localfs.clone(), runtime.clone())),
    }
}

/// One line for the operator.
fn describe(path: &Path, image: &Bootstrap, source: &str, config: &Config, begin: Instant) {
    let (blobs, bytes) =
        (image.blobs().len(), image.blobs().iter().map(|b| b.data_end).sum::<u64>());
    log::info!(
        "image {}: {} inodes, {blobs} blobs of {bytes} bytes from {source}, cache below {}, opened in {:?}",
        path.display(),
        image.path_count(),
        config.work_dir.display(),
        begin.elapsed()
    );
}
