//! Answers requests: finds the file system a request is about, asks it, writes the answer.
//!
//! A server is one session with one guest. Its threads share nothing but the terms agreed at INIT.

use std::sync::Arc;

use rustix::io::Errno;
use zerocopy::IntoBytes;

use super::abi::{self, Attr, EntryOut, opcode};
use super::dax::{Dax, DaxCounters, DaxOptions, Mapping, SharedMemory};
use super::file_system::{Call, FileSystem, FsError, chain};
use super::listing::Listing;
use super::mounts::{Mounts, Place, Tree};
use super::reply::Reply;
use super::request::{ForgetList, Operation, Request};
use super::session::{ServerOptions, Session, Terms, has_window};
use super::wait::{Pins, Wait};

/// What became of a request.
#[derive(Debug)]
pub enum Outcome {
    /// The answer is written: this many bytes, header included; 0 if there was no room for one.
    Reply(u32),
    /// The guest expects no answer.
    NoReply,
    /// The answer needs something that is not here yet.
    Wait(Wait),
    /// The guest gives up the request with this `unique`, and expects no answer to saying so.
    Interrupt(u64),
}

/// Answers the requests of one guest.
pub struct Server {
    mounts: Arc<Mounts>,
    options: ServerOptions,
    session: Session,
    dax: Option<Dax>,
}

impl Server {
    /// A server that waits for INIT.
    pub fn new(mounts: Arc<Mounts>, options: ServerOptions) -> Server {
        Server { mounts, options, session: Session::default(), dax: None }
    }

    /// The same server for a guest that may have a DAX window in `memory`.
    pub fn with_window(
        self,
        memory: Arc<dyn SharedMemory>,
        options: DaxOptions,
        counters: Arc<DaxCounters>,
    ) -> Server {
        Server { dax: Dax::new(memory, options, counters), ..self }
    }

