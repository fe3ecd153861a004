/*
 * hs-guest: the load inside the test guests, and its judge.
 *
 *   hs-guest load DIR SEED FILE_THREADS   write until "stop" arrives on stdin; records go to stdout
 *   hs-guest verify DIR SEED              judge what is in DIR; runs in a guest or on the host
 *   hs-guest quick DIR SEED COUNT         write COUNT files of one thread and end
 *
 * What must hold, and `verify` checks of any point-in-time copy of DIR:
 *   1. A file thread writes file n, fsyncs it, renames it to slot n % SLOTS, fsyncs the directory, and only then
 *      prints "file". File n + 1 begins after that. So the slots of a thread always show exactly its newest
 *      SLOTS files up to some n, with no gap, and every byte of them follows from (SEED, thread, n).
 *   2. The block thread overwrites one block of `blocks` at a time with O_DIRECT and waits for it. Which block
 *      write s goes to follows from (SEED, s). So the blocks of a copy are exactly the first S writes, for some S.
 *   3. Numbers printed before a snapshot command was sent are lower bounds of n and S in that snapshot.
 *
 * What it does not check: anything about file system metadata beyond the above; e2fsck does.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum {
	SLOTS = 64,
	THREADS_MAX = 16,
	BLOCK_BYTES = 4096,
	BLOCKS = 2048,
	READ_BLOCKS = 64,
	FILE_WORDS_MIN = 512,
	FILE_WORDS_MAX = 8192, /* 64 KiB */
	HEADER_WORDS = 5,
	PATH_BYTES = 64,
};
#define MAGIC UINT64_C(0x686c66736c767231)

static uint64_t seed;
static atomic_int stopping;
static pthread_mutex_t out_lock = PTHREAD_MUTEX_INITIALIZER;

/* splitmix64: the n-th value of a stream needs no earlier one. */
static uint64_t mix(uint64_t x)
{
	x += UINT64_C(0x9e3779b97f4a7c15);
	x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
	x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
	return x ^ (x >> 31);
}

static uint64_t stream(uint64_t thread, uint64_t number)
{
	return mix(mix(mix(seed) ^ thread) ^ number);
}

/* One record is one write, so records of several threads never mix. */
__attribute__((format(printf, 1, 2))) static void say(const char *format, ...)
{
	char line[256];
	va_list arguments;
	va_start(arguments, format);
	int n = vsnprintf(line, sizeof line, format, arguments);
	va_end(arguments);
	pthread_mutex_lock(&out_lock);
	for (int done = 0; done < n;) {
		ssize_t w = write(STDOUT_FILENO, line + done, (size_t)(n - done));
		if (w < 0 && errno == EINTR)
			continue;
		if (w <= 0)
			_exit(3);
		done += (int)w;
	}
	pthread_mutex_unlock(&out_lock);
}

static int failed(const char *what, uint64_t thread, uint64_t number)
{
	say("error what=%s thread=%llu number=%llu errno=%d (%s)\n", what, (unsigned long long)thread,
	    (unsigned long long)number, errno, strerror(errno));
	return -1;
}

/* ---- counting: what one phase saw ---- */

static struct {
	char name[32];
	uint64_t files, blocks, bytes, longest_file_us, longest_block_us, began_us;
} phase = { .name = "start" };
static pthread_mutex_t phase_lock = PTHREAD_MUTEX_INITIALIZER;

static uint64_t now_us(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000u + (uint64_t)t.tv_nsec / 1000u;
}

/* A file is many requests and several flushes; a block is one request, from submission to completion. */
static void count(int is_file, uint64_t bytes, uint64_t took_us)
{
	pthread_mutex_lock(&phase_lock);
	uint64_t *longest_us = is_file ? &phase.longest_file_us : &phase.longest_block_us;
	*(is_file ? &phase.files : &phase.blocks) += 1;
	phase.bytes += bytes;
	if (took_us > *longest_us)
		*longest_us = took_us;
	pthread_mutex_unlock(&phase_lock);
}

/* Prints what the phase that ends saw. A request counts to the phase in which it ends. */
static void next_phase(const char *name)
{
	pthread_mutex_lock(&phase_lock);
	say("phase name=%s files=%llu blocks=%llu bytes=%llu longest_file_us=%llu longest_block_us=%llu took_us=%llu\n",
	    phase.name, (unsigned long long)phase.files, (unsigned long long)phase.blocks,
	    (unsigned long long)phase.bytes, (unsigned long long)phase.longest_file_us,
	    (unsigned long long)phase.longest_block_us, (unsigned long long)(now_us() - phase.began_us));
	memset(&phase, 0, sizeof phase);
	snprintf(phase.name, sizeof phase.name, "%s", name);
	phase.began_us = now_us();
	pthread_mutex_unlock(&phase_lock);
}

