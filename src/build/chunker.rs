//! Files into chunks, and chunks into runs.
//!
//! A run is the unit of work of the pipeline: some chunks of files that follow each other, about
//! 1 MiB together. [`Source`] is what runs come from: a directory here, a tar stream in `layer`.
//!
//! Of a directory nothing is read here but where the holes of sparse files are: a chunk that lies in
//! one is known to be zeros.

use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{SeekFrom, seek};
use rustix::io::{Errno, pread};

use super::error::BuildError;
use super::scan::Scanned;
use super::source::{Cursor, unchanged};
use super::tree::{DataId, FileId};

/// Bytes of file data in a run, unless one chunk is larger.
pub const RUN_LEN: usize = 1 << 20;
/// Chunks in a run.
pub const RUN_PIECES: usize = 256;

/// One chunk of a file on its way through the pipeline.
#[derive(Debug)]
pub struct Piece {
    pub file: DataId,
    /// Bytes from the start of the file.
    pub offset: u64,
    /// Bytes: the chunk size, or less at the end of the file.
    pub len: u32,
    /// In a hole of the file: zeros, and not in the run's data.
    pub hole: bool,
    /// Start of the chunk in the run's data. Set when it has been read, as are the next two.
    pub start: usize,
    pub digest: [u8; 32],
    pub crc32c: u32,
    /// Set when the chunk has been admitted.
    pub stored: Stored,
}

impl Piece {
    /// A chunk of `len` bytes, whose data is not in the run yet.
    pub fn new(file: DataId, offset: u64, len: u32, hole: bool) -> Piece {
        Piece {
            file,
            offset,
            len,
            hole,
            start: 0,
            digest: [0; 32],
            crc32c: 0,
            stored: Stored::Duplicate,
        }
    }
}

/// What a chunk puts into the blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stored {
    /// Nothing: the blob has it already.
    Duplicate,
    /// Its bytes.
    Plain,
    /// This range of the run's packed bytes.
    Packed(Range<usize>),
}

/// Chunks that follow each other, with their bytes. Runs are reused, with the memory they own.
#[derive(Default)]
pub struct Run {
    /// Position in the order of all runs, from 0.
    pub number: u64,
    pub pieces: Vec<Piece>,
    /// Bytes read from files, one chunk after the other.
    pub data: Vec<u8>,
    /// What the chunks became by compression.
    pub packed: Vec<u8>,
    /// What went wrong with this run; reported when its turn comes.
    pub failure: Option<BuildError>,
}

impl Run {
    /// Makes it an empty run.
    pub fn clear(&mut self, number: u64) {
        self.number = number;
        self.pieces.clear();
        self.packed.clear();
        self.failure = None;
    }

    /// Bytes of the chunks that have to be read.
    fn data_len(&self) -> usize {
        self.pieces.iter().filter(|p| !p.hole).map(|p| p.len as usize).sum()
    }
}

/// Where runs come from. It is asked by one thread.
pub trait Source: Send {
    /// What fills the runs with data, one for each worker.
    type Loader: Loader + Send;

    fn loader(&self) -> Self::Loader;

    /// Makes `run` the next run; false, and no run, behind the last chunk. A failure is left in the
    /// run, and reported when its turn comes.
    fn fill(&mut self, run: &mut Run) -> bool;

    /// Number of runs so far.
    fn runs(&self) -> u64;
}

/// Fills runs with data.
pub trait Loader {
    /// Reads the chunks of `run` that are no holes, and says where each starts.
    fn load(&mut self, run: &mut Run) -> Result<(), BuildError>;
}

/// Cuts the files of a directory into runs, one after the other.
pub struct Chunker<'t> {
    scanned: &'t Scanned,
    files: std::vec::IntoIter<FileId>,
    chunk_size: u32,
    cursor: Cursor,
    current: Option<Current>,
    next_run: u64,
}

/// The file that is being cut.
struct Current {
    file: FileId,
    /// Bytes that are in runs already.
    offset: u64,
    holes: Option<Holes>,
}

