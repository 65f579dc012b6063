/* The call into the kernel: plain structs that native.py mirrors with ctypes. Raise PMERGE_ABI with every change of them. */

#ifndef PMERGE_KERNEL_H
#define PMERGE_KERNEL_H

#include <stddef.h>
#include <stdint.h>

#define PMERGE_ABI 4

enum dtype { BF16, F16, F32, F64, E4M3, E8M0 }; /* the last two only of scales */
enum codes { CODES_E4M3, CODES_E2M1, CODES_I8, CODES_2, CODES_4, CODES_8, CODES_TRANSPOSED }; /* 2, 4, 8: with an offset, packed */
enum zeros { ZEROS_NONE, ZEROS_I8, ZEROS_PACKED };

/* A quantized tensor, seen as rows of its last dimension; the inner two dimensions are a matrix of a
 * stack. A scale (and zero point) for each block of a matrix; the last blocks of a row or column may be
 * smaller. All parts begin with what the first row of this call needs.
 *
 * Transposed codes are E2M1 too, of whole matrices that are stored with their columns as rows: `row_bytes`
 * and `beside` are those of a stored row. */
struct coded {
    const void *codes, *scales, *zeros, *global_scale; /* the last two may be NULL */
    int64_t columns, row_bytes;                        /* of a row of codes */
    int64_t first_row, matrix_rows;                    /* number of the first row in the tensor */
    int64_t block_rows, block_columns, below, beside;  /* sizes of a block, and blocks of a matrix */
    int32_t kind, scale_dtype, zero_kind, divides;     /* divides: scale / global scale, not the product */
};

struct input {
    const void *data; /* the first element, little-endian, at any address */
    const struct coded *coded; /* NULL, or the input in place of `data`; its values are F32 */
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
    int32_t retry;     /* results of float32 sums that are not finite are summed again in float64 */
    int32_t nonfinite; /* set by the call: whether a result is NaN or infinite */
};

typedef void average_function(const struct input *, int64_t num_inputs, struct output *, int64_t num_outputs, int64_t count);

#endif
