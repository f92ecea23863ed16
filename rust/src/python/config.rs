//! What levels are made from, in Python: `KVGroup`, `SchedulerConfig`.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use super::arguments::{self, Arg, items, type_name};
use super::errors;
use crate::{manager, scheduler};

/// Layers that share a block table.
///
/// Args:
///     window: the attention window in tokens; None is full attention.
#[pyclass(frozen, eq, hash, module = "pagedcore", name = "KVGroup")]
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct KVGroup {
    /// The attention window in tokens; None is full attention.
    #[pyo3(get)]
    window: Option<u32>,
}

#[pymethods]
impl KVGroup {
    #[new]
    #[pyo3(signature = (window = None))]
    fn new(window: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        Ok(Self {
            window: arguments::optional(window, |w| arguments::count(w, "window", 1))?,
        })
    }

    /// What pickle makes an equal one from.
    fn __getnewargs__(&self) -> (Option<u32>,) {
        (self.window,)
    }

    fn __repr__(&self) -> String {
        self.window
            .map_or_else(|| "KVGroup()".to_owned(), |window| format!("KVGroup(window={window})"))
    }
}

/// `groups`: a tuple or list of `KVGroup`.
pub fn read_groups(groups: &Bound<'_, PyAny>) -> PyResult<Vec<manager::KVGroup>> {
    items(groups, "groups", "of KVGroup")?
        .iter()
        .enumerate()
        .map(|(i, group)| {
            let wrong = || PyTypeError::new_err(format!("groups[{i}] must be a KVGroup, not {}", type_name(group)));
            let group = group.cast::<KVGroup>().map_err(|_| wrong())?;
            Ok(manager::KVGroup {
                window: group.get().window,
            })
        })
        .collect()
}

/// Sizes and limits of a `Scheduler`. All arguments are keywords; each is checked here, by name.
///
/// Args:
///     num_blocks: blocks of the pool, the null block included. block_size: tokens in a block.
///     max_num_seqs: sequences that run at the same time, which is the number of rows.
///     max_num_batched_tokens: tokens in one step, over all sequences.
///     max_model_len: tokens of one sequence, prompt and output.
///     vocab_size: token ids are below it. None: any int32.
///     enable_prefix_caching: whether computed blocks are kept for later requests with the same prefix.
///     max_steps_in_flight: steps scheduled before the first of them is updated; this version: 1.
///
/// Raises:
///     InvalidArgumentError: a value is out of range (``argument``, ``got``, ``expected``).
///     UnsupportedError: more than one step in flight.
#[pyclass(frozen, eq, module = "pagedcore", name = "SchedulerConfig")]
#[derive(Clone, PartialEq, Eq)]
pub struct SchedulerConfig(pub scheduler::SchedulerConfig);

