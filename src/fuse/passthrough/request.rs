//! What a guest asks of a file system that can be written: every operation with all its arguments.
//!
//! Names are without their NUL. A name under which something is made or removed is a single one:
//! no slash, neither `.` nor `..`. Numbers (`fh`, nodes, offsets, modes) are as the guest sent them.

use zerocopy::{FromBytes, IntoBytes};

use super::credentials::Caller;
use crate::fuse::abi::{self, Set, opcode};
use crate::fuse::request::{Request, RequestError};
use crate::fuse::session::Terms;

/// A request's meaning.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Ask<'a> {
    Lookup {
        name: &'a [u8],
    },
    Getattr {
        fh: Option<u64>,
    },
    Statx {
        fh: Option<u64>,
    },
    Setattr(abi::SetattrIn),
    Readlink,
    Symlink {
        name: &'a [u8],
        target: &'a [u8],
        caller: Caller,
    },
    Mknod {
        name: &'a [u8],
        mode: u32,
        rdev: u32,
        caller: Caller,
    },
    Mkdir {
        name: &'a [u8],
        mode: u32,
        caller: Caller,
    },
    Unlink {
        name: &'a [u8],
    },
    Rmdir {
        name: &'a [u8],
    },
    Rename {
        newdir: u64,
        flags: u32,
        old: &'a [u8],
        new: &'a [u8],
    },
    /// The request is about the directory that gets the name.
    Link {
        nodeid: u64,
        name: &'a [u8],
    },
    Open {
        flags: u32,
        kill_suidgid: bool,
    },
    Create {
        name: &'a [u8],
        flags: u32,
        mode: u32,
        kill_suidgid: bool,
        caller: Caller,
    },
    Tmpfile {
        flags: u32,
        mode: u32,
        caller: Caller,
    },
    Read {
        fh: u64,
        offset: u64,
        size: u32,
    },
    Write {
        fh: u64,
        offset: u64,
        data: &'a [u8],
        kill_suidgid: bool,
    },
    Flush {
        fh: u64,
    },
    /// RELEASE and RELEASEDIR.
    Release {
        fh: u64,
    },
    /// FSYNC and FSYNCDIR.
    Fsync {
        fh: u64,
        data_only: bool,
    },
    Opendir,
    Readdir {
        fh: u64,
        cookie: u64,
        size: u32,
        plus: bool,
    },
    Statfs,
    Syncfs,
    Access,
    Setxattr {
        name: &'a [u8],
        value: &'a [u8],
        flags: u32,
        kill_sgid: bool,
    },
    Getxattr {
        name: &'a [u8],
        size: u32,
    },
    Listxattr {
        size: u32,
    },
    Removexattr {
        name: &'a [u8],
    },
    Fallocate(abi::FallocateIn),
    Lseek {
        fh: u64,
        offset: u64,
        whence: u32,
    },
    Copy {
        args: abi::CopyFileRangeIn,
        /// The answer has 64 bits.
        wide: bool,
    },
    Unknown,
}

