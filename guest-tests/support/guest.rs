//! Boots real Linux guests that have one virtio-fs share, and gives them a job.
//!
//! A job is a shell script made of `check NAME COMMAND…` lines (`guest-tests/init/lib.sh`). A guest runs it
//! as root, either from an initramfs or from the share itself, and powers off. `Guest::run` comes back with
//! what every check said; a guest that hangs, panics or ends early is an error that shows the end of its
//! console. Nothing survives the call: the VM is a process group that is killed at its time limit, and with
//! the thread that started it.
//!
//! One guest runs at a time in a test program, unless more are asked for, however many threads the tests have: an emulated CPU keeps a
//! whole one of the host busy. No guest needs root on the host.

use std::fs;
use std::io::{PipeReader, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process_group};

use super::initramfs::Initramfs;
use super::parts::Parts;

/// How long a guest may take unless a test says otherwise. An emulated guest boots in 3 s and reads some
/// 10 MB/s on an idle machine; this leaves room for a busy one.
pub const TIME_LIMIT: Duration = Duration::from_secs(300);

/// Lines of the console that an error shows.
const CONSOLE_TAIL: usize = 60;

static ONE_GUEST: Mutex<()> = Mutex::new(());

/// A virtual machine monitor and the kernel it boots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    /// The newest of both: virtio-fs is built into the kernel, so the share can be its root.
    Qemu11Linux73,
    Qemu11Linux61,
    /// The oldest we care for.
    Qemu7Linux61,
    /// User-mode Linux: the kernel is a process that speaks vhost-user itself. One CPU, one request queue.
    Uml72,
}

#[derive(Clone, Debug)]
enum Boot {
    Initramfs,
    /// From the share, whose init has this path.
    Root(String),
}

/// A guest to be booted.
#[derive(Clone, Debug)]
pub struct Guest {
    machine: Machine,
    socket: PathBuf,
    tag: String,
    boot: Boot,
    job: String,
    files: Vec<(String, Vec<u8>)>,
    request_queues: u32,
    queue_size: u32,
    cpus: u32,
    memory_mib: u32,
    kernel_args: Vec<String>,
    qemu_args: Vec<String>,
    time_limit: Duration,
    /// The device that has a DAX window, in place of `vhost-user-fs-pci`.
    with_window: bool,
    reboots: bool,
    beside_others: bool,
    watcher: Option<Watcher>,
}

/// Called with each line of the console, before the next is read.
#[derive(Clone)]
struct Watcher(Arc<dyn Fn(&str) + Send + Sync>);

impl std::fmt::Debug for Watcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Watcher")
    }
}

impl Guest {
    /// A guest that boots from an initramfs. The vhost-user back end listens on `socket`, and the guest
    /// knows the share as `tag`, 1 to 36 bytes, also in its job's `$tag`.
    pub fn new(machine: Machine, socket: &Path, tag: &str) -> Guest {
        Guest {
            machine,
            socket: socket.to_owned(),
            tag: tag.to_owned(),
            boot: Boot::Initramfs,
            job: String::new(),
            files: Vec::new(),
            request_queues: 1,
            queue_size: 1024,
            cpus: 2,
            memory_mib: 1024,
            kernel_args: Vec::new(),
            qemu_args: Vec::new(),
            time_limit: TIME_LIMIT,
            with_window: false,
            reboots: false,
            beside_others: false,
            watcher: None,
        }
    }

    /// With QEMU 11's generic vhost-user device, the one that has a DAX window; its id is `share`, and
    /// it can be pulled out.
    pub fn with_window(mut self) -> Guest {
        self.with_window = true;
        self
    }

    /// A reset starts the guest again; otherwise it ends it. QEMU only.
    pub fn reboots(mut self) -> Guest {
        self.reboots = true;
        self
    }

    /// While others run.
    pub fn beside_others(mut self) -> Guest {
        self.beside_others = true;
        self
    }

    /// Shows each line of the console to `see` as it comes.
    pub fn watch(mut self, see: impl Fn(&str) + Send + Sync + 'static) -> Guest {
        self.watcher = Some(Watcher(Arc::new(see)));
        self
    }

    /// What the guest does: the text of a script.
    pub fn job(mut self, script: &str) -> Guest {
        self.job = script.to_owned();
        self
    }

