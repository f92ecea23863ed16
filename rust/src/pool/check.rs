//! The invariants of level 0.

use super::{BlockPool, BlockState};
use crate::error::{Error, Result};
use crate::ids::BlockId;

impl BlockPool {
    /// Checks every invariant of this level. O(blocks).
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
