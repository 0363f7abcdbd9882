//! `rafs convert`: an OCI or Docker image becomes a RAFS image, from one registry to another.
//!
//! `plan` (what the source has) · `reuse` (layers that the target has already) · `layer` (all others, a
//! few at a time, from stream to stream: see `stream`) · merge, then for each image `image`
//! (bootstrap layer, configuration, manifest) · `copy` (what stays as it is) · the index · `report`.
//!
//! The target's digest depends on the source, the settings and the version of this program only: not
//! on threads, on machines, or on whether a layer was found or made. Manifests are written when all
//! that they name is there, the one with the tag last.
//!
//! # Memory
//!
//! For each layer under way: what [`super::layer`] states, and 3 pieces of 8 MiB that are to be sent.
//! For each layer of the image: its bootstrap and array of chunks, about 150 bytes for a path and 16 for
//! a chunk. At the end, for one image after another: the merged bootstrap, its layer, plain and
//! compressed. Nothing is unpacked, and nothing but manifests is kept on disk by the way.

pub mod cli;
mod copy;
mod dictionary;
mod image;
mod layer;
mod plan;
mod report;
mod reuse;
mod stream;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream as futures};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use self::dictionary::Dictionary;
use self::layer::Layer;
use self::plan::{Entry, Image, Plan};
use self::report::{Converted, Report, Stages};
use self::stream::Bars;
use super::layer::pack;
use super::merge::{self, merge};
use super::pipeline::Settings;
use super::prefetch::Patterns;
use super::whiteout::WhiteoutSpec;
use crate::oci::Digest;
use crate::oci::image::{Source, Target};
use crate::oci::manifest::{DOCKER_MANIFEST, Descriptor, OCI_MANIFEST, PlatformName};
use crate::rafs::id::BlobId;

/// What all steps need.
#[derive(Clone, Debug)]
struct Context {
    source: Source,
    target: Target,
    settings: Settings,
    dictionary: Option<Arc<Dictionary>>,
    patterns: Arc<Patterns>,
    /// Layers under way at once.
    parallel_layers: usize,
}

/// What the bytes of a converted layer depend on, beside the layer of the source.
#[derive(Debug)]
struct Parameters(String);

impl Parameters {
    fn new(settings: Settings, dictionary: Option<&Dictionary>) -> Parameters {
        let mut text = format!(
            "rafsd {}, zstd {}, compressor {}, digester {}, chunk-size {:#x}",
            env!("CARGO_PKG_VERSION"),
            zstd::zstd_safe::version_string(),
            settings.compressor.name(),
            settings.digester.name(),
            settings.chunk_size,
        );
        if let Some(dictionary) = dictionary {
            text.push_str(&format!(", chunk-dict {}", dictionary.digest));
        }
        Parameters(text)
    }

    fn text(&self) -> &str {
        &self.0
    }
}

/// Converts what the source names and writes it to the target.
async fn convert(
    context: &Context,
    platforms: &[PlatformName],
    bars: &MultiProgress,
) -> Result<Report> {
    let begun = Instant::now();
    let mut stages = Stages::default();
    let plan = Plan::read(&context.source, platforms).await.context("source")?;
    stages.read = begun.elapsed().as_secs_f64();

    let parameters = Parameters::new(context.settings, context.dictionary.as_deref());
    let stage = Instant::now();
    let wanted: HashSet<Digest> =
        plan.images().flat_map(|i| &i.manifest.layers).map(|l| l.digest.clone()).collect();
    let found = reuse::find(&context.target, &wanted, &parameters).await;
    stages.look_up = stage.elapsed().as_secs_f64();

    let stage = Instant::now();
    let layers = all_layers(context, &plan, found, bars).await?;
    stages.layers = stage.elapsed().as_secs_f64();

    let stage = Instant::now();
    let mut report = Report::default();
    let mut descriptors = Vec::with_capacity(plan.entries.len());
    for entry in &plan.entries {
        descriptors.push(match entry {
            Entry::Copy(stored) => {
                copy::document(&context.source, &context.target, stored)
                    .await
                    .with_context(|| format!("copying manifest {}", stored.descriptor.digest))?;
                report.copied.push(stored.descriptor.digest.to_string());
                stored.descriptor.clone()
            }
            Entry::Convert(image) => {
                let is_root = plan.index.is_none();
                let converted = one_image(context, image, &layers, &parameters, is_root)
                    .await
                    .with_context(|| format!("image {}", image.descriptor.digest))?;
                let Converted { digest, size, .. } = &converted;
                let mut descriptor = image.descriptor.clone();
                descriptor.media_type = media_type(image).to_owned();
                (descriptor.digest, descriptor.size) = (digest.parse()?, *size);
                // The content itself, and other places of it.
                descriptor.other.remove("data");
                descriptor.other.remove("urls");
                report.images.push(converted);
                descriptor
            }
        });
    }
    let mut root = descriptors.first().cloned();
    if let Some(mut index) = plan.index {
        index.manifests = descriptors;
        let media_type = &plan.root.media_type;
        root = Some(context.target.put_root(media_type, &index.to_bytes()).await?);
    }
    stages.images = stage.elapsed().as_secs_f64();
    stages.total = begun.elapsed().as_secs_f64();
    let root = root.context("the source has no image")?;
    report.finish(&plan.root, &root, stages, &layers);
    Ok(report)
}

