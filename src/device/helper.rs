//! A second thread for a queue: it takes a share of the large reads that a guest has in flight.
//!
//! A guest with one queue is else served by one processor, however many there are. The queue's thread
//! puts large requests on a pile, of which both take the oldest, one at a time. What the helper has
//! carried out it lays back; the queue's thread alone gives it to the guest, so that the ring still has
//! one owner. A helper is started when two large requests are there at once, sleeps when the pile is empty, and
//! ends after [`IDLE`].

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::chain::Chain;
use super::memory::Memory;
use super::queue::{Shared, handle, thread_time};
use super::{Outcome, Serve};

/// Requests with room for so many bytes of answer are large: to copy them takes longer than to wake
/// another thread.
pub(super) const LARGE: u32 = 512 * 1024;
/// Most requests of a queue on its pile and with its helper.
pub(super) const MOST: usize = 64;
/// How long a helper sleeps before it ends.
const IDLE: Duration = Duration::from_secs(5);
/// So much longer than its processor time a request takes where somebody else has had the processor.
const LOST: Duration = Duration::from_millis(1);

/// Helpers that may be there at once: one fewer than there are processors, over all queues.
#[derive(Debug)]
pub(super) struct Places {
    most: usize,
    left: AtomicUsize,
}

impl Places {
    pub(super) fn new(processors: usize) -> Places {
        let most = processors.saturating_sub(1);
        Places { most, left: AtomicUsize::new(most) }
    }

    /// Whether this machine has processors for helpers.
    pub(super) fn any(&self) -> bool {
        self.most > 0
    }

    fn take(self: &Arc<Self>) -> Option<Place> {
        let less = |left: usize| left.checked_sub(1);
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).ok()?;
        Some(Place(Arc::clone(self)))
    }
}

/// The right to be there.
struct Place(Arc<Places>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.left.fetch_add(1, Ordering::Relaxed);
    }
}

/// A request that has been understood, and all that its answer needs.
pub(super) struct Job<R> {
    pub chain: Chain,
    pub request: R,
    pub memory: Arc<Memory>,
}

impl<R> Job<R> {
    /// Has the service carry it out, whichever thread this is.
    pub(super) fn serve<S: Serve<Request = R>>(
        self,
        shared: &Shared<S>,
        pins: &S::Pins,
    ) -> Done<S> {
        let (reply, _) = self.chain.writable_slices(&self.memory);
        let outcome = handle(shared, &self.request, &reply, pins);
        drop(reply);
        Done { job: self, outcome }
    }
}

/// What became of one.
pub(super) struct Done<S: Serve> {
    pub job: Job<S::Request>,
    pub outcome: Outcome<S::Pins>,
}

struct State<S: Serve> {
    /// The oldest first.
    waiting: VecDeque<Job<S::Request>>,
    done: Vec<Done<S>>,
    /// There is a helper.
    alive: bool,
    /// It waits for something to do.
    asleep: bool,
    /// It is to end.
    end: bool,
}

/// The large requests of one queue that are not answered.
pub(super) struct Pile<S: Serve> {
    state: Mutex<State<S>>,
    /// Something waits, or the helper is to end.
    more: Condvar,
    /// `done` may hold something.
    finished: AtomicBool,
    /// Somebody else has had the helper's processor.
    lost: AtomicBool,
}

/// The queue's end of the pile. Dropping it ends the helper, once it has carried out what it has.
pub(super) struct Helped<S: Serve> {
    shared: Arc<Shared<S>>,
    pile: Arc<Pile<S>>,
    thread: Option<JoinHandle<()>>,
    /// Requests that were given and have not come back.
    out: usize,
    /// A helper could not be started: not tried again.
    failed: bool,
}

impl<S: Serve> Helped<S> {
    pub(super) fn new(shared: Arc<Shared<S>>) -> Helped<S> {
        let state = State {
            waiting: VecDeque::new(),
            done: Vec::new(),
            alive: false,
            asleep: false,
            end: false,
        };
        let pile = Pile {
            state: Mutex::new(state),
            more: Condvar::new(),
            finished: AtomicBool::new(false),
            lost: AtomicBool::new(false),
        };
        Helped { shared, pile: Arc::new(pile), thread: None, out: 0, failed: false }
    }

    /// Requests that were given and have not come back.
    pub(super) fn out(&self) -> usize {
        self.out
    }

