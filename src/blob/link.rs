//! The way to a source of blobs: how long an answer takes, how many bytes per second it carries, and
//! who may use it.
//!
//! Both figures are measured from the reads that happen anyway. Single measurements lie: an answer
//! waits behind others, bytes have piled up while nobody looked. So the latency is a low quantile of
//! the last measurements, the bandwidth a high one. Their product is what the link carries in the
//! time of one answer: so many bytes more in a request cost no more than a request more.
//!
//! How much is guessed follows from the distance, one of the least latencies of a longer time. Connection and
//! token come before the first answer, and a busy host leaves answers lying; if that counted, guesses would
//! feed on themselves: what they cost its processors makes a near registry look far away, which would be a
//! reason to guess more.
//!
//! What nobody waits for is bounded in bytes, by the same product: whoever comes next never finds
//! more than that in front of it. Guesses are sent one after the other, each when the link will be free for
//! its answer ([`Link::turn`]).

use std::pin::pin;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::gate::{Class, Gate, Limits, Permit};
use super::line::Line;

/// Requests on their way to one source at once, and the parts that less urgent ones may have.
const MAX_REQUESTS: Limits = [64, 40, 40, 16];
/// Bandwidth that is assumed before it is measured, in bytes per second.
const FIRST_BANDWIDTH: u64 = 16 << 20;
/// Bytes that may be on their way for nobody in particular, in products of latency and bandwidth:
/// enough that the link never runs dry while requests begin and end. What was named in advance will
/// be wanted, so it may have more than what is guessed.
const LISTED_PRODUCTS: u64 = 4;
const LOW_PRODUCTS: u64 = 2;
/// Bounds of both, and what they are before the bandwidth was measured.
const LOW_BYTES: std::ops::RangeInclusive<u64> = (256 << 10)..=(16 << 20);
const FIRST_LISTED_BYTES: u64 = 2 << 20;
const FIRST_LOW_BYTES: u64 = 1 << 20;
/// A shorter latency is that of this host; nothing is gained by asking early.
const NEAR: Duration = Duration::from_millis(1);
/// From this latency on as much is asked for early as the link carries in its time; with half of it, a
/// quarter of that: a miss costs little where answers come soon, a guess what it always costs.
const FAR: Duration = Duration::from_micros(4500);
/// Most bytes asked for ahead of one reader: so many products of latency and bandwidth.
const MAX_WINDOW: u64 = 4;
/// Longest time for which a guess waits for the link: what is on its way may never come.
const MAX_TURN: Duration = Duration::from_secs(1);
/// How often it is looked whether a guess may be sent, and how early it may be, so that the link
/// does not run dry in between.
const LOOK_AGAIN: Duration = Duration::from_millis(2);
const EARLY: Duration = Duration::from_millis(2);
/// One guess has at most one in so many of the bytes that the link carries in the time of an answer, so that
/// whoever comes just behind it waits for no more; but so many bytes are worth a request.
const PIECES: u64 = 4;
const LEAST_PIECE: u64 = 64 << 10;
/// For so many latencies after the last demand more demand is expected.
const DEMAND_LINGERS: u32 = 2;
/// So long after it is first known, a source is kept free for the first demand: what is mounted is about to be read.
const FIRST_DEMAND: Duration = Duration::from_millis(500);

/// See the module's documentation.
pub struct Link {
    /// One permit for each request.
    pub requests: Arc<Gate>,
    /// One permit for each stored byte that was asked for early and has not come.
    pub early: Arc<Gate>,
    /// For the one who waits until a guess may be sent.
    turn: Arc<Gate>,
    line: Mutex<Line>,
    measured: Mutex<Measured>,
    /// Requests that somebody waits for, and those of them whose bytes are coming.
    demand: AtomicU32,
    streaming: AtomicU32,
    /// When demand was there last, in milliseconds since `epoch`.
    last_demand_ms: AtomicU64,
    epoch: Instant,
    /// Until when the first demand is expected.
    first_demand: Instant,
    /// Wakes those that give way, when they need not any more, and those that know nothing, after the
    /// first answer.
    pub changed: Notify,
}

