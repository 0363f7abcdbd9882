//! What a guest sees of the golden images is what their `tree.json` says.

use std::collections::BTreeMap;

use serde_json::Value;
use zerocopy::{FromBytes, IntoBytes};

use super::guest::{Guest, bootstrap, metadata, path};
use rafsd::fuse::abi::{self, GetxattrIn, GetxattrOut, opcode};

/// Images we read.
pub const CASES: [&str; 11] = [
    "v6-zstd",
    "v6-lz4",
    "v6-none",
    "v6-sha256",
    "v6-blake3",
    "v6-batch",
    "v6-two-layers",
    "v6-chunkdict",
    "v6-oci-packed",
    "v6-merged",
    "v6-empty",
];

/// The entries of a case's `tree.json`.
pub fn tree(case: &str) -> Vec<Value> {
    let text = std::fs::read(path(case).join("tree.json")).unwrap();
    serde_json::from_slice::<Vec<Value>>(&text).unwrap()
}

fn base64(text: &str) -> Vec<u8> {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let (mut out, mut word, mut bits) = (vec![], 0_u32, 0);
    for digit in text.bytes().filter(|&b| b != b'=') {
        let value = DIGITS.iter().position(|&d| d == digit).unwrap();
        word = word << 6 | u32::try_from(value).unwrap();
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            out.push(u8::try_from(word >> bits & 0xFF).unwrap());
        }
    }
    out
}

/// Bytes of field `name`, which is `NAME` or `NAME_b64`.
pub fn bytes(entry: &Value, name: &str) -> Vec<u8> {
    match entry.get(name) {
        Some(text) => text.as_str().unwrap().as_bytes().to_vec(),
        None => base64(entry[format!("{name}_b64")].as_str().unwrap()),
    }
}

fn number(entry: &Value, name: &str) -> i64 {
    entry[name].as_i64().unwrap_or_else(|| panic!("{name} in {entry}"))
}

/// Names and values of the extended attributes of a node.
fn xattrs(guest: &Guest, node: u64) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let ask = |opcode, name: &[u8]| {
        let args = |size| [GetxattrIn { size, padding: 0 }.as_bytes(), name].concat();
        let room: GetxattrOut = guest.get(opcode, node, &args(0))?;
        let value = guest.ask(opcode, node, &args(room.size.max(1)), room.size as usize)?;
        assert_eq!(value.len(), room.size as usize);
        if room.size > 1 {
            let short = guest.ask(opcode, node, &args(room.size - 1), room.size as usize);
            assert_eq!(short, Err(libc::ERANGE));
        }
        Ok(value)
    };
    let names = match ask(opcode::LISTXATTR, b"") {
        Err(libc::ENOSYS) => return BTreeMap::new(),
        names => names.unwrap(),
    };
    names
        .split_inclusive(|&b| b == 0)
        .map(|name| (name[..name.len() - 1].to_vec(), ask(opcode::GETXATTR, name).unwrap()))
        .collect()
}

