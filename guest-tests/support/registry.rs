//! A real OCI registry, `docker-registry` of `scripts/parts registry`, for one test.
//!
//! It listens on a free port of 127.0.0.1, keeps its images in a temporary directory, and is gone with the
//! test: it is killed when the `Registry` is dropped, and with the thread that started it. So a test starts
//! its own; one in a static would end with the first test that used it.
//!
//! What it served is known from its access log: [`Registry::requests`] and [`Registry::traffic`].

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::parts::{Parts, run};

/// How long a registry may take until it answers, on a busy machine.
const START_LIMIT: Duration = Duration::from_secs(120);

/// The registry logs a request just after its last byte: a log that has not grown for this long has all.
const LOG_SETTLES: Duration = Duration::from_secs(1);

/// How a registry meets its clients.
#[derive(Clone, Debug, Default)]
pub struct Setup {
    /// Name and password of the one user; without it, everybody may push and pull.
    pub user: Option<(String, String)>,
    /// Serve TLS with a certificate for `localhost`, `registry.test` and 127.0.0.1 of a CA made for this registry.
    pub tls: bool,
}

/// A running registry.
pub struct Registry {
    child: Child,
    dir: tempfile::TempDir,
    parts: Parts,
    setup: Setup,
    port: u16,
}

/// A line of the access log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub method: String,
    /// As the client sent it, with its query.
    pub path: String,
    pub status: u16,
    /// Of the body.
    pub bytes: u64,
    pub user_agent: String,
}

impl Request {
    /// The digest, if this asked for a blob's bytes.
    pub fn blob(&self) -> Option<&str> {
        let (_, digest) = self.path.split_once("/blobs/")?;
        (self.method == "GET" && digest.contains(':')).then_some(digest)
    }
}

/// What a registry sent of one blob, or of several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// GET requests, answered with 200 or 206.
    pub requests: u64,
    pub bytes: u64,
}

impl Registry {
    /// Open to everybody, over HTTP.
    pub fn plain() -> Result<Registry> {
        Registry::start(Setup::default())
    }

    /// For one user, over HTTP.
    pub fn with_htpasswd(name: &str, password: &str) -> Result<Registry> {
        let user = Some((name.to_owned(), password.to_owned()));
        Registry::start(Setup { user, tls: false })
    }

    /// Open to everybody who trusts its CA, over HTTPS.
    pub fn with_tls() -> Result<Registry> {
        Registry::start(Setup { user: None, tls: true })
    }

    pub fn start(setup: Setup) -> Result<Registry> {
        let parts = Parts::install(&["registry", "skopeo"])?;
        let dir = tempfile::Builder::new().prefix("registry-").tempdir()?;
        let mut http = serde_json::json!({ "addr": "127.0.0.1:0", "secret": "of a test" });
        if setup.tls {
            make_certificates(&parts, dir.path())?;
            http["tls"] = serde_json::json!({
                "certificate": dir.path().join("server.crt"),
                "key": dir.path().join("server.key"),
            });
        }
        let mut config = serde_json::json!({
            "version": "0.1",
            "log": { "level": "info", "formatter": "text" },
            "storage": {
                "filesystem": { "rootdirectory": dir.path().join("data") },
                "delete": { "enabled": true },
            },
            "http": http,
        });
        if let Some((name, password)) = &setup.user {
            let line = run(Command::new(parts.path("htpasswd")?).args(["-nbB", name, password]))?;
            fs::write(dir.path().join("htpasswd"), line)?;
            config["auth"] = serde_json::json!({
                "htpasswd": { "realm": "test", "path": dir.path().join("htpasswd") },
            });
        }
        // What docker and its relatives read: `DOCKER_CONFIG` names this directory. The port comes later.
        fs::create_dir(dir.path().join("docker"))?;
        // JSON is YAML.
        fs::write(dir.path().join("config.yml"), config.to_string())?;
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(parts.path("docker_registry")?);
        let child = command
            .arg("serve")
            .arg(dir.path().join("config.yml"))
            .stdin(Stdio::null())
            .stdout(File::create(dir.path().join("access.log"))?)
            .stderr(File::create(dir.path().join("log"))?)
            .spawn()
            .context("starting docker-registry")?;
        let mut registry = Registry { child, dir, parts, setup, port: 0 };
        registry.wait()?;
        registry.write_docker_config()?;
        Ok(registry)
    }

