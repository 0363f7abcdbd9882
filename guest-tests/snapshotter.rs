//! The real nydus-snapshotter with the real containerd and runc, and rafsd in nydusd's place: pull, run, read, lose
//! and replace daemons, update, remove. The machine is set up as docs/snapshotter.md says, from the files of
//! `kata-config/` as they are.
//!
//! Needs root and `scripts/parts containerd-1 containerd-2 nydus-snapshotter nydusctl registry skopeo umoci tools`.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is how a test fails")]

mod support {
    // Each test program uses its own part of these.
    #![allow(dead_code)]
    pub mod node;
    pub mod parts;
    pub mod registry;
}

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use base64::Engine;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use support::node::{Containerd, Node, wait_for};
use support::parts::{Parts, run};
use support::registry::{Registry, Setup};

/// Reads all of `/data` again and again, past the page cache, so that every round asks the daemon. Each line is the
/// name of a file and the digest of what was read of it.
const READER: &str = r#"
cd /data
while :; do
    for file in *; do
        sum=$(dd if=$file bs=64k iflag=direct 2>/tmp/error | sha256sum) || sum=failed
        echo $file ${sum%% *}
        grep -i error /tmp/error
    done
    sleep 0.1
done
"#;

/// The snapshotter's directory on the node.
const ROOT: &str = "/var/lib/containerd/io.containerd.snapshotter.v1.nydus";

/// An image with a busybox and files of noise, converted in the registry: the digests of `/data` by name.
fn image(registry: &Registry, name: &str, files: &[(&str, usize)]) -> BTreeMap<String, String> {
    let parts = Parts::install(&["tools", "umoci"]).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (base, data) = (dir.path().join("base"), dir.path().join("data"));
    for path in ["bin", "data", "dev", "proc", "sys", "tmp"] {
        fs::create_dir_all(base.join(path)).unwrap();
    }
    fs::copy(parts.path("guest_root").unwrap().join("bin/busybox"), base.join("bin/busybox"))
        .unwrap();
    for applet in ["cat", "dd", "grep", "ls", "mv", "rm", "sh", "sha256sum", "sleep", "touch"] {
        symlink("busybox", base.join("bin").join(applet)).unwrap();
    }
    // What the second layer hides. Made in the same second, layers of two images were one otherwise.
    fs::write(base.join("data").join(files[0].0), format!("of the first layer of {name}")).unwrap();
    fs::create_dir(&data).unwrap();
    for (seed, (file, len)) in files.iter().enumerate() {
        fs::write(data.join(file), noise(*len, name, seed)).unwrap();
    }
    let umoci = parts.path("umoci").unwrap();
    let layout = format!("{}:latest", dir.path().join("layout").display());
    let umoci = |arguments: &[&str]| run(Command::new(&umoci).args(arguments)).unwrap();
    umoci(&["init", "--layout", layout.strip_suffix(":latest").unwrap()]);
    umoci(&["new", "--image", &layout]);
    umoci(&["insert", "--image", &layout, base.to_str().unwrap(), "/"]);
    umoci(&["insert", "--image", &layout, data.to_str().unwrap(), "/data"]);
    registry.push(&format!("oci:{layout}"), &format!("{name}:source"), &[]).unwrap();
    let mut convert = Command::new(env!("CARGO_BIN_EXE_rafs"));
    convert
        .arg("convert")
        .args(["--source", &registry.reference(&format!("{name}:source"))])
        .args(["--target", &registry.reference(&format!("{name}:rafs"))])
        .arg("--ca-file")
        .arg(registry.ca())
        .env("DOCKER_CONFIG", registry.docker_config());
    run(&mut convert).unwrap();
    let entries = fs::read_dir(&data).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| (base_name(&path), digest(&fs::read(&path).unwrap()))).collect()
}

fn base_name(path: &Path) -> String {
    path.file_name().unwrap().to_str().unwrap().to_owned()
}

/// Bytes that do not compress.
fn noise(len: usize, name: &str, seed: usize) -> Vec<u8> {
    let block = |n: usize| Sha256::digest(format!("{name} {seed} {n}"));
    let mut bytes: Vec<u8> = (0..=len / 32).flat_map(block).collect();
    bytes.truncate(len);
    bytes
}

