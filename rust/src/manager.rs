//! Level 2: sequences and their block tables.
//!
//! A [`KVCacheManager`] owns a pool, the cache of its prefixes, and sequences: tokens, how many of them have been
//! computed, and the table of blocks that holds their keys and values. It says where the next tokens go
//! ([`allocate_slots`](KVCacheManager::allocate_slots)), and is told when they have been computed
//! ([`commit`](KVCacheManager::commit)). It never touches a tensor: what has to be zeroed or copied before the next
//! step's writes is a list that the caller takes.
//!
//! The cycle of a step: `begin_step`, `append` the new token, `allocate_slots`, take the blocks to zero and the copies,
//! run them and then the forward pass over the tables, `complete_step`, `commit`.

mod check;
mod moves;
mod slots;
mod tables;
#[cfg(test)]
mod tests;

use crate::content::ContentKeys;
use crate::copies::Copies;
use crate::error::{BlockProblem, Error, Expected, Result};
use crate::ids::{BlockId, SeqHandle, Step};
use crate::namespace::NamespaceKey;
use crate::pool::{BlockPool, PoolStats};
use crate::prefix::{CacheStats, PrefixCache};
use crate::sequence::{Sequence, Sequences};
use crate::tokens::{Tokens, Vocabulary};
use crate::zeroing::Zeroing;

/// The most forks that one call makes.
pub const MAX_FORKS: usize = 1 << 16;

/// The most that the forks of one call copy, in table entries and tokens: 1 GiB. A sequence that is long itself can be
/// forked fewer times at once, so that a number alone does not take all memory there is.
const MAX_FORKED: usize = 1 << 28;

/// Layers that share a block table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KVGroup {
    /// The attention window in tokens; None is full attention.
    pub window: Option<u32>,
}

/// What a manager is made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManagerConfig {
    /// Blocks, the null block included.
    pub num_blocks: usize,
    /// Tokens in a block.
    pub block_size: usize,
    /// Are computed blocks published, and looked up?
    pub enable_prefix_caching: bool,
    /// Is a committed block given up where the cache has an equal one? If not, a table never changes behind the
    /// slots that were written, and equal blocks cost their space twice.
    pub merge_blocks: bool,
    /// Groups of layers. One, with full attention, is what this version does.
    pub groups: Vec<KVGroup>,
    /// Token ids are below it.
    pub vocab_size: Option<usize>,
}

impl ManagerConfig {
    /// The defaults: caching and merging, one group, any token id.
    #[must_use]
    pub fn new(num_blocks: usize, block_size: usize) -> Self {
        Self {
            num_blocks,
            block_size,
            enable_prefix_caching: true,
            merge_blocks: true,
            groups: vec![KVGroup::default()],
            vocab_size: None,
        }
    }
}

/// A manager's counts at one moment, and its totals since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ManagerStats {
    /// Sequences, the preempted ones included.
    pub num_sequences: usize,
    /// Preempted sequences.
    pub num_preempted: usize,
    /// Tokens of all sequences.
    pub num_tokens: usize,
    /// Of those, computed ones; a token shared by forks counts for each.
    pub num_computed_tokens: usize,
    /// Copies asked for by copy-on-write so far.
    pub copies: u64,
    /// Blocks that had to be zeroed for another tenant so far.
    pub zeroed: u64,
    /// Of the pool.
    pub pool: PoolStats,
    /// Of the cache, if there is one.
    pub cache: Option<CacheStats>,
}

/// Sequences over one pool; see the [module](self).
#[derive(Clone, Debug, PartialEq)]
pub struct KVCacheManager {
    block_size: usize,
    caching: bool,
    merging: bool,
    vocabulary: Vocabulary,
    pool: BlockPool,
    /// Without caching, it only keeps namespaces (tenants).
    cache: PrefixCache,
    sequences: Sequences,
    copies: Copies,
    zeroing: Zeroing,
    copied: u64,
    zeroed: u64,
    /// Kept for its capacity, empty between calls.
    scratch: Vec<BlockId>,
}

