// What stands on the right of both products of attention: a matrix [rows][blocks * 16] in some format.

// Where a matrix of keys (transposed) or values lies.
struct Operand {
    int64_t format;
    const uint8_t *codes;
    const uint16_t *params;  // [2][groups][rows], scales then minima; null for plain numbers
    int64_t rows;
    int64_t blocks;
    int64_t groups;
    uint64_t group_inverse;  // 2^32 over the blocks of a group, rounded up: a division would cost as much as ten rows
    int64_t next_codes;      // how far away the matrix that comes next lies, in bytes and in numbers
    int64_t next_params;
    int64_t group_of(int64_t block) const { return static_cast<int64_t>(block * group_inverse >> 32); }
    int64_t coef_rows() const { return (rows + kLanes - 1) & ~int64_t{kLanes - 1}; }
};

inline Operand plain_operand(int64_t format, const void *numbers, int64_t rows, int64_t blocks) {
    return {format, static_cast<const uint8_t *>(numbers), nullptr, rows, blocks, 1, 0, 0, 0};
}

inline int64_t code_bytes(int64_t rows, int64_t blocks, int64_t bits) {
    return bits == 8 ? rows * blocks * kLanes : ceil_div(rows * blocks * bits, 32) * 64;
}

// Decoders. decode<N>(index, x) reads the blocks index .. index + N - 1; with kAligned, index is a multiple of N.
// kRows<N> rows of N blocks are a step, which starts at a line; decode_step reads the N blocks from `first` on of a
// step.
struct Floats {
    static constexpr bool kQuantized = false;
    static constexpr int kBlockBytes = 64;
    template <int N>
    static constexpr int kRows = 2;
    const uint8_t *base;
    template <int N, bool kAligned>
    inline void decode(uint64_t index, F *x) const {
        decode_step<N>(base + index * kBlockBytes, 0, x);
    }
    template <int N>
    static inline void decode_step(const uint8_t *step, int first, F *x) {
        for (int n = 0; n < N; n++) x[n] = load(reinterpret_cast<const float *>(step + (first + n) * kBlockBytes));
    }
};

struct Bfloats {
    static constexpr bool kQuantized = false;
    static constexpr int kBlockBytes = 32;
    template <int N>
    static constexpr int kRows = 2;
    const uint8_t *base;
    template <int N, bool kAligned>
    inline void decode(uint64_t index, F *x) const {
        decode_step<N>(base + index * kBlockBytes, 0, x);
    }
    template <int N>
    static inline void decode_step(const uint8_t *step, int first, F *x) {
        for (int n = 0; n < N; n++)
            x[n] = load_bfloat16(reinterpret_cast<const uint16_t *>(step + (first + n) * kBlockBytes));
    }
};

struct Halves {
    static constexpr bool kQuantized = false;
    static constexpr int kBlockBytes = 32;
    template <int N>
    static constexpr int kRows = 2;
    const uint8_t *base;
    template <int N, bool kAligned>
    inline void decode(uint64_t index, F *x) const {
        decode_step<N>(base + index * kBlockBytes, 0, x);
    }
    template <int N>
    static inline void decode_step(const uint8_t *step, int first, F *x) {
        for (int n = 0; n < N; n++)
            x[n] = load_half(reinterpret_cast<const uint16_t *>(step + (first + n) * kBlockBytes));
    }
};

struct Bytes {
    static constexpr bool kQuantized = true;
    static constexpr int kBlockBytes = 16;
    template <int N>
    static constexpr int kRows = 2;
    const uint8_t *base;
    template <int N, bool kAligned>
    inline void decode(uint64_t index, F *x) const {
        decode_step<N>(base + index * kBlockBytes, 0, x);
    }
    template <int N>
    static inline void decode_step(const uint8_t *step, int first, F *x) {
        for (int n = 0; n < N; n++) x[n] = decode_int8(step + (first + n) * kBlockBytes);
    }
};

template <int kBits>
struct Fields {
    static constexpr bool kQuantized = true;
    static constexpr int kPerLine = 32 / kBits;
    static constexpr int kBlockBytes = 64 / kPerLine;
    template <int N>
    static constexpr int kRows = kPerLine / N;
    const uint8_t *base;
    template <int N, bool kAligned>
    inline void decode(uint64_t index, F *x) const {
        if (kAligned) return decode_step<N>(base + index / kPerLine * 64, index % kPerLine, x);
        for (int n = 0; n < N; n++) decode_step<1>(base + (index + n) / kPerLine * 64, (index + n) % kPerLine, x + n);
    }
    template <int N>
    static inline void decode_step(const uint8_t *step, int first, F *x) {
        I codes = load_line(step);
        if (first) codes = shift_right(codes, first * kBits);
        for (int n = 0; n < N; n++) {
            x[n] = decode_low<kBits>(codes);
            if (n + 1 < N) codes = shift_right(codes, kBits);
        }
    }
};

// dst[r][c] = code * scale + minimum, dst [rows][blocks * 16].
template <class Codes>
inline void dequantize_as(const Operand &x, float *dst) {
    const Codes codes{x.codes};
    for (int64_t r = 0; r < x.rows; r++)
        for (int64_t b = 0; b < x.blocks; b++) {
            const int64_t g = x.group_of(b);
            F value[1];
            codes.template decode<1, true>(r * x.blocks + b, value);
            const F scale = set1(half_to_float(x.params[g * x.rows + r]));
            const F minimum = set1(half_to_float(x.params[(x.groups + g) * x.rows + r]));
            store(dst + (r * x.blocks + b) * kLanes, fma(value[0], scale, minimum));
        }
}

inline Operand dequantize(Operand x, float *dst) {
    if (x.format == kInt8) dequantize_as<Bytes>(x, dst);
    else if (x.format == kInt4) dequantize_as<Fields<4>>(x, dst);
    else dequantize_as<Fields<2>>(x, dst);
    return plain_operand(kFloat, dst, x.rows, x.blocks);
}

// Dense keys [count][dim] to fp32 [padded dim][64], columns from count on zero.
inline Operand transpose_keys(const Entry &e, int64_t token, int64_t count, int64_t dim, float *dst) {
    for (int64_t c = 0; c < dim; c += kLanes)
        for (int64_t t = 0; t < kPageTokens; t += kLanes) {
            F x[kLanes];
            for (int i = 0; i < kLanes; i++)
                x[i] = t + i < count ? load_dense(e.format, e.keys, (token + t + i) * dim + c, dim - c) : set1(0.f);
            transpose16(x);
            for (int i = 0; i < kLanes; i++) store(dst + (c + i) * kPageTokens + t, x[i]);
        }
    return plain_operand(kFloat, dst, dim, kPageTokens / kLanes);
}

// Dense values [count][dim] to fp32 [count][padded dim].
inline Operand copy_values(const Entry &e, int64_t token, int64_t count, int64_t dim, float *dst) {
    const int64_t blocks = ceil_div(dim, kLanes);
    for (int64_t t = 0; t < count; t++)
        for (int64_t b = 0; b < blocks; b++)
            store(dst + (t * blocks + b) * kLanes,
                  load_dense(e.format, e.values, (token + t) * dim + b * kLanes, dim - b * kLanes));
    return plain_operand(kFloat, dst, count, blocks);
}
