//! Sending a blob piece by piece, with its digest at the end.
//!
//! The registry keeps what has arrived, so a piece that failed is sent again from where the registry
//! says it ended. The pieces are the caller's: one piece is held in memory until it has arrived.

use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{CONTENT_RANGE, CONTENT_TYPE, HeaderMap, HeaderValue, LOCATION, RANGE};
use reqwest::{Method, Response, StatusCode, Url};

use super::digest::Digest;
use super::error::OciError;
use super::http;
use super::registry::Repository;

/// Size of pieces that suits registries, in bytes: some refuse less than 5 MiB.
pub const PIECE: usize = 8 << 20;

/// How often a piece is sent before its failure counts.
const ATTEMPTS: u32 = 5;

/// A blob that is being sent. Dropped half-way, it is left to the registry's clean-up.
#[derive(Debug)]
pub struct Upload {
    repository: Repository,
    /// Where the next request goes; changes with each answer.
    location: Url,
    /// Bytes that have arrived.
    sent: u64,
    what: String,
}

impl Upload {
    /// From the answer that begins an upload.
    pub(super) fn begun(repository: &Repository, answer: &Response) -> Result<Upload, OciError> {
        let what = repository.what("upload");
        let location = location(answer, &what)?;
        Ok(Upload { repository: repository.clone(), location, sent: 0, what })
    }

    /// Bytes that have arrived.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Sends the next piece.
    pub async fn write(&mut self, mut piece: Bytes) -> Result<(), OciError> {
        let mut attempt = 1;
        while !piece.is_empty() {
            let Err(error) = self.patch(&piece).await else { return Ok(()) };
            let resumable =
                error.retryable() || matches!(error, OciError::Status { status: 416, .. });
            if attempt >= ATTEMPTS || !resumable {
                return Err(error);
            }
            let wait = http::backoff(attempt, error.retry_after().map(|w| w.min(MAX_WAIT)));
            log::info!("{}: at byte {}: {error}; again in {wait:.1?}", self.what, self.sent);
            tokio::time::sleep(wait).await;
            attempt += 1;
            let arrived = self.arrived().await?;
            let taken = arrived
                .checked_sub(self.sent)
                .and_then(|n| usize::try_from(n).ok())
                .filter(|&n| n <= piece.len())
                .ok_or_else(|| OciError::Transport {
                    what: self.what.clone(),
                    reason: format!(
                        "the registry has {arrived} bytes, {} were sent and acknowledged",
                        self.sent
                    ),
                })?;
            self.sent = arrived;
            piece = piece.slice(taken..);
        }
        Ok(())
    }

    async fn patch(&mut self, piece: &Bytes) -> Result<(), OciError> {
        let end = self.sent + piece.len() as u64;
        let mut headers = octets();
        let range = format!("{}-{}", self.sent, end - 1);
        headers.insert(CONTENT_RANGE, HeaderValue::from_str(&range).expect("digits"));
        let answer = self.request(Method::PATCH, self.location.clone(), headers, piece).await?;
        if answer.status() != StatusCode::ACCEPTED && answer.status() != StatusCode::NO_CONTENT {
            return Err(http::status_error(answer, &self.what).await);
        }
        self.location = location(&answer, &self.what)?;
        if let Some(arrived) = range_end(&answer)
            && arrived != end
        {
            return Err(OciError::Protocol {
                what: self.what.clone(),
                reason: format!("{end} bytes were sent, the registry has {arrived}"),
            });
        }
        self.sent = end;
        Ok(())
    }

    /// How many bytes the registry has.
    async fn arrived(&mut self) -> Result<u64, OciError> {
        if self.sent == 0 {
            // Registries say "0-0" for nothing and for one byte. Nothing is lost by a new start.
            let begun = Box::pin(self.repository.upload()).await?;
            self.location = begun.location;
            return Ok(0);
        }
        let (url, headers) = (self.location.clone(), HeaderMap::new());
        let answer = self.request(Method::GET, url, headers, &Bytes::new()).await?;
        if !answer.status().is_success() {
            let error = http::status_error(answer, &self.what).await;
            return Err(OciError::Transport {
                what: self.what.clone(),
                reason: format!("the upload cannot go on: {error}"),
            });
        }
        let arrived = range_end(&answer).ok_or_else(|| OciError::Protocol {
            what: self.what.clone(),
            reason: "the registry does not say how much has arrived".to_owned(),
        })?;
        if let Ok(location) = location(&answer, &self.what) {
            self.location = location;
        }
        Ok(arrived)
    }

    /// Ends the blob: the registry compares all bytes with `digest`.
    pub async fn finish(self, digest: &Digest) -> Result<(), OciError> {
        self.finish_with(Bytes::new(), digest).await
    }

    /// Ends the blob with its last bytes, or all of them.
    pub async fn finish_with(self, rest: Bytes, digest: &Digest) -> Result<(), OciError> {
        let mut url = self.location.clone();
        url.query_pairs_mut().append_pair("digest", digest.as_str());
        let size = self.sent + rest.len() as u64;
        let mut attempt = 1;
        loop {
            let error = match self.request(Method::PUT, url.clone(), octets(), &rest).await {
                Ok(answer) if answer.status() == StatusCode::CREATED => return Ok(()),
                Ok(answer) => http::status_error(answer, &self.what).await,
                Err(e) => e,
            };
            // It may have arrived all the same, now or in an earlier attempt.
            if matches!(self.repository.blob_size(digest).await, Ok(Some(n)) if n == size) {
                return Ok(());
            }
            if attempt >= ATTEMPTS || !error.retryable() {
                return Err(error);
            }
            let wait = http::backoff(attempt, error.retry_after().map(|w| w.min(MAX_WAIT)));
            log::info!("{}: at its end: {error}; again in {wait:.1?}", self.what);
            tokio::time::sleep(wait).await;
            attempt += 1;
        }
    }

    /// Tells the registry that nothing more comes. Registries clean up what is left, too.
    pub async fn cancel(self) {
        let (url, headers) = (self.location.clone(), HeaderMap::new());
        if let Err(e) = self.request(Method::DELETE, url, headers, &Bytes::new()).await {
            log::debug!("{}: cannot cancel: {e}", self.what);
        }
    }

    async fn request(
        &self,
        method: Method,
        url: Url,
        headers: HeaderMap,
        body: &Bytes,
    ) -> Result<Response, OciError> {
        let scope = self.repository.push_scope();
        self.repository.push(&scope, method, url, headers, body.clone(), &self.what).await
    }
}

/// Longest wait that a registry may ask for.
const MAX_WAIT: Duration = Duration::from_secs(60);

fn octets() -> HeaderMap {
    HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"))])
}

/// Where the upload goes on.
fn location(answer: &Response, what: &str) -> Result<Url, OciError> {
    let location = answer.headers().get(LOCATION).and_then(|v| v.to_str().ok());
    let location = location.and_then(|text| answer.url().join(text).ok());
    location.filter(|url| matches!(url.scheme(), "http" | "https")).ok_or_else(|| {
        let reason = "the registry does not say where the upload goes on".to_owned();
        OciError::Protocol { what: what.to_owned(), reason }
    })
}

/// Bytes that have arrived, by the header `Range: 0-LAST`.
fn range_end(answer: &Response) -> Option<u64> {
    let text = answer.headers().get(RANGE)?.to_str().ok()?;
    let text = text.strip_prefix("bytes=").unwrap_or(text);
    let last: u64 = text.split_once('-')?.1.trim().parse().ok()?;
    last.checked_add(1)
}
