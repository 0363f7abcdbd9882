//! A virtqueue at work: takes chains out of the available ring, has them served, gives them back.
//!
//! A `Worker` is the thread of a started ring. It alone touches the ring, so it needs no lock, and when
//! it has ended nobody touches the guest's memory on its behalf: a helper, which shares large requests
//! with it, ends before. It serves a chain as soon as it has taken it; chains whose answer must wait go
//! to the table of held requests, and the worker serves them again when the note comes that their wait
//! is over.
//!
//! Nothing in the guest's memory is believed. What becomes of each kind of nonsense is listed in
//! `docs/device.md`; every head that names a descriptor is given back exactly once.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::{ArcSwap, ArcSwapOption, Cache};
use rustix::event::{Timespec, epoll};
use rustix::fs::{FileType, fstat};
use tokio::runtime::Handle;
use vm_memory::VolatileSlice;

use super::chain::{Chain, Fault};
use super::counters::{Complaint, Complaints, Counters, count};
use super::held::{Held, HeldTable, Inbox, Note};
use super::helper::{Done, Helped, Job, LARGE, MOST, Places};
use super::inflight::Record;
use super::memory::Memory;
use super::parked::{Listed, ParkedRequest};
use super::polling::{BusyPoll, GAP, Polling};
use super::split::{Jump, Parts, SplitRing, View};
use super::{Outcome, Serve, Wait};

/// Chains taken before the worker looks at its inbox again.
const BATCH: u32 = 64;
/// Chains taken before one of the pile is served, if there are any.
const AHEAD: u32 = 4;
/// After so many answers or bytes of answers the guest is told at the latest: it need not wait for a
/// whole batch to get the first. Telling is a system call, and wakes a guest that sleeps.
const TELL_AFTER: (u32, u32) = (32, 512 * 1024);
/// The same while the queue polls, as then there are processors to spare. The first answer of a batch is
/// announced at once: the guest wakes up while the others are made.
const TELL_SOON_AFTER: (u32, u32) = (4, 64 * 1024);
/// How often a ring without a kick descriptor is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(1);

/// What a queue shares with the rest of its connection.
pub(super) struct Shared<S: Serve> {
    /// 0 is the queue for urgent requests.
    pub index: u16,
    pub service: Arc<S>,
    pub memory: Arc<ArcSwap<Memory>>,
    /// Inboxes of all queues of the connection, by index.
    pub inboxes: Arc<[Arc<Inbox<S::Pins>>]>,
    /// Written to when the guest should look at the used ring. Without one, the guest polls.
    pub call: ArcSwapOption<File>,
    /// Written to when the ring is broken.
    pub err: ArcSwapOption<File>,
    pub counters: Arc<Counters>,
    pub complaints: Arc<Complaints>,
    pub runtime: Handle,
    /// How long to look for the next request before sleeping.
    pub busy_poll: BusyPoll,
    /// Helpers that the queues of the connection may have.
    pub helpers: Arc<Places>,
}

impl<S: Serve> Shared<S> {
    pub(super) fn inbox(&self) -> &Arc<Inbox<S::Pins>> {
        &self.inboxes[usize::from(self.index)]
    }

    /// Tells the guest to look at the used ring.
    pub(super) fn signal(&self) {
        count(&self.counters.calls_total);
        signal(&self.call);
    }

    /// Writes down what the guest or the VMM did wrong.
    fn complain(&self, kind: Complaint, what: &dyn std::fmt::Display) {
        let counter = match kind {
            Complaint::Chain => &self.counters.bad_chains_total,
            Complaint::Request => &self.counters.bad_requests_total,
            Complaint::Head => &self.counters.bad_heads_total,
            Complaint::Index => &self.counters.bad_indexes_total,
            Complaint::Ring => &self.counters.bad_rings_total,
            Complaint::Message => &self.counters.bad_messages_total,
        };
        count(counter);
        if self.complaints.first(kind) {
            log::warn!("queue {}: {what}; more of this kind is only counted", self.index);
        }
    }

    /// The ring itself is broken: the VMM may want to know.
    pub(super) fn complain_ring(&self, kind: Complaint, what: &dyn std::fmt::Display) {
        self.complain(kind, what);
        signal(&self.err);
    }
}

