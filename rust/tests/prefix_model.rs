//! Level 1 against the naive model: lookups, commits, merges, eviction, namespaces and resets in any order, with steps
//! in flight, and every invariant checked after each.

mod naive;

use naive::{Blocks, Prefix, all_or_nothing};
use pagedcore::{
    BlockId, BlockPool, BlockState, ContentKeys, Error, ExtraKey, NamespaceHandle, NamespaceKey, NodeHandle,
    PrefixCache, Step,
};
use proptest::prelude::*;

const NUM_BLOCKS: usize = 24;
const SIZE: usize = 2;
const NAMESPACES: usize = 3;

/// Tokens of two kinds only, so that prefixes often meet.
type Tokens = Vec<u32>;

#[derive(Clone, Debug)]
enum Op {
    /// Takes a hold of a namespace.
    Hold(usize),
    /// Gives back a hold: which, and whether to purge.
    Drop(usize, bool),
    Probe(usize, Tokens, Option<usize>),
    Acquire(usize, Tokens, Option<usize>),
    /// Takes blocks for tokens and publishes them from the root.
    Publish(usize, Tokens, Option<Step>),
    /// Takes blocks for tokens and publishes them after what a holding has.
    Extend(usize, Tokens),
    /// Commits a holding again, at its own place or at another, or blocks that it must not.
    Again(usize),
    Misplace(usize, Tokens),
    Raw(usize, Tokens, Vec<u32>),
    Release(usize, Option<Step>),
    Retain(usize),
    Evict(usize),
    Reset,
    Begin,
    Complete,
}

fn operation() -> impl Strategy<Value = Op> {
    let tokens = || proptest::collection::vec(0_u32..2, 0..13);
    let limit = || proptest::option::of(0_usize..14);
    let step = || proptest::option::of(0_u64..4);
    let pick = || 0_usize..1000;
    prop_oneof![
        2 => pick().prop_map(Op::Hold),
        1 => (pick(), prop::bool::weighted(0.1)).prop_map(|(pick, purge)| Op::Drop(pick, purge)),
        2 => (pick(), tokens(), limit()).prop_map(|(pick, tokens, limit)| Op::Probe(pick, tokens, limit)),
        5 => (pick(), tokens(), limit()).prop_map(|(pick, tokens, limit)| Op::Acquire(pick, tokens, limit)),
        6 => (pick(), tokens(), step()).prop_map(|(pick, tokens, step)| Op::Publish(pick, tokens, step)),
        5 => (pick(), tokens()).prop_map(|(pick, tokens)| Op::Extend(pick, tokens)),
        1 => pick().prop_map(Op::Again),
        1 => (pick(), tokens()).prop_map(|(pick, tokens)| Op::Misplace(pick, tokens)),
        1 => (pick(), tokens(), proptest::collection::vec(0..NUM_BLOCKS as u32 + 2, 0..6))
            .prop_map(|(pick, tokens, blocks)| Op::Raw(pick, tokens, blocks)),
        9 => (pick(), step()).prop_map(|(pick, step)| Op::Release(pick, step)),
        1 => pick().prop_map(Op::Retain),
        1 => (0_usize..6).prop_map(Op::Evict),
        1 => prop::bool::weighted(0.2).prop_map(|yes| if yes { Op::Reset } else { Op::Begin }),
        2 => Just(Op::Begin),
        3 => Just(Op::Complete),
    ]
}

/// Blocks that the caller holds, one reference each.
#[derive(Clone, Debug)]
struct Holding {
    namespace: usize,
    tokens: Tokens,
    blocks: Vec<BlockId>,
    node: Option<NodeHandle>,
    /// When the node's block was published: it can have been withdrawn and published again since.
    since: u64,
}

#[derive(Clone, Debug, PartialEq)]
struct Real {
    pool: BlockPool,
    cache: PrefixCache,
}

