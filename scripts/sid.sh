# Sourced by aarch64.sh and wasm-check.sh: Debian's unstable release, "sid", in a directory of its own. It has a rustc that is
# new enough together with the standard libraries of other targets. As root, on x86-64 Debian or what descends from it.
#
# SID names the directory (default target/sid, 2.7 GB; remove it to get newer packages).

sid=$(realpath -m "${SID:-target/sid}")
# A mirror may lag behind by more than the days that a release file is good for; its signature is checked all the same.
lagging=(-o Acquire::Check-Valid-Until=false)

# sid_install PACKAGE...: makes the directory if it is not there, and installs packages into it if they are not.
sid_install() {
    if [ ! -e "$sid/ready" ]; then
        if ! command -v debootstrap >/dev/null; then
            apt-get update -qq "${lagging[@]}"
            apt-get install -y -qq debootstrap
        fi
        local mirror # this machine's own; one of the files may be missing
        mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null | grep -oE 'https?://[^ ]+/debian/*$' | head -1 || true)
        debootstrap --variant=minbase --include=ca-certificates sid "$sid" ${mirror:+"$mirror"}
        chroot "$sid" dpkg --add-architecture arm64
        touch "$sid/ready"
    fi
    if ! chroot "$sid" dpkg-query -W "$@" >/dev/null 2>&1; then
        cp /etc/resolv.conf /etc/hosts "$sid/etc/"
        chroot "$sid" apt-get update -qq "${lagging[@]}"
        DEBIAN_FRONTEND=noninteractive chroot "$sid" apt-get install -y -qq --no-install-recommends "$@"
        chroot "$sid" apt-get clean
    fi
}

# in_sid COMMAND...: runs a command in there, in this repository and with cargo's registry as it is out here. What is mounted
# for that is seen by the command alone.
in_sid() {
    cargo fetch --locked --quiet
    mkdir -p "$sid/cargo" "$sid/src" "$sid/target"
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
    ' -- "$sid" "${CARGO_HOME:-$HOME/.cargo}" "$@"
}
