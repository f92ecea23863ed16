// paged_attention on the CPU: check the index tensors, plan, run the items on all threads, fold the pieces of split
// items.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>

#include "cpu.h"
#include "errors.h"
#include "isa.h"
#include "pagedcore/mask.h"
#include "pagedcore/pages.h"
#include "plan.h"
#include "threads.h"

namespace pagedcore::cpu {
namespace {

std::string at(const char* name, int64_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; }

[[noreturn]] void refuse(std::string argument, std::string expected, int64_t got) {
  throw ArgumentError(Fault::invalid_argument, std::move(argument), std::move(expected), std::to_string(got));
}

[[noreturn]] void refuse_limit(const char* argument, int64_t limit, const char* what, int32_t seq, int64_t value) {
  refuse(argument,
         std::string("at least the ") + what + " of sequence " + std::to_string(seq) + ", " + std::to_string(value),
         limit);
}

// Only entries that would be read are looked at: the rest of a table may hold anything.
void check_table_row(const AttentionParams& p, int32_t seq, KeyRange keys) {
  const int32_t* row = table_row(p, seq);
  // Positions are int32 as lengths are, and a division of 64 bits takes twice as long.
  const int32_t first = static_cast<int32_t>(keys.begin) / p.block_size;
  const int32_t last = static_cast<int32_t>(keys.end - 1) / p.block_size;
  const auto num_blocks = static_cast<uint32_t>(std::min<int64_t>(p.num_blocks, INT32_MAX));
  uint32_t bad = 0;
  for (int32_t i = first; i <= last; ++i) bad |= static_cast<uint32_t>(row[i]) >= num_blocks;
  if (!bad) return;
  int32_t i = first;
  while (static_cast<uint32_t>(row[i]) < num_blocks) ++i;
  ArgumentError error(
      Fault::block, "block_table", "ids in [0, " + std::to_string(p.num_blocks) + ")",
      "block " + std::to_string(row[i]) + " at index " + std::to_string(i) + " of sequence " + std::to_string(seq));
  error.block = row[i];
  error.num_blocks = p.num_blocks;
  throw error;
}

void check_indices(const AttentionParams& p) {
  const int32_t* loc = p.query_start_loc;
  if (loc[0] != 0) refuse("query_start_loc[0]", "0", loc[0]);
  for (int32_t seq = 0; seq < p.num_seqs; ++seq) {
    if (loc[seq + 1] < loc[seq])
      refuse(at("query_start_loc", seq + 1), "at least its predecessor, " + std::to_string(loc[seq]), loc[seq + 1]);
  }
  if (loc[p.num_seqs] > p.num_tokens) {
    refuse(at("query_start_loc", p.num_seqs), "at most num_tokens, " + std::to_string(p.num_tokens), loc[p.num_seqs]);
  }
  const int64_t capacity = p.max_blocks * p.block_size;
  for (int32_t seq = 0; seq < p.num_seqs; ++seq) {
    const int64_t seq_len = p.seq_lens[seq];
    if (seq_len < 0) refuse(at("seq_lens", seq), "0 or more", seq_len);
    if (p.block_table_rows && (p.block_table_rows[seq] < 0 || p.block_table_rows[seq] >= p.table_rows)) {
      refuse(at("block_table_rows", seq), "a row in [0, " + std::to_string(p.table_rows) + ")",
             p.block_table_rows[seq]);
    }
    const int64_t query_len = loc[seq + 1] - loc[seq];
    if (query_len > p.max_query_len) refuse_limit("max_query_len", p.max_query_len, "query length", seq, query_len);
    if (seq_len > p.max_seq_len) refuse_limit("max_seq_len", p.max_seq_len, "length", seq, seq_len);
    if (seq_len == 0 || query_len == 0) continue;
    if (seq_len > capacity) {
      refuse(at("seq_lens", seq),
             "at most " + std::to_string(capacity) + " tokens, which the " + std::to_string(p.max_blocks) +
                 " columns of block_table hold at block_size " + std::to_string(p.block_size),
             seq_len);
    }
    const KeyRange keys = visible_keys(p, seq_len, query_len, 0, query_len);
    if (keys.begin < keys.end) check_table_row(p, seq, keys);
  }
}

// Memory that a calling thread keeps between its calls, so that a decode step allocates nothing once it has run.
class Arena {
 public:
  float* floats(int64_t count) {
    if (count > capacity_) {
      memory_.reset();
      capacity_ = 0;
      const size_t bytes = (static_cast<size_t>(count) * sizeof(float) + 63) / 64 * 64;
      memory_.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
      if (!memory_) throw std::bad_alloc();
      capacity_ = count;
    }
    return memory_.get();
  }

  // Keep what a decode step needs; give back what one huge prompt needed.
  void trim() {
    if (capacity_ > kKeep) {
      memory_.reset();
      capacity_ = 0;
    }
  }

