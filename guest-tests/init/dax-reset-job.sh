# Job of the guest that is reset while its DAX window is in use: guest-tests/guest_dax.rs. It runs once before
# each reset and once after the last. What the host sees of the files is in /expected.

sums_are_right() {
    (cd /mnt && sha256sum -c /expected/sums)
}

check mount mount -t virtiofs "$tag" /mnt
check sums sums_are_right
echo "host-please reset" >/dev/console
for i in 1 2 3; do
    sums_are_right >/dev/null
done
finish
reboot -f
