//! The command line: arguments in, checked [`Options`] out.
//!
//! Takes what nydusd takes for `virtiofs`, as Kata Containers, units and people write it: flags
//! before or after the subcommand, repeated flags (the last one wins), no subcommand at all. Takes what
//! virtiofsd takes, too, so that either can be replaced by changing a path. `others` says what becomes
//! of flags that have no meaning here. Nothing here touches the system.

mod dax;
mod others;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{ArgAction, CommandFactory, Parser, Subcommand};
use log::LevelFilter;

use super::host::{FailoverPolicy, HostOptions};
use super::version::VERSION;
use crate::device::BusyPoll;
use crate::fuse::{Cache, DaxPolicy, MountPath};

pub use dax::DaxFlags;

/// What the program was asked to do.
#[derive(Debug)]
pub enum Invocation {
    /// Serve until told to stop.
    Serve(Box<Options>),
    /// Print this to standard output and exit with 0.
    Print(String),
}

/// Arguments that make no sense: the message for standard error; exit with 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);

/// Whom to serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Service {
    /// A virtual machine.
    Vmm(VmmSocket),
    /// The host itself.
    Host(HostOptions),
}

/// Where VMMs connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmmSocket {
    /// A socket to be made here.
    Path(PathBuf),
    /// A descriptor that the parent has left open: a socket that listens.
    Fd(i32),
}

/// Arguments of `rafsd virtiofs` and `rafsd fuse`, checked.
#[derive(Debug)]
pub struct Options {
    pub service: Service,
    /// Group that may connect to it, by name or number; none: the user's.
    pub socket_group: Option<String>,
    /// Say on standard error when a VMM can connect, as virtiofsd does.
    pub announce_socket: bool,
    /// Directory of the host to mount at start, in place of an image.
    pub shared_dir: Option<PathBuf>,
    /// What guests may keep of shared directories.
    pub cache: Cache,
    /// Let guests keep what they write to shared directories for a while.
    pub writeback: bool,
    /// Socket for the HTTP API; none: no API.
    pub apisock: Option<PathBuf>,
    /// The image to mount at start; none: an empty tree in which the API mounts.
    pub bootstrap: Option<PathBuf>,
    /// Where it is mounted.
    pub mountpoint: String,
    /// Config file; none: blobs beside the bootstrap or in `localfs_dir`, private cache.
    pub config: Option<PathBuf>,
    pub localfs_dir: Option<PathBuf>,
    /// List of paths in the image to fetch early.
    pub prefetch_files: Option<PathBuf>,
    pub log_level: LevelFilter,
    pub log_file: Option<PathBuf>,
    /// Bytes after which the log file is rotated; 0: never.
    pub log_rotation_bytes: u64,
    pub id: Option<String>,
    pub supervisor: Option<String>,
    /// 1 to 36 bytes.
    pub tag: String,
    pub dax: DaxFlags,
    /// 1 to 64; none: as many as a VMM wants, and those that ask are told the number of processors.
    pub request_queues: Option<u16>,
    /// How long a queue looks for the next request before it sleeps.
    pub busy_poll: BusyPoll,
    /// Threads that decompress and verify; 0: chosen by the number of processors.
    pub workers: u16,
    /// How long a guest's read may wait for a backend.
    pub read_timeout: Duration,
    /// Wanted limit of open files; 0: leave it alone.
    pub rlimit_nofile: u64,
    /// Flags that were given and do nothing: the flag and the reason.
    pub ignored: Vec<(String, &'static str)>,
}

/// Serve RAFS container images to microVM guests over virtio-fs, lazily
///
/// rafsd presents RAFS v6 images to a virtual machine: the guest mounts them as one `virtiofs`, and
/// file data is fetched, verified and cached when it is first read. It takes the place of nydusd and
/// behaves the same when it is called by that name.
///
/// Exit codes: 0 stopped by a signal or by the API, 1 failure while starting or running, 2 wrong
/// arguments. See docs/operations.md for config files, logs and the cache directory.
#[derive(Parser, Debug)]
#[command(
    name = "rafsd",
    bin_name = "rafsd",
    disable_version_flag = true,
    disable_help_subcommand = true,
    args_override_self = true,
    max_term_width = 100
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,

