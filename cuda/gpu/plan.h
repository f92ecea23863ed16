// The kernel that makes a plan.
#pragma once

#include "pagedcore/stream.h"
#include "work.h"

namespace pagedcore::gpu {

// Loads it onto the current device.
void load_plan();

// Fills all that is in the plan, and zeroes the counters.
void run_plan(const PlannedAttention& params, device::Stream stream);

}  // namespace pagedcore::gpu
