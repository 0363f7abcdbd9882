//! Manifests, indexes and descriptors of OCI (1.1) and Docker (version 2, schema 2).
//!
//! The documents here keep every field that they do not know, and write the fields in one order, so
//! that a document that is changed in one place differs in that place only and the same document
//! always gives the same bytes. The types of the `oci-spec` crate do neither: they drop unknown
//! fields, and keep annotations in hash maps.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::digest::Digest;
use super::error::OciError;

/// Longest manifest or index, in bytes: what registries accept.
pub const MAX_MANIFEST: u64 = 4 << 20;

/// Longest image configuration, in bytes.
pub const MAX_CONFIG: u64 = 16 << 20;

/// Most layers of an image, and most manifests of an index.
pub const MAX_ITEMS: usize = 4096;

pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
pub const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
pub const OCI_LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
pub const OCI_LAYER_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
pub const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";
pub const DOCKER_LAYER_GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";

/// What is asked of a registry when a tag may be anything.
pub const ACCEPT: [&str; 4] = [OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST];

/// Fields that are kept as they are.
pub type Other = BTreeMap<String, Value>;

/// Names some content: what it is, how long it is, its digest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    pub media_type: String,
    pub digest: Digest,
    pub size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    #[serde(default, skip_serializing_if = "is_empty", deserialize_with = "null_is_empty")]
    pub annotations: BTreeMap<String, String>,
    #[serde(flatten)]
    pub other: Other,
}

impl Descriptor {
    /// A descriptor with nothing but the three fields that all have.
    pub fn new(media_type: &str, digest: Digest, size: u64) -> Descriptor {
        Descriptor {
            media_type: media_type.to_owned(),
            digest,
            size,
            platform: None,
            artifact_type: None,
            annotations: BTreeMap::new(),
            other: Other::new(),
        }
    }

    /// The descriptor of `content`.
    pub fn of(media_type: &str, content: &[u8]) -> Descriptor {
        Descriptor::new(media_type, Digest::sha256(content), content.len() as u64)
    }

    /// Is `content` what this names?
    pub fn verify(&self, what: &str, content: &[u8]) -> Result<(), OciError> {
        if content.len() as u64 != self.size {
            let got = content.len() as u64;
            return Err(OciError::Size { what: what.to_owned(), got, want: self.size });
        }
        verify(&self.digest, what, content)
    }
}

/// Does `content` have this digest?
pub fn verify(digest: &Digest, what: &str, content: &[u8]) -> Result<(), OciError> {
    let mut hasher = digest.hasher();
    hasher.update(content);
    let got = hasher.finish();
    if got != *digest {
        return Err(OciError::Digest { what: what.to_owned(), got: got.to_string() });
    }
    Ok(())
}

fn is_empty(map: &BTreeMap<String, String>) -> bool {
    map.is_empty()
}

/// Go writes a map that was never made as `null`.
fn null_is_empty<'de, D>(deserializer: D) -> Result<BTreeMap<String, String>, D::Error>
where
    D: serde::Deserializer<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// What a manifest of an index runs on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Platform {
    pub architecture: String,
    pub os: String,
    #[serde(rename = "os.version", default, skip_serializing_if = "Option::is_none")]
    pub os_version: Option<String>,
    #[serde(rename = "os.features", default, skip_serializing_if = "Vec::is_empty")]
    pub os_features: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    #[serde(flatten)]
    pub other: Other,
}

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.iter().try_for_each(|v| write!(f, "/{v}"))
    }
}

/// A platform as a user names it: `os/architecture[/variant]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlatformName {
    os: String,
    architecture: String,
    variant: Option<String>,
}

impl std::str::FromStr for PlatformName {
    type Err = String;

