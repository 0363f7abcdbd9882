//! A shared directory: what a guest does there, seen from the host, and the other way round.
//!
//! These tests need root, as a daemon that shares a directory does.

use std::fs::{self, Permissions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::guest::{Answer, Guest};
use rafsd::fuse::abi::{self, EntryOut, InHeader, Set, opcode};
use rafsd::fuse::{MountPath, Mounts, PassthroughFs, PassthroughOptions, Request, ServerOptions};

/// A guest that has the directory `shared` of a scratch directory as its root.
struct Shared {
    guest: Guest,
    scratch: tempfile::TempDir,
    uid: u32,
    gid: u32,
}

impl Shared {
    fn new() -> Shared {
        Shared::with(PassthroughOptions::default())
    }

    /// No inode is kept open: all are known by their file handles.
    fn by_handles() -> Shared {
        Shared::with(PassthroughOptions { open_inodes: 0, ..Default::default() })
    }

    fn with(options: PassthroughOptions) -> Shared {
        // In cargo's directory, on a file system with file handles and O_TMPFILE.
        let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let dir = scratch.path().join("shared");
        fs::create_dir(&dir).unwrap();
        fs::set_permissions(&dir, Permissions::from_mode(0o777)).unwrap();
        let mounts = Mounts::new();
        let fs = PassthroughFs::new(&dir, options).unwrap();
        mounts.mount(&MountPath::root(), fs.into()).unwrap();
        let guest = Guest::unmounted(mounts, ServerOptions::default());
        guest.init(45, u32::MAX).unwrap();
        Shared { guest, scratch, uid: 0, gid: 0 }
    }

    /// The same guest with requests by another user.
    fn by(self, uid: u32, gid: u32) -> Shared {
        Shared { uid, gid, ..self }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join("shared").join(name)
    }

    fn ask(&self, opcode: u32, node: u64, parts: &[&[u8]], room: usize) -> Answer {
        let body = parts.concat();
        let mut header = self.guest.request(opcode, node, &body).header;
        (header.uid, header.gid) = (self.uid, self.gid);
        let request = Request::parse(&[header.as_bytes(), &body].concat()).unwrap();
        self.guest.send(&request, room).expect("an answer")
    }

    fn get<T: FromBytes>(&self, opcode: u32, node: u64, parts: &[&[u8]]) -> Result<T, i32> {
        let answer = self.ask(opcode, node, parts, size_of::<T>())?;
        Ok(T::read_from_bytes(&answer).unwrap_or_else(|_| panic!("{} bytes", answer.len())))
    }

    fn make<A: IntoBytes + Immutable>(
        &self,
        opcode: u32,
        args: &A,
        name: &str,
    ) -> Result<EntryOut, i32> {
        self.get(opcode, 1, &[args.as_bytes(), name.as_bytes(), b"\0"])
    }

    fn create(&self, name: &str, mode: u32) -> Result<abi::CreateOut, i32> {
        let flags = (libc::O_RDWR | libc::O_CREAT).cast_unsigned();
        let args = abi::CreateIn { flags, mode, umask: 0o022, open_flags: 0 };
        self.get(opcode::CREATE, 1, &[args.as_bytes(), name.as_bytes(), b"\0"])
    }

    fn open(&self, node: u64, flags: i32) -> Result<abi::OpenOut, i32> {
        let args = abi::OpenIn { flags: flags.cast_unsigned(), open_flags: 0 };
        self.get(opcode::OPEN, node, &[args.as_bytes()])
    }

    fn write(&self, node: u64, fh: u64, offset: u64, data: &[u8], flags: u32) -> Result<u32, i32> {
        let size = u32::try_from(data.len()).unwrap();
        let args = abi::WriteIn { fh, offset, size, write_flags: flags, ..Default::default() };
        let out: abi::WriteOut = self.get(opcode::WRITE, node, &[args.as_bytes(), data])?;
        Ok(out.size)
    }

    fn read(&self, node: u64, fh: u64, offset: u64, size: u32) -> Answer {
        let args = abi::ReadIn { fh, offset, size, ..Default::default() };
        self.ask(opcode::READ, node, &[args.as_bytes()], usize::try_from(size).unwrap())
    }

    fn name(&self, opcode: u32, name: &str) -> Result<(), i32> {
        self.ask(opcode, 1, &[name.as_bytes(), b"\0"], 0).map(drop)
    }

    fn rename(&self, old: &str, new: &str, flags: u32) -> Result<(), i32> {
        let args = abi::Rename2In { newdir: 1, flags, padding: 0 };
        let names = [old.as_bytes(), b"\0", new.as_bytes(), b"\0"].concat();
        self.ask(opcode::RENAME2, 1, &[args.as_bytes(), &names], 0).map(drop)
    }

    fn release(&self, node: u64, fh: u64) -> Result<(), i32> {
        let args = abi::ReleaseIn { fh, ..Default::default() };
        self.ask(opcode::RELEASE, node, &[args.as_bytes()], 0).map(drop)
    }

    fn setattr(&self, node: u64, args: &abi::SetattrIn) -> Result<abi::AttrOut, i32> {
        self.get(opcode::SETATTR, node, &[args.as_bytes()])
    }

    fn list(&self, node: u64) -> Vec<(String, u64, Option<EntryOut>)> {
        let open: abi::OpenOut = self.get(opcode::OPENDIR, node, &[&[0; 8]]).unwrap();
        let mut all = Vec::new();
        let mut cookie = 0;
        loop {
            let args =
                abi::ReadIn { fh: open.fh, offset: cookie, size: 1000, ..Default::default() };
            let answer = self.ask(opcode::READDIRPLUS, node, &[args.as_bytes()], 1000).unwrap();
            if answer.is_empty() {
                return all;
            }
            let mut rest = &answer[..];
            while !rest.is_empty() {
                let (entry, behind) = abi::Direntplus::read_from_prefix(rest).unwrap();
                let len = usize::try_from(entry.dirent.namelen).unwrap();
                let name = String::from_utf8(behind[..len].to_vec()).unwrap();
                cookie = entry.dirent.off;
                let looked_up = (entry.entry.nodeid != 0).then_some(entry.entry);
                all.push((name, entry.dirent.ino, looked_up));
                rest = &rest[(size_of::<abi::Direntplus>() + len).next_multiple_of(8)..];
            }
        }
    }
}

fn both() -> [Shared; 2] {
    [Shared::new(), Shared::by_handles()]
}

#[test]
fn a_file_is_made_written_read_and_removed() {
    for shared in both() {
        let made = shared.create("file", 0o664).unwrap();
        let (node, fh) = (made.entry.nodeid, made.open.fh);
        assert_eq!(shared.write(node, fh, 5, b"hello", 0), Ok(5));
        assert_eq!(fs::read(shared.path("file")).unwrap(), b"\0\0\0\0\0hello");
        assert_eq!(shared.read(node, fh, 3, 100).unwrap(), b"\0\0hello");
        assert_eq!(shared.read(node, fh, 10, 100).unwrap(), b"");
        let attr = shared.guest.attr(node).unwrap();
        let host = fs::metadata(shared.path("file")).unwrap();
        assert_eq!((attr.size, attr.ino, attr.mode), (10, host.ino(), libc::S_IFREG | 0o644));
        assert_eq!(shared.open(node, libc::O_RDONLY | libc::O_TRUNC).map(drop), Ok(()));
        assert_eq!(fs::metadata(shared.path("file")).unwrap().len(), 0);
        assert_eq!(shared.name(opcode::UNLINK, "file"), Ok(()));
        assert!(!shared.path("file").exists());
        assert_eq!(shared.name(opcode::UNLINK, "file"), Err(libc::ENOENT));
        // It lives on for who has it open, by every way to ask for it.
        assert_eq!(shared.write(node, fh, 0, b"still", 0), Ok(5));
        assert_eq!(shared.guest.attr(node).unwrap().nlink, 0);
        let again = shared.open(node, libc::O_RDONLY).unwrap();
        assert_eq!(shared.read(node, again.fh, 0, 100).unwrap(), b"still");
        assert_eq!(shared.release(node, fh), Ok(()));
        assert_eq!(shared.read(node, fh, 0, 1), Err(libc::EBADF));
        assert_eq!(shared.read(1, again.fh, 0, 1), Err(libc::EBADF), "a handle of another file");
    }
}

#[test]
fn a_removed_file_lives_as_long_as_the_guest_knows_it() {
    for shared in both() {
        fs::write(shared.path("file"), "content").unwrap();
        fs::write(shared.path("other"), "other").unwrap();
        fs::create_dir(shared.path("dir")).unwrap();
        let file = shared.guest.at(b"/file");
        let dir = shared.guest.at(b"/dir");
        let other = shared.guest.at(b"/other");
        assert_eq!(shared.name(opcode::UNLINK, "file"), Ok(()));
        assert_eq!(shared.name(opcode::RMDIR, "dir"), Ok(()));
        fs::write(shared.path("new"), "new").unwrap();
        assert_eq!(shared.rename("new", "other", 0), Ok(()));
        for node in [file, dir, other] {
            assert_eq!(shared.guest.attr(node).unwrap().nlink, 0);
        }
        let open = shared.open(file, libc::O_RDONLY).unwrap();
        assert_eq!(shared.read(file, open.fh, 0, 100).unwrap(), b"content");
        let forget = shared.guest.request(opcode::FORGET, file, &1_u64.to_ne_bytes());
        assert!(shared.guest.send(&forget, 0).is_none());
        assert_eq!(shared.guest.attr(file), Err(libc::ESTALE));
    }
}

#[test]
fn what_is_made_belongs_to_who_made_it() {
    let shared = Shared::new();
    fs::create_dir(shared.path("of-group")).unwrap();
    std::os::unix::fs::chown(shared.path("of-group"), Some(0), Some(4321)).unwrap();
    fs::set_permissions(shared.path("of-group"), Permissions::from_mode(0o2777)).unwrap();
    let dir = shared.guest.at(b"/of-group");
    let shared = shared.by(1234, 5678);
    shared.create("file", 0o6777).unwrap();
    shared.make(opcode::MKDIR, &abi::MkdirIn { mode: 0o777, umask: 0o027 }, "dir").unwrap();
    shared.get::<EntryOut>(opcode::SYMLINK, 1, &[b"link\0/target\0"]).unwrap();
    let fifo = abi::MknodIn { mode: libc::S_IFIFO | 0o666, umask: 0o022, ..Default::default() };
    shared.make(opcode::MKNOD, &fifo, "fifo").unwrap();
    let host = |name: &str| fs::symlink_metadata(shared.path(name)).unwrap();
    for (name, mode) in [("file", 0o4755), ("dir", 0o750), ("link", 0o777), ("fifo", 0o644)] {
        let host = host(name);
        assert_eq!((host.uid(), host.gid()), (1234, 5678), "{name}");
        // The set-group-id bit goes: the caller may not keep it, as far as this host knows.
        assert_eq!(host.mode() & 0o5777, mode, "{name}");
    }
    let args = abi::MkdirIn { mode: 0o777, umask: 0 };
    shared.get::<EntryOut>(opcode::MKDIR, dir, &[args.as_bytes(), b"inner\0"]).unwrap();
    let inner = host("of-group/inner");
    assert_eq!((inner.uid(), inner.gid(), inner.mode() & 0o7777), (1234, 4321, 0o2777));
    // Threads are themselves again.
    let shared = shared.by(0, 0);
    shared.create("of-root", 0o600).unwrap();
    let host = fs::metadata(shared.path("of-root")).unwrap();
    assert_eq!((host.uid(), host.gid()), (0, 0));
}

#[test]
fn a_group_that_the_guest_sends_counts() {
    let shared = Shared::new();
    fs::create_dir(shared.path("dir")).unwrap();
    std::os::unix::fs::chown(shared.path("dir"), Some(0), Some(4321)).unwrap();
    fs::set_permissions(shared.path("dir"), Permissions::from_mode(0o2777)).unwrap();
    let dir = shared.guest.at(b"/dir");
    // (groups sent, set-group-id survives)
    for (name, groups, mode) in [("alone", 0_u32, 0o0755), ("member", 1, 0o2755)] {
        let flags = (libc::O_RDWR | libc::O_CREAT).cast_unsigned();
        let args = abi::CreateIn { flags, mode: 0o2755, umask: 0, open_flags: 0 };
        let mut body = [args.as_bytes(), name.as_bytes(), b"\0"].concat();
        body.resize(body.len().next_multiple_of(8), 0);
        body.extend([16_u32, 32, groups, 4321].as_bytes());
        let mut header = shared.guest.request(opcode::CREATE, dir, &body).header;
        (header.uid, header.gid, header.total_extlen) = (1000, 1000, 2);
        let request = Request::parse(&[header.as_bytes(), &body].concat()).unwrap();
        shared.guest.send(&request, 144).unwrap().unwrap();
        let host = fs::metadata(shared.path(&format!("dir/{name}"))).unwrap();
        assert_eq!((host.gid(), host.mode() & 0o7777), (4321, mode), "{name}");
    }
}

#[test]
fn what_an_overlay_needs_of_its_upper_layer() {
    for shared in both() {
        // Whiteouts: by MKNOD and by RENAME.
        let whiteout = abi::MknodIn { mode: libc::S_IFCHR, rdev: 0, umask: 0, padding: 0 };
        let entry = shared.make(opcode::MKNOD, &whiteout, "gone").unwrap();
        assert_eq!((entry.attr.mode, entry.attr.rdev), (libc::S_IFCHR, 0));
        fs::write(shared.path("a"), "a").unwrap();
        fs::write(shared.path("b"), "b").unwrap();
        assert_eq!(shared.rename("a", "c", libc::RENAME_WHITEOUT), Ok(()));
        let left = fs::symlink_metadata(shared.path("a")).unwrap();
        assert!(left.file_type().is_char_device() && left.rdev() == 0);
        assert_eq!(shared.rename("c", "b", libc::RENAME_EXCHANGE), Ok(()));
        assert_eq!(fs::read(shared.path("b")).unwrap(), b"a");
        assert_eq!(shared.rename("c", "b", libc::RENAME_NOREPLACE), Err(libc::EEXIST));
        assert_eq!(shared.rename("c", "b", 1 << 20), Err(libc::EINVAL));
        // Attributes of its own.
        let dir: EntryOut =
            shared.make(opcode::MKDIR, &abi::MkdirIn { mode: 0o755, umask: 0 }, "dir").unwrap();
        let args = abi::SetxattrIn { size: 1, ..Default::default() };
        let name = b"trusted.overlay.opaque\0";
        shared.ask(opcode::SETXATTR, dir.nodeid, &[args.as_bytes(), name, b"y"], 0).unwrap();
        let got = xattr::get(shared.path("dir"), "trusted.overlay.opaque").unwrap();
        assert_eq!(got.as_deref(), Some(&b"y"[..]));
        let ask = abi::GetxattrIn { size: 8, padding: 0 };
        let value = shared.ask(opcode::GETXATTR, dir.nodeid, &[ask.as_bytes(), name], 8);
        assert_eq!(value, Ok(b"y".to_vec()));
        let ask = abi::GetxattrIn { size: 100, padding: 0 };
        let names = shared.ask(opcode::LISTXATTR, dir.nodeid, &[ask.as_bytes()], 100).unwrap();
        assert!(names.windows(name.len()).any(|window| window == name));
        shared.ask(opcode::REMOVEXATTR, dir.nodeid, &[name], 0).unwrap();
        assert_eq!(
            shared.ask(opcode::GETXATTR, dir.nodeid, &[ask.as_bytes(), name], 8),
            Err(libc::ENODATA)
        );
        // Files without a name, which get one.
        let flags = (libc::O_RDWR | libc::O_TMPFILE).cast_unsigned();
        let args = abi::CreateIn { flags, mode: 0o600, umask: 0, open_flags: 0 };
        let made: abi::CreateOut =
            shared.get(opcode::TMPFILE, 1, &[args.as_bytes(), b"/\0"]).unwrap();
        assert_eq!(made.entry.attr.nlink, 0);
        assert_eq!(shared.write(made.entry.nodeid, made.open.fh, 0, b"data", 0), Ok(4));
        let args = abi::LinkIn { oldnodeid: made.entry.nodeid };
        let linked = shared.make(opcode::LINK, &args, "named").unwrap();
        assert_eq!((linked.nodeid, linked.attr.nlink), (made.entry.nodeid, 1));
        assert_eq!(fs::read(shared.path("named")).unwrap(), b"data");
        // Types in listings.
        let listed = shared.list(1);
        let kind = |name: &str| {
            let (_, ino, entry) = listed.iter().find(|(other, ..)| other == name).unwrap();
            let entry = entry.expect("looked up");
            assert_eq!(entry.attr.ino, *ino, "{name}");
            entry.attr.mode & libc::S_IFMT
        };
        assert_eq!(kind("gone"), libc::S_IFCHR);
        assert_eq!(kind("dir"), libc::S_IFDIR);
        assert_eq!(kind("named"), libc::S_IFREG);
    }
}

/// Overlayfs of some kernels loses files that it copied up by way of TMPFILE, so there is none where
/// overlayfs asks for it: in its work directory, which has mode 000. Then it does this.
#[test]
fn a_file_that_an_overlay_copied_up_linked_and_wrote_is_found_again() {
    for shared in both() {
        let dir = |parent: u64, name: &str, mode| -> EntryOut {
            let args = abi::MkdirIn { mode, umask: 0 };
            let parts = [args.as_bytes(), name.as_bytes(), b"\0"];
            shared.get(opcode::MKDIR, parent, &parts).unwrap()
        };
        let (upper, work) = (dir(1, "upper", 0o755).nodeid, dir(1, "work", 0).nodeid);
        let flags = (libc::O_RDWR | libc::O_TMPFILE).cast_unsigned();
        let args = abi::CreateIn { flags, mode: 0o600, umask: 0, open_flags: 0 };
        let made =
            |node| shared.get::<abi::CreateOut>(opcode::TMPFILE, node, &[args.as_bytes(), b"/\0"]);
        assert_eq!(made(work).map(drop), Err(libc::EOPNOTSUPP));
        assert!(made(upper).is_ok());
        let mknod = abi::MknodIn { mode: libc::S_IFREG | 0o644, ..Default::default() };
        let temp: EntryOut = shared.get(opcode::MKNOD, work, &[mknod.as_bytes(), b"#1\0"]).unwrap();
        let open = shared.open(temp.nodeid, libc::O_WRONLY).unwrap();
        assert_eq!(shared.write(temp.nodeid, open.fh, 0, b"copied", 0), Ok(6));
        assert_eq!(shared.release(temp.nodeid, open.fh), Ok(()));
        let rename = abi::Rename2In { newdir: upper, ..Default::default() };
        shared.ask(opcode::RENAME2, work, &[rename.as_bytes(), b"#1\0passwd\0"], 0).unwrap();
        let lookup = |name: &[u8]| -> EntryOut {
            shared.get(opcode::LOOKUP, upper, &[name, b"\0"]).unwrap()
        };
        assert_eq!(lookup(b"passwd").nodeid, temp.nodeid);
        let link = abi::LinkIn { oldnodeid: temp.nodeid };
        let linked: EntryOut =
            shared.get(opcode::LINK, upper, &[link.as_bytes(), b"link\0"]).unwrap();
        assert_eq!((linked.nodeid, linked.attr.nlink), (temp.nodeid, 2));
        let open = shared.open(temp.nodeid, libc::O_WRONLY | libc::O_APPEND).unwrap();
        assert_eq!(shared.write(temp.nodeid, open.fh, 6, b" and more", 0), Ok(9));
        for name in [&b"passwd"[..], b"link"] {
            let found = lookup(name);
            assert_eq!((found.nodeid, found.generation, found.attr.size), (temp.nodeid, 0, 15));
        }
        // It was told of the file five times.
        for (times, left) in [(4_u64, Ok(2)), (1, Err(libc::ESTALE))] {
            let forget = shared.guest.request(opcode::FORGET, temp.nodeid, &times.to_ne_bytes());
            assert!(shared.guest.send(&forget, 0).is_none());
            assert_eq!(shared.guest.attr(temp.nodeid).map(|attr| attr.nlink), left);
        }
    }
}

#[test]
fn attributes_are_set() {
    for shared in both() {
        fs::write(shared.path("file"), "0123456789").unwrap();
        symlink("target", shared.path("link")).unwrap();
        let (file, link) = (shared.guest.at(b"/file"), shared.guest.at(b"/link"));
        let set = |node, valid: Set, args: abi::SetattrIn| {
            shared.setattr(node, &abi::SetattrIn { valid: valid.bits(), ..args }).map(|o| o.attr)
        };
        let args = abi::SetattrIn { mode: 0o4711, size: 4, ..Default::default() };
        let attr = set(file, Set::MODE | Set::SIZE, args).unwrap();
        assert_eq!((attr.mode & 0o7777, attr.size), (0o4711, 4));
        let args = abi::SetattrIn { uid: 7, gid: 8, ..Default::default() };
        for node in [file, link] {
            let attr = set(node, Set::UID | Set::GID, args).unwrap();
            assert_eq!((attr.uid, attr.gid), (7, 8));
        }
        let attr = set(file, Set::GID, abi::SetattrIn { gid: 9, ..Default::default() }).unwrap();
        assert_eq!((attr.uid, attr.gid, attr.mode & 0o7000), (7, 9, 0), "set-id bits go");
        let times = abi::SetattrIn { atime: 1, mtime: 2, mtimensec: 5, ..Default::default() };
        for node in [file, link] {
            let attr = set(node, Set::ATIME | Set::MTIME, times).unwrap();
            assert_eq!((attr.atime, attr.mtime, attr.mtimensec), (1, 2, 5));
        }
        let attr = set(file, Set::ATIME | Set::ATIME_NOW, abi::SetattrIn::default()).unwrap();
        assert!(attr.atime > 1_000_000_000 && attr.mtime == 2);
        assert_eq!(set(link, Set::SIZE, args), Err(libc::EINVAL));
        assert_eq!(
            set(file, Set::SIZE, abi::SetattrIn { size: u64::MAX, ..args }),
            Err(libc::EINVAL)
        );
        assert_eq!(set(1, Set::FH | Set::MODE, args), Err(libc::EBADF));
    }
}

#[test]
fn set_id_bits_go_when_the_guest_says_so() {
    let shared = Shared::new();
    for (flags, mode) in [(0, 0o6755), (abi::WRITE_KILL_SUIDGID, 0o755)] {
        let path = shared.path("file");
        let _ = fs::remove_file(&path);
        fs::write(&path, "x").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o6755)).unwrap();
        let node = shared.guest.at(b"/file");
        let open = shared.open(node, libc::O_WRONLY).unwrap();
        assert_eq!(shared.write(node, open.fh, 0, b"y", flags), Ok(1));
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, mode);
    }
}

