//! The HTTP API on a unix socket: nydusd's paths, JSON and status codes, to the letter.
//!
//! Connections are never closed for being idle: nydus-snapshotter holds one open for as long as a
//! daemon lives, and takes its end for a crash. Each answer with a status of 400 or more carries
//! `{"code": …, "message": …}`, because clients parse it without looking. Handlers read or set shared
//! state; the one thing that may take long, opening an image, has a thread and a time limit of its
//! own (`mount`), so that nothing else waits for it.

mod config;
mod details;
mod handover;
mod metrics;
mod mount;
mod query;
mod transport;

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State as Shared};
use axum::http::header::{CONTENT_TYPE, HeaderValue, SERVER};
use axum::http::{Method, StatusCode};
use axum::response::Response;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use self::query::Query;
use self::transport::Limited;
use super::state::{Status, StopReason};

/// Longest body in bytes; configs with certificates are long.
const MAX_BODY: usize = 4 << 20;

/// What handlers share.
pub struct Api {
    status: Arc<Status>,
    opening: mount::Opening,
}

/// Serves the API on `listener` until `stop` is ready and the requests under way are answered.
///
/// # Errors
///
/// The listener cannot be used with the runtime. Failing connections are no error.
pub async fn serve(
    listener: UnixListener,
    status: Arc<Status>,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let api = Api { status, opening: mount::Opening::default() };
    let router = Router::new().fallback(answer).with_state(Arc::new(api));
    axum::serve(Limited::new(listener)?, router).with_graceful_shutdown(stop).await
}

/// What goes wrong with a request: status and message.
#[derive(Debug)]
struct ApiError(StatusCode, String);

type Answer = Result<Response, ApiError>;

async fn answer(Shared(api): Shared<Arc<Api>>, request: Request) -> Response {
    let (method, uri) = (request.method().clone(), request.uri().clone());
    let mut response = route(&api, request).await.unwrap_or_else(|ApiError(code, message)| {
        log::warn!("api: {method} {} failed: {message}", uri.path());
        #[derive(Serialize)]
        struct ErrorBody {
            code: &'static str,
            message: String,
        }
        json(code, &ErrorBody { code: "UNDEFINED", message })
    });
    log::debug!("api: {method} {}: {}", uri.path(), response.status().as_u16());
    response.headers_mut().insert(SERVER, HeaderValue::from_static("Nydus API"));
    response
}

/// Paths that are known; other methods than those in [`route`] are refused.
const PATHS: [&str; 18] = [
    "/metrics",
    "/api/v1/daemon",
    "/api/v2/daemon",
    "/api/v1/daemon/exit",
    "/api/v1/daemon/start",
    "/api/v1/daemon/events",
    "/api/v1/daemon/backend",
    "/api/v1/daemon/fuse/sendfd",
    "/api/v1/daemon/fuse/takeover",
    "/api/v1/mount",
    "/api/v1/config",
    "/api/v1/metrics",
    "/api/v1/metrics/files",
    "/api/v1/metrics/pattern",
    "/api/v1/metrics/backend",
    "/api/v1/metrics/blobcache",
    "/api/v1/metrics/inflight",
    "/api/v2/blobs",
];

