// Attention of many queries over dense keys. Blocks of queries multiply tiles of 64 keys in registers: queries are read
// where they lie, one number at a time, and keys and values lie packed, shared by all queries of their KV head.
// Logits are in powers of two, so that a weight is a fraction's polynomial and a shift of the exponent.

constexpr int kBlockColumns = kAccumulators >= 4 * kMaxBlock ? 4 : 1;
constexpr int kBlockRows = kAccumulators / kBlockColumns;
static_assert(kDenseRows % kBlockRows == 0 && kMassRows % kBlockRows == 0, "units are whole blocks");
static_assert(kMassRows % kLanes == 0, "the bases of a tile are whole vectors");

// The softmax is relative to a logit near the largest: following it closely would mean rescaling more often, and 2^8 is
// far from anything that fp32 cannot hold.
constexpr float kSlack = 8.f;

// acc[m][n] += sum_d rows[m][d] * matrix[d][n]
template <int N>
inline void add_products(F (&acc)[kBlockRows][N], const float *const *rows, const float *matrix, int64_t stride,
                         int64_t depth) {
    const float *row[kBlockRows];
    for (int m = 0; m < kBlockRows; m++) row[m] = rows[m];
    // so that the branch predictor can remember a whole run
#pragma GCC unroll 4
    for (int64_t d = 0; d < depth; d++, matrix += stride) {
        F x[N];
        for (int n = 0; n < N; n++) x[n] = load(matrix + n * kLanes);
        for (int m = 0; m < kBlockRows; m++) {
            const F factor = set1(row[m][d]);
            for (int n = 0; n < N; n++) acc[m][n] = fma(factor, x[n], acc[m][n]);
        }
    }
}

// Where the rows r .. r + kBlockRows - 1 of a matrix lie; those behind the last one are the last one again.
inline void point_at(const float *base, int64_t stride, int64_t r, int64_t num_rows, const float **rows) {
    for (int m = 0; m < kBlockRows; m++) rows[m] = base + (r + m < num_rows ? r + m : num_rows - 1) * stride;
}

// Attention weights: the logits [64] of a row, of which the first `visible` count, become 2^(logit - base).
inline void weigh(float *logits, int64_t visible, float *base, float *sum, float *acc, int64_t dim) {
    F x[kTileVectors];
    for (int i = 0; i < kTileVectors; i++) x[i] = load(logits + i * kLanes);
    if (visible < kPageTokens)
        for (int i = 0; i < kTileVectors; i++) x[i] = keep_first(x[i], visible - i * kLanes, -kInfinity);
    const F tops = max(max(x[0], x[1]), max(x[2], x[3]));
    if (any_greater(tops, set1(*base + kSlack))) {
        const float top = hmax(tops);
        const F alpha = exp2_of(set1(*base - top));
        store(sum, mul(load(sum), alpha));
        for (int64_t c = 0; c < dim; c += kLanes) store(acc + c, mul(load(acc + c), alpha));
        *base = top;
    }
    const F shift = set1(*base == -kInfinity ? 0.f : *base);
    for (int i = 0; i < kTileVectors; i++) {
        x[i] = exp2_of(sub(x[i], shift));
        store(logits + i * kLanes, x[i]);
    }
    store(sum, add(load(sum), add(add(x[0], x[1]), add(x[2], x[3]))));
}

// logits[r .. r + kBlockRows - 1][64] = queries * keys
inline void multiply_keys(const float *const *queries, const float *keys, int64_t dim, float *logits) {
    for (int c = 0; c < kTileVectors; c += kBlockColumns) {
        F acc[kBlockRows][kBlockColumns];
        for (int m = 0; m < kBlockRows; m++)
            for (int n = 0; n < kBlockColumns; n++) acc[m][n] = set1(0.f);
        add_products(acc, queries, keys + c * kLanes, kPageTokens, dim);
        for (int m = 0; m < kBlockRows; m++)
            for (int n = 0; n < kBlockColumns; n++) store(logits + m * kPageTokens + (c + n) * kLanes, acc[m][n]);
    }
}