impl<'t> Chunker<'t> {
    /// Cuts `files` in this order into chunks of `chunk_size` bytes.
    pub fn new(scanned: &'t Scanned, files: Vec<FileId>, chunk_size: u32) -> Chunker<'t> {
        Chunker {
            scanned,
            files: files.into_iter(),
            chunk_size,
            cursor: Cursor::default(),
            current: None,
            next_run: 0,
        }
    }

    fn add_pieces(&mut self, run: &mut Run) -> Result<(), BuildError> {
        let mut data_len = run.data_len();
        loop {
            let current = match &mut self.current {
                Some(current) => current,
                none => {
                    let Some(file) = self.files.next() else { return Ok(()) };
                    none.insert(Current::open(self.scanned, &mut self.cursor, file)?)
                }
            };
            let file = self.scanned.tree.file(current.file);
            while current.offset < file.size {
                let end = file.size.min(current.offset + u64::from(self.chunk_size));
                let hole = match &mut current.holes {
                    Some(holes) => {
                        holes.contain(current.offset..end).map_err(|e| BuildError::Source {
                            action: "look for holes in",
                            path: self.scanned.path(file.first),
                            source: e.into(),
                        })?
                    }
                    None => false,
                };
                let len = u32::try_from(end - current.offset).expect("at most a chunk");
                let to_read = if hole { 0 } else { len as usize };
                let full = data_len > 0 && data_len + to_read > RUN_LEN;
                if full || run.pieces.len() == RUN_PIECES {
                    return Ok(());
                }
                data_len += to_read;
                run.pieces.push(Piece::new(file.data, current.offset, len, hole));
                current.offset = end;
            }
            if let Some(holes) = &current.holes {
                unchanged(self.scanned, current.file, holes.fd.as_fd())?;
            }
            self.current = None;
        }
    }
}

impl<'t> Source for Chunker<'t> {
    type Loader = FileLoader<'t>;

    fn loader(&self) -> FileLoader<'t> {
        FileLoader { scanned: self.scanned, cursor: Cursor::default() }
    }

    fn fill(&mut self, run: &mut Run) -> bool {
        run.clear(self.next_run);
        match self.add_pieces(run) {
            Ok(()) if run.pieces.is_empty() => return false,
            Ok(()) => {}
            Err(e) => run.failure = Some(e),
        }
        self.next_run += 1;
        true
    }

    fn runs(&self) -> u64 {
        self.next_run
    }
}

/// Reads chunks of the files of a directory.
pub struct FileLoader<'t> {
    scanned: &'t Scanned,
    cursor: Cursor,
}

impl Loader for FileLoader<'_> {
    fn load(&mut self, run: &mut Run) -> Result<(), BuildError> {
        let Run { pieces, data, .. } = run;
        let mut start = 0;
        for pieces in pieces.chunk_by_mut(|a, b| a.file == b.file) {
            // Files of a directory have their data in their own order.
            let id = self.scanned.tree.file_at(pieces[0].file);
            let path = || self.scanned.path(self.scanned.tree.file(id).first);
            let mut fd = None;
            for piece in pieces.iter_mut().filter(|piece| !piece.hole) {
                let fd = match &mut fd {
                    Some(fd) => fd,
                    none => none.insert(self.cursor.file(self.scanned, id)?),
                };
                let end = start + piece.len as usize;
                if data.len() < end {
                    data.resize(end, 0);
                }
                let bytes = &mut data[start..end];
                let mut done = 0;
                while done < bytes.len() {
                    match pread(&*fd, &mut bytes[done..], piece.offset + done as u64) {
                        Ok(0) => {
                            return Err(BuildError::Changed {
                                path: path(),
                                what: "it became shorter",
                            });
                        }
                        Ok(n) => done += n,
                        Err(Errno::INTR) => {}
                        Err(e) => {
                            return Err(BuildError::Source {
                                action: "read",
                                path: path(),
                                source: e.into(),
                            });
                        }
                    }
                }
                piece.start = start;
                start = end;
            }
            if let Some(fd) = fd {
                unchanged(self.scanned, id, fd.as_fd())?;
            }
        }
        Ok(())
    }
}

