//! What an image in a registry consists of beside its blobs: the bootstrap layer, the configuration
//! and the manifest.

use std::collections::BTreeMap;
use std::io::Write;

use anyhow::{Context as _, Result, bail};
use serde_json::{Map, Value, json};

use crate::oci::Digest;
use crate::oci::manifest::{
    DOCKER_CONFIG, DOCKER_LAYER_GZIP, DOCKER_MANIFEST, Descriptor, Manifest, OCI_CONFIG,
    OCI_LAYER_GZIP, OCI_MANIFEST,
};

/// Media type of a packed blob.
pub const BLOB_LAYER: &str = "application/vnd.oci.image.layer.nydus.blob.v1";
/// Marks a blob layer.
const IS_BLOB: &str = "containerd.io/snapshot/nydus-blob";
/// Marks the bootstrap layer, which is the last one.
const IS_BOOTSTRAP: &str = "containerd.io/snapshot/nydus-bootstrap";
const FS_VERSION: &str = "containerd.io/snapshot/nydus-fs-version";
/// Digest of the layer that a blob was made of.
pub const SOURCE_DIGEST: &str = "containerd.io/snapshot/nydus-source-digest";
/// How it was made of it: what else its bytes depend on.
pub const PARAMETERS: &str = "containerd.io/snapshot/nydus-build-parameters";

/// Annotations of layers that say how their bytes are arranged, which is not so any more.
const OF_THE_BYTES: [&str; 4] = [
    "containerd.io/snapshot/",
    "containerd.io/uncompressed",
    "io.containers.estargz",
    "io.github.containers.zstd-chunked",
];

/// Is this an image in the RAFS format?
pub fn is_rafs(manifest: &Manifest) -> bool {
    manifest.layers.last().is_some_and(|layer| layer.annotations.contains_key(IS_BOOTSTRAP))
}

/// A blob layer. `made_of` is the layer of the source, with the parameters; None for a blob of the
/// dictionary.
pub fn blob_layer(digest: &Digest, size: u64, made_of: Option<(&Descriptor, &str)>) -> Descriptor {
    let mut layer = Descriptor::new(BLOB_LAYER, digest.clone(), size);
    if let Some((source, parameters)) = made_of {
        let foreign = source.annotations.iter();
        let kept = foreign.filter(|(key, _)| !OF_THE_BYTES.iter().any(|p| key.starts_with(p)));
        layer.annotations = kept.map(|(k, v)| (k.clone(), v.clone())).collect();
        layer.annotations.insert(SOURCE_DIGEST.to_owned(), source.digest.to_string());
        layer.annotations.insert(PARAMETERS.to_owned(), parameters.to_owned());
    }
    layer.annotations.insert(IS_BLOB.to_owned(), "true".to_owned());
    layer
}

/// The content of a bootstrap layer.
pub struct BootstrapLayer {
    pub gzip: Vec<u8>,
    /// SHA-256 of the plain tar.
    pub diff_id: Digest,
}

/// Packs a merged bootstrap, and for each blob its id and array of chunks.
///
/// The same content gives the same bytes: times and owners are 0, and the encoder gets it in one
/// piece.
pub fn bootstrap_layer(bootstrap: &[u8], metas: &[(&str, &[u8])]) -> Result<BootstrapLayer> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut add = |name: &str, kind: tar::EntryType, mode: u32, bytes: &[u8]| {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_mtime(0);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(bytes.len() as u64);
        builder.append_data(&mut header, name, bytes)
    };
    add("image", tar::EntryType::Directory, 0o755, &[])?;
    add("image/image.boot", tar::EntryType::Regular, 0o444, bootstrap)?;
    for (id, meta) in metas {
        add(&format!("image/{id}.blob.meta"), tar::EntryType::Regular, 0o444, meta)?;
    }
    let tar = builder.into_inner()?;
    let diff_id = Digest::sha256(&tar);
    let mut encoder = flate2::GzBuilder::new()
        .mtime(0)
        .operating_system(255)
        .write(Vec::new(), flate2::Compression::new(6));
    encoder.write_all(&tar)?;
    Ok(BootstrapLayer { gzip: encoder.finish()?, diff_id })
}

