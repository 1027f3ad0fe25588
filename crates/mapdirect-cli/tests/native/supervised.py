# A script that maps a file, for reading (r) or for writing (r+).
import mmap
import sys

path, mode = sys.argv[1:]
access = mmap.ACCESS_READ if mode == "r" else mmap.ACCESS_WRITE
with open(path, mode + "b") as file:
    memory = mmap.mmap(file.fileno(), 0, access=access)
print("mapped", flush=True)
for line in sys.stdin:
    total = 0
    for at in range(0, len(memory), 4096):
        total += memory[at]
        if mode == "r+":
            memory[at] = 7
    print("alive", flush=True)
memory.close()
