//! The two versions of the document, key by key.

use std::path::PathBuf;

use serde_json::{Map, Value};

use super::prefetch::{self, Prefetch};
use super::table::{Notes, Table};
use super::{BackendConfig, Config, ConfigError, DEFAULT_AMPLIFY, Form, backend, short};
use crate::fuse::FileStatsOptions;

const SHOWS_XATTRS: &str = "attributes of an image are always shown: capabilities are among them";

pub(super) fn read(form: Form, document: Map<String, Value>) -> Result<Config, ConfigError> {
    let document = Table::document(document);
    match form {
        Form::JsonV1 => version_1(document),
        _ => version_2(document, form),
    }
}

/// What both versions say about an image, under names that differ.
struct ImageKeys {
    validate: &'static str,
    amplify: &'static str,
    prefetch: &'static str,
    prefetch_keys: &'static prefetch::Keys,
}

const KEYS_1: ImageKeys = ImageKeys {
    validate: "digest_validate",
    amplify: "amplify_io",
    prefetch: "fs_prefetch",
    prefetch_keys: &prefetch::VERSION_1,
};

const KEYS_2: ImageKeys = ImageKeys {
    validate: "validate",
    amplify: "batch_size",
    prefetch: "prefetch",
    prefetch_keys: &prefetch::VERSION_2,
};

/// A config of which only backend and cache are known.
fn begin(form: Form, id: String, backend: BackendConfig, work_dir: PathBuf) -> Config {
    Config {
        form,
        id,
        backend,
        work_dir,
        prefetch: Prefetch::default(),
        amplify: DEFAULT_AMPLIFY,
        file_stats: FileStatsOptions::default(),
        notes: Notes::new(),
        document: None,
        localfs_dir: None,
        environment: false,
    }
}

fn version_1(mut top: Table) -> Result<Config, ConfigError> {
    let mut notes = Notes::new();
    let mut device = top.table("device")?.ok_or_else(|| top.error("device", "is missing"))?;
    let id = device.take("id")?.unwrap_or_default();

    let backend = required_table(&mut device, "backend")?;
    let backend = backend::read(backend, Some("config"), &mut notes)?;
    no_external_backends(&mut device)?;

    let mut cache = device.table("cache")?;
    cache_type(&device, cache.as_mut())?;
    let mut work_dir = PathBuf::from(".");
    if let Some(mut cache) = cache {
        cache_flags(&mut cache, &mut notes)?;
        if let Some(own) = cache.table("config")? {
            work_dir = file_cache(own, &mut notes)?;
        }
        cache.finish(&mut notes);
    }
    device.finish(&mut notes);

    let mut config = begin(Form::JsonV1, id, backend, work_dir);
    image(&mut top, &KEYS_1, &mut config, &mut notes)?;
    top.finish(&mut notes);
    Ok(Config { notes, ..config })
}

fn version_2(mut top: Table, form: Form) -> Result<Config, ConfigError> {
    let mut notes = Notes::new();
    match top.take::<u64>("version")? {
        Some(2) => {}
        Some(other) => return Err(top.error("version", format!("this is {other}; 2 is known"))),
        None => return Err(top.error("version", "is missing")),
    }
    let id = top.take("id")?.unwrap_or_default();

    let backend = required_table(&mut top, "backend")?;
    let backend = backend::read(backend, None, &mut notes)?;
    no_external_backends(&mut top)?;
    if top.table("overlay")?.is_some() {
        return Err(top.error("overlay", "a writable overlay is not in this build"));
    }

    let mut cache = top.table("cache")?;
    cache_type(&top, cache.as_mut())?;
    let mut work_dir = PathBuf::from(".");
    let mut prefetch = Prefetch::default();
    if let Some(mut cache) = cache {
        cache_flags(&mut cache, &mut notes)?;
        if let Some(own) = cache.table("filecache")? {
            work_dir = file_cache(own, &mut notes)?;
        }
        if let Some(table) = cache.table("prefetch")? {
            prefetch = Prefetch::read(table, &prefetch::VERSION_2, &mut notes)?;
        }
        cache.finish(&mut notes);
    }

    let mut config = Config { prefetch, ..begin(form, id, backend, work_dir) };
    if let Some(mut rafs) = top.table("rafs")? {
        image(&mut rafs, &KEYS_2, &mut config, &mut notes)?;
        rafs.finish(&mut notes);
    }
    top.finish(&mut notes);
    Ok(Config { notes, ..config })
}

