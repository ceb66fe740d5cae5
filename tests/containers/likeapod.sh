#!/usr/bin/env bash
# Runs a command in an image's root as a pod would: no file can be written but on the two volumes, and the user has no
# name.    likeapod.sh <root> <scratch> [NAME=value ...] <command> ...
set -euo pipefail
if [ "${1:-}" != --inside ]; then
    exec unshare --mount --pid --fork --kill-child "$0" --inside "$@"
fi
root=$2 scratch=$3
mount --make-rprivate /
mount --bind "$root" "$root"
mkdir -p "$root/scratch"
touch "$root/etc/hosts" "$root/etc/resolv.conf"
mount --rbind /dev "$root/dev"
mount --bind "$scratch" "$root/scratch"
mount -t tmpfs tmpfs "$root/tmp"
for file in /etc/hosts /etc/resolv.conf; do mount --bind "$file" "$root$file"; done
mount -o remount,bind,ro "$root"
mount -t proc proc "$root/proc"
exec chroot --userspec=65532:65532 "$root" /usr/bin/env -i --chdir=/tmp "${@:4}"
