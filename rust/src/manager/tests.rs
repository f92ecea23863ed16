//! Tests of level 2: what each call means, one situation at a time.

use super::*;
use crate::namespace::ExtraKey;
use crate::pool::BlockState;

const SIZE: usize = 4;

fn manager(num_blocks: usize) -> KVCacheManager {
    KVCacheManager::new(&ManagerConfig::new(num_blocks, SIZE)).unwrap()
}

fn add(manager: &mut KVCacheManager, tokens: &[u32]) -> SeqHandle {
    let seq = manager
        .add(tokens, NamespaceKey::default(), ContentKeys::default())
        .unwrap();
    manager.check().unwrap();
    seq
}

/// Computes all tokens that are not, as one step does. Returns the copies of the step.
fn compute(manager: &mut KVCacheManager, seq: SeqHandle) -> Vec<(BlockId, BlockId)> {
    let (tokens, computed) = (
        manager.num_tokens(seq).unwrap(),
        manager.num_computed_tokens(seq).unwrap(),
    );
    manager.allocate_slots(seq, tokens - computed, 0).unwrap();
    manager.check().unwrap();
    let copies = manager.take_block_copies(0).unwrap();
    manager.commit(seq, tokens).unwrap();
    manager.check().unwrap();
    copies
}

fn table(manager: &KVCacheManager, seq: SeqHandle) -> Vec<u32> {
    manager.table(seq).unwrap().iter().map(|block| block.0).collect()
}

fn tokens(range: std::ops::Range<u32>) -> Vec<u32> {
    range.collect()
}

#[test]
fn a_second_sequence_takes_the_prefix_of_the_first() {
    let mut manager = manager(16);
    let first = add(&mut manager, &tokens(0..10));
    assert_eq!(compute(&mut manager, first), []);
    let second = add(&mut manager, &tokens(0..10));
    assert_eq!(manager.num_computed_tokens(second).unwrap(), 8);
    assert_eq!(table(&manager, second), table(&manager, first)[..2]);
    // The whole prompt is cached, but its last token has to be computed.
    let third = add(&mut manager, &tokens(0..8));
    assert_eq!(manager.num_computed_tokens(third).unwrap(), 4);
}

#[test]
fn equal_blocks_become_one() {
    let mut manager = manager(16);
    let (first, second) = (add(&mut manager, &tokens(0..8)), add(&mut manager, &tokens(0..8)));
    for seq in [first, second] {
        manager.allocate_slots(seq, 8, 0).unwrap();
    }
    assert_eq!(manager.pool().num_used(), 4);
    assert_eq!(manager.commit(first, 8).unwrap(), 2);
    assert_eq!(manager.commit(second, 8).unwrap(), 0);
    assert_eq!(table(&manager, first), table(&manager, second));
    assert_eq!(manager.pool().num_used(), 2);
    manager.check().unwrap();
}

#[test]
fn without_merging_tables_stay() {
    let config = ManagerConfig {
        merge_blocks: false,
        ..ManagerConfig::new(16, SIZE)
    };
    let mut manager = KVCacheManager::new(&config).unwrap();
    let (first, second) = (add(&mut manager, &tokens(0..8)), add(&mut manager, &tokens(0..8)));
    for seq in [first, second] {
        manager.allocate_slots(seq, 8, 0).unwrap();
        assert_eq!(manager.commit(seq, 8).unwrap(), 2);
        manager.check().unwrap();
    }
    assert_eq!(manager.pool().num_used(), 4);
    // The second goes on below the first one's nodes, and starts over when they are gone.
    manager.free(first, None).unwrap();
    manager.append(second, &tokens(8..12)).unwrap();
    compute(&mut manager, second);
    assert_eq!(manager.pool().num_cached(), 2);
    manager.truncate(second, 8, None).unwrap();
    let (pool, cache) = manager.parts_mut();
    assert_eq!(cache.evict(pool, 10), 3);
    manager.append(second, &tokens(20..24)).unwrap();
    compute(&mut manager, second);
    assert_eq!(manager.cache().unwrap().stats().num_nodes, 3);
    manager.free(second, None).unwrap();
    assert_eq!(manager.pool().num_cached(), 3);
    manager.check().unwrap();
}

