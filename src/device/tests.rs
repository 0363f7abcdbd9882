//! The device as a whole, against a VMM and a guest written out by hand.

// The numbers are the tests' own, and small.
#![allow(clippy::cast_possible_truncation)]

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::BusyPoll;
use super::testing::*;

mod helper;
mod inflight;
mod state;

#[test]
fn requests_are_answered_on_every_queue() {
    let daemon = Daemon::start(3);
    let mut vmm = Vmm::started(&daemon.path, 4);
    for round in 0..100 {
        for ring in 0..4 {
            vmm.echo(ring, round % 16);
        }
    }
    assert_eq!(daemon.count(|c| &c.requests_total), 400);
}

#[test]
fn the_vmm_is_told_how_many_queues_and_which_tag() {
    let daemon = Daemon::start(64);
    let mut vmm = Vmm::connect(&daemon.path, 1);
    assert_eq!(vmm.frontend.get_queue_num().unwrap(), 65);
    assert!(vmm.frontend.get_max_mem_slots().unwrap() >= 509);
    for (offset, len) in [(0u32, 44usize), (36, 4), (0, 40), (0, 60)] {
        let (_, config) = vmm
            .frontend
            .get_config(offset, len as u32, VhostUserConfigFlags::empty(), &vec![0; len])
            .unwrap();
        let mut want = [0; 100];
        want[..3].copy_from_slice(b"toy");
        want[36] = 64;
        assert_eq!(config, &want[offset as usize..][..len], "{offset}+{len}");
    }
}

/// A device that QEMU gave two request queues cannot have more, whatever is advised.
#[test]
fn a_driver_is_told_of_the_queues_that_the_vmm_has_set_up() {
    let daemon = Daemon::start(8);
    let mut vmm = Vmm::connect(&daemon.path, 3);
    let told = |vmm: &mut Vmm| {
        let flags = VhostUserConfigFlags::empty();
        let (_, config) = vmm.frontend.get_config(36, 4, flags, &[0; 4]).unwrap();
        u32::from_le_bytes(config.try_into().unwrap())
    };
    for (ring, want) in [(0, 8), (1, 1), (2, 2), (1, 2)] {
        vmm.frontend.set_vring_call(ring, &vmm.calls[ring]).unwrap();
        assert_eq!(told(&mut vmm), want, "after ring {ring}");
    }
}

