//! From an answer to the bytes that were asked for: the one place that reads ranges over HTTP.
//!
//! Nothing of a body is handed on before status and `Content-Range` say that it begins with the byte
//! that was asked for. A server that knows no ranges and sends everything is put up with: what comes
//! before is dropped, what comes after is not waited for.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::stream::{self, BoxStream, StreamExt};
use reqwest::header::{CONTENT_ENCODING, CONTENT_RANGE, HeaderMap};
use reqwest::{Response, StatusCode};

use super::source::Source;
use crate::backend::{BackendError, ByteStream};
use crate::oci::http;
use crate::rafs::id::BlobId;

/// An answer that sends fewer bytes per second than this, taken over the time that a silence may
/// last, counts as silent.
const LEAST_BYTES_PER_SECOND: u64 = 1024;
/// Time for the document that explains an error.
const EXPLANATION_LIMIT: Duration = Duration::from_secs(2);

/// An answer whose head is right.
pub struct Answer {
    response: Response,
    /// Bytes of the body before those that were asked for.
    skip: u64,
    /// Bytes that were asked for.
    len: u64,
    /// Bytes of the whole blob, if the server says so.
    pub size: Option<u64>,
}

impl Answer {
    /// Looks at the head of the answer to a request for `range`, which is not empty, of `blob`.
    pub async fn check(
        source: &Source,
        blob: &BlobId,
        range: &Range<u64>,
        response: Response,
    ) -> Result<Answer, BackendError> {
        let source_name = source.name().to_owned();
        let protocol =
            |reason: String| BackendError::Protocol { source_name: source_name.clone(), reason };
        let out_of_range = |size| BackendError::OutOfRange {
            source_name: source_name.clone(),
            size,
            start: range.start,
            end: range.end,
        };
        let status = response.status();
        if status.is_success()
            && let Some(coding) = response.headers().get(CONTENT_ENCODING)
            && coding != "identity"
        {
            return Err(protocol("the body is encoded, which was not asked for".into()));
        }
        match status.as_u16() {
            206 => {
                let text = response.headers().get(CONTENT_RANGE).and_then(|v| v.to_str().ok());
                let Some((got, size)) = text.and_then(content_range) else {
                    return Err(protocol("part of the blob, without saying which".into()));
                };
                if got.start != range.start || got.end > range.end {
                    let (start, end) = (got.start, got.end);
                    return Err(protocol(format!(
                        "bytes {start}..{end} in place of {}..{}",
                        range.start, range.end
                    )));
                }
                match size {
                    Some(size) if size < range.end => Err(out_of_range(size)),
                    _ => Ok(Answer { response, skip: 0, len: range.end - range.start, size }),
                }
            }
            200 => {
                let size = response.content_length();
                if let Some(size) = size
                    && size < range.end
                {
                    return Err(out_of_range(size));
                }
                source.knows_no_ranges();
                let len = range.end - range.start;
                Ok(Answer { response, skip: range.start, len, size })
            }
            404 | 410 => Err(BackendError::NotFound { blob: *blob, source_name }),
            416 => Err(out_of_range(unsatisfied_size(response.headers()).unwrap_or(0))),
            401 | 403 => {
                let what = format!("HTTP status {}", status.as_u16());
                let why = http::status_error(response, &what);
                let why = tokio::time::timeout(EXPLANATION_LIMIT, why).await;
                let reason = match why {
                    Ok(crate::oci::OciError::Denied { reason, .. }) => reason,
                    _ => what,
                };
                Err(BackendError::Denied { source_name, reason })
            }
            429 => {
                let retry_after = http::retry_after(response.headers());
                Err(BackendError::Throttled { source_name, retry_after })
            }
            status @ (408 | 500..=599) => {
                let retry_after = http::retry_after(response.headers());
                Err(BackendError::Server { source_name, status, retry_after })
            }
            _ => {
                let reason = status.canonical_reason().unwrap_or("unknown");
                Err(protocol(format!("HTTP status {}, {reason}", status.as_u16())))
            }
        }
    }

    /// The bytes that were asked for.
    pub fn stream(self, source: Arc<Source>) -> ByteStream {
        let body = Body {
            pieces: self.response.bytes_stream().boxed(),
            skip: self.skip,
            left: self.len,
            len: self.len,
            window: Duration::ZERO,
            window_bytes: 0,
            source,
        };
        stream::try_unfold(body, Body::next).boxed()
    }
}

