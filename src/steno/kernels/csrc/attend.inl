// The algorithm, written once over a vector of 16 floats `F` and compiled once per instruction set. The file that includes
// this one defines, in the same anonymous namespace, F and I (16 floats, 16 dwords), load, store, set1, add, sub, mul, div,
// fma, max, round, pow2, abs_of, with_sign_of, hsum, hmax, select_less, keep_first, load_half, load_bfloat16, half_to_float,
// decode_int8, load_line, shift_right, shift_right_by, decode_low, transpose16 and kAccumulators, the F that fit its registers.
// Nothing here may be shared between the builds: the linker would keep one copy, with instructions that a machine may lack.
// So no std:: templates either.
#include "math.inl"
#include "operands.inl"
#include "products.inl"

inline int64_t clamp_tokens(int64_t n) { return n < 0 ? 0 : n > kPageTokens ? kPageTokens : n; }

// The first page of a span; a step of so many bytes and numbers leads to the next.
struct PageOperand {
    Operand first;
    int64_t code_step;
    int64_t param_step;
    Operand at(int64_t page) const {
        Operand x = first;
        x.codes += page * code_step;
        x.params += page * param_step;
        return x;
    }
};

inline PageOperand page_operand(const Entry &e, const uint8_t *codes, const uint16_t *params, int64_t rows, int64_t columns,
                                int64_t group) {
    const int64_t blocks = ceil_div(columns, kLanes), groups = ceil_div(columns, group);
    const uint64_t inverse = groups == 1 ? 0 : (uint64_t{1} << 32) / (group / kLanes) + 1;
    return {{e.format, codes, params, rows, blocks, groups, inverse}, code_bytes(rows, blocks, e.format - 16), 2 * groups * rows};
}

// A span as a unit reads it.
struct SpanView {
    const Entry *entry;
    bool is_tail;
    PageOperand keys, values;  // of a span of pages
};

// 64 tokens, or fewer at the end of a span. visible: tokens of the tile that the newest query sees, counted from its start.
struct Tile {
    const Entry *entry;
    int64_t page;
    int64_t visible;
    bool is_tail;
};

// Softcap, log counts and mask; then the running softmax: logits [64] become weights.
inline void update_softmax(const Problem &p, const Tile &tile, int64_t query, float *logits, const Partial &out, int64_t v) {
    const int64_t token = tile.page * kPageTokens, dim = padded_dim(p);
    const int64_t hidden = tile.is_tail ? hidden_from(p, query) : 0;
    const int64_t visible = clamp_tokens(tile.entry->tokens - hidden - token);
    F x[kPageTokens / kLanes], top = set1(-__builtin_inff());
    for (int i = 0; i < kPageTokens / kLanes; i++) {
        x[i] = load(logits + i * kLanes);
        if (p.softcap != 0.f) x[i] = mul(set1(p.softcap), tanh_of(x[i]));
        if (tile.entry->log_counts)
            x[i] = add(x[i], load_first(tile.entry->log_counts + token + i * kLanes, tile.visible - i * kLanes));
        if (visible < kPageTokens) x[i] = keep_first(x[i], visible - i * kLanes, -__builtin_inff());
        top = max(top, x[i]);
    }
    const float tile_max = hmax(top);
    if (tile_max > out.max[v]) {
        const F alpha = exp_nonpositive(set1(out.max[v] - tile_max));
        store(out.sum + v * kLanes, mul(load(out.sum + v * kLanes), alpha));
        for (int64_t c = 0; c < dim; c += kLanes) store(out.acc + v * dim + c, mul(load(out.acc + v * dim + c), alpha));
        out.max[v] = tile_max;
    }
    const F base = set1(out.max[v] == -__builtin_inff() ? 0.f : out.max[v]);
    F sum = load(out.sum + v * kLanes);
    for (int i = 0; i < kPageTokens / kLanes; i++) {
        x[i] = exp_nonpositive(sub(x[i], base));
        sum = add(sum, x[i]);
        store(logits + i * kLanes, x[i]);
    }
    store(out.sum + v * kLanes, sum);
}