    /// Goes on with the session of another process, without an INIT: `agreed` is what its server
    /// [`Self::agreed`] on, and the same images are mounted here.
    ///
    /// # Errors
    ///
    /// The guest was told that nothing changes, and what is mounted is something that does; or what
    /// it has mapped is not known here.
    pub fn resume(&self, agreed: u64) -> Result<(), &'static str> {
        let terms = Terms::from_bits(agreed);
        if terms.mapping() != Mapping::None {
            return Err("the guest has a DAX window, which another process has filled");
        }
        let promise = if terms.fixed() {
            let promise = self.mounts.promise();
            Some(promise.ok_or("the tree is no longer one that never changes")?.0)
        } else {
            None
        };
        self.session.resume(terms, promise);
        Ok(())
    }

    /// What keeps the guest with this process: a file system of which it knows what no other process
    /// would.
    pub fn ties(&self) -> Option<String> {
        if self.session.terms().mapping() != Mapping::None {
            return Some("the guest has a DAX window, which is filled by this process".to_owned());
        }
        let tree = self.mounts.load();
        let tie = tree.file_systems().find(|fs| fs.remembers());
        tie.map(|fs| format!("{}: the guest knows files of a shared directory", fs.name()))
    }

    /// What was agreed at INIT, for a process of the same version; 0 if no session is open.
    pub fn agreed(&self) -> u64 {
        self.session.terms().to_bits()
    }

    /// Answers `request` into `reply`, or says what it waits for. Never blocks.
    ///
    /// `pins` is what an earlier [`Outcome::Wait`] of the same request made ready, and empty at
    /// first. Any number of threads may call this at the same time.
    pub fn handle(&self, request: &Request, reply: &mut Reply<'_>, pins: &Pins) -> Outcome {
        let tree = self.mounts.load();
        let counters = tree.counters(request.header.nodeid);
        let begun = counters.begin(request.header.opcode, pins.since);
        match self.serve(&tree, request, reply, pins) {
            Outcome::Wait(wait) => {
                let since = pins.since.unwrap_or_else(|| counters.wait(begun));
                Outcome::Wait(wait.of_request(since))
            }
            outcome => {
                let (errno, bytes) = reply.sent();
                counters.end(begun, errno, bytes, self.mounts.times());
                if let Some(files) = &counters.files
                    && let Some(place) = tree.resolve(request.header.nodeid)
                {
                    files.note(place.node, request.header.opcode, errno, bytes);
                }
                outcome
            }
        }
    }

    fn serve(&self, tree: &Tree, request: &Request, reply: &mut Reply<'_>, pins: &Pins) -> Outcome {
        let header = &request.header;
        let operation = match request.operation() {
            Ok(operation) => operation,
            Err(error) => {
                log::debug!("{error}");
                if !request.wants_answer() {
                    return Outcome::NoReply;
                }
                return Outcome::Reply(reply.error(header.unique, error.errno()));
            }
        };
        let terms = self.session.terms();
        match operation {
            Operation::Init(init) => {
                tree.file_systems().for_each(FileSystem::end_session);
                let dax = self.dax.as_ref().filter(|_| pins.mapping.is_none());
                if let Some(wait) = dax.and_then(|dax| dax.begin(has_window(&init))) {
                    return Outcome::Wait(wait);
                }
                let mapping = pins.mapping.unwrap_or_default();
                return Outcome::Reply(self.init(header.unique, &init, mapping, reply));
            }
            Operation::Destroy => {
                self.session.end();
                tree.file_systems().for_each(FileSystem::end_session);
                // A guest that is told that all is over may be switched off, and a VMM whose guest is
                // must not be asked any more.
                if let Some(wait) = self.dax.as_ref().and_then(Dax::finish) {
                    return Outcome::Wait(wait);
                }
                return Outcome::Reply(reply.done(header.unique));
            }
            Operation::NotifyReply => return Outcome::NoReply,
            Operation::Interrupt { unique } => return Outcome::Interrupt(unique),
            Operation::Forget(list) => {
                self.forget(tree, list);
                return Outcome::NoReply;
            }
            _ => {}
        }
        let answer = if terms.open() {
            self.answer(tree, &terms, request, &operation, reply, pins)
        } else {
            Err(FsError::NoSession)
        };
        match answer {
            Ok(len) => Outcome::Reply(len),
            Err(FsError::Wait(wait)) => Outcome::Wait(wait),
            Err(error) => {
                if error.is_fault() {
                    let place = tree.resolve(header.nodeid);
                    let name = place.as_ref().map_or("?", |place| place.fs.name());
                    log::error!("{name}: {}", chain(&error));
                }
                Outcome::Reply(reply.error(header.unique, error.errno()))
            }
        }
    }

    /// Answers request `unique` with `errno`, which is positive: for bytes that are no request.
    /// Returns the bytes written.
    pub fn error(unique: u64, errno: i32, reply: &mut Reply<'_>) -> u32 {
        reply.error(unique, errno)
    }

    fn init(
        &self,
        unique: u64,
        init: &abi::InitIn,
        mapping: Mapping,
        reply: &mut Reply<'_>,
    ) -> u32 {
        match self.session.start(init, &self.options, self.mounts.promise(), mapping) {
            Some((out, len)) => {
                log::debug!(
                    "session with FUSE {}.{}, flags {:#x} {:#x}",
                    init.major,
                    init.minor,
                    out.flags,
                    out.flags2
                );
                reply.bytes(unique, &out.as_bytes()[..len])
            }
            None => {
                log::warn!("a guest speaks FUSE {}.{}, which is too old", init.major, init.minor);
                reply.error(unique, libc::EPROTO)
            }
        }
    }

    fn forget(&self, tree: &Tree, list: ForgetList<'_>) {
        list.for_each(|nodeid, lookups| {
            if let Some(place) = tree.resolve(nodeid) {
                place.fs.forget(place.node, lookups);
            }
        });
    }

    /// Everything that is about a node. Returns the bytes written.
    fn answer(
        &self,
        tree: &Tree,
        terms: &Terms,
        request: &Request,
        operation: &Operation<'_>,
        reply: &mut Reply<'_>,
        pins: &Pins,
    ) -> Result<u32, FsError> {
        let header = &request.header;
        let unique = header.unique;
        let mut place = tree.resolve(header.nodeid).ok_or(FsError::Stale)?;
        place.mapping = terms.mapping();
        let Place { fs, node, .. } = place;
        let call = Call { request, terms: *terms, naming: place.naming() };
        if let Some(answer) = fs.serve(&call, reply, pins) {
            return answer;
        }
        Ok(match *operation {
            Operation::Lookup { name } => {
                let out = tree.lookup(&place, name)?;
                let len = if terms.minor() < 9 { 120 } else { size_of::<EntryOut>() };
                reply.bytes(unique, &out.as_bytes()[..len])
            }
            Operation::Getattr => {
                let attr = place.attr(node, fs.attr(node)?);
                let out = abi::AttrOut { attr_valid: fs.valid_secs(), attr, ..Default::default() };
                let len = if terms.minor() < 9 { 96 } else { size_of::<abi::AttrOut>() };
                reply.bytes(unique, &out.as_bytes()[..len])
            }
            Operation::Statx => {
                let stat = statx(&place.attr(node, fs.attr(node)?));
                let out = abi::StatxOut { attr_valid: fs.valid_secs(), stat, ..Default::default() };
                reply.send(unique, &out)
            }
            Operation::Readlink => reply.bytes(unique, &fs.readlink(node)?),
            Operation::Open { flags } => {
                let open = fs.open(node, flags)?;
                if terms.no_open() {
                    return Err(FsError::Unknown);
                }
                reply.send(unique, &open)
            }
            Operation::Opendir => {
                let open = fs.opendir(node)?;
                if terms.no_opendir() {
                    return Err(FsError::Unknown);
                }
                reply.send(unique, &open)
            }
            Operation::Read { offset, size } => {
                let mut payload = reply.payload(usize::try_from(size).unwrap_or(usize::MAX));
                fs.read(node, offset, &mut payload, pins)?;
                reply.finish(unique, &payload)
            }
            Operation::Lseek { offset, whence } => {
                let whence = i32::try_from(whence).map_err(|_| FsError::InvalidArgument)?;
                let offset = fs.lseek(node, offset, whence)?;
                reply.send(unique, &abi::LseekOut { offset })
            }
            Operation::Readdir { cookie, size, plus } => {
                let payload = reply.payload(usize::try_from(size).unwrap_or(usize::MAX));
                let mut listing = Listing::new(payload, place, plus);
                fs.readdir(node, cookie, &mut listing)?;
                let payload = listing.into_payload().ok_or(FsError::InvalidArgument)?;
                reply.finish(unique, &payload)
            }
            Operation::Statfs => {
                let out = fs.statfs();
                let len = if terms.minor() < 4 { 48 } else { size_of::<abi::StatfsOut>() };
                reply.bytes(unique, &out.as_bytes()[..len])
            }
            Operation::Access { mask } => {
                fs.access(node, mask)?;
                reply.done(unique)
            }
            Operation::Getxattr { .. } | Operation::Listxattr { .. } if terms.no_xattrs() => {
                // The guest need never ask again, for any node.
                return Err(FsError::Unknown);
            }
            Operation::Getxattr { name, size } => {
                let value = fs.getxattr(node, name)?;
                let len = u32::try_from(value.len()).map_err(|_| FsError::SmallBuffer)?;
                match size {
                    0 => reply.send(unique, &abi::GetxattrOut { size: len, padding: 0 }),
                    _ if size < len => return Err(FsError::SmallBuffer),
                    _ => reply.bytes(unique, &value),
                }
            }
            Operation::Listxattr { size } => {
                let mut payload = reply.payload(usize::try_from(size).unwrap_or(usize::MAX));
                let (mut len, mut fits) = (0, true);
                fs.listxattr(node, &mut |prefix, name| {
                    len += prefix.len() + name.len() + 1;
                    fits = fits
                        && payload.put(prefix.as_bytes())
                        && payload.put(name)
                        && payload.put(b"\0");
                })?;
                if size == 0 {
                    let size = u32::try_from(len).map_err(|_| FsError::SmallBuffer)?;
                    reply.send(unique, &abi::GetxattrOut { size, padding: 0 })
                } else if fits {
                    reply.finish(unique, &payload)
                } else {
                    return Err(FsError::SmallBuffer);
                }
            }
            // Nothing is ever written, so nothing is left to do.
            Operation::Flush
            | Operation::Release
            | Operation::Fsync
            | Operation::Releasedir
            | Operation::Fsyncdir
            | Operation::Syncfs => reply.done(unique),
            Operation::Setupmapping(ref args) => {
                let dax = self.dax.as_ref().ok_or(FsError::Unknown)?;
                match &pins.answer {
                    Some(answer) => answer.send(unique, reply),
                    None => {
                        let (moffset, foffset) = dax.check(args)?;
                        let extents = fs.extents(node, foffset, args.len, pins);
                        return Err(match extents {
                            Ok(extents) => dax.set_up(moffset, extents, pins),
                            Err(FsError::Wait(wait)) => FsError::Wait(wait.uninterrupted()),
                            Err(e) => e,
                        });
                    }
                }
            }
            Operation::Removemapping(list) => {
                let dax = self.dax.as_ref().ok_or(FsError::Unknown)?;
                match &pins.answer {
                    Some(answer) => answer.send(unique, reply),
                    None => return Err(dax.remove(list, pins)?),
                }
            }
            // The guest copies itself then, as an overlay does from an image to its upper layer.
            Operation::Change
                if matches!(
                    header.opcode,
                    opcode::COPY_FILE_RANGE | opcode::COPY_FILE_RANGE_64
                ) =>
            {
                return Err(FsError::Host(Errno::XDEV));
            }
            Operation::Change => return Err(FsError::ReadOnly),
            Operation::Unknown => return Err(FsError::Unknown),
            Operation::Init(_)
            | Operation::Destroy
            | Operation::Interrupt { .. }
            | Operation::Forget(_)
            | Operation::NotifyReply => return Err(FsError::InvalidArgument),
        })
    }
}

/// `attr` in the form of `statx(2)`: basic attributes, no time of birth.
fn statx(attr: &Attr) -> abi::Statx {
    let time = |secs: u64, tv_nsec| abi::StatxTime {
        tv_sec: secs.cast_signed(),
        tv_nsec,
        ..Default::default()
    };
    abi::Statx {
        mask: libc::STATX_BASIC_STATS,
        blksize: attr.blksize,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        mode: u16::try_from(attr.mode & 0xFFFF).expect("masked to 16 bits"),
        ino: attr.ino,
        size: attr.size,
        blocks: attr.blocks,
        atime: time(attr.atime, attr.atimensec),
        ctime: time(attr.ctime, attr.ctimensec),
        mtime: time(attr.mtime, attr.mtimensec),
        rdev_major: (attr.rdev >> 8) & 0xFFF,
        rdev_minor: (attr.rdev & 0xFF) | ((attr.rdev >> 12) & 0xF_FF00),
        ..Default::default()
    }
}
