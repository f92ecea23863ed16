//! Tests of level 2: what each call means, one situation at a time.

mod copies;
mod exhaustion;
mod input;
mod prefixes;

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
