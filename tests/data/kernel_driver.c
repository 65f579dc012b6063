/* Random jobs for every kernel, on memory of exactly the size needed, at any alignment: built with sanitizers by tests/engine/kernels/test_average.py.
 * All kernels must give the same bytes; their digest, printed last, is the same on every machine. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef __x86_64__
#include <xmmintrin.h>
#endif

#include "kernel.h"

const char *pmerge_name(int32_t);
int32_t pmerge_is_supported(int32_t);
int64_t pmerge_find_nonfinite(const struct input *, int64_t, int64_t *, int64_t);
void pmerge_average(int32_t, const struct input *, int64_t, struct output *, int64_t, int64_t);

static uint64_t state = 1, digest = 14695981039346656037u; /* FNV-1a */

static uint64_t draw(uint64_t below) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (state >> 33) % below;
}

/* The state of the floating-point unit: as it is by default, or rounding up and flushing to zero. */
#ifdef __x86_64__
static uint64_t state_of_unit(void) { return _mm_getcsr() & ~0x3Fu; }
static void set_unit(int hostile) { _mm_setcsr(hostile ? 0xDFC0 : 0x1F80); }
#else
static uint64_t state_of_unit(void) {
    uint64_t found;
    __asm__ volatile("mrs %0, fpcr" : "=r"(found));
    return found;
}
static void set_unit(int hostile) { __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)(hostile ? 5 << 22 : 0))); }
#endif

static const int64_t sizes[] = {2, 2, 4, 8};

/* `size` bytes that end where the allocation ends, beginning at any alignment. */
static char *memory(int64_t size, char **whole) {
    int64_t skip = (int64_t)draw(64);
    *whole = malloc((size_t)(size + skip));
    if (!*whole) abort();
    for (int64_t i = 0; i < size + skip; i++) (*whole)[i] = (char)draw(256);
    return *whole + skip;
}

static const int scale_sizes[] = {2, 2, 4, 0, 1, 1}, code_bits[] = {8, 4, 8, 2, 4, 8, 4};
static const int32_t scale_dtypes[] = {BF16, F16, F32, E4M3, E8M0};

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* A stack of `rows` / `matrix_rows` quantized matrices, cut at a matrix. */
static void quantize(struct coded *c, int64_t rows, int64_t columns, char **blocks) {
    c->kind = (int32_t)draw(7);
    c->scale_dtype = scale_dtypes[draw(5)];
    c->zero_kind = (int32_t)draw(c->kind >= CODES_2 && c->kind <= CODES_8 ? 3 : 2);
    c->divides = (int32_t)draw(2);
    c->columns = columns;
    c->row_bytes = ceil_div(columns * code_bits[c->kind], 8) + (int64_t)draw(3);
    c->matrix_rows = draw(2) ? rows : 1;
    c->first_row = c->matrix_rows * (int64_t)draw(3);
    c->block_rows = c->zero_kind == ZEROS_PACKED ? 1 : 1 + (int64_t)draw(9);
    c->block_columns = draw(2) ? 1 + (int64_t)draw(140) : 1;
    c->below = ceil_div(c->matrix_rows, c->block_rows);
    c->beside = ceil_div(columns, c->block_columns);
    if (c->kind == CODES_TRANSPOSED) {
        c->row_bytes = ceil_div(c->matrix_rows, 2);
        c->scale_dtype = E8M0;
        c->beside = ceil_div(c->matrix_rows, c->block_columns);
        c->codes = memory(rows / c->matrix_rows * columns * c->row_bytes, blocks);
        c->scales = memory(rows / c->matrix_rows * columns * c->beside, blocks + 1);
        return;
    }
    int64_t matrices = rows / c->matrix_rows, num_blocks = matrices * c->below * c->beside;
    int64_t words = matrices * ceil_div(c->matrix_rows, 32 / code_bits[c->kind]) * c->beside;
    c->codes = memory(rows * c->row_bytes, blocks);
    c->scales = memory(num_blocks * scale_sizes[c->scale_dtype], blocks + 1);
    c->zeros = memory(c->zero_kind == ZEROS_PACKED ? 4 * words : num_blocks, blocks + 2);
    c->global_scale = memory(4, blocks + 3);
    if (draw(2)) c->global_scale = NULL;
}

