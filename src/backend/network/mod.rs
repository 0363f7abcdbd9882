//! Blobs over HTTP: registries, object stores and plain servers, with mirrors and a proxy before them.
//!
//! [`Remote`] asks its sources in order, proxy, mirrors, origin, and takes the first answer whose head
//! is right; a source that failed, or gave wrong bytes, is passed over for a while ([`health`]). Each
//! source is asked once for each read: repeating reads is up to the caller, so that there is one budget
//! for it. What is true of every read:
//!
//! - It begins with the byte asked for, whatever the server answers ([`answer`]).
//! - A source that is silent for `timeout`, or hardly sends, is given up.
//! - Credentials go to the server they are for and to the token service it names, nowhere else.
//!
//! Credentials, proxy and mirrors can be changed while reads are under way ([`Backend::change`]).

mod access;
mod answer;
pub mod config;
mod health;
mod source;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream;
use reqwest::header::HeaderMap;
use reqwest::{Client, Url};

use self::config::{
    HttpAddr, MirrorConfig, NetworkConfig, ProxyConfig, ProxyUrl, RemoteConfig, Service,
};
use self::health::Health;
use self::source::{Source, SourceCounters, SourceSetup};
use super::{Backend, BackendError, ByteStream, HIDDEN, Outage, SettingError, SourceReport};
use crate::oci::OciError;
use crate::oci::auth::{Credentials, Secret};
use crate::oci::http::{self, HttpOptions, ProxyChoice};
use crate::oci::names::Resolver;
use crate::rafs::id::BlobId;

/// Failures in a row after which an origin or a proxy is passed over; mirrors have a key for it.
const FAILURE_LIMIT: u32 = 5;
/// How long an origin is passed over, if there is anything else.
const ORIGIN_PAUSE: Duration = Duration::from_secs(5);
/// Sources that are counted apart, those that changes of settings took away included.
const MAX_COUNTED: usize = 100;
/// Reads of a blob of which it is remembered who answered them.
const REMEMBERED_READS: usize = 256;

/// A backend that is reached over HTTP. See the module's documentation.
pub struct Remote {
    name: String,
    service: Service,
    network: NetworkConfig,
    resolver: Resolver,
    settings: Mutex<Settings>,
    /// In the order in which they are asked. Never empty.
    sources: ArcSwap<Vec<Arc<Source>>>,
    counters: Mutex<HashMap<String, Arc<SourceCounters>>>,
    /// Who answered the last reads of each blob.
    answered: Mutex<HashMap<BlobId, Answered>>,
}

/// Ranges of a blob and who gave them, the last ones last.
type Answered = VecDeque<(Range<u64>, Arc<Source>)>;

/// What can be changed.
#[derive(Clone)]
struct Settings {
    credentials: Option<Credentials>,
    proxy: ProxyConfig,
    mirrors: Vec<MirrorConfig>,
}

impl Remote {
    /// Connects to nothing yet. `patience`: how long a reader waits at most; a source may be silent
    /// for a part of it only, so that there is time left for the others.
    ///
    /// # Errors
    ///
    /// A file that has no certificates, or a proxy that is no address.
    pub fn new(
        config: RemoteConfig,
        patience: Duration,
        resolver: Resolver,
    ) -> Result<Remote, OciError> {
        let RemoteConfig { service, mut network } = config;
        let proxies = usize::from(network.proxy.url.is_some());
        let sources = u32::try_from(network.mirrors.len() + proxies).unwrap_or(u32::MAX - 2);
        let share = patience / (sources + 2);
        network.timeout = network.timeout.min(share).max(Duration::from_millis(1));
        network.connect_timeout = network.connect_timeout.min(share).max(Duration::from_millis(1));
        let settings = Settings {
            credentials: match &service {
                Service::Registry(config) => config.credentials.clone(),
                _ => None,
            },
            proxy: network.proxy.clone(),
            mirrors: network.mirrors.clone(),
        };
        let remote = Remote {
            name: service.name(),
            service,
            network,
            resolver,
            settings: Mutex::new(settings.clone()),
            sources: ArcSwap::from_pointee(Vec::new()),
            counters: Mutex::default(),
            answered: Mutex::default(),
        };
        let sources = remote.build(&settings)?;
        remote.sources.store(Arc::new(sources));
        Ok(remote)
    }

