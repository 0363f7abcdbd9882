//! What a guest and the server agreed on: INIT and its answer.
//!
//! The answer takes up everything that saves round trips on a file system that never changes, of
//! what the guest offers. `docs/fuse.md` lists the flags with their reasons.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::abi::{self, InitFlags};
use super::dax::Mapping;
use super::mounts::Promise;

/// Largest read or write in pages of 4 KiB.
const MAX_PAGES: u16 = 256;
/// Read-ahead requests that a guest may have under way.
const MAX_BACKGROUND: u16 = 1024;
/// Offsets of mappings are multiples of 4096, as base-2 logarithm.
const MAP_ALIGNMENT: u16 = 12;

/// What a server may agree to.
#[derive(Clone, Copy, Debug)]
pub struct ServerOptions {
    /// Answer OPEN and OPENDIR so that the guest stops sending them, where it offers to and the
    /// tree never changes. Files then seem to open for writing; the write itself gives EROFS.
    pub zero_message_open: bool,
    /// The mount checks permissions in the guest's kernel (mount option `default_permissions`,
    /// which virtio-fs always has). Needed for idmapped mounts.
    pub default_permissions: bool,
    /// Let the guest keep what it writes to host directories in its page cache for a while: faster,
    /// but the host and other guests see it late, and changes of theirs may be lost.
    pub writeback: bool,
}

impl Default for ServerOptions {
    fn default() -> Self {
        ServerOptions { zero_message_open: true, default_permissions: true, writeback: false }
    }
}

/// What was agreed; every request looks at it once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Terms(u64);

impl Terms {
    /// As a number that another process of the same version understands.
    pub(super) fn to_bits(self) -> u64 {
        self.0
    }

    /// From [`Self::to_bits`].
    pub(super) fn from_bits(bits: u64) -> Terms {
        Terms(bits)
    }

    /// The guest was told that nothing changes.
    pub(super) fn fixed(self) -> bool {
        self.0 & (Self::NO_OPEN | Self::NO_OPENDIR | Self::NO_XATTRS) != 0
    }

    const OPEN: u64 = 1 << 0;
    const NO_OPEN: u64 = 1 << 1;
    const NO_OPENDIR: u64 = 1 << 2;
    const NO_XATTRS: u64 = 1 << 3;
    const SUBMOUNTS: u64 = 1 << 4;
    const SETXATTR_EXT: u64 = 1 << 5;
    const WRITEBACK: u64 = 1 << 6;
    const DAX_PRIVATE: u64 = 1 << 7;
    const DAX_SHARED: u64 = 1 << 8;
    const MINOR_SHIFT: u32 = 32;

    /// An INIT has been answered, and no DESTROY since.
    pub(super) fn open(self) -> bool {
        self.0 & Self::OPEN != 0
    }

    /// The guest takes ENOSYS to OPEN as "never ask again".
    pub(super) fn no_open(self) -> bool {
        self.0 & Self::NO_OPEN != 0
    }

    /// The guest takes ENOSYS to OPENDIR as "never ask again".
    pub(super) fn no_opendir(self) -> bool {
        self.0 & Self::NO_OPENDIR != 0
    }

    /// No node has extended attributes, nor will have: the guest need not ask.
    pub(super) fn no_xattrs(self) -> bool {
        self.0 & Self::NO_XATTRS != 0
    }

    /// The guest makes a mount of its own of a directory that is marked as one.
    pub(super) fn submounts(self) -> bool {
        self.0 & Self::SUBMOUNTS != 0
    }

    /// SETXATTR has all its arguments.
    pub(super) fn setxattr_ext(self) -> bool {
        self.0 & Self::SETXATTR_EXT != 0
    }

    /// The guest keeps what it writes for a while.
    pub(super) fn writeback(self) -> bool {
        self.0 & Self::WRITEBACK != 0
    }

    /// How files are mapped that are marked for it.
    pub(super) fn mapping(self) -> Mapping {
        if self.0 & Self::DAX_PRIVATE != 0 {
            Mapping::Private
        } else if self.0 & Self::DAX_SHARED != 0 {
            Mapping::Shared
        } else {
            Mapping::None
        }
    }

