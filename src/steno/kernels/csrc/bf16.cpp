// The kernels for AVX-512 with VNNI and BF16: dot products of bytes on the codes, of pairs on bfloat16 numbers.
#include "dense.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512vnni,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512vnni,avx512bf16")
#endif

namespace {

#include "avx512.inl"
#include "math.inl"
#include "operands.inl"
#include "no_levels.inl"
constexpr float kLargestCoefficient = 127.f * 128.f;  // see fold.inl
#include "fold.inl"
#include "dots.inl"
#include "products.inl"
#include "bfloat_dots.inl"
#include "attend.inl"
#include "dense.inl"
#include "encode.inl"

}  // namespace

const Kernels kBf16Kernels = {attend, pack, flash, max_attention, encode, multiply_matrices};

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
const Kernels kBf16Kernels{};
#endif