#[test]
fn a_full_set_of_queues_of_full_size() {
    let daemon = Daemon::start(64);
    let mut vmm = Vmm::connect(&daemon.path, 0);
    vmm.frontend.set_mem_table(&vmm.guest.regions()).unwrap();
    // One ring of the largest size in the middle of the memory, for all queues in turn.
    for i in 0..65 {
        let mut ring = DriverRing::new(&vmm.guest, 1, 1024);
        ring.reset();
        ring.index = i;
        vmm.rings.push(ring);
        vmm.kicks.push(EventFd::new(0).unwrap());
        vmm.calls.push(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        vmm.start_ring(i, 0);
        vmm.echo(i, 5);
        vmm.stop_ring(i);
    }
}

#[test]
fn held_requests_wait_and_others_do_not() {
    let daemon = Daemon::start(1);
    let mut vmm = Vmm::started(&daemon.path, 2);
    for slot in 0..10 {
        vmm.send(1, slot, &request(WAIT, 100 + u64::from(slot), b"cold"), 64);
    }
    for _ in 0..200 {
        vmm.echo(1, 11);
        vmm.echo(0, 0);
    }
    assert_eq!(daemon.world.waiting(), 10);
    for slot in (0..10).rev() {
        assert!(daemon.world.release(100 + u64::from(slot)));
        let answer = vmm.receive(1, slot);
        assert_eq!((answer.errno, &answer.body[..]), (0, &b"cold"[..]));
    }
    assert_eq!(daemon.count(|c| &c.held_total), 10);
}

#[test]
fn a_wait_that_breaks_off_is_eio() {
    let daemon = Daemon::start(1);
    let mut vmm = Vmm::started(&daemon.path, 2);
    vmm.send(1, 0, &request(WAIT, 7, b""), 64);
    eventually("it waits", || daemon.world.waiting() == 1);
    daemon.world.lose(7);
    assert_eq!(vmm.receive(1, 0), Answer { errno: libc::EIO, unique: 7, body: vec![] });
    vmm.echo(1, 0);
}

#[test]
fn an_interrupt_ends_a_held_request() {
    let daemon = Daemon::start(2);
    let mut vmm = Vmm::started(&daemon.path, 3);
    vmm.send(2, 0, &request(WAIT, 7, b""), 64);
    eventually("it waits", || daemon.world.waiting() == 1);
    // Answered by the same thread, so what came before is held by now, and not just about to be.
    vmm.echo(2, 1);
    vmm.send(0, 0, &request(INTERRUPT, 8, &6u64.to_le_bytes()), 0);
    assert_eq!(vmm.rings[0].await_used(), (0, 0));
    vmm.send(0, 0, &request(INTERRUPT, 9, &7u64.to_le_bytes()), 0);
    assert_eq!(vmm.rings[0].await_used(), (0, 0));
    assert_eq!(vmm.receive(2, 0), Answer { errno: libc::EINTR, unique: 7, body: vec![] });
    eventually("nobody waits", || daemon.world.waiting() == 0);
    vmm.echo(2, 0);
}

#[test]
fn a_panic_is_one_failed_request() {
    let daemon = Daemon::start(1);
    let mut vmm = Vmm::started(&daemon.path, 2);
    vmm.send(1, 0, &request(PANIC, 7, b""), 64);
    assert_eq!(vmm.receive(1, 0), Answer { errno: libc::EIO, unique: 7, body: vec![] });
    vmm.echo(1, 0);
    assert_eq!(daemon.count(|c| &c.panics_total), 1);
}

#[test]
fn a_buffer_that_crosses_memory_regions() {
    let daemon = Daemon::start(1);
    let mut vmm = Vmm::started(&daemon.path, 2);
    let bytes = request(ECHO, 5, &[0x5a; 3000]);
    let (from, to) = (BORDER - 1000, BORDER - 0x10_0000 - 7);
    vmm.guest.write(from, &bytes);
    let _ = to;
    let ring = &mut vmm.rings[1];
    ring.describe(0, from, bytes.len() as u32, NEXT, 1);
    ring.describe(1, BORDER + HALF - 0x8000, 100, WRITE | NEXT, 2);
    ring.describe(2, BORDER - 1001 - 3016, 3016, WRITE, 0);
    ring.publish(0);
    vmm.kick(1);
    assert_eq!(vmm.rings[1].await_used(), (0, 3016));
    let mut got = vmm.guest.read(BORDER + HALF - 0x8000, 100);
    got.extend(vmm.guest.read(BORDER - 1001 - 3016, 2916));
    assert_eq!(&got[16..], &[0x5a; 3000][..]);
    // And the answer across the border.
    let bytes = request(ECHO, 6, &[0xa5; 3000]);
    let ring = &mut vmm.rings[1];
    let head = ring.prepare(1, &bytes, 3016);
    ring.describe(head + 1, BORDER - 2000, 3016, WRITE, 0);
    ring.publish(head);
    vmm.kick(1);
    assert_eq!(vmm.rings[1].await_used(), (head, 3016));
    assert_eq!(&vmm.guest.read(BORDER - 2000, 3016)[16..], &[0xa5; 3000][..]);
}

#[test]
fn an_indirect_table_is_followed() {
    let daemon = Daemon::start(1);
    let mut vmm = Vmm::started(&daemon.path, 2);
    let bytes = request(ECHO, 5, b"indirectly");
    let ring = &mut vmm.rings[1];
    let (buffer, table) = (ring.buffer(0), ring.buffer(1) + 8);
    ring.guest.write(buffer, &bytes);
    ring.describe_at(table, buffer, 40, NEXT, 3);
    ring.describe_at(table + 48, buffer + 40, 10, NEXT, 1);
    ring.describe_at(table + 16, buffer + 0x2000, 7, NEXT | WRITE, 2);
    ring.describe_at(table + 32, buffer + 0x2007, 2000, WRITE, 0);
    ring.describe(9, table, 64, INDIRECT, 0);
    ring.publish(9);
    vmm.kick(1);
    assert_eq!(vmm.rings[1].await_used(), (9, 26));
    assert_eq!(vmm.rings[1].answer(0, 26).body, b"indirectly");
}

/// What may come back for a malformed chain.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
enum Want {
    /// Given back without an answer.
    Empty,
    /// Given back with an error.
    Error(i32),
    /// Cannot be given back.
    Nothing,
}

type Mischief = fn(&DriverRing, u16);

/// What a guest can do wrong in a chain that starts at descriptor 0, whose buffer is `slot` 0.
const MALFORMED: &[(&str, Mischief, u16, Want)] = &[
    ("request outside memory", |r, _| r.describe(0, END, 56, NEXT, 1), 0, Want::Empty),
    ("request runs out of memory", |r, _| r.describe(0, END - 8, 56, NEXT, 1), 0, Want::Empty),
    (
        "request at the end of the address space",
        |r, _| r.describe(0, u64::MAX - 7, 56, NEXT, 1),
        0,
        Want::Empty,
    ),
    ("answer outside memory", |r, _| r.describe(1, 0, 4096, WRITE, 0), 0, Want::Empty),
    (
        "answer runs out of memory",
        |r, _| r.describe(1, END - 64, 4096, WRITE, 0),
        0,
        Want::Error(libc::EIO),
    ),
    (
        "second answer descriptor outside memory",
        |r, _| {
            r.describe(1, r.buffer(0) + 0x2000, 64, WRITE | NEXT, 2);
            r.describe(2, u64::MAX, 64, WRITE, 0);
        },
        0,
        Want::Error(libc::EIO),
    ),
    (
        "chain loops",
        |r, _| r.describe(1, r.buffer(0) + 0x2000, 64, WRITE | NEXT, 1),
        0,
        Want::Error(libc::EIO),
    ),
    (
        "chain loops to its head",
        |r, _| r.describe(1, r.buffer(0) + 0x2000, 64, WRITE | NEXT, 0),
        0,
        Want::Error(libc::EIO),
    ),
    (
        "chain leaves the table",
        |r, _| r.describe(1, r.buffer(0) + 0x2000, 64, WRITE | NEXT, 64),
        0,
        Want::Error(libc::EIO),
    ),
    (
        "next is the largest number",
        |r, _| r.describe(0, r.buffer(0), 56, NEXT, u16::MAX),
        0,
        Want::Empty,
    ),
    ("head past the table", |_, _| {}, 64, Want::Nothing),
    ("head is the largest number", |_, _| {}, u16::MAX, Want::Nothing),
    ("no writable part", |r, _| r.describe(0, r.buffer(0), 56, 0, 0), 0, Want::Empty),
    (
        "no readable part",
        |r, _| r.describe(0, r.buffer(0) + 0x2000, 4096, WRITE, 0),
        0,
        Want::Empty,
    ),
    (
        "writable before readable",
        |r, _| {
            r.describe(0, r.buffer(0) + 0x2000, 4096, WRITE | NEXT, 1);
            r.describe(1, r.buffer(0), 56, 0, 0);
        },
        0,
        Want::Empty,
    ),
    (
        "readable, writable, readable",
        |r, _| {
            r.describe(1, r.buffer(0) + 0x2000, 4096, WRITE | NEXT, 2);
            r.describe(2, r.buffer(0), 56, 0, 0);
        },
        0,
        Want::Error(libc::EIO),
    ),
    (
        "everything of length 0",
        |r, _| {
            r.describe(0, r.buffer(0), 0, NEXT, 1);
            r.describe(1, r.buffer(0) + 0x2000, 0, WRITE, 0);
        },
        0,
        Want::Empty,
    ),
    (
        "indirect table of odd length",
        |r, _| r.describe(0, r.buffer(1), 40, INDIRECT, 0),
        0,
        Want::Empty,
    ),
    (
        "indirect table of length 0",
        |r, _| r.describe(0, r.buffer(1), 0, INDIRECT, 0),
        0,
        Want::Empty,
    ),
    ("indirect table outside memory", |r, _| r.describe(0, END, 64, INDIRECT, 0), 0, Want::Empty),
    (
        "indirect table of 4 GiB",
        |r, _| r.describe(0, r.buffer(1), 0xffff_fff0, INDIRECT, 0),
        0,
        Want::Empty,
    ),
    (
        "indirect table in an indirect table",
        |r, _| {
            r.describe(0, r.buffer(1), 32, INDIRECT, 0);
            r.describe_at(r.buffer(1), r.buffer(1), 32, INDIRECT, 0);
        },
        0,
        Want::Empty,
    ),
    (
        "indirect table in an indirect table, later",
        |r, _| {
            r.describe(0, r.buffer(1), 48, INDIRECT, 0);
            r.describe_at(r.buffer(1), r.buffer(0), 56, NEXT, 1);
            r.describe_at(r.buffer(1) + 16, r.buffer(0) + 0x2000, 64, NEXT | WRITE, 2);
            r.describe_at(r.buffer(1) + 32, r.buffer(1), 32, INDIRECT, 0);
        },
        0,
        Want::Error(libc::EIO),
    ),
    (
        "indirect chain of 65,535 descriptors",
        |r, _| {
            r.describe(0, BORDER, 65_535 * 16, INDIRECT, 0);
            for i in 0..65_535u64 {
                let next = (i + 1) as u16;
                r.describe_at(BORDER + i * 16, r.buffer(0), 1, NEXT, next);
            }
        },
        0,
        Want::Empty,
    ),
    (
        "indirect chain that loops",
        |r, _| {
            r.describe(0, r.buffer(1), 32, INDIRECT, 0);
            r.describe_at(r.buffer(1), r.buffer(0), 56, NEXT, 1);
            r.describe_at(r.buffer(1) + 16, r.buffer(0) + 0x2000, 64, NEXT | WRITE, 1);
        },
        0,
        Want::Error(libc::EIO),
    ),
    (
        "lengths that add up to more than 4 GiB",
        |r, _| {
            r.describe(1, r.buffer(0) + 0x2000, 4096, WRITE | NEXT, 2);
            r.describe(2, r.buffer(0) + 0x2000, u32::MAX, WRITE, 0);
        },
        0,
        Want::Error(libc::EIO),
    ),
    ("half a header", |r, _| r.describe(0, r.buffer(0), 20, NEXT, 1), 0, Want::Empty),
    (
        "a body cut short",
        |r, _| r.describe(0, r.buffer(0), 50, NEXT, 1),
        0,
        Want::Error(libc::EINVAL),
    ),
    (
        "no room for a header",
        |r, _| r.describe(1, r.buffer(0) + 0x2000, 15, WRITE, 0),
        0,
        Want::Empty,
    ),
    (
        "no room for the answer",
        |r, _| r.describe(1, r.buffer(0) + 0x2000, 20, WRITE, 0),
        0,
        Want::Empty,
    ),
    ("random bytes", |r, _| r.guest.write(r.buffer(0), &[0xdb; 56]), 0, Want::Error(libc::EINVAL)),
    (
        "unknown operation",
        |r, _| r.guest.write(r.buffer(0) + 4, &[0xff; 4]),
        0,
        Want::Error(libc::ENOSYS),
    ),
];

#[test]
fn malformed_input_is_given_back_and_the_next_request_is_right() {
    for features in [0, EVENT_IDX] {
        let daemon = Daemon::start(1);
        let mut vmm = Vmm::connect(&daemon.path, 2);
        vmm.set_features(features);
        vmm.frontend.set_mem_table(&vmm.guest.regions()).unwrap();
        vmm.start_ring(1, 0);
        for (what, mischief, head, want) in MALFORMED {
            let ring = &mut vmm.rings[1];
            ring.set_used_event(ring.used);
            ring.prepare(0, &request(ECHO, 77, b"0123456789abcdef"), 4096);
            mischief(ring, 0);
            ring.publish(*head);
            vmm.kick(1);
            if *want != Want::Nothing {
                let ring = &mut vmm.rings[1];
                let (used, len) = ring.await_used();
                assert_eq!(used, *head, "{what}");
                let got = match len {
                    0 => Want::Empty,
                    16 => {
                        let at = match *what {
                            "answer runs out of memory" => END - 64,
                            _ => ring.buffer(0) + 0x2000,
                        };
                        let bytes = ring.guest.read(at, 16);
                        Want::Error(-i32::from_le_bytes(bytes[4..8].try_into().unwrap()))
                    }
                    len => panic!("{what}: answered with {len} bytes"),
                };
                assert_eq!(got, *want, "{what}");
                eventually("the guest is called", || vmm.called(1));
            }
            vmm.rings[1].set_used_event(vmm.rings[1].used);
            vmm.echo(1, 3);
            assert_eq!(vmm.rings[1].take_used(), None, "{what}: given back twice");
        }
        vmm.stop_ring(1);
        assert_eq!(daemon.count(|c| &c.panics_total), 0);
        assert_eq!(daemon.count(|c| &c.bad_heads_total), 2);
    }
}

#[test]
fn an_available_index_that_jumps() {
    // (by how much, whether the guest then returns to where it was)
    let jumps =
        [(65, false), (65, true), (1000, false), (1000, true), (0x8000, true), (0xffff, true)];
    for (features, (jump, back)) in [0, EVENT_IDX].into_iter().flat_map(|f| jumps.map(|j| (f, j))) {
        let daemon = Daemon::start(1);
        let mut vmm = Vmm::connect(&daemon.path, 2);
        vmm.set_features(features);
        vmm.frontend.set_mem_table(&vmm.guest.regions()).unwrap();
        vmm.start_ring(1, 0);
        vmm.echo(1, 0);
        let before = vmm.rings[1].avail;
        vmm.rings[1].set_avail(before.wrapping_add(jump));
        vmm.kick(1);
        eventually("it is noticed", || daemon.count(|c| &c.bad_indexes_total) == 1);
        if back {
            vmm.rings[1].set_avail(before);
            vmm.kick(1);
        }
        for slot in 0..16 {
            vmm.echo(1, slot);
        }
        assert_eq!(vmm.rings[1].take_used(), None, "jump by {jump}, back: {back}");
    }
}

#[test]
fn a_guest_that_reuses_heads_in_flight_is_bounded() {
    let daemon = Daemon::start(1);
    let mut vmm = Vmm::started(&daemon.path, 2);
    // Request after request in the same descriptors, although none has come back.
    let publish = |vmm: &mut Vmm, unique: u64| {
        let head = vmm.rings[1].prepare(0, &request(WAIT, unique, b""), 64);
        vmm.rings[1].publish(head);
        vmm.kick(1);
        head
    };
    for unique in 0..64 {
        publish(&mut vmm, unique);
        eventually("it is held", || daemon.count(|c| &c.held_total) == unique + 1);
    }
    let head = publish(&mut vmm, 64);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(daemon.count(|c| &c.held_total), 64, "held are at most as many as the ring has");
    for unique in 0..64 {
        daemon.world.lose(unique);
        assert_eq!(vmm.rings[1].await_used().0, head);
    }
    eventually("the last one is held", || daemon.count(|c| &c.held_total) == 65);
    daemon.world.lose(64);
    assert_eq!(vmm.rings[1].await_used().0, head);
    vmm.echo(1, 5);
}

#[test]
fn random_rings_and_requests() {
    // A small generator is enough: the point is the number of shapes.
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut random = move |n: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % n
    };
    let daemon = Daemon::start(1);
    let mut vmm = Vmm::started(&daemon.path, 2);
    for round in 0..3000 {
        let ring = &mut vmm.rings[1];
        let ops = [ECHO, FORGET, PANIC + 5];
        let body = vec![7; random(64) as usize];
        let head = ring.prepare(0, &request(ops[random(3) as usize], round, &body), 4096);
        // Leave slots 10 and up alone: they are for the request that must work.
        for _ in 0..random(4) {
            let table = [ring.table(), ring.buffer(1)][random(2) as usize];
            let addr = [ring.buffer(0), ring.buffer(1), END - 30, 0, u64::MAX - 5, BORDER - 9];
            let len = [0, 1, 16, 48, 64, 4096, u32::MAX][random(7) as usize];
            let next = random(30) as u16;
            let addr = addr[random(6) as usize];
            ring.describe_at(table + random(20) * 16, addr, len, random(8) as u16, next);
        }
        if random(2) == 0 {
            ring.guest.write(ring.buffer(0) + random(50), &[random(256) as u8]);
        }
        let head = if random(8) == 0 { random(30) as u16 } else { head };
        ring.publish(head);
        vmm.kick(1);
        let (used, len) = vmm.rings[1].await_used();
        assert_eq!(used, head, "round {round}");
        assert!(len <= 4096 + 64, "round {round}: length {len}");
        vmm.echo(1, 20);
    }
    assert_eq!(daemon.count(|c| &c.panics_total), 0);
}