    /// Version that both sides speak.
    pub(super) fn minor(self) -> u64 {
        self.0 >> Self::MINOR_SHIFT
    }
}

/// The state of a connection between INIT and DESTROY.
#[derive(Default)]
pub(super) struct Session {
    terms: AtomicU64,
    /// Kept for a guest that was told that nothing changes.
    promise: Mutex<Option<Promise>>,
}

impl Session {
    pub(super) fn terms(&self) -> Terms {
        Terms(self.terms.load(Ordering::Relaxed))
    }

    /// Goes on with what another process agreed on.
    pub(super) fn resume(&self, terms: Terms, promise: Option<Promise>) {
        self.keep(promise);
        self.terms.store(terms.0, Ordering::Relaxed);
    }

    /// The guest leaves.
    pub(super) fn end(&self) {
        self.terms.store(0, Ordering::Relaxed);
        self.keep(None);
    }

    fn keep(&self, promise: Option<Promise>) {
        *self.promise.lock().unwrap_or_else(PoisonError::into_inner) = promise;
    }

    /// Starts afresh, whatever was before. Returns the answer and how many bytes of it the guest
    /// expects; `None` if it speaks no version that we do.
    ///
    /// `fixed` is there if the tree never changes as long as the promise is kept, and says whether
    /// a node has extended attributes. Otherwise anything may be mounted later, and what is agreed
    /// has to be right for that, too. `mapping` is what the window of the guest is good for.
    pub(super) fn start(
        &self,
        init: &abi::InitIn,
        options: &ServerOptions,
        fixed: Option<(Promise, bool)>,
        mapping: Mapping,
    ) -> Option<(abi::InitOut, usize)> {
        self.end();
        if init.major < abi::MAJOR {
            return None;
        }
        if init.major > abi::MAJOR {
            // The guest falls back to our major version and asks again.
            let out = abi::InitOut { major: abi::MAJOR, minor: abi::MINOR, ..Default::default() };
            return Some((out, size_of::<abi::InitOut>()));
        }
        let minor = init.minor.min(abi::MINOR);
        let offered = offered(init);
        let xattrs = fixed.as_ref().is_none_or(|(_, xattrs)| *xattrs);
        let mut wanted = wanted(options, fixed.is_some(), xattrs);
        if mapping != Mapping::None {
            wanted |= InitFlags::MAP_ALIGNMENT | InitFlags::HAS_INODE_DAX;
        }
        let flags = offered & wanted;
        let (low, high) = halves(flags);
        let out = abi::InitOut {
            major: abi::MAJOR,
            minor,
            max_readahead: init.max_readahead,
            flags: low,
            max_background: MAX_BACKGROUND,
            congestion_threshold: MAX_BACKGROUND / 4 * 3,
            max_write: u32::from(MAX_PAGES) * 4096,
            time_gran: 1,
            max_pages: if flags.contains(InitFlags::MAX_PAGES) { MAX_PAGES } else { 0 },
            map_alignment: match flags.contains(InitFlags::MAP_ALIGNMENT) {
                true => MAP_ALIGNMENT,
                false => 0,
            },
            flags2: high,
            ..Default::default()
        };
        let len = match minor {
            0..5 => 8,
            5..23 => 24,
            _ => size_of::<abi::InitOut>(),
        };
        let zero_message = options.zero_message_open && fixed.is_some();
        let mut terms = Terms::OPEN | u64::from(minor) << Terms::MINOR_SHIFT;
        if zero_message && offered.contains(InitFlags::NO_OPEN_SUPPORT) {
            terms |= Terms::NO_OPEN;
        }
        if zero_message && offered.contains(InitFlags::NO_OPENDIR_SUPPORT) {
            terms |= Terms::NO_OPENDIR;
        }
        if !xattrs {
            terms |= Terms::NO_XATTRS;
        }
        if flags.contains(InitFlags::HAS_INODE_DAX) {
            terms |= match mapping {
                Mapping::None => 0,
                Mapping::Private => Terms::DAX_PRIVATE,
                Mapping::Shared => Terms::DAX_SHARED,
            };
        }
        for (flag, term) in [
            (InitFlags::SUBMOUNTS, Terms::SUBMOUNTS),
            (InitFlags::SETXATTR_EXT, Terms::SETXATTR_EXT),
            (InitFlags::WRITEBACK_CACHE, Terms::WRITEBACK),
        ] {
            if flags.contains(flag) {
                terms |= term;
            }
        }
        self.keep(fixed.map(|(promise, _)| promise));
        self.terms.store(terms, Ordering::Relaxed);
        Some((out, len))
    }
}

