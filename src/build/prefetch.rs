//! Which files come first in the blob, and what a daemon fetches when it mounts the image.
//!
//! Patterns are absolute paths, one on each line. One below an earlier one, or without a file, has
//! no effect. Symbolic links are not followed: a pattern names a path of the image.

use std::io::{self, BufRead};

use super::tree::{FileId, Kind, NodeId, Tree};

/// What the image says about early fetching.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum PrefetchPolicy {
    /// Reads patterns from standard input; the files come first in the blob, and the bootstrap
    /// lists the paths.
    Fs,
    /// Reads patterns too, but only the order in the blob follows them.
    Blob,
    /// No patterns: files are stored in the order of the tree.
    None,
}

/// Patterns, in the order given, each as its path components.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Patterns(Vec<Vec<Vec<u8>>>);

impl Patterns {
    /// Reads patterns up to the end of `input`; says what is odd in the log.
    pub fn read(input: impl BufRead) -> io::Result<Patterns> {
        let mut patterns: Vec<Vec<Vec<u8>>> = Vec::new();
        for line in input.split(b'\n') {
            let line = line?;
            if line.trim_ascii().is_empty() {
                continue;
            }
            if !line.starts_with(b"/") {
                log::warn!("prefetch pattern {}: not an absolute path", line.escape_ascii());
                continue;
            }
            let parts: Vec<Vec<u8>> = line
                .split(|&b| b == b'/')
                .filter(|part| !part.is_empty())
                .map(<[u8]>::to_vec)
                .collect();
            if patterns.iter().any(|earlier| parts.starts_with(earlier)) {
                log::info!("prefetch pattern {}: named already", line.escape_ascii());
                continue;
            }
            patterns.push(parts);
        }
        Ok(Patterns(patterns))
    }

    /// The paths of the tree that are named, in the order of the patterns; says in the log which are
    /// not there.
    pub fn find(&self, tree: &Tree) -> Vec<NodeId> {
        let find = |parts: &Vec<Vec<u8>>| {
            let found = find(tree, parts);
            if found.is_none() {
                let shown = parts.join(&b'/').escape_ascii().to_string();
                log::warn!("prefetch pattern /{shown}: no such path in the image");
            }
            found
        };
        self.0.iter().filter_map(find).collect()
    }

    /// The same without a word, for a tree that is not the image yet.
    pub fn find_quietly(&self, tree: &Tree) -> Vec<NodeId> {
        self.0.iter().filter_map(|parts| find(tree, parts)).collect()
    }
}

fn find(tree: &Tree, parts: &[Vec<u8>]) -> Option<NodeId> {
    parts.iter().try_fold(NodeId::ROOT, |dir, name| tree.child(dir, name))
}

/// The order in which files are stored: what is at or below `first`, then the rest of the tree.
pub fn data_order(tree: &Tree, first: &[NodeId]) -> Vec<FileId> {
    let mut order = Vec::with_capacity(tree.files().len());
    let mut placed = vec![false; tree.files().len()];
    let mut place = |file: FileId| {
        if !std::mem::replace(&mut placed[file.index()], true) {
            order.push(file);
        }
    };
    for &id in first {
        for id in std::iter::once(id).chain(tree.below(id)) {
            if let Kind::File(file) = tree.node(id).kind {
                place(file);
            }
        }
    }
    tree.file_ids().for_each(place);
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::scan::{Marks, Scanned};
    use crate::build::whiteout::WhiteoutSpec;
    use indicatif::ProgressBar;
    use std::fs;

    #[test]
    fn patterns_order_the_data_and_later_ones_below_earlier_ones_have_no_effect() {
        let dir = tempfile::tempdir().unwrap();
        for path in ["d/e", "z"] {
            fs::create_dir_all(dir.path().join(path)).unwrap();
        }
        for path in ["a", "b", "d/c", "d/e/f", "z/y"] {
            fs::write(dir.path().join(path), path).unwrap();
        }
        fs::hard_link(dir.path().join("z/y"), dir.path().join("c")).unwrap();
        let hidden = ProgressBar::hidden();
        let tree = Scanned::scan(dir.path(), WhiteoutSpec::Oci, Marks::Drop, &hidden).unwrap().tree;
        // (patterns, paths found, order of the files)
        let cases: [(&str, &[&str], &[&str]); 6] = [
            ("", &[], &["a", "b", "c", "d/c", "d/e/f"]),
            ("/\n", &[""], &["a", "b", "c", "d/c", "d/e/f"]),
            ("/d/\n", &["d"], &["d/c", "d/e/f", "a", "b", "c"]),
            ("/d//e\n/d\n/d/e/f", &["d/e", "d"], &["d/e/f", "d/c", "a", "b", "c"]),
            ("/z/y\n\n/b\n/b\n/none\nrelative\n", &["z/y", "b"], &["c", "b", "a", "d/c", "d/e/f"]),
            ("/b/../a\n/a/\n", &["a"], &["a", "b", "c", "d/c", "d/e/f"]),
        ];
        for (patterns, found, order) in cases {
            let show = |id| tree.path(id).to_str().unwrap().to_owned();
            let first = Patterns::read(patterns.as_bytes()).unwrap().find(&tree);
            assert_eq!(first.iter().map(|&id| show(id)).collect::<Vec<_>>(), found, "{patterns:?}");
            let files = data_order(&tree, &first);
            let shown: Vec<_> = files.iter().map(|&f| show(tree.file(f).first)).collect();
            assert_eq!(shown, order, "{patterns:?}");
        }
    }
}
