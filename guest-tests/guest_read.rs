//! Real guests read a whole image: all metadata, all content, on four pairs of VMM and kernel, and one guest
//! lives on it as its root.
//!
//! The image is made of a Debian root file system of real packages and of `special/`, which has what those
//! lack. What a guest must see is written down on the host from the tree itself, by the same script and
//! programs that the guest uses (`init/manifest.sh`).
//!
//! `RAFSD_GUEST_SERVER=virtiofsd` runs the same tests against virtiofsd on the tree itself. A test that fails
//! there, too, is wrong, or its guest is.

mod support {
    // Each test program uses its own part of these.
    #![allow(dead_code)]
    pub mod guest;
    pub mod initramfs;
    pub mod parts;
    pub mod tree_text;
}

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, lchown, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, makedev, mknodat, utimensat};

use support::guest::{Guest, Machine, install_root_job};
use support::parts::{Parts, run};
use support::tree_text::describe;

const READ_JOB: &str = include_str!("init/read-job.sh");
const ROOT_JOB: &str = include_str!("init/root-job.sh");

/// The checks of `READ_JOB`: a job that lost one must not pass.
const READ_CHECKS: [&str; 12] = [
    "kernel", "mount", "statfs", "metadata", "contents", "large", "direct", "execute", "write",
    "absent", "umount", "remount",
];

/// Name of the share.
const TAG: &str = "image";

/// How long a server may take until it listens, on a busy machine.
const START_LIMIT: Duration = Duration::from_secs(60);

#[test]
fn linux_7_3_under_qemu_11_reads_the_whole_image() {
    reads_the_whole_image(Machine::Qemu11Linux73, "7.3.");
}

#[test]
fn linux_6_1_under_qemu_11_reads_the_whole_image() {
    reads_the_whole_image(Machine::Qemu11Linux61, "6.1.");
}

#[test]
fn linux_6_1_under_qemu_7_reads_the_whole_image() {
    reads_the_whole_image(Machine::Qemu7Linux61, "6.1.");
}

#[test]
fn user_mode_linux_reads_the_whole_image() {
    reads_the_whole_image(Machine::Uml72, "7.2.");
}

#[test]
fn linux_7_3_boots_with_the_image_as_its_root() {
    let image = image();
    let server = Server::start(image);
    let report = Guest::new(Machine::Qemu11Linux73, &server.socket(), TAG)
        .root_is_share()
        .run()
        .expect("the guest");
    report.expect(&["root", "release", "programs", "digest"]);
    assert!(report.output("release").contains("ID=debian"), "{}", report.output("release"));
    let digest = "find usr/bin usr/sbin usr/lib -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum \
                  | sed 's|  |  /|' | sha256sum";
    let expected = run(Command::new("sh").args(["-c", digest]).current_dir(&image.tree))
        .expect("the host's digest");
    assert_eq!(report.output("digest").as_bytes(), expected);
}

fn reads_the_whole_image(machine: Machine, kernel: &str) {
    let image = image();
    let server = Server::start(image);
    let report = Guest::new(machine, &server.socket(), TAG)
        .job(READ_JOB)
        .file("expected/metadata", &*image.metadata)
        .file("expected/contents", &*image.contents)
        .file("expected/special", &*image.special)
        .file("expected/edges", &*image.edges)
        .request_queues(if machine == Machine::Uml72 { 1 } else { server.request_queues() })
        .run()
        .expect("the guest");
    report.expect(&READ_CHECKS);
    assert!(report.output("kernel").starts_with(kernel), "{}", report.output("kernel"));
}

/// A tree on the host, the image made of it, and what a guest must see.
struct Image {
    tree: PathBuf,
    bootstrap: PathBuf,
    metadata: Vec<u8>,
    contents: Vec<u8>,
    /// `contents` of `special/` alone.
    special: Vec<u8>,
    edges: Vec<u8>,
}

/// Made once for all tests of this program.
fn image() -> &'static Image {
    static IMAGE: LazyLock<Image> = LazyLock::new(|| Image::make().expect("making the image"));
    &IMAGE
}

