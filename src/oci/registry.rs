//! One repository of a registry: the distribution API, version 2.
//!
//! Requests carry what [`Authenticator`] gives for them, follow redirects without it, and are repeated
//! after failures that may pass. A blob is read as a stream that goes on where it broke off.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use reqwest::header::{ACCEPT, CONTENT_RANGE, CONTENT_TYPE, HeaderMap, HeaderValue, RANGE};
use reqwest::{Client, Method, RequestBuilder, Response, StatusCode, Url};

use super::auth::{Authenticator, Credentials, Scope};
use super::digest::{Digest, Hasher};
use super::docker_config;
use super::error::OciError;
use super::http::{self, HttpOptions, MAX_REDIRECTS, ProxyChoice};
use super::manifest::{
    ACCEPT as MANIFEST_TYPES, Descriptor, Document, Index, MAX_MANIFEST, OCI_INDEX, Stored, verify,
};
use super::reference::{Name, is_loopback};
use super::upload::Upload;

/// Content in pieces, in order. It has been checked when the stream ends without an error.
pub type ByteStream = BoxStream<'static, Result<Bytes, OciError>>;

/// How often a request is sent before its failure counts.
const ATTEMPTS: u32 = 5;

/// A server that asks to wait longer is not waited for.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);

/// How registries are reached.
#[derive(Clone, Debug, Default)]
pub struct Access {
    pub http: HttpOptions,
    /// None: those that the user keeps for the registry (see `docker_config`).
    pub credentials: Option<Credentials>,
}

/// A repository. Cheap to clone; clones share connections and tokens.
#[derive(Clone, Debug)]
pub struct Repository {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    client: Client,
    /// Without a limit for an answer's start, which comes after a body that may take long to send.
    sender: Client,
    /// `https://host/v2/`
    base: Url,
    name: Name,
    auth: Authenticator,
}

impl Repository {
    /// Prepares to talk to the repository in which `name` is. Asks nothing of the registry, unless
    /// it may be one without TLS: on this machine, or where certificates are not checked.
    pub async fn connect(name: &Name, access: &Access) -> Result<Repository, OciError> {
        let mut options = access.http.clone();
        if is_loopback(name.host()) && options.proxy == ProxyChoice::Environment {
            // As docker does: what is on this machine is not behind a proxy.
            options.proxy = ProxyChoice::None;
        }
        let client = http::client(&options)?;
        let sender = http::client(&HttpOptions { read_timeout: None, ..options })?;
        let url = |scheme: &str| {
            Url::parse(&format!("{scheme}://{}/v2/", name.host())).map_err(|e| {
                OciError::Reference { text: name.to_string(), reason: format!("the host: {e}") }
            })
        };
        let mut base = url("https")?;
        if is_loopback(name.host()) || access.http.skip_verify {
            match client.get(base.clone()).send().await {
                Err(e) if http::speaks_no_tls(&e) => base = url("http")?,
                // Whatever else is wrong will be so again, where it can be reported.
                _ => {}
            }
        }
        let credentials = match &access.credentials {
            Some(credentials) => credentials.clone(),
            None => docker_config::credentials(&name.registry).await?,
        };
        let auth = Authenticator::new(client.clone(), base.clone(), credentials);
        let name = name.clone();
        Ok(Repository { inner: Arc::new(Inner { client, sender, base, name, auth }) })
    }

    /// The name that it was made for.
    pub fn name(&self) -> &Name {
        &self.inner.name
    }

    /// Is the other one in the same registry?
    pub fn same_registry(&self, other: &Repository) -> bool {
        http::same_origin(&self.inner.base, &other.inner.base)
    }

    /// `repository/path` below the base.
    pub(super) fn url(&self, path: &str) -> Result<Url, OciError> {
        let repository = &self.inner.name.repository;
        self.inner.base.join(&format!("{repository}/{path}")).map_err(|e| OciError::Reference {
            text: self.inner.name.to_string(),
            reason: e.to_string(),
        })
    }

