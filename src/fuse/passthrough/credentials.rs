//! Who a thread acts as on the host.
//!
//! What a guest makes belongs to the user of the guest that made it, so the thread takes on that
//! user, its group and its umask for the one call. Permissions have been checked by the guest's
//! kernel, which knows more about the caller than we do; so the capability to pass over the host's
//! own checks is kept, but not the one that keeps set-group-id bits alive.
//!
//! Everything is given back when a guard is dropped. Threads that use this must not share their
//! file system context (`CLONE_FS`) with others: see [`prepare_thread`].

use rustix::fs::{Gid, Mode, Uid};
use rustix::io;
use rustix::thread::{
    CapabilitySet, UnshareFlags, capabilities, set_capabilities, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid, unshare_unsafe,
};

/// Rights of the caller that count when something is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Caller {
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// A further group of the caller, if the new file may get it.
    pub(super) group: Option<u32>,
    pub(super) umask: u32,
}

/// Makes the calling thread fit for [`become_caller`]: its umask and groups are its own from now on.
///
/// # Errors
///
/// The kernel refuses: then umask and owners are those of the process.
pub(super) fn prepare_thread() -> io::Result<()> {
    // SAFETY: of what threads share, only the file system context is parted, so no descriptor that
    // another thread counts on goes away; nothing here depends on a common working directory.
    unsafe { unshare_unsafe(UnshareFlags::FS) }?;
    if may_change() {
        set_thread_groups(&[])?;
    }
    Ok(())
}

/// Whether this process may act as other users.
pub(super) fn may_change() -> bool {
    let wanted = CapabilitySet::SETUID | CapabilitySet::SETGID;
    capabilities(None).is_ok_and(|sets| sets.effective.contains(wanted))
}

/// The thread acts as a guest's user.
pub(super) struct Acting {
    umask: Mode,
    uid: Option<Uid>,
    gid: Option<Gid>,
    groups: bool,
}

/// Lets the calling thread act as `caller`.
///
/// # Errors
///
/// The user or group cannot be taken on.
pub(super) fn become_caller(caller: &Caller) -> io::Result<Acting> {
    let umask = rustix::process::umask(Mode::from_raw_mode(caller.umask & 0o777));
    let mut acting = Acting { umask, uid: None, gid: None, groups: false };
    if !may_change() {
        return Ok(acting);
    }
    if let Some(group) = caller.group {
        set_thread_groups(&[valid_gid(group)?])?;
        acting.groups = true;
    }
    let own_gid = rustix::process::getegid();
    if own_gid.as_raw() != caller.gid {
        set_thread_res_gid(None, Some(valid_gid(caller.gid)?), None)?;
        acting.gid = Some(own_gid);
    }
    let own_uid = rustix::process::geteuid();
    if own_uid.as_raw() != caller.uid {
        if caller.uid == u32::MAX {
            return Err(io::Errno::OVERFLOW);
        }
        set_thread_res_uid(None, Some(Uid::from_raw(caller.uid)), None)?;
        acting.uid = Some(own_uid);
        // Leaving user 0 took the effective capabilities away, not the permitted ones.
        let mut sets = capabilities(None)?;
        sets.effective = sets.permitted
            & (CapabilitySet::DAC_OVERRIDE
                | CapabilitySet::DAC_READ_SEARCH
                | CapabilitySet::MKNOD
                | CapabilitySet::SETUID
                | CapabilitySet::SETGID);
        set_capabilities(None, sets)?;
    }
    Ok(acting)
}

fn valid_gid(gid: u32) -> io::Result<Gid> {
    if gid == u32::MAX { Err(io::Errno::OVERFLOW) } else { Ok(Gid::from_raw(gid)) }
}

impl Drop for Acting {
    fn drop(&mut self) {
        // User 0 first: it brings the capabilities back that the rest needs.
        let uid = self.uid.map_or(Ok(()), |uid| set_thread_res_uid(None, Some(uid), None));
        let gid = self.gid.map_or(Ok(()), |gid| set_thread_res_gid(None, Some(gid), None));
        let groups = if self.groups { set_thread_groups(&[]) } else { Ok(()) };
        rustix::process::umask(self.umask);
        if let Err(e) = uid.and(gid).and(groups) {
            log::error!("a thread cannot give up the user of a guest: {e}");
            // It must not serve anybody else: its pool starts another.
            assert!(std::thread::panicking(), "acting as somebody else");
        }
    }
}

/// The thread may not keep set-id bits of what it changes, as if it had no right to.
pub(super) struct WithoutFsetid(bool);

/// Takes `CAP_FSETID` from the calling thread: the host's kernel then clears set-id bits of files
/// that are written or cut.
///
/// # Errors
///
/// The kernel refuses.
pub(super) fn drop_fsetid() -> io::Result<WithoutFsetid> {
    let mut sets = capabilities(None)?;
    let had = sets.effective.contains(CapabilitySet::FSETID);
    if had {
        sets.effective -= CapabilitySet::FSETID;
        set_capabilities(None, sets)?;
    }
    Ok(WithoutFsetid(had))
}

impl Drop for WithoutFsetid {
    fn drop(&mut self) {
        if self.0 {
            let back = capabilities(None).and_then(|mut sets| {
                sets.effective |= CapabilitySet::FSETID;
                set_capabilities(None, sets)
            });
            if let Err(e) = back {
                log::error!("CAP_FSETID does not come back: {e}; set-id bits may be lost");
            }
        }
    }
}