/// How the image is shown and read.
fn image(
    table: &mut Table,
    keys: &ImageKeys,
    config: &mut Config,
    notes: &mut Notes,
) -> Result<(), ConfigError> {
    mode(table, notes)?;
    // Every chunk is verified, whatever this says.
    table.take::<bool>(keys.validate)?;
    table.ignore("enable_xattr", true, SHOWS_XATTRS, notes)?;
    config.file_stats = FileStatsOptions {
        numbers: table.take("iostats_files")?.unwrap_or(false),
        pattern: table.take("access_pattern")?.unwrap_or(false),
        latest: table.take("latest_read_files")?.unwrap_or(false),
    };
    config.amplify = table.take(keys.amplify)?.unwrap_or(DEFAULT_AMPLIFY);
    if let Some(own) = table.table(keys.prefetch)? {
        let own = Prefetch::read(own, keys.prefetch_keys, notes)?;
        config.prefetch = std::mem::take(&mut config.prefetch).or(own);
    }
    Ok(())
}

fn required_table(parent: &mut Table, key: &str) -> Result<Table, ConfigError> {
    parent.table(key)?.ok_or_else(|| parent.error(key, "is missing"))
}

fn no_external_backends(parent: &mut Table) -> Result<(), ConfigError> {
    match parent.take::<Vec<Value>>("external_backends")? {
        Some(list) if !list.is_empty() => {
            Err(parent.error("external_backends", "more than one backend is not in this build"))
        }
        _ => Ok(()),
    }
}

/// Checks the type of the cache, which lies at `cache` of `parent`.
fn cache_type(parent: &Table, cache: Option<&mut Table>) -> Result<(), ConfigError> {
    let path = format!("{}.type", parent.path_of("cache"));
    let kind = cache.map(|c| c.take::<String>("type")).transpose()?.flatten().unwrap_or_default();
    let reason = match kind.as_str() {
        "blobcache" | "filecache" => return Ok(()),
        "" | "dummycache" => {
            "a RAFS v6 image needs a cache on disk: use `blobcache` with a `work_dir`".to_owned()
        }
        "fscache" => "cache `fscache` is not in this build: use `blobcache`".to_owned(),
        _ => format!("unknown cache `{}`: use `blobcache`", short(&kind)),
    };
    Err(ConfigError::Key { path, reason })
}

fn cache_flags(cache: &mut Table, notes: &mut Notes) -> Result<(), ConfigError> {
    let reason = "the cache holds uncompressed chunks, so that a read is one system call";
    cache.ignore("compressed", false, reason, notes)?;
    // Every chunk is verified, whatever this says.
    cache.take::<bool>("validate")?;
    Ok(())
}

/// The directory of a `blobcache` or `filecache`; nydusd's default is the working directory.
fn file_cache(mut own: Table, notes: &mut Notes) -> Result<PathBuf, ConfigError> {
    for key in ["enable_encryption", "enable_convergent_encryption"] {
        if own.take::<bool>(key)? == Some(true) {
            return Err(own.error(key, "an encrypted cache is not in this build"));
        }
    }
    own.ignore("encryption_key", String::new(), "the cache is not encrypted", notes)?;
    let reason = "the record of what is cached has a form of its own";
    own.ignore("disable_indexed_map", false, reason, notes)?;
    let work_dir = own.take::<String>("work_dir")?.filter(|dir| !dir.is_empty());
    own.finish(notes);
    Ok(PathBuf::from(work_dir.as_deref().unwrap_or(".")))
}

fn mode(parent: &mut Table, notes: &mut Notes) -> Result<(), ConfigError> {
    match parent.take::<String>("mode")?.as_deref() {
        None | Some("direct" | "") => {}
        Some("cached") => notes.push(format!(
            "{}: metadata is always read from the mapped bootstrap",
            parent.path_of("mode")
        )),
        Some(_) => return Err(parent.error("mode", "use `direct` or `cached`")),
    }
    Ok(())
}
