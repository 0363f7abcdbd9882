//! Digests as OCI writes them: `sha256:` and 64 lower-case hexadecimal digits.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::Digest as _;

/// The digest of some content, and so its name. Safe as part of a path or an address.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest {
    text: String,
    algorithm: Algorithm,
}

/// The algorithms that the image specification registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Algorithm {
    Sha256,
    Sha512,
}

/// Why a text is no digest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no digest: sha256 with 64 or sha512 with 128 lower-case hexadecimal digits")]
pub struct BadDigest {
    text: String,
}

impl Digest {
    /// The SHA-256 of `content`.
    pub fn sha256(content: &[u8]) -> Digest {
        Digest::from_sha256(sha2::Sha256::digest(content).into())
    }

    pub fn from_sha256(hash: [u8; 32]) -> Digest {
        let text = format!("sha256:{}", hex::encode(hash));
        Digest { text, algorithm: Algorithm::Sha256 }
    }

    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The hexadecimal digits.
    pub fn hex(&self) -> &str {
        &self.text["sha256:".len()..]
    }

    /// The first digits, enough for a person.
    pub fn short(&self) -> &str {
        &self.hex()[..12]
    }

    /// A hasher of this digest's algorithm.
    pub fn hasher(&self) -> Hasher {
        match self.algorithm {
            Algorithm::Sha256 => Hasher::Sha256(sha2::Sha256::new()),
            Algorithm::Sha512 => Hasher::Sha512(sha2::Sha512::new()),
        }
    }
}

impl FromStr for Digest {
    type Err = BadDigest;

    fn from_str(text: &str) -> Result<Digest, BadDigest> {
        // Both names of algorithms have the same length, which `hex` relies on.
        let (algorithm, digits, want) = match text.split_once(':') {
            Some(("sha256", digits)) => (Algorithm::Sha256, digits, 64),
            Some(("sha512", digits)) => (Algorithm::Sha512, digits, 128),
            _ => return Err(BadDigest { text: text.chars().take(200).collect() }),
        };
        if digits.len() != want || !digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(BadDigest { text: text.chars().take(200).collect() });
        }
        Ok(Digest { text: text.to_owned(), algorithm })
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Digest, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Content that is being digested.
#[derive(Clone)]
pub enum Hasher {
    Sha256(sha2::Sha256),
    Sha512(sha2::Sha512),
}

impl Hasher {
    pub fn update(&mut self, bytes: &[u8]) {
        match self {
            Hasher::Sha256(hash) => hash.update(bytes),
            Hasher::Sha512(hash) => hash.update(bytes),
        }
    }

    pub fn finish(self) -> Digest {
        match self {
            Hasher::Sha256(hash) => Digest::from_sha256(hash.finalize().into()),
            Hasher::Sha512(hash) => Digest {
                text: format!("sha512:{}", hex::encode(hash.finalize())),
                algorithm: Algorithm::Sha512,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_has_a_known_algorithm_and_all_its_digits() {
        let abc = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let digest: Digest = abc.parse().unwrap();
        assert_eq!(digest, Digest::sha256(b"abc"));
        assert_eq!(digest.hex(), &abc[7..]);
        let long = format!("sha512:{}", "0a".repeat(64));
        assert_eq!(long.parse::<Digest>().unwrap().as_str(), long);
        for bad in [
            "",
            "sha256",
            "sha256:",
            &abc[..70],
            &abc.to_uppercase(),
            &format!("{abc}0"),
            &abc.replace("sha256", "sha384"),
            &abc.replace("ba", "../"),
        ] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_hasher_computes_the_digest_it_was_made_for() {
        for want in [
            "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            "sha512:ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a\
             2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f",
        ] {
            let want: Digest = want.parse().unwrap();
            let mut hasher = want.hasher();
            hasher.update(b"a");
            hasher.update(b"bc");
            assert_eq!(hasher.finish(), want);
        }
    }
}
