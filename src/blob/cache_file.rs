//! The cache's files of one blob, in `<work_dir>` and `<work_dir>/rafsd/` (mode 0700; files 0600).
//!
//! | file | bytes |
//! |---|---|
//! | `../<id>.layer.disk` | the data file: the uncompressed blob, sparse, each chunk at its uncompressed offset |
//! | `<id>.chunk_map` | a [`MapHeader`], 4096 bytes; a state byte for each chunk, 1 = its bytes are in the data file; zeros to a multiple of 4096; a seal for each chunk, 32 bytes |
//! | `<id>.blob.meta` | a [`TableHeader`], 4096 bytes; the chunk-info header as in the blob, 4096 bytes; the context table, decompressed |
//! | `lock` | empty; byte 0 is locked while files are made or replaced, others while a context table is fetched |
//!
//! The *seal* of a chunk is the digest that its writer has verified it against. It keeps images
//! apart that claim different contents for the same chunk of the same blob: who finds bytes that
//! match the seal but not its own digest leaves them alone, and does without caching.
//!
//! The data file is where nydus-snapshotter measures and collects the data of a blob, under the one of the
//! names it knows that no nydusd gives to a file. Whoever removes it frees its space; what is left of the
//! blob in `rafsd/` is small, and goes when the directory is opened the next time.
//!
//! Nothing found here is believed: the map says where looking is worthwhile, digests decide. A
//! file that is damaged or of another size is replaced under its name, never changed or
//! shortened, as another process may use it. So is a file in `rafsd/` that is not ours; a data file that is
//! not stays, and we use a nameless one. One that is sound, but of another format version or
//! of a blob with another context table, is left to its owner; we then use a nameless file.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use sha2::{Digest, Sha256};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::claim::Claim;
use crate::rafs::BlobInfo;
use crate::rafs::id::{BlobId, ChunkIndex};
use crate::rafs::layout::{CI_HEADER_SIZE, CiHeader};

const MAP_MAGIC: [u8; 8] = *b"RAFSDMAP";
const TABLE_MAGIC: [u8; 8] = *b"RAFSDTBL";
const VERSION: u32 = 1;
const HEADER_SIZE: u64 = 4096;
const SEAL_SIZE: u64 = 32;
/// State byte of a chunk whose bytes are in the data file.
const READY: u8 = 1;
const FILE_MODE: Mode = Mode::RUSR.union(Mode::WUSR);
/// Suffixes of files in `rafsd/` that are worth nothing without the data file of their blob. The last was that
/// file's own when it lay there, too.
const COMPANIONS: [&str; 3] = [".chunk_map", ".blob.meta", ".blob.data"];
/// How old they must be to go: the context table of a blob is saved before its data file is made.
const COMPANION_AGE: Duration = Duration::from_secs(3600);

/// In `<work_dir>`.
fn data_name(blob: &str) -> String {
    format!("{blob}.layer.disk")
}

/// Start of `<id>.chunk_map`. Versions to come keep the meaning of the fields up to the checksum,
/// so that each can tell a damaged map from one it must leave alone.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct MapHeader {
    /// `RAFSDMAP`.
    magic: [u8; 8],
    version: U32,
    chunk_count: U32,
    blob_id: [u8; 64],
    /// Bytes of the data file.
    uncompressed_size: U64,
    /// SHA-256 of the decompressed context table: which chunk is where in the data file.
    layout: [u8; 32],
    /// SHA-256 of what precedes it.
    checksum: [u8; 32],
    reserved: [u8; 3944],
}
const _: () = assert!(size_of::<MapHeader>() as u64 == HEADER_SIZE);

/// Start of `<id>.blob.meta`.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct TableHeader {
    /// `RAFSDTBL`.
    magic: [u8; 8],
    version: U32,
    reserved: U32,
    blob_id: [u8; 64],
    /// Bytes of the context table.
    table_len: U64,
    /// SHA-256 of the fields above, the chunk-info header and the context table.
    checksum: [u8; 32],
    reserved2: [u8; 3976],
}
const _: () = assert!(size_of::<TableHeader>() as u64 == HEADER_SIZE);

/// Why there is no cache directory.
#[derive(Debug)]
pub enum DirError {
    /// The disk is full or read-only: go on without, try again later.
    NoRoom(io::Error),
    Unsafe {
        path: PathBuf,
        reason: String,
    },
    Io(io::Error),
}

/// The cache directory, open.
pub struct CacheDir {
    fd: OwnedFd,
    path: PathBuf,
    /// The one that it is in, with the data files.
    data: OwnedFd,
}

