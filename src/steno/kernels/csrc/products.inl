// out[m][c] (+)= sum_r coef[m][group(c)][r] * matrix[r][c] + bias[m][group(c)]: keys with queries, and values with weights.

struct Coefficients {
    const float *coef;  // [M][groups][stride of a group]
    int64_t query_stride;
    const float *bias;  // [M][groups], or null
};

// Folds scales into coefficients and minima into one number per group: x [M][x_stride], zeros from `rows` on.
template <int M>
inline Coefficients fold_params(const Operand &a, const float *x, int64_t x_stride, const Scratch &scratch) {
    const int64_t stride = a.coef_rows();
    for (int64_t g = 0; g < a.groups; g++) {
        const uint16_t *scales = a.params + g * a.rows, *minima = scales + a.groups * a.rows;
        F bias[M];
        for (int m = 0; m < M; m++) bias[m] = set1(0.f);
        for (int64_t r = 0; r < a.rows; r += kLanes) {
            const F scale = load_first_half(scales + r, a.rows - r), minimum = load_first_half(minima + r, a.rows - r);
            for (int m = 0; m < M; m++) {
                const F factor = load(x + m * x_stride + r);
                store(scratch.coef + (m * a.groups + g) * stride + r, mul(factor, scale));
                bias[m] = fma(factor, minimum, bias[m]);
            }
        }
        for (int m = 0; m < M; m++) scratch.bias[m * a.groups + g] = hsum(bias[m]);
    }
    return {scratch.coef, a.groups * stride, scratch.bias};
}

// How a product reads its matrix. kAligned: every row starts at a multiple of N blocks; kTight: a row is N blocks;
// kShared: the N blocks are of one group.
template <bool aligned, bool tight, bool shared>
struct Shape {
    static constexpr bool kAligned = aligned, kTight = tight, kShared = shared;
};

template <class Codes, class S, int M, int N>
inline void multiply_row(F (&acc)[M][N], const Codes &codes, uint64_t index, const float *const *coef, int64_t query_stride, int64_t r) {
    F x[N];
    codes.template decode<N, S::kAligned>(index, x);
    for (int m = 0; m < M; m++) {
        const F shared = set1(coef[0][m * query_stride + r]);
        for (int n = 0; n < N; n++)
            acc[m][n] = fma(S::kShared ? shared : set1(coef[n][m * query_stride + r]), x[n], acc[m][n]);
    }
}

// The N blocks from `block`.
template <class Codes, class S, int M, int N>
inline void multiply_blocks(const Operand &a, int64_t block, const Coefficients &c, float *out, int64_t out_stride, bool add_to) {
    F acc[M][N];
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) {
            acc[m][n] = add_to ? load(out + m * out_stride + (block + n) * kLanes) : set1(0.f);
            if (c.bias) acc[m][n] = add(acc[m][n], set1(c.bias[m * a.groups + a.group_of(block + n)]));
        }
    const Codes codes{a.codes};
    const float *coef[N];
    for (int n = 0; n < N; n++) coef[n] = c.coef + a.group_of(block + n) * a.coef_rows();
    constexpr int kRows = Codes::template kRows<N>;
    int64_t r = 0;
    if (S::kTight)
        for (uint64_t step = 0; r + kRows <= a.rows; step++, r += kRows)
#pragma GCC unroll 4
            for (int i = 0; i < kRows; i++)
                multiply_row<Codes, S, M, N>(acc, codes, step * kRows * N + i * N, coef, c.query_stride, r + i);
    for (; r < a.rows; r++) multiply_row<Codes, S, M, N>(acc, codes, r * a.blocks + block, coef, c.query_stride, r);
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) store(out + m * out_stride + (block + n) * kLanes, acc[m][n]);
}

template <class Codes, int M>
inline void multiply_as(const Operand &a, const Coefficients &c, float *out, int64_t out_stride, bool add_to) {
    constexpr int N = M * 4 <= kAccumulators ? 4 : M * 2 <= kAccumulators ? 2 : 1;
    int64_t block = 0;
    if (a.blocks == N && a.groups == 1) {
        multiply_blocks<Codes, Shape<true, true, true>, M, N>(a, 0, c, out, out_stride, add_to);
        block = N;
    }
    for (; block + N <= a.blocks; block += N) {
        const bool aligned = a.blocks % N == 0, shared = a.group_of(block) == a.group_of(block + N - 1);
        if (aligned && shared) multiply_blocks<Codes, Shape<true, false, true>, M, N>(a, block, c, out, out_stride, add_to);
        else if (aligned) multiply_blocks<Codes, Shape<true, false, false>, M, N>(a, block, c, out, out_stride, add_to);
        else multiply_blocks<Codes, Shape<false, false, false>, M, N>(a, block, c, out, out_stride, add_to);
    }
    for (; block < a.blocks; block++) multiply_blocks<Codes, Shape<true, false, true>, M, 1>(a, block, c, out, out_stride, add_to);
}

// x [M][x_stride]: queries or weights.
template <int M>
inline void multiply(const Operand &a, const float *x, int64_t x_stride, const Scratch &scratch, float *out, int64_t out_stride,
                     bool add_to) {
    const Coefficients plain{x, x_stride, nullptr};
    if (a.format == kFloat) return multiply_as<Floats, M>(a, plain, out, out_stride, add_to);
    if constexpr (M <= kMaxDirect) {
        if (a.format == kBfloat16) return multiply_as<Bfloats, M>(a, plain, out, out_stride, add_to);
        if (a.format == kHalf) return multiply_as<Halves, M>(a, plain, out, out_stride, add_to);
        const Coefficients folded = fold_params<M>(a, x, x_stride, scratch);
        if (a.format == kInt8) multiply_as<Bytes, M>(a, folded, out, out_stride, add_to);
        else if (a.format == kInt4) multiply_as<Fields<4>, M>(a, folded, out, out_stride, add_to);
        else multiply_as<Fields<2>, M>(a, folded, out, out_stride, add_to);
    }
}
