//! One image against its source: all bytes of both are read once, side by side, on all processors.
//!
//! A layer of the source becomes what it says of each path; a blob of the target becomes the digests
//! of its chunks. Then the layers are put on top of each other and compared with the bootstrap.
//!
//! Memory: what `overlay`, `blob_stream` and `boot_layer` state, the first for all layers together,
//! the second for each processor; and the queues of `images`, 4 MiB for each blob being read.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::blob_stream::{self, Expected, Seen};
use super::filesystem::{self, ChunkContent, MtimePrecision};
use super::findings::{Findings, describe};
use super::images::{Image, is_damage};
use super::layers;
use super::overlay::{Cut, Layer, Overlay};
use super::progress::{Bar, Bars};
use super::report::{Report, Rule, Value};
use super::source_dir;
use crate::oci::manifest::{Descriptor, LayerPacking};
use crate::oci::{Digest, OciError};
use crate::rafs::ci::ChunkInfos;
use crate::rafs::{BlobInfo, Bootstrap};

/// What the file system should be.
pub(super) enum Content<'a> {
    Layers { image: &'a Image, layers: Vec<SourceLayer<'a>> },
    Dir(&'a Path),
}

/// A layer of the source, lowest first.
pub(super) struct SourceLayer<'a> {
    pub descriptor: &'a Descriptor,
    pub packing: LayerPacking,
    /// As the configuration has it, if it does.
    pub diff_id: Option<String>,
}

/// A blob of the target.
pub(super) struct TargetBlob<'a> {
    /// Its entry in the blob table; `None` if no file uses it.
    pub info: Option<&'a BlobInfo>,
    pub chunks: Option<ChunkInfos>,
    pub place: String,
    pub bytes: Bytes<'a>,
}

/// Where the bytes of a blob are.
pub(super) enum Bytes<'a> {
    /// `name`: what a difference of its descriptor is reported as.
    Image {
        image: &'a Image,
        descriptor: &'a Descriptor,
        name: String,
    },
    File {
        path: PathBuf,
        size: u64,
    },
}

impl Bytes<'_> {
    fn size(&self) -> u64 {
        match self {
            Bytes::Image { descriptor, .. } => descriptor.size,
            Bytes::File { size, .. } => *size,
        }
    }
}

/// What came out of one piece of work.
enum Done {
    Layer(usize, layers::Layer<Result<Layer, super::overlay::LayerError>>),
    Blob(usize, Findings, Result<Seen, Unread>),
}

/// Why a blob was not read.
enum Unread {
    /// It is not what its descriptor says.
    Damaged(OciError),
    Failed(String),
}