    /// A file in the initramfs, for the job; `path` has no leading slash.
    pub fn file(mut self, path: &str, content: impl Into<Vec<u8>>) -> Guest {
        self.files.push((path.to_owned(), content.into()));
        self
    }

    /// Boots with the share as root, without initramfs. The image must hold what `install_root_job` puts
    /// into its tree; `job` and `file` do not apply. Linux 7.3 only.
    pub fn root_is_share(mut self) -> Guest {
        self.boot = Boot::Root("/guest/init".to_owned());
        self
    }

    /// Request queues of the device, beside the high-priority queue. QEMU only.
    pub fn request_queues(mut self, count: u32) -> Guest {
        self.request_queues = count;
        self
    }

    /// Descriptors in each queue: a power of two up to 1024. QEMU only.
    pub fn queue_size(mut self, descriptors: u32) -> Guest {
        self.queue_size = descriptors;
        self
    }

    /// CPUs of the guest. QEMU only.
    pub fn cpus(mut self, count: u32) -> Guest {
        self.cpus = count;
        self
    }

    pub fn memory_mib(mut self, mib: u32) -> Guest {
        self.memory_mib = mib;
        self
    }

    /// One more word of the kernel's command line.
    pub fn kernel_arg(mut self, word: &str) -> Guest {
        self.kernel_args.push(word.to_owned());
        self
    }

    /// One more argument of QEMU.
    pub fn qemu_arg(mut self, argument: &str) -> Guest {
        self.qemu_args.push(argument.to_owned());
        self
    }

    /// From power-on to power-off; past it the guest is killed and `run` fails.
    pub fn time_limit(mut self, limit: Duration) -> Guest {
        self.time_limit = limit;
        self
    }

    /// Boots the guest and waits for the end of its job.
    pub fn run(&self) -> Result<Report> {
        let turn = || ONE_GUEST.lock().unwrap_or_else(PoisonError::into_inner);
        let _turn = (!self.beside_others).then(turn);
        let parts = Parts::install(&["guests"])?;
        let scratch = tempfile::Builder::new().prefix("guest-").tempdir()?;
        let (reader, writer) = std::io::pipe()?;
        let mut command = match self.machine {
            Machine::Uml72 => self.uml(&parts, scratch.path())?,
            _ => self.qemu(&parts, scratch.path())?,
        };
        command
            .current_dir(scratch.path())
            .stdin(Stdio::null())
            .stdout(writer.try_clone()?)
            .stderr(writer)
            .process_group(0);
        let start = Instant::now();
        let mut vm = Vm(command.spawn().with_context(|| format!("starting {:?}", self.machine))?);
        // It holds the pipe's write ends, and the console must end with the VM.
        drop(command);
        let console = follow(reader, start + self.time_limit, self.watcher.as_ref());
        let status = match &console {
            Console { ended: true, .. } => vm.0.wait()?,
            Console { text, .. } => {
                bail!(
                    "{:?} was killed at its limit of {:?}\n{}",
                    self.machine,
                    self.time_limit,
                    tail(text)
                )
            }
        };
        let report = Report::parse(self.machine, console.text, start.elapsed());
        ensure!(
            report.finished,
            "{:?} ended before its job did, with {status}\n{}",
            self.machine,
            tail(&report.console)
        );
        ensure!(
            !report.console.contains("Kernel panic"),
            "{:?} panicked\n{}",
            self.machine,
            tail(&report.console)
        );
        Ok(report)
    }

