//! Writes tar streams for tests, byte by byte, with nothing of the reader.

/// A tar that grows.
#[derive(Clone, Default)]
pub(super) struct Tar(Vec<u8>);

/// One entry; what is not set is root's, mode 0644, time 0.
#[derive(Clone)]
pub(super) struct Item<'a> {
    pub kind: u8,
    pub path: &'a [u8],
    pub link: &'a [u8],
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: u64,
    pub dev: (u32, u32),
    pub data: &'a [u8],
    /// PAX records.
    pub pax: Vec<(&'a [u8], Vec<u8>)>,
}

impl<'a> Item<'a> {
    pub(super) fn new(kind: u8, path: &'a str) -> Item<'a> {
        Item {
            kind,
            path: path.as_bytes(),
            link: b"",
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: 0,
            dev: (0, 0),
            data: b"",
            pax: Vec::new(),
        }
    }

    pub(super) fn file(path: &'a str, data: &'a [u8]) -> Item<'a> {
        Item { data, ..Item::new(b'0', path) }
    }

    pub(super) fn dir(path: &'a str) -> Item<'a> {
        Item { mode: 0o755, ..Item::new(b'5', path) }
    }

    pub(super) fn link(path: &'a str, to: &'a str) -> Item<'a> {
        Item { link: to.as_bytes(), ..Item::new(b'1', path) }
    }

    pub(super) fn symlink(path: &'a str, to: &'a str) -> Item<'a> {
        Item { link: to.as_bytes(), mode: 0o777, ..Item::new(b'2', path) }
    }

    pub(super) fn pax(mut self, key: &'a [u8], value: &[u8]) -> Item<'a> {
        self.pax.push((key, value.to_vec()));
        self
    }
}

/// A header whose checksum is right.
pub(super) fn header(item: &Item<'_>, size: usize) -> [u8; 512] {
    let mut header = [0; 512];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &item.path[..item.path.len().min(100)]);
    put(100, format!("{:07o}", item.mode).as_bytes());
    put(108, format!("{:07o}", item.uid & 0o7777777).as_bytes());
    put(116, format!("{:07o}", item.gid & 0o7777777).as_bytes());
    put(124, format!("{size:011o}").as_bytes());
    put(136, format!("{:011o}", item.mtime).as_bytes());
    put(156, &[item.kind]);
    put(157, &item.link[..item.link.len().min(100)]);
    put(257, b"ustar\x0000");
    put(329, format!("{:07o}", item.dev.0).as_bytes());
    put(337, format!("{:07o}", item.dev.1).as_bytes());
    seal(&mut header);
    header
}

/// Sets the checksum.
pub(super) fn seal(header: &mut [u8; 512]) {
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|&b| u32::from(b)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// `LENGTH KEY=VALUE\n`.
pub(super) fn record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut len = rest + 1;
    while len != rest + len.to_string().len() {
        len = rest + len.to_string().len();
    }
    [len.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
}

impl Tar {
    pub(super) fn of(items: &[Item<'_>]) -> Vec<u8> {
        let mut tar = Tar::default();
        for item in items {
            tar.add(item);
        }
        tar.finish()
    }

    pub(super) fn add(&mut self, item: &Item<'_>) {
        let mut records: Vec<u8> =
            item.pax.iter().flat_map(|(key, value)| record(key, value)).collect();
        for (key, value) in [(&b"path"[..], item.path), (b"linkpath", item.link)] {
            if value.len() > 100 {
                records.extend(record(key, value));
            }
        }
        if item.uid > 0o7777777 {
            records.extend(record(b"uid", item.uid.to_string().as_bytes()));
        }
        if !records.is_empty() {
            self.raw(&header(&Item::new(b'x', "pax"), records.len()), &records);
        }
        self.raw(&header(item, item.data.len()), item.data);
    }

    /// A header and what follows it, padded.
    pub(super) fn raw(&mut self, header: &[u8; 512], data: &[u8]) {
        self.0.extend(header);
        self.0.extend(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
    }

    pub(super) fn finish(mut self) -> Vec<u8> {
        self.0.extend([0; 1024]);
        self.0
    }
}