fn signal(fd: &ArcSwapOption<File>) {
    if let Some(file) = &*fd.load() {
        // An error means that the VMM has gone: then its connection ends as well.
        let _ = rustix::io::write(file, &1u64.to_ne_bytes());
    }
}

/// How the worker learns that the guest has put something into the ring.
#[derive(Clone, Debug)]
pub(super) enum Kick {
    /// By an event descriptor.
    Fd(Arc<File>),
    /// Not at all: it has to look.
    Polling,
}

/// What a worker is told to do; more than one may be told, the later one counts.
#[derive(Debug, Default)]
pub(super) struct Order(AtomicU8);

impl Order {
    /// End after the request that is being served.
    pub(super) fn halt(&self) {
        self.0.fetch_max(1, Ordering::Release);
    }

    /// The ring is somebody else's from now on: do not even answer that request.
    pub(super) fn abandon(&self) {
        self.0.fetch_max(2, Ordering::Release);
    }

    fn to_halt(&self) -> bool {
        self.0.load(Ordering::Acquire) >= 1
    }

    fn to_abandon(&self) -> bool {
        self.0.load(Ordering::Relaxed) == 2
    }
}

/// The thread of a started ring.
pub(super) struct Worker<S: Serve> {
    shared: Arc<Shared<S>>,
    order: Arc<Order>,
    ring: SplitRing,
    held: HeldTable<S::Request>,
    /// Where the chains that are taken and not given back are noted, if the VMM wants that.
    record: Option<Record>,
    /// Generation of the memory in which the ring was last not found.
    checked: Option<u64>,
    /// Where the ring stood before an available index that could not be.
    jumped_from: Option<u16>,
    /// When to look for the next request instead of sleeping.
    polling: Polling,
    /// Large requests that are being served by this thread and another one.
    helped: Helped<S>,
    /// Reused for what the other one has served.
    done: Vec<Done<S>>,
    /// Since when there has been nothing to do, if the worker has slept meanwhile.
    idle_since: Option<Instant>,
    /// Answers given back since the guest was last told.
    unsignalled: u32,
    /// Their length, in bytes.
    unsignalled_bytes: u32,
    /// Reused for each request; behind its bytes are those of earlier ones.
    bytes: Vec<u8>,
    notes: Vec<Note<S::Pins>>,
    no_pins: S::Pins,
}

impl<S: Serve> Worker<S> {
    /// A worker for `ring`, which need not lie in the guest's memory, and for the requests of this
    /// ring that were held when it last stopped; `record` says that these are in flight and no
    /// others.
    pub(super) fn new(
        shared: Arc<Shared<S>>,
        order: Arc<Order>,
        ring: SplitRing,
        held: HeldTable<S::Request>,
        record: Option<Record>,
    ) -> Self {
        Worker {
            polling: Polling::new(shared.busy_poll),
            helped: Helped::new(Arc::clone(&shared)),
            done: Vec::new(),
            idle_since: None,
            shared,
            order,
            ring,
            held,
            record,
            checked: None,
            jumped_from: None,
            unsignalled: 0,
            unsignalled_bytes: 0,
            bytes: Vec::new(),
            notes: Vec::new(),
            no_pins: S::Pins::default(),
        }
    }

    /// Works until it is told to halt and the inbox wakes it; then returns what is needed to go on
    /// later.
    pub(super) fn run(mut self, kick: &Kick) -> (SplitRing, HeldTable<S::Request>) {
        let shared = Arc::clone(&self.shared);
        shared.service.enter(shared.index);
        let mut doorbell = match Doorbell::new(kick, shared.inbox().wake_fd()) {
            Ok(doorbell) => Some(doorbell),
            Err(e) => {
                log::error!("queue {}: polling instead of waiting: {e}", shared.index);
                None
            }
        };
        let mut memory = Cache::new(Arc::clone(&shared.memory));
        while !self.order.to_halt() {
            if self.turn(memory.load()) {
                continue;
            }
            if self.polling.learns() && self.idle_since.is_none() {
                self.idle_since = Some(Instant::now());
            }
            match &mut doorbell {
                Some(doorbell) => doorbell.wait(),
                None => std::thread::sleep(POLL_INTERVAL),
            }
        }
        self.end_helped(memory.load());
        (self.ring, self.held)
    }

