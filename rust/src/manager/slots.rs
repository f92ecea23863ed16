//! Where the next tokens go, and what is known once they were computed.

use super::{BlockId, BlockProblem, Error, Expected, KVCacheManager, Result, SeqHandle, Sequence};
use crate::copies::Pair;
use crate::prefix::CommitAt;

/// What `allocate_slots` will do to a table.
struct Plan {
    /// The position after the last slot.
    end: usize,
    /// The first entry that the slots are in.
    first: usize,
    /// One past the last entry that the slots are in and that exists.
    existing: usize,
    /// Of those, entries that are shared or published: each is replaced.
    replaced: usize,
    /// Entries to append.
    appended: usize,
}

impl Plan {
    fn needed(&self) -> usize {
        self.appended.saturating_add(self.replaced)
    }
}

impl KVCacheManager {
    /// Makes positions [computed, computed + `num_new_tokens` + `num_lookahead_tokens`) of a sequence writable, and
    /// its own: takes blocks for those beyond the table, and replaces a block that is shared or published by a fresh
    /// one, into which the old one is to be copied ([`take_block_copies`](Self::take_block_copies)). The last
    /// one that shares a block writes in place. Returns the first table entry that changed, or the length of the
    /// table if none did. Idempotent. O(blocks that the positions are in).
    ///
    /// # Errors
    /// [`Error::OutOfBlocks`]; [`Error::StaleHandle`]; [`Error::InvalidArgument`] for a sequence that is preempted, or
    /// numbers whose sum overflows. On error nothing changes.
    pub fn allocate_slots(
        &mut self,
        seq: SeqHandle,
        num_new_tokens: usize,
        num_lookahead_tokens: usize,
    ) -> Result<usize> {
        let plan = self.plan_slots(seq, num_new_tokens, num_lookahead_tokens)?;
        let sequence = self.sequences.get_mut(seq)?;
        let before = sequence.table.len();
        if plan.needed() == 0 {
            sequence.slots = sequence.slots.max(plan.end);
            return Ok(before);
        }
        let hint = sequence.table.last().copied().unwrap_or(BlockId::NULL);
        let mut fresh = std::mem::take(&mut self.scratch);
        let allocated = self
            .pool
            .allocate_near(plan.needed(), hint, &mut self.cache, &mut fresh);
        if let Err(error) = allocated {
            self.scratch = fresh;
            return Err(error);
        }
        let tenant = self.cache.tenant(sequence.namespace);
        for &block in &fresh {
            self.zeroing.assign(block, self.pool.generation(block)?, tenant);
        }
        // A copy into a block that its last holder gave back behind our back is not made.
        let orphans: Vec<_> = fresh.iter().filter_map(|&block| self.copies.cancel(block)).collect();
        // The first ones come right after the table's last block if those were free.
        let mut replacements = fresh.split_off(plan.appended);
        sequence.table.append(&mut fresh);
        fresh.extend(orphans);
        self.scratch = fresh;
        let mut first_changed = before;
        // From the end. A source among the entries whose pair was just cancelled looks shared, as the pair's reference
        // goes back below. Only the first entry can be one: a fork shares computed positions alone. So its turn comes
        // when all replacements are used.
        for index in (plan.first..plan.existing).rev() {
            let old = sequence.table[index];
            if Self::is_private(&self.pool, &self.copies, old) {
                continue;
            }
            let Some(new) = replacements.pop() else { break };
            sequence.table[index] = new;
            first_changed = index;
            // Even a block without computed tokens is copied: steps in flight may be writing to it.
            let src = if let Some(src) = self.copies.source_of(old) {
                self.pool.retain(&[src])?;
                self.scratch.push(old);
                src
            } else {
                // The pair takes over the sequence's reference.
                old
            };
            let generation = self.pool.generation(new)?;
            self.copies.add(Pair {
                src,
                dst: new,
                generation,
            });
            self.copied += 1;
        }
        debug_assert!(replacements.is_empty(), "{replacements:?} replace nothing");
        sequence.slots = sequence.slots.max(plan.end);
        self.pool.release(&self.scratch, None, &mut self.cache)?;
        self.forget_dropped();
        Ok(first_changed)
    }

    /// How many blocks [`allocate_slots`](Self::allocate_slots) with the same arguments would take at this moment.
    /// O(blocks that the positions are in).
    ///
    /// # Errors
    /// As `allocate_slots`, but for [`Error::OutOfBlocks`].
    pub fn blocks_needed(&self, seq: SeqHandle, num_new_tokens: usize, num_lookahead_tokens: usize) -> Result<usize> {
        Ok(self.plan_slots(seq, num_new_tokens, num_lookahead_tokens)?.needed())
    }

