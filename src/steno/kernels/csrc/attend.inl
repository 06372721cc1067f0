// The algorithm, written once over a vector of 16 floats `F` and compiled once per instruction set. The file that
// includes this one defines, in the same anonymous namespace, F and I (16 floats, 16 dwords), load, store, set1, add,
// sub, mul, div, fma, max, prefetch, round, times_pow2, fraction, times_pow2_floor, any_greater, abs_of, with_sign_of,
// hsum, hmax, select_less, keep_first, load_half, load_bfloat16, half_to_float, decode_int8, load_line, shift_right,
// decode_low, transpose16 and kAccumulators, the F that fit its registers. Nothing here may be shared between the
// builds: the linker would keep one copy, with instructions that a machine may lack. So no std:: templates either.
#include "math.inl"
#include "operands.inl"
#include "products.inl"

constexpr int kTileVectors = kPageTokens / kLanes;
constexpr float kInfinity = __builtin_inff();
alignas(64) constexpr float kZeros[kPageTokens] = {};

inline int64_t clamp_tokens(int64_t n) { return n < 0 ? 0 : n > kPageTokens ? kPageTokens : n; }

// The first page of a span; a step of so many bytes and numbers leads to the next.
struct PageOperand {
    Operand first;
    int64_t code_step;
    int64_t param_step;
    Operand at(int64_t page, int64_t next) const {
        Operand x = first;
        x.codes += page * code_step;
        x.params += page * param_step;
        x.next_codes = (next - page) * code_step;
        x.next_params = (next - page) * param_step;
        return x;
    }
};

inline PageOperand page_operand(const Entry &e, const uint8_t *codes, const uint16_t *params, int64_t rows,
                                int64_t columns, int64_t group) {
    const int64_t blocks = ceil_div(columns, kLanes), groups = ceil_div(columns, group);
    const uint64_t inverse = groups == 1 ? 0 : (uint64_t{1} << 32) / (group / kLanes) + 1;
    return {{e.format, codes, params, rows, blocks, groups, inverse, 0, 0},
            code_bytes(rows, blocks, e.format - 16),
            2 * groups * rows};
}

// A span as a unit reads it.
struct SpanView {
    const Entry *entry;
    bool is_tail;
    PageOperand keys, values;  // of a span of pages
};

inline SpanView view(const Problem &p, const Entry &e, bool is_tail) {
    SpanView span{&e, is_tail, {}, {}};
    if (is_paged(e)) {
        span.keys = page_operand(e, e.keys, e.key_params, p.head_dim, kPageTokens, e.key_group);
        span.values = page_operand(e, e.values, e.value_params, kPageTokens, p.head_dim, e.value_group);
    }
    return span;
}

// 64 tokens, or fewer at the end of a span. visible: tokens of the tile that the newest query sees, counted from its
// start.
struct Tile {
    const Entry *entry;
    int64_t page;
    int64_t visible;
    bool is_tail;
    Operand keys, values;
};

// Softcap, log counts and mask of the logits [64] of one vector, of which the first `visible` count.
__attribute__((noinline)) void change_logits(const Problem &p, const Tile &tile, int64_t visible, float *logits) {
    for (int64_t at = 0; at < kPageTokens; at += kLanes) {
        F x = load(logits + at);
        if (p.softcap != 0.f) x = mul(set1(p.softcap), tanh_of(x));
        if (tile.entry->log_counts)
            x = add(x, load_first(tile.entry->log_counts + tile.page * kPageTokens + at, tile.visible - at));
        store(logits + at, keep_first(x, visible - at, -kInfinity));
    }
}

// Makes the logits [64] of one vector ready for the softmax; returns the largest, lane by lane.
inline F finish_logits(const Problem &p, const Tile &tile, int64_t query, float *logits) {
    const int64_t hidden = tile.is_tail ? hidden_from(p, query) : 0;
    const int64_t visible = clamp_tokens(tile.entry->tokens - hidden - tile.page * kPageTokens);
    if (p.softcap != 0.f || tile.entry->log_counts || visible < kPageTokens) change_logits(p, tile, visible, logits);
    F top = load(logits);
    for (int i = 1; i < kTileVectors; i++) top = max(top, load(logits + i * kLanes));
    return top;
}

// The running softmax: the logits [kBatch][64] of vector v become weights.
inline void update_softmax(const Problem &p, const Tile *tiles, int64_t count, int64_t query, float *logits,
                           const Partial &out, int64_t v) {
    F tops = set1(-kInfinity);
    for (int64_t i = 0; i < count; i++) tops = max(tops, finish_logits(p, tiles[i], query, logits + i * kPageTokens));
    const float top = hmax(tops);
    float *sum = out.sum + v * kLanes;
    if (top > out.max[v]) {
        const int64_t dim = padded_dim(p);
        float *acc = out.acc + v * dim;
        const F alpha = exp_nonpositive(set1(out.max[v] - top));
        store(sum, mul(load(sum), alpha));
        for (int64_t c = 0; c < dim; c += kLanes) store(acc + c, mul(load(acc + c), alpha));
        out.max[v] = top;
    }
    const F base = set1(out.max[v] == -kInfinity ? 0.f : out.max[v]);
    F total = load(sum);
    for (int64_t i = 0; i < count * kPageTokens; i += kPageTokens)
#pragma GCC unroll 4
        for (int j = 0; j < kPageTokens; j += kLanes) {
            const F weight = exp_nonpositive(sub(load(logits + i + j), base));
            total = add(total, weight);
            store(logits + i + j, weight);
        }
    store(sum, total);
}