impl Link {
    pub fn new(epoch: Instant) -> Link {
        let measured = Mutex::<Measured>::default();
        let limits = measured.lock().unwrap_or_else(PoisonError::into_inner).early_limits(true);
        Link {
            requests: Gate::new(MAX_REQUESTS),
            early: Gate::new(limits),
            turn: Gate::new([1; 4]),
            line: Mutex::default(),
            measured,
            demand: AtomicU32::new(0),
            streaming: AtomicU32::new(0),
            last_demand_ms: AtomicU64::new(0),
            epoch,
            first_demand: Instant::now() + FIRST_DEMAND,
            changed: Notify::new(),
        }
    }

    fn measured(&self) -> MutexGuard<'_, Measured> {
        self.measured.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Time from a request to the first byte of its answer, `None` before it was measured, and bytes
    /// per second.
    pub fn estimate(&self) -> (Option<Duration>, u64) {
        let measured = self.measured();
        (measured.latency(), measured.bandwidth())
    }

    /// Bytes that the link carries in the time of one answer. 0 before the latency is known, and
    /// for sources of this host: then there is nothing to be gained by asking early.
    pub fn product(&self) -> u64 {
        self.measured().product()
    }

    /// Bytes worth asking for early because somebody waits: what comes in the time of an answer, and
    /// less from a source that is near, as a wait for it costs little. 0 as for [`Link::product`].
    pub fn width(&self) -> u64 {
        self.measured().width()
    }

    /// Bytes worth asking for ahead of a reader that took `read` bytes in order: twice as many, less if the
    /// source is near, at most a few products.
    pub fn window(&self, read: u64) -> u64 {
        self.measured().window(read)
    }

    /// Requests on their way.
    pub fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the answer to a guess that is sent now would find the link free. Only one guess waits: the
    /// next one when the permit is dropped.
    pub async fn turn(&self) -> Permit {
        let permit = self.turn.pass(Class::ReadAhead, 1).await;
        let start = Instant::now();
        loop {
            let taken = match self.known() {
                Some((latency, bandwidth)) => self.line().taken(Instant::now(), latency, bandwidth),
                None => Duration::ZERO,
            };
            if taken <= EARLY || start.elapsed() >= MAX_TURN {
                return permit;
            }
            tokio::time::sleep((taken - EARLY).min(LOOK_AGAIN)).await;
        }
    }

    /// Most bytes of one guess.
    pub fn piece(&self) -> u64 {
        match self.known() {
            Some(_) => (self.product() / PIECES).max(LEAST_PIECE),
            None => u64::MAX,
        }
    }

    /// Latency and bandwidth, once both were measured. As long as the link is too quick for that, there is
    /// nothing to be kept free.
    fn known(&self) -> Option<(Duration, u64)> {
        let measured = self.measured();
        Some((measured.latency()?, measured.bandwidths.high()?))
    }

    /// Waits until the first answer has come: then something is known.
    pub async fn measured_once(&self) {
        loop {
            let mut changed = pin!(self.changed.notified());
            changed.as_mut().enable();
            if self.estimate().0.is_some() {
                return;
            }
            changed.await;
        }
    }

    /// The first bytes of an answer came, `latency` after its request.
    pub fn answered(&self, latency: Duration) {
        let mut measured = self.measured();
        let first = measured.latency().is_none();
        measured.answered(latency);
        drop(measured);
        self.refresh();
        if first {
            self.changed.notify_waiters();
        }
    }

    /// A chunk was there `latency` after it was looked for at a source of this host.
    pub fn answered_here(&self, latency: Duration) {
        self.measured().answered(latency);
    }

    /// Is the source known to be on this host?
    pub fn is_here(&self) -> bool {
        self.measured().distance().is_some_and(|distance| distance < NEAR)
    }

    /// Sets the bounds anew: the estimates or the demand may have changed.
    pub fn refresh(&self) {
        let demand = self.expects_demand();
        let limits = self.measured().early_limits(demand);
        self.early.set_limits(limits);
    }

