//! Reads, hashes, deduplicates, compresses and stores all chunks, on all cores, in a fixed order.
//!
//! A run goes round: the source (see `chunker`) cuts it, a worker reads and hashes it, the caller's thread admits
//! its chunks in the order of the runs, a worker compresses the new ones, the writer stores them in
//! the order of the runs, and the empty run goes back to the source. What is admitted and stored
//! never depends on which worker was faster.
//!
//! Memory is bounded by the number of runs, 2 for each worker and 2 more: each holds at most
//! max(1 MiB, chunk size) of file data and as much compressed. A worker has room for one compressed
//! chunk more, and its codec's tables. Nothing else grows with the size of files but the table of
//! chunks (see `dedup`) and 4 bytes for each chunk of each file.
//!
//! A failure is reported when its run's turn comes, so the same tree gives the same message.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::OnceLock;
use std::thread;

use crossbeam_channel::{Receiver, Sender, bounded, select};
use indicatif::ProgressBar;

use super::blob_file::BlobWriter;
use super::chunker::{Loader, Run, Source, Stored};
use super::dedup::Chunks;
use super::error::BuildError;
use super::tree::FileChunks;
use crate::rafs::codec::{Compressor, Digester};

/// How chunks are made.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    pub compressor: Compressor,
    pub digester: Digester,
    /// Bytes, a power of two.
    pub chunk_size: u32,
    /// Workers, at least 1.
    pub threads: usize,
}

/// What the caller's thread hears from the others.
enum Event {
    /// A worker has read and hashed this run.
    Read(Run),
    /// There are this many runs.
    Cut(u64),
    /// The writer has failed, or a thread has panicked: no more will come.
    Broken,
}

/// Tells the caller's thread when the thread that holds it panics, which must not hang the build.
struct PanicAlarm(Sender<Event>);

impl Drop for PanicAlarm {
    fn drop(&mut self) {
        if thread::panicking() {
            // Fails only if the caller's thread has given up already.
            self.0.send(Event::Broken).ok();
        }
    }
}

enum Job {
    Read(Run),
    Compress(Run),
}

/// What [`store`] gives back.
pub struct Stores<'d, S, W> {
    pub source: S,
    pub chunks: Chunks<'d>,
    pub files: FileChunks,
    pub blob: BlobWriter<W>,
}

/// Stores everything that comes from `source`, with `chunks` being known; `progress` counts bytes.
pub fn store<'d, S: Source, W: Write + Send>(
    source: S,
    settings: Settings,
    mut chunks: Chunks<'d>,
    blob: BlobWriter<W>,
    progress: &ProgressBar,
) -> Result<Stores<'d, S, W>, BuildError> {
    let runs = settings.threads * 2 + 2;
    // Every channel has room for all runs, so no send ever waits.
    let (job_tx, job_rx) = bounded(runs);
    let (event_tx, event_rx) = bounded(runs + settings.threads + 3);
    let (write_tx, write_rx) = bounded(runs);
    let (free_tx, free_rx) = bounded(runs);
    let (stop_tx, stop_rx) = bounded::<()>(0);
    for _ in 0..runs {
        free_tx.send(Run::default()).expect("there is room and a receiver");
    }
    let zeros = Zeros::new(settings);
    thread::scope(|scope| {
        for _ in 0..settings.threads {
            let (jobs, events, written) = (job_rx.clone(), event_tx.clone(), write_tx.clone());
            let zeros = &zeros;
            let loader = source.loader();
            scope.spawn(move || {
                let _alarm = PanicAlarm(events.clone());
                Worker::new(loader, settings, zeros).work(&jobs, &events, &written);
            });
        }
        drop(write_tx);
        let (jobs, events) = (job_tx.clone(), event_tx.clone());
        let cutter = scope.spawn(move || {
            let _alarm = PanicAlarm(events.clone());
            let mut source = source;
            cut(&mut source, &free_rx, &stop_rx, &jobs, &events);
            source
        });
        let writer = scope.spawn(move || {
            let alarm = PanicAlarm(event_tx);
            let result = write(blob, &write_rx, &free_tx);
            if result.is_err() {
                // Fails only if the caller's thread has given up, and then it knows better.
                alarm.0.send(Event::Broken).ok();
            }
            result
        });
        let admitted = admit(&mut chunks, &event_rx, &job_tx, progress);
        drop((job_tx, stop_tx));
        let written = writer.join().expect("the writer does not panic");
        let files = match admitted {
            Ok(Some(files)) => files,
            Ok(None) => return Err(written.err().expect("otherwise a thread has panicked")),
            Err(e) => return Err(e),
        };
        let blob = written?;
        let source = cutter.join().expect("the cutter does not panic");
        Ok(Stores { source, chunks, files, blob })
    })
}

