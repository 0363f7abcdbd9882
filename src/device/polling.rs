//! How long a queue looks for the next request before it sleeps.
//!
//! To sleep and be woken takes microseconds of processor time on any machine, and tens of microseconds
//! of the guest's time on one whose idle processors really sleep. A guest that sends its next request
//! soon is better served by a queue that looks for it meanwhile; one that does not would pay for
//! nothing. What a guest does is told from how long the queue has just slept: [`Polling`] looks longer
//! after short sleeps and not at all after a long one, as KVM does for processors that halt.
//!
//! It is fed with times, and reads no clock itself but to say whether it is [`paused`](Polling::paused).

use std::time::{Duration, Instant};

/// What a queue does when its ring is empty.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BusyPoll {
    /// It looks for as long as the guest's own pace makes worthwhile, at most [`MOST`].
    #[default]
    Auto,
    /// It looks for so long, each time; zero: it sleeps at once.
    For(Duration),
}

/// Longest time that a queue looks of its own accord: what a wake-up takes on an idle virtual machine.
pub const MOST: Duration = Duration::from_micros(50);
/// With what it begins after a short sleep.
const FIRST: Duration = Duration::from_nanos(12_500);
/// Sleeps up to this long are short: the wake-up is part of it, and may take as long as [`MOST`].
const SHORT: Duration = Duration::from_micros(100);
/// Most short sleeps after which looking is tried again, if it was in vain before.
const SKIPS: u32 = 1024;
/// If a look at the ring takes so much longer than it should, somebody else may have had the processor.
pub(super) const GAP: Duration = Duration::from_micros(100);
/// How long a queue sleeps at once after it has lost its processor while looking; twice as long each
/// time that this happens soon again.
const PAUSES: [Duration; 2] = [Duration::from_millis(20), Duration::from_millis(1280)];

/// What one queue has learned of its guest.
#[derive(Debug)]
pub(super) struct Polling {
    mode: BusyPoll,
    /// How long to look, with [`BusyPoll::Auto`].
    window: Duration,
    /// Something was found since the window was last as long as it gets, and in vain.
    useful: bool,
    /// Short sleeps that change nothing, after looking for [`MOST`] was in vain: so many then, and so
    /// many are left. Twice as many each time until it is not.
    skips: (u32, u32),
    pause: Duration,
    /// No looking before.
    paused_until: Option<Instant>,
}

impl Polling {
    pub(super) fn new(mode: BusyPoll) -> Polling {
        Polling {
            mode,
            window: Duration::ZERO,
            useful: false,
            skips: (0, 0),
            pause: PAUSES[0],
            paused_until: None,
        }
    }

    /// How long to look at the empty ring now; zero: not at all.
    pub(super) fn window(&self) -> Duration {
        match self.mode {
            BusyPoll::Auto => self.window,
            BusyPoll::For(time) => time,
        }
    }

    /// Whether the processors are somebody else's for now, as far as is known.
    pub(super) fn paused(&self) -> bool {
        self.paused_until.is_some_and(|until| Instant::now() < until)
    }

    /// Whether sleeps and lost processors are worth a look at the clock.
    pub(super) fn learns(&self) -> bool {
        self.mode == BusyPoll::Auto
    }

    /// Something has come while the queue was looking.
    pub(super) fn found(&mut self) {
        (self.useful, self.skips) = (true, (0, 0));
    }

    /// At `now`, something has come `idle` after the ring was empty; the queue has looked for as long as
    /// it wanted, if at all, and had gone to sleep.
    pub(super) fn slept(&mut self, idle: Duration, now: Instant) {
        let short = idle <= SHORT;
        if self.paused_until.is_some_and(|until| now < until) {
            return;
        }
        if short && self.window == MOST && self.useful {
            self.useful = false;
        } else if short && self.window == MOST {
            // How much of the sleep is the guest's pause and how much the wake-up cannot be seen. The
            // pause is too long, then.
            let skip = (self.skips.0 * 2).clamp(1, SKIPS);
            self.skips = (skip, skip);
            self.window = Duration::ZERO;
        } else if short && self.skips.1 > 0 {
            self.skips.1 -= 1;
        } else if short {
            self.window = (self.window * 2).clamp(FIRST, MOST);
        } else {
            self.window = Duration::ZERO;
        }
    }

