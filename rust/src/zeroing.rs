//! Which blocks have to be zeroed before their next write: those that come to another tenant.
//!
//! The pool's memory is zeroed when it is made, so a block's first owner gets zeros. After that a block remembers the
//! tenant that had it last; when another one gets it, it waits to be taken with the next step, before the copies and
//! the writes. One tenant alone never causes a zeroing.
//!
//! A block waits in one life (generation): given back and taken again behind our back, it is its new owner's.
//!
//! What was taken may yet come back, if its step is cancelled. Until that is known nobody can say what such a block
//! holds: whoever gets it meanwhile, the same tenant too, has it zeroed once more.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::{Error, Result};
use crate::ids::BlockId;
use crate::namespace::{LAST_SERIAL, TenantSerial};
use crate::pool::zeroed;

/// The tenants of a pool's blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Zeroing {
    /// Per block: the tenant that had it last (0: none). `LAST_SERIAL` is equal to no tenant, itself included.
    tags: Vec<TenantSerial>,
    /// The blocks that wait, and the life of each in which it does.
    waiting: BTreeMap<BlockId, u32>,
    /// The blocks that were taken, and neither zeroed nor put back yet.
    taken: BTreeSet<BlockId>,
}

impl Zeroing {
    pub(crate) fn new(num_blocks: usize) -> Result<Self> {
        Ok(Self {
            tags: zeroed!(u32, num_blocks)?,
            waiting: BTreeMap::new(),
            taken: BTreeSet::new(),
        })
    }

