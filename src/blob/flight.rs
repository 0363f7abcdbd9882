//! Waiting: one result for many who want it, each with a deadline of its own.

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::gate::Class;
use super::store::Store;
use crate::backend::BackendError;

/// A result that is on its way. Work for it goes on until the last waiter's deadline.
pub struct Slot<R> {
    result: watch::Sender<Option<R>>,
    epoch: Instant,
    /// Latest deadline, in microseconds since `epoch`.
    until_us: AtomicU64,
    /// The most urgent [`Class`] that wants it.
    class: AtomicU8,
    /// What went wrong last and is being tried again.
    last: Mutex<Option<Arc<BackendError>>>,
}

impl<R: Clone> Slot<R> {
    /// Somebody waits until `deadline`.
    pub fn new(epoch: Instant, deadline: Instant) -> Self {
        Self::of_class(Class::Demand, epoch, deadline)
    }

    /// Nobody waits unless `class` is demand; it should be there by `deadline` all the same.
    pub fn of_class(class: Class, epoch: Instant, deadline: Instant) -> Self {
        let slot = Slot {
            result: watch::Sender::new(None),
            epoch,
            until_us: AtomicU64::new(0),
            class: AtomicU8::new(class as u8),
            last: Mutex::new(None),
        };
        slot.extend(deadline);
        slot
    }

    /// Somebody waits until `deadline`.
    pub fn extend(&self, deadline: Instant) {
        let us = deadline.saturating_duration_since(self.epoch).as_micros();
        self.until_us.fetch_max(u64::try_from(us).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Somebody waits for it from now on; gives what it was before.
    pub fn demand(&self) -> Class {
        let before = self.class.swap(Class::Demand as u8, Ordering::Relaxed);
        Class::ALL[usize::from(before)]
    }

    pub fn class(&self) -> Class {
        Class::ALL[usize::from(self.class.load(Ordering::Relaxed))]
    }

    /// When the last waiter gives up.
    pub fn until(&self) -> Instant {
        let wait = Duration::from_micros(self.until_us.load(Ordering::Relaxed));
        self.epoch.checked_add(wait).unwrap_or_else(|| Instant::now() + FAR)
    }

    /// Until when another process may keep us waiting. It may be stuck; a quarter of the time is
    /// left for trying ourselves, and more if the time has no end.
    pub fn claim_patience(&self) -> Instant {
        let now = Instant::now();
        now + (self.until().saturating_duration_since(now) / 4 * 3).min(MAX_CLAIM_PATIENCE)
    }

    /// Sets the result and wakes the waiters. The first result counts.
    pub fn finish(&self, result: R) {
        self.result.send_if_modified(|slot| {
            let first = slot.is_none();
            if first {
                *slot = Some(result);
            }
            first
        });
    }

    /// Is the result there?
    pub fn is_done(&self) -> bool {
        self.result.borrow().is_some()
    }

    /// Waits for the result.
    pub async fn done(&self) -> R {
        let mut receiver = self.result.subscribe();
        loop {
            if let Some(result) = &*receiver.borrow_and_update() {
                return result.clone();
            }
            if receiver.changed().await.is_err() {
                std::future::pending::<()>().await; // `self` has the sender: it is not dropped
            }
        }
    }

    pub fn failed_for_now(&self, error: &Arc<BackendError>) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.clone());
    }

    /// What went wrong last, if nothing has come since.
    pub fn last_error(&self) -> Option<Arc<BackendError>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Longest wait for another process, whatever the deadline.
const MAX_CLAIM_PATIENCE: Duration = Duration::from_secs(60);

/// A deadline beyond any that is meant.
const FAR: Duration = Duration::from_secs(86_400);

impl Store {
    /// A sleep that may be polled outside the runtime.
    pub(super) fn sleep_until(&self, end: Instant) -> tokio::time::Sleep {
        let _inside = self.runtime.enter();
        tokio::time::sleep_until(end.into())
    }
}

/// The result of `work`, or `None` once `until` (asked again each time it is reached) has passed.
pub async fn within<T>(
    store: &Store,
    until: impl Fn() -> Instant,
    work: impl Future<Output = T>,
) -> Option<T> {
    let mut work = pin!(work);
    loop {
        let sleep = store.sleep_until(until());
        tokio::select! {
            biased;
            result = &mut work => return Some(result),
            () = sleep => if until() <= Instant::now() { return None },
        }
    }
}
