//! Images for tests: golden ones that nydus-image made, as OCI layouts, and their sources as tars
//! written here, from the description of their trees in `golden/README.md`.

use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use super::test_tar::{Item, Tar};
use crate::oci::layout::Layout;
use crate::oci::manifest::{
    Descriptor, Manifest, OCI_CONFIG, OCI_LAYER, OCI_LAYER_GZIP, OCI_MANIFEST,
};
use crate::rafs::Bootstrap;
use crate::rafs::layout::{BLOCK_SIZE, BlobFeatures};
use crate::rafs::toc::{PackedBlob, SectionKind};

const T0: u64 = 1_600_000_000;

pub(super) fn golden(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("guest-tests/golden").join(case)
}

/// Text that lives as long as the test.
fn text(text: String) -> &'static str {
    Box::leak(text.into_boxed_str())
}

fn bytes(bytes: Vec<u8>) -> &'static [u8] {
    Box::leak(bytes.into_boxed_slice())
}

/// Bytes that do not compress.
fn random(seed: &str, len: usize) -> Vec<u8> {
    let blocks = (0..).flat_map(|i| Sha256::digest(format!("{seed}/{i}")).to_vec());
    blocks.take(len).collect()
}

/// Bytes that do.
fn lines(seed: &str, len: usize) -> Vec<u8> {
    let line = |i| format!("{seed} line {i:06}: the quick brown fox jumps over the lazy dog\n");
    (0..).flat_map(|i| line(i).into_bytes()).take(len).collect()
}

