//! Counts what is read from a backend, and how long it takes.

use std::collections::BTreeMap;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::Stream;
use futures_util::{FutureExt, StreamExt};

use super::{Backend, BackendError, ByteStream, Outage, SettingError, SourceReport};
use crate::rafs::id::BlobId;

/// Upper bounds, in bytes and exclusive, of the sizes by which reads are counted.
const SIZES: [u64; 7] = [1 << 10, 4 << 10, 16 << 10, 64 << 10, 128 << 10, 512 << 10, 1 << 20];
/// Upper bounds, in milliseconds and inclusive, of the times by which reads are counted.
const TIMES_MS: [u64; 7] = [1, 20, 50, 100, 500, 1000, 2000];

/// A backend whose reads are counted.
pub struct Metered {
    inner: Arc<dyn Backend>,
    meter: Arc<Meter>,
}

/// What was read. All numbers only grow.
#[derive(Debug, Default)]
struct Meter {
    errors: AtomicU64,
    bytes: AtomicU64,
    /// Reads that came to their end, by time and size.
    reads: [[AtomicU64; 8]; 8],
    /// Milliseconds that they took, by size.
    time_ms: [AtomicU64; 8],
}

/// What was read from a backend so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadTotals {
    /// Reads that failed.
    pub errors: u64,
    /// Bytes that arrived.
    pub bytes: u64,
    /// Reads that came to their end: by time (at most 1, 20, 50, 100, 500, 1000, 2000 ms, more),
    /// then by size (less than 1, 4, 16, 64, 128, 512, 1024 KiB, more).
    pub reads: [[u64; 8]; 8],
    /// Milliseconds that those took, by size.
    pub time_ms: [u64; 8],
}

impl ReadTotals {
    /// Reads that came to their end.
    pub fn count(&self) -> u64 {
        self.reads.iter().flatten().sum()
    }
}

impl Metered {
    pub fn new(inner: Arc<dyn Backend>) -> Metered {
        Metered { inner, meter: Arc::default() }
    }

    fn begin(&self, range: &Range<u64>) -> Reading {
        let meter = Arc::clone(&self.meter);
        let want = range.end.saturating_sub(range.start);
        Reading { since: Instant::now(), want, bytes: 0, ended: false, meter }
    }

    pub fn totals(&self) -> ReadTotals {
        let Meter { errors, bytes, reads, time_ms } = &*self.meter;
        let value = |number: &AtomicU64| number.load(Ordering::Relaxed);
        ReadTotals {
            errors: value(errors),
            bytes: value(bytes),
            reads: std::array::from_fn(|time| std::array::from_fn(|i| value(&reads[time][i]))),
            time_ms: std::array::from_fn(|i| value(&time_ms[i])),
        }
    }
}

impl Backend for Metered {
    fn read(
        &self,
        blob: &BlobId,
        range: Range<u64>,
    ) -> BoxFuture<'_, Result<ByteStream, BackendError>> {
        let reading = self.begin(&range);
        let read = self.inner.read(blob, range);
        async move {
            match read.await {
                Ok(stream) => Ok(Counted { stream, reading }.boxed()),
                Err(error) => {
                    reading.meter.errors.fetch_add(1, Ordering::Relaxed);
                    Err(error)
                }
            }
        }
        .boxed()
    }

    fn read_here(&self, blob: &BlobId, range: Range<u64>) -> Option<Bytes> {
        let mut reading = self.begin(&range);
        let bytes = self.inner.read_here(blob, range)?;
        reading.saw(Some(&Ok(bytes.clone())));
        Some(bytes)
    }

    fn size(&self, blob: &BlobId) -> BoxFuture<'_, Result<u64, BackendError>> {
        self.inner.size(blob)
    }

    fn name(&self) -> &str {
        self.inner.name()
    }

    fn mistrust(&self, blob: &BlobId, range: Range<u64>) -> bool {
        self.inner.mistrust(blob, range)
    }

    fn watches_itself(&self) -> bool {
        self.inner.watches_itself()
    }

    fn outage(&self) -> Outage {
        self.inner.outage()
    }

    fn settings(&self) -> BTreeMap<String, String> {
        self.inner.settings()
    }

    fn change(&self, values: &BTreeMap<String, String>) -> Result<(), SettingError> {
        self.inner.change(values)
    }

    /// One, with what was counted here, for a backend that does not tell its sources apart.
    fn sources(&self) -> Vec<SourceReport> {
        let mut sources = self.inner.sources();
        if sources.is_empty() {
            let ReadTotals { bytes, .. } = self.totals();
            sources.push(SourceReport {
                name: self.name().to_owned(),
                healthy: true,
                requests: self.totals().count(),
                bytes,
                errors: Default::default(),
            });
        }
        sources
    }
}