    /// For messages: `blob sha256:… of host/repository`.
    pub(super) fn what(&self, thing: &str) -> String {
        format!("{thing} of {}/{}", self.inner.name.registry, self.inner.name.repository)
    }

    pub(super) fn push_scope(&self) -> Scope {
        Scope::push(&self.inner.name.repository)
    }

    /// Sends a request that changes something, once; `body` may take as long as its size needs.
    pub(super) async fn push(
        &self,
        scope: &Scope,
        method: Method,
        url: Url,
        headers: HeaderMap,
        body: Bytes,
        what: &str,
    ) -> Result<Response, OciError> {
        // A link slower than 64 KiB/s is as good as none.
        let limit = Duration::from_secs(120 + body.len() as u64 / (64 << 10));
        self.send(scope, &method, url, what, |url| {
            let request = self.inner.sender.request(method.clone(), url);
            request.headers(headers.clone()).body(body.clone()).timeout(limit)
        })
        .await
    }

    /// Sends a GET or HEAD, once.
    async fn fetch(
        &self,
        method: Method,
        url: Url,
        headers: HeaderMap,
        what: &str,
    ) -> Result<Response, OciError> {
        let scope = Scope::pull(&self.inner.name.repository);
        self.send(&scope, &method, url, what, |url| {
            self.inner.client.request(method.clone(), url).headers(headers.clone())
        })
        .await
    }

    /// Sends a request, with credentials and where it is redirected to. Any status may come back.
    async fn send(
        &self,
        scope: &Scope,
        method: &Method,
        mut url: Url,
        what: &str,
        build: impl Fn(Url) -> RequestBuilder,
    ) -> Result<Response, OciError> {
        let auth = &self.inner.auth;
        let mut used = auth.authorization(&url, scope).await?;
        let (mut challenged, mut redirects) = (false, 0);
        loop {
            let mut headers = HeaderMap::new();
            if let Some(authorization) = &used {
                authorization.apply(&mut headers);
            }
            let request = build(url.clone()).headers(headers);
            let answer = request.send().await.map_err(|e| http::failed(what, &e))?;
            if answer.status() == StatusCode::UNAUTHORIZED
                && !challenged
                && http::same_origin(&url, &self.inner.base)
            {
                challenged = true;
                used = Some(auth.challenged(&url, scope, answer.headers(), used.as_ref()).await?);
                continue;
            }
            let Some(next) = http::redirect_target(&url, &answer)? else { return Ok(answer) };
            let repeats = matches!(answer.status().as_u16(), 307 | 308);
            if !(repeats || matches!(*method, Method::GET | Method::HEAD)) {
                let reason = "it redirects a request that would change meaning".to_owned();
                return Err(OciError::Protocol { what: what.to_owned(), reason });
            }
            redirects += 1;
            if redirects > MAX_REDIRECTS {
                let reason = format!("more than {MAX_REDIRECTS} redirects");
                return Err(OciError::Protocol { what: what.to_owned(), reason });
            }
            used = auth.authorization(&next, scope).await?;
            url = next;
        }
    }

    /// The manifest or index that `reference`, a tag or a digest, names. None if there is none.
    pub async fn manifest(&self, reference: &str) -> Result<Option<Stored>, OciError> {
        let what = self.what(&format!("manifest {reference}"));
        let digest = reference.parse::<Digest>().ok();
        let stored = retry(&what, || async {
            let url = self.url(&format!("manifests/{reference}"))?;
            let answer = self.fetch(Method::GET, url, accept_manifests(), &what).await?;
            if answer.status() != StatusCode::OK {
                return Err(http::status_error(answer, &what).await);
            }
            let media_type = media_type(answer.headers());
            let announced = content_digest(answer.headers());
            let bytes = http::body(answer, &what, MAX_MANIFEST).await?;
            let digest = digest.clone().or(announced).unwrap_or_else(|| Digest::sha256(&bytes));
            verify(&digest, &what, &bytes)?;
            let media_type = media_type.ok_or_else(|| OciError::Protocol {
                what: what.clone(),
                reason: "the answer has no Content-Type".to_owned(),
            })?;
            let descriptor = Descriptor::new(&media_type, digest, bytes.len() as u64);
            Ok(Stored { descriptor, bytes })
        })
        .await;
        absent_is_none(stored)
    }

