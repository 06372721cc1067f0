// The entry point of the page encoder: splits the pages over threads.
#include "dense.h"

#include <algorithm>
#include <cstdlib>
#include <memory>

namespace {

constexpr int64_t kMinPagesPerThread = 4;  // below, starting a thread costs more than it saves

struct Free {
    void operator()(float *p) const { std::free(p); }
};

}  // namespace

// 0: done, 1: no such instruction set, 3: out of memory.
extern "C" __attribute__((visibility("default"))) int32_t steno_encode_pages(const EncodeProblem *problem) {
    const EncodeProblem &p = *problem;
    const Kernels *kernels = find_kernels(p.isa);
    if (!kernels) return 1;
    const int64_t threads = std::clamp<int64_t>(p.num_pages / kMinPagesPerThread, 1, p.num_threads);
    const int64_t floats = encode_scratch(p);
    const std::unique_ptr<float, Free> memory(
        static_cast<float *>(std::aligned_alloc(64, threads * floats * sizeof(float))));
    if (!memory) return 3;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int64_t i = 0; i < threads; i++)
        for (int64_t page = p.num_pages * i / threads; page < p.num_pages * (i + 1) / threads; page++)
            kernels->encode(p, page, memory.get() + i * floats);
    return 0;
}
