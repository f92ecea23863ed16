//! Level 0: the physical blocks of one tier.
//!
//! A pool knows nothing of tokens, sequences or tensors. It hands out block ids, counts who holds each, and takes a
//! block back when nobody does and no forward pass can still read it.
//!
//! | state | references | published | meaning |
//! |---|---|---|---|
//! | used | ≥ 1 | either | somebody's table, or somebody's hand, has it |
//! | cached | 0 | yes | findable by its tokens; evicted when space is needed |
//! | fenced | 0 | no | given back, but a step in flight may still read it |
//! | free | 0 | no | can be had |
//!
//! The state of a block is not stored: it follows from its reference count, its node in the trie and its fence, so
//! that it cannot contradict them. What is kept beside them are four counters and the map of free blocks.
//!
//! A *fence* is a step number. A block released with fence s can be reused when all steps begun up to s are
//! complete. Steps may complete in any order; what counts is the watermark, the last step before which no step is
//! in flight.

mod check;
mod inner;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use crate::bitmap::FreeMap;
use crate::error::{BlockProblem, Error, Expected, Result, StepProblem};
use crate::ids::{BlockId, NodeId, Step};

/// Block ids travel in int32 arrays.
pub const MAX_BLOCKS: usize = i32::MAX as usize;
/// A bound on the block size, so that slot numbers and token places cannot overflow.
pub const MAX_BLOCK_SIZE: usize = 1 << 16;

/// Who keeps blocks that nobody holds, and gives them up when space is needed: the prefix cache.
///
/// The pool calls it inside its own operations; an implementation changes its own bookkeeping alone and cannot fail.
pub trait Reclaim {
    /// How many blocks [`evict_into`](Self::evict_into) can give at this moment.
    fn evictable(&self) -> usize;

    /// Forgets the `n` least recently used of them and appends their blocks to `out`; `n` is at most `evictable()`.
    fn evict_into(&mut self, n: usize, out: &mut Vec<BlockId>);

    /// The node's block may not be evicted from now on: somebody holds it.
    fn pin(&mut self, node: NodeId);

    /// The node's block may be evicted again: nobody holds it, and no step in flight reads it.
    fn unpin(&mut self, node: NodeId);
}

/// A pool without a prefix cache: nothing is ever published, so nothing can be reclaimed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NoCache;

impl Reclaim for NoCache {
    fn evictable(&self) -> usize {
        0
    }
    fn evict_into(&mut self, _: usize, _: &mut Vec<BlockId>) {}
    fn pin(&mut self, _: NodeId) {}
    fn unpin(&mut self, _: NodeId) {}
}

/// The state of a block; see the [module](self).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BlockState {
    /// Can be had.
    Free,
    /// Findable by its tokens, evictable when no step reads it.
    Cached,
    /// Held by somebody.
    Used,
    /// Given back; a step in flight may still read it.
    Fenced,
    /// Block 0.
    Null,
}

/// A pool's counts at one moment, and its totals since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// Blocks, the null block included.
    pub num_blocks: usize,
    /// Tokens in a block.
    pub block_size: usize,
    /// Free blocks.
    pub num_free: usize,
    /// Cached blocks, those that wait for a fence included.
    pub num_cached: usize,
    /// Used blocks.
    pub num_used: usize,
    /// Fenced blocks.
    pub num_fenced: usize,
    /// The most blocks that were in use at a time.
    pub peak_used: usize,
    /// Blocks handed out so far.
    pub allocated: u64,
    /// Cached blocks evicted for an allocation so far.
    pub evicted: u64,
    /// The newest step begun.
    pub newest_step: Step,
    /// All steps up to this one are complete.
    pub completed_through: Step,
}

/// A step in flight.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Flight {
    complete: bool,
    /// Blocks whose fence was raised to this step. A block whose fence has been raised further since is ignored.
    pending: Vec<BlockId>,
}

/// The physical blocks of one tier, each an id below `num_blocks`. Block 0 is the null block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockPool {
    num_blocks: u32,
    block_size: u32,
    /// References per block.
    refs: Vec<u32>,
    /// The node that publishes the block; 0 is none.
    nodes: Vec<u32>,
    /// The step that has to be complete, with all before it, until the block may be reused.
    fences: Vec<Step>,
    /// How many times the block was handed out.
    generations: Vec<u32>,
    free: FreeMap,
    num_cached: usize,
    num_used: usize,
    num_fenced: usize,
    peak_used: usize,
    allocated: u64,
    evicted: u64,
    /// All steps up to this one are complete.
    watermark: Step,
    /// The steps after the watermark, in order; the first is never complete.
    flights: VecDeque<Flight>,
    /// Kept for its capacity, empty between calls.
    scratch: Vec<BlockId>,
}

