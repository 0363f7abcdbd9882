//! nydusd's config document, and the defaults that apply without one.
//!
//! Three forms: JSON of version 1 (what nydus-snapshotter and Kata send), JSON and TOML of version 2.
//! All become one checked [`Config`]. A key does something, or is refused, or is listed in
//! [`Config::notes`] with the reason; unknown keys are listed too, because programs send keys that no
//! daemon knows. No message ever shows a value, so a secret cannot leak through one. Parsing touches
//! no file; [`Config::check_paths`] does.

mod backend;
mod network;
mod prefetch;
mod table;
mod versions;

use std::fmt;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::backend::LocalFsConfig;
use crate::fuse::FileStatsOptions;
use crate::oci::auth::Secret;

pub use backend::BackendConfig;
pub use prefetch::Prefetch;

/// Largest config file, in bytes.
pub const MAX_CONFIG_LEN: u64 = 1 << 20;

/// [`Config::amplify`] of a document that does not say, as in nydusd.
const DEFAULT_AMPLIFY: u64 = 1 << 20;

/// Why a config cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    #[error("config {}", path.display())]
    File { path: PathBuf, source: Box<ConfigError> },
    #[error("cannot be read")]
    Read(#[source] io::Error),
    #[error("is longer than {MAX_CONFIG_LEN} bytes")]
    TooLong,
    #[error("is read as {form}: {reason}")]
    Syntax { form: Form, reason: String },
    #[error("is JSON, but neither version 2 (`version`) nor version 1 (`device`)")]
    UnknownForm,
    #[error("is read as {form}")]
    Document { form: Form, source: Box<ConfigError> },
    #[error("{path}: {reason}")]
    Key { path: String, reason: String },
    #[error(
        "without --config the cache goes to XDG_CACHE_HOME or HOME; neither is an absolute path"
    )]
    NoCacheHome,
}

/// How a document was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    JsonV1,
    JsonV2,
    /// JSON that was not understood far enough to see its version.
    Json,
    TomlV2,
    /// No document: the defaults.
    Defaults,
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Form::JsonV1 => "JSON, version 1",
            Form::JsonV2 => "JSON, version 2",
            Form::Json => "JSON",
            Form::TomlV2 => "TOML, version 2",
            Form::Defaults => "defaults",
        })
    }
}

/// Where the image's data comes from and where it is kept.
#[derive(Clone, Debug)]
pub struct Config {
    pub form: Form,
    /// Name under which the API finds this config; may be empty.
    pub id: String,
    pub backend: BackendConfig,
    /// Directory below which the cache lives.
    pub work_dir: PathBuf,
    pub prefetch: Prefetch,
    /// Most bytes that are fetched early because a reader wants a chunk; 0: no read-ahead
    /// (`amplify_io`, `rafs.batch_size`).
    pub amplify: u64,
    /// What to record of each file.
    pub file_stats: FileStatsOptions,
    /// What the document asks for and does not get, or what nobody knows: `key: reason`.
    pub notes: Vec<String>,
    /// The document itself, for a daemon that takes over; none: the defaults.
    pub document: Option<Secret>,
    /// Without a document: the directory that was named for blobs.
    pub localfs_dir: Option<PathBuf>,
    /// `IMAGE_PULL_AUTH` applies.
    pub environment: bool,
}

