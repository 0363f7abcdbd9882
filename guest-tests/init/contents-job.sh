# Job of a guest that reads all of an image: guest-tests/guest_registry.rs. The tag comes in $tag, what the host sees
# in /expected.

. /guest/manifest.sh

same() { # same EXPECTED ACTUAL
    if cmp -s "$1" "$2"; then return; fi
    diff -U 0 "$1" "$2"
    return 1
}

contents_are_the_same() {
    contents /mnt >/tmp/contents && same /expected/contents /tmp/contents
}

large_files_are_the_same() {
    edges /mnt >/tmp/edges && same /expected/edges /tmp/edges
}

# The one path that is too long to be named.
deepest_file_is_the_same() {
    "$tools/find" /mnt -name bottom -execdir sha256sum '{}' ';' | sort >/tmp/bottom && same /expected/bottom /tmp/bottom
}

check mount mount -t virtiofs "$tag" /mnt
check contents contents_are_the_same
check large large_files_are_the_same
check deepest deepest_file_is_the_same
