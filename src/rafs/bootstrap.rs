//! A bootstrap: the metadata of an image, mapped and never copied.
//!
//! Opening checks the super blocks and the blob table and looks at nothing else, so it takes the
//! same time for every size of image. Inodes, directories and chunk addresses are checked each time
//! they are read, which costs less than remembering that they were; a damaged one is an error of
//! that access and of no other.

use std::fmt;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::blob_table::{self, BlobInfo};
use super::chunk_table::ChunkDigests;
use super::error::{FormatError, Result};
use super::id::{BlobId, BlobIndex, Nid};
use super::inode::Inode;
use super::layout::{
    BLOCK_BITS, BlobEntry, ChunkRecord, DeviceSlot, ExtSuperBlock, ImageFlags, SLOT_SIZE,
    SuperBlock,
};
use super::superblock::{self, MAX_BOOTSTRAP_SIZE, SuperInfo};
use super::walk::Walk;

/// A bootstrap whose super blocks and blob table are sound. Cloning shares the mapping.
#[derive(Clone, Debug)]
pub struct Bootstrap {
    image: Arc<Image>,
}

/// What [`Bootstrap`] and everything read from it look at.
pub(super) struct Image {
    data: Arc<Data>,
    pub(super) sb: SuperInfo,
    pub(super) blobs: Vec<BlobInfo>,
    /// Of the file it was opened from.
    file_id: Option<[u8; 32]>,
}

enum Data {
    Mapped(memmap2::Mmap),
    Owned(Vec<u8>),
    /// What a mapping of an empty file would be.
    Empty,
}

impl Bootstrap {
    /// Maps the bootstrap at `path` and checks it at the door.
    ///
    /// The file must not be changed while it is open, as a program's file must not while it runs:
    /// a changed byte is seen or not, and shortening the file ends the process (SIGBUS).
    ///
    /// # Errors
    ///
    /// [`FormatError::Io`] if the file cannot be opened or mapped, [`FormatError::Unsupported`] for
    /// the kinds of RAFS we do not read, otherwise what is wrong and where.
    pub fn open(path: &Path) -> Result<Bootstrap> {
        let io = |source| FormatError::Io { path: path.display().to_string(), source };
        let file = File::open(path).map_err(io)?;
        let metadata = file.metadata().map_err(io)?;
        if !metadata.is_file() {
            return Err(io(std::io::Error::other("not a regular file")));
        }
        let data = match metadata.len() {
            0 => Data::Empty,
            len if len > MAX_BOOTSTRAP_SIZE => {
                let reason = format!("length {len} exceeds 2 GiB");
                return Err(FormatError::invalid("bootstrap", 0, reason));
            }
            // SAFETY: the mapping is private and read-only, and the file is not written while it is
            // open: that is asked of the operator above, as for the executable of a process.
            // Nothing relies on two reads of a byte agreeing: every access checks what it reads.
            _ => Data::Mapped(
                unsafe { memmap2::MmapOptions::new().map_copy_read_only(&file) }.map_err(io)?,
            ),
        };
        Self::check(data, Some(file_id(&metadata)))
    }

    /// A bootstrap held in memory, such as one taken out of a packed blob.
    ///
    /// # Errors
    ///
    /// As [`Bootstrap::open`], less [`FormatError::Io`].
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Bootstrap> {
        Self::check(Data::Owned(bytes), None)
    }

    fn check(data: Data, file_id: Option<[u8; 32]>) -> Result<Bootstrap> {
        let sb = superblock::check(data.bytes())?;
        let mut image = Image { sb, data: Arc::new(data), blobs: vec![], file_id };
        image.blobs = blob_table::check(
            image.slice_of::<BlobEntry>("blob table", &image.sb.blob_table)?,
            image.slice_of::<DeviceSlot>("device table", &image.sb.device_table)?,
            image.sb.blob_table.start,
            image.sb.chunk_size,
        )?;
        let root = Inode::read(&image, image.sb.root)?;
        root.dir()?;
        Ok(Bootstrap { image: Arc::new(image) })
    }