struct World {
    real: Real,
    model: Blocks,
    /// Per namespace: the handle, and how often it is held.
    holds: Vec<(Option<NamespaceHandle>, usize)>,
    stale: Vec<NamespaceHandle>,
    holdings: Vec<Holding>,
}

fn key(namespace: usize) -> NamespaceKey {
    NamespaceKey {
        tenant: if namespace == 0 { "a".into() } else { "b".into() },
        cache_salt: "salt".into(),
        extra_keys: if namespace == 2 {
            [ExtraKey::Int(2)].into()
        } else {
            [].into()
        },
    }
}

impl World {
    fn new() -> Self {
        let pool = BlockPool::new(NUM_BLOCKS, SIZE).unwrap();
        let cache = PrefixCache::new(&pool).unwrap();
        Self {
            real: Real { pool, cache },
            model: Blocks::new(NUM_BLOCKS),
            holds: vec![(None, 0); NAMESPACES],
            stale: Vec::new(),
            holdings: Vec::new(),
        }
    }

    /// A namespace that is held, if the pick falls on one.
    fn namespace(&self, pick: usize) -> Option<(usize, NamespaceHandle)> {
        let namespace = pick % NAMESPACES;
        self.holds[namespace]
            .0
            .filter(|_| self.holds[namespace].1 > 0)
            .map(|handle| (namespace, handle))
    }

    fn allocate(&mut self, n: usize) -> Option<Vec<BlockId>> {
        let free = self.model.available();
        let result = all_or_nothing(&mut self.real, |real| real.pool.allocate(n, &mut real.cache));
        if n > free {
            assert_eq!(
                result,
                Err(Error::OutOfBlocks {
                    needed: n as u64,
                    free: free as u64
                })
            );
            return None;
        }
        let blocks = result.unwrap();
        self.model.allocated(&blocks, &self.real.pool);
        Some(blocks)
    }

    /// What a commit of these blocks has to do: the canonical ones, or None if it has to fail.
    fn commit(
        &mut self,
        namespace: usize,
        prefix: &[u32],
        tokens: &[u32],
        blocks: &[BlockId],
        fence: Step,
    ) -> Option<Vec<BlockId>> {
        let mut model = self.model.clone();
        let full = tokens.len() / SIZE;
        if !(full..=tokens.len().div_ceil(SIZE)).contains(&blocks.len()) {
            return None;
        }
        let mut canonical = blocks.to_vec();
        let mut published: Vec<(usize, Prefix)> = Vec::new();
        for (index, &block) in blocks[..full].iter().enumerate() {
            if block.index() >= NUM_BLOCKS || model.refs[block.index()] == 0 {
                return None;
            }
            let all = [prefix, &tokens[..(index + 1) * SIZE]].concat();
            match model.find(namespace, &all) {
                Some(found) if found == block.index() => {}
                _ if model.published[block.index()].is_some() => return None,
                Some(found) => {
                    model.refs[found] += 1;
                    model.release(block, fence);
                    canonical[index] = BlockId(found as u32);
                }
                None => {
                    model.publish(block.index(), (namespace, all.clone()));
                    published.push((block.index(), (namespace, all)));
                }
            }
        }
        // Duplicates are released before new blocks are looked at: one that is both must have references left.
        if published.iter().any(|(block, _)| model.refs[*block] == 0) {
            return None;
        }
        self.model = model;
        Some(canonical)
    }

    /// Commits `blocks` for `tokens` after `prefix`, whose last node is `parent`, and compares.
    fn commit_both(
        &mut self,
        (namespace, handle): (usize, NamespaceHandle),
        prefix: (&[u32], Option<NodeHandle>),
        tokens: &[u32],
        blocks: &[BlockId],
        after: Option<Step>,
    ) -> Option<(Vec<BlockId>, Option<NodeHandle>)> {
        let fence = self.model.fence(after);
        let expected = self.commit(namespace, prefix.0, tokens, blocks, fence);
        let none = ContentKeys::default();
        let result = all_or_nothing(&mut self.real, |real| {
            real.cache
                .commit(&mut real.pool, tokens, blocks, handle, prefix.1, after, &none)
        });
        assert_eq!(
            result.as_ref().ok().map(|commit| &commit.blocks),
            expected.as_ref(),
            "{result:?}"
        );
        result.ok().map(|commit| (commit.blocks, commit.node))
    }