impl CacheDir {
    /// Makes `<work_dir>/rafsd` if need be.
    pub fn open(work_dir: &Path) -> Result<CacheDir, DirError> {
        let failed = |e: io::Error| match e.kind() {
            io::ErrorKind::ReadOnlyFilesystem
            | io::ErrorKind::StorageFull
            | io::ErrorKind::QuotaExceeded => DirError::NoRoom(e),
            _ => DirError::Io(e),
        };
        std::fs::create_dir_all(work_dir).map_err(failed)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let data =
            rustix::fs::open(work_dir, flags, Mode::empty()).map_err(|e| failed(e.into()))?;
        let path = work_dir.join("rafsd");
        match rustix::fs::mkdir(&path, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => (),
            Err(e) if !path.exists() => return Err(failed(e.into())),
            Err(_) => (), // there is one on a read-only disk
        }
        let unsafe_dir =
            |reason: &str| DirError::Unsafe { path: path.clone(), reason: reason.into() };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::open(&path, flags, Mode::empty()).map_err(|e| match e {
            Errno::LOOP | Errno::NOTDIR => unsafe_dir("it is no directory"),
            e => failed(e.into()),
        })?;
        let stat = rustix::fs::fstat(&fd).map_err(|e| DirError::Io(e.into()))?;
        if stat.st_uid != rustix::process::geteuid().as_raw() {
            return Err(unsafe_dir("it belongs to another user"));
        }
        if stat.st_mode & 0o022 != 0 {
            return Err(unsafe_dir("others may write to it"));
        }
        let dir = CacheDir { fd, path, data };
        match dir.sweep() {
            Err(e) if e.kind() != io::ErrorKind::ReadOnlyFilesystem => {
                log::warn!("cache {}: leftovers stay: {e}", dir.path.display());
            }
            _ => (),
        }
        Ok(dir)
    }

    /// Removes what is left of blobs whose data files somebody has removed.
    fn sweep(&self) -> io::Result<()> {
        let _locked = self.lock()?;
        let now = SystemTime::now();
        for entry in rustix::fs::Dir::read_from(&self.fd)? {
            let entry = entry?;
            let Ok(name) = entry.file_name().to_str() else { continue };
            let Some(blob) = COMPANIONS.iter().find_map(|suffix| name.strip_suffix(suffix)) else {
                continue;
            };
            let flags = AtFlags::SYMLINK_NOFOLLOW;
            let data = rustix::fs::statat(&self.data, data_name(blob), flags);
            if !matches!(data, Err(Errno::NOENT)) {
                continue;
            }
            let stat = rustix::fs::statat(&self.fd, name, flags)?;
            let changed =
                UNIX_EPOCH + Duration::from_secs(u64::try_from(stat.st_mtime).unwrap_or(0));
            if now.duration_since(changed).is_ok_and(|age| age > COMPANION_AGE) {
                rustix::fs::unlinkat(&self.fd, name, AtFlags::empty())?;
            }
        }
        Ok(())
    }

