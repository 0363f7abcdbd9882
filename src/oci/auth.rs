//! What goes into the Authorization header.
//!
//! A registry says with a 401 how it wants to be spoken to: with Basic credentials, or with a token
//! of a token service. An [`Authenticator`] belongs to one registry. It is asked for the header
//! before each request, and told of each 401:
//!
//! ```text
//! header = auth.authorization(url, scope)        None the first time: the registry must ask
//! answer = send(request, header)
//! if answer is 401: header = auth.challenged(url, scope, answer.headers(), header), send once more
//! ```
//!
//! - A header is made only for addresses of the registry's own scheme, host and port. Credentials go
//!   there and to the token service that the registry names, which must be https if the registry is.
//! - Tokens are kept for each scope. One that will soon expire is replaced in the background while it
//!   is still used; one that is refused with a 401 is replaced once, however many requests it failed.
//! - Credentials can be replaced while requests are under way; tokens of the old ones are forgotten.
//! - No secret is shown by `Debug` or in an error.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use http_auth::{ChallengeParser, ChallengeRef};
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{Client, StatusCode, Url};
use serde::Deserialize;

use super::error::OciError;
use super::http::{body, failed, place, same_origin, status_error};

/// Lifetime of a token that does not tell its own, by the specification of the token service.
const DEFAULT_LIFETIME: Duration = Duration::from_secs(60);

/// A token is replaced when this much of its lifetime is left, or a quarter if that is less.
const EARLY: Duration = Duration::from_secs(60);

/// Longest answer of a token service, in bytes.
const MAX_TOKEN_ANSWER: u64 = 1 << 20;

/// Scopes whose tokens are kept; a registry with more is asked again.
const MAX_TOKENS: usize = 1024;

/// A text that nothing prints.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: impl Into<String>) -> Secret {
        Secret(text.into())
    }

    /// The text itself, for the one place that sends it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// Who we are to a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credentials {
    Anonymous,
    Basic {
        user: String,
        password: Secret,
    },
    /// Sent as it is, as `Bearer`; cannot be refreshed.
    Bearer(Secret),
    /// A refresh token of the token service, which `docker login` calls an identity token.
    Identity(Secret),
}

impl Credentials {
    /// From base64 of `user:password`, as docker and nydusd write it.
    pub fn from_base64(text: &str) -> Result<Credentials, &'static str> {
        use base64::Engine;
        use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};
        let config = GeneralPurposeConfig::new()
            .with_decode_padding_mode(base64::engine::DecodePaddingMode::Indifferent);
        let engine = GeneralPurpose::new(&base64::alphabet::STANDARD, config);
        let bytes = engine.decode(text.trim()).map_err(|_| "it is not base64")?;
        let text = String::from_utf8(bytes).map_err(|_| "it is not UTF-8")?;
        let (user, password) = text.split_once(':').ok_or("it is not user:password")?;
        Ok(Credentials::Basic { user: user.to_owned(), password: Secret::new(password) })
    }
}

/// What a request needs to be allowed, in the token service's words: each item is
/// `repository:NAME:ACTIONS`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Scope(Vec<String>);

impl Scope {
    /// Reading a repository.
    pub fn pull(repository: &str) -> Scope {
        Scope(vec![format!("repository:{repository}:pull")])
    }

    /// Reading and writing a repository.
    pub fn push(repository: &str) -> Scope {
        Scope(vec![format!("repository:{repository}:pull,push")])
    }

    /// Writing `repository` with blobs that are mounted from another one.
    pub fn mount(repository: &str, from: &str) -> Scope {
        let mut scope = Scope::push(repository);
        scope.0.extend(Scope::pull(from).0);
        scope
    }

    /// Nothing but being let in, for requests that name no repository.
    pub fn none() -> Scope {
        Scope(Vec::new())
    }
}

/// The value of an Authorization header.
#[derive(Clone, PartialEq, Eq)]
pub struct Authorization {
    value: HeaderValue,
}