fn digest(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// A registry with a user and TLS.
fn registry() -> Registry {
    let user = Some(("someone".to_owned(), "pass:word".to_owned()));
    Registry::start(Setup { user, tls: true }).unwrap()
}

/// Containers of one test; the name is also that of a cgroup of the host.
fn container(name: &str) -> String {
    format!("rafsd-test-{}-{name}", std::process::id())
}

/// What `sha256sum *` in `/data` prints.
fn sums(digests: &BTreeMap<String, String>) -> String {
    digests.iter().map(|(file, digest)| format!("{digest}  {file}\n")).collect()
}

/// A container that reads all the time.
struct Reading<'a> {
    node: &'a Node,
    id: String,
    digests: &'a BTreeMap<String, String>,
}

impl Reading<'_> {
    /// Lines so far; every one is right.
    fn lines(&self) -> usize {
        let output = self.node.output(&self.id);
        let whole = output.rsplit_once('\n').map_or("", |(whole, _)| whole);
        for line in whole.lines() {
            let (file, digest) = line.split_once(' ').unwrap_or_else(|| panic!("{line}"));
            assert_eq!(self.digests.get(file).map(String::as_str), Some(digest), "{line}");
        }
        whole.lines().count()
    }

    /// It reads on: all files, from the daemon that runs now.
    fn goes_on(&self) {
        let before = self.lines();
        let wanted = before + 2 * self.digests.len();
        wait_for("the container reads on", || (self.lines() >= wanted).then_some(())).unwrap();
    }
}

/// The snapshotter has a copy of its daemon's session: one that dies or is replaced before cannot be followed.
const HAS_SESSION: &str = " receives states.";

/// The snapshotter notices when its daemon dies.
const WATCHES: &str = "Subscribe daemon ";

/// Kills the one daemon, once the snapshotter has logged `when`.
fn kill_daemon(node: &Node, when: &str) -> u64 {
    node.wait_for_log(when).unwrap();
    let daemons = node.daemons().unwrap();
    assert_eq!(daemons.len(), 1, "{daemons:?}");
    let (pid, _) = daemons.first_key_value().unwrap();
    node.inside(&["kill", "-KILL", &pid.to_string()]).unwrap();
    *pid
}

/// The one daemon, once it is another one than `old` and runs.
fn next_daemon(node: &Node, old: u64) -> u64 {
    wait_for("another daemon", || {
        let daemons = node.daemons().ok()?;
        let (pid, _) = daemons.first_key_value()?;
        (*pid != old && daemons.len() == 1).then_some(*pid)
    })
    .unwrap()
}

/// The units of kata-config/systemd, with bootstrap and config as the snapshotter has made them.
fn units_serve_an_image(node: &Node, digests: &BTreeMap<String, String>) {
    let root = node.path(ROOT);
    let image = node.path("/var/lib/rafsd/one");
    fs::create_dir_all(&image).unwrap();
    let config = fs::read_dir(root.join("config")).unwrap().next().unwrap().unwrap().path();
    fs::copy(config.join("config.json"), image.join("config.json")).unwrap();
    fs::copy(root.join("snapshots/3/fs/image/image.boot"), image.join("image.boot")).unwrap();

    let (unit, data) = ("rafsd-mount@.service", "/var/lib/rafsd/one/mnt/data");
    let sums = || node.inside(&["sh", "-c", &format!("cd {data} && sha256sum *")]).ok();
    let child = node.start_unit(unit, "one").unwrap();
    assert_eq!(wait_for("the mount", sums).unwrap(), self::sums(digests));
    node.stop_unit(unit, child, "-KILL").unwrap();
    assert_eq!(sums(), None, "nobody serves it");
    let child = node.start_unit(unit, "one").unwrap();
    assert_eq!(wait_for("the mount", sums).unwrap(), self::sums(digests));
    assert!(node.stop_unit(unit, child, "-TERM").unwrap().success());
    assert!(!node.mounts().unwrap().iter().any(|at| at.starts_with("/var/lib/rafsd")));

    let unit = "rafsd-virtiofs@.service";
    let child = node.start_unit(unit, "one").unwrap();
    let socket = node.path("/run/rafsd/one/fs.sock");
    wait_for("the socket", || UnixStream::connect(&socket).ok()).unwrap();
    assert!(node.stop_unit(unit, child, "-TERM").unwrap().success());
}