    /// The descriptor of a manifest, without the manifest. None if there is none.
    pub async fn head_manifest(&self, reference: &str) -> Result<Option<Descriptor>, OciError> {
        let what = self.what(&format!("manifest {reference}"));
        let found = retry(&what, || async {
            let url = self.url(&format!("manifests/{reference}"))?;
            let answer = self.fetch(Method::HEAD, url, accept_manifests(), &what).await?;
            if answer.status() != StatusCode::OK {
                return Err(http::status_error(answer, &what).await);
            }
            let digest = reference.parse().ok().or_else(|| content_digest(answer.headers()));
            match (media_type(answer.headers()), digest, content_length(&answer)) {
                (Some(media_type), Some(digest), Some(size)) => {
                    Ok(Some(Descriptor::new(&media_type, digest, size)))
                }
                // Old registries leave out what only the body tells.
                _ => Ok(None),
            }
        })
        .await;
        match absent_is_none(found)? {
            None => Ok(None),
            Some(Some(descriptor)) => Ok(Some(descriptor)),
            Some(None) => Ok(self.manifest(reference).await?.map(|stored| stored.descriptor)),
        }
    }

    /// Stores a manifest under its digest, and under `tag` if there is one.
    pub async fn put_manifest(
        &self,
        media_type: &str,
        bytes: &[u8],
        tag: Option<&str>,
    ) -> Result<Descriptor, OciError> {
        let descriptor = Descriptor::of(media_type, bytes);
        let reference = tag.unwrap_or(descriptor.digest.as_str());
        let what = self.what(&format!("manifest {reference}"));
        let body = Bytes::copy_from_slice(bytes);
        let content_type = HeaderValue::from_str(media_type).map_err(|_| OciError::Invalid {
            what: what.clone(),
            reason: format!("media type {media_type:?}"),
        })?;
        retry(&what, || async {
            let url = self.url(&format!("manifests/{reference}"))?;
            let headers = HeaderMap::from_iter([(CONTENT_TYPE, content_type.clone())]);
            let scope = self.push_scope();
            let answer = self.push(&scope, Method::PUT, url, headers, body.clone(), &what).await?;
            if !answer.status().is_success() {
                return Err(http::status_error(answer, &what).await);
            }
            match content_digest(answer.headers()) {
                Some(got) if got != descriptor.digest => {
                    Err(OciError::Digest { what: what.clone(), got: got.to_string() })
                }
                _ => Ok(()),
            }
        })
        .await?;
        Ok(descriptor)
    }

    /// Bytes of a blob, None if it is not in this repository.
    pub async fn blob_size(&self, digest: &Digest) -> Result<Option<u64>, OciError> {
        let what = self.what(&format!("blob {digest}"));
        let size = retry(&what, || async {
            let url = self.url(&format!("blobs/{digest}"))?;
            let answer = self.fetch(Method::HEAD, url, HeaderMap::new(), &what).await?;
            match answer.status() {
                StatusCode::OK => content_length(&answer).ok_or_else(|| OciError::Protocol {
                    what: what.clone(),
                    reason: "the answer has no Content-Length".to_owned(),
                }),
                _ => Err(http::status_error(answer, &what).await),
            }
        })
        .await;
        absent_is_none(size)
    }

    /// The whole blob. The stream ends with an error if it is not what `descriptor` says.
    pub fn blob(&self, descriptor: &Descriptor) -> ByteStream {
        let reading = Reading {
            repository: self.clone(),
            what: self.what(&format!("blob {}", descriptor.digest)),
            digest: descriptor.digest.clone(),
            range: 0..descriptor.size,
            hasher: Some(descriptor.digest.hasher()),
            answer: None,
            attempt: 0,
        };
        reading.stream()
    }

