//! Level 2 against the naive model, and against a memory of tags.
//!
//! The model says what each call does to tables, references and published blocks. The memory is the other oracle:
//! each slot holds a tag made from the tenant, the namespace and all tokens up to the slot's own, steps run as late as
//! their fences allow, and each step reads every position below its own through the table it was given. A stale,
//! foreign, uncomputed, overwritten or wrongly shared slot is a wrong tag.

mod memory;
#[path = "../naive/mod.rs"]
mod naive;
mod operations;
mod sequence;
mod world;

use std::collections::{BTreeSet, VecDeque};

use memory::Flight;
use naive::{Blocks, all_or_nothing};
use operations::{Op, operation};
use pagedcore::{
    BlockId, BlockState, ContentKey, ContentKeys, Error, KVCacheManager, ManagerConfig, NamespaceKey, SeqHandle,
};
use proptest::prelude::*;
use sequence::{Seq, Tag, content_keys, identity, key};
use world::World;

const NUM_BLOCKS: usize = 24;
const SIZE: usize = 3;
const NAMESPACES: usize = 3;
/// Where a sequence that has content has it.
const CONTENT: std::ops::Range<usize> = 2..8;
const MAX_SEQUENCES: usize = 8;
const MAX_FLIGHTS: usize = 3;

fn play(caching: bool, merging: bool, operations: &[Op]) {
    let mut world = World::new(caching, merging);
    for operation in operations {
        world.apply(operation);
        world.compare();
    }
    world.drain();
}

#[test]
fn the_manager_keeps_its_promises() {
    naive::run(0.2, operation(), |operations| play(true, true, operations));
    naive::run(0.05, operation(), |operations| play(true, false, operations));
    naive::run(0.05, operation(), |operations| play(false, true, operations));
}
