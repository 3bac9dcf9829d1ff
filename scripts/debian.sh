# Sourced by the scripts that need more than this machine has: a Debian release in a directory of its own. "sid", the unstable one,
# has a rustc that is new enough together with the standard libraries of other targets. As root, on x86-64 Debian or what
# descends from it.
#
# DEBIAN names the directory that holds them (default target; sid takes 2.7 GB; remove one to get newer packages).

# A mirror may lag behind by more than the days that a release file is good for; its signature is checked all the same.
lagging=(-o Acquire::Check-Valid-Until=false)

# debian RELEASE PACKAGE...: makes the release's directory, $root from then on, if it is not there, and installs packages into it
# if they are not.
debian() {
    local release=$1
    shift
    root=$(realpath -m "${DEBIAN:-target}/$release")
    if [ ! -e "$root/ready" ]; then
        if ! command -v debootstrap >/dev/null; then
            apt-get update -qq "${lagging[@]}"
            apt-get install -y -qq debootstrap
        fi
        local mirror # this machine's own; one of the files may be missing
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

# inside COMMAND...: runs a command in $root, in this repository and with cargo's registry as it is out here. What is mounted
# for that is seen by the command alone.
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
