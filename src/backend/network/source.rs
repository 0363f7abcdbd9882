//! One place that blobs are read from: the origin, a mirror, or the origin through a proxy.
//!
//! A request goes to the address that a redirect led to before, or to the server itself. A 401 is
//! answered once, redirects are followed a few times; credentials and signatures are made for the
//! server's own address and go nowhere else. What a redirect led to is kept for the blob until it
//! expires or is refused.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use reqwest::header::{HeaderMap, HeaderValue, RANGE};
use reqwest::{Client, Response, StatusCode, Url};

use super::access::Access;
use super::answer::{Answer, may_be_expired};
use super::config::{Service, origin_of};
use super::health::{Health, Verdict};
use crate::backend::{BackendCause, BackendError, SourceReport};
use crate::oci::OciError;
use crate::oci::http::{self, MAX_REDIRECTS};
use crate::rafs::id::BlobId;

/// How long a source is not asked for a blob that it does not have, or may not give.
const ABSENT: Duration = Duration::from_secs(60);
/// How long a source is not asked for a blob of which it gave wrong bytes.
const WRONG: Duration = Duration::from_secs(60);
/// An address that expires sooner than this is not used again.
const EXPIRY_MARGIN: Duration = Duration::from_secs(10);

/// What a source counts; lives as long as the backend, so that a change of settings loses nothing.
#[derive(Debug, Default)]
pub struct SourceCounters {
    requests: AtomicU64,
    bytes: AtomicU64,
    errors: [AtomicU64; BackendCause::ALL.len()],
}

impl SourceCounters {
    pub fn report(&self, name: String, healthy: bool) -> SourceReport {
        let value = |number: &AtomicU64| number.load(Ordering::Relaxed);
        SourceReport {
            name,
            healthy,
            requests: value(&self.requests),
            bytes: value(&self.bytes),
            errors: std::array::from_fn(|i| value(&self.errors[i])),
        }
    }
}

/// What makes a source.
pub struct SourceSetup {
    /// For logs and metrics; without secrets.
    pub name: String,
    pub service: Service,
    /// Scheme, host and port, and for a mirror a path before all others.
    pub base: Url,
    /// Goes through the proxy, if the source is one.
    pub client: Client,
    /// Does not.
    pub ping_client: Client,
    pub ping_url: Option<Url>,
    /// Sent with each request to the source itself.
    pub headers: HeaderMap,
    /// Sends http in place of https.
    pub plain: bool,
    /// May fall back to plain http when the server knows no TLS.
    pub may_fall_back: bool,
    /// Is there nothing else to ask? Then it is asked whatever its health.
    pub alone: bool,
    pub health: Health,
    pub timeout: Duration,
    pub connect_timeout: Duration,
    pub counters: Arc<SourceCounters>,
}

/// See the module's documentation.
pub struct Source {
    setup: SourceSetup,
    target: ArcSwap<Target>,
    /// Where redirects led, by blob.
    locations: Mutex<HashMap<BlobId, Location>>,
    /// Blobs that it is not asked for, until then.
    avoided: Mutex<HashMap<BlobId, Instant>>,
    said_whole: AtomicBool,
}

/// The server itself.
struct Target {
    base: Url,
    access: Access,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Location {
    url: Url,
    expires: Option<SystemTime>,
}

impl Source {
    pub fn new(setup: SourceSetup) -> Source {
        let mut base = setup.base.clone();
        if setup.plain {
            make_plain(&mut base);
        }
        let target = Target { access: access(&setup, &base), base };
        Source {
            target: ArcSwap::from_pointee(target),
            setup,
            locations: Mutex::default(),
            avoided: Mutex::default(),
            said_whole: AtomicBool::new(false),
        }
    }

    pub fn name(&self) -> &str {
        &self.setup.name
    }

    pub fn timeout(&self) -> Duration {
        self.setup.timeout
    }

    /// Uses other credentials from now on.
    pub fn replace_credentials(&self, credentials: crate::oci::auth::Credentials) {
        self.target.load().access.replace(credentials);
        lock(&self.avoided).clear(); // what was denied may be allowed now
    }