impl<'a> Ask<'a> {
    /// What `request` asks, in a session of these terms.
    pub(super) fn of(request: &'a Request, terms: &Terms) -> Result<Ask<'a>, RequestError> {
        let opcode = request.header.opcode;
        Ok(match opcode {
            opcode::LOOKUP => Ask::Lookup { name: request.file_name(request.body())? },
            opcode::GETATTR => {
                let args: abi::GetattrIn = request.grown_args(0)?;
                Ask::Getattr { fh: (args.getattr_flags & abi::GETATTR_FH != 0).then_some(args.fh) }
            }
            opcode::STATX => {
                let args = request.args::<abi::StatxIn>()?.0;
                Ask::Statx { fh: (args.getattr_flags & abi::GETATTR_FH != 0).then_some(args.fh) }
            }
            opcode::SETATTR => Ask::Setattr(request.args()?.0),
            opcode::READLINK => Ask::Readlink,
            opcode::SYMLINK => {
                let (name, target) = two(request.body());
                let (name, target) = (plain_name(request, name)?, until_nul(request, target)?);
                Ask::Symlink { name, target, caller: caller(request, 0)? }
            }
            opcode::MKNOD => {
                let (args, name) = request.args::<abi::MknodIn>()?;
                let (mode, rdev) = (args.mode, args.rdev);
                let caller = caller(request, args.umask)?;
                Ask::Mknod { name: plain_name(request, name)?, mode, rdev, caller }
            }
            opcode::MKDIR => {
                let (args, name) = request.args::<abi::MkdirIn>()?;
                let caller = caller(request, args.umask)?;
                Ask::Mkdir { name: plain_name(request, name)?, mode: args.mode, caller }
            }
            opcode::UNLINK => Ask::Unlink { name: plain_name(request, request.body())? },
            opcode::RMDIR => Ask::Rmdir { name: plain_name(request, request.body())? },
            opcode::RENAME => {
                let (args, names) = request.args::<abi::RenameIn>()?;
                rename(request, args.newdir, 0, names)?
            }
            opcode::RENAME2 => {
                let (args, names) = request.args::<abi::Rename2In>()?;
                rename(request, args.newdir, args.flags, names)?
            }
            opcode::LINK => {
                let (args, name) = request.args::<abi::LinkIn>()?;
                Ask::Link { nodeid: args.oldnodeid, name: plain_name(request, name)? }
            }
            opcode::OPEN => {
                let args = request.args::<abi::OpenIn>()?.0;
                let kill_suidgid = args.open_flags & abi::OPEN_KILL_SUIDGID != 0;
                Ask::Open { flags: args.flags, kill_suidgid }
            }
            opcode::CREATE => {
                let (args, name) = request.args::<abi::CreateIn>()?;
                Ask::Create {
                    name: plain_name(request, name)?,
                    flags: args.flags,
                    mode: args.mode,
                    kill_suidgid: args.open_flags & abi::OPEN_KILL_SUIDGID != 0,
                    caller: caller(request, args.umask)?,
                }
            }
            opcode::TMPFILE => {
                // A name follows, but the file has none.
                let args = request.args::<abi::CreateIn>()?.0;
                let caller = caller(request, args.umask)?;
                Ask::Tmpfile { flags: args.flags, mode: args.mode, caller }
            }
            opcode::READ => {
                let args: abi::ReadIn = request.grown_args(24)?;
                Ask::Read { fh: args.fh, offset: args.offset, size: args.size }
            }
            opcode::WRITE => {
                let (args, data) = request.args::<abi::WriteIn>()?;
                let data = usize::try_from(args.size).ok().and_then(|size| data.get(..size));
                Ask::Write {
                    fh: args.fh,
                    offset: args.offset,
                    data: data.ok_or_else(|| request.bad("fewer bytes to write than claimed"))?,
                    kill_suidgid: args.write_flags & abi::WRITE_KILL_SUIDGID != 0,
                }
            }
            opcode::FLUSH => Ask::Flush { fh: request.args::<abi::FlushIn>()?.0.fh },
            opcode::RELEASE | opcode::RELEASEDIR => {
                Ask::Release { fh: request.args::<abi::ReleaseIn>()?.0.fh }
            }
            opcode::FSYNC | opcode::FSYNCDIR => {
                let args = request.args::<abi::FsyncIn>()?.0;
                Ask::Fsync { fh: args.fh, data_only: args.fsync_flags & abi::FSYNC_FDATASYNC != 0 }
            }
            opcode::OPENDIR => Ask::Opendir,
            opcode::READDIR | opcode::READDIRPLUS => {
                let args: abi::ReadIn = request.grown_args(24)?;
                let plus = opcode == opcode::READDIRPLUS;
                Ask::Readdir { fh: args.fh, cookie: args.offset, size: args.size, plus }
            }
            opcode::STATFS => Ask::Statfs,
            opcode::SYNCFS => Ask::Syncfs,
            opcode::ACCESS => Ask::Access,
            opcode::SETXATTR => setxattr(request, terms)?,
            opcode::GETXATTR => {
                let (args, name) = request.args::<abi::GetxattrIn>()?;
                Ask::Getxattr { name: request.name(name)?, size: args.size }
            }
            opcode::LISTXATTR => Ask::Listxattr { size: request.args::<abi::GetxattrIn>()?.0.size },
            opcode::REMOVEXATTR => Ask::Removexattr { name: request.name(request.body())? },
            opcode::FALLOCATE => Ask::Fallocate(request.args()?.0),
            opcode::LSEEK => {
                let args = request.args::<abi::LseekIn>()?.0;
                Ask::Lseek { fh: args.fh, offset: args.offset, whence: args.whence }
            }
            opcode::COPY_FILE_RANGE => Ask::Copy { args: request.args()?.0, wide: false },
            opcode::COPY_FILE_RANGE_64 => Ask::Copy { args: request.args()?.0, wide: true },
            _ => Ask::Unknown,
        })
    }
}

fn setxattr<'a>(request: &'a Request, terms: &Terms) -> Result<Ask<'a>, RequestError> {
    let mut args = abi::SetxattrIn::default();
    let head = if terms.setxattr_ext() { size_of::<abi::SetxattrIn>() } else { 8 };
    let Some((start, rest)) = request.body().split_at_checked(head) else {
        return Err(request.bad("the body is too short"));
    };
    args.as_mut_bytes()[..head].copy_from_slice(start);
    let (name, value) = two(rest);
    let value = usize::try_from(args.size).ok().and_then(|size| value.get(..size));
    Ok(Ask::Setxattr {
        name: request.name(name)?,
        value: value.ok_or_else(|| request.bad("a shorter value than claimed"))?,
        flags: args.flags,
        kill_sgid: args.setxattr_flags & abi::SETXATTR_ACL_KILL_SGID != 0,
    })
}

