//! A split virtqueue as its device sees it (virtio 1.3, §2.7): which heads are available, which have
//! been given back, and who wants to be told.
//!
//! A [`SplitRing`] is what the VMM said of a ring and where it stands. [`Parts`] is where its areas
//! lie on the host, looked up once for many requests; a [`View`] of them is how they are used. What
//! the guest writes is read once, whole, and any value of it is safe.

use std::num::Wrapping;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use virtio_bindings::bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestAddress, VolatileArrayRef, VolatileMemory, VolatileSlice};

use super::memory::Memory;

/// Bytes before the entries of both rings: flags and index.
const RING_HEADER: usize = 4;
/// Bytes of a descriptor.
pub(super) const DESCRIPTOR: usize = size_of::<Descriptor>();
const _: () = assert!(DESCRIPTOR == 16);

/// A ring as the VMM describes it, and its place in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SplitRing {
    /// Descriptors: a power of two, at most 32768.
    size: u16,
    /// Where the descriptor table, the available and the used ring begin.
    parts: [GuestAddress; 3],
    event_idx: bool,
    /// The next entry of the available ring to take.
    next_avail: Wrapping<u16>,
    /// The available index as it was last read: what lies before it may be taken.
    seen: Wrapping<u16>,
    /// The next entry of the used ring to write.
    next_used: Wrapping<u16>,
    /// What `next_used` was when it was last asked whether the guest wants to be told.
    asked: Wrapping<u16>,
}

/// The available index is further ahead than the ring is long: the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Jump(pub u16);

impl SplitRing {
    /// A ring of `size` descriptors whose entry `next_avail` is the next to take. `None` if the size is
    /// not a power of two, or a part is not aligned as it must be.
    pub(super) fn new(
        size: u16,
        parts: [GuestAddress; 3],
        event_idx: bool,
        next_avail: u16,
    ) -> Option<SplitRing> {
        let aligned = parts.iter().zip([16, 2, 4]).all(|(part, to)| part.0 % to == 0);
        let next = Wrapping(next_avail);
        let ring = SplitRing {
            size,
            parts,
            event_idx,
            next_avail: next,
            seen: next,
            next_used: Wrapping(0),
            asked: Wrapping(0),
        };
        (aligned && size.is_power_of_two()).then_some(ring)
    }

    /// Where the ring lies in `memory`; `None` if some part of it does not, or crosses regions.
    pub(super) fn parts<'m>(&self, memory: &'m Memory) -> Option<Parts<'m>> {
        let (size, [descriptors, available, used]) = (usize::from(self.size), self.parts);
        Some(Parts {
            size,
            descriptors: memory.slice(descriptors, size * DESCRIPTOR)?,
            available: memory.slice(available, RING_HEADER + 2 * size + 2)?,
            used: memory.slice(used, RING_HEADER + 8 * size + 2)?,
        })
    }

    /// Goes on giving back where the ring's memory says that giving back ended.
    pub(super) fn resume_used(&mut self, view: &View<'_>) {
        self.next_used = Wrapping(u16::from_le(view.used_index.load(Ordering::Acquire)));
        self.asked = self.next_used;
    }

    /// Descriptors.
    pub(super) fn size(&self) -> u16 {
        self.size
    }

    /// Where the three parts begin, in guest-physical memory.
    pub(super) fn addresses(&self) -> [u64; 3] {
        self.parts.map(|part| part.0)
    }

    /// The entry of the available ring that is taken next.
    pub(super) fn next_avail(&self) -> u16 {
        self.next_avail.0
    }

    /// The entry of the used ring that is written next.
    pub(super) fn next_used(&self) -> u16 {
        self.next_used.0
    }

    /// Goes on taking at another entry.
    pub(super) fn set_next_avail(&mut self, next: u16) {
        self.next_avail = Wrapping(next);
        self.seen = self.next_avail;
    }

    /// Takes the next head; it may be any number. `None`: there is nothing to take.
    pub(super) fn pop(&mut self, view: &View<'_>) -> Result<Option<u16>, Jump> {
        if self.next_avail == self.seen {
            let index = Wrapping(view.available_index());
            if (index - self.next_avail).0 > self.size {
                return Err(Jump(index.0));
            }
            if index == self.next_avail {
                return Ok(None);
            }
            self.seen = index;
        }
        let entry = view.heads.load(usize::from(self.next_avail.0 & (self.size - 1)));
        self.next_avail += 1;
        Ok(Some(u16::from_le(entry)))
    }

    /// Gives back `head`, which is below the ring's size, with `len` bytes written.
    pub(super) fn give_back(&mut self, view: &View<'_>, head: u16, len: u32) {
        let element = (u64::from(head) | u64::from(len) << 32).to_le();
        view.used.store(usize::from(self.next_used.0 & (self.size - 1)), element);
        self.next_used += 1;
        view.used_index.store(self.next_used.0.to_le(), Ordering::Release);
    }

    /// Whether something has come that was not taken, without a word to the guest.
    pub(super) fn has_more(&self, view: &View<'_>) -> bool {
        self.next_avail != self.seen || Wrapping(view.available_index()) != self.next_avail
    }

    /// Asks not to be kicked for what comes.
    pub(super) fn disable_kicks(&self, view: &View<'_>) {
        // With EVENT_IDX one kick is all that was asked for.
        if !self.event_idx {
            view.set_used_flags(VRING_USED_F_NO_NOTIFY);
        }
    }

    /// Asks to be kicked for the next request. True if it has come already.
    pub(super) fn enable_kicks(&self, view: &View<'_>) -> bool {
        match self.event_idx {
            true => view.avail_event.store(self.next_avail.0.to_le(), Ordering::Relaxed),
            false => view.set_used_flags(0),
        }
        // The guest could not see that we want to be told before this is over.
        fence(Ordering::SeqCst);
        self.has_more(view)
    }

    /// Whether the guest wants to be told of what was given back since this was last asked.
    pub(super) fn wants_call(&mut self, view: &View<'_>) -> bool {
        // Between the answers and what the guest last said.
        fence(Ordering::SeqCst);
        let told = std::mem::replace(&mut self.asked, self.next_used);
        if !self.event_idx {
            let flags = u16::from_le(view.available_flags.load(Ordering::Relaxed));
            return u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0;
        }
        let event = Wrapping(u16::from_le(view.used_event.load(Ordering::Relaxed)));
        self.next_used - event - Wrapping(1) < self.next_used - told
    }
}

