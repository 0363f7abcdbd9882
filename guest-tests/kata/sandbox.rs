//! What Kata's runtimes do on the host for one pod, in their order: directories, daemon, API calls, mounts.
//!
//! The settings come from the node's configuration files. Unix sockets are short of room in their names, so the
//! sandbox's own directory lies outside of the node's root.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount_bind, mount_change, mount_remount,
    unmount,
};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::compat::{KataGo, KataRs, snapshotter_config};
use crate::kata::{Kind, Runtime, Settings, Vmm};

/// Name of the share in the guest.
pub const TAG: &str = "kataShared";
/// Where the agent mounts it.
pub const GUEST_SHARED: &str = "/run/kata-containers/shared";
/// The Go runtime kills five seconds after SIGTERM; on a busy machine a test has more patience.
const STOP_LIMIT: Duration = Duration::from_secs(60);
/// Longest line that the Go runtime can read of its daemon.
const LINE_LIMIT: usize = 64 * 1024;

/// An image as nydus-snapshotter has prepared it.
pub struct Image {
    pub bootstrap: PathBuf,
    pub blobs: PathBuf,
}

enum Client {
    Go(KataGo),
    Rs(KataRs),
}

pub struct Sandbox {
    kind: Kind,
    id: String,
    daemon: Child,
    /// All that it has said, and the threads that read it.
    said: Arc<Mutex<String>>,
    readers: Vec<JoinHandle<()>>,
    client: Client,
    vhost_socket: PathBuf,
    api_socket: PathBuf,
    /// Where Kata puts what containers shall see.
    mounts: PathBuf,
    /// nydus-snapshotter's root.
    snapshots: PathBuf,
}

impl Sandbox {
    /// Starts the daemon and shares the sandbox's directory. `dir` is the sandbox's own, for sockets; `root`
    /// the node's. The calling thread must be in a mount namespace of its own.
    pub fn start(root: &Path, dir: &Path, kind: Kind, id: &str) -> Sandbox {
        let settings = Settings::load(root, &kind);
        assert_eq!(settings.shared_fs, "virtio-fs-nydus");
        let base = root.join("run/kata-containers/shared/sandboxes").join(id);
        let (mounts, shared) = match kind.runtime {
            // Containers see a read-only view, into which later mounts propagate.
            Runtime::Go => (base.join("mounts"), base.join("shared")),
            Runtime::Rs => (base.join("rw"), base.join("rw")),
        };
        share(&mounts, &shared);

        let vm = dir.join("run/vc/vm").join(id);
        fs::create_dir_all(&vm).unwrap();
        let name = match (kind.runtime, kind.vmm) {
            (Runtime::Go, Vmm::Qemu) => "vhost-fs.sock",
            _ => "virtiofsd.sock",
        };
        let (vhost_socket, api_socket) = (vm.join(name), vm.join("nydusd-api.sock"));
        // The Go runtime leaves sockets that an earlier daemon has left.
        if kind.runtime == Runtime::Go {
            drop(UnixListener::bind(&vhost_socket).unwrap());
            drop(UnixListener::bind(&api_socket).unwrap());
        }
        let daemon = settings.daemon_below(root);
        assert!(fs::symlink_metadata(&daemon).unwrap().is_file() && shared.is_dir());
        let mut command = Command::new(&daemon);
        command.arg("virtiofs").stdin(Stdio::null());
        match (kind.runtime, kind.vmm) {
            (Runtime::Go, _) => {
                command.args(["--log-level", "info", "--apisock"]).arg(&api_socket);
                command.arg("--sock").arg(&vhost_socket);
            }
            (Runtime::Rs, Vmm::Qemu) => {
                command.args(["--hybrid-mode", "--log-level", "info", "--apisock"]);
                command.arg(&api_socket).arg("--sock").arg(&vhost_socket);
            }
            // As a rootless sandbox has it: bare names, seen from the sockets' directory.
            (Runtime::Rs, Vmm::CloudHypervisor) => {
                command.args([
                    "--hybrid-mode",
                    "--log-level",
                    "info",
                    "--apisock",
                    "nydusd-api.sock",
                ]);
                command.args(["--sock", name]).current_dir(&vm);
            }
        }
        command.args(&settings.extra_args);
        command.env("XDG_CACHE_HOME", dir.join("xdg"));
        let said = Arc::new(Mutex::new(String::new()));
        let mut readers = Vec::new();
        let daemon = match kind.runtime {
            // One pipe for both.
            Runtime::Go => {
                let (reader, writer) = std::io::pipe().unwrap();
                command.stdout(writer.try_clone().unwrap()).stderr(writer);
                let child = command.spawn().unwrap();
                drop(command);
                readers.push(read_lines(reader, &said));
                child
            }
            Runtime::Rs => {
                command.stdout(Stdio::piped()).stderr(Stdio::piped());
                let mut child = command.spawn().unwrap();
                readers.push(read_lines(child.stdout.take().unwrap(), &said));
                readers.push(read_lines(child.stderr.take().unwrap(), &said));
                child
            }
        };
        let client = match kind.runtime {
            Runtime::Go => Client::Go(KataGo::connect(&api_socket)),
            Runtime::Rs => Client::Rs(KataRs::connect(&api_socket)),
        };
        let sandbox = Sandbox {
            kind,
            id: id.to_owned(),
            daemon,
            said,
            readers,
            client,
            vhost_socket,
            api_socket,
            mounts,
            snapshots: root.join("var/lib/containerd/io.containerd.snapshotter.v1.nydus"),
        };
        let body = json!({"fs_type": "passthrough_fs", "source": shared, "config": ""});
        sandbox.mount("/containers", &body);
        sandbox
    }

