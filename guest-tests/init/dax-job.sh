# Job of the guests that read an image through a DAX window: guest-tests/guest_dax.rs. What the host sees of
# the files is in /expected. Lines that begin with host-please are asked of the test.

please() { # please WHAT: the host sees the console
    echo "host-please $1" >/dev/console
}

sums_are_right() {
    (cd /mnt && sha256sum -c /expected/sums)
}

page_cache() { # in KiB
    awk '$1 == "Cached:" { print $2 }' /proc/meminfo
}

# Everything was read once, through a window that is smaller.
page_cache_does_not_grow() {
    echo 3 >/proc/sys/vm/drop_caches
    before=$(page_cache)
    sums_are_right || return
    after=$(page_cache)
    echo "page cache: $before KiB before, $after KiB after"
    test $((after - before)) -lt 1024
}

read_backwards() {
    (cd /mnt && sort -r -k 2 /expected/md5 | cut -c 35- | while read -r name; do md5sum "$name"; done)
}

four_readers() {
    for i in 1 2; do
        (cd /mnt && md5sum -c /expected/md5 >/dev/null) &
        eval "reader$i=$!"
    done
    for i in 3 4; do
        (read_backwards | sort >/tmp/backwards$i && sort /expected/md5 | cmp - /tmp/backwards$i) &
        eval "reader$i=$!"
    done
    wait $reader1 && wait $reader2 && wait $reader3 && wait $reader4
}

a_program_runs_from_the_window() {
    for i in 1 2 3; do
        /mnt/busybox sha256sum /mnt/odd | grep -q "$(grep odd /expected/sums | cut -c 1-64)" || return
    done
    # Its data segment is a private mapping, and was written to.
    cmp /mnt/busybox /bin/busybox
}

window() { # window: start and end of the DAX window, in the guest's physical memory
    sed -n 's/^ *\([0-9a-f]*\)-\([0-9a-f]*\) : virtio[0-9]*$/0x\1 0x\2/p' /proc/iomem
}

# Writes into the memory of the window, behind the back of the file system. It has got there if a file that
# was just read is another then, for this guest. The kernel may take a range from the file in between and
# have it filled anew, so there is more than one try.
the_guest_writes_into_the_window() {
    set -- $(window)
    echo "the window is at $1 to $2"
    for try in 1 2 3 4 5 6 7 8 9 10; do
        cat /mnt/odd >/dev/null
        at=$(($1))
        while [ $at -lt $(($2)) ]; do
            devmem $((at + 4096)) 32 0x6b6c6d6e || return
            at=$((at + 2097152))
        done
        if ! sha256sum /mnt/odd | grep -q "$(grep odd /expected/sums | cut -c 1-64)"; then return; fi
    done
    return 1
}

umount_and_mount_again() {
    umount /mnt && mount -t virtiofs "$tag" /mnt && sums_are_right
}

unplugged() {
    exec 9</mnt/odd
    please unplug
    for i in $(seq 60); do
        if ! ls /sys/bus/virtio/devices/* >/dev/null 2>&1; then return; fi
        sleep 1
    done
    return 1
}

check mount mount -t virtiofs "$tag" /mnt || finish
check sums page_cache_does_not_grow
check parallel four_readers
check execute a_program_runs_from_the_window
please pause
check paused four_readers
please go-on
please count
check write the_guest_writes_into_the_window
check remount umount_and_mount_again
check unplug unplugged
