use super::super::draft::{Attributes, Dir};
use super::super::tree::{Kind, NodeId};
use super::super::whiteout::OPAQUE;
use super::super::xattrs::Xattr;
use super::*;
use crate::rafs::FileKind;
use crate::rafs::layout::LayerMark;

fn parts(path: &str) -> Vec<Box<[u8]>> {
    path.split('/').filter(|p| !p.is_empty()).map(|p| p.as_bytes().into()).collect()
}

fn attributes(kind: FileKind, uid: u32) -> Attributes {
    Attributes { mode: kind.mode_bits() | 0o644, uid, ..Attributes::default() }
}

/// A layer of entries, each one word: `dir/` and `dir/:7` (of owner 7), `file=3` (of 3 bytes),
/// `name->target`, `name=>path` (hard link), `name|` (fifo). Whiteouts are files.
fn layer(entries: &str) -> Draft {
    let mut draft = Draft::new();
    for entry in entries.split_whitespace() {
        try_add(&mut draft, entry).unwrap();
    }
    draft
}

fn try_add(draft: &mut Draft, entry: &str) -> Result<(), BuildError> {
    if let Some((path, target)) = entry.split_once("=>") {
        return draft.link(&parts(path), &parts(target));
    }
    let (path, attributes, body) = if let Some((path, target)) = entry.split_once("->") {
        (path, attributes(FileKind::Symlink, 0), Body::Symlink(target.as_bytes().into()))
    } else if let Some((path, size)) = entry.split_once('=') {
        let data = draft.next_data()?;
        let size = size.parse().unwrap();
        (path, attributes(FileKind::Regular, 0), Body::File { size, data })
    } else if let Some(path) = entry.strip_suffix('|') {
        (path, attributes(FileKind::Fifo, 0), Body::Special { rdev: 0 })
    } else {
        let (path, owner) = entry.split_once("/:").unwrap_or((entry, "0"));
        let owner = owner.parse().unwrap();
        (path, attributes(FileKind::Directory, owner), Body::Dir(Dir::default()))
    };
    draft.insert(&parts(path), Inode { attributes, body })
}

fn merge(layers: &[&str]) -> Result<Draft, BuildError> {
    let mut merged = Draft::new();
    for entries in layers {
        apply(&mut merged, layer(entries), WhiteoutSpec::Oci)?;
    }
    Ok(merged)
}

/// What is in a tree, in the words of [`layer`]; `*2` says that a file has two names.
fn show(draft: Draft, marks: bool) -> String {
    let (tree, _) = draft.into_tree(marks).unwrap();
    let mut words: Vec<String> = tree
        .ids()
        .filter(|&id| id != NodeId::ROOT)
        .map(|id| {
            let node = tree.node(id);
            let path = tree.path(id).to_str().unwrap().to_owned();
            let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
            let word = match &node.kind {
                Kind::Dir { .. } if node.uid == 0 => format!("{path}/"),
                Kind::Dir { .. } => format!("{path}/:{}", node.uid),
                Kind::File(file) => {
                    let file = tree.file(*file);
                    let names =
                        if file.names > 1 { format!("*{}", file.names) } else { String::new() };
                    format!("{path}={}{names}", file.size)
                }
                Kind::Symlink(target) => format!("{path}->{}", text(target)),
                Kind::Special { .. } => format!("{path}|"),
            };
            match node.mark {
                LayerMark::None => word,
                LayerMark::Implied => word + "?",
                LayerMark::HardLink => word.replace("->", "=>"),
            }
        })
        .collect();
    words.sort();
    words.join(" ")
}

