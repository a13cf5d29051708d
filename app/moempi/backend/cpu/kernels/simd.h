/* Vectors of float32 by instruction set: AVX-512, AVX2 or NEON, chosen when the file is compiled.
 *
 * A row of numbers is taken in groups of GROUP lanes whatever the width of a vector, so sums over a row are in one order
 * on every processor. Products are fused with the addition that follows only where `fused` says so: the compiler must
 * not (-ffp-contract=off). With equal orders and equal operations, all processors give the same bits.
 */
#pragma once
#include <stdint.h>
#include <string.h>

#define GROUP 16
#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
typedef __m512 vec;
typedef __m512i ivec;
INLINE vec load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void store(float *p, vec v) { _mm512_storeu_ps(p, v); }
INLINE vec set1(float f) { return _mm512_set1_ps(f); }
INLINE vec fused(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vec add(vec a, vec b) { return _mm512_add_ps(a, b); }
INLINE vec sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
INLINE vec mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
INLINE vec quotient(vec a, vec b) { return _mm512_div_ps(a, b); }
INLINE vec larger(vec limit, vec v) { return _mm512_max_ps(limit, v); }
INLINE vec smaller(vec limit, vec v) { return _mm512_min_ps(limit, v); }
INLINE ivec as_bits(vec v) { return _mm512_castps_si512(v); }
INLINE vec as_floats(ivec v) { return _mm512_castsi512_ps(v); }
INLINE ivec load_bits(const void *p) { return _mm512_loadu_si512(p); }
INLINE ivec bits1(uint32_t b) { return _mm512_set1_epi32((int)b); }
INLINE ivec and_bits(ivec a, ivec b) { return _mm512_and_si512(a, b); }
INLINE ivec add_bits(ivec a, ivec b) { return _mm512_add_epi32(a, b); }
INLINE ivec left(ivec a, const int n) { return _mm512_slli_epi32(a, n); }
INLINE ivec right(ivec a, const int n) { return _mm512_srli_epi32(a, n); }
INLINE ivec load_halves(const uint16_t *p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)); }
INLINE void store_halves(uint16_t *p, ivec v) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(v)); }
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define LANES 8
typedef __m256 vec;
typedef __m256i ivec;
INLINE vec load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void store(float *p, vec v) { _mm256_storeu_ps(p, v); }
INLINE vec set1(float f) { return _mm256_set1_ps(f); }
INLINE vec fused(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vec add(vec a, vec b) { return _mm256_add_ps(a, b); }
INLINE vec sub(vec a, vec b) { return _mm256_sub_ps(a, b); }
INLINE vec mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
INLINE vec quotient(vec a, vec b) { return _mm256_div_ps(a, b); }
INLINE vec larger(vec limit, vec v) { return _mm256_max_ps(limit, v); }
INLINE vec smaller(vec limit, vec v) { return _mm256_min_ps(limit, v); }
INLINE ivec as_bits(vec v) { return _mm256_castps_si256(v); }
INLINE vec as_floats(ivec v) { return _mm256_castsi256_ps(v); }
INLINE ivec load_bits(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE ivec bits1(uint32_t b) { return _mm256_set1_epi32((int)b); }
INLINE ivec and_bits(ivec a, ivec b) { return _mm256_and_si256(a, b); }
INLINE ivec add_bits(ivec a, ivec b) { return _mm256_add_epi32(a, b); }
INLINE ivec left(ivec a, const int n) { return _mm256_slli_epi32(a, n); }
INLINE ivec right(ivec a, const int n) { return _mm256_srli_epi32(a, n); }
INLINE ivec load_halves(const uint16_t *p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)); }
INLINE void store_halves(uint16_t *p, ivec v) {
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(v, v), 0x08);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(packed));
}
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#define LANES 4
typedef float32x4_t vec;
typedef uint32x4_t ivec;
INLINE vec load(const float *p) { return vld1q_f32(p); }
INLINE void store(float *p, vec v) { vst1q_f32(p, v); }
INLINE vec set1(float f) { return vdupq_n_f32(f); }
INLINE vec fused(vec a, vec b, vec c) { return vfmaq_f32(c, a, b); }
INLINE vec add(vec a, vec b) { return vaddq_f32(a, b); }
INLINE vec sub(vec a, vec b) { return vsubq_f32(a, b); }
INLINE vec mul(vec a, vec b) { return vmulq_f32(a, b); }
INLINE vec quotient(vec a, vec b) { return vdivq_f32(a, b); }
INLINE vec larger(vec limit, vec v) { return vmaxq_f32(limit, v); }
INLINE vec smaller(vec limit, vec v) { return vminq_f32(limit, v); }
INLINE ivec as_bits(vec v) { return vreinterpretq_u32_f32(v); }
INLINE vec as_floats(ivec v) { return vreinterpretq_f32_u32(v); }
INLINE ivec load_bits(const void *p) { return vreinterpretq_u32_u8(vld1q_u8(p)); }
INLINE ivec bits1(uint32_t b) { return vdupq_n_u32(b); }
INLINE ivec and_bits(ivec a, ivec b) { return vandq_u32(a, b); }
INLINE ivec add_bits(ivec a, ivec b) { return vaddq_u32(a, b); }
INLINE ivec left(ivec a, const int n) { return vshlq_u32(a, vdupq_n_s32(n)); }
INLINE ivec right(ivec a, const int n) { return vshlq_u32(a, vdupq_n_s32(-n)); }
INLINE ivec load_halves(const uint16_t *p) { return vmovl_u16(vld1_u16(p)); }
INLINE void store_halves(uint16_t *p, ivec v) { vst1_u16(p, vmovn_u32(v)); }
#else
#error "no kernels for this processor"
#endif

