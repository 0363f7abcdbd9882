use super::super::report::{Difference, Outcome};
use super::super::test_tar::Item;
use super::super::testing::{Store, lower_and_upper, tarable};
use super::*;

pub(super) fn args(store: &Store) -> Args {
    Args {
        source: Source::Image(store.reference("source")),
        target: Target::Image(store.reference("target")),
        platform: None,
        mtime: MtimePrecision::Exact,
        max_differences: 1000,
        json: false,
        source_access: Access::default(),
        target_access: Access::default(),
    }
}

fn compared(store: &Store) -> Report {
    compare(&args(store)).unwrap()
}

const RULES: [Rule; 3] = [Rule::Manifest, Rule::Bootstrap, Rule::FileSystem];

/// `RULE PATH FIELD SOURCE TARGET` of every difference, and what could not be told.
fn lines(report: &Report) -> Vec<String> {
    let value = |value: &Value| match value {
        Value::Absent => "-".to_owned(),
        Value::Text(text) => text.clone(),
        Value::Bytes(bytes) => bytes.escape_ascii().to_string(),
    };
    let line = |rule: Rule, d: &Difference| {
        let path = d.path.escape_ascii();
        format!("{rule:?} {path} {} {} {}", d.field, value(&d.source), value(&d.target))
    };
    let of = |rule: Rule| {
        let differences = report.differences(rule).iter().map(move |d| line(rule, d));
        differences.chain(report.reasons(rule).iter().map(move |r| format!("{rule:?} ? {r}")))
    };
    RULES.into_iter().flat_map(of).collect()
}

#[test]
fn images_of_nydus_are_the_same_as_their_sources() {
    let (store, _) = Store::merged();
    let report = compared(&store);
    assert_eq!(lines(&report), [""; 0]);
    assert_eq!(report.outcome(), Outcome::Same);
    let counts = report.counts;
    assert_eq!(
        (counts.paths, counts.source_layers, counts.target_blobs, counts.chunks),
        (24, 2, 2, 29)
    );

    let (store, _) = Store::packed(&tarable());
    let report = compared(&store);
    assert_eq!(lines(&report), [""; 0]);
    assert_eq!((report.outcome(), report.counts.paths), (Outcome::Same, 182));
}

