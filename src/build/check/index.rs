//! Indexes: which image of the target is to be compared with which of the source.
//!
//! Every platform of the source must be there, with what belongs to it: attestations and foreign
//! entries are kept as they are. A merged index has the source's own manifests besides.

use std::collections::BTreeSet;

use super::images::Image;
use super::manifest::{self, is_nydus, plain};
use super::pair::{Pair, Side};
use super::report::{Report, Rule, Value};
use crate::oci::Digest;
use crate::oci::manifest::{
    DOCKER_LIST, Descriptor, Document, Index, Manifest, OCI_INDEX, Platform, PlatformName, Stored,
};

const RULE: Rule = Rule::Manifest;
/// Marks an entry that is about another one: an attestation.
const REFERENCE_TYPE: &str = "vnd.docker.reference.type";
/// The digest of that one.
const REFERENCE_DIGEST: &str = "vnd.docker.reference.digest";

/// An image of the target.
struct Candidate {
    stored: Stored,
    manifest: Manifest,
}

/// Compares what both references name.
pub(super) fn compare(
    pair: &mut Pair<'_>,
    (source, there): (&Image, &Stored),
    (target, here): (&Image, &Stored),
) {
    let Some(source_document) = pair.parse("source", there) else { return };
    let Some(target_document) = pair.parse("target", here) else { return };
    match (source_document, target_document) {
        (Document::Index(there), Document::Index(here_index)) => {
            let type_of_target = here.descriptor.media_type.as_str();
            indexes(pair, (source, &there), (target, &here_index), type_of_target);
        }
        (_, Document::Manifest(manifest)) => {
            let platform = platform_of(target, &manifest);
            let wanted = pair.args.platform.clone().or(platform);
            let Some((stored, source_manifest)) =
                choose(pair, source, there, wanted.as_ref(), "source")
            else {
                return;
            };
            let source =
                Side { image: source, descriptor: &stored.descriptor, manifest: &source_manifest };
            let target = Side { image: target, descriptor: &here.descriptor, manifest: &manifest };
            pair.image(Some(&source), &target);
        }
        (Document::Manifest(source_manifest), Document::Index(index)) => {
            let platform = platform_of(source, &source_manifest);
            let Some(candidates) = candidates(pair, target, &index) else { return };
            let wanted = pair.args.platform.clone().or(platform);
            let found = candidates.iter().find(|candidate| {
                let platform = candidate.stored.descriptor.platform.as_ref();
                wanted.as_ref().is_none_or(|w| platform.is_none_or(|p| w.matches(p)))
            });
            let Some(found) = found else {
                let wanted = wanted.map_or("any".to_owned(), |wanted| wanted.to_string());
                let field = format!("RAFS image for {wanted}");
                let digest = there.descriptor.digest.as_str();
                return pair.report.difference(RULE, "index", field, digest, Value::Absent);
            };
            let source =
                Side { image: source, descriptor: &there.descriptor, manifest: &source_manifest };
            side_by_side(pair, &source, target, found);
        }
    }
}

/// The one manifest that a reference leads to: itself, or of an index the one for the platform.
pub(super) fn one(
    pair: &mut Pair<'_>,
    image: &Image,
    stored: &Stored,
    side: &str,
) -> Option<(Stored, Manifest)> {
    let wanted = pair.args.platform.clone();
    choose(pair, image, stored, wanted.as_ref(), side)
}