/// One read.
struct Reading {
    since: Instant,
    /// Bytes that were asked for; readers do not look for an end behind them.
    want: u64,
    bytes: u64,
    ended: bool,
    meter: Arc<Meter>,
}

impl Reading {
    fn saw(&mut self, item: Option<&Result<Bytes, BackendError>>) {
        match item {
            Some(Ok(bytes)) => {
                self.bytes += bytes.len() as u64;
                self.meter.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                if self.bytes >= self.want {
                    self.end();
                }
            }
            Some(Err(_)) => {
                self.meter.errors.fetch_add(1, Ordering::Relaxed);
                self.ended = true;
            }
            None => self.end(),
        }
    }

    /// All has come.
    fn end(&mut self) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let ms = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX >> 8);
        let (time, size) = (class(&TIMES_MS, ms), class(&SIZES, self.bytes + 1));
        self.meter.reads[time][size].fetch_add(1, Ordering::Relaxed);
        self.meter.time_ms[size].fetch_add(ms, Ordering::Relaxed);
    }
}

/// The first of `bounds` that is not below `value`, or one behind the last.
fn class(bounds: &[u64], value: u64) -> usize {
    bounds.iter().position(|&bound| value <= bound).unwrap_or(bounds.len())
}

/// The bytes of a read as they pass.
struct Counted {
    stream: ByteStream,
    reading: Reading,
}

impl Stream for Counted {
    type Item = Result<Bytes, BackendError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let item = std::task::ready!(self.stream.poll_next_unpin(cx));
        self.reading.saw(item.as_ref());
        Poll::Ready(item)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::TryStreamExt;

    use super::*;
    use crate::backend::{LocalFs, LocalFsConfig};

    #[test]
    fn reads_are_counted_by_size_and_time() {
        let dir = tempfile::tempdir().unwrap();
        let blob = BlobId::parse("ab".repeat(32).as_bytes()).unwrap();
        std::fs::write(dir.path().join(blob.to_string()), vec![7; 100_000]).unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let config = LocalFsConfig {
            blob_file: None,
            dir: Some(dir.path().to_owned()),
            alt_dirs: Vec::new(),
        };
        let metered = Metered::new(Arc::new(LocalFs::new(config, runtime.handle().clone())));
        let read = |range| {
            runtime.block_on(async {
                let stream = metered.read(&blob, range).await?;
                stream.try_fold(0, |sum, bytes| async move { Ok(sum + bytes.len()) }).await
            })
        };
        assert_eq!(read(0..100_000).unwrap(), 100_000);
        assert_eq!(read(5..10).unwrap(), 5);
        assert!(read(99_999..100_001).is_err());
        let totals = metered.totals();
        let by_size = |size| totals.reads.iter().map(|sizes: &[u64; 8]| sizes[size]).sum::<u64>();
        assert_eq!((by_size(0), by_size(4), totals.count()), (1, 1, 2));
        assert_eq!(totals.errors, 1);
        assert!((100_005..=100_006).contains(&totals.bytes), "{totals:?}");
        let sources = metered.sources();
        assert_eq!((sources.len(), sources[0].requests), (1, 2));
        assert!(sources[0].name.starts_with("localfs "), "{sources:?}");
    }
}
