// The kernel for AVX2 with FMA and F16C: a vector of 16 floats is two registers.
#include "dense.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace {

struct F {
    __m256 lo, hi;
};
struct I {
    __m256i lo, hi;
};
constexpr int kAccumulators = 6;

inline F load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float *p, F x) { _mm256_storeu_ps(p, x.lo), _mm256_storeu_ps(p + 8, x.hi); }
inline void prefetch(const void *p) { _mm_prefetch(static_cast<const char *>(p), _MM_HINT_T0); }
// into the second level, as the first one has too few places for what is still on its way from memory
inline void prefetch_far(const void *p) { _mm_prefetch(static_cast<const char *>(p), _MM_HINT_T1); }
inline F set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F add(F a, F b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline F sub(F a, F b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline F mul(F a, F b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline F div(F a, F b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
inline F max(F a, F b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline F round(F x) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.lo, kNearest), _mm256_round_ps(x.hi, kNearest)};
}
inline __m256 pow2_of(__m256 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline F times_pow2(F x, F n) { return {_mm256_mul_ps(x.lo, pow2_of(n.lo)), _mm256_mul_ps(x.hi, pow2_of(n.hi))}; }
inline F floor(F x) { return {_mm256_floor_ps(x.lo), _mm256_floor_ps(x.hi)}; }
inline F fraction(F x) { return sub(x, floor(x)); }
inline F abs_of(F x) {
    const __m256 sign = _mm256_set1_ps(-0.f);
    return {_mm256_andnot_ps(sign, x.lo), _mm256_andnot_ps(sign, x.hi)};
}
inline F with_sign_of(F x, F s) {
    const __m256 sign = _mm256_set1_ps(-0.f);
    return {_mm256_or_ps(x.lo, _mm256_and_ps(sign, s.lo)), _mm256_or_ps(x.hi, _mm256_and_ps(sign, s.hi))};
}
inline float hsum(F x) {
    const __m256 s = _mm256_add_ps(x.lo, x.hi);
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
inline float hmax(F x) {
    const __m256 s = _mm256_max_ps(x.lo, x.hi);
    __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_max_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
}
inline bool any_greater(F a, F b) {
    const __m256 lo = _mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ), hi = _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ);
    return _mm256_movemask_ps(_mm256_or_ps(lo, hi)) != 0;
}
inline F select_less(F a, F b, F yes, F no) {
    return {_mm256_blendv_ps(no.lo, yes.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
            _mm256_blendv_ps(no.hi, yes.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
inline F times_pow2_floor(F y, F x) {
    return select_less(x, set1(-126.f), set1(0.f), times_pow2(y, floor(x)));
}
inline F keep_first(F x, int64_t n, float other) {
    const __m256 index = _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7), count = _mm256_set1_ps(static_cast<float>(n));
    const F indices{index, _mm256_add_ps(index, _mm256_set1_ps(8.f))};
    return select_less(indices, {count, count}, x, set1(other));
}

inline __m256 load_eight_halves(const uint16_t *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
inline F load_half(const uint16_t *p) { return {load_eight_halves(p), load_eight_halves(p + 8)}; }
inline __m256 load_eight_bfloats(const uint16_t *p) {
    const __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
}
inline F load_bfloat16(const uint16_t *p) { return {load_eight_bfloats(p), load_eight_bfloats(p + 8)}; }
inline float half_to_float(uint16_t x) { return _cvtsh_ss(x); }

inline I load_line(const uint8_t *p) {
    const __m256i *line = reinterpret_cast<const __m256i *>(p);
    return {_mm256_loadu_si256(line), _mm256_loadu_si256(line + 1)};
}
inline I shift_right(I x, int n) { return {_mm256_srli_epi32(x.lo, n), _mm256_srli_epi32(x.hi, n)}; }
template <int kBits>
inline __m256 decode_low_of(__m256i x) {
    if (kBits == 2) return _mm256_permutevar_ps(_mm256_setr_ps(0, 1, 2, 3, 0, 1, 2, 3), x);
    return _mm256_cvtepi32_ps(_mm256_and_si256(x, _mm256_set1_epi32((1 << kBits) - 1)));
}
template <int kBits>
inline F decode_low(I x) {
    return {decode_low_of<kBits>(x.lo), decode_low_of<kBits>(x.hi)};
}

inline I load_bytes(const uint8_t *p) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    return {_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8))};
}
inline I shift_left(I x, int n) { return {_mm256_slli_epi32(x.lo, n), _mm256_slli_epi32(x.hi, n)}; }
inline I and_of(I x, uint32_t mask) {
    const __m256i bits = _mm256_set1_epi32(static_cast<int>(mask));
    return {_mm256_and_si256(x.lo, bits), _mm256_and_si256(x.hi, bits)};
}
inline I or_of(I a, I b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
inline I plus(I a, I b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
// Halves in the low words of dwords, the high ones zero.
inline F halves_of(I x) {  // packing works within halves of a register
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(x.lo, x.hi), 0xd8);
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(words)), _mm256_cvtph_ps(_mm256_extracti128_si256(words, 1))};
}
using Table = F;
inline Table load_table(const float *p) { return load(p); }
inline __m256 look_up_eight(Table table, __m256i x) {  // bit 3 chooses between the halves of the table
    const __m256 low = _mm256_permutevar8x32_ps(table.lo, x), high = _mm256_permutevar8x32_ps(table.hi, x);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(x, 28)));
}
inline F look_up(Table table, I x) { return {look_up_eight(table, x.lo), look_up_eight(table, x.hi)}; }

