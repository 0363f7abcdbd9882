//! DAX with a VMM of our own, which maps what it is told to and keeps a record: policy `shared` where it
//! takes descriptors that are open for reading only, what happens where it does not, guests and VMMs
//! that do what they should not. `guest_dax` has the real ones.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is how a test fails")]

mod support;

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;

use support::daemon::{Daemon, Launch};
use support::frontend::{Vm, VmConfig};
use support::fuse_abi::{ROOT_ID, init, op};
use support::fuse_client::{Fuse, setup_mapping};
use support::image::{Image, create, pattern};
use support::virtqueue::{Segment, Virtqueue};
use support::window::{Event, Takes, Window};
use support::{assert_same, to_usize};

const RANGE: u64 = 2 << 20;
/// `FUSE_ATTR_DAX`.
const ATTR_DAX: u32 = 2;
const DAX_GUEST: u64 = init::LINUX_7 | init::MAP_ALIGNMENT | init::HAS_INODE_DAX;
const LIMIT: Duration = Duration::from_secs(30);

/// Files of so many bytes in chunks of 64 KiB: contiguous in the cache file.
fn image(files: usize, size: u64) -> (tempfile::TempDir, Image) {
    let scratch = tempfile::tempdir().unwrap();
    let image = Image::build(scratch.path(), files, size, 64 << 10, "none").unwrap();
    (scratch, image)
}

fn dax(launch: Launch, flags: &str) -> Launch {
    flags.split_whitespace().fold(launch, |launch, flag| launch.arg(flag))
}

/// A guest with a window, whose INIT has been answered.
struct Guest {
    vm: Vm,
    fuse: Fuse,
    window: Arc<Window>,
    /// `InitOut::flags` and `flags2`.
    agreed: u64,
    nodes: Vec<u64>,
}

impl Guest {
    fn boot(daemon: &Daemon, image: &Image, takes: Takes) -> Guest {
        let config = VmConfig { window: Some(takes), ..VmConfig::default() };
        Guest::boot_with(daemon, image, config)
    }

    fn boot_with(daemon: &Daemon, image: &Image, config: VmConfig) -> Guest {
        let mut vm = daemon.boot(config).unwrap();
        let mut fuse = vm.fuse(1);
        let window = Arc::clone(vm.window().expect("the daemon offers one"));
        let agreed = begin(&mut fuse);
        let nodes = image.nodes(&mut fuse).unwrap();
        Guest { vm, fuse, window, agreed, nodes }
    }

    fn is_dax(&mut self, node: u64) -> bool {
        self.fuse.getattr(node).unwrap().flags & ATTR_DAX != 0
    }

    /// Maps all of a file to the window, from `moffset` on, and compares what is there.
    #[track_caller]
    fn check_file(&mut self, number: usize, size: u64, moffset: u64) {
        for range in 0..size.div_ceil(RANGE) {
            let (from, to) = (range * RANGE, moffset + range * RANGE);
            self.fuse.map(self.nodes[number], from, to).unwrap();
            let len = to_usize((size - from).min(RANGE));
            let want = pattern(number, from, len);
            assert_same(&self.window.read(to, len), &want, format!("file {number} from {from}"));
        }
    }
}

/// INIT as a guest with a window sends it; returns the flags that were agreed on.
fn begin(fuse: &mut Fuse) -> u64 {
    let out = fuse.init_with(DAX_GUEST).unwrap();
    u64::from(out.flags2) << 32 | u64::from(out.flags)
}

#[test]
fn two_guests_share_the_pages_of_the_cache() {
    let size = 5 * RANGE + 12_345;
    let (scratch, image) = image(2, size);
    let flags = "--dax shared --dax-window 32M";
    let launches = ["a", "b"].map(|name| dax(image.launch(scratch.path()).named(name), flags));
    let daemons = launches.map(|launch| launch.spawn().unwrap());
    let mut guests = daemons.each_ref().map(|daemon| Guest::boot(daemon, &image, Takes::ReadOnly));
    for guest in &mut guests {
        assert_eq!(guest.agreed & init::HAS_INODE_DAX, init::HAS_INODE_DAX);
        assert!(guest.is_dax(guest.nodes[0]) && !guest.is_dax(ROOT_ID));
        assert_eq!(
            guest.window.events(),
            [Event::Map(0, 4096, true), Event::Unmap(0, 4096)],
            "whether the VMM maps read-only is tried out"
        );
        guest.check_file(0, size, 0);
        guest.check_file(1, size, 8 * RANGE);
        let maps = guest.window.events();
        assert_eq!(maps.len(), 12, "one for each range: {maps:?}");
        let whole = |i: u64| Event::Map(i * RANGE, RANGE, true);
        assert_eq!(maps[..5], [0, 1, 2, 3, 4].map(whole));
        assert_eq!(maps[5], Event::Map(5 * RANGE, 4 * 4096, true), "the end, in whole pages");
    }
    // All pages of the first file are in the page table of both "guests", which are this process.
    let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
    for guest in &guests {
        let [rss, pss] = ["Rss:", "Pss:"].map(|key| memory_at(&smaps, guest.window.addr(), key));
        assert_eq!(rss, 5 * RANGE / 1024 + 16, "KiB of the first file are resident");
        assert!(pss * 2 <= rss + 64, "each page is there once for both: {pss} of {rss} KiB");
    }
}

