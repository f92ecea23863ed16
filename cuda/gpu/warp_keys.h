// What a warp of 16 rows does with keys, whatever they are elements of, and whether its tile has few rows or many:
// copies them with what belongs to them, and folds them into its state. The tiles differ in who copies which keys, who
// waits for whom, and in where a warp's state goes in the end.
#pragma once

#include <cstdint>
#include <type_traits>

#include "codes.h"
#include "elements.h"
#include "load.h"
#include "query.h"
#include "rows.h"
#include "scores.h"
#include "state.h"

namespace pagedcore::gpu {

// Above head size 128 the output takes 96 or 128 registers a thread: Q is read from shared memory at each step then,
// instead of being held.
template <int kDim, class T>
struct Operands {
  static constexpr bool kQueryInShared = kDim > 128;
  static_assert(!kOfCodes<T> || !kQueryInShared, "codes are multiplied with queries in registers");
  using Cache = typename Elements<T>::Cache;
  using Query =
      std::conditional_t<kOfCodes<T>, QueryOfCodes<kDim>,
                         std::conditional_t<kQueryInShared, QueryInShared<kDim, T>, QueryInRegisters<kDim, T>>>;
  using State = std::conditional_t<kOfCodes<T>, CodesState<kDim>, WarpState<kDim>>;
};

// Where keys lie in shared memory; the scales only of codes.
struct SharedKeys {
  device::SharedAddress k_rows, v_rows;
  float *k_scales, *v_scales;
};

// As load_keys, with the scales of codes.
template <int kDim, int kKeys, class T>
PAGEDCORE_DEVICE uint32_t load_keys_of(const AttentionParams& p, device::Lane lane, int kv_head, Place place,
                                       const SharedKeys& to) {
  using Cache = typename Operands<kDim, T>::Cache;
  const uint32_t found = load_keys<kDim, kKeys, Cache>(p, lane, kv_head, place, to.k_rows, to.v_rows);
  if constexpr (kOfCodes<T>) load_scales<kKeys>(p, lane, kv_head, place, to.k_scales, to.v_scales);
  return found;
}

// Scores, masks and the softmax of kKeys keys, the first at position `key`; `all_visible` and `valid` as finish_scores
// has them.
template <int kDim, int kKeys, class T>
PAGEDCORE_DEVICE void attend_to(const PlannedAttention& params, device::Lane lane, const Row (&rows)[2], int key,
                                bool all_visible, const uint32_t (&valid)[(kKeys + 31) / 32], const SharedKeys& keys,
                                const typename Operands<kDim, T>::Query& query,
                                typename Operands<kDim, T>::State& state) {
  float score[kKeys / 8][4];
  if constexpr (kOfCodes<T>) {
    multiply_codes<kKeys>(lane, query, keys.k_rows, keys.k_scales, score);
  } else {
    multiply_keys<kKeys>(lane, query, keys.k_rows, score);
  }
  finish_scores<kKeys>(params, lane, rows, key, all_visible, valid, score);
  if constexpr (kOfCodes<T>) {
    fold_codes<kKeys>(lane, score, keys.v_scales, keys.v_rows, state);
  } else {
    fold_keys<kDim, kKeys, T>(lane, score, keys.v_rows, state);
  }
}

}  // namespace pagedcore::gpu