/* ---- files ---- */

static size_t file_words(uint64_t thread, uint64_t number)
{
	return FILE_WORDS_MIN + stream(thread, number) % (FILE_WORDS_MAX - FILE_WORDS_MIN);
}

/* Fills `words` with file `number` and returns how many words it has. */
static size_t file_content(uint64_t *words, uint64_t thread, uint64_t number)
{
	size_t n = file_words(thread, number);
	uint64_t state = stream(thread, number);
	words[0] = MAGIC;
	words[1] = seed;
	words[2] = thread;
	words[3] = number;
	words[4] = n;
	for (size_t i = HEADER_WORDS; i < n; i++)
		words[i] = mix(state + i);
	return n;
}

static uint64_t sum(const uint64_t *words, size_t n)
{
	uint64_t hash = UINT64_C(0xcbf29ce484222325);
	for (size_t i = 0; i < n; i++)
		hash = (hash ^ words[i]) * UINT64_C(0x100000001b3);
	return hash;
}

static int write_whole(int fd, const void *bytes, size_t length)
{
	const char *p = bytes;
	while (length) {
		ssize_t w = write(fd, p, length);
		if (w < 0 && errno == EINTR)
			continue;
		if (w < 0)
			return -1;
		p += w;
		length -= (size_t)w;
	}
	return 0;
}

static void slot_path(char *path, uint64_t thread, uint64_t slot)
{
	snprintf(path, PATH_BYTES, "t%llu/slot%03llu", (unsigned long long)thread, (unsigned long long)slot);
}

static int write_file(uint64_t *words, uint64_t thread, uint64_t number)
{
	char temporary[PATH_BYTES], final[PATH_BYTES], folder[PATH_BYTES];
	snprintf(folder, sizeof folder, "t%llu", (unsigned long long)thread);
	snprintf(temporary, sizeof temporary, "t%llu/new", (unsigned long long)thread);
	slot_path(final, thread, number % SLOTS);
	size_t n = file_content(words, thread, number);
	uint64_t began = now_us();

	int fd = open(temporary, O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0644);
	if (fd < 0)
		return failed("open", thread, number);
	if (write_whole(fd, words, n * 8))
		return failed("write", thread, number);
	if (fsync(fd))
		return failed("fsync", thread, number);
	if (close(fd))
		return failed("close", thread, number);
	if (rename(temporary, final))
		return failed("rename", thread, number);
	int folder_fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (folder_fd < 0 || fsync(folder_fd) || close(folder_fd))
		return failed("fsync-directory", thread, number);
	count(1, n * 8, now_us() - began);
	say("file thread=%llu number=%llu bytes=%zu sum=%016llx\n", (unsigned long long)thread,
	    (unsigned long long)number, n * 8, (unsigned long long)sum(words, n));
	return 0;
}

/* Where thread `thread` goes on: after the newest file it finds. */
static uint64_t newest_number(uint64_t thread)
{
	uint64_t newest = 0;
	for (int slot = 0; slot < SLOTS; slot++) {
		char path[PATH_BYTES];
		uint64_t header[HEADER_WORDS];
		slot_path(path, thread, (uint64_t)slot);
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd < 0)
			continue;
		if (read(fd, header, sizeof header) == (ssize_t)sizeof header && header[3] > newest)
			newest = header[3];
		close(fd);
	}
	return newest;
}

static void *file_thread(void *argument)
{
	uint64_t thread = (uint64_t)(uintptr_t)argument;
	uint64_t *words = malloc(FILE_WORDS_MAX * 8);
	uint64_t number = newest_number(thread);
	while (words && !stopping)
		if (write_file(words, thread, ++number))
			break;
	free(words);
	return NULL;
}

/* ---- blocks ---- */

static uint64_t block_of(uint64_t write_number)
{
	return stream(1u << 20, write_number) % BLOCKS;
}

static void block_content(uint64_t *words, uint64_t write_number, uint64_t block)
{
	uint64_t state = stream(1u << 21, write_number);
	words[0] = MAGIC;
	words[1] = seed;
	words[2] = block;
	words[3] = write_number;
	for (size_t i = 4; i < BLOCK_BYTES / 8; i++)
		words[i] = mix(state + i);
}

/* Block writes start with one of each block, in order, so that the file is whole before the random ones. */
static uint64_t block_of_write(uint64_t write_number)
{
	return write_number < BLOCKS ? write_number : block_of(write_number);
}

