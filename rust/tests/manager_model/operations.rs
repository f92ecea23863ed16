//! The operations: how they are drawn, and what each of them is on both sides.

use super::*;

#[derive(Clone, Debug)]
pub enum Op {
    Add {
        namespace: usize,
        content: u32,
        tokens: Vec<u32>,
    },
    Append(usize, Vec<u32>),
    /// Without a step: twice the same must be the same.
    Allocate(usize, usize, usize),
    /// One step: for each sequence picked, how many tokens, and lookahead.
    Schedule(Vec<(usize, usize, usize)>),
    Complete,
    /// A commit that is not due.
    CommitRaw(usize, usize),
    Truncate(usize, usize),
    Fork(usize, usize),
    Preempt(usize),
    Resume(usize),
    Free(usize),
    /// Somebody else holds a block of a table.
    Retain(usize, usize),
    Unretain(usize),
    Evict(usize),
    Reset,
    Purge(usize),
    Probe {
        namespace: usize,
        content: u32,
        tokens: Vec<u32>,
    },
}

pub fn operation() -> impl Strategy<Value = Op> {
    let pick = || 0_usize..1000;
    let tokens = |most| proptest::collection::vec(0_u32..2, 1..most);
    let prompt = move || (0..NAMESPACES, 0_u32..4, tokens(16));
    let row = (pick(), 0_usize..9, 0_usize..4);
    prop_oneof![
        6 => prompt().prop_map(|(namespace, content, tokens)| Op::Add { namespace, content, tokens }),
        4 => (pick(), tokens(5)).prop_map(|(pick, tokens)| Op::Append(pick, tokens)),
        2 => (pick(), 0_usize..10, 0_usize..4).prop_map(|(pick, new, ahead)| Op::Allocate(pick, new, ahead)),
        12 => proptest::collection::vec(row, 1..5).prop_map(Op::Schedule),
        12 => Just(Op::Complete),
        1 => (pick(), 0_usize..30).prop_map(|(pick, n)| Op::CommitRaw(pick, n)),
        2 => (pick(), 0_usize..20).prop_map(|(pick, n)| Op::Truncate(pick, n)),
        3 => (pick(), 0_usize..4).prop_map(|(pick, n)| Op::Fork(pick, n)),
        2 => pick().prop_map(Op::Preempt),
        2 => pick().prop_map(Op::Resume),
        5 => pick().prop_map(Op::Free),
        1 => (pick(), pick()).prop_map(|(pick, index)| Op::Retain(pick, index)),
        1 => pick().prop_map(Op::Unretain),
        1 => (0_usize..4).prop_map(Op::Evict),
        1 => (0_usize..40).prop_map(|n| match n { 0 => Op::Reset, n @ 1..=NAMESPACES => Op::Purge(n - 1), n => Op::Evict(n % 3) }),
        1 => prompt().prop_map(|(namespace, content, tokens)| Op::Probe { namespace, content, tokens }),
    ]
}

