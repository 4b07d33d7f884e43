// Sixteen floats at a time, in GCC's and clang's vector extensions: one source for every CPU, tuned for AVX-512.
//
// Every function here gives a lane the same bits whatever its neighbours hold; that is why exp is ours.
#pragma once

#include <cstdint>
#include <cstring>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

struct bf16 { uint16_t bits; };

static inline f32x16 splat(float x) { return x - (f32x16){}; }

static inline f32x16 load(const float* p) { f32x16 v; memcpy(&v, p, 64); return v; }
static inline f32x16 load(const bf16* p) {
    u16x16 h;
    memcpy(&h, p, 32);
    return (f32x16)(__builtin_convertvector(h, u32x16) << 16);
}

static inline u32x16 load(const uint32_t* p) { u32x16 v; memcpy(&v, p, 64); return v; }
static inline void store(uint32_t* p, u32x16 v) { memcpy(p, &v, 64); }

static inline void store(float* p, f32x16 v) { memcpy(p, &v, 64); }
static inline void store(bf16* p, f32x16 v) {                       // to nearest, ties to even; NaN stays NaN
    u32x16 w = (u32x16)v;
    u32x16 rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
    u32x16 nan = (u32x16)((w & 0x7fffffffu) > 0x7f800000u);
    u16x16 h = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0u), u16x16);
    memcpy(p, &h, 32);
}

// The same for the last n < 16 elements of a row; lanes beyond are zero, and not stored.
template <typename C> static inline auto load_some(const C* p, int64_t n) {
    if (n >= 16) return load(p);
    C t[16] = {};
    memcpy(t, p, n * sizeof(C));
    return load(t);
}
template <typename C> static inline void store_some(C* p, f32x16 v, int64_t n) {
    if (n >= 16) return store(p, v);
    C t[16];
    store(t, v);
    memcpy(p, t, n * sizeof(C));
}

static inline f32x16 select(i32x16 mask, f32x16 yes, f32x16 no) {
    return (f32x16)((mask & (i32x16)yes) | (~mask & (i32x16)no));
}
static inline f32x16 larger(f32x16 a, f32x16 b) { return select(a > b, a, b); }

// The value of x rounded to T and back: what a tensor of that dtype would have held in between.
static inline f32x16 through(f32x16 x, const float*) { return x; }
static inline f32x16 through(f32x16 x, const bf16*) { bf16 t[16]; store(t, x); return load(t); }

// Halves until one is left, in a fixed order.
static inline float sum(f32x16 v) {
    typedef float f32x8 __attribute__((vector_size(32)));
    typedef float f32x4 __attribute__((vector_size(16)));
    f32x8 a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    f32x4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
    return (b[0] + b[2]) + (b[1] + b[3]);
}
static inline float largest(f32x16 v) {
    float m = v[0];
    for (int i = 1; i < 16; i++) m = v[i] > m ? v[i] : m;
    return m;
}

// exp to 1-2 units in the last place (Cephes' polynomial); 0 below -87, exactly 1 at 0, NaN for NaN.
static inline f32x16 exp16(f32x16 x) {
    const float shift = 12582912.0f;                                // 1.5 * 2**23: adding it rounds to a whole number
    i32x16 below = x < -87.0f;
    x = select(x > 88.0f, splat(88.0f), x);
    f32x16 biased = x * 1.44269504088896341f + shift;
    f32x16 n = biased - shift;
    f32x16 r = x - n * 0.693359375f + n * 2.12194440e-4f;
    f32x16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    f32x16 power = (f32x16)(((u32x16)biased << 23) + (127u << 23)); // 2**n: n sits in the low bits of `biased`; wraps where x is `below`
    return select(below, splat(0.0f), p * power);
}

// One step of a sum: a number, or a pair of bf16 where the machine multiplies pairs, spread over all lanes and multiplied
// with a vector of them.
static inline f32x16 spread(const float* p) { return splat(*p); }
static inline f32x16 multiply_add(f32x16 acc, f32x16 a, f32x16 b) { return acc + a * b; }
#ifdef __AVX512BF16__
static inline u32x16 spread(const bf16* p) {
    uint32_t pair;
    memcpy(&pair, p, 4);
    return pair - (u32x16){};
}
static inline f32x16 multiply_add(f32x16 acc, u32x16 a, u32x16 b) { // acc + a.low * b.low + a.high * b.high, lane by lane
    return (f32x16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
}
#else
static inline f32x16 spread(const bf16* p) { return (f32x16)((uint32_t(p->bits) << 16) - (u32x16){}); }
#endif

// The numbers of one sum that a step of it takes, as they lie side by side: a pair where the machine multiplies pairs.
template <typename C> struct Step { typedef C Lane; };
#ifdef __AVX512BF16__
template <> struct Step<bf16> { typedef uint32_t Lane; };
#endif
template <typename C> using Lane = typename Step<C>::Lane;
template <typename C> constexpr int64_t TOGETHER = sizeof(Lane<C>) / sizeof(C);

constexpr int MAX_PARTS = 64;

// arch.summation.tree_add for vectors: neighbours first, an odd one out waits for the next round.
static inline f32x16 tree_add(f32x16* v, int n) {
    for (; n > 1; n = (n + 1) / 2) {
        for (int i = 0; i < n / 2; i++) v[i] = v[2 * i] + v[2 * i + 1];
        if (n % 2) v[n / 2] = v[n - 1];
    }
    return v[0];
}
