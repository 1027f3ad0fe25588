"""Drives programs that know nothing of pins, as the tests tell it.

    driver.py PROGRAM make DIRECTORY     makes the file, and ends
    driver.py PROGRAM use DIRECTORY      uses the file that is there

Used, a program maps its file and says "ready". While its file is attacked it
waits for a line. Then it reads everything again, changes its file, and says
"done", with a word for each thing that it did to its own file: "ok", or
"refused" if that failed as a full disk would, and left the data as they were.
"""

import mmap
import os
import re
import subprocess
import sys


def pause():
    print("ready", flush=True)
    if not sys.stdin.readline():
        sys.exit("nobody says to go on")


def done(**words):
    print("done", *(f"{name}={word}" for name, word in words.items()), flush=True)


def attempt(what, *failures):
    """Does something to the file that a pin may refuse."""
    try:
        what()
    except failures as failure:
        print("refused:", failure, file=sys.stderr)
        return "refused"
    return "ok"


# A plain mapping.


def plain_make(directory):
    with open(f"{directory}/plain", "wb") as file:
        file.write(bytes(range(256)) * 4096)
        os.fsync(file.fileno())


def plain_use(directory):
    file = open(f"{directory}/plain", "r+b")
    memory = mmap.mmap(file.fileno(), 0)
    assert memory[255] == 255
    pause()
    assert memory[:] == bytes(range(256)) * 4096
    memory[5000] = 1
    memory.flush()

    def grow():
        os.pwrite(file.fileno(), b"x" * 8192, 1 << 20)

    def cut():
        memory.close()
        os.ftruncate(file.fileno(), 4096)

    done(grow=attempt(grow, OSError), cut=attempt(cut, OSError))


# numpy: the file is closed once it is mapped.


def numpy_make(directory):
    import numpy

    numpy.save(f"{directory}/array.npy", numpy.arange(131072))


def numpy_use(directory):
    import numpy

    reader = numpy.load(f"{directory}/array.npy", mmap_mode="r")
    array = numpy.load(f"{directory}/array.npy", mmap_mode="r+")
    total = int(array.sum())
    pause()
    assert int(array.sum()) == total == int(reader.sum())
    array[::2] += 1
    array.flush()
    assert int(reader.sum()) == total + 65536
    done()


# LMDB: reads through a mapping that is far larger than the file, and writes
# through a descriptor.


def lmdb_open(directory, **options):
    import lmdb

    return lmdb.open(f"{directory}/lmdb", map_size=64 << 20, **options)


def lmdb_fill(environment, first, number):
    with environment.begin(write=True) as transaction:
        for key in range(first, first + number):
            transaction.put(b"%08d" % key, b"v" * 1000)


def lmdb_check(environment, number):
    with environment.begin() as transaction:
        assert sum(1 for _ in transaction.cursor()) == number


def lmdb_make(directory):
    with lmdb_open(directory) as environment:
        lmdb_fill(environment, 0, 1000)


def lmdb_use(directory, **options):
    import lmdb

    environment = lmdb_open(directory, **options)
    lmdb_check(environment, 1000)
    pause()
    lmdb_check(environment, 1000)
    word = attempt(lambda: lmdb_fill(environment, 1000, 1000), lmdb.Error)
    lmdb_check(environment, 2000 if word == "ok" else 1000)
    environment.close()
    done(grow=word)


def lmdb_writemap_make(directory):
    lmdb_make(directory)


def lmdb_writemap_use(directory):
    lmdb_use(directory, writemap=True)


# SQLite.


def sqlite_open(directory, *pragmas):
    import sqlite3

    database = sqlite3.connect(f"{directory}/base.db", isolation_level=None)
    for pragma in pragmas:
        database.execute(f"PRAGMA {pragma}").fetchall()
    return database


def sqlite_fill(database, number):
    database.execute("BEGIN")
    for _ in range(number):
        database.execute("INSERT INTO t VALUES (?)", (b"v" * 900,))
    database.execute("COMMIT")


def sqlite_count(database):
    return database.execute("SELECT count(*), sum(length(v)) FROM t").fetchone()


def sqlite_make(directory):
    database = sqlite_open(directory)
    database.execute("CREATE TABLE t (v BLOB)")
    sqlite_fill(database, 1000)
    database.close()


def sqlite_go_on(directory, database):
    import sqlite3

    failures = sqlite3.Error
    before = sqlite_count(database)
    pause()
    assert sqlite_count(database) == before
    grow = attempt(lambda: sqlite_fill(database, 1000), failures)
    if database.in_transaction:
        database.execute("ROLLBACK")
    delete = attempt(
        lambda: database.execute("DELETE FROM t WHERE rowid % 2"), failures
    )
    vacuum = attempt(lambda: database.execute("VACUUM"), failures)
    database.close()
    # What was refused has done no harm.
    database = sqlite_open(directory)
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert sqlite_count(database)[0] >= 500
    database.close()
    done(grow=grow, delete=delete, vacuum=vacuum)


def sqlite_use(directory):
    sqlite_go_on(directory, sqlite_open(directory, "mmap_size=268435456"))


def sqlite_wal_make(directory):
    sqlite_make(directory)


def sqlite_wal_use(directory):
    database = sqlite_open(directory, "journal_mode=WAL", "mmap_size=268435456")
    sqlite_fill(database, 1)
    sqlite_go_on(directory, database)


# DuckDB: maps nothing, locks the whole file.


def duckdb_make(directory):
    import duckdb

    database = duckdb.connect(f"{directory}/base.duckdb")
    database.execute("CREATE TABLE t AS SELECT range AS v FROM range(100000)")
    database.close()