/// Changes the entry at `path`.
fn change(path: &str, change: impl Fn(&mut Item<'static>)) -> Vec<Item<'static>> {
    let mut items = tarable();
    let item = items.iter_mut().find(|item| item.path == path.as_bytes());
    change(item.unwrap_or_else(|| panic!("no entry {path}")));
    items
}

/// The source has one thing that the target has not: this and nothing else is reported.
#[test]
fn every_field_that_differs_is_named_with_both_values() {
    fn xattr(item: &mut Item<'static>, name: &'static [u8], value: &[u8]) {
        item.pax.retain(|(key, _)| *key != name);
        item.pax.push((name, value.to_vec()));
    }
    let with = |more: &[Item<'static>]| [tarable(), more.to_vec()].concat();
    let without = |path: &str| {
        tarable().into_iter().filter(|item| item.path != path.as_bytes()).collect::<Vec<_>>()
    };
    let xattr_name: &[u8] = b"SCHILY.xattr.user.a";
    let digest = |data: &[u8]| format!("blake3:{}", blake3::hash(data).to_hex());
    let cases: Vec<(&str, Vec<Item<'static>>, Vec<String>)> = vec![
        (
            "mode",
            change("perm/f4755", |i| i.mode = 0o755),
            vec!["/perm/f4755 mode 0755 4755".into()],
        ),
        (
            "mode of a directory",
            change("perm", |i| i.mode = 0o700),
            vec!["/perm mode 0700 0755".into()],
        ),
        (
            "uid",
            change("hard/h1", |i| i.uid = 5),
            vec!["/h3 uid 5 3".into(), "/hard/h1 uid 5 3".into(), "/hard/h2 uid 5 3".into()],
        ),
        (
            "gid",
            change("ids/u65536", |i| i.gid = 65536),
            vec!["/ids/u65536 gid 65536 70000".into()],
        ),
        ("mtime", change("one", |i| i.mtime += 1), vec!["/one mtime 1600000004 1600000003".into()]),
        (
            "nanoseconds",
            change("one", |i| i.pax.push((b"mtime", b"1600000003.000000001".to_vec()))),
            vec!["/one mtime 1600000003.000000001 1600000003".into()],
        ),
        (
            "before the epoch",
            change("time/zero", |i| i.pax.push((b"mtime", b"-1.5".to_vec()))),
            vec!["/time/zero mtime -1.500000000 0".into()],
        ),
        ("time of the root", change("./", |i| i.mtime = 0), vec!["/ mtime 0 1600000000".into()]),
        (
            "value of an attribute",
            change("xattr/f", |i| xattr(i, xattr_name, b"2\xff")),
            vec!["/xattr/f xattr user.a 2\\xff 1".into()],
        ),
        (
            "attribute too many",
            change("xattr/sym", |i| i.pax.clear()),
            vec!["/xattr/sym xattr trusted.onlink - yes".into()],
        ),
        (
            "attribute missing",
            change("one", |i| xattr(i, xattr_name, b"")),
            vec!["/one xattr user.a  -".into()],
        ),
        (
            "target of a link",
            change("links/rel", |i| i.link = b"../hello.tx"),
            vec!["/links/rel target ../hello.tx ../hello.txt".into()],
        ),
        (
            "device",
            change("dev/wide", |i| i.dev = (0xABC, 0x12344)),
            vec!["/dev/wide rdev 2748:74564 2748:74565".into()],
        ),
        (
            "kind of device",
            change("dev/null", |i| i.kind = b'4'),
            vec!["/dev/null type block char".into()],
        ),
        (
            "type",
            change("emptydir", |i| i.kind = b'6'),
            vec!["/ nlink 14 15".into(), "/emptydir type fifo dir".into()],
        ),
        (
            "content",
            change("hello.txt", |i| i.data = b"hello, World!\n"),
            vec![format!(
                "/hello.txt content {} {}",
                digest(b"hello, World!\n"),
                digest(b"hello, world!\n")
            )],
        ),
        ("size", change("hello.txt", |i| i.data = b"hello"), vec!["/hello.txt size 5 14".into()]),
        (
            "path missing",
            with(&[Item::file("perm/new", b"")]),
            vec!["/perm/new type file -".into()],
        ),
        ("path too many", without("perm/f0"), vec!["/perm/f0 type - file".into()]),
        (
            "last path missing",
            with(&[Item::symlink("zzz", "a")]),
            vec!["/zzz type symlink -".into()],
        ),
        (
            "hard link split",
            change("h3", |i| {
                *i = Item {
                    data: lines_of("hard/h1"),
                    mode: 0o640,
                    uid: 3,
                    gid: 4,
                    mtime: item("hard/h1").mtime,
                    ..Item::file("h3", b"")
                };
            }),
            vec![
                "/h3 nlink 1 3".into(),
                "/hard/h1 nlink 2 3".into(),
                "/hard/h1 hard link to - /h3".into(),
                "/hard/h2 nlink 2 3".into(),
                "/hard/h2 hard link to /hard/h1 /h3".into(),
            ],
        ),
        ("hard link to another file", change("h3", |i| i.link = b"tiny/t00"), {
            let (there, here) = (item("tiny/t00"), item("hard/h1"));
            let mut lines: Vec<String> =
                ["/h3 mode 0644 0640", "/h3 uid 0 3", "/h3 gid 0 4"].map(str::to_owned).into();
            lines.push(format!("/h3 mtime {} {}", there.mtime, here.mtime));
            lines.extend(
                [
                    "/h3 nlink 2 3",
                    "/h3 size 50 5000",
                    "/hard/h1 nlink 2 3",
                    "/hard/h1 hard link to - /h3",
                    "/hard/h2 nlink 2 3",
                    "/hard/h2 hard link to /hard/h1 /h3",
                    "/tiny/t00 nlink 2 1",
                    "/tiny/t00 hard link to /h3 -",
                ]
                .map(str::to_owned),
            );
            lines
        }),
        (
            "a whiteout without effect",
            with(&[Item::file(".wh.one", b""), Item::file("perm/.wh.f0", b"")]),
            vec![],
        ),
    ];
    for (what, items, want) in cases {
        let (store, _) = Store::packed(&items);
        let want: Vec<String> = want.iter().map(|line| format!("FileSystem {line}")).collect();
        assert_eq!(lines(&compared(&store)), want, "{what}");
    }
}

fn item(path: &str) -> Item<'static> {
    tarable().into_iter().find(|item| item.path == path.as_bytes()).unwrap()
}

fn lines_of(path: &str) -> &'static [u8] {
    item(path).data
}

/// What a layer removes is still in the image, or something is gone that it does not remove.
#[test]
fn whiteouts_that_had_no_effect_are_seen() {
    // (entries of the upper layer left out, what is reported)
    let cases: [(&[&str], &[&str]); 3] = [
        (&["keep/.wh.a"], &["/keep/a type file -"]),
        (
            &["opaque/.wh..wh..opq"],
            &[
                "/opaque nlink 3 2",
                "/opaque/old1 type file -",
                "/opaque/olddir type dir -",
                "/opaque/olddir/z type file -",
            ],
        ),
        (
            &["hl1"],
            &[
                "/hl1 mtime 1600000021 1600000018",
                "/hl1 nlink 2 1",
                "/hl1 size 6000 33",
                "/hl2 nlink 2 1",
                "/hl2 hard link to /hl1 -",
            ],
        ),
    ];
    for (left_out, want) in cases {
        let [lower, upper] = lower_and_upper();
        let upper: Vec<_> = upper
            .into_iter()
            .filter(|i| !left_out.iter().any(|p| i.path == p.as_bytes()))
            .collect();
        let store = Store::new();
        let config = store.source("source", &[lower, upper]);
        let (bootstrap, blobs) = super::super::testing::merged();
        store.target("target", &config, &bootstrap, &blobs);
        let want: Vec<String> = want.iter().map(|line| format!("FileSystem {line}")).collect();
        assert_eq!(lines(&compared(&store)), want, "{left_out:?}");
    }
}

/// The manifest is rewritten; blobs stay as they are.
#[test]
fn manifests_that_differ() {
    use serde_json::{Value as Json, json};
    type Change = fn(&mut Json);
    let cases: [(&str, Change, &[&str]); 15] = [
        (
            "type of the manifest's configuration",
            |m| m["config"]["mediaType"] = json!("text/plain"),
            &["config mediaType application/vnd.oci.image.config.v1+json text/plain"],
        ),
        (
            "type of a blob",
            |m| m["layers"][0]["mediaType"] = json!("application/vnd.oci.image.layer.v1.tar"),
            &[
                "layers[0] mediaType application/vnd.oci.image.layer.nydus.blob.v1 application/vnd.oci.image.layer.v1.tar",
            ],
        ),
        (
            "type of the bootstrap",
            |m| {
                m["layers"][2]["mediaType"] =
                    json!("application/vnd.docker.image.rootfs.diff.tar.gzip")
            },
            &[
                "layers[2] mediaType application/vnd.oci.image.layer.v1.tar+gzip application/vnd.docker.image.rootfs.diff.tar.gzip",
            ],
        ),
        (
            "annotation missing",
            |m| {
                m["layers"][1].as_object_mut().unwrap().remove("annotations");
            },
            &["layers[1] annotation containerd.io/snapshot/nydus-blob true -"],
        ),
        (
            "annotation wrong",
            |m| {
                m["layers"][2]["annotations"]["containerd.io/snapshot/nydus-fs-version"] =
                    json!("5")
            },
            &["layers[2] annotation containerd.io/snapshot/nydus-fs-version 6 5"],
        ),
        (
            "annotation of another kind",
            |m| {
                m["layers"][0]["annotations"]["containerd.io/snapshot/nydus-bootstrap"] =
                    json!("true")
            },
            &["layers[0] annotation containerd.io/snapshot/nydus-bootstrap - true"],
        ),
        (
            "foreign annotation",
            |m| m["layers"][0]["annotations"]["a"] = json!("b"),
            &["layers[0] annotation a - b"],
        ),
        (
            "annotation of the manifest",
            |m| m["annotations"] = json!({"k": "v"}),
            &["manifest annotation k - v"],
        ),
        (
            "another diff id",
            |m| m["layers"][0]["annotations"]["containerd.io/uncompressed"] = json!("sha256:00"),
            &[
                "layers[0] annotation containerd.io/uncompressed sha256:dff0c4c4fa0a39fc90c36ebe45aac7c60fa2666d4daa0fd0cca0a2d03bf09e51 sha256:00",
            ],
        ),
        ("unknown field", |m| m["x"] = json!({"y": [1]}), &["manifest x - {\"y\":[1]}"]),
        (
            "reference blobs",
            |m| {
                m["layers"][2]["annotations"]["containerd.io/snapshot/nydus-reference-blob-ids"] =
                    json!("[\"6daa86dee9b44780bf3c074ff4a4a23953859673d8f29c425e65803dfc68db9b\"]")
            },
            &[
                "bootstrap layer annotation containerd.io/snapshot/nydus-reference-blob-ids dff0c4c4fa0a39fc90c36ebe45aac7c60fa2666d4daa0fd0cca0a2d03bf09e51 -",
            ],
        ),
        ("size of a blob", |m| m["layers"][0]["size"] = json!(15852), &["layers[0] content"]),
        (
            "subject",
            |m| m["subject"] = json!({"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": format!("sha256:{}", "0".repeat(64)), "size": 3}),
            &["subject digest", "subject size"],
        ),
        (
            "a blob missing",
            |m| {
                m["layers"].as_array_mut().unwrap().remove(0);
            },
            &[
                "layers count 3 2",
                "config.rootfs.diff_ids[0]",
                "config.rootfs.diff_ids[1]",
                "config.rootfs.diff_ids[2]",
                "layers blob sha256:dff0c4c4fa0a39fc90c36ebe45aac7c60fa2666d4daa0fd0cca0a2d03bf09e51 -",
            ],
        ),
        (
            "no bootstrap",
            |m| {
                m["layers"].as_array_mut().unwrap().remove(2);
            },
            &[
                "layers count 3 2",
                "layers[1] mediaType application/vnd.oci.image.layer.v1.tar+gzip application/vnd.oci.image.layer.nydus.blob.v1",
                "layers[1] annotation containerd.io/snapshot/nydus-bootstrap true -",
                "layers[1] annotation containerd.io/snapshot/nydus-fs-version 6 -",
                "layers[1] annotation containerd.io/snapshot/nydus-blob - true",
            ],
        ),
    ];
    for (what, change, want) in cases {
        let (store, manifest) = Store::merged();
        let mut manifest = serde_json::to_value(manifest).unwrap();
        change(&mut manifest);
        store.root("target", &serde_json::from_value(manifest).unwrap());
        let report = compared(&store);
        let got: Vec<_> = lines(&report)
            .into_iter()
            .filter_map(|l| Some(l.strip_prefix("Manifest ")?.to_owned()))
            .collect();
        assert_eq!(got.len(), want.len(), "{what}: {got:#?}");
        for (got, want) in got.iter().zip(want) {
            assert!(got.starts_with(want), "{what}: {got}");
        }
        assert_eq!(report.outcome(), Outcome::Different, "{what}");
    }
}

#[test]
fn configurations_that_differ() {
    use serde_json::{Value as Json, json};
    type Change = fn(&mut Json);
    let cases: [(&str, Change, &[&str]); 7] = [
        ("a label", |c| c["config"]["Labels"]["a"] = json!("c"), &["config.config.Labels a b c"]),
        (
            "environment",
            |c| c["config"]["Env"] = json!(["PATH=/bin", "X=1"]),
            &["config.config Env[1] - X=1"],
        ),
        (
            "architecture",
            |c| c["architecture"] = json!("arm64"),
            &["config architecture amd64 arm64"],
        ),
        (
            "a diff id",
            |c| c["rootfs"]["diff_ids"][1] = json!("sha256:0"),
            &["config.rootfs.diff_ids[1] diff id sha256:6daa86"],
        ),
        (
            "history",
            |c| c["history"][0]["created_by"] = json!("x"),
            &["config.history[0] created_by 0 x"],
        ),
        (
            "no entry of the bootstrap",
            |c| {
                c["history"].as_array_mut().unwrap().pop();
            },
            &["config.history[2] entry entry of the bootstrap layer -"],
        ),
        (
            "an entry without a layer",
            |c| c["history"][2]["empty_layer"] = json!(true),
            &["config.history[2] empty_layer - true"],
        ),
    ];
    for (what, change, want) in cases {
        let (store, mut manifest) = Store::merged();
        let mut config: Json =
            serde_json::from_slice(&std::fs::read(store.path(&manifest.config)).unwrap()).unwrap();
        change(&mut config);
        manifest.config = store.put(&manifest.config.media_type, config.to_string().as_bytes());
        store.root("target", &manifest);
        let got = lines(&compared(&store));
        assert_eq!(got.len(), want.len(), "{what}: {got:#?}");
        for (got, want) in got.iter().zip(want) {
            assert!(got.starts_with(&format!("Manifest {want}")), "{what}: {got}");
        }
    }
}