    /// At `now`, somebody else has had the processor while the queue was looking: there is none to
    /// spare, and who sleeps is sooner given one.
    pub(super) fn lost_processor(&mut self, now: Instant) {
        // It is soon again if there was less peace than trouble.
        let again = self.paused_until.is_some_and(|until| now < until + self.pause);
        self.pause = if again { (self.pause * 2).min(PAUSES[1]) } else { PAUSES[0] };
        self.paused_until = Some(now + self.pause);
        self.window = Duration::ZERO;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn us(time: u64) -> Duration {
        Duration::from_micros(time)
    }

    /// Processor time spent looking, and sleeps, of a queue whose guest sends a request `gap` after each
    /// answer, `count` times. A wake-up takes `wake`.
    fn live(
        polling: &mut Polling,
        now: &mut Instant,
        (gap, wake): (Duration, Duration),
        count: u32,
    ) -> (Duration, u32) {
        let (mut looked, mut sleeps) = (Duration::ZERO, 0);
        for _ in 0..count {
            if gap < polling.window() {
                looked += gap;
                *now += gap;
                polling.found();
                continue;
            }
            looked += polling.window();
            sleeps += 1;
            *now += gap + wake;
            polling.slept(gap + wake, *now);
        }
        (looked, sleeps)
    }

    /// A processor that wakes quickly, and one that does not.
    const WAKES: [Duration; 2] = [us(4), us(45)];

    #[test]
    fn a_queue_looks_as_long_as_its_guest_is_quick() {
        // (µs between an answer and the next request, sleeps of 10,000, most µs of looking for each)
        let cases = [
            (1, 1, 1.0),
            (10, 1, 10.0),
            (30, 3, 30.0),
            // What comes later than it would ever look for is hardly looked for.
            (52, 10_000, 0.2),
            (90, 10_000, 0.2),
            (110, 10_000, 0.0),
            (1000, 10_000, 0.0),
            (1_000_000, 10_000, 0.0),
        ];
        for (wake, (gap, most_sleeps, most)) in
            WAKES.into_iter().flat_map(|w| cases.map(|c| (w, c)))
        {
            let (mut polling, mut now) = (Polling::new(BusyPoll::Auto), Instant::now());
            let (looked, sleeps) = live(&mut polling, &mut now, (us(gap), wake), 10_000);
            assert!(sleeps <= most_sleeps, "{gap} µs, {wake:?}: {sleeps} sleeps");
            let most = us(1).mul_f64(most * 10_000.0);
            assert!(looked <= most, "{gap} µs, {wake:?}: looked for {looked:?}");
        }
    }

    #[test]
    fn who_has_looked_in_vain_looks_again_when_that_is_of_use() {
        let (mut polling, mut now) = (Polling::new(BusyPoll::Auto), Instant::now());
        live(&mut polling, &mut now, (us(60), us(4)), 100_000);
        let (_, sleeps) = live(&mut polling, &mut now, (us(20), us(4)), 10_000);
        assert!(sleeps < 2 * SKIPS, "{sleeps}");
        assert_eq!(live(&mut polling, &mut now, (us(20), us(4)), 1000), (us(20_000), 0));
    }

    #[test]
    fn one_long_sleep_ends_it() {
        let (mut polling, mut now) = (Polling::new(BusyPoll::Auto), Instant::now());
        live(&mut polling, &mut now, (us(30), us(45)), 10);
        assert_eq!(polling.window(), MOST);
        // A miss of this length at most is what a guest that falls silent costs.
        assert_eq!(live(&mut polling, &mut now, (us(5000), us(45)), 1), (MOST, 1));
        assert_eq!(polling.window(), Duration::ZERO);
    }

    #[test]
    fn who_loses_the_processor_stops_looking_for_longer_each_time() {
        let (mut polling, mut now) = (Polling::new(BusyPoll::Auto), Instant::now());
        for pause in [20, 40, 80, 160, 320, 640, 1280, 1280].map(Duration::from_millis) {
            live(&mut polling, &mut now, (us(5), us(4)), 10);
            assert!(!polling.window().is_zero());
            polling.lost_processor(now);
            let until = now + pause;
            while now + us(100) < until {
                assert!(polling.window().is_zero(), "{pause:?}");
                live(&mut polling, &mut now, (us(5), us(4)), 1);
            }
            now = until;
        }
        // After a time of peace as long as the last pause it begins anew.
        now += PAUSES[1] * 2;
        polling.lost_processor(now);
        assert_eq!(polling.paused_until, Some(now + PAUSES[0]));
    }

    #[test]
    fn a_time_that_was_given_is_kept() {
        for time in [Duration::ZERO, us(200)] {
            let (mut polling, now) = (Polling::new(BusyPoll::For(time)), Instant::now());
            assert!(!polling.learns());
            polling.slept(us(1), now);
            polling.slept(us(10_000), now);
            assert_eq!(polling.window(), time);
        }
    }
}
