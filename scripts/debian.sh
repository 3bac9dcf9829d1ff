# Sourced by the scripts that need packages which this machine lacks. It creates a Debian release in
# a directory of its own. The unstable release "sid" has a recent enough rustc together with the
# standard libraries of other targets. Root is required, on x86-64 Debian or a derivative.
#
# DEBIAN names the directory of the releases (default target). sid takes 2.7 GB; remove its
# directory to get newer packages.

# A mirror may be older than the validity of its release file; the signature is checked all the
# same.
lagging=(-o Acquire::Check-Valid-Until=false)

# debian RELEASE PACKAGE...: creates the release's directory and installs the packages, unless they
# exist. $root names the directory afterwards.
debian() {
    local release=$1
    shift
    root=$(realpath -m "${DEBIAN:-target}/$release")
    if [ ! -e "$root/ready" ]; then
        if ! command -v debootstrap >/dev/null; then
            apt-get update -qq "${lagging[@]}"
            apt-get install -y -qq debootstrap
        fi
        local mirror # the mirror of this machine; one of the files may be missing
        mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null | grep -oE 'https?://[^ ]+/debian/*$' | head -1 || true)
        debootstrap --variant=minbase --include=ca-certificates "$release" "$root" ${mirror:+"$mirror"}
        touch "$root/ready"
    fi
    if ! chroot "$root" dpkg-query -W "$@" >/dev/null 2>&1; then
        cp /etc/resolv.conf /etc/hosts "$root/etc/"
        if [[ "$*" == *:arm64* ]]; then chroot "$root" dpkg --add-architecture arm64; fi
        chroot "$root" apt-get update -qq "${lagging[@]}"
        DEBIAN_FRONTEND=noninteractive chroot "$root" apt-get install -y -qq --no-install-recommends "$@"
        chroot "$root" apt-get clean
    fi
}

# inside COMMAND...: runs a command in $root, in this repository and with cargo's registry of this
# machine. The mounts for that are visible to the command alone.
inside() {
    cargo fetch --locked --quiet
    mkdir -p "$root/cargo" "$root/src" "$root/target"
    # shellcheck disable=SC2016
    unshare --mount --propagation private bash -c '
        set -e
        root=$1 cargo=$2
        shift 2
        mount --bind "$cargo" "$root/cargo"
        mount --bind . "$root/src"
        mount --bind /proc "$root/proc"
        mount --bind /dev "$root/dev"
        export HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin CARGO_HOME=/cargo CARGO_TARGET_DIR=/target CARGO_NET_OFFLINE=true
        exec chroot "$root" bash -c '\''cd /src && exec "$@"'\'' -- "$@"
    ' -- "$root" "${CARGO_HOME:-$HOME/.cargo}" "$@"
}
