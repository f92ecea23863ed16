//! Tests of level 1: what each call means, one situation at a time.

use super::*;
use crate::content::ContentKey;
use crate::error::BlockProblem;
use crate::namespace::ExtraKey;
use crate::pool::BlockState;

const SIZE: usize = 4;

struct Level {
    pool: BlockPool,
    cache: PrefixCache,
    ns: NamespaceHandle,
}

impl Level {
    fn new(num_blocks: usize) -> Self {
        let pool = BlockPool::new(num_blocks, SIZE).unwrap();
        let mut cache = PrefixCache::new(&pool).unwrap();
        let ns = cache.namespace(NamespaceKey::default());
        Self { pool, cache, ns }
    }

    fn allocate(&mut self, n: usize) -> Vec<BlockId> {
        self.pool.allocate(n, &mut self.cache).unwrap()
    }

    fn commit(&mut self, tokens: &[u32], blocks: &[BlockId], parent: Option<NodeHandle>) -> Result<Commit> {
        let none = ContentKeys::default();
        let result = self
            .cache
            .commit(&mut self.pool, tokens, blocks, self.ns, parent, None, &none);
        self.check();
        result
    }

    /// Publishes tokens in blocks of their own and lets go of them.
    fn publish(&mut self, tokens: &[u32]) -> Vec<BlockId> {
        let blocks = self.allocate(tokens.len() / SIZE);
        let blocks = self.commit(tokens, &blocks, None).unwrap().blocks;
        self.release(&blocks);
        blocks
    }

    fn acquire(&mut self, tokens: &[u32], max_tokens: Option<usize>) -> PrefixHit {
        let none = ContentKeys::default();
        let hit = self
            .cache
            .acquire(&mut self.pool, tokens, self.ns, max_tokens, &none)
            .unwrap();
        self.check();
        hit
    }

    fn release(&mut self, blocks: &[BlockId]) {
        self.pool.release(blocks, None, &mut self.cache).unwrap();
        self.check();
    }

    fn probe(&self, tokens: &[u32]) -> usize {
        self.cache
            .probe(tokens, self.ns, None, &ContentKeys::default())
            .unwrap()
    }

    fn check(&self) {
        self.pool.check().unwrap();
        self.cache.check(&self.pool).unwrap();
    }
}

fn tokens(range: std::ops::Range<u32>) -> Vec<u32> {
    range.collect()
}

#[test]
fn a_hit_is_whole_blocks_from_the_start() {
    let mut level = Level::new(16);
    let blocks = level.publish(&tokens(0..12));
    assert_eq!(level.pool.num_cached(), 3);
    for (asked, found) in [
        (tokens(0..12), 12),
        (tokens(0..100), 12),
        (tokens(0..11), 8),
        (tokens(0..3), 0),
    ] {
        assert_eq!(level.probe(&asked), found);
    }
    assert_eq!(level.probe(&tokens(4..12)), 0);
    let hit = level.acquire(&tokens(0..12), Some(11));
    assert_eq!((&hit.blocks[..], hit.num_tokens), (&blocks[..2], 8));
    assert_eq!((level.pool.num_used(), level.pool.num_cached()), (2, 1));
    let nothing = level.acquire(&[], None);
    assert_eq!(nothing, PrefixHit::default());
    level.release(&hit.blocks);
}

#[test]
fn a_commit_goes_on_from_a_node_and_ignores_a_tail() {
    let mut level = Level::new(16);
    let blocks = level.allocate(4);
    let first = level.commit(&tokens(0..8), &blocks[..2], None).unwrap();
    let second = level.commit(&tokens(8..14), &blocks[2..], first.node).unwrap();
    assert_eq!(second.blocks, blocks[2..]);
    assert_eq!(level.probe(&tokens(0..14)), 12);
    // A tail alone publishes nothing; with or without its block.
    let tail = level.commit(&tokens(12..14), &blocks[3..], second.node).unwrap();
    assert_eq!((tail.node, &tail.blocks[..]), (second.node, &blocks[3..]));
    assert_eq!(
        level.commit(&tokens(12..14), &[], second.node).unwrap().node,
        second.node
    );
    // Again at the same place: nothing happens.
    let again = level.commit(&tokens(0..8), &blocks[..2], None).unwrap();
    assert_eq!(again, first);
    assert_eq!(level.cache.stats().merged, 0);
}

