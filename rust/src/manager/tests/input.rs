//! Arguments: what is taken, and what is refused without a trace.

use super::*;

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
fn forks_are_bounded_by_what_they_copy() {
    // Long tables are tested from Python, where the process can be given less memory. Here: a long tail of tokens.
    let mut manager = KVCacheManager::new(&ManagerConfig::new(8, 1 << 16)).unwrap();
    let seq = add(&mut manager, &tokens(0..(1 << 16) - 1));
    let before = manager.clone();
    let most = (1 << 28) / ((1 << 16) - 1);
    for n in [0, most + 1, MAX_FORKS, usize::MAX] {
        let expected = Expected::Between(1, most as u64);
        assert_eq!(manager.fork(seq, n), Err(Error::argument("n", n, expected)));
    }
    assert_eq!(manager, before);
    assert_eq!(manager.fork(seq, 3).unwrap().len(), 3);
    manager.check().unwrap();
}
