#!/bin/sh
# Shows the blocks of a file as a device of the device-mapper, for as long as a
# command runs. The file is pinned all the time, so the device is true.
#
#     dm-linear.sh FILE COMMAND [ARGUMENT]...       # as root
#
# COMMAND finds the path of the device in $DEVICE, and the number of bytes that are
# the file's in $SIZE: the last block may have more. What COMMAND writes there goes
# past the page cache of FILE. When COMMAND has ended its pages are dropped, so that
# readers see what was written; what they have mapped stays as it was.
#
# The device-mapper wants a device for itself, and that of a mounted filesystem
# is not to be had. A loop device over it is.
set -eu

if [ "${1-}" = --pinned ]; then
    file=$2
    shift 2
    name=pinned-$$
    dmsetup create "$name" "$MAPDIRECT_EXTENTS"
    status=0
    DEVICE=/dev/mapper/$name SIZE=$(stat -c %s "$file") "$@" || status=$?
    # What is in the cache of the device goes to the disk first.
    blockdev --flushbufs "/dev/mapper/$name"
    dmsetup remove "$name"
    # Clean pages are dropped; there are no others, or they have been written over.
    dd if="$file" iflag=nocache count=0 status=none
    exit "$status"
fi

file=$1
shift
source=$(findmnt --noheadings --first-only --output SOURCE --target "$file")
# Direct, so that there is no second page cache in between.
loop=$(losetup --find --show --direct-io=on "$source")
trap 'losetup --detach "$loop"' EXIT
mapdirect pin "$file" --require-stable --format dmsetup --device "$loop" -- \
    "$0" --pinned "$file" "$@"
