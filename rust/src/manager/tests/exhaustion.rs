//! All or nothing, with every number of blocks that can be had, and at the limit of references: every operation that
//! takes blocks or adds references, and those that give some up. (What a scheduler takes and puts back is in its own
//! tests.)
//!
//! An operation that takes blocks is run with 0, 1, … up to one block more than it needs, free ones or cached ones.
//! With too few it has to say both numbers and leave the whole state as it was; with enough it has to succeed. An
//! operation that takes none has to succeed with nothing left at all. An operation that adds references is run on
//! blocks that have room for 0, 1, … up to as many as it adds.

use super::*;
use crate::error::Result;

const NUM_BLOCKS: usize = 40;

/// Adds a sequence and computes all its tokens.
fn computed(manager: &mut KVCacheManager, tokens: &[u32]) -> SeqHandle {
    let seq = add(manager, tokens);
    assert_eq!(compute(manager, seq), []);
    seq
}

/// Three that share two full blocks and half a one.
fn shared(manager: &mut KVCacheManager) -> Vec<SeqHandle> {
    let parent = computed(manager, &tokens(0..10));
    let mut all = manager.fork(parent, 2).unwrap();
    all.push(parent);
    all
}

/// One of `shared` with a pending copy, and a fork of it: its next write is a copy of that copy.
fn copy_pending(manager: &mut KVCacheManager) -> Vec<SeqHandle> {
    let mut all = shared(manager);
    manager.allocate_slots(all[0], 1, 0).unwrap();
    let child = manager.fork(all[0], 1).unwrap();
    all.splice(0..0, child);
    all
}

/// Two that computed the same tokens, of which the second has not committed.
fn twins(manager: &mut KVCacheManager) -> Vec<SeqHandle> {
    let both = [add(manager, &tokens(0..12)), add(manager, &tokens(0..12))];
    for seq in both {
        manager.allocate_slots(seq, 12, 0).unwrap();
    }
    manager.commit(both[0], 12).unwrap();
    both.to_vec()
}

/// One that shares a prefix with another, and is preempted.
fn preempted(manager: &mut KVCacheManager) -> Vec<SeqHandle> {
    let all = shared(manager);
    manager.preempt(all[0], None).unwrap();
    all
}

/// Blocks of a state that a case is about.
type Blocks = fn(&KVCacheManager, &[SeqHandle]) -> Vec<BlockId>;

/// A state, and an operation on it.
struct Case {
    name: &'static str,
    /// Makes the state, and returns the sequences that the operation is about.
    prepare: fn(&mut KVCacheManager) -> Vec<SeqHandle>,
    operate: fn(&mut KVCacheManager, &[SeqHandle]) -> Result<()>,
    /// Blocks that it takes.
    blocks: usize,
    /// Blocks to which it adds references, and how many to each.
    references: Option<(Blocks, u32)>,
}

/// A case that takes blocks, and adds no reference to a block that has one.
const fn takes(
    blocks: usize,
    name: &'static str,
    prepare: fn(&mut KVCacheManager) -> Vec<SeqHandle>,
    operate: fn(&mut KVCacheManager, &[SeqHandle]) -> Result<()>,
) -> Case {
    Case {
        name,
        prepare,
        operate,
        blocks,
        references: None,
    }
}

/// A case that takes no block, and adds references to the first `N` blocks of the last sequence.
const fn refers<const N: usize>(
    times: u32,
    name: &'static str,
    prepare: fn(&mut KVCacheManager) -> Vec<SeqHandle>,
    operate: fn(&mut KVCacheManager, &[SeqHandle]) -> Result<()>,
) -> Case {
    Case {
        references: Some((
            |manager, seqs| manager.table(seqs[seqs.len() - 1]).unwrap()[..N].to_vec(),
            times,
        )),
        ..takes(0, name, prepare, operate)
    }
}