/// What a guest offers.
fn offered(init: &abi::InitIn) -> InitFlags {
    InitFlags::from_bits_retain(u64::from(init.flags2) << 32 | u64::from(init.flags))
}

/// Whether a guest has a DAX window, and may want to use it.
pub(super) fn has_window(init: &abi::InitIn) -> bool {
    offered(init).contains(InitFlags::MAP_ALIGNMENT)
}

/// Flags that we answer if they are offered.
fn wanted(options: &ServerOptions, fixed: bool, xattrs: bool) -> InitFlags {
    let mut flags = InitFlags::ASYNC_READ
        | InitFlags::EXPORT_SUPPORT
        | InitFlags::BIG_WRITES
        | InitFlags::DO_READDIRPLUS
        | InitFlags::ASYNC_DIO
        | InitFlags::PARALLEL_DIROPS
        | InitFlags::MAX_PAGES
        | InitFlags::CACHE_SYMLINKS
        | InitFlags::INIT_EXT;
    if xattrs {
        flags |= InitFlags::POSIX_ACL;
    }
    if options.default_permissions {
        flags |= InitFlags::ALLOW_IDMAP;
    }
    if !fixed {
        // For what can be written, which may be mounted at any time.
        flags |= InitFlags::ATOMIC_O_TRUNC
            | InitFlags::DONT_MASK
            | InitFlags::AUTO_INVAL_DATA
            | InitFlags::SUBMOUNTS
            | InitFlags::HANDLE_KILLPRIV_V2
            | InitFlags::SETXATTR_EXT
            | InitFlags::CREATE_SUPP_GROUP;
        if options.writeback {
            flags |= InitFlags::WRITEBACK_CACHE;
        }
    }
    flags
}

