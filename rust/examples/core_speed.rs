//! Times of the core's basic operations, as JSON on standard output.
//!
//! `cargo run --release --example core_speed [NUM_BLOCKS] [--check]`, by default 1,000,000 blocks of 16 tokens. Each
//! figure is the median of several repetitions, with the 10th and 90th percentile; memory is the growth of the resident
//! set.
//!
//! Where there is a goal it stands beside the figure. With `--check` the exit status is 1 if one is missed beyond what
//! a busy machine explains: for a time, its 10th percentile is more than `NOISE` times the goal; for memory, and the
//! quotient of two times of one run, the goal itself. Goals are for a million blocks. That eviction stays O(1) is told
//! by a pool of a sixteenth of the size: its time per block may grow by the caches that it no longer fits, and not by
//! the size.

use std::time::Instant;

use pagedcore::{BlockId, BlockPool, ContentKeys, KVCacheManager, ManagerConfig, NamespaceKey, NoCache, PrefixCache};

const BLOCK_SIZE: usize = 16;
/// Blocks in one call of the pool.
const BATCH: usize = 64;

/// How far beyond its goal the quickest tenth of a figure's repetitions can be on a machine that does other things too.
const NOISE: f64 = 3.0;

/// A figure of the report.
struct Figure {
    case: &'static str,
    unit: &'static str,
    value: f64,
    p10: f64,
    p90: f64,
    goal: Option<f64>,
}

impl Figure {
    fn at_most(mut self, goal: f64) -> Self {
        self.goal = Some(goal);
        self
    }

    /// Is the goal missed by more than noise explains?
    fn is_missed(&self) -> bool {
        let noise = if matches!(self.unit, "bytes" | "times") {
            1.0
        } else {
            NOISE
        };
        self.goal.is_some_and(|goal| self.p10 > goal * noise)
    }

    fn json(&self) -> String {
        let Self {
            case,
            unit,
            value,
            p10,
            p90,
            goal,
        } = self;
        let goal = goal.map_or_else(|| "null".to_owned(), |goal| format!("{goal:.0}"));
        format!(
            r#"{{"suite": "core", "case": "{case}", "unit": "{unit}", "value": {value:.1}, "p10": {p10:.1}, "p90": {p90:.1}, "goal": {goal}}}"#
        )
    }
}

/// One figure of several repetitions.
fn report(case: &'static str, unit: &'static str, mut values: Vec<f64>) -> Figure {
    values.sort_by(f64::total_cmp);
    let at = |share: f64| values[((values.len() - 1) as f64 * share) as usize];
    Figure {
        case,
        unit,
        value: at(0.5),
        p10: at(0.1),
        p90: at(0.9),
        goal: None,
    }
}

/// Resident bytes of this process; 0 where the system does not say.
fn resident() -> f64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm
        .split_whitespace()
        .nth(1)
        .and_then(|pages| pages.parse::<f64>().ok());
    pages.unwrap_or(0.0) * 4096.0
}

fn nanoseconds(since: Instant) -> f64 {
    since.elapsed().as_nanos() as f64
}

/// A pool whose blocks are all cached, in chains of `chain` blocks.
fn cached(num_blocks: usize, chain: usize) -> (BlockPool, PrefixCache) {
    let mut pool = BlockPool::new(num_blocks, BLOCK_SIZE).expect("a pool");
    let mut cache = PrefixCache::new(&pool).expect("a cache");
    let ns = cache.namespace(NamespaceKey::default());
    let none = ContentKeys::default();
    let mut first = 0;
    while pool.num_free() >= chain {
        let tokens: Vec<u32> = (0..(chain * BLOCK_SIZE) as u32).map(|token| first + token).collect();
        first += 7919;
        let blocks = pool.allocate(chain, &mut cache).expect("free blocks");
        cache
            .commit(&mut pool, &tokens, &blocks, ns, None, None, &none)
            .expect("a commit");
        pool.release(&blocks, None, &mut cache).expect("held blocks");
    }
    (pool, cache)
}

