//! `rafs convert` between real registries and layouts: what comes out is the image that went in, skopeo and umoci
//! take part, and independent readers find in it what umoci unpacks of the source.
//!
//! Needs root, a kernel with EROFS on files, python3 and `scripts/parts registry skopeo umoci erofs`.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is how a test fails")]

mod build_support;

mod support {
    // Each test program uses its own part of these.
    #![allow(dead_code)]
    pub mod parts;
    pub mod registry;
}

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use rafsd::oci::digest::Digest;
use rafsd::oci::layout::Layout;
use rafsd::oci::manifest::Descriptor;
use serde_json::{Value, json};

use build_support::erofs::{Mount, devices};
use build_support::{Built, assert_same, check_by_rafs_reader, describe, part, run};
use support::parts::Parts;
use support::registry::{Registry, Setup};

const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const TAR: &str = "application/vnd.oci.image.layer.v1.tar";

/// One tar with entries added in the order of calls.
struct Tar(tar::Builder<Vec<u8>>);

impl Tar {
    fn new() -> Tar {
        Tar(tar::Builder::new(Vec::new()))
    }

    fn add(
        mut self,
        path: &str,
        kind: tar::EntryType,
        mode: u32,
        content: &[u8],
        link: &str,
    ) -> Tar {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(1000);
        header.set_gid(7);
        header.set_mtime(1_500_000_000);
        header.set_size(content.len() as u64);
        match link {
            "" => self.0.append_data(&mut header, path, content).unwrap(),
            link => self.0.append_link(&mut header, path, link).unwrap(),
        }
        self
    }

    fn dir(self, path: &str) -> Tar {
        self.add(path, tar::EntryType::Directory, 0o755, b"", "")
    }

    fn file(self, path: &str, content: &[u8]) -> Tar {
        self.add(path, tar::EntryType::Regular, 0o640, content, "")
    }

    fn link(self, path: &str, kind: tar::EntryType, to: &str) -> Tar {
        self.add(path, kind, 0o777, b"", to)
    }

    fn xattr(mut self, name: &str, value: &[u8]) -> Tar {
        let key = format!("SCHILY.xattr.{name}");
        self.0.append_pax_extensions([(key.as_str(), value)]).unwrap();
        self
    }

    fn end(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

/// Bytes that do not compress and have no chunk twice.
fn noise(len: usize, mut seed: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&(seed >> 16).to_le_bytes()[..6]);
    }
    bytes.truncate(len);
    bytes
}