/// The source's configuration with the layers that the image has now. Everything else stays.
pub fn config(source: &[u8], diff_ids: &[&Digest]) -> Result<Vec<u8>> {
    let mut config: Map<String, Value> =
        serde_json::from_slice(source).context("the image's configuration")?;
    let created = config.get("created").filter(|v| v.is_string()).cloned();
    let Some(rootfs) = config.get_mut("rootfs").and_then(Value::as_object_mut) else {
        bail!("the image's configuration has no rootfs");
    };
    rootfs.insert("diff_ids".to_owned(), json!(diff_ids));
    // A history that tells of no layer tells of this one neither: its entries are counted.
    if let Some(history) = config.get_mut("history").and_then(Value::as_array_mut)
        && !history.is_empty()
    {
        let mut entry = Map::new();
        if let Some(created) = created {
            entry.insert("created".to_owned(), created);
        }
        entry.insert("created_by".to_owned(), json!("Nydus Converter"));
        entry.insert("comment".to_owned(), json!("Nydus Bootstrap Layer"));
        history.push(Value::Object(entry));
    }
    Ok(serde_json::to_vec(&config)?)
}

/// The digests of the layers' content, from the source's configuration.
pub fn diff_ids(config: &[u8]) -> Result<Vec<Digest>> {
    let config: Value = serde_json::from_slice(config).context("the image's configuration")?;
    let ids = config.pointer("/rootfs/diff_ids").filter(|v| !v.is_null());
    let ids = ids.map(|ids| serde_json::from_value(ids.clone()));
    Ok(ids.transpose().context("diff_ids of the image's configuration")?.unwrap_or_default())
}

/// What the configuration says that the image runs on: operating system, architecture, variant.
pub fn platform(config: &[u8]) -> Result<crate::oci::manifest::Platform> {
    let config: Value = serde_json::from_slice(config).context("the image's configuration")?;
    let text = |key: &str| config.get(key).and_then(Value::as_str).unwrap_or("").to_owned();
    let variant = Some(text("variant")).filter(|v| !v.is_empty());
    Ok(crate::oci::manifest::Platform {
        architecture: text("architecture"),
        os: text("os"),
        os_version: None,
        os_features: Vec::new(),
        variant,
        other: BTreeMap::new(),
    })
}