impl fmt::Debug for Authorization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Authorization(…)")
    }
}

impl Authorization {
    fn basic(user: &str, password: &Secret) -> Result<Authorization, &'static str> {
        use base64::Engine;
        if user.contains(':') || user.chars().any(char::is_control) {
            return Err("the user name has a colon or control characters");
        }
        let pair = format!("{user}:{}", password.reveal());
        let code = base64::engine::general_purpose::STANDARD.encode(pair);
        Authorization::from_text(&format!("Basic {code}"))
    }

    fn bearer(token: &Secret) -> Result<Authorization, &'static str> {
        Authorization::from_text(&format!("Bearer {}", token.reveal()))
    }

    fn from_text(text: &str) -> Result<Authorization, &'static str> {
        let mut value =
            HeaderValue::from_str(text).map_err(|_| "the token has control characters")?;
        // Keeps it out of debug output and of HTTP/2's shared header table.
        value.set_sensitive(true);
        Ok(Authorization { value })
    }

    /// Puts it into the headers of a request.
    pub fn apply(&self, headers: &mut HeaderMap) {
        headers.insert(AUTHORIZATION, self.value.clone());
    }
}

/// How the registry wants to be spoken to.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Scheme {
    /// Not known yet: it has not asked.
    Unknown,
    Basic,
    Bearer {
        realm: Url,
        service: Option<String>,
    },
}

#[derive(Clone)]
struct Token {
    authorization: Authorization,
    /// When to replace it.
    renew: Instant,
    expires: Instant,
}

/// All that changes, under one lock that is never held while waiting.
struct State {
    credentials: Credentials,
    scheme: Scheme,
    tokens: HashMap<Scope, Token>,
    /// Scopes whose token is being replaced in the background.
    renewing: HashSet<Scope>,
    /// Counts replacements of the credentials.
    generation: u64,
    /// One for each scope whose token somebody fetches, so that the others wait for it.
    flights: HashMap<Scope, Flight>,
}

/// Held while a token is fetched. Has the failure of the last one who held it, and when that was.
type Flight = Arc<tokio::sync::Mutex<Option<(Instant, OciError)>>>;

/// Makes the headers for one registry. Cheap to clone; clones share everything.
#[derive(Clone)]
pub struct Authenticator {
    inner: Arc<Inner>,
}

struct Inner {
    client: Client,
    registry: Url,
    state: Mutex<State>,
}

impl fmt::Debug for Authenticator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Authenticator({})", self.inner.host())
    }
}

impl Authenticator {
    /// For the registry at `registry`, of which scheme, host and port count. `client` is used to
    /// ask token services; it must follow no redirects.
    pub fn new(client: Client, registry: Url, credentials: Credentials) -> Authenticator {
        let state = State {
            credentials,
            scheme: Scheme::Unknown,
            tokens: HashMap::new(),
            renewing: HashSet::new(),
            generation: 0,
            flights: HashMap::new(),
        };
        Authenticator { inner: Arc::new(Inner { client, registry, state: Mutex::new(state) }) }
    }

    /// Uses other credentials from now on. Requests under way keep what they were given.
    pub fn replace(&self, credentials: Credentials) {
        let mut state = self.inner.state();
        if state.credentials != credentials {
            state.credentials = credentials;
            state.tokens.clear();
            state.generation += 1;
        }
    }

