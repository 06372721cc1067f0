// The kernel for any machine, in the vector extension of gcc and clang.
#include "dense.h"

namespace {

typedef float F __attribute__((vector_size(64)));
typedef uint32_t I __attribute__((vector_size(64)));
typedef int32_t S __attribute__((vector_size(64)));
typedef uint16_t U16 __attribute__((vector_size(32)));
constexpr int kAccumulators = 3;

template <class T, class P>
inline T read(const P *p) {
    T x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}
inline F as_float(I x) { return reinterpret_cast<F>(x); }
inline I as_bits(F x) { return reinterpret_cast<I>(x); }

inline F load(const float *p) { return read<F>(p); }
inline void store(float *p, F x) { __builtin_memcpy(p, &x, sizeof x); }
inline void prefetch(const void *p) { __builtin_prefetch(p); }
inline void prefetch_far(const void *p) { __builtin_prefetch(p); }
inline F set1(float x) { return F{} + x; }
inline F add(F a, F b) { return a + b; }
inline F sub(F a, F b) { return a - b; }
inline F mul(F a, F b) { return a * b; }
inline F div(F a, F b) { return a / b; }
inline F fma(F a, F b, F c) { return a * b + c; }
inline F select(S mask, F yes, F no) {
    return as_float((as_bits(yes) & reinterpret_cast<I>(mask)) | (as_bits(no) & ~reinterpret_cast<I>(mask)));
}
inline F max(F a, F b) { return select(a > b, a, b); }
inline F round(F x) { return (x + 12582912.f) - 12582912.f; }  // 1.5 * 2^23: the sum has no fraction bits
inline F times_pow2(F x, F n) { return x * as_float(reinterpret_cast<I>(__builtin_convertvector(n, S) + 127) << 23); }
inline F abs_of(F x) { return as_float(as_bits(x) & 0x7fffffffu); }
inline F with_sign_of(F x, F sign) { return as_float(as_bits(x) | (as_bits(sign) & 0x80000000u)); }
inline float hsum(F x) {
    float sum = 0.f;
    for (int i = 0; i < kLanes; i++) sum += x[i];
    return sum;
}
inline float hmax(F x) {
    float top = x[0];
    for (int i = 1; i < kLanes; i++) top = x[i] > top ? x[i] : top;
    return top;
}
inline bool any_greater(F a, F b) { return hmax(sub(a, b)) > 0.f; }
inline F select_less(F a, F b, F yes, F no) { return select(a < b, yes, no); }
// The floor of a number of at least -126; of a whole number, the number itself or one less.
inline F floor(F x) { return round(max(x, set1(-126.f)) - 0.5f); }
inline F fraction(F x) { return x - floor(x); }
inline F times_pow2_floor(F y, F x) { return select(x < -126.f, set1(0.f), times_pow2(y, floor(x))); }
inline F keep_first(F x, int64_t n, float other) {
    const S index = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return select(index < static_cast<int32_t>(n), x, set1(other));
}

// fp16 bits in the low half of each lane: exponent and mantissa move up, 2^112 corrects the exponent, subnormals
// included.
inline F halves_to_float(I x) {
    const I magnitude = (x & 0x7fffu) << 13, sign = (x & 0x8000u) << 16;
    const F value = as_float(magnitude) * 0x1p112f;
    const F special = as_float(magnitude | 0x7f800000u);
    return as_float(as_bits(select(reinterpret_cast<S>(magnitude) >= 0x0f800000, special, value)) | sign);
}
inline I load_words(const uint16_t *p) { return __builtin_convertvector(read<U16>(p), I); }
inline F load_half(const uint16_t *p) { return halves_to_float(load_words(p)); }
inline F load_bfloat16(const uint16_t *p) { return as_float(load_words(p) << 16); }
inline float half_to_float(uint16_t x) { return halves_to_float(I{} + x)[0]; }

inline I load_line(const uint8_t *p) { return read<I>(p); }
inline I shift_right(I x, int n) { return x >> static_cast<uint32_t>(n); }
template <int kBits>
inline F decode_low(I x) {
    return __builtin_convertvector(reinterpret_cast<S>(x & ((1u << kBits) - 1)), F);
}

inline I load_bytes(const uint8_t *p) {
    I x;
    for (int i = 0; i < kLanes; i++) x[i] = p[i];
    return x;
}
inline I shift_left(I x, int n) { return x << static_cast<uint32_t>(n); }
inline I and_of(I x, uint32_t mask) { return x & mask; }
inline I or_of(I a, I b) { return a | b; }
inline I plus(I a, I b) { return a + b; }
inline F halves_of(I x) { return halves_to_float(x); }
using Table = const float *;
inline Table load_table(const float *p) { return p; }
inline F look_up(Table table, I x) {
    F y;
    for (int i = 0; i < kLanes; i++) y[i] = table[x[i] & 15u];
    return y;
}

inline void transpose16(F *x) {
    float rows[kLanes][kLanes], columns[kLanes][kLanes];
    __builtin_memcpy(rows, x, sizeof rows);
    for (int i = 0; i < kLanes; i++)
        for (int j = 0; j < kLanes; j++) columns[j][i] = rows[i][j];
    __builtin_memcpy(x, columns, sizeof columns);
}

// The sums of the 16 lanes of each of x[0 .. 15].
inline F hsum16(const F *x) {
    F sums;
    for (int i = 0; i < kLanes; i++) sums[i] = hsum(x[i]);
    return sums;
}

#include "math.inl"
#include "operands.inl"
#include "levels.inl"
constexpr int64_t kMaxLevelVectors = 0;  // levels are decoded into scratch: seven codebooks take long to compile
#include "codes.inl"
#include "products.inl"
#include "bfloats.inl"
#include "attend.inl"
#include "dense.inl"
#include "encode.inl"

}  // namespace

const Kernels kPortableKernels = {attend, pack, flash, max_attention, encode, multiply_matrices};