/// Tars of the layers, lowest first.
fn tars() -> [Vec<u8>; 4] {
    use tar::EntryType::{Link, Symlink};
    let base = Tar::new()
        .dir("./")
        .dir("etc")
        .file("etc/hello", b"hello\n")
        .xattr("user.note", b"kept")
        .file("etc/noted", b"noted\n")
        .link("etc/symlink", Symlink, "hello")
        .dir("usr")
        .file("usr/data", &noise(3_500_000, 1))
        .link("usr/hard", Link, "usr/data")
        .dir("old")
        .file("old/a", b"a")
        .dir("old/b")
        .file("old/b/c", b"c")
        .file("gone", b"to be removed")
        .file("swap", b"a file that becomes a directory")
        .file(&format!("usr/{}", "long".repeat(60)), b"a long name")
        .end();
    let middle = Tar::new()
        .file(".wh.gone", b"")
        .dir("old")
        .file("old/.wh..wh..opq", b"")
        .file("old/new", b"new")
        .file(".wh.swap", b"")
        .dir("swap")
        .file("swap/inside", b"inside")
        .file("etc/hello", b"hello from above\n")
        .file("usr/again", &noise(3_500_000, 1))
        .end();
    // What ends as a layer without entries, as builders write them for steps that change nothing.
    let empty = Tar::new().end();
    let top = Tar::new().dir("top").file("top/zeros", &vec![0; 5_000_000]).end();
    [base, middle, empty, top]
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// An OCI layout with an image of four layers, packed in all ways, tagged `one`; the same in gzip, tagged
/// `gzip`; and an index tagged `many`.
struct Sample {
    dir: tempfile::TempDir,
    attestation: Descriptor,
    artifact: Descriptor,
}

impl Sample {
    fn new() -> Sample {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::create(&dir.path().join("source")).unwrap();
        let put = |media_type: &str, bytes: &[u8]| {
            layout.put_blob(bytes).unwrap();
            Descriptor::of(media_type, bytes)
        };
        let tars = tars();
        let layers = [
            put(&format!("{TAR}+gzip"), &gzip(&tars[0])),
            put(&format!("{TAR}+zstd"), &zstd::encode_all(&tars[1][..], 3).unwrap()),
            put(&format!("{TAR}+gzip"), &gzip(&tars[2])),
            put(TAR, &tars[3]),
        ];
        let diff_ids: Vec<Digest> = tars.iter().map(|tar| Digest::sha256(tar)).collect();
        let zipped = tars.each_ref().map(|tar| put(&format!("{TAR}+gzip"), &gzip(tar)));
        let image = |architecture: &str, layers: &[Descriptor]| {
            let config = json!({
                "created": "2026-01-01T00:00:00Z", "architecture": architecture, "os": "linux",
                "config": {"Labels": {"a.label": "kept"}, "Cmd": ["sh"], "Env": ["A=b"]},
                "x-unknown": {"kept": true},
                "rootfs": {"type": "layers", "diff_ids": diff_ids[..layers.len()]},
                "history": vec![json!({"created_by": "step"}); layers.len()],
            });
            let config = put(OCI_CONFIG, config.to_string().as_bytes());
            let manifest = json!({
                "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config,
                "layers": layers, "annotations": {"of.the.manifest": "kept"},
            });
            put(OCI_MANIFEST, manifest.to_string().as_bytes())
        };
        let with = |mut descriptor: Descriptor, more: Value| {
            let mut value = serde_json::to_value(&descriptor).unwrap();
            value.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            descriptor = serde_json::from_value(value).unwrap();
            descriptor
        };
        let one = image("amd64", &layers);
        layout.tag(one.clone(), Some("one")).unwrap();
        layout.tag(image("amd64", &zipped), Some("gzip")).unwrap();
        let statement = put("application/vnd.in-toto+json", br#"{"_type":"statement"}"#);
        let no_config =
            put(OCI_CONFIG, br#"{"architecture":"unknown","os":"unknown","rootfs":{}}"#);
        let about = json!({
            "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": no_config, "layers": [statement],
        });
        let attestation = with(
            put(OCI_MANIFEST, about.to_string().as_bytes()),
            json!({
                "platform": {"architecture": "unknown", "os": "unknown"},
                "annotations": {
                    "vnd.docker.reference.type": "attestation-manifest",
                    "vnd.docker.reference.digest": one.digest,
                },
            }),
        );
        let chart = json!({
            "schemaVersion": 2, "mediaType": OCI_MANIFEST, "artifactType": "application/x-chart",
            "config": put("application/vnd.oci.empty.v1+json", b"{}"),
            "layers": [put("application/x-chart", b"a chart")],
        });
        let artifact = with(
            put(OCI_MANIFEST, chart.to_string().as_bytes()),
            json!({"artifactType": "application/x-chart", "annotations": {"foreign": "kept"}}),
        );
        let arm = json!({"platform": {"architecture": "arm64", "os": "linux", "variant": "v8"}});
        let amd = json!({
            "platform": {"architecture": "amd64", "os": "linux"}, "annotations": {"of.the.entry": "kept"},
        });
        let index = json!({
            "schemaVersion": 2, "mediaType": OCI_INDEX,
            "manifests": [with(one, amd), with(image("arm64", &layers[..2]), arm), attestation, artifact],
            "annotations": {"of.the.index": "kept"}, "x-unknown": [1],
        });
        layout.tag(put(OCI_INDEX, index.to_string().as_bytes()), Some("many")).unwrap();
        Sample { dir, attestation, artifact }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `oci:DIR:TAG` of the source.
    fn source(&self, tag: &str) -> String {
        format!("oci:{}:{tag}", self.path("source").display())
    }
}

/// `rafs convert` with its credentials, certificates and summary.
struct Convert {
    command: Command,
    json: tempfile::NamedTempFile,
}

fn convert(source: &str, target: &str) -> Convert {
    let json = tempfile::NamedTempFile::new().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_rafs"));
    command.args(["convert", "--source", source, "--target", target]);
    command.arg("--output-json").arg(json.path());
    command.env("DOCKER_CONFIG", "/nonexistent").env_remove("REGISTRY_AUTH_FILE");
    // A proxy that is not there: nothing on this machine is behind it.
    command.env("HTTP_PROXY", "http://127.0.0.1:1").env("HTTPS_PROXY", "http://127.0.0.1:1");
    Convert { command, json }
}

impl Convert {
    fn args(mut self, args: &[&str]) -> Convert {
        self.command.args(args);
        self
    }

    fn access(mut self, registry: &Registry, setup: &Setup) -> Convert {
        if setup.user.is_some() {
            self.command.env("DOCKER_CONFIG", registry.docker_config());
        }
        if setup.tls {
            self.command.arg("--ca-file").arg(registry.ca());
        }
        self
    }

    fn output(&mut self) -> Output {
        self.command.output().unwrap()
    }

    /// The summary of a conversion that succeeds.
    fn done(mut self) -> Value {
        let output = self.output();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{:?}: {stderr}", self.command);
        serde_json::from_slice(&fs::read(self.json.path()).unwrap()).unwrap()
    }

    /// What one that fails says.
    fn fails(mut self) -> String {
        let output = self.output();
        assert!(!output.status.success(), "{:?} succeeded", self.command);
        String::from_utf8_lossy(&output.stderr).into_owned()
    }
}

fn digest(summary: &Value) -> &str {
    summary["target_digest"].as_str().unwrap()
}

/// Blobs of the first image.
fn blobs(summary: &Value) -> Vec<String> {
    let layers = summary["images"][0]["layers"].as_array().unwrap();
    layers.iter().map(|layer| layer["blob"].as_str().unwrap().to_owned()).collect()
}

/// A blob of a layout, parsed.
fn blob_of(layout: &Path, descriptor: &Value) -> Value {
    serde_json::from_slice(&bytes_of(layout, descriptor)).unwrap()
}

fn bytes_of(layout: &Path, descriptor: &Value) -> Vec<u8> {
    let digest = descriptor["digest"].as_str().unwrap();
    fs::read(layout.join("blobs").join(digest.replacen(':', "/", 1))).unwrap()
}

/// The manifest or index with this tag.
fn tagged(layout: &Path, tag: &str) -> Value {
    let index: Value =
        serde_json::from_slice(&fs::read(layout.join("index.json")).unwrap()).unwrap();
    let all = index["manifests"].as_array().unwrap();
    let name = |d: &Value| d["annotations"]["org.opencontainers.image.ref.name"] == tag;
    blob_of(layout, all.iter().find(|d| name(d)).unwrap())
}

/// The bootstrap of an image in a layout, beside its blobs.
fn built(layout: &Path, manifest: &Value, dir: &Path) -> Built {
    let gzip = bytes_of(layout, manifest["layers"].as_array().unwrap().last().unwrap());
    let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(&gzip[..]));
    let bootstrap = dir.join("image.boot");
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        if entry.path().unwrap() == Path::new("image/image.boot") {
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            fs::write(&bootstrap, bytes).unwrap();
            return Built { bootstrap, blobs: layout.join("blobs/sha256") };
        }
    }
    panic!("no image/image.boot");
}

#[test]
fn independent_readers_find_what_umoci_unpacks_of_the_source() {
    let sample = Sample::new();
    let target = sample.path("target");
    let options = ["--digester", "sha256", "--chunk-size", "0x10000"];
    let to = format!("oci:{}:rafs", target.display());
    convert(&sample.source("one"), &to).args(&options).done();

    let umoci = Parts::install(&["umoci", "erofs"]).unwrap().path("umoci").unwrap();
    let image = format!("{}:one", sample.path("source").display());
    let bundle = sample.path("bundle");
    run(Command::new(umoci).args(["unpack", "--image", &image]).arg(&bundle));
    let want = describe(&bundle.join("rootfs"));
    assert!(want.contains_key(&b"/old/new"[..]) && !want.contains_key(&b"/old/a"[..]));

    let built = built(&target, &tagged(&target, "rafs"), sample.dir.path());
    build_support::check(&built);
    check_by_rafs_reader(&built, &want, sample.dir.path());
    let devices = devices(&built, sample.dir.path());
    let mut fsck = Command::new(part("fsck_erofs"));
    fsck.args(devices.iter().map(|device| format!("--device={}", device.display())));
    run(fsck.arg(&built.bootstrap));
    let mount = Mount::new(&built.bootstrap, &devices, sample.path("mnt"));
    assert_same(&describe(&mount.at), &want, "kernel");
}

#[test]
fn threads_places_and_reuse_do_not_change_the_digest() {
    let sample = Sample::new();
    let registry = Registry::plain().unwrap();
    let source = sample.source("one");
    let options = ["--chunk-size", "0x4000"];
    let run =
        |target: &str, more: &[&str]| convert(&source, target).args(&options).args(more).done();
    let first = run(&registry.reference("a:1"), &["--threads", "1", "--parallel-layers", "1"]);
    let layout = format!("oci:{}:x", sample.path("out").display());
    let others = [
        run(&registry.reference("b:1"), &["--threads", "7", "--parallel-layers", "5"]),
        run(&layout, &["--threads", "3"]),
    ];
    for other in &others {
        assert_eq!((digest(other), blobs(other)), (digest(&first), blobs(&first)));
        assert_eq!(other["totals"]["reused_layers"], 0);
    }
    // Found under another tag of the repository, and in a layout.
    let from = registry.requests().len();
    for again in [run(&registry.reference("a:2"), &[]), run(&layout.replace(":x", ":y"), &[])] {
        assert_eq!((digest(&again), blobs(&again)), (digest(&first), blobs(&first)));
        assert_eq!(again["totals"]["reused_layers"], 4);
    }
    let requests = registry.requests().split_off(from);
    assert!(
        !requests.iter().any(|r| r.method == "PATCH"),
        "something was sent again: {requests:?}"
    );
    // Other settings make other blobs.
    let other =
        convert(&source, &registry.reference("a:3")).args(&["--chunk-size", "0x8000"]).done();
    assert_eq!(other["totals"]["reused_layers"], 0);
    assert_ne!(blobs(&other), blobs(&first));
}

#[test]
fn a_blob_that_is_gone_or_damaged_is_made_again() {
    let sample = Sample::new();
    let target = sample.path("out");
    let to = format!("oci:{}:x", target.display());
    let first = convert(&sample.source("one"), &to).done();
    let blob = |at: usize| target.join("blobs").join(blobs(&first)[at].replacen(':', "/", 1));
    fs::remove_file(blob(0)).unwrap();
    // The table of contents at the end of this one.
    let mut bytes = fs::read(blob(1)).unwrap();
    let at = bytes.len() - 700;
    bytes[at] ^= 0x55;
    fs::write(blob(1), &bytes).unwrap();
    let again = convert(&sample.source("one"), &to).done();
    assert_eq!(digest(&again), digest(&first));
    assert_eq!(again["totals"]["reused_layers"], 2);
    for at in 0..4 {
        let bytes = fs::read(blob(at)).unwrap();
        assert_eq!(Digest::sha256(&bytes).as_str(), blobs(&first)[at]);
    }
}

#[test]
fn users_and_certificates_are_needed_and_enough() {
    let sample = Sample::new();
    let user = || Some(("someone".to_owned(), "pass:word".to_owned()));
    let mut digests = Vec::new();
    for setup in [
        Setup::default(),
        Setup { user: user(), tls: false },
        Setup { user: None, tls: true },
        Setup { user: user(), tls: true },
    ] {
        let registry = Registry::start(setup.clone()).unwrap();
        registry.push(&sample.source("one"), "app:1", &["--preserve-digests"]).unwrap();
        let (source, target) = (registry.reference("app:1"), registry.reference("new/app:rafs"));
        if setup.user.is_some() {
            let mut anonymous = convert(&source, &target);
            if setup.tls {
                anonymous.command.arg("--ca-file").arg(registry.ca());
            }
            let said = anonymous.fails();
            assert!(said.contains("denies access"), "{said}");
            let wrong = tempfile::tempdir().unwrap();
            let auth = json!({"auths": {registry.host(): {"auth": "c29tZW9uZTpzZWNyZXQ="}}});
            fs::write(wrong.path().join("config.json"), auth.to_string()).unwrap();
            let mut wrong_password = convert(&source, &target).access(&registry, &setup);
            wrong_password.command.env("DOCKER_CONFIG", wrong.path());
            let said = wrong_password.fails();
            assert!(said.contains("authentication required") && !said.contains("c2Vj"), "{said}");
        }
        if setup.tls {
            let mut unknown = convert(&source, &target);
            if setup.user.is_some() {
                unknown.command.env("DOCKER_CONFIG", registry.docker_config());
            }
            let said = unknown.fails();
            assert!(said.contains("certificate"), "{said}");
            // Whoever does not care may say so.
            let target = registry.reference("insecure:1");
            let mut insecure =
                convert(&source, &target).args(&["--source-insecure", "--target-insecure"]);
            if setup.user.is_some() {
                insecure.command.env("DOCKER_CONFIG", registry.docker_config());
            }
            insecure.done();
        }
        let done = convert(&source, &target).access(&registry, &setup).done();
        digests.push(digest(&done).to_owned());
        // Skopeo reads it, and copies it without changing it.
        let manifest = registry.manifest("new/app:rafs").unwrap();
        assert_eq!(manifest["layers"].as_array().unwrap().len(), 5);
        let back = sample.path("back").join(digests.len().to_string());
        fs::create_dir_all(&back).unwrap();
        registry.pull("new/app:rafs", &format!("oci:{}:x", back.display())).unwrap();
        assert_eq!(tagged(&back, "x"), manifest);
    }
    assert!(digests.iter().all(|d| *d == digests[0]), "{digests:?}");
}

#[test]
fn manifest_and_configuration_keep_what_is_not_about_layers() {
    let sample = Sample::new();
    let target = sample.path("out");
    convert(&sample.source("one"), &format!("oci:{}:x", target.display())).done();
    let (was, is) = (tagged(&sample.path("source"), "one"), tagged(&target, "x"));
    assert_eq!(is["annotations"], was["annotations"]);
    let layers = is["layers"].as_array().unwrap();
    let kind = |layer: &Value| layer["mediaType"].as_str().unwrap().to_owned();
    let annotation = |layer: &Value, key: &str| {
        layer["annotations"][format!("containerd.io/snapshot/nydus-{key}")].clone()
    };
    for (layer, source) in layers[..4].iter().zip(was["layers"].as_array().unwrap()) {
        assert_eq!(kind(layer), "application/vnd.oci.image.layer.nydus.blob.v1");
        assert_eq!(annotation(layer, "blob"), "true");
        assert_eq!(annotation(layer, "source-digest"), source["digest"]);
    }
    assert_eq!(kind(&layers[4]), "application/vnd.oci.image.layer.v1.tar+gzip");
    assert_eq!(
        (annotation(&layers[4], "bootstrap"), annotation(&layers[4], "fs-version")),
        (json!("true"), json!("6"))
    );

    let blob = |layout: &str, manifest: &Value| blob_of(&sample.path(layout), &manifest["config"]);
    let (mut before, after) = (blob("source", &was), blob("out", &is));
    let mut tar = Vec::new();
    let last = bytes_of(&target, &layers[4]);
    flate2::read::GzDecoder::new(&last[..]).read_to_end(&mut tar).unwrap();
    let mut diff_ids: Vec<Value> = layers[..4].iter().map(|l| l["digest"].clone()).collect();
    diff_ids.push(json!(Digest::sha256(&tar)));
    before["rootfs"]["diff_ids"] = diff_ids.into();
    before["history"].as_array_mut().unwrap().push(json!({
        "created": "2026-01-01T00:00:00Z", "created_by": "Nydus Converter", "comment": "Nydus Bootstrap Layer",
    }));
    assert_eq!(after, before);

    let entries: Vec<String> = tar::Archive::new(&tar[..])
        .entries()
        .unwrap()
        .map(|e| e.unwrap().path().unwrap().display().to_string())
        .collect();
    let hex = |at: usize| layers[at]["digest"].as_str().unwrap()[7..].to_owned();
    let want = ["image".into(), "image/image.boot".into()]
        .into_iter()
        // The third layer has no data.
        .chain([0, 1, 3].map(|at| format!("image/{}.blob.meta", hex(at))));
    assert_eq!(entries, want.collect::<Vec<String>>());
}

#[test]
fn an_index_is_converted_where_it_is_an_image_and_kept_where_it_is_not() {
    let sample = Sample::new();
    let registry = Registry::plain().unwrap();
    let (source, target) = (sample.source("many"), registry.reference("other/many:rafs"));
    let done = convert(&source, &target).done();
    let was = tagged(&sample.path("source"), "many");
    let is = registry.manifest("other/many:rafs").unwrap();
    assert_eq!(done["copied"], json!([sample.attestation.digest, sample.artifact.digest]));
    let (mut before, mut after) = (was.clone(), is.clone());
    for at in 0..2 {
        let entry = &is["manifests"][at];
        assert_eq!(entry["digest"], done["images"][at]["digest"]);
        assert_eq!(entry["platform"], was["manifests"][at]["platform"]);
        for index in [&mut before, &mut after] {
            let entry = index["manifests"][at].as_object_mut().unwrap();
            entry.remove("digest").unwrap();
            entry.remove("size").unwrap();
        }
    }
    assert_eq!(after, before, "all but the digests and sizes of images stays");
    assert_eq!(done["totals"]["layers"], 4, "layers that both images have are converted once");
    // Everything is there: skopeo copies it.
    registry.pull("other/many:rafs", &format!("oci:{}:x", sample.path("amd64").display())).unwrap();
    let all = format!("oci:{}:x", sample.path("all").display());
    run(registry.skopeo("copy", "src").args(["--all", &format!("docker://{target}"), &all]));

    // One platform, with its attestation and what is of none.
    let arm =
        convert(&source, &registry.reference("arm:1")).args(&["--platform", "linux/arm64"]).done();
    assert_eq!(arm["images"].as_array().unwrap().len(), 1);
    assert_eq!(arm["images"][0]["digest"], done["images"][1]["digest"]);
    assert_eq!(arm["copied"], json!([sample.artifact.digest]));
    let amd =
        convert(&source, &registry.reference("amd:1")).args(&["--platform", "linux/amd64"]).done();
    assert_eq!(amd["copied"], done["copied"]);
    let said =
        convert(&source, &registry.reference("no:1")).args(&["--platform", "linux/s390x"]).fails();
    assert!(said.contains("no image for linux/s390x"), "{said}");
    let said = convert(&sample.source("one"), &registry.reference("no:1"))
        .args(&["--platform", "linux/arm64"])
        .fails();
    assert!(said.contains("the image is for linux/amd64, not for linux/arm64"), "{said}");
}

#[test]
fn docker_manifests_and_archives_give_the_same_blobs() {
    let sample = Sample::new();
    let registry = Registry::plain().unwrap();
    let want = {
        let to = format!("oci:{}:x", sample.path("out").display());
        blobs(&convert(&sample.source("one"), &to).done())
    };
    registry.push(&sample.source("gzip"), "docker:1", &["--format", "v2s2"]).unwrap();
    let docker =
        convert(&registry.reference("docker:1"), &registry.reference("docker:rafs")).done();
    assert_eq!(blobs(&docker), want);
    let manifest = registry.manifest("docker:rafs").unwrap();
    let kinds = [
        &manifest["mediaType"],
        &manifest["config"]["mediaType"],
        &manifest["layers"][4]["mediaType"],
    ];
    assert_eq!(
        kinds.map(|kind| kind.as_str().unwrap()),
        [
            "application/vnd.docker.distribution.manifest.v2+json",
            "application/vnd.docker.container.image.v1+json",
            "application/vnd.docker.image.rootfs.diff.tar.gzip",
        ]
    );
    let archives = [
        (format!("docker-archive:{}:some/image:tag", sample.path("docker.tar").display())),
        (format!("oci-archive:{}:tag", sample.path("oci.tar").display())),
    ];
    for (number, archive) in archives.iter().enumerate() {
        registry.pull("docker:1", archive).unwrap();
        let target = registry.reference(&format!("archive{number}:rafs"));
        assert_eq!(blobs(&convert(archive, &target).done()), want, "{archive}");
        let said = convert(&sample.source("one"), archive).fails();
        assert!(said.contains("archives are only read"), "{said}");
    }
}

#[test]
fn chunks_of_a_dictionary_are_not_stored_again() {
    let sample = Sample::new();
    let registry = Registry::plain().unwrap();
    // The dictionary has the large file of the image.
    let other = sample.path("other");
    let layout = Layout::create(&other).unwrap();
    let tar = Tar::new().file("big", &noise(3_500_000, 1)).end();
    layout.put_blob(&tar).unwrap();
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [Digest::sha256(&tar)]},
    })
    .to_string();
    layout.put_blob(config.as_bytes()).unwrap();
    let manifest = json!({
        "schemaVersion": 2, "config": Descriptor::of(OCI_CONFIG, config.as_bytes()),
        "layers": [Descriptor::of(TAR, &tar)],
    })
    .to_string();
    layout.put_blob(manifest.as_bytes()).unwrap();
    layout.tag(Descriptor::of(OCI_MANIFEST, manifest.as_bytes()), Some("dict")).unwrap();
    let dictionary = registry.reference("dictionary:1");
    let made = convert(&format!("oci:{}:dict", other.display()), &dictionary).done();
    let dictionary_blob = blobs(&made).remove(0);

    let option = format!("bootstrap:registry:{dictionary}");
    let target = registry.reference("app:rafs");
    let done = convert(&sample.source("one"), &target).args(&["--chunk-dict", &option]).done();
    assert_eq!(done["images"][0]["dictionary_blobs"], json!([dictionary_blob]));
    let plain = convert(&sample.source("one"), &registry.reference("plain:rafs")).done();
    let bytes = |summary: &Value| summary["totals"]["blob_bytes"].as_u64().unwrap();
    assert!(bytes(&done) + 6_900_000 < bytes(&plain), "{} and {}", bytes(&done), bytes(&plain));
    let manifest = registry.manifest("app:rafs").unwrap();
    assert_eq!(manifest["layers"][4]["digest"], json!(dictionary_blob));
    assert_eq!(manifest["layers"].as_array().unwrap().len(), 6);
    // Again, from a file and into a layout: its blob is copied there from beside the file.
    let pulled = sample.path("pulled");
    registry.pull("dictionary:1", &format!("oci:{}:x", pulled.display())).unwrap();
    let beside = built(&pulled, &tagged(&pulled, "x"), &pulled.join("blobs/sha256"));
    let option = format!("bootstrap={}", beside.bootstrap.display());
    let out = sample.path("out");
    let to = format!("oci:{}:x", out.display());
    let again = convert(&sample.source("one"), &to).args(&["--chunk-dict", &option]).done();
    assert_eq!(digest(&again), digest(&done));
    let built = built(&out, &tagged(&out, "x"), sample.dir.path());
    build_support::check(&built);
    // With other chunks it is of no use.
    let wrong = convert(&sample.source("one"), &to)
        .args(&["--chunk-dict", &option, "--chunk-size", "0x1000"])
        .fails();
    assert!(wrong.contains("see --chunk-size"), "{wrong}");
}