    /// Puts a request on the pile. With two there, the helper is wanted.
    pub(super) fn give(&mut self, job: Job<S::Request>) {
        self.out += 1;
        let mut state = self.pile.lock();
        state.waiting.push_back(job);
        if state.waiting.len() < 2 {
            return;
        }
        if state.alive {
            let asleep = std::mem::take(&mut state.asleep);
            drop(state);
            if asleep {
                self.pile.more.notify_one();
            }
        } else if !self.failed {
            drop(state);
            self.start();
        }
    }

    /// Takes back the oldest request that nobody has begun.
    pub(super) fn take(&mut self) -> Option<Job<S::Request>> {
        if self.out == 0 {
            return None;
        }
        let job = self.pile.lock().waiting.pop_front()?;
        self.out -= 1;
        Some(job)
    }

    /// Whether the helper has carried something out that was not collected.
    pub(super) fn has_done(&self) -> bool {
        self.pile.finished.load(Ordering::Relaxed)
    }

    /// Moves what the helper has carried out to the end of `into`.
    pub(super) fn collect(&mut self, into: &mut Vec<Done<S>>) {
        if self.has_done() && self.pile.finished.swap(false, Ordering::Acquire) {
            let before = into.len();
            into.append(&mut self.pile.lock().done);
            self.out -= into.len() - before;
        }
    }

    /// Takes all that is left, after the helper has ended: not begun, or carried out.
    pub(super) fn rest(&mut self) -> Vec<Chain> {
        let mut state = self.pile.lock();
        let waiting: Vec<_> = state.waiting.drain(..).collect();
        let done = state.done.drain(..).map(|done| done.job);
        self.out = 0;
        done.chain(waiting).map(|job| job.chain).collect()
    }

    /// Whether somebody else has had the helper's processor since this was last asked.
    pub(super) fn lost_processor(&self) -> bool {
        self.pile.lost.load(Ordering::Relaxed) && self.pile.lost.swap(false, Ordering::Relaxed)
    }

    /// Ends the helper, and waits until it has carried out what it has.
    pub(super) fn end(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        self.pile.lock().end = true;
        self.pile.more.notify_one();
        if thread.join().is_err() {
            log::error!("queue {}: its helper panicked", self.shared.index);
        }
        self.pile.lock().end = false;
    }

    #[cold]
    fn start(&mut self) {
        let Some(place) = self.shared.helpers.take() else { return };
        // The one that was there has ended, or is about to.
        self.end();
        let (shared, pile) = (Arc::clone(&self.shared), Arc::clone(&self.pile));
        let name = format!("vq{}-helper", self.shared.index);
        self.pile.lock().alive = true;
        let spawned = std::thread::Builder::new().name(name).spawn(move || {
            pile.help(&shared);
            drop(place);
        });
        match spawned {
            Ok(thread) => self.thread = Some(thread),
            Err(e) => {
                self.pile.lock().alive = false;
                self.failed = true;
                log::warn!("queue {}: goes on without a helper: {e}", self.shared.index);
            }
        }
    }
}

impl<S: Serve> Drop for Helped<S> {
    fn drop(&mut self) {
        self.end();
    }
}

impl<S: Serve> Pile<S> {
    fn lock(&self) -> MutexGuard<'_, State<S>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the helper does.
    fn help(&self, shared: &Shared<S>) {
        let pins = S::Pins::default();
        while let Some(job) = self.next() {
            let (since, used) = (Instant::now(), thread_time());
            let done = job.serve(shared, &pins);
            if since.elapsed().saturating_sub(thread_time() - used) >= LOST {
                self.lost.store(true, Ordering::Relaxed);
            }
            self.lock().done.push(done);
            if !self.finished.swap(true, Ordering::Release) {
                shared.inbox().wake();
            }
        }
    }

    /// Waits for the next request. `None` if there is to be no helper any more.
    fn next(&self) -> Option<Job<S::Request>> {
        let mut state = self.lock();
        let mut idle = false;
        loop {
            if state.end {
                break;
            }
            if let Some(job) = state.waiting.pop_front() {
                return Some(job);
            }
            if idle {
                break;
            }
            state.asleep = true;
            let (woken, timeout) =
                self.more.wait_timeout(state, IDLE).unwrap_or_else(PoisonError::into_inner);
            state = woken;
            idle = timeout.timed_out() && state.asleep;
        }
        (state.alive, state.asleep) = (false, false);
        None
    }
}
