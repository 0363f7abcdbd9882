//! An image that is there already, as something to build on: a parent, a layer, a dictionary.

use std::collections::{HashMap, HashSet};

use zerocopy::little_endian::U32;

use super::draft::{Attributes, Body, Dir, Draft, Inode, InodeId};
use super::error::BuildError;
use super::xattrs::{self, Xattr};
use crate::rafs::id::{BlobId, Nid};
use crate::rafs::layout::{BlobEntry, ChunkRecord, ImageFlags, LayerMark};
use crate::rafs::{Bootstrap, FileKind, FormatError};

/// What a bootstrap says, checked.
#[derive(Debug)]
pub struct Image {
    pub chunk_size: u32,
    pub flags: ImageFlags,
    pub blobs: Vec<BlobEntry>,
    /// The chunk table; each record is of one of the blobs and of a chunk that this has.
    pub records: Vec<ChunkRecord>,
}

impl Image {
    /// All but the tree. `name` is for messages.
    pub fn read(bootstrap: &Bootstrap, name: &str) -> Result<Image, BuildError> {
        let fail = |source| BuildError::Image { name: name.to_owned(), source };
        let mut blobs = bootstrap.blob_entries().map_err(fail)?.to_vec();
        for (entry, info) in blobs.iter_mut().zip(bootstrap.blobs()) {
            // An id that a layer cannot know may have been told to the reader.
            entry.blob_id = *info.id.as_bytes();
        }
        let records = bootstrap.chunk_records().to_vec();
        for record in &records {
            let info = usize::try_from(record.blob_index.get())
                .ok()
                .and_then(|index| bootstrap.blobs().get(index));
            let known = info.is_some_and(|info| {
                let (offset, len) = (record.uncompressed_offset.get(), record.uncompressed_size);
                record.index.get() < info.chunk_count
                    && offset
                        .checked_add(len.get().into())
                        .is_some_and(|end| end <= info.uncompressed_size)
                    && offset.is_multiple_of(crate::rafs::layout::BLOCK_SIZE)
                    && (1..=info.chunk_size).contains(&len.get())
            });
            if !known {
                return Err(fail(FormatError::Invalid {
                    what: "chunk table",
                    offset: bootstrap.chunk_table_offset(),
                    reason: format!("a record of chunk {} that no blob has", record.index.get()),
                }));
            }
        }
        Ok(Image { chunk_size: bootstrap.chunk_size(), flags: bootstrap.flags(), blobs, records })
    }
}

/// The tree of a bootstrap. Its chunks count the blobs of the bootstrap.
pub fn draft(bootstrap: &Bootstrap, name: &str) -> Result<Draft, BuildError> {
    let fail = |source| BuildError::Image { name: name.to_owned(), source };
    let mut draft = Draft::new();
    let mut files: HashMap<Nid, InodeId> = HashMap::new();
    // The directories that the walk is in.
    let mut dirs = Vec::new();
    for item in bootstrap.walk() {
        let item = item.map_err(|e| {
            let place = format!("{name}, {}", e.path.escape_ascii());
            BuildError::Image { name: place, source: e.source }
        })?;
        let inode = &item.inode;
        let kind = inode.kind();
        if let Some(&file) = files.get(&inode.nid()) {
            let parent: InodeId = dirs[item.depth - 1];
            draft.dir_mut(parent).children.insert(item.name.into(), file);
            continue;
        }
        let mark = inode.layer_mark();
        let body = match kind {
            FileKind::Directory => {
                Body::Dir(Dir { implied: mark == LayerMark::Implied, ..Dir::default() })
            }
            FileKind::Regular => {
                let data = draft.next_data()?;
                draft.chunks.begin(data);
                for i in 0..inode.chunk_count() {
                    draft.chunks.push(inode.chunk(i).map_err(fail)?);
                }
                Body::File { size: inode.size(), data }
            }
            FileKind::Symlink => {
                let target = inode.symlink_target().map_err(fail)?;
                if mark == LayerMark::HardLink {
                    let parts = target.split(|&b| b == b'/').filter(|part| !part.is_empty());
                    Body::Link(parts.map(Box::from).collect())
                } else {
                    Body::Symlink(target.into())
                }
            }
            _ => Body::Special { rdev: inode.rdev() },
        };
        let mut found = Vec::new();
        for xattr in inode.xattrs().map_err(fail)? {
            let xattr = Xattr::new(&xattr.full_name(), xattr.value.to_vec());
            found.push(xattr.map_err(|reason| mismatch(name, reason))?);
        }
        let attributes = Attributes {
            mode: inode.mode(),
            uid: inode.uid(),
            gid: inode.gid(),
            mtime: inode.mtime(),
            mtime_nsec: inode.mtime_nsec(),
            xattrs: xattrs::sorted(found).map_err(|reason| mismatch(name, reason))?,
        };
        let new = Inode { attributes, body };
        let id = if item.depth == 0 {
            *draft.inode_mut(InodeId::ROOT) = new;
            InodeId::ROOT
        } else {
            dirs.truncate(item.depth);
            let id = draft.add(new)?;
            draft.dir_mut(dirs[item.depth - 1]).children.insert(item.name.into(), id);
            id
        };
        match kind {
            FileKind::Regular => drop(files.insert(inode.nid(), id)),
            FileKind::Directory => dirs.push(id),
            _ => {}
        }
    }
    Ok(draft)
}

