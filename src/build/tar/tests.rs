use super::*;
use proptest::prelude::*;

/// A header of this type and name, with fields that a test may change.
fn header(kind: u8, name: &[u8], size: u64) -> ::tar::Header {
    let mut header = ::tar::Header::new_gnu();
    header.as_old_mut().name[..name.len()].copy_from_slice(name);
    header.as_old_mut().linkflag[0] = kind;
    header.set_mode(0o644);
    header.set_uid(1000);
    header.set_gid(1001);
    header.set_mtime(7);
    header.set_size(size);
    header
}

/// A header with its checksum, and the body behind it.
fn entry(mut header: ::tar::Header, body: &[u8]) -> Vec<u8> {
    header.set_cksum();
    let mut out = header.as_bytes().to_vec();
    out.extend_from_slice(body);
    out.resize(out.len().next_multiple_of(512), 0);
    out
}

fn file(name: &str, body: &[u8]) -> Vec<u8> {
    entry(header(b'0', name.as_bytes(), body.len() as u64), body)
}

fn pax(records: &[(&str, &[u8])]) -> Vec<u8> {
    let mut body = Vec::new();
    for (key, value) in records {
        let rest = [b" ", key.as_bytes(), b"=", value, b"\n"].concat();
        let mut len = rest.len() + 1;
        while len != rest.len() + len.to_string().len() {
            len += 1;
        }
        body.extend(len.to_string().into_bytes());
        body.extend(rest);
    }
    entry(header(b'x', b"pax", body.len() as u64), &body)
}

