// From the dot product of a query and a key to its score, in base 2. Four steps, in this order:
//
//   s = scale * (q . k)
//   s = c * tanh(s / c)                                      with a soft cap c
//   s = s - slope * |query's position - key's position|      with ALiBi, the slope being the head's
//   s = -inf                                                 for a key that the mask hides
//
// Under a causal mask the distance is query - key, 0 on the diagonal; without one, keys behind and ahead count alike.
#pragma once

#include "pagedcore/macros.h"
#include "pagedcore/params.h"
#include "pagedcore/softmax.h"

namespace pagedcore {

// The first two steps as two factors.
struct ScoreRule {
  float factor;  // of the dot product: the score in base 2, or, with a soft cap, the argument of tanh
  float cap;     // of the tanh: the score in base 2; 0: no soft cap
};

PAGEDCORE_FN ScoreRule score_rule(const AttentionParams& p) {
  if (p.softcap == 0.0f) return {p.scale * kLog2E, 0.0f};
  // A tiny cap may not turn a dot product of 0 into 0 * inf.
  constexpr float kMost = 3e38f;
  const float factor = p.scale / p.softcap;
  return {factor > kMost ? kMost : factor < -kMost ? -kMost : factor, p.softcap * kLog2E};
}

// What a head's distances are multiplied by, in base 2.
PAGEDCORE_FN float alibi_slope(const AttentionParams& p, int64_t head) { return p.alibi_slopes[head] * kLog2E; }

}  // namespace pagedcore
