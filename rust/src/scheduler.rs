//! Level 3: which request computes which tokens in the next step.
//!
//! ```text
//! add_request ─> waiting ──admit──> running ──finish──> ended
//!                  ^                   │
//!                  └─────preempt───────┘
//!
//! schedule()  = decide (tokens, preemptions, admissions) + write (every array of the plan)
//! update(ids) = what the step computed is committed, samples are appended, sequences end
//! ```
//!
//! A scheduler owns the manager of the blocks, and is the only one to begin and complete steps on its pool. It reads
//! no clock and draws no random number: the same calls give the same plans.
//!
//! Waiting requests hold no blocks. A running one holds the blocks of its sequences; a preempted one has given them
//! back, keeps its tokens and its place in the line, and finds what is still cached of them when it is resumed.
//!
//! A request with `n > 1` runs as one sequence, the *lead*, until its prompt is computed; then the *siblings* fork
//! from it, before any of them has a token of its own. Their rows are promised when the lead is admitted. When such
//! a group is preempted it goes as a whole, and it comes back the same way: the lead first, then the siblings, who
//! share the prompt's blocks again whether or not there is a prefix cache.

mod check;
mod config;
mod decide;
mod explain;
mod lifecycle;
mod parts;
mod requests;
mod rows;
mod siblings;
mod size;
mod stats;
mod update;
mod write;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

pub use config::SchedulerConfig;
pub use explain::{Explanation, Phase, Reason};
pub(crate) use parts::Parts;
pub use stats::SchedulerStats;
pub use update::{Finished, StepResult};
pub use write::{PlannedStep, Started};

use crate::error::{Error, Result};
use crate::ids::{SeqHandle, Step};
use crate::manager::KVCacheManager;
use crate::plan::{PlanBuffer, PlanLimits};
use crate::policy::Rank;
use crate::pool::Reclaim;
use crate::tokens::Vocabulary;
use requests::Requests;
use rows::Rows;
use update::InFlight;

/// Continuous batching over a [`KVCacheManager`]; see the [module](self).
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    limits: PlanLimits,
    /// Of the manager, and of the configuration.
    vocabulary: Vocabulary,
    manager: KVCacheManager,
    requests: Requests,
    by_id: HashMap<Arc<str>, u32>,
    /// Requests without rows, in the order in which they are admitted.
    waiting: BTreeMap<Rank, u32>,
    rows: Rows,
    /// The head of the line and why it was not admitted in the last step.
    blocked: Option<(u32, Reason)>,
    buffer: PlanBuffer,
    /// What each line of the buffer's block table holds: whose table, and how many entries.
    lines: Vec<write::Line>,
    /// The step that was scheduled and not yet updated or cancelled, with lists that keep their capacity.
    in_flight: InFlight,
    result: StepResult,
    stats: SchedulerStats,
    arrivals: u64,
    /// Calls of `schedule` that had a step to plan.
    turns: u64,
    /// The corruption that was found once: every later call returns it again.
    poison: Option<Error>,
}

/// What `decide` has given away so far.
#[derive(Clone, Copy, Debug, Default)]
struct Draft {
    tokens_left: usize,
    /// Triples of `table_updates` that still fit the plan.
    updates_left: usize,
    /// Sequences with one token to compute that were not asked yet: each is kept one token of the budget.
    decodes_left: usize,
    num_seqs: usize,
    num_samples: usize,
    max_query_len: usize,
    max_seq_len: usize,
    /// Somebody was preempted, or got fewer blocks than wanted.
    short_of_blocks: bool,
}

impl Scheduler {
    /// A scheduler with a manager of its own. O(blocks).
    ///
    /// # Errors
    /// `InvalidArgument` or `Unsupported`, naming the field of `config`.
    pub fn new(config: SchedulerConfig) -> Result<Self> {
        config.validate()?;
        let manager = KVCacheManager::new(&config.manager_config())?;
        Self::with_manager(config, manager)
    }

    /// A scheduler on an existing manager, whose sequences stay where they are and are nobody's to preempt: a
    /// request that fits the pool only without them waits until they are freed. O(size of a plan).
    ///
    /// # Errors
    /// As `new`; `InvalidArgument` if the manager's sizes differ from the configuration's, if it keeps duplicates of
    /// published blocks (`merge_blocks=False`), or has steps in flight. The manager is dropped then.
    pub fn with_manager(config: SchedulerConfig, manager: KVCacheManager) -> Result<Self> {
        let parts = Parts::new(config, &manager)?;
        Ok(Self::over(parts, manager))
    }

