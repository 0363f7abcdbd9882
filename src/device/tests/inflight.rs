//! A device ends and another one goes on with the same guest, whose VMM hands it the record of
//! requests in flight.

use std::fs::File;

use vhost::vhost_user::message::VhostUserInflight;

use super::*;

type Buffer = (VhostUserInflight, File);

/// Asks for a buffer and hands it back.
fn record(vmm: &mut Vmm) -> Buffer {
    let queues = vmm.rings.len() as u16;
    let want = VhostUserInflight::new(0, 0, queues, 64);
    let buffer = vmm.frontend.get_inflight_fd(&want).unwrap();
    hand_over(vmm, &buffer);
    buffer
}

fn hand_over(vmm: &mut Vmm, (info, file): &Buffer) {
    vmm.frontend.set_inflight_fd(info, file.as_raw_fd()).unwrap();
}

/// A VMM with two rings and a record.
fn recorded(daemon: &Daemon) -> (Vmm, Buffer) {
    let mut vmm = Vmm::connect(&daemon.path, 2);
    vmm.set_features(0);
    vmm.frontend.set_mem_table(&vmm.guest.regions()).unwrap();
    let buffer = record(&mut vmm);
    vmm.start_ring(0, 0);
    vmm.start_ring(1, 0);
    (vmm, buffer)
}

/// The same guest on another device. Says that all which is available has been taken, as
/// cloud-hypervisor does.
fn goes_on(old: Vmm, daemon: &Daemon, buffer: &Buffer) -> Vmm {
    let mut vmm = Vmm::connect(&daemon.path, 2);
    vmm.guest = old.guest.clone();
    vmm.rings.clone_from(&old.rings);
    drop(old);
    vmm.set_features(0);
    vmm.frontend.set_mem_table(&vmm.guest.regions()).unwrap();
    hand_over(&mut vmm, buffer);
    for ring in 0..2 {
        let avail = vmm.rings[ring].avail;
        vmm.start_ring(ring, avail);
    }
    vmm
}

#[test]
fn another_device_answers_what_was_in_flight_once() {
    let first = Daemon::start(1);
    let (mut vmm, buffer) = recorded(&first);
    vmm.echo(1, 0);
    for slot in 1..6 {
        vmm.send(1, slot, &request(WAIT, slot.into(), &[slot as u8]), 64);
    }
    eventually("they wait", || first.world.waiting() == 5);
    // Given back in the middle of the rest, and a head that comes twice.
    first.world.release(3);
    assert_eq!(vmm.receive(1, 3).body, [3]);
    vmm.send(1, 3, &request(WAIT, 30, &[30]), 64);
    eventually("they wait", || first.world.waiting() == 5);
    drop(first);
    // What comes while nobody is there.
    vmm.send(1, 6, &request(WAIT, 6, &[6]), 64);
    vmm.send(0, 0, &request(ECHO, 9, b"urgent"), 64);

    let second = Daemon::start(1);
    let mut vmm = goes_on(vmm, &second, &buffer);
    eventually("the guest is called, whatever it was told before", || vmm.called(1));
    assert_eq!(vmm.receive(0, 0).body, b"urgent");
    eventually("they wait again", || second.world.waiting() == 6);
    for (slot, unique) in [(4, 4), (1, 1), (3, 30), (6, 6), (5, 5), (2, 2)] {
        assert!(second.world.release(unique));
        assert_eq!(vmm.receive(1, slot).body, [unique as u8]);
    }
    for slot in 0..16 {
        vmm.echo(1, slot);
    }
    assert_eq!(vmm.rings[1].take_used(), None, "nothing twice");
}

#[test]
fn they_are_served_in_the_order_in_which_they_came() {
    let first = Daemon::start(1);
    let (mut vmm, buffer) = recorded(&first);
    for slot in [7, 2, 5, 0, 1] {
        vmm.send(1, slot, &request(WAIT, slot.into(), b""), 64);
    }
    eventually("they wait", || first.world.waiting() == 5);
    drop(first);
    // What they ask for is read again: now nothing that waits.
    for slot in [7, 2, 5, 0, 1] {
        vmm.rings[1].prepare(slot, &request(ECHO, slot.into(), b"again"), 64);
    }
    let second = Daemon::start(1);
    let mut vmm = goes_on(vmm, &second, &buffer);
    for slot in [7, 2, 5, 0, 1] {
        assert_eq!(vmm.receive(1, slot).body, b"again");
    }
}

#[test]
fn the_same_device_goes_on_after_a_broken_connection() {
    let daemon = Daemon::start(1);
    let (mut vmm, buffer) = recorded(&daemon);
    vmm.send(1, 1, &request(WAIT, 1, b"one"), 64);
    eventually("it waits", || daemon.world.waiting() == 1);
    for _ in 0..20 {
        let old = vmm;
        let fresh = goes_on_alone(&old);
        drop(old);
        daemon.await_idle();
        vmm = reconnect(fresh, &daemon, &buffer);
        eventually("it waits again", || daemon.world.waiting() == 1);
    }
    daemon.world.release(1);
    assert_eq!(vmm.receive(1, 1).body, b"one");
    vmm.echo(1, 0);
    assert_eq!(vmm.rings[1].take_used(), None);
}