/// Reads everything and reports by the rules bootstrap and file system, and by the rule manifest what
/// is wrong with digests and sizes. `findings` are those of the metadata so far. Without `content`
/// the target alone is checked.
pub(super) fn prove(
    content: Option<&Content<'_>>,
    image: &Bootstrap,
    blobs: &[TargetBlob<'_>],
    mtime: MtimePrecision,
    mut findings: Findings,
    report: &mut Report,
) {
    let infos = blobs.iter().filter_map(|blob| Some((blob.info?.index, blob.chunks.as_ref()?)));
    super::metadata::check(image, infos.collect(), &mut findings);

    let cut = filesystem::cut_of(image);
    let mut chunks = ChunkContent::default();
    for blob in image.blobs() {
        if let Ok(table) = image.chunk_digests(blob.index) {
            chunks.table.insert(blob.index, table);
        }
    }
    let work = Work { content, image, blobs, cut: &cut, table: &chunks, next: AtomicUsize::new(0) };
    let done = work.run(report);
    let mut overlay = content.map(|_| Overlay::default());
    for done in done {
        match done {
            Done::Layer(number, layer) => {
                let Some(Content::Layers { layers, .. }) = content else { continue };
                report.counts.source_layers += 1;
                report.counts.source_bytes += layer.size;
                let said = &layers[number];
                let told = source_layer(number, said, layer, report);
                overlay = overlay.zip(told).and_then(|(mut overlay, layer)| {
                    report.counts.content_bytes += layer.content_bytes;
                    match overlay.apply(layer) {
                        Ok(()) => Some(overlay),
                        Err(e) => {
                            let what = format!("source layer {number}: {}", describe(&e));
                            report.not_told(Rule::FileSystem, what);
                            None
                        }
                    }
                });
            }
            Done::Blob(number, found, seen) => {
                let blob = &blobs[number];
                findings.merge(found);
                match seen {
                    Ok(seen) => target_blob(blob, seen, &mut chunks, &mut findings, report),
                    Err(Unread::Damaged(e)) => {
                        let Bytes::Image { descriptor, name, .. } = &blob.bytes else { continue };
                        let (named, text) = (descriptor.digest.as_str(), describe(&e));
                        let name = name.as_str();
                        report.difference(Rule::Manifest, name, "content", named, text);
                    }
                    Err(Unread::Failed(what)) => {
                        report.not_told(Rule::Bootstrap, format!("{}: {what}", blob.place));
                    }
                }
            }
        }
    }
    if let Some(Content::Dir(path)) = content {
        let root_time = image.inode(image.root()).is_ok_and(|root| root.mtime() != 0);
        overlay = match source_dir::read(path, root_time, &cut) {
            Ok((overlay, bytes)) => {
                report.counts.content_bytes += bytes;
                Some(overlay)
            }
            Err(e) => {
                report.not_told(Rule::FileSystem, format!("source: {e:#}"));
                None
            }
        };
    }
    report.counts.target_blobs += findings.blobs;
    report.counts.chunks += findings.chunks;
    findings.name_files(image);
    report_findings(findings, report);
    if let Some(overlay) = overlay {
        filesystem::compare(&overlay.finish(), image, &chunks, mtime, report);
    }
}

/// What a layer says, unless it is not the one that the source's manifest names.
fn source_layer(
    number: usize,
    said: &SourceLayer<'_>,
    read: layers::Layer<Result<Layer, super::overlay::LayerError>>,
    report: &mut Report,
) -> Option<Layer> {
    let mut not_told = |what: String| {
        report.not_told(Rule::FileSystem, format!("source layer {number}: {what}"));
        None
    };
    if let Some(e) = read.failure {
        return not_told(describe(&e));
    }
    if read.digest != said.descriptor.digest {
        return not_told(format!("it has {}, not {}", read.digest, said.descriptor.digest));
    }
    if read.size != said.descriptor.size {
        return not_told(format!("{} bytes, not {}", read.size, said.descriptor.size));
    }
    let layer = match read.result {
        Ok(layer) => layer,
        Err(e) => return not_told(describe(&e)),
    };
    match &said.diff_id {
        Some(diff_id) if *diff_id != read.diff_id.as_str() => {
            not_told(format!("its tar has {}, not the diff id {diff_id}", read.diff_id))
        }
        _ => Some(layer),
    }
}

fn target_blob(
    blob: &TargetBlob<'_>,
    seen: Seen,
    chunks: &mut ChunkContent,
    findings: &mut Findings,
    report: &mut Report,
) {
    report.counts.target_bytes += seen.size;
    let digest = Digest::from_sha256(seen.sha256);
    match &blob.bytes {
        Bytes::Image { descriptor, name, .. } => {
            if digest != descriptor.digest {
                let (named, found) = (descriptor.digest.as_str(), digest.as_str());
                report.difference(Rule::Manifest, name.as_str(), "digest", named, found);
            }
            if seen.size != descriptor.size {
                let (named, found) = (descriptor.size.to_string(), seen.size.to_string());
                report.difference(Rule::Manifest, name.as_str(), "size", named, found);
            }
        }
        Bytes::File { .. } => {
            if let Some(info) = blob.info
                && !seen.is_named
                && info.id != crate::rafs::id::BlobId::UNKNOWN
            {
                let what = format!("its SHA-256 is {}", digest.hex());
                findings.mismatch(&blob.place, "SHA-256", info.id, digest.hex(), what);
            }
        }
    }
    if let Some(info) = blob.info
        && !seen.digests.is_empty()
    {
        chunks.seen.insert(info.index, seen.digests);
    }
}

/// Turns what was found in the metadata into differences.
pub(super) fn report_findings(findings: Findings, report: &mut Report) {
    let hidden = findings.problem_count - findings.problems.len() as u64;
    for problem in findings.problems {
        match problem.values {
            Some(v) => {
                report.difference(Rule::Bootstrap, problem.place, v.field, v.expected, v.found);
            }
            None => report.difference(
                Rule::Bootstrap,
                problem.place,
                "validity",
                "valid",
                Value::Text(problem.what),
            ),
        }
    }
    report.hidden(Rule::Bootstrap, hidden);
    for what in findings.undecided {
        report.not_told(Rule::Bootstrap, what);
    }
}

struct Work<'a> {
    content: Option<&'a Content<'a>>,
    image: &'a Bootstrap,
    blobs: &'a [TargetBlob<'a>],
    cut: &'a Cut,
    table: &'a ChunkContent,
    next: AtomicUsize,
}

