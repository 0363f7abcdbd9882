//! What a guest asks, checked.
//!
//! A [`Request`] owns the bytes: they are copied out of guest memory once, so what was checked is
//! what is served. Any bytes give a request or an error.

use std::sync::Arc;

use smallvec::SmallVec;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::abi::{self, InHeader, opcode};

/// Header and body of one request.
#[derive(Clone, Debug)]
pub struct Request {
    pub header: InHeader,
    body: Body,
}

/// What follows the header. Everything a guest sends often fits without an allocation; what does not
/// is shared by clones.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant, reason = "the large one is the usual one")]
enum Body {
    Short(SmallVec<[u8; 288]>),
    Long(Arc<[u8]>),
}

/// Bytes that are not a request.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    #[error("{len} bytes are too few for a request header")]
    NoHeader { len: usize },
    #[error("request {unique:#x} claims {claimed} bytes, {len} are there")]
    WrongLength { unique: u64, claimed: u32, len: usize },
    #[error("request {unique:#x} of {len} bytes is longer than any we serve")]
    TooLong { unique: u64, len: usize },
    #[error("request {unique:#x} with opcode {opcode}: {what}")]
    BadBody { unique: u64, opcode: u32, what: &'static str },
    #[error("request {unique:#x} with opcode {opcode}: a name of {len} bytes")]
    LongName { unique: u64, opcode: u32, len: usize },
}

impl RequestError {
    /// Identity of the request, as far as one could be read: who gets the error.
    pub fn unique(&self) -> Option<u64> {
        match *self {
            RequestError::NoHeader { .. } => None,
            RequestError::WrongLength { unique, .. }
            | RequestError::TooLong { unique, .. }
            | RequestError::BadBody { unique, .. }
            | RequestError::LongName { unique, .. } => Some(unique),
        }
    }

    /// What the guest is told; positive.
    pub fn errno(&self) -> i32 {
        match self {
            RequestError::NoHeader { .. } | RequestError::WrongLength { .. } => libc::EIO,
            RequestError::TooLong { .. } => libc::E2BIG,
            RequestError::BadBody { .. } => libc::EINVAL,
            // The name of an attribute.
            RequestError::LongName {
                opcode: opcode::GETXATTR | opcode::SETXATTR | opcode::REMOVEXATTR,
                ..
            } => libc::ERANGE,
            RequestError::LongName { .. } => libc::ENAMETOOLONG,
        }
    }
}

/// A request's meaning; names are without their NUL.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Operation<'a> {
    Init(abi::InitIn),
    Destroy,
    Interrupt {
        unique: u64,
    },
    Forget(ForgetList<'a>),
    /// An answer to a notification: wants no answer itself.
    NotifyReply,
    Lookup {
        name: &'a [u8],
    },
    Getattr,
    Statx,
    Readlink,
    Open {
        flags: u32,
    },
    Read {
        offset: u64,
        size: u32,
    },
    Lseek {
        offset: u64,
        whence: u32,
    },
    Flush,
    Release,
    Fsync,
    Opendir,
    Readdir {
        cookie: u64,
        size: u32,
        plus: bool,
    },
    Releasedir,
    Fsyncdir,
    Syncfs,
    Statfs,
    Access {
        mask: u32,
    },
    Getxattr {
        name: &'a [u8],
        size: u32,
    },
    Listxattr {
        size: u32,
    },
    Setupmapping(abi::SetupmappingIn),
    Removemapping(RemoveList<'a>),
    /// Anything that would change the file system.
    Change,
    Unknown,
}

/// Node ids whose lookups a guest gives back, with their number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ForgetList<'a> {
    One(u64, u64),
    Batch(&'a [u8]),
}

impl ForgetList<'_> {
    /// (node id, lookups) of each.
    pub(super) fn for_each(self, mut forget: impl FnMut(u64, u64)) {
        match self {
            ForgetList::One(nodeid, lookups) => forget(nodeid, lookups),
            ForgetList::Batch(bytes) => {
                for one in bytes.chunks_exact(size_of::<abi::ForgetOne>()) {
                    if let Ok(one) = abi::ForgetOne::read_from_bytes(one) {
                        forget(one.nodeid, one.nlookup);
                    }
                }
            }
        }
    }
}

/// Ranges of the DAX window that a guest gives back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RemoveList<'a>(&'a [u8]);

