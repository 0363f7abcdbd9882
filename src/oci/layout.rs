//! OCI image layouts: directories, and tar files of such directories.
//!
//! Reading never unpacks an archive: its entries are found once and read in place. Writing goes to
//! directories only. A blob gets its name when it is complete and its digest is known, and `index.json`
//! is replaced as a whole under a lock, so that other images of the layout stay and a reader never sees
//! half of anything.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream;
use tempfile::NamedTempFile;

use super::archive::Entries;
use super::digest::Digest;
use super::error::OciError;
use super::manifest::{Descriptor, Document, Index, MAX_MANIFEST, OCI_INDEX, Stored};
use super::registry::ByteStream;

/// The annotation that holds a tag.
const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// Bytes that are read at once.
const PIECE: u64 = 1 << 20;

const LAYOUT_FILE: &str = r#"{"imageLayoutVersion":"1.0.0"}"#;

/// An image layout. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Layout {
    place: Arc<Place>,
}

#[derive(Debug)]
enum Place {
    Dir(PathBuf),
    Archive(PathBuf, Entries),
}

/// A file of the layout, or a part of an archive.
#[derive(Clone, Debug)]
pub(super) struct Extent {
    pub file: Arc<File>,
    pub path: PathBuf,
    pub start: u64,
    pub size: u64,
}

impl Layout {
    /// Opens the layout in a directory.
    pub fn open(dir: &Path) -> Result<Layout, OciError> {
        let layout = Layout { place: Arc::new(Place::Dir(dir.to_owned())) };
        layout.check_version()?;
        Ok(layout)
    }

    /// Opens the layout in a tar file, which must not be compressed.
    pub fn open_archive(file: &Path) -> Result<Layout, OciError> {
        let entries = Entries::read(file)?;
        let layout = Layout { place: Arc::new(Place::Archive(file.to_owned(), entries)) };
        layout.check_version()?;
        Ok(layout)
    }

    /// Opens the layout in a directory, or makes an empty one if there is nothing.
    pub fn create(dir: &Path) -> Result<Layout, OciError> {
        let blobs = dir.join("blobs/sha256");
        if !dir.join("oci-layout").exists() {
            let used = fs::read_dir(dir).map(|mut d| d.next().is_some()).unwrap_or(false);
            if used && !dir.join("blobs").exists() {
                return Err(OciError::Unsupported {
                    what: dir.display().to_string(),
                    reason: "the directory is neither empty nor an OCI layout".to_owned(),
                });
            }
        }
        fs::create_dir_all(&blobs).map_err(|e| OciError::io("create", &blobs, e))?;
        if !dir.join("oci-layout").exists() {
            replace(&dir.join("oci-layout"), LAYOUT_FILE.as_bytes())?;
        }
        Layout::open(dir)
    }

    fn path(&self) -> &Path {
        match &*self.place {
            Place::Dir(path) | Place::Archive(path, _) => path,
        }
    }

