//! What is mounted, as the API changes it and tells of it.
//!
//! Opening an image may take as long as its disk takes, so it happens without any lock; a mount then
//! takes effect at once or not at all. Nothing is registered that is not mounted, and the other way
//! round.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use serde::Serialize;

use super::DaemonError;
use super::config::Config;
use super::image::{Image, ImageParts, Images, Source};
use crate::backend::{Backend, BackendCause};
use crate::fuse::{
    AnyFs, Cache, MountError, MountPath, Mounts, PassthroughFs, PassthroughOptions, PathError,
};

/// One mounted file system, as the API shows it.
#[derive(Clone, Debug, Serialize)]
pub struct MountInfo {
    pub backend_type: &'static str,
    pub mountpoint: String,
    #[serde(serialize_with = "time_text")]
    pub mounted_time: SystemTime,
    /// Version 2 document without secrets.
    pub config: serde_json::Value,
}

/// What to mount.
#[derive(Clone, Debug)]
pub enum What {
    /// A RAFS image.
    Image {
        bootstrap: PathBuf,
        config: Box<Config>,
        /// Paths in the image to fetch early; none: what the image says.
        prefetch_files: Vec<String>,
    },
    /// A directory of the host, which guests can write.
    Directory(PathBuf),
}

impl What {
    /// Whether it is of the same kind and from the same file or directory.
    fn is_same(&self, other: &What) -> bool {
        match (self, other) {
            (What::Image { bootstrap, .. }, What::Image { bootstrap: other, .. }) => {
                bootstrap == other
            }
            (What::Directory(path), What::Directory(other)) => path == other,
            _ => false,
        }
    }
}

