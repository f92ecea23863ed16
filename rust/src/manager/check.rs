//! The invariants of level 2.

use std::collections::{HashMap, HashSet};

use super::{Error, KVCacheManager, Result};
use crate::ids::BlockId;
use crate::sequence::Sequence;

impl KVCacheManager {
    /// Checks every invariant of this level and the two below. O(blocks + tables).
    ///
    /// # Errors
    /// [`Error::Corruption`] that names the first one broken.
    pub fn check(&self) -> Result<()> {
        self.pool.check()?;
        self.cache.check(&self.pool)?;
        self.copies.check()?;
        self.zeroing.check()?;
        let mut owned: HashMap<BlockId, u32> = HashMap::new();
        let mut holds: HashMap<u32, u64> = HashMap::new();
        for (index, sequence) in self.sequences.iter() {
            self.check_sequence(index, sequence)?;
            *holds.entry(sequence.namespace).or_default() += 1;
            for &block in &sequence.table {
                *owned.entry(block).or_default() += 1;
            }
        }
        for pair in self.copies.pairs() {
            *owned.entry(pair.src).or_default() += 1;
        }
        // Others may hold references too (`BlockPool::retain`), so a count can be higher, but not lower.
        for (&block, &owned) in &owned {
            let refs = self.pool.ref_count(block)?;
            if refs < owned {
                return Err(Error::corruption("A3", "a block's references", block.0, refs, owned));
            }
        }
        for (&namespace, &held) in &holds {
            let found = self.cache.namespaces().holds(namespace);
            if found != held {
                return Err(Error::corruption("L2", "a namespace's holds", namespace, found, held));
            }
        }
        Ok(())
    }

    fn check_sequence(&self, index: usize, sequence: &Sequence) -> Result<()> {
        let Sequence {
            computed,
            slots,
            committed,
            ..
        } = *sequence;
        let capacity = sequence.table.len() * self.block_size;
        for (what, low, high) in [
            (
                "committed tokens, at most the computed ones,",
                committed * self.block_size,
                computed,
            ),
            ("computed tokens, at most all,", computed, sequence.tokens.len()),
            ("computed tokens, at most the slots,", computed, slots),
            ("slots, at most those of the table,", slots, capacity),
            (
                "blocks of a preempted sequence, at most 0,",
                if sequence.preempted { capacity } else { 0 },
                0,
            ),
        ] {
            if low > high {
                return Err(Error::corruption("S", what, index, low, high));
            }
        }
        let distinct: HashSet<_> = sequence.table.iter().collect();
        if distinct.len() != sequence.table.len() {
            return Err(Error::corruption(
                "A10",
                "distinct blocks",
                index,
                distinct.len(),
                sequence.table.len(),
            ));
        }
        let current = sequence.era == self.cache.era(sequence.namespace);
        if self.caching && self.merging && current {
            // What was committed is published, in the sequence's own order, and its last node is the one remembered.
            let last = committed
                .checked_sub(1)
                .and_then(|last| self.pool.node_of(sequence.table[last]));
            let node = sequence.node.and_then(|node| self.cache.resolve(node));
            if last != node {
                let number = |node: Option<crate::ids::NodeId>| node.map_or(0, crate::ids::NodeId::get);
                return Err(Error::corruption(
                    "P2",
                    "a sequence's node",
                    index,
                    number(node),
                    number(last),
                ));
            }
            let mut above = node;
            for &block in sequence.table[..committed].iter().rev() {
                if self.pool.node_of(block) != above {
                    return Err(Error::corruption("P2", "the node of a committed block", block.0, 0, 1));
                }
                above = above.and_then(|node| self.cache.ancestor(node, 1));
            }
        }
        Ok(())
    }
}
