/* Faults for torture.py, preloaded into the process that its commands are forked from.
 *
 * Nothing happens until a fork calls faults_arm. From then on, writes below one folder and reads below another are
 * counted, and may be slow, fail or send a signal; clocks jump if faults_jump was called. Calls that libc makes for itself (fwrite) and
 * memory maps are not seen.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { WRITES = 1, READS = 2, REMOVALS = 4 };

static char written[PATH_MAX], read_from[PATH_MAX];
static int kinds;            /* of calls that may fail */
static long first;           /* the call that is the first to fail, from 1 */
static int lasting;          /* whether all later ones fail too */
static int failure;          /* their errno; 0: none fails; below 0: a signal to this process before the call */
static unsigned delay;       /* of each call, in microseconds, at most */
static atomic_long counts[5]; /* of each kind */
static atomic_uint state = 1;
static atomic_int jumping;
static atomic_long offset;   /* of the clock, in seconds */

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

void faults_arm(const char *out, const char *in, int which, long first_to_fail, int all_later, int error,
                unsigned microseconds)
{
    snprintf(written, sizeof written, "%s/", out);
    snprintf(read_from, sizeof read_from, "%s/", in);
    first = first_to_fail, lasting = all_later, failure = error, delay = microseconds;
    kinds = which;
}

long faults_count(int kind) { return counts[kind]; }

void faults_jump(unsigned seed)
{
    state = seed * 2654435761u + 1;
    jumping = 1;
}

static unsigned draw(void) { return (state = state * 1664525u + 1013904223u) >> 8; }

static int fails(int kind, const char *path)
{
    const char *folder = kind == READS ? read_from : written;
    if (!(kinds & kind) || strncmp(path, folder, strlen(folder)))
        return 0;
    if (delay)
        usleep(draw() % delay);
    long number = ++counts[kind] + (kind == WRITES ? counts[REMOVALS] : kind == REMOVALS ? counts[WRITES] : 0);
    if (!failure || (lasting ? number < first : number != first))
        return 0;
    if (failure < 0) {
        kill(getpid(), -failure);
        return 0;
    }
    errno = failure;
    return 1;
}

static int fails_fd(int kind, int descriptor)
{
    char link[64], path[PATH_MAX];
    if (!(kinds & kind))
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    return fails(kind, path);
}

static int fails_at(int kind, int at, const char *name)
{
    char link[64], path[2 * PATH_MAX];
    if (!(kinds & kind) || !name)
        return 0;
    if (name[0] == '/')
        return fails(kind, name);
    snprintf(link, sizeof link, at == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", at);
    ssize_t length = readlink(link, path, PATH_MAX);
    if (length < 0)
        return 0;
    snprintf(path + length, sizeof path - length, "/%s", name);
    return fails(kind, path);
}

#define ON_FILE(type, name, kind, parameters, arguments, descriptor) \
    type name parameters { return fails_fd(kind, descriptor) ? -1 : REAL(name) arguments; }

ON_FILE(ssize_t, write, WRITES, (int f, const void *b, size_t n), (f, b, n), f)
ON_FILE(ssize_t, pwrite, WRITES, (int f, const void *b, size_t n, off_t o), (f, b, n, o), f)
ON_FILE(ssize_t, pwrite64, WRITES, (int f, const void *b, size_t n, off64_t o), (f, b, n, o), f)
ON_FILE(ssize_t, writev, WRITES, (int f, const struct iovec *v, int n), (f, v, n), f)
ON_FILE(int, ftruncate, WRITES, (int f, off_t n), (f, n), f)
ON_FILE(int, ftruncate64, WRITES, (int f, off64_t n), (f, n), f)
ON_FILE(int, fsync, WRITES, (int f), (f), f)
ON_FILE(int, fdatasync, WRITES, (int f), (f), f)
ON_FILE(ssize_t, read, READS, (int f, void *b, size_t n), (f, b, n), f)
ON_FILE(ssize_t, pread, READS, (int f, void *b, size_t n, off_t o), (f, b, n, o), f)
ON_FILE(ssize_t, pread64, READS, (int f, void *b, size_t n, off64_t o), (f, b, n, o), f)

#define ON_NAME(name, kind, parameters, arguments, at, path) \
    int name parameters { return fails_at(kind, at, path) ? -1 : REAL(name) arguments; }

ON_NAME(rename, WRITES, (const char *a, const char *b), (a, b), AT_FDCWD, b)
ON_NAME(renameat, WRITES, (int i, const char *a, int j, const char *b), (i, a, j, b), j, b)
ON_NAME(mkdir, WRITES, (const char *p, mode_t m), (p, m), AT_FDCWD, p)
ON_NAME(mkdirat, WRITES, (int i, const char *p, mode_t m), (i, p, m), i, p)
ON_NAME(unlink, REMOVALS, (const char *p), (p), AT_FDCWD, p)
ON_NAME(unlinkat, REMOVALS, (int i, const char *p, int f), (i, p, f), i, p)
ON_NAME(rmdir, REMOVALS, (const char *p), (p), AT_FDCWD, p)

#define OPENS(flags) (((flags) & (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR)) ? WRITES : READS)
#define MODE \
    mode_t mode = 0; \
    if (flags & (O_CREAT | __O_TMPFILE)) { \
        va_list more; \
        va_start(more, flags); \
        mode = va_arg(more, mode_t); \
        va_end(more); \
    }
#define OPEN(name) \
    int name(const char *path, int flags, ...) \
    { MODE return fails_at(OPENS(flags), AT_FDCWD, path) ? -1 : REAL(name)(path, flags, mode); }
#define OPENAT(name) \
    int name(int at, const char *path, int flags, ...) \
    { MODE return fails_at(OPENS(flags), at, path) ? -1 : REAL(name)(at, path, flags, mode); }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

FILE *fopen(const char *path, const char *mode)
{
    int kind = strpbrk(mode, "wa+") ? WRITES : READS;
    return fails_at(kind, AT_FDCWD, path) ? NULL : REAL(fopen)(path, mode);
}

FILE *fopen64(const char *path, const char *mode)
{
    int kind = strpbrk(mode, "wa+") ? WRITES : READS;
    return fails_at(kind, AT_FDCWD, path) ? NULL : REAL(fopen64)(path, mode);
}

/* How far the clock is off now: every eighth time it jumps, to within a day. */
static long jump(void)
{
    if (!jumping)
        return 0;
    if (draw() % 8 == 0)
        offset = (long)(draw() % (2 * 86400)) - 86400;
    return offset;
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    static __typeof__(&clock_gettime) real;
    if (!real)
        real = REAL(clock_gettime);
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)
        now->tv_sec += jump();
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    int result = REAL(gettimeofday)(now, zone);
    now->tv_sec += jump();
    return result;
}

time_t time(time_t *result)
{
    time_t now = REAL(time)(NULL) + jump();
    if (result)
        *result = now;
    return now;
}