#[test]
fn one_call_for_a_batch_and_none_that_is_not_wanted() {
    let daemon = Daemon::start(1);
    let mut vmm = Vmm::connect(&daemon.path, 2);
    vmm.set_features(EVENT_IDX);
    vmm.frontend.set_mem_table(&vmm.guest.regions()).unwrap();
    vmm.start_ring(1, 0);
    // Called only when the tenth has been given back.
    vmm.rings[1].set_used_event(9);
    for slot in 0..9 {
        vmm.echo(1, slot);
    }
    std::thread::sleep(Duration::from_millis(20));
    assert!(!vmm.called(1));
    vmm.echo(1, 9);
    eventually("the guest is called", || vmm.called(1));
    // A batch: all are there before the kick.
    let used = vmm.rings[1].used;
    vmm.rings[1].set_used_event(used);
    let heads: Vec<u16> =
        (0..16).map(|s| vmm.rings[1].prepare(s, &request(ECHO, 1, b""), 64)).collect();
    heads.iter().for_each(|&head| vmm.rings[1].publish(head));
    vmm.kick(1);
    for head in heads {
        assert_eq!(vmm.rings[1].await_used(), (head, 16));
    }
    eventually("the guest is called", || vmm.called(1));
}

#[test]
fn without_event_idx_a_polling_guest_is_not_called() {
    let daemon = Daemon::start(1);
    let mut vmm = Vmm::started(&daemon.path, 2);
    vmm.echo(1, 0);
    eventually("the guest is called", || vmm.called(1));
    // VRING_AVAIL_F_NO_INTERRUPT
    let at = vmm.rings[1].avail_ring();
    vmm.guest.write(at, &1u16.to_le_bytes());
    vmm.echo(1, 1);
    std::thread::sleep(Duration::from_millis(20));
    assert!(!vmm.called(1));
    vmm.guest.write(at, &0u16.to_le_bytes());
    vmm.echo(1, 2);
    eventually("the guest is called", || vmm.called(1));
}

