# What every guest knows: how to run a check and how to tell the host about it. Works in busybox ash and
# in dash. The host's side is guest-tests/support/guest.rs.

# check NAME COMMAND [ARGUMENT...]
# Runs the command and reports it under this name, a word, with its status and the start of its output.
check() {
    check_name=$1
    shift
    "$@" >/tmp/check-output 2>&1 </dev/null
    check_status=$?
    head -n 400 /tmp/check-output | sed "s/^/guest-output $check_name: /"
    echo "guest-result $check_name $check_status"
}

# finish: the last line of every job. A console without it belongs to a guest that died.
finish() {
    echo guest-end
}