impl KVCacheManager {
    /// A manager without sequences.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for sizes that [`BlockPool::new`] refuses, no group, or a vocabulary of 0 or more
    /// than 2³¹; [`Error::Unsupported`] for more than one group, or a window.
    pub fn new(config: &ManagerConfig) -> Result<Self> {
        match config.groups[..] {
            [KVGroup { window: None }] => {}
            [] => return Err(Error::argument("groups", 0, Expected::Exactly(1))),
            [KVGroup { window: Some(window) }] => {
                let (got, expected) = (i128::from(window), Expected::That("a group without a window"));
                return Err(Error::Unsupported {
                    argument: "groups",
                    got,
                    expected,
                });
            }
            _ => {
                let (got, expected) = (config.groups.len() as i128, Expected::That("one group"));
                return Err(Error::Unsupported {
                    argument: "groups",
                    got,
                    expected,
                });
            }
        }
        let vocabulary = Vocabulary::new(config.vocab_size)?;
        let pool = BlockPool::new(config.num_blocks, config.block_size)?;
        Ok(Self {
            block_size: config.block_size,
            caching: config.enable_prefix_caching,
            merging: config.merge_blocks,
            vocabulary,
            cache: PrefixCache::new(&pool)?,
            zeroing: Zeroing::new(config.num_blocks)?,
            pool,
            sequences: Sequences::default(),
            copies: Copies::default(),
            copied: 0,
            zeroed: 0,
            scratch: Vec::new(),
        })
    }