#[test]
fn a_queue_that_polls_needs_no_kick() {
    let daemon = Daemon::start_polling(1, BusyPoll::For(Duration::from_secs(600)));
    let mut vmm = Vmm::started(&daemon.path, 2);
    vmm.echo(1, 0);
    for slot in 1..20 {
        let bytes = request(ECHO, u64::from(slot), b"unannounced");
        let head = vmm.rings[1].prepare(slot, &bytes, 64);
        vmm.rings[1].publish(head);
        assert_eq!(vmm.receive(1, slot).body, b"unannounced");
    }
    // What becomes ready meanwhile is noticed, too.
    vmm.send(1, 0, &request(WAIT, 7, b"cold"), 64);
    eventually("it waits", || daemon.world.waiting() == 1);
    assert!(daemon.world.release(7));
    assert_eq!(vmm.receive(1, 0).body, b"cold");
    let begin = Instant::now();
    vmm.stop_ring(1);
    assert!(begin.elapsed() < Duration::from_secs(60), "{:?}", begin.elapsed());
}

#[test]
fn stop_and_continue_lose_nothing() {
    let daemon = Daemon::start(1);
    let mut vmm = Vmm::started(&daemon.path, 2);
    vmm.echo(1, 0);
    vmm.send(1, 1, &request(WAIT, 1, b"one"), 64);
    vmm.send(1, 2, &request(WAIT, 2, b"two"), 64);
    eventually("they wait", || daemon.world.waiting() == 2);
    vmm.echo(1, 0);
    let base = vmm.stop_ring(1);
    assert_eq!(base, vmm.rings[1].avail, "all that was available has been taken");
    // While the ring is stopped nothing may happen in it.
    daemon.world.release(1);
    vmm.send(1, 3, &request(ECHO, 3, b"three"), 64);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(vmm.rings[1].take_used(), None);
    vmm.start_ring(1, base);
    let mut heads = vec![vmm.rings[1].await_used().0, vmm.rings[1].await_used().0];
    heads.sort_unstable();
    assert_eq!(heads, [3, 9], "the one that became ready and the one that is new");
    daemon.world.release(2);
    assert_eq!(vmm.receive(1, 2).body, b"two");
    vmm.echo(1, 0);
}

