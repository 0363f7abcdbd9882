//! Which file system a node id belongs to: a table that changes while guests read.
//!
//! File systems are mounted at paths; directories that lead to them are made up (`pseudo`). Readers
//! load one version of the table and see all of it or nothing of a change; changes make a new
//! version, one at a time. So a request never waits for a mount, and what was unmounted lives until
//! the last request that found it is done.
//!
//! A node id is `slot << 40 | node`: the slot of a mounted file system and the number it gives the
//! node. Slot 0 is the made-up directories; the root of the tree is [`abi::ROOT_ID`]. A slot is never
//! given to two different file systems, so a node id that a guest kept from an unmounted image is
//! stale for ever. A slot follows from the mountpoint and the image's file alone, as far as there is
//! a choice, so a guest's node ids hold when the daemon was started again.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::{ArcSwap, Guard};

use super::abi::{self, Attr, EntryOut};
use super::counters::{OpCounters, OpTimes, OpTotals, Times};
use super::dax::{DaxCounters, MIN_FILE, Mapping};
use super::file_stats::FileStats;
use super::file_system::{Entry, FileSystem, FsError};
use super::mount_path::MountPath;
use super::passthrough::PassthroughFs;
use super::pseudo::{Child, Directories};
use super::rafs_fs::{RafsFs, VALID_SECS};

/// Bits of a node id that are the file system's own.
pub(super) const NODE_BITS: u32 = 40;
/// The slot of the first image at `/`, whichever it is.
const ROOT_SLOT: u32 = 1;
/// Slots there are; the first two have a meaning of their own.
const SLOTS: u32 = 1 << (64 - NODE_BITS);

/// Why the table stays as it is. Clients of the HTTP API know the texts of the first two.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MountError {
    #[error("{at}: object or filesystem already exists")]
    Exists { at: MountPath },
    #[error("{at}: object or filesystem doesn't exist")]
    Missing { at: MountPath },
    #[error("{at}: {inner} is mounted below it")]
    Above { at: MountPath, inner: MountPath },
    #[error("{at}: lies inside {outer}, which is mounted")]
    Inside { at: MountPath, outer: MountPath },
    #[error("{at}: a guest was told that nothing here changes; it has to mount again first")]
    Promised { at: MountPath },
    #[error("{at}: {SLOTS} file systems have been mounted, no number is left")]
    Full { at: MountPath },
}

/// Anything that can be mounted.
#[derive(Clone)]
pub struct AnyFs(Arc<dyn FileSystem>);

impl AnyFs {
    pub(super) fn new(fs: impl FileSystem + 'static) -> AnyFs {
        AnyFs(Arc::new(fs))
    }
}

impl From<RafsFs> for AnyFs {
    fn from(fs: RafsFs) -> AnyFs {
        AnyFs::new(fs)
    }
}

impl From<PassthroughFs> for AnyFs {
    fn from(fs: PassthroughFs) -> AnyFs {
        AnyFs::new(fs)
    }
}

/// The tree of mounted file systems that servers show.
pub struct Mounts {
    tree: ArcSwap<Tree>,
    changes: Mutex<Changes>,
    /// Sessions that were promised a tree that never changes.
    promises: AtomicUsize,
    /// Makes a difference between file systems that cannot tell who they are.
    nameless: AtomicU64,
    times: OpTimes,
    dax: Arc<DaxCounters>,
}

/// What the next change has to know of earlier ones.
#[derive(Default)]
struct Changes {
    /// Who has ever had a slot.
    owners: HashMap<u32, Owner>,
    /// What was counted on mounts that are no more.
    retired: OpTotals,
}

/// A mountpoint and what was mounted there, shortened to a digest.
type Owner = [u8; 16];

/// One version of the table.
pub(super) struct Tree {
    /// Sorted by slot.
    slots: Vec<Arc<Mounted>>,
    /// What is mounted at `/`: then nothing else is mounted.
    root: Option<Arc<Mounted>>,
    dirs: Directories,
    /// Of requests that are about no mounted file system.
    counters: Arc<OpCounters>,
}

