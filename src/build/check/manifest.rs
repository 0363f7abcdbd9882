//! The manifest rule: does the target's manifest say of the same image what the source's says?
//!
//! What conversion must change is checked against `docs/check.md`; everything else must be equal.
//! Digests and sizes of the blobs are compared by `proof`, which reads them.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value as Json;

use super::report::{Report, Rule, Value};
use crate::oci::Digest;
use crate::oci::manifest::{
    DOCKER_CONFIG, DOCKER_LAYER_GZIP, DOCKER_MANIFEST, Descriptor, Manifest, OCI_CONFIG,
    OCI_LAYER_GZIP, OCI_MANIFEST, Platform,
};
use crate::rafs::id::BlobId;

const RULE: Rule = Rule::Manifest;

/// Media type of a layer that is a packed blob.
pub(super) const BLOB_LAYER: &str = "application/vnd.oci.image.layer.nydus.blob.v1";
/// Configuration of an image in a merged index, which ordinary clients leave alone.
const NYDUS_CONFIG: &str = "application/vnd.nydus.image.config.v1+json";
const NYDUS_MANIFEST: &str = "application/vnd.nydus.image.manifest.v1+json";
const NYDUS_FEATURE: &str = "nydus.remoteimage.v1";

/// Annotations of the field begin with this.
const PREFIX: &str = "containerd.io/snapshot/nydus-";
const BLOB: &str = "containerd.io/snapshot/nydus-blob";
const BOOTSTRAP: &str = "containerd.io/snapshot/nydus-bootstrap";
const FS_VERSION: &str = "containerd.io/snapshot/nydus-fs-version";
const REFERENCE_BLOBS: &str = "containerd.io/snapshot/nydus-reference-blob-ids";
const UNCOMPRESSED: &str = "containerd.io/uncompressed";

/// Is this the manifest of a RAFS image?
pub(super) fn is_nydus(manifest: &Manifest) -> bool {
    manifest.layers.last().is_some_and(|layer| layer.annotations.contains_key(BOOTSTRAP))
}

/// Compares two manifests, and all descriptors in them.
pub(super) fn compare(
    source: &Manifest,
    target: &Manifest,
    type_of_target: &str,
    report: &mut Report,
) {
    let docker = type_of_target == DOCKER_MANIFEST;
    if !docker {
        report.compare(RULE, "manifest", "mediaType", OCI_MANIFEST, type_of_target);
    }
    let config = match target.config.media_type.as_str() {
        NYDUS_CONFIG if target.artifact_type.as_deref() == Some(NYDUS_MANIFEST) => NYDUS_CONFIG,
        _ if docker => DOCKER_CONFIG,
        _ => OCI_CONFIG,
    };
    report.compare(RULE, "config", "mediaType", config, target.config.media_type.as_str());
    if config != NYDUS_CONFIG {
        let optional = |text: &Option<String>| text.clone().map_or(Value::Absent, Value::Text);
        let (source, target) = (optional(&source.artifact_type), optional(&target.artifact_type));
        report.compare(RULE, "manifest", "artifactType", source, target);
    }
    annotations("manifest", &source.annotations, &target.annotations, report);
    json_maps("manifest", &source.other, &target.other, report);
    layers(source, target, docker, report);
}

/// The layers: a blob for each of the source's, perhaps more from a dictionary, then the bootstrap.
fn layers(source: &Manifest, target: &Manifest, docker: bool, report: &mut Report) {
    let Some((last, blobs)) = target.layers.split_last() else {
        return report.compare(RULE, "layers", "count", "1 or more", "0");
    };
    if blobs.len() < source.layers.len() && !refers_to_blobs(last) {
        let (expected, found) = (source.layers.len() + 1, target.layers.len());
        report.compare(RULE, "layers", "count", expected.to_string(), found.to_string());
    }
    for (i, blob) in blobs.iter().enumerate() {
        let place = format!("layers[{i}]");
        report.compare(RULE, &place, "mediaType", BLOB_LAYER, blob.media_type.as_str());
        let foreign = source.layers.get(i).map(|layer| &layer.annotations);
        let required = [(BLOB, "true")];
        layer_annotations(&place, blob, &required, foreign, report);
        let diff_id = blob.annotations.get(UNCOMPRESSED);
        if let Some(diff_id) = diff_id.filter(|diff_id| **diff_id != blob.digest.as_str()) {
            let field = format!("annotation {UNCOMPRESSED}");
            report.difference(RULE, place, field, blob.digest.as_str(), diff_id.as_str());
        }
    }
    let place = format!("layers[{}]", blobs.len());
    let gzip = if docker { DOCKER_LAYER_GZIP } else { OCI_LAYER_GZIP };
    report.compare(RULE, &place, "mediaType", gzip, last.media_type.as_str());
    let required = [(BOOTSTRAP, "true"), (FS_VERSION, "6")];
    layer_annotations(&place, last, &required, None, report);
}

