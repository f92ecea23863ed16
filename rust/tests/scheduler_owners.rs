//! A scheduler on a manager that others use too: their sequences, their blocks, their tenants.

mod sim;
#[path = "sim/small.rs"]
mod small;

use pagedcore::{
    BlockId, ContentKeys, Error, Expected, KVCacheManager, ManagerConfig, NamespaceKey, RequestParams, Scheduler,
    SchedulerConfig, SeqHandle,
};
use small::{VOCAB, config, prompt, scheduler, step};

fn key(tenant: &str) -> NamespaceKey {
    NamespaceKey {
        tenant: tenant.into(),
        ..NamespaceKey::default()
    }
}

/// A sequence of somebody else's, with slots for all of its tokens.
fn foreign(manager: &mut KVCacheManager, tenant: &str, tokens: u32) -> SeqHandle {
    let seq = manager.add(&vec![7; tokens as usize], key(tenant), ContentKeys::default());
    let seq = seq.unwrap();
    manager.allocate_slots(seq, tokens as usize, 0).unwrap();
    seq
}

/// The copies and the blocks to zero of a step, which is cancelled.
fn told(scheduler: &mut Scheduler) -> (Vec<(i32, i32)>, Vec<i32>) {
    let planned = scheduler.schedule().unwrap().unwrap();
    let plan = planned.plan();
    let mut copies: Vec<_> = plan.block_copies().chunks_exact(2).map(|p| (p[0], p[1])).collect();
    copies.sort_unstable();
    let (number, zero) = (plan.step(), plan.blocks_to_zero().to_vec());
    scheduler.check().unwrap();
    scheduler.cancel(number).unwrap();
    scheduler.check().unwrap();
    (copies, zero)
}

#[test]
fn the_vocabularies_of_scheduler_and_manager_are_the_same() {
    let config = config();
    for (vocab_size, got) in [(None, 1 << 31), (Some(VOCAB as usize - 1), i128::from(VOCAB) - 1)] {
        let manager = ManagerConfig {
            vocab_size,
            ..ManagerConfig::new(config.num_blocks, config.block_size)
        };
        let manager = KVCacheManager::new(&manager).unwrap();
        let expected = Error::InvalidArgument {
            argument: "vocab_size",
            got,
            expected: Expected::Exactly(VOCAB.into()),
        };
        assert_eq!(Scheduler::with_manager(config.clone(), manager).err(), Some(expected));
    }
    let any = SchedulerConfig {
        vocab_size: None,
        ..config.clone()
    };
    let manager = KVCacheManager::new(&ManagerConfig::new(config.num_blocks, config.block_size));
    let mut scheduler = Scheduler::with_manager(any, manager.unwrap()).unwrap();
    scheduler
        .add_request("a", &[i32::MAX.unsigned_abs()], RequestParams::new(1))
        .unwrap();
}

#[test]
fn a_plan_has_room_for_all_that_others_leave_to_it() {
    let (mut scheduler, mut server) = scheduler(&SchedulerConfig {
        num_blocks: 1200,
        max_num_seqs: 2,
        ..config()
    });
    let manager = scheduler.manager_mut();
    let first = foreign(manager, "a", 4 * 700);
    manager.free(first, None).unwrap();
    let second = foreign(manager, "b", 4 * 700);
    let parent = foreign(manager, "", 6);
    manager.commit(parent, 6).unwrap();
    let mut forks = manager.fork(parent, 450).unwrap();
    for &fork in &forks {
        manager.append(fork, &[1]).unwrap();
        manager.allocate_slots(fork, 1, 0).unwrap();
    }
    scheduler.add_request("r", &prompt(5), RequestParams::new(2)).unwrap();
    let (copies, zero) = told(&mut scheduler);
    assert_eq!((copies.len(), zero.len()), (450, 700));
    assert_eq!(told(&mut scheduler), (copies, zero));
    step(&mut scheduler, &mut server);
    let stats = scheduler.stats();
    assert_eq!((stats.block_copies, stats.blocks_zeroed), (450, 700));
    forks.extend([second, parent]);
    for seq in forks {
        scheduler.manager_mut().free(seq, None).unwrap();
    }
    step(&mut scheduler, &mut server);
    assert_eq!(scheduler.manager().pool().num_used(), 0);
}

