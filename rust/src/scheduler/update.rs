//! After a step: what it computed is committed, samples are appended, sequences end. Or it is undone.

use std::collections::HashSet;
use std::sync::Arc;

use super::Scheduler;
use super::lifecycle::{is_reference_limit, tell_tokens};
use super::write::Started;
use crate::copies::Pair;
use crate::error::{Error, Expected, Result, StepProblem};
use crate::ids::{BlockId, Step};
use crate::request::EndReason;

/// One sequence of the plan in flight.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub row: u32,
    pub uid: u64,
    /// `Row::changed` before the plan told the changes.
    pub changed: u32,
}

/// One sample of the plan in flight.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    pub row: u32,
    pub uid: u64,
    /// One past the token whose logits it is drawn from.
    pub token: usize,
}

/// The step that was scheduled last, until its update.
#[derive(Debug)]
pub(super) struct InFlight {
    pub step: Option<Step>,
    pub num_tokens: usize,
    /// Blocks of its longest sequence.
    pub width: usize,
    pub entries: Vec<Entry>,
    pub samples: Vec<Sample>,
    /// Block copies, whose sources are held until they were made.
    pub copies: Vec<Pair>,
    /// Blocks to zero, each with its generation.
    pub blocks_to_zero: Vec<(BlockId, u32)>,
    pub started: Vec<Started>,
    pub preempted: Vec<Arc<str>>,
}

/// A sequence that ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finished {
    /// Its request.
    pub request_id: Arc<str>,
    /// Which sequence of the request.
    pub index: usize,
    /// Why it ended.
    pub reason: EndReason,
}

/// What an update came to. Lent by the scheduler until its next call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepResult {
    /// Sequences that ended in this update, each told exactly once.
    pub finished: Vec<Finished>,
    /// Rows that got a token; rows of sequences that had ended, or were given up, are not among them.
    pub rows: Vec<i32>,
    /// Their tokens.
    pub tokens: Vec<i32>,
}

impl StepResult {
    pub(super) fn with_capacity(rows: usize) -> Self {
        Self {
            finished: Vec::new(),
            rows: Vec::with_capacity(rows),
            tokens: Vec::with_capacity(rows),
        }
    }
}

impl InFlight {
    pub fn with_capacity(rows: usize) -> Self {
        Self {
            step: None,
            num_tokens: 0,
            width: 0,
            entries: Vec::with_capacity(rows),
            samples: Vec::with_capacity(rows),
            copies: Vec::new(),
            blocks_to_zero: Vec::new(),
            started: Vec::new(),
            preempted: Vec::new(),
        }
    }
}

impl Scheduler {
    /// Takes the samples of the step in flight: `sampled[k]` belongs to `sample_seqs[k]`. What belongs to sequences
    /// that ended since is ignored. `num_sampled` is 1 for each sample, if given; `failed[k]` ends the request of
    /// sample k with "error": nothing that this step computed of it is published, and its other samples are ignored.
    ///
    /// O(sequences of the step + its copies and blocks to zero), and O(blocks) for those that end or become full and
    /// for those whose fence passes; no allocation unless a sequence ends.
    ///
    /// # Errors
    /// Nothing has changed on any of these. `Step` if `step` is not the one in flight; `InvalidArgument` for an array
    /// of the wrong length; `TokenOutOfRange` for a sample outside the vocabulary that is not ignored.
    pub fn update(
        &mut self,
        step: Step,
        sampled: &[i32],
        num_sampled: Option<&[i32]>,
        failed: Option<&[bool]>,
    ) -> Result<&StepResult> {
        self.usable()?;
        self.check_update(step, sampled, num_sampled, failed)?;
        let applied = self.apply(step, sampled, failed);
        self.guard(applied)?;
        Ok(&self.result)
    }

