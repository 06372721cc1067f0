// Products with bfloat16 numbers in fp32: each becomes a float in a register. bfloat_dots.inl offers the same.

template <int M>
inline void multiply_bfloats(const Operand &a, const float *x, int64_t x_stride, const Target &t) {
    multiply_numbers<Bfloats, M>(a, x, x_stride, t);
}

template <int M>
inline void dot_bfloat_keys(const uint8_t *keys, int64_t count, int64_t dim, const float *x, int64_t x_stride, float,
                            float *out, int64_t out_stride) {
    dot_keys<Bfloats, M>(keys, count, dim, x, x_stride, out, out_stride);
}
