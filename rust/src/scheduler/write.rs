//! Second half of a step: the arrays of the plan.

use std::sync::Arc;

use super::rows::Row;
use super::update::{Entry, Sample};
use super::{Draft, Scheduler};
use crate::error::Result;
use crate::ids::BlockId;
use crate::plan::{PlanArrays, PlanCounts, StepPlan};

/// What a line of the buffer's block table holds.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Line {
    /// The assignment whose table it is; 0 if none.
    pub uid: u64,
    /// Entries from the start that are not 0.
    pub entries: usize,
}

/// A row that was assigned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Started {
    /// The row.
    pub row: u32,
    /// Whose it is now.
    pub request_id: Arc<str>,
    /// Which sequence of the request.
    pub index: u32,
    /// The assignment, to drop it from the list if it ends before a plan has told it.
    pub(super) uid: u64,
}

/// A plan and what it says about requests by name.
#[derive(Clone, Debug)]
pub struct PlannedStep<'a> {
    plan: StepPlan<'a>,
    scheduler: &'a Scheduler,
}

impl<'a> PlannedStep<'a> {
    /// The arrays.
    #[must_use]
    pub const fn plan(&self) -> &StepPlan<'a> {
        &self.plan
    }

    /// For each sequence of the plan its request and its index in it.
    ///
    /// # Panics
    /// Never: each row of a plan was assigned.
    #[must_use = "iterators are lazy"]
    pub fn requests(&self) -> impl ExactSizeIterator<Item = (&'a Arc<str>, u32)> {
        let rows = &self.scheduler.rows;
        self.scheduler.in_flight.entries.iter().map(|entry| {
            // Also of a row that was given up since: rows are only assigned by the next `schedule`.
            let owner = rows.last_owner(entry.row).expect("the row was assigned");
            (&owner.request_id, owner.index)
        })
    }

    /// Rows assigned since the last plan: a server resets its arrays of these rows.
    #[must_use]
    pub fn started(&self) -> &'a [Started] {
        &self.scheduler.in_flight.started
    }

    /// Requests preempted since the last plan.
    #[must_use]
    pub fn preempted(&self) -> &'a [Arc<str>] {
        &self.scheduler.in_flight.preempted
    }
}

impl Scheduler {
    pub(super) fn planned(&self) -> PlannedStep<'_> {
        PlannedStep {
            plan: self.buffer.plan(),
            scheduler: self,
        }
    }

    /// Begins the step and writes what `decide` has given. O(tokens + table entries that changed).
    pub(super) fn write(&mut self, draft: Draft) -> Result<()> {
        // Only now: what was given back until here is read by no step.
        let step = self.manager.parts_mut().0.begin_step();
        self.in_flight.step = Some(step);
        self.take_copies()?;
        let in_flight = &mut self.in_flight;
        self.manager.take_blocks_to_zero_into(&mut in_flight.blocks_to_zero);
        in_flight.entries.clear();
        in_flight.samples.clear();
        let rows = &mut self.rows;
        in_flight
            .started
            .retain(|started| rows.live(started.row, started.uid).is_some());
        in_flight.num_tokens = self.config.max_num_batched_tokens - draft.tokens_left;
        let counts = PlanCounts {
            step,
            num_seqs: draft.num_seqs,
            num_tokens: in_flight.num_tokens,
            num_samples: draft.num_samples,
            max_query_len: draft.max_query_len,
            max_seq_len: draft.max_seq_len,
            width: draft.max_seq_len.div_ceil(self.config.block_size),
            table_updates: self.limits.max_table_updates - draft.updates_left,
            block_copies: in_flight.copies.len(),
            blocks_to_zero: in_flight.blocks_to_zero.len(),
        };
        let mut plan = self.buffer.begin(&counts);
        plan.input_sources.fill(-1);
        plan.query_start_loc[0] = 0;
        for (pair, copy) in plan.block_copies.chunks_exact_mut(2).zip(&in_flight.copies) {
            pair.copy_from_slice(&[int32(copy.src.0), int32(copy.dst.0)]);
        }
        for (block, &zero) in plan.blocks_to_zero.iter_mut().zip(&in_flight.blocks_to_zero) {
            *block = int32(zero.0);
        }
        let block_size = u32::try_from(self.config.block_size).expect("block_size is int32");
        let (mut token, mut updates) = (0, 0);
        for place in 0..self.rows.lines.len() {
            let id = self.rows.lines[place];
            let row = self.rows.get_mut(id);
            if row.scheduled == 0 {
                continue;
            }
            let i = in_flight.entries.len();
            in_flight.entries.push(Entry {
                row: id,
                uid: row.uid,
                changed: row.changed,
            });
            if row.changed != u32::MAX || row.written_line as usize != i || self.lines[i].uid != row.uid {
                let blocks = self.manager.table(Self::seq_of(row))?;
                write_table(
                    &mut plan,
                    &mut self.lines[i],
                    &mut updates,
                    i,
                    id,
                    row,
                    blocks,
                    block_size,
                );
            }
            let end = token + row.scheduled as usize;
            if row.scheduled == 1 && row.computed + 1 == row.num_tokens {
                plan.input_ids[token] = int32(row.last_token);
                plan.positions[token] = int32(row.computed);
                plan.slot_mapping[token] = row.slot_base + i64::from(row.computed);
            } else {
                let (from, to) = (row.computed as usize, (row.computed + row.scheduled) as usize);
                self.manager
                    .read_tokens(Self::seq_of(row), from, to, &mut plan.input_ids[token..end])?;
                write_chunk(&mut plan, token, i, row, block_size);
            }
            token = end;
            plan.query_start_loc[i + 1] = int32(token);
            let seq_len = row.computed + row.scheduled;
            plan.seq_lens[i] = int32(seq_len);
            plan.rows[i] = int32(id);
            if seq_len == row.num_tokens {
                in_flight.samples.push(Sample {
                    row: id,
                    uid: row.uid,
                    token,
                });
            }
            let (leads, announced) = (row.leads, std::mem::replace(&mut row.announced, true));
            if !announced {
                in_flight.announce(&self.rows, id);
            }
            if leads && seq_len == self.rows.get(id).num_tokens {
                Self::write_siblings(in_flight, &mut self.rows, &self.requests, id, token);
            }
        }
        for (k, sample) in in_flight.samples.iter().enumerate() {
            plan.logits_indices[k] = int32(sample.token) - 1;
            plan.sample_seqs[k] = int32(sample.row);
        }
        debug_assert_eq!((token, updates), (counts.num_tokens, counts.table_updates * 3));
        Ok(())
    }

    /// The siblings of a lead whose prompt ends here take their first samples from its last row.
    fn write_siblings(
        in_flight: &mut super::update::InFlight,
        rows: &mut super::rows::Rows,
        requests: &super::requests::Requests,
        lead_row: u32,
        token: usize,
    ) {
        let request = &requests[rows.owner(lead_row).request];
        if !request.fresh {
            return;
        }
        for row in request
            .children
            .iter()
            .filter_map(|child| child.row)
            .filter(|&row| row != lead_row)
        {
            let sibling = rows.get_mut(row);
            in_flight.samples.push(Sample {
                row,
                uid: sibling.uid,
                token,
            });
            if !std::mem::replace(&mut sibling.announced, true) {
                in_flight.announce(rows, row);
            }
        }
    }
}

