#!/bin/bash
# Mounts a damaged sample image, shows what the check finds, repairs it, and takes the last repair
# back; `make demo` runs this.
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

# A line of shell, for what has a redirection in it.
run_line() {
    printf '\n$ %s\n' "$1"
    eval "$1"
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
# Without a cluster that two guest ranges share: of that nobody can say which of them is right.
"$bin/python" "$image_maker" damaged.qcow2 --damage leaked-clusters --damage lost-l2-table \
    --damage low-refcount --damage wrong-copied
run instarfs mount damaged.qcow2 mnt
run cat mnt/check/result.json
run cat mnt/check/leaks
run cat mnt/check/report.txt

run cat mnt/repair/tier
run head -n 13 mnt/repair/plan/leaks.json
# Refused: something among the leaked clusters looks lost, and the user is to have read that.
run_line 'echo leaks > mnt/repair/tier' || true
run grep -e '"status"' -e '"plan-id"' -e '"reason"' mnt/repair/result.json
id=$(sed -n 's/.*"plan-id": "\(.*\)".*/\1/p' mnt/repair/result.json)
run_line "echo leaks $id > mnt/repair/tier"
run_line 'echo all > mnt/repair/tier'
run cat mnt/repair/tier
run cat mnt/repair/result.json
run cat mnt/check/report.txt
if command -v qemu-img > /dev/null; then
    run qemu-img check damaged.qcow2
fi

run cat mnt/repair/undo
run_line 'echo undo > mnt/repair/undo'
run cat mnt/check/report.txt
run instarfs umount mnt

# A disk with a file system in it: the report names the files that are hit.
PATH=$PATH:/usr/sbin:/sbin
if command -v mke2fs > /dev/null && command -v qemu-img > /dev/null; then
    mkdir -p files/home/alice
    seq 1000000 > files/home/alice/thesis.txt
    mke2fs -q -t ext4 -d files guest.raw 64M > /dev/null 2>&1
    qemu-img convert -O qcow2 guest.raw guest.qcow2
    "$bin/python" "$image_maker" hit.qcow2 --of guest.qcow2 --damage data-past-end > /dev/null
    run instarfs files hit.qcow2 || true
fi
