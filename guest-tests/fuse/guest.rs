//! A guest: sends requests, checks the form of every answer.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};

use tokio::runtime::Runtime;
use vm_memory::VolatileSlice;
use zerocopy::{FromBytes, IntoBytes};

use rafsd::fuse::abi::{self, Attr, EntryOut, InHeader, OutHeader, ReadIn, opcode};
use rafsd::fuse::{
    Mounts, Outcome, Pins, RafsFs, RafsOptions, Reply, Request, Server, ServerOptions,
};
use rafsd::rafs::Bootstrap;

/// What waits run on.
pub static RUNTIME: LazyLock<Runtime> =
    LazyLock::new(|| tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap());

/// A guest with one mount.
pub struct Guest {
    pub server: Server,
    next: AtomicU64,
}

/// Bytes of an answer behind its header, or the errno.
pub type Answer = Result<Vec<u8>, i32>;

/// One entry of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    pub name: Vec<u8>,
    pub ino: u64,
    pub off: u64,
    pub kind: u32,
    /// READDIRPLUS only.
    pub entry: Option<EntryOut>,
}

pub fn path(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("guest-tests/golden").join(case)
}

pub fn bootstrap(case: &str) -> Bootstrap {
    Bootstrap::open(&path(case).join("bootstrap")).unwrap()
}

/// An image of which no file data is read.
pub fn metadata(image: Bootstrap) -> Arc<Mounts> {
    Mounts::single(RafsFs::new(image, Vec::new(), RafsOptions::default()))
}

impl Guest {
    /// A guest that has not said INIT.
    pub fn unmounted(mounts: Arc<Mounts>, options: ServerOptions) -> Guest {
        Guest { server: Server::new(mounts, options), next: AtomicU64::new(1) }
    }

    /// A guest that sends every OPEN.
    pub fn mount(mounts: Arc<Mounts>) -> Guest {
        let options = ServerOptions { zero_message_open: false, ..Default::default() };
        let guest = Guest::unmounted(mounts, options);
        guest.init(45, u32::MAX).unwrap();
        guest
    }

    pub fn init(&self, minor: u32, flags: u32) -> Answer {
        let init = abi::InitIn { major: 7, minor, flags, ..Default::default() };
        self.ask(opcode::INIT, 0, init.as_bytes(), 64)
    }

    pub fn request(&self, opcode: u32, nodeid: u64, body: &[u8]) -> Request {
        let len = u32::try_from(size_of::<InHeader>() + body.len()).unwrap();
        let unique = self.next.fetch_add(2, Ordering::Relaxed);
        let header = InHeader { len, opcode, unique, nodeid, ..Default::default() };
        Request::parse(&[header.as_bytes(), body].concat()).unwrap()
    }

    /// Sends a request with `room` bytes for what follows the header of the answer.
    pub fn ask(&self, opcode: u32, nodeid: u64, body: &[u8], room: usize) -> Answer {
        let request = self.request(opcode, nodeid, body);
        self.send(&request, room).expect("an answer")
    }

    /// Sends any request; `None` if it wants no answer. Waits as often as it takes.
    pub fn send(&self, request: &Request, room: usize) -> Option<Answer> {
        let mut pins = Pins::default();
        loop {
            let mut memory = vec![0xAA; size_of::<OutHeader>() + room + 64];
            let usable = memory.len() - 64;
            let outcome = {
                // Cut as guests do: the header alone, then pages.
                let (header, pages) = memory[..usable].split_at_mut(size_of::<OutHeader>());
                let slices: Vec<_> = std::iter::once(header)
                    .chain(pages.chunks_mut(4096))
                    .map(VolatileSlice::from)
                    .collect();
                self.server.handle(request, &mut Reply::new(&slices), &pins)
            };
            assert!(memory[usable..].iter().all(|&b| b == 0xAA), "written behind the buffers");
            match outcome {
                Outcome::Wait(wait) => pins = RUNTIME.block_on(wait.ready()),
                Outcome::NoReply | Outcome::Interrupt(_) => return None,
                Outcome::Reply(len) => {
                    let (header, payload) = OutHeader::read_from_prefix(&memory).unwrap();
                    assert_eq!(header.len, len, "the header and the used length differ");
                    assert_eq!(header.unique, request.header.unique);
                    let payload = &payload[..usize::try_from(len).unwrap() - 16];
                    return Some(match header.error {
                        0 => Ok(payload.to_vec()),
                        error => {
                            assert!((-4095..0).contains(&error), "errno {error}");
                            assert_eq!(payload, b"", "an error has no body");
                            Err(-error)
                        }
                    });
                }
            }
        }
    }

