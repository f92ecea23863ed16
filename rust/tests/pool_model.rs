//! Level 0 against the naive model: random operations, good and bad, with every invariant checked after each.

mod naive;

use naive::{Blocks, all_or_nothing};
use pagedcore::{BlockId, BlockPool, BlockProblem, BlockState, Error, NoCache, Step, StepProblem};
use proptest::prelude::*;

const NUM_BLOCKS: usize = 70; // more than one word of the free map

#[derive(Clone, Debug)]
enum Op {
    /// Blocks wanted, and the block to be near.
    Allocate(usize, u32),
    /// Positions in the list of references held.
    Retain(Vec<usize>),
    Release(Vec<usize>, Option<Step>),
    /// Block ids as they come, held or not.
    ReleaseRaw(Vec<u32>),
    RetainRaw(Vec<u32>),
    Begin,
    /// Which of the steps begun.
    Complete(Step),
}

fn operation() -> impl Strategy<Value = Op> {
    let picks = || proptest::collection::vec(0_usize..1000, 0..8);
    let ids = || proptest::collection::vec(0..NUM_BLOCKS as u32 + 3, 0..4);
    prop_oneof![
        5 => (0_usize..12, 0..NUM_BLOCKS as u32).prop_map(|(n, near)| Op::Allocate(n, near)),
        1 => (0_usize..90).prop_map(|n| Op::Allocate(n, 0)),
        2 => picks().prop_map(Op::Retain),
        6 => (picks(), proptest::option::of(0_u64..6)).prop_map(|(picks, step)| Op::Release(picks, step)),
        1 => ids().prop_map(Op::ReleaseRaw),
        1 => ids().prop_map(Op::RetainRaw),
        2 => Just(Op::Begin),
        3 => (0_u64..6).prop_map(Op::Complete),
    ]
}

fn property(operations: &[Op]) {
    let mut pool = BlockPool::new(NUM_BLOCKS, 16).unwrap();
    let mut model = Blocks::new(NUM_BLOCKS);
    // One entry per reference.
    let mut held: Vec<BlockId> = Vec::new();
    for operation in operations {
        match operation {
            Op::Allocate(n, near) => allocate(&mut pool, &mut model, &mut held, *n, *near),
            Op::Retain(picks) => {
                let blocks: Vec<_> = picks
                    .iter()
                    .filter_map(|pick| held.get(pick % held.len().max(1)))
                    .copied()
                    .collect();
                pool.retain(&blocks).unwrap();
                blocks.iter().for_each(|block| model.refs[block.index()] += 1);
                held.extend(blocks);
            }
            Op::Release(picks, back) => {
                let mut blocks = Vec::new();
                for pick in picks {
                    if !held.is_empty() {
                        blocks.push(held.swap_remove(pick % held.len()));
                    }
                }
                let after = back.map(|back| model.begun.saturating_sub(back));
                pool.release(&blocks, after, &mut NoCache).unwrap();
                let fence = model.fence(after);
                blocks.iter().for_each(|&block| model.release(block, fence));
            }
            Op::ReleaseRaw(ids) => {
                let blocks: Vec<_> = ids.iter().copied().map(BlockId).collect();
                let result = all_or_nothing(&mut pool, |pool| pool.release(&blocks, None, &mut NoCache));
                assert_eq!(result, refuse(&model, &blocks, true));
                if result.is_ok() {
                    for block in blocks {
                        model.release(block, model.begun);
                        held.swap_remove(held.iter().position(|&it| it == block).unwrap());
                    }
                }
            }
            Op::RetainRaw(ids) => {
                let blocks: Vec<_> = ids.iter().copied().map(BlockId).collect();
                let result = all_or_nothing(&mut pool, |pool| pool.retain(&blocks));
                assert_eq!(result, refuse(&model, &blocks, false));
                if result.is_ok() {
                    blocks.iter().for_each(|block| model.refs[block.index()] += 1);
                    held.extend(blocks);
                }
            }
            Op::Begin => {
                model.begun += 1;
                assert_eq!(pool.begin_step(), model.begun);
            }
            Op::Complete(back) => {
                // Any step, from one that has not begun to ones that are complete already.
                let step = (model.begun + 1).saturating_sub(*back);
                let result = all_or_nothing(&mut pool, |pool| pool.complete_step(step, &mut NoCache));
                let problem = if step == 0 || step > model.begun {
                    Some(StepProblem::NotBegun)
                } else if model.completed.contains(&step) {
                    Some(StepProblem::AlreadyComplete)
                } else {
                    model.completed.insert(step);
                    None
                };
                match result {
                    Ok(()) => assert_eq!(problem, None),
                    Err(Error::Step {
                        step: named,
                        problem: found,
                        ..
                    }) => {
                        assert_eq!((named, Some(found)), (step, problem));
                    }
                    Err(other) => panic!("{other}"),
                }
            }
        }
        model.compare(&pool, None, 16);
    }
}

fn allocate(pool: &mut BlockPool, model: &mut Blocks, held: &mut Vec<BlockId>, n: usize, near: u32) {
    let generations: Vec<_> = (0..NUM_BLOCKS)
        .map(|b| pool.generation(BlockId(b as u32)).unwrap())
        .collect();
    let mut blocks = vec![BlockId(1000)];
    let free = model.available();
    let result = all_or_nothing(pool, |pool| {
        pool.allocate_near(n, BlockId(near), &mut NoCache, &mut blocks)
    });
    if n > free {
        assert_eq!(
            result,
            Err(Error::OutOfBlocks {
                needed: n as u64,
                free: free as u64
            })
        );
        assert_eq!(blocks, [BlockId(1000)]);
        return;
    }
    result.unwrap();
    let blocks = &blocks[1..];
    assert_eq!(blocks.len(), n);
    if n > 0 && near > 0 && near + 1 < NUM_BLOCKS as u32 && model.state(near as usize + 1) == BlockState::Free {
        assert_eq!(blocks[0], BlockId(near + 1));
    }
    model.allocated(blocks, pool);
    for block in blocks {
        assert_eq!(pool.generation(*block).unwrap(), generations[block.index()] + 1);
    }
    held.extend(blocks);
}

/// What a release or retain of these blocks has to say.
fn refuse(model: &Blocks, blocks: &[BlockId], counts: bool) -> Result<(), Error> {
    for (index, &block) in blocks.iter().enumerate() {
        let before = blocks[..index].iter().filter(|&&it| it == block).count() as u32;
        let problem = match block.index() {
            0 => BlockProblem::Null,
            index if index >= NUM_BLOCKS => BlockProblem::OutOfRange,
            index if model.refs[index] == 0 || counts && model.refs[index] <= before => BlockProblem::NotHeld,
            _ => continue,
        };
        return Err(Error::Block {
            block,
            num_blocks: NUM_BLOCKS as u32,
            problem,
        });
    }
    Ok(())
}

#[test]
fn the_pool_keeps_its_promises() {
    naive::run(0.4, operation(), property);
}
