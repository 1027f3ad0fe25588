"""Runs `top` in terminals of odd sizes, types, and changes their size."""

import fcntl
import os
import pty
import select
import signal
import struct
import sys
import termios
import time

KEYS = [b"\r", b"?", b"x", b"/", b"o", b"\x1b", b"s", b"j", b"\r"]
PASTED = [b"/", b"\xff\xfe\x80", b"\x1b[200~" + b"a" * 5000 + b"\x1b[201~", b"\r"]
RESIZED = [(1, 1), b"\r", (300, 2), b"?", (2, 10), b"x", (20, 3), (0, 0), (200, 60)]
STOPPED = [signal.SIGSTOP, signal.SIGCONT, b"\r"]


def set_size(terminal, columns, lines):
    size = struct.pack("HHHH", lines, columns, 0, 0)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)


def read_for(terminal, seconds):
    """What is written, until it ends or nothing comes for a while."""
    text = b""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if select.select([terminal], [], [], 0.05)[0]:
            try:
                more = os.read(terminal, 65536)
            except OSError:
                break
            if not more:
                break
            text += more
    return text


def run(columns, lines, steps):
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.argv[1], [sys.argv[1], "top"])
    set_size(terminal, columns, lines)
    text = read_for(terminal, 0.7)
    for step in steps:
        if isinstance(step, tuple):
            set_size(terminal, *step)
            os.kill(pid, signal.SIGWINCH)
        elif isinstance(step, bytes):
            os.write(terminal, step)
        else:
            os.kill(pid, step)
        text += read_for(terminal, 0.2)
    # A key takes help away and another ends it; so does the second of these.
    os.write(terminal, b"\x03\x03")
    text += read_for(terminal, 0.3)
    end = time.monotonic() + 20
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        text += read_for(terminal, 0.1)
    else:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        sys.exit(f"{columns}x{lines}: it does not end")
    os.close(terminal)
    if status != 0 or b"panicked" in text:
        sys.exit(f"{columns}x{lines}: status {status}: {text[-400:]}")


for columns, lines in [(1, 1), (2, 10), (20, 3), (300, 2), (0, 0), (80, 1), (1000, 500)]:
    run(columns, lines, KEYS)
for steps in [RESIZED, STOPPED, PASTED]:
    run(80, 24, steps)
