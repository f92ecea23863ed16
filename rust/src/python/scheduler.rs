//! Level 3 in Python: `Scheduler`, `StepResult`, `Explanation`.

use std::sync::Arc;

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use super::arguments::{self, Arg, type_name};
use super::config::SchedulerConfig;
use super::core::Core;
use super::errors::{self, Class};
use super::manager::KVCacheManager;
use super::plan::{Ring, StepPlan, Summary};
use super::prefix::{namespace_key, read_content_keys};
use super::shared::{Handle, Shared};
use super::{arrays, numpy};
use crate::request::{EndReason, RequestParams};
use crate::scheduler::{self, Finished, Reason};
use crate::tokens::Vocabulary;

/// Continuous batching over a `KVCacheManager`: first come first served, chunked prefill mixed with decode.
///
/// The loop of a server: `plan = schedule()`, zero and copy the blocks it names, run the model over its arrays, sample,
/// `update(plan.step, sampled)`. Requests may be added, finished and aborted at any time, from any thread.
///
/// Args:
///     config: sizes and limits.
///     manager: an existing manager of the same sizes, without a step in flight. Its sequences stay where they are, and
///         `manager` goes on as a view of `sched.manager`. None: a new one.
///     clock: not supported by this version, which reads none.
///
/// Raises:
///     InvalidArgumentError: `manager` does not fit `config`; it is as before then.
#[pyclass(frozen, module = "pagedcore", name = "Scheduler")]
pub struct Scheduler {
    core: Handle,
    config: SchedulerConfig,
    vocabulary: Vocabulary,
    ring: Arc<Ring>,
}

impl Scheduler {
    fn call<R: Send>(
        &self,
        py: Python<'_>,
        f: impl FnOnce(&mut scheduler::Scheduler) -> crate::error::Result<R> + Send,
    ) -> PyResult<R> {
        self.core.call(py, |core| f(core.scheduler()?))
    }

    /// A call of which the scheduler knows how much it is.
    fn weighed<R: Send>(
        &self,
        py: Python<'_>,
        size: impl FnOnce(&scheduler::Scheduler) -> usize,
        mut f: impl FnMut(&mut scheduler::Scheduler) -> crate::error::Result<R> + Send,
    ) -> PyResult<R> {
        let size = |core: &mut Core| core.scheduler().map_or(0, |scheduler| size(scheduler));
        self.core.call_weighed(py, size, |core| f(core.scheduler()?))
    }

    /// Ends a request, or one of its sequences.
    fn end(&self, py: Python<'_>, id: &str, reason: &EndReason, index: Option<usize>) -> PyResult<Vec<Ended>> {
        let size = |scheduler: &scheduler::Scheduler| scheduler.size_of_finish(id);
        let finished = self.weighed(py, size, |scheduler| scheduler.finish(id, reason, index))?;
        Ok(ended(&finished))
    }
}

#[pymethods]
impl Scheduler {
    #[new]
    #[pyo3(signature = (config, manager = None, clock = None))]
    fn new(
        config: &Bound<'_, PyAny>,
        manager: Option<&Bound<'_, PyAny>>,
        clock: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let py = config.py();
        let wrong =
            |name, class, got| PyTypeError::new_err(format!("{name} must be a {class}, not {}", type_name(got)));
        let config = config
            .cast::<SchedulerConfig>()
            .map_err(|_| wrong("config", "SchedulerConfig", config))?
            .get();
        if let Some(clock) = clock {
            return Err(errors::new(
                py,
                Class::Unsupported,
                "clock is not supported: this scheduler reads no clock",
            )
            .with("argument", "clock")
            .with("got", clock)
            .with("expected", "None")
            .into());
        }
        let core = match manager {
            None => {
                let made = py.detach(|| scheduler::Scheduler::new(config.0.clone()));
                Shared::new(Core::Scheduler(Box::new(
                    made.map_err(|error| errors::from_core(py, &error))?,
                )))
            }
            Some(manager) => {
                let view = manager
                    .cast::<KVCacheManager>()
                    .map_err(|_| wrong("manager", "KVCacheManager", manager))?;
                let core = Arc::clone(&view.get().core);
                if !core.call_place(py, |place| Core::adopt(place, &config.0))? {
                    return Err(
                        errors::invalid(manager, "manager", "the manager belongs to a scheduler already").into(),
                    );
                }
                core
            }
        };
        let vocabulary = Vocabulary::new(config.0.vocab_size).map_err(|error| errors::from_core(py, &error))?;
        let ring = Arc::new(Ring::new(py, &core)?);
        Ok(Self {
            core,
            config: config.clone(),
            vocabulary,
            ring,
        })
    }

