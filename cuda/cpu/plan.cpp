#include "plan.h"

#include <algorithm>

#include "pagedcore/mask.h"

namespace pagedcore::cpu {
namespace {

constexpr int64_t kMinPiece = 256;                // tokens: below this, merging costs more than an idle thread
constexpr int64_t kPieceAlign = 64;               // planner's pieces start at multiples of this
constexpr int64_t kMostPartialFloats = 16 << 20;  // of pieces that wait to be folded, whatever split_size is asked for
constexpr int kItemsPerThread = 4;                // an item of more than 1 / (4 * threads) of the work is split

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Cost of an item: keys times a weight per key. Reading a K and V row costs about as much as eight query rows'
// arithmetic on it.
int64_t cost_of(const WorkItem& item, int32_t group) {
  const int64_t rows = static_cast<int64_t>(item.query_end - item.query_begin) * group;
  return (item.key_end - item.key_begin) * (item.head_end - item.head_begin) * (8 + rows);
}

void append_split(const WorkItem& whole, int64_t piece, Plan& plan) {
  WorkItem item = whole;
  item.group = static_cast<int32_t>(plan.groups.size());
  item.piece = 0;
  item.piece_size = 0;
  // Pieces end at absolute multiples of their size, so that they do not depend on where a window begins.
  for (int64_t begin = whole.key_begin; begin < whole.key_end; ++item.piece) {
    const int64_t end = std::min(whole.key_end, (begin / piece + 1) * piece);
    item.key_begin = begin;
    item.key_end = end;
    plan.items.push_back(item);
    begin = end;
  }
  plan.groups.push_back({plan.num_partials, item.piece});
  plan.num_partials += item.piece;
}

}  // namespace

void make_plan(const AttentionParams& p, const Isa& isa, int num_threads, Plan& plan) {
  plan.items.clear();
  plan.order.clear();
  plan.groups.clear();
  plan.num_partials = plan.stream_rows = plan.packed_rows = plan.cost = 0;
  const int32_t group = p.num_heads / p.num_kv_heads;

  std::vector<WorkItem>& wholes = plan.wholes;
  wholes.clear();
  for (int32_t seq = 0; seq < p.num_seqs; ++seq) {
    const int32_t query_len = p.query_start_loc[seq + 1] - p.query_start_loc[seq];
    if (query_len == 0) continue;
    const bool packed = static_cast<int64_t>(query_len) * group >= isa.stream_rows;
    const int32_t queries = packed ? std::max<int32_t>(1, isa.packed_rows / group) : query_len;
    const int32_t heads = packed ? 1 : p.num_kv_heads;
    for (int32_t query = 0; query < query_len; query += queries) {
      const int32_t query_end = std::min(query_len, query + queries);
      const KeyRange keys = visible_keys(p, p.seq_lens[seq], query_len, query, query_end);
      for (int32_t head = 0; head < p.num_kv_heads; head += heads) {
        WorkItem item{
            seq, query, query_end, head, head + heads, -1, 0, packed, keys.begin, std::max(keys.begin, keys.end), 0};
        int64_t& most = packed ? plan.packed_rows : plan.stream_rows;
        most = std::max<int64_t>(most, item.rows(group));
        plan.cost += cost_of(item, group);
        wholes.push_back(item);
      }
    }
  }

  const bool distribute = num_threads > 1 && wholes.size() < static_cast<size_t>(num_threads) * kItemsPerThread;
  for (WorkItem& item : wholes) {
    const int64_t keys = item.key_end - item.key_begin;
    if (p.split_size > 0) {
      const int64_t pieces =
          item.key_end > 0 ? (item.key_end - 1) / p.split_size - item.key_begin / p.split_size + 1 : 0;
      const int64_t floats = pieces * item.rows(group) * (p.v_head_dim + isa.chunk);
      // Pieces on one thread are folded one by one, to the same bits.
      if (pieces > 1 && distribute && floats <= kMostPartialFloats / static_cast<int64_t>(wholes.size())) {
        append_split(item, p.split_size, plan);
        continue;
      }
      item.piece_size = pieces > 1 ? p.split_size : 0;
    } else if (p.split_size < 0 && num_threads > 1 && keys > kMinPiece) {
      const int64_t limit = std::max<int64_t>(1, plan.cost / (static_cast<int64_t>(num_threads) * kItemsPerThread));
      const int64_t pieces = std::min(ceil_div(cost_of(item, group), limit), keys / kMinPiece);
      if (pieces > 1) {
        append_split(item, ceil_div(ceil_div(keys, pieces), kPieceAlign) * kPieceAlign, plan);
        continue;
      }
    }
    plan.items.push_back(item);
  }

  plan.order.resize(plan.items.size());
  for (size_t i = 0; i < plan.order.size(); ++i) plan.order[i] = static_cast<int32_t>(i);
  const auto dearer = [&](int32_t a, int32_t b) {
    return cost_of(plan.items[static_cast<size_t>(a)], group) > cost_of(plan.items[static_cast<size_t>(b)], group);
  };
  // Equal items stay in order (their pages may be neighbours), and a batch of them needs no sorting at all.
  if (!std::is_sorted(plan.order.begin(), plan.order.end(), dearer)) {
    std::stable_sort(plan.order.begin(), plan.order.end(), dearer);
  }
}

}  // namespace pagedcore::cpu
