//! A stored layer as the tar that it is, its digests taken on the way.

use std::io::{self, BufReader, Read};

use sha2::{Digest as _, Sha256};

use super::images::Image;
use super::progress::Bar;
use crate::oci::Digest;
use crate::oci::OciError;
use crate::oci::digest::Hasher;
use crate::oci::manifest::{Descriptor, LayerPacking};

/// Largest window of a zstd stream: 2 to this power, 128 MiB.
const ZSTD_WINDOW_LOG: u32 = 27;
/// Bytes that are decompressed at a time.
const BUFFER: usize = 256 << 10;

/// What was read, and what it turned out to be.
pub(super) struct Layer<T> {
    /// What the reader of the tar made of it.
    pub result: T,
    /// The digest and size of what is stored.
    pub digest: Digest,
    pub size: u64,
    /// SHA-256 of the tar, as far as it was read.
    pub diff_id: Digest,
    /// Why not all of it could be read.
    pub failure: Option<OciError>,
}

/// Reads the layer that `descriptor` names to its end; `read` is handed the tar.
pub(super) fn read<T>(
    image: &Image,
    descriptor: &Descriptor,
    packing: LayerPacking,
    bar: &Bar<'_>,
    read: impl FnOnce(&mut dyn Read) -> T,
) -> Layer<T> {
    let blob = image.blob(descriptor);
    let failure = blob.failure();
    let mut stored = Stored { inner: blob, hash: descriptor.digest.hasher(), size: 0, bar };
    let mut diff_id = Sha256::new();
    let result = {
        let mut tar = Tar { inner: decoder(&mut stored, packing), hash: &mut diff_id };
        read(&mut tar)
    };
    // What a decoder leaves behind its end belongs to the blob, too.
    let rest = io::copy(&mut stored, &mut io::sink());
    // Another digest is seen from the bytes, which have all been read.
    let read = |e: &OciError| rest.is_ok() && matches!(e, OciError::Digest { .. });
    let failure = failure.get().filter(|e| !read(e));
    Layer {
        result,
        digest: stored.hash.finish(),
        size: stored.size,
        diff_id: Digest::from_sha256(diff_id.finalize().into()),
        failure,
    }
}

fn decoder<'a>(stored: &'a mut dyn Read, packing: LayerPacking) -> Box<dyn Read + 'a> {
    match packing {
        LayerPacking::Tar => Box::new(stored),
        LayerPacking::TarGzip => {
            let stored = BufReader::with_capacity(BUFFER, stored);
            Box::new(flate2::bufread::MultiGzDecoder::new(stored))
        }
        LayerPacking::TarZstd => {
            let opened = zstd::Decoder::new(stored).and_then(|mut decoder| {
                decoder.window_log_max(ZSTD_WINDOW_LOG)?;
                Ok(decoder)
            });
            match opened {
                Ok(decoder) => Box::new(decoder),
                Err(e) => Box::new(Broken(Some(e))),
            }
        }
    }
}

/// What cannot be read at all.
struct Broken(Option<io::Error>);

impl Read for Broken {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Err(self.0.take().unwrap_or_else(|| io::ErrorKind::InvalidData.into()))
    }
}

/// The bytes as they are stored.
struct Stored<'a, R> {
    inner: R,
    hash: Hasher,
    size: u64,
    bar: &'a Bar<'a>,
}

impl<R: Read> Read for Stored<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.inner.read(buffer)?;
        self.hash.update(&buffer[..got]);
        self.size += got as u64;
        self.bar.inc(got as u64);
        Ok(got)
    }
}

/// The bytes of the tar.
struct Tar<'a> {
    inner: Box<dyn Read + 'a>,
    hash: &'a mut Sha256,
}

impl Read for Tar<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.inner.read(buffer)?;
        self.hash.update(&buffer[..got]);
        Ok(got)
    }
}
