//! Layers that have been converted before, and are in the target.
//!
//! A blob layer says in its annotations what it was made of and how. The manifests of the target's
//! repository, that of the target's own tag first, are searched for layers made of the source's layers
//! by the same builder with the same settings. So whoever may write to the target's repository is
//! believed to have converted what its manifests say.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Mutex;

use anyhow::{Context as _, Result, bail};
use tokio::runtime::Handle;

use super::Parameters;
use super::image::{PARAMETERS, SOURCE_DIGEST, is_rafs};
use crate::oci::Digest;
use crate::oci::image::{Source, Target, collect};
use crate::oci::manifest::{Descriptor, Document, Manifest, Stored};
use crate::rafs::toc::{self, PackedBlob, SectionKind};

/// Most manifests and indexes that are looked at.
const MAX_LOOKS: usize = 64;

/// Bytes that are read from a blob's end at once; a table of contents fits.
const TAIL: u64 = 64 << 10;

/// Longest array of chunks: 2^24 of the larger kind of entries.
const MAX_META: u64 = 24 << 24;

/// Finds those of `wanted`, digests of layers of the source, that the target has converted. What
/// cannot be read there is skipped: then the layer is converted again.
pub async fn find(
    target: &Target,
    wanted: &HashSet<Digest>,
    parameters: &Parameters,
) -> HashMap<Digest, Descriptor> {
    let mut found = HashMap::new();
    let source = target.as_source();
    let mut documents: VecDeque<Stored> = VecDeque::new();
    let mut named = names(target).await;
    let mut seen = HashSet::new();
    let mut looks = 0;
    while found.len() < wanted.len() && looks < MAX_LOOKS {
        let stored = match documents.pop_front() {
            Some(stored) => stored,
            None => match named.pop_front() {
                None => break,
                Some(name) => match name.read(&source).await {
                    Some(stored) => stored,
                    None => continue,
                },
            },
        };
        looks += 1;
        let Descriptor { media_type, digest, .. } = &stored.descriptor;
        if !seen.insert(digest.clone()) {
            continue;
        }
        match Document::parse("manifest in the target", media_type, &stored.bytes) {
            Ok(Document::Manifest(manifest)) => {
                take(&manifest, wanted, parameters, &mut found);
            }
            Ok(Document::Index(index)) => {
                for descriptor in index.manifests.iter().take(MAX_LOOKS) {
                    match source.manifest(descriptor).await {
                        Ok(stored) => documents.push_back(stored),
                        Err(e) => log::debug!("reuse: {e}"),
                    }
                }
            }
            Err(e) => log::debug!("reuse: {e}"),
        }
    }
    let mut missing = Vec::new();
    for (made_of, blob) in &found {
        if !matches!(target.blob_size(&blob.digest).await, Ok(Some(size)) if size == blob.size) {
            missing.push(made_of.clone());
        }
    }
    for made_of in missing {
        log::info!("reuse: the blob made of {made_of} is named by a manifest but is not there");
        found.remove(&made_of);
    }
    found
}

fn take(
    manifest: &Manifest,
    wanted: &HashSet<Digest>,
    parameters: &Parameters,
    found: &mut HashMap<Digest, Descriptor>,
) {
    if !is_rafs(manifest) {
        return;
    }
    for layer in &manifest.layers {
        let made_of = layer.annotations.get(SOURCE_DIGEST).and_then(|d| d.parse::<Digest>().ok());
        let Some(made_of) = made_of.filter(|d| wanted.contains(d)) else { continue };
        if layer.annotations.get(PARAMETERS).is_some_and(|p| *p == parameters.text()) {
            found.entry(made_of).or_insert_with(|| layer.clone());
        }
    }
}

/// A manifest to look at.
enum Name {
    Tag(String),
    Descriptor(Box<Descriptor>),
}

impl Name {
    async fn read(self, source: &Source) -> Option<Stored> {
        let read = match (self, source) {
            (Name::Tag(tag), Source::Registry(repository)) => repository.manifest(&tag).await,
            (Name::Descriptor(descriptor), source) => source.manifest(&descriptor).await.map(Some),
            (Name::Tag(_), _) => Ok(None),
        };
        read.unwrap_or_else(|e| {
            log::debug!("reuse: {e}");
            None
        })
    }
}

