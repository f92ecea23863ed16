//! Those who use a scheduler's manager beside it: sequences of their own, forks, blocks of no sequence at all, resets.
//!
//! They keep to the rules that the documentation has for them, and to nothing else: what they write is written after
//! the plan that tells their zeroings and copies was run, and committed when its step was updated.

use pagedcore::{BlockId, ContentKeys, Error, KVCacheManager, NamespaceKey, Scheduler, SeqHandle};

use crate::sim::{Rng, Server};

/// A sequence of somebody else's.
struct Foreign {
    seq: SeqHandle,
    namespace: u64,
    tokens: Vec<u32>,
    /// Steps that had been planned when it last asked for slots.
    since: u64,
}

/// Everybody else.
#[derive(Default)]
pub struct Others {
    foreign: Vec<Foreign>,
    /// Blocks taken from the pool, full of what must stay there.
    taken: Vec<BlockId>,
    /// References to blocks of foreign sequences.
    retained: Vec<BlockId>,
    /// Steps planned.
    planned: u64,
    /// Of these, those up to the last one updated: what they told is done.
    done: u64,
}

pub fn key(namespace: u64) -> NamespaceKey {
    NamespaceKey {
        tenant: namespace.to_string().into(),
        ..NamespaceKey::default()
    }
}

impl Others {
    /// Do they hold blocks that a request may need?
    pub fn hold_blocks(&self) -> bool {
        !(self.foreign.is_empty() && self.taken.is_empty() && self.retained.is_empty())
    }

    pub fn step_was_planned(&mut self) {
        self.planned += 1;
    }

    /// Does something.
    pub fn act(&mut self, rng: &mut Rng, scheduler: &mut Scheduler, server: &mut Server, prompts: &[Vec<u32>]) {
        let manager = scheduler.manager_mut();
        match rng.below(12) {
            0 | 1 => {
                let namespace = rng.below(3) as u64;
                let mut tokens = rng.pick(prompts).clone();
                tokens.push(0);
                self.add(manager, namespace, tokens);
            }
            2 => self.fork(rng, manager),
            3 => self.append(rng, manager),
            4 => {
                if let Some(foreign) = self.any(rng) {
                    let foreign = self.foreign.swap_remove(foreign);
                    let after = fence(rng, manager);
                    manager.free(foreign.seq, after).unwrap();
                }
            }
            5 => self.preempt_or_resume(rng, manager),
            6 => self.truncate(rng, manager),
            7 => self.take(rng, manager, server),
            8 => self.give_back(rng, manager, server),
            9 => self.retain_or_release(rng, manager),
            10 => forget(rng, manager),
            _ => self.give_back_behind_its_back(rng, manager, server),
        }
    }

    fn any(&self, rng: &mut Rng) -> Option<usize> {
        (!self.foreign.is_empty()).then(|| rng.below(self.foreign.len()))
    }

    fn add(&mut self, manager: &mut KVCacheManager, namespace: u64, tokens: Vec<u32>) {
        let seq = manager.add(&tokens, key(namespace), ContentKeys::default()).unwrap();
        self.foreign.push(Foreign {
            seq,
            namespace,
            tokens,
            since: 0,
        });
        self.ask(self.foreign.len() - 1, manager);
    }

    /// Asks for the slots of all tokens that are not computed; there may be none to be had.
    fn ask(&mut self, which: usize, manager: &mut KVCacheManager) -> bool {
        let foreign = &mut self.foreign[which];
        foreign.since = self.planned;
        let new = foreign.tokens.len() - manager.num_computed_tokens(foreign.seq).unwrap();
        match manager.allocate_slots(foreign.seq, new, 0) {
            Ok(_) => true,
            Err(Error::OutOfBlocks { .. } | Error::InvalidArgument { argument: "seq", .. }) => false,
            Err(error) => panic!("{error}"),
        }
    }

    fn fork(&mut self, rng: &mut Rng, manager: &mut KVCacheManager) {
        let Some(parent) = self.any(rng) else { return };
        let parent = &self.foreign[parent];
        let seq = manager.fork(parent.seq, 1).unwrap()[0];
        let mut tokens = parent.tokens.clone();
        tokens.push(1);
        manager.append(seq, &[1]).unwrap();
        self.foreign.push(Foreign {
            seq,
            namespace: parent.namespace,
            tokens,
            since: 0,
        });
        self.ask(self.foreign.len() - 1, manager);
    }

    fn append(&mut self, rng: &mut Rng, manager: &mut KVCacheManager) {
        let Some(which) = self.any(rng) else { return };
        let foreign = &mut self.foreign[which];
        if foreign.tokens.len() < 40 {
            foreign.tokens.push(1);
            manager.append(foreign.seq, &[1]).unwrap();
            self.ask(which, manager);
        }
    }

    fn preempt_or_resume(&mut self, rng: &mut Rng, manager: &mut KVCacheManager) {
        let Some(which) = self.any(rng) else { return };
        let seq = self.foreign[which].seq;
        if manager.is_preempted(seq).unwrap() {
            manager.resume(seq).unwrap();
            self.ask(which, manager);
        } else {
            let after = fence(rng, manager);
            manager.preempt(seq, after).unwrap();
        }
    }