    fn client(&self, proxy: ProxyChoice) -> Result<Client, OciError> {
        http::client(&HttpOptions {
            ca_files: self.network.ca_cert_files.clone(),
            skip_verify: self.network.skip_verify,
            connect_timeout: self.network.connect_timeout,
            read_timeout: Some(self.network.timeout),
            total_timeout: None,
            unix_socket: self.service.unix_socket(),
            resolver: self.resolver.clone(),
            proxy,
        })
    }

    /// The sources that these settings mean.
    fn build(&self, settings: &Settings) -> Result<Vec<Arc<Source>>, OciError> {
        let mut service = self.service.clone();
        if let Service::Registry(config) = &mut service {
            config.credentials.clone_from(&settings.credentials);
        }
        let direct = self.client(ProxyChoice::Environment)?;
        let base = service.base();
        let now = Instant::now();
        let setup = |name: String, health: Health| SourceSetup {
            counters: self.counters(&name),
            name,
            service: service.clone(),
            base: base.clone(),
            client: direct.clone(),
            ping_client: direct.clone(),
            ping_url: None,
            headers: HeaderMap::new(),
            plain: false,
            may_fall_back: self.network.skip_verify,
            alone: false,
            health,
            timeout: self.network.timeout,
            connect_timeout: self.network.connect_timeout,
        };
        let mut setups = Vec::new();
        let proxy = &settings.proxy;
        if let Some(url) = &proxy.url {
            let health = Health::new(FAILURE_LIMIT, proxy.check_interval, now);
            setups.push(SourceSetup {
                client: self.client(ProxyChoice::Url(url.reveal().to_owned()))?,
                ping_url: proxy.ping_url.clone(),
                plain: proxy.use_http,
                may_fall_back: false,
                ..setup(format!("proxy {url:?}"), health)
            });
        }
        if proxy.url.is_none() || proxy.fallback {
            for mirror in &settings.mirrors {
                let health = Health::new(mirror.failure_limit, mirror.health_check_interval, now);
                setups.push(SourceSetup {
                    base: mirror.host.clone(),
                    ping_url: mirror.ping_url.clone(),
                    headers: mirror.headers.clone(),
                    ..setup(source::name("mirror", &mirror.host, ""), health)
                });
            }
            setups.push(setup(self.name.clone(), Health::new(FAILURE_LIMIT, ORIGIN_PAUSE, now)));
        }
        if let [only] = &mut setups[..] {
            only.alone = true;
        }
        Ok(setups.into_iter().map(|setup| Arc::new(Source::new(setup))).collect())
    }

    fn counters(&self, name: &str) -> Arc<SourceCounters> {
        let mut counters = lock(&self.counters);
        let known = counters.len() < MAX_COUNTED || counters.contains_key(name);
        counters.entry(if known { name } else { "other sources" }.to_owned()).or_default().clone()
    }

    /// Asks the sources one after another for `range` of `blob`, which is not empty.
    async fn open(
        &self,
        blob: &BlobId,
        range: &Range<u64>,
    ) -> Result<(answer::Answer, Arc<Source>), BackendError> {
        let sources = self.sources.load_full();
        let now = Instant::now();
        // Who lied about the blob, or does not have it, is asked only if there is nobody else.
        let trusted = sources.iter().any(|source| source.is_trusted_with(blob, now));
        let asked = |source: &&Arc<Source>| !trusted || source.is_trusted_with(blob, now);
        let mut failed: Option<BackendError> = None;
        let mut left_out = Vec::new();
        for source in sources.iter().filter(asked) {
            if !source.is_worth_asking() {
                left_out.push(source);
                continue;
            }
            match source.open(blob, range).await {
                Ok(answer) => return Ok((answer, source.clone())),
                Err(e) => failed = Some(self.worse(failed, e)),
            }
        }
        // Before giving up there is nothing to lose by asking those that were left out.
        for source in left_out {
            match source.open(blob, range).await {
                Ok(answer) => return Ok((answer, source.clone())),
                Err(e) => failed = Some(self.worse(failed, e)),
            }
        }
        let source_name = self.name.clone();
        Err(failed.unwrap_or(BackendError::NotFound { blob: *blob, source_name }))
    }

