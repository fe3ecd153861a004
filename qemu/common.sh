# shellcheck shell=bash disable=SC2034 # the arrays are for the script that sources this
# What run-guest and run-sidecar share.

set -euo pipefail

die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# Prints the comment block at the top of the calling script: that is its --help.
usage() { sed -n '2,/^[^#]/{s/^# \{0,1\}//p;}' "$0"; }

qemu=${QEMU:-qemu-system-x86_64}

# Since QEMU 9.2 the pause between two attempts to reconnect is given in milliseconds.
reconnect_option() {
    local version major minor
    version=$("$qemu" --version | sed -n 's/^QEMU emulator version \([0-9]*\)\.\([0-9]*\).*/\1 \2/p')
    read -r major minor <<<"${version:-0 0}"
    if [ "$major" -gt 9 ] || { [ "$major" -eq 9 ] && [ "$minor" -ge 2 ]; }; then echo reconnect-ms=100; else echo reconnect=1; fi
}

# Sets `base`: a machine whose memory a vhost-user backend can map, and the accelerator to go with it.
base_options() {
    local memory=$1 cpus=$2 accelerator
    if [ -r /dev/kvm ] && [ -w /dev/kvm ]; then accelerator=(-accel kvm -cpu host); else accelerator=(-accel "tcg,thread=multi"); fi
    if [ -n "${ACCEL:-}" ]; then accelerator=(-accel "$ACCEL"); fi
    base=(
        "${accelerator[@]}" -M "q35,memory-backend=mem"
        -object "memory-backend-memfd,id=mem,size=$memory,share=on" -m "$memory" -smp "$cpus"
    )
}

# Sets `disk`: a vhost-user disk on a socket. One queue a CPU is a good choice.
vhost_user_disk() {
    local id=$1 socket=$2 queues=$3
    [ -S "$socket" ] || die "$socket is not a socket: does the daemon serve that disk?"
    case $socket in *,*) die "a comma in the path of a socket must be written twice for QEMU: rename $socket" ;; esac
    disk=(
        -chardev "socket,id=$id,path=$socket,$(reconnect_option)"
        -device "vhost-user-blk-pci,id=$id-device,chardev=$id,num-queues=$queues${4:-}"
    )
}
