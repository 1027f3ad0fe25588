/* A log on persistent memory: each record is durable when append returns, and after
 * a crash exactly the records that were appended are there.
 *
 *     cc -o log log.c $(pkg-config --cflags --libs mapdirect)
 *     ./log FILE append < lines      prints each line that is durable
 *     ./log FILE show
 *
 * All blocks are prepared before they are pinned, and nobody can take them away: no
 * store raises SIGBUS. On persistent memory an append is two flushes and no system
 * call; without it the page cache is accepted here, and each flush is an msync(2). */
#define _GNU_SOURCE
#include <fcntl.h>
#include <inttypes.h>
#include <mapdirect.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define SIZE (1 << 20)
/* Where records begin: in a cache line of their own. */
#define RECORDS 64
#define MAGIC UINT64_C(0x314c4350414d4450)

struct log {
	uint64_t magic; /* Comes last: until it is there, there is no log. */
	uint64_t end;	/* The one word that makes a record exist. */
};

static void fail(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, mapdirect_strerror());
	exit(1);
}

/* A word that is durable when this returns. */
static void set(uint64_t *word, uint64_t value)
{
	__atomic_store_n(word, value, __ATOMIC_RELEASE);
	if (mapdirect_persist(word, sizeof(*word)))
		fail("persist");
}

static void append(struct log *log, const char *line, uint64_t length)
{
	char *start = (char *)log + log->end;
	uint64_t size = sizeof(length) + (length + 7) / 8 * 8;

	if (log->end + size > SIZE)
		fail("the log is full");
	memcpy(start, &length, sizeof(length));
	memcpy(start + sizeof(length), line, length);
	/* First what the end refers to, then the end: a power cut in between leaves
	 * a log that ends before the record. */
	if (mapdirect_persist(start, size))
		fail("persist");
	set(&log->end, log->end + size);
}

static void show(const struct log *log)
{
	const char *at = (const char *)log + RECORDS, *end = (const char *)log + log->end;
	uint64_t length;

	for (; at < end; at += sizeof(length) + (length + 7) / 8 * 8) {
		memcpy(&length, at, sizeof(length));
		if (length > (uint64_t)(end - at) - sizeof(length))
			fail("the log is damaged");
		printf("%.*s\n", (int)length, at + sizeof(length));
	}
}

int main(int argc, char **argv)
{
	char *line = NULL;
	size_t room = 0;
	ssize_t length;

	if (argc != 3)
		return 2;
	int fd = open(argv[1], O_RDWR | O_CREAT | O_CLOEXEC, 0666);
	if (fd < 0) {
		perror(argv[1]);
		return 1;
	}
	if (mapdirect_prepare(fd, 0, SIZE, MAPDIRECT_GROW))
		fail("prepare");
	mapdirect_accept_page_cache(1);
	struct log *log = mapdirect_mmap(NULL, SIZE, PROT_READ | PROT_WRITE,
					 MAP_SHARED_VALIDATE | MAP_DIRECT, fd, 0);
	if (log == MAP_FAILED)
		fail("map");
	close(fd);
	if (log->magic == 0) {
		set(&log->end, RECORDS);
		set(&log->magic, MAGIC);
	}
	if (log->magic != MAGIC || log->end < RECORDS || log->end > SIZE)
		fail("this is no log");
	if (!strcmp(argv[2], "show")) {
		show(log);
	} else {
		while ((length = getline(&line, &room, stdin)) > 0) {
			length -= line[length - 1] == '\n';
			append(log, line, (uint64_t)length);
			printf("%.*s\n", (int)length, line);
			fflush(stdout);
		}
	}
	free(line);
	return mapdirect_munmap(log, SIZE) ? 1 : 0;
}