#[test]
fn every_attribute_is_that_of_the_tree() {
    for case in CASES {
        let image = bootstrap(case);
        let stores_owner = image.flags().bits() & 0x10 != 0;
        let guest = Guest::mount(metadata(image));
        let mut links: BTreeMap<u64, i64> = BTreeMap::new();
        for want in tree(case) {
            let path = bytes(&want, "path");
            let node = guest.at(&path);
            let at = format!("{case} {}", path.escape_ascii());
            let attr = guest.attr(node).unwrap();
            let (kind, kind_bits) = match want["type"].as_str().unwrap() {
                "file" => ("file", libc::S_IFREG),
                "dir" => ("dir", libc::S_IFDIR),
                "symlink" => ("symlink", libc::S_IFLNK),
                "char" => ("char", libc::S_IFCHR),
                "block" => ("block", libc::S_IFBLK),
                "fifo" => ("fifo", libc::S_IFIFO),
                "socket" => ("socket", libc::S_IFSOCK),
                other => panic!("{other}"),
            };
            let mode = u32::from_str_radix(want["mode"].as_str().unwrap(), 8).unwrap();
            assert_eq!(attr.mode, kind_bits | mode, "{at}");
            assert!(stores_owner, "{case}");
            assert_eq!(i64::from(attr.uid), number(&want, "uid"), "{at}");
            assert_eq!(i64::from(attr.gid), number(&want, "gid"), "{at}");
            assert_eq!(i64::from(attr.nlink), number(&want, "nlink"), "{at}");
            for (secs, nsec) in [
                (attr.mtime, attr.mtimensec),
                (attr.atime, attr.atimensec),
                (attr.ctime, attr.ctimensec),
            ] {
                assert_eq!(secs.cast_signed(), number(&want, "mtime"), "{at}");
                assert_eq!(i64::from(nsec), number(&want, "mtime_nsec"), "{at}");
            }
            if matches!(kind, "file" | "symlink") {
                assert_eq!(attr.size.cast_signed(), number(&want, "size"), "{at}");
            }
            if kind == "file" {
                *links.entry(attr.ino).or_default() += 1;
                assert_eq!(attr.blocks % 8, 0, "{at}");
                assert!(attr.blocks <= attr.size.div_ceil(4096) * 8, "{at}");
            }
            if kind == "symlink" {
                let target = guest.ask(opcode::READLINK, node, b"", 4095).unwrap();
                assert_eq!(target, bytes(&want, "target"), "{at}");
            } else {
                let refused = guest.ask(opcode::READLINK, node, b"", 4095);
                assert_eq!(refused, Err(libc::EINVAL), "{at}");
            }
            let rdev = match kind {
                "char" | "block" => {
                    let device = [&want["rdev"][0], &want["rdev"][1]].map(|n| n.as_u64().unwrap());
                    (device[0], device[1])
                }
                _ => (0, 0),
            };
            let minor = attr.rdev & 0xFF | attr.rdev >> 12 & 0xFFF00;
            assert_eq!((u64::from(attr.rdev >> 8 & 0xFFF), u64::from(minor)), rdev, "{at}");
            let want_xattrs: BTreeMap<Vec<u8>, Vec<u8>> = match &want["xattrs"] {
                Value::Object(map) => map
                    .iter()
                    .map(|(name, value)| {
                        (name.clone().into_bytes(), base64(value.as_str().unwrap()))
                    })
                    .collect(),
                _ => BTreeMap::new(),
            };
            assert_eq!(xattrs(&guest, node), want_xattrs, "{at}");

            let statx: abi::StatxOut = guest.get(opcode::STATX, node, &[0; 24]).unwrap();
            let stat = statx.stat;
            assert_eq!((stat.mask, u32::from(stat.mode)), (0x7FF, attr.mode), "{at}");
            assert_eq!((stat.ino, stat.size, stat.blocks), (attr.ino, attr.size, attr.blocks));
            assert_eq!((stat.rdev_major, stat.rdev_minor), (attr.rdev >> 8 & 0xFFF, minor), "{at}");
            assert_eq!(stat.mtime.tv_sec, number(&want, "mtime"), "{at}");
        }
        for (ino, names) in links {
            let attr = guest.attr(1 << 40 | ino).unwrap();
            assert_eq!(i64::from(attr.nlink), names, "{case}: hard links share inode {ino}");
        }
    }
}

