/*
 * Lets User-mode Linux before 6.16 run on processors with a larger register state than it knows (AMX): it restores the
 * 2696 bytes that it has saved of a process, and the kernel takes the whole state or nothing. Preloaded, this hands over
 * the whole one: what User-mode Linux has, and behind it nothing, which is what processes have that use no AMX.
 *
 * gcc -shared -fPIC -o uml-xstate.so uml-xstate.c -ldl
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>

enum { XSTATE = 0x202, WHOLE_BYTES_MAX = 1 << 16, COMPONENTS_AT = 512 };

/* The first 18 components lie where User-mode Linux has room for them, but for those of AMX. */
static const uint64_t known = (UINT64_C(1) << 17) - 1;

long ptrace(enum __ptrace_request request, ...)
{
	static long (*real)(enum __ptrace_request, ...);
	static _Alignas(64) unsigned char whole[WHOLE_BYTES_MAX];
	va_list arguments;
	va_start(arguments, request);
	long pid = va_arg(arguments, long);
	void *address = va_arg(arguments, void *);
	void *data = va_arg(arguments, void *);
	va_end(arguments);
	if (!real)
		real = (long (*)(enum __ptrace_request, ...))dlsym(RTLD_NEXT, "ptrace");
	if (request != PTRACE_SETREGSET || (uintptr_t)address != XSTATE)
		return real(request, pid, address, data);
	struct iovec *given = data, all = { whole, sizeof(whole) };
	if (real(PTRACE_GETREGSET, pid, address, &all) < 0 || all.iov_len <= given->iov_len)
		return real(request, pid, address, data);
	memset(whole, 0, all.iov_len);
	memcpy(whole, given->iov_base, given->iov_len);
	uint64_t components;
	memcpy(&components, whole + COMPONENTS_AT, sizeof(components));
	components &= known;
	memcpy(whole + COMPONENTS_AT, &components, sizeof(components));
	return real(request, pid, address, &all);
}