/* c plus the products of two pairs of bfloat16 numbers in each lane. */
#if defined(__AVX512BF16__) && !defined(WITHOUT_PAIRS)
#define HAS_PAIRS 1
INLINE vec fused_pairs(vec a, vec b, vec c) {
    return _mm512_dpbf16_ps(c, (__m512bh)as_bits(a), (__m512bh)as_bits(b));
}
#else
#define HAS_PAIRS 0
#define fused_pairs fused
#endif

/* The bfloat16 number in a half of each word. */
INLINE vec high_half(ivec words) { return as_floats(and_bits(words, bits1(0xFFFF0000u))); }
INLINE vec low_half(ivec words) { return as_floats(left(words, 16)); }

/* Let this thread take subnormal numbers, of inputs and results, for zero; returns its mode until now. */
static inline long flush_subnormals(void) {
    long before;
#if defined(__aarch64__)
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    __asm__ volatile("msr fpcr, %0" : : "r"(before | 1 << 24) : "memory");
#else
    before = (long)_mm_getcsr();
    _mm_setcsr((unsigned)before | 0x8040);
    __asm__ volatile("" : : : "memory");
#endif
    return before;
}
static inline void restore_subnormals(long before) {
#if defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"(before) : "memory");
#else
    __asm__ volatile("" : : : "memory");
    _mm_setcsr((unsigned)before);
#endif
}

static inline long smallest(long a, long b) { return a < b ? a : b; }
static inline long largest(long a, long b) { return a > b ? a : b; }

#define VECS (GROUP / LANES)
typedef struct {
    vec part[VECS];
} group; /* GROUP numbers */

#define EACH(i) for (int i = 0; i < VECS; i++)
INLINE group load_group(const float *p) {
    group g;
    EACH(i) g.part[i] = load(p + i * LANES);
    return g;
}
INLINE void store_group(float *p, group g) { EACH(i) store(p + i * LANES, g.part[i]); }
INLINE group same(float f) {
    group g;
    EACH(i) g.part[i] = set1(f);
    return g;
}

