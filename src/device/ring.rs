//! A virtqueue as the VMM sets it up, starts, stops and starts again.
//!
//! A ring works when the VMM has given it addresses and a kick, and enabled it, in whatever order.
//! While it works its state is with its thread; `halt` ends the thread and takes the state back. If
//! the ring is then started at exactly the place where it stood (the VM was paused, `stop` and
//! `cont`), the requests it holds are still the guest's and are answered when they can be. If it is
//! started anywhere else, its driver has begun anew, and they are forgotten. A ring that starts for
//! the first time on its connection may have had a life before: the record of requests in flight
//! (`inflight`) says which chains are still to be answered.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};

use super::Serve;
use super::counters::Complaint;
use super::held::HeldTable;
use super::inflight::{Found, Inflight, Record};
use super::memory::Memory;
use super::queue::{Kick, Order, Shared, Worker};
use super::split::{Parts, SplitRing};
use super::state::RingState;

/// Longest ring we take, in descriptors.
pub(super) const MAX_SIZE: u16 = 1024;

/// Addresses of a ring's three parts, as the VMM names them: in its own address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Addresses {
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
}

/// Where exactly a ring stands. A ring that holds requests has given back fewer than it has taken;
/// a fresh ring has not: so one never passes for the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    size: u16,
    /// Guest-physical addresses of the three parts.
    parts: [u64; 3],
    next_avail: u16,
    next_used: u16,
}

impl Place {
    fn of(ring: &SplitRing) -> Place {
        Place {
            size: ring.size(),
            parts: ring.addresses(),
            next_avail: ring.next_avail(),
            next_used: ring.next_used(),
        }
    }
}

/// What a thread returns of its ring.
type Remains<S> = (SplitRing, HeldTable<<S as Serve>::Request>);

enum State<S: Serve> {
    /// `held` belongs to the ring as it stood at `place`.
    Idle {
        held: HeldTable<S::Request>,
        place: Option<Place>,
    },
    Working(Thread<S>),
}

struct Thread<S: Serve> {
    order: Arc<Order>,
    remains: Receiver<Remains<S>>,
    handle: JoinHandle<()>,
}

/// One virtqueue of a connection.
pub(super) struct Ring<S: Serve> {
    shared: Arc<Shared<S>>,
    size: u16,
    addresses: Option<Addresses>,
    /// Index of the next entry of the available ring to take.
    base: u16,
    kick: Option<Kick>,
    enabled: bool,
    /// Where requests in flight are recorded, if the VMM wants that.
    inflight: Option<Arc<Inflight>>,
    /// The ring has worked on this connection: what is recorded is our own.
    has_worked: bool,
    /// What another process has held when a snapshot was made.
    before: Option<RingState>,
    state: State<S>,
}

impl<S: Serve> Ring<S> {
    /// A ring that nobody has set up.
    pub(super) fn new(shared: Arc<Shared<S>>) -> Ring<S> {
        Ring {
            shared,
            size: MAX_SIZE,
            addresses: None,
            base: 0,
            kick: None,
            enabled: false,
            inflight: None,
            has_worked: false,
            before: None,
            state: State::Idle { held: HeldTable::new(), place: None },
        }
    }

    pub(super) fn shared(&self) -> &Arc<Shared<S>> {
        &self.shared
    }

    /// Sets the number of descriptors: a power of two, at most [`MAX_SIZE`]. False if it is not.
    pub(super) fn set_size(&mut self, size: u32) -> bool {
        let Ok(size) = u16::try_from(size) else {
            return false;
        };
        if size > MAX_SIZE || !size.is_power_of_two() {
            return false;
        }
        if size != self.size {
            self.halt();
            self.size = size;
        }
        true
    }

    pub(super) fn set_addresses(&mut self, addresses: Addresses) {
        // A VMM that begins or ends migration repeats the addresses of working rings.
        if self.addresses != Some(addresses) {
            self.halt();
            self.addresses = Some(addresses);
        }
    }

    /// Sets the index of the next available entry to take.
    pub(super) fn set_base(&mut self, base: u16) {
        self.halt();
        self.base = base;
    }

