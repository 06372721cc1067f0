// Interleaved rANS: an entropy coder of bytes with static tables, 32 states side by side.
//
// A stream is 32 states of 32 bits, then words of 16 bits, little-endian. Symbols come in runs; a run has one table, and
// its symbols go round the states 0, 1, … 31. Every run begins at state 0.
// Source: Duda, Asymmetric numeral systems, 2013, https://arxiv.org/abs/1311.2540; Giesen, Interleaved entropy coders,
// 2014, https://arxiv.org/abs/1402.3392.
// steno/kernels/rans/naive.py is the oracle.
#include "attend.h"

#include <cstring>
#include <new>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int kStates = 32;
constexpr int kScaleBits = 12;
constexpr uint32_t kSlots = 1u << kScaleBits;
constexpr uint32_t kLowest = 1u << 16;  // a state is at least this between two symbols
constexpr int kSymbols = 256;

// How each symbol of a table is encoded; no symbol has a frequency of 0 where it occurs.
struct EncodeTable {
    uint64_t reciprocal[kSymbols];  // ceil(2^44 / frequency): exact for every state that is divided
    uint32_t entry[kSymbols];       // the frequency, and above 16 bits where it starts

    void load(const uint16_t *frequencies) {
        uint32_t start = 0;
        for (int s = 0; s < kSymbols; s++) {
            const uint32_t frequency = frequencies[s];
            reciprocal[s] = frequency ? ((uint64_t{1} << 44) + frequency - 1) / frequency : 0;
            entry[s] = frequency | start << 16;
            start += frequency;
        }
    }
};

struct Reader {
    const uint8_t *next;
    const uint8_t *end;
};

uint32_t load32(const uint8_t *p) {
    uint32_t x;
    std::memcpy(&x, p, 4);
    return x;
}

uint16_t load16(const uint8_t *p) {
    uint16_t x;
    std::memcpy(&x, p, 2);
    return x;
}

// An entry of a decode table: the symbol, 12 bits of frequency - 1, 12 bits of slot - start.
inline uint32_t advanced(uint32_t state, uint32_t entry) {
    return ((entry >> 8 & (kSlots - 1)) + 1) * (state >> kScaleBits) + (entry >> 20);
}

// Symbols of one run, of any length; false if the words end too early.
bool decode_steps(uint32_t *states, const uint32_t *table, Reader &in, uint8_t *out, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        uint32_t &state = states[i % kStates];
        const uint32_t entry = table[state & (kSlots - 1)];
        out[i] = static_cast<uint8_t>(entry);
        state = advanced(state, entry);
        if (state < kLowest) {
            if (in.end - in.next < 2) return false;
            state = state << 16 | load16(in.next);
            in.next += 2;
        }
    }
    return true;
}

// As many whole steps of 32 symbols as `in` surely has the words for; the number of symbols.
using DecodeRun = int64_t (*)(uint32_t *states, const uint32_t *table, Reader &in, uint8_t *out, int64_t count);

int64_t decode_none(uint32_t *, const uint32_t *, Reader &, uint8_t *, int64_t) { return 0; }

#if defined(__x86_64__)

__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))) int64_t decode_avx512(
    uint32_t *states, const uint32_t *table, Reader &in, uint8_t *out, int64_t count) {
    const __m512i slots = _mm512_set1_epi32(kSlots - 1), one = _mm512_set1_epi32(1);
    const __m512i lowest = _mm512_set1_epi32(kLowest);
    __m512i x[2] = {_mm512_loadu_si512(states), _mm512_loadu_si512(states + 16)};
    int64_t done = 0;
    for (; done + kStates <= count && in.end - in.next >= 2 * kStates; done += kStates)
        for (int half = 0; half < 2; half++) {
            const __m512i entry = _mm512_i32gather_epi32(_mm512_and_si512(x[half], slots), table, 4);
            _mm_storeu_si128(reinterpret_cast<__m128i *>(out + done + 16 * half), _mm512_cvtepi32_epi8(entry));
            const __m512i frequency =
                _mm512_add_epi32(_mm512_and_si512(_mm512_srli_epi32(entry, 8), slots), one);
            x[half] = _mm512_add_epi32(_mm512_mullo_epi32(frequency, _mm512_srli_epi32(x[half], kScaleBits)),
                                       _mm512_srli_epi32(entry, 20));
            const __mmask16 low = _mm512_cmplt_epu32_mask(x[half], lowest);
            const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(in.next)));
            const __m512i shifted = _mm512_slli_epi32(x[half], 16);
            x[half] = _mm512_mask_or_epi32(x[half], low, shifted, _mm512_maskz_expand_epi32(low, words));
            in.next += 2 * __builtin_popcount(low);
        }
    _mm512_storeu_si512(states, x[0]);
    _mm512_storeu_si512(states + 16, x[1]);
    return done;
}