#[test]
fn four_that_share_a_block_make_three_copies() {
    let mut manager = manager(32);
    let parent = add(&mut manager, &tokens(0..6));
    compute(&mut manager, parent);
    let mut all = manager.fork(parent, 3).unwrap();
    all.push(parent);
    manager.check().unwrap();
    assert_eq!(manager.pool().num_used(), 2);
    let shared = table(&manager, parent)[1];
    for (index, &seq) in all.iter().enumerate() {
        manager.append(seq, &[100 + index as u32]).unwrap();
        let changed = manager.allocate_slots(seq, 1, 0).unwrap();
        assert_eq!(changed, if index < 3 { 1 } else { 2 });
        manager.check().unwrap();
    }
    let copies = manager.take_block_copies(0).unwrap();
    assert_eq!(copies.len(), 3);
    assert!(copies.iter().all(|(src, _)| src.0 == shared));
    assert_eq!(table(&manager, parent)[1], shared);
    assert_eq!(manager.pool().ref_count(BlockId(shared)).unwrap(), 1);
    manager.check().unwrap();
}

#[test]
fn a_copy_of_a_copy_is_made_from_the_first() {
    let mut manager = manager(32);
    let first = add(&mut manager, &tokens(0..6));
    compute(&mut manager, first);
    let second = manager.fork(first, 1).unwrap()[0];
    manager.allocate_slots(second, 1, 0).unwrap();
    let third = manager.fork(second, 1).unwrap()[0];
    manager.allocate_slots(third, 1, 0).unwrap();
    manager.check().unwrap();
    let (src, dst) = (BlockId(table(&manager, first)[1]), |seq| {
        BlockId(table(&manager, seq)[1])
    });
    let expected = [(src, dst(second)), (src, dst(third))];
    assert_eq!(manager.clone().take_block_copies(0).unwrap(), expected);
    // Freeing a destination cancels its pair.
    manager.free(second, None).unwrap();
    manager.check().unwrap();
    assert_eq!(manager.take_block_copies(0).unwrap(), expected[1..]);
}

#[test]
fn a_source_is_held_until_the_copying_step_is_complete() {
    let mut manager = manager(32);
    let parent = add(&mut manager, &tokens(0..6));
    compute(&mut manager, parent);
    let child = manager.fork(parent, 1).unwrap()[0];
    let src = BlockId(table(&manager, parent)[1]);
    manager.append(child, &[7]).unwrap();
    manager.allocate_slots(child, 1, 0).unwrap();
    manager.free(parent, None).unwrap();
    assert_eq!(manager.pool().state(src).unwrap(), BlockState::Used);
    let step = manager.parts_mut().0.begin_step();
    assert_eq!(manager.take_block_copies(0).unwrap().len(), 1);
    assert_eq!(manager.pool().state(src).unwrap(), BlockState::Fenced);
    let (pool, cache) = manager.parts_mut();
    pool.complete_step(step, cache).unwrap();
    assert_eq!(manager.pool().state(src).unwrap(), BlockState::Free);
    manager.check().unwrap();
}

