// Single tokens of spans, copied out into dense rows: what an access method reads that chooses tokens, not pages.
#include "attend.h"

#include <cstring>

namespace {

// The arguments of steno_gather; `_GatherProblem` of steno/kernels/attention/gather.py has the same fields.
struct GatherProblem {
    const Entry *entries;
    const int64_t *entry_ids;  // [count]
    const int64_t *token_ids;  // [count], within the entry
    uint8_t *keys;             // [count, head_dim]
    uint8_t *values;           // the same shape; null: only keys
    float *log_counts;         // [count], or null
    int64_t count;
    int64_t head_dim;
    int64_t format;  // of keys and values, an unpaged Format; any span can be read as kFloat
    int32_t num_threads;
};

constexpr int64_t kMinTokensPerThread = 256;

float as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

float half_to_float(uint16_t x) {
    const uint32_t sign = (x & 0x8000u) << 16, rest = x & 0x7fffu;
    if (rest >= 0x7c00u) return as_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    // the exponent is off by 112; a product with a power of two sets it right, subnormal numbers included
    return as_float(sign | rest << 13) * as_float(0x77800000u);
}

int64_t number_bytes(int64_t format) { return format == kFloat ? 4 : 2; }

void read_plain(const uint8_t *source, int64_t format, int64_t target, int64_t dim, uint8_t *out) {
    if (format == target) {
        std::memcpy(out, source, dim * number_bytes(format));
        return;
    }
    float *numbers = reinterpret_cast<float *>(out);
    for (int64_t i = 0; i < dim; i++) {
        uint16_t x;
        std::memcpy(&x, source + 2 * i, sizeof x);
        numbers[i] = format == kBfloat16 ? as_float(uint32_t{x} << 16) : half_to_float(x);
    }
}

// A page's codes of keys, transposed, or of values (steno/kernels/quant/packing.py): [rows][columns] in lines.
struct PackedCodes {
    const uint8_t *codes;
    const uint16_t *params;  // [2][groups][rows], scales then minima
    int64_t rows, columns, group, bits;

    float at(int64_t r, int64_t c) const {
        const int64_t per_line = 32 / bits, blocks = ceil_div(columns, kLanes), groups = ceil_div(columns, group);
        const int64_t row = r % per_line, line = r / per_line * blocks + c / kLanes, g = c / group;
        uint32_t word;
        std::memcpy(&word, codes + (line * kLanes + c % kLanes) * 4, sizeof word);
        const uint32_t code = word >> (8 * (row % 4) + bits * (row / 4)) & ((1u << bits) - 1);
        const float scale = half_to_float(params[g * rows + r]);
        return static_cast<float>(code) * scale + half_to_float(params[(groups + g) * rows + r]);
    }
    PackedCodes page(int64_t i) const {
        PackedCodes next = *this;
        next.codes += i * (ceil_div(rows * bits, 32) * ceil_div(columns, kLanes) * kLanes * 4);
        next.params += i * (2 * ceil_div(columns, group) * rows);
        return next;
    }
};

void read_page(const Entry &e, int64_t token, int64_t dim, float *keys, float *values) {
    const int64_t bits = e.format - kPaged, page = token / kPageTokens, t = token % kPageTokens;
    const PackedCodes k = PackedCodes{e.keys, e.key_params, dim, kPageTokens, e.key_group, bits}.page(page);
    const PackedCodes v = PackedCodes{e.values, e.value_params, kPageTokens, dim, e.value_group, bits}.page(page);
    for (int64_t i = 0; i < dim; i++) keys[i] = k.at(i, t);
    for (int64_t i = 0; values && i < dim; i++) values[i] = v.at(t, i);
}

bool can_read(const GatherProblem &p, const Entry &e) {
    if (e.format == kInt2 || e.format == kInt4 || e.format == kInt8) return p.format == kFloat;
    return e.format == p.format || ((e.format == kBfloat16 || e.format == kHalf) && p.format == kFloat);
}

}  // namespace

// 0: done, 2: a token lies outside its span, 4: a span of a format that cannot be read as the one asked for.
extern "C" __attribute__((visibility("default"))) int32_t steno_gather(const GatherProblem *problem) {
    const GatherProblem &p = *problem;
    for (int64_t i = 0; i < p.count; i++) {
        const Entry &e = p.entries[p.entry_ids[i]];
        if (!can_read(p, e)) return 4;
        if (p.token_ids[i] < 0 || p.token_ids[i] >= e.tokens) return 2;
    }
    const int64_t row_bytes = p.head_dim * number_bytes(p.format);
#pragma omp parallel for num_threads(p.num_threads) schedule(static) if (p.count > kMinTokensPerThread)
    for (int64_t i = 0; i < p.count; i++) {
        const Entry &e = p.entries[p.entry_ids[i]];
        const int64_t token = p.token_ids[i];
        uint8_t *keys = p.keys + i * row_bytes, *values = p.values ? p.values + i * row_bytes : nullptr;
        if (is_paged(e)) {
            read_page(e, token, p.head_dim, reinterpret_cast<float *>(keys), reinterpret_cast<float *>(values));
        } else {
            const int64_t from = token * p.head_dim * number_bytes(e.format);
            read_plain(e.keys + from, e.format, p.format, p.head_dim, keys);
            if (values) read_plain(e.values + from, e.format, p.format, p.head_dim, values);
        }
        if (p.log_counts) p.log_counts[i] = e.log_counts ? e.log_counts[token] : 0.f;
    }
    return 0;
}
