//! All or nothing under exhaustion: every operation, with every number of blocks that can be had.
//!
//! An operation that takes blocks is run with 0, 1, … up to one block more than it needs, free ones or cached ones. With too
//! few it has to say both numbers and leave the whole state as it was; with enough it has to succeed. An operation that
//! takes none has to succeed with nothing left at all.

use pagedcore::{
    BlockId, BlockState, ContentKeys, Error, KVCacheManager, ManagerConfig, NamespaceKey, Reclaim, SeqHandle,
};

const NUM_BLOCKS: usize = 40;
const SIZE: usize = 4;

fn tokens(range: std::ops::Range<u32>) -> Vec<u32> {
    range.collect()
}

fn add(manager: &mut KVCacheManager, tokens: &[u32]) -> SeqHandle {
    manager
        .add(tokens, NamespaceKey::default(), ContentKeys::default())
        .unwrap()
}

/// Adds a sequence and computes all its tokens.
fn computed(manager: &mut KVCacheManager, tokens: &[u32]) -> SeqHandle {
    let seq = add(manager, tokens);
    manager
        .allocate_slots(seq, tokens.len() - manager.num_computed_tokens(seq).unwrap(), 0)
        .unwrap();
    manager.commit(seq, tokens.len()).unwrap();
    seq
}

/// Leaves `left` blocks that can be had: free ones, or cached ones. The prefixes that the sequences were made with are
/// held, so that they stay.
fn exhaust(manager: &mut KVCacheManager, left: usize, cached: bool) {
    let (pool, cache) = manager.parts_mut();
    let published = |b: &BlockId| pool.state(*b) == Ok(BlockState::Cached);
    assert_eq!((1..NUM_BLOCKS as u32).map(BlockId).filter(published).count(), 0);
    let spare = pool.allocate(pool.num_free(), cache).unwrap();
    let (left, _) = spare.split_at(left);
    if cached {
        let ns = cache.namespace(NamespaceKey {
            tenant: "other".into(),
            ..NamespaceKey::default()
        });
        let tokens = tokens(0..(left.len() * SIZE) as u32);
        cache
            .commit(pool, &tokens, left, ns, None, None, &ContentKeys::default())
            .unwrap();
    }
    pool.release(left, None, cache).unwrap();
    assert_eq!(pool.num_free() + cache.evictable(), left.len());
    manager.check().unwrap();
}

/// A state, and an operation on it that takes as many blocks.
struct Case {
    name: &'static str,
    needed: usize,
    /// Makes the state, and returns the sequences that the operation is about.
    prepare: fn(&mut KVCacheManager) -> Vec<SeqHandle>,
    operate: fn(&mut KVCacheManager, &[SeqHandle]) -> Result<(), Error>,
}

fn shared(manager: &mut KVCacheManager) -> Vec<SeqHandle> {
    let parent = computed(manager, &tokens(0..10));
    let mut all = manager.fork(parent, 2).unwrap();
    all.push(parent);
    all
}

fn cases() -> Vec<Case> {
    vec![
        Case {
            name: "blocks of a pool",
            needed: 5,
            prepare: |_| vec![],
            operate: |manager, _| {
                let (pool, cache) = manager.parts_mut();
                pool.allocate(5, cache).map(drop)
            },
        },
        Case {
            name: "a prompt",
            needed: 4,
            prepare: |manager| vec![add(manager, &tokens(0..13))],
            operate: |manager, seqs| manager.allocate_slots(seqs[0], 13, 0).map(drop),
        },
        Case {
            name: "the rest of a prompt after a hit",
            needed: 2,
            prepare: |manager| vec![computed(manager, &tokens(0..8)), add(manager, &tokens(0..13))],
            operate: |manager, seqs| manager.allocate_slots(seqs[1], 5, 0).map(drop),
        },
        Case {
            name: "lookahead across blocks",
            needed: 3,
            prepare: |manager| vec![computed(manager, &tokens(0..6))],
            operate: |manager, seqs| manager.allocate_slots(seqs[0], 1, 11).map(drop),
        },
        Case {
            name: "room in the last block",
            needed: 0,
            prepare: |manager| vec![computed(manager, &tokens(0..6))],
            operate: |manager, seqs| manager.allocate_slots(seqs[0], 1, 1).map(drop),
        },
        Case {
            name: "a copy of a shared block",
            needed: 1,
            prepare: shared,
            operate: |manager, seqs| manager.allocate_slots(seqs[0], 1, 0).map(drop),
        },
        Case {
            name: "a copy of a shared block and more",
            needed: 4,
            prepare: shared,
            operate: |manager, seqs| manager.allocate_slots(seqs[0], 3, 10).map(drop),
        },
        Case {
            name: "a copy of a copy that is pending",
            needed: 2,
            prepare: |manager| {
                let all = shared(manager);
                manager.allocate_slots(all[0], 1, 0).unwrap();
                manager.fork(all[0], 1).unwrap()
            },
            operate: |manager, seqs| manager.allocate_slots(seqs[0], 3, 0).map(drop),
        },
        Case {
            name: "the last one that shares",
            needed: 0,
            prepare: |manager| {
                let all = shared(manager);
                manager.allocate_slots(all[0], 1, 0).unwrap();
                manager.allocate_slots(all[1], 1, 0).unwrap();
                all[2..].to_vec()
            },
            operate: |manager, seqs| manager.allocate_slots(seqs[0], 1, 0).map(drop),
        },
        Case {
            name: "a published block after a truncation",
            needed: 2,
            prepare: |manager| {
                let seq = computed(manager, &tokens(0..8));
                // Another one holds the published blocks.
                let other = manager.fork(seq, 1).unwrap()[0];
                manager.truncate(seq, 6, None).unwrap();
                vec![seq, other]
            },
            operate: |manager, seqs| manager.allocate_slots(seqs[0], 4, 0).map(drop),
        },
        Case {
            name: "everything else",
            needed: 0,
            prepare: shared,
            operate: |manager, seqs| {
                let seq = add(manager, &tokens(0..10));
                manager.append(seq, &[1, 2, 3])?;
                let children = manager.fork(seqs[0], 3)?;
                manager.allocate_slots(seqs[0], 0, 0)?;
                manager.commit(seqs[0], 10)?;
                manager.truncate(children[0], 3, None)?;
                manager.preempt(children[1], None)?;
                manager.resume(children[1])?;
                manager.take_block_copies(0)?;
                manager.free(children[2], None)?;
                manager.free(seq, None)
            },
        },
    ]
}

#[test]
fn every_operation_with_every_number_of_blocks() {
    for case in cases() {
        for cached in [false, true] {
            for in_flight in [false, true] {
                for left in 0..=case.needed + 1 {
                    let mut manager = KVCacheManager::new(&ManagerConfig::new(NUM_BLOCKS, SIZE)).unwrap();
                    let seqs = (case.prepare)(&mut manager);
                    exhaust(&mut manager, left, cached);
                    if in_flight {
                        manager.parts_mut().0.begin_step();
                    }
                    let before = manager.clone();
                    let result = (case.operate)(&mut manager, &seqs);
                    let name = case.name;
                    if left < case.needed {
                        let (needed, free) = (case.needed as u64, left as u64);
                        assert_eq!(result, Err(Error::OutOfBlocks { needed, free }), "{name} with {left}");
                        assert!(manager == before, "{name} with {left} has changed something");
                    } else {
                        assert_eq!(result, Ok(()), "{name} with {left}");
                        manager.check().unwrap();
                    }
                }
            }
        }
    }
}
