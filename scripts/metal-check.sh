#!/usr/bin/env bash
# Type-checks the crate with `--features metal` on Linux, where Apple's libraries can be neither
# linked nor run:
#
#     scripts/metal-check.sh [check|clippy]
#
# clippy is the default, with warnings as errors. All targets are checked: library, tests, benches,
# examples.
#
# The check uses a shadow of the package in target/metal-check, whose files are links to the real
# ones. Two changes are invisible to the source: objc2 and block2 get the feature `gnustep-2-1`,
# without which they support only Apple's systems, and a copy of objc2-metal loses the attribute
# that makes the linker search for Apple's framework. Cargo.toml and Cargo.lock stay unchanged.
set -euo pipefail
cd "$(dirname "$0")/.."
fail() { printf 'metal-check: %s\n' "$*" >&2; exit 1; }

case "${1:-clippy}" in
    check) command=(check) lints=() ;;
    clippy) command=(clippy) lints=(-- -D warnings) ;;
    *) fail "usage: scripts/metal-check.sh [check|clippy]" ;;
esac

project=$PWD
shadow=${CARGO_TARGET_DIR:-$project/target}/metal-check
crate=objc2-metal
framework='#\[link(name = "Metal", kind = "framework")\]'

# The version in Cargo.lock, as cargo unpacked it.
cargo fetch --locked --quiet
version=$(awk -v want="name = \"$crate\"" '$0 == want { getline; gsub(/[^0-9.]/, ""); print; exit }' Cargo.lock)
[ -n "$version" ] || fail "no $crate in Cargo.lock"
unpacked=$(find "${CARGO_HOME:-$HOME/.cargo}/registry/src" -mindepth 2 -maxdepth 2 -name "$crate-$version" | head -n 1)
[ -n "$unpacked" ] || fail "cargo fetch left no $crate-$version in ${CARGO_HOME:-$HOME/.cargo}/registry/src"

mkdir -p "$shadow"
find "$shadow" -mindepth 1 -maxdepth 1 ! -name target -exec rm -rf {} +
cp -r "$unpacked" "$shadow/$crate"
chmod -R u+w "$shadow/$crate"
grep -q "$framework" "$shadow/$crate/src/generated/mod.rs" || fail "$crate $version: src/generated/mod.rs does not link Metal"
sed -i "/$framework/d" "$shadow/$crate/src/generated/mod.rs"
for dependency in objc2 block2; do
    # Adds the feature to the dependency's list of features, which is created if it is missing.
    awk -v head="[dependencies.$dependency]" -v feature='"gnustep-2-1"' '
        function close_table() { if (inside && !listed) print "features = [" feature "]"; inside = 0 }
        /^\[/ { close_table() }
        { line = $0 }
        $0 == head { inside = 1; listed = 0; found = 1 }
        inside && /^features = \[/ { listed = 1; sub(/\[/, "[" feature ", ", line) }
        { print line }
        END { close_table(); if (!found) exit 1 }
    ' "$shadow/$crate/Cargo.toml" > "$shadow/manifest" || fail "$crate $version does not depend on $dependency"
    mv "$shadow/manifest" "$shadow/$crate/Cargo.toml"
done

for entry in "$project"/*; do
    name=$(basename "$entry")
    case "$name" in Cargo.toml | Cargo.lock | target) ;; *) ln -s "$entry" "$shadow/$name" ;; esac
done
cp Cargo.lock "$shadow/"
{ cat Cargo.toml; printf '\n[patch.crates-io]\n%s = { path = "%s" }\n' "$crate" "$crate"; } > "$shadow/Cargo.toml"

cd "$shadow"
CARGO_TARGET_DIR=$shadow/target cargo "${command[@]}" --features metal --all-targets "${lints[@]}"
echo "metal-check: ${command[0]} of all targets with --features metal passed; nothing was linked or run"