/// The sum of a field of /proc/PID/smaps, in KiB, over the mappings of the first eight ranges.
fn memory_at(smaps: &str, addr: usize, key: &str) -> u64 {
    let (mut inside, mut sum) = (false, 0);
    for line in smaps.lines() {
        let first = line.split(' ').next().unwrap();
        if let Some((start, _)) = first.split_once('-')
            && let Ok(start) = usize::from_str_radix(start, 16)
        {
            inside = (addr..addr + to_usize(8 * RANGE)).contains(&start);
        } else if inside && first == key {
            sum += line[key.len()..].trim().trim_end_matches(" kB").parse::<u64>().unwrap();
        }
    }
    sum
}

#[test]
fn a_vmm_that_maps_only_for_writing_gets_no_cache_file() {
    let (scratch, image) = image(1, 3 * RANGE);
    for (name, fallback) in [("read", false), ("private", true)] {
        let launch = image.launch(scratch.path()).named(name);
        let flags = format!("--dax shared --dax-window 16M --dax-fallback {name}");
        let daemon = dax(launch, &flags).spawn().unwrap();
        let mut guest = Guest::boot(&daemon, &image, Takes::OnlyWritable);
        assert_eq!(guest.agreed & init::HAS_INODE_DAX != 0, fallback);
        assert_eq!(guest.is_dax(guest.nodes[0]), fallback);
        let mut events = guest.window.events();
        assert_eq!(events.remove(0), Event::RefusedMap(0, 4096));
        if fallback {
            assert_eq!(events, [Event::Map(0, 16 << 20, false)], "the guest's own memory");
            guest.check_file(0, 3 * RANGE, RANGE);
            assert_eq!(guest.window.events(), [], "nothing needs to be asked any more");
        } else {
            let errno = guest.fuse.map(guest.nodes[0], 0, 0).unwrap_err().errno();
            assert_eq!((events.len(), errno), (0, Some(libc::EIO)));
            image.check_all(&mut guest.fuse).unwrap();
        }
        begin(&mut guest.fuse);
        daemon.expect_log("does not map files read-only");
        let log = daemon.log();
        assert_eq!(log.matches("does not map files read-only").count(), 1, "{log}");
    }
}

#[test]
fn a_range_is_emptied_before_it_is_used_again() {
    let size = 2 * RANGE;
    let (scratch, image) = image(2, size);
    for policy in ["shared", "private"] {
        let launch = image.launch(scratch.path()).named(policy);
        let flags = format!("--dax {policy} --dax-window 16M");
        let daemon = dax(launch, &flags).spawn().unwrap();
        let mut guest = Guest::boot(&daemon, &image, Takes::ReadOnly);
        guest.window.events();
        let [one, two] = [guest.nodes[0], guest.nodes[1]];
        guest.fuse.map(one, 0, RANGE).unwrap();
        guest.fuse.map(two, RANGE, RANGE).unwrap();
        let got = guest.window.read(RANGE, to_usize(RANGE));
        assert_same(&got, &pattern(1, RANGE, to_usize(RANGE)), policy);
        guest.fuse.unmap(&[(RANGE, RANGE), (3 * RANGE, RANGE)]).unwrap();
        guest.fuse.unmap(&[]).unwrap();
        let (map, unmap) = (Event::Map(RANGE, RANGE, true), Event::Unmap(RANGE, RANGE));
        if policy == "shared" {
            assert_eq!(guest.window.events(), [map, unmap, map, unmap]);
        } else {
            assert_eq!(guest.window.events(), []);
            let zeros = vec![0; to_usize(RANGE)];
            assert_same(&guest.window.read(RANGE, zeros.len()), &zeros, "its memory is free");
        }
        // A new session of the same guest, and its end: nothing is left over.
        guest.check_file(0, size, 0);
        begin(&mut guest.fuse);
        let own: &[_] = if policy == "shared" { &[] } else { &[(0, 16 << 20)] };
        assert_eq!(guest.window.live(), own, "{policy}");
        guest.check_file(1, size, 2 * RANGE);
        guest.fuse.destroy().unwrap();
        assert_eq!(guest.window.live(), [], "{policy}: before the answer to DESTROY");
    }
}

