//! Chunks of blob files, verified.
//!
//! Memory: the chunk-info array of each blob that is open, and one stored and one uncompressed chunk
//! or batch, 32 MiB at most.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use zerocopy::{FromZeros, IntoBytes};

use super::image_file::ImageFile;
use crate::rafs::ci::{ChunkForm, ChunkInfo, ChunkInfos};
use crate::rafs::codec::{Compressor, Digester};
use crate::rafs::id::{BlobId, ChunkIndex};
use crate::rafs::layout::{BlobFeatures, ChunkAddr, CiHeader};
use crate::rafs::{BlobInfo, ChunkDigests};

/// Where the blob files of an image are.
#[derive(Clone, Debug, Default)]
pub struct Places {
    /// Each blob in a file named by its id.
    pub dir: Option<PathBuf>,
    /// The only blob of the image, whatever the file's name.
    pub file: Option<PathBuf>,
    /// The file that the bootstrap was taken out of.
    pub image: PathBuf,
}

/// All blobs of an image. Each is opened when it is needed first.
pub struct Blobs<'a> {
    image: &'a ImageFile,
    places: Places,
    open: Vec<Option<Blob>>,
    stored: Vec<u8>,
    batch: Vec<u8>,
    /// The blob and stored offset of what `batch` holds.
    batch_of: Option<(usize, u64)>,
}

struct Blob {
    info: BlobInfo,
    file: File,
    chunks: ChunkInfos,
    digests: ChunkDigests,
}