#[test]
fn data_operations() {
    let shared = Shared::new();
    let made = shared.create("file", 0o644).unwrap();
    let (node, fh) = (made.entry.nodeid, made.open.fh);
    let args = abi::FallocateIn { fh, offset: 0, length: 8192, mode: 0, padding: 0 };
    shared.ask(opcode::FALLOCATE, node, &[args.as_bytes()], 0).unwrap();
    assert_eq!(shared.guest.attr(node).unwrap().size, 8192);
    let args = abi::FallocateIn { mode: 1 << 20, ..args };
    assert_eq!(shared.ask(opcode::FALLOCATE, node, &[args.as_bytes()], 0), Err(libc::EOPNOTSUPP));
    shared.write(node, fh, 1 << 20, b"end", 0).unwrap();
    let seek = |offset, whence: i32| {
        let args = abi::LseekIn { fh, offset, whence: whence.cast_unsigned(), padding: 0 };
        shared.get::<abi::LseekOut>(opcode::LSEEK, node, &[args.as_bytes()]).map(|o| o.offset)
    };
    assert_eq!(seek(9000, libc::SEEK_DATA), Ok(1 << 20));
    assert_eq!(seek(0, libc::SEEK_CUR), Err(libc::EINVAL));
    assert_eq!(seek(2 << 20, libc::SEEK_DATA), Err(libc::ENXIO));
    let to = shared.create("copy", 0o644).unwrap();
    let args = abi::CopyFileRangeIn {
        fh_in: fh,
        off_in: 1 << 20,
        nodeid_out: to.entry.nodeid,
        fh_out: to.open.fh,
        off_out: 1,
        len: 100,
        flags: 0,
    };
    let out: abi::WriteOut = shared.get(opcode::COPY_FILE_RANGE, node, &[args.as_bytes()]).unwrap();
    assert_eq!(out.size, 3);
    let out: abi::CopyFileRangeOut =
        shared.get(opcode::COPY_FILE_RANGE_64, node, &[args.as_bytes()]).unwrap();
    assert_eq!(out.bytes_copied, 3);
    assert_eq!(fs::read(shared.path("copy")).unwrap(), b"\0end");
    for (opcode, len) in [(opcode::FSYNC, 16), (opcode::FLUSH, 24)] {
        let body = [&fh.to_ne_bytes()[..], &vec![0; len - 8]].concat();
        assert_eq!(shared.ask(opcode, node, &[&body], 0), Ok(vec![]));
    }
    assert_eq!(shared.ask(opcode::SYNCFS, 1, &[&[0; 8]], 0), Ok(vec![]));
    let statfs: abi::StatfsOut = shared.get(opcode::STATFS, 1, &[]).unwrap();
    assert!(statfs.blocks > 0 && statfs.bsize > 0);
    let args = abi::StatxIn { sx_mask: 0xFFF, ..Default::default() };
    let out: abi::StatxOut = shared.get(opcode::STATX, node, &[args.as_bytes()]).unwrap();
    assert_eq!(out.stat.size, (1 << 20) + 3);
    assert!(out.stat.mask & libc::STATX_BTIME != 0 && out.stat.btime.tv_sec > 1_000_000_000);
}