/// Cuts files into runs until there are no more, or nobody wants them.
fn cut(
    source: &mut impl Source,
    free: &Receiver<Run>,
    stop: &Receiver<()>,
    jobs: &Sender<Job>,
    events: &Sender<Event>,
) {
    loop {
        let mut run = select! {
            recv(free) -> run => match run { Ok(run) => run, Err(_) => return },
            recv(stop) -> _ => return,
        };
        if !source.fill(&mut run) {
            events.send(Event::Cut(source.runs())).ok();
            return;
        }
        // A send fails only if the build has failed and the receivers are gone.
        let sent = if run.failure.is_some() {
            events.send(Event::Read(run)).is_ok()
        } else {
            jobs.send(Job::Read(run)).is_ok()
        };
        if !sent {
            return;
        }
    }
}

/// Numbers the chunks of all runs in their order. `None` if another thread has failed.
fn admit(
    chunks: &mut Chunks<'_>,
    events: &Receiver<Event>,
    jobs: &Sender<Job>,
    progress: &ProgressBar,
) -> Result<Option<FileChunks>, BuildError> {
    let mut files = FileChunks::default();
    let mut early = BTreeMap::new();
    let (mut next, mut total) = (0, None);
    while total != Some(next) {
        match events.recv().expect("the workers wait for jobs as long as we hold the sender") {
            Event::Read(run) => drop(early.insert(run.number, run)),
            Event::Cut(runs) => total = Some(runs),
            Event::Broken => return Ok(None),
        }
        while let Some(mut run) = early.remove(&next) {
            if let Some(failure) = run.failure.take() {
                return Err(failure);
            }
            next += 1;
            let mut bytes = 0;
            for piece in &mut run.pieces {
                let (addr, new) =
                    chunks.admit(piece.digest, piece.len, piece.crc32c, piece.offset)?;
                piece.stored = if new { Stored::Plain } else { Stored::Duplicate };
                if piece.offset == 0 {
                    files.begin(piece.file);
                }
                files.push(addr);
                bytes += u64::from(piece.len);
            }
            progress.inc(bytes);
            jobs.send(Job::Compress(run)).expect("the workers wait for jobs");
        }
    }
    Ok(Some(files))
}

/// Stores the new chunks of all runs in their order.
fn write<W: Write>(
    mut blob: BlobWriter<W>,
    runs: &Receiver<Run>,
    free: &Sender<Run>,
) -> Result<BlobWriter<W>, BuildError> {
    let mut early = BTreeMap::new();
    let mut next = 0;
    for run in runs {
        early.insert(run.number, run);
        while let Some(mut run) = early.remove(&next) {
            if let Some(failure) = run.failure.take() {
                return Err(failure);
            }
            next += 1;
            for piece in &run.pieces {
                match &piece.stored {
                    Stored::Duplicate => {}
                    Stored::Plain => {
                        blob.append(&run.data[piece.start..piece.start + piece.len as usize])?;
                    }
                    Stored::Packed(range) => blob.append(&run.packed[range.clone()])?,
                }
            }
            // The chunker may have ended: then the run is not needed.
            free.send(run).ok();
        }
    }
    Ok(blob)
}

/// Chunks of zeros, made when the first hole is met.
struct Zeros {
    settings: Settings,
    full: OnceLock<(Vec<u8>, [u8; 32], u32)>,
}

impl Zeros {
    fn new(settings: Settings) -> Zeros {
        Zeros { settings, full: OnceLock::new() }
    }

    fn full(&self) -> &(Vec<u8>, [u8; 32], u32) {
        self.full.get_or_init(|| {
            let bytes = vec![0; self.settings.chunk_size as usize];
            let (digest, crc32c) = (self.settings.digester.digest(&bytes), crc32c::crc32c(&bytes));
            (bytes, digest, crc32c)
        })
    }

