//! A server without a model: the tagged-KV oracle.
//!
//! Each slot holds a tag instead of keys and values: a hash of the namespace, the position, the token and the tag of
//! the position before, which is read through the plan's block table as a kernel would. The next token is a hash of
//! all tags of the sequence, read the same way. So a stale, foreign, uncomputed or lost slot changes what is sampled,
//! exactly and at once, and every output can be compared with that of the request run alone, which [`alone`] works
//! out without blocks, steps or a scheduler.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher};

use pagedcore::{PlannedStep, StepPlan};

/// A permutation that mixes all bits.
pub fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A small generator (SplitMix64): the same numbers from the same seed for ever.
pub struct Rng(pub u64);

#[allow(dead_code)] // each file of tests uses some of it
impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % n as u64).unwrap()
    }

    /// A number from `low` to `high`, both included.
    pub fn between(&mut self, low: usize, high: usize) -> usize {
        low + self.below(high - low + 1)
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }
}

fn fold(hash: u64, value: u64) -> u64 {
    mix(hash.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ value)
}

/// What a slot holds for `token` at `position`, after a slot that holds `before`.
fn tag(namespace: u64, position: usize, token: u32, before: u64) -> u64 {
    fold(fold(fold(before, namespace), position as u64), token.into()) | 1
}

/// What the model samples for sequence `index` that has read `tags`.
fn sample(tags: impl Iterator<Item = u64>, index: usize, vocab_size: u32) -> u32 {
    let hash = tags.fold(index as u64, fold);
    u32::try_from(hash % u64::from(vocab_size)).unwrap()
}

/// Positions whose content token ids do not tell, and what it is.
pub type Content = Option<(std::ops::Range<usize>, u64)>;

/// What is computed at a position differs by namespace, and by content.
fn world(namespace: u64, content: &Content, position: usize) -> u64 {
    match content {
        Some((range, what)) if range.contains(&position) => fold(namespace, *what),
        _ => namespace,
    }
}

/// A slot whose content must never be read.
const UNWRITTEN: u64 = 0;

/// What somebody outside all sequences fills blocks with.
const FILLED: u64 = u64::MAX;

/// The tokens that sequence `index` of a request generates when it is alone in the world.
#[allow(dead_code)] // not every file of tests compares outputs
pub fn alone(namespace: u64, prompt: &[u32], index: usize, max_len: usize, stop: &[u32], vocab_size: u32) -> Vec<u32> {
    alone_with(namespace, &None, prompt, index, max_len, stop, vocab_size)
}

/// The same for a prompt with content.
pub fn alone_with(
    namespace: u64,
    content: &Content,
    prompt: &[u32],
    index: usize,
    max_len: usize,
    stop: &[u32],
    vocab_size: u32,
) -> Vec<u32> {
    let mut tags: Vec<u64> = Vec::new();
    let mut output: Vec<u32> = Vec::new();
    let mut tokens = prompt.to_vec();
    loop {
        for (position, &token) in tokens.iter().enumerate().skip(tags.len()) {
            let before = tags.last().copied().unwrap_or(UNWRITTEN);
            tags.push(tag(world(namespace, content, position), position, token, before));
        }
        let token = sample(tags.iter().copied(), index, vocab_size);
        output.push(token);
        tokens.push(token);
        if stop.contains(&token) || tokens.len() == max_len {
            return output;
        }
    }
}

/// What a server knows of a row.
#[derive(Clone, Debug)]
pub struct Tenant {
    pub request: String,
    pub index: usize,
}

/// Memory, tables and rows of the server.
pub struct Server {
    pub rows: Vec<Option<Tenant>>,
    slots: Vec<u64>,
    /// Whose each slot's content is (R6: no block holds two tenants' content).
    namespaces: Vec<Option<u64>>,
    block_size: usize,
    vocab_size: u32,
    /// A table as it would be kept on a device, changed by `table_updates` alone.
    device_table: Vec<HashMap<i32, i32>>,
    /// Of the requests that have some.
    pub contents: HashMap<String, Content>,
    /// Of everything that was planned.
    pub trace: u64,
}

