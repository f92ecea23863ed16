//! Times of the core's basic operations, as JSON on standard output.
//!
//! `cargo run --release --example core_speed [NUM_BLOCKS]`, by default 1,000,000 blocks of 16 tokens. Each figure is the
//! median of several repetitions, with the 10th and 90th percentile; memory is the growth of the resident set.

use std::time::Instant;

use pagedcore::{BlockId, BlockPool, ContentKeys, KVCacheManager, ManagerConfig, NamespaceKey, NoCache, PrefixCache};

const BLOCK_SIZE: usize = 16;
/// Blocks in one call of the pool.
const BATCH: usize = 64;

/// One line of the report: nanoseconds per unit.
fn report(case: &str, unit: &str, mut nanoseconds: Vec<f64>) -> String {
    nanoseconds.sort_by(f64::total_cmp);
    let at = |share: f64| nanoseconds[((nanoseconds.len() - 1) as f64 * share) as usize];
    let (value, p10, p90) = (at(0.5), at(0.1), at(0.9));
    format!(
        r#"{{"suite": "core", "case": "{case}", "unit": "{unit}", "value": {value:.1}, "p10": {p10:.1}, "p90": {p90:.1}}}"#
    )
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

fn pool_cases(num_blocks: usize, lines: &mut Vec<String>) {
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
    lines.push(report("create pool and cache", "ns", times));
    lines.push(report("create pool and cache, resident", "bytes", vec![grown]));

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
    lines.push(report("allocate, 64 at a time", "ns/block", take));
    lines.push(report("release, 64 at a time", "ns/block", give));

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
    lines.push(report("allocate and release one", "ns", single));
}

fn eviction_cases(num_blocks: usize, lines: &mut Vec<String>) {
    let before = resident();
    let (mut pool, mut cache) = cached(num_blocks, 100);
    let grown = resident() - before;
    let tokens = (cache.stats().num_nodes * BLOCK_SIZE * 4) as f64;
    lines.push(report(
        "pool and cache full of published blocks, resident without tokens",
        "bytes",
        vec![grown - tokens],
    ));
    let free = pool.num_free();
    pool.allocate(free, &mut cache).expect("free blocks");
    let mut out: Vec<BlockId> = Vec::with_capacity(BATCH);
    let mut times = Vec::new();
    while cache.stats().num_evictable >= BATCH {
        let start = Instant::now();
        pool.allocate_near(BATCH, BlockId::NULL, &mut cache, &mut out)
            .expect("evictable blocks");
        times.push(nanoseconds(start) / BATCH as f64);
        out.clear();
    }
    lines.push(report("allocate with eviction, 64 at a time", "ns/block", times));
}

fn prefix_cases(num_blocks: usize, lines: &mut Vec<String>) {
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
    lines.push(report("commit of a prompt of 131,072 tokens", "ns/block", commit));
    lines.push(report("release of it", "ns/block", release));
    lines.push(report("probe of it", "ns/block", probe));
    lines.push(report("acquire of it", "ns/block", acquire));
}

fn sequence_cases(num_blocks: usize, lines: &mut Vec<String>) {
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
    lines.push(report("fork of 32,775 tokens", "ns", fork));

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
    lines.push(report("decode step of one of 256 sequences", "ns", decode));
}

fn main() {
    let num_blocks = match std::env::args().nth(1).map(|number| number.parse()) {
        None => 1_000_000,
        Some(Ok(number)) if number >= 20_000 => number,
        Some(_) => {
            eprintln!("usage: core_speed [NUM_BLOCKS], at least 20000");
            std::process::exit(2);
        }
    };
    let mut lines = Vec::new();
    pool_cases(num_blocks, &mut lines);
    eviction_cases(num_blocks, &mut lines);
    prefix_cases(num_blocks, &mut lines);
    sequence_cases(num_blocks, &mut lines);
    println!(
        "{{\"num_blocks\": {num_blocks}, \"results\": [\n  {}\n]}}",
        lines.join(",\n  ")
    );
}
