/* Weighted sums of many inputs for many outputs in one pass. Compiled once for each instruction set;
 * PMERGE_AVERAGE names the function. No intrinsics: the loops are such that compilers vectorize them.
 *
 * A tile of elements at a time, whose sums stay in the first-level cache while the inputs stream by,
 * four at once so that a sum is loaded and stored once for four terms. Multiply, add and divide stay
 * separate operations in the order of the inputs, so every element has the bits of the reference in
 * torch. Sums start at -0.0: adding a term to that gives the term, zeros with their sign. */

#include "convert.h"
#include "decode.h"
#include "kernel.h"

#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "sums are those of IEEE 754: compile without -ffast-math"
#endif
#if __FLT_EVAL_METHOD__ != 0 || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "needs a little-endian machine that computes float as float"
#endif

#define TILE MOST_VALUES /* elements */
#define TERMS 4   /* inputs at once; the loops below know this number */
#define OUTPUTS 8 /* outputs at once: their sums and four widened inputs fit the first-level cache */

typedef struct {
    const void *data;
    int32_t dtype;
} source;

typedef union {
    float narrow[TILE];
    double wide[TILE];
} room;

#define LOAD_BF16(p, i) from_bf16(((const unaligned16 *)(p))[i])
#define LOAD_F16(p, i) from_f16(((const unaligned16 *)(p))[i])
#define LOAD_F32(p, i) ((const unaligned_float *)(p))[i]
#define LOAD_F64(p, i) ((const unaligned_double *)(p))[i]

static const int64_t bytes_of[] = {[BF16] = 2, [F16] = 2, [F32] = 4, [F64] = 8};

/* Elements `begin` to `begin + n` of an input, in `space` where they are quantized. */
static source at(const struct input *input, int64_t begin, int n, float *space) {
    source decoded = {space, F32};
    source plain = {(const char *)input->data + (input->coded ? 0 : begin * bytes_of[input->dtype]), input->dtype};
    if (input->coded) decode(space, input->coded, begin, n);
    return input->coded ? decoded : plain;
}

/* widen_T_to_S: copy an input of dtype T as S. add_T_to_S: add one, two or four inputs of dtype T,
 * times their factors, to the sums. */
#define DEFINE_LOOPS(S, T)                                                                                                        \
    static void widen_##T##_to_##S(S *restrict out, const void *restrict in, int n) {                                            \
        for (int i = 0; i < n; i++) out[i] = (S)LOAD_##T(in, i);                                                                  \
    }                                                                                                                             \
    static void add_##T##_to_##S(S *restrict sums, const source *s, const double *factors, int terms, int n) {                   \
        const void *data[TERMS] = {0};                                                                                            \
        S f[TERMS] = {0};                                                                                                         \
        for (int t = 0; t < terms; t++) data[t] = s[t].data, f[t] = (S)factors[t];                                                \
        const void *a = data[0], *b = data[1], *c = data[2], *d = data[3];                                                        \
        if (terms == 1)                                                                                                           \
            for (int i = 0; i < n; i++) sums[i] += (S)LOAD_##T(a, i) * f[0];                                                      \
        else if (terms == 2)                                                                                                      \
            for (int i = 0; i < n; i++) sums[i] = sums[i] + (S)LOAD_##T(a, i) * f[0] + (S)LOAD_##T(b, i) * f[1];                  \
        else                                                                                                                      \
            for (int i = 0; i < n; i++)                                                                                           \
                sums[i] = sums[i] + (S)LOAD_##T(a, i) * f[0] + (S)LOAD_##T(b, i) * f[1] + (S)LOAD_##T(c, i) * f[2] +              \
                          (S)LOAD_##T(d, i) * f[3];                                                                               \
    }
DEFINE_LOOPS(float, BF16)
DEFINE_LOOPS(float, F16)
DEFINE_LOOPS(float, F32)
DEFINE_LOOPS(float, F64)
DEFINE_LOOPS(double, BF16)
DEFINE_LOOPS(double, F16)
DEFINE_LOOPS(double, F32)
DEFINE_LOOPS(double, F64)

#define FOR_DTYPE(dtype, CASE)                                                                                                    \
    switch (dtype) {                                                                                                              \
    case BF16: CASE(BF16); break;                                                                                                 \
    case F16: CASE(F16); break;                                                                                                   \
    case F32: CASE(F32); break;                                                                                                   \
    default: CASE(F64);                                                                                                           \
    }

/* Make `s` an input in the dtype of the sum, in `space` where it is not. */
static source widen(source s, int32_t sum, room *space, int n) {
    source wide = {space, sum};
    if (s.dtype == sum) return s;
#define WIDEN(T) sum == F32 ? widen_##T##_to_float(space->narrow, s.data, n) : widen_##T##_to_double(space->wide, s.data, n)
    FOR_DTYPE(s.dtype, WIDEN)
    return wide;
}