    pub fn vhost_socket(&self) -> &Path {
        &self.vhost_socket
    }

    /// Options with which the agent mounts the share.
    pub fn share_options(&self) -> &'static str {
        match self.kind.runtime {
            Runtime::Go => "rw",
            Runtime::Rs => "nodev",
        }
    }

    /// A directory of the host that all containers see, such as an `emptyDir` volume; mounted when the daemon
    /// has been running for a while. Its path in the guest.
    pub fn add_volume(&self, dir: &Path) -> String {
        let name = format!("{}-volume", self.id);
        let at = self.mounts.join(&name);
        fs::create_dir(&at).unwrap();
        mount_bind(dir, &at).unwrap();
        format!("{GUEST_SHARED}/containers/{name}")
    }

    /// Creates a container of `image`: what the agent is told to mount as its root, as options of an overlay.
    pub fn create_container(&self, cid: &str, image: &Image) -> String {
        let snapshot = self.snapshots.join("snapshots").join(cid);
        for name in ["fs", "work"] {
            fs::create_dir_all(snapshot.join(name)).unwrap();
        }
        let cache = self.snapshots.join("cache");
        fs::create_dir_all(&cache).unwrap();
        let options = mount_options(&snapshot, image, &cache);
        let extra = self.extra_option(&options);

        let at = format!("/rafs/{cid}/lowerdir");
        let body = json!({"fs_type": "rafs", "source": extra.source, "config": extra.config});
        self.mount(&at, &body);
        let dir = self.mounts.join(cid);
        fs::create_dir_all(dir.join("snapshotdir")).unwrap();
        mount_bind(&extra.snapshotdir, dir.join("snapshotdir")).unwrap();
        fs::create_dir(dir.join("rootfs")).unwrap();

        let upper = format!("{GUEST_SHARED}/containers/{cid}/snapshotdir");
        format!("lowerdir={GUEST_SHARED}{at},upperdir={upper}/fs,workdir={upper}/work,index=off")
    }

    /// Takes a container away whose root the agent has unmounted.
    pub fn remove_container(&self, cid: &str) {
        let at = format!("/rafs/{cid}/lowerdir");
        match &self.client {
            Client::Go(kata) => {
                let answer = kata.umount(&at);
                assert_eq!(answer.status, 204, "{answer:?}");
            }
            Client::Rs(kata) => kata.umount(&at).unwrap(),
        }
        let dir = self.mounts.join(cid);
        unmount(dir.join("snapshotdir"), UnmountFlags::DETACH).unwrap();
        fs::remove_dir(dir.join("rootfs")).unwrap();
        fs::remove_dir(dir.join("snapshotdir")).unwrap();
        fs::remove_dir(dir).unwrap();
    }

    /// What containers have written, as the host sees it.
    pub fn upper(&self, cid: &str) -> PathBuf {
        self.snapshots.join("snapshots").join(cid).join("fs")
    }

    /// Mountpoints that the daemon names.
    pub fn mounted(&self) -> Vec<String> {
        let info: Value = match &self.client {
            Client::Go(kata) => kata.call("GET", "/api/v1/daemon", None).json(),
            Client::Rs(kata) => json!({"backend_collection": kata.info().backend_collection}),
        };
        info["backend_collection"].as_object().unwrap().keys().cloned().collect()
    }

    /// Ends the daemon, the VM being down: how it ended, how long it took, and all it has said.
    pub fn stop(mut self) -> (ExitStatus, Duration, String) {
        assert!(self.daemon.try_wait().unwrap().is_none(), "it lives as long as Kata wants");
        let begin = Instant::now();
        match self.kind.runtime {
            Runtime::Go => {
                let pid = libc::pid_t::try_from(self.daemon.id()).unwrap();
                // SAFETY: the child was not waited for yet, so the pid is still its own.
                unsafe { libc::kill(pid, libc::SIGTERM) };
            }
            Runtime::Rs => self.daemon.kill().unwrap(),
        }
        let status = loop {
            if let Some(status) = self.daemon.try_wait().unwrap() {
                break status;
            }
            assert!(begin.elapsed() < STOP_LIMIT, "Kata would have killed it by now");
            std::thread::sleep(Duration::from_millis(1));
        };
        let took = begin.elapsed();
        for reader in std::mem::take(&mut self.readers) {
            reader.join().unwrap();
        }
        // Kata removes both, and does not mind if they are gone.
        for socket in [&self.vhost_socket, &self.api_socket] {
            let left = fs::remove_file(socket).is_ok();
            assert_eq!(left, self.kind.runtime == Runtime::Rs, "SIGTERM leaves no sockets");
        }
        let expected = match self.kind.runtime {
            Runtime::Go => Some(0),
            Runtime::Rs => None,
        };
        assert_eq!(status.code(), expected, "{status}");
        assert!(status.code().is_some() || status.signal() == Some(libc::SIGKILL));
        let said = self.said.lock().unwrap().clone();
        (status, took, said)
    }

    fn mount(&self, at: &str, body: &Value) {
        match &self.client {
            Client::Go(kata) => {
                let answer = kata.mount(at, body);
                assert_eq!(answer.status, 204, "{at}: {answer:?}");
            }
            Client::Rs(kata) => kata.mount(at, body).unwrap(),
        }
    }

    /// What Kata reads of the options that nydus-snapshotter gave containerd.
    fn extra_option(&self, options: &[String]) -> ExtraOption {
        let mut found = options.iter().filter_map(|option| option.strip_prefix("extraoption="));
        let text = match self.kind.runtime {
            // The last one counts.
            Runtime::Go => found.next_back().unwrap(),
            Runtime::Rs => {
                let text = found.next().unwrap();
                assert!(found.next().is_none(), "runtime-rs wants one");
                text
            }
        };
        let extra: ExtraOption = serde_json::from_slice(&STANDARD.decode(text).unwrap()).unwrap();
        assert!(!extra.source.is_empty() && !extra.config.is_empty());
        assert!(["v5", "v6"].contains(&&*extra.fs_version), "runtime-rs takes no other");
        extra
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

#[derive(Deserialize)]
struct ExtraOption {
    source: String,
    config: String,
    snapshotdir: PathBuf,
    fs_version: String,
}

/// Options of the mount that nydus-snapshotter returns for a container, of type `fuse.nydus-overlayfs`.
fn mount_options(snapshot: &Path, image: &Image, cache: &Path) -> Vec<String> {
    let config = snapshotter_config("/1", &image.blobs, cache);
    let extra = json!({"source": image.bootstrap, "config": config, "snapshotdir": snapshot,
                       "fs_version": "v6"});
    vec![
        format!("workdir={}", snapshot.join("work").display()),
        format!("upperdir={}", snapshot.join("fs").display()),
        format!("lowerdir={}", snapshot.join("mnt").display()),
        format!("extraoption={}", STANDARD.encode(extra.to_string())),
    ]
}

/// Makes the sandbox's directory, and the view of it that the daemon shares.
fn share(mounts: &Path, shared: &Path) {
    fs::create_dir_all(mounts).unwrap();
    mount_bind(mounts, mounts).unwrap();
    mount_change(mounts, MountPropagationFlags::SHARED).unwrap();
    if mounts != shared {
        fs::create_dir_all(shared).unwrap();
        mount_bind(mounts, shared).unwrap();
        mount_change(shared, MountPropagationFlags::DOWNSTREAM).unwrap();
        mount_remount(shared, MountFlags::BIND | MountFlags::RDONLY, "").unwrap();
    }
}

/// Reads a pipe of the daemon as Kata does: whole lines of UTF-8, none too long.
fn read_lines(pipe: impl Read + Send + 'static, said: &Arc<Mutex<String>>) -> JoinHandle<()> {
    let said = Arc::clone(said);
    std::thread::spawn(move || {
        for line in BufReader::new(pipe).lines() {
            let line = line.expect("UTF-8");
            assert!(line.len() < LINE_LIMIT, "{line:.200}");
            let mut said = said.lock().unwrap();
            said.push_str(&line);
            said.push('\n');
        }
    })
}