// For each mask of 8 lanes, which word each lane of it reads.
struct Expansion {
    uint8_t lanes[256][8];
    constexpr Expansion() : lanes() {
        for (int mask = 0; mask < 256; mask++)
            for (int lane = 0, word = 0; lane < 8; lane++)
                lanes[mask][lane] = static_cast<uint8_t>(mask >> lane & 1 ? word++ : 0);
    }
};
constexpr Expansion kExpansion;

__attribute__((target("avx2"))) int64_t decode_avx2(uint32_t *states, const uint32_t *table, Reader &in, uint8_t *out,
                                                    int64_t count) {
    const __m256i slots = _mm256_set1_epi32(kSlots - 1), one = _mm256_set1_epi32(1), zero = _mm256_setzero_si256();
    const __m256i bytes = _mm256_set_epi64x(-1, 0x0c080400, -1, 0x0c080400);  // the lowest of each dword
    __m256i x[4];
    for (int i = 0; i < 4; i++) x[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(states + 8 * i));
    int64_t done = 0;
    for (; done + kStates <= count && in.end - in.next >= 2 * kStates; done += kStates)
        for (int i = 0; i < 4; i++) {
            const __m256i slot = _mm256_and_si256(x[i], slots);
            const __m256i entry = _mm256_i32gather_epi32(reinterpret_cast<const int *>(table), slot, 4);
            const __m256i packed = _mm256_shuffle_epi8(entry, bytes);
            const uint32_t symbols[2] = {static_cast<uint32_t>(_mm256_extract_epi32(packed, 0)),
                                         static_cast<uint32_t>(_mm256_extract_epi32(packed, 4))};
            std::memcpy(out + done + 8 * i, symbols, 8);
            const __m256i frequency = _mm256_add_epi32(_mm256_and_si256(_mm256_srli_epi32(entry, 8), slots), one);
            x[i] = _mm256_add_epi32(_mm256_mullo_epi32(frequency, _mm256_srli_epi32(x[i], kScaleBits)),
                                    _mm256_srli_epi32(entry, 20));
            const __m256i is_low = _mm256_cmpeq_epi32(_mm256_srli_epi32(x[i], 16), zero);
            const int low = _mm256_movemask_ps(_mm256_castsi256_ps(is_low));
            const __m256i lanes =
                _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(kExpansion.lanes[low])));
            const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(in.next)));
            const __m256i filled = _mm256_or_si256(_mm256_slli_epi32(x[i], 16), _mm256_permutevar8x32_epi32(words, lanes));
            x[i] = _mm256_blendv_epi8(x[i], filled, is_low);
            in.next += 2 * __builtin_popcount(low);
        }
    for (int i = 0; i < 4; i++) _mm256_storeu_si256(reinterpret_cast<__m256i *>(states + 8 * i), x[i]);
    return done;
}

#endif

#if defined(__x86_64__)
bool has_avx512(int32_t isa) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && (isa < 0 || isa > 1);
}
#endif

DecodeRun decoder(int32_t isa) {
#if defined(__x86_64__)
    if (has_avx512(isa)) return decode_avx512;
    if (__builtin_cpu_supports("avx2") && isa) return decode_avx2;
#endif
    (void)isa;
    return decode_none;
}

// Writes 16 bits before `next`, and moves there if they count; the words of a stream come from the last to the first.
inline void push(uint8_t *&next, uint32_t word, bool counts) {
    const uint16_t low = static_cast<uint16_t>(word);
    std::memcpy(next - 2, &low, 2);
    next -= counts ? 2 : 0;
}

// The symbols `first` .. `last` of a run, from the last to the first; false if one of them has no frequency.
bool encode_steps(uint32_t *states, const EncodeTable &table, const uint8_t *run, int64_t first, int64_t last,
                  uint8_t *&next) {
    for (int64_t i = last; i-- > first;) {
        const uint32_t frequency = table.entry[run[i]] & 0xffff, start = table.entry[run[i]] >> 16;
        uint32_t &state = states[i % kStates];
        if (!frequency) return false;
        // without a branch, which nothing could predict: the word is written, and counts or not
        const bool is_full = state >= uint64_t{frequency} << 20;
        push(next, state, is_full);
        state >>= is_full ? 16 : 0;
        const uint32_t quotient = static_cast<uint32_t>(state * table.reciprocal[run[i]] >> 44);
        state = (quotient << kScaleBits) + (state - quotient * frequency) + start;
    }
    return true;
}