static void add(room *sums, int32_t sum, const source *s, const double *factors, int num_terms, int n) {
    for (int terms; num_terms; num_terms -= terms, s += terms, factors += terms) {
        for (terms = 1; terms < num_terms && s[terms].dtype == s->dtype;) terms++;
        if (terms == 3) terms = 2;
#define ADD(T) \
    sum == F32 ? add_##T##_to_float(sums->narrow, s, factors, terms, n) : add_##T##_to_double(sums->wide, s, factors, terms, n)
        FOR_DTYPE(s->dtype, ADD)
    }
}

static void clear(room *sums, int32_t sum, int n) {
    if (sum == F32)
        for (int i = 0; i < n; i++) sums->narrow[i] = -0.0f;
    else
        for (int i = 0; i < n; i++) sums->wide[i] = -0.0;
}

/* A power of two is multiplied by its reciprocal: both are the same number, rounded once. */
static void divide(room *sums, int32_t sum, double divisor, int n) {
    int exponent, is_power = __builtin_fabs(__builtin_frexp(divisor, &exponent)) == 0.5 && exponent > -99 && exponent < 99;
    float narrow = (float)(is_power ? 1 / divisor : divisor);
    double wide = is_power ? 1 / divisor : divisor;
    if (sum == F32 && is_power)
        for (int i = 0; i < n; i++) sums->narrow[i] *= narrow;
    else if (sum == F32)
        for (int i = 0; i < n; i++) sums->narrow[i] /= narrow;
    else if (is_power)
        for (int i = 0; i < n; i++) sums->wide[i] *= wide;
    else
        for (int i = 0; i < n; i++) sums->wide[i] /= wide;
}

/* Round the sums into `out`; whether all results are finite. NaN may be stored as any bits that are not finite. */
static int store(const room *restrict sums, int32_t sum, void *restrict out, int32_t dtype, int n) {
    const float *restrict narrow = sums->narrow;
    const double *restrict wide = sums->wide;
    unaligned16 *restrict out16 = out;
    unaligned_float *restrict out32 = out;
    unaligned_double *restrict out64 = out;
    int32_t largest = 0; /* magnitude */
    uint64_t infinite = 0;
#define NOTE(magnitude) largest = largest > (int32_t)(magnitude) ? largest : (int32_t)(magnitude)
    if (dtype == BF16 && sum == F32) {
        for (int i = 0; i < n; i++) {
            uint32_t rounded = bf16_magnitude(narrow[i]);
            out16[i] = (uint16_t)(rounded | sign16(narrow[i]));
            NOTE(rounded);
        }
        return largest < 0x7F80;
    }
    if (dtype == BF16) {
        for (int i = 0; i < n; i++) {
            uint32_t rounded = bits_of(round_to_bf16(wide[i])) >> 16;
            out16[i] = (uint16_t)rounded;
            NOTE(rounded & 0x7FFF);
        }
        return largest < 0x7F80;
    }
    if (dtype == F16) {
        for (int i = 0; i < n; i++) {
            float x = sum == F32 ? narrow[i] : round_to_f16(wide[i]);
            uint32_t rounded = f16_magnitude(x);
            out16[i] = (uint16_t)(rounded | sign16(x));
            NOTE(rounded);
        }
        return largest < 0x7C00;
    }
    if (dtype == F32) {
        for (int i = 0; i < n; i++) {
            float x = sum == F32 ? narrow[i] : (float)wide[i];
            out32[i] = x;
            NOTE(bits_of(x) & 0x7FFFFFFF);
        }
        return largest < 0x7F800000;
    }
    for (int i = 0; i < n; i++) {
        double x = sum == F32 ? narrow[i] : wide[i];
        out64[i] = x;
        infinite |= (bits_of_double(x) & 0x7FF0000000000000) == 0x7FF0000000000000;
    }
    return !infinite;
}

/* The same for one sum, NaN as the one pattern that stands for it. */
static int store_one(double sum, char *out, int32_t dtype) {
    int is_nan = sum != sum;
    double x = is_nan ? 0 : sum;
    if (dtype == F64) {
        *(unaligned_double *)out = is_nan ? double_of(0x7FF8000000000000) : x;
        return !is_nan && x - x == 0;
    }
    if (dtype == F32) {
        *(unaligned_float *)out = is_nan ? float_of(0x7FC00000) : (float)x;
        return !is_nan && (float)x - (float)x == 0;
    }
    float rounded = dtype == BF16 ? round_to_bf16(x) : round_to_f16(x);
    uint32_t magnitude = dtype == BF16 ? bf16_magnitude(rounded) : f16_magnitude(rounded);
    uint32_t infinity = dtype == BF16 ? 0x7F80 : 0x7C00, nan = dtype == BF16 ? 0x7FC0 : 0x7E00;
    *(unaligned16 *)out = (uint16_t)(is_nan ? nan : magnitude | sign16(rounded));
    return !is_nan && magnitude < infinity;
}

