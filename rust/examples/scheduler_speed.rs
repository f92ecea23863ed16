//! Host time of the scheduler, without a model: `cargo run --release --example scheduler_speed`.
//!
//! Prints JSON. *Decode*: `schedule` + `update` of one step in which every sequence has one token, about 1,000 tokens
//! into its life, all arrays of the step written; median, 10th and 90th percentile over the steps. *Admit*: from
//! `add_request` to the first plan of a 128k-token prompt in one chunk, cold and with a full prefix hit.

use std::hint::black_box;
use std::time::Instant;

use pagedcore::{RequestParams, Scheduler, SchedulerConfig};

const BLOCK_SIZE: usize = 16;
const CONTEXT: usize = 1000;
const STEPS: usize = 400;
const LONG: usize = 128 * 1024;

struct Measured {
    case: String,
    unit: &'static str,
    median: f64,
    p10: f64,
    p90: f64,
}

fn main() -> Result<(), pagedcore::Error> {
    let mut results = Vec::new();
    for num_seqs in [1, 16, 64, 256, 1024] {
        results.push(decode(num_seqs)?);
    }
    let (cold, hit) = admit()?;
    results.extend([cold, hit]);
    println!("{{\"schema\": 1, \"command\": \"cargo run --release --example scheduler_speed\", \"results\": [");
    for (place, m) in results.iter().enumerate() {
        let comma = if place + 1 < results.len() { "," } else { "" };
        println!(
            "  {{\"suite\": \"scheduler\", \"case\": \"{}\", \"metric\": \"host time\", \"value\": {:.3}, \"unit\": \"{}\", \
             \"p10\": {:.3}, \"p90\": {:.3}}}{comma}",
            m.case, m.median, m.unit, m.p10, m.p90
        );
    }
    println!("]}}");
    Ok(())
}

fn decode(num_seqs: usize) -> Result<Measured, pagedcore::Error> {
    let config = SchedulerConfig {
        block_size: BLOCK_SIZE,
        max_num_seqs: num_seqs,
        max_num_batched_tokens: num_seqs.max(8192),
        max_model_len: CONTEXT + 2 * STEPS,
        vocab_size: Some(128_256),
        ..SchedulerConfig::new(1 + num_seqs * (CONTEXT + 2 * STEPS).div_ceil(BLOCK_SIZE))
    };
    let mut scheduler = Scheduler::new(config)?;
    let mut times = Vec::with_capacity(STEPS);
    for i in 0..num_seqs {
        let prompt: Vec<u32> = (0..CONTEXT)
            .map(|p| u32::try_from((i * 7919 + p * 31) % 128_256).unwrap_or(0))
            .collect();
        let mut params = RequestParams::new(2 * STEPS);
        params.stop_token_ids = vec![2];
        // Requests of a real server are not aligned: their blocks fill in different steps.
        scheduler.add_request(&i.to_string(), &prompt[i % BLOCK_SIZE..], params)?;
    }
    let mut sampled = vec![5; num_seqs];
    while times.len() < STEPS {
        let start = Instant::now();
        let Some(planned) = scheduler.schedule()? else { break };
        let plan = black_box(planned.plan());
        let (number, tokens, wanted) = (plan.step(), plan.num_tokens(), plan.num_samples());
        let planning = start.elapsed();
        // A model would run here.
        sampled
            .iter_mut()
            .for_each(|token| *token = (*token + 17) % 128_000 + 3);
        let start = Instant::now();
        black_box(scheduler.update(number, &sampled[..wanted], None, None)?);
        if tokens == num_seqs && wanted == num_seqs {
            times.push((planning + start.elapsed()).as_secs_f64() * 1e6);
        }
    }
    Ok(measured(format!("decode step, {num_seqs} sequences"), times))
}

fn admit() -> Result<(Measured, Measured), pagedcore::Error> {
    let config = SchedulerConfig {
        block_size: BLOCK_SIZE,
        max_num_seqs: 4,
        max_num_batched_tokens: LONG,
        max_model_len: LONG + 16,
        ..SchedulerConfig::new(4 * (LONG / BLOCK_SIZE + 2))
    };
    let mut scheduler = Scheduler::new(config)?;
    let (mut cold, mut hit) = (Vec::new(), Vec::new());
    for round in 0..12_u32 {
        let prompt: Vec<u32> = (0..u32::try_from(LONG).unwrap_or(0))
            .map(|p| p ^ (round << 20))
            .collect();
        for times in [&mut cold, &mut hit] {
            let start = Instant::now();
            scheduler.add_request("long", &prompt, RequestParams::new(1))?;
            let Some(planned) = scheduler.schedule()? else { break };
            let step = black_box(planned.plan()).step();
            times.push(start.elapsed().as_secs_f64() * 1e6);
            scheduler.update(step, &[1], None, None)?;
        }
    }
    Ok((
        measured("admit 128k tokens, cold".into(), cold),
        measured("admit 128k tokens, full prefix hit".into(), hit),
    ))
}

fn measured(case: String, mut times: Vec<f64>) -> Measured {
    times.sort_by(f64::total_cmp);
    let at = |percent: usize| times.get(times.len() * percent / 100).copied().unwrap_or(f64::NAN);
    Measured {
        case,
        unit: "us",
        median: at(50),
        p10: at(10),
        p90: at(90),
    }
}
