//! What the device counts, over all connections since the daemon started.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::parked::Parked;

/// Totals, for metrics. Every number only grows.
#[derive(Debug, Default)]
pub struct Counters {
    /// VMMs that connected.
    pub connections_total: AtomicU64,
    /// Requests taken out of a ring, well-formed or not.
    pub requests_total: AtomicU64,
    /// Times a guest was told to look at a used ring.
    pub calls_total: AtomicU64,
    /// Times a queue looked for the next request instead of sleeping, and it came.
    pub poll_hits_total: AtomicU64,
    /// Times it did not come meanwhile.
    pub poll_misses_total: AtomicU64,
    /// Requests that had to wait for something, mostly for chunks.
    pub held_total: AtomicU64,
    /// Requests answered EIO because what they waited for broke off without a result.
    pub held_lost_total: AtomicU64,
    /// Chains whose descriptors break the rules, see `docs/device.md`.
    pub bad_chains_total: AtomicU64,
    /// Requests whose FUSE header or body could not be understood.
    pub bad_requests_total: AtomicU64,
    /// Available-ring entries that name no descriptor of the table: nothing to give back.
    pub bad_heads_total: AtomicU64,
    /// Times an available index ran further ahead than the queue is long.
    pub bad_indexes_total: AtomicU64,
    /// Times a ring lay outside the guest's memory.
    pub bad_rings_total: AtomicU64,
    /// Vhost-user messages that were refused.
    pub bad_messages_total: AtomicU64,
    /// Requests whose handler panicked: always our fault, answered EIO.
    pub panics_total: AtomicU64,
    /// Requests that wait now.
    pub parked: Parked,
}

/// Adds one.
pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// What one guest or VMM did wrong, so that each kind is logged once per connection.
#[derive(Debug, Default)]
pub(super) struct Complaints(AtomicU32);

/// What the misbehaviour was about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Complaint {
    Chain,
    Request,
    Head,
    Index,
    Ring,
    Message,
}

impl Complaints {
    /// Whether this is the first of its kind: then it is worth a warning.
    pub(super) fn first(&self, kind: Complaint) -> bool {
        let bit = 1 << (kind as u8);
        // Read first: a guest that misbehaves all the time must not slow the others down.
        self.0.load(Ordering::Relaxed) & bit == 0
            && self.0.fetch_or(bit, Ordering::Relaxed) & bit == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_first_once() {
        let complaints = Complaints::default();
        assert!(complaints.first(Complaint::Chain));
        assert!(!complaints.first(Complaint::Chain));
        assert!(complaints.first(Complaint::Ring));
        assert!(!complaints.first(Complaint::Ring));
    }
}
