//! Two images, or an image and the directory it was made of: are they the same?
//!
//! Finds out what has to be compared with what: the manifests of an index by platform, an image of
//! files by itself. Each pair then goes through the three rules.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use serde_json::Value as Json;
use tokio::runtime::Handle;

use super::boot_layer;
use super::filesystem::MtimePrecision;
use super::findings::{Findings, describe};
use super::images::{self, Image, is_damage};
use super::manifest;
use super::progress::Bars;
use super::proof::{self, Bytes, Content, SourceLayer, TargetBlob};
#[cfg(test)]
use super::report::Value;
use super::report::{Report, Rule};
use super::single;
use super::{index, layers};
use crate::build::image_file;
use crate::oci::OciError;
use crate::oci::manifest::{
    Descriptor, Document, LayerPacking, MAX_CONFIG, Manifest, PlatformName, Stored,
};
use crate::oci::reference::Reference;
use crate::oci::registry::Access;
use crate::rafs::Bootstrap;
use crate::rafs::id::BlobId;

/// What to compare, and how.
#[derive(Debug)]
pub(super) struct Args {
    pub source: Source,
    pub target: Target,
    /// Of an index only this one.
    pub platform: Option<PlatformName>,
    pub mtime: MtimePrecision,
    pub max_differences: usize,
    pub json: bool,
    /// How the registry of the source is spoken to, and that of the target.
    pub source_access: Access,
    pub target_access: Access,
}

#[derive(Debug)]
pub(super) enum Source {
    Image(Reference),
    Dir(PathBuf),
}

#[derive(Debug)]
pub(super) enum Target {
    Image(Reference),
    Files { bootstrap: PathBuf, blob_dir: Option<PathBuf> },
}

/// Compares and prints; the exit code says what came out.
///
/// # Errors
///
/// If the result cannot be printed, or no thread be started.
pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let report = compare(args)?;
    let mut out = io::stdout().lock();
    let printed =
        if args.json { report.print_json(&mut out) } else { report.print_table(&mut out) };
    match printed.and_then(|()| out.flush()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(e).context("standard output"),
        _ => Ok(ExitCode::from(report.outcome().exit_code())),
    }
}

/// Compares.
///
/// # Errors
///
/// If no thread can be started.
pub(super) fn compare(args: &Args) -> Result<Report> {
    let source = match &args.source {
        Source::Image(reference) => reference.to_string(),
        Source::Dir(dir) => dir.display().to_string(),
    };
    let target = match &args.target {
        Target::Image(reference) => reference.to_string(),
        Target::Files { bootstrap, .. } => bootstrap.display().to_string(),
    };
    let mut report = Report::new(source, target, args.max_differences);
    let runtime = images::runtime()?;
    let mut pair = Pair { args, handle: runtime.handle().clone(), report: &mut report };
    pair.compare();
    runtime.shutdown_background();
    Ok(report)
}

pub(super) struct Pair<'a> {
    pub args: &'a Args,
    pub handle: Handle,
    pub report: &'a mut Report,
}

/// A manifest and where its blobs are.
pub(super) struct Side<'a> {
    pub image: &'a Image,
    pub descriptor: &'a Descriptor,
    pub manifest: &'a Manifest,
}

