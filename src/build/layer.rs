//! Layers: a tar stream becomes a packed blob, read once, in order.
//!
//! [`pack`] makes what registries hold of a layer: chunk data, the array of chunks, digests and the
//! layer's own bootstrap in one blob, written while the stream is read. `merge` makes an image of the
//! bootstraps of several layers.
//!
//! # Memory
//!
//! No layer is ever in memory or on disk as a whole. [`pack`] needs
//!
//! - for data, `(2 × threads + 2) × 2 × max(1 MiB, chunk size)`, and per thread the codec's tables and
//!   one compressed chunk: about 20 MB for two threads and chunks of 1 MiB;
//! - to decompress, less than 1 MiB for gzip and up to 128 MiB for zstd, as the stream's window says;
//! - 1 MiB for the extension headers of one entry, 16 bytes for each piece of a sparse file (at most
//!   2^20 of them);
//! - about 250 bytes and the name and attributes for each entry (at most 2^24), 160 bytes for each
//!   distinct chunk (at most 2^24), 8 bytes for each chunk of each file; chunks in holes are at most
//!   2^24, however large a sparse file claims to be;
//! - at the end, the bootstrap and its compressed form: about 200 bytes for each path.

use std::io::{Read, Write};

use indicatif::ProgressBar;

use super::blob_file::BlobWriter;
use super::chunker::{Loader, Piece, RUN_LEN, RUN_PIECES, Run, Source};
use super::dedup::{Chunks, Dictionary};
use super::draft::{Attributes, Body, Dir, Draft, Inode};
use super::error::BuildError;
use super::packed::{self, Packed};
use super::pipeline::{self, Settings, Stores};
use super::tar::{Compression, Entry, EntryKind, Input, TarReader};
use super::tree::DataId;
use super::used::{Order, is_own, keep_used};
use super::whiteout::WhiteoutSpec;
use super::write;
use super::xattrs::{self, Xattr};
use crate::rafs::FileKind;
use crate::rafs::id::BlobId;
use crate::rafs::layout::{SYMLINK_MAX, encode_rdev};

/// Most chunks of a layer that are in holes: they cost the stream nothing.
const HOLES_MAX: u64 = 1 << 24;

/// A layer that was packed.
#[derive(Debug)]
pub struct PackedLayer {
    /// SHA-256 of the packed blob: the blob id, and the layer's digest in the registry.
    pub id: BlobId,
    /// Bytes of the packed blob.
    pub size: u64,
    /// SHA-256 of the plain tar: the diff id of the source layer.
    pub diff_id: [u8; 32],
    /// Bytes of the plain tar.
    pub tar_size: u64,
    /// How the source was compressed.
    pub compression: Compression,
    /// The layer's bootstrap: the section `image.boot` of the blob, for `merge`.
    pub bootstrap: Vec<u8>,
    /// What a bootstrap layer carries as `image/ID.blob.meta`; `None` if no file has data.
    pub meta: Option<Vec<u8>>,
    pub counts: Counts,
}

/// What a source held and what became of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Paths of the tree, the root and whiteouts among them.
    pub paths: usize,
    /// Regular files, hard links counted once.
    pub files: usize,
    /// Bytes of all regular files.
    pub file_bytes: u64,
    /// Chunks of all files.
    pub chunks: usize,
    /// Chunks that were stored.
    pub stored_chunks: usize,
    /// Bytes of these before compression.
    pub stored_bytes: u64,
    /// Bytes of chunks that were there already: in the layer, or in the dictionary.
    pub saved_bytes: u64,
}

