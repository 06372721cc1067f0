// What products over codes in whole numbers begin with: scales are folded into the coefficients, which change with every
// page, and their largest of each group, as kLargestCoefficient, gives the step in which dots.inl rounds them to 15 bits
// and words.inl to 16. Against bfloat16, which keeps 8 bits of every number, the error is small; tests hold it to account.

constexpr int64_t kMaxCodeVectors = INT64_MAX;  // decoding codes is cheap beside a product
constexpr int64_t kFoldedRows = 64;  // rows of coefficients are a multiple of it, zeros behind the last ones

// Of the tiles of a batch, one after the other.
struct Folded {
    const float *coef;  // [vectors][stride]
    int64_t vectors;    // count * M * groups
    int64_t stride;     // rows, rounded up
    const float *inverse, *step, *bias;  // [vectors]; inverse is 1 / step
};

// Folds scales into coefficients and minima into one number per group: x [count][M][x_stride], zeros from `rows` on.
// In three passes over the batch, so that no pass waits for the horizontal sums of the one before.
template <int M>
inline Folded fold(const Operand *a, int64_t count, const float *x, int64_t x_step, int64_t x_stride,
                   const Scratch &scratch) {
    const int64_t groups = a->groups, rows = a->rows, stride = ceil_div(rows, kFoldedRows) * kFoldedRows;
    float *const coef = scratch.coef, *const top = scratch.tops, *const sum = scratch.sums;
    for (int64_t i = 0; i < count; i++, x += x_step) {
        const uint16_t *next = a[i].params + a[i].next_params;
        for (int64_t at = 0; at < 2 * groups * rows; at += 32) prefetch(next + at);
        for (int64_t g = 0; g < groups; g++) {
            const uint16_t *scales = a[i].params + g * rows, *minima = scales + groups * rows;
            const int64_t first = i * M * groups + g;
            float *out = coef + first * stride;
            F tops[M], sums[M];
            unroll<M>([&](auto m) STENO_INLINE { tops[m] = sums[m] = set1(0.f); });
            int64_t r = 0;
            for (; r < rows; r += kLanes) {
                const F scale = load_first_half(scales + r, rows - r), minimum = load_first_half(minima + r, rows - r);
                unroll<M>([&](auto m) STENO_INLINE {
                    const F factor = load(x + m * x_stride + r), product = mul(factor, scale);
                    store(out + m * groups * stride + r, product);
                    tops[m] = max(tops[m], abs_of(product));
                    sums[m] = fma(factor, minimum, sums[m]);
                });
            }
            for (; r < stride; r += kLanes)
                unroll<M>([&](auto m) STENO_INLINE { store(out + m * groups * stride + r, set1(0.f)); });
            unroll<M>([&](auto m) STENO_INLINE {
                store(top + (first + m * groups) * kLanes, tops[m]);
                store(sum + (first + m * groups) * kLanes, sums[m]);
            });
        }
    }
    const int64_t vectors = count * M * groups;
    float *const step = scratch.step, *const bias = scratch.bias, *const inverse = scratch.inverse;
    for (int64_t k = 0; k < vectors; k += kLanes) {
        F tops[kLanes], sums[kLanes];
        unroll<kLanes>([&](auto i) STENO_INLINE {  // what lies behind the last vector is unused
            tops[i] = load(top + (k + i) * kLanes), sums[i] = load(sum + (k + i) * kLanes);
        });
        // a query that is not finite shows in the bias, and so in the result
        const F largest = hmax16(tops);
        const F usable = select_less(set1(1e-30f), largest, largest, set1(__builtin_inff()));
        store(inverse + k, div(set1(kLargestCoefficient), usable));
        store(step + k, mul(select_less(usable, set1(1e30f), usable, set1(0.f)), set1(1.f / kLargestCoefficient)));
        store(bias + k, hsum16(sums));
    }
    return {coef, vectors, stride, inverse, step, bias};
}