    /// Part of a blob, which only its reader can check. It has as many bytes as were asked for.
    pub fn blob_range(&self, digest: &Digest, range: Range<u64>) -> ByteStream {
        let reading = Reading {
            repository: self.clone(),
            what: self.what(&format!("blob {digest}")),
            digest: digest.clone(),
            range,
            hasher: None,
            answer: None,
            attempt: 0,
        };
        reading.stream()
    }

    /// Makes a blob of another repository of the same registry one of this. False if the registry
    /// does not do that, or the blob is not there: then it must be sent.
    pub async fn mount(&self, digest: &Digest, from: &Name) -> Result<bool, OciError> {
        let what = self.what(&format!("blob {digest}"));
        let scope = Scope::mount(&self.inner.name.repository, &from.repository);
        let answer = retry(&what, || async {
            let mut url = self.url("blobs/uploads/")?;
            let mut query = url.query_pairs_mut();
            query.append_pair("mount", digest.as_str()).append_pair("from", &from.repository);
            drop(query);
            let (headers, body) = (HeaderMap::new(), Bytes::new());
            self.push(&scope, Method::POST, url, headers, body, &what).await
        })
        .await;
        let answer = match answer {
            Ok(answer) => answer,
            // A token that is good for both repositories may be refused where one for this is not.
            Err(OciError::Denied { .. }) => return Ok(false),
            Err(e) => return Err(e),
        };
        match answer.status() {
            StatusCode::CREATED => Ok(true),
            StatusCode::ACCEPTED => {
                // An upload was begun instead, which we do not need.
                if let Ok(upload) = Upload::begun(self, &answer) {
                    upload.cancel().await;
                }
                Ok(false)
            }
            _ => Ok(false),
        }
    }

    /// Begins to send a blob whose digest is told at the end.
    pub async fn upload(&self) -> Result<Upload, OciError> {
        retry(&self.what("upload"), || self.begin_upload()).await
    }

    async fn begin_upload(&self) -> Result<Upload, OciError> {
        let what = self.what("upload");
        let url = self.url("blobs/uploads/")?;
        let (headers, body) = (HeaderMap::new(), Bytes::new());
        let answer = self.push(&self.push_scope(), Method::POST, url, headers, body, &what).await?;
        match answer.status() {
            StatusCode::ACCEPTED => Upload::begun(self, &answer),
            _ => Err(http::status_error(answer, &what).await),
        }
    }

    /// Sends a small blob in one piece. Does nothing if the registry has it.
    pub async fn put_blob(&self, bytes: Bytes) -> Result<Digest, OciError> {
        let digest = Digest::sha256(&bytes);
        if self.blob_size(&digest).await? == Some(bytes.len() as u64) {
            return Ok(digest);
        }
        self.upload().await?.finish_with(bytes, &digest).await?;
        Ok(digest)
    }

    /// Tags of the repository, at most `limit` of them. Empty if there is no such repository.
    pub async fn tags(&self, limit: usize) -> Result<Vec<String>, OciError> {
        #[derive(serde::Deserialize)]
        struct Tags {
            #[serde(default)]
            tags: Option<Vec<String>>,
        }
        let what = self.what("tags");
        let bytes = retry(&what, || async {
            let mut url = self.url("tags/list")?;
            url.query_pairs_mut().append_pair("n", &limit.to_string());
            let answer = self.fetch(Method::GET, url, HeaderMap::new(), &what).await?;
            match answer.status() {
                StatusCode::OK => http::body(answer, &what, MAX_MANIFEST).await,
                _ => Err(http::status_error(answer, &what).await),
            }
        })
        .await;
        let Some(bytes) = absent_is_none(bytes)? else { return Ok(Vec::new()) };
        let tags: Tags = serde_json::from_slice(&bytes)
            .map_err(|e| OciError::Invalid { what: what.clone(), reason: e.to_string() })?;
        let mut tags = tags.tags.unwrap_or_default();
        // A registry that ignores the limit.
        tags.truncate(limit);
        Ok(tags)
    }