    /// The header for a request to `url` that needs `scope`, as far as it is known what the
    /// registry wants. Waits for a token service only if no valid token is at hand.
    pub async fn authorization(
        &self,
        url: &Url,
        scope: &Scope,
    ) -> Result<Option<Authorization>, OciError> {
        if !same_origin(url, &self.inner.registry) {
            return Ok(None);
        }
        {
            let mut state = self.inner.state();
            match (&state.scheme, &state.credentials) {
                // Without anything to say there is no reason to wait for the question.
                (_, Credentials::Bearer(token)) => return self.fixed(token).map(Some),
                (Scheme::Unknown, _) => return Ok(None),
                (Scheme::Basic, Credentials::Basic { user, password }) => {
                    return self.basic(user, password).map(Some);
                }
                (Scheme::Basic, _) => return Ok(None),
                (Scheme::Bearer { .. }, _) => {}
            }
            let now = Instant::now();
            if let Some(token) = state.tokens.get(scope).filter(|t| now < t.expires).cloned() {
                if now >= token.renew && state.renewing.insert(scope.clone()) {
                    self.renew(scope.clone(), token.authorization.clone());
                }
                return Ok(Some(token.authorization));
            }
        }
        self.fetch(scope, None, None).await.map(Some)
    }

    /// What to answer to a 401 with these headers, to a request that was sent to `url` with `used`.
    /// It makes sense once for each request: a second 401 in a row is a refusal.
    pub async fn challenged(
        &self,
        url: &Url,
        scope: &Scope,
        headers: &HeaderMap,
        used: Option<&Authorization>,
    ) -> Result<Authorization, OciError> {
        if !same_origin(url, &self.inner.registry) {
            let reason = format!("{} wants credentials, which are not for it", place(url));
            return Err(OciError::Denied { host: self.inner.host(), reason });
        }
        let challenge = Challenge::find(headers).map_err(|reason| self.inner.denied(&reason))?;
        let credentials = self.inner.state().credentials.clone();
        match (challenge, credentials) {
            (_, Credentials::Bearer(token)) => {
                let fixed = self.fixed(&token)?;
                match used {
                    // It may be new.
                    Some(used) if *used != fixed => Ok(fixed),
                    None => Ok(fixed),
                    Some(_) => Err(self.inner.denied("the token that was configured is refused")),
                }
            }
            (Challenge::Basic, Credentials::Basic { user, password }) => {
                self.inner.state().scheme = Scheme::Basic;
                let basic = self.basic(&user, &password)?;
                match used {
                    Some(used) if *used == basic => {
                        Err(self.inner.denied(&format!("user {user:?} or the password is wrong")))
                    }
                    _ => Ok(basic),
                }
            }
            (Challenge::Basic, Credentials::Anonymous) => {
                Err(self.inner.denied("it wants a user and a password, none are configured"))
            }
            (Challenge::Basic, Credentials::Identity(_)) => Err(self
                .inner
                .denied("it wants a user and a password, only an identity token is configured")),
            (Challenge::Bearer { realm, service, scope: asked }, _) => {
                let realm = self.inner.realm(&realm)?;
                self.inner.state().scheme = Scheme::Bearer { realm, service };
                self.fetch(scope, asked, used).await
            }
        }
    }

    fn basic(&self, user: &str, password: &Secret) -> Result<Authorization, OciError> {
        Authorization::basic(user, password).map_err(|e| self.inner.denied(e))
    }

    fn fixed(&self, token: &Secret) -> Result<Authorization, OciError> {
        Authorization::bearer(token).map_err(|e| self.inner.denied(e))
    }

    /// Replaces a token that is still valid.
    fn renew(&self, scope: Scope, old: Authorization) {
        let this = self.clone();
        tokio::spawn(async move {
            let fetched = this.fetch(&scope, None, Some(&old)).await;
            let mut state = this.inner.state();
            state.renewing.remove(&scope);
            if let Err(e) = fetched {
                log::debug!("{}: cannot renew a token: {e}", this.inner.host());
                // Not with each request.
                if let Some(token) = state.tokens.get_mut(&scope) {
                    token.renew = Instant::now() + Duration::from_secs(1);
                }
            }
        });
    }

