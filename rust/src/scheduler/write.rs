//! Second half of a step: the arrays of the plan.

use std::sync::Arc;

use super::requests::Requests;
use super::rows::Rows;
use super::update::{Entry, InFlight, Sample};
use super::{Draft, Scheduler};
use crate::error::Result;
use crate::ids::BlockId;
use crate::manager::KVCacheManager;
use crate::plan::{PlanArrays, PlanCounts, StepPlan};

/// What a line of the buffer's block table holds.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Line {
    /// The row whose table it has; if that has moved to another line, leftovers of it.
    pub row: u32,
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
        let in_flight = &mut self.in_flight;
        self.manager.take_held_copies(&mut in_flight.copies)?;
        self.manager.take_lives_to_zero(&mut in_flight.blocks_to_zero);
        in_flight.entries.clear();
        in_flight.samples.clear();
        let rows = &mut self.rows;
        in_flight
            .started
            .retain(|started| rows.live(started.row, started.uid).is_some());
        in_flight.width = draft.max_seq_len.div_ceil(self.config.block_size);
        in_flight.num_tokens = self.config.max_num_batched_tokens - draft.tokens_left;
        let counts = PlanCounts {
            step,
            num_seqs: draft.num_seqs,
            num_tokens: in_flight.num_tokens,
            num_samples: draft.num_samples,
            max_query_len: draft.max_query_len,
            max_seq_len: draft.max_seq_len,
            width: in_flight.width,
            table_updates: self.limits.max_table_updates - draft.updates_left,
            block_copies: in_flight.copies.len(),
            blocks_to_zero: in_flight.blocks_to_zero.len(),
        };
        let mut writer = Writer {
            plan: self.buffer.begin(&counts)?,
            rows: &mut self.rows,
            manager: &self.manager,
            lines: &mut self.lines,
            block_size: u32::try_from(self.config.block_size).expect("block_size is int32"),
            updates: 0,
        };
        writer.blocks(in_flight);
        writer.rows(in_flight, &self.requests)?;
        writer.samples(in_flight);
        debug_assert_eq!(writer.updates, counts.table_updates * 3);
        Ok(())
    }
}

/// The plan while it is written, and what is read for it.
struct Writer<'a> {
    plan: PlanArrays<'a>,
    rows: &'a mut Rows,
    manager: &'a KVCacheManager,
    lines: &'a mut [Line],
    block_size: u32,
    /// Numbers written to `table_updates`.
    updates: usize,
}