    fn apply(&mut self, operation: &Op) {
        match operation {
            Op::Hold(pick) => {
                let namespace = pick % NAMESPACES;
                let handle = self.real.cache.namespace(key(namespace));
                let (known, holds) = &mut self.holds[namespace];
                if let Some(known) = known {
                    assert_eq!(*known, handle);
                }
                *known = Some(handle);
                *holds += 1;
            }
            Op::Drop(pick, purge) => {
                let Some((namespace, handle)) = self.namespace(*pick) else {
                    // Dropped as often as asked for, but alive as long as it has blocks.
                    self.stale.extend(self.holds[*pick % NAMESPACES].0);
                    self.drop_stale(*purge);
                    if self.holds[*pick % NAMESPACES].0.is_some() {
                        self.stale.pop();
                    }
                    return;
                };
                let withdrawn = self.withdraw(if *purge { Some(namespace) } else { None }, *purge);
                let Real { pool, cache } = &mut self.real;
                assert_eq!(cache.drop_namespace(pool, handle, *purge).unwrap(), withdrawn);
                self.holds[namespace].1 -= 1;
            }
            Op::Probe(pick, tokens, limit) => {
                let Some((namespace, handle)) = self.namespace(*pick) else {
                    return;
                };
                let most = limit.unwrap_or(usize::MAX).min(tokens.len());
                let expected = self.model.longest(namespace, &tokens[..most], SIZE).len() * SIZE;
                let before = self.real.clone();
                let found = self.real.cache.probe(tokens, handle, *limit, &ContentKeys::default());
                assert_eq!(found.unwrap(), expected);
                assert_eq!(self.real, before);
            }
            Op::Acquire(pick, tokens, limit) => {
                let Some((namespace, handle)) = self.namespace(*pick) else {
                    return;
                };
                let most = limit.unwrap_or(usize::MAX).min(tokens.len());
                let expected = self.model.longest(namespace, &tokens[..most], SIZE);
                let Real { pool, cache } = &mut self.real;
                let hit = cache
                    .acquire(pool, tokens, handle, *limit, &ContentKeys::default())
                    .unwrap();
                assert_eq!(
                    hit.blocks.iter().map(|block| block.index()).collect::<Vec<_>>(),
                    expected
                );
                assert_eq!(
                    (hit.num_tokens, hit.node.is_some()),
                    (expected.len() * SIZE, !expected.is_empty())
                );
                expected.iter().for_each(|&block| self.model.refs[block] += 1);
                let tokens = tokens[..hit.num_tokens].to_vec();
                let holding = self.holding(namespace, tokens, hit.blocks, hit.node);
                self.holdings.push(holding);
            }
            Op::Publish(pick, tokens, back) => {
                let Some(namespace) = self.namespace(*pick) else { return };
                let Some(blocks) = self.allocate(tokens.len().div_ceil(SIZE)) else {
                    return;
                };
                let after = back.map(|back| self.model.begun.saturating_sub(back));
                let (blocks, node) = self
                    .commit_both(namespace, (&[], None), tokens, &blocks, after)
                    .unwrap();
                let holding = self.holding(namespace.0, tokens.clone(), blocks, node);
                self.holdings.push(holding);
            }
            Op::Extend(pick, tokens) => self.extend(*pick, tokens),
            Op::Again(pick) => {
                if self.holdings.is_empty() {
                    return;
                }
                let holding = self.holdings[pick % self.holdings.len()].clone();
                let Some(namespace) = self.namespace(holding.namespace) else {
                    return;
                };
                if let Some((blocks, node)) =
                    self.commit_both(namespace, (&[], None), &holding.tokens, &holding.blocks, None)
                {
                    let count = self.holdings.len();
                    self.holdings[pick % count] = self.holding(holding.namespace, holding.tokens, blocks, node);
                }
            }
            Op::Misplace(pick, tokens) => {
                if self.holdings.is_empty() {
                    return;
                }
                let holding = self.holdings[pick % self.holdings.len()].clone();
                let Some(namespace) = self.namespace(*pick) else { return };
                let blocks = &holding.blocks[..holding.blocks.len().min(tokens.len().div_ceil(SIZE))];
                if let Some((blocks, node)) = self.commit_both(namespace, (&[], None), tokens, blocks, None) {
                    // The references have moved, and what is left of the old blocks goes back.
                    let index = pick % self.holdings.len();
                    let kept = holding.blocks[blocks.len()..].to_vec();
                    self.holdings[index] = self.holding(namespace.0, tokens.clone(), blocks, node);
                    self.release(&kept, None);
                }
            }
            Op::Raw(pick, tokens, ids) => {
                let Some(namespace) = self.namespace(*pick) else { return };
                let blocks: Vec<_> = ids.iter().copied().map(BlockId).collect();
                let Some((canonical, _)) = self.commit_both(namespace, (&[], None), tokens, &blocks, None) else {
                    return;
                };
                // It worked on blocks that somebody holds: those references have moved too.
                for (old, new) in blocks.iter().zip(&canonical) {
                    if old != new {
                        let mut all = self.holdings.iter_mut().flat_map(|holding| &mut holding.blocks);
                        *all.find(|block| *block == old).unwrap() = *new;
                    }
                }
            }
            Op::Release(pick, back) => {
                if !self.holdings.is_empty() {
                    let holding = self.holdings.swap_remove(pick % self.holdings.len());
                    let after = back.map(|back| self.model.begun.saturating_sub(back));
                    self.release(&holding.blocks, after);
                }
            }
            Op::Retain(pick) => {
                if !self.holdings.is_empty() {
                    let holding = self.holdings[pick % self.holdings.len()].clone();
                    self.real.pool.retain(&holding.blocks).unwrap();
                    holding
                        .blocks
                        .iter()
                        .for_each(|block| self.model.refs[block.index()] += 1);
                    self.holdings.push(holding);
                }
            }
            Op::Evict(n) => {
                let before: Vec<_> = (1..NUM_BLOCKS).filter(|&b| self.model.published[b].is_some()).collect();
                let Real { pool, cache } = &mut self.real;
                let expected = self.model.evictable().min(*n);
                assert_eq!(cache.evict(pool, *n), expected);
                let gone = |&block: &usize| {
                    self.model.state(block) == BlockState::Cached
                        && pool.state(BlockId(block as u32)) != Ok(BlockState::Cached)
                };
                let gone: Vec<_> = before.into_iter().filter(gone).collect();
                self.model.evicted(&gone, expected);
            }
            Op::Reset => {
                let withdrawn = self.withdraw(None, true);
                let Real { pool, cache } = &mut self.real;
                assert_eq!(cache.reset(pool), withdrawn);
            }
            Op::Begin => {
                self.model.begun += 1;
                self.real.pool.begin_step();
            }
            Op::Complete => {
                if let Some(&step) = self.model.in_flight().first() {
                    self.model.completed.insert(step);
                    let Real { pool, cache } = &mut self.real;
                    pool.complete_step(step, cache).unwrap();
                }
            }
        }
    }