    /// A token that is not `refused`. `asked` is the scope that the registry named.
    async fn fetch(
        &self,
        scope: &Scope,
        asked: Option<String>,
        refused: Option<&Authorization>,
    ) -> Result<Authorization, OciError> {
        let flight = self.inner.state().flights.entry(scope.clone()).or_default().clone();
        // Held while the token is fetched: that is what the others wait for. One who gives up lets
        // the next one try; one who fails has failed for all who waited.
        let since = Instant::now();
        let mut flight = flight.lock().await;
        if let Some((at, error)) = &*flight
            && *at >= since
        {
            return Err(error.clone());
        }
        let (credentials, scheme, generation) = {
            let state = self.inner.state();
            if let Some(token) = state.tokens.get(scope) {
                let fresh = Instant::now() < token.expires;
                if fresh && refused != Some(&token.authorization) {
                    return Ok(token.authorization.clone());
                }
            }
            (state.credentials.clone(), state.scheme.clone(), state.generation)
        };
        let Scheme::Bearer { realm, service } = scheme else {
            return Err(self.inner.denied("it has changed how it wants to be spoken to"));
        };
        let mut scopes: Vec<&str> = scope.0.iter().map(String::as_str).collect();
        if let Some(asked) = &asked {
            scopes.extend(asked.split(' ').filter(|s| !s.is_empty() && !covered(scope, s)));
        }
        let token = self.inner.token(&realm, service.as_deref(), &scopes, &credentials).await;
        let mut state = self.inner.state();
        state.flights.remove(scope);
        let token = token.inspect_err(|e| *flight = Some((Instant::now(), e.clone())))?;
        let authorization = token.authorization.clone();
        // Credentials that were replaced meanwhile must not leave a token behind.
        if state.generation == generation {
            if state.tokens.len() >= MAX_TOKENS {
                let now = Instant::now();
                state.tokens.retain(|_, t| now < t.expires);
                if state.tokens.len() >= MAX_TOKENS {
                    state.tokens.clear();
                }
            }
            state.tokens.insert(scope.clone(), token);
        }
        Ok(authorization)
    }
}

/// Is what the registry asks for part of what we ask for anyway?
fn covered(scope: &Scope, asked: &str) -> bool {
    let Some((name, actions)) = asked.rsplit_once(':') else { return false };
    scope.0.iter().filter_map(|s| s.rsplit_once(':')).any(|(ours, all)| {
        ours == name && actions.split(',').all(|action| all.split(',').any(|a| a == action))
    })
}

/// The answer of a token service.
#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
    /// Seconds.
    expires_in: Option<f64>,
}