    /// A scheduler on the manager that its parts were made for.
    pub(crate) fn over(parts: Parts, manager: KVCacheManager) -> Self {
        let Parts {
            config,
            limits,
            vocabulary,
            buffer,
            rows,
            lines,
        } = parts;
        let max_num_seqs = config.max_num_seqs;
        Self {
            buffer,
            limits,
            vocabulary,
            manager,
            requests: Requests::default(),
            by_id: HashMap::default(),
            waiting: BTreeMap::new(),
            rows,
            blocked: None,
            lines,
            in_flight: InFlight::with_capacity(max_num_seqs),
            result: StepResult::with_capacity(max_num_seqs),
            stats: SchedulerStats::default(),
            arrivals: 0,
            turns: 0,
            poison: None,
            config,
        }
    }

    /// Plans the next step: decides who computes what, and writes every array of it. `None` if nothing can run, or
    /// the step before is still in flight; [`explain`](Self::explain) says why. The plan is valid until its
    /// `update` or `cancel`.
    ///
    /// O(running + tokens of the step + table entries that changed), and O(blocks) for each request that is preempted,
    /// O(prompt) for each that is admitted; where one waits for blocks, O(its prefix) every sixteenth time. No
    /// allocation once the lists have grown, while nobody needs a block.
    ///
    /// # Errors
    /// `Corruption` if an invariant of the core is found broken; then every later call returns it.
    pub fn schedule(&mut self) -> Result<Option<PlannedStep<'_>>> {
        self.usable()?;
        if self.in_flight.step.is_some() {
            return Ok(None);
        }
        self.turns += 1;
        let planned = self.decide().and_then(|draft| {
            if draft.num_seqs == 0 {
                Ok(false)
            } else {
                self.write(draft).map(|()| true)
            }
        });
        let planned = self.guard(planned)?;
        if !planned {
            return Ok(None);
        }
        Ok(Some(self.planned()))
    }

    /// The plan in flight, if there is one.
    #[must_use]
    pub fn plan(&self) -> Option<PlannedStep<'_>> {
        self.in_flight.step.map(|_| self.planned())
    }

    /// The plans' memory, at the same address as long as the scheduler lives: for registering or pinning.
    #[must_use]
    pub fn plan_memory(&self) -> &[u8] {
        self.buffer.memory()
    }

    /// Ends the scheduler but for the plans' memory, which stays where it is.
    #[cfg(feature = "python")]
    pub(crate) fn into_plan_memory(self) -> PlanBuffer {
        self.buffer
    }

    /// True while a request is waiting or running.
    #[must_use]
    pub fn has_unfinished(&self) -> bool {
        self.requests.len() > 0
    }

    /// The configuration it was made with.
    #[must_use]
    pub const fn config(&self) -> &SchedulerConfig {
        &self.config
    }

    /// Blocks, tables and prefixes.
    #[must_use]
    pub const fn manager(&self) -> &KVCacheManager {
        &self.manager
    }

    /// As [`manager`](Self::manager), to be changed: sequences of other owners, namespaces, eviction. Steps are the
    /// scheduler's to begin and complete, and its own sequences are out of bounds.
    pub const fn manager_mut(&mut self) -> &mut KVCacheManager {
        &mut self.manager
    }

    /// Is this the sequence of a request? O(1).
    #[must_use]
    pub fn owns(&self, seq: SeqHandle) -> bool {
        self.manager.is_claimed(seq)
    }

    /// The step in flight.
    #[must_use]
    pub const fn step_in_flight(&self) -> Option<Step> {
        self.in_flight.step
    }

    /// Place of a request.
    fn find(&self, request_id: &str) -> Result<u32> {
        let unknown = || Error::UnknownRequest {
            request_id: request_id.into(),
        };
        self.by_id.get(request_id).copied().ok_or_else(unknown)
    }

    /// Blocks that an allocation can have at this moment.
    fn available_blocks(&self) -> u64 {
        let evictable = self.manager.cache().map_or(0, Reclaim::evictable);
        (self.manager.pool().num_free() + evictable) as u64
    }

    /// Refuses to go on after a corruption.
    fn usable(&self) -> Result<()> {
        self.poison.clone().map_or(Ok(()), Err)
    }

    /// Keeps the corruption that an error inside an operation stands for: every argument was checked before, so from
    /// then on nothing can be trusted.
    fn guard<T>(&mut self, result: Result<T>) -> Result<T> {
        result.map_err(|error| {
            let corruption = error.into_corruption();
            self.poison = Some(corruption.clone());
            corruption
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content::ContentKeys;
    use crate::ids::BlockId;
    use crate::namespace::NamespaceKey;
    use crate::request::RequestParams;

    /// Somebody holds a block as often as can be counted.
    fn hold_at_limit(scheduler: &mut Scheduler, block: BlockId) {
        let pool = scheduler.manager.parts_mut().0;
        let room = u32::MAX - pool.ref_count(block).unwrap();
        pool.retain_times(&[block], room).unwrap();
    }

    /// A step in which every sample is token 7.
    fn step(scheduler: &mut Scheduler) -> usize {
        let planned = scheduler.schedule().unwrap().expect("a step");
        let (step, samples) = (planned.plan().step(), planned.plan().num_samples());
        scheduler.update(step, &vec![7; samples], None, None).unwrap();
        scheduler.check().unwrap();
        samples
    }

    fn prompt() -> Vec<u32> {
        (0..40).collect()
    }

    #[test]
    fn who_cannot_share_a_prefix_for_its_references_waits() {
        let mut scheduler = Scheduler::new(SchedulerConfig::new(64)).unwrap();
        scheduler
            .add_request("first", &prompt(), RequestParams::new(1))
            .unwrap();
        step(&mut scheduler);
        let holder = scheduler
            .manager
            .add(&prompt(), NamespaceKey::default(), ContentKeys::default())
            .unwrap();
        let block = scheduler.manager.table(holder).unwrap()[0];
        hold_at_limit(&mut scheduler, block);
        scheduler
            .add_request("second", &prompt(), RequestParams::new(1))
            .unwrap();
        scheduler
            .add_request("third", &[1, 2, 3], RequestParams::new(1))
            .unwrap();
        for _ in 0..3 {
            assert!(scheduler.schedule().unwrap().is_none());
            scheduler.check().unwrap();
            let explained = scheduler.explain("second").unwrap().to_string();
            assert_eq!(explained, "waiting: references to a block it shares");
        }
        scheduler.abort("second").unwrap();
        assert_eq!(step(&mut scheduler), 1);
        assert!(!scheduler.has_unfinished());
    }

    #[test]
    fn who_cannot_merge_a_block_for_its_references_keeps_its_own() {
        let mut scheduler = Scheduler::new(SchedulerConfig::new(64)).unwrap();
        scheduler.add_request("a", &prompt(), RequestParams::new(40)).unwrap();
        let planned = scheduler.schedule().unwrap().unwrap();
        let number = planned.plan().step();
        // Somebody else computes the same meanwhile.
        let manager = &mut scheduler.manager;
        let other = manager
            .add(&prompt(), NamespaceKey::default(), ContentKeys::default())
            .unwrap();
        manager.allocate_slots(other, 40, 0).unwrap();
        manager.commit(other, 40).unwrap();
        let block = manager.table(other).unwrap()[1];
        hold_at_limit(&mut scheduler, block);
        scheduler.update(number, &[7], None, None).unwrap();
        scheduler.check().unwrap();
        let mut tokens = 1;
        while scheduler.has_unfinished() {
            tokens += step(&mut scheduler);
        }
        assert_eq!(tokens, 40);
    }

    #[test]
    fn a_group_that_cannot_share_its_prompt_for_its_references_goes_back_into_the_line() {
        let mut scheduler = Scheduler::new(SchedulerConfig::new(64)).unwrap();
        let group = RequestParams {
            n: 3,
            ..RequestParams::new(4)
        };
        scheduler.add_request("group", &prompt(), group).unwrap();
        scheduler
            .add_request("other", &[1, 2, 3], RequestParams::new(4))
            .unwrap();
        let planned = scheduler.schedule().unwrap().unwrap();
        let (number, samples) = (planned.plan().step(), planned.plan().num_samples());
        let lead = scheduler.requests[scheduler.by_id["group"]].children[0].seq.unwrap();
        let block = scheduler.manager.table(lead).unwrap()[0];
        hold_at_limit(&mut scheduler, block);
        let result = scheduler.update(number, &vec![7; samples], None, None).unwrap();
        assert_eq!((result.tokens.len(), result.finished.len()), (1, 0));
        scheduler.check().unwrap();
        for _ in 0..3 {
            assert_eq!(step(&mut scheduler), 1, "the other goes on");
        }
        assert!(scheduler.schedule().unwrap().is_none());
        let explained = scheduler.explain("group").unwrap().to_string();
        assert_eq!(explained, "preempted: references to a block it shares");
        assert_eq!(scheduler.abort("group").unwrap().len(), 3);
        scheduler.check().unwrap();
    }

    #[test]
    fn an_error_inside_an_operation_is_a_corruption_that_says_which() {
        let mut scheduler = Scheduler::new(SchedulerConfig::new(8)).unwrap();
        let inner = Error::OutOfBlocks { needed: 3, free: 1 };
        let error = scheduler.guard::<()>(Err(inner.clone())).unwrap_err();
        assert!(
            error.to_string().ends_with(" (needed 3 blocks, 1 can be had)"),
            "{error}"
        );
        let Error::Corruption { cause, .. } = &error else {
            panic!("{error:?}");
        };
        assert_eq!(cause.as_deref(), Some(&inner));
        assert_eq!(scheduler.schedule().unwrap_err(), error);
        assert_eq!(scheduler.update(1, &[], None, None).unwrap_err(), error);
        let broken = Error::corruption("A1", "the number of used blocks", 0, 4, 5);
        assert_eq!(scheduler.guard::<()>(Err(broken.clone())), Err(broken));
    }
}
