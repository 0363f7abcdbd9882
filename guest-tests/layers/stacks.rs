//! Random stacks of layers: our merge and umoci, which unpacks one entry after the other, agree.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use crate::build_support::{Tree, assert_same, check, describe, read_image};
use crate::{merge, oci_layout, pack};

/// Numbers that repeat for a seed.
struct Random(u64);

impl Random {
    fn next(&mut self, below: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }

    fn pick<'a, T>(&mut self, of: &'a [T]) -> Option<&'a T> {
        if of.is_empty() {
            return None;
        }
        let at = self.next(of.len() as u64);
        of.get(usize::try_from(at).unwrap())
    }
}

/// What a path of the stack is so far: enough to write layers that every program can unpack.
#[derive(Clone, Copy, PartialEq)]
enum Is {
    Dir,
    /// With the number that its content and attributes are made of.
    File(u64),
    Other,
}

#[derive(Default)]
struct Stack {
    paths: BTreeMap<String, Is>,
    serial: u64,
}

impl Stack {
    fn remove(&mut self, path: &str) {
        let below = format!("{path}/");
        self.paths.retain(|other, _| other != path && !other.starts_with(&below));
    }

    fn all(&self, is: impl Fn(Is) -> bool) -> Vec<(String, Is)> {
        self.paths.iter().filter(|(_, i)| is(**i)).map(|(p, i)| (p.clone(), *i)).collect()
    }
}

struct Tar(Vec<u8>);

impl Tar {
    /// An entry; attributes follow from `n`.
    fn add(&mut self, path: &str, kind: u8, n: u64, link: &str, body: &[u8]) {
        let mut header = ::tar::Header::new_ustar();
        header.set_path(path).unwrap();
        header.as_old_mut().linkflag[0] = kind;
        // Linux gives every symbolic link the same mode, whatever a tar says.
        let mode = if kind == b'2' { 0o777 } else { 0o600 + u32::try_from(n % 0o177).unwrap() };
        header.set_mode(mode);
        header.set_uid(n % 5);
        header.set_gid(n % 7);
        header.set_mtime(1_600_000_000 + n);
        header.set_size(body.len() as u64);
        if !link.is_empty() {
            header.set_link_name_literal(link).unwrap();
        }
        if kind == b'3' {
            header.set_device_major(1).unwrap();
            header.set_device_minor(u32::try_from(n % 9).unwrap() + 1).unwrap();
        }
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(body);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
    }
}

fn content(n: u64) -> Vec<u8> {
    let len = usize::try_from(n * 37 % 9000).unwrap();
    (0..len).map(|i| u8::try_from((i as u64 * (n % 11 + 1) / 64 + n % 3) % 256).unwrap()).collect()
}

/// The next layer: first removals, then entries, each of which `stack` learns.
fn layer(stack: &mut Stack, random: &mut Random) -> Vec<u8> {
    let mut tar = Tar(Vec::new());
    if stack.serial == 0 {
        tar.add("./", b'5', 1, "", b"");
    }
    // Directories may be implied only where a lower layer has them.
    for _ in 0..random.next(4) {
        let all = stack.all(|_| true);
        let Some((path, is)) = random.pick(&all) else { break };
        let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
        let slash = if dir.is_empty() { "" } else { "/" };
        if *is == Is::Dir && random.next(3) == 0 {
            tar.add(&format!("{path}/.wh..wh..opq"), b'0', 0, "", b"");
            stack.remove(path);
            stack.paths.insert(path.clone(), Is::Dir);
        } else {
            tar.add(&format!("{dir}{slash}.wh.{name}"), b'0', 0, "", b"");
            stack.remove(path);
        }
    }
    for _ in 0..4 + random.next(10) {
        stack.serial += 1;
        let n = stack.serial;
        let mut dirs: Vec<String> =
            stack.all(|is| is == Is::Dir).into_iter().map(|(path, _)| path + "/").collect();
        dirs.push(String::new());
        let dir = random.pick(&dirs).unwrap().clone();
        let name = char::from(b'a' + u8::try_from(random.next(5)).unwrap());
        let path = format!("{dir}{name}");
        match random.next(10) {
            0..3 => {
                if stack.paths.get(&path) != Some(&Is::Dir) {
                    stack.remove(&path);
                }
                tar.add(&format!("{path}/"), b'5', n, "", b"");
                stack.paths.insert(path, Is::Dir);
            }
            3..6 => {
                tar.add(&path, b'0', n, "", &content(n));
                stack.remove(&path);
                stack.paths.insert(path, Is::File(n));
            }
            6 => {
                tar.add(&path, b'2', n, "some/where", b"");
                stack.remove(&path);
                stack.paths.insert(path, Is::Other);
            }
            7 => {
                tar.add(&path, [b'3', b'6'][usize::try_from(random.next(2)).unwrap()], n, "", b"");
                stack.remove(&path);
                stack.paths.insert(path, Is::Other);
            }
            _ => {
                // A target in this layer or below, with the attributes that it has.
                let files = stack.all(|is| matches!(is, Is::File(_)));
                let Some((target, Is::File(of))) = random.pick(&files) else { continue };
                let inside = target.starts_with(&format!("{path}/"));
                if *target == path || inside {
                    continue;
                }
                tar.add(&path, b'1', *of, target, b"");
                stack.remove(&path);
                stack.paths.insert(path, Is::File(*of));
            }
        }
    }
    tar.0.extend([0; 1024]);
    tar.0
}