def duckdb_use(directory):
    import duckdb

    database = duckdb.connect(f"{directory}/base.duckdb")
    total = database.execute("SELECT sum(v) FROM t").fetchone()
    pause()
    assert database.execute("SELECT sum(v) FROM t").fetchone() == total

    def grow():
        database.execute("INSERT INTO t SELECT range FROM range(100000)")
        database.execute("CHECKPOINT")

    word = attempt(grow, duckdb.Error)
    database.close()
    done(grow=word)


# Programs that are told what to do by lines.


class Told:
    def __init__(self, *command):
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def tell(self, line, until):
        print(line, file=self.process.stdin, flush=True)
        said = []
        while True:
            answer = self.process.stdout.readline()
            if not answer:
                sys.exit(f"{line}: it ended after {said}")
            said.append(answer)
            if re.search(until, answer):
                return answer

    def end(self, status=0):
        self.process.stdin.close()
        rest = self.process.stdout.read()
        if self.process.wait() != status:
            sys.exit(f"it failed: {rest}")


# rrdtool: maps its file for each update, under a lock of the whole file.


def rrdtool_make(directory):
    subprocess.run(
        ["rrdtool", "create", f"{directory}/base.rrd", "--start", "1000000000"]
        + ["--step", "1", "DS:x:GAUGE:10:U:U", "RRA:AVERAGE:0.5:1:20000"],
        check=True,
    )


def rrdtool_use(directory):
    told = Told("rrdtool", "-")
    path = f"{directory}/base.rrd"
    for second in range(1, 50):
        told.tell(f"update {path} {1000000000 + second}:7", "^OK")
    pause()
    for second in range(50, 100):
        told.tell(f"update {path} {1000000000 + second}:7", "^OK")
    last = told.tell(f"last {path}", r"^\d+")
    assert last.strip() == "1000000099", last
    told.end()
    done()


# QEMU's block layer: maps nothing, and opens the file several times.


def qemu_make(directory):
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "raw", f"{directory}/disk.raw", "4M"],
        check=True,
    )
    told = Told("qemu-io", "-f", "raw", f"{directory}/disk.raw")
    told.tell("write -P 7 0 4M", "wrote")
    told.end()


def qemu_use(directory):
    subprocess.run(
        ["qemu-img", "info", "-f", "raw", f"{directory}/disk.raw"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    told = Told("qemu-io", "-f", "raw", "-d", "unmap", f"{directory}/disk.raw")
    told.tell("read -P 7 0 4M", "read .*bytes")
    pause()
    told.tell("read -P 7 0 4M", "read .*bytes")
    told.tell("write -P 9 1M 64k", "wrote .*bytes")
    told.tell("read -P 9 1M 64k", "read .*bytes")
    said = told.tell("discard 2M 64k", "discard .*")
    refused = "failed" in said
    told.end(status=int(refused))
    done(discard="refused" if refused else "ok")


# fio: maps its file, closes it, and stores and checks at random.


def fio_run(directory, *how):
    return subprocess.Popen(
        ["fio", "--name=job", f"--filename={directory}/fio.data", "--size=4M"]
        + ["--ioengine=mmap", "--rw=randrw", "--bs=4k", "--minimal", *how],
        stdout=subprocess.DEVNULL,
    )


def fio_make(directory):
    assert fio_run(directory, "--rw=write").wait() == 0


def is_mapped(path):
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/maps") as maps:
                if path in maps.read():
                    return True
        except OSError:
            pass
    return False


def fio_use(directory):
    import signal
    import time

    process = fio_run(directory, "--time_based", "--runtime=300")
    path = f"{directory}/fio.data"
    while not is_mapped(path):
        assert process.poll() is None
        time.sleep(0.05)
    pause()
    time.sleep(0.5)
    assert is_mapped(path), "it has ended"
    # So it ends when it is interrupted, and in no other way.
    process.send_signal(signal.SIGINT)
    status = process.wait()
    assert status == 128, status
    done()


# etcd: maps its database, 10 GiB of it.


ETCD = None


def free_port():
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def etcd_start(directory):
    global ETCD
    client, peer = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    ETCD = client
    process = subprocess.Popen(
        ["etcd", "--data-dir", f"{directory}/etcd", "--log-level", "error"]
        + ["--listen-client-urls", client, "--advertise-client-urls", client]
        + ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
        + ["--initial-cluster", f"default={peer}"],
        stdout=sys.stderr,
    )
    import time

    for _ in range(300):
        try:
            etcd_put(0)
            return process
        except OSError:
            if process.poll() is not None:
                sys.exit(f"etcd ended: {process.returncode}")
            time.sleep(0.1)
    sys.exit("etcd does not answer")


def etcd_ask(what, body):
    import json
    import urllib.request

    request = urllib.request.Request(
        f"{ETCD}/v3/kv/{what}", json.dumps(body).encode()
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


def etcd_put(number):
    import base64

    key = base64.b64encode(b"k%05d" % number).decode()
    value = base64.b64encode(b"v" * 1000).decode()
    etcd_ask("put", {"key": key, "value": value})


def etcd_count():
    return int(etcd_ask("range", {"key": "aw==", "range_end": "bA==", "count_only": True})["count"])


def etcd_end(process):
    process.terminate()
    process.wait()


def etcd_make(directory):
    process = etcd_start(directory)
    for number in range(50):
        etcd_put(number)
    etcd_end(process)


def etcd_use(directory):
    process = etcd_start(directory)
    assert etcd_count() == 50
    pause()
    assert etcd_count() == 50
    for number in range(50, 400):
        etcd_put(number)
    assert etcd_count() == 400
    assert process.poll() is None
    etcd_end(process)
    done()


def main():
    program, step, directory = sys.argv[1:]
    globals()[f"{program}_{step}"](directory)


if __name__ == "__main__":
    main()