    pub(super) fn set_kick(&mut self, kick: Kick) {
        self.halt();
        self.kick = Some(kick);
    }

    /// What the ring holds, if it stands still and holds anything.
    pub(super) fn held(&self) -> Option<RingState> {
        let State::Idle { held, place: Some(place) } = &self.state else { return None };
        let heads = held.heads();
        let ring = RingState { index: self.shared.index, used: place.next_used, heads };
        (!ring.heads.is_empty()).then_some(ring)
    }

    /// Takes over what another process has held.
    pub(super) fn set_before(&mut self, before: RingState) {
        self.before = Some(before);
    }

    /// Records requests in flight there from now on.
    pub(super) fn set_inflight(&mut self, inflight: Arc<Inflight>) {
        self.halt();
        self.inflight = Some(inflight);
    }

    /// Lets the ring work, or pauses it: nothing is taken or answered, and nothing is lost.
    pub(super) fn set_enabled(&mut self, enabled: bool) {
        if !enabled {
            self.halt();
        }
        self.enabled = enabled;
    }

    /// Stops the ring and returns the index of the next available entry. When this returns, nothing
    /// touches the guest's memory for this ring any more, until it is started again.
    pub(super) fn stop(&mut self) -> u16 {
        self.halt();
        self.kick = None;
        self.base
    }

    /// Back to what `new` returns, except for the descriptors to call and the record, in which
    /// nothing is written then.
    pub(super) fn reset(&mut self) {
        self.halt();
        if let State::Idle { held, .. } = &mut self.state {
            held.clear(self.shared.inbox());
        }
        let inflight = self.inflight.take();
        if let Some(record) = record(inflight.as_ref(), &self.shared, self.size) {
            record.forget();
        }
        *self = Ring { inflight, has_worked: true, ..Ring::new(Arc::clone(&self.shared)) };
    }

    /// Starts the ring's thread if everything it needs is there.
    pub(super) fn start(&mut self, event_idx: bool) {
        let (Some(addresses), Some(kick), true) = (self.addresses, &self.kick, self.enabled) else {
            return;
        };
        let State::Idle { held, place } = &mut self.state else {
            return;
        };
        let memory = self.shared.memory.load();
        if memory.generation() == 0 {
            return;
        }
        let Some(mut queue) = prepare(&memory, self.size, addresses, self.base, event_idx) else {
            let what = "the ring is not started: it is outside the guest's memory";
            self.shared.complain_ring(Complaint::Ring, &what);
            return;
        };
        let mut held = std::mem::replace(held, HeldTable::new());
        let mut record = record(self.inflight.as_ref(), &self.shared, self.size);
        if *place != Some(Place::of(&queue)) {
            held.clear(self.shared.inbox());
            if !self.has_worked {
                let before = self.before.take();
                held = recovered(&mut queue, &memory, record.as_ref(), before, &self.shared);
            }
        }
        if let Some(record) = &mut record {
            record.begin(queue.next_used(), &held.heads());
            record.keep_agreed(self.shared.service.agreed());
        }
        let (order, kick) = (Arc::<Order>::default(), kick.clone());
        let (send, remains) = bounded(1);
        let shared = Arc::clone(&self.shared);
        let worker = Worker::new(shared, Arc::clone(&order), queue, held, record);
        let spawned = std::thread::Builder::new()
            .name(format!("vq{}", self.shared.index))
            .spawn(move || drop(send.send(worker.run(&kick))));
        match spawned {
            Ok(handle) => {
                self.has_worked = true;
                self.state = State::Working(Thread { order, remains, handle });
            }
            // Tried again with the next message that concerns the ring.
            Err(e) => log::error!("queue {}: starting its thread: {e}", self.shared.index),
        }
    }

    /// Whether the ring has a thread.
    pub(super) fn is_working(&self) -> bool {
        matches!(self.state, State::Working(_))
    }

    /// Asks the ring's thread to end, without waiting for it.
    pub(super) fn ask_to_halt(&self) {
        if let State::Working(thread) = &self.state {
            thread.order.halt();
            self.shared.inbox().wake();
        }
    }

