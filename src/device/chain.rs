//! A descriptor chain, taken out of the ring and owned.
//!
//! `Chain::walk` follows the descriptors once and keeps what they say; nothing reads the table
//! again, so a guest that rewrites it later changes nothing. A chain that breaks the rules is still
//! a `Chain`, with what was gathered before the fault: its head can be given back and, if a header
//! and room for an answer were there, answered.

use std::sync::Arc;

use smallvec::SmallVec;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemoryBackend, GuestRegionMmap, MmapRegion, VolatileSlice,
};

use super::memory::GuestMemory;

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
    /// Follows a chain that was just popped.
    pub(super) fn walk(mut descriptors: DescriptorChain<&GuestMemory>) -> Chain {
        let mut chain = Chain {
            head: descriptors.head_index(),
            readable: SmallVec::new(),
            writable: SmallVec::new(),
            writable_len: 0,
            fault: None,
        };
        let mut count = 0;
        // The iterator ends quietly when it meets something wrong: then the last descriptor it gave
        // out promised another, or there was none at all.
        let mut more = None;
        for descriptor in &mut descriptors {
            more = Some(descriptor.has_next());
            count += 1;
            if count > MAX_DESCRIPTORS {
                chain.fault = Some(Fault::TooLong);
                return chain;
            }
            let segment = Segment { addr: descriptor.addr(), len: descriptor.len() };
            if descriptor.is_write_only() {
                if segment.len > 0 {
                    chain.writable.push(segment);
                    // The iterator ends before a chain reaches 2^32 bytes.
                    chain.writable_len = chain.writable_len.saturating_add(segment.len);
                }
            } else if !chain.writable.is_empty() {
                chain.fault = Some(Fault::ReadableAfterWritable);
                return chain;
            } else if segment.len > 0 {
                chain.readable.push(segment);
            }
        }
        chain.fault = match more {
            None => Some(Fault::NoDescriptor),
            Some(true) => Some(Fault::BrokenOff),
            Some(false) => None,
        };
        chain
    }

    /// Follows a chain of `queue` that was taken earlier, perhaps by another process. `None` if that
    /// cannot be.
    ///
    /// Only what the available ring names can be followed, so it is followed from a ring of one
    /// entry in a page that this guest has not got.
    pub(super) fn again(head: u16, queue: &Queue, guest: &GuestMemory) -> Option<Chain> {
        const PAGE: usize = 4096;
        let last = guest.last_addr().raw_value();
        let ring = GuestAddress((last | (PAGE as u64 - 1)).checked_add(1)?);
        let page = GuestRegionMmap::new(MmapRegion::new(PAGE).ok()?, ring)?;
        let memory = guest.insert_region(Arc::new(page)).ok()?;
        // Flags, index, the entry: little-endian.
        memory.write_obj([0, 1u16.to_le(), head.to_le()], ring).ok()?;
        let mut one = Queue::new(queue.max_size()).ok()?;
        one.try_set_size(queue.size()).ok()?;
        one.try_set_desc_table_address(GuestAddress(queue.desc_table())).ok()?;
        one.try_set_avail_ring_address(ring).ok()?;
        one.set_ready(true);
        let descriptors = one.iter(&memory).ok()?.next()?;
        (descriptors.head_index() < queue.size()).then(|| Chain::walk(descriptors))
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

    /// Copies the readable part behind one another into `buf`, replacing what it held, and stops
    /// after `max` bytes or at the first that cannot be read; only the latter is a fault.
    pub(super) fn copy_readable(
        &self,
        memory: &GuestMemory,
        buf: &mut Vec<u8>,
        max: usize,
    ) -> Result<(), Fault> {
        buf.clear();
        for segment in &self.readable {
            let start = buf.len();
            let len = (segment.len as usize).min(max - start);
            buf.resize(start + len, 0);
            match memory.read(&mut buf[start..], segment.addr) {
                Ok(n) if n == len => {}
                other => {
                    buf.truncate(start + other.unwrap_or(0));
                    return Err(Fault::OutsideMemory);
                }
            }
            if buf.len() == max {
                break;
            }
        }
        Ok(())
    }

    /// Where the answer goes: all of the writable part, or what precedes a fault.
    pub(super) fn writable_slices<'m>(
        &self,
        memory: &'m GuestMemory,
    ) -> (Slices<'m>, Option<Fault>) {
        let mut slices = Slices::new();
        for segment in &self.writable {
            let len = segment.len as usize;
            // Nearly always one region holds the whole segment.
            if let Ok(slice) = GuestMemoryBackend::get_slice(memory, segment.addr, len) {
                slices.push(slice);
                continue;
            }
            for piece in GuestMemoryBackend::get_slices(memory, segment.addr, len) {
                match piece {
                    Ok(piece) => slices.push(piece),
                    Err(_) => return (slices, Some(Fault::OutsideMemory)),
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