impl Writer<'_> {
    /// What is done to blocks before the step writes to them.
    fn blocks(&mut self, in_flight: &InFlight) {
        for (pair, copy) in self.plan.block_copies.chunks_exact_mut(2).zip(&in_flight.copies) {
            pair.copy_from_slice(&[int32(copy.src.0), int32(copy.dst.0)]);
        }
        for (block, &(zero, _)) in self.plan.blocks_to_zero.iter_mut().zip(&in_flight.blocks_to_zero) {
            *block = int32(zero.0);
        }
    }

    /// The sequences that were given tokens, in the order of the lines.
    fn rows(&mut self, in_flight: &mut InFlight, requests: &Requests) -> Result<()> {
        self.plan.input_sources.fill(-1);
        self.plan.query_start_loc[0] = 0;
        let mut token = 0;
        for place in 0..self.rows.lines.len() {
            let id = self.rows.lines[place];
            let row = self.rows.get(id);
            if row.scheduled == 0 {
                continue;
            }
            let i = in_flight.entries.len();
            let (uid, changed, leads, announced) = (row.uid, row.changed, row.leads, row.announced);
            in_flight.entries.push(Entry { row: id, uid, changed });
            if changed != u32::MAX || row.written_line as usize != i {
                self.table(i, id)?;
            }
            let row = self.rows.get(id);
            let (seq_len, samples) = (
                row.computed + row.scheduled,
                row.computed + row.scheduled == row.num_tokens,
            );
            let plan = &mut self.plan;
            if samples && row.scheduled == 1 {
                plan.input_ids[token] = int32(row.last_token);
                plan.positions[token] = int32(row.computed);
                plan.slot_mapping[token] = row.slot_base + i64::from(row.computed);
                token += 1;
            } else {
                token = self.chunk(id, token)?;
            }
            let plan = &mut self.plan;
            plan.query_start_loc[i + 1] = int32(token);
            plan.seq_lens[i] = int32(seq_len);
            plan.rows[i] = int32(id);
            if samples {
                in_flight.samples.push(Sample { row: id, uid, token });
            }
            if !announced {
                self.announce(in_flight, id);
            }
            if leads && samples {
                self.siblings(in_flight, requests, id, token);
            }
        }
        Ok(())
    }

    /// The siblings of a lead whose prompt ends here take their first samples from its last row.
    fn siblings(&mut self, in_flight: &mut InFlight, requests: &Requests, lead: u32, token: usize) {
        let request = &requests[self.rows.owner(lead).request];
        if !request.fresh {
            return;
        }
        for row in request.children.iter().filter_map(|child| child.row) {
            if row != lead {
                let sibling = self.rows.get(row);
                let (uid, announced) = (sibling.uid, sibling.announced);
                in_flight.samples.push(Sample { row, uid, token });
                if !announced {
                    self.announce(in_flight, row);
                }
            }
        }
    }

    fn announce(&mut self, in_flight: &mut InFlight, row: u32) {
        self.rows.get_mut(row).announced = true;
        let owner = self.rows.owner(row);
        let (request_id, index) = (Arc::clone(&owner.request_id), owner.index);
        let uid = self.rows.get(row).uid;
        in_flight.started.push(Started {
            row,
            request_id,
            index,
            uid,
        });
    }

    fn samples(&mut self, in_flight: &InFlight) {
        let places = self
            .plan
            .logits_indices
            .iter_mut()
            .zip(self.plan.sample_seqs.iter_mut());
        for ((index, seq), sample) in places.zip(&in_flight.samples) {
            *index = int32(sample.token) - 1;
            *seq = int32(sample.row);
        }
    }

    /// Brings line `i` of the block table up to date with the table of row `id`, tells the changes for tables kept
    /// elsewhere, and finds the place of the next token. O(entries that changed), or O(entries) if the line was
    /// another row's.
    fn table(&mut self, i: usize, id: u32) -> Result<()> {
        let blocks = self.manager.table(self.rows.seq(id))?;
        let line = &mut self.lines[i];
        let entries = &mut self.plan.block_table[i * self.plan.row_stride..][..self.plan.row_stride];
        if line.row != id && line.entries > 0 {
            let before = self.rows.get_mut(line.row);
            if before.written_line as usize == i {
                before.written_line = u32::MAX;
            }
        }
        let row = self.rows.get_mut(id);
        let changed = (row.changed as usize).min(blocks.len());
        let from = if row.written_line as usize == i { changed } else { 0 };
        for (entry, block) in entries[from..].iter_mut().zip(&blocks[from..]) {
            *entry = int32(block.0);
        }
        if line.entries > blocks.len() {
            entries[blocks.len()..line.entries].fill(0);
        }
        *line = Line {
            row: id,
            entries: blocks.len(),
        };
        let updates = self.plan.table_updates[self.updates..].chunks_exact_mut(3);
        for ((index, block), update) in blocks.iter().enumerate().skip(changed).zip(updates) {
            update.copy_from_slice(&[int32(id), int32(index), int32(block.0)]);
        }
        self.updates += 3 * (blocks.len() - changed);
        row.written_line = int32(i).cast_unsigned();
        row.changed = u32::MAX;
        row.slot_base = slot_base(
            blocks[(row.computed / self.block_size) as usize],
            row.computed,
            self.block_size,
        );
        Ok(())
    }

    /// Writes the tokens of row `id` from `token` on, block by block, and finds the place of the one after them.
    /// Returns where the next row's tokens start.
    fn chunk(&mut self, id: u32, token: usize) -> Result<usize> {
        let (block_size, seq) = (self.block_size, self.rows.seq(id));
        let row = self.rows.get_mut(id);
        let (start, stop) = (row.computed, row.computed + row.scheduled);
        let range = token..token + row.scheduled as usize;
        let ids = &mut self.plan.input_ids[range.clone()];
        self.manager.read_tokens(seq, start as usize, stop as usize, ids)?;
        for (position, p) in self.plan.positions[range.clone()].iter_mut().zip(int32(start)..) {
            *position = p;
        }
        // Not from the plan's own table, which is memory that its readers can write to.
        let blocks = self.manager.table(seq)?;
        let block = |position: u32| blocks[(position / block_size) as usize];
        let mut slots = self.plan.slot_mapping[range.clone()].iter_mut();
        let mut position = start;
        while position < stop {
            let end = ((position / block_size + 1) * block_size).min(stop);
            let base = slot_base(block(position), position, block_size);
            // The range first: a zip takes from its left side before it sees that its right side is at an end.
            for (p, place) in (position..end).zip(slots.by_ref()) {
                *place = base + i64::from(p);
            }
            position = end;
        }
        if stop < row.slots {
            row.slot_base = slot_base(block(stop), stop, block_size);
        }
        Ok(range.end)
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
