//! One sequence's state, and the slab that the manager keeps sequences in.

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

#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    generation: u32,
    sequence: Option<Sequence>,
}

/// All sequences of a manager.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sequences {
    places: Vec<Place>,
    free: Vec<u32>,
}

impl Sequences {
    pub(crate) fn len(&self) -> usize {
        self.places.len() - self.free.len()
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
            place.generation = place.generation.wrapping_add(1);
            Some(sequence)
        });
        let sequence = sequence.ok_or(Error::StaleHandle {
            kind: HandleKind::Sequence,
            handle: handle.0,
        })?;
        #[allow(clippy::cast_possible_truncation)] // it was made from a u32
        self.free.push(handle.index() as u32);
        Ok(sequence)
    }

    /// Living sequences with the place of each.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (usize, &Sequence)> {
        self.places
            .iter()
            .enumerate()
            .filter_map(|(index, place)| Some((index, place.sequence.as_ref()?)))
    }
}
