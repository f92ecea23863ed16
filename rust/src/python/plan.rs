//! A step's plan in Python: `StepPlan`, whose arrays are views made when asked for.
//!
//! # Whose memory
//! The scheduler writes its plans into memory that stays at one address as long as it lives. `PlanMemory` tells NumPy
//! that address and holds the scheduler's core; every array holds `PlanMemory`. So an array kept too long shows a later
//! plan, but never memory that was given back. Through the plan itself a step that is over is refused.
//!
//! A plan that came in a buffer (`StepPlan.from_buffer`) has a copy of its own, which is what was checked.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyTuple};

use super::errors::{self, Class};
use super::shared::Handle;
use super::{arrays, numpy};
use crate::error::Error;
use crate::ids::Step;
use crate::plan::{self, ARRAYS, Array, ArrayInfo};
use crate::scheduler::PlannedStep;

/// Names the memory of a scheduler's plans to NumPy, and keeps it alive.
#[pyclass(frozen)]
struct PlanMemory {
    address: usize,
    len: usize,
    /// Owns the memory.
    _core: Handle,
}

#[pymethods]
impl PlanMemory {
    /// NumPy's array interface: writable bytes, as torch takes no others without a warning. What a server writes there
    /// is seen by nobody but the server; lines of the block table are kept between steps, though.
    #[getter]
    fn __array_interface__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let interface = PyDict::new(py);
        interface.set_item("version", 3)?;
        interface.set_item("typestr", "|u1")?;
        interface.set_item("shape", (self.len,))?;
        interface.set_item("data", (self.address, false))?;
        Ok(interface)
    }
}

/// A plan's numbers, and where its arrays lie.
pub struct Summary {
    pub step: Step,
    num_seqs: usize,
    num_tokens: usize,
    num_samples: usize,
    max_query_len: usize,
    max_seq_len: usize,
    block_size: usize,
    head_bytes: usize,
    total_bytes: usize,
    arrays: [ArrayInfo; ARRAYS.len()],
}

impl Summary {
    pub fn of(plan: &plan::StepPlan<'_>) -> Self {
        Self {
            step: plan.step(),
            num_seqs: plan.num_seqs(),
            num_tokens: plan.num_tokens(),
            num_samples: plan.num_samples(),
            max_query_len: plan.max_query_len(),
            max_seq_len: plan.max_seq_len(),
            block_size: plan.block_size(),
            head_bytes: plan.head_bytes(),
            total_bytes: plan.buffer().len(),
            arrays: ARRAYS.map(|array| plan.info(array)),
        }
    }
}

/// The plans' memory, and which step is in it.
pub struct Ring {
    /// Of the memory, which is allocated once, and given up by the core when it ends.
    address: usize,
    len: usize,
    /// uint8, all of it. Made by the first array, so that a scheduler is made without `NumPy`, and nothing can fail
    /// after it has taken its manager.
    bytes: PyOnceLock<Py<PyAny>>,
    /// The step in flight; 0 is none.
    step: AtomicU64,
}

impl Ring {
    pub fn new(py: Python<'_>, core: &Handle) -> PyResult<Self> {
        let (address, len) = core.call(py, |core| {
            let memory = core.scheduler()?.plan_memory();
            Ok((memory.as_ptr() as usize, memory.len()))
        })?;
        Ok(Self {
            address,
            len,
            bytes: PyOnceLock::new(),
            step: AtomicU64::new(0),
        })
    }

    fn bytes(&self, py: Python<'_>, core: &Handle) -> PyResult<&Py<PyAny>> {
        self.bytes.get_or_try_init(py, || {
            let memory = PlanMemory {
                address: self.address,
                len: self.len,
                _core: Arc::clone(core),
            };
            let memory = Bound::new(py, memory)?;
            Ok(numpy::over(memory.as_any())?.unbind())
        })
    }

    pub fn open(&self, step: Step) {
        self.step.store(step, Ordering::Release);
    }

    pub fn close(&self, step: Step) {
        let _ = self.step.compare_exchange(step, 0, Ordering::AcqRel, Ordering::Relaxed);
    }
}

/// Everything that one forward pass needs to know. The arrays are ranges of one buffer, each aligned to 64 bytes.
///
/// T tokens, S sequences, K samples, W blocks of the longest sequence. Arrays are views that are made when asked for;
/// they are valid until `update` or `cancel` of the step returns, and asking later is a `StepError`.
#[pyclass(frozen, module = "pagedcore", name = "StepPlan")]
pub struct StepPlan {
    summary: Summary,
    source: Source,
}

