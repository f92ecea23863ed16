//! What the levels above need of a pool, and only they.
//!
//! A release and a publication are planned before they are applied: a plan fails without a trace, and what was planned
//! cannot fail.

use super::{BlockPool, Reclaim};
use crate::error::{BlockProblem, Error, Result, StepProblem};
use crate::ids::{BlockId, NodeId, Step};

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

    /// Blocks published by a node. O(blocks).
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
    pub(super) fn settle_fence(&mut self, block: BlockId, cache: &mut dyn Reclaim) {
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
