//! Which missing chunks are fetched with one request: adjacent ones, so that nothing is fetched
//! that was not asked for, and nothing twice. Chunks that are there already are not bridged: requests
//! run side by side, so a gap costs no round trip, and each chunk is served once to a host.

use std::ops::Range;

/// Most stored bytes of one request, whatever the link; a single larger chunk is let through.
const MAX_STORED: u64 = 4 << 20;
/// A request of so many stored bytes is not cut, however slow the link.
const MIN_STORED: u64 = 512 << 10;
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

/// Most stored bytes of one request over a link whose latency times bandwidth is `product` bytes (0:
/// not known, or a source of this host). Twice as many: what an answer takes to begin, it may take
/// to come, and twice that keeps two requests side by side busy.
pub fn request_size(product: u64) -> u64 {
    if product == 0 { MAX_STORED } else { (2 * product).clamp(MIN_STORED, MAX_STORED) }
}

/// Cuts `pieces`, which are in the order of their stored bytes, into requests of at most `size` stored
/// bytes: lengths of runs.
pub fn requests(pieces: &[Piece], size: u64) -> Vec<usize> {
    let mut runs = Vec::new();
    let mut run: Option<(usize, Piece)> = None;
    for piece in pieces {
        if let Some((len, whole)) = &mut run {
            let adjacent = piece.stored.start == whole.stored.end;
            let stored = piece.stored.end.saturating_sub(whole.stored.start);
            let uncompressed = whole.uncompressed + piece.uncompressed;
            if adjacent && stored <= size && uncompressed <= MAX_UNCOMPRESSED {
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
    fn requests_are_as_large_as_the_link_is_long() {
        const MIB: u64 = 1 << 20;
        // (product, size)
        let cases = [(0, 4 * MIB), (10 << 10, MIB / 2), (MIB, 2 * MIB), (100 * MIB, 4 * MIB)];
        for (product, size) in cases {
            assert_eq!(request_size(product), size, "{product}");
        }
        let pieces: Vec<_> =
            (0..4).map(|i| Piece { stored: i * MIB..(i + 1) * MIB, uncompressed: MIB }).collect();
        assert_eq!(requests(&pieces, request_size(MIB)), [2, 2]);
        assert_eq!(requests(&pieces, request_size(1)), [1, 1, 1, 1]);
    }

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
            assert_eq!(requests(&pieces, request_size(0)), want, "{what}");
        }
    }
}