enum Source {
    Ring {
        core: Handle,
        ring: Arc<Ring>,
    },
    /// uint8, a copy of the buffer.
    Copy(Py<PyAny>),
}

impl StepPlan {
    pub fn of_ring(core: &Handle, ring: &Arc<Ring>, summary: Summary) -> Self {
        Self {
            summary,
            source: Source::Ring {
                core: Arc::clone(core),
                ring: Arc::clone(ring),
            },
        }
    }

    /// The memory that the arrays are in.
    fn memory(&self, py: Python<'_>) -> PyResult<&Py<PyAny>> {
        match &self.source {
            Source::Copy(memory) => Ok(memory),
            Source::Ring { core, .. } if core.is_closed() => Err(errors::from_core(py, &Error::Closed)),
            Source::Ring { core, ring } if ring.step.load(Ordering::Acquire) == self.summary.step => {
                ring.bytes(py, core)
            }
            Source::Ring { .. } => Err(self.over(py)),
        }
    }

    fn over(&self, py: Python<'_>) -> PyErr {
        let step = self.summary.step;
        errors::new(py, Class::Step, format!("step {step} is over: its arrays are gone"))
            .hint("copy what is needed after update() or cancel()")
            .with("step", step)
            .into()
    }

    fn array<'py>(&self, py: Python<'py>, array: Array) -> PyResult<Bound<'py, PyAny>> {
        numpy::view(self.memory(py)?.bind(py), &self.summary.arrays[array as usize])
    }

    /// What the scheduler knows by name.
    fn planned<R: Send>(
        &self,
        py: Python<'_>,
        what: &str,
        f: impl FnOnce(&PlannedStep<'_>) -> R + Send,
    ) -> PyResult<R> {
        let Source::Ring { core, .. } = &self.source else {
            return Err(errors::new(
                py,
                Class::Unsupported,
                format!("{what} do not travel in a plan's buffer"),
            )
            .with("argument", what)
            .into());
        };
        let step = self.summary.step;
        let told = core.call(py, |core| {
            let planned = core.scheduler()?.plan();
            Ok(planned
                .filter(|planned| planned.plan().step() == step)
                .map(|planned| f(&planned)))
        })?;
        told.ok_or_else(|| self.over(py))
    }
}

#[pymethods]
impl StepPlan {
    /// Reads a plan out of another process's `plan.buffer`. O(plan).
    ///
    /// Every shape, offset and index inside the plan is checked. What indexes something outside is only known not to be
    /// negative: the reader sees to it that blocks and slots are in its pool, `rows`, `sample_seqs` and `table_updates`
    /// in its tables, `input_sources` in the samples before, and `input_ids` in its vocabulary.
    ///
    /// The plan has a copy of the bytes. `request_ids`, `started` and `preempted` stay with the scheduler.
    ///
    /// Args:
    ///     buf: bytes or a contiguous uint8 buffer; it may be longer than the plan.
    ///
    /// Raises:
    ///     InvalidArgumentError: it is not a whole plan of this format and byte order, or an index in it is out of
    ///     range.
    #[staticmethod]
    fn from_buffer(buf: &Bound<'_, PyAny>) -> PyResult<Self> {
        let py = buf.py();
        let (words, len) = arrays::words(buf, "buf")?;
        let read = py.detach(|| {
            let bytes: &[u8] = bytemuck::cast_slice(&words);
            plan::StepPlan::from_buffer(&bytes[..len]).map(|plan| Summary::of(&plan))
        });
        let summary = read.map_err(|error| errors::from_core(py, &error))?;
        let memory = numpy::aligned_bytes(py, &words)?;
        Ok(Self {
            summary,
            source: Source::Copy(memory.unbind()),
        })
    }

    /// The step's number, counted from 1.
    #[getter]
    fn step(&self) -> u64 {
        self.summary.step
    }

    /// Sequences in this step (S).
    #[getter]
    fn num_seqs(&self) -> usize {
        self.summary.num_seqs
    }

    /// Tokens in this step (T).
    #[getter]
    fn num_tokens(&self) -> usize {
        self.summary.num_tokens
    }

    /// Samples wanted (K); 0 if all there is are chunks inside prompts.
    #[getter]
    fn num_samples(&self) -> usize {
        self.summary.num_samples
    }

    /// Most tokens that one sequence has in this step.
    #[getter]
    fn max_query_len(&self) -> usize {
        self.summary.max_query_len
    }