    fn from_str(text: &str) -> Result<PlatformName, String> {
        let mut parts = text.split('/').map(str::to_ascii_lowercase);
        let (Some(os), Some(architecture)) = (parts.next(), parts.next()) else {
            return Err("write it as linux/amd64 or linux/arm64/v8".to_owned());
        };
        let variant = parts.next();
        if parts.next().is_some() || [&os, &architecture].iter().any(|p| p.is_empty()) {
            return Err("write it as linux/amd64 or linux/arm64/v8".to_owned());
        }
        let architecture = match architecture.as_str() {
            "x86_64" | "x86-64" => "amd64".to_owned(),
            "aarch64" => "arm64".to_owned(),
            _ => architecture,
        };
        Ok(PlatformName { os, architecture, variant })
    }
}

impl PlatformName {
    /// Does `platform` run what is meant? Arm64 has one variant, which need not be named.
    pub fn matches(&self, platform: &Platform) -> bool {
        let variant = |v: Option<&str>| match (self.architecture.as_str(), v) {
            ("arm64", None) => Some("v8".to_owned()),
            (_, v) => v.map(str::to_owned),
        };
        platform.os == self.os
            && platform.architecture == self.architecture
            && (self.variant.is_none()
                || variant(self.variant.as_deref()) == variant(platform.variant.as_deref()))
    }
}

impl std::fmt::Display for PlatformName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.iter().try_for_each(|v| write!(f, "/{v}"))
    }
}

/// One image: its configuration and its layers, lowest first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    pub schema_version: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    pub config: Descriptor,
    pub layers: Vec<Descriptor>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Descriptor>,
    #[serde(default, skip_serializing_if = "is_empty", deserialize_with = "null_is_empty")]
    pub annotations: BTreeMap<String, String>,
    #[serde(flatten)]
    pub other: Other,
}

/// Several manifests, one for each platform and what belongs to them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    pub schema_version: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    pub manifests: Vec<Descriptor>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Descriptor>,
    #[serde(default, skip_serializing_if = "is_empty", deserialize_with = "null_is_empty")]
    pub annotations: BTreeMap<String, String>,
    #[serde(flatten)]
    pub other: Other,
}

/// What a tag or a digest stands for.
#[derive(Clone, Debug, PartialEq)]
pub enum Document {
    Manifest(Box<Manifest>),
    Index(Box<Index>),
}

/// A document as it was stored: the bytes are what its digest is of.
#[derive(Clone, Debug)]
pub struct Stored {
    pub descriptor: Descriptor,
    pub bytes: Vec<u8>,
}

impl Document {
    /// Parses what claims to be of `media_type`. A document that could be read as both kinds, or
    /// says it is of another type than it was announced as, is refused: two readers would see two
    /// images.
    pub fn parse(what: &str, media_type: &str, bytes: &[u8]) -> Result<Document, OciError> {
        let invalid =
            |reason: String| OciError::Invalid { what: what.to_owned(), reason: reason.to_owned() };
        if media_type.starts_with("application/vnd.docker.distribution.manifest.v1+") {
            return Err(OciError::Unsupported {
                what: what.to_owned(),
                reason: "it is a Docker manifest of schema 1, which was given up in 2017; \
                         push the image again with a newer client"
                    .to_owned(),
            });
        }
        let is_index = match media_type {
            OCI_INDEX | DOCKER_LIST => true,
            OCI_MANIFEST | DOCKER_MANIFEST => false,
            _ => {
                return Err(OciError::Unsupported {
                    what: what.to_owned(),
                    reason: format!("media type {media_type:?} is neither manifest nor index"),
                });
            }
        };
        let value: Value = serde_json::from_slice(bytes).map_err(|e| invalid(e.to_string()))?;
        let has = |field: &str| value.get(field).is_some_and(|v| !v.is_null());
        let (own, foreign) = if is_index {
            ("index", ["config", "layers"])
        } else {
            ("manifest", ["manifests", "fsLayers"])
        };
        if let Some(field) = foreign.into_iter().find(|f| has(f)) {
            return Err(invalid(format!("it is announced as {own} and has a field {field:?}")));
        }
        if let Some(stated) = value.get("mediaType").filter(|v| !v.is_null())
            && stated.as_str() != Some(media_type)
        {
            return Err(invalid(format!("it is announced as {media_type} and says {stated}")));
        }
        let (document, version, items) = if is_index {
            let index: Box<Index> =
                serde_json::from_value(value).map_err(|e| invalid(e.to_string()))?;
            let (version, items) = (index.schema_version, index.manifests.len());
            (Document::Index(index), version, items)
        } else {
            let manifest: Box<Manifest> =
                serde_json::from_value(value).map_err(|e| invalid(e.to_string()))?;
            let (version, items) = (manifest.schema_version, manifest.layers.len());
            (Document::Manifest(manifest), version, items)
        };
        if version != 2 {
            return Err(invalid(format!("its schemaVersion is {version}, not 2")));
        }
        if items > MAX_ITEMS {
            return Err(invalid(format!("it lists {items} items, more than {MAX_ITEMS}")));
        }
        Ok(document)
    }
}

