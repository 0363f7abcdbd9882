//! One layer, from the source's registry to the target's.
//!
//! The stream of the source is decoded, cut, compressed and sent while it arrives. The digest of the
//! packed blob is known with its last byte, and told then.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use indicatif::ProgressBar;
use tokio::runtime::Handle;

use super::Context;
use super::stream::{Bars, StreamReader, UploadWriter};
use crate::build::BuildError;
use crate::build::layer::{Counts, PackedLayer, pack};
use crate::build::tar::Compression;
use crate::oci::http::backoff;
use crate::oci::manifest::Descriptor;
use crate::oci::{Digest, OciError};

/// How often a layer is begun before its failure counts. Single requests have been repeated by then.
const ATTEMPTS: u32 = 3;

/// A layer that is in the target.
#[derive(Debug)]
pub struct Layer {
    /// Digest and size of the packed blob.
    pub digest: Digest,
    pub size: u64,
    /// The layer's bootstrap.
    pub bootstrap: Vec<u8>,
    /// Its part of the bootstrap layer; None without data.
    pub meta: Option<Vec<u8>>,
    /// How it came to be there; None if it was found there.
    pub packed: Option<Packing>,
    pub seconds: f64,
}

/// What was seen of a layer that was packed.
#[derive(Debug)]
pub struct Packing {
    pub diff_id: Digest,
    pub tar_size: u64,
    pub compression: Compression,
    pub counts: Counts,
}

/// A failure with what is behind it, if that is a registry's.
struct Failed {
    error: anyhow::Error,
    retryable: bool,
    retry_after: Option<Duration>,
}

impl Failed {
    fn of(cause: OciError) -> Failed {
        let (retryable, retry_after) = (cause.retryable(), cause.retry_after());
        Failed { error: cause.into(), retryable, retry_after }
    }
}

/// Converts the layer `source`.
pub async fn convert(context: &Context, source: &Descriptor, bars: &Bars) -> Result<Layer> {
    let mut attempt = 1;
    loop {
        let begun = Instant::now();
        let failed = match once(context, source, bars.clone()).await {
            Ok(packed) => {
                let PackedLayer {
                    id,
                    size,
                    diff_id,
                    tar_size,
                    compression,
                    bootstrap,
                    meta,
                    counts,
                } = packed;
                let digest = format!("sha256:{id}").parse().expect("an id of 64 digits");
                let diff_id = Digest::from_sha256(diff_id);
                let packed = Some(Packing { diff_id, tar_size, compression, counts });
                let seconds = begun.elapsed().as_secs_f64();
                return Ok(Layer { digest, size, bootstrap, meta, packed, seconds });
            }
            Err(failed) => failed,
        };
        if attempt >= ATTEMPTS || !failed.retryable {
            return Err(failed.error).with_context(|| format!("layer {}", source.digest));
        }
        let wait = backoff(attempt, failed.retry_after.map(|w| w.min(Duration::from_secs(60))));
        log::warn!("layer {}: {:#}; begun anew in {wait:.1?}", source.digest, failed.error);
        tokio::time::sleep(wait).await;
        bars.restart();
        attempt += 1;
    }
}

async fn once(context: &Context, source: &Descriptor, bars: Bars) -> Result<PackedLayer, Failed> {
    let handle = Handle::current();
    let mut reader = StreamReader::new(handle.clone(), context.source.blob(source), bars);
    let (mut writer, sending) = UploadWriter::start(&handle, context.target.clone());
    let reading = reader.failure();
    let (settings, dictionary) = (context.settings, context.dictionary.clone());
    let packing = tokio::task::spawn_blocking(move || {
        let hidden = ProgressBar::hidden();
        let dictionary = dictionary.as_deref().map(|d| &d.chunks);
        let packed = pack(&mut reader, settings, dictionary, &mut writer, &hidden)?;
        reader.drain().map_err(|source| BuildError::ReadLayer { offset: 0, source })?;
        writer.finish().map_err(|source| BuildError::WriteBlob { source })?;
        Ok::<_, BuildError>(packed)
    });
    let packed = packing.await.expect("packing does not panic");
    let sent = sending.await.expect("sending does not panic");
    match (packed, sent) {
        (Ok(packed), Ok(upload)) => {
            let digest = format!("sha256:{}", packed.id).parse().expect("an id of 64 digits");
            upload.finish(&digest).await.map_err(Failed::of)?;
            Ok(packed)
        }
        // The builder only knows that nobody takes its bytes any more.
        (_, Err(e)) => Err(Failed::of(e)),
        (Err(e), Ok(upload)) => {
            upload.cancel().await;
            Err(match reading.take() {
                Some(cause) => Failed::of(cause),
                None => Failed { error: e.into(), retryable: false, retry_after: None },
            })
        }
    }
}
