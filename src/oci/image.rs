//! An image to read from, or to write to, wherever it is.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};

use super::archive::DockerArchive;
use super::digest::Digest;
use super::error::OciError;
use super::layout::{Layout, LayoutUpload};
use super::manifest::{Descriptor, Stored};
use super::reference::Reference;
use super::registry::{Access, ByteStream, Repository};
use super::upload::Upload;

/// Where an image is read from. Cheap to clone.
#[derive(Clone, Debug)]
pub enum Source {
    /// With the tag or digest.
    Registry(Repository),
    Layout(Layout, Option<String>),
    DockerArchive(Arc<DockerArchive>),
}

impl Source {
    pub async fn open(reference: &Reference, access: &Access) -> Result<Source, OciError> {
        Ok(match reference {
            Reference::Registry(name) => Source::Registry(Repository::connect(name, access).await?),
            Reference::Layout { dir, tag } => Source::Layout(Layout::open(dir)?, tag.clone()),
            Reference::OciArchive { file, tag } => {
                Source::Layout(Layout::open_archive(file)?, tag.clone())
            }
            Reference::DockerArchive { file, tag } => {
                // A compressed layer in it is read to learn its digest.
                let (file, tag) = (file.clone(), tag.clone());
                let open = move || DockerArchive::open(&file, tag.as_deref());
                let opened = tokio::task::spawn_blocking(open).await.expect("it does not panic");
                Source::DockerArchive(Arc::new(opened?))
            }
        })
    }

    /// The manifest or index that the reference names, verified.
    pub async fn root(&self) -> Result<Stored, OciError> {
        match self {
            Source::Registry(repository) => {
                let name = repository.name();
                repository
                    .manifest(name.manifest())
                    .await?
                    .ok_or_else(|| OciError::NotFound { what: format!("image {name}") })
            }
            Source::Layout(layout, tag) => {
                let missing = |what: &str| OciError::NotFound {
                    what: match tag {
                        Some(tag) => format!("{what} tagged {tag:?} in the layout"),
                        None => format!("{what} in the layout"),
                    },
                };
                let descriptor = layout.resolve(tag.as_deref())?.ok_or_else(|| missing("image"))?;
                layout.manifest(&descriptor)?.ok_or_else(|| missing("manifest of the image"))
            }
            Source::DockerArchive(archive) => Ok(archive.manifest().clone()),
        }
    }

    /// The manifest that a descriptor of an index names, verified.
    pub async fn manifest(&self, descriptor: &Descriptor) -> Result<Stored, OciError> {
        let found = match self {
            Source::Registry(repository) => repository.manifest(descriptor.digest.as_str()).await?,
            Source::Layout(layout, _) => layout.manifest(descriptor)?,
            Source::DockerArchive(_) => None,
        };
        let mut stored = found.ok_or_else(|| OciError::NotFound {
            what: format!("manifest {}", descriptor.digest),
        })?;
        descriptor.verify(&format!("manifest {}", descriptor.digest), &stored.bytes)?;
        // What names it knows best what it is.
        stored.descriptor = descriptor.clone();
        Ok(stored)
    }

    /// The whole blob. The stream ends with an error if it is not what `descriptor` says.
    pub fn blob(&self, descriptor: &Descriptor) -> ByteStream {
        match self {
            Source::Registry(repository) => repository.blob(descriptor),
            Source::Layout(layout, _) => layout.blob(descriptor),
            Source::DockerArchive(archive) => archive.blob(descriptor),
        }
    }

    /// Part of a blob, which only its reader can check. It has as many bytes as were asked for.
    pub fn blob_range(&self, digest: &Digest, range: Range<u64>) -> ByteStream {
        match self {
            Source::Registry(repository) => repository.blob_range(digest, range),
            Source::Layout(layout, _) => layout.blob_range(digest, range),
            Source::DockerArchive(archive) => {
                match archive.extent(digest).and_then(|extent| extent.clone().part(range)) {
                    Ok(extent) => extent.stream(None),
                    Err(e) => stream::iter([Err(e)]).boxed(),
                }
            }
        }
    }

    /// A blob of at most `limit` bytes, verified.
    pub async fn small_blob(
        &self,
        descriptor: &Descriptor,
        limit: u64,
    ) -> Result<Vec<u8>, OciError> {
        if descriptor.size > limit {
            return Err(OciError::TooLarge { what: format!("blob {}", descriptor.digest), limit });
        }
        collect(self.blob(descriptor)).await
    }
}

/// All bytes of a stream whose length is known to be small.
pub async fn collect(stream: ByteStream) -> Result<Vec<u8>, OciError> {
    let all = stream.try_fold(Vec::new(), async |mut all, piece| {
        all.extend_from_slice(&piece);
        Ok(all)
    });
    all.await
}

/// Where an image is written to. Cheap to clone.
#[derive(Clone, Debug)]
pub enum Target {
    Registry(Repository),
    Layout(Layout, Option<String>),
}