#[test]
fn pause_and_resume_lose_nothing() {
    let daemon = Daemon::start(1);
    let mut vmm = Vmm::started(&daemon.path, 2);
    vmm.send(1, 1, &request(WAIT, 1, b"one"), 64);
    eventually("it waits", || daemon.world.waiting() == 1);
    vmm.frontend.set_vring_enable(1, false).unwrap();
    daemon.world.release(1);
    vmm.send(1, 2, &request(ECHO, 2, b"two"), 64);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(vmm.rings[1].take_used(), None);
    vmm.echo(0, 0);
    vmm.frontend.set_vring_enable(1, true).unwrap();
    let mut heads = vec![vmm.rings[1].await_used().0, vmm.rings[1].await_used().0];
    heads.sort_unstable();
    assert_eq!(heads, [3, 6]);
    vmm.echo(1, 0);
}

#[test]
fn a_guest_that_starts_over_hears_nothing_of_its_past() {
    let daemon = Daemon::start(1);
    let mut vmm = Vmm::started(&daemon.path, 2);
    vmm.send(1, 1, &request(WAIT, 1, b"one"), 64);
    eventually("it waits", || daemon.world.waiting() == 1);
    vmm.stop_ring(1);
    vmm.rings[1].reset();
    vmm.start_ring(1, 0);
    eventually("nobody waits", || daemon.world.waiting() == 0);
    for slot in 0..16 {
        vmm.echo(1, slot);
    }
    assert_eq!(vmm.rings[1].take_used(), None);
}

