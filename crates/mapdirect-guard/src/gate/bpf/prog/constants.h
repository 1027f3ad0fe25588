// SPDX-License-Identifier: (MIT OR Apache-2.0) OR GPL-2.0
//
// Written by `cargo xtask bpf` from constants.rs, which says what these mean.
// Do not edit it.

enum kind {
	READ = 0,
	OPEN_READ = 1,
	MAP_READ = 2,
	MAP_WRITE = 3,
	OPEN_WRITE = 4,
	OPEN_TRUNCATE = 5,
	WRITE = 6,
	WRITE_UNTORN = 7,
	TRUNCATE = 8,
	ALLOCATE = 9,
	ALLOCATE_KEEP_SIZE = 10,
	PUNCH_HOLE = 11,
	ZERO_RANGE = 12,
	WRITE_ZEROES = 13,
	UNSHARE_RANGE = 14,
	COLLAPSE_RANGE = 15,
	INSERT_RANGE = 16,
	RESHAPE = 17,
	CLONE = 18,
	DEDUPE = 19,
	COPY_RANGE = 20,
	EXCHANGE = 21,
	UNKNOWN = 22,
};

enum reach {
	NOTHING = 0,
	RANGE = 1,
	TO_THE_END = 2,
	BEYOND_SIZE = 3,
	EVERYTHING = 4,
};

enum meets {
	MEETS_FROZEN = 0,
	MEETS_ANY = 1,
};

enum lets_go {
	LETS_GO_NOTHING = 0,
	LETS_GO_RANGE = 1,
	LETS_GO_TO_THE_END = 2,
	LETS_GO_RANGE_IF_DIRECT = 3,
};

enum doing {
	ANYTHING = 0,
	READING = 1,
	WRITING = 2,
	ALLOCATING = 3,
	REMAPPING = 4,
	COPYING = 5,
	ASYNCHRONOUS = 6,
};

enum list {
	PINNED = 0,
	FROZEN = 1,
	BESIDE = 2,
	SHARED = 3,
	WINDOW = 4,
	HELD = 5,
	MAPPED = 6,
	AHEAD = 7,
	EDGES = 8,
	COARSE = 9,
};

#define LISTS 10
#define KINDS 32
#define UNTOLD 31
#define FUNCTIONS 64
#define INLINE 6
#define REFLINK 1
#define HAS_FROZEN 2
#define CACHED 4
#define FAILING_FREES 8
#define WRITES_PASS 16
#define WINDOWED 32
#define CAN_SLEEP 64
#define UNSHARES 128
#define FILTER_BITS 18
#define FILTER_WORDS 4096
#define EASY 1
#define PIN_FACTS 192
#define HANDLE 72
#define TEND_LOOK 0
#define TEND_DISTURB 1
#define TEND_QUIET 2
#define TEND_TELL 3
#define TEND_DISOWN 4
#define EVENT_REFUSED 1
#define EVENT_ENDED 2
#define EVENT_RAW 3
#define EVENT_DOUBT 4
#define FILTER_MULTIPLIER 0x9e3779b97f4a7c15ULL
#define DEAD 0x8000000000000000ULL
#define WAKING 0x4000000000000000ULL
#define WHO_IS_IT 0x6d61706469726563ULL
#define IS_IT_PIN 0x6d64000000000000ULL
#define PIN_NUMBER 0xffffffffffffULL
#define PAGE 0x1000ULL
#define LARGEST_BLOCK 0x10000ULL