/// One mounted file system.
pub(super) struct Mounted {
    slot: u32,
    at: MountPath,
    fs: Arc<dyn FileSystem>,
    counters: OpCounters,
}

/// A node in one file system.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) fs: &'a dyn FileSystem,
    slot: u32,
    pub(super) node: u64,
    /// Whether the root of `fs` is the root of the tree.
    at_root: bool,
    /// How the guest who asks can map files.
    pub(super) mapping: Mapping,
}

/// How the nodes of one file system are called by guests.
#[derive(Clone, Copy, Debug)]
pub(super) struct Naming {
    slot: u32,
    /// The root's number, if it is the root of the tree.
    root: Option<u64>,
}

impl Naming {
    /// The id by which a guest knows `node`.
    pub(super) fn nodeid(&self, node: u64) -> u64 {
        if self.root == Some(node) {
            return abi::ROOT_ID;
        }
        u64::from(self.slot) << NODE_BITS | node
    }

    /// The node that a guest means by `nodeid`; `None` if it is one of another file system.
    pub(super) fn node(&self, nodeid: u64) -> Option<u64> {
        if nodeid == abi::ROOT_ID {
            return self.root;
        }
        (nodeid >> NODE_BITS == u64::from(self.slot)).then_some(nodeid & ((1 << NODE_BITS) - 1))
    }
}

/// As long as it lives, only what never changes can be mounted.
pub(super) struct Promise {
    mounts: Arc<Mounts>,
}