// out[0 .. kBlockRows - 1][16 N] += weights * values
template <int N>
inline void multiply_values(const float *const *weights, const float *values, int64_t dim, int64_t count, float *out) {
    F acc[kBlockRows][N];
    for (int m = 0; m < kBlockRows; m++)
        for (int n = 0; n < N; n++) acc[m][n] = load(out + m * dim + n * kLanes);
    add_products(acc, weights, values, dim, count);
    for (int m = 0; m < kBlockRows; m++)
        for (int n = 0; n < N; n++) store(out + m * dim + n * kLanes, acc[m][n]);
}

void pack(const DenseProblem &p, int64_t head, int64_t tile, float *keys, float *values) {
    const int64_t first = tile * kPageTokens, count = clamp_tokens(p.num_keys - first);
    Entry entry{};
    entry.format = p.format, entry.keys = p.keys, entry.values = p.values;
    transpose_keys(entry, head * p.num_keys + first, count, p.head_dim, keys);
    copy_values(entry, head * p.num_keys + first, count, p.head_dim, values);
    const F scale = set1(p.scale * kLog2E);
    for (int64_t i = 0; i < p.head_dim * kPageTokens; i += kLanes) store(keys + i, mul(load(keys + i), scale));
}

// Rows of a unit that are all older than the keys from `first` on, in whole blocks: they have nothing to do there.
inline int64_t hidden_rows(const DenseProblem &p, const DenseUnit &unit, int64_t first) {
    const int64_t newer = first - (p.num_keys - p.num_queries) - unit.first;
    return p.causal && newer > 0 ? newer / kBlockRows * kBlockRows : 0;
}

// One tile of keys and values for all rows of a unit.
void flash_tile(const DenseProblem &p, const DenseUnit &unit, int64_t tile, const float *keys, const float *values,
                const DenseScratch &s, float *weights) {
    const int64_t dim = padded_dim(p), first = tile * kPageTokens, count = clamp_tokens(p.num_keys - first);
    const int64_t hidden = hidden_rows(p, unit, first), past = p.num_keys - p.num_queries;
    const float *q = p.q + query_offset(p, p.q_strides, unit, unit.first);
    const float *rows[kBlockRows];
    for (int64_t r = hidden; r < unit.num_rows; r += kBlockRows) {
        point_at(q, p.q_strides[2], r, unit.num_rows, rows);
        multiply_keys(rows, keys, p.head_dim, weights + r * kPageTokens);
        for (int64_t i = r; i < r + kBlockRows; i++) {
            const int64_t visible = p.causal ? past + unit.first + i + 1 - first : count;
            weigh(weights + i * kPageTokens, visible < count ? visible : count, s.base + i, s.sum + i * kLanes,
                  s.acc + i * dim, dim);
        }
    }
    for (int64_t r = hidden; r < unit.num_rows; r += kBlockRows) {
        point_at(weights, kPageTokens, r, r + kBlockRows, rows);
        int64_t c = 0;
        for (; c + kBlockColumns * kLanes <= dim; c += kBlockColumns * kLanes)
            multiply_values<kBlockColumns>(rows, values + c, dim, count, s.acc + r * dim + c);
        for (; c < dim; c += kLanes) multiply_values<1>(rows, values + c, dim, count, s.acc + r * dim + c);
    }
}

// Adds the weights of one tile, of which those of a row are relative to one base, to the mass of its 64 keys.
// inverse: of the sums of all weights, which are relative to s.base.
inline void add_mass(const DenseProblem &p, const DenseUnit &unit, int64_t tile, const DenseScratch &s,
                     const float *inverse, float *mass) {
    const float *weights = s.weights + tile * kMassRows * kPageTokens;
    float factor[kMassRows];
    for (int r = 0; r < kMassRows; r += kLanes) {
        const F shift = sub(load(s.bases + tile * kMassRows + r), load(s.base + r));
        store(factor + r, mul(exp2_of(shift), load(inverse + r)));
    }
    F x[kTileVectors];
    for (int n = 0; n < kTileVectors; n++) x[n] = load(mass + n * kLanes);
    for (int64_t i = hidden_rows(p, unit, tile * kPageTokens); i < unit.num_rows; i++) {
        const F f = set1(factor[i]);
        for (int n = 0; n < kTileVectors; n++) x[n] = fma(f, load(weights + i * kPageTokens + n * kLanes), x[n]);
    }
    for (int n = 0; n < kTileVectors; n++) store(mass + n * kLanes, x[n]);
}