/// A fork that has a block of its own to copy to, which somebody then gives back behind its back.
fn orphan_a_copy(scheduler: &mut Scheduler, take: impl Fn(&mut Scheduler)) -> BlockId {
    let manager = scheduler.manager_mut();
    let parent = foreign(manager, "", 6);
    manager.commit(parent, 6).unwrap();
    let fork = manager.fork(parent, 1).unwrap()[0];
    manager.append(fork, &[1]).unwrap();
    manager.allocate_slots(fork, 1, 0).unwrap();
    let dst = manager.table(fork).unwrap()[1];
    take(scheduler);
    let manager = scheduler.manager_mut();
    manager.parts_mut().0.retain(&[dst]).unwrap();
    manager.free(fork, None).unwrap();
    let (pool, cache) = manager.parts_mut();
    pool.release(&[dst], None, cache).unwrap();
    let others = pool.allocate(pool.num_free(), cache).unwrap();
    assert!(others.contains(&dst));
    let (rest, kept): (Vec<_>, Vec<_>) = others.into_iter().partition(|&block| block != dst);
    assert_eq!(kept, [dst]);
    pool.release(&rest, None, cache).unwrap();
    scheduler.check().unwrap();
    dst
}

#[test]
fn nothing_is_copied_into_a_block_that_is_somebody_elses_by_now() {
    for taken in [false, true] {
        let (mut scheduler, _) = scheduler(&config());
        scheduler.add_request("r", &prompt(5), RequestParams::new(2)).unwrap();
        let dst = orphan_a_copy(&mut scheduler, |scheduler| {
            if taken {
                assert_eq!(told(scheduler).0.len(), 1);
            }
        });
        assert_eq!(told(&mut scheduler), (vec![], vec![]), "block {dst:?}");
    }
}

#[test]
fn nothing_is_zeroed_that_is_somebody_elses_by_now() {
    for taken in [false, true] {
        let (mut scheduler, _) = scheduler(&config());
        scheduler.add_request("r", &prompt(5), RequestParams::new(2)).unwrap();
        let manager = scheduler.manager_mut();
        let first = foreign(manager, "a", 4);
        manager.free(first, None).unwrap();
        let second = foreign(manager, "b", 4);
        let block = manager.table(second).unwrap()[0];
        if taken {
            assert_eq!(told(&mut scheduler).1, [block.0.cast_signed()]);
        }
        let manager = scheduler.manager_mut();
        manager.parts_mut().0.retain(&[block]).unwrap();
        manager.free(second, None).unwrap();
        let (pool, cache) = manager.parts_mut();
        pool.release(&[block], None, cache).unwrap();
        let mut others = pool.allocate(pool.num_free(), cache).unwrap();
        others.retain(|&other| other != block);
        pool.release(&others, None, cache).unwrap();
        // The request's blocks are never the tenant's: the one in question is held.
        assert!(!told(&mut scheduler).1.contains(&block.0.cast_signed()));
        // Given back, it is zeroed for whoever comes next, the same tenant too.
        let (pool, cache) = scheduler.manager_mut().parts_mut();
        pool.release(&[block], None, cache).unwrap();
        let tokens = 4 * u32::try_from(pool.num_free()).unwrap();
        let rest = foreign(scheduler.manager_mut(), "b", tokens);
        assert!(scheduler.manager().table(rest).unwrap().contains(&block));
        assert!(told(&mut scheduler).1.contains(&block.0.cast_signed()));
    }
}

#[test]
fn a_block_whose_zeroing_was_not_run_is_zeroed_for_whoever_took_it_meanwhile() {
    for updated in [false, true] {
        let (mut scheduler, mut server) = scheduler(&config());
        scheduler.add_request("r", &prompt(5), RequestParams::new(4)).unwrap();
        step(&mut scheduler, &mut server);
        let manager = scheduler.manager_mut();
        let first = foreign(manager, "a", 4);
        let block = manager.table(first).unwrap()[0];
        // A tenant that has nothing comes back as another one.
        foreign(manager, "b", 4);
        manager.free(first, None).unwrap();
        let second = foreign(manager, "b", 4);
        assert_eq!(manager.table(second).unwrap(), [block]);
        let planned = scheduler.schedule().unwrap().unwrap();
        assert_eq!(planned.plan().blocks_to_zero(), [block.0.cast_signed()]);
        let (number, sampled) = (planned.plan().step(), server.run(&planned, |_| 0));
        // No step reads it: it is free at once, and goes to the same tenant again, with the plan still in flight.
        let manager = scheduler.manager_mut();
        manager.free(second, Some(0)).unwrap();
        let third = foreign(manager, "b", 4);
        assert_eq!(manager.table(third).unwrap(), [block]);
        if updated {
            scheduler.update(number, &sampled, None, None).unwrap();
        } else {
            scheduler.cancel(number).unwrap();
        }
        scheduler.check().unwrap();
        assert_eq!(told(&mut scheduler).1, [block.0.cast_signed()], "updated: {updated}");
        // Once that is done it is done.
        step(&mut scheduler, &mut server);
        assert_eq!(told(&mut scheduler).1, []);
    }
}

