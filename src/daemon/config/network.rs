//! The tables of backends that are reached over the network.

use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use serde_json::{Map, Value, json};

use super::ConfigError;
use super::backend::BackendConfig;
use super::table::{Notes, Table};
use crate::backend::Outage;
use crate::backend::network::config::{
    AccessKey, HttpAddr, HttpProxyConfig, MirrorConfig, NetworkConfig, OssConfig, ProxyConfig,
    ProxyUrl, RegistryConfig, RemoteConfig, S3Config, Service, http_url, origin_of,
};
use crate::oci::auth::{Credentials, Secret};
use crate::rafs::id::BlobId;

/// nydusd's limit for silence and for connecting, in seconds.
const TIMEOUT: u64 = 5;
/// Longest time that a key may ask for, in seconds.
const MAX_SECONDS: u64 = 24 * 3600;

pub(super) fn registry(own: &mut Table, notes: &mut Notes) -> Result<BackendConfig, ConfigError> {
    let network = common(own, notes)?;
    let scheme = scheme(own)?;
    let host = own.text("host")?.ok_or_else(|| own.error("host", "is missing"))?;
    // The name that users know is not the name of a registry.
    let host = if host == "docker.io" { "registry-1.docker.io" } else { &host };
    let host = server(own, "host", scheme, host)?;
    let repo = own.text("repo")?.ok_or_else(|| own.error("repo", "is missing"))?;
    let legal = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
    if !repo.chars().all(legal) || repo.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err(own.error("repo", "is not the name of a repository"));
    }
    let auth = own.text("auth")?.map(|text| Credentials::from_base64(&text)).transpose();
    let auth = auth.map_err(|reason| own.error("auth", reason))?;
    let token = own.text("registry_token")?;
    if token.as_ref().is_some_and(|token| HeaderValue::from_str(token).is_err()) {
        return Err(own.error("registry_token", "has control characters"));
    }
    if token.is_some() && auth.is_some() {
        notes.push(format!("{}: `registry_token` is used", own.path_of("auth")));
    }
    let blob_url_scheme = own.text("blob_url_scheme")?.unwrap_or_default();
    if !matches!(blob_url_scheme.as_str(), "" | "http" | "https") {
        return Err(own.error("blob_url_scheme", "use `http` or `https`"));
    }
    let blob_redirected_host = own.text("blob_redirected_host")?.unwrap_or_default();
    if !blob_redirected_host.is_empty() {
        server(own, "blob_redirected_host", "https", &blob_redirected_host)?;
    }
    let config = RegistryConfig {
        host,
        repo,
        credentials: token.map(|token| Credentials::Bearer(Secret::new(token))).or(auth),
        blob_url_scheme,
        blob_redirected_host,
    };
    Ok(remote(Service::Registry(config), network))
}

pub(super) fn s3(own: &mut Table, notes: &mut Notes) -> Result<BackendConfig, ConfigError> {
    let network = common(own, notes)?;
    let scheme = scheme(own)?;
    let region = own.text("region")?.ok_or_else(|| own.error("region", "is missing"))?;
    let endpoint = own.text("endpoint")?.unwrap_or_else(|| format!("s3.{region}.amazonaws.com"));
    let config = S3Config {
        endpoint: server(own, "endpoint", scheme, &endpoint)?,
        region,
        bucket: bucket(own)?,
        prefix: own.text("object_prefix")?.unwrap_or_default(),
        key: access_key(own)?,
    };
    Ok(remote(Service::S3(config), network))
}

pub(super) fn oss(own: &mut Table, notes: &mut Notes) -> Result<BackendConfig, ConfigError> {
    let network = common(own, notes)?;
    let scheme = scheme(own)?;
    let endpoint = own.text("endpoint")?.ok_or_else(|| own.error("endpoint", "is missing"))?;
    let bucket = bucket(own)?;
    let config = OssConfig {
        endpoint: server(own, "endpoint", scheme, &format!("{bucket}.{endpoint}"))?,
        bucket,
        prefix: own.text("object_prefix")?.unwrap_or_default(),
        key: access_key(own)?,
    };
    Ok(remote(Service::Oss(config), network))
}

