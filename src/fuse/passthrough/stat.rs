//! Attributes of the host's files, as guests are told them.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{AtFlags, FileType, Statx, StatxFlags, StatxTimestamp, makedev, statx};
use rustix::io;

use crate::fuse::abi::{self, Attr};

/// `STATX_MNT_ID_UNIQUE`, Linux 6.8: a number of the mount that is never used again.
const MNT_ID_UNIQUE: StatxFlags = StatxFlags::from_bits_retain(0x4000);

/// What the host says of an inode.
pub(super) struct Stat {
    /// `ino` as the host has it.
    pub(super) attr: Attr,
    pub(super) dev: u64,
    /// Number of the mount.
    pub(super) mount: u64,
    full: Statx,
}

impl Stat {
    /// Of what `fd` refers to, which may be any descriptor.
    pub(super) fn of(fd: BorrowedFd<'_>) -> io::Result<Stat> {
        let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME | MNT_ID_UNIQUE;
        let mut full = statx(fd, "", AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW, wanted)?;
        if full.stx_mask & MNT_ID_UNIQUE.bits() == 0 {
            let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME | StatxFlags::MNT_ID;
            full = statx(fd, "", AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW, wanted)?;
        }
        Ok(Stat {
            attr: attr(&full),
            dev: makedev(full.stx_dev_major, full.stx_dev_minor),
            mount: full.stx_mnt_id,
            full,
        })
    }

    pub(super) fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.attr.mode)
    }

    /// As the answer to STATX, with the inode number that guests see.
    pub(super) fn statx(&self, ino: u64) -> abi::Statx {
        let full = &self.full;
        let time = |time: StatxTimestamp| abi::StatxTime {
            tv_sec: time.tv_sec,
            tv_nsec: time.tv_nsec,
            reserved: 0,
        };
        abi::Statx {
            mask: full.stx_mask & (StatxFlags::BASIC_STATS | StatxFlags::BTIME).bits(),
            blksize: full.stx_blksize,
            nlink: full.stx_nlink,
            uid: full.stx_uid,
            gid: full.stx_gid,
            mode: full.stx_mode,
            ino,
            size: full.stx_size,
            blocks: full.stx_blocks,
            atime: time(full.stx_atime),
            btime: time(full.stx_btime),
            ctime: time(full.stx_ctime),
            mtime: time(full.stx_mtime),
            rdev_major: full.stx_rdev_major,
            rdev_minor: full.stx_rdev_minor,
            ..Default::default()
        }
    }
}

fn attr(stat: &Statx) -> Attr {
    Attr {
        ino: stat.stx_ino,
        size: stat.stx_size,
        blocks: stat.stx_blocks,
        atime: stat.stx_atime.tv_sec.cast_unsigned(),
        mtime: stat.stx_mtime.tv_sec.cast_unsigned(),
        ctime: stat.stx_ctime.tv_sec.cast_unsigned(),
        atimensec: stat.stx_atime.tv_nsec,
        mtimensec: stat.stx_mtime.tv_nsec,
        ctimensec: stat.stx_ctime.tv_nsec,
        mode: stat.stx_mode.into(),
        nlink: stat.stx_nlink,
        uid: stat.stx_uid,
        gid: stat.stx_gid,
        rdev: encode_dev(stat.stx_rdev_major, stat.stx_rdev_minor),
        blksize: stat.stx_blksize,
        flags: 0,
    }
}

/// A device number in the form of [`Attr::rdev`].
fn encode_dev(major: u32, minor: u32) -> u32 {
    (minor & 0xFF) | (major & 0xFFF) << 8 | (minor & 0xF_FF00) << 12
}

/// A device number of the host from that form.
pub(super) fn decode_dev(dev: u32) -> u64 {
    makedev((dev >> 8) & 0xFFF, (dev & 0xFF) | ((dev >> 12) & 0xF_FF00))
}

/// Inode numbers for guests: those of the host, told apart where several of its file systems lie in
/// one directory tree and would use the same.
pub(super) struct InodeNumbers {
    /// Devices in the order in which they were met. The first is that of the root.
    devices: Mutex<Vec<u64>>,
    root: u64,
}

impl InodeNumbers {
    pub(super) fn new(root: u64) -> InodeNumbers {
        InodeNumbers { devices: Mutex::new(vec![root]), root }
    }

    /// The number for `ino` on device `dev`.
    pub(super) fn number(&self, dev: u64, ino: u64) -> u64 {
        if dev == self.root {
            return ino;
        }
        let mut devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        let index = match devices.iter().position(|&known| known == dev) {
            Some(index) => index,
            None => {
                devices.push(dev);
                devices.len() - 1
            }
        };
        // Numbers beyond 2^48 are rare, and then their upper bits are the file system's own play.
        let index = u64::try_from(index).unwrap_or(u64::MAX) & 0x7FFF;
        1 << 63 | index << 48 | (ino & ((1 << 48) - 1)) ^ (ino >> 48)
    }
}

/// Whether operations on files of this file system that need no disk end at once: it is on this
/// machine and asks no other process.
pub(super) fn is_local(fd: impl AsFd) -> bool {
    // `f_type` of statfs(2), from <linux/magic.h>.
    const LOCAL: [i64; 6] = [
        0xEF53,      // ext2, ext3, ext4
        0x5846_5342, // xfs
        0x9123_683E, // btrfs
        0x0102_1994, // tmpfs
        0xF2F5_2010, // f2fs
        0x2FC1_2FC1, // zfs
    ];
    #[allow(clippy::unnecessary_cast, reason = "the type differs between architectures")]
    rustix::fs::fstatfs(fd).is_ok_and(|statfs| LOCAL.contains(&(statfs.f_type as i64)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_survive() {
        // (major, minor, as the kernel encodes them)
        for (major, minor, want) in
            [(0, 0, 0), (8, 1, 0x801), (259, 70_000, 0x1111_0370), (0xFFF, 0xF_FFFF, 0xFFFF_FFFF)]
        {
            assert_eq!(encode_dev(major, minor), want, "{major}:{minor}");
            assert_eq!(decode_dev(want), makedev(major, minor), "{major}:{minor}");
        }
    }

    #[test]
    fn file_systems_do_not_share_inode_numbers() {
        let numbers = InodeNumbers::new(5);
        assert_eq!(numbers.number(5, 2), 2, "the root's are the host's");
        let (a, b) = (numbers.number(6, 2), numbers.number(7, 2));
        assert!(a != b && a != 2 && b != 2);
        assert_eq!(numbers.number(6, 2), a, "they stay");
    }
}