    /// Ends the ring's thread. A service never waits, so this takes as long as one request.
    fn halt(&mut self) {
        /// Only a disk that hangs in the middle of a read takes longer.
        const LIMIT: Duration = Duration::from_secs(5);
        self.halt_until(Instant::now() + LIMIT);
    }

    /// Ends the ring's thread, or gives up waiting for it at `deadline`: then it ends on its own as
    /// soon as it can, and what the ring held is lost.
    pub(super) fn halt_until(&mut self, deadline: Instant) {
        self.ask_to_halt();
        let idle = State::Idle { held: HeldTable::new(), place: None };
        let thread = match std::mem::replace(&mut self.state, idle) {
            State::Working(thread) => thread,
            idle @ State::Idle { .. } => {
                self.state = idle;
                return;
            }
        };
        match thread.remains.recv_deadline(deadline) {
            Ok((queue, held)) => {
                self.base = queue.next_avail();
                self.state = State::Idle { held, place: Some(Place::of(&queue)) };
            }
            Err(RecvTimeoutError::Timeout) => {
                thread.order.abandon();
                log::error!("queue {}: its thread hangs in a request", self.shared.index);
                return;
            }
            Err(RecvTimeoutError::Disconnected) => {}
        }
        if thread.handle.join().is_err() {
            log::error!("queue {}: its thread panicked", self.shared.index);
        }
    }
}

/// A ring's part of the record.
fn record<S: Serve>(
    inflight: Option<&Arc<Inflight>>,
    shared: &Shared<S>,
    size: u16,
) -> Option<Record> {
    let record = Record::of(inflight?, shared.index, size);
    if record.is_none() {
        log::warn!("queue {}: no room in the record of requests in flight", shared.index);
    }
    record
}

/// What the device that served the ring before has left unanswered, and `ring` behind it: as the
/// record says or, if there is none, a snapshot.
fn recovered<S: Serve>(
    ring: &mut SplitRing,
    memory: &Memory,
    record: Option<&Record>,
    before: Option<RingState>,
    shared: &Shared<S>,
) -> HeldTable<S::Request> {
    let used = ring.next_used();
    let parts = ring.parts(memory);
    let Some(view) = parts.as_ref().and_then(Parts::view) else { return HeldTable::new() };
    let avail = view.available_index();
    let found = match (record.map_or(Found::Nothing, |record| record.find(used, avail)), before) {
        (Found::Nothing, Some(before)) => {
            let outstanding = usize::from(avail.wrapping_sub(used));
            let exist = before.heads.iter().all(|head| *head < ring.size());
            if exist && before.used == used && before.heads.len() <= outstanding {
                Found::Heads(before.heads)
            } else {
                Found::Stale
            }
        }
        (found, _) => found,
    };
    match found {
        Found::Nothing => HeldTable::new(),
        Found::Stale => {
            log::warn!(
                "queue {}: the record of requests in flight is of another ring",
                shared.index
            );
            HeldTable::new()
        }
        Found::Heads(heads) => {
            log::info!(
                "queue {}: {} requests in flight are served again",
                shared.index,
                heads.len()
            );
            // Some VMMs say where the driver is, which may be ahead of what has been taken.
            let taken = u16::try_from(heads.len()).unwrap_or_default();
            ring.set_next_avail(used.wrapping_add(taken));
            // The last answers may not have been announced.
            shared.signal();
            HeldTable::of_heads(heads)
        }
    }
}

/// Puts a queue together. `None` if it is not in the guest's memory, as the VMM described it.
fn prepare(
    memory: &Memory,
    size: u16,
    addresses: Addresses,
    base: u16,
    event_idx: bool,
) -> Option<SplitRing> {
    let part = |addr| memory.guest_addr(addr);
    let parts = [part(addresses.descriptors)?, part(addresses.available)?, part(addresses.used)?];
    let mut ring = SplitRing::new(size, parts, event_idx, base)?;
    let found = ring.parts(memory)?;
    ring.resume_used(&found.view()?);
    Some(ring)
}