pub(super) fn http_proxy(own: &mut Table, notes: &mut Notes) -> Result<BackendConfig, ConfigError> {
    let network = common(own, notes)?;
    let addr = own.text("addr")?.ok_or_else(|| own.error("addr", "is missing"))?;
    let addr = match addr.starts_with('/') {
        true => HttpAddr::Unix(PathBuf::from(addr)),
        false => HttpAddr::Http(http_url(&addr).map_err(|reason| {
            own.error("addr", format!("{reason}; or use the path of a unix socket"))
        })?),
    };
    let path = own.text("path")?.unwrap_or_default().trim_matches('/').to_owned();
    let config = HttpProxyConfig { addr, path };
    Ok(remote(Service::HttpProxy(config), network))
}

fn remote(service: Service, network: NetworkConfig) -> BackendConfig {
    BackendConfig::Remote(Box::new(RemoteConfig { service, network }))
}

/// The keys that all of them have.
fn common(own: &mut Table, notes: &mut Notes) -> Result<NetworkConfig, ConfigError> {
    let outage = outage(own, notes)?;
    let ca_cert_files = own.take::<Vec<String>>("ca_cert_files")?.unwrap_or_default();
    Ok(NetworkConfig {
        skip_verify: own.take("skip_verify")?.unwrap_or(false),
        ca_cert_files: ca_cert_files.into_iter().map(PathBuf::from).collect(),
        timeout: seconds(own, "timeout", TIMEOUT)?,
        connect_timeout: seconds(own, "connect_timeout", TIMEOUT)?,
        proxy: own
            .table("proxy")?
            .map(|table| proxy(table, notes))
            .transpose()?
            .unwrap_or_default(),
        mirrors: own
            .tables("mirrors")?
            .into_iter()
            .map(|table| mirror(table, notes))
            .collect::<Result<_, _>>()?,
        outage,
        blob_id: match own.text("blob_id")? {
            None => None,
            Some(text) => {
                let id = BlobId::parse(text.as_bytes()).filter(|id| *id != BlobId::UNKNOWN);
                Some(id.ok_or_else(|| own.error("blob_id", "is not 64 digits of 0-9 and a-f"))?)
            }
        },
    })
}

fn outage(own: &mut Table, notes: &mut Notes) -> Result<Outage, ConfigError> {
    let retries = own.take::<u64>("retry_limit")?.unwrap_or(0);
    let outage = match own.text("on_outage")?.as_deref() {
        None | Some("deadline") => Outage::Deadline,
        Some("wait") => Outage::Wait,
        Some("fail") => {
            let retries = u32::try_from(retries).unwrap_or(u32::MAX);
            return Ok(Outage::Fail { retries });
        }
        Some(_) => return Err(own.error("on_outage", "use `deadline`, `wait` or `fail`")),
    };
    if retries > 0 {
        let reason = "a read is repeated until its deadline; it counts with `on_outage` = `fail`";
        notes.push(format!("{}: {reason}", own.path_of("retry_limit")));
    }
    Ok(outage)
}

fn proxy(mut own: Table, notes: &mut Notes) -> Result<ProxyConfig, ConfigError> {
    let url = own.text("url")?.map(|text| ProxyUrl::parse(&text)).transpose();
    let config = ProxyConfig {
        url: url.map_err(|reason| own.error("url", reason))?,
        ping_url: url_of(&mut own, "ping_url")?,
        fallback: own.take("fallback")?.unwrap_or(true),
        check_interval: seconds(&mut own, "check_interval", 5)?,
        use_http: own.take("use_http")?.unwrap_or(false),
    };
    let reason = "peers are reached through `url`";
    own.ignore("dragonfly_scheduler_endpoint", String::new(), reason, notes)?;
    let pause = own.take::<u64>("check_pause_elapsed")?;
    if pause.is_some_and(|pause| pause != 0 && pause != 300) {
        let reason = "a proxy is checked while something is read and not otherwise";
        notes.push(format!("{}: {reason}", own.path_of("check_pause_elapsed")));
    }
    own.finish(notes);
    Ok(config)
}