inline void transpose8(__m256 *x) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)  // b[i + k], 128-bit lane l: column 4 l + k of the rows i .. i + 3
        for (int k = 0; k < 4; k++) {
            const __m256 low = a[i + k / 2], high = a[i + 2 + k / 2];
            b[i + k] = k % 2 ? _mm256_shuffle_ps(low, high, 0xee) : _mm256_shuffle_ps(low, high, 0x44);
        }
    for (int k = 0; k < 4; k++) {
        x[k] = _mm256_permute2f128_ps(b[k], b[4 + k], 0x20);
        x[4 + k] = _mm256_permute2f128_ps(b[k], b[4 + k], 0x31);
    }
}
inline void transpose16(F *x) {
    __m256 part[4][8];  // quarters of the matrix: row half, column half
    for (int i = 0; i < 16; i++) part[i / 8 * 2][i % 8] = x[i].lo, part[i / 8 * 2 + 1][i % 8] = x[i].hi;
    for (int i = 0; i < 4; i++) transpose8(part[i]);
    for (int i = 0; i < 8; i++) x[i] = {part[0][i], part[2][i]}, x[8 + i] = {part[1][i], part[3][i]};
}

inline __m256 add8(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
inline __m256 max8(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
// Neighbours put together: of a in the lower half of each 128 bits, of b in the upper one.
template <__m256 combine(__m256, __m256)>
inline __m256 reduce_pairs(__m256 a, __m256 b) {
    return combine(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd));
}
template <__m256 combine(__m256, __m256)>
inline __m256 reduce_quads(const __m256 *x) {
    return reduce_pairs<combine>(reduce_pairs<combine>(x[0], x[1]), reduce_pairs<combine>(x[2], x[3]));
}
// The 16 lanes of each of x[0 .. 15] put together: lane i of the result is that of x[i].
template <__m256 combine(__m256, __m256)>
inline F reduce16(const F *x) {
    __m256 half[2];
    for (int k = 0; k < 2; k++) {
        __m256 y[8];
        for (int i = 0; i < 8; i++) y[i] = combine(x[8 * k + i].lo, x[8 * k + i].hi);
        const __m256 a = reduce_quads<combine>(y), b = reduce_quads<combine>(y + 4);
        half[k] = combine(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    }
    return {half[0], half[1]};
}
inline F hsum16(const F *x) { return reduce16<add8>(x); }
inline F hmax16(const F *x) { return reduce16<max8>(x); }

#include "math.inl"
#include "operands.inl"
#include "levels.inl"
#include "level_products.inl"
constexpr float kLargestCoefficient = 32767.f;  // see fold.inl
#include "fold.inl"
#include "words.inl"
#include "products.inl"
#include "bfloats.inl"
#include "attend.inl"
#include "dense.inl"
#include "encode.inl"

}  // namespace

const Kernels kAvx2Kernels = {attend, pack, flash, max_attention, encode, multiply_matrices};

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
const Kernels kAvx2Kernels{};
#endif