    /// What refers to the manifest `digest`: by the referrers API, or where a registry has none, by
    /// the tag that stands for it.
    pub async fn referrers(&self, digest: &Digest) -> Result<Index, OciError> {
        let what = self.what(&format!("referrers of {digest}"));
        let answer = retry(&what, || async {
            let url = self.url(&format!("referrers/{digest}"))?;
            let accept = HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static(OCI_INDEX))]);
            let answer = self.fetch(Method::GET, url, accept, &what).await?;
            match answer.status() {
                StatusCode::OK if media_type(answer.headers()).as_deref() == Some(OCI_INDEX) => {
                    Ok(Some(http::body(answer, &what, MAX_MANIFEST).await?))
                }
                StatusCode::OK | StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED => Ok(None),
                _ => Err(http::status_error(answer, &what).await),
            }
        })
        .await?;
        let bytes = match answer {
            Some(bytes) => Some(bytes),
            None => {
                let tag = digest.as_str().replacen(':', "-", 1);
                let stored = self.manifest(&tag).await?;
                stored.filter(|s| s.descriptor.media_type == OCI_INDEX).map(|s| s.bytes)
            }
        };
        match bytes.map(|bytes| Document::parse(&what, OCI_INDEX, &bytes)).transpose()? {
            Some(Document::Index(index)) => Ok(*index),
            _ => Ok(Index::empty()),
        }
    }
}

/// Repeats what fails in a way that may pass, with growing waits.
async fn retry<T, F>(what: &str, mut attempt: impl FnMut() -> F) -> Result<T, OciError>
where
    F: Future<Output = Result<T, OciError>>,
{
    let mut number = 1;
    loop {
        match attempt().await {
            Err(e) if number < ATTEMPTS && may_pass(&e) => {
                let wait = http::backoff(number, e.retry_after());
                log::info!("{what}: attempt {number} of {ATTEMPTS}: {e}; again in {wait:.1?}");
                tokio::time::sleep(wait).await;
                number += 1;
            }
            result => return result,
        }
    }
}

fn may_pass(error: &OciError) -> bool {
    error.retryable() && error.retry_after().is_none_or(|wait| wait <= MAX_RETRY_AFTER)
}

fn absent_is_none<T>(result: Result<T, OciError>) -> Result<Option<T>, OciError> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(OciError::NotFound { .. }) => Ok(None),
        Err(e) => Err(e),
    }
}

fn accept_manifests() -> HeaderMap {
    MANIFEST_TYPES.iter().map(|t| (ACCEPT, HeaderValue::from_static(t))).fold(
        HeaderMap::new(),
        |mut headers, (name, value)| {
            headers.append(name, value);
            headers
        },
    )
}

/// The Content-Type without parameters.
fn media_type(headers: &HeaderMap) -> Option<String> {
    let text = headers.get(CONTENT_TYPE)?.to_str().ok()?;
    let name = text.split(';').next()?.trim().to_ascii_lowercase();
    (!name.is_empty()).then_some(name)
}

fn content_digest(headers: &HeaderMap) -> Option<Digest> {
    headers.get("docker-content-digest")?.to_str().ok()?.parse().ok()
}

/// The length that a header states; the answer to a HEAD has no body to count.
fn content_length(answer: &Response) -> Option<u64> {
    answer.headers().get("content-length")?.to_str().ok()?.parse().ok()
}

/// A blob, or a part of one, that is being read.
struct Reading {
    repository: Repository,
    what: String,
    digest: Digest,
    /// What is still missing.
    range: Range<u64>,
    /// For a whole blob.
    hasher: Option<Hasher>,
    /// With the bytes before the range that it begins with.
    answer: Option<(Response, u64)>,
    /// Failures since bytes last arrived.
    attempt: u32,
}

impl Reading {
    fn stream(self) -> ByteStream {
        stream::try_unfold(Some(self), |state| async move {
            let Some(mut this) = state else { return Ok(None) };
            match this.next().await? {
                Some(piece) => Ok(Some((piece, Some(this)))),
                None => Ok(None),
            }
        })
        .boxed()
    }

