#!/usr/bin/env python3
"""Makes the realistic images that the registry tests convert: scripts/parts images.

usage: make_images.py --rootfs DIR --umoci PROGRAM --debs DIR --out DIR [NAME...]

For each NAME (python, node, nasty; all without one) OUT/NAME/layout is an OCI layout with the tag `latest`, and
OUT/NAME/tree is what umoci, which shares no code with us, unpacks of it. Needs root, and for `python` and `node`
the registries of their packages. DEBS/python and DEBS/node have the packages to install.
"""
import argparse
import os
import shutil
import subprocess

import nasty_image
from oci_layout import CREATED, EPOCH, Layout, Snapshot, clamp_times, gnu_tar, write_difference

# Exact, so that the images change only when this does; what these depend on may be newer each time.
WHEELS_FIRST = ["numpy==2.2.0", "pandas==2.2.3", "django==5.1.4", "requests==2.32.3"]
WHEELS_LATER = ["numpy==2.2.6", "django==5.1.9"]
NPM_FIRST = ["express@4.19.2", "typescript@5.4.5", "lodash@4.17.20", "date-fns@3.6.0", "webpack@5.91.0",
             "three@0.160.0", "core-js@3.36.0"]
NPM_LATER = ["express@4.21.2", "typescript@5.6.3", "lodash@4.17.21"]

APP_USER = 1000
APT_CACHES = ["var/cache/apt/pkgcache.bin", "var/cache/apt/srcpkgcache.bin"]


def run(*command, **options):
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, **options)


def remove(tree, *paths):
    for path in paths:
        full = os.path.join(tree, path)
        if os.path.isdir(full) and not os.path.islink(full):
            shutil.rmtree(full)
        elif os.path.lexists(full):
            os.remove(full)


def write(tree, path, text, mode=0o644):
    full = os.path.join(tree, path)
    os.makedirs(os.path.dirname(full), exist_ok=True)
    with open(full, "w") as file:
        file.write(text)
    os.chmod(full, mode)


# Runs a program of a tree, whose mounts end with their name space. Nothing of this machine can be written
# to: the certificates are mounted read-only, and only for programs that need the network.
CHROOT = """
    mount -t proc proc "$0/proc" && mount -t tmpfs tmpfs "$0/tmp" || exit
    if test "$1" = network; then
        mount --bind "$(readlink -f /etc/resolv.conf)" "$0/etc/resolv.conf" &&
            mount -o remount,bind,ro "$0/etc/resolv.conf" || exit
        if test -d /etc/ssl/certs; then
            mount --bind /etc/ssl/certs "$0/etc/ssl/certs" && mount -o remount,bind,ro "$0/etc/ssl/certs" || exit
        fi
    fi
    shift
    exec chroot "$0" /bin/sh -c 'cd "$0" && exec "$@"' "$@"
"""


def share(tree, chosen):
    """Makes one file of those with the same bytes, as image squashers do."""
    known = {}
    for directory, _, files in sorted(os.walk(tree)):
        for name in sorted(filter(chosen, files)):
            full = os.path.join(directory, name)
            if not os.path.islink(full):
                with open(full, "rb") as file:
                    first = known.setdefault(file.read(), full)
                if first != full:
                    os.remove(full)
                    os.link(first, full)


def chroot(tree, *command, directory="/", network=False):
    """Runs a program of the tree."""
    # How to reach the registries of packages may be said in variables.
    environment = {name: value for name, value in os.environ.items()
                   if network and name not in ("TMPDIR", "XDG_CACHE_HOME")}
    environment.update(
        PATH="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", HOME="/tmp", LC_ALL="C.UTF-8",
        DEBIAN_FRONTEND="noninteractive",
        SOURCE_DATE_EPOCH=str(EPOCH),  # bytecode then names its source by hash, not by time
        PIP_ROOT_USER_ACTION="ignore", PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_CACHE_DIR="1",
        npm_config_cache="/tmp/npm", npm_config_update_notifier="false", npm_config_fund="false",
        npm_config_audit="false")
    resolver = os.path.join(tree, "etc/resolv.conf")
    open(resolver, "w").close()
    run("unshare", "--mount", "--propagation", "private", "sh", "-c", CHROOT, tree,
        "network" if network else "alone", directory, *command, env=environment)
    os.remove(resolver)


def install(tree, debs, wanted):
    """Installs the Debian packages `wanted`, which were downloaded with all that they depend on."""
    target = os.path.join(tree, "var/cache/debs")
    shutil.copytree(debs, target)
    chroot(tree, "sh", "-c", "apt-get -q -y -o DPkg::Options::=--force-unsafe-io install /var/cache/debs/*.deb")
    names = {name.split("_")[0] for name in os.listdir(debs)}
    chroot(tree, "apt-mark", "auto", *sorted(names - set(wanted)))
    remove(tree, "var/cache/debs", *APT_CACHES)