/// Zeros that cost no time until they are touched, or an error where there is no memory for them.
///
/// `vec![0; n]` takes zeroed pages from the system, but aborts where there are none. So ask first for what could be too
/// much; asking for less than 32 MiB would teach the C library's allocator to keep such pieces, and to zero them.
macro_rules! zeroed {
    ($type:ty, $len:expr) => {{
        let mut probe: Vec<$type> = Vec::new();
        let large = $len >= (32 << 20) / size_of::<$type>();
        if large && probe.try_reserve_exact($len).is_err() {
            Err(crate::error::Error::argument(
                "num_blocks",
                $len,
                crate::error::Expected::That("a number for whose bookkeeping there is memory"),
            ))
        } else {
            drop(probe);
            Ok(vec![0; $len])
        }
    }};
}
pub(crate) use zeroed;

impl BlockPool {
    /// A pool of `num_blocks` blocks of `block_size` tokens, all free but block 0.
    ///
    /// O(blocks / 64): the arrays are zeroed pages that are first touched when a block is first used.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] unless 2 ≤ `num_blocks` ≤ 2³¹ − 1 and 1 ≤ `block_size` ≤ 65,536, or where there is
    /// no memory for 20 bytes per block.
    pub fn new(num_blocks: usize, block_size: usize) -> Result<Self> {
        if !(2..=MAX_BLOCKS).contains(&num_blocks) {
            return Err(Error::argument(
                "num_blocks",
                num_blocks,
                Expected::Between(2, MAX_BLOCKS as u64),
            ));
        }
        if !(1..=MAX_BLOCK_SIZE).contains(&block_size) {
            return Err(Error::argument(
                "block_size",
                block_size,
                Expected::Between(1, MAX_BLOCK_SIZE as u64),
            ));
        }
        #[allow(clippy::cast_possible_truncation)] // both are checked above
        let (blocks, size) = (num_blocks as u32, block_size as u32);
        Ok(Self {
            num_blocks: blocks,
            block_size: size,
            refs: zeroed!(u32, num_blocks)?,
            nodes: zeroed!(u32, num_blocks)?,
            fences: zeroed!(Step, num_blocks)?,
            generations: zeroed!(u32, num_blocks)?,
            free: FreeMap::new(blocks),
            num_cached: 0,
            num_used: 0,
            num_fenced: 0,
            peak_used: 0,
            allocated: 0,
            evicted: 0,
            watermark: 0,
            flights: VecDeque::new(),
            scratch: Vec::new(),
        })
    }

    /// Takes `n` blocks, each with one reference, evicting cached ones from `cache` if it must.
    /// O(1) per block.
    ///
    /// # Errors
    /// [`Error::OutOfBlocks`] if fewer than `n` blocks are free or evictable. On error nothing changes.
    pub fn allocate(&mut self, n: usize, cache: &mut dyn Reclaim) -> Result<Vec<BlockId>> {
        let mut blocks = Vec::new();
        self.allocate_near(n, BlockId::NULL, cache, &mut blocks)?;
        Ok(blocks)
    }

    /// [`allocate`](Self::allocate), appending to `out`, and preferring the blocks right after `hint`
    /// ([`BlockId::NULL`]: no preference). O(1) per block.
    ///
    /// # Errors
    /// [`Error::OutOfBlocks`] if fewer than `n` blocks are free or evictable. On error nothing changes.
    pub fn allocate_near(
        &mut self,
        n: usize,
        hint: BlockId,
        cache: &mut dyn Reclaim,
        out: &mut Vec<BlockId>,
    ) -> Result<()> {
        let short = n.saturating_sub(self.free.len());
        if short > 0 {
            let evictable = cache.evictable();
            if short > evictable {
                return Err(Error::OutOfBlocks {
                    needed: n as u64,
                    free: (self.free.len() + evictable) as u64,
                });
            }
            let mut evicted = std::mem::take(&mut self.scratch);
            cache.evict_into(short, &mut evicted);
            for block in evicted.drain(..) {
                self.unpublish(block);
            }
            self.scratch = evicted;
            self.evicted += short as u64;
        }
        let start = out.len();
        self.free.take(n, hint, out);
        for block in &out[start..] {
            self.refs[block.index()] = 1;
            self.generations[block.index()] = self.generations[block.index()].wrapping_add(1);
        }
        self.num_used += n;
        self.peak_used = self.peak_used.max(self.num_used);
        self.allocated += n as u64;
        Ok(())
    }

    /// Adds a reference to each block; each must be used. O(1) per block.
    ///
    /// # Errors
    /// [`Error::Block`] for a block that is out of range, null, held by nobody, or held 2³² − 1 times. On error
    /// nothing changes.
    pub fn retain(&mut self, blocks: &[BlockId]) -> Result<()> {
        self.retain_times(blocks, 1)
    }

    /// Gives back one reference to each block (a block named twice: two). A block that nobody holds any more is
    /// cached if it is published, else free; either way it is reused only when all steps begun up to `after_step`
    /// are complete. None means the newest step begun; 0 means that no step reads these blocks.
    /// O(1) per block, amortised.
    ///
    /// # Errors
    /// [`Error::Step`] if `after_step` has not begun; [`Error::Block`] for a block that is out of range, null, or has
    /// fewer references than are given back. On error nothing changes.
    pub fn release(&mut self, blocks: &[BlockId], after_step: Option<Step>, cache: &mut dyn Reclaim) -> Result<()> {
        let fence = self.fence(after_step)?;
        self.plan_release(blocks)?;
        self.apply_release(blocks, fence, cache);
        Ok(())
    }