impl Current {
    fn open(scanned: &Scanned, cursor: &mut Cursor, id: FileId) -> Result<Current, BuildError> {
        let holes = if scanned.source(id).may_have_holes {
            Some(Holes { fd: cursor.file(scanned, id)?, data: 0..0 })
        } else {
            None
        };
        Ok(Current { file: id, offset: 0, holes })
    }
}

/// Where a file has data, asked for from its start to its end.
struct Holes {
    fd: OwnedFd,
    /// The last range of data that was asked for.
    data: Range<u64>,
}

impl Holes {
    /// True if `range` (bytes, not empty, never before an earlier one) has no data.
    fn contain(&mut self, range: Range<u64>) -> Result<bool, Errno> {
        if self.data.end <= range.start {
            self.data = match seek(&self.fd, SeekFrom::Data(range.start)) {
                Ok(start) => start..seek(&self.fd, SeekFrom::Hole(start))?,
                // Nothing but a hole up to the end of the file.
                Err(Errno::NXIO) => u64::MAX..u64::MAX,
                // The file system does not tell.
                Err(Errno::INVAL | Errno::OPNOTSUPP) => 0..u64::MAX,
                Err(e) => return Err(e),
            };
        }
        Ok(self.data.start >= range.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::scan::Marks;
    use crate::build::whiteout::WhiteoutSpec;
    use indicatif::ProgressBar;
    use std::fs;
    use std::os::unix::fs::FileExt;

    /// (file name, offset, length, hole) of each chunk, run by run.
    fn cut(dir: &std::path::Path, chunk_size: u32) -> Vec<Vec<(String, u64, u32, bool)>> {
        let hidden = ProgressBar::hidden();
        let scanned = Scanned::scan(dir, WhiteoutSpec::Oci, Marks::Drop, &hidden).unwrap();
        let tree = &scanned.tree;
        let mut chunker = Chunker::new(&scanned, tree.file_ids().collect(), chunk_size);
        let mut runs = Vec::new();
        let mut run = Run::default();
        while chunker.fill(&mut run) {
            assert!(run.failure.is_none());
            assert_eq!(run.number, runs.len() as u64);
            let name = |p: &Piece| {
                let node = tree.node(tree.file(tree.file_at(p.file)).first);
                String::from_utf8(node.name.to_vec()).unwrap()
            };
            runs.push(run.pieces.iter().map(|p| (name(p), p.offset, p.len, p.hole)).collect());
        }
        runs
    }

    #[test]
    fn small_files_share_a_run_and_large_ones_span_runs() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a"), [1; 5000]).unwrap();
        fs::write(dir.path().join("b"), []).unwrap();
        fs::write(dir.path().join("c"), vec![2; RUN_LEN]).unwrap();
        let runs = cut(dir.path(), 1 << 19);
        let piece = |name: &str, offset, len| (name.to_owned(), offset, len, false);
        let want =
            [vec![piece("a", 0, 5000), piece("c", 0, 1 << 19)], vec![piece("c", 1 << 19, 1 << 19)]];
        assert_eq!(runs, want);
        // A chunk larger than a run is a run.
        fs::write(dir.path().join("c"), vec![2; 3 * RUN_LEN]).unwrap();
        let runs = cut(dir.path(), 1 << 21);
        let want = [
            vec![piece("a", 0, 5000)],
            vec![piece("c", 0, 1 << 21)],
            vec![piece("c", 1 << 21, 1 << 20)],
        ];
        assert_eq!(runs, want);
    }

    #[test]
    fn chunks_without_data_are_holes() {
        let dir = tempfile::tempdir().unwrap();
        let file = fs::File::create(dir.path().join("s")).unwrap();
        file.set_len(10 << 20).unwrap();
        file.write_all_at(b"island", (3 << 20) - 2).unwrap();
        file.sync_all().unwrap();
        let holes: Vec<bool> =
            cut(dir.path(), 1 << 20).into_iter().flatten().map(|(.., hole)| hole).collect();
        let data: Vec<usize> = (0..holes.len()).filter(|&i| !holes[i]).collect();
        assert_eq!((holes.len(), data), (10, vec![2, 3]));
    }
}