    /// Which of two failures to tell: the last, as the origin comes last, unless the first leaves
    /// hope and the last does not say that the blob is not there.
    fn worse(&self, first: Option<BackendError>, last: BackendError) -> BackendError {
        match first {
            Some(first)
                if first.retryable()
                    && !last.retryable()
                    && !matches!(last, BackendError::NotFound { .. }) =>
            {
                first
            }
            _ => last,
        }
    }

    /// The blob that an image means that may not be able to name it.
    fn meant(&self, blob: &BlobId) -> BlobId {
        match self.network.blob_id {
            Some(named) if *blob == BlobId::UNKNOWN => named,
            _ => *blob,
        }
    }

    fn remember(&self, blob: &BlobId, range: Range<u64>, source: Arc<Source>) {
        let mut answered = lock(&self.answered);
        let reads = answered.entry(*blob).or_default();
        if reads.len() >= REMEMBERED_READS {
            reads.pop_front();
        }
        reads.push_back((range, source));
    }
}

impl Backend for Remote {
    fn read(
        &self,
        blob: &BlobId,
        range: Range<u64>,
    ) -> BoxFuture<'_, Result<ByteStream, BackendError>> {
        let blob = self.meant(blob);
        Box::pin(async move {
            if range.is_empty() {
                return Ok(stream::empty().boxed());
            }
            let (answer, source) = self.open(&blob, &range).await?;
            self.remember(&blob, range, source.clone());
            Ok(answer.stream(source))
        })
    }

    fn size(&self, blob: &BlobId) -> BoxFuture<'_, Result<u64, BackendError>> {
        let blob = self.meant(blob);
        // Not HEAD: addresses that are signed are signed for GET.
        Box::pin(async move {
            match self.open(&blob, &(0..1)).await {
                Ok((answer, source)) => {
                    self.remember(&blob, 0..1, source.clone());
                    answer.size.ok_or_else(|| BackendError::Protocol {
                        source_name: source.name().to_owned(),
                        reason: "part of the blob, without its size".into(),
                    })
                }
                Err(BackendError::OutOfRange { size: 0, .. }) => Ok(0),
                Err(e) => Err(e),
            }
        })
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn mistrust(&self, blob: &BlobId, range: Range<u64>) -> bool {
        let blob = &self.meant(blob);
        let source = {
            let answered = lock(&self.answered);
            let reads = answered.get(blob).into_iter().flatten().rev();
            let mut reads =
                reads.filter(|(read, _)| range.is_empty() || read.contains(&range.start));
            reads.next().map(|(_, source)| source.clone())
        };
        let now = Instant::now();
        let sources = self.sources.load();
        let Some(source) = source else { return false };
        if source.is_trusted_with(blob, now) {
            log::warn!("blob {blob}: {} gave wrong bytes; others are asked first", source.name());
        }
        source.mistrust(blob);
        sources.iter().any(|source| source.is_trusted_with(blob, now))
    }

    fn watches_itself(&self) -> bool {
        true
    }

    fn outage(&self) -> Outage {
        self.network.outage
    }

    fn settings(&self) -> BTreeMap<String, String> {
        let settings = lock(&self.settings).clone();
        let proxy = settings.proxy.url.map(|url| format!("{url:?}")).unwrap_or_default();
        let mirrors: Vec<String> =
            settings.mirrors.iter().map(|mirror| config::origin_of(&mirror.host)).collect();
        let mut shown = BTreeMap::from([
            ("proxy_url".to_owned(), proxy),
            ("mirrors".to_owned(), mirrors.join(" ")),
        ]);
        if let Service::Registry(_) = self.service {
            let auth = if settings.credentials.is_some() { HIDDEN } else { "" };
            shown.insert("registry_auth".to_owned(), auth.to_owned());
        }
        shown
    }

    fn change(&self, values: &BTreeMap<String, String>) -> Result<(), SettingError> {
        let mut held = lock(&self.settings);
        let mut settings = held.clone();
        for (key, value) in values {
            let wrong = |reason: &str| SettingError::new(key, reason);
            match (key.as_str(), &self.service) {
                ("registry_auth", Service::Registry(_)) => {
                    let read = |text: &str| Credentials::from_base64(text).map(Some);
                    let credentials = if value.is_empty() { Ok(None) } else { read(value) };
                    settings.credentials = credentials.map_err(wrong)?;
                }
                ("registry_token", Service::Registry(_)) => {
                    let token = || Credentials::Bearer(Secret::new(value.as_str()));
                    settings.credentials = (!value.is_empty()).then(token);
                }
                ("proxy_url", _) => {
                    let url =
                        if value.is_empty() { Ok(None) } else { ProxyUrl::parse(value).map(Some) };
                    settings.proxy.url = url.map_err(wrong)?;
                }
                ("mirrors", _) => {
                    let hosts = value.split_ascii_whitespace();
                    let known = |host: &Url| {
                        settings.mirrors.iter().find(|mirror| mirror.host == *host).cloned()
                    };
                    let mirrors = hosts.map(|text| {
                        let host = config::http_url(text)?;
                        Ok(known(&host).unwrap_or_else(|| MirrorConfig::new(host)))
                    });
                    let mirrors: Result<Vec<_>, &str> = mirrors.collect();
                    settings.mirrors = mirrors.map_err(wrong)?;
                }
                ("dragonfly_scheduler_endpoint", _) => {
                    if !value.is_empty() {
                        config::http_url(value).map_err(wrong)?;
                        log::info!("ignored: {key}: peers are reached through proxy_url");
                    }
                }
                _ => return Err(wrong("this backend has no such setting")),
            }
        }
        if let (Some(credentials), true) = (&settings.credentials, only_credentials(values)) {
            // Connections and what is known of the sources stay.
            for source in self.sources.load().iter() {
                source.replace_credentials(credentials.clone());
            }
            *held = settings;
            return Ok(());
        }
        let sources = self.build(&settings).map_err(|e| {
            SettingError::new(values.keys().next().map_or("", String::as_str), e.to_string())
        })?;
        self.sources.store(Arc::new(sources));
        *held = settings;
        Ok(())
    }

    fn sources(&self) -> Vec<SourceReport> {
        let mut reports: Vec<_> =
            self.sources.load().iter().map(|source| source.report()).collect();
        // Those that a change of settings took away have counted, too.
        for (name, counters) in lock(&self.counters).iter() {
            if reports.iter().all(|report| report.name != *name) {
                reports.push(counters.report(name.clone(), false));
            }
        }
        reports
    }
}

