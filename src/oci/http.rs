//! The HTTP client: how it connects, whom it trusts, and what it does not do by itself.
//!
//! A client keeps connections open and speaks HTTP/2 where the server offers it. It follows no
//! redirect: whoever asked does so, and decides which headers go along ([`redirect_target`]). What
//! it says about failures holds no query of an address, as that may be a signature.

use std::error::Error;
use std::hash::{BuildHasher, RandomState};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use reqwest::header::{HeaderMap, LOCATION, RETRY_AFTER};
use reqwest::{Client, Proxy, Response, StatusCode, Url};

use super::error::OciError;
use super::names::Resolver;

/// Redirects that are followed for one request.
pub const MAX_REDIRECTS: usize = 5;

/// Longest error document that is looked at, in bytes.
const MAX_ERROR_BODY: u64 = 64 << 10;

/// What a client is built from.
#[derive(Clone, Debug)]
pub struct HttpOptions {
    /// PEM files with authorities to trust beside those of the system.
    pub ca_files: Vec<PathBuf>,
    /// Trusts whoever answers.
    pub skip_verify: bool,
    /// Limit for resolving, connecting and the TLS handshake.
    pub connect_timeout: Duration,
    /// Limit for the head of an answer, then for each piece of its body. None: no limit.
    pub read_timeout: Option<Duration>,
    /// Limit for a request with its whole answer. None: no limit.
    pub total_timeout: Option<Duration>,
    pub proxy: ProxyChoice,
    /// Connects to this socket, whatever the address says.
    pub unix_socket: Option<PathBuf>,
    /// Clients that share one share its limit of lookups.
    pub resolver: Resolver,
}

/// The proxy for outgoing connections.
#[derive(Clone, PartialEq, Eq)]
pub enum ProxyChoice {
    /// `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY`.
    Environment,
    None,
    /// This one for everything; may hold a user and a password.
    Url(String),
}

impl std::fmt::Debug for ProxyChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            ProxyChoice::Environment => "Environment",
            ProxyChoice::None => "None",
            ProxyChoice::Url(_) => "Url(…)",
        })
    }
}

impl Default for HttpOptions {
    fn default() -> HttpOptions {
        HttpOptions {
            ca_files: Vec::new(),
            skip_verify: false,
            connect_timeout: Duration::from_secs(10),
            read_timeout: Some(Duration::from_secs(60)),
            total_timeout: None,
            proxy: ProxyChoice::Environment,
            unix_socket: None,
            resolver: Resolver::default(),
        }
    }
}