#[pymethods]
impl SchedulerConfig {
    #[new]
    #[pyo3(
        signature = (*, num_blocks, block_size = Arg(None), max_num_seqs = Arg(None), max_num_batched_tokens = Arg(None),
                     max_model_len = Arg(None), vocab_size = None, enable_prefix_caching = Arg(None),
                     max_steps_in_flight = Arg(None)),
        text_signature = "(*, num_blocks, block_size=16, max_num_seqs=64, max_num_batched_tokens=2048, \
                          max_model_len=4096, vocab_size=None, enable_prefix_caching=True, max_steps_in_flight=1)"
    )]
    #[allow(clippy::too_many_arguments)] // one per field, and they are keywords
    fn new(
        num_blocks: &Bound<'_, PyAny>,
        block_size: Arg<'_>,
        max_num_seqs: Arg<'_>,
        max_num_batched_tokens: Arg<'_>,
        max_model_len: Arg<'_>,
        vocab_size: Option<&Bound<'_, PyAny>>,
        enable_prefix_caching: Arg<'_>,
        max_steps_in_flight: Arg<'_>,
    ) -> PyResult<Self> {
        let py = num_blocks.py();
        let size = |arg: &Arg<'_>, name, default| arg.or(default, |value| arguments::size(value, name));
        let mut config = scheduler::SchedulerConfig::new(arguments::size(num_blocks, "num_blocks")?);
        config.block_size = size(&block_size, "block_size", config.block_size)?;
        config.max_num_seqs = size(&max_num_seqs, "max_num_seqs", config.max_num_seqs)?;
        config.max_num_batched_tokens = size(
            &max_num_batched_tokens,
            "max_num_batched_tokens",
            config.max_num_batched_tokens,
        )?;
        config.max_model_len = size(&max_model_len, "max_model_len", config.max_model_len)?;
        config.vocab_size = arguments::optional(vocab_size, |value| arguments::size(value, "vocab_size"))?;
        config.enable_prefix_caching = enable_prefix_caching.or(config.enable_prefix_caching, |value| {
            arguments::flag(value, "enable_prefix_caching")
        })?;
        config.max_steps_in_flight = size(&max_steps_in_flight, "max_steps_in_flight", config.max_steps_in_flight)?;
        config.validate().map_err(|error| errors::from_core(py, &error))?;
        Ok(Self(config))
    }

    /// Blocks of the pool, the null block included.
    #[getter]
    fn num_blocks(&self) -> usize {
        self.0.num_blocks
    }

    /// Tokens in a block.
    #[getter]
    fn block_size(&self) -> usize {
        self.0.block_size
    }

    /// Sequences that run at the same time.
    #[getter]
    fn max_num_seqs(&self) -> usize {
        self.0.max_num_seqs
    }

    /// Tokens in one step.
    #[getter]
    fn max_num_batched_tokens(&self) -> usize {
        self.0.max_num_batched_tokens
    }

    /// Tokens of one sequence, prompt and output.
    #[getter]
    fn max_model_len(&self) -> usize {
        self.0.max_model_len
    }

    /// Token ids are below it, if it is given.
    #[getter]
    fn vocab_size(&self) -> Option<usize> {
        self.0.vocab_size
    }

    /// Whether computed blocks are kept for later requests.
    #[getter]
    fn enable_prefix_caching(&self) -> bool {
        self.0.enable_prefix_caching
    }

    /// Steps that may be scheduled before the first of them is updated.
    #[getter]
    fn max_steps_in_flight(&self) -> usize {
        self.0.max_steps_in_flight
    }

    /// What pickle makes an equal one from.
    fn __getnewargs_ex__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyTuple>, Bound<'py, PyDict>)> {
        let (c, fields) = (&self.0, PyDict::new(py));
        fields.set_item("num_blocks", c.num_blocks)?;
        fields.set_item("block_size", c.block_size)?;
        fields.set_item("max_num_seqs", c.max_num_seqs)?;
        fields.set_item("max_num_batched_tokens", c.max_num_batched_tokens)?;
        fields.set_item("max_model_len", c.max_model_len)?;
        fields.set_item("vocab_size", c.vocab_size)?;
        fields.set_item("enable_prefix_caching", c.enable_prefix_caching)?;
        fields.set_item("max_steps_in_flight", c.max_steps_in_flight)?;
        Ok((PyTuple::empty(py), fields))
    }

    fn __hash__(&self) -> u64 {
        let c = &self.0;
        let mut hasher = DefaultHasher::new();
        (c.num_blocks, c.block_size, c.max_num_seqs, c.max_num_batched_tokens).hash(&mut hasher);
        (
            c.max_model_len,
            c.vocab_size,
            c.enable_prefix_caching,
            c.max_steps_in_flight,
        )
            .hash(&mut hasher);
        hasher.finish()
    }

    fn __repr__(&self) -> String {
        let c = &self.0;
        format!(
            "SchedulerConfig(num_blocks={}, block_size={}, max_num_seqs={}, max_num_batched_tokens={}, \
             max_model_len={}, vocab_size={}, enable_prefix_caching={}, max_steps_in_flight={})",
            c.num_blocks,
            c.block_size,
            c.max_num_seqs,
            c.max_num_batched_tokens,
            c.max_model_len,
            c.vocab_size.map_or_else(|| "None".to_owned(), |size| size.to_string()),
            if c.enable_prefix_caching { "True" } else { "False" },
            c.max_steps_in_flight,
        )
    }
}
