//! The guest's memory, as the front end describes it.
//!
//! A `Memory` never changes: adding or removing a region makes a new one that shares the other
//! mappings. Whoever holds an `Arc<Memory>` may therefore use it for as long as it likes, however
//! often the front end replaces the table meanwhile; a mapping goes away with its last holder.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{OFlags, fcntl_getfl};
use vm_memory::guest_memory::FileOffset;
use vm_memory::{
    GuestAddress, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress, MmapRegion,
    VolatileSlice,
};

/// Where a region lies, in the three address spaces that meet in a memory table.
///
/// Source: vhost-user specification, "Single memory region description".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Placement {
    /// Guest-physical address of the first byte.
    pub guest_addr: u64,
    /// Bytes; not 0.
    pub len: u64,
    /// Address of the first byte in the front end's own address space, which ring addresses use.
    pub user_addr: u64,
    /// Where the region starts in its file, in bytes.
    pub file_offset: u64,
}

/// Why a memory table was refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum MemoryError {
    #[error("region {0:x?} is empty or wraps around an address space")]
    Range(Placement),
    #[error("region {placement:x?} ends past the {file_len} bytes of its file")]
    PastFile { placement: Placement, file_len: u64 },
    #[error("mapping region {placement:x?}")]
    Map {
        placement: Placement,
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
    #[error("looking at the file of region {placement:x?}")]
    Stat { placement: Placement, source: std::io::Error },
    #[error("region {0:x?} overlaps another")]
    Overlap(Placement),
    #[error("no region {0:x?} to remove")]
    Unknown(Placement),
    #[error("already {0} regions")]
    Full(usize),
}

/// What a region is made of.
#[derive(Clone, Debug)]
enum Backing {
    /// Mapped. No dirty bitmap.
    Mapped(Arc<GuestRegionMmap<()>>),
    /// A file that is open for reading only, such as a cache file in a DAX window, which the front
    /// end shows to us as guest memory. It is read when it must be and never mapped: somebody may
    /// shorten it, and touching what is gone would end this process.
    ReadOnly(Arc<File>),
}

/// One generation of the guest's memory.
#[derive(Debug, Default)]
pub(super) struct Memory {
    /// In order of guest address.
    regions: Vec<(Placement, Backing)>,
    /// 0 for the empty memory a connection starts with; every change counts one up.
    generation: u64,
}

impl Memory {
    /// Regions we take. QEMU uses at most 509, KVM's own limit.
    pub(super) const MAX_REGIONS: usize = 512;

    /// The table that replaces this one.
    pub(super) fn replaced(
        &self,
        regions: impl IntoIterator<Item = (Placement, File)>,
    ) -> Result<Memory, MemoryError> {
        let mut next = Memory { generation: self.generation, ..Memory::default() };
        for (placement, file) in regions {
            next = next.with(placement, file)?;
        }
        next.generation = self.generation + 1;
        Ok(next)
    }

    /// This memory and one region more.
    pub(super) fn with(&self, placement: Placement, file: File) -> Result<Memory, MemoryError> {
        if self.regions.len() >= Self::MAX_REGIONS {
            return Err(MemoryError::Full(self.regions.len()));
        }
        let region = back(placement, file)?;
        let mut regions = self.regions.clone();
        let at = regions.partition_point(|(p, _)| p.guest_addr < placement.guest_addr);
        regions.insert(at, (placement, region));
        let overlap = |(a, b): (&Placement, &Placement)| a.guest_addr + a.len > b.guest_addr;
        if regions.windows(2).any(|pair| overlap((&pair[0].0, &pair[1].0))) {
            return Err(MemoryError::Overlap(placement));
        }
        Ok(Memory { regions, generation: self.generation + 1 })
    }

    /// This memory without one region, which is named by its guest address, user address and
    /// length; the file offset is not looked at, as the specification has it.
    pub(super) fn without(&self, region: Placement) -> Result<Memory, MemoryError> {
        let same = |p: &Placement| {
            (p.guest_addr, p.len, p.user_addr) == (region.guest_addr, region.len, region.user_addr)
        };
        let index = self.regions.iter().position(|(p, _)| same(p));
        let mut regions = self.regions.clone();
        regions.remove(index.ok_or(MemoryError::Unknown(region))?);
        Ok(Memory { regions, generation: self.generation + 1 })
    }