#[test]
fn what_is_not_what_it_says_is_not_converted() {
    let sample = Sample::new();
    let registry = Registry::plain().unwrap();
    registry.push(&sample.source("one"), "app:1", &["--preserve-digests"]).unwrap();
    let (source, target) = (registry.reference("app:1"), registry.reference("app:rafs"));
    let said = convert(&registry.reference("app:none"), &target).fails();
    assert!(said.contains("app:none does not exist"), "{said}");
    convert(&source, &registry.reference("done:1")).done();
    let said = convert(&registry.reference("done:1"), &target).fails();
    assert!(said.contains("it is a RAFS image already"), "{said}");

    // One bit of a layer.
    let manifest = registry.manifest("app:1").unwrap();
    let layer = manifest["layers"][3]["digest"].as_str().unwrap();
    let file = registry.blob_file(layer);
    let mut bytes = fs::read(&file).unwrap();
    bytes[2_000_000] ^= 1;
    fs::write(&file, &bytes).unwrap();
    let said = convert(&source, &target).fails();
    assert!(said.contains(layer) && said.contains("does not match its digest"), "{said}");
    // All of it.
    fs::remove_file(&file).unwrap();
    let said = convert(&source, &target).fails();
    assert!(said.contains(layer) && said.contains("does not exist"), "{said}");
    let tags = run(registry
        .skopeo("list-tags", "")
        .arg(format!("docker://{}", registry.reference("app"))));
    assert!(!tags.contains("rafs"), "a tag of an image that is not there: {tags}");
}

