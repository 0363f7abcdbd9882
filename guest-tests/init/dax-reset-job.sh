# Job of the guests that reboot while their DAX window is full: guest-tests/guest_dax.rs. It runs once before that
# and once after; then the test has the reboot end the VM. What the host sees of the files is in /expected.

sums_are_right() {
    (cd /mnt && sha256sum -c /expected/sums)
}

check mount mount -t virtiofs "$tag" /mnt
check sums sums_are_right
echo "host-please reboot" >/dev/console
sleep 2
finish
reboot -f
