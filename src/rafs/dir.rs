//! Directories: sorted entries in blocks, found by binary search, listed from any position.
//!
//! Nothing is decoded ahead. A lookup reads one name of each block it probes, then some of one
//! block; a listing reads each entry once and notices when names are not in order.

use std::iter::FusedIterator;

use zerocopy::FromBytes;

use super::error::{FormatError, Result};
use super::id::Nid;
use super::inode::{FileKind, Inode};
use super::layout::{BLOCK_SIZE, Dirent, NAME_MAX};

/// Low bits of a cookie: which entry of its block. A block of 4096 bytes has at most 315 entries,
/// of 12 bytes and a name each.
const ENTRY_BITS: u32 = 9;

/// The entries of a directory.
#[derive(Clone, Copy, Debug)]
pub struct Dir<'a> {
    inode: Inode<'a>,
}

/// One name in a directory; `.` and `..` are names like others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirEntry<'a> {
    /// Not checked: [`Dir::inode_of`] does.
    pub nid: Nid,
    /// 1 to 255 bytes, neither `/` nor NUL among them.
    pub name: &'a [u8],
    /// As stored, see `layout::Dirent`; 0 is "unknown".
    pub file_type: u8,
    /// Where a listing goes on behind this entry; never 0, at most 2^28.
    pub next_cookie: u64,
}

impl DirEntry<'_> {
    /// Number of the block that holds the entry.
    pub fn block(&self) -> u64 {
        // Counted up behind the entry, within its block.
        (self.next_cookie - 1) >> ENTRY_BITS
    }
}

/// What [`Dir::entries_from`] iterates over. Ends behind the first error.
#[derive(Debug)]
pub struct Entries<'a> {
    dir: Dir<'a>,
    /// The block to read from next and the entry in it.
    number: u64,
    entry: usize,
    /// That block, once it has been read.
    current: Option<Block<'a>>,
    previous: Option<&'a [u8]>,
}

/// One block of a directory, its entry count checked.
#[derive(Clone, Copy, Debug)]
struct Block<'a> {
    dirents: &'a [Dirent],
    bytes: &'a [u8],
    /// Position in the directory, and byte offset in the bootstrap.
    number: u64,
    offset: u64,
}

impl<'a> Dir<'a> {
    pub(super) fn new(inode: Inode<'a>) -> Self {
        Dir { inode }
    }

