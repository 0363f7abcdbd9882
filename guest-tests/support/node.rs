//! A machine as docs/snapshotter.md sets one up, in namespaces of its own: containerd and runc of Debian, and
//! nydus-snapshotter of its Go module, with the files of `kata-config/` as they are and rafsd in nydusd's place.
//!
//! Its processes are in a PID namespace that ends with the test, however that ends; its mounts are in a mount
//! namespace, where `/etc`, `/run`, `/var/lib` and `/usr/local/bin` are its own. The network is the host's.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::parts::{Parts, run};
use super::registry::Registry;

/// How long anything may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// The name by which the node knows the registry; `localhost` would be asked without TLS.
const REGISTRY_NAME: &str = "registry.test";

/// Which containerd of `scripts/parts`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Containerd {
    /// 1.7: images are pulled over the Kubernetes interface.
    V1,
    /// 2.1: images are pulled with `ctr`.
    V2,
}

impl Containerd {
    fn part(self) -> &'static str {
        match self {
            Containerd::V1 => "containerd_1",
            Containerd::V2 => "containerd_2",
        }
    }

    fn config(self) -> &'static str {
        match self {
            Containerd::V1 => "config-v2.toml",
            Containerd::V2 => "config-v3.toml",
        }
    }
}

/// A running node. Dropping it ends all its processes and unmounts what they have mounted.
pub struct Node {
    dir: tempfile::TempDir,
    containerd: Containerd,
    /// Parent of the first process of the namespaces.
    outer: Child,
    /// As the host counts.
    init: u32,
    snapshotter: Option<Child>,
    _containerd: Child,
    registry: String,
    user: (String, String),
}

impl Node {
    /// Everything runs: the snapshotter with `kata-config/nydus-snapshotter/CONFIG`.
    pub fn start(containerd: Containerd, config: &str, registry: &Registry) -> Result<Node> {
        let parts =
            Parts::install(&["containerd-1", "containerd-2", "nydus-snapshotter", "tools"])?;
        let dir = tempfile::Builder::new().prefix("node-").tempdir()?;
        furnish(dir.path(), containerd, config, registry, &parts)?;
        let outer = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--", "unshare", "--pid", "--mount", "--mount-proc"])
            .args(["--fork", "--kill-child=KILL", "--", "sh", "-ec", SETUP, "sh"])
            .arg(dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(dir.path().join("setup.log"))?)
            .spawn()
            .context("starting unshare")?;
        let mut outer = Guard(Some(outer));
        let init = wait_for("the namespaces", || {
            let pid = outer.0.as_ref().expect("not taken yet").id();
            let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
            let ready = dir.path().join("ready").exists();
            children.ok().filter(|_| ready)?.split_whitespace().next()?.parse().ok()
        })
        .with_context(|| fs::read_to_string(dir.path().join("setup.log")).unwrap_or_default())?;
        let user = registry.user().context("a registry with a user")?;
        let mut node = Node {
            containerd,
            init,
            snapshotter: None,
            _containerd: start_inside(init, dir.path(), "containerd", &["containerd"])?,
            registry: format!("{REGISTRY_NAME}:{}", registry.port()),
            user,
            outer: outer.0.take().expect("not taken yet"),
            dir,
        };
        node.start_snapshotter()?;
        Ok(node)
    }

    /// As its unit does, and waits until it answers, and containerd has found it: what containerd could not reach it
    /// tries again only after up to three seconds, and says meanwhile that the connection was refused.
    pub fn start_snapshotter(&mut self) -> Result<()> {
        self.snapshotter = Some(self.start_unit("nydus-snapshotter.service", "")?);
        wait_for("nydus-snapshotter", || self.daemons().ok())?;
        let list = ["snapshots", "--snapshotter", "nydus", "list"];
        wait_for("containerd with nydus-snapshotter", || self.ctr(&list).ok()).map(drop)
    }