    pub fn report(&self) -> SourceReport {
        self.setup.counters.report(self.setup.name.clone(), self.setup.health.is_well())
    }

    /// Is it likely to answer? Sends a ping if one is due.
    pub fn is_worth_asking(self: &Arc<Self>) -> bool {
        let now = Instant::now();
        match (self.setup.health.verdict(now), &self.setup.ping_url) {
            (Verdict::Well, Some(url)) => {
                if self.setup.health.ping_due(now) {
                    self.ping(url.clone());
                }
                true
            }
            (Verdict::Well, None) | (Verdict::Try, None) => true,
            (Verdict::Try, Some(url)) => {
                self.ping(url.clone());
                false
            }
            (Verdict::Out, _) => false,
        }
    }

    /// Has it given neither wrong bytes of `blob` nor said that it has none?
    pub fn is_trusted_with(&self, blob: &BlobId, now: Instant) -> bool {
        let mut avoided = lock(&self.avoided);
        match avoided.get(blob) {
            Some(until) if now < *until => false,
            Some(_) => {
                avoided.remove(blob);
                true
            }
            None => true,
        }
    }

    /// It gave wrong bytes of `blob`.
    pub fn mistrust(&self, blob: &BlobId) {
        lock(&self.avoided).insert(*blob, Instant::now() + WRONG);
        lock(&self.locations).remove(blob);
    }

    fn ping(self: &Arc<Self>, url: Url) {
        let source = self.clone();
        tokio::spawn(async move {
            let answer = source.setup.ping_client.get(url).send().await;
            match answer {
                Ok(answer) if answer.status().as_u16() < 500 => source.succeeded(),
                Ok(answer) => source.judge(
                    &format!("ping: HTTP status {}", answer.status().as_u16()),
                    false,
                    None,
                ),
                Err(e) => {
                    let silent = e.is_timeout() || e.is_connect();
                    source.judge(&format!("ping: {}", http::cause(&e)), silent, None);
                }
            }
        });
    }

    pub fn succeeded(&self) {
        if self.setup.health.succeeded() && !self.setup.alone {
            log::info!("{} is used again", self.setup.name);
        }
    }

    /// Counts a failure and thinks about what it means for the next request.
    pub fn failed(&self, error: &BackendError) {
        self.setup.counters.errors[error.cause() as usize].fetch_add(1, Ordering::Relaxed);
        match error {
            // It has answered, about this blob only.
            BackendError::NotFound { blob, .. } => {
                lock(&self.avoided).insert(*blob, Instant::now() + ABSENT);
            }
            BackendError::OutOfRange { .. } | BackendError::Denied { .. } => {}
            BackendError::Timeout { .. } | BackendError::Connect { .. } => {
                self.judge(&error.to_string(), true, None);
            }
            _ => self.judge(&error.to_string(), false, error.retry_after()),
        }
    }

    fn judge(&self, reason: &str, silent: bool, wait: Option<Duration>) {
        if self.setup.health.failed(silent, wait, Instant::now()) && !self.setup.alone {
            log::warn!("{} is left out for now: {reason}", self.setup.name);
        }
    }