#[test]
fn a_device_reset_forgets_all() {
    let daemon = Daemon::start(1);
    let mut vmm = Vmm::started(&daemon.path, 2);
    vmm.send(1, 1, &request(WAIT, 1, b"one"), 64);
    eventually("it waits", || daemon.world.waiting() == 1);
    vmm.frontend.reset_device().unwrap();
    eventually("nobody waits", || daemon.world.waiting() == 0);
    assert_eq!(vmm.stop_ring(1), 0);
    vmm.set_features(0);
    vmm.rings[1].reset();
    vmm.start_ring(1, 0);
    vmm.echo(1, 0);
}

#[test]
fn memory_may_change_under_held_requests() {
    let daemon = Daemon::start(1);
    let mut vmm = Vmm::connect(&daemon.path, 2);
    vmm.set_features(0);
    for region in vmm.guest.regions() {
        vmm.frontend.add_mem_region(&region).unwrap();
    }
    vmm.start_ring(1, 0);
    // The answer goes to the region that is taken away.
    let head = vmm.rings[1].prepare(1, &request(WAIT, 1, b"one"), 64);
    vmm.rings[1].describe(head + 1, END - 64, 64, WRITE, 0);
    vmm.rings[1].publish(head);
    vmm.kick(1);
    eventually("it waits", || daemon.world.waiting() == 1);
    let [_, high] = vmm.guest.regions();
    vmm.frontend.remove_mem_region(&high).unwrap();
    assert!(vmm.frontend.remove_mem_region(&high).is_err());
    vmm.echo(1, 0);
    let extra = VhostUserMemoryRegionInfo {
        guest_phys_addr: 1 << 33,
        memory_size: 0x1000,
        userspace_addr: 0x1234_0000,
        mmap_offset: 0,
        mmap_handle: vmm.guest.file.as_raw_fd(),
    };
    for _ in 0..50 {
        vmm.frontend.add_mem_region(&extra).unwrap();
        vmm.echo(1, 0);
        vmm.frontend.remove_mem_region(&extra).unwrap();
    }
    daemon.world.release(1);
    assert_eq!(vmm.rings[1].await_used(), (head, 19));
    assert_eq!(vmm.guest.read(END - 48, 3), b"one");
    vmm.echo(1, 0);
}

#[test]
fn a_ring_sleeps_while_its_memory_is_away() {
    let daemon = Daemon::start(1);
    let mut vmm = Vmm::connect(&daemon.path, 2);
    vmm.set_features(0);
    let [low, high] = vmm.guest.regions();
    vmm.frontend.add_mem_region(&low).unwrap();
    vmm.start_ring(1, 0);
    vmm.echo(1, 0);
    vmm.frontend.set_mem_table(&[high]).unwrap();
    vmm.send(1, 1, &request(ECHO, 1, b"one"), 64);
    eventually("it is noticed", || daemon.count(|c| &c.bad_rings_total) > 0);
    assert_eq!(vmm.rings[1].take_used(), None);
    vmm.frontend.add_mem_region(&low).unwrap();
    assert_eq!(vmm.receive(1, 1).body, b"one");
}

#[test]
fn messages_in_any_order() {
    let daemon = Daemon::start(1);
    // Calls first, memory last, addresses before memory.
    let mut vmm = Vmm::connect(&daemon.path, 2);
    vmm.set_features(0);
    let config = vmm.config(1);
    vmm.frontend.set_vring_call(1, &vmm.calls[1]).unwrap();
    vmm.frontend.set_vring_enable(1, true).unwrap();
    vmm.frontend.set_vring_kick(1, &vmm.kicks[1]).unwrap();
    vmm.frontend.set_vring_addr(1, &config).unwrap();
    vmm.frontend.set_vring_num(1, 64).unwrap();
    vmm.frontend.set_vring_base(1, 0).unwrap();
    let head = vmm.rings[1].prepare(0, &request(ECHO, 1, b"early"), 64);
    vmm.rings[1].publish(head);
    vmm.frontend.set_mem_table(&vmm.guest.regions()).unwrap();
    assert_eq!(vmm.receive(1, 0).body, b"early");
    // Everything again, while the ring works.
    vmm.frontend.set_owner().unwrap();
    vmm.set_features(0);
    vmm.frontend.set_vring_addr(1, &config).unwrap();
    vmm.frontend.set_mem_table(&vmm.guest.regions()).unwrap();
    vmm.echo(1, 0);
    vmm.kicks[1] = EventFd::new(0).unwrap();
    vmm.frontend.set_vring_kick(1, &vmm.kicks[1]).unwrap();
    vmm.echo(1, 0);
    vmm.calls[1] = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    vmm.frontend.set_vring_call(1, &vmm.calls[1]).unwrap();
    eventually("the new call descriptor is used", || vmm.called(1));
    // What cannot be is refused, and nothing else happens.
    assert!(vmm.frontend.set_vring_num(1, 65).is_err());
    assert!(vmm.frontend.set_vring_num(1, 2048).is_err());
    vmm.echo(1, 0);
}

