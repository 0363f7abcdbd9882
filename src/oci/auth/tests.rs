//! The token flow, against a token service of our own that counts what it is asked.

use super::*;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::Router;
use axum::extract::{Query, State};
use axum::http::HeaderMap as Headers;
use axum::response::IntoResponse;
use axum::routing::{get, post};

use crate::oci::http::{HttpOptions, client};

/// What the token service has seen, and how it answers.
#[derive(Default)]
struct Service {
    asked: AtomicU64,
    seen: Mutex<Vec<(Vec<String>, Option<String>)>>,
    lifetime: f64,
    status: u16,
    delay: Duration,
}

type Shared = Arc<Service>;

async fn token(
    State(service): State<Shared>,
    Query(query): Query<Vec<(String, String)>>,
    headers: Headers,
) -> axum::response::Response {
    let number = service.asked.fetch_add(1, Ordering::SeqCst) + 1;
    let scopes = query.into_iter().filter(|(name, _)| name == "scope").map(|(_, v)| v).collect();
    let user = headers.get("authorization").map(|v| v.to_str().unwrap().to_owned());
    service.seen.lock().unwrap().push((scopes, user));
    tokio::time::sleep(service.delay).await;
    if service.status != 0 {
        let status = axum::http::StatusCode::from_u16(service.status).unwrap();
        return (status, [("retry-after", "7")], "no").into_response();
    }
    let body = format!(r#"{{"token":"t{number}","expires_in":{}}}"#, service.lifetime);
    ([("content-type", "application/json")], body).into_response()
}

async fn oauth(State(service): State<Shared>, body: String) -> String {
    service.seen.lock().unwrap().push((vec![body], None));
    r#"{"access_token":"fresh"}"#.to_owned()
}

/// Starts a token service; gives its address.
async fn start(service: Service) -> (Shared, Url) {
    let service = Arc::new(service);
    let app = Router::new()
        .route("/token", get(token))
        .route("/oauth", post(oauth))
        .with_state(service.clone());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = Url::parse(&format!("http://{}/", listener.local_addr().unwrap())).unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await });
    (service, url)
}

fn authenticator(base: &Url, credentials: Credentials) -> Authenticator {
    Authenticator::new(client(&HttpOptions::default()).unwrap(), base.clone(), credentials)
}

fn basic() -> Credentials {
    Credentials::Basic { user: "u".into(), password: Secret::new("p") }
}

fn challenge(text: &str) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(WWW_AUTHENTICATE, text.parse().unwrap());
    headers
}

