//! The naive model: what levels 0 and 1 promise, written as plainly as possible.
//!
//! No counters, no lists, no handles: every answer is computed by looking at everything. A published block is known by
//! its namespace and all tokens up to its end, so "found by (parent, tokens)" needs no trie here. Which ids an
//! allocation gives and which of several equally old blocks it evicts is the real pool's choice; the model checks
//! that the choice was allowed and follows it.

#![allow(dead_code)] // each test binary uses a part

use std::collections::BTreeSet;

use pagedcore::{BlockId, BlockPool, BlockState, Error, PrefixCache, Step};

/// A namespace and the tokens from the start to the end of a block.
pub type Prefix = (usize, Vec<u32>);

/// All blocks of a pool, and the steps.
#[derive(Clone, Debug)]
pub struct Blocks {
    pub refs: Vec<u32>,
    pub fences: Vec<Step>,
    pub published: Vec<Option<Prefix>>,
    /// When it was.
    pub published_since: Vec<u64>,
    /// When the block became evictable; None if it is not.
    pub evictable_since: Vec<Option<u64>>,
    pub begun: Step,
    pub completed: BTreeSet<Step>,
    pub clock: u64,
}

impl Blocks {
    pub fn new(num_blocks: usize) -> Self {
        Self {
            refs: vec![0; num_blocks],
            fences: vec![0; num_blocks],
            published: vec![None; num_blocks],
            published_since: vec![0; num_blocks],
            evictable_since: vec![None; num_blocks],
            begun: 0,
            completed: BTreeSet::new(),
            clock: 0,
        }
    }

    pub fn in_flight(&self) -> Vec<Step> {
        (1..=self.begun).filter(|step| !self.completed.contains(step)).collect()
    }

    pub fn is_pending(&self, block: usize) -> bool {
        (1..=self.fences[block]).any(|step| !self.completed.contains(&step))
    }

    pub fn state(&self, block: usize) -> BlockState {
        match (self.refs[block], &self.published[block]) {
            _ if block == 0 => BlockState::Null,
            (1.., _) => BlockState::Used,
            (0, Some(_)) => BlockState::Cached,
            (0, None) if self.is_pending(block) => BlockState::Fenced,
            (0, None) => BlockState::Free,
        }
    }

    pub fn count(&self, state: BlockState) -> usize {
        (0..self.refs.len()).filter(|&block| self.state(block) == state).count()
    }

    /// Published, and neither it nor any block that continues it is held or waits for a fence.
    pub fn is_evictable(&self, block: usize) -> bool {
        let Some((namespace, tokens)) = &self.published[block] else {
            return false;
        };
        (0..self.refs.len()).all(|other| match &self.published[other] {
            Some((same, longer)) if same == namespace && longer.starts_with(tokens) => {
                self.refs[other] == 0 && !self.is_pending(other)
            }
            _ => true,
        })
    }

    pub fn evictable(&self) -> usize {
        (0..self.refs.len())
            .filter(|&block| self.evictable_since[block].is_some())
            .count()
    }

    pub fn publish(&mut self, block: usize, prefix: Prefix) {
        self.published[block] = Some(prefix);
        self.published_since[block] = self.clock;
    }

    /// What an error of an allocation calls free.
    pub fn available(&self) -> usize {
        self.count(BlockState::Free) + self.evictable()
    }

    pub fn find(&self, namespace: usize, tokens: &[u32]) -> Option<usize> {
        self.published.iter().position(|it| {
            it.as_ref()
                .is_some_and(|(same, all)| *same == namespace && all == tokens)
        })
    }

    /// The blocks of the longest published run of whole blocks.
    pub fn longest(&self, namespace: usize, tokens: &[u32], block_size: usize) -> Vec<usize> {
        (1..=tokens.len() / block_size)
            .map_while(|end| self.find(namespace, &tokens[..end * block_size]))
            .collect()
    }

    /// `blocks` were handed out; cached ones among them, and as many as were short, have been evicted.
    pub fn allocated(&mut self, blocks: &[BlockId], pool: &BlockPool) {
        let free: BTreeSet<_> = (1..self.refs.len())
            .filter(|&b| self.state(b) == BlockState::Free)
            .collect();
        let short = blocks.len().saturating_sub(free.len());
        let gone: Vec<_> = (1..self.refs.len())
            .filter(|&b| self.state(b) == BlockState::Cached && pool.state(BlockId(b as u32)) != Ok(BlockState::Cached))
            .collect();
        self.evicted(&gone, short);
        for block in blocks {
            assert_eq!(self.state(block.index()), BlockState::Free, "{block} was handed out");
            self.refs[block.index()] = 1;
        }
    }