impl Manifest {
    /// Is this one of Docker's, not of OCI's?
    pub fn is_docker(&self) -> bool {
        self.config.media_type == DOCKER_CONFIG
            || self.media_type.as_deref() == Some(DOCKER_MANIFEST)
    }

    /// The bytes that are stored.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("maps have texts as keys")
    }
}

impl Index {
    /// One that names nothing.
    pub fn empty() -> Index {
        Index {
            schema_version: 2,
            media_type: Some(OCI_INDEX.to_owned()),
            artifact_type: None,
            manifests: Vec::new(),
            subject: None,
            annotations: Default::default(),
            other: Default::default(),
        }
    }

    /// The bytes that are stored.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("maps have texts as keys")
    }
}

/// How the content of a layer is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerPacking {
    Tar,
    TarGzip,
    TarZstd,
}

impl LayerPacking {
    /// What a media type says; None if it is no file system layer. Layers that may not be
    /// distributed are packed like others.
    pub fn from_media_type(media_type: &str) -> Option<LayerPacking> {
        match media_type {
            OCI_LAYER | DOCKER_LAYER => Some(LayerPacking::Tar),
            OCI_LAYER_GZIP | DOCKER_LAYER_GZIP => Some(LayerPacking::TarGzip),
            OCI_LAYER_ZSTD => Some(LayerPacking::TarZstd),
            "application/vnd.oci.image.layer.nondistributable.v1.tar" => Some(LayerPacking::Tar),
            "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
            | "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip" => {
                Some(LayerPacking::TarGzip)
            }
            "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd"
            | "application/vnd.docker.image.rootfs.diff.tar.zstd" => Some(LayerPacking::TarZstd),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    fn index() -> String {
        format!(
            r#"{{"schemaVersion":2,"mediaType":"{OCI_INDEX}","manifests":[{{"mediaType":"{OCI_MANIFEST}","digest":"{HEX}","size":3,"platform":{{"architecture":"arm64","os":"linux","variant":"v8","x-new":1}},"annotations":{{"b":"2","a":"1"}},"urls":["u"]}}],"annotations":{{"k":"v"}},"x-future":{{"z":[1]}}}}"#
        )
    }

    #[test]
    fn nothing_of_a_document_is_lost_and_its_bytes_do_not_vary() {
        let text = index();
        let Document::Index(parsed) = Document::parse("i", OCI_INDEX, text.as_bytes()).unwrap()
        else {
            panic!("an index")
        };
        let again = parsed.to_bytes();
        let values: [Value; 2] =
            [text.as_bytes(), &again].map(|b| serde_json::from_slice(b).unwrap());
        assert_eq!(values[0], values[1]);
        for _ in 0..20 {
            let Document::Index(next) = Document::parse("i", OCI_INDEX, text.as_bytes()).unwrap()
            else {
                panic!("an index")
            };
            assert_eq!(next.to_bytes(), again);
        }
        let platform = parsed.manifests[0].platform.as_ref().unwrap();
        assert_eq!(platform.to_string(), "linux/arm64/v8");
    }

    #[test]
    fn a_document_with_two_readings_is_refused() {
        let config = format!(r#"{{"mediaType":"{OCI_CONFIG}","digest":"{HEX}","size":1}}"#);
        let manifest =
            |more: &str| format!(r#"{{"schemaVersion":2,"config":{config},"layers":[]{more}}}"#);
        Document::parse("m", OCI_MANIFEST, manifest("").as_bytes()).unwrap();
        Document::parse("m", DOCKER_MANIFEST, manifest("").as_bytes()).unwrap();
        let null = manifest(r#","mediaType":null,"annotations":null"#);
        Document::parse("m", OCI_MANIFEST, null.as_bytes()).unwrap();
        // (media type, document, part of the message)
        let cases = [
            (OCI_MANIFEST, manifest(r#","manifests":[]"#), "has a field \"manifests\""),
            (OCI_INDEX, manifest(""), "has a field \"config\""),
            (OCI_MANIFEST, manifest(&format!(r#","mediaType":"{OCI_INDEX}""#)), "says"),
            (OCI_MANIFEST, manifest(r#","mediaType":7"#), "says 7"),
            (OCI_MANIFEST, index(), "has a field"),
            (OCI_MANIFEST, manifest("").replace(":2", ":1"), "schemaVersion is 1"),
            (OCI_MANIFEST, manifest("").replace(HEX, "sha256:12"), "no digest"),
            (OCI_MANIFEST, manifest("").replace(":1}", ":-1}"), "invalid value"),
            (OCI_MANIFEST, "[]".into(), "invalid type"),
            (OCI_MANIFEST, "{".into(), "EOF"),
            ("application/vnd.docker.distribution.manifest.v1+prettyjws", "{}".into(), "schema 1"),
            ("text/html", "{}".into(), "neither manifest nor index"),
        ];
        for (media_type, text, message) in cases {
            let error = Document::parse("m", media_type, text.as_bytes()).expect_err(&text);
            assert!(error.to_string().contains(message), "{text}: {error}");
        }
    }

    #[test]
    fn content_that_is_not_what_its_descriptor_says_is_refused() {
        let descriptor = Descriptor::of(OCI_CONFIG, b"abc");
        assert_eq!((descriptor.digest.as_str(), descriptor.size), (HEX, 3));
        descriptor.verify("c", b"abc").unwrap();
        assert!(matches!(descriptor.verify("c", b"abd"), Err(OciError::Digest { .. })));
        assert!(matches!(descriptor.verify("c", b"abcd"), Err(OciError::Size { got: 4, .. })));
    }

    #[test]
    fn platforms_are_named_as_docker_names_them() {
        let platform = |text: &str| -> Platform { serde_json::from_str(text).unwrap() };
        let amd = platform(r#"{"os":"linux","architecture":"amd64"}"#);
        let arm = platform(r#"{"os":"linux","architecture":"arm64","variant":"v8"}"#);
        let arm7 = platform(r#"{"os":"linux","architecture":"arm","variant":"v7"}"#);
        // (name, platform, matches)
        let cases = [
            ("linux/amd64", &amd, true),
            ("linux/x86_64", &amd, true),
            ("linux/arm64", &arm, true),
            ("linux/arm64/v8", &arm, true),
            ("linux/aarch64", &arm, true),
            ("linux/arm64/v9", &arm, false),
            ("linux/arm", &arm7, true),
            ("linux/arm/v6", &arm7, false),
            ("windows/amd64", &amd, false),
        ];
        for (name, platform, want) in cases {
            assert_eq!(name.parse::<PlatformName>().unwrap().matches(platform), want, "{name}");
        }
        for bad in ["amd64", "linux/", "/amd64", "a/b/c/d"] {
            assert!(bad.parse::<PlatformName>().is_err(), "{bad}");
        }
    }
}