impl Image {
    /// In cargo's directory for such files: what an earlier run left there is replaced.
    fn make() -> Result<Image> {
        let parts = Parts::install(&["tools", "rootfs"])?;
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("guest-read");
        run(Command::new("rm").arg("-rf").arg(&dir))?;
        fs::create_dir_all(&dir)?;
        let tree = dir.join("tree");
        run(Command::new("cp").arg("-a").arg(parts.path("rootfs")?).arg(&tree))?;
        install_root_job(&tree, ROOT_JOB)?;
        make_special_files(&tree.join("special"), &parts)?;
        let bootstrap = dir.join("bootstrap");
        if !peer_is_asked_for() {
            let mut create = Command::new(env!("CARGO_BIN_EXE_rafs"));
            run(create
                .arg("create")
                .arg("--bootstrap")
                .arg(&bootstrap)
                .arg("--blob-dir")
                .arg(&dir)
                .arg(&tree))?;
        }
        let manifest = |function: &str| describe(&parts, &tree, function);
        Ok(Image {
            metadata: manifest("metadata .")?,
            contents: manifest("contents .")?,
            special: manifest("contents special")?,
            edges: manifest("edges .")?,
            bootstrap,
            tree,
        })
    }
}

/// One of everything that a file system can hold and that Debian's packages do not.
fn make_special_files(dir: &Path, parts: &Parts) -> Result<()> {
    fs::create_dir(dir)?;
    fs::copy(parts.path("guest_root")?.join("bin/busybox"), dir.join("busybox"))?;

    // Contents: around the sizes of a block and of a chunk, incompressible, sparse.
    let mut noise = Noise(0x9e37_79b9_7f4a_7c15);
    for size in [0, 1, 4095, 4096, 4097, 1 << 20, (1 << 20) + 1, 3 * (1 << 20) - 1] {
        fs::write(dir.join(format!("size-{size}")), noise.bytes(size))?;
    }
    fs::write(dir.join("random"), noise.bytes(5 * (1 << 20) + 123))?;
    fs::write(dir.join("zeros"), vec![0; 2 << 20])?;
    let mut sparse = File::create(dir.join("sparse"))?;
    sparse.write_all(&noise.bytes(10_000))?;
    sparse.seek(SeekFrom::Start(20 << 20))?;
    sparse.write_all(&noise.bytes(10_000))?;
    let over_4_gib = File::create(dir.join("over-4-GiB"))?;
    over_4_gib.write_all_at(&noise.bytes(1 << 20), 12_345)?;
    over_4_gib.write_all_at(&noise.bytes(1 << 20), (4 << 30) - 500_000)?;

    // Names.
    let names = dir.join("names");
    fs::create_dir(&names)?;
    for name in [
        &b"space and 'quotes\""[..],
        b"new\nline",
        b"tab\tand \\",
        b"not UTF-8 \xff\xfe\x80",
        b"...",
        b"-n",
    ] {
        fs::write(names.join(OsStr::from_bytes(name)), name)?;
    }
    fs::write(names.join("n".repeat(255)), "longest")?;
    let mut deep = dir.join("deep");
    for level in 0..40 {
        deep.push(format!("level-{level}"));
    }
    fs::create_dir_all(&deep)?;
    fs::write(deep.join("bottom"), "bottom")?;
    // Its entries fill many blocks.
    let many = dir.join("many");
    fs::create_dir(&many)?;
    for number in 0..2500 {
        fs::write(many.join(format!("entry-with-a-longer-name-{number}")), number.to_string())?;
    }

    // Types and links.
    symlink("t".repeat(4095), dir.join("longest-symlink"))?;
    symlink("names/not there", dir.join("dangling-symlink"))?;
    fs::hard_link(dir.join("random"), dir.join("names/random"))?;
    fs::hard_link(dir.join("random"), dir.join("another-random"))?;
    let device = |name: &str, kind, number| {
        mknodat(CWD, dir.join(name), kind, Mode::from_raw_mode(0o640), number)
    };
    device("character", FileType::CharacterDevice, makedev(259, 70_000))?;
    device("block", FileType::BlockDevice, makedev(7, 1))?;
    device("fifo", FileType::Fifo, 0)?;
    drop(UnixListener::bind(dir.join("socket"))?);

    // Owners, modes, times.
    lchown(dir.join("zeros"), Some(100_000), Some(4_000_000_000))?;
    lchown(dir.join("dangling-symlink"), Some(65_534), Some(65_535))?;
    for (name, mode) in
        [("size-1", 0o4755), ("size-4095", 0o2750), ("size-4096", 0o000), ("many", 0o1777)]
    {
        fs::set_permissions(dir.join(name), Permissions::from_mode(mode))?;
    }
    for (name, tv_sec, tv_nsec) in
        [("size-0", 0, 1), ("zeros", 4_102_444_800, 999_999_999), ("dangling-symlink", 1, 5)]
    {
        let time = Timespec { tv_sec, tv_nsec };
        let times = Timestamps { last_access: time, last_modification: time };
        utimensat(CWD, dir.join(name), &times, AtFlags::SYMLINK_NOFOLLOW)?;
    }

    // Extended attributes: of every name space, long, empty, binary. An ACL that lets user 1000 read, and
    // cap_net_raw+ep, in the kernel's form: version 2, then little-endian fields.
    let acl: [&[u8]; 6] = [
        b"\x02\0\0\0",
        b"\x01\0\x06\0\xff\xff\xff\xff",
        b"\x02\0\x04\0\xe8\x03\0\0",
        b"\x04\0\x04\0\xff\xff\xff\xff",
        b"\x10\0\x04\0\xff\xff\xff\xff",
        b"\x20\0\x04\0\xff\xff\xff\xff",
    ];
    xattr::set(dir.join("sparse"), "system.posix_acl_access", &acl.concat())?;
    xattr::set(
        dir.join("busybox"),
        "security.capability",
        b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
    )?;
    xattr::set(dir.join("zeros"), "user.long", &noise.bytes(2000))?;
    xattr::set(dir.join("zeros"), "user.empty", b"")?;
    xattr::set(dir.join("many"), "user.of a directory", b"\0\xff")?;
    // virtiofsd lets no trusted ones through.
    if !peer_is_asked_for() {
        xattr::set(dir.join("zeros"), "trusted.overlay.opaque", b"y")?;
        xattr::set(dir.join("longest-symlink"), "trusted.of-a-symlink", b"value")?;
    }
    Ok(())
}

