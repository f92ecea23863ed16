//! The tokens of a sequence, shared between forks.
//!
//! Full chunks are immutable and counted, the rest is the sequence's own: a fork of a long sequence copies a few
//! pointers and less than a chunk of tokens, and appending never touches what is shared. A chunk is a whole number
//! of blocks, so the tokens of a full block are always one slice.

use std::collections::TryReserveError;
use std::sync::Arc;

use crate::error::{Error, Expected, Result};

/// The token ids that there are: those below a size. What checks token ids anywhere asks here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vocabulary {
    /// 1 to 2³¹.
    size: u32,
}

impl Vocabulary {
    /// Every token id that fits the int32 arrays in which they travel.
    pub(crate) const ALL: Self = Self { size: 1 << 31 };

    /// Token ids below `size`; all of them without one.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for `vocab_size` unless 1 ≤ size ≤ 2³¹.
    pub(crate) fn new(size: Option<usize>) -> Result<Self> {
        let size = size.unwrap_or(1 << 31);
        if let Ok(size @ 1..=0x8000_0000) = u32::try_from(size) {
            return Ok(Self { size });
        }
        let expected = Expected::Between(1, Self::ALL.size());
        Err(Error::argument("vocab_size", size, expected))
    }

    pub(crate) fn size(self) -> u64 {
        self.size.into()
    }

    pub(crate) fn contains(self, token: impl Into<i64>) -> bool {
        (0..i64::from(self.size)).contains(&token.into())
    }

    /// Are all of these in the vocabulary? O(tokens).
    ///
    /// # Errors
    /// [`Error::TokenOutOfRange`] for the first that is not.
    pub(crate) fn check<T: Copy + Ord + Into<i64>>(self, tokens: &[T]) -> Result<()> {
        let Some(&first) = tokens.first() else { return Ok(()) };
        // A pass that is done many at a time; where a bad one is matters only if there is one.
        let (low, high) = tokens
            .iter()
            .fold((first, first), |(low, high), &token| (token.min(low), token.max(high)));
        if self.contains(low) && self.contains(high) {
            return Ok(());
        }
        let bad = (0..).zip(tokens).find(|&(_, &token)| !self.contains(token));
        bad.map_or(Ok(()), |(position, &token)| Err(self.refuse(token, position)))
    }

    /// The error for a token outside.
    pub(crate) fn refuse(self, token: impl Into<i64>, position: usize) -> Error {
        Error::TokenOutOfRange {
            token: token.into(),
            position,
            vocab_size: self.size(),
        }
    }
}

/// About how many tokens a chunk has.
const CHUNK_TOKENS: usize = 1024;

/// A sequence's tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tokens {
    /// Tokens in a chunk: a multiple of the block size.
    chunk: usize,
    full: Vec<Arc<Vec<u32>>>,
    /// Less than a chunk.
    tail: Vec<u32>,
}

