//! Flags of the DAX window.

use super::{Cli, UsageError, usage_error};
use crate::fuse::{DaxOptions, DaxPolicy, MAX_PRIVATE_WINDOW, MAX_SHARED_WINDOW, MIN_WINDOW};

/// Size of the window in bytes, unless it is said.
const DEFAULT_WINDOW: u64 = 512 << 20;

/// The window of guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DaxFlags {
    pub options: DaxOptions,
    /// Bytes, a power of two; `None`: none is offered.
    pub window: Option<u64>,
}

/// Reads what is said about the window.
pub(super) fn flags(cli: &Cli) -> Result<DaxFlags, UsageError> {
    let policy = cli.dax.unwrap_or_default();
    let fallback = cli.dax_fallback.unwrap_or_default();
    let size = cli.dax_window.unwrap_or(DEFAULT_WINDOW);
    let max = match policy {
        DaxPolicy::Shared => MAX_SHARED_WINDOW,
        _ => MAX_PRIVATE_WINDOW,
    };
    if !size.is_power_of_two() || !(MIN_WINDOW..=max).contains(&size) {
        let (min, max) = (MIN_WINDOW >> 20, max >> 20);
        return Err(usage_error(format!(
            "--dax-window: {size} bytes; with this --dax it must be a power of two from {min}M to {max}M"
        )));
    }
    let window = (policy != DaxPolicy::Off).then_some(size);
    Ok(DaxFlags { options: DaxOptions { policy, fallback }, window })
}

/// A value of `--dax`.
pub(super) fn policy(text: &str) -> Result<DaxPolicy, String> {
    Ok(match text {
        "off" => DaxPolicy::Off,
        "shared" => DaxPolicy::Shared,
        "private" => DaxPolicy::Private,
        _ => return Err("use off, shared or private".to_owned()),
    })
}

/// A value of `--dax-fallback`.
pub(super) fn fallback(text: &str) -> Result<DaxPolicy, String> {
    Ok(match text {
        "read" => DaxPolicy::Off,
        "private" => DaxPolicy::Private,
        _ => return Err("use read or private".to_owned()),
    })
}

/// A number of bytes, with K, M or G behind it.
pub(super) fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" | "KiB" => 10,
        "M" | "MiB" => 20,
        "G" | "GiB" => 30,
        _ => return Err("use a number of bytes, or a number with K, M or G".to_owned()),
    };
    let number: u64 = digits.parse().map_err(|_| "not a number of bytes".to_owned())?;
    number.checked_mul(1 << shift).ok_or_else(|| "too large".to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::{Invocation, parse};
    use super::*;

    fn dax(line: &str) -> Result<DaxFlags, String> {
        let words = format!("rafsd --sock S {line}");
        match parse(words.split_whitespace().map(Into::into)) {
            Ok(Invocation::Serve(options)) => Ok(options.dax),
            Ok(other) => panic!("{line}: {other:?}"),
            Err(e) => Err(e.to_string()),
        }
    }

    #[test]
    fn a_window_is_offered_if_it_is_asked_for() {
        let (off, shared, private) = (DaxPolicy::Off, DaxPolicy::Shared, DaxPolicy::Private);
        let cases = [
            ("", off, off, None),
            ("--dax off --dax-window 1G", off, off, None),
            ("--dax private", private, off, Some(512 << 20)),
            ("--dax private --dax-window 8G", private, off, Some(8 << 30)),
            ("--dax shared --dax-fallback private", shared, private, Some(512 << 20)),
            ("--dax shared --dax-window 16384K --dax-fallback read", shared, off, Some(16 << 20)),
            ("--dax private --dax-window 67108864", private, off, Some(64 << 20)),
        ];
        for (line, policy, fallback, window) in cases {
            let want = DaxFlags { options: DaxOptions { policy, fallback }, window };
            assert_eq!(dax(line).as_ref(), Ok(&want), "{line}");
        }
    }

    #[test]
    fn windows_that_cannot_be() {
        let cases = [
            ("--dax yes", "use off, shared or private"),
            ("--dax-fallback shared", "use read or private"),
            ("--dax private --dax-window 8M", "16M to 8192M"),
            ("--dax private --dax-window 96M", "power of two"),
            ("--dax private --dax-window 16G", "16M to 8192M"),
            ("--dax shared --dax-window 1G", "16M to 512M"),
            ("--dax private --dax-window 1T", "K, M or G"),
            ("--dax private --dax-window M", "not a number"),
            ("--dax private --dax-window 99999999999G", "too large"),
        ];
        for (line, want) in cases {
            let error = dax(line).expect_err(line);
            assert!(error.contains(want), "{line}: {error}");
        }
    }
}
