//! A run in the shape of Kata Containers: a node on which `kata-config/install` was run, the runtime's side on the
//! host (`kata/sandbox.rs`), the agent's side in a guest (`init/kata-job.sh`), three containers of two images.
//! Kata itself is not here: no shim, no agent. What passes between them and the daemon is.
//!
//! It needs root. `scripts/kata-run` runs it and shows what happens.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is how a test fails")]

mod compat;
mod kata;
#[path = "kata/sandbox.rs"]
mod sandbox;
mod support {
    // Each test program uses its own part of these.
    #![allow(dead_code)]
    pub mod guest;
    pub mod initramfs;
    pub mod parts;
    pub mod tree_text;
}

use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use kata::{Kind, Runtime, Settings, install, make_node};
use sandbox::{Image, Sandbox, TAG};
use support::guest::{Guest, Machine};
use support::parts::{Parts, run};
use support::tree_text::describe;

const CHECKS: [&str; 10] = [
    "shared", "volume", "create", "images", "first", "second", "other", "ends", "goes-on", "kernel",
];

#[test]
fn the_go_runtime_with_qemu() {
    runs_a_pod("qemu-go", Machine::Qemu7Linux61, "overlay_linux_6_1");
}

/// QEMU's side is the same for both runtimes, so a quicker guest stands for it here and below.
#[test]
fn runtime_rs_with_qemu() {
    runs_a_pod("qemu-rs", Machine::Uml72, "overlay_uml");
}

#[test]
fn the_go_runtime_with_cloud_hypervisor() {
    runs_a_pod("clh-go", Machine::Uml72, "overlay_uml");
}

#[test]
fn runtime_rs_with_cloud_hypervisor() {
    runs_a_pod("clh-rs", Machine::Uml72, "overlay_uml");
}

fn runs_a_pod(kind: &str, machine: Machine, overlay: &str) {
    // One after the other: guests take turns anyway, and what is said stays together.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let kind = Kind::named(kind);
    let (images, overlay) = (&*IMAGES, images_parts().path(overlay).unwrap());
    // In mount namespaces of its own: nothing stays mounted, however it ends.
    std::thread::scope(|scope| {
        let pod = scope.spawn(move || {
            // SAFETY: only the mount namespace of this thread changes, and with it its working
            // directory, which nothing here depends on.
            unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
            let private = MountPropagationFlags::REC | MountPropagationFlags::PRIVATE;
            mount_change("/", private).unwrap();
            pod(kind, machine, images, &overlay);
        });
        pod.join().unwrap();
    });
}

fn pod(kind: Kind, machine: Machine, images: &Images, overlay: &Path) {
    let say = |text: String| say(&format!("{}: {text}", kind.name));
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let sockets = tempfile::Builder::new().prefix("kata-").tempdir().unwrap();
    let (root, dir) = (scratch.path(), sockets.path());
    make_node(root);
    install(root, &["--without-snapshotter"]);
    let settings = Settings::load(root, &kind);

    let begin = Instant::now();
    let sandbox = Sandbox::start(root, dir, kind, "s1");
    say(format!("the daemon runs and shares the sandbox's directory after {:?}", begin.elapsed()));
    let channel = root.join("channel");
    fs::create_dir(&channel).unwrap();
    let job = format!(
        "options={} volume=/run/kata-containers/shared/containers/s1-volume\n{}",
        sandbox.share_options(),
        include_str!("init/kata-job.sh")
    );
    let mut guest = Guest::new(machine, sandbox.vhost_socket(), TAG)
        .job(&job)
        .queue_size(u32::try_from(settings.queue_size).unwrap())
        .file("guest/container", include_bytes!("init/container.sh"))
        .file("modules/overlay.ko", fs::read(overlay).unwrap());
    for (name, text) in &images.expected {
        guest = guest.file(&format!("expected/{name}"), text.as_slice());
    }
    let report = std::thread::scope(|scope| {
        let vm = scope.spawn(|| guest.run());
        // The rest happens when the guest has mounted the share.
        fs::write(channel.join("here"), "from the host\n").unwrap();
        let volume = sandbox.add_volume(&channel);
        assert!(job.contains(&volume));
        let done = |name: &str| wait_for(&channel.join(name), || vm.is_finished());
        let host = || -> Option<()> {
            done("ready")?;
            say("the guest is up; now come its containers".to_owned());
            for (cid, image) in
                [("c1", &images.debian), ("c2", &images.debian), ("c3", &images.small)]
            {
                let begin = Instant::now();
                let options = sandbox.create_container(cid, image);
                say(format!("{cid}: image mounted in {:?}: {options}", begin.elapsed()));
                let file = channel.join(format!("create-{cid}"));
                fs::write(file.with_extension("new"), options).unwrap();
                fs::rename(file.with_extension("new"), file).unwrap();
            }
            done("removed-c2")?;
            sandbox.remove_container("c2");
            say("c2: gone, while c1 reads".to_owned());
            fs::write(channel.join("gone-c2"), "").unwrap();
            Some(())
        };
        // If it stops half-way, the guest says why.
        host();
        vm.join().unwrap().unwrap()
    });
    say(format!("the VM is down after {:?}", report.took));
    report.expect(&CHECKS);
    say(format!("c1 read on, {}", report.output("ends").trim()));

    assert_eq!(sandbox.mounted(), ["/containers", "/rafs/c1/lowerdir", "/rafs/c3/lowerdir"]);
    let upper = ["c1", "c2", "c3"].map(|cid| sandbox.upper(cid));
    let (_, took, said) = sandbox.stop();
    say(match kind.runtime {
        Runtime::Go => format!("SIGTERM: gone after {took:?}; Kata would wait for 5 s"),
        Runtime::Rs => format!("SIGKILL: gone after {took:?}"),
    });
    assert!(!said.contains(" ERROR ") && !said.contains(" WARN "), "{said}");

    // What they have written is on the host; what they have removed is marked there.
    let [first, second, third] = upper;
    for gone in [first.join("etc/issue"), third.join("data/f1"), third.join("data/dir")] {
        let whiteout = fs::symlink_metadata(&gone).unwrap();
        assert!(
            whiteout.file_type().is_char_device() && whiteout.rdev() == 0,
            "{}",
            gone.display()
        );
    }
    assert_eq!(fs::read_to_string(first.join("after")).unwrap(), "still\n");
    assert_eq!(
        fs::read_to_string(second.join("var/log/moved")).unwrap(),
        "LINE 1\nLINE 2\nLINE 3\n"
    );
    assert_eq!(fs::read_to_string(third.join("data/f0")).unwrap(), "changed\n");
    let opaque = xattr::get(second.join("usr/share/common-licenses"), "trusted.overlay.opaque");
    assert_eq!(opaque.unwrap().as_deref(), Some(&b"y"[..]));
    assert!(!first.join("var/log/moved").exists() && !second.join("etc/new").exists());
}

