//! Steps over a memory of tags: what is written when a step runs, and what it has to read.

use super::*;

pub type Slot = (BlockId, usize);

/// A step in flight: what it will do to the memory.
#[derive(Clone, Debug)]
pub struct Flight {
    pub step: u64,
    pub zero: Vec<BlockId>,
    pub copies: Vec<(BlockId, BlockId)>,
    pub writes: Vec<(Slot, Tag)>,
    pub reads: Vec<(Slot, Tag)>,
    /// Sequence, its epoch, and how far it will be computed.
    pub commits: Vec<(SeqHandle, u64, usize)>,
}

impl World {
    pub fn schedule(&mut self, rows: &[(usize, usize, usize)]) {
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
    pub fn complete(&mut self) {
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
}
