//! Which file system a node id belongs to.
//!
//! A node id is `slot << 48 | node`: the slot of a mounted file system, counted from 1, and the
//! number it gives the node. Nothing need be remembered about node ids, so a guest's ids hold
//! after a restart. The root of the tree is [`abi::ROOT_ID`].

use std::sync::Arc;

use super::abi;
use super::file_system::FileSystem;
use super::rafs_fs::RafsFs;

/// Bits of a node id that are the file system's own.
const NODE_BITS: u32 = 48;

/// The tree of mounted file systems that a server shows.
pub struct Mounts {
    /// By slot, less one.
    slots: Vec<Arc<dyn FileSystem>>,
    /// Slot of the file system whose root is the root of the tree.
    root_slot: u64,
}

/// A node in one file system.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) fs: &'a dyn FileSystem,
    slot: u64,
    pub(super) node: u64,
    /// Whether the root of `fs` is the root of the tree.
    at_root: bool,
}

impl Mounts {
    /// One image, and nothing above or beside it.
    pub fn single(image: RafsFs) -> Arc<Mounts> {
        Arc::new(Mounts { slots: vec![Arc::new(image)], root_slot: 1 })
    }

    /// The node that a guest means by `nodeid`, if its file system is mounted.
    pub(super) fn resolve(&self, nodeid: u64) -> Option<Place<'_>> {
        let root = nodeid == abi::ROOT_ID;
        let slot = if root { self.root_slot } else { nodeid >> NODE_BITS };
        let index = usize::try_from(slot.checked_sub(1)?).ok()?;
        let fs = self.slots.get(index)?.as_ref();
        let node = if root { fs.root() } else { nodeid & ((1 << NODE_BITS) - 1) };
        Some(Place { fs, slot, node, at_root: slot == self.root_slot })
    }

    /// Nothing in the tree ever changes, and nothing will be mounted in it: a guest need not ask
    /// twice.
    pub(super) fn immutable(&self) -> bool {
        self.slots.iter().all(|fs| fs.immutable())
    }

    /// Whether some node may have extended attributes.
    pub(super) fn has_xattrs(&self) -> bool {
        self.slots.iter().any(|fs| fs.has_xattrs())
    }
}

impl Place<'_> {
    /// The id by which a guest knows `node`, of the same file system.
    pub(super) fn nodeid(&self, node: u64) -> u64 {
        if self.at_root && node == self.fs.root() {
            return abi::ROOT_ID;
        }
        self.slot << NODE_BITS | node
    }
}