#[test]
fn what_a_guest_may_not_ask() {
    let (scratch, image) = image(1, RANGE + 100);
    let daemon =
        dax(image.launch(scratch.path()), "--dax shared --dax-window 16M").spawn().unwrap();
    let mut guest = Guest::boot(&daemon, &image, Takes::ReadOnly);
    guest.window.events();
    let file = guest.nodes[0];
    let window = guest.window.size();
    // (node, place in the file, length, flags, place in the window, errno)
    let cases = [
        (file, 0, RANGE, 3, 0, libc::EROFS),
        (file, 0, RANGE, 1, 0, libc::EROFS),
        (file, 0, 0, 2, 0, libc::EINVAL),
        (file, 0, RANGE + 1, 2, 0, libc::EINVAL),
        (file, 0, u64::MAX, 2, 0, libc::EINVAL),
        (file, 1, RANGE, 2, 0, libc::EINVAL),
        (file, 0, RANGE, 2, 4096, libc::EINVAL),
        (file, 0, RANGE, 2, window, libc::EINVAL),
        (file, 0, RANGE, 2, u64::MAX - RANGE + 1, libc::EINVAL),
        (file, u64::MAX - 4095, RANGE, 2, 0, libc::EINVAL),
        (ROOT_ID, 0, RANGE, 2, 0, libc::EISDIR),
        (file + 1, 0, RANGE, 2, 0, libc::ESTALE),
    ];
    for (node, foffset, len, flags, moffset, errno) in cases {
        let body = setup_mapping(foffset, len, flags, moffset);
        let got = guest.fuse.call(op::SETUPMAPPING, node, &[&body], 0);
        let got = got.err().and_then(|e| e.errno());
        assert_eq!(got, Some(errno), "{node} {foffset} {len} {flags} {moffset}");
    }
    let many = vec![(0, RANGE); 9];
    for ranges in [&[(4096, RANGE)][..], &[(window, RANGE)], &[(0, u64::MAX)], &many] {
        let got = guest.fuse.unmap(ranges).err().and_then(|e| e.errno());
        assert_eq!(got, Some(libc::EINVAL), "{ranges:?}");
    }
    let short = guest.fuse.call(op::REMOVEMAPPING, 1, &[&2u32.to_ne_bytes(), &[0; 16]], 0);
    assert_eq!(short.err().and_then(|e| e.errno()), Some(libc::EINVAL));
    assert_eq!(guest.window.events(), [], "nothing of this reaches the VMM");
    guest.fuse.map(file, 1 << 40, 0).unwrap();
    assert_eq!(guest.window.events(), [], "behind the end there is nothing");
    guest.check_file(0, RANGE + 100, 0);
}

/// A VMM that has stopped the device is asked nothing, and the request is answered when it goes on.
#[test]
fn a_stopped_vmm_is_asked_nothing() {
    let (scratch, image) = image(1, 4 * RANGE);
    let daemon =
        dax(image.launch(scratch.path()), "--dax shared --dax-window 16M").spawn().unwrap();
    let mut guest = Guest::boot(&daemon, &image, Takes::ReadOnly);
    guest.window.events();
    // The first is being asked for when the VMM stops, the others wait behind it.
    guest.window.be_silent(true);
    let tickets: Vec<_> = (0..4)
        .map(|i| {
            let body = setup_mapping(i * RANGE, RANGE, 2, i * RANGE);
            guest.fuse.submit(op::SETUPMAPPING, guest.nodes[0], &[&body], 0).unwrap()
        })
        .collect();
    guest.fuse.flush();
    assert!(guest.window.wait_for_events(1, LIMIT), "the mapper asks");
    guest.vm.stop().unwrap();
    guest.window.be_silent(false);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(guest.window.live().len(), 1, "of what was asked before the stop");
    guest.vm.cont().unwrap();
    for ticket in tickets {
        guest.fuse.wait(ticket, LIMIT).unwrap().result().unwrap();
    }
    assert_eq!(guest.window.live().len(), 4);
    guest.check_file(0, 4 * RANGE, 0);
}

