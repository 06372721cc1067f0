// Elementary functions and partial loads over the vector type F, and loops that are unrolled for certain.

// body(Index<0>) .. body(Index<N - 1>). The compiler keeps arrays that only constants index in registers; with loops it
// unrolls too late for that, and stores every accumulator in every step.
template <int I>
struct Index {
    constexpr operator int() const { return I; }
};
template <int N, int kFirst = 0, class Body>
__attribute__((always_inline)) inline void unroll(const Body &body) {
    if constexpr (kFirst < N) {
        body(Index<kFirst>());
        unroll<N, kFirst + 1>(body);
    }
}
#define STENO_INLINE __attribute__((always_inline))

// exp(x) for x <= 0 (-inf gives 0, NaN stays), relative error below 2e-7. Cephes' polynomial.
inline F exp_nonpositive(F x) {
    const F low = set1(-87.3f);  // below, the result is not a normal number: 0
    const F c = max(low, x);     // in this order NaN passes
    const F n = round(mul(c, set1(1.44269504088896341f)));
    F r = fma(n, set1(-0.693359375f), c);
    r = fma(n, set1(2.12194440e-4f), r);
    F y = set1(1.9875691500e-4f);
    y = fma(y, r, set1(1.3981999507e-3f));
    y = fma(y, r, set1(8.3334519073e-3f));
    y = fma(y, r, set1(4.1665795894e-2f));
    y = fma(y, r, set1(1.6666665459e-1f));
    y = fma(y, r, set1(5.0000001201e-1f));
    y = add(fma(mul(r, r), y, r), set1(1.f));
    return select_less(x, low, set1(0.f), times_pow2(y, n));
}

// 2^x for x < 128 (-inf gives 0, NaN stays), relative error below 3e-7; 0 where that is not a normal number.
// The polynomial is the one of degree 5 with the smallest relative error on [0, 1].
inline F exp2_of(F x) {
    const F r = fraction(x);
    F y = set1(1.87757667e-3f);
    y = fma(y, r, set1(8.98934009e-3f));
    y = fma(y, r, set1(5.58263180e-2f));
    y = fma(y, r, set1(2.40153617e-1f));
    y = fma(y, r, set1(6.93153073e-1f));
    y = fma(y, r, set1(9.99999925e-1f));
    return times_pow2_floor(y, x);
}

// tanh(x), absolute error below 2e-7.
inline F tanh_of(F x) {
    const F e = exp_nonpositive(mul(set1(-2.f), abs_of(x)));
    return with_sign_of(div(sub(set1(1.f), e), add(set1(1.f), e)), x);
}

// The first n of 16 elements, zeros behind; never reads further.
inline F load_first(const float *p, int64_t n) {
    if (n >= kLanes) return load(p);
    float x[kLanes] = {};
    for (int64_t i = 0; i < n; i++) x[i] = p[i];
    return load(x);
}

template <F convert(const uint16_t *)>
inline F load_first_as(const uint16_t *p, int64_t n) {
    if (n >= kLanes) return convert(p);
    uint16_t x[kLanes] = {};
    for (int64_t i = 0; i < n; i++) x[i] = p[i];
    return convert(x);
}

inline F load_first_half(const uint16_t *p, int64_t n) { return load_first_as<load_half>(p, n); }

// Elements [at, at + n) of a dense tensor of any format as fp32, zeros behind.
inline F load_dense(int64_t format, const uint8_t *base, int64_t at, int64_t n) {
    if (format == kFloat) return load_first(reinterpret_cast<const float *>(base) + at, n);
    const uint16_t *p = reinterpret_cast<const uint16_t *>(base) + at;
    return format == kHalf ? load_first_as<load_half>(p, n) : load_first_as<load_bfloat16>(p, n);
}
