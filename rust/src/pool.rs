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
macro_rules! zeroed {
    ($type:ty, $len:expr) => {{
        // `vec![0; n]` takes zeroed pages from the system, but aborts where there are none: so ask first.
        let mut probe: Vec<$type> = Vec::new();
        match probe.try_reserve_exact($len) {
            Ok(()) => {
                drop(probe);
                Ok(vec![0; $len])
            }
            Err(_) => Err(crate::error::Error::argument(
                "num_blocks",
                $len,
                crate::error::Expected::That("a number for whose bookkeeping there is memory"),
            )),
        }
    }};
}
pub(crate) use zeroed;

impl BlockPool {
    /// A pool of `num_blocks` blocks of `block_size` tokens, all free but block 0.
    ///
    /// O(num_blocks / 64): the arrays are zeroed pages that are first touched when a block is first used.
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

    /// Checks every invariant of this level. O(num_blocks).
    ///
    /// # Errors
    /// [`Error::Corruption`] that names the first one broken.
    pub fn check(&self) -> Result<()> {
        self.free.check()?;
        let (mut cached, mut used, mut fenced) = (0, 0, 0);
        for id in 1..self.num_blocks {
            let block = BlockId(id);
            let state = self.state(block)?;
            match state {
                BlockState::Cached => cached += 1,
                BlockState::Used => used += 1,
                BlockState::Fenced => fenced += 1,
                BlockState::Free | BlockState::Null => {}
            }
            if self.free.contains(block) != (state == BlockState::Free) {
                let in_map = u64::from(self.free.contains(block));
                return Err(Error::corruption(
                    "A2",
                    "a block's place in the free map",
                    id,
                    in_map,
                    1 - in_map,
                ));
            }
            if self.fences[block.index()] > self.newest_step() {
                let fence = self.fences[block.index()];
                return Err(Error::corruption(
                    "A5",
                    "a block's fence",
                    id,
                    fence,
                    self.newest_step(),
                ));
            }
        }
        for (what, found, expected) in [
            ("the number of cached blocks", self.num_cached, cached),
            ("the number of used blocks", self.num_used, used),
            ("the number of fenced blocks", self.num_fenced, fenced),
            (
                "the sum of all counts",
                self.free.len() + cached + used + fenced,
                self.num_blocks as usize - 1,
            ),
        ] {
            if found != expected {
                return Err(Error::corruption("A1", what, 0, found, expected));
            }
        }
        let null = BlockId::NULL;
        if self.refs[0] != 0 || self.nodes[0] != 0 || self.fences[0] != 0 || self.free.contains(null) {
            return Err(Error::corruption("A8", "the null block", 0, self.refs[0], 0));
        }
        self.check_flights()
    }

    /// Is every block that waits for a fence in that step's list, once?
    fn check_flights(&self) -> Result<()> {
        if self.flights.front().is_some_and(|flight| flight.complete) {
            return Err(Error::corruption(
                "A5",
                "the oldest step in flight",
                self.watermark + 1,
                1,
                0,
            ));
        }
        let mut listed = 0;
        for (flight, step) in self.flights.iter().zip(self.watermark + 1..) {
            let mut current: Vec<_> = flight
                .pending
                .iter()
                .filter(|block| self.fences[block.index()] == step)
                .collect();
            listed += current.len();
            current.sort_unstable();
            if let Some(pair) = current.windows(2).find(|pair| pair[0] == pair[1]) {
                return Err(Error::corruption(
                    "A5",
                    "a block's entries in a step's list",
                    pair[0].0,
                    2,
                    1,
                ));
            }
        }
        let pending = self.fences.iter().filter(|&&fence| fence > self.watermark).count();
        if listed != pending {
            return Err(Error::corruption(
                "A5",
                "the number of blocks in steps' lists",
                0,
                listed,
                pending,
            ));
        }
        Ok(())
    }
}

/// What the levels above need, and only they.
impl BlockPool {
    /// The step that stands for `after_step` in a release.
    ///
    /// # Errors
    /// [`Error::Step`] if it has not begun.
    pub(crate) fn fence(&self, after_step: Option<Step>) -> Result<Step> {
        let newest = self.newest_step();
        match after_step {
            Some(step) if step > newest => Err(Error::Step {
                step,
                expected: newest,
                problem: StepProblem::NotBegun,
            }),
            Some(step) => Ok(step),
            None => Ok(newest),
        }
    }

    /// The references to a block that somebody must hold.
    ///
    /// # Errors
    /// [`Error::Block`] if it is out of range, null, or held by nobody.
    pub(crate) fn used_refs(&self, block: BlockId) -> Result<u32> {
        match self.ref_count(block)? {
            0 if block == BlockId::NULL => Err(self.refuse(block, BlockProblem::Null)),
            0 => Err(self.refuse(block, BlockProblem::NotHeld)),
            refs => Ok(refs),
        }
    }

    pub(crate) fn refuse(&self, block: BlockId, problem: BlockProblem) -> Error {
        Error::Block {
            block,
            num_blocks: self.num_blocks,
            problem,
        }
    }

    /// The node that publishes the block.
    pub(crate) fn node_of(&self, block: BlockId) -> Option<NodeId> {
        NodeId::new(self.nodes[block.index()])
    }

    /// Does a step in flight perhaps read the block?
    pub(crate) fn is_pending(&self, block: BlockId) -> bool {
        self.fences[block.index()] > self.watermark
    }

