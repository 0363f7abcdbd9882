//! What a document says about prefetch: `fs_prefetch`, `cache.prefetch`, `rafs.prefetch`.

use serde_json::{Value, json};

use super::ConfigError;
use super::table::{Notes, Table};

/// Most requests at once.
const MAX_THREADS: u64 = 1024;
/// Most bytes of one request.
const MAX_BATCH: u64 = 256 << 20;

/// Whether and how an image is fetched before it is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prefetch {
    /// `None`: the document does not say; only files named elsewhere are fetched.
    pub enable: Option<bool>,
    /// Requests of `batch_size` at once, 1 to 1024.
    pub threads: u64,
    /// Most bytes of one request, up to 256 MiB.
    pub batch_size: u64,
    /// Bytes per second; 0: no limit.
    pub bandwidth_limit: u64,
    /// Everything, after what is listed.
    pub prefetch_all: bool,
}

impl Default for Prefetch {
    fn default() -> Prefetch {
        Prefetch {
            enable: None,
            threads: 8,
            batch_size: 1 << 20,
            bandwidth_limit: 0,
            prefetch_all: false,
        }
    }
}

/// Names of the numbers, and whether everything is fetched by default.
pub(super) struct Keys {
    threads: &'static str,
    batch_size: &'static str,
    bandwidth_limit: &'static str,
    prefetch_all: bool,
}

pub(super) const VERSION_1: Keys = Keys {
    threads: "threads_count",
    batch_size: "merging_size",
    bandwidth_limit: "bandwidth_rate",
    prefetch_all: true,
};

pub(super) const VERSION_2: Keys = Keys {
    threads: "threads",
    batch_size: "batch_size",
    bandwidth_limit: "bandwidth_limit",
    prefetch_all: false,
};

impl Prefetch {
    pub(super) fn read(
        mut table: Table,
        keys: &Keys,
        notes: &mut Notes,
    ) -> Result<Prefetch, ConfigError> {
        let enable = table.take("enable")?.unwrap_or(false);
        let mut number = |key: &str, default: u64, max: u64| {
            let value = table.take(key)?.unwrap_or(default);
            // As nydusd: what is off need not make sense.
            match enable && !(1..=max).contains(&value) {
                true => Err(table.error(key, format!("use 1 to {max}"))),
                false => Ok(value),
            }
        };
        let threads = number(keys.threads, 8, MAX_THREADS)?;
        let batch_size = number(keys.batch_size, 1 << 20, MAX_BATCH)?;
        let bandwidth_limit = table.take(keys.bandwidth_limit)?.unwrap_or(0);
        let prefetch_all = table.take("prefetch_all")?.unwrap_or(keys.prefetch_all);
        // What comes is always used while it streams in.
        table.take::<bool>("stream_prefetch")?;
        table.finish(notes);
        Ok(Prefetch { enable: Some(enable), threads, batch_size, bandwidth_limit, prefetch_all })
    }

    /// What both tables of version 2 ask for, where this one is the first that counts.
    pub(super) fn or(self, other: Prefetch) -> Prefetch {
        match (self.enable, other.enable) {
            (Some(true), Some(true)) => {
                Prefetch { prefetch_all: self.prefetch_all || other.prefetch_all, ..self }
            }
            (Some(true), _) | (Some(false), None) => self,
            (None | Some(false), _) => other,
        }
    }

    pub(super) fn public(&self) -> Value {
        json!({
            "enable": self.enable.unwrap_or(false),
            "threads": self.threads,
            "batch_size": self.batch_size,
            "bandwidth_limit": self.bandwidth_limit,
            "prefetch_all": self.prefetch_all,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::Config;
    use super::*;

    fn v1(more: &str) -> Result<Config, ConfigError> {
        Config::parse(&format!(
            r#"{{"device":{{"backend":{{"type":"localfs","config":{{"dir":"/b"}}}},
            "cache":{{"type":"blobcache"}}}}{more}}}"#
        ))
    }

    fn v2(cache: &str, rafs: &str) -> Config {
        let text = format!(
            r#"{{"version":2,"backend":{{"type":"localfs","localfs":{{"dir":"/b"}}}},
            "cache":{{"type":"blobcache"{cache}}},"rafs":{{"batch_size":4096{rafs}}}}}"#
        );
        Config::parse(&text).unwrap_or_else(|e| panic!("{text}: {e:?}"))
    }

    #[test]
    fn defaults_are_those_of_nydusd() {
        assert_eq!(v1("").unwrap().prefetch, Prefetch::default());
        let on = v1(r#","fs_prefetch":{"enable":true}"#).unwrap();
        let want = Prefetch { enable: Some(true), prefetch_all: true, ..Prefetch::default() };
        assert_eq!(on.prefetch, want);
        let on = v2(r#","prefetch":{"enable":true}"#, "");
        assert_eq!(on.prefetch, Prefetch { prefetch_all: false, ..want });
        assert_eq!((on.amplify, v1("").unwrap().amplify), (4096, 1 << 20));
    }

    #[test]
    fn every_key_is_read() {
        let want = Prefetch {
            enable: Some(true),
            threads: 3,
            batch_size: 65536,
            bandwidth_limit: 1000,
            prefetch_all: false,
        };
        let config = v1(r#","amplify_io":0,"fs_prefetch":{"enable":true,"threads_count":3,
            "merging_size":65536,"bandwidth_rate":1000,"prefetch_all":false,"stream_prefetch":true}"#)
        .unwrap();
        assert_eq!((&config.prefetch, config.amplify), (&want, 0));
        assert!(config.notes.is_empty(), "{:?}", config.notes);
        let table = r#","prefetch":{"enable":true,"threads":3,"batch_size":65536,
            "bandwidth_limit":1000,"prefetch_all":false,"stream_prefetch":false}"#;
        assert_eq!(v2(table, "").prefetch, want);
        assert_eq!(v2("", table).prefetch, want);
        // Both: the cache's numbers, and everything if one of them says so.
        let both = v2(table, r#","prefetch":{"enable":true,"threads":7,"prefetch_all":true}"#);
        assert_eq!(both.prefetch, Prefetch { prefetch_all: true, ..want.clone() });
        let off = v2(r#","prefetch":{"enable":false,"threads":9}"#, table);
        assert_eq!(off.prefetch, want);
        let shown = both.public();
        assert_eq!(shown["rafs"]["prefetch"]["threads"], 3);
        assert_eq!(shown["rafs"]["batch_size"], 4096);
    }

    #[test]
    fn numbers_out_of_range_are_refused_when_it_is_on() {
        let numbers = ["\"threads_count\":0", "\"threads_count\":1025", "\"merging_size\":0"];
        for number in numbers {
            let on = format!(r#","fs_prefetch":{{"enable":true,{number}}}"#);
            let error = format!("{:?}", v1(&on).expect_err(number));
            assert!(error.contains("fs_prefetch.") && error.contains("use 1 to"), "{error}");
            v1(&on.replace("true", "false")).expect("it is off");
        }
    }
}
