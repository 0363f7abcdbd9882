//! Flags that nydusd, virtiofsd and their users know: what each becomes here.
//!
//! A flag does what it says, or is listed as ignored with the reason, or is refused by name. Nothing
//! that would change what a guest may see or do is ignored.

use std::path::PathBuf;

use super::{Cli, Command, UsageError, usage_error};
use crate::daemon::host::FailoverPolicy;
use crate::fuse::{Cache, DaxPolicy};

const SUBMOUNTS: &str =
    "mounts below a shared directory are always announced to guests that can tell";
const XATTRS: &str = "extended attributes are always shown";
const LOCKS: &str = "locks on files stay in the guest";
const NO_SANDBOX: &str = "rafsd does not change its root or namespaces: confine it from outside, see docs/threat-model.md";
const HANDLES: &str = "file handles are used where the host's file system has them";
const DIRECT_IO: &str = "O_DIRECT in the guest is always allowed";

/// What `-o` options say.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct MountOptions {
    pub(super) source: Option<PathBuf>,
    pub(super) cache: Option<Cache>,
    pub(super) writeback: bool,
    pub(super) debug: bool,
    pub(super) ignored: Vec<(String, &'static str)>,
}

/// Reads the `-o` options of virtiofsd.
pub(super) fn mount_options(cli: &Cli) -> Result<MountOptions, UsageError> {
    let mut options = MountOptions::default();
    for option in cli.mount_options.iter().flat_map(|o| o.split(',')).filter(|o| !o.is_empty()) {
        let (name, value) = match option.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (option, None),
        };
        let reason = match (name, value) {
            ("source", Some(dir)) => {
                options.source = Some(dir.into());
                continue;
            }
            ("cache", Some(mode)) => {
                let mode =
                    cache_mode(mode).map_err(|e| usage_error(format!("-o {option}: {e}")))?;
                options.cache = Some(mode);
                continue;
            }
            ("writeback", None) => {
                options.writeback = true;
                continue;
            }
            ("debug", None) => {
                options.debug = true;
                continue;
            }
            ("no_writeback", None) => "is the default",
            ("announce_submounts" | "no_announce_submounts", None) => SUBMOUNTS,
            ("xattr" | "no_xattr", None) => XATTRS,
            ("posix_acl" | "no_posix_acl", None) => "the guest's kernel applies ACLs",
            ("posix_lock" | "no_posix_lock" | "flock" | "no_flock", None) => LOCKS,
            ("allow_direct_io" | "no_allow_direct_io", None) => DIRECT_IO,
            ("killpriv_v2" | "no_killpriv_v2", None) => "set-user-ID bits are always cleared",
            ("sandbox" | "modcaps", Some(_)) => NO_SANDBOX,
            ("inode_file_handles", _) | ("no_inode_file_handles", None) => HANDLES,
            ("readdirplus" | "no_readdirplus", None) => "the guest chooses",
            ("log_level", Some(_)) => "use --log-level",
            ("timeout", Some(_)) => "use --cache",
            _ => return Err(usage_error(format!("-o {option}: unknown option"))),
        };
        options.ignored.push((format!("-o {option}"), reason));
    }
    Ok(options)
}

/// A mode of virtiofsd's `--cache`.
pub(super) fn cache_mode(text: &str) -> Result<Cache, String> {
    Ok(match text {
        "never" | "none" => Cache::Never,
        "metadata" => Cache::Metadata,
        "auto" => Cache::Auto,
        "always" => Cache::Always,
        _ => return Err("use never, metadata, auto or always".to_owned()),
    })
}

/// Features that nydusd or virtiofsd have under these names and this build has not.
pub(super) fn refuse_missing_features(cli: &Cli) -> Result<(), UsageError> {
    if let Some(Command::Other(args)) = &cli.command {
        let name = args.first().map(|a| a.to_string_lossy()).unwrap_or_default();
        return Err(usage_error(match name.as_ref() {
            "singleton" | "nbd" | "uffd" => {
                format!("the command `{name}` is not in this build; it has `virtiofs` and `fuse`")
            }
            _ => format!("unknown command `{name}`; there are `virtiofs` and `fuse`"),
        }));
    }
    let given = [
        ("--fscache (serving the kernel's fscache)", cli.fscache.is_some()),
        ("--dedup-db (cache deduplication)", cli.dedup_db.is_some()),
        ("--readonly (a shared directory that guests cannot write)", cli.readonly > 0),
    ];
    match given.iter().find(|(_, given)| *given) {
        Some((what, _)) => Err(usage_error(format!("{what} is not in this build"))),
        None => Ok(()),
    }
}

