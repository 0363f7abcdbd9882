//! The two images of a comparison, where they are, and their blobs as streams of bytes.
//!
//! Registries are spoken to by futures on a small runtime; the threads that decode and hash read
//! from them through a short queue, so that the network works while they do.

use std::io::{self, Read};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use bytes::Bytes;
use futures_util::StreamExt;
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::mpsc;

use crate::oci::OciError;
use crate::oci::image::Source;
use crate::oci::manifest::{Descriptor, Stored};
use crate::oci::reference::Reference;
use crate::oci::registry::Access;

/// Pieces of a blob that are waiting to be read: at most 1 MiB each.
const QUEUE: usize = 4;

/// What futures run on.
pub(super) fn runtime() -> Result<Runtime> {
    Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the threads for I/O")
}

/// An image that can be read.
#[derive(Clone)]
pub(super) struct Image {
    handle: Handle,
    source: Source,
}

impl Image {
    pub(super) fn open(
        handle: &Handle,
        reference: &Reference,
        access: &Access,
    ) -> Result<Image, OciError> {
        let source = handle.block_on(Source::open(reference, access))?;
        Ok(Image { handle: handle.clone(), source })
    }

    pub(super) fn root(&self) -> Result<Stored, OciError> {
        self.handle.block_on(self.source.root())
    }

    pub(super) fn manifest(&self, descriptor: &Descriptor) -> Result<Stored, OciError> {
        self.handle.block_on(self.source.manifest(descriptor))
    }

    pub(super) fn small_blob(
        &self,
        descriptor: &Descriptor,
        limit: u64,
    ) -> Result<Vec<u8>, OciError> {
        self.handle.block_on(self.source.small_blob(descriptor, limit))
    }

    /// The blob, from its first byte on.
    pub(super) fn blob(&self, descriptor: &Descriptor) -> BlobReader {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let mut stream = self.source.blob(descriptor);
        self.handle.spawn(async move {
            while let Some(piece) = stream.next().await {
                // Nobody reads any more: the rest is not wanted.
                if sender.send(piece).await.is_err() {
                    return;
                }
            }
        });
        BlobReader { receiver, piece: Bytes::new(), failure: Failure::default() }
    }
}

/// Why a blob could not be read to its end, for whoever only sees what a decoder made of it.
#[derive(Clone, Default)]
pub(super) struct Failure(Arc<Mutex<Option<OciError>>>);

impl Failure {
    pub(super) fn get(&self) -> Option<OciError> {
        self.0.lock().expect("nothing panics while it is set").clone()
    }
}

/// Reads a blob. One that is not what its descriptor says ends there, and `failure` says so.
pub(super) struct BlobReader {
    receiver: mpsc::Receiver<Result<Bytes, OciError>>,
    piece: Bytes,
    failure: Failure,
}

impl BlobReader {
    pub(super) fn failure(&self) -> Failure {
        self.failure.clone()
    }
}

impl Read for BlobReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.receiver.blocking_recv() {
                Some(Ok(piece)) => self.piece = piece,
                Some(Err(e)) => {
                    let mismatch = matches!(e, OciError::Digest { .. });
                    *self.failure.0.lock().expect("as above") = Some(e.clone());
                    // All bytes there are have been read; who reads them finds out what they are.
                    return if mismatch { Ok(0) } else { Err(io::Error::other(e)) };
                }
                None => return Ok(0),
            }
        }
        let len = buffer.len().min(self.piece.len());
        buffer[..len].copy_from_slice(&self.piece.split_to(len));
        Ok(len)
    }
}

/// Does `error` say that the image is not what it should be, rather than that it cannot be had? What
/// a manifest names must be there.
pub(super) fn is_damage(error: &OciError) -> bool {
    matches!(
        error,
        OciError::Digest { .. }
            | OciError::Size { .. }
            | OciError::TooLarge { .. }
            | OciError::Invalid { .. }
            | OciError::NotFound { .. }
    )
}