/// What Kata is told of an image: bootstrap and config are in the mount as the snapshotter hands it to containerd, and
/// a daemon for a virtual machine mounts what they say.
#[test]
fn kata_is_told_where_an_image_is() {
    let registry = registry();
    image(&registry, "one", &[("a", 1000)]);
    let node = Node::start(Containerd::V2, "config-kata.toml", &registry).unwrap();
    node.pull("one:rafs").unwrap();
    let snapshots = ["snapshots", "--snapshotter", "nydus"];
    let list = node.ctr(&[&snapshots[..], &["list"]].concat()).unwrap();
    let rows: Vec<Vec<&str>> = list.lines().map(|row| row.split_whitespace().collect()).collect();
    // KEY PARENT KIND; the first layer has no parent.
    let parents: BTreeSet<&str> =
        rows.iter().filter(|row| row.len() == 3).map(|row| row[1]).collect();
    let top = rows[1..].iter().map(|row| row[0]).find(|key| !parents.contains(key)).unwrap();
    let prepare = ["prepare", "--target", "/mnt", "of-a-sandbox", top];
    let mount = node.ctr(&[&snapshots[..], &prepare].concat()).unwrap();
    assert!(mount.contains("fuse.nydus-overlayfs"), "{mount}");
    let (_, option) = mount.split_once("extraoption=").unwrap();
    let end = option.find(|c: char| c == ',' || c.is_whitespace()).unwrap_or(option.len());
    let option = base64::engine::general_purpose::STANDARD.decode(&option[..end]).unwrap();
    let told: Value = serde_json::from_slice(&option).unwrap();
    assert_eq!(told["fs_version"], "v6");

    let child = node
        .start_program(&["rafsd", "virtiofs", "--apisock", "/run/a", "--sock", "/run/s"])
        .unwrap();
    let socket = node.path("/run/a");
    wait_for("the daemon", || UnixStream::connect(&socket).ok()).unwrap();
    let body = json!({"fs_type": "rafs", "source": told["source"], "config": told["config"]});
    let path = "/api/v1/mount?mountpoint=/rafs/c1/lowerdir";
    node.ask("/run/a", "POST", path, Some(body)).unwrap();
    let info: Value =
        serde_json::from_str(&node.ask("/run/a", "GET", "/api/v1/daemon", None).unwrap()).unwrap();
    assert_eq!(info["backend_collection"]["/rafs/c1/lowerdir"]["backend_type"], "Rafs", "{info}");
    node.stop_unit("rafsd", child, "-TERM").unwrap();
}

/// All commands of nydusctl, with the program itself, beside one image and one shared directory.
#[test]
fn nydusctl_asks_a_daemon_everything() {
    let parts = Parts::install(&["nydusctl"]).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (socket, log) = (dir.path().join("api.sock"), dir.path().join("rafsd.log"));
    let mut daemon = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "--", env!("CARGO_BIN_EXE_rafsd"), "virtiofs"])
        .args(["--sock".as_ref(), dir.path().join("fs.sock").as_os_str()])
        .args(["--apisock".as_ref(), socket.as_os_str(), "--log-file".as_ref(), log.as_os_str()])
        .spawn()
        .unwrap();
    wait_for("the daemon", || UnixStream::connect(&socket).ok()).unwrap();
    let nydusctl = |arguments: &[&str]| {
        let mut command = Command::new(parts.path("nydusctl").unwrap());
        let output = run(command.arg("--sock").arg(&socket).args(arguments)).unwrap();
        String::from_utf8(output).unwrap()
    };

    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest-tests/golden/v6-zstd");
    let config = json!({
        "device": {
            "backend": {"type": "localfs", "config": {"dir": golden.join("blobs")}},
            "cache": {"type": "blobcache", "config": {"work_dir": dir.path().join("cache")}},
        },
        "mode": "direct",
    });
    let (document, empty) = (dir.path().join("config.json"), dir.path().join("empty"));
    fs::write(&document, config.to_string()).unwrap();
    fs::write(&empty, "").unwrap();
    let mount = |source: &Path, config: &Path, at: &str, kind: &str| {
        let (source, config) = (source.to_str().unwrap(), config.to_str().unwrap());
        nydusctl(&["mount", "-s", source, "-c", config, "-m", at, "-t", kind]);
    };
    mount(&golden.join("bootstrap"), &document, "/rafs/c1/lowerdir", "rafs");
    mount(dir.path(), &empty, "/containers", "passthrough_fs");
    let info = nydusctl(&["info"]);
    for shown in ["RUNNING", "/rafs/c1/lowerdir", "Rafs", "/containers", "PassthroughFs"] {
        assert!(info.contains(shown), "{info}");
    }
    let raw: Value = serde_json::from_str(&nydusctl(&["--raw", "info"])).unwrap();
    assert_eq!(raw["state"], "RUNNING");
    nydusctl(&["set", "log-level", "debug"]);
    assert!(nydusctl(&["metrics", "fsstats"]).contains("FOP Counters"));
    assert!(nydusctl(&["metrics", "backend"]).contains("localfs"));
    assert!(nydusctl(&["metrics", "cache"]).contains(".blob.data"));
    nydusctl(&["umount", "/rafs/c1/lowerdir"]);
    nydusctl(&["umount", "/containers"]);
    assert!(!nydusctl(&["info"]).contains("Instances"));
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    assert!(fs::read_to_string(log).unwrap().contains("DEBUG"), "the level was changed");
}

