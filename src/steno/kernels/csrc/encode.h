// Quantized pages out of dense keys and values: what the entry point, the kernels and the Python side agree on.
#pragma once

#include "attend.h"

// The arguments of steno_encode_pages; `_EncodeProblem` of steno/kernels/quant/cpu.py has the same fields. Pairs are
// keys, values. Page i is 64 tokens of head_dim numbers, `token_strides` apart, from number offsets[i] on.
struct EncodeProblem {
    const uint8_t *inputs[2];
    const int64_t *offsets[2];  // [num_pages]
    uint8_t *codes[2];          // [num_pages, bytes]
    uint16_t *params[2];        // [num_pages, 2, groups, rows] fp16, scales then minima
    int64_t token_strides[2];
    int64_t groups[2];          // columns that share a scale: tokens of a key channel, channels of a value
    int64_t format;             // of keys and values, an unpaged Format
    int64_t num_pages;
    int64_t head_dim;
    int64_t bits;               // 8, 4 or 2
    int32_t isa;
    int32_t num_threads;
};

constexpr int kLineBytes = 64;

// How one page stores a matrix of codes [rows][columns].
struct CodeMatrix {
    int64_t rows, columns;
    int64_t group;  // columns that share a scale, a multiple of kLanes or all; the last group may be shorter
    int64_t bits;
    int64_t num_groups() const { return ceil_div(columns, group); }
    int64_t num_params() const { return 2 * num_groups() * rows; }
    int64_t padded_rows() const { return ceil_div(rows, 32 / bits) * (32 / bits); }
    int64_t num_bytes() const { return padded_rows() * ceil_div(columns, kLanes) * kLanes * bits / 8; }
};

inline CodeMatrix code_matrix(const EncodeProblem &p, bool is_value) {
    if (is_value) return {kPageTokens, p.head_dim, p.groups[1], p.bits};
    return {p.head_dim, kPageTokens, p.groups[0], p.bits};
}

// Floats of working memory that the encoder of one page needs: its tokens, and the values transposed.
inline int64_t encode_scratch(const EncodeProblem &p) {
    return 2 * kPageTokens * ceil_div(p.head_dim, kLanes) * kLanes;
}

// Encodes one page.
using EncodeKernel = void (*)(const EncodeProblem &, int64_t page, float *scratch);