    /// The lock file, opened anew, so that its locks exclude others of this process too.
    fn lock_file(&self) -> io::Result<Arc<File>> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.fd, "lock", flags, FILE_MODE)?;
        Ok(Arc::new(File::from(fd)))
    }

    /// What to lock while the context table of `blob` is fetched.
    pub fn table_lock(&self, blob: &BlobId) -> io::Result<(Arc<File>, Range<u64>)> {
        let hash: [u8; 32] = Sha256::digest(blob.as_bytes()).into();
        let (start, _) = hash.split_first_chunk().expect("32 bytes hold 8");
        let byte = 1 + (u64::from_le_bytes(*start) >> 2); // a lock's end must fit in 63 bits
        Ok((self.lock_file()?, byte..byte + 1))
    }

    /// Locks the directory against other makers of files. Waits only for local file operations.
    fn lock(&self) -> io::Result<Claim> {
        Claim::take(&self.lock_file()?, 0..1)
    }

    /// Opens a file of ours in `rafsd/`. `Ok(None)` if it is not there, or is not safe to use.
    fn open_ours(&self, name: &str, writable: bool) -> io::Result<Option<File>> {
        match open_safely(&self.fd, name, writable)? {
            Opened::Safe(file) => Ok(Some(file)),
            Opened::Nothing => Ok(None),
            Opened::Unsafe(reason) => {
                log::warn!("cache {}/{name}: not used: {reason}", self.path.display());
                Ok(None)
            }
        }
    }

    fn has(&self, name: &str) -> bool {
        rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW).is_ok()
    }

    /// The data file of a blob.
    fn open_data(&self, blob: &BlobId, writable: bool) -> io::Result<Opened> {
        let name = data_name(blob.as_str());
        let opened = open_safely(&self.data, &name, writable)?;
        if let Opened::Unsafe(reason) = opened {
            log::warn!("cache {}/../{name}: left alone: {reason}", self.path.display());
        }
        Ok(opened)
    }

    /// Makes `name` in `rafsd/`, in the place of what may be there, filled by `fill`.
    fn make(
        &self,
        name: &str,
        fill: impl FnOnce(&File) -> io::Result<()>,
        locked: &Claim,
    ) -> io::Result<File> {
        self.make_in(&self.fd, name, fill, locked)
    }

    /// Makes `name` in `place`, from a file in `rafsd/`. The directory is locked, so a temporary file of
    /// this name is a leftover.
    fn make_in(
        &self,
        place: &OwnedFd,
        name: &str,
        fill: impl FnOnce(&File) -> io::Result<()>,
        _locked: &Claim,
    ) -> io::Result<File> {
        let temporary = format!("{name}.tmp");
        let (file, made) = self.make_temporary(&temporary)?;
        fill(&file)
            .and_then(|()| Ok(rustix::fs::renameat(&self.fd, made, place, name)?))
            .inspect_err(|_| {
                let _ = rustix::fs::unlinkat(&self.fd, made, AtFlags::empty());
            })?;
        Ok(file)
    }

    fn make_temporary<'a>(&self, name: &'a str) -> io::Result<(File, &'a str)> {
        match rustix::fs::unlinkat(&self.fd, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => (),
            Err(e) => return Err(e.into()),
        }
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.fd, name, flags, FILE_MODE)?;
        Ok((File::from(fd), name))
    }

    /// A file without a name, of `size` bytes.
    fn nameless(&self, blob: &BlobId, size: u64) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
        let file = match rustix::fs::openat(&self.fd, ".", flags, FILE_MODE) {
            Ok(fd) => File::from(fd),
            Err(_) => {
                // A file system without O_TMPFILE.
                let _locked = self.lock()?;
                let name = format!("{blob}.private.tmp");
                let (file, name) = self.make_temporary(&name)?;
                rustix::fs::unlinkat(&self.fd, name, AtFlags::empty())?;
                file
            }
        };
        file.set_len(size)?;
        Ok(file)
    }

    /// The context table that was saved for `blob`, and its header; `None` if there is none that
    /// is sound. The caller checks it against the image.
    pub fn load_table(&self, blob: &BlobInfo) -> Option<(CiHeader, Vec<u8>)> {
        let file = self.open_ours(&format!("{}.blob.meta", blob.id), false).ok()??;
        let table_len = blob.ci_uncompressed_size;
        if file.metadata().ok()?.len() != HEADER_SIZE + CI_HEADER_SIZE + table_len {
            return None;
        }
        let mut header = TableHeader::new_zeroed();
        let mut ci_header = CiHeader::new_zeroed();
        let mut table = vec![0; usize::try_from(table_len).ok()?];
        file.read_exact_at(header.as_mut_bytes(), 0).ok()?;
        file.read_exact_at(ci_header.as_mut_bytes(), HEADER_SIZE).ok()?;
        file.read_exact_at(&mut table, HEADER_SIZE + CI_HEADER_SIZE).ok()?;
        let want = table_header(&blob.id, &ci_header, &table);
        if header.as_bytes() != want.as_bytes() {
            log::warn!(
                "blob {}: the saved context table is damaged or of another version",
                blob.id
            );
            return None;
        }
        Some((ci_header, table))
    }

    /// Saves a context table for the next process.
    pub fn save_table(&self, blob: &BlobId, ci_header: &CiHeader, table: &[u8]) -> io::Result<()> {
        let header = table_header(blob, ci_header, table);
        let fill = |file: &File| {
            file.write_all_at(header.as_bytes(), 0)?;
            file.write_all_at(ci_header.as_bytes(), HEADER_SIZE)?;
            file.write_all_at(table, HEADER_SIZE + CI_HEADER_SIZE)
        };
        let locked = self.lock()?;
        self.make(&format!("{blob}.blob.meta"), fill, &locked).map(drop)
    }
}

fn table_header(blob: &BlobId, ci_header: &CiHeader, table: &[u8]) -> TableHeader {
    let mut header = TableHeader::new_zeroed();
    header.magic = TABLE_MAGIC;
    header.version = U32::new(VERSION);
    header.blob_id = *blob.as_bytes();
    header.table_len = U64::new(table.len() as u64);
    let hash = Sha256::new().chain_update(header.as_bytes());
    header.checksum = hash.chain_update(ci_header.as_bytes()).chain_update(table).finalize().into();
    header
}