/// An address of this host that nobody listens on.
fn free_address() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

/// The data files in the cache.
fn cached(node: &Node) -> BTreeSet<String> {
    let entries = fs::read_dir(node.path(ROOT).join("cache")).unwrap().flatten();
    let names = entries.map(|entry| base_name(&entry.path()));
    names.filter(|name| name.ends_with(".layer.disk")).collect()
}

/// Has the snapshotter put a new program in the place of its daemons.
fn upgrade(node: &Node) {
    node.wait_for_log(HAS_SESSION).unwrap();
    let new = json!({ "nydusd_path": env!("CARGO_BIN_EXE_rafsd"), "version": "new", "policy": "" });
    node.system("PUT", "/api/v1/daemons/upgrade", Some(new)).unwrap();
}

/// Nothing is left of images that were removed.
fn nothing_is_left(node: &Node) {
    wait_for("mounts are gone", || node.mounts().ok()?.is_empty().then_some(())).unwrap();
    assert!(node.daemons().unwrap().is_empty());
    assert_eq!(cached(node), BTreeSet::new(), "the snapshotter has collected all data");
    let snapshots: Vec<_> = fs::read_dir(node.path(ROOT).join("snapshots")).unwrap().collect();
    assert!(snapshots.is_empty(), "{snapshots:?}");
}

#[test]
fn a_daemon_for_each_image() {
    let registry = registry();
    let one = image(&registry, "one", &[("a", 1_500_000), ("b", 700_000), ("c", 10)]);
    let two = image(&registry, "two", &[("a", 900_000), ("d", 4096)]);
    let mut node = Node::start(Containerd::V1, "config.toml", &registry).unwrap();

    node.pull("one:rafs").unwrap();
    assert!(node.daemons().unwrap().is_empty(), "a pull starts no daemon");
    let output = node.run("one:rafs", &container("sums"), "cd /data && sha256sum *").unwrap();
    assert_eq!(output, sums(&one), "the files of the source");
    let line = "cd /data && rm a && echo new >b && mv c e && ls && cat b e | sha256sum";
    let output = node.run("one:rafs", &container("writes"), line).unwrap();
    let changed = digest(&[b"new\n", &noise(10, "one", 2)[..]].concat());
    assert_eq!(output, format!("b\ne\n{changed}  -\n"));

    units_serve_an_image(&node, &one);

    // A reader sees nothing of what becomes of its daemon.
    let id = container("reads");
    node.run_on("one:rafs", &id, READER).unwrap();
    let pid = {
        let reading = Reading { node: &node, id: id.clone(), digests: &one };
        reading.goes_on();
        let mut pid = 0;
        for _ in 0..2 {
            pid = next_daemon(&node, kill_daemon(&node, HAS_SESSION));
            reading.goes_on();
        }
        pid
    };

    // Nor of the snapshotter's. Started again, it is told to hand credentials on when they have changed.
    let before = Reading { node: &node, id: id.clone(), digests: &one }.lines();
    node.stop_snapshotter().unwrap();
    Reading { node: &node, id: id.clone(), digests: &one }.goes_on();
    let renewal = "[remote.auth]\ncredential_renewal_interval = \"500ms\"\n";
    node.edit_config(|text| format!("{text}\n{renewal}")).unwrap();
    node.start_snapshotter().unwrap();
    wait_for("new credentials", || {
        node.daemon_logs().contains("config changed: registry_auth").then_some(())
    })
    .unwrap();
    let reading = Reading { node: &node, id: id.clone(), digests: &one };
    assert!(reading.lines() > before);
    assert_eq!(node.daemons().unwrap().keys().collect::<Vec<_>>(), [&pid], "it was found again");
    reading.goes_on();
    let pid = next_daemon(&node, kill_daemon(&node, HAS_SESSION));
    reading.goes_on();

    // An update puts the new program in the old one's place.
    upgrade(&node);
    let pid = next_daemon(&node, pid);
    reading.goes_on();

    // Another image has another daemon, and does not live longer than it should.
    node.pull("two:rafs").unwrap();
    let output = node.run("two:rafs", &container("two"), "cd /data && sha256sum *").unwrap();
    assert_eq!(output, sums(&two));
    assert_eq!(node.mounts().unwrap().len(), 2);
    assert_eq!(cached(&node).len(), 4, "a file for each layer");
    let usage = node.ctr(&["snapshots", "--snapshotter", "nydus", "usage", "-b"]).unwrap();
    let sizes =
        usage.lines().filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    assert!(sizes.sum::<u64>() > 3_000_000, "containerd knows what the cache takes:\n{usage}");
    node.remove_image("two:rafs").unwrap();
    wait_for("one daemon", || (node.mounts().ok()?.len() == 1).then_some(())).unwrap();
    assert_eq!(cached(&node).len(), 2, "what the other image needs stays");
    reading.goes_on();

    // When both die, containers lose their files, and new ones have them again.
    node.kill_snapshotter().unwrap();
    node.inside(&["kill", "-KILL", &pid.to_string()]).unwrap();
    node.start_snapshotter().unwrap();
    let output = node.run("one:rafs", &container("again"), "cd /data && sha256sum *").unwrap();
    assert_eq!(output, sums(&one));

    node.kill_container(&id).unwrap();
    node.remove_image("one:rafs").unwrap();
    nothing_is_left(&node);
}

