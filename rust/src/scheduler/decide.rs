//! First half of a step: which sequence gets how many tokens, who is preempted, who is admitted.
//!
//! One pass over the running sequences in rank order, then admissions. What a sequence gets is its `Row::scheduled`;
//! nothing else is kept. A sequence that decodes inside a block that is already its own costs a few loads and stores.

use super::lifecycle::is_reference_limit;
use super::rows::Stall;
use super::{Draft, Reason, Scheduler};
use crate::error::{Error, Result};
use crate::policy;

/// Calls of `schedule` from one look at what is held of a waiting request's prefix to the next.
pub(super) const HELD_PREFIX_TURNS: u64 = 16;

impl Scheduler {
    /// Gives tokens to sequences until the budget, the blocks or the work run out. On return the rows say who gets
    /// what, and the draft says how much that is. O(running), plus O(blocks) for those that need some or lose theirs.
    pub(super) fn decide(&mut self) -> Result<Draft> {
        let mut draft = Draft {
            tokens_left: self.config.max_num_batched_tokens,
            updates_left: self.limits.max_table_updates,
            ..Draft::default()
        };
        // Each sequence that decodes is kept one token of the budget, so that no prompt makes it wait.
        let decoding = self
            .rows
            .order
            .iter()
            .filter(|&&row| self.rows.get(row).pending() == 1)
            .count();
        draft.decodes_left = decoding;
        let mut place = 0;
        while place < self.rows.order.len() {
            self.give(place, &mut draft, true)?;
            place += 1;
        }
        // Who was preempted or stalled is owed the blocks that a newcomer would take.
        if draft.short_of_blocks {
            self.blocked = self
                .waiting
                .first_key_value()
                .map(|(_, &request)| (request, Reason::RunningShortOfBlocks));
        } else {
            self.admit(&mut draft)?;
        }
        Ok(draft)
    }

    /// Gives tokens to the sequence at `place` of the order, as many as it can take. Blocks are taken from the
    /// sequences behind it if `may_preempt` and there are too few.
    pub(super) fn give(&mut self, place: usize, draft: &mut Draft, may_preempt: bool) -> Result<()> {
        let id = self.rows.order[place];
        let row = self.rows.get_mut(id);
        let pending = row.pending();
        let mut chunk = if pending == 1 {
            draft.decodes_left = draft.decodes_left.saturating_sub(1);
            1.min(draft.tokens_left)
        } else {
            (pending as usize).min(draft.tokens_left.saturating_sub(draft.decodes_left))
        };
        if chunk == 0 {
            row.stall = Stall::TokenBudget;
            return Ok(());
        }
        if row.computed as usize + chunk > row.slots as usize {
            chunk = self.make_room(place, chunk, draft, may_preempt)?;
            if chunk == 0 {
                return Ok(());
            }
        }
        let row = self.rows.get_mut(id);
        if row.changed != u32::MAX {
            // The slots end with the table.
            let entries = (row.slots as usize).div_ceil(self.config.block_size);
            let updates = entries.saturating_sub(row.changed as usize);
            if updates > draft.updates_left {
                row.stall = Stall::TableUpdates;
                return Ok(());
            }
            draft.updates_left -= updates;
        }
        row.stall = Stall::None;
        row.scheduled = u32::try_from(chunk).expect("the budget is int32");
        draft.tokens_left -= chunk;
        draft.num_seqs += 1;
        draft.max_query_len = draft.max_query_len.max(chunk);
        let seq_len = row.computed + row.scheduled;
        draft.max_seq_len = draft.max_seq_len.max(seq_len as usize);
        if seq_len == row.num_tokens {
            draft.num_samples += 1;
            if row.leads {
                self.seat_siblings(id, draft);
            }
        }
        Ok(())
    }