#[test]
fn a_large_write_and_a_large_read() {
    let shared = Shared::new();
    let made = shared.create("file", 0o644).unwrap();
    let (node, fh) = (made.entry.nodeid, made.open.fh);
    let data: Vec<u8> = (0..1 << 20).map(|n: u32| u8::try_from(n % 251).unwrap()).collect();
    assert_eq!(shared.write(node, fh, 77, &data, 0), Ok(1 << 20));
    assert_eq!(shared.read(node, fh, 77, 1 << 20).unwrap(), data);
    assert_eq!(fs::read(shared.path("file")).unwrap()[77..], data);
}

#[test]
fn nothing_outside_is_reached() {
    let shared = Shared::new();
    let secret = shared.scratch.path().join("secret");
    fs::write(&secret, "secret").unwrap();
    symlink("../secret", shared.path("link")).unwrap();
    symlink(shared.scratch.path(), shared.path("up")).unwrap();
    fs::create_dir(shared.path("dir")).unwrap();
    let (link, up, dir) =
        (shared.guest.at(b"/link"), shared.guest.at(b"/up"), shared.guest.at(b"/dir"));
    // Links are the guest's to follow: the server never does.
    assert_eq!(shared.open(link, libc::O_RDONLY), Err(libc::ENXIO));
    assert_eq!(shared.guest.lookup(up, b"secret"), Err(libc::ENOTDIR));
    assert_eq!(shared.create("link", 0o644).map(drop), Err(libc::ENXIO));
    for name in [&b"../secret"[..], b"/etc/passwd", b"dir/../.."] {
        assert_eq!(shared.guest.lookup(1, name), Err(libc::EINVAL));
    }
    assert_eq!(shared.guest.lookup(dir, b"..").unwrap().nodeid, 1);
    // A directory that the host moves out leads nowhere else.
    fs::rename(shared.path("dir"), shared.scratch.path().join("dir")).unwrap();
    assert_eq!(shared.guest.lookup(dir, b"..").map(drop), Err(libc::ESTALE));
    assert_eq!(fs::read(&secret).unwrap(), b"secret");
}

