// Makes one system call of a process fail, stop, kill or lie: an LD_PRELOAD library, armed by fault_arm().
//
//   call:at:action:value:match     the at-th call of that name (or "any") on a path that contains match
//
//   kill      SIGKILL before the call                     error    the call fails once with errno value
//   errors    it and every later one fail with value      short    half of the bytes are written or read
//   delay     it takes value more milliseconds            signal   signal number value arrives before the call
//
// fault_refuse() makes a filesystem that lacks something: ",renameat2=38,flock=95," always fails these with these errno values, and
// ",flock=0," pretends that it succeeded, as a flock does that is local to each host. fault_skew() sets the clock wrong.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static struct { atomic_int calls, fired; } *shared;
static char call[32], action[16], match[4000], refused[256];
static int armed, at, value, skew_s;

__attribute__((constructor)) static void begin(void) {
    shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}
int fault_calls(void) { return shared->calls; }
int fault_fired(void) { return shared->fired; }
void fault_arm(const char *spec) {
    shared->calls = shared->fired = 0;
    armed = sscanf(spec, "%31[^:]:%d:%15[^:]:%d:%3999s", call, &at, action, &value, match) == 5;
}

void fault_skew(int seconds) { skew_s = seconds; }
void fault_refuse(const char *names) { snprintf(refused, sizeof refused, "%s", names); }

enum { PROCEED, FAIL, SHORT };

static int refuses(const char *name) {
    char wanted[40];
    snprintf(wanted, sizeof wanted, ",%s=", name);
    const char *found = strstr(refused, wanted);
    if (found) errno = atoi(found + strlen(wanted));
    return found != NULL;
}

static int fault(const char *name, const char *path, const char *other) {
    if (refused[0] && refuses(name)) return FAIL;
    if (!armed || (strcmp(call, "any") && strcmp(call, name))) return PROCEED;
    if (!((path && strstr(path, match)) || (other && strstr(other, match)))) return PROCEED;
    int count = atomic_fetch_add(&shared->calls, 1) + 1;
    int sticky = !strcmp(action, "errors");
    if (count != at && !(sticky && count > at)) return PROCEED;
    shared->fired = 1;
    if (!strcmp(action, "kill")) syscall(SYS_kill, getpid(), SIGKILL);
    if (!strcmp(action, "signal") && value == SIGSTOP) syscall(SYS_tgkill, getpid(), syscall(SYS_gettid), value);
    else if (!strcmp(action, "signal")) syscall(SYS_kill, getpid(), value);
    if (!strcmp(action, "short")) return SHORT;
    if (!strcmp(action, "delay")) {
        struct timespec wait = {value / 1000, value % 1000 * 1000000L};
        nanosleep(&wait, NULL);
    }
    if (sticky || !strcmp(action, "error")) { errno = value; return FAIL; }
    return PROCEED;
}
static int fault_fd(const char *name, int fd) {
    char link[64], path[4096] = "";
    if (!armed && !refused[0]) return PROCEED;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
    if (n > 0) path[n] = 0;
    return fault(name, path, NULL);
}
static int fault_at(const char *name, int fd, const char *path) {
    char link[64], folder[4096] = "", whole[8300];
    if (!armed && !refused[0]) return PROCEED;
    if (path[0] == '/') return fault(name, path, NULL);
    if (fd == AT_FDCWD) { if (!getcwd(folder, sizeof folder)) folder[0] = 0; }
    else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t n = syscall(SYS_readlinkat, AT_FDCWD, link, folder, sizeof folder - 1);
        if (n > 0) folder[n] = 0;
    }
    snprintf(whole, sizeof whole, "%s/%s", folder, path);
    return fault(name, whole, NULL);
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define SIZED(type, name, label, buffer_type, offset_type)                             \
    type name(int fd, buffer_type buffer, size_t size, offset_type offset) {           \
        REAL(name);                                                                    \
        int what = fault_fd(label, fd);                                                \
        if (what == FAIL) return -1;                                                   \
        return real(fd, buffer, what == SHORT && size > 1 ? size / 2 : size, offset);  \
    }