    fn truncate(&mut self, rng: &mut Rng, manager: &mut KVCacheManager) {
        let Some(which) = self.any(rng) else { return };
        let foreign = &mut self.foreign[which];
        let len = rng.between(1, foreign.tokens.len());
        let after = fence(rng, manager);
        manager.truncate(foreign.seq, len, after).unwrap();
        foreign.tokens.truncate(len);
        self.ask(which, manager);
    }

    fn take(&mut self, rng: &mut Rng, manager: &mut KVCacheManager, server: &mut Server) {
        let (pool, cache) = manager.parts_mut();
        if let Ok(blocks) = pool.allocate(rng.between(1, 3), cache) {
            blocks.iter().for_each(|&block| server.fill(block.index(), true));
            self.taken.extend(blocks);
        }
    }

    fn give_back(&mut self, rng: &mut Rng, manager: &mut KVCacheManager, server: &mut Server) {
        if !self.taken.is_empty() {
            let block = self.taken.swap_remove(rng.below(self.taken.len()));
            server.check_filled(block.index());
            server.fill(block.index(), false);
            let (pool, cache) = manager.parts_mut();
            pool.release(&[block], None, cache).unwrap();
        }
    }

    fn retain_or_release(&mut self, rng: &mut Rng, manager: &mut KVCacheManager) {
        if rng.one_in(2) {
            let Some(which) = self.any(rng) else { return };
            let table = manager.table(self.foreign[which].seq).unwrap();
            let Some(&block) = table.last() else { return };
            manager.parts_mut().0.retain(&[block]).unwrap();
            self.retained.push(block);
        } else if let Some(block) = self.retained.pop() {
            let (pool, cache) = manager.parts_mut();
            pool.release(&[block], None, cache).unwrap();
        }
    }

    /// The last block of a sequence changes hands without the manager's knowing.
    fn give_back_behind_its_back(&mut self, rng: &mut Rng, manager: &mut KVCacheManager, server: &mut Server) {
        let Some(which) = self.any(rng) else { return };
        let foreign = self.foreign.swap_remove(which);
        let last = manager.table(foreign.seq).unwrap().last().copied();
        if let Some(block) = last {
            manager.parts_mut().0.retain(&[block]).unwrap();
        }
        manager.free(foreign.seq, None).unwrap();
        if let Some(block) = last {
            let (pool, cache) = manager.parts_mut();
            pool.release(&[block], None, cache).unwrap();
        }
        self.take(rng, manager, server);
    }

    /// A step was updated: what its plan told is done, so those that waited for it compute.
    pub fn step_was_updated(&mut self, manager: &mut KVCacheManager, server: &mut Server) {
        self.done = self.planned;
        for which in 0..self.foreign.len() {
            let foreign = &self.foreign[which];
            let (seq, len) = (foreign.seq, foreign.tokens.len());
            if foreign.since >= self.done || manager.is_preempted(seq).unwrap() {
                continue;
            }
            let computed = manager.num_computed_tokens(seq).unwrap();
            if computed == len {
                continue;
            }
            if manager.blocks_needed(seq, len - computed, 0).unwrap() > 0 || manager.num_slots(seq).unwrap() < len {
                // Shared since, or there were no blocks: it waits for the next plan.
                self.ask(which, manager);
                continue;
            }
            server.write(
                foreign.namespace,
                &foreign.tokens,
                computed,
                manager.table(seq).unwrap(),
            );
            manager.commit(seq, len).unwrap();
        }
        self.check(manager, server);
    }

    /// Everybody has what is theirs, but for those whose copies are still to be made.
    pub fn check(&self, manager: &KVCacheManager, server: &Server) {
        for foreign in self.foreign.iter().filter(|foreign| foreign.since < self.done) {
            let computed = manager.num_computed_tokens(foreign.seq).unwrap();
            let table = manager.table(foreign.seq).unwrap();
            server.check_written(foreign.namespace, &foreign.tokens[..computed], table);
        }
        self.taken.iter().for_each(|block| server.check_filled(block.index()));
    }

    /// Gives all back.
    pub fn leave(&mut self, rng: &mut Rng, manager: &mut KVCacheManager, server: &mut Server) {
        for foreign in self.foreign.drain(..) {
            manager.free(foreign.seq, None).unwrap();
        }
        while !self.taken.is_empty() {
            self.give_back(rng, manager, server);
        }
        let (pool, cache) = manager.parts_mut();
        pool.release(&self.retained, None, cache).unwrap();
        self.retained.clear();
    }
}

/// The last step that may read what a foreign sequence gives back. None does, so whatever has begun will do.
fn fence(rng: &mut Rng, manager: &KVCacheManager) -> Option<u64> {
    match rng.below(3) {
        0 => None,
        1 => Some(0),
        _ => Some(manager.pool().completed_through()),
    }
}

/// The cache loses some of what it knows.
fn forget(rng: &mut Rng, manager: &mut KVCacheManager) {
    let (pool, cache) = manager.parts_mut();
    match rng.below(3) {
        0 => {
            cache.reset(pool);
        }
        1 => {
            let handle = cache.namespace(key(rng.below(3) as u64));
            cache.drop_namespace(pool, handle, true).unwrap();
        }
        _ => {
            cache.evict(pool, rng.below(5));
        }
    }
}