/// Whether the image may keep its blobs elsewhere.
fn refers_to_blobs(bootstrap: &Descriptor) -> bool {
    bootstrap.annotations.contains_key(REFERENCE_BLOBS)
}

/// Required ones must be there; the field's others and those of the source's layer may be.
fn layer_annotations(
    place: &str,
    layer: &Descriptor,
    required: &[(&str, &str)],
    foreign: Option<&BTreeMap<String, String>>,
    report: &mut Report,
) {
    let shown = |value: Option<&String>| value.map_or(Value::Absent, |v| Value::from(v.as_str()));
    for &(key, value) in required {
        let found = shown(layer.annotations.get(key));
        report.compare(RULE, place, &format!("annotation {key}"), value, found);
    }
    let of_the_other_kind = [BLOB, BOOTSTRAP, FS_VERSION];
    for (key, value) in &layer.annotations {
        let known = required.iter().any(|(known, _)| known == key)
            || (key.starts_with(PREFIX) && !of_the_other_kind.contains(&key.as_str()))
            || key == UNCOMPRESSED;
        let there = foreign.and_then(|foreign| foreign.get(key));
        if !known && there != Some(value) {
            let (there, value) = (shown(there), value.as_str());
            report.difference(RULE, place, format!("annotation {key}"), there, value);
        }
    }
}

/// What the bootstrap layer says about blobs must be what the blob table says.
pub(super) fn reference_blobs(layer: &Descriptor, used: &BTreeSet<BlobId>, report: &mut Report) {
    let Some(text) = layer.annotations.get(REFERENCE_BLOBS) else { return };
    let field = format!("annotation {REFERENCE_BLOBS}");
    let Ok(ids) = serde_json::from_str::<BTreeSet<String>>(text) else {
        return report.difference(RULE, "bootstrap layer", field, "a JSON list", text.as_str());
    };
    for id in used.iter().filter(|id| !ids.contains(id.as_str())) {
        report.difference(RULE, "bootstrap layer", field.as_str(), id.as_str(), Value::Absent);
    }
}

/// Blobs that files use and no layer of the manifest is.
pub(super) fn blobs_are_named(target: &Manifest, used: &BTreeSet<BlobId>, report: &mut Report) {
    let named: BTreeSet<&str> = target.layers.iter().map(|layer| layer.digest.hex()).collect();
    let last = target.layers.last();
    if last.is_some_and(refers_to_blobs) && target.layers.len() == 1 {
        return;
    }
    for id in used.iter().filter(|id| !named.contains(id.as_str())) {
        report.difference(RULE, "layers", "blob", format!("sha256:{id}"), Value::Absent);
    }
}

/// Every annotation of the source must be there; the field's own may be added.
pub(super) fn annotations(
    place: &str,
    source: &BTreeMap<String, String>,
    target: &BTreeMap<String, String>,
    report: &mut Report,
) {
    let keys: BTreeSet<&String> = source.keys().chain(target.keys()).collect();
    for key in keys {
        let (there, here) = (source.get(key), target.get(key));
        if there == here || (there.is_none() && key.starts_with(PREFIX)) {
            continue;
        }
        let shown =
            |value: Option<&String>| value.map_or(Value::Absent, |v| Value::from(v.as_str()));
        report.difference(RULE, place, format!("annotation {key}"), shown(there), shown(here));
    }
}

/// Compares fields that are passed on as they are.
pub(super) fn json_maps(
    place: &str,
    source: &BTreeMap<String, Json>,
    target: &BTreeMap<String, Json>,
    report: &mut Report,
) {
    let map = |map: &BTreeMap<String, Json>| Json::Object(map.clone().into_iter().collect());
    json(place, Some(&map(source)), Some(&map(target)), report);
}