impl RemoveList<'_> {
    /// Offset in the window and length of each, in bytes.
    pub(super) fn ranges(&self) -> impl Iterator<Item = (u64, u64)> {
        let each = self.0.chunks_exact(size_of::<abi::RemovemappingOne>());
        each.filter_map(|one| abi::RemovemappingOne::read_from_bytes(one).ok())
            .map(|one| (one.moffset, one.len))
    }
}

impl Request {
    /// Longest request in bytes: a WRITE of 1 MiB, its headers rounded up to a page.
    pub const MAX_LEN: usize = (1 << 20) + 4096;

    /// Checks and copies a request; bytes behind the length that its header claims are ignored.
    pub fn parse(bytes: &[u8]) -> Result<Request, RequestError> {
        let Ok((header, body)) = InHeader::read_from_prefix(bytes) else {
            return Err(RequestError::NoHeader { len: bytes.len() });
        };
        let unique = header.unique;
        if bytes.len() > Self::MAX_LEN {
            return Err(RequestError::TooLong { unique, len: bytes.len() });
        }
        let body = usize::try_from(header.len)
            .ok()
            .and_then(|len| len.checked_sub(size_of::<InHeader>()))
            .and_then(|len| body.get(..len))
            .ok_or(RequestError::WrongLength { unique, claimed: header.len, len: bytes.len() })?;
        let body = match body.len() {
            0..=288 => Body::Short(SmallVec::from_slice(body)),
            _ => Body::Long(body.into()),
        };
        Ok(Request { header, body })
    }

    /// What follows the header.
    pub(super) fn body(&self) -> &[u8] {
        match &self.body {
            Body::Short(body) => body,
            Body::Long(body) => body,
        }
    }

