// What a call says of its sequences, held to what the CPU's check_indices refuses. The kernels survive all of it: what
// lies outside is masked (work.h, rows.h). Here it is flagged, so that a caller hears of it.
#pragma once

#include <cstdint>

#include "pagedcore/device.h"
#include "pagedcore/params.h"
#include "report.h"

namespace pagedcore::gpu {

// Query starts that do not rise from 0 to at most num_tokens, lengths below 0, and either beyond what the caller said
// they are at most. Thread `first` of `count` looks at sequences first, first + count and so on.
PAGEDCORE_DEVICE void check_sequences(const AttentionParams& p, int64_t first, int64_t count) {
  bool wrong = first == 0 && p.query_start_loc[0] != 0;
  for (int64_t seq = first; seq < p.num_seqs; seq += count) {
    const int64_t start = p.query_start_loc[seq], end = p.query_start_loc[seq + 1], seq_len = p.seq_lens[seq];
    wrong = wrong || end < start || end > p.num_tokens || seq_len < 0;
    wrong = wrong || end - start > p.max_query_len || seq_len > p.max_seq_len;
  }
  if (wrong) report(p.faults, DeviceFault::sequence);
}

}  // namespace pagedcore::gpu
