//! Level 1: which blocks hold which tokens.
//!
//! A [`PrefixCache`] is a trie of full, computed blocks over the pool's ids. It holds no reference: while somebody
//! holds a published block the block is used, and when nobody does it is cached, findable until the pool needs the
//! space. What a caller acquires is a run of blocks from the start of a prompt, each with one reference more; what a
//! caller commits becomes findable, and where the same block was committed before, the caller gets that one instead.

mod runs;
#[cfg(test)]
mod tests;

use std::collections::HashMap;

use crate::content::ContentKeys;
use crate::error::{Error, Expected, Result};
use crate::ids::{BlockId, NamespaceHandle, NodeHandle, NodeId, Step};
use crate::namespace::{NamespaceKey, Namespaces};
use crate::pool::{BlockPool, Reclaim};
use crate::trie::Trie;
pub(crate) use runs::CommitAt;

/// The longest cached prefix of some tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PrefixHit {
    /// Its blocks, in order; the caller holds one reference to each.
    pub blocks: Vec<BlockId>,
    /// Tokens covered: whole blocks.
    pub num_tokens: usize,
    /// The last block's node: what a commit goes on from. None if there is no hit.
    pub node: Option<NodeHandle>,
}

/// What a commit made of the caller's blocks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Commit {
    /// The blocks to use from now on, as many as were given. Where one differs from the one given, the caller's
    /// reference has moved to it.
    pub blocks: Vec<BlockId>,
    /// The last full block's node: what the next commit goes on from. The parent, if no block was full.
    pub node: Option<NodeHandle>,
}

/// A cache's counts at one moment, and its totals since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Published blocks.
    pub num_nodes: usize,
    /// Published blocks that can be evicted at this moment.
    pub num_evictable: usize,
    /// Living namespaces.
    pub num_namespaces: usize,
    /// Prefixes looked up to be taken: by `acquire`, or by a sequence that was added or resumed.
    pub lookups: u64,
    /// Tokens asked for by them.
    pub lookup_tokens: u64,
    /// Tokens found by them.
    pub hit_tokens: u64,
    /// Blocks published.
    pub published: u64,
    /// Blocks that were given up for an equal one.
    pub merged: u64,
    /// Blocks evicted to make space, or by `evict`.
    pub evicted: u64,
}

/// A number that changes whenever what was published in a namespace is withdrawn; see [`PrefixCache::reset`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Era {
    resets: u64,
    withdrawals: u64,
}

/// The trie of published blocks of one pool.
#[derive(Clone, Debug, PartialEq)]
pub struct PrefixCache {
    block_size: usize,
    trie: Trie,
    namespaces: Namespaces,
    resets: u64,
    lookups: u64,
    lookup_tokens: u64,
    hit_tokens: u64,
    published: u64,
    merged: u64,
    evicted: u64,
    /// Kept for its capacity, empty between calls.
    duplicates: Vec<BlockId>,
}

impl Reclaim for PrefixCache {
    fn evictable(&self) -> usize {
        self.trie.evictable()
    }

    fn evict_into(&mut self, n: usize, out: &mut Vec<BlockId>) {
        let mut left = n;
        let mut batch = [NodeId::FIRST; 32];
        while left > 0 {
            let wanted = left.min(batch.len());
            let count = self.trie.least_recent(&mut batch[..wanted]);
            if count == 0 {
                return;
            }
            for &node in &batch[..count] {
                out.push(self.trie.block(node));
                self.forget(node);
            }
            self.evicted += count as u64;
            left -= count;
        }
    }

    fn pin(&mut self, node: NodeId) {
        self.trie.pin(node);
    }

    fn unpin(&mut self, node: NodeId) {
        self.trie.unpin(node);
    }
}