/// Passes bytes on to a registry. Connections up to the `bad`th are cut after so many bytes.
fn bad_network(to: u16, bad: u64) -> (u16, Arc<AtomicU64>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let cuts = Arc::new(AtomicU64::new(0));
    let counted = cuts.clone();
    // Ends with the test program.
    thread::spawn(move || {
        for (number, client) in listener.incoming().enumerate() {
            let number = number as u64;
            let Ok(client) = client else { return };
            let Ok(server) = TcpStream::connect(("127.0.0.1", to)) else { return };
            // From 300 kB to 2 MB, other each time.
            let budget =
                if number < bad { 300_000 + number * 7_919_000 % 1_700_000 } else { u64::MAX };
            let (passed, cuts) = (Arc::new(AtomicU64::new(0)), counted.clone());
            for (mut from, mut to) in [
                (client.try_clone().unwrap(), server.try_clone().unwrap()),
                (server.try_clone().unwrap(), client.try_clone().unwrap()),
            ] {
                let (passed, cuts) = (passed.clone(), cuts.clone());
                thread::spawn(move || {
                    let mut buffer = [0; 16 << 10];
                    while let Ok(n @ 1..) = from.read(&mut buffer) {
                        if passed.fetch_add(n as u64, Ordering::SeqCst) > budget {
                            cuts.fetch_add(1, Ordering::SeqCst);
                            break;
                        }
                        if to.write_all(&buffer[..n]).is_err() {
                            break;
                        }
                    }
                    from.shutdown(Shutdown::Both).ok();
                    to.shutdown(Shutdown::Both).ok();
                });
            }
        }
    });
    (port, cuts)
}

