// Encodes pages. The results are those of steno/kernels/quant/{groups,packing}.py to the bit, on every instruction set:
// single operations of IEEE 754, none of which may be contracted or reordered.
//
// A matrix of codes is worked on transposed, its columns below each other, so that a vector holds 16 rows: then smallest
// and largest numbers, scales and codes of 16 groups are computed at once. Keys arrive that way, values are turned first.

constexpr float kLargestHalf = 65504.f;
constexpr float kMinScale = 1e-5f;
constexpr float kToInteger = 12582912.f;  // 1.5 * 2^23: what is added to it is rounded to a whole number, ties to even

// Sixteen numbers as bits, in the vector extension of gcc and clang.
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef int32_t Signed __attribute__((vector_size(64)));
typedef float Numbers __attribute__((vector_size(64)));
typedef uint16_t Words __attribute__((vector_size(32)));

inline Bits bits_at(const void *p) {
    Bits x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}
inline Bits bits_of(F x) {
    float numbers[kLanes];
    store(numbers, x);
    return bits_at(numbers);
}
inline F numbers_of(Bits x) {
    float numbers[kLanes];
    __builtin_memcpy(numbers, &x, sizeof x);
    return load(numbers);
}
inline Bits pick(Signed mask, Bits yes, Bits no) {
    return (yes & reinterpret_cast<Bits>(mask)) | (no & ~reinterpret_cast<Bits>(mask));
}
inline F smaller(F a, F b) { return select_less(a, b, a, b); }

// Numbers of at most 65504, or NaN, in fp16, ties to even; x becomes what they stand for.
inline Words round_to_half(F &x) {
    const Bits bits = bits_of(x), sign = bits & 0x80000000u, magnitude = bits ^ sign;
    // below 2^-14 halves are multiples of 2^-24, as fp32 is from 0.5 on
    const Numbers sum = reinterpret_cast<Numbers>(magnitude) + 0.5f;
    const Bits normal = (magnitude + 0x0fffu + (magnitude >> 13 & 1u)) & ~0x1fffu;
    const Signed is_small = reinterpret_cast<Signed>(magnitude) < 0x38800000;
    const Signed is_nan = reinterpret_cast<Signed>(magnitude) > 0x7f800000;
    const Bits rounded = pick(is_small, reinterpret_cast<Bits>(sum - 0.5f), normal);
    const Bits half = pick(is_small, reinterpret_cast<Bits>(sum) - 0x3f000000u, (normal - 0x38000000u) >> 13);
    x = numbers_of(pick(is_nan, bits, rounded | sign));
    return __builtin_convertvector(pick(is_nan, Bits{} + 0x7e00u, half | sign >> 16), Words);
}

// 64 tokens as fp32, [64][stride], zeros in the padding: the input itself where it is like that.
inline const float *load_tokens(const EncodeProblem &p, bool is_value, int64_t page, float *room, int64_t &stride) {
    const int64_t first = p.offsets[is_value][page], step = p.token_strides[is_value];
    if (p.format == kFloat && p.head_dim % kLanes == 0) {
        stride = step;
        return reinterpret_cast<const float *>(p.inputs[is_value]) + first;
    }
    stride = ceil_div(p.head_dim, kLanes) * kLanes;
    for (int64_t t = 0; t < kPageTokens; t++)
        for (int64_t c = 0; c < p.head_dim; c += kLanes)
            store(room + t * stride + c, load_dense(p.format, p.inputs[is_value], first + t * step + c, p.head_dim - c));
    return room;
}

// out[c][t] = in[t][c]
inline void transpose_tokens(const float *in, int64_t stride, int64_t columns, float *out) {
    for (int64_t t = 0; t < kPageTokens; t += kLanes)
        for (int64_t c = 0; c < columns; c += kLanes) {
            F x[kLanes];
            for (int i = 0; i < kLanes; i++) x[i] = load(in + (t + i) * stride + c);
            transpose16(x);
            for (int i = 0; i < kLanes; i++) store(out + (c + i) * kPageTokens + t, x[i]);
        }
}

// What a group's numbers are relative to, and one over its scale, for 16 rows.
struct Grid {
    F minimum, inverse;
};

