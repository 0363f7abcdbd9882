# Job of the guests that mount an image and read all of it: guest-tests/guest_read.rs. The tag comes in $tag,
# what the host sees in /expected.

. /guest/manifest.sh

same() { # same EXPECTED ACTUAL
    if cmp -s "$1" "$2"; then return; fi
    diff -U 0 "$1" "$2"
    return 1
}

metadata_is_the_same() {
    metadata /mnt >/tmp/metadata && same /expected/metadata /tmp/metadata
}

two_processes_read_everything() {
    contents /mnt >/tmp/forwards &
    forwards=$!
    contents /mnt r >/tmp/backwards &
    backwards=$!
    wait $forwards && wait $backwards &&
        same /expected/contents /tmp/forwards && same /expected/contents /tmp/backwards
}

large_files_are_the_same() {
    edges /mnt >/tmp/edges && same /expected/edges /tmp/edges
}

direct_reads_are_the_same() {
    dd if=/mnt/special/random iflag=direct bs=256K 2>/dev/null | sha256sum | cut -c 1-64 >/tmp/direct
    sha256sum /mnt/special/random | cut -c 1-64 >/tmp/cached
    same /tmp/cached /tmp/direct
}

a_program_runs_from_the_share() {
    /mnt/special/busybox sha256sum /mnt/special/random
}

writing_is_refused() {
    touch /mnt/special/new 2>&1 | grep 'Read-only file system' &&
        rm /mnt/special/random 2>&1 | grep 'Read-only file system' &&
        chmod 600 /mnt/special/random 2>&1 | grep 'Read-only file system'
}

names_that_are_not_there() {
    ! ls /mnt/special/absent && ! cat /mnt/absent/file
}

second_mount_is_the_same() {
    mount -t virtiofs "$tag" /mnt && metadata_is_the_same || return
    contents /mnt/special >/tmp/special && same /expected/special /tmp/special && umount /mnt
}

check kernel uname -r
check mount mount -t virtiofs "$tag" /mnt
check statfs stat -f /mnt
check metadata metadata_is_the_same
check contents two_processes_read_everything
check large large_files_are_the_same
check direct direct_reads_are_the_same
check execute a_program_runs_from_the_share
check write writing_is_refused
check absent names_that_are_not_there
check umount umount /mnt
check remount second_mount_is_the_same
