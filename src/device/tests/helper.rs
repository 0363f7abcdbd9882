//! Large requests, which a queue's thread shares with a helper.

use super::super::helper::LARGE;
use super::*;

/// Makes requests for `slots` available, all at once, and then kicks. A queue that looks at the ring
/// meanwhile does not find one of them alone.
fn send_large(vmm: &mut Vmm, op: u32, slots: std::ops::Range<u16>) {
    let prepare = |slot: u16| {
        vmm.rings[1].prepare(slot, &request(op, slot.into(), &slot.to_le_bytes()), LARGE)
    };
    let heads: Vec<u16> = slots.map(prepare).collect();
    vmm.rings[1].publish_all(&heads);
    vmm.kick(1);
}

/// The slots of the next `count` answers, each of which is that to its own request; sorted.
fn receive(vmm: &mut Vmm, count: usize) -> Vec<u16> {
    let mut slots = Vec::new();
    for _ in 0..count {
        let (head, len) = vmm.rings[1].await_used();
        let answer = vmm.rings[1].answer(head / 3, len);
        assert_eq!((answer.errno, answer.unique), (0, u64::from(head / 3)));
        slots.push(head / 3);
    }
    slots.sort_unstable();
    slots
}

#[test]
fn two_threads_serve_what_is_large() {
    if std::thread::available_parallelism().is_ok_and(|n| n.get() == 1) {
        return; // then there is no helper
    }
    let daemon = Daemon::start(1);
    let mut vmm = Vmm::started(&daemon.path, 2);
    send_large(&mut vmm, MEET, 0..16);
    let mut answered = Vec::new();
    for _ in 0..16 {
        let (head, len) = vmm.rings[1].await_used();
        assert_eq!(vmm.rings[1].answer(head / 3, len).body, [1], "nobody came to help");
        answered.push(head / 3);
    }
    answered.sort_unstable();
    assert_eq!(answered, (0..16).collect::<Vec<_>>());
    vmm.echo(1, 20);
}

#[test]
fn each_is_answered_once_and_in_its_own_memory() {
    let daemon = Daemon::start(1);
    let mut vmm = Vmm::started(&daemon.path, 2);
    for _ in 0..500 {
        send_large(&mut vmm, ECHO, 0..16);
        assert_eq!(receive(&mut vmm, 16), (0..16).collect::<Vec<_>>());
        vmm.echo(1, 20);
    }
    assert_eq!(vmm.rings[1].take_used(), None);
}

#[test]
fn who_helps_may_find_that_a_request_has_to_wait() {
    let daemon = Daemon::start(1);
    let mut vmm = Vmm::started(&daemon.path, 2);
    send_large(&mut vmm, WAIT, 0..16);
    eventually("they wait", || daemon.world.waiting() == 16);
    vmm.echo(1, 20);
    (0..16).for_each(|slot| assert!(daemon.world.release(slot)));
    assert_eq!(receive(&mut vmm, 16), (0..16).collect::<Vec<_>>());
}

#[test]
fn what_is_on_the_pile_is_answered_before_the_ring_stands_still() {
    let daemon = Daemon::start(1);
    let mut vmm = Vmm::started(&daemon.path, 2);
    for round in 0..300 {
        send_large(&mut vmm, ECHO, 0..16);
        let base = vmm.stop_ring(1);
        let taken = usize::from(base.wrapping_sub(vmm.rings[1].used));
        let used = vmm.rings[1].used_index();
        assert_eq!(used, base, "round {round}: what was taken has been given back");
        let mut slots = receive(&mut vmm, taken);
        vmm.start_ring(1, base);
        slots.extend(receive(&mut vmm, 16 - taken));
        slots.sort_unstable();
        assert_eq!(slots, (0..16).collect::<Vec<_>>(), "round {round}");
    }
}

#[test]
fn memory_may_go_and_come_again_meanwhile() {
    let daemon = Daemon::start(1);
    let mut vmm = Vmm::started(&daemon.path, 2);
    let regions = vmm.guest.regions();
    for round in 0..100 {
        send_large(&mut vmm, ECHO, 0..16);
        vmm.frontend.set_mem_table(&regions[1..]).unwrap();
        if round % 2 == 0 {
            let base = vmm.stop_ring(1);
            vmm.frontend.set_mem_table(&regions).unwrap();
            vmm.start_ring(1, base);
        } else {
            vmm.frontend.set_mem_table(&regions).unwrap();
        }
        assert_eq!(receive(&mut vmm, 16), (0..16).collect::<Vec<_>>(), "round {round}");
    }
}
