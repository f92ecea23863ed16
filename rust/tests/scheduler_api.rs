//! The scheduler's calls one by one: what each plan says, and what each refusal says and leaves alone.

mod sim;
#[path = "sim/small.rs"]
mod small;

use pagedcore::{Error, Explanation, Phase, Reason, RequestParams, Scheduler, SchedulerConfig};
use sim::alone;
use small::{VOCAB, config, n, prompt, scheduler, step};

fn explain(scheduler: &Scheduler, id: &str) -> String {
    scheduler.explain(id).unwrap().to_string()
}

#[test]
fn what_can_never_run_is_refused_when_it_is_added() {
    let (mut scheduler, _) = scheduler(&config());
    let mut refused = |id: &str, prompt: &[u32], params: RequestParams| {
        let error = scheduler.add_request(id, prompt, params).unwrap_err();
        assert_eq!(scheduler.stats().waiting, 0);
        assert!(!scheduler.has_unfinished());
        scheduler.check().unwrap();
        error
    };
    let argument = |error: &Error| match error {
        Error::InvalidArgument { argument, .. } => *argument,
        other => panic!("{other:?}"),
    };
    assert_eq!(argument(&refused("a", &[], RequestParams::new(1))), "prompt_token_ids");
    assert_eq!(argument(&refused("a", &[1], RequestParams::new(0))), "max_tokens");
    assert_eq!(argument(&refused("a", &[1], n(0, 1))), "n");
    assert_eq!(argument(&refused("a", &[1], n(5, 1))), "n");
    assert_eq!(argument(&refused("a", &[1], n(usize::MAX, 1))), "n");
    assert_eq!(
        refused("a", &[1, VOCAB], RequestParams::new(1)),
        Error::TokenOutOfRange {
            token: VOCAB.into(),
            position: 1,
            vocab_size: VOCAB.into()
        }
    );
    let stop = RequestParams {
        stop_token_ids: vec![3, u32::MAX],
        ..RequestParams::new(1)
    };
    assert_eq!(
        refused("a", &[1], stop),
        Error::TokenOutOfRange {
            token: u32::MAX.into(),
            position: 1,
            vocab_size: VOCAB.into()
        }
    );
    assert_eq!(
        refused("a", &prompt(32), RequestParams::new(1)),
        Error::RequestTooLarge {
            needed: 33,
            limit: 32,
            unit: "tokens"
        }
    );
    // Seven blocks of prompt shared, and one more for each of four, which fits; without sharing it would not.
    scheduler.add_request("a", &prompt(28), n(4, usize::MAX)).unwrap();
}

#[test]
fn a_request_that_does_not_fit_the_pool_alone_is_refused_at_the_first_token_too_many() {
    let config = SchedulerConfig {
        num_blocks: 8,
        ..config()
    };
    let (mut scheduler, mut server) = scheduler(&config);
    // Seven blocks are 28 slots; the last of 29 tokens needs none.
    let error = scheduler
        .add_request("a", &prompt(20), RequestParams::new(10))
        .unwrap_err();
    assert_eq!(
        error,
        Error::RequestTooLarge {
            needed: 8,
            limit: 7,
            unit: "blocks"
        }
    );
    scheduler.add_request("a", &prompt(20), RequestParams::new(9)).unwrap();
    let mut finished = Vec::new();
    while scheduler.has_unfinished() {
        finished.extend(step(&mut scheduler, &mut server));
    }
    assert_eq!(finished, [("a".into(), 0, "length".into())]);
    // One block of prompt, five for each of two, and the original of the copied block.
    let error = scheduler.add_request("b", &prompt(5), n(2, 11)).unwrap_err();
    assert_eq!(
        error,
        Error::RequestTooLarge {
            needed: 8,
            limit: 7,
            unit: "blocks"
        }
    );
}

#[test]
fn an_id_is_taken_until_its_request_ends() {
    let (mut scheduler, mut server) = scheduler(&config());
    scheduler.add_request("a", &[1], RequestParams::new(1)).unwrap();
    let error = scheduler.add_request("a", &[1], RequestParams::new(1)).unwrap_err();
    assert_eq!(error, Error::DuplicateRequest { request_id: "a".into() });
    assert_eq!(step(&mut scheduler, &mut server), [("a".into(), 0, "length".into())]);
    assert_eq!(
        scheduler.abort("a"),
        Err(Error::UnknownRequest { request_id: "a".into() })
    );
    assert!(scheduler.explain("a").is_err());
    scheduler.add_request("a", &[1], RequestParams::new(1)).unwrap();
}