/// The two fields that carry flags, low half first.
fn halves(flags: InitFlags) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = flags.bits().to_le_bytes();
    (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuse::{MountPath, Mounts, RafsFs, RafsOptions};
    use crate::rafs::Bootstrap;

    /// What is promised of an image at `/`; of the two, one has extended attributes.
    fn fixed(xattrs: bool) -> Option<(Promise, bool)> {
        let image = if xattrs { "v6-none" } else { "v6-empty" };
        let path = format!("{}/guest-tests/golden/{image}/bootstrap", env!("CARGO_MANIFEST_DIR"));
        let image = Bootstrap::open(path.as_ref()).unwrap();
        let fixed =
            Mounts::single(RafsFs::new(image, Vec::new(), RafsOptions::default())).promise();
        assert_eq!(fixed.as_ref().map(|(_, xattrs)| *xattrs), Some(xattrs));
        fixed
    }

    /// INIT of a guest that offers everything.
    fn init(minor: u32) -> abi::InitIn {
        let all = u32::MAX;
        abi::InitIn {
            major: 7,
            minor,
            max_readahead: 131_072,
            flags: all,
            flags2: all,
            ..Default::default()
        }
    }

    #[test]
    fn the_answer_has_the_length_of_the_guests_version() {
        for (minor, want, len) in [
            (4, 4, 8),
            (5, 5, 24),
            (12, 12, 24),
            (22, 22, 24),
            (23, 23, 64),
            (45, 45, 64),
            (99, 45, 64),
        ] {
            let (out, got) = Session::default()
                .start(&init(minor), &ServerOptions::default(), fixed(true), Mapping::None)
                .unwrap();
            assert_eq!((out.minor, got), (want, len), "minor {minor}");
        }
    }

    #[test]
    fn only_what_is_offered_is_answered() {
        let nothing = abi::InitIn { major: 7, minor: 31, ..Default::default() };
        let session = Session::default();
        let (out, _) =
            session.start(&nothing, &ServerOptions::default(), fixed(true), Mapping::None).unwrap();
        assert_eq!((out.flags, out.flags2, out.max_pages, out.max_readahead), (0, 0, 0, 0));
        assert!(!session.terms().no_open() && !session.terms().no_opendir());

        let (out, _) = session
            .start(&init(45), &ServerOptions::default(), fixed(true), Mapping::None)
            .unwrap();
        // ASYNC_READ, EXPORT_SUPPORT, BIG_WRITES, DO_READDIRPLUS, ASYNC_DIO, PARALLEL_DIROPS,
        // POSIX_ACL, MAX_PAGES, CACHE_SYMLINKS, INIT_EXT; ALLOW_IDMAP
        assert_eq!((out.flags, out.flags2), (0x40D4_A031, 0x100));
        assert_eq!((out.max_pages, out.max_write, out.max_readahead), (256, 1 << 20, 131_072));
        assert!(session.terms().no_open() && session.terms().no_opendir());

        let (out, _) = session
            .start(&init(45), &ServerOptions::default(), fixed(false), Mapping::None)
            .unwrap();
        assert_eq!(out.flags & 1 << 20, 0, "no ACLs to check without xattrs");
        let options = ServerOptions {
            zero_message_open: false,
            default_permissions: false,
            writeback: false,
        };
        let (out, _) = session.start(&init(45), &options, fixed(true), Mapping::None).unwrap();
        assert_eq!(out.flags2, 0, "idmapped mounts need the kernel's permission checks");
        assert!(!session.terms().no_open() && !session.terms().no_opendir());
        session.start(&init(45), &ServerOptions::default(), None, Mapping::None).unwrap();
        assert!(!session.terms().no_open(), "a tree that changes wants to see each open");
    }

    #[test]
    fn major_versions_are_negotiated() {
        let session = Session::default();
        let newer = abi::InitIn { major: 8, minor: 3, ..init(3) };
        let (out, _) =
            session.start(&newer, &ServerOptions::default(), fixed(true), Mapping::None).unwrap();
        assert_eq!((out.major, out.minor, out.flags), (7, 45, 0));
        assert!(!session.terms().open(), "the guest asks again with our version");
        let older = abi::InitIn { major: 6, ..init(3) };
        assert!(
            session.start(&older, &ServerOptions::default(), fixed(true), Mapping::None).is_none()
        );
    }

    #[test]
    fn a_session_ends_and_starts_afresh() {
        let session = Session::default();
        assert!(!session.terms().open());
        session.start(&init(31), &ServerOptions::default(), fixed(true), Mapping::None).unwrap();
        assert!(session.terms().open());
        assert_eq!(session.terms().minor(), 31);
        let bare = abi::InitIn { flags: 0, flags2: 0, ..init(27) };
        session.start(&bare, &ServerOptions::default(), fixed(true), Mapping::None).unwrap();
        assert_eq!((session.terms().minor(), session.terms().no_open()), (27, false));
        session.end();
        assert!(!session.terms().open());
    }
    #[test]
    fn a_promise_lasts_as_long_as_the_session() {
        let path = format!("{}/guest-tests/golden/v6-none/bootstrap", env!("CARGO_MANIFEST_DIR"));
        let image = Bootstrap::open(path.as_ref()).unwrap();
        let mounts = Mounts::single(RafsFs::new(image, Vec::new(), RafsOptions::default()));
        let session = Session::default();
        session
            .start(&init(45), &ServerOptions::default(), mounts.promise(), Mapping::None)
            .unwrap();
        assert_eq!(mounts.promised(), 1);
        session
            .start(&init(45), &ServerOptions::default(), mounts.promise(), Mapping::None)
            .unwrap();
        assert_eq!(mounts.promised(), 1);
        session.end();
        assert_eq!(mounts.promised(), 0);
        mounts.unmount(&MountPath::root()).unwrap();
        assert!(mounts.promise().is_none(), "anything may be mounted now");
    }
}