    fn check_update(
        &self,
        step: Step,
        sampled: &[i32],
        num_sampled: Option<&[i32]>,
        failed: Option<&[bool]>,
    ) -> Result<()> {
        self.check_step(step)?;
        let due = &self.in_flight.samples;
        let lengths = [
            ("sampled_token_ids", Some(sampled.len())),
            ("num_sampled", num_sampled.map(<[_]>::len)),
            ("failed", failed.map(<[_]>::len)),
        ];
        for (argument, len) in lengths {
            if let Some(len) = len.filter(|&len| len != due.len()) {
                return Err(Error::argument(argument, len, Expected::Exactly(due.len() as u64)));
            }
        }
        if let Some(&n) = num_sampled.and_then(|counts| counts.iter().find(|&&n| n != 1)) {
            return Err(Error::argument("num_sampled", n, Expected::Exactly(1)));
        }
        if self.vocabulary.check(sampled).is_ok() {
            return Ok(());
        }
        // Only now, since a server's samples are as a rule all in order: which of them count?
        let request = |sample: &Sample| {
            let live = self.rows.get(sample.row).uid == sample.uid;
            live.then(|| self.rows.owner(sample.row).request)
        };
        let failed: HashSet<u32> = due
            .iter()
            .zip(failed.unwrap_or_default())
            .filter_map(|(sample, &failed)| request(sample).filter(|_| failed))
            .collect();
        for (position, (&token, sample)) in sampled.iter().zip(due).enumerate() {
            let counts = request(sample).is_some_and(|request| !failed.contains(&request));
            if counts && !self.vocabulary.contains(token) {
                return Err(self.vocabulary.refuse(token, position));
            }
        }
        Ok(())
    }

    /// Is `step` the one in flight?
    fn check_step(&self, step: Step) -> Result<()> {
        let newest = self.manager.pool().newest_step();
        match self.in_flight.step {
            Some(due) if due == step => Ok(()),
            Some(due) => {
                let problem = if step > due {
                    StepProblem::NotBegun
                } else {
                    StepProblem::AlreadyComplete
                };
                Err(Error::Step {
                    step,
                    expected: due,
                    problem,
                })
            }
            None if step == 0 || step > newest => Err(Error::Step {
                step,
                expected: newest,
                problem: StepProblem::NotBegun,
            }),
            None => Err(Error::Step {
                step,
                expected: newest + 1,
                problem: StepProblem::AlreadyComplete,
            }),
        }
    }

    fn apply(&mut self, step: Step, sampled: &[i32], failed: Option<&[bool]>) -> Result<()> {
        // First of all: what is given back from here on is read by no step.
        self.complete_step(step)?;
        self.in_flight.started.clear();
        self.in_flight.preempted.clear();
        self.stats.steps += 1;
        self.stats.scheduled_tokens += self.in_flight.num_tokens as u64;
        self.stats.block_copies += self.in_flight.copies.len() as u64;
        self.stats.blocks_zeroed += self.in_flight.blocks_to_zero.len() as u64;
        self.manager.lives_were_zeroed(&mut self.in_flight.blocks_to_zero);
        self.manager.copies_were_made(&mut self.in_flight.copies)?;
        let mut result = std::mem::take(&mut self.result);
        result.finished.clear();
        result.rows.clear();
        result.tokens.clear();
        let applied = self.apply_rows(sampled, failed, &mut result);
        self.stats.sampled_tokens += result.rows.len() as u64;
        self.result = result;
        applied
    }