fn pool_cases(num_blocks: usize, figures: &mut Vec<Figure>) {
    let mut times = Vec::new();
    let before = resident();
    let mut grown = 0.0;
    for _ in 0..9 {
        let start = Instant::now();
        let pool = BlockPool::new(num_blocks, BLOCK_SIZE).expect("a pool");
        let cache = PrefixCache::new(&pool).expect("a cache");
        times.push(nanoseconds(start));
        grown = resident() - before;
        drop((pool, cache));
    }
    figures.push(report("create pool and cache", "ns", times).at_most(10e6));
    figures.push(report("create pool and cache, resident", "bytes", vec![grown]));

    let (mut take, mut give) = (Vec::new(), Vec::new());
    let mut pool = BlockPool::new(num_blocks, BLOCK_SIZE).expect("a pool");
    let mut out: Vec<BlockId> = Vec::with_capacity(BATCH);
    for _ in 0..3 {
        let mut held = Vec::new();
        while pool.num_free() >= BATCH {
            let start = Instant::now();
            pool.allocate_near(BATCH, BlockId::NULL, &mut NoCache, &mut out)
                .expect("free blocks");
            take.push(nanoseconds(start) / BATCH as f64);
            held.push(out.clone());
            out.clear();
        }
        for blocks in held {
            let start = Instant::now();
            pool.release(&blocks, None, &mut NoCache).expect("held blocks");
            give.push(nanoseconds(start) / BATCH as f64);
        }
    }
    figures.push(report("allocate, 64 at a time", "ns/block", take));
    figures.push(report("release, 64 at a time", "ns/block", give));

    let mut single = Vec::new();
    for _ in 0..1000 {
        let start = Instant::now();
        for _ in 0..BATCH {
            pool.allocate_near(1, BlockId::NULL, &mut NoCache, &mut out)
                .expect("a free block");
            pool.release(&out, None, &mut NoCache).expect("a held block");
            out.clear();
        }
        single.push(nanoseconds(start) / BATCH as f64);
    }
    figures.push(report("allocate and release one", "ns", single));
}

fn eviction_cases(num_blocks: usize, figures: &mut Vec<Figure>) {
    let before = resident();
    let (mut pool, mut cache) = cached(num_blocks, 100);
    let grown = resident() - before;
    let tokens = (cache.stats().num_nodes * BLOCK_SIZE * 4) as f64;
    figures.push(
        report(
            "pool and cache full of published blocks, resident without tokens",
            "bytes",
            vec![grown - tokens],
        )
        .at_most(64.0 * num_blocks as f64),
    );
    // What a block costs where sixteen times fewer are there.
    let (mut fewer, mut of_fewer) = cached(num_blocks / 16, 100);
    let small = report("", "", evict(&mut fewer, &mut of_fewer)).p10;
    drop((fewer, of_fewer));
    let times = evict(&mut pool, &mut cache);
    let times = report("allocate with eviction, 64 at a time", "ns/block", times).at_most(50.0);
    let growth = vec![times.p10 / small];
    figures.push(times);
    figures.push(report("the same, for that with a sixteenth of the blocks", "times", growth).at_most(4.0));
}

/// Nanoseconds per block of allocations that evict, until nothing is left to evict.
fn evict(pool: &mut BlockPool, cache: &mut PrefixCache) -> Vec<f64> {
    let free = pool.num_free();
    pool.allocate(free, cache).expect("free blocks");
    let mut out: Vec<BlockId> = Vec::with_capacity(BATCH);
    let mut times = Vec::new();
    while cache.stats().num_evictable >= BATCH {
        let start = Instant::now();
        pool.allocate_near(BATCH, BlockId::NULL, cache, &mut out)
            .expect("evictable blocks");
        times.push(nanoseconds(start) / BATCH as f64);
        out.clear();
    }
    times
}