impl Config {
    /// Reads the file at `path`, at most [`MAX_CONFIG_LEN`] bytes, and checks it. `IMAGE_PULL_AUTH` in
    /// the environment takes the place of `auth`.
    ///
    /// # Errors
    ///
    /// [`ConfigError::File`] with the cause.
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        let load = || {
            let file = fs::File::open(path).map_err(ConfigError::Read)?;
            let mut bytes = Vec::new();
            file.take(MAX_CONFIG_LEN + 1).read_to_end(&mut bytes).map_err(ConfigError::Read)?;
            if bytes.len() as u64 > MAX_CONFIG_LEN {
                return Err(ConfigError::TooLong);
            }
            let text = String::from_utf8(bytes)
                .map_err(|e| ConfigError::Read(io::Error::new(io::ErrorKind::InvalidData, e)))?;
            let config = Config::parse_with_environment(&text)?;
            config.check_paths()?;
            Ok(config)
        };
        load().map_err(|e| ConfigError::File { path: path.to_owned(), source: Box::new(e) })
    }

    /// As [`Config::parse`]; `IMAGE_PULL_AUTH` in the environment takes the place of `auth`.
    ///
    /// # Errors
    ///
    /// As there, or the variable makes no sense.
    pub fn parse_with_environment(text: &str) -> Result<Config, ConfigError> {
        let mut config = Config::parse(text)?;
        let auth = std::env::var("IMAGE_PULL_AUTH").ok();
        network::use_environment(&mut config.backend, auth)?;
        config.environment = true;
        Ok(config)
    }

    /// Parses a document: JSON if its first character is `{`, TOML otherwise.
    ///
    /// # Errors
    ///
    /// Says which form it was read as, the key and the reason; never a value.
    pub fn parse(text: &str) -> Result<Config, ConfigError> {
        let (form, map) = if text.trim_start().starts_with('{') {
            let syntax = |e: serde_json::Error| ConfigError::Syntax {
                form: Form::Json,
                reason: format!("{} at line {} column {}", category(&e), e.line(), e.column()),
            };
            let map: serde_json::Map<_, _> = serde_json::from_str(text).map_err(syntax)?;
            match (map.contains_key("version"), map.contains_key("device")) {
                (true, _) => (Form::JsonV2, map),
                (false, true) => (Form::JsonV1, map),
                (false, false) => return Err(ConfigError::UnknownForm),
            }
        } else {
            let map = toml::from_str(text).map_err(|e| ConfigError::Syntax {
                form: Form::TomlV2,
                reason: match e.span() {
                    Some(span) => format!("{} at line {}", e.message(), line_of(text, span.start)),
                    None => e.message().to_owned(),
                },
            })?;
            (Form::TomlV2, map)
        };
        let mut config = versions::read(form, map)
            .map_err(|e| ConfigError::Document { form, source: Box::new(e) })?;
        config.document = Some(Secret::new(text));
        Ok(config)
    }

    /// The config of an image that comes without one: blobs in `localfs_dir`, which may be an OCI image
    /// layout, beside `bootstrap` or in `blobs` beside it, cache in the user's cache directory.
    ///
    /// # Errors
    ///
    /// [`ConfigError::NoCacheHome`] if the environment names no usable directory.
    pub fn beside(bootstrap: &Path, localfs_dir: Option<&Path>) -> Result<Config, ConfigError> {
        let parent = match bootstrap.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let localfs = LocalFsConfig {
            blob_file: None,
            dir: localfs_dir.map(|dir| match backend::is_layout(dir) {
                true => dir.join("blobs/sha256"),
                false => dir.to_owned(),
            }),
            alt_dirs: vec![parent.to_owned(), parent.join("blobs")],
        };
        Ok(Config {
            form: Form::Defaults,
            id: String::new(),
            backend: BackendConfig::LocalFs(localfs),
            work_dir: cache_home(|name| std::env::var_os(name))?,
            prefetch: Prefetch::default(),
            amplify: DEFAULT_AMPLIFY,
            file_stats: FileStatsOptions::default(),
            notes: Vec::new(),
            document: None,
            localfs_dir: localfs_dir.map(Path::to_owned),
            environment: false,
        })
    }

    /// Checks that what the document names is there.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Key`] for the first thing that is missing.
    pub fn check_paths(&self) -> Result<(), ConfigError> {
        self.backend.check_paths()
    }

    /// What the API shows: a version 2 document of what is in effect, without secrets.
    pub fn public(&self) -> Value {
        let prefetch = self.prefetch.public();
        json!({
            "version": 2,
            "id": self.id,
            "backend": self.backend.public(),
            "external_backends": [],
            "cache": {"type": "blobcache", "compressed": false, "validate": true,
                "prefetch": prefetch,
                "filecache": {"work_dir": self.work_dir, "disable_indexed_map": false}},
            "rafs": {"mode": "direct", "batch_size": self.amplify, "validate": true,
                "enable_xattr": true, "iostats_files": self.file_stats.numbers,
                "access_pattern": self.file_stats.pattern,
                "latest_read_files": self.file_stats.latest, "prefetch": prefetch},
        })
    }
}

/// A name from the document, short enough for a message.
fn short(name: &str) -> String {
    name.chars().filter(|c| !c.is_control()).take(32).collect()
}

/// What is wrong with JSON text, without the text.
fn category(error: &serde_json::Error) -> &'static str {
    match error.classify() {
        serde_json::error::Category::Eof => "unexpected end",
        serde_json::error::Category::Io => "cannot be read",
        serde_json::error::Category::Syntax | serde_json::error::Category::Data => "syntax error",
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    text.as_bytes().iter().take(offset).filter(|b| **b == b'\n').count() + 1
}

