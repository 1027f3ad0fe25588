"""Files mapped, or pinned, so that nobody can move, free, share or allocate the blocks
under them: whoever tries gets ETXTBSY.

>>> with open("data", "r+b") as file, mapdirect.map(file, cached=True) as memory:
...     memory.persist_at(b"hello", 0)

A guard must run (`mapdirect guard`), and this process needs CAP_LINUX_IMMUTABLE.
"""

from __future__ import annotations

import ctypes
import mmap as _mmap
import os
import weakref
from dataclasses import dataclass
from enum import IntEnum
from types import TracebackType
from typing import Callable, Iterator, Protocol, Union

from ._library import (
    MAP_DIRECT,
    MAP_SHARED_VALIDATE,
    ExtentRecord,
    Refused,
    StateRecord,
    checked,
    library,
    refused,
    words,
)

__all__ = [
    "MAP_DIRECT",
    "MAP_SHARED_VALIDATE",
    "BlockState",
    "DirectMap",
    "Durability",
    "Extent",
    "Pin",
    "PinState",
    "Refused",
    "Status",
    "map",
    "patience",
    "pin",
    "prepare",
    "supported",
]


class HasFileno(Protocol):
    """An open file."""

    def fileno(self) -> int: ...


File = Union[int, HasFileno]
Buffer = Union[bytes, bytearray, memoryview]


class BlockState(IntEnum):
    """The state of the blocks of an extent."""

    WRITTEN = 1
    HOLE = 2
    #: Allocated, with whatever was in the blocks before: never show it.
    UNWRITTEN = 3
    SHARED = 4
    LOOSE = 5
    OTHER = 6


class PinState(IntEnum):
    """Whether a pin is kept."""

    KEPT = 0
    UNATTENDED = 1
    LOST = 2


class Durability(IntEnum):
    """What it takes to make a store durable."""

    CACHE_FLUSH = 1
    AUTOMATIC = 2
    MSYNC = 3


@dataclass(frozen=True)
class Extent:
    """A run of blocks in the same state, in bytes."""

    offset: int
    #: Byte of the block device, or None.
    physical: int | None
    length: int
    state: BlockState
    #: Major and minor number of the block device.
    device: tuple[int, int]


@dataclass(frozen=True)
class Status:
    """What has become of a pin."""

    state: PinState
    #: Why it is not kept; empty if it is.
    why: str
    #: The number by which the guard knows the pin.
    pin: int
    #: The range pinned, in bytes of the file; no end if None.
    start: int
    end: int | None
    #: How often blocks were found changed.
    breaches: int


def _number(file: File) -> int:
    return file if isinstance(file, int) else file.fileno()


class _Held:
    """What a mapping and a pin have in common: the same questions to the library."""

    _question = ""

    def _key(self) -> int:
        raise NotImplementedError

    def _ask(self, what: str) -> Callable[..., int]:
        ask: Callable[..., int] = getattr(library, f"mapdirect_{self._question}{what}")
        return ask

    def extents(self) -> list[Extent]:
        """The extents of the range, extended to whole blocks; true while it is held."""
        room = 64
        while True:
            records = (ExtentRecord * room)()
            size = ctypes.sizeof(ExtentRecord)
            count = checked(self._ask("extents")(self._key(), records, room, size))
            if count <= room:
                break
            room = count
        return [
            Extent(
                record.offset,
                None if record.physical == 2**64 - 1 else record.physical,
                record.length,
                BlockState(record.state),
                (record.device_major, record.device_minor),
            )
            for record in records[:count]
        ]

    def status(self) -> Status:
        """Whether the pin is kept, and the blocks are what they were."""
        record = StateRecord()
        size = ctypes.sizeof(StateRecord)
        checked(self._ask("status")(self._key(), ctypes.byref(record), size))
        state = PinState(record.state)
        return Status(
            state,
            "" if state == PinState.KEPT else words(),
            record.pin,
            record.start,
            None if record.end == 2**64 - 1 else record.end,
            record.breaches,
        )

    def event_fd(self) -> int:
        """A descriptor that becomes readable when `status` has news; the caller's to
        close."""
        return checked(self._ask("event_fd")(self._key()))


