// What the dispatcher, the per-instruction-set kernels and the Python side agree on.
#pragma once

#include <cstdint>

constexpr int kPageTokens = 64;
constexpr int kLanes = 16;
constexpr int kAbiVersion = 11;

// One span; the columns of SpanTable.entries (steno/kernels/attention/table.py) in the same order.
struct Entry {
    int64_t format;
    const uint8_t *keys;
    const uint8_t *values;
    const uint16_t *key_params;
    const uint16_t *value_params;
    int64_t tokens;
    const float *log_counts;  // [tokens], or null
    const int32_t *page_ids;
    int64_t num_page_ids;  // -1: the span is read whole
    int64_t key_group;
    int64_t value_group;
    const float *levels;  // [16], what the codes of a codebook stand for, repeated; null: they are numbers by themselves
};
static_assert(sizeof(Entry) == 12 * 8, "entries are rows of 12 int64");

// Values of Entry.format. Pages are kPaged + bits: whole numbers with a scale and a minimum per group. Or kBook + bits:
// codes that stand for levels, with a scale per group and no minimum; kByteScales: scales are E4M3 bytes behind one fp32
// of the page; kNoScales: there are none. `bits` is the low four bits of a format: kTrits are five ternary codes in a byte.
constexpr int64_t kPaged = 16, kBook = 64, kByteScales = 256, kNoScales = 512;
constexpr int kTrits = 5;
enum Format : int64_t {
    kFloat = 0,
    kBfloat16 = 1,
    kHalf = 2,
    kInt2 = kPaged + 2,
    kInt4 = kPaged + 4,
    kInt8 = kPaged + 8,
    kExcess8 = kBook + 8,  // code - 128
    kE4m3 = kBook + 16 + 8,
    kE5m2 = kBook + 32 + 8
};
inline int64_t bits_of(int64_t format) { return format & 15; }
inline bool is_paged(const Entry &entry) { return entry.format > kHalf; }
inline bool is_book(int64_t format) { return format >= kBook; }

// The arguments of steno_attend; `_Problem` of steno/kernels/attention/cpu.py has the same fields.
struct Problem {
    const float *q;  // [num_heads, group, num_queries, head_dim]
    float *out;      // the same shape
    float *lse;      // [num_heads, group, num_queries]
    Entry *entries;
    const int32_t *offsets;  // [num_heads + 1]
    int64_t num_heads;       // KV heads of all rows
    int64_t num_kv_heads;    // of one row
    int64_t group;           // query heads per KV head
    int64_t num_queries;
    int64_t head_dim;
    float scale;
    float softcap;  // 0: none
    int32_t causal;
    int32_t isa;
    int32_t num_threads;
};

// New tokens that steno_attend appends to the tails, the last spans of all heads, before it attends: the fields of
// `_NewTokens` of steno/kernels/attention/cpu.py. Strides count numbers; those of a head lie side by side.
struct NewTokens {
    const uint8_t *keys;  // null: there are none
    const uint8_t *values;
    const int64_t *counts;  // [num_rows], real tokens of each row, its last ones; null: all num_queries
    int64_t key_strides[3];  // row, head, token
    int64_t value_strides[3];
    int64_t number_bytes;
};

// Queries that read the same spans [first_span, end_span): num_queries of each query head of one KV head, from `first`
// on, of one row or, where rows share these spans, of num_rows rows, whose heads are `row_step` apart. The vectors of
// a row follow each other; v of them is query `first + v / group` of query head `v % group`.
struct Unit {
    int64_t head;
    int64_t first;
    int64_t num_queries;
    int64_t num_rows;
    int64_t row_step;
    int32_t first_span;
    int32_t end_span;
    int64_t num_vectors;  // num_rows * num_queries * group
};

// The index of vector v among all queries: [num_heads][group][num_queries].
inline int64_t query_index(const Problem &p, const Unit &unit, int64_t v) {
    const int64_t per_row = unit.num_queries * p.group, row = v / per_row, w = v - row * per_row;
    return ((unit.head + row * unit.row_step) * p.group + w % p.group) * p.num_queries + unit.first + w / p.group;
}

// Softmax over some of the keys of a unit, not yet normalized, with logits in units of log 2.
struct Partial {
    float *max;  // [num_vectors]
    float *sum;  // [num_vectors][kLanes], lanes to be added up
    float *acc;  // [num_vectors][padded_dim]
};

// Working memory of one thread.
struct Scratch {
    float *q;       // [num_vectors][padded_dim], scaled
    float *logits;  // [kMaxBlock][kBatch][kPageTokens]
    float *coef;    // [vectors][rows], where a vector is one of the queries for one group of a tile of a batch
    int8_t *bytes;  // [2][vectors][rows]
    float *tops, *sums;            // [vectors][kLanes]
    float *bias, *step, *inverse;  // [vectors]
    float *keys;    // [padded_dim][kPageTokens]
    float *values;  // [kPageTokens][padded_dim]
};
constexpr int kMaxGroups = 4;  // of keys; of values there may be as many as blocks
constexpr int kMaxBlock = 6;   // query vectors that a kernel takes at a time
constexpr int kBatch = 4;      // pages that share one step of the running softmax
constexpr int kMaxDirect = 4;  // up to here pages are decoded in registers, beyond once into scratch

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t padded_dim(const Problem &p) { return ceil_div(p.head_dim, kLanes) * kLanes; }

// Tokens of the last span that query t must not see.
inline int64_t hidden_from(const Problem &p, int64_t query) { return p.causal ? p.num_queries - 1 - query : 0; }

// Tiles of 64 tokens of a span that queries up to `last` read.
inline int64_t count_tiles(const Problem &p, const Entry &entry, bool is_tail, int64_t last) {
    if (entry.num_page_ids >= 0) return entry.num_page_ids;
    const int64_t tokens = entry.tokens - (is_tail ? hidden_from(p, last) : 0);
    return tokens > 0 ? ceil_div(tokens, kPageTokens) : 0;
}

// The arguments of steno_multiply: out[m][i * out_step + c] += sum over r of x[m][i * x_step + r] * matrix i [r][c], for
// packed matrices of one format and shape, one after the other. `_MatrixProblem` of steno/kernels/quant/cpu.py has the
// same fields. Rows of x have zeros from `rows` on up to a multiple of 16; columns of out are rounded up to one.
struct MatrixProblem {
    const float *x;
    float *out;
    const uint8_t *codes;
    const uint16_t *params;
    const float *levels;
    int64_t format;
    int64_t rows;
    int64_t columns;
    int64_t group;      // columns that share a scale, or rows
    int64_t by_column;  // whether scales differ from column to column, as only those of a codebook can
    int64_t num_matrices;
    int64_t num_vectors;
    int64_t x_step, x_stride;
    int64_t out_step, out_stride;
    int32_t isa;
};
using MatrixKernel = void (*)(const MatrixProblem &, const Scratch &);

// Attention of a unit over its tiles [begin, end), counted through its spans in order.
using Kernel = void (*)(const Problem &, const Unit &, int64_t begin, int64_t end, const Scratch &, const Partial &);
