/* The library's functions: which kernels there are, and a call into one of them under a known state of the floating-point unit. */

#include "decode.h"
#include "kernel.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#elif !defined(__aarch64__)
#error "x86-64 and aarch64 only"
#endif

#define EXPORT __attribute__((visibility("default")))

average_function pmerge_average_base;
static int32_t always(void) { return 1; }

#ifdef PMERGE_V3
average_function pmerge_average_v3;
static int32_t has_v3(void) { return __builtin_cpu_supports("avx2") != 0; }
#endif

#ifdef PMERGE_V4
average_function pmerge_average_v4;
static int32_t has_v4(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
}
#endif

static const struct {
    const char *name;
    int32_t (*is_supported)(void);
    average_function *average;
} kernels[] = {
    {"base", always, pmerge_average_base},
#ifdef PMERGE_V3
    {"v3", has_v3, pmerge_average_v3},
#endif
#ifdef PMERGE_V4
    {"v4", has_v4, pmerge_average_v4},
#endif
};

EXPORT const char pmerge_sources[] = PMERGE_SOURCES;

EXPORT int32_t pmerge_abi(void) { return PMERGE_ABI; }

/* The name of kernel `i`, slowest first; NULL after the last. */
EXPORT const char *pmerge_name(int32_t i) { return i < (int32_t)(sizeof kernels / sizeof *kernels) ? kernels[i].name : NULL; }

EXPORT int32_t pmerge_is_supported(int32_t i) { return kernels[i].is_supported(); }

/* Rounding to nearest even, nothing flushed to zero, all exceptions masked: whatever a library has set for this thread. */
#if defined(__x86_64__)
static uint64_t set_state(void) {
    uint64_t saved = _mm_getcsr();
    _mm_setcsr(0x1F80);
    return saved;
}
static void restore_state(uint64_t saved) { _mm_setcsr((unsigned)saved); }
#else
static uint64_t set_state(void) {
    uint64_t saved;
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved));
    __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)0));
    return saved;
}
static void restore_state(uint64_t saved) { __asm__ volatile("msr fpcr, %0" : : "r"(saved)); }
#endif

EXPORT void pmerge_average(
    int32_t kernel, const struct input *inputs, int64_t num_inputs, struct output *outputs, int64_t num_outputs, int64_t count
) {
    uint64_t saved = set_state();
    for (int64_t k = 0; k < num_outputs; k++) outputs[k].nonfinite = 0;
    kernels[kernel].average(inputs, num_inputs, outputs, num_outputs, count);
    restore_state(saved);
}

static int is_infinite(const struct input *input, const float *decoded, int64_t i) {
    if (input->coded) return (bits_of(decoded[i % MOST_VALUES]) & 0x7F800000) == 0x7F800000;
    switch (input->dtype) {
    case BF16: return (((const unaligned16 *)input->data)[i] & 0x7F80) == 0x7F80;
    case F16: return (((const unaligned16 *)input->data)[i] & 0x7C00) == 0x7C00;
    case F32: return (bits_of(((const unaligned_float *)input->data)[i]) & 0x7F800000) == 0x7F800000;
    default: return (bits_of_double(((const unaligned_double *)input->data)[i]) >> 52 & 0x7FF) == 0x7FF;
    }
}

/* How many elements of an input are NaN or infinite, the first `most` of them as `positions`. */
EXPORT int64_t pmerge_find_nonfinite(const struct input *input, int64_t count, int64_t *positions, int64_t most) {
    uint64_t saved = set_state();
    float decoded[MOST_VALUES];
    int64_t found = 0;
    for (int64_t i = 0; i < count; i++) {
        int n = (int)(count - i < MOST_VALUES ? count - i : MOST_VALUES);
        if (input->coded && i % MOST_VALUES == 0) decode(decoded, input->coded, i, n);
        if (!is_infinite(input, decoded, i)) continue;
        if (found < most) positions[found] = i;
        found++;
    }
    restore_state(saved);
    return found;
}