fn choose(
    pair: &mut Pair<'_>,
    image: &Image,
    stored: &Stored,
    wanted: Option<&PlatformName>,
    side: &str,
) -> Option<(Stored, Manifest)> {
    let index = match pair.parse(side, stored)? {
        Document::Manifest(manifest) => return Some((stored.clone(), *manifest)),
        Document::Index(index) => index,
    };
    let mut images = index.manifests.iter().filter(|descriptor| !is_attestation(descriptor));
    let found: Vec<&Descriptor> = match wanted {
        Some(wanted) => images
            .filter(|image| image.platform.as_ref().is_some_and(|p| wanted.matches(p)))
            .collect(),
        None => images.by_ref().collect(),
    };
    let [descriptor] = found.as_slice() else {
        let wanted = wanted.map_or("no --platform".to_owned(), |wanted| wanted.to_string());
        let what = format!("{side}: {} images of the index fit ({wanted})", found.len());
        for rule in [RULE, Rule::Bootstrap, Rule::FileSystem] {
            pair.report.not_told(rule, what.clone());
        }
        return None;
    };
    let stored = match image.manifest(descriptor) {
        Ok(stored) => stored,
        Err(e) => {
            pair.failed(side, "manifest", &e);
            return None;
        }
    };
    match pair.parse(side, &stored)? {
        Document::Manifest(manifest) => Some((stored, *manifest)),
        Document::Index(_) => {
            let what = format!("{side}: an index in an index");
            pair.report.not_told(RULE, what);
            None
        }
    }
}

/// What the configuration of an image says it runs on.
fn platform_of(image: &Image, manifest: &Manifest) -> Option<PlatformName> {
    // Read again later; then what is wrong with it is reported.
    let bytes = image.small_blob(&manifest.config, crate::oci::manifest::MAX_CONFIG).ok()?;
    let config: serde_json::Value = serde_json::from_slice(&bytes).ok()?;
    let text =
        |key: &str| config.get(key).and_then(|value| value.as_str()).filter(|v| !v.is_empty());
    let mut name = format!("{}/{}", text("os")?, text("architecture")?);
    if let Some(variant) = text("variant") {
        name = format!("{name}/{variant}");
    }
    name.parse().ok()
}

fn is_attestation(descriptor: &Descriptor) -> bool {
    descriptor.annotations.contains_key(REFERENCE_TYPE)
}

/// Whether an entry of the source is an image that is converted.
fn is_image(descriptor: &Descriptor) -> bool {
    !is_attestation(descriptor)
        && descriptor.platform.as_ref().is_none_or(|p| p.os != "unknown")
        && descriptor.artifact_type.is_none()
}

/// All RAFS images of an index.
fn candidates(pair: &mut Pair<'_>, image: &Image, index: &Index) -> Option<Vec<Candidate>> {
    let mut found = Vec::new();
    for descriptor in index.manifests.iter().filter(|d| !is_attestation(d)) {
        let stored = match image.manifest(descriptor) {
            Ok(stored) => stored,
            Err(e) => {
                pair.failed("target", &format!("manifest {}", descriptor.digest), &e);
                return None;
            }
        };
        if let Ok(Document::Manifest(manifest)) =
            Document::parse("manifest", &stored.descriptor.media_type, &stored.bytes)
            && is_nydus(&manifest)
        {
            found.push(Candidate { stored, manifest: *manifest });
        }
    }
    Some(found)
}