    fn qemu(&self, parts: &Parts, scratch: &Path) -> Result<Command> {
        let (vmm, kernel, modules) = match self.machine {
            Machine::Qemu11Linux73 => ("qemu_11", "linux_7_3", None),
            Machine::Qemu11Linux61 => ("qemu_11", "linux_6_1", Some("linux_6_1_modules")),
            _ => ("qemu_7", "linux_6_1", Some("linux_6_1_modules")),
        };
        let mut words = vec!["console=ttyS0", "panic=-1", "quiet"];
        let root = format!("root={}", self.tag);
        let init;
        let mut command = killed_with_us(&parts.path(vmm)?);
        match &self.boot {
            Boot::Initramfs => {
                command.arg("-initrd").arg(self.initramfs(parts, modules, scratch)?);
            }
            Boot::Root(path) => {
                ensure!(
                    self.machine == Machine::Qemu11Linux73,
                    "only Linux 7.3 has virtio-fs built in"
                );
                init = format!("init={path}");
                words.extend([&root, "rootfstype=virtiofs", "ro", &init]);
            }
        }
        words.extend(self.kernel_args.iter().map(String::as_str));
        match parts.value("accel")? {
            "kvm" => command.args(["-accel", "kvm", "-cpu", "host"]),
            _ => command.args(["-accel", "tcg,thread=multi", "-cpu", "max"]),
        };
        // vhost-user shares the guest's memory with the back end: it must be a file.
        command
            .args(["-machine", "q35,memory-backend=mem"])
            .args(["-nodefaults", "-display", "none", "-serial", "stdio"])
            .args((!self.reboots).then_some("-no-reboot"))
            .arg("-smp")
            .arg(self.cpus.to_string())
            .arg("-m")
            .arg(format!("{}M", self.memory_mib))
            .arg("-object")
            .arg(format!("memory-backend-memfd,id=mem,size={}M,share=on", self.memory_mib))
            .arg("-chardev")
            .arg(format!("socket,id=share,path={}", self.socket.display()))
            .args(self.with_window.then_some("-device"))
            .args(self.with_window.then_some("pcie-root-port,id=slot0"))
            .arg("-device")
            .arg(match self.with_window {
                // 26 is the virtio device id of a file system; 44 bytes are its configuration space.
                true => format!(
                    "vhost-user-test-device-pci,id=share,virtio-id=26,num_vqs={},vq_size={},\
                     config_size=44,chardev=share,bus=slot0",
                    self.request_queues + 1,
                    self.queue_size
                ),
                false => format!(
                    "vhost-user-fs-pci,id=share,chardev=share,tag={},num-request-queues={},\
                     queue-size={}",
                    self.tag, self.request_queues, self.queue_size
                ),
            })
            .arg("-kernel")
            .arg(parts.path(kernel)?)
            .arg("-append")
            .arg(words.join(" "))
            .args(&self.qemu_args);
        Ok(command)
    }

    fn uml(&self, parts: &Parts, scratch: &Path) -> Result<Command> {
        ensure!(matches!(self.boot, Boot::Initramfs), "only Linux 7.3 has virtio-fs built in");
        let initramfs = self.initramfs(parts, Some("uml_modules"), scratch)?;
        let mut command = killed_with_us(&parts.path("uml")?);
        command
            .arg(format!("mem={}M", self.memory_mib))
            .arg(format!("initrd={}", initramfs.display()))
            .arg(format!("uml_dir={}", scratch.display()))
            // 26 is the virtio device id of a file system.
            .arg(format!("virtio_uml.device={}:26", self.socket.display()))
            .args(["root=/dev/ram0", "con=null", "con0=fd:0,fd:1", "quiet"])
            .args(&self.kernel_args);
        Ok(command)
    }

    fn initramfs(&self, parts: &Parts, modules: Option<&str>, scratch: &Path) -> Result<PathBuf> {
        let mut archive = Initramfs::default();
        archive.tree("", &parts.path("guest_root")?)?;
        if let Some(modules) = modules {
            archive.tree("modules/", &parts.path(modules)?)?;
        }
        archive.file("init", include_bytes!("../init/init"));
        archive.file("guest/lib.sh", include_bytes!("../init/lib.sh"));
        archive.file("guest/manifest.sh", include_bytes!("../init/manifest.sh"));
        archive.file("guest/job", format!("tag={}\n{}", self.tag, self.job).as_bytes());
        for (path, content) in &self.files {
            archive.file(path, content);
        }
        let path = scratch.join("initramfs");
        fs::write(&path, archive.finish())?;
        Ok(path)
    }
}

/// Puts a job into a tree that an image will be made of, for a guest that boots from it.
pub fn install_root_job(tree: &Path, job: &str) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let directory = tree.join("guest");
    fs::create_dir_all(&directory)?;
    let init = directory.join("init");
    fs::write(&init, include_bytes!("../init/root-init"))?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
    fs::write(directory.join("lib.sh"), include_bytes!("../init/lib.sh"))?;
    fs::write(directory.join("job"), job)?;
    Ok(())
}

