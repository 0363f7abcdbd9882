use proptest::prelude::*;

use super::super::test_tar::{Item, Tar, header, record, seal};
use super::*;

/// What the reader makes of a tar: entries with their content, or the error.
fn read(tar: &[u8]) -> std::result::Result<Vec<(Entry, Vec<u8>)>, String> {
    let mut stream = TarStream::new(tar);
    let mut entries = Vec::new();
    loop {
        match stream.next() {
            Ok(Some(entry)) => {
                let mut content = Vec::new();
                stream
                    .content(|bytes| content.extend_from_slice(bytes))
                    .map_err(|e| e.to_string())?;
                entries.push((entry, content));
            }
            Ok(None) => {
                stream.drain().map_err(|e| e.to_string())?;
                return Ok(entries);
            }
            Err(e) => return Err(e.to_string()),
        }
    }
}

fn only(tar: &[u8]) -> (Entry, Vec<u8>) {
    let mut entries = read(tar).unwrap();
    assert_eq!(entries.len(), 1);
    entries.remove(0)
}

#[test]
fn the_fields_of_an_entry() {
    let item = Item {
        mode: 0o104755,
        uid: 1000,
        gid: 1001,
        mtime: 1_600_000_000,
        ..Item::file("./usr//bin/x", b"content")
    };
    let (entry, content) = only(&Tar::of(&[item]));
    assert_eq!(entry.path, b"./usr//bin/x");
    assert_eq!((entry.mode, entry.uid, entry.gid), (0o4755, 1000, 1001));
    assert_eq!((entry.mtime, entry.mtime_nsec), (1_600_000_000, 0));
    assert_eq!((entry.kind, entry.size, content), (EntryKind::File, 7, b"content".to_vec()));

    let device = Item { dev: (0xABC, 0x12345), ..Item::new(b'3', "dev/wide") };
    let (entry, _) = only(&Tar::of(&[device]));
    assert_eq!((entry.kind, entry.rdev), (EntryKind::Char, (0xABC, 0x12345)));
}

#[test]
fn pax_records_are_bytes_and_count_before_the_header() {
    let long = "d/".repeat(200) + "x";
    let value = b"a\nb=\0c\n27 mtime=5\n".to_vec();
    let mut item = Item::file("short", b"1234")
        .pax(b"SCHILY.xattr.user.n=l\n", b"")
        .pax(b"SCHILY.xattr.security.capability", &value)
        .pax(b"mtime", b"1600000001.0010000039")
        .pax(b"uid", b"4294967294")
        .pax(b"comment", b"ignored")
        .pax(b"path", long.as_bytes())
        .pax(b"path", b"later\nwins");
    item.uid = 7;
    let (entry, content) = only(&Tar::of(&[item]));
    assert_eq!(entry.path, b"later\nwins");
    assert_eq!(
        (entry.uid, entry.mtime, entry.mtime_nsec),
        (u32::MAX - 1, 1_600_000_001, 1_000_003)
    );
    assert_eq!(entry.xattrs[&b"security.capability"[..]], value);
    // The name ends at the first `=`, as everybody reads it.
    assert_eq!(entry.xattrs[&b"user.n"[..]], b"l\n=");
    assert_eq!(content, b"1234");
}

#[test]
fn times_before_the_epoch_and_other_fractions() {
    type Time = Option<(i64, u32)>;
    let cases: [(&[u8], Time); 9] = [
        (b"5", Some((5, 0))),
        (b"5.25", Some((5, 250_000_000))),
        (b"-5.25", Some((-6, 750_000_000))),
        (b"-5", Some((-5, 0))),
        (b"-0.5", Some((-1, 500_000_000))),
        (b"1.0000000019", Some((1, 1))),
        (b"", None),
        (b".5", None),
        (b"1e3", None),
    ];
    for (text, want) in cases {
        assert_eq!(seconds(text), want, "{}", text.escape_ascii());
    }
}

