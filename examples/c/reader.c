/* A reader that survives truncation: it sums up the bytes of a file, again with each
 * line of its input, whatever others try to do to the file meanwhile.
 *
 *     cc -o reader reader.c $(pkg-config --cflags --libs mapdirect)
 *     ./reader FILE
 *
 * The mapping is an ordinary one. Without the pin, `truncate -s 0 FILE` by another
 * process kills the program with SIGBUS; with it the other process gets ETXTBSY. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <inttypes.h>
#include <mapdirect.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static uint64_t sum(const unsigned char *bytes, size_t length)
{
	uint64_t sum = 0;

	for (size_t at = 0; at < length; at++)
		sum += bytes[at];
	return sum;
}

int main(int argc, char **argv)
{
	struct mapdirect_state state;
	struct stat stat;
	char line[64];

	if (argc != 2)
		return 2;
	int fd = open(argv[1], O_RDONLY | O_CLOEXEC);
	if (fd < 0) {
		perror(argv[1]);
		return 1;
	}
	/* The pin comes first: from then on the size is what it is. */
	mapdirect_pin pin = mapdirect_pin_fd(fd, 0, 0, 0);
	if (!pin) {
		fprintf(stderr, "%s\n", mapdirect_strerror());
		return 1;
	}
	if (fstat(fd, &stat))
		return 1;
	size_t length = (size_t)stat.st_size;
	void *bytes = mmap(NULL, length, PROT_READ, MAP_SHARED, fd, 0);
	if (bytes == MAP_FAILED) {
		perror("mmap");
		return 1;
	}
	do {
		/* The guard may have gone: then this says so. */
		if (mapdirect_pin_status(pin, &state, sizeof(state)))
			return 1;
		printf("%zu bytes, sum %" PRIu64 ", %s\n", length, sum(bytes, length),
		       state.state == MAPDIRECT_KEPT ? "kept" : mapdirect_strerror());
		fflush(stdout);
	} while (fgets(line, sizeof(line), stdin));
	munmap(bytes, length);
	return mapdirect_unpin(pin) ? 1 : 0;
}
