//! The fixed fields of a tar header.

/// Accepts a header whose checksum is the sum of its bytes, as unsigned or, as some old programs
/// wrote it, as signed numbers.
pub fn check_sum(header: &::tar::Header) -> Result<(), String> {
    let want =
        number(&header.as_old().cksum, "checksum").map_err(|_| "no tar header".to_owned())?;
    let (mut unsigned, mut signed) = (0_u64, 0_i64);
    for (at, &byte) in header.as_bytes().iter().enumerate() {
        let byte = if (148..156).contains(&at) { b' ' } else { byte };
        unsigned += u64::from(byte);
        signed += i64::from(byte.cast_signed());
    }
    if want == unsigned || want.cast_signed() == signed {
        return Ok(());
    }
    Err(format!("no tar header: its bytes sum up to {unsigned}, the checksum is {want}"))
}

/// A number that cannot be negative, in octal or base 256. An empty field is 0.
pub fn number(field: &[u8], what: &str) -> Result<u64, String> {
    let value = signed(field, what)?;
    u64::try_from(value).map_err(|_| format!("{what} is negative: {value}"))
}

/// A number, in octal or base 256 (the first bit set; the rest is two's complement).
pub fn signed(field: &[u8], what: &str) -> Result<i64, String> {
    let odd = || format!("{what} is no number: {:?}", field.escape_ascii().to_string());
    if field[0] & 0x80 != 0 {
        // Bit 6 is the sign.
        let mut value = if field[0] & 0x40 != 0 { -1_i128 } else { 0 };
        value = value << 6 | i128::from(field[0] & 0x3F);
        for &byte in &field[1..] {
            value = value.checked_mul(256).ok_or_else(odd)? | i128::from(byte);
        }
        return i64::try_from(value).map_err(|_| odd());
    }
    let digits = field.split(|b| matches!(b, 0 | b' ')).find(|part| !part.is_empty());
    let Some(digits) = digits else { return Ok(0) };
    let text = std::str::from_utf8(digits).map_err(|_| odd())?;
    if text.starts_with(['+', '-']) {
        return Err(odd());
    }
    i64::from_str_radix(text, 8).map_err(|_| odd())
}

/// Major and minor number of a device, as far as the kernel's 32-bit encoding reaches.
pub fn device(major: &[u8], minor: &[u8]) -> Result<(u32, u32), String> {
    let (major, minor) = (number(major, "device number")?, number(minor, "device number")?);
    match (u32::try_from(major), u32::try_from(minor)) {
        (Ok(major @ ..=0xFFF), Ok(minor @ ..=0xF_FFFF)) => Ok((major, minor)),
        _ => Err(format!("device number {major}:{minor} exceeds 12 and 20 bits")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_all_dialects() {
        // (field, value)
        let cases: [(&[u8], Option<i64>); 14] = [
            (b"0000644\0", Some(0o644)),
            (b"   644 \0", Some(0o644)),
            (b"00000644", Some(0o644)),
            (b"\0\0\0\0\0\0\0\0", Some(0)),
            (b"        ", Some(0)),
            (b"77777777777\0", Some(0o77777777777)),
            (b"\x80\0\0\0\0\0\0\x02\0\0\0\0", Some(1 << 33)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfb", Some(-5)),
            (b"\xff\xff\xff\xfb", Some(-5)),
            (b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff", Some(i64::MAX)),
            (b"\x80\0\0\0\x80\0\0\0\0\0\0\0", None),
            (b"\x80\xff\xff\xff\x80\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", None),
            (b"0000648\0", None),
            (b"-000644\0", None),
        ];
        for (field, value) in cases {
            assert_eq!(signed(field, "it").ok(), value, "{}", field.escape_ascii());
        }
        assert!(number(b"\xff\xff\xff\xfb", "it").is_err());
    }

    #[test]
    fn devices_have_12_and_20_bits() {
        assert_eq!(device(b"0007777\0", b"3777777\0"), Ok((0xFFF, 0xF_FFFF)));
        assert!(device(b"0010000\0", b"0000000\0").is_err());
        assert!(device(b"0000000\0", b"4000000\0").is_err());
    }
}
