//! The registry that other tests use does what they rely on: it is a real one, with real users and
//! certificates, and it tells what it served.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is how a test fails")]

mod support {
    // Each test program uses its own part of these.
    #![allow(dead_code)]
    pub mod parts;
    pub mod registry;
}

use std::fs;
use std::path::Path;
use std::process::Command;

use support::parts::{Parts, run};
use support::registry::{Registry, Setup};

/// An OCI layout of one layer with one file, made by umoci.
fn layout(dir: &Path) -> String {
    let umoci = Parts::install(&["umoci"]).unwrap().path("umoci").unwrap();
    let layout = dir.join("layout");
    let image = format!("{}:latest", layout.display());
    run(Command::new(&umoci).arg("init").arg("--layout").arg(&layout)).unwrap();
    run(Command::new(&umoci).args(["new", "--image", &image])).unwrap();
    fs::write(dir.join("file"), "of the layer\n".repeat(10_000)).unwrap();
    run(Command::new(&umoci)
        .args(["insert", "--image", &image])
        .arg(dir.join("file"))
        .arg("/file"))
    .unwrap();
    format!("oci:{image}")
}

/// Pushes, pulls into another layout, and compares every blob.
fn push_and_pull(registry: &Registry, dir: &Path) {
    let source = layout(dir);
    registry.push(&source, "some/image:tag", &[]).unwrap();
    registry.pull("some/image:tag", &format!("oci:{}:latest", dir.join("back").display())).unwrap();
    let mut names = Vec::new();
    for entry in fs::read_dir(dir.join("layout/blobs/sha256")).unwrap() {
        let name = entry.unwrap().file_name();
        let read = |layout: &str| fs::read(dir.join(layout).join("blobs/sha256").join(&name)).ok();
        if let Some(back) = read("back") {
            assert_eq!(read("layout"), Some(back), "{name:?}");
            names.push(name);
        }
    }
    assert_eq!(names.len(), 3, "manifest, config and layer came back: {names:?}");
}

#[test]
fn a_plain_registry_takes_an_image_and_gives_it_back() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::plain().unwrap();
    push_and_pull(&registry, dir.path());

    let manifest = registry.manifest("some/image:tag").unwrap();
    let layer = &manifest["layers"][0];
    let digest = layer["digest"].as_str().unwrap();
    let size = layer["size"].as_u64().unwrap();
    let traffic = registry.traffic_by_blob(0);
    assert_eq!(traffic[digest].requests, 1, "{traffic:?}");
    assert_eq!(traffic[digest].bytes, size, "{traffic:?}");
    assert!(registry.traffic(0).bytes > size, "the config was read, too");
    let seen = registry.requests().len();
    assert_eq!(registry.traffic(seen).requests, 0);
    assert_eq!(fs::metadata(registry.blob_file(digest)).unwrap().len(), size);
}

#[test]
fn a_registry_with_a_user_knows_others_from_them() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::with_htpasswd("someone", "secret").unwrap();
    push_and_pull(&registry, dir.path());

    let skopeo = Parts::install(&["skopeo"]).unwrap().path("skopeo").unwrap();
    let inspect = |more: &[&str]| {
        let reference = format!("docker://{}", registry.reference("some/image:tag"));
        let mut command = Command::new(&skopeo);
        run(command.args(["inspect", "--raw", "--tls-verify=false"]).args(more).arg(reference))
    };
    let error = inspect(&["--no-creds"]).unwrap_err().to_string();
    assert!(error.contains("authentication required"), "{error}");
    let error = inspect(&["--creds=someone:else"]).unwrap_err().to_string();
    assert!(error.contains("authentication required") || error.contains("401"), "{error}");
    let auth_file =
        format!("--authfile={}", registry.docker_config().join("config.json").display());
    inspect(&[&auth_file]).unwrap();
    assert!(registry.requests().iter().any(|request| request.status == 401));
}

#[test]
fn a_registry_with_tls_is_trusted_by_those_who_know_its_ca() {
    let dir = tempfile::tempdir().unwrap();
    let user = Some(("someone".to_owned(), "secret".to_owned()));
    let registry = Registry::start(Setup { user, tls: true }).unwrap();
    push_and_pull(&registry, dir.path());

    let skopeo = Parts::install(&["skopeo"]).unwrap().path("skopeo").unwrap();
    let reference = format!("docker://{}", registry.reference("some/image:tag"));
    let mut command = Command::new(&skopeo);
    let error = run(command.args(["inspect", "--creds=someone:secret", &reference])).unwrap_err();
    assert!(error.to_string().contains("certificate"), "{error}");
    let text = fs::read_to_string(registry.ca()).unwrap();
    assert!(text.starts_with("-----BEGIN CERTIFICATE-----"), "{text}");
}

#[test]
fn a_registry_dies_with_the_thread_that_started_it() {
    let (address, dir) = std::thread::spawn(|| {
        let registry = Registry::plain().unwrap();
        let told = (registry.host(), registry.dir().to_owned());
        // As if the test was killed: nothing is dropped.
        std::mem::forget(registry);
        told
    })
    .join()
    .unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while std::net::TcpStream::connect(&address).is_ok() {
        assert!(std::time::Instant::now() < deadline, "it still listens");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    fs::remove_dir_all(dir).unwrap();
}
