"""A reader of raw blocks: it copies a file to its output by reading the block device with
O_DIRECT, at the places that the pin names. As root:

    python3 raw_reader.py FILE > copy
"""

import mmap
import os
import sys

import mapdirect
from mapdirect import BlockState, PinState

# What offsets, lengths and memory of a direct read are a multiple of.
ALIGNMENT = 4096
PIECE = 1 << 20


def device_of(extent):
    """The device that the offsets count on."""
    with open("/sys/dev/block/{}:{}/uevent".format(*extent.device)) as told:
        names = dict(line.strip().split("=", 1) for line in told)
    return os.open("/dev/" + names["DEVNAME"], os.O_RDONLY | os.O_DIRECT)


def copy(device, extent, size, memory):
    at, end = extent.offset, min(extent.offset + extent.length, size)
    while at < end:
        count = min(end - at, PIECE)
        # The last read ends with a whole block, beyond the file's end.
        whole = -(-count // ALIGNMENT) * ALIGNMENT
        with memoryview(memory)[:whole] as piece:
            if extent.state in (BlockState.WRITTEN, BlockState.SHARED, BlockState.LOOSE):
                os.preadv(device, [piece], extent.physical + at - extent.offset)
            elif extent.state in (BlockState.HOLE, BlockState.UNWRITTEN):
                # An unwritten extent has blocks, with whatever was in them before
                # they became part of this file: never show it.
                piece[:count] = bytes(count)
            else:
                raise ValueError(f"bytes at {at} are {extent.state.name}")
            sys.stdout.buffer.write(piece[:count])
        at += count


def main(path):
    memory = mmap.mmap(-1, PIECE)
    with open(path, "rb") as file, mapdirect.pin(file) as pin:
        extents = pin.extents()
        device = device_of(extents[0])
        for extent in extents:
            copy(device, extent, os.fstat(file.fileno()).st_size, memory)
        sys.stdout.buffer.flush()
        # They were true all the time, if the pin is still kept.
        if pin.status().state != PinState.KEPT:
            raise ValueError(f"the copy is worth nothing: {pin.status().why}")
        os.close(device)


main(*sys.argv[1:])
