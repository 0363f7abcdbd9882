//! The driver's side of a split virtqueue (virtio 1.3, §2.7).
//!
//! [`Virtqueue::add`] builds a chain the way a correct driver does; everything is also reachable raw
//! ([`Virtqueue::write_desc`], [`Virtqueue::offer`], …) for tests that build what no driver would.
//! Nothing here blocks but [`Virtqueue::wait`]; nothing is notified before [`Virtqueue::publish`].

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::memory::{GuestBuf, GuestMemory};

pub const DESC_F_NEXT: u16 = 1;
pub const DESC_F_WRITE: u16 = 2;
pub const DESC_F_INDIRECT: u16 = 4;

const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;

/// One descriptor as it lies in guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Desc {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

/// One piece of a chain. Readable pieces come before writable ones.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    pub addr: u64,
    pub len: u32,
    pub writable: bool,
}

/// The three areas of a queue, and its eventfds: what the VMM tells the device.
#[derive(Clone)]
pub struct Rings {
    pub size: u16,
    pub desc: GuestBuf,
    pub avail: GuestBuf,
    pub used: GuestBuf,
    pub kick: Arc<EventFd>,
    pub call: Arc<EventFd>,
    pub err: Arc<EventFd>,
}

impl Rings {
    pub fn new(memory: &GuestMemory, size: u16) -> io::Result<Rings> {
        let n = usize::from(size);
        Ok(Rings {
            size,
            desc: memory.alloc(16 * n),
            // Flags, index, the ring, and the event word at the end.
            avail: memory.alloc(4 + 2 * n + 2),
            used: memory.alloc(4 + 8 * n + 2),
            kick: Arc::new(EventFd::new(EFD_NONBLOCK)?),
            call: Arc::new(EventFd::new(EFD_NONBLOCK)?),
            err: Arc::new(EventFd::new(EFD_NONBLOCK)?),
        })
    }
}

/// What the device gave back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    pub head: u16,
    /// Bytes the device says it wrote.
    pub len: u32,
}

pub struct Virtqueue {
    pub rings: Rings,
    indirect: bool,
    event_idx: bool,
    memory: GuestMemory,
    free: Vec<u16>,
    /// Descriptors of the chain that starts here; empty if none is in flight from this head.
    chains: Vec<Vec<u16>>,
    /// Tables for indirect chains, one per head, made when first needed.
    tables: Vec<Option<GuestBuf>>,
    /// Next index of the available ring to fill; the device sees it after `publish`.
    avail_idx: u16,
    published: u16,
    last_used: u16,
    /// Completions that name no chain in flight: always a bug of the device.
    bogus: Vec<Used>,
}

impl Virtqueue {
    pub fn new(memory: &GuestMemory, rings: Rings, indirect: bool, event_idx: bool) -> Virtqueue {
        let n = usize::from(rings.size);
        Virtqueue {
            free: (0..rings.size).rev().collect(),
            chains: vec![Vec::new(); n],
            tables: vec![None; n],
            memory: memory.clone(),
            rings,
            indirect,
            event_idx,
            avail_idx: 0,
            published: 0,
            last_used: 0,
            bogus: Vec::new(),
        }
    }

    pub fn size(&self) -> u16 {
        self.rings.size
    }

    pub fn in_flight(&self) -> usize {
        self.chains.iter().filter(|c| !c.is_empty()).count()
    }

    pub fn free_descriptors(&self) -> usize {
        self.free.len()
    }

    /// Whether a chain of so many segments fits right now.
    pub fn has_room(&self, segments: usize) -> bool {
        let need = if self.indirect && segments > 1 { 1 } else { segments };
        self.free.len() >= need
    }

    /// Puts a chain into the table and into the available ring, still unpublished. `None` if the
    /// queue is full.
    pub fn add(&mut self, segments: &[Segment]) -> Option<u16> {
        assert!(!segments.is_empty(), "a chain has at least one descriptor");
        if self.indirect && segments.len() > 1 {
            let head = self.free.pop()?;
            let table = self.table(head, segments.len());
            for (i, segment) in segments.iter().enumerate() {
                let next = u16::try_from(i + 1).expect("a chain has at most 65535 descriptors");
                let last = i + 1 == segments.len();
                put_desc(&table, i, describe(segment, (!last).then_some(next)));
            }
            self.write_desc(
                head,
                Desc {
                    addr: table.addr(),
                    len: super::to_u32(16 * segments.len()),
                    flags: DESC_F_INDIRECT,
                    next: 0,
                },
            );
            self.chains[usize::from(head)].push(head);
            self.offer(head);
            return Some(head);
        }
        if self.free.len() < segments.len() {
            return None;
        }
        let at = self.free.len() - segments.len();
        let taken = self.free.split_off(at);
        // The end of the free list comes first, so that a chain uses what was freed last.
        let order = || taken.iter().rev().copied();
        let mut nexts = order().skip(1);
        for (segment, index) in segments.iter().zip(order()) {
            self.write_desc(index, describe(segment, nexts.next()));
        }
        let head = order().next().expect("at least one segment");
        self.chains[usize::from(head)].extend(taken.iter().rev());
        self.offer(head);
        Some(head)
    }