    /// Edits the snapshotter's configuration: in effect when it starts again.
    pub fn edit_config(&self, edit: impl FnOnce(&str) -> String) -> Result<()> {
        let path = self.path("/etc/nydus/config.toml");
        let text = fs::read_to_string(&path)?;
        Ok(fs::write(&path, edit(&text))?)
    }

    /// Starts what a unit of `kata-config/systemd` starts. Its PID on the node is in a file of the unit's name.
    pub fn start_unit(&self, unit: &str, instance: &str) -> Result<Child> {
        let path = repository().join("kata-config/systemd").join(unit);
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let text = text.replace("%i", instance);
        let value =
            |key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        if let Some(directory) = value("RuntimeDirectory") {
            self.inside(&["mkdir", "-p", &format!("/run/{directory}")])?;
        }
        if let Some(before) = value("ExecStartPre") {
            // With "-", it may fail.
            let _ = self.inside(&before.trim_start_matches('-').split(' ').collect::<Vec<_>>());
        }
        let line: Vec<_> = value("ExecStart").context("ExecStart")?.split(' ').collect();
        start_inside(self.init, self.dir.path(), unit, &line)
    }

    /// Starts a program on the node, to end with it.
    pub fn start_program(&self, line: &[&str]) -> Result<Child> {
        start_inside(self.init, self.dir.path(), line[0], line)
    }

    /// Sends a signal to what a unit has started, and waits for its end.
    pub fn stop_unit(&self, unit: &str, mut child: Child, signal: &str) -> Result<ExitStatus> {
        let pid = fs::read_to_string(self.dir.path().join(format!("{unit}.pid")))?;
        self.inside(&["kill", signal, pid.trim()])?;
        wait_for("the end of a unit", || child.try_wait().ok().flatten())
    }

    /// As systemd does, with SIGTERM to it alone.
    pub fn stop_snapshotter(&mut self) -> Result<()> {
        self.end_snapshotter("-TERM")
    }

    pub fn kill_snapshotter(&mut self) -> Result<()> {
        self.end_snapshotter("-KILL")
    }

    fn end_snapshotter(&mut self, signal: &str) -> Result<()> {
        let child = self.snapshotter.take().context("it runs")?;
        self.stop_unit("nydus-snapshotter.service", child, signal).map(drop)
    }

    /// Runs a command on the node: its standard output.
    pub fn inside(&self, command: &[&str]) -> Result<String> {
        let output = run(enter(self.init).args(command))?;
        Ok(String::from_utf8_lossy(&output).into_owned())
    }

    /// `ctr`, in the namespace of Kubernetes.
    pub fn ctr(&self, arguments: &[&str]) -> Result<String> {
        self.inside(&[&["ctr", "--namespace", "k8s.io"], arguments].concat())
    }

    /// What the node calls an image of the registry.
    pub fn image(&self, name: &str) -> String {
        format!("{}/{name}", self.registry)
    }

    pub fn pull(&self, name: &str) -> Result<()> {
        let image = self.image(name);
        let (user, password) = &self.user;
        match self.containerd {
            Containerd::V1 => {
                pull_by_cri(&self.path("/run/containerd/containerd.sock"), &image, user, password)
            }
            Containerd::V2 => {
                let user = format!("{user}:{password}");
                self.ctr(&["images", "pull", "--snapshotter", "nydus", "--user", &user, &image])
                    .map(drop)
            }
        }
    }

    /// Runs a line for the shell in a container of `image` to its end: its output.
    pub fn run(&self, image: &str, id: &str, line: &str) -> Result<String> {
        let image = self.image(image);
        self.ctr(&["run", "--rm", "--snapshotter", "nydus", &image, id, "/bin/sh", "-c", line])
    }

    /// Starts a container that goes on; what it prints is in the file [`Node::output`] reads.
    pub fn run_on(&self, image: &str, id: &str, line: &str) -> Result<()> {
        let image = self.image(image);
        let log = format!("file://{}", self.dir.path().join(id).with_extension("out").display());
        let run = ["run", "--detach", "--snapshotter", "nydus", "--log-uri", &log];
        self.ctr(&[&run[..], &[&image, id, "/bin/sh", "-c", line]].concat()).map(drop)
    }

