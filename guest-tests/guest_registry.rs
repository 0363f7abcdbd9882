//! From a registry to a guest and back: real images are pushed by skopeo, converted inside the registry, proven
//! equal to their sources, and started from by guests whose host has nothing of them.
//!
//! What a guest must see comes from the tree that umoci, which shares no code with us, unpacks of the same image.
//! Each image meets another kind of registry and another form of its source.

mod support {
    // Each test program uses its own part of these.
    #![allow(dead_code)]
    pub mod guest;
    pub mod initramfs;
    pub mod parts;
    pub mod real_image;
    pub mod registry;
    pub mod tree_text;
}

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use support::guest::{Guest, Machine};
use support::parts::run;
use support::real_image::{Expected, RealImage};
use support::registry::{Registry, Setup};

const START_JOB: &str = include_str!("init/start-job.sh");
const CONTENTS_JOB: &str = include_str!("init/contents-job.sh");

/// Name of the share.
const TAG: &str = "image";

/// How long a daemon may take until it listens, on a busy machine.
const START_LIMIT: Duration = Duration::from_secs(60);

/// An emulated guest that starts a program of tens of megabytes takes minutes on a busy machine.
const GUEST_LIMIT: Duration = Duration::from_secs(900);

#[test]
fn a_python_image_of_docker_starts_from_a_plain_registry() {
    from_registry_to_guest(RealImage::Python, Setup::default(), &["--format", "v2s2"]);
}

#[test]
fn a_node_image_starts_from_a_registry_with_a_user() {
    let user = Some(("someone".to_owned(), "pass:word".to_owned()));
    from_registry_to_guest(RealImage::Node, Setup { user, tls: false }, &["--format", "oci"]);
}

#[test]
fn a_nasty_image_in_zstd_starts_from_a_registry_with_tls() {
    let user = Some(("someone".to_owned(), "secret".to_owned()));
    from_registry_to_guest(RealImage::Nasty, Setup { user, tls: true }, &["--format", "oci"]);
}

fn from_registry_to_guest(image: RealImage, setup: Setup, push: &[&str]) {
    let expected = Expected::of(image).expect("what a guest must see");
    assert!(expected.bytes >= 200_000_000, "{} bytes are too few", expected.bytes);
    assert!(expected.paths >= 10_000, "{} paths are too few", expected.paths);
    let registry = Registry::start(setup).expect("the registry");
    registry
        .push(&image.source().expect("the layout"), "real/image:source", push)
        .expect("the push");
    convert(&registry, "real/image:source", "real/image:rafs");
    check(&registry, "real/image:source", "real/image:rafs");

    let scratch = tempfile::tempdir().expect("a directory");
    let bootstrap =
        bootstrap_of(&registry, "real/image:rafs", scratch.path()).expect("the bootstrap");
    let sizes = blob_sizes(&registry, "real/image:rafs");
    let total: u64 = sizes.iter().map(|(_, size)| size).sum();
    let name = image.name();

    // An empty cache: a guest starts from the image, and a part of it is fetched.
    let seen = registry.requests().len();
    let first = Server::start(&registry, &bootstrap, scratch.path(), "first").expect("the daemon");
    let report = Guest::new(Machine::Qemu11Linux73, &first.socket(), TAG)
        .job(&format!("start='{}'\n{START_JOB}", image.start().replace('\'', r"'\''")))
        .file("expected/metadata", &*expected.metadata)
        .file("expected/start", &*expected.start)
        .file("expected/sample-names", &*expected.sample_names)
        .file("expected/sample", &*expected.sample)
        .time_limit(GUEST_LIMIT)
        .run()
        .expect("the guest");
    report.expect(&["mount", "start", "metadata", "sample"]);
    let started = registry.traffic(seen);
    say(format!(
        "{name}: a guest started in {:.0?} and read a sample: fetched {} of {total} bytes ({} %) with {} requests",
        report.took,
        started.bytes,
        100 * started.bytes / total,
        started.requests
    ));
    assert!(started.bytes > 0, "nothing was fetched: was the cache empty?");
    // How much comes along with what is asked for follows from the link as it was measured: on a busy machine more.
    assert!(started.bytes < total / 10 * 9, "the guest did not need the whole image");

    // A second daemon of the host reads everything, the first one still runs: what is there is not fetched again.
    let second =
        Server::start(&registry, &bootstrap, scratch.path(), "second").expect("the daemon");
    read_everything(&second, &expected);
    let all = registry.traffic_by_blob(seen);
    let fetched: u64 = all.values().map(|traffic| traffic.bytes).sum();
    say(format!("{name}: all of it is read: fetched {fetched} of {total} bytes"));
    for (digest, size) in &sizes {
        let traffic = all.get(digest).copied().unwrap_or_default();
        assert!(
            traffic.bytes <= *size,
            "{digest} of {size} bytes was fetched more than once: {traffic:?}"
        );
    }

    // A third one reads everything, too, and asks the registry for nothing.
    let seen = registry.requests().len();
    let third = Server::start(&registry, &bootstrap, scratch.path(), "third").expect("the daemon");
    read_everything(&third, &expected);
    let again = registry.traffic(seen);
    assert_eq!((again.requests, again.bytes), (0, 0), "what another daemon has fetched is there");
}

