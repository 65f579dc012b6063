// For `linux.uml`, an LD_PRELOAD library: the user-mode Linux of Debian 12 has room for 2.7 kB of a processor's registers, and
// PTRACE_SETREGSET wants all of them, which are 11 kB where there is AMX ("ptrace set fp regs failed, errno = 14"). Those
// that it does not know are set as they were.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>

enum { KNOWN = 0xff, HEADER = 512 };  // the parts up to AVX-512; the mask of those in use comes after 512 bytes

long ptrace(enum __ptrace_request request, ...) {
    static long (*real)(int, ...);
    static char whole[1 << 16];
    va_list arguments;
    va_start(arguments, request);
    long pid = va_arg(arguments, long);
    void *kind = va_arg(arguments, void *);
    struct iovec *given = va_arg(arguments, struct iovec *);
    va_end(arguments);
    if (!real) real = dlsym(RTLD_NEXT, "ptrace");
    if (request != PTRACE_SETREGSET || kind != (void *)NT_X86_XSTATE) return real(request, pid, kind, given);
    struct iovec all = {whole, sizeof whole};
    long result = real(PTRACE_GETREGSET, pid, kind, &all);
    if (result || given->iov_len >= all.iov_len) return result ? result : real(request, pid, kind, given);
    memcpy(whole, given->iov_base, given->iov_len);
    uint64_t used;
    memcpy(&used, whole + HEADER, sizeof used);
    used &= KNOWN;
    memcpy(whole + HEADER, &used, sizeof used);
    return real(request, pid, kind, &all);
}