/// Packs the layer that `reader` yields, a tar that is plain or compressed with gzip or zstd, and
/// writes the packed blob to `out` while reading. Whiteouts are kept as files: `merge` applies them.
///
/// The same source, settings and dictionary give the same bytes, whatever the number of threads.
/// `progress` counts bytes of files. The reader is read to its end. If `out` fails, an error comes
/// back only after the reader's next answer.
///
/// # Errors
///
/// See [`BuildError`]. Nothing that was written to `out` is of use then.
pub fn pack(
    reader: impl Read + Send,
    settings: Settings,
    dictionary: Option<&Dictionary>,
    out: impl Write + Send,
    progress: &ProgressBar,
) -> Result<PackedLayer, BuildError> {
    let source = TarSource::new(reader, settings.chunk_size, WhiteoutSpec::None)?;
    let chunks = Chunks::new(dictionary, None);
    let stores = pipeline::store(source, settings, chunks, BlobWriter::new(out), progress)?;
    let Stores { source, mut chunks, files, blob } = stores;
    let done = source.finish();
    let mut draft = done.draft;
    draft.chunks = files;
    let mut counts = Counts::of_chunks(&chunks, draft.chunks.total());
    let records = std::mem::take(chunks.own_mut());
    let packed = packed::finish(blob, records, settings, true, |records, entry| {
        *chunks.own_mut() = records;
        let (tree, mut files) = draft.into_tree(true)?;
        counts.add_tree(&tree);
        let table = keep_used(
            &tree,
            &mut files,
            chunks.finish(entry),
            settings.chunk_size,
            Order::Given,
            is_own(BlobId::UNKNOWN),
        );
        let image = write::Image {
            tree: &tree,
            defaults: settings.into(),
            files: &files,
            chunks: table.records,
            blobs: &table.blobs,
            prefetch: &[],
        };
        image.into_bytes()
    })?;
    let Packed { id, size, bootstrap, meta, .. } = packed;
    Ok(PackedLayer {
        id,
        size,
        diff_id: done.diff_id,
        tar_size: done.tar_size,
        compression: done.compression,
        bootstrap,
        meta,
        counts,
    })
}

impl Counts {
    /// What a pipeline has seen and stored; the tree is not counted yet.
    pub(super) fn of_chunks(stored: &Chunks<'_>, chunks: usize) -> Counts {
        let (stored_chunks, stored_bytes) = stored.own();
        Counts {
            chunks,
            stored_chunks,
            stored_bytes,
            saved_bytes: stored.saved,
            ..Counts::default()
        }
    }

    pub(super) fn add_tree(&mut self, tree: &super::tree::Tree) {
        self.paths = tree.len();
        self.files = tree.files().len();
        self.file_bytes = tree.files().iter().map(|file| file.size).sum();
    }
}

/// A tar stream as a source of chunks. What it says beside them becomes a [`Draft`].
pub struct TarSource<'r> {
    reader: TarReader<Input<'r>>,
    draft: Draft,
    chunk_size: u32,
    /// Files that are marks are not stored.
    spec: WhiteoutSpec,
    current: Option<Current>,
    /// Chunks in holes so far.
    holes: u64,
    ended: bool,
    next_run: u64,
}

/// The file that is being cut.
struct Current {
    data: DataId,
    size: u64,
    offset: u64,
}

/// What a [`TarSource`] has found.
pub struct Done {
    /// The tree of the layer, without the chunks of its files.
    pub draft: Draft,
    pub diff_id: [u8; 32],
    pub tar_size: u64,
    pub compression: Compression,
}

