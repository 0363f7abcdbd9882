//! Listings that stop and go on anywhere.

use super::guest::{Guest, Listed, bootstrap, metadata, path};
use rafsd::rafs::Bootstrap;

/// The worked example with a root of `count` names, all of one empty file.
pub fn large_directory(count: usize) -> Bootstrap {
    let mut image = std::fs::read(path("v6-none").join("bootstrap")).unwrap();
    let file = {
        let image = Bootstrap::from_bytes(image.clone()).unwrap();
        let root = image.inode(image.root()).unwrap().dir().unwrap();
        root.lookup(b"empty").unwrap().unwrap().nid.0
    };
    let mut entries = vec![(b".".to_vec(), 128, 2), (b"..".to_vec(), 128, 2)];
    entries.extend((0..count).map(|n| (format!("name-{n:06}").into_bytes(), file, 1)));
    let mut data: Vec<u8> = vec![];
    let mut last_len = 0;
    while !entries.is_empty() {
        let mut used = 0;
        let fits = |(name, ..): &&(Vec<u8>, u64, u8)| {
            used += 12 + name.len();
            used <= 4096
        };
        let here = entries.iter().take_while(fits).count();
        let mut offset = 12 * here;
        let block = data.len();
        for (name, nid, kind) in &entries[..here] {
            data.extend(nid.to_le_bytes());
            data.extend(u16::try_from(offset).unwrap().to_le_bytes());
            data.extend([*kind, 0]);
            offset += name.len();
        }
        data.extend(entries.drain(..here).flat_map(|(name, ..)| name));
        last_len = data.len() - block;
        data.resize(block + 4096, 0);
    }
    // The root inode, at 0x3000: plain layout, its size, its first block.
    let size = data.len() - 4096 + last_len;
    image[0x3000] = 1;
    image[0x3008..0x3010].copy_from_slice(&u64::try_from(size).unwrap().to_le_bytes());
    let start = u32::try_from(image.len() / 4096).unwrap();
    image[0x3010..0x3014].copy_from_slice(&start.to_le_bytes());
    image.extend(data);
    Bootstrap::from_bytes(image).unwrap()
}

fn names(listed: &[Listed]) -> Vec<&[u8]> {
    listed.iter().map(|entry| &entry.name[..]).collect()
}

#[test]
fn a_listing_goes_on_behind_every_entry_of_65000() {
    let guest = Guest::mount(metadata(large_directory(65_000)));
    let all = guest.list_all(1, 131_072, false);
    assert_eq!(all.len(), 65_002);
    assert_eq!((&all[0].name[..], &all[1].name[..]), (&b"."[..], &b".."[..]));
    assert_eq!(all[65_001].name, b"name-064999");
    assert!(all.windows(2).all(|two| two[0].off < two[1].off), "cookies grow");
    for (i, entry) in all.iter().enumerate() {
        // Two records of 24 + 11 bytes, rounded up to 8.
        let next = guest.list(1, entry.off, 80, false).unwrap();
        assert_eq!(names(&next), names(&all[all.len().min(i + 1)..all.len().min(i + 3)]), "{i}");
    }
    let plus = guest.list_all(1, 131_072, true);
    assert_eq!(names(&plus), names(&all));
    assert!(plus.iter().zip(&all).all(|(a, b)| a.off == b.off && a.ino == b.ino));
    assert!(plus[2..].iter().all(|entry| entry.entry.unwrap().nodeid == 1 << 40 | entry.ino));
}

#[test]
fn a_listing_fills_its_buffer() {
    let guest = Guest::mount(metadata(large_directory(3000)));
    // Records have 24 + 11 and 152 + 11 bytes, rounded up to 8.
    for (plus, dot, record) in [(false, 32, 40), (true, 160, 168)] {
        for size in [4096_u32, 32_768, 65_536] {
            let got = guest.list(1, 0, size, plus).unwrap();
            let room = usize::try_from(size).unwrap();
            assert_eq!(got.len(), (2 + (room - 2 * dot) / record).min(3002), "{size} {plus}");
        }
    }
}

#[test]
fn a_buffer_without_room_for_one_entry_is_not_the_end() {
    let guest = Guest::mount(metadata(large_directory(10)));
    // (plus, size): a record of `.` takes 32 or 160 bytes
    for (plus, size) in [(false, 0), (false, 31), (true, 0), (true, 159)] {
        assert_eq!(guest.list(1, 0, size, plus).unwrap_err(), libc::EINVAL, "{plus} {size}");
    }
    assert_eq!(guest.list(1, 0, 32, false).unwrap().len(), 1);
    assert_eq!(guest.list(1, 0, 160, true).unwrap().len(), 1);
    let end = guest.list_all(1, 4096, false).last().unwrap().off;
    assert_eq!(guest.list(1, end, 0, false).unwrap(), [], "at the end nothing needs room");
}

#[test]
fn any_cookie_is_a_place_or_the_end() {
    let guest = Guest::mount(metadata(bootstrap("v6-zstd")));
    let dir = guest.at(b"/bigdir");
    for cookie in (0..20_000).chain((0..64).map(|bit| u64::MAX << bit)) {
        for plus in [false, true] {
            guest.list(dir, cookie, 512, plus).unwrap();
        }
    }
    assert_eq!(guest.list(guest.at(b"/bigdir/e000000000"), 0, 4096, false), Err(libc::ENOTDIR));
}