/// Compares two JSON values; differences are named by the place of the smallest that differ.
fn json(place: &str, source: Option<&Json>, target: Option<&Json>, report: &mut Report) {
    match (source, target) {
        (source, target) if source == target => {}
        (Some(Json::Object(source)), Some(Json::Object(target))) => {
            let keys: BTreeSet<&String> = source.keys().chain(target.keys()).collect();
            for key in keys {
                // Go writes some empty lists as null and leaves others out.
                let get = |map: &'_ serde_json::Map<String, Json>| map.get(key).cloned();
                let (there, here) = (get(source), get(target));
                json(&format!("{place}.{key}"), there.as_ref(), here.as_ref(), report);
            }
        }
        (Some(Json::Array(source)), Some(Json::Array(target))) => {
            for i in 0..source.len().max(target.len()) {
                json(&format!("{place}[{i}]"), source.get(i), target.get(i), report);
            }
        }
        (source, target) => {
            let (parent, field) = place.rsplit_once('.').unwrap_or((place, "value"));
            report.difference(RULE, parent, field, shown(source), shown(target));
        }
    }
}

fn shown(json: Option<&Json>) -> Value {
    match json {
        None => Value::Absent,
        Some(Json::String(text)) => Value::from(text.as_str()),
        Some(other) => Value::from(other.to_string()),
    }
}

/// Compares two configurations: all but `rootfs.diff_ids` and one more entry of `history` must be
/// equal. `diff_ids` are those that the target's layers have.
pub(super) fn configs(source: &Json, target: &Json, diff_ids: &[Digest], report: &mut Report) {
    let without = |config: &Json| {
        let mut config = config.clone();
        if let Some(map) = config.as_object_mut() {
            map.remove("history");
            if let Some(rootfs) = map.get_mut("rootfs").and_then(Json::as_object_mut) {
                rootfs.remove("diff_ids");
            }
        }
        config
    };
    json("config", Some(&without(source)), Some(&without(target)), report);

    let list = |config: &Json, pointer: &str| {
        config.pointer(pointer).and_then(Json::as_array).cloned().unwrap_or_default()
    };
    let found = list(target, "/rootfs/diff_ids");
    for i in 0..found.len().max(diff_ids.len()) {
        let expected = diff_ids.get(i).map_or(Value::Absent, |id| Value::from(id.as_str()));
        let place = format!("config.rootfs.diff_ids[{i}]");
        report.compare(RULE, &place, "diff id", expected, shown(found.get(i)));
    }

    let (there, mut here) = (list(source, "/history"), list(target, "/history"));
    // One entry for the bootstrap, behind those of the source.
    let added = (here.len() > there.len()).then(|| here.remove(there.len()));
    for i in 0..there.len().max(here.len()) {
        json(&format!("config.history[{i}]"), there.get(i), here.get(i), report);
    }
    let place = format!("config.history[{}]", there.len());
    match added {
        Some(entry) if entry.get("empty_layer").and_then(Json::as_bool) == Some(true) => {
            report.difference(RULE, place, "empty_layer", Value::Absent, "true");
        }
        None if !there.is_empty() => {
            let expected = "entry of the bootstrap layer";
            report.difference(RULE, place, "entry", expected, Value::Absent);
        }
        _ => {}
    }
}

/// The subject, where there is one, must be the manifest that was converted.
pub(super) fn subject(
    source: &Descriptor,
    target: &Manifest,
    inherited: bool,
    report: &mut Report,
) {
    let Some(subject) = target.subject.as_ref().filter(|_| !inherited) else { return };
    report.compare(RULE, "subject", "digest", source.digest.as_str(), subject.digest.as_str());
    report.compare(RULE, "subject", "size", source.size.to_string(), subject.size.to_string());
    report.compare(RULE, "subject", "mediaType", &*source.media_type, &*subject.media_type);
}

/// Platforms without the feature that marks a RAFS image.
pub(super) fn plain(platform: Option<&Platform>) -> Option<Platform> {
    let mut platform = platform?.clone();
    platform.os_features.retain(|feature| feature != NYDUS_FEATURE);
    Some(platform)
}