    /// Serves what is there, up to a batch. False if there is nothing more to do before the doorbell
    /// rings.
    fn turn(&mut self, memory: &Arc<Memory>) -> bool {
        let parts = self.ring.parts(memory);
        let view = parts.as_ref().and_then(Parts::view);
        let Some(view) = self.check(memory, view) else { return false };
        self.learn(&view);
        self.read_notes(&view);
        while let Some(head) = self.held.next_again() {
            self.serve(&view, memory, head);
        }
        self.ring.disable_kicks(&view);
        let eager = !self.polling.window().is_zero();
        let (answers, bytes) = if eager { TELL_SOON_AFTER } else { TELL_AFTER };
        let mut most = if eager { 1 } else { answers };
        let (mut taken, mut since_helped) = (0, 0);
        let end = loop {
            if taken >= BATCH || self.order.to_halt() {
                break End::Batch;
            }
            self.collect_helped(&view);
            let room = self.held.len() + self.helped.out() < usize::from(self.ring.size());
            let popped = match room && since_helped < AHEAD {
                true => self.pop(&view),
                false => Popped::Nothing,
            };
            match popped {
                Popped::Head(head) => {
                    if let Some(record) = &mut self.record {
                        record.taken(head);
                    }
                    self.serve(&view, memory, head);
                    taken += 1;
                    since_helped += u32::from(self.helped.out() > 0);
                }
                Popped::Nonsense => taken += 1,
                Popped::Nothing if self.serve_helped(&view) || since_helped > 0 => since_helped = 0,
                Popped::Nothing if room => break End::Drained,
                Popped::Nothing => break End::Full,
            }
            if self.unsignalled >= most || self.unsignalled_bytes >= bytes {
                most = answers;
                self.signal(&view);
            }
        };
        self.signal(&view);
        if taken > 0 {
            let requests = &self.shared.counters.requests_total;
            requests.fetch_add(u64::from(taken), Ordering::Relaxed);
        }
        match end {
            End::Batch => true,
            // The next note or the helper wakes us.
            End::Full => false,
            // The guest may have added something before it could see that we want to be told again.
            End::Drained => self.linger(&view) || self.ring.enable_kicks(&view),
        }
    }

    /// Whether there is something to do.
    fn has_work(&self, view: &View<'_>) -> bool {
        self.ring.has_more(view) || self.shared.inbox().has_notes() || self.helped.has_done()
    }

    /// Takes note of how long the worker has slept, when that has brought something.
    fn learn(&mut self, view: &View<'_>) {
        if let Some(since) = self.idle_since
            && self.has_work(view)
        {
            let now = Instant::now();
            self.polling.slept(now - since, now);
            self.idle_since = None;
        }
    }

    /// Looks for something to do for as long as the ring is to be polled; the guest need not kick
    /// meanwhile. False if nothing came.
    fn linger(&mut self, view: &View<'_>) -> bool {
        /// Looks at the ring between two looks at the clock.
        const LOOKS: u32 = 64;
        let window = self.polling.window();
        if window.is_zero() {
            return false;
        }
        let begin = Instant::now();
        let mut last = begin;
        let mut processor_time: Option<(Instant, Duration)> = None;
        let found = loop {
            let found = (0..LOOKS).any(|_| {
                std::hint::spin_loop();
                self.has_work(view) || self.order.to_halt()
            });
            let now = Instant::now();
            if now - last >= GAP
                && let Some((since, used)) = processor_time
                && (now - since).saturating_sub(thread_time() - used) >= GAP
            {
                self.polling.lost_processor(now);
                break found;
            }
            if found || now - begin >= window {
                break found;
            }
            if processor_time.is_none() && self.polling.learns() {
                processor_time = Some((now, thread_time()));
            }
            last = now;
            // Whoever we have just called may have been woken on this very processor.
            std::thread::yield_now();
        };
        if found {
            self.polling.found();
            count(&self.shared.counters.poll_hits_total);
        } else {
            self.idle_since = self.polling.learns().then_some(begin);
            count(&self.shared.counters.poll_misses_total);
        }
        found
    }