    /// `len` bytes at `addr`, if they lie in one region, which can be written to.
    pub(super) fn slice(&self, addr: GuestAddress, len: usize) -> Option<VolatileSlice<'_>> {
        let behind = self.regions.partition_point(|(p, _)| p.guest_addr <= addr.0);
        let (placement, backing) = self.regions.get(behind.checked_sub(1)?)?;
        let Backing::Mapped(region) = backing else { return None };
        region.get_slice(MemoryRegionAddress(addr.0 - placement.guest_addr), len).ok()
    }

    /// `len` bytes at `addr`, in one piece for each region that has some of them. A `None` ends it
    /// where there is no memory.
    pub(super) fn slices(
        &self,
        addr: GuestAddress,
        len: usize,
    ) -> impl Iterator<Item = Option<VolatileSlice<'_>>> {
        let (mut at, mut left) = (addr.0, len);
        std::iter::from_fn(move || {
            if left == 0 {
                return None;
            }
            let piece = self.longest(at, left);
            match &piece {
                Some(piece) => {
                    at = at.saturating_add(piece.len() as u64);
                    left -= piece.len();
                }
                None => left = 0,
            }
            Some(piece)
        })
    }

    /// Fills `into` with the bytes at `addr`, as far as there is memory; returns how many there were.
    pub(super) fn read(&self, addr: GuestAddress, into: &mut [u8]) -> usize {
        if let Some(slice) = self.slice(addr, into.len()) {
            return slice.copy_to(into);
        }
        let mut done = 0;
        while done < into.len() {
            let rest = &mut into[done..];
            let Some(at) = addr.0.checked_add(done as u64) else { break };
            let read = match self.longest(at, rest.len()) {
                Some(piece) => piece.copy_to(rest),
                None => self.read_file(at, rest),
            };
            if read == 0 {
                break;
            }
            done += read;
        }
        done
    }

    /// As [`Self::read`] from a region that is not mapped; 0 if there is none.
    #[cold]
    fn read_file(&self, at: u64, into: &mut [u8]) -> usize {
        let behind = self.regions.partition_point(|(p, _)| p.guest_addr <= at);
        let found = behind.checked_sub(1).and_then(|index| self.regions.get(index));
        let Some((placement, Backing::ReadOnly(file))) = found else { return 0 };
        let within = at - placement.guest_addr;
        let room = usize::try_from(placement.len.saturating_sub(within)).unwrap_or(usize::MAX);
        let len = room.min(into.len());
        file.read_at(&mut into[..len], placement.file_offset + within).unwrap_or(0)
    }

    /// At most `len` bytes at `at`, as far as its region goes.
    fn longest(&self, at: u64, len: usize) -> Option<VolatileSlice<'_>> {
        let behind = self.regions.partition_point(|(p, _)| p.guest_addr <= at);
        let (placement, _) = self.regions.get(behind.checked_sub(1)?)?;
        let room =
            (placement.guest_addr + placement.len).checked_sub(at).filter(|room| *room > 0)?;
        self.slice(GuestAddress(at), usize::try_from(room).map_or(len, |room| room.min(len)))
    }

    /// Differs between any two memories of one connection.
    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// Guest-physical address of an address in the front end's address space. `None` if no region
    /// holds it.
    pub(super) fn guest_addr(&self, user_addr: u64) -> Option<GuestAddress> {
        self.regions.iter().find_map(|(p, _)| {
            let offset = user_addr.checked_sub(p.user_addr)?;
            (offset < p.len).then(|| GuestAddress(p.guest_addr + offset))
        })
    }
}

