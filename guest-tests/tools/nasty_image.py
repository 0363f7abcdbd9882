"""An image that is nasty on purpose: every oddity that layers of real images have had, in every dialect of tar.

GNU tar and Python's tarfile write what they can; the rest is made of raw headers. Some of it umoci can
not unpack: hard links that come before their target, a path longer than PATH_MAX, sparse files of GNU's old format,
contiguous files, global records. So it is shown the same image with these links behind their targets, with the sparse files in full,
and without the rest; the path is then made in its tree directory by directory.
"""
import os
import random
import re
import shutil
import subprocess
import tarfile

from oci_layout import EPOCH, Layout, clamp_times, gnu_tar

HUGE = 10_000  # names in one directory
MIB = 1 << 20
BIG_UID, BIG_GID = 3_000_000, 4_000_000_000  # octal fields end at 2,097,151
# 17 levels come to less than PATH_MAX, with room for the directory that it is unpacked in; 25 to more.
LEVEL = b"level-" + b"l" * 190
DEEP, TOO_DEEP = 17, 25


def noise(seed, size):
    return random.Random(seed).randbytes(size)


#--- trees that GNU tar packs ----------------------------------------------------------------------

class Tree:
    def __init__(self, path):
        self.root = os.fsencode(path)
        os.makedirs(self.root)

    def path(self, name):
        name = name if isinstance(name, bytes) else name.encode()
        return os.path.join(self.root, b"nasty", name)

    def dir(self, name, mode=0o755):
        os.makedirs(self.path(name), exist_ok=True)
        os.chmod(self.path(name), mode)

    def file(self, name, content=b"", mode=0o644):
        os.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
        with open(self.path(name), "wb") as file:
            file.write(content)
        os.chmod(self.path(name), mode)

    def sparse(self, name, size, pieces):
        with open(self.path(name), "wb") as file:
            file.truncate(size)
            for offset, data in pieces:
                file.seek(offset)
                file.write(data)

    def finish(self):
        clamp_times(self.root)


def gnu_layer(scratch, target):
    """GNU format: long names, numbers in base 256, sparse files with continued maps."""
    tree = Tree(os.path.join(scratch, "gnu"))
    for number in range(HUGE):
        tree.file(f"huge/entry-with-a-longer-name-{number:05}", b"%d\n" % (number % 50))
    for number in range(8):
        tree.file(f"noise/part-{number}", noise(number, 8 * MIB))
    for name in [b"space ", b" and 'quotes\"", b"new\nline", b"tab\tand \\", b"\\n", b"not UTF-8 \xff\xfe\x80", b"...",
                 b"-n", b".wha", b"wh.", b"n" * 255, "größe".encode(), b"\x01\x7f"]:
        tree.file(b"names/" + name, name)
        tree.dir(b"names of directories/" + name)
    path = b"deep"
    for level in range(DEEP):
        path += b"/" + LEVEL
        tree.dir(path)
    tree.file(path + b"/bottom", b"bottom\n")
    tree.file("links/a", b"two names in one layer\n" * 500)
    os.link(tree.path("links/a"), tree.path("links/b"))
    tree.file("links/lower-1", b"one of two will be overwritten\n" * 500)
    os.link(tree.path("links/lower-1"), tree.path("links/lower-2"))
    tree.file("links/moved", b"known by another name above\n" * 500)
    os.symlink("t" * 4000, tree.path("links/longest"))
    os.symlink("not there", tree.path("links/dangling"))
    tree.dir("devices")
    os.mkfifo(tree.path("devices/fifo"), 0o640)
    os.mknod(tree.path("devices/character"), 0o020600, os.makedev(259, 70_000))
    os.mknod(tree.path("devices/block"), 0o060660, os.makedev(7, 1))
    for name, mode in [("setuid", 0o4755), ("setgid", 0o2750), ("sticky", 0o1644), ("none", 0)]:
        tree.file("modes/" + name, name.encode(), mode)
    tree.dir("modes/sticky directory", 0o1777)
    tree.dir("sparse")
    # With more pieces than the header holds, and than a block behind it does.
    tree.sparse("sparse/gnu", 6 * MIB + 5, [(at * 65536, noise(at, 3000)) for at in range(0, 96, 2)])
    tree.sparse("sparse/only a hole", 70_000, [])
    for number in range(60):
        tree.file(f"over/file-{number:02}", b"lower %d\n" % number * 100)
    for name in ["opaque/old", "opaque/sub/old", "opaque-unsaid/sub/old", "gone/with/all/levels", "gone/file",
                 "renewed/old", "renewed/sub/old"]:
        tree.file(name, name.encode())
    tree.file("swap/file-directory-file", b"first\n")
    tree.file("swap/directory-file-directory/child", b"first\n")
    tree.file("swap/link-directory", b"")
    os.remove(tree.path("swap/link-directory"))
    os.symlink("../over", tree.path("swap/link-directory"))
    tree.file("owners/beyond octal", b"owned")
    tree.file("times/before 1970", b"old")
    tree.file("times/after 2038", b"new")
    tree.finish()
    os.chown(tree.path("owners/beyond octal"), BIG_UID, BIG_GID)
    os.utime(tree.path("times/before 1970"), (-1500, -1500))
    os.utime(tree.path("times/after 2038"), (4_102_444_800, 4_102_444_800))
    gnu_tar(tree.root, target, "--format=gnu", "--sparse")
    gnu_tar(tree.root, target + ".plain", "--format=gnu")


