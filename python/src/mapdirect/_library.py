"""libmapdirect.so.0 by ctypes."""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, Structure, c_char_p, c_int, c_size_t, c_ssize_t, c_uint
from ctypes import c_uint32, c_uint64, c_void_p

MAP_DIRECT = 0x2000000
MAP_SHARED_VALIDATE = 3


class ExtentRecord(Structure):
    """struct mapdirect_extent."""

    _fields_ = [
        ("offset", c_uint64),
        ("physical", c_uint64),
        ("length", c_uint64),
        ("state", c_uint32),
        ("device_major", c_uint32),
        ("device_minor", c_uint32),
        ("reserved", c_uint32),
    ]


class StateRecord(Structure):
    """struct mapdirect_state."""

    _fields_ = [
        ("state", c_uint32),
        ("durability", c_uint32),
        ("pin", c_uint64),
        ("start", c_uint64),
        ("end", c_uint64),
        ("breaches", c_uint64),
    ]


class Refused(OSError):
    """Something was not done: errno is mmap(2)'s, and the text says what was asked,
    what stood in the way and who, and what helps."""


def _load() -> ctypes.CDLL:
    name = os.environ.get("MAPDIRECT_LIBRARY", "libmapdirect.so.0")
    try:
        library = ctypes.CDLL(name, use_errno=True)
    except OSError as error:
        raise ImportError(
            f"{error}; install it with `cargo xtask install`, or name it in MAPDIRECT_LIBRARY"
        ) from error
    off_t = ctypes.c_int64
    signatures = {
        "mmap": (c_void_p, c_void_p, c_size_t, c_int, c_int, c_int, off_t),
        "munmap": (c_int, c_void_p, c_size_t),
        "persist": (c_int, c_void_p, c_size_t),
        "flush": (c_int, c_void_p, c_size_t),
        "drain": (c_int,),
        "memcpy_persist": (c_int, c_void_p, c_void_p, c_size_t),
        "durability": (c_int, c_void_p),
        "allocate": (c_int, c_void_p, c_size_t),
        "accept_page_cache": (c_int, c_int),
        "patience": (c_int, c_uint),
        "prepare": (c_int, c_int, off_t, c_uint64, c_uint),
        "supported": (c_int, c_int),
        "extents": (c_ssize_t, c_void_p, POINTER(ExtentRecord), c_size_t, c_size_t),
        "status": (c_int, c_void_p, POINTER(StateRecord), c_size_t),
        "event_fd": (c_int, c_void_p),
        "pin_fd": (c_uint64, c_int, off_t, c_uint64, c_uint),
        "unpin": (c_int, c_uint64),
        "pin_extents": (c_ssize_t, c_uint64, POINTER(ExtentRecord), c_size_t, c_size_t),
        "pin_status": (c_int, c_uint64, POINTER(StateRecord), c_size_t),
        "pin_event_fd": (c_int, c_uint64),
        "strerror": (c_char_p,),
    }
    for function, (result, *arguments) in signatures.items():
        found = getattr(library, f"mapdirect_{function}")
        found.restype = result
        found.argtypes = arguments
    return library


library = _load()


def words() -> str:
    """Why the last call of this thread failed."""
    return library.mapdirect_strerror().decode(errors="replace")


def refused() -> Refused:
    """The error of the last call of this thread."""
    return Refused(ctypes.get_errno(), words())


def checked(result: int) -> int:
    """What a call returned, if that is no error."""
    if result < 0:
        raise refused()
    return result
