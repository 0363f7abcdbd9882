//! What Kata is told of an image by the real nydus-snapshotter with `kata-config/nydus-snapshotter/config-kata.toml`,
//! and that rafsd can make a mount of exactly that.
//!
//! Needs root and `scripts/parts containerd-1 containerd-2 nydus-snapshotter registry skopeo umoci tools`.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is how a test fails")]

mod compat;
mod support;
// It looks for these beside itself.
use support::{parts, registry};
#[allow(dead_code, reason = "another test program uses the rest")]
#[path = "support/node.rs"]
mod node;

use std::fs;
use std::process::Command;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use compat::KataGo;
use node::{Containerd, Node};
use parts::{Parts, run};
use registry::{Registry, Setup};
use serde_json::{Value, json};
use support::frontend::{Vm, VmConfig};

const CONTENT: &[u8] = b"of an image that is nowhere but in the registry\n";

/// Pushes an image and converts it there.
fn image(registry: &Registry) {
    let parts = Parts::install(&["tools", "umoci"]).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("file"), CONTENT).unwrap();
    let layout = format!("{}:latest", dir.path().join("layout").display());
    let umoci = |arguments: &[&str]| {
        run(Command::new(parts.path("umoci").unwrap()).args(arguments)).unwrap()
    };
    umoci(&["init", "--layout", layout.strip_suffix(":latest").unwrap()]);
    umoci(&["new", "--image", &layout]);
    umoci(&["insert", "--image", &layout, tree.to_str().unwrap(), "/data"]);
    registry.push(&format!("oci:{layout}"), "app:source", &[]).unwrap();
    let mut convert = Command::new(env!("CARGO_BIN_EXE_rafs"));
    convert.args(["convert", "--source", &registry.reference("app:source")]);
    convert.args(["--target", &registry.reference("app:rafs"), "--ca-file"]);
    convert.arg(registry.ca()).env("DOCKER_CONFIG", registry.docker_config());
    run(&mut convert).unwrap();
}

/// Key of the snapshot that a container of the only image starts from: nobody's parent.
fn top(list: &str) -> String {
    let rows: Vec<Vec<&str>> =
        list.lines().skip(1).map(|line| line.split_whitespace().collect()).collect();
    let is_parent = |key: &str| rows.iter().any(|row| row.len() == 3 && row[1] == key);
    let mut tops = rows.iter().map(|row| row[0]).filter(|key| !is_parent(key));
    let top = tops.next().unwrap_or_else(|| panic!("{list}"));
    assert_eq!(tops.next(), None, "{list}");
    top.to_owned()
}

#[test]
fn kata_is_told_where_an_image_is_and_rafsd_mounts_it() {
    let user = Some(("someone".to_owned(), "pass:word".to_owned()));
    let registry = Registry::start(Setup { user, tls: true }).unwrap();
    image(&registry);
    let node = Node::start(Containerd::V2, "config-kata.toml", &registry).unwrap();
    node.pull("app:rafs").unwrap();
    let snapshots = |arguments: &[&str]| {
        node.ctr(&[&["snapshots", "--snapshotter", "nydus"], arguments].concat()).unwrap()
    };
    snapshots(&["prepare", "container", &top(&snapshots(&["list"]))]);

    // The mount that the shim is handed: as both runtimes recognise it, and with what both insist on.
    let line = snapshots(&["mounts", "/nowhere", "container"]);
    let words: Vec<&str> = line.split_whitespace().collect();
    let after = |word: &str| words[words.iter().position(|other| *other == word).unwrap() + 1];
    assert_eq!(after("-t"), "fuse.nydus-overlayfs", "{line}");
    let options: Vec<&str> = after("-o").split(',').collect();
    let value = |key: &str| {
        let mut found = options.iter().filter_map(|option| option.strip_prefix(key));
        let value = found.next().unwrap_or_else(|| panic!("{key}: {line}"));
        assert_eq!(found.next(), None, "one of it: {line}");
        value
    };
    let extra = STANDARD.decode(value("extraoption=")).unwrap();
    let extra: Value = serde_json::from_slice(&extra).unwrap();
    let text = |key: &str| extra[key].as_str().unwrap_or_else(|| panic!("{key}: {extra}"));
    assert_eq!(text("fs_version"), "v6");
    assert!(node.path(text("source")).is_file(), "the bootstrap: {extra}");
    assert_eq!(value("upperdir="), format!("{}/fs", text("snapshotdir")));
    assert!(node.path(value("workdir=")).is_dir() && node.path(value("upperdir=")).is_dir());

    // On the node, where the registry's name and certificate are known.
    let start = "mkdir -p /run/vc/vm/s1 && cd /run/vc/vm/s1 && { rafsd virtiofs --log-level info \
                 --apisock /run/vc/vm/s1/nydusd-api.sock --sock /run/vc/vm/s1/vhost-fs.sock \
                 </dev/null >log 2>&1 & }";
    node.inside(&["sh", "-c", start]).unwrap();
    let api = node.path("/run/vc/vm/s1/nydusd-api.sock");
    node::wait_for("the API", || api.exists().then_some(())).unwrap();
    let kata = KataGo::connect(&api);
    let body = json!({"fs_type": "rafs", "source": text("source"), "config": text("config")});
    let mounted = kata.mount("/rafs/c1/lowerdir", &body);
    assert_eq!(mounted.status, 204, "{mounted:?}");
    let mut vm = Vm::boot(&node.path("/run/vc/vm/s1/vhost-fs.sock"), VmConfig::default()).unwrap();
    let mut fuse = vm.fuse(1);
    fuse.init().unwrap();
    let file = fuse.resolve(b"rafs/c1/lowerdir/data/file").unwrap();
    assert_eq!(fuse.read_all(file, 4096).unwrap(), CONTENT);
}
