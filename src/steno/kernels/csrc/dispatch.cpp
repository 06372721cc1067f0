// The entry points: picks the kernel, splits the work over threads, merges what they found.
//
// All tiles of 64 tokens of all rows and heads form one line; each thread takes one contiguous range of it
// ("stream-K"), so one long row occupies every core, and ragged heads leave none idle.
// Source: Sanovar et al., Lean Attention, 2024, https://arxiv.org/abs/2405.10480, section IV.
// Differs: partial results are merged after a barrier instead of under a lock per output, and spans that several rows
// share are read once, by a unit of work of its own whose results are merged into those of the rows.
#include "dense.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

constexpr int64_t kChunkVectors = 256;     // query vectors that share one pass over the keys
constexpr int64_t kTileCost = 3;           // of reading a tile, in vectors that are multiplied with it
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

bool is_same(const Entry &a, const Entry &b) { return std::memcmp(&a, &b, sizeof(Entry)) == 0; }

// The spans of all heads, cut into units of work.
struct Split {
    const Problem &p;
    std::vector<Unit> units;
    std::vector<int64_t> tiles;   // of each unit
    std::vector<int64_t> first;   // [units + 1], where each unit begins on a line on which a tile is as long as it takes
    size_t num_shared = 0;        // the units in front read what rows share
    int64_t shared_vectors = 0;   // of those
    int64_t max_vectors = 1;

    explicit Split(const Problem &problem) : p(problem), first(1, 0) {
        std::vector<int32_t> own(p.offsets, p.offsets + p.num_heads);  // where the spans of one row alone begin
        const int64_t chunk = std::max<int64_t>(1, kChunkVectors / p.group), rows = p.num_heads / p.num_kv_heads;
        for (int64_t h = 0; h < p.num_kv_heads; h++)
            for (int64_t b = 0, end; b < rows; b = end) {
                int32_t common = 0;
                end = sharing_rows(h, b, rows, common);
                if (!common) continue;
                for (int64_t i = b; i < end; i++) own[i * p.num_kv_heads + h] += common;
                const int64_t most = std::max<int64_t>(1, kChunkVectors / (std::min(chunk, p.num_queries) * p.group));
                for (int64_t i = b; i < end; i += most)
                    add(i * p.num_kv_heads + h, std::min(most, end - i), chunk, p.offsets[i * p.num_kv_heads + h],
                        own[i * p.num_kv_heads + h]);
            }
        num_shared = units.size();
        for (const Unit &unit : units) shared_vectors += unit.num_vectors;
        for (int64_t head = 0; head < p.num_heads; head++) add(head, 1, chunk, own[head], p.offsets[head + 1]);
    }

    // The rows from b on up to the one returned have their first `common` spans of head h in common, but for the last.
    int64_t sharing_rows(int64_t h, int64_t b, int64_t rows, int32_t &common) const {
        int64_t end = b + 1;
        for (; end < rows; end++) {
            const int32_t mine = p.offsets[b * p.num_kv_heads + h], next = p.offsets[end * p.num_kv_heads + h];
            const int32_t most = end > b + 1 ? common : p.offsets[b * p.num_kv_heads + h + 1] - mine - 1;
            const int32_t limit = std::min(most, p.offsets[end * p.num_kv_heads + h + 1] - next - 1);
            int32_t same = 0;
            while (same < limit && is_same(p.entries[mine + same], p.entries[next + same])) same++;
            if (same <= 0) break;
            common = same;
        }
        return end;
    }

    void add(int64_t head, int64_t rows, int64_t chunk, int32_t first_span, int32_t end_span) {
        for (int64_t q = 0; q < p.num_queries; q += chunk) {
            const int64_t queries = std::min(chunk, p.num_queries - q), vectors = rows * queries * p.group;
            units.push_back({head, q, queries, rows, p.num_kv_heads, first_span, end_span, vectors});
            int64_t count = 0;
            for (int32_t e = first_span; e < end_span; e++)
                count += count_tiles(p, p.entries[e], e + 1 == p.offsets[head + 1], q + queries - 1);
            tiles.push_back(count);
            first.push_back(first.back() + count * weight(units.size() - 1));
            max_vectors = std::max(max_vectors, vectors);
        }
    }

