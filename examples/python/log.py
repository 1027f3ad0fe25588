"""A log on persistent memory: each record is durable when `append` returns, and after a
crash exactly the records that were appended are there.

    python3 log.py FILE append < lines     prints each line that is durable
    python3 log.py FILE show
"""

import os
import struct
import sys

import mapdirect

SIZE = 1 << 20
MAGIC = b"MAPDPYL1"
# Where records begin: in a cache line of their own.
RECORDS = 64


class Log:
    def __init__(self, memory):
        self.memory = memory
        if memory.read_at(8, 0) == bytes(8):
            self._set_end(RECORDS)
            # Until this is there, there is no log.
            memory.persist_at(MAGIC, 0)
        if memory.read_at(8, 0) != MAGIC:
            raise ValueError("this is no log")

    def end(self):
        return struct.unpack("=Q", self.memory.read_at(8, 8))[0]

    def _set_end(self, end):
        self.memory.persist_at(struct.pack("=Q", end), 8)

    def append(self, line):
        end = self.end()
        record = struct.pack("=Q", len(line)) + line + bytes(-len(line) % 8)
        # First what the end refers to, then the end: a power cut in between leaves
        # a log that ends before the record.
        self.memory.persist_at(record, end)
        self._set_end(end + len(record))

    def records(self):
        at, end = RECORDS, self.end()
        while at < end:
            (length,) = struct.unpack("=Q", self.memory.read_at(8, at))
            yield self.memory.read_at(length, at + 8)
            at += 8 + length + -length % 8


def main(path, verb):
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    mapdirect.prepare(fd, 0, SIZE, grow=True)
    with mapdirect.map(fd, 0, SIZE, cached=True) as memory:
        os.close(fd)
        log = Log(memory)
        if verb == "show":
            for record in log.records():
                print(record.decode())
            return
        for line in sys.stdin:
            log.append(line.rstrip("\n").encode())
            print(line, end="", flush=True)


main(*sys.argv[1:])