    /// Largest of `seq_lens`.
    #[getter]
    fn max_seq_len(&self) -> usize {
        self.summary.max_seq_len
    }

    /// Tokens in a block.
    #[getter]
    fn block_size(&self) -> usize {
        self.summary.block_size
    }

    /// Bytes of `buffer` before the block table: what moves where a table is kept on the device.
    #[getter]
    fn head_bytes(&self) -> usize {
        self.summary.head_bytes
    }

    /// S strings: the request of each sequence.
    #[getter]
    fn request_ids(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        self.planned(py, "request_ids", |planned| {
            planned.requests().map(|(id, _)| id.to_string()).collect()
        })
    }

    /// [(row, request_id, index)]: rows assigned since the last plan, also after a preemption. A server that keeps
    /// arrays by row resets these.
    #[getter]
    fn started(&self, py: Python<'_>) -> PyResult<Vec<(u32, String, u32)>> {
        self.planned(py, "started", |planned| {
            planned
                .started()
                .iter()
                .map(|s| (s.row, s.request_id.to_string(), s.index))
                .collect()
        })
    }

    /// Requests preempted since the last plan.
    #[getter]
    fn preempted(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        self.planned(py, "preempted", |planned| {
            planned.preempted().iter().map(ToString::to_string).collect()
        })
    }

    /// int32[T]: tokens to embed; -1 where the token is not known yet.
    #[getter]
    fn input_ids<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.array(py, Array::InputIds)
    }

    /// int32[T]: where `input_ids` is -1, the index into the previous plan's samples; else -1.
    #[getter]
    fn input_sources<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.array(py, Array::InputSources)
    }

    /// int32[T]: places of the tokens in their sequences.
    #[getter]
    fn positions<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.array(py, Array::Positions)
    }

    /// int32[S + 1]: the tokens of sequence i are query_start_loc[i] to query_start_loc[i + 1].
    #[getter]
    fn query_start_loc<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.array(py, Array::QueryStartLoc)
    }

    /// int32[S]: tokens of each sequence after this step, its tokens in this step included.
    #[getter]
    fn seq_lens<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.array(py, Array::SeqLens)
    }

    /// int32[S]: the stable row of each sequence, in [0, max_num_seqs) while it runs.
    #[getter]
    fn rows<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.array(py, Array::Rows)
    }

    /// int32[K]: the token whose logits give each sample. The last token of a prompt with n = 4 stands four times.
    #[getter]
    fn logits_indices<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.array(py, Array::LogitsIndices)
    }

    /// int32[K]: the stable row of the sequence that each sample belongs to.
    #[getter]
    fn sample_seqs<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.array(py, Array::SampleSeqs)
    }

    /// int64[T]: slots that the tokens' keys and values are written to.
    #[getter]
    fn slot_mapping<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.array(py, Array::SlotMapping)
    }

    /// int32[S, W], rows strided: the blocks of each sequence, 0 after its last one.
    ///
    /// Read only what is in it, or copy it first: lines are kept from step to step, and an entry that is overwritten
    /// here (or through `buffer`) is told wrongly by later plans until it changes.
    #[getter]
    fn block_table<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.array(py, Array::BlockTable)
    }

    /// int32[m, 3]: (row, index, block) changes for a table kept on a device.
    #[getter]
    fn table_updates<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.array(py, Array::TableUpdates)
    }

    /// int32[n, 2]: (src, dst) blocks to copy, after zeroing and before writing.
    #[getter]
    fn block_copies<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.array(py, Array::BlockCopies)
    }

    /// int32[z]: blocks to zero first.
    #[getter]
    fn blocks_to_zero<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.array(py, Array::BlocksToZero)
    }

    /// uint8: the whole plan. One copy moves it to a device, one broadcast to other ranks (`from_buffer`).
    #[getter]
    fn buffer<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        numpy::front(self.memory(py)?.bind(py), self.summary.total_bytes)
    }

    /// The arrays that each group of layers has its own of (slot_mapping, block_table, table_updates, block_copies,
    /// blocks_to_zero), by group. One group: this plan.
    #[getter]
    fn groups(slf: Bound<'_, Self>) -> PyResult<Bound<'_, PyTuple>> {
        PyTuple::new(slf.py(), [&slf])
    }

    fn __repr__(&self) -> String {
        format!(
            "StepPlan(step={}, num_seqs={}, num_tokens={}, num_samples={})",
            self.summary.step, self.summary.num_seqs, self.summary.num_tokens, self.summary.num_samples
        )
    }
}