impl PrefixCache {
    /// An empty cache for `pool`. All calls have to be made with that pool. O(1).
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] where there is no memory for 4 bytes per block.
    pub fn new(pool: &BlockPool) -> Result<Self> {
        Ok(Self {
            block_size: pool.block_size(),
            trie: Trie::new(pool.num_blocks(), pool.block_size())?,
            namespaces: Namespaces::default(),
            resets: 0,
            lookups: 0,
            lookup_tokens: 0,
            hit_tokens: 0,
            published: 0,
            merged: 0,
            evicted: 0,
            duplicates: Vec::new(),
        })
    }

    /// The namespace of a key, made if need be, and held: it lives at least until
    /// [`drop_namespace`](Self::drop_namespace) is called as often as this. O(length of the key).
    pub fn namespace(&mut self, key: NamespaceKey) -> NamespaceHandle {
        self.namespaces.open(key)
    }

    /// Drops one handle of a namespace. Its blocks stay findable, unless `purge`: then none of them can be found
    /// from now on (see [`reset`](Self::reset)). Without handles, sequences and blocks the namespace vanishes, and the
    /// handle is stale. O(1), with `purge` O(nodes). Returns how many blocks were withdrawn.
    ///
    /// # Errors
    /// [`Error::StaleHandle`] if it was dropped as often as it was asked for, or the namespace has vanished. On error
    /// nothing changes.
    pub fn drop_namespace(&mut self, pool: &mut BlockPool, namespace: NamespaceHandle, purge: bool) -> Result<usize> {
        let root = self.namespaces.resolve_open(namespace)?;
        let mut withdrawn = 0;
        if purge {
            self.namespaces.withdraw(root);
            withdrawn = self.withdraw(pool, Some(root));
        }
        self.namespaces.close(root);
        Ok(withdrawn)
    }

    /// How many of `tokens` are cached: whole blocks from the start, at most `max_tokens`. Leaves no trace.
    /// O(tokens found).
    ///
    /// # Errors
    /// [`Error::StaleHandle`] if the namespace has vanished.
    pub fn probe(
        &self,
        tokens: &[u32],
        namespace: NamespaceHandle,
        max_tokens: Option<usize>,
        content: &ContentKeys,
    ) -> Result<usize> {
        let root = self.namespaces.resolve(namespace)?;
        Ok(
            self.probe_run(root, self.full_blocks(tokens.len(), max_tokens), content, |i| {
                self.slice(tokens, i)
            }),
        )
    }

    /// Takes the longest cached prefix of `tokens`, at most `max_tokens`: adds a reference to each of its blocks.
    /// O(tokens found).
    ///
    /// # Errors
    /// [`Error::StaleHandle`] if the namespace has vanished; [`Error::Block`] if a block has 2³² − 1 references. On
    /// error nothing changes.
    pub fn acquire(
        &mut self,
        pool: &mut BlockPool,
        tokens: &[u32],
        namespace: NamespaceHandle,
        max_tokens: Option<usize>,
        content: &ContentKeys,
    ) -> Result<PrefixHit> {
        let root = self.namespaces.resolve(namespace)?;
        let limit = self.full_blocks(tokens.len(), max_tokens);
        let block_size = self.block_size;
        let mut blocks = Vec::new();
        let node = self.acquire_run(
            pool,
            root,
            limit,
            content,
            |i| &tokens[i * block_size..][..block_size],
            &mut blocks,
        )?;
        self.count_lookup(tokens.len());
        Ok(PrefixHit {
            num_tokens: blocks.len() * self.block_size,
            blocks,
            node: node.map(|node| self.trie.handle(node)),
        })
    }

    /// Publishes full, computed blocks: block i holds the i-th `block_size` tokens after `parent`. A tail shorter
    /// than a block is ignored; its block may stand at the end of `blocks`. Where the trie has such a block already,
    /// the caller's reference moves to it, and the caller's block is released with fence `after_step`
    /// (see [`BlockPool::release`]). A block that is published at this very place already is left alone.
    /// Positions in `content` count from the first of `tokens`. O(tokens).
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the number of blocks does not fit the tokens, or the parent is of another
    /// namespace; [`Error::StaleHandle`]; [`Error::Step`]; [`Error::Block`] for a block that nobody holds, that is
    /// published at another place, or named twice. On error nothing changes.
    #[allow(clippy::too_many_arguments)] // it is the one call that says all of it
    pub fn commit(
        &mut self,
        pool: &mut BlockPool,
        tokens: &[u32],
        blocks: &[BlockId],
        namespace: NamespaceHandle,
        parent: Option<NodeHandle>,
        after_step: Option<Step>,
        content: &ContentKeys,
    ) -> Result<Commit> {
        let root = self.namespaces.resolve(namespace)?;
        let parent = parent.map(|parent| self.trie.resolve(parent)).transpose()?;
        let full = tokens.len() / self.block_size;
        let most = tokens.len().div_ceil(self.block_size);
        if !(full..=most).contains(&blocks.len()) {
            return Err(Error::argument(
                "blocks",
                blocks.len(),
                Expected::Between(full as u64, most as u64),
            ));
        }
        if parent.is_some_and(|parent| self.trie.namespace(parent) != root) {
            let expected = Expected::That("a node of the namespace given");
            return Err(Error::argument("parent", parent.map_or(0, NodeId::get), expected));
        }
        let fence = pool.fence(after_step)?;
        let mut blocks = blocks.to_vec();
        let at = CommitAt {
            namespace: root,
            parent,
            fence,
            merge: true,
            content,
            first: 0,
        };
        let block_size = self.block_size;
        let (node, _) = self.commit_run(pool, at, &mut blocks[..full], |i| {
            &tokens[i * block_size..][..block_size]
        })?;
        Ok(Commit {
            blocks,
            node: node.map(|node| self.trie.handle(node)),
        })
    }

    /// Evicts up to `n` blocks, least recently used first, children before parents; what is held, or read by a step
    /// in flight, stays. Returns how many went. O(1) per block.
    pub fn evict(&mut self, pool: &mut BlockPool, n: usize) -> usize {
        let mut evicted = Vec::new();
        self.evict_into(n.min(self.evictable()), &mut evicted);
        evicted.iter().for_each(|&block| pool.unpublish(block));
        evicted.len()
    }

    /// Withdraws everything: no block can be found any more. Cached blocks become free, or fenced where a step in
    /// flight may read them; used blocks stay with their holders. What sequences of a manager have computed so far
    /// stays unfindable too, since the usual reason for a reset is that the weights have changed.
    /// Returns how many blocks were withdrawn. O(nodes).
    pub fn reset(&mut self, pool: &mut BlockPool) -> usize {
        self.resets += 1;
        self.withdraw(pool, None)
    }

    /// Counts and totals. O(1).
    #[must_use]
    pub fn stats(&self) -> CacheStats {
        CacheStats {
            num_nodes: self.trie.len(),
            num_evictable: self.trie.evictable(),
            num_namespaces: self.namespaces.len(),
            lookups: self.lookups,
            lookup_tokens: self.lookup_tokens,
            hit_tokens: self.hit_tokens,
            published: self.published,
            merged: self.merged,
            evicted: self.evicted,
        }
    }

    /// Checks every invariant of this level against `pool`. O(nodes + blocks).
    ///
    /// # Errors
    /// [`Error::Corruption`] that names the first one broken.
    pub fn check(&self, pool: &BlockPool) -> Result<()> {
        let mut per_namespace: HashMap<u32, usize> = HashMap::new();
        for node in self.trie.iter() {
            let block = self.trie.block(node);
            *per_namespace.entry(self.trie.namespace(node)).or_default() += 1;
            if pool.node_of(block) != Some(node) {
                let found = pool.node_of(block).map_or(0, NodeId::get);
                return Err(Error::corruption(
                    "P7",
                    "the node of a published block",
                    block.0,
                    found,
                    node.get(),
                ));
            }
        }
        let published = pool.num_published();
        if published != self.trie.len() {
            return Err(Error::corruption(
                "P7",
                "the number of published blocks",
                0,
                published,
                self.trie.len(),
            ));
        }
        self.trie.check(|block| pool.is_pinned(block))?;
        self.namespaces.check(&per_namespace)
    }

    /// Whole blocks among `len` tokens, at most `max_tokens`.
    fn full_blocks(&self, len: usize, max_tokens: Option<usize>) -> usize {
        len.min(max_tokens.unwrap_or(usize::MAX)) / self.block_size
    }

    fn slice<'a>(&self, tokens: &'a [u32], index: usize) -> &'a [u32] {
        &tokens[index * self.block_size..][..self.block_size]
    }

    /// Takes a node out of the trie; its block is unpublished by the caller.
    fn forget(&mut self, node: NodeId) {
        let root = self.trie.namespace(node);
        self.trie.remove(node);
        self.namespaces.remove_node(root);
    }

    /// Unpublishes all blocks of a namespace, or of all.
    fn withdraw(&mut self, pool: &mut BlockPool, root: Option<u32>) -> usize {
        let nodes: Vec<_> = self
            .trie
            .iter()
            .filter(|&node| root.is_none_or(|root| self.trie.namespace(node) == root))
            .collect();
        // Backwards, so that the places are given out again in ascending order: see `Trie::find`.
        for &node in nodes.iter().rev() {
            pool.unpublish(self.trie.block(node));
            self.forget(node);
        }
        nodes.len()
    }
}