fn mirror(mut own: Table, notes: &mut Notes) -> Result<MirrorConfig, ConfigError> {
    let host = url_of(&mut own, "host")?.ok_or_else(|| own.error("host", "is missing"))?;
    let mut headers = HeaderMap::new();
    for (name, value) in own.take::<Map<String, Value>>("headers")?.unwrap_or_default() {
        let name = HeaderName::try_from(&name)
            .map_err(|_| own.error("headers", "has a name that no header can have"))?;
        let mut value = value
            .as_str()
            .and_then(|text| HeaderValue::from_str(text).ok())
            .ok_or_else(|| own.error(&format!("headers.{name}"), "is no value of a header"))?;
        value.set_sensitive(true);
        headers.insert(name, value);
    }
    let config = MirrorConfig {
        host,
        ping_url: url_of(&mut own, "ping_url")?,
        headers,
        health_check_interval: seconds(&mut own, "health_check_interval", 5)?,
        failure_limit: match own.take::<u64>("failure_limit")? {
            None | Some(0) => 5,
            Some(limit) => u32::try_from(limit).unwrap_or(u32::MAX),
        },
    };
    own.finish(notes);
    Ok(config)
}

/// Programs write a zero for what nobody chose.
fn seconds(own: &mut Table, key: &str, default: u64) -> Result<Duration, ConfigError> {
    match own.take::<u64>(key)? {
        None | Some(0) => Ok(Duration::from_secs(default)),
        Some(seconds @ 1..=MAX_SECONDS) => Ok(Duration::from_secs(seconds)),
        Some(_) => Err(own.error(key, format!("is longer than {MAX_SECONDS} seconds"))),
    }
}

fn scheme(own: &mut Table) -> Result<&'static str, ConfigError> {
    match own.text("scheme")?.as_deref() {
        None | Some("https") => Ok("https"),
        Some("http") => Ok("http"),
        Some(_) => Err(own.error("scheme", "use `http` or `https`")),
    }
}

fn url_of(own: &mut Table, key: &str) -> Result<Option<Url>, ConfigError> {
    let url = own.text(key)?.map(|text| http_url(&text)).transpose();
    url.map_err(|reason| own.error(key, reason))
}

/// The address of a server, from `host` or `host:port`.
fn server(own: &Table, key: &str, scheme: &str, host: &str) -> Result<Url, ConfigError> {
    let wrong = || own.error(key, "is not `host` or `host:port`");
    if host.contains(['/', '@', '?', '#', '\\']) || host.chars().any(char::is_whitespace) {
        return Err(wrong());
    }
    http_url(&format!("{scheme}://{host}")).map_err(|_| wrong())
}

fn bucket(own: &mut Table) -> Result<String, ConfigError> {
    let bucket = own.text("bucket_name")?.ok_or_else(|| own.error("bucket_name", "is missing"))?;
    let legal = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    match bucket.chars().all(legal) {
        true => Ok(bucket),
        false => Err(own.error("bucket_name", "is not the name of a bucket")),
    }
}

fn access_key(own: &mut Table) -> Result<Option<AccessKey>, ConfigError> {
    let (id, secret) = (own.text("access_key_id")?, own.text("access_key_secret")?);
    match (id, secret) {
        (Some(id), Some(secret)) => {
            Ok(Some(AccessKey { id: Secret::new(id), secret: Secret::new(secret) }))
        }
        (None, None) => Ok(None),
        (None, _) => Err(own.error("access_key_id", "is missing")),
        (_, None) => Err(own.error("access_key_secret", "is missing")),
    }
}