fn rename<'a>(
    request: &Request,
    newdir: u64,
    flags: u32,
    names: &'a [u8],
) -> Result<Ask<'a>, RequestError> {
    let (old, new) = two(names);
    let (old, new) = (plain_name(request, old)?, plain_name(request, new)?);
    Ok(Ask::Rename { newdir, flags, old, new })
}

/// Splits behind the first NUL.
fn two(bytes: &[u8]) -> (&[u8], &[u8]) {
    let end = bytes.iter().position(|&b| b == 0).map_or(bytes.len(), |at| at + 1);
    bytes.split_at(end)
}

/// A name under which something can be made or removed.
fn plain_name<'a>(request: &Request, bytes: &'a [u8]) -> Result<&'a [u8], RequestError> {
    match request.file_name(bytes)? {
        b"." | b".." => Err(request.bad("a name of dots")),
        name => Ok(name),
    }
}

/// The target of a symbolic link: anything but empty, up to a page with its NUL.
fn until_nul<'a>(request: &Request, bytes: &'a [u8]) -> Result<&'a [u8], RequestError> {
    match bytes.iter().position(|&b| b == 0) {
        Some(len @ 1..4096) => Ok(&bytes[..len]),
        _ => Err(request.bad("a target that is empty, too long or without an end")),
    }
}

/// Who makes something.
fn caller(request: &Request, umask: u32) -> Result<Caller, RequestError> {
    let header = &request.header;
    let group = group(request)?;
    Ok(Caller { uid: header.uid, gid: header.gid, group, umask })
}

/// The group beside its own that the caller brings, from the extensions at the request's end.
fn group(request: &Request) -> Result<Option<u32>, RequestError> {
    let len = usize::from(request.header.total_extlen) * 8;
    let body = request.body();
    let start = body.len().checked_sub(len).ok_or_else(|| request.bad("extensions too long"))?;
    let mut rest = &body[start..];
    while !rest.is_empty() {
        let broken = || request.bad("a broken extension");
        let (header, _) = abi::ExtHeader::read_from_prefix(rest).map_err(|_| broken())?;
        let size = usize::try_from(header.size).map_err(|_| broken())?;
        let content = rest.get(size_of::<abi::ExtHeader>()..size).ok_or_else(broken)?;
        if header.kind == abi::EXT_GROUPS {
            let (groups, list) =
                abi::SuppGroups::read_from_prefix(content).map_err(|_| broken())?;
            // Linux sends none or one: that of the directory.
            return match groups.nr_groups {
                0 => Ok(None),
                _ => u32::read_from_prefix(list).map(|(gid, _)| Some(gid)).map_err(|_| broken()),
            };
        }
        rest = &rest[size.next_multiple_of(8).min(rest.len())..];
    }
    Ok(None)
}

