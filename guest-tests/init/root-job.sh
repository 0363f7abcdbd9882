# Job of the guest that boots with an image as its root: guest-tests/guest_read.rs.

root_is_virtiofs() {
    grep ' / virtiofs ro' /proc/mounts
}

programs_run() {
    dpkg-query -W -f '${Package} ${Version}\n' dpkg coreutils &&
        perl -e 'use POSIX; print POSIX::strtol("42", 10) . "\n"' &&
        apt-config dump >/tmp/apt
}

digest_of_all_programs() {
    find /usr/bin /usr/sbin /usr/lib -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum
}

check root root_is_virtiofs
check release cat /etc/os-release
check programs programs_run
check digest digest_of_all_programs