/// What stays of a guest without its VMM.
fn goes_on_alone(vmm: &Vmm) -> (Guest, Vec<DriverRing>) {
    (vmm.guest.clone(), vmm.rings.clone())
}

fn reconnect((guest, rings): (Guest, Vec<DriverRing>), daemon: &Daemon, buffer: &Buffer) -> Vmm {
    let mut vmm = Vmm::connect(&daemon.path, 2);
    (vmm.guest, vmm.rings) = (guest, rings);
    vmm.set_features(0);
    vmm.frontend.set_mem_table(&vmm.guest.regions()).unwrap();
    hand_over(&mut vmm, buffer);
    let avail = vmm.rings[1].avail;
    vmm.start_ring(1, avail);
    vmm
}

#[test]
fn a_guest_that_starts_over_hears_nothing_of_its_past_from_the_record() {
    let first = Daemon::start(1);
    let (mut vmm, buffer) = recorded(&first);
    vmm.send(1, 1, &request(WAIT, 1, b"one"), 64);
    eventually("it waits", || first.world.waiting() == 1);
    // On the same connection.
    vmm.stop_ring(1);
    vmm.rings[1].reset();
    vmm.start_ring(1, 0);
    vmm.echo(1, 0);
    eventually("its request is given up", || first.world.waiting() == 0);
    // And by way of another one.
    vmm.send(1, 1, &request(WAIT, 2, b"two"), 64);
    eventually("it waits", || first.world.waiting() == 1);
    drop(first);
    vmm.rings[1].reset();
    let second = Daemon::start(1);
    let mut vmm = goes_on(vmm, &second, &buffer);
    for slot in 0..16 {
        vmm.echo(1, slot);
    }
    assert_eq!((vmm.rings[1].take_used(), second.world.waiting()), (None, 0));
    // After a reset of the device, too.
    vmm.send(1, 1, &request(WAIT, 3, b"three"), 64);
    eventually("it waits", || second.world.waiting() == 1);
    vmm.frontend.reset_device().unwrap();
    drop(second);
    let third = Daemon::start(1);
    let mut vmm = goes_on(vmm, &third, &buffer);
    vmm.echo(0, 0);
    assert_eq!((vmm.rings[1].take_used(), third.world.waiting()), (None, 0));
}

#[test]
fn a_record_that_comes_late_has_what_is_held() {
    let first = Daemon::start(1);
    let mut vmm = Vmm::started(&first.path, 2);
    vmm.send(1, 1, &request(WAIT, 1, b"one"), 64);
    eventually("it waits", || first.world.waiting() == 1);
    let buffer = record(&mut vmm);
    vmm.echo(1, 0);
    assert_eq!(first.world.waiting(), 1, "it goes on waiting");
    // Stopped, and ended while it is.
    vmm.stop_ring(1);
    drop(first);
    let second = Daemon::start(1);
    let mut vmm = goes_on(vmm, &second, &buffer);
    eventually("it waits again", || second.world.waiting() == 1);
    second.world.release(1);
    assert_eq!(vmm.receive(1, 1).body, b"one");
}

#[test]
fn what_was_agreed_with_the_guest_goes_on() {
    let first = Daemon::start(1);
    let (mut vmm, buffer) = recorded(&first);
    vmm.send(1, 0, &request(AGREE, 1, &77u64.to_le_bytes()), 64);
    vmm.receive(1, 0);
    drop(first);
    let second = Daemon::start(1);
    let mut vmm = goes_on(vmm, &second, &buffer);
    vmm.send(1, 0, &request(AGREED, 2, b""), 64);
    assert_eq!(vmm.receive(1, 0).body, 77u64.to_le_bytes());
}

#[test]
fn records_that_cannot_be() {
    let daemon = Daemon::start(1);
    let mut vmm = Vmm::started(&daemon.path, 2);
    for (queues, size) in [(3, 64), (2, 2048), (u16::MAX, u16::MAX)] {
        let want = VhostUserInflight::new(0, 0, queues, size);
        let (info, file) = vmm.frontend.get_inflight_fd(&want).unwrap();
        assert_eq!(info.mmap_size, 0, "{queues} queues of {size}");
        let given = VhostUserInflight::new(1 << 20, 0, queues, size);
        assert!(vmm.frontend.set_inflight_fd(&given, file.as_raw_fd()).is_err());
    }
    let (info, file) = vmm.frontend.get_inflight_fd(&VhostUserInflight::new(0, 0, 2, 64)).unwrap();
    for (len, offset) in [(64, 0), (info.mmap_size, 4096), (info.mmap_size, u64::MAX)] {
        let given = VhostUserInflight::new(len, offset, 2, 64);
        assert!(vmm.frontend.set_inflight_fd(&given, file.as_raw_fd()).is_err(), "{len}+{offset}");
    }
    // A ring that is longer than the record works without.
    let buffer = vmm.frontend.get_inflight_fd(&VhostUserInflight::new(0, 0, 2, 32)).unwrap();
    hand_over(&mut vmm, &buffer);
    vmm.echo(1, 0);
    // So does one whose record is noise.
    use std::os::unix::fs::FileExt;
    buffer.1.write_all_at(&[0xa5; 1024], 0).unwrap();
    hand_over(&mut vmm, &buffer);
    vmm.echo(1, 0);
}