    fn wait(&mut self) -> Result<()> {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            if let Some(port) = port_in(&self.log()) {
                let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
                if TcpStream::connect_timeout(&address, START_LIMIT).is_ok() {
                    self.port = port;
                    return Ok(());
                }
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("docker-registry ended at once with {status}:\n{}", self.log());
            }
            ensure!(Instant::now() < deadline, "no port after {START_LIMIT:?}:\n{}", self.log());
            sleep(Duration::from_millis(5));
        }
    }

    fn write_docker_config(&self) -> Result<()> {
        let auths = match self.auth() {
            Some(auth) => serde_json::json!({ self.host(): { "auth": auth } }),
            None => serde_json::json!({}),
        };
        let config = serde_json::json!({ "auths": auths });
        fs::write(self.dir.path().join("docker/config.json"), config.to_string())?;
        Ok(())
    }

    /// `127.0.0.1:PORT`, as the first part of a reference and as `host` of a daemon's configuration.
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Name and password of its one user.
    pub fn user(&self) -> Option<(String, String)> {
        self.setup.user.clone()
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// `http` or `https`.
    pub fn scheme(&self) -> &'static str {
        if self.setup.tls { "https" } else { "http" }
    }

    /// `127.0.0.1:PORT/NAME`; the name may end in `:TAG` or `@DIGEST`.
    pub fn reference(&self, name: &str) -> String {
        format!("{}/{name}", self.host())
    }

    /// The certificate of its CA, in PEM.
    ///
    /// Panics if it serves no TLS.
    pub fn ca(&self) -> PathBuf {
        assert!(self.setup.tls, "this registry serves no TLS");
        self.dir.path().join("certificates/ca.crt")
    }

    /// A directory with a `config.json` that holds the user's credentials, if there is one, for `DOCKER_CONFIG`.
    pub fn docker_config(&self) -> PathBuf {
        self.dir.path().join("docker")
    }

    /// Name and password of the user in base64, as `auth` of a daemon's configuration.
    pub fn auth(&self) -> Option<String> {
        use base64::Engine;
        let (name, password) = self.setup.user.as_ref()?;
        Some(base64::engine::general_purpose::STANDARD.encode(format!("{name}:{password}")))
    }

    /// Its temporary directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Where it keeps a blob, so that a test may damage it.
    pub fn blob_file(&self, digest: &str) -> PathBuf {
        let (algorithm, hex) = digest.split_once(':').expect("ALGORITHM:HEX");
        let blobs = self.dir.path().join("data/docker/registry/v2/blobs");
        blobs.join(algorithm).join(&hex[..2]).join(hex).join("data")
    }

    /// Copies an image into the registry with skopeo: `source` as skopeo spells it, `oci:DIR:TAG` for
    /// example, and more of its options, such as `--format v2s2`.
    pub fn push(&self, source: &str, name: &str, options: &[&str]) -> Result<()> {
        let target = format!("docker://{}", self.reference(name));
        run(self.skopeo("copy", "dest").args(options).args([source, &target]))?;
        Ok(())
    }

    /// Copies an image out of the registry with skopeo, to `target` as skopeo spells it.
    pub fn pull(&self, name: &str, target: &str) -> Result<()> {
        let source = format!("docker://{}", self.reference(name));
        run(self.skopeo("copy", "src").args([&source, target]))?;
        Ok(())
    }

    /// The manifest or index of this name, as the registry has it.
    pub fn manifest(&self, name: &str) -> Result<serde_json::Value> {
        let source = format!("docker://{}", self.reference(name));
        let text = run(self.skopeo("inspect", "").args(["--raw", &source]))?;
        serde_json::from_slice(&text).with_context(|| format!("the manifest of {name}"))
    }

    /// skopeo with a verb and all it needs to use this registry as its source or destination: `side` is
    /// `src` or `dest` for a copy, else empty.
    pub fn skopeo(&self, verb: &str, side: &str) -> Command {
        let mut command = Command::new(self.parts.path("skopeo").expect("an installed part"));
        command.args(["--insecure-policy", verb]);
        let dash = if side.is_empty() { "" } else { "-" };
        if self.setup.tls {
            let certificates = self.dir.path().join("certificates");
            command.arg(format!("--{side}{dash}cert-dir={}", certificates.display()));
        } else {
            command.arg(format!("--{side}{dash}tls-verify=false"));
        }
        if let Some((name, password)) = &self.setup.user {
            command.arg(format!("--{side}{dash}creds={name}:{password}"));
        }
        command
    }

    /// All requests so far, in the order in which they ended.
    pub fn requests(&self) -> Vec<Request> {
        let path = self.dir.path().join("access.log");
        let length = || fs::metadata(&path).map_or(0, |metadata| metadata.len());
        let mut before = length();
        loop {
            sleep(LOG_SETTLES);
            let now = length();
            if now == before {
                break;
            }
            before = now;
        }
        let text = fs::read_to_string(&path).expect("the access log is text");
        text.lines().filter_map(parse_access).collect()
    }

    /// Answered GET requests for the bytes of each blob since `from`, a length of [`Registry::requests`].
    pub fn traffic_by_blob(&self, from: usize) -> BTreeMap<String, Traffic> {
        let mut blobs: BTreeMap<String, Traffic> = BTreeMap::new();
        for request in &self.requests()[from..] {
            if let (Some(digest), 200 | 206) = (request.blob(), request.status) {
                let traffic = blobs.entry(digest.to_owned()).or_default();
                traffic.requests += 1;
                traffic.bytes += request.bytes;
            }
        }
        blobs
    }

    /// The sum over all blobs.
    pub fn traffic(&self, from: usize) -> Traffic {
        self.traffic_by_blob(from).values().fold(Traffic::default(), |sum, one| Traffic {
            requests: sum.requests + one.requests,
            bytes: sum.bytes + one.bytes,
        })
    }

    /// What it logged beside its requests.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // An error means that it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let requests = self.requests();
            let from = requests.len().saturating_sub(20);
            let mut stderr = std::io::stderr();
            // A closed stderr is no reason to panic twice.
            let log = self.log();
            let _ =
                writeln!(stderr, "--- last lines of the registry's log, and its last requests ---");
            for line in log.lines().skip(log.lines().count().saturating_sub(20)) {
                let _ = writeln!(stderr, "{line}");
            }
            for request in &requests[from..] {
                let _ = writeln!(stderr, "{request:?}");
            }
        }
    }
}

