//! Names of images as users write them.
//!
//! | form | names |
//! |---|---|
//! | `[docker://]HOST[:PORT]/REPO[:TAG][@DIGEST]` | an image in a registry |
//! | `oci:DIR[:TAG]` | an image in an OCI layout directory |
//! | `oci-archive:FILE[:TAG]` | an OCI layout in a tar file |
//! | `docker-archive:FILE[:TAG]` | what `docker save` writes |
//!
//! A registry reference without a host means Docker Hub and one without tag or digest means
//! `latest`, as docker reads it. Its grammar is that of the `oci-spec` crate, and IPv6 hosts in
//! brackets besides.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use super::digest::Digest;
use super::error::OciError;

/// Host that answers for `docker.io`.
const DOCKER_HUB: &str = "registry-1.docker.io";

/// Where an image is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reference {
    Registry(Name),
    Layout { dir: PathBuf, tag: Option<String> },
    OciArchive { file: PathBuf, tag: Option<String> },
    DockerArchive { file: PathBuf, tag: Option<String> },
}

/// An image in a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    /// As written: `docker.io`, `localhost:5000`, `[::1]:5000`.
    pub registry: String,
    /// Path of the repository: `library/debian`.
    pub repository: String,
    pub tag: Option<String>,
    pub digest: Option<Digest>,
}

impl Name {
    /// The host to connect to, with its port if it is not the scheme's.
    pub fn host(&self) -> &str {
        if self.registry == "docker.io" { DOCKER_HUB } else { &self.registry }
    }

    /// What names the manifest in a request: the digest if there is one, else the tag.
    pub fn manifest(&self) -> &str {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.as_str(),
            (None, Some(tag)) => tag,
            (None, None) => unreachable!("the parser adds a tag where there is neither"),
        }
    }

    /// Is this host of the registry the machine itself? Then plain http is acceptable.
    pub fn is_loopback(&self) -> bool {
        is_loopback(&self.registry)
    }
}

/// Does `host[:port]` name the machine itself?
pub fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(""),
        None => host.split(':').next().unwrap_or(""),
    };
    name == "localhost" || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

impl FromStr for Reference {
    type Err = OciError;

    fn from_str(text: &str) -> Result<Reference, OciError> {
        let fail = |reason: &str| OciError::Reference {
            text: text.chars().take(300).collect(),
            reason: reason.to_owned(),
        };
        if let Some(rest) = text.strip_prefix("oci:") {
            let (dir, tag) = split_path(rest).map_err(|e| fail(&e))?;
            return Ok(Reference::Layout { dir, tag });
        }
        if let Some(rest) = text.strip_prefix("oci-archive:") {
            let (file, tag) = split_path(rest).map_err(|e| fail(&e))?;
            return Ok(Reference::OciArchive { file, tag });
        }
        if let Some(rest) = text.strip_prefix("docker-archive:") {
            let (file, tag) = split_path(rest).map_err(|e| fail(&e))?;
            return Ok(Reference::DockerArchive { file, tag });
        }
        let name = text.strip_prefix("docker://").unwrap_or(text);
        if name.contains("://") {
            return Err(fail("an address is not expected here, only host, repository and tag"));
        }
        for (prefix, advice) in [
            ("docker-daemon:", "images of a docker daemon: save them with `docker save` first"),
            ("containers-storage:", "images of podman: push them to oci:DIR first"),
            ("dir:", "skopeo's directory format: copy it to oci:DIR first"),
            ("sif:", "Singularity images"),
        ] {
            if name.starts_with(prefix) {
                return Err(fail(&format!("cannot read {advice}")));
            }
        }
        Ok(Reference::Registry(parse_name(name).map_err(|e| fail(&e))?))
    }
}

fn parse_name(text: &str) -> Result<Name, String> {
    // The crate's grammar has no IPv6 addresses: such a host is checked here.
    let (ipv6, rest) = match text.strip_prefix('[') {
        None => (None, text.to_owned()),
        Some(after) => {
            let (address, after) = after.split_once(']').ok_or("`]` is missing after `[`")?;
            let (port, rest) = after.split_once('/').ok_or("a repository must follow the host")?;
            if !address.parse::<IpAddr>().is_ok_and(|ip| ip.is_ipv6()) {
                return Err(format!("[{address}] is no IPv6 address"));
            }
            let legal = port.strip_prefix(':').is_some_and(|p| p.parse::<u16>().is_ok());
            if !port.is_empty() && !legal {
                return Err(format!("{port:?} is no port"));
            }
            (Some(format!("[{address}]{port}")), format!("localhost/{rest}"))
        }
    };
    let parsed = oci_spec::distribution::Reference::try_from(rest.as_str()).map_err(|e| {
        if rest.split(['@', ':']).next().is_some_and(|name| name.chars().any(char::is_uppercase))
            && rest.to_lowercase().parse::<oci_spec::distribution::Reference>().is_ok()
        {
            "repository names are lower-case".to_owned()
        } else {
            e.to_string()
        }
    })?;
    let registry = ipv6.unwrap_or_else(|| parsed.registry().to_owned());
    if let Some((_, port)) = registry.rsplit_once(':').filter(|(_, p)| !p.ends_with(']')) {
        port.parse::<u16>().map_err(|_| format!("{port:?} is no port"))?;
    }
    let digest = parsed.digest().map(|d| d.parse::<Digest>().map_err(|e| e.to_string()));
    Ok(Name {
        registry,
        repository: parsed.repository().to_owned(),
        tag: parsed.tag().map(str::to_owned),
        digest: digest.transpose()?,
    })
}

