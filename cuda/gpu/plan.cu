// A plan: the running sum of work units over the sequences, and counters at zero. One block; no host knows the
// lengths, so a captured graph plans anew at each replay.
//
// Cut: thread t sums sequences [t * n, (t + 1) * n), the sums are scanned in shared memory, and each thread writes its
// own sequences' running sums. Shared memory: one int64 a thread.
#include "plan.h"

#include "pagedcore/device.h"

namespace pagedcore::gpu {
namespace {

using namespace device;

constexpr int kThreads = 256;

PAGEDCORE_DEVICE int64_t units_at(const AttentionParams& p, int seq) {
  return units_of_sequence(p, p.seq_lens[seq], int64_t{p.query_start_loc[seq + 1]} - p.query_start_loc[seq]);
}

PAGEDCORE_KERNEL(kThreads, 1) plan_kernel(const PlannedAttention params) {
  const AttentionParams& p = params.attention;
  const int t = thread_id();
  const int each = (p.num_seqs + kThreads - 1) / kThreads;
  const int begin = t * each < p.num_seqs ? t * each : p.num_seqs;
  const int end = begin + each < p.num_seqs ? begin + each : p.num_seqs;

  int64_t sum = 0;
  for (int seq = begin; seq < end; ++seq) sum += units_at(p, seq);

  auto* sums = reinterpret_cast<int64_t*>(shared_memory());
  sums[t] = sum;
  sync_threads();
  for (int step = 1; step < kThreads; step *= 2) {  // Hillis and Steele's inclusive scan
    const int64_t left = t >= step ? sums[t - step] : 0;
    sync_threads();
    sums[t] += left;
    sync_threads();
  }

  int64_t before = sums[t] - sum;
  for (int seq = begin; seq < end; ++seq) {
    params.plan.first_units[seq] = before;
    before += units_at(p, seq);
  }
  if (t == 0) params.plan.first_units[p.num_seqs] = sums[kThreads - 1];
  for (int i = t; i < params.plan.grid; i += kThreads) params.plan.counters[i] = 0;
}

}  // namespace

void load_plan() { load(plan_kernel); }

void run_plan(const PlannedAttention& params, Stream stream) {
  launch(plan_kernel, 1, 1, 1, kThreads, kThreads * sizeof(int64_t), stream, params);
}

}  // namespace pagedcore::gpu
