//! The credentials that `docker login`, `podman login` and `skopeo login` keep.
//!
//! Files are looked for in this order; the first that exists and has something for the registry
//! counts: `$REGISTRY_AUTH_FILE`, `$DOCKER_CONFIG/config.json` or `~/.docker/config.json`,
//! `$XDG_RUNTIME_DIR/containers/auth.json`, `~/.config/containers/auth.json`.
//!
//! In a file, a credential helper for the registry goes before an entry in `auths`, and that before
//! the general `credsStore`. Entries are read by the `docker_credential` crate; helpers are run here,
//! as a helper that waits for a user would otherwise be waited for without end.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use docker_credential::{CredentialRetrievalError, DockerCredential};
use serde::Deserialize;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

use super::auth::{Credentials, Secret};
use super::error::OciError;

/// Time for a credential helper.
const HELPER_TIMEOUT: Duration = Duration::from_secs(30);

/// Longest answer of a helper and longest configuration file, in bytes.
const MAX_ANSWER: u64 = 1 << 20;

/// The credentials for `registry` (`host[:port]`, or `docker.io`) that the user has. Anonymous if
/// there are none; an error if there are some that cannot be read.
pub async fn credentials(registry: &str) -> Result<Credentials, OciError> {
    let env = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    find(&config_files(env), registry, HELPER_TIMEOUT).await
}

fn config_files(env: impl Fn(&str) -> Option<PathBuf>) -> Vec<PathBuf> {
    let home = env("HOME");
    let docker = env("DOCKER_CONFIG").or_else(|| home.as_ref().map(|h| h.join(".docker")));
    let config = env("XDG_CONFIG_HOME").or_else(|| home.as_ref().map(|h| h.join(".config")));
    [
        env("REGISTRY_AUTH_FILE"),
        docker.map(|d| d.join("config.json")),
        env("XDG_RUNTIME_DIR").map(|d| d.join("containers/auth.json")),
        config.map(|d| d.join("containers/auth.json")),
    ]
    .into_iter()
    .flatten()
    .collect()
}

async fn find(
    files: &[PathBuf],
    registry: &str,
    timeout: Duration,
) -> Result<Credentials, OciError> {
    for file in files {
        let fail = |reason: String| OciError::Credentials {
            host: registry.to_owned(),
            reason: format!("{}: {reason}", file.display()),
        };
        let text = match read_bounded(file).await {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            Err(e) => return Err(fail(e.to_string())),
        };
        if let Some(found) = in_file(&text, registry, timeout).await.map_err(fail)? {
            return Ok(found);
        }
    }
    Ok(Credentials::Anonymous)
}

async fn read_bounded(file: &Path) -> std::io::Result<Vec<u8>> {
    let mut text = Vec::new();
    tokio::fs::File::open(file).await?.take(MAX_ANSWER).read_to_end(&mut text).await?;
    Ok(text)
}

/// The part of the file that names helpers.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Helpers {
    #[serde(default)]
    creds_store: String,
    #[serde(default)]
    cred_helpers: HashMap<String, String>,
}

async fn in_file(
    text: &[u8],
    registry: &str,
    timeout: Duration,
) -> Result<Option<Credentials>, String> {
    // Messages of serde would quote what may be a secret.
    let mut document: Value =
        serde_json::from_slice(text).map_err(|_| "it is not a JSON document".to_owned())?;
    let helpers = Helpers::deserialize(&document)
        .map_err(|_| "credsStore or credHelpers is not what it must be".to_owned())?;
    let names = names(registry);
    let own = names.iter().find_map(|n| Some((n, helpers.cred_helpers.get(n.as_str())?)));
    if let Some((name, helper)) = own.filter(|(_, helper)| !helper.is_empty()) {
        return ask(helper, name, timeout).await;
    }
    // What is left for the crate is a file without helpers.
    if let Some(document) = document.as_object_mut() {
        document.remove("credsStore");
        document.remove("credHelpers");
    }
    let text = document.to_string();
    for name in &names {
        match docker_credential::get_credential_from_reader(text.as_bytes(), name) {
            Ok(DockerCredential::IdentityToken(token)) if !token.is_empty() => {
                return Ok(Some(Credentials::Identity(Secret::new(token))));
            }
            Ok(DockerCredential::UsernamePassword(user, password)) if !user.is_empty() => {
                return Ok(Some(Credentials::Basic { user, password: Secret::new(password) }));
            }
            // An empty entry is what docker leaves when a helper keeps the rest.
            Ok(_) | Err(CredentialRetrievalError::NoCredentialConfigured) => {}
            Err(e) => return Err(e.to_string()),
        }
    }
    if helpers.creds_store.is_empty() {
        return Ok(None);
    }
    ask(&helpers.creds_store, &names[0], timeout).await
}