impl Tokens {
    /// A copy of `tokens`. O(tokens).
    pub(crate) fn new(tokens: &[u32], block_size: usize) -> Self {
        let chunk = block_size * (CHUNK_TOKENS / block_size).max(1);
        let chunks = tokens.chunks_exact(chunk);
        let tail = chunks.remainder().to_vec();
        Self {
            chunk,
            full: chunks.map(|chunk| Arc::new(chunk.to_vec())).collect(),
            tail,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.full.len() * self.chunk + self.tail.len()
    }

    /// A copy that shares the full chunks.
    pub(crate) fn try_clone(&self) -> Result<Self, TryReserveError> {
        let (mut full, mut tail) = (Vec::new(), Vec::new());
        full.try_reserve_exact(self.full.len())?;
        full.extend_from_slice(&self.full);
        tail.try_reserve_exact(self.tail.len())?;
        tail.extend_from_slice(&self.tail);
        Ok(Self {
            chunk: self.chunk,
            full,
            tail,
        })
    }

    /// How much a clone copies, in tokens; a pointer to a chunk is as large as two.
    pub(crate) fn copied_by_clone(&self) -> usize {
        2 * self.full.len() + self.tail.len()
    }

    /// Amortised O(1) per token.
    pub(crate) fn extend(&mut self, mut tokens: &[u32]) {
        while self.tail.len() + tokens.len() >= self.chunk {
            let (now, later) = tokens.split_at(self.chunk - self.tail.len());
            self.tail.extend_from_slice(now);
            self.full.push(Arc::new(std::mem::take(&mut self.tail)));
            tokens = later;
        }
        self.tail.extend_from_slice(tokens);
    }

    /// Keeps the first `len`, which is not more than there are. O(chunks dropped + chunk).
    pub(crate) fn truncate(&mut self, len: usize) {
        let (chunks, rest) = (len / self.chunk, len % self.chunk);
        if chunks < self.full.len() {
            self.tail.clear();
            self.tail.extend_from_slice(&self.full[chunks][..rest]);
            self.full.truncate(chunks);
        } else {
            self.tail.truncate(rest);
        }
    }

    /// Those from `start` on that lie together in memory; empty at the end.
    fn together(&self, start: usize) -> &[u32] {
        let chunk = self.full.get(start / self.chunk).map_or(&self.tail, |chunk| &**chunk);
        chunk.get(start % self.chunk..).unwrap_or(&[])
    }

    /// The tokens of full block `index`.
    pub(crate) fn block(&self, index: usize, block_size: usize) -> &[u32] {
        &self.together(index * block_size)[..block_size]
    }

    pub(crate) fn get(&self, position: usize) -> Option<u32> {
        if position < self.len() {
            self.together(position).first().copied()
        } else {
            None
        }
    }

    /// Slices that make up `start..stop`, a range of them.
    pub(crate) fn slices(&self, start: usize, stop: usize) -> impl Iterator<Item = &[u32]> {
        let mut position = start;
        std::iter::from_fn(move || {
            let slice = self.together(position);
            let slice = &slice[..slice.len().min(stop - position)];
            position += slice.len();
            (!slice.is_empty()).then_some(slice)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vocabulary_is_1_to_all_int32s() {
        for size in [0, (1 << 31) + 1, usize::MAX] {
            let refused = Vocabulary::new(Some(size)).unwrap_err();
            let expected = Expected::Between(1, 1 << 31);
            assert_eq!(refused, Error::argument("vocab_size", size, expected));
        }
        assert_eq!(Vocabulary::new(None), Vocabulary::new(Some(1 << 31)));
    }

    #[test]
    fn the_first_token_outside_is_named() {
        let vocabulary = Vocabulary::new(Some(10)).unwrap();
        let named = |token, position| {
            Err(Error::TokenOutOfRange {
                token,
                position,
                vocab_size: 10,
            })
        };
        assert_eq!(vocabulary.check::<u32>(&[]), Ok(()));
        assert_eq!(vocabulary.check(&[0_u32, 9]), Ok(()));
        assert_eq!(vocabulary.check(&[0_u32, 10, u32::MAX]), named(10, 1));
        assert_eq!(vocabulary.check(&[0_i32, 3, -1]), named(-1, 2));
        assert_eq!(Vocabulary::ALL.check(&[i32::MAX]), Ok(()));
        assert!(Vocabulary::ALL.check(&[1_u32 << 31]).is_err());
    }

    fn read(tokens: &Tokens, start: usize, stop: usize) -> Vec<u32> {
        tokens.slices(start, stop).flatten().copied().collect()
    }

    #[test]
    fn chunks_do_not_show() {
        for block_size in [1, 16, 48, 1024, 5000] {
            let all: Vec<u32> = (0..12_345).collect();
            let mut tokens = Tokens::new(&all[..3000], block_size);
            let fork = tokens.clone();
            tokens.extend(&all[3000..3001]);
            tokens.extend(&all[3001..]);
            assert_eq!(tokens.len(), all.len());
            assert_eq!(read(&tokens, 0, all.len()), all);
            assert_eq!(read(&tokens, 1023, 1026), all[1023..1026]);
            for index in 0..all.len() / block_size {
                assert_eq!(
                    tokens.block(index, block_size),
                    &all[index * block_size..][..block_size]
                );
            }
            assert_eq!((tokens.get(12_344), tokens.get(12_345)), (Some(12_344), None));
            for len in [12_000, 10_240, 2048, 1] {
                tokens.truncate(len);
                assert_eq!(read(&tokens, 0, len), all[..len]);
                assert_eq!(tokens.len(), len);
            }
            tokens.extend(&[7]);
            assert_eq!(read(&tokens, 0, 2), [0, 7]);
            assert_eq!(read(&fork, 0, 3000), all[..3000]);
        }
    }
}