    fn apply_rows(&mut self, sampled: &[i32], failed: Option<&[bool]>, result: &mut StepResult) -> Result<()> {
        // Before anything of this step is committed.
        for k in (0..sampled.len()).filter(|&k| failed.is_some_and(|failed| failed[k])) {
            let sample = self.in_flight.samples[k];
            if self.rows.live(sample.row, sample.uid).is_some() {
                let request = self.rows.owner(sample.row).request;
                self.end(request, None, &EndReason::Error, &mut result.finished)?;
            }
        }
        for i in 0..self.in_flight.entries.len() {
            let entry = self.in_flight.entries[i];
            let Some(row) = self.rows.live(entry.row, entry.uid) else {
                continue;
            };
            row.computed += std::mem::take(&mut row.scheduled);
            let (computed, leads) = (row.computed, row.leads);
            if computed >= row.commit_at {
                self.tell_computed(entry.row)?;
            }
            if leads && computed >= self.requests[self.rows.owner(entry.row).request].prompt_len {
                self.fork_siblings(entry.row)?;
            }
        }
        for (k, &token) in sampled.iter().enumerate() {
            let sample = self.in_flight.samples[k];
            let Some(row) = self.rows.live(sample.row, sample.uid) else {
                continue;
            };
            let token = token.cast_unsigned();
            let full = row.num_tokens + 1 == row.limit;
            let (stopped, more_stops) = (row.stop == token, row.more_stops);
            let tell = self.rows.push(sample.row, token);
            result.rows.push(sample.row.cast_signed());
            result.tokens.push(token.cast_signed());
            if full || stopped || more_stops {
                let owner = self.rows.owner(sample.row);
                let (request, index) = (owner.request, owner.index as usize);
                let stopped = stopped || self.requests[request].stop.binary_search(&token).is_ok();
                if stopped || full {
                    let reason = if stopped { EndReason::Stop } else { EndReason::Length };
                    self.end(request, Some(index), &reason, &mut result.finished)?;
                    continue;
                }
            }
            if tell {
                tell_tokens(&mut self.manager, &mut self.rows, sample.row)?;
            }
        }
        Ok(())
    }

    fn complete_step(&mut self, step: Step) -> Result<()> {
        self.in_flight.step = None;
        let (pool, cache) = self.manager.parts_mut();
        pool.complete_step(step, cache)
    }

    /// Tells the manager what is computed of a sequence, which publishes the blocks that are full. Not where the cache
    /// has one of them already, with as many references as can be counted: that is left to the end of the next block.
    pub(super) fn tell_computed(&mut self, row: u32) -> Result<()> {
        tell_tokens(&mut self.manager, &mut self.rows, row)?;
        let (seq, told) = (self.rows.seq(row), self.rows.get(row).computed);
        let computed = told as usize;
        let block_size = self.config.block_size;
        self.rows.get_mut(row).commit_at = u32::try_from((computed / block_size + 1) * block_size).unwrap_or(u32::MAX);
        let changed = match self.manager.commit(seq, computed) {
            Err(error) if is_reference_limit(&error) => return Ok(()),
            changed => changed?,
        };
        self.rows.owner_mut(row).told = told;
        let table_len = self.manager.table(seq)?.len();
        self.rows.get_mut(row).table_changed(changed, table_len);
        Ok(())
    }

    /// Undoes the step in flight, as if it had not been scheduled: nothing of it counts as computed, and what its
    /// plan told (copies, blocks to zero, table changes, rows) is told again by the next one. Preemptions and
    /// admissions stay. O(sequences of the step + copies + blocks to zero + blocks whose fence passes), and
    /// O(pending copies) for each copy that another one was made from meanwhile.
    ///
    /// # Errors
    /// `Step` if `step` is not the one in flight.
    pub fn cancel(&mut self, step: Step) -> Result<()> {
        self.usable()?;
        self.check_step(step)?;
        let undone = self.undo(step);
        self.guard(undone)
    }

    fn undo(&mut self, step: Step) -> Result<()> {
        self.complete_step(step)?;
        self.stats.cancelled_steps += 1;
        let in_flight = &mut self.in_flight;
        self.manager.put_back_copies(&mut in_flight.copies)?;
        self.manager.put_back_lives_to_zero(&mut in_flight.blocks_to_zero);
        for i in 0..self.in_flight.entries.len() {
            let Entry { row, uid, changed } = self.in_flight.entries[i];
            let block_size = u32::try_from(self.config.block_size).expect("block_size is int32");
            let Some(row) = self.rows.live(row, uid) else { continue };
            row.scheduled = 0;
            // At least from the block of the next token on, so that its slot is looked up again.
            row.changed = row.changed.min(changed).min(row.computed / block_size);
        }
        Ok(())
    }
}