// The vectors v .. v + M - 1 of a unit over a batch of tiles.
template <int M>
void attend_vectors(const Problem &p, const Unit &unit, const Tile *tiles, int64_t count, int64_t v,
                    const Scratch &scratch, const Partial &out) {
    constexpr int64_t kStride = kBatch * kPageTokens;
    const int64_t dim = padded_dim(p);
    float *acc = out.acc + v * dim, *logits = scratch.logits;
    for (int64_t i = 0; i < count; i++)
        multiply<M>(tiles[i].keys, scratch.q + v * dim, dim, scratch, {kZeros, 0, logits + i * kPageTokens, kStride});
    for (int m = 0; m < M; m++)  // 32 bits, as a wide division takes longer than the softmax
        update_softmax(p, tiles, count, unit.first + static_cast<uint32_t>(v + m) / static_cast<uint32_t>(p.group),
                       logits + m * kStride, out, v + m);
    for (int64_t i = 0; i < count; i++)
        multiply<M>(tiles[i].values, logits + i * kPageTokens, kStride, scratch, {acc, dim, acc, dim});
}

void attend_tiles(const Problem &p, const Unit &unit, const Tile *tiles, int64_t count, const Scratch &scratch,
                  const Partial &out) {
    constexpr int kBlock = kAccumulators >= 4 * kMaxBlock ? kMaxBlock : kMaxDirect;
    for (int64_t v = 0; v < unit.num_vectors; v += kBlock) {
        const int64_t left = unit.num_vectors - v;
        switch (left < kBlock ? left : kBlock) {
            case 1: attend_vectors<1>(p, unit, tiles, count, v, scratch, out); break;
            case 2: attend_vectors<2>(p, unit, tiles, count, v, scratch, out); break;
            case 3: attend_vectors<3>(p, unit, tiles, count, v, scratch, out); break;
            case 4: attend_vectors<4>(p, unit, tiles, count, v, scratch, out); break;
            case 5: attend_vectors<5>(p, unit, tiles, count, v, scratch, out); break;
            case 6: attend_vectors<6>(p, unit, tiles, count, v, scratch, out); break;
        }
    }
}

// Where the products read a tile: in place, or in scratch if many vectors share it or dense keys must be transposed.
void place_operands(const SpanView &span, int64_t dim, bool direct, int64_t next, const Scratch &scratch, Tile &tile) {
    const Entry &e = *span.entry;
    const int64_t token = tile.page * kPageTokens;
    if (is_paged(e)) {
        tile.keys = span.keys.at(tile.page, next);
        tile.values = span.values.at(tile.page, next);
        if (!direct)
            tile.keys = dequantize(tile.keys, scratch.keys), tile.values = dequantize(tile.values, scratch.values);
        return;
    }
    tile.keys = transpose_keys(e, token, tile.visible, dim, scratch.keys);
    const int64_t width = e.format == kFloat ? 4 : 2;
    if (direct && dim % kLanes == 0)
        tile.values = plain_operand(e.format, e.values + token * dim * width, tile.visible, dim / kLanes);
    else tile.values = copy_values(e, token, tile.visible, dim, scratch.values);
}

// Copies the queries of a unit, scaled, one vector per query and head.
void load_queries(const Problem &p, const Unit &unit, float *dst) {
    const int64_t dim = padded_dim(p);
    const F scale = set1(p.softcap != 0.f ? p.scale / p.softcap : p.scale);
    for (int64_t v = 0; v < unit.num_vectors; v++) {
        const int64_t row = (unit.head * p.group + v % p.group) * p.num_queries + unit.first + v / p.group;
        const float *q = p.q + row * p.head_dim;
        for (int64_t c = 0; c < dim; c += kLanes)
            store(dst + v * dim + c, mul(load_first(q + c, p.head_dim - c), scale));
    }
}

void attend(const Problem &p, const Unit &unit, int64_t begin, int64_t end, const Scratch &scratch,
            const Partial &out) {
    load_queries(p, unit, scratch.q);
    const int64_t last = unit.first + unit.num_vectors / p.group - 1;  // the newest query
    const bool direct = unit.num_vectors <= kMaxDirect;
    const int32_t stop = p.offsets[unit.head + 1];
    for (int32_t i = p.offsets[unit.head]; i < stop && end > 0; i++) {
        const SpanView span = view(p, p.entries[i], i + 1 == stop);
        const Entry &e = *span.entry;
        const int64_t tokens = e.tokens - (span.is_tail ? hidden_from(p, last) : 0);
        const int64_t tiles = count_tiles(p, e, span.is_tail, last);
        const int64_t batch = direct && is_paged(e) ? kBatch : 1;  // scratch holds one tile
        Tile waiting[kBatch];
        int64_t count = 0;
        for (int64_t t = begin > 0 ? begin : 0; t < tiles && t < end; t++) {
            const int64_t page = e.num_page_ids >= 0 ? e.page_ids[t] : t;
            const int64_t next = t + 1 == tiles ? page : e.num_page_ids >= 0 ? e.page_ids[t + 1] : t + 1;
            const int64_t visible = clamp_tokens(tokens - page * kPageTokens);
            if (visible > 0) {
                waiting[count] = {&e, page, visible, span.is_tail, {}, {}};
                place_operands(span, p.head_dim, direct, next, scratch, waiting[count++]);
            }
            if (count == batch) attend_tiles(p, unit, waiting, count, scratch, out), count = 0;
        }
        if (count) attend_tiles(p, unit, waiting, count, scratch, out);
        begin -= tiles;
        end -= tiles;
    }
}
