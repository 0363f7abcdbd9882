//! The life of the daemon: start, serve, stop.
//!
//! The calling thread does nothing but wait for something to happen, so that a signal ends the
//! process in any phase: while an image is being opened on a file system that hangs, with or without
//! a VMM, with reads on their way. Everything that could block runs elsewhere and is left behind when
//! it does not end in time; nothing on disk needs an orderly end.

use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use tokio::runtime::Runtime;
use tokio::sync::watch;

use super::DaemonError;
use super::cli::{Options, Service, VmmSocket};
use super::config::Config;
use super::host::{Host, HostOptions};
use super::image::Images;
use super::log::{LogGuard, Target};
use super::mounted::{Mounted, What};
use super::signal;
use super::socket::Sockets;
use super::state::{State, Status, StopReason};
use crate::device::{Device, DeviceConfig, Listener, Stop};
use crate::fuse::{Ended, ServerOptions};

/// How long the device and the API may take to end.
const GRACE: Duration = Duration::from_millis(250);
/// How long the last lines may take to reach the log.
const LAST_LINES: Duration = Duration::from_millis(100);
/// Request queues that a VMM may have, unless fewer are asked for.
const MAX_QUEUES: u16 = 64;
/// Threads of the blocking pool beside those that decompress: reads of local files and the like.
const BLOCKING_THREADS: usize = 32;

/// How long a thread of the blocking pool waits for more work. Short, so that a daemon whose guest
/// has settled holds no memory for stacks; starting a thread costs less than reading a chunk.
const IDLE_THREAD: Duration = Duration::from_secs(1);

/// What the main thread waits for.
enum Event {
    /// The start has come to its end.
    Started(Result<Running, DaemonError>),
    /// The device, or the API, has ended; before a stop this is a failure.
    Ended(Result<(), DaemonError>),
}

/// What is there to be stopped once everything runs.
struct Running {
    /// How many [`Event::Ended`] a stop brings about.
    services: usize,
}

/// Shared by the phases.
struct Context {
    options: Options,
    status: Arc<Status>,
    sockets: Sockets,
    runtime: Runtime,
    /// Of a mount on the host.
    wait_for_session: bool,
    stop_device: Stop,
    stop_api: watch::Sender<bool>,
    events: Sender<Event>,
}

/// Serves until a signal or the API says stop.
///
/// # Errors
///
/// Why the start failed, or what broke later. The operator has been told.
pub fn run(options: Options) -> Result<(), DaemonError> {
    let target = match &options.log_file {
        None => Target::Stderr,
        Some(path) => Target::File { path: path.clone(), rotate_at: options.log_rotation_bytes },
    };
    let log = super::log::init(options.log_level, target).map_err(|e| {
        let _ = writeln!(io::stderr(), "error: log: {e}");
        DaemonError::Log(e)
    })?;
    log_panics();
    let result = serve(options, &log);
    if let Err(e) = &result {
        log::error!("{}", super::chain(e));
    }
    log.flush(LAST_LINES);
    result
}

fn serve(options: Options, log: &LogGuard) -> Result<(), DaemonError> {
    let system = |what| move |source| DaemonError::System { what, source };
    let (stop, stopped) = bounded(1);
    let runtime = runtime(&options).map_err(system("threads for downloads"))?;
    let images = Images::new(runtime.handle().clone(), options.read_timeout, options.workers);
    let (id, supervisor) = (options.id.clone(), options.supervisor.clone());
    let mounted = Arc::new(Mounted::new(images, options.cache));
    let status = Arc::new(Status::new(id, supervisor, mounted, Arc::clone(log.events()), stop));
    signal::stop_on_signals(Arc::clone(&status)).map_err(system("signal handlers"))?;
    for (flag, reason) in &options.ignored {
        log::info!("ignored: {flag}: {reason}");
    }
    let files = signal::raise_open_files(options.rlimit_nofile);
    log::debug!("open files: at most {files}");

    let (events, happened) = bounded(8);
    // Before there is a socket of our own in the place of the other daemon's.
    let mut wait_for_session = false;
    if let Some(host) = host(&options, &status, &runtime, &events) {
        wait_for_session = host.should_wait(options.apisock.as_deref());
        status.set_host(host);
    }
    let context = Arc::new(Context {
        wait_for_session,
        status: Arc::clone(&status),
        sockets: Sockets::default(),
        runtime,
        stop_device: Stop::new().map_err(system("event descriptor"))?,
        stop_api: watch::Sender::new(false),
        events,
        options,
    });
    let starter = Arc::clone(&context);
    spawn("start", move || {
        let started = start(&starter);
        let _ = starter.events.send(Event::Started(started));
    })?;

    let (result, reason, running) = wait(&stopped, &happened);
    status.set_state(State::Stopped);
    leave_host(&status, reason);
    context.sockets.remove_all();
    context.stop_device.raise();
    context.stop_api.send_replace(true);
    if let Some(running) = &running {
        ended_in_time(&happened, running.services);
    }
    if result.is_ok() {
        let (fetched, total) = status.mounted().images().fetched();
        log::info!("fetched {fetched} of {total} bytes");
    }
    log.flush(LAST_LINES);
    // What still runs is left behind: the process ends now.
    std::mem::forget(context);
    result
}