async fn route(api: &Arc<Api>, request: Request) -> Answer {
    let (parts, body) = request.into_parts();
    let body = axum::body::to_bytes(body, MAX_BODY)
        .await
        .map_err(|e| bad_request(format!("body cannot be read, or is too long: {e}")))?;
    let query = Query::new(parts.uri.query());
    let status = &*api.status;
    let path = parts.uri.path();
    match (path, &parts.method) {
        ("/api/v1/daemon", &Method::GET) => info(status, true, &body),
        ("/api/v2/daemon", &Method::GET) => info(status, false, &body),
        ("/api/v1/daemon" | "/api/v2/daemon", &Method::PUT) => configure(&body),
        ("/api/v1/daemon/exit", &Method::PUT) => exit(status, &body),
        ("/api/v1/daemon/start", &Method::PUT) => handover::start(&api.status, &body).await,
        ("/api/v1/mount", &Method::POST) => mount::mount(api, &query, &body).await,
        ("/api/v1/mount", &Method::PUT) => mount::remount(api, &query, &body).await,
        ("/api/v1/mount", &Method::DELETE) => mount::unmount(status, &query, &body).await,
        ("/api/v1/daemon/events", &Method::GET) => details::events(status, &body),
        ("/api/v1/daemon/backend", &Method::GET) => details::backend(status, &query, &body),
        ("/api/v1/daemon/fuse/sendfd", &Method::PUT) => handover::send_fd(&api.status, &body).await,
        ("/api/v1/daemon/fuse/takeover", &Method::PUT) => {
            handover::take_over(&api.status, &body).await
        }
        ("/api/v1/config", &Method::GET) => config::get(status, &query, &body),
        ("/api/v1/config", &Method::PUT) => config::put(status, &query, &body),
        ("/api/v1/metrics", &Method::GET) => metrics::fs(status, &query, &body),
        ("/api/v1/metrics/files", &Method::GET) => metrics::files(status, &query, &body),
        ("/api/v1/metrics/pattern", &Method::GET) => metrics::pattern(status, &query, &body),
        ("/api/v1/metrics/backend", &Method::GET) => metrics::backend(status, &query, &body),
        ("/api/v1/metrics/blobcache", &Method::GET) => metrics::blobcache(status, &query, &body),
        ("/api/v1/metrics/inflight", &Method::GET) => metrics::inflight(status, &body),
        ("/metrics", &Method::GET) => metrics::prometheus(status, &body),
        ("/api/v2/blobs", &Method::GET | &Method::PUT | &Method::DELETE) => {
            Err(unsupported("only a daemon for the kernel's fscache has blob objects"))
        }
        _ if PATHS.contains(&path) => {
            Err(bad_request(format!("BadRequest: {} has no meaning for {path}", parts.method)))
        }
        _ => Err(ApiError(StatusCode::NOT_FOUND, format!("NoRoute: {path}"))),
    }
}

fn info(status: &Status, with_mounts: bool, body: &Bytes) -> Answer {
    no_body(body)?;
    Ok(json(StatusCode::OK, &status.info(with_mounts)))
}

fn configure(body: &Bytes) -> Answer {
    #[derive(Deserialize)]
    struct Change {
        log_level: String,
    }
    let Change { log_level } = parse_body(body)?;
    let level = log_level
        .parse()
        .map_err(|_| failed("log_level: use off, error, warn, info, debug or trace".to_owned()))?;
    log::set_max_level(level);
    log::info!("log level is now {level}");
    Ok(no_content())
}

fn exit(status: &Status, body: &Bytes) -> Answer {
    no_body(body)?;
    status.request_stop(StopReason::Api);
    Ok(no_content())
}

/// A JSON body, whose content never shows up in an error: it may hold secrets.
fn parse_body<T: DeserializeOwned>(body: &Bytes) -> Result<T, ApiError> {
    serde_json::from_slice(body).map_err(|e| {
        bad_request(format!("ParseBody: wrong at line {} column {}", e.line(), e.column()))
    })
}

fn no_body(body: &Bytes) -> Result<(), ApiError> {
    match body.is_empty() {
        true => Ok(()),
        false => Err(bad_request("BadRequest: no body is expected".into())),
    }
}

fn bad_request(message: String) -> ApiError {
    ApiError(StatusCode::BAD_REQUEST, message)
}

/// What was asked for was understood and did not work.
fn failed(message: String) -> ApiError {
    ApiError(StatusCode::INTERNAL_SERVER_ERROR, message)
}

fn unsupported(reason: &str) -> ApiError {
    ApiError(StatusCode::NOT_IMPLEMENTED, format!("Unsupported: {reason}"))
}

fn not_ready() -> ApiError {
    ApiError(StatusCode::SERVICE_UNAVAILABLE, "the daemon is not ready".into())
}

fn no_content() -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    response
}

fn json(code: StatusCode, value: &impl Serialize) -> Response {
    let text = serde_json::to_string(value).expect("our own types become JSON");
    let mut response = Response::new(Body::from(text));
    *response.status_mut() = code;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