    /// What a container has printed so far.
    pub fn output(&self, id: &str) -> String {
        fs::read_to_string(self.dir.path().join(id).with_extension("out")).unwrap_or_default()
    }

    pub fn kill_container(&self, id: &str) -> Result<()> {
        self.ctr(&["tasks", "kill", "--signal", "KILL", id])?;
        // It says that the program ended with a signal, by failing.
        wait_for("the end of a container", || {
            let _ = self.ctr(&["tasks", "delete", id]);
            self.ctr(&["containers", "delete", id]).ok()
        })
        .map(drop)
    }

    /// Removes an image by all its names and has containerd collect what nobody needs.
    pub fn remove_image(&self, name: &str) -> Result<()> {
        let image = self.image(name);
        let (repository, _) = image.rsplit_once(':').context("a tag")?;
        let all = self.ctr(&["images", "list"])?;
        let digest = all
            .lines()
            .find(|line| line.starts_with(&format!("{image} ")))
            .and_then(|line| line.split_whitespace().nth(2))
            .context("the image is listed")?
            .to_owned();
        let names: Vec<_> = all
            .lines()
            .filter(|line| line.contains(&digest))
            .filter_map(|line| line.split_whitespace().next())
            .collect();
        ensure!(names.iter().any(|name| name.starts_with(repository)), "{all}");
        self.ctr(&[&["images", "remove", "--sync"], &names[..]].concat()).map(drop)
    }

    /// What the snapshotter says of its daemons, by their PIDs inside the node.
    pub fn daemons(&self) -> Result<BTreeMap<u64, Value>> {
        let answer = self.system("GET", "/api/v1/daemons", None)?;
        let list: Option<Vec<Value>> = serde_json::from_str(&answer)?;
        let pid = |daemon: Value| Some((daemon["pid"].as_u64()?, daemon));
        Ok(list.unwrap_or_default().into_iter().filter_map(pid).collect())
    }

    /// Asks the snapshotter's system controller.
    pub fn system(&self, method: &str, path: &str, body: Option<Value>) -> Result<String> {
        self.ask("/run/containerd-nydus/system.sock", method, path, body)
    }

    /// Asks who serves HTTP on a socket of the node.
    pub fn ask(
        &self,
        socket: &str,
        method: &str,
        path: &str,
        body: Option<Value>,
    ) -> Result<String> {
        let socket = self.path(socket);
        let client = client(&socket);
        runtime()?.block_on(async {
            let client = client.build()?;
            let mut request = client.request(method.parse()?, format!("http://localhost{path}"));
            if let Some(body) = body {
                request = request.body(body.to_string());
            }
            let answer = request.send().await?;
            let (status, text) = (answer.status(), answer.text().await?);
            ensure!(status.is_success(), "{method} {path}: {status}: {text}");
            Ok(text)
        })
    }

    /// A file of the node as the host sees it.
    pub fn path(&self, inside: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{inside}", self.init))
    }

    /// Mounts of rafsd on the node; those of the host were there before.
    pub fn mounts(&self) -> Result<Vec<String>> {
        let table = fs::read_to_string(format!("/proc/{}/mounts", self.init))?;
        let fields = table.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        Ok(fields
            .filter(|f| f[2] == "fuse.rafsd" && f[1].starts_with("/var/lib/"))
            .map(|f| f[1].to_owned())
            .collect())
    }

    /// What the snapshotter measures, for Prometheus, at the address in its configuration.
    pub fn metrics(&self, address: &str) -> Result<String> {
        let url = format!("http://{address}/v1/metrics");
        rustls::crypto::ring::default_provider().install_default().ok();
        runtime()?.block_on(async { Ok(reqwest::get(url).await?.text().await?) })
    }