#[test]
fn a_copy_into_a_block_that_others_gave_back_is_not_made() {
    let mut manager = manager(32);
    let parent = add(&mut manager, &tokens(0..6));
    compute(&mut manager, parent);
    let child = manager.fork(parent, 1).unwrap()[0];
    manager.allocate_slots(child, 1, 0).unwrap();
    let dst = manager.table(child).unwrap()[1];
    manager.parts_mut().0.retain(&[dst]).unwrap();
    manager.free(child, None).unwrap();
    let (pool, cache) = manager.parts_mut();
    pool.release(&[dst], None, cache).unwrap();
    manager.check().unwrap();
    // Whoever gets the block now, nothing is copied into it.
    let mut other = manager.clone();
    let (pool, cache) = other.parts_mut();
    let all = pool.allocate(pool.num_free(), cache).unwrap();
    assert!(all.contains(&dst));
    assert_eq!(other.take_block_copies(0).unwrap(), []);
    let next = add(&mut manager, &tokens(20..120));
    manager.allocate_slots(next, 100, 0).unwrap();
    assert!(manager.table(next).unwrap().contains(&dst));
    assert_eq!(manager.take_block_copies(0).unwrap(), []);
    manager.check().unwrap();
}

#[test]
fn a_block_is_not_published_before_it_was_copied_into() {
    let mut manager = manager(16);
    let parent = add(&mut manager, &tokens(0..8));
    manager.allocate_slots(parent, 2, 0).unwrap();
    manager.commit(parent, 2).unwrap();
    // While a step computes the rest of the block, a fork comes to share it, and the parent gets another one.
    manager.parts_mut().0.begin_step();
    manager.allocate_slots(parent, 2, 0).unwrap();
    manager.fork(parent, 1).unwrap();
    manager.allocate_slots(parent, 6, 0).unwrap();
    let (pool, cache) = manager.parts_mut();
    pool.complete_step(1, cache).unwrap();
    manager.commit(parent, 4).unwrap();
    assert_eq!(manager.cache().unwrap().stats().num_nodes, 0);
    manager.parts_mut().0.begin_step();
    assert_eq!(manager.take_block_copies(0).unwrap().len(), 1);
    manager.commit(parent, 8).unwrap();
    assert_eq!(manager.cache().unwrap().stats().num_nodes, 2);
    manager.check().unwrap();
}

#[test]
fn a_published_block_is_not_written_again() {
    let mut manager = manager(16);
    let seq = add(&mut manager, &tokens(0..8));
    compute(&mut manager, seq);
    let before = table(&manager, seq);
    assert_eq!(manager.truncate(seq, 6, None).unwrap(), 2);
    manager.append(seq, &[50, 51]).unwrap();
    let copies = compute(&mut manager, seq);
    let after = table(&manager, seq);
    assert_eq!(copies, [(BlockId(before[1]), BlockId(after[1]))]);
    assert_eq!(manager.pool().state(BlockId(before[1])).unwrap(), BlockState::Cached);
    // Both ways on are findable.
    assert_eq!(
        manager.probe(&tokens(0..9), &NamespaceKey::default(), &ContentKeys::default()),
        8
    );
    let other = [0, 1, 2, 3, 4, 5, 50, 51, 9];
    assert_eq!(
        manager.probe(&other, &NamespaceKey::default(), &ContentKeys::default()),
        8
    );
}

#[test]
fn a_block_that_a_step_in_flight_writes_is_copied() {
    let mut manager = manager(16);
    let seq = add(&mut manager, &tokens(0..8));
    manager.parts_mut().0.begin_step();
    manager.allocate_slots(seq, 2, 0).unwrap();
    // Nothing is computed yet, and somebody else comes to hold the block. What the step writes must not be lost.
    let written = manager.table(seq).unwrap()[0];
    manager.parts_mut().0.retain(&[written]).unwrap();
    assert_eq!(manager.allocate_slots(seq, 3, 0).unwrap(), 0);
    let fresh = manager.table(seq).unwrap()[0];
    assert_eq!(manager.take_block_copies(0).unwrap(), [(written, fresh)]);
    manager.check().unwrap();
}

