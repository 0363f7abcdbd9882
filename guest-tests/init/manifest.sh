# Describes a directory tree as text. The host runs these functions on the tree that an image was made of,
# the guest on what it mounted, and the texts must be equal. Both use the programs of scripts/parts, in $tools and
# in PATH. find and getfattr are called by their paths, or busybox would take its own, which can do less.
# Records end with NUL until the last step: names may contain anything else.

: "${tools:=/bin}"
export LC_ALL=C

# metadata DIR: everything but content. The size of a directory belongs to the file system that it is on,
# and the mtime of the root to the one who made the image.
metadata() (
    cd "$1" || exit
    echo "# path|type|mode|owner|size|mtime|links|target"
    "$tools/find" . -printf '%P|%y|%m|%U:%G|' \
        \( -type d -printf '-|' -o -printf '%s|' \) \
        \( -path . -printf '-|' -o -printf '%T@|' \) -printf '%n|%l\0' |
        busybox sort -z | busybox tr '\0' '\n' || exit
    echo "# path, major:minor, of devices"
    "$tools/find" . \( -type b -o -type c \) -print0 | busybox sort -z |
        busybox xargs -0 -r busybox stat -c '%n %t:%T' || exit
    echo "# number of the inode, path, of files with several names"
    "$tools/find" . -type f -links +1 -printf '%i %P\n' | busybox sort -k 2 |
        busybox awk '!($1 in number) { number[$1] = ++count } { $1 = number[$1]; print }' || exit
    echo "# extended attributes"
    # A path longer than PATH_MAX can be found but not named: what getfattr says to it is part of the text. That
    # a file system has no attributes is not: one without any need not support them.
    exec 3>&1
    errors=$("$tools/find" . -print0 | busybox sort -z |
        busybox xargs -0 "$tools/getfattr" -h -d -m - -e hex 2>&1 >&3 3>&-)
    echo "# what has no attributes that can be read"
    printf '%s\n' "$errors" | busybox grep -v -e ': Operation not supported$' -e '^$'
    true
)

# contents DIR [r]: SHA-256 of every file below 64 MiB, read in the order of their names, or backwards.
contents() (
    cd "$1" || exit
    "$tools/find" . -type f -size -64M -print0 | busybox sort -z"${2:-}" |
        busybox xargs -0 busybox sha256sum | busybox sort
)

# edges DIR: SHA-256 of the first and the last two MiB of every larger file.
edges() (
    cd "$1" || exit
    "$tools/find" . -type f -size +63M -printf '%s %P\n' | busybox sort | while read -r size name; do
        busybox dd if="$name" bs=1M count=2 2>/dev/null | busybox sha256sum
        busybox dd if="$name" bs=1M skip=$((size / 1048576 - 1)) 2>/dev/null | busybox sha256sum
        echo "$name"
    done
)
