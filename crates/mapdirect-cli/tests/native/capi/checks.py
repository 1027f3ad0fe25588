"""Uses the package for Python, and misuses it."""

import errno
import gc
import mmap
import os
import sys

import mapdirect
from mapdirect import BlockState, PinState

PAGE = 4096


def fails(number, call, *arguments, **named):
    """A call fails with this errno, and says more than that."""
    try:
        call(*arguments, **named)
    except mapdirect.Refused as error:
        assert error.errno == number, error
        assert "help:" in error.strerror, error
        return
    raise AssertionError(f"{call} did not fail")


def raises(kind, call, *arguments):
    try:
        call(*arguments)
    except kind:
        return
    raise AssertionError(f"{call} did not fail")


def use(stable, sparse):
    with open(stable, "r+b") as file, mapdirect.map(file) as memory:
        assert len(memory) == 16 * PAGE and memory.offset == 0
        assert memory.status().state == PinState.KEPT and memory.status().why == ""
        memory.write_at(b"hello", 100)
        memory.persist(100, 5)
        memory.persist_at(bytearray(b"there"), PAGE - 2)
        memory.flush(0, 10)
        memory.drain()
        memory.persist()
        assert memory.read_at(5, 100) == b"hello"
        assert os.pread(file.fileno(), 5, PAGE - 2) == b"there"
        extents = memory.extents()
        assert sum(extent.length for extent in extents) == 16 * PAGE
        assert all(extent.state == BlockState.WRITTEN for extent in extents)
        assert all(extent.physical is not None for extent in extents)
        os.close(memory.event_fd())
        fails(errno.ETXTBSY, refusing, lambda: os.ftruncate(file.fileno(), 0))
        # Views keep the mapping, and end with it.
        view = memory.view()
        part = view[10:20]
        part[0] = 1
        view[100:105] = b"HELLO"
        raises(BufferError, memory.close)
        view.release()
        raises(BufferError, memory.close)
        assert memory.read_at(5, 100) == b"HELLO" and memory.read_at(1, 10) == b"\1"
        part.release()
        for arguments in [(-1, 1), (0, 16 * PAGE + 1), (16 * PAGE, 1)]:
            raises(ValueError, memory.view, *arguments)
            raises(ValueError, memory.persist, *arguments)
        raises(ValueError, memory.view, 0, 0)
        raises(ValueError, memory.write_at, b"12", 16 * PAGE - 1)
    assert memory.closed
    for call in [memory.close, memory.close]:
        call()
    raises(ValueError, memory.persist)
    raises(ValueError, memory.extents)
    raises(ValueError, memory.view)

    with open(stable, "r+b") as file:
        # Dropped, but for a view.
        view = mapdirect.map(file, PAGE, PAGE).view(5, 10)
        gc.collect()
        view[0] = 77
        fails(errno.ETXTBSY, refusing, lambda: os.ftruncate(file.fileno(), 0))
        del view
        gc.collect()
        assert os.pread(file.fileno(), 1, PAGE + 5) == b"M"
        os.ftruncate(file.fileno(), 16 * PAGE)
        # Errors of mmap.
        fails(errno.EINVAL, mapdirect.map, file, 1, PAGE)
        fails(errno.EINVAL, mapdirect.map, file, 0, 0)
        fails(errno.EINVAL, mapdirect.map, file, 1 << 40)
        if "MAPDIRECT_DAX" not in os.environ:
            fails(errno.EOPNOTSUPP, mapdirect.map, file, cached=False)
        number = file.fileno()
        assert mapdirect.supported(file) == ""
    fails(errno.EBADF, mapdirect.map, number, 0, PAGE)
    fails(errno.EBADF, mapdirect.pin, number)
    fails(errno.EBADF, mapdirect.prepare, number)
    fails(errno.EBADF, mapdirect.supported, number)

    with open(stable, "rb") as file:
        fails(errno.EACCES, mapdirect.map, file)
        assert "(EACCES)" in mapdirect.supported(file)
        with mapdirect.pin(file) as pin, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as read:
            assert read[100:105] == b"HELLO"
            assert pin.status().end == 16 * PAGE and pin.status().pin
            os.close(pin.event_fd())
        raises(ValueError, pin.status)
        pin.unpin()

    with open(sparse, "r+b") as file, mapdirect.map(file) as memory:
        hole = memory.extents()[1]
        assert hole.state == BlockState.HOLE and hole.physical is None
        at = hole.offset
        assert memory.read_at(8, at) == bytes(8)
        fails(errno.ETXTBSY, memory.write_at, b"x", at)
        fails(errno.ETXTBSY, memory.persist_at, b"x", at)
        fails(errno.ETXTBSY, memory.view)
        memory.view(0, at).release()
        memory.allocate(at, 1)
        memory.write_at(b"x", at)
        memory.view(0, at + PAGE).release()
    with open(sparse, "r+b") as file:
        size = os.fstat(file.fileno()).st_size
        mapdirect.prepare(file, 0, size + PAGE, grow=True)
        with mapdirect.map(file) as memory:
            assert len(memory) == size + PAGE
            memory.view().release()
        with mapdirect.pin(file, stable=True) as pin:
            assert pin.status().end is None
            os.ftruncate(file.fileno(), size + 2 * PAGE)
            fails(errno.ETXTBSY, refusing, lambda: os.ftruncate(file.fileno(), PAGE))
    child = os.fork()
    if child == 0:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def refusing(call):
    """What the kernel refuses has no words of ours."""
    try:
        call()
    except OSError as error:
        raise mapdirect.Refused(error.errno, "help: none") from error


def hold(path):
    with open(path, "r+b") as file, mapdirect.map(file):
        print("mapped", flush=True)
        input()
    with open(path, "rb") as file, mapdirect.pin(file):
        print("pinned", flush=True)
        input()


# The machine may be busy.
mapdirect.patience(20)
{"use": use, "hold": hold}[sys.argv[1]](*sys.argv[2:])
print("done")