/// The manifest of a converted image: that of the source with other layers. The last of `layers` is
/// the bootstrap layer, without its media type and annotations.
pub fn manifest(
    source: &Manifest,
    media_type: &str,
    config: (Digest, u64),
    mut layers: Vec<Descriptor>,
    bootstrap: (Digest, u64),
) -> Manifest {
    let docker = media_type == DOCKER_MANIFEST;
    let (config_type, layer_type) =
        if docker { (DOCKER_CONFIG, DOCKER_LAYER_GZIP) } else { (OCI_CONFIG, OCI_LAYER_GZIP) };
    let mut last = Descriptor::new(layer_type, bootstrap.0, bootstrap.1);
    last.annotations = BTreeMap::from([
        (IS_BOOTSTRAP.to_owned(), "true".to_owned()),
        (FS_VERSION.to_owned(), "6".to_owned()),
    ]);
    layers.push(last);
    let mut described = Descriptor::new(config_type, config.0, config.1);
    described.annotations.clone_from(&source.config.annotations);
    Manifest {
        schema_version: 2,
        media_type: Some(if docker { DOCKER_MANIFEST } else { OCI_MANIFEST }.to_owned()),
        artifact_type: source.artifact_type.clone(),
        config: described,
        layers,
        // What the source is attached to, this is not.
        subject: None,
        annotations: source.annotations.clone(),
        other: source.other.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_bootstrap_layer_is_the_same_every_time_and_holds_what_readers_look_for() {
        let id = "0123456789abcdef".repeat(4);
        let metas = [(id.as_str(), &b"meta"[..])];
        let layer = bootstrap_layer(b"boot", &metas).unwrap();
        assert_eq!(bootstrap_layer(b"boot", &metas).unwrap().gzip, layer.gzip);
        let mut tar = Vec::new();
        flate2::read::GzDecoder::new(&layer.gzip[..]).read_to_end(&mut tar).unwrap();
        assert_eq!(Digest::sha256(&tar), layer.diff_id);
        let mut archive = tar::Archive::new(&tar[..]);
        let entries: Vec<_> = archive
            .entries()
            .unwrap()
            .map(|entry| {
                let mut entry = entry.unwrap();
                let mut text = String::new();
                entry.read_to_string(&mut text).unwrap();
                let path = entry.path().unwrap().display().to_string();
                (path, entry.header().mode().unwrap(), text)
            })
            .collect();
        let want = [
            ("image".to_owned(), 0o755, String::new()),
            ("image/image.boot".to_owned(), 0o444, "boot".to_owned()),
            (format!("image/{id}.blob.meta"), 0o444, "meta".to_owned()),
        ];
        assert_eq!(entries, want);
    }

    #[test]
    fn a_configuration_keeps_all_but_its_layers() {
        let (one, two) = (Digest::sha256(b"1"), Digest::sha256(b"2"));
        let source = format!(
            r#"{{"created":"2020-01-01T00:00:00Z","architecture":"amd64","x":{{"unknown":[1.5]}},
            "config":{{"Labels":{{"a":"b"}},"Healthcheck":{{"Test":["CMD"]}}}},
            "history":[{{"created_by":"x"}},{{"created_by":"y","empty_layer":true}}],
            "rootfs":{{"type":"layers","diff_ids":["{one}"]}}}}"#
        );
        let changed = config(source.as_bytes(), &[&two, &one]).unwrap();
        let (mut was, is): (Value, Value) =
            (serde_json::from_str(&source).unwrap(), serde_json::from_slice(&changed).unwrap());
        was["rootfs"]["diff_ids"] = json!([two, one]);
        was["history"].as_array_mut().unwrap().push(json!({
            "created": "2020-01-01T00:00:00Z",
            "created_by": "Nydus Converter",
            "comment": "Nydus Bootstrap Layer",
        }));
        assert_eq!(is, was);
        assert_eq!(diff_ids(&changed).unwrap(), [two, one]);
    }

    #[test]
    fn odd_configurations_are_refused_or_left_as_they_are() {
        for bad in ["", "[]", "{}", r#"{"rootfs":7}"#] {
            config(bad.as_bytes(), &[]).expect_err(bad);
        }
        for (text, history) in [
            (r#"{"rootfs":{},"history":null}"#, json!(null)),
            (r#"{"rootfs":{},"history":[]}"#, json!([])),
        ] {
            let changed: Value =
                serde_json::from_slice(&config(text.as_bytes(), &[]).unwrap()).unwrap();
            assert_eq!(changed["history"], history);
        }
        assert!(diff_ids(br#"{"rootfs":{"diff_ids":null}}"#).unwrap().is_empty());
        diff_ids(br#"{"rootfs":{"diff_ids":["x"]}}"#).unwrap_err();
    }

    #[test]
    fn annotations_of_a_layer_stay_unless_they_are_about_its_bytes() {
        let mut source = Descriptor::of(OCI_LAYER_GZIP, b"x");
        for key in ["org.example/title", "io.containers.estargz.uncompressed-size", IS_BLOB] {
            source.annotations.insert(key.to_owned(), "v".to_owned());
        }
        let layer = blob_layer(&Digest::sha256(b"y"), 3, Some((&source, "p")));
        let want = [
            (IS_BLOB, "true"),
            (PARAMETERS, "p"),
            (SOURCE_DIGEST, source.digest.as_str()),
            ("org.example/title", "v"),
        ];
        let got: Vec<_> = layer.annotations.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        assert_eq!(got, want);
    }
}