// The grid of n columns `stride` apart; scales, minima: its parameters of num_rows rows.
inline Grid make_grid(const float *x, int64_t n, int64_t stride, F top, int64_t num_rows, uint16_t *scales,
                      uint16_t *minima) {
    F low = load(x), high = low;
    Signed nan{};
    for (int64_t i = 0; i < n; i++, x += stride) {
        const F y = load(x);
        low = smaller(y, low), high = max(high, y);
        nan |= reinterpret_cast<Signed>(bits_at(x) & 0x7fffffffu) > 0x7f800000;
    }
    // a NaN makes NaN of all; and of the two zeros, whichever came first, the positive one
    low = add(low, numbers_of(reinterpret_cast<Bits>(nan)));
    F minimum = smaller(set1(kLargestHalf), max(set1(-kLargestHalf), low));
    const Words minimum_half = round_to_half(minimum);
    F scale = max(set1(kMinScale), div(sub(high, minimum), top));
    scale = smaller(set1(kLargestHalf), scale);
    const Words scale_half = round_to_half(scale);
    const int64_t size = 2 * (num_rows < kLanes ? num_rows : kLanes);
    __builtin_memcpy(minima, &minimum_half, size);
    __builtin_memcpy(scales, &scale_half, size);
    return {minimum, div(set1(1.f), scale)};
}

// Lines of 16 rows and 16 columns of codes: 64 bytes, 16 dwords, dword = column; bits j * kBits of byte i hold row
// 4 j + i of the line. codes: a vector per row, code in its low byte.
template <int kBits>
inline void pack_lines(const F *codes, int64_t num_lines, int64_t next_line, uint8_t *out) {
    constexpr int kRows = 32 / kBits;
    for (int l = 0; l < kLanes / kRows && l < num_lines; l++, codes += kRows, out += next_line) {
        Bits line{};
        for (int k = 0; k < kRows; k++) line |= (bits_of(codes[k]) & 0xffu) << (k % 4 * 8 + k / 4 * kBits);
        __builtin_memcpy(out, &line, sizeof line);
    }
}

// x: the matrix transposed, [columns][stride].
template <int kBits>
inline void encode_matrix(const CodeMatrix &m, const float *x, int64_t stride, uint8_t *codes, uint16_t *params) {
    const F top = set1(static_cast<float>((1 << kBits) - 1)), zero = set1(0.f), to_integer = set1(kToInteger);
    const int64_t blocks = ceil_div(m.columns, kLanes), line_rows = 32 / kBits;
    for (int64_t r = 0; r < m.rows; r += kLanes)
        for (int64_t g = 0; g < m.num_groups(); g++) {
            const int64_t first = g * m.group, end = first + m.group < m.columns ? first + m.group : m.columns;
            uint16_t *const scales = params + g * m.rows + r, *const minima = scales + m.num_groups() * m.rows;
            const Grid grid = make_grid(x + first * stride + r, end - first, stride, top, m.rows - r, scales, minima);
            for (int64_t c = first; c < end; c += kLanes) {
                F y[kLanes];
                for (int i = 0; i < kLanes; i++) {
                    y[i] = zero;
                    if (c + i >= end) continue;
                    // in this order NaN becomes 0
                    const F code = max(mul(sub(load(x + (c + i) * stride + r), grid.minimum), grid.inverse), zero);
                    y[i] = add(smaller(code, top), to_integer);
                }
                transpose16(y);
                pack_lines<kBits>(y, (m.padded_rows() - r) / line_rows, blocks * kLineBytes,
                                  codes + (r / line_rows * blocks + c / kLanes) * kLineBytes);
            }
        }
}

void encode(const EncodeProblem &p, int64_t page, float *scratch) {
    const int64_t padded_tokens = kPageTokens * ceil_div(p.head_dim, kLanes) * kLanes;
    for (int i = 0; i < 2; i++) {
        const CodeMatrix m = code_matrix(p, i == 1);
        int64_t stride;
        const float *x = load_tokens(p, i == 1, page, scratch, stride);
        if (i == 1) {
            transpose_tokens(x, stride, p.head_dim, scratch + padded_tokens);
            x = scratch + padded_tokens, stride = kPageTokens;
        }
        uint8_t *codes = p.codes[i] + page * m.num_bytes();
        uint16_t *params = p.params[i] + page * m.num_params();
        if (p.bits == 8) encode_matrix<8>(m, x, stride, codes, params);
        else if (p.bits == 4) encode_matrix<4>(m, x, stride, codes, params);
        else encode_matrix<2>(m, x, stride, codes, params);
    }
}
