//! What goes from the source to the target as it is.

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use bytes::BytesMut;
use futures_util::StreamExt;
use tokio::io::AsyncReadExt;

use crate::oci::Digest;
use crate::oci::image::{Source, Target};
use crate::oci::manifest::{Descriptor, Document, Stored};
use crate::oci::upload::PIECE;

/// Indexes in indexes are followed this deep.
const MAX_DEPTH: u32 = 4;

/// Copies a blob, if the target does not have it.
pub async fn blob(source: &Source, target: &Target, descriptor: &Descriptor) -> Result<()> {
    let digest = &descriptor.digest;
    if target.blob_size(digest).await? == Some(descriptor.size) {
        return Ok(());
    }
    if target.mount(digest, source).await? {
        return Ok(());
    }
    let mut stream = source.blob(descriptor);
    let mut upload = target.upload().await?;
    let mut piece = BytesMut::new();
    let copied = async {
        while let Some(bytes) = stream.next().await {
            let mut bytes = bytes?;
            while !bytes.is_empty() {
                let taken = bytes.split_to(bytes.len().min(PIECE - piece.len()));
                piece.extend_from_slice(&taken);
                if piece.len() == PIECE {
                    upload.write(std::mem::take(&mut piece).freeze()).await?;
                }
            }
        }
        if !piece.is_empty() {
            upload.write(piece.freeze()).await?;
        }
        Ok::<_, crate::oci::OciError>(())
    };
    match copied.await {
        Ok(()) => Ok(upload.finish(digest).await?),
        Err(e) => {
            upload.cancel().await;
            Err(e.into())
        }
    }
}

/// Copies a file that must have this digest; gives its size.
pub async fn file(path: &Path, target: &Target, digest: &Digest) -> Result<u64> {
    let name = || path.display().to_string();
    let mut file = tokio::fs::File::open(path).await.with_context(name)?;
    let mut upload = target.upload().await?;
    let (mut hasher, mut size) = (digest.hasher(), 0);
    loop {
        let mut piece = Vec::new();
        (&mut file).take(PIECE as u64).read_to_end(&mut piece).await.with_context(name)?;
        if piece.is_empty() {
            break;
        }
        hasher.update(&piece);
        size += piece.len() as u64;
        upload.write(Bytes::from(piece)).await?;
    }
    if hasher.finish() != *digest {
        upload.cancel().await;
        bail!("{} does not have the digest that is its name", path.display());
    }
    upload.finish(digest).await?;
    Ok(size)
}

/// Copies a manifest or index with everything that it names. Blobs that are somewhere else, as their
/// descriptor says, stay there.
pub async fn document(source: &Source, target: &Target, stored: &Stored) -> Result<()> {
    Box::pin(document_at(source, target, stored, 0)).await
}

async fn document_at(source: &Source, target: &Target, stored: &Stored, depth: u32) -> Result<()> {
    let Descriptor { media_type, digest, .. } = &stored.descriptor;
    match Document::parse(&format!("manifest {digest}"), media_type, &stored.bytes)? {
        Document::Manifest(manifest) => {
            for descriptor in std::iter::once(&manifest.config).chain(&manifest.layers) {
                if descriptor.other.get("urls").is_none_or(|urls| urls.is_null()) {
                    blob(source, target, descriptor).await?;
                }
            }
        }
        Document::Index(index) => {
            if depth == MAX_DEPTH {
                bail!("indexes are nested deeper than {MAX_DEPTH}");
            }
            for descriptor in &index.manifests {
                let inner = source.manifest(descriptor).await?;
                Box::pin(document_at(source, target, &inner, depth + 1)).await?;
            }
        }
    }
    target.put_manifest(media_type, &stored.bytes).await?;
    Ok(())
}