#[test]
fn global_records_hold_until_they_are_taken_back() {
    let mut tar = Tar::default();
    let global = [record(b"uid", b"42"), record(b"SCHILY.xattr.user.g", b"1")].concat();
    tar.raw(&header(&Item::new(b'g', "global"), global.len()), &global);
    tar.add(&Item::file("a", b""));
    tar.add(&Item { uid: 3, ..Item::file("b", b"") }.pax(b"uid", b""));
    let entries = read(&tar.finish()).unwrap();
    assert_eq!(entries[0].0.uid, 42);
    assert_eq!(entries[0].0.xattrs[&b"user.g"[..]], b"1");
    assert_eq!(entries[1].0.uid, 3);
}

#[test]
fn long_names_of_gnu_and_ustar_prefixes() {
    let long = "n".repeat(300);
    let mut tar = Tar::default();
    let text = format!("{long}\0");
    tar.raw(&header(&Item::new(b'L', "././@LongLink"), text.len()), text.as_bytes());
    tar.raw(&header(&Item::new(b'K', "././@LongLink"), text.len()), text.as_bytes());
    tar.add(&Item::symlink("cut", "cut"));
    let mut ustar = header(&Item::file("name", b""), 0);
    ustar[345..351].copy_from_slice(b"pre/fi");
    seal(&mut ustar);
    tar.raw(&ustar, b"");
    // GNU headers have other things where ustar has its prefix.
    let mut gnu = ustar;
    gnu[257..265].copy_from_slice(b"ustar  \0");
    seal(&mut gnu);
    tar.raw(&gnu, b"");
    let mut old = ustar;
    old[257..265].fill(0);
    old[156] = 0;
    old[4] = b'/';
    seal(&mut old);
    tar.raw(&old, b"");
    let entries = read(&tar.finish()).unwrap();
    let seen: Vec<_> = entries.iter().map(|(e, _)| (e.path.as_slice(), e.kind)).collect();
    assert_eq!(seen[0], (long.as_bytes(), EntryKind::Symlink));
    assert_eq!(entries[0].0.link, long.as_bytes());
    assert_eq!(seen[1], (&b"pre/fi/name"[..], EntryKind::File));
    assert_eq!(seen[2], (&b"name"[..], EntryKind::File));
    assert_eq!(seen[3], (&b"name/"[..], EntryKind::Dir));
}

#[test]
fn numbers_in_base_256() {
    let mut h = header(&Item::file("x", b""), 0);
    h[108..116].copy_from_slice(&[0x80, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0xFE]);
    h[136..148].copy_from_slice(&[0xFF; 12]);
    seal(&mut h);
    let mut tar = Tar::default();
    tar.raw(&h, b"");
    let (entry, _) = only(&tar.finish());
    assert_eq!((entry.uid, entry.mtime), (0xFFFF_FFFE, -1));
}

/// The same sparse file in its four forms: 5 bytes at 3, 2 at 5000, 6000 in all.
#[test]
fn sparse_files_of_every_form() {
    let mut want = vec![0; 6000];
    want[3..8].copy_from_slice(b"hello");
    want[5000..5002].copy_from_slice(b"!!");
    let stored = b"hello!!";

    let mut old = Tar::default();
    let mut h = header(&Item::file("s", b""), stored.len());
    h[156] = b'S';
    h[257..265].copy_from_slice(b"ustar  \0");
    for (i, number) in [3, 5, 5000, 2].into_iter().enumerate() {
        let at = 386 + 12 * i;
        h[at..at + 11].copy_from_slice(format!("{number:011o}").as_bytes());
    }
    h[483..494].copy_from_slice(format!("{:011o}", 6000).as_bytes());
    seal(&mut h);
    old.raw(&h, stored);

    let pax = |records: &[(&[u8], &[u8])], data: &[u8]| {
        let records: Vec<u8> = records.iter().flat_map(|(k, v)| record(k, v)).collect();
        let mut tar = Tar::default();
        tar.raw(&header(&Item::new(b'x', "pax"), records.len()), &records);
        tar.raw(&header(&Item::file("GNUSparseFile.0/s", b""), data.len()), data);
        tar
    };
    let v00 = pax(
        &[
            (b"path", b"s"),
            (b"GNU.sparse.size", b"6000"),
            (b"GNU.sparse.numblocks", b"2"),
            (b"GNU.sparse.offset", b"3"),
            (b"GNU.sparse.numbytes", b"5"),
            (b"GNU.sparse.offset", b"5000"),
            (b"GNU.sparse.numbytes", b"2"),
        ],
        stored,
    );
    let v01 = pax(
        &[
            (b"GNU.sparse.name", b"s"),
            (b"GNU.sparse.size", b"6000"),
            (b"GNU.sparse.map", b"3,5,5000,2"),
        ],
        stored,
    );
    let mut with_map = b"2\n3\n5\n5000\n2\n".to_vec();
    with_map.resize(512, 0);
    with_map.extend(stored);
    let v10 = pax(
        &[
            (b"GNU.sparse.major", b"1"),
            (b"GNU.sparse.minor", b"0"),
            (b"GNU.sparse.name", b"s"),
            (b"GNU.sparse.realsize", b"6000"),
        ],
        &with_map,
    );
    for (form, tar) in [("old", old), ("0.0", v00), ("0.1", v01), ("1.0", v10)] {
        let (entry, content) = only(&tar.finish());
        assert_eq!((&entry.path[..], entry.size), (&b"s"[..], 6000), "{form}");
        assert!(content == want, "{form}");
    }
}