/// The unix socket that the service is reached by, if it is.
pub(super) fn unix_socket(service: &Service) -> Option<&Path> {
    match service {
        Service::HttpProxy(HttpProxyConfig { addr: HttpAddr::Unix(path), .. }) => Some(path),
        _ => None,
    }
}

/// Type and table of a document of version 2, without secrets.
pub(super) fn public(remote: &RemoteConfig) -> (&'static str, Value) {
    let RemoteConfig { service, network } = remote;
    let host_of = |url: &Url| {
        let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
        format!("{}{port}", url.host_str().unwrap_or_default())
    };
    let (kind, mut own) = match service {
        Service::Registry(config) => (
            "registry",
            json!({
                "scheme": config.host.scheme(),
                "host": host_of(&config.host),
                "repo": config.repo,
                "blob_url_scheme": config.blob_url_scheme,
                "blob_redirected_host": config.blob_redirected_host,
            }),
        ),
        Service::S3(config) => (
            "s3",
            json!({
                "scheme": config.endpoint.scheme(),
                "endpoint": host_of(&config.endpoint),
                "region": config.region,
                "bucket_name": config.bucket,
                "object_prefix": config.prefix,
            }),
        ),
        Service::Oss(config) => (
            "oss",
            json!({
                "scheme": config.endpoint.scheme(),
                "endpoint": host_of(&config.endpoint).replacen(&format!("{}.", config.bucket), "", 1),
                "bucket_name": config.bucket,
                "object_prefix": config.prefix,
            }),
        ),
        Service::HttpProxy(config) => (
            "http-proxy",
            json!({
                "addr": match &config.addr {
                    HttpAddr::Http(url) => origin_of(url) + url.path().trim_end_matches('/'),
                    HttpAddr::Unix(path) => path.display().to_string(),
                },
                "path": config.path,
            }),
        ),
    };
    let mirrors: Vec<_> = network
        .mirrors
        .iter()
        .map(|mirror| {
            json!({
                "host": origin_of(&mirror.host),
                "ping_url": mirror.ping_url.as_ref().map(origin_of).unwrap_or_default(),
                "health_check_interval": mirror.health_check_interval.as_secs(),
                "failure_limit": mirror.failure_limit,
            })
        })
        .collect();
    let proxy = &network.proxy;
    let (on_outage, retry_limit) = match network.outage {
        Outage::Deadline => ("deadline", 0),
        Outage::Wait => ("wait", 0),
        Outage::Fail { retries } => ("fail", retries),
    };
    let common = json!({
        "skip_verify": network.skip_verify,
        "ca_cert_files": network.ca_cert_files,
        "timeout": network.timeout.as_secs(),
        "connect_timeout": network.connect_timeout.as_secs(),
        "retry_limit": retry_limit,
        "on_outage": on_outage,
        "blob_id": network.blob_id.map(|id| id.to_string()).unwrap_or_default(),
        "proxy": {
            "url": proxy.url.as_ref().map(|url| format!("{url:?}")).unwrap_or_default(),
            "ping_url": proxy.ping_url.as_ref().map(origin_of).unwrap_or_default(),
            "fallback": proxy.fallback,
            "check_interval": proxy.check_interval.as_secs(),
            "use_http": proxy.use_http,
        },
        "mirrors": mirrors,
    });
    if let (Value::Object(own), Value::Object(common)) = (&mut own, common) {
        own.extend(common);
    }
    (kind, own)
}

