//! Copy-on-write as data: the block copies that the next step has to make.
//!
//! A pair (src, dst) holds a reference to src, so that it keeps its content until the copy was made. All copies of a
//! step run before its writes and in no particular order, so no dst may be another pair's src: a copy of a block that
//! is itself still to be copied is made from the first one.

use std::collections::HashMap;

use crate::error::{Error, Result};
use crate::ids::BlockId;

/// A copy to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pair {
    /// Copied from; the pair holds a reference to it.
    pub(crate) src: BlockId,
    /// Copied to.
    pub(crate) dst: BlockId,
    /// The life of dst that the copy is for: others can hold it too, give it back last, and take it again.
    pub(crate) generation: u32,
}

/// Copies that nobody has taken yet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Copies {
    pairs: Vec<Pair>,
    /// The pair of each dst.
    by_dst: HashMap<BlockId, usize>,
    /// How many pairs hold each src.
    holds: HashMap<BlockId, u32>,
}

impl Copies {
    pub(crate) fn is_empty(&self) -> bool {
        self.pairs.is_empty()
    }

    pub(crate) fn pairs(&self) -> &[Pair] {
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
        self.by_dst.get(&dst).map(|&pair| self.pairs[pair].src)
    }

    /// Adds a pair; the reference to its src is the caller's to provide.
    pub(crate) fn add(&mut self, pair: Pair) {
        self.by_dst.insert(pair.dst, self.pairs.len());
        self.pairs.push(pair);
        *self.holds.entry(pair.src).or_default() += 1;
    }

    /// Drops the pair of `dst`, if there is one, and returns its src: the reference is now the caller's.
    pub(crate) fn cancel(&mut self, dst: BlockId) -> Option<BlockId> {
        // Asked of every block that is allocated: not hashed where there is nothing to find.
        if self.pairs.is_empty() {
            return None;
        }
        let place = self.by_dst.remove(&dst)?;
        let Pair { src, .. } = self.pairs.swap_remove(place);
        if let Some(moved) = self.pairs.get(place) {
            self.by_dst.insert(moved.dst, place);
        }
        if let Some(holds) = self.holds.get_mut(&src) {
            *holds -= 1;
            if *holds == 0 {
                self.holds.remove(&src);
            }
        }
        Some(src)
    }

    /// Pairs that copy from `old` copy from `new` from now on, of which the caller provides as many references as it
    /// gets of `old`: that many are returned. O(pairs) if there are any, else O(1).
    pub(crate) fn redirect(&mut self, old: BlockId, new: BlockId) -> u32 {
        let Some(holds) = self.holds.remove(&old) else {
            return 0;
        };
        for pair in self.pairs.iter_mut().filter(|pair| pair.src == old) {
            pair.src = new;
        }
        *self.holds.entry(new).or_default() += holds;
        holds
    }

    /// Gives every pair to `each`, and forgets it; the references are now the caller's.
    pub(crate) fn drain(&mut self, each: impl FnMut(Pair)) {
        self.pairs.drain(..).for_each(each);
        self.by_dst.clear();
        self.holds.clear();
    }

    /// O(pairs).
    pub(crate) fn check(&self) -> Result<()> {
        let mut holds: HashMap<BlockId, u32> = HashMap::new();
        for (place, &Pair { src, dst, .. }) in self.pairs.iter().enumerate() {
            *holds.entry(src).or_default() += 1;
            if self.by_dst.get(&dst) != Some(&place) {
                return Err(Error::corruption(
                    "C",
                    "the pair of a copy's destination",
                    dst.0,
                    0,
                    place,
                ));
            }
            if self.by_dst.contains_key(&src) {
                return Err(Error::corruption(
                    "C",
                    "a copy's source that is a destination",
                    src.0,
                    1,
                    0,
                ));
            }
        }
        if holds != self.holds || self.by_dst.len() != self.pairs.len() {
            return Err(Error::corruption(
                "C",
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

    fn pair(src: u32, dst: u32) -> Pair {
        Pair {
            src: BlockId(src),
            dst: BlockId(dst),
            generation: 1,
        }
    }

    fn drained(copies: &mut Copies) -> Vec<(u32, u32)> {
        copies.check().unwrap();
        let mut pairs = Vec::new();
        copies.drain(|pair| pairs.push((pair.src.0, pair.dst.0)));
        assert_eq!(*copies, Copies::default());
        pairs.sort_unstable();
        pairs
    }

    #[test]
    fn cancelling_keeps_the_others() {
        let block = BlockId;
        let mut copies = Copies::default();
        for (src, dst) in [(1, 2), (1, 3), (4, 5), (4, 6)] {
            copies.add(pair(src, dst));
        }
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
        assert_eq!(drained(&mut copies), [(1, 3), (4, 5), (4, 6)]);
    }

    #[test]
    fn no_destination_stays_a_source() {
        let mut copies = Copies::default();
        for (src, dst) in [(2, 3), (2, 4), (1, 5)] {
            copies.add(pair(src, dst));
        }
        assert_eq!(copies.redirect(BlockId(9), BlockId(1)), 0);
        assert_eq!(copies.redirect(BlockId(2), BlockId(1)), 2);
        copies.add(pair(1, 2));
        assert_eq!(copies.holds(BlockId(1)), 4);
        assert_eq!(drained(&mut copies), [(1, 2), (1, 3), (1, 4), (1, 5)]);
    }
}
