// out[m][c] = start[m][c] + sum_r x[m][r] * matrix[r][c], the product of attention, of queries and keys as of weights
// and values.

// The N blocks from `block` of a matrix of plain numbers.
template <class Numbers, int M, int N>
inline void multiply_blocks(const Operand &a, int64_t block, const float *x, int64_t x_stride, const Target &t) {
    F acc[M][N];
    unroll<M * N>([&](auto i) STENO_INLINE {
        acc[i / N][i % N] = load(t.start + i / N * t.start_stride + (block + i % N) * kLanes);
    });
    constexpr int64_t kBytes = Numbers::kBytes * kLanes;
    const int64_t step = a.blocks * kBytes, next = a.next_codes;
    const uint8_t *row = a.codes + block * kBytes;
    for (int64_t r = 0; r < a.rows; r++, row += step) {
        for (int64_t i = 0; i < N * kBytes; i += 64) prefetch_far(row + next + i);
        F y[N];
        unroll<N>([&](auto n) STENO_INLINE { y[n] = Numbers::read(row + n * kBytes); });
        unroll<M>([&](auto m) STENO_INLINE {
            const F factor = set1(x[m * x_stride + r]);
            unroll<N>([&](auto n) STENO_INLINE { acc[m][n] = fma(factor, y[n], acc[m][n]); });
        });
    }
    unroll<M * N>([&](auto i) STENO_INLINE {
        store(t.out + i / N * t.out_stride + (block + i % N) * kLanes, acc[i / N][i % N]);
    });
}

template <class Numbers, int M>
inline void multiply_numbers(const Operand &a, const float *x, int64_t x_stride, const Target &t) {
    constexpr int N = M * 4 <= kAccumulators ? 4 : M * 2 <= kAccumulators ? 2 : 1;
    int64_t block = 0;
    for (; block + N <= a.blocks; block += N) multiply_blocks<Numbers, M, N>(a, block, x, x_stride, t);
    for (; block < a.blocks; block++) multiply_blocks<Numbers, M, 1>(a, block, x, x_stride, t);
}

// One of bfloats.inl and bfloat_dots.inl.
template <int M>
inline void multiply_bfloats(const Operand &a, const float *x, int64_t x_stride, const Target &t);

// level_products.inl, where kMaxLevelVectors is not 0.
template <int M>
inline void multiply_levels(const Operand *a, int64_t count, const float *x, int64_t x_step, int64_t x_stride,
                            const Scratch &scratch, Target t);

// The products of a batch of matrices of one format and shape: x [count][M][x_stride], queries or weights.
template <int M>
inline void multiply(const Operand *a, int64_t count, const float *x, int64_t x_step, int64_t x_stride,
                     const Scratch &scratch, Target t) {
    if (is_book(a->format)) {
        if constexpr (M <= kMaxLevelVectors) return multiply_levels<M>(a, count, x, x_step, x_stride, scratch, t);
    } else if (a->format > kHalf) {
        if constexpr (M <= kMaxCodeVectors) {
            if (a->format == kInt8) return multiply_codes<8, M>(a, count, x, x_step, x_stride, scratch, t);
            if (a->format == kInt4) return multiply_codes<4, M>(a, count, x, x_step, x_stride, scratch, t);
            return multiply_codes<2, M>(a, count, x, x_step, x_stride, scratch, t);
        }
    }
    for (int64_t i = 0; i < count; i++, a++, x += x_step, t.start += t.start_step, t.out += t.out_step) {
        if (a->format == kFloat) multiply_numbers<Floats, M>(*a, x, x_stride, t);
        if constexpr (M <= kMaxDirect) {
            if (a->format == kBfloat16) multiply_bfloats<M>(*a, x, x_stride, t);
            if (a->format == kHalf) multiply_numbers<Halves, M>(*a, x, x_stride, t);
        }
    }
}

// Logits of M queries with keys that lie as they came, one token after the other: x [M][x_stride] with zeros from dim
// on, out [M][out_stride]. Keys that lie ahead of the `count` ones are read next.
template <class Numbers, int M>
inline void dot_keys(const uint8_t *keys, int64_t count, int64_t dim, const float *x, int64_t x_stride, float *out,
                     int64_t out_stride) {
    const int64_t step = dim * Numbers::kBytes, whole = dim & ~int64_t{kLanes - 1};
    for (int64_t t = 0; t < kPageTokens; t += kLanes) {
        F sums[M][kLanes];
        for (int i = 0; i < kLanes; i++) {
            F acc[M];
            for (int m = 0; m < M; m++) acc[m] = set1(0.f);
            if (t + i < count) {
                const uint8_t *key = keys + (t + i) * step;
                for (int64_t at = 0; at < step; at += 64) prefetch_far(key + kPageTokens * step + at);
                for (int64_t c = 0; c < whole; c += kLanes) {
                    const F y = Numbers::read(key + c * Numbers::kBytes);
                    for (int m = 0; m < M; m++) acc[m] = fma(load(x + m * x_stride + c), y, acc[m]);
                }
                if (whole < dim) {
                    const F y = Numbers::read_first(key + whole * Numbers::kBytes, dim - whole);
                    for (int m = 0; m < M; m++) acc[m] = fma(load(x + m * x_stride + whole), y, acc[m]);
                }
            }
            for (int m = 0; m < M; m++) sums[m][i] = acc[m];
        }
        for (int m = 0; m < M; m++) store(out + m * out_stride + t, hsum16(sums[m]));
    }
}