/// The three areas of a ring in the host's memory.
pub(super) struct Parts<'m> {
    size: usize,
    descriptors: VolatileSlice<'m>,
    available: VolatileSlice<'m>,
    used: VolatileSlice<'m>,
}

/// A ring's fields, each checked to be there.
pub(super) struct View<'p> {
    pub(super) descriptors: VolatileArrayRef<'p, Descriptor>,
    available_flags: &'p AtomicU16,
    available_index: &'p AtomicU16,
    heads: VolatileArrayRef<'p, u16>,
    used_event: &'p AtomicU16,
    used_flags: &'p AtomicU16,
    used_index: &'p AtomicU16,
    used: VolatileArrayRef<'p, u64>,
    avail_event: &'p AtomicU16,
}

impl Parts<'_> {
    /// `None` if the host's address of a field is not aligned: then a region of the guest's memory is
    /// not, which no VMM does.
    pub(super) fn view(&self) -> Option<View<'_>> {
        let Parts { size, descriptors, available, used } = self;
        Some(View {
            descriptors: descriptors.get_array_ref(0, *size).ok()?,
            available_flags: available.get_atomic_ref(0).ok()?,
            available_index: available.get_atomic_ref(2).ok()?,
            heads: available.get_array_ref(RING_HEADER, *size).ok()?,
            used_event: available.get_atomic_ref(RING_HEADER + 2 * size).ok()?,
            used_flags: used.get_atomic_ref(0).ok()?,
            used_index: used.get_atomic_ref(2).ok()?,
            used: used.get_array_ref(RING_HEADER, *size).ok()?,
            avail_event: used.get_atomic_ref(RING_HEADER + 8 * size).ok()?,
        })
    }
}

