//! Images in tar files: where the entries are, and what `docker save` writes.
//!
//! An archive is read in place. It must not be compressed, as its parts are read in any order.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use futures_util::StreamExt;
use futures_util::stream;
use serde::Deserialize;

use super::digest::Digest;
use super::error::OciError;
use super::layout::Extent;
use super::manifest::{
    DOCKER_CONFIG, DOCKER_LAYER, DOCKER_LAYER_GZIP, DOCKER_MANIFEST, Descriptor, MAX_CONFIG,
    MAX_ITEMS, MAX_MANIFEST, Manifest, OCI_LAYER_ZSTD, Stored,
};
use super::registry::ByteStream;

/// Most entries of an archive.
const MAX_ENTRIES: usize = 1 << 20;

/// Links that are followed to reach an entry; `docker save` of old used one for a layer seen before.
const MAX_LINKS: usize = 8;

/// The regular files in an archive.
#[derive(Debug)]
pub(super) struct Entries {
    file: Arc<File>,
    path: PathBuf,
    files: HashMap<PathBuf, Entry>,
}

#[derive(Clone, Debug)]
enum Entry {
    /// First byte and number of bytes.
    File(u64, u64),
    Link(PathBuf),
}

impl Entries {
    pub fn read(path: &Path) -> Result<Entries, OciError> {
        let what = || path.display().to_string();
        let file = File::open(path).map_err(|e| OciError::io("open", path, e))?;
        let mut start = [0; 6];
        let got = file.read_at(&mut start, 0).map_err(|e| OciError::io("read", path, e))?;
        if packing(&start[..got]) != Packing::Plain {
            return Err(OciError::Unsupported {
                what: what(),
                reason: "the archive is compressed, and can be read only from front to back: \
                         decompress it first"
                    .to_owned(),
            });
        }
        let fail = |e: io::Error| OciError::Invalid { what: what(), reason: e.to_string() };
        let mut archive = tar::Archive::new(BufReader::new(&file));
        let mut files = HashMap::new();
        for entry in archive.entries_with_seek().map_err(fail)? {
            let entry = entry.map_err(fail)?;
            let name = normal(Path::new(""), &entry.path().map_err(fail)?);
            let kind = entry.header().entry_type();
            let found = if kind.is_file() || kind.is_contiguous() {
                Entry::File(entry.raw_file_position(), entry.size())
            } else if kind.is_symlink() || kind.is_hard_link() {
                let Some(target) = entry.link_name().map_err(fail)? else { continue };
                let base = match kind.is_symlink() {
                    true => name.as_deref().and_then(Path::parent).unwrap_or(Path::new("")),
                    false => Path::new(""),
                };
                let Some(target) = normal(base, &target) else { continue };
                Entry::Link(target)
            } else {
                continue;
            };
            // A name that leads out of the archive is nobody's.
            let Some(name) = name else { continue };
            files.insert(name, found);
            if files.len() > MAX_ENTRIES {
                let reason = format!("it has more than {MAX_ENTRIES} entries");
                return Err(OciError::Invalid { what: what(), reason });
            }
        }
        let file = Arc::new(file);
        Ok(Entries { file, path: path.to_owned(), files })
    }

    pub fn find(&self, name: &str) -> Option<Extent> {
        let mut name = normal(Path::new(""), Path::new(name))?;
        for _ in 0..MAX_LINKS {
            match self.files.get(&name)? {
                Entry::Link(target) => name.clone_from(target),
                &Entry::File(start, size) => {
                    let path = self.path.join(&name);
                    return Some(Extent { file: self.file.clone(), path, start, size });
                }
            }
        }
        None
    }
}