    /// The logs of all daemons that there are.
    pub fn daemon_logs(&self) -> String {
        let logs = self.path("/var/lib/containerd/io.containerd.snapshotter.v1.nydus/logs");
        let logs = fs::read_dir(logs).into_iter().flatten().flatten();
        let logs = logs.map(|entry| entry.path().join("nydusd.log"));
        logs.filter_map(|path| fs::read_to_string(path).ok()).collect()
    }

    /// Waits until the snapshotter has logged `what` since it started and since it last started a daemon.
    pub fn wait_for_log(&self, what: &str) -> Result<()> {
        let path = "/var/lib/containerd/io.containerd.snapshotter.v1.nydus/logs";
        let log = self.path(path).join("nydus-snapshotter.log");
        wait_for(what, || {
            let log = fs::read_to_string(&log).ok()?;
            let starts = ["Start nydus-snapshotter.", "nydusd command: "];
            let since = starts.iter().filter_map(|start| log.rfind(start)).max()?;
            log[since..].contains(what).then_some(())
        })
    }

    /// All logs, for a test that has failed.
    pub fn logs(&self) -> String {
        let is_log = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "log");
        let logs = walkdir::WalkDir::new(self.dir.path().join("lib")).into_iter().flatten();
        let logs = logs.map(walkdir::DirEntry::into_path);
        let own = walkdir::WalkDir::new(self.dir.path()).max_depth(1).into_iter().flatten();
        let own = own.map(walkdir::DirEntry::into_path);
        let mut text = String::new();
        for path in own.chain(logs).filter(is_log) {
            let log = fs::read(&path).unwrap_or_default();
            let log = String::from_utf8_lossy(&log);
            // What is said each time a test asks.
            let polled = ["RSS memory", "file system metrics", "no single instance"];
            let lines = log.lines().filter(|line| !polled.iter().any(|text| line.contains(text)));
            let skip = lines.clone().count().saturating_sub(90);
            text += &format!("--- {} ---\n", path.display());
            for line in lines.skip(skip) {
                text += line;
                text.push('\n');
            }
        }
        text
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = std::io::Write::write_all(&mut std::io::stderr(), self.logs().as_bytes());
        }
        // The namespaces end with it; an error means that they have.
        let _ = self.outer.kill();
        let _ = self.outer.wait();
        if let Some(child) = &mut self.snapshotter {
            let _ = child.wait();
        }
        let _ = self._containerd.wait();
    }
}

/// What makes the namespaces the node's own; $1 is its directory. dash as PID 1 reaps whoever is left.
const SETUP: &str = r#"
mount -t tmpfs run /run
mount -t overlay -o lowerdir=/etc,upperdir="$1/etc",workdir="$1/etc.work" overlay /etc
mount --bind "$1/lib" /var/lib
mount --bind "$1/bin" /usr/local/bin
: >"$1/ready"
while :; do sleep 1; done
"#;

