//! Layers into an image: the overlay of their trees, one bootstrap over all their blobs.
//!
//! No data is read or written: the merged bootstrap points into the blobs of the layers. Memory: the
//! trees of all layers, see `draft`, and 100 bytes for each record of their chunk tables.

use std::collections::HashSet;

use super::dedup::{BlobTable, Dictionary};
use super::draft::Draft;
use super::error::BuildError;
use super::load::{self, Blobs, Image};
use super::overlay;
use super::prefetch::Patterns;
use super::used::{Order, keep_used};
use super::whiteout::WhiteoutSpec;
use super::write::{self, Defaults};
use crate::rafs::Bootstrap;
use crate::rafs::codec::{Compressor, Digester};
use crate::rafs::id::BlobId;
use crate::rafs::layout::{BlobEntry, BlobFeatures, ImageFlags};

/// One layer, lowest first.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Its blob has an id.
    bootstrap: Bootstrap,
    /// For messages.
    name: String,
}

impl Layer {
    /// The layer with this bootstrap. Its blob, if it has one and does not know its id, is `id`.
    /// `name` is for messages.
    ///
    /// # Errors
    ///
    /// If the bootstrap is damaged, or of a kind that we do not read.
    pub fn new(bootstrap: &Bootstrap, id: Option<BlobId>, name: &str) -> Result<Layer, BuildError> {
        let fail = |source| BuildError::Image { name: name.to_owned(), source };
        let bootstrap = match id {
            Some(id) => bootstrap.with_blob_id(id).map_err(fail)?,
            None => bootstrap.clone(),
        };
        Ok(Layer { bootstrap, name: name.to_owned() })
    }

    /// As [`Layer::new`], from the bytes of a section `image.boot`.
    ///
    /// # Errors
    ///
    /// As [`Layer::new`].
    pub fn from_bytes(bytes: Vec<u8>, id: BlobId, name: &str) -> Result<Layer, BuildError> {
        let bootstrap = Bootstrap::from_bytes(bytes)
            .map_err(|source| BuildError::Image { name: name.to_owned(), source })?;
        Layer::new(&bootstrap, Some(id), name)
    }
}

/// How layers are merged.
#[derive(Debug)]
pub struct Options<'a> {
    /// How the layers say what is gone.
    pub whiteouts: WhiteoutSpec,
    /// What the merged bootstrap lists for early fetching.
    pub prefetch: &'a Patterns,
    /// If given, a layer may bring one blob that is not of it, at most.
    pub dictionary: Option<&'a Dictionary>,
}

/// A merged image.
#[derive(Debug)]
pub struct Merged {
    pub bootstrap: Vec<u8>,
    /// The blobs that it uses, in the order of its blob table. Blobs of layers that nothing is left
    /// of are not among them.
    pub blobs: Vec<BlobId>,
    /// Paths of the image.
    pub paths: usize,
    /// Regular files, and their bytes.
    pub files: usize,
    pub file_bytes: u64,
}

/// Merges `layers`, lowest first.
///
/// # Errors
///
/// If a bootstrap is damaged, layers do not fit together, a hard link leads nowhere, or the image
/// would break a limit of the format.
pub fn merge(layers: &[Layer], options: &Options<'_>) -> Result<Merged, BuildError> {
    let mut merged = Draft::new();
    let mut blobs = Blobs::default();
    let mut defaults: Option<(Defaults, bool)> = None;
    for layer in layers {
        let name = &layer.name;
        let image = Image::read(&layer.bootstrap, name)?;
        check_dictionary(&image, options.dictionary, name)?;
        let mut draft = load::draft(&layer.bootstrap, name)?;
        blobs.add(&image, Some(&mut draft), name)?;
        overlay::apply(&mut merged, draft, options.whiteouts)?;
        // What a layer without data says of chunks does not matter, if another has data.
        let has_data = !image.blobs.is_empty();
        let own = defaults_of(&image);
        match defaults {
            Some((known, true)) if has_data && known.chunk_size != own.chunk_size => {
                return Err(BuildError::Mismatch {
                    name: name.clone(),
                    reason: format!(
                        "its chunks have {} bytes, those of the layers below {}",
                        own.chunk_size, known.chunk_size
                    ),
                });
            }
            Some((_, true)) if !has_data => {}
            _ => defaults = Some((own, has_data)),
        }
    }
    let (defaults, _) = defaults.ok_or_else(|| BuildError::Mismatch {
        name: "merge".to_owned(),
        reason: "there are no layers".to_owned(),
    })?;
    for entry in &mut blobs.entries {
        entry.features &= !BlobFeatures::INLINED_FS_META.bits();
    }
    let (tree, mut files) = merged.into_tree(false)?;
    let table = BlobTable { blobs: blobs.entries, records: blobs.records };
    let chunk_size = defaults.chunk_size;
    let table = keep_used(&tree, &mut files, table, chunk_size, Order::FirstUse, |_| false);
    let prefetch = options.prefetch.find(&tree);
    let image = write::Image {
        tree: &tree,
        defaults,
        files: &files,
        chunks: table.records,
        blobs: &table.blobs,
        prefetch: &prefetch,
    };
    Ok(Merged {
        bootstrap: image.into_bytes()?,
        blobs: table.blobs.iter().map(id).collect(),
        paths: tree.len(),
        files: tree.files().len(),
        file_bytes: tree.files().iter().map(|file| file.size).sum(),
    })
}

/// The id of a blob that was read from a checked bootstrap.
fn id(entry: &BlobEntry) -> BlobId {
    BlobId::parse(&entry.blob_id).expect("checked when the bootstrap was opened")
}

fn check_dictionary(
    image: &Image,
    dictionary: Option<&Dictionary>,
    name: &str,
) -> Result<(), BuildError> {
    let Some(dictionary) = dictionary else { return Ok(()) };
    let known: HashSet<BlobId> = dictionary.blobs().iter().map(id).collect();
    let own: Vec<BlobId> = image.blobs.iter().map(id).filter(|id| !known.contains(id)).collect();
    if own.len() > 1 {
        let own: Vec<&str> = own.iter().map(BlobId::as_str).collect();
        return Err(BuildError::Mismatch {
            name: name.to_owned(),
            reason: format!("blobs that are not of the dictionary: {}", own.join(", ")),
        });
    }
    Ok(())
}

/// Compressor, digester and chunk size that an image's super block names.
pub fn defaults_of(image: &Image) -> Defaults {
    let compressors = [Compressor::None, Compressor::Lz4Block, Compressor::Gzip, Compressor::Zstd];
    let compressor = compressors.into_iter().find(|c| image.flags.contains(c.image_flag()));
    let digester = if image.flags.contains(ImageFlags::HASH_SHA256) {
        Digester::Sha256
    } else {
        Digester::Blake3
    };
    Defaults {
        compressor: compressor.expect("checked when the bootstrap was opened"),
        digester,
        chunk_size: image.chunk_size,
    }
}
