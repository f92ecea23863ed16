//! Lookups and commits of runs of blocks, whose tokens need not be one slice and whose table is the caller's.

use super::{BlockId, BlockPool, Era, PrefixCache};
use crate::content::{ContentKeys, Cursor};
use crate::error::{BlockProblem, Result};
use crate::ids::{NodeHandle, NodeId, Step};
use crate::namespace::{Namespaces, TenantSerial};
use crate::trie::Query;

/// Where in the trie a run of blocks is committed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CommitAt<'a> {
    pub(crate) namespace: u32,
    pub(crate) parent: Option<NodeId>,
    /// The fence of duplicates.
    pub(crate) fence: Step,
    /// Give up blocks that the trie has already?
    pub(crate) merge: bool,
    pub(crate) content: &'a ContentKeys,
    /// The number of the first block, counted from where the content's positions count.
    pub(crate) first: usize,
}

impl PrefixCache {
    pub(crate) fn namespaces(&self) -> &Namespaces {
        &self.namespaces
    }

    pub(crate) fn namespaces_mut(&mut self) -> &mut Namespaces {
        &mut self.namespaces
    }

    pub(crate) fn tenant(&self, root: u32) -> TenantSerial {
        self.namespaces.tenant(root)
    }

    /// What was computed in another era must not be published in this one.
    pub(crate) fn era(&self, root: u32) -> Era {
        Era {
            resets: self.resets,
            withdrawals: self.namespaces.withdrawals(root),
        }
    }

    /// Counts a lookup for as many tokens.
    pub(crate) fn count_lookup(&mut self, tokens: usize) {
        self.lookups += 1;
        self.lookup_tokens += tokens as u64;
    }

    /// Is the node of this handle still there?
    pub(crate) fn resolve(&self, node: NodeHandle) -> Option<NodeId> {
        self.trie.resolve(node).ok()
    }

    pub(crate) fn handle(&self, node: NodeId) -> NodeHandle {
        self.trie.handle(node)
    }

    /// The node `levels` above.
    pub(crate) fn ancestor(&self, node: NodeId, levels: usize) -> Option<NodeId> {
        (0..levels).try_fold(node, |node, _| self.trie.parent(node))
    }

