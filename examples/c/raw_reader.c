/* A reader of raw blocks: it copies a file to its output by reading the block device
 * with O_DIRECT, at the places that the pin names.
 *
 *     cc -o raw_reader raw_reader.c $(pkg-config --cflags --libs mapdirect)
 *     ./raw_reader FILE > copy          as root
 *
 * Without a pin the filesystem may give the blocks to another file between the look
 * at the block map and the read. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <mapdirect.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* What offsets, lengths and memory of a direct read are a multiple of. */
#define ALIGNMENT 4096
#define PIECE (1 << 20)

static void fail(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, mapdirect_strerror());
	exit(1);
}

/* The device that the offsets count on. */
static int device_of(const struct mapdirect_extent *extent)
{
	char path[96], line[64], name[96] = "";

	snprintf(path, sizeof(path), "/sys/dev/block/%u:%u/uevent", extent->device_major,
		 extent->device_minor);
	FILE *told = fopen(path, "re");
	if (!told)
		fail("the device has no name");
	while (fgets(line, sizeof(line), told))
		if (sscanf(line, "DEVNAME=%63s", path) == 1)
			snprintf(name, sizeof(name), "/dev/%.63s", path);
	fclose(told);
	return open(name, O_RDONLY | O_DIRECT | O_CLOEXEC);
}

/* Copies the bytes of an extent before the end of the file. */
static void copy(int device, const struct mapdirect_extent *extent, uint64_t size, char *memory)
{
	uint64_t end = extent->offset + extent->length, at = extent->offset;

	for (end = end < size ? end : size; at < end;) {
		size_t count = end - at < PIECE ? (size_t)(end - at) : PIECE;
		/* The last read ends with a whole block, beyond the file's end. */
		size_t whole = (count + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
		uint64_t from = extent->physical + (at - extent->offset);

		switch (extent->state) {
		case MAPDIRECT_WRITTEN:
		case MAPDIRECT_SHARED:
		case MAPDIRECT_LOOSE:
			if (pread(device, memory, whole, (off_t)from) < (ssize_t)count) {
				perror("reading the device");
				exit(1);
			}
			break;
		case MAPDIRECT_HOLE:
		case MAPDIRECT_UNWRITTEN:
			/* An unwritten extent has blocks, with whatever was in them
			 * before they became part of this file: never show it. */
			memset(memory, 0, count);
			break;
		default:
			fail("a block is not to be read");
		}
		if (fwrite(memory, 1, count, stdout) != count)
			exit(1);
		at += count;
	}
}

int main(int argc, char **argv)
{
	struct mapdirect_state state;
	struct stat stat;
	char *memory = aligned_alloc(ALIGNMENT, PIECE);

	if (argc != 2 || !memory)
		return 2;
	int fd = open(argv[1], O_RDONLY | O_CLOEXEC);
	if (fd < 0) {
		perror(argv[1]);
		return 1;
	}
	/* When this returns, everything that was written is on the device. */
	mapdirect_pin pin = mapdirect_pin_fd(fd, 0, 0, 0);
	if (!pin || fstat(fd, &stat))
		fail("pin");
	ptrdiff_t count = mapdirect_pin_extents(pin, NULL, 0, sizeof(struct mapdirect_extent));
	if (count < 1)
		fail("extents");
	struct mapdirect_extent *extents = calloc((size_t)count, sizeof(*extents));
	if (!extents || mapdirect_pin_extents(pin, extents, (size_t)count, sizeof(*extents)) != count)
		fail("extents");
	int device = device_of(extents);
	if (device < 0)
		fail("the device");
	for (ptrdiff_t at = 0; at < count; at++)
		copy(device, &extents[at], (uint64_t)stat.st_size, memory);
	fflush(stdout);
	/* They were true all the time, if the pin is still kept. */
	if (mapdirect_pin_status(pin, &state, sizeof(state)) || state.state != MAPDIRECT_KEPT)
		fail("the copy is worth nothing");
	free(extents);
	free(memory);
	return mapdirect_unpin(pin) ? 1 : 0;
}
