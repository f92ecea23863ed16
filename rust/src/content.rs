//! Content that token ids do not tell: images, audio, embeddings.
//!
//! Such content stands in a prompt as placeholder tokens, the same for every image. A [`ContentKey`] says which
//! positions a content covers and by what bytes it is known (a digest); a block that overlaps it carries those bytes,
//! and where in the content the block lies, in its identity.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use crate::error::{Error, Expected, Result};

/// Bytes of a key. Each block that the content covers hashes them again, under the lock: a digest, not the content.
pub const MAX_KEY_BYTES: usize = 256;
/// Contents at one position. Each block carries those that it overlaps.
pub const MAX_CONTENT_DEPTH: usize = 16;
const _: () = assert!(
    MAX_KEY_BYTES == 256 && MAX_CONTENT_DEPTH == 16,
    "the messages below name both"
);

/// Positions `start..stop` stand for the content known as `key`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ContentKey {
    /// The first position, counted from the first token of the call; negative if the content began before it.
    pub start: i64,
    /// The position after the last.
    pub stop: i64,
    /// What the content is known by: a digest of at most [`MAX_KEY_BYTES`].
    pub key: Arc<[u8]>,
}

/// A key among those of a sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    key: ContentKey,
    /// The last stop of this one and all before it: ascending, so that a walk finds where to begin.
    reach: i64,
}

/// The content of a sequence, in order of position. Cheap to clone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ContentKeys(Arc<[Entry]>);

impl ContentKeys {
    /// Takes keys in any order. O(n log n).
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a key that covers no position or has more than [`MAX_KEY_BYTES`], or for more
    /// than [`MAX_CONTENT_DEPTH`] at one position.
    pub fn new(mut keys: Vec<ContentKey>) -> Result<Self> {
        for key in &keys {
            if key.stop <= key.start {
                let expected = Expected::That("a stop after its start");
                return Err(Error::argument("content_keys", key.stop, expected));
            }
            if key.key.len() > MAX_KEY_BYTES {
                let expected = Expected::That("at most 256 bytes each: a digest of the content");
                return Err(Error::argument("content_keys", key.key.len(), expected));
            }
        }
        keys.sort_unstable();
        let mut open = BinaryHeap::new();
        for key in &keys {
            while open.peek().is_some_and(|&Reverse(stop)| stop <= key.start) {
                open.pop();
            }
            open.push(Reverse(key.stop));
            if open.len() > MAX_CONTENT_DEPTH {
                let expected = Expected::That("at most 16 at one position");
                return Err(Error::argument("content_keys", open.len(), expected));
            }
        }
        Ok(Self::sorted(keys))
    }

    fn sorted(keys: impl IntoIterator<Item = ContentKey>) -> Self {
        let mut reach = i64::MIN;
        let entries = keys.into_iter().map(|key| {
            reach = reach.max(key.stop);
            Entry { key, reach }
        });
        Self(entries.collect())
    }

    /// What is left of it in the first `len` positions. O(keys).
    pub(crate) fn truncate(&mut self, len: usize) {
        let len = i64::try_from(len).unwrap_or(i64::MAX);
        if self.0.last().is_some_and(|last| last.reach > len) {
            let kept = self.0.iter().map(|entry| &entry.key).filter(|key| key.start < len);
            *self = Self::sorted(kept.map(|key| ContentKey {
                stop: key.stop.min(len),
                ..key.clone()
            }));
        }
    }

    /// Is there none?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The part of a content that lies in one block; positions count from the block's first token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// Where the content starts: negative if in a block before.
    start: i64,
    /// Where the content, or the block, ends.
    stop: i64,
    key: Arc<[u8]>,
}

impl Hash for Part {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_i64(self.start);
        state.write_i64(self.stop);
        state.write_usize(self.key.len());
        state.write(&self.key);
    }
}

/// Walks blocks in ascending order and gives the parts in each. Amortised O(1) per block and part.
#[derive(Debug)]
pub(crate) struct Cursor<'a> {
    block_size: usize,
    /// Those that are not open yet, or were not asked about.
    keys: &'a [Entry],
    /// Keys that started before the end of the last block asked for, and have not ended.
    open: Vec<&'a ContentKey>,
    parts: Vec<Part>,
}

impl<'a> Cursor<'a> {
    /// A walk from block number `first` on. O(log keys): what ends before it is not looked at.
    pub(crate) fn new(keys: &'a ContentKeys, first: usize, block_size: usize) -> Self {
        let position = position(first * block_size);
        let ended = keys.0.partition_point(|entry| entry.reach <= position);
        Self {
            block_size,
            keys: &keys.0[ended..],
            open: Vec::new(),
            parts: Vec::new(),
        }
    }

