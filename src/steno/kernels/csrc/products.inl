// out[m][c] = start[m][c] + bias[m][group(c)] + sum_r coef[m][group(c)][r] * matrix[r][c]: the product of attention, of
// queries and keys as of weights and values.

struct Coefficients {
    const float *coef;  // [M][groups][coef_rows]
    int64_t query_stride;
    const float *bias;  // [M][groups]
};

// Where a product begins and ends; start may be out.
struct Target {
    const float *start;
    int64_t start_stride;
    float *out;
    int64_t out_stride;
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

// How a product reads its matrix. kAligned: every row starts at a multiple of N blocks; kTight: a row is N blocks;
// kShared: the N blocks are of one group.
template <bool aligned, bool tight, bool shared>
struct Shape {
    static constexpr bool kAligned = aligned, kTight = tight, kShared = shared;
};

// coef: where the coefficients of this row lie, one for each block.
template <bool kShared, int M, int N>
inline void multiply_row(F (&acc)[M][N], const F *x, const float *const *coef, int64_t query_stride, int64_t r) {
    for (int m = 0; m < M; m++) {
        const F shared = set1(coef[0][m * query_stride + r]);
        for (int n = 0; n < N; n++)
            acc[m][n] = fma(kShared ? shared : set1(coef[n][m * query_stride + r]), x[n], acc[m][n]);
    }
}

// The N blocks from `block`.
template <class Codes, class S, int M, int N>
inline void multiply_blocks(const Operand &a, int64_t block, const Coefficients &c, const Target &t) {
    F acc[M][N];
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) acc[m][n] = load(t.start + m * t.start_stride + (block + n) * kLanes);
    const Codes codes{a.codes};
    const int64_t query_stride = c.query_stride;
    const float *coef[N];
    for (int n = 0; n < N; n++) coef[n] = c.coef + (S::kShared && n ? 0 : a.group_of(block + n) * a.coef_rows());
    int64_t r = 0;
    F x[N];
    if (S::kTight) {
        constexpr int kRows = Codes::template kRows<N>, kStepBytes = kRows * N * Codes::kBlockBytes;
        // pointers that step, as index arithmetic would compete with the vectors for their ports
        const uint8_t *step = a.codes, *next = a.codes + a.next_codes;
        for (; r + kRows <= a.rows; r += kRows, step += kStepBytes, next += kStepBytes) {
            for (int i = 0; i < kStepBytes; i += 64) prefetch(next + i);
#pragma GCC unroll 16
            for (int i = 0; i < kRows; i++) {
                Codes::template decode_step<N>(step, i * N, x);
                multiply_row<S::kShared>(acc, x, coef, query_stride, r + i);
            }
        }
    }
    for (; r < a.rows; r++) {
        codes.template decode<N, S::kAligned>(r * a.blocks + block, x);
        multiply_row<S::kShared>(acc, x, coef, query_stride, r);
    }
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) {
            // the bias is added last, so that the loop need not wait for its horizontal sum
            const int64_t group = a.group_of(S::kShared ? block : block + n);
            if (Codes::kQuantized) acc[m][n] = add(acc[m][n], set1(c.bias[m * a.groups + group]));
            store(t.out + m * t.out_stride + (block + n) * kLanes, acc[m][n]);
        }
}

template <class Codes, int M>
inline void multiply_as(const Operand &a, const Coefficients &c, const Target &t) {
    constexpr int N = M * 4 <= kAccumulators ? 4 : M * 2 <= kAccumulators ? 2 : 1;
    int64_t block = 0;
    if (a.blocks == N) {
        if (a.groups == 1) multiply_blocks<Codes, Shape<true, true, true>, M, N>(a, 0, c, t);
        else multiply_blocks<Codes, Shape<true, true, false>, M, N>(a, 0, c, t);
        return;
    }
    for (; block + N <= a.blocks; block += N) {
        const bool aligned = a.blocks % N == 0, shared = a.group_of(block) == a.group_of(block + N - 1);
        if (aligned && shared) multiply_blocks<Codes, Shape<true, false, true>, M, N>(a, block, c, t);
        else if (aligned) multiply_blocks<Codes, Shape<true, false, false>, M, N>(a, block, c, t);
        else multiply_blocks<Codes, Shape<false, false, false>, M, N>(a, block, c, t);
    }
    for (; block < a.blocks; block++) multiply_blocks<Codes, Shape<true, false, true>, M, 1>(a, block, c, t);
}

// x [M][x_stride]: queries or weights.
template <int M>
inline void multiply(const Operand &a, const float *x, int64_t x_stride, const Scratch &scratch, const Target &t) {
    const Coefficients plain{x, x_stride, nullptr};
    if (a.format == kFloat) return multiply_as<Floats, M>(a, plain, t);
    if constexpr (M <= kMaxDirect) {
        if (a.format == kBfloat16) return multiply_as<Bfloats, M>(a, plain, t);
        if (a.format == kHalf) return multiply_as<Halves, M>(a, plain, t);
        const Coefficients folded = fold_params<M>(a, x, x_stride, scratch);
        if (a.format == kInt8) multiply_as<Bytes, M>(a, folded, t);
        else if (a.format == kInt4) multiply_as<Fields<4>, M>(a, folded, t);
        else multiply_as<Fields<2>, M>(a, folded, t);
    }
}
