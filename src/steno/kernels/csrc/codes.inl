// The product over codes in floats: every code becomes a float in a register. Its interface is multiply_codes and
// kMaxCodeVectors, which dots.inl and words.inl offer too.

constexpr int64_t kMaxCodeVectors = kMaxDirect;  // more vectors are worth decoding the codes once

struct Coefficients {
    const float *coef;  // [M][groups][coef_rows]
    int64_t query_stride;
    const float *bias;  // [M][groups]
};

// Folds scales into coefficients and minima into one number per group: x [M][x_stride], zeros from `rows` on.
template <int M>
inline Coefficients fold_params(const Operand &a, const float *x, int64_t x_stride, const Scratch &scratch) {
    // local copies: the compiler must assume that a store of a vector changes anything in memory
    const int64_t groups = a.groups, rows = a.rows, stride = a.coef_rows();
    const int64_t next = a.next_params;
    const uint16_t *scales = a.params, *minima = a.params + groups * rows;
    float *const coef = scratch.coef, *const bias = scratch.bias;
    for (int64_t g = 0; g < groups; g++, scales += rows, minima += rows) {
        F sums[M];
        for (int m = 0; m < M; m++) sums[m] = set1(0.f);
        for (int64_t r = 0; r < rows; r += kLanes) {
            prefetch(scales + next + r);
            prefetch(minima + next + r);
            const F scale = load_first_half(scales + r, rows - r), minimum = load_first_half(minima + r, rows - r);
            for (int m = 0; m < M; m++) {
                const F factor = load(x + m * x_stride + r);
                store(coef + (m * groups + g) * stride + r, mul(factor, scale));
                sums[m] = fma(factor, minimum, sums[m]);
            }
        }
        for (int m = 0; m < M; m++) bias[m * groups + g] = hsum(sums[m]);
    }
    return {coef, groups * stride, bias};
}

// The N blocks from `block`; kShared: they are of one group.
template <int kBits, bool kShared, int M, int N>
inline void multiply_code_blocks(const Operand &a, int64_t block, const Coefficients &c, const Target &t) {
    F acc[M][N];
    unroll<M * N>([&](auto i) STENO_INLINE {
        acc[i / N][i % N] = load(t.start + i / N * t.start_stride + (block + i % N) * kLanes);
    });
    const int64_t query_stride = c.query_stride, step = a.blocks * kLineBytes, next = a.next_codes;
    const float *coef[N];  // where the coefficients of this row lie, one for each block
    unroll<N>([&](auto n) STENO_INLINE { coef[n] = c.coef + a.group_of(kShared ? block : block + n) * a.coef_rows(); });
    const uint8_t *lines = a.codes + block * kLineBytes;
    for (int64_t r = 0; r < a.rows; r += Codes<kBits>::kRows, lines += step) {
        unroll<N>([&](auto n) STENO_INLINE { prefetch(lines + next + n * kLineBytes); });
        unroll<Codes<kBits>::kRows>([&](auto i) STENO_INLINE {
            F x[N];
            unroll<N>([&](auto n) STENO_INLINE {
                x[n] = decode_low<kBits>(shift_right(load_line(lines + n * kLineBytes), Codes<kBits>::shift_of(i)));
            });
            unroll<M>([&](auto m) STENO_INLINE {
                const F shared = set1(coef[0][m * query_stride + r + i]);
                unroll<N>([&](auto n) STENO_INLINE {
                    acc[m][n] = fma(kShared ? shared : set1(coef[n][m * query_stride + r + i]), x[n], acc[m][n]);
                });
            });
        });
    }
    unroll<M * N>([&](auto i) STENO_INLINE {
        // the bias is added last, so that the loop need not wait for its horizontal sum
        constexpr int m = i / N, n = i % N;
        const F bias = set1(c.bias[m * a.groups + a.group_of(kShared ? block : block + n)]);
        store(t.out + m * t.out_stride + (block + n) * kLanes, add(acc[m][n], bias));
    });
}

// The products of a batch of matrices of one shape.
template <int kBits, int M>
inline void multiply_codes(const Operand *a, int64_t count, const float *x, int64_t x_step, int64_t x_stride,
                           const Scratch &scratch, Target t) {
    constexpr int N = M * 4 <= kAccumulators ? 4 : M * 2 <= kAccumulators ? 2 : 1;
    for (int64_t i = 0; i < count; i++, a++) {
        const Coefficients c = fold_params<M>(*a, x + i * x_step, x_stride, scratch);
        int64_t block = 0;
        for (; block + N <= a->blocks; block += N) {
            if (a->group_of(block) == a->group_of(block + N - 1))
                multiply_code_blocks<kBits, true, M, N>(*a, block, c, t);
            else multiply_code_blocks<kBits, false, M, N>(*a, block, c, t);
        }
        for (; block < a->blocks; block++) multiply_code_blocks<kBits, true, M, 1>(*a, block, c, t);
        t.start += t.start_step, t.out += t.out_step;
    }
}
