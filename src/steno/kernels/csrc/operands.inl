// What stands on the right of both products of attention: a matrix [rows][blocks * 16] in some format.

constexpr int64_t kLineBytes = 64;

inline int64_t count_code_bytes(int64_t rows, int64_t blocks, int64_t bits) {
    if (bits == kTrits) return ceil_div(rows, 5) * blocks * kLanes;
    return ceil_div(rows * bits, 32) * blocks * kLineBytes;
}

// Where a matrix of keys (transposed) or values lies.
struct Operand {
    int64_t format;
    const uint8_t *codes;
    const uint16_t *params;  // [2][groups][rows], scales then minima; of a codebook scales only; null for plain numbers
    int64_t rows;
    int64_t blocks;
    int64_t groups;
    uint64_t group_inverse;  // 2^32 over the blocks of a group, rounded up: a division would cost as much as ten rows
    int64_t next_codes;      // how far away the matrix that comes next lies, in bytes and in numbers
    int64_t next_params;
    const float *levels;  // of a codebook
    int64_t scale_rows;   // of a codebook: so many rows share a scale, which differs by column, [groups][blocks * 16]; or 0
    int64_t group_of(int64_t block) const { return static_cast<int64_t>(block * group_inverse >> 32); }
    int64_t code_bytes() const { return count_code_bytes(rows, blocks, bits_of(format)); }
    int64_t coef_rows() const { return (rows + kLanes - 1) & ~int64_t{kLanes - 1}; }
};

inline Operand plain_operand(int64_t format, const void *numbers, int64_t rows, int64_t blocks) {
    return {format, static_cast<const uint8_t *>(numbers), nullptr, rows, blocks, 1, 0, 0, 0, nullptr, 0};
}

// Where a product begins and ends; start may be out. A stride leads to the next vector, a step to the next tile.
struct Target {
    const float *start;
    int64_t start_stride, start_step;
    float *out;
    int64_t out_stride, out_step;
};

// Plain numbers: how 16 of them, or fewer, are read.
struct Floats {
    static constexpr int64_t kBytes = 4;
    static inline F read(const uint8_t *p) { return load(reinterpret_cast<const float *>(p)); }
    static inline F read_first(const uint8_t *p, int64_t n) {
        return load_first(reinterpret_cast<const float *>(p), n);
    }
};

struct Bfloats {
    static constexpr int64_t kBytes = 2;
    static inline F read(const uint8_t *p) { return load_bfloat16(reinterpret_cast<const uint16_t *>(p)); }
    static inline F read_first(const uint8_t *p, int64_t n) {
        return load_first_as<load_bfloat16>(reinterpret_cast<const uint16_t *>(p), n);
    }
};

struct Halves {
    static constexpr int64_t kBytes = 2;
    static inline F read(const uint8_t *p) { return load_half(reinterpret_cast<const uint16_t *>(p)); }
    static inline F read_first(const uint8_t *p, int64_t n) {
        return load_first_as<load_half>(reinterpret_cast<const uint16_t *>(p), n);
    }
};

// Codes in lines (steno/kernels/quant/packing.py): a line is kRows rows of a block; row r of them lies in all 16 dwords
// from bit shift_of(r) on.
template <int kBits>
struct Codes {
    static constexpr int64_t kRows = 32 / kBits;
    static constexpr int shift_of(int64_t row) { return static_cast<int>(8 * (row % 4) + kBits * (row / 4)); }
};
// dst[r][c] = code * scale + minimum, dst [rows][blocks * 16].
template <int kBits>
inline void dequantize_as(const Operand &x, float *dst) {
    for (int64_t r = 0; r < x.rows; r++) {
        const uint8_t *lines = x.codes + r / Codes<kBits>::kRows * x.blocks * kLineBytes;
        const int shift = Codes<kBits>::shift_of(r % Codes<kBits>::kRows);
        for (int64_t b = 0; b < x.blocks; b++) {
            const int64_t g = x.group_of(b);
            const F code = decode_low<kBits>(shift_right(load_line(lines + b * kLineBytes), shift));
            const F scale = set1(half_to_float(x.params[g * x.rows + r]));
            const F minimum = set1(half_to_float(x.params[(x.groups + g) * x.rows + r]));
            store(dst + (r * x.blocks + b) * kLanes, fma(code, scale, minimum));
        }
    }
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

inline void dequantize_levels(const Operand &x, float *dst);  // levels.inl

inline Operand dequantize(const Operand &x, float *dst) {
    if (is_book(x.format)) dequantize_levels(x, dst);
    else if (x.format == kInt8) dequantize_as<8>(x, dst);
    else if (x.format == kInt4) dequantize_as<4>(x, dst);
    else dequantize_as<2>(x, dst);
    return plain_operand(kFloat, dst, x.rows, x.blocks);
}
