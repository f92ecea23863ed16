//! A sequence as the model sees it, and the tags of its tokens.

use super::*;

/// A sequence as the model sees it.
#[derive(Clone, Debug)]
pub struct Seq {
    pub handle: SeqHandle,
    pub namespace: usize,
    pub tokens: Vec<u32>,
    /// What is content, and where it ends.
    pub content: u32,
    pub content_stop: usize,
    pub table: Vec<BlockId>,
    pub computed: usize,
    pub slots: usize,
    pub committed: usize,
    /// The block that publishes the last of them, and since when: without merging it can be another sequence's.
    pub last: Option<(usize, u64)>,
    /// Resets and purges at the time its blocks were computed.
    pub era: (u64, u64),
    pub preempted: bool,
    /// Positions after the computed ones that steps in flight compute.
    pub scheduled: usize,
    /// Changes when what is in flight does not count any more.
    pub epoch: u64,
}

impl Seq {
    /// Tokens with the content at their place: what makes two prefixes equal.
    pub fn identity(&self) -> Vec<u32> {
        identity(&self.tokens, self.content, self.content_stop)
    }

    pub fn tag(&self, position: usize) -> Tag {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64 ^ self.namespace as u64;
        for token in &self.identity()[..=position] {
            hash = (hash ^ u64::from(*token)).wrapping_mul(0x0100_0000_01b3).rotate_left(5);
        }
        Tag {
            tenant: tenant(self.namespace),
            hash,
        }
    }
}

pub fn identity(tokens: &[u32], content: u32, stop: usize) -> Vec<u32> {
    let inside = |position: usize| content > 0 && position >= CONTENT.start && position < stop;
    tokens
        .iter()
        .enumerate()
        .map(|(i, token)| token + if inside(i) { 1000 * content } else { 0 })
        .collect()
}

pub fn content_keys(content: u32) -> ContentKeys {
    let (start, stop) = (CONTENT.start as i64, CONTENT.end as i64);
    let key = ContentKey {
        start,
        stop,
        key: content.to_le_bytes().into(),
    };
    ContentKeys::new(if content == 0 { vec![] } else { vec![key] }).unwrap()
}

pub fn tenant(namespace: usize) -> usize {
    namespace.min(1)
}

pub fn key(namespace: usize) -> NamespaceKey {
    let tenant = if tenant(namespace) == 0 { "a" } else { "b" };
    let cache_salt = if namespace == 2 { "salt" } else { "" };
    NamespaceKey {
        tenant: tenant.into(),
        cache_salt: cache_salt.into(),
        extra_keys: [].into(),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag {
    pub tenant: usize,
    pub hash: u64,
}