    fn bytes(&self, len: u32) -> &[u8] {
        &self.full().0[..len as usize]
    }

    fn digest(&self, len: u32) -> ([u8; 32], u32) {
        if len == self.settings.chunk_size {
            return (self.full().1, self.full().2);
        }
        let bytes = self.bytes(len);
        (self.settings.digester.digest(bytes), crc32c::crc32c(bytes))
    }
}

/// One thread that reads and compresses.
struct Worker<'t, L> {
    settings: Settings,
    zeros: &'t Zeros,
    loader: L,
    packer: Packer,
}

impl<'t, L: Loader> Worker<'t, L> {
    fn new(loader: L, settings: Settings, zeros: &'t Zeros) -> Worker<'t, L> {
        Worker { settings, zeros, loader, packer: Packer::new(settings.compressor) }
    }

    fn work(&mut self, jobs: &Receiver<Job>, events: &Sender<Event>, written: &Sender<Run>) {
        for job in jobs {
            // A send fails only if the build has failed and the receiver is gone.
            let sent = match job {
                Job::Read(mut run) => {
                    if let Err(e) = self.read(&mut run) {
                        run.failure = Some(e);
                    }
                    events.send(Event::Read(run)).is_ok()
                }
                Job::Compress(mut run) => {
                    if let Err(e) = self.compress(&mut run) {
                        run.failure = Some(e);
                    }
                    written.send(run).is_ok()
                }
            };
            if !sent {
                return;
            }
        }
    }

    /// Reads and digests the chunks of a run.
    fn read(&mut self, run: &mut Run) -> Result<(), BuildError> {
        self.loader.load(run)?;
        for piece in &mut run.pieces {
            if piece.hole {
                (piece.digest, piece.crc32c) = self.zeros.digest(piece.len);
                continue;
            }
            let bytes = &run.data[piece.start..piece.start + piece.len as usize];
            piece.digest = self.settings.digester.digest(bytes);
            piece.crc32c = crc32c::crc32c(bytes);
        }
        Ok(())
    }

    /// Compresses the new chunks of a run where that makes them smaller.
    fn compress(&mut self, run: &mut Run) -> Result<(), BuildError> {
        for piece in run.pieces.iter_mut().filter(|p| p.stored != Stored::Duplicate) {
            let bytes = if piece.hole {
                self.zeros.bytes(piece.len)
            } else {
                &run.data[piece.start..piece.start + piece.len as usize]
            };
            let start = run.packed.len();
            if let Some(packed) = self.packer.pack(bytes)? {
                run.packed.extend_from_slice(packed);
            } else if piece.hole {
                run.packed.extend_from_slice(bytes);
            } else {
                continue;
            }
            piece.stored = Stored::Packed(start..run.packed.len());
        }
        Ok(())
    }
}

/// A compressor with the memory it needs again and again.
struct Packer {
    codec: Codec,
    out: Vec<u8>,
}

enum Codec {
    None,
    Lz4,
    Zstd(Option<zstd::bulk::Compressor<'static>>),
}

impl Packer {
    /// Gzip is a codec of converted images only: here it stands for none.
    fn new(compressor: Compressor) -> Packer {
        let codec = match compressor {
            Compressor::None | Compressor::Gzip => Codec::None,
            Compressor::Lz4Block => Codec::Lz4,
            Compressor::Zstd => Codec::Zstd(None),
        };
        Packer { codec, out: Vec::new() }
    }