#[test]
fn one_daemon_for_all_images() {
    let registry = registry();
    let one = image(&registry, "one", &[("a", 1_500_000), ("b", 700_000), ("c", 10)]);
    let two = image(&registry, "two", &[("a", 900_000), ("d", 4096)]);
    let mut node = Node::start(Containerd::V2, "config-shared.toml", &registry).unwrap();
    assert_eq!(node.daemons().unwrap().len(), 1, "it is there before any image");

    node.pull("one:rafs").unwrap();
    node.pull("two:rafs").unwrap();
    let id = container("reads");
    node.run_on("one:rafs", &id, READER).unwrap();
    let output = node.run("two:rafs", &container("two"), "cd /data && sha256sum *").unwrap();
    assert_eq!(output, sums(&two));
    let instances = |node: &Node| -> BTreeSet<String> {
        let daemons = node.daemons().unwrap();
        let (_, daemon) = daemons.first_key_value().unwrap();
        daemon["instances"].as_object().unwrap().keys().cloned().collect()
    };
    assert_eq!(instances(&node).len(), 2);

    let reading = Reading { node: &node, id: id.clone(), digests: &one };
    reading.goes_on();
    let pid = next_daemon(&node, kill_daemon(&node, HAS_SESSION));
    reading.goes_on();
    let output = node.run("two:rafs", &container("two"), "cd /data && sha256sum *").unwrap();
    assert_eq!(output, sums(&two), "both images were taken over");
    upgrade(&node);
    next_daemon(&node, pid);
    reading.goes_on();
    node.remove_image("two:rafs").unwrap();
    assert_eq!(instances(&node).len(), 1);
    reading.goes_on();

    // The policy "restart": who had files open loses them, and new containers get them again.
    node.stop_snapshotter().unwrap();
    let address = free_address();
    node.edit_config(|text| {
        let restart = text.replace("recover_policy = \"failover\"", "recover_policy = \"restart\"");
        assert_ne!(restart, text);
        let often = "collect_interval = \"500ms\"\nhung_io_interval = \"500ms\"";
        format!("{restart}\n[metrics]\naddress = \"{address}\"\n{often}\n")
    })
    .unwrap();
    node.start_snapshotter().unwrap();
    let old = kill_daemon(&node, WATCHES);
    next_daemon(&node, old);
    let output = wait_for("the image is there again", || {
        node.run("one:rafs", &container("again"), "cd /data && sha256sum *").ok()
    });
    assert_eq!(output.unwrap(), sums(&one));
    let read = wait_for("what was read is measured", || {
        let metrics = node.metrics(&address).ok()?;
        let lines = metrics.lines().filter(|line| line.starts_with("nydusd_total_read_bytes{"));
        let values = lines.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok());
        (values.sum::<f64>() >= 2_200_000.0).then_some(())
    });
    read.expect("all files of the image");

    // A snapshotter that was started again lets even the shared daemon go with the last image.
    node.kill_container(&id).unwrap();
    node.remove_image("one:rafs").unwrap();
    nothing_is_left(&node);
}
