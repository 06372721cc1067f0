// A vector of 16 floats in AVX-512 (F, BW, DQ, VL); the file that includes this one has set the target.
using F = __m512;
using I = __m512i;
constexpr int kAccumulators = 24;

inline F load(const float *p) { return _mm512_loadu_ps(p); }
inline void store(float *p, F x) { _mm512_storeu_ps(p, x); }
inline void prefetch(const void *p) { _mm_prefetch(static_cast<const char *>(p), _MM_HINT_T0); }
// into the second level, as the first one has too few places for what is still on its way from memory
inline void prefetch_far(const void *p) { _mm_prefetch(static_cast<const char *>(p), _MM_HINT_T1); }
// The processor reads ahead by itself, but within 4 kB, and starts anew in the next.
inline void prefetch_page_start(const void *p) {
    if ((reinterpret_cast<uintptr_t>(p) & 4095) < 512) prefetch(p);
}
inline F set1(float x) { return _mm512_set1_ps(x); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F times_pow2(F x, F n) { return _mm512_scalef_ps(x, n); }
inline F fraction(F x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
inline F times_pow2_floor(F y, F x) {  // the instruction rounds the exponent down by itself
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, set1(-126.f), _CMP_NLT_UQ), y, x);
}
inline F abs_of(F x) { return _mm512_abs_ps(x); }
inline F with_sign_of(F x, F sign) { return _mm512_or_ps(x, _mm512_and_ps(sign, set1(-0.f))); }
inline float hsum(F x) { return _mm512_reduce_add_ps(x); }
inline float hmax(F x) { return _mm512_reduce_max_ps(x); }
inline bool any_greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
inline F select_less(F a, F b, F yes, F no) {
    return _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), yes);
}
inline F keep_first(F x, int64_t n, float other) {
    const __mmask16 keep = n >= kLanes ? 0xffff : n <= 0 ? 0 : (1u << n) - 1;
    return _mm512_mask_mov_ps(set1(other), keep, x);
}

inline F load_half(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
}
inline F load_bfloat16(const uint16_t *p) {
    const __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
}
inline float half_to_float(uint16_t x) { return _cvtsh_ss(x); }

inline I load_line(const uint8_t *p) { return _mm512_loadu_si512(p); }
inline I shift_right(I x, int n) { return _mm512_srli_epi32(x, static_cast<unsigned>(n)); }
// The low bits of every lane as a float; of 4 and 2 bits by a table look-up that ignores the higher ones.
template <int kBits>
inline F decode_low(I x) {
    if (kBits == 8) return _mm512_cvtepi32_ps(_mm512_and_si512(x, _mm512_set1_epi32(255)));
    if (kBits == 2) return _mm512_permutevar_ps(_mm512_setr_ps(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3), x);
    return _mm512_permutexvar_ps(x, _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
}

inline I load_bytes(const uint8_t *p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
inline I shift_left(I x, int n) { return _mm512_slli_epi32(x, static_cast<unsigned>(n)); }
inline I and_of(I x, uint32_t mask) { return _mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(mask))); }
inline I or_of(I a, I b) { return _mm512_or_si512(a, b); }
inline I plus(I a, I b) { return _mm512_add_epi32(a, b); }
// Halves in the low words of dwords, the high ones zero.
inline F halves_of(I x) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x)); }
using Table = F;
inline Table load_table(const float *p) { return load(p); }
inline F look_up(Table table, I x) { return _mm512_permutexvar_ps(x, table); }

inline void transpose16(F *x) {
    F a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
        a[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)  // b[i + k], 128-bit lane l: column 4 l + k of the rows i .. i + 3
        for (int k = 0; k < 4; k++) {
            const __m512d low = _mm512_castps_pd(a[i + k / 2]), high = _mm512_castps_pd(a[i + 2 + k / 2]);
            b[i + k] = _mm512_castpd_ps(k % 2 ? _mm512_unpackhi_pd(low, high) : _mm512_unpacklo_pd(low, high));
        }
    for (int k = 0; k < 4; k++) {
        const F p = _mm512_shuffle_f32x4(b[k], b[4 + k], 0x88), q = _mm512_shuffle_f32x4(b[k], b[4 + k], 0xdd);
        const F r = _mm512_shuffle_f32x4(b[8 + k], b[12 + k], 0x88),
                s = _mm512_shuffle_f32x4(b[8 + k], b[12 + k], 0xdd);
        x[k] = _mm512_shuffle_f32x4(p, r, 0x88);
        x[8 + k] = _mm512_shuffle_f32x4(p, r, 0xdd);
        x[4 + k] = _mm512_shuffle_f32x4(q, s, 0x88);
        x[12 + k] = _mm512_shuffle_f32x4(q, s, 0xdd);
    }
}

// The lanes of each of x[0 .. 3] put together within every 128 bits: lane i of the four belongs to x[i].
template <F combine(F, F)>
inline F reduce4(const F *x) {
    const F a = combine(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    const F b = combine(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
    return combine(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
}
// Four results of reduce4 put together: lanes 4 k .. 4 k + 3 of the result are those of part[k].
template <F combine(F, F)>
inline F reduce_parts(const F *part) {
    const F p = combine(_mm512_shuffle_f32x4(part[0], part[1], 0x88), _mm512_shuffle_f32x4(part[0], part[1], 0xdd));
    const F q = combine(_mm512_shuffle_f32x4(part[2], part[3], 0x88), _mm512_shuffle_f32x4(part[2], part[3], 0xdd));
    return combine(_mm512_shuffle_f32x4(p, q, 0x88), _mm512_shuffle_f32x4(p, q, 0xdd));
}
// The 16 lanes of each of x[0 .. 15] put together: lane i of the result is that of x[i].
template <F combine(F, F)>
inline F reduce16(const F *x) {
    F part[4];
    for (int k = 0; k < 4; k++) part[k] = reduce4<combine>(x + 4 * k);
    return reduce_parts<combine>(part);
}
inline F hsum16(const F *x) { return reduce16<add>(x); }
inline F hmax16(const F *x) { return reduce16<max>(x); }