#[test]
fn a_network_that_breaks_again_and_again_does_no_harm() {
    let sample = Sample::new();
    let registry = Registry::plain().unwrap();
    registry.push(&sample.source("one"), "app:1", &["--preserve-digests"]).unwrap();
    let want = convert(&registry.reference("app:1"), &registry.reference("well:rafs")).done();
    let (port, cuts) = bad_network(registry.port(), 12);
    let through = |name: &str| format!("127.0.0.1:{port}/{name}");
    let done = convert(&through("app:1"), &through("ill:rafs")).done();
    assert_eq!(digest(&done), digest(&want));
    let cuts = cuts.load(Ordering::SeqCst);
    assert!(cuts >= 5, "only {cuts} connections were cut");
    let manifest = registry.manifest("ill:rafs").unwrap();
    assert_eq!(manifest, registry.manifest("well:rafs").unwrap());
}

#[test]
fn images_without_layers_and_with_one_twice_are_images() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    let layout = Layout::create(&source).unwrap();
    let tar = Tar::new().dir("d").file("d/f", b"content").end();
    layout.put_blob(&tar).unwrap();
    let layer = Descriptor::of(TAR, &tar);
    let image = |tag: &str, count: usize| {
        let diff_ids = vec![Digest::sha256(&tar); count];
        let config = json!({
            "architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids},
        })
        .to_string();
        layout.put_blob(config.as_bytes()).unwrap();
        let manifest = json!({
            "schemaVersion": 2, "config": Descriptor::of(OCI_CONFIG, config.as_bytes()),
            "layers": vec![layer.clone(); count],
        })
        .to_string();
        layout.put_blob(manifest.as_bytes()).unwrap();
        layout.tag(Descriptor::of(OCI_MANIFEST, manifest.as_bytes()), Some(tag)).unwrap();
    };
    // (layers, paths of the image)
    for (count, paths) in [(0, 1), (2, 3)] {
        let tag = format!("of{count}");
        image(&tag, count);
        let target = dir.path().join(&tag);
        let to = format!("oci:{}:x", target.display());
        let done = convert(&format!("oci:{}:{tag}", source.display()), &to).done();
        assert_eq!(done["images"][0]["paths"], paths);
        let manifest = tagged(&target, "x");
        assert_eq!(manifest["layers"].as_array().unwrap().len(), count + 1);
        let config = blob_of(&target, &manifest["config"]);
        assert_eq!(config["rootfs"]["diff_ids"].as_array().unwrap().len(), count + 1);
        assert_eq!(config.get("history"), None, "there was none");
        build_support::check(&built(&target, &manifest, dir.path()));
    }
    let same = format!("oci:{}:of2", source.display());
    let said = convert(&same, &same).fails();
    assert!(said.contains("the original would lose its name"), "{said}");
}

#[test]
fn help_is_the_documentation() {
    let file = build_support::repository().join("guest-tests/snapshots/rafs-convert-help.txt");
    let help = build_support::rafs(&["convert", "--help"], b"").stdout;
    let help = String::from_utf8(help).unwrap();
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        fs::write(&file, &help).unwrap();
    }
    let want = fs::read_to_string(&file).unwrap();
    assert_eq!(help, want, "if this is meant, run the test with UPDATE_SNAPSHOTS=1");
}
