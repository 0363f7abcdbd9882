//! Several images in one tree, which changes while a guest looks at it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::guest::{Guest, bootstrap, metadata, path};
use rafsd::fuse::abi::opcode;
use rafsd::fuse::{AnyFs, MountError, MountPath, Mounts, RafsFs, RafsOptions, ServerOptions};
use rafsd::rafs::Bootstrap;

fn at(text: &str) -> MountPath {
    MountPath::parse(text).unwrap()
}

fn image(case: &str) -> AnyFs {
    RafsFs::new(bootstrap(case), Vec::new(), RafsOptions::default()).into()
}

fn names(guest: &Guest, node: u64) -> Vec<String> {
    let listed = guest.list_all(node, 4096, false);
    assert_eq!(listed.len(), guest.list_all(node, 4096, true).len());
    listed[2..].iter().map(|entry| String::from_utf8(entry.name.clone()).unwrap()).collect()
}

#[test]
fn images_appear_at_any_depth_and_directories_go_with_the_last() {
    let mounts = Mounts::new();
    let guest = Guest::mount(mounts.clone());
    assert_eq!(names(&guest, 1), [""; 0]);
    // A name that a guest has asked for in vain appears all the same.
    let missing = guest.lookup(1, b"rafs");
    assert_eq!(missing, Err(libc::ENOENT), "an error, so that nobody remembers it");
    mounts.mount(&at("/rafs/c1/lowerdir"), image("v6-none")).unwrap();
    mounts.mount(&at("/rafs/c2/lowerdir"), image("v6-zstd")).unwrap();
    mounts.mount(&at("/x"), image("v6-none")).unwrap();
    assert_eq!(names(&guest, 1), ["rafs", "x"]);
    let rafs = guest.lookup(1, b"rafs").unwrap();
    assert_eq!((rafs.entry_valid, rafs.attr.mode), (0, libc::S_IFDIR | 0o755));
    assert_eq!(rafs.attr_valid, u64::from(u32::MAX), "it can be looked at without a daemon");
    assert_eq!(names(&guest, rafs.nodeid), ["c1", "c2"]);
    let c1 = guest.lookup(rafs.nodeid, b"c1").unwrap().nodeid;
    assert_eq!(guest.lookup(c1, b"..").unwrap().nodeid, rafs.nodeid);
    let root = guest.lookup(c1, b"lowerdir").unwrap();
    assert_eq!(root.entry_valid, 0, "the mountpoint is looked up each time");
    assert_eq!(root.attr_valid, u64::from(u32::MAX), "what is behind it never changes");
    assert_eq!(guest.lookup(root.nodeid, b"..").unwrap().nodeid, c1);
    assert_eq!(guest.lookup(1, b"..").unwrap().nodeid, 1);
    let inside = guest.lookup(root.nodeid, b"a").unwrap();
    assert_eq!(inside.entry_valid, u64::from(u32::MAX));
    let nothing = guest.lookup(root.nodeid, b"no such name").unwrap();
    assert_eq!((nothing.nodeid, nothing.entry_valid), (0, u64::from(u32::MAX)));

    // The same image twice, and another one: no two inodes with one number.
    let again = guest.at(b"/x/a");
    assert_ne!(again, inside.nodeid);
    assert_ne!(guest.attr(again).unwrap().ino, inside.attr.ino);

    mounts.unmount(&at("/rafs/c1/lowerdir")).unwrap();
    assert_eq!(names(&guest, rafs.nodeid), ["c2"]);
    assert_eq!(guest.attr(inside.nodeid), Err(libc::ESTALE));
    assert_eq!(guest.attr(c1), Err(libc::ESTALE));
    mounts.unmount(&at("/rafs/c2/lowerdir")).unwrap();
    assert_eq!(names(&guest, 1), ["x"]);
    mounts.mount(&at("/rafs/c1/lowerdir"), image("v6-zstd")).unwrap();
    assert_eq!(guest.at(b"/rafs/c1"), c1, "who was in there is there again");
    let other = guest.at(b"/rafs/c1/lowerdir");
    assert_ne!(other, root.nodeid);
    assert_eq!(guest.attr(inside.nodeid), Err(libc::ESTALE), "never another image's inode");
}