    /// Adds a sequence, which takes the longest cached prefix of its tokens, at most all but the last.
    /// O(tokens).
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] without tokens; [`Error::TokenOutOfRange`]; [`Error::Block`] if a block of the
    /// prefix has 2³² − 1 references. On error nothing changes.
    pub fn add(&mut self, tokens: &[u32], key: NamespaceKey, content: ContentKeys) -> Result<SeqHandle> {
        if tokens.is_empty() {
            return Err(Error::argument("token_ids", 0, Expected::That("at least one token")));
        }
        self.vocabulary.check(tokens)?;
        let mut table = Vec::new();
        let mut node = None;
        if let (true, Some(root)) = (self.caching, self.cache.namespaces().find(&key)) {
            let (limit, size) = ((tokens.len() - 1) / self.block_size, self.block_size);
            let slice = |index: usize| &tokens[index * size..][..size];
            node = self
                .cache
                .acquire_run(&mut self.pool, root, limit, &content, slice, &mut table)?;
            self.cache.count_lookup(tokens.len());
        }
        let namespace = self.cache.namespaces_mut().hold_key(key);
        Ok(self.sequences.insert(Sequence {
            tokens: Tokens::new(tokens, self.block_size),
            computed: table.len() * self.block_size,
            slots: table.len() * self.block_size,
            committed: table.len(),
            table,
            node: node.map(|node| self.cache.handle(node)),
            namespace,
            era: self.cache.era(namespace),
            content,
            preempted: false,
            owned: false,
        }))
    }

    /// How many tokens a sequence added now would find cached. Leaves no trace. O(tokens found).
    #[must_use]
    pub fn probe(&self, tokens: &[u32], key: &NamespaceKey, content: &ContentKeys) -> usize {
        match self.cache.namespaces().find(key) {
            Some(root) if self.caching => {
                let (limit, size) = (tokens.len().saturating_sub(1) / self.block_size, self.block_size);
                self.cache
                    .probe_run(root, limit, content, |index| &tokens[index * size..][..size])
            }
            _ => 0,
        }
    }

    /// Appends tokens; takes no block. Amortised O(1) per token.
    ///
    /// # Errors
    /// [`Error::StaleHandle`]; [`Error::TokenOutOfRange`]. On error nothing changes.
    pub fn append(&mut self, seq: SeqHandle, tokens: &[u32]) -> Result<()> {
        self.vocabulary.check(tokens)?;
        self.sequences.get_mut(seq)?.tokens.extend(tokens);
        Ok(())
    }

    /// Keeps the first `num_tokens` tokens. Blocks beyond them are released with fence `after_step` (see
    /// [`BlockPool::release`]), those for lookahead too. Returns the length of the table, which is where it changed if
    /// it did. O(blocks dropped).
    ///
    /// # Errors
    /// [`Error::StaleHandle`]; [`Error::InvalidArgument`] for 0 or more tokens than there are; [`Error::Step`] for a
    /// step that has not begun. On error nothing changes.
    pub fn truncate(&mut self, seq: SeqHandle, num_tokens: usize, after_step: Option<Step>) -> Result<usize> {
        let sequence = self.sequences.get_mut(seq)?;
        if num_tokens == 0 || num_tokens > sequence.tokens.len() {
            let expected = Expected::Between(1, sequence.tokens.len() as u64);
            return Err(Error::argument("num_tokens", num_tokens, expected));
        }
        let fence = self.pool.fence(after_step)?;
        let keep = num_tokens.div_ceil(self.block_size).min(sequence.table.len());
        self.pool
            .release(&sequence.table[keep..], Some(fence), &mut self.cache)?;
        self.scratch.extend(sequence.table.drain(keep..));
        sequence.tokens.truncate(num_tokens);
        sequence.content.truncate(num_tokens);
        sequence.computed = sequence.computed.min(num_tokens);
        sequence.slots = sequence.slots.min(num_tokens);
        let committed = sequence.committed.min(num_tokens / self.block_size);
        if committed < sequence.committed {
            let node = sequence.node.and_then(|node| self.cache.resolve(node));
            let node = node.and_then(|node| self.cache.ancestor(node, sequence.committed - committed));
            sequence.node = node.map(|node| self.cache.handle(node));
            // Without a node (it was another sequence's, and is gone) the next commit starts over.
            sequence.committed = if sequence.node.is_some() { committed } else { 0 };
        }
        self.forget_dropped();
        Ok(keep)
    }

    /// Makes `n` copies of a sequence that share its blocks, as far as they hold computed tokens, until one writes.
    /// O(n · blocks).
    ///
    /// # Errors
    /// [`Error::StaleHandle`]; [`Error::InvalidArgument`] unless 1 ≤ n ≤ [`MAX_FORKS`] (fewer where the tables would
    /// take more than 1 GiB), or where there is no memory for the tables; [`Error::Block`] if a block would have 2³²
    /// references. On error nothing changes.
    pub fn fork(&mut self, seq: SeqHandle, n: usize) -> Result<Vec<SeqHandle>> {
        let parent = self.sequences.get(seq)?;
        let shared = parent.computed.div_ceil(self.block_size);
        let most = (MAX_FORKED / parent.fork_size(shared).max(1)).clamp(1, MAX_FORKS);
        let times = match u32::try_from(n) {
            Ok(times) if (1..=most).contains(&n) => times,
            _ => return Err(Error::argument("n", n, Expected::Between(1, most as u64))),
        };
        // All memory first: there may be none for the last one's table.
        let namespace = parent.namespace;
        let no_memory = |_| Error::argument("n", n, Expected::That("a number for whose tables there is memory"));
        let mut children = Vec::new();
        children.try_reserve_exact(n).map_err(no_memory)?;
        for _ in 0..n {
            children.push(parent.fork(shared).map_err(no_memory)?);
        }
        self.sequences.try_reserve(n).map_err(no_memory)?;
        self.pool.retain_times(&children[0].table, times)?;
        let forked = children.into_iter().map(|child| {
            self.cache.namespaces_mut().hold(namespace);
            self.sequences.insert(child)
        });
        Ok(forked.collect())
    }

    /// Drops the sequence's blocks, with fence `after_step`, and keeps its tokens. What it had committed stays
    /// findable until the space is needed. O(blocks).
    ///
    /// # Errors
    /// [`Error::StaleHandle`]; [`Error::InvalidArgument`] if it is preempted already; [`Error::Step`]. On error
    /// nothing changes.
    pub fn preempt(&mut self, seq: SeqHandle, after_step: Option<Step>) -> Result<()> {
        let sequence = self.sequences.get_mut(seq)?;
        if sequence.preempted {
            return Err(Self::is_preempted_error(seq));
        }
        self.pool.release(&sequence.table, after_step, &mut self.cache)?;
        self.scratch.append(&mut sequence.table);
        sequence.computed = 0;
        sequence.slots = 0;
        sequence.committed = 0;
        sequence.node = None;
        sequence.preempted = true;
        self.forget_dropped();
        Ok(())
    }

    /// Ends a preemption: takes the longest cached prefix of the sequence's tokens, at most all but the last, and
    /// returns how many tokens that is. O(tokens found).
    ///
    /// # Errors
    /// [`Error::StaleHandle`]; [`Error::InvalidArgument`] if it is not preempted; [`Error::Block`] if a block of the
    /// prefix has 2³² − 1 references. On error nothing changes.
    pub fn resume(&mut self, seq: SeqHandle) -> Result<usize> {
        let size = self.block_size;
        let sequence = self.sequences.get_mut(seq)?;
        if !sequence.preempted {
            return Err(Error::argument(
                "seq",
                seq.0,
                Expected::That("a sequence that is preempted"),
            ));
        }
        let mut node = None;
        if self.caching {
            let (limit, tokens) = ((sequence.tokens.len() - 1) / size, &sequence.tokens);
            let (root, content, table) = (sequence.namespace, &sequence.content, &mut sequence.table);
            node = self
                .cache
                .acquire_run(&mut self.pool, root, limit, content, |i| tokens.block(i, size), table)?;
            self.cache.count_lookup(tokens.len());
        }
        sequence.committed = sequence.table.len();
        sequence.computed = sequence.table.len() * size;
        sequence.slots = sequence.computed;
        sequence.node = node.map(|node| self.cache.handle(node));
        sequence.era = self.cache.era(sequence.namespace);
        sequence.preempted = false;
        Ok(sequence.computed)
    }

    /// Ends a sequence: its blocks are released with fence `after_step`. O(blocks).
    ///
    /// # Errors
    /// [`Error::StaleHandle`]; [`Error::Step`]. On error nothing changes.
    pub fn free(&mut self, seq: SeqHandle, after_step: Option<Step>) -> Result<()> {
        let sequence = self.sequences.get(seq)?;
        self.pool.release(&sequence.table, after_step, &mut self.cache)?;
        let mut sequence = self.sequences.remove(seq)?;
        self.scratch.append(&mut sequence.table);
        self.forget_dropped();
        self.cache.namespaces_mut().unhold(sequence.namespace)
    }

    fn is_preempted_error(seq: SeqHandle) -> Error {
        Error::argument(
            "seq",
            seq.0,
            Expected::That("a sequence that is not preempted (resume it first)"),
        )
    }

    /// Empties `scratch`, blocks that a table has given up: of those that nobody holds, pending copies into them are
    /// cancelled and pending zeroing is left to the next owner.
    fn forget_dropped(&mut self) {
        let mut dropped = std::mem::take(&mut self.scratch);
        if !self.copies.is_empty() || !self.zeroing.is_empty() {
            let mut orphans = Vec::new();
            for &block in dropped.iter().filter(|&&block| self.pool.ref_count(block) == Ok(0)) {
                self.zeroing.give_up(block);
                orphans.extend(self.copies.cancel(block));
            }
            // The pairs' own references: nobody else can have given them back.
            let released = self.pool.release(&orphans, None, &mut self.cache);
            debug_assert_eq!(released, Ok(()));
        }
        dropped.clear();
        self.scratch = dropped;
    }
}
