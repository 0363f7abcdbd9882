//! Whether a source is worth asking: a circuit breaker.
//!
//! A source that fails is left out for a while; then one request, or a ping, tries it, and it is back
//! when that succeeds. Nothing here waits or runs by itself: whoever wants to ask looks first.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Longest time that a source is left alone because it asks for that.
const MAX_WAIT: Duration = Duration::from_secs(3600);

/// How one source has been doing.
pub struct Health {
    /// Failures in a row after which it is left out.
    failure_limit: u32,
    /// How long it is left out, and how often it is pinged while it is not.
    pause: Duration,
    state: Mutex<State>,
}

struct State {
    failures: u32,
    /// Set while it is left out: when the next trial is due.
    out_until: Option<Instant>,
    /// When it was pinged last, or made.
    pinged: Instant,
}

/// Whether to ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Well,
    /// It was left out; who gets this answer may try it, or ping it, and nobody else for a while.
    Try,
    Out,
}

impl Health {
    pub fn new(failure_limit: u32, pause: Duration, now: Instant) -> Health {
        let state = State { failures: 0, out_until: None, pinged: now };
        Health { failure_limit: failure_limit.max(1), pause, state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn verdict(&self, now: Instant) -> Verdict {
        let mut state = self.state();
        match state.out_until {
            None => Verdict::Well,
            Some(until) if now < until => Verdict::Out,
            Some(_) => {
                state.out_until = Some(now + self.pause);
                Verdict::Try
            }
        }
    }

    /// Is it time for a ping of a source that is well? Then it is the caller's to send.
    pub fn ping_due(&self, now: Instant) -> bool {
        let mut state = self.state();
        let due =
            state.out_until.is_none() && now.saturating_duration_since(state.pinged) >= self.pause;
        if due {
            state.pinged = now;
        }
        due
    }

    pub fn is_well(&self) -> bool {
        self.state().out_until.is_none()
    }

    /// It did what it should. True if it was left out before.
    pub fn succeeded(&self) -> bool {
        let mut state = self.state();
        state.failures = 0;
        state.out_until.take().is_some()
    }

    /// It failed. `silent`: it did not answer at all, which costs each who tries a timeout, so that
    /// one time is enough. `wait`: how long it asks to be left alone. True if it is left out from
    /// now on and was not before.
    pub fn failed(&self, silent: bool, wait: Option<Duration>, now: Instant) -> bool {
        let mut state = self.state();
        state.failures = state.failures.saturating_add(1);
        let was_out = state.out_until.is_some();
        if was_out || silent || wait.is_some() || state.failures >= self.failure_limit {
            let wait = wait.unwrap_or_default().min(MAX_WAIT);
            state.out_until = Some(now + self.pause.max(wait));
        }
        !was_out && state.out_until.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_left_out_after_its_limit_and_tried_once_at_a_time() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let health = Health::new(3, Duration::from_millis(100), start);
        assert!(!health.failed(false, None, at(0)));
        assert!(!health.failed(false, None, at(1)));
        assert!(!health.succeeded(), "which starts the count again");
        assert!(!health.failed(false, None, at(2)));
        assert!(!health.failed(false, None, at(3)));
        assert_eq!(health.verdict(at(4)), Verdict::Well, "two in a row are not three");
        assert!(health.failed(false, None, at(10)), "the third");
        assert_eq!(health.verdict(at(109)), Verdict::Out);
        assert_eq!(health.verdict(at(110)), Verdict::Try);
        assert_eq!(health.verdict(at(111)), Verdict::Out, "one trial");
        assert!(!health.failed(false, None, at(120)), "the trial failed: no news");
        assert_eq!(health.verdict(at(219)), Verdict::Out);
        assert_eq!(health.verdict(at(220)), Verdict::Try);
        assert_eq!(health.verdict(at(320)), Verdict::Try, "that trial was given up");
        assert!(health.succeeded());
        assert_eq!(health.verdict(at(321)), Verdict::Well);
    }

    #[test]
    fn silence_and_a_wish_to_be_left_alone_count_at_once() {
        let start = Instant::now();
        let second = Duration::from_secs(1);
        let health = Health::new(5, second, start);
        assert!(health.failed(true, None, start));
        assert_eq!(health.verdict(start), Verdict::Out);
        health.succeeded();
        assert!(health.failed(false, Some(9 * second), start));
        assert_eq!(health.verdict(start + 8 * second), Verdict::Out);
        assert_eq!(health.verdict(start + 9 * second), Verdict::Try);
        health.failed(false, Some(Duration::MAX), start);
        assert_eq!(health.verdict(start + MAX_WAIT), Verdict::Try, "however long it asks for");
    }

    #[test]
    fn pings_are_due_once_per_interval_while_the_source_is_well() {
        let start = Instant::now();
        let second = Duration::from_secs(1);
        let health = Health::new(5, second, start);
        assert!(!health.ping_due(start));
        assert!(health.ping_due(start + second));
        assert!(!health.ping_due(start + second));
        health.failed(true, None, start + second);
        assert!(!health.ping_due(start + 9 * second), "trials are pings then");
    }
}
