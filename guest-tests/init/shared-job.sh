# Job of the guests that mount a device with images and a shared directory, as Kata's agent does:
# guest-tests/guest_shared.rs. The host answers what the guest asks for by files in the shared directory.

lists_both() {
    mount -t virtiofs "$tag" /mnt && ls /mnt && test -d /mnt/containers && ! test -e /mnt/rafs
}

# ask THING: has the host do it, and waits until it says that it is done.
ask() {
    : >"/mnt/containers/please-$1"
    tries=0
    while ! test -e "/mnt/containers/done-$1"; do
        tries=$((tries + 1))
        test $tries -lt 1200 || return 1
        sleep 0.1
    done
}

image_appears() {
    # It was looked for in vain: the guest must not remember that.
    ! test -e /mnt/rafs/c1/lowerdir && ask image && test -x /mnt/rafs/c1/lowerdir/bin/sh &&
        ls /mnt /mnt/rafs/c1
}

later_mount_appears() {
    mkdir /mnt/containers/later && stat -c %d /mnt/containers/later >/tmp/before && ask mount &&
        sleep 1.2 && test "$(cat /mnt/containers/later/file)" = "on a tmpfs of the host" &&
        stat -c %d /mnt/containers/later >/tmp/after && ! cmp -s /tmp/before /tmp/after
}

overlay_mounts() {
    grep -q overlay /proc/filesystems || insmod /modules/overlay.ko || return
    mkdir -p /ov /mnt/containers/upper /mnt/containers/work || return
    lower=/mnt/rafs/c1/lowerdir
    mount -t overlay overlay \
        -o "lowerdir=$lower,upperdir=/mnt/containers/upper,workdir=/mnt/containers/work,index=off" /ov &&
        mount -t proc proc /ov/proc
}

container_works() {
    cp /guest/container /ov/container && chroot /ov /bin/sh /container
}

# What overlayfs says when its upper layer cannot do something; of TMPFILE see docs/fuse.md.
overlay_does_not_complain() {
    ! dmesg | grep -i overlay | grep -iv 'module\|taint\|does not support tmpfile\|evm: overlay'
}

lower_is_as_it_was() {
    test -e /mnt/rafs/c1/lowerdir/etc/issue && ! test -e /mnt/rafs/c1/lowerdir/etc/new &&
        ! touch /mnt/rafs/c1/lowerdir/etc/new 2>/dev/null
}

overlay_comes_back() {
    umount /ov/proc && umount /ov && overlay_mounts && test "$(cat /ov/etc/new)" = new &&
        ! test -e /ov/etc/issue && umount /ov/proc && umount /ov
}

image_goes_away() {
    ask unmount && ! test -e /mnt/rafs/c1/lowerdir/bin/sh && echo still >/mnt/containers/after
}

check mount lists_both
check image image_appears
check later later_mount_appears
check overlay overlay_mounts
check container container_works
check silent overlay_does_not_complain
check lower lower_is_as_it_was
check remount overlay_comes_back
check gone image_goes_away
check umount umount /mnt
