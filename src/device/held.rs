//! Requests that wait.
//!
//! A request that cannot be served yet lies in the table of its queue, with everything its answer
//! needs, and costs no thread: a task on the runtime waits for what is missing and drops a note
//! into the queue's inbox, and the queue's own thread takes it from there. So only that thread ever
//! touches the guest's memory, and once it has stopped nothing does.
//!
//! A request leaves the table with its one answer, or with the whole ring. A task that ends without
//! a result (it panicked, or the runtime went away) leaves a note too: its request is answered EIO.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use tokio::runtime::Handle;
use tokio::task::AbortHandle;

use super::Wait;
use super::chain::Chain;
use super::memory::Memory;
use super::parked::Listed;

/// Names a held request in its queue; never used twice within a connection.
pub(super) type Ticket = u64;

/// A request in waiting.
pub(super) struct Held<R> {
    pub chain: Chain,
    pub request: R,
    /// The guest's id of the request, by which it may be interrupted.
    pub unique: u64,
    /// Shows it to people who ask.
    pub _listed: Listed,
    /// Keeps the buffers mapped, whatever the front end does to its memory table meanwhile.
    pub memory: Arc<Memory>,
}

struct Waiting<R> {
    held: Held<R>,
    task: AbortHandle,
    interruptible: bool,
}

/// The requests of one queue that were taken and wait for their answer.
pub(super) struct HeldTable<R> {
    waiting: HashMap<Ticket, Waiting<R>>,
    /// Heads of chains that were taken before this table was there, to be served from the start.
    again: VecDeque<u16>,
}

impl<R> HeldTable<R> {
    pub(super) fn new() -> HeldTable<R> {
        HeldTable { waiting: HashMap::new(), again: VecDeque::new() }
    }

    /// An empty table but for chains that another one has held, the oldest first.
    pub(super) fn of_heads(heads: Vec<u16>) -> HeldTable<R> {
        HeldTable { waiting: HashMap::new(), again: heads.into() }
    }

    /// Requests that wait.
    pub(super) fn len(&self) -> usize {
        self.waiting.len() + self.again.len()
    }

    /// Heads of all of them, the oldest first.
    pub(super) fn heads(&self) -> Vec<u16> {
        let mut waiting: Vec<_> = self.waiting.iter().collect();
        waiting.sort_by_key(|(ticket, _)| **ticket);
        let waiting = waiting.into_iter().map(|(_, waiting)| waiting.held.chain.head());
        self.again.iter().copied().chain(waiting).collect()
    }

    /// Keeps a chain that was taken, to be served from the start.
    pub(super) fn serve_again(&mut self, head: u16) {
        self.again.push_back(head);
    }

    /// Takes out a chain that has to be served from the start.
    pub(super) fn next_again(&mut self) -> Option<u16> {
        self.again.pop_front()
    }

    /// Keeps `held` until `wait` is over, which `inbox` will then be told.
    pub(super) fn hold<P: Send + 'static>(
        &mut self,
        held: Held<R>,
        wait: Wait<P>,
        inbox: &Arc<Inbox<P>>,
        runtime: &Handle,
    ) {
        let ticket = inbox.tickets.fetch_add(1, Ordering::Relaxed);
        let promise = Promise { ticket, inbox: Some(Arc::clone(inbox)) };
        let Wait { work, interruptible } = wait;
        let task = runtime.spawn(async move {
            let pins = work.await;
            promise.keep(pins);
        });
        let task = task.abort_handle();
        self.waiting.insert(ticket, Waiting { held, task, interruptible });
        inbox.held.store(self.waiting.len(), Ordering::Relaxed);
    }

    /// Takes out the request of a note. `None` if it has been answered since, or its ring is gone.
    pub(super) fn take<P>(&mut self, ticket: Ticket, inbox: &Inbox<P>) -> Option<Held<R>> {
        let Waiting { held, .. } = self.waiting.remove(&ticket)?;
        inbox.held.store(self.waiting.len(), Ordering::Relaxed);
        Some(held)
    }

    /// Takes out the request that the guest calls `unique` and stops its wait, if it may be cut
    /// short.
    pub(super) fn interrupt<P>(&mut self, unique: u64, inbox: &Inbox<P>) -> Option<Held<R>> {
        let wanted = |waiting: &Waiting<R>| waiting.held.unique == unique && waiting.interruptible;
        let ticket = *self.waiting.iter().find(|(_, waiting)| wanted(waiting))?.0;
        let Waiting { held, task, .. } = self.waiting.remove(&ticket)?;
        task.abort();
        inbox.held.store(self.waiting.len(), Ordering::Relaxed);
        Some(held)
    }

    /// Forgets all requests and stops their waits: the ring they came from is no more.
    pub(super) fn clear<P>(&mut self, inbox: &Inbox<P>) {
        for (_, waiting) in self.waiting.drain() {
            waiting.task.abort();
        }
        self.again.clear();
        inbox.held.store(0, Ordering::Relaxed);
    }
}