    pub fn received(&self, bytes: u64) {
        self.setup.counters.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub fn knows_no_ranges(&self) {
        if !self.said_whole.swap(true, Ordering::Relaxed) {
            log::warn!("{} sends whole blobs where parts were asked for", self.setup.name);
        }
    }

    /// Asks for `range` of `blob`, which is not empty. Counts what fails.
    pub async fn open(&self, blob: &BlobId, range: &Range<u64>) -> Result<Answer, BackendError> {
        let opened = self.ask(blob, range).await;
        if let Err(e) = &opened {
            self.failed(e);
        }
        opened
    }

    async fn ask(&self, blob: &BlobId, range: &Range<u64>) -> Result<Answer, BackendError> {
        if let Some(location) = self.location(blob) {
            match self.follow(&location.url, range).await {
                Ok(answer) if !may_be_expired(answer.status()) && !is_redirect(&answer) => {
                    return Answer::check(self, blob, range, answer).await;
                }
                // Perhaps it has expired, perhaps another host has the blob now.
                Ok(_) => self.forget(blob, &location),
                Err(e) => {
                    self.forget(blob, &location);
                    return Err(e);
                }
            }
        }
        let (mut url, mut answer) = self.ask_server(blob, range).await?;
        let mut hops = 0;
        while let Some(next) = http::redirect_target(&url, &answer).map_err(|e| self.unfit(e))? {
            hops += 1;
            if hops > MAX_REDIRECTS {
                return Err(self.protocol(format!("more than {MAX_REDIRECTS} redirects")));
            }
            url = if self.is_own(&next) { next } else { self.rewrite(next)? };
            answer = self.follow(&url, range).await?;
        }
        if hops > 0 && answer.status().is_success() {
            let location = Location { expires: expiry(&url), url };
            lock(&self.locations).insert(*blob, location);
        }
        Answer::check(self, blob, range, answer).await
    }

    /// Does the address belong to the server itself, which may see credentials?
    fn is_own(&self, url: &Url) -> bool {
        let mut url = url.clone();
        if self.setup.plain {
            make_plain(&mut url);
        }
        http::same_origin(&url, &self.target.load().base)
    }

    /// Asks at an address that a redirect led to.
    async fn follow(&self, url: &Url, range: &Range<u64>) -> Result<Response, BackendError> {
        if self.is_own(url) {
            let target = self.target.load_full();
            return self.send_to(&target, url, range).await.map_err(|e| self.explain(e));
        }
        self.send(url, range, HeaderMap::new()).await.map_err(|e| self.broke(&e))
    }

    /// Asks the server itself, over plain HTTP if it turns out to know nothing else and that is allowed.
    async fn ask_server(
        &self,
        blob: &BlobId,
        range: &Range<u64>,
    ) -> Result<(Url, Response), BackendError> {
        let target = self.target.load_full();
        let url = self.setup.service.address(&target.base, blob);
        match self.send_to(&target, &url, range).await {
            Ok(answer) => Ok((url, answer)),
            Err(Failed::Sending(e))
                if self.setup.may_fall_back
                    && target.base.scheme() == "https"
                    && http::speaks_no_tls(&e) =>
            {
                let mut base = target.base.clone();
                make_plain(&mut base);
                log::warn!(
                    "{} knows no TLS; as skip_verify is set it is asked without",
                    self.name()
                );
                let target = Arc::new(Target { access: access(&self.setup, &base), base });
                self.target.store(target.clone());
                let url = self.setup.service.address(&target.base, blob);
                let answer = self.send_to(&target, &url, range).await;
                answer.map(|answer| (url, answer)).map_err(|e| self.explain(e))
            }
            Err(e) => Err(self.explain(e)),
        }
    }

    /// A request to the server itself, with what it wants to know about us; again after a 401.
    async fn send_to(
        &self,
        target: &Target,
        url: &Url,
        range: &Range<u64>,
    ) -> Result<Response, Failed> {
        let mut headers = self.setup.headers.clone();
        let used = target.access.apply(url, &mut headers).await?;
        let answer = self.send(url, range, headers).await?;
        if answer.status() != StatusCode::UNAUTHORIZED {
            return Ok(answer);
        }
        let Some(other) = target.access.challenged(url, answer.headers(), used.as_ref()).await?
        else {
            return Ok(answer);
        };
        let mut headers = self.setup.headers.clone();
        other.apply(&mut headers);
        Ok(self.send(url, range, headers).await?)
    }

    async fn send(
        &self,
        url: &Url,
        range: &Range<u64>,
        mut headers: HeaderMap,
    ) -> reqwest::Result<Response> {
        let text = format!("bytes={}-{}", range.start, range.end - 1);
        headers.insert(RANGE, HeaderValue::from_str(&text).expect("digits"));
        self.setup.counters.requests.fetch_add(1, Ordering::Relaxed);
        let mut url = url.clone();
        if self.setup.plain {
            make_plain(&mut url);
        }
        self.setup.client.get(url).headers(headers).send().await
    }

    /// Where a redirect leads, with what the operator wants to be different about it.
    fn rewrite(&self, mut url: Url) -> Result<Url, BackendError> {
        let Service::Registry(config) = &self.setup.service else { return Ok(url) };
        let mut changed = Ok(());
        if !config.blob_url_scheme.is_empty() {
            changed = changed.and(url.set_scheme(&config.blob_url_scheme));
        }
        if !config.blob_redirected_host.is_empty() {
            let (host, port) = host_and_port(&config.blob_redirected_host);
            changed = changed.and(url.set_host(Some(host)).map_err(|_| ()));
            changed = changed.and(url.set_port(port));
        }
        changed.map_err(|()| {
            self.protocol("a redirect to an address that cannot be changed".into())
        })?;
        Ok(url)
    }

    fn location(&self, blob: &BlobId) -> Option<Location> {
        let mut locations = lock(&self.locations);
        let location = locations.get(blob)?.clone();
        let soon = SystemTime::now() + EXPIRY_MARGIN;
        if location.expires.is_some_and(|at| at <= soon) {
            locations.remove(blob);
            return None;
        }
        Some(location)
    }

    fn forget(&self, blob: &BlobId, location: &Location) {
        let mut locations = lock(&self.locations);
        if locations.get(blob) == Some(location) {
            locations.remove(blob);
        }
    }

    fn protocol(&self, reason: String) -> BackendError {
        BackendError::Protocol { source_name: self.name().to_owned(), reason }
    }

    /// A request or an answer that did not make it.
    pub fn broke(&self, error: &reqwest::Error) -> BackendError {
        let source_name = self.name().to_owned();
        match (error.is_timeout(), error.is_connect()) {
            (true, true) => {
                BackendError::Timeout { source_name, after: self.setup.connect_timeout }
            }
            (true, false) => BackendError::Timeout { source_name, after: self.setup.timeout },
            (false, true) => BackendError::Connect { source_name, reason: http::cause(error) },
            (false, false) => BackendError::Broken { source_name, reason: http::cause(error) },
        }
    }

    fn explain(&self, failed: Failed) -> BackendError {
        match failed {
            Failed::Sending(e) => self.broke(&e),
            Failed::Access(e) => self.unfit(e),
        }
    }

    /// What went wrong with credentials or a redirect.
    fn unfit(&self, error: OciError) -> BackendError {
        let source_name = self.name().to_owned();
        let reason = error.to_string();
        match error {
            OciError::Transport { .. } => BackendError::Broken { source_name, reason },
            OciError::Status { status: 429, retry_after, .. } => {
                BackendError::Throttled { source_name, retry_after }
            }
            OciError::Status { status: status @ (408 | 500..=599), retry_after, .. } => {
                BackendError::Server { source_name, status, retry_after }
            }
            OciError::Protocol { .. } | OciError::TooLarge { .. } => {
                BackendError::Protocol { source_name, reason }
            }
            _ => BackendError::Denied { source_name, reason },
        }
    }
}

/// Why there is no answer.
enum Failed {
    Sending(reqwest::Error),
    Access(OciError),
}

impl From<reqwest::Error> for Failed {
    fn from(error: reqwest::Error) -> Failed {
        Failed::Sending(error)
    }
}

impl From<OciError> for Failed {
    fn from(error: OciError) -> Failed {
        Failed::Access(error)
    }
}

fn access(setup: &SourceSetup, base: &Url) -> Access {
    match &setup.service {
        Service::Registry(config) => Access::registry(setup.client.clone(), base.clone(), config),
        Service::S3(config) => Access::s3(&config.region, config.key.as_ref()),
        Service::Oss(config) => Access::oss(&config.bucket, config.key.as_ref()),
        Service::HttpProxy(_) => Access::Open,
    }
}

impl Service {
    /// The address of a blob below `base`.
    fn address(&self, base: &Url, blob: &BlobId) -> Url {
        let path = match self {
            Service::Registry(config) => format!("v2/{}/blobs/sha256:{blob}", config.repo),
            Service::S3(config) => format!("{}/{}{blob}", config.bucket, config.prefix),
            Service::Oss(config) => format!("{}{blob}", config.prefix),
            Service::HttpProxy(config) if config.path.is_empty() => blob.to_string(),
            Service::HttpProxy(config) => format!("{}/{blob}", config.path),
        };
        let mut url = base.clone();
        url.set_path(&format!("{}/{path}", base.path().trim_end_matches('/')));
        url
    }
}

fn make_plain(url: &mut Url) {
    if url.scheme() == "https" {
        let port = url.port_or_known_default();
        // Both are known schemes with a host, for which this is always allowed.
        let _ = url.set_scheme("http");
        let _ = url.set_port(port.filter(|&port| port != 443));
    }
}

fn is_redirect(answer: &Response) -> bool {
    answer.status().is_redirection()
}

fn host_and_port(text: &str) -> (&str, Option<u16>) {
    match text.rsplit_once(':') {
        Some((host, port)) => match port.parse() {
            Ok(port) => (host, Some(port)),
            Err(_) => (text, None), // an IPv6 address
        },
        None => (text, None),
    }
}

/// When an address with a signature expires, as far as its query tells.
fn expiry(url: &Url) -> Option<SystemTime> {
    let query: HashMap<String, String> = url
        .query_pairs()
        .map(|(name, value)| (name.to_ascii_lowercase(), value.into_owned()))
        .collect();
    for service in ["x-amz", "x-goog", "x-oss"] {
        let date = query.get(&format!("{service}-date"));
        let seconds = query.get(&format!("{service}-expires")).and_then(|s| s.parse().ok());
        if let (Some(date), Some(seconds)) = (date, seconds) {
            return basic_date(date)?.checked_add(Duration::from_secs(seconds));
        }
    }
    if let Some(seconds) = query.get("expires").and_then(|s| s.parse().ok()) {
        return SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds));
    }
    humantime::parse_rfc3339(query.get("se")?).ok()
}

