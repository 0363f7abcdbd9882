//! What was done, for people and for programs.

use std::collections::HashSet;
use std::io::{self, Write};

use indicatif::HumanBytes;
use serde::Serialize;

use super::Layers;
use super::layer::Layer;
use crate::oci::manifest::Descriptor;

/// Where the time went, in seconds of wall clock. Stages follow each other.
#[derive(Debug, Default, Serialize)]
pub struct Stages {
    /// Reading the source's manifests and configurations.
    pub read: f64,
    /// Looking for layers that the target has.
    pub look_up: f64,
    /// Converting or fetching layers.
    pub layers: f64,
    /// Merging, and writing bootstraps, configurations and manifests.
    pub images: f64,
    pub total: f64,
}

/// The summary; sizes are bytes.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    version: &'static str,
    fs_version: &'static str,
    pub source: String,
    source_digest: String,
    pub target: String,
    target_digest: String,
    target_media_type: String,
    pub images: Vec<Converted>,
    /// Manifests that were copied as they are.
    pub copied: Vec<String>,
    totals: Totals,
    seconds: Stages,
}

/// Sums over the distinct layers.
#[derive(Debug, Default, Serialize)]
struct Totals {
    layers: usize,
    reused_layers: usize,
    /// Compressed, as they are in the source.
    source_bytes: u64,
    /// Of the packed blobs.
    blob_bytes: u64,
    /// Of the files in layers that were converted, and the part of them that was not stored, as it was
    /// there.
    file_bytes: u64,
    saved_bytes: u64,
    /// `saved_bytes / file_bytes`.
    dedup_ratio: f64,
}

/// An image that was converted.
#[derive(Debug, Serialize)]
pub struct Converted {
    pub platform: String,
    pub source_digest: String,
    pub digest: String,
    /// Of the manifest.
    pub size: u64,
    pub layers: Vec<LayerReport>,
    pub dictionary_blobs: Vec<String>,
    pub bootstrap_layer: String,
    pub bootstrap_layer_bytes: u64,
    pub bootstrap_bytes: u64,
    pub paths: u64,
    pub files: u64,
    pub file_bytes: u64,
    pub blobs_in_use: u64,
    pub merge_seconds: f64,
}

/// A layer of an image.
#[derive(Debug, Serialize)]
pub struct LayerReport {
    source_digest: String,
    source_bytes: u64,
    blob: String,
    blob_bytes: u64,
    /// It was in the target; then what only its stream tells is missing.
    reused: bool,
    #[serde(flatten)]
    packed: Option<PackedReport>,
    seconds: f64,
}

#[derive(Debug, Serialize)]
struct PackedReport {
    compression: String,
    tar_bytes: u64,
    paths: usize,
    files: usize,
    file_bytes: u64,
    chunks: usize,
    stored_chunks: usize,
    /// Of these before compression.
    stored_bytes: u64,
    saved_bytes: u64,
}

pub fn layer(source: &Descriptor, layer: &Layer) -> LayerReport {
    LayerReport {
        source_digest: source.digest.to_string(),
        source_bytes: source.size,
        blob: layer.digest.to_string(),
        blob_bytes: layer.size,
        reused: layer.packed.is_none(),
        packed: layer.packed.as_ref().map(|packed| PackedReport {
            compression: format!("{:?}", packed.compression).to_lowercase(),
            tar_bytes: packed.tar_size,
            paths: packed.counts.paths,
            files: packed.counts.files,
            file_bytes: packed.counts.file_bytes,
            chunks: packed.counts.chunks,
            stored_chunks: packed.counts.stored_chunks,
            stored_bytes: packed.counts.stored_bytes,
            saved_bytes: packed.counts.saved_bytes,
        }),
        seconds: layer.seconds,
    }
}

impl Report {
    /// Adds what is known at the end.
    pub fn finish(
        &mut self,
        source: &Descriptor,
        target: &Descriptor,
        stages: Stages,
        layers: &Layers,
    ) {
        self.version = env!("CARGO_PKG_VERSION");
        self.fs_version = "6";
        self.source_digest = source.digest.to_string();
        self.target_digest = target.digest.to_string();
        self.target_media_type.clone_from(&target.media_type);
        self.seconds = stages;
        let totals = &mut self.totals;
        for layer in layers.values() {
            totals.layers += 1;
            totals.blob_bytes += layer.size;
            match &layer.packed {
                None => totals.reused_layers += 1,
                Some(packed) => {
                    totals.file_bytes += packed.counts.file_bytes;
                    totals.saved_bytes += packed.counts.saved_bytes;
                }
            }
        }
        let mut seen = HashSet::new();
        let all = self.images.iter().flat_map(|image| &image.layers);
        totals.source_bytes =
            all.filter(|l| seen.insert(&l.source_digest)).map(|l| l.source_bytes).sum();
        if totals.file_bytes > 0 {
            // A ratio needs no more digits than a double has.
            totals.dedup_ratio = totals.saved_bytes as f64 / totals.file_bytes as f64;
        }
    }

    /// Prints it for people.
    pub fn print(&self, out: &mut impl Write) -> io::Result<()> {
        let size = |bytes: u64| format!("{} ({bytes} bytes)", HumanBytes(bytes));
        let totals = &self.totals;
        writeln!(out, "source     {}", self.source)?;
        writeln!(out, "target     {}", self.target)?;
        writeln!(out, "digest     {}", self.target_digest)?;
        for image in &self.images {
            let Converted { platform, paths, files, file_bytes, .. } = image;
            writeln!(
                out,
                "image      {platform}: {paths} paths, of them {files} files, {}",
                size(*file_bytes)
            )?;
        }
        for digest in &self.copied {
            writeln!(out, "copied     {digest}")?;
        }
        let (layers, reused) = (totals.layers, totals.reused_layers);
        writeln!(out, "layers     {layers}, of them {reused} reused")?;
        writeln!(
            out,
            "data       {} became {}",
            size(totals.source_bytes),
            size(totals.blob_bytes)
        )?;
        if totals.file_bytes > 0 {
            writeln!(out, "dedup      {:.1} % of converted bytes", 100.0 * totals.dedup_ratio)?;
        }
        let Stages { layers, images, total, .. } = &self.seconds;
        writeln!(out, "time       {total:.2} s: layers {layers:.2} s, images {images:.2} s")
    }
}
