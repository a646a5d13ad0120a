#!/bin/sh
# Mounts a damaged sample image and prints what the check finds; `make demo` runs this.
# Everything it makes is in one temporary folder, unmounted and removed at the end, also on failure.
set -eu

bin=$(cd "$(dirname "$0")/.." && pwd)/.venv/bin
image_maker=$(cd "$(dirname "$0")" && pwd)/make_image.py
work=$(mktemp -d "${TMPDIR:-/tmp}/instarfs-demo.XXXXXX")

# Read from the kernel's list: a mount whose daemon died no longer answers, but is still there.
is_mounted() {
    grep -qF "${work##*/}/mnt " /proc/self/mountinfo
}

clean_up() {
    status=$?
    trap - EXIT
    trap '' HUP INT PIPE TERM
    cd /
    if is_mounted; then
        "$bin/instarfs" umount "$work/mnt" || fusermount3 -u -z "$work/mnt"
    fi
    is_mounted || rm -rf "$work"
    exit "$status"
}

run() {
    printf '\n$ %s\n' "$*"
    command=$1
    shift
    "$command" "$@"
}

instarfs() {
    "$bin/instarfs" "$@"
}

trap clean_up EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 141' PIPE
trap 'exit 143' TERM

cd "$work"
mkdir mnt
"$bin/python" "$image_maker" damaged.qcow2
run instarfs mount damaged.qcow2 mnt
run cat mnt/check/result.json
run cat mnt/check/leaks
run cat mnt/check/report.txt
run instarfs umount mnt
