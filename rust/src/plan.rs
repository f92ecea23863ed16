//! The step plan: everything one forward pass needs to know, in one contiguous buffer.
//!
//! A scheduler writes each step into a [`PlanBuffer`] of its ring and hands out [`StepPlan`]s, which are views: a
//! header that describes itself, then the arrays, each aligned to 64 bytes. So one copy moves a step to a device
//! and one broadcast moves it to the other ranks of a tensor-parallel group, where [`StepPlan::from_buffer`] checks
//! it completely before anybody indexes a cache with it.
//!
//! ```text
//! | header | input_ids | positions | ... | table_updates | copies | zero |   gap   | block_table      |
//! '----------------------- head_bytes, packed each step -----------------'         ' fixed place, rows kept
//! '------------------------------------- total_bytes ------------------------------- between the steps
//! ```
//!
//! The head is packed anew each step and is a few KiB when everybody decodes. The block table stays where it is, one
//! line of `row_stride` entries per sequence, so that only the entries that changed are written. A server that keeps
//! its own table on a device (`table_updates`) moves the head alone.
//!
//! Integers are stored in the byte order of the machine; a buffer of the other order fails the check of the magic.

mod buffer;
mod layout;
mod view;

pub use buffer::PlanLimits;
pub(crate) use buffer::{PlanArrays, PlanBuffer, PlanCounts};
pub use layout::{ARRAYS, Array, ArrayInfo, DType, HEADER_BYTES};
pub use view::{BlockTableView, StepPlan};

#[cfg(test)]
mod tests;