    /// Complains, once for each memory, if the ring is not in it.
    fn check<'p>(&mut self, memory: &Memory, view: Option<View<'p>>) -> Option<View<'p>> {
        if view.is_none() && self.checked != Some(memory.generation()) {
            self.checked = Some(memory.generation());
            self.shared.complain_ring(Complaint::Ring, &"the ring is outside the guest's memory");
        }
        view
    }

    /// Takes the next chain.
    fn pop(&mut self, view: &View<'_>) -> Popped {
        if let Some(old) = self.jumped_from {
            self.settle_jump(view, old);
        }
        match self.ring.pop(view) {
            Ok(Some(head)) if head < self.ring.size() => Popped::Head(head),
            Ok(Some(_)) => {
                self.shared.complain(Complaint::Head, &"an available entry names no descriptor");
                Popped::Nonsense
            }
            Ok(None) => Popped::Nothing,
            Err(Jump(index)) => {
                self.follow_jump(index);
                Popped::Nothing
            }
        }
    }

    /// The available index is further ahead than the queue is long, so what the ring says between
    /// here and there was never meant, and nothing of it is taken.
    #[cold]
    fn follow_jump(&mut self, index: u16) {
        self.jumped_from = Some(self.ring.next_avail());
        self.ring.set_next_avail(index);
        self.shared.complain_ring(
            Complaint::Index,
            &"the available index is ahead by more than the queue's size",
        );
    }

    /// After a jump the guest may go on from the new place or return to the old one: it is at the
    /// one that its next request is closer to.
    #[cold]
    fn settle_jump(&mut self, view: &View<'_>, old: u16) {
        let index = view.available_index();
        let beyond_new = index.wrapping_sub(self.ring.next_avail());
        let beyond_old = index.wrapping_sub(old);
        if beyond_new == 0 {
            return;
        }
        self.jumped_from = None;
        if beyond_old <= self.ring.size() && beyond_old < beyond_new {
            self.ring.set_next_avail(old);
        }
    }

    /// Serves the chain that begins at `head`.
    fn serve(&mut self, view: &View<'_>, memory: &Arc<Memory>, head: u16) {
        let chain = Chain::walk(head, &view.descriptors, memory);
        let (len, unread) = chain.copy_readable(memory, &mut self.bytes, S::MAX_REQUEST_LEN);
        let (reply, unwritable) = chain.writable_slices(memory);
        if let Some(fault) = chain.fault().or(unread).or(unwritable) {
            return self.refuse_chain(view, &chain, len, fault, &reply);
        }
        let request = match self.shared.service.parse(&self.bytes[..len]) {
            Ok(request) => request,
            Err(errno) => {
                self.shared.complain(Complaint::Request, &"a request that makes no sense");
                let len = self.shared.service.refuse(&self.bytes[..len], errno, &reply);
                return self.give_back(view, &chain, len);
            }
        };
        if chain.writable_len() >= LARGE && self.may_share(view) {
            return self.helped.give(Job { chain, request, memory: Arc::clone(memory) });
        }
        match handle(&*self.shared, &request, &reply, &self.no_pins) {
            Outcome::Wait(wait) => {
                self.park(Job { chain, request, memory: Arc::clone(memory) }, wait)
            }
            outcome => self.finish(view, &chain, outcome),
        }
    }

    /// Holds a request that was served for the first time.
    fn park(&mut self, job: Job<S::Request>, wait: Wait<S::Pins>) {
        let Job { chain, request, memory } = job;
        let (nodeid, opcode) = S::subject(&request);
        let (unique, since) = (S::unique(&request), SystemTime::now());
        let parked = ParkedRequest { nodeid, opcode, unique, since };
        let _listed = Listed::new(&self.shared.counters, parked);
        self.hold(Held { unique, _listed, chain, request, memory }, wait);
    }

    /// Whether a large request may go to the pile: there are others, and processors to spare.
    fn may_share(&self, view: &View<'_>) -> bool {
        let out = self.helped.out();
        (out > 0 || self.ring.has_more(view))
            && out < MOST
            && self.shared.helpers.any()
            && !self.polling.paused()
    }

    /// Serves the oldest request of the pile that nobody has begun. False if there is none.
    fn serve_helped(&mut self, view: &View<'_>) -> bool {
        let Some(job) = self.helped.take() else { return false };
        let done = job.serve(&self.shared, &self.no_pins);
        self.settle(view, done);
        true
    }

    /// Gives back what the helper has served.
    fn collect_helped(&mut self, view: &View<'_>) {
        if !self.helped.has_done() {
            return;
        }
        let mut done = std::mem::take(&mut self.done);
        self.helped.collect(&mut done);
        done.drain(..).for_each(|done| self.settle(view, done));
        self.done = done;
        if self.helped.lost_processor() {
            self.polling.lost_processor(Instant::now());
        }
    }

    fn settle(&mut self, view: &View<'_>, done: Done<S>) {
        match done.outcome {
            Outcome::Wait(wait) => self.park(done.job, wait),
            outcome => self.finish(view, &done.job.chain, outcome),
        }
    }

    /// Leaves nothing on the pile and nothing with the helper, which ends.
    fn end_helped(&mut self, memory: &Memory) {
        if self.helped.out() == 0 {
            return self.helped.end();
        }
        let parts = self.ring.parts(memory);
        let view = parts.as_ref().and_then(Parts::view);
        while let (Some(view), false) = (&view, self.order.to_abandon()) {
            if !self.serve_helped(view) {
                break;
            }
        }
        self.helped.end();
        if let Some(view) = &view {
            self.collect_helped(view);
            self.signal(view);
        }
        // The ring is not in the guest's memory now: if it comes back, they are served from the start.
        for chain in self.helped.rest() {
            self.held.serve_again(chain.head());
        }
    }

    #[cold]
    fn refuse_chain(
        &mut self,
        view: &View<'_>,
        chain: &Chain,
        len: usize,
        fault: Fault,
        reply: &[VolatileSlice<'_>],
    ) {
        self.shared.complain(Complaint::Chain, &fault);
        let service = &self.shared.service;
        let len = service.refuse(&self.bytes[..len], libc::EIO, reply);
        self.give_back(view, chain, len);
    }

    /// Serves or ends held requests, as the notes say. `view` is where the ring is now; the requests'
    /// own buffers are where they were when they came.
    fn read_notes(&mut self, view: &View<'_>) {
        if !self.shared.inbox().has_notes() {
            return;
        }
        let shared = Arc::clone(&self.shared);
        let mut notes = std::mem::take(&mut self.notes);
        shared.inbox().collect(&mut notes);
        for note in notes.drain(..) {
            match note {
                Note::Ready(ticket, pins) => {
                    if let Some(held) = self.held.take(ticket, shared.inbox()) {
                        self.resume(view, held, &pins);
                    }
                }
                Note::Lost(ticket) => {
                    if let Some(held) = self.held.take(ticket, shared.inbox()) {
                        count(&shared.counters.held_lost_total);
                        log::error!(
                            "queue {}: request {}: its wait broke off",
                            shared.index,
                            held.unique
                        );
                        self.end(view, &held, libc::EIO);
                    }
                }
                Note::Interrupt(unique) => {
                    if let Some(held) = self.held.interrupt(unique, shared.inbox()) {
                        self.end(view, &held, libc::EINTR);
                    }
                }
            }
        }
        self.notes = notes;
    }

    /// Serves a request again whose wait is over.
    fn resume(&mut self, view: &View<'_>, held: Held<S::Request>, pins: &S::Pins) {
        let memory = Arc::clone(&held.memory);
        let (reply, _) = held.chain.writable_slices(&memory);
        match handle(&*self.shared, &held.request, &reply, pins) {
            Outcome::Wait(wait) => self.hold(held, wait),
            outcome => self.finish(view, &held.chain, outcome),
        }
    }

    /// Answers a held request with an error.
    fn end(&mut self, view: &View<'_>, held: &Held<S::Request>, errno: i32) {
        let (reply, _) = held.chain.writable_slices(&held.memory);
        let len = self.shared.service.error(held.unique, errno, &reply);
        self.give_back(view, &held.chain, len);
    }

    fn hold(&mut self, held: Held<S::Request>, wait: Wait<S::Pins>) {
        count(&self.shared.counters.held_total);
        self.held.hold(held, wait, self.shared.inbox(), &self.shared.runtime);
    }

    /// Gives back a request that has been served.
    fn finish(&mut self, view: &View<'_>, chain: &Chain, outcome: Outcome<S::Pins>) {
        let len = match outcome {
            Outcome::Reply(len) => len.min(chain.writable_len()),
            Outcome::NoReply | Outcome::Wait(_) => 0,
            Outcome::Interrupt(unique) => {
                for inbox in self.shared.inboxes.iter() {
                    inbox.interrupt(unique);
                }
                0
            }
        };
        self.give_back(view, chain, len);
    }

    /// Puts a chain into the used ring, with the number of bytes that were written to it.
    fn give_back(&mut self, view: &View<'_>, chain: &Chain, len: u32) {
        let head = chain.head();
        if self.order.to_abandon() {
            return;
        }
        if let Some(record) = &self.record {
            record.keep_agreed(self.shared.service.agreed());
            record.giving(head, self.ring.next_used());
        }
        self.ring.give_back(view, head, len);
        if let Some(record) = &self.record {
            record.given(head, self.ring.next_used());
        }
        self.unsignalled += 1;
        self.unsignalled_bytes = self.unsignalled_bytes.saturating_add(len);
    }

    /// Tells the guest about answers it has not been told of, if it wants to know.
    fn signal(&mut self, view: &View<'_>) {
        if self.unsignalled == 0 {
            return;
        }
        self.unsignalled = 0;
        self.unsignalled_bytes = 0;
        if self.ring.wants_call(view) {
            self.shared.signal();
        }
    }
}

