//! One sequence's state, and the slab that the manager keeps sequences in.

use std::collections::TryReserveError;

use crate::content::ContentKeys;
use crate::error::{Error, Result};
use crate::ids::{BlockId, HandleKind, NodeHandle, SeqHandle};
use crate::prefix::Era;
use crate::tokens::Tokens;

/// A sequence: its tokens and where their keys and values are.
///
/// `committed * block_size ≤ computed ≤ slots ≤ table.len() * block_size`, and `computed ≤ tokens.len()`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sequence {
    pub(crate) tokens: Tokens,
    /// Logical to physical blocks; one reference to each.
    pub(crate) table: Vec<BlockId>,
    /// Positions below have been written, by a step that is complete.
    pub(crate) computed: usize,
    /// Positions below were made writable.
    pub(crate) slots: usize,
    /// Full blocks below were offered to the trie.
    pub(crate) committed: usize,
    /// The node of block `committed - 1`.
    pub(crate) node: Option<NodeHandle>,
    /// The namespace's place, of which the sequence has a hold.
    pub(crate) namespace: u32,
    /// When the blocks were computed: they are not published after a reset.
    pub(crate) era: Era,
    pub(crate) content: ContentKeys,
    /// Without blocks until resumed.
    pub(crate) preempted: bool,
    /// A request's: its scheduler alone may change it.
    pub(crate) owned: bool,
}

impl Sequence {
    /// What [`fork`](Self::fork) copies, in table entries and tokens.
    pub(crate) fn fork_size(&self, shared: usize) -> usize {
        shared + self.tokens.copied_by_clone()
    }

    /// A copy that shares the first `shared` blocks, whose references the caller provides; it is nobody's request.
    pub(crate) fn fork(&self, shared: usize) -> Result<Self, TryReserveError> {
        let mut table = Vec::new();
        table.try_reserve_exact(shared)?;
        table.extend_from_slice(&self.table[..shared]);
        Ok(Self {
            tokens: self.tokens.try_clone()?,
            table,
            slots: self.computed,
            content: self.content.clone(),
            owned: false,
            ..*self
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    /// Which life of the place this is. The last one a `u32` can count is not followed by another: see `retired`.
    generation: u32,
    sequence: Option<Sequence>,
}

/// All sequences of a manager.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sequences {
    places: Vec<Place>,
    free: Vec<u32>,
    /// Places that are never given out again, as a handle to their first life would fit once more.
    retired: usize,
}

impl Sequences {
    pub(crate) fn len(&self) -> usize {
        self.places.len() - self.free.len() - self.retired
    }

    /// Room for `n` more.
    pub(crate) fn try_reserve(&mut self, n: usize) -> Result<(), TryReserveError> {
        self.places.try_reserve(n.saturating_sub(self.free.len()))
    }

    /// The most there were at a time: what [`iter`](Self::iter) walks.
    pub(crate) fn places(&self) -> usize {
        self.places.len()
    }

    /// O(1), amortised.
    pub(crate) fn insert(&mut self, sequence: Sequence) -> SeqHandle {
        if let Some(index) = self.free.pop() {
            let place = &mut self.places[index as usize];
            place.sequence = Some(sequence);
            return SeqHandle::new(index, place.generation);
        }
        self.places.push(Place {
            generation: 1,
            sequence: Some(sequence),
        });
        #[allow(clippy::cast_possible_truncation)] // 2³² sequences do not fit in memory
        let index = (self.places.len() - 1) as u32;
        SeqHandle::new(index, 1)
    }

    pub(crate) fn get(&self, handle: SeqHandle) -> Result<&Sequence> {
        self.places
            .get(handle.index())
            .filter(|place| place.generation == handle.generation())
            .and_then(|place| place.sequence.as_ref())
            .ok_or(Error::StaleHandle {
                kind: HandleKind::Sequence,
                handle: handle.0,
            })
    }

    pub(crate) fn get_mut(&mut self, handle: SeqHandle) -> Result<&mut Sequence> {
        self.places
            .get_mut(handle.index())
            .filter(|place| place.generation == handle.generation())
            .and_then(|place| place.sequence.as_mut())
            .ok_or(Error::StaleHandle {
                kind: HandleKind::Sequence,
                handle: handle.0,
            })
    }

    pub(crate) fn remove(&mut self, handle: SeqHandle) -> Result<Sequence> {
        let place = self
            .places
            .get_mut(handle.index())
            .filter(|place| place.generation == handle.generation());
        let sequence = place.and_then(|place| {
            let sequence = place.sequence.take()?;
            Some((sequence, place))
        });
        let (sequence, place) = sequence.ok_or(Error::StaleHandle {
            kind: HandleKind::Sequence,
            handle: handle.0,
        })?;
        if let Some(next) = place.generation.checked_add(1) {
            place.generation = next;
            #[allow(clippy::cast_possible_truncation)] // it was made from a u32
            self.free.push(handle.index() as u32);
        } else {
            self.retired += 1;
        }
        Ok(sequence)
    }

    /// Living sequences with the place of each. O(the most there were at a time).
    pub(crate) fn iter(&self) -> impl Iterator<Item = (usize, &Sequence)> {
        self.places
            .iter()
            .enumerate()
            .filter_map(|(index, place)| Some((index, place.sequence.as_ref()?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence() -> Sequence {
        Sequence {
            tokens: Tokens::new(&[1, 2, 3], 4),
            table: Vec::new(),
            computed: 0,
            slots: 0,
            committed: 0,
            node: None,
            namespace: 0,
            era: Era::default(),
            content: ContentKeys::default(),
            preempted: false,
            owned: false,
        }
    }

    #[test]
    fn a_handle_never_fits_again() {
        let mut sequences = Sequences::default();
        let first = sequences.insert(sequence());
        sequences.remove(first).unwrap();
        sequences.places[0].generation = u32::MAX;
        let last = sequences.insert(sequence());
        assert_eq!((last.index(), last.generation()), (0, u32::MAX));
        sequences.remove(last).unwrap();
        // The place has no number left for another life.
        let next = sequences.insert(sequence());
        assert_eq!((next.index(), sequences.len()), (1, 1));
        for handle in [first, last, SeqHandle::new(0, 0)] {
            assert!(sequences.get(handle).is_err(), "{handle:?}");
            assert!(sequences.remove(handle).is_err(), "{handle:?}");
        }
        assert_eq!((sequences.len(), sequences.places()), (1, 2));
    }
}