/// A body on its way.
struct Body {
    pieces: BoxStream<'static, reqwest::Result<Bytes>>,
    skip: u64,
    /// Bytes still to be handed on.
    left: u64,
    len: u64,
    /// How long the server was waited for since `window_bytes` are counted.
    window: Duration,
    window_bytes: u64,
    source: Arc<Source>,
}

impl Body {
    async fn next(mut self) -> Result<Option<(Bytes, Body)>, BackendError> {
        if self.left == 0 {
            return Ok(None);
        }
        match self.piece().await {
            Ok(piece) => {
                // Nobody may ask for the end once all bytes are there.
                if self.left == 0 {
                    self.source.succeeded();
                    // Takes the end of the body if it is there: then the connection can be used again.
                    let _ = self.pieces.next().now_or_never();
                }
                Ok(Some((piece, self)))
            }
            Err(e) => {
                self.source.failed(&e);
                Err(e)
            }
        }
    }

    async fn piece(&mut self) -> Result<Bytes, BackendError> {
        loop {
            let asked = Instant::now();
            let next = self.pieces.next().await;
            self.window += asked.elapsed();
            let mut piece = match next {
                Some(Ok(piece)) => piece,
                Some(Err(e)) => return Err(self.source.broke(&e)),
                None => {
                    return Err(BackendError::ShortRead {
                        source_name: self.source.name().to_owned(),
                        got: self.len - self.left,
                        want: self.len,
                    });
                }
            };
            self.source.received(piece.len() as u64);
            self.keeps_pace(piece.len() as u64)?;
            let skip = self.skip.min(piece.len() as u64);
            self.skip -= skip;
            drop(piece.split_to(usize::try_from(skip).expect("at most a piece")));
            let take = self.left.min(piece.len() as u64);
            piece.truncate(usize::try_from(take).expect("at most a piece"));
            self.left -= take;
            if !piece.is_empty() {
                return Ok(piece);
            }
        }
    }

    /// A server that sends a byte now and then is never silent, and never done.
    fn keeps_pace(&mut self, bytes: u64) -> Result<(), BackendError> {
        self.window_bytes += bytes;
        let limit = self.source.timeout();
        if self.window < limit {
            return Ok(());
        }
        let got = std::mem::take(&mut self.window_bytes);
        let spent = std::mem::take(&mut self.window);
        let least = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX) / 1000;
        if got < least.max(1).saturating_mul(LEAST_BYTES_PER_SECOND) && got < self.left {
            return Err(BackendError::TooSlow {
                source_name: self.source.name().to_owned(),
                bytes: got,
                within: spent,
            });
        }
        Ok(())
    }
}

/// The range and, if it is told, the size of the whole in `bytes 0-99/1234`.
fn content_range(text: &str) -> Option<(Range<u64>, Option<u64>)> {
    let (range, size) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.trim().split_once('-')?;
    let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
    let end = last.checked_add(1)?;
    let size = match size.trim() {
        "*" => None,
        size => Some(size.parse().ok()?),
    };
    (first < end && size.is_none_or(|size| end <= size)).then_some((first..end, size))
}

/// The size of the whole in `bytes */1234`, which goes with status 416.
fn unsatisfied_size(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_RANGE)?.to_str().ok()?.trim().strip_prefix("bytes */")?.parse().ok()
}

/// A status that may mean that a cached address has expired.
pub fn may_be_expired(status: StatusCode) -> bool {
    matches!(status.as_u16(), 400 | 401 | 403 | 404 | 410)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges_are_read_to_the_letter() {
        let cases = [
            ("bytes 0-99/1234", Some((0..100, Some(1234)))),
            ("bytes 5-5/*", Some((5..6, None))),
            (" bytes 0-0/1 ", Some((0..1, Some(1)))),
            ("bytes 5-4/10", None),
            ("bytes 0-10/10", None),
            ("bytes 0-18446744073709551615/*", None),
            ("bytes */10", None),
            ("items 0-1/2", None),
            ("bytes 0-1", None),
            ("bytes +0-1/2", Some((0..2, Some(2)))),
            ("", None),
        ];
        for (text, want) in cases {
            assert_eq!(content_range(text), want, "{text:?}");
        }
    }
}