    /// The parts in block number `index`.
    pub(crate) fn parts(&mut self, index: usize) -> &[Part] {
        if self.keys.is_empty() && self.open.is_empty() {
            return &[];
        }
        let (first, end) = (
            position(index * self.block_size),
            position((index + 1) * self.block_size),
        );
        let started = self.keys.partition_point(|entry| entry.key.start < end);
        let (now, later) = self.keys.split_at(started);
        self.keys = later;
        self.open.extend(now.iter().map(|entry| &entry.key));
        self.open.retain(|key| key.stop > first);
        self.parts.clear();
        self.parts.extend(self.open.iter().map(|key| Part {
            start: key.start.saturating_sub(first),
            stop: key.stop.min(end) - first,
            key: Arc::clone(&key.key),
        }));
        &self.parts
    }
}

/// A position as keys count them. A sequence's fit: each has a token in memory.
#[allow(clippy::cast_possible_wrap)]
const fn position(index: usize) -> i64 {
    index as i64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(start: i64, stop: i64, key: &[u8]) -> ContentKey {
        ContentKey {
            start,
            stop,
            key: key.into(),
        }
    }

    #[test]
    fn a_part_says_where_in_the_content_its_block_lies() {
        let keys = ContentKeys::new(vec![key(40, 44, b"b"), key(6, 20, b"a")]).unwrap();
        let mut cursor = Cursor::new(&keys, 0, 8);
        let mut spans = |index| {
            cursor
                .parts(index)
                .iter()
                .map(|p| (p.start, p.stop))
                .collect::<Vec<_>>()
        };
        assert_eq!(spans(0), [(6, 8)]);
        assert_eq!(spans(1), [(-2, 8)]);
        assert_eq!(spans(2), [(-10, 4)]);
        assert_eq!(spans(3), []);
        assert_eq!(spans(5), [(0, 4)]);
        assert_eq!(spans(6), []);
    }

    #[test]
    fn a_walk_may_start_anywhere() {
        let keys = ContentKeys::new(vec![key(0, 100, b"long"), key(1, 2, b"short"), key(30, 40, b"late")]).unwrap();
        assert_eq!(Cursor::new(&keys, 0, 8).parts(3).len(), 2);
    }

    #[test]
    fn a_walk_does_not_look_at_what_ended_before_it() {
        let images = (0..1000).map(|i| key(10 * i, 10 * i + 7, &i.to_le_bytes()));
        let keys = ContentKeys::new(images.chain([key(35, 90, b"film")]).collect()).unwrap();
        for first in [0, 1, 5, 12, 600, 1249, 5000] {
            let mut cursor = Cursor::new(&keys, first, 8);
            assert!(
                cursor.keys.len() <= 1001 - (first * 8 / 10).min(1000),
                "from block {first}"
            );
            let mut whole = Cursor::new(&keys, 0, 8);
            for index in first..first + 20 {
                assert_eq!(cursor.parts(index), whole.parts(index), "block {index} from {first}");
            }
        }
    }

    #[test]
    fn a_truncation_keeps_what_a_walk_needs() {
        let mut keys = ContentKeys::new(vec![key(0, 50, b"a"), key(5, 9, b"b"), key(60, 70, b"c")]).unwrap();
        keys.truncate(40);
        assert_eq!(keys, ContentKeys::new(vec![key(0, 40, b"a"), key(5, 9, b"b")]).unwrap());
        keys.truncate(40);
        assert_eq!(Cursor::new(&keys, 4, 8).parts(4).len(), 1);
        assert_eq!(Cursor::new(&keys, 5, 8).parts(5).len(), 0);
    }

    /// What a block costs to look up is bounded: by the bytes of a key, and by the keys in it.
    #[test]
    fn long_keys_and_deep_piles_are_refused() {
        let long = |bytes| ContentKeys::new(vec![key(0, 9, &vec![1; bytes])]);
        assert!(long(MAX_KEY_BYTES).is_ok());
        let message = long(MAX_KEY_BYTES + 1).unwrap_err().to_string();
        assert_eq!(
            message,
            "content_keys is 257, expected at most 256 bytes each: a digest of the content"
        );
        let pile = |count: i64| ContentKeys::new((0..count).map(|i| key(i, 40, b"k")).collect());
        assert!(pile(MAX_CONTENT_DEPTH as i64).is_ok());
        let message = pile(MAX_CONTENT_DEPTH as i64 + 1).unwrap_err().to_string();
        assert_eq!(message, "content_keys is 17, expected at most 16 at one position");
        assert!(ContentKeys::new((0..100).map(|i| key(i, i + 16, b"k")).collect()).is_ok());
    }

    #[test]
    fn empty_ranges_are_refused() {
        assert!(matches!(
            ContentKeys::new(vec![key(3, 3, b"")]),
            Err(Error::InvalidArgument { got: 3, .. })
        ));
    }
}