#[test]
fn tars_that_are_refused() {
    let sound = Tar::of(&[Item::file("a", b"content")]);
    let change = |at: usize, byte: u8| {
        let mut tar = sound.clone();
        tar[at] = byte;
        tar
    };
    let typed = |kind| Tar::of(&[Item { kind, ..Item::file("a", b"") }]);
    let pax = |record: &[u8]| {
        let mut tar = Tar::default();
        tar.raw(&header(&Item::new(b'x', "pax"), record.len()), record);
        tar.add(&Item::file("a", b""));
        tar.finish()
    };
    let sparse = |map: &[u8], size: &[u8]| {
        Tar::of(&[Item::file("a", b"12345")
            .pax(b"GNU.sparse.map", map)
            .pax(b"GNU.sparse.size", size)])
    };
    // (tar, in the message)
    let cases = [
        (sound[..700].to_vec(), "reading the tar at byte 700"),
        (sound[..300].to_vec(), "reading the tar at byte 300"),
        (change(0, b'b'), "wrong header checksum"),
        (change(124, b'9'), "wrong header checksum"),
        (typed(b'V'), "entries of type 'V' make no file"),
        (pax(b"12 a=b\n"), "damaged PAX record"),
        (pax(b"x a=b\n"), "damaged PAX record"),
        (pax(b"6 a=bc"), "damaged PAX record"),
        (pax(&record(b"uid", b"-1")), "uid is not a number"),
        (pax(&record(b"mtime", b"now")), "mtime is not a decimal number"),
        (sparse(b"0,5", b"4"), "not in order or not in the file"),
        (sparse(b"3,2,0,3", b"9"), "not in order"),
        (sparse(b"0,4", b"9"), "sparse map has 4 bytes, the entry 5"),
        (sparse(b"0,5", b"99999999999999"), "at most 17592186044416 are read"),
        ([vec![0; 512], sound.clone()].concat(), "an entry follows a block of zeros"),
    ];
    for (tar, message) in cases {
        let e = read(&tar).expect_err(message);
        assert!(e.contains(message), "{message}: {e}");
    }
    // Without blocks of zeros at its end a tar is complete all the same.
    assert_eq!(read(&sound[..1024]).unwrap().len(), 1);
}

proptest! {
    #[test]
    fn any_bytes_are_a_tar_or_an_error(
        changes in proptest::collection::vec((0usize..4096, any::<u8>()), 0..8)
    ) {
        let mut tar = Tar::of(&[
            Item::file("a", &[7; 700]).pax(b"GNU.sparse.map", b"0,700").pax(b"GNU.sparse.size", b"800"),
            Item::link("b", "a"),
        ]);
        for (at, byte) in changes {
            if let Some(there) = tar.get_mut(at) {
                *there = byte;
            }
            // A checksum that is right lets the other fields be seen.
            for block in tar.as_chunks_mut::<512>().0 {
                if block[257..262] == *b"ustar" {
                    seal(block);
                }
            }
        }
        let _ = read(&tar);
    }
}