impl Pair<'_> {
    fn compare(&mut self) {
        let source = match &self.args.source {
            Source::Image(reference) => {
                match self.open("source", reference, &self.args.source_access) {
                    Some(opened) => Some(opened),
                    None => return,
                }
            }
            Source::Dir(_) => None,
        };
        let target = match &self.args.target {
            Target::Image(reference) => {
                match self.open("target", reference, &self.args.target_access) {
                    Some(opened) => Some(opened),
                    None => return,
                }
            }
            Target::Files { .. } => None,
        };
        match (&source, &target) {
            (Some((source, there)), Some((target, here))) => {
                index::compare(self, (source, there), (target, here));
            }
            (Some((source, there)), None) => {
                let Some((stored, manifest)) = index::one(self, source, there, "source") else {
                    return;
                };
                let side =
                    Side { image: source, descriptor: &stored.descriptor, manifest: &manifest };
                let config = self.config(&side, "source");
                let content = self.content(&side, config.as_ref());
                self.files(content);
            }
            (None, Some((target, here))) => {
                let Some((stored, manifest)) = index::one(self, target, here, "target") else {
                    return;
                };
                let side =
                    Side { image: target, descriptor: &stored.descriptor, manifest: &manifest };
                self.image(None, &side);
            }
            (None, None) => {
                let Source::Dir(dir) = &self.args.source else {
                    unreachable!("no image was opened")
                };
                self.files(Some(Content::Dir(dir)));
            }
        }
    }

    /// Opens an image and reads what its reference names.
    fn open(
        &mut self,
        side: &str,
        reference: &Reference,
        access: &Access,
    ) -> Option<(Image, Stored)> {
        let image = Image::open(&self.handle, reference, access);
        let opened = image.and_then(|image| Ok((image.clone(), image.root()?)));
        match opened {
            Ok(opened) => Some(opened),
            Err(e) => {
                self.failed(side, "manifest", &e);
                None
            }
        }
    }

    /// Reports that a document could not be read, and that nothing is known of what it leads to.
    pub(super) fn failed(&mut self, side: &str, what: &str, error: &OciError) {
        let text = describe(error);
        let missing = matches!(error, OciError::NotFound { .. });
        if side == "target" && is_damage(error) && !missing {
            self.report.difference(
                Rule::Manifest,
                what,
                "content",
                "what its descriptor says",
                text,
            );
        } else {
            self.report.not_told(Rule::Manifest, format!("{side}: {text}"));
        }
        for rule in [Rule::Bootstrap, Rule::FileSystem] {
            self.report.not_told(rule, format!("the {side}'s {what} could not be read"));
        }
    }

    /// Parses a stored manifest; an index is handled elsewhere.
    pub(super) fn parse(&mut self, side: &str, stored: &Stored) -> Option<Document> {
        let what = format!("manifest {}", stored.descriptor.digest);
        match Document::parse(&what, &stored.descriptor.media_type, &stored.bytes) {
            Ok(document) => Some(document),
            Err(e) => {
                self.failed(side, "manifest", &e);
                None
            }
        }
    }

    /// The configuration of an image.
    pub(super) fn config(&mut self, side: &Side<'_>, name: &str) -> Option<Json> {
        let bytes = side.image.small_blob(&side.manifest.config, MAX_CONFIG);
        let parsed = bytes.and_then(|bytes| {
            serde_json::from_slice(&bytes).map_err(|e| OciError::Invalid {
                what: format!("configuration {}", side.manifest.config.digest),
                reason: e.to_string(),
            })
        });
        match parsed {
            Ok(config) => Some(config),
            Err(e) => {
                let text = describe(&e);
                if name == "target" && is_damage(&e) {
                    let expected = side.manifest.config.digest.as_str();
                    self.report.difference(Rule::Manifest, "config", "content", expected, text);
                } else {
                    self.report.not_told(Rule::Manifest, format!("{name}: {text}"));
                }
                None
            }
        }
    }

    /// The layers of the source; none if one of them is no file system.
    fn content<'s>(&mut self, side: &Side<'s>, config: Option<&Json>) -> Option<Content<'s>> {
        let diff_ids = config.and_then(|config| config.pointer("/rootfs/diff_ids"));
        let diff_ids = diff_ids.and_then(Json::as_array);
        if manifest::is_nydus(side.manifest) {
            let what = "the source is a RAFS image itself, not layers of tar";
            self.report.not_told(Rule::FileSystem, what);
            return None;
        }
        let mut found = Vec::new();
        for (i, descriptor) in side.manifest.layers.iter().enumerate() {
            let Some(packing) = LayerPacking::from_media_type(&descriptor.media_type) else {
                let what = format!("source layer {i} is {}", descriptor.media_type);
                self.report.not_told(Rule::FileSystem, what);
                return None;
            };
            let diff_id = diff_ids.and_then(|ids| Some(ids.get(i)?.as_str()?.to_owned()));
            found.push(SourceLayer { descriptor, packing, diff_id });
        }
        Some(Content::Layers { image: side.image, layers: found })
    }

    /// Compares the image in files.
    fn files(&mut self, content: Option<Content<'_>>) {
        self.report.not_applicable(Rule::Manifest);
        let (Some(content), Target::Files { bootstrap, blob_dir }) = (content, &self.args.target)
        else {
            return;
        };
        self.report.counts.images += 1;
        let mut findings = Findings { limit: self.args.max_differences, ..Findings::default() };
        let args = single::Args {
            bootstrap: bootstrap.clone(),
            blob_dir: blob_dir.clone(),
            max_problems: self.args.max_differences,
        };
        let opened = match image_file::open(bootstrap) {
            Ok(opened) => opened,
            Err(e) => {
                let text = format!("{e:#}");
                if image_file::is_undecided(&e) {
                    self.report.not_told(Rule::Bootstrap, text);
                } else {
                    self.report.difference(Rule::Bootstrap, "bootstrap", "validity", "valid", text);
                }
                self.report.not_told(Rule::FileSystem, "the bootstrap could not be read");
                return;
            }
        };
        let image = &opened.bootstrap;
        let files = single::open_blobs(&opened, &args, &mut findings);
        let blobs: Vec<TargetBlob<'_>> = files
            .into_iter()
            .map(|(index, file)| {
                let info = &image.blobs()[usize::from(index.0)];
                let place = super::place(info);
                let (path, size, chunks) = file.into_parts();
                TargetBlob { info: Some(info), chunks, place, bytes: Bytes::File { path, size } }
            })
            .collect();
        if blob_dir.is_none() && blobs.is_empty() && !image.blobs().is_empty() {
            let what = "blobs not read (no --blob-dir): content is compared by the digests that the \
                        bootstrap has";
            findings.undecided(what);
        }
        proof::prove(Some(&content), image, &blobs, self.args.mtime, findings, self.report);
    }

    /// Compares one image with its source; without one, with the directory.
    pub(super) fn image(&mut self, source: Option<&Side<'_>>, target: &Side<'_>) {
        self.report.counts.images += 1;
        let mut content = match &self.args.source {
            Source::Dir(dir) => Some(Content::Dir(dir)),
            Source::Image(_) => None,
        };
        let configs = match source {
            None => {
                self.report.not_applicable(Rule::Manifest);
                None
            }
            Some(source) => {
                let media_type = target.descriptor.media_type.as_str();
                manifest::compare(source.manifest, target.manifest, media_type, self.report);
                let inherited = source.manifest.subject == target.manifest.subject;
                manifest::subject(source.descriptor, target.manifest, inherited, self.report);
                let there = self.config(source, "source");
                content = self.content(source, there.as_ref());
                Some((there, self.config(target, "target")))
            }
        };
        if !manifest::is_nydus(target.manifest) {
            let what = "the target is no RAFS image: its last layer is no bootstrap";
            if source.is_none() {
                self.report.not_told(Rule::Manifest, what);
            }
            self.report.not_told(Rule::Bootstrap, what);
            self.report.not_told(Rule::FileSystem, what);
            return;
        }
        let mut findings = Findings { limit: self.args.max_differences, ..Findings::default() };
        let boot = self.boot_layer(target, &mut findings);
        if let Some((Some(there), Some(here))) = &configs {
            let blobs = target.manifest.layers.split_last().map_or(&[][..], |(_, blobs)| blobs);
            let mut diff_ids: Vec<_> = blobs.iter().map(|blob| blob.digest.clone()).collect();
            diff_ids
                .extend(boot.as_ref().map(|boot| crate::oci::Digest::from_sha256(boot.diff_id)));
            if boot.is_some() {
                manifest::configs(there, here, &diff_ids, self.report);
            }
        }
        let Some(boot) = boot else {
            proof::report_findings(findings, self.report);
            self.report.not_told(Rule::FileSystem, "the bootstrap could not be read");
            return;
        };
        let Some(image) = self.bootstrap(&boot, &mut findings) else {
            proof::report_findings(findings, self.report);
            self.report.not_told(Rule::FileSystem, "the bootstrap could not be read");
            return;
        };
        let used: BTreeSet<BlobId> = image.blobs().iter().map(|blob| blob.id).collect();
        if let Some(last) = target.manifest.layers.last() {
            manifest::reference_blobs(last, &used, self.report);
        }
        manifest::blobs_are_named(target.manifest, &used, self.report);
        let blobs = target_blobs(target, &image, &boot, &mut findings);
        // Without a source that could be read the target can still be proven to be sound.
        proof::prove(content.as_ref(), &image, &blobs, self.args.mtime, findings, self.report);
    }

    /// Reads the bootstrap layer.
    fn boot_layer(
        &mut self,
        target: &Side<'_>,
        findings: &mut Findings,
    ) -> Option<boot_layer::BootLayer> {
        let (descriptor, blobs) = target.manifest.layers.split_last()?;
        let place = format!("layers[{}]", blobs.len());
        let Some(packing) = LayerPacking::from_media_type(&descriptor.media_type) else {
            self.report.not_told(Rule::Bootstrap, format!("{place} is {}", descriptor.media_type));
            return None;
        };
        let bars = Bars::new("bootstrap".to_owned(), descriptor.size);
        let bar = bars.add(descriptor.digest.short().to_owned(), descriptor.size);
        let read = layers::read(target.image, descriptor, packing, &bar, |tar| {
            boot_layer::read(tar, findings)
        });
        self.report.counts.target_bytes += read.size;
        if let Some(e) = &read.failure {
            let text = describe(e);
            if is_damage(e) {
                let expected = descriptor.digest.as_str();
                self.report.difference(Rule::Manifest, place, "content", expected, text);
            } else {
                self.report.not_told(Rule::Bootstrap, text);
            }
            return None;
        }
        let (named, found) = (descriptor.digest.as_str(), read.digest.as_str());
        self.report.compare(Rule::Manifest, &place, "digest", named, found);
        let (named, found) = (descriptor.size.to_string(), read.size.to_string());
        self.report.compare(Rule::Manifest, &place, "size", named, found);
        match read.result {
            Ok(layer) => Some(layer),
            Err(e) => {
                findings.problem("bootstrap layer", describe(&e));
                None
            }
        }
    }

    fn bootstrap(
        &mut self,
        boot: &boot_layer::BootLayer,
        findings: &mut Findings,
    ) -> Option<Bootstrap> {
        let bytes = boot.bootstrap.clone()?;
        match Bootstrap::from_bytes(bytes) {
            Ok(image) => Some(image),
            Err(e @ crate::rafs::FormatError::Unsupported { .. }) => {
                findings.undecided(format!("image/image.boot: {e}"));
                None
            }
            Err(e) => {
                findings.problem("image/image.boot", describe(&e));
                None
            }
        }
    }
}

