// The algorithm, written once over a vector of 16 floats `F` and compiled once per instruction set. The file that
// includes this one defines, in the same anonymous namespace, F and I (16 floats, 16 dwords), load, store, set1, add,
// sub, mul, div, fma, max, prefetch, prefetch_far, round, times_pow2, fraction, times_pow2_floor, any_greater, abs_of,
// with_sign_of, hsum, hsum16, hmax, select_less, keep_first, load_half, load_bfloat16, half_to_float, load_line,
// load_bytes, shift_right, shift_left, and_of, or_of, plus, halves_of, Table, load_table, look_up, decode_low,
// transpose16 and kAccumulators, the F that fit its registers, and includes math.inl, operands.inl, no_levels.inl or
// levels.inl and maybe level_products.inl, one of codes.inl, dots.inl and words.inl (fold.inl before the last two),
// products.inl, and one of bfloats.inl and bfloat_dots.inl before. Nothing here may be shared between the builds: the
// linker would keep one copy, with instructions that a machine may lack. So no std:: templates either.

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
    return {{e.format, codes, params, rows, blocks, groups, inverse, 0, 0, nullptr, 0},
            count_code_bytes(rows, blocks, bits_of(e.format)),
            2 * groups * rows};
}

// Of pages with a codebook: groups are channels of one token, so keys, which lie transposed, have scales by column.
inline PageOperand book_operand(const Entry &e, const uint8_t *codes, const uint16_t *params, int64_t rows,
                                int64_t columns, int64_t group, bool by_column) {
    PageOperand x = page_operand(e, codes, params, rows, columns, by_column ? columns : group);
    const int64_t scales = by_column ? ceil_div(rows, group) * x.first.blocks * kLanes : x.first.groups * rows;
    x.first.levels = e.levels;
    x.first.scale_rows = by_column ? group : 0;
    x.param_step = e.format & kNoScales ? 0 : e.format & kByteScales ? (scales + 4) / 2 : scales;
    return x;
}

// A span as a unit reads it.
struct SpanView {
    const Entry *entry;
    bool is_tail;
    PageOperand keys, values;  // of a span of pages
};

inline SpanView view(const Problem &p, const Entry &e, bool is_tail) {
    SpanView span{&e, is_tail, {}, {}};
    if (is_book(e.format)) {
        span.keys = book_operand(e, e.keys, e.key_params, p.head_dim, kPageTokens, e.key_group, true);
        span.values = book_operand(e, e.values, e.value_params, kPageTokens, p.head_dim, e.value_group, false);
    } else if (is_paged(e)) {
        span.keys = page_operand(e, e.keys, e.key_params, p.head_dim, kPageTokens, e.key_group);
        span.values = page_operand(e, e.values, e.value_params, kPageTokens, p.head_dim, e.value_group);
    }
    return span;
}

// Up to kBatch tiles of one span, each of 64 tokens, or fewer at its end.
struct Batch {
    const Entry *entry;
    bool is_tail;
    int64_t count;
    int64_t page[kBatch];
    int64_t visible[kBatch];           // tokens that the newest query sees, counted from the start of the tile
    const uint8_t *plain_keys[kBatch]; // read token by token; null: keys is the operand
    Operand keys[kBatch], values[kBatch];
};

constexpr float kLog2E = 1.44269504088896341f;

// Softcap, log counts and mask of the logits [64] of one vector, of which the first `visible` count. Logits are in
// units of log 2, so that the softmax needs powers of two only.
__attribute__((noinline)) void change_logits(const Problem &p, const Batch &batch, int64_t i, int64_t visible,
                                             float *logits) {
    for (int64_t at = 0; at < kPageTokens; at += kLanes) {
        F x = load(logits + at);
        if (p.softcap != 0.f) x = mul(set1(p.softcap * kLog2E), tanh_of(x));
        if (batch.entry->log_counts) {
            const float *counts = batch.entry->log_counts + batch.page[i] * kPageTokens + at;
            x = fma(set1(kLog2E), load_first(counts, batch.visible[i] - at), x);
        }
        store(logits + at, keep_first(x, visible - at, -kInfinity));
    }
}

// Makes the logits [64] of one vector and tile i ready for the softmax; returns the largest, lane by lane.
inline F finish_logits(const Problem &p, const Batch &batch, int64_t i, int64_t query, float *logits) {
    const int64_t hidden = batch.is_tail ? hidden_from(p, query) : 0;
    const int64_t visible = clamp_tokens(batch.entry->tokens - hidden - batch.page[i] * kPageTokens);
    if (p.softcap != 0.f || batch.entry->log_counts || visible < kPageTokens)
        change_logits(p, batch, i, visible, logits);
    F top = load(logits);
    for (int j = 1; j < kTileVectors; j++) top = max(top, load(logits + j * kLanes));
    return top;
}

