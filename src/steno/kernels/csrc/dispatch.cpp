// The entry points: picks the kernel, splits the work over threads, merges what they found.
//
// All tiles of 64 tokens of all rows and heads form one line; each thread takes one contiguous range of it
// ("stream-K"), so one long row occupies every core, and ragged heads leave none idle.
// Source: Sanovar et al., Lean Attention, 2024, https://arxiv.org/abs/2405.10480, section IV.
// Differs: partial results are merged after a barrier instead of under a lock per output.
#include "dense.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <new>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

constexpr int64_t kChunkVectors = 256;     // query vectors that share one pass over the keys
constexpr int64_t kMinTilesPerThread = 8;  // below, starting a thread costs more than it saves
constexpr int64_t kMinParallelMerge = 1 << 18;  // numbers to merge
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2 = 0.69314718055994531f;

int threads_for(const Problem &p, int64_t work) {
#ifdef _OPENMP
    return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(p.num_threads, work / kMinTilesPerThread)));
#else
    (void)p, (void)work;
    return 1;
#endif
}

struct Split {
    const Problem &p;
    int64_t chunk;              // queries of a unit
    int64_t chunks;             // units of a head
    std::vector<int64_t> first; // [units + 1], first tile of each unit

    explicit Split(const Problem &problem) : p(problem) {
        chunk = std::max<int64_t>(1, kChunkVectors / p.group);
        chunks = ceil_div(p.num_queries, chunk);
        first.assign(p.num_heads * chunks + 1, 0);
        for (int64_t u = 0; u < p.num_heads * chunks; u++) first[u + 1] = first[u] + tiles(u);
    }

    int64_t queries(int64_t u) const { return std::min(chunk, p.num_queries - u % chunks * chunk); }
    int64_t max_vectors() const { return std::min(chunk, p.num_queries) * p.group; }
    Unit unit(int64_t u) const { return {u / chunks, u % chunks * chunk, queries(u) * p.group}; }

    int64_t tiles(int64_t u) const {
        const int64_t head = u / chunks, last = u % chunks * chunk + queries(u) - 1;
        int64_t count = 0;
        for (int32_t e = p.offsets[head]; e < p.offsets[head + 1]; e++)
            count += count_tiles(p, p.entries[e], e + 1 == p.offsets[head + 1], last);
        return count;
    }
};

void clear(const Partial &x, const Problem &p, int64_t vectors) {
    std::fill_n(x.max, vectors, -kInfinity);
    std::fill_n(x.sum, vectors * kLanes, 0.f);
    std::fill_n(x.acc, vectors * padded_dim(p), 0.f);
}

// Adds `other` to `into`; exact up to rounding, in any order.
void merge(const Partial &into, const Partial &other, const Problem &p, int64_t vectors) {
    const int64_t dim = padded_dim(p);
    for (int64_t v = 0; v < vectors; v++) {
        const float top = std::max(into.max[v], other.max[v]);
        const float base = top == -kInfinity ? 0.f : top;
        const float a = std::exp2(into.max[v] - base), b = std::exp2(other.max[v] - base);
        for (int i = 0; i < kLanes; i++)
            into.sum[v * kLanes + i] = into.sum[v * kLanes + i] * a + other.sum[v * kLanes + i] * b;
        for (int64_t i = 0; i < dim; i++)
            into.acc[v * dim + i] = into.acc[v * dim + i] * a + other.acc[v * dim + i] * b;
        into.max[v] = top;
    }
}

void finish(const Partial &x, const Problem &p, const Unit &unit) {
    const int64_t dim = padded_dim(p);
    for (int64_t v = 0; v < unit.num_vectors; v++) {
        const int64_t row = (unit.head * p.group + v % p.group) * p.num_queries + unit.first + v / p.group;
        float sum = 0.f;
        for (int i = 0; i < kLanes; i++) sum += x.sum[v * kLanes + i];
        const float inverse = sum == 0.f ? 0.f : 1.f / sum;
        for (int64_t i = 0; i < p.head_dim; i++) p.out[row * p.head_dim + i] = x.acc[v * dim + i] * inverse;
        p.lse[row] = (x.max[v] + std::log2(sum)) * kLog2;
    }
}

// Hands out pieces of a buffer in whole cache lines; without a buffer it only counts.
struct Arena {
    float *buffer;
    int64_t used = 0;
    float *take(int64_t count) {
        float *piece = buffer ? buffer + used : nullptr;
        used += ceil_div(count, kLanes) * kLanes;
        return piece;
    }
};

// What one thread works with. kept[0]: the partial result of a unit that an earlier thread began, kept[1]: of one that
// a later thread goes on with; whole: of a unit that is all its own.
struct Worker {
    Scratch scratch;
    Partial kept[2], whole;
    int64_t kept_unit[2] = {-1, -1};

