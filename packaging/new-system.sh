# Sourced by what tries packages in a new Debian: as root, in a mount namespace of its own, with
# $suite (bookworm, trixie) and $out, a folder that may be kept: the base system is made once.
# shellcheck shell=sh
# shellcheck disable=SC2154 # suite and out are the caller's

say() {
    printf '%s: %s\n' "$suite" "$*"
}

# Whatever is mounted below goes with the script that sources this.
if [ "${INSIDE:-}" != yes ]; then
    exec env INSIDE=yes unshare --mount --propagation private "$0" "$suite" "$out"
fi

base=$out/$suite-base
if [ ! -e "$base/etc/debian_version" ]; then
    say 'making a new system'
    rm -rf "$base"
    debootstrap --variant=minbase "$suite" "$base.new" >"$out/$suite-debootstrap.log"
    mv "$base.new" "$base"
fi

# A copy of it at $1.
lay() {
    rm -rf "$1"
    cp -a "$base" "$1"
    mount --rbind /dev "$1/dev"
    mount -t proc proc "$1/proc"
}

take_away() {
    umount -l "$1/dev" "$1/proc"
    rm -rf "$1"
}

within() {
    root=$1
    shift
    env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive \
        chroot "$root" "$@"
}

install_in() {
    root=$1
    shift
    within "$root" apt-get install -qq -y --no-install-recommends -o Dpkg::Use-Pty=0 "$@" >/dev/null 2>&1
}

# The registry that pip asks, and how it is trusted, are this machine's.
trust_as_here() {
    for file in .config/pip/pip.conf .pip/pip.conf; do
        [ ! -e "$HOME/$file" ] || install -D "$HOME/$file" "$1/root/$file"
    done
    [ ! -e /etc/pip.conf ] || cp /etc/pip.conf "$1/etc/"
    mkdir -p "$1/etc/ssl/certs"
    cp /etc/ssl/certs/ca-certificates.crt "$1/etc/ssl/certs/"
}