    /// The entry called `name`, which may be any bytes.
    ///
    /// # Errors
    ///
    /// If what the search reads is damaged. Names out of order are not noticed here: they may hide
    /// each other.
    pub fn lookup(&self, name: &[u8]) -> Result<Option<DirEntry<'a>>> {
        if name.is_empty() || name.len() > NAME_MAX {
            return Ok(None);
        }
        // Blocks before `low` start with a name not above ours; blocks from `high` on, above.
        let (mut low, mut high) = (0, self.inode.blocks());
        while low < high {
            let middle = low + (high - low) / 2;
            if self.block(middle)?.name(0)? <= name {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        let Some(number) = low.checked_sub(1) else { return Ok(None) };
        let block = self.block(number)?;
        let (mut low, mut high) = (0, block.dirents.len());
        while low < high {
            let middle = low + (high - low) / 2;
            match block.name(middle)?.cmp(name) {
                std::cmp::Ordering::Equal => return block.entry(middle).map(Some),
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        Ok(None)
    }

    /// The entries behind the one that gave `cookie`, from the first for 0. Starts at once,
    /// wherever it starts. A cookie that no entry gave starts somewhere or at the end.
    ///
    /// # Errors
    ///
    /// If the block to start in is damaged.
    pub fn entries_from(&self, cookie: u64) -> Result<Entries<'a>> {
        let number = cookie >> ENTRY_BITS;
        let entry = usize::try_from(cookie & ((1 << ENTRY_BITS) - 1)).expect("9 bits");
        let current = if number < self.inode.blocks() { Some(self.block(number)?) } else { None };
        Ok(Entries { dir: *self, number, entry, current, previous: None })
    }

    /// The inode that `entry`, of this directory, names.
    ///
    /// # Errors
    ///
    /// If there is no sound inode, or it is of another type than the entry says.
    pub fn inode_of(&self, entry: &DirEntry<'_>) -> Result<Inode<'a>> {
        let inode = Inode::read(self.inode.image, entry.nid)?;
        let known = entry.file_type == 0 || inode.kind().to_dirent() == entry.file_type;
        if !known {
            let said = FileKind::from_dirent(entry.file_type).map_or("nothing", FileKind::name);
            let reason = format!("a {}, but its name says {said}", inode.kind().name());
            return Err(FormatError::invalid("inode", inode.offset(), reason));
        }
        Ok(inode)
    }

    fn block(&self, number: u64) -> Result<Block<'a>> {
        let bytes = self.inode.block(number)?;
        let offset = self.inode.block_place(number);
        let invalid = |reason: String| FormatError::invalid("directory block", offset, reason);
        let (first, _) = Dirent::ref_from_prefix(bytes)
            .map_err(|_| invalid(format!("{} bytes hold no entry", bytes.len())))?;
        let names = usize::from(first.name_offset.get());
        if names == 0 || !names.is_multiple_of(size_of::<Dirent>()) || names > bytes.len() {
            return Err(invalid(format!("names start at {names} of {} bytes", bytes.len())));
        }
        let dirents = <[Dirent]>::ref_from_bytes(&bytes[..names])
            .expect("the slice is whole entries, which are unaligned");
        Ok(Block { dirents, bytes, number, offset })
    }
}

impl<'a> Block<'a> {
    fn invalid(&self, entry: usize, reason: &str) -> FormatError {
        let at = self.offset + (entry * size_of::<Dirent>()) as u64;
        FormatError::invalid("directory entry", at, reason)
    }

    /// Name of entry `i`, which exists.
    fn name(&self, i: usize) -> Result<&'a [u8]> {
        let start = usize::from(self.dirents[i].name_offset.get());
        let end = match self.dirents.get(i + 1) {
            Some(next) => usize::from(next.name_offset.get()),
            None => self.bytes.len(),
        };
        if start < size_of_val(self.dirents) {
            return Err(self.invalid(i, "name lies among the entries"));
        }
        let mut name = self
            .bytes
            .get(start..end)
            .ok_or_else(|| self.invalid(i, "name ends before it starts or outside the block"))?;
        if i + 1 == self.dirents.len() {
            // The last name is padded with zeros up to the end of a full block.
            let end = name.iter().position(|&b| b == 0).unwrap_or(name.len());
            name = &name[..end];
        }
        if name.is_empty() || name.len() > NAME_MAX {
            return Err(self.invalid(i, "name is not 1 to 255 bytes long"));
        }
        if name.iter().any(|b| matches!(b, 0 | b'/')) {
            return Err(self.invalid(i, "name holds a slash or NUL"));
        }
        Ok(name)
    }

    fn entry(&self, i: usize) -> Result<DirEntry<'a>> {
        let dirent = &self.dirents[i];
        if dirent.file_type != 0 && FileKind::from_dirent(dirent.file_type).is_none() {
            return Err(self.invalid(i, "unknown file type"));
        }
        Ok(DirEntry {
            nid: Nid(dirent.nid.get()),
            name: self.name(i)?,
            file_type: dirent.file_type,
            next_cookie: (self.number << ENTRY_BITS) + i as u64 + 1,
        })
    }
}

impl<'a> Entries<'a> {
    fn advance(&mut self) -> Result<Option<DirEntry<'a>>> {
        let block = loop {
            if self.number >= self.dir.inode.blocks() {
                return Ok(None);
            }
            let block = match self.current {
                Some(block) => block,
                None => *self.current.insert(self.dir.block(self.number)?),
            };
            if self.entry < block.dirents.len() {
                break block;
            }
            self.number += 1;
            self.entry = 0;
            self.current = None;
        };
        let entry = block.entry(self.entry)?;
        if self.previous.is_some_and(|previous| previous >= entry.name) {
            return Err(block.invalid(self.entry, "name is not above the one before it"));
        }
        self.previous = Some(entry.name);
        self.entry += 1;
        Ok(Some(entry))
    }
}

impl<'a> Iterator for Entries<'a> {
    type Item = Result<DirEntry<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = self.advance();
        if next.is_err() {
            self.number = u64::MAX;
        }
        next.transpose()
    }
}

impl FusedIterator for Entries<'_> {}

// A block with the most entries fits the cookie, the one behind its last included.
const _: () = assert!(BLOCK_SIZE / (size_of::<Dirent>() as u64 + 1) < 1 << ENTRY_BITS);