static void *block_thread(void *argument)
{
	(void)argument;
	uint64_t *words = aligned_alloc(BLOCK_BYTES, READ_BLOCKS * BLOCK_BYTES);
	uint64_t number = 0;
	int fd = open("blocks", O_RDWR | O_DIRECT | O_CLOEXEC);
	if (fd < 0) {
		failed("open-blocks", 0, 0);
		return NULL;
	}
	/* Goes on after the newest write it finds. */
	for (uint64_t block = 0; words && block < BLOCKS; block++) {
		uint64_t at = block % READ_BLOCKS * (BLOCK_BYTES / 8);
		if (at == 0 && pread(fd, words, READ_BLOCKS * BLOCK_BYTES, (off_t)(block * BLOCK_BYTES)) !=
				       READ_BLOCKS * BLOCK_BYTES) {
			failed("read-blocks", 0, block);
			return NULL;
		}
		if (words[at + 3] > number)
			number = words[at + 3];
	}
	while (words && !stopping) {
		uint64_t block = block_of_write(++number);
		block_content(words, number, block);
		uint64_t began = now_us();
		ssize_t w = pwrite(fd, words, BLOCK_BYTES, (off_t)(block * BLOCK_BYTES));
		if (w != BLOCK_BYTES) {
			failed("write-block", 0, number);
			break;
		}
		count(0, BLOCK_BYTES, now_us() - began);
		if (number % 16 == 0)
			say("block number=%llu\n", (unsigned long long)number);
	}
	close(fd);
	free(words);
	return NULL;
}

/* The first writes of every block: done before the load begins, so that no file extent changes later. */
static int prepare(uint64_t threads)
{
	char path[PATH_BYTES];
	for (uint64_t t = 0; t < threads; t++) {
		snprintf(path, sizeof path, "t%llu", (unsigned long long)t);
		if (mkdir(path, 0755) && errno != EEXIST)
			return failed("mkdir", t, 0);
	}
	if (access("blocks", F_OK) == 0)
		return 0;
	uint64_t words[BLOCK_BYTES / 8];
	int fd = open("blocks", O_CREAT | O_WRONLY | O_CLOEXEC, 0644);
	if (fd < 0)
		return failed("create-blocks", 0, 0);
	for (uint64_t n = 0; n < BLOCKS; n++) {
		block_content(words, n, n);
		if (write_whole(fd, words, sizeof words))
			return failed("fill-blocks", 0, n);
	}
	if (fsync(fd) || close(fd))
		return failed("sync-blocks", 0, 0);
	sync();
	return 0;
}

static int load(uint64_t threads)
{
	pthread_t handle[THREADS_MAX + 1];
	char line[64];
	if (threads > THREADS_MAX || prepare(threads))
		return 1;
	phase.began_us = now_us();
	say("load-began\n");
	for (uint64_t t = 0; t < threads; t++)
		pthread_create(&handle[t], NULL, file_thread, (void *)(uintptr_t)t);
	pthread_create(&handle[threads], NULL, block_thread, NULL);
	/* stdin is a virtio-serial port or a terminal; a command is one line: "phase NAME" or "stop". */
	while (fgets(line, sizeof line, stdin)) {
		line[strcspn(line, "\n")] = 0;
		if (!strncmp(line, "phase ", 6))
			next_phase(line + 6);
		else if (!strcmp(line, "stop"))
			break;
	}
	stopping = 1;
	for (uint64_t t = 0; t <= threads; t++)
		pthread_join(handle[t], NULL);
	next_phase("end");
	say("load-ended\n");
	return 0;
}

/* ---- verify ---- */

static int complaints;

__attribute__((format(printf, 1, 2))) static void complain(const char *format, ...)
{
	char text[200];
	va_list arguments;
	va_start(arguments, format);
	vsnprintf(text, sizeof text, format, arguments);
	va_end(arguments);
	if (complaints++ < 20)
		say("wrong %s\n", text);
}

/* Returns the number of the whole, correct file in this slot, or 0. */
static uint64_t verify_slot(uint64_t thread, int slot, uint64_t *found, uint64_t *expected)
{
	char path[PATH_BYTES];
	slot_path(path, thread, (uint64_t)slot);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0) {
		if (errno != ENOENT)
			complain("%s: %s", path, strerror(errno));
		return 0;
	}
	size_t length = 0;
	for (ssize_t r; length < FILE_WORDS_MAX * 8;) {
		r = read(fd, (char *)found + length, FILE_WORDS_MAX * 8 - length);
		if (r < 0)
			complain("%s: read: %s", path, strerror(errno));
		if (r <= 0)
			break;
		length += (size_t)r;
	}
	close(fd);
	if (length < HEADER_WORDS * 8 || found[0] != MAGIC || found[1] != seed || found[2] != thread ||
	    found[3] % SLOTS != (uint64_t)slot) {
		complain("%s: not a file of this load (%zu bytes)", path, length);
		return 0;
	}
	uint64_t number = found[3];
	size_t n = file_content(expected, thread, number);
	if (length != n * 8 || memcmp(found, expected, length)) {
		complain("%s: file %llu has other content than was written", path, (unsigned long long)number);
		return 0;
	}
	return number;
}

