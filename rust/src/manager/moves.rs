//! What is done to blocks before a step writes to them: some are zeroed, then some are copied.
//!
//! A caller takes what has come together, and makes it part of its next step. A scheduler, whose steps can be
//! cancelled, takes it with the references that the copies hold, and gives it back if the step is not run.

use super::{BlockId, BlockPool, KVCacheManager, Result};
use crate::copies::Pair;

/// Does the block live the life that it lived then?
fn lives(pool: &BlockPool, block: BlockId, generation: u32) -> bool {
    pool.used_refs(block).is_ok() && pool.generation(block) == Ok(generation)
}

impl KVCacheManager {
    /// Takes the pending copies, (src, dst) pairs of blocks: each dst is to become a copy of its src before anything
    /// of the next step is written, and after the blocks of [`take_blocks_to_zero`](Self::take_blocks_to_zero) were
    /// zeroed. The sources are held until the newest step begun is complete; with no step in flight, run the copies
    /// before the next call. O(pairs).
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](super::Error::InvalidArgument) for a group that does not exist.
    pub fn take_block_copies(&mut self, group: usize) -> Result<Vec<(BlockId, BlockId)>> {
        let mut pairs = Vec::new();
        self.take_block_copies_into(group, &mut pairs)?;
        Ok(pairs)
    }

    /// [`take_block_copies`](Self::take_block_copies), appending to `out`. O(pairs).
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](super::Error::InvalidArgument) for a group that does not exist.
    pub fn take_block_copies_into(&mut self, group: usize, out: &mut Vec<(BlockId, BlockId)>) -> Result<()> {
        Self::check_group(group)?;
        let (pool, sources) = (&self.pool, &mut self.scratch);
        self.copies.drain(|pair| {
            sources.push(pair.src);
            if lives(pool, pair.dst, pair.generation) {
                out.push((pair.src, pair.dst));
            }
        });
        self.release_scratch()
    }

    /// Takes the pending copies and appends them to `out`, each with its reference to src, to be given back by
    /// [`copies_were_made`](Self::copies_were_made) or [`put_back_copies`](Self::put_back_copies). O(pairs).
    pub(crate) fn take_held_copies(&mut self, out: &mut Vec<Pair>) -> Result<()> {
        if self.copies.is_empty() {
            return Ok(());
        }
        let (pool, sources) = (&self.pool, &mut self.scratch);
        self.copies.drain(|pair| {
            if lives(pool, pair.dst, pair.generation) {
                out.push(pair);
            } else {
                sources.push(pair.src);
            }
        });
        self.release_scratch()
    }

    /// Copies that were taken with their references have been made. Empties `copies`. O(pairs).
    pub(crate) fn copies_were_made(&mut self, copies: &mut Vec<Pair>) -> Result<()> {
        self.scratch.extend(copies.drain(..).map(|pair| pair.src));
        self.release_scratch()
    }

    /// Copies that were taken with their references were not made: they are pending again. Empties `copies`. O(pairs).
    pub(crate) fn put_back_copies(&mut self, copies: &mut Vec<Pair>) -> Result<()> {
        for pair in copies.drain(..) {
            if !lives(&self.pool, pair.dst, pair.generation) {
                self.scratch.push(pair.src);
                continue;
            }
            // Whoever copied from dst since, believing it to be whole, copies from its source.
            let redirected = self.copies.redirect(pair.dst, pair.src);
            if redirected > 0 {
                self.pool.retain_times(&[pair.src], redirected)?;
                self.scratch.extend((0..redirected).map(|_| pair.dst));
            }
            self.copies.add(pair);
        }
        self.release_scratch()
    }

    /// Takes the blocks that came from another tenant and have to be zeroed before the copies and writes of the next
    /// step. O(blocks · log blocks).
    pub fn take_blocks_to_zero(&mut self) -> Vec<BlockId> {
        let mut blocks = Vec::new();
        self.take_lives_to_zero(&mut blocks);
        self.zeroing.were_zeroed();
        blocks.into_iter().map(|(block, _)| block).collect()
    }

    /// [`take_blocks_to_zero`](Self::take_blocks_to_zero), appending to `out` each with its generation, until
    /// [`lives_were_zeroed`](Self::lives_were_zeroed) or [`put_back_lives_to_zero`](Self::put_back_lives_to_zero).
    /// O(blocks · log blocks).
    pub(crate) fn take_lives_to_zero(&mut self, out: &mut Vec<(BlockId, u32)>) {
        let before = out.len();
        self.zeroing
            .take(|block, generation| lives(&self.pool, block, generation), out);
        self.zeroed += (out.len() - before) as u64;
    }

    /// Blocks that were taken to be zeroed have been. Empties `blocks`. O(blocks).
    pub(crate) fn lives_were_zeroed(&mut self, blocks: &mut Vec<(BlockId, u32)>) {
        blocks.clear();
        self.zeroing.were_zeroed();
    }

    /// Blocks that were taken to be zeroed were not: they wait again. Empties `blocks`. O(blocks · log blocks).
    pub(crate) fn put_back_lives_to_zero(&mut self, blocks: &mut Vec<(BlockId, u32)>) {
        self.zeroed -= blocks.len() as u64;
        for (block, generation) in blocks.drain(..) {
            let lives = lives(&self.pool, block, generation);
            self.zeroing.put_back(block, generation, lives);
        }
    }

    /// Gives back a reference to each block of `scratch`, and empties it.
    fn release_scratch(&mut self) -> Result<()> {
        let released = self.pool.release(&self.scratch, None, &mut self.cache);
        if released.is_err() {
            self.scratch.clear();
        }
        self.forget_dropped();
        released
    }
}
