//! A guest goes on from a snapshot, with another device.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;

use vhost::vhost_user::message::{VhostTransferStateDirection, VhostTransferStatePhase};

use super::*;

/// SAVE, as cloud-hypervisor does it; `None` if the device refuses.
fn save(vmm: &mut Vmm) -> Option<Vec<u8>> {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let direction = VhostTransferStateDirection::SAVE;
    let phase = VhostTransferStatePhase::STOPPED;
    vmm.frontend.set_device_state_fd(direction, phase, OwnedFd::from(theirs)).ok()?;
    let mut state = Vec::new();
    File::from(OwnedFd::from(ours)).read_to_end(&mut state).unwrap();
    vmm.frontend.check_device_state().unwrap();
    Some(state)
}

/// LOAD. False if the device says that it did not work.
fn load(vmm: &mut Vmm, state: &[u8]) -> bool {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let direction = VhostTransferStateDirection::LOAD;
    let phase = VhostTransferStatePhase::STOPPED;
    vmm.frontend.set_device_state_fd(direction, phase, OwnedFd::from(theirs)).unwrap();
    let _ = ours.write_all(state);
    drop(ours);
    vmm.frontend.check_device_state().is_ok()
}

#[test]
fn a_guest_goes_on_from_a_snapshot() {
    let first = Daemon::start(1);
    let mut vmm = Vmm::started(&first.path, 2);
    vmm.send(1, 0, &request(AGREE, 1, &77u64.to_le_bytes()), 64);
    vmm.receive(1, 0);
    for slot in [4, 2, 3] {
        vmm.send(1, slot, &request(WAIT, slot.into(), &[slot as u8]), 64);
    }
    eventually("they wait", || first.world.waiting() == 3);
    assert!(save(&mut vmm).is_none(), "rings that work cannot be saved");
    let bases = [vmm.stop_ring(0), vmm.stop_ring(1)];
    let state = save(&mut vmm).unwrap();
    // The guest that was copied goes on, too.
    let (guest, rings) = (vmm.guest.copy(), vmm.rings.clone());
    vmm.start_ring(1, bases[1]);
    for slot in [2, 3, 4] {
        assert!(first.world.release(slot.into()));
        assert_eq!(vmm.receive(1, slot).body, [slot as u8]);
    }
    drop(vmm);

    let second = Daemon::start(1);
    let mut vmm = Vmm::connect(&second.path, 2);
    assert!(load(&mut vmm, &state));
    vmm.guest = guest.clone();
    vmm.rings = rings;
    vmm.rings.iter_mut().for_each(|ring| ring.guest = guest.clone());
    vmm.set_features(0);
    vmm.frontend.set_mem_table(&vmm.guest.regions()).unwrap();
    vmm.start_ring(0, bases[0]);
    vmm.start_ring(1, bases[1]);
    eventually("they wait again", || second.world.waiting() == 3);
    for slot in [3, 4, 2] {
        assert!(second.world.release(slot.into()));
        assert_eq!(vmm.receive(1, slot).body, [slot as u8]);
    }
    vmm.send(1, 0, &request(AGREED, 2, b""), 64);
    assert_eq!(vmm.receive(1, 0).body, 77u64.to_le_bytes(), "the session goes on");
    for slot in 0..16 {
        vmm.echo(1, slot);
    }
    assert_eq!(vmm.rings[1].take_used(), None, "nothing twice");
}

#[test]
fn states_that_cannot_be() {
    let daemon = Daemon::start(1);
    let mut vmm = Vmm::connect(&daemon.path, 2);
    assert!(vmm.frontend.check_device_state().is_err(), "none was moved");
    let empty = save(&mut vmm).unwrap();
    let no_queue = [&empty[..], &[9, 0, 0, 0, 0, 0]].concat();
    for (state, good) in [(&empty, true), (&no_queue, false), (&b"noise".to_vec(), false)] {
        assert_eq!(load(&mut vmm, state), good, "{state:?}");
    }
    // Of a guest that is somewhere else, and heads that are none.
    let elsewhere = [&empty[..], &[1, 0, 7, 0, 1, 0, 0, 0]].concat();
    assert!(load(&mut vmm, &elsewhere));
    vmm.set_features(0);
    vmm.frontend.set_mem_table(&vmm.guest.regions()).unwrap();
    vmm.start_ring(1, 0);
    vmm.echo(1, 0);
    let mut vmm = {
        drop(vmm);
        Vmm::connect(&daemon.path, 2)
    };
    let beyond = [&empty[..], &[1, 0, 0, 0, 1, 0, 0xff, 0xff]].concat();
    assert!(load(&mut vmm, &beyond));
    vmm.set_features(0);
    vmm.frontend.set_mem_table(&vmm.guest.regions()).unwrap();
    let head = vmm.rings[1].prepare(0, &request(ECHO, 1, b"a"), 64);
    vmm.rings[1].publish(head);
    vmm.start_ring(1, 1);
    // The state says that what is outstanding is a chain that cannot be: the ring starts as told.
    vmm.echo(1, 1);
}
