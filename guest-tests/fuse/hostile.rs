//! A guest that sends anything.

use std::collections::BTreeSet;

use proptest::prelude::*;
use vm_memory::VolatileSlice;
use zerocopy::IntoBytes;

use super::guest::{Guest, bootstrap, metadata};
use rafsd::fuse::abi::{InHeader, opcode};
use rafsd::fuse::{Outcome, Pins, Reply, Request};

/// Every inode of an image, by its own account.
fn inodes(case: &str) -> BTreeSet<u64> {
    bootstrap(case).walk().map(|item| item.unwrap().inode.nid().0).collect()
}

#[test]
fn only_slots_where_an_inode_starts_answer() {
    for case in ["v6-none", "v6-zstd", "v6-merged"] {
        let image = bootstrap(case);
        let slots = image.slots();
        // Ids that another daemon handed out: the guest has looked nothing up here.
        let guest = Guest::mount(metadata(image));
        let inodes = inodes(case);
        for nid in (0..slots + 200).chain((0..40).map(|bit| (1 << 40) - (1 << bit))) {
            let got = guest.attr(1 << 40 | nid).map(|attr| attr.ino);
            let want = if inodes.contains(&nid) { Ok(nid) } else { Err(libc::ESTALE) };
            assert_eq!(got, want, "{case}: nid {nid}");
        }
        for slot in [0, 2, 3, 255, 0xFFFF] {
            assert_eq!(guest.attr(slot << 40 | 128), Err(libc::ESTALE), "slot {slot}");
        }
    }
}

#[test]
fn an_unknown_number_costs_one_walk_and_a_known_one_none() {
    let guest = Guest::mount(metadata(bootstrap("v6-zstd")));
    let ask = |node| {
        let request = guest.request(opcode::GETATTR, node, &[0; 16]);
        let mut memory = [0; 256];
        let slices = [VolatileSlice::from(&mut memory[..])];
        guest.server.handle(&request, &mut Reply::new(&slices), &Pins::default())
    };
    let file = guest.at(b"/bigdir/e000000000");
    assert!(matches!(ask(file), Outcome::Reply(_)), "found by LOOKUP");
    let listed = guest.list_all(guest.at(b"/bigdir"), 4096, true);
    assert!(matches!(ask(listed[50].entry.unwrap().nodeid), Outcome::Reply(_)), "by READDIRPLUS");
    let inside = 1 << 40 | 129;
    assert!(matches!(ask(inside), Outcome::Wait(_)), "inside the root inode");
    assert_eq!(guest.attr(inside), Err(libc::ESTALE));
    for nid in 0..5000 {
        assert!(matches!(ask(1 << 40 | nid), Outcome::Reply(_)), "nothing is left to look for");
    }
}

/// Sends raw bytes with buffers of these lengths; what comes back has the right form.
fn send_raw(guest: &Guest, bytes: &[u8], buffers: &[usize]) {
    let Ok(request) = Request::parse(bytes) else { return };
    let mut memory: Vec<Vec<u8>> = buffers.iter().map(|&len| vec![0xAA; len]).collect();
    let slices: Vec<_> =
        memory.iter_mut().map(|buffer| VolatileSlice::from(&mut buffer[..])).collect();
    let outcome = guest.server.handle(&request, &mut Reply::new(&slices), &Pins::default());
    drop(slices);
    let memory = memory.concat();
    if let Outcome::Reply(len) = outcome {
        let len = usize::try_from(len).unwrap();
        assert!(len == 0 || (16..=memory.len()).contains(&len), "{len} of {}", memory.len());
        if len > 0 {
            assert_eq!(memory[..4], u32::try_from(len).unwrap().to_ne_bytes(), "header.len");
            assert_eq!(memory[8..16], request.header.unique.to_ne_bytes());
        } else {
            assert!(memory.len() < 16, "there was room for an error");
        }
    }
}

/// A guest that has looked at everything.
fn seasoned() -> Guest {
    let guest = Guest::mount(metadata(bootstrap("v6-none")));
    guest.attr(1 << 40 | 1).unwrap_err();
    guest
}

proptest! {
    #[test]
    fn any_bytes_give_an_outcome(
        opcode in prop_oneof![0u32..60, any::<u32>()],
        node in prop_oneof![
            Just(1u64),
            (0u64..600).prop_map(|nid| 1 << 40 | nid),
            any::<u64>(),
        ],
        body in prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..80),
            // Numbers that are small or extreme more often than not.
            proptest::collection::vec(
                prop_oneof![0u64..9000, Just(u64::MAX), Just(i64::MAX as u64), any::<u64>()], 0..8
            ).prop_map(|words| words.as_bytes().to_vec()),
        ],
        buffers in proptest::collection::vec(0usize..5000, 0..6),
        raw in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        let guest = seasoned();
        let len = u32::try_from(size_of::<InHeader>() + body.len()).unwrap();
        let header = InHeader { len, opcode, unique: 99, nodeid: node, ..Default::default() };
        // File data needs blobs; `content` reads it.
        if opcode != opcode::READ {
            send_raw(&guest, &[header.as_bytes(), &body].concat(), &buffers);
        }
        send_raw(&guest, &raw, &buffers);
        guest.init(45, u32::MAX).unwrap();
        guest.attr(1).unwrap();
    }

    #[test]
    fn any_damaged_image_gives_an_outcome(
        changes in proptest::collection::vec((0x2000usize..0x4000, any::<u8>()), 1..30),
        nodes in proptest::collection::vec(0u64..700, 1..20),
    ) {
        let mut bytes = std::fs::read(super::guest::path("v6-none").join("bootstrap")).unwrap();
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        if let Ok(image) = rafsd::rafs::Bootstrap::from_bytes(bytes) {
            let guest = Guest::mount(metadata(image));
            for nid in nodes {
                let node = 1 << 40 | nid;
                for op in [opcode::GETATTR, opcode::READLINK, opcode::OPENDIR, opcode::OPEN] {
                    let _ = guest.ask(op, node, &[0; 24], 4096);
                }
                let _ = guest.list(node, 0, 4096, true);
                let _ = guest.lookup(node, b"a");
                let _ = guest.ask(opcode::LISTXATTR, node, &[0, 8, 0, 0, 0, 0, 0, 0], 4096);
                let seek = [0_u64, 0, 3];
                let _ = guest.ask(opcode::LSEEK, node, seek.as_bytes(), 8);
            }
        }
    }
}
