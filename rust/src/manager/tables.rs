//! What a manager knows of its sequences, and their tables in the caller's arrays.

use super::{
    BlockId, BlockPool, ContentKeys, Error, Expected, KVCacheManager, ManagerStats, NamespaceKey, PrefixCache, Result,
    SeqHandle, Vocabulary,
};
use crate::copies::Copies;

impl KVCacheManager {
    /// Its pool.
    #[must_use]
    pub fn pool(&self) -> &BlockPool {
        &self.pool
    }

    /// Its cache; None without prefix caching.
    #[must_use]
    pub fn cache(&self) -> Option<&PrefixCache> {
        self.caching.then_some(&self.cache)
    }

    /// Its pool and what the pool reclaims from, for calls of the levels below.
    pub fn parts_mut(&mut self) -> (&mut BlockPool, &mut PrefixCache) {
        (&mut self.pool, &mut self.cache)
    }

    /// Tokens in a block.
    #[must_use]
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Is a committed block given up where the cache has an equal one?
    #[must_use]
    pub fn merge_blocks(&self) -> bool {
        self.merging
    }

    /// Sequences, preempted ones included.
    #[must_use]
    pub fn num_sequences(&self) -> usize {
        self.sequences.len()
    }

    /// The token ids it takes.
    pub(crate) fn vocabulary(&self) -> Vocabulary {
        self.vocabulary
    }

    /// Copies that nobody has taken yet.
    #[must_use]
    pub fn num_block_copies(&self) -> usize {
        self.copies.pairs().len()
    }

    /// Blocks to zero that nobody has taken yet, at most.
    #[must_use]
    pub fn num_blocks_to_zero(&self) -> usize {
        self.zeroing.len()
    }

    /// Can [`fork`](Self::fork) make so many copies of the sequence, for all that its blocks' references allow?
    /// O(blocks).
    pub(crate) fn can_share(&self, seq: SeqHandle, times: u32) -> Result<bool> {
        let sequence = self.sequences.get(seq)?;
        let shared = &sequence.table[..sequence.computed.div_ceil(self.block_size)];
        Ok(shared
            .iter()
            .all(|&block| self.pool.ref_count(block).is_ok_and(|refs| refs <= u32::MAX - times)))
    }

    /// The sequence is a request's from now on, until it is freed; its forks are not.
    pub(crate) fn claim(&mut self, seq: SeqHandle) -> Result<()> {
        self.sequences.get_mut(seq)?.owned = true;
        Ok(())
    }

    /// Is the sequence a request's, and its scheduler's alone to change? O(1).
    pub(crate) fn is_claimed(&self, seq: SeqHandle) -> bool {
        self.sequences.get(seq).is_ok_and(|sequence| sequence.owned)
    }

    /// Sequences that are requests'. O([`peak_sequences`](Self::peak_sequences)).
    pub(crate) fn num_claimed(&self) -> usize {
        self.sequences.iter().filter(|(_, sequence)| sequence.owned).count()
    }

    /// Of the blocks that [`add`](Self::add) would find cached, those that are held already: a sequence that
    /// shares them leaves as many blocks to others as there were. Leaves no trace. O(that many).
    pub(crate) fn held_prefix(&self, tokens: &[u32], key: &NamespaceKey, content: &ContentKeys) -> usize {
        match self.cache.namespaces().find(key) {
            Some(root) if self.caching => {
                let (limit, size) = (tokens.len().saturating_sub(1) / self.block_size, self.block_size);
                let slice = |index: usize| &tokens[index * size..][..size];
                self.cache.held_run(root, limit, content, slice)
            }
            _ => 0,
        }
    }

    /// As [`held_prefix`](Self::held_prefix), of what [`resume`](Self::resume) would find.
    pub(crate) fn held_prefix_of(&self, seq: SeqHandle) -> Result<usize> {
        let sequence = self.sequences.get(seq)?;
        if !self.caching {
            return Ok(0);
        }
        let (limit, tokens) = ((sequence.tokens.len() - 1) / self.block_size, &sequence.tokens);
        let slice = |index| tokens.block(index, self.block_size);
        Ok(self.cache.held_run(sequence.namespace, limit, &sequence.content, slice))
    }

    /// A sequence's tokens.
    ///
    /// # Errors
    /// [`Error::StaleHandle`].
    pub fn num_tokens(&self, seq: SeqHandle) -> Result<usize> {
        Ok(self.sequences.get(seq)?.tokens.len())
    }

    /// How many of them have been computed, or found in the cache.
    ///
    /// # Errors
    /// [`Error::StaleHandle`].
    pub fn num_computed_tokens(&self, seq: SeqHandle) -> Result<usize> {
        Ok(self.sequences.get(seq)?.computed)
    }

    /// Positions that have been made writable.
    ///
    /// # Errors
    /// [`Error::StaleHandle`].
    pub fn num_slots(&self, seq: SeqHandle) -> Result<usize> {
        Ok(self.sequences.get(seq)?.slots)
    }

    /// Is the sequence without blocks until it is resumed?
    ///
    /// # Errors
    /// [`Error::StaleHandle`].
    pub fn is_preempted(&self, seq: SeqHandle) -> Result<bool> {
        Ok(self.sequences.get(seq)?.preempted)
    }

