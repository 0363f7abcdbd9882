//! The query of a request: `key=value` pairs, percent-encoded or not.
//!
//! Some clients encode `/` in a mountpoint and some do not. A `+` means itself: Kata allows it in
//! names, and a client that has a blank in one writes `%20`.

use super::{ApiError, bad_request};

pub(super) struct Query<'a>(Option<&'a str>);

impl<'a> Query<'a> {
    pub(super) fn new(text: Option<&'a str>) -> Query<'a> {
        Query(text)
    }

    /// The first value of `key`, if it is there.
    pub(super) fn get(&self, key: &str) -> Result<Option<String>, ApiError> {
        let pairs = self.0.into_iter().flat_map(|text| text.split('&'));
        for pair in pairs {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            if decode(name)? == key {
                return decode(value).map(Some);
            }
        }
        Ok(None)
    }

    /// The first value of `key`.
    pub(super) fn required(&self, key: &str) -> Result<String, ApiError> {
        self.get(key)?.ok_or_else(|| bad_request(format!("QueryString: `{key}` is missing")))
    }
}

/// Resolves `%2F` and the like.
fn decode(text: &str) -> Result<String, ApiError> {
    let bad = || bad_request("QueryString: not percent-encoded UTF-8".into());
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, behind)) = rest.split_first() {
        if byte != b'%' {
            bytes.push(byte);
            rest = behind;
            continue;
        }
        let digits = behind.get(..2).ok_or_else(bad)?;
        bytes.extend(hex::decode(digits).map_err(|_| bad())?);
        rest = &behind[2..];
    }
    String::from_utf8(bytes).map_err(|_| bad())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_may_be_encoded_or_not() {
        let cases = [
            ("mountpoint=%2Fcontainers", Some("/containers")),
            ("mountpoint=/rafs/a.b-c_d+e/lowerdir", Some("/rafs/a.b-c_d+e/lowerdir")),
            ("mountpoint=%2frafs%2Fa%2Bb", Some("/rafs/a+b")),
            ("id=1&mountpoint=/a&mountpoint=/b", Some("/a")),
            ("mount%70oint=/%C3%BC=x", Some("/ü=x")),
            ("mountpoint", Some("")),
            ("mountpoints=/a", None),
            ("", None),
        ];
        for (text, want) in cases {
            assert_eq!(
                Query::new(Some(text)).get("mountpoint").unwrap().as_deref(),
                want,
                "{text}"
            );
        }
        for text in ["mountpoint=%2", "mountpoint=%zz", "mountpoint=%ff"] {
            assert!(Query::new(Some(text)).get("mountpoint").is_err(), "{text}");
        }
        assert!(Query::new(None).required("mountpoint").is_err());
    }
}
