// The product over codes in dot products of 16-bit words, as AVX2 has them without VNNI. Two rows lie in the words of a
// dword, and so do their coefficients, which are whole numbers in steps of their group; see fold.inl.

// Of the tiles of a batch, one after the other.
struct WordCoefficients {
    const int16_t *words;  // [count][M][groups][stride]; of four rows 0, 2, 1, 3, as bytes of codes are even or odd ones
    int64_t stride;
    const float *step, *bias;  // [count][M][groups]
};

// So many rows add up to less than 2^31 in a dword.
constexpr int64_t kWordRows = 256;
static_assert(kWordRows * 255 * static_cast<int64_t>(kLargestCoefficient) < int64_t{1} << 31, "sums must not overflow");

// The coefficients of a batch in words.
inline WordCoefficients as_words(const Folded &f, const Scratch &scratch) {
    int16_t *const words = reinterpret_cast<int16_t *>(scratch.bytes);
    for (int64_t k = 0; k < f.vectors; k++) {
        const F factor = set1(f.inverse[k]);
        for (int64_t r = k * f.stride; r < (k + 1) * f.stride; r += kLanes) {
            const F x = mul(load(f.coef + r), factor);
            __m256i y = _mm256_packs_epi32(_mm256_cvtps_epi32(x.lo), _mm256_cvtps_epi32(x.hi));
            y = _mm256_permute4x64_epi64(y, 0xd8);  // packing works within halves of a register
            y = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(y, 0xd8), 0xd8);
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(words + r), y);
        }
    }
    return {words, f.stride, f.step, f.bias};
}

inline __m256i two_rows(const int16_t *p) {
    int32_t words;
    __builtin_memcpy(&words, p, sizeof words);
    return _mm256_set1_epi32(words);
}

// Two rows of codes in the words of a line of 16 dwords: rows 0 and 2 of the four whose first bits are at kShift, or 1 and 3.
template <int kBits, bool kOdd, int kShift>
inline __m256i decode_words(__m256i line) {
    constexpr int kAt = kShift + 8 * kOdd;
    if (kAt) line = _mm256_srli_epi16(line, kAt);
    return kAt + kBits == 16 ? line : _mm256_and_si256(line, _mm256_set1_epi16((1 << kBits) - 1));
}

// Accumulators are of a type whose elements are the sums: arrays of __m256i, whose elements are wider, would be kept in memory.
typedef int32_t Sums __attribute__((vector_size(32)));
inline void add_dots(Sums &sums, __m256i codes, __m256i coefficients) {
    sums += reinterpret_cast<Sums>(_mm256_madd_epi16(codes, coefficients));
    // gcc would change the order of additions and need more registers than there are
    asm("" : "+x"(sums));
}
inline __m256 to_floats(Sums sums) { return _mm256_cvtepi32_ps(reinterpret_cast<__m256i>(sums)); }

// A block: 16 columns, whose codes are two registers.
template <int kBits, int M>
inline void multiply_code_block(const Operand &a, int64_t block, const WordCoefficients &c, const Target &t) {
    const int64_t group = a.group_of(block), query_stride = a.groups * c.stride, step = a.blocks * kLineBytes;
    const int16_t *words = c.words + group * c.stride;
    const uint8_t *lines = a.codes + block * kLineBytes;
    const int64_t next = a.next_codes;
    F total[M];
    for (int m = 0; m < M; m++) total[m] = set1(0.f);
    for (int64_t first = 0; first < a.rows; first += kWordRows) {
        const int64_t end = first + kWordRows < a.rows ? first + kWordRows : a.rows;
        Sums low[M], high[M];
        unroll<M>([&](auto m) STENO_INLINE { low[m] = high[m] = Sums{}; });
        for (int64_t r = first; r < end; r += Codes<kBits>::kRows, lines += step) {
            prefetch(lines + next);
            const I line = load_line(lines);
            unroll<16 / kBits>([&](auto i) STENO_INLINE {
                constexpr int kShift = i / 2 * kBits, kOdd = i % 2;
                const __m256i first_codes = decode_words<kBits, kOdd, kShift>(line.lo);
                const __m256i last_codes = decode_words<kBits, kOdd, kShift>(line.hi);
                unroll<M>([&](auto m) STENO_INLINE {
                    const __m256i pair = two_rows(words + m * query_stride + r + 2 * i);
                    add_dots(low[m], first_codes, pair);
                    add_dots(high[m], last_codes, pair);
                });
            });
        }
        unroll<M>([&](auto m) STENO_INLINE { total[m] = add(total[m], {to_floats(low[m]), to_floats(high[m])}); });
    }
    const float *start = t.start + block * kLanes;
    float *out = t.out + block * kLanes;
    for (int m = 0; m < M; m++, start += t.start_stride, out += t.out_stride) {
        const int64_t at = m * a.groups + group;
        store(out, fma(total[m], set1(c.step[at]), add(load(start), set1(c.bias[at]))));
    }
}

// The products of a batch of matrices of one shape.
template <int kBits, int M>
inline void multiply_codes(const Operand *a, int64_t count, const float *x, int64_t x_step, int64_t x_stride,
                           const Scratch &scratch, Target t) {
    WordCoefficients c = as_words(fold<M>(a, count, x, x_step, x_stride, scratch), scratch);
    const int64_t vectors = M * a->groups;
    for (int64_t i = 0; i < count; i++, a++) {
        for (int64_t block = 0; block < a->blocks; block++) multiply_code_block<kBits, M>(*a, block, c, t);
        c = {c.words + vectors * c.stride, c.stride, c.step + vectors, c.bias + vectors};
        t.start += t.start_step, t.out += t.out_step;
    }
}
