//! The set of free blocks: a bitmap with summaries, 64 to one.
//!
//! [`Bits`] is a set of small integers in which the next member from any place is found in as many steps as the
//! tree has levels (four for 10⁶ blocks). [`FreeMap`] keeps two of them, the free blocks and the words of 64 blocks
//! that are free as a whole, so that a large request is served in long runs of neighbouring ids and a small one does
//! not break up such a word while a hole of its size exists.
//!
//! Neighbouring ids matter because a run of blocks is one copy when it moves to another tier, and one long read.

use crate::error::{Error, Result};
use crate::ids::BlockId;

/// Members of one word of a bitmap.
const WORD: usize = u64::BITS as usize;

/// How many words with a hole are looked at for a run before a small request breaks up a word that is free as a
/// whole. It bounds the work of one allocation.
const PROBES: usize = 4;

/// A set of integers below a fixed limit. Level 0 has one bit per integer; a bit of level k + 1 says that a word of
/// level k is not empty; the last level is one word.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Bits {
    levels: Vec<Vec<u64>>,
}

impl Bits {
    /// The empty set of integers below `limit`.
    fn new(limit: usize) -> Self {
        let mut levels = Vec::new();
        let mut bits = limit.max(1);
        loop {
            let words = bits.div_ceil(WORD);
            levels.push(vec![0; words]);
            if words == 1 {
                return Self { levels };
            }
            bits = words;
        }
    }

    fn word(&self, index: usize) -> u64 {
        self.levels[0].get(index).copied().unwrap_or(0)
    }

    /// Replaces one word of level 0. O(1), unless the word becomes or ceases to be empty: then O(levels).
    fn set_word(&mut self, index: usize, word: u64) {
        let was_empty = self.levels[0][index] == 0;
        self.levels[0][index] = word;
        if was_empty == (word == 0) {
            return;
        }
        let (mut place, mut present) = (index, word != 0);
        for level in &mut self.levels[1..] {
            let summary = &mut level[place / WORD];
            let before = *summary;
            let bit = 1 << (place % WORD);
            *summary = if present { before | bit } else { before & !bit };
            if (before == 0) == (*summary == 0) {
                return;
            }
            (place, present) = (place / WORD, *summary != 0);
        }
    }

    fn contains(&self, member: usize) -> bool {
        self.word(member / WORD) >> (member % WORD) & 1 == 1
    }

    fn insert(&mut self, member: usize) {
        self.set_word(member / WORD, self.word(member / WORD) | 1 << (member % WORD));
    }

    fn remove(&mut self, member: usize) {
        self.set_word(member / WORD, self.word(member / WORD) & !(1 << (member % WORD)));
    }

    /// The smallest member that is not below `from`. O(levels).
    fn next(&self, from: usize) -> Option<usize> {
        // Up, until a word has a member at or after the place sought; then down along the first members.
        let (mut level, mut place) = (0, from);
        loop {
            let word = self.levels.get(level)?.get(place / WORD).copied().unwrap_or(0) & (u64::MAX << (place % WORD));
            if word != 0 {
                place = place / WORD * WORD + word.trailing_zeros() as usize;
                break;
            }
            (level, place) = (level + 1, place / WORD + 1);
        }
        while level > 0 {
            level -= 1;
            place = place * WORD + self.levels[level][place].trailing_zeros() as usize;
        }
        Some(place)
    }

    /// Is every summary right?
    fn summaries_hold(&self) -> bool {
        self.levels.windows(2).all(|pair| {
            pair[0]
                .iter()
                .enumerate()
                .all(|(place, &word)| (pair[1][place / WORD] >> (place % WORD) & 1 == 1) == (word != 0))
        })
    }
}

/// The lowest place where `word` has `length` neighbouring ones (1 to 64). O(log length).
fn find_run(mut word: u64, length: usize) -> Option<usize> {
    // After each round a one stands for `covered` ones from there on.
    let mut covered = 1;
    while covered < length {
        let more = covered.min(length - covered);
        word &= word >> more;
        covered += more;
    }
    (word != 0).then_some(word.trailing_zeros() as usize)
}

/// Ones from bit `from` on, `length` of them (1 to 64).
fn mask(from: usize, length: usize) -> u64 {
    (u64::MAX >> (WORD - length)) << from
}

/// The free blocks of a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FreeMap {
    blocks: Bits,
    /// Words of `blocks` that are all ones.
    whole: Bits,
    len: usize,
}