    /// The positions below `num_computed_tokens` have been computed, by a step that is complete: full blocks become
    /// findable. Where the cache has an equal block already, the table takes that one (with `merge_blocks`) and the
    /// sequence's own is released after the newest step begun. Returns the first table entry that changed, or the
    /// length of the table if none did. O(blocks that became full).
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for less than was computed before, more tokens than there are, or more than slots
    /// were allocated for; [`Error::StaleHandle`]; [`Error::Block`] if a block in the cache has 2³² − 1 references.
    /// On error nothing changes.
    pub fn commit(&mut self, seq: SeqHandle, num_computed_tokens: usize) -> Result<usize> {
        let size = self.block_size;
        let sequence = self.sequences.get_mut(seq)?;
        let most = sequence.tokens.len().min(sequence.slots);
        if !(sequence.computed..=most).contains(&num_computed_tokens) {
            let expected = Expected::Between(sequence.computed as u64, most as u64);
            return Err(Error::argument("num_computed_tokens", num_computed_tokens, expected));
        }
        let mut full = num_computed_tokens / size;
        if !self.copies.is_empty() {
            // A block that is still to be copied into holds nothing yet. It waits for a later commit.
            let candidates = sequence.table.iter().take(full).skip(sequence.committed);
            let ready = candidates.take_while(|&&block| self.copies.source_of(block).is_none());
            full = full.min(sequence.committed + ready.count());
        }
        let mut first_changed = sequence.table.len();
        let current = sequence.era == self.cache.era(sequence.namespace);
        if self.caching && current && full > sequence.committed {
            let parent = sequence.node.and_then(|node| self.cache.resolve(node));
            // Without merging, the node above can be another sequence's, and gone with it: then start over.
            let first = if parent.is_some() { sequence.committed } else { 0 };
            let Sequence {
                tokens,
                table,
                content,
                namespace,
                ..
            } = &mut *sequence;
            if !self.copies.is_empty() || !self.zeroing.is_empty() {
                self.scratch.extend_from_slice(&table[first..full]);
            }
            let at = CommitAt {
                namespace: *namespace,
                parent,
                fence: self.pool.newest_step(),
                merge: self.merging,
                content,
                first,
            };
            let committed = self.cache.commit_run(&mut self.pool, at, &mut table[first..full], |i| {
                tokens.block(first + i, size)
            });
            let (node, changed) = committed.inspect_err(|_| self.scratch.clear())?;
            if changed < full - first {
                first_changed = first + changed;
            }
            sequence.node = node.map(|node| self.cache.handle(node));
            sequence.committed = full;
        }
        sequence.computed = num_computed_tokens;
        self.forget_dropped();
        Ok(first_changed)
    }

    /// Is `allocate_slots` possible but for the blocks, and what would it do?
    fn plan_slots(&self, seq: SeqHandle, num_new_tokens: usize, num_lookahead_tokens: usize) -> Result<Plan> {
        let sequence = self.sequences.get(seq)?;
        if sequence.preempted {
            return Err(Self::is_preempted_error(seq));
        }
        let room = usize::MAX - sequence.computed;
        if num_new_tokens > room {
            return Err(Error::argument(
                "num_new_tokens",
                num_new_tokens,
                Expected::AtMost(room as u64),
            ));
        }
        let room = room - num_new_tokens;
        if num_lookahead_tokens > room {
            return Err(Error::argument(
                "num_lookahead_tokens",
                num_lookahead_tokens,
                Expected::AtMost(room as u64),
            ));
        }
        let end = sequence.computed + num_new_tokens + num_lookahead_tokens;
        let first = sequence.computed / self.block_size;
        let last = if end == sequence.computed {
            first
        } else {
            end.div_ceil(self.block_size)
        };
        // The computed positions have blocks, so `first` is at most the length.
        let length = sequence.table.len();
        let existing = last.min(length);
        let mut replaced = 0;
        for &block in &sequence.table[first..existing] {
            let refs = self.pool.ref_count(block)?;
            if refs == 0 {
                return Err(Error::corruption(
                    "A3",
                    "the references of a block in a table",
                    block.0,
                    0,
                    1,
                ));
            }
            if Self::is_private(&self.pool, &self.copies, block) {
                continue;
            }
            replaced += 1;
            if let Some(src) = self.copies.source_of(block)
                && self.pool.ref_count(src)? == u32::MAX
            {
                return Err(self.pool.refuse(src, BlockProblem::TooManyReferences));
            }
        }
        Ok(Plan {
            end,
            first,
            existing,
            replaced,
            appended: last.saturating_sub(length),
        })
    }
}
