//! Level 0 in Python: `BlockPool`.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use super::arguments::{self, Arg};
use super::core::{Blocks, Core};
use super::errors;
use super::shared::{Handle, Shared};
use super::{arrays, numpy::NewIds};
use crate::ids::{BlockId, Step};
use crate::pool::{self, PoolStats};

/// The physical blocks of one tier, each an id below `num_blocks`. Block 0 is the null block and never handed out.
///
/// A block is free, used (held by somebody), cached (held by nobody, findable by its tokens, evictable) or fenced
/// (given back, but a step in flight may still read it):
/// ``num_free + num_cached + num_used + num_fenced == num_blocks - 1``.
///
/// `mgr.pool` and `sched.manager.pool` are pools like this one, over the same blocks.
///
/// Args:
///     num_blocks: blocks, the null block included; 2 to 2**31 - 1. About 20 bytes of memory each, once used.
///     block_size: tokens in a block, 1 to 65536.
///
/// Raises:
///     InvalidArgumentError: a size is out of range.
#[pyclass(frozen, module = "pagedcore", name = "BlockPool")]
pub struct BlockPool {
    pub core: Handle,
    /// Both never change; kept here to be read without the lock.
    pub num_blocks: usize,
    pub block_size: usize,
}

impl BlockPool {
    pub fn view(core: &Handle, num_blocks: usize, block_size: usize) -> Self {
        Self {
            core: Arc::clone(core),
            num_blocks,
            block_size,
        }
    }

    fn read_stats(&self, py: Python<'_>) -> PyResult<PoolStats> {
        self.core.call(py, |core| Ok(core.pool().stats()))
    }

    fn ids(&self, blocks: &Bound<'_, PyAny>) -> PyResult<Vec<BlockId>> {
        let ids = arrays::block_ids(blocks, "blocks", self.num_blocks)?;
        Ok(ids.into_iter().map(BlockId).collect())
    }
}

#[pymethods]
impl BlockPool {
    #[new]
    #[pyo3(signature = (num_blocks, block_size = Arg(None)), text_signature = "(num_blocks, block_size=16)")]
    fn new(num_blocks: &Bound<'_, PyAny>, block_size: Arg<'_>) -> PyResult<Self> {
        let py = num_blocks.py();
        let num_blocks = arguments::size(num_blocks, "num_blocks")?;
        let block_size = block_size.or(16, |b| arguments::size(b, "block_size"))?;
        let pool = py.detach(|| pool::BlockPool::new(num_blocks, block_size));
        let pool = pool.map_err(|e| errors::from_core(py, &e))?;
        Ok(Self {
            core: Shared::new(Core::Blocks(Box::new(Blocks::new(pool)))),
            num_blocks,
            block_size,
        })
    }

    /// Blocks, the null block included.
    #[getter]
    fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    /// Tokens in a block.
    #[getter]
    fn block_size(&self) -> usize {
        self.block_size
    }

    /// Blocks that can be had at once.
    #[getter]
    fn num_free(&self, py: Python<'_>) -> PyResult<usize> {
        Ok(self.read_stats(py)?.num_free)
    }

    /// Blocks held by nobody that are findable by their tokens, and evictable unless a step in flight reads them.
    #[getter]
    fn num_cached(&self, py: Python<'_>) -> PyResult<usize> {
        Ok(self.read_stats(py)?.num_cached)
    }

    /// Blocks held by somebody.
    #[getter]
    fn num_used(&self, py: Python<'_>) -> PyResult<usize> {
        Ok(self.read_stats(py)?.num_used)
    }

    /// Blocks given back that a step in flight may still read.
    #[getter]
    fn num_fenced(&self, py: Python<'_>) -> PyResult<usize> {
        Ok(self.read_stats(py)?.num_fenced)
    }

