//! The HTTP API on a unix socket: nydusd's paths, JSON and status codes, to the letter.
//!
//! Connections are never closed for being idle: nydus-snapshotter holds one open for as long as a
//! daemon lives, and takes its end for a crash. Each answer with a status of 400 or more carries
//! `{"code": …, "message": …}`, because clients parse it without looking. Handlers only read or set
//! shared state; none waits for an image.

use std::io;
use std::os::unix::net::UnixListener as StdListener;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State as Shared};
use axum::http::header::{CONTENT_TYPE, HeaderValue, SERVER};
use axum::http::{Method, StatusCode};
use axum::response::Response;
use axum::serve::Listener;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream, unix::SocketAddr};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::state::{State, Status, StopReason};

/// Longest body in bytes; configs with certificates are long.
const MAX_BODY: usize = 4 << 20;
/// Connections served at once; more wait in the socket's backlog.
const MAX_CONNECTIONS: usize = 1024;

/// Serves the API on `listener` until `stop` is ready and the requests under way are answered.
///
/// # Errors
///
/// The listener cannot be used with the runtime. Failing connections are no error.
pub async fn serve(
    listener: StdListener,
    status: Arc<Status>,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = Limited {
        listener: UnixListener::from_std(listener)?,
        permits: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
    };
    let router = Router::new().fallback(answer).with_state(status);
    axum::serve(listener, router).with_graceful_shutdown(stop).await
}

/// What goes wrong with a request: status and message.
#[derive(Debug)]
struct ApiError(StatusCode, String);

type Answer = Result<Response, ApiError>;

async fn answer(Shared(status): Shared<Arc<Status>>, request: Request) -> Response {
    let (method, uri) = (request.method().clone(), request.uri().clone());
    let mut response = route(&status, request).await.unwrap_or_else(|ApiError(code, message)| {
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

/// Paths of nydusd that are known and have no meaning in this build.
const UNSUPPORTED: [&str; 13] = [
    "/api/v1/mount",
    "/api/v1/config",
    "/api/v1/metrics",
    "/api/v1/metrics/files",
    "/api/v1/metrics/pattern",
    "/api/v1/metrics/backend",
    "/api/v1/metrics/blobcache",
    "/api/v1/metrics/inflight",
    "/api/v1/daemon/events",
    "/api/v1/daemon/backend",
    "/api/v1/daemon/fuse/sendfd",
    "/api/v1/daemon/fuse/takeover",
    "/api/v2/blobs",
];

async fn route(status: &Status, request: Request) -> Answer {
    let (parts, body) = request.into_parts();
    let body = axum::body::to_bytes(body, MAX_BODY)
        .await
        .map_err(|e| bad_request(format!("body cannot be read, or is too long: {e}")))?;
    let path = parts.uri.path();
    match (path, &parts.method) {
        ("/api/v1/daemon", &Method::GET) => info(status, true, &body),
        ("/api/v2/daemon", &Method::GET) => info(status, false, &body),
        ("/api/v1/daemon" | "/api/v2/daemon", &Method::PUT) => configure(&body),
        ("/api/v1/daemon/exit", &Method::PUT) => exit(status, &body),
        ("/api/v1/daemon/start", &Method::PUT) => start(status, &body),
        (
            "/api/v1/daemon" | "/api/v2/daemon" | "/api/v1/daemon/exit" | "/api/v1/daemon/start",
            method,
        ) => Err(bad_request(format!("BadRequest: {method} has no meaning for {path}"))),
        _ if UNSUPPORTED.contains(&path) => {
            Err(ApiError(StatusCode::NOT_IMPLEMENTED, format!("Unsupported: {path}")))
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
    let Change { log_level } = serde_json::from_slice(body)
        .map_err(|e| bad_request(format!("ParseBody: line {} column {}", e.line(), e.column())))?;
    let level = log_level.parse().map_err(|_| {
        let message = "log_level: use off, error, warn, info, debug or trace".to_owned();
        ApiError(StatusCode::INTERNAL_SERVER_ERROR, message)
    })?;
    log::set_max_level(level);
    log::info!("log level is now {level}");
    Ok(no_content())
}

fn exit(status: &Status, body: &Bytes) -> Answer {
    no_body(body)?;
    status.request_stop(StopReason::Api);
    Ok(no_content())
}

/// The daemon starts by itself, so there is never anything to start.
fn start(status: &Status, body: &Bytes) -> Answer {
    no_body(body)?;
    match status.state() {
        State::Running => Err(bad_request("UnexpectedEvent: the daemon runs already".into())),
        _ => Err(ApiError(StatusCode::SERVICE_UNAVAILABLE, "the daemon is not ready".into())),
    }
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

/// A listener that accepts only while fewer than [`MAX_CONNECTIONS`] are open.
struct Limited {
    listener: UnixListener,
    permits: Arc<Semaphore>,
}

/// A connection that counts while it is open.
struct Counted {
    stream: UnixStream,
    _permit: OwnedSemaphorePermit,
}

impl Listener for Limited {
    type Io = Counted;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Counted, SocketAddr) {
        let permit = Arc::clone(&self.permits).acquire_owned().await;
        let permit = permit.expect("the semaphore is never closed");
        let (stream, addr) = Listener::accept(&mut self.listener).await;
        (Counted { stream, _permit: permit }, addr)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