#[test]
fn the_reference_moves_from_a_duplicate_to_the_canonical_block() {
    let mut level = Level::new(16);
    let canonical = level.publish(&tokens(0..8));
    let blocks = level.allocate(3);
    let step = level.pool.begin_step();
    let commit = level.commit(&tokens(0..12), &blocks, None).unwrap();
    assert_eq!(commit.blocks, [canonical[0], canonical[1], blocks[2]]);
    assert_eq!(level.pool.ref_count(canonical[0]), Ok(1));
    assert_eq!(level.pool.state(blocks[0]), Ok(BlockState::Fenced));
    level.pool.complete_step(step, &mut level.cache).unwrap();
    assert_eq!(level.pool.state(blocks[0]), Ok(BlockState::Free));
    assert_eq!(level.cache.stats().merged, 2);
    level.release(&commit.blocks);
    assert_eq!(level.pool.num_cached(), 3);
}

#[test]
fn commits_that_cannot_be_change_nothing() {
    let mut level = Level::new(16);
    let published = level.allocate(2);
    let node = level.commit(&tokens(0..8), &published, None).unwrap().node;
    let own = level.allocate(2);
    let other = level.cache.namespace(NamespaceKey {
        cache_salt: "x".into(),
        ..NamespaceKey::default()
    });
    let gone = NodeHandle::new(9, 0);
    let (before, before_pool) = (level.cache.clone(), level.pool.clone());
    let block = |block: BlockId, problem| {
        Err(Error::Block {
            block,
            num_blocks: 16,
            problem,
        })
    };
    let cases = [
        // Published already, but elsewhere: as another block, as a block further on, below another parent.
        (
            tokens(0..8),
            vec![own[0], published[0]],
            None,
            block(published[0], BlockProblem::AlreadyPublished),
        ),
        (
            tokens(50..58),
            vec![own[0], published[0]],
            None,
            block(published[0], BlockProblem::AlreadyPublished),
        ),
        (
            tokens(0..4),
            vec![published[0]],
            node,
            block(published[0], BlockProblem::AlreadyPublished),
        ),
        // Named twice, held by nobody, null, out of range.
        (
            tokens(50..58),
            vec![own[0], own[0]],
            None,
            block(own[0], BlockProblem::AlreadyPublished),
        ),
        (
            tokens(0..8),
            vec![own[0], own[0]],
            None,
            block(own[0], BlockProblem::NotHeld),
        ),
        (
            tokens(50..58),
            vec![own[0], BlockId(9)],
            None,
            block(BlockId(9), BlockProblem::NotHeld),
        ),
        (
            tokens(0..12),
            vec![own[0], own[1], BlockId(9)],
            None,
            block(BlockId(9), BlockProblem::NotHeld),
        ),
        (
            tokens(50..54),
            vec![BlockId(0)],
            None,
            block(BlockId(0), BlockProblem::Null),
        ),
        (
            tokens(50..54),
            vec![BlockId(99)],
            None,
            block(BlockId(99), BlockProblem::OutOfRange),
        ),
        // A duplicate whose only reference goes cannot be published as well.
        (
            [tokens(0..4), tokens(50..54)].concat(),
            vec![own[0], own[0]],
            None,
            block(own[0], BlockProblem::NotHeld),
        ),
        (
            tokens(50..54),
            own.clone(),
            None,
            Err(Error::argument("blocks", 2, Expected::Between(1, 1))),
        ),
        (
            tokens(50..59),
            own[..1].to_vec(),
            None,
            Err(Error::argument("blocks", 1, Expected::Between(2, 3))),
        ),
        (
            tokens(50..54),
            own[..1].to_vec(),
            Some(gone),
            Err(Error::StaleHandle {
                kind: crate::HandleKind::Node,
                handle: gone.0,
            }),
        ),
    ];
    for (tokens, blocks, parent, expected) in cases {
        assert_eq!(level.commit(&tokens, &blocks, parent), expected);
        assert_eq!(
            (&level.cache, &level.pool),
            (&before, &before_pool),
            "{tokens:?} {blocks:?}"
        );
    }
    let none = ContentKeys::default();
    let Level { pool, cache, ns } = &mut level;
    let elsewhere = cache.commit(pool, &tokens(50..54), &own[..1], other, node, None, &none);
    assert!(matches!(
        elsewhere,
        Err(Error::InvalidArgument { argument: "parent", .. })
    ));
    let early = cache.commit(pool, &tokens(50..54), &own[..1], *ns, node, Some(1), &none);
    assert!(matches!(early, Err(Error::Step { step: 1, .. })));
    assert_eq!((&*cache, &*pool), (&before, &before_pool));
}