#[test]
fn allocation_is_idempotent_and_counts_what_it_needs() {
    let mut manager = manager(8);
    let seq = add(&mut manager, &tokens(0..10));
    assert_eq!(manager.blocks_needed(seq, 10, 3).unwrap(), 4);
    assert_eq!(manager.allocate_slots(seq, 10, 3).unwrap(), 0);
    assert_eq!(manager.allocate_slots(seq, 10, 3).unwrap(), 4);
    assert_eq!(manager.allocate_slots(seq, 0, 0).unwrap(), 4);
    assert_eq!(manager.num_slots(seq).unwrap(), 13);
    let before = manager.clone();
    let error = manager.allocate_slots(seq, 29, 0).unwrap_err();
    assert_eq!(error, Error::OutOfBlocks { needed: 4, free: 3 });
    for (new, lookahead) in [
        (usize::MAX, 0),
        (1, usize::MAX),
        (usize::MAX, usize::MAX),
        (1 << 60, 1 << 60),
    ] {
        assert!(manager.allocate_slots(seq, new, lookahead).is_err());
    }
    assert_eq!(manager, before);
}

#[test]
fn commit_is_monotone_and_bounded() {
    let mut manager = manager(8);
    let seq = add(&mut manager, &tokens(0..10));
    manager.allocate_slots(seq, 6, 0).unwrap();
    let before = manager.clone();
    assert_eq!(
        manager.commit(seq, 7).unwrap_err(),
        Error::InvalidArgument {
            argument: "num_computed_tokens",
            got: 7,
            expected: Expected::Between(0, 6)
        }
    );
    assert_eq!(manager, before);
    manager.commit(seq, 5).unwrap();
    assert!(manager.commit(seq, 4).is_err());
    manager.allocate_slots(seq, 10, 10).unwrap();
    assert!(manager.commit(seq, 11).is_err());
    assert_eq!(manager.commit(seq, 10).unwrap(), 7);
    assert_eq!(manager.commit(seq, 10).unwrap(), 7);
    manager.check().unwrap();
}

#[test]
fn preempted_sequences_find_their_blocks_again() {
    let mut manager = manager(8);
    let seq = add(&mut manager, &tokens(0..10));
    compute(&mut manager, seq);
    let before = table(&manager, seq);
    manager.preempt(seq, None).unwrap();
    manager.check().unwrap();
    assert_eq!((manager.pool().num_used(), manager.pool().num_cached()), (0, 2));
    assert!(manager.preempt(seq, None).is_err());
    assert!(manager.allocate_slots(seq, 1, 0).is_err());
    assert!(manager.commit(seq, 1).is_err());
    manager.append(seq, &[10]).unwrap();
    assert_eq!(manager.resume(seq).unwrap(), 8);
    assert!(manager.resume(seq).is_err());
    assert_eq!(table(&manager, seq), before[..2]);
    compute(&mut manager, seq);
}

#[test]
fn what_was_computed_before_a_reset_is_not_published_after_it() {
    let mut manager = manager(16);
    let seq = add(&mut manager, &tokens(0..10));
    compute(&mut manager, seq);
    let (pool, cache) = manager.parts_mut();
    assert_eq!(cache.reset(pool), 2);
    manager.check().unwrap();
    assert_eq!(manager.pool().num_used(), 3);
    manager.append(seq, &tokens(10..20)).unwrap();
    compute(&mut manager, seq);
    assert_eq!(manager.cache().unwrap().stats().num_nodes, 0);
    // From the next start it is.
    manager.preempt(seq, None).unwrap();
    assert_eq!(manager.resume(seq).unwrap(), 0);
    compute(&mut manager, seq);
    assert_eq!(manager.cache().unwrap().stats().num_nodes, 5);
}

