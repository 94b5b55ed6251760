// Products of bfloat16 matrices with float32 sums, and the packing of their operands.
//
// c (rows, columns) = a (rows, depth) b (depth, columns). The rows of a are contiguous. b comes in
// panels of 16 columns, (depth / 2, 16, 2): the numbers 2 k and 2 k + 1 of a column are next to
// each other. vdpbf16ps and the tiles of AMX both read operands in this order. So their code
// differs in one function, product_block.
#pragma once

#include <immintrin.h>

#include "attention_plan.h"

#if defined(__AMX_BF16__) && defined(NASLORA_EMULATE_AMX)
#include "amx_emulation.h"
#endif

namespace naslora {
namespace {

constexpr int64_t kPanel = 16;  // columns of a panel, and numbers of a vector
constexpr int64_t kPack = 32;   // packed rows, columns and depths are multiples of it

// b. A panel follows the one before at a distance of `panel` numbers.
struct Panels {
  bfloat16* data;
  int64_t panel;

  Panels from(int64_t column) const { return {data + column / kPanel * panel, panel}; }
};

#if defined(__AMX_BF16__)

constexpr int64_t kBlockDepth = 32, kUnit = 16;

// Configures the tiles of this thread: eight of 16 rows and 64 bytes. At the end they are as
// before.
class Tiles {
 public:
  Tiles() {
    _tile_storeconfig(before_);
    alignas(64) uint8_t own[64] = {1};  // the palette
    for (int i = 0; i < 8; ++i) own[16 + 2 * i] = 64, own[48 + i] = 16;
    _tile_loadconfig(own);
  }
  ~Tiles() { _tile_loadconfig(before_); }

 private:
  alignas(64) uint8_t before_[64];
};

// c = a b, or c += a b, for kUnit rows and one or two panels. The tiles 0 and 1 are of c.
template <int P>
inline void product_block(const bfloat16* a, int64_t a_row, Panels b, int64_t depth,
                          bool accumulate, float* c, int64_t c_row) {
  _tile_zero(0);
  _tile_zero(1);
  if (accumulate) _tile_loadd(0, c, c_row * 4);
  if (accumulate && P > 1) _tile_loadd(1, c + kPanel, c_row * 4);
  for (int64_t k = 0; k < depth; k += kBlockDepth) {
    _tile_loadd(2, a + k, a_row * 2);
    _tile_loadd(3, b.data + k * kPanel, 64);
    _tile_dpbf16ps(0, 2, 3);
    if (P > 1) _tile_loadd(4, b.data + b.panel + k * kPanel, 64);
    if (P > 1) _tile_dpbf16ps(1, 2, 4);
  }
  _tile_stored(0, c, c_row * 4);
  if (P > 1) _tile_stored(1, c + kPanel, c_row * 4);
}

#else

constexpr int64_t kBlockDepth = 2, kUnit = 8;
struct Tiles {};

template <int P>
inline void product_block(const bfloat16* a, int64_t a_row, Panels b, int64_t depth,
                          bool accumulate, float* c, int64_t c_row) {
  __m512 sum[kUnit][P];
#pragma GCC unroll 8
  for (int i = 0; i < kUnit; ++i)
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p)
      sum[i][p] = accumulate ? load(c + i * c_row + p * kPanel) : __m512{};
  for (int64_t k = 0; k < depth; k += 2) {
    __m512bh right[P];
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p)
      right[p] = (__m512bh)_mm512_loadu_si512(b.data + p * b.panel + k * kPanel);
#pragma GCC unroll 8
    for (int i = 0; i < kUnit; ++i) {
      int32_t pair;
      memcpy(&pair, a + i * a_row + k, sizeof pair);
      const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) sum[i][p] = _mm512_dpbf16_ps(sum[i][p], left, right[p]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kUnit; ++i)
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) store<float>(c + i * c_row + p * kPanel, sum[i][p]);
}

#endif

// c = a b, or c += a b. Whole blocks are computed: a and c have `rows` rounded up to kUnit, b and c
// `columns` rounded up to panels. From `depth` to the next kBlockDepth a and b have zeros.
inline void product(int64_t rows, int64_t columns, int64_t depth, const bfloat16* a, int64_t a_row,
                    Panels b, bool accumulate, float* c, int64_t c_row) {
  for (int64_t j = 0; j < columns; j += 2 * kPanel) {
    const auto block = columns - j > kPanel ? product_block<2> : product_block<1>;
    for (int64_t i = 0; i < rows; i += kUnit)
      block(a + i * a_row, a_row, b.from(j), depth, accumulate, c + i * c_row + j, c_row);
  }
}

// 16 x 16 numbers of 32 bits.
struct Square {
  __m512i row[16];

