//! Which numbers are inodes that a guest may have been told about.
//!
//! A node id comes from the guest, and any 32-byte slot of a bootstrap can be read as an inode. So
//! only slots that were reached by a name are taken for one: a bit each, set by lookups and
//! listings. A guest that was served before by another process has ids of which this one knows
//! nothing; the first such id makes it walk the whole image, once.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};

use crate::rafs::Bootstrap;

/// The inodes of an image that have been found. Threads share it without a lock.
pub(super) struct Known {
    /// How the image is called in logs.
    name: String,
    image: Bootstrap,
    /// A bit for each slot: 1/256 of the size of the bootstrap.
    words: Vec<AtomicU64>,
    /// Set once everything that a walk finds is in `words`.
    complete: AtomicBool,
    walk: OnceLock<Shared<BoxFuture<'static, ()>>>,
}

impl Known {
    /// Knows the root of `image` only.
    pub(super) fn new(name: String, image: Bootstrap) -> Known {
        let words = usize::try_from(image.slots().div_ceil(64)).expect("a bootstrap is in memory");
        let words = std::iter::repeat_with(AtomicU64::default).take(words).collect();
        let known =
            Known { name, words, complete: AtomicBool::new(false), walk: OnceLock::new(), image };
        known.insert(known.image.root().0);
        known
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Whether `nid`, which may be any number, was reached by a name.
    pub(super) fn contains(&self, nid: u64) -> bool {
        self.word(nid).is_some_and(|word| word.load(Ordering::Relaxed) & bit(nid) != 0)
    }

    /// `nid` was reached by a name.
    pub(super) fn insert(&self, nid: u64) {
        if let Some(word) = self.word(nid)
            && word.load(Ordering::Relaxed) & bit(nid) == 0
        {
            word.fetch_or(bit(nid), Ordering::Relaxed);
        }
    }

    /// Whether every inode of the image is known: a number that is not, is none.
    pub(super) fn complete(&self) -> bool {
        self.complete.load(Ordering::Acquire)
    }

    /// Finds every inode of the image, on a thread made for blocking work; the first call starts
    /// it, all wait for the same walk. Needs a tokio runtime when it is polled.
    pub(super) async fn find_all(self: Arc<Self>) {
        let walk = self.walk.get_or_init(|| {
            let known = self.clone();
            let walk = tokio::task::spawn_blocking(move || known.walk_image());
            // A walk that panicked or was cancelled with its runtime found what it found.
            walk.map(drop).boxed().shared()
        });
        walk.clone().await;
        self.complete.store(true, Ordering::Release);
    }

    fn walk_image(&self) {
        let (mut damaged, mut first) = (0_u64, None);
        for item in self.image.walk() {
            match item {
                Ok(item) => self.insert(item.inode.nid().0),
                Err(error) => {
                    damaged += 1;
                    first.get_or_insert(error);
                }
            }
        }
        if let Some(error) = first {
            let cause = super::file_system::chain(&error);
            log::warn!("image {}: {damaged} paths cannot be read, first {cause}", self.name);
        }
    }

    fn word(&self, nid: u64) -> Option<&AtomicU64> {
        self.words.get(usize::try_from(nid / 64).ok()?)
    }
}

fn bit(nid: u64) -> u64 {
    1 << (nid % 64)
}