void flash(const DenseProblem &p, const DenseUnit &unit, const float *keys, const float *values,
           const DenseScratch &s, float *mass) {
    const int64_t dim = padded_dim(p), num_rows = rows_at_a_time(p);
    const int64_t visible = p.num_keys - (p.causal ? p.num_queries - unit.first - unit.num_rows : 0);
    for (int64_t i = 0; i < num_rows; i++) s.base[i] = -kInfinity;
    for (int64_t i = 0; i < num_rows * kLanes; i++) s.sum[i] = 0.f;
    for (int64_t i = 0; i < num_rows * dim; i++) s.acc[i] = 0.f;
    for (int64_t t = 0; t * kPageTokens < visible; t++) {
        flash_tile(p, unit, t, keys + t * packed_tile(p), values + t * packed_tile(p), s,
                   s.weights + (mass ? t * kMassRows * kPageTokens : 0));
        if (mass)
            for (int r = 0; r < kMassRows; r += kLanes) store(s.bases + t * kMassRows + r, load(s.base + r));
    }
    float inverse[kDenseRows] = {};
    for (int64_t i = 0; i < unit.num_rows; i++) {
        const float sum = hsum(load(s.sum + i * kLanes));
        inverse[i] = 1.f / sum;
        float *out = p.out + query_offset(p, p.out_strides, unit, unit.first + i);
        for (int64_t c = 0; c < p.head_dim; c++) out[c] = s.acc[i * dim + c] * inverse[i];
        const int64_t row = (unit.head * p.group + unit.query_head) * p.num_queries + unit.first + i;
        p.lse[row] = static_cast<float>((s.base[i] + __builtin_log2(sum)) * 0.69314718055994531);
    }
    if (mass)
        for (int64_t t = 0; t * kPageTokens < visible; t++)
            add_mass(p, unit, t, s, inverse, mass + t * kPageTokens);
}

void max_attention(const DenseProblem &p, int64_t head, int64_t tile, float *keys) {
    const int64_t first = tile * kPageTokens, count = clamp_tokens(p.num_keys - first);
    const int64_t num_rows = p.group * p.num_queries;
    const float *q = p.q + head * num_rows * p.head_dim, *lse = p.lse + head * num_rows;
    Entry entry{};
    entry.format = p.format, entry.keys = p.keys;
    transpose_keys(entry, head * p.num_keys + first, count, p.head_dim, keys);
    const F scale = set1(p.scale);
    for (int64_t i = 0; i < p.head_dim * kPageTokens; i += kLanes) store(keys + i, mul(load(keys + i), scale));
    float best[kPageTokens];
    for (int c = 0; c < kTileVectors; c += kBlockColumns) {
        F top[kBlockColumns];
        for (int n = 0; n < kBlockColumns; n++) top[n] = set1(-kInfinity);
        for (int64_t r = 0; r < num_rows; r += kBlockRows) {
            const float *rows[kBlockRows], *base[kBlockRows];
            point_at(q, p.head_dim, r, num_rows, rows);
            point_at(lse, 1, r, num_rows, base);
            F acc[kBlockRows][kBlockColumns];
            for (int m = 0; m < kBlockRows; m++)
                for (int n = 0; n < kBlockColumns; n++) acc[m][n] = set1(-*base[m]);
            add_products(acc, rows, keys + c * kLanes, kPageTokens, p.head_dim);
            for (int m = 0; m < kBlockRows; m++)
                for (int n = 0; n < kBlockColumns; n++) top[n] = max(top[n], acc[m][n]);
        }
        for (int n = 0; n < kBlockColumns; n++) store(best + (c + n) * kLanes, top[n]);
    }
    for (int64_t i = 0; i < count; i++) p.out[head * p.num_keys + first + i] = best[i];
}
