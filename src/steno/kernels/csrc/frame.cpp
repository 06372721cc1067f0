// Keys or values of some heads side by side as whole numbers in a basis, and back: the rotation, the mean, the product and
// the rounding in one pass over the tokens. What steno/codec/transform.py does in torch, for processors that multiply bfloat16.
#include <cstdint>
#include <new>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// `_Problem` of steno/kernels/frame.py has the same fields. C = num_heads * head_dim, head_dim a multiple of 16.
struct FrameProblem {
    void *const *heads;       // [num_heads], of each where its values [tokens][head_dim] lie
    const float *const *cos;  // [num_heads], of each [tokens][half]
    const float *const *sin;
    const float *mean;   // [C]
    const void *matrix;  // [C][C]: int8 from numbers to values, bfloat16 from values to numbers
    int8_t *numbers;     // [tokens][C]
    int64_t tokens;
    int64_t num_heads;
    int64_t head_dim;
    int64_t half;       // channels i and i + half are turned; 0: none
    int64_t is_bfloat;  // of the values: else they are float
    float scale;        // of the numbers, or what is added to their size before it is cut off
};

namespace {

#if defined(__x86_64__)

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")))

constexpr int kTokens = 6;  // at a time: with four vectors of columns as many sums as registers can hold
constexpr int64_t kLanes = 16;

bool can_run() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("avx512bf16");
}

TARGET inline __mmask16 lanes(int64_t left) { return left >= kLanes ? 0xffff : static_cast<__mmask16>((1u << left) - 1); }

// Turns channels i and i + half of one head by its angles, or back where sign is -1.
TARGET void turn(float *x, const float *cos, const float *sin, int64_t half, float sign) {
    for (int64_t i = 0; i < half; i += kLanes) {
        const __mmask16 m = lanes(half - i);
        const __m512 a = _mm512_maskz_loadu_ps(m, x + i), b = _mm512_maskz_loadu_ps(m, x + half + i);
        const __m512 c = _mm512_maskz_loadu_ps(m, cos + i);
        const __m512 s = _mm512_mul_ps(_mm512_set1_ps(sign), _mm512_maskz_loadu_ps(m, sin + i));
        _mm512_mask_storeu_ps(x + i, m, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
        _mm512_mask_storeu_ps(x + half + i, m, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)));
    }
}

// A matrix [C][C] of numbers of which `per_word` fill 32 bits, as [C / per_word][C][per_word].
template <class Number>
std::vector<Number> packed(const Number *matrix, int64_t channels) {
    constexpr int64_t per_word = 4 / sizeof(Number);
    std::vector<Number> out(channels * channels);
    for (int64_t k = 0; k < channels; k++)
        for (int64_t c = 0; c < channels; c++)
            out[(k / per_word * channels + c) * per_word + k % per_word] = matrix[k * channels + c];
    return out;
}

using Ints = int32_t __attribute__((vector_size(64)));  // with __m512i gcc copies every sum

struct Bytes {  // unsigned times signed
    using Sum = Ints;
    TARGET static inline Sum zero() { return Sum{}; }
    TARGET static inline Sum add(Sum sum, int32_t word, const void *matrix) {
        return (Ints)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(word), _mm512_loadu_si512(matrix));
    }
};

struct Bfloats {
    using Sum = __m512;
    TARGET static inline Sum zero() { return _mm512_setzero_ps(); }
    TARGET static inline Sum add(Sum sum, int32_t word, const void *matrix) {
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(word), (__m512bh)_mm512_loadu_si512(matrix));
    }
};

// kTokens rows of `words` words times 16 * Z columns of a packed matrix of `channels` columns; I: 0 .. kTokens * Z - 1, as
// only constant places of an array become registers.
template <class Kind, int Z, int... I>
TARGET inline void multiply(const int32_t *rows, const int32_t *matrix, int64_t words, int64_t channels,
                            typename Kind::Sum (*sums)[4], std::integer_sequence<int, I...>) {
    typename Kind::Sum sum[kTokens * Z];
    ((sum[I] = Kind::zero()), ...);
    for (int64_t k = 0; k < words; k++, matrix += channels)
        ((sum[I] = Kind::add(sum[I], rows[I / Z * words + k], matrix + I % Z * kLanes)), ...);
    ((sums[I / Z][I % Z] = sum[I]), ...);
}

