/*
 * User Mode Linux of 6.1 has room for the registers of AVX-512 and PKRU and sets that much of them; where the processor has more
 * of them (AMX) its kernel takes all or nothing (EFAULT), and the machine dies with its first process. This, preloaded, sets
 * what User Mode Linux knows and leaves the rest of the child's registers as they are: nothing in there can use them, since it
 * never grants the permission that they need.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/types.h>
#include <sys/uio.h>

/* One kernel thread of it runs at a time, on a stack that has no room for this. */
static char whole[64 << 10] __attribute__((aligned(64)));

long ptrace(enum __ptrace_request request, ...)
{
    static long (*next)(enum __ptrace_request, ...);
    va_list arguments;
    va_start(arguments, request);
    pid_t child = va_arg(arguments, pid_t);
    void *which = va_arg(arguments, void *);
    void *data = va_arg(arguments, void *);
    va_end(arguments);
    if (!next)
        next = dlsym(RTLD_NEXT, "ptrace");
    long result = next(request, child, which, data);
    if (result == 0 || errno != EFAULT || request != PTRACE_SETREGSET || (long)which != NT_X86_XSTATE)
        return result;
    struct iovec *part = data;
    struct iovec all = { whole, sizeof whole };
    if (next(PTRACE_GETREGSET, child, which, &all) < 0 || part->iov_len > all.iov_len)
        return -1;
    memcpy(whole, part->iov_base, part->iov_len);
    return next(PTRACE_SETREGSET, child, which, &all);
}
