//! Tests of level 0: what each call means, one situation at a time.

use super::*;

fn ids(blocks: &[u32]) -> Vec<BlockId> {
    blocks.iter().copied().map(BlockId).collect()
}

fn refused(block: u32, problem: BlockProblem) -> Result<()> {
    Err(Error::Block {
        block: BlockId(block),
        num_blocks: 8,
        problem,
    })
}

/// A pool of eight blocks of which 1, 2 and 3 are held.
fn pool() -> BlockPool {
    let mut pool = BlockPool::new(8, 16).unwrap();
    assert_eq!(pool.allocate(3, &mut NoCache).unwrap(), ids(&[1, 2, 3]));
    pool
}

fn release(pool: &mut BlockPool, blocks: &[u32], after_step: Option<Step>) -> Result<()> {
    let result = pool.release(&ids(blocks), after_step, &mut NoCache);
    pool.check().unwrap();
    result
}

#[test]
fn sizes_are_checked() {
    for (num_blocks, block_size) in [
        (0, 16),
        (1, 16),
        (MAX_BLOCKS + 1, 16),
        (usize::MAX, 16),
        (8, 0),
        (8, 1 << 17),
    ] {
        assert!(matches!(
            BlockPool::new(num_blocks, block_size),
            Err(Error::InvalidArgument { .. })
        ));
    }
    let pool = BlockPool::new(2, MAX_BLOCK_SIZE).unwrap();
    assert_eq!(
        (pool.num_blocks(), pool.block_size(), pool.num_free()),
        (2, MAX_BLOCK_SIZE, 1)
    );
}

#[test]
fn too_many_blocks_are_refused_with_both_numbers() {
    let mut pool = pool();
    let before = pool.clone();
    for n in [5, 1000, usize::MAX] {
        assert_eq!(
            pool.allocate(n, &mut NoCache),
            Err(Error::OutOfBlocks {
                needed: n as u64,
                free: 4
            })
        );
        assert_eq!(pool, before);
    }
    assert_eq!(pool.allocate(0, &mut NoCache), Ok(vec![]));
    assert_eq!(pool.allocate(4, &mut NoCache).unwrap().len(), 4);
}

#[test]
fn references_are_counted_within_one_call_too() {
    let mut pool = pool();
    let before = pool.clone();
    assert_eq!(release(&mut pool, &[1, 2, 1], None), refused(1, BlockProblem::NotHeld));
    assert_eq!(pool, before);
    pool.retain(&ids(&[1, 1])).unwrap();
    release(&mut pool, &[1, 2, 1], None).unwrap();
    assert_eq!(pool.ref_count(BlockId(1)), Ok(1));
    release(&mut pool, &[1], None).unwrap();
    assert_eq!(pool.num_free(), 6);
}

#[test]
fn bad_blocks_change_nothing() {
    let mut pool = pool();
    let before = pool.clone();
    for (blocks, block, problem) in [
        ([1, 0], 0, BlockProblem::Null),
        ([1, 8], 8, BlockProblem::OutOfRange),
        ([1, u32::MAX], u32::MAX, BlockProblem::OutOfRange),
        ([1, 4], 4, BlockProblem::NotHeld),
    ] {
        assert_eq!(pool.retain(&ids(&blocks)), refused(block, problem));
        assert_eq!(release(&mut pool, &blocks, None), refused(block, problem));
    }
    assert_eq!(
        pool.state(BlockId(8)),
        Err(Error::Block {
            block: BlockId(8),
            num_blocks: 8,
            problem: BlockProblem::OutOfRange
        })
    );
    assert_eq!(pool, before);
}

#[test]
fn a_reference_count_does_not_wrap() {
    let mut pool = pool();
    pool.refs[2] = u32::MAX;
    let before = pool.clone();
    assert_eq!(pool.retain(&ids(&[1, 2])), refused(2, BlockProblem::TooManyReferences));
    assert_eq!(
        pool.retain_times(&ids(&[1, 2]), 7),
        refused(2, BlockProblem::TooManyReferences)
    );
    assert_eq!(pool, before);
}