    /// Socket on which a VMM connects (vhost-user)
    ///
    /// Required, unless `--fd` is given. A path of at most 107 bytes; a relative one is taken from the
    /// working directory. A stale socket is replaced, a live one or another kind of file is an error.
    /// VMMs may come and go: the next one is served after a disconnect. Removed at exit. virtiofsd's
    /// name for it, `--socket-path`, is known, too.
    #[arg(long, global = true, value_name = "PATH", help_heading = "Sockets")]
    sock: Option<PathBuf>,

    #[arg(long, global = true, hide = true)]
    socket_path: Option<PathBuf>,

    /// Descriptor of a socket on which a VMM connects, left open by the parent
    ///
    /// In place of `--sock`. The socket must listen already.
    #[arg(long, global = true, value_name = "N", help_heading = "Sockets",
          value_parser = clap::value_parser!(i32).range(0..))]
    fd: Option<i32>,

    /// Group that may connect to the VMM's socket
    ///
    /// Default: the group of this process. A name or a number; the socket's mode becomes 0660.
    #[arg(long, global = true, value_name = "GROUP", help_heading = "Sockets")]
    socket_group: Option<String>,

    /// Socket of the HTTP API
    ///
    /// Default: no API. Same rules as for `--sock`. Who may connect may stop the daemon, so keep its
    /// directory private.
    #[arg(short = 'A', long, global = true, value_name = "PATH", help_heading = "Sockets")]
    apisock: Option<PathBuf>,

    /// Name by which the guest mounts the file system
    ///
    /// Default: kataShared. 1 to 36 bytes. For VMMs that read it from the device (crosvm, User-mode
    /// Linux, generic vhost-user devices); QEMU and cloud-hypervisor have their own option for it.
    #[arg(long, global = true, value_name = "TAG", help_heading = "Device")]
    tag: Option<String>,

    /// Request queues offered to the VMM
    ///
    /// Default: as many as the VMM wants, up to 64; a VMM or guest that asks is told the number of this
    /// host's processors. Range: 1 to 64. Each queue that the VMM starts gets one thread, which sleeps
    /// when it has nothing to do. A guest uses no more queues than it has processors.
    #[arg(long, global = true, value_name = "N", help_heading = "Device",
          value_parser = clap::value_parser!(u16).range(1..=64))]
    num_request_queues: Option<u16>,

    /// How long a queue looks for the next request before it sleeps
    ///
    /// Default: auto. A queue that has its next request soon after going to sleep looks for it for up
    /// to 50us from then on, which spares the guest the time to wake it; one whose guest takes longer,
    /// or whose processor others want, sleeps at once. off or 0: always at once. A number with a unit,
    /// at most 10ms: for that long each time.
    #[arg(long, global = true, value_name = "WHEN", help_heading = "Device",
          value_parser = busy_poll)]
    busy_poll: Option<BusyPoll>,

    /// What guests map of images in place of reading: off, shared or private
    ///
    /// Default: off. Needs a VMM with the vhost-user shared-memory messages: QEMU 11.1 with its generic
    /// device, see docs/dax.md; elsewhere files are read. private: copies in memory of the guest's own.
    /// shared: the cache files, read-only, so that all guests of a host share their pages, where the
    /// VMM takes descriptors that are open for reading only.
    #[arg(long, global = true, value_name = "POLICY", help_heading = "DAX",
          value_parser = dax::policy)]
    dax: Option<DaxPolicy>,

    /// Size of the window in a guest's address space that files are mapped into
    ///
    /// Default: 512M. A power of two; 16M to 8G, with `--dax shared` at most 512M. Guests may take
    /// that much memory of the host each with `private`.
    #[arg(long, global = true, value_name = "SIZE", help_heading = "DAX",
          value_parser = dax::size)]
    dax_window: Option<u64>,

    /// What to do in place of `--dax shared` if the VMM maps nothing read-only: read or private
    ///
    /// Default: read, as without a window.
    #[arg(long, global = true, value_name = "WHAT", help_heading = "DAX",
          value_parser = dax::fallback)]
    dax_fallback: Option<DaxPolicy>,

    /// Image to serve: the bootstrap (metadata) of a RAFS v6 image
    ///
    /// Default: none; images are mounted by the API.
    #[arg(short = 'B', long, global = true, value_name = "FILE", help_heading = "Image")]
    bootstrap: Option<PathBuf>,

    /// Directory of the host to share, in place of an image
    ///
    /// Default: none; directories are shared by the API. Guests can write there.
    #[arg(
        short = 's',
        long,
        global = true,
        value_name = "DIR",
        help_heading = "Shared directories"
    )]
    shared_dir: Option<PathBuf>,

    /// What a guest may keep of shared directories: never, metadata, auto or always
    ///
    /// Default: auto. never: nothing. metadata: names and attributes for a second. auto: also data,
    /// from one open to the next. always: all for a day, for directories that nobody else changes.
    #[arg(long, global = true, value_name = "MODE", help_heading = "Shared directories",
          value_parser = others::cache_mode)]
    cache: Option<Cache>,

    /// Let a guest keep what it writes to shared directories for a while
    ///
    /// Default: off. Faster, but the host and other guests see it late, and what the host changes
    /// meanwhile may be lost.
    #[arg(long, global = true, action = ArgAction::Count, help_heading = "Shared directories")]
    writeback: u8,

    /// Where in the guest's tree the image or directory given at start is mounted
    ///
    /// Default: /. An absolute path; directories that lead there are made up. With an image at /
    /// nothing else can be mounted.
    #[arg(short = 'm', long, global = true, value_name = "PATH", help_heading = "Image")]
    virtual_mountpoint: Option<String>,

    /// Where blobs come from and where they are cached: nydusd's config file
    ///
    /// JSON (version 1 or 2) or TOML (version 2), at most 1 MiB. Default: blobs are looked for in the
    /// directory of the bootstrap and in `blobs` beside it, the cache is `rafsd` under
    /// $XDG_CACHE_HOME or ~/.cache.
    #[arg(
        short = 'C',
        long,
        global = true,
        value_name = "FILE",
        help_heading = "Image",
        conflicts_with = "localfs_dir"
    )]
    config: Option<PathBuf>,

    /// Directory that holds the blobs, for use without a config file
    ///
    /// Default: see `--config`. Searched before the directory of the bootstrap.
    #[arg(short = 'D', long, global = true, value_name = "DIR", help_heading = "Image")]
    localfs_dir: Option<PathBuf>,

    /// Files of the image to fetch before the guest reads them
    ///
    /// Default: what the image itself lists, if the config turns prefetch on. A text file with one
    /// absolute path on each line, in the order of importance; a directory means everything below it.
    /// Fetched in the background, behind what the guest waits for.
    #[arg(long, global = true, value_name = "FILE", help_heading = "Image")]
    prefetch_files: Option<PathBuf>,

    /// How long a guest's read may wait for its data
    ///
    /// Default: 60s. A number with a unit: 500ms, 30s, 2m. When the backend has not delivered by then
    /// the read fails with EIO; the next read tries again. Keep it below the guest's hung-task timeout
    /// of 120 s.
    #[arg(long, global = true, value_name = "DURATION", help_heading = "Image",
          value_parser = duration)]
    read_timeout: Option<Duration>,

    /// Threads that decompress and verify chunks; with `fuse`, threads that take requests
    ///
    /// With `fuse`: default 4, range 1 to 1024; 0 means the default. Without:
    /// Default: 0, twice the number of processors but at least 4. Range: 0 to 1024. A limit, not a reservation:
    /// threads start when there is work. Lower it to leave processors to the guest.
    #[arg(long, global = true, value_name = "N", help_heading = "Process",
          aliases = ["threads", "thread-pool-size", "fuse-threads"],
          value_parser = clap::value_parser!(u16).range(0..=1024))]
    thread_num: Option<u16>,

    /// Limit of open files to ask the kernel for
    ///
    /// Default: 1000000, or less where the hard limit is lower. 0 leaves the limit as it is.
    #[arg(long, global = true, value_name = "N", help_heading = "Process")]
    rlimit_nofile: Option<u64>,

    /// How much to log: off, error, warn, info, debug or trace
    ///
    /// Default: info. Can be changed while running: PUT /api/v1/daemon {"log_level":"debug"}.
    #[arg(short = 'l', long, global = true, value_name = "LEVEL", help_heading = "Logs",
          value_parser = level)]
    log_level: Option<LevelFilter>,

    /// Log to this file instead of standard error
    ///
    /// Default: standard error. Lines are appended; `.log` is added to a name without extension.
    #[arg(short = 'L', long, global = true, value_name = "FILE", help_heading = "Logs")]
    log_file: Option<PathBuf>,

    /// Size in MiB at which the log file is renamed to FILE.1
    ///
    /// Default: 0, never. The previous FILE.1 is lost, so logs take at most twice this size.
    #[arg(long, global = true, value_name = "MIB", help_heading = "Logs",
          value_parser = clap::value_parser!(u64).range(0..=1 << 20))]
    log_rotation_size: Option<u64>,

    /// Name of this daemon in the API's answers
    ///
    /// Default: none.
    #[arg(long, global = true, value_name = "ID", help_heading = "Process")]
    id: Option<String>,

    /// Socket of a manager that keeps state across restarts
    ///
    /// Default: none. With `fuse`, the session is handed over to it and taken from it as the API says.
    #[arg(long, global = true, value_name = "PATH", help_heading = "Process")]
    supervisor: Option<String>,

    /// Directory of this host to mount on, for `fuse`
    ///
    /// Required there. A mount whose daemon is gone is replaced. With mount(2) as root, else with
    /// fusermount3. Unmounted at exit, even if it is busy.
    #[arg(short = 'M', long, global = true, value_name = "DIR", help_heading = "Host mount")]
    mountpoint: Option<PathBuf>,

    /// What becomes of requests that the daemon before did not answer: none, resend or flush
    ///
    /// Default: resend. For `fuse` with `--supervisor`. none: they hang. resend: the kernel offers them
    /// again (Linux 6.9). flush: they fail, where the kernel is patched for that, else as resend.
    #[arg(long, global = true, value_name = "POLICY", help_heading = "Host mount",
          value_parser = others::failover_policy)]
    failover_policy: Option<FailoverPolicy>,

    /// Wait for the session of a running daemon, which the API has it hand over
    ///
    /// For `fuse` with `--supervisor`.
    #[arg(long, global = true, action = ArgAction::Count, help_heading = "Host mount")]
    upgrade: u8,

    /// Mount for writing
    ///
    /// Default with `--shared-dir`; else the mount on the host is read-only.
    #[arg(long, global = true, action = ArgAction::Count, help_heading = "Host mount")]
    writable: u8,

    /// Print the version and what it was built from
    #[arg(short = 'V', long, global = true)]
    version: bool,

    /// Print the vhost-user back-end capabilities as JSON
    ///
    /// For managers that discover back ends, such as libvirt.
    #[arg(long, global = true)]
    print_capabilities: bool,

    // Accepted for compatibility: see `others::ignored`.
    #[arg(long, global = true, hide = true, action = ArgAction::Count)]
    hybrid_mode: u8,
    #[arg(long, global = true, hide = true, action = ArgAction::Count)]
    announce_submounts: u8,
    #[arg(long, global = true, hide = true, action = ArgAction::Count)]
    xattr: u8,
    #[arg(short = 'o', global = true, hide = true, action = ArgAction::Append)]
    mount_options: Vec<String>,

    #[arg(long, global = true, hide = true, action = ArgAction::Count)]
    posix_acl: u8,
    #[arg(long, global = true, hide = true)]
    sandbox: Option<String>,
    #[arg(long, global = true, hide = true)]
    seccomp: Option<String>,
    #[arg(long, global = true, hide = true)]
    modcaps: Option<String>,
    #[arg(long, global = true, hide = true)]
    inode_file_handles: Option<String>,
    #[arg(long, global = true, hide = true, action = ArgAction::Count)]
    allow_direct_io: u8,
    #[arg(long, global = true, hide = true, action = ArgAction::Count)]
    syslog: u8,
    /// Foreground, where this program always is.
    #[arg(short = 'f', global = true, hide = true, action = ArgAction::Count)]
    foreground: u8,
    /// Debug lines.
    #[arg(short = 'd', global = true, hide = true, action = ArgAction::Count)]
    debug: u8,

    // Known flags of features that are not here: see `others::refuse_missing_features`.
    #[arg(long, global = true, hide = true, action = ArgAction::Count)]
    readonly: u8,
    #[arg(short = 'F', long, global = true, hide = true)]
    fscache: Option<OsString>,
    #[arg(long, global = true, hide = true)]
    dedup_db: Option<OsString>,
    #[arg(long, global = true, hide = true)]
    backend_source: Option<String>,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Serve a virtual machine over vhost-user (the default)
    Virtiofs,
    /// Mount on a directory of this host
    Fuse,
    #[command(external_subcommand)]
    Other(Vec<OsString>),
}