impl<'a> Blobs<'a> {
    pub fn new(image: &'a ImageFile, places: Places) -> Blobs<'a> {
        let open = image.bootstrap.blobs().iter().map(|_| None).collect();
        Blobs { image, places, open, stored: Vec::new(), batch: Vec::new(), batch_of: None }
    }

    /// Fills `out` with the chunk at `addr`, which has as many bytes.
    ///
    /// # Errors
    ///
    /// If the blob is missing or damaged, or the chunk does not match its digest.
    pub fn read(&mut self, addr: ChunkAddr, out: &mut [u8]) -> Result<()> {
        let at = usize::from(addr.device()) - 1;
        let index = ChunkIndex(addr.chunk_index());
        self.opened(at)?;
        let blob = self.open[at].as_ref().expect("it was opened");
        let place = || format!("chunk {} of blob {}", index.0, blob.info.id);
        let info = blob.chunks.get(index).with_context(place)?;
        if info.uncompressed_size as usize != out.len()
            || info.uncompressed_offset / 4096 != u64::from(addr.start_block())
        {
            bail!("{}: bootstrap and blob disagree on its place", place());
        }
        match info.form {
            ChunkForm::Plain => {
                blob.file.read_exact_at(out, info.compressed_offset).with_context(place)?;
            }
            ChunkForm::Compressed => {
                read_stored(&blob.file, &info, &mut self.stored).with_context(place)?;
                blob.info.compressor.decompress(&self.stored, out).with_context(place)?;
            }
            ChunkForm::Batch { index: batch, offset } => {
                let key = Some((at, info.compressed_offset));
                if self.batch_of != key {
                    self.batch_of = None;
                    let context = blob.chunks.batch(batch).with_context(place)?;
                    let size = context.uncompressed_size.get();
                    read_stored(&blob.file, &info, &mut self.stored).with_context(place)?;
                    self.batch.resize(size as usize, 0);
                    if info.compressed_size == size {
                        self.batch.copy_from_slice(&self.stored);
                    } else {
                        let codec = blob.info.compressor;
                        codec.decompress(&self.stored, &mut self.batch).with_context(place)?;
                    }
                    self.batch_of = key;
                }
                let start = offset as usize;
                let member = self.batch.get(start..start + out.len()).with_context(place)?;
                out.copy_from_slice(member);
            }
        }
        if let Some(want) = blob.digests.get(index) {
            if blob.info.digester.digest(out) != *want {
                bail!("{} does not match its digest", place());
            }
        } else if info.crc32c.is_some_and(|want| want != crc32c::crc32c(out)) {
            bail!("{} does not match its CRC", place());
        }
        Ok(())
    }

    /// The digest of a chunk and how it is made, if it is known.
    ///
    /// # Errors
    ///
    /// If the blob is missing or damaged.
    pub fn digest(&mut self, addr: ChunkAddr) -> Result<Option<([u8; 32], Digester)>> {
        let at = usize::from(addr.device()) - 1;
        let blob = self.opened(at)?;
        let digest = blob.digests.get(ChunkIndex(addr.chunk_index())).copied();
        Ok(digest.map(|digest| (digest, blob.info.digester)))
    }

    fn opened(&mut self, at: usize) -> Result<&Blob> {
        if self.open[at].is_none() {
            let info = self.image.bootstrap.blobs()[at].clone();
            let path = self.path(&info)?;
            self.open[at] = Some(self.open(info, &path)?);
        }
        Ok(self.open[at].as_ref().expect("just opened"))
    }

    fn path(&self, info: &BlobInfo) -> Result<PathBuf> {
        let inside =
            self.image.packed.is_some() && info.features.contains(BlobFeatures::INLINED_FS_META);
        if inside {
            return Ok(self.places.image.clone());
        }
        match (&self.places.file, &self.places.dir) {
            (Some(file), _) if self.image.bootstrap.blobs().len() == 1 => Ok(file.clone()),
            (Some(_), None) => bail!("the image has more than one blob: name their directory"),
            (_, Some(dir)) if info.id == BlobId::UNKNOWN => {
                let mut files =
                    std::fs::read_dir(dir).with_context(|| dir.display().to_string())?;
                match (files.next(), files.next()) {
                    (Some(file), None) => Ok(file?.path()),
                    _ => bail!(
                        "the bootstrap does not know the id of its blob, and {} does not hold one \
                         file only",
                        dir.display()
                    ),
                }
            }
            (_, Some(dir)) => Ok(dir.join(info.id.as_str())),
            (None, None) => Err(anyhow!("no place is given for blob {}", info.id)),
        }
    }

    fn open(&self, info: BlobInfo, path: &Path) -> Result<Blob> {
        let name = || format!("blob {}", path.display());
        let file = File::open(path).with_context(name)?;
        let size = file.metadata().with_context(name)?.len();
        let chunks = read_chunks(&file, size, &info).with_context(name)?;
        let digests = self.image.bootstrap.chunk_digests(info.index).with_context(name)?;
        Ok(Blob { info, file, chunks, digests })
    }
}

fn read_stored(file: &File, info: &ChunkInfo, stored: &mut Vec<u8>) -> Result<()> {
    stored.resize(info.compressed_size as usize, 0);
    Ok(file.read_exact_at(stored, info.compressed_offset)?)
}

/// Reads, decompresses and checks the chunk-info array of a blob in a file of `size` bytes.
///
/// # Errors
///
/// If the file ends before it or cannot be read, or the array is damaged.
pub(super) fn read_chunks(file: &File, size: u64, info: &BlobInfo) -> Result<ChunkInfos> {
    let stored_end = info.ci_offset + info.ci_compressed_size;
    if stored_end + size_of::<CiHeader>() as u64 > size {
        bail!(
            "the chunk-info array ends at byte {stored_end} and its header behind that, the file \
             at {size}"
        );
    }
    let buffer = |size: u64| anyhow::Ok(vec![0; usize::try_from(size)?]);
    let mut table = buffer(info.ci_compressed_size)?;
    file.read_exact_at(&mut table, info.ci_offset).context("reading the chunk-info array")?;
    if info.ci_compressor != Compressor::None {
        let mut out = buffer(info.ci_uncompressed_size)?;
        info.ci_compressor.decompress(&table, &mut out).context("chunk-info array")?;
        table = out;
    }
    let mut header = CiHeader::new_zeroed();
    file.read_exact_at(header.as_mut_bytes(), stored_end)
        .context("reading the header of the chunk-info array")?;
    Ok(ChunkInfos::parse(info, table, &header)?)
}