impl Work<'_> {
    /// Does all of it; the results in order, layers first.
    fn run(&self, report: &Report) -> Vec<Done> {
        let layers = match self.content {
            Some(Content::Layers { layers, .. }) => layers.as_slice(),
            _ => &[],
        };
        let count = layers.len() + self.blobs.len();
        let bytes = layers.iter().map(|layer| layer.descriptor.size);
        let bytes = bytes.chain(self.blobs.iter().map(|blob| blob.bytes.size())).sum();
        let bars = Bars::new(report.image().unwrap_or("all").to_owned(), bytes);
        let results = Mutex::new(Vec::new());
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(count);
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    loop {
                        let number = self.next.fetch_add(1, Ordering::Relaxed);
                        let done = match layers.get(number) {
                            Some(layer) => self.layer(number, layer, &bars),
                            None => match self.blobs.get(number - layers.len()) {
                                Some(blob) => self.blob(number - layers.len(), blob, &bars),
                                None => return,
                            },
                        };
                        results.lock().expect("no thread panics here").push((number, done));
                    }
                });
            }
        });
        let mut results = results.into_inner().expect("no thread panics here");
        results.sort_unstable_by_key(|(number, _)| *number);
        results.into_iter().map(|(_, done)| done).collect()
    }

    fn layer(&self, number: usize, layer: &SourceLayer<'_>, bars: &Bars) -> Done {
        let Some(Content::Layers { image, .. }) = self.content else {
            unreachable!("only an image has layers")
        };
        let name = format!("source {}", layer.descriptor.digest.short());
        let bar = bars.add(name, layer.descriptor.size);
        let read = layers::read(image, layer.descriptor, layer.packing, &bar, |tar| {
            Layer::read(tar, self.cut)
        });
        Done::Layer(number, read)
    }

    fn blob(&self, number: usize, blob: &TargetBlob<'_>, bars: &Bars) -> Done {
        let mut findings = Findings::default();
        let name = match &blob.bytes {
            Bytes::Image { descriptor, .. } => descriptor.digest.short().to_owned(),
            Bytes::File { .. } => blob.place.chars().take(17).collect(),
        };
        let bar = bars.add(format!("target {name}"), blob.bytes.size());
        findings.limit = FINDINGS_MAX;
        let seen = self.passes(blob, &mut findings, &bar);
        Done::Blob(number, findings, seen)
    }

    /// Reads the blob, and once more if only then it is known where its chunks are.
    fn passes(
        &self,
        blob: &TargetBlob<'_>,
        findings: &mut Findings,
        bar: &Bar<'_>,
    ) -> Result<Seen, Unread> {
        let seen = self.pass(blob, blob.chunks.as_ref(), findings, bar)?;
        match &seen.chunks {
            Some(chunks) if blob.chunks.is_none() && blob.info.is_some() => {
                let mut again = Findings { limit: FINDINGS_MAX, ..Findings::default() };
                let seen = self.pass(blob, Some(chunks), &mut again, bar)?;
                // What the first pass found, this one found too.
                *findings = again;
                Ok(seen)
            }
            _ => Ok(seen),
        }
    }

    fn pass(
        &self,
        blob: &TargetBlob<'_>,
        chunks: Option<&ChunkInfos>,
        findings: &mut Findings,
        bar: &Bar<'_>,
    ) -> Result<Seen, Unread> {
        let toc = blob.info.and_then(|info| {
            let entry = self.image.blob_entries().ok()?.get(usize::from(info.index.0))?;
            Some((entry.toc_digest, entry.toc_size.get()))
        });
        let table = blob.info.and_then(|info| self.table.table.get(&info.index));
        let place = blob.place.clone();
        let expected = Expected { info: blob.info, chunks, table, toc, place };
        match &blob.bytes {
            Bytes::Image { image, descriptor, .. } => {
                let mut reader = image.blob(descriptor);
                let failure = reader.failure();
                let seen =
                    blob_stream::check(&mut reader as &mut dyn Read, &expected, findings, bar);
                match failure.get() {
                    // All bytes have been read, and their digest is known.
                    None | Some(OciError::Digest { .. }) => {
                        seen.map_err(|e| Unread::Failed(describe(&e)))
                    }
                    Some(e) if is_damage(&e) => Err(Unread::Damaged(e)),
                    Some(e) => Err(Unread::Failed(describe(&e))),
                }
            }
            Bytes::File { path, .. } => {
                let failed = |e| Unread::Failed(format!("{}: {e}", path.display()));
                let mut file = File::open(path).map_err(failed)?;
                blob_stream::check(&mut file, &expected, findings, bar).map_err(failed)
            }
        }
    }
}

/// Findings that are kept of each blob.
const FINDINGS_MAX: usize = 1000;
