# Job of the guests that are reset while their DAX window is in use: guest-tests/guest_dax.rs. It runs once
# before that and once after. What the host sees of the files is in /expected.

sums_are_right() {
    (cd /mnt && sha256sum -c /expected/sums)
}

check mount mount -t virtiofs "$tag" /mnt
check sums sums_are_right
# The first time this is the end.
(while :; do cat /mnt/*; done) >/dev/null 2>&1 &
echo "host-please reset" >/dev/console
sleep 5
kill $!
wait $!
check again sums_are_right
check umount umount /mnt