/// Builds a client. Fails for a file that is no certificate or a proxy that is no address.
pub fn client(options: &HttpOptions) -> Result<Client, OciError> {
    // Which implementation of cryptography the process uses: somebody may have said so before.
    rustls::crypto::ring::default_provider().install_default().ok();
    let mut certificates = Vec::new();
    for path in &options.ca_files {
        let setup = |reason: String| OciError::Setup {
            reason: format!("certificates in {}: {reason}", path.display()),
        };
        let pem = std::fs::read(path).map_err(|e| setup(e.to_string()))?;
        let found = reqwest::Certificate::from_pem_bundle(&pem).map_err(|e| setup(cause(&e)))?;
        if found.is_empty() {
            return Err(setup("there are none".to_owned()));
        }
        certificates.extend(found);
    }
    let build = |only: bool| -> Result<Client, OciError> {
        let mut builder = Client::builder()
            .user_agent(concat!("rafsd/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .connect_timeout(options.connect_timeout)
            .pool_idle_timeout(Duration::from_secs(90))
            .http2_adaptive_window(true)
            .tcp_nodelay(true)
            .dns_resolver(options.resolver.clone())
            .tls_danger_accept_invalid_certs(options.skip_verify);
        if let Some(limit) = options.read_timeout {
            builder = builder.read_timeout(limit);
        }
        if let Some(limit) = options.total_timeout {
            builder = builder.timeout(limit);
        }
        builder = match &options.proxy {
            ProxyChoice::Environment => builder,
            ProxyChoice::None => builder.no_proxy(),
            ProxyChoice::Url(url) => {
                let proxy = Proxy::all(url.as_str())
                    .map_err(|e| OciError::Setup { reason: format!("proxy: {}", cause(&e)) })?;
                builder.proxy(proxy)
            }
        };
        if let Some(path) = &options.unix_socket {
            builder = builder.unix_socket(path.as_path());
        }
        builder = if only {
            builder.tls_certs_only(certificates.clone())
        } else {
            builder.tls_certs_merge(certificates.clone())
        };
        builder.build().map_err(|e| OciError::Setup { reason: cause(&e) })
    };
    match build(false) {
        // A system without certificates is one that trusts no authority but those named here.
        Err(e) => build(true).map_err(|_| e),
        client => client,
    }
}

/// Where an answer sends the request, if it does. `from` is the address that was asked.
pub fn redirect_target(from: &Url, answer: &Response) -> Result<Option<Url>, OciError> {
    redirect(from, answer.status(), answer.headers())
}

fn redirect(from: &Url, status: StatusCode, headers: &HeaderMap) -> Result<Option<Url>, OciError> {
    if !matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308) {
        return Ok(None);
    }
    let bad = |reason: &str| OciError::Protocol { what: place(from), reason: reason.to_owned() };
    let location = headers.get(LOCATION).ok_or_else(|| bad("a redirect to nowhere"))?;
    let location = location.to_str().map_err(|_| bad("a redirect to an address that is none"))?;
    let url = from.join(location).map_err(|_| bad("a redirect to an address that is none"))?;
    if !matches!(url.scheme(), "http" | "https") || url.host().is_none() {
        return Err(bad("a redirect to something that is neither http nor https"));
    }
    Ok(Some(url))
}

/// Scheme, host and port: what credentials belong to.
pub fn same_origin(a: &Url, b: &Url) -> bool {
    a.scheme() == b.scheme()
        && a.host_str() == b.host_str()
        && a.port_or_known_default() == b.port_or_known_default()
}

/// `host/path` of an address, for messages: without user, password and query.
pub fn place(url: &Url) -> String {
    let port = url.port().map(|p| format!(":{p}")).unwrap_or_default();
    format!("{}{port}{}", url.host_str().unwrap_or(""), url.path())
}

/// The failure of a request, in words.
pub fn failed(what: &str, error: &reqwest::Error) -> OciError {
    OciError::Transport { what: what.to_owned(), reason: cause(error) }
}

/// All causes of an error in one line, outermost first. An address in it would come from reqwest's
/// outermost error only, which is therefore put into other words.
pub fn cause(error: &reqwest::Error) -> String {
    let mut text = match () {
        () if error.is_timeout() && error.is_connect() => "no connection in time",
        () if error.is_timeout() => "no answer in time",
        () if error.is_connect() => "cannot connect",
        () if error.is_builder() => "bad request",
        () if error.is_body() || error.is_decode() => "the answer broke off",
        () => "the request failed",
    }
    .to_owned();
    let mut source = error.source();
    let mut last = String::new();
    while let Some(e) = source {
        let message = e.to_string();
        source = e.source();
        // Outer errors often repeat inner ones.
        if message.contains("://") || message == last || last.contains(&message) {
            continue;
        }
        text.push_str(": ");
        text.push_str(&message);
        last = message;
    }
    text
}

/// Does this failure say that the other side does not speak TLS?
pub fn speaks_no_tls(error: &reqwest::Error) -> bool {
    let mut source = error.source();
    while let Some(mut e) = source {
        // I/O errors hide from `source` what they were made of, which may be one more of them.
        while let Some(inner) = e.downcast_ref::<std::io::Error>().and_then(|io| io.get_ref()) {
            e = inner;
        }
        if let Some(tls) = e.downcast_ref::<rustls::Error>() {
            return matches!(tls, rustls::Error::InvalidMessage(_));
        }
        source = e.source();
    }
    false
}

/// Reads a body of at most `limit` bytes.
pub async fn body(mut answer: Response, what: &str, limit: u64) -> Result<Vec<u8>, OciError> {
    let too_large = || OciError::TooLarge { what: what.to_owned(), limit };
    if answer.content_length().is_some_and(|n| n > limit) {
        return Err(too_large());
    }
    let mut bytes = Vec::new();
    while let Some(piece) = answer.chunk().await.map_err(|e| failed(what, &e))? {
        if (bytes.len() + piece.len()) as u64 > limit {
            return Err(too_large());
        }
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes)
}

/// What an answer with an error status means. Reads the registry's explanation, if there is one.
pub async fn status_error(answer: Response, what: &str) -> OciError {
    let (status, host) = (answer.status(), answer.url().host_str().unwrap_or("").to_owned());
    let retry_after = retry_after(answer.headers());
    let detail = match body(answer, what, MAX_ERROR_BODY).await {
        Ok(bytes) => explanation(&bytes),
        // The status says enough.
        Err(_) => String::new(),
    };
    match status.as_u16() {
        404 => OciError::NotFound {
            what: if detail.is_empty() { what.to_owned() } else { format!("{what} ({detail})") },
        },
        401 | 403 => OciError::Denied {
            host,
            reason: match detail.is_empty() {
                true => format!("{what}: HTTP status {}", status.as_u16()),
                false => format!("{what}: {detail}"),
            },
        },
        status => OciError::Status { what: what.to_owned(), status, detail, retry_after },
    }
}

/// `Retry-After`, in seconds or as a date.
pub fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = http_date(text)?;
    Some(date.duration_since(SystemTime::now()).unwrap_or(Duration::ZERO))
}

/// A date in the form that servers must send: `Sun, 06 Nov 1994 08:49:37 GMT`.
fn http_date(text: &str) -> Option<SystemTime> {
    let mut words = text.split(' ').skip(1);
    let day: u32 = words.next()?.parse().ok()?;
    const MONTHS: &str = "JanFebMarAprMayJunJulAugSepOctNovDec";
    let month = MONTHS.find(words.next().filter(|m| m.len() == 3)?)? / 3 + 1;
    let year: u32 = words.next()?.parse().ok()?;
    let time = words.next()?;
    (words.next()? == "GMT").then_some(())?;
    humantime::parse_rfc3339(&format!("{year:04}-{month:02}-{day:02}T{time}Z")).ok()
}

