//! Config documents as the program takes them.

mod daemon;

use std::fs;
use std::os::unix::fs::PermissionsExt;

use daemon::{Daemon, golden, output, rafsd, scratch};

/// The arguments for `image` with the config `name` in the working directory.
fn with_config(name: &str) -> String {
    let bootstrap = golden("v6-none").join("bootstrap");
    format!("virtiofs --sock S --apisock A --bootstrap {} --config {name}", bootstrap.display())
}

#[test]
fn all_three_forms_mount_and_are_shown_without_what_they_hide() {
    let blobs = golden("v6-none").join("blobs");
    let blobs = blobs.display();
    let documents = [
        (
            "v1.json",
            format!(
                r#"{{"device":{{"id":"/3","backend":{{"type":"localfs","config":{{"readahead":false,
                "dir":"{blobs}"}}}},"cache":{{"type":"blobcache","config":{{"work_dir":"cache",
                "encryption_key":"S3CRET"}}}}}},"mode":"direct","digest_validate":false,
                "enable_xattr":true,"auth":"S3CRET","fs_prefetch":{{"enable":true}}}}"#
            ),
        ),
        (
            "v2.json",
            format!(
                r#"{{"version":2,"id":"/3","backend":{{"type":"localfs","localfs":{{"dir":"{blobs}",
                "token":"S3CRET"}}}},"cache":{{"type":"filecache","filecache":
                {{"work_dir":"cache"}}}},"rafs":{{"enable_xattr":true}}}}"#
            ),
        ),
        (
            "v2.toml",
            format!(
                "version = 2\nid = '/3'\nauth = 'S3CRET'\n[backend]\ntype = 'localfs'\n\
                 [backend.localfs]\ndir = '{blobs}'\n[cache]\ntype = 'blobcache'\n\
                 [cache.filecache]\nwork_dir = 'cache'\n[rafs]\nenable_xattr = true\n"
            ),
        ),
    ];
    for (name, text) in documents {
        let dir = scratch();
        fs::write(dir.path().join(name), text).unwrap();
        fs::create_dir(dir.path().join("cache")).unwrap();
        let daemon = Daemon::start(dir.path(), rafsd(dir.path(), &with_config(name)));
        let (_, body) = daemon.call("GET", "/api/v1/daemon", "");
        let info: serde_json::Value = serde_json::from_str(&body).unwrap();
        let config = &info["backend_collection"]["/"]["config"];
        assert_eq!(config["id"], "/3", "{name}: {body}");
        assert_eq!(config["backend"]["localfs"]["dir"], blobs.to_string(), "{name}");
        assert_eq!(config["cache"]["filecache"]["work_dir"], "cache", "{name}");
        assert_eq!(config["rafs"]["enable_xattr"], true, "{name}");
        daemon.signal(libc::SIGTERM);
        let (_, _, log) = daemon.end();
        assert!(log.contains("config: ignored: "), "{name}: {log}");
        assert!(!log.contains("S3CRET") && !body.contains("S3CRET"), "{name}: {log}");
        // The cache is where the document says, and nowhere else.
        assert!(dir.path().join("cache/rafsd").is_dir(), "{name}: {log}");
        assert!(!dir.path().join("xdg/rafsd").exists(), "{name}");
    }
}

#[test]
fn a_config_that_cannot_be_used_fails_the_start_with_its_reason() {
    let cases = [
        ("{", "config bad: is read as JSON: unexpected end"),
        (
            r#"{"device":{"backend":{"type":"registry","config":{"auth":"S3CRET"}}}}"#,
            "config bad: is read as JSON, version 1: device.backend.config.host: is missing",
        ),
        (
            r#"{"device":{"backend":{"type":"localfs","config":{"dir":"/tmp"}}}}"#,
            "device.cache.type: a RAFS v6 image needs a cache",
        ),
        ("version = 3", "config bad: is read as TOML, version 2: version: this is 3"),
        (
            r#"{"device":{"backend":{"type":"localfs","config":{"dir":"/no/such"}},"cache":{"type":"blobcache"}}}"#,
            "localfs.dir: /no/such is not a directory",
        ),
    ];
    for (text, want) in cases {
        let dir = scratch();
        fs::write(dir.path().join("bad"), text).unwrap();
        let (code, _, stderr) = output(rafsd(dir.path(), &with_config("bad")));
        assert_eq!(code, Some(1), "{text}: {stderr}");
        assert!(stderr.contains(want), "{text}: {stderr}");
        assert!(!stderr.contains("S3CRET"), "{stderr}");
    }
}

#[test]
fn without_a_config_the_cache_is_in_the_user_s_cache_directory() {
    let dir = scratch();
    let daemon = Daemon::small(dir.path());
    let mode = fs::metadata(dir.path().join("xdg/rafsd")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
    drop(daemon);
    let mut command = rafsd(dir.path(), &format!("--sock S {}", daemon::small_image()));
    command.env_remove("XDG_CACHE_HOME").env_remove("HOME");
    let (code, _, stderr) = output(command);
    assert_eq!(code, Some(1));
    assert!(stderr.contains("XDG_CACHE_HOME or HOME; neither"), "{stderr}");
}