static void verify_thread(uint64_t thread)
{
	static uint64_t found[FILE_WORDS_MAX], expected[FILE_WORDS_MAX];
	uint64_t numbers[SLOTS], newest = 0;
	for (int slot = 0; slot < SLOTS; slot++) {
		numbers[slot] = verify_slot(thread, slot, found, expected);
		if (numbers[slot] > newest)
			newest = numbers[slot];
	}
	uint64_t oldest = newest >= SLOTS ? newest - SLOTS + 1 : 1;
	for (uint64_t n = oldest; n <= newest; n++)
		if (numbers[n % SLOTS] != n)
			complain("thread %llu: file %llu is there, older file %llu is not", (unsigned long long)thread,
				 (unsigned long long)newest, (unsigned long long)n);
	say("verified thread=%llu newest=%llu files=%llu\n", (unsigned long long)thread, (unsigned long long)newest,
	    (unsigned long long)(newest ? newest - oldest + 1 : 0));
}

static void verify_blocks(void)
{
	static uint64_t seen[BLOCKS], last[BLOCKS], words[BLOCK_BYTES / 8], expected[BLOCK_BYTES / 8];
	uint64_t newest = 0;
	int fd = open("blocks", O_RDONLY | O_CLOEXEC);
	if (fd < 0) {
		if (errno != ENOENT)
			complain("blocks: %s", strerror(errno));
		return;
	}
	for (uint64_t block = 0; block < BLOCKS; block++) {
		if (pread(fd, words, sizeof words, (off_t)(block * BLOCK_BYTES)) != (ssize_t)sizeof words) {
			complain("block %llu cannot be read", (unsigned long long)block);
			continue;
		}
		block_content(expected, words[3], block);
		if (memcmp(words, expected, sizeof words))
			complain("block %llu has content that was never written there", (unsigned long long)block);
		seen[block] = words[3];
		if (words[3] > newest)
			newest = words[3];
	}
	close(fd);
	/* Replay: after the first `newest` writes, each block must hold the last of them that went to it. */
	if (newest < UINT64_C(1) << 32)
		for (uint64_t n = 0; n <= newest; n++)
			last[block_of_write(n)] = n;
	for (uint64_t block = 0; block < BLOCKS; block++)
		if (seen[block] != last[block])
			complain("block %llu holds write %llu; with write %llu in, it must hold %llu",
				 (unsigned long long)block, (unsigned long long)seen[block],
				 (unsigned long long)newest, (unsigned long long)last[block]);
	say("verified blocks newest=%llu\n", (unsigned long long)newest);
}

static int verify(void)
{
	DIR *d = opendir(".");
	int threads = 0;
	if (!d)
		return failed("open-directory", 0, 0), 1;
	for (struct dirent *e; (e = readdir(d));)
		if (e->d_name[0] == 't' && e->d_name[1] >= '0' && e->d_name[1] <= '9') {
			verify_thread(strtoull(e->d_name + 1, NULL, 10));
			threads++;
		}
	closedir(d);
	if (!threads)
		complain("nothing of this load is here");
	verify_blocks();
	say("verify-ended complaints=%d\n", complaints);
	return complaints != 0;
}

static int quick(uint64_t files)
{
	uint64_t *words = malloc(FILE_WORDS_MAX * 8);
	if (!words || (mkdir("t0", 0755) && errno != EEXIST))
		return failed("mkdir", 0, 0), 1;
	uint64_t number = newest_number(0);
	for (uint64_t i = 0; i < files; i++)
		if (write_file(words, 0, ++number))
			return 1;
	free(words);
	return 0;
}

int main(int argc, char **argv)
{
	const char *job = argc > 1 ? argv[1] : "";
	if (argc > 3) {
		if (chdir(argv[2])) {
			perror(argv[2]);
			return 1;
		}
		seed = strtoull(argv[3], NULL, 10);
	}
	if (!strcmp(job, "load") && argc == 5)
		return load(strtoull(argv[4], NULL, 10));
	if (!strcmp(job, "verify") && argc == 4)
		return verify();
	if (!strcmp(job, "quick") && argc == 5)
		return quick(strtoull(argv[4], NULL, 10));
	fputs("usage: hs-guest load DIR SEED FILE_THREADS | verify DIR SEED | quick DIR SEED COUNT\n", stderr);
	return 2;
}