impl<'r> TarSource<'r> {
    pub fn new(
        reader: impl Read + Send + 'r,
        chunk_size: u32,
        spec: WhiteoutSpec,
    ) -> Result<TarSource<'r>, BuildError> {
        Ok(TarSource {
            reader: TarReader::new(Input::new(reader)?),
            draft: Draft::new(),
            chunk_size,
            spec,
            current: None,
            holes: 0,
            ended: false,
            next_run: 0,
        })
    }

    pub fn finish(self) -> Done {
        let input = self.reader.into_inner();
        let compression = input.compression();
        let (diff_id, tar_size) = input.finish();
        Done { draft: self.draft, diff_id, tar_size, compression }
    }

    fn add_pieces(&mut self, run: &mut Run) -> Result<(), BuildError> {
        let mut data_len = 0;
        while !self.ended {
            let current = match &mut self.current {
                Some(current) => current,
                None => match self.next_file()? {
                    Some(current) => self.current.insert(current),
                    None => return Ok(()),
                },
            };
            while current.offset < current.size {
                let len = u64::from(self.chunk_size).min(current.size - current.offset);
                let hole = self.reader.hole() >= len;
                let len = u32::try_from(len).expect("at most a chunk");
                let to_read = if hole { 0 } else { len as usize };
                let full = data_len > 0 && data_len + to_read > RUN_LEN;
                if full || run.pieces.len() == RUN_PIECES {
                    return Ok(());
                }
                let mut piece = Piece::new(current.data, current.offset, len, hole);
                if hole {
                    self.holes += 1;
                    if self.holes > HOLES_MAX {
                        return Err(BuildError::Limit {
                            what: "the number of chunks in holes of sparse files",
                            limit: HOLES_MAX,
                            advice: "; a larger --chunk-size makes fewer",
                        });
                    }
                    self.reader.skip_hole(len.into());
                } else {
                    piece.start = data_len;
                    data_len += to_read;
                    if run.data.len() < data_len {
                        run.data.resize(data_len, 0);
                    }
                    self.reader.read_file(&mut run.data[piece.start..data_len])?;
                }
                current.offset += u64::from(len);
                run.pieces.push(piece);
            }
            self.current = None;
        }
        Ok(())
    }

    /// Takes entries up to the next one that has data; `None` at the end of the stream.
    fn next_file(&mut self) -> Result<Option<Current>, BuildError> {
        while let Some(entry) = self.reader.next_entry()? {
            if let EntryKind::HardLink(target) = &entry.kind {
                self.draft.link(&entry.path, target)?;
                continue;
            }
            let marked = entry.path.last().is_some_and(|name| self.spec.is_mark_name(name));
            let inode = inode(&entry, &mut self.draft, marked)?;
            let data = match inode.body {
                Body::File { size, data } if size > 0 => Some(Current { data, size, offset: 0 }),
                _ => None,
            };
            self.draft.insert(&entry.path, inode)?;
            if data.is_some() {
                return Ok(data);
            }
        }
        self.ended = true;
        Ok(None)
    }
}

/// The inode of an entry that is no hard link.
fn inode(entry: &Entry, draft: &mut Draft, marked: bool) -> Result<Inode, BuildError> {
    let fail = |reason: String| BuildError::Layer {
        offset: None,
        reason: format!("{}: {reason}", entry.shown()),
    };
    let mut found = Vec::with_capacity(entry.xattrs.len());
    for (name, value) in &entry.xattrs {
        if Xattr::is_known(name) {
            found.push(Xattr::new(name, value.clone()).map_err(fail)?);
        } else {
            // As on a Linux file system, which has no place for them either: layers made on other
            // systems carry theirs.
            log::warn!(
                "{}: ignored the extended attribute {}, which no Linux file system keeps",
                entry.shown(),
                name.escape_ascii()
            );
        }
    }
    let (kind, body) = match &entry.kind {
        EntryKind::File { .. } if marked => (FileKind::Fifo, Body::Special { rdev: 0 }),
        EntryKind::File { size } => {
            (FileKind::Regular, Body::File { size: *size, data: draft.next_data()? })
        }
        EntryKind::Dir => (FileKind::Directory, Body::Dir(Dir::default())),
        EntryKind::Symlink(target) => {
            if target.is_empty() || target.len() as u64 > SYMLINK_MAX || target.contains(&0) {
                let len = target.len();
                return Err(fail(format!("the link's target has {len} bytes or a NUL in it")));
            }
            (FileKind::Symlink, Body::Symlink(target.as_slice().into()))
        }
        EntryKind::CharDevice { major, minor } => {
            (FileKind::CharDevice, Body::Special { rdev: encode_rdev(*major, *minor) })
        }
        EntryKind::BlockDevice { major, minor } => {
            (FileKind::BlockDevice, Body::Special { rdev: encode_rdev(*major, *minor) })
        }
        EntryKind::Fifo => (FileKind::Fifo, Body::Special { rdev: 0 }),
        EntryKind::HardLink(_) => unreachable!("the caller has taken these"),
    };
    let attributes = Attributes {
        mode: kind.mode_bits() | entry.mode,
        uid: entry.uid,
        gid: entry.gid,
        mtime: entry.mtime,
        mtime_nsec: entry.mtime_nsec,
        xattrs: xattrs::sorted(found).map_err(fail)?,
    };
    Ok(Inode { attributes, body })
}