    fn extend(&mut self, pick: usize, tokens: &[u32]) {
        if self.holdings.is_empty() {
            return;
        }
        let index = pick % self.holdings.len();
        let holding = self.holdings[index].clone();
        let Some(namespace) = self.namespace(holding.namespace) else {
            return;
        };
        let full = holding.tokens.len() / SIZE * SIZE;
        let prefix = &holding.tokens[..full];
        let Some(fresh) = self.allocate(tokens.len().div_ceil(SIZE)) else {
            return;
        };
        // Is the holding's last node still there? A reset takes it away, and so does a purge.
        let last = if full == 0 {
            0
        } else {
            holding.blocks[full / SIZE - 1].index()
        };
        let living = full == 0
            || self.model.find(namespace.0, prefix) == Some(last) && self.model.published_since[last] == holding.since;
        if !living {
            let none = ContentKeys::default();
            if let Some(node) = holding.node {
                let result = all_or_nothing(&mut self.real, |real| {
                    real.cache
                        .commit(&mut real.pool, tokens, &fresh, namespace.1, Some(node), None, &none)
                });
                assert!(matches!(result, Err(Error::StaleHandle { .. })), "{result:?}");
            }
            return self.release(&fresh, None);
        }
        let parent = (prefix, holding.node);
        let (blocks, node) = self.commit_both(namespace, parent, tokens, &fresh, None).unwrap();
        // The tail that was not full goes back; the new tokens follow the full blocks.
        let tail = holding.blocks[full / SIZE..].to_vec();
        let blocks = [&holding.blocks[..full / SIZE], &blocks].concat();
        self.holdings[index] = self.holding(namespace.0, [prefix, tokens].concat(), blocks, node);
        self.release(&tail, None);
    }

