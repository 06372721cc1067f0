// The product over codes in dot products of bytes (VNNI). The coefficients, which change with every page, are rounded
// to 15 bits of the largest one of their group, as two bytes each: coefficient = step * (128 * high + low). Against
// bfloat16, which keeps 8 bits of every number, the error is small; tests hold it to account.

constexpr int64_t kMaxCodeVectors = INT64_MAX;  // decoding codes is cheap beside a product

// Of the tiles of a batch, one after the other.
struct ByteCoefficients {
    const int8_t *high, *low;  // [count][M][groups][stride]
    int64_t stride;            // rows, rounded up to kByteRows
    const float *step, *bias;  // [count][M][groups]
};

constexpr float kLargestCoefficient = 127.f * 128.f;
constexpr int64_t kByteRows = 64;  // a register of bytes

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

// Folds scales into coefficients and minima into one number per group: x [count][M][x_stride], zeros from `rows` on.
// In three passes over the batch, so that no pass waits for the horizontal sums of the one before.
template <int M>
inline ByteCoefficients fold_bytes(const Operand *a, int64_t count, const float *x, int64_t x_step, int64_t x_stride,
                                   const Scratch &scratch) {
    const int64_t groups = a->groups, rows = a->rows, stride = ceil_div(rows, kByteRows) * kByteRows;
    float *const coef = scratch.coef, *const top = scratch.tops, *const sum = scratch.sums;
    for (int64_t i = 0; i < count; i++, x += x_step) {
        const uint16_t *next = a[i].params + a[i].next_params;
        for (int64_t at = 0; at < 2 * groups * rows; at += 32) prefetch(next + at);
        for (int64_t g = 0; g < groups; g++) {
            const uint16_t *scales = a[i].params + g * rows, *minima = scales + groups * rows;
            const int64_t first = i * M * groups + g;
            float *out = coef + first * stride;
            F tops[M], sums[M];
            unroll<M>([&](auto m) STENO_INLINE { tops[m] = sums[m] = set1(0.f); });
            int64_t r = 0;
            for (; r < rows; r += kLanes) {
                const F scale = load_first_half(scales + r, rows - r), minimum = load_first_half(minima + r, rows - r);
                unroll<M>([&](auto m) STENO_INLINE {
                    const F factor = load(x + m * x_stride + r), product = mul(factor, scale);
                    store(out + m * groups * stride + r, product);
                    tops[m] = max(tops[m], abs_of(product));
                    sums[m] = fma(factor, minimum, sums[m]);
                });
            }
            for (; r < stride; r += kLanes)
                unroll<M>([&](auto m) STENO_INLINE { store(out + m * groups * stride + r, set1(0.f)); });
            unroll<M>([&](auto m) STENO_INLINE {
                store(top + (first + m * groups) * kLanes, tops[m]);
                store(sum + (first + m * groups) * kLanes, sums[m]);
            });
        }
    }
    const int64_t vectors = count * M * groups;
    float *const step = scratch.step, *const bias = scratch.bias, *const inverse = scratch.inverse;
    for (int64_t k = 0; k < vectors; k += kLanes) {
        F tops[kLanes], sums[kLanes];
        unroll<kLanes>([&](auto i) STENO_INLINE {  // what lies behind the last vector is unused
            tops[i] = load(top + (k + i) * kLanes), sums[i] = load(sum + (k + i) * kLanes);
        });
        // a query that is not finite shows in the bias, and so in the result
        const F largest = hmax16(tops);
        const F usable = select_less(set1(1e-30f), largest, largest, set1(__builtin_inff()));
        store(inverse + k, div(set1(kLargestCoefficient), usable));
        store(step + k, mul(select_less(usable, set1(1e30f), usable, set1(0.f)), set1(1.f / kLargestCoefficient)));
        store(bias + k, hsum16(sums));
    }
    int8_t *const high = scratch.bytes, *const low = high + vectors * stride;
    for (int64_t k = 0; k < vectors; k++) {
        const F factor = set1(inverse[k]);
        for (int64_t r = k * stride; r < (k + 1) * stride; r += kByteRows)
            store_bytes(coef + r, factor, high + r, low + r);
    }
    return {high, low, stride, step, bias};
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
    ByteCoefficients c = fold_bytes<M>(a, count, x, x_step, x_stride, scratch);
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