#[test]
fn what_was_copied_from_a_copy_that_was_not_made_is_copied_from_its_source() {
    let (mut scheduler, _) = scheduler(&config());
    scheduler.add_request("r", &prompt(5), RequestParams::new(2)).unwrap();
    let manager = scheduler.manager_mut();
    let parent = foreign(manager, "", 6);
    manager.commit(parent, 6).unwrap();
    let write = |manager: &mut KVCacheManager, from: SeqHandle| {
        let fork = manager.fork(from, 1).unwrap()[0];
        manager.append(fork, &[1]).unwrap();
        manager.allocate_slots(fork, 1, 0).unwrap();
        (fork, manager.table(fork).unwrap()[1].0.cast_signed())
    };
    let source = manager.table(parent).unwrap()[1].0.cast_signed();
    let (child, copy) = write(manager, parent);
    let planned = scheduler.schedule().unwrap().unwrap();
    assert_eq!(planned.plan().block_copies(), [source, copy]);
    let number = planned.plan().step();
    let (_, second) = write(scheduler.manager_mut(), child);
    scheduler.cancel(number).unwrap();
    scheduler.check().unwrap();
    assert_eq!(told(&mut scheduler).0, [(source, copy), (source, second)]);
}

#[test]
fn a_request_that_waits_beside_its_cached_prefix_leaves_no_trace() {
    let (mut scheduler, mut server) = scheduler(&SchedulerConfig {
        max_num_batched_tokens: 128,
        max_model_len: 100,
        ..config()
    });
    let long: Vec<u32> = (0..60).map(|i| i % VOCAB).collect();
    scheduler.add_request("first", &long, RequestParams::new(1)).unwrap();
    step(&mut scheduler, &mut server);
    let other: Vec<u32> = (0..64).map(|i| (i * 3 + 1) % VOCAB).collect();
    scheduler
        .add_request("running", &other, RequestParams::new(12))
        .unwrap();
    step(&mut scheduler, &mut server);
    scheduler.add_request("waiting", &long, RequestParams::new(9)).unwrap();
    let lookups = |scheduler: &Scheduler| scheduler.manager().cache().unwrap().stats().lookups;
    let before = lookups(&scheduler);
    for _ in 0..3 {
        step(&mut scheduler, &mut server);
        // Its fifteen blocks and one to grow into, and one for the other. Most of its own are cached, and as such among
        // those that can be had.
        let explained = scheduler.explain("waiting").unwrap().to_string();
        assert_eq!(explained, "waiting: blocks (needed 17, available 15)");
        assert_eq!(lookups(&scheduler), before);
    }
    while scheduler.has_unfinished() {
        step(&mut scheduler, &mut server);
    }
    assert_eq!(lookups(&scheduler), before + 1);
    assert!(scheduler.stats().prefix_hit_tokens > 40, "{:?}", scheduler.stats());
}

#[test]
fn a_prefix_that_others_hold_costs_a_waiting_request_nothing() {
    let (mut scheduler, mut server) = scheduler(&SchedulerConfig {
        num_blocks: 25,
        max_num_batched_tokens: 128,
        max_model_len: 90,
        ..config()
    });
    let long: Vec<u32> = (0..64).map(|i| i % VOCAB).collect();
    scheduler.add_request("a", &long, RequestParams::new(20)).unwrap();
    step(&mut scheduler, &mut server);
    // Seventeen blocks are held. Without sharing them the second would not fit.
    scheduler.add_request("b", &long, RequestParams::new(4)).unwrap();
    step(&mut scheduler, &mut server);
    assert_eq!(scheduler.explain("b").unwrap().to_string(), "running");
}