#[test]
fn tenants_and_salts_do_not_meet_and_blocks_are_zeroed_between_tenants() {
    let mut manager = manager(8);
    let keys = [
        NamespaceKey {
            tenant: "a".into(),
            ..NamespaceKey::default()
        },
        NamespaceKey {
            tenant: "a".into(),
            cache_salt: "s".into(),
            ..NamespaceKey::default()
        },
        NamespaceKey {
            tenant: "a".into(),
            extra_keys: [ExtraKey::Text("1".into())].into(),
            ..Default::default()
        },
        NamespaceKey {
            tenant: "a".into(),
            extra_keys: [ExtraKey::Int(1)].into(),
            ..Default::default()
        },
    ];
    for key in &keys {
        let seq = manager
            .add(&tokens(0..28), key.clone(), ContentKeys::default())
            .unwrap();
        assert_eq!(manager.num_computed_tokens(seq).unwrap(), 0);
        compute(&mut manager, seq);
        assert_eq!(manager.take_blocks_to_zero(), []);
        manager.free(seq, None).unwrap();
    }
    let other = NamespaceKey {
        tenant: "b".into(),
        ..NamespaceKey::default()
    };
    let seq = manager.add(&tokens(0..28), other, ContentKeys::default()).unwrap();
    manager.allocate_slots(seq, 28, 0).unwrap();
    assert_eq!(manager.take_blocks_to_zero().len(), 7);
    manager.check().unwrap();
}

#[test]
fn content_is_part_of_a_blocks_identity() {
    let image = |key: &[u8]| {
        let key = crate::content::ContentKey {
            start: 2,
            stop: 7,
            key: key.into(),
        };
        ContentKeys::new(vec![key]).unwrap()
    };
    let mut manager = manager(16);
    let key = NamespaceKey::default;
    let seq = manager.add(&tokens(0..12), key(), image(b"cat")).unwrap();
    compute(&mut manager, seq);
    assert_eq!(manager.probe(&tokens(0..12), &key(), &image(b"cat")), 8);
    assert_eq!(manager.probe(&tokens(0..12), &key(), &image(b"dog")), 0);
    assert_eq!(manager.probe(&tokens(0..12), &key(), &ContentKeys::default()), 0);
    // Cut in the middle of the image, it goes on as something else.
    manager.truncate(seq, 5, None).unwrap();
    manager.append(seq, &tokens(5..12)).unwrap();
    compute(&mut manager, seq);
    assert_eq!(manager.cache().unwrap().stats().num_nodes, 5);
}

#[test]
fn tables_and_slots_are_written_in_place() {
    let mut manager = manager(16);
    let seq = add(&mut manager, &tokens(0..10));
    manager.allocate_slots(seq, 10, 0).unwrap();
    let mut blocks = [-1; 4];
    assert_eq!(manager.block_table(seq, 0, &mut blocks).unwrap(), 3);
    assert_eq!(blocks, [1, 2, 3, -1]);
    let mut slots = [-1; 6];
    manager.slot_mapping(seq, 3, 9, 0, &mut slots).unwrap();
    assert_eq!(slots, [7, 8, 9, 10, 11, 12]);
    manager.slot_mapping(seq, 12, 12, 0, &mut []).unwrap();
    for (start, stop) in [(0, 13), (5, 4), (0, 7), (usize::MAX, usize::MAX)] {
        assert!(manager.slot_mapping(seq, start, stop, 0, &mut slots).is_err());
    }
    assert!(manager.block_table(seq, 0, &mut blocks[..2]).is_err());
    assert!(manager.block_table(seq, 1, &mut blocks).is_err());
    let mut read = [0; 3];
    manager.read_tokens(seq, 7, 10, &mut read).unwrap();
    assert_eq!(read, [7, 8, 9]);
    assert!(manager.token(seq, 10).is_err());
}