fn prefix_cases(num_blocks: usize, figures: &mut Vec<Figure>) {
    let blocks = 8192.min(num_blocks / 2);
    let tokens: Vec<u32> = (0..(blocks * BLOCK_SIZE) as u32).collect();
    let mut pool = BlockPool::new(num_blocks, BLOCK_SIZE).expect("a pool");
    let mut cache = PrefixCache::new(&pool).expect("a cache");
    let ns = cache.namespace(NamespaceKey::default());
    let none = ContentKeys::default();
    let per_block = |start: Instant| nanoseconds(start) / blocks as f64;
    let (mut commit, mut acquire, mut release, mut probe) = (vec![], vec![], vec![], vec![]);
    for _ in 0..15 {
        let own = pool.allocate(blocks, &mut cache).expect("free blocks");
        let start = Instant::now();
        cache
            .commit(&mut pool, &tokens, &own, ns, None, None, &none)
            .expect("a commit");
        commit.push(per_block(start));
        let start = Instant::now();
        pool.release(&own, None, &mut cache).expect("held blocks");
        release.push(per_block(start));
        let start = Instant::now();
        assert_eq!(cache.probe(&tokens, ns, None, &none).expect("a probe"), tokens.len());
        probe.push(per_block(start));
        let start = Instant::now();
        let hit = cache.acquire(&mut pool, &tokens, ns, None, &none).expect("a hit");
        acquire.push(per_block(start));
        pool.release(&hit.blocks, None, &mut cache).expect("held blocks");
        cache.reset(&mut pool);
    }
    figures.push(report("commit of a prompt of 131,072 tokens", "ns/block", commit).at_most(50.0));
    figures.push(report("release of it", "ns/block", release));
    figures.push(report("probe of it", "ns/block", probe));
    figures.push(report("acquire of it", "ns/block", acquire).at_most(50.0));
}

fn sequence_cases(num_blocks: usize, figures: &mut Vec<Figure>) {
    let mut manager = KVCacheManager::new(&ManagerConfig::new(num_blocks, BLOCK_SIZE)).expect("a manager");
    let tokens: Vec<u32> = (0..32_775).collect();
    let long = manager
        .add(&tokens, NamespaceKey::default(), ContentKeys::default())
        .expect("a sequence");
    manager.allocate_slots(long, tokens.len(), 0).expect("slots");
    manager.commit(long, tokens.len()).expect("a commit");
    let mut fork = Vec::new();
    for _ in 0..101 {
        let start = Instant::now();
        let child = manager.fork(long, 1).expect("a fork")[0];
        fork.push(nanoseconds(start));
        manager.free(child, None).expect("a sequence");
    }
    figures.push(report("fork of 32,775 tokens", "ns", fork).at_most(20e3));

    // The core's part of a decode step: append, slots, commit, for 256 sequences.
    let sequences: Vec<_> = (0..256_u32)
        .map(|first| {
            let tokens: Vec<u32> = (0..1000).map(|token| first * 1000 + token).collect();
            let seq = manager
                .add(&tokens, NamespaceKey::default(), ContentKeys::default())
                .expect("a sequence");
            manager.allocate_slots(seq, 1000, 0).expect("slots");
            manager.commit(seq, 1000).expect("a commit");
            seq
        })
        .collect();
    let (mut decode, mut slot) = (Vec::new(), [0_i64]);
    for step in 1000..1256 {
        let start = Instant::now();
        for &seq in &sequences {
            manager.append(seq, &[7]).expect("a token");
            manager.allocate_slots(seq, 1, 0).expect("slots");
            manager.slot_mapping(seq, step, step + 1, 0, &mut slot).expect("a slot");
            manager.commit(seq, step + 1).expect("a commit");
        }
        decode.push(nanoseconds(start) / sequences.len() as f64);
    }
    figures.push(report("decode step of one of 256 sequences", "ns", decode));
}

fn main() {
    let (mut num_blocks, mut check, mut wrong) = (1_000_000, false, false);
    for argument in std::env::args().skip(1) {
        match argument.parse() {
            Ok(number) if number >= 20_000 => num_blocks = number,
            _ if argument == "--check" => check = true,
            _ => wrong = true,
        }
    }
    if wrong {
        eprintln!("usage: core_speed [NUM_BLOCKS] [--check], at least 20000");
        std::process::exit(2);
    }
    let mut figures = Vec::new();
    pool_cases(num_blocks, &mut figures);
    eviction_cases(num_blocks, &mut figures);
    prefix_cases(num_blocks, &mut figures);
    sequence_cases(num_blocks, &mut figures);
    let lines: Vec<_> = figures.iter().map(Figure::json).collect();
    println!(
        "{{\"schema\": 1, \"command\": \"cargo run --release --example core_speed -- {num_blocks}\", \"results\": [\n  {}\n]}}",
        lines.join(",\n  ")
    );
    let missed: Vec<_> = figures.iter().filter(|figure| figure.is_missed()).collect();
    for figure in &missed {
        eprintln!("goal missed: {}", figure.json());
    }
    if check && !missed.is_empty() {
        std::process::exit(1);
    }
}