    /// `gone` were evicted, as the `n` that were evictable for the longest time.
    pub fn evicted(&mut self, gone: &[usize], n: usize) {
        assert_eq!(gone.len(), n, "evicted {gone:?}");
        let since = |block: usize| self.evictable_since[block];
        let newest = gone
            .iter()
            .map(|&block| since(block).expect("an evictable block"))
            .max();
        let oldest_left = (0..self.refs.len())
            .filter(|block| !gone.contains(block))
            .filter_map(since)
            .min();
        if let (Some(newest), Some(oldest_left)) = (newest, oldest_left) {
            assert!(newest <= oldest_left, "evicted {gone:?} before older ones");
        }
        gone.iter().for_each(|&block| self.published[block] = None);
    }

    pub fn fence(&self, after_step: Option<Step>) -> Step {
        after_step.unwrap_or(self.begun)
    }

    pub fn release(&mut self, block: BlockId, fence: Step) {
        let index = block.index();
        assert!(self.refs[index] > 0, "block {block} is not held");
        self.refs[index] -= 1;
        self.fences[index] = self.fences[index].max(fence);
    }

    /// Notes what has become evictable, or is not any more.
    pub fn refresh(&mut self) {
        self.clock += 1;
        for block in 1..self.refs.len() {
            self.evictable_since[block] = match (self.is_evictable(block), self.evictable_since[block]) {
                (true, since) => Some(since.unwrap_or(self.clock)),
                (false, _) => None,
            };
        }
    }

    /// Compares everything, and checks the real one's own invariants.
    pub fn compare(&mut self, pool: &BlockPool, cache: Option<&PrefixCache>, block_size: usize) {
        self.refresh();
        for block in 1..self.refs.len() {
            // No block is published without the one before it.
            if let Some((namespace, tokens)) = &self.published[block] {
                let above = &tokens[..tokens.len() - block_size];
                assert!(
                    above.is_empty() || self.find(*namespace, above).is_some(),
                    "block {block} has no parent"
                );
            }
        }
        let counts = [pool.num_free(), pool.num_cached(), pool.num_used(), pool.num_fenced()];
        let states = [
            BlockState::Free,
            BlockState::Cached,
            BlockState::Used,
            BlockState::Fenced,
        ];
        assert_eq!(counts, states.map(|state| self.count(state)));
        for block in 0..self.refs.len() {
            let id = BlockId(block as u32);
            assert_eq!(pool.state(id).unwrap(), self.state(block), "block {block}");
            assert_eq!(pool.ref_count(id).unwrap(), self.refs[block], "block {block}");
        }
        assert_eq!(pool.newest_step(), self.begun);
        assert_eq!(pool.steps_in_flight(), self.in_flight().len());
        pool.check().unwrap();
        if let Some(cache) = cache {
            cache.check(pool).unwrap();
            assert_eq!(cache.stats().num_evictable, self.evictable());
            assert_eq!(cache.stats().num_nodes, self.published.iter().flatten().count());
        }
    }
}

/// Runs an operation and makes sure that an error has left no trace.
pub fn all_or_nothing<S: Clone + PartialEq + std::fmt::Debug, T>(
    state: &mut S,
    operation: impl FnOnce(&mut S) -> Result<T, Error>,
) -> Result<T, Error> {
    let before = state.clone();
    let result = operation(state);
    if let Err(error) = &result {
        assert!(
            *state == before,
            "an operation that failed with \"{error}\" has changed something"
        );
        assert!(!matches!(error, Error::Corruption { .. }), "{error}");
    }
    result
}

/// Runs a property on random lists of operations, `share` of all (`PAGEDCORE_MODEL_OPS`, by default a good million) in
/// total. The seed is printed, and taken from `PAGEDCORE_MODEL_SEED` if that is set; a failing list is shrunk.
pub fn run<Op: std::fmt::Debug + Clone>(
    share: f64,
    operation: impl proptest::strategy::Strategy<Value = Op>,
    property: impl Fn(&[Op]),
) {
    use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};
    const LENGTH: usize = 400;
    let number = |name: &str, default: u64| match std::env::var(name) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{name} is {text:?}, expected a number")),
        Err(_) => default,
    };
    let total = number("PAGEDCORE_MODEL_OPS", 1_050_000) as f64 * share;
    let seed = number("PAGEDCORE_MODEL_SEED", u64::from(std::process::id()) << 32 | 0x5eed);
    let cases = (total / LENGTH as f64).ceil() as u32;
    println!("{cases} runs of {LENGTH} operations, PAGEDCORE_MODEL_SEED={seed}");
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let config = Config {
        cases,
        failure_persistence: None,
        max_shrink_iters: 20_000,
        ..Config::default()
    };
    let lists = proptest::collection::vec(operation, 1..2 * LENGTH); // as long on average
    // Shrinking panics many times; the last one is told below.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let result = TestRunner::new_with_rng(config, rng).run(&lists, |list| {
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| property(&list)));
        outcome.map_err(|cause| {
            let text = cause.downcast_ref::<String>().cloned();
            let text = text.or_else(|| cause.downcast_ref::<&str>().map(ToString::to_string));
            TestCaseError::fail(text.unwrap_or_default())
        })
    });
    std::panic::set_hook(hook);
    if let Err(error) = result {
        panic!("PAGEDCORE_MODEL_SEED={seed}: {error}");
    }
}
