// The table of functions that each instruction set provides, and the choice between them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "pagedcore/params.h"
#include "pagedcore/split.h"
#include "state.h"

namespace pagedcore::cpu {

struct Isa {
  const char* name;
  int chunk;        // rows of o are padded to a multiple of it
  int stream_rows;  // from this many query rows a KV head, an item is packed
  int packed_rows;  // a packed item has at most so many rows (or one query of a larger group)

  // Floats of scratch memory that `attend` needs, given the most rows of any streamed and of any packed item.
  int64_t (*scratch_floats)(const AttentionParams&, int64_t stream_rows, int64_t packed_rows);
  // Leaves the state of the item's rows over keys [key_begin, key_end) in `state`.
  void (*attend)(const AttentionParams&, const WorkItem&, int64_t key_begin, int64_t key_end, State state,
                 float* scratch);
  // into = into + other.
  void (*fold)(State into, State other, int64_t rows);
  // Writes out and lse of the item's rows.
  void (*finish)(const AttentionParams&, const WorkItem&, State state);
  // Reads `bytes` (a multiple of 64): the yardstick of the benchmarks.
  float (*read)(const void* data, int64_t bytes);
};

// Whether a choice has been made. It is made once, before the first call that needs it.
bool isa_selected();
// The best one that this machine runs.
void select_best_isa();
// The one with this name. Throws an ArgumentError that names `source` if it is unknown or cannot run here, and then
// changes nothing.
void select_isa(const char* source, const char* name);
// What was chosen, or the best one.
const Isa& selected_isa();
std::vector<std::string> runnable_isas();

}  // namespace pagedcore::cpu