/// Ending a connection waits for no answer, and the next VMM is served.
#[test]
fn a_vmm_that_does_not_answer_holds_up_nobody() {
    let (scratch, image) = image(1, RANGE);
    let daemon =
        dax(image.launch(scratch.path()), "--dax shared --dax-window 16M").spawn().unwrap();
    let mut guest = Guest::boot(&daemon, &image, Takes::ReadOnly);
    guest.window.be_silent(true);
    let body = setup_mapping(0, RANGE, 2, 0);
    guest.fuse.submit(op::SETUPMAPPING, guest.nodes[0], &[&body], 0).unwrap();
    guest.fuse.flush();
    assert!(guest.window.wait_for_events(3, LIMIT));
    image.check_all(&mut guest.fuse).expect("the queue goes on");
    let silent = Arc::clone(&guest.window);
    drop(guest);
    let begin = Instant::now();
    let mut next = Guest::boot(&daemon, &image, Takes::ReadOnly);
    assert!(begin.elapsed() < LIMIT);
    next.check_file(0, RANGE, 0);
    silent.be_silent(false);
}

/// An image of two files: one of four ranges, and one whose single range is made of every second chunk
/// of the first half.
fn in_many_pieces(dir: &std::path::Path) -> (Image, Vec<u8>) {
    let (tree, blobs, bootstrap) = (dir.join("tree"), dir.join("blobs"), dir.join("bootstrap"));
    fs::create_dir(&tree).unwrap();
    fs::create_dir(&blobs).unwrap();
    let chunk = 64 << 10;
    let first = pattern(0, 0, to_usize(4 * RANGE));
    let second: Vec<u8> = first.chunks(chunk).step_by(2).take(32).flatten().copied().collect();
    assert_eq!(second.len() as u64, RANGE);
    fs::write(tree.join("f0000"), &first).unwrap();
    fs::write(tree.join("f0001"), &second).unwrap();
    let arguments = [
        "--chunk-size".as_ref(),
        "0x10000".as_ref(),
        "--bootstrap".as_ref(),
        bootstrap.as_os_str(),
        "--blob-dir".as_ref(),
        blobs.as_os_str(),
        tree.as_os_str(),
    ];
    create(&arguments).unwrap();
    let image = Image { bootstrap, blobs, files: 2, file_size: RANGE, chunk_size: chunk as u64 };
    (image, second)
}

/// QEMU ends at 512 mappings. A range that would take too many of them is copied, and is one.
#[test]
fn mappings_never_run_out() {
    let scratch = tempfile::tempdir().unwrap();
    let (image, pieces) = in_many_pieces(scratch.path());
    let daemon =
        dax(image.launch(scratch.path()), "--dax shared --dax-window 512M").spawn().unwrap();
    let mut guest = Guest::boot(&daemon, &image, Takes::ReadOnly);
    let [whole, pieced] = [guest.nodes[0], guest.nodes[1]];
    assert!(guest.is_dax(whole) && !guest.is_dax(pieced), "many pieces are better read");
    let ranges = guest.window.size() / RANGE;
    guest.window.events();
    let mut mapped = Vec::new();
    for range in 0..20 {
        guest.fuse.map(pieced, 0, range * RANGE).unwrap();
        assert_same(&guest.window.read(range * RANGE, pieces.len()), &pieces, range);
        let events = guest.window.events();
        assert!(events.iter().all(|event| matches!(event, Event::Map(_, _, true))), "{events:?}");
        mapped.push(events.len());
    }
    // 480 in all, of which one for each of the 256 ranges.
    assert_eq!(mapped[..8], [32, 32, 32, 32, 32, 32, 32, 1]);
    assert!(mapped[8..].iter().all(|&count| count == 1), "{mapped:?}");
    for range in 20..ranges {
        guest.fuse.map(whole, range % 4 * RANGE, range * RANGE).unwrap();
    }
    assert_eq!(guest.window.live().len() as u64, 7 * 32 + ranges - 7);
    // What a range gives back another may have.
    guest.fuse.unmap(&[(0, RANGE)]).unwrap();
    guest.window.events();
    guest.fuse.map(pieced, 0, 19 * RANGE).unwrap();
    assert_eq!(guest.window.events().len(), 1 + 32, "the copy's end, and its pieces");
    assert_same(&guest.window.read(19 * RANGE, pieces.len()), &pieces, "mapped in place of copied");
    for range in 20..ranges {
        let want = pattern(0, range % 4 * RANGE, to_usize(RANGE));
        assert_same(&guest.window.read(range * RANGE, want.len()), &want, range);
    }
    assert!(guest.window.live().len() <= 480);
    guest.fuse.destroy().unwrap();
    assert_eq!(guest.window.live(), []);
}

