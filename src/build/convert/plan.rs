//! What of the source is converted, what is copied, and what is left out.

use std::collections::HashSet;

use anyhow::{Context as _, Result, bail};

use super::image::{diff_ids, is_rafs, platform};
use crate::oci::Digest;
use crate::oci::image::Source;
use crate::oci::manifest::{
    DOCKER_CONFIG, Descriptor, Document, Index, LayerPacking, MAX_CONFIG, Manifest, OCI_CONFIG,
    Platform, PlatformName, Stored,
};

/// Marks a manifest that says something about another one of its index.
const REFERENCE_TYPE: &str = "vnd.docker.reference.type";
/// The digest of that other one.
const REFERENCE_DIGEST: &str = "vnd.docker.reference.digest";

/// An image to convert.
#[derive(Debug)]
pub struct Image {
    /// As its index or its reference names it.
    pub descriptor: Descriptor,
    pub manifest: Manifest,
    pub config: Vec<u8>,
    /// Of the content of its layers.
    pub diff_ids: Vec<Digest>,
    pub platform: Platform,
}

/// An entry of the source's index, or the only image.
#[derive(Debug)]
pub enum Entry {
    Convert(Box<Image>),
    Copy(Box<Stored>),
}

/// All that is to be done.
#[derive(Debug)]
pub struct Plan {
    /// The source as it is named.
    pub root: Descriptor,
    /// The source's index without its entries; None if the source is one image.
    pub index: Option<Index>,
    pub entries: Vec<Entry>,
}

impl Plan {
    pub fn images(&self) -> impl Iterator<Item = &Image> {
        self.entries.iter().filter_map(|entry| match entry {
            Entry::Convert(image) => Some(&**image),
            Entry::Copy(_) => None,
        })
    }

    /// Reads the source's manifests. `platforms` are those to convert; all if it is empty.
    pub async fn read(source: &Source, platforms: &[PlatformName]) -> Result<Plan> {
        let stored = source.root().await?;
        let root = stored.descriptor.clone();
        let what = format!("manifest {}", root.digest);
        match Document::parse(&what, &root.media_type, &stored.bytes)? {
            Document::Manifest(manifest) => {
                let image = match classify(&stored.descriptor, &manifest)? {
                    Kind::Image => read_image(source, root.clone(), *manifest).await?,
                    Kind::Other(reason) => bail!("{what} cannot be converted: {reason}"),
                };
                if !platforms.is_empty() && !platforms.iter().any(|p| p.matches(&image.platform)) {
                    bail!("the image is for {}, not for {}", image.platform, shown(platforms));
                }
                let entries = vec![Entry::Convert(Box::new(image))];
                Ok(Plan { root, index: None, entries })
            }
            Document::Index(index) => Plan::of_index(source, root, *index, platforms).await,
        }
    }

    async fn of_index(
        source: &Source,
        root: Descriptor,
        mut index: Index,
        platforms: &[PlatformName],
    ) -> Result<Plan> {
        let descriptors = std::mem::take(&mut index.manifests);
        // Left out, and with them what is about them.
        let mut dropped = HashSet::new();
        let mut entries = Vec::new();
        let about = |d: &Descriptor| d.annotations.get(REFERENCE_DIGEST).cloned();
        let is_about = |d: &Descriptor| d.annotations.contains_key(REFERENCE_TYPE);
        for descriptor in &descriptors {
            let stored = source.manifest(descriptor).await?;
            let what = format!("manifest {}", descriptor.digest);
            let document = Document::parse(&what, &descriptor.media_type, &stored.bytes)?;
            let (kind, manifest) = match document {
                Document::Index(_) => (Kind::Other("it is an index".to_owned()), None),
                Document::Manifest(manifest) => (classify(descriptor, &manifest)?, Some(manifest)),
            };
            let image = match (kind, manifest) {
                (Kind::Image, Some(manifest)) => {
                    read_image(source, descriptor.clone(), *manifest).await?
                }
                (Kind::Other(reason), _) => {
                    log::info!("{what} is copied as it is: {reason}");
                    entries.push(Entry::Copy(Box::new(stored)));
                    continue;
                }
                (Kind::Image, None) => unreachable!("an index is no image"),
            };
            if platforms.is_empty() || platforms.iter().any(|p| p.matches(&image.platform)) {
                if image.platform.os == "linux" || image.platform.os.is_empty() {
                    entries.push(Entry::Convert(Box::new(image)));
                } else {
                    log::warn!("{what} is copied as it is: it is for {}", image.platform);
                    entries.push(Entry::Copy(Box::new(stored)));
                }
            } else {
                dropped.insert(descriptor.digest.to_string());
            }
        }
        entries.retain(|entry| match entry {
            Entry::Copy(stored) if is_about(&stored.descriptor) => {
                about(&stored.descriptor).is_none_or(|digest| !dropped.contains(&digest))
            }
            _ => true,
        });
        let plan = Plan { root, index: Some(index), entries };
        if plan.images().next().is_none() {
            match platforms {
                [] => bail!("the index has no image that could be converted"),
                _ => bail!("the index has no image for {}", shown(platforms)),
            }
        }
        Ok(plan)
    }
}

fn shown(platforms: &[PlatformName]) -> String {
    platforms.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// What a manifest is to the converter.
enum Kind {
    Image,
    /// With the reason why it is none.
    Other(String),
}

/// Fails for an image that should be converted and cannot be.
fn classify(descriptor: &Descriptor, manifest: &Manifest) -> Result<Kind> {
    if is_rafs(manifest) {
        return Ok(Kind::Other("it is a RAFS image already".to_owned()));
    }
    if let Some(kind) = descriptor.annotations.get(REFERENCE_TYPE) {
        return Ok(Kind::Other(format!("it is a {kind}")));
    }
    let config = manifest.config.media_type.as_str();
    if config != OCI_CONFIG && config != DOCKER_CONFIG {
        return Ok(Kind::Other(format!("its configuration is {config}, not that of an image")));
    }
    let packed = |layer: &&Descriptor| LayerPacking::from_media_type(&layer.media_type).is_none();
    let foreign: Vec<&Descriptor> = manifest.layers.iter().filter(packed).collect();
    match foreign.first() {
        None => Ok(Kind::Image),
        Some(layer) if foreign.len() == manifest.layers.len() => {
            Ok(Kind::Other(format!("its layers are {}, not of a file system", layer.media_type)))
        }
        Some(layer) => {
            bail!(
                "layer {} of manifest {} cannot be read: its media type is {}",
                layer.digest,
                descriptor.digest,
                layer.media_type
            )
        }
    }
}

async fn read_image(source: &Source, descriptor: Descriptor, manifest: Manifest) -> Result<Image> {
    let config = source.small_blob(&manifest.config, MAX_CONFIG).await?;
    let read = || {
        let diff_ids = diff_ids(&config)?;
        if diff_ids.len() != manifest.layers.len() {
            let (layers, ids) = (manifest.layers.len(), diff_ids.len());
            bail!("it has {layers} layers, its configuration names {ids}");
        }
        let mut platform = platform(&config)?;
        if let Some(named) = &descriptor.platform {
            platform = named.clone();
        }
        Ok((diff_ids, platform))
    };
    let (diff_ids, platform) = read().with_context(|| format!("image {}", descriptor.digest))?;
    Ok(Image { descriptor, manifest, config, diff_ids, platform })
}
