// Codes that stand for the levels of a codebook, with a scale per group and no minimum. Every code becomes a float in a
// register, by a table look-up or, of 8 bits, by arithmetic. Scales differ from row to row or from column to column.

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

// dst[r][c] = scale * level, dst [rows][blocks * 16].
template <class Book>
inline void dequantize_book(const Operand &a, const Book &book, float *dst) {
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

inline void dequantize_levels(const Operand &a, float *dst) {
    with_book(a, [&](const auto &book) { dequantize_book(a, book, dst); });
}