/// Brings line `i` of the block table up to date, tells the changes for tables kept elsewhere, and finds the place
/// of the next token. O(entries that changed), or O(entries) when another sequence had the line.
#[expect(
    clippy::too_many_arguments,
    reason = "the parts of a scheduler that are borrowed at the same time"
)]
fn write_table(
    plan: &mut PlanArrays<'_>,
    line: &mut Line,
    updates: &mut usize,
    i: usize,
    id: u32,
    row: &mut Row,
    blocks: &[BlockId],
    block_size: u32,
) {
    let entries = &mut plan.block_table[i * plan.row_stride..][..plan.row_stride];
    let kept = line.uid == row.uid && row.written_line as usize == i;
    let from = if kept {
        (row.changed as usize).min(blocks.len())
    } else {
        0
    };
    for (entry, block) in entries[from..].iter_mut().zip(&blocks[from..]) {
        *entry = int32(block.0);
    }
    if line.entries > blocks.len() {
        entries[blocks.len()..line.entries].fill(0);
    }
    *line = Line {
        uid: row.uid,
        entries: blocks.len(),
    };
    row.written_line = int32(i).cast_unsigned();
    for (index, block) in blocks.iter().enumerate().skip(row.changed as usize) {
        plan.table_updates[*updates..][..3].copy_from_slice(&[int32(id), int32(index), int32(block.0)]);
        *updates += 3;
    }
    row.changed = u32::MAX;
    row.slot_base = slot_base(blocks[(row.computed / block_size) as usize], row.computed, block_size);
}

/// Writes the places of a chunk's tokens, block by block, and finds that of the token after it.
fn write_chunk(plan: &mut PlanArrays<'_>, token: usize, i: usize, row: &mut Row, block_size: u32) {
    let (start, stop) = (row.computed, row.computed + row.scheduled);
    let range = token..token + row.scheduled as usize;
    for (position, p) in plan.positions[range.clone()].iter_mut().zip(int32(start)..) {
        *position = p;
    }
    let table = &plan.block_table[i * plan.row_stride..][..plan.row_stride];
    let base = |position: u32| {
        slot_base(
            BlockId(table[(position / block_size) as usize].cast_unsigned()),
            position,
            block_size,
        )
    };
    let mut slots = plan.slot_mapping[range].iter_mut();
    let mut position = start;
    while position < stop {
        let end = ((position / block_size + 1) * block_size).min(stop);
        let first = base(position) + i64::from(position);
        // The range first: a zip takes from its left side before it sees that its right side is at an end.
        for (slot, place) in (first..first + i64::from(end - position)).zip(slots.by_ref()) {
            *place = slot;
        }
        position = end;
    }
    if stop < row.slots {
        row.slot_base = base(stop);
    }
}

/// Slot of position p of the block in which `position` lies, less p.
fn slot_base(block: BlockId, position: u32, block_size: u32) -> i64 {
    i64::from(block.0) * i64::from(block_size) - i64::from(position - position % block_size)
}

/// Every count and id of a plan is below 2³¹: the configuration's limits, the pool's, and the check of token ids.
fn int32(n: impl TryInto<i32>) -> i32 {
    n.try_into().unwrap_or_else(|_| unreachable!("beyond int32"))
}
