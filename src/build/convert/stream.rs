//! Between the builder, which reads and writes on threads, and registries, which are asked by futures.

use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{Buf, Bytes, BytesMut};
use futures_util::StreamExt;
use indicatif::ProgressBar;
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use crate::oci::OciError;
use crate::oci::image::{Target, TargetUpload};
use crate::oci::registry::ByteStream;
use crate::oci::upload::PIECE;

/// Where a failure waits that an [`io::Error`] only describes.
#[derive(Clone, Debug, Default)]
pub struct Failure(Arc<Mutex<Option<OciError>>>);

impl Failure {
    fn set(&self, error: OciError) -> io::Error {
        let text = error.to_string();
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        io::Error::other(text)
    }

    pub fn take(&self) -> Option<OciError> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Reads a stream on a thread. Holds one piece of it.
pub struct StreamReader {
    handle: Handle,
    stream: ByteStream,
    piece: Bytes,
    ended: bool,
    failure: Failure,
    bars: Bars,
}

/// What shows the progress of one layer: its own bar, and that of all.
#[derive(Clone, Debug)]
pub struct Bars {
    pub own: ProgressBar,
    pub total: ProgressBar,
}

impl Bars {
    /// As many bytes more have been read.
    pub fn inc(&self, bytes: u64) {
        self.own.inc(bytes);
        self.total.inc(bytes);
    }

    /// The layer is begun anew.
    pub fn restart(&self) {
        self.total.dec(self.own.position());
        self.own.set_position(0);
    }
}

impl StreamReader {
    pub fn new(handle: Handle, stream: ByteStream, bars: Bars) -> StreamReader {
        let failure = Failure::default();
        StreamReader { handle, stream, piece: Bytes::new(), ended: false, failure, bars }
    }

    /// Why a read failed.
    pub fn failure(&self) -> Failure {
        self.failure.clone()
    }

    /// Reads what is left, so that all has been compared with the digest.
    pub fn drain(&mut self) -> io::Result<()> {
        io::copy(self, &mut io::sink()).map(drop)
    }
}

impl Read for StreamReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() && !self.ended {
            match self.handle.block_on(self.stream.next()) {
                Some(Ok(piece)) => {
                    self.bars.inc(piece.len() as u64);
                    self.piece = piece;
                }
                Some(Err(e)) => {
                    self.ended = true;
                    return Err(self.failure.set(e));
                }
                None => self.ended = true,
            }
        }
        let n = self.piece.len().min(buf.len());
        self.piece.copy_to_slice(&mut buf[..n]);
        Ok(n)
    }
}

/// Writes to an upload on a thread. Three pieces are in memory at most: one is filled, one waits, one
/// is on its way.
pub struct UploadWriter {
    buffer: BytesMut,
    pieces: mpsc::Sender<Bytes>,
}

/// The other end of an [`UploadWriter`]: the bytes so far, to be ended or given up.
pub type Sending = tokio::task::JoinHandle<Result<TargetUpload, OciError>>;

impl UploadWriter {
    /// Begins an upload to `target`.
    pub fn start(handle: &Handle, target: Target) -> (UploadWriter, Sending) {
        let (pieces, mut waiting) = mpsc::channel::<Bytes>(1);
        let sending = handle.spawn(async move {
            let mut upload = target.upload().await?;
            while let Some(piece) = waiting.recv().await {
                upload.write(piece).await?;
            }
            Ok(upload)
        });
        (UploadWriter { buffer: BytesMut::new(), pieces }, sending)
    }

    /// Sends what is left.
    pub fn finish(mut self) -> io::Result<()> {
        if self.buffer.is_empty() { Ok(()) } else { self.send() }
    }

    fn send(&mut self) -> io::Result<()> {
        let piece = std::mem::take(&mut self.buffer).freeze();
        // Fails only if the upload has failed, which knows why.
        self.pieces.blocking_send(piece).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl Write for UploadWriter {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if self.buffer.capacity() == 0 {
            self.buffer.reserve(PIECE);
        }
        let n = buf.len().min(PIECE - self.buffer.len());
        self.buffer.extend_from_slice(&buf[..n]);
        if self.buffer.len() == PIECE {
            self.send()?;
        }
        Ok(n)
    }

    /// Does nothing: a registry takes only large pieces well.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