#[test]
fn a_fenced_block_waits_for_all_steps_up_to_its_fence() {
    let mut pool = pool();
    assert_eq!((pool.begin_step(), pool.begin_step(), pool.begin_step()), (1, 2, 3));
    release(&mut pool, &[1], Some(2)).unwrap();
    release(&mut pool, &[2], None).unwrap();
    assert_eq!(pool.state(BlockId(1)), Ok(BlockState::Fenced));
    // Step 2 is complete, but step 1, begun before it, is not.
    pool.complete_step(2, &mut NoCache).unwrap();
    assert_eq!(
        (pool.num_fenced(), pool.completed_through(), pool.steps_in_flight()),
        (2, 0, 2)
    );
    pool.complete_step(1, &mut NoCache).unwrap();
    assert_eq!((pool.num_fenced(), pool.completed_through()), (1, 2));
    assert_eq!(pool.state(BlockId(2)), Ok(BlockState::Fenced));
    pool.complete_step(3, &mut NoCache).unwrap();
    assert_eq!(pool.num_free(), 6);
    pool.check().unwrap();
}

#[test]
fn an_earlier_holders_fence_counts() {
    let mut pool = pool();
    pool.retain(&ids(&[1])).unwrap();
    let step = pool.begin_step();
    release(&mut pool, &[1], Some(step)).unwrap();
    // The last holder's blocks are read by no step, but the first one's are.
    release(&mut pool, &[1], Some(0)).unwrap();
    assert_eq!(pool.state(BlockId(1)), Ok(BlockState::Fenced));
    pool.complete_step(step, &mut NoCache).unwrap();
    assert_eq!(pool.state(BlockId(1)), Ok(BlockState::Free));
}

#[test]
fn without_a_step_in_flight_a_release_is_at_once() {
    let mut pool = pool();
    let step = pool.begin_step();
    pool.complete_step(step, &mut NoCache).unwrap();
    release(&mut pool, &[1, 2], None).unwrap();
    release(&mut pool, &[3], Some(step)).unwrap();
    assert_eq!((pool.num_free(), pool.num_fenced()), (7, 0));
}

#[test]
fn steps_are_begun_before_they_are_named_and_completed_once() {
    let mut pool = pool();
    let step = pool.begin_step();
    pool.begin_step();
    let before = pool.clone();
    let error = |step, expected, problem| {
        Err(Error::Step {
            step,
            expected,
            problem,
        })
    };
    for unknown in [0, 3, u64::MAX] {
        assert_eq!(
            pool.complete_step(unknown, &mut NoCache),
            error(unknown, 2, StepProblem::NotBegun)
        );
    }
    assert_eq!(release(&mut pool, &[1], Some(3)), error(3, 2, StepProblem::NotBegun));
    assert_eq!(pool, before);
    pool.complete_step(step, &mut NoCache).unwrap();
    assert_eq!(
        pool.complete_step(step, &mut NoCache),
        error(1, 2, StepProblem::AlreadyComplete)
    );
}

#[test]
fn the_generation_rises_at_each_allocation() {
    let mut pool = pool();
    let generation = pool.generation(BlockId(1)).unwrap();
    release(&mut pool, &[1], None).unwrap();
    assert_eq!(pool.generation(BlockId(1)), Ok(generation));
    assert_eq!(pool.allocate(1, &mut NoCache).unwrap(), ids(&[1]));
    assert_eq!(pool.generation(BlockId(1)), Ok(generation + 1));
}

#[test]
fn totals_are_kept() {
    let mut pool = pool();
    release(&mut pool, &[1, 2, 3], None).unwrap();
    pool.allocate(1, &mut NoCache).unwrap();
    let stats = pool.stats();
    assert_eq!(
        (stats.allocated, stats.peak_used, stats.num_used, stats.num_free),
        (4, 3, 1, 6)
    );
}

/// Each invariant, broken by hand, is found and named.
#[test]
fn check_finds_what_is_broken() {
    type Break = fn(&mut BlockPool);
    let breaks: [(&str, Break); 9] = [
        ("A1", |pool| pool.num_used += 1),
        ("A1", |pool| pool.num_cached += 1),
        ("A1", |pool| pool.num_fenced += 1),
        ("A2", |pool| pool.refs[5] = 1),
        ("A2", |pool| pool.refs[2] = 0),
        ("A2", |pool| pool.free.insert(BlockId(1))),
        ("A5", |pool| pool.fences[1] = 9),
        ("A5", |pool| pool.flights[0].pending.push(BlockId(1))),
        ("A8", |pool| pool.refs[0] = 1),
    ];
    for (name, break_it) in breaks {
        let mut pool = pool();
        pool.begin_step();
        pool.retain(&ids(&[1])).unwrap();
        release(&mut pool, &[1], None).unwrap();
        break_it(&mut pool);
        assert!(
            matches!(pool.check(), Err(Error::Corruption { invariant, .. }) if invariant == name),
            "{name}"
        );
    }
}