#[test]
fn devices_and_pipes_of_the_host_are_not_opened() {
    for shared in both() {
        let device = |name: &str, kind, number| {
            mknodat(CWD, shared.path(name), kind, Mode::RWXU, number).unwrap();
        };
        device("zero", FileType::CharacterDevice, makedev(1, 5));
        device("fifo", FileType::Fifo, 0);
        for name in ["zero", "fifo"] {
            let node = shared.guest.at(name.as_bytes());
            assert_eq!(shared.open(node, libc::O_RDONLY), Err(libc::ENXIO), "{name}");
            // As CREATE without O_EXCL would.
            assert_eq!(shared.create(name, 0o644).map(drop), Err(libc::ENXIO), "{name}");
            let args = abi::SetattrIn { valid: Set::SIZE.bits(), ..Default::default() };
            assert_eq!(shared.setattr(node, &args).map(drop), Err(libc::EINVAL), "{name}");
        }
        assert_eq!(shared.create("dir/x", 0o644).map(drop), Err(libc::EINVAL));
        assert_eq!(shared.open(1, libc::O_RDONLY), Err(libc::EISDIR));
    }
}

/// Runs in mount namespaces of its own, with its own view of the scratch directory.
fn in_own_mounts(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        // SAFETY: only the mount namespace of this thread changes, and with it its working
        // directory, which nothing here depends on.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
        let private = MountPropagationFlags::REC | MountPropagationFlags::PRIVATE;
        rustix::mount::mount_change("/", private).unwrap();
        test();
    });
    thread.join().unwrap();
}