    fn table(&mut self, head: u16, len: usize) -> GuestBuf {
        let slot = &mut self.tables[usize::from(head)];
        match slot {
            Some(table) if table.len() >= 16 * len => {}
            _ => *slot = Some(self.memory.alloc(16 * len.next_power_of_two().max(8))),
        }
        slot.clone().expect("made above")
    }

    /// Writes one descriptor of the queue's table, whatever it says.
    pub fn write_desc(&self, index: u16, desc: Desc) {
        put_desc(&self.rings.desc, usize::from(index), desc);
    }

    /// Takes descriptors from the free list for a chain that the caller writes by hand.
    pub fn reserve(&mut self, count: usize) -> Option<Vec<u16>> {
        let at = self.free.len().checked_sub(count)?;
        let mut taken = self.free.split_off(at);
        taken.reverse();
        Some(taken)
    }

    /// Declares a hand-written chain to be in flight from `head`: when the device gives it back,
    /// `owned` return to the free list.
    pub fn track(&mut self, head: u16, owned: Vec<u16>) {
        self.chains[usize::from(head)] = owned;
    }

    /// Gives descriptors of a hand-written chain back that the device will never mention.
    pub fn release(&mut self, owned: Vec<u16>) {
        self.free.extend(owned);
    }

    /// Takes a chain back that the device has still not returned, and forgets it. For tests that
    /// broke the ring on purpose.
    pub fn forget(&mut self, head: u16) {
        let owned = std::mem::take(&mut self.chains[usize::from(head)]);
        self.free.extend(owned);
    }

    /// Writes any head into the next entry of the available ring, unpublished.
    pub fn offer(&mut self, head: u16) {
        let slot = usize::from(self.avail_idx % self.rings.size);
        self.rings.avail.u16_at(4 + 2 * slot).store(head.to_le(), Ordering::Relaxed);
        self.avail_idx = self.avail_idx.wrapping_add(1);
    }

    /// Shows the device what was added. Returns whether it asked to be kicked for it.
    pub fn publish(&mut self) -> bool {
        let old = self.published;
        self.published = self.avail_idx;
        self.rings.avail.u16_at(2).store(self.avail_idx.to_le(), Ordering::Release);
        fence(Ordering::SeqCst);
        if self.event_idx {
            let at = 4 + 8 * usize::from(self.rings.size);
            let event = u16::from_le(self.rings.used.u16_at(at).load(Ordering::Relaxed));
            // virtio 1.3, §2.7.10: crossed iff new - event - 1 < new - old, modulo 2^16.
            let new = self.avail_idx;
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            let flags = u16::from_le(self.rings.used.u16_at(0).load(Ordering::Relaxed));
            flags & USED_F_NO_NOTIFY == 0
        }
    }

    pub fn kick(&self) {
        self.rings.kick.write(1).expect("an eventfd takes 2^64 - 2 kicks");
    }

    /// `publish`, and the kick if the device wants one.
    pub fn flush(&mut self) {
        if self.publish() {
            self.kick();
        }
    }

    /// Stores any index into the available ring: for jumps that no driver makes.
    pub fn set_avail_idx(&mut self, index: u16) {
        self.avail_idx = index;
        self.published = index;
        self.rings.avail.u16_at(2).store(index.to_le(), Ordering::SeqCst);
    }

    pub fn avail_idx(&self) -> u16 {
        self.avail_idx
    }

    /// The device's index in the used ring.
    pub fn used_idx(&self) -> u16 {
        u16::from_le(self.rings.used.u16_at(2).load(Ordering::Acquire))
    }

    pub fn last_used(&self) -> u16 {
        self.last_used
    }