impl FreeMap {
    /// All blocks below `num_blocks` free but block 0. O(blocks / 64).
    pub(crate) fn new(num_blocks: u32) -> Self {
        let num_blocks = num_blocks as usize;
        let mut map = Self {
            blocks: Bits::new(num_blocks),
            whole: Bits::new(num_blocks.div_ceil(WORD)),
            len: 0,
        };
        for first in (0..num_blocks).step_by(WORD) {
            let word = mask(0, WORD.min(num_blocks - first));
            map.put_word(first / WORD, if first == 0 { word & !1 } else { word });
        }
        map.len = num_blocks - 1;
        map
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn contains(&self, block: BlockId) -> bool {
        self.blocks.contains(block.index())
    }

    /// Adds a block that is not in the set. O(1).
    pub(crate) fn insert(&mut self, block: BlockId) {
        let index = block.index() / WORD;
        self.put_word(index, self.blocks.word(index) | 1 << (block.index() % WORD));
        self.len += 1;
    }

    /// Moves `n` blocks from the set to the end of `out`; the set has as many. O(n).
    ///
    /// First the blocks right after `hint`, so that a growing sequence stays in one run. Then words that are free as
    /// a whole. What is less than a word comes from a hole of that size if one is near, except where a hint was
    /// given: a sequence that grows and has no room after it moves to a word of its own, where it finds its next
    /// neighbours free. Last, whatever there is, in ascending order.
    pub(crate) fn take(&mut self, n: usize, hint: BlockId, out: &mut Vec<BlockId>) {
        let wanted = out.len() + n;
        let hinted = hint != BlockId::NULL;
        if hinted {
            self.take_run(hint.index() + 1, n, out);
        }
        let mut cursor = if hinted { hint.index() / WORD } else { 0 };
        while wanted - out.len() >= WORD {
            let Some(index) = self.next_whole(cursor) else {
                break;
            };
            self.take_run(index * WORD, WORD, out);
            cursor = index + 1;
        }
        let rest = wanted - out.len();
        if rest > 0 && rest < WORD {
            // A request that took whole words goes on in the next one.
            let own_word = hinted || rest < n;
            let place = if own_word {
                self.next_whole(cursor)
                    .map(|index| index * WORD)
                    .or_else(|| self.find_hole(rest))
            } else {
                self.find_hole(rest)
                    .or_else(|| self.next_whole(0).map(|index| index * WORD))
            };
            if let Some(place) = place {
                self.take_run(place, rest, out);
            }
        }
        while out.len() < wanted {
            let Some(first) = self.blocks.next(0) else {
                return;
            };
            self.take_run(first, wanted - out.len(), out);
        }
    }

    /// Takes up to `limit` neighbouring blocks from `first` on, as far as they are free.
    fn take_run(&mut self, first: usize, limit: usize, out: &mut Vec<BlockId>) {
        let (mut place, stop) = (first, first + limit);
        while place < stop {
            let (index, from) = (place / WORD, place % WORD);
            let word = self.blocks.word(index);
            let free = ((!(word >> from)).trailing_zeros() as usize).min(WORD - from);
            let length = free.min(stop - place);
            if length == 0 {
                return;
            }
            self.put_word(index, word & !mask(from, length));
            self.len -= length;
            // Ids fit: the map was made for a u32 number of blocks.
            #[allow(clippy::cast_possible_truncation)]
            out.extend((place..place + length).map(|id| BlockId(id as u32)));
            place += length;
            if from + length < WORD {
                return;
            }
        }
    }

    /// A word that is free as a whole, at `from` or after it, else before.
    fn next_whole(&self, from: usize) -> Option<usize> {
        self.whole.next(from).or_else(|| self.whole.next(0))
    }

    /// The first block of `length` neighbouring ones in one of the first few words that have free blocks but are not
    /// free as a whole.
    fn find_hole(&self, length: usize) -> Option<usize> {
        let mut from = 0;
        for _ in 0..PROBES {
            let index = self.blocks.next(from)? / WORD;
            let word = self.blocks.word(index);
            if word != u64::MAX
                && let Some(place) = find_run(word, length)
            {
                return Some(index * WORD + place);
            }
            from = (index + 1) * WORD;
        }
        None
    }

    fn put_word(&mut self, index: usize, word: u64) {
        let was_whole = self.blocks.word(index) == u64::MAX;
        self.blocks.set_word(index, word);
        match (was_whole, word == u64::MAX) {
            (false, true) => self.whole.insert(index),
            (true, false) => self.whole.remove(index),
            _ => {}
        }
    }

    /// Checks the summaries and the count. O(blocks / 64).
    pub(crate) fn check(&self) -> Result<()> {
        if !self.blocks.summaries_hold() || !self.whole.summaries_hold() {
            return Err(Error::corruption("A2", "a summary of the free map", 0, 0, 1));
        }
        for (index, &word) in self.blocks.levels[0].iter().enumerate() {
            if self.whole.contains(index) != (word == u64::MAX) {
                return Err(Error::corruption("A2", "the mark of a whole free word", index, 0, 1));
            }
        }
        let counted: usize = self.blocks.levels[0]
            .iter()
            .map(|word| word.count_ones() as usize)
            .sum();
        if counted != self.len {
            return Err(Error::corruption(
                "A1",
                "the number of free blocks",
                0,
                self.len,
                counted,
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn take(map: &mut FreeMap, n: usize, hint: u32) -> Vec<u32> {
        let mut out = Vec::new();
        map.take(n, BlockId(hint), &mut out);
        map.check().unwrap();
        out.into_iter().map(|block| block.0).collect()
    }

    #[test]
    fn next_crosses_every_level() {
        let limit = WORD * WORD * WORD + 5;
        let mut bits = Bits::new(limit);
        assert_eq!(bits.next(0), None);
        let members = [0, 63, 64, 4095, 4096, 70_000, limit - 1];
        members.iter().for_each(|&member| bits.insert(member));
        let mut seen = Vec::new();
        let mut from = 0;
        while let Some(member) = bits.next(from) {
            seen.push(member);
            from = member + 1;
        }
        assert_eq!(seen, members);
        assert_eq!(bits.next(limit + 100_000), None);
        members.iter().for_each(|&member| bits.remove(member));
        assert_eq!(bits.next(0), None);
        assert!(bits.summaries_hold());
    }

    #[test]
    fn find_run_finds_the_lowest() {
        assert_eq!(find_run(0b0110_1110, 3), Some(1));
        assert_eq!(find_run(0b0110_1110, 4), None);
        assert_eq!(find_run(u64::MAX, 64), Some(0));
        assert_eq!(find_run(1 << 63, 1), Some(63));
        assert_eq!(find_run(0, 1), None);
    }

    #[test]
    fn a_large_request_is_one_run() {
        let mut map = FreeMap::new(1000);
        let blocks = take(&mut map, 300, 0);
        assert!(blocks.windows(2).all(|pair| pair[1] == pair[0] + 1), "{blocks:?}");
    }

    #[test]
    fn small_requests_fill_holes_first() {
        let mut map = FreeMap::new(1000);
        assert_eq!(take(&mut map, 3, 0), [1, 2, 3]);
        assert_eq!(take(&mut map, 1, 0), [4]);
        map.insert(BlockId(2));
        assert_eq!(take(&mut map, 1, 0), [2]);
        assert_eq!(take(&mut map, 2, 0), [5, 6]);
    }

    #[test]
    fn a_growing_sequence_finds_its_neighbours_free() {
        let mut map = FreeMap::new(1000);
        let first = take(&mut map, 3, 0);
        let second = take(&mut map, 2, 0);
        assert_eq!((first[2], second[0]), (3, 4));
        // The block after 3 is taken: a word of its own, and from there on one run.
        let grown = take(&mut map, 1, 3)[0];
        assert_eq!(grown, 64);
        assert_eq!(take(&mut map, 2, grown), [65, 66]);
        assert_eq!(take(&mut map, 1, second[1]), [6]);
    }

    #[test]
    fn everything_can_be_taken_and_put_back() {
        for num_blocks in [2, 63, 64, 65, 128, 129, 4097] {
            let mut map = FreeMap::new(num_blocks);
            let all: BTreeSet<_> = take(&mut map, num_blocks as usize - 1, 0).into_iter().collect();
            assert_eq!(all, (1..num_blocks).collect());
            assert_eq!(map.len(), 0);
            all.iter().rev().for_each(|&block| map.insert(BlockId(block)));
            assert_eq!(map, FreeMap::new(num_blocks));
        }
    }

    #[test]
    fn scattered_blocks_are_found() {
        let mut map = FreeMap::new(4096);
        let all = take(&mut map, 4095, 0);
        for block in all.iter().filter(|&block| block % 7 == 0) {
            map.insert(BlockId(*block));
        }
        let free = map.len();
        assert_eq!(take(&mut map, free, 21).len(), free);
        assert_eq!(map.len(), 0);
    }
}