#[test]
fn layers_on_top_of_each_other() {
    // (what, layers, result)
    let cases: &[(&str, &[&str], &str)] = &[
        ("union", &["a/ a/x=1", "a/ a/y=2 b=3"], "a/ a/x=1 a/y=2 b=3"),
        ("later file", &["a=1", "a=2"], "a=2"),
        ("attributes of the later directory", &["a/:1 a/x=1", "a/:2"], "a/:2 a/x=1"),
        ("file over directory", &["a/ a/x=1", "a=2"], "a=2"),
        ("directory over file", &["a=1", "a/ a/x=2"], "a/ a/x=2"),
        ("and back", &["a=1", "a/ a/x=2", "a=3"], "a=3"),
        ("symlink over directory", &["a/ a/x=1", "a->b"], "a->b"),
        ("whiteout", &["a=1 b=2", ".wh.a=0"], "b=2"),
        ("whiteout of a directory", &["a/ a/x=1 b=2", ".wh.a=0"], "b=2"),
        ("whiteout of nothing", &["a=1", ".wh.b=0"], "a=1"),
        ("whiteout in the lowest layer", &[".wh.a=0 .wh..wh..opq=0 b=1"], "b=1"),
        ("whiteout below a new directory", &["b=1", "a/ a/.wh.x=0 a/y=1"], "a/ a/y=1 b=1"),
        ("whiteout below what is not there", &["b=1", "a/.wh.x=0 a/d/.wh..wh..opq=0"], "b=1"),
        ("whiteouts below a whiteout", &["a/ a/x=1 b=1", "a/.wh.x=0 .wh.a=0"], "b=1"),
        ("whiteout below a file", &["a=1", "a/.wh.x=0"], "a=1"),
        ("whiteout before the same name", &["a=1", ".wh.a=0 a=2"], "a=2"),
        ("whiteout behind the same name", &["a=1", "a=2 .wh.a=0"], "a=2"),
        ("whiteout and a new directory", &["a/ a/x=1", ".wh.a=0 a/ a/y=2"], "a/ a/y=2"),
        ("opaque", &["a/ a/x=1 a/d/ a/d/z=1", "a/ a/.wh..wh..opq=0 a/y=2"], "a/ a/y=2"),
        ("opaque behind its files", &["a/ a/x=1", "a/ a/x=2 a/.wh..wh..opq=0"], "a/ a/x=2"),
        ("opaque in an implied directory", &["a/:1 a/x=1", "a/.wh..wh..opq=0 a/y=2"], "a/:1 a/y=2"),
        ("opaque root", &["a=1 b/ b/c=1", ".wh..wh..opq=0 d=1"], "d=1"),
        (
            "what AUFS needed",
            &["a=1", ".wh..wh.plnk/ .wh..wh.plnk/1=1 .wh..wh.aufs=0 b=2"],
            "a=1 b=2",
        ),
        ("no name to remove", &["a=1", ".wh.=0 .wh..=0 .wh...=0"], "a=1"),
        ("implied directory keeps attributes", &["a/:1 a/x=1", "a/y=2"], "a/:1 a/x=1 a/y=2"),
        ("implied and new", &["x=1", "a/b/y=2"], "a/ a/b/ a/b/y=2 x=1"),
        ("implied, then named", &["a/y=2", "a/:3"], "a/:3 a/y=2"),
        ("named later in the layer", &["a/:1", "a/y=2 a/:3"], "a/:3 a/y=2"),
        (
            "implied over a symlink",
            &["usr/ usr/lib/ usr/lib/x=1 lib->usr/lib", "lib/y=2"],
            "lib->usr/lib usr/ usr/lib/ usr/lib/x=1 usr/lib/y=2",
        ),
        (
            "whiteout through a symlink",
            &["usr/ usr/lib/ usr/lib/x=1 lib->/usr/lib", "lib/.wh.x=0"],
            "lib->/usr/lib usr/ usr/lib/",
        ),
        (
            "symlinks stay inside",
            &["up->../../etc etc/ etc/a=1", "up/b=2"],
            "etc/ etc/a=1 etc/b=2 up->../../etc",
        ),
        (
            "a dangling symlink leads to what is made",
            &["l->x/y", "l/b=2"],
            "l->x/y x/ x/y/ x/y/b=2",
        ),
        ("a named directory over a symlink", &["u/ l->u", "l/ l/b=2"], "l/ l/b=2 u/"),
        ("a file below a file", &["a=1", "a/b=2"], "a/ a/b=2"),
        ("file, directory, all in one layer", &["a/ a/x=1", "a=2 a/ a/y=3"], "a/ a/y=3"),
        ("twice in one layer", &["a=1 a=2 b/:1 b/:2"], "a=2 b/:2"),
        ("symlink in the layer itself", &["lib->usr lib/x=1"], "lib->usr usr/ usr/x=1"),
    ];
    for (what, layers, want) in cases {
        assert_eq!(show(merge(layers).unwrap(), false), *want, "{what}");
    }
}