impl Source for TarSource<'_> {
    type Loader = Loaded;

    fn loader(&self) -> Loaded {
        Loaded
    }

    fn fill(&mut self, run: &mut Run) -> bool {
        run.clear(self.next_run);
        match self.add_pieces(run) {
            Ok(()) if run.pieces.is_empty() => return false,
            Ok(()) => {}
            Err(e) => {
                // A stream cannot be read on behind an error.
                self.ended = true;
                self.current = None;
                run.failure = Some(e);
            }
        }
        self.next_run += 1;
        true
    }

    fn runs(&self) -> u64 {
        self.next_run
    }
}

/// Runs of a stream come with their data.
pub struct Loaded;

impl Loader for Loaded {
    fn load(&mut self, _: &mut Run) -> Result<(), BuildError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::merge::{self, Options};
    use crate::build::prefetch::Patterns;
    use crate::rafs::codec::{Compressor, Digester};
    use proptest::prelude::*;
    use std::io;

    fn settings(threads: usize) -> Settings {
        Settings {
            compressor: Compressor::Zstd,
            digester: Digester::Blake3,
            chunk_size: 4096,
            threads,
        }
    }

    fn pack_bytes(tar: &[u8], threads: usize) -> Result<(PackedLayer, Vec<u8>), BuildError> {
        let mut out = Vec::new();
        let hidden = ProgressBar::hidden();
        Ok((pack(tar, settings(threads), None, &mut out, &hidden)?, out))
    }

    /// A tar of some hundred files, long names, links, a sparse file and repeated content.
    fn sample() -> Vec<u8> {
        let mut tar = ::tar::Builder::new(Vec::new());
        for i in 0..300_usize {
            let mut header = ::tar::Header::new_gnu();
            let body = vec![u8::try_from(i % 7).unwrap(); i * 100];
            header.set_size(body.len() as u64);
            header.set_mode(0o644);
            let name = format!("{}/f{i}", "dir".repeat(i % 50 + 1));
            tar.append_data(&mut header, name, &body[..]).unwrap();
        }
        let mut header = ::tar::Header::new_gnu();
        header.set_entry_type(::tar::EntryType::Link);
        header.set_size(0);
        tar.append_link(&mut header, "link", "dir/f0").unwrap();
        tar.into_inner().unwrap()
    }

