//! One image from one source: a directory or a tar stream, on top of a parent or alone.

use std::fs::File;
use std::io::{self, BufWriter, IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use super::blob_file::{BlobTarget, BlobWriter};
use super::chunker::Chunker;
use super::dedup::{Chunks, Dictionary};
use super::draft::Draft;
use super::error::BuildError;
use super::image_file;
use super::layer::{Counts, TarSource};
use super::load::{self, Image};
use super::merge::defaults_of;
use super::output::Output;
use super::overlay;
use super::packed;
use super::pipeline::{self, Settings, Stores};
use super::prefetch::{Patterns, PrefetchPolicy, data_order};
use super::scan::{Marks, Scanned};
use super::tree::{FileChunks, NodeId, Tree};
use super::used::{Order, is_own, keep_used};
use super::whiteout::WhiteoutSpec;
use super::write;
use crate::rafs::id::BlobId;
use crate::rafs::layout::BlobEntry;

/// What to build from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceKind {
    Directory,
    /// A tar stream, however compressed; `-` is standard input.
    Tar,
}

/// Whether the bootstrap goes into the blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Bootstrap and blob are two files.
    Native,
    /// The blob holds all; `toc`: with a table of contents and the digests of the chunks.
    Packed { toc: bool },
}

/// What to build.
#[derive(Debug)]
pub struct Request {
    pub kind: SourceKind,
    pub source: PathBuf,
    pub settings: Settings,
    pub whiteouts: WhiteoutSpec,
    pub form: Form,
    pub blob: BlobTarget,
    /// An image that lies below.
    pub parent: Option<PathBuf>,
    /// An image whose chunks may be used.
    pub dictionary: Option<PathBuf>,
    pub policy: PrefetchPolicy,
    pub patterns: Patterns,
}

/// What was built.
#[derive(Debug)]
pub struct Composed {
    pub bootstrap: Vec<u8>,
    /// Id, file and bytes of the new blob, if there is one.
    pub blob: Option<(BlobId, PathBuf, u64)>,
    /// All blobs of the image by id, without that of a layer that cannot know its own.
    pub blobs: Vec<BlobId>,
    pub counts: Counts,
}

/// The image below.
struct Parent {
    image: Image,
    draft: Draft,
}

/// Builds it.
///
/// # Errors
///
/// See [`BuildError`]; an image that is given and cannot be opened, with the reason in the chain.
pub fn compose(request: &Request) -> anyhow::Result<Composed> {
    let parent = match &request.parent {
        Some(path) => Some(open_parent(path, request)?),
        None => None,
    };
    let dictionary = match &request.dictionary {
        Some(path) => {
            let name = path.display().to_string();
            let image = Image::read(&image_file::open(path)?.bootstrap, &name)?;
            fits(&image, &name, request.settings)?;
            Some(Dictionary::new(&image))
        }
        None => None,
    };
    let chunks = Chunks::new(dictionary.as_ref(), parent.as_ref().map(|p| &p.image));
    Ok(match request.kind {
        SourceKind::Directory => directory(request, parent, chunks)?,
        SourceKind::Tar => tar(request, parent, chunks)?,
    })
}

fn open_parent(path: &Path, request: &Request) -> anyhow::Result<Parent> {
    let name = path.display().to_string();
    let bootstrap = image_file::open(path)?.bootstrap;
    let image = Image::read(&bootstrap, &name)?;
    fits(&image, &name, request.settings)?;
    Ok(Parent { draft: load::draft(&bootstrap, &name)?, image })
}

/// Refuses an image whose chunks cannot be shared.
pub(super) fn fits(image: &Image, name: &str, settings: Settings) -> Result<(), BuildError> {
    let mismatch = |reason: String| BuildError::Mismatch { name: name.to_owned(), reason };
    let has = defaults_of(image);
    if has.chunk_size != settings.chunk_size {
        return Err(mismatch(format!(
            "its chunks have {} bytes, those to be built {}: see --chunk-size",
            has.chunk_size, settings.chunk_size
        )));
    }
    if has.digester != settings.digester {
        return Err(mismatch(format!(
            "its chunks are digested with {}, those to be built with {}: see --digester",
            has.digester.name(),
            settings.digester.name()
        )));
    }
    if image.blobs.iter().any(|blob| blob.blob_id == *BlobId::UNKNOWN.as_bytes()) {
        return Err(mismatch(
            "the id of its blob is not known: give its file the blob's id as name".to_owned(),
        ));
    }
    Ok(())
}

fn directory(
    request: &Request,
    parent: Option<Parent>,
    chunks: Chunks<'_>,
) -> Result<Composed, BuildError> {
    let progress = ProgressBar::new_spinner()
        .with_style(style("{spinner} scanning: {human_pos} paths"))
        .with_message("scanning");
    progress.enable_steady_tick(Duration::from_millis(200));
    let marks = if parent.is_some() { Marks::Keep } else { Marks::Drop };
    let scanned = Scanned::scan(&request.source, request.whiteouts, marks, &progress)?;
    progress.finish_and_clear();

    let tree = &scanned.tree;
    let order = data_order(tree, &request.patterns.find_quietly(tree));
    let progress = bar(tree.files().iter().map(|file| file.size).sum());
    let out = BufWriter::with_capacity(256 << 10, Output::create(request.blob.dir())?);
    let source = Chunker::new(&scanned, order, request.settings.chunk_size);
    let stores = pipeline::store(source, request.settings, chunks, BlobWriter::new(out), &progress)
        .map_err(|e| e.blob_at(request.blob.dir()))?;
    progress.finish_and_clear();
    let Stores { chunks, files, blob, .. } = stores;
    let counts = Counts::of_chunks(&chunks, files.total());
    let Some(parent) = parent else {
        return finish(request, scanned.tree, files, chunks, blob, counts);
    };
    let upper = Draft::from_tree(scanned.tree, files)?;
    let mut draft = parent.draft;
    overlay::apply(&mut draft, upper, request.whiteouts)?;
    let (tree, files) = draft.into_tree(false)?;
    finish(request, tree, files, chunks, blob, counts)
}