#[test]
fn a_prompt_leaves_a_token_of_the_budget_to_each_sequence_that_decodes() {
    let (mut scheduler, mut server) = scheduler(&SchedulerConfig {
        max_num_batched_tokens: 6,
        ..config()
    });
    scheduler.add_request("a", &prompt(2), RequestParams::new(9)).unwrap();
    scheduler.add_request("b", &prompt(3), RequestParams::new(9)).unwrap();
    step(&mut scheduler, &mut server);
    // More urgent than those that run, and longer than the budget.
    let urgent = RequestParams {
        priority: -1,
        ..RequestParams::new(2)
    };
    scheduler.add_request("c", &prompt(11), urgent).unwrap();
    for expected in [[1, 1, 4], [1, 1, 4], [1, 1, 3], [1, 1, 1]] {
        let planned = scheduler.schedule().unwrap().unwrap();
        let starts = planned.plan().query_start_loc();
        let lens: Vec<_> = starts.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert_eq!(lens, expected);
        let (number, sampled) = (planned.plan().step(), server.run(&planned, |_| 0));
        scheduler.update(number, &sampled, None, None).unwrap();
    }
    assert_eq!(
        scheduler.explain("c"),
        Err(Error::UnknownRequest { request_id: "c".into() })
    );
}

#[test]
fn a_group_shares_its_prompt_and_copies_the_block_it_ends_in() {
    let (mut scheduler, mut server) = scheduler(&config());
    scheduler.add_request("a", &prompt(6), n(4, 3)).unwrap();
    let planned = scheduler.schedule().unwrap().unwrap();
    let plan = planned.plan();
    assert_eq!((plan.num_seqs(), plan.num_tokens(), plan.num_samples()), (1, 6, 4));
    assert_eq!(
        (plan.logits_indices(), plan.sample_seqs()),
        (&[5, 5, 5, 5][..], &[0, 1, 2, 3][..])
    );
    let started: Vec<_> = planned
        .started()
        .iter()
        .map(|s| (s.row, &*s.request_id, s.index))
        .collect();
    assert_eq!(started, [(0, "a", 0), (1, "a", 1), (2, "a", 2), (3, "a", 3)]);
    let last_block = plan.block_table().row(0)[1];
    let (number, sampled) = (plan.step(), server.run(&planned, |_| 0));
    scheduler.update(number, &sampled, None, None).unwrap();
    let planned = scheduler.schedule().unwrap().unwrap();
    let plan = planned.plan();
    assert_eq!((plan.num_seqs(), plan.num_tokens(), plan.num_samples()), (4, 4, 4));
    assert_eq!(planned.started(), []);
    // Three copies; the last one that shares the block writes in place.
    assert_eq!(plan.block_copies().len(), 3 * 2);
    let table = plan.block_table();
    assert!((1..4).all(|i| table.row(i)[0] == table.row(0)[0] && table.row(i)[1] != table.row(0)[1]));
    assert_eq!(
        (0..4).map(|i| table.row(i)[1] == last_block).collect::<Vec<_>>(),
        [false, false, false, true]
    );
    let (number, sampled) = (plan.step(), server.run(&planned, |_| 0));
    scheduler.update(number, &sampled, None, None).unwrap();
    let finished = step(&mut scheduler, &mut server);
    assert_eq!(finished.len(), 4);
    assert_eq!(scheduler.stats().block_copies, 3);
}

