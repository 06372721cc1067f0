// Codes that stand for the levels of a codebook, with a scale per group and no minimum. Every code becomes a float in a
// register, by a table look-up or, of 8 bits, by arithmetic. Scales differ from row to row, and are folded into the
// coefficients; or they differ from column to column, and multiply what the rows of a group add up to.

// How the rows of a block lie: kRows of them in kBytes.
template <int kBits>
struct Lines {
    static constexpr int64_t kRows = Codes<kBits>::kRows, kBytes = kLineBytes;
    static inline I load(const uint8_t *p) { return load_line(p); }
    template <int kRow>
    static inline I field(I line) {
        return shift_right(line, Codes<kBits>::shift_of(kRow));
    }
};

// Five ternary digits t0 .. t4 in a byte, as ceil(256 * 0.t0t1t2t3t4 in base 3): times 3, the first digit steps out of it.
template <>
struct Lines<kTrits> {
    static constexpr int64_t kRows = 5, kBytes = kLanes;
    static inline I load(const uint8_t *p) { return load_bytes(p); }
    static inline I triple(I x) { return plus(x, shift_left(x, 1)); }
    template <int kRow>
    static inline I field(I x) {
        for (int i = 0; i < kRow; i++) x = and_of(triple(x), 255u);
        return shift_right(triple(x), 8);
    }
};

// What codes stand for. Bits of a code above its own are those of other rows, and are ignored.
template <int kCodeBits>
struct LookUp {
    static constexpr int kBits = kCodeBits;
    Table table;
    explicit LookUp(const Operand &a) : table(load_table(a.levels)) {}
    inline F operator()(I code) const { return look_up(table, code); }
};

struct Excess8 {
    static constexpr int kBits = 8;
    explicit Excess8(const Operand &) {}
    inline F operator()(I code) const { return sub(decode_low<8>(code), set1(128.f)); }
};

// An 8-bit float has the sign and the exponent of a half with a bias of 7, or of 15, in its upper bits.
inline F e4m3_of(I code) {
    const I half = or_of(shift_left(and_of(code, 0x80u), 8), shift_left(and_of(code, 0x7fu), 7));
    return mul(halves_of(half), set1(256.f));
}
struct E4m3 {
    static constexpr int kBits = 8;
    explicit E4m3(const Operand &) {}
    inline F operator()(I code) const { return e4m3_of(code); }
};
struct E5m2 {
    static constexpr int kBits = 8;
    explicit E5m2(const Operand &) {}
    inline F operator()(I code) const { return halves_of(shift_left(and_of(code, 0xffu), 8)); }
};

template <class Body>
inline void with_book(const Operand &a, const Body &body) {
    switch (a.format & ~(kByteScales | kNoScales)) {
        case kBook + 1: return body(LookUp<1>(a));
        case kBook + 2: return body(LookUp<2>(a));
        case kBook + 4: return body(LookUp<4>(a));
        case kBook + kTrits: return body(LookUp<kTrits>(a));
        case kExcess8: return body(Excess8(a));
        case kE4m3: return body(E4m3(a));
        case kE5m2: return body(E5m2(a));
    }
}

// Scales as bytes, E4M3, follow one fp32 number that all of them are multiplied by.
inline float page_scale(const Operand &a) {
    float x;
    __builtin_memcpy(&x, a.params, sizeof x);
    return x;
}
inline const uint8_t *scale_bytes(const Operand &a) { return reinterpret_cast<const uint8_t *>(a.params) + 4; }

// Scales [at, at + n) of an operand; bytes come in whole vectors.
inline F load_scales(const Operand &a, int64_t at, int64_t n) {
    if (a.format & kNoScales) return set1(1.f);
    if (!(a.format & kByteScales)) return load_first_half(a.params + at, n);
    return mul(e4m3_of(load_bytes(scale_bytes(a) + at)), set1(page_scale(a)));
}
inline float scale_at(const Operand &a, int64_t at) {
    if (a.format & kNoScales) return 1.f;
    if (!(a.format & kByteScales)) return half_to_float(a.params[at]);
    const int code = scale_bytes(a)[at];
    return half_to_float(static_cast<uint16_t>((code & 0x80) << 8 | (code & 0x7f) << 7)) * 256.f * page_scale(a);
}

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

