//! Which missing chunks are fetched with one request: adjacent ones, so that nothing is fetched
//! that was not asked for, and nothing twice.

use std::ops::Range;

/// Most stored bytes of one request; a single larger chunk is let through.
const MAX_STORED: u64 = 4 << 20;
/// Most uncompressed bytes of one request, as all of them may have to be held at once.
const MAX_UNCOMPRESSED: u64 = 16 << 20;

/// What the plan needs to know of a chunk (or batch).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Bytes of the blob file.
    pub stored: Range<u64>,
    /// Bytes after decompression.
    pub uncompressed: u64,
}

/// Cuts `pieces`, which are in the order of their stored bytes, into requests: lengths of runs.
pub fn requests(pieces: &[Piece]) -> Vec<usize> {
    let mut runs = Vec::new();
    let mut run: Option<(usize, Piece)> = None;
    for piece in pieces {
        if let Some((len, whole)) = &mut run {
            let adjacent = piece.stored.start == whole.stored.end;
            let stored = piece.stored.end.saturating_sub(whole.stored.start);
            let uncompressed = whole.uncompressed + piece.uncompressed;
            if adjacent && stored <= MAX_STORED && uncompressed <= MAX_UNCOMPRESSED {
                *len += 1;
                whole.stored.end = piece.stored.end;
                whole.uncompressed = uncompressed;
                continue;
            }
            runs.push(*len);
        }
        run = Some((1, piece.clone()));
    }
    runs.extend(run.map(|(len, _)| len));
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adjacent_pieces_become_one_request_up_to_a_bound() {
        const MIB: u64 = 1 << 20;
        let piece =
            |start: u64, len: u64, uncompressed| Piece { stored: start..start + len, uncompressed };
        // (what, pieces, runs)
        let cases = [
            ("nothing", vec![], vec![]),
            ("one", vec![piece(0, 10, 20)], vec![1]),
            ("adjacent", vec![piece(0, 10, 20), piece(10, 5, 9), piece(15, 1, 1)], vec![3]),
            ("a gap: fetched already", vec![piece(0, 10, 20), piece(11, 5, 9)], vec![1, 1]),
            (
                "too many stored bytes",
                (0..6).map(|i| piece(i * MIB, MIB, MIB)).collect(),
                vec![4, 2],
            ),
            (
                "too many uncompressed bytes",
                (0..5).map(|i| piece(i * 100, 100, 6 * MIB)).collect(),
                vec![2, 2, 1],
            ),
            ("one too large alone", vec![piece(0, 9 * MIB, MIB), piece(9 * MIB, 1, 1)], vec![1, 1]),
        ];
        for (what, pieces, want) in cases {
            assert_eq!(requests(&pieces), want, "{what}");
        }
    }
}