    /// How many tokens of at most `limit` full blocks are cached.
    pub(crate) fn probe_run<'a>(
        &self,
        namespace: u32,
        limit: usize,
        content: &ContentKeys,
        tokens: impl Fn(usize) -> &'a [u32],
    ) -> usize {
        self.walk(namespace, limit, content, tokens).count() * self.block_size
    }

    /// How many blocks at the front of the longest cached run cannot be evicted, as they or blocks after them are held:
    /// a sequence that acquires the run takes away all others. O(that many).
    pub(crate) fn held_run<'a>(
        &self,
        namespace: u32,
        limit: usize,
        content: &ContentKeys,
        tokens: impl Fn(usize) -> &'a [u32],
    ) -> usize {
        // Whatever stands above a pinned node is pinned.
        let run = self.walk(namespace, limit, content, tokens);
        run.take_while(|&node| self.trie.is_pinned(node)).count()
    }

    /// The nodes of the longest cached run from the root.
    fn walk<'a>(
        &self,
        namespace: u32,
        limit: usize,
        content: &ContentKeys,
        tokens: impl Fn(usize) -> &'a [u32],
    ) -> impl Iterator<Item = NodeId> {
        let mut cursor = Cursor::new(content, 0, self.block_size);
        let mut parent = None;
        (0..limit).map_while(move |index| {
            let content = cursor.parts(index);
            parent = self.trie.find(&Query {
                parent,
                namespace,
                tokens: tokens(index),
                content,
            });
            parent
        })
    }

    /// Adds a reference to each block of the longest cached run of at most `limit` full blocks and appends them to
    /// `blocks`. Returns the last one's node. On error nothing changes.
    pub(crate) fn acquire_run<'a>(
        &mut self,
        pool: &mut BlockPool,
        namespace: u32,
        limit: usize,
        content: &ContentKeys,
        tokens: impl Fn(usize) -> &'a [u32],
        blocks: &mut Vec<BlockId>,
    ) -> Result<Option<NodeId>> {
        let start = blocks.len();
        let mut last = None;
        for node in self.walk(namespace, limit, content, tokens) {
            last = Some(node);
            blocks.push(self.trie.block(node));
        }
        if let Some(&full) = blocks[start..]
            .iter()
            .find(|block| pool.ref_count(**block) == Ok(u32::MAX))
        {
            blocks.truncate(start);
            return Err(pool.refuse(full, BlockProblem::TooManyReferences));
        }
        for &block in &blocks[start..] {
            pool.acquire_published(block, self);
        }
        self.hit_tokens += ((blocks.len() - start) * self.block_size) as u64;
        Ok(last)
    }

    /// Publishes `blocks`, replacing duplicates in place. Returns the last node and the index of the first block
    /// replaced (the number of blocks, if none). On error nothing changes.
    pub(crate) fn commit_run<'a>(
        &mut self,
        pool: &mut BlockPool,
        at: CommitAt<'_>,
        blocks: &mut [BlockId],
        tokens: impl Fn(usize) -> &'a [u32],
    ) -> Result<(Option<NodeId>, usize)> {
        // Plan. First the blocks that the trie has: each is left alone, or a duplicate.
        let mut duplicates = std::mem::take(&mut self.duplicates);
        let planned = self.plan_commit(pool, at, blocks, &tokens, &mut duplicates);
        let (known, mut node) = match planned {
            Ok(planned) => planned,
            Err(error) => {
                duplicates.clear();
                self.duplicates = duplicates;
                return Err(error);
            }
        };
        // Apply. Nothing below can fail.
        let mut first_changed = blocks.len();
        if at.merge {
            let mut above = node;
            for (index, block) in blocks[..known].iter_mut().enumerate().rev() {
                let Some(here) = above else { break };
                let canonical = self.trie.block(here);
                above = self.trie.parent(here);
                if canonical != *block {
                    pool.acquire_published(canonical, self);
                    *block = canonical;
                    first_changed = index;
                }
            }
        }
        self.merged += duplicates.len() as u64;
        pool.apply_release(&duplicates, at.fence, self);
        duplicates.clear();
        self.duplicates = duplicates;
        let mut cursor = Cursor::new(at.content, at.first + known, self.block_size);
        for (index, &block) in blocks.iter().enumerate().skip(known) {
            let content = cursor.parts(at.first + index);
            let query = Query {
                parent: node,
                namespace: at.namespace,
                tokens: tokens(index),
                content,
            };
            let made = self.trie.insert(&query, block);
            pool.publish(block, made);
            self.namespaces.add_node(at.namespace);
            self.published += 1;
            node = Some(made);
        }
        Ok((node, first_changed))
    }

    /// The checks of a commit: how many blocks the trie has already, and the last one's node (the parent, if none).
    /// On success the references of the duplicates have been taken off (`BlockPool::plan_release`).
    fn plan_commit<'a>(
        &self,
        pool: &mut BlockPool,
        at: CommitAt<'_>,
        blocks: &[BlockId],
        tokens: &impl Fn(usize) -> &'a [u32],
        duplicates: &mut Vec<BlockId>,
    ) -> Result<(usize, Option<NodeId>)> {
        let mut cursor = Cursor::new(at.content, at.first, self.block_size);
        let (mut node, mut known) = (at.parent, 0);
        while known < blocks.len() {
            let content = cursor.parts(at.first + known);
            let query = Query {
                parent: node,
                namespace: at.namespace,
                tokens: tokens(known),
                content,
            };
            let Some(found) = self.trie.find(&query) else { break };
            let (canonical, block) = (self.trie.block(found), blocks[known]);
            pool.used_refs(block)?;
            if canonical != block {
                if pool.node_of(block).is_some() {
                    return Err(pool.refuse(block, BlockProblem::AlreadyPublished));
                }
                if at.merge {
                    if pool.ref_count(canonical)? == u32::MAX {
                        return Err(pool.refuse(canonical, BlockProblem::TooManyReferences));
                    }
                    duplicates.push(block);
                }
            }
            (node, known) = (Some(found), known + 1);
        }
        pool.plan_release(duplicates)?;
        if let Err(error) = pool.plan_publish(&blocks[known..]) {
            pool.undo_release(duplicates);
            return Err(error);
        }
        Ok((known, node))
    }
}
