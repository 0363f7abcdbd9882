use proptest::prelude::*;

use super::super::test_tar::{Item, Tar};
use super::*;

fn cut() -> Cut {
    Cut { chunk_size: 4096, digesters: vec![Digester::Sha256] }
}

fn merged(layers: &[Vec<u8>]) -> Result<BTreeMap<Key, Arc<File>>, LayerError> {
    let mut overlay = Overlay::default();
    for layer in layers {
        overlay.apply(Layer::read(layer.as_slice(), &cut())?)?;
    }
    Ok(overlay.finish())
}

/// `PATH WHAT`: files as the first letters of their digest, later names of one as `= PATH`.
fn listing(files: &BTreeMap<Key, Arc<File>>) -> Vec<String> {
    let mut first: HashMap<*const File, String> = HashMap::new();
    let line = |(key, file): (&Key, &Arc<File>)| {
        let path = shown(key);
        let what = match &file.kind {
            Kind::File(content) => match first.get(&Arc::as_ptr(file)) {
                Some(first) => format!("= {first}"),
                None => {
                    first.insert(Arc::as_ptr(file), path.clone());
                    content.digests.first().map_or("empty".to_owned(), |d| hex::encode(&d[..4]))
                }
            },
            Kind::Symlink(target) => format!("-> {}", target.escape_ascii()),
            Kind::Dir => format!("dir {:o}", file.attrs.mode),
            other => format!("{other:?}"),
        };
        format!("{path} {what}")
    };
    files.iter().map(line).collect()
}

/// How a file with this content is listed.
fn of(content: &str) -> String {
    hex::encode(&sha2::Sha256::digest(content)[..4])
}