class Image:
    """An image in the making: its layout, and the tree as it is after the last layer."""

    def __init__(self, out, name, args):
        self.dir = os.path.join(out, name)
        os.makedirs(self.dir)
        self.layout = Layout(os.path.join(self.dir, "layout"))
        self.reference = self.layout.path + ":latest"
        self.umoci = args.umoci
        self.tree = os.path.join(self.dir, "base")
        self.tar = os.path.join(self.dir, "layer.tar")
        self.snapshot = None
        run("cp", "-a", args.rootfs, self.tree)

    def settle(self):
        """Takes away what depends on the day, the machine or the order of events."""
        remove(self.tree, "var/cache/ldconfig/aux-cache", "var/lib/dpkg/lock", "var/lib/dpkg/lock-frontend")
        for directory, _, names in os.walk(os.path.join(self.tree, "var/log")):
            for name in names:
                if name not in ("lastlog", "wtmp", "btmp", "faillog"):
                    os.remove(os.path.join(directory, name))
        clamp_times(self.tree)

    def base(self, *options):
        """The first layer: the whole tree by GNU tar. Then umoci unpacks it, and that is the tree."""
        self.settle()
        gnu_tar(self.tree, self.tar, *options)
        self.layout.add_layer(self.tar, "debootstrap")
        self.layout.finish("latest")
        shutil.rmtree(self.tree)
        self.bundle = os.path.join(self.dir, "bundle")
        run(self.umoci, "unpack", "--image", self.reference, self.bundle)
        self.tree = os.path.join(self.bundle, "rootfs")

    def layer_by_umoci(self, created_by):
        """What changed since the first layer, as umoci finds it."""
        self.settle()
        run(self.umoci, "repack", "--image", self.reference, "--history.created", CREATED,
            "--history.created_by", created_by, self.bundle)
        self.layout.load()
        self.snapshot = Snapshot(self.tree)

    def layer(self, created_by, opaque=()):
        """What changed since the last layer, written by tarfile."""
        self.settle()
        after = Snapshot(self.tree, self.snapshot)
        write_difference(self.snapshot, after, self.tar, opaque)
        self.layout.add_layer(self.tar, created_by)
        self.snapshot = after

    def finish(self, config):
        self.layout.finish("latest", config)
        truth = os.path.join(self.dir, "tree")
        run(self.umoci, "raw", "unpack", "--image", self.reference, truth)
        assert Snapshot(truth).described() == self.snapshot.described(), "umoci unpacks another tree than was packed"
        shutil.rmtree(self.bundle)
        run(self.umoci, "gc", "--layout", self.layout.path)


