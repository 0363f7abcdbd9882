//! A descriptor chain, taken out of the ring and owned.
//!
//! `Chain::walk` follows the descriptors once and keeps what they say; nothing reads the table
//! again, so a guest that rewrites it later changes nothing. A chain that breaks the rules is still
//! a `Chain`, with what was gathered before the fault: its head can be given back and, if a header
//! and room for an answer were there, answered.

use smallvec::SmallVec;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{
    Address, ByteValued, GuestAddress, VolatileArrayRef, VolatileMemory, VolatileSlice,
};

use super::memory::Memory;
use super::split::DESCRIPTOR;

/// Descriptors in a chain at most. The specification forbids chains longer than the queue, and our
/// queues end at 1024, which is also the number of pieces one `preadv` takes.
pub(super) const MAX_DESCRIPTORS: usize = 1024;

/// What a guest did wrong in a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Fault {
    #[error("the chain has no descriptor that can be read: bad table, index or indirect table")]
    NoDescriptor,
    #[error("the chain loops, leaves its table or breaks off")]
    BrokenOff,
    #[error("the chain has more than {MAX_DESCRIPTORS} descriptors")]
    TooLong,
    #[error("a readable descriptor follows a writable one")]
    ReadableAfterWritable,
    #[error("a descriptor points outside the guest's memory")]
    OutsideMemory,
}

/// A range of guest-physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    addr: GuestAddress,
    /// Bytes; not 0.
    len: u32,
}

/// Pieces of guest memory as the host sees them; a segment that crosses memory regions is several.
pub(super) type Slices<'m> = SmallVec<[VolatileSlice<'m>; 8]>;

/// One request's place in the guest: its head and where to read and write.
#[derive(Debug)]
pub(super) struct Chain {
    head: u16,
    readable: SmallVec<[Segment; 4]>,
    writable: SmallVec<[Segment; 8]>,
    writable_len: u32,
    fault: Option<Fault>,
}

impl Chain {
    /// Follows the chain that begins with descriptor `head` of a ring's `table`.
    pub(super) fn walk(
        head: u16,
        table: &VolatileArrayRef<'_, Descriptor>,
        memory: &Memory,
    ) -> Chain {
        let mut chain = Chain {
            head,
            readable: SmallVec::new(),
            writable: SmallVec::new(),
            writable_len: 0,
            fault: None,
        };
        let mut count = 0;
        let fault = chain.follow(&Table::Ring(table), head, &mut count, memory).err();
        chain.fault = match fault {
            Some(Fault::BrokenOff) if count == 0 => Some(Fault::NoDescriptor),
            fault => fault,
        };
        chain
    }

    /// Takes the descriptors from `first` on. `count` is how many there were.
    fn follow(
        &mut self,
        table: &Table<'_>,
        first: u16,
        count: &mut usize,
        memory: &Memory,
    ) -> Result<(), Fault> {
        let mut total: u32 = 0;
        let mut next = first;
        // A chain that is longer than its table loops.
        for _ in 0..table.len() {
            let descriptor = table.get(next).ok_or(Fault::BrokenOff)?;
            let segment = Segment { addr: descriptor.addr(), len: descriptor.len() };
            if descriptor.refers_to_indirect_table() {
                if !matches!(table, Table::Ring(_)) {
                    return Err(Fault::BrokenOff);
                }
                let inner = Table::indirect(segment, memory).ok_or(Fault::BrokenOff)?;
                return self.follow(&inner, 0, count, memory);
            }
            // A chain of 2^32 bytes is none.
            total = total.checked_add(segment.len).ok_or(Fault::BrokenOff)?;
            *count += 1;
            if *count > MAX_DESCRIPTORS {
                return Err(Fault::TooLong);
            }
            if descriptor.is_write_only() {
                if segment.len > 0 {
                    self.writable.push(segment);
                    self.writable_len = self.writable_len.saturating_add(segment.len);
                }
            } else if !self.writable.is_empty() {
                return Err(Fault::ReadableAfterWritable);
            } else if segment.len > 0 {
                self.readable.push(segment);
            }
            if !descriptor.has_next() {
                return Ok(());
            }
            next = descriptor.next();
        }
        Err(Fault::BrokenOff)
    }

