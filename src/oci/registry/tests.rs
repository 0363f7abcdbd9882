//! Odd answers, which a real registry does not give when asked to. What a real one does is tested in
//! `guest-tests/oci_registry.rs`.

use super::*;
use std::collections::VecDeque;
use std::sync::Mutex;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::Response as Answer;
use sha2::Digest as _;

use crate::oci::auth::Secret;
use crate::oci::image::collect;
use crate::oci::manifest::{OCI_CONFIG, OCI_MANIFEST};
use crate::oci::reference::Reference;

/// A request as the server saw it.
#[derive(Clone, Debug)]
struct Seen {
    method: String,
    path: String,
    range: Option<String>,
    authorization: Option<String>,
    body: Bytes,
}

type Reply = Box<dyn FnOnce(&Seen) -> Answer<Body> + Send>;

/// A server that gives the answers it was told, in turn.
#[derive(Clone, Default)]
struct Script {
    replies: Arc<Mutex<VecDeque<Reply>>>,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Script {
    fn then(self, reply: impl FnOnce(&Seen) -> Answer<Body> + Send + 'static) -> Script {
        self.replies.lock().unwrap().push_back(Box::new(reply));
        self
    }

    fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    /// Starts the server; gives its host and port.
    async fn start(&self) -> String {
        let app = Router::new().fallback(answer).with_state(self.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        tokio::spawn(async move { axum::serve(listener, app).await });
        host
    }

    async fn repository(&self, credentials: Credentials) -> Repository {
        let reference = format!("{}/a/b:t", self.start().await);
        let Reference::Registry(name) = reference.parse().unwrap() else { panic!("a registry") };
        let access = Access { credentials: Some(credentials), ..Access::default() };
        Repository::connect(&name, &access).await.unwrap()
    }
}

async fn answer(State(script): State<Script>, request: Request) -> Answer<Body> {
    let (parts, body) = request.into_parts();
    let header = |name: &str| parts.headers.get(name).map(|v| v.to_str().unwrap().to_owned());
    let (range, authorization) = (header("range"), header("authorization"));
    let (method, path) = (parts.method.to_string(), parts.uri.to_string());
    let body = axum::body::to_bytes(body, usize::MAX).await.unwrap_or_default();
    let seen = Seen { method, path, range, authorization, body };
    script.seen.lock().unwrap().push(seen.clone());
    let reply = script.replies.lock().unwrap().pop_front();
    match reply {
        Some(reply) => reply(&seen),
        None => panic!("nothing to answer to {seen:?}"),
    }
}

fn status(status: u16, headers: &[(&str, &str)], body: impl Into<Body>) -> Answer<Body> {
    let mut builder = Answer::builder().status(status);
    for (name, value) in headers {
        builder = builder.header(*name, *value);
    }
    builder.body(body.into()).unwrap()
}

/// An answer that promises `bytes` and breaks off after `sent` of them.
fn broken(code: u16, headers: &[(&str, &str)], bytes: &'static [u8], sent: usize) -> Answer<Body> {
    let sent = Bytes::from_static(&bytes[..sent]);
    let pieces = stream::once(async { Ok(sent) }).chain(stream::once(async {
        // What was sent before must be on its way.
        tokio::time::sleep(Duration::from_millis(100)).await;
        Err(std::io::Error::other("cut"))
    }));
    let length = bytes.len().to_string();
    let mut headers = headers.to_vec();
    headers.push(("content-length", &length));
    status(code, &headers, Body::from_stream(pieces))
}

const DATA: &[u8] = b"0123456789abcdef";

fn data() -> Descriptor {
    Descriptor::of(OCI_CONFIG, DATA)
}

#[tokio::test]
async fn a_blob_that_breaks_off_goes_on_where_it_was() {
    let script = Script::default()
        .then(|_| broken(200, &[], DATA, 5))
        .then(|_| status(503, &[("retry-after", "0")], ""))
        .then(|_| broken(206, &[("content-range", "bytes 5-15/16")], &DATA[5..], 4))
        // And one that has forgotten what a range is.
        .then(|_| status(200, &[], DATA));
    let repository = script.repository(Credentials::Anonymous).await;
    assert_eq!(collect(repository.blob(&data())).await.unwrap(), DATA);
    let ranges: Vec<_> = script.seen().into_iter().map(|s| s.range.unwrap()).collect();
    assert_eq!(ranges, ["bytes=0-15", "bytes=5-15", "bytes=5-15", "bytes=9-15"]);
}

#[tokio::test]
async fn a_blob_is_believed_only_if_all_of_it_is_right() {
    type Make = fn() -> Answer<Body>;
    // (answer, part of the message)
    let cases: [(Make, &str); 6] = [
        (|| status(200, &[], &b"0123456789abcdeX"[..]), "does not match its digest"),
        (|| status(200, &[], &b"0123456789abcdefX"[..]), "17 bytes instead of 16"),
        (|| status(206, &[("content-range", "bytes 1-16/17")], DATA), "others came"),
        (|| status(206, &[], DATA), "others came"),
        (|| status(404, &[], r#"{"errors":[{"code":"BLOB_UNKNOWN","message":"gone"}]}"#), "gone"),
        (|| status(403, &[], ""), "denies access"),
    ];
    for (make, message) in cases {
        let script = Script::default().then(move |_| make());
        let repository = script.repository(Credentials::Anonymous).await;
        let error = collect(repository.blob(&data())).await.unwrap_err().to_string();
        assert!(error.contains(message), "{message}: {error}");
        assert_eq!(script.seen().len(), 1, "{message}: nothing is gained by asking again");
    }
}

#[tokio::test]
async fn part_of_a_blob_has_as_many_bytes_as_were_asked_for() {
    let script = Script::default()
        .then(|_| status(206, &[("content-range", "bytes 3-8/16")], &DATA[3..9]))
        .then(|_| status(200, &[], DATA));
    let repository = script.repository(Credentials::Anonymous).await;
    for _ in 0..2 {
        let part = collect(repository.blob_range(&data().digest, 3..9)).await.unwrap();
        assert_eq!(part, &DATA[3..9]);
    }
}

#[tokio::test]
async fn credentials_do_not_follow_a_redirect() {
    let store = Script::default().then(|_| status(200, &[], DATA));
    let address = format!("http://{}/object?signature=s3cret", store.start().await);
    let script = Script::default()
        .then(|_| status(401, &[("www-authenticate", "Basic realm=x")], ""))
        .then(move |_| status(307, &[("location", &address)], ""));
    let basic = Credentials::Basic { user: "u".into(), password: Secret::new("p") };
    let repository = script.repository(basic).await;
    assert_eq!(collect(repository.blob(&data())).await.unwrap(), DATA);
    let at_registry: Vec<_> = script.seen().into_iter().map(|s| s.authorization).collect();
    assert_eq!(at_registry, [None, Some("Basic dTpw".to_owned())]);
    assert_eq!(store.seen()[0].authorization, None);
    assert_eq!(store.seen()[0].path, "/object?signature=s3cret");
}

#[tokio::test]
async fn redirects_in_a_circle_end() {
    let mut script = Script::default();
    for _ in 0..=MAX_REDIRECTS {
        script = script.then(|seen| status(302, &[("location", &seen.path.clone())], ""));
    }
    let repository = script.repository(Credentials::Anonymous).await;
    let error = collect(repository.blob(&data())).await.unwrap_err().to_string();
    assert!(error.contains("more than 5 redirects"), "{error}");
}

#[tokio::test]
async fn a_manifest_must_have_its_digest_and_be_short() {
    let wrong = Digest::sha256(b"other").to_string();
    let typed = ("content-type", OCI_MANIFEST);
    // (reference, answer, message)
    let cases: [(&str, Answer<Body>, &str); 4] = [
        (&wrong, status(200, &[typed], "{}"), "does not match its digest"),
        ("t", status(200, &[typed, ("docker-content-digest", &wrong)], "{}"), "does not match"),
        ("t", status(200, &[], "{}"), "no Content-Type"),
        ("t", status(418, &[typed], "tea"), "HTTP status 418: tea"),
    ];
    for (reference, answer, message) in cases {
        let mut script = Script::default();
        let (code, headers) = (answer.status(), answer.headers().clone());
        let body = axum::body::to_bytes(answer.into_body(), 1 << 20).await.unwrap();
        // What may be damage on the way is tried again.
        for _ in 0..ATTEMPTS {
            let (headers, body) = (headers.clone(), body.clone());
            script = script.then(move |_| {
                let mut answer = Answer::new(Body::from(body));
                *answer.status_mut() = code;
                *answer.headers_mut() = headers;
                answer
            });
        }
        let repository = script.repository(Credentials::Anonymous).await;
        let error = repository.manifest(reference).await.unwrap_err().to_string();
        assert!(error.contains(message), "{message}: {error}");
    }
    let script = Script::default()
        .then(move |_| status(200, &[typed], b" ".repeat((4 << 20) + 1)))
        .then(move |_| status(200, &[("content-type", "Application/X; charset=utf-8")], "{}"))
        .then(move |_| status(404, &[], ""));
    let repository = script.repository(Credentials::Anonymous).await;
    let error = repository.manifest("t").await.unwrap_err();
    assert!(matches!(error, OciError::TooLarge { .. }), "{error}");
    let stored = repository.manifest("t").await.unwrap().unwrap();
    assert_eq!(stored.descriptor, Descriptor::of("application/x", b"{}"));
    assert!(repository.manifest("t").await.unwrap().is_none());
}

#[tokio::test]
async fn an_upload_goes_on_from_what_has_arrived() {
    let script = Script::default()
        .then(|_| status(202, &[("location", "/up?s=0")], ""))
        .then(|_| status(202, &[("location", "/up?s=1"), ("range", "0-3")], ""))
        // Of the next piece, three bytes arrive.
        .then(|_| status(500, &[], ""))
        .then(|_| status(204, &[("location", "/up?s=2"), ("range", "0-6")], ""))
        .then(|_| status(202, &[("location", "/up?s=3"), ("range", "0-9")], ""))
        .then(|_| status(201, &[], ""));
    let repository = script.repository(Credentials::Anonymous).await;
    let mut upload = repository.upload().await.unwrap();
    upload.write(Bytes::from_static(&DATA[..4])).await.unwrap();
    upload.write(Bytes::from_static(&DATA[4..10])).await.unwrap();
    assert_eq!(upload.sent(), 10);
    upload.finish(&data().digest).await.unwrap();
    let seen: Vec<_> = script
        .seen()
        .into_iter()
        .map(|s| format!("{} {} {}", s.method, s.path, String::from_utf8_lossy(&s.body)))
        .collect();
    let digest = data().digest.to_string().replace(':', "%3A");
    assert_eq!(
        seen,
        [
            "POST /v2/a/b/blobs/uploads/ ".to_owned(),
            "PATCH /up?s=0 0123".to_owned(),
            "PATCH /up?s=1 456789".to_owned(),
            "GET /up?s=1 ".to_owned(),
            "PATCH /up?s=2 789".to_owned(),
            format!("PUT /up?s=3&digest={digest} "),
        ]
    );
}

#[tokio::test]
async fn an_upload_that_cannot_go_on_says_so() {
    let begin = || status(202, &[("location", "/up")], "");
    let arrived = || status(202, &[("location", "/up"), ("range", "0-3")], "");
    type Make = fn() -> Answer<Body>;
    // (answer to the second piece, to the question how much has arrived, message)
    let cases: [(Make, Option<Make>, &str); 4] = [
        (|| status(400, &[], "bad piece"), None, "bad piece"),
        (|| status(202, &[("location", "/up"), ("range", "0-7")], ""), None, "the registry has 8"),
        (|| status(500, &[], ""), Some(|| status(404, &[], "")), "cannot go on"),
        (
            || status(500, &[], ""),
            Some(|| status(204, &[("location", "/up"), ("range", "0-1")], "")),
            "the registry has 2 bytes, 4 were sent",
        ),
    ];
    for (second, question, message) in cases {
        let mut script = Script::default()
            .then(move |_| begin())
            .then(move |_| arrived())
            .then(move |_| second());
        if let Some(question) = question {
            script = script.then(move |_| question());
        }
        let repository = script.repository(Credentials::Anonymous).await;
        let mut upload = repository.upload().await.unwrap();
        upload.write(Bytes::from_static(&DATA[..4])).await.unwrap();
        let error = upload.write(Bytes::from_static(&DATA[4..10])).await.unwrap_err().to_string();
        assert!(error.contains(message), "{message}: {error}");
    }
}

#[tokio::test]
async fn a_token_that_expires_in_the_middle_is_replaced() {
    let bearer = r#"Bearer realm="/token",service="s",scope="repository:a/b:pull""#;
    let refuse = move |_: &Seen| status(401, &[("www-authenticate", bearer)], "");
    let token = |n: u32| {
        move |_: &Seen| status(200, &[], format!(r#"{{"token":"t{n}","expires_in":600}}"#))
    };
    let script = Script::default()
        .then(refuse)
        .then(token(1))
        .then(|_| broken(200, &[], DATA, 5))
        .then(refuse)
        .then(token(2))
        .then(|_| status(206, &[("content-range", "bytes 5-15/16")], &DATA[5..]));
    let repository = script.repository(Credentials::Anonymous).await;
    assert_eq!(collect(repository.blob(&data())).await.unwrap(), DATA);
    let used: Vec<_> = script.seen().into_iter().map(|s| s.authorization).collect();
    let t = |n: u32| Some(format!("Bearer t{n}"));
    assert_eq!(used, [None, None, t(1), t(1), None, t(2)]);
}

#[tokio::test]
async fn a_mount_that_is_refused_is_not_an_error() {
    let from = match "127.0.0.1/other:1".parse().unwrap() {
        Reference::Registry(name) => name,
        _ => panic!("a registry"),
    };
    let script = Script::default()
        .then(|_| status(201, &[], ""))
        .then(|_| status(202, &[("location", "/up")], ""))
        .then(|_| status(204, &[], ""))
        .then(|_| status(405, &[], ""));
    let repository = script.repository(Credentials::Anonymous).await;
    let digest = data().digest;
    let mut results = Vec::new();
    for _ in 0..3 {
        results.push(repository.mount(&digest, &from).await.unwrap());
    }
    assert_eq!(results, [true, false, false]);
    let seen = script.seen();
    let path =
        format!("/v2/a/b/blobs/uploads/?mount={digest}&from=other").replace("256:", "256%3A");
    assert_eq!((seen[0].method.as_str(), seen[0].path.as_str()), ("POST", path.as_str()));
    assert_eq!(seen[2].method, "DELETE", "the upload that was begun instead is given up");
}

#[tokio::test]
async fn referrers_are_found_without_the_api_too() {
    let index = |n: u8| {
        let digest = Digest::from_sha256(sha2::Sha256::digest([n]).into());
        format!(
            r#"{{"schemaVersion":2,"mediaType":"{OCI_INDEX}","manifests":[
            {{"mediaType":"{OCI_MANIFEST}","digest":"{digest}","size":1}}]}}"#
        )
    };
    let typed = ("content-type", OCI_INDEX);
    let (one, two) = (index(1), index(2));
    let script = Script::default()
        .then(move |_| status(200, &[typed], one))
        .then(|_| status(404, &[], ""))
        .then(move |_| status(200, &[typed], two))
        .then(|_| status(404, &[], ""))
        .then(|_| status(404, &[], ""));
    let repository = script.repository(Credentials::Anonymous).await;
    let mut found = Vec::new();
    for _ in 0..3 {
        found.push(repository.referrers(&data().digest).await.unwrap().manifests.len());
    }
    assert_eq!(found, [1, 1, 0]);
    let tag = data().digest.to_string().replace(':', "-");
    assert_eq!(script.seen()[2].path, format!("/v2/a/b/manifests/{tag}"));
}

#[tokio::test]
async fn a_host_that_does_not_exist_is_named() {
    let Reference::Registry(name) = "127.0.0.1:1/a:b".parse().unwrap() else {
        panic!("a registry")
    };
    let access = Access { credentials: Some(Credentials::Anonymous), ..Access::default() };
    let repository = Repository::connect(&name, &access).await.unwrap();
    let blob = repository.url("blobs/x").unwrap();
    let error = repository.fetch(Method::GET, blob, HeaderMap::new(), "blob x").await.unwrap_err();
    assert!(error.to_string().contains("cannot connect"), "{error}");
    assert!(error.retryable());
}