    Worker(Arena &arena, const Problem &p, int64_t vectors) {
        const int64_t dim = padded_dim(p);
        for (Partial *x : {&kept[0], &kept[1], &whole})
            *x = {arena.take(vectors), arena.take(vectors * kLanes), arena.take(vectors * dim)};
        scratch.q = arena.take(vectors * dim);
        scratch.logits = arena.take(kMaxBlock * kBatch * kPageTokens);
        const int64_t groups = std::max<int64_t>(kMaxGroups, dim / kLanes);
        const int64_t coefficients = std::max(kMaxGroups * ceil_div(dim, 64) * 64, dim / kLanes * kPageTokens);
        const int64_t folded = ceil_div(kBatch * kMaxBlock * groups, kLanes) * kLanes;
        // rows of coefficients are whole cache lines of bytes, so up to 64 of them; values have 64 rows
        scratch.coef = arena.take(kBatch * kMaxBlock * coefficients);
        scratch.bytes = reinterpret_cast<int8_t *>(arena.take(kBatch * kMaxBlock * coefficients / 2));
        scratch.tops = arena.take(folded * kLanes);
        scratch.sums = arena.take(folded * kLanes);
        scratch.bias = arena.take(folded);
        scratch.step = arena.take(folded);
        scratch.inverse = arena.take(folded);
        scratch.keys = arena.take(dim * kPageTokens);
        scratch.values = arena.take(kPageTokens * dim);
    }
};

// Attends the tiles [begin, end) of the line.
void work(const Split &split, Kernel kernel, Worker &worker, int64_t begin, int64_t end) {
    const Problem &p = split.p;
    int64_t u = std::upper_bound(split.first.begin(), split.first.end(), begin) - split.first.begin() - 1;
    for (; begin < end; u++) {
        const int64_t start = split.first[u], stop = std::min(end, split.first[u + 1]);
        if (start == split.first[u + 1]) continue;
        const Unit unit = split.unit(u);
        const bool is_whole = begin == start && stop == split.first[u + 1];
        const int slot = begin == start;
        const Partial &partial = is_whole ? worker.whole : worker.kept[slot];
        clear(partial, p, unit.num_vectors);
        kernel(p, unit, begin - start, stop - start, worker.scratch, partial);
        if (is_whole) finish(partial, p, unit);
        else worker.kept_unit[slot] = u;
        begin = stop;
    }
}

// The thread that began a unit collects what the later ones found of it.
void collect(const Split &split, std::vector<Worker> &workers, size_t i) {
    const int64_t u = workers[i].kept_unit[1];
    if (u < 0) return;
    const Unit unit = split.unit(u);
    for (size_t j = i + 1; j < workers.size() && workers[j].kept_unit[0] == u; j++)
        merge(workers[i].kept[1], workers[j].kept[0], split.p, unit.num_vectors);
    finish(workers[i].kept[1], split.p, unit);
}

void answer_empty(const Split &split, Worker &worker) {
    for (size_t u = 0; u + 1 < split.first.size(); u++) {
        if (split.first[u] != split.first[u + 1]) continue;
        const Unit unit = split.unit(u);
        clear(worker.whole, split.p, unit.num_vectors);
        finish(worker.whole, split.p, unit);
    }
}

bool page_ids_fit(const Problem &p) {
    for (int32_t e = 0; e < p.offsets[p.num_heads]; e++) {
        const int64_t pages = ceil_div(p.entries[e].tokens, kPageTokens);
        for (int64_t i = 0; i < p.entries[e].num_page_ids; i++)
            if (p.entries[e].page_ids[i] < 0 || p.entries[e].page_ids[i] >= pages) return false;
    }
    return true;
}

}  // namespace

const Kernels *find_kernels(int32_t isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (isa == 1) return avx2 && kAvx2Kernels.attend ? &kAvx2Kernels : nullptr;
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    if (isa == 2) return avx512 && kAvx512Kernels.attend ? &kAvx512Kernels : nullptr;
    if (isa == 3) return vnni && kVnniKernels.attend ? &kVnniKernels : nullptr;
#endif
    return isa == 0 ? &kPortableKernels : nullptr;
}

#define EXPORT __attribute__((visibility("default")))

extern "C" {

EXPORT int32_t steno_abi_version() { return kAbiVersion; }

EXPORT int32_t steno_has_isa(int32_t isa) { return find_kernels(isa) != nullptr; }

// 0: done, 1: no such instruction set, 2: a page id lies outside its span, 3: out of memory.
EXPORT int32_t steno_attend(const Problem *problem) try {
    const Problem &p = *problem;
    const Kernels *kernels = find_kernels(p.isa);
    if (!kernels) return 1;
    if (!page_ids_fit(p)) return 2;
    const Split split(p);
    const int64_t total = split.first.back(), vectors = split.max_vectors();
    const int threads = threads_for(p, total * ceil_div(vectors, kMaxDirect));
    Arena sizes{nullptr};
    Worker(sizes, p, vectors);
    float *memory = static_cast<float *>(std::aligned_alloc(64, sizeof(float) * sizes.used * threads));
    if (!memory) return 3;
    std::vector<Worker> workers;
    for (int i = 0; i < threads; i++) {
        Arena arena{memory + sizes.used * i};
        workers.emplace_back(arena, p, vectors);
    }
    answer_empty(split, workers[0]);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int i = 0; i < threads; i++)
        work(split, kernels->attend, workers[i], total * i / threads, total * (i + 1) / threads);
    // a second meeting of the threads costs more than it saves unless there is much to merge
#pragma omp parallel for num_threads(threads) schedule(static, 1) \
    if (threads * vectors * padded_dim(p) > kMinParallelMerge)
    for (int i = 0; i < threads; i++) collect(split, workers, i);
    std::free(memory);
    return 0;
} catch (const std::bad_alloc &) {
    return 3;
}
}