    fn check_version(&self) -> Result<(), OciError> {
        #[derive(serde::Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Marker {
            image_layout_version: String,
        }
        let what = format!("{} (file oci-layout)", self.path().display());
        let bytes = self.small("oci-layout")?;
        let marker: Marker = serde_json::from_slice(&bytes)
            .map_err(|e| OciError::Invalid { what: what.clone(), reason: e.to_string() })?;
        match marker.image_layout_version.starts_with("1.") {
            true => Ok(()),
            false => {
                let reason = format!("its version is {:?}, not 1", marker.image_layout_version);
                Err(OciError::Unsupported { what, reason })
            }
        }
    }

    /// The whole of a small file.
    fn small(&self, name: &str) -> Result<Vec<u8>, OciError> {
        let extent = self.find(name)?.ok_or_else(|| OciError::NotFound {
            what: format!("{name} in {}", self.path().display()),
        })?;
        extent.bytes(MAX_MANIFEST)
    }

    fn find(&self, name: &str) -> Result<Option<Extent>, OciError> {
        match &*self.place {
            Place::Archive(_, entries) => Ok(entries.find(name)),
            Place::Dir(dir) => {
                let path = dir.join(name);
                let file = match File::open(&path) {
                    Ok(file) => file,
                    Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
                    Err(e) => return Err(OciError::io("open", &path, e)),
                };
                let data = file.metadata().map_err(|e| OciError::io("open", &path, e))?;
                if !data.is_file() {
                    let reason = "it is not a regular file".to_owned();
                    return Err(OciError::Invalid { what: path.display().to_string(), reason });
                }
                Ok(Some(Extent { file: Arc::new(file), path, start: 0, size: data.len() }))
            }
        }
    }

    fn blob_file(&self, digest: &Digest) -> Result<Option<Extent>, OciError> {
        self.find(&blob_name(digest))
    }

    /// All images: the layout's index. Empty if it has none yet.
    pub fn index(&self) -> Result<Index, OciError> {
        let what = format!("{} (file index.json)", self.path().display());
        let bytes = match self.small("index.json") {
            Ok(bytes) => bytes,
            Err(OciError::NotFound { .. }) => return Ok(Index::empty()),
            Err(e) => return Err(e),
        };
        match Document::parse(&what, OCI_INDEX, &bytes)? {
            Document::Index(index) => Ok(*index),
            Document::Manifest(_) => unreachable!("it was parsed as an index"),
        }
    }

    /// The descriptor with this tag, or of the only image if no tag is given.
    pub fn resolve(&self, tag: Option<&str>) -> Result<Option<Descriptor>, OciError> {
        let mut images = self.index()?.manifests;
        if let Some(tag) = tag {
            // A later image of the same name would be the newer one.
            let at =
                images.iter().rposition(|d| d.annotations.get(REF_NAME).is_some_and(|t| t == tag));
            return Ok(at.map(|at| images.swap_remove(at)));
        }
        if images.len() > 1 {
            let tags: Vec<_> =
                images.iter().filter_map(|d| d.annotations.get(REF_NAME)).take(20).collect();
            return Err(OciError::Unsupported {
                what: self.path().display().to_string(),
                reason: format!("it has {} images: name a tag, of {tags:?}", images.len()),
            });
        }
        Ok(images.pop())
    }

    /// A manifest or index of the layout; None if it is not there.
    pub fn manifest(&self, descriptor: &Descriptor) -> Result<Option<Stored>, OciError> {
        let what = self.what(&descriptor.digest);
        let Some(extent) = self.blob_file(&descriptor.digest)? else { return Ok(None) };
        let bytes = extent.bytes(MAX_MANIFEST)?;
        descriptor.verify(&what, &bytes)?;
        Ok(Some(Stored { descriptor: descriptor.clone(), bytes }))
    }

    fn what(&self, digest: &Digest) -> String {
        format!("blob {digest} in {}", self.path().display())
    }

    /// Bytes of a blob; None if it is not there.
    pub fn blob_size(&self, digest: &Digest) -> Result<Option<u64>, OciError> {
        Ok(self.blob_file(digest)?.map(|extent| extent.size))
    }

    /// The whole blob. The stream ends with an error if it is not what `descriptor` says.
    pub fn blob(&self, descriptor: &Descriptor) -> ByteStream {
        let what = self.what(&descriptor.digest);
        let extent = match self.blob_file(&descriptor.digest) {
            Ok(Some(extent)) if extent.size == descriptor.size => Ok(extent),
            Ok(Some(extent)) => {
                Err(OciError::Size { what, got: extent.size, want: descriptor.size })
            }
            Ok(None) => Err(OciError::NotFound { what }),
            Err(e) => Err(e),
        };
        match extent {
            Ok(extent) => extent.stream(Some(descriptor.digest.clone())),
            Err(e) => stream::iter([Err(e)]).boxed(),
        }
    }

    /// Part of a blob, which only its reader can check.
    pub fn blob_range(&self, digest: &Digest, range: std::ops::Range<u64>) -> ByteStream {
        let what = self.what(digest);
        let part = match self.blob_file(digest) {
            Ok(Some(extent)) => extent.part(range),
            Ok(None) => Err(OciError::NotFound { what }),
            Err(e) => Err(e),
        };
        match part {
            Ok(extent) => extent.stream(None),
            Err(e) => stream::iter([Err(e)]).boxed(),
        }
    }

    /// The directory, if it can be written to.
    fn dir(&self) -> Result<&Path, OciError> {
        match &*self.place {
            Place::Dir(dir) => Ok(dir),
            Place::Archive(file, _) => Err(OciError::Unsupported {
                what: file.display().to_string(),
                reason: "archives are only read; write to oci:DIR and pack that".to_owned(),
            }),
        }
    }

    /// Begins to write a blob whose digest is told at the end.
    pub fn upload(&self) -> Result<LayoutUpload, OciError> {
        let dir = self.dir()?.join("blobs/sha256");
        let file = NamedTempFile::with_prefix_in(".part-", &dir)
            .map_err(|e| OciError::io("create a file in", &dir, e))?;
        Ok(LayoutUpload { file, dir, sent: 0 })
    }

    /// Writes a small blob. Does nothing if it is there.
    pub fn put_blob(&self, bytes: &[u8]) -> Result<Digest, OciError> {
        let digest = Digest::sha256(bytes);
        if self.blob_size(&digest)? != Some(bytes.len() as u64) {
            let mut upload = self.upload()?;
            upload.write(bytes)?;
            upload.finish(&digest)?;
        }
        Ok(digest)
    }

    /// Gives `descriptor` a tag, in place of whatever had it. Without a tag, it is the layout's image
    /// without one.
    pub fn tag(&self, mut descriptor: Descriptor, tag: Option<&str>) -> Result<(), OciError> {
        let dir = self.dir()?;
        let lock = File::open(dir).map_err(|e| OciError::io("open", dir, e))?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)
            .map_err(|e| OciError::io("lock", dir, e.into()))?;
        let mut index = self.index()?;
        descriptor.annotations.remove(REF_NAME);
        if let Some(tag) = tag {
            descriptor.annotations.insert(REF_NAME.to_owned(), tag.to_owned());
        }
        index.manifests.retain(|d| d.annotations.get(REF_NAME).map(String::as_str) != tag);
        index.manifests.push(descriptor);
        replace(&dir.join("index.json"), &index.to_bytes())
    }
}

