"""OCI image layouts and their layers, as the recipes of the realistic images make them (make_images.py).

A tree on disk changes step by step, and after each step what changed becomes a layer: `Snapshot` notes what
a tree looks like, `write_difference` writes the tar, `Layout` puts tars, configuration and manifest together.
The same trees give the same bytes: names are sorted, and no time is later than EPOCH.
"""
import gzip
import hashlib
import json
import os
import stat
import subprocess
import tarfile

# 2026-01-01T00:00:00Z. What a step makes has this time instead of that of the clock.
EPOCH = 1767225600
CREATED = "2026-01-01T00:00:00Z"

WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def xattrs_of(path):
    return {name: os.getxattr(path, name, follow_symlinks=False)
            for name in os.listxattr(path, follow_symlinks=False)}


def walk(root):
    """All paths below a directory, in bytes and without a leading slash; parents come first."""
    todo = [b""]
    while todo:
        below = todo.pop()
        names = sorted(os.listdir(os.path.join(root, below)))
        for name in names:
            yield os.path.join(below, name)
        for name in reversed(names):
            path = os.path.join(below, name)
            if stat.S_ISDIR(os.lstat(os.path.join(root, path)).st_mode):
                todo.append(path)


class Snapshot:
    """What is at every path of a tree: `entries` by path, and the inode and change time of each file, so
    that the next snapshot reads only what may have changed.

    The last field of an entry is, for all names of a file but one, that one: a name that it had before, if
    there is one, so that a new name can be a link to a file of the layers below."""

    def __init__(self, root, before=None):
        self.root = os.fsencode(root)
        self.entries = {}
        self.seen = {}
        files = {}
        for path in walk(self.root):
            full = os.path.join(self.root, path)
            info = os.lstat(full)
            seen = (info.st_ino, info.st_ctime_ns)
            self.seen[path] = seen
            if stat.S_ISREG(info.st_mode) and info.st_nlink > 1:
                files.setdefault(info.st_ino, []).append(path)
            if before and before.seen.get(path) == seen:
                self.entries[path] = before.entries[path][:-1] + (None,)
                continue
            content = None
            if stat.S_ISREG(info.st_mode):
                content = sha256_of(full)
            elif stat.S_ISLNK(info.st_mode):
                content = os.readlink(full)
            device = info.st_rdev if stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode) else None
            size = None if stat.S_ISDIR(info.st_mode) else info.st_size
            self.entries[path] = (info.st_mode, info.st_uid, info.st_gid, size, info.st_mtime_ns, device,
                                  content, tuple(sorted(xattrs_of(full).items())), None)
        for inode, names in files.items():
            old = [name for name in names if before and before.seen.get(name, (None,))[0] == inode
                   and before.entries[name][-1] is None]
            first = min(old or names)
            for name in names:
                if name != first:
                    self.entries[name] = self.entries[name][:-1] + (first,)

    def described(self):
        """The entries in a form that does not depend on the snapshots before."""
        groups = {}
        for path, entry in self.entries.items():
            groups.setdefault(entry[-1] or path, []).append(path)
        return {path: self.entries[path][:-1] + (min(group),) for group in groups.values() for path in group}


def clamp_times(root):
    """No time in a tree is later than EPOCH: what the step before made gets exactly that."""
    root = os.fsencode(root)
    for path in [b"", *walk(root)]:
        full = os.path.join(root, path)
        if os.lstat(full).st_mtime > EPOCH:
            os.utime(full, (EPOCH, EPOCH), follow_symlinks=False)


def write_difference(before, after, target, opaque=()):
    """Writes what changed between two snapshots of a tree as a PAX tar: removed names as whiteouts, and each
    directory of `opaque` as an opaque one with all that it holds."""
    opaque = {os.fsencode(path) for path in opaque}

    def below_opaque(path):
        while path := os.path.dirname(path):
            if path in opaque:
                return True
        return False

    written = {}  # inode: the name it has in this layer or the layers below
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as tar:
        # A name that was there before and still is the same is what other names may be linked to.
        for path, entry in after.entries.items():
            if before.entries.get(path) == entry and not below_opaque(path):
                written.setdefault(after.seen[path][0], path)
        for path in opaque:
            assert stat.S_ISDIR(after.entries[path][0]), path
        gone = sorted(path for path in before.entries if path not in after.entries)
        for path in gone:
            parent = os.path.dirname(path)
            # A whiteout of a directory stands for all that was in it; so does a file in its place.
            if parent in after.entries and not stat.S_ISDIR(after.entries[parent][0]):
                continue
            if (parent == b"" or parent in after.entries) and parent not in opaque and not below_opaque(path):
                add_marker(tar, os.path.join(parent, WHITEOUT + os.path.basename(path)))
        for path in sorted(after.entries):
            inside = below_opaque(path)
            if before.entries.get(path) != after.entries[path] or inside or path in opaque:
                add_path(tar, after, path, written)
            if path in opaque:
                add_marker(tar, os.path.join(path, OPAQUE))


def text_of(path):
    """Bytes as tarfile wants them."""
    return os.fsdecode(path)