/// Splits `PATH[:TAG]`: what follows the first colon is the tag, as skopeo reads it.
fn split_path(text: &str) -> Result<(PathBuf, Option<String>), String> {
    let (path, tag) = match text.split_once(':') {
        Some((path, tag)) => (path, Some(tag)),
        None => (text, None),
    };
    if path.is_empty() {
        return Err("the path is missing".to_owned());
    }
    if tag == Some("") {
        return Err("the tag after `:` is missing".to_owned());
    }
    if tag.is_some_and(|t| t.len() > 4096 || t.bytes().any(|b| b.is_ascii_control())) {
        return Err("the tag has control characters or is too long".to_owned());
    }
    Ok((PathBuf::from(path), tag.map(str::to_owned)))
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, path, tag) = match self {
            Reference::Registry(name) => return name.fmt(f),
            Reference::Layout { dir, tag } => ("oci", dir, tag),
            Reference::OciArchive { file, tag } => ("oci-archive", file, tag),
            Reference::DockerArchive { file, tag } => ("docker-archive", file, tag),
        };
        write!(f, "{kind}:{}", path.display())?;
        if let Some(tag) = tag {
            write!(f, ":{tag}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn registry_names() {
        let at = format!("sha256:{HEX}");
        // (text, registry, host, repository, tag, with digest)
        let cases = [
            ("debian", "docker.io", DOCKER_HUB, "library/debian", Some("latest"), false),
            ("docker://docker.io/a/b:1", "docker.io", DOCKER_HUB, "a/b", Some("1"), false),
            ("localhost/a", "localhost", "localhost", "a", Some("latest"), false),
            ("localhost:5000/a/b:T", "localhost:5000", "localhost:5000", "a/b", Some("T"), false),
            ("127.0.0.1:5000/a", "127.0.0.1:5000", "127.0.0.1:5000", "a", Some("latest"), false),
            ("[::1]:5000/a:b", "[::1]:5000", "[::1]:5000", "a", Some("b"), false),
            ("[fe80::1]/a", "[fe80::1]", "[fe80::1]", "a", Some("latest"), false),
            ("r.example/a:1@", "r.example", "r.example", "a", Some("1"), true),
            ("r.example/a@", "r.example", "r.example", "a", None, true),
        ];
        for (text, registry, host, repository, tag, digest) in cases {
            let text = if digest { format!("{text}{at}") } else { text.to_owned() };
            let Reference::Registry(name) = text.parse().unwrap() else { panic!("{text}") };
            assert_eq!((name.registry.as_str(), name.host()), (registry, host), "{text}");
            assert_eq!(
                (name.repository.as_str(), name.tag.as_deref()),
                (repository, tag),
                "{text}"
            );
            assert_eq!(name.digest.is_some(), digest, "{text}");
            assert_eq!(name.manifest(), if digest { &at } else { tag.unwrap() }, "{text}");
        }
    }

    #[test]
    fn paths() {
        // (text, shown again, kind)
        let dir = |d: &str, t: Option<&str>| Reference::Layout {
            dir: d.into(),
            tag: t.map(str::to_owned),
        };
        let cases = [
            ("oci:a", dir("a", None)),
            ("oci:/x/y:1.0", dir("/x/y", Some("1.0"))),
            ("oci:d:host:5/a:b", dir("d", Some("host:5/a:b"))),
            (
                "oci-archive:f.tar:t",
                Reference::OciArchive { file: "f.tar".into(), tag: Some("t".into()) },
            ),
            ("docker-archive:f", Reference::DockerArchive { file: "f".into(), tag: None }),
        ];
        for (text, want) in cases {
            assert_eq!(text.parse::<Reference>().unwrap(), want);
            assert_eq!(want.to_string(), text);
        }
    }

    #[test]
    fn what_is_no_reference_is_refused_with_the_reason() {
        let cases = [
            ("", "at least one component"),
            ("Debian", "lower-case"),
            ("r.example/Debian:1", "lower-case"),
            ("https://r.example/a", "an address is not expected"),
            ("r.example:99999/a", "no port"),
            ("[::1/a", "`]` is missing"),
            ("[::1]:x/a", "no port"),
            ("[1.2.3.4]/a", "no IPv6 address"),
            ("[::1]", "a repository must follow"),
            ("oci:", "the path is missing"),
            ("oci::t", "the path is missing"),
            ("oci:d:", "the tag after"),
            ("docker-daemon:a:b", "docker save"),
            ("containers-storage:a", "podman"),
            ("a/../b", "reference format"),
            ("a@sha256:12", "reference format"),
            ("a b", "reference format"),
        ];
        for (text, reason) in cases {
            let error = text.parse::<Reference>().expect_err(text).to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn only_the_machine_itself_is_loopback() {
        for (host, want) in [
            ("localhost", true),
            ("localhost:5000", true),
            ("127.0.0.2:1", true),
            ("[::1]:5000", true),
            ("[::1]", true),
            ("localhost.example", false),
            ("10.0.0.1", false),
            ("127.0.0.1.example:5000", false),
            ("[::2]", false),
        ] {
            assert_eq!(is_loopback(host), want, "{host}");
        }
    }
}