fn blob_name(digest: &Digest) -> String {
    format!("blobs/{}", digest.as_str().replacen(':', "/", 1))
}

/// Writes a file that is there as a whole or not at all.
fn replace(path: &Path, bytes: &[u8]) -> Result<(), OciError> {
    let dir = path.parent().expect("a file in a layout");
    let write = || {
        let mut file = NamedTempFile::with_prefix_in(".part-", dir)?;
        file.write_all(bytes)?;
        persist(file, path)
    };
    write().map_err(|e: io::Error| OciError::io("write", path, e))
}

/// Gives a complete file its name; others may read it, as files of a layout are read by others.
fn persist(file: NamedTempFile, path: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.as_file().set_permissions(fs::Permissions::from_mode(0o644))?;
    file.as_file().sync_data()?;
    file.persist(path)?;
    Ok(())
}

/// A blob that is being written. Dropped half-way, it leaves nothing behind.
#[derive(Debug)]
pub struct LayoutUpload {
    file: NamedTempFile,
    dir: PathBuf,
    sent: u64,
}

impl LayoutUpload {
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), OciError> {
        self.file.write_all(bytes).map_err(|e| OciError::io("write", self.file.path(), e))?;
        self.sent += bytes.len() as u64;
        Ok(())
    }

    /// Bytes written.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Ends the blob. The caller has computed `digest` from the bytes that it wrote.
    pub fn finish(self, digest: &Digest) -> Result<(), OciError> {
        let path = self.dir.join(digest.hex());
        persist(self.file, &path).map_err(|e| OciError::io("write", &path, e))
    }
}

impl Extent {
    /// All bytes, if there are at most `limit`.
    pub(super) fn bytes(&self, limit: u64) -> Result<Vec<u8>, OciError> {
        if self.size > limit {
            return Err(OciError::TooLarge { what: self.path.display().to_string(), limit });
        }
        let mut bytes = vec![0; usize::try_from(self.size).expect("below a limit in memory")];
        self.file
            .read_exact_at(&mut bytes, self.start)
            .map_err(|e| OciError::io("read", &self.path, e))?;
        Ok(bytes)
    }

    pub(super) fn part(self, range: std::ops::Range<u64>) -> Result<Extent, OciError> {
        if range.start > range.end || range.end > self.size {
            let (got, want) = (self.size, range.end);
            return Err(OciError::Size { what: self.path.display().to_string(), got, want });
        }
        let (start, size) = (self.start + range.start, range.end - range.start);
        Ok(Extent { start, size, ..self })
    }