    /// Begins a step and returns its number. Call it before the step's first table is read. O(1).
    pub fn begin_step(&mut self) -> Step {
        self.flights.push_back(Flight::default());
        self.newest_step()
    }

    /// Completes a step that is in flight, in any order. Blocks whose fence has passed become free, or evictable.
    /// O(1) per such block, amortised.
    ///
    /// # Errors
    /// [`Error::Step`] if the step has not begun or is complete already. On error nothing changes.
    pub fn complete_step(&mut self, step: Step, cache: &mut dyn Reclaim) -> Result<()> {
        let (oldest, newest) = (self.watermark + 1, self.newest_step());
        if step == 0 || step > newest {
            return Err(Error::Step {
                step,
                expected: newest,
                problem: StepProblem::NotBegun,
            });
        }
        let flight = step
            .checked_sub(oldest)
            .and_then(|index| self.flights.get_mut(usize::try_from(index).ok()?))
            .filter(|flight| !flight.complete)
            .ok_or(Error::Step {
                step,
                expected: oldest,
                problem: StepProblem::AlreadyComplete,
            })?;
        flight.complete = true;
        while self.flights.front().is_some_and(|flight| flight.complete) {
            let flight = self.flights.pop_front().unwrap_or_default();
            self.watermark += 1;
            for block in flight.pending {
                // A fence that was raised further stands in a later step's list.
                if self.fences[block.index()] == self.watermark {
                    self.settle_fence(block, cache);
                }
            }
        }
        Ok(())
    }

    /// At most how many blocks' fences pass when `step` completes. O(steps completed with it).
    #[must_use]
    pub fn fences_up_to(&self, step: Step) -> usize {
        let passed = (self.watermark + 1..)
            .zip(&self.flights)
            .take_while(|(number, flight)| *number == step || flight.complete);
        passed.map(|(_, flight)| flight.pending.len()).sum()
    }

    /// The newest step begun, 0 before the first.
    #[must_use]
    pub fn newest_step(&self) -> Step {
        self.watermark + self.flights.len() as Step
    }

    /// All steps up to this one are complete.
    #[must_use]
    pub fn completed_through(&self) -> Step {
        self.watermark
    }

    /// Steps begun and not complete.
    #[must_use]
    pub fn steps_in_flight(&self) -> usize {
        self.flights.iter().filter(|flight| !flight.complete).count()
    }

    /// References to a block; 0 for the null block.
    ///
    /// # Errors
    /// [`Error::Block`] if it is out of range.
    pub fn ref_count(&self, block: BlockId) -> Result<u32> {
        self.refs
            .get(block.index())
            .copied()
            .ok_or_else(|| self.refuse(block, BlockProblem::OutOfRange))
    }

    /// How many times the block was handed out; a number kept beside an id tells whether it is still the same life.
    ///
    /// # Errors
    /// [`Error::Block`] if it is out of range.
    pub fn generation(&self, block: BlockId) -> Result<u32> {
        self.generations
            .get(block.index())
            .copied()
            .ok_or_else(|| self.refuse(block, BlockProblem::OutOfRange))
    }

    /// The state of a block.
    ///
    /// # Errors
    /// [`Error::Block`] if it is out of range.
    pub fn state(&self, block: BlockId) -> Result<BlockState> {
        let refs = self.ref_count(block)?;
        Ok(if block == BlockId::NULL {
            BlockState::Null
        } else if refs > 0 {
            BlockState::Used
        } else if self.nodes[block.index()] != 0 {
            BlockState::Cached
        } else if self.is_pending(block) {
            BlockState::Fenced
        } else {
            BlockState::Free
        })
    }

    /// Blocks, the null block included.
    #[must_use]
    pub fn num_blocks(&self) -> usize {
        self.num_blocks as usize
    }

    /// Tokens in a block.
    #[must_use]
    pub fn block_size(&self) -> usize {
        self.block_size as usize
    }

    /// Free blocks.
    #[must_use]
    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    /// Cached blocks: published and held by nobody.
    #[must_use]
    pub fn num_cached(&self) -> usize {
        self.num_cached
    }

    /// Used blocks: held by somebody.
    #[must_use]
    pub fn num_used(&self) -> usize {
        self.num_used
    }

    /// Fenced blocks: held by nobody, but a step in flight may still read them.
    #[must_use]
    pub fn num_fenced(&self) -> usize {
        self.num_fenced
    }

    /// Counts and totals. O(1).
    #[must_use]
    pub fn stats(&self) -> PoolStats {
        PoolStats {
            num_blocks: self.num_blocks(),
            block_size: self.block_size(),
            num_free: self.num_free(),
            num_cached: self.num_cached,
            num_used: self.num_used,
            num_fenced: self.num_fenced,
            peak_used: self.peak_used,
            allocated: self.allocated,
            evicted: self.evicted,
            newest_step: self.newest_step(),
            completed_through: self.watermark,
        }
    }
}