static double sum_one(const struct input *inputs, int64_t num_inputs, const struct output *o, int64_t i) {
    double sum = -0.0;
    for (int64_t j = 0; j < num_inputs; j++)
        if (o->used[j]) {
            float space;
            source s = at(inputs + j, i, 1, &space);
#define LOAD(T) sum += (double)LOAD_##T(s.data, 0) * o->factors[j]
            FOR_DTYPE(s.dtype, LOAD)
        }
    return sum / o->divisor;
}

/* Store a tile of which not all results are finite, one by one; sum those again in float64 where the
 * output asks for it. */
static int store_slowly(
    const struct input *inputs, int64_t num_inputs, const struct output *o, const room *sums, int64_t begin, int n
) {
    int is_finite = 1;
    for (int i = 0; i < n; i++) {
        char *out = (char *)o->data + (begin + i) * bytes_of[o->dtype];
        int here = store_one(o->sum == F32 ? sums->narrow[i] : sums->wide[i], out, o->dtype);
        if (!here && o->retry) here = store_one(sum_one(inputs, num_inputs, o, begin + i), out, o->dtype);
        is_finite &= here;
    }
    return is_finite;
}

/* Add inputs first..first+num_terms, at most four, to the sums of all outputs that use them. */
static void add_block(
    const source *plain, int num_terms, int64_t first, const struct output *outputs, int num_outputs, room *sums, int n
) {
    room space[2][TERMS];
    source sources[2][TERMS];
    int is_wide[2] = {0, 0};
    for (int k = 0; k < num_outputs; k++) {
        const struct output *o = outputs + k;
        int which = o->sum == F64, terms = 0;
        if (num_outputs > 1 && !is_wide[which])
            for (int t = 0; t < num_terms; t++) sources[which][t] = widen(plain[t], o->sum, &space[which][t], n);
        is_wide[which] = 1;
        source used[TERMS];
        double factors[TERMS];
        for (int t = 0; t < num_terms; t++)
            if (o->used[first + t]) {
                used[terms] = num_outputs > 1 ? sources[which][t] : plain[t];
                factors[terms++] = o->factors[first + t];
            }
        add(sums + k, o->sum, used, factors, terms, n);
    }
}

/* Elements `begin` to `begin + n`, at most TILE, of all outputs. */
static void average_tile(
    const struct input *inputs, int64_t num_inputs, struct output *outputs, int64_t num_outputs, int64_t begin, int n
) {
    room sums[OUTPUTS];
    for (int64_t left = num_outputs; left > 0; left -= OUTPUTS) {
        struct output *o = outputs + num_outputs - left;
        int num = (int)(left < OUTPUTS ? left : OUTPUTS);
        for (int k = 0; k < num; k++) clear(sums + k, o[k].sum, n);
        for (int64_t first = 0; first < num_inputs; first += TERMS) {
            float space[TERMS][TILE];
            source block[TERMS];
            int terms = (int)(num_inputs - first < TERMS ? num_inputs - first : TERMS);
            for (int t = 0; t < terms; t++) block[t] = at(inputs + first + t, begin, n, space[t]);
            add_block(block, terms, first, o, num, sums, n);
        }
        for (int k = 0; k < num; k++) {
            if (o[k].divisor != 1) divide(sums + k, o[k].sum, o[k].divisor, n);
            if (!store(sums + k, o[k].sum, (char *)o[k].data + begin * bytes_of[o[k].dtype], o[k].dtype, n))
                o[k].nonfinite |= !store_slowly(inputs, num_inputs, o + k, sums + k, begin, n);
        }
    }
}

/* Rows one after the other; with a transposed input, in strips of columns, so that the bytes of a stored
 * row that are read for one row are still in the cache for the next. */
void PMERGE_AVERAGE(
    const struct input *inputs, int64_t num_inputs, struct output *outputs, int64_t num_outputs, int64_t count
) {
    int64_t columns = count;
    for (int64_t j = 0; j < num_inputs; j++)
        if (inputs[j].coded && inputs[j].coded->kind == CODES_TRANSPOSED) columns = inputs[j].coded->columns;
    for (int64_t column = 0; column < columns; column += TILE)
        for (int64_t row = 0; row < count; row += columns) {
            int n = (int)(columns - column < TILE ? columns - column : TILE);
            average_tile(inputs, num_inputs, outputs, num_outputs, row + column, n);
        }
}