#[test]
fn eviction_takes_children_first_and_the_least_recent_of_all() {
    let mut level = Level::new(9);
    let old = level.publish(&tokens(0..12));
    let young = level.publish(&tokens(50..58));
    // Used again, the old prefix's first two blocks become the youngest; its third stays the oldest.
    let hit = level.acquire(&tokens(0..8), None);
    level.release(&hit.blocks);
    let taken = level.allocate(8 - 5 + 3);
    assert_eq!(taken.len(), 6);
    assert!(taken.contains(&old[2]) && taken.contains(&young[1]) && taken.contains(&young[0]));
    assert_eq!(level.probe(&tokens(0..12)), 8);
    assert_eq!(level.probe(&tokens(50..58)), 0);
    assert_eq!(level.cache.evict(&mut level.pool, 1), 1);
    assert_eq!(level.probe(&tokens(0..12)), 4);
    assert_eq!(level.cache.evict(&mut level.pool, 10), 1);
    level.check();
}

#[test]
fn what_is_held_or_read_by_a_step_is_not_evicted() {
    let mut level = Level::new(9);
    level.publish(&tokens(0..12));
    let hit = level.acquire(&tokens(0..8), None);
    assert_eq!(level.cache.evict(&mut level.pool, 10), 1);
    let step = level.pool.begin_step();
    level.release(&hit.blocks);
    // A fence delays the reuse of a block, not its being found.
    assert_eq!((level.pool.num_cached(), level.cache.stats().num_evictable), (2, 0));
    assert_eq!(level.cache.evict(&mut level.pool, 10), 0);
    assert_eq!(level.probe(&tokens(0..8)), 8);
    let error = level.pool.allocate(8, &mut level.cache).unwrap_err();
    assert_eq!(error, Error::OutOfBlocks { needed: 8, free: 6 });
    level.pool.complete_step(step, &mut level.cache).unwrap();
    assert_eq!(level.allocate(8).len(), 8);
    level.check();
}

#[test]
fn a_pinned_child_keeps_its_parents() {
    let mut level = Level::new(9);
    let blocks = level.allocate(3);
    let commit = level.commit(&tokens(0..12), &blocks, None).unwrap();
    level.release(&commit.blocks[..2]);
    assert_eq!((level.pool.num_cached(), level.cache.stats().num_evictable), (2, 0));
    level.release(&commit.blocks[2..]);
    assert_eq!(level.cache.stats().num_evictable, 3);
    assert!(level.cache.resolve(commit.node.unwrap()).is_some());
    level.cache.evict(&mut level.pool, 1);
    assert!(level.cache.resolve(commit.node.unwrap()).is_none());
}

#[test]
fn a_reset_withdraws_everything_and_leaves_the_holders_alone() {
    let mut level = Level::new(16);
    level.publish(&tokens(0..8));
    let hit = level.acquire(&tokens(0..4), None);
    let fenced = level.publish(&tokens(50..54));
    let again = level.acquire(&tokens(50..54), None);
    let step = level.pool.begin_step();
    level.release(&again.blocks);
    assert_eq!(level.cache.reset(&mut level.pool), 3);
    level.check();
    assert_eq!(
        (level.pool.num_used(), level.pool.num_cached(), level.pool.num_fenced()),
        (1, 0, 1)
    );
    assert_eq!(level.pool.state(fenced[0]), Ok(BlockState::Fenced));
    assert_eq!((level.probe(&tokens(0..8)), level.probe(&tokens(50..54))), (0, 0));
    level.pool.complete_step(step, &mut level.cache).unwrap();
    level.release(&hit.blocks);
    assert_eq!(level.pool.num_free(), 15);
}