    /// The token at a position.
    ///
    /// # Errors
    /// [`Error::StaleHandle`]; [`Error::InvalidArgument`] for a position that has no token.
    pub fn token(&self, seq: SeqHandle, position: usize) -> Result<u32> {
        let tokens = &self.sequences.get(seq)?.tokens;
        tokens
            .get(position)
            .ok_or_else(|| Error::argument("position", position, Expected::AtMost(tokens.len() as u64 - 1)))
    }

    /// Writes the tokens of positions `start..stop` to the front of `out`. O(stop − start).
    ///
    /// # Errors
    /// [`Error::StaleHandle`]; [`Error::InvalidArgument`] for a range that is not one of the sequence's, or an `out`
    /// that is too short. On error nothing is written.
    pub fn read_tokens(&self, seq: SeqHandle, start: usize, stop: usize, out: &mut [i32]) -> Result<()> {
        let tokens = &self.sequences.get(seq)?.tokens;
        check_range(start, stop, tokens.len(), out.len())?;
        let mut out = out.iter_mut();
        for slice in tokens.slices(start, stop) {
            // Token ids are below 2³¹.
            slice
                .iter()
                .zip(&mut out)
                .for_each(|(&token, place)| *place = token.cast_signed());
        }
        Ok(())
    }

    /// A sequence's blocks, in order.
    ///
    /// # Errors
    /// [`Error::StaleHandle`].
    pub fn table(&self, seq: SeqHandle) -> Result<&[BlockId]> {
        Ok(&self.sequences.get(seq)?.table)
    }

    /// Writes a sequence's table to the front of `out` and returns its length. O(blocks).
    ///
    /// # Errors
    /// [`Error::StaleHandle`]; [`Error::InvalidArgument`] for a group that does not exist, or an `out` that is too
    /// short. On error nothing is written.
    pub fn block_table(&self, seq: SeqHandle, group: usize, out: &mut [i32]) -> Result<usize> {
        let table = self.table(seq)?;
        Self::check_group(group)?;
        if out.len() < table.len() {
            return Err(Error::argument("out", out.len(), Expected::AtLeast(table.len() as u64)));
        }
        for (place, block) in out.iter_mut().zip(table) {
            *place = block.0.cast_signed(); // block ids are below 2³¹
        }
        Ok(table.len())
    }

    /// Writes the slots of positions `start..stop` to the front of `out`: block · block size + offset.
    /// O(stop − start).
    ///
    /// # Errors
    /// [`Error::StaleHandle`]; [`Error::InvalidArgument`] for a group that does not exist, positions that have no
    /// block, or an `out` that is too short. On error nothing is written.
    pub fn slot_mapping(&self, seq: SeqHandle, start: usize, stop: usize, group: usize, out: &mut [i64]) -> Result<()> {
        let table = self.table(seq)?;
        Self::check_group(group)?;
        let size = self.block_size;
        check_range(start, stop, table.len() * size, out.len())?;
        let mut position = start;
        let mut out = out.iter_mut();
        while position < stop {
            let end = stop.min((position / size + 1) * size);
            #[allow(clippy::cast_possible_wrap)] // below 2³¹ · 2¹⁶: see `MAX_BLOCKS` and `MAX_BLOCK_SIZE`
            let first = (table[position / size].index() * size + position % size) as i64;
            (first..)
                .zip(out.by_ref().take(end - position))
                .for_each(|(slot, place)| *place = slot);
            position = end;
        }
        Ok(())
    }

    /// The most sequences there were at a time. O(1).
    #[must_use]
    pub fn peak_sequences(&self) -> usize {
        self.sequences.places()
    }

    /// Counts and totals. O([`peak_sequences`](Self::peak_sequences)).
    #[must_use]
    pub fn stats(&self) -> ManagerStats {
        let mut stats = ManagerStats {
            num_sequences: self.sequences.len(),
            copies: self.copied,
            zeroed: self.zeroed,
            pool: self.pool.stats(),
            cache: self.cache().map(PrefixCache::stats),
            ..ManagerStats::default()
        };
        for (_, sequence) in self.sequences.iter() {
            stats.num_preempted += usize::from(sequence.preempted);
            stats.num_tokens += sequence.tokens.len();
            stats.num_computed_tokens += sequence.computed;
        }
        stats
    }

    pub(super) fn check_group(group: usize) -> Result<()> {
        if group == 0 {
            Ok(())
        } else {
            Err(Error::argument("group", group, Expected::Exactly(0)))
        }
    }

    /// May the holder of a reference write to the block? Holds of pending copies are no obstacle: copies run first.
    pub(super) fn is_private(pool: &BlockPool, copies: &Copies, block: BlockId) -> bool {
        let refs = pool.ref_count(block).unwrap_or(0);
        pool.node_of(block).is_none() && (refs == 1 || refs == 1 + copies.holds(block))
    }
}

/// Is `start..stop` a range within `len`, and is there room for it?
fn check_range(start: usize, stop: usize, len: usize, room: usize) -> Result<()> {
    if stop > len {
        return Err(Error::argument("stop", stop, Expected::AtMost(len as u64)));
    }
    if start > stop {
        return Err(Error::argument("start", start, Expected::AtMost(stop as u64)));
    }
    if room < stop - start {
        return Err(Error::argument("out", room, Expected::AtLeast((stop - start) as u64)));
    }
    Ok(())
}