/// The keys under which a registry is found, the one that docker writes first.
fn names(registry: &str) -> Vec<String> {
    let names: &[&str] = match registry {
        "docker.io" | "index.docker.io" | "registry-1.docker.io" => {
            &["https://index.docker.io/v1/", "index.docker.io", "docker.io", "registry-1.docker.io"]
        }
        _ => return vec![registry.to_owned(), format!("https://{registry}")],
    };
    names.iter().map(|&n| n.to_owned()).collect()
}

#[derive(Deserialize)]
struct HelperAnswer {
    #[serde(rename = "Username")]
    username: String,
    #[serde(rename = "Secret")]
    secret: String,
}

/// Runs `docker-credential-HELPER get`. None if it has nothing for the server.
async fn ask(helper: &str, server: &str, timeout: Duration) -> Result<Option<Credentials>, String> {
    let program = format!("docker-credential-{helper}");
    if helper.contains('/') {
        return Err(format!("{helper:?} is no name of a credential helper"));
    }
    let run = async {
        let mut child = Command::new(&program)
            .arg("get")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let write = async {
            let mut stdin = stdin.expect("it is piped");
            match stdin.write_all(format!("{server}\n").as_bytes()).await {
                // It need not read its input to answer.
                Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(e),
                _ => Ok(()),
            }
        };
        let mut answer = Vec::new();
        let mut stdout = stdout.expect("it is piped").take(MAX_ANSWER);
        tokio::try_join!(write, stdout.read_to_end(&mut answer))?;
        Ok::<_, std::io::Error>((child.wait().await?, answer))
    };
    let (status, answer) = tokio::time::timeout(timeout, run)
        .await
        .map_err(|_| format!("{program} did not answer in {} s", timeout.as_secs_f64()))?
        .map_err(|e| format!("cannot run {program}: {e}"))?;
    if !status.success() {
        // The message that every helper gives, from the library they share.
        let text = String::from_utf8_lossy(&answer);
        if text.contains("credentials not found") {
            return Ok(None);
        }
        return Err(format!("{program} failed: {status}"));
    }
    let answer: HelperAnswer = serde_json::from_slice(&answer)
        .map_err(|_| format!("the answer of {program} is not what it must be"))?;
    let secret = Secret::new(answer.secret);
    Ok(Some(match answer.username.as_str() {
        "<token>" => Credentials::Identity(secret),
        "" => Credentials::Anonymous,
        _ => Credentials::Basic { user: answer.username, password: secret },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn basic(user: &str, password: &str) -> Credentials {
        Credentials::Basic { user: user.into(), password: Secret::new(password) }
    }

    async fn look(text: &str, registry: &str) -> Result<Option<Credentials>, String> {
        in_file(text.as_bytes(), registry, Duration::from_secs(20)).await
    }

    #[tokio::test]
    async fn entries_are_found_by_the_names_that_docker_and_podman_give_them() {
        // dTpw is u:p, YTpiOmM= is a:b:c.
        let text = r#"{"auths": {
            "https://index.docker.io/v1/": {"auth": "dTpw"},
            "r.example:5000": {"auth": "YTpiOmM="},
            "https://s.example/v2/": {"username": "s", "password": "t"},
            "i.example": {"auth": "dTpw", "identitytoken": "it"},
            "kept-by-a-helper.example": {}
        }, "currentContext": "x"}"#;
        let cases = [
            ("docker.io", Some(basic("u", "p"))),
            ("r.example:5000", Some(basic("a", "b:c"))),
            ("s.example", Some(basic("s", "t"))),
            ("i.example", Some(Credentials::Identity(Secret::new("it")))),
            ("r.example", None),
            ("other.example", None),
            ("kept-by-a-helper.example", None),
        ];
        for (registry, want) in cases {
            assert_eq!(look(text, registry).await.unwrap(), want, "{registry}");
        }
    }

    #[tokio::test]
    async fn a_damaged_file_is_an_error_that_does_not_quote_it() {
        for text in ["{", r#"{"auths":{"r":{"auth":"secret!"}}}"#, r#"{"credsStore":["secret"]}"#] {
            let error = look(text, "r").await.expect_err(text);
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[tokio::test]
    async fn helpers_are_asked_and_do_not_hold_us_up() {
        let dir = tempfile::tempdir().unwrap();
        let script = |name: &str, body: &str| {
            let path = dir.path().join(format!("docker-credential-{name}"));
            std::fs::write(&path, format!("#!/bin/sh\nread server\n{body}\n")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
            // `ask` refuses paths, so the test runs helpers through a name that PATH finds.
            path
        };
        script("ok", r#"echo "{\"Username\":\"$server\",\"Secret\":\"pw\"}""#);
        script("token", r#"echo '{"Username":"<token>","Secret":"it"}'"#);
        script("none", "echo 'credentials not found in native keychain'; exit 1");
        script("bad", "echo secret; exit 0");
        script("broken", "echo secret; exit 1");
        script("slow", "exec sleep 1000");
        // Cargo runs tests as threads: PATH is changed for a child only.
        let path = format!("{}:{}", dir.path().display(), std::env::var("PATH").unwrap());
        let this = std::env::current_exe().unwrap();
        let output = tokio::process::Command::new(this)
            .args(["--exact", "oci::docker_config::tests::in_a_child", "--ignored", "--nocapture"])
            .env("PATH", path)
            .output()
            .await
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }

    /// The part of the test above that needs its `PATH`.
    #[tokio::test]
    #[ignore = "run by helpers_are_asked_and_do_not_hold_us_up"]
    async fn in_a_child() {
        let own = r#"{"credHelpers": {"r.example": "ok", "t.example": "token"},
                      "auths": {"a.example": {"auth": "dTpw"}}, "credsStore": "none"}"#;
        assert_eq!(look(own, "r.example").await.unwrap(), Some(basic("r.example", "pw")));
        let token = Some(Credentials::Identity(Secret::new("it")));
        assert_eq!(look(own, "t.example").await.unwrap(), token);
        assert_eq!(look(own, "a.example").await.unwrap(), Some(basic("u", "p")));
        assert_eq!(look(own, "other.example").await.unwrap(), None);
        for (helper, message) in [
            ("bad", "not what it must be"),
            ("broken", "failed"),
            ("missing", "cannot run docker-credential-missing"),
            ("a/b", "no name of a credential helper"),
        ] {
            let text = format!(r#"{{"credsStore": "{helper}"}}"#);
            let error = look(&text, "r.example").await.expect_err(helper);
            assert!(error.contains(message) && !error.contains("secret"), "{error}");
        }
        let text = br#"{"credsStore": "slow"}"#;
        let error = in_file(text, "r.example", Duration::from_millis(300)).await.unwrap_err();
        assert!(error.contains("did not answer in 0.3 s"), "{error}");
    }

    #[tokio::test]
    async fn the_first_file_that_knows_the_registry_counts() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let files = [
            dir.path().join("missing"),
            file("a", r#"{"auths": {"a.example": {"auth": "YTpi"}}}"#),
            file(
                "b",
                r#"{"auths": {"a.example": {"auth": "dTpw"}, "b.example": {"auth": "dTpw"}}}"#,
            ),
        ];
        let find = async |registry| find(&files, registry, HELPER_TIMEOUT).await.unwrap();
        assert_eq!(find("a.example").await, basic("a", "b"));
        assert_eq!(find("b.example").await, basic("u", "p"));
        assert_eq!(find("c.example").await, Credentials::Anonymous);
    }

    #[test]
    fn files_are_looked_for_where_docker_and_podman_put_them() {
        let env = |set: &'static [(&str, &str)]| {
            config_files(move |name| {
                set.iter().find(|(n, _)| *n == name).map(|(_, v)| PathBuf::from(v))
            })
        };
        let paths = |p: &[&str]| p.iter().map(PathBuf::from).collect::<Vec<_>>();
        assert_eq!(
            env(&[("HOME", "/h"), ("XDG_RUNTIME_DIR", "/r")]),
            paths(&[
                "/h/.docker/config.json",
                "/r/containers/auth.json",
                "/h/.config/containers/auth.json"
            ])
        );
        assert_eq!(
            env(&[("REGISTRY_AUTH_FILE", "/f"), ("DOCKER_CONFIG", "/d")]),
            paths(&["/f", "/d/config.json"])
        );
        assert!(env(&[]).is_empty());
    }
}