impl<R> Drop for HeldTable<R> {
    fn drop(&mut self) {
        for waiting in self.waiting.values() {
            waiting.task.abort();
        }
    }
}

/// What a queue's thread is told by others.
#[derive(Debug)]
pub(super) enum Note<P> {
    /// The wait of a held request is over.
    Ready(Ticket, P),
    /// The wait of a held request ended without a result.
    Lost(Ticket),
    /// The guest wants the request it calls so cut short.
    Interrupt(u64),
}

/// Notes to a queue's thread, and the means to wake it.
pub(super) struct Inbox<P> {
    notes: Mutex<Vec<Note<P>>>,
    /// Whether `notes` may hold something, so that the thread need not lock to see that it does not.
    full: AtomicBool,
    /// Requests that wait, so that an interrupt need not wake queues that hold none.
    held: AtomicUsize,
    /// The next ticket: none is used twice, so a note that comes too late finds nothing.
    tickets: AtomicU64,
    wake: OwnedFd,
}

/// Interrupts kept for a queue that does not come to look: they are advice, the rest is dropped.
const MAX_NOTES: usize = 4096;

impl<P> Inbox<P> {
    pub(super) fn new() -> std::io::Result<Inbox<P>> {
        Ok(Inbox {
            notes: Mutex::new(Vec::new()),
            full: AtomicBool::new(false),
            held: AtomicUsize::new(0),
            tickets: AtomicU64::new(0),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// Becomes readable when the thread should look up. For edge-triggered polling: nothing reads it.
    pub(super) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Makes the thread look up.
    pub(super) fn wake(&self) {
        // Fails only if 2^64 - 2 wake-ups are pending.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Tells a request's queue to cut it short, if this is its queue.
    pub(super) fn interrupt(&self, unique: u64) {
        if self.held.load(Ordering::Relaxed) > 0 {
            self.post(Note::Interrupt(unique));
        }
    }

    fn post(&self, note: Note<P>) {
        let mut notes = self.lock();
        if notes.len() >= MAX_NOTES && matches!(note, Note::Interrupt(_)) {
            return;
        }
        notes.push(note);
        drop(notes);
        if !self.full.swap(true, Ordering::Release) {
            self.wake();
        }
    }

    /// Whether there may be notes.
    pub(super) fn has_notes(&self) -> bool {
        self.full.load(Ordering::Relaxed)
    }

    /// Moves the notes so far to the end of `into`.
    pub(super) fn collect(&self, into: &mut Vec<Note<P>>) {
        if self.has_notes() && self.full.swap(false, Ordering::Acquire) {
            into.append(&mut self.lock());
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Note<P>>> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A task's obligation to say how its wait ended.
struct Promise<P> {
    ticket: Ticket,
    inbox: Option<Arc<Inbox<P>>>,
}

impl<P> Promise<P> {
    fn keep(mut self, pins: P) {
        if let Some(inbox) = self.inbox.take() {
            inbox.post(Note::Ready(self.ticket, pins));
        }
    }
}

impl<P> Drop for Promise<P> {
    fn drop(&mut self) {
        if let Some(inbox) = self.inbox.take() {
            inbox.post(Note::Lost(self.ticket));
        }
    }
}