/// Whether this is a mount on the host: said, or, as nydusd has it, meant by its flag.
pub(super) fn on_host(cli: &Cli) -> bool {
    match cli.command {
        Some(Command::Fuse) => true,
        None => cli.mountpoint.is_some() && cli.sock.is_none() && cli.socket_path.is_none(),
        _ => false,
    }
}

/// A value of `--failover-policy`.
pub(super) fn failover_policy(text: &str) -> Result<FailoverPolicy, String> {
    Ok(match text {
        "none" => FailoverPolicy::None,
        "resend" => FailoverPolicy::Resend,
        "flush" => FailoverPolicy::Flush,
        _ => return Err("use none, resend or flush".to_owned()),
    })
}

/// Flags that were given and change nothing, with the reason.
pub(super) fn ignored(cli: &Cli) -> Vec<(String, &'static str)> {
    let no_bootstrap = cli.bootstrap.is_none();
    let nothing_shared = cli.shared_dir.is_none() && no_bootstrap;
    const NO_IMAGE: &str = "there is no --bootstrap that it is about";
    const VIRTIOFS_ONLY: &str = "a mount on the host has none";
    const NO_WINDOW: &str = "there is no --dax that it is about";
    let no_window = matches!(cli.dax, None | Some(DaxPolicy::Off));
    const FUSE_ONLY: &str = "only a mount on the host has it";
    let host = on_host(cli);
    let flags = [
        ("--sock", host && cli.sock.is_some(), VIRTIOFS_ONLY),
        ("--tag", host && cli.tag.is_some(), VIRTIOFS_ONLY),
        ("--busy-poll", host && cli.busy_poll.is_some(), VIRTIOFS_ONLY),
        ("--num-request-queues", host && cli.num_request_queues.is_some(), VIRTIOFS_ONLY),
        ("--dax", host && cli.dax.is_some(), VIRTIOFS_ONLY),
        ("--dax-window", host && cli.dax_window.is_some(), VIRTIOFS_ONLY),
        ("--dax-fallback", host && cli.dax_fallback.is_some(), VIRTIOFS_ONLY),
        ("--dax-window", !host && no_window && cli.dax_window.is_some(), NO_WINDOW),
        (
            "--dax-fallback",
            !host && cli.dax != Some(DaxPolicy::Shared) && cli.dax_fallback.is_some(),
            "only --dax shared may need one",
        ),
        ("--mountpoint", !host && cli.mountpoint.is_some(), FUSE_ONLY),
        ("--failover-policy", !host && cli.failover_policy.is_some(), FUSE_ONLY),
        ("--upgrade", !host && cli.upgrade > 0, FUSE_ONLY),
        ("--writable", !host && cli.writable > 0, FUSE_ONLY),
        ("--backend-source", cli.backend_source.is_some(), "the backend is what --config says"),
        ("--announce-submounts", cli.announce_submounts > 0, SUBMOUNTS),
        ("--xattr", cli.xattr > 0, XATTRS),
        ("--posix-acl", cli.posix_acl > 0, "the guest's kernel applies ACLs"),
        ("--sandbox", cli.sandbox.is_some(), NO_SANDBOX),
        ("--seccomp", cli.seccomp.is_some(), NO_SANDBOX),
        ("--modcaps", cli.modcaps.is_some(), NO_SANDBOX),
        ("--inode-file-handles", cli.inode_file_handles.is_some(), HANDLES),
        ("--allow-direct-io", cli.allow_direct_io > 0, DIRECT_IO),
        ("--syslog", cli.syslog > 0, "log lines go to standard error or --log-file"),
        ("--config", cli.config.is_some() && no_bootstrap, NO_IMAGE),
        ("--localfs-dir", cli.localfs_dir.is_some() && no_bootstrap, NO_IMAGE),
        ("--prefetch-files", cli.prefetch_files.is_some() && no_bootstrap, NO_IMAGE),
        (
            "--bootstrap",
            cli.shared_dir.is_some() && !no_bootstrap,
            "--shared-dir is mounted in its place",
        ),
        (
            "--virtual-mountpoint",
            cli.virtual_mountpoint.is_some() && nothing_shared,
            "there is nothing to mount at start",
        ),
        (
            "--log-rotation-size",
            cli.log_file.is_none() && cli.log_rotation_size.is_some_and(|n| n > 0),
            "there is no --log-file",
        ),
    ];
    let given = flags.into_iter().filter(|(_, given, _)| *given);
    given.map(|(flag, _, reason)| (flag.to_owned(), reason)).collect()
}
