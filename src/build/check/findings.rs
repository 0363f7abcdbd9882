//! What is wrong with one image, and what could not be looked at, bounded in memory.
//!
//! Both are kept apart, so that "nothing wrong" is never said of what was not seen.

use std::collections::HashMap;
use std::fmt::Display;

use crate::build::image_file::printable;
use crate::rafs::Bootstrap;
use crate::rafs::id::{BlobIndex, ChunkIndex};

#[derive(Debug, Default)]
pub(super) struct Findings {
    /// Problems that are kept; the others are counted.
    pub limit: usize,
    pub problems: Vec<Problem>,
    pub problem_count: u64,
    /// Why something could not be looked at.
    pub undecided: Vec<String>,
    /// What was looked at.
    pub paths: u64,
    pub chunks: u64,
    pub blobs: u64,
}

#[derive(Debug)]
pub(super) struct Problem {
    pub place: String,
    pub what: String,
    /// The chunk that it concerns, to name a file that has it.
    pub chunk: Option<(BlobIndex, ChunkIndex)>,
    /// The two values, where a value is what is wrong.
    pub values: Option<Values>,
}

/// A value that is not what others say it must be.
#[derive(Debug)]
pub(super) struct Values {
    pub field: &'static str,
    pub expected: String,
    pub found: String,
}

impl Findings {
    pub(super) fn problem(&mut self, place: impl Display, what: impl Display) {
        let (place, what) = (place.to_string(), what.to_string());
        self.add(Problem { place, what, chunk: None, values: None });
    }

    /// `what` says the same as the values, for a line of text.
    pub(super) fn mismatch(
        &mut self,
        place: impl Display,
        field: &'static str,
        expected: impl Display,
        found: impl Display,
        what: impl Display,
    ) {
        let values = Values { field, expected: expected.to_string(), found: found.to_string() };
        let (place, what) = (place.to_string(), what.to_string());
        self.add(Problem { place, what, chunk: None, values: Some(values) });
    }

    pub(super) fn add(&mut self, problem: Problem) {
        self.problem_count += 1;
        if self.problems.len() < self.limit {
            self.problems.push(problem);
        }
    }

    pub(super) fn undecided(&mut self, what: impl Display) {
        self.undecided.push(what.to_string());
    }

    /// Takes over what was found in `other`, which is about the same image.
    pub(super) fn merge(&mut self, other: Findings) {
        let kept = other.problems.len() as u64;
        for problem in other.problems {
            self.add(problem);
        }
        self.problem_count += other.problem_count - kept;
        self.undecided.extend(other.undecided);
        self.paths += other.paths;
        self.chunks += other.chunks;
        self.blobs += other.blobs;
    }

    /// Takes over what was found in `inner`, which is a part of `place`.
    pub(super) fn absorb(&mut self, place: &str, inner: Findings) {
        let kept = inner.problems.len() as u64;
        for mut problem in inner.problems {
            problem.place = format!("{place}, {}", problem.place);
            // Numbers of blobs there are not those here.
            problem.chunk = None;
            self.add(problem);
        }
        self.problem_count += inner.problem_count - kept;
        let undecided = inner.undecided.into_iter();
        self.undecided.extend(undecided.map(|what| format!("{place}: {what}")));
    }

    /// Adds to each problem of a chunk the first path that has this chunk.
    pub(super) fn name_files(&mut self, image: &Bootstrap) {
        let mut wanted: HashMap<_, Option<String>> =
            self.problems.iter().filter_map(|p| p.chunk).map(|chunk| (chunk, None)).collect();
        let mut left = wanted.len();
        for item in image.walk().flatten() {
            if left == 0 {
                break;
            }
            for addr in (0..item.inode.chunk_count()).filter_map(|i| item.inode.chunk(i).ok()) {
                let Some(blob) = addr.blob() else { continue };
                if let Some(path @ None) = wanted.get_mut(&(blob, ChunkIndex(addr.chunk_index()))) {
                    *path = Some(printable(&item.path()));
                    left -= 1;
                }
            }
        }
        for problem in &mut self.problems {
            if let Some(path) = problem.chunk.and_then(|chunk| wanted.get(&chunk)) {
                let path = path.as_deref().unwrap_or("no file of this image");
                problem.what = format!("{} (part of {path})", problem.what);
            }
        }
    }
}

/// An error with its causes, on one line.
pub(super) fn describe(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}