#[test]
fn bad_input_changes_nothing() {
    let config = ManagerConfig {
        vocab_size: Some(100),
        ..ManagerConfig::new(8, SIZE)
    };
    let mut manager = KVCacheManager::new(&config).unwrap();
    let seq = add(&mut manager, &tokens(0..5));
    let gone = add(&mut manager, &tokens(0..5));
    manager.free(gone, None).unwrap();
    let before = manager.clone();
    let key = NamespaceKey::default;
    assert!(manager.add(&[], key(), ContentKeys::default()).is_err());
    let outside = Error::TokenOutOfRange {
        token: 100,
        position: 1,
        vocab_size: 100,
    };
    assert_eq!(
        manager.add(&[99, 100], key(), ContentKeys::default()),
        Err(outside.clone())
    );
    assert_eq!(manager.append(seq, &[99, 100]), Err(outside));
    assert!(manager.fork(seq, 0).is_err());
    assert!(manager.fork(seq, usize::MAX).is_err());
    assert!(manager.truncate(seq, 0, None).is_err());
    assert!(manager.truncate(seq, 6, None).is_err());
    assert!(matches!(
        manager.truncate(seq, 5, Some(1)),
        Err(Error::Step {
            step: 1,
            expected: 0,
            ..
        })
    ));
    assert!(matches!(manager.free(seq, Some(1)), Err(Error::Step { .. })));
    assert!(matches!(manager.preempt(seq, Some(1)), Err(Error::Step { .. })));
    for seq in [gone, SeqHandle(0), SeqHandle(u64::MAX)] {
        assert!(matches!(manager.append(seq, &[1]), Err(Error::StaleHandle { .. })));
        assert!(matches!(
            manager.allocate_slots(seq, 1, 0),
            Err(Error::StaleHandle { .. })
        ));
        assert!(matches!(manager.commit(seq, 1), Err(Error::StaleHandle { .. })));
        assert!(matches!(manager.truncate(seq, 1, None), Err(Error::StaleHandle { .. })));
        assert!(matches!(manager.fork(seq, 1), Err(Error::StaleHandle { .. })));
        assert!(matches!(manager.preempt(seq, None), Err(Error::StaleHandle { .. })));
        assert!(matches!(manager.resume(seq), Err(Error::StaleHandle { .. })));
        assert!(matches!(manager.free(seq, None), Err(Error::StaleHandle { .. })));
        assert!(matches!(manager.table(seq), Err(Error::StaleHandle { .. })));
    }
    assert!(manager.take_block_copies(1).is_err());
    assert_eq!(manager, before);
}

#[test]
fn configurations_are_checked() {
    let config = || ManagerConfig::new(8, SIZE);
    for bad in [
        ManagerConfig {
            num_blocks: 1,
            ..config()
        },
        ManagerConfig {
            num_blocks: usize::MAX,
            ..config()
        },
        ManagerConfig {
            block_size: 0,
            ..config()
        },
        ManagerConfig {
            block_size: usize::MAX,
            ..config()
        },
        ManagerConfig {
            vocab_size: Some(0),
            ..config()
        },
        ManagerConfig {
            groups: vec![],
            ..config()
        },
        ManagerConfig {
            groups: vec![KVGroup { window: Some(8) }],
            ..config()
        },
        ManagerConfig {
            groups: vec![KVGroup::default(); 2],
            ..config()
        },
    ] {
        assert!(KVCacheManager::new(&bad).is_err(), "{bad:?}");
    }
}

#[test]
fn a_namespace_dropped_too_often_stays_with_its_sequences() {
    let key = |tenant: &str| NamespaceKey {
        tenant: tenant.into(),
        ..NamespaceKey::default()
    };
    let mut manager = manager(8);
    let (_, cache) = manager.parts_mut();
    let handle = cache.namespace(key("a"));
    let seq = manager.add(&tokens(0..9), key("a"), ContentKeys::default()).unwrap();
    let (pool, cache) = manager.parts_mut();
    cache.drop_namespace(pool, handle, false).unwrap();
    let error = cache.drop_namespace(pool, handle, true).unwrap_err();
    assert!(matches!(error, Error::StaleHandle { .. }), "{error}");
    let other = manager.add(&tokens(0..1), key("b"), ContentKeys::default()).unwrap();
    compute(&mut manager, seq);
    assert_eq!(manager.probe(&tokens(0..9), &key("b"), &ContentKeys::default()), 0);
    manager.free(other, None).unwrap();
    manager.free(seq, None).unwrap();
    manager.check().unwrap();
}