def add_marker(tar, path):
    info = tarfile.TarInfo(text_of(path))
    info.mode, info.mtime = 0o644, EPOCH
    tar.addfile(info)


def add_path(tar, snapshot, path, written):
    mode, uid, gid, size, mtime_ns, device, content, xattrs, _ = snapshot.entries[path]
    info = tarfile.TarInfo(text_of(path))
    info.mode, info.uid, info.gid = stat.S_IMODE(mode), uid, gid
    # tarfile writes a record for a time that is no integer, but as a float, which has too few digits.
    seconds, fraction = divmod(mtime_ns, 10**9)
    info.mtime = seconds
    if fraction:
        info.pax_headers["mtime"] = f"{seconds}.{fraction:09}"
    for name, value in xattrs:
        info.pax_headers["SCHILY.xattr." + name] = value.decode("utf-8", "surrogateescape")
    inode = snapshot.seen[path][0]
    if stat.S_ISREG(mode):
        first = written.setdefault(inode, path)
        if first != path:
            info.type, info.linkname = tarfile.LNKTYPE, text_of(first)
            info.pax_headers = {}
            tar.addfile(info)
            return
        info.size = size
        with open(os.path.join(snapshot.root, path), "rb") as file:
            tar.addfile(info, file)
        return
    if stat.S_ISDIR(mode):
        info.type = tarfile.DIRTYPE
    elif stat.S_ISLNK(mode):
        info.type, info.linkname = tarfile.SYMTYPE, text_of(content)
    elif stat.S_ISFIFO(mode):
        info.type = tarfile.FIFOTYPE
    elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        info.type = tarfile.CHRTYPE if stat.S_ISCHR(mode) else tarfile.BLKTYPE
        info.devmajor, info.devminor = os.major(device), os.minor(device)
    else:
        return  # sockets are not archived
    tar.addfile(info)


def gnu_tar(tree, target, *options):
    """All of a tree by GNU tar."""
    subprocess.run(["tar", "--create", "--file", target, "--directory", tree, "--sort=name", "--numeric-owner",
                    *options, "."], check=True)


class Layout:
    """An OCI image layout with one image."""

    def __init__(self, path):
        self.path = path
        self.layers, self.diff_ids, self.history = [], [], []
        os.makedirs(os.path.join(path, "blobs/sha256"))
        with open(os.path.join(path, "oci-layout"), "w") as file:
            file.write('{"imageLayoutVersion":"1.0.0"}')

    def blob(self, digest):
        return os.path.join(self.path, "blobs/sha256", digest)

    def add_layer(self, tar, created_by, compression="gzip"):
        """A layer of the bytes of a tar file: `gzip`, `zstd` or `none`."""
        packed = tar + ".packed"
        kind = "application/vnd.oci.image.layer.v1.tar"
        if compression == "gzip":
            kind += "+gzip"
            with open(tar, "rb") as plain, open(packed, "wb") as raw:
                with gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
                    while block := plain.read(1 << 20):
                        file.write(block)
        elif compression == "zstd":
            kind += "+zstd"
            subprocess.run(["zstd", "--quiet", "--force", "-3", "--single-thread", tar, "-o", packed], check=True)
        else:
            os.link(tar, packed)
        self.diff_ids.append("sha256:" + sha256_of(tar))
        self.layers.append(self.add_file(packed, kind))
        self.history.append({"created": CREATED, "created_by": created_by})
        os.remove(tar)

    def add_file(self, path, kind):
        """Moves a file among the blobs; its descriptor."""
        digest = sha256_of(path)
        size = os.path.getsize(path)
        os.replace(path, self.blob(digest))
        return {"mediaType": kind, "digest": "sha256:" + digest, "size": size}

    def add_json(self, value, kind):
        path = os.path.join(self.path, "new")
        with open(path, "w") as file:
            json.dump(value, file, separators=(",", ":"), sort_keys=True)
        return self.add_file(path, kind)

    def finish(self, tag, config=None):
        """Writes configuration, manifest and index. May be called again after more layers."""
        described = self.add_json({
            "architecture": "amd64",
            "os": "linux",
            "created": CREATED,
            "config": config or {},
            "rootfs": {"type": "layers", "diff_ids": self.diff_ids},
            "history": self.history,
        }, "application/vnd.oci.image.config.v1+json")
        manifest = self.add_json({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": described,
            "layers": self.layers,
        }, "application/vnd.oci.image.manifest.v1+json")
        manifest["annotations"] = {"org.opencontainers.image.ref.name": tag}
        with open(os.path.join(self.path, "index.json"), "w") as file:
            json.dump({"schemaVersion": 2, "manifests": [manifest]}, file)

    def load(self):
        """Takes over what another program added to the layout."""
        with open(os.path.join(self.path, "index.json")) as file:
            [entry] = json.load(file)["manifests"]

        def blob(descriptor):
            with open(self.blob(descriptor["digest"].removeprefix("sha256:"))) as file:
                return json.load(file)
        manifest = blob(entry)
        config = blob(manifest["config"])
        self.layers = manifest["layers"]
        self.diff_ids = config["rootfs"]["diff_ids"]
        self.history = config["history"]
