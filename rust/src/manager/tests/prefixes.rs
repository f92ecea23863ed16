//! What is published, who finds it, and who does not.

use super::*;

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
