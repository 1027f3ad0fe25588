"""A reader that survives truncation: it sums up the bytes of a file, again with each line
of its input, whatever others try to do to the file meanwhile.

    python3 reader.py FILE

Without the pin, `truncate -s 0 FILE` by another process kills Python with SIGBUS.
"""

import mmap
import sys

import mapdirect


def main(path):
    with open(path, "rb") as file, mapdirect.pin(file) as pin:
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
            while True:
                status = pin.status()
                kept = status.why or "kept"
                print(f"{len(memory)} bytes, sum {sum(memory[:])}, {kept}", flush=True)
                if not sys.stdin.readline():
                    return


main(*sys.argv[1:])
