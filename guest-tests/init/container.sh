# What runs in the overlay of guest-tests/guest_shared.rs: Debian's dash, coreutils and perl.
set -ex

echo new >/etc/new
rm /etc/issue
! test -e /etc/issue
rm -r /etc/cron.daily
mkdir /etc/cron.daily # opaque
test -z "$(ls /etc/cron.daily)"
mv /etc/apt /etc/apt-moved
test -d /etc/apt-moved && ! test -e /etc/apt
mkdir -p /srv/a/b && mv /srv/a /srv/c && test -d /srv/c/b
chown 12:34 /etc/debian_version
chmod 4750 /bin/ls
test "$(stat -c '%u:%g' /etc/debian_version) $(stat -c %a /bin/ls)" = '12:34 4750'
mkfifo /srv/fifo
mknod /srv/null c 1 3 && echo x >/srv/null
ln /etc/passwd /srv/passwd
test "$(stat -c %h /etc/passwd /srv/passwd | sort -u)" = 2 # the inode number differs, as index=off has it
echo more >>/etc/passwd && tail -n 1 /srv/passwd | grep -q more
# What was copied up is looked at again when the guest must ask whether its name still means the same.
sleep 1.2
test "$(wc -l </etc/passwd)" = "$(wc -l </srv/passwd)" && ls -i /etc/passwd
ln /etc/group /etc/passwd 2>&1 | grep -q 'File exists'
cp /etc/passwd /etc/passwd+ && mv /etc/passwd+ /etc/passwd && tail -n 1 /etc/passwd | grep -q more
ln -f /srv/passwd /etc/passwd
truncate -s 3 /etc/debian_version && test "$(stat -c %s /etc/debian_version)" = 3
cp --sparse=always /bin/bash /srv/bash && cmp /bin/bash /srv/bash && /srv/bash -c 'exit 0'
dd if=/dev/zero of=/srv/big bs=1M count=20 conv=fsync 2>/dev/null
test "$(sha256sum </srv/big)" = "$(head -c 20971520 /dev/zero | sha256sum)"
# Documentation is not installed, and so missing; nothing may differ.
test -z "$(dpkg --verify dpkg | grep -v '^missing')"
dpkg-query -W dpkg
su -s /bin/sh nobody -c 'umask 027; echo mine >/tmp/of-nobody; ! echo x >/etc/no 2>/dev/null'
test "$(stat -c '%U %a' /tmp/of-nobody)" = 'nobody 640'

perl -e '
    use strict;
    use Fcntl qw(:DEFAULT :flock :seek F_SETLK F_WRLCK F_RDLCK);
    # A file without a name that gets one, with what programs do where there is none: overlayfs has
    # it only if its work directory has. O_TMPFILE | O_RDWR, AT_SYMLINK_FOLLOW.
    my $fd = syscall(257, -100, my $dir = "/srv", 0x410002, 0644);
    my $nameless = $fd >= 0;
    $nameless or $!{EOPNOTSUPP} or die "O_TMPFILE: $!";
    my $file = "/srv/named";
    $nameless or $fd = syscall(257, -100, $file, 0xc2, 0644);
    syscall(1, $fd, my $data = "without a name", 14) == 14 or die "write: $!";
    !$nameless or syscall(265, -100, my $from = "/proc/self/fd/$fd", -100, my $to = "/srv/named", 0x400) == 0
        or die "linkat: $!";
    # Extended attributes, of a file of the image.
    syscall(188, $file = "/etc/group", my $name = "user.test", my $value = "value", 5, 0) == 0
        or die "setxattr: $!";
    syscall(188, $file, my $trusted = "trusted.test", $value, 5, 0) == 0 or die "trusted: $!";
    my $got = "\0" x 10;
    syscall(191, $file, $trusted, $got, 10) == 5 && $got =~ /^value/ or die "getxattr: $!";
    # A file that is removed while it is open.
    open(my $open, "+>", "/srv/removed") or die;
    unlink "/srv/removed" or die;
    print $open "still there" or die;
    seek($open, 0, SEEK_SET);
    <$open> eq "still there" or die "removed";
    # Locks.
    open(my $one, "+>", "/srv/lock") or die;
    open(my $two, "+<", "/srv/lock") or die;
    flock($one, LOCK_EX) or die;
    flock($two, LOCK_EX | LOCK_NB) and die "two locks";
    my $l = pack("ssx4qqlx4", F_WRLCK, SEEK_SET, 0, 10, 0); fcntl($one, F_SETLK, $l) or die "$!";
    if (my $child = fork) {
        waitpid($child, 0);
        $? == 0 or die "the child got the lock";
    } else {
        $l = pack("ssx4qqlx4", F_RDLCK, SEEK_SET, 5, 1, 0); exit(fcntl($two, F_SETLK, $l) ? 1 : 0);
    }
    rename("/srv/named", "/srv/renamed") or die;
'
test "$(cat /srv/renamed)" = 'without a name'
test "$(ls -a /srv | wc -l)" = 10
sync /srv/big
find / -xdev -newer /container -type f | grep -q /srv/big
echo the container is content
