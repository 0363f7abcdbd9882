//! Who may start: a bound that several classes of work share, the urgent ones first.
//!
//! A [`Gate`] hands out permits for an amount (bytes, requests, workers). Nobody passes who is less
//! urgent than somebody who waits, and less urgent classes get a part of the whole only, so that
//! demand finds room at once. Waiting holds no thread; a waiter that goes away costs nothing.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// How urgent work is, most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// Somebody waits for it.
    Demand,
    /// It was named in advance, by the image or a list.
    Prefetch,
    /// A guess: somebody will want it soon.
    ReadAhead,
    /// The rest of an image that is to be fetched whole.
    Fill,
}

impl Class {
    pub const ALL: [Class; 4] = [Class::Demand, Class::Prefetch, Class::ReadAhead, Class::Fill];

    /// Label of the metric.
    pub fn label(self) -> &'static str {
        match self {
            Class::Demand => "demand",
            Class::Prefetch => "prefetch",
            Class::ReadAhead => "read_ahead",
            Class::Fill => "fill",
        }
    }
}

/// Most that each class may have together with all less urgent ones, in the order of
/// [`Class::ALL`]. A single larger amount is let through when they have nothing else, but for 0.
pub type Limits = [u64; 4];

/// See the module's documentation.
pub struct Gate {
    state: Mutex<State>,
}

struct State {
    limits: Limits,
    used: [u64; 4],
    waiting: [VecDeque<Waiting>; 4],
}

struct Waiting {
    amount: u64,
    grant: oneshot::Sender<Permit>,
}