/// Entries of a tar, each a second later than the one before.
struct Tree(Vec<Item<'static>>, u64);

impl Tree {
    fn new() -> Tree {
        Tree(vec![Item { mtime: T0, ..Item::dir("./") }], 0)
    }

    fn add(&mut self, item: Item<'static>) -> &mut Item<'static> {
        self.1 += 1;
        self.0.push(Item { mtime: T0 + self.1, ..item });
        self.0.last_mut().unwrap()
    }

    fn file(&mut self, path: &'static str, data: impl Into<Vec<u8>>) -> &mut Item<'static> {
        self.add(Item::file(path, bytes(data.into())))
    }

    fn dir(&mut self, path: &'static str) -> &mut Item<'static> {
        self.add(Item::dir(path))
    }

    fn symlink(&mut self, path: &'static str, to: &'static str) {
        self.add(Item::symlink(path, to));
    }

    fn link(&mut self, path: &'static str, to: &'static str) {
        self.0.push(Item::link(path, to));
    }

    fn node(&mut self, kind: u8, path: &'static str, dev: (u32, u32), mode: u32) {
        self.add(Item { dev, mode, ..Item::new(kind, path) });
    }
}

fn xattr(item: &mut Item<'static>, name: &'static str, value: &[u8]) {
    item.pax.push((bytes(format!("SCHILY.xattr.{name}").into_bytes()), value.to_vec()));
}

/// The two layers of `v6-merged`.
pub(super) fn lower_and_upper() -> [Vec<Item<'static>>; 2] {
    let mut t = Tree::new();
    t.dir("keep");
    t.file("keep/a", "lower a");
    t.file("keep/b", lines("kb", 17000));
    t.dir("gone");
    t.file("gone/x", "x");
    t.dir("gone/sub");
    t.file("gone/sub/y", "y");
    t.dir("opaque");
    t.file("opaque/old1", "old1");
    t.file("opaque/same", "old same");
    t.dir("opaque/olddir");
    t.file("opaque/olddir/z", "z");
    t.file("remove-me", random("rm", 5000));
    t.file("replace", "lower replace");
    t.dir("dir2file");
    t.file("dir2file/inside", "i");
    t.file("file2dir", "was a file");
    t.file("shared", lines("shared", 20000));
    t.dir("meta");
    t.file("meta/f", "m");
    t.file("hl1", lines("hl", 6000));
    t.link("hl2", "hl1");
    t.symlink("sym", "keep/a");
    t.symlink("symdir", "keep");
    let lower = t.0;

    let mut t = Tree::new();
    t.dir("keep");
    t.file("keep/c", "upper c");
    t.file("keep/.wh.a", "");
    t.file(".wh.gone", "");
    t.file(".wh.remove-me", "");
    t.file(".wh.not-there", "");
    t.dir("opaque");
    t.file("opaque/.wh..wh..opq", "");
    t.file("opaque/same", "new same");
    t.file("opaque/new", "new");
    t.file("replace", "upper replace, longer");
    t.file("dir2file", "now a file");
    t.dir("file2dir");
    t.file("file2dir/in", "now a dir");
    t.file("shared-copy", lines("shared", 20000));
    t.file("shared-part", [lines("shared", 16384), b"other tail".to_vec()].concat());
    let meta = t.dir("meta");
    (meta.mode, meta.uid, meta.gid) = (0o711, 7, 8);
    xattr(meta, "user.up", b"1");
    t.file("hl1", "the upper replaces only this name");
    t.file("sym", "a file now");
    t.dir("added");
    t.file("added/n", random("added", 5000));
    t.dir("added/d");
    t.file("added/d/e", "e");
    [lower, t.0]
}

/// The layer of `v6-oci-packed`: every kind of file and attribute that RAFS has.
pub(super) fn tarable() -> Vec<Item<'static>> {
    const UNIT: usize = 16384;
    let acl: Vec<u8> =
        [(1, 7, u32::MAX), (2, 5, 1000), (4, 5, u32::MAX), (16, 7, u32::MAX), (32, 4, u32::MAX)]
            .iter()
            .fold(2u32.to_le_bytes().to_vec(), |mut acl, &(tag, perm, id): &(u16, u16, u32)| {
                acl.extend(tag.to_le_bytes());
                acl.extend(perm.to_le_bytes());
                acl.extend(id.to_le_bytes());
                acl
            });
    let capability = hex::decode("0100000200040000000000000000000000000000").unwrap();
    let mut t = Tree::new();
    t.file("hello.txt", "hello, world!\n");
    t.file("empty", "");
    t.file("one", "x");
    t.file("block", random("block", 4096));
    t.file("block1", random("block1", 4097));
    t.file("random.bin", random("random", UNIT + 1000));
    t.file("text.txt", lines("text", 2 * UNIT + 100));
    let zeros = vec![0; UNIT / 2];
    let multi = [lines("m0", UNIT), random("m1", UNIT / 2), zeros, lines("m2", 1234)].concat();
    t.file("multi.bin", multi);
    let mut sparse = vec![0; 5 * UNIT + 5];
    sparse[..5].copy_from_slice(b"start");
    sparse[3 * UNIT + 1..][..100].copy_from_slice(&random("sp", 100));
    sparse[5 * UNIT..].copy_from_slice(b"finis");
    t.file("sparse.bin", sparse);
    t.dir("dup");
    let d = lines("dup", UNIT);
    t.file("dup/a", [&d[..], b"tail A"].concat());
    t.file("dup/b", [&d[..], b"tail A"].concat());
    t.file("dup/c", [&d[..], b"tail C"].concat());
    t.file("dup/d", d.repeat(3));
    t.dir("hard");
    let hard = t.file("hard/h1", lines("hard", 5000));
    (hard.mode, hard.uid, hard.gid) = (0o640, 3, 4);
    t.link("hard/h2", "hard/h1");
    t.link("h3", "./hard/h1");
    t.dir("links");
    t.symlink("links/rel", "../hello.txt");
    t.symlink("links/abs", "/no/such/thing");
    t.symlink("links/l1000", text("a/".repeat(500)));
    t.symlink("links/l4095", text("b".repeat(4095)));
    t.symlink("links/l4032", text("c".repeat(4032)));
    t.symlink("links/l4033", text("d".repeat(4033)));
    t.dir("dev");
    t.node(b'3', "dev/null", (1, 3), 0o666);
    t.node(b'3', "dev/wide", (0xABC, 0x12345), 0o600);
    t.node(b'4', "dev/sda1", (8, 1), 0o660);
    t.node(b'6', "dev/fifo", (0, 0), 0o644);
    let dir = t.dir("xattr");
    xattr(dir, "user.dir", b"on a directory");
    xattr(dir, "trusted.t", b"\0\x01\x02");
    let f = t.file("xattr/f", "has xattrs");
    xattr(f, "user.a", b"1");
    xattr(f, "user.empty", b"");
    xattr(f, "user.longer.name", &[b'v'; 77]);
    xattr(f, "security.capability", &capability);
    xattr(f, "trusted.overlayish", b"y");
    let f = t.file("xattr/acl", "acl");
    // The mask of the ACL is what the group has.
    f.mode = 0o774;
    xattr(f, "system.posix_acl_access", &acl);
    xattr(t.dir("xattr/acldir"), "system.posix_acl_default", &acl);
    xattr(t.add(Item::symlink("xattr/sym", "f")), "trusted.onlink", b"yes");
    xattr(t.file("xattr/big", lines("xb", 3000)), "user.big", &[b'B'; 3000]);
    t.dir("perm");
    for (i, mode) in [0o4755, 0o2755, 0o1777, 0, 0o7777].into_iter().enumerate() {
        t.file(text(format!("perm/f{mode:o}")), i.to_string()).mode = mode;
    }
    t.dir("perm/sticky").mode = 0o1777;
    t.dir("ids");
    for (name, uid, gid) in [
        ("ids/u65535", 65535, 65535),
        ("ids/u65536", 65536, 70000),
        ("ids/u32", u32::MAX - 1, u32::MAX - 1),
    ] {
        let file = t.file(name, "");
        (file.uid, file.gid) = (uid, gid);
        if gid > 0o7777777 {
            file.pax.push((b"gid", gid.to_string().into_bytes()));
        }
    }
    t.dir("time");
    t.file("time/zero", "").mtime = 0;
    t.file("time/y2100", "").mtime = 4_102_444_800;
    t.dir("names");
    for name in [
        "!bang",
        "#hash",
        "+plus",
        "-dash",
        " space",
        "a b",
        "caf\u{e9}",
        "\u{65e5}\u{672c}",
        "...",
        ".hidden",
        "..a",
        text("n".repeat(255)),
        "zz",
    ] {
        let content = &name.as_bytes()[..name.len().min(20)];
        t.file(text(format!("names/{name}")), content);
    }
    t.dir("deep");
    let mut path = "deep".to_owned();
    for i in 0..40 {
        path = format!("{path}/d{i:02}");
        t.dir(text(path.clone()));
    }
    t.file(text(path + "/leaf"), "deep leaf");
    t.dir("emptydir").mode = 0o700;
    t.dir("tiny");
    for i in 0..12 {
        t.file(text(format!("tiny/t{i:02}")), lines(&format!("t{i}"), 50 + i * 260));
    }
    t.dir("bigdir");
    for i in 0..60 {
        let content = if i % 10 == 0 { i.to_string() } else { String::new() };
        t.file(text(format!("bigdir/e{i:0100}")), content);
    }
    t.0
}

/// An OCI layout in a directory that goes with it.
pub(super) struct Store {
    pub dir: tempfile::TempDir,
    pub layout: Layout,
}

impl Store {
    pub(super) fn new() -> Store {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::create(dir.path()).unwrap();
        Store { dir, layout }
    }

    /// `oci:DIR:TAG`.
    pub(super) fn reference(&self, tag: &str) -> crate::oci::reference::Reference {
        format!("oci:{}:{tag}", self.dir.path().display()).parse().unwrap()
    }

    /// Where a blob or manifest is.
    pub(super) fn path(&self, descriptor: &Descriptor) -> PathBuf {
        self.dir.path().join("blobs/sha256").join(descriptor.digest.hex())
    }

    pub(super) fn put(&self, media_type: &str, content: &[u8]) -> Descriptor {
        self.layout.put_blob(content).unwrap();
        Descriptor::of(media_type, content)
    }

    /// Stores a manifest of these layers.
    pub(super) fn image(
        &self,
        tag: &str,
        config: &serde_json::Value,
        layers: Vec<Descriptor>,
    ) -> (Descriptor, Manifest) {
        let config = self.put(OCI_CONFIG, config.to_string().as_bytes());
        let manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": layers,
        });
        let manifest: Manifest = serde_json::from_value(manifest).unwrap();
        (self.root(tag, &manifest), manifest)
    }

    pub(super) fn root(&self, tag: &str, manifest: &Manifest) -> Descriptor {
        let descriptor = self.put(OCI_MANIFEST, &manifest.to_bytes());
        self.layout.tag(descriptor.clone(), Some(tag)).unwrap();
        descriptor
    }

    /// A source of these layers, plain tars; its configuration too.
    pub(super) fn source(&self, tag: &str, layers: &[Vec<Item<'_>>]) -> serde_json::Value {
        let tars: Vec<Vec<u8>> = layers.iter().map(|layer| Tar::of(layer)).collect();
        let layers: Vec<Descriptor> = tars.iter().map(|tar| self.put(OCI_LAYER, tar)).collect();
        let history = (0..tars.len()).map(|i| serde_json::json!({"created_by": i.to_string()}));
        let config = serde_json::json!({
            "architecture": "amd64", "os": "linux",
            "config": {"Env": ["PATH=/bin"], "Labels": {"a": "b"}},
            "rootfs": {
                "type": "layers",
                "diff_ids": layers.iter().map(|layer| layer.digest.clone()).collect::<Vec<_>>(),
            },
            "history": history.collect::<Vec<_>>(),
        });
        self.image(tag, &config, layers);
        config
    }

    /// A RAFS image of this bootstrap and these packed blobs, of a source with this configuration.
    pub(super) fn target(
        &self,
        tag: &str,
        source_config: &serde_json::Value,
        bootstrap: &[u8],
        blobs: &[Vec<u8>],
    ) -> (Descriptor, Manifest) {
        let image = Bootstrap::from_bytes(bootstrap.to_vec()).unwrap();
        let mut files = vec![
            Item::dir("image"),
            Item { mode: 0o444, ..Item::file("image/image.boot", bytes(bootstrap.to_vec())) },
        ];
        let mut layers = Vec::new();
        for blob in blobs {
            let mut layer = self.put(super::manifest::BLOB_LAYER, blob);
            let annotation = ("containerd.io/snapshot/nydus-blob".to_owned(), "true".to_owned());
            layer.annotations.extend([annotation]);
            let hex = layer.digest.hex();
            if image.blobs().iter().any(|info| info.id.as_str() == hex) {
                let path = text(format!("image/{hex}.blob.meta"));
                let meta = bytes(blob_meta(blob));
                files.push(Item { mode: 0o444, ..Item::file(path, meta) });
            }
            layers.push(layer);
        }
        let tar = Tar::of(&files);
        layers.push(self.boot_layer(&tar));
        let mut config = source_config.clone();
        let mut diff_ids: Vec<String> =
            layers[..blobs.len()].iter().map(|layer| layer.digest.to_string()).collect();
        diff_ids.push(Descriptor::of("", &tar).digest.to_string());
        config["rootfs"]["diff_ids"] = diff_ids.into();
        config["history"].as_array_mut().unwrap().push(serde_json::json!({
            "created_by": "Nydus Converter", "comment": "Nydus Bootstrap Layer",
        }));
        self.image(tag, &config, layers)
    }

    /// A bootstrap layer of this tar.
    pub(super) fn boot_layer(&self, tar: &[u8]) -> Descriptor {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::Write::write_all(&mut gzip, tar).unwrap();
        let mut layer = self.put(OCI_LAYER_GZIP, &gzip.finish().unwrap());
        for (key, value) in [("bootstrap", "true"), ("fs-version", "6")] {
            let key = format!("containerd.io/snapshot/nydus-{key}");
            layer.annotations.insert(key, value.to_owned());
        }
        layer
    }

    /// `v6-merged` and its source, as `target` and `source`.
    pub(super) fn merged() -> (Store, Manifest) {
        let store = Store::new();
        let config = store.source("source", &lower_and_upper());
        let (bootstrap, blobs) = merged();
        let (_, manifest) = store.target("target", &config, &bootstrap, &blobs);
        (store, manifest)
    }

    /// `v6-oci-packed` as `target`, with `layer` as its source.
    pub(super) fn packed(layer: &[Item<'_>]) -> (Store, Manifest) {
        let store = Store::new();
        let config = store.source("source", &[layer.to_vec()]);
        let (bootstrap, blob) = packed();
        let (_, manifest) = store.target("target", &config, &bootstrap, &[blob]);
        (store, manifest)
    }
}

/// Bootstrap and blobs of `v6-merged`, the lower layer's first.
pub(super) fn merged() -> (Vec<u8>, [Vec<u8>; 2]) {
    let dir = golden("v6-merged");
    let blob = |name: &str| std::fs::read(dir.join("blobs").join(name)).unwrap();
    let lower = blob("dff0c4c4fa0a39fc90c36ebe45aac7c60fa2666d4daa0fd0cca0a2d03bf09e51");
    let upper = blob("6daa86dee9b44780bf3c074ff4a4a23953859673d8f29c425e65803dfc68db9b");
    (std::fs::read(dir.join("bootstrap")).unwrap(), [lower, upper])
}

/// Bootstrap and blob of `v6-oci-packed`; what a merge changes in the bootstrap of a layer is changed.
pub(super) fn packed() -> (Vec<u8>, Vec<u8>) {
    let dir = golden("v6-oci-packed");
    let name = "a59afcbc8265d23b0a7a24dacb111756654fcb5907c8e30d80d2e2b49f489c01";
    let blob = std::fs::read(dir.join("blobs").join(name)).unwrap();
    let mut bootstrap = std::fs::read(dir.join("bootstrap")).unwrap();
    let table = 4096;
    for at in [1408, table] {
        bootstrap[at..at + 64].copy_from_slice(name.as_bytes());
    }
    bootstrap[table + 84] &= !u8::try_from(BlobFeatures::INLINED_FS_META.bits()).unwrap();
    (bootstrap, blob)
}

/// The chunk-info array of a packed blob, uncompressed and padded, and its header.
fn blob_meta(blob: &[u8]) -> Vec<u8> {
    let packed = PackedBlob::read(blob).unwrap();
    let content = |kind| packed.section(kind).unwrap().content(blob, 1 << 30).unwrap();
    let mut meta = content(SectionKind::BlobMeta);
    let block = usize::try_from(BLOCK_SIZE).unwrap();
    meta.resize(meta.len().next_multiple_of(block), 0);
    meta.extend(content(SectionKind::BlobMetaHeader));
    meta
}