#[test]
fn listings_have_every_name_once_with_its_type_and_number() {
    for case in CASES {
        let guest = Guest::mount(metadata(bootstrap(case)));
        let mut names: BTreeMap<Vec<u8>, Vec<(Vec<u8>, u32)>> = BTreeMap::new();
        for want in tree(case) {
            let path = bytes(&want, "path");
            if path == b"/" {
                names.entry(path).or_default();
                continue;
            }
            let slash = path.iter().rposition(|&b| b == b'/').unwrap();
            let kind = match want["type"].as_str().unwrap() {
                "file" => libc::DT_REG,
                "dir" => libc::DT_DIR,
                "symlink" => libc::DT_LNK,
                "char" => libc::DT_CHR,
                "block" => libc::DT_BLK,
                "fifo" => libc::DT_FIFO,
                _ => libc::DT_SOCK,
            };
            if kind == libc::DT_DIR {
                names.entry(path.clone()).or_default();
            }
            let parent = path[..slash.max(1)].to_vec();
            names.entry(parent).or_default().push((path[slash + 1..].to_vec(), kind.into()));
        }
        for (dir, mut want) in names {
            let node = guest.at(&dir);
            want.extend([(b".".to_vec(), 4), (b"..".to_vec(), 4)]);
            want.sort();
            for plus in [false, true] {
                let listed = guest.list_all(node, 4096, plus);
                let got: Vec<_> = listed.iter().map(|e| (e.name.clone(), e.kind)).collect();
                assert_eq!(got, want, "{case} {}", dir.escape_ascii());
                for entry in listed {
                    let found = guest.lookup(node, &entry.name).unwrap();
                    assert_eq!(found.attr.ino, entry.ino);
                    let dots = matches!(&entry.name[..], b"." | b"..");
                    match entry.entry {
                        Some(told) if dots => assert_eq!(told, Default::default()),
                        Some(told) => assert_eq!(told, found, "READDIRPLUS and LOOKUP differ"),
                        None => {}
                    }
                }
            }
        }
    }
}

#[test]
fn names_that_are_not_there_are_remembered_as_missing() {
    let guest = Guest::mount(metadata(bootstrap("v6-zstd")));
    for name in [&b"no such"[..], b"\xff\xfe", &[b'n'; 255], b"...", b" "] {
        let entry = guest.lookup(1, name).unwrap();
        assert_eq!((entry.nodeid, entry.entry_valid), (0, u64::from(u32::MAX)));
        assert_eq!(entry.attr, Default::default());
    }
    let found = guest.lookup(1, b"bigdir").unwrap();
    assert_eq!((found.entry_valid, found.attr_valid), (u64::from(u32::MAX), u64::from(u32::MAX)));
    let file = guest.at(b"/bigdir/e000000000");
    assert_eq!(guest.lookup(file, b"x").unwrap_err(), libc::ENOTDIR);
    assert_eq!(guest.lookup(1, &[b'n'; 256]).unwrap_err(), libc::ENAMETOOLONG);
}

#[test]
fn dot_and_dotdot_are_found_by_number() {
    let guest = Guest::mount(metadata(bootstrap("v6-zstd")));
    let dir = guest.at(b"/bigdir");
    let file = guest.at(b"/bigdir/e000000000");
    // (node, name, node)
    for (node, name, want) in [
        (1, b"." as &[u8], 1),
        (1, b"..", 1),
        (dir, b".", dir),
        (dir, b"..", 1),
        (file, b".", file),
    ] {
        assert_eq!(guest.lookup(node, name).unwrap().nodeid, want, "{node:#x} {name:?}");
    }
    assert_eq!(guest.lookup(file, b"..").unwrap_err(), libc::ENOTDIR);
}