    /// The same bootstrap with `id` in place of the unknown id that an unmerged packed layer gives
    /// its blob. Shares the mapping. Nothing changes if every blob has an id.
    ///
    /// # Errors
    ///
    /// [`FormatError::Invalid`] if another blob of the image has this id.
    pub fn with_blob_id(&self, id: BlobId) -> Result<Bootstrap> {
        let mut blobs = self.image.blobs.clone();
        let Some(unknown) = blobs.iter().position(|blob| blob.id == BlobId::UNKNOWN) else {
            return Ok(self.clone());
        };
        if blobs.iter().any(|blob| blob.id == id && id != BlobId::UNKNOWN) {
            let reason = format!("second blob named {id}");
            return Err(FormatError::invalid("blob table", self.image.sb.blob_table.start, reason));
        }
        blobs[unknown].id = id;
        let Image { data, sb, file_id, .. } = &*self.image;
        let (data, sb, file_id) = (data.clone(), sb.clone(), *file_id);
        Ok(Bootstrap { image: Arc::new(Image { data, sb, blobs, file_id }) })
    }

    /// Tells the file that was opened from every other one and from what it is after a change, as
    /// far as the file system records changes. `None` if the bootstrap did not come from a file.
    pub fn file_id(&self) -> Option<[u8; 32]> {
        self.image.file_id
    }

    /// Are both the same bootstrap, opened once?
    pub fn is(&self, other: &Bootstrap) -> bool {
        Arc::ptr_eq(&self.image, &other.image)
    }

    /// Bytes of the bootstrap.
    #[expect(clippy::len_without_is_empty, reason = "a bootstrap is never empty")]
    pub fn len(&self) -> u64 {
        self.image.len()
    }

    /// The root directory.
    pub fn root(&self) -> Nid {
        self.image.sb.root
    }

    /// Bytes: 4096, as tarfs images are refused.
    pub fn block_size(&self) -> u32 {
        1 << BLOCK_BITS
    }

    /// Bytes: a power of two in `layout::CHUNK_SIZE_RANGE`.
    pub fn chunk_size(&self) -> u32 {
        self.image.sb.chunk_size
    }

    pub fn flags(&self) -> ImageFlags {
        self.image.sb.flags
    }

    /// Paths as the super block counts them: hard-linked files once for each name.
    pub fn path_count(&self) -> u64 {
        self.image.sb.path_count
    }

    /// The blobs, by [`BlobIndex`].
    pub fn blobs(&self) -> &[BlobInfo] {
        &self.image.blobs
    }

    /// Both super blocks as stored.
    ///
    /// # Errors
    ///
    /// Only if the file has changed since it was opened.
    pub fn super_blocks(&self) -> Result<(SuperBlock, ExtSuperBlock)> {
        superblock::raw(self.image.bytes())
    }

    /// The blob table as stored, one entry for each of [`Bootstrap::blobs`].
    ///
    /// # Errors
    ///
    /// None after a successful open.
    pub fn blob_entries(&self) -> Result<&[BlobEntry]> {
        self.image.slice_of("blob table", &self.image.sb.blob_table)
    }

    /// The device slots, one for each blob.
    ///
    /// # Errors
    ///
    /// None after a successful open.
    pub fn device_slots(&self) -> Result<&[DeviceSlot]> {
        self.image.slice_of("device table", &self.image.sb.device_table)
    }