/// A message as it is on the wire.
fn message(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in [request, 1 | flags, body.len() as u32] {
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    bytes.extend_from_slice(body);
    bytes
}

const NEED_REPLY: u32 = 8;
const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_VRING_KICK: u32 = 12;
const SET_PROTOCOL_FEATURES: u32 = 16;

fn reply(stream: &mut UnixStream) -> (u32, u64) {
    let mut bytes = [0; 20];
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.read_exact(&mut bytes).unwrap();
    let word = |i: usize| u32::from_ne_bytes(bytes[i..i + 4].try_into().unwrap());
    assert_eq!((word(4), word(8)), (5, 8), "flags and size of an answer");
    (word(0), u64::from_ne_bytes(bytes[12..].try_into().unwrap()))
}

#[test]
fn bad_messages_are_refused_and_the_connection_goes_on() {
    let daemon = Daemon::start(1);
    let mut stream = UnixStream::connect(&daemon.path).unwrap();
    stream.write_all(&message(GET_FEATURES, 0, &[])).unwrap();
    let (_, features) = reply(&mut stream);
    // Protocol features without asking for them first, as after a restore.
    let acks = VhostUserProtocolFeatures::REPLY_ACK.bits();
    stream.write_all(&message(SET_PROTOCOL_FEATURES, 0, &acks.to_ne_bytes())).unwrap();
    let u64s = |words: &[u64]| words.iter().flat_map(|w| w.to_ne_bytes()).collect::<Vec<u8>>();
    let refused: &[(&str, u32, Vec<u8>)] = &[
        ("unknown request", 99, vec![1; 300]),
        ("request number 0", 0, vec![]),
        ("features that were not offered", SET_FEATURES, u64s(&[u64::MAX])),
        ("a body of the wrong size", SET_FEATURES, vec![0; 7]),
        ("a memory table without regions", 5, u64s(&[0])),
        ("a memory table without files", 5, u64s(&[1, 0, 4096, 0, 0])),
        ("a queue that is not there", 8, u64s(&[64 << 32 | 2])),
        ("a misaligned ring", 9, u64s(&[1, 0x1001, 0x2001, 0x3001, 0])),
        ("enabled by 7", 18, u64s(&[7 << 32 | 1])),
        ("a kick without its descriptor", SET_VRING_KICK, u64s(&[1])),
        ("a kick for queue 200", SET_VRING_KICK, u64s(&[200 | 0x100])),
        ("memory slots that were not negotiated", 37, u64s(&[0, 0, 4096, 0, 0])),
        ("a base that does not fit", 10, u64s(&[70_000 << 32 | 1])),
    ];
    for (what, request, body) in refused {
        stream.write_all(&message(*request, NEED_REPLY, body)).unwrap();
        assert_eq!(reply(&mut stream), (*request, 1), "{what}");
        // And without an answer; the next one is then for another message.
        stream.write_all(&message(*request, 0, body)).unwrap();
        stream.write_all(&message(GET_FEATURES, 0, &[])).unwrap();
        assert_eq!(reply(&mut stream), (GET_FEATURES, features), "{what}");
    }
    stream.write_all(&message(SET_FEATURES, NEED_REPLY, &features.to_ne_bytes())).unwrap();
    assert_eq!(reply(&mut stream), (SET_FEATURES, 0));
    // Descriptors where none belong: what follows in the stream is anybody's guess.
    let file = tempfile::tempfile().unwrap();
    let bytes = message(SET_FEATURES, NEED_REPLY, &features.to_ne_bytes());
    stream.send_with_fds(&[&bytes[..]], &[file.as_raw_fd()]).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let closed = matches!(stream.read(&mut [0; 20]), Ok(0) | Err(_));
    assert!(closed, "the connection goes on after stray descriptors");
    assert_eq!(daemon.count(|c| &c.connections_total), 1);
    Vmm::started(&daemon.path, 2).echo(1, 0);
}

#[test]
fn a_message_in_pieces() {
    let daemon = Daemon::start(1);
    let mut stream = UnixStream::connect(&daemon.path).unwrap();
    for byte in message(GET_FEATURES, 0, &[]) {
        stream.write_all(&[byte]).unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    let (_, features) = reply(&mut stream);
    for byte in message(SET_FEATURES, 0, &features.to_ne_bytes()) {
        stream.write_all(&[byte]).unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    stream.write_all(&message(GET_FEATURES, 0, &[])).unwrap();
    assert_eq!(reply(&mut stream), (GET_FEATURES, features));
}

/// The front end's own socket.
fn socket(frontend: &Frontend) -> UnixStream {
    // SAFETY: the descriptor is open as long as the front end is borrowed.
    let fd = unsafe { BorrowedFd::borrow_raw(frontend.as_raw_fd()) };
    UnixStream::from(fd.try_clone_to_owned().unwrap())
}

#[test]
fn a_ring_without_descriptors_is_polled() {
    let daemon = Daemon::start(1);
    let mut vmm = Vmm::started(&daemon.path, 2);
    // The crate's front end always sends descriptors: take the socket from under it.
    let mut stream = socket(&vmm.frontend);
    for request in [SET_VRING_KICK, 13, 14] {
        stream.write_all(&message(request, NEED_REPLY, &0x101u64.to_ne_bytes())).unwrap();
        assert_eq!(reply(&mut stream), (request, 0));
    }
    let head = vmm.rings[1].prepare(0, &super::testing::request(ECHO, 1, b"polled"), 64);
    vmm.rings[1].publish(head);
    assert_eq!(vmm.receive(1, 0).body, b"polled");
    assert!(!vmm.called(1));
    vmm.echo(0, 0);
}

/// Queue threads, file descriptors and mappings of this process.
fn resources() -> [usize; 3] {
    let threads = std::fs::read_dir("/proc/self/task").unwrap();
    let names = threads.filter_map(|t| std::fs::read_to_string(t.ok()?.path().join("comm")).ok());
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    [
        names.filter(|name| name.starts_with("vq")).count(),
        std::fs::read_dir("/proc/self/fd").unwrap().count(),
        maps.lines().filter(|line| line.contains(" (deleted)")).count(),
    ]
}

/// Set where `vmms_come_and_go` has a process to itself and can count what is left.
const ALONE: &str = "RAFSD_TEST_ALONE";

#[test]
fn nothing_is_left_of_a_connection() {
    let status = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "device::tests::vmms_come_and_go"])
        .env(ALONE, "1")
        .stdout(std::process::Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
fn vmms_come_and_go() {
    let daemon = Daemon::start(2);
    let mut before = None;
    for round in 0..30 {
        let mut vmm = Vmm::started(&daemon.path, 3);
        vmm.echo(0, 0);
        vmm.echo(2, 0);
        vmm.send(1, 1, &request(WAIT, 1, b"one"), 64);
        eventually("it waits", || daemon.world.waiting() == 1);
        if round % 2 == 0 {
            // In the middle of a message.
            let bytes = &message(SET_FEATURES, 0, &[0; 8])[..15];
            socket(&vmm.frontend).write_all(bytes).unwrap();
        }
        drop(vmm);
        daemon.await_idle();
        eventually("nobody waits", || daemon.world.waiting() == 0);
        if std::env::var_os(ALONE).is_some() {
            let before = *before.get_or_insert_with(resources);
            let released = || resources().iter().zip(before).all(|(now, before)| *now <= before);
            eventually("all is released", released);
        }
    }
    assert_eq!(daemon.count(|c| &c.connections_total), 30);
}

#[test]
fn a_second_vmm_waits_for_the_first() {
    let daemon = Daemon::start(1);
    let mut first = Vmm::started(&daemon.path, 2);
    let second = UnixStream::connect(&daemon.path).unwrap();
    first.echo(1, 0);
    let waiting = std::thread::spawn(move || {
        let mut second = Vmm::on(second, 2);
        second.set_features(0);
        second.frontend.set_mem_table(&second.guest.regions()).unwrap();
        second.start_ring(1, 0);
        second.echo(1, 0);
    });
    std::thread::sleep(Duration::from_millis(50));
    assert!(!waiting.is_finished());
    first.echo(1, 0);
    drop(first);
    waiting.join().unwrap();
}

#[test]
fn stopping_does_not_wait_for_anybody() {
    // Each of them would be waited for without end.
    let limit = LIMIT;
    // Nobody there.
    assert!(Daemon::start(1).end() < limit);
    // A VMM that says nothing, one in the middle of a message, one that reads no answers.
    let mut daemon = Daemon::start(1);
    let _silent = UnixStream::connect(&daemon.path).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert!(daemon.end() < limit);
    let mut daemon = Daemon::start(1);
    let mut stuck = UnixStream::connect(&daemon.path).unwrap();
    stuck.write_all(&[1, 0, 0]).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert!(daemon.end() < limit);
    let mut daemon = Daemon::start(1);
    let mut deaf = UnixStream::connect(&daemon.path).unwrap();
    deaf.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    let question = message(GET_FEATURES, 0, &[]);
    while deaf.write_all(&question).is_ok() {}
    assert!(daemon.end() < limit);
    // Held requests, on many queues.
    let mut daemon = Daemon::start(3);
    let mut vmm = Vmm::started(&daemon.path, 4);
    for ring in 1..4 {
        for slot in 0..16 {
            let unique = u64::from(slot) + 100 * ring as u64;
            vmm.send(ring, slot, &request(WAIT, unique, b""), 64);
        }
    }
    eventually("they wait", || daemon.world.waiting() == 48);
    assert!(daemon.end() < limit);
    eventually("nobody waits", || daemon.world.waiting() == 0);
    assert!(!daemon.path.exists());
}

#[test]
fn stopping_a_busy_ring_is_quick() {
    let daemon = Daemon::start(1);
    let mut vmm = Vmm::started(&daemon.path, 2);
    let mut ring = vmm.rings[1].clone();
    let kick = vmm.kicks[1].try_clone().unwrap();
    let head = ring.prepare(0, &request(ECHO, 1, b""), 64);
    let busy = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
    let guest = std::thread::spawn({
        let busy = std::sync::Arc::clone(&busy);
        move || {
            while busy.load(std::sync::atomic::Ordering::Relaxed) {
                if ring.avail.wrapping_sub(ring.used_index()) < 16 {
                    ring.publish(head);
                    kick.write(1).unwrap();
                }
            }
        }
    });
    std::thread::sleep(Duration::from_millis(20));
    let start = Instant::now();
    vmm.stop_ring(1);
    assert!(start.elapsed() < LIMIT, "{:?}", start.elapsed());
    busy.store(false, std::sync::atomic::Ordering::Relaxed);
    guest.join().unwrap();
}