    fn holding(&self, namespace: usize, tokens: Tokens, blocks: Vec<BlockId>, node: Option<NodeHandle>) -> Holding {
        let last = (tokens.len() / SIZE).checked_sub(1);
        let since = last.map_or(0, |last| self.model.published_since[blocks[last].index()]);
        Holding {
            namespace,
            tokens,
            blocks,
            node,
            since,
        }
    }

    fn release(&mut self, blocks: &[BlockId], after: Option<Step>) {
        let Real { pool, cache } = &mut self.real;
        pool.release(blocks, after, cache).unwrap();
        let fence = self.model.fence(after);
        blocks.iter().for_each(|&block| self.model.release(block, fence));
    }

    /// Forgets what is published in a namespace, or everywhere.
    fn withdraw(&mut self, namespace: Option<usize>, really: bool) -> usize {
        let mut withdrawn = 0;
        for place in &mut self.model.published {
            if really
                && place
                    .as_ref()
                    .is_some_and(|(it, _)| namespace.is_none_or(|namespace| namespace == *it))
            {
                *place = None;
                withdrawn += 1;
            }
        }
        withdrawn
    }

    /// A handle of a namespace that has vanished is refused.
    fn drop_stale(&mut self, purge: bool) {
        for handle in self.stale.clone() {
            let result = all_or_nothing(&mut self.real, |real| {
                real.cache.drop_namespace(&mut real.pool, handle, purge)
            });
            assert!(matches!(result, Err(Error::StaleHandle { .. })));
        }
    }

    fn compare(&mut self) {
        self.model.compare(&self.real.pool, Some(&self.real.cache), SIZE);
        // A namespace lives while it is held or has blocks.
        let mut living = 0;
        for namespace in 0..NAMESPACES {
            let (handle, holds) = self.holds[namespace];
            let published = self.model.published.iter().flatten().any(|(it, _)| *it == namespace);
            if holds > 0 || published {
                living += 1;
            } else if let Some(handle) = handle {
                self.stale.push(handle);
                self.holds[namespace].0 = None;
            }
        }
        assert_eq!(self.real.cache.stats().num_namespaces, living);
    }
}

#[test]
fn the_cache_keeps_its_promises() {
    naive::run(0.3, operation(), |operations| {
        let mut world = World::new();
        for operation in operations {
            world.apply(operation);
            world.compare();
        }
    });
}
