//! Identifiers: small newtypes, so that a block is never mistaken for a node or a count.
//!
//! A [`BlockId`] is a plain index and as cheap as one. What a caller keeps for long (a sequence, a prefix node, a
//! namespace) is a *handle*: an index into a slab and the generation of that place. The generation rises each time
//! the place is given up, so a handle kept too long is told apart from the newcomer and refused.

use std::fmt;
use std::num::NonZeroU32;

/// A physical block: an index below `num_blocks`. Block 0 is the null block, never handed out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct BlockId(pub u32);

impl BlockId {
    /// The null block: what a table entry that is never read points to.
    pub const NULL: Self = Self(0);

    /// As an index into per-block arrays.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for BlockId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A node of the prefix trie, by its place in the slab. Never 0, so that 0 can stand for "none" in zeroed arrays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct NodeId(NonZeroU32);

impl NodeId {
    /// The first one.
    pub(crate) const FIRST: Self = Self(NonZeroU32::MIN);

    /// None for 0.
    #[must_use]
    pub const fn new(index: u32) -> Option<Self> {
        match NonZeroU32::new(index) {
            Some(index) => Some(Self(index)),
            None => None,
        }
    }

    /// As a number.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0.get()
    }

    /// As an index into per-node arrays.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0.get() as usize
    }
}

/// A step (one forward pass). Steps count from 1; 0 stands for "before any step".
pub type Step = u64;

/// What a stale handle was a handle of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HandleKind {
    /// A sequence of a manager.
    Sequence,
    /// A node of the prefix trie.
    Node,
    /// A namespace of the prefix trie.
    Namespace,
}

impl fmt::Display for HandleKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sequence => "sequence",
            Self::Node => "node",
            Self::Namespace => "namespace",
        })
    }
}

/// Defines a handle: `generation << 32 | index` in a u64, which is what crosses into other languages.
macro_rules! handle {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The handle of place `index` in its life number `generation`.
            #[must_use]
            pub const fn new(index: u32, generation: u32) -> Self {
                Self((generation as u64) << 32 | index as u64)
            }

            /// The place in the slab.
            #[must_use]
            #[allow(clippy::cast_possible_truncation)] // the low half is wanted
            pub const fn index(self) -> usize {
                self.0 as u32 as usize
            }

            /// Which life of that place.
            #[must_use]
            pub const fn generation(self) -> u32 {
                (self.0 >> 32) as u32
            }
        }
    };
}

handle! {
    /// A sequence of a [`KVCacheManager`](crate::KVCacheManager).
    SeqHandle
}
handle! {
    /// A node of a [`PrefixCache`](crate::PrefixCache): one block of tokens after all the blocks above it.
    NodeHandle
}
handle! {
    /// A namespace of a [`PrefixCache`](crate::PrefixCache): a root that no other namespace's lookups can reach.
    NamespaceHandle
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handles_keep_both_halves() {
        let handle = SeqHandle::new(u32::MAX, 7);
        assert_eq!((handle.index(), handle.generation()), (u32::MAX as usize, 7));
        assert_eq!(SeqHandle::new(0, 1).0, 1 << 32);
    }
}