/// By digest of the source's layer.
type Layers = HashMap<Digest, Layer>;

/// Converts each layer once, however often it is used.
async fn all_layers(
    context: &Context,
    plan: &Plan,
    mut found: HashMap<Digest, Descriptor>,
    bars: &MultiProgress,
) -> Result<Layers> {
    // In the order of the images, as a map would begin somewhere else each time.
    let mut seen = HashSet::new();
    let all: Vec<&Descriptor> = plan
        .images()
        .flat_map(|image| &image.manifest.layers)
        .filter(|layer| seen.insert(layer.digest.clone()))
        .collect();
    let bytes = all.iter().filter(|l| !found.contains_key(&l.digest)).map(|l| l.size).sum();
    let total = bars.add(ProgressBar::new(bytes).with_style(style(
        "total        {wide_bar} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left",
    )));
    let layers = futures::iter(all).map(|source| {
        let (found, total) = (found.remove(&source.digest), total.clone());
        async move {
            let layer = match found {
                Some(blob) => reused(context, source, &blob).await?,
                None => None,
            };
            let layer = match layer {
                Some(layer) => layer,
                None => {
                    let own = bars.insert_before(&total, ProgressBar::new(source.size));
                    own.set_style(style("{prefix:12} {wide_bar} {bytes} of {total_bytes}"));
                    own.set_prefix(source.digest.short().to_owned());
                    let layer =
                        layer::convert(context, source, &Bars { own: own.clone(), total }).await;
                    own.finish_and_clear();
                    layer?
                }
            };
            Ok::<_, anyhow::Error>((source.digest.clone(), layer))
        }
    });
    let layers = layers.buffer_unordered(context.parallel_layers).try_collect().await?;
    total.finish_and_clear();
    Ok(layers)
}

/// The parts of a layer that the target has. None if they cannot be read: then it is made anew.
async fn reused(
    context: &Context,
    source: &Descriptor,
    blob: &Descriptor,
) -> Result<Option<Layer>> {
    let begun = Instant::now();
    match reuse::load(&context.target, blob).await {
        Ok((bootstrap, meta)) => Ok(Some(Layer {
            digest: blob.digest.clone(),
            size: blob.size,
            bootstrap,
            meta,
            packed: None,
            seconds: begun.elapsed().as_secs_f64(),
        })),
        Err(e) => {
            log::warn!("layer {}: what the target has of it cannot be used: {e:#}", source.digest);
            Ok(None)
        }
    }
}

fn media_type(image: &Image) -> &'static str {
    if image.descriptor.media_type == DOCKER_MANIFEST { DOCKER_MANIFEST } else { OCI_MANIFEST }
}

