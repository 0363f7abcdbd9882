//! `kata-config/`: every key is one that Kata knows, every flag one that rafsd takes, and the install script
//! puts all of it in place and takes it away again.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is how a test fails")]

mod kata;
mod support {
    // Each test program uses its own part of these.
    #![allow(dead_code)]
    pub mod parts;
}

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use kata::{
    KATA, KINDS, Runtime, Settings, Vmm, install, installer, make_node, repository, snapshot,
};
use support::parts::{Parts, run};
use toml::Table;

/// Keys of Kata's table of a hypervisor that are about the shared directory.
const KEYS: [&str; 7] = [
    "shared_fs",
    "virtio_fs_daemon",
    "valid_virtio_fs_daemon_paths",
    "virtio_fs_extra_args",
    "virtio_fs_cache",
    "virtio_fs_cache_size",
    "virtio_fs_queue_size",
];

fn text(path: &str) -> String {
    fs::read_to_string(repository().join("kata-config").join(path)).unwrap()
}

fn table(path: &str) -> Table {
    text(path).parse().unwrap_or_else(|e| panic!("{path}: {e}"))
}

#[test]
fn kata_knows_every_key_of_the_drop_ins() {
    for kind in KINDS {
        let file = format!("kata/{}.toml", kind.name);
        let all = table(&file);
        assert_eq!(all.keys().collect::<Vec<_>>(), ["hypervisor"], "{file}");
        let sections = all["hypervisor"].as_table().unwrap();
        assert_eq!(sections.keys().collect::<Vec<_>>(), [kind.section], "{file}");
        let section = sections[kind.section].as_table().unwrap();
        let mut known = BTreeSet::from(KEYS);
        if kind.runtime == Runtime::Rs {
            known.insert("virtio_fs_is_dax");
        }
        let keys: BTreeSet<&str> = section.keys().map(String::as_str).collect();
        assert_eq!(keys, known, "{file}: all of them, and no other");

        assert_eq!(section["shared_fs"].as_str(), Some("virtio-fs-nydus"), "{file}");
        assert!(
            ["never", "auto", "always"].contains(&section["virtio_fs_cache"].as_str().unwrap())
        );
        // No VMM of Kata has a window for DAX, and QEMU refuses the size of one.
        assert_eq!(section["virtio_fs_cache_size"].as_integer(), Some(0), "{file}");
        let size = section["virtio_fs_queue_size"].as_integer().unwrap();
        assert!(size.count_ones() == 1 && size <= 1024, "{file}: {size}");
        let daemon = section["virtio_fs_daemon"].as_str().unwrap();
        let valid = section["valid_virtio_fs_daemon_paths"].as_array().unwrap();
        assert!(daemon.starts_with('/') && valid.contains(&daemon.into()), "{file}");

        // Every key is explained: a comment stands above it.
        let text = text(&file);
        let lines: Vec<&str> = text.lines().collect();
        for (i, line) in lines.iter().enumerate() {
            if line.contains(" = ") && !line.starts_with('#') {
                assert!(lines[i - 1].starts_with("# "), "{file}: {line}");
            }
        }
    }
}

/// Those in force, and those that the comments propose.
#[test]
fn rafsd_takes_every_flag_of_the_drop_ins() {
    for kind in KINDS {
        let text = text(&format!("kata/{}.toml", kind.name));
        let lists = text.lines().filter_map(|line| line.split_once("virtio_fs_extra_args = "));
        let lists: Vec<&str> = lists.map(|(_, list)| list).collect();
        assert!(lists.len() > 3, "{text}");
        for list in lists {
            let line: Table = format!("list = {list}").parse().unwrap();
            let given = line["list"].as_array().unwrap().iter().map(|a| a.as_str().unwrap());
            let dir = tempfile::tempdir().unwrap();
            let mut command = Command::new(env!("CARGO_BIN_EXE_rafsd"));
            command.args(["virtiofs", "--log-level", "info", "--apisock", "A", "--sock", "S"]);
            command.args(given).args(["--help"]).current_dir(dir.path()).stdin(Stdio::null());
            let output = command.output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(0), "{list}: {said}");
        }
    }
}

#[test]
fn a_runtime_class_leads_to_its_configuration() {
    let classes = text("kubernetes/runtimeclass.yaml");
    let pod = text("kubernetes/pod.yaml");
    // (file, version, plugin of the runtimes)
    let files = [
        ("containerd/kata-v2.toml", 2, "io.containerd.grpc.v1.cri"),
        ("containerd/kata-v3.toml", 3, "io.containerd.cri.v1.runtime"),
    ];
    for (file, version, plugin) in files {
        let all = table(file);
        assert_eq!(all["version"].as_integer(), Some(version), "{file}");
        assert_eq!(all["proxy_plugins"]["nydus"]["type"].as_str(), Some("snapshot"), "{file}");
        let runtimes = all["plugins"][plugin]["containerd"]["runtimes"].as_table().unwrap();
        assert_eq!(runtimes.len(), KINDS.len(), "{file}");
        for kind in KINDS {
            let runtime = &runtimes[kind.class];
            assert_eq!(runtime["snapshotter"].as_str(), Some("nydus"), "{file}");
            let shim = match kind.runtime {
                Runtime::Go => "/opt/kata/bin/containerd-shim-kata-v2",
                Runtime::Rs => "/opt/kata/runtime-rs/bin/containerd-shim-kata-v2",
            };
            assert_eq!(runtime["runtime_path"].as_str(), Some(shim), "{file}");
            let path = format!("/{}/configuration.toml", kind.dir());
            assert_eq!(runtime["options"]["ConfigPath"].as_str(), Some(&*path), "{file}");
        }
    }
    for kind in KINDS {
        let class = format!("  name: {0}\nhandler: {0}\n", kind.class);
        assert!(classes.contains(&class), "{classes}");
    }
    assert!(KINDS.iter().any(|kind| pod.contains(&format!("runtimeClassName: {}\n", kind.class))));
}