#[track_caller]
fn expect(what: &str, layers: &[&[Item<'_>]], want: &[&str]) {
    let layers: Vec<_> = layers.iter().map(|items| Tar::of(items)).collect();
    let got = merged(&layers).map(|files| listing(&files)).unwrap_or_else(|e| vec![e.to_string()]);
    // `name file CONTENT` stands for the digest.
    let want = want.iter().map(|line| match line.split_once(" file ") {
        Some((path, content)) => format!("{path} {}", of(content)),
        None => (*line).to_owned(),
    });
    assert_eq!(got, want.collect::<Vec<_>>(), "{what}");
}

#[test]
fn layers_on_top_of_each_other() {
    use super::super::test_tar::Item as I;
    let lower = [
        I::dir("d/"),
        I::file("d/a", b"A"),
        I::dir("d/s"),
        I::file("d/s/x", b"X"),
        I::file("d/s.y", b"Y"),
        I::file("f", b"F"),
    ];
    let root = "/ dir 755";
    expect(
        "one layer, in the order of a walk",
        &[&lower],
        &[
            root,
            "/d dir 755",
            "/d/a file A",
            "/d/s dir 755",
            "/d/s/x file X",
            "/d/s.y file Y",
            "/f file F",
        ],
    );
    expect(
        "whiteouts remove what is below, with all it holds, wherever they stand",
        &[
            &lower,
            &[
                I::file("d/s.y", b"new"),
                I::file("d/.wh.s", b""),
                I::file("d/.wh.s.y", b""),
                I::file("d/.wh.none", b""),
            ],
        ],
        &[root, "/d dir 755", "/d/a file A", "/d/s.y file new", "/f file F"],
    );
    expect(
        "an opaque directory keeps what its own layer has",
        &[
            &lower,
            &[
                I::file("d/n", b"N"),
                I::dir("d/s"),
                I::file("d/.wh..wh..opq", b""),
                I::file("d/a", b"A2"),
            ],
        ],
        &[root, "/d dir 755", "/d/a file A2", "/d/n file N", "/d/s dir 755", "/f file F"],
    );
    expect("everything at once", &[&lower, &[I::file(".wh..wh..opq", b"")]], &[root]);
    expect(
        "a directory in place of a file and the other way round",
        &[&lower, &[I::dir("f"), I::file("f/in", b"I"), I::file("d", b"D")]],
        &[root, "/d file D", "/f dir 755", "/f/in file I"],
    );
    expect(
        "and back",
        &[&lower, &[I::file("d", b"D")], &[I { mode: 0o700, ..I::dir("d") }]],
        &[root, "/d dir 700", "/f file F"],
    );
    expect(
        "a directory over a directory has new attributes and old children",
        &[&lower, &[I { mode: 0o711, ..I::dir("d") }]],
        &[
            root,
            "/d dir 711",
            "/d/a file A",
            "/d/s dir 755",
            "/d/s/x file X",
            "/d/s.y file Y",
            "/f file F",
        ],
    );
    expect(
        "implied directories change nothing of those that exist",
        &[
            &[I { mode: 0o700, ..I::dir("./") }, I { mode: 0o711, ..I::dir("d") }],
            &[I::file("d/e/f", b"1")],
        ],
        &["/ dir 700", "/d dir 711", "/d/e dir 755", "/d/e/f file 1"],
    );
    expect(
        "a removed directory that comes back holds only what is new",
        &[&lower, &[I::file(".wh.d", b""), I::file("d/n", b"N")]],
        &[root, "/d dir 755", "/d/n file N", "/f file F"],
    );
    expect(
        "whiteouts in the lowest layer, and what stands below one, are not seen",
        &[&[I::file(".wh.x", b""), I::file("a/.wh..wh.plnk/1.2", b"P"), I::file("a/b", b"B")]],
        &[root, "/a dir 755", "/a/b file B"],
    );
    expect(
        "of an entry given twice the later one counts",
        &[&[
            I::file("a", b"1"),
            I::file("a", b"2"),
            I::dir("b"),
            I::file("b/c", b"C"),
            I::file("b", b"B"),
            I::file("e", b"E"),
            I::dir("e"),
            I::file("e/f", b"F"),
        ]],
        &[root, "/a file 2", "/b file B", "/e dir 755", "/e/f file F"],
    );
    expect(
        "a directory in place of a file of its own layer shows nothing from below",
        &[&lower, &[I::file("d", b"1"), I::dir("d"), I::file("f", b"2"), I::file("f/x", b"3")]],
        &[root, "/d dir 755", "/f dir 755", "/f/x file 3"],
    );
    expect(
        "marks in a directory that becomes something else are forgotten",
        &[
            &[I::file("b/x", b"X")],
            &[
                I::file("a/.wh.x", b""),
                I::file("c/.wh..wh..opq", b""),
                I::symlink("a", "b"),
                I::symlink("c", "b"),
            ],
        ],
        &[root, "/a -> b", "/b dir 755", "/b/x file X", "/c -> b"],
    );
    expect(
        "entries take their places in their order",
        &[&[I::symlink("d", "c")], &[I::file("c/b", b"1"), I::dir("d/b/a"), I::file("c/b", b"2")]],
        &[root, "/c dir 755", "/c/b file 2", "/d -> c"],
    );
    expect(
        "marks imply the directories that they stand in",
        &[&[I::file("a/.wh.x", b""), I::file("b/c/.wh..wh..opq", b"")]],
        &[root, "/a dir 755", "/b dir 755", "/b/c dir 755"],
    );
    expect(
        "paths in every spelling",
        &[&[
            I::file("/abs", b"1"),
            I::file("./x//y", b"2"),
            I::file("x/../up", b"3"),
            I::file("../../out", b"4"),
        ]],
        &[root, "/abs file 1", "/out file 4", "/up file 3", "/x dir 755", "/x/y file 2"],
    );
}

#[test]
fn hard_links_within_and_across_layers() {
    use super::super::test_tar::Item as I;
    let root = "/ dir 755";
    let pair = [I::file("a", b"A"), I::link("b", "a")];
    expect("to what came before", &[&pair], &[root, "/a file A", "/b = /a"]);
    expect(
        "to what comes later, by way of another link",
        &[&[I::link("c", "b"), I::link("b", "./a"), I::file("a", b"A")]],
        &[root, "/a file A", "/b = /a", "/c = /a"],
    );
    expect(
        "to a file of a lower layer",
        &[&pair, &[I::link("d/c", "a")]],
        &[root, "/a file A", "/b = /a", "/d dir 755", "/d/c = /a"],
    );
    expect(
        "to a file of a lower layer that this layer removes or replaces",
        &[
            &pair,
            &[I::file(".wh.b", b""), I::link("c", "b"), I::link("d", "a"), I::file("a", b"A2")],
        ],
        &[root, "/a file A2", "/c file A", "/d = /c"],
    );
    expect(
        "replacing one name leaves the others linked",
        &[&[I::file("a", b"A"), I::link("b", "a"), I::link("c", "a")], &[I::file("a", b"A")]],
        &[root, "/a file A", "/b file A", "/c = /b"],
    );
    expect(
        "a name given twice leaves the link to what it was",
        &[&[I::file("a", b"1"), I::link("b", "a"), I::file("a", b"2")]],
        &[root, "/a file 2", "/b file 1"],
    );
    expect("to itself, again", &[&[I::file("a", b"A"), I::link("a", "a")]], &[root, "/a file A"]);
    let links = [
        ("to nothing", vec![I::link("a", "none")], "/a: hard link to /none, which no layer has"),
        (
            "in a circle",
            vec![I::link("a", "b"), I::link("b", "a")],
            "/a: hard link to /b, which no layer has",
        ),
        (
            "to a directory",
            vec![I::dir("d"), I::link("a", "d")],
            "/a: hard link to /d, which is a directory",
        ),
        (
            "to a directory that comes later",
            vec![I::link("a", "d"), I::dir("d")],
            "/a: hard link to /d, which is a directory",
        ),
    ];
    for (what, layer, error) in links {
        expect(what, &[&layer], &[error]);
    }
}

#[test]
fn symbolic_links_on_the_way_are_followed_within_the_root() {
    use super::super::test_tar::Item as I;
    let root = "/ dir 755";
    let lower = [I::symlink("lib", "usr/lib"), I::dir("usr/lib"), I::file("usr/lib/a", b"A")];
    expect(
        "of a lower layer",
        &[&lower, &[I::file("lib/b", b"B"), I::file("lib/.wh.a", b""), I::link("c", "lib/a")]],
        &[
            root,
            "/c file A",
            "/lib -> usr/lib",
            "/usr dir 755",
            "/usr/lib dir 755",
            "/usr/lib/b file B",
        ],
    );
    expect(
        "of the same layer, absolute and upwards",
        &[&[
            I::symlink("a", "/../x/y/.."),
            I::file("a/f", b"F"),
            I::symlink("l", "a"),
            I::file("l/g/h", b"H"),
        ]],
        &[
            root,
            "/a -> /../x/y/..",
            "/l -> a",
            "/x dir 755",
            "/x/f file F",
            "/x/g dir 755",
            "/x/g/h file H",
        ],
    );
    expect(
        "unless the layer has a directory there",
        &[&lower, &[I::dir("lib"), I::file("lib/b", b"B")]],
        &[
            root,
            "/lib dir 755",
            "/lib/b file B",
            "/usr dir 755",
            "/usr/lib dir 755",
            "/usr/lib/a file A",
        ],
    );
    expect(
        "an opaque mark, too",
        &[&lower, &[I::file("lib/.wh..wh..opq", b"")]],
        &[root, "/lib -> usr/lib", "/usr dir 755", "/usr/lib dir 755"],
    );
    expect(
        "not for ever",
        &[&[I::symlink("a", "b"), I::symlink("b", "a"), I::file("a/x", b"")]],
        &["/a/x: more than 40 symbolic links on the way"],
    );
}

#[test]
fn content_is_digested_in_chunks_by_each_digester() {
    let data: Vec<u8> = (0..10_000u32).map(|i| i.to_le_bytes()[0]).collect();
    let cut = Cut { chunk_size: 4096, digesters: vec![Digester::Sha256, Digester::Blake3] };
    let mut hasher = ChunkHasher::new(&cut);
    for piece in data.chunks(999) {
        hasher.update(piece);
    }
    let content = hasher.finish();
    let want: Vec<[u8; 32]> = data
        .chunks(4096)
        .flat_map(|chunk| [sha2::Sha256::digest(chunk).into(), *blake3::hash(chunk).as_bytes()])
        .collect();
    assert_eq!((content.size, &content.digests[..]), (10_000, &want[..]));
}

#[test]
fn names_too_long_and_roots_that_are_files() {
    let long = "n".repeat(256);
    expect(
        "long name",
        &[&[Item::file(&long, b"")]],
        &[&format!("{long}: name of more than 255 bytes or with a NUL")],
    );
    expect(
        "root",
        &[&[Item::file("./", b"")]],
        &["the entry ./ stands for the root, which can only be a directory"],
    );
}

proptest! {
    /// Whatever a layer says, every path of the result has a directory above it.
    #[test]
    fn the_result_is_a_tree(
        layers in proptest::collection::vec(
            proptest::collection::vec((0usize..6, "[ab]{1}(/[ab]{1}|/\\.\\.|/\\.wh\\.a){0,3}", "[ab](/[ab])?"), 0..8),
            1..4,
        )
    ) {
        let layers: Vec<_> = layers.iter().map(|items| {
            let items: Vec<_> = items.iter().map(|(kind, path, to)| match kind {
                0 => Item::dir(path),
                1 => Item::link(path, to),
                2 => Item::symlink(path, to),
                _ => Item::file(path, b"x"),
            }).collect();
            Tar::of(&items)
        }).collect();
        if let Ok(files) = merged(&layers) {
            for key in files.keys() {
                if let Some(above) = parent(key) {
                    prop_assert!(files[above].kind == Kind::Dir, "{}", shown(key));
                }
                prop_assert!(!name(key).starts_with(b".wh."));
            }
        }
    }
}