/// A program that gets SIGKILL when the thread that starts it ends.
fn killed_with_us(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

/// A running VM: its process and all that it started.
struct Vm(Child);

impl Drop for Vm {
    fn drop(&mut self) {
        // Until it was waited for, the pid and the group of that number are its own. If it was, there is
        // at most a helper of it left in the group.
        let group = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw);
        // An error means that the group is empty.
        let _ = group.map(|group| kill_process_group(group, Signal::KILL));
        let _ = self.0.wait();
    }
}

struct Console {
    text: String,
    /// The VM closed it; otherwise the deadline came first.
    ended: bool,
}

/// Reads the console until the VM closes it or the deadline comes.
fn follow(mut reader: PipeReader, deadline: Instant, watcher: Option<&Watcher>) -> Console {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(length @ 1..) = reader.read(&mut buffer) {
            if sender.send(buffer[..length].to_vec()).is_err() {
                return;
            }
        }
    });
    let mut bytes: Vec<u8> = Vec::new();
    let mut shown = 0;
    let ended = loop {
        match receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(more) => bytes.extend(more),
            Err(RecvTimeoutError::Disconnected) => break true,
            Err(RecvTimeoutError::Timeout) => break false,
        }
        let Some(Watcher(see)) = watcher else { continue };
        while let Some(len) = bytes[shown..].iter().position(|&byte| byte == b'\n') {
            let line = String::from_utf8_lossy(&bytes[shown..shown + len]);
            see(line.trim_end_matches('\r'));
            shown += len + 1;
        }
    };
    let text = String::from_utf8_lossy(&bytes).replace('\r', "");
    Console { text, ended }
}

fn tail(console: &str) -> String {
    let lines: Vec<&str> = console.lines().collect();
    let from = lines.len().saturating_sub(CONSOLE_TAIL);
    format!("--- last lines of its console ---\n{}", lines[from..].join("\n"))
}

/// What one check of a job said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Check {
    pub name: String,
    /// Exit status of its command.
    pub status: i32,
    /// The first 400 lines of the command's output and errors.
    pub output: String,
}

/// What a guest said before it powered off.
#[derive(Clone, Debug)]
pub struct Report {
    pub machine: Machine,
    /// In the order of the job.
    pub checks: Vec<Check>,
    /// All that was on the console.
    pub console: String,
    /// From power-on to power-off.
    pub took: Duration,
    finished: bool,
}

impl Report {
    fn parse(machine: Machine, console: String, took: Duration) -> Report {
        let mut checks = Vec::new();
        let mut output = String::new();
        let mut finished = false;
        for line in console.lines() {
            // The kernel may have put a message before it on the same line.
            if let Some((_, text)) = line.split_once("guest-output ") {
                let text = text.split_once(": ").map_or("", |(_, text)| text);
                output.push_str(text);
                output.push('\n');
            } else if let Some((_, result)) = line.split_once("guest-result ") {
                if let Some((name, status)) = result.split_once(' ') {
                    // Nor is what follows the number the guest's.
                    let digits = status.find(|c: char| !c.is_ascii_digit()).unwrap_or(status.len());
                    checks.push(Check {
                        name: name.to_owned(),
                        status: status[..digits].parse().unwrap_or(-1),
                        output: std::mem::take(&mut output),
                    });
                }
            } else if line.contains("guest-end") {
                finished = true;
            }
        }
        Report { machine, checks, console, took, finished }
    }

    /// What the check of this name printed.
    ///
    /// Panics if it was not run.
    pub fn output(&self, name: &str) -> &str {
        let check = self.checks.iter().find(|check| check.name == name);
        &check.unwrap_or_else(|| panic!("{:?} ran no check '{name}'", self.machine)).output
    }

    /// Panics unless exactly these checks were run, in this order, and all succeeded.
    pub fn expect(&self, names: &[&str]) {
        if let Some(check) = self.checks.iter().find(|check| check.status != 0) {
            panic!(
                "{:?}: check '{}' failed with status {}:\n{}\n{}",
                self.machine,
                check.name,
                check.status,
                check.output,
                tail(&self.console)
            );
        }
        let run: Vec<&str> = self.checks.iter().map(|check| check.name.as_str()).collect();
        assert_eq!(run, names, "{:?}: the checks it ran\n{}", self.machine, tail(&self.console));
    }
}