/// containerd itself says what it has read: 1.7 of the file alone, 2.1 of what it imports beside settings of the node.
#[test]
fn containerd_reads_the_handlers() {
    let parts = Parts::install(&["containerd-1", "containerd-2"]).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let dump = |part: &str, config: &Path| -> Table {
        let mut command = Command::new(parts.path(part).unwrap().join("containerd"));
        let said = run(command.arg("--config").arg(config).args(["config", "dump"])).unwrap();
        String::from_utf8(said).unwrap().parse().unwrap()
    };
    let v3 = scratch.path().join("config.toml");
    let imports = repository().join("kata-config/containerd/kata-v3.toml");
    let text = format!(
        "version = 3\nimports = [\"{}\"]\n\
         [plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.mine]\n\
         runtime_type = \"io.containerd.mine.v2\"\n",
        imports.display()
    );
    fs::write(&v3, text).unwrap();
    let v2 = repository().join("kata-config/containerd/kata-v2.toml");
    let (one, two) = (dump("containerd_1", &v2), dump("containerd_2", &v3));
    let images = &two["plugins"]["io.containerd.cri.v1.images"];
    let two_runtimes = &two["plugins"]["io.containerd.cri.v1.runtime"]["containerd"]["runtimes"];
    let one_images = &one["plugins"]["io.containerd.grpc.v1.cri"]["containerd"];
    assert_eq!(two_runtimes["mine"]["runtime_type"].as_str(), Some("io.containerd.mine.v2"));
    for (all, runtimes, images) in
        [(&one, &one_images["runtimes"], one_images), (&two, two_runtimes, images)]
    {
        assert_eq!(all["proxy_plugins"]["nydus"]["type"].as_str(), Some("snapshot"));
        assert_eq!(images["disable_snapshot_annotations"].as_bool(), Some(false));
        assert_eq!(images["discard_unpacked_layers"].as_bool(), Some(false));
        for kind in KINDS {
            let runtime = &runtimes[kind.class];
            assert_eq!(runtime["snapshotter"].as_str(), Some("nydus"));
            let path = format!("/{}/configuration.toml", kind.dir());
            assert_eq!(runtime["options"]["ConfigPath"].as_str(), Some(&*path));
        }
    }
    for kind in KINDS {
        let platform = &images["runtime_platforms"][kind.class];
        assert_eq!(platform["snapshotter"].as_str(), Some("nydus"), "{kind:?}");
    }
}