// The running softmax: the logits [kBatch][64] of vector v become weights.
inline void update_softmax(const Problem &p, const Batch &batch, int64_t query, float *logits, const Partial &out,
                           int64_t v) {
    F tops = set1(-kInfinity);
    for (int64_t i = 0; i < batch.count; i++)
        tops = max(tops, finish_logits(p, batch, i, query, logits + i * kPageTokens));
    float *sum = out.sum + v * kLanes;
    if (any_greater(tops, set1(out.max[v]))) {
        const int64_t dim = padded_dim(p);
        const float top = hmax(tops);
        float *acc = out.acc + v * dim;
        const F alpha = exp2_of(set1(out.max[v] - top));
        store(sum, mul(load(sum), alpha));
        for (int64_t c = 0; c < dim; c += kLanes) store(acc + c, mul(load(acc + c), alpha));
        out.max[v] = top;
    }
    const F base = set1(out.max[v] == -kInfinity ? 0.f : out.max[v]);
    F total = load(sum);
    for (int64_t i = 0; i < batch.count * kPageTokens; i += kPageTokens)
#pragma GCC unroll 4
        for (int j = 0; j < kPageTokens; j += kLanes) {
            const F weight = exp2_of(sub(load(logits + i + j), base));
            total = add(total, weight);
            store(logits + i + j, weight);
        }
    store(sum, total);
}

// What queries are multiplied with before anything else.
inline float query_scale(const Problem &p) { return p.softcap != 0.f ? p.scale / p.softcap : p.scale * kLog2E; }

// Logits of M queries with the keys of a batch.
template <int M>
void multiply_keys(const Problem &p, const Batch &batch, const float *q, int64_t dim, const Scratch &scratch,
                   float *logits, int64_t stride) {
    if (!batch.plain_keys[0])
        return multiply<M>(batch.keys, batch.count, q, 0, dim, scratch, {kZeros, 0, 0, logits, stride, kPageTokens});
    if constexpr (M <= kMaxDirect)
        for (int64_t i = 0; i < batch.count; i++, logits += kPageTokens) {
            const int64_t format = batch.entry->format, count = batch.visible[i], head_dim = p.head_dim;
            const uint8_t *keys = batch.plain_keys[i];
            if (format == kFloat) dot_keys<Floats, M>(keys, count, head_dim, q, dim, logits, stride);
            else if (format == kHalf) dot_keys<Halves, M>(keys, count, head_dim, q, dim, logits, stride);
            else dot_bfloat_keys<M>(keys, count, head_dim, q, dim, query_scale(p), logits, stride);
        }
}

// The vectors v .. v + M - 1 of a unit over a batch of tiles.
template <int M>
void attend_vectors(const Problem &p, const Unit &unit, const Batch &batch, int64_t v, const Scratch &scratch,
                    const Partial &out) {
    constexpr int64_t kStride = kBatch * kPageTokens;
    const int64_t dim = padded_dim(p);
    float *acc = out.acc + v * dim, *logits = scratch.logits;
    multiply_keys<M>(p, batch, scratch.q + v * dim, dim, scratch, logits, kStride);
    for (int m = 0; m < M; m++) {  // rows share no tail; 32 bits, as a wide division takes longer than the softmax
        const int64_t query = static_cast<uint32_t>(v + m) / static_cast<uint32_t>(p.group);
        update_softmax(p, batch, unit.first + query, logits + m * kStride, out, v + m);
    }
    multiply<M>(batch.values, batch.count, logits, kPageTokens, kStride, scratch, {acc, dim, 0, acc, dim, 0});
}

void attend_batch(const Problem &p, const Unit &unit, const Batch &batch, const Scratch &scratch,
                  const Partial &out) {
    constexpr int kBlock = kAccumulators >= 4 * kMaxBlock ? kMaxBlock : kMaxDirect;
    for (int64_t v = 0; v < unit.num_vectors; v += kBlock) {
        const int64_t left = unit.num_vectors - v;
        switch (left < kBlock ? left : kBlock) {
            case 1: attend_vectors<1>(p, unit, batch, v, scratch, out); break;
            case 2: attend_vectors<2>(p, unit, batch, v, scratch, out); break;
            case 3: attend_vectors<3>(p, unit, batch, v, scratch, out); break;
            case 4: attend_vectors<4>(p, unit, batch, v, scratch, out); break;
            case 5: attend_vectors<5>(p, unit, batch, v, scratch, out); break;
            case 6: attend_vectors<6>(p, unit, batch, v, scratch, out); break;
        }
    }
}

// Where the products read tile i: in place, or in scratch if many vectors share it. in_place: of the span's numbers.
void place_operands(const SpanView &span, int64_t dim, bool in_place, int64_t next, const Scratch &scratch,
                    Batch &batch, int64_t i) {
    const Entry &e = *span.entry;
    const int64_t page = batch.page[i], token = page * kPageTokens;
    Operand &keys = batch.keys[i], &values = batch.values[i];
    batch.plain_keys[i] = nullptr;
    if (is_paged(e)) {
        keys = span.keys.at(page, next);
        values = span.values.at(page, next);
        if (!in_place) keys = dequantize(keys, scratch.keys), values = dequantize(values, scratch.values);
        return;
    }
    const int64_t width = e.format == kFloat ? 4 : 2;
    if (in_place) batch.plain_keys[i] = e.keys + token * dim * width;
    else keys = transpose_keys(e, token, batch.visible[i], dim, scratch.keys);
    if (in_place && dim % kLanes == 0) {
        values = plain_operand(e.format, e.values + token * dim * width, batch.visible[i], dim / kLanes);
        values.next_codes = (next - page) * kPageTokens * dim * width;
    } else values = copy_values(e, token, batch.visible[i], dim, scratch.values);
}