SIZED(ssize_t, pwrite, "pwrite", const void *, off_t)
SIZED(ssize_t, pwrite64, "pwrite", const void *, off64_t)
SIZED(ssize_t, pread, "pread", void *, off_t)
SIZED(ssize_t, pread64, "pread", void *, off64_t)

#define VECTOR(name, offset_type)                                                     \
    ssize_t name(int fd, const struct iovec *parts, int count, offset_type offset, int flags) {  \
        REAL(name);                                                                   \
        int what = fault_fd("pread", fd);                                             \
        if (what == FAIL) return -1;                                                  \
        struct iovec half = parts[0];                                                 \
        half.iov_len = half.iov_len > 1 ? half.iov_len / 2 : half.iov_len;            \
        return what == SHORT ? real(fd, &half, 1, offset, flags) : real(fd, parts, count, offset, flags); \
    }
VECTOR(preadv2, off_t)
VECTOR(preadv64v2, off64_t)

#define ON_FD(name, label, declared, passed) \
    int name declared { REAL(name); return fault_fd(label, fd) == FAIL ? (errno ? -1 : 0) : real passed; }
ON_FD(fsync, "fsync", (int fd), (fd))
ON_FD(fdatasync, "fsync", (int fd), (fd))
ON_FD(flock, "flock", (int fd, int how), (fd, how))
ON_FD(ftruncate, "ftruncate", (int fd, off_t size), (fd, size))
ON_FD(ftruncate64, "ftruncate", (int fd, off64_t size), (fd, size))
ON_FD(fallocate, "fallocate", (int fd, int mode, off_t offset, off_t size), (fd, mode, offset, size))
ON_FD(fallocate64, "fallocate", (int fd, int mode, off64_t offset, off64_t size), (fd, mode, offset, size))

#define ON_PATH(name, label, declared, passed) \
    int name declared { REAL(name); return fault_at(label, AT_FDCWD, path) == FAIL ? (errno ? -1 : 0) : real passed; }
ON_PATH(mkdir, "mkdir", (const char *path, mode_t mode), (path, mode))
ON_PATH(unlink, "unlink", (const char *path), (path))
ON_PATH(rmdir, "rmdir", (const char *path), (path))

int unlinkat(int fd, const char *path, int flags) {
    REAL(unlinkat);
    return fault_at("unlink", fd, path) == FAIL ? -1 : real(fd, path, flags);
}

static int fault_rename(const char *from, const char *to) {
    char whole[2][8300], folder[4096];
    if (!armed && !refused[0]) return PROCEED;
    if (!getcwd(folder, sizeof folder)) folder[0] = 0;
    snprintf(whole[0], sizeof whole[0], "%s%s%s", from[0] == '/' ? "" : folder, from[0] == '/' ? "" : "/", from);
    snprintf(whole[1], sizeof whole[1], "%s%s%s", to[0] == '/' ? "" : folder, to[0] == '/' ? "" : "/", to);
    struct stat status;
    int is_folder = !stat(from, &status) && S_ISDIR(status.st_mode);
    return fault(is_folder ? "renamedir" : "rename", whole[0], whole[1]);
}
int rename(const char *from, const char *to) {
    REAL(rename);
    return fault_rename(from, to) == FAIL ? -1 : real(from, to);
}
int renameat2(int fd, const char *from, int to_fd, const char *to, unsigned flags) {
    REAL(renameat2);
    if (refuses("renameat2")) return -1;
    return fault_rename(from, to) == FAIL ? -1 : real(fd, from, to_fd, to, flags);
}

#define OPEN(name)                                                                    \
    int name(const char *path, int flags, ...) {                                      \
        REAL(name);                                                                   \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        return fault_at("open", AT_FDCWD, path) == FAIL ? -1 : real(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)
#define OPENAT(name)                                                                  \
    int name(int fd, const char *path, int flags, ...) {                              \
        REAL(name);                                                                   \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        return fault_at("open", fd, path) == FAIL ? -1 : real(fd, path, flags, mode);  \
    }
OPENAT(openat)
OPENAT(openat64)

int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(clock_gettime);
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += skew_s;
    return result;
}