    /// Blocks that wait.
    pub(crate) fn len(&self) -> usize {
        self.waiting.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// The block begins a life with a tenant. O(1) where the tenant is the last one's and nothing waits or was taken,
    /// else O(log blocks of those).
    pub(crate) fn assign(&mut self, block: BlockId, generation: u32, tenant: TenantSerial) {
        let last = std::mem::replace(&mut self.tags[block.index()], tenant);
        let another = last != 0 && (last != tenant || tenant == LAST_SERIAL);
        // One that waits still holds what a tenant before the last one wrote, and one that was taken perhaps.
        if another || self.waiting.contains_key(&block) || self.taken.contains(&block) {
            self.waiting.insert(block, generation);
        }
    }

    /// Nobody has the block any more: if it waits, its next owner's turn decides.
    pub(crate) fn give_up(&mut self, block: BlockId) {
        if self.waiting.remove(&block).is_some() {
            // What it holds is an earlier tenant's.
            self.tags[block.index()] = LAST_SERIAL;
        }
    }

    /// Appends the blocks that wait to `out`, in order, until they are [`put_back`](Self::put_back) or
    /// [`were_zeroed`](Self::were_zeroed); but those of lives that are over, as `lives` says, are left to their next
    /// owners. O(blocks · log blocks).
    pub(crate) fn take(&mut self, lives: impl Fn(BlockId, u32) -> bool, out: &mut Vec<(BlockId, u32)>) {
        while let Some((block, generation)) = self.waiting.pop_first() {
            if lives(block, generation) {
                self.taken.insert(block);
                out.push((block, generation));
            } else {
                self.tags[block.index()] = LAST_SERIAL;
            }
        }
    }

    /// All that was taken has been zeroed, or is going to be before anything else is done. O(blocks).
    pub(crate) fn were_zeroed(&mut self) {
        self.taken.clear();
    }

    /// A block that was taken was not zeroed: it waits again, or its next owner's turn decides if it lives no more.
    pub(crate) fn put_back(&mut self, block: BlockId, generation: u32, lives: bool) {
        self.taken.remove(&block);
        if lives {
            self.waiting.insert(block, generation);
        } else if !self.waiting.contains_key(&block) {
            self.tags[block.index()] = LAST_SERIAL;
        }
    }

    /// O(waiting).
    pub(crate) fn check(&self) -> Result<()> {
        match self.waiting.keys().find(|block| self.tags[block.index()] == 0) {
            Some(block) => Err(Error::corruption(
                "R6",
                "the last tenant of a block to zero",
                block.0,
                0,
                1,
            )),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(zeroing: &mut Zeroing) -> Vec<u32> {
        zeroing.check().unwrap();
        let mut out = Vec::new();
        zeroing.take(|_, _| true, &mut out);
        zeroing.were_zeroed();
        out.into_iter().map(|(block, _)| block.0).collect()
    }

    #[test]
    fn only_a_change_of_tenant_counts() {
        let mut zeroing = Zeroing::new(8).unwrap();
        zeroing.assign(BlockId(3), 1, 1);
        zeroing.assign(BlockId(3), 2, 1);
        assert_eq!(take(&mut zeroing), []);
        zeroing.assign(BlockId(3), 3, 2);
        assert_eq!(take(&mut zeroing), [3]);
        assert_eq!(take(&mut zeroing), []);
        zeroing.assign(BlockId(3), 4, LAST_SERIAL);
        assert_eq!(take(&mut zeroing), [3]);
        zeroing.assign(BlockId(3), 5, LAST_SERIAL);
        assert_eq!(take(&mut zeroing), [3]);
    }

    #[test]
    fn a_block_given_up_unzeroed_is_zeroed_for_its_next_owner() {
        let mut zeroing = Zeroing::new(8).unwrap();
        zeroing.assign(BlockId(3), 1, 1);
        zeroing.assign(BlockId(3), 2, 2);
        zeroing.give_up(BlockId(3));
        assert_eq!(take(&mut zeroing), []);
        zeroing.assign(BlockId(3), 3, 2);
        assert_eq!(take(&mut zeroing), [3]);
    }

    #[test]
    fn a_life_that_is_over_is_not_zeroed_but_the_next_one_is() {
        let mut zeroing = Zeroing::new(8).unwrap();
        zeroing.assign(BlockId(3), 1, 1);
        zeroing.assign(BlockId(3), 2, 2);
        let mut out = Vec::new();
        zeroing.take(|_, generation| generation != 2, &mut out);
        assert_eq!(out, []);
        zeroing.assign(BlockId(3), 4, 2);
        assert_eq!(take(&mut zeroing), [3]);
    }

    #[test]
    fn a_block_taken_and_not_yet_zeroed_is_zeroed_for_its_next_owner() {
        let (block, mut out) = (BlockId(3), Vec::new());
        let taken = |out: &mut Vec<_>| {
            let mut zeroing = Zeroing::new(8).unwrap();
            zeroing.assign(block, 1, 1);
            zeroing.assign(block, 2, 2);
            zeroing.take(|_, _| true, out);
            zeroing
        };
        let mut zeroing = taken(&mut out);
        zeroing.assign(block, 3, 2);
        zeroing.put_back(block, 2, false);
        assert_eq!(take(&mut zeroing), [3]);
        let mut zeroing = taken(&mut out);
        zeroing.were_zeroed();
        zeroing.assign(block, 3, 2);
        assert_eq!(take(&mut zeroing), []);
    }

    #[test]
    fn what_was_not_zeroed_waits_again_once() {
        let mut zeroing = Zeroing::new(8).unwrap();
        for (block, tenant) in [(3, 1), (5, 1), (3, 2), (5, 2)] {
            zeroing.assign(BlockId(block), 1, tenant);
        }
        for _ in 0..3 {
            let mut out = Vec::new();
            zeroing.take(|_, _| true, &mut out);
            assert_eq!(out, [(BlockId(3), 1), (BlockId(5), 1)]);
            for (block, generation) in out {
                zeroing.put_back(block, generation, true);
            }
        }
        zeroing.put_back(BlockId(3), 1, true);
        assert_eq!(take(&mut zeroing), [3, 5]);
        zeroing.put_back(BlockId(3), 1, false);
        assert_eq!(take(&mut zeroing), []);
        zeroing.assign(BlockId(3), 2, 2);
        assert_eq!(take(&mut zeroing), [3]);
    }
}
