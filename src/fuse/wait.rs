//! What a request waits for, and what it brings back.

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Instant;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use super::dax::Mapping;
use super::reply::Reply;
use crate::blob::ChunkError;

/// A request could not be answered yet.
///
/// It holds no thread. When [`Wait::ready`] ends, [`super::Server::handle`] is called again with
/// the same request and the [`Pins`]; it may wait again, but never beyond the first deadline.
/// Dropping a `Wait` or its future gives up.
pub struct Wait {
    work: BoxFuture<'static, Pins>,
    interruptible: bool,
}

impl Wait {
    pub(super) fn new(work: impl Future<Output = Pins> + Send + 'static) -> Wait {
        Wait { work: work.boxed(), interruptible: true }
    }

    /// For work that goes on when nobody waits for it any more, and does something: saying that it
    /// was interrupted would be a lie.
    pub(super) fn uninterruptible(work: impl Future<Output = Pins> + Send + 'static) -> Wait {
        Wait { work: work.boxed(), interruptible: false }
    }

    /// The same wait, which does not end because the guest loses patience.
    pub(super) fn uninterrupted(self) -> Wait {
        Wait { interruptible: false, ..self }
    }

    /// Whether the request may be answered with EINTR instead, when the guest asks for that.
    pub fn interruptible(&self) -> bool {
        self.interruptible
    }

    /// The same wait of a request that came at `since`.
    pub(super) fn of_request(self, since: Instant) -> Wait {
        let Wait { work, interruptible } = self;
        let work = work.map(move |pins| Pins { since: Some(since), ..pins }).boxed();
        Wait { work, interruptible }
    }

    /// Does the work; must be polled inside a tokio runtime.
    pub fn ready(self) -> impl Future<Output = Pins> + Send + 'static {
        self.work
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
    /// Of these, waits for the disk of the cache.
    pub(super) paged: u32,
    /// The disk of the cache did not answer by the deadline.
    pub(super) late: bool,
    /// What became of chunks that are not in the cache now, sorted by their position in the file.
    chunks: Vec<(u32, Pinned)>,
    /// How files are mapped, from an INIT or a DESTROY that has waited for the VMM.
    pub(super) mapping: Option<Mapping>,
    /// The whole answer, where it was found by another thread.
    pub(super) answer: Option<Arc<Answer>>,
}

/// An answer that is ready to be sent.
#[derive(Debug)]
pub(super) enum Answer {
    /// What follows the header.
    Body(Vec<u8>),
    /// Positive.
    Errno(i32),
}

impl Answer {
    /// Sends it. Returns the bytes written.
    pub(super) fn send(&self, unique: u64, reply: &mut Reply<'_>) -> u32 {
        match self {
            Answer::Body(bytes) => reply.bytes(unique, bytes),
            Answer::Errno(errno) => reply.error(unique, *errno),
        }
    }
}

/// A chunk that a wait was for.
#[derive(Clone, Debug)]
pub(super) enum Pinned {
    /// Its bytes, as the cache could not take them.
    Memory(Arc<[u8]>),
    Failed(Arc<ChunkError>),
}

impl Pins {
    /// The whole answer.
    pub(super) fn answer(answer: Answer) -> Pins {
        Pins { answer: Some(Arc::new(answer)), ..Pins::default() }
    }

    /// How files are mapped.
    pub(super) fn mapping(mapping: Mapping) -> Pins {
        Pins { mapping: Some(mapping), ..Pins::default() }
    }

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
