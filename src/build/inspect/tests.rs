use super::*;

fn inspect(file: &str, path: Option<&str>, json: bool) -> Result<String> {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("guest-tests/golden");
    let args = Args { bootstrap: root.join(file), path: path.map(PathBuf::from), json };
    let mut out = Vec::new();
    print(&args, &mut out)?;
    Ok(String::from_utf8(out).unwrap())
}

#[test]
fn text_of_the_worked_example() {
    assert_eq!(
        inspect("v6-none/bootstrap", None, false).unwrap(),
        "\
format              RAFS v6
bootstrap           20480 bytes
block size          4096
chunk size          4096
flags               COMPRESSION_NONE HASH_BLAKE3 EXPLICIT_UID_GID HAS_XATTR ENCRYPTION_NONE
root nid            128
paths               14 by the super block
chunk table         9 records
prefetch nids       none
files               7 of 18111 bytes in 9 chunks
ranges of 2 MiB     6, 6 in one piece (100 %)
directories         3
symlinks            1
devices             1
fifos, sockets      1, 0

 blob  id                                                                chunks  compressor  \
digester  stored  uncompressed  ci offset  ci size  features
    0  4de91e905cfb82e8d9fcfc648c3eb31717c38cb2557a97df34327eade97f9849       9  none        \
blake3     22351         36864      18111      144  ALIGNED CAP_TAR_TOC
"
    );
    assert_eq!(
        inspect("v6-none/bootstrap", Some("/b"), false).unwrap(),
        "\
path                /b
type                file
mode                0644
owner               0:0
size                9000
mtime               1600000002.002000006 = 2020-09-13T12:26:42.002000006Z
links               1
nid                 138, extended inode at byte 12608

   file offset      size  blob     chunk    uncompressed  digest
             0      4096     0         1            4096  \
5df779102ba1f522f2c5ff4ce0e241393210f549c1b5da02d66a3cbb7afa0ebb
          4096      4096     0         2            8192  \
c384d2f917f883c08658f9a504b704c4ce41f746372b1053d30e9da801d7af61
          8192       808     0         3           12288  \
fa1e364989579a900991b842bc35bc474556a42e558892a0517e94ab4b9bed52
"
    );
}

#[test]
fn json_says_the_same() {
    let parse = |text: String| serde_json::from_str::<serde_json::Value>(&text).unwrap();
    let image = parse(inspect("v6-oci-packed/bootstrap", None, true).unwrap());
    assert_eq!(image["blobs"][0]["id"], "x".repeat(64));
    assert_eq!(image["packed_blob"], false);
    let file = "v6-oci-packed/blobs/\
                a59afcbc8265d23b0a7a24dacb111756654fcb5907c8e30d80d2e2b49f489c01";
    let packed = parse(inspect(file, None, true).unwrap());
    assert_eq!(packed["blobs"][0]["id"], file[20..], "named by its file");
    assert_eq!(packed["packed_blob"], true);
    assert_eq!(packed["counts"], image["counts"]);
    let prefetch = parse(inspect("v6-merged/bootstrap", None, true).unwrap());
    assert_eq!(prefetch["prefetch_nids"], serde_json::json!([128]));

    let x = parse(inspect("v6-none/bootstrap", Some("x"), true).unwrap());
    assert_eq!(x["xattrs"], serde_json::json!([{ "name": "user.k", "value_b64": "dg==" }]));
    assert_eq!(x["chunks"][0]["chunk_index"], 5);
    assert_eq!(x["chunks"][0]["uncompressed_offset"], 0x5000);
    let root = parse(inspect("v6-none/bootstrap", Some("/"), true).unwrap());
    assert_eq!(root["entries"][2]["name"], "a");
    let null = parse(inspect("v6-none/bootstrap", Some("/null"), true).unwrap());
    assert_eq!(null["rdev"], serde_json::json!([1, 3]));
    let link = parse(inspect("v6-none/bootstrap", Some("//./s"), true).unwrap());
    assert_eq!(link["target"], "d/e");
}

#[test]
fn names_that_are_not_text() {
    use std::os::unix::ffi::OsStringExt;
    let bytes = b"/names/\xff\xfe\x80".to_vec();
    let args = |json| Args {
        bootstrap: "guest-tests/golden/v6-zstd/bootstrap".into(),
        path: Some(std::ffi::OsString::from_vec(bytes.clone()).into()),
        json,
    };
    let mut out = Vec::new();
    print(&args(true), &mut out).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&out).unwrap();
    assert_eq!(json["path_b64"], "L25hbWVzL//+gA==");
    assert_eq!(json.get("path"), None);
    let mut out = Vec::new();
    print(&args(false), &mut out).unwrap();
    assert!(out.starts_with(b"path                /names/\\xff\\xfe\\x80\n"));
}

#[test]
fn what_cannot_be_shown() {
    // (file, path, in the message)
    let cases = [
        ("v6-none/bootstrap", Some("/nope"), "/nope: no such path in the image"),
        ("v6-none/bootstrap", Some("/a/b"), "a file is on the way, not a directory"),
        ("v6-none/nope", None, "cannot read"),
        ("v6-none/tree.json", None, "no RAFS bootstrap"),
        ("v6-zran/bootstrap", None, "zran (OCI reference) images are not supported"),
        ("v5-lz4/bootstrap", None, "RAFS v5 images are not supported"),
    ];
    for (file, path, message) in cases {
        let error = format!("{:#}", inspect(file, path, false).unwrap_err());
        assert!(error.contains(message), "{file}: {error}");
    }
}

#[test]
fn a_closed_pipe_is_recognised_in_text_and_json() {
    struct Closed;
    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    for json in [false, true] {
        let args =
            Args { bootstrap: "guest-tests/golden/v6-none/bootstrap".into(), path: None, json };
        assert!(is_broken_pipe(&print(&args, &mut Closed).unwrap_err()));
    }
}