    /// May the block not be evicted: is it held, or does it wait for a fence?
    pub(crate) fn is_pinned(&self, block: BlockId) -> bool {
        self.refs[block.index()] > 0 || self.is_pending(block)
    }

    /// Adds a reference to a published block, which leaves the cache if nobody held it. The caller has checked that
    /// there is room for one.
    pub(crate) fn acquire_published(&mut self, block: BlockId, cache: &mut dyn Reclaim) {
        let index = block.index();
        if self.refs[index] == 0 {
            self.num_cached -= 1;
            self.num_used += 1;
            self.peak_used = self.peak_used.max(self.num_used);
            if !self.is_pending(block)
                && let Some(node) = self.node_of(block)
            {
                cache.pin(node);
            }
        }
        self.refs[index] += 1;
    }

    /// Marks a used block as published by `node`.
    pub(crate) fn publish(&mut self, block: BlockId, node: NodeId) {
        self.nodes[block.index()] = node.get();
    }

    /// Marks a block as not published any more: it stays used, or becomes fenced or free.
    pub(crate) fn unpublish(&mut self, block: BlockId) {
        self.nodes[block.index()] = 0;
        if self.refs[block.index()] == 0 {
            self.num_cached -= 1;
            if self.is_pending(block) {
                self.num_fenced += 1;
            } else {
                self.free.insert(block);
            }
        }
    }

    /// Adds `times` references to each block. On error nothing changes.
    pub(crate) fn retain_times(&mut self, blocks: &[BlockId], times: u32) -> Result<()> {
        for (done, &block) in blocks.iter().enumerate() {
            let counted = self.used_refs(block).and_then(|refs| {
                refs.checked_add(times)
                    .ok_or_else(|| self.refuse(block, BlockProblem::TooManyReferences))
            });
            match counted {
                Ok(refs) => self.refs[block.index()] = refs,
                Err(error) => {
                    blocks[..done]
                        .iter()
                        .for_each(|block| self.refs[block.index()] -= times);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Blocks published by a node. O(num_blocks).
    pub(crate) fn num_published(&self) -> usize {
        self.nodes.iter().filter(|&&node| node != 0).count()
    }

    /// Checks that each block may be published, once, and is not yet. On error nothing changes.
    pub(crate) fn plan_publish(&mut self, blocks: &[BlockId]) -> Result<()> {
        // A mark finds a block that is named twice.
        const MARK: u32 = u32::MAX;
        let mut result = Ok(());
        let mut marked = 0;
        for &block in blocks {
            result = match self.used_refs(block) {
                Ok(_) if self.nodes[block.index()] != 0 => Err(self.refuse(block, BlockProblem::AlreadyPublished)),
                Ok(_) => Ok(()),
                Err(error) => Err(error),
            };
            if result.is_err() {
                break;
            }
            self.nodes[block.index()] = MARK;
            marked += 1;
        }
        blocks[..marked].iter().for_each(|block| self.nodes[block.index()] = 0);
        result
    }

    /// Takes one reference off each block. On error nothing changes; else `apply_release` or `undo_release` follows
    /// at once, with the same blocks.
    pub(crate) fn plan_release(&mut self, blocks: &[BlockId]) -> Result<()> {
        for (done, &block) in blocks.iter().enumerate() {
            match self.used_refs(block) {
                Ok(refs) => {
                    self.refs[block.index()] = refs - 1;
                    if refs == 1 {
                        self.scratch.push(block);
                    }
                }
                Err(error) => {
                    self.undo_release(&blocks[..done]);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    pub(crate) fn undo_release(&mut self, blocks: &[BlockId]) {
        blocks.iter().for_each(|block| self.refs[block.index()] += 1);
        self.scratch.clear();
    }

    /// Raises the fences, and finds the places of the blocks that nobody holds any more.
    pub(crate) fn apply_release(&mut self, blocks: &[BlockId], fence: Step, cache: &mut dyn Reclaim) {
        if fence > self.watermark {
            blocks.iter().for_each(|&block| self.raise_fence(block, fence));
        }
        let mut unheld = std::mem::take(&mut self.scratch);
        for block in unheld.drain(..) {
            self.settle_unheld(block, cache);
        }
        self.scratch = unheld;
    }

    /// Raises a block's fence to a step in flight.
    fn raise_fence(&mut self, block: BlockId, step: Step) {
        let fence = &mut self.fences[block.index()];
        if *fence < step {
            *fence = step;
            let flight = usize::try_from(step - self.watermark - 1)
                .ok()
                .and_then(|index| self.flights.get_mut(index));
            if let Some(flight) = flight {
                flight.pending.push(block);
            }
        }
    }

    /// The last reference to a block has just gone.
    fn settle_unheld(&mut self, block: BlockId, cache: &mut dyn Reclaim) {
        self.num_used -= 1;
        match (self.node_of(block), self.is_pending(block)) {
            (Some(node), pending) => {
                self.num_cached += 1;
                if !pending {
                    cache.unpin(node);
                }
            }
            (None, true) => self.num_fenced += 1,
            (None, false) => self.free.insert(block),
        }
    }

    /// A block's fence has just passed.
    fn settle_fence(&mut self, block: BlockId, cache: &mut dyn Reclaim) {
        if self.refs[block.index()] > 0 {
            return;
        }
        if let Some(node) = self.node_of(block) {
            cache.unpin(node);
        } else {
            self.num_fenced -= 1;
            self.free.insert(block);
        }
    }
}