/// The port in `… msg="listening on 127.0.0.1:37397, tls" …`.
fn port_in(log: &str) -> Option<u16> {
    let (_, rest) = log.split_once("listening on 127.0.0.1:")?;
    let end = rest.find(|c: char| !c.is_ascii_digit())?;
    rest[..end].parse().ok()
}

/// `127.0.0.1 - - [DATE] "GET /v2/NAME/blobs/DIGEST HTTP/1.1" 206 4096 "REFERER" "USER-AGENT"`.
fn parse_access(line: &str) -> Option<Request> {
    let mut quoted = line.split('"');
    let mut request = quoted.nth(1)?.split(' ');
    let mut result = quoted.next()?.split_whitespace();
    Some(Request {
        method: request.next()?.to_owned(),
        path: request.next()?.to_owned(),
        status: result.next()?.parse().ok()?,
        bytes: result.next()?.parse().ok()?,
        user_agent: quoted.nth(2)?.to_owned(),
    })
}

/// A CA, and a certificate of it for `localhost`, `registry.test` and 127.0.0.1, valid for two days. skopeo takes a directory
/// of CAs, so that one is alone in its own.
fn make_certificates(parts: &Parts, dir: &Path) -> Result<()> {
    fs::create_dir(dir.join("certificates"))?;
    fs::write(
        dir.join("openssl.cnf"),
        "[req]\ndistinguished_name = dn\nprompt = no\n[dn]\nCN = a test\n\
         [ca]\nbasicConstraints = critical, CA:TRUE\nkeyUsage = critical, keyCertSign\n\
         subjectKeyIdentifier = hash\n\
         [server]\nbasicConstraints = critical, CA:FALSE\nextendedKeyUsage = serverAuth\n\
         subjectAltName = DNS:localhost, DNS:registry.test, IP:127.0.0.1\nauthorityKeyIdentifier = keyid\n",
    )?;
    let openssl = |arguments: &str| -> Result<()> {
        let mut command = Command::new(parts.path("openssl")?);
        command.args(arguments.split(' ')).current_dir(dir).env("OPENSSL_CONF", "openssl.cnf");
        run(&mut command).map(drop)
    };
    openssl(
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=Test-CA \
         -extensions ca -keyout ca.key -out certificates/ca.crt",
    )?;
    openssl(
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost \
         -extensions server -CA certificates/ca.crt -CAkey ca.key -keyout server.key -out server.crt",
    )
}
