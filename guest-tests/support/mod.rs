//! What the process-level tests share, from the virtqueue upwards.
//!
//! `memory` and `virtqueue` are the guest's side of virtio, `frontend` is the VMM's side of
//! vhost-user, `fuse_abi` and `fuse_client` are the guest kernel's side of FUSE. None of them uses
//! code of the daemon, so that a layout that is wrong there cannot be wrong here in the same way.
//! `daemon` runs `rafsd`, `golden` knows the images whose content is written down, and `hang_fs` is
//! a backend that hangs, fails and lies on command, `fault_registry` one that does so over HTTP;
//! `stage` puts a guest before it, `image` makes images of a size that tests choose. `quick`,
//! which is not in here, holds a daemon to the time in which it ends. `guest` boots real Linux guests.

// Each test program compiles this module whole and uses its own part of it.
#![allow(dead_code)]

pub mod daemon;
pub mod fault_registry;
pub mod frontend;
pub mod fuse_abi;
pub mod fuse_client;
pub mod golden;
pub mod golden_cases;
pub mod guest;
pub mod hang_fs;
pub mod image;
pub mod initramfs;
pub mod memory;
pub mod parts;
pub mod registry;
pub mod rng;
pub mod stage;
pub mod virtqueue;
pub mod window;

/// A `u64` as an index; the tests run on 64-bit hosts only.
pub fn to_usize(value: u64) -> usize {
    usize::try_from(value).expect("a 64-bit host")
}

/// A length as the `u32` that virtio and FUSE structs carry.
pub fn to_u32(value: usize) -> u32 {
    u32::try_from(value).expect("lengths on the wire have 32 bits")
}

/// Prints one line past the test harness's capture, for figures that are worth seeing in a log.
pub fn say(line: impl std::fmt::Display) {
    use std::io::Write;
    // A closed stderr is no reason to fail a test.
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Compares content, and on a difference says where it is rather than print all of it.
#[track_caller]
pub fn assert_same(got: &[u8], want: &[u8], what: impl std::fmt::Display) {
    if got != want {
        let at = got.iter().zip(want).take_while(|(got, want)| got == want).count();
        let (have, should) = (got.len(), want.len());
        panic!("{what}: {have} bytes, should be {should}, different from byte {at} on");
    }
}
