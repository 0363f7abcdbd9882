//! A node with Kata Containers on it, in a directory: Kata's configuration files as it ships them, what
//! `kata-config/install` makes of them, and how Kata reads that.

// Each test program uses its own part of this.
#![allow(dead_code)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use toml::{Table, Value};

/// Where Kata's files are, below the node's root.
pub const KATA: &str = "opt/kata/share/defaults/kata-containers";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runtime {
    Go,
    Rs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vmm {
    Qemu,
    CloudHypervisor,
}

/// A way to run pods: a drop-in of `kata-config/kata`.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    pub name: &'static str,
    pub runtime: Runtime,
    pub vmm: Vmm,
    /// The table of the hypervisor in Kata's configuration.
    pub section: &'static str,
    /// Kata's own file, below [`KATA`].
    base: &'static str,
    /// The RuntimeClass and its handler.
    pub class: &'static str,
}

pub const KINDS: [Kind; 4] = [
    Kind {
        name: "qemu-go",
        runtime: Runtime::Go,
        vmm: Vmm::Qemu,
        section: "qemu",
        base: "configuration-qemu.toml",
        class: "kata-rafsd-qemu",
    },
    Kind {
        name: "clh-go",
        runtime: Runtime::Go,
        vmm: Vmm::CloudHypervisor,
        section: "clh",
        base: "configuration-clh.toml",
        class: "kata-rafsd-clh",
    },
    Kind {
        name: "qemu-rs",
        runtime: Runtime::Rs,
        vmm: Vmm::Qemu,
        section: "qemu",
        base: "runtime-rs/configuration-qemu-runtime-rs.toml",
        class: "kata-rafsd-qemu-rs",
    },
    Kind {
        name: "clh-rs",
        runtime: Runtime::Rs,
        vmm: Vmm::CloudHypervisor,
        section: "cloud-hypervisor",
        base: "runtime-rs/configuration-cloud-hypervisor.toml",
        class: "kata-rafsd-clh-rs",
    },
];

impl Kind {
    pub fn named(name: &str) -> Kind {
        *KINDS.iter().find(|kind| kind.name == name).expect("one of the four")
    }

    /// The directory that the installation makes for it, below [`KATA`].
    pub fn dir(&self) -> String {
        format!("{KATA}/rafsd/{}", self.name)
    }
}

pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Makes the root of a node on which Kata is installed, with what its files say about the shared
/// directory where nobody has changed them.
pub fn make_node(root: &Path) {
    for kind in KINDS {
        let path = root.join(KATA).join(kind.base);
        let arguments = match kind.runtime {
            Runtime::Go => r#"["--thread-pool-size=1", "--announce-submounts"]"#,
            Runtime::Rs => r#"["--thread-pool-size=1", "-o", "announce_submounts"]"#,
        };
        let text = format!(
            "[hypervisor.{}]\npath = \"/opt/kata/bin/vmm\"\nenable_annotations = []\n\
             default_vcpus = 1\nshared_fs = \"virtio-fs\"\n\
             virtio_fs_daemon = \"/opt/kata/libexec/virtiofsd\"\n\
             valid_virtio_fs_daemon_paths = [\"/opt/kata/libexec/virtiofsd\"]\n\
             virtio_fs_cache_size = 0\nvirtio_fs_queue_size = 512\n\
             virtio_fs_extra_args = {arguments}\nvirtio_fs_cache = \"auto\"\n\
             [runtime]\nsandbox_cgroup_only = false\n",
            kind.section
        );
        fs::create_dir_all(path.parent().expect("it lies in KATA")).expect("a directory");
        fs::write(path, text).expect("a file");
    }
}

/// `kata-config/install` for the node below `root`, with the programs under test.
pub fn installer(root: &Path, arguments: &[&str]) -> Command {
    let programs = Path::new(env!("CARGO_BIN_EXE_rafsd")).parent().expect("a directory");
    let mut command = Command::new(repository().join("kata-config/install"));
    command.arg("--bin").arg(programs).arg("--root").arg(root).args(["--containerd", "2"]);
    command.args(arguments);
    command
}

/// Runs the installer, which succeeds; what it says.
#[track_caller]
pub fn install(root: &Path, arguments: &[&str]) -> String {
    let Output { status, stdout, stderr } = installer(root, arguments).output().expect("sh");
    let said = format!("{}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "{status}: {said}");
    said
}

/// A configuration as both runtimes read it: the file, and then what lies in `config.d` beside it, in the
/// order of names. Tables are merged; everything else replaces what was there.
pub fn load(file: &Path) -> Table {
    let parse = |path: &Path| -> Table {
        let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        text.parse().unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    };
    let mut all = parse(file);
    let dir = file.parent().expect("a file lies in a directory").join("config.d");
    let mut drop_ins: Vec<PathBuf> = fs::read_dir(dir)
        .expect("a directory")
        .map(|entry| {
            let entry = entry.expect("an entry");
            // runtime-rs refuses a symbolic link.
            assert!(entry.file_type().expect("a type").is_file());
            entry.path()
        })
        .collect();
    drop_ins.sort();
    drop_ins.iter().for_each(|path| merge(&mut all, parse(path)));
    all
}

fn merge(into: &mut Table, from: Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(Value::Table(into)), Value::Table(from)) => merge(into, from),
            (_, value) => {
                into.insert(key, value);
            }
        }
    }
}

/// What Kata takes from its configuration about the shared directory.
#[derive(Clone, Debug)]
pub struct Settings {
    pub shared_fs: String,
    pub daemon: PathBuf,
    pub extra_args: Vec<String>,
    pub cache: String,
    pub cache_size: i64,
    pub queue_size: i64,
}

impl Settings {
    /// Of the node below `root`, where `kata-config/install` has run.
    pub fn load(root: &Path, kind: &Kind) -> Settings {
        let all = load(&root.join(kind.dir()).join("configuration.toml"));
        let table = &all["hypervisor"][kind.section];
        let text = |key: &str| table[key].as_str().expect(key).to_owned();
        let number = |key: &str| table[key].as_integer().expect(key);
        let arguments = table["virtio_fs_extra_args"].as_array().expect("a list");
        Settings {
            shared_fs: text("shared_fs"),
            daemon: text("virtio_fs_daemon").into(),
            extra_args: arguments.iter().map(|a| a.as_str().expect("text").to_owned()).collect(),
            cache: text("virtio_fs_cache"),
            cache_size: number("virtio_fs_cache_size"),
            queue_size: number("virtio_fs_queue_size"),
        }
    }

    /// The daemon's file on this host, for a node below `root`.
    pub fn daemon_below(&self, root: &Path) -> PathBuf {
        root.join(self.daemon.strip_prefix("/").expect("Kata wants an absolute path"))
    }
}

/// All files and directories below `root` with their modes and contents.
pub fn snapshot(root: &Path) -> Vec<(PathBuf, u32, Vec<u8>)> {
    let mut all: Vec<_> = walkdir::WalkDir::new(root)
        .into_iter()
        .map(|entry| {
            let entry = entry.expect("an entry");
            let kind = entry.file_type();
            let content =
                if kind.is_file() { fs::read(entry.path()).expect("a file") } else { vec![] };
            let target = fs::read_link(entry.path()).unwrap_or_default();
            let mode = entry.metadata().expect("metadata").permissions().mode();
            (entry.path().join(target), mode, content)
        })
        .collect();
    all.sort();
    all
}
