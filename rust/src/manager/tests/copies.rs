//! Sharing, and what is copied when it ends.

use super::*;

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
fn a_cancelled_copy_does_not_use_up_the_replacement_of_another_block() {
    let mut manager = manager(7);
    let parent = add(&mut manager, &tokens(0..6));
    manager.allocate_slots(parent, 6, 4).unwrap();
    manager.commit(parent, 6).unwrap();
    let [_, source, shared] = table(&manager, parent)[..] else {
        panic!("three blocks")
    };
    let child = manager.fork(parent, 1).unwrap()[0];
    manager.allocate_slots(child, 1, 0).unwrap();
    // The copy's destination outlives the child in another's hand, and is given back there: the pair is still pending.
    let destination = BlockId(table(&manager, child)[1]);
    manager.pool.retain(&[destination]).unwrap();
    manager.free(child, None).unwrap();
    manager.pool.release(&[destination], None, &mut manager.cache).unwrap();
    // The parent takes that block for one thing, and has to replace another that is shared.
    manager.pool.retain(&[BlockId(shared)]).unwrap();
    let spare = manager.pool.num_free() - 2;
    manager.pool.allocate(spare, &mut manager.cache).unwrap();
    assert_eq!(manager.pool.num_free(), 2);
    assert_eq!(manager.allocate_slots(parent, 2, 8).unwrap(), 2);
    let now = table(&manager, parent);
    assert_eq!((now.len(), now[1]), (4, source));
    assert_ne!(now[2], shared);
    let pair = (BlockId(shared), BlockId(now[2]));
    assert_eq!(manager.take_block_copies(0).unwrap(), [pair]);
    assert_eq!(manager.pool.ref_count(BlockId(source)), Ok(1));
    manager.check().unwrap();
}