    /// Sends a request whose answer is a `T`.
    pub fn get<T: FromBytes>(&self, opcode: u32, nodeid: u64, body: &[u8]) -> Result<T, i32> {
        let answer = self.ask(opcode, nodeid, body, size_of::<T>())?;
        Ok(T::read_from_bytes(&answer).unwrap_or_else(|_| panic!("{} bytes", answer.len())))
    }

    /// LOOKUP; a name that is not there has node id 0.
    pub fn lookup(&self, parent: u64, name: &[u8]) -> Result<EntryOut, i32> {
        self.get(opcode::LOOKUP, parent, &[name, b"\0"].concat())
    }

    /// The node at an absolute path.
    pub fn at(&self, path: &[u8]) -> u64 {
        path.split(|&b| b == b'/').filter(|name| !name.is_empty()).fold(1, |node, name| {
            let entry = self.lookup(node, name).unwrap();
            assert_ne!(entry.nodeid, 0, "no {}", name.escape_ascii());
            entry.nodeid
        })
    }

    pub fn attr(&self, node: u64) -> Result<Attr, i32> {
        self.get::<abi::AttrOut>(opcode::GETATTR, node, &[0; 16]).map(|out| out.attr)
    }

    pub fn read(&self, node: u64, offset: u64, size: u32) -> Answer {
        let args = ReadIn { offset, size, ..Default::default() };
        self.ask(opcode::READ, node, args.as_bytes(), usize::try_from(size).unwrap())
    }

    /// One READDIR or READDIRPLUS.
    pub fn list(&self, node: u64, cookie: u64, size: u32, plus: bool) -> Result<Vec<Listed>, i32> {
        let args = ReadIn { offset: cookie, size, ..Default::default() };
        let opcode = if plus { opcode::READDIRPLUS } else { opcode::READDIR };
        // More room than asked for: `size` is what counts.
        let answer = self.ask(opcode, node, args.as_bytes(), 2 * usize::try_from(size).unwrap())?;
        assert!(answer.len() <= usize::try_from(size).unwrap(), "more than asked for");
        let mut rest = &answer[..];
        let mut listed = vec![];
        while !rest.is_empty() {
            let before = rest.len();
            let entry = plus.then(|| {
                let (entry, behind) = EntryOut::read_from_prefix(rest).unwrap();
                rest = behind;
                entry
            });
            let (dirent, behind) = abi::Dirent::read_from_prefix(rest).unwrap();
            let name = behind[..usize::try_from(dirent.namelen).unwrap()].to_vec();
            let used = (before - behind.len() + name.len()).next_multiple_of(8);
            rest = &behind[used - (before - behind.len())..];
            let (ino, off, kind) = (dirent.ino, dirent.off, dirent.kind);
            listed.push(Listed { name, ino, off, kind, entry });
        }
        Ok(listed)
    }

    /// All of a directory, in pieces of `size` bytes.
    pub fn list_all(&self, node: u64, size: u32, plus: bool) -> Vec<Listed> {
        let mut all: Vec<Listed> = vec![];
        loop {
            let cookie = all.last().map_or(0, |last| last.off);
            let more = self.list(node, cookie, size, plus).unwrap();
            if more.is_empty() {
                return all;
            }
            all.extend(more);
        }
    }
}
