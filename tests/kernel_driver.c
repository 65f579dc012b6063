/* Random jobs for every kernel, on memory of exactly the size needed, at any alignment: built with sanitizers by test_kernels.py.
 * All kernels must give the same bytes. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernel.h"

const char *pmerge_name(int32_t);
int32_t pmerge_is_supported(int32_t);
void pmerge_average(int32_t, const struct input *, int64_t, struct output *, int64_t, int64_t);

static uint64_t state = 1;

static uint64_t draw(uint64_t below) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (state >> 33) % below;
}

static const int64_t sizes[] = {2, 2, 4, 8};

/* `size` bytes that end where the allocation ends, beginning at any alignment. */
static char *memory(int64_t size, char **whole) {
    int64_t skip = (int64_t)draw(64);
    *whole = malloc((size_t)(size + skip));
    if (!*whole) abort();
    for (int64_t i = 0; i < size + skip; i++) (*whole)[i] = (char)draw(256);
    return *whole + skip;
}

static void job(int64_t count) {
    enum { INPUTS = 11, OUTPUTS = 10 };
    struct input inputs[INPUTS];
    struct output outputs[OUTPUTS];
    double factors[OUTPUTS][INPUTS];
    uint8_t used[OUTPUTS][INPUTS];
    char *blocks[INPUTS + OUTPUTS], *first[OUTPUTS] = {0};
    int num_inputs = 1 + (int)draw(INPUTS), num_outputs = 1 + (int)draw(OUTPUTS);
    int32_t nonfinite[OUTPUTS];
    for (int i = 0; i < num_inputs; i++) {
        inputs[i].dtype = (int32_t)draw(4);
        inputs[i].data = memory(count * sizes[inputs[i].dtype], blocks + i);
    }
    for (int k = 0; k < num_outputs; k++) {
        struct output o = {0, factors[k], used[k], (double)(1 + draw(9)), (int32_t)draw(4), F32 + (int32_t)draw(2), (int32_t)draw(2), 0};
        o.data = memory(count * sizes[o.dtype], blocks + num_inputs + k);
        outputs[k] = o;
        for (int i = 0; i < num_inputs; i++) {
            factors[k][i] = draw(3) ? (double)draw(1000) / 999 - 0.3 : 1;
            used[k][i] = (uint8_t)(draw(4) != 0);
        }
    }
    for (int32_t kernel = 0; pmerge_name(kernel); kernel++) {
        if (!pmerge_is_supported(kernel)) continue;
        pmerge_average(kernel, inputs, num_inputs, outputs, num_outputs, count);
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
            }
        }
    }
    for (int i = 0; i < num_inputs + num_outputs; i++) free(blocks[i]);
    for (int k = 0; k < num_outputs; k++) free(first[k]);
}

int main(void) {
    for (int64_t count = 0; count < 70; count++) job(count);
    for (int i = 0; i < 200; i++) job((int64_t)draw(1600));
    for (int32_t kernel = 0; pmerge_name(kernel); kernel++)
        if (pmerge_is_supported(kernel)) printf("%s\n", pmerge_name(kernel));
    return 0;
}
