//! The bytes of blobs, wherever they are.
//!
//! A [`Backend`] answers ranged reads of blobs by id, as a stream: the first bytes can be
//! decompressed and verified while the rest is on its way. A read holds no thread while it waits,
//! and dropping it ends it. Backends do not verify, cache or retry what a caller could retry;
//! `blob` does. Nothing here knows what a chunk is.

use std::collections::BTreeMap;
use std::ops::Range;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;

use crate::rafs::id::BlobId;

pub mod error;
pub mod local_disk;
pub mod localfs;
pub mod meter;
pub mod network;

pub use error::{BackendCause, BackendError};
pub use local_disk::LocalDiskConfig;
pub use localfs::{LocalFs, LocalFsConfig};
pub use meter::{Metered, ReadTotals};
pub use network::Remote;

/// The bytes of one read, in order, in pieces of any size but zero. Ends behind the last byte
/// asked for, or with an error; a stream that ends early is [`BackendError::ShortRead`].
pub type ByteStream = BoxStream<'static, Result<Bytes, BackendError>>;

/// A source of blobs.
///
/// Implementations bound their own memory and threads, but not time: whoever asks drops the future
/// or the stream when it has waited long enough.
pub trait Backend: Send + Sync {
    /// Streams bytes `range` of `blob`. An empty range yields an empty stream.
    fn read(
        &self,
        blob: &BlobId,
        range: Range<u64>,
    ) -> BoxFuture<'_, Result<ByteStream, BackendError>>;

    /// Bytes of the whole blob file.
    fn size(&self, blob: &BlobId) -> BoxFuture<'_, Result<u64, BackendError>>;

    /// What the operator calls this source, for logs: `localfs /var/lib/blobs`. Holds no secret.
    fn name(&self) -> &str;

    /// What `range` of `blob` gave did not match its digest. A backend with several sources takes
    /// another one for the next read of the blob and says true, as long as there is one that has not
    /// given wrong bytes; others have nothing to do. An empty range is what was read of the blob
    /// last.
    fn mistrust(&self, blob: &BlobId, range: Range<u64>) -> bool {
        let _ = (blob, range);
        false
    }

    /// The bytes `range` of `blob`, read on this thread, for which that is the quickest. `None`: not from
    /// here, not now, or it failed; [`Backend::read`] says why.
    fn read_here(&self, _blob: &BlobId, _range: Range<u64>) -> Option<Bytes> {
        None
    }

    /// Does it end by itself every read whose source is silent for too long? Then nobody else need
    /// watch it.
    fn watches_itself(&self) -> bool {
        false
    }

    /// What to do while no source answers.
    fn outage(&self) -> Outage {
        Outage::Deadline
    }

    /// What can be changed while it is in use, with the values in effect; secrets are shown as
    /// [`HIDDEN`]. Empty if nothing can.
    fn settings(&self) -> BTreeMap<String, String> {
        BTreeMap::new()
    }

    /// Changes settings, all of `values` or none. Reads under way keep what they began with.
    ///
    /// # Errors
    ///
    /// Names the setting and the reason, never a value.
    fn change(&self, values: &BTreeMap<String, String>) -> Result<(), SettingError> {
        match values.keys().next() {
            Some(key) => Err(SettingError::new(key, "this backend has no such setting")),
            None => Ok(()),
        }
    }

    /// The places it reads from, the preferred one first, for metrics.
    fn sources(&self) -> Vec<SourceReport> {
        Vec::new()
    }
}

/// How [`Backend::settings`] shows a secret that is set.
pub const HIDDEN: &str = "***";

/// What to do while no source answers (config `on_outage`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Outage {
    /// A read is repeated until its deadline, then it fails.
    #[default]
    Deadline,
    /// A read is repeated for as long as it takes; also when access is denied, as new credentials
    /// may come.
    Wait,
    /// A read is repeated so often, then it fails.
    Fail { retries: u32 },
}

/// Why a setting cannot be changed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {reason}")]
pub struct SettingError {
    pub key: String,
    pub reason: String,
}

impl SettingError {
    pub fn new(key: impl Into<String>, reason: impl Into<String>) -> SettingError {
        SettingError { key: key.into(), reason: reason.into() }
    }
}

/// One place that blobs are read from: how it is and what it gave so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceReport {
    /// For logs and labels: `mirror http://m:5000`. Holds no secret.
    pub name: String,
    /// False while it is left out because it failed.
    pub healthy: bool,
    pub requests: u64,
    /// Bytes of blobs that arrived.
    pub bytes: u64,
    /// Requests that failed, in the order of [`BackendCause::ALL`].
    pub errors: [u64; BackendCause::ALL.len()],
}
