//! Compressors and digesters, by the numbers and flags the format gives them.
//!
//! Decompression never writes or allocates more than the caller asked for, whatever the input says.

use std::cell::RefCell;
use std::io::Read;

use super::layout::ImageFlags;

/// How a chunk or a table is compressed; numbered as in the blob table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Compressor {
    None = 0,
    /// A raw LZ4 block: no frame, no size.
    Lz4Block = 1,
    /// One gzip member.
    Gzip = 2,
    /// One zstd frame.
    Zstd = 3,
}

/// How chunks are digested; numbered as in the blob table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Digester {
    Blake3 = 0,
    Sha256 = 1,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CodecError {
    #[error("{compressor:?} data is damaged: {reason}")]
    Damaged { compressor: Compressor, reason: String },
    #[error("{compressor:?} data yields {got} bytes instead of {want}")]
    WrongSize { compressor: Compressor, got: usize, want: usize },
}

impl Compressor {
    /// `None` if the format gives `number` no meaning.
    pub fn from_number(number: u32) -> Option<Self> {
        [Compressor::None, Compressor::Lz4Block, Compressor::Gzip, Compressor::Zstd]
            .into_iter()
            .find(|&c| c as u32 == number)
    }

    /// The name users know: that of the command line's options.
    pub fn name(self) -> &'static str {
        match self {
            Compressor::None => "none",
            Compressor::Lz4Block => "lz4_block",
            Compressor::Gzip => "gzip",
            Compressor::Zstd => "zstd",
        }
    }

    /// The flag of the super block that names this compressor.
    pub fn image_flag(self) -> ImageFlags {
        match self {
            Compressor::None => ImageFlags::COMPRESSION_NONE,
            Compressor::Lz4Block => ImageFlags::COMPRESSION_LZ4,
            Compressor::Gzip => ImageFlags::COMPRESSION_GZIP,
            Compressor::Zstd => ImageFlags::COMPRESSION_ZSTD,
        }
    }

    /// Fills `out` exactly from `input`; anything else is an error.
    pub fn decompress(self, input: &[u8], out: &mut [u8]) -> Result<(), CodecError> {
        let damaged = |reason: String| CodecError::Damaged { compressor: self, reason };
        let got = match self {
            Compressor::None => {
                if input.len() == out.len() {
                    out.copy_from_slice(input);
                }
                input.len()
            }
            Compressor::Lz4Block => {
                lz4_flex::block::decompress_into(input, out).map_err(|e| damaged(e.to_string()))?
            }
            Compressor::Zstd => zstd_into(input, out).map_err(|e| damaged(e.to_string()))?,
            Compressor::Gzip => {
                let mut stream = flate2::read::GzDecoder::new(input);
                let mut got = 0;
                while got < out.len() {
                    match stream.read(&mut out[got..]).map_err(|e| damaged(e.to_string()))? {
                        0 => break,
                        n => got += n,
                    }
                }
                // One byte more tells a longer member from one that ends here, and checks its CRC.
                got + stream.read(&mut [0]).map_err(|e| damaged(e.to_string()))?
            }
        };
        if got != out.len() {
            return Err(CodecError::WrongSize { compressor: self, got, want: out.len() });
        }
        Ok(())
    }

    /// The compressed form, or `None` where it would not be strictly smaller: the format then
    /// stores the bytes as they are. Deterministic for a given version of the codec's library.
    pub fn compress(self, input: &[u8]) -> std::io::Result<Option<Vec<u8>>> {
        let out = match self {
            Compressor::None => return Ok(None),
            Compressor::Lz4Block => lz4::block::compress(input, None, false)?,
            Compressor::Zstd => zstd::bulk::compress(input, zstd::DEFAULT_COMPRESSION_LEVEL)?,
            Compressor::Gzip => {
                let mut stream =
                    flate2::read::GzEncoder::new(input, flate2::Compression::default());
                let mut out = Vec::new();
                stream.read_to_end(&mut out)?;
                out
            }
        };
        Ok((out.len() < input.len()).then_some(out))
    }
}

/// Decompresses with a context that each thread keeps: making one takes as long as a small chunk does.
fn zstd_into(input: &[u8], out: &mut [u8]) -> std::io::Result<usize> {
    thread_local! {
        static CONTEXT: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
    }
    CONTEXT.with_borrow_mut(|kept| {
        let mut context = kept.take().map_or_else(zstd::bulk::Decompressor::new, Ok)?;
        let got = context.decompress_to_buffer(input, out);
        *kept = Some(context);
        got
    })
}

impl Digester {
    /// `None` if the format gives `number` no meaning.
    pub fn from_number(number: u32) -> Option<Self> {
        [Digester::Blake3, Digester::Sha256].into_iter().find(|&d| d as u32 == number)
    }

    /// The name users know: that of the command line's options.
    pub fn name(self) -> &'static str {
        match self {
            Digester::Blake3 => "blake3",
            Digester::Sha256 => "sha256",
        }
    }

    /// The flag of the super block that names this digester.
    pub fn image_flag(self) -> ImageFlags {
        match self {
            Digester::Blake3 => ImageFlags::HASH_BLAKE3,
            Digester::Sha256 => ImageFlags::HASH_SHA256,
        }
    }

    pub fn digest(self, data: &[u8]) -> [u8; 32] {
        use sha2::Digest;
        match self {
            Digester::Blake3 => *blake3::hash(data).as_bytes(),
            Digester::Sha256 => sha2::Sha256::digest(data).into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_codec_restores_what_it_compressed_and_refuses_another_size() {
        let data = b"one two three ".repeat(100);
        for compressor in [Compressor::Lz4Block, Compressor::Gzip, Compressor::Zstd] {
            let stored = compressor.compress(&data).unwrap().expect("repetitive data shrinks");
            let mut out = vec![0; data.len()];
            compressor.decompress(&stored, &mut out).unwrap();
            assert_eq!(out, data);
            for wrong in [data.len() - 1, data.len() + 1] {
                compressor.decompress(&stored, &mut vec![0; wrong]).unwrap_err();
            }
            assert!(compressor.compress(b"x").unwrap().is_none(), "{compressor:?} must not grow");
        }
    }

    #[test]
    fn digests_are_those_of_the_standards() {
        assert_eq!(
            hex::encode(Digester::Sha256.digest(b"abc")),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_eq!(
            hex::encode(Digester::Blake3.digest(b"")),
            "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
        );
    }
}