fn mount_tmpfs(at: &Path) {
    rustix::mount::mount("none", at, "tmpfs", MountFlags::empty(), None).unwrap();
}

#[test]
fn what_the_host_mounts_later_is_shown_as_what_it_is() {
    in_own_mounts(|| {
        for shared in both() {
            fs::create_dir_all(shared.path("a")).unwrap();
            fs::create_dir_all(shared.path("b")).unwrap();
            let before = shared.guest.lookup(1, b"a").unwrap();
            mount_tmpfs(&shared.path("a"));
            mount_tmpfs(&shared.path("b"));
            for name in ["a", "b"] {
                fs::write(shared.path(name).join("file"), name).unwrap();
            }
            let a = shared.guest.lookup(1, b"a").unwrap();
            let b = shared.guest.lookup(1, b"b").unwrap();
            assert_ne!(a.nodeid, before.nodeid);
            assert_eq!((a.attr.flags, b.attr.flags, before.attr.flags), (1, 1, 0), "submounts");
            let file_a = shared.guest.lookup(a.nodeid, b"file").unwrap();
            let file_b = shared.guest.lookup(b.nodeid, b"file").unwrap();
            assert_eq!((file_a.attr.flags, file_b.attr.flags), (0, 0));
            let host = |name: &str| fs::metadata(shared.path(name)).unwrap().ino();
            assert_eq!(host("a/file"), host("b/file"), "two file systems count alike");
            assert_ne!(file_a.attr.ino, file_b.attr.ino, "a guest tells them apart");
            for (node, want) in [(file_a.nodeid, b"a"), (file_b.nodeid, b"b")] {
                let open = shared.open(node, libc::O_RDONLY).unwrap();
                assert_eq!(shared.read(node, open.fh, 0, 10).unwrap(), want);
            }
            let args = abi::Rename2In { newdir: b.nodeid, flags: 0, padding: 0 };
            let moved =
                shared.ask(opcode::RENAME2, a.nodeid, &[args.as_bytes(), b"file\0file2\0"], 0);
            assert_eq!(moved, Err(libc::EXDEV));
            // A file mounted on a file, as container runtimes do.
            fs::write(shared.path("resolv.conf"), "").unwrap();
            let from = shared.path("a/file");
            rustix::mount::mount_bind(from, shared.path("resolv.conf")).unwrap();
            let bound = shared.guest.at(b"/resolv.conf");
            let open = shared.open(bound, libc::O_RDONLY).unwrap();
            assert_eq!(shared.read(bound, open.fh, 0, 10).unwrap(), b"a");
            // The host takes a mount away while the guest knows files there.
            rustix::mount::unmount(shared.path("b"), UnmountFlags::DETACH).unwrap();
            assert_eq!(shared.guest.lookup(1, b"b").unwrap().attr.flags, 0);
            assert!(shared.guest.attr(file_b.nodeid).is_ok());
        }
    });
}