fn tar(
    request: &Request,
    parent: Option<Parent>,
    chunks: Chunks<'_>,
) -> Result<Composed, BuildError> {
    let fail = |source| BuildError::Source {
        action: "open the tar",
        path: request.source.clone(),
        source,
    };
    let mut len = None;
    let reader: Box<dyn Read + Send> = if request.source == Path::new("-") {
        Box::new(io::stdin())
    } else {
        let file = File::open(&request.source).map_err(fail)?;
        len = file.metadata().ok().filter(|m| m.is_file()).map(|m| m.len());
        Box::new(file)
    };
    let progress =
        if io::stderr().is_terminal() { bar(len.unwrap_or(0)) } else { ProgressBar::hidden() };
    let reader = progress.wrap_read(reader);
    let out = BufWriter::with_capacity(256 << 10, Output::create(request.blob.dir())?);
    let source = TarSource::new(reader, request.settings.chunk_size, request.whiteouts)?;
    // The bar counts what is read of the file, compressed or not.
    let hidden = ProgressBar::hidden();
    let stores = pipeline::store(source, request.settings, chunks, BlobWriter::new(out), &hidden)
        .map_err(|e| e.blob_at(request.blob.dir()))?;
    progress.finish_and_clear();
    let Stores { source, chunks, files, blob } = stores;
    let counts = Counts::of_chunks(&chunks, files.total());
    let mut layer = source.finish().draft;
    layer.chunks = files;
    // A layer that is to be merged keeps what only the merge can resolve.
    let is_layer =
        parent.is_none() && request.whiteouts == WhiteoutSpec::None && request.form != Form::Native;
    let (tree, files) = if is_layer {
        layer.into_tree(true)?
    } else {
        let mut draft = parent.map_or_else(Draft::new, |parent| parent.draft);
        overlay::apply(&mut draft, layer, request.whiteouts)?;
        draft.into_tree(false)?
    };
    finish(request, tree, files, chunks, blob, counts)
}

/// Completes blob and bootstrap.
fn finish(
    request: &Request,
    tree: Tree,
    mut files: FileChunks,
    mut chunks: Chunks<'_>,
    blob: BlobWriter<BufWriter<Output>>,
    mut counts: Counts,
) -> Result<Composed, BuildError> {
    let settings = request.settings;
    let first = request.patterns.find(&tree);
    let prefetch: &[NodeId] = if request.policy == PrefetchPolicy::Fs { &first } else { &[] };
    counts.add_tree(&tree);
    let mut records = std::mem::take(chunks.own_mut());
    let mut blobs = Vec::new();
    let mut bootstrap = |chunks: Chunks<'_>, entry: Option<BlobEntry>| {
        let own = entry.map(|e| BlobId::parse(&e.blob_id).expect("made from an id"));
        let table = keep_used(
            &tree,
            &mut files,
            chunks.finish(entry),
            settings.chunk_size,
            Order::Given,
            is_own(own.unwrap_or(BlobId::UNKNOWN)),
        );
        blobs = table.blobs.iter().filter_map(|e| BlobId::parse(&e.blob_id)).collect();
        let image = write::Image {
            tree: &tree,
            defaults: settings.into(),
            files: &files,
            chunks: table.records,
            blobs: &table.blobs,
            prefetch,
        };
        image.into_bytes()
    };
    let at = |e: BuildError| e.blob_at(request.blob.dir());
    let (bytes, blob) = match request.form {
        Form::Native => {
            let (entry, out) = blob.finish(&mut records, settings).map_err(at)?;
            *chunks.own_mut() = records;
            let bytes = bootstrap(chunks, entry)?;
            let blob = match entry {
                Some(entry) => {
                    let id = BlobId::parse(&entry.blob_id).expect("made from a digest");
                    let path = commit(out, request, id)?;
                    Some((id, path, entry.compressed_size.get()))
                }
                None => None,
            };
            (bytes, blob)
        }
        Form::Packed { toc } => {
            let packed = packed::finish(blob, records, settings, toc, |records, entry| {
                *chunks.own_mut() = records;
                bootstrap(chunks, entry)
            });
            let packed = packed.map_err(at)?;
            let path = commit(packed.out, request, packed.id)?;
            (packed.bootstrap, Some((packed.id, path, packed.size)))
        }
    };
    blobs.retain(|id| *id != BlobId::UNKNOWN);
    Ok(Composed { bootstrap: bytes, blob, blobs, counts })
}

/// Gives the blob its name.
fn commit(out: BufWriter<Output>, request: &Request, id: BlobId) -> Result<PathBuf, BuildError> {
    let path = request.blob.path(id);
    out.into_inner()
        .map_err(|e| BuildError::Output { path: path.clone(), source: e.into_error() })?
        .commit(&path)?;
    Ok(path)
}

fn bar(len: u64) -> ProgressBar {
    ProgressBar::new(len)
        .with_style(style("{wide_bar} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left"))
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("the template is a literal")
}