def posix_layers(scratch, target):
    """PAX by GNU tar: attributes, times to the nanosecond, sparse files of formats 0.0, 0.1 and 1.0."""
    tree = Tree(os.path.join(scratch, "posix"))
    long = "pax/" + "a long directory name " * 8 + "/" + "and a long file name " * 9
    tree.file(long, b"long")
    for number in range(8, 16):
        tree.file(f"noise/part-{number}", noise(number, 8 * MIB))
    tree.file("noise/copy of part-0", noise(0, 8 * MIB))
    tree.file("pax/attributes", b"attributes")
    tree.file("pax/capable", b"#!/bin/true\n", 0o755)
    tree.dir("pax/directory")
    tree.file("pax/nanoseconds", b"precise")
    tree.file("owners/of PAX", b"owned")
    for number in range(0, 60, 3):
        tree.file(f"over/file-{number:02}", b"upper %d\n" % number * 70, 0o600)
    tree.file("links/lower-1", b"overwritten\n" * 300)
    tree.file("swap/file-directory-file/child", b"second\n")
    tree.file("swap/directory-file-directory", b"second\n")
    tree.file("swap/link-directory/child", b"second\n")
    tree.finish()
    # None is empty: a PAX record without a value takes back what an earlier one said, to some readers.
    for name, value in [("user.binary", b"\0\n=\xff 5\n" * 9), ("user.long", noise(99, 1500)),
                        ("trusted.name", b"value"), ("user.of a name with =", b"=")]:
        os.setxattr(tree.path("pax/attributes"), name, value)
    os.setxattr(tree.path("pax/directory"), "user.directory", b"\n")
    # cap_net_raw+ep, as the kernel stores it.
    os.setxattr(tree.path("pax/capable"), "security.capability",
                b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0")
    os.chown(tree.path("owners/of PAX"), BIG_UID + 1, BIG_GID + 1)
    os.utime(tree.path("pax/nanoseconds"), ns=(1_700_000_000_123_456_789,) * 2)
    options = ["--format=posix", "--xattrs", "--xattrs-include=*", "--pax-option=delete=atime,delete=ctime"]
    members = []
    gnu_tar(tree.root, target, *options)
    with open(target, "rb") as file:
        members.append(without_end(file.read()))
    # A tree for each format of sparse files, as one call of GNU tar writes one.
    for version in ["0.0", "0.1", "1.0"]:
        part = Tree(os.path.join(scratch, "sparse-" + version))
        part.dir("sparse")
        part.sparse("sparse/format " + version, 2 * MIB + 7,
                    [(at * 40_960 + 100, noise(at, 2000)) for at in range(40)])
        if version == "1.0":
            part.sparse("sparse/more than 2 GiB", (2 << 30) + MIB,
                        [(5, b"start"), (1 << 30, noise(7, MIB)), ((2 << 30) + MIB - 3, b"end")])
        part.finish()
        gnu_tar(part.root, target, *options, "--sparse", "--sparse-version=" + version)
        with open(target, "rb") as file:
            members.append(without_end(without_process_number(file.read())))
    with open(target, "wb") as file:
        file.write(b"".join(members) + END)


#--- raw headers -----------------------------------------------------------------------------------

END = bytes(10_240)


def without_end(tar):
    """A tar without the zeros at its end; nothing in it may end in a block of zeros."""
    return tar[:(len(tar.rstrip(b"\0")) + 511) // 512 * 512]


def without_process_number(tar):
    """GNU tar names a sparse file of PAX after itself in its header; the true name is in the records."""
    out = bytearray(tar)
    for found in re.finditer(rb"GNUSparseFile\.\d+/", tar):
        start = found.start() // 512 * 512
        block = bytearray(tar[start:start + 512])
        block[:100] = re.sub(rb"\.\d+/", b".0/", bytes(block[:100]), count=1).ljust(100, b"\0")
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        out[start:start + 512] = block
    return bytes(out)


def header(name, kind, size=0, mode=0o644, uid=0, gid=0, mtime=EPOCH, link=b"", magic=b"ustar\x0000", device=(0, 0),
           prefix=b""):
    block = bytearray(512)

    def put(at, length, value):
        assert len(value) <= length, (name, value)
        block[at:at + len(value)] = value
    put(0, 100, name)
    put(100, 8, b"%07o\0" % mode)
    put(108, 8, b"%07o\0" % uid)
    put(116, 8, b"%07o\0" % gid)
    put(124, 12, b"%011o\0" % size)
    put(136, 12, b"%011o\0" % mtime)
    put(148, 8, b" " * 8)
    put(156, 1, kind)
    put(157, 100, link)
    if magic:
        put(257, 8, magic)
        put(329, 8, b"%07o\0" % device[0])
        put(337, 8, b"%07o\0" % device[1])
        put(345, 155, prefix)
    put(148, 8, b"%06o\0 " % sum(block))
    return bytes(block)


def member(name, kind, data=b"", **fields):
    return header(name, kind, len(data), **fields) + data + bytes(-len(data) % 512)


def file(name, data, **fields):
    return member(name, b"0", data, **fields)


def directory(name, **fields):
    return member(name, b"5", mode=fields.pop("mode", 0o755), **fields)


def hard_link(name, target):
    return member(name, b"1", link=target)


def whiteout(directory, name):
    return file(directory + b".wh." + name, b"")


def opaque(directory):
    return file(directory + b".wh..wh..opq", b"")


def pax(records, kind=b"x"):
    data = b""
    for key, value in records:
        text = b" %s=%s\n" % (key, value)
        length = len(text)
        while len(b"%d" % length) + len(text) != length:
            length = len(b"%d" % length) + len(text)
        data += b"%d%s" % (length, text)
    return member(b"PaxHeader", kind, data)


def gnu_long(name, kind=b"L"):
    return member(b"././@LongLink", kind, name + b"\0", magic=b"ustar  \0")


def raw_layer(in_order):
    """What no packer writes today, and what deletes; with `in_order`, as umoci can unpack it."""
    out = [] if in_order else [pax([(b"comment", b"a global record, as git archive writes it")], b"g")]
    # Dialects.
    out += [
        member(b"nasty/v7/", b"\0", mode=0o755, magic=b""),
        member(b"nasty/v7/file", b"\0", b"of 1979\n", magic=b""),
        directory(b"nasty/ustar/"),
        directory(b"d" * 60, prefix=b"nasty/ustar"),
        file(b"f" * 90, b"split over two fields\n", prefix=b"nasty/ustar/" + b"d" * 60),
        member(b"nasty/ustar/contiguous", b"0" if in_order else b"7", b"contiguous\n"),
        file(b"./nasty/ustar/dotted", b"starts with a dot\n"),
        file(b"/nasty/ustar/absolute", b"starts with a slash\n"),
        file(b"nasty//ustar///slashes", b"has too many slashes\n"),
        member(b"nasty/ustar/fifo", b"6", mode=0o600),
        member(b"nasty/ustar/character", b"3", device=(5, 1)),
        member(b"nasty/ustar/block", b"4", device=(8, 17)),
        gnu_long(b"nasty/ustar/" + b"g" * 200), file(b"nasty/ustar/short", b"named before\n", magic=b"ustar  \0"),
        gnu_long(b"x" * 300, b"K"), gnu_long(b"nasty/ustar/" + b"k" * 200),
        member(b"short", b"2", link=b"short", magic=b"ustar  \0", mode=0o777),
        directory(b"nasty/records/"),
        pax([(b"path", b"nasty/records/\xff\xfe not UTF-8"), (b"hdrcharset", b"BINARY"),
             (b"mtime", b"1700000000.987654321"), (b"uid", b"%d" % BIG_UID), (b"gid", b"%d" % BIG_GID),
             (b"size", b"5"), (b"SCHILY.xattr.user.newline", b"a\nb"), (b"VENDOR.unknown", b"ignored")]),
        header(b"nasty/records/x", b"0", 0) + b"12345" + bytes(507),
        pax([(b"mtime", b"1.5"), (b"linkpath", b"y" * 500)]),
        member(b"nasty/records/link", b"2", link=b"x", mode=0o777),
    ]
    # The same name twice: the last counts, but a link made in between keeps what it was made of.
    out += [
        directory(b"nasty/twice/"),
        file(b"nasty/twice/file", b"first\n" * 50), hard_link(b"nasty/twice/link to the first", b"nasty/twice/file"),
        file(b"nasty/twice/file", b"second\n" * 70, mode=0o600),
        directory(b"nasty/twice/directory/"), file(b"nasty/twice/directory/child", b"stays\n"),
        directory(b"nasty/twice/directory/", mode=0o700),
        file(b"nasty/twice/changing", b"a file\n"), directory(b"nasty/twice/changing/"),
        file(b"nasty/twice/changing/child", b"goes\n"), file(b"nasty/twice/changing", b"a file again\n"),
        member(b"nasty/twice/symlink", b"2", link=b"changing", mode=0o777), file(b"nasty/twice/symlink", b"a file\n"),
    ]
    # Links to lower layers; one's target is then deleted, one's has another name whose content was replaced.
    out += [
        hard_link(b"nasty/links/from above", b"nasty/links/a"),
        hard_link(b"nasty/links/of lower-2", b"./nasty/links/lower-2"),
        hard_link(b"nasty/links/new name", b"/nasty/links/moved"), whiteout(b"nasty/links/", b"moved"),
    ]
    # Links to files that come later, and to such links.
    out.append(directory(b"nasty/later/"))
    links = [hard_link(b"nasty/later/1", b"nasty/later/target"), hard_link(b"nasty/later/2", b"nasty/later/1"),
             hard_link(b"nasty/0 later", b"nasty/later/target")]
    target = [file(b"nasty/later/target", b"comes last\n" * 1000, mode=0o640, uid=7)]
    out += target + links if in_order else links + target
    # Deletions.
    out += [
        whiteout(b"nasty/", b"gone"), whiteout(b"nasty/", b"never there"),
        *(whiteout(b"nasty/over/", b"file-%02d" % number) for number in range(1, 60, 5)),
        directory(b"nasty/opaque/"), file(b"nasty/opaque/before the marker", b"new\n"), opaque(b"nasty/opaque/"),
        file(b"nasty/opaque/behind the marker", b"new\n"),
        opaque(b"nasty/opaque-unsaid/sub/"),
        whiteout(b"nasty/", b"renewed"), directory(b"nasty/renewed/", mode=0o711),
        file(b"nasty/renewed/new", b"new\n"),
    ]
    if not in_order:
        path = b"nasty/too deep"
        out.append(directory(path + b"/"))
        for _ in range(TOO_DEEP):
            path += b"/" + LEVEL
            out += [pax([(b"path", path + b"/")]), directory(path[:99])]
        out += [pax([(b"path", path + b"/bottom")]), file(b"nasty/too deep/bottom", b"bottom\n")]
    return b"".join(out) + END


def make_too_deep(tree):
    """What umoci was not shown: directories deeper than a path can name."""
    here = os.open(os.path.join(tree, "nasty"), os.O_RDONLY)
    made = []
    for name in [b"too deep"] + [LEVEL] * TOO_DEEP:
        os.mkdir(name, 0o755, dir_fd=here)
        made.append((here, name))
        here = os.open(name, os.O_RDONLY, dir_fd=here)
    bottom = os.open(b"bottom", os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=here)
    os.write(bottom, b"bottom\n")
    os.utime(bottom, (EPOCH, EPOCH))
    os.close(bottom)
    for parent, name in reversed(made):
        os.utime(name, (EPOCH, EPOCH), dir_fd=parent)
        os.close(here)
        here = parent
    os.utime(here, (EPOCH, EPOCH))
    os.close(here)


def last_layer(target):
    """By tarfile, without an end: files are directories again and the other way round."""
    with tarfile.open(target, "w", format=tarfile.GNU_FORMAT) as tar:
        def add(name, data=None):
            info = tarfile.TarInfo("nasty/" + name)
            info.mtime, info.mode = EPOCH, 0o755 if data is None else 0o644
            if data is None:
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
                return
            info.size = len(data)
            with open(scratch_file(target, data), "rb") as source:
                tar.addfile(info, source)
        add("swap/file-directory-file", b"third\n")
        add("swap/directory-file-directory")
        add("swap/directory-file-directory/child", b"third\n")
        for number in range(0, HUGE, 100):
            add(f"huge/entry-with-a-longer-name-{number:05}", b"overwritten %d\n" % number)
        for number in range(1, HUGE, 1000):
            add(f"huge/.wh.entry-with-a-longer-name-{number:05}", b"")
            add(f"huge/entry-in-place-of-{number:05}", b"new\n")
    with open(target, "rb") as file:
        members = without_end(file.read())
    with open(target, "wb") as file:
        file.write(members)


def scratch_file(target, data):
    path = target + ".data"
    with open(path, "wb") as file:
        file.write(data)
    return path


#--- the image -------------------------------------------------------------------------------------

def make(out, args):
    top = os.path.join(out, "nasty")
    scratch, tar = os.path.join(top, "scratch"), os.path.join(top, "layer.tar")
    os.makedirs(scratch)
    layout = Layout(os.path.join(top, "layout"))
    plain = Layout(os.path.join(top, "plain"))

    def add(created_by):
        if not os.path.exists(tar + ".plain"):
            os.link(tar, tar + ".plain")
        plain.add_layer(tar + ".plain", created_by, "none")
        layout.add_layer(tar, created_by, "zstd")

    base = os.path.join(scratch, "base")
    subprocess.run(["cp", "-a", args.rootfs, base], check=True)
    for name in ("lastlog", "wtmp", "btmp"):
        os.truncate(os.path.join(base, "var/log", name), 0)
    os.remove(os.path.join(base, "var/cache/ldconfig/aux-cache"))
    os.mkdir(os.path.join(base, "nasty"))
    clamp_times(base)
    gnu_tar(base, tar, "--format=posix", "--pax-option=delete=atime,delete=ctime")
    add("debootstrap")
    gnu_layer(scratch, tar)
    add("GNU tar, GNU format")
    posix_layers(scratch, tar)
    add("GNU tar, PAX format")
    with open(tar, "wb") as file:
        file.write(END)
    add("nothing")
    for name, in_order in [(tar, False), (tar + ".plain", True)]:
        with open(name, "wb") as file:
            file.write(raw_layer(in_order))
    add("raw headers")
    last_layer(tar)
    add("tarfile")
    os.remove(tar + ".data")

    config = {"Cmd": ["/bin/sh"], "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"], "Volumes": {"/nasty/v7": {}}}
    layout.finish("latest", config)
    plain.finish("latest", config)
    tree = os.path.join(top, "tree")
    subprocess.run([args.umoci, "raw", "unpack", "--image", plain.path + ":latest", tree], check=True)
    big = os.path.join(tree, "nasty/sparse/more than 2 GiB")
    subprocess.run(["fallocate", "--dig-holes", big], check=True)
    os.utime(big, (EPOCH, EPOCH))
    make_too_deep(tree)
    shutil.rmtree(scratch)
    shutil.rmtree(plain.path)
