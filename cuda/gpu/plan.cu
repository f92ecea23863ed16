// A plan: the items of a call and where each begins in the line of all work (work.h), and where each block begins. One
// block; no host knows the lengths, so a captured graph plans anew at each replay.
//
// Cut: thread t counts the tiles of sequences [t * n, (t + 1) * n), the counts are scanned in shared memory; then it
// measures as many items, and the lengths are scanned; then it looks up the blocks t, t + 256 and so on.
// Shared memory: one int64 a thread.
#include "plan.h"

#include "pagedcore/device.h"
#include "sequences.h"

namespace pagedcore::gpu {
namespace {

using namespace device;

constexpr int kThreads = 256;

// Of the values of all threads: the sum of those before this thread's, and of all. Reached by the whole block.
struct Scan {
  int64_t before, all;
};

PAGEDCORE_DEVICE Scan scan(int64_t value) {
  auto* sums = reinterpret_cast<int64_t*>(shared_memory());
  const int t = thread_id();
  sums[t] = value;
  sync_threads();
  for (int step = 1; step < kThreads; step *= 2) {  // Hillis and Steele's inclusive scan
    const int64_t left = t >= step ? sums[t - step] : 0;
    sync_threads();
    sums[t] += left;
    sync_threads();
  }
  const Scan result{sums[t] - value, sums[kThreads - 1]};
  sync_threads();
  return result;
}

// This thread's share of `count` things.
struct Share {
  int begin, end;
};

PAGEDCORE_DEVICE Share share_of(int count) {
  const int each = (count + kThreads - 1) / kThreads;
  const int64_t begin = int64_t{thread_id()} * each;
  const int first = begin < count ? static_cast<int>(begin) : count;
  return {first, count - first < each ? count : first + each};
}

// The last i of [0, count) with value(i) <= x; value(0) is.
template <class Value>
PAGEDCORE_DEVICE int last_not_above(int count, int64_t x, const Value& value) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = low + (high - low + 1) / 2;
    if (value(middle) <= x) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

PAGEDCORE_KERNEL(kThreads, 1) plan_kernel(const PlannedAttention params) {
  const AttentionParams& p = params.attention;
  const WorkPlan& plan = params.plan;
  check_sequences(p, thread_id(), kThreads);

  const Share seqs = share_of(p.num_seqs);
  int64_t tiles = 0;
  for (int seq = seqs.begin; seq < seqs.end; ++seq) tiles += tiles_of(p, plan, query_len_of(p, seq));
  const Scan counted = scan(tiles);
  int64_t before = counted.before;
  for (int seq = seqs.begin; seq < seqs.end; ++seq) {
    plan.first_items[seq] = static_cast<int>(before < plan.most_items ? before : plan.most_items);
    before += tiles_of(p, plan, query_len_of(p, seq));
  }
  // There is room for what the shapes allow. Query starts that say more are wrong, and what they say more is left out.
  const int num_items = static_cast<int>(counted.all < plan.most_items ? counted.all : plan.most_items);
  if (thread_id() == 0) plan.first_items[p.num_seqs] = num_items;
  sync_threads();

  const Share items = share_of(num_items);
  int64_t length = 0;
  int seq = 0;
  if (items.begin < items.end) {
    seq = last_not_above(p.num_seqs, items.begin, [&](int i) { return int64_t{plan.first_items[i]}; });
  }
  for (int i = items.begin; i < items.end; ++i) {
    while (plan.first_items[seq + 1] <= i) ++seq;
    const int tile = i - plan.first_items[seq];
    const TileWork work = tile_work(p, plan, p.seq_lens[seq], query_len_of(p, seq), tile);
    plan.items[i] = {length, seq, tile};  // from the share's beginning on, for now
    length += int64_t{p.num_kv_heads} * work.units * work.weight;
  }
  const Scan measured = scan(length);
  for (int i = items.begin; i < items.end; ++i) plan.items[i].begin += measured.before;
  const PlanHeader header{measured.all, num_items, blocks_with_work(plan, measured.all), plan.made_for};
  if (thread_id() == 0) {
    plan.items[num_items] = {header.total, 0, 0};
    *plan.header = header;
  }
  sync_threads();

  for (int block = thread_id(); block < plan.grid; block += kThreads) {
    plan.counters[block] = 0;
    plan.block_items[block] =
        num_items == 0 || block >= header.blocks
            ? 0
            : last_not_above(num_items, block_begin(header, block), [&](int i) { return plan.items[i].begin; });
  }
}

}  // namespace

void load_plan() { load(plan_kernel); }

void run_plan(const PlannedAttention& params, Stream stream) {
  launch(plan_kernel, 1, 1, 1, kThreads, kThreads * sizeof(int64_t), stream, params);
}

}  // namespace pagedcore::gpu
