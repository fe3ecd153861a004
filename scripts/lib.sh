# shellcheck shell=bash
# What the scripts share. Source it: it changes into the repository and turns on strict mode.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export GUEST_KIT="${GUEST_KIT:-$PWD/.guest}"

if [ -t 1 ]; then bold=$'\e[1m' red=$'\e[31m' plain=$'\e[0m'; else bold='' red='' plain=''; fi

# One line that says what begins now.
step() { printf '%s==> %s%s\n' "$bold" "$*" "$plain"; }

# One line that says what is wrong, and the end.
die() {
    printf '%s%s: %s%s\n' "$red" "${0##*/}" "$*" "$plain" >&2
    exit 1
}

# cargo, on the copy of the crate that has the planted defects. It is woven first.
woven() { # subcommand, arguments
    scripts/weave >/dev/null &&
        cargo "$1" --manifest-path target/woven/Cargo.toml --target-dir "${CARGO_TARGET_DIR:-target}" --features planted "${@:2}"
}

# Prints the comment block at the top of the calling script: that is its --help.
usage() { sed -n '2,/^[^#]/{/^# shellcheck /d;s/^# \{0,1\}//p;}' "$0"; }
