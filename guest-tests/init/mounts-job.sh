# Job of the guest that sees images come and go: guest-tests/guest_mounts.rs. /mnt/containers is a directory
# of the host, by which host and guest tell each other how far they are; /expected/sums is what an image holds.

wait_for() { # wait_for NAME
    for _ in $(seq 1200); do
        if [ -e "/mnt/containers/$1" ]; then return; fi
        sleep 0.1
    done
    return 1
}

nothing_there() { ! ls /mnt/rafs 2>/dev/null && ! ls /mnt/rafs/c0/lowerdir 2>/dev/null; }

tell_and_wait() { # tell_and_wait NAME NAME
    touch "/mnt/containers/$1" && wait_for "$2"
}

whole() { (cd "/mnt/rafs/$1/lowerdir" && sha256sum -c /expected/sums >/dev/null); }

appear() {
    [ "$(ls /mnt/rafs | wc -l)" = 50 ] || return 1
    for i in $(seq 0 49); do
        [ "$(cat "/mnt/rafs/c$i/lowerdir/marker")" = first ] || return 1
    done
    whole c0 && whole c1
}

# Reads c0, each time from the host, until the host is done with the others.
read_on() {
    exec 3</mnt/rafs/c1/lowerdir/f0
    touch /mnt/containers/reading
    rounds=0
    until [ -e /mnt/containers/changed ]; do
        echo 3 >/proc/sys/vm/drop_caches
        whole c0 || return 1
        rounds=$((rounds + 1))
        [ $rounds -lt 2000 ] || return 1
    done
    echo "$rounds rounds"
    whole c0
}

# What was open when its image went ends with an error, or has the right bytes still.
open_file_ends_properly() {
    if cat <&3 >/tmp/kept 2>/tmp/error; then
        (cd /tmp && ln -s kept f0 && grep ' f0$' /expected/sums | sha256sum -c >/dev/null)
    else
        grep -iE 'stale|input/output' /tmp/error
    fi
}

new_ones_are_the_new_ones() {
    for i in $(seq 1 49); do
        [ "$(cat "/mnt/rafs/c$i/lowerdir/marker")" = second ] || return 1
    done
    [ "$(cat /mnt/rafs/c0/lowerdir/marker)" = first ]
}

directories_are_gone() { ! ls /mnt/rafs 2>/dev/null && [ "$(ls /mnt)" = containers ]; }

check mount mount -t virtiofs "$tag" /mnt
check absent nothing_there
check mounted tell_and_wait ready mounted
check appear appear
check read read_on
check open open_file_ends_properly
check new new_ones_are_the_new_ones
check unmounted tell_and_wait seen unmounted
check gone directories_are_gone
