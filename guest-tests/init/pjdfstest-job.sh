# Job of the guest that runs pjdfstest on the share: guest-tests/guest_shared.rs.

run_pjdfstest() {
    mount -t virtiofs "$tag" /mnt && mkdir "/mnt/$dir/pjdfstest" || return
    # It wants to know its users by name.
    mkdir -p /etc
    printf 'root:x:0:0::/:/bin/sh\ndaemon:x:1:1::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n' >/etc/passwd
    printf 'root:x:0:\ndaemon:x:1:\nnogroup:x:65534:\n' >/etc/group
    cd / && /bin/pjdfstest -c /guest/pjdfstest.toml -p "/mnt/$dir/pjdfstest" >/tmp/all
    tail -n 1 /tmp/all | sed 's/^/summary: /'
    grep -v ' ok$' /tmp/all | grep :: | sed 's/  */ /g'
    grep -q '^Summary: ' /tmp/all
}

check pjdfstest run_pjdfstest
