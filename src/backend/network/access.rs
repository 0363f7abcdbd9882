//! What a server wants to know about us before it gives a blob: nothing, credentials, a signature.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use reqsign_core::SignRequest;
use reqwest::header::{HOST, HeaderMap};
use reqwest::{Client, Url};
use tokio::sync::Mutex;

use super::config::{AccessKey, RegistryConfig};
use crate::oci::OciError;
use crate::oci::auth::{Authenticator, Authorization, Credentials, Scope};
use crate::oci::docker_config;

/// How often the files and helpers of `docker login` are asked again after a refusal.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

/// See the module's documentation.
pub enum Access {
    Open,
    Registry(Box<RegistryAccess>),
    S3(S3Signer),
    Oss(OssSigner),
}

/// The access to a registry, or to what stands in for it.
pub struct RegistryAccess {
    authenticator: Authenticator,
    scope: Scope,
    /// Names to look for in the files of `docker login`.
    names: Vec<String>,
    /// Credentials were configured: nothing else counts.
    configured: AtomicBool,
    /// When that was done last.
    looked: Mutex<Option<Instant>>,
}

pub struct S3Signer {
    signer: reqsign_aws_v4::RequestSigner,
    credential: reqsign_aws_v4::Credential,
}

pub struct OssSigner {
    signer: reqsign_aliyun_oss::RequestSigner,
    credential: reqsign_aliyun_oss::Credential,
}

impl Access {
    /// For a server at `base` that gives what the registry of `config` has.
    pub fn registry(client: Client, base: Url, config: &RegistryConfig) -> Access {
        let credentials = config.credentials.clone();
        let configured = AtomicBool::new(credentials.is_some());
        let mut names = vec![name_of(&base), name_of(&config.host)];
        names.dedup();
        let credentials = credentials.unwrap_or(Credentials::Anonymous);
        Access::Registry(Box::new(RegistryAccess {
            authenticator: Authenticator::new(client, base, credentials),
            scope: Scope::pull(&config.repo),
            names,
            configured,
            looked: Mutex::new(None),
        }))
    }

    pub fn s3(region: &str, key: Option<&AccessKey>) -> Access {
        let Some(key) = key else { return Access::Open };
        Access::S3(S3Signer {
            signer: reqsign_aws_v4::RequestSigner::new("s3", region),
            credential: reqsign_aws_v4::Credential {
                access_key_id: key.id.reveal().to_owned(),
                secret_access_key: key.secret.reveal().to_owned(),
                session_token: None,
                expires_in: None,
            },
        })
    }

    pub fn oss(bucket: &str, key: Option<&AccessKey>) -> Access {
        let Some(key) = key else { return Access::Open };
        Access::Oss(OssSigner {
            signer: reqsign_aliyun_oss::RequestSigner::new(bucket),
            credential: reqsign_aliyun_oss::Credential {
                access_key_id: key.id.reveal().to_owned(),
                access_key_secret: key.secret.reveal().to_owned(),
                security_token: None,
                expires_in: None,
            },
        })
    }

    /// Adds to the headers of a GET of `url` what the server wants, as far as that is known.
    pub async fn apply(
        &self,
        url: &Url,
        headers: &mut HeaderMap,
    ) -> Result<Option<Authorization>, OciError> {
        match self {
            Access::Open => Ok(None),
            Access::Registry(access) => {
                let authorization = access.authorization(url).await?;
                if let Some(authorization) = &authorization {
                    authorization.apply(headers);
                }
                Ok(authorization)
            }
            Access::S3(S3Signer { signer, credential }) => {
                sign(signer, credential, url, headers).await.map(|()| None)
            }
            Access::Oss(OssSigner { signer, credential }) => {
                sign(signer, credential, url, headers).await.map(|()| None)
            }
        }
    }

    /// After a 401 with these headers to a request with `used`: what to say instead. `None` if
    /// there is nothing else to say.
    pub async fn challenged(
        &self,
        url: &Url,
        answer: &HeaderMap,
        used: Option<&Authorization>,
    ) -> Result<Option<Authorization>, OciError> {
        let Access::Registry(access) = self else { return Ok(None) };
        access.look_up().await?;
        access.authenticator.challenged(url, &access.scope, answer, used).await.map(Some)
    }

    /// Uses other credentials from now on.
    pub fn replace(&self, credentials: Credentials) {
        if let Access::Registry(access) = self {
            access.configured.store(true, Ordering::Relaxed);
            access.authenticator.replace(credentials);
        }
    }
}

impl RegistryAccess {
    /// The header for a request to `url`, as far as it is known; with newer credentials if those
    /// that are known are worth nothing any more.
    async fn authorization(&self, url: &Url) -> Result<Option<Authorization>, OciError> {
        match self.authenticator.authorization(url, &self.scope).await {
            Err(OciError::Denied { .. }) if self.look_up().await? => {
                self.authenticator.authorization(url, &self.scope).await
            }
            other => other,
        }
    }

    /// Finds what `docker login` has left for the registry, unless that was done a moment ago or
    /// does not count. Says whether it did.
    async fn look_up(&self) -> Result<bool, OciError> {
        if self.configured.load(Ordering::Relaxed) {
            return Ok(false);
        }
        // Held while a helper runs: the others wait for its answer.
        let mut looked = self.looked.lock().await;
        if looked.is_some_and(|at| at.elapsed() < LOOK_AGAIN) {
            return Ok(false);
        }
        for name in &self.names {
            let found = docker_config::credentials(name).await?;
            if found != Credentials::Anonymous {
                self.authenticator.replace(found);
                break;
            }
        }
        *looked = Some(Instant::now());
        Ok(true)
    }
}

/// `host[:port]`, as `docker login` writes it.
fn name_of(url: &Url) -> String {
    let port = url.port().map(|p| format!(":{p}")).unwrap_or_default();
    format!("{}{port}", url.host_str().unwrap_or_default())
}

async fn sign<S: SignRequest>(
    signer: &S,
    credential: &S::Credential,
    url: &Url,
    headers: &mut HeaderMap,
) -> Result<(), OciError> {
    let setup = |reason: String| OciError::Setup { reason: format!("signing: {reason}") };
    let request = http::Request::get(url.as_str()).body(()).map_err(|e| setup(e.to_string()))?;
    let (mut parts, ()) = request.into_parts();
    let context = reqsign_core::Context::new();
    signer
        .sign_request(&context, &mut parts, Some(credential), None)
        .await
        .map_err(|e| setup(format!("{:?}", e.kind())))?;
    // The client sends its own, which is the same.
    parts.headers.remove(HOST);
    headers.extend(parts.headers);
    Ok(())
}