#[test]
fn made_up_directories_are_read_only_directories() {
    let mounts = Mounts::new();
    mounts.mount(&at("/d/m"), image("v6-none")).unwrap();
    let guest = Guest::mount(mounts);
    for node in [1, guest.at(b"/d")] {
        assert_eq!(guest.ask(opcode::OPEN, node, &[0; 8], 16), Err(libc::EISDIR));
        let opened = guest.ask(opcode::OPENDIR, node, &[0; 8], 16).unwrap();
        assert_eq!(opened, [0; 16], "no cache of names");
        assert_eq!(guest.read(node, 0, 10), Err(libc::EISDIR));
        assert_eq!(guest.ask(opcode::READLINK, node, b"", 16), Err(libc::EINVAL));
        assert_eq!(guest.ask(opcode::MKDIR, node, b"\0\0\0\0\0\0\0\0n\0", 16), Err(libc::EROFS));
        assert_eq!(guest.ask(opcode::ACCESS, node, &[2, 0, 0, 0, 0, 0, 0, 0], 0), Err(libc::EROFS));
        let getxattr = [&[0; 8][..], b"trusted.overlay.opaque\0"].concat();
        assert_eq!(guest.ask(opcode::GETXATTR, node, &getxattr, 8), Err(libc::ENODATA));
        assert!(guest.ask(opcode::LISTXATTR, node, &[0; 8], 8).is_ok());
        assert_eq!(guest.ask(opcode::STATFS, node, b"", 80).unwrap().len(), 80);
        let stat = guest.ask(opcode::STATX, node, &[0; 24], 288).unwrap();
        assert_eq!(stat.len(), 288);
        assert_eq!(guest.attr(node).unwrap().nlink, 1, "it says nothing of those inside");
        let forget = guest.request(opcode::FORGET, node, &1_u64.to_ne_bytes());
        assert_eq!(guest.send(&forget, 0), None);
    }
}

#[test]
fn what_is_in_the_way_is_named() {
    let mounts = Mounts::new();
    mounts.mount(&at("/a/b"), image("v6-none")).unwrap();
    let (a, ab) = (at("/a"), at("/a/b"));
    let cases = [
        ("/a/b", MountError::Exists { at: ab.clone() }),
        ("/a", MountError::Above { at: a, inner: ab.clone() }),
        ("/", MountError::Above { at: at("/"), inner: ab.clone() }),
        ("/a/b/c", MountError::Inside { at: at("/a/b/c"), outer: ab }),
    ];
    for (path, want) in cases {
        assert_eq!(mounts.mount(&at(path), image("v6-none")), Err(want), "{path}");
    }
    for path in ["/", "/a", "/a/bc", "/nothing"] {
        let missing = MountError::Missing { at: at(path) };
        assert_eq!(mounts.unmount(&at(path)), Err(missing.clone()));
        assert_eq!(mounts.remount(&at(path), image("v6-none")), Err(missing));
    }
    assert_eq!(mounts.paths(), [at("/a/b")]);
    mounts.unmount(&at("/a/b")).unwrap();
    mounts.mount(&at("/"), image("v6-none")).unwrap();
    let inside = MountError::Inside { at: at("/a"), outer: at("/") };
    assert_eq!(mounts.mount(&at("/a"), image("v6-none")), Err(inside));
}

#[test]
fn node_ids_hold_for_the_same_image_in_any_order_and_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("boot");
    std::fs::copy(path("v6-none").join("bootstrap"), &copy).unwrap();
    let open = |copy| {
        let image = Bootstrap::open(copy).unwrap();
        AnyFs::from(RafsFs::new(image, Vec::new(), RafsOptions::default()))
    };
    let first = Mounts::new();
    first.mount(&at("/x"), image("v6-zstd")).unwrap();
    first.mount(&at("/m"), open(&copy)).unwrap();
    let node = Guest::mount(first.clone()).at(b"/m/a");
    // Another daemon, without the other image.
    let second = Mounts::new();
    second.mount(&at("/m"), open(&copy)).unwrap();
    let guest = Guest::mount(second.clone());
    assert!(guest.attr(node).is_ok());
    second.remount(&at("/m"), open(&copy)).unwrap();
    assert!(guest.attr(node).is_ok(), "the same file");
    second.unmount(&at("/m")).unwrap();
    assert_eq!(guest.attr(node), Err(libc::ESTALE));
    second.mount(&at("/m"), open(&copy)).unwrap();
    assert!(guest.attr(node).is_ok());
    // Another image under the same name, of the same length.
    let bytes = std::fs::read(&copy).unwrap();
    std::fs::write(dir.path().join("new"), bytes).unwrap();
    std::fs::rename(dir.path().join("new"), &copy).unwrap();
    second.remount(&at("/m"), open(&copy)).unwrap();
    assert_eq!(guest.attr(node), Err(libc::ESTALE), "for all we know it is another image");
    assert_ne!(guest.at(b"/m/a"), node);
}