    /// The next chain that the device gave back. Completions that name no chain in flight are kept
    /// for [`Virtqueue::bogus`].
    #[inline]
    pub fn pop(&mut self) -> Option<Used> {
        while self.used_idx() != self.last_used {
            let slot = usize::from(self.last_used % self.rings.size);
            let id = u32::from_le(self.rings.used.u32_at(4 + 8 * slot).load(Ordering::Relaxed));
            let len = u32::from_le(self.rings.used.u32_at(8 + 8 * slot).load(Ordering::Relaxed));
            self.last_used = self.last_used.wrapping_add(1);
            let used = Used { head: u16::try_from(id).unwrap_or(u16::MAX), len };
            match self.chains.get_mut(usize::from(used.head)) {
                Some(chain) if !chain.is_empty() => {
                    // In reverse, so that the next chain takes the same descriptors again.
                    self.free.extend(chain.drain(..).rev());
                    return Some(used);
                }
                _ => self.bogus.push(used),
            }
        }
        None
    }

    /// Completions that named no chain in flight.
    pub fn bogus(&self) -> &[Used] {
        &self.bogus
    }

    /// Forgets completions that named no chain in flight, after a test that provoked them.
    pub fn clear_bogus(&mut self) {
        self.bogus.clear();
    }

    /// Asks the device not to call: the driver polls. With EVENT_IDX the device is asked for a call
    /// half a ring ago, which a correct one never sends.
    pub fn disable_calls(&mut self) {
        if self.event_idx {
            self.set_used_event(self.last_used.wrapping_sub(0x8000));
        } else {
            self.set_avail_flags(AVAIL_F_NO_INTERRUPT);
        }
    }

    /// Asks for a call once `after` more chains have been given back (1 is the next one). The
    /// caller looks at the ring once more before it sleeps.
    pub fn enable_calls(&mut self, after: u16) {
        if self.event_idx {
            self.set_used_event(self.last_used.wrapping_add(after).wrapping_sub(1));
        } else {
            self.set_avail_flags(0);
        }
        fence(Ordering::SeqCst);
    }

    fn set_avail_flags(&self, flags: u16) {
        self.rings.avail.u16_at(0).store(flags.to_le(), Ordering::Release);
    }

    fn set_used_event(&self, index: u16) {
        let at = 4 + 2 * usize::from(self.rings.size);
        self.rings.avail.u16_at(at).store(index.to_le(), Ordering::Release);
    }

    /// Sleeps until the device has given something back that was not popped yet. `false` if it has
    /// not by `deadline`.
    pub fn wait(&mut self, deadline: Instant) -> bool {
        loop {
            if self.used_idx() != self.last_used {
                return true;
            }
            self.enable_calls(1);
            if self.used_idx() != self.last_used {
                return true;
            }
            let now = Instant::now();
            if now >= deadline {
                return false;
            }
            self.sleep(deadline - now);
        }
    }

    fn sleep(&self, limit: Duration) {
        let mut fd =
            libc::pollfd { fd: self.rings.call.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let ms = libc::c_int::try_from(limit.as_millis() + 1).unwrap_or(libc::c_int::MAX);
        // SAFETY: one pollfd that lives across the call.
        unsafe { libc::poll(&raw mut fd, 1, ms) };
        // Non-blocking: an eventfd without a count says so and changes nothing.
        let _ = self.rings.call.read();
    }

    /// Calls of the device since last asked.
    pub fn take_calls(&self) -> u64 {
        self.rings.call.read().unwrap_or(0)
    }

    /// Starts over with empty rings, as a driver does after a reset.
    pub fn reset(&mut self) {
        let n = self.rings.size;
        self.rings.desc.fill(0);
        self.rings.avail.fill(0);
        self.rings.used.fill(0);
        self.free = (0..n).rev().collect();
        self.chains.iter_mut().for_each(Vec::clear);
        self.avail_idx = 0;
        self.published = 0;
        self.last_used = 0;
        self.bogus.clear();
        self.take_calls();
    }
}

fn describe(segment: &Segment, next: Option<u16>) -> Desc {
    let write = if segment.writable { DESC_F_WRITE } else { 0 };
    let chain = if next.is_some() { DESC_F_NEXT } else { 0 };
    Desc { addr: segment.addr, len: segment.len, flags: write | chain, next: next.unwrap_or(0) }
}

/// Writes entry `index` of a descriptor table, the queue's own or an indirect one.
pub fn put_desc(table: &GuestBuf, index: usize, desc: Desc) {
    let at = 16 * index;
    table.u64_at(at).store(desc.addr.to_le(), Ordering::Relaxed);
    table.u32_at(at + 8).store(desc.len.to_le(), Ordering::Relaxed);
    table.u16_at(at + 12).store(desc.flags.to_le(), Ordering::Relaxed);
    table.u16_at(at + 14).store(desc.next.to_le(), Ordering::Relaxed);
}