#[test]
fn opens_say_that_everything_may_be_kept() {
    let guest = Guest::mount(metadata(bootstrap("v6-zstd")));
    let file = guest.at(b"/bigdir/e000000000");
    let open = |opcode, node, flags: i32| {
        let args = abi::OpenIn { flags: flags.cast_unsigned(), open_flags: 0 };
        guest.get::<abi::OpenOut>(opcode, node, args.as_bytes()).map(|out| out.open_flags)
    };
    // (opcode, node, flags, answer): FOPEN_KEEP_CACHE 2, FOPEN_CACHE_DIR 8, FOPEN_NOFLUSH 32
    let cases = [
        (opcode::OPEN, file, libc::O_RDONLY, Ok(34)),
        (opcode::OPEN, file, libc::O_WRONLY, Err(libc::EROFS)),
        (opcode::OPEN, file, libc::O_RDWR, Err(libc::EROFS)),
        (opcode::OPEN, file, libc::O_RDONLY | libc::O_TRUNC, Err(libc::EROFS)),
        (opcode::OPEN, 1, libc::O_RDONLY, Err(libc::EISDIR)),
        (opcode::OPENDIR, 1, libc::O_RDONLY, Ok(10)),
        (opcode::OPENDIR, file, libc::O_RDONLY, Err(libc::ENOTDIR)),
    ];
    for (opcode, node, flags, want) in cases {
        assert_eq!(open(opcode, node, flags), want, "{opcode} {node:#x} {flags:#x}");
    }
    for opcode in [
        opcode::RELEASE,
        opcode::RELEASEDIR,
        opcode::FLUSH,
        opcode::FSYNC,
        opcode::FSYNCDIR,
        opcode::SYNCFS,
    ] {
        assert_eq!(guest.ask(opcode, file, &[0; 24], 0), Ok(vec![]), "{opcode}");
    }
}

#[test]
fn nothing_can_be_changed() {
    let guest = Guest::mount(metadata(bootstrap("v6-none")));
    for opcode in [4, 6, 8, 9, 10, 11, 12, 13, 16, 21, 24, 35, 43, 45, 51] {
        assert_eq!(guest.ask(opcode, 1, &[0; 128], 256), Err(libc::EROFS), "{opcode}");
    }
    // COPY_FILE_RANGE from an image: programs take this for a hint to read and write themselves.
    for opcode in [47, 53] {
        assert_eq!(guest.ask(opcode, 1, &[0; 128], 256), Err(libc::EXDEV), "{opcode}");
    }
    for opcode in [0, 7, 19, 31, 37, 39, 40, 48, 49, 54, 4096, u32::MAX] {
        assert_eq!(guest.ask(opcode, 1, &[0; 128], 256), Err(libc::ENOSYS), "{opcode}");
    }
    let access =
        |node, mask: i32| guest.ask(opcode::ACCESS, node, [mask, 0].as_bytes(), 0).map(|_| ());
    let file = guest.at(b"/a");
    assert_eq!(access(file, libc::R_OK), Ok(()));
    assert_eq!(access(file, libc::W_OK), Err(libc::EROFS));
    assert_eq!(access(file, libc::X_OK), Err(libc::EACCES), "/a has mode 0644");
    assert_eq!(access(1, libc::R_OK | libc::X_OK), Ok(()));
}

#[test]
fn the_file_system_says_how_large_it_is() {
    let guest = Guest::mount(metadata(bootstrap("v6-none")));
    let statfs: abi::StatfsOut = guest.get(opcode::STATFS, 1, b"").unwrap();
    // 9 blocks of data, 5 of metadata, 14 paths: the worked example of docs/rafs.md.
    assert_eq!((statfs.blocks, statfs.files, statfs.bfree, statfs.ffree), (14, 14, 0, 0));
    assert_eq!((statfs.bsize, statfs.frsize, statfs.namelen), (4096, 4096, 255));
}

#[test]
fn attributes_of_a_name_that_are_not_there() {
    let guest = Guest::mount(metadata(bootstrap("v6-none")));
    let x = guest.at(b"/x");
    let get = |name: &[u8], size: u32| {
        let body = [GetxattrIn { size, padding: 0 }.as_bytes(), name].concat();
        guest.ask(opcode::GETXATTR, x, &body, 8)
    };
    assert_eq!(get(b"user.k\0", 1), Ok(b"v".to_vec()));
    let query = GetxattrOut::read_from_bytes(&get(b"user.k\0", 0).unwrap()).unwrap();
    assert_eq!(query.size, 1);
    for name in [&b"user.l\0"[..], b"user.\0", b"k\0", b"trusted.k\0", b"user.k2\0"] {
        assert_eq!(get(name, 8), Err(libc::ENODATA), "{}", name.escape_ascii());
    }
    assert_eq!(get(&[&[b'n'; 256][..], b"\0"].concat(), 8), Err(libc::ERANGE));
}