    /// Index of the chain's first descriptor, by which it is given back. Any number: the guest
    /// wrote it.
    pub(super) fn head(&self) -> u16 {
        self.head
    }

    /// What was wrong with the chain itself. Addresses are checked when they are used.
    pub(super) fn fault(&self) -> Option<Fault> {
        self.fault
    }

    /// Bytes that an answer may have.
    pub(super) fn writable_len(&self) -> u32 {
        self.writable_len
    }

    /// Copies the readable part behind one another to the front of `buf`, which grows as it must, and
    /// stops after `max` bytes or at the first that cannot be read; only the latter is a fault.
    /// Returns how many bytes it copied.
    pub(super) fn copy_readable(
        &self,
        memory: &Memory,
        buf: &mut Vec<u8>,
        max: usize,
    ) -> (usize, Option<Fault>) {
        let mut end = 0;
        for segment in &self.readable {
            let start = end;
            end = max.min(start + segment.len as usize);
            if buf.len() < end {
                buf.resize(end, 0);
            }
            let copied = memory.read(segment.addr, &mut buf[start..end]);
            if start + copied < end {
                return (start + copied, Some(Fault::OutsideMemory));
            }
            if end == max {
                break;
            }
        }
        (end, None)
    }

    /// Where the answer goes: all of the writable part, or what precedes a fault.
    pub(super) fn writable_slices<'m>(&self, memory: &'m Memory) -> (Slices<'m>, Option<Fault>) {
        let mut slices = Slices::new();
        for segment in &self.writable {
            let len = segment.len as usize;
            // Nearly always one region holds the whole segment.
            if let Some(slice) = memory.slice(segment.addr, len) {
                slices.push(slice);
                continue;
            }
            for piece in memory.slices(segment.addr, len) {
                match piece {
                    Some(piece) => slices.push(piece),
                    None => return (slices, Some(Fault::OutsideMemory)),
                }
            }
        }
        if slices.len() > MAX_DESCRIPTORS {
            slices.truncate(MAX_DESCRIPTORS);
            return (slices, Some(Fault::TooLong));
        }
        (slices, None)
    }
}

/// A table of descriptors.
enum Table<'t> {
    /// That of the ring.
    Ring(&'t VolatileArrayRef<'t, Descriptor>),
    /// An indirect one.
    Indirect(VolatileSlice<'t>),
    /// An indirect one that does not lie in one region: whether it is there shows when it is read.
    Scattered(Segment, &'t Memory),
}

impl<'t> Table<'t> {
    /// The indirect table that a descriptor names.
    fn indirect(place: Segment, memory: &'t Memory) -> Option<Table<'t>> {
        let len = place.len as usize;
        if !len.is_multiple_of(DESCRIPTOR) || len / DESCRIPTOR > usize::from(u16::MAX) {
            return None;
        }
        Some(match memory.slice(place.addr, len) {
            Some(slice) => Table::Indirect(slice),
            None => Table::Scattered(place, memory),
        })
    }

    /// Descriptors.
    fn len(&self) -> usize {
        match self {
            Table::Ring(table) => table.len(),
            Table::Indirect(slice) => slice.len() / DESCRIPTOR,
            Table::Scattered(place, _) => place.len as usize / DESCRIPTOR,
        }
    }

    /// Descriptor `index`; `None` if there is none.
    fn get(&self, index: u16) -> Option<Descriptor> {
        let index = usize::from(index);
        match self {
            Table::Ring(table) => (index < table.len()).then(|| table.load(index)),
            Table::Indirect(slice) => {
                slice.get_ref(index * DESCRIPTOR).ok().map(|descriptor| descriptor.load())
            }
            Table::Scattered(place, memory) => {
                if index >= self.len() {
                    return None;
                }
                let addr = place.addr.checked_add((index * DESCRIPTOR) as u64)?;
                let mut descriptor = Descriptor::default();
                let copied = memory.read(addr, descriptor.as_mut_slice());
                (copied == DESCRIPTOR).then_some(descriptor)
            }
        }
    }
}
