//! An OCI image layout of some layers, for umoci.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::json;
use sha2::{Digest, Sha256};

use crate::build_support::{part, run};

fn put(layout: &Path, content: &[u8]) -> String {
    let digest = hex::encode(Sha256::digest(content));
    fs::create_dir_all(layout.join("blobs/sha256")).unwrap();
    fs::write(layout.join("blobs/sha256").join(&digest), content).unwrap();
    format!("sha256:{digest}")
}

/// Writes an image named `image` of these plain tars.
pub fn write(layout: &Path, tars: &[Vec<u8>]) {
    let digests: Vec<String> = tars.iter().map(|tar| put(layout, tar)).collect();
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": { "type": "layers", "diff_ids": digests },
    })
    .to_string();
    let layers: Vec<_> = digests
        .iter()
        .zip(tars)
        .map(|(digest, tar)| {
            json!({
                "mediaType": "application/vnd.oci.image.layer.v1.tar",
                "digest": digest,
                "size": tar.len(),
            })
        })
        .collect();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": put(layout, config.as_bytes()),
            "size": config.len(),
        },
        "layers": layers,
    })
    .to_string();
    let index = json!({
        "schemaVersion": 2,
        "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": put(layout, manifest.as_bytes()),
            "size": manifest.len(),
            "annotations": { "org.opencontainers.image.ref.name": "image" },
        }],
    });
    fs::write(layout.join("index.json"), index.to_string()).unwrap();
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
}

/// What umoci makes of it: `bundle/rootfs`.
pub fn unpack(layout: &Path, bundle: &Path) {
    let image = format!("{}:image", layout.display());
    run(Command::new(part("umoci")).args(["unpack", "--image", &image]).arg(bundle));
}