fn cases() -> Vec<Case> {
    vec![
        takes(
            5,
            "blocks of a pool",
            |_| vec![],
            |manager, _| {
                let (pool, cache) = manager.parts_mut();
                pool.allocate(5, cache).map(drop)
            },
        ),
        takes(
            4,
            "a prompt",
            |m| vec![add(m, &tokens(0..13))],
            |m, seqs| m.allocate_slots(seqs[0], 13, 0).map(drop),
        ),
        takes(
            2,
            "the rest of a prompt after a hit",
            |m| vec![computed(m, &tokens(0..8)), add(m, &tokens(0..13))],
            |m, seqs| m.allocate_slots(seqs[1], 5, 0).map(drop),
        ),
        takes(
            3,
            "lookahead across blocks",
            |m| vec![computed(m, &tokens(0..6))],
            |m, seqs| m.allocate_slots(seqs[0], 1, 11).map(drop),
        ),
        takes(
            0,
            "room in the last block",
            |m| vec![computed(m, &tokens(0..6))],
            |m, seqs| m.allocate_slots(seqs[0], 1, 1).map(drop),
        ),
        takes(1, "a copy of a shared block", shared, |m, seqs| {
            m.allocate_slots(seqs[0], 1, 0).map(drop)
        }),
        takes(4, "a copy of a shared block and more", shared, |m, seqs| {
            m.allocate_slots(seqs[0], 3, 10).map(drop)
        }),
        Case {
            // The source gets another pair that reads it.
            references: Some((|m, seqs| vec![m.table(seqs[3]).unwrap()[2]], 1)),
            ..takes(2, "a copy of a copy that is pending", copy_pending, |m, seqs| {
                m.allocate_slots(seqs[0], 3, 0).map(drop)
            })
        },
        takes(
            0,
            "the last one that shares",
            |m| {
                let all = shared(m);
                m.allocate_slots(all[0], 1, 0).unwrap();
                m.allocate_slots(all[1], 1, 0).unwrap();
                all[2..].to_vec()
            },
            |m, seqs| m.allocate_slots(seqs[0], 1, 0).map(drop),
        ),
        takes(
            2,
            "a published block after a truncation",
            |m| {
                let seq = computed(m, &tokens(0..8));
                // Another one holds the published blocks.
                let other = m.fork(seq, 1).unwrap()[0];
                m.truncate(seq, 6, None).unwrap();
                vec![seq, other]
            },
            |m, seqs| m.allocate_slots(seqs[0], 4, 0).map(drop),
        ),
        takes(0, "no position at all", shared, |m, seqs| {
            m.allocate_slots(seqs[0], 0, 0).map(drop)
        }),
        takes(0, "tokens", shared, |m, seqs| m.append(seqs[0], &[1, 2, 3])),
        takes(0, "the end of a table", shared, |m, seqs| {
            m.truncate(seqs[0], 3, None).map(drop)
        }),
        takes(0, "a preemption", shared, |m, seqs| m.preempt(seqs[0], None)),
        takes(0, "the end of a sequence", shared, |m, seqs| m.free(seqs[0], None)),
        takes(0, "pending copies", copy_pending, |m, _| {
            m.take_block_copies(0).map(drop)
        }),
        takes(
            0,
            "a published prompt",
            |m| {
                let seq = add(m, &tokens(0..12));
                m.allocate_slots(seq, 12, 0).unwrap();
                vec![seq]
            },
            |m, seqs| m.commit(seqs[0], 12).map(drop),
        ),
        refers::<3>(1, "a fork", shared, |m, seqs| m.fork(seqs[0], 1).map(drop)),
        refers::<3>(3, "three forks", shared, |m, seqs| m.fork(seqs[0], 3).map(drop)),
        refers::<2>(1, "a hit", shared, |m, _| {
            m.add(&tokens(0..10), NamespaceKey::default(), ContentKeys::default())
                .map(drop)
        }),
        refers::<2>(1, "the end of a preemption", preempted, |m, seqs| {
            m.resume(seqs[0]).map(drop)
        }),
        Case {
            references: Some((|m, seqs| m.table(seqs[0]).unwrap().to_vec(), 1)),
            ..takes(0, "a merge", twins, |m, seqs| m.commit(seqs[1], 12).map(drop))
        },
        Case {
            references: Some((|m, seqs| m.table(seqs[0]).unwrap().to_vec(), 1)),
            ..takes(
                0,
                "a merge by hand",
                |m| {
                    // One reference more to each of the second's blocks, which is the one that is moved.
                    let both = twins(m);
                    let blocks = m.table(both[1]).unwrap().to_vec();
                    m.parts_mut().0.retain(&blocks).unwrap();
                    both
                },
                |m, seqs| {
                    let blocks = m.table(seqs[1])?.to_vec();
                    let (pool, cache) = m.parts_mut();
                    let ns = cache.namespace(NamespaceKey::default());
                    let none = ContentKeys::default();
                    let commit = cache.commit(pool, &tokens(0..12), &blocks, ns, None, None, &none);
                    let dropped = cache.drop_namespace(pool, ns, false);
                    commit.map(drop).and(dropped.map(drop))
                },
            )
        },
        takes(0, "blocks to zero", shared, |m, _| {
            m.take_blocks_to_zero();
            Ok(())
        }),
        takes(0, "an eviction", shared, |m, _| {
            let (pool, cache) = m.parts_mut();
            cache.evict(pool, 2);
            Ok(())
        }),
        takes(0, "a reset", shared, |m, _| {
            let (pool, cache) = m.parts_mut();
            cache.reset(pool);
            Ok(())
        }),
        refers::<3>(1, "blocks held by others", shared, |m, seqs| {
            let blocks = m.table(seqs[0])?.to_vec();
            m.parts_mut().0.retain(&blocks)
        }),
        refers::<2>(1, "a hit of the cache", shared, |m, _| {
            let (pool, cache) = m.parts_mut();
            let ns = cache.namespace(NamespaceKey::default());
            let hit = cache.acquire(pool, &tokens(0..10), ns, None, &ContentKeys::default());
            // Not by `?`: the handle goes back first, so that an error leaves nothing.
            let dropped = cache.drop_namespace(pool, ns, false);
            hit.and(dropped).map(drop)
        }),
    ]
}