/// Threads that take requests from the kernel, as in nydusd.
const DEFAULT_FUSE_THREADS: usize = 4;

/// What libvirt and others ask for; also in `kata-config/50-rafsd.json`.
const CAPABILITIES: &str = "{\"type\":\"fs\",\"features\":[\"separate-options\"]}\n";

/// Parses `args`, the program's name first.
///
/// # Errors
///
/// [`UsageError`] with a message ready to print, for anything that cannot be served as asked.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Invocation, UsageError> {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(e) if matches!(e.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
            return Ok(Invocation::Print(e.render().to_string()));
        }
        Err(e) => return Err(UsageError(e.render().to_string().trim_end().to_owned())),
    };
    if cli.version {
        return Ok(Invocation::Print(VERSION.text()));
    }
    if cli.print_capabilities {
        return Ok(Invocation::Print(CAPABILITIES.into()));
    }
    others::refuse_missing_features(&cli)?;
    let mount_options = others::mount_options(&cli)?;
    let dax = dax::flags(&cli)?;
    let mut ignored = others::ignored(&cli);
    ignored.extend(mount_options.ignored);
    let required = |what: &str| usage_error(format!("{what}\n\n{}", Cli::command().render_usage()));
    let announce_socket = cli.socket_path.is_some();
    let on_host = others::on_host(&cli);
    let service = if on_host {
        let mountpoint =
            cli.mountpoint.ok_or_else(|| required("`--mountpoint DIR` is required"))?;
        Service::Host(HostOptions {
            mountpoint,
            threads: cli.thread_num.filter(|&n| n > 0).map_or(DEFAULT_FUSE_THREADS, usize::from),
            failover: cli.failover_policy.unwrap_or_default(),
            upgrade: cli.upgrade > 0,
            writable: cli.writable > 0 || cli.shared_dir.is_some(),
        })
    } else {
        let sock = match (cli.sock.or(cli.socket_path), cli.fd) {
            (Some(path), None) => VmmSocket::Path(path),
            (None, Some(fd)) => VmmSocket::Fd(fd),
            (None, None) => return Err(required("`--sock PATH` is required")),
            (Some(_), Some(_)) => {
                return Err(usage_error("--sock and --fd: give one of them".into()));
            }
        };
        if cli.socket_group.is_some() && matches!(sock, VmmSocket::Fd(_)) {
            return Err(usage_error("--socket-group: the socket of --fd is not made here".into()));
        }
        Service::Vmm(sock)
    };
    let mountpoint = cli.virtual_mountpoint.unwrap_or_else(|| "/".into());
    if let Err(e) = MountPath::parse(&mountpoint) {
        return Err(usage_error(format!("--virtual-mountpoint: {e}")));
    }
    let tag = cli.tag.unwrap_or_else(|| "kataShared".into());
    if !(1..=36).contains(&tag.len()) {
        return Err(usage_error(format!("--tag: 1 to 36 bytes, not {}", tag.len())));
    }
    Ok(Invocation::Serve(Box::new(Options {
        service,
        socket_group: cli.socket_group,
        announce_socket,
        shared_dir: cli.shared_dir.or(mount_options.source),
        cache: cli.cache.or(mount_options.cache).unwrap_or_default(),
        writeback: cli.writeback > 0 || mount_options.writeback,
        apisock: cli.apisock,
        bootstrap: cli.bootstrap,
        mountpoint,
        config: cli.config,
        localfs_dir: cli.localfs_dir,
        prefetch_files: cli.prefetch_files,
        log_level: cli.log_level.unwrap_or(if cli.debug > 0 || mount_options.debug {
            LevelFilter::Debug
        } else {
            LevelFilter::Info
        }),
        log_file: cli
            .log_file
            .map(|p| if p.extension().is_none() { p.with_extension("log") } else { p }),
        log_rotation_bytes: cli.log_rotation_size.unwrap_or(0) << 20,
        id: cli.id,
        supervisor: cli.supervisor,
        tag,
        dax,
        request_queues: cli.num_request_queues,
        busy_poll: cli.busy_poll.unwrap_or_default(),
        workers: if on_host { 0 } else { cli.thread_num.unwrap_or(0) },
        read_timeout: cli.read_timeout.unwrap_or(Duration::from_secs(60)),
        rlimit_nofile: cli.rlimit_nofile.unwrap_or(1_000_000),
        ignored,
    })))
}

