// Products with bfloat16 numbers in dot products of pairs (AVX512_BF16), twice as many in an instruction as in fp32.
// Queries and weights are rounded to bfloat16, as PyTorch rounds them; queries that came in bfloat16 lose nothing.

constexpr int64_t kPair = 2 * kLanes;  // bfloat16 numbers in a register
constexpr int64_t kMaxPairDim = 512;
constexpr int kPairAccumulators = 16;

typedef float PairSums __attribute__((vector_size(64)));
inline void add_pairs(PairSums &sums, I a, I b) {
    sums = reinterpret_cast<PairSums>(_mm512_dpbf16_ps(reinterpret_cast<F>(sums), (__m512bh)a, (__m512bh)b));
}
inline I to_bfloats(F low, F high) { return (I)_mm512_cvtne2ps_pbh(high, low); }
inline I load_pairs(const void *p) { return _mm512_loadu_si512(p); }
inline I load_first_pairs(const uint8_t *p, int64_t n) {
    return _mm512_maskz_loadu_epi16(n >= kPair ? ~__mmask32{0} : (__mmask32{1} << n) - 1, p);
}

// The chunks, of 32 columns each, from `column` of values. Of two rows the low and the high halves of every 128 bits
// meet, so that a register of sums has the columns 0 .. 3 (or 4 .. 7) of each eight.
template <int M, int N>
inline void multiply_pair_chunks(const Operand &a, int64_t column, const uint32_t (*pairs)[kPageTokens / 2],
                                 const Target &t) {
    const I even = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    const I odd = _mm512_setr_epi32(4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    const I first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const I second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    PairSums low[M][N], high[M][N];
    unroll<M * N>([&](auto i) STENO_INLINE {
        const float *start = t.start + i / N * t.start_stride + column + i % N * kPair;
        const F x = load(start), y = load(start + kLanes);
        low[i / N][i % N] = reinterpret_cast<PairSums>(_mm512_permutex2var_ps(x, even, y));
        high[i / N][i % N] = reinterpret_cast<PairSums>(_mm512_permutex2var_ps(x, odd, y));
    });
    const int64_t step = a.blocks * kLanes * 2, next = a.next_codes;
    const uint8_t *row = a.codes + column * 2;
    for (int64_t r = 0; r < a.rows; r += 2, row += 2 * step) {
        unroll<N>([&](auto n) STENO_INLINE {
            prefetch_page_start(row + next + n * 64);
            prefetch_page_start(row + next + step + n * 64);
        });
        I x[N], y[N];
        unroll<N>([&](auto n) STENO_INLINE {
            const I top = load_pairs(row + n * 64);
            const I bottom = r + 1 < a.rows ? load_pairs(row + step + n * 64) : _mm512_setzero_si512();
            x[n] = _mm512_unpacklo_epi16(top, bottom), y[n] = _mm512_unpackhi_epi16(top, bottom);
        });
        unroll<M>([&](auto m) STENO_INLINE {
            const I pair = _mm512_set1_epi32(static_cast<int32_t>(pairs[m][r / 2]));
            unroll<N>([&](auto n) STENO_INLINE {
                add_pairs(low[m][n], x[n], pair);
                add_pairs(high[m][n], y[n], pair);
            });
        });
    }
    unroll<M * N>([&](auto i) STENO_INLINE {
        float *out = t.out + i / N * t.out_stride + column + i % N * kPair;
        const F x = reinterpret_cast<F>(low[i / N][i % N]), y = reinterpret_cast<F>(high[i / N][i % N]);
        store(out, _mm512_permutex2var_ps(x, first, y));
        store(out + kLanes, _mm512_permutex2var_ps(x, second, y));
    });
}

template <int M>
inline void multiply_bfloats(const Operand &a, const float *x, int64_t x_stride, const Target &t) {
    constexpr int N = M * 4 <= kPairAccumulators ? 2 : 1;
    alignas(64) uint32_t pairs[M][kPageTokens / 2];
    for (int m = 0; m < M; m++)
        for (int64_t r = 0; r < kPageTokens; r += kPair)
            _mm512_store_si512(pairs[m] + r / 2,
                               to_bfloats(load(x + m * x_stride + r), load(x + m * x_stride + r + kLanes)));
    const int64_t columns = a.blocks * kLanes;
    int64_t column = 0;
    for (; column + N * kPair <= columns; column += N * kPair) multiply_pair_chunks<M, N>(a, column, pairs, t);
    for (; column + kPair <= columns; column += kPair) multiply_pair_chunks<M, 1>(a, column, pairs, t);
    if (column < columns) multiply_blocks<Bfloats, M, 1>(a, column / kLanes, x, x_stride, t);
}

// Logits with keys of C times 32 numbers (0: as many as dim has), 16 tokens at a time; queries [M][kMaxPairDim].
template <int M, int C>
inline void dot_pair_keys(const uint8_t *keys, int64_t count, int64_t dim, const uint16_t (*queries)[kMaxPairDim],
                          float scale, float *out, int64_t out_stride) {
    const int64_t step = dim * 2;
    I query[M][C ? C : 1];
    unroll<M * C>([&](auto i) STENO_INLINE { query[i / C][i % C] = load_pairs(queries[i / C] + i % C * kPair); });
    for (int64_t t = 0; t < kPageTokens; t += kLanes) {
        F parts[M][4];
        for (int k = 0; k < 4; k++) {
            PairSums acc[M][4];
            unroll<4>([&](auto i) STENO_INLINE {
                const int64_t token = t + 4 * k + i;
                const uint8_t *key = keys + token * step;
                unroll<M>([&](auto m) STENO_INLINE { acc[m][i] = PairSums{}; });
                if (token >= count) return;
                for (int64_t at = 0; at < step; at += 64) prefetch_page_start(key + kPageTokens * step + at);
                if constexpr (C > 0) {
                    unroll<C>([&](auto c) STENO_INLINE {
                        const I y = load_pairs(key + c * 64);
                        unroll<M>([&](auto m) STENO_INLINE { add_pairs(acc[m][i], y, query[m][c]); });
                    });
                } else {
                    for (int64_t c = 0; c < dim; c += kPair) {
                        const I y = c + kPair <= dim ? load_pairs(key + c * 2) : load_first_pairs(key + c * 2, dim - c);
                        unroll<M>([&](auto m) STENO_INLINE { add_pairs(acc[m][i], y, load_pairs(queries[m] + c)); });
                    }
                }
            });
            unroll<M>([&](auto m) STENO_INLINE {
                const F sums[4] = {(F)acc[m][0], (F)acc[m][1], (F)acc[m][2], (F)acc[m][3]};
                parts[m][k] = reduce4<add>(sums);
            });
        }
        for (int m = 0; m < M; m++) store(out + m * out_stride + t, mul(reduce_parts<add>(parts[m]), set1(scale)));
    }
}

// Logits of M queries with keys, like dot_keys; `scale` is what the queries were multiplied with.
template <int M>
inline void dot_bfloat_keys(const uint8_t *keys, int64_t count, int64_t dim, const float *x, int64_t x_stride,
                            float scale, float *out, int64_t out_stride) {
    if (dim > kMaxPairDim) return dot_keys<Bfloats, M>(keys, count, dim, x, x_stride, out, out_stride);
    alignas(64) uint16_t queries[M][kMaxPairDim];
    const F inverse = set1(scale == 0.f ? 0.f : 1.f / scale);
    for (int m = 0; m < M; m++)
        for (int64_t c = 0; c < dim; c += kPair) {
            const float *q = x + m * x_stride + c;
            const F high = c + kLanes < x_stride ? load(q + kLanes) : set1(0.f);
            _mm512_store_si512(queries[m] + c, to_bfloats(mul(load(q), inverse), mul(high, inverse)));
        }
    if (dim == 2 * kPair) dot_pair_keys<M, 2>(keys, count, dim, queries, scale, out, out_stride);
    else if (dim == 4 * kPair) dot_pair_keys<M, 4>(keys, count, dim, queries, scale, out, out_stride);
    else dot_pair_keys<M, 0>(keys, count, dim, queries, scale, out, out_stride);
}