/// Credentials that the environment gives in place of those of the document.
///
/// # Errors
///
/// If the variable is set and is not what it must be.
pub(super) fn use_environment(
    config: &mut BackendConfig,
    auth: Option<String>,
) -> Result<(), ConfigError> {
    let BackendConfig::Remote(remote) = config else { return Ok(()) };
    if let (Service::Registry(registry), Some(auth)) = (&mut remote.service, auth)
        && !auth.is_empty()
    {
        let credentials = Credentials::from_base64(&auth).map_err(|reason| ConfigError::Key {
            path: "environment variable IMAGE_PULL_AUTH".into(),
            reason: reason.into(),
        })?;
        registry.credentials = Some(credentials);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::config::Config;

    /// A document of version 1 with this backend.
    fn v1(kind: &str, own: &str) -> String {
        format!(
            r#"{{"device":{{"backend":{{"type":"{kind}","config":{own}}},
            "cache":{{"type":"blobcache"}}}}}}"#
        )
    }

    fn parse(text: &str) -> Result<(RemoteConfig, Vec<String>), String> {
        let config = Config::parse(text).map_err(|e| {
            let cause = std::error::Error::source(&e).map(ToString::to_string);
            cause.unwrap_or_else(|| e.to_string())
        })?;
        match config.backend {
            BackendConfig::Remote(remote) => Ok((*remote, config.notes)),
            other => Err(format!("{other:?}")),
        }
    }

    const ALL_KEYS: &str = r#"{"scheme":"http","host":"r.example:5000","repo":"a/b","auth":"dTpw",
        "registry_token":"","blob_url_scheme":"https","blob_redirected_host":"s.example",
        "skip_verify":true,"ca_cert_files":["/ca.pem"],"timeout":7,"connect_timeout":0,
        "retry_limit":2,"on_outage":"fail","readahead":false,
        "proxy":{"url":"http://u:S3CRET@p:65001","ping_url":"http://p:65003/healthy","fallback":false,
            "check_interval":9,"use_http":true,"check_pause_elapsed":300,
            "dragonfly_scheduler_endpoint":""},
        "mirrors":[{"host":"http://m:5001/x","ping_url":"","headers":{"X-Registry":"S3CRET"},
            "health_check_interval":3,"failure_limit":1}]}"#;

    #[test]
    fn every_key_of_a_registry_is_read_in_every_form() {
        let v2: Value = serde_json::from_str(ALL_KEYS).unwrap();
        let v2 = json!({"version": 2, "backend": {"type": "registry", "registry": v2},
            "cache": {"type": "blobcache"}});
        let toml = toml::to_string(&v2).unwrap();
        for text in [v1("registry", ALL_KEYS), v2.to_string(), toml] {
            let (remote, notes) = parse(&text).unwrap();
            assert!(notes.is_empty(), "{notes:?}");
            let RemoteConfig { service, network } = &remote;
            let Service::Registry(registry) = service else { panic!("{service:?}") };
            assert_eq!(registry.host.as_str(), "http://r.example:5000/");
            assert_eq!(registry.repo, "a/b");
            let basic = Credentials::Basic { user: "u".into(), password: Secret::new("p") };
            assert_eq!(registry.credentials, Some(basic));
            assert_eq!(registry.blob_url_scheme, "https");
            assert_eq!(registry.blob_redirected_host, "s.example");
            assert!(network.skip_verify);
            assert_eq!(network.ca_cert_files, [PathBuf::from("/ca.pem")]);
            assert_eq!(network.timeout, Duration::from_secs(7));
            assert_eq!(network.connect_timeout, Duration::from_secs(5), "0 was chosen by nobody");
            assert_eq!(network.outage, Outage::Fail { retries: 2 });
            let proxy = &network.proxy;
            assert_eq!(proxy.url.as_ref().unwrap().reveal(), "http://u:S3CRET@p:65001/");
            assert_eq!(proxy.ping_url.as_ref().unwrap().path(), "/healthy");
            assert!(!proxy.fallback && proxy.use_http);
            assert_eq!(proxy.check_interval, Duration::from_secs(9));
            let [mirror] = &network.mirrors[..] else { panic!("{network:?}") };
            assert_eq!(mirror.headers["x-registry"], "S3CRET");
            assert_eq!((mirror.failure_limit, mirror.ping_url.as_ref()), (1, None));
            assert_eq!(mirror.health_check_interval, Duration::from_secs(3));
            let (kind, shown) = public(&remote);
            assert_eq!(kind, "registry");
            assert_eq!(shown["proxy"]["url"], "http://p:65001");
            assert_eq!(shown["host"], "r.example:5000");
            for shown in [shown.to_string(), format!("{remote:?}")] {
                let hidden = !shown.contains("dTpw") && !shown.contains("S3CRET");
                assert!(hidden, "a secret in {shown}");
            }
        }
    }

    #[test]
    fn each_service_has_its_address() {
        let of = |kind: &str, own: &str| match parse(&v1(kind, own)).unwrap().0.service {
            Service::Registry(c) => c.host.to_string(),
            Service::S3(c) => format!("{} {} {}", c.endpoint, c.bucket, c.prefix),
            Service::Oss(c) => format!("{} {}", c.endpoint, c.prefix),
            Service::HttpProxy(c) => format!("{:?} {}", c.addr, c.path),
        };
        let cases = [
            ("registry", r#"{"host":"docker.io","repo":"r"}"#, "https://registry-1.docker.io/"),
            ("registry", r#"{"host":"[::1]:5000","repo":"r"}"#, "https://[::1]:5000/"),
            (
                "s3",
                r#"{"region":"eu-x","bucket_name":"b","object_prefix":"p/"}"#,
                "https://s3.eu-x.amazonaws.com/ b p/",
            ),
            (
                "s3",
                r#"{"region":"x","bucket_name":"b","endpoint":"m:9000","scheme":"http"}"#,
                "http://m:9000/ b ",
            ),
            (
                "oss",
                r#"{"endpoint":"oss.example","bucket_name":"b","object_prefix":"p-"}"#,
                "https://b.oss.example/ p-",
            ),
            ("http-proxy", r#"{"addr":"/run/p.sock","path":"/x/"}"#, r#"Unix("/run/p.sock") x"#),
        ];
        for (kind, own, want) in cases {
            assert_eq!(of(kind, own), want, "{own}");
        }
    }

    #[test]
    fn refusals_name_the_key_and_never_the_value() {
        let registry = |more: &str| v1("registry", &format!(r#"{{"host":"h","repo":"r"{more}}}"#));
        let s3 = |own: &str| v1("s3", own);
        let cases = [
            (registry(r#","auth":"S3CRET""#), "config.auth: it is not"),
            (registry(r#","auth":"UzNDUkVU""#), "config.auth: it is not user:password"),
            (registry(r#","registry_token":"S3CRET\n""#), "config.registry_token: "),
            (registry(r#","scheme":"S3CRET""#), "config.scheme: use `http` or `https`"),
            (registry(r#","blob_url_scheme":"S3CRET""#), "config.blob_url_scheme: "),
            (registry(r#","blob_redirected_host":"a/S3CRET""#), "config.blob_redirected_host: "),
            (registry(r#","timeout":-1"#), "config.timeout: wants a whole number"),
            (registry(r#","timeout":86401"#), "config.timeout: is longer than 86400 seconds"),
            (registry(r#","on_outage":"S3CRET""#), "config.on_outage: use `deadline`"),
            (registry(r#","blob_id":"S3CRET""#), "config.blob_id: is not 64 digits"),
            (registry(r#","proxy":{"url":"S3CRET"}"#), "config.proxy.url: is not an address"),
            (registry(r#","proxy":{"url":"ftp://S3CRET"}"#), "config.proxy.url: is neither http"),
            (registry(r#","proxy":{"ping_url":"S3CRET"}"#), "config.proxy.ping_url: "),
            (registry(r#","mirrors":[{"ping_url":""}]"#), "config.mirrors[0].host: is missing"),
            (
                registry(r#","mirrors":[{"host":"http://m/?S3CRET"}]"#),
                "config.mirrors[0].host: has a user, a password or a query",
            ),
            (registry(r#","mirrors":["S3CRET"]"#), "config.mirrors[0]: wants a table"),
            (
                registry(r#","mirrors":[{"host":"http://m","headers":{"S3 CRET":"x"}}]"#),
                "config.mirrors[0].headers: ",
            ),
            (
                registry(r#","mirrors":[{"host":"http://m","headers":{"X":"S3CRET\n"}}]"#),
                "config.mirrors[0].headers.x: ",
            ),
            (
                v1("registry", r#"{"host":"http://S3CRET","repo":"r"}"#),
                "config.host: is not `host`",
            ),
            (v1("registry", r#"{"host":"u:S3CRET@h","repo":"r"}"#), "config.host: is not `host`"),
            (v1("registry", r#"{"host":"h","repo":"../S3CRET"}"#), "config.repo: is not the name"),
            (v1("registry", r#"{"host":"h","repo":""}"#), "config.repo: is missing"),
            (s3(r#"{"bucket_name":"b"}"#), "config.region: is missing"),
            (s3(r#"{"region":"x"}"#), "config.bucket_name: is missing"),
            (
                s3(r#"{"region":"x","bucket_name":"b","access_key_secret":"S3CRET"}"#),
                "config.access_key_id: is missing",
            ),
            (
                s3(r#"{"region":"x","bucket_name":"b","access_key_id":"S3CRET"}"#),
                "config.access_key_secret: is missing",
            ),
            (v1("oss", r#"{"endpoint":"e","bucket_name":"b/S3CRET"}"#), "config.bucket_name: is"),
            (v1("http-proxy", r#"{"addr":"S3CRET"}"#), "config.addr: is not an address; or use"),
            (v1("http-proxy", r#"{}"#), "config.addr: is missing"),
        ];
        for (text, want) in cases {
            let error = parse(&text).expect_err(&text);
            assert!(error.contains(want), "{text}\n  {error}\n  wanted: {want}");
            assert!(!error.contains("S3CRET"), "{error}");
        }
    }

    #[test]
    fn what_has_no_effect_is_noted() {
        let own = r#"{"host":"h","repo":"r","retry_limit":2,"auth":"dTpw","registry_token":"t","colour":1,
            "proxy":{"check_pause_elapsed":1,"dragonfly_scheduler_endpoint":"http://s"},
            "mirrors":[{"host":"http://m","auth_through":true}]}"#;
        let (_, notes) = parse(&v1("registry", own)).unwrap();
        let mut keys: Vec<_> = notes.iter().map(|n| n.split(": ").next().unwrap()).collect();
        keys.sort_unstable();
        let want = [
            "auth",
            "colour",
            "mirrors[0].auth_through",
            "proxy.check_pause_elapsed",
            "proxy.dragonfly_scheduler_endpoint",
            "retry_limit",
        ];
        let want: Vec<_> = want.iter().map(|key| format!("device.backend.config.{key}")).collect();
        assert_eq!(keys, want);
    }

    #[test]
    fn the_environment_takes_the_place_of_auth() {
        let text = v1("registry", r#"{"host":"h","repo":"r","registry_token":"t"}"#);
        let mut config = Config::parse(&text).unwrap();
        use_environment(&mut config.backend, Some("YTpi".into())).unwrap();
        let BackendConfig::Remote(remote) = &config.backend else { panic!("a registry") };
        let Service::Registry(registry) = &remote.service else { panic!("a registry") };
        let basic = Credentials::Basic { user: "a".into(), password: Secret::new("b") };
        assert_eq!(registry.credentials, Some(basic));
        let error = use_environment(&mut config.backend, Some("S3CRET!".into())).unwrap_err();
        assert!(error.to_string().contains("IMAGE_PULL_AUTH: it is not base64"), "{error}");
        use_environment(&mut config.backend, None).unwrap();
    }
}