/// `$XDG_CACHE_HOME` or `~/.cache`; the store keeps its files in a private directory below it.
fn cache_home(env: impl Fn(&str) -> Option<std::ffi::OsString>) -> Result<PathBuf, ConfigError> {
    let absolute = |name: &str| env(name).map(PathBuf::from).filter(|p| p.is_absolute());
    absolute("XDG_CACHE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
        .ok_or(ConfigError::NoCacheHome)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_toml_and_both_versions_mean_the_same() {
        let documents = [
            (
                Form::JsonV1,
                r#"{"device":{"id":"/3","backend":{"type":"localfs","config":{"dir":"/b",
                "alt_dirs":["/c"],"readahead":false,"readahead_sec":3}},"cache":{"type":"blobcache",
                "config":{"work_dir":"/cache","disable_indexed_map":false}}},"mode":"direct",
                "digest_validate":false,"iostats_files":false,"enable_xattr":true}"#,
            ),
            (
                Form::JsonV2,
                r#" {"version":2,"id":"/3","backend":{"type":"localfs","localfs":{"dir":"/b",
                "alt_dirs":["/c"]}},"cache":{"type":"filecache","filecache":{"work_dir":"/cache"}},
                "rafs":{"mode":"direct","enable_xattr":true}}"#,
            ),
            (
                Form::TomlV2,
                "version = 2\nid = '/3'\n[backend]\ntype = 'localfs'\n[backend.localfs]\ndir = '/b'\n\
                alt_dirs = ['/c']\n[cache]\ntype = 'blobcache'\n[cache.filecache]\n\
                work_dir = '/cache'\n[rafs]\nenable_xattr = true\n",
            ),
        ];
        for (form, text) in documents {
            let config = Config::parse(text).unwrap_or_else(|e| panic!("{form}: {e:?}"));
            assert_eq!(config.form, form);
            assert_eq!(config.id, "/3", "{form}");
            let BackendConfig::LocalFs(localfs) = &config.backend else { panic!("{form}") };
            assert_eq!(localfs.dir, Some("/b".into()), "{form}");
            assert_eq!(localfs.alt_dirs, [PathBuf::from("/c")], "{form}");
            assert_eq!(config.work_dir, PathBuf::from("/cache"), "{form}");
            assert!(config.notes.is_empty(), "{form}: {:?}", config.notes);
        }
    }

    /// A v1 document with `cache` and the other members of the top level as given.
    fn v1(cache: &str, more: &str) -> String {
        format!(
            r#"{{"device":{{"backend":{{"type":"localfs","config":{{"dir":"/b"}}}}{cache}}}{more}}}"#
        )
    }

    const BLOBCACHE: &str = r#","cache":{"type":"blobcache"}"#;

    /// `error: cause: cause`
    fn chain(error: &ConfigError) -> String {
        let mut text = error.to_string();
        let mut source = std::error::Error::source(error);
        while let Some(e) = source {
            text += &format!(": {e}");
            source = e.source();
        }
        text
    }

    #[test]
    fn defaults_are_those_of_nydusd() {
        let config = Config::parse(&v1(BLOBCACHE, "")).unwrap();
        assert_eq!(config.work_dir, PathBuf::from("."));
        assert!(config.notes.is_empty(), "{:?}", config.notes);
    }

    #[test]
    fn refusals_name_form_key_and_reason() {
        let cases = [
            (v1("", ""), "read as JSON, version 1: device.cache.type: "),
            (v1(r#","cache":{"type":"dummycache"}"#, ""), "device.cache.type: "),
            (v1(r#","cache":{"type":"fscache"}"#, ""), "`fscache` is not in this build"),
            (v1(r#","cache":{"type":"magic"}"#, ""), "unknown cache `magic`"),
            (v1(BLOBCACHE, r#","mode":"sideways""#), "mode: use `direct` or `cached`"),
            (v1(BLOBCACHE, r#","enable_xattr":"yes""#), "enable_xattr: wants true or false, has a"),
            (
                v1(r#","cache":{"type":"blobcache","config":{"enable_encryption":true}}"#, ""),
                "device.cache.config.enable_encryption",
            ),
            (
                v1(r#","external_backends":[{"type":"localfs"}],"cache":{"type":"blobcache"}"#, ""),
                "device.external_backends",
            ),
            (r#"{"device":{"cache":{}}}"#.into(), "device.backend: is missing"),
            (r#"{"device":{"backend":{"config":{}}}}"#.into(), "device.backend.type: is missing"),
            (
                r#"{"device":{"backend":{"type":"registry","config":{}}}}"#.into(),
                "device.backend.config.host: is missing",
            ),
            (r#"{"device":{"backend":{"type":"ftp"}}}"#.into(), "unknown backend `ftp`"),
            (
                r#"{"device":{"backend":{"type":"localfs","config":{"readahead":true}}}}"#.into(),
                "device.backend.config: needs `dir` or `blob_file`",
            ),
            (r#"{"version":3}"#.into(), "version: this is 3; 2 is known"),
            (
                r#"{"version":2,"backend":{"type":"oss","oss":{}}}"#.into(),
                "read as JSON, version 2: backend.oss.endpoint: is missing",
            ),
            (
                r#"{"version":2,"backend":{"type":"localfs","localfs":{"dir":"/b"}},
                    "cache":{"type":"blobcache"},"overlay":{"upper_dir":"/u"}}"#
                    .into(),
                "overlay: a writable overlay is not in this build",
            ),
            (r#"{"mode":"direct"}"#.into(), "neither version 2"),
            ("{".into(), "read as JSON: unexpected end at line 1"),
            ("version = 2\n[backend]\ntype =\n".into(), "read as TOML, version 2: "),
            ("[backend]\ntype = 'localfs'\n".into(), "version: is missing"),
            (String::new(), "read as TOML, version 2: version: is missing"),
        ];
        for (text, want) in cases {
            let error = chain(&Config::parse(&text).expect_err(&text));
            assert!(error.contains(want), "{text}\n  {error}\n  wanted: {want}");
        }
    }

    #[test]
    fn ignored_and_unknown_keys_are_noted() {
        let config = Config::parse(&v1(
            r#","color":"red","cache":{"type":"blobcache","compressed":true,"validate":true}"#,
            r#","mode":"cached","digest_validate":true,"enable_xattr":false,"amplify_io":4096,"warmup":1,
              "fs_prefetch":{"enable":true,"prefetch_all":true,"threads_count":8,"color":1}"#,
        ))
        .unwrap();
        let keys: Vec<_> =
            config.notes.iter().map(|n| n.split_once(": ").expect("key: reason").0).collect();
        let want = [
            "device.cache.compressed",
            "device.color",
            "enable_xattr",
            "fs_prefetch.color",
            "mode",
            "warmup",
        ];
        let mut keys = keys;
        keys.sort_unstable();
        assert_eq!(keys, want);
    }

    #[test]
    fn secrets_show_up_nowhere() {
        let documents = [
            r#"{"device":{"backend":{"type":"registry","config":{"auth":"S3CRET"}}}}"#,
            r#"{"device":{"backend":{"type":"localfs","config":{"dir":"/b","auth":"S3CRET"}},
                "S":"S3CRET","cache":{"type":"blobcache","config":{"encryption_key":"S3CRET"}}}}"#,
            r#"{"device":{"backend":{"type":"localfs","config":{"dir":["S3CRET"]}}}}"#,
            r#"{"device":{"backend":{"type":"localfs","config":{"readahead":"S3CRET"}}}}"#,
            r#"{"device":{"auth":"S3CRET" nonsense"#,
            "version = 2\nauth = 'S3CRET' nonsense",
        ];
        for text in documents {
            let shown = match Config::parse(text) {
                Ok(config) => format!("{config:?} {}", config.public()),
                Err(e) => format!("{e:?} {}", chain(&e)),
            };
            assert!(!shown.contains("S3CRET"), "{text}: {shown}");
        }
    }

    #[test]
    fn a_config_file_has_a_size_limit_and_names_itself() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.json");
        let good = v1(BLOBCACHE, "").replace("/b", dir.path().to_str().unwrap());
        let padded = |len: usize| good.clone() + &" ".repeat(len - good.len());
        fs::write(&file, padded(1 << 20)).unwrap();
        Config::load(&file).unwrap();
        fs::write(&file, padded((1 << 20) + 1)).unwrap();
        let error = chain(&Config::load(&file).unwrap_err());
        assert!(error.contains("config.json: is longer than 1048576 bytes"), "{error}");
        fs::write(&file, v1(BLOBCACHE, "").replace("/b", "/no/such/dir")).unwrap();
        let error = chain(&Config::load(&file).unwrap_err());
        assert!(error.contains("localfs.dir: /no/such/dir is not a directory"), "{error}");
    }

    #[test]
    fn without_a_document_the_cache_is_the_user_s() {
        let home = |names: &'static [(&str, &str)]| {
            cache_home(|name| names.iter().find(|(n, _)| *n == name).map(|(_, v)| v.into())).ok()
        };
        assert_eq!(home(&[("HOME", "/h")]), Some("/h/.cache".into()));
        assert_eq!(home(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]), Some("/x".into()));
        assert_eq!(home(&[("HOME", "/h"), ("XDG_CACHE_HOME", "x")]), Some("/h/.cache".into()));
        assert_eq!(home(&[("HOME", "")]), None);
    }
}