#[test]
fn a_read_only_bind_mount_stays_read_only() {
    in_own_mounts(|| {
        for shared in both() {
            fs::create_dir(shared.path("data")).unwrap();
            fs::create_dir(shared.path("view")).unwrap();
            fs::write(shared.path("data/file"), "content").unwrap();
            rustix::mount::mount_bind(shared.path("data"), shared.path("view")).unwrap();
            let flags = MountFlags::BIND | MountFlags::RDONLY;
            rustix::mount::mount_remount(shared.path("view"), flags, "").unwrap();
            let (data, view) = (shared.guest.at(b"/data/file"), shared.guest.at(b"/view/file"));
            assert_ne!(data, view);
            assert_eq!(shared.open(view, libc::O_RDWR).map(drop), Err(libc::EROFS));
            assert!(shared.open(data, libc::O_RDWR).is_ok());
            assert!(shared.open(view, libc::O_RDONLY).is_ok());
        }
    });
}

#[test]
fn a_guest_that_leaves_gives_everything_back() {
    let shared = Shared::by_handles();
    for number in 0..300 {
        fs::write(shared.path(&format!("file-{number}")), "").unwrap();
    }
    let ours = |shared: &Shared| {
        let open = fs::read_dir("/proc/self/fd").unwrap();
        let links = open.filter_map(|fd| fs::read_link(fd.unwrap().path()).ok());
        links.filter(|link| link.starts_with(shared.scratch.path())).count()
    };
    let before = ours(&shared);
    let listed = shared.list(1);
    assert_eq!(listed.len(), 302);
    let known = ours(&shared);
    assert!(known < before + 10, "{known} descriptors for 300 inodes");
    let node = shared.guest.at(b"/file-7");
    let open = shared.open(node, libc::O_RDONLY).unwrap();
    shared.guest.init(45, u32::MAX).unwrap();
    assert_eq!(shared.guest.attr(node), Err(libc::ESTALE));
    assert_eq!(shared.read(1, open.fh, 0, 1), Err(libc::EBADF));
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while ours(&shared) > before {
        assert!(std::time::Instant::now() < deadline, "{} are still open", ours(&shared));
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

#[test]
fn a_guest_that_hardly_forgets_is_served_by_handles() {
    let shared = Shared::with(PassthroughOptions { open_inodes: 10, ..Default::default() });
    for number in 0..50 {
        fs::write(shared.path(&number.to_string()), number.to_string()).unwrap();
    }
    let nodes: Vec<u64> = (0..50).map(|n| shared.guest.at(n.to_string().as_bytes())).collect();
    for (number, &node) in nodes.iter().enumerate() {
        // Moved by the host meanwhile: handles do not mind.
        fs::rename(shared.path(&number.to_string()), shared.path(&format!("m{number}"))).unwrap();
        let open = shared.open(node, libc::O_RDONLY).unwrap();
        let content = shared.read(node, open.fh, 0, 10).unwrap();
        assert_eq!(content, number.to_string().as_bytes());
    }
}

#[test]
fn nodes_of_other_file_systems_are_not_mixed_up() {
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mounts = Mounts::new();
    for name in ["a", "b"] {
        let dir = scratch.path().join(name);
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("file"), name).unwrap();
        let fs = PassthroughFs::new(&dir, PassthroughOptions::default()).unwrap();
        mounts.mount(&MountPath::parse(&format!("/{name}")).unwrap(), fs.into()).unwrap();
    }
    let guest = Guest::unmounted(mounts, ServerOptions::default());
    guest.init(45, u32::MAX).unwrap();
    let (a, b) = (guest.at(b"/a"), guest.at(b"/b"));
    let args = abi::Rename2In { newdir: b, flags: 0, padding: 0 };
    let body = [args.as_bytes(), b"file\0new\0"].concat();
    assert_eq!(guest.ask(opcode::RENAME2, a, &body, 0), Err(libc::EXDEV));
    let body = [abi::LinkIn { oldnodeid: guest.at(b"/a/file") }.as_bytes(), b"new\0"].concat();
    assert_eq!(guest.ask(opcode::LINK, b, &body, 200), Err(libc::EXDEV));
    assert_eq!(guest.lookup(a, b"..").unwrap().nodeid, 1);
    assert!(guest.ask(opcode::UNLINK, 1, b"a\0", 0).is_err(), "a mountpoint stays");
}

/// What may follow the numbers of a request.
const TAILS: [&[u8]; 9] = [
    b"",
    b"a\0",
    b"a\0b\0",
    b"..\0",
    b"../x\0y\0",
    b"b\0../../x\0",
    b"/etc\0",
    b".",
    b"d\0user.x\0",
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn any_request_gets_an_answer_and_stays_inside(
        requests in proptest::collection::vec((
            1u32..56,
            prop_oneof![0u64..12, any::<u64>()],
            proptest::collection::vec(
                prop_oneof![0u64..6, Just(u64::MAX), Just(i64::MAX as u64), any::<u64>()], 0..8
            ),
            0usize..TAILS.len(),
            0usize..5000,
        ), 1..20),
    ) {
        let shared = Shared::new();
        fs::write(shared.scratch.path().join("x"), "outside").unwrap();
        fs::create_dir(shared.path("d")).unwrap();
        for (opcode, node, words, tail, room) in requests {
            // What is not about a node of ours, or does not end.
            if [opcode::INIT, opcode::DESTROY].contains(&opcode) {
                continue;
            }
            // Small numbers are nodes of this mount, which has slot 1; files stay small.
            let node = if node < 12 { 1 << 40 | node } else { node };
            let mut body = words.as_bytes().to_vec();
            if [opcode::WRITE, opcode::FALLOCATE, opcode::SETATTR].contains(&opcode) {
                for byte in body.iter_mut().skip(8).step_by(8) { *byte &= 0x3F; }
                for (i, byte) in body.iter_mut().enumerate().skip(8) {
                    if i % 8 >= 3 { *byte = 0; }
                }
            }
            body.extend_from_slice(TAILS[tail]);
            let len = u32::try_from(size_of::<InHeader>() + body.len()).unwrap();
            let header = InHeader { len, opcode, unique: 2, nodeid: node, ..Default::default() };
            let request = Request::parse(&[header.as_bytes(), &body].concat()).unwrap();
            let _ = shared.guest.send(&request, room);
        }
        shared.guest.attr(1).unwrap();
        prop_assert_eq!(fs::read(shared.scratch.path().join("x")).unwrap(), b"outside");
        prop_assert_eq!(fs::read_dir(shared.scratch.path()).unwrap().count(), 2);
    }
}

#[test]
fn a_directory_that_is_none_is_refused() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let error = PassthroughFs::new(file.path(), PassthroughOptions::default()).err().unwrap();
    assert!(error.to_string().contains(file.path().to_str().unwrap()), "{error}");
}
