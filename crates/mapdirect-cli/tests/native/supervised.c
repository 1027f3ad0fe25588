// A program that knows nothing of pins: it maps files as it is told, and says
// what came of it. One command a line:
//
//	map FILE r|rw|private LENGTH	maps it (0: as long as the file is)
//	grow FILE LENGTH		makes it longer, by writing
//	cut LENGTH			shortens the first that is mapped
//	punch OFFSET LENGTH		punches a hole into it
//	touch				loads and stores everywhere
//	unmap				unmaps and closes everything
//	storm FILE THREADS COUNT	maps and unmaps it so often in each thread
//	timers				has a signal interrupt it all the time
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <unistd.h>

#define MOST 4096
static struct {
	char *at;
	size_t length;
	int fd;
	int writable;
} maps[MOST];
static int count;

static const char *map(const char *path, const char *how, size_t length)
{
	int writable = !strcmp(how, "rw");
	int fd = open(path, writable ? O_RDWR : O_RDONLY);
	struct stat stat;

	if (fd < 0 || fstat(fd, &stat))
		return strerror(errno);
	if (!length)
		length = stat.st_size;
	int flags = strcmp(how, "private") ? MAP_SHARED : MAP_PRIVATE;
	char *at = mmap(0, length, writable ? PROT_READ | PROT_WRITE : PROT_READ, flags, fd, 0);
	if (at == MAP_FAILED) {
		int error = errno;
		close(fd);
		return strerror(error);
	}
	maps[count].at = at;
	maps[count].length = length;
	maps[count].fd = fd;
	maps[count++].writable = writable;
	return "mapped";
}

static void touch(void)
{
	for (int each = 0; each < count; each++)
		for (size_t at = 0; at < maps[each].length; at += 4096) {
			volatile char *byte = maps[each].at + at;
			char now = *byte;
			if (maps[each].writable)
				*byte = now;
		}
}

static const char *grow(const char *path, size_t length)
{
	static char page[4096];
	int fd = open(path, O_WRONLY);

	if (fd < 0)
		return strerror(errno);
	off_t size = lseek(fd, 0, SEEK_END);
	memset(page, 7, sizeof(page));
	for (; size < (off_t)length; size += sizeof(page))
		if (pwrite(fd, page, sizeof(page), size) != sizeof(page))
			return strerror(errno);
	fsync(fd);
	close(fd);
	return "grown";
}

static char storm_path[4096];
static long storm_count;
static long storm_failed;

static void *storm(void *unused)
{
	int fd = open(storm_path, O_RDWR);

	(void)unused;
	for (long each = 0; each < storm_count; each++) {
		char *at = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		if (at == MAP_FAILED) {
			__sync_fetch_and_add(&storm_failed, 1);
			continue;
		}
		at[0] = 7;
		munmap(at, 4096);
	}
	close(fd);
	return 0;
}

static volatile long ticks;

static void tick(int unused)
{
	(void)unused;
	ticks++;
}

int main(void)
{
	char line[8192], path[4096], how[16];
	size_t length, offset;
	int threads;

	setvbuf(stdout, 0, _IONBF, 0);
	while (fgets(line, sizeof(line), stdin)) {
		if (sscanf(line, "map %4095s %15s %zu", path, how, &length) == 3) {
			printf("%s\n", count < MOST ? map(path, how, length) : "full");
		} else if (sscanf(line, "grow %4095s %zu", path, &length) == 2) {
			printf("%s\n", grow(path, length));
		} else if (sscanf(line, "storm %4095s %d %ld", storm_path, &threads, &storm_count) == 3) {
			pthread_t all[64];
			storm_failed = 0;
			for (int each = 0; each < threads && each < 64; each++)
				pthread_create(&all[each], 0, storm, 0);
			for (int each = 0; each < threads && each < 64; each++)
				pthread_join(all[each], 0);
			printf("%ld failed\n", storm_failed);
		} else if (sscanf(line, "cut %zu", &length) == 1) {
			printf("%s\n", ftruncate(maps[0].fd, length) ? strerror(errno) : "cut");
		} else if (sscanf(line, "punch %zu %zu", &offset, &length) == 2) {
			int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
			printf("%s\n", fallocate(maps[0].fd, mode, offset, length) ? strerror(errno) : "punched");
		} else if (!strncmp(line, "touch", 5)) {
			touch();
			printf("alive\n");
		} else if (!strncmp(line, "unmap", 5)) {
			for (int each = 0; each < count; each++) {
				munmap(maps[each].at, maps[each].length);
				close(maps[each].fd);
			}
			count = 0;
			printf("unmapped\n");
		} else if (!strncmp(line, "timers", 6)) {
			struct sigaction action = { .sa_handler = tick, .sa_flags = SA_RESTART };
			struct itimerval often = { { 0, 1000 }, { 0, 1000 } };
			sigaction(SIGALRM, &action, 0);
			setitimer(ITIMER_REAL, &often, 0);
			printf("ticking\n");
		}
	}
	return 0;
}
