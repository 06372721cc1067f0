// The product over codes of a codebook, straight on the codes: scales of rows are folded into the coefficients; scales
// of columns multiply what the rows of a group add up to. Both in one loop, and two vectors at most: there is a copy for
// every codebook, and they would take up most of the time that the library takes to compile.

constexpr int64_t kMaxLevelVectors = kMaxDirect;

// Rows of coefficients: those of the last line too, which may be of 32 rows, or end one behind the last one.
inline int64_t level_rows(const Operand &a) { return ceil_div(a.rows, 32) * 32 + kLanes; }

// Coefficients [M][groups][level_rows] with the scales of the rows folded in, or [M][level_rows] where columns have scales.
template <int M>
inline void fold_scales(const Operand &a, const float *x, int64_t x_stride, float *coef) {
    const int64_t rows = a.rows, stride = level_rows(a), groups = a.scale_rows ? 1 : a.groups;
    for (int64_t g = 0; g < groups; g++)
        for (int64_t r = 0; r < stride; r += kLanes) {
            const F scale = a.scale_rows || r >= rows ? set1(1.f) : load_scales(a, g * rows + r, rows - r);
            for (int m = 0; m < M; m++)
                store(coef + (m * groups + g) * stride + r, mul(load_first(x + m * x_stride + r, rows - r), scale));
        }
}

// The N blocks from `block`. Where rows have scales all rows are one group, of scale 1.
template <int M, int N, class Book>
inline void multiply_level_blocks(const Operand &a, const Book &book, int64_t block, const float *coefs,
                                  const Target &t) {
    using Line = Lines<Book::kBits>;
    F total[M][N], part[M][N];
    unroll<M * N>([&](auto i) STENO_INLINE {
        total[i / N][i % N] = load(t.start + i / N * t.start_stride + (block + i % N) * kLanes);
        part[i / N][i % N] = set1(0.f);
    });
    const int64_t rows = level_rows(a), stride = a.scale_rows ? rows : a.groups * rows;
    const float *coef[N];
    unroll<N>([&](auto n) STENO_INLINE { coef[n] = coefs + (a.scale_rows ? 0 : a.group_of(block + n) * rows); });
    int64_t group = 0, end = a.scale_rows ? a.scale_rows : a.rows;
    const auto close_group = [&]() STENO_INLINE {
        unroll<N>([&](auto n) STENO_INLINE {
            const F scale = a.scale_rows ? load_scales(a, (group * a.blocks + block + n) * kLanes, kLanes) : set1(1.f);
            unroll<M>([&](auto m) STENO_INLINE {
                total[m][n] = fma(part[m][n], scale, total[m][n]);
                part[m][n] = set1(0.f);
            });
        });
        group++, end += a.scale_rows;
    };
    const int64_t step = a.blocks * Line::kBytes, next = a.next_codes;
    const uint8_t *lines = a.codes + block * Line::kBytes;
    for (int64_t r = 0; r < a.rows; r += Line::kRows, lines += step) {
        I line[N];
        unroll<N>([&](auto n) STENO_INLINE {
            prefetch(lines + next + n * Line::kBytes);
            line[n] = Line::load(lines + n * Line::kBytes);
        });
        unroll<Line::kRows>([&](auto i) STENO_INLINE {
            if constexpr (Book::kBits == kTrits || i == 0) {  // other lines lie in one group
                if (r + i == end && end < a.rows) close_group();
            }
            F x[N];
            unroll<N>([&](auto n) STENO_INLINE { x[n] = book(Line::template field<i>(line[n])); });
            unroll<M>([&](auto m) STENO_INLINE {
                unroll<N>([&](auto n) STENO_INLINE {
                    part[m][n] = fma(set1(coef[n][m * stride + r + i]), x[n], part[m][n]);
                });
            });
        });
    }
    close_group();
    unroll<M * N>([&](auto i) STENO_INLINE {
        store(t.out + i / N * t.out_stride + (block + i % N) * kLanes, total[i / N][i % N]);
    });
}

// The products of a batch of matrices of one shape.
template <int M>
inline void multiply_levels(const Operand *a, int64_t count, const float *x, int64_t x_step, int64_t x_stride,
                            const Scratch &scratch, Target t) {
    if constexpr (M > 2) {
        multiply_levels<2>(a, count, x, x_step, x_stride, scratch, t);
        t.start += 2 * t.start_stride, t.out += 2 * t.out_stride;
        multiply_levels<M - 2>(a, count, x + 2 * x_stride, x_step, x_stride, scratch, t);
    } else {
        constexpr int N = 4 / M;  // sums under way at a time
        for (int64_t i = 0; i < count; i++, a++, x += x_step) {
            fold_scales<M>(*a, x, x_stride, scratch.coef);
            with_book(*a, [&](const auto &book) {
                int64_t block = 0;
                for (; block + N <= a->blocks; block += N)
                    multiply_level_blocks<M, N>(*a, book, block, scratch.coef, t);
                for (; block < a->blocks; block++) multiply_level_blocks<M, 1>(*a, book, block, scratch.coef, t);
            });
            t.start += t.start_step, t.out += t.out_step;
        }
    }
}