    /// Sizes and limits.
    #[getter]
    fn config(&self) -> SchedulerConfig {
        self.config.clone()
    }

    /// Blocks, tables and prefixes. Steps are the scheduler's to begin and complete, and so are its own sequences.
    #[getter]
    fn manager(&self) -> KVCacheManager {
        let c = &self.config.0;
        KVCacheManager::view(
            &self.core,
            c.num_blocks,
            c.block_size,
            c.enable_prefix_caching,
            self.vocabulary,
        )
    }

    /// Whether a request is waiting or running. O(1).
    #[getter]
    fn has_unfinished(&self, py: Python<'_>) -> PyResult<bool> {
        self.call(py, |scheduler| Ok(scheduler.has_unfinished()))
    }

    /// Adds a request at the end of the line of its priority. It takes no block before it is admitted. O(prompt).
    ///
    /// Args:
    ///     request_id: a str that no unfinished request has.
    ///     prompt_token_ids: 1 to max_model_len - 1 tokens.
    ///     max_tokens: tokens to generate for each sequence; max_model_len may end it sooner.
    ///     stop_token_ids: a sequence that samples one of these ends with "stop"; the token is part of its output.
    ///     n: sequences that continue the prompt, (request_id, 0) to (request_id, n - 1).
    ///     priority: smaller is more urgent; ties go to the earlier arrival.
    ///     tenant, cache_salt, extra_keys: its namespace, see `PrefixCache.namespace`.
    ///     content_keys: (start, stop, bytes) for positions whose content is not told by token ids.
    ///     pipelined: False: not scheduled while a sample of it is outstanding.
    ///
    /// Raises:
    ///     RequestTooLargeError: it could never run, even alone (``needed``, ``limit``). DuplicateRequestError.
    ///     TokenOutOfRangeError, InvalidArgumentError: nothing was added.
    #[pyo3(
        signature = (request_id, prompt_token_ids, max_tokens, stop_token_ids = Arg(None), n = Arg(None),
                     priority = Arg(None), tenant = Arg(None), cache_salt = Arg(None), extra_keys = Arg(None),
                     content_keys = Arg(None), pipelined = Arg(None)),
        text_signature = "($self, request_id, prompt_token_ids, max_tokens, stop_token_ids=(), n=1, priority=0, \
                          tenant='', cache_salt='', extra_keys=(), content_keys=(), pipelined=True)"
    )]
    #[allow(clippy::too_many_arguments)] // keywords
    fn add_request(
        &self,
        request_id: &Bound<'_, PyAny>,
        prompt_token_ids: &Bound<'_, PyAny>,
        max_tokens: &Bound<'_, PyAny>,
        stop_token_ids: Arg<'_>,
        n: Arg<'_>,
        priority: Arg<'_>,
        tenant: Arg<'_>,
        cache_salt: Arg<'_>,
        extra_keys: Arg<'_>,
        content_keys: Arg<'_>,
        pipelined: Arg<'_>,
    ) -> PyResult<()> {
        let id = arguments::text(request_id, "request_id")?;
        let mut params = RequestParams::new(arguments::size(max_tokens, "max_tokens")?);
        params.stop_token_ids = stop_token_ids.or(Vec::new(), |ids| {
            arrays::token_ids(ids, "stop_token_ids", self.vocabulary)
        })?;
        params.n = n.or(1, |n| arguments::size(n, "n"))?;
        params.priority = priority.or(0, |p| arguments::int(p, "priority", i64::MIN, i64::MAX))?;
        params.namespace = namespace_key(&tenant, &cache_salt, &extra_keys)?;
        params.content_keys = read_content_keys(&content_keys)?;
        params.pipelined = pipelined.or(true, |p| arguments::flag(p, "pipelined"))?;
        let prompt = arrays::token_ids(prompt_token_ids, "prompt_token_ids", self.vocabulary)?;
        self.core.call_sized(request_id.py(), prompt.len(), |core| {
            core.scheduler()?.add_request(&id, &prompt, params)
        })
    }

    /// Plans the next step: decides who computes what, and writes every array of it.
    ///
    /// O(running sequences + tokens of the step + table entries that changed), O(blocks) for each request that is
    /// preempted, O(prompt) for each that is admitted. The interpreter stays attached where that is little.
    ///
    /// Returns:
    ///     the plan, valid until its `update` or `cancel`; None if nothing can run (`explain` says why), or while the
    ///     step before is in flight.
    fn schedule(&self, py: Python<'_>) -> PyResult<Option<StepPlan>> {
        let summary = self.weighed(py, scheduler::Scheduler::size_of_schedule, |scheduler| {
            Ok(scheduler.schedule()?.map(|planned| Summary::of(planned.plan())))
        })?;
        Ok(summary.map(|summary| {
            self.ring.open(summary.step);
            StepPlan::of_ring(&self.core, &self.ring, summary)
        }))
    }

    /// Takes the samples of a step: what it computed becomes findable, samples are appended, sequences end.
    ///
    /// Rows of requests that ended since are ignored. O(sequences of the step + copies + blocks to zero), O(blocks) for
    /// those that end or become full and for those whose fence passes.
    ///
    /// Args:
    ///     step: `plan.step`.
    ///     sampled_token_ids: int32 or int64, one for each of the plan's `sample_seqs`.
    ///     num_sampled: for each sample how many tokens it is; this version: 1.
    ///     failed: bool for each sample. Its request ends with "error", and publishes nothing of this step; its other
    ///         samples are ignored.
    ///
    /// Raises:
    ///     StepError: `step` is not the one in flight. InvalidArgumentError: an array of the wrong length.
    ///     TokenOutOfRangeError: a sample outside the vocabulary. Nothing has changed, and the plan is still valid.
    #[pyo3(signature = (step, sampled_token_ids, num_sampled = None, failed = None))]
    fn update(
        &self,
        step: &Bound<'_, PyAny>,
        sampled_token_ids: &Bound<'_, PyAny>,
        num_sampled: Option<&Bound<'_, PyAny>>,
        failed: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<StepResult> {
        let py = step.py();
        let step = arguments::step(step, "step")?;
        let sampled = arrays::samples(sampled_token_ids, "sampled_token_ids")?;
        let counts = arguments::optional(num_sampled, |ids| arrays::counts(ids, "num_sampled"))?;
        let failed = arguments::optional(failed, |flags| arrays::flags(flags, "failed"))?;
        let result = self.weighed(py, scheduler::Scheduler::size_of_update, |scheduler| {
            scheduler
                .update(step, &sampled, counts.as_deref(), failed.as_deref())
                .cloned()
        })?;
        self.ring.close(step);
        Ok(StepResult(result))
    }

    /// Undoes a step, as if it had not been scheduled: its tokens are computed by a later one.
    ///
    /// O(sequences of the step + copies + blocks to zero + blocks whose fence passes).
    ///
    /// Raises:
    ///     StepError: `step` is not the one in flight.
    fn cancel(&self, step: &Bound<'_, PyAny>) -> PyResult<()> {
        let py = step.py();
        let step = arguments::step(step, "step")?;
        self.weighed(py, scheduler::Scheduler::size_of_update, |scheduler| {
            scheduler.cancel(step)
        })?;
        self.ring.close(step);
        Ok(())
    }

    /// Ends a request, or one of its sequences, for a reason of the caller's own (a stop string, a deadline).
    ///
    /// O(n + blocks given up + log waiting).
    ///
    /// Returns:
    ///     the sequences that ended now, as (request_id, index, reason); none if `index` had ended before.
    ///
    /// Raises:
    ///     UnknownRequestError: there is no such request, or it has ended.
    #[pyo3(signature = (request_id, reason, index = None))]
    fn finish(
        &self,
        request_id: &Bound<'_, PyAny>,
        reason: &Bound<'_, PyAny>,
        index: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Vec<Ended>> {
        let id = arguments::text(request_id, "request_id")?;
        let reason = EndReason::from(arguments::text(reason, "reason")?.as_str());
        let index = arguments::optional(index, |i| arguments::size(i, "index"))?;
        self.end(request_id.py(), &id, &reason, index)
    }

    /// Ends a request with "abort". A step in flight goes on; what it samples for the request is ignored.
    ///
    /// O(n + blocks given up + log waiting).
    ///
    /// Returns:
    ///     the sequences that ended now, as (request_id, index, reason).
    ///
    /// Raises:
    ///     UnknownRequestError: there is no such request, or it has ended.
    fn abort(&self, request_id: &Bound<'_, PyAny>) -> PyResult<Vec<Ended>> {
        let id = arguments::text(request_id, "request_id")?;
        self.end(request_id.py(), &id, &EndReason::Abort, None)
    }

    /// Where a request is, and what keeps it from getting tokens. O(n).
    ///
    /// Raises:
    ///     UnknownRequestError: there is no such request, or it has ended.
    fn explain(&self, request_id: &Bound<'_, PyAny>) -> PyResult<Explanation> {
        let id = arguments::text(request_id, "request_id")?;
        self.call(request_id.py(), |scheduler| scheduler.explain(&id))
            .map(Explanation)
    }

    /// Counts at this moment, and totals since the scheduler was made. O(1).
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let s = self.call(py, |scheduler| Ok(scheduler.stats()))?;
        let dict = PyDict::new(py);
        dict.set_item("running", s.running)?;
        dict.set_item("waiting", s.waiting)?;
        dict.set_item("rows", s.rows)?;
        dict.set_item("added", s.added)?;
        dict.set_item("stopped", s.stopped)?;
        dict.set_item("length", s.length)?;
        dict.set_item("failed", s.failed)?;
        dict.set_item("aborted", s.aborted)?;
        dict.set_item("finished_by_caller", s.finished_by_caller)?;
        dict.set_item("steps", s.steps)?;
        dict.set_item("cancelled_steps", s.cancelled_steps)?;
        dict.set_item("scheduled_tokens", s.scheduled_tokens)?;
        dict.set_item("sampled_tokens", s.sampled_tokens)?;
        dict.set_item("preemptions", s.preemptions)?;
        dict.set_item("prefix_query_tokens", s.prefix_query_tokens)?;
        dict.set_item("prefix_hit_tokens", s.prefix_hit_tokens)?;
        dict.set_item("block_copies", s.block_copies)?;
        dict.set_item("blocks_zeroed", s.blocks_zeroed)?;
        Ok(dict)
    }

    /// Checks every invariant of the scheduler, the sequences, the cache and the pool. O(num_blocks + tokens).
    ///
    /// Raises:
    ///     CorruptionError: one is broken; every later call raises it too.
    fn check(&self, py: Python<'_>) -> PyResult<()> {
        self.core.call_detached(py, Core::check)
    }

    /// Ends this scheduler and whatever shares its blocks: its manager, pool and cache, and the plan in flight. Idempotent. O(its memory).
    ///
    /// Calls that run are done first; later ones raise `ClosedError`. Sizes can still be read.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        self.core.close(py)
    }

    /// Whether it was closed.
    #[getter]
    fn closed(&self) -> bool {
        self.core.is_closed()
    }

    fn __enter__(slf: PyRef<'_, Self>) -> PyResult<PyRef<'_, Self>> {
        slf.core.open(slf.py())?;
        Ok(slf)
    }

    #[pyo3(signature = (*_error))]
    fn __exit__(&self, py: Python<'_>, _error: &Bound<'_, PyTuple>) -> PyResult<()> {
        self.core.close(py)
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        match self.call(py, |scheduler| Ok((scheduler.stats(), scheduler.step_in_flight()))) {
            Ok((stats, step)) => format!(
                "Scheduler(running={}, waiting={}, step_in_flight={})",
                stats.running,
                stats.waiting,
                step.map_or_else(|| "None".to_owned(), |step| step.to_string())
            ),
            Err(_) => "Scheduler(unusable)".to_owned(),
        }
    }
}