#[test]
fn random_stacks_are_what_umoci_unpacks() {
    for seed in 0..24 {
        let dir = tempfile::tempdir().unwrap();
        let (mut stack, mut random) = (Stack::default(), Random(seed * 7919 + 1));
        let tars: Vec<Vec<u8>> =
            (0..2 + random.next(5)).map(|_| layer(&mut stack, &mut random)).collect();
        let layout = dir.path().join("layout");
        oci_layout::write(&layout, &tars);
        let bundle = dir.path().join("bundle");
        oci_layout::unpack(&layout, &bundle);
        let packed: Vec<PathBuf> = (0..)
            .zip(&tars)
            .map(|(i, tar)| {
                let path = dir.path().join(format!("{i}.tar"));
                fs::write(&path, tar).unwrap();
                pack(&path, &dir.path().join("blobs"), &["--chunk-size", "0x1000"])
            })
            .collect();
        let merged = merge(&packed, &dir.path().join("boot"), &[], b"");
        check(&merged);
        let mut got = read_image(&merged);
        let mut want = describe(&bundle.join("rootfs"));
        split_links(&mut got);
        split_links(&mut want);
        let names = |tree: &Tree| -> Vec<String> {
            tree.keys().map(|path| path.escape_ascii().to_string()).collect()
        };
        assert_eq!(names(&got), names(&want), "seed {seed}");
        let own: Vec<String> = stack.paths.keys().map(|path| format!("/{path}")).collect();
        assert_eq!(names(&want)[1..], own, "seed {seed}: what the test itself expects");
        assert_same(&got, &want, &format!("seed {seed}, {} layers", tars.len()));
    }
}

/// RAFS gives everything but files one name; what only tells names of one inode apart goes.
fn split_links(tree: &mut Tree) {
    for (path, entry) in tree {
        if entry.kind != "file" {
            entry.first_name.clone_from(path);
        }
    }
}

/// The order of entries in a layer makes no difference to what it removes.
#[test]
fn removals_may_stand_anywhere_in_a_layer() {
    let dir = tempfile::tempdir().unwrap();
    let mut lower = Tar(Vec::new());
    for (i, path) in (1..).zip(["a/", "a/x", "a/y", "b/", "b/x", "c"]) {
        let kind = if path.ends_with('/') { b'5' } else { b'0' };
        lower.add(path, kind, i, "", if kind == b'0' { b"lower" } else { b"" });
    }
    let entries: [(&str, u8); 6] = [
        (".wh.c", b'0'),
        ("c", b'0'),
        ("a/", b'5'),
        ("a/.wh..wh..opq", b'0'),
        ("a/x", b'0'),
        ("b/.wh.x", b'0'),
    ];
    let lower_path = dir.path().join("lower.tar");
    fs::write(&lower_path, &lower.0).unwrap();
    let blobs = dir.path().join("blobs");
    let lower = pack(&lower_path, &blobs, &[]);
    let mut first: Option<Tree> = None;
    for turn in 0..entries.len() {
        let mut upper = Tar(Vec::new());
        let mut order = entries;
        order.rotate_left(turn);
        if turn % 2 == 1 {
            order.reverse();
        }
        for (path, kind) in order {
            upper.add(path, kind, 9, "", b"");
        }
        let path = dir.path().join("upper.tar");
        fs::write(&path, &upper.0).unwrap();
        let layers = [lower.clone(), pack(&path, &blobs, &[])];
        let tree = read_image(&merge(&layers, &dir.path().join("boot"), &[], b""));
        let names: Vec<_> = tree.keys().map(|path| String::from_utf8_lossy(path)).collect();
        assert_eq!(names, ["/", "/a", "/a/x", "/b", "/c"], "turn {turn}");
        assert_same(&tree, first.get_or_insert_with(|| tree.clone()), "another order");
    }
}

#[test]
fn hard_links_across_layers_are_one_file() {
    let dir = tempfile::tempdir().unwrap();
    let blobs = dir.path().join("blobs");
    let make = |name: &str, fill: &dyn Fn(&mut Tar)| {
        let mut tar = Tar(Vec::new());
        fill(&mut tar);
        let path = dir.path().join(name);
        fs::write(&path, &tar.0).unwrap();
        pack(&path, &blobs, &[])
    };
    let layers = [
        make("one", &|tar| tar.add("lib/libc.so", b'0', 3, "", b"the library")),
        // Linked, then replaced: the link keeps the lower file.
        make("two", &|tar| {
            tar.add("lib/libc.so.6", b'1', 3, "lib/libc.so", b"");
            tar.add("later", b'1', 4, "target", b"");
            tar.add("target", b'0', 4, "", b"came later");
        }),
        make("three", &|tar| {
            tar.add("bin/moved", b'1', 3, "/lib/libc.so.6", b"");
            tar.add("lib/.wh.libc.so", b'0', 0, "", b"");
        }),
    ];
    let merged = merge(&layers, &dir.path().join("boot"), &[], b"");
    check(&merged);
    let tree = read_image(&merged);
    let of = |path: &str| &tree[path.as_bytes()];
    assert_eq!(of("/lib/libc.so.6").nlink, 2);
    assert_eq!(of("/lib/libc.so.6").first_name, of("/bin/moved").first_name);
    assert_eq!(of("/later").first_name, of("/target").first_name);
    assert!(!tree.contains_key(&b"/lib/libc.so"[..]));
    // A layer alone cannot say what its link is.
    let unpack = crate::build_support::rafs(
        &["unpack", "-B", layers[2].to_str().unwrap(), "-o", "/dev/null"],
        b"",
    );
    let stderr = String::from_utf8_lossy(&unpack.stderr).into_owned();
    assert!(stderr.contains("merge the layers first"), "{stderr}");
}
