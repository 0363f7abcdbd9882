# Job of a guest that starts from an image which lies in a registry: guest-tests/guest_registry.rs. The tag comes in
# $tag, the program to start in $start, what the host sees in /expected.

. /guest/manifest.sh

same() { # same EXPECTED ACTUAL
    if cmp -s "$1" "$2"; then return; fi
    diff -U 0 "$1" "$2"
    return 1
}

metadata_is_the_same() {
    metadata /mnt >/tmp/metadata && same /expected/metadata /tmp/metadata
}

its_program_runs() {
    mount -t proc proc /mnt/proc && chroot /mnt /bin/sh -c "$start" >/tmp/start || return
    same /expected/start /tmp/start && umount /mnt/proc
}

a_sample_is_the_same() {
    cd /mnt && xargs -0 sha256sum </expected/sample-names >/tmp/sample && cd / || return
    same /expected/sample /tmp/sample
}

check mount mount -t virtiofs "$tag" /mnt
check start its_program_runs
check metadata metadata_is_the_same
check sample a_sample_is_the_same
