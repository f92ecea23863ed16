//! Content that token ids do not tell: images, audio, embeddings.
//!
//! Such content stands in a prompt as placeholder tokens, the same for every image. A [`ContentKey`] says which
//! positions a content covers and by what bytes it is known (a digest); a block that overlaps it carries those bytes,
//! and where in the content the block lies, in its identity.

use std::hash::{Hash, Hasher};
use std::sync::Arc;

use crate::error::{Error, Expected, Result};

/// Positions `start..stop` stand for the content known as `key`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ContentKey {
    /// The first position, counted from the first token of the call; negative if the content began before it.
    pub start: i64,
    /// The position after the last.
    pub stop: i64,
    /// What the content is known by.
    pub key: Arc<[u8]>,
}

/// The content of a sequence, in order of position. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContentKeys(Arc<[ContentKey]>);

impl Default for ContentKeys {
    fn default() -> Self {
        Self(Arc::from([]))
    }
}

impl ContentKeys {
    /// Takes keys in any order. O(n log n).
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a key that covers no position.
    pub fn new(mut keys: Vec<ContentKey>) -> Result<Self> {
        if let Some(key) = keys.iter().find(|key| key.stop <= key.start) {
            let expected = Expected::That("a stop after its start");
            return Err(Error::argument("content_keys", key.stop, expected));
        }
        keys.sort_unstable();
        Ok(Self(keys.into()))
    }

    /// What is left of it in the first `len` positions. O(keys).
    pub(crate) fn truncate(&mut self, len: usize) {
        let len = i64::try_from(len).unwrap_or(i64::MAX);
        if self.0.iter().any(|key| key.stop > len) {
            let kept = self.0.iter().filter(|key| key.start < len);
            self.0 = kept
                .map(|key| ContentKey {
                    stop: key.stop.min(len),
                    ..key.clone()
                })
                .collect();
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
    keys: &'a [ContentKey],
    /// Keys that started before the end of the last block asked for, and have not ended.
    open: Vec<&'a ContentKey>,
    parts: Vec<Part>,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(keys: &'a ContentKeys) -> Self {
        Self {
            keys: &keys.0,
            open: Vec::new(),
            parts: Vec::new(),
        }
    }

    /// The parts in block number `index` of `block_size` tokens.
    pub(crate) fn parts(&mut self, index: usize, block_size: usize) -> &[Part] {
        if self.keys.is_empty() && self.open.is_empty() {
            return &[];
        }
        // A sequence's positions fit: each has a token in memory.
        #[allow(clippy::cast_possible_wrap)]
        let (first, end) = ((index * block_size) as i64, ((index + 1) * block_size) as i64);
        let started = self.keys.partition_point(|key| key.start < end);
        let (now, later) = self.keys.split_at(started);
        self.keys = later;
        self.open.extend(now);
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
        let mut cursor = Cursor::new(&keys);
        let mut spans = |index| {
            cursor
                .parts(index, 8)
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
        assert_eq!(Cursor::new(&keys).parts(3, 8).len(), 2);
    }

    #[test]
    fn empty_ranges_are_refused() {
        assert!(matches!(
            ContentKeys::new(vec![key(3, 3, b"")]),
            Err(Error::InvalidArgument { got: 3, .. })
        ));
    }
}