/// All manifests of the target's repository, the most promising first.
async fn names(target: &Target) -> VecDeque<Name> {
    match target {
        Target::Registry(repository) => {
            let own = repository.name().tag.clone();
            let mut tags: VecDeque<String> = own.iter().cloned().collect();
            match repository.tags(MAX_LOOKS).await {
                Ok(others) => {
                    tags.extend(others.into_iter().filter(|tag| Some(tag) != own.as_ref()))
                }
                Err(e) => log::debug!("reuse: {e}"),
            }
            tags.into_iter().map(Name::Tag).collect()
        }
        Target::Layout(layout, tag) => {
            let mut names = VecDeque::new();
            let own = layout.resolve(tag.as_deref()).ok().flatten();
            names.extend(own.map(Box::new).map(Name::Descriptor));
            if let Ok(index) = layout.index() {
                names.extend(index.manifests.into_iter().rev().map(Box::new).map(Name::Descriptor));
            }
            names
        }
    }
}

/// The parts of a converted layer that a merge needs: its bootstrap, and its array of chunks as a
/// bootstrap layer carries it. Reads a few parts of the blob.
pub async fn load(target: &Target, blob: &Descriptor) -> Result<(Vec<u8>, Option<Vec<u8>>)> {
    let remote = RemoteBlob {
        handle: Handle::current(),
        source: target.as_source(),
        digest: blob.digest.clone(),
        size: blob.size,
        tail: Mutex::new(None),
    };
    let parts = tokio::task::spawn_blocking(move || read(&remote)).await;
    parts.expect("reading does not panic").with_context(|| format!("blob {}", blob.digest))
}

fn read(remote: &RemoteBlob) -> Result<(Vec<u8>, Option<Vec<u8>>)> {
    let packed = PackedBlob::read(remote)?;
    if !packed.has_toc() {
        bail!("it has no table of contents");
    }
    let bootstrap = packed.bootstrap(remote)?;
    let sections =
        (packed.section(SectionKind::BlobMeta), packed.section(SectionKind::BlobMetaHeader));
    let meta = match sections {
        (Some(table), Some(header)) => {
            let mut meta = table.content(remote, MAX_META)?;
            meta.resize(meta.len().next_multiple_of(4096), 0);
            meta.extend(header.content(remote, 4096)?);
            Some(meta)
        }
        _ => None,
    };
    Ok((bootstrap, meta))
}

/// A blob of the target, of which parts are read.
struct RemoteBlob {
    handle: Handle,
    source: Source,
    digest: Digest,
    size: u64,
    /// The last bytes, once they have been read.
    tail: Mutex<Option<Vec<u8>>>,
}

impl RemoteBlob {
    fn fetch(&self, start: u64, end: u64) -> std::io::Result<Vec<u8>> {
        let stream = self.source.blob_range(&self.digest, start..end);
        self.handle.block_on(collect(stream)).map_err(std::io::Error::other)
    }
}

impl toc::Source for RemoteBlob {
    fn size(&self) -> std::io::Result<u64> {
        Ok(self.size)
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        let end = offset.checked_add(buf.len() as u64).filter(|&end| end <= self.size);
        let end = end.ok_or(std::io::ErrorKind::UnexpectedEof)?;
        let tail_start = self.size.saturating_sub(TAIL);
        if offset < tail_start {
            buf.copy_from_slice(&self.fetch(offset, end)?);
            return Ok(());
        }
        // Nobody else holds it: one thread reads a blob.
        let mut tail = self.tail.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let bytes = match &mut *tail {
            Some(bytes) => bytes,
            none => none.insert(self.fetch(tail_start, self.size)?),
        };
        let start = usize::try_from(offset - tail_start).expect("less than the tail has");
        buf.copy_from_slice(&bytes[start..start + buf.len()]);
        Ok(())
    }
}