/// Ends the session on the host. The API's exit leaves the mount to the next daemon, if there can be
/// one.
fn leave_host(status: &Arc<Status>, reason: Option<StopReason>) {
    let Some(host) = status.host().cloned() else { return };
    let (done, left) = bounded::<()>(1);
    let leaving = spawn("unmount", move || {
        host.leave(reason == Some(StopReason::Api));
        drop(done);
    });
    // A mount that does not go away in time goes with the process.
    if leaving.is_ok() && left.recv_timeout(GRACE) == Err(RecvTimeoutError::Timeout) {
        log::warn!("unmounting takes longer than {GRACE:?}");
    }
}

/// Waits for the end, and returns why it came and what has to be stopped.
fn wait(
    stopped: &Receiver<StopReason>,
    happened: &Receiver<Event>,
) -> (Result<(), DaemonError>, Option<StopReason>, Option<Running>) {
    let mut running = None;
    loop {
        crossbeam_channel::select! {
            recv(stopped) -> reason => {
                match reason {
                    Ok(StopReason::Signal(signal)) => log::info!("stopping: signal {signal}"),
                    Ok(StopReason::Unmounted) => log::info!("stopping: somebody unmounted it"),
                    _ => log::info!("stopping: asked by the API"),
                }
                return (Ok(()), reason.ok(), running);
            }
            recv(happened) -> event => match event {
                Ok(Event::Started(Ok(started))) => running = Some(started),
                Ok(Event::Started(Err(e)) | Event::Ended(Err(e))) => return (Err(e), None, running),
                Ok(Event::Ended(Ok(()))) => log::warn!("a service ended before it was told to"),
                Err(_) => unreachable!("the context holds a sender"),
            }
        }
    }
}

/// Waits for the device and the API, `services` in all, at most [`GRACE`].
fn ended_in_time(happened: &Receiver<Event>, services: usize) {
    let deadline = Instant::now() + GRACE;
    for _ in 0..services {
        match happened.recv_deadline(deadline) {
            Ok(Event::Ended(Ok(()))) => {}
            Ok(Event::Ended(Err(e))) => log::warn!("while stopping: {}", super::chain(&e)),
            Ok(Event::Started(_)) => {}
            Err(_) => {
                log::debug!("not everything ended within {GRACE:?}");
                return;
            }
        }
    }
}

/// From nothing to RUNNING.
fn start(context: &Arc<Context>) -> Result<Running, DaemonError> {
    let begin = Instant::now();
    let with_api = start_api(context)?;
    let mut services = usize::from(with_api);
    match &context.options.service {
        Service::Host(host) => start_on_host(context, host, begin)?,
        Service::Vmm(sock) => {
            start_device(context, sock, begin)?;
            services += 1;
        }
    }
    Ok(Running { services })
}

/// Serves VMMs.
fn start_device(
    context: &Arc<Context>,
    sock: &VmmSocket,
    begin: Instant,
) -> Result<(), DaemonError> {
    let Context { options, status, sockets, runtime, .. } = &**context;
    mount_at_start(options, status.mounted())?;
    let system = |source| DaemonError::System { what: "socket", source };
    let (socket, name) = match sock {
        VmmSocket::Path(path) => (sockets.listen(path)?, path.display().to_string()),
        VmmSocket::Fd(fd) => (Sockets::inherited(*fd)?, format!("descriptor {fd}")),
    };
    if let (VmmSocket::Path(path), Some(group)) = (sock, &options.socket_group) {
        Sockets::give_to_group(path, group)?;
    }
    let listener = Listener::from_socket(socket).map_err(system)?;
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let config = DeviceConfig {
        tag: options.tag.clone(),
        request_queues: options.request_queues.unwrap_or(MAX_QUEUES),
        advised_queues: options.request_queues.unwrap_or_else(|| {
            u16::try_from(processors).map_or(MAX_QUEUES, |count| count.min(MAX_QUEUES))
        }),
        busy_poll: options.busy_poll,
        window: options.dax.window,
        memory_slots: !options.dax.options.maps_writable(),
    };
    let mounts = Arc::clone(status.mounted().table());
    let server = ServerOptions { writeback: options.writeback, ..ServerOptions::default() };
    let device =
        Device::new(config, mounts, server, options.dax.options, runtime.handle().clone())?;
    status.set_device(device.counters());
    status.set_state(State::Ready);
    let serving = Arc::clone(context);
    spawn("vhost-user", move || {
        let ended = device.serve(&listener, &serving.stop_device).map_err(DaemonError::from);
        let _ = serving.events.send(Event::Ended(ended));
    })?;
    status.set_state(State::Running);
    log::info!("running: serving tag {} on {name}, ready in {:?}", options.tag, begin.elapsed());
    if options.announce_socket {
        // Kata waits for this text of virtiofsd, whatever the log level is.
        let _ = writeln!(io::stderr(), "Waiting for vhost-user socket connection...");
    }
    Ok(())
}