#[test]
fn every_waiting_request_has_a_reason() {
    let (mut scheduler, mut server) = scheduler(&SchedulerConfig {
        num_blocks: 9,
        max_num_seqs: 3,
        ..config()
    });
    scheduler.add_request("a", &prompt(9), RequestParams::new(20)).unwrap();
    assert_eq!(explain(&scheduler, "a"), "waiting: next step");
    step(&mut scheduler, &mut server);
    assert_eq!(explain(&scheduler, "a"), "running");
    scheduler.add_request("b", &[7; 17], RequestParams::new(3)).unwrap();
    scheduler.add_request("c", &[9; 2], RequestParams::new(3)).unwrap();
    step(&mut scheduler, &mut server);
    // b: five blocks and one to grow into, and one for a to grow into.
    assert_eq!(explain(&scheduler, "b"), "waiting: blocks (needed 6, available 5)");
    assert_eq!(
        scheduler.explain("c").unwrap(),
        Explanation {
            phase: Phase::Waiting,
            reason: Some(Reason::Behind { request_id: "b".into() })
        }
    );
    scheduler.abort("b").unwrap();
    scheduler.add_request("d", &[3; 2], n(2, 3)).unwrap();
    step(&mut scheduler, &mut server);
    assert_eq!(explain(&scheduler, "c"), "running");
    assert_eq!(explain(&scheduler, "d"), "waiting: rows (needed 2, available 1)");
}

#[test]
fn a_group_whose_lead_was_finished_waits_as_one_that_has_run() {
    let (mut scheduler, mut server) = scheduler(&SchedulerConfig {
        max_num_batched_tokens: 4,
        ..config()
    });
    scheduler.add_request("a", &prompt(11), n(3, 3)).unwrap();
    step(&mut scheduler, &mut server);
    scheduler.finish("a", &"enough".into(), Some(0)).unwrap();
    assert_eq!(explain(&scheduler, "a"), "preempted: next step");
    step(&mut scheduler, &mut server);
    // What its last chunk leaves of the budget goes to a more urgent request, which takes all of the next step.
    let urgent = RequestParams {
        priority: -1,
        ..RequestParams::new(1)
    };
    scheduler.add_request("b", &prompt(30), urgent).unwrap();
    let number = scheduler.schedule().unwrap().unwrap().plan().step();
    scheduler.cancel(number).unwrap();
    // The siblings have rows by now, but have not forked: they say nothing of the group.
    step(&mut scheduler, &mut server);
    assert_eq!(explain(&scheduler, "a"), "running: token budget");
}

#[test]
fn a_preempted_request_comes_back_through_the_prefix_cache() {
    let config = SchedulerConfig {
        num_blocks: 11,
        max_num_batched_tokens: 32,
        ..config()
    };
    let (mut scheduler, mut server) = scheduler(&config);
    let (a, b) = (prompt(12), vec![9; 12]);
    scheduler.add_request("a", &a, RequestParams::new(20)).unwrap();
    scheduler.add_request("b", &b, RequestParams::new(20)).unwrap();
    let mut explained = Vec::new();
    while scheduler.has_unfinished() {
        step(&mut scheduler, &mut server);
        if let Ok(explanation) = scheduler.explain("b") {
            explained.push(explanation.to_string());
        }
    }
    assert!(
        explained.iter().any(|text| text.starts_with("preempted: ")),
        "{explained:?}"
    );
    let stats = scheduler.stats();
    assert_eq!(stats.preemptions, 1);
    assert!(stats.prefix_hit_tokens > 0, "{stats:?}");
    assert_eq!((stats.length, stats.sampled_tokens), (2, 40));
}

#[test]
fn nobody_is_admitted_in_a_step_that_preempts() {
    let config = SchedulerConfig {
        num_blocks: 7,
        ..config()
    };
    let (mut scheduler, mut server) = scheduler(&config);
    scheduler.add_request("a", &prompt(8), RequestParams::new(12)).unwrap();
    scheduler.add_request("b", &[9; 8], RequestParams::new(12)).unwrap();
    for _ in 0..40 {
        let Some(planned) = scheduler.schedule().unwrap() else {
            break;
        };
        let preempted = planned.preempted().len();
        assert!(preempted == 0 || planned.started().is_empty());
        let (number, sampled) = (planned.plan().step(), server.run(&planned, |_| 0));
        if preempted > 0 {
            scheduler.add_request("c", &[5], RequestParams::new(1)).unwrap();
            assert_eq!(
                explain(&scheduler, "b"),
                "preempted: running requests are short of blocks"
            );
            assert_eq!(explain(&scheduler, "c"), "waiting: behind b");
        }
        scheduler.update(number, &sampled, None, None).unwrap();
    }
    assert_eq!(scheduler.stats().preemptions, 1);
    assert!(!scheduler.has_unfinished());
}