#[test]
fn what_is_installed_is_undone_to_the_last_byte() {
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let root = scratch.path();
    make_node(root);
    // Things that are in the way, one of them with a mode of its own.
    let daemon = root.join("usr/local/bin/rafsd");
    fs::create_dir_all(daemon.parent().unwrap()).unwrap();
    fs::write(&daemon, "another rafsd").unwrap();
    fs::set_permissions(&daemon, Permissions::from_mode(0o700)).unwrap();
    fs::create_dir_all(root.join("etc/nydus")).unwrap();
    fs::write(root.join("etc/nydus/config.toml"), "version = 1\n").unwrap();
    let before = snapshot(root);

    let said = install(root, &["--dry-run"]);
    assert!(said.contains("would write: ") && snapshot(root) == before, "{said}");
    let check = installer(root, &["--check"]).output().unwrap();
    assert_eq!(check.status.code(), Some(1), "nothing is in place");
    assert_eq!(installer(root, &["--undo"]).output().unwrap().status.code(), Some(1));
    assert!(snapshot(root) == before);

    let said = install(root, &[]);
    assert!(said.contains(r#"imports = ["/etc/containerd/conf.d/*.toml"]"#), "{said}");
    let checked = install(root, &["--check"]);
    let installed = snapshot(root);
    assert!(!checked.contains("missing") && !checked.contains("different"), "{checked}");
    assert_eq!(fs::read(&daemon).unwrap(), fs::read(env!("CARGO_BIN_EXE_rafsd")).unwrap());
    assert_eq!(fs::metadata(&daemon).unwrap().permissions().mode() & 0o7777, 0o755);
    for kind in KINDS {
        let settings = Settings::load(root, &kind);
        assert_eq!(settings.shared_fs, "virtio-fs-nydus", "{kind:?}");
        assert_eq!(settings.extra_args, Vec::<String>::new(), "virtiofsd's arguments are gone");
        assert_eq!((settings.cache_size, settings.queue_size), (0, 1024));
        assert_eq!(settings.daemon_below(root), daemon);
    }
    // Once more changes nothing; it does not take its own files for the node's.
    install(root, &[]);
    assert!(snapshot(root) == installed);
    install(root, &["--undo"]);
    assert!(snapshot(root) == before, "all as it was");
}

#[test]
fn an_installation_elsewhere_says_so_in_its_files() {
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let root = scratch.path();
    make_node(root);
    fs::create_dir_all(root.join("usr/share")).unwrap();
    fs::rename(root.join(KATA), root.join("usr/share/kata")).unwrap();
    let arguments =
        ["--prefix", "/opt/rafsd", "--kata", "/usr/share/kata", "--without-snapshotter"];
    install(root, &arguments);
    for kind in KINDS {
        let dir = root.join("usr/share/kata/rafsd").join(kind.name);
        let all = kata::load(&dir.join("configuration.toml"));
        let daemon = all["hypervisor"][kind.section]["virtio_fs_daemon"].as_str();
        assert_eq!(daemon, Some("/opt/rafsd/bin/rafsd"), "{kind:?}");
    }
    let handlers =
        fs::read_to_string(root.join("etc/containerd/conf.d/50-kata-rafsd.toml")).unwrap();
    assert!(
        handlers.contains("\"/usr/share/kata/rafsd/qemu-go/configuration.toml\""),
        "{handlers}"
    );
    let discovery = fs::read_to_string(root.join("etc/qemu/vhost-user/50-rafsd.json")).unwrap();
    assert!(discovery.contains("\"/opt/rafsd/bin/rafsd\""), "{discovery}");
    assert!(!root.join("etc/nydus").exists() && root.join("opt/rafsd/bin/rafsd").exists());
}

/// An administrator's change is not thrown away, nor is a half-done installation lost.
#[test]
fn undo_keeps_what_was_changed_since() {
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let root = scratch.path();
    make_node(root);
    install(root, &[]);
    let drop_in = root.join(KINDS[0].dir()).join("config.d/50-rafsd.toml");
    let changed = fs::read_to_string(&drop_in).unwrap() + "# mine\n";
    fs::write(&drop_in, &changed).unwrap();
    let check = installer(root, &["--check"]).output().unwrap();
    let said = String::from_utf8_lossy(&check.stdout);
    assert!(!check.status.success() && said.contains("different: "), "{said}");
    let said = install(root, &["--undo"]);
    assert!(said.contains("changed since") && said.contains("not empty, left"), "{said}");
    assert!(!drop_in.exists() && !root.join("var").exists());
    let kept = fs::read_to_string(drop_in.with_extension("toml.changed")).unwrap();
    assert_eq!(kept, changed);
}

#[test]
fn what_cannot_work_is_refused_before_anything_is_changed() {
    let scratch = tempfile::tempdir().unwrap();
    let (node, empty) = (scratch.path().join("node"), scratch.path().join("empty"));
    make_node(&node);
    fs::create_dir(&empty).unwrap();
    let missing = scratch.path().join("missing");
    let no_programs = empty.to_str().unwrap();
    // (root, arguments, exit code, what it says)
    let cases: [(&Path, &[&str], i32, &str); 7] = [
        (&empty, &[], 1, "no configuration of Kata in"),
        (&missing, &[], 1, "there is no directory"),
        (&node, &["--bin", no_programs], 1, "cargo build --release"),
        (&node, &["--prefix", "usr"], 2, "no absolute path"),
        (&node, &["--prefix", "/a b"], 2, "has a character"),
        (&node, &["--containerd", "3"], 2, "1, 2 or none"),
        (&node, &["--remove"], 2, "unknown argument '--remove'"),
    ];
    let before = snapshot(scratch.path());
    for (root, arguments, code, says) in cases {
        let output = installer(root, arguments).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        assert!(said.contains(says), "{arguments:?}: {said}");
    }
    assert!(snapshot(scratch.path()) == before);
    // Without Kata it is only the programs, and the snapshotter's files.
    install(&empty, &["--without-kata"]);
    assert!(empty.join("usr/local/bin/rafsd").exists() && empty.join("etc/nydus").exists());
    assert!(!empty.join("opt").exists() && !empty.join("etc/containerd").exists());
}

/// Not a matter of taste: the file of a VMM that Kata calls otherwise would be read by nobody.
#[test]
fn there_is_a_drop_in_for_each_runtime_and_vmm() {
    for runtime in [Runtime::Go, Runtime::Rs] {
        for vmm in [Vmm::Qemu, Vmm::CloudHypervisor] {
            let kind =
                KINDS.iter().find(|kind| kind.runtime == runtime && kind.vmm == vmm).unwrap();
            assert!(repository().join(format!("kata-config/kata/{}.toml", kind.name)).exists());
        }
    }
}
