// The kernels for AVX-512 (F, BW, DQ, VL).
#include "dense.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

namespace {

#include "avx512.inl"
#include "math.inl"
#include "operands.inl"
#include "levels.inl"
#include "level_products.inl"
#include "codes.inl"
#include "products.inl"
#include "bfloats.inl"
#include "attend.inl"
#include "dense.inl"
#include "encode.inl"

}  // namespace

const Kernels kAvx512Kernels = {attend, pack, flash, max_attention, encode, multiply_matrices};

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
const Kernels kAvx512Kernels{};
#endif