/// Merges the layers of an image and writes what belongs to it. Its manifest gets the tag if it is
/// the `root`.
async fn one_image(
    context: &Context,
    image: &Image,
    layers: &Layers,
    parameters: &Parameters,
    root: bool,
) -> Result<Converted> {
    let own: Vec<&Layer> = image.manifest.layers.iter().map(|l| &layers[&l.digest]).collect();
    for ((layer, source), want) in own.iter().zip(&image.manifest.layers).zip(&image.diff_ids) {
        if let Some(packed) = &layer.packed {
            ensure!(
                packed.diff_id == *want,
                "the content of layer {} has the digest {}, the image's configuration says {want}",
                source.digest,
                packed.diff_id
            );
        }
    }
    let begun = Instant::now();
    let merged = merged(context, &own).await?;
    let merge_seconds = begun.elapsed().as_secs_f64();

    let mut descriptors = Vec::new();
    for (layer, source) in own.iter().zip(&image.manifest.layers) {
        let made_of = Some((source, parameters.text()));
        descriptors.push(image::blob_layer(&layer.digest, layer.size, made_of));
    }
    let of_layers: HashSet<&str> = own.iter().map(|layer| layer.digest.hex()).collect();
    let mut dictionary_blobs = Vec::new();
    for id in merged.blobs.iter().filter(|id| !of_layers.contains(id.as_str())) {
        let dictionary = context.dictionary.as_ref().context("a blob that no layer has")?;
        let (digest, size) = dictionary.provide(id, &context.target).await?;
        dictionary_blobs.push(digest.to_string());
        descriptors.push(image::blob_layer(&digest, size, None));
    }
    // An image may have a layer twice.
    let metas: BTreeMap<&str, &[u8]> =
        own.iter().filter_map(|layer| Some((layer.digest.hex(), layer.meta.as_deref()?))).collect();
    let mut listed = HashSet::new();
    let metas: Vec<(&str, &[u8])> = own
        .iter()
        .filter(|layer| listed.insert(layer.digest.hex()))
        .filter_map(|layer| metas.get_key_value(layer.digest.hex()).map(|(id, meta)| (*id, *meta)))
        .collect();
    let bootstrap_bytes = merged.bootstrap.len() as u64;
    let bootstrap = image::bootstrap_layer(&merged.bootstrap, &metas)?;
    let target = &context.target;
    let size = bootstrap.gzip.len() as u64;
    let digest = target.put_blob(Bytes::from(bootstrap.gzip)).await?;
    let mut diff_ids: Vec<&Digest> = descriptors.iter().map(|d| &d.digest).collect();
    diff_ids.push(&bootstrap.diff_id);
    let config = image::config(&image.config, &diff_ids)?;
    let config_size = config.len() as u64;
    let config = target.put_blob(Bytes::from(config)).await?;
    let media_type = media_type(image);
    let bootstrap = (digest.clone(), size);
    let manifest =
        image::manifest(&image.manifest, media_type, (config, config_size), descriptors, bootstrap);
    let bytes = manifest.to_bytes();
    let written = match root {
        true => target.put_root(media_type, &bytes).await?,
        false => target.put_manifest(media_type, &bytes).await?,
    };
    Ok(Converted {
        platform: image.platform.to_string(),
        source_digest: image.descriptor.digest.to_string(),
        digest: written.digest.to_string(),
        size: written.size,
        layers: image.manifest.layers.iter().zip(&own).map(|(s, l)| report::layer(s, l)).collect(),
        dictionary_blobs,
        bootstrap_layer: digest.to_string(),
        bootstrap_layer_bytes: size,
        bootstrap_bytes,
        paths: merged.paths as u64,
        files: merged.files as u64,
        file_bytes: merged.file_bytes,
        blobs_in_use: merged.blobs.len() as u64,
        merge_seconds,
    })
}

/// The bootstrap of the whole image.
async fn merged(context: &Context, own: &[&Layer]) -> Result<merge::Merged> {
    let mut layers = Vec::with_capacity(own.len().max(1));
    for layer in own {
        let id = BlobId::parse(layer.digest.hex().as_bytes()).expect("the digits of a digest");
        layers.push((layer.bootstrap.clone(), id, layer.digest.to_string()));
    }
    let context = context.clone();
    let merging = tokio::task::spawn_blocking(move || {
        if layers.is_empty() {
            // An image without layers has an empty root, as that of a layer without entries.
            let hidden = ProgressBar::hidden();
            let empty = pack(std::io::empty(), context.settings, None, std::io::sink(), &hidden)?;
            layers.push((empty.bootstrap, empty.id, "an empty layer".to_owned()));
        }
        let layers =
            layers.into_iter().map(|(bytes, id, name)| merge::Layer::from_bytes(bytes, id, &name));
        let layers = layers.collect::<Result<Vec<_>, _>>()?;
        let options = merge::Options {
            whiteouts: WhiteoutSpec::Oci,
            prefetch: &context.patterns,
            dictionary: context.dictionary.as_deref().map(|d| &d.chunks),
        };
        merge(&layers, &options)
    });
    Ok(merging.await.expect("merging does not panic")?)
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("the template is a literal")
}
