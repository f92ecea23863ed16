//! The manager and the model side by side.

use super::*;

pub struct World {
    pub caching: bool,
    pub merging: bool,
    pub manager: KVCacheManager,
    pub model: Blocks,
    pub seqs: Vec<Seq>,
    pub gone: Vec<SeqHandle>,
    pub copies: BTreeSet<(BlockId, BlockId)>,
    pub flights: VecDeque<Flight>,
    pub memory: Vec<[Option<Tag>; SIZE]>,
    pub others: Vec<BlockId>,
    pub resets: u64,
    pub purges: [u64; NAMESPACES],
}

impl World {
    pub fn new(caching: bool, merging: bool) -> Self {
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

    pub fn pick(&self, pick: usize) -> Option<usize> {
        (!self.seqs.is_empty()).then(|| pick % self.seqs.len())
    }

    /// One reference less, after the newest step; a copy into a block that nobody holds is not made.
    pub fn release(&mut self, block: BlockId) {
        self.model.release(block, self.model.begun);
        if self.model.refs[block.index()] == 0
            && let Some(pair) = self.copies.iter().copied().find(|(_, dst)| *dst == block)
        {
            self.copies.remove(&pair);
            self.release(pair.0);
        }
    }

    /// The last block of a hit, and since when it is published.
    pub fn last(&self, table: &[BlockId]) -> Option<(usize, u64)> {
        table
            .last()
            .map(|block| (block.index(), self.model.published_since[block.index()]))
    }

    pub fn era(&self, namespace: usize) -> (u64, u64) {
        (self.resets, self.purges[namespace])
    }

    /// The blocks of the prefix that a sequence takes, with a reference each.
    pub fn hit(&mut self, namespace: usize, identity: &[u32]) -> Vec<BlockId> {
        if !self.caching {
            return Vec::new();
        }
        let found = self.model.longest(namespace, &identity[..identity.len() - 1], SIZE);
        found.iter().for_each(|&block| self.model.refs[block] += 1);
        found.into_iter().map(|block| BlockId(block as u32)).collect()
    }

    pub fn add(&mut self, namespace: usize, content: u32, tokens: &[u32]) {
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
    pub fn is_private(&self, block: BlockId) -> bool {
        let pairs = self.copies.iter().filter(|(src, _)| *src == block).count() as u32;
        self.model.published[block.index()].is_none() && self.model.refs[block.index()] - pairs == 1
    }

    /// `allocate_slots` on both sides. False if there were not enough blocks, or the sequence is preempted.
    pub fn allocate(&mut self, index: usize, new: usize, ahead: usize) -> bool {
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

    pub fn commit(&mut self, index: usize, n: usize) {
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

    pub fn truncate(&mut self, pick: usize, n: usize) {
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

    pub fn fork(&mut self, pick: usize, n: usize) {
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

    pub fn compare(&mut self) {
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
    pub fn drain(mut self) {
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