    #[test]
    fn the_number_of_threads_makes_no_difference() {
        let tar = sample();
        let (one, bytes) = pack_bytes(&tar, 1).unwrap();
        assert_eq!(one.size, bytes.len() as u64);
        assert_eq!(one.tar_size, tar.len() as u64);
        for threads in [2, 3, 8] {
            let (other, same) = pack_bytes(&tar, threads).unwrap();
            assert!(bytes == same && one.bootstrap == other.bootstrap, "{threads} threads");
        }
        // Nor does how the tar was compressed.
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&tar).unwrap();
        let (packed, same) = pack_bytes(&gzip.finish().unwrap(), 2).unwrap();
        assert!(bytes == same && packed.diff_id == one.diff_id);
        assert_eq!(packed.compression, Compression::Gzip);
    }

    #[test]
    fn an_empty_layer_is_a_blob_without_chunks() {
        for tar in [&b""[..], &[0; 1024]] {
            let (packed, bytes) = pack_bytes(tar, 2).unwrap();
            assert_eq!((packed.counts.paths, packed.meta.is_none()), (1, true));
            let sections = crate::rafs::toc::PackedBlob::read(&bytes[..]).unwrap();
            assert_eq!(sections.sections().len(), 1);
            let layer = merge::Layer::from_bytes(packed.bootstrap, packed.id, "empty").unwrap();
            let options = Options {
                whiteouts: WhiteoutSpec::Oci,
                prefetch: &Patterns::default(),
                dictionary: None,
            };
            let merged = merge::merge(&[layer], &options).unwrap();
            assert_eq!((merged.paths, merged.blobs.len()), (1, 0));
        }
    }

    #[test]
    fn a_dictionary_keeps_chunks_out_of_the_blob() {
        let tar = sample();
        let (first, _) = pack_bytes(&tar, 2).unwrap();
        let bootstrap = crate::rafs::Bootstrap::from_bytes(first.bootstrap.clone()).unwrap();
        let bootstrap = bootstrap.with_blob_id(first.id).unwrap();
        let image = crate::build::load::Image::read(&bootstrap, "dictionary").unwrap();
        let dictionary = Dictionary::new(&image);
        let (mut out, hidden) = (Vec::new(), ProgressBar::hidden());
        let second = pack(&tar[..], settings(2), Some(&dictionary), &mut out, &hidden).unwrap();
        assert_eq!((second.counts.stored_chunks, second.meta.is_none()), (0, true));
        let own = crate::rafs::Bootstrap::from_bytes(second.bootstrap).unwrap();
        let ids: Vec<_> = own.blobs().iter().map(|blob| blob.id).collect();
        assert_eq!(ids, [first.id], "the blob of the dictionary is the only one");
    }

    #[test]
    fn a_stream_or_an_output_that_fails_ends_the_layer() {
        struct Fails(usize);
        impl Read for Fails {
            fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
                if self.0 == 0 {
                    return Err(io::Error::other("the network is down"));
                }
                let n = buf.len().min(self.0);
                self.0 -= n;
                buf[..n].fill(0);
                Ok(n)
            }
        }
        impl Write for Fails {
            fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
                self.0 = self.0.checked_sub(buf.len()).ok_or(io::ErrorKind::StorageFull)?;
                Ok(buf.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let hidden = ProgressBar::hidden();
        let head = sample()[..5000].to_vec();
        let reader = head.chain(Fails(0));
        let error = pack(reader, settings(2), None, io::sink(), &hidden).unwrap_err();
        assert!(matches!(error, BuildError::ReadLayer { .. }), "{error}");
        for room in [0, 1000, 20_000] {
            let error = pack(&sample()[..], settings(2), None, Fails(room), &hidden).unwrap_err();
            assert!(matches!(error, BuildError::WriteBlob { .. }), "{room} bytes: {error}");
        }
    }

    #[test]
    fn a_small_stream_cannot_claim_much() {
        let mut header = ::tar::Header::new_gnu();
        header.as_old_mut().name[..1].copy_from_slice(b"s");
        header.as_old_mut().linkflag[0] = b'S';
        header.set_size(0);
        header.as_gnu_mut().unwrap().set_real_size(1 << 40);
        header.set_cksum();
        let error = pack_bytes(header.as_bytes(), 2).unwrap_err().to_string();
        assert!(error.contains("holes"), "{error}");
    }

    trait Chained {
        fn chain<R: Read>(self, next: R) -> impl Read;
    }

    impl Chained for Vec<u8> {
        fn chain<R: Read>(self, next: R) -> impl Read {
            Read::chain(io::Cursor::new(self), next)
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_stream_is_a_layer_or_an_error(
            flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
            cut in proptest::option::of(any::<prop::sample::Index>()),
            gzip in any::<bool>(),
        ) {
            let mut bytes = sample()[..60 << 10].to_vec();
            if gzip {
                let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                out.write_all(&bytes).unwrap();
                bytes = out.finish().unwrap();
            }
            for (at, value) in flips {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            if let Ok((packed, _)) = pack_bytes(&bytes, 2) {
                let image = crate::rafs::Bootstrap::from_bytes(packed.bootstrap).unwrap();
                for item in image.walk() {
                    item.unwrap();
                }
            }
        }
    }
}