/// (request_id, index, reason).
type Ended = (String, usize, String);

fn ended(finished: &[Finished]) -> Vec<Ended> {
    finished
        .iter()
        .map(|f| (f.request_id.to_string(), f.index, f.reason.to_string()))
        .collect()
}

/// What an update came to.
#[pyclass(frozen, module = "pagedcore", name = "StepResult")]
pub struct StepResult(scheduler::StepResult);

#[pymethods]
impl StepResult {
    /// [(request_id, index, reason)]: sequences that ended in this update. Reasons: "stop", "length", "error".
    #[getter]
    fn finished(&self) -> Vec<Ended> {
        ended(&self.0.finished)
    }

    /// int32: rows that got a token; rows of sequences that had ended, or were preempted, are not among them.
    #[getter]
    fn rows<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        numpy::new_i32_signed(py, &self.0.rows)
    }

    /// int32: their tokens.
    #[getter]
    fn tokens<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        numpy::new_i32_signed(py, &self.0.tokens)
    }

    fn __repr__(&self) -> String {
        format!(
            "StepResult(num_tokens={}, num_finished={})",
            self.0.tokens.len(),
            self.0.finished.len()
        )
    }
}

/// Where a request is, and why. As text: "waiting: blocks (needed 12, available 7)".
#[pyclass(frozen, module = "pagedcore", name = "Explanation")]
pub struct Explanation(scheduler::Explanation);

