//! Rules of the format, on literal bytes: the worked example of `docs/rafs.md`, whole and with
//! single fields changed.

use std::path::Path;

use super::id::Nid;
use super::layout::ImageFlags;
use super::{Bootstrap, FileKind, FormatError, Inode};

fn example() -> Vec<u8> {
    let path = "guest-tests/golden/v6-none/bootstrap";
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// The worked example with `bytes` at `offset`.
fn changed(offset: usize, bytes: &[u8]) -> Vec<u8> {
    let mut image = example();
    image[offset..offset + bytes.len()].copy_from_slice(bytes);
    image
}

/// The first thing wrong with the image, by whatever looks at all of it.
fn first_error(image: Vec<u8>) -> Result<(), String> {
    let image = Bootstrap::from_bytes(image).map_err(|e| e.to_string())?;
    for item in image.walk() {
        let inode = item.map_err(|e| format!("{e}: {}", e.source))?.inode;
        look_at(&inode).map_err(|e| e.to_string())?;
    }
    for blob in image.blobs() {
        image.chunk_digests(blob.index).map_err(|e| e.to_string())?;
    }
    Ok(())
}

fn look_at(inode: &Inode<'_>) -> Result<(), FormatError> {
    inode.xattrs()?;
    if inode.kind() == FileKind::Symlink {
        inode.symlink_target()?;
    }
    (0..inode.chunk_count()).try_for_each(|i| inode.chunk(i).map(drop))
}

/// Each change is refused with words that contain the given ones.
fn refused(cases: &[(usize, &[u8], &str)]) {
    for &(offset, bytes, message) in cases {
        let got = first_error(changed(offset, bytes));
        let Err(error) = got else { panic!("{bytes:x?} at {offset:#x} is accepted") };
        assert!(error.contains(message), "{bytes:x?} at {offset:#x}: {error}");
    }
}

#[test]
fn super_blocks_of_the_worked_example() {
    let image = Bootstrap::from_bytes(example()).unwrap();
    assert_eq!(first_error(example()), Ok(()));
    assert_eq!(image.len(), 20480);
    assert_eq!(image.root(), Nid(128));
    assert_eq!(image.block_size(), 4096);
    assert_eq!(image.chunk_size(), 4096);
    assert_eq!(image.path_count(), 14);
    assert_eq!(image.slots(), (20480 - 0x2000) / 32);
    assert_eq!(
        image.flags(),
        ImageFlags::COMPRESSION_NONE
            | ImageFlags::HASH_BLAKE3
            | ImageFlags::EXPLICIT_UID_GID
            | ImageFlags::HAS_XATTR
            | ImageFlags::ENCRYPTION_NONE
    );
    let [blob] = image.blobs() else { panic!("one blob") };
    assert_eq!(
        blob.id.as_str(),
        "4de91e905cfb82e8d9fcfc648c3eb31717c38cb2557a97df34327eade97f9849"
    );
    assert_eq!((blob.chunk_count, blob.uncompressed_size), (9, 0x9000));
    assert_eq!((blob.ci_offset, blob.ci_compressed_size, blob.data_end), (0x46bf, 0x90, 0x46bf));
    assert_eq!(image.chunk_records().len(), 9);
}

#[test]
fn inodes_of_the_worked_example() {
    let image = Bootstrap::from_bytes(example()).unwrap();
    let root = image.inode(Nid(128)).unwrap();
    assert_eq!((root.size(), root.nlink(), root.mode()), (158, 3, 0o40755));
    let entries: Vec<_> =
        root.dir().unwrap().entries_from(0).unwrap().map(|e| e.unwrap()).collect();
    let names: Vec<_> = entries.iter().map(|e| e.name.escape_ascii().to_string()).collect();
    assert_eq!(names, [".", "..", "a", "b", "d", "empty", "exact", "fifo", "null", "s", "x"]);
    assert_eq!((entries[2].nid, entries[2].file_type), (Nid(135), 1));

    let at = |path: &str| {
        let mut inode = root;
        for name in path.split('/') {
            let entry = inode.dir().unwrap().lookup(name.as_bytes()).unwrap().unwrap();
            inode = image.inode(entry.nid).unwrap();
        }
        inode
    };
    let a = at("a");
    assert_eq!((a.nid(), a.offset(), a.mode(), a.size()), (Nid(135), 0x30e0, 0o100_644, 5));
    assert_eq!((a.mtime(), a.mtime_nsec()), (1_600_000_001, 1_000_003));
    assert_eq!((a.chunk_count(), a.chunk_len(0), a.chunk_len(1)), (1, 5, 0));
    let b = at("b");
    let chunks: Vec<_> = (0..b.chunk_count()).map(|i| b.chunk(i).unwrap()).collect();
    let chunks: Vec<_> =
        chunks.iter().map(|c| (c.device(), c.chunk_index(), c.start_block())).collect();
    assert_eq!(chunks, [(1, 1, 1), (1, 2, 2), (1, 3, 3)]);
    assert_eq!(b.chunk_len(2), 9000 - 8192);
    assert_eq!(at("null").rdev_major_minor(), (1, 3));
    assert_eq!(at("s").symlink_target().unwrap(), b"d/e");
    assert_eq!(at("d/e").nid(), at("d/hard").nid());
    let x = at("x");
    assert_eq!(x.xattrs().unwrap().get(b"user.k"), Some(&b"v"[..]));
    assert_eq!(x.xattrs().unwrap().get(b"user.l"), None);
    assert_eq!(x.chunk(0).unwrap().chunk_index(), 5);
}

#[test]
fn compact_inodes_are_read() {
    let mut image = example();
    image[1048..1056].copy_from_slice(&1_700_000_000_u64.to_le_bytes()); // build time
    // Regular, no xattrs, 0640, 2 links, 0 bytes, chunk format, ino 7, owner 3:4.
    let compact: [u8; 32] = [
        8, 0, 0, 0, 0xa0, 0x81, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 7, 0, 0, 0, 3, 0, 4,
        0, 0, 0, 0, 0,
    ];
    image[0x31a0..0x31c0].copy_from_slice(&compact);
    let image = Bootstrap::from_bytes(image).unwrap();
    let inode = image.inode(Nid((0x31a0 - 0x2000) / 32)).unwrap();
    assert!(inode.is_compact());
    assert_eq!((inode.mode(), inode.nlink(), inode.size()), (0o100_640, 2, 0));
    assert_eq!((inode.uid(), inode.gid(), inode.ino()), (3, 4, 7));
    assert_eq!((inode.mtime(), inode.mtime_nsec()), (1_700_000_000, 0));
}

#[test]
fn super_block_rules() {
    refused(&[
        (0, b"SFAR", "RAFS v5 images are not supported"),
        (1024, &[0], "no RAFS bootstrap"),
        (1028, &[1], "checksum"),
        (1035, &[0], "not RAFS v6"),
        (1036, &[13], "block size"),
        (1036, &[9], "tarfs images are not supported"),
        (1037, &[1], "extension slots"),
        (1038, &[0, 0], "inode at byte 8192: mode 0o0"),
        (1038, &[135, 0], "not a directory"),
        (1040, &[0], "no inodes"),
        (1064, &[5], "metadata area"),
        (1064, &[0xff; 4], "metadata area"),
        (1068, &[1], "shared xattrs"),
        (1104, &[0xd], "incompatible features"),
        (1108, &[1], "compression algorithms"),
        (1110, &[2], "1 blobs, but 2 device slots"),
        (1110, &[255], "more than 254"),
        (1112, &[12], "device table"),
        (1152, &[0x37], "one compressor"),
        (1152, &[0x34], "one compressor"),
        (1152, &[0x3d], "one digester"),
        (1152, &[0x31], "one digester"),
        (1153, &[0x02], "tarfs images are not supported"),
        (1153, &[0x04], "unknown flags 0x400"),
        (1160, &[0, 0x18], "blob table at byte 6144: offset"),
        (1160, &[0, 0x50], "blob table at byte 20480 needs 256 bytes"),
        (1160, &[0xff; 8], "blob table"),
        (1160, &[0, 0x40], "overlaps the blob table"),
        (1168, &[1], "multiple of 256"),
        (1172, &[0, 0x18], "chunk size 6144"),
        (1172, &[0, 0, 0, 2], "chunk size"),
        (1172, &[0, 0x20], "chunk size is not the image's"),
        (1176, &[0, 0x10], "overlaps the blob table"),
        (1176, &[0, 0], "chunk table at byte 0: offset"),
        (1184, &[0xd1], "multiple of 80"),
        (1192, &[0, 0x10, 0, 0, 0, 0, 0, 0, 8], "overlaps the blob table"),
        (1192, &[0, 0x40, 0, 0, 0, 0, 0, 0, 8], "overlaps the chunk table"),
        (1192, &[4, 0x11, 0, 0, 0, 0, 0, 0, 8], "prefetch table"),
        (1192, &[8, 0x11, 0, 0, 0, 0, 0, 0, 6], "multiple of 4"),
    ]);
}

#[test]
fn lengths_of_a_bootstrap() {
    let image = example();
    for len in [0, 3, 1024, 1400, 4095, 20479] {
        let error = Bootstrap::from_bytes(image[..len].to_vec()).unwrap_err();
        assert!(!matches!(error, FormatError::Unsupported { .. }), "{len}: {error}");
    }
}

#[test]
fn blob_table_rules() {
    refused(&[
        (1408, b"5", "device slot names another"),
        (1472, &[8], "device slot has 8 blocks"),
        (0x1000, b"X", "64 hexadecimal digits"),
        (0x1000, b"/", "64 hexadecimal digits"),
        (0x1040, &[1], "index is not the position"),
        (0x1044, &[0, 0x20], "chunk size is not the image's"),
        (0x1048, &[10], "chunk count does not fit"),
        (0x1048, &[8], "chunk count does not fit"),
        (0x1048, &[1, 0, 0, 1], "more than 1 << 24"),
        (0x104c, &[4], "unknown compressor 4"),
        (0x1050, &[2], "unknown digester 2"),
        (0x1054, &[0], "not aligned"),
        (0x1054, &[0x41], "tarfs images are not supported"),
        (0x1054, &[0x0d], "zran (OCI reference) images are not supported"),
        (0x1054, &[0x15], "tar-ref (OCI reference) images are not supported"),
        (0x1054, &[0x05, 1], "encrypted images are not supported"),
        (0x1054, &[0, 8], "external images are not supported"),
        (0x1054, &[1, 2], "generated chunk dictionary images are not supported"),
        (0x1054, &[0x81], "batches need version 2"),
        (0x1054, &[0x05], "size of the chunk-info array"),
        (0x1054, &[1, 0x10], "unknown features 0x1000"),
        (0x1057, &[0xc0], "unknown features 0x80000000"),
        (0x1058, &[0x4e], "chunk-info array is not inside the blob"),
        (0x105d, &[2], "compressed size exceeds"),
        (0x1065, &[0x20], "uncompressed size exceeds"),
        (0x1060, &[0, 0], "no blocks"),
        (0x1060, &[0, 0xa0], "chunk count does not fit"),
        (0x1068, &[1], "size of table of contents"),
        (0x106c, &[7], "unknown compressor 7"),
        (0x1070, &[0xff; 8], "beyond 64 bits"),
        (0x1078, &[0x91], "larger stored than read"),
        (0x1080, &[0xa0], "size of the chunk-info array"),
        (0x10d8, &[1], "encrypted images are not supported"),
    ]);
}

#[test]
fn inode_rules() {
    // /a is at 0x30e0, /s at 0x32c0, /x at 0x3320 with xattrs at 0x3360, the root at 0x3000.
    refused(&[
        (0x30e0, &[0x19], "format 0x19 does not fit a file"),
        (0x30e0, &[0x01], "format 0x1 does not fit a file"),
        (0x30e0, &[0x07], "format 0x7 does not fit a file"),
        (0x3000, &[0x09], "format 0x9 does not fit a dir"),
        (0x3240, &[0x05], "format 0x5 does not fit a fifo"),
        (0x30e2, &[0xff, 0xff], "xattr area at byte 12512 needs"),
        (0x30e4, &[0, 0x70], "mode 0o70000"),
        (0x30e8, &[0, 0, 0, 0, 0, 0, 0, 0x80], "63 bits"),
        (0x30e8, &[0, 0, 0, 0, 0, 0, 1], "chunk count exceeds 32 bits"),
        (0x30e8, &[0, 0, 0, 1], "chunk addresses at byte 12576 needs"),
        (0x30f0, &[0], "chunk format 0x0"),
        (0x30f0, &[0x60], "chunk format 0x60"),
        (0x3108, &[0, 0xca, 0x9a, 0x3b], "nanoseconds"),
        (0x310c, &[0], "link count is 0"),
        (0x3120, &[9], "chunk 9 of 9"),
        (0x3122, &[0], "no device 0"),
        (0x3122, &[2], "no device 2"),
        (0x3123, &[1], "chunk 65536 of 9"),
        (0x3124, &[0xff; 4], "hole"),
        (0x3124, &[9], "block 9 is too far"),
        (0x32c8, &[0], "symlink target of 0 bytes"),
        (0x32c8, &[1, 0x10], "symlink target of 4097 bytes"),
        (0x3300, &[0], "NUL in a symlink target"),
        (0x3008, &[0], "directory of size 0"),
        (0x3364, &[1], "shared xattrs"),
        (0x336c, &[0], "name does not fit its namespace"),
        (0x336c, &[200], "longer than its area"),
        (0x336d, &[5], "unknown namespace"),
        (0x336d, &[2], "name does not fit its namespace"),
        (0x336e, &[9], "longer than its area"),
        (0x3370, &[0], "NUL"),
        (0x3322, &[4], "unknown namespace"),
    ]);
    let image = Bootstrap::from_bytes(example()).unwrap();
    for nid in [image.slots(), u64::MAX / 32, u64::MAX, 1 << 59] {
        image.inode(Nid(nid)).unwrap_err();
    }
}

#[test]
fn inline_data_stays_in_the_block_of_its_inode() {
    let mut image = example();
    // The target of /s, copied behind an inode at the end of its block.
    let inode = image[0x32c0..0x3303].to_vec();
    image[0x3fc0..0x3fc0 + inode.len()].copy_from_slice(&inode);
    let image = Bootstrap::from_bytes(image).unwrap();
    let error = image.inode(Nid((0x3fc0 - 0x2000) / 32)).unwrap_err().to_string();
    assert!(error.contains("leaves the block"), "{error}");
}

#[test]
fn data_blocks_are_inside_the_file() {
    let mut image = changed(0x32c0, &[1]); // /s: plain instead of inline
    image[0x32d0..0x32d4].copy_from_slice(&[5, 0, 0, 0]); // at block 5, the end of the file
    let error = first_error(image).unwrap_err();
    assert!(error.contains("/s: data blocks at byte 20480 needs 3 bytes"), "{error}");
    let mut image = changed(0x32c0, &[1]);
    image[0x32d0..0x32d4].copy_from_slice(&[4, 0, 0, 0]);
    image[0x4000..0x4003].copy_from_slice(b"abc");
    let image = Bootstrap::from_bytes(image).unwrap();
    let inode = image.inode(Nid((0x32c0 - 0x2000) / 32)).unwrap();
    assert_eq!(inode.symlink_target().unwrap(), b"abc");
}

#[test]
fn directory_rules() {
    // Entries of the root from 0x3040 on, 12 bytes each; names from 0x30c4 on.
    refused(&[
        (0x3040, &[129], "/.: directory entry at byte 0: leads to nid 129"),
        (0x304c, &[135], "/..: directory entry at byte 0: leads to nid 135"),
        (0x3048, &[0x85], "names start at 133"),
        (0x3048, &[0], "names start at 0"),
        (0x3048, &[0, 1], "names start at 256"),
        (0x3054, &[0x83], "name ends before it starts"),
        (0x306c, &[0x87], "name is not 1 to 255"),
        (0x306c, &[0xff, 0xff], "outside the block"),
        (0x30c4, b"x", "/x: inode at byte 12288: second name of a dir"),
        (0x30c7, b"/", "slash or NUL"),
        (0x30c7, b"\0", "slash or NUL"),
        (0x30c8, b"a", "name is not above the one before it"),
        (0x3062, &[2], "/a: inode at byte 12512: a file, but its name says dir"),
        (0x3062, &[8], "unknown file type"),
        (0x3058, &[0xff; 8], "/a: inode at byte 20480: no nid"),
        (0x3058, &[0], "/a: inode at byte"),
        (0x3070, &[128], "second name of a dir"),
    ]);
    let mut image = changed(0x3040, &[135, 0, 0, 0, 0, 0, 0, 0, 0x84, 0, 1]);
    image[0x30c4] = b'-'; // instead of ".", another name of /a
    assert!(first_error(image).unwrap_err().contains("no \".\" or no \"..\""));
}

#[test]
fn chunk_table_rules() {
    refused(&[
        (0x4000 + 72, &[9], "chunk 9 of 9"),
        (0x4000 + 44, &[0; 4], "not inside blob"),
        (0x4000 + 44, &[1, 0x10], "not inside blob"),
        (0x4000 + 56, &[0xff; 8], "not inside blob"),
    ]);
    let mut image = example();
    let index = image[0x4000 + 72];
    image[0x4000 + 80 + 72] = index;
    assert!(first_error(image).unwrap_err().contains("second record of chunk"));
}

#[test]
fn a_lookup_notices_a_name_among_the_entries() {
    let image = Bootstrap::from_bytes(changed(0x3060, &[0x10])).unwrap();
    let root = image.inode(image.root()).unwrap().dir().unwrap();
    let error = root.lookup(b"a").unwrap_err().to_string();
    assert!(error.contains("name lies among the entries"), "{error}");
}

/// `depth` directories, each with the next as `d`; the `d` of the last one leads to `last`.
fn nested(depth: u64, last: u64) -> Vec<u8> {
    let mut image = example();
    image.truncate(0x3000);
    image[1184..1192].fill(0); // no chunk table
    for i in 0..depth {
        let nid = |i: u64| 128 + 4 * i;
        let mut inode = vec![0; 64];
        inode[0] = 5; // extended, inline
        inode[4..6].copy_from_slice(&0o40755_u16.to_le_bytes());
        inode[8] = 40;
        inode[44] = 3; // links
        let child = if i + 1 == depth { last } else { nid(i + 1) };
        for (nid, name_offset) in [(nid(i), 36), (nid(i.saturating_sub(1)), 37), (child, 39)] {
            inode.extend(nid.to_le_bytes());
            inode.extend([name_offset, 0, 2, 0]);
        }
        inode.extend(b"...d");
        inode.resize(128, 0);
        image.extend(inode);
    }
    image.resize(image.len().next_multiple_of(4096), 0);
    image
}

#[test]
fn a_walk_ends_in_trees_without_end() {
    // (image, paths, last error)
    let depth = u64::try_from(super::walk::MAX_DEPTH).unwrap();
    let cases = [
        (nested(3, 128), 3, "second name of a dir"),
        (nested(3, 128 + 8), 3, "second name of a dir"),
        (nested(depth, 128), depth, "second name of a dir"),
        (nested(depth + 50, 128), depth, "more than 2048 directories deep"),
    ];
    for (image, paths, message) in cases {
        let image = Bootstrap::from_bytes(image).unwrap();
        let (mut found, mut errors) = (0, Vec::new());
        for item in image.walk() {
            match item {
                Ok(item) => {
                    assert_eq!(item.path().len(), (item.depth * 2).max(1));
                    found += 1;
                }
                Err(e) => errors.push(e.source.to_string()),
            }
        }
        assert_eq!(found, paths);
        let [error] = errors.as_slice() else { panic!("{errors:?}") };
        assert!(error.contains(message), "{error}");
    }
}