/* The first `count` numbers, and zeros. */
INLINE group load_some(const float *p, long count) {
    float numbers[GROUP] = {0};
    memcpy(numbers, p, sizeof(float) * (size_t)count);
    return load_group(numbers);
}
INLINE void store_some(float *p, group g, long count) {
    float numbers[GROUP];
    store_group(numbers, g);
    memcpy(p, numbers, sizeof(float) * (size_t)count);
}
/* `count` numbers, or as many as a group has. */
INLINE group load_part(const float *p, long count) { return count >= GROUP ? load_group(p) : load_some(p, count); }
INLINE void store_part(float *p, group g, long count) {
    count >= GROUP ? store_group(p, g) : store_some(p, g, count);
}
INLINE group fused_groups(group a, group b, group c) {
    EACH(i) c.part[i] = fused(a.part[i], b.part[i], c.part[i]);
    return c;
}
INLINE group load_bfloat16(const uint16_t *p) {
    group g;
    EACH(i) g.part[i] = as_floats(left(load_halves(p + i * LANES), 16));
    return g;
}
INLINE group load_some_bfloat16(const uint16_t *p, long count) {
    uint16_t numbers[GROUP] = {0};
    memcpy(numbers, p, sizeof(uint16_t) * (size_t)count);
    return load_bfloat16(numbers);
}

/* The first `count` numbers, at most a group, of a cache from number `index` on. */
INLINE group load_cached(const char *at, long index, long count, const int is_bfloat16) {
    if (is_bfloat16) {
        const uint16_t *p = (const uint16_t *)at + index;
        return count >= GROUP ? load_bfloat16(p) : load_some_bfloat16(p, count);
    }
    const float *p = (const float *)at + index;
    return count >= GROUP ? load_group(p) : load_some(p, count);
}

/* The sum of all lanes: lanes i and i + 8 are added, then i and i + 4, i + 2, i + 1. */
INLINE float sum_of(group g) {
#if LANES == 4
    vec four = add(add(g.part[0], g.part[2]), add(g.part[1], g.part[3]));
    float n[4];
    store(n, four);
    return (n[0] + n[2]) + (n[1] + n[3]);
#else
#if LANES == 16
    __m512d whole = _mm512_castps_pd(g.part[0]);
    __m256 eight = _mm256_add_ps(_mm256_castpd_ps(_mm512_castpd512_pd256(whole)),
                                 _mm256_castpd_ps(_mm512_extractf64x4_pd(whole, 1)));
#else
    __m256 eight = add(g.part[0], g.part[1]);
#endif
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#endif
}

/* The nearest bfloat16 value, ties to even; a NaN that arithmetic produces stays NaN. */
INLINE vec nearest_bfloat16(vec v) {
    ivec bits = as_bits(v);
    ivec odd = and_bits(right(bits, 16), bits1(1));
    return as_floats(and_bits(add_bits(bits, add_bits(odd, bits1(0x7FFF))), bits1(0xFFFF0000u)));
}

INLINE group rounded_group(group g, int rounded) {
    EACH(i) g.part[i] = rounded ? nearest_bfloat16(g.part[i]) : g.part[i];
    return g;
}

/* e^v within 1.2e-7 of it; the arguments are limited to [-87.3, 88.3], whose results are normal numbers.
 *
 * e^v = 2^n e^r with r at most log(2) / 2 (Cody and Waite 1980), and e^r = 1 + r + r^2 q(r).
 */
INLINE vec exponential(vec v) {
    const vec magic = set1(12582912.0f); /* 1.5 * 2^23: adding it rounds to a whole number, in the low bits */
    vec limited = larger(set1(-87.3f), smaller(set1(88.3f), v));
    vec shifted = fused(limited, set1(1.44269504f), magic);
    vec whole = sub(shifted, magic);
    vec rest = fused(whole, set1(-0.693145752f), limited);
    rest = fused(whole, set1(-1.42860677e-6f), rest);
    vec q = fused(rest, set1(1.39337068e-3f), set1(8.36320501e-3f));
    q = fused(q, rest, set1(4.16664630e-2f));
    q = fused(q, rest, set1(1.66665763e-1f));
    q = fused(q, rest, set1(0.5f));
    vec p = add(fused(q, mul(rest, rest), rest), set1(1.0f));
    return as_floats(add_bits(as_bits(p), left(as_bits(shifted), 23)));
}

/* v times its sigmoid. */
INLINE vec silu(vec v) { return quotient(v, add(exponential(sub(set1(-0.0f), v)), set1(1))); }
