//! Which images of `guest-tests/golden` are read, and where they are.

use std::path::{Path, PathBuf};

/// Case, bootstrap, tree of every image that this program reads; a case with a second bootstrap in
/// the same folder comes again under it.
pub const READABLE: [(&str, &str, &str); 13] = [
    ("v6-zstd", "bootstrap", "tree.json"),
    ("v6-lz4", "bootstrap", "tree.json"),
    ("v6-none", "bootstrap", "tree.json"),
    ("v6-sha256", "bootstrap", "tree.json"),
    ("v6-blake3", "bootstrap", "tree.json"),
    ("v6-batch", "bootstrap", "tree.json"),
    ("v6-two-layers", "bootstrap", "tree.json"),
    ("v6-two-layers", "lower-bootstrap", "lower-tree.json"),
    ("v6-chunkdict", "bootstrap", "tree.json"),
    ("v6-chunkdict", "dict-bootstrap", "dict-tree.json"),
    ("v6-oci-packed", "bootstrap", "tree.json"),
    ("v6-merged", "bootstrap", "tree.json"),
    ("v6-empty", "bootstrap", "tree.json"),
];

/// Folder of one case.
pub fn golden(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("guest-tests/golden").join(case)
}
