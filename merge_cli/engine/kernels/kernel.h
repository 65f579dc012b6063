/* The call into the kernel: plain structs that native.py mirrors with ctypes. Raise PMERGE_ABI with every change of them. */

#ifndef PMERGE_KERNEL_H
#define PMERGE_KERNEL_H

#include <stddef.h>
#include <stdint.h>

#define PMERGE_ABI 1

enum dtype { BF16, F16, F32, F64 };

struct input {
    const void *data; /* the first element, little-endian, at any address */
    int32_t dtype;
};

/* One output: the sum of factors[i] * inputs[i] over the used inputs, in order, divided once and rounded once. */
struct output {
    void *data;
    const double *factors; /* [num_inputs]; rounded to float32 where that is the dtype of the sum */
    const uint8_t *used;   /* [num_inputs] */
    double divisor;        /* 1: no division */
    int32_t dtype;
    int32_t sum;       /* F32 or F64 */
    int32_t mend;      /* results of float32 sums that are not finite are summed again in float64 */
    int32_t nonfinite; /* set by the call: whether a result is NaN or infinite */
};

typedef void average_function(const struct input *, int64_t num_inputs, struct output *, int64_t num_outputs, int64_t count);

#endif