class _Exporter:
    """Memory that memoryviews look into. It lives as long as one of them does."""

    def __new__(cls, address: int, length: int) -> "ctypes.Array[ctypes.c_ubyte]":
        # A class of its own, since instances of plain arrays have no weak references.
        exporter = type("Exporter", (ctypes.c_ubyte * length,), {})
        found: ctypes.Array[ctypes.c_ubyte] = exporter.from_address(address)
        return found


class DirectMap(_Held):
    """A range of a file mapped MAP_DIRECT, for reading and writing; see `map`."""

    def __init__(self, address: int, length: int, offset: int) -> None:
        self._address = address
        self._length = length
        self._offset = offset
        self._views: list[weakref.ref[object]] = []

    def _key(self) -> int:
        return self._at(0, 0)

    def _at(self, offset: int, length: int) -> int:
        if not self._address:
            raise ValueError("the mapping is closed")
        if offset < 0 or length < 0 or offset + length > self._length:
            raise ValueError(f"{length} bytes at {offset} are not in a mapping of {self._length}")
        return self._address + offset

    def __len__(self) -> int:
        return self._length

    @property
    def offset(self) -> int:
        """The byte of the file at which it begins."""
        return self._offset

    @property
    def durability(self) -> Durability:
        """What it takes to make a store durable."""
        return Durability(checked(library.mapdirect_durability(self._key())))

    def _runs(self, offset: int, length: int) -> Iterator[tuple[int, int, BlockState]]:
        """The parts of a range of the mapping, by the state of their blocks."""
        start = self._offset + offset
        for extent in self.extents():
            low = max(start, extent.offset)
            high = min(start + length, extent.offset + extent.length)
            if low < high:
                yield low - self._offset, high - low, extent.state

    def _require(self, offset: int, length: int, states: set[BlockState]) -> int:
        """The address, if all blocks of a range are in such a state: others raise
        SIGBUS, which no program survives."""
        address = self._at(offset, length)
        covered = 0
        for at, size, state in self._runs(offset, length):
            if state not in states:
                raise Refused(
                    26,
                    f"byte {at} of the mapping lies in a block that is {state.name.lower()}"
                    "\n  help: prepare the file first, or call allocate",
                )
            covered += size
        if covered < length:
            raise Refused(14, "the range reaches beyond the end of the file")
        return address

    def read_at(self, length: int, offset: int) -> bytes:
        """A copy of bytes of the mapping."""
        readable = {BlockState.WRITTEN, BlockState.HOLE, BlockState.UNWRITTEN, BlockState.LOOSE}
        return ctypes.string_at(self._require(offset, length, readable), length)

    def write_at(self, data: Buffer, offset: int) -> None:
        """Stores bytes; they are durable after `persist`."""
        copy = bytes(data)
        address = self._require(offset, len(copy), {BlockState.WRITTEN})
        ctypes.memmove(address, copy, len(copy))

    def persist_at(self, data: Buffer, offset: int) -> None:
        """Stores bytes and makes them durable."""
        copy = bytes(data)
        address = self._at(offset, len(copy))
        checked(library.mapdirect_memcpy_persist(address, copy, len(copy)))

    def persist(self, offset: int = 0, length: int | None = None) -> None:
        """Makes what was stored durable."""
        length = self._length - offset if length is None else length
        checked(library.mapdirect_persist(self._at(offset, length), length))

    def flush(self, offset: int, length: int) -> None:
        """Starts to; it is durable when `drain` has returned."""
        checked(library.mapdirect_flush(self._at(offset, length), length))

    def drain(self) -> None:
        """Waits for what was flushed."""
        checked(library.mapdirect_drain())

    def allocate(self, offset: int, length: int) -> None:
        """Has the guard make blocks under a range storable, while it is pinned."""
        checked(library.mapdirect_allocate(self._at(offset, length), length))

    def view(self, offset: int = 0, length: int | None = None) -> memoryview:
        """The memory itself. It can be had where every access is sure to work: all
        blocks written and the file's own, nothing beyond its end. Others may store
        there at any time. While a view or a slice of one is alive, `close` raises
        BufferError.

        If blocks are changed in a way that no gate refuses, the mapping is taken away,
        and whoever looks gets SIGBUS, as the contract says.
        """
        length = self._length - offset if length is None else length
        if length == 0:
            raise ValueError("a view has at least one byte")
        address = self._require(offset, length, {BlockState.WRITTEN})
        exporter = _Exporter(address, length)
        # The mapping goes when nobody looks into it any more, and not before.
        exporter._mapping = self  # type: ignore[attr-defined]
        self._views = [view for view in self._views if view() is not None]
        self._views.append(weakref.ref(exporter))
        return memoryview(exporter).cast("B")

    def close(self) -> None:
        """Unmaps it; the pin is over when this returns."""
        if any(view() is not None for view in self._views):
            raise BufferError("memoryviews of the mapping are alive: release them first")
        address, self._address = self._address, 0
        if address:
            checked(library.mapdirect_munmap(address, self._length))

    @property
    def closed(self) -> bool:
        """Whether it is unmapped."""
        return not self._address

    def __enter__(self) -> DirectMap:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # The last view is gone, since each refers to this.
        if getattr(self, "_address", 0):
            library.mapdirect_munmap(self._address, self._length)
            self._address = 0