impl Server {
    pub fn new(num_blocks: usize, block_size: usize, max_num_seqs: usize, vocab_size: u32) -> Self {
        Self {
            rows: vec![None; max_num_seqs],
            slots: vec![UNWRITTEN; num_blocks * block_size],
            namespaces: vec![None; num_blocks * block_size],
            block_size,
            vocab_size,
            device_table: vec![HashMap::new(); max_num_seqs],
            contents: HashMap::new(),
            trace: 0,
        }
    }

    /// Runs the step: zeroes, copies, writes, reads, samples. `namespace_of` tells a request's namespace.
    pub fn run(&mut self, planned: &PlannedStep<'_>, namespace_of: impl Fn(&str) -> u64) -> Vec<i32> {
        for started in planned.started() {
            let tenant = Tenant {
                request: started.request_id.to_string(),
                index: started.index as usize,
            };
            self.rows[started.row as usize] = Some(tenant);
            self.device_table[started.row as usize].clear();
        }
        // As another rank would get it.
        let plan = StepPlan::from_buffer(planned.plan().buffer()).expect("a valid plan");
        self.trace_plan(&plan);
        self.move_blocks(&plan);
        for update in plan.table_updates().chunks_exact(3) {
            self.device_table[index(update[0])].insert(update[1], update[2]);
        }
        let mut written = std::collections::HashSet::new();
        for (i, (request_id, child)) in planned.requests().enumerate() {
            let row = index(plan.rows()[i]);
            let tenant = self.rows[row].as_ref().expect("a started row");
            assert_eq!(
                (tenant.request.as_str(), tenant.index),
                (&**request_id, child as usize),
                "row {row}"
            );
            let namespace = namespace_of(request_id);
            let content = self.contents.get(&**request_id).cloned().flatten();
            let table = plan.block_table().row(i);
            let blocks = index(plan.seq_lens()[i]).div_ceil(self.block_size);
            for (entry, &block) in (0..).zip(&table[..blocks]) {
                assert_eq!(
                    self.device_table[row].get(&entry),
                    Some(&block),
                    "device table, row {row}, entry {entry}"
                );
            }
            for (entry, &block) in (0..).zip(table).skip(blocks) {
                let kept = self.device_table[row].get(&entry).copied().unwrap_or(0);
                assert!(
                    block == 0 || block == kept,
                    "row {row}, entry {entry}: {block}, a leftover"
                );
            }
            for t in index(plan.query_start_loc()[i])..index(plan.query_start_loc()[i + 1]) {
                let position = index(plan.positions()[t]);
                let before = position.checked_sub(1).map_or(UNWRITTEN, |p| self.read(table, p));
                let slot = usize::try_from(plan.slot_mapping()[t]).expect("a slot");
                assert!(written.insert(slot), "slot {slot} is written twice in one step");
                let token = u32::try_from(plan.input_ids()[t]).expect("a known token");
                self.slots[slot] = tag(world(namespace, &content, position), position, token, before);
                self.namespaces[slot] = Some(namespace);
            }
            self.check_content(namespace, &table[..blocks], request_id);
        }
        let mut sampled = Vec::new();
        for (&token, &row) in plan.logits_indices().iter().zip(plan.sample_seqs()) {
            let i = plan.query_start_loc().partition_point(|&start| start <= token) - 1;
            assert_eq!(
                plan.query_start_loc()[i + 1],
                token + 1,
                "a sample from the last token of a sequence"
            );
            let table = plan.block_table().row(i);
            let tenant = self.rows[index(row)].as_ref().expect("a started row");
            let tags = (0..index(plan.seq_lens()[i])).map(|p| self.read(table, p));
            sampled.push(sample(tags, tenant.index, self.vocab_size).cast_signed());
        }
        sampled
    }

    /// R6: no block of a table holds another tenant's content.
    fn check_content(&self, namespace: u64, table: &[i32], whose: &str) {
        for &block in table {
            let mut content = self.namespaces[self.slots_of(index(block))].iter().flatten();
            let foreign = content.find(|&&n| n != namespace);
            assert_eq!(foreign, None, "block {block} of {whose} holds another's content");
        }
    }

