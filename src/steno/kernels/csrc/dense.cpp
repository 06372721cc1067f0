// The entry points for many queries over dense keys: packs the keys, splits the queries or the keys over threads.
#include "dense.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

namespace {

constexpr int64_t kPackedFloats = 1 << 23;  // 32 MiB of packed keys and values at a time, or one head

struct Free {
    void operator()(float *p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float, Free>;

Buffer allocate(int64_t floats) {
    Buffer buffer(static_cast<float *>(std::aligned_alloc(64, ceil_div(floats, kLanes) * kLanes * sizeof(float))));
    if (!buffer) throw std::bad_alloc();
    return buffer;
}

int64_t scratch_floats(const DenseProblem &p) { return kDenseRows * (kPageTokens + padded_dim(p) + kLanes + 1); }

DenseScratch place_scratch(const DenseProblem &p, float *memory) {
    float *acc = memory + kDenseRows * kPageTokens, *sum = acc + kDenseRows * padded_dim(p);
    return {memory, acc, sum, sum + kDenseRows * kLanes};
}

// Heads [begin, begin + count), packed into `packed`.
void attend_heads(const DenseProblem &p, const Kernels &kernels, int64_t begin, int64_t count, float *packed,
                  float *memory) {
    const int64_t tiles = count_tiles(p), head_floats = tiles * packed_tile(p);
    float *const keys = packed, *const values = packed + count * head_floats;
    const int64_t chunks = ceil_div(p.num_queries, kDenseRows), units = count * p.group * chunks;
#pragma omp parallel num_threads(p.num_threads)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count * tiles; i++)
            kernels.pack(p, begin + i / tiles, i % tiles, keys + i * packed_tile(p), values + i * packed_tile(p));
        DenseScratch scratch{};
#pragma omp for schedule(static, 1)
        for (int i = 0; i < p.num_threads; i++) scratch = place_scratch(p, memory + i * scratch_floats(p));
        // from the last queries to the first, as the last ones see the most keys if causal
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < units; i++) {
            const int64_t head = i / chunks / p.group, first = (chunks - 1 - i % chunks) * kDenseRows;
            const DenseUnit unit{begin + head, i / chunks % p.group, first,
                                 std::min<int64_t>(kDenseRows, p.num_queries - first)};
            kernels.flash(p, unit, keys + head * head_floats, values + head * head_floats, scratch);
        }
    }
}

}  // namespace

#define EXPORT __attribute__((visibility("default")))

extern "C" {

// 0: done, 1: no such instruction set, 3: out of memory. There is at least one query and one key.
EXPORT int32_t steno_flash_attention(const DenseProblem *problem) try {
    const DenseProblem &p = *problem;
    const Kernels *kernels = find_kernels(p.isa);
    if (!kernels) return 1;
    const int64_t head_floats = 2 * count_tiles(p) * packed_tile(p);
    const int64_t count = std::clamp<int64_t>(kPackedFloats / head_floats, 1, p.num_heads);
    const Buffer packed = allocate(count * head_floats), memory = allocate(p.num_threads * scratch_floats(p));
    for (int64_t begin = 0; begin < p.num_heads; begin += count)
        attend_heads(p, *kernels, begin, std::min(count, p.num_heads - begin), packed.get(), memory.get());
    return 0;
} catch (const std::bad_alloc &) {
    return 3;
}

// The same, without an exponential: out holds the largest logit less log-sum-exp.
EXPORT int32_t steno_max_attention(const DenseProblem *problem) try {
    const DenseProblem &p = *problem;
    const Kernels *kernels = find_kernels(p.isa);
    if (!kernels) return 1;
    const int64_t tiles = count_tiles(p), threads = std::min<int64_t>(p.num_threads, p.num_heads * tiles);
    const Buffer memory = allocate(threads * packed_tile(p));
#pragma omp parallel num_threads(threads)
    {
        float *keys = nullptr;
#pragma omp for schedule(static, 1)
        for (int64_t i = 0; i < threads; i++) keys = memory.get() + i * packed_tile(p);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < p.num_heads * tiles; i++) kernels->max(p, i / tiles, i % tiles, keys);
    }
    return 0;
} catch (const std::bad_alloc &) {
    return 3;
}
}