impl Target {
    /// Opens what `reference` names to write to it; a layout is made if there is none.
    pub async fn open(reference: &Reference, access: &Access) -> Result<Target, OciError> {
        let refuse = |what: &Reference, reason: &str| {
            Err(OciError::Unsupported { what: what.to_string(), reason: reason.to_owned() })
        };
        match reference {
            Reference::Registry(name) if name.digest.is_some() => {
                refuse(reference, "a target has a tag; its digest is known when it is complete")
            }
            Reference::Registry(name) => {
                Ok(Target::Registry(Repository::connect(name, access).await?))
            }
            Reference::Layout { dir, tag } => Ok(Target::Layout(Layout::create(dir)?, tag.clone())),
            Reference::OciArchive { .. } | Reference::DockerArchive { .. } => {
                refuse(reference, "archives are only read; write to oci:DIR and pack that")
            }
        }
    }

    /// The target as a source: what is in it already.
    pub fn as_source(&self) -> Source {
        match self {
            Target::Registry(repository) => Source::Registry(repository.clone()),
            Target::Layout(layout, tag) => Source::Layout(layout.clone(), tag.clone()),
        }
    }

    /// Bytes of a blob, None if it is not there.
    pub async fn blob_size(&self, digest: &Digest) -> Result<Option<u64>, OciError> {
        match self {
            Target::Registry(repository) => repository.blob_size(digest).await,
            Target::Layout(layout, _) => layout.blob_size(digest),
        }
    }

    /// Makes a blob of `source` one of this without sending it, if they are in one registry.
    pub async fn mount(&self, digest: &Digest, source: &Source) -> Result<bool, OciError> {
        match (self, source) {
            (Target::Registry(to), Source::Registry(from)) if to.same_registry(from) => {
                to.mount(digest, from.name()).await
            }
            _ => Ok(false),
        }
    }

    /// Begins to write a blob whose digest is told at the end.
    pub async fn upload(&self) -> Result<TargetUpload, OciError> {
        Ok(match self {
            Target::Registry(repository) => TargetUpload::Registry(repository.upload().await?),
            Target::Layout(layout, _) => TargetUpload::Layout(layout.upload()?),
        })
    }

    /// Writes a small blob. Does nothing if it is there.
    pub async fn put_blob(&self, bytes: Bytes) -> Result<Digest, OciError> {
        match self {
            Target::Registry(repository) => repository.put_blob(bytes).await,
            Target::Layout(layout, _) => layout.put_blob(&bytes),
        }
    }

    /// Writes a manifest or index under its digest.
    pub async fn put_manifest(
        &self,
        media_type: &str,
        bytes: &[u8],
    ) -> Result<Descriptor, OciError> {
        match self {
            Target::Registry(repository) => repository.put_manifest(media_type, bytes, None).await,
            Target::Layout(layout, _) => {
                layout.put_blob(bytes)?;
                Ok(Descriptor::of(media_type, bytes))
            }
        }
    }

    /// Writes the manifest or index that the reference names from now on. Everything that it names
    /// must be there.
    pub async fn put_root(&self, media_type: &str, bytes: &[u8]) -> Result<Descriptor, OciError> {
        match self {
            Target::Registry(repository) => {
                let tag = repository.name().tag.clone();
                repository.put_manifest(media_type, bytes, tag.as_deref()).await
            }
            Target::Layout(layout, tag) => {
                layout.put_blob(bytes)?;
                let descriptor = Descriptor::of(media_type, bytes);
                layout.tag(descriptor.clone(), tag.as_deref())?;
                Ok(descriptor)
            }
        }
    }
}

/// A blob that is being written.
#[derive(Debug)]
pub enum TargetUpload {
    Registry(Upload),
    /// Writes to a local file, and may wait for its disk.
    Layout(LayoutUpload),
}

impl TargetUpload {
    /// Writes the next piece; `upload::PIECE` is a good size.
    pub async fn write(&mut self, piece: Bytes) -> Result<(), OciError> {
        match self {
            TargetUpload::Registry(upload) => upload.write(piece).await,
            TargetUpload::Layout(upload) => upload.write(&piece),
        }
    }

    /// Bytes that have arrived.
    pub fn sent(&self) -> u64 {
        match self {
            TargetUpload::Registry(upload) => upload.sent(),
            TargetUpload::Layout(upload) => upload.sent(),
        }
    }

    /// Ends the blob, whose bytes have this digest.
    pub async fn finish(self, digest: &Digest) -> Result<(), OciError> {
        match self {
            TargetUpload::Registry(upload) => upload.finish(digest).await,
            TargetUpload::Layout(upload) => upload.finish(digest),
        }
    }

    /// Gives it up.
    pub async fn cancel(self) {
        match self {
            TargetUpload::Registry(upload) => upload.cancel().await,
            // Its file goes with it.
            TargetUpload::Layout(_) => {}
        }
    }
}