// Copies the queries of a unit, scaled, one vector per query and head.
void load_queries(const Problem &p, const Unit &unit, float *dst) {
    const int64_t dim = padded_dim(p);
    const F scale = set1(query_scale(p));
    for (int64_t v = 0; v < unit.num_vectors; v++) {
        const float *q = p.q + query_index(p, unit, v) * p.head_dim;
        for (int64_t c = 0; c < dim; c += kLanes)
            store(dst + v * dim + c, mul(load_first(q + c, p.head_dim - c), scale));
    }
}

// Up to how many vectors a span is read in place.
inline int64_t max_direct_vectors(int64_t format) {
    return is_book(format) ? kMaxLevelVectors : format > kHalf ? kMaxCodeVectors : kMaxDirect;
}

void attend(const Problem &p, const Unit &unit, int64_t begin, int64_t end, const Scratch &scratch,
            const Partial &out) {
    load_queries(p, unit, scratch.q);
    const int64_t last = unit.first + unit.num_queries - 1;  // the newest query
    const int64_t dim = p.head_dim;
    for (int32_t i = unit.first_span; i < unit.end_span && end > 0; i++) {
        const SpanView span = view(p, p.entries[i], i + 1 == p.offsets[unit.head + 1]);
        const Entry &e = *span.entry;
        const int64_t tokens = e.tokens - (span.is_tail ? hidden_from(p, last) : 0);
        const int64_t tiles = count_tiles(p, e, span.is_tail, last);
        const bool in_place = unit.num_vectors <= max_direct_vectors(e.format);
        // scratch holds one tile
        const int64_t batch_size = in_place && (is_paged(e) || dim % kLanes == 0) ? kBatch : 1;
        Batch batch;
        batch.entry = &e, batch.is_tail = span.is_tail, batch.count = 0;
        for (int64_t t = begin > 0 ? begin : 0; t < tiles && t < end; t++) {
            const int64_t page = e.num_page_ids >= 0 ? e.page_ids[t] : t;
            const int64_t ahead = t + 1 < tiles ? t + 1 : t;
            const int64_t next = e.num_page_ids >= 0 ? e.page_ids[ahead] : ahead;
            const int64_t visible = clamp_tokens(tokens - page * kPageTokens);
            if (visible > 0) {
                batch.page[batch.count] = page, batch.visible[batch.count] = visible;
                place_operands(span, dim, in_place, next, scratch, batch, batch.count++);
            }
            if (batch.count == batch_size) attend_batch(p, unit, batch, scratch, out), batch.count = 0;
        }
        if (batch.count) attend_batch(p, unit, batch, scratch, out);
        begin -= tiles;
        end -= tiles;
    }
}

template <int M>
void multiply_vectors(const MatrixProblem &p, const Operand &first, int64_t code_step, int64_t param_step, int64_t v,
                      const Scratch &scratch) {
    const bool in_place = M <= max_direct_vectors(p.format);
    const int64_t batch_size = in_place ? kBatch : 1;  // scratch holds one
    for (int64_t i = 0; i < p.num_matrices; i += batch_size) {
        const int64_t count = p.num_matrices - i < batch_size ? p.num_matrices - i : batch_size;
        Operand batch[kBatch];
        for (int64_t j = 0; j < count; j++) {
            batch[j] = first;
            batch[j].codes += (i + j) * code_step, batch[j].params += (i + j) * param_step;
            if (!in_place) batch[j] = dequantize(batch[j], scratch.keys);
        }
        float *const out = p.out + v * p.out_stride + i * p.out_step;
        multiply<M>(batch, count, p.x + v * p.x_stride + i * p.x_step, p.x_step, p.x_stride, scratch,
                    {out, p.out_stride, p.out_step, out, p.out_stride, p.out_step});
    }
}

void multiply_matrices(const MatrixProblem &p, const Scratch &scratch) {
    Entry e{};
    e.format = p.format, e.levels = p.levels;
    const PageOperand x = is_book(p.format)
                              ? book_operand(e, p.codes, p.params, p.rows, p.columns, p.group, p.by_column)
                              : page_operand(e, p.codes, p.params, p.rows, p.columns, p.group);
    for (int64_t v = 0; v < p.num_vectors; v += kMaxDirect) {
        const int64_t left = p.num_vectors - v;
        switch (left < kMaxDirect ? left : kMaxDirect) {
            case 1: multiply_vectors<1>(p, x.first, x.code_step, x.param_step, v, scratch); break;
            case 2: multiply_vectors<2>(p, x.first, x.code_step, x.param_step, v, scratch); break;
            case 3: multiply_vectors<3>(p, x.first, x.code_step, x.param_step, v, scratch); break;
            case 4: multiply_vectors<4>(p, x.first, x.code_step, x.param_step, v, scratch); break;
        }
    }
}