#[pymethods]
impl Explanation {
    /// "running", "waiting" or "preempted".
    #[getter]
    fn phase(&self) -> String {
        self.0.phase.to_string()
    }

    /// "token_budget", "rows", "blocks", "running_short_of_blocks", "table_updates", "references", "behind" or
    /// "not_considered"; None for a request that was served in the last step.
    #[getter]
    fn reason(&self) -> Option<&'static str> {
        self.0.reason.as_ref().map(|reason| match reason {
            Reason::TokenBudget => "token_budget",
            Reason::Rows { .. } => "rows",
            Reason::Blocks { .. } => "blocks",
            Reason::RunningShortOfBlocks => "running_short_of_blocks",
            Reason::TableUpdates => "table_updates",
            Reason::References => "references",
            Reason::Behind { .. } => "behind",
            Reason::NotConsidered => "not_considered",
        })
    }

    /// Rows or blocks that it needs, where these are the reason.
    #[getter]
    fn needed(&self) -> Option<u64> {
        match self.0.reason {
            Some(Reason::Rows { needed, .. }) => Some(needed as u64),
            Some(Reason::Blocks { needed, .. }) => Some(needed),
            _ => None,
        }
    }

    /// Rows or blocks that there are, where these are the reason.
    #[getter]
    fn available(&self) -> Option<u64> {
        match self.0.reason {
            Some(Reason::Rows { available, .. }) => Some(available as u64),
            Some(Reason::Blocks { available, .. }) => Some(available),
            _ => None,
        }
    }

    /// The request before it in the line, where that is the reason.
    #[getter]
    fn behind(&self) -> Option<String> {
        match &self.0.reason {
            Some(Reason::Behind { request_id }) => Some(request_id.to_string()),
            _ => None,
        }
    }

    fn __str__(&self) -> String {
        self.0.to_string()
    }

    fn __repr__(&self) -> String {
        format!("Explanation({:?})", self.0.to_string())
    }
}