 private:
  static constexpr int64_t kKeep = 16 << 20;  // floats
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> memory_;
  int64_t capacity_ = 0;
};

int64_t align16(int64_t floats) { return (floats + 15) / 16 * 16; }

template <class T>
void clear_rows(const AttentionParams& p, int64_t first, int64_t last) {
  for (int64_t token = first; token < last; ++token) {
    for (int64_t head = 0; head < p.num_heads; ++head) {
      T* row = static_cast<T*>(p.out) + token * p.out_token_stride + head * p.out_head_stride;
      std::fill_n(row, p.v_head_dim, T{});
      if (p.lse) p.lse[token * p.lse_token_stride + head * p.lse_head_stride] = -INFINITY;
    }
  }
}

void run_items(const AttentionParams& p, const Isa& isa, const Plan& plan, int num_threads, Arena& arena) {
  const int64_t row_cost = static_cast<int64_t>(p.head_dim + p.v_head_dim);
  constexpr int64_t kWorthAThread =
      1 << 20;  // element operations: under this, waking a thread costs more than it saves
  num_threads = static_cast<int>(std::min<int64_t>(
      {num_threads, static_cast<int64_t>(plan.items.size()), 1 + plan.cost * row_cost / kWorthAThread}));

  const int32_t group_size = p.num_heads / p.num_kv_heads;
  const int64_t stride = (p.v_head_dim + isa.chunk - 1) / isa.chunk * isa.chunk;
  const int64_t state_size = align16(state_floats(std::max(plan.stream_rows, plan.packed_rows), stride));
  const int64_t scratch_size = align16(isa.scratch_floats(p, plan.stream_rows, plan.packed_rows));
  const int64_t thread_size = 2 * state_size + scratch_size;  // the second state is for folding pieces within one item
  float* memory = arena.floats(num_threads * thread_size + plan.num_partials * state_size);
  float* partials = memory + num_threads * thread_size;
  const std::unique_ptr<std::atomic<int32_t>[]> arrived(
      plan.groups.empty() ? nullptr : new std::atomic<int32_t>[plan.groups.size()]());

  std::atomic<int64_t> cursor{0};
  const auto body = [&](int thread) {
    float* const mine = memory + thread * thread_size;
    float* const scratch = mine + 2 * state_size;
    for (int64_t alone = 0;; ++alone) {  // a thread without others needs no locked instruction for each item
      const int64_t i = num_threads == 1 ? alone : cursor.fetch_add(1, std::memory_order_relaxed);
      if (i >= static_cast<int64_t>(plan.order.size())) return;
      const WorkItem& item = plan.items[static_cast<size_t>(plan.order[static_cast<size_t>(i)])];
      const int64_t rows = item.rows(group_size);
      if (item.group < 0) {
        const State state = state_at(mine, rows, stride);
        if (item.piece_size == 0) {
          isa.attend(p, item, item.key_begin, item.key_end, state, scratch);
        } else {
          const State piece = state_at(mine + state_size, rows, stride);
          for (int64_t begin = item.key_begin; begin < item.key_end;) {
            const int64_t end = std::min(item.key_end, (begin / item.piece_size + 1) * item.piece_size);
            isa.attend(p, item, begin, end, begin == item.key_begin ? state : piece, scratch);
            if (begin != item.key_begin) isa.fold(state, piece, rows);
            begin = end;
          }
        }
        isa.finish(p, item, state);
        continue;
      }
      const Group& group = plan.groups[static_cast<size_t>(item.group)];
      float* const base = partials + group.first_partial * state_size;
      isa.attend(p, item, item.key_begin, item.key_end, state_at(base + item.piece * state_size, rows, stride),
                 scratch);
      // The last to arrive sees every piece: its increment acquires what the others released.
      if (arrived[static_cast<size_t>(item.group)].fetch_add(1, std::memory_order_acq_rel) + 1 == group.num_pieces) {
        const State total = state_at(base, rows, stride);
        for (int32_t piece = 1; piece < group.num_pieces; ++piece)
          isa.fold(total, state_at(base + piece * state_size, rows, stride), rows);
        isa.finish(p, item, total);
      }
    }
  };
  parallel(num_threads, body);
  arena.trim();
}

}  // namespace

void paged_attention(const AttentionParams& p, int num_threads) {
  check_indices(p);
  const Isa& isa = selected_isa();
  thread_local struct {
    Plan plan;
    Arena arena;
  } kept;
  make_plan(p, isa, num_threads, kept.plan);
  if (!kept.plan.items.empty()) run_items(p, isa, kept.plan, num_threads, kept.arena);
  // Query rows past the last sequence are padding: they see no key. Cleared last: all that can fail is behind, so where
  // memory was not to be had nothing was written.
  const int32_t padding = p.query_start_loc[p.num_seqs];
  const auto clear = p.dtype == DType::f32 ? clear_rows<float> : clear_rows<uint16_t>;
  clear(p, padding, p.num_tokens);
}

}  // namespace pagedcore::cpu
