// Attention of many queries over dense keys: what the entry points, the kernels and the Python side agree on.
#pragma once

#include "attend.h"

// The arguments of steno_flash_attention and steno_max_attention; `_DenseProblem` of steno/kernels/attention/dense.py
// has the same fields.
struct DenseProblem {
    const float *q;         // [num_heads, group, num_queries, head_dim]
    const uint8_t *keys;    // [num_heads, num_keys, head_dim]
    const uint8_t *values;  // the same shape; unused for maxima
    float *out;             // the shape of q; for maxima [num_heads, num_keys]
    float *lse;             // [num_heads, group, num_queries]; read for maxima
    int64_t format;         // of keys and values, an unpaged Format
    int64_t num_heads;      // KV heads of all rows
    int64_t group;          // query heads per KV head
    int64_t num_queries;
    int64_t num_keys;
    int64_t head_dim;
    float scale;
    int32_t causal;  // num_keys is num_queries then
    int32_t isa;
    int32_t num_threads;
};

constexpr int kDenseRows = 96;  // queries that share a pass over the keys; a multiple of every kernel's kBlockRows

// Queries [first, first + num_rows) of one query head. head: as in Unit.
struct DenseUnit {
    int64_t head;
    int64_t query_head;
    int64_t first;
    int64_t num_rows;
};

// Working memory of one thread.
struct DenseScratch {
    float *weights;  // [kDenseRows][kPageTokens]
    float *acc;      // [kDenseRows][padded_dim]
    float *sum;      // [kDenseRows][kLanes], lanes to be added up
    float *base;     // [kDenseRows]
};

inline int64_t padded_dim(const DenseProblem &p) { return ceil_div(p.head_dim, kLanes) * kLanes; }
inline int64_t count_tiles(const DenseProblem &p) { return ceil_div(p.num_keys, kPageTokens); }
inline int64_t packed_tile(const DenseProblem &p) { return padded_dim(p) * kPageTokens; }  // floats of 64 packed keys

// Brings 64 keys and values into the form that the products read, fp32, padded, the keys scaled and transposed.
using PackKernel = void (*)(const DenseProblem &, int64_t head, int64_t tile, float *keys, float *values);
// Attention of a unit over the packed keys and values of its KV head.
using FlashKernel = void (*)(const DenseProblem &, const DenseUnit &, const float *keys, const float *values,
                             const DenseScratch &);
// The largest logit less log-sum-exp that each of 64 keys gets; keys: room for one packed tile.
using MaxKernel = void (*)(const DenseProblem &, int64_t head, int64_t tile, float *keys);

// What is compiled once per instruction set; nulls where it was not compiled.
struct Kernels {
    Kernel attend;
    PackKernel pack;
    FlashKernel flash;
    MaxKernel max;
};

extern const Kernels kPortableKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kVnniKernels;

// Null where the machine or the build lacks the instruction set.
const Kernels *find_kernels(int32_t isa);
