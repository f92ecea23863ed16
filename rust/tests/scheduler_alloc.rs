//! The step loop allocates nothing while sequences stay inside their blocks.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use pagedcore::{RequestParams, Scheduler, SchedulerConfig};

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

/// The system's allocator, counting the calls of each thread.
struct Counting;

// SAFETY: every call is passed on unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn steps_inside_blocks_allocate_nothing() {
    const SEQS: usize = 32;
    let config = SchedulerConfig {
        block_size: 16,
        max_num_seqs: SEQS,
        ..SchedulerConfig::new(4096)
    };
    let mut scheduler = Scheduler::new(config).unwrap();
    for i in 0..SEQS {
        let prompt: Vec<u32> = (0..48).map(|p| p * 64 + u32::try_from(i).unwrap()).collect();
        let params = RequestParams {
            stop_token_ids: vec![1],
            ..RequestParams::new(200)
        };
        scheduler.add_request(&i.to_string(), &prompt, params).unwrap();
    }
    let sampled = [7; SEQS];
    let mut per_step = Vec::new();
    for _ in 0..160 {
        let before = ALLOCATIONS.get();
        let planned = scheduler.schedule().unwrap().unwrap();
        let (number, wanted) = (planned.plan().step(), planned.plan().num_samples());
        scheduler.update(number, &sampled[..wanted], None, None).unwrap();
        per_step.push(ALLOCATIONS.get() - before);
    }
    // All prompts have 48 tokens, computed by step 0: step k computes position 47 + k of each. So the blocks of all end in
    // the steps 16, 32, ..., whose update publishes them, and the steps after these need new ones. The group of sixteen
    // tokens that the manager is told at once is full one step before.
    for (step, &count) in per_step.iter().enumerate().skip(8) {
        assert!(
            count == 0 || matches!(step % 16, 0 | 1 | 15),
            "step {step}: {per_step:?}"
        );
    }
}