impl World {
    pub fn apply(&mut self, operation: &Op) {
        match operation {
            Op::Add {
                namespace,
                content,
                tokens,
            } => self.add(*namespace, *content, tokens),
            Op::Append(pick, tokens) => {
                let Some(index) = self.pick(*pick) else { return };
                let seq = &mut self.seqs[index];
                let bad: Vec<_> = tokens.iter().copied().chain([10]).collect();
                let result = all_or_nothing(&mut self.manager, |manager| manager.append(seq.handle, &bad));
                let position = tokens.len();
                assert_eq!(
                    result,
                    Err(Error::TokenOutOfRange {
                        token: 10,
                        position,
                        vocab_size: 10
                    })
                );
                self.manager.append(seq.handle, tokens).unwrap();
                seq.tokens.extend(tokens);
            }
            Op::Allocate(pick, new, ahead) => {
                let Some(index) = self.pick(*pick) else { return };
                if self.allocate(index, *new, *ahead) {
                    let before = self.manager.clone();
                    assert!(self.allocate(index, *new, *ahead));
                    assert_eq!(self.manager, before, "allocate_slots is idempotent");
                }
            }
            Op::Schedule(rows) => self.schedule(rows),
            Op::Complete => self.complete(),
            Op::CommitRaw(pick, n) => {
                let Some(index) = self.pick(*pick) else { return };
                let seq = &self.seqs[index];
                let (handle, most) = (seq.handle, seq.slots.min(seq.tokens.len()));
                if (seq.computed..=most).contains(n) {
                    return; // it would be true only if it had been computed
                }
                let result = all_or_nothing(&mut self.manager, |manager| manager.commit(handle, *n));
                assert!(matches!(
                    result,
                    Err(Error::InvalidArgument {
                        argument: "num_computed_tokens",
                        ..
                    })
                ));
            }
            Op::Truncate(pick, n) => self.truncate(*pick, *n),
            Op::Fork(pick, n) => self.fork(*pick, *n),
            Op::Preempt(pick) => {
                let Some(index) = self.pick(*pick) else { return };
                let handle = self.seqs[index].handle;
                let result = all_or_nothing(&mut self.manager, |manager| manager.preempt(handle, None));
                assert_eq!(result.is_ok(), !self.seqs[index].preempted);
                let seq = &mut self.seqs[index];
                (seq.preempted, seq.computed, seq.slots, seq.committed, seq.scheduled) = (true, 0, 0, 0, 0);
                seq.last = None;
                seq.epoch += 1;
                std::mem::take(&mut seq.table)
                    .into_iter()
                    .for_each(|block| self.release(block));
            }
            Op::Resume(pick) => {
                let Some(index) = self.pick(*pick) else { return };
                let handle = self.seqs[index].handle;
                let result = all_or_nothing(&mut self.manager, |manager| manager.resume(handle));
                if !self.seqs[index].preempted {
                    assert!(matches!(result, Err(Error::InvalidArgument { argument: "seq", .. })));
                    return;
                }
                let (namespace, identity) = (self.seqs[index].namespace, self.seqs[index].identity());
                let table = self.hit(namespace, &identity);
                let computed = table.len() * SIZE;
                assert_eq!(result, Ok(computed));
                let (era, last) = (self.era(namespace), self.last(&table));
                let seq = &mut self.seqs[index];
                seq.last = last;
                (seq.committed, seq.computed, seq.slots) = (table.len(), computed, computed);
                (seq.table, seq.era, seq.preempted) = (table, era, false);
            }
            Op::Free(pick) => {
                let Some(index) = self.pick(*pick) else { return };
                let seq = self.seqs.swap_remove(index);
                self.manager.free(seq.handle, None).unwrap();
                seq.table.into_iter().for_each(|block| self.release(block));
                self.gone.push(seq.handle);
            }
            Op::Retain(pick, index) => {
                let Some(seq) = self.pick(*pick) else { return };
                let table = &self.seqs[seq].table;
                let Some(&block) = table.get(index % table.len().max(1)) else {
                    return;
                };
                self.manager.parts_mut().0.retain(&[block]).unwrap();
                self.model.refs[block.index()] += 1;
                self.others.push(block);
            }
            Op::Unretain(pick) => {
                if !self.others.is_empty() {
                    let block = self.others.swap_remove(pick % self.others.len());
                    // A pair into a block that only others hold is not cancelled; they do not read it here.
                    if self.model.refs[block.index()] == 1 && self.copies.iter().any(|(_, dst)| *dst == block) {
                        return self.others.push(block);
                    }
                    let (pool, cache) = self.manager.parts_mut();
                    pool.release(&[block], None, cache).unwrap();
                    self.model.release(block, self.model.begun);
                }
            }
            Op::Evict(n) => {
                let expected = self.model.evictable().min(*n);
                let (pool, cache) = self.manager.parts_mut();
                assert_eq!(cache.evict(pool, *n), expected);
                let pool = self.manager.pool();
                let cached = |block: &usize| self.model.state(*block) == BlockState::Cached;
                let gone = |block: &usize| pool.state(BlockId(*block as u32)) != Ok(BlockState::Cached);
                let gone: Vec<_> = (1..NUM_BLOCKS).filter(cached).filter(gone).collect();
                self.model.evicted(&gone, expected);
            }
            Op::Reset => {
                let (pool, cache) = self.manager.parts_mut();
                cache.reset(pool);
                self.model.published.fill(None);
                self.resets += 1;
            }
            Op::Purge(namespace) => {
                let (pool, cache) = self.manager.parts_mut();
                let handle = cache.namespace(key(*namespace));
                cache.drop_namespace(pool, handle, true).unwrap();
                for place in &mut self.model.published {
                    if place.as_ref().is_some_and(|(it, _)| it == namespace) {
                        *place = None;
                    }
                }
                self.purges[*namespace] += 1;
                // A namespace that nobody holds has vanished: the next one starts afresh.
                let held = self.seqs.iter().any(|seq| seq.namespace == *namespace);
                assert!(held || self.model.published.iter().flatten().all(|(it, _)| it != namespace));
            }
            Op::Probe {
                namespace,
                content,
                tokens,
            } => {
                let identity = identity(tokens, *content, CONTENT.end);
                let run = self.model.longest(*namespace, &identity[..tokens.len() - 1], SIZE);
                let found = self.manager.probe(tokens, &key(*namespace), &content_keys(*content));
                assert_eq!(found, if self.caching { run.len() * SIZE } else { 0 });
            }
        }
    }
}