    /// The bytes in pieces; compared with `digest` at the end.
    pub(super) fn stream(self, digest: Option<Digest>) -> ByteStream {
        let hasher = digest.as_ref().map(Digest::hasher);
        stream::try_unfold(
            (self, 0, hasher, digest),
            |(extent, done, mut hasher, digest)| async move {
                if done == extent.size {
                    if let (Some(hasher), Some(want)) = (hasher.take(), &digest) {
                        let got = hasher.finish();
                        if got != *want {
                            let what = extent.path.display().to_string();
                            return Err(OciError::Digest { what, got: got.to_string() });
                        }
                    }
                    return Ok(None);
                }
                // Reading may wait for a disk, which must not hold up other futures.
                let task = tokio::task::spawn_blocking(move || {
                    let len = (extent.size - done).min(PIECE);
                    let mut piece = vec![0; usize::try_from(len).expect("at most a piece")];
                    let read = extent.file.read_exact_at(&mut piece, extent.start + done);
                    read.map_err(|e| OciError::io("read", &extent.path, e))?;
                    if let Some(hasher) = &mut hasher {
                        hasher.update(&piece);
                    }
                    Ok((Bytes::from(piece), (extent, done + len, hasher, digest)))
                });
                task.await.expect("reading does not panic").map(Some)
            },
        )
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::super::manifest::{OCI_CONFIG, OCI_MANIFEST};
    use super::*;
    use futures_util::TryStreamExt;

    async fn read(stream: ByteStream) -> Result<Vec<u8>, OciError> {
        stream
            .try_fold(Vec::new(), async |mut all, piece| {
                all.extend_from_slice(&piece);
                Ok(all)
            })
            .await
    }

    #[tokio::test]
    async fn what_is_written_is_read_and_checked() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::create(dir.path()).unwrap();
        let big = vec![7; 2_500_000];
        let digest = layout.put_blob(&big).unwrap();
        assert_eq!(layout.put_blob(&big).unwrap(), digest);
        let descriptor = Descriptor::of(OCI_CONFIG, &big);
        assert_eq!(read(layout.blob(&descriptor)).await.unwrap(), big);
        assert_eq!(read(layout.blob_range(&digest, 5..9)).await.unwrap(), [7; 4]);
        read(layout.blob_range(&digest, 5..2_500_001)).await.unwrap_err();

        let file = dir.path().join(blob_name(&digest));
        let mut damaged = big.clone();
        damaged[1_200_000] ^= 1;
        fs::write(&file, &damaged).unwrap();
        let error = read(layout.blob(&descriptor)).await.unwrap_err();
        assert!(matches!(error, OciError::Digest { .. }), "{error}");
        fs::write(&file, &big[1..]).unwrap();
        let error = read(layout.blob(&descriptor)).await.unwrap_err();
        assert!(matches!(error, OciError::Size { .. }), "{error}");
        fs::remove_file(&file).unwrap();
        let error = read(layout.blob(&descriptor)).await.unwrap_err();
        assert!(matches!(error, OciError::NotFound { .. }), "{error}");
    }

    #[test]
    fn tags_are_replaced_and_others_stay() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::create(dir.path()).unwrap();
        let image = |n: u8| Descriptor::of(OCI_MANIFEST, &[n]);
        assert!(layout.resolve(None).unwrap().is_none());
        layout.tag(image(1), Some("a")).unwrap();
        layout.tag(image(2), Some("b")).unwrap();
        layout.tag(image(3), Some("a")).unwrap();
        let tagged = |tag: &str| layout.resolve(Some(tag)).unwrap().map(|d| d.digest);
        assert_eq!(tagged("a"), Some(image(3).digest));
        assert_eq!(tagged("b"), Some(image(2).digest));
        assert_eq!(tagged("c"), None);
        let error = layout.resolve(None).unwrap_err().to_string();
        assert!(error.contains(r#"["b", "a"]"#), "{error}");
        let left: Vec<_> = fs::read_dir(dir.path()).unwrap().collect();
        assert_eq!(left.len(), 3, "index.json, oci-layout and blobs: {left:?}");
    }

    #[test]
    fn a_directory_of_something_else_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("precious"), "").unwrap();
        Layout::create(dir.path()).unwrap_err();
        Layout::open(dir.path()).unwrap_err();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        fs::write(dir.path().join("oci-layout"), r#"{"imageLayoutVersion":"2.0.0"}"#).unwrap();
        let error = Layout::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("version"), "{error}");
    }

    #[test]
    fn an_upload_that_is_given_up_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::create(dir.path()).unwrap();
        let mut upload = layout.upload().unwrap();
        upload.write(b"half").unwrap();
        drop(upload);
        assert_eq!(fs::read_dir(dir.path().join("blobs/sha256")).unwrap().count(), 0);
    }
}
