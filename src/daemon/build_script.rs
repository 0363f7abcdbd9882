//! Cargo's build script: tells `daemon::version` what this binary was made from.
//!
//! Packagers may set `RAFSD_GIT_COMMIT` and `SOURCE_DATE_EPOCH` (seconds) to get the same bytes on
//! each build. Without them a release build asks git, and says `unknown` where there is none. Debug
//! builds do not look at git at all: a commit would recompile the whole crate for one string.

use std::env;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

fn main() {
    let profile = env::var("PROFILE").unwrap_or_default();
    let release = profile == "release";
    let commit = env::var("RAFSD_GIT_COMMIT").ok().filter(|c| !c.trim().is_empty());
    let commit = commit.or_else(|| if release { head_commit() } else { None });
    let rustc = output(&env::var("RUSTC").unwrap_or_else(|_| "rustc".into()), &["--version"]);
    set("RAFSD_GIT_COMMIT", commit.as_deref().unwrap_or("unknown").trim());
    set("RAFSD_BUILD_TIME", &build_time());
    set("RAFSD_PROFILE", &profile);
    set("RAFSD_RUSTC", rustc.as_deref().unwrap_or("unknown"));
    tell("rerun-if-env-changed=RAFSD_GIT_COMMIT");
    tell("rerun-if-env-changed=SOURCE_DATE_EPOCH");
    tell("rerun-if-changed=src/daemon/build_script.rs");
}

/// The commit that is checked out, and a rebuild when another one is.
fn head_commit() -> Option<String> {
    let commit = output("git", &["rev-parse", "HEAD"])?;
    let log = output("git", &["rev-parse", "--git-path", "logs/HEAD"]);
    if let Some(log) = log.filter(|log| Path::new(log).exists()) {
        tell(&format!("rerun-if-changed={log}"));
    }
    Some(commit)
}

/// `SOURCE_DATE_EPOCH` or now, as RFC 3339 in UTC.
fn build_time() -> String {
    let fixed = env::var("SOURCE_DATE_EPOCH").ok().and_then(|s| s.parse().ok());
    let time = fixed.map_or_else(SystemTime::now, |s| UNIX_EPOCH + Duration::from_secs(s));
    humantime::format_rfc3339_seconds(time).to_string()
}

fn output(program: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).output().ok().filter(|o| o.status.success())?;
    let text = String::from_utf8(output.stdout).ok()?;
    Some(text.trim().to_owned()).filter(|t| !t.is_empty())
}

fn set(name: &str, value: &str) {
    tell(&format!("rustc-env={name}={value}"));
}

/// A directive goes to cargo, which reads the script's standard output.
#[allow(clippy::print_stdout)]
fn tell(directive: &str) {
    println!("cargo::{directive}");
}