fn mismatch(name: &str, reason: impl Into<String>) -> BuildError {
    BuildError::Mismatch { name: name.to_owned(), reason: reason.into() }
}

/// The blobs of several images, each once.
#[derive(Debug, Default)]
pub struct Blobs {
    pub entries: Vec<BlobEntry>,
    pub records: Vec<ChunkRecord>,
    by_id: HashMap<[u8; 64], usize>,
    seen: HashSet<(u32, u32)>,
}

impl Blobs {
    /// Takes the blobs and records of `image`; `draft`, if there is one, counts them from then on.
    pub fn add(
        &mut self,
        image: &Image,
        mut draft: Option<&mut Draft>,
        name: &str,
    ) -> Result<(), BuildError> {
        let mut devices = Vec::with_capacity(image.blobs.len());
        for blob in &image.blobs {
            if blob.blob_id == *BlobId::UNKNOWN.as_bytes() {
                return Err(mismatch(name, "the id of its blob is not known"));
            }
            let at = *self.by_id.entry(blob.blob_id).or_insert(self.entries.len());
            match self.entries.get_mut(at) {
                None => self.entries.push(*blob),
                Some(known) if same_blob(known, blob) => {}
                Some(_) => {
                    let id = String::from_utf8_lossy(&blob.blob_id).into_owned();
                    let reason =
                        format!("it describes blob {id} in another way than an earlier image");
                    return Err(mismatch(name, reason));
                }
            }
            devices.push(at);
        }
        // Device numbers have 8 bits while images are put together, too.
        if self.entries.len() > crate::rafs::layout::MAX_BLOBS {
            return Err(super::dedup::too_many_blobs());
        }
        let device = |at: usize| u8::try_from(devices[at] + 1).expect("at most 254");
        if let Some(draft) = &mut draft {
            for chunk in draft.chunks.all_mut() {
                *chunk = chunk.with_device(device(usize::from(chunk.device()) - 1));
            }
        }
        for record in &image.records {
            let mut record = *record;
            let at = device(record.blob_index.get() as usize) - 1;
            record.blob_index = U32::new(at.into());
            if self.seen.insert((at.into(), record.index.get())) {
                self.records.push(record);
            }
        }
        Ok(())
    }
}

/// Whether two entries describe the same blob: merging clears a feature and counts anew.
fn same_blob(a: &BlobEntry, b: &BlobEntry) -> bool {
    let known = |e: &BlobEntry| {
        (
            e.chunk_count.get(),
            e.compressor.get(),
            e.digester.get(),
            e.uncompressed_size.get(),
            e.ci_offset.get(),
            e.ci_compressed_size.get(),
            e.ci_uncompressed_size.get(),
        )
    };
    known(a) == known(b)
}