/// Gets at one region: maps it, shared with the front end, if it can be written to.
fn back(placement: Placement, file: File) -> Result<Backing, MemoryError> {
    let Placement { guest_addr, len, user_addr, file_offset } = placement;
    let range = || MemoryError::Range(placement);
    if len == 0 || user_addr.checked_add(len).is_none() || guest_addr.checked_add(len).is_none() {
        return Err(range());
    }
    let end = file_offset.checked_add(len).ok_or_else(range)?;
    let size = usize::try_from(len).map_err(|_| range())?;
    // Touching a page past the end of the file would end this process with SIGBUS.
    let meta = file.metadata().map_err(|source| MemoryError::Stat { placement, source })?;
    if meta.is_file() && meta.len() < end {
        return Err(MemoryError::PastFile { placement, file_len: meta.len() });
    }
    let flags =
        fcntl_getfl(&file).map_err(|e| MemoryError::Stat { placement, source: e.into() })?;
    if !flags.intersects(OFlags::WRONLY | OFlags::RDWR) {
        return Ok(Backing::ReadOnly(Arc::new(file)));
    }
    let mapping = MmapRegion::from_file(FileOffset::new(file, file_offset), size)
        .map_err(|source| MemoryError::Map { placement, source })?;
    let region = GuestRegionMmap::new(mapping, GuestAddress(guest_addr)).ok_or_else(range)?;
    debug_assert_eq!(region.len(), len);
    Ok(Backing::Mapped(Arc::new(region)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    const PAGE: u64 = 0x1000;

    fn file(len: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        file
    }

    fn at(guest_addr: u64, len: u64, user_addr: u64) -> Placement {
        Placement { guest_addr, len, user_addr, file_offset: 0 }
    }

    #[test]
    fn user_addresses_become_guest_addresses() {
        let memory = Memory::default()
            .with(at(0, 4 * PAGE, 0x7000_0000), file(4 * PAGE))
            .unwrap()
            .with(at(0x1_0000_0000, PAGE, 0x7100_0000), file(PAGE))
            .unwrap();
        let cases = [
            (0x7000_0000, Some(0)),
            (0x7000_3fff, Some(0x3fff)),
            (0x7000_4000, None),
            (0x6fff_ffff, None),
            (0x7100_0008, Some(0x1_0000_0008)),
        ];
        for (user, want) in cases {
            assert_eq!(memory.guest_addr(user), want.map(GuestAddress), "{user:x}");
        }
    }

    #[test]
    fn what_is_open_for_reading_only_is_read_and_never_written() {
        let named = tempfile::NamedTempFile::new().unwrap();
        named.as_file().set_len(2 * PAGE).unwrap();
        named.as_file().write_all_at(b"cached", PAGE - 3).unwrap();
        let placement = Placement { file_offset: 0, ..at(PAGE, 2 * PAGE, 0x20000) };
        let memory = Memory::default()
            .with(at(0, PAGE, 0x10000), file(PAGE))
            .unwrap()
            .with(placement, File::open(named.path()).unwrap())
            .unwrap();
        assert!(memory.slice(GuestAddress(PAGE), 8).is_none(), "no answer goes there");
        assert!(memory.slices(GuestAddress(PAGE - 4), 8).any(|piece| piece.is_none()));
        let mut bytes = [1; 8];
        assert_eq!(memory.read(GuestAddress(2 * PAGE - 4), &mut bytes), 8);
        assert_eq!(&bytes, b"\0cached\0");
        assert_eq!(memory.read(GuestAddress(PAGE - 4), &mut bytes), 8, "across the border");
        assert_eq!(memory.read(GuestAddress(3 * PAGE - 4), &mut bytes), 4, "up to the end");
        named.as_file().set_len(0).unwrap();
        assert_eq!(memory.read(GuestAddress(PAGE), &mut bytes), 0, "it is gone");
    }

    #[test]
    fn a_removed_region_stays_for_those_who_hold_it() {
        let one = Memory::default().with(at(0, PAGE, 0x10000), file(PAGE)).unwrap();
        let two = one.with(at(PAGE, PAGE, 0x20000), file(PAGE)).unwrap();
        let back = two.without(at(PAGE, PAGE, 0x20000)).unwrap();
        two.slice(GuestAddress(PAGE), 4).unwrap().write_obj(7u32, 0).unwrap();
        assert!(back.slice(GuestAddress(PAGE), 4).is_none());
        assert!(back.slice(GuestAddress(0), 4).is_some());
        let generations = [one.generation(), two.generation(), back.generation()];
        assert_eq!(generations, [1, 2, 3]);
    }

    #[test]
    fn bytes_are_found_in_one_region_or_in_several() {
        let memory = Memory::default()
            .with(at(PAGE, PAGE, 0x10000), file(PAGE))
            .unwrap()
            .with(at(2 * PAGE, PAGE, 0x20000), file(PAGE))
            .unwrap()
            .with(at(8 * PAGE, PAGE, 0x30000), file(PAGE))
            .unwrap();
        memory.slice(GuestAddress(PAGE), 0x1000).unwrap().copy_from(&[1u8; 0x1000]);
        memory.slice(GuestAddress(2 * PAGE), 0x1000).unwrap().copy_from(&[2u8; 0x1000]);
        // (address, length, in one piece, bytes of the pieces, then nothing)
        let cases: [(u64, usize, bool, &[usize], bool); 8] = [
            (PAGE, 0x1000, true, &[0x1000], false),
            (PAGE - 1, 2, false, &[], true),
            (2 * PAGE - 1, 2, false, &[1, 1], false),
            (2 * PAGE - 1, 0x1002, false, &[1, 0x1000], true),
            (3 * PAGE, 1, false, &[], true),
            (9 * PAGE - 4, 4, true, &[4], false),
            (9 * PAGE - 4, 5, false, &[4], true),
            (u64::MAX, 5, false, &[], true),
        ];
        for (addr, len, whole, want, ends) in cases {
            let addr = GuestAddress(addr);
            assert_eq!(memory.slice(addr, len).is_some(), whole, "{addr:?}+{len}");
            let pieces: Vec<_> = memory.slices(addr, len).collect();
            let got: Vec<usize> = pieces.iter().flatten().map(|piece| piece.len()).collect();
            assert_eq!(
                (&got[..], pieces.iter().any(Option::is_none)),
                (want, ends),
                "{addr:?}+{len}"
            );
            let mut bytes = vec![0; len];
            assert_eq!(memory.read(addr, &mut bytes), want.iter().sum::<usize>(), "{addr:?}+{len}");
        }
        let mut two = [0; 2];
        memory.read(GuestAddress(2 * PAGE - 1), &mut two);
        assert_eq!(two, [1, 2]);
    }

    #[test]
    fn tables_that_cannot_be() {
        let one = Memory::default().with(at(0, 2 * PAGE, 0x10000), file(2 * PAGE)).unwrap();
        let refused = [
            (at(PAGE, PAGE, 0x40000), "overlaps"),
            (at(4 * PAGE, 0, 0x40000), "empty"),
            (at(4 * PAGE, 3 * PAGE, 0x40000), "longer than its file"),
            (at(u64::MAX - 0xfff, 2 * PAGE, 0x40000), "wraps around"),
            (at(4 * PAGE, PAGE, u64::MAX - 0xff), "wraps around for the front end"),
        ];
        for (placement, why) in refused {
            assert!(one.with(placement, file(2 * PAGE)).is_err(), "{why}");
        }
        let unknown = [at(0, PAGE, 0x10000), at(0, 2 * PAGE, 0x20000), at(PAGE, 2 * PAGE, 0x10000)];
        for placement in unknown {
            assert!(one.without(placement).is_err(), "{placement:x?}");
        }
    }

    #[test]
    fn as_many_regions_as_a_vmm_has_slots() {
        let mut memory = Memory::default();
        for i in 0..Memory::MAX_REGIONS as u64 {
            memory =
                memory.with(at(i * 2 * PAGE, PAGE, 0x1000_0000 + i * PAGE), file(PAGE)).unwrap();
        }
        assert!(matches!(
            memory.with(at(1 << 40, PAGE, 1 << 40), file(PAGE)),
            Err(MemoryError::Full(512))
        ));
    }
}
