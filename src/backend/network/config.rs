//! What an operator says about a backend that is reached over the network, checked.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use reqwest::Url;
use reqwest::header::HeaderMap;

use crate::backend::Outage;
use crate::oci::auth::{Credentials, Secret};
use crate::rafs::id::BlobId;

/// What all network backends have in common.
#[derive(Clone, Debug)]
pub struct NetworkConfig {
    /// Trusts whoever answers, and speaks plain HTTP to a server that knows no TLS.
    pub skip_verify: bool,
    /// PEM files with authorities to trust beside those of the system.
    pub ca_cert_files: Vec<PathBuf>,
    /// Longest silence: until an answer begins, and between the pieces of its body.
    pub timeout: Duration,
    /// Limit for resolving a name, connecting and the TLS handshake.
    pub connect_timeout: Duration,
    pub proxy: ProxyConfig,
    /// Asked before the origin, in this order.
    pub mirrors: Vec<MirrorConfig>,
    pub outage: Outage,
    /// The blob of an image that cannot name it: the bootstrap inside a packed layer.
    pub blob_id: Option<BlobId>,
}

impl Default for NetworkConfig {
    fn default() -> NetworkConfig {
        NetworkConfig {
            skip_verify: false,
            ca_cert_files: Vec::new(),
            timeout: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(5),
            proxy: ProxyConfig::default(),
            mirrors: Vec::new(),
            outage: Outage::Deadline,
            blob_id: None,
        }
    }
}

/// An HTTP proxy that requests go through first, such as a peer-to-peer distribution system's.
#[derive(Clone, Debug)]
pub struct ProxyConfig {
    /// None: no proxy of ours; those of the environment count.
    pub url: Option<ProxyUrl>,
    /// Tells whether the proxy is well; without it, requests do.
    pub ping_url: Option<Url>,
    /// Whether mirrors and origin are asked when the proxy fails.
    pub fallback: bool,
    pub check_interval: Duration,
    /// Sends plain HTTP to the proxy for https addresses, so that it can see what is asked for.
    pub use_http: bool,
}

impl Default for ProxyConfig {
    fn default() -> ProxyConfig {
        ProxyConfig {
            url: None,
            ping_url: None,
            fallback: true,
            check_interval: Duration::from_secs(5),
            use_http: false,
        }
    }
}

/// The address of a proxy; may hold a user and a password, which are not shown.
#[derive(Clone, PartialEq, Eq)]
pub struct ProxyUrl(Url);

impl ProxyUrl {
    /// # Errors
    ///
    /// What is wrong with it, without quoting it.
    pub fn parse(text: &str) -> Result<ProxyUrl, &'static str> {
        any_http_url(text).map(ProxyUrl)
    }

    pub fn reveal(&self) -> &str {
        self.0.as_str()
    }
}

impl fmt::Debug for ProxyUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&origin_of(&self.0))
    }
}

/// A server that has what the origin has.
#[derive(Clone, Debug)]
pub struct MirrorConfig {
    /// Takes the place of scheme, host and port; a path goes before the origin's.
    pub host: Url,
    pub ping_url: Option<Url>,
    /// Sent with each request to it.
    pub headers: HeaderMap,
    pub health_check_interval: Duration,
    /// Failed requests in a row after which it is left out, from 1.
    pub failure_limit: u32,
}

/// A backend that is reached over the network.
#[derive(Clone, Debug)]
pub struct RemoteConfig {
    pub service: Service,
    pub network: NetworkConfig,
}

/// Where blobs are, and how a server wants to be asked for them.
#[derive(Clone, Debug)]
pub enum Service {
    Registry(RegistryConfig),
    S3(S3Config),
    Oss(OssConfig),
    HttpProxy(HttpProxyConfig),
}

#[derive(Clone, Debug)]
pub struct RegistryConfig {
    /// Scheme, host and port of the registry.
    pub host: Url,
    pub repo: String,
    /// None: those that `docker login` and its like have left for the host, if any.
    pub credentials: Option<Credentials>,
    /// Scheme of addresses that the registry redirects to; empty: as the registry says.
    pub blob_url_scheme: String,
    /// Host, with a port or not, in place of that which the registry redirects to; may be empty.
    pub blob_redirected_host: String,
}

#[derive(Clone, Debug)]
pub struct S3Config {
    /// Scheme, host and port.
    pub endpoint: Url,
    pub region: String,
    pub bucket: String,
    /// Before the blob id.
    pub prefix: String,
    pub key: Option<AccessKey>,
}

#[derive(Clone, Debug)]
pub struct OssConfig {
    /// Scheme, host with the bucket as its first label, and port.
    pub endpoint: Url,
    pub bucket: String,
    /// Before the blob id.
    pub prefix: String,
    pub key: Option<AccessKey>,
}

/// A key of an object store, with which requests are signed.
#[derive(Clone, Debug)]
pub struct AccessKey {
    pub id: Secret,
    pub secret: Secret,
}

#[derive(Clone, Debug)]
pub struct HttpProxyConfig {
    pub addr: HttpAddr,
    /// Path before the blob id, without slashes at its ends.
    pub path: String,
}

#[derive(Clone, Debug)]
pub enum HttpAddr {
    Http(Url),
    /// A unix socket.
    Unix(PathBuf),
}

/// An http or https address with a host, and with nothing in it that may be a secret.
///
/// # Errors
///
/// What is wrong with it, without quoting it.
pub fn http_url(text: &str) -> Result<Url, &'static str> {
    let url = any_http_url(text)?;
    match url.username().is_empty() && url.password().is_none() && url.query().is_none() {
        true => Ok(url),
        false => Err("has a user, a password or a query, which may not be in it"),
    }
}

fn any_http_url(text: &str) -> Result<Url, &'static str> {
    let url = Url::parse(text).map_err(|_| "is not an address")?;
    match url.scheme() {
        "http" | "https" if url.has_host() => Ok(url),
        _ => Err("is neither http nor https"),
    }
}

/// `scheme://host:port`, for messages.
pub fn origin_of(url: &Url) -> String {
    let port = url.port().map(|p| format!(":{p}")).unwrap_or_default();
    format!("{}://{}{port}", url.scheme(), url.host_str().unwrap_or_default())
}