/// `20261124T065000Z`
fn basic_date(text: &str) -> Option<SystemTime> {
    let part = |range: Range<usize>| text.get(range);
    let (year, month, day) = (part(0..4)?, part(4..6)?, part(6..8)?);
    let (hour, minute, second) = (part(9..11)?, part(11..13)?, part(13..15)?);
    humantime::parse_rfc3339(&format!("{year}-{month}-{day}T{hour}:{minute}:{second}Z")).ok()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The name of a source for logs and metrics: what it is and where.
pub fn name(kind: &str, url: &Url, path: &str) -> String {
    format!("{kind} {}{path}", origin_of(url))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_expire_are_known_to() {
        let at = |text: &str| Some(humantime::parse_rfc3339(text).unwrap());
        let cases = [
            (
                "https://b.s3.example/o?X-Amz-Date=20261124T065000Z&X-Amz-Expires=1200&X-Amz-Signature=0",
                at("2026-11-24T07:10:00Z"),
            ),
            ("https://cdn.example/o?Expires=1795503000&Signature=0", at("2026-11-24T06:50:00Z")),
            ("https://a.example/o?se=2026-11-24T06%3A50%3A00Z&sig=0", at("2026-11-24T06:50:00Z")),
            ("https://a.example/o?X-Amz-Date=tomorrow&X-Amz-Expires=1200", None),
            (
                "https://a.example/o?X-Amz-Date=20261124T065000Z&X-Amz-Expires=99999999999999999999",
                None,
            ),
            ("https://a.example/o", None),
        ];
        for (url, want) in cases {
            assert_eq!(expiry(&Url::parse(url).unwrap()), want, "{url}");
        }
    }

    #[test]
    fn https_becomes_http_at_the_same_port_or_its_default() {
        for (url, want) in [
            ("https://r.example/v2/", "http://r.example/v2/"),
            ("https://r.example:5000/", "http://r.example:5000/"),
            ("http://r.example:5000/", "http://r.example:5000/"),
        ] {
            let mut url = Url::parse(url).unwrap();
            make_plain(&mut url);
            assert_eq!(url.as_str(), want);
        }
    }
}