    /// The inode at `nid`, which may be any number.
    ///
    /// # Errors
    ///
    /// If there is no whole and sound inode at this place.
    pub fn inode(&self, nid: Nid) -> Result<Inode<'_>> {
        Inode::read(&self.image, nid)
    }

    /// Number of 32-byte slots of the metadata area: every nid is below it.
    pub fn slots(&self) -> u64 {
        (self.len() - self.image.sb.meta_start) / SLOT_SIZE
    }

    /// What the image wants fetched early, in this order: files, and directories with all they
    /// hold. Not checked to be inodes; skip those that [`Bootstrap::inode`] refuses.
    pub fn prefetch_nids(&self) -> impl Iterator<Item = Nid> + '_ {
        let table = self
            .image
            .slice_of::<U32>("prefetch table", &self.image.sb.prefetch_table)
            .unwrap_or_default();
        table.iter().map(|nid| nid.get()).take_while(|&nid| nid != 0).map(|nid| Nid(nid.into()))
    }

    /// The chunk table as stored: sorted by digest, not checked record by record.
    pub fn chunk_records(&self) -> &[ChunkRecord] {
        self.image.slice_of("chunk table", &self.image.sb.chunk_table).unwrap_or_default()
    }

    /// Byte offset of the chunk table in the bootstrap; 0 if there is none.
    pub fn chunk_table_offset(&self) -> u64 {
        self.image.sb.chunk_table.start
    }

    /// The digests of one blob by chunk index. Reads the whole chunk table, so keep the result.
    ///
    /// # Errors
    ///
    /// If a record of this blob contradicts the blob table or another record.
    pub fn chunk_digests(&self, blob: BlobIndex) -> Result<ChunkDigests> {
        ChunkDigests::new(self, blob)
    }

    /// Every path, parents before children, in the order of the directories.
    pub fn walk(&self) -> Walk<'_> {
        Walk::new(&self.image)
    }
}

impl Image {
    pub(super) fn bytes(&self) -> &[u8] {
        self.data.bytes()
    }

    pub(super) fn len(&self) -> u64 {
        self.bytes().len() as u64
    }

    /// `len` bytes from byte `offset` on, or which structure the file lacks.
    pub(super) fn slice(&self, what: &'static str, offset: u64, len: u64) -> Result<&[u8]> {
        let find = || {
            let start = usize::try_from(offset).ok()?;
            let end = usize::try_from(offset.checked_add(len)?).ok()?;
            self.bytes().get(start..end)
        };
        find().ok_or(FormatError::Truncated { what, offset, len, size: self.len() })
    }

    /// The structure `T` at byte `offset`, in place.
    pub(super) fn read<T>(&self, what: &'static str, offset: u64) -> Result<&T>
    where
        T: FromBytes + KnownLayout + Immutable + Unaligned,
    {
        let bytes = self.slice(what, offset, size_of::<T>() as u64)?;
        Ok(T::ref_from_bytes(bytes).expect("the slice has the size of T, which is unaligned"))
    }

    /// The table of `T` that fills `range`, in place. A remainder shorter than `T` is left out.
    pub(super) fn slice_of<T>(
        &self,
        what: &'static str,
        range: &std::ops::Range<u64>,
    ) -> Result<&[T]>
    where
        T: FromBytes + KnownLayout + Immutable + Unaligned,
    {
        let len = range.end - range.start;
        let len = len - len % size_of::<T>() as u64;
        let bytes = self.slice(what, range.start, len)?;
        Ok(<[T]>::ref_from_bytes(bytes).expect("the slice is whole Ts, which are unaligned"))
    }
}

/// Where the file is, how long it is, and when it was last changed, in a digest.
fn file_id(metadata: &std::fs::Metadata) -> [u8; 32] {
    use std::os::unix::fs::MetadataExt;
    let m = metadata;
    let times = [m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec()].map(i64::cast_unsigned);
    let mut hash = blake3::Hasher::new();
    for number in [m.dev(), m.ino(), m.size()].into_iter().chain(times) {
        hash.update(&number.to_le_bytes());
    }
    *hash.finalize().as_bytes()
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Image").field("sb", &self.sb).field("blobs", &self.blobs).finish()
    }
}

impl Data {
    fn bytes(&self) -> &[u8] {
        match self {
            Data::Mapped(map) => map,
            Data::Owned(bytes) => bytes,
            Data::Empty => &[],
        }
    }
}