fn usage_error(message: String) -> UsageError {
    UsageError(format!("error: {message}\n\nFor more information, try '--help'."))
}

fn level(text: &str) -> Result<LevelFilter, String> {
    text.parse().map_err(|_| "use off, error, warn, info, debug or trace".to_owned())
}

fn duration(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|e| e.to_string())?;
    let range = Duration::from_millis(1)..=Duration::from_secs(24 * 3600);
    range.contains(&time).then_some(time).ok_or_else(|| "use 1ms to 24h".to_owned())
}

fn busy_poll(text: &str) -> Result<BusyPoll, String> {
    match text {
        "auto" => return Ok(BusyPoll::Auto),
        "off" | "0" => return Ok(BusyPoll::For(Duration::ZERO)),
        _ => {}
    }
    let time = humantime::parse_duration(text)
        .map_err(|e| format!("use auto, off or a time of at most 10ms: {e}"))?;
    let fits = time <= Duration::from_millis(10);
    fits.then_some(BusyPoll::For(time)).ok_or_else(|| "use auto, off or at most 10ms".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_line(line: &str) -> Result<Invocation, UsageError> {
        parse(std::iter::once("rafsd").chain(line.split_whitespace()).map(OsString::from))
    }

    fn options(line: &str) -> Options {
        match parse_line(&format!("{line} --bootstrap boot")) {
            Ok(Invocation::Serve(options)) => *options,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn command_lines_seen_in_the_field_are_accepted() {
        let lines = [
            // Kata, Go runtime; with extra arguments left from virtiofsd or taken from its docs
            "virtiofs --log-level info --apisock A --sock S",
            "virtiofs --log-level info --apisock A --sock S --thread-pool-size=1 --announce-submounts",
            "virtiofs --log-level info --apisock A --sock S --thread-pool-size=1 -o announce_submounts",
            "virtiofs --log-level info --apisock A --sock S --log-level info --threads 1 --xattr",
            // Kata, runtime-rs
            "virtiofs --hybrid-mode --log-level info --apisock A --sock S",
            "--hybrid-mode virtiofs --log-level info --apisock A --sock S --hybrid-mode",
            // by hand
            "--sock S --apisock A",
            "-A A -l info --sock S virtiofs",
            "virtiofs --sock S -A A --id x",
            "virtiofs --sock S -A A --supervisor /run/x.sock",
        ];
        for line in lines {
            let o = options(line);
            assert_eq!(o.service, Service::Vmm(VmmSocket::Path("S".into())), "{line}");
            assert_eq!(o.apisock, Some("A".into()), "{line}");
            assert_eq!(o.log_level, LevelFilter::Info, "{line}");
        }
    }

    #[test]
    fn the_last_of_repeated_flags_wins() {
        let cases = [
            ("virtiofs --sock S -l info --log-level debug", LevelFilter::Debug),
            ("--log-level error virtiofs --sock S --log-level trace", LevelFilter::Trace),
            ("-l debug --sock S -l warn", LevelFilter::Warn),
        ];
        for (line, want) in cases {
            assert_eq!(options(line).log_level, want, "{line}");
        }
        assert_eq!(
            options("--sock A virtiofs --sock B").service,
            Service::Vmm(VmmSocket::Path("B".into()))
        );
    }

    #[test]
    fn short_forms() {
        let o = options("virtiofs --sock S -B first -C conf -L log/x -l trace -A api -m /");
        assert_eq!(o.bootstrap, Some(PathBuf::from("boot")), "the last one wins");
        assert_eq!(o.mountpoint, "/");
        assert_eq!(options("--sock S -m /rafs/x").mountpoint, "/rafs/x");
        assert_eq!(o.config, Some("conf".into()));
        assert_eq!(o.log_file, Some("log/x.log".into()));
        assert_eq!(o.log_level, LevelFilter::Trace);
        assert_eq!(options("--sock S -D dir").localfs_dir, Some("dir".into()));
    }

    #[test]
    fn units_and_ranges() {
        let o = options("--sock S --read-timeout 1500ms --thread-num 3 --num-request-queues 2");
        assert_eq!(o.read_timeout, Duration::from_millis(1500));
        assert_eq!((o.workers, o.request_queues), (3, Some(2)));
        assert_eq!(options("--sock S").request_queues, None);
        for (text, want) in [("off", 0), ("0", 0), ("0s", 0), ("50us", 50), ("10ms", 10_000)] {
            let line = format!("--sock S --busy-poll {text}");
            let want = BusyPoll::For(Duration::from_micros(want));
            assert_eq!(options(&line).busy_poll, want, "{text}");
        }
        assert_eq!(options("--sock S --busy-poll auto").busy_poll, BusyPoll::Auto);
        assert_eq!(options("--sock S").busy_poll, BusyPoll::Auto);
        assert_eq!(options("--sock S --log-rotation-size 2 -L x").log_rotation_bytes, 2 << 20);
        for bad in [
            "--sock S --read-timeout 5",
            "--sock S --read-timeout 0s",
            "--sock S --thread-num 1025",
            "--sock S --num-request-queues 0",
            "--sock S --num-request-queues 65",
            "--sock S --busy-poll 11ms",
            "--sock S --busy-poll 5",
            "--sock S --log-level loud",
            "--sock S --tag 0123456789012345678901234567890123456",
        ] {
            assert!(parse_line(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let cases = [
            ("singleton --fscache /cache", "`singleton` is not in this build"),
            ("frobnicate", "unknown command `frobnicate`"),
            ("virtiofs --sock S --shared-dir /srv --readonly", "--readonly"),
            ("--fd=3 --sock S", "give one of them"),
            ("--fd=-1", "--fd"),
            ("--fd=3 --socket-group kvm", "--socket-group"),
            ("--sock S --cache sometimes", "use never, metadata, auto or always"),
            ("--sock S -o cache=sometimes", "use never, metadata, auto or always"),
            ("--sock S -o frobnicate", "-o frobnicate: unknown"),
            ("--sock S -m rafs", "a mountpoint starts with `/`"),
            ("fuse --apisock A", "`--mountpoint DIR` is required"),
            ("fuse --mountpoint M --failover-policy maybe", "use none, resend or flush"),
            ("fuse --mountpoint M --thread-num 1025", "1025"),
            ("virtiofs --apisock A", "`--sock PATH` is required"),
            ("virtiofs --sock S --frobnicate", "--frobnicate"),
            ("virtiofs --sock S -C c -D d", "cannot be used with"),
        ];
        for (line, want) in cases {
            let message = parse_line(line).expect_err(line).to_string();
            assert!(message.contains(want), "{line}: {message}");
        }
    }

    #[test]
    fn ignored_flags_say_why() {
        let o = options("--sock S --xattr -o announce_submounts,cache=auto --prefetch-files p");
        assert_eq!(o.prefetch_files, Some("p".into()));
        let flags: Vec<&str> = o.ignored.iter().map(|(flag, _)| flag.as_str()).collect();
        assert_eq!(flags, ["--xattr", "-o announce_submounts"]);
    }

    #[test]
    fn command_lines_of_virtiofsd_are_accepted() {
        let lines = [
            // Kata, Go runtime, with its default extra arguments
            "--syslog --cache=auto --shared-dir=/srv --fd=3 --thread-pool-size=1 --announce-submounts",
            // Kata, runtime-rs
            "--socket-path /s --shared-dir /srv --cache auto --thread-pool-size=1 -o announce_submounts",
            // libvirt, units, the older C virtiofsd
            "--fd=3 -o source=/srv,cache=auto,no_posix_lock,sandbox=namespace -f",
            "--socket-path=/s --socket-group=kvm -o source=/srv --sandbox=none --seccomp=none -d",
            "--shared-dir /srv --socket-path /s --inode-file-handles=prefer --allow-direct-io \
             --modcaps=+sys_admin --posix-acl --xattr --rlimit-nofile=0 --tag t",
        ];
        for line in lines {
            let Ok(Invocation::Serve(o)) = parse_line(line) else { panic!("{line}") };
            assert_eq!(o.shared_dir, Some("/srv".into()), "{line}");
            assert_eq!(o.cache, Cache::Auto, "{line}");
            let (sock, announce) = match line.contains("--fd") {
                true => (VmmSocket::Fd(3), false),
                false => (VmmSocket::Path("/s".into()), true),
            };
            assert_eq!((o.service, o.announce_socket), (Service::Vmm(sock), announce), "{line}");
        }
        let modes = [
            ("never", Cache::Never),
            ("metadata", Cache::Metadata),
            ("auto", Cache::Auto),
            ("always", Cache::Always),
        ];
        for (mode, cache) in modes {
            assert_eq!(options(&format!("--sock S --cache {mode}")).cache, cache);
            assert_eq!(options(&format!("--sock S -o cache={mode}")).cache, cache);
        }
        assert!(options("--sock S --writeback").writeback);
        assert!(options("--sock S -o writeback").writeback);
        assert!(!options("--sock S -o no_writeback").writeback);
        assert_eq!(options("--sock S -d").log_level, LevelFilter::Debug);
        assert_eq!(options("--sock S -d -l warn").log_level, LevelFilter::Warn);
    }

    #[test]
    fn the_descriptor_for_managers_says_what_the_program_says() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/kata-config/50-rafsd.json");
        let text = std::fs::read_to_string(file).unwrap();
        let file: serde_json::Value = serde_json::from_str(&text).unwrap();
        let program: serde_json::Value = serde_json::from_str(CAPABILITIES).unwrap();
        assert_eq!((&file["type"], &file["features"]), (&program["type"], &program["features"]));
        assert!(file["binary"].as_str().unwrap().starts_with('/'));
        assert!(file["description"].is_string());
    }

    #[test]
    fn version_and_help_print() {
        for line in
            ["--version", "-V", "virtiofs --version", "--help", "-h", "--print-capabilities"]
        {
            assert!(matches!(parse_line(line), Ok(Invocation::Print(_))), "{line}");
        }
    }

    #[test]
    fn mounts_on_the_host() {
        let host = |line: &str| match options(line).service {
            Service::Host(host) => host,
            Service::Vmm(socket) => panic!("{line}: {socket:?}"),
        };
        let plain = HostOptions {
            mountpoint: "M".into(),
            threads: 4,
            failover: FailoverPolicy::Resend,
            upgrade: false,
            writable: false,
        };
        // As nydus-snapshotter writes it, by hand, and in the style before subcommands.
        for line in [
            "fuse --id d1 --config C --mountpoint M --apisock A --log-level info --supervisor U",
            "--apisock A fuse -M M --thread-num 0",
            "--mountpoint M --apisock A",
        ] {
            assert_eq!(host(line), plain, "{line}");
        }
        let line = "fuse --upgrade --thread-num 7 --mountpoint M --failover-policy none --writable";
        let want = HostOptions {
            threads: 7,
            failover: FailoverPolicy::None,
            upgrade: true,
            writable: true,
            ..plain.clone()
        };
        assert_eq!(host(line), want);
        assert!(host("fuse --shared-dir D --mountpoint M").writable);
        assert_eq!(options("fuse --thread-num 7 --mountpoint M").workers, 0, "those are others");
        let ignored = options("fuse --mountpoint M --sock S --tag T").ignored;
        let flags: Vec<_> = ignored.iter().map(|(flag, _)| flag.as_str()).collect();
        assert!(flags.contains(&"--sock") && flags.contains(&"--tag"), "{flags:?}");
        assert!(options("--sock S --upgrade").ignored.iter().any(|(flag, _)| flag == "--upgrade"));
    }
}