// The vectors v .. v + M - 1 of a unit over one tile.
template <int M>
void attend_vectors(const Problem &p, const Unit &unit, const Tile &tile, const Operand &keys, const Operand &values, int64_t v,
                    const Scratch &scratch, const Partial &out) {
    const int64_t dim = padded_dim(p);
    multiply<M>(keys, scratch.q + v * dim, dim, scratch, scratch.logits, kPageTokens, false);
    for (int m = 0; m < M; m++)
        update_softmax(p, tile, unit.first + (v + m) / p.group, scratch.logits + m * kPageTokens, out, v + m);
    multiply<M>(values, scratch.logits, kPageTokens, scratch, out.acc + v * dim, dim, true);
}

void attend_tile(const Problem &p, const Unit &unit, const SpanView &span, const Tile &tile, const Scratch &scratch,
                 const Partial &out) {
    const Entry &e = *span.entry;
    const int64_t dim = p.head_dim, token = tile.page * kPageTokens;
    const bool direct = unit.num_vectors <= kMaxDirect;
    Operand keys, values;
    if (is_paged(e)) {
        keys = span.keys.at(tile.page);
        values = span.values.at(tile.page);
        if (!direct) keys = dequantize(keys, scratch.keys), values = dequantize(values, scratch.values);
    } else {
        keys = transpose_keys(e, token, tile.visible, dim, scratch.keys);
        const int64_t width = e.format == kFloat ? 4 : 2;
        if (direct && dim % kLanes == 0)
            values = plain_operand(e.format, e.values + token * dim * width, tile.visible, dim / kLanes);
        else values = copy_values(e, token, tile.visible, dim, scratch.values);
    }
    constexpr int kBlock = kAccumulators >= 4 * kMaxBlock ? kMaxBlock : kMaxDirect;
    for (int64_t v = 0; v < unit.num_vectors; v += kBlock) {
        const int64_t left = unit.num_vectors - v;
        switch (left < kBlock ? left : kBlock) {
            case 1: attend_vectors<1>(p, unit, tile, keys, values, v, scratch, out); break;
            case 2: attend_vectors<2>(p, unit, tile, keys, values, v, scratch, out); break;
            case 3: attend_vectors<3>(p, unit, tile, keys, values, v, scratch, out); break;
            case 4: attend_vectors<4>(p, unit, tile, keys, values, v, scratch, out); break;
            case 5: attend_vectors<5>(p, unit, tile, keys, values, v, scratch, out); break;
            case 6: attend_vectors<6>(p, unit, tile, keys, values, v, scratch, out); break;
        }
    }
}

// Copies the queries of a unit, scaled, one vector per query and head.
void load_queries(const Problem &p, const Unit &unit, float *dst) {
    const int64_t dim = padded_dim(p);
    const F scale = set1(p.softcap != 0.f ? p.scale / p.softcap : p.scale);
    for (int64_t v = 0; v < unit.num_vectors; v++) {
        const int64_t row = (unit.head * p.group + v % p.group) * p.num_queries + unit.first + v / p.group;
        const float *q = p.q + row * p.head_dim;
        for (int64_t c = 0; c < dim; c += kLanes) store(dst + v * dim + c, mul(load_first(q + c, p.head_dim - c), scale));
    }
}

void attend(const Problem &p, const Unit &unit, int64_t begin, int64_t end, const Scratch &scratch, const Partial &out) {
    load_queries(p, unit, scratch.q);
    const int64_t last = unit.first + unit.num_vectors / p.group - 1;  // the newest query
    const int32_t stop = p.offsets[unit.head + 1];
    for (int32_t i = p.offsets[unit.head]; i < stop && end > 0; i++) {
        const Entry &e = p.entries[i];
        const bool is_tail = i + 1 == stop;
        const int64_t tokens = e.tokens - (is_tail ? hidden_from(p, last) : 0);
        const int64_t tiles = count_tiles(p, e, is_tail, last);
        SpanView span{&e, is_tail, {}, {}};
        if (is_paged(e)) {
            span.keys = page_operand(e, e.keys, e.key_params, p.head_dim, kPageTokens, e.key_group);
            span.values = page_operand(e, e.values, e.value_params, kPageTokens, p.head_dim, e.value_group);
        }
        for (int64_t t = begin > 0 ? begin : 0; t < tiles && t < end; t++) {
            const int64_t page = e.num_page_ids >= 0 ? e.page_ids[t] : t;
            const int64_t visible = clamp_tokens(tokens - page * kPageTokens);
            if (visible > 0) attend_tile(p, unit, span, {&e, page, visible, is_tail}, scratch, out);
        }
        begin -= tiles;
        end -= tiles;
    }
}
