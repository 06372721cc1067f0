// The product over codes in dot products of bytes (VNNI). Coefficients are two bytes each: coefficient = step * (128 * high
// + low), see fold.inl.

// Of the tiles of a batch, one after the other.
struct ByteCoefficients {
    const int8_t *high, *low;  // [count][M][groups][stride]
    int64_t stride;
    const float *step, *bias;  // [count][M][groups]
};

constexpr int64_t kByteRows = 64;  // a register of bytes
static_assert(kLargestCoefficient == 127.f * 128.f, "a byte above the seven bits of another");

// Bytes out of 64 numbers that fit into them.
inline I pack_bytes(const I *x) {
    const I bytes = _mm512_packs_epi16(_mm512_packs_epi32(x[0], x[1]), _mm512_packs_epi32(x[2], x[3]));
    // packing works within quarters of a register
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), bytes);
}

// 64 coefficients in steps of 1 / inverse, as high and low bytes.
inline void store_bytes(const float *x, F inverse, int8_t *high, int8_t *low) {
    I top[4], rest[4];
    unroll<4>([&](auto i) STENO_INLINE {
        const I number = _mm512_cvtps_epi32(mul(load(x + i * kLanes), inverse));
        top[i] = _mm512_srai_epi32(_mm512_add_epi32(number, _mm512_set1_epi32(64)), 7);
        rest[i] = _mm512_sub_epi32(number, _mm512_slli_epi32(top[i], 7));
    });
    _mm512_storeu_si512(high, pack_bytes(top));
    _mm512_storeu_si512(low, pack_bytes(rest));
}

// The coefficients of a batch in bytes.
inline ByteCoefficients as_bytes(const Folded &f, const Scratch &scratch) {
    int8_t *const high = scratch.bytes, *const low = high + f.vectors * f.stride;
    for (int64_t k = 0; k < f.vectors; k++) {
        const F factor = set1(f.inverse[k]);
        for (int64_t r = k * f.stride; r < (k + 1) * f.stride; r += kByteRows)
            store_bytes(f.coef + r, factor, high + r, low + r);
    }
    return {high, low, f.stride, f.step, f.bias};
}

inline I four_rows(const int8_t *p) {
    int32_t bytes;
    __builtin_memcpy(&bytes, p, sizeof bytes);
    return _mm512_set1_epi32(bytes);
}

// Accumulators are of a type whose elements are the sums: arrays of I, whose elements are wider, would be kept in memory.
typedef int32_t Sums __attribute__((vector_size(64)));
inline void add_dots(Sums &sums, I codes, I coefficients) {
    sums = reinterpret_cast<Sums>(_mm512_dpbusd_epi32(reinterpret_cast<I>(sums), codes, coefficients));
}
inline F to_floats(Sums sums) { return _mm512_cvtepi32_ps(reinterpret_cast<I>(sums)); }

// The N blocks from `block`; kShared: they are of one group.
template <int kBits, bool kShared, int M, int N>
inline void multiply_code_blocks(const Operand &a, int64_t block, const ByteCoefficients &c, const Target &t) {
    Sums high[M][N], low[M][N];
    unroll<M * N>([&](auto i) STENO_INLINE { high[i / N][i % N] = low[i / N][i % N] = Sums{}; });
    const int64_t query_stride = a.groups * c.stride, step = a.blocks * kLineBytes;
    const int8_t *tops[N], *rests[N];  // where the coefficients of this group of rows lie, one for each block
    unroll<N>([&](auto n) STENO_INLINE {
        const int64_t at = a.group_of(kShared ? block : block + n) * c.stride;
        tops[n] = c.high + at, rests[n] = c.low + at;
    });
    const I mask = _mm512_set1_epi8(static_cast<char>((1 << kBits) - 1));
    const uint8_t *lines = a.codes + block * kLineBytes;
    const int64_t next = a.next_codes;
    for (int64_t r = 0; r < a.rows; r += Codes<kBits>::kRows, lines += step) {
        unroll<N>([&](auto n) STENO_INLINE { prefetch(lines + next + n * kLineBytes); });
        unroll<8 / kBits>([&](auto j) STENO_INLINE {
            I codes[N];
            unroll<N>([&](auto n) STENO_INLINE {
                codes[n] = load_line(lines + n * kLineBytes);
                if (j) codes[n] = shift_right(codes[n], j * kBits);
                if (kBits < 8) codes[n] = _mm512_and_si512(codes[n], mask);
            });
            unroll<M>([&](auto m) STENO_INLINE {
                const int64_t row = m * query_stride + r + 4 * j;
                const I top = four_rows(tops[0] + row), rest = four_rows(rests[0] + row);
                unroll<N>([&](auto n) STENO_INLINE {
                    add_dots(high[m][n], codes[n], kShared ? top : four_rows(tops[n] + row));
                    add_dots(low[m][n], codes[n], kShared ? rest : four_rows(rests[n] + row));
                });
            });
        });
    }
    const float *steps[N], *biases[N], *start = t.start + block * kLanes;
    float *out = t.out + block * kLanes;
    unroll<N>([&](auto n) STENO_INLINE {
        const int64_t group = a.group_of(kShared ? block : block + n);
        steps[n] = c.step + group, biases[n] = c.bias + group;
    });
    unroll<M>([&](auto m) STENO_INLINE {
        unroll<N>([&](auto n) STENO_INLINE {
            const F sum = fma(to_floats(high[m][n]), set1(128.f), to_floats(low[m][n]));
            const F offset = add(load(start + n * kLanes), set1(biases[n][m * a.groups]));
            store(out + n * kLanes, fma(sum, set1(steps[n][m * a.groups]), offset));
        });
        start += t.start_stride, out += t.out_stride;
    });
}

// The products of a batch of matrices of one shape.
template <int kBits, int M>
inline void multiply_codes(const Operand *a, int64_t count, const float *x, int64_t x_step, int64_t x_stride,
                           const Scratch &scratch, Target t) {
    constexpr int N = M <= 3 ? 4 : 2;  // two accumulators each
    ByteCoefficients c = as_bytes(fold<M>(a, count, x, x_step, x_stride, scratch), scratch);
    const int64_t vectors = M * a->groups;
    for (int64_t i = 0; i < count; i++, a++) {
        int64_t block = 0;
        for (; block + N <= a->blocks; block += N) {
            if (a->group_of(block) == a->group_of(block + N - 1))
                multiply_code_blocks<kBits, true, M, N>(*a, block, c, t);
            else multiply_code_blocks<kBits, false, M, N>(*a, block, c, t);
        }
        for (; block < a->blocks; block++) multiply_code_blocks<kBits, true, M, 1>(*a, block, c, t);
        c = {c.high + vectors * c.stride, c.low + vectors * c.stride, c.stride, c.step + vectors, c.bias + vectors};
        t.start += t.start_step, t.out += t.out_step;
    }
}
