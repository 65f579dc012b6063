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
// fault_record() writes every call that succeeds in changing something below a folder to a descriptor, for power.py.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { PATH = 8300 };  // a folder and a name below it
static struct { atomic_int calls, fired; } *shared;
static char call[32], action[16], match[4000], refused[256], recorded[4000];
static int armed, at, value, skew_s, record_fd = -1;
static atomic_flag recording = ATOMIC_FLAG_INIT;

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
void fault_record(const char *folder, int fd) {
    snprintf(recorded, sizeof recorded, "%s", folder);
    record_fd = fd;
}

// --- Paths

static int is_watched(void) { return armed || refused[0] || record_fd >= 0; }

static const char *of_fd(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH - 1);
    path[n > 0 ? n : 0] = 0;
    return path;
}

static const char *whole(int fd, const char *path, char *result) {
    result[0] = 0;
    if (path[0] != '/') {
        if (fd != AT_FDCWD) of_fd(fd, result);
        else if (!getcwd(result, PATH)) result[0] = 0;
        strncat(result, "/", PATH - 1 - strlen(result));
    }
    return strncat(result, path, PATH - 1 - strlen(result));
}

// --- Faults

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
    char path[PATH];
    return is_watched() ? fault(name, of_fd(fd, path), NULL) : PROCEED;
}
static int fault_at(const char *name, int fd, const char *path) {
    char result[PATH];
    return is_watched() ? fault(name, whole(fd, path, result), NULL) : PROCEED;
}

// --- The record: calls one after the other, each with its effect

static void lock(void) { while (record_fd >= 0 && atomic_flag_test_and_set(&recording)) usleep(50); }
static void unlock(void) { if (record_fd >= 0) atomic_flag_clear(&recording); }

static int is_recorded(const char *path) {
    size_t size = strlen(recorded);
    return path && !strncmp(path, recorded, size) && (path[size] == '/' || !path[size]);
}