    /// Takes `n` blocks, each with one reference; cached blocks are evicted where free ones do not suffice.
    ///
    /// Runs of neighbouring ids are preferred. O(1) per block.
    ///
    /// Returns:
    ///     int32[n], the block ids.
    ///
    /// Raises:
    ///     OutOfBlocksError: fewer than `n` blocks are free or evictable (``needed``, ``free``). Nothing has changed.
    fn allocate<'py>(&self, n: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let py = n.py();
        let n = arguments::size(n, "n")?;
        // More than there are is refused below, with its numbers.
        let out = NewIds::new(py, n.min(self.num_blocks))?;
        let take = |core: &mut Core| {
            let (pool, cache) = core.pool_and_cache();
            pool.allocate(n, cache)
        };
        let blocks = self.core.call_sized(py, n, take)?;
        out.blocks(blocks)
    }

    /// Adds a reference to each of `blocks`, which must be held by somebody. O(1) per block.
    ///
    /// Raises:
    ///     BlockError: a block is out of range, null, or held by nobody. Nothing has changed.
    fn retain(&self, blocks: &Bound<'_, PyAny>) -> PyResult<()> {
        let py = blocks.py();
        let blocks = self.ids(blocks)?;
        let retain = |core: &mut Core| core.pool().retain(&blocks);
        self.core.call_sized(py, blocks.len(), retain)
    }

    /// Gives back one reference to each of `blocks` (a block named twice: two). Only what the caller holds.
    ///
    /// A block that nobody holds any more is cached if it is published, else free; it is reused when all steps begun
    /// up to `after_step` are complete. None: the newest step begun. 0: no step reads these blocks. O(1) per block.
    ///
    /// Raises:
    ///     StepError: `after_step` has not begun. BlockError: a block is out of range, null, or not held so often.
    ///         Nothing has changed.
    #[pyo3(signature = (blocks, after_step = None))]
    fn release(&self, blocks: &Bound<'_, PyAny>, after_step: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        let py = blocks.py();
        let after_step = arguments::optional(after_step, |s| arguments::step(s, "after_step"))?;
        let blocks = self.ids(blocks)?;
        let release = |core: &mut Core| {
            let (pool, cache) = core.pool_and_cache();
            pool.release(&blocks, after_step, cache)
        };
        self.core.call_sized(py, blocks.len(), release)
    }

    /// Begins a step and returns its number, counted from 1. Call it before the step's first table is read. O(1).
    ///
    /// Raises:
    ///     StepError: the pool belongs to a scheduler, which numbers the steps itself.
    fn begin_step(&self, py: Python<'_>) -> PyResult<Step> {
        self.core.call(py, |core| Ok(core.pool_of_steps()?.0.begin_step()))
    }

    /// Completes a step in flight, in any order: blocks that only it and completed steps could read are reusable.
    ///
    /// Raises:
    ///     StepError: the step has not begun or is complete already, or the pool belongs to a scheduler.
    fn complete_step(&self, step: &Bound<'_, PyAny>) -> PyResult<()> {
        let py = step.py();
        let step = arguments::step(step, "step")?;
        let fences = |core: &mut Core| core.pool().fences_up_to(step);
        self.core.call_weighed(py, fences, |core| {
            let (pool, cache) = core.pool_of_steps()?;
            pool.complete_step(step, cache)
        })
    }

    /// References to a block; 0 for the null block and for blocks that nobody holds. O(1).
    ///
    /// Raises:
    ///     BlockError: the block is out of range.
    fn ref_count(&self, block: &Bound<'_, PyAny>) -> PyResult<u32> {
        let py = block.py();
        let block = arguments::block_id(block, "block", self.num_blocks)?;
        self.core.call(py, |core| core.pool().ref_count(BlockId(block)))
    }

    /// Counts at this moment, and totals since the pool was made. O(1).
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        pool_stats(py, &self.read_stats(py)?)
    }

    /// Checks every invariant. O(num_blocks); for tests.
    ///
    /// Raises:
    ///     CorruptionError: one is broken (``hint``); every later call raises it too.
    fn check(&self, py: Python<'_>) -> PyResult<()> {
        self.core.call_detached(py, Core::check)
    }

    /// Ends this pool and whatever shares its blocks: the cache, manager and scheduler over it. Idempotent.
    /// O(its memory).
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
        let sizes = format!("num_blocks={}, block_size={}", self.num_blocks, self.block_size);
        match self.read_stats(py) {
            Ok(s) => format!(
                "BlockPool({sizes}, num_free={}, num_cached={}, num_used={}, num_fenced={})",
                s.num_free, s.num_cached, s.num_used, s.num_fenced
            ),
            Err(_) => format!("BlockPool({sizes}, unusable)"),
        }
    }
}

/// A pool's numbers by name.
pub fn pool_stats<'py>(py: Python<'py>, stats: &PoolStats) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("num_blocks", stats.num_blocks)?;
    dict.set_item("block_size", stats.block_size)?;
    dict.set_item("num_free", stats.num_free)?;
    dict.set_item("num_cached", stats.num_cached)?;
    dict.set_item("num_used", stats.num_used)?;
    dict.set_item("num_fenced", stats.num_fenced)?;
    dict.set_item("peak_used", stats.peak_used)?;
    dict.set_item("allocated", stats.allocated)?;
    dict.set_item("evicted", stats.evicted)?;
    dict.set_item("newest_step", stats.newest_step)?;
    dict.set_item("completed_through", stats.completed_through)?;
    Ok(dict)
}