/// Attributes that a request sets, as flags.
pub(super) fn set_of(args: &abi::SetattrIn) -> Set {
    Set::from_bits_retain(args.valid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuse::abi::InHeader;

    fn request(opcode: u32, extlen: u16, body: &[u8]) -> Request {
        let len = u32::try_from(size_of::<InHeader>() + body.len()).unwrap();
        let header = InHeader {
            len,
            opcode,
            unique: 7,
            nodeid: 1,
            uid: 1000,
            gid: 100,
            total_extlen: extlen,
            ..InHeader::default()
        };
        Request::parse(&[header.as_bytes(), body].concat()).unwrap()
    }

    fn words(words: &[u32]) -> Vec<u8> {
        words.as_bytes().to_vec()
    }

    #[test]
    fn names_are_checked() {
        let long = [&[b'n'; 256][..], b"\0"].concat();
        let rename = |names: &[u8]| [&[0; 16][..], names].concat();
        // (opcode, body, errno)
        let cases: [(u32, Vec<u8>, i32); 14] = [
            (opcode::UNLINK, b"..\0".into(), libc::EINVAL),
            (opcode::RMDIR, b".\0".into(), libc::EINVAL),
            (opcode::UNLINK, b"a/b\0".into(), libc::EINVAL),
            (opcode::UNLINK, long.clone(), libc::ENAMETOOLONG),
            (opcode::MKDIR, [&[0; 8][..], b"../x\0"].concat(), libc::EINVAL),
            (opcode::MKDIR, [&[0; 8][..], &long].concat(), libc::ENAMETOOLONG),
            (opcode::MKNOD, [&[0; 16][..], b"\0"].concat(), libc::EINVAL),
            (opcode::RENAME2, rename(b"a\0..\0"), libc::EINVAL),
            (opcode::RENAME2, rename(b"a\0b"), libc::EINVAL),
            (opcode::RENAME2, rename(b"a\0"), libc::EINVAL),
            (opcode::SYMLINK, b"name\0\0".into(), libc::EINVAL),
            (opcode::SYMLINK, [b"name\0", &[b't'; 4096][..], b"\0"].concat(), libc::EINVAL),
            (opcode::LINK, [&[0; 8][..], b"/\0"].concat(), libc::EINVAL),
            (opcode::CREATE, [&[0; 16][..], b"..\0"].concat(), libc::EINVAL),
        ];
        for (opcode, body, errno) in cases {
            let request = request(opcode, 0, &body);
            let error = Ask::of(&request, &Terms::default()).unwrap_err();
            assert_eq!(error.errno(), errno, "{opcode}: {body:?}");
        }
    }

    #[test]
    fn lengths_that_lie_are_refused() {
        let write = [&words(&[0, 0, 0, 0, 5, 0, 0, 0, 0, 0])[..], b"four"].concat();
        assert!(Ask::of(&request(opcode::WRITE, 0, &write), &Terms::default()).is_err());
        let setxattr = [&words(&[9, 0])[..], b"user.a\0value"].concat();
        assert!(Ask::of(&request(opcode::SETXATTR, 0, &setxattr), &Terms::default()).is_err());
        let mkdir = [&words(&[0o755, 0o22])[..], b"d\0"].concat();
        assert!(Ask::of(&request(opcode::MKDIR, 9, &mkdir), &Terms::default()).is_err());
        // An extension that claims more than there is.
        let body = [&mkdir[..], &[0; 6], &words(&[64, 32])].concat();
        assert!(Ask::of(&request(opcode::MKDIR, 1, &body), &Terms::default()).is_err());
    }

    #[test]
    fn who_asks_and_with_which_group() {
        let mkdir = [&words(&[0o755, 0o22])[..], b"d\0\0\0\0\0\0\0"].concat();
        let caller = Caller { uid: 1000, gid: 100, group: None, umask: 0o22 };
        let plain = request(opcode::MKDIR, 0, &mkdir);
        let want = Ask::Mkdir { name: b"d", mode: 0o755, caller };
        assert_eq!(Ask::of(&plain, &Terms::default()).unwrap(), want);
        let body = [&mkdir[..], &words(&[16, 32, 1, 500])].concat();
        let extended = request(opcode::MKDIR, 2, &body);
        let caller = Caller { group: Some(500), ..caller };
        let want = Ask::Mkdir { name: b"d", mode: 0o755, caller };
        assert_eq!(Ask::of(&extended, &Terms::default()).unwrap(), want);
    }

    #[test]
    fn values_keep_their_bytes() {
        let body = [&words(&[3, 1])[..], b"trusted.a\0\0\xFF\0more"].concat();
        let set = request(opcode::SETXATTR, 0, &body);
        let want =
            Ask::Setxattr { name: b"trusted.a", value: b"\0\xFF\0", flags: 1, kill_sgid: false };
        assert_eq!(Ask::of(&set, &Terms::default()).unwrap(), want);
    }
}