impl Drop for Promise {
    fn drop(&mut self) {
        self.mounts.promises.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Mounts {
    /// An empty root directory.
    pub fn new() -> Arc<Mounts> {
        let counters = Arc::new(OpCounters::new(None));
        let dirs = Directories::default();
        let tree = Tree { slots: Vec::new(), root: None, dirs, counters };
        Arc::new(Mounts {
            tree: ArcSwap::from_pointee(tree),
            changes: Mutex::default(),
            promises: AtomicUsize::new(0),
            nameless: AtomicU64::new(0),
            times: OpTimes::new(),
            dax: Arc::default(),
        })
    }

    /// One image at `/`.
    pub fn single(image: RafsFs) -> Arc<Mounts> {
        let mounts = Mounts::new();
        mounts.mount(&MountPath::root(), image.into()).expect("nothing is in the way");
        mounts
    }

    /// Mounts `fs` at `at`, making up the directories that lead there. Guests see it from their next
    /// lookup on.
    ///
    /// # Errors
    ///
    /// Something is mounted at `at`, above or below it; or `fs` changes and guests rely on that
    /// nothing does. Nothing has been changed then.
    pub fn mount(&self, at: &MountPath, fs: AnyFs) -> Result<(), MountError> {
        let mut changes = self.lock();
        self.check_free(at)?;
        self.check_promise(at, &fs)?;
        let mounted = changes.settle(at, fs, &self.nameless)?;
        let tree = self.tree.load_full();
        let mut dirs = tree.dirs.clone();
        let root = at.is_root().then(|| Arc::clone(&mounted));
        if !at.is_root() {
            dirs.add(at, mounted.slot);
        }
        let mut slots = tree.slots.clone();
        let place = slots.partition_point(|other| other.slot < mounted.slot);
        slots.insert(place, mounted);
        let counters = Arc::clone(&tree.counters);
        self.tree.store(Arc::new(Tree { slots, root, dirs, counters }));
        Ok(())
    }

    /// Puts `fs` in the place of what is mounted at `at`. Node ids of another image become stale;
    /// of the same one they hold.
    ///
    /// # Errors
    ///
    /// Nothing is mounted there; or as for [`Mounts::mount`]. Nothing has been changed then.
    pub fn remount(&self, at: &MountPath, fs: AnyFs) -> Result<(), MountError> {
        let mut changes = self.lock();
        let tree = self.tree.load_full();
        let old = tree.find(at).ok_or_else(|| MountError::Missing { at: at.clone() })?;
        self.check_promise(at, &fs)?;
        let mounted = changes.settle(at, fs, &self.nameless)?;
        let mut slots = tree.slots.clone();
        slots.retain(|other| other.slot != old.slot);
        let place = slots.partition_point(|other| other.slot < mounted.slot);
        let mut dirs = tree.dirs.clone();
        if !at.is_root() {
            dirs.replace(at, mounted.slot);
        }
        let root = at.is_root().then(|| Arc::clone(&mounted));
        slots.insert(place, mounted);
        let counters = Arc::clone(&tree.counters);
        self.tree.store(Arc::new(Tree { slots, root, dirs, counters }));
        changes.retired.add(&old.counters.totals());
        Ok(())
    }

    /// Takes away what is mounted at `at`, and the directories that led only there. Requests under
    /// way end on what they found; later ones get ESTALE.
    ///
    /// # Errors
    ///
    /// Nothing is mounted there.
    pub fn unmount(&self, at: &MountPath) -> Result<(), MountError> {
        let mut changes = self.lock();
        let tree = self.tree.load_full();
        let old = tree.find(at).ok_or_else(|| MountError::Missing { at: at.clone() })?;
        let mut slots = tree.slots.clone();
        slots.retain(|other| other.slot != old.slot);
        let mut dirs = tree.dirs.clone();
        if !at.is_root() {
            dirs.remove(at);
        }
        let counters = Arc::clone(&tree.counters);
        self.tree.store(Arc::new(Tree { slots, root: None, dirs, counters }));
        changes.retired.add(&old.counters.totals());
        Ok(())
    }

    /// Whether something could be mounted at `at` now.
    ///
    /// # Errors
    ///
    /// What is in the way.
    pub fn check_free(&self, at: &MountPath) -> Result<(), MountError> {
        let tree = self.tree.load();
        for mounted in &tree.slots {
            let (at, other) = (at.clone(), mounted.at.clone());
            if at == other {
                return Err(MountError::Exists { at });
            } else if other.leads_to(&at) {
                return Err(MountError::Inside { at, outer: other });
            } else if at.leads_to(&other) {
                return Err(MountError::Above { at, inner: other });
            }
        }
        Ok(())
    }

    /// Mountpoints, in no order.
    pub fn paths(&self) -> Vec<MountPath> {
        self.tree.load().slots.iter().map(|mounted| mounted.at.clone()).collect()
    }

    /// What was asked on all mounts since the daemon started. A request that was under way when its
    /// mount went may be missing.
    pub fn totals(&self) -> OpTotals {
        let mut totals = self.lock().retired.clone();
        let tree = self.tree.load();
        totals.add(&tree.counters.totals());
        tree.slots.iter().for_each(|mounted| totals.add(&mounted.counters.totals()));
        totals
    }

    /// What was asked on the mount at `at` since it was mounted.
    pub fn totals_at(&self, at: &MountPath) -> Option<OpTotals> {
        self.tree.load().find(at).map(|mounted| mounted.counters.totals())
    }

    /// What was done with each file of the mount at `at`, if that is recorded.
    pub fn file_stats_at(&self, at: &MountPath) -> Option<Arc<FileStats>> {
        self.tree.load().find(at)?.counters.files.clone()
    }

    /// How long requests took, by kind.
    pub fn request_times(&self) -> Vec<Times> {
        self.times.totals()
    }

    /// What was done with the DAX windows of all guests.
    pub fn dax_counters(&self) -> &Arc<DaxCounters> {
        &self.dax
    }

    pub(super) fn times(&self) -> &OpTimes {
        &self.times
    }

    /// The table as it is now.
    pub(super) fn load(&self) -> Guard<Arc<Tree>> {
        self.tree.load()
    }

    /// If the tree is one image that never changes, and so nothing else can be mounted: a promise
    /// that this stays so, and whether some node may have extended attributes.
    pub(super) fn promise(self: &Arc<Self>) -> Option<(Promise, bool)> {
        let _changes = self.lock();
        let tree = self.tree.load();
        let root = tree.root.as_ref().filter(|root| root.fs.immutable())?;
        self.promises.fetch_add(1, Ordering::Relaxed);
        Some((Promise { mounts: Arc::clone(self) }, root.fs.has_xattrs()))
    }

    /// Sessions that rely on that nothing changes.
    #[cfg(test)]
    pub(super) fn promised(&self) -> usize {
        self.promises.load(Ordering::Relaxed)
    }

    fn check_promise(&self, at: &MountPath, fs: &AnyFs) -> Result<(), MountError> {
        if self.promises.load(Ordering::Relaxed) > 0 && !fs.0.immutable() {
            return Err(MountError::Promised { at: at.clone() });
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Changes> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Changes {
    /// Gives `fs` a slot that no other file system has had.
    fn settle(
        &mut self,
        at: &MountPath,
        fs: AnyFs,
        nameless: &AtomicU64,
    ) -> Result<Arc<Mounted>, MountError> {
        let mut hash = blake3::Hasher::new();
        hash.update(at.to_string().as_bytes());
        hash.update(b"\0");
        match fs.0.identity() {
            Some(identity) => hash.update(&identity),
            None => hash.update(&nameless.fetch_add(1, Ordering::Relaxed).to_le_bytes()),
        };
        let hash = *hash.finalize().as_bytes();
        let mut owner = Owner::default();
        owner.copy_from_slice(&hash[..16]);
        let mut slot = u32::from_le_bytes([hash[16], hash[17], hash[18], 0]);
        if at.is_root() && self.owners.get(&ROOT_SLOT).is_none_or(|first| *first == owner) {
            slot = ROOT_SLOT;
        }
        for _ in 0..SLOTS {
            let free = self.owners.get(&slot).is_none_or(|other| *other == owner);
            if free && (slot > ROOT_SLOT || (slot == ROOT_SLOT && at.is_root())) {
                self.owners.insert(slot, owner);
                let (at, counters) = (at.clone(), OpCounters::new(fs.0.file_stats()));
                return Ok(Arc::new(Mounted { slot, at, fs: fs.0, counters }));
            }
            slot = (slot + 1) % SLOTS;
        }
        Err(MountError::Full { at: at.clone() })
    }
}

impl Tree {
    /// The node that a guest means by `nodeid`, if its file system is mounted.
    pub(super) fn resolve(&self, nodeid: u64) -> Option<Place<'_>> {
        if nodeid == abi::ROOT_ID {
            return Some(match &self.root {
                Some(root) => root.place(root.fs.root(), true),
                None => self.dirs.place(nodeid),
            });
        }
        let (slot, node) = (nodeid >> NODE_BITS, nodeid & ((1 << NODE_BITS) - 1));
        if slot == 0 {
            return self.root.is_none().then(|| self.dirs.place(node));
        }
        let mounted = self.mounted(u32::try_from(slot).ok()?)?;
        Some(mounted.place(node, self.root.is_some()))
    }

    /// Where a request that is about `nodeid` counts.
    pub(super) fn counters(&self, nodeid: u64) -> &OpCounters {
        let mounted = match nodeid {
            abi::ROOT_ID => self.root.as_ref(),
            _ => u32::try_from(nodeid >> NODE_BITS).ok().and_then(|slot| self.mounted(slot)),
        };
        mounted.map_or(&self.counters, |mounted| &mounted.counters)
    }

    /// All mounted file systems.
    pub(super) fn file_systems(&self) -> impl Iterator<Item = &dyn FileSystem> {
        self.slots.iter().map(|mounted| &*mounted.fs)
    }

    fn mounted(&self, slot: u32) -> Option<&Arc<Mounted>> {
        let i = self.slots.binary_search_by_key(&slot, |mounted| mounted.slot).ok()?;
        self.slots.get(i)
    }

    fn find(&self, at: &MountPath) -> Option<&Arc<Mounted>> {
        self.slots.iter().find(|mounted| mounted.at == *at)
    }

    /// What a guest is told about `name` in the directory at `place`.
    pub(super) fn lookup(&self, place: &Place<'_>, name: &[u8]) -> Result<EntryOut, FsError> {
        let Place { fs, node, .. } = *place;
        if place.slot == 0 {
            return self.lookup_pseudo(node, name);
        }
        Ok(match name {
            b"." => place.entry_out(Some(&Entry { node, attr: fs.attr(node)? })),
            b".." if node == fs.root() && !place.at_root => {
                let mounted = self.mounted(place.slot).ok_or(FsError::Stale)?;
                let parent = self.dirs.parent_of(&mounted.at).ok_or(FsError::Stale)?;
                pseudo_entry(parent, self.dirs.attr(parent)?)
            }
            b".." => place.entry_out(Some(&fs.parent(node)?)),
            _ => place.entry_out(fs.lookup(node, name)?.as_ref()),
        })
    }

    /// A name in a made-up directory. Guests ask for it each time: something may have been mounted
    /// or unmounted there.
    fn lookup_pseudo(&self, node: u64, name: &[u8]) -> Result<EntryOut, FsError> {
        let slot = match self.dirs.find(node, name)? {
            Child::Dir(node) => return Ok(pseudo_entry(node, self.dirs.attr(node)?)),
            Child::Mount(slot) => slot,
        };
        let mounted = self.mounted(slot).ok_or(FsError::NoEntry)?;
        let root = mounted.place(mounted.fs.root(), false);
        let entry = Entry { node: root.node, attr: mounted.fs.attr(root.node)? };
        Ok(EntryOut { entry_valid: 0, entry_valid_nsec: 0, ..root.entry_out(Some(&entry)) })
    }
}

fn pseudo_entry(node: u64, attr: Attr) -> EntryOut {
    EntryOut { nodeid: node, attr_valid: VALID_SECS, attr, ..EntryOut::default() }
}

impl Mounted {
    fn place(&self, node: u64, at_root: bool) -> Place<'_> {
        Place { fs: &*self.fs, slot: self.slot, node, at_root, mapping: Mapping::None }
    }
}

impl Directories {
    fn place(&self, node: u64) -> Place<'_> {
        Place { fs: self, slot: 0, node, at_root: true, mapping: Mapping::None }
    }
}

impl Place<'_> {
    /// How the nodes of this file system are called.
    pub(super) fn naming(&self) -> Naming {
        Naming { slot: self.slot, root: self.at_root.then(|| self.fs.root()) }
    }

    /// The id by which a guest knows `node`, of the same file system.
    pub(super) fn nodeid(&self, node: u64) -> u64 {
        self.naming().nodeid(node)
    }

    /// The number of an inode (`st_ino`) as a guest sees it. Images count theirs from the same
    /// number, and a guest sees all of them as one device.
    pub(super) fn ino(&self, ino: u64) -> u64 {
        if self.at_root || !self.fs.counts_inodes() {
            return ino;
        }
        u64::from(self.slot) << NODE_BITS | ino
    }

    /// Attributes of `node` as a guest sees them.
    pub(super) fn attr(&self, node: u64, attr: Attr) -> Attr {
        let flags = match self.mapping != Mapping::None && self.is_for_window(node, &attr) {
            true => attr.flags | abi::ATTR_DAX,
            false => attr.flags,
        };
        Attr { ino: self.ino(attr.ino), flags, ..attr }
    }

    /// Whether the guest should read `node` through its DAX window.
    fn is_for_window(&self, node: u64, attr: &Attr) -> bool {
        attr.mode & libc::S_IFMT == libc::S_IFREG
            && attr.size >= MIN_FILE
            && self.fs.maps_well(node, self.mapping)
    }

    /// What a guest is told about a name in this file system; without an entry, that there is none.
    pub(super) fn entry_out(&self, entry: Option<&Entry>) -> EntryOut {
        let valid = self.fs.valid_secs();
        EntryOut {
            nodeid: entry.map_or(0, |entry| self.nodeid(entry.node)),
            entry_valid: valid,
            attr_valid: valid,
            attr: entry.map(|entry| self.attr(entry.node, entry.attr)).unwrap_or_default(),
            ..EntryOut::default()
        }
    }
}