fn indexes(
    pair: &mut Pair<'_>,
    (source, there): (&Image, &Index),
    (target, here): (&Image, &Index),
    type_of_target: &str,
) {
    if type_of_target != DOCKER_LIST {
        pair.report.compare(RULE, "index", "mediaType", OCI_INDEX, type_of_target);
    }
    manifest::annotations("index", &there.annotations, &here.annotations, pair.report);
    manifest::json_maps("index", &there.other, &here.other, pair.report);
    let Some(candidates) = candidates(pair, target, here) else { return };
    // Digests of entries of the target that something of the source explains.
    let mut explained: BTreeSet<Digest> =
        there.manifests.iter().map(|entry| entry.digest.clone()).collect();
    // (before, after) conversion.
    let mut converted: Vec<(Digest, Digest)> = Vec::new();
    for entry in there.manifests.iter().filter(|entry| is_image(entry)) {
        let platform = entry.platform.as_ref();
        let shown = platform.map_or("no platform".to_owned(), Platform::to_string);
        if let Some(wanted) = &pair.args.platform
            && !platform.is_some_and(|platform| wanted.matches(platform))
        {
            continue;
        }
        let found = candidates.iter().find(|candidate| {
            let here = candidate.stored.descriptor.platform.as_ref();
            plain(here) == platform.cloned()
                && !converted.iter().any(|(_, after)| *after == candidate.stored.descriptor.digest)
        });
        let Some(found) = found else {
            let field = format!("image for {shown}");
            pair.report.difference(RULE, "index", field, entry.digest.as_str(), Value::Absent);
            continue;
        };
        converted.push((entry.digest.clone(), found.stored.descriptor.digest.clone()));
        explained.insert(found.stored.descriptor.digest.clone());
        pair.report.begin_image(Some(shown));
        let stored = match source.manifest(entry) {
            Ok(stored) => stored,
            Err(e) => {
                pair.failed("source", "manifest", &e);
                continue;
            }
        };
        let here = &found.stored.descriptor;
        manifest::annotations("index entry", &entry.annotations, &here.annotations, pair.report);
        if let Some(Document::Manifest(manifest)) = pair.parse("source", &stored) {
            let source =
                Side { image: source, descriptor: &stored.descriptor, manifest: &manifest };
            side_by_side(pair, &source, target, found);
        }
    }
    pair.report.begin_image(None);
    if pair.report.counts.images == 0 {
        let wanted = pair.args.platform.as_ref().map(PlatformName::to_string);
        let what = match wanted {
            Some(wanted) => format!("no image of the source is for {wanted}"),
            None => "no image of the source was found in the target".to_owned(),
        };
        pair.report.not_told(Rule::Bootstrap, what.clone());
        pair.report.not_told(Rule::FileSystem, what);
    }
    kept(there, here, &converted, pair.args.platform.is_some(), pair.report);
    for entry in here.manifests.iter().filter(|entry| !explained.contains(&entry.digest)) {
        let digest = entry.digest.as_str();
        pair.report.difference(RULE, "index", "entry", Value::Absent, digest);
    }
}

/// What is not converted must be there as it was; of an attestation the digest of what it is about
/// may have become that of the converted image.
fn kept(
    there: &Index,
    here: &Index,
    converted: &[(Digest, Digest)],
    one_platform: bool,
    report: &mut Report,
) {
    for entry in there.manifests.iter().filter(|entry| !is_image(entry)) {
        let about = entry.annotations.get(REFERENCE_DIGEST);
        let left_out = about
            .is_some_and(|about| !converted.iter().any(|(before, _)| before.as_str() == about));
        if one_platform && left_out {
            continue;
        }
        let Some(found) = here.manifests.iter().find(|found| found.digest == entry.digest) else {
            let digest = entry.digest.as_str();
            report.difference(RULE, "index", "entry", digest, Value::Absent);
            continue;
        };
        let mut same = found.clone();
        let after =
            converted.iter().find(|(before, _)| about.is_some_and(|a| a == before.as_str()));
        if let (Some((before, after)), Some(value)) =
            (after, same.annotations.get_mut(REFERENCE_DIGEST))
            && value == after.as_str()
        {
            *value = before.as_str().to_owned();
        }
        if same != *entry {
            let place = format!("index entry {}", entry.digest.short());
            manifest::annotations(&place, &entry.annotations, &same.annotations, report);
            report.compare(RULE, &place, "mediaType", &*entry.media_type, &*same.media_type);
            report.compare(RULE, &place, "size", entry.size.to_string(), same.size.to_string());
            manifest::json_maps(&place, &entry.other, &same.other, report);
        }
    }
}

fn side_by_side(pair: &mut Pair<'_>, source: &Side<'_>, image: &Image, found: &Candidate) {
    let target = Side { image, descriptor: &found.stored.descriptor, manifest: &found.manifest };
    pair.image(Some(source), &target);
}