/// Processor time of the calling thread.
pub(super) fn thread_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

/// Why a turn is over.
enum End {
    /// There may be more.
    Batch,
    Drained,
    /// As many requests are held as the ring has descriptors. Only a guest that reuses descriptors
    /// before it gets them back can have more.
    Full,
}

/// What the available ring had to offer.
enum Popped {
    /// A chain to follow, by a head that can be given back.
    Head(u16),
    /// An entry that cannot be given back.
    Nonsense,
    Nothing,
}

/// Has the service carry out a request. A panic there is one failed request, not a dead queue.
pub(super) fn handle<S: Serve>(
    shared: &Shared<S>,
    request: &S::Request,
    reply: &[VolatileSlice<'_>],
    pins: &S::Pins,
) -> Outcome<S::Pins> {
    let service = &*shared.service;
    catch_unwind(AssertUnwindSafe(|| service.handle(request, reply, pins))).unwrap_or_else(|_| {
        count(&shared.counters.panics_total);
        let unique = S::unique(request);
        log::error!("queue {}: request {unique}: panicked", shared.index);
        Outcome::Reply(service.error(unique, libc::EIO, reply))
    })
}

/// Sleeps until the guest or the inbox wants something.
struct Doorbell {
    epoll: OwnedFd,
    /// A kick that is no eventfd is emptied, so that it never fills up. An eventfd counts further
    /// for longer than any guest lives, and each count is an edge: reading it would be a system
    /// call for nothing.
    drain: Option<Arc<File>>,
    timeout: Option<Timespec>,
}

const KICK: u64 = 0;
const WAKE: u64 = 1;

impl Doorbell {
    fn new(kick: &Kick, wake: BorrowedFd<'_>) -> std::io::Result<Doorbell> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let edge = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&epoll, wake, epoll::EventData::new_u64(WAKE), edge)?;
        let mut doorbell =
            Doorbell { epoll, drain: None, timeout: Timespec::try_from(POLL_INTERVAL).ok() };
        let Kick::Fd(file) = kick else {
            return Ok(doorbell);
        };
        match epoll::add(&doorbell.epoll, file, epoll::EventData::new_u64(KICK), edge) {
            Ok(()) => doorbell.timeout = None,
            // Something that cannot be waited for, such as a regular file.
            Err(e) => log::warn!("kick descriptor: polling instead of waiting: {e}"),
        }
        let kind = FileType::from_raw_mode(fstat(file)?.st_mode);
        if matches!(kind, FileType::Fifo | FileType::Socket) {
            doorbell.drain = Some(Arc::clone(file));
        }
        Ok(doorbell)
    }

    fn wait(&mut self) {
        let mut events = [const {
            epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }
        }; 2];
        // Interrupted by a signal or not: the worker looks at everything anyway.
        let woken = epoll::wait(&self.epoll, &mut events, self.timeout.as_ref()).unwrap_or(0);
        if let Some(file) = &self.drain
            && events[..woken].iter().any(|e| e.data.u64() == KICK)
        {
            let _ = rustix::io::read(file.as_fd(), &mut [0u8; 4096]);
        }
    }
}
