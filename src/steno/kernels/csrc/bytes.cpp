// Matrices of bytes transposed: what an entropy coder wants, symbols of one channel side by side, from rows of tokens.
#include "attend.h"

#include <algorithm>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace {

constexpr int64_t kTile = 16;

// Bytes [rows][columns] of a tile to [columns][rows].
void transpose_any(const uint8_t *in, int64_t in_stride, int64_t rows, int64_t columns, uint8_t *out, int64_t out_stride) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++) out[c * out_stride + r] = in[r * in_stride + c];
}

#if defined(__x86_64__)

// 16 rows of 16 bytes: four rounds that lay the bytes of row i and of row i + 8 alternately.
void transpose_tile(const uint8_t *in, int64_t in_stride, uint8_t *out, int64_t out_stride) {
    __m128i x[kTile], y[kTile];
    for (int64_t i = 0; i < kTile; i++) x[i] = _mm_loadu_si128(reinterpret_cast<const __m128i *>(in + i * in_stride));
    for (int round = 0; round < 4; round++) {
        for (int64_t i = 0; i < kTile / 2; i++) {
            y[2 * i] = _mm_unpacklo_epi8(x[i], x[i + kTile / 2]);
            y[2 * i + 1] = _mm_unpackhi_epi8(x[i], x[i + kTile / 2]);
        }
        std::copy(y, y + kTile, x);
    }
    for (int64_t i = 0; i < kTile; i++) _mm_storeu_si128(reinterpret_cast<__m128i *>(out + i * out_stride), x[i]);
}

#else

void transpose_tile(const uint8_t *in, int64_t in_stride, uint8_t *out, int64_t out_stride) {
    transpose_any(in, in_stride, kTile, kTile, out, out_stride);
}

#endif

}  // namespace

// Bytes `in` [rows][columns] to `out` [columns][rows].
extern "C" __attribute__((visibility("default"))) void steno_transpose_bytes(const uint8_t *in, int64_t rows, int64_t columns,
                                                                        uint8_t *out) {
    for (int64_t c = 0; c < columns; c += kTile)
        for (int64_t r = 0; r < rows; r += kTile) {
            const uint8_t *from = in + r * columns + c;
            uint8_t *to = out + c * rows + r;
            if (r + kTile <= rows && c + kTile <= columns)
                transpose_tile(from, columns, to, rows);
            else
                transpose_any(from, columns, std::min(kTile, rows - r), std::min(kTile, columns - c), to, rows);
        }
}
