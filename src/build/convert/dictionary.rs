//! A chunk dictionary: an image whose chunks are used instead of storing them again.
//!
//! Its blobs must be where the converted image is: those that are used are copied there.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context as _, Result, bail, ensure};

use super::copy;
use super::image::is_rafs;
use crate::build::dedup::Dictionary as Chunks;
use crate::build::load::Image;
use crate::oci::Digest;
use crate::oci::image::{Source, Target};
use crate::oci::manifest::{Descriptor, Document, Manifest};
use crate::oci::reference::Reference;
use crate::oci::registry::Access;
use crate::rafs::Bootstrap;
use crate::rafs::id::BlobId;

/// Largest bootstrap layer, compressed, and largest bootstrap, in bytes.
const MAX_BOOTSTRAP: u64 = 2 << 30;

/// Where a dictionary is: `bootstrap=FILE` or `bootstrap:local:FILE`, `bootstrap:registry:REF`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    File(PathBuf),
    Image(Box<Reference>),
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Place, String> {
        let file =
            text.strip_prefix("bootstrap=").or_else(|| text.strip_prefix("bootstrap:local:"));
        if let Some(file) = file.filter(|f| !f.is_empty()) {
            return Ok(Place::File(file.into()));
        }
        match text.strip_prefix("bootstrap:registry:") {
            Some(reference) => {
                let reference = reference.parse().map_err(|e| format!("{e}"))?;
                Ok(Place::Image(Box::new(reference)))
            }
            None => Err("write bootstrap=FILE, or bootstrap:registry:REF for an image".to_owned()),
        }
    }
}

/// A dictionary that is open.
#[derive(Debug)]
pub struct Dictionary {
    pub chunks: Chunks,
    /// SHA-256 of its bootstrap: what a layer made with it depends on.
    pub digest: Digest,
    blobs: Blobs,
}

/// Where its blobs are.
#[derive(Debug)]
enum Blobs {
    /// In the directory of the bootstrap or in `blobs` there, if not in the target.
    Files(PathBuf),
    /// Layers of this image.
    Image(Source, Box<Manifest>),
}

impl Dictionary {
    /// Opens it and makes sure that its chunks are such as are made here.
    pub async fn open(
        place: &Place,
        access: &Access,
        settings: crate::build::pipeline::Settings,
    ) -> Result<Dictionary> {
        let (bytes, blobs, name) = match place {
            Place::File(path) => {
                let name = path.display().to_string();
                let opened = crate::build::image_file::open(path)?;
                ensure!(
                    opened.packed.is_none(),
                    "{name} is a packed blob; a dictionary is the bootstrap of an image"
                );
                let bytes = std::fs::read(path).with_context(|| name.clone())?;
                let dir = path.parent().unwrap_or(Path::new("")).to_owned();
                (bytes, Blobs::Files(dir), name)
            }
            Place::Image(reference) => {
                let (bytes, blobs) = from_image(reference, access).await?;
                (bytes, blobs, reference.to_string())
            }
        };
        let digest = Digest::sha256(&bytes);
        let bootstrap = Bootstrap::from_bytes(bytes).with_context(|| name.clone())?;
        let image = Image::read(&bootstrap, &name)?;
        crate::build::compose::fits(&image, &name, settings)?;
        Ok(Dictionary { chunks: Chunks::new(&image), digest, blobs })
    }

    /// Sees to it that the blob `id` is in `target`; gives its size.
    pub async fn provide(&self, id: &BlobId, target: &Target) -> Result<(Digest, u64)> {
        let digest: Digest = format!("sha256:{id}").parse().context("a blob of the dictionary")?;
        if let Some(size) = target.blob_size(&digest).await? {
            return Ok((digest, size));
        }
        let size = match &self.blobs {
            Blobs::Image(source, manifest) => {
                let layer = manifest.layers.iter().find(|layer| layer.digest == digest);
                let Some(layer) = layer else {
                    bail!(
                        "blob {digest} of the dictionary is no layer of its image, nor in the target"
                    );
                };
                copy::blob(source, target, layer).await?;
                layer.size
            }
            Blobs::Files(dir) => {
                let name = id.to_string();
                let file = [dir.join(&name), dir.join("blobs").join(&name)]
                    .into_iter()
                    .find(|path| path.is_file())
                    .with_context(|| {
                        format!("blob {digest} of the dictionary is neither in the target nor a file in {}", dir.display())
                    })?;
                copy::file(&file, target, &digest).await?
            }
        };
        Ok((digest, size))
    }
}

/// The bootstrap of a RAFS image.
async fn from_image(reference: &Reference, access: &Access) -> Result<(Vec<u8>, Blobs)> {
    let source = Source::open(reference, access).await?;
    let mut found = Vec::new();
    let root = source.root().await?;
    match Document::parse(&reference.to_string(), &root.descriptor.media_type, &root.bytes)? {
        Document::Manifest(manifest) => found.push(*manifest),
        Document::Index(index) => {
            for descriptor in &index.manifests {
                let stored = source.manifest(descriptor).await?;
                let media_type = &stored.descriptor.media_type;
                if let Document::Manifest(manifest) =
                    Document::parse(&reference.to_string(), media_type, &stored.bytes)?
                {
                    found.push(*manifest);
                }
            }
        }
    }
    found.retain(is_rafs);
    let [manifest] = &mut found[..] else {
        bail!(
            "{reference} has {} RAFS images, a dictionary is one: name it by its digest",
            found.len()
        );
    };
    let layer = manifest.layers.last().expect("a RAFS image has a layer").clone();
    let bytes = source.small_blob(&layer, MAX_BOOTSTRAP).await?;
    let bootstrap = unpack(&bytes, &layer).with_context(|| format!("bootstrap of {reference}"))?;
    let manifest = Box::new(manifest.clone());
    Ok((bootstrap, Blobs::Image(source, manifest)))
}

/// The bootstrap in a bootstrap layer.
fn unpack(gzip: &[u8], layer: &Descriptor) -> Result<Vec<u8>> {
    let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(gzip));
    for entry in archive.entries()? {
        let mut entry = entry?;
        // Images of old have it at the top.
        if matches!(entry.path()?.to_str(), Some("image/image.boot" | "image.boot")) {
            ensure!(entry.size() <= MAX_BOOTSTRAP, "it has {} bytes", entry.size());
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes)?;
            return Ok(bytes);
        }
    }
    bail!("layer {} has no image/image.boot", layer.digest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_of_a_dictionary_are_written_as_nydus_tools_do() {
        for text in ["bootstrap=/a/b", "bootstrap:local:/a/b"] {
            assert_eq!(text.parse(), Ok(Place::File("/a/b".into())), "{text}");
        }
        let image = "bootstrap:registry:localhost:5000/a/b:t".parse().unwrap();
        let Place::Image(reference) = image else { panic!("{image:?}") };
        assert_eq!(reference.to_string(), "localhost:5000/a/b:t");
        for bad in ["", "/a/b", "bootstrap=", "bootstrap:registry:", "bootstrap:other:x"] {
            bad.parse::<Place>().expect_err(bad);
        }
    }
}