class Pin(_Held):
    """A block map held still, without a mapping; see `pin`."""

    _question = "pin_"

    def __init__(self, number: int) -> None:
        self._pin = number

    def _key(self) -> int:
        if not self._pin:
            raise ValueError("the pin has ended")
        return self._pin

    def unpin(self) -> None:
        """Ends it."""
        number, self._pin = self._pin, 0
        if number:
            checked(library.mapdirect_unpin(number))

    def __enter__(self) -> Pin:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.unpin()

    def __del__(self) -> None:
        if getattr(self, "_pin", 0):
            library.mapdirect_unpin(self._pin)
            self._pin = 0


def map(
    file: File,
    offset: int = 0,
    length: int | None = None,
    *,
    cached: bool | None = None,
) -> DirectMap:
    """Maps a range of a file, which must be open for reading and writing, MAP_DIRECT;
    all of it by default. Without DAX, `cached` must accept the page cache (or
    MAPDIRECT_CACHED=1 in the environment). To read only, `pin` the file and use mmap.
    """
    fd = _number(file)
    if length is None:
        length = max(os.fstat(fd).st_size - offset, 0)
    accept = -1 if cached is None else int(cached)
    checked(library.mapdirect_accept_page_cache(accept))
    try:
        address = library.mapdirect_mmap(
            None,
            length,
            _mmap.PROT_READ | _mmap.PROT_WRITE,
            MAP_SHARED_VALIDATE | MAP_DIRECT,
            fd,
            offset,
        )
        if address is None or address == 2**64 - 1:
            raise refused()
    finally:
        library.mapdirect_accept_page_cache(-1)
    return DirectMap(address, length, offset)


def pin(
    file: File,
    offset: int = 0,
    length: int = 0,
    *,
    stable: bool = False,
    whole_file: bool = False,
    deny_write: bool = False,
    deny_rename: bool = False,
    family: bool = False,
    prepare: bool = False,
) -> Pin:
    """Pins a range of a file without mapping it. Length 0 stands for the rest of the
    file, and with `stable` for whatever it grows to. The file can be open for reading
    only, and can be closed."""
    asked = (stable, whole_file, deny_write, deny_rename, family, prepare)
    flags = sum(1 << at for at, wanted in enumerate(asked) if wanted)
    number = library.mapdirect_pin_fd(_number(file), offset, length, flags)
    if number == 0:
        raise refused()
    return Pin(number)


def prepare(
    file: File, offset: int = 0, length: int = 0, *, grow: bool = False, huge: bool = False
) -> None:
    """Allocates, initialises and unshares every block of a range, so that it can be
    mapped. Not a byte changes."""
    flags = int(grow) | int(huge) << 1
    checked(library.mapdirect_prepare(_number(file), offset, length, flags))


def patience(seconds: float) -> None:
    """How long calls of this process wait for others who have a file open or change it: a
    tenth of a second at first, a minute at most."""
    checked(library.mapdirect_patience(int(min(max(seconds, 0), 60) * 1000)))


def supported(file: File) -> str:
    """Why `map` could not map a file; empty if it can."""
    if checked(library.mapdirect_supported(_number(file))):
        return ""
    return words()