/// The data of one blob: where chunks are written to and served from.
pub struct CacheFiles {
    /// The uncompressed blob.
    pub data: Arc<File>,
    /// What other processes have put there; `None` if `data` is a nameless file of our own.
    pub map: Option<ChunkMap>,
    pub writable: bool,
}

/// What the data files of a blob must agree on.
pub struct Geometry<'a> {
    pub blob: &'a BlobId,
    pub chunk_count: u32,
    /// Bytes.
    pub uncompressed_size: u64,
    /// SHA-256 of the context table.
    pub layout: [u8; 32],
}

/// What is found under a name.
enum Opened {
    Nothing,
    /// A file that nobody else can have put something in.
    Safe(File),
    /// Why it is not one.
    Unsafe(&'static str),
}

fn open_safely(dir: &OwnedFd, name: &str, writable: bool) -> io::Result<Opened> {
    let access = if writable { OFlags::RDWR } else { OFlags::RDONLY };
    let flags = access | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = match rustix::fs::openat(dir, name, flags, Mode::empty()) {
        Ok(fd) => File::from(fd),
        Err(Errno::NOENT) => return Ok(Opened::Nothing),
        Err(Errno::LOOP | Errno::NXIO | Errno::ISDIR) => {
            return Ok(Opened::Unsafe("it is no file"));
        }
        Err(e) => return Err(e.into()),
    };
    let metadata = file.metadata()?;
    Ok(if !metadata.is_file() {
        Opened::Unsafe("it is no file")
    } else if metadata.uid() != rustix::process::geteuid().as_raw() {
        Opened::Unsafe("it belongs to another user")
    } else if metadata.mode() & 0o022 != 0 {
        Opened::Unsafe("others may write to it")
    } else if metadata.nlink() != 1 {
        Opened::Unsafe("it has other names")
    } else {
        Opened::Safe(file)
    })
}

/// What is found under the name of a chunk map.
enum Found {
    Good(ChunkMap),
    /// Nothing, or nothing usable: make a new one.
    Nothing,
    /// A sound map of somebody who sees the blob otherwise.
    Foreign(&'static str),
}

impl CacheFiles {
    /// Opens or makes the files. Does I/O and may wait for another process that is making files.
    ///
    /// # Errors
    ///
    /// If there is no room for them, or the disk fails: the blob is then served without a cache.
    pub fn open(dir: &CacheDir, geometry: &Geometry<'_>) -> io::Result<CacheFiles> {
        let locked = match dir.lock() {
            Ok(locked) => locked,
            Err(e) if e.kind() == io::ErrorKind::ReadOnlyFilesystem => {
                return Self::open_read_only(dir, geometry);
            }
            Err(e) => return Err(e),
        };
        let blob = geometry.blob;
        let map_name = format!("{blob}.chunk_map");
        let map = geometry.find_map(dir, &map_name, true)?;
        if let Found::Foreign(reason) = map {
            log::warn!("blob {blob}: the cache holds it {reason}; this process caches for itself");
            drop(locked);
            return Self::private(dir, geometry);
        }
        let data = match dir.open_data(blob, true)? {
            Opened::Nothing => None,
            Opened::Safe(data) if data.metadata()?.len() == geometry.uncompressed_size => {
                Some(data)
            }
            // With a map, it was ours.
            Opened::Safe(_) if dir.has(&map_name) => None,
            Opened::Safe(_) | Opened::Unsafe(_) => {
                log::warn!(
                    "blob {blob}: its data file is somebody else's; this process caches for itself"
                );
                drop(locked);
                return Self::private(dir, geometry);
            }
        };
        if let (Found::Good(map), Some(data)) = (map, data) {
            return Ok(CacheFiles { data: Arc::new(data), map: Some(map), writable: true });
        }
        let data = dir.make_in(
            &dir.data,
            &data_name(blob.as_str()),
            |file| file.set_len(geometry.uncompressed_size),
            &locked,
        )?;
        let map = dir.make(&map_name, |file| geometry.fill_map(file), &locked)?;
        let map = ChunkMap { file: Arc::new(map), count: geometry.chunk_count };
        Ok(CacheFiles { data: Arc::new(data), map: Some(map), writable: true })
    }

    /// A cache of this process alone, that ends with it.
    pub fn private(dir: &CacheDir, geometry: &Geometry<'_>) -> io::Result<CacheFiles> {
        let data = dir.nameless(geometry.blob, geometry.uncompressed_size)?;
        Ok(CacheFiles { data: Arc::new(data), map: None, writable: true })
    }