/// Entries with their content.
fn read(bytes: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>, BuildError> {
    let mut reader = TarReader::new(bytes);
    let mut entries = Vec::new();
    while let Some(entry) = reader.next_entry()? {
        let size = match entry.kind {
            EntryKind::File { size } => size,
            _ => 0,
        };
        let mut content = vec![0; usize::try_from(size).unwrap()];
        reader.read_file(&mut content)?;
        entries.push((entry, content));
    }
    assert_eq!(reader.offset(), bytes.len() as u64, "the stream is read to its end");
    Ok(entries)
}

fn one(bytes: &[u8]) -> (Entry, Vec<u8>) {
    let mut entries = read(bytes).unwrap();
    assert_eq!(entries.len(), 1);
    entries.remove(0)
}

fn parts(path: &str) -> Vec<Box<[u8]>> {
    path.split('/').filter(|p| !p.is_empty()).map(|p| p.as_bytes().into()).collect()
}

#[test]
fn fields_of_an_entry() {
    let bytes = [file("dir/name", b"hello"), vec![0; 1024], b"garbage".to_vec()].concat();
    let (entry, content) = one(&bytes);
    assert_eq!(content, b"hello");
    let want = Entry {
        path: parts("dir/name"),
        kind: EntryKind::File { size: 5 },
        mode: 0o644,
        uid: 1000,
        gid: 1001,
        mtime: 7,
        mtime_nsec: 0,
        xattrs: vec![],
    };
    assert_eq!(entry, want);
}

#[test]
fn pax_records_replace_the_fields() {
    let long = "d/".repeat(200) + "end";
    let bytes = [
        pax(&[
            ("path", long.as_bytes()),
            ("size", b"3"),
            ("uid", b"4294967294"),
            ("gid", b"70000"),
            ("mtime", b"-1.5"),
            ("SCHILY.xattr.user.bin", b"a\n=\0\xff"),
            ("SCHILY.xattr.user.empty", b""),
            ("VENDOR.unknown", b"x"),
        ]),
        entry(header(b'0', b"short", 0), b"abc"),
        file("next", b""),
    ]
    .concat();
    let entries = read(&bytes).unwrap();
    let (entry, content) = &entries[0];
    assert_eq!((&entry.path, content.as_slice()), (&parts(&long), &b"abc"[..]));
    assert_eq!((entry.uid, entry.gid), (4_294_967_294, 70_000));
    assert_eq!((entry.mtime, entry.mtime_nsec), (-2, 500_000_000));
    let xattrs =
        vec![(b"user.bin".to_vec(), b"a\n=\0\xff".to_vec()), (b"user.empty".to_vec(), vec![])];
    assert_eq!(entry.xattrs, xattrs);
    // Records are of one entry only.
    assert_eq!((&entries[1].0.path, entries[1].0.uid), (&parts("next"), 1000));
}

#[test]
fn global_records_are_of_all_entries_behind_them() {
    let mut global = pax(&[("uid", b"7"), ("SCHILY.xattr.user.g", b"1"), ("comment", b"c")]);
    global[156] = b'g';
    let mut header = ::tar::Header::from_byte_slice(&global[..512]).clone();
    header.set_cksum();
    global[..512].copy_from_slice(header.as_bytes());
    let bytes =
        [file("a", b""), global.clone(), pax(&[("uid", b"8")]), file("b", b""), file("c", b"")]
            .concat();
    let found: Vec<_> =
        read(&bytes).unwrap().into_iter().map(|(e, _)| (e.uid, e.xattrs.len())).collect();
    assert_eq!(found, [(1000, 0), (8, 1), (7, 1)]);
    let many = [global, file("a", b"")].concat().repeat(30_000);
    assert!(read(&many).unwrap_err().to_string().contains("global headers"));
}

#[test]
fn gnu_long_names_and_links() {
    let (long, target) = ("n".repeat(200) + "/x", "t".repeat(300));
    let bytes = [
        entry(
            header(b'L', b"././@LongLink", long.len() as u64 + 1),
            (long.clone() + "\0").as_bytes(),
        ),
        entry(header(b'K', b"././@LongLink", target.len() as u64), target.as_bytes()),
        entry(header(b'2', b"short", 0), b""),
    ]
    .concat();
    let (entry, _) = one(&bytes);
    assert_eq!(entry.path, parts(&long));
    assert_eq!(entry.kind, EntryKind::Symlink(target.into_bytes()));
}

#[test]
fn names_are_confined_to_the_root() {
    // (name, path)
    let cases: [(&str, &str); 7] = [
        ("./a", "a"),
        ("/a//b/./c/", "a/b/c"),
        ("./", ""),
        (".", ""),
        ("/", ""),
        ("...", "..."),
        (".wh..wh..opq", ".wh..wh..opq"),
    ];
    for (name, path) in cases {
        assert_eq!(
            one(&entry(header(b'5', name.as_bytes(), 0), b"")).0.path,
            parts(path),
            "{name}"
        );
    }
    for name in ["..", "../a", "a/..", "a/../b", "/.."] {
        let error = read(&file(name, b"")).unwrap_err().to_string();
        assert!(error.contains("`..`"), "{name}: {error}");
        let mut link = header(b'1', b"link", 0);
        link.set_link_name_literal(name).unwrap();
        assert!(read(&entry(link, b"")).is_err(), "hard link to {name}");
    }
    assert!(
        read(&pax(&[("path", b"a\0b")]).into_iter().chain(file("x", b"")).collect::<Vec<_>>())
            .is_err()
    );
    let long = [pax(&[("path", &[b'n'; 256])]), file("x", b"")].concat();
    assert!(read(&long).unwrap_err().to_string().contains("256"));
}

#[test]
fn types_without_data_ignore_their_size() {
    for kind in [b'1', b'2', b'5', b'6'] {
        let mut header = header(kind, b"x", 512);
        header.set_link_name_literal("target").unwrap();
        let bytes = [entry(header, b""), file("next", b"n")].concat();
        assert_eq!(read(&bytes).unwrap().len(), 2, "type {}", char::from(kind));
    }
    // V7 has directories only by name; a GNU incremental archive lists names in one.
    assert_eq!(one(&entry(header(0, b"d/", 0), b"")).0.kind, EntryKind::Dir);
    let bytes = [entry(header(b'D', b"d", 5), b"Yx\0\0\0"), file("next", b"n")].concat();
    assert_eq!(read(&bytes).unwrap()[0].0.kind, EntryKind::Dir);
    let mut device = header(b'3', b"null", 0);
    device.set_device_major(1).unwrap();
    device.set_device_minor(3).unwrap();
    assert_eq!(one(&entry(device, b"")).0.kind, EntryKind::CharDevice { major: 1, minor: 3 });
}

#[test]
fn sparse_files_of_all_formats() {
    let mut want = vec![0; 10_000];
    want[1000..1003].copy_from_slice(b"abc");
    want[5000..5002].copy_from_slice(b"de");

    let mut gnu = header(b'S', b"s", 5);
    let fields = gnu.as_gnu_mut().unwrap();
    fields.set_real_size(10_000);
    for (slot, (offset, len)) in fields.sparse.iter_mut().zip([(1000, 3), (5000, 2), (10_000, 0)]) {
        slot.set_offset(offset);
        slot.set_length(len);
    }
    let map_1_0 = b"2\n1000\n3\n5000\n2\n";
    let mut body = map_1_0.to_vec();
    body.resize(512, 0);
    body.extend(b"abcde");
    let cases = [
        ("GNU", entry(gnu, b"abcde")),
        (
            "0.0",
            [
                pax(&[
                    ("GNU.sparse.size", b"10000"),
                    ("GNU.sparse.numblocks", b"2"),
                    ("GNU.sparse.offset", b"1000"),
                    ("GNU.sparse.numbytes", b"3"),
                    ("GNU.sparse.offset", b"5000"),
                    ("GNU.sparse.numbytes", b"2"),
                ]),
                file("s", b"abcde"),
            ]
            .concat(),
        ),
        (
            "0.1",
            [
                pax(&[
                    ("GNU.sparse.size", b"10000"),
                    ("GNU.sparse.name", b"s"),
                    ("GNU.sparse.map", b"1000,3,5000,2"),
                ]),
                file("GNUSparseFile.1/s", b"abcde"),
            ]
            .concat(),
        ),
        (
            "1.0",
            [
                pax(&[
                    ("GNU.sparse.major", b"1"),
                    ("GNU.sparse.minor", b"0"),
                    ("GNU.sparse.name", b"s"),
                    ("GNU.sparse.realsize", b"10000"),
                ]),
                file("GNUSparseFile.1/s", &body),
            ]
            .concat(),
        ),
    ];
    for (format, bytes) in cases {
        let bytes = [bytes, file("next", b"n")].concat();
        let entries = read(&bytes).unwrap_or_else(|e| panic!("{format}: {e}"));
        assert_eq!(entries[0].0.path, parts("s"), "{format}");
        assert!(entries[0].1 == want, "{format}: content");
        assert_eq!(entries[1].1, b"n", "{format}: what follows");
        // Holes are known before they are read.
        let mut reader = TarReader::new(&bytes[..]);
        reader.next_entry().unwrap();
        assert_eq!(reader.hole(), 1000, "{format}");
        reader.skip_hole(999);
        let mut some = [9; 5];
        reader.read_file(&mut some).unwrap();
        assert_eq!(some, *b"\0abc\0");
        assert_eq!(reader.hole(), 3996, "{format}");
    }
}

#[test]
fn what_is_no_layer_is_refused_with_its_place() {
    let mut wrong_sum = file("a", b"");
    wrong_sum[0] = b'b';
    let unknown = pax(&[("GNU.sparse.major", b"2"), ("GNU.sparse.minor", b"0")]);
    // (what, bytes, in the message)
    let cases = [
        ("garbage", vec![b'x'; 512], "no tar header"),
        ("wrong checksum", wrong_sum, "checksum"),
        ("cut in a header", file("a", b"")[..100].to_vec(), "ends in the middle"),
        ("cut in a file", file("a", b"abc")[..514].to_vec(), "ends in the middle"),
        ("cut in the padding", file("a", b"abc")[..700].to_vec(), "ends in the middle"),
        ("only an extension", pax(&[("path", b"a")]), "without an entry"),
        ("multi-volume", entry(header(b'M', b"a", 0), b""), "multi-volume"),
        ("unknown type", entry(header(b'Z', b"a", 0), b""), "unknown type"),
        ("unknown sparse format", [unknown, file("a", b"")].concat(), "format 2.0"),
        ("entry behind the end", [vec![0; 512], file("a", b"")].concat(), "behind the end"),
        ("a huge extension", entry(header(b'x', b"a", 1 << 40), b""), "more than 1048576"),
        ("a huge name", entry(header(b'L', b"a", (1 << 20) + 1), b""), "more than 1048576"),
        ("a negative size", [pax(&[("size", b"-5")]), file("a", b"")].concat(), "no number"),
        ("a large owner", [pax(&[("uid", b"4294967296")]), file("a", b"")].concat(), "32 bits"),
    ];
    for (what, bytes, message) in cases {
        let bytes = [file("first", b"1"), bytes].concat();
        let error = read(&bytes).unwrap_err().to_string();
        assert!(error.contains(message), "{what}: {error}");
        assert!(error.contains("byte "), "{what}: {error}");
    }
    // Both ends of an archive are fine, and so is none.
    for end in [0, 512, 1024, 10_240] {
        assert_eq!(read(&[file("a", b"abc"), vec![0; end]].concat()).unwrap().len(), 1, "{end}");
    }
    assert!(read(b"").unwrap().is_empty());
}

proptest! {
    #[test]
    fn any_bytes_are_a_layer_or_an_error(
        flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..12),
        cut in any::<prop::sample::Index>(),
        fix in any::<bool>(),
    ) {
        let mut bytes = [
            pax(&[("SCHILY.xattr.user.a", b"1"), ("GNU.sparse.size", b"5000"),
                  ("GNU.sparse.map", b"0,2,4000,3")]),
            file("s", b"abcde"),
            entry(header(b'L', b"l", 3), b"abc"),
            file("x", b"content"),
            entry(header(b'3', b"dev", 0), b""),
        ].concat();
        for (at, value) in flips {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if fix {
            // Reach behind the checksum.
            for block in bytes.chunks_exact_mut(512) {
                let mut header = ::tar::Header::from_byte_slice(block).clone();
                header.set_cksum();
                block.copy_from_slice(header.as_bytes());
            }
        }
        let cut = cut.index(bytes.len() + 1);
        let mut reader = TarReader::new(&bytes[..cut]);
        // A file may claim any size: read no more of it than a reader would at once.
        let mut buf = [0; 4096];
        while let Ok(Some(_)) = reader.next_entry() {
            if io::Read::read(&mut reader, &mut buf).is_err() {
                break;
            }
        }
    }
}