/// The blobs that the manifest names, each once.
fn target_blobs<'a>(
    target: &Side<'a>,
    image: &'a Bootstrap,
    boot: &boot_layer::BootLayer,
    findings: &mut Findings,
) -> Vec<TargetBlob<'a>> {
    let mut blobs = Vec::new();
    let mut seen = BTreeSet::new();
    let Some((_, layers)) = target.manifest.layers.split_last() else { return blobs };
    for (i, descriptor) in layers.iter().enumerate() {
        if !seen.insert(&descriptor.digest) {
            continue;
        }
        let hex = descriptor.digest.hex();
        let info = image.blobs().iter().find(|blob| blob.id.as_str() == hex);
        let chunks = info.and_then(|info| boot.chunk_infos(info, findings));
        let name = format!("layers[{i}]");
        blobs.push(TargetBlob {
            info,
            chunks,
            place: format!("blob {hex}"),
            bytes: Bytes::Image { image: target.image, descriptor, name },
        });
    }
    for id in boot.meta_ids() {
        if !layers.iter().any(|layer| layer.digest.hex() == id.as_str()) {
            let place = format!("bootstrap layer, image/{id}.blob.meta");
            findings.mismatch(place, "file", "absent", "present", "the manifest has no such blob");
        }
    }
    blobs
}

#[cfg(test)]
mod flips;
#[cfg(test)]
mod tests;
