//! Threads for system calls that may take long.
//!
//! Started when there is work for them and none is free, up to a bound; they end when there is
//! nothing to do for a while. Work that finds no thread waits in line. How much there can be is
//! bounded by bytes, too: who exceeds them does the work itself and so takes in no more meanwhile.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// Threads at most.
const THREADS: usize = 64;
/// How long a thread waits for more work.
const IDLE: Duration = Duration::from_secs(2);
/// Bytes of a thread's stack: nothing here recurses or keeps buffers on it.
const STACK: usize = 256 * 1024;
/// Bytes that requests and answers of waiting work may hold together.
const BUDGET: usize = 64 << 20;

type Job = Box<dyn FnOnce() + Send>;

/// A bounded pool of threads. Clones are one and the same.
#[derive(Clone)]
pub(super) struct Pool(Arc<Inner>);

struct Inner {
    state: Mutex<State>,
    work: Condvar,
    /// Run once by each thread before its first work.
    prepare: fn(),
}

#[derive(Default)]
struct State {
    jobs: VecDeque<(Job, usize)>,
    threads: usize,
    idle: usize,
    /// Of all jobs that are not done.
    bytes: usize,
}

impl Pool {
    /// A pool without threads; each runs `prepare` when it starts.
    pub(super) fn new(prepare: fn()) -> Pool {
        Pool(Arc::new(Inner { state: Mutex::default(), work: Condvar::new(), prepare }))
    }

    /// Has `job`, which holds so many bytes, done by a thread. Gives it back if the budget is used
    /// up or no thread can be started.
    pub(super) fn run<J: FnOnce() + Send + 'static>(&self, bytes: usize, job: J) -> Result<(), J> {
        let mut state = self.0.lock();
        if state.bytes > 0 && state.bytes.saturating_add(bytes) > BUDGET {
            return Err(job);
        }
        if state.idle <= state.jobs.len() && state.threads < THREADS {
            match start(&self.0) {
                Ok(()) => state.threads += 1,
                Err(e) if state.threads == 0 => {
                    log::error!("no thread for host files: {e}");
                    return Err(job);
                }
                Err(_) => {}
            }
        }
        state.bytes += bytes;
        state.jobs.push_back((Box::new(job), bytes));
        drop(state);
        self.0.work.notify_one();
        Ok(())
    }

    /// Threads there are now.
    #[cfg(test)]
    pub(super) fn threads(&self) -> usize {
        self.0.lock().threads
    }
}

fn start(inner: &Arc<Inner>) -> io::Result<()> {
    let inner = Arc::clone(inner);
    let thread = thread::Builder::new().name("passthrough".into()).stack_size(STACK);
    thread.spawn(move || inner.work()).map(drop)
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a thread does.
    fn work(self: &Arc<Self>) {
        (self.prepare)();
        let mut state = self.lock();
        loop {
            if let Some((job, bytes)) = state.jobs.pop_front() {
                drop(state);
                // It was logged when it happened; whoever waits for the job finds it dropped.
                let panicked = catch_unwind(AssertUnwindSafe(job)).is_err();
                state = self.lock();
                state.bytes -= bytes;
                if panicked {
                    // Who knows what the thread is now: another takes its place.
                    if start(self).is_err() {
                        state.threads -= 1;
                    }
                    return;
                }
                continue;
            }
            state.idle += 1;
            let (next, waited) =
                self.work.wait_timeout(state, IDLE).unwrap_or_else(PoisonError::into_inner);
            state = next;
            state.idle -= 1;
            if waited.timed_out() && state.jobs.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Instant;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(30);

    fn pool() -> Pool {
        Pool::new(|| {})
    }

    #[test]
    fn work_runs_at_the_same_time_up_to_a_bound() {
        let pool = pool();
        let (go, held) = crossbeam_channel::bounded::<()>(0);
        let (done, finished) = mpsc::channel();
        for number in 0..THREADS + 10 {
            let (held, done) = (held.clone(), done.clone());
            let job = move || {
                let _ = held.recv();
                done.send(number).unwrap();
            };
            assert!(pool.run(1, job).is_ok());
        }
        assert_eq!(pool.threads(), THREADS, "the rest waits in line");
        drop(go);
        let mut numbers: Vec<_> =
            (0..THREADS + 10).map(|_| finished.recv_timeout(LIMIT).unwrap()).collect();
        numbers.sort_unstable();
        assert_eq!(numbers, (0..THREADS + 10).collect::<Vec<_>>());
        let deadline = Instant::now() + LIMIT;
        while pool.threads() > 0 {
            assert!(Instant::now() < deadline, "idle threads end");
            thread::sleep(Duration::from_millis(20));
        }
    }

    #[test]
    fn bytes_are_bounded_but_one_job_always_fits() {
        let pool = pool();
        let (go, held) = crossbeam_channel::bounded::<()>(0);
        let job = move || {
            let _ = held.recv();
        };
        assert!(pool.run(BUDGET * 2, job).is_ok());
        assert!(pool.run(1, || {}).is_err(), "given back");
        drop(go);
    }

    #[test]
    fn a_panic_costs_one_job() {
        let pool = pool();
        let (done, finished) = mpsc::channel();
        for number in 0..20 {
            let done = done.clone();
            let job = move || {
                assert!(number % 2 == 0, "a panic on purpose");
                done.send(number).unwrap();
            };
            assert!(pool.run(1, job).is_ok());
            thread::sleep(Duration::from_millis(1));
        }
        drop(done);
        let mut numbers: Vec<_> = finished.into_iter().collect();
        numbers.sort_unstable();
        assert_eq!(numbers, (0..20).step_by(2).collect::<Vec<_>>());
    }
}
