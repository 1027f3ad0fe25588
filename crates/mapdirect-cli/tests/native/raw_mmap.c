/* mmap(2) with MAP_DIRECT, by a program without any library of ours.
 *
 * raw_mmap FILE read|write|both PROT FLAGS OFFSET LENGTH
 *
 * Says "errno N", or "mapped" and then does as it is told, a word a line:
 * store, close, unmap. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	char line[64];
	int fd = -1;

	if (argc != 7)
		return 2;
	if (strcmp(argv[2], "none")) {
		int mode = !strcmp(argv[2], "read")    ? O_RDONLY
			   : !strcmp(argv[2], "write") ? O_WRONLY
						       : O_RDWR;
		fd = open(argv[1], mode);
		if (fd < 0)
			return 3;
	}
	size_t length = strtoul(argv[6], 0, 0);
	char *memory = mmap(0, length, strtol(argv[3], 0, 0), strtol(argv[4], 0, 0), fd,
			    strtol(argv[5], 0, 0));
	if (memory == MAP_FAILED) {
		printf("errno %d\n", errno);
		return 0;
	}
	printf("mapped\n");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		if (!strcmp(line, "store\n"))
			memset(memory, 0x5a, length);
		else if (!strcmp(line, "close\n"))
			close(fd);
		else if (!strcmp(line, "unmap\n"))
			munmap(memory, length);
		printf("done\n");
		fflush(stdout);
	}
	return 0;
}