impl Inner {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        // Nothing that holds it can panic half-way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn host(&self) -> String {
        let port = self.registry.port().map(|p| format!(":{p}")).unwrap_or_default();
        format!("{}{port}", self.registry.host_str().unwrap_or(""))
    }

    fn denied(&self, reason: &str) -> OciError {
        OciError::Denied { host: self.host(), reason: reason.to_owned() }
    }

    /// The address of the token service. A registry that is reached over TLS must not send our
    /// password over the network in the clear.
    fn realm(&self, text: &str) -> Result<Url, OciError> {
        let realm = self
            .registry
            .join(text)
            .map_err(|_| self.denied("the address of its token service is none"))?;
        match (self.registry.scheme(), realm.scheme()) {
            (_, "https") | ("http", "http") => Ok(realm),
            _ => Err(self.denied(&format!("its token service {} is not https", place(&realm)))),
        }
    }

    /// Asks the token service.
    async fn token(
        &self,
        realm: &Url,
        service: Option<&str>,
        scopes: &[&str],
        credentials: &Credentials,
    ) -> Result<Token, OciError> {
        let what = format!("token service {}", place(realm));
        let mut url = realm.clone();
        let request = if let Credentials::Identity(token) = credentials {
            // A form is written like a query.
            let mut form = realm.clone();
            form.query_pairs_mut()
                .clear()
                .append_pair("grant_type", "refresh_token")
                .append_pair("client_id", "rafsd")
                .append_pair("refresh_token", token.reveal())
                .append_pair("scope", &scopes.join(" "))
                .append_pair("service", service.unwrap_or(""));
            self.client
                .post(url)
                .header("content-type", "application/x-www-form-urlencoded")
                .body(form.query().unwrap_or("").to_owned())
        } else {
            {
                let mut query = url.query_pairs_mut();
                if let Some(service) = service {
                    query.append_pair("service", service);
                }
                for scope in scopes {
                    query.append_pair("scope", scope);
                }
            }
            let mut headers = HeaderMap::new();
            if let Credentials::Basic { user, password } = credentials {
                let basic = Authorization::basic(user, password).map_err(|e| self.denied(e))?;
                basic.apply(&mut headers);
            }
            self.client.get(url).headers(headers)
        };
        let asked_at = Instant::now();
        let answer = request.send().await.map_err(|e| failed(&what, &e))?;
        match answer.status() {
            StatusCode::OK => {}
            s if s.is_redirection() => {
                let reason = "it redirects, and credentials are not sent elsewhere".to_owned();
                return Err(OciError::Protocol { what, reason });
            }
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::BAD_REQUEST => {
                let why = status_error(answer, &what).await;
                return Err(self.denied(&why.to_string()));
            }
            _ => return Err(status_error(answer, &what).await),
        }
        let bytes = body(answer, &what, MAX_TOKEN_ANSWER).await?;
        // Serde's message could quote the token.
        let bad = |reason: &str| OciError::Protocol { what: what.clone(), reason: reason.into() };
        let answer: TokenAnswer =
            serde_json::from_slice(&bytes).map_err(|_| bad("its answer is not what it must be"))?;
        let token = answer.token.or(answer.access_token).filter(|t| !t.is_empty());
        let token = Secret::new(token.ok_or_else(|| bad("its answer has no token"))?);
        let authorization = Authorization::bearer(&token).map_err(bad)?;
        let lifetime = answer
            .expires_in
            .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
            .filter(|lifetime| !lifetime.is_zero())
            .unwrap_or(DEFAULT_LIFETIME)
            .min(Duration::from_secs(24 * 3600));
        let expires = asked_at + lifetime;
        Ok(Token { authorization, renew: expires - EARLY.min(lifetime / 4), expires })
    }
}

/// What a registry asks for with a 401.
#[derive(Debug, PartialEq, Eq)]
enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

impl Challenge {
    /// The best of those in the headers: Bearer before Basic.
    fn find(headers: &HeaderMap) -> Result<Challenge, String> {
        let mut basic = false;
        let mut others = Vec::new();
        for value in headers.get_all(WWW_AUTHENTICATE) {
            let Ok(text) = value.to_str() else { continue };
            // The parser knows no schemes that put a bare token behind their name, and ends there.
            for challenge in ChallengeParser::new(text) {
                let Ok(challenge) = challenge else {
                    others.push("something that cannot be read".to_owned());
                    break;
                };
                if challenge.scheme.eq_ignore_ascii_case("bearer") {
                    if let Some(realm) = parameter(&challenge, "realm").filter(|r| !r.is_empty()) {
                        return Ok(Challenge::Bearer {
                            realm,
                            service: parameter(&challenge, "service"),
                            scope: parameter(&challenge, "scope"),
                        });
                    }
                    others.push("Bearer without a realm".to_owned());
                } else if challenge.scheme.eq_ignore_ascii_case("basic") {
                    basic = true;
                } else {
                    others.push(challenge.scheme.chars().take(40).collect());
                }
            }
        }
        match (basic, others.is_empty()) {
            (true, _) => Ok(Challenge::Basic),
            (false, true) => Err("HTTP status 401, without saying what it wants".to_owned()),
            (false, false) => Err(format!("it wants {}, not Basic or Bearer", others.join(", "))),
        }
    }
}

fn parameter(challenge: &ChallengeRef<'_>, name: &str) -> Option<String> {
    let (_, value) = challenge.params.iter().find(|(n, _)| n.eq_ignore_ascii_case(name))?;
    Some(value.to_unescaped())
}

#[cfg(test)]
mod tests;