  void transpose() {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      const int from = i / 4 * 4 + i / 2 % 2;
      row[i] = _mm512_unpacklo_epi64(t[from], t[from + 2]);
      row[i + 1] = _mm512_unpackhi_epi64(t[from], t[from + 2]);
    }
    // The quarters of row[4 k + j] are the columns j, j + 4, j + 8, j + 12 of the rows from 4 k on.
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const int j = i % 4, k = i / 4 * 8;
      t[i] = _mm512_shuffle_i32x4(row[k + j], row[k + 4 + j], 0x88);      // even quarters
      t[i + 8] = _mm512_shuffle_i32x4(row[k + j], row[k + 4 + j], 0xdd);  // odd quarters
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      row[j] = _mm512_shuffle_i32x4(t[j], t[4 + j], 0x88);
      row[4 + j] = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0x88);
      row[8 + j] = _mm512_shuffle_i32x4(t[j], t[4 + j], 0xdd);
      row[12 + j] = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0xdd);
    }
  }
  void store(bfloat16* to, int64_t stride) const {
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) _mm512_storeu_si512(to + j * stride, row[j]);
  }
};

inline __mmask32 lanes_below(int64_t count) {
  return count >= 32 ? ~0u : (1u << larger(0, count)) - 1;
}

// Pairs (x, y) of the lower halves of two vectors.
inline __m512i pairs(__m512i x, __m512i y) {
  alignas(64) static constexpr uint16_t index[] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                   37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                   11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  return _mm512_permutex2var_epi16(x, _mm512_load_si512(index), y);
}

// Rounds to the lower half of a vector. Zeros where the mask has none.
inline __m512i narrow(__m512 x, __mmask16 lanes = 0xffff) {
  return _mm512_castsi256_si512((__m256i)_mm512_maskz_cvtneps_pbh(lanes, x));
}

inline void store_half(bfloat16* to, __m512i lower) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(lower));
}

// Some rows of bfloat16 to be packed.
struct Rows {
  HeadRows<bfloat16> rows;
  int64_t begin, count, features;

  // 32 features of a row from `feature` on; zeros behind the last feature and behind the last row.
  __m512i load(int64_t row, int64_t feature) const {
    const __mmask32 mask = row < count ? lanes_below(features - feature) : 0;
    return _mm512_maskz_loadu_epi16(mask, rows[begin + (row < count ? row : 0)] + feature);
  }
  // 32 features of 16 rows: a row of the square for each pair of features.
  Square columns(int64_t row, int64_t feature) const {
    Square s;
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) s.row[j] = load(row + j, feature);
    s.transpose();
    return s;
  }
  // 16 features of 32 rows: a row of the square for each pair of rows.
  Square depth(int64_t row, int64_t feature) const {
    Square s;
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j)
      s.row[j] = pairs(load(row + 2 * j, feature), load(row + 2 * j + 1, feature));
    return s;
  }

  // a = the rows, with `width` numbers each.
  void pack(bfloat16* out, int64_t width) const {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < width; c += 32) _mm512_storeu_si512(out + i * width + c, load(i, c));
  }
  // a = the rows transposed, with `width` numbers each.
  void pack_transposed(bfloat16* out, int64_t width) const {
    for (int64_t i = 0; i < count; i += 32)
      for (int64_t c = 0; c < features; c += 16) {
        Square s = depth(i, c);
        s.transpose();
        s.store(out + c * width + i, width);
      }
  }
  // b = the rows transposed: a column for each row.
  void pack_columns(Panels out) const {
    for (int64_t i = 0; i < round_up(count, kPack); i += 16)
      for (int64_t c = 0; c < features; c += 32)
        columns(i, c).store(out.from(i).data + c * kPanel, 2 * kPanel);
  }
  // b = the rows: a column for each feature.
  void pack_depth(Panels out) const {
    for (int64_t i = 0; i < count; i += 32)
      for (int64_t c = 0; c < features; c += 16)
        depth(i, c).store(out.from(c).data + i * kPanel, 2 * kPanel);
  }
  // out (features, stride) = scale times the rows transposed, in float32.
  void widen_transposed(float scale, float* out, int64_t stride) const {
    for (int64_t i = 0; i < count; i += 16)
      for (int64_t c = 0; c < features; c += 32) {
        const Square s = columns(i, c);
        for (int64_t j = 0; j < smaller(32, features - c); ++j) {
          const __m512i pair = s.row[j / 2];
          const __m512i bits =
              j % 2 ? pair & _mm512_set1_epi32(-65536) : _mm512_slli_epi32(pair, 16);
          store<float>(out + (c + j) * stride + i, (__m512)bits * scale);
        }
      }
  }
};

// Writes the columns of `from` (features, stride), times a scale for each, as rows of bfloat16.
inline void store_columns(const float* from, int64_t stride, int64_t count, int64_t features,
                          const float* scale, bfloat16* to, int64_t to_row) {
  for (int64_t i = 0; i < count; i += 16)
    for (int64_t c = 0; c < features; c += 16) {
      Square s;
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j)
        s.row[j] =
            (__m512i)(load(from + smaller(c + j, features - 1) * stride + i) * load(scale + i));
      s.transpose();
      for (int64_t j = 0; j < smaller(16, count - i); ++j)
        _mm256_mask_storeu_epi16(to + (i + j) * to_row + c, lanes_below(smaller(16, features - c)),
                                 (__m256i)_mm512_cvtneps_pbh((__m512)s.row[j]));
    }
}

}  // namespace
}  // namespace naslora
