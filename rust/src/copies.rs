//! Copy-on-write as data: the block copies that the next step has to make.
//!
//! A pair (src, dst) holds a reference to src, so that it keeps its content until the copy was made. All copies of a
//! step run before its writes and in no particular order, so no dst may be another pair's src: a copy of a block that
//! is itself still to be copied is made from the first one.

use std::collections::HashMap;

use crate::error::{Error, Result};
use crate::ids::BlockId;

/// Copies that nobody has taken yet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Copies {
    pairs: Vec<(BlockId, BlockId)>,
    /// The life of each dst that its copy is for: others can hold it too, give it back last, and take it again.
    generations: Vec<u32>,
    /// The pair of each dst.
    by_dst: HashMap<BlockId, usize>,
    /// How many pairs hold each src.
    holds: HashMap<BlockId, u32>,
}

impl Copies {
    pub(crate) fn is_empty(&self) -> bool {
        self.pairs.is_empty()
    }

    pub(crate) fn pairs(&self) -> &[(BlockId, BlockId)] {
        &self.pairs
    }

    /// References to `block` that pairs hold.
    pub(crate) fn holds(&self, block: BlockId) -> u32 {
        if self.pairs.is_empty() {
            0
        } else {
            self.holds.get(&block).copied().unwrap_or(0)
        }
    }

    /// The block that `dst` is to be a copy of.
    pub(crate) fn source_of(&self, dst: BlockId) -> Option<BlockId> {
        if self.pairs.is_empty() {
            return None;
        }
        self.by_dst.get(&dst).map(|&pair| self.pairs[pair].0)
    }

    /// Adds a pair; the reference to `src` that it holds is the caller's to provide.
    pub(crate) fn add(&mut self, src: BlockId, dst: BlockId, generation: u32) {
        self.by_dst.insert(dst, self.pairs.len());
        self.pairs.push((src, dst));
        self.generations.push(generation);
        *self.holds.entry(src).or_default() += 1;
    }

    /// Drops the pair of `dst`, if there is one, and returns its src: the reference is now the caller's.
    pub(crate) fn cancel(&mut self, dst: BlockId) -> Option<BlockId> {
        let place = self.by_dst.remove(&dst)?;
        let (src, _) = self.pairs.swap_remove(place);
        self.generations.swap_remove(place);
        if let Some(&(_, moved)) = self.pairs.get(place) {
            self.by_dst.insert(moved, place);
        }
        if let Some(holds) = self.holds.get_mut(&src) {
            *holds -= 1;
            if *holds == 0 {
                self.holds.remove(&src);
            }
        }
        Some(src)
    }

    /// Appends the pairs whose destination still lives, as `lives` says of a block and its generation, to `out`, and
    /// forgets all; the references are now the caller's.
    pub(crate) fn take(&mut self, lives: impl Fn(BlockId, u32) -> bool, out: &mut Vec<(BlockId, BlockId)>) {
        let all = self.pairs.drain(..).zip(self.generations.drain(..));
        out.extend(
            all.filter(|&((_, dst), generation)| lives(dst, generation))
                .map(|(pair, _)| pair),
        );
        self.by_dst.clear();
        self.holds.clear();
    }

    /// O(pairs).
    pub(crate) fn check(&self) -> Result<()> {
        let mut holds: HashMap<BlockId, u32> = HashMap::new();
        for (place, &(src, dst)) in self.pairs.iter().enumerate() {
            *holds.entry(src).or_default() += 1;
            if self.by_dst.get(&dst) != Some(&place) {
                return Err(Error::corruption(
                    "A9",
                    "the pair of a copy's destination",
                    dst.0,
                    0,
                    place,
                ));
            }
            if self.by_dst.contains_key(&src) {
                return Err(Error::corruption(
                    "A9",
                    "a copy's source that is a destination",
                    src.0,
                    1,
                    0,
                ));
            }
        }
        if holds != self.holds || self.by_dst.len() != self.pairs.len() {
            return Err(Error::corruption(
                "A9",
                "the number of copies",
                0,
                self.by_dst.len(),
                self.pairs.len(),
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cancelling_keeps_the_others() {
        let block = BlockId;
        let mut copies = Copies::default();
        copies.add(block(1), block(2), 1);
        copies.add(block(1), block(3), 1);
        copies.add(block(4), block(5), 1);
        copies.add(block(4), block(6), 1);
        assert_eq!(
            (copies.holds(block(1)), copies.source_of(block(5))),
            (2, Some(block(4)))
        );
        assert_eq!(copies.cancel(block(2)), Some(block(1)));
        assert_eq!(copies.cancel(block(2)), None);
        copies.check().unwrap();
        assert_eq!(
            (copies.holds(block(1)), copies.source_of(block(5))),
            (1, Some(block(4)))
        );
        let mut out = Vec::new();
        copies.take(|dst, generation| dst != block(6) && generation == 1, &mut out);
        out.sort_unstable();
        assert_eq!(out, [(block(1), block(3)), (block(4), block(5))]);
        assert_eq!(copies, Copies::default());
    }
}
