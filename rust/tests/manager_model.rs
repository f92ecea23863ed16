//! Level 2 against the naive model, and against a memory of tags.
//!
//! The model says what each call does to tables, references and published blocks. The memory is the other oracle:
//! each slot holds a tag made from the tenant, the namespace and all tokens up to the slot's own, steps run as late as
//! their fences allow, and each step reads every position below its own through the table it was given. A stale,
//! foreign, uncomputed, overwritten or wrongly shared slot is a wrong tag.

mod naive;

use std::collections::{BTreeSet, VecDeque};

use naive::{Blocks, all_or_nothing};
use pagedcore::{
    BlockId, BlockState, ContentKey, ContentKeys, Error, KVCacheManager, ManagerConfig, NamespaceKey, SeqHandle,
};
use proptest::prelude::*;

const NUM_BLOCKS: usize = 24;
const SIZE: usize = 3;
const NAMESPACES: usize = 3;
/// Where a sequence that has content has it.
const CONTENT: std::ops::Range<usize> = 2..8;
const MAX_SEQUENCES: usize = 8;
const MAX_FLIGHTS: usize = 3;

#[derive(Clone, Debug)]
enum Op {
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

fn operation() -> impl Strategy<Value = Op> {
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

/// A sequence as the model sees it.
#[derive(Clone, Debug)]
struct Seq {
    handle: SeqHandle,
    namespace: usize,
    tokens: Vec<u32>,
    /// What is content, and where it ends.
    content: u32,
    content_stop: usize,
    table: Vec<BlockId>,
    computed: usize,
    slots: usize,
    committed: usize,
    /// The block that publishes the last of them, and since when: without merging it can be another sequence's.
    last: Option<(usize, u64)>,
    /// Resets and purges at the time its blocks were computed.
    era: (u64, u64),
    preempted: bool,
    /// Positions after the computed ones that steps in flight compute.
    scheduled: usize,
    /// Changes when what is in flight does not count any more.
    epoch: u64,
}

impl Seq {
    /// Tokens with the content at their place: what makes two prefixes equal.
    fn identity(&self) -> Vec<u32> {
        identity(&self.tokens, self.content, self.content_stop)
    }

    fn tag(&self, position: usize) -> Tag {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64 ^ self.namespace as u64;
        for token in &self.identity()[..=position] {
            hash = (hash ^ u64::from(*token)).wrapping_mul(0x0100_0000_01b3).rotate_left(5);
        }
        Tag {
            tenant: tenant(self.namespace),
            hash,
        }
    }
}

fn identity(tokens: &[u32], content: u32, stop: usize) -> Vec<u32> {
    let inside = |position: usize| content > 0 && position >= CONTENT.start && position < stop;
    tokens
        .iter()
        .enumerate()
        .map(|(i, token)| token + if inside(i) { 1000 * content } else { 0 })
        .collect()
}

fn content_keys(content: u32) -> ContentKeys {
    let (start, stop) = (CONTENT.start as i64, CONTENT.end as i64);
    let key = ContentKey {
        start,
        stop,
        key: content.to_le_bytes().into(),
    };
    ContentKeys::new(if content == 0 { vec![] } else { vec![key] }).unwrap()
}

fn tenant(namespace: usize) -> usize {
    namespace.min(1)
}

fn key(namespace: usize) -> NamespaceKey {
    let tenant = if tenant(namespace) == 0 { "a" } else { "b" };
    let cache_salt = if namespace == 2 { "salt" } else { "" };
    NamespaceKey {
        tenant: tenant.into(),
        cache_salt: cache_salt.into(),
        extra_keys: [].into(),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tag {
    tenant: usize,
    hash: u64,
}

type Slot = (BlockId, usize);

/// A step in flight: what it will do to the memory.
#[derive(Clone, Debug)]
struct Flight {
    step: u64,
    zero: Vec<BlockId>,
    copies: Vec<(BlockId, BlockId)>,
    writes: Vec<(Slot, Tag)>,
    reads: Vec<(Slot, Tag)>,
    /// Sequence, its epoch, and how far it will be computed.
    commits: Vec<(SeqHandle, u64, usize)>,
}

struct World {
    caching: bool,
    merging: bool,
    manager: KVCacheManager,
    model: Blocks,
    seqs: Vec<Seq>,
    gone: Vec<SeqHandle>,
    copies: BTreeSet<(BlockId, BlockId)>,
    flights: VecDeque<Flight>,
    memory: Vec<[Option<Tag>; SIZE]>,
    others: Vec<BlockId>,
    resets: u64,
    purges: [u64; NAMESPACES],
}

impl World {
    fn new(caching: bool, merging: bool) -> Self {
        let config = ManagerConfig {
            enable_prefix_caching: caching,
            merge_blocks: merging,
            vocab_size: Some(10),
            ..ManagerConfig::new(NUM_BLOCKS, SIZE)
        };
        Self {
            caching,
            merging,
            manager: KVCacheManager::new(&config).unwrap(),
            model: Blocks::new(NUM_BLOCKS),
            seqs: Vec::new(),
            gone: Vec::new(),
            copies: BTreeSet::new(),
            flights: VecDeque::new(),
            memory: vec![[None; SIZE]; NUM_BLOCKS],
            others: Vec::new(),
            resets: 0,
            purges: [0; NAMESPACES],
        }
    }

    fn pick(&self, pick: usize) -> Option<usize> {
        (!self.seqs.is_empty()).then(|| pick % self.seqs.len())
    }

    /// One reference less, after the newest step; a copy into a block that nobody holds is not made.
    fn release(&mut self, block: BlockId) {
        self.model.release(block, self.model.begun);
        if self.model.refs[block.index()] == 0
            && let Some(pair) = self.copies.iter().copied().find(|(_, dst)| *dst == block)
        {
            self.copies.remove(&pair);
            self.release(pair.0);
        }
    }

    /// The last block of a hit, and since when it is published.
    fn last(&self, table: &[BlockId]) -> Option<(usize, u64)> {
        table
            .last()
            .map(|block| (block.index(), self.model.published_since[block.index()]))
    }

    fn era(&self, namespace: usize) -> (u64, u64) {
        (self.resets, self.purges[namespace])
    }

    /// The blocks of the prefix that a sequence takes, with a reference each.
    fn hit(&mut self, namespace: usize, identity: &[u32]) -> Vec<BlockId> {
        if !self.caching {
            return Vec::new();
        }
        let found = self.model.longest(namespace, &identity[..identity.len() - 1], SIZE);
        found.iter().for_each(|&block| self.model.refs[block] += 1);
        found.into_iter().map(|block| BlockId(block as u32)).collect()
    }

    fn apply(&mut self, operation: &Op) {
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

    fn add(&mut self, namespace: usize, content: u32, tokens: &[u32]) {
        if self.seqs.len() == MAX_SEQUENCES {
            return;
        }
        let identity = identity(tokens, content, CONTENT.end);
        let table = self.hit(namespace, &identity);
        let handle = self.manager.add(tokens, key(namespace), content_keys(content)).unwrap();
        let computed = table.len() * SIZE;
        self.seqs.push(Seq {
            handle,
            namespace,
            tokens: tokens.to_vec(),
            content,
            content_stop: CONTENT.end,
            committed: table.len(),
            last: self.last(&table),
            table,
            computed,
            slots: computed,
            era: self.era(namespace),
            preempted: false,
            scheduled: 0,
            epoch: 0,
        });
    }

    /// Is the block its holder's alone? Pairs that still have to be copied do not count.
    fn is_private(&self, block: BlockId) -> bool {
        let pairs = self.copies.iter().filter(|(src, _)| *src == block).count() as u32;
        self.model.published[block.index()].is_none() && self.model.refs[block.index()] - pairs == 1
    }

    /// `allocate_slots` on both sides. False if there were not enough blocks, or the sequence is preempted.
    fn allocate(&mut self, index: usize, new: usize, ahead: usize) -> bool {
        self.model.refresh();
        let seq = self.seqs[index].clone();
        let (length, end) = (seq.table.len(), seq.computed + new + ahead);
        let last = if end == seq.computed { 0 } else { end.div_ceil(SIZE) };
        let inside = seq.computed / SIZE..last.min(length);
        let replaced: Vec<_> = inside.filter(|&entry| !self.is_private(seq.table[entry])).collect();
        let needed = replaced.len() + last.saturating_sub(length);
        let free = self.model.available();
        let counted = self.manager.blocks_needed(seq.handle, new, ahead);
        let result = all_or_nothing(&mut self.manager, |manager| {
            manager.allocate_slots(seq.handle, new, ahead)
        });
        if seq.preempted {
            assert!(matches!(result, Err(Error::InvalidArgument { argument: "seq", .. })));
            return false;
        }
        assert_eq!(counted, Ok(needed));
        if needed > free {
            assert_eq!(
                result,
                Err(Error::OutOfBlocks {
                    needed: needed as u64,
                    free: free as u64
                })
            );
            return false;
        }
        assert_eq!(result, Ok(replaced.first().copied().unwrap_or(length)));
        let table = self.manager.table(seq.handle).unwrap().to_vec();
        assert_eq!(table.len(), length.max(last));
        let changed = |entry: &usize| seq.table.get(*entry) != Some(&table[*entry]);
        let expected: Vec<_> = replaced.iter().copied().chain(length..last).collect();
        assert_eq!((0..table.len()).filter(changed).collect::<Vec<_>>(), expected);
        let fresh: Vec<_> = expected.iter().map(|&entry| table[entry]).collect();
        self.model.allocated(&fresh, self.manager.pool());
        for entry in replaced {
            let (old, new) = (seq.table[entry], table[entry]);
            let first = self.copies.iter().find(|(_, dst)| *dst == old).map(|(src, _)| *src);
            if let Some(src) = first {
                self.model.refs[src.index()] += 1;
                self.copies.insert((src, new));
                self.release(old);
            } else {
                self.copies.insert((old, new));
            }
        }
        let seq = &mut self.seqs[index];
        (seq.table, seq.slots) = (table, seq.slots.max(end));
        true
    }

    fn schedule(&mut self, rows: &[(usize, usize, usize)]) {
        if self.flights.len() == MAX_FLIGHTS {
            return self.complete();
        }
        let (pool, _) = self.manager.parts_mut();
        let step = pool.begin_step();
        self.model.begun = step;
        let mut flight = Flight {
            step,
            zero: vec![],
            copies: vec![],
            writes: vec![],
            reads: vec![],
            commits: vec![],
        };
        for &(pick, wanted, ahead) in rows {
            let Some(index) = self.pick(pick) else { continue };
            let seq = &self.seqs[index];
            let start = seq.computed + seq.scheduled;
            let count = wanted.min(seq.tokens.len() - start.min(seq.tokens.len()));
            let again = flight.commits.iter().any(|(handle, ..)| *handle == seq.handle);
            if count == 0 || again || !self.allocate(index, self.seqs[index].scheduled + count, ahead) {
                continue;
            }
            let seq = &mut self.seqs[index];
            seq.scheduled += count;
            flight.commits.push((seq.handle, seq.epoch, start + count));
            let mut slots = vec![0; start + count];
            self.manager
                .slot_mapping(seq.handle, 0, start + count, 0, &mut slots)
                .unwrap();
            for (position, slot) in slots.into_iter().enumerate() {
                let slot = (BlockId((slot / SIZE as i64) as u32), (slot % SIZE as i64) as usize);
                assert_eq!(slot.0, seq.table[position / SIZE]);
                flight.reads.push((slot, seq.tag(position)));
                if position >= start {
                    flight.writes.push((slot, seq.tag(position)));
                }
            }
        }
        flight.zero = self.manager.take_blocks_to_zero();
        flight.copies = self.manager.take_block_copies(0).unwrap();
        let taken: BTreeSet<_> = flight.copies.iter().copied().collect();
        assert_eq!((taken.len(), &taken), (flight.copies.len(), &self.copies));
        assert!(
            taken.iter().all(|(src, _)| taken.iter().all(|(_, dst)| src != dst)),
            "{taken:?}"
        );
        std::mem::take(&mut self.copies)
            .into_iter()
            .for_each(|(src, _)| self.release(src));
        let written: BTreeSet<_> = flight.writes.iter().map(|(slot, _)| slot).collect();
        assert_eq!(written.len(), flight.writes.len(), "a slot is written once in a step");
        self.flights.push_back(flight);
    }

    /// Runs the oldest step, as late as can be, and commits what it computed.
    fn complete(&mut self) {
        let Some(flight) = self.flights.pop_front() else { return };
        flight
            .zero
            .iter()
            .for_each(|block| self.memory[block.index()] = [None; SIZE]);
        flight
            .copies
            .iter()
            .for_each(|(src, dst)| self.memory[dst.index()] = self.memory[src.index()]);
        for &((block, offset), tag) in &flight.writes {
            let slots = &mut self.memory[block.index()];
            assert!(
                slots.iter().flatten().all(|it| it.tenant == tag.tenant),
                "{block} holds another tenant's data"
            );
            slots[offset] = Some(tag);
        }
        for &((block, offset), tag) in &flight.reads {
            assert_eq!(
                self.memory[block.index()][offset],
                Some(tag),
                "slot {offset} of block {block}"
            );
        }
        let (pool, cache) = self.manager.parts_mut();
        pool.complete_step(flight.step, cache).unwrap();
        self.model.completed.insert(flight.step);
        for (handle, epoch, n) in flight.commits {
            let Some(index) = self
                .seqs
                .iter()
                .position(|seq| seq.handle == handle && seq.epoch == epoch)
            else {
                continue;
            };
            self.seqs[index].scheduled -= n - self.seqs[index].computed;
            self.commit(index, n);
        }
    }

    fn commit(&mut self, index: usize, n: usize) {
        let seq = self.seqs[index].clone();
        let identity = seq.identity();
        // What is still to be copied into is not published yet.
        let waiting = |block: &&BlockId| self.copies.iter().any(|(_, dst)| dst == *block);
        let ready = seq
            .table
            .iter()
            .skip(seq.committed)
            .take_while(|block| !waiting(block))
            .count();
        let (mut table, full) = (seq.table.clone(), (n / SIZE).min(seq.committed + ready));
        if self.caching && full > seq.committed && seq.era == self.era(seq.namespace) {
            for entry in 0..full {
                let prefix = &identity[..(entry + 1) * SIZE];
                match self.model.find(seq.namespace, prefix) {
                    Some(found) if found == table[entry].index() => {}
                    Some(found) if self.merging => {
                        self.model.refs[found] += 1;
                        self.release(table[entry]);
                        table[entry] = BlockId(found as u32);
                    }
                    Some(_) => {}
                    None => self
                        .model
                        .publish(table[entry].index(), (seq.namespace, prefix.to_vec())),
                }
            }
            let last = self.model.find(seq.namespace, &identity[..full * SIZE]).unwrap();
            self.seqs[index].last = Some((last, self.model.published_since[last]));
            self.seqs[index].committed = full;
        }
        let first = (0..table.len())
            .find(|&entry| table[entry] != seq.table[entry])
            .unwrap_or(table.len());
        assert_eq!(self.manager.commit(seq.handle, n), Ok(first));
        (self.seqs[index].table, self.seqs[index].computed) = (table, n);
    }

    fn truncate(&mut self, pick: usize, n: usize) {
        let Some(index) = self.pick(pick) else { return };
        let handle = self.seqs[index].handle;
        let result = all_or_nothing(&mut self.manager, |manager| manager.truncate(handle, n, None));
        if n == 0 || n > self.seqs[index].tokens.len() {
            assert!(matches!(
                result,
                Err(Error::InvalidArgument {
                    argument: "num_tokens",
                    ..
                })
            ));
            return;
        }
        let seq = &mut self.seqs[index];
        let keep = n.div_ceil(SIZE).min(seq.table.len());
        assert_eq!(result, Ok(keep));
        seq.tokens.truncate(n);
        seq.content_stop = seq.content_stop.min(n);
        (seq.computed, seq.slots) = (seq.computed.min(n), seq.slots.min(n));
        (seq.scheduled, seq.epoch) = (0, seq.epoch + 1);
        let dropped = seq.table.split_off(keep);
        let committed = seq.committed.min(n / SIZE);
        if committed < seq.committed {
            let alive = |&(block, since): &(usize, u64)| {
                self.model.published[block].is_some() && self.model.published_since[block] == since
            };
            let found = seq.last.filter(alive).filter(|_| committed > 0);
            let prefix = &seq.identity()[..committed * SIZE];
            seq.last = found
                .and_then(|_| self.model.find(seq.namespace, prefix))
                .map(|b| (b, self.model.published_since[b]));
            seq.committed = if found.is_some() { committed } else { 0 };
        }
        dropped.into_iter().for_each(|block| self.release(block));
    }

    fn fork(&mut self, pick: usize, n: usize) {
        let Some(index) = self.pick(pick) else { return };
        let parent = self.seqs[index].clone();
        let n = n.min(MAX_SEQUENCES - self.seqs.len());
        let result = all_or_nothing(&mut self.manager, |manager| manager.fork(parent.handle, n));
        if n == 0 {
            assert!(matches!(result, Err(Error::InvalidArgument { argument: "n", .. })));
            return;
        }
        for handle in result.unwrap() {
            let table = parent.table[..parent.computed.div_ceil(SIZE)].to_vec();
            table.iter().for_each(|block| self.model.refs[block.index()] += 1);
            assert_eq!(self.manager.table(handle).unwrap(), table);
            self.seqs.push(Seq {
                handle,
                table,
                slots: parent.computed,
                scheduled: 0,
                epoch: 0,
                ..parent.clone()
            });
        }
    }

    fn compare(&mut self) {
        self.model.compare(self.manager.pool(), None, SIZE);
        self.manager.check().unwrap();
        let stats = self.manager.stats();
        assert_eq!(stats.num_sequences, self.seqs.len());
        if let Some(cache) = stats.cache {
            assert_eq!(cache.num_evictable, self.model.evictable());
            assert_eq!(cache.num_nodes, self.model.published.iter().flatten().count());
        }
        for seq in &self.seqs {
            let manager = &self.manager;
            assert_eq!(manager.table(seq.handle).unwrap(), seq.table);
            assert_eq!(manager.num_computed_tokens(seq.handle).unwrap(), seq.computed);
            assert_eq!(manager.num_slots(seq.handle).unwrap(), seq.slots);
            assert_eq!(manager.num_tokens(seq.handle).unwrap(), seq.tokens.len());
        }
        if let Some(&gone) = self.gone.last() {
            assert!(matches!(self.manager.table(gone), Err(Error::StaleHandle { .. })));
        }
    }

    /// With nothing left, everything can be had again.
    fn drain(mut self) {
        while !self.flights.is_empty() {
            self.complete();
        }
        while !self.seqs.is_empty() {
            self.apply(&Op::Free(0));
        }
        for pair in std::mem::take(&mut self.others) {
            let (pool, cache) = self.manager.parts_mut();
            pool.release(&[pair], None, cache).unwrap();
        }
        // A pair whose destination only others held is dropped with the next step.
        self.manager.take_block_copies(0).unwrap();
        let (pool, cache) = self.manager.parts_mut();
        cache.reset(pool);
        assert_eq!(cache.stats().num_namespaces, 0);
        assert_eq!(pool.num_free(), NUM_BLOCKS - 1, "{:?}", self.manager.stats());
        self.manager.check().unwrap();
    }
}

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