    fn expects_demand(&self) -> bool {
        if self.demand.load(Ordering::Relaxed) > 0 {
            return true;
        }
        let last = self.last_demand_ms.load(Ordering::Relaxed);
        if last == 0 {
            return Instant::now() < self.first_demand;
        }
        let lingers = self.estimate().0.unwrap_or_default() * DEMAND_LINGERS;
        self.epoch.elapsed() < Duration::from_millis(last) + lingers
    }

    /// Somebody waits for a request, until the guard is dropped.
    pub fn demand(self: &Arc<Self>) -> Demand {
        self.demand.fetch_add(1, Ordering::Relaxed);
        self.refresh();
        Demand { link: self.clone(), streams: false }
    }

    /// Is somebody waiting whose bytes are coming? Then the rest should not take bandwidth.
    pub fn is_wanted(&self) -> bool {
        self.streaming.load(Ordering::Relaxed) > 0
    }

    /// The bytes of a request have begun to come.
    pub fn stream(self: &Arc<Self>) -> Stream {
        self.measured().meter.begin(Instant::now());
        Stream { link: self.clone(), open: true }
    }
}

/// A request that somebody waits for.
pub struct Demand {
    link: Arc<Link>,
    streams: bool,
}

impl Demand {
    /// Its bytes have begun to come.
    pub fn streams(&mut self) {
        if !std::mem::replace(&mut self.streams, true) {
            self.link.streaming.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Demand {
    fn drop(&mut self) {
        let link = &self.link;
        let now = u64::try_from(link.epoch.elapsed().as_millis()).unwrap_or(u64::MAX);
        link.last_demand_ms.store(now.max(1), Ordering::Relaxed);
        link.demand.fetch_sub(1, Ordering::Relaxed);
        if self.streams && link.streaming.fetch_sub(1, Ordering::Relaxed) == 1 {
            link.changed.notify_waiters();
        }
        link.refresh();
    }
}

/// A request whose bytes are coming: what it receives measures the bandwidth.
pub struct Stream {
    link: Arc<Link>,
    open: bool,
}

impl Stream {
    pub fn received(&self, bytes: usize) {
        if self.open && self.link.measured().received(Instant::now(), bytes as u64) {
            self.link.refresh();
        }
    }

    /// Nobody takes its bytes for a while, so they measure nothing.
    pub fn pause(&mut self) {
        if std::mem::replace(&mut self.open, false) && self.link.measured().ended(Instant::now()) {
            self.link.refresh();
        }
    }

    /// They are taken again.
    pub fn resume(&mut self) {
        if !std::mem::replace(&mut self.open, true) {
            self.link.measured().meter.begin(Instant::now());
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.pause();
    }
}

/// The figures of a link.
#[derive(Default)]
struct Measured {
    /// In microseconds.
    latencies: Samples<16>,
    /// The same, of a longer time.
    distances: Samples<64>,
    /// In bytes per second.
    bandwidths: Samples<16>,
    meter: Meter,
}

impl Measured {
    /// How long an answer takes as things are.
    fn latency(&self) -> Option<Duration> {
        self.latencies.quarter().map(Duration::from_micros)
    }

    /// How long an answer takes from a source as near as this one has been.
    fn distance(&self) -> Option<Duration> {
        let least = self.distances.lowest().map(Duration::from_micros)?;
        if least < FAR { Some(least) } else { self.latency() }
    }

    fn answered(&mut self, latency: Duration) {
        let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        self.latencies.add(micros);
        self.distances.add(micros);
    }

    fn bandwidth(&self) -> u64 {
        self.bandwidths.high().unwrap_or(FIRST_BANDWIDTH)
    }

    fn product(&self) -> u64 {
        match self.distance() {
            Some(latency) if latency >= NEAR => {
                let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
                self.bandwidth().saturating_mul(micros) / 1_000_000
            }
            _ => 0,
        }
    }

    fn width(&self) -> u64 {
        let far = FAR.as_micros();
        let latency = self.distance().unwrap_or_default().as_micros().min(far);
        let width = u128::from(self.product()) * latency * latency / (far * far);
        u64::try_from(width).unwrap_or(u64::MAX)
    }

    fn window(&self, read: u64) -> u64 {
        let far = FAR.as_micros();
        let latency = self.distance().unwrap_or_default().as_micros().min(far);
        let window = u128::from(read) * 2 * (2 * latency).min(far) / far;
        u64::try_from(window).unwrap_or(u64::MAX).min(MAX_WINDOW * self.product())
    }

    fn early_limits(&self, demand: bool) -> Limits {
        let bytes = |products: u64, first: u64| match self.bandwidths.values.is_empty() {
            true => first,
            false => (products * self.product()).clamp(*LOW_BYTES.start(), *LOW_BYTES.end()),
        };
        let low = bytes(LOW_PRODUCTS, FIRST_LOW_BYTES);
        let listed = bytes(LISTED_PRODUCTS, FIRST_LISTED_BYTES);
        // Filling can wait: it begins nothing as long as there is demand.
        [u64::MAX, listed, low, if demand { 0 } else { low }]
    }

    /// True if the estimate may have changed.
    fn received(&mut self, now: Instant, bytes: u64) -> bool {
        let sample = self.meter.received(now, bytes);
        if let Some(bandwidth) = sample {
            self.bandwidths.add(bandwidth);
        }
        sample.is_some()
    }
}

impl Measured {
    /// A stream has ended. True if the estimate may have changed: what came too quickly to be measured
    /// shows that the link is quicker than was thought.
    fn ended(&mut self, now: Instant) -> bool {
        let least = self.meter.end(now);
        let better = least.filter(|rate| self.bandwidths.high().is_none_or(|b| b < *rate));
        if let Some(rate) = better {
            self.bandwidths.add(rate);
        }
        better.is_some()
    }
}

/// The last `KEPT` measurements of something.
#[derive(Default)]
struct Samples<const KEPT: usize> {
    /// At most `KEPT`, the next to be replaced at `next`.
    values: Vec<u64>,
    next: usize,
    sorted: Vec<u64>,
}

impl<const KEPT: usize> Samples<KEPT> {
    fn add(&mut self, value: u64) {
        if self.values.len() < KEPT {
            self.values.push(value);
        } else {
            self.values[self.next] = value;
            self.next = (self.next + 1) % KEPT;
        }
        self.sorted.clone_from(&self.values);
        self.sorted.sort_unstable();
    }

    /// The least, or, of more than 32, the second: the least may be an accident.
    fn lowest(&self) -> Option<u64> {
        self.sorted.get(self.sorted.len().saturating_sub(1) / 32).copied()
    }

    /// The value that a quarter of the measurements do not exceed.
    fn quarter(&self) -> Option<u64> {
        let last = self.sorted.len().checked_sub(1)?;
        Some(self.sorted[last.div_ceil(4)])
    }

    /// The value that three quarters of the measurements do not exceed.
    fn high(&self) -> Option<u64> {
        let last = self.sorted.len().checked_sub(1)?;
        Some(self.sorted[(last * 3).div_ceil(4)])
    }
}

/// Measures bandwidth while bytes come on at least one stream, all streams together.
#[derive(Default)]
struct Meter {
    streams: u32,
    since: Option<Instant>,
    bytes: u64,
}

impl Meter {
    /// Bytes of one measurement, at least; it takes as long at least, unless far more bytes came.
    const MIN_BYTES: u64 = 32 << 10;
    const MIN_TIME: Duration = Duration::from_millis(2);
    const MANY: u64 = 4 << 20;

    fn begin(&mut self, now: Instant) {
        self.streams += 1;
        if self.streams == 1 {
            (self.since, self.bytes) = (Some(now), 0);
        }
    }

    /// What the link carries at least, in bytes per second, if much came in less than the time of a measurement.
    fn end(&mut self, now: Instant) -> Option<u64> {
        self.streams = self.streams.saturating_sub(1);
        if self.streams > 0 {
            return None;
        }
        let took = now.saturating_duration_since(self.since.take()?);
        let quick = took < Self::MIN_TIME && self.bytes >= Self::MIN_BYTES;
        let micros = u64::try_from(Self::MIN_TIME.as_micros()).unwrap_or(u64::MAX);
        quick.then(|| self.bytes.saturating_mul(1_000_000) / micros)
    }

    /// A measurement, in bytes per second, if it is time for one.
    fn received(&mut self, now: Instant, bytes: u64) -> Option<u64> {
        self.bytes += bytes;
        let took = now.saturating_duration_since(self.since?);
        let long = took >= Self::MIN_TIME && self.bytes >= Self::MIN_BYTES;
        if !long && (self.bytes < Self::MANY || took.is_zero()) {
            return None;
        }
        let micros = took.as_micros().max(1);
        let rate = u128::from(self.bytes) * 1_000_000 / micros;
        (self.since, self.bytes) = (Some(now), 0);
        u64::try_from(rate).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const MS: Duration = Duration::from_millis(1);

    /// Feeds `measured` with one stream of `rate` bytes per second in pieces of 64 KiB, for `time`.
    fn stream(measured: &mut Measured, start: Instant, rate: u64, time: Duration) -> Instant {
        let piece = 64 << 10;
        let step = Duration::from_secs_f64(piece as f64 / rate as f64);
        let mut now = start;
        measured.meter.begin(now);
        while now < start + time {
            now += step;
            measured.received(now, piece);
        }
        measured.ended(now);
        now
    }

    #[test]
    fn nothing_is_asked_early_before_anything_was_measured() {
        let measured = Measured::default();
        assert_eq!(measured.product(), 0);
        assert_eq!(measured.bandwidth(), FIRST_BANDWIDTH);
        assert_eq!(measured.early_limits(false), [u64::MAX, 2 * MIB, MIB, MIB]);
    }

    #[test]
    fn estimates_follow_the_link_and_not_the_noise() {
        let mut measured = Measured::default();
        let mut now = Instant::now();
        for i in 0..40u64 {
            // Most answers are late, by very different times; one comes from a cache on the way.
            let late = if i % 3 == 0 { i % 5 } else { 7 * i % 400 };
            let us = if i == 37 { 300 } else { 20_000 + late * 1000 };
            measured.answered(Duration::from_micros(us));
            now = stream(&mut measured, now, 50 * MIB, 20 * MS);
            // A reader that was busy finds everything at once; a source stutters.
            measured.meter.begin(now);
            measured.received(now, 300_000);
            measured.received(now + 80 * MS, 300_000);
            measured.ended(now + 80 * MS);
            now += 100 * MS;
        }
        let latency = measured.latency().unwrap();
        assert!((20 * MS..26 * MS).contains(&latency), "{latency:?}");
        let bandwidth = measured.bandwidth();
        assert!((45 * MIB..56 * MIB).contains(&bandwidth), "{bandwidth}");
        // The link becomes a slow one.
        for _ in 0..64 {
            measured.answered(Duration::from_micros(100_000));
            now = stream(&mut measured, now, MIB, 500 * MS);
        }
        assert_eq!(measured.latency(), Some(100 * MS));
        let product = measured.product();
        assert!((90_000..120_000).contains(&product), "{product}");
    }

    #[test]
    fn a_busy_host_and_the_first_connection_do_not_make_a_source_far_away() {
        let mut measured = Measured::default();
        measured.answered(Duration::from_micros(90_000)); // with a handshake and a token
        for i in 0..200u64 {
            // Answers wait for a processor, most of them long.
            measured.answered(Duration::from_micros(1200 + i * 37 % 32 * 1000));
            assert!(measured.distance().unwrap() <= 2200 * MS / 1000 || i < 31, "{i}");
        }
        measured.bandwidths.add(100 * MIB);
        assert!(measured.width() < 64 << 10, "{}", measured.width());
    }

    #[test]
    fn a_source_of_this_host_is_never_asked_early() {
        let mut measured = Measured::default();
        for _ in 0..4 {
            measured.answered(Duration::from_micros(200));
        }
        stream(&mut measured, Instant::now(), 2 << 30, 100 * MS);
        assert_eq!(measured.product(), 0);
    }

    #[test]
    fn the_nearer_a_source_the_less_is_guessed() {
        // (latency in ms, bytes at 100 MiB/s)
        let cases = [(1, 5178), (2, 41_425), (4, 331_401), (5, MIB / 2), (10, MIB), (20, 2 * MIB)];
        for (ms, want) in cases {
            let mut measured = Measured::default();
            measured.answered(Duration::from_micros(ms * 1000));
            measured.bandwidths.add(100 * MIB);
            assert_eq!(measured.width(), want, "{ms} ms");
        }
        // (latency in ms, ahead of a reader that took 1 MiB, ahead of one that took 100)
        let cases = [
            (1, 419_428, 419_428),
            (2, 838_860, 838_860),
            (5, 2 * MIB, 2 * MIB),
            (10, 2 * MIB, 4 * MIB),
        ];
        for (ms, first, last) in cases {
            let mut measured = Measured::default();
            measured.answered(Duration::from_micros(ms * 1000));
            measured.bandwidths.add(100 * MIB);
            assert_eq!(
                (measured.window(MIB), measured.window(100 * MIB)),
                (first, last),
                "{ms} ms"
            );
        }
        let mut measured = Measured::default();
        assert_eq!(measured.width(), 0, "not measured");
        measured.answered(Duration::from_micros(900));
        assert_eq!(measured.width(), 0, "this host");
    }

    #[test]
    fn small_answers_measure_no_bandwidth() {
        let mut measured = Measured::default();
        let now = Instant::now();
        for i in 0..100u32 {
            measured.meter.begin(now + i * 20 * MS);
            measured.received(now + i * 20 * MS, 5000);
            measured.ended(now + i * 20 * MS);
        }
        assert_eq!(measured.bandwidth(), FIRST_BANDWIDTH);
    }

    #[test]
    fn a_link_that_becomes_quicker_is_found_out() {
        let (mut measured, mut now) = (Measured::default(), Instant::now());
        for _ in 0..16 {
            measured.bandwidths.add(10 * MIB);
        }
        for _ in 0..16 {
            // A guess of 256 KiB that comes within a quarter of a millisecond.
            measured.meter.begin(now);
            measured.received(now + MS / 4, 256 << 10);
            measured.ended(now + MS / 4);
            now += 20 * MS;
        }
        assert_eq!(measured.bandwidth(), 125 * MIB, "so much in 2 ms at least");
        // One that is known to be quicker is not made slower by it.
        measured.bandwidths = Samples::default();
        measured.bandwidths.add(1000 * MIB);
        measured.meter.begin(now);
        measured.received(now, 256 << 10);
        assert!(!measured.ended(now + MS / 4));
        assert_eq!(measured.bandwidth(), 1000 * MIB);
    }

    #[test]
    fn early_bytes_are_bounded_by_what_the_link_carries() {
        let mut measured = Measured::default();
        measured.answered(Duration::from_micros(20_000));
        for _ in 0..16 {
            measured.bandwidths.add(100 * MIB);
        }
        assert_eq!(measured.product(), 2 * MIB);
        // (demand, limits)
        let (listed, low) = (8 * MIB, 4 * MIB);
        let cases = [(false, [u64::MAX, listed, low, low]), (true, [u64::MAX, listed, low, 0])];
        for (demand, want) in cases {
            assert_eq!(measured.early_limits(demand), want, "{demand}");
        }
        (measured.latencies, measured.distances) = Default::default();
        measured.answered(Duration::from_micros(2_000_000));
        assert_eq!(measured.early_limits(true)[1], 16 * MIB);
    }

    #[test]
    fn demand_is_expected_for_a_while_after_it_was_there() {
        let begin = Instant::now() - Duration::from_secs(1);
        let mut link = Link::new(begin);
        assert!(link.expects_demand(), "the first is");
        assert_eq!(Measured::default().early_limits(true)[3], 0, "so nothing is filled");
        link.first_demand = begin + FIRST_DEMAND;
        let link = Arc::new(link);
        link.answered(Duration::from_secs(5));
        assert!(!link.expects_demand());
        let mut demand = link.demand();
        assert!(link.expects_demand() && !link.is_wanted());
        demand.streams();
        assert!(link.is_wanted());
        drop(demand);
        assert!(link.expects_demand() && !link.is_wanted());
        link.last_demand_ms.store(1, Ordering::Relaxed);
        *link.measured() = Measured::default();
        link.answered(10 * MS);
        assert!(!link.expects_demand());
    }
}