#[test]
fn namespaces_do_not_meet_and_vanish_when_idle() {
    let mut level = Level::new(16);
    let key = |tenant: &str, salt: &str, extra_keys: &[ExtraKey]| NamespaceKey {
        tenant: tenant.into(),
        cache_salt: salt.into(),
        extra_keys: extra_keys.into(),
    };
    let keys = [
        key("a", "", &[]),
        key("", "a", &[]),
        key("", "", &[ExtraKey::Text("a".into())]),
        key("", "", &[ExtraKey::Bytes(b"a".as_slice().into())]),
        key("", "", &[ExtraKey::Int(97)]),
        key("", "", &[ExtraKey::Text("a".into()), ExtraKey::Text("".into())]),
    ];
    let none = ContentKeys::default();
    level.publish(&tokens(0..4));
    let Level { pool, cache, .. } = &mut level;
    for key in &keys {
        let ns = cache.namespace(key.clone());
        assert_eq!(cache.probe(&tokens(0..4), ns, None, &none), Ok(0));
        let blocks = pool.allocate(1, cache).unwrap();
        cache
            .commit(pool, &tokens(0..4), &blocks, ns, None, None, &none)
            .unwrap();
        pool.release(&blocks, None, cache).unwrap();
        assert_eq!(cache.namespace(key.clone()), ns);
        assert_eq!(cache.drop_namespace(pool, ns, false), Ok(0));
        assert_eq!(cache.drop_namespace(pool, ns, false), Ok(0));
        // Nobody holds it, but its block is there.
        assert_eq!(cache.probe(&tokens(0..4), ns, None, &none), Ok(4));
    }
    assert_eq!((pool.num_cached(), cache.stats().num_namespaces), (7, 7));
    let ns = cache.namespace(keys[0].clone());
    assert_eq!(cache.drop_namespace(pool, ns, true), Ok(1));
    let stale = Err(Error::StaleHandle {
        kind: crate::HandleKind::Namespace,
        handle: ns.0,
    });
    assert_eq!(cache.probe(&tokens(0..4), ns, None, &none), stale);
    assert_ne!(cache.namespace(keys[0].clone()), ns);
    cache.evict(pool, 100);
    assert_eq!((pool.num_cached(), cache.stats().num_namespaces), (0, 2));
    level.check();
}

#[test]
fn content_tells_equal_tokens_apart() {
    let mut level = Level::new(32);
    let image = |start, stop, key: &[u8]| {
        ContentKeys::new(vec![ContentKey {
            start,
            stop,
            key: key.into(),
        }])
        .unwrap()
    };
    let same = vec![7; 16];
    let cases = [
        image(1, 9, b"cat"),
        image(1, 9, b"dog"),
        image(2, 9, b"cat"),
        image(1, 8, b"cat"),
        image(5, 13, b"cat"),
    ];
    let Level { pool, cache, ns } = &mut level;
    for content in &cases {
        let blocks = pool.allocate(4, cache).unwrap();
        let commit = cache.commit(pool, &same, &blocks, *ns, None, None, content).unwrap();
        pool.release(&commit.blocks, None, cache).unwrap();
    }
    for content in &cases {
        assert_eq!(cache.probe(&same, *ns, None, content), Ok(16));
    }
    // The last image starts in the second block, so the first is plain.
    assert_eq!(cache.probe(&same, *ns, None, &ContentKeys::default()), Ok(4));
    // A commit in two calls, the second from inside the image, is the same as one.
    let blocks = pool.allocate(4, cache).unwrap();
    let first = cache
        .commit(pool, &same[..8], &blocks[..2], *ns, None, None, &image(5, 13, b"cat"))
        .unwrap();
    let rest = cache
        .commit(
            pool,
            &same[8..],
            &blocks[2..],
            *ns,
            first.node,
            None,
            &image(-3, 5, b"cat"),
        )
        .unwrap();
    assert!(
        first
            .blocks
            .iter()
            .chain(&rest.blocks)
            .all(|block| !blocks.contains(block))
    );
    level.check();
}

#[test]
fn a_full_reference_count_is_refused() {
    let mut level = Level::new(16);
    let blocks = level.allocate(2);
    level.commit(&tokens(0..8), &blocks, None).unwrap();
    level.pool.retain_times(&blocks[1..], u32::MAX - 1).unwrap();
    let own = level.allocate(2);
    let (before, before_pool) = (level.cache.clone(), level.pool.clone());
    let error = Error::Block {
        block: blocks[1],
        num_blocks: 16,
        problem: BlockProblem::TooManyReferences,
    };
    assert_eq!(level.commit(&tokens(0..8), &own, None), Err(error.clone()));
    let none = ContentKeys::default();
    let Level { pool, cache, ns } = &mut level;
    assert_eq!(cache.acquire(pool, &tokens(0..8), *ns, None, &none), Err(error));
    assert_eq!((&*cache, &*pool), (&before, &before_pool));
}