// The N blocks from `block`; kByColumn: columns have scales.
template <bool kByColumn, int M, int N, class Book>
inline void multiply_level_blocks(const Operand &a, const Book &book, int64_t block, const float *coefs,
                                  const Target &t) {
    using Line = Lines<Book::kBits>;
    F total[M][N], part[M][N];
    unroll<M * N>([&](auto i) STENO_INLINE {
        total[i / N][i % N] = load(t.start + i / N * t.start_stride + (block + i % N) * kLanes);
        part[i / N][i % N] = set1(0.f);
    });
    const int64_t rows = level_rows(a), stride = kByColumn ? rows : a.groups * rows;
    const float *coef[N];
    unroll<N>([&](auto n) STENO_INLINE { coef[n] = coefs + (kByColumn ? 0 : a.group_of(block + n) * rows); });
    int64_t group = 0, end = a.scale_rows;
    const auto close_group = [&]() STENO_INLINE {
        unroll<N>([&](auto n) STENO_INLINE {
            const F scale = load_scales(a, (group * a.blocks + block + n) * kLanes, kLanes);
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
            if constexpr (kByColumn && (Book::kBits == kTrits || i == 0)) {  // other lines lie in one group
                if (r + i == end && end < a.rows) close_group();
            }
            F x[N];
            unroll<N>([&](auto n) STENO_INLINE { x[n] = book(Line::template field<i>(line[n])); });
            unroll<M>([&](auto m) STENO_INLINE {
                unroll<N>([&](auto n) STENO_INLINE {
                    F &sum = kByColumn ? part[m][n] : total[m][n];
                    sum = fma(set1(coef[n][m * stride + r + i]), x[n], sum);
                });
            });
        });
    }
    if constexpr (kByColumn) close_group();
    unroll<M * N>([&](auto i) STENO_INLINE {
        store(t.out + i / N * t.out_stride + (block + i % N) * kLanes, total[i / N][i % N]);
    });
}

template <bool kByColumn, int M, class Book>
inline void multiply_level_matrix(const Operand &a, const Book &book, const float *coef, const Target &t) {
    constexpr int kUsed = kByColumn ? 2 * M : M;
    constexpr int N = kUsed * 4 <= kAccumulators ? 4 : kUsed * 2 <= kAccumulators ? 2 : 1;
    int64_t block = 0;
    for (; block + N <= a.blocks; block += N) multiply_level_blocks<kByColumn, M, N>(a, book, block, coef, t);
    for (; block < a.blocks; block++) multiply_level_blocks<kByColumn, M, 1>(a, book, block, coef, t);
}

// The products of a batch of matrices of one shape.
template <int M>
inline void multiply_levels(const Operand *a, int64_t count, const float *x, int64_t x_step, int64_t x_stride,
                            const Scratch &scratch, Target t) {
    for (int64_t i = 0; i < count; i++, a++, x += x_step) {
        fold_scales<M>(*a, x, x_stride, scratch.coef);
        with_book(*a, [&](const auto &book) {
            if (a->scale_rows) multiply_level_matrix<true, M>(*a, book, scratch.coef, t);
            else multiply_level_matrix<false, M>(*a, book, scratch.coef, t);
        });
        t.start += t.start_step, t.out += t.out_step;
    }
}

// dst[r][c] = scale * level, dst [rows][blocks * 16].
template <class Book>
inline void dequantize_levels(const Operand &a, const Book &book, float *dst) {
    using Line = Lines<Book::kBits>;
    const uint8_t *lines = a.codes;
    for (int64_t first = 0; first < a.rows; first += Line::kRows)
        for (int64_t b = 0; b < a.blocks; b++, lines += Line::kBytes) {
            const I line = Line::load(lines);
            unroll<Line::kRows>([&](auto i) STENO_INLINE {
                const int64_t r = first + i;
                if (r >= a.rows) return;
                const F scale = a.scale_rows ? load_scales(a, (r / a.scale_rows * a.blocks + b) * kLanes, kLanes)
                                             : set1(scale_at(a, a.group_of(b) * a.rows + r));
                store(dst + (r * a.blocks + b) * kLanes, mul(book(Line::template field<i>(line)), scale));
            });
        }
}

inline Operand dequantize(Operand x, float *dst) {
    if (is_book(x.format)) with_book(x, [&](const auto &book) { dequantize_levels(x, book, dst); });
    else if (x.format == kInt8) dequantize_as<8>(x, dst);
    else if (x.format == kInt4) dequantize_as<4>(x, dst);
    else dequantize_as<2>(x, dst);
    return plain_operand(kFloat, dst, x.rows, x.blocks);
}
