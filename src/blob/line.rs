//! When a link will have carried what was asked for: a guess is sent so that its answer comes behind that.
//!
//! Bytes that were asked for cannot be called back: they lie in the buffers of sockets, in front of whatever
//! is asked for next. So a guess must not be sent beside what somebody waits for, but so much later
//! that its bytes find the link free. Then it takes nothing from anybody, and who comes next finds no
//! more before its own answer than the link carries in the time that this takes to begin.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::link::Link;

/// Requests on their way, in the order in which they were sent.
#[derive(Default)]
pub struct Line {
    sent: BTreeMap<u64, Sent>,
    next: u64,
}

struct Sent {
    at: Instant,
    /// Bytes that have not come.
    left: u64,
    /// Some have.
    begun: bool,
}

impl Line {
    fn add(&mut self, at: Instant, left: u64) -> u64 {
        self.next += 1;
        self.sent.insert(self.next, Sent { at, left, begun: false });
        self.next
    }

    /// How long the link is taken from the moment at which an answer to a request sent `now` would come.
    pub fn taken(&self, now: Instant, latency: Duration, bandwidth: u64) -> Duration {
        let mut free = now;
        for sent in self.sent.values() {
            if !sent.begun {
                free = free.max(sent.at + latency);
            }
            free += Duration::from_secs_f64(sent.left as f64 / bandwidth.max(1) as f64);
        }
        free.saturating_duration_since(now + latency)
    }
}

/// A request on its way, until it is dropped.
pub struct OnLine {
    link: Arc<Link>,
    id: u64,
}

impl OnLine {
    /// A request for `bytes` is sent now.
    pub fn new(link: &Arc<Link>, bytes: u64) -> OnLine {
        let id = link.line().add(Instant::now(), bytes);
        OnLine { link: link.clone(), id }
    }

    /// It is sent now, and for so many bytes.
    pub fn sent(&self, bytes: u64) {
        if let Some(sent) = self.link.line().sent.get_mut(&self.id) {
            (sent.at, sent.left) = (Instant::now(), bytes);
        }
    }

    pub fn received(&self, bytes: u64) {
        if let Some(sent) = self.link.line().sent.get_mut(&self.id) {
            (sent.left, sent.begun) = (sent.left.saturating_sub(bytes), true);
        }
    }
}

impl Drop for OnLine {
    fn drop(&mut self) {
        self.link.line().sent.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    /// Bytes per millisecond.
    const RATE: u64 = 50_000;

    fn taken(line: &Line, now: Instant) -> u128 {
        line.taken(now, 20 * MS, RATE * 1000).as_millis()
    }

    #[test]
    fn a_guess_waits_as_long_as_what_was_asked_for_before_takes_to_come() {
        let start = Instant::now();
        let mut line = Line::default();
        assert_eq!(taken(&line, start), 0, "nothing is on its way");
        line.add(start, 10 * RATE);
        assert_eq!(taken(&line, start), 10);
        assert_eq!(taken(&line, start + 9 * MS), 1, "the answer begins 20 ms after the request");
        assert_eq!(taken(&line, start + 10 * MS), 0);
        // The guess that is sent then is in the way of no more than its own bytes.
        let guess = line.add(start + 10 * MS, 5 * RATE);
        assert_eq!(taken(&line, start + 10 * MS), 5);
        assert_eq!(taken(&line, start + 15 * MS), 0);
        // Who asks while the link is idle waits for its own answer, and for no other.
        line.sent.remove(&guess);
        line.add(start + 18 * MS, RATE);
        assert_eq!(taken(&line, start + 18 * MS), 1);
    }

    #[test]
    fn what_has_come_is_not_waited_for() {
        let start = Instant::now();
        let link = Arc::new(Link::new(start));
        let first = OnLine::new(&link, 40 * RATE);
        let second = OnLine::new(&link, 30 * RATE);
        first.received(30 * RATE);
        second.sent(20 * RATE);
        let left = |at| taken(&link.line(), at);
        // 10 ms of the first are coming, then 20 of the second, whose answer begins by then.
        assert_eq!(left(Instant::now() + 30 * MS), 10);
        drop(second);
        assert_eq!(left(Instant::now() + 30 * MS), 0);
        first.received(u64::MAX);
        assert_eq!(left(Instant::now()), 0);
        drop(first);
        assert!(link.line().sent.is_empty());
    }
}