impl View<'_> {
    /// Behind the last entry that the guest has made available.
    pub(super) fn available_index(&self) -> u16 {
        u16::from_le(self.available_index.load(Ordering::Acquire))
    }

    fn set_used_flags(&self, flags: u32) {
        let flags = u16::try_from(flags).expect("flags have 16 bits");
        self.used_flags.store(flags.to_le(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::Placement;
    use super::*;

    const AVAILABLE: u64 = 0x1000;
    const USED: u64 = 0x2000;

    /// A page for each part of a ring of four.
    fn memory() -> Memory {
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x3000).unwrap();
        let placement = Placement { guest_addr: 0, len: 0x3000, user_addr: 0, file_offset: 0 };
        Memory::default().with(placement, file).unwrap()
    }

    fn ring(event_idx: bool, next: u16) -> SplitRing {
        let parts = [GuestAddress(0), GuestAddress(AVAILABLE), GuestAddress(USED)];
        SplitRing::new(4, parts, event_idx, next).unwrap()
    }

    fn word(memory: &Memory, addr: u64) -> u16 {
        u16::from_le(memory.slice(GuestAddress(addr), 2).unwrap().get_ref(0).unwrap().load())
    }

    fn set(memory: &Memory, addr: u64, value: u16) {
        memory.slice(GuestAddress(addr), 2).unwrap().get_ref(0).unwrap().store(value.to_le());
    }

    #[test]
    fn heads_are_taken_and_given_back_over_the_end_of_the_index() {
        let memory = memory();
        let mut ring = ring(true, 0xfffe);
        let parts = ring.parts(&memory).unwrap();
        let view = parts.view().unwrap();
        set(&memory, USED + 2, 0xfffe);
        ring.resume_used(&view);
        set(&memory, AVAILABLE + 2, 0xfffe);
        assert_eq!(ring.pop(&view), Ok(None));
        for (entry, head) in [(2, 3), (3, 1), (0, 77), (1, 0)] {
            set(&memory, AVAILABLE + 4 + 2 * entry, head);
        }
        set(&memory, AVAILABLE + 2, 2);
        let taken: Vec<_> = (0..5).map(|_| ring.pop(&view).unwrap()).collect();
        assert_eq!(taken, [Some(3), Some(1), Some(77), Some(0), None]);
        ring.give_back(&view, 1, 0x0102_0304);
        ring.give_back(&view, 3, 0);
        ring.give_back(&view, 0, 5);
        let used = memory.slice(GuestAddress(USED + 2), 34).unwrap();
        let mut bytes = [0u8; 34];
        used.copy_to(&mut bytes[..]);
        let mut want = [0; 34];
        want[0] = 1; // the index
        want[2] = 0; // entry 0: the third
        want[6] = 5;
        want[18] = 1; // entry 2: the first
        want[22..26].copy_from_slice(&[4, 3, 2, 1]);
        want[26] = 3; // entry 3: the second
        assert_eq!(bytes, want);
        // Further ahead than the ring is long.
        set(&memory, AVAILABLE + 2, 7);
        assert_eq!(ring.pop(&view), Err(Jump(7)));
        ring.set_next_avail(7);
        assert_eq!(ring.pop(&view), Ok(None));
    }

    #[test]
    fn a_guest_is_told_when_its_event_is_passed_and_kicks_when_ours_is() {
        let memory = memory();
        let mut ring = ring(true, 0);
        let parts = ring.parts(&memory).unwrap();
        let view = parts.view().unwrap();
        // (used_event, answers, wants a call)
        let cases = [(0, 1, true), (0, 1, false), (3, 1, false), (3, 1, true), (4, 3, true)];
        for (i, (event, answers, want)) in cases.into_iter().enumerate() {
            set(&memory, AVAILABLE + 4 + 8, event);
            (0..answers).for_each(|_| ring.give_back(&view, 0, 0));
            assert_eq!(ring.wants_call(&view), want, "case {i}");
        }
        assert!(!ring.enable_kicks(&view));
        assert_eq!(word(&memory, USED + 4 + 32), 0);
        set(&memory, AVAILABLE + 2, 1);
        assert!(ring.enable_kicks(&view), "it came before it could be told");
        assert_eq!(ring.pop(&view), Ok(Some(0)));
        assert!(!ring.enable_kicks(&view));
        assert_eq!(word(&memory, USED + 4 + 32), 1);
    }

    #[test]
    fn without_events_flags_say_who_wants_to_be_told() {
        let memory = memory();
        let mut ring = ring(false, 0);
        let parts = ring.parts(&memory).unwrap();
        let view = parts.view().unwrap();
        ring.disable_kicks(&view);
        assert_eq!(word(&memory, USED), 1);
        assert!(!ring.enable_kicks(&view));
        assert_eq!(word(&memory, USED), 0);
        assert!(ring.wants_call(&view));
        set(&memory, AVAILABLE, 1);
        assert!(!ring.wants_call(&view));
    }

    #[test]
    fn rings_that_cannot_be() {
        let at = |parts: [u64; 3]| parts.map(GuestAddress);
        // (size, parts, whether it is one, whether it is in memory)
        let cases = [
            (4, at([0, 0x1000, 0x2000]), true, true),
            (3, at([0, 0x1000, 0x2000]), false, false),
            (0, at([0, 0x1000, 0x2000]), false, false),
            (4, at([8, 0x1000, 0x2000]), false, false),
            (4, at([0, 0x1001, 0x2000]), false, false),
            (4, at([0, 0x1000, 0x2002]), false, false),
            (4, at([0, 0x1000, 0x2fdc]), true, false),
            (4, at([0, u64::MAX - 1, 0x2000]), true, false),
            (1024, at([0, 0x1000, 0x2000]), true, false),
        ];
        let memory = memory();
        for (size, parts, one, there) in cases {
            let ring = SplitRing::new(size, parts, true, 0);
            assert_eq!(ring.is_some(), one, "{size} {parts:x?}");
            let found = ring.as_ref().is_some_and(|ring| ring.parts(&memory).is_some());
            assert_eq!(found, there, "{size} {parts:x?}");
        }
    }
}