    int64_t weight(size_t u) const { return kTileCost + units[u].num_vectors; }
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

// Where the results of a unit go: into those of the problem, or, of a shared unit, into a place of their own.
struct Results {
    float *out;  // [vectors][head_dim]
    float *lse;
    bool is_shared;
    int64_t index(const Problem &p, const Unit &unit, int64_t v) const {
        return is_shared ? v : query_index(p, unit, v);
    }
};

void finish(const Partial &x, const Problem &p, const Unit &unit, const Results &results) {
    const int64_t dim = padded_dim(p);
    for (int64_t v = 0; v < unit.num_vectors; v++) {
        const int64_t row = results.index(p, unit, v);
        float sum = 0.f;
        for (int i = 0; i < kLanes; i++) sum += x.sum[v * kLanes + i];
        const float inverse = sum == 0.f ? 0.f : 1.f / sum;
        for (int64_t i = 0; i < p.head_dim; i++) results.out[row * p.head_dim + i] = x.acc[v * dim + i] * inverse;
        results.lse[row] = (x.max[v] + std::log2(sum)) * kLog2;
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

struct Job {
    const Split &split;
    Kernel kernel;
    std::vector<Worker> workers;
    std::vector<float> shared;  // out and log-sum-exp of the shared units, one after the other

    Results results(size_t u) {
        const Problem &p = split.p;
        if (u >= split.num_shared) return {p.out, p.lse, false};
        int64_t at = 0;
        for (size_t i = 0; i < u; i++) at += split.units[i].num_vectors;
        return {shared.data() + at * p.head_dim, shared.data() + split.shared_vectors * p.head_dim + at, true};
    }

    // Attends what lies between begin and end on the line.
    void work(Worker &worker, int64_t begin, int64_t end) {
        const Problem &p = split.p;
        size_t u = std::upper_bound(split.first.begin(), split.first.end(), begin) - split.first.begin() - 1;
        for (; u < split.units.size() && split.first[u] < end; u++) {
            const int64_t start = split.first[u], weight = split.weight(u);
            const int64_t from = ceil_div(std::max(begin, start) - start, weight);
            const int64_t to = std::min(split.tiles[u], ceil_div(end - start, weight));
            if (from >= to) continue;
            const Unit &unit = split.units[u];
            const bool is_whole = from == 0 && to == split.tiles[u];
            const int slot = from == 0;
            const Partial &partial = is_whole ? worker.whole : worker.kept[slot];
            clear(partial, p, unit.num_vectors);
            kernel(p, unit, from, to, worker.scratch, partial);
            if (is_whole) finish(partial, p, unit, results(u));
            else worker.kept_unit[slot] = static_cast<int64_t>(u);
        }
    }

    // The thread that began a unit collects what the later ones found of it.
    void collect(size_t i) {
        const int64_t u = workers[i].kept_unit[1];
        if (u < 0) return;
        const Unit &unit = split.units[u];
        for (size_t j = i + 1; j < workers.size(); j++)
            if (workers[j].kept_unit[0] == u) merge(workers[i].kept[1], workers[j].kept[0], split.p, unit.num_vectors);
        finish(workers[i].kept[1], split.p, unit, results(u));
    }

    void answer_empty() {
        for (size_t u = 0; u < split.units.size(); u++) {
            if (split.tiles[u]) continue;
            clear(workers[0].whole, split.p, split.units[u].num_vectors);
            finish(workers[0].whole, split.p, split.units[u], results(u));
        }
    }

    // Merges what was found of shared spans into what was found of the spans of one row alone.
    void merge_shared() {
        const Problem &p = split.p;
        for (size_t u = 0; u < split.num_shared; u++) {
            const Results found = results(u);
            for (int64_t v = 0; v < split.units[u].num_vectors; v++) {
                const int64_t row = query_index(p, split.units[u], v);
                const float *part = found.out + v * p.head_dim;
                float *out = p.out + row * p.head_dim, *lse = p.lse + row;
                const float top = std::max(*lse, found.lse[v]);
                if (top == -kInfinity) continue;
                const float a = std::exp(*lse - top), b = std::exp(found.lse[v] - top), inverse = 1.f / (a + b);
                for (int64_t i = 0; i < p.head_dim; i++) out[i] = (out[i] * a + part[i] * b) * inverse;
                *lse = top + std::log(a + b);
            }
        }
    }
};

// Copies new tokens behind the tails.
void append(const Problem &p, const NewTokens &tokens) {
    const int64_t rows = p.num_heads / p.num_kv_heads, width = tokens.number_bytes, bytes = p.head_dim * width;
    for (int64_t b = 0; b < rows; b++) {
        const int64_t count = tokens.counts ? tokens.counts[b] : p.num_queries;
        for (int64_t h = 0; h < p.num_kv_heads; h++) {
            Entry &tail = p.entries[p.offsets[b * p.num_kv_heads + h + 1] - 1];
            for (int64_t t = 0; t < count; t++) {
                const int64_t at[3] = {b, h, p.num_queries - count + t};
                int64_t key = 0, value = 0;
                for (int i = 0; i < 3; i++)
                    key += at[i] * tokens.key_strides[i], value += at[i] * tokens.value_strides[i];
                const int64_t to = (tail.tokens + t) * bytes;
                std::memcpy(const_cast<uint8_t *>(tail.keys) + to, tokens.keys + key * width, bytes);
                std::memcpy(const_cast<uint8_t *>(tail.values) + to, tokens.values + value * width, bytes);
            }
            tail.tokens += count;
        }
    }
}

// Memory that the calling thread keeps from call to call: fresh memory would cost a page fault every 4 kB, in every layer
// of every step. Never more than the largest call needed.
float *scratch_memory(int64_t count) {
    struct Free {
        void operator()(float *p) const { std::free(p); }
    };
    thread_local std::unique_ptr<float, Free> memory;
    thread_local int64_t size = 0;
    if (size < count) {
        memory.reset();
        size = 0;
        memory.reset(static_cast<float *>(std::aligned_alloc(64, sizeof(float) * count)));
        if (!memory) throw std::bad_alloc();
        size = count;
    }
    return memory.get();
}

bool has_books(const Problem &p) {
    return std::any_of(p.entries, p.entries + p.offsets[p.num_heads], [](const Entry &e) { return is_book(e.format); });
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
    if (isa == -1) {
        static const Kernels *const best = [] {
            const Kernels *found = nullptr;
            for (int32_t i = 4; !found; i--) found = find_kernels(i);
            return found;
        }();
        return best;
    }
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    if (isa == 1) return avx2 && kAvx2Kernels.attend ? &kAvx2Kernels : nullptr;
    if (isa == 2) return avx512 && kAvx512Kernels.attend ? &kAvx512Kernels : nullptr;
    if (isa == 3) return vnni && kVnniKernels.attend ? &kVnniKernels : nullptr;
    if (isa == 4)
        return vnni && __builtin_cpu_supports("avx512bf16") && kBf16Kernels.attend ? &kBf16Kernels : nullptr;
#endif
    return isa == 0 ? &kPortableKernels : nullptr;
}

namespace {

// Codebooks are compiled for portable, AVX2 and AVX-512 only, so a problem with one takes AVX-512 instead of VNNI or BF16.
const Kernels *kernels_for(int32_t isa, bool has_books) {
    const Kernels *found = find_kernels(isa);
    return has_books && (found == &kVnniKernels || found == &kBf16Kernels) ? &kAvx512Kernels : found;
}

}  // namespace

#define EXPORT __attribute__((visibility("default")))

extern "C" {

EXPORT int32_t steno_abi_version() { return kAbiVersion; }

EXPORT int32_t steno_has_isa(int32_t isa) { return find_kernels(isa) != nullptr; }

// 0: done, 1: no such instruction set, 3: out of memory.
EXPORT int32_t steno_multiply(const MatrixProblem *problem) try {
    const Kernels *kernels = kernels_for(problem->isa, is_book(problem->format));
    if (!kernels) return 1;
    Problem sizes{};  // of a page with as many channels, and as many numbers
    const int64_t numbers = problem->rows * ceil_div(problem->columns, kLanes) * kLanes;
    sizes.head_dim = std::max({problem->rows, problem->columns, ceil_div(numbers, kPageTokens)});
    Arena counted{nullptr};
    Worker(counted, sizes, 1);
    Arena arena{scratch_memory(counted.used)};
    const Worker worker(arena, sizes, 1);
    kernels->multiply(*problem, worker.scratch);
    return 0;
} catch (const std::bad_alloc &) {
    return 3;
}

// 0: done, 1: no such instruction set, 2: a page id lies outside its span, 3: out of memory. With 1 and 2 nothing was appended.
EXPORT int32_t steno_attend(const Problem *problem, const NewTokens *tokens) try {
    const Problem &p = *problem;
    const Kernels *kernels = kernels_for(p.isa, has_books(p));
    if (!kernels) return 1;
    if (!page_ids_fit(p)) return 2;
    if (tokens->keys) append(p, *tokens);
    const Split split(p);
    const int64_t total = split.first.back(), vectors = split.max_vectors;
    const int threads = threads_for(p, total / (kTileCost + kMaxDirect));
    Arena sizes{nullptr};
    Worker(sizes, p, vectors);
    float *const memory = scratch_memory(sizes.used * threads);
    Job job{split, kernels->attend, {}, std::vector<float>(split.shared_vectors * (p.head_dim + 1))};
    for (int i = 0; i < threads; i++) {
        Arena arena{memory + sizes.used * i};
        job.workers.emplace_back(arena, p, vectors);
    }
    job.answer_empty();
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int i = 0; i < threads; i++) job.work(job.workers[i], total * i / threads, total * (i + 1) / threads);
    // a second meeting of the threads costs more than it saves unless there is much to merge
#pragma omp parallel for num_threads(threads) schedule(static, 1) \
    if (threads * vectors * padded_dim(p) > kMinParallelMerge)
    for (int i = 0; i < threads; i++) job.collect(i);
    job.merge_shared();
    return 0;
} catch (const std::bad_alloc &) {
    return 3;
}
}
