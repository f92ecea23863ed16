//! Which blocks have to be zeroed before their next write: those that come to another tenant.
//!
//! The pool's memory is zeroed when it is made, so a block's first owner gets zeros. After that a block remembers the
//! tenant that had it last; when another one gets it, it is put on a list that is taken with the next step, before the
//! copies and the writes. One tenant alone never causes a zeroing.

use crate::error::{Error, Result};
use crate::ids::BlockId;
use crate::namespace::{LAST_SERIAL, TenantSerial};
use crate::pool::zeroed;

/// On the list.
const WAITING: u32 = 1 << 31;

/// The tenants of a pool's blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Zeroing {
    /// Per block: the tenant that had it last (0: none), and whether it waits to be zeroed. `LAST_SERIAL` is equal to
    /// no tenant, itself included.
    tags: Vec<u32>,
    /// Blocks that wait, and some that did: those are told by their tags.
    list: Vec<BlockId>,
    waiting: usize,
}

impl Zeroing {
    pub(crate) fn new(num_blocks: usize) -> Result<Self> {
        Ok(Self {
            tags: zeroed!(u32, num_blocks)?,
            list: Vec::new(),
            waiting: 0,
        })
    }

    /// Blocks that wait.
    pub(crate) fn len(&self) -> usize {
        self.waiting
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.waiting == 0
    }

    /// The block comes to a tenant. Amortised O(1).
    pub(crate) fn assign(&mut self, block: BlockId, tenant: TenantSerial) {
        let tag = &mut self.tags[block.index()];
        if *tag == 0 || *tag == tenant && tenant != LAST_SERIAL {
            *tag = tenant;
            return;
        }
        if *tag & WAITING == 0 {
            self.waiting += 1;
            self.list.push(block);
        }
        *tag = tenant | WAITING;
        if self.list.len() > 2 * self.waiting + 64 {
            let mut kept = Vec::new();
            self.take(&mut kept);
            for block in &kept {
                self.tags[block.index()] |= WAITING;
            }
            self.waiting = kept.len();
            self.list = kept;
        }
    }

    /// Nobody has the block any more: if it waits, its next owner's turn decides.
    pub(crate) fn give_up(&mut self, block: BlockId) {
        let tag = &mut self.tags[block.index()];
        if *tag & WAITING != 0 {
            // What it holds is an earlier tenant's.
            *tag = LAST_SERIAL;
            self.waiting -= 1;
        }
    }

    /// Appends the blocks that wait to `out`, each once, and forgets them.
    pub(crate) fn take(&mut self, out: &mut Vec<BlockId>) {
        for block in self.list.drain(..) {
            let tag = &mut self.tags[block.index()];
            if *tag & WAITING != 0 {
                *tag &= !WAITING;
                out.push(block);
            }
        }
        self.waiting = 0;
    }

    /// O(blocks).
    pub(crate) fn check(&self) -> Result<()> {
        let waiting = self.tags.iter().filter(|&&tag| tag & WAITING != 0).count();
        let listed = self
            .tags
            .iter()
            .enumerate()
            .filter(|&(block, &tag)| tag & WAITING != 0 && !self.list.iter().any(|listed| listed.index() == block));
        if waiting != self.waiting {
            return Err(Error::corruption(
                "R6",
                "the number of blocks to zero",
                0,
                self.waiting,
                waiting,
            ));
        }
        if let Some((block, _)) = listed.into_iter().next() {
            return Err(Error::corruption(
                "R6",
                "a block's place among those to zero",
                block,
                0,
                1,
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(zeroing: &mut Zeroing) -> Vec<u32> {
        zeroing.check().unwrap();
        let mut out = Vec::new();
        zeroing.take(&mut out);
        out.into_iter().map(|block| block.0).collect()
    }

    #[test]
    fn only_a_change_of_tenant_counts() {
        let mut zeroing = Zeroing::new(8).unwrap();
        zeroing.assign(BlockId(3), 1);
        zeroing.assign(BlockId(3), 1);
        assert_eq!(take(&mut zeroing), []);
        zeroing.assign(BlockId(3), 2);
        assert_eq!(take(&mut zeroing), [3]);
        assert_eq!(take(&mut zeroing), []);
        zeroing.assign(BlockId(3), LAST_SERIAL);
        assert_eq!(take(&mut zeroing), [3]);
        zeroing.assign(BlockId(3), LAST_SERIAL);
        assert_eq!(take(&mut zeroing), [3]);
    }

    #[test]
    fn a_block_given_up_unzeroed_is_zeroed_for_its_next_owner() {
        let mut zeroing = Zeroing::new(8).unwrap();
        zeroing.assign(BlockId(3), 1);
        zeroing.assign(BlockId(3), 2);
        zeroing.give_up(BlockId(3));
        assert_eq!(take(&mut zeroing), []);
        zeroing.assign(BlockId(3), 2);
        assert_eq!(take(&mut zeroing), [3]);
    }

    #[test]
    fn the_list_stays_short_if_nobody_takes_it() {
        let mut zeroing = Zeroing::new(8).unwrap();
        zeroing.assign(BlockId(5), 1);
        for tenant in 2..1000 {
            zeroing.assign(BlockId(3), tenant);
            zeroing.give_up(BlockId(3));
            zeroing.assign(BlockId(5), tenant);
            assert!(zeroing.list.len() < 80);
        }
        assert_eq!(take(&mut zeroing), [5]);
    }
}
