// The forward of attention_forward.h on bfloat16: products of 16 bits, softmax in float32.
#pragma once

#include "attention_forward.h"
#include "bf16_products.h"

namespace naslora {
namespace {

constexpr int64_t kScores = 2 * kPanel;  // queries of a panel of scores
constexpr float kLog2e = 1.44269504088896341f;

// Rows of q, k and v have whole packs of features. Rows of `stride` have whole packs of queries,
// and an odd number of vectors.
inline AttentionPlan bf16_plan(const Attention& a) {
  AttentionPlan plan = AttentionPlan::of<float>(a);
  plan.width = round_up(a.dim, kPack);
  plan.stride = round_up(plan.query_block, kPack) + kPanel;
  return plan;
}

struct Bf16ForwardScratch {
  using Setup = Tiles;

  int64_t depth;                // of sums over the keys of a block
  bfloat16 *keys, *values;      // of the head: (tokens, width), and for each block (width, depth)
  Panels queries;               // of a block, a column each
  float *rel_h, *rel_w;         // (H, stride), (W, stride)
  float* scores;                // (keys, kScores)
  Panels p;                     // their exponentials; the keys are the depth
  float *maximum, *sum, *keep;  // of each query, so far
  float* out;                   // (width, stride)

  template <typename Arena>
  Bf16ForwardScratch(Arena& arena, const AttentionPlan& plan) : depth(round_up(plan.keys, kPack)) {
    const auto narrow = [&](int64_t count) { return arena.template take<bfloat16>(count); };
    const auto wide = [&](int64_t rows) { return arena.template take<float>(rows * plan.stride); };
    keys = narrow((plan.tokens + kPack) * plan.width);
    values = narrow(plan.key_blocks() * plan.width * depth);
    queries = {narrow(plan.stride * plan.width), plan.width * kPanel};
    rel_h = wide(plan.a.height), rel_w = wide(plan.a.width);
    scores = arena.template take<float>(depth * kScores);
    p = {narrow(depth * kScores), depth * kPanel};
    maximum = wide(1), sum = wide(1), keep = wide(1);
    out = wide(plan.width);
  }
};

// 2^x within two units in the last place, for x of at most about 0. 0 where the result is no normal
// number. NaN stays NaN.
inline __m512 power_of_two(__m512 x) {
  constexpr float kRound = 12582912.0f;  // as in exponential.h
  constexpr __mmask16 kAll = 0xffff;
  const __m512 rounded = x + kRound;
  const __m512 r = x - (rounded - kRound);  // |r| <= 1 / 2
  // 2^r = 1 + r series(r): the polynomial with the least relative error, 9e-8.
  __m512 sum = broadcast(1.32546026725322e-3f);
  sum = sum * r + 9.671999141573906e-3f;
  sum = sum * r + 5.550779402256012e-2f;
  sum = sum * r + 2.4022231996059418e-1f;
  sum = sum * r + 6.931469440460205e-1f;
  sum = sum * r + 1.0f;
  // The low bits of `rounded` are the power. It is added to the exponent.
  const __mmask16 normal = _mm512_mask_cmp_ps_mask(kAll, x, broadcast(-126.0f), _CMP_NLT_UQ);
  return (__m512)_mm512_maskz_add_epi32(normal, (__m512i)sum,
                                        _mm512_slli_epi32((__m512i)rounded, 23));
}

// As softmax_step, with scores and biases times log2 e. Returns whether an earlier sum has to be
// multiplied by `keep`.
inline bool bf16_softmax_step(const KeyBlock& keys, float scale, int64_t stride, const float* rel_h,
                              const float* rel_w, float* scores, bfloat16* p, float* maximum,
                              float* sum, float* keep) {
  const __m512 before = load(maximum);
  __m512 top = before;
  float* at = scores;
  for (int64_t k = 0; k < keys.rows; ++k) {
    const __m512 row_bias = load(rel_h + (keys.row + k) * stride);
    for (int64_t l = 0; l < keys.columns; ++l, at += kScores) {
      const __m512 s = load(at) * scale + (row_bias + load(rel_w + (keys.column + l) * stride));
      top = s > top ? s : top;
      store<float>(at, s);
    }
  }
  const __m512 shift = top == broadcast(kLowest<float>) ? __m512{} : top;
  __m512 total = {};
  for (int64_t j = 0; j < round_up(keys.count, kBlockDepth); j += 2) {
    __m512 e[2] = {};
#pragma GCC unroll 2
    for (int64_t i = 0; i < 2; ++i)
      if (j + i < keys.count) e[i] = power_of_two(load(scores + (j + i) * kScores) - shift);
    total += e[0] + e[1];
    _mm512_storeu_si512(p + j * kPanel, pairs(narrow(e[0]), narrow(e[1])));
  }
  const __m512 kept = power_of_two(before - shift);
  store<float>(keep, kept);
  store<float>(sum, load(sum) * kept + total);
  store<float>(maximum, top);
  return _mm512_cmp_ps_mask(kept, broadcast(1.0f), _CMP_NEQ_UQ);
}

inline void bf16_forward_tile(const AttentionPlan& plan, int64_t block, int64_t queries,
                              const Bf16ForwardScratch& s) {
  const int64_t stride = plan.stride, dim = plan.a.dim;
  const KeyBlock keys = plan.keys_of(block);
  for (int64_t q = 0; q < queries; q += kScores) {
    const int64_t columns = smaller(kScores, queries - q);
    product(keys.count, columns, dim, s.keys + keys.first * plan.width, plan.width,
            s.queries.from(q), false, s.scores, kScores);
    for (int64_t i = 0; i < columns; i += kPanel) {
      const int64_t at = q + i;
      const bool rescale = bf16_softmax_step(
          keys, static_cast<float>(plan.a.scale * kLog2e), stride, s.rel_h + at, s.rel_w + at,
          s.scores + i, s.p.from(i).data, s.maximum + at, s.sum + at, s.keep + at);
      if (block > 0 && rescale)
        for (float* out = s.out + at; out < s.out + dim * stride; out += stride)
          store<float>(out, load(out) * load(s.keep + at));
    }
    product(dim, columns, keys.count, s.values + block * plan.width * s.depth, s.depth, s.p,
            block > 0, s.out + q, stride);
  }
}

inline void bf16_forward(const Attention& a, void* o, void* softmax) {
  const AttentionPlan plan = bf16_plan(a);
  for_each_block<Bf16ForwardScratch>(
      plan,
      [&](const Bf16ForwardScratch& s, int64_t head) {
        Rows{{a.k, a, head}, 0, plan.tokens, a.dim}.pack(s.keys, plan.width);
        for (int64_t b = 0; b < plan.key_blocks(); ++b) {
          const KeyBlock keys = plan.keys_of(b);
          Rows{{a.v, a, head}, keys.first, keys.count, a.dim}.pack_transposed(
              s.values + b * plan.width * s.depth, s.depth);
        }
      },
      [&](const Bf16ForwardScratch& s, int64_t head, const QueryBlock& block) {
        const int64_t first = block.first, count = block.count;
        Rows{{a.q, a, head}, first, count, a.dim}.pack_columns(s.queries);
        Rows{{a.rel_h, a, head}, first, count, a.height}.widen_transposed(kLog2e, s.rel_h,
                                                                          plan.stride);
        Rows{{a.rel_w, a, head}, first, count, a.width}.widen_transposed(kLog2e, s.rel_w,
                                                                         plan.stride);
        fill<float>(s.maximum, plan.stride, kLowest<float>);
        fill<float>(s.sum, plan.stride, 0);
        for (int64_t b = 0; b < plan.key_blocks(); ++b) bf16_forward_tile(plan, b, count, s);
        float* maximum = static_cast<float*>(softmax) + head * a.queries + first;
        float* sum = maximum + plan.images_heads * a.queries;
        for (int64_t i = 0; i < count; ++i) {
          maximum[i] = s.maximum[i] / kLog2e;
          sum[i] = s.sum[i];
          s.sum[i] = 1 / sum[i];
        }
        store_columns(s.out, plan.stride, count, a.dim, s.sum,
                      row_of<bfloat16>(o, a, head, a.queries, first), a.heads * a.dim);
      });
}

}  // namespace
}  // namespace naslora