#[test]
fn a_storm_of_preemptions_changes_no_output() {
    let config = SchedulerConfig {
        block_size: 16,
        max_num_seqs: 32,
        max_num_batched_tokens: 256,
        max_model_len: 512,
        ..SchedulerConfig {
            num_blocks: 101,
            ..config()
        }
    };
    let (mut scheduler, mut server) = scheduler(&config);
    let prompts: Vec<Vec<u32>> = (0..48_u32)
        .map(|i| (0..20 + i).map(|p| (p * 7 + i) % VOCAB).collect())
        .collect();
    for (i, prompt) in prompts.iter().enumerate() {
        scheduler
            .add_request(&i.to_string(), prompt, RequestParams::new(300))
            .unwrap();
    }
    let mut outputs = vec![Vec::new(); prompts.len()];
    let mut preempted = vec![0; prompts.len()];
    while scheduler.has_unfinished() {
        let planned = scheduler.schedule().unwrap().expect("a step");
        for id in planned.preempted() {
            preempted[id.parse::<usize>().unwrap()] += 1;
        }
        let (number, sampled) = (planned.plan().step(), server.run(&planned, |_| 0));
        let result = scheduler.update(number, &sampled, None, None).unwrap();
        for (&row, &token) in result.rows.iter().zip(&result.tokens) {
            let tenant = server.rows[usize::try_from(row).unwrap()].as_ref().unwrap();
            outputs[tenant.request.parse::<usize>().unwrap()].push(token.cast_unsigned());
        }
    }
    scheduler.check().unwrap();
    assert!(scheduler.stats().preemptions >= 20, "{:?}", scheduler.stats());
    assert!(preempted.iter().all(|&times| times <= 8), "{preempted:?}");
    for (prompt, output) in prompts.iter().zip(&outputs) {
        assert_eq!(output, &alone(0, prompt, 0, prompt.len() + 300, &[], VOCAB));
    }
}

#[test]
fn a_request_that_is_refused_again_and_again_makes_no_step_long() {
    let (mut scheduler, mut server) = scheduler(&SchedulerConfig {
        num_blocks: 65,
        max_num_batched_tokens: 300,
        max_model_len: 250,
        ..config()
    });
    let long = |len: u32| -> Vec<u32> { (0..len).map(|i| i % VOCAB).collect() };
    scheduler.add_request("a", &long(100), RequestParams::new(60)).unwrap();
    step(&mut scheduler, &mut server);
    scheduler
        .add_request("b", &long(180)[1..], RequestParams::new(9))
        .unwrap();
    scheduler
        .add_request("c", &long(181)[1..], RequestParams::new(9))
        .unwrap();
    assert!(scheduler.size_of_schedule() > 300, "both may be admitted");
    let mut sizes = Vec::new();
    for _ in 0..48 {
        step(&mut scheduler, &mut server);
        assert_eq!(scheduler.explain("b").unwrap().phase, Phase::Waiting);
        sizes.push(scheduler.size_of_schedule());
    }
    // Now and then its prefix is looked at.
    let looks = sizes.iter().filter(|&&size| size > 1).count();
    assert!((1..=4).contains(&looks), "{sizes:?}");
    // What ends gives blocks back: then it may be admitted.
    scheduler.abort("a").unwrap();
    assert!(scheduler.size_of_schedule() > 300);
    step(&mut scheduler, &mut server);
    assert_eq!(scheduler.explain("b").unwrap().phase, Phase::Running);
}

#[test]
fn stop_tokens_may_come_in_any_order_and_twice() {
    let (mut scheduler, _) = scheduler(&config());
    let params = RequestParams {
        stop_token_ids: vec![9, 3, 9, 7, 3],
        ..RequestParams::new(20)
    };
    for (id, stop) in [("a", 9), ("b", 7), ("c", 3)] {
        scheduler.add_request(id, &prompt(3), params.clone()).unwrap();
        for token in [4, 8, stop] {
            let number = scheduler.schedule().unwrap().unwrap().plan().step();
            let finished = scheduler.update(number, &[token], None, None).unwrap().finished.len();
            assert_eq!(finished, usize::from(token == stop), "{id}: {token}");
        }
    }
}