template <int Z>
using Places = std::make_integer_sequence<int, kTokens * Z>;

template <class Kind>
TARGET void multiply(int columns, const int32_t *rows, const int32_t *matrix, int64_t words, int64_t channels,
                     typename Kind::Sum (*sums)[4]) {
    if (columns == 4) return multiply<Kind, 4>(rows, matrix, words, channels, sums, Places<4>());
    if (columns == 3) return multiply<Kind, 3>(rows, matrix, words, channels, sums, Places<3>());
    if (columns == 2) return multiply<Kind, 2>(rows, matrix, words, channels, sums, Places<2>());
    multiply<Kind, 1>(rows, matrix, words, channels, sums, Places<1>());
}

TARGET void store(const FrameProblem &p, int64_t token, float *row) {
    for (int64_t h = 0; h < p.num_heads; h++, row += p.head_dim) {
        if (p.half) turn(row, p.cos[h] + token * p.half, p.sin[h] + token * p.half, p.half, 1.0f);
        const int64_t at = token * p.head_dim;
        for (int64_t d = 0; d < p.head_dim; d += kLanes) {
            const __m512 x = _mm512_loadu_ps(row + d);
            if (p.is_bfloat)
                _mm256_storeu_si256(reinterpret_cast<__m256i *>(static_cast<uint16_t *>(p.heads[h]) + at + d),
                                    (__m256i)_mm512_cvtneps_pbh(x));
            else
                _mm512_storeu_ps(static_cast<float *>(p.heads[h]) + at + d, x);
        }
    }
}

TARGET void load(const FrameProblem &p, int64_t token, float *row, uint16_t *out) {
    const float *mean = p.mean;
    for (int64_t h = 0; h < p.num_heads; h++, row += p.head_dim, mean += p.head_dim, out += p.head_dim) {
        const int64_t at = token * p.head_dim;
        for (int64_t d = 0; d < p.head_dim; d += kLanes) {
            __m512 x;
            if (p.is_bfloat) {
                const auto *from = static_cast<const uint16_t *>(p.heads[h]) + at + d;
                const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
                x = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
            } else {
                x = _mm512_loadu_ps(static_cast<const float *>(p.heads[h]) + at + d);
            }
            _mm512_storeu_ps(row + d, x);
        }
        if (p.half) turn(row, p.cos[h] + token * p.half, p.sin[h] + token * p.half, p.half, -1.0f);
        for (int64_t d = 0; d < p.head_dim; d += kLanes) {
            const __m512 x = _mm512_sub_ps(_mm512_loadu_ps(row + d), _mm512_loadu_ps(mean + d));
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + d), (__m256i)_mm512_cvtneps_pbh(x));
        }
    }
}

TARGET void decode(const FrameProblem &p) {
    const int64_t channels = p.num_heads * p.head_dim, words = channels / 4;
    const auto *basis = static_cast<const int8_t *>(p.matrix);
    const std::vector<int8_t> matrix = packed(basis, channels);
    std::vector<int32_t> excess(channels);  // of the sums, as numbers are taken with 128 more
    for (int64_t k = 0; k < channels; k++)
        for (int64_t c = 0; c < channels; c++) excess[c] += 128 * basis[k * channels + c];
    std::vector<int32_t> in(kTokens * words);
    std::vector<float> out(kTokens * channels);
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    for (int64_t first = 0; first < p.tokens; first += kTokens) {
        const int64_t count = p.tokens - first < kTokens ? p.tokens - first : kTokens;
        for (int64_t i = 0; i < count * channels; i += 64) {
            const __mmask64 m = count * channels - i >= 64 ? ~0ull : (1ull << (count * channels - i)) - 1;
            const __m512i x = _mm512_maskz_loadu_epi8(m, p.numbers + first * channels + i);
            _mm512_mask_storeu_epi8(reinterpret_cast<int8_t *>(in.data()) + i, m, _mm512_xor_si512(x, sign));
        }
        for (int64_t c = 0; c < channels; c += 4 * kLanes) {
            const int columns = static_cast<int>(channels - c < 4 * kLanes ? (channels - c) / kLanes : 4);
            Ints sums[kTokens][4];
            multiply<Bytes>(columns, in.data(), reinterpret_cast<const int32_t *>(matrix.data()) + c, words, channels, sums);
            for (int t = 0; t < kTokens; t++)
                for (int z = 0; z < columns; z++) {
                    const int64_t at = c + z * kLanes;
                    const __m512i sum = _mm512_sub_epi32((__m512i)sums[t][z], _mm512_loadu_si512(excess.data() + at));
                    const __m512 x = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(p.scale));
                    _mm512_storeu_ps(out.data() + t * channels + at, _mm512_add_ps(x, _mm512_loadu_ps(p.mean + at)));
                }
        }
        for (int64_t t = 0; t < count; t++) store(p, first + t, out.data() + t * channels);
    }
}

