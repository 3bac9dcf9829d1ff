#!/usr/bin/env bash
# Runs the tests under the AVX-512 kernels on a machine without AVX-512: in Bochs, which emulates a
# whole PC, on Linux without a disk.
#
#     scripts/avx512.sh                       unit tests of the kernels, and tests/forward.rs under
#                                             avx512bf16 and avx512
#     scripts/avx512.sh in_bf16 every_size    the unit tests whose names contain an argument
#
# Everything except the tests comes from Debian (scripts/debian.sh); root is required. The run
# checks results, not speed: the emulator computes 16 lanes one after the other.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/debian.sh

# Debian 13: a Bochs that GCC 15 or later has compiled divides incorrectly
# (https://github.com/bochs-emu/Bochs/issues/668).
debian trixie bochs bochs-term linux-image-cloud-amd64 busybox-static isolinux syslinux-common xorriso cpio

# The excluded features are those for which Bochs 3.0 lacks support that Linux needs. The clock runs
# at the speed of the modelled CPU.
# shellcheck disable=SC2016
options='config_interface: textconfig
display_library: term
cpu: model=sapphire_rapids, ips=2200000000, exclude_features="amx,amx_int8,amx_bf16,cet,uintr,lass,la57,waitpkg"
clock: sync=none
memory: guest=1024, host=1024
romimage: file=$BXSHARE/BIOS-bochs-latest
vgaromimage: file=$BXSHARE/VGABIOS-lgpl-latest
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
boot: cdrom
panic: action=fatal
error: action=ignore
info: action=ignore
mouse: enabled=0'
linux="console=ttyS0,115200 quiet nokaslr mitigations=off tsc=reliable no_timer_check"

# Builds a test and prints the path of its binary.
binary() { cargo test --locked --no-run --message-format=json "$@" | sed -n 's/.*"executable":"\([^"]*\)".*/\1/p'; }

# emulate NAME BINARY ARGUMENT...: runs a test binary on its own emulated machine. The output is in
# $root/NAME/serial.
emulate() {
    local dir=$1 tests=$2 at=$root/$1
    shift 2
    rm -rf "$at"
    mkdir -p "$at"/{cd,files/bin,files/proc,files/sys,files/dev,files/tmp}
    cp "$root"/boot/vmlinuz-* "$at/cd/vmlinuz"
    cp "$root/usr/lib/ISOLINUX/isolinux.bin" "$root/usr/lib/syslinux/modules/bios/ldlinux.c32" "$at/cd/"
    printf 'default linux\nlabel linux\n kernel vmlinuz\n append initrd=initrd %s\n' "$linux" >"$at/cd/isolinux.cfg"

    cp "$root/bin/busybox" "$at/files/bin/"
    strip -o "$at/files/tests" "$tests"
    ldd "$tests" | grep -oE '/[^ ]+' | while read -r library; do install -D "$library" "$at/files$library"; done
    cat >"$at/files/init" <<END
#!/bin/busybox sh
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t devtmpfs dev /dev
exec >/dev/ttyS0 2>&1
export CANDLE_SWIGLU_KERNEL=${kernel:-} PROPTEST_CASES=${PROPTEST_CASES:-4}
busybox grep -q avx512_bf16 /proc/cpuinfo && /tests --test-threads 1 $*
echo "exit status \$?"
busybox sleep 1 # time for the serial line to send it
busybox poweroff -f
END
    chmod +x "$at/files/init"
    (cd "$at/files" && find . | chroot "$root" sh -c "cd /$dir/files && cpio --quiet -o -H newc" | gzip -1 >"$at/cd/initrd")
    chroot "$root" xorriso -as mkisofs -quiet -o "/$dir/boot.iso" -b isolinux.bin -c boot.cat \
        -no-emul-boot -boot-load-size 4 -boot-info-table "/$dir/cd" 2>/dev/null

    printf '%s\n' "$options" "log: /$dir/log" "com1: enabled=1, mode=file, dev=/$dir/serial" \
        "ata0-master: type=cdrom, path=/$dir/boot.iso, status=inserted" >"$at/bochsrc"
    # Bochs's text display needs a terminal.
    TERM=xterm timeout 40m script -qec "chroot '$root' bochs -q -f /$dir/bochsrc" "$at/screen" >/dev/null </dev/null || true
    if ! grep -qs '^exit status 0' "$at/serial"; then
        tail "$at/log" "$at/serial"
        return 1
    fi
    sed -n '/^running /,/^test result/p' "$at/serial"
}

unit=$(binary --lib)
filters=("$@")
if [ $# -eq 0 ]; then filters=(cpu::); fi
mapfile -t tests < <("$unit" --list "${filters[@]}" 2>/dev/null | sed -n 's/: test$//p')
[ ${#tests[@]} -gt 0 ]

jobs=()
# Waits for all jobs; an error if one failed.
finish() {
    local job failed=0
    for job in "${jobs[@]}"; do wait "$job" || failed=1; done
    jobs=()
    return $failed
}

# One emulator per processor; the tests are dealt out to them.
printf '\n==> %s unit tests: each runs all kernels by itself\n' ${#tests[@]}
shares=$(nproc)
for ((share = 0; share < shares && share < ${#tests[@]}; share++)); do
    of_share=()
    for ((i = share; i < ${#tests[@]}; i += shares)); do of_share+=("${tests[i]}"); done
    emulate "unit-$share" "$unit" --exact "${of_share[@]}" &
    jobs+=($!)
done
finish
if [ $# -gt 0 ]; then exit; fi

forward=$(binary --test forward)
for kernel in avx512bf16 avx512; do
    printf '\n==> tests/forward.rs, %s\n' $kernel
    emulate "forward-$kernel" "$forward" &
    jobs+=($!)
done
finish