    /// What is asked, with the body checked.
    pub(super) fn operation(&self) -> Result<Operation<'_>, RequestError> {
        Ok(match self.header.opcode {
            opcode::INIT => Operation::Init(self.init()?),
            opcode::DESTROY => Operation::Destroy,
            opcode::INTERRUPT => {
                Operation::Interrupt { unique: self.args::<abi::InterruptIn>()?.0.unique }
            }
            opcode::FORGET => Operation::Forget(ForgetList::One(
                self.header.nodeid,
                self.args::<abi::ForgetIn>()?.0.nlookup,
            )),
            opcode::BATCH_FORGET => Operation::Forget(self.batch_forget()?),
            opcode::NOTIFY_REPLY => Operation::NotifyReply,
            opcode::LOOKUP => Operation::Lookup { name: self.file_name(self.body())? },
            opcode::GETATTR => Operation::Getattr,
            opcode::STATX => {
                self.args::<abi::StatxIn>()?;
                Operation::Statx
            }
            opcode::READLINK => Operation::Readlink,
            opcode::OPEN => Operation::Open { flags: self.args::<abi::OpenIn>()?.0.flags },
            opcode::READ => {
                let args = self.read()?;
                Operation::Read { offset: args.offset, size: args.size }
            }
            opcode::LSEEK => {
                let args = self.args::<abi::LseekIn>()?.0;
                Operation::Lseek { offset: args.offset, whence: args.whence }
            }
            opcode::FLUSH => Operation::Flush,
            opcode::RELEASE => Operation::Release,
            opcode::FSYNC => Operation::Fsync,
            opcode::OPENDIR => Operation::Opendir,
            opcode::READDIR | opcode::READDIRPLUS => {
                let args = self.read()?;
                let plus = self.header.opcode == opcode::READDIRPLUS;
                Operation::Readdir { cookie: args.offset, size: args.size, plus }
            }
            opcode::RELEASEDIR => Operation::Releasedir,
            opcode::FSYNCDIR => Operation::Fsyncdir,
            opcode::SYNCFS => Operation::Syncfs,
            opcode::STATFS => Operation::Statfs,
            opcode::ACCESS => Operation::Access { mask: self.args::<abi::AccessIn>()?.0.mask },
            opcode::GETXATTR => {
                let (args, name) = self.args::<abi::GetxattrIn>()?;
                Operation::Getxattr { name: self.name(name)?, size: args.size }
            }
            opcode::LISTXATTR => {
                Operation::Listxattr { size: self.args::<abi::GetxattrIn>()?.0.size }
            }
            opcode::SETUPMAPPING => Operation::Setupmapping(self.args::<abi::SetupmappingIn>()?.0),
            opcode::REMOVEMAPPING => Operation::Removemapping(self.remove_list()?),
            opcode::SETATTR
            | opcode::SYMLINK
            | opcode::MKNOD
            | opcode::MKDIR
            | opcode::UNLINK
            | opcode::RMDIR
            | opcode::RENAME
            | opcode::LINK
            | opcode::WRITE
            | opcode::SETXATTR
            | opcode::REMOVEXATTR
            | opcode::CREATE
            | opcode::FALLOCATE
            | opcode::RENAME2
            | opcode::COPY_FILE_RANGE
            | opcode::TMPFILE
            | opcode::COPY_FILE_RANGE_64 => Operation::Change,
            _ => Operation::Unknown,
        })
    }

    /// Whether the guest waits for an answer; it does not read one to these.
    pub(super) fn wants_answer(&self) -> bool {
        !matches!(
            self.header.opcode,
            opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT | opcode::NOTIFY_REPLY
        )
    }

    pub(super) fn bad(&self, what: &'static str) -> RequestError {
        RequestError::BadBody { unique: self.header.unique, opcode: self.header.opcode, what }
    }

    /// The structure that starts the body, and what follows it.
    pub(super) fn args<T: FromBytes>(&self) -> Result<(T, &[u8]), RequestError> {
        T::read_from_prefix(self.body()).map_err(|_| self.bad("the body is too short"))
    }

    /// As [`Self::args`] for a structure of which older guests send only the first `least` bytes;
    /// the rest is zero then.
    pub(super) fn grown_args<T>(&self, least: usize) -> Result<T, RequestError>
    where
        T: Default + FromBytes + IntoBytes + KnownLayout + Immutable,
    {
        if self.body().len() < least {
            return Err(self.bad("the body is too short"));
        }
        let mut args = T::default();
        let len = size_of::<T>().min(self.body().len());
        args.as_mut_bytes()[..len].copy_from_slice(&self.body()[..len]);
        Ok(args)
    }

    fn init(&self) -> Result<abi::InitIn, RequestError> {
        let mut init: abi::InitIn = self.grown_args(8)?;
        let extended = abi::InitFlags::from_bits_retain(u64::from(init.flags))
            .contains(abi::InitFlags::INIT_EXT);
        if !extended {
            init.flags2 = 0;
        }
        Ok(init)
    }

    fn read(&self) -> Result<abi::ReadIn, RequestError> {
        self.grown_args(24)
    }

    fn batch_forget(&self) -> Result<ForgetList<'_>, RequestError> {
        let (args, list) = self.args::<abi::BatchForgetIn>()?;
        usize::try_from(args.count)
            .ok()
            .and_then(|count| count.checked_mul(size_of::<abi::ForgetOne>()))
            .and_then(|len| list.get(..len))
            .map(ForgetList::Batch)
            .ok_or_else(|| self.bad("fewer nodes to forget than claimed"))
    }

    fn remove_list(&self) -> Result<RemoveList<'_>, RequestError> {
        let (args, list) = self.args::<abi::RemovemappingIn>()?;
        usize::try_from(args.count)
            .ok()
            .and_then(|count| count.checked_mul(size_of::<abi::RemovemappingOne>()))
            .and_then(|len| list.get(..len))
            .map(RemoveList)
            .ok_or_else(|| self.bad("fewer ranges to unmap than claimed"))
    }

    /// The bytes before the first NUL, at most [`abi::NAME_MAX`] and at least one.
    pub(super) fn name<'a>(&self, bytes: &'a [u8]) -> Result<&'a [u8], RequestError> {
        let len = bytes
            .iter()
            .position(|&b| b == 0)
            .ok_or_else(|| self.bad("a name does not end inside the body"))?;
        match len {
            0 => Err(self.bad("an empty name")),
            1..=abi::NAME_MAX => Ok(&bytes[..len]),
            _ => Err(RequestError::LongName {
                unique: self.header.unique,
                opcode: self.header.opcode,
                len,
            }),
        }
    }

    /// A name of one file: no `/` in it.
    pub(super) fn file_name<'a>(&self, bytes: &'a [u8]) -> Result<&'a [u8], RequestError> {
        let name = self.name(bytes)?;
        if name.contains(&b'/') {
            return Err(self.bad("a slash in a file name"));
        }
        Ok(name)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A request with a right header.
    fn request(opcode: u32, body: &[u8]) -> Vec<u8> {
        let len = u32::try_from(size_of::<InHeader>() + body.len()).unwrap();
        let header = InHeader { len, opcode, unique: 7, nodeid: 1, ..InHeader::default() };
        [header.as_bytes(), body].concat()
    }

    #[test]
    fn a_header_is_checked_against_what_is_there() {
        let whole = request(opcode::LOOKUP, b"name\0");
        // (bytes, error)
        let cases: [(&[u8], RequestError); 3] = [
            (&whole[..39], RequestError::NoHeader { len: 39 }),
            (&whole[..44], RequestError::WrongLength { unique: 7, claimed: 45, len: 44 }),
            (
                &request(opcode::LOOKUP, &vec![0; Request::MAX_LEN]),
                RequestError::TooLong { unique: 7, len: Request::MAX_LEN + 40 },
            ),
        ];
        for (bytes, error) in cases {
            assert_eq!(Request::parse(bytes).unwrap_err(), error);
        }
        let mut short = whole.clone();
        short[0] = 39;
        assert_eq!(
            Request::parse(&short).unwrap_err(),
            RequestError::WrongLength { unique: 7, claimed: 39, len: 45 }
        );
        let longer = [&whole[..], b"more"].concat();
        assert_eq!(
            Request::parse(&longer).unwrap().operation().unwrap(),
            Operation::Lookup { name: b"name" },
            "bytes behind the claimed length are not the request's"
        );
    }

    #[test]
    fn bodies_are_checked() {
        let long = [&[b'n'; 256][..], b"\0"].concat();
        let xattr = [&[0; 8][..], &long].concat();
        // (opcode, body, errno)
        let cases: [(u32, &[u8], i32); 9] = [
            (opcode::LOOKUP, b"", libc::EINVAL),
            (opcode::LOOKUP, b"\0", libc::EINVAL),
            (opcode::LOOKUP, b"endless", libc::EINVAL),
            (opcode::LOOKUP, b"a/b\0", libc::EINVAL),
            (opcode::LOOKUP, &long, libc::ENAMETOOLONG),
            (opcode::GETXATTR, &xattr, libc::ERANGE),
            (opcode::READ, &[0; 23], libc::EINVAL),
            (opcode::BATCH_FORGET, &[2, 0, 0, 0, 0, 0, 0, 0, 1], libc::EINVAL),
            (opcode::INIT, &[0; 7], libc::EINVAL),
        ];
        for (opcode, body, errno) in cases {
            let request = Request::parse(&request(opcode, body)).unwrap();
            let error = request.operation().unwrap_err();
            assert_eq!((error.errno(), error.unique()), (errno, Some(7)), "{opcode} {body:?}");
        }
        let longest = [&[b'n'; 255][..], b"\0"].concat();
        let request = Request::parse(&request(opcode::LOOKUP, &longest)).unwrap();
        assert_eq!(request.operation().unwrap(), Operation::Lookup { name: &[b'n'; 255] });
    }

    #[test]
    fn older_and_shorter_bodies_are_understood() {
        let read = abi::ReadIn { offset: 5, size: 6, lock_owner: 9, ..Default::default() };
        for len in [24, 40] {
            let request = Request::parse(&request(opcode::READ, &read.as_bytes()[..len])).unwrap();
            assert_eq!(request.operation().unwrap(), Operation::Read { offset: 5, size: 6 });
        }
        let init = abi::InitIn { major: 7, minor: 12, flags: 1, flags2: 1, ..Default::default() };
        for (len, flags) in [(8, 0), (16, 1), (64, 1)] {
            let request = Request::parse(&request(opcode::INIT, &init.as_bytes()[..len])).unwrap();
            let Operation::Init(got) = request.operation().unwrap() else { panic!() };
            assert_eq!((got.minor, got.flags, got.flags2), (12, flags, 0), "{len} bytes");
        }
    }

    #[test]
    fn each_node_of_a_batch_is_forgotten() {
        let body: Vec<u8> = [2, 5, 50, 6, 60].iter().flat_map(|n: &u64| n.to_ne_bytes()).collect();
        let request = Request::parse(&request(opcode::BATCH_FORGET, &body)).unwrap();
        let Operation::Forget(list) = request.operation().unwrap() else { panic!() };
        let mut seen = vec![];
        list.for_each(|node, lookups| seen.push((node, lookups)));
        assert_eq!(seen, [(5, 50), (6, 60)]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_request_or_an_error(
            opcode in 0u32..60,
            body in proptest::collection::vec(any::<u8>(), 0..400),
            raw in proptest::collection::vec(any::<u8>(), 0..400),
        ) {
            if let Ok(request) = Request::parse(&raw) {
                let _ = request.operation();
            }
            let request = Request::parse(&request(opcode, &body)).unwrap();
            if let Ok(Operation::Forget(list)) = request.operation() {
                list.for_each(|_, _| {});
            }
        }
    }
}