/// Mounts on the host and serves, or waits for the session of another daemon.
fn start_on_host(
    context: &Arc<Context>,
    options: &HostOptions,
    begin: Instant,
) -> Result<(), DaemonError> {
    let status = &context.status;
    let Some(host) = status.host() else { return Ok(()) };
    let at = options.mountpoint.display();
    if context.wait_for_session {
        log::info!("waiting for the session of another daemon on {at}");
        return Ok(());
    }
    mount_at_start(&context.options, status.mounted())?;
    host.mount()?;
    host.start()?;
    log::info!("running: mounted on {at}, ready in {:?}", begin.elapsed());
    Ok(())
}

/// What `rafsd fuse` mounts on the host.
fn host(
    options: &Options,
    status: &Arc<Status>,
    runtime: &Runtime,
    events: &Sender<Event>,
) -> Option<Arc<Host>> {
    let Service::Host(host) = &options.service else { return None };
    let (stopping, events) = (Arc::clone(status), events.clone());
    let on_end = move |ended: io::Result<Ended>| match ended {
        Ok(Ended::Stopped) => {}
        Ok(Ended::Unmounted) => stopping.request_stop(StopReason::Unmounted),
        Err(source) => {
            let failed = DaemonError::System { what: "/dev/fuse", source };
            let _ = events.try_send(Event::Ended(Err(failed)));
        }
    };
    let (host, writeback) = (host.clone(), options.writeback);
    Some(Host::new(host, writeback, Arc::clone(status), runtime.handle().clone(), on_end))
}
/// Mounts the directory or the image that the command line names.
fn mount_at_start(options: &Options, mounted: &Mounted) -> Result<(), DaemonError> {
    let at = &options.mountpoint;
    let failed = |source| DaemonError::Mount { at: at.clone(), source: Box::new(source) };
    let what = match (&options.shared_dir, &options.bootstrap) {
        (Some(dir), _) => What::Directory(dir.clone()),
        (None, Some(bootstrap)) => image_at_start(options, bootstrap)?,
        (None, None) => return Ok(()),
    };
    mounted.prepare(at, what).and_then(|prepared| mounted.mount(prepared)).map_err(failed)
}

fn image_at_start(options: &Options, bootstrap: &Path) -> Result<What, DaemonError> {
    let config = match &options.config {
        Some(file) => Config::load(file)?,
        None => Config::beside(bootstrap, options.localfs_dir.as_deref())?,
    };
    if let Some(file) = &options.config {
        log::info!("config {}: {}", file.display(), config.form);
    }
    Ok(What::Image {
        bootstrap: bootstrap.to_owned(),
        config: Box::new(config),
        prefetch_files: match &options.prefetch_files {
            Some(file) => super::image::read_list(file)?,
            None => Vec::new(),
        },
    })
}

/// Serves the API if a socket for it was asked for; says whether.
fn start_api(context: &Arc<Context>) -> Result<bool, DaemonError> {
    let Some(path) = &context.options.apisock else {
        return Ok(false);
    };
    let listener = context.sockets.listen(path)?;
    let mut stop = context.stop_api.subscribe();
    let stop = async move {
        // An error means that the sender is gone, which is a stop too.
        let _ = stop.wait_for(|stop| *stop).await;
    };
    let api = super::api::serve(listener, Arc::clone(&context.status), stop);
    let events = context.events.clone();
    context.runtime.spawn(async move {
        let ended = api.await.map_err(|source| DaemonError::System { what: "api", source });
        let _ = events.try_send(Event::Ended(ended));
    });
    Ok(true)
}

fn runtime(options: &Options) -> io::Result<Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(BLOCKING_THREADS + usize::from(options.workers).max(64))
        .thread_name("fetch")
        .thread_keep_alive(IDLE_THREAD)
        .enable_all()
        .build()
}

fn spawn(name: &'static str, work: impl FnOnce() + Send + 'static) -> Result<(), DaemonError> {
    let thread = thread::Builder::new().name(name.into()).spawn(work);
    thread.map(drop).map_err(|source| DaemonError::System { what: "thread", source })
}

/// A panic is a bug of ours: it goes to the log, like everything else, and ends its thread only.
fn log_panics() {
    std::panic::set_hook(Box::new(|info| {
        let thread = thread::current();
        log::error!("thread {} {info}", thread.name().unwrap_or("without a name"));
    }));
}
