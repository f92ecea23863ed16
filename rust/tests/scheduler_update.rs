//! What becomes of a step: updated, cancelled, failed, or overtaken by the end of its requests.

mod sim;
#[path = "sim/small.rs"]
mod small;

use pagedcore::{EndReason, Error, NamespaceKey, RequestParams, Scheduler, StepProblem};
use small::{VOCAB, config, n, prompt, scheduler, step};

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
fn no_sample_of_a_request_that_failed_is_looked_at() {
    let (mut scheduler, mut server) = scheduler(&config());
    scheduler.add_request("group", &prompt(5), n(3, 4)).unwrap();
    scheduler
        .add_request("other", &prompt(3), RequestParams::new(4))
        .unwrap();
    let planned = scheduler.schedule().unwrap().unwrap();
    let number = planned.plan().step();
    server.run(&planned, |_| 0);
    let due: Vec<_> = planned.plan().sample_seqs().to_vec();
    let other = due
        .iter()
        .position(|&row| server.rows[row as usize].as_ref().unwrap().request == "other");
    let other = other.unwrap();
    // One sequence of the group failed, so all of it ends: what its siblings sampled is nobody's.
    let mut sampled = [-1; 4];
    sampled[other] = 3;
    let mut failed = [false; 4];
    failed[(other + 2) % 4] = true;
    let result = scheduler.update(number, &sampled, None, Some(&failed)).unwrap();
    assert_eq!(result.finished.len(), 3);
    assert_eq!(result.tokens, [3]);
    scheduler.check().unwrap();
    // A sample of another request's is.
    scheduler.add_request("group", &prompt(5), n(3, 4)).unwrap();
    let planned = scheduler.schedule().unwrap().unwrap();
    let (number, samples) = (planned.plan().step(), planned.plan().num_samples());
    server.run(&planned, |_| 0);
    let mut failed = vec![false; samples];
    failed[samples - 1] = true;
    let error = scheduler
        .update(number, &vec![-1; samples], None, Some(&failed))
        .unwrap_err();
    assert!(matches!(error, Error::TokenOutOfRange { position: 0, .. }), "{error:?}");
    scheduler.check().unwrap();
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

fn tenant(name: &str) -> RequestParams {
    RequestParams {
        namespace: NamespaceKey {
            tenant: name.into(),
            ..NamespaceKey::default()
        },
        ..RequestParams::new(3)
    }
}

#[test]
fn a_block_to_zero_is_told_once_however_often_steps_are_cancelled() {
    let (mut scheduler, mut server) = scheduler(&config());
    for turn in 0..300 {
        scheduler
            .add_request("a", &prompt(13), tenant(&turn.to_string()))
            .unwrap();
        // Cancelled twice while it runs, then given up: its blocks go to the next tenant unzeroed.
        let mut told = Vec::new();
        for _ in 0..2 {
            let plan = scheduler.schedule().unwrap().unwrap();
            let (number, mut zero) = (plan.plan().step(), plan.plan().blocks_to_zero().to_vec());
            zero.sort_unstable();
            assert!(zero.windows(2).all(|pair| pair[0] < pair[1]), "{zero:?}");
            scheduler.cancel(number).unwrap();
            scheduler.check().unwrap();
            told.push(zero);
        }
        assert_eq!(told[0], told[1]);
        scheduler.abort("a").unwrap();
        scheduler.check().unwrap();
    }
    assert_eq!(scheduler.stats().blocks_zeroed, 0, "no step was run");
    assert_eq!(scheduler.manager().stats().zeroed, 0);
    scheduler.add_request("a", &prompt(13), tenant("last")).unwrap();
    step(&mut scheduler, &mut server);
    assert!(scheduler.stats().blocks_zeroed > 0);
}
