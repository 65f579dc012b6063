/* Values of quantized tensors as float32, a part of a row at a time: unpack the codes, subtract the zero
 * points, multiply by the scales, each an operation of its own, as formats/quantization does it. */

#ifndef PMERGE_DECODE_H
#define PMERGE_DECODE_H

#include "convert.h"
#include "kernel.h"

#define MOST_VALUES 512 /* at once */

static int64_t block_row(int64_t row, int64_t matrix_rows, int64_t block_rows, int64_t below) {
    return row / matrix_rows * below + row % matrix_rows / block_rows;
}

static void load_scales(float *restrict out, const void *scales, int32_t dtype, int64_t begin, int n) {
    const uint8_t *bytes = (const uint8_t *)scales + begin;
    const unaligned16 *words = (const unaligned16 *)scales + begin;
    const unaligned_float *floats = (const unaligned_float *)scales + begin;
    switch (dtype) {
    case BF16: for (int i = 0; i < n; i++) out[i] = from_bf16(words[i]); break;
    case F16: for (int i = 0; i < n; i++) out[i] = from_f16(words[i]); break;
    case E4M3: for (int i = 0; i < n; i++) out[i] = from_e4m3(bytes[i]); break;
    case E8M0: for (int i = 0; i < n; i++) out[i] = from_e8m0(bytes[i]); break;
    default: for (int i = 0; i < n; i++) out[i] = floats[i];
    }
}

/* `n` codes from number `begin` on: bytes, or parts of bytes with the lowest bits first. */
static void unpack(float *restrict out, const uint8_t *restrict codes, int32_t kind, int64_t begin, int n) {
#define UNPACK_BYTES(VALUE)                                          \
    for (int i = 0; i < n; i++) {                                    \
        uint8_t code = codes[begin + i];                             \
        out[i] = VALUE;                                              \
    }
#define UNPACK_PARTS(BITS, VALUE)                                    \
    for (; n && begin % (8 / BITS); begin++, n--) {                  \
        uint8_t code = codes[begin / (8 / BITS)] >> begin % (8 / BITS) * BITS & ((1 << BITS) - 1); \
        *out++ = VALUE;                                              \
    }                                                                \
    codes += begin / (8 / BITS);                                     \
    for (int i = 0; i < n / (8 / BITS); i++)                         \
        for (int part = 0; part < 8 / BITS; part++) {                \
            uint8_t code = codes[i] >> part * BITS & ((1 << BITS) - 1); \
            out[8 / BITS * i + part] = VALUE;                        \
        }                                                            \
    for (int i = n / (8 / BITS) * (8 / BITS); i < n; i++) {          \
        uint8_t code = codes[i / (8 / BITS)] >> i % (8 / BITS) * BITS & ((1 << BITS) - 1); \
        out[i] = VALUE;                                              \
    }
    switch (kind) {
    case CODES_E4M3: UNPACK_BYTES(from_e4m3(code)) break;
    case CODES_I8: UNPACK_BYTES((float)(int8_t)code) break;
    case CODES_8: UNPACK_BYTES((float)(code - 128)) break;
    case CODES_E2M1: UNPACK_PARTS(4, from_e2m1(code)) break;
    case CODES_4: UNPACK_PARTS(4, (float)(code - 8)) break;
    default: UNPACK_PARTS(2, (float)(code - 2))
    }
}

/* The zero points of blocks `begin` to `begin + n` of row `row` of this call. Packed ones: a word holds
 * those of several rows of a matrix. */
static void load_zeros(float *restrict out, const struct coded *c, int64_t row, int64_t begin, int n) {
    if (c->zero_kind == ZEROS_I8) {
        int64_t below = block_row(c->first_row + row, c->matrix_rows, c->block_rows, c->below) -
                        block_row(c->first_row, c->matrix_rows, c->block_rows, c->below);
        const int8_t *zeros = (const int8_t *)c->zeros + below * c->beside + begin;
        for (int i = 0; i < n; i++) out[i] = zeros[i];
        return;
    }
    int bits = c->kind == CODES_2 ? 2 : c->kind == CODES_4 ? 4 : 8, together = 32 / bits;
    int64_t below = (c->matrix_rows + together - 1) / together;
    int64_t words = block_row(c->first_row + row, c->matrix_rows, together, below) -
                    block_row(c->first_row, c->matrix_rows, together, below);
    int shift = (int)((c->first_row + row) % c->matrix_rows % together) * bits;
    const uint8_t *codes = (const uint8_t *)c->zeros + 4 * (words * c->beside + begin) + shift / 8;
    for (int i = 0; i < n; i++) out[i] = (float)((codes[4 * i] >> shift % 8 & ((1 << bits) - 1)) - (1 << (bits - 1)));
}

/* Values `column` to `column + n` of row `row` of this call; `n` is at most MOST_VALUES. */
static void decode_row(float *restrict out, const struct coded *c, int64_t row, int64_t column, int n) {
    float scales[MOST_VALUES], zeros[MOST_VALUES];
    int64_t first = column / c->block_columns;
    int blocks = (int)((column + n - 1) / c->block_columns - first) + 1;
    int64_t below = block_row(c->first_row + row, c->matrix_rows, c->block_rows, c->below) -
                    block_row(c->first_row, c->matrix_rows, c->block_rows, c->below);
    unpack(out, (const uint8_t *)c->codes + row * c->row_bytes, c->kind, column, n);
    load_scales(scales, c->scales, c->scale_dtype, below * c->beside + first, blocks);
    if (c->global_scale) {
        float global = *(const unaligned_float *)c->global_scale;
        for (int b = 0; b < blocks; b++) scales[b] = c->divides ? scales[b] / global : scales[b] * global;
    }
    if (c->zero_kind) load_zeros(zeros, c, row, first, blocks);
    int64_t end = (first + 1) * c->block_columns - column; /* of a block, in `out` */
    for (int b = 0, i = 0; b < blocks; b++, end += c->block_columns) {
        int stop = end < n ? (int)end : n;
        if (c->zero_kind)
            for (int j = i; j < stop; j++) out[j] -= zeros[b];
        for (; i < stop; i++) out[i] *= scales[b];
    }
}

/* The same of a transposed matrix: every value is in a stored row of its own. */
static void decode_column(float *restrict out, const struct coded *c, int64_t row, int64_t column, int n) {
    int64_t first = row / c->matrix_rows * c->columns + column, inside = row % c->matrix_rows;
    const uint8_t *codes = (const uint8_t *)c->codes + first * c->row_bytes + inside / 2;
    const uint8_t *scales = (const uint8_t *)c->scales + first * c->beside + inside / c->block_columns;
    for (int64_t i = 0; i < n; i++)
        out[i] = from_e2m1(codes[i * c->row_bytes] >> inside % 2 * 4 & 15) * from_e8m0(scales[i * c->beside]);
}

/* `n` values from number `begin` of this call's on. */
static void decode(float *out, const struct coded *c, int64_t begin, int n) {
    int64_t row = begin / c->columns, column = begin % c->columns;
    for (int done = 0; done < n; row++, column = 0) {
        int some = (int)(c->columns - column < n - done ? c->columns - column : n - done);
        if (c->kind == CODES_TRANSPOSED)
            decode_column(out + done, c, row, column, some);
        else
            decode_row(out + done, c, row, column, some);
        done += some;
    }
}

#endif
