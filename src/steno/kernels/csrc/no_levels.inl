// Instead of levels.inl where codebooks are not compiled: the dispatcher gives such pages to the kernels for AVX-512.

constexpr int64_t kMaxLevelVectors = 0;
inline void dequantize_levels(const Operand &, float *) {}