def python_image(out, args):
    image = Image(out, "python", args)
    image.base("--format=gnu")
    tree = image.tree

    install(tree, os.path.join(args.debs, "python"), ["python3", "python3-venv", "ca-certificates"])
    image.layer_by_umoci("apt-get install python3 python3-venv")

    pip = "/srv/venv/bin/python", "-m", "pip", "install", "--quiet", "--no-compile", "--only-binary=:all:"
    chroot(tree, "python3", "-m", "venv", "/srv/venv")
    chroot(tree, *pip, *WHEELS_FIRST, network=True)
    chroot(tree, "python3", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", "/srv/venv")
    image.layer("pip install " + " ".join(WHEELS_FIRST))

    # Files of the layer below are overwritten and deleted, and whole trees of them.
    chroot(tree, *pip, *WHEELS_LATER, network=True)
    chroot(tree, "python3", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", "/srv/venv")
    packages = "srv/venv/lib/python3.13/site-packages"
    remove(tree, f"{packages}/numpy/tests", f"{packages}/numpy/linalg/tests", f"{packages}/pandas/tests/io",
           f"{packages}/django/contrib/gis")
    locale = os.path.join(tree, packages, "django/contrib/admin/locale")
    kept = os.path.join(locale, "de")
    shutil.move(kept, locale + ".de")
    shutil.rmtree(locale)
    os.mkdir(locale)
    shutil.move(locale + ".de", kept)
    image.layer("pip install --upgrade " + " ".join(WHEELS_LATER),
                opaque=[f"{packages}/django/contrib/admin/locale"])

    # Links to files of lower layers, a directory replaced by a link and a file by a directory, another owner.
    os.link(os.path.join(tree, "usr/bin/python3.13"), os.path.join(tree, "usr/local/bin/app-python"))
    share(os.path.join(tree, packages, "django"), lambda name: name == "__init__.py")
    remove(tree, "usr/share/zoneinfo/right", "srv/venv/bin/activate.fish", "var/lib/dpkg/info")
    remove(tree, f"{packages}/pandas/tests", "usr/games")
    os.symlink("local/games", os.path.join(tree, "usr/games"))
    remove(tree, "srv/venv/bin/Activate.ps1")
    write(tree, "srv/venv/bin/Activate.ps1/README", "There is no PowerShell here.\n")
    write(tree, "srv/app/main.py", PYTHON_APP, 0o755)
    os.lchown(os.path.join(tree, "srv/app/main.py"), APP_USER, APP_USER)
    os.lchown(os.path.join(tree, "srv/app"), APP_USER, APP_USER)
    image.layer("COPY app /srv/app")
    image.finish({"Entrypoint": ["/srv/venv/bin/python", "/srv/app/main.py"], "WorkingDir": "/srv/app",
                  "User": str(APP_USER), "Env": ["PATH=/srv/venv/bin:/usr/bin:/bin"],
                  "Labels": {"org.example.kind": "python"}})


# What a guest runs: it prints the same everywhere.
PYTHON_APP = """\
import hashlib, json, sqlite3, ssl
import django, numpy, pandas, requests
frame = pandas.DataFrame({"square": numpy.arange(1000) ** 2})
print("numpy", numpy.__version__, "django", django.__version__, "requests", requests.__version__)
print("sum", int(frame["square"].sum()), "sqlite", sqlite3.connect(":memory:").execute("select 6*7").fetchone()[0])
print(hashlib.sha256(frame.to_csv().encode()).hexdigest())
"""


def node_image(out, args):
    image = Image(out, "node", args)
    image.base("--format=gnu")
    tree = image.tree

    install(tree, os.path.join(args.debs, "node"), ["nodejs", "npm", "ca-certificates"])
    image.layer_by_umoci("apt-get install nodejs npm")

    write(tree, "srv/app/package.json", '{"name":"app","version":"1.0.0","private":true}\n')
    npm = "npm", "install", "--ignore-scripts", "--loglevel=error"
    chroot(tree, *npm, *NPM_FIRST, directory="/srv/app", network=True)
    image.layer("npm install " + " ".join(NPM_FIRST))

    chroot(tree, *npm, *NPM_LATER, directory="/srv/app", network=True)
    chroot(tree, "npm", "uninstall", "--ignore-scripts", "--loglevel=error", "webpack", directory="/srv/app", network=True)
    # All languages but one are gone from a directory that is made anew.
    modules = "srv/app/node_modules"
    locale = os.path.join(tree, modules, "date-fns/locale")
    shutil.move(os.path.join(locale, "en-US"), locale + ".en")
    shutil.rmtree(locale)
    os.mkdir(locale)
    shutil.move(locale + ".en", os.path.join(locale, "en-US"))
    image.layer("npm install " + " ".join(NPM_LATER), opaque=[f"{modules}/date-fns/locale"])

    # What built it is not needed to run it: hundreds of packages go.
    chroot(tree, "sh", "-c", "apt-get -q -y purge npm && apt-get -q -y purge --auto-remove")
    remove(tree, f"{modules}/lodash/fp", f"{modules}/date-fns/fp", *APT_CACHES)
    os.link(os.path.join(tree, "usr/bin/node"), os.path.join(tree, "usr/local/bin/app-node"))
    share(os.path.join(tree, "srv/app"), lambda name: name.upper().startswith("LICENSE"))
    write(tree, "srv/app/main.js", NODE_APP, 0o755)
    image.layer("COPY app /srv/app")
    image.finish({"Entrypoint": ["/usr/bin/node", "/srv/app/main.js"], "WorkingDir": "/srv/app",
                  "Env": ["PATH=/usr/bin:/bin", "NODE_ENV=production"], "ExposedPorts": {"8080/tcp": {}},
                  "Labels": {"org.example.kind": "node"}})


NODE_APP = """\
const { add } = require('date-fns/add');
const express = require('express'), lodash = require('lodash'), typescript = require('typescript');
const source = lodash.range(100).map((n) => `const n${n}: number = ${n};`).join('\\n');
const output = typescript.transpileModule(source, {}).outputText;
console.log('typescript', typescript.version, 'lodash', lodash.VERSION, 'express', typeof express().listen);
console.log(require('crypto').createHash('sha256').update(output).digest('hex'));
console.log(typeof add);
"""


def main():
    os.umask(0o022)
    parser = argparse.ArgumentParser()
    for name in ("rootfs", "umoci", "debs", "out"):
        parser.add_argument("--" + name, required=True)
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    makers = {"python": python_image, "node": node_image, "nasty": nasty_image.make}
    for name in args.names or makers:
        makers[name](args.out, args)


if __name__ == "__main__":
    main()