/// The message in a registry's error document, one line, or the start of a text.
fn explanation(bytes: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    struct Document {
        #[serde(default)]
        errors: Vec<Item>,
    }
    #[derive(serde::Deserialize)]
    struct Item {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let text = match serde_json::from_slice::<Document>(bytes) {
        Ok(document) => {
            let items = document.errors.iter().take(3);
            items.map(|e| format!("{} ({})", e.message, e.code)).collect::<Vec<_>>().join(", ")
        }
        Err(_) if bytes.starts_with(b"<") => String::new(),
        Err(_) => String::from_utf8_lossy(&bytes[..bytes.len().min(200)]).into_owned(),
    };
    let clean: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    clean.trim().chars().take(300).collect()
}

/// How long to wait before attempt number `attempt` (from 1) is repeated: what the server asks for,
/// else 0.2 s doubled each time up to 10 s, of which a random half is left out.
pub fn backoff(attempt: u32, asked: Option<Duration>) -> Duration {
    if let Some(asked) = asked {
        return asked;
    }
    let full = Duration::from_millis(200).saturating_mul(1 << attempt.min(10).saturating_sub(1));
    let full = full.min(Duration::from_secs(10));
    // Each `RandomState` hashes with keys of its own.
    let random = RandomState::new().hash_one(attempt) % 1024;
    full / 2 + full / 2048 * u32::try_from(random).expect("below 1024")
}

#[cfg(test)]
mod tests {
    use super::*;
    use reqwest::header::HeaderValue;

    fn headers(name: &'static str, value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(name, HeaderValue::from_str(value).unwrap());
        headers
    }

    #[test]
    fn redirects_are_resolved_against_the_address_that_was_asked() {
        let from = Url::parse("https://r.example:5000/v2/a/blobs/x?y=z").unwrap();
        let cases = [
            (307, "https://store.example/o?sig=1", Some("https://store.example/o?sig=1")),
            (302, "/elsewhere", Some("https://r.example:5000/elsewhere")),
            (301, "//other.example/o", Some("https://other.example/o")),
            (308, "http://plain.example/o", Some("http://plain.example/o")),
            (200, "/ignored", None),
            (304, "/ignored", None),
        ];
        for (status, location, want) in cases {
            let status = StatusCode::from_u16(status).unwrap();
            let got = redirect(&from, status, &headers("location", location)).unwrap();
            assert_eq!(got.as_ref().map(Url::as_str), want, "{status} {location}");
        }
        for bad in ["file:///etc/passwd", "http://", "data:text/plain,x"] {
            let found = StatusCode::FOUND;
            redirect(&from, found, &headers("location", bad)).expect_err(bad);
        }
        redirect(&from, StatusCode::FOUND, &HeaderMap::new()).unwrap_err();
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let url = |text: &str| Url::parse(text).unwrap();
        let base = url("https://r.example/a");
        assert!(same_origin(&base, &url("https://r.example:443/b?c")));
        for other in ["http://r.example/a", "https://r.example:444/", "https://x.r.example/"] {
            assert!(!same_origin(&base, &url(other)), "{other}");
        }
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        assert_eq!(retry_after(&headers("retry-after", "7")), Some(Duration::from_secs(7)));
        let past = "Sun, 06 Nov 1994 08:49:37 GMT";
        assert_eq!(retry_after(&headers("retry-after", past)), Some(Duration::ZERO));
        assert_eq!(http_date(past), humantime::parse_rfc3339("1994-11-06T08:49:37Z").ok());
        for bad in ["-1", "soon", "Sun, 06 Nov", "Sun, 99 Nov 1994 08:49:37 GMT"] {
            assert_eq!(retry_after(&headers("retry-after", bad)), None, "{bad}");
        }
    }

    #[test]
    fn explanations_are_one_short_line() {
        let document = br#"{"errors":[{"code":"DENIED","message":"no\nway","detail":{}}]}"#;
        assert_eq!(explanation(document), "no way (DENIED)");
        assert_eq!(explanation(b"<html>"), "");
        assert_eq!(explanation(b"Client sent an HTTP request\n"), "Client sent an HTTP request");
        assert!(explanation(&[b'x'; 10_000]).len() <= 300);
    }

    #[test]
    fn waits_grow_up_to_ten_seconds_and_obey_the_server() {
        for attempt in 1..40 {
            let full = (0.2 * 2f64.powi(attempt - 1)).min(10.0);
            let wait = backoff(attempt.unsigned_abs(), None).as_secs_f64();
            assert!(wait >= full * 0.499 && wait <= full, "{attempt}: {wait}");
        }
        let asked = Duration::from_secs(42);
        assert_eq!(backoff(1, Some(asked)), asked);
    }
}