/// `path`, seen from `base`, without `.` and `..`; None if it leads out of the archive.
fn normal(base: &Path, path: &Path) -> Option<PathBuf> {
    let mut normal = base.to_owned();
    for part in path.components() {
        match part {
            Component::Normal(name) => normal.push(name),
            Component::ParentDir => normal.pop().then_some(())?,
            Component::CurDir => {}
            Component::RootDir => normal = PathBuf::new(),
            Component::Prefix(_) => return None,
        }
    }
    Some(normal)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Packing {
    Plain,
    Gzip,
    Zstd,
    Other,
}

fn packing(start: &[u8]) -> Packing {
    match start {
        [0x1f, 0x8b, ..] => Packing::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Packing::Zstd,
        [b'B', b'Z', b'h', ..] | [0xfd, b'7', b'z', b'X', b'Z', 0] => Packing::Other,
        _ => Packing::Plain,
    }
}

/// An image of an archive by `docker save`, `podman save` or skopeo. Such an archive has no manifest;
/// this is the one that a push of the image would make, with the layers as they are.
#[derive(Debug)]
pub struct DockerArchive {
    manifest: Stored,
    blobs: HashMap<Digest, Extent>,
    path: PathBuf,
}

/// An image in `manifest.json`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Item {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

impl DockerArchive {
    /// Opens the image with this name and tag (`debian:12`), or the only one.
    ///
    /// A layer in an archive is named by the digest of its content, which is known from the
    /// configuration; one that is compressed is read once to learn the other digest.
    pub fn open(path: &Path, tag: Option<&str>) -> Result<DockerArchive, OciError> {
        let invalid =
            |reason: String| OciError::Invalid { what: path.display().to_string(), reason };
        let entries = Entries::read(path)?;
        let find = |name: &str| {
            entries.find(name).ok_or_else(|| invalid(format!("it has no file {name:?}")))
        };
        let text = find("manifest.json")?.bytes(MAX_MANIFEST)?;
        let items: Vec<Item> =
            serde_json::from_slice(&text).map_err(|e| invalid(format!("manifest.json: {e}")))?;
        let item = choose(items, tag)
            .map_err(|reason| OciError::Unsupported { what: path.display().to_string(), reason })?;

        let config_file = find(&item.config)?;
        let config_bytes = config_file.bytes(MAX_CONFIG)?;
        let config = Descriptor::of(DOCKER_CONFIG, &config_bytes);
        let diff_ids = diff_ids(&config_bytes).map_err(&invalid)?;
        if diff_ids.len() != item.layers.len() || diff_ids.len() > MAX_ITEMS {
            return Err(invalid(format!(
                "it has {} layers, its configuration names {}",
                item.layers.len(),
                diff_ids.len()
            )));
        }
        let mut blobs = HashMap::from([(config.digest.clone(), config_file)]);
        let mut layers = Vec::new();
        for (name, diff_id) in item.layers.iter().zip(diff_ids) {
            let layer = find(name)?;
            let mut start = [0; 6];
            let len = layer.size.min(6) as usize;
            layer
                .file
                .read_exact_at(&mut start[..len], layer.start)
                .map_err(|e| OciError::io("read", &layer.path, e))?;
            let (media_type, digest) = match packing(&start[..len]) {
                Packing::Plain => (DOCKER_LAYER, diff_id),
                Packing::Gzip => (DOCKER_LAYER_GZIP, digest_of(&layer)?),
                Packing::Zstd => (OCI_LAYER_ZSTD, digest_of(&layer)?),
                Packing::Other => {
                    let reason = "the layer is compressed by neither gzip nor zstd".to_owned();
                    return Err(OciError::Unsupported { what: name.clone(), reason });
                }
            };
            layers.push(Descriptor::new(media_type, digest.clone(), layer.size));
            blobs.insert(digest, layer);
        }
        let manifest = Manifest {
            schema_version: 2,
            media_type: Some(DOCKER_MANIFEST.to_owned()),
            artifact_type: None,
            config,
            layers,
            subject: None,
            annotations: Default::default(),
            other: Default::default(),
        };
        let bytes = manifest.to_bytes();
        let descriptor = Descriptor::of(DOCKER_MANIFEST, &bytes);
        let manifest = Stored { descriptor, bytes };
        Ok(DockerArchive { manifest, blobs, path: path.to_owned() })
    }

    pub fn manifest(&self) -> &Stored {
        &self.manifest
    }

    pub(super) fn extent(&self, digest: &Digest) -> Result<&Extent, OciError> {
        self.blobs.get(digest).ok_or_else(|| OciError::NotFound {
            what: format!("blob {digest} in {}", self.path.display()),
        })
    }

    /// The whole blob. The stream ends with an error if it is not what `descriptor` says.
    pub fn blob(&self, descriptor: &Descriptor) -> ByteStream {
        match self.extent(&descriptor.digest) {
            Ok(extent) => extent.clone().stream(Some(descriptor.digest.clone())),
            Err(e) => stream::iter([Err(e)]).boxed(),
        }
    }
}

fn choose(mut items: Vec<Item>, tag: Option<&str>) -> Result<Item, String> {
    let tags = |item: &Item| item.repo_tags.clone().unwrap_or_default();
    let Some(tag) = tag else {
        return match items.len() {
            1 => Ok(items.remove(0)),
            0 => Err("it has no image".to_owned()),
            n => {
                let all: Vec<_> = items.iter().flat_map(tags).take(20).collect();
                Err(format!("it has {n} images: name one, of {all:?}"))
            }
        };
    };
    let full = |name: &str| {
        oci_spec::distribution::Reference::try_from(name).map(|r| r.whole()).unwrap_or_default()
    };
    let wanted = full(tag);
    let at = items
        .iter()
        .position(|item| tags(item).iter().any(|t| t == tag || full(t) == wanted))
        .ok_or_else(|| format!("it has no image named {tag:?}"))?;
    Ok(items.swap_remove(at))
}

/// Digests of the layers' content, from an image's configuration.
fn diff_ids(config: &[u8]) -> Result<Vec<Digest>, String> {
    #[derive(Deserialize)]
    struct Config {
        rootfs: RootFs,
    }
    #[derive(Deserialize)]
    struct RootFs {
        #[serde(default)]
        diff_ids: Option<Vec<Digest>>,
    }
    let config: Config =
        serde_json::from_slice(config).map_err(|e| format!("the configuration: {e}"))?;
    Ok(config.rootfs.diff_ids.unwrap_or_default())
}

fn digest_of(extent: &Extent) -> Result<Digest, OciError> {
    let mut hasher = Digest::sha256(b"").hasher();
    let mut buffer = vec![0; 1 << 20];
    let mut done = 0;
    while done < extent.size {
        let len = usize::try_from((extent.size - done).min(1 << 20)).expect("at most 1 MiB");
        let piece = &mut buffer[..len];
        extent
            .file
            .read_exact_at(piece, extent.start + done)
            .map_err(|e| OciError::io("read", &extent.path, e))?;
        hasher.update(piece);
        done += len as u64;
    }
    Ok(hasher.finish())
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::TryStreamExt;
    use std::io::Write;

    fn archive(files: &[(&str, &[u8])], links: &[(&str, &str)]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut tar = tar::Builder::new(file.as_file());
        for (name, bytes) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, name, *bytes).unwrap();
        }
        for (name, target) in links {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(tar::EntryType::Symlink);
            header.set_size(0);
            tar.append_link(&mut header, name, target).unwrap();
        }
        tar.finish().unwrap();
        drop(tar);
        file
    }

    async fn read(stream: ByteStream) -> Result<Vec<u8>, OciError> {
        stream
            .try_fold(Vec::new(), async |mut all, piece| {
                all.extend_from_slice(&piece);
                Ok(all)
            })
            .await
    }

    #[tokio::test]
    async fn a_saved_image_gets_the_manifest_that_a_push_would_make() {
        let (plain, mut gzip) = (b"layer one, as it is".to_vec(), Vec::new());
        let mut encoder = flate2::write::GzEncoder::new(&mut gzip, Default::default());
        encoder.write_all(b"layer two").unwrap();
        encoder.finish().unwrap();
        let config = format!(
            r#"{{"rootfs":{{"diff_ids":["{}","{}","{}"]}}}}"#,
            Digest::sha256(&plain),
            Digest::sha256(b"layer two"),
            Digest::sha256(&plain)
        );
        let json = r#"[{"Config":"c.json","RepoTags":["debian:12"],
            "Layers":["a/layer.tar","b/layer.tar","c/layer.tar"]}]"#;
        let file = archive(
            &[
                ("a/layer.tar", &plain),
                ("b/layer.tar", &gzip),
                ("c.json", config.as_bytes()),
                ("manifest.json", json.as_bytes()),
            ],
            &[("c/layer.tar", "../a/layer.tar")],
        );
        for tag in [None, Some("debian:12"), Some("docker.io/library/debian:12")] {
            let image = DockerArchive::open(file.path(), tag).unwrap();
            let stored = image.manifest();
            stored.descriptor.verify("m", &stored.bytes).unwrap();
            let manifest: Manifest = serde_json::from_slice(&stored.bytes).unwrap();
            let types: Vec<_> = manifest.layers.iter().map(|l| l.media_type.as_str()).collect();
            assert_eq!(types, [DOCKER_LAYER, DOCKER_LAYER_GZIP, DOCKER_LAYER]);
            for (layer, want) in manifest.layers.iter().zip([&plain, &gzip, &plain]) {
                assert_eq!(read(image.blob(layer)).await.unwrap(), *want);
            }
            assert_eq!(read(image.blob(&manifest.config)).await.unwrap(), config.as_bytes());
        }
        let error = DockerArchive::open(file.path(), Some("debian:13")).unwrap_err().to_string();
        assert!(error.contains("no image named"), "{error}");
    }

    #[tokio::test]
    async fn a_layer_that_is_not_what_the_configuration_says_is_found_out() {
        let config = format!(r#"{{"rootfs":{{"diff_ids":["{}"]}}}}"#, Digest::sha256(b"right"));
        let json = br#"[{"Config":"c","Layers":["l"]}]"#;
        let file =
            archive(&[("l", b"wrong"), ("c", config.as_bytes()), ("manifest.json", json)], &[]);
        let image = DockerArchive::open(file.path(), None).unwrap();
        let manifest: Manifest = serde_json::from_slice(&image.manifest().bytes).unwrap();
        let error = read(image.blob(&manifest.layers[0])).await.unwrap_err();
        assert!(matches!(error, OciError::Digest { .. }), "{error}");
    }

    #[test]
    fn archives_that_are_none_are_refused_with_the_reason() {
        let write = |bytes: &[u8]| {
            let file = tempfile::NamedTempFile::new().unwrap();
            file.as_file().write_all_at(bytes, 0).unwrap();
            file
        };
        let two = br#"[{"Config":"c","Layers":[]},{"Config":"c","RepoTags":["a:1"],"Layers":[]}]"#;
        let cases = [
            (write(&[0x1f, 0x8b, 8]), "decompress it first"),
            (write(b"not a tar at all"), "is not valid"),
            (write(&[b'x'; 2048]), "is not valid"),
            (archive(&[("a", b"")], &[]), "no file \"manifest.json\""),
            (archive(&[("manifest.json", b"[]")], &[]), "it has no image"),
            (archive(&[("manifest.json", b"{}")], &[]), "manifest.json: invalid type"),
            (archive(&[("manifest.json", two)], &[]), "it has 2 images: name one, of [\"a:1\"]"),
            (
                archive(
                    &[("manifest.json", br#"[{"Config":"c","Layers":[]}]"#)],
                    &[("c", "d"), ("d", "c")],
                ),
                "no file \"c\"",
            ),
        ];
        for (file, message) in cases {
            let error = DockerArchive::open(file.path(), None).unwrap_err().to_string();
            assert!(error.contains(message), "{message}: {error}");
        }
    }

    #[test]
    fn names_do_not_lead_out_of_the_archive() {
        let cases = [
            ("", "./a//b", Some("a/b")),
            ("a/b", "../c", Some("a/c")),
            ("a", "/x", Some("x")),
            ("", "../x", None),
            ("a", "../../x", None),
        ];
        for (base, path, want) in cases {
            let got = normal(Path::new(base), Path::new(path));
            assert_eq!(got.as_deref(), want.map(Path::new), "{base} {path}");
        }
    }
}