    /// The compressed form, or `None` if it would not be smaller.
    fn pack(&mut self, bytes: &[u8]) -> Result<Option<&[u8]>, BuildError> {
        let len = match &mut self.codec {
            Codec::None => return Ok(None),
            Codec::Lz4 => {
                let fail = |source| BuildError::Compress { codec: "LZ4", source };
                let bound = lz4::block::compress_bound(bytes.len()).map_err(fail)?;
                self.out.resize(bound.max(self.out.len()), 0);
                lz4::block::compress_to_buffer(bytes, None, false, &mut self.out).map_err(fail)?
            }
            Codec::Zstd(context) => {
                let fail = |source| BuildError::Compress { codec: "zstd", source };
                let context = match context {
                    Some(context) => context,
                    none => none.insert(
                        zstd::bulk::Compressor::new(zstd::DEFAULT_COMPRESSION_LEVEL)
                            .map_err(fail)?,
                    ),
                };
                let bound = zstd::zstd_safe::compress_bound(bytes.len());
                self.out.resize(bound.max(self.out.len()), 0);
                context.compress_to_buffer(bytes, self.out.as_mut_slice()).map_err(fail)?
            }
        };
        Ok((len < bytes.len()).then(|| &self.out[..len]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::chunker::Chunker;
    use crate::build::output::Output;
    use crate::build::scan::{Marks, Scanned};
    use crate::build::whiteout::WhiteoutSpec;
    use std::fs;
    use std::path::Path;

    fn scan(dir: &Path) -> Scanned {
        Scanned::scan(dir, WhiteoutSpec::Oci, Marks::Drop, &ProgressBar::hidden()).unwrap()
    }

    fn store_all(scanned: &Scanned, out: &Path, threads: usize) -> Result<FileChunks, BuildError> {
        let settings = Settings {
            compressor: Compressor::Zstd,
            digester: Digester::Blake3,
            chunk_size: 4096,
            threads,
        };
        let blob = BlobWriter::new(Output::create(out)?);
        let order = scanned.tree.file_ids().collect();
        let source = Chunker::new(scanned, order, settings.chunk_size);
        store(source, settings, Chunks::default(), blob, &ProgressBar::hidden()).map(|s| s.files)
    }

    #[test]
    fn a_file_that_changes_after_the_scan_is_named() {
        type Change = fn(&Path);
        let cases: [(&str, Change, &str); 7] = [
            ("nothing", |_| (), ""),
            ("grows", |f| fs::write(f, [1; 9001]).unwrap(), "its size is another"),
            ("shrinks", |f| fs::write(f, [1; 8999]).unwrap(), "its size is another"),
            ("is rewritten", |f| fs::write(f, [2; 9000]).unwrap(), "it was written to"),
            (
                "is replaced",
                |f| {
                    fs::write(f.with_extension("new"), [1; 9000]).unwrap();
                    fs::rename(f.with_extension("new"), f).unwrap();
                },
                "another file has its name",
            ),
            ("is removed", |f| fs::remove_file(f).unwrap(), "cannot open"),
            (
                "becomes a fifo",
                |f| {
                    fs::remove_file(f).unwrap();
                    let mode = rustix::fs::Mode::from_raw_mode(0o644);
                    let kind = rustix::fs::FileType::Fifo;
                    rustix::fs::mknodat(rustix::fs::CWD, f, kind, mode, 0).unwrap();
                },
                "changed while",
            ),
        ];
        for sparse in [false, true] {
            for (name, change, message) in cases {
                let dir = tempfile::tempdir().unwrap();
                let file = dir.path().join("d/file");
                fs::create_dir(dir.path().join("d")).unwrap();
                if sparse {
                    fs::File::create(&file).unwrap().set_len(9000).unwrap();
                } else {
                    fs::write(&file, [1; 9000]).unwrap();
                }
                // Times of files have the resolution of the kernel's clock ticks.
                let past = fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH);
                fs::File::options().write(true).open(&file).unwrap().set_times(past).unwrap();
                let tree = scan(dir.path());
                change(&file);
                let out = tempfile::tempdir().unwrap();
                match store_all(&tree, out.path(), 2) {
                    Ok(_) => assert_eq!(message, "", "a file that {name}"),
                    Err(e) => {
                        let error = e.to_string();
                        assert!(!message.is_empty() && error.contains(message), "{name}: {error}");
                        assert!(error.contains("d/file"), "{name}: {error}");
                    }
                }
            }
        }
    }

    #[test]
    fn the_first_failure_in_the_order_of_the_tree_is_the_one_reported() {
        let dir = tempfile::tempdir().unwrap();
        for i in 0..1000 {
            fs::write(dir.path().join(format!("f{i:03}")), vec![0; i]).unwrap();
        }
        let tree = scan(dir.path());
        for i in (300..1000).step_by(50) {
            fs::remove_file(dir.path().join(format!("f{i:03}"))).unwrap();
        }
        for threads in [1, 2, 7] {
            let out = tempfile::tempdir().unwrap();
            let error = store_all(&tree, out.path(), threads).unwrap_err().to_string();
            assert!(error.contains("f300"), "{threads} threads: {error}");
            assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0, "a half blob stays behind");
        }
    }
}
