//! Before INIT, after it, after a second one.

use std::sync::Arc;

use zerocopy::IntoBytes;

use super::guest::{Guest, bootstrap, metadata};
use rafsd::fuse::abi::{self, opcode};
use rafsd::fuse::{Mounts, Outcome, Pins, Reply, ServerOptions};

fn mounts() -> Arc<Mounts> {
    metadata(bootstrap("v6-none"))
}

#[test]
fn nothing_is_answered_before_init() {
    let guest = Guest::unmounted(mounts(), ServerOptions::default());
    for opcode in [1, 3, 5, 14, 15, 17, 27, 28, 44, 52] {
        assert_eq!(
            guest.ask(opcode, 1, b"name\0..............................", 256),
            Err(libc::EIO)
        );
    }
    assert_eq!(guest.ask(opcode::DESTROY, 0, b"", 0), Ok(vec![]), "there is nothing to destroy");
    let forget = guest.request(opcode::FORGET, 1, &1_u64.to_ne_bytes());
    assert_eq!(guest.send(&forget, 0), None);
    guest.init(31, 0).unwrap();
    guest.attr(1).unwrap();
    assert_eq!(guest.ask(opcode::DESTROY, 0, b"", 0), Ok(vec![]));
    assert_eq!(guest.attr(1), Err(libc::EIO), "the session has ended");
}

#[test]
fn a_second_init_is_a_new_session() {
    let guest = Guest::unmounted(mounts(), ServerOptions::default());
    let open = |opcode| {
        guest.ask(opcode, if opcode == opcode::OPEN { guest.at(b"/a") } else { 1 }, &[0; 8], 16)
    };
    // A guest that knows what ENOSYS to OPEN and OPENDIR means: bits 17 and 24.
    guest.init(31, 1 << 17 | 1 << 24).unwrap();
    assert_eq!((open(opcode::OPEN), open(opcode::OPENDIR)), (Err(libc::ENOSYS), Err(libc::ENOSYS)));
    let write = guest.ask(opcode::OPEN, guest.at(b"/a"), &[1, 0, 0, 0, 0, 0, 0, 0], 16);
    assert_eq!(write, Err(libc::EROFS));
    // It reboots into a kernel that does not.
    guest.init(22, 0).unwrap();
    assert!(open(opcode::OPEN).is_ok() && open(opcode::OPENDIR).is_ok());
}

#[test]
fn guests_before_7_9_get_the_answers_they_know() {
    let guest = Guest::unmounted(mounts(), ServerOptions::default());
    // (minor, INIT, LOOKUP, GETATTR, STATFS): lengths
    for (minor, init, entry, attr, statfs) in
        [(3, 8, 120, 96, 48), (4, 8, 120, 96, 80), (8, 24, 120, 96, 80), (12, 24, 128, 104, 80)]
    {
        assert_eq!(guest.init(minor, 0).unwrap().len(), init, "7.{minor}");
        assert_eq!(guest.ask(opcode::LOOKUP, 1, b"a\0", 256).unwrap().len(), entry, "7.{minor}");
        assert_eq!(guest.ask(opcode::GETATTR, 1, b"", 256).unwrap().len(), attr, "7.{minor}");
        assert_eq!(guest.ask(opcode::STATFS, 1, b"", 256).unwrap().len(), statfs, "7.{minor}");
    }
    let args = abi::ReadIn { size: 4096, ..Default::default() };
    let listing = guest.ask(opcode::READDIR, 1, &args.as_bytes()[..24], 4096).unwrap();
    assert!(!listing.is_empty());
}

#[test]
fn init_of_a_version_that_nobody_speaks() {
    let guest = Guest::unmounted(mounts(), ServerOptions::default());
    let init = abi::InitIn { major: 6, minor: 1, ..Default::default() };
    assert_eq!(guest.ask(opcode::INIT, 0, init.as_bytes(), 64), Err(libc::EPROTO));
    let init = abi::InitIn { major: 8, minor: 0, ..Default::default() };
    let answer = guest.ask(opcode::INIT, 0, init.as_bytes(), 64).unwrap();
    assert_eq!(answer[..8], [7, 0, 0, 0, 45, 0, 0, 0]);
    assert_eq!(guest.attr(1), Err(libc::EIO));
}

#[test]
fn an_interrupt_names_its_request_and_gets_no_answer() {
    let guest = Guest::mount(mounts());
    let request = guest.request(opcode::INTERRUPT, 0, &0x1234_u64.to_ne_bytes());
    let outcome = guest.server.handle(&request, &mut Reply::new(&[]), &Pins::default());
    assert!(matches!(outcome, Outcome::Interrupt(0x1234)), "{outcome:?}");
    for (opcode, body) in [(opcode::INTERRUPT, 7), (opcode::FORGET, 7), (opcode::BATCH_FORGET, 7)] {
        let request = guest.request(opcode, 1, &vec![0; body]);
        let outcome = guest.server.handle(&request, &mut Reply::new(&[]), &Pins::default());
        assert!(matches!(outcome, Outcome::NoReply), "{opcode}: {outcome:?}");
    }
}

#[test]
fn an_image_without_xattrs_is_asked_once() {
    let image = bootstrap("v6-empty");
    assert_eq!(image.flags().bits() & 0x20, 0, "HAS_XATTR");
    let guest = Guest::mount(metadata(image));
    let body = [&[8, 0, 0, 0, 0, 0, 0, 0][..], b"security.capability\0"].concat();
    assert_eq!(guest.ask(opcode::GETXATTR, 1, &body, 8), Err(libc::ENOSYS));
    assert_eq!(guest.ask(opcode::LISTXATTR, 1, &body, 8), Err(libc::ENOSYS));
}
