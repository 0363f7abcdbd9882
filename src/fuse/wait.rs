//! What a request waits for, and what it brings back.

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Instant;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use crate::blob::ChunkError;

/// A request could not be answered yet.
///
/// It holds no thread. When [`Wait::ready`] ends, [`super::Server::handle`] is called again with
/// the same request and the [`Pins`]; it may wait again, but never beyond the first deadline.
/// Dropping a `Wait` or its future gives up.
pub struct Wait(BoxFuture<'static, Pins>);

impl Wait {
    pub(super) fn new(work: impl Future<Output = Pins> + Send + 'static) -> Wait {
        Wait(work.boxed())
    }

    /// The same wait of a request that came at `since`.
    pub(super) fn of_request(self, since: Instant) -> Wait {
        Wait::new(self.0.map(move |pins| Pins { since: Some(since), ..pins }))
    }

    /// Does the work; must be polled inside a tokio runtime.
    pub fn ready(self) -> impl Future<Output = Pins> + Send + 'static {
        self.0
    }
}

impl fmt::Debug for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Wait")
    }
}

/// What earlier waits of one request made ready; empty for a request that has not waited.
#[derive(Clone, Debug, Default)]
pub struct Pins {
    /// When the request has waited long enough; set by its first wait for chunks.
    pub(super) deadline: Option<Instant>,
    /// When the request came.
    pub(super) since: Option<Instant>,
    /// Waits so far.
    pub(super) rounds: u32,
    /// What became of chunks that are not in the cache now, sorted by their position in the file.
    chunks: Vec<(u32, Pinned)>,
}

/// A chunk that a wait was for.
#[derive(Clone, Debug)]
pub(super) enum Pinned {
    /// Its bytes, as the cache could not take them.
    Memory(Arc<[u8]>),
    Failed(Arc<ChunkError>),
}

impl Pins {
    /// Chunk `number` of the file that the request reads.
    pub(super) fn get(&self, number: u32) -> Option<&Pinned> {
        let i = self.chunks.binary_search_by_key(&number, |&(number, _)| number).ok()?;
        Some(&self.chunks[i].1)
    }

    /// Replaces what was known of the chunk.
    pub(super) fn pin(&mut self, number: u32, pinned: Pinned) {
        match self.chunks.binary_search_by_key(&number, |&(number, _)| number) {
            Ok(i) => self.chunks[i].1 = pinned,
            Err(i) => self.chunks.insert(i, (number, pinned)),
        }
    }
}