/// Bytes that do not compress, the same in each run: xorshift.
struct Noise(u64);

impl Noise {
    fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(count + 8);
        while bytes.len() < count {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            bytes.extend_from_slice(&self.0.to_le_bytes());
        }
        bytes.truncate(count);
        bytes
    }
}

/// Whether virtiofsd is to serve the tree instead of rafsd the image.
fn peer_is_asked_for() -> bool {
    std::env::var_os("RAFSD_GUEST_SERVER").is_some_and(|server| server == "virtiofsd")
}

/// A vhost-user back end of its own for each guest, with an empty cache. Dropping it kills it; if its test
/// has failed, what it logged is printed first.
struct Server {
    child: Child,
    dir: tempfile::TempDir,
}

impl Server {
    fn start(image: &Image) -> Server {
        Server::try_start(image).expect("starting the server")
    }

    fn try_start(image: &Image) -> Result<Server> {
        let dir = tempfile::Builder::new().prefix("server-").tempdir()?;
        let socket = dir.path().join("socket");
        let mut command;
        if peer_is_asked_for() {
            command = Command::new(Parts::install(&["virtiofsd"])?.path("virtiofsd")?);
            command
                .arg("--shared-dir")
                .arg(&image.tree)
                .arg("--socket-path")
                .arg(&socket)
                .args(["--tag", TAG]);
            command.args([
                "--cache",
                "always",
                "--sandbox",
                "none",
                "--readonly",
                "--xattr",
                "--posix-acl",
            ]);
        } else {
            command = Command::new(env!("CARGO_BIN_EXE_rafsd"));
            command
                .arg("virtiofs")
                .arg("--bootstrap")
                .arg(&image.bootstrap)
                .arg("--sock")
                .arg(&socket);
            command.args(["--tag", TAG, "--thread-num", "2", "--log-level", "info"]);
            command.env("XDG_CACHE_HOME", dir.path().join("cache"));
        }
        let log = File::create(dir.path().join("log"))?;
        let child = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()?;
        let mut server = Server { child, dir };
        let deadline = Instant::now() + START_LIMIT;
        while !socket.exists() {
            if let Some(status) = server.child.try_wait()? {
                bail!("the server ended at once with {status}:\n{}", server.log());
            }
            if Instant::now() > deadline {
                bail!("no socket after {START_LIMIT:?}:\n{}", server.log());
            }
            sleep(Duration::from_millis(5));
        }
        Ok(server)
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    /// How many request queues a guest may use. virtiofsd has one.
    fn request_queues(&self) -> u32 {
        if peer_is_asked_for() { 1 } else { 2 }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_else(|error| error.to_string())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // An error means that it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            // A closed stderr is no reason to panic twice.
            let _ = writeln!(std::io::stderr(), "--- log of the server ---\n{}", self.log());
        }
    }
}