/// Lays out what a machine has after the steps of docs/snapshotter.md.
fn furnish(
    dir: &Path,
    containerd: Containerd,
    config: &str,
    registry: &Registry,
    parts: &Parts,
) -> Result<()> {
    for name in ["etc/containerd", "etc/nydus", "etc/ssl/certs", "etc.work", "lib", "bin", "docker"]
    {
        fs::create_dir_all(dir.join(name))?;
    }
    let ours = repository().join("kata-config");
    let copy = |from: &str, to: &str| {
        let from = ours.join(from);
        fs::copy(&from, dir.join(to)).with_context(|| from.display().to_string())
    };
    copy(&format!("containerd/{}", containerd.config()), "etc/containerd/config.toml")?;
    copy(&format!("nydus-snapshotter/{config}"), "etc/nydus/config.toml")?;
    copy("nydus-snapshotter/nydusd-config.json", "etc/nydus/nydusd-config.json")?;
    fs::copy(env!("CARGO_BIN_EXE_rafsd"), dir.join("bin/rafsd"))?;
    let programs = ["containerd", "containerd-shim-runc-v2", "ctr", "runc"];
    for program in programs {
        symlink(parts.path(containerd.part())?.join(program), dir.join("bin").join(program))?;
    }
    for program in ["containerd-nydus-grpc", "nydus-overlayfs"] {
        symlink(parts.path("nydus_snapshotter")?.join(program), dir.join("bin").join(program))?;
    }

    // The registry: found by name, trusted by everybody, and known to the snapshotter as after `docker login`.
    let mut hosts = fs::read_to_string("/etc/hosts").unwrap_or_default();
    hosts += &format!("\n127.0.0.1 {REGISTRY_NAME}\n");
    fs::write(dir.join("etc/hosts"), hosts)?;
    let bundle = "etc/ssl/certs/ca-certificates.crt";
    let mut trusted = fs::read(Path::new("/").join(bundle)).unwrap_or_default();
    trusted.extend(fs::read(registry.ca())?);
    fs::write(dir.join(bundle), trusted)?;
    let host = format!("{REGISTRY_NAME}:{}", registry.port());
    let auths = serde_json::json!({ "auths": { host: { "auth": registry.auth() } } });
    fs::write(dir.join("docker/config.json"), auths.to_string())?;
    Ok(())
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn enter(init: u32) -> Command {
    let mut command = Command::new("nsenter");
    command.args(["--target", &init.to_string(), "--pid", "--mount", "--"]);
    command.stdin(Stdio::null()).env("PATH", "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    command
}

/// Starts a program on the node, with its PID there in `NAME.pid` and its output in `NAME.log`.
fn start_inside(init: u32, dir: &Path, name: &str, line: &[&str]) -> Result<Child> {
    let log = File::options().create(true).append(true).open(dir.join(format!("{name}.log")))?;
    enter(init)
        .args(["sh", "-c", "echo $$ >\"$1\"; shift; exec \"$@\"", "sh"])
        .arg(dir.join(format!("{name}.pid")))
        .args(line)
        .env("DOCKER_CONFIG", dir.join("docker"))
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("starting {name}"))
}

/// Kills what was not taken.
struct Guard(Option<Child>);

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Asks again until there is an answer.
pub fn wait_for<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> Result<T> {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(answer) = ask() {
            return Ok(answer);
        }
        if Instant::now() > deadline {
            bail!("not within {LIMIT:?}: {what}");
        }
        sleep(Duration::from_millis(50));
    }
}

fn client(socket: &Path) -> reqwest::ClientBuilder {
    // Another test of this process may have installed it.
    rustls::crypto::ring::default_provider().install_default().ok();
    reqwest::Client::builder().unix_socket(socket).timeout(LIMIT)
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

/// `runtime.v1.ImageService/PullImage`, as kubelet and crictl call it: gRPC with one small message.
fn pull_by_cri(socket: &Path, image: &str, user: &str, password: &str) -> Result<()> {
    let spec = field(1, image.as_bytes());
    let auth = [field(1, user.as_bytes()), field(2, password.as_bytes())].concat();
    let message = [field(1, &spec), field(2, &auth)].concat();
    let length = u32::try_from(message.len())?.to_be_bytes();
    let body = [&[0][..], &length, &message].concat();
    let client = client(socket).http2_prior_knowledge();
    runtime()?.block_on(async {
        let request = client
            .build()?
            .post("http://localhost/runtime.v1.ImageService/PullImage")
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(body);
        let answer = request.send().await?;
        // An error comes as headers alone.
        let headers = format!("{:?}", answer.headers());
        ensure!(!answer.bytes().await?.is_empty(), "pulling {image}: {headers}");
        Ok(())
    })
}

/// A field of Protocol Buffers with bytes, at most 127.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let length = u8::try_from(bytes.len()).expect("short names");
    assert!(length < 128, "short names");
    [&[number << 3 | 2, length], bytes].concat()
}
