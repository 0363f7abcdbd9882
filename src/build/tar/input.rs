//! A layer as it is stored: plain, gzip or zstd, told apart by the first bytes.

use std::io::{self, BufRead, BufReader, Read};

use sha2::{Digest, Sha256};

use crate::build::BuildError;

/// How a layer is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    Plain,
    Gzip,
    Zstd,
}

/// Largest window of a zstd stream, 2^27 bytes (128 MiB), is what the decoder may allocate.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;
/// Magic numbers; those of the last two are refused by name.
const MAGIC: [(&[u8], Result<Compression, &str>); 5] = [
    (b"\x1f\x8b", Ok(Compression::Gzip)),
    (b"\x28\xb5\x2f\xfd", Ok(Compression::Zstd)),
    (b"BZh", Err("bzip2")),
    (b"\xfd7zXZ\0", Err("xz")),
    (b"\x04\x22\x4d\x18", Err("lz4")),
];

/// The uncompressed stream of a layer, which is hashed and counted on its way.
pub struct Input<'r> {
    stream: Box<dyn Read + Send + 'r>,
    compression: Compression,
    hash: Sha256,
    len: u64,
}

impl<'r> Input<'r> {
    /// Looks at the first bytes of `reader`.
    ///
    /// # Errors
    ///
    /// If it cannot be read, or is compressed in a way that no layer may be.
    pub fn new(reader: impl Read + Send + 'r) -> Result<Input<'r>, BuildError> {
        let fail = |source| BuildError::ReadLayer { offset: 0, source };
        let mut head = Vec::new();
        let mut reader = reader;
        Read::by_ref(&mut reader).take(6).read_to_end(&mut head).map_err(fail)?;
        let skippable = matches!(&head[..], [0x50..=0x5F, 0x2A, 0x4D, 0x18, ..]);
        let known = MAGIC.iter().find(|(magic, _)| head.starts_with(magic));
        let compression = match known {
            _ if skippable => Compression::Zstd,
            None => Compression::Plain,
            Some((_, Ok(compression))) => *compression,
            Some((_, Err(name))) => {
                return Err(BuildError::Layer {
                    offset: None,
                    reason: format!("compressed with {name}; a layer is plain, gzip or zstd"),
                });
            }
        };
        let reader = BufReader::with_capacity(128 << 10, io::Cursor::new(head).chain(reader));
        let stream: Box<dyn Read + Send + 'r> = match compression {
            Compression::Plain => Box::new(reader),
            Compression::Gzip => Box::new(BufReader::with_capacity(
                64 << 10,
                flate2::bufread::MultiGzDecoder::new(reader),
            )),
            Compression::Zstd => {
                Box::new(BufReader::with_capacity(64 << 10, zstd_stream(reader).map_err(fail)?))
            }
        };
        Ok(Input { stream, compression, hash: Sha256::new(), len: 0 })
    }

    pub fn compression(&self) -> Compression {
        self.compression
    }

    /// SHA-256 and length of what was read: once all is read, the diff id of the layer and the bytes
    /// of its tar.
    pub fn finish(self) -> ([u8; 32], u64) {
        (self.hash.finalize().into(), self.len)
    }
}

fn zstd_stream<'r, R: BufRead + Send + 'r>(reader: R) -> io::Result<impl Read + Send + 'r> {
    let mut decoder = zstd::stream::read::Decoder::with_buffer(reader)?;
    decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
    Ok(decoder)
}

impl Read for Input<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.stream.read(buf)?;
        self.hash.update(&buf[..n]);
        self.len += n as u64;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn read(bytes: &[u8]) -> io::Result<(Compression, Vec<u8>)> {
        let mut input = Input::new(bytes).map_err(io::Error::other)?;
        let mut out = Vec::new();
        input.read_to_end(&mut out)?;
        let compression = input.compression();
        assert_eq!(input.finish(), (Sha256::digest(&out).into(), out.len() as u64));
        Ok((compression, out))
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        out.write_all(bytes).unwrap();
        out.finish().unwrap()
    }

    #[test]
    fn compression_is_told_by_the_first_bytes() {
        let zstd = |bytes: &[u8]| zstd::encode_all(bytes, 1).unwrap();
        let skip = b"\x50\x2a\x4d\x18\x03\0\0\0abc".to_vec();
        // (what, bytes, compression, content)
        let cases = [
            ("empty", vec![], Compression::Plain, &b""[..]),
            ("short", b"\x1f".to_vec(), Compression::Plain, b"\x1f"),
            ("plain", b"plain".to_vec(), Compression::Plain, b"plain"),
            ("gzip", gzip(b"gz"), Compression::Gzip, b"gz"),
            ("two members", [gzip(b"one"), gzip(b"two")].concat(), Compression::Gzip, b"onetwo"),
            ("zstd", zstd(b"zs"), Compression::Zstd, b"zs"),
            (
                "two frames",
                [zstd(b"1"), skip.clone(), zstd(b"2")].concat(),
                Compression::Zstd,
                b"12",
            ),
            ("skippable frame first", [skip, zstd(b"x")].concat(), Compression::Zstd, b"x"),
        ];
        for (what, bytes, compression, content) in cases {
            assert_eq!(read(&bytes).unwrap(), (compression, content.to_vec()), "{what}");
        }
    }

    #[test]
    fn a_stream_cut_short_is_an_error() {
        let long = vec![7; 100_000];
        for bytes in [gzip(&long), zstd::encode_all(&long[..], 1).unwrap()] {
            for cut in [8, bytes.len() / 2, bytes.len() - 1] {
                assert!(read(&bytes[..cut]).is_err(), "{cut} of {} bytes", bytes.len());
            }
            assert_eq!(read(&bytes).unwrap().1, long);
        }
        assert!(read(&[gzip(b"a"), b"garbage".to_vec()].concat()).is_err());
        for (bytes, name) in [(&b"BZh91AY"[..], "bzip2"), (b"\xfd7zXZ\0\0", "xz")] {
            assert!(read(bytes).unwrap_err().to_string().contains(name));
        }
    }
}