#[test]
fn hard_links() {
    let cases: &[(&str, &[&str], &str)] = &[
        ("in one layer", &["a=1 b=>a c=>b"], "a=1*3 b=1*3 c=1*3"),
        ("to a later file", &["b=>a a=1"], "a=1*2 b=1*2"),
        ("to a later link to a later file", &["c=>b b=>a a=1"], "a=1*3 b=1*3 c=1*3"),
        ("to a lower layer", &["a=1", "b=>a"], "a=1*2 b=1*2"),
        ("through two layers", &["a=1", "b=>a", "c=>b"], "a=1*3 b=1*3 c=1*3"),
        ("to what this layer removes", &["a=1", "b=>a .wh.a=0"], "b=1"),
        ("to what this layer replaces later", &["a=1", "b=>a a=2"], "a=2 b=1"),
        ("to what this layer replaced before", &["a=1", "a=2 b=>a"], "a=2*2 b=2*2"),
        ("one name replaced", &["a=1 b=>a", "a=2"], "a=2 b=1"),
        ("one name removed", &["a=1 b=>a c=>a", ".wh.a=0"], "b=1*2 c=1*2"),
        ("the first name is replaced in the layer", &["a=1 b=>a a=2"], "a=2 b=1"),
        ("to itself below", &["a=1", "a=>a"], "a=1"),
        ("through a symlink", &["d/ d/a=1 l->d", "b=>l/a"], "b=1*2 d/ d/a=1*2 l->d"),
        ("symlinks are split", &["s->x t=>s", "u=>s"], "s->x t->x u->x"),
        ("fifos are split", &["p| q=>p"], "p| q|"),
        ("a name in a new directory", &["a=1", "d/b=>a"], "a=1*2 d/ d/b=1*2"),
    ];
    for (what, layers, want) in cases {
        assert_eq!(show(merge(layers).unwrap(), false), *want, "{what}");
    }
    // (what, layers, message)
    let refused: &[(&str, &[&str], &str)] = &[
        ("nowhere", &["a=1", "b=>none"], "/none"),
        ("in a circle", &["a=>b b=>a"], "leads to itself"),
        ("to itself", &["a=>a"], "leads to itself"),
        ("to a lower directory", &["d/", "b=>d"], "directory"),
        ("through a symlink that never ends", &["l->l", "b=>l/x"], "/l/x"),
    ];
    for (what, layers, message) in refused {
        let error = merge(layers).map(|d| show(d, false)).unwrap_err().to_string();
        assert!(error.contains(message), "{what}: {error}");
    }
    let mut draft = layer("d/");
    assert!(try_add(&mut draft, "b=>d").is_err(), "to a directory of the layer");
}

#[test]
fn what_a_layer_cannot_know_survives_in_its_bootstrap() {
    // (entries, as the layer's own tree shows them)
    let cases = [
        ("a/b=1", "a/? a/b=1"),
        ("a/b=1 a/", "a/ a/b=1"),
        ("b=>c/a c/a=1", "b=>/c/a c/? c/a=1"),
        ("a=1 b=>a", "a=1*2 b=1*2"),
        (".wh.x=0 d/.wh..wh..opq=0", ".wh.x=0 d/.wh..wh..opq=0 d/?"),
        ("a=1 a/ a/b=2", "a/ a/.wh..wh..opq=0 a/b=2"),
    ];
    for (entries, want) in cases {
        assert_eq!(show(layer(entries), true), want, "{entries}");
    }
}

#[test]
fn overlayfs_marks_are_a_device_and_an_attribute() {
    let lower = "a=1 b=2 d/ d/x=1 e/ e/y=1";
    let mut upper = layer("d/ d/z=3 e/ e/z=3");
    let device = |rdev| Inode {
        attributes: attributes(FileKind::CharDevice, 0),
        body: Body::Special { rdev },
    };
    upper.insert(&parts("a"), device(0)).unwrap();
    upper.insert(&parts("null"), device(0x103)).unwrap();
    upper.insert(&parts(".wh.b"), device(0x103)).unwrap();
    let opaque = Xattr::new(b"trusted.overlay.opaque", b"y".to_vec()).unwrap();
    let other = Xattr::new(b"user.other", b"1".to_vec()).unwrap();
    let d = upper.find(&parts("d")).unwrap().unwrap();
    upper.inode_mut(d).attributes.xattrs = vec![opaque, other.clone()].into();
    let mut merged = Draft::new();
    apply(&mut merged, layer(lower), WhiteoutSpec::Overlayfs).unwrap();
    apply(&mut merged, upper, WhiteoutSpec::Overlayfs).unwrap();
    let d = merged.find(&parts("d")).unwrap().unwrap();
    assert_eq!(*merged.inode(d).attributes.xattrs, [other], "the mark is taken off");
    assert_eq!(show(merged, false), ".wh.b| b=2 d/ d/z=3 e/ e/y=1 e/z=3 null|");
}

#[test]
fn without_a_convention_marks_are_files() {
    let mut merged = Draft::new();
    apply(&mut merged, layer("a=1"), WhiteoutSpec::None).unwrap();
    apply(&mut merged, layer(".wh.a=0"), WhiteoutSpec::None).unwrap();
    assert_eq!(show(merged, false), ".wh.a=0 a=1");
    assert_eq!(OPAQUE, b".wh..wh..opq");
}

#[test]
fn a_tree_as_deep_as_can_be_is_merged() {
    let deep = "d/".repeat(2000);
    let merged = merge(&[&format!("{deep}a=1"), &format!("{deep}b=2")]).unwrap();
    let (tree, _) = merged.into_tree(false).unwrap();
    assert_eq!(tree.len(), 2003);
    let mut draft = Draft::new();
    assert!(try_add(&mut draft, &format!("{}a=1", "d/".repeat(2049))).is_err());
    // Through links a path leads deeper than it is long.
    let (half, link) = ("d/".repeat(1500), format!("l->{}", "d/".repeat(1500)));
    let merged = merge(&[&format!("{half}a=1"), &link, &format!("l/{half}b=1")]).unwrap();
    assert!(merged.into_tree(false).is_err());
}