    fn slots_of(&self, block: usize) -> std::ops::Range<usize> {
        block * self.block_size..(block + 1) * self.block_size
    }

    fn read(&self, table: &[i32], position: usize) -> u64 {
        self.slots[index(table[position / self.block_size]) * self.block_size + position % self.block_size]
    }

    /// Somebody outside all sequences fills a block with what must stay there, or cleans it.
    #[allow(dead_code)]
    pub fn fill(&mut self, block: usize, full: bool) {
        let slots = self.slots_of(block);
        self.slots[slots.clone()].fill(if full { FILLED } else { UNWRITTEN });
        self.namespaces[slots].fill(full.then_some(FILLED));
    }

    #[allow(dead_code)]
    pub fn check_filled(&self, block: usize) {
        let slots = &self.slots[self.slots_of(block)];
        assert!(slots.iter().all(|&slot| slot == FILLED), "block {block} was written to");
    }

    /// A sequence that is no request's computes its tokens from position `start` on.
    #[allow(dead_code)]
    pub fn write(&mut self, namespace: u64, tokens: &[u32], start: usize, table: &[pagedcore::BlockId]) {
        let table: Vec<i32> = table.iter().map(|block| block.0.cast_signed()).collect();
        for (position, &token) in tokens.iter().enumerate().skip(start) {
            let before = position.checked_sub(1).map_or(UNWRITTEN, |p| self.read(&table, p));
            let slot = index(table[position / self.block_size]) * self.block_size + position % self.block_size;
            self.slots[slot] = tag(namespace, position, token, before);
            self.namespaces[slot] = Some(namespace);
        }
        self.check_content(namespace, &table, "another owner's sequence");
    }

    /// Has such a sequence what it computed?
    #[allow(dead_code)]
    pub fn check_written(&self, namespace: u64, tokens: &[u32], table: &[pagedcore::BlockId]) {
        let table: Vec<i32> = table.iter().map(|block| block.0.cast_signed()).collect();
        let mut before = UNWRITTEN;
        for (position, &token) in tokens.iter().enumerate() {
            before = tag(namespace, position, token, before);
            assert_eq!(self.read(&table, position), before, "position {position} of {tokens:?}");
        }
    }

    /// Zeroes, then copies. The copies of a step may run in any order, so no destination is a source.
    fn move_blocks(&mut self, plan: &StepPlan<'_>) {
        for &block in plan.blocks_to_zero() {
            let start = index(block) * self.block_size;
            self.slots[start..start + self.block_size].fill(UNWRITTEN);
            self.namespaces[start..start + self.block_size].fill(None);
        }
        let pairs: Vec<_> = plan
            .block_copies()
            .chunks_exact(2)
            .map(|pair| (index(pair[0]), index(pair[1])))
            .collect();
        for (place, &(src, dst)) in pairs.iter().enumerate() {
            assert!(
                pairs.iter().all(|&(other, _)| other != dst),
                "block {dst} is copied and copied to"
            );
            assert!(
                pairs[..place].iter().all(|&(_, other)| other != dst),
                "block {dst} is copied to twice"
            );
            let source = src * self.block_size..(src + 1) * self.block_size;
            self.slots.copy_within(source.clone(), dst * self.block_size);
            self.namespaces.copy_within(source, dst * self.block_size);
        }
    }

    /// Everything that a plan says goes into one number, to compare runs by.
    fn trace_plan(&mut self, plan: &StepPlan<'_>) {
        let mut hasher = foldhash::fast::FixedState::with_seed(self.trace).build_hasher();
        hasher.write_u64(plan.step());
        let arrays = [
            plan.input_ids(),
            plan.positions(),
            plan.seq_lens(),
            plan.rows(),
            plan.logits_indices(),
            plan.sample_seqs(),
            plan.table_updates(),
            plan.block_copies(),
            plan.blocks_to_zero(),
        ];
        for value in arrays.into_iter().flatten() {
            hasher.write_i32(*value);
        }
        for slot in plan.slot_mapping() {
            hasher.write_i64(*slot);
        }
        self.trace = hasher.finish();
    }
}

fn index(n: i32) -> usize {
    usize::try_from(n).expect("not negative")
}