/// User-mode Linux reads at nearly the speed of the host: the QEMU guest would take ten minutes.
fn read_everything(server: &Server, expected: &Expected) {
    let report = Guest::new(Machine::Uml72, &server.socket(), TAG)
        .job(CONTENTS_JOB)
        .file("expected/contents", &*expected.contents)
        .file("expected/edges", &*expected.edges)
        .file("expected/bottom", &*expected.bottom)
        .time_limit(GUEST_LIMIT)
        .run()
        .expect("the guest");
    report.expect(&["mount", "contents", "large", "deepest"]);
}

/// `rafs` with what it needs to know of a registry.
fn rafs(registry: &Registry, verb: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rafs"));
    command.arg(verb);
    command.env("DOCKER_CONFIG", registry.docker_config());
    if registry.scheme() == "https" {
        command.arg("--ca-file").arg(registry.ca());
    }
    command
}

fn convert(registry: &Registry, source: &str, target: &str) {
    let start = Instant::now();
    let mut command = rafs(registry, "convert");
    command.arg("--source").arg(registry.reference(source));
    command.arg("--target").arg(registry.reference(target));
    run(&mut command).expect("rafs convert");
    say(format!("converted in {:.1?}", start.elapsed()));
}

fn check(registry: &Registry, source: &str, target: &str) {
    let start = Instant::now();
    let mut command = rafs(registry, "check");
    command.arg("--source").arg(registry.reference(source));
    command.arg("--target").arg(registry.reference(target));
    run(&mut command).expect("rafs check");
    say(format!("checked in {:.1?}", start.elapsed()));
}

/// The bootstrap of a converted image, taken out of its last layer by GNU tar.
fn bootstrap_of(registry: &Registry, name: &str, dir: &Path) -> Result<PathBuf> {
    let manifest = registry.manifest(name)?;
    let layers = manifest["layers"].as_array().context("layers")?;
    let last = layers.last().context("a layer")?;
    assert_eq!(last["annotations"]["containerd.io/snapshot/nydus-bootstrap"], "true", "{last}");
    let blob = registry.blob_file(last["digest"].as_str().context("a digest")?);
    run(Command::new("tar").arg("-xzf").arg(blob).arg("-C").arg(dir).arg("image/image.boot"))?;
    Ok(dir.join("image/image.boot"))
}

/// Digest and size of each blob of data of a converted image.
fn blob_sizes(registry: &Registry, name: &str) -> Vec<(String, u64)> {
    let manifest = registry.manifest(name).expect("the manifest");
    let layers = manifest["layers"].as_array().expect("layers");
    let blob = |layer: &Value| {
        let kind = layer["mediaType"].as_str().expect("a media type");
        assert_eq!(kind, "application/vnd.oci.image.layer.nydus.blob.v1", "{layer}");
        let digest = layer["digest"].as_str().expect("a digest").to_owned();
        (digest, layer["size"].as_u64().expect("a size"))
    };
    layers[..layers.len() - 1].iter().map(blob).collect()
}

/// `rafsd` on a converted image in a registry. Dropping it kills it; if its test has failed, what it logged is
/// printed first.
struct Server {
    child: Child,
    /// Without an extension: of the socket, the log and the configuration.
    path: PathBuf,
}

impl Server {
    /// All servers of one `scratch` share a cache.
    fn start(registry: &Registry, bootstrap: &Path, scratch: &Path, name: &str) -> Result<Server> {
        let path = scratch.join(name);
        let mut backend = json!({
            "scheme": registry.scheme(),
            "host": registry.host(),
            "repo": "real/image",
        });
        if let Some(auth) = registry.auth() {
            backend["auth"] = json!(auth);
        }
        if registry.scheme() == "https" {
            backend["ca_cert_files"] = json!([registry.ca()]);
        }
        let config = json!({
            "device": {
                "backend": { "type": "registry", "config": backend },
                "cache": { "type": "blobcache", "config": { "work_dir": scratch.join("cache") } },
            },
            "mode": "direct",
            "digest_validate": false,
            "enable_xattr": true,
        });
        fs::create_dir_all(scratch.join("cache"))?;
        fs::write(path.with_extension("json"), config.to_string())?;
        let log = File::create(path.with_extension("log"))?;
        let child = Command::new(env!("CARGO_BIN_EXE_rafsd"))
            .arg("virtiofs")
            .arg("--sock")
            .arg(path.with_extension("sock"))
            .arg("--bootstrap")
            .arg(bootstrap)
            .arg("--config")
            .arg(path.with_extension("json"))
            .args(["--tag", TAG, "--log-level", "info"])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let mut server = Server { child, path };
        let deadline = Instant::now() + START_LIMIT;
        while !server.socket().exists() {
            if let Some(status) = server.child.try_wait()? {
                bail!("the daemon ended at once with {status}:\n{}", server.log());
            }
            if Instant::now() > deadline {
                bail!("no socket after {START_LIMIT:?}:\n{}", server.log());
            }
            sleep(Duration::from_millis(5));
        }
        Ok(server)
    }

    fn socket(&self) -> PathBuf {
        self.path.with_extension("sock")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path.with_extension("log")).unwrap_or_else(|e| e.to_string())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // An error means that it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            say(format!("--- log of the daemon ---\n{}", self.log()));
        }
    }
}

/// Prints past the harness's capture: figures that are worth seeing.
fn say(line: impl std::fmt::Display) {
    // A closed stderr is no reason to fail a test.
    let _ = writeln!(std::io::stderr(), "{line}");
}