/// Why something was not mounted or unmounted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChangeError {
    #[error("mountpoint")]
    Path(#[from] PathError),
    #[error(transparent)]
    Table(#[from] MountError),
    #[error(transparent)]
    Open(#[from] DaemonError),
}

/// What is mounted at one place.
#[derive(Clone)]
pub struct Entry {
    pub info: MountInfo,
    /// If it is an image.
    pub image: Option<Arc<ImageParts>>,
    /// How to mount it again.
    command: Arc<What>,
    /// Mounted because the daemon before had it: clients that ask for it again are right.
    restored: bool,
}

/// Something that is open and not mounted yet.
pub struct Prepared {
    at: MountPath,
    fs: AnyFs,
    entry: Entry,
}

/// Everything that is mounted.
pub struct Mounted {
    table: Arc<Mounts>,
    images: Images,
    cache: Cache,
    entries: Mutex<BTreeMap<MountPath, Entry>>,
    /// What was read from sources of images that are no longer mounted, by the source's name.
    retired: Mutex<BTreeMap<String, SourceTotals>>,
}

impl Mounted {
    /// Nothing but an empty root.
    /// `cache` is what guests may keep of shared directories.
    pub fn new(images: Images, cache: Cache) -> Mounted {
        Mounted {
            table: Mounts::new(),
            images,
            cache,
            entries: Mutex::default(),
            retired: Mutex::default(),
        }
    }

    /// The tree that guests see.
    pub fn table(&self) -> &Arc<Mounts> {
        &self.table
    }

    pub fn images(&self) -> &Images {
        &self.images
    }

    /// Whether something could be mounted at `at` now.
    ///
    /// # Errors
    ///
    /// What is in the way.
    pub fn check_free(&self, at: &str) -> Result<(), ChangeError> {
        Ok(self.table.check_free(&MountPath::parse(at)?)?)
    }

    /// Whether something is mounted at `at` now.
    ///
    /// # Errors
    ///
    /// Nothing is.
    pub fn check_mounted(&self, at: &str) -> Result<(), ChangeError> {
        let at = MountPath::parse(at)?;
        match self.lock().contains_key(&at) {
            true => Ok(()),
            false => Err(MountError::Missing { at }.into()),
        }
    }

    /// Opens `what`, to be mounted at `at`. May wait for disks, so it belongs on a thread that may.
    ///
    /// # Errors
    ///
    /// It cannot be opened.
    pub fn prepare(&self, at: &str, what: What) -> Result<Prepared, ChangeError> {
        let at = MountPath::parse(at)?;
        // What earlier attempts may have left.
        self.images.sweep();
        let (fs, entry) = self.open(&at, what)?;
        Ok(Prepared { at, fs, entry })
    }

    /// As [`Mounted::mount`], of what the daemon before had mounted.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn restore(&self, mut prepared: Prepared) -> Result<(), ChangeError> {
        prepared.entry.restored = true;
        self.mount(prepared)
    }

    /// Whether `what` is at `at` because the daemon before had it mounted, and no client has asked
    /// for it since: then this is that request.
    pub fn is_restored(&self, at: &str, what: &What) -> bool {
        let Ok(at) = MountPath::parse(at) else { return false };
        let mut entries = self.lock();
        let same = |entry: &&mut Entry| entry.restored && entry.command.is_same(what);
        let entry = entries.get_mut(&at).filter(same);
        entry.map(|entry| entry.restored = false).is_some()
    }

    /// How to mount again what is mounted, by mountpoint.
    pub fn commands(&self) -> Vec<(String, Arc<What>)> {
        let entries = self.lock();
        entries.iter().map(|(at, entry)| (at.to_string(), Arc::clone(&entry.command))).collect()
    }

    /// Mounts what was opened; returns at once.
    ///
    /// # Errors
    ///
    /// Something is in the way; nothing has changed then.
    pub fn mount(&self, prepared: Prepared) -> Result<(), ChangeError> {
        let Prepared { at, fs, entry } = prepared;
        let mut entries = self.lock();
        self.table.mount(&at, fs)?;
        entries.insert(at.clone(), entry);
        drop(entries);
        log::info!("{at}: mounted");
        Ok(())
    }

    /// Puts what was opened in the place of what is mounted there; returns at once.
    ///
    /// # Errors
    ///
    /// Nothing is mounted there any more; nothing has changed then.
    pub fn remount(&self, prepared: Prepared) -> Result<(), ChangeError> {
        let Prepared { at, fs, entry } = prepared;
        let mut entries = self.lock();
        self.table.remount(&at, fs)?;
        let old = entries.insert(at.clone(), entry);
        drop(entries);
        self.retire(old);
        self.images.sweep();
        log::info!("{at}: mounted anew");
        Ok(())
    }

    /// Unmounts what is at `at`; returns at once.
    ///
    /// # Errors
    ///
    /// Nothing is mounted there.
    pub fn unmount(&self, at: &str) -> Result<(), ChangeError> {
        let at = MountPath::parse(at)?;
        let mut entries = self.lock();
        self.table.unmount(&at)?;
        let old = entries.remove(&at);
        drop(entries);
        self.retire(old);
        self.images.sweep();
        log::info!("{at}: unmounted");
        Ok(())
    }

    /// All mounts, by mountpoint.
    pub fn infos(&self) -> BTreeMap<String, MountInfo> {
        let entries = self.lock();
        entries.values().map(|e| (e.info.mountpoint.clone(), e.info.clone())).collect()
    }

    /// All mounts, with where they are.
    pub fn entries(&self) -> Vec<(MountPath, Entry)> {
        self.lock().iter().map(|(at, entry)| (at.clone(), entry.clone())).collect()
    }

    /// What was read from each source since the daemon started, by the source's name.
    pub fn sources(&self) -> BTreeMap<String, SourceTotals> {
        let mut sources = self.retired.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for (_, entry) in self.entries() {
            add_sources(&mut sources, &entry);
        }
        sources
    }

    /// Counts on what an image has read that is no longer mounted.
    fn retire(&self, entry: Option<Entry>) {
        if let Some(entry) = entry {
            add_sources(&mut self.retired.lock().unwrap_or_else(PoisonError::into_inner), &entry);
        }
    }

    fn open(&self, at: &MountPath, what: What) -> Result<(AnyFs, Entry), DaemonError> {
        let name = at.to_string();
        let command = Arc::new(what.clone());
        match what {
            What::Image { bootstrap, config, prefetch_files } => {
                let config = *config;
                config.check_paths()?;
                let public = config.public();
                let source = Source { bootstrap, config, name: name.clone(), prefetch_files };
                let Image { fs, parts } = self.images.open(source)?;
                let info = MountInfo {
                    backend_type: "Rafs",
                    mountpoint: name,
                    mounted_time: SystemTime::now(),
                    config: public,
                };
                Ok((
                    fs.into(),
                    Entry { info, image: Some(Arc::new(parts)), command, restored: false },
                ))
            }
            What::Directory(path) => {
                let options = PassthroughOptions {
                    name: name.clone(),
                    cache: self.cache,
                    ..Default::default()
                };
                let fs = PassthroughFs::new(&path, options)?;
                log::info!("{at}: directory {}", path.display());
                let info = MountInfo {
                    backend_type: "PassthroughFs",
                    mountpoint: name,
                    mounted_time: SystemTime::now(),
                    config: serde_json::Value::Null,
                };
                Ok((fs.into(), Entry { info, image: None, command, restored: false }))
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<MountPath, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What was read from one source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SourceTotals {
    pub requests: u64,
    pub bytes: u64,
    /// In the order of [`BackendCause::ALL`].
    pub errors: [u64; BackendCause::ALL.len()],
}

/// Sources that are told apart; what comes from further ones is counted as `other`.
const MAX_SOURCES: usize = 200;

fn add_sources(sources: &mut BTreeMap<String, SourceTotals>, entry: &Entry) {
    let Some(image) = &entry.image else { return };
    for source in image.backend.sources() {
        let known = sources.len() < MAX_SOURCES || sources.contains_key(&source.name);
        let name = if known { source.name } else { "other".to_owned() };
        let totals = sources.entry(name).or_default();
        totals.requests += source.requests;
        totals.bytes += source.bytes;
        for (sum, errors) in totals.errors.iter_mut().zip(source.errors) {
            *sum += errors;
        }
    }
}

/// `2026-08-22 10:04:14.123456789 +00:00:00`: the form that nydusctl parses.
fn time_text<S: serde::Serializer>(time: &SystemTime, to: S) -> Result<S::Ok, S::Error> {
    let text = humantime::format_rfc3339_nanos(*time).to_string();
    to.serialize_str(&text.replace('T', " ").replace('Z', " +00:00:00"))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    #[test]
    fn times_have_the_form_that_nydusctl_reads() {
        let info = MountInfo {
            backend_type: "Rafs",
            mountpoint: "/".into(),
            mounted_time: UNIX_EPOCH + Duration::new(1_787_393_054, 123_456_789),
            config: serde_json::Value::Null,
        };
        let info = serde_json::to_value(info).unwrap();
        assert_eq!(info["mounted_time"], "2026-08-22 10:04:14.123456789 +00:00:00");
    }
}
