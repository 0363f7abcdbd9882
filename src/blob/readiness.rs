//! Bits for the chunks of a blob: which of them this process has verified.
//!
//! A bit is set only after the chunk's bytes are in the cache file and have matched their digest,
//! so a set bit may be trusted without reading the chunk. Any number of threads may query and set
//! bits; none of them blocks. What *other* processes have put in the cache file is in the chunk
//! map ([`cache_file`](super::cache_file)) and only tells where looking is worthwhile.

use std::sync::atomic::{AtomicU64, Ordering};

/// A bit for each chunk of a blob, all clear at first.
pub struct Bitmap {
    words: Box<[AtomicU64]>,
    bits: u32,
}

impl Bitmap {
    pub fn new(bits: u32) -> Self {
        let words = usize::try_from(bits.div_ceil(64)).expect("at most 1 << 18 words");
        Bitmap { words: (0..words).map(|_| AtomicU64::new(0)).collect(), bits }
    }

    /// False for a bit that does not exist.
    pub fn get(&self, bit: u32) -> bool {
        self.word(bit).is_some_and(|(word, mask)| word.load(Ordering::Acquire) & mask != 0)
    }

    /// Does nothing to a bit that does not exist.
    pub fn set(&self, bit: u32) {
        if let Some((word, mask)) = self.word(bit) {
            word.fetch_or(mask, Ordering::Release);
        }
    }

    pub fn clear(&self, bit: u32) {
        if let Some((word, mask)) = self.word(bit) {
            word.fetch_and(!mask, Ordering::Release);
        }
    }

    /// Clears the bit; was it set?
    pub fn take(&self, bit: u32) -> bool {
        self.word(bit)
            .is_some_and(|(word, mask)| word.fetch_and(!mask, Ordering::AcqRel) & mask != 0)
    }

    /// Number of set bits.
    pub fn count(&self) -> u32 {
        self.words.iter().map(|word| word.load(Ordering::Relaxed).count_ones()).sum()
    }

    fn word(&self, bit: u32) -> Option<(&AtomicU64, u64)> {
        if bit >= self.bits {
            return None;
        }
        let word = self.words.get(usize::try_from(bit / 64).ok()?)?;
        Some((word, 1 << (bit % 64)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bit_is_what_was_last_done_to_it() {
        let bitmap = Bitmap::new(130);
        for bit in [0, 63, 64, 129] {
            assert!(!bitmap.get(bit));
            bitmap.set(bit);
            assert!(bitmap.get(bit));
        }
        assert_eq!(bitmap.count(), 4);
        bitmap.clear(64);
        assert!(!bitmap.get(64) && bitmap.get(63) && bitmap.get(129));
        for outside in [130, 191, 192, u32::MAX] {
            bitmap.set(outside);
            assert!(!bitmap.get(outside));
        }
        assert_eq!(bitmap.count(), 3);
    }
}
