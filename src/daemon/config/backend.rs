//! The table of the backend: which kind of place blobs are in, and the places on this host.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::table::{Notes, Table};
use super::{ConfigError, network};
use crate::backend::network::config::RemoteConfig;
use crate::backend::{LocalDiskConfig, LocalFsConfig};

/// Where blobs are.
#[derive(Clone, Debug)]
pub enum BackendConfig {
    LocalFs(LocalFsConfig),
    /// An OCI image layout: the directory that has `oci-layout` in it.
    Oci(PathBuf),
    LocalDisk(LocalDiskConfig),
    Remote(Box<RemoteConfig>),
}

/// The types of backends, as a document names them.
const TYPES: &str = "`localfs`, `oci`, `localdisk`, `registry`, `oss`, `s3` or `http-proxy`";

/// Reads the table `backend`, in which the keys of its type lie at `config`, or in version 2 at the
/// name of the type.
pub(super) fn read(
    mut backend: Table,
    config: Option<&str>,
    notes: &mut Notes,
) -> Result<BackendConfig, ConfigError> {
    let kind: String = backend.take("type")?.ok_or_else(|| backend.error("type", "is missing"))?;
    type Reader = fn(&mut Table, &mut Notes) -> Result<BackendConfig, ConfigError>;
    let reader: Reader = match kind.as_str() {
        "localfs" => local_fs,
        "oci" => oci,
        "localdisk" => local_disk,
        "registry" => network::registry,
        "oss" => network::oss,
        "s3" => network::s3,
        "http-proxy" => network::http_proxy,
        _ => {
            let reason = format!("unknown backend `{}`: use {TYPES}", super::short(&kind));
            return Err(backend.error("type", reason));
        }
    };
    let key = config.unwrap_or(&kind);
    let mut own = backend.table(key)?.ok_or_else(|| backend.error(key, "is missing"))?;
    // nydusd itself ignores these two, and they are sent for every type.
    own.take::<bool>("readahead")?;
    own.take::<u64>("readahead_sec")?;
    let read = reader(&mut own, notes)?;
    own.finish(notes);
    backend.finish(notes);
    Ok(read)
}

fn local_fs(own: &mut Table, _: &mut Notes) -> Result<BackendConfig, ConfigError> {
    let blob_file = own.path("blob_file")?;
    let dir = own.path("dir")?;
    let alt_dirs = own.take::<Vec<String>>("alt_dirs")?.unwrap_or_default();
    if blob_file.is_none() && dir.is_none() {
        return Err(own.whole("needs `dir` or `blob_file`"));
    }
    let alt_dirs = alt_dirs.into_iter().map(PathBuf::from).collect();
    Ok(BackendConfig::LocalFs(LocalFsConfig { blob_file, dir, alt_dirs }))
}

fn oci(own: &mut Table, _: &mut Notes) -> Result<BackendConfig, ConfigError> {
    let dir = own.path("dir")?.ok_or_else(|| own.whole("needs `dir`"))?;
    Ok(BackendConfig::Oci(dir))
}

fn local_disk(own: &mut Table, _: &mut Notes) -> Result<BackendConfig, ConfigError> {
    let device_path = own.path("device_path")?.ok_or_else(|| own.whole("needs `device_path`"))?;
    let disable_gpt = own.take("disable_gpt")?.unwrap_or(false);
    Ok(BackendConfig::LocalDisk(LocalDiskConfig { device_path, disable_gpt }))
}

impl BackendConfig {
    /// Checks that what the document names on this host is there.
    pub(super) fn check_paths(&self) -> Result<(), ConfigError> {
        let missing = |key: &str, path: &Path, what: &str| ConfigError::Key {
            path: key.to_owned(),
            reason: format!("{} is not {what}", path.display()),
        };
        match self {
            BackendConfig::LocalFs(localfs) => {
                if let Some(file) = &localfs.blob_file
                    && !file.is_file()
                {
                    return Err(missing("localfs.blob_file", file, "a file"));
                }
                // `alt_dirs` may be absent: they are alternatives.
                match &localfs.dir {
                    Some(dir) if !dir.is_dir() => Err(missing("localfs.dir", dir, "a directory")),
                    _ => Ok(()),
                }
            }
            BackendConfig::Oci(dir) if !is_layout(dir) => {
                Err(missing("oci.dir", dir, "an OCI image layout: it has no file `oci-layout`"))
            }
            BackendConfig::LocalDisk(disk) if !disk.device_path.exists() => {
                Err(missing("localdisk.device_path", &disk.device_path, "there"))
            }
            BackendConfig::Remote(remote) => {
                for file in &remote.network.ca_cert_files {
                    if !file.is_file() {
                        return Err(missing("ca_cert_files", file, "a file"));
                    }
                }
                match network::unix_socket(&remote.service) {
                    Some(path) if !path.exists() => Err(missing("http-proxy.addr", path, "there")),
                    _ => Ok(()),
                }
            }
            _ => Ok(()),
        }
    }

    /// `{"type": …, TYPE: {…}}`, as in a document of version 2, without secrets.
    pub(super) fn public(&self) -> Value {
        let (kind, own) = match self {
            BackendConfig::LocalFs(localfs) => (
                "localfs",
                json!({
                    "blob_file": localfs.blob_file.clone().unwrap_or_default(),
                    "dir": localfs.dir.clone().unwrap_or_default(),
                    "alt_dirs": localfs.alt_dirs,
                }),
            ),
            BackendConfig::Oci(dir) => ("oci", json!({ "dir": dir })),
            BackendConfig::LocalDisk(disk) => (
                "localdisk",
                json!({ "device_path": disk.device_path, "disable_gpt": disk.disable_gpt }),
            ),
            BackendConfig::Remote(remote) => network::public(remote),
        };
        let mut backend = Map::new();
        backend.insert("type".into(), kind.into());
        backend.insert(kind.into(), own);
        backend.into()
    }
}

/// Is this the directory of an OCI image layout?
pub(super) fn is_layout(dir: &Path) -> bool {
    dir.join("oci-layout").is_file()
}