// One entry: the head, then path, other and data. `a` and `b`: offset or size, mtime in ns; inode of what is created or synced.
static void note(const char *kind, const char *path, const char *other, int64_t a, int64_t b, const void *data, size_t size) {
    int number = errno;
    if (record_fd >= 0 && (is_recorded(path) || is_recorded(other))) {
        struct { char kind[8]; int64_t a, b; uint32_t path, other, data, unused; } head = {.a = a, .b = b};
        strncpy(head.kind, kind, sizeof head.kind - 1);
        head.path = strlen(path);
        head.other = other ? strlen(other) : 0;
        head.data = size;
        struct iovec parts[] = {{&head, sizeof head}, {(void *)path, head.path}, {(void *)other, head.other}, {(void *)data, size}};
        if (syscall(SYS_writev, record_fd, parts, 4) < 0) abort();
    }
    errno = number;
}
static void note_fd(const char *kind, int fd, int64_t a, const void *data, size_t size) {
    char path[PATH];
    struct stat status = {0};
    if (record_fd < 0) return;
    if (!strcmp(kind, "fsync")) {
        fstat(fd, &status);
        a = status.st_mtim.tv_sec * 1000000000L + status.st_mtim.tv_nsec;
    }
    note(kind, of_fd(fd, path), NULL, a, status.st_ino, data, size);
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

// --- Reading and writing

#define PREAD(name, offset_type)                                                       \
    ssize_t name(int fd, void *buffer, size_t size, offset_type offset) {              \
        REAL(name);                                                                    \
        int what = fault_fd("pread", fd);                                              \
        return what == FAIL ? -1 : real(fd, buffer, what == SHORT && size > 1 ? size / 2 : size, offset);  \
    }
PREAD(pread, off_t)
PREAD(pread64, off64_t)

#define PWRITE(name, offset_type)                                                      \
    ssize_t name(int fd, const void *buffer, size_t size, offset_type offset) {        \
        REAL(name);                                                                    \
        int what = fault_fd("pwrite", fd);                                             \
        if (what == FAIL) return -1;                                                   \
        lock();                                                                        \
        ssize_t done = real(fd, buffer, what == SHORT && size > 1 ? size / 2 : size, offset);  \
        if (done > 0) note_fd("write", fd, offset, buffer, done);                      \
        unlock();                                                                      \
        return done;                                                                   \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t write(int fd, const void *buffer, size_t size) {
    REAL(write);
    if (fault_fd("write", fd) == FAIL) return -1;
    lock();
    ssize_t done = real(fd, buffer, size);
    if (done > 0 && record_fd >= 0) note_fd("write", fd, lseek(fd, 0, SEEK_CUR) - done, buffer, done);
    unlock();
    return done;
}

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

#define ON_FD(name, label, kind, size, declared, passed)                              \
    int name declared {                                                               \
        REAL(name);                                                                   \
        if (fault_fd(label, fd) == FAIL) return errno ? -1 : 0;                       \
        lock();                                                                       \
        int result = real passed;                                                     \
        if (!result && kind[0]) note_fd(kind, fd, size, NULL, 0);                     \
        unlock();                                                                     \
        return result;                                                                \
    }
ON_FD(fsync, "fsync", "fsync", 0, (int fd), (fd))
ON_FD(fdatasync, "fsync", "fsync", 0, (int fd), (fd))
ON_FD(ftruncate, "ftruncate", "size", size, (int fd, off_t size), (fd, size))
ON_FD(ftruncate64, "ftruncate", "size", size, (int fd, off64_t size), (fd, size))
ON_FD(fallocate, "fallocate", "grow", offset + size, (int fd, int mode, off_t offset, off_t size), (fd, mode, offset, size))
ON_FD(fallocate64, "fallocate", "grow", offset + size, (int fd, int mode, off64_t offset, off64_t size), (fd, mode, offset, size))

int flock(int fd, int how) {  // may wait: so it is never recorded
    REAL(flock);
    return fault_fd("flock", fd) == FAIL ? (errno ? -1 : 0) : real(fd, how);
}

// --- Names

int mkdirat(int fd, const char *path, mode_t mode) {
    REAL(mkdirat);
    char name[PATH];
    struct stat status;
    if (fault_at("mkdir", fd, path) == FAIL) return errno ? -1 : 0;
    lock();
    int result = real(fd, path, mode);
    if (!result && record_fd >= 0 && !fstatat(fd, path, &status, AT_SYMLINK_NOFOLLOW))
        note("mkdir", whole(fd, path, name), NULL, 0, status.st_ino, NULL, 0);
    unlock();
    return result;
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

static int remove_name(const char *label, int fd, const char *path, int flags) {
    static int (*real)(int, const char *, int);
    char name[PATH];
    if (!real) real = dlsym(RTLD_NEXT, "unlinkat");
    if (fault_at(label, fd, path) == FAIL) return errno ? -1 : 0;
    lock();
    int result = real(fd, path, flags);
    if (!result && record_fd >= 0) note("unlink", whole(fd, path, name), NULL, 0, 0, NULL, 0);
    unlock();
    return result;
}
int unlinkat(int fd, const char *path, int flags) { return remove_name("unlink", fd, path, flags); }
int unlink(const char *path) { return remove_name("unlink", AT_FDCWD, path, 0); }
int rmdir(const char *path) { return remove_name("rmdir", AT_FDCWD, path, AT_REMOVEDIR); }

static int rename_names(int fd, const char *from, int to_fd, const char *to, unsigned flags, int is_new) {
    static int (*real)(int, const char *, int, const char *, unsigned);
    char names[2][PATH];
    struct stat status;
    if (!real) real = dlsym(RTLD_NEXT, "renameat2");
    if (is_new && refuses("renameat2")) return -1;
    if (is_watched()) {
        int is_folder = !fstatat(fd, from, &status, AT_SYMLINK_NOFOLLOW) && S_ISDIR(status.st_mode);
        whole(fd, from, names[0]);
        whole(to_fd, to, names[1]);
        if (fault(is_folder ? "renamedir" : "rename", names[0], names[1]) == FAIL) return -1;
    }
    lock();
    int result = real(fd, from, to_fd, to, flags);
    if (!result && record_fd >= 0) note(flags & RENAME_EXCHANGE ? "swap" : "rename", names[0], names[1], 0, 0, NULL, 0);
    unlock();
    return result;
}
int rename(const char *from, const char *to) { return rename_names(AT_FDCWD, from, AT_FDCWD, to, 0, 0); }
int renameat(int fd, const char *from, int to_fd, const char *to) { return rename_names(fd, from, to_fd, to, 0, 0); }
int renameat2(int fd, const char *from, int to_fd, const char *to, unsigned flags) {
    return rename_names(fd, from, to_fd, to, flags, 1);
}

int linkat(int fd, const char *from, int to_fd, const char *to, int flags) {
    REAL(linkat);
    char names[2][PATH];
    if (fault_at("link", to_fd, to) == FAIL) return errno ? -1 : 0;
    lock();
    int result = real(fd, from, to_fd, to, flags);
    if (!result && record_fd >= 0) note("link", whole(fd, from, names[0]), whole(to_fd, to, names[1]), 0, 0, NULL, 0);
    unlock();
    return result;
}
int link(const char *from, const char *to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }

static int open_name(int (*real)(int, const char *, int, ...), int fd, const char *path, int flags, mode_t mode) {
    char name[PATH];
    struct stat status;
    if (fault_at("open", fd, path) == FAIL) return -1;
    lock();
    int was_there = record_fd < 0 || !(flags & O_CREAT) || !fstatat(fd, path, &status, 0);
    int result = real(fd, path, flags, mode);
    if (result >= 0 && !was_there && !fstat(result, &status))
        note("create", whole(fd, path, name), NULL, 0, status.st_ino, NULL, 0);
    else if (result >= 0 && record_fd >= 0 && flags & O_TRUNC) note("size", whole(fd, path, name), NULL, 0, 0, NULL, 0);
    unlock();
    return result;
}
static mode_t mode_of(int flags, va_list rest) { return flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; }
#define OPENAT(name, declared, fd)                                                    \
    int name declared {                                                               \
        static int (*real)(int, const char *, int, ...);                              \
        if (!real) real = dlsym(RTLD_NEXT, "openat64");                               \
        va_list rest; va_start(rest, flags); mode_t mode = mode_of(flags, rest); va_end(rest); \
        return open_name(real, fd, path, flags, mode);                                \
    }
OPENAT(open, (const char *path, int flags, ...), AT_FDCWD)
OPENAT(open64, (const char *path, int flags, ...), AT_FDCWD)
OPENAT(openat, (int fd, const char *path, int flags, ...), fd)
OPENAT(openat64, (int fd, const char *path, int flags, ...), fd)

// --- The clock

int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(clock_gettime);
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += skew_s;
    return result;
}
