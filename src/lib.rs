//! rafsd serves RAFS container images to microVM guests over virtio-fs, lazily.
//!
//! A read walks down the rooms in this order and its answer walks back up:
//! `device` (virtqueues), `fuse` (operations), `rafs` (the format), `blob` (the chunks),
//! `backend` (the bytes), `oci` (registries). `build` is the image tool, `daemon` wires the rest together.

pub mod backend;
pub mod blob;
pub mod build;
pub mod daemon;
pub mod device;
pub mod fuse;
pub mod oci;
pub mod rafs;

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};

    /// Which room may use which others; arrows point one way.
    const ROOMS: [(&str, &[&str]); 8] = [
        // Opens the bootstrap that it hands to `fuse` and `blob`, hence `rafs`; reads credentials.
        ("daemon", &["device", "fuse", "blob", "backend", "rafs", "oci"]),
        ("device", &["fuse"]),
        ("fuse", &["rafs", "blob"]),
        ("blob", &["backend", "rafs"]),
        ("backend", &["oci", "rafs"]),
        ("build", &["rafs", "oci"]),
        ("rafs", &[]),
        ("oci", &[]),
    ];

    #[test]
    fn rooms_use_only_the_rooms_below_them() {
        let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        for room in fs::read_dir(&src).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_dir()) {
            let name = room.file_name().unwrap().to_str().unwrap();
            if name == "bin" {
                continue;
            }
            let (_, allowed) = ROOMS
                .iter()
                .find(|(room, _)| *room == name)
                .unwrap_or_else(|| panic!("src/{name} is not in the table of rooms"));
            for file in rust_files(&room) {
                for (number, used) in used_rooms(&fs::read_to_string(&file).unwrap()) {
                    assert!(
                        used == name || allowed.contains(&used.as_str()),
                        "{}:{number}: `{name}` may not use `{used}`",
                        file.display()
                    );
                }
            }
        }
    }

    #[test]
    fn finds_every_way_to_name_a_room() {
        let text = "use crate::rafs::id;\nuse crate::{blob::Store, fuse};\n// crate::oci\n\
                    fn f() -> crate::device::X {}\nuse crate::{\n    backend::B,\n};\n";
        let used: Vec<_> = used_rooms(text).into_iter().map(|(_, room)| room).collect();
        assert_eq!(used, ["rafs", "blob", "fuse", "device", "backend"]);
    }

    /// `(line, room)` for each `crate::room` outside comments, braces included.
    fn used_rooms(text: &str) -> Vec<(usize, String)> {
        let code: Vec<&str> = text.lines().map(|l| l.split("//").next().unwrap_or("")).collect();
        let code = code.join("\n");
        let mut used = Vec::new();
        for (at, _) in code.match_indices("crate::") {
            let number = code[..at].matches('\n').count() + 1;
            let rest = &code[at + "crate::".len()..];
            let names: Vec<&str> = match rest.strip_prefix('{') {
                Some(group) => top_level(group),
                None => vec![rest],
            };
            for name in names {
                let name: String = name
                    .trim_start()
                    .chars()
                    .take_while(|c| c.is_ascii_alphanumeric() || *c == '_')
                    .collect();
                if ROOMS.iter().any(|(room, _)| *room == name) {
                    used.push((number, name));
                }
            }
        }
        used
    }

    /// The items of `a::{b, c}, d}…` up to the brace that closes the list.
    fn top_level(group: &str) -> Vec<&str> {
        let (mut depth, mut start, mut items) = (0, 0, Vec::new());
        for (at, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => {
                    items.push(&group[start..at]);
                    break;
                }
                '}' => depth -= 1,
                ',' if depth == 0 => {
                    items.push(&group[start..at]);
                    start = at + 1;
                }
                _ => {}
            }
        }
        items
    }

    fn rust_files(dir: &Path) -> Vec<PathBuf> {
        let mut files = Vec::new();
        for path in fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()) {
            if path.is_dir() {
                files.extend(rust_files(&path));
            } else if path.extension().is_some_and(|e| e == "rs") {
                files.push(path);
            }
        }
        files
    }
}