static void job(int64_t rows, int64_t columns) {
    enum { INPUTS = 11, OUTPUTS = 10 };
    int64_t count = rows * columns;
    struct input inputs[INPUTS];
    struct coded coded[INPUTS];
    struct output outputs[OUTPUTS];
    double factors[OUTPUTS][INPUTS];
    uint8_t used[OUTPUTS][INPUTS];
    char *blocks[INPUTS + OUTPUTS], *parts[INPUTS][4] = {{0}}, *first[OUTPUTS] = {0};
    int num_inputs = 1 + (int)draw(INPUTS), num_outputs = 1 + (int)draw(OUTPUTS);
    int32_t nonfinite[OUTPUTS];
    for (int i = 0; i < num_inputs; i++) {
        inputs[i].dtype = (int32_t)draw(4);
        inputs[i].data = memory(count * sizes[inputs[i].dtype], blocks + i);
        inputs[i].coded = columns && draw(3) == 0 ? coded + i : NULL;
        if (inputs[i].coded) {
            quantize(coded + i, rows, columns, parts[i]);
            inputs[i].data = NULL;
            inputs[i].dtype = F32;
        }
    }
    for (int k = 0; k < num_outputs; k++) {
        struct output o = {.factors = factors[k], .used = used[k]};
        o.divisor = (double)(1 + draw(9));
        o.dtype = (int32_t)draw(4);
        o.sum = F32 + (int32_t)draw(2);
        o.retry = (int32_t)draw(2);
        o.data = memory(count * sizes[o.dtype], blocks + num_inputs + k);
        outputs[k] = o;
        for (int i = 0; i < num_inputs; i++) {
            factors[k][i] = draw(3) ? (double)draw(1000) / 999 - 0.3 : 1;
            used[k][i] = (uint8_t)(draw(4) != 0);
        }
    }
    for (int i = 0; i < num_inputs; i++) {
        int64_t positions[4], found = pmerge_find_nonfinite(inputs + i, count, positions, 4);
        if (found < 0 || found > count || (found && positions[0] >= count)) exit(2);
    }
    for (int32_t kernel = 0; pmerge_name(kernel); kernel++) {
        if (!pmerge_is_supported(kernel)) continue;
        set_unit(1);
        uint64_t before = state_of_unit();
        pmerge_average(kernel, inputs, num_inputs, outputs, num_outputs, count);
        if (state_of_unit() != before) exit(3);
        set_unit(0);
        for (int k = 0; k < num_outputs; k++) {
            size_t size = (size_t)(count * sizes[outputs[k].dtype]);
            if (kernel && (memcmp(first[k], outputs[k].data, size) || nonfinite[k] != outputs[k].nonfinite)) {
                fprintf(stderr, "kernel %s differs\n", pmerge_name(kernel));
                exit(1);
            }
            if (!kernel) {
                nonfinite[k] = outputs[k].nonfinite;
                first[k] = malloc(size + 1);
                if (!first[k]) abort();
                memcpy(first[k], outputs[k].data, size);
                for (size_t i = 0; i < size; i++) digest = (digest ^ (uint8_t)first[k][i]) * 1099511628211u;
            }
        }
    }
    for (int i = 0; i < num_inputs + num_outputs; i++) free(blocks[i]);
    for (int k = 0; k < num_outputs; k++) free(first[k]);
    for (int i = 0; i < num_inputs; i++)
        for (int part = 0; part < 4; part++) free(parts[i][part]);
}

int main(void) {
    for (int64_t columns = 0; columns < 70; columns++) job(1, columns);
    for (int i = 0; i < 300; i++) {
        int64_t rows = 1 + (int64_t)draw(12); /* C leaves the order of arguments open */
        job(rows, (int64_t)draw(i % 2 ? 1600 : 40));
    }
    for (int32_t kernel = 0; pmerge_name(kernel); kernel++)
        if (pmerge_is_supported(kernel)) printf("%s\n", pmerge_name(kernel));
    printf("%016llx\n", (unsigned long long)digest);
    return 0;
}