impl MirrorConfig {
    /// A mirror about which nothing but its address is said.
    pub fn new(host: Url) -> MirrorConfig {
        MirrorConfig {
            host,
            ping_url: None,
            headers: HeaderMap::new(),
            health_check_interval: Duration::from_secs(5),
            failure_limit: 5,
        }
    }
}

impl Service {
    /// Scheme, host and port of the server itself.
    fn base(&self) -> Url {
        match self {
            Service::Registry(config) => config.host.clone(),
            Service::S3(config) => config.endpoint.clone(),
            Service::Oss(config) => config.endpoint.clone(),
            Service::HttpProxy(config) => match &config.addr {
                HttpAddr::Http(url) => url.clone(),
                // The name is for the Host header only.
                HttpAddr::Unix(_) => Url::parse("http://localhost").expect("a fixed address"),
            },
        }
    }

    fn unix_socket(&self) -> Option<PathBuf> {
        match self {
            Service::HttpProxy(config) => match &config.addr {
                HttpAddr::Unix(path) => Some(path.clone()),
                HttpAddr::Http(_) => None,
            },
            _ => None,
        }
    }

    fn name(&self) -> String {
        let base = self.base();
        match self {
            Service::Registry(config) => {
                source::name("registry", &base, &format!("/{}", config.repo))
            }
            Service::S3(config) => {
                source::name("s3", &base, &format!("/{}/{}", config.bucket, config.prefix))
            }
            Service::Oss(config) => source::name("oss", &base, &format!("/{}", config.prefix)),
            Service::HttpProxy(config) => match &config.addr {
                HttpAddr::Http(url) => {
                    let path = url.path().trim_end_matches('/');
                    source::name("http-proxy", url, &format!("{path}/{}", config.path))
                }
                HttpAddr::Unix(path) => {
                    format!("http-proxy {} /{}", path.display(), config.path)
                }
            },
        }
    }
}

fn only_credentials(values: &BTreeMap<String, String>) -> bool {
    values.keys().all(|key| matches!(key.as_str(), "registry_auth" | "registry_token"))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