// Whole steps of 32 symbols, `count` a multiple of it, from the last to the first; false if a symbol has no frequency.
using EncodeRun = bool (*)(uint32_t *states, const EncodeTable &table, const uint8_t *run, int64_t count, uint8_t *&next);

bool encode_portable(uint32_t *states, const EncodeTable &table, const uint8_t *run, int64_t count, uint8_t *&next) {
    return encode_steps(states, table, run, 0, count, next);
}

#if defined(__x86_64__)

__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))) bool encode_avx512(
    uint32_t *states, const EncodeTable &table, const uint8_t *run, int64_t count, uint8_t *&next) {
    const __m512i low16 = _mm512_set1_epi32(0xffff), largest = _mm512_set1_epi32(kSlots);
    __m512i x[2] = {_mm512_loadu_si512(states), _mm512_loadu_si512(states + 16)};
    __mmask16 missing = 0;
    for (int64_t done = count; done > 0; done -= kStates)
        for (int half = 1; half >= 0; half--) {
            const uint8_t *symbols = run + done - kStates + 16 * half;
            const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(symbols)));
            const __m512i entry = _mm512_i32gather_epi32(index, table.entry, 4);
            const __m512i frequency = _mm512_and_si512(entry, low16), start = _mm512_srli_epi32(entry, 16);
            missing |= _mm512_testn_epi32_mask(frequency, frequency);
            // frequency << 20 of 4096 is beyond 32 bits, and no state is so large
            const __mmask16 full = _mm512_cmpneq_epu32_mask(frequency, largest) &
                                   _mm512_cmpge_epu32_mask(x[half], _mm512_slli_epi32(frequency, 20));
            const int words = __builtin_popcount(full);
            const __m256i packed = _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(full, x[half]));
            next -= 2 * words;
            _mm256_mask_storeu_epi16(next, static_cast<__mmask16>((1u << words) - 1), packed);
            const __m512i state = _mm512_mask_srli_epi32(x[half], full, x[half], 16);
            const __m256i parts[2] = {_mm512_castsi512_si256(state), _mm512_extracti64x4_epi64(state, 1)};
            const __m256i places[2] = {_mm512_castsi512_si256(index), _mm512_extracti64x4_epi64(index, 1)};
            __m256i quotients[2];
            for (int i = 0; i < 2; i++) {
                const __m512i reciprocal = _mm512_i32gather_epi64(places[i], table.reciprocal, 8);
                const __m512i product = _mm512_mullo_epi64(_mm512_cvtepu32_epi64(parts[i]), reciprocal);
                quotients[i] = _mm512_cvtepi64_epi32(_mm512_srli_epi64(product, 44));
            }
            const __m512i quotient = _mm512_inserti64x4(_mm512_castsi256_si512(quotients[0]), quotients[1], 1);
            const __m512i rest = _mm512_sub_epi32(state, _mm512_mullo_epi32(quotient, frequency));
            x[half] = _mm512_add_epi32(_mm512_add_epi32(_mm512_slli_epi32(quotient, kScaleBits), rest), start);
        }
    _mm512_storeu_si512(states, x[0]);
    _mm512_storeu_si512(states + 16, x[1]);
    return !missing;
}

#endif

EncodeRun encoder(int32_t isa) {
#if defined(__x86_64__)
    if (has_avx512(isa)) return encode_avx512;
#endif
    (void)isa;
    return encode_portable;
}

}  // namespace

#define EXPORT __attribute__((visibility("default")))

