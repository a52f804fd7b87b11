/* Vectors of VL floats through GCC's vector extensions, so that one source serves AVX-512, AVX2 and NEON; and the two element types,
   float32 and bfloat16, which are both computed in float32. */
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#define VL 16
#define MR 14 /* rows of a tile of matrix product: 2 * MR accumulators, 2 weights and a broadcast fill the 32 registers */
#elif defined(__AVX2__)
#define VL 8
#define MR 6
#else
#define VL 4
#define MR 12
#endif

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define HAS_BF16_DOT 1
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef uint32_t vu __attribute__((vector_size(4 * VL)));
typedef uint16_t vh __attribute__((vector_size(2 * VL)));
typedef uint16_t bf16;

INLINE vf splat(float x) { return x - (vf){0}; }
INLINE vf select_vf(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

INLINE vf max_vf(vf x, vf y) {
#if VL == 16
    return (vf)_mm512_max_ps((__m512)x, (__m512)y); /* y, if one is NaN */
#else
    return select_vf(x > y, x, y);
#endif
}

INLINE vf load_f32(const float *p) {
    vf x;
    memcpy(&x, p, sizeof x);
    return x;
}
INLINE void store_f32(float *p, vf x) { memcpy(p, &x, sizeof x); }

INLINE vu load_halves(const uint16_t *p) {
    vh x;
    memcpy(&x, p, sizeof x);
#if VL == 16
    return (vu)_mm512_cvtepu16_epi32((__m256i)x); /* for which GCC 12 takes two halves */
#else
    return __builtin_convertvector(x, vu);
#endif
}
INLINE vf load_bf16(const bf16 *p) { return (vf)(load_halves(p) << 16); }
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

/* tanh(x), relative error below 3e-7: an odd polynomial near 0 (fitted on [0, 0.625]), 1 - 2 / (exp(2 |x|) + 1) beyond. */
INLINE vf tanh_vf(vf x) {
    vf size = max_vf(x, -x), y = x * x;
    vf p = splat(-6.1049457788e-3f);
    p = p * y + 2.1003639259e-2f;
    p = p * y - 5.3852496894e-2f;
    p = p * y + 1.3332782258e-1f;
    p = p * y - 3.3333329099e-1f;
    vf far = 1.0f - 2.0f / (exp_vf(2.0f * size) + 1.0f);
    return select_vf(size < 0.625f, x + x * y * p, select_vf(x < 0.0f, -far, far));
}

#if VL == 16
#define LANES(w, x, y, z) (vi){w, x, y, z, w + 4, x + 4, y + 4, z + 4, w + 8, x + 8, y + 8, z + 8, w + 12, x + 12, y + 12, z + 12}
#elif VL == 8
#define LANES(w, x, y, z) (vi){w, x, y, z, w + 4, x + 4, y + 4, z + 4}
#else
#define LANES(w, x, y, z) (vi){w, x, y, z}
#endif

/* VL lines of VL lanes to columns, in place: four by four in each quarter, then the quarters. */
INLINE void transpose(vf x[VL]) {
#pragma GCC unroll 4
    for (int i = 0; i < VL; i += 4) {
        vf a = __builtin_shuffle(x[i], x[i + 1], LANES(0, VL, 1, VL + 1));
        vf b = __builtin_shuffle(x[i], x[i + 1], LANES(2, VL + 2, 3, VL + 3));
        vf c = __builtin_shuffle(x[i + 2], x[i + 3], LANES(0, VL, 1, VL + 1));
        vf d = __builtin_shuffle(x[i + 2], x[i + 3], LANES(2, VL + 2, 3, VL + 3));
        x[i] = __builtin_shuffle(a, c, LANES(0, 1, VL, VL + 1));
        x[i + 1] = __builtin_shuffle(a, c, LANES(2, 3, VL + 2, VL + 3));
        x[i + 2] = __builtin_shuffle(b, d, LANES(0, 1, VL, VL + 1));
        x[i + 3] = __builtin_shuffle(b, d, LANES(2, 3, VL + 2, VL + 3));
    }
#if VL == 16
#define EVEN (vi){0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27}
#define ODD (vi){4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31}
    vf out[VL];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        vf a = __builtin_shuffle(x[i], x[i + 4], EVEN), b = __builtin_shuffle(x[i], x[i + 4], ODD);
        vf c = __builtin_shuffle(x[i + 8], x[i + 12], EVEN), d = __builtin_shuffle(x[i + 8], x[i + 12], ODD);
        out[i] = __builtin_shuffle(a, c, EVEN);
        out[i + 4] = __builtin_shuffle(b, d, EVEN);
        out[i + 8] = __builtin_shuffle(a, c, ODD);
        out[i + 12] = __builtin_shuffle(b, d, ODD);
    }
#pragma GCC unroll 16
    for (int i = 0; i < VL; i++) x[i] = out[i];
#undef EVEN
#undef ODD
#elif VL == 8
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        vf a = __builtin_shuffle(x[i], x[i + 4], (vi){0, 1, 2, 3, 8, 9, 10, 11});
        x[i + 4] = __builtin_shuffle(x[i], x[i + 4], (vi){4, 5, 6, 7, 12, 13, 14, 15});
        x[i] = a;
    }
#endif
}
#undef LANES
