/* Number formats by integer operations and exact steps of IEEE 754, one element each, so that loops
 * vectorize on any instruction set and give the same bits on all. Magnitudes: bits without the sign. */

#ifndef PMERGE_CONVERT_H
#define PMERGE_CONVERT_H

#include <stdint.h>
#include <string.h>

typedef uint16_t unaligned16 __attribute__((aligned(1), may_alias));
typedef float unaligned_float __attribute__((aligned(1), may_alias));
typedef double unaligned_double __attribute__((aligned(1), may_alias));

static inline float float_of(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline double double_of(uint64_t bits) { double x; memcpy(&x, &bits, 8); return x; }
static inline uint32_t bits_of(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
static inline uint64_t bits_of_double(double x) { uint64_t bits; memcpy(&bits, &x, 8); return bits; }

static inline uint32_t sign16(float x) { return bits_of(x) >> 16 & 0x8000; }

static inline float from_bf16(uint16_t code) { return float_of((uint32_t)code << 16); }

/* Subnormals come out of a subtraction of normal numbers, since operands that are subnormal are slow. */
static inline float from_f16(uint16_t code) {
    uint32_t bits = (uint32_t)(code & 0x7FFF) << 13, exponent = bits & 0x0F800000;
    uint32_t normal = bits + ((exponent == 0x0F800000 ? 224u : 112u) << 23);
    uint32_t small = bits_of(float_of(bits + (113u << 23)) - float_of(113u << 23));
    return float_of((exponent ? normal : small) | (uint32_t)(code & 0x8000) << 16);
}

static inline float from_e4m3(uint8_t code) {
    uint32_t bits = (uint32_t)(code & 0x7F) << 20;
    uint32_t small = bits_of(float_of(bits + (121u << 23)) - float_of(121u << 23));
    uint32_t magnitude = code & 0x78 ? bits + (120u << 23) : small;
    return float_of(((code & 0x7F) == 0x7F ? 0x7FC00000 : magnitude) | (uint32_t)(code & 0x80) << 24);
}

static inline float from_e2m1(uint8_t code) {
    uint32_t bits = (uint32_t)(code & 7) << 22;
    uint32_t small = bits_of(float_of(bits + (127u << 23)) - 1.0f);
    return float_of((code & 6 ? bits + (126u << 23) : small) | (uint32_t)(code & 8) << 28);
}

static inline float from_e8m0(uint8_t code) {
    return float_of(code == 0 ? 0x00400000 : code == 255 ? 0x7FC00000 : (uint32_t)code << 23);
}

/* Rounded to nearest even. Infinities become 0x7F80, NaN that or more. */
static inline uint32_t bf16_magnitude(float x) {
    uint32_t bits = bits_of(x) & 0x7FFFFFFF;
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

/* Likewise; infinities and NaN become 0x7C00. The sum with 1/2 rounds to the spacing of the subnormals, 2^-24. */
static inline uint32_t f16_magnitude(float x) {
    uint32_t bits = bits_of(x) & 0x7FFFFFFF;
    uint32_t normal = ((bits + 0xFFF + (bits >> 13 & 1)) >> 13) - (112u << 10);
    uint32_t small = bits_of(float_of(bits) + 0.5f) - (126u << 23);
    uint32_t rounded = bits < 113u << 23 ? small : normal;
    return rounded < 0x7C00 ? rounded : 0x7C00;
}

/* `x` rounded once, to nearest even, to a format of `53 - dropped` significant bits with subnormals:
 * adding 1.5 * 2^dropped times the power of two in x, or `least` where that is more, makes the last bit
 * of the sum the last bit to keep. Where that is too large x stays, too large for the format as well. */
static inline double round_to(double x, uint64_t dropped, double least) {
    double large = double_of((bits_of_double(x) & 0x7FF0000000000000) + (dropped << 52 | (uint64_t)1 << 51));
    large = large > least ? large : least;
    return __builtin_copysign((x + large) - large, x);
}

/* Exact in float32: 8 or 11 significant bits, and no finer than the subnormals of the format. */
static inline float round_to_bf16(double x) { return (float)round_to(x, 45, 0x1.8p-81); }
static inline float round_to_f16(double x) { return (float)round_to(x, 42, 0x1.8p+28); }

#endif
