// Attention of many queries over dense keys: what the entry points, the kernels and the Python side agree on.
#pragma once

#include "attend.h"
#include "encode.h"

// The arguments of steno_flash_attention and steno_max_attention; `_DenseProblem` of steno/kernels/attention/dense.py
// has the same fields.
struct DenseProblem {
    const float *q;         // [num_heads, group, num_queries, head_dim]
    const uint8_t *keys;    // [num_heads, num_keys, head_dim]
    const uint8_t *values;  // the same shape; unused for maxima
    float *out;             // the shape of q; for maxima [num_heads, num_keys]
    float *lse;             // [num_heads, group, num_queries]; read for maxima
    float *mass;            // [num_heads, group, num_keys], the attention that each key gets from all queries, or null
    int64_t q_strides[3];   // numbers from one row, query head, query of q to the next; maxima need q contiguous
    int64_t out_strides[3]; // the same of out
    int64_t format;         // of keys and values, an unpaged Format
    int64_t num_heads;      // KV heads of all rows
    int64_t kv_heads;       // KV heads of one row
    int64_t group;          // query heads per KV head
    int64_t num_queries;
    int64_t num_keys;
    int64_t head_dim;
    float scale;
    int32_t causal;  // query t sees the keys up to num_keys - num_queries + t
    int32_t isa;
    int32_t num_threads;
};

constexpr int kDenseRows = 96;  // queries that share a pass over the keys; a multiple of every kernel's kBlockRows
constexpr int kMassRows = 48;   // the same where their weights are kept until the sums are known

// Queries [first, first + num_rows) of one query head. head: as in Unit.
struct DenseUnit {
    int64_t head;
    int64_t query_head;
    int64_t first;
    int64_t num_rows;
};

// Working memory of one thread.
struct DenseScratch {
    float *weights;  // [kDenseRows][kPageTokens]; for the mass [tiles][kMassRows][kPageTokens]
    float *acc;      // [kDenseRows][padded_dim]
    float *sum;      // [kDenseRows][kLanes], lanes to be added up
    float *base;     // [kDenseRows]
    float *bases;    // for the mass [tiles][kMassRows], what the weights of a tile are relative to
    float *mass;     // for the mass [heads at a time][group][tiles][kPageTokens]
};

inline int64_t padded_dim(const DenseProblem &p) { return ceil_div(p.head_dim, kLanes) * kLanes; }
inline int64_t count_tiles(const DenseProblem &p) { return ceil_div(p.num_keys, kPageTokens); }
inline int64_t packed_tile(const DenseProblem &p) { return padded_dim(p) * kPageTokens; }  // floats of 64 packed keys
inline int64_t rows_at_a_time(const DenseProblem &p) { return p.mass ? kMassRows : kDenseRows; }

// Where query `query` of a query head lies in a tensor with these strides.
inline int64_t query_offset(const DenseProblem &p, const int64_t *strides, const DenseUnit &unit, int64_t query) {
    const int64_t query_head = unit.head % p.kv_heads * p.group + unit.query_head;
    return unit.head / p.kv_heads * strides[0] + query_head * strides[1] + query * strides[2];
}

// Brings 64 keys and values into the form that the products read, fp32, padded, the keys scaled and transposed.
using PackKernel = void (*)(const DenseProblem &, int64_t head, int64_t tile, float *keys, float *values);
// Attention of a unit over the packed keys and values of its KV head; mass: of its query head, to be added to, or null.
using FlashKernel = void (*)(const DenseProblem &, const DenseUnit &, const float *keys, const float *values,
                             const DenseScratch &, float *mass);
// The largest logit less log-sum-exp that each of 64 keys gets; keys: room for one packed tile.
using MaxKernel = void (*)(const DenseProblem &, int64_t head, int64_t tile, float *keys);

// What is compiled once per instruction set; nulls where it was not compiled.
struct Kernels {
    Kernel attend;
    PackKernel pack;
    FlashKernel flash;
    MaxKernel max;
    EncodeKernel encode;
    MatrixKernel multiply;
};

extern const Kernels kPortableKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kVnniKernels;
extern const Kernels kBf16Kernels;

// -1: the best that is there. Null where the machine or the build lacks the instruction set.
const Kernels *find_kernels(int32_t isa);
