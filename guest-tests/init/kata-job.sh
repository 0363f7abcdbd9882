# Job of the guest that runs containers as Kata's agent does: guest-tests/kata_run.rs. The runtime gives $tag, $options
# and $volume, a directory of the host by which both tell each other how far they are: there `create-CID` holds the
# options of a container's root.

. /guest/manifest.sh
shared=/run/kata-containers/shared

wait_for() { # wait_for NAME
    for _ in $(seq 1200); do
        if [ -e "$volume/$1" ]; then return; fi
        sleep 0.1
    done
    return 1
}
say() { : >"$volume/$1"; }

# What must be the same in a container's root and in the tree that its image was made of. An overlay counts links of
# directories in its own way, and gives them sizes of its own.
listing() (
    cd "$1" || exit
    find=${tools:-/bin}/find
    "$find" . -path ./proc -prune -o -printf '%P|%y|%m|%U:%G|%l|' \
        \( -type d -printf -- '-\n' -o -printf '%s\n' \) | busybox sort
)

shared_mounts() {
    mkdir -p $shared && mount -t virtiofs -o "$options" "$tag" $shared &&
        [ "$(ls $shared)" = containers ] && ! ls $shared/rafs/c1/lowerdir 2>/dev/null
}

volume_appears() { wait_for here && [ "$(cat "$volume/here")" = 'from the host' ] && say ready; }

create() { # create CID: what the agent does of CreateContainer
    wait_for "create-$1" || return
    mount -t overlay overlay -o "$(cat "$volume/create-$1")" "$shared/containers/$1/rootfs" || return
    mkdir -p "$shared/containers/$1/rootfs/proc" &&
        mount -t proc proc "$shared/containers/$1/rootfs/proc"
}

containers_start() {
    grep -q overlay /proc/filesystems || insmod /modules/overlay.ko || return
    create c1 && create c2 && create c3
}

root() { echo "$shared/containers/$1/rootfs"; }

same() { # same EXPECTED ACTUAL
    if cmp -s "$1" "$2"; then return; fi
    diff -U 0 "$1" "$2"
    return 1
}

all_see_their_images() {
    for pair in c1:debian c2:debian c3:small; do
        cid=${pair%:*} image=${pair#*:}
        listing "$(root "$cid")" >/tmp/listing && same "/expected/$image-listing" /tmp/listing || return
        metadata "$shared/rafs/$cid/lowerdir" >/tmp/metadata && same "/expected/$image-metadata" /tmp/metadata || return
    done
    contents "$(root c1)/usr" >/tmp/contents && same /expected/debian-contents /tmp/contents || return
    contents "$(root c3)/data" >/tmp/contents && same /expected/small-contents /tmp/contents
}

first_works() {
    cp /guest/container "$(root c1)/container" && chroot "$(root c1)" /bin/sh /container
}

second_sees_nothing_of_it() {
    ! [ -e "$(root c2)/etc/new" ] && [ -e "$(root c2)/etc/issue" ] &&
        [ "$(chroot "$(root c2)" /usr/bin/stat -c %a /bin/ls)" = 755 ] &&
        chroot "$(root c2)" /bin/sh -ec '
            for i in 1 2 3; do echo "line $i" >>/var/log/mine; done
            sed -i s/line/LINE/ /var/log/mine
            mv /var/log/mine /var/log/moved && rm -r /usr/share/common-licenses && mkdir /usr/share/common-licenses
            perl -i -pe "s/^root:/admin:/" /etc/passwd
            test "$(grep -c LINE /var/log/moved)" = 3 && grep -q ^admin: /etc/passwd
        ' && ! [ -e "$(root c1)/var/log/moved" ] && grep -q ^root: "$(root c1)/etc/passwd"
}

other_image_works() {
    chroot "$(root c3)" /bin/busybox sh -ec '
        echo changed >/data/f0 && rm /data/f1 && mv /data/dir /data/renamed && cat /data/renamed/inner >/data/copy
        ! test -e /data/f1 && test "$(cat /data/f0)" = changed
    ' && [ "$(cat "$(root c3)/data/copy")" = inner ] && [ "$(cat $shared/rafs/c3/lowerdir/data/f1)" != changed ]
}

# The second one ends while the first one reads, each time from the host.
one_ends_while_another_runs() {
    (
        rounds=0
        until [ -e "$volume/gone-c2" ]; do
            echo 3 >/proc/sys/vm/drop_caches
            chroot "$(root c1)" /usr/bin/sha256sum /usr/bin/perl /usr/lib/os-release | cmp -s - /tmp/sums || exit 1
            rounds=$((rounds + 1))
        done
        echo "$rounds rounds"
        [ $rounds -gt 0 ]
    ) &
    umount "$(root c2)/proc" && umount "$(root c2)" && say removed-c2 && wait_for gone-c2 && wait $! &&
        ! [ -e $shared/rafs/c2 ] && sleep 1.2 && ! [ -e $shared/containers/c2 ] &&
        [ "$(ls $shared/rafs)" = "$(printf 'c1\nc3')" ]
}

first_goes_on() {
    chroot "$(root c1)" /usr/bin/sha256sum /usr/bin/perl /usr/lib/os-release | cmp - /tmp/sums &&
        chroot "$(root c1)" /bin/sh -c 'echo still >/after && cat /after /etc/new' && sync
}

kernel_is_content() {
    ! dmesg | grep -iE 'overlay|fuse|virtiofs' | grep -iE 'error|fail|stale|warn|corrupt'
}

check shared shared_mounts
check volume volume_appears
check create containers_start
check images all_see_their_images
check first first_works
chroot "$(root c1)" /usr/bin/sha256sum /usr/bin/perl /usr/lib/os-release >/tmp/sums
check second second_sees_nothing_of_it
check other other_image_works
check ends one_ends_while_another_runs
check goes-on first_goes_on
check kernel kernel_is_content