    fn open_read_only(dir: &CacheDir, geometry: &Geometry<'_>) -> io::Result<CacheFiles> {
        let data = dir.open_data(geometry.blob, false)?;
        let map = geometry.find_map(dir, &format!("{}.chunk_map", geometry.blob), false)?;
        match (data, map) {
            (Opened::Safe(data), Found::Good(map)) => {
                Ok(CacheFiles { data: Arc::new(data), map: Some(map), writable: false })
            }
            _ => Err(Errno::ROFS.into()),
        }
    }
}

impl Geometry<'_> {
    fn header(&self) -> MapHeader {
        let mut header = MapHeader::new_zeroed();
        header.magic = MAP_MAGIC;
        header.version = U32::new(VERSION);
        header.chunk_count = U32::new(self.chunk_count);
        header.blob_id = *self.blob.as_bytes();
        header.uncompressed_size = U64::new(self.uncompressed_size);
        header.layout = self.layout;
        header.checksum = map_checksum(&header);
        header
    }

    fn fill_map(&self, file: &File) -> io::Result<()> {
        file.write_all_at(self.header().as_bytes(), 0)?;
        file.set_len(seal_offset(self.chunk_count, self.chunk_count))
    }

    fn find_map(&self, dir: &CacheDir, name: &str, writable: bool) -> io::Result<Found> {
        let Some(file) = dir.open_ours(name, writable)? else { return Ok(Found::Nothing) };
        let mut header = MapHeader::new_zeroed();
        match file.read_exact_at(header.as_mut_bytes(), 0) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(Found::Nothing),
            other => other?,
        }
        let sound = header.magic == MAP_MAGIC && header.checksum == map_checksum(&header);
        if !sound || header.blob_id != *self.blob.as_bytes() {
            log::warn!("blob {}: its chunk map is damaged, the cache starts anew", self.blob);
            return Ok(Found::Nothing);
        }
        if header.version.get() != VERSION {
            return Ok(Found::Foreign("in another version of the cache's format"));
        }
        let want = self.header();
        if header.checksum != want.checksum {
            return Ok(Found::Foreign("with another context table"));
        }
        if header.as_bytes() != want.as_bytes()
            || file.metadata()?.len() != seal_offset(self.chunk_count, self.chunk_count)
        {
            log::warn!("blob {}: its chunk map is damaged, the cache starts anew", self.blob);
            return Ok(Found::Nothing);
        }
        Ok(Found::Good(ChunkMap { file: Arc::new(file), count: self.chunk_count }))
    }
}

fn map_checksum(header: &MapHeader) -> [u8; 32] {
    let bytes = header.as_bytes();
    let covered = std::mem::offset_of!(MapHeader, checksum);
    Sha256::digest(&bytes[..covered]).into()
}

fn state_offset(index: u32) -> u64 {
    HEADER_SIZE + u64::from(index)
}

fn seal_offset(count: u32, index: u32) -> u64 {
    state_offset(count).next_multiple_of(4096) + u64::from(index) * SEAL_SIZE
}

/// The chunk map of a blob. Small reads and writes of a local file, so for the blocking pool.
pub struct ChunkMap {
    file: Arc<File>,
    count: u32,
}

impl ChunkMap {
    /// Which of the chunks are in the data file, as far as the map knows.
    pub fn ready(&self, chunks: &Range<u32>) -> io::Result<Vec<bool>> {
        let mut states = vec![0; chunks.len()];
        self.file.read_exact_at(&mut states, state_offset(chunks.start))?;
        Ok(states.into_iter().map(|state| state == READY).collect())
    }

    /// The digest that the chunk in the data file was verified against.
    pub fn seal(&self, index: ChunkIndex) -> io::Result<[u8; 32]> {
        let mut seal = [0; 32];
        self.file.read_exact_at(&mut seal, seal_offset(self.count, index.0))?;
        Ok(seal)
    }

    /// Before the bytes of a claimed chunk are written: whose they are.
    pub fn set_seal(&self, index: ChunkIndex, seal: &[u8; 32]) -> io::Result<()> {
        self.file.write_all_at(seal, seal_offset(self.count, index.0))
    }

    /// After its bytes were written.
    pub fn set_ready(&self, index: ChunkIndex) -> io::Result<()> {
        self.file.write_all_at(&[READY], state_offset(index.0))
    }

    /// The file to lock, and the bytes that stand for `chunks`.
    pub fn lock_range(&self, chunks: &Range<u32>) -> (&Arc<File>, Range<u64>) {
        (&self.file, state_offset(chunks.start)..state_offset(chunks.end))
    }
}

impl AsFd for CacheFiles {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.data.as_fd()
    }
}