    /// The next bytes, None at the end.
    async fn next(&mut self) -> Result<Option<Bytes>, OciError> {
        loop {
            if self.range.is_empty() {
                return self.end().await;
            }
            match self.piece().await {
                Ok(piece) => {
                    self.attempt = 0;
                    self.range.start += piece.len() as u64;
                    if let Some(hasher) = &mut self.hasher {
                        hasher.update(&piece);
                    }
                    return Ok(Some(piece));
                }
                Err(e) => {
                    self.answer = None;
                    self.attempt += 1;
                    // More than was promised does not become less.
                    let wrong = matches!(e, OciError::Size { .. });
                    if self.attempt >= ATTEMPTS || wrong || !may_pass(&e) {
                        return Err(e);
                    }
                    let wait = http::backoff(self.attempt, e.retry_after());
                    let at = self.range.start;
                    log::info!("{}: at byte {at}: {e}; again in {wait:.1?}", self.what);
                    tokio::time::sleep(wait).await;
                }
            }
        }
    }

    /// Bytes at the start of the range, from the answer that is open or from a new one.
    async fn piece(&mut self) -> Result<Bytes, OciError> {
        let (answer, skip) = match &mut self.answer {
            Some(open) => open,
            none => {
                let open = open(&self.repository, &self.digest, &self.range, &self.what).await?;
                none.insert(open)
            }
        };
        let mut piece = loop {
            let piece = answer.chunk().await.map_err(|e| http::failed(&self.what, &e))?;
            let mut piece = piece.ok_or_else(|| OciError::Transport {
                what: self.what.clone(),
                reason: format!(
                    "the answer ended {} bytes early",
                    self.range.end - self.range.start
                ),
            })?;
            let dropped = piece.len().min(usize::try_from(*skip).unwrap_or(usize::MAX));
            *skip -= dropped as u64;
            let rest = piece.split_off(dropped);
            if !rest.is_empty() {
                break rest;
            }
        };
        let left = self.range.end - self.range.start;
        if piece.len() as u64 > left {
            if self.hasher.is_some() {
                let got = self.range.end - left + piece.len() as u64;
                return Err(OciError::Size { what: self.what.clone(), got, want: self.range.end });
            }
            piece.truncate(usize::try_from(left).expect("less than the piece has"));
        }
        Ok(piece)
    }

    /// Checks what has arrived.
    async fn end(&mut self) -> Result<Option<Bytes>, OciError> {
        let Some(hasher) = self.hasher.take() else { return Ok(None) };
        if let Some((mut answer, _)) = self.answer.take()
            && let Ok(Some(more)) = answer.chunk().await
            && !more.is_empty()
        {
            let got = self.range.end + more.len() as u64;
            return Err(OciError::Size { what: self.what.clone(), got, want: self.range.end });
        }
        let got = hasher.finish();
        if got != self.digest {
            return Err(OciError::Digest { what: self.what.clone(), got: got.to_string() });
        }
        Ok(None)
    }
}

/// An answer with the bytes of `range`, and how many come before them: all, from a server that
/// knows no ranges.
async fn open(
    repository: &Repository,
    digest: &Digest,
    range: &Range<u64>,
    what: &str,
) -> Result<(Response, u64), OciError> {
    let url = repository.url(&format!("blobs/{digest}"))?;
    let mut headers = HeaderMap::new();
    let text = format!("bytes={}-{}", range.start, range.end - 1);
    headers.insert(RANGE, HeaderValue::from_str(&text).expect("digits"));
    let answer = repository.fetch(Method::GET, url, headers, what).await?;
    match answer.status() {
        StatusCode::PARTIAL_CONTENT => {
            let start = answer
                .headers()
                .get(CONTENT_RANGE)
                .and_then(|v| v.to_str().ok())
                .and_then(|v| v.strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok());
            if start != Some(range.start) {
                let reason = format!("bytes from {} were asked for, others came", range.start);
                return Err(OciError::Protocol { what: what.to_owned(), reason });
            }
            Ok((answer, 0))
        }
        StatusCode::OK => Ok((answer, range.start)),
        _ => Err(http::status_error(answer, what).await),
    }
}

#[cfg(test)]
mod tests;