extern "C" {

// Encodes strips into `num_chunks` streams, one after another in `out`. Chunk c has of strip i the symbols
// ends[i][c] .. ends[i][c + 1], coded by frequencies[tables[i]], rows of 256 of which `num_tables` add up to 4096 each;
// neighbours with the same runs[i], and table, are one run. lengths: the bytes of each stream. All bytes; -1: they do not fit into
// `capacity`, -2: a symbol has no frequency, -3: no memory.
EXPORT int64_t steno_rans_encode(const uint8_t *const *strips, const int64_t *ends, const int32_t *tables, const int32_t *runs,
                                 int64_t num_strips, int64_t num_chunks, const uint16_t *frequencies, int64_t num_tables, uint8_t *out,
                                 int64_t capacity, int64_t *lengths, int32_t isa) try {
    const EncodeRun encode = encoder(isa);
    std::vector<EncodeTable> known(num_tables);
    for (int64_t t = 0; t < num_tables; t++) known[t].load(frequencies + t * kSymbols);
    std::vector<uint8_t> symbols, room;
    const uint8_t *const begin = out;
    for (int64_t c = 0; c < num_chunks; c++, ends++) {
        const int64_t row = num_chunks + 1;
        int64_t count = 0;
        for (int64_t i = 0; i < num_strips; i++) count += ends[i * row + 1] - ends[i * row];
        const size_t most = 2 * count + 4 * kStates + 64;  // a symbol writes a word at most, and a vector a little more
        if (room.size() < most) {
            symbols.resize(count + 1);  // never null, even without symbols
            room.resize(most);
        }
        uint8_t *to = symbols.data();
        for (int64_t i = 0; i < num_strips; i++) {
            const int64_t length = ends[i * row + 1] - ends[i * row];
            std::memcpy(to, strips[i] + ends[i * row], length);
            to += length;
        }
        uint32_t states[kStates];
        for (uint32_t &state : states) state = kLowest;
        uint8_t *next = room.data() + room.size();
        for (int64_t i = num_strips; i > 0;) {
            const int32_t table = tables[i - 1], run = runs[i - 1];
            int64_t length = 0;
            for (; i > 0 && runs[i - 1] == run; i--) length += ends[(i - 1) * row + 1] - ends[(i - 1) * row];
            to -= length;
            const int64_t whole = length / kStates * kStates;
            if (!encode_steps(states, known[table], to, whole, length, next)) return -2;
            if (!encode(states, known[table], to, whole, next)) return -2;
        }
        next -= 4 * kStates;
        std::memcpy(next, states, 4 * kStates);
        lengths[c] = room.data() + room.size() - next;
        if (lengths[c] > begin + capacity - out) return -1;
        std::memcpy(out, next, lengths[c]);
        out += lengths[c];
    }
    return out - begin;
} catch (const std::bad_alloc &) {
    return -3;
}

// Counts each of 256 symbols in each of `num_rows` rows of `length` symbols: adds to counts[row * 256 + symbol].
EXPORT void steno_rans_histograms(const uint8_t *symbols, int64_t num_rows, int64_t length, int64_t *counts) {
    for (int64_t r = 0; r < num_rows; r++, symbols += length, counts += kSymbols) {
        // four at a time, as equal neighbours would wait for each other's count
        uint32_t partial[4][kSymbols] = {};
        int64_t i = 0;
        for (; i + 4 <= length; i += 4)
            for (int k = 0; k < 4; k++) partial[k][symbols[i + k]]++;
        for (; i < length; i++) partial[0][symbols[i]]++;
        for (int s = 0; s < kSymbols; s++)
            counts[s] += int64_t{partial[0][s]} + partial[1][s] + partial[2][s] + partial[3][s];
    }
}

// Fills `tables`, rows of 4096 entries, of `num_tables` rows of 256 frequencies that add up to 4096.
EXPORT void steno_rans_tables(const uint16_t *frequencies, int64_t num_tables, uint32_t *tables) {
    for (int64_t t = 0; t < num_tables; t++)
        for (uint32_t symbol = 0; symbol < kSymbols; symbol++) {
            const uint32_t frequency = *frequencies++;
            for (uint32_t slot = 0; slot < frequency; slot++) *tables++ = symbol | (frequency - 1) << 8 | slot << 20;
        }
}

// Decodes what steno_rans_encode made into `out`, as many symbols as the runs have. decode_tables: rows of 4096 entries.
// Reads no more than num_bytes of `stream`, whatever is in it. 0: done, 4: this is no stream of these runs and tables.
EXPORT int32_t steno_rans_decode(const uint8_t *stream, int64_t num_bytes, const int64_t *run_lengths,
                                 const int32_t *tables, int64_t num_runs, const uint32_t *decode_tables, uint8_t *out,
                                 int32_t isa) {
    if (num_bytes < 4 * kStates) return 4;
    const DecodeRun decode = decoder(isa);
    uint32_t states[kStates];
    for (int i = 0; i < kStates; i++) states[i] = load32(stream + 4 * i);
    Reader in{stream + 4 * kStates, stream + num_bytes};
    for (int64_t r = 0; r < num_runs; r++) {
        const uint32_t *table = decode_tables + static_cast<int64_t>(tables[r]) * kSlots;
        const int64_t done = decode(states, table, in, out, run_lengths[r]);
        if (!decode_steps(states, table, in, out + done, run_lengths[r] - done)) return 4;
        out += run_lengths[r];
    }
    if (in.next != in.end) return 4;
    for (const uint32_t state : states)
        if (state != kLowest) return 4;
    return 0;
}
}
