//! A scheduler of a few small blocks, and a server for it.
#![allow(dead_code)] // each file of tests uses some of it

use pagedcore::{RequestParams, Scheduler, SchedulerConfig};

use crate::sim::Server;

pub const VOCAB: u32 = 50;

pub fn config() -> SchedulerConfig {
    SchedulerConfig {
        block_size: 4,
        max_num_seqs: 4,
        max_num_batched_tokens: 16,
        max_model_len: 32,
        vocab_size: Some(VOCAB as usize),
        ..SchedulerConfig::new(33)
    }
}

pub fn scheduler(config: &SchedulerConfig) -> (Scheduler, Server) {
    let server = Server::new(config.num_blocks, config.block_size, config.max_num_seqs, VOCAB);
    (Scheduler::new(config.clone()).unwrap(), server)
}

pub fn prompt(len: u32) -> Vec<u32> {
    (1..=len).collect()
}

pub fn n(n: usize, max_tokens: usize) -> RequestParams {
    RequestParams {
        n,
        ..RequestParams::new(max_tokens)
    }
}

/// One step, with every invariant checked.
pub fn step(scheduler: &mut Scheduler, server: &mut Server) -> Vec<(String, usize, String)> {
    let planned = scheduler.schedule().unwrap().expect("a step");
    let number = planned.plan().step();
    let sampled = server.run(&planned, |_| 0);
    scheduler.check().unwrap();
    let result = scheduler.update(number, &sampled, None, None).unwrap();
    let finished = result
        .finished
        .iter()
        .map(|f| (f.request_id.to_string(), f.index, f.reason.to_string()))
        .collect();
    scheduler.check().unwrap();
    finished
}
