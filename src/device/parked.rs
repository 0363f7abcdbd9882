//! The list of requests that wait, for people who want to know what a guest hangs on.
//!
//! Only requests that wait are entered, so a request that is answered at once pays nothing.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use super::counters::Counters;

/// A request that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParkedRequest {
    /// What it is about, as the guest calls it.
    pub nodeid: u64,
    pub opcode: u32,
    /// The guest's id of the request.
    pub unique: u64,
    pub since: SystemTime,
}

/// All of them, in the order in which they came.
#[derive(Debug, Default)]
pub struct Parked(Mutex<List>);

#[derive(Debug, Default)]
struct List {
    next: u64,
    requests: BTreeMap<u64, ParkedRequest>,
}

impl Parked {
    /// Those that wait now, the oldest first.
    pub fn list(&self) -> Vec<ParkedRequest> {
        self.lock().requests.values().copied().collect()
    }

    /// How many wait now.
    pub fn count(&self) -> usize {
        self.lock().requests.len()
    }

    fn lock(&self) -> MutexGuard<'_, List> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps a request in the list as long as it lives.
pub(super) struct Listed {
    counters: Arc<Counters>,
    place: u64,
}

impl Listed {
    pub(super) fn new(counters: &Arc<Counters>, request: ParkedRequest) -> Listed {
        let mut list = counters.parked.lock();
        let place = list.next;
        list.next += 1;
        list.requests.insert(place, request);
        Listed { counters: Arc::clone(counters), place }
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.counters.parked.lock().requests.remove(&self.place);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_listed_as_long_as_it_waits() {
        let counters = Arc::<Counters>::default();
        let request =
            |unique| ParkedRequest { nodeid: 7, opcode: 15, unique, since: SystemTime::UNIX_EPOCH };
        let first = Listed::new(&counters, request(2));
        let second = Listed::new(&counters, request(4));
        let listed = |n: &[u64]| {
            let uniques: Vec<u64> = counters.parked.list().iter().map(|r| r.unique).collect();
            assert_eq!((uniques.as_slice(), counters.parked.count()), (n, n.len()));
        };
        listed(&[2, 4]);
        drop(first);
        listed(&[4]);
        drop(second);
        listed(&[]);
    }
}
