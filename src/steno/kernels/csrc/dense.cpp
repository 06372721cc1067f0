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

// Floats of one thread; `heads` KV heads are attended at a time.
int64_t scratch_floats(const DenseProblem &p, int64_t heads) {
    const int64_t rows = rows_at_a_time(p), tiles = count_tiles(p), own = rows * (padded_dim(p) + kLanes + 1);
    if (!p.mass) return own + rows * kPageTokens;
    return own + tiles * (rows * (kPageTokens + 1) + heads * p.group * kPageTokens);
}

DenseScratch place_scratch(const DenseProblem &p, float *memory) {
    const int64_t rows = rows_at_a_time(p), tiles = p.mass ? count_tiles(p) : 1;
    float *acc = memory + tiles * rows * kPageTokens, *sum = acc + rows * padded_dim(p), *base = sum + rows * kLanes;
    return {memory, acc, sum, base, base + rows, base + rows + tiles * rows};
}

// Heads [begin, begin + count), packed into `packed`.
void attend_heads(const DenseProblem &p, const Kernels &kernels, int64_t begin, int64_t count, float *packed,
                  float *memory) {
    const int64_t tiles = count_tiles(p), head_floats = tiles * packed_tile(p);
    float *const keys = packed, *const values = packed + count * head_floats;
    const int64_t rows = rows_at_a_time(p), chunks = ceil_div(p.num_queries, rows), units = count * p.group * chunks;
    const int64_t thread_floats = scratch_floats(p, count), mass_row = tiles * kPageTokens;
    const auto attend = [&](int64_t i, const DenseScratch &scratch) {
        // from the last queries to the first, as the last ones see the most keys if causal
        const int64_t query_head = i / chunks, head = query_head / p.group, first = (chunks - 1 - i % chunks) * rows;
        const DenseUnit unit{begin + head, query_head % p.group, first, std::min(rows, p.num_queries - first)};
        kernels.flash(p, unit, keys + head * head_floats, values + head * head_floats, scratch,
                      p.mass ? scratch.mass + query_head * mass_row : nullptr);
    };
#pragma omp parallel num_threads(p.num_threads)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count * tiles; i++)
            kernels.pack(p, begin + i / tiles, i % tiles, keys + i * packed_tile(p), values + i * packed_tile(p));
        DenseScratch scratch{};
#pragma omp for schedule(static, 1)
        for (int i = 0; i < p.num_threads; i++) {
            scratch = place_scratch(p, memory + i * thread_floats);
            if (p.mass) std::fill_n(scratch.mass, count * p.group * mass_row, 0.f);
        }
        if (p.mass) {  // which thread adds up what is fixed, so that the sums are the same at every call
#pragma omp for schedule(static, 1)
            for (int64_t i = 0; i < units; i++) attend(i, scratch);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < count * p.group; i++)
                for (int64_t s = 0; s < p.num_keys; s++) {
                    float sum = 0.f;
                    for (int t = 0; t < p.num_threads; t++)
                        sum += place_scratch(p, memory + t * thread_floats).mass[i * mass_row + s];
                    p.mass[(begin * p.group + i) * p.num_keys + s] = sum;
                }
        } else {
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < units; i++) attend(i, scratch);
        }
    }
}

}  // namespace

#define EXPORT __attribute__((visibility("default")))

extern "C" {

// 0: done, 1: no such instruction set, 3: out of memory. There is at least one query and one key; if causal, there are
// at least as many keys as queries.
EXPORT int32_t steno_flash_attention(const DenseProblem *problem) try {
    const DenseProblem &p = *problem;
    const Kernels *kernels = find_kernels(p.isa);
    if (!kernels) return 1;
    const int64_t head_floats = 2 * count_tiles(p) * packed_tile(p);
    const int64_t count = std::clamp<int64_t>(kPackedFloats / head_floats, 1, p.num_heads);
    const Buffer packed = allocate(count * head_floats), memory = allocate(p.num_threads * scratch_floats(p, count));
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