// The largest size of a number.
TARGET int32_t encode(const FrameProblem &p) {
    const int64_t channels = p.num_heads * p.head_dim, words = channels / 2;
    const std::vector<uint16_t> matrix = packed(static_cast<const uint16_t *>(p.matrix), channels);
    std::vector<float> row(channels);
    std::vector<uint16_t> in(kTokens * channels);
    const __m512 bias = _mm512_set1_ps(p.scale), sign = _mm512_set1_ps(-0.0f);
    const __m512i largest = _mm512_set1_epi32(127), smallest = _mm512_set1_epi32(-127);
    __m512i peak = _mm512_setzero_si512();
    for (int64_t first = 0; first < p.tokens; first += kTokens) {
        const int64_t count = p.tokens - first < kTokens ? p.tokens - first : kTokens;
        for (int64_t t = 0; t < count; t++) load(p, first + t, row.data(), in.data() + t * channels);
        for (int64_t c = 0; c < channels; c += 4 * kLanes) {
            const int columns = static_cast<int>(channels - c < 4 * kLanes ? (channels - c) / kLanes : 4);
            __m512 sums[kTokens][4];
            multiply<Bfloats>(columns, reinterpret_cast<const int32_t *>(in.data()),
                              reinterpret_cast<const int32_t *>(matrix.data()) + c, words, channels, sums);
            for (int64_t t = 0; t < count; t++)
                for (int z = 0; z < columns; z++) {
                    const __m512 more = _mm512_or_ps(bias, _mm512_and_ps(sums[t][z], sign));
                    const __m512i whole = _mm512_cvttps_epi32(_mm512_add_ps(sums[t][z], more));
                    const __m512i cut = _mm512_max_epi32(_mm512_min_epi32(whole, largest), smallest);
                    peak = _mm512_max_epi32(peak, _mm512_abs_epi32(cut));
                    _mm_storeu_si128(
                        reinterpret_cast<__m128i *>(p.numbers + (first + t) * channels + c + z * kLanes),
                        _mm512_cvtepi32_epi8(cut));
                }
        }
    }
    return _mm512_reduce_max_epi32(peak);
}

#endif

}  // namespace

#define EXPORT __attribute__((visibility("default")))

extern "C" {

EXPORT int32_t steno_frame_runs() {
#if defined(__x86_64__)
    return can_run();
#else
    return 0;
#endif
}

// The values of `numbers`; where steno_frame_runs. 0: done, 3: out of memory.
EXPORT int32_t steno_frame_decode(const FrameProblem *p) try {
#if defined(__x86_64__)
    decode(*p);
#else
    (void)p;
#endif
    return 0;
} catch (const std::bad_alloc &) {
    return 3;
}

// The numbers of values, -127 .. 127; where steno_frame_runs. The largest size of one, -3: out of memory.
EXPORT int32_t steno_frame_encode(const FrameProblem *p) try {
#if defined(__x86_64__)
    return encode(*p);
#else
    (void)p;
    return 0;
#endif
} catch (const std::bad_alloc &) {
    return -3;
}
}