    /// Makes the next `chunk` slots of a sequence its own; fewer if there are too few blocks even so, 0 if none.
    ///
    /// The victims are the requests behind it, the last first. It never preempts its own request: if it is the last
    /// it keeps what it has and waits, since those before it will end, and take its blocks sooner if they need them.
    fn make_room(&mut self, place: usize, chunk: usize, draft: &mut Draft, may_preempt: bool) -> Result<usize> {
        let id = self.rows.order[place];
        let mut chunk = chunk;
        loop {
            let row = self.rows.get(id);
            let computed = row.computed as usize;
            match self.reserve_slots(id, computed, chunk) {
                Ok(()) => return Ok(chunk),
                Err(Error::OutOfBlocks { needed, free }) => {
                    // A fence passes without anybody's help: what it holds back is not taken from a second victim.
                    let coming = free + self.manager.pool().num_fenced() as u64;
                    if may_preempt && needed > coming && self.preempt_behind(place, draft)? {
                        continue;
                    }
                    draft.short_of_blocks = true;
                    let block_size = self.config.block_size;
                    let held = self.rows.get(id).slots as usize / block_size;
                    let fits = (held + usize::try_from(free).unwrap_or(usize::MAX)).saturating_mul(block_size);
                    let smaller = fits.saturating_sub(computed);
                    if smaller == 0 || smaller >= chunk {
                        self.rows.get_mut(id).stall = Stall::Blocks;
                        self.rows.owner_mut(id).short = (needed, free);
                        return Ok(0);
                    }
                    chunk = smaller;
                }
                Err(error) if is_reference_limit(&error) => {
                    self.rows.get_mut(id).stall = Stall::References;
                    return Ok(0);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Asks the manager for slots to the end of the block in which the next `chunk` tokens end, so that it need not be
    /// asked again for each token of that block.
    fn reserve_slots(&mut self, id: u32, computed: usize, chunk: usize) -> Result<()> {
        let block_size = self.config.block_size;
        let (seq, told) = (self.rows.seq(id), self.rows.owner(id).told as usize);
        let slots = (computed + chunk).next_multiple_of(block_size);
        let changed = self.manager.allocate_slots(seq, slots - told, 0)?;
        let table_len = self.manager.table(seq)?.len();
        let row = self.rows.get_mut(id);
        row.table_changed(changed, table_len);
        row.slots = u32::try_from(table_len * block_size).unwrap_or(u32::MAX);
        Ok(())
    }

    /// Blocks of a waiting request's prefix that others hold, so that sharing them costs nothing. Where those known are
    /// less than `wanted` they are looked up again only now and then: a long prompt makes many lookups, and what is
    /// held of it changes little between steps.
    fn held_prefix(&mut self, request: u32, wanted: u64) -> Result<u64> {
        let r = &self.requests[request];
        if let Some((blocks, turn)) = r.held_prefix
            && blocks < wanted
            && self.turns < turn + HELD_PREFIX_TURNS
        {
            return Ok(blocks);
        }
        let blocks = match r.children[r.lead()].seq {
            Some(seq) => self.manager.held_prefix_of(seq)?,
            None => self.manager.held_prefix(&r.prompt, &r.namespace, &r.content_keys),
        } as u64;
        self.requests[request].held_prefix = Some((blocks, self.turns));
        Ok(blocks)
    }

    /// Preempts the last request of the order if it stands behind `place` and is another one. True if it did.
    fn preempt_behind(&mut self, place: usize, draft: &mut Draft) -> Result<bool> {
        let own = self.rows.owner(self.rows.order[place]).request;
        let Some(&last) = self.rows.order.last() else {
            return Ok(false);
        };
        let victim = self.rows.owner(last).request;
        if victim == own {
            return Ok(false);
        }
        for &row in self.rows.order[place + 1..].iter().rev() {
            if self.rows.owner(row).request != victim {
                break;
            }
            debug_assert_eq!(self.rows.get(row).scheduled, 0, "who is behind has not been served yet");
            if self.rows.get(row).pending() == 1 {
                draft.decodes_left -= 1;
            }
        }
        draft.short_of_blocks = true;
        self.preempt(victim)?;
        Ok(true)
    }

    /// Admits waiting requests in rank order until one cannot be, and remembers why. O(running) for the first and each
    /// that was preempted more often than the one before, plus O(its prefix) for each.
    fn admit(&mut self, draft: &mut Draft) -> Result<()> {
        // What those that run are still going to take, and the horizon that it was counted for.
        let mut promised = None;
        while let Some((_, &request)) = self.waiting.first_key_value() {
            let live = self.requests[request].live as usize;
            let reason = if live > self.rows.available() {
                Some(Reason::Rows {
                    needed: live,
                    available: self.rows.available(),
                })
            } else if draft.tokens_left == 0 {
                Some(Reason::TokenBudget)
            } else {
                self.try_start(request, &mut promised)?
            };
            if let Some(reason) = reason {
                self.blocked = Some((request, reason));
                return Ok(());
            }
            let lead = self.requests[request].lead_row();
            let row = self.rows.get(lead);
            self.stats.prefix_query_tokens += u64::from(row.num_tokens);
            self.stats.prefix_hit_tokens += u64::from(row.computed);
            // Whoever is behind it in the line may have been served in this step already.
            self.give(self.rows.position(lead), draft, false)?;
            if draft.short_of_blocks {
                break;
            }
            if let Some((horizon, blocks)) = &mut promised {
                *blocks += self.future_blocks(lead, *horizon);
            }
        }
        self.blocked = None;
        Ok(())
    }

    /// Takes a request's prefix hit and gives it a row, if its whole prompt fits beside what the running ones still
    /// need (`promised`, with the horizon that it is for); else says why not, and leaves no trace.
    fn try_start(&mut self, request: u32, promised: &mut Option<(u64, u64)>) -> Result<Option<Reason>> {
        let horizon = policy::growth_horizon(self.requests[request].preemptions, self.config.block_size as u64);
        let running = match *promised {
            Some((counted, blocks)) if counted == horizon => blocks,
            _ => {
                let order = self.rows.order.iter();
                order.map(|&row| self.future_blocks(row, horizon)).sum()
            }
        };
        *promised = Some((horizon, running));
        // Alone it needs no room to grow: what it grows into is its own cache, and it fits to its end (S3).
        let alone = self.rows.order.is_empty();
        let needed = running + self.starting_blocks(request, if alone { 0 } else { horizon });
        let available = self.available_blocks();
        // Cached blocks that nobody holds are no help: they are among those that can be had.
        if needed > available {
            let held = self.held_prefix(request, needed - available)?;
            if needed.saturating_sub(held) > available {
                let needed = needed.saturating_sub(held);
                return Ok(Some(Reason::Blocks { needed, available }));
            }
        }
        self.start(request)
    }

    /// Blocks that a running sequence, with the siblings that wait for it, may still take while each grows by
    /// `horizon` tokens; for a prompt that is being computed, the rest of the prompt included.
    fn future_blocks(&self, row: u32, horizon: u64) -> u64 {
        let block_size = self.config.block_size as u64;
        let r = self.rows.get(row);
        let held = u64::from(r.slots) / block_size;
        let own = policy::blocks_of(grown(r.num_tokens, horizon, r.limit), block_size).saturating_sub(held);
        if r.leads {
            own + self.sibling_blocks(self.rows.owner(row).request, horizon)
        } else {
            own
        }
    }

    /// Blocks that a waiting request needs to start, without its prefix hit.
    fn starting_blocks(&self, request: u32, horizon: u64) -> u64 {
        let r = &self.requests[request];
        let lead = &r.children[r.lead()];
        let own = policy::blocks_of(grown(lead.num_tokens, horizon, r.limit), self.config.block_size as u64);
        if r.live > 1 && horizon > 0 {
            own + self.sibling_blocks(request, horizon)
        } else {
            own
        }
    }

    /// Blocks that the siblings of a leading sequence take for themselves once they fork.
    fn sibling_blocks(&self, request: u32, horizon: u64) -> u64 {
        let block_size = self.config.block_size as u64;
        let r = &self.requests[request];
        let shared = u64::from(r.prompt_len) / block_size;
        let lead = r.lead();
        let siblings = r
            .children
            .iter()
            .enumerate()
            .filter(|&(i, child)| i != lead && child.is_live());
        siblings
            .map(|(_, child)| policy::blocks_of(grown(child.num_tokens, horizon, r.limit), block_size) - shared)
            .sum()
    }
}

/// Slots of a sequence of `num_tokens` after `horizon` more; the last token it can have needs none.
fn grown(num_tokens: u32, horizon: u64, limit: u32) -> u64 {
    u64::from(num_tokens).max(u64::from(num_tokens).saturating_add(horizon).min(u64::from(limit) - 1))
}