/// Waits for a file; `None` if `over` comes first.
fn wait_for(path: &Path, over: impl Fn() -> bool) -> Option<()> {
    let begin = Instant::now();
    while !path.exists() {
        if over() {
            return None;
        }
        assert!(begin.elapsed() < Duration::from_secs(280), "no {}", path.display());
        std::thread::sleep(Duration::from_millis(10));
    }
    Some(())
}

fn say(line: &str) {
    // Past the capture of the test harness: `scripts/kata-run` is there to show it.
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// The two images, and what containers of them must see.
struct Images {
    _dir: tempfile::TempDir,
    debian: Image,
    small: Image,
    /// By the name of a file in the guest's `/expected`.
    expected: Vec<(String, Vec<u8>)>,
}

/// Made once for all tests of this program.
static IMAGES: LazyLock<Images> = LazyLock::new(make_images);

fn images_parts() -> Parts {
    Parts::install(&["guests", "overlay", "rootfs"]).unwrap()
}

fn make_images() -> Images {
    let parts = images_parts();
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let dir = scratch.path();
    let debian = dir.join("debian");
    run(Command::new("cp").arg("-a").arg(parts.path("rootfs").unwrap()).arg(&debian)).unwrap();
    let small = dir.join("small");
    make_small_tree(&small, &parts);
    let job = include_str!("init/kata-job.sh");
    let (_, function) = job.split_once("\nlisting() (").unwrap();
    let (function, _) = function.split_once("\n)\n").unwrap();
    let mut expected = Vec::new();
    for (name, tree, contents) in [("debian", &debian, "usr"), ("small", &small, "data")] {
        let mut add = |what: &str, function: &str| {
            expected.push((format!("{name}-{what}"), describe(&parts, tree, function).unwrap()));
        };
        add("listing", &format!("listing() ({function}\n) && listing ."));
        add("metadata", "metadata .");
        add("contents", &format!("contents {contents}"));
    }
    let image = |tree: &Path| make_image(tree, &dir.join("images"));
    Images { debian: image(&debian), small: image(&small), expected, _dir: scratch }
}

/// A program, files that do not compress, a directory to be moved.
fn make_small_tree(tree: &Path, parts: &Parts) {
    for name in ["bin", "proc", "data/dir"] {
        fs::create_dir_all(tree.join(name)).unwrap();
    }
    fs::copy(parts.path("guest_root").unwrap().join("bin/busybox"), tree.join("bin/busybox"))
        .unwrap();
    symlink("busybox", tree.join("bin/sh")).unwrap();
    fs::write(tree.join("data/dir/inner"), "inner\n").unwrap();
    for number in 0..4_u64 {
        let words = (0..50_000_u64).map(|i| (i << 3 | number).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        fs::write(tree.join(format!("data/f{number}")), bytes).unwrap();
    }
}

fn make_image(tree: &Path, to: &Path) -> Image {
    fs::create_dir_all(to).unwrap();
    let name: PathBuf = tree.file_name().unwrap().into();
    let bootstrap = to.join(name.with_extension("boot"));
    let mut create = Command::new(env!("CARGO_BIN_EXE_rafs"));
    create.arg("create").arg("--bootstrap").arg(&bootstrap).arg("--blob-dir").arg(to).arg(tree);
    run(&mut create).unwrap();
    Image { bootstrap, blobs: to.to_owned() }
}
