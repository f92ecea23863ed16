//! The scheduler's calls one by one: what each plan says, and what each refusal says and leaves alone.

mod sim;

use pagedcore::{EndReason, Error, Explanation, Phase, Reason, RequestParams, Scheduler, SchedulerConfig, StepProblem};
use sim::{Server, alone};

const VOCAB: u32 = 50;

fn config() -> SchedulerConfig {
    SchedulerConfig {
        block_size: 4,
        max_num_seqs: 4,
        max_num_batched_tokens: 16,
        max_model_len: 32,
        vocab_size: Some(VOCAB as usize),
        ..SchedulerConfig::new(33)
    }
}

fn scheduler(config: &SchedulerConfig) -> (Scheduler, Server) {
    let server = Server::new(config.num_blocks, config.block_size, config.max_num_seqs, VOCAB);
    (Scheduler::new(config.clone()).unwrap(), server)
}

fn prompt(len: u32) -> Vec<u32> {
    (1..=len).collect()
}

fn n(n: usize, max_tokens: usize) -> RequestParams {
    RequestParams {
        n,
        ..RequestParams::new(max_tokens)
    }
}

/// One step, with every invariant checked.
fn step(scheduler: &mut Scheduler, server: &mut Server) -> Vec<(String, usize, String)> {
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
fn a_cancelled_step_is_planned_again() {
    let (mut scheduler, mut server) = scheduler(&config());
    scheduler.add_request("a", &prompt(6), n(3, 3)).unwrap();
    step(&mut scheduler, &mut server);
    // The next step has copies, table updates and rows to tell.
    let read = |scheduler: &mut Scheduler| {
        let planned = scheduler.schedule().unwrap().unwrap();
        let plan = planned.plan();
        let updates = plan.table_updates().to_vec();
        (
            plan.step(),
            plan.input_ids().to_vec(),
            plan.slot_mapping().to_vec(),
            plan.block_copies().to_vec(),
            updates,
        )
    };
    let first = read(&mut scheduler);
    assert_eq!(first.3.len(), 4);
    assert!(scheduler.schedule().unwrap().is_none(), "one step is in flight");
    scheduler.cancel(first.0).unwrap();
    scheduler.check().unwrap();
    let second = read(&mut scheduler);
    assert_eq!(second.0, first.0 + 1);
    assert_eq!(
        (&second.1, &second.2, &second.3, &second.4),
        (&first.1, &first.2, &first.3, &first.4)
    );
    scheduler.cancel(second.0).unwrap();
    while scheduler.has_unfinished() {
        step(&mut scheduler, &mut server);
    }
    assert_eq!(scheduler.stats().cancelled_steps, 2);
}

#[test]
fn a_wrong_update_changes_nothing() {
    let (mut scheduler, mut server) = scheduler(&config());
    let none = Error::Step {
        step: 1,
        expected: 0,
        problem: StepProblem::NotBegun,
    };
    assert_eq!(scheduler.update(1, &[], None, None).unwrap_err(), none);
    assert_eq!(scheduler.cancel(1).unwrap_err(), none);
    scheduler.add_request("a", &prompt(3), RequestParams::new(4)).unwrap();
    scheduler.add_request("b", &prompt(4), RequestParams::new(4)).unwrap();
    let planned = scheduler.schedule().unwrap().unwrap();
    let (number, sampled) = (planned.plan().step(), server.run(&planned, |_| 0));
    let mut refused = |step, sampled: &[i32], counts: Option<&[i32]>, failed: Option<&[bool]>| {
        let before = scheduler.stats();
        let error = scheduler.update(step, sampled, counts, failed).unwrap_err();
        assert_eq!(scheduler.stats(), before);
        scheduler.check().unwrap();
        error
    };
    let problem = |problem| Error::Step {
        step: if problem == StepProblem::NotBegun {
            number + 1
        } else {
            number - 1
        },
        expected: number,
        problem,
    };
    assert_eq!(
        refused(number + 1, &sampled, None, None),
        problem(StepProblem::NotBegun)
    );
    assert_eq!(
        refused(number - 1, &sampled, None, None),
        problem(StepProblem::AlreadyComplete)
    );
    let names = [
        refused(number, &sampled[..1], None, None),
        refused(number, &sampled, Some(&[1]), None),
        refused(number, &sampled, Some(&[1, 0]), None),
        refused(number, &sampled, Some(&[1, 2]), None),
        refused(number, &sampled, None, Some(&[false; 3])),
    ]
    .map(|error| match error {
        Error::InvalidArgument { argument, .. } => argument,
        other => panic!("{other:?}"),
    });
    assert_eq!(
        names,
        [
            "sampled_token_ids",
            "num_sampled",
            "num_sampled",
            "num_sampled",
            "failed"
        ]
    );
    for token in [-1, 50, i32::MIN, i32::MAX] {
        let error = refused(number, &[3, token], None, None);
        assert_eq!(
            error,
            Error::TokenOutOfRange {
                token: token.into(),
                position: 1,
                vocab_size: VOCAB.into()
            }
        );
    }
    // A bad sample of a row that failed is nobody's.
    let result = scheduler
        .update(number, &[3, -1], Some(&[1, 1]), Some(&[false, true]))
        .unwrap();
    let finished: Vec<_> = result
        .finished
        .iter()
        .map(|f| (&*f.request_id, f.reason.as_str()))
        .collect();
    assert_eq!(finished, [("b", "error")]);
    assert_eq!((&result.rows[..], &result.tokens[..]), (&[0][..], &[3][..]));
    assert_eq!(scheduler.stats().failed, 1);
}

#[test]
fn a_failed_step_publishes_nothing() {
    let (mut scheduler, mut server) = scheduler(&config());
    scheduler.add_request("a", &prompt(9), RequestParams::new(4)).unwrap();
    let planned = scheduler.schedule().unwrap().unwrap();
    let (number, sampled) = (planned.plan().step(), server.run(&planned, |_| 0));
    scheduler.update(number, &sampled, None, Some(&[true])).unwrap();
    assert_eq!(scheduler.manager().pool().num_cached(), 0);
    scheduler.add_request("a", &prompt(9), RequestParams::new(1)).unwrap();
    step(&mut scheduler, &mut server);
    assert_eq!(scheduler.manager().pool().num_cached(), 2);
}

#[test]
fn what_is_finished_while_a_step_runs_is_ignored_by_its_update() {
    let (mut scheduler, mut server) = scheduler(&config());
    scheduler.add_request("a", &prompt(5), n(3, 4)).unwrap();
    scheduler.add_request("b", &prompt(3), RequestParams::new(1)).unwrap();
    let planned = scheduler.schedule().unwrap().unwrap();
    let (number, sampled) = (planned.plan().step(), server.run(&planned, |_| 0));
    let enough = EndReason::from("enough");
    let ended = scheduler.finish("a", &enough, Some(1)).unwrap();
    assert_eq!((ended.len(), ended[0].index, &ended[0].reason), (1, 1, &enough));
    assert_eq!(scheduler.finish("a", &enough, Some(1)).unwrap(), [], "it ended before");
    let Err(Error::InvalidArgument {
        argument: "index",
        got: 3,
        ..
    }) = scheduler.finish("a", &enough, Some(3))
    else {
        panic!("an index beyond n");
    };
    let result = scheduler.update(number, &sampled, None, None).unwrap();
    assert_eq!(
        result.rows,
        [0, 2, 3].map(|row| result.rows.iter().copied().find(|&r| r == row).unwrap())
    );
    assert_eq!(result.finished.len(), 1);
    scheduler.check().unwrap();
    // The lead ends while the others still wait for its prompt: they go on without it.
    scheduler.add_request("c", &prompt(15), n(2, 2)).unwrap();
    scheduler.abort("a").unwrap();
    let planned = scheduler.schedule().unwrap().unwrap();
    let (number, sampled) = (planned.plan().step(), server.run(&planned, |_| 0));
    scheduler.finish("c", &enough, Some(0)).unwrap();
    assert_eq!(scheduler.update(number, &sampled, None, None).unwrap().rows, []);
    let finished = [step(&mut scheduler, &mut server), step(&mut scheduler, &mut server)].concat();
    assert_eq!(finished, [("c".into(), 1, "length".into())]);
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