impl Gate {
    pub fn new(limits: Limits) -> Arc<Gate> {
        let state = State { limits, used: [0; 4], waiting: Default::default() };
        Arc::new(Gate { state: Mutex::new(state) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for `amount`.
    pub async fn pass(self: &Arc<Self>, class: Class, amount: u64) -> Permit {
        let granted = {
            let mut state = self.lock();
            let first = state.waiting[..=class as usize].iter().all(VecDeque::is_empty);
            if first && state.fits(class, amount) {
                state.used[class as usize] += amount;
                return Permit { gate: self.clone(), class, amount };
            }
            let (grant, granted) = oneshot::channel();
            state.waiting[class as usize].push_back(Waiting { amount, grant });
            granted
        };
        self.open(); // those before us may have gone away
        match granted.await {
            Ok(permit) => permit,
            Err(_) => std::future::pending().await, // the gate is `self`: it is not dropped
        }
    }

    /// What each class has now.
    #[cfg(test)]
    pub fn used(&self) -> [u64; 4] {
        self.lock().used
    }

    pub fn set_limits(self: &Arc<Self>, limits: Limits) {
        let mut state = self.lock();
        let more = limits.iter().zip(&state.limits).any(|(new, old)| new > old);
        state.limits = limits;
        drop(state);
        if more {
            self.open();
        }
    }

    /// Lets through whoever may pass now.
    fn open(self: &Arc<Self>) {
        loop {
            let mut state = self.lock();
            let Some((class, waiting)) = state.next() else { return };
            state.used[class as usize] += waiting.amount;
            drop(state);
            let permit = Permit { gate: self.clone(), class, amount: waiting.amount };
            // If the waiter is gone, the permit comes back and is given up here.
            if let Err(permit) = waiting.grant.send(permit) {
                permit.cancel();
            }
        }
    }
}

impl State {
    fn fits(&self, class: Class, amount: u64) -> bool {
        (0..=class as usize).all(|i| {
            let used: u64 = self.used[i..].iter().sum();
            let alone = used == 0 && self.limits[i] > 0;
            alone || used.saturating_add(amount) <= self.limits[i]
        })
    }

    /// Takes the first waiter of the most urgent class that has one, if there is room for it.
    fn next(&mut self) -> Option<(Class, Waiting)> {
        for class in Class::ALL {
            let queue = &mut self.waiting[class as usize];
            while queue.front().is_some_and(|waiting| waiting.grant.is_closed()) {
                queue.pop_front();
            }
            if let Some(first) = self.waiting[class as usize].front() {
                if !self.fits(class, first.amount) {
                    return None;
                }
                return self.waiting[class as usize].pop_front().map(|first| (class, first));
            }
        }
        None
    }
}

/// An amount that was let through; given back when dropped.
pub struct Permit {
    gate: Arc<Gate>,
    class: Class,
    amount: u64,
}

impl Permit {
    /// Splits off `amount`, or all that is left of it.
    pub fn split(&mut self, amount: u64) -> Permit {
        let amount = amount.min(self.amount);
        self.amount -= amount;
        Permit { gate: self.gate.clone(), class: self.class, amount }
    }

    /// Gives the amount back, without letting others through.
    fn cancel(mut self) {
        self.gate.lock().used[self.class as usize] -= std::mem::take(&mut self.amount);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if self.amount > 0 {
            self.gate.lock().used[self.class as usize] -= self.amount;
            self.gate.open();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Class::{Demand, Fill, Prefetch, ReadAhead};
    use futures_util::FutureExt;

    /// The permit, if there is room at once.
    fn try_pass(gate: &Arc<Gate>, class: Class, amount: u64) -> Option<Permit> {
        gate.pass(class, amount).now_or_never()
    }

    #[test]
    fn each_class_leaves_room_for_more_urgent_ones() {
        let gate = Gate::new([10, 7, 6, 4]);
        let fill = try_pass(&gate, Fill, 4).expect("its own limit");
        assert!(try_pass(&gate, Fill, 1).is_none(), "more than its limit");
        let ahead = try_pass(&gate, ReadAhead, 2).expect("6 for both");
        assert!(try_pass(&gate, ReadAhead, 1).is_none());
        let listed = try_pass(&gate, Prefetch, 1).expect("7 for what nobody waits for");
        let demand = try_pass(&gate, Demand, 3).expect("10 for all");
        assert!(try_pass(&gate, Demand, 1).is_none());
        assert_eq!(gate.used(), [3, 1, 2, 4]);
        drop((fill, ahead, listed, demand));
        assert_eq!(gate.used(), [0; 4]);
    }

    #[test]
    fn a_larger_amount_passes_alone() {
        let gate = Gate::new([10, 5, 5, 5]);
        let large = try_pass(&gate, Demand, 100).expect("nobody else is there");
        assert!(try_pass(&gate, Demand, 1).is_none());
        drop(large);
        let large = try_pass(&gate, Prefetch, 7).expect("alone in its class");
        assert!(try_pass(&gate, Demand, 3).is_some(), "and no bar to others");
        drop(large);
        gate.set_limits([10, 5, 5, 0]);
        assert!(try_pass(&gate, Fill, 1).is_none(), "nothing is nothing");
    }

    #[tokio::test]
    async fn the_urgent_pass_first_and_in_their_order() {
        let gate = Gate::new([10; 4]);
        let all = gate.pass(Prefetch, 10).await;
        let (log, mut seen) = tokio::sync::mpsc::unbounded_channel();
        for (name, class) in
            [("f1", Fill), ("r1", ReadAhead), ("p1", Prefetch), ("d1", Demand), ("d2", Demand)]
        {
            let (gate, log) = (gate.clone(), log.clone());
            tokio::spawn(async move {
                let permit = gate.pass(class, 10).await;
                log.send(name).unwrap();
                drop(permit);
            });
            tokio::task::yield_now().await; // they come in this order
        }
        drop(all);
        for want in ["d1", "d2", "p1", "r1", "f1"] {
            assert_eq!(seen.recv().await, Some(want));
        }
    }

    #[tokio::test]
    async fn a_waiter_that_goes_away_costs_nothing() {
        let gate = Gate::new([1; 4]);
        let held = gate.pass(Demand, 1).await;
        let gone = tokio::spawn({
            let gate = gate.clone();
            async move { drop(gate.pass(Demand, 1).await) }
        });
        tokio::task::yield_now().await;
        gone.abort();
        assert!(gone.await.unwrap_err().is_cancelled());
        drop(held);
        assert!(try_pass(&gate, Prefetch, 1).is_some());
        assert_eq!(gate.used(), [0; 4]);
    }

    #[tokio::test]
    async fn higher_limits_let_waiters_through() {
        let gate = Gate::new([100, 1, 1, 1]);
        let held = gate.pass(Prefetch, 1).await;
        let waiter = tokio::spawn({
            let gate = gate.clone();
            async move { gate.pass(Prefetch, 5).await.amount }
        });
        tokio::task::yield_now().await;
        assert!(!waiter.is_finished());
        gate.set_limits([100, 10, 10, 10]);
        assert_eq!(waiter.await.unwrap(), 5);
        drop(held);
    }

    #[test]
    fn a_split_permit_is_given_back_in_parts() {
        let gate = Gate::new([10; 4]);
        let mut permit = try_pass(&gate, ReadAhead, 8).unwrap();
        let part = permit.split(3);
        let rest = permit.split(100);
        assert_eq!((part.amount, rest.amount, permit.amount), (3, 5, 0));
        drop(permit);
        drop(part);
        assert_eq!(gate.used(), [0, 0, 5, 0]);
        drop(rest);
        assert_eq!(gate.used(), [0; 4]);
    }
}