#[test]
fn an_image_at_the_root_promises_that_nothing_changes() {
    let mounts = metadata(bootstrap("v6-none"));
    let guest = Guest::unmounted(mounts.clone(), ServerOptions::default());
    guest.init(31, 1 << 17 | 1 << 24).unwrap();
    let file = guest.at(b"/a");
    assert_eq!(guest.ask(opcode::OPEN, file, &[0; 8], 16), Err(libc::ENOSYS));
    mounts.unmount(&at("/")).unwrap();
    assert_eq!(guest.attr(file), Err(libc::ESTALE));
    assert_eq!(names(&guest, 1), [""; 0]);
    // It mounts again and is promised less.
    mounts.mount(&at("/m"), image("v6-none")).unwrap();
    guest.init(31, 1 << 17 | 1 << 24).unwrap();
    assert!(guest.ask(opcode::OPEN, guest.at(b"/m/a"), &[0; 8], 16).is_ok());
    // Images without extended attributes do not make a guest stop asking others for them.
    mounts.mount(&at("/e"), image("v6-empty")).unwrap();
    let getxattr = [&[0; 8][..], b"security.capability\0"].concat();
    assert_eq!(guest.ask(opcode::GETXATTR, guest.at(b"/e"), &getxattr, 8), Err(libc::ENODATA));
}

#[test]
fn thousands_of_mounts_in_one_tree() {
    let mounts = Mounts::new();
    let shared = image("v6-none");
    for i in 0..2000 {
        mounts.mount(&at(&format!("/rafs/c{i}/lowerdir")), shared.clone()).unwrap();
    }
    let guest = Guest::mount(mounts.clone());
    let rafs = guest.at(b"/rafs");
    assert_eq!(names(&guest, rafs).len(), 2000);
    for i in (0..2000).step_by(7) {
        guest.attr(guest.at(format!("/rafs/c{i}/lowerdir/a").as_bytes())).unwrap();
    }
    for i in 0..2000 {
        mounts.unmount(&at(&format!("/rafs/c{i}/lowerdir"))).unwrap();
    }
    assert_eq!(names(&guest, 1), [""; 0]);
}

#[test]
fn a_listing_goes_on_where_it_was_while_mounts_come_and_go() {
    let mounts = Mounts::new();
    let shared = image("v6-none");
    for i in 0..100 {
        mounts.mount(&at(&format!("/m{i}")), shared.clone()).unwrap();
    }
    let guest = Guest::mount(mounts.clone());
    let first = guest.list(1, 0, 500, false).unwrap();
    let seen = first.len() - 2;
    assert!((5..90).contains(&seen));
    mounts.unmount(&at("/m0")).unwrap();
    mounts.unmount(&at(&format!("/m{}", seen + 1))).unwrap();
    mounts.mount(&at("/new"), shared).unwrap();
    let mut rest = vec![];
    let mut cookie = first.last().unwrap().off;
    loop {
        let more = guest.list(1, cookie, 500, false).unwrap();
        let Some(last) = more.last() else { break };
        cookie = last.off;
        rest.extend(more);
    }
    // All that were not seen, less the one that is gone, and the new one.
    assert_eq!(rest.len(), 100 - seen);
    assert_eq!(rest.last().unwrap().name, b"new");
    assert_eq!(guest.list(1, u64::MAX, 500, false).unwrap(), []);
}

#[test]
fn guests_read_while_others_mount_and_unmount() {
    let mounts = Mounts::new();
    mounts.mount(&at("/stays"), image("v6-zstd")).unwrap();
    let guest = Arc::new(Guest::mount(mounts.clone()));
    let entries = guest.list_all(guest.at(b"/stays/bigdir"), 4096, true).len();
    let done = Arc::new(AtomicBool::new(false));
    let readers: Vec<_> = (0..2)
        .map(|_| {
            let (guest, done) = (guest.clone(), done.clone());
            std::thread::spawn(move || {
                let mut rounds = 0;
                while !done.load(Ordering::Relaxed) {
                    let listed = guest.list_all(guest.at(b"/stays/bigdir"), 4096, true);
                    assert_eq!(listed.len(), entries);
                    // What comes and goes is there or not, and never something else.
                    if let Ok(entry) = guest.lookup(1, b"comes")
                        && let Ok(a) = guest.lookup(entry.nodeid, b"a")
                    {
                        assert_eq!(a.attr.mode & libc::S_IFMT, libc::S_IFREG);
                    }
                    rounds += 1;
                }
                rounds
            })
        })
        .collect();
    for _ in 0..300 {
        mounts.mount(&at("/comes"), image("v6-none")).unwrap();
        mounts.remount(&at("/comes"), image("v6-none")).unwrap();
        mounts.unmount(&at("/comes")).unwrap();
    }
    done.store(true, Ordering::Relaxed);
    for reader in readers {
        assert!(reader.join().unwrap() > 0);
    }
}