/// A READ of `len` bytes to any address of guest memory, by hand. The length of the answer.
fn read_to(guest: &mut Guest, queue: &mut Virtqueue, node: u64, to: u64, len: u32) -> u32 {
    let request = guest.vm.memory.alloc(80);
    let mut bytes = vec![0; 80];
    bytes[..4].copy_from_slice(&80u32.to_le_bytes());
    bytes[4..8].copy_from_slice(&op::READ.to_le_bytes());
    bytes[8..16].copy_from_slice(&77u64.to_le_bytes());
    bytes[16..24].copy_from_slice(&node.to_le_bytes());
    bytes[56..60].copy_from_slice(&len.to_le_bytes());
    request.write(0, &bytes);
    let header = guest.vm.memory.alloc(16);
    let segment = |addr, len, writable| Segment { addr, len, writable };
    let chain = [
        segment(request.addr(), 80, false),
        segment(header.addr(), 16, true),
        segment(to, len, true),
    ];
    queue.add(&chain).unwrap();
    queue.flush();
    assert!(queue.wait(Instant::now() + LIMIT), "the chain comes back");
    queue.pop().unwrap().len
}

/// QEMU shows all that is mapped as guest memory: a guest may have a read put where the window is.
#[test]
fn a_read_into_the_window() {
    const PLACE: u64 = 1 << 40;
    let (scratch, image) = image(1, 2 * RANGE);
    for policy in ["private", "shared"] {
        let launch = image.launch(scratch.path()).named(policy);
        let daemon = dax(launch, &format!("--dax {policy} --dax-window 16M")).spawn().unwrap();
        let config =
            VmConfig { window: Some(Takes::ReadOnly), request_queues: 2, ..VmConfig::default() };
        let mut guest = Guest::boot_with(&daemon, &image, config);
        let mut queue = guest.vm.take_queue(2);
        let node = guest.nodes[0];
        guest.fuse.map(node, RANGE, RANGE).unwrap();
        let before = guest.window.read(RANGE, to_usize(RANGE));
        guest.vm.show_window(PLACE).unwrap();
        let len = read_to(&mut guest, &mut queue, node, PLACE + RANGE + 8192, 65_536);
        let after = guest.window.read(RANGE, to_usize(RANGE));
        if policy == "private" {
            assert_eq!(len, 16 + 65_536);
            assert_same(&after[8192..8192 + 65_536], &pattern(0, 0, 65_536), "what was read");
            assert_same(&after[8192 + 65_536..], &before[8192 + 65_536..], "what is behind it");
        } else {
            assert!(len <= 16, "an answer of {len} bytes, to what is for reading only");
            assert_same(&after, &before, "the cache");
        }
        // The queue goes on, and so does the window.
        let buffer = guest.vm.memory.alloc(4096);
        assert_eq!(read_to(&mut guest, &mut queue, node, buffer.addr(), 4096), 16 + 4096);
        assert_same(&buffer.to_vec(0, 4096), &pattern(0, 0, 4096), policy);
        guest.check_file(0, 2 * RANGE, 2 * RANGE);
    }
}

/// QEMU 11.1.3 ends when it has memory slots and a guest with a writable mapping is reset.
#[test]
fn memory_slots_are_not_offered_with_a_writable_mapping() {
    let (scratch, image) = image(1, RANGE);
    let cases = [
        ("--dax off", true),
        ("--dax private", false),
        ("--dax shared", true),
        ("--dax shared --dax-fallback private", false),
    ];
    for (number, (flags, offered)) in cases.into_iter().enumerate() {
        let launch = image.launch(scratch.path()).named(&number.to_string());
        let daemon = dax(launch, flags).spawn().unwrap();
        let vm = daemon.boot(VmConfig::default()).unwrap();
        assert_eq!(vm.protocol.contains(Protocol::CONFIGURE_MEM_SLOTS), offered, "{flags}");
    }
}

#[test]
fn a_guest_without_a_window_reads() {
    let (scratch, image) = image(1, RANGE);
    let daemon = dax(image.launch(scratch.path()), "--dax private").spawn().unwrap();
    let mut vm = daemon.boot(VmConfig::default()).unwrap();
    let mut fuse = vm.fuse(1);
    let out = fuse.init().unwrap();
    assert_eq!((out.flags2 & 2, out.map_alignment), (0, 0));
    image.check_all(&mut fuse).unwrap();
    let node = image.nodes(&mut fuse).unwrap()[0];
    assert_eq!(fuse.getattr(node).unwrap().flags & ATTR_DAX, 0);
    assert!(fuse.map(node, 0, 0).is_err());
    daemon.expect_log("no window, files are read");
}