fn bearer(path: &str) -> HeaderMap {
    challenge(&format!(r#"Bearer realm="{path}",service="s",scope="repository:a:pull""#))
}

fn shown(authorization: &Authorization) -> &str {
    authorization.value.to_str().unwrap()
}

const HOUR: f64 = 3600.0;

#[tokio::test]
async fn a_token_is_fetched_when_asked_for_and_kept_for_its_scope() {
    let (service, base) = start(Service { lifetime: HOUR, ..Service::default() }).await;
    let auth = authenticator(&base, basic());
    let (a, b) = (Scope::pull("a"), Scope::mount("b", "a"));
    assert!(auth.authorization(&base, &a).await.unwrap().is_none());
    let first = auth.challenged(&base, &a, &bearer("/token"), None).await.unwrap();
    assert_eq!(shown(&first), "Bearer t1");
    assert_eq!(auth.authorization(&base, &a).await.unwrap(), Some(first));
    let other = auth.authorization(&base, &b).await.unwrap().unwrap();
    assert_eq!(shown(&other), "Bearer t2");
    let user = Some("Basic dTpw".to_owned());
    let scopes = |texts: &[&str]| texts.iter().map(|&t| t.to_owned()).collect::<Vec<_>>();
    assert_eq!(
        *service.seen.lock().unwrap(),
        [
            (scopes(&["repository:a:pull"]), user.clone()),
            (scopes(&["repository:b:pull,push", "repository:a:pull"]), user),
        ]
    );
}

#[tokio::test]
async fn what_the_registry_asks_for_beyond_our_scope_is_asked_for_too() {
    let (service, base) = start(Service { lifetime: HOUR, ..Service::default() }).await;
    let auth = authenticator(&base, Credentials::Anonymous);
    let wide = challenge(
        r#"Bearer realm="/token",scope="repository:a:pull,push repository:a:pull registry:catalog:*""#,
    );
    auth.challenged(&base, &Scope::pull("a"), &wide, None).await.unwrap();
    let seen = service.seen.lock().unwrap();
    assert_eq!(seen[0].0, ["repository:a:pull", "repository:a:pull,push", "registry:catalog:*"]);
    assert_eq!(seen[0].1, None);
}

#[tokio::test]
async fn a_refused_token_is_replaced_once_for_all_who_used_it() {
    let delay = Duration::from_millis(100);
    let (service, base) = start(Service { lifetime: HOUR, delay, ..Service::default() }).await;
    let auth = authenticator(&base, basic());
    let scope = Scope::pull("a");
    let old = auth.challenged(&base, &scope, &bearer("/token"), None).await.unwrap();
    let headers = bearer("/token");
    let all = (0..50).map(|_| auth.challenged(&base, &scope, &headers, Some(&old)));
    for new in futures_util::future::join_all(all).await {
        assert_eq!(shown(&new.unwrap()), "Bearer t2");
    }
    assert_eq!(service.asked.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_token_is_renewed_before_it_expires_without_anybody_waiting() {
    let (service, base) = start(Service { lifetime: HOUR, ..Service::default() }).await;
    let auth = authenticator(&base, basic());
    let scope = Scope::pull("a");
    let old = auth.challenged(&base, &scope, &bearer("/token"), None).await.unwrap();
    // Three quarters of its life have passed, and it is still good.
    auth.inner.state().tokens.get_mut(&scope).unwrap().renew = Instant::now();
    for _ in 0..10 {
        auth.authorization(&base, &scope).await.unwrap().unwrap();
    }
    let limit = Instant::now() + Duration::from_secs(60);
    while auth.authorization(&base, &scope).await.unwrap().as_ref() == Some(&old) {
        assert!(Instant::now() < limit, "the token is not renewed");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(service.asked.load(Ordering::SeqCst) >= 2);
}

#[tokio::test]
async fn an_expired_token_is_not_used() {
    let (_, base) = start(Service { lifetime: 0.05, ..Service::default() }).await;
    let auth = authenticator(&base, basic());
    let scope = Scope::pull("a");
    let old = auth.challenged(&base, &scope, &bearer("/token"), None).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_ne!(auth.authorization(&base, &scope).await.unwrap(), Some(old));
}

#[tokio::test]
async fn new_credentials_forget_the_tokens_of_the_old_ones() {
    let (service, base) = start(Service { lifetime: HOUR, ..Service::default() }).await;
    let auth = authenticator(&base, Credentials::Anonymous);
    let scope = Scope::pull("a");
    auth.challenged(&base, &scope, &bearer("/token"), None).await.unwrap();
    auth.replace(Credentials::Anonymous);
    auth.authorization(&base, &scope).await.unwrap();
    assert_eq!(service.asked.load(Ordering::SeqCst), 1, "nothing has changed");
    auth.replace(basic());
    auth.authorization(&base, &scope).await.unwrap();
    assert_eq!(service.seen.lock().unwrap()[1].1.as_deref(), Some("Basic dTpw"));
}

#[tokio::test]
async fn credentials_go_to_the_registry_only() {
    let (service, base) = start(Service { lifetime: HOUR, ..Service::default() }).await;
    let scope = Scope::pull("a");
    let elsewhere = ["http://127.0.0.1:1/", "https://127.0.0.1/", "http://store.example/x"];
    for credentials in [basic(), Credentials::Bearer(Secret::new("fixed"))] {
        let auth = authenticator(&base, credentials);
        auth.challenged(&base, &scope, &challenge("Basic realm=x"), None).await.unwrap();
        assert!(auth.authorization(&base, &scope).await.unwrap().is_some());
        for url in elsewhere.map(|u| Url::parse(u).unwrap()) {
            assert_eq!(auth.authorization(&url, &scope).await.unwrap(), None, "{url}");
            auth.challenged(&url, &scope, &challenge("Basic realm=x"), None).await.unwrap_err();
        }
    }
    // A registry behind TLS must not name a token service that is not.
    let secure = Url::parse("https://r.example/").unwrap();
    let auth = authenticator(&secure, basic());
    let headers = bearer(base.join("token").unwrap().as_str());
    let error = auth.challenged(&secure, &scope, &headers, None).await.unwrap_err();
    assert!(error.to_string().contains("not https"), "{error}");
    assert_eq!(service.asked.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn an_identity_token_is_exchanged_in_a_form() {
    let (service, base) = start(Service::default()).await;
    let auth = authenticator(&base, Credentials::Identity(Secret::new("i&t")));
    let got = auth.challenged(&base, &Scope::push("a"), &bearer("/oauth"), None).await.unwrap();
    assert_eq!(shown(&got), "Bearer fresh");
    assert_eq!(
        service.seen.lock().unwrap()[0].0[0],
        "grant_type=refresh_token&client_id=rafsd&refresh_token=i%26t\
         &scope=repository%3Aa%3Apull%2Cpush&service=s"
    );
}

#[tokio::test]
async fn refusals_say_who_refused_and_failures_may_pass() {
    let scope = Scope::pull("a");
    // (status, may pass)
    for (status, retryable) in [(401, false), (403, false), (400, false), (503, true), (429, true)]
    {
        let delay = Duration::from_millis(50);
        let (service, base) = start(Service { status, delay, ..Service::default() }).await;
        let auth = authenticator(&base, basic());
        let headers = bearer("/token");
        let all = (0..8).map(|_| auth.challenged(&base, &scope, &headers, None));
        for result in futures_util::future::join_all(all).await {
            let error = result.unwrap_err();
            assert_eq!(error.retryable(), retryable, "{status}: {error}");
            assert!(error.to_string().contains("token service 127.0.0.1"), "{error}");
            if retryable {
                assert_eq!(error.retry_after(), Some(Duration::from_secs(7)));
            }
        }
        assert_eq!(service.asked.load(Ordering::SeqCst), 1, "one failure is all waiters'");
    }
}

#[tokio::test]
async fn a_second_refusal_of_the_same_credentials_is_final() {
    let base = Url::parse("http://127.0.0.1:1/").unwrap();
    let scope = Scope::none();
    let cases = [
        (basic(), "Basic realm=x", r#"user "u" or the password is wrong"#),
        (Credentials::Bearer(Secret::new("t")), r#"Bearer realm="/token""#, "is refused"),
    ];
    for (credentials, text, message) in cases {
        let auth = authenticator(&base, credentials);
        let used = auth.challenged(&base, &scope, &challenge(text), None).await.unwrap();
        let again = auth.challenged(&base, &scope, &challenge(text), Some(&used)).await;
        let error = again.unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
    let anonymous = authenticator(&base, Credentials::Anonymous);
    for (text, message) in [
        ("Basic realm=x", "none are configured"),
        ("Negotiate", "it wants Negotiate, not Basic or Bearer"),
        ("Basic realm=x, Negotiate abc", "none are configured"),
        ("Bearer service=x", "Bearer without a realm"),
        ("=", "cannot be read"),
    ] {
        let result = anonymous.challenged(&base, &scope, &challenge(text), None).await;
        let error = result.expect_err(text).to_string();
        assert!(error.contains(message), "{text}: {error}");
    }
}

#[test]
fn nothing_prints_a_secret() {
    let secret = || Secret::new("hush");
    let shown = format!(
        "{:?} {:?} {:?} {:?} {:?}",
        Credentials::Basic { user: "u".into(), password: secret() },
        Credentials::Bearer(secret()),
        Credentials::Identity(secret()),
        Authorization::bearer(&secret()).unwrap(),
        authenticator(&Url::parse("http://u:hush@h/").unwrap(), Credentials::Bearer(secret())),
    );
    assert!(!shown.contains("hush"), "{shown}");
    let mut headers = HeaderMap::new();
    Authorization::bearer(&secret()).unwrap().apply(&mut headers);
    assert!(!format!("{headers:?}").contains("hush"));
}

#[test]
fn base64_of_user_and_password() {
    let good = Credentials::Basic { user: "a".into(), password: Secret::new("b:c") };
    for text in ["YTpiOmM=", "YTpiOmM", " YTpiOmM=\n"] {
        assert_eq!(Credentials::from_base64(text), Ok(good.clone()), "{text}");
    }
    for (bad, reason) in [("!", "not base64"), ("YQ==", "not user:password"), ("/w==", "UTF-8")] {
        assert!(Credentials::from_base64(bad).unwrap_err().contains(reason), "{bad}");
    }
}
