/* Vectors of VL floats through GCC's vector extensions, so that one source serves AVX-512, AVX2 and NEON; and the two element types,
   float32 and bfloat16, which are both computed in float32. */
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#include <immintrin.h>
#define HAS_BF16_DOT 1
#endif

#if defined(__AVX512F__)
#define VL 16
#define MR 14 /* rows of a tile of matrix product: 2 * MR accumulators, 2 weights and a broadcast fill the 32 registers */
#elif defined(__AVX2__)
#define VL 8
#define MR 6
#else
#define VL 4
#define MR 12
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef uint32_t vu __attribute__((vector_size(4 * VL)));
typedef uint16_t vh __attribute__((vector_size(2 * VL)));
typedef uint16_t bf16;

INLINE vf splat(float x) { return x - (vf){0}; }
INLINE vf select_vf(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

INLINE vf load_f32(const float *p) {
    vf x;
    memcpy(&x, p, sizeof x);
    return x;
}
INLINE void store_f32(float *p, vf x) { memcpy(p, &x, sizeof x); }

INLINE vf load_bf16(const bf16 *p) {
    vh x;
    memcpy(&x, p, sizeof x);
    return (vf)(__builtin_convertvector(x, vu) << 16);
}
/* Rounds to nearest, ties to even; a NaN stays one. */
INLINE void store_bf16(bf16 *p, vf x) {
    vu bits = (vu)x;
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    vu is_nan = (vu)(x != x);
    vh out = __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), vh);
    memcpy(p, &out, sizeof out);
}

INLINE float get_f32(const float *p) { return *p; }
INLINE void put_f32(float *p, float x) { *p = x; }
INLINE float get_bf16(const bf16 *p) {
    uint32_t bits = (uint32_t)*p << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
INLINE void put_bf16(bf16 *p, float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    *p = x != x ? 0x7fc0 : (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE float sum_of(vf x) {
    float total = 0;
#if VL == 16
    typedef float v8 __attribute__((vector_size(32)));
    v8 halves[2];
    memcpy(halves, &x, sizeof x);
    v8 y = halves[0] + halves[1];
#elif VL == 8
    vf y = x;
#endif
#if VL >= 8
    typedef float v4 __attribute__((vector_size(16)));
    v4 quarters[2];
    memcpy(quarters, &y, sizeof quarters);
    v4 z = quarters[0] + quarters[1];
#else
    vf z = x;
#endif
    total = (z[0] + z[2]) + (z[1] + z[3]);
    return total;
}

/* exp(x): 2^n times a polynomial of the rest on [-ln 2 / 2, ln 2 / 2]; relative error below 2e-7. Below -87: 0. */
INLINE vf exp_vf(vf x) {
    vi is_tiny = x < -87.0f;
    x = select_vf(x > 88.0f, splat(88.0f), x);
    x = select_vf(is_tiny, splat(0), x);
    vf n = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: rounds to the nearest whole number */
    n -= 12582912.0f;
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vi power = (__builtin_convertvector(n, vi) + 127) << 23;
    return select_vf(is_tiny, splat(0), p * (vf)power);
}