/// Leaves `left` blocks that can be had: free ones, or cached ones. The prefixes that the sequences were made with are
/// held, so that they stay.
fn exhaust(manager: &mut KVCacheManager, left: usize, cached: bool) {
    let (pool, cache) = manager.parts_mut();
    assert_eq!(pool.num_cached(), 0);
    let spare = pool.allocate(pool.num_free(), cache).unwrap();
    let left = &spare[..left];
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
    assert_eq!(
        manager.pool.num_free() + manager.cache.stats().num_evictable,
        left.len()
    );
    manager.check().unwrap();
}

/// Runs the case's operation in a state that `constrain` has narrowed. With `refused` it has to fail just so, and to
/// change nothing.
fn run(case: &Case, constrain: impl Fn(&mut KVCacheManager, &[SeqHandle]), refused: Option<&dyn Fn(&Error) -> bool>) {
    for in_flight in [false, true] {
        let mut manager = manager(NUM_BLOCKS);
        let seqs = (case.prepare)(&mut manager);
        constrain(&mut manager, &seqs);
        if in_flight {
            manager.parts_mut().0.begin_step();
        }
        let before = manager.clone();
        match ((case.operate)(&mut manager, &seqs), refused) {
            (Ok(()), None) => manager.check().unwrap(),
            (Err(error), Some(expected)) => {
                assert!(expected(&error), "{}: {error}", case.name);
                assert!(manager == before, "{} has changed something: {error}", case.name);
            }
            (result, _) => panic!("{}: {result:?}", case.name),
        }
    }
}

#[test]
fn every_operation_with_every_number_of_blocks() {
    for case in cases() {
        for cached in [false, true] {
            for left in 0..=case.blocks + 1 {
                let (needed, free) = (case.blocks as u64, left as u64);
                let refused = |error: &Error| *error == Error::OutOfBlocks { needed, free };
                let refused: Option<&dyn Fn(&Error) -> bool> = (left < case.blocks).then_some(&refused);
                run(&case, |manager, _| exhaust(manager, left, cached), refused);
            }
        }
    }
}

#[test]
fn every_operation_at_the_limit_of_references() {
    for case in cases() {
        let Some((blocks, times)) = case.references else {
            continue;
        };
        let count = {
            let mut manager = manager(NUM_BLOCKS);
            let seqs = (case.prepare)(&mut manager);
            blocks(&manager, &seqs).len()
        };
        // One block after the other, each with room for every number of references.
        for (which, room) in (0..count).flat_map(|which| (0..=times).map(move |room| (which, room))) {
            let full = |error: &Error| {
                let problem = BlockProblem::TooManyReferences;
                matches!(error, Error::Block { problem: found, .. } if *found == problem)
            };
            let refused: Option<&dyn Fn(&Error) -> bool> = (room < times).then_some(&full);
            let constrain = |manager: &mut KVCacheManager, seqs: &[SeqHandle]| {
                let block = blocks(manager, seqs)[which];
                let refs = manager.pool.ref_count(block).unwrap();
                manager.pool.retain_times(&[block], u32::MAX - refs - room).unwrap();
            };
            run(&case, constrain, refused);
        }
    }
}
