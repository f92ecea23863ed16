//! Level 2 in Python: `KVCacheManager`.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use super::arguments::{self, Arg};
use super::config::read_groups;
use super::core::Core;
use super::errors;
use super::numpy::{NewIds, Out};
use super::pool::{BlockPool, pool_stats};
use super::prefix::{PrefixCache, cache_stats, namespace_key, read_content_keys};
use super::shared::{Handle, Shared};
use super::{arrays, numpy};
use crate::error::Result;
use crate::ids::SeqHandle;
use crate::manager::{KVCacheManager as Manager, ManagerConfig};
use crate::tokens::Vocabulary;

/// Sequences over one pool: their tokens, how many are computed, and the blocks that hold keys and values.
///
/// The cycle of a step: `pool.begin_step`, `append` the new tokens, `allocate_slots`, `take_blocks_to_zero` and
/// `take_block_copies`, zero, copy, run the model over the tables, `pool.complete_step`, `commit`. Without
/// `begin_step` everything is synchronous: blocks given back can be reused at once.
///
/// Sequences are handles (int); one that was freed is a `StaleHandleError` and changes nothing.
///
/// Args:
///     num_blocks: blocks, the null block included. block_size: tokens in a block.
///     enable_prefix_caching: whether computed blocks are published, and looked up.
///     merge_blocks: whether a committed block is given up where the cache has an equal one.
///     groups: layers that share a block table; this version does one group without a window.
///     vocab_size: token ids are below it. None: any int32.
///
/// Raises:
///     InvalidArgumentError: a size is out of range. UnsupportedError: more than one group, or a window.
#[pyclass(frozen, module = "pagedcore", name = "KVCacheManager")]
pub struct KVCacheManager {
    pub core: Handle,
    num_blocks: usize,
    block_size: usize,
    caching: bool,
    vocabulary: Vocabulary,
}

impl KVCacheManager {
    pub fn view(core: &Handle, num_blocks: usize, block_size: usize, caching: bool, vocabulary: Vocabulary) -> Self {
        Self {
            core: Arc::clone(core),
            num_blocks,
            block_size,
            caching,
            vocabulary,
        }
    }

    /// A call of O(1).
    fn short<R: Send>(&self, py: Python<'_>, f: impl FnOnce(&mut Manager) -> Result<R> + Send) -> PyResult<R> {
        self.core.call(py, |core| f(core.manager()?))
    }

    /// A call whose arguments tell its size.
    fn sized<R: Send>(
        &self,
        py: Python<'_>,
        size: usize,
        f: impl FnOnce(&mut Manager) -> Result<R> + Send,
    ) -> PyResult<R> {
        self.core.call_sized(py, size, |core| f(core.manager()?))
    }

    /// A call whose size the manager knows; where it does not (a handle is stale), the call itself says so.
    fn weighed<R: Send>(
        &self,
        py: Python<'_>,
        size: impl FnOnce(&Manager) -> Result<usize>,
        mut f: impl FnMut(&mut Manager) -> Result<R> + Send,
    ) -> PyResult<R> {
        let size = |core: &mut Core| core.manager().and_then(|m| size(m)).unwrap_or(0);
        self.core.call_weighed(py, size, |core| f(core.manager()?))
    }

    /// [`sized`](Self::sized), and the sequence is changed.
    fn change_sized<R: Send>(
        &self,
        py: Python<'_>,
        seq: SeqHandle,
        size: usize,
        f: impl FnOnce(&mut Manager) -> Result<R> + Send,
    ) -> PyResult<R> {
        self.core.call_sized(py, size, |core| f(core.manager_of(seq)?))
    }

    /// [`weighed`](Self::weighed), and the sequence is changed.
    fn change_weighed<R: Send>(
        &self,
        py: Python<'_>,
        seq: SeqHandle,
        size: impl FnOnce(&Manager) -> Result<usize>,
        mut f: impl FnMut(&mut Manager) -> Result<R> + Send,
    ) -> PyResult<R> {
        let size = |core: &mut Core| core.manager().and_then(|m| size(m)).unwrap_or(0);
        self.core.call_weighed(py, size, |core| f(core.manager_of(seq)?))
    }

    /// Takes what is to be done before a step, at most `count` entries, and the array for it, which comes first: what
    /// was taken could not be put back.
    fn take<'py, R: Send>(
        &self,
        py: Python<'py>,
        out: impl Fn(usize) -> PyResult<NewIds<'py>>,
        count: fn(&Manager) -> usize,
        mut take: impl FnMut(&mut Manager) -> Result<Vec<R>> + Send,
    ) -> PyResult<(NewIds<'py>, Vec<R>)> {
        let mut room = self.short(py, |m| Ok(count(m)))?;
        loop {
            let out = out(room)?;
            let size = |core: &mut Core| core.manager().map_or(0, |m| count(m));
            let taken = self.core.call_weighed(py, size, |core| {
                let manager = core.manager_of_steps()?;
                let now = count(manager);
                if now <= room {
                    take(manager).map(Ok)
                } else {
                    Ok(Err(now))
                }
            })?;
            match taken {
                Ok(taken) => return Ok((out, taken)),
                // Another thread was quicker, and added some.
                Err(now) => room = now,
            }
        }
    }
}

/// Entries of a sequence's table.
fn blocks(seq: SeqHandle) -> impl FnOnce(&Manager) -> Result<usize> {
    move |m| Ok(m.table(seq)?.len())
}

#[pymethods]
impl KVCacheManager {
    #[new]
    #[pyo3(
        signature = (num_blocks, block_size = Arg(None), enable_prefix_caching = Arg(None), merge_blocks = Arg(None),
                     groups = Arg(None), vocab_size = None),
        text_signature = "(num_blocks, block_size=16, enable_prefix_caching=True, merge_blocks=True, groups=..., \
                          vocab_size=None)"
    )]
    fn new(
        num_blocks: &Bound<'_, PyAny>,
        block_size: Arg<'_>,
        enable_prefix_caching: Arg<'_>,
        merge_blocks: Arg<'_>,
        groups: Arg<'_>,
        vocab_size: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let py = num_blocks.py();
        let num_blocks = arguments::size(num_blocks, "num_blocks")?;
        let block_size = block_size.or(16, |b| arguments::size(b, "block_size"))?;
        let mut config = ManagerConfig::new(num_blocks, block_size);
        config.enable_prefix_caching =
            enable_prefix_caching.or(true, |b| arguments::flag(b, "enable_prefix_caching"))?;
        config.merge_blocks = merge_blocks.or(true, |b| arguments::flag(b, "merge_blocks"))?;
        config.groups = groups.or(config.groups, read_groups)?;
        config.vocab_size = arguments::optional(vocab_size, |v| arguments::size(v, "vocab_size"))?;
        let caching = config.enable_prefix_caching;
        let manager = py.detach(|| Manager::new(&config));
        let manager = manager.map_err(|e| errors::from_core(py, &e))?;
        let vocabulary = manager.vocabulary();
        Ok(Self::view(
            &Shared::new(Core::Manager(Box::new(manager))),
            num_blocks,
            block_size,
            caching,
            vocabulary,
        ))
    }

    /// The physical blocks.
    #[getter]
    fn pool(&self) -> BlockPool {
        BlockPool::view(&self.core, self.num_blocks, self.block_size)
    }

    /// The trie of published blocks; None without prefix caching.
    #[getter]
    fn cache(&self) -> Option<PrefixCache> {
        self.caching
            .then(|| PrefixCache::view(&self.core, self.num_blocks, self.block_size, self.vocabulary))
    }

    /// Tokens in a block.
    #[getter]
    fn block_size(&self) -> usize {
        self.block_size
    }

    /// Adds a sequence, which takes the longest cached prefix of its tokens, at most all but the last. O(tokens).
    ///
    /// Args:
    ///     token_ids: at least one. tenant, cache_salt, extra_keys: its namespace, see `PrefixCache.namespace`.
    ///     content_keys: (start, stop, bytes) for positions whose content is not told by token ids.
    ///
    /// Returns:
    ///     the sequence's handle; `num_computed_tokens` tells its hit.
    ///
    /// Raises:
    ///     InvalidArgumentError: no tokens. TokenOutOfRangeError: a token outside the vocabulary.
    #[pyo3(
        signature = (token_ids, tenant = Arg(None), cache_salt = Arg(None), extra_keys = Arg(None),
                     content_keys = Arg(None)),
        text_signature = "($self, token_ids, tenant='', cache_salt='', extra_keys=(), content_keys=())"
    )]
    fn add(
        &self,
        token_ids: &Bound<'_, PyAny>,
        tenant: Arg<'_>,
        cache_salt: Arg<'_>,
        extra_keys: Arg<'_>,
        content_keys: Arg<'_>,
    ) -> PyResult<u64> {
        let key = namespace_key(&tenant, &cache_salt, &extra_keys)?;
        let content = read_content_keys(&content_keys)?;
        let tokens = arrays::token_ids(token_ids, "token_ids", self.vocabulary)?;
        let seq = self.sized(token_ids.py(), tokens.len(), |m| m.add(&tokens, key, content))?;
        Ok(seq.0)
    }

    /// Tokens of a sequence. O(1).
    fn num_tokens(&self, seq: &Bound<'_, PyAny>) -> PyResult<usize> {
        let handle = sequence(seq)?;
        self.short(seq.py(), |m| m.num_tokens(handle))
    }

    /// How many of a sequence's tokens were computed, or found in the cache. O(1).
    fn num_computed_tokens(&self, seq: &Bound<'_, PyAny>) -> PyResult<usize> {
        let handle = sequence(seq)?;
        self.short(seq.py(), |m| m.num_computed_tokens(handle))
    }

    /// Whether a sequence is without blocks until it is resumed. O(1).
    fn is_preempted(&self, seq: &Bound<'_, PyAny>) -> PyResult<bool> {
        let handle = sequence(seq)?;
        self.short(seq.py(), |m| m.is_preempted(handle))
    }

    /// A sequence's tokens as int32[num_tokens]. O(tokens).
    fn token_ids<'py>(&self, seq: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let handle = sequence(seq)?;
        let size = |m: &Manager| m.num_tokens(handle);
        let tokens = self.weighed(seq.py(), size, |m| {
            let mut tokens = vec![0; m.num_tokens(handle)?];
            m.read_tokens(handle, 0, tokens.len(), &mut tokens)?;
            Ok(tokens)
        })?;
        numpy::new_i32_signed(seq.py(), &tokens)
    }

    /// Appends tokens; takes no block. Amortised O(1) per token.
    ///
    /// Raises:
    ///     TokenOutOfRangeError: a token outside the vocabulary. Nothing has changed.
    fn append(&self, seq: &Bound<'_, PyAny>, token_ids: &Bound<'_, PyAny>) -> PyResult<()> {
        let handle = sequence(seq)?;
        let tokens = arrays::token_ids(token_ids, "token_ids", self.vocabulary)?;
        self.change_sized(seq.py(), handle, tokens.len(), |m| m.append(handle, &tokens))
    }

    /// Makes the positions from `num_computed_tokens` on writable, and the sequence's own. Idempotent, all or nothing.
    ///
    /// Takes blocks beyond the table, and replaces a block that is shared or published (copy-on-write). The positions
    /// may go past the sequence's tokens. O(blocks that the positions are in).
    ///
    /// Args:
    ///     num_new_tokens: positions to compute next. num_lookahead_tokens: more positions, for drafts.
    ///
    /// Returns:
    ///     the first table entry that changed; the table's length if none did.
    ///
    /// Raises:
    ///     OutOfBlocksError: more blocks are needed than can be had (``needed``, ``free``). Nothing has changed.
    ///     InvalidArgumentError: the sequence is preempted.
    #[pyo3(
        signature = (seq, num_new_tokens, num_lookahead_tokens = Arg(None)),
        text_signature = "($self, seq, num_new_tokens, num_lookahead_tokens=0)"
    )]
    fn allocate_slots(
        &self,
        seq: &Bound<'_, PyAny>,
        num_new_tokens: &Bound<'_, PyAny>,
        num_lookahead_tokens: Arg<'_>,
    ) -> PyResult<usize> {
        let handle = sequence(seq)?;
        let new = arguments::size(num_new_tokens, "num_new_tokens")?;
        let lookahead = num_lookahead_tokens.or(0, |n| arguments::size(n, "num_lookahead_tokens"))?;
        let blocks = new.saturating_add(lookahead) / self.block_size;
        self.change_sized(seq.py(), handle, blocks, |m| m.allocate_slots(handle, new, lookahead))
    }

    /// The positions below `num_computed_tokens` are computed, by a step that is complete: full blocks become findable.
    ///
    /// Where the cache has an equal block the table takes that one (`merge_blocks`). O(blocks that became full).
    ///
    /// Args:
    ///     num_computed_tokens: counted from the sequence's start; at least what it was, at most its tokens and its
    ///     slots.
    ///
    /// Returns:
    ///     the first table entry that changed; the table's length if none did.
    fn commit(&self, seq: &Bound<'_, PyAny>, num_computed_tokens: &Bound<'_, PyAny>) -> PyResult<usize> {
        let handle = sequence(seq)?;
        let computed = arguments::size(num_computed_tokens, "num_computed_tokens")?;
        let size = |m: &Manager| Ok(computed.saturating_sub(m.num_computed_tokens(handle)?));
        self.change_weighed(seq.py(), handle, size, |m| m.commit(handle, computed))
    }

    /// Keeps the first `num_tokens` tokens; blocks beyond them are released after `after_step`. O(blocks dropped).
    ///
    /// Returns:
    ///     the length of the table, which is where it changed if it did.
    #[pyo3(signature = (seq, num_tokens, after_step = None))]
    fn truncate(
        &self,
        seq: &Bound<'_, PyAny>,
        num_tokens: &Bound<'_, PyAny>,
        after_step: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<usize> {
        let handle = sequence(seq)?;
        let num_tokens = arguments::size(num_tokens, "num_tokens")?;
        let after_step = arguments::optional(after_step, |s| arguments::step(s, "after_step"))?;
        let truncate = |m: &mut Manager| m.truncate(handle, num_tokens, after_step);
        self.change_weighed(seq.py(), handle, blocks(handle), truncate)
    }

    /// Makes `n` copies that share the blocks that hold computed tokens, until one of them writes. O(n * blocks).
    ///
    /// Args:
    ///     n: 1 to 65,536; fewer where the tables would take more than 1 GiB.
    ///
    /// Returns:
    ///     the copies' handles.
    ///
    /// Raises:
    ///     InvalidArgumentError: `n` is out of range, or there is no memory for as many tables. Nothing has changed.
    #[pyo3(signature = (seq, n = Arg(None)), text_signature = "($self, seq, n=1)")]
    fn fork(&self, seq: &Bound<'_, PyAny>, n: Arg<'_>) -> PyResult<Vec<u64>> {
        let handle = sequence(seq)?;
        let n = n.or(1, |n| arguments::size(n, "n"))?;
        let size = |m: &Manager| Ok(n.saturating_mul(m.table(handle)?.len() + 1));
        let forks = self.change_weighed(seq.py(), handle, size, |m| m.fork(handle, n))?;
        Ok(forks.into_iter().map(|fork| fork.0).collect())
    }

    /// Drops a sequence's blocks after `after_step` and keeps its tokens. What was committed stays findable. O(blocks).
    #[pyo3(signature = (seq, after_step = None))]
    fn preempt(&self, seq: &Bound<'_, PyAny>, after_step: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        let handle = sequence(seq)?;
        let after_step = arguments::optional(after_step, |s| arguments::step(s, "after_step"))?;
        self.change_weighed(seq.py(), handle, blocks(handle), |m| m.preempt(handle, after_step))
    }

    /// Ends a preemption: takes the longest cached prefix again, at most all but the last token. O(tokens found).
    ///
    /// Returns:
    ///     how many tokens that is.
    fn resume(&self, seq: &Bound<'_, PyAny>) -> PyResult<usize> {
        let handle = sequence(seq)?;
        let size = |m: &Manager| m.num_tokens(handle);
        self.change_weighed(seq.py(), handle, size, |m| m.resume(handle))
    }

    /// Ends a sequence: its blocks are released after `after_step` (None: the newest step begun). O(blocks).
    #[pyo3(signature = (seq, after_step = None))]
    fn free(&self, seq: &Bound<'_, PyAny>, after_step: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        let handle = sequence(seq)?;
        let after_step = arguments::optional(after_step, |s| arguments::step(s, "after_step"))?;
        self.change_weighed(seq.py(), handle, blocks(handle), |m| m.free(handle, after_step))
    }

    /// A sequence's blocks in order, as int32. O(blocks).
    ///
    /// Args:
    ///     group: the layers' group.
    ///     out: a writable int32 buffer. The table is written to its front, and what is returned is a view of that.
    ///
    /// Raises:
    ///     InvalidArgumentError: no such group, or `out` is too short or read-only; nothing was written then.
    #[pyo3(signature = (seq, group = Arg(None), out = None), text_signature = "($self, seq, group=0, out=None)")]
    fn block_table<'py>(
        &self,
        seq: &Bound<'py, PyAny>,
        group: Arg<'py>,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let handle = sequence(seq)?;
        let group = group.or(0, |g| arguments::size(g, "group"))?;
        let out = arguments::optional(out, |out| Out::new(out, 4))?;
        let table = self.weighed(seq.py(), blocks(handle), |m| {
            let mut table = vec![0; m.table(handle)?.len()];
            m.block_table(handle, group, &mut table)?;
            Ok(table)
        })?;
        match out {
            Some(out) => out.write_i32(&table),
            None => numpy::new_i32_signed(seq.py(), &table),
        }
    }

    /// Slots of positions `start` to `stop`, as int64: block * block_size + offset. O(stop - start).
    ///
    /// Args:
    ///     start, stop: positions that have a block. group: the layers' group.
    ///     out: a writable int64 buffer. The slots are written to its front, and what is returned is a view of that.
    ///
    /// Raises:
    ///     InvalidArgumentError: positions without a block, no such group, or `out` is too short or read-only.
    #[pyo3(
        signature = (seq, start, stop, group = Arg(None), out = None),
        text_signature = "($self, seq, start, stop, group=0, out=None)"
    )]
    fn slot_mapping<'py>(
        &self,
        seq: &Bound<'py, PyAny>,
        start: &Bound<'py, PyAny>,
        stop: &Bound<'py, PyAny>,
        group: Arg<'py>,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let handle = sequence(seq)?;
        let (start, stop) = (arguments::size(start, "start")?, arguments::size(stop, "stop")?);
        let group = group.or(0, |g| arguments::size(g, "group"))?;
        let out = arguments::optional(out, |out| Out::new(out, 8))?;
        let block_size = self.block_size;
        let slots = self.sized(seq.py(), stop.saturating_sub(start), |m| {
            // Not before it is known to fit: `stop` is whatever the caller says.
            let mut slots = vec![0; stop.min(m.table(handle)?.len() * block_size).saturating_sub(start)];
            m.slot_mapping(handle, start, stop, group, &mut slots)?;
            Ok(slots)
        })?;
        match out {
            Some(out) => out.write_i64(&slots),
            None => numpy::new_i64(seq.py(), &slots),
        }
    }

    /// Takes the pending copies as int32[n, 2]: (src, dst) blocks. Zero first, then copy, then write. O(n).
    ///
    /// The sources are held until the newest step begun is complete; with none in flight, run them before the next
    /// call.
    #[pyo3(signature = (group = Arg(None)), text_signature = "($self, group=0)")]
    fn take_block_copies<'py>(&self, py: Python<'py>, group: Arg<'py>) -> PyResult<Bound<'py, PyAny>> {
        let group = group.or(0, |g| arguments::size(g, "group"))?;
        let count = |m: &Manager| m.num_block_copies();
        let out = |room| NewIds::pairs(py, room);
        let (out, pairs) = self.take(py, out, count, |m| m.take_block_copies(group))?;
        out.fill(pairs.len(), pairs.iter().flat_map(|(src, dst)| [src.0, dst.0]))
    }

    /// Takes the blocks that came from another tenant, as int32: zero them before the copies and writes of a step.
    /// O(n).
    fn take_blocks_to_zero<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let count = |m: &Manager| m.num_blocks_to_zero();
        let out = |room| NewIds::new(py, room);
        let (out, blocks) = self.take(py, out, count, |m| Ok(m.take_blocks_to_zero()))?;
        out.blocks(blocks)
    }

    /// Counts at this moment and totals; `pool` and `cache` (or None) are dicts of their own. O(the most sequences that
    /// there were at a time).
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = self.weighed(py, |m| Ok(m.peak_sequences()), |m| Ok(m.stats()))?;
        let dict = PyDict::new(py);
        dict.set_item("num_sequences", stats.num_sequences)?;
        dict.set_item("num_preempted", stats.num_preempted)?;
        dict.set_item("num_tokens", stats.num_tokens)?;
        dict.set_item("num_computed_tokens", stats.num_computed_tokens)?;
        dict.set_item("copies", stats.copies)?;
        dict.set_item("zeroed", stats.zeroed)?;
        dict.set_item("pool", pool_stats(py, &stats.pool)?)?;
        dict.set_item(
            "cache",
            stats.cache.as_ref().map(|cache| cache_stats(py, cache)).transpose()?,
        )?;
        Ok(dict)
    }

    /// Checks every invariant of the sequences, the cache and the pool. O(num_blocks + tokens); for tests.
    ///
    /// Raises:
    ///     CorruptionError: one is broken; every later call raises it too.
    fn check(&self, py: Python<'_>) -> PyResult<()> {
        self.core.call_detached(py, Core::check)
    }

    /// Ends this manager and whatever shares its blocks: its pool and cache, and the scheduler over it. Idempotent.
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
        match self.short(py, |m| Ok((m.num_sequences(), m.pool().num_used()))) {
            Ok((sequences, used)) => format!("KVCacheManager({sizes}, num_sequences={sequences}, num_used={used})"),
            Err(_) => format!("KVCacheManager({sizes}, unusable)"),
        }
    }
}

fn sequence(seq: &Bound<'_, PyAny>) -> PyResult<SeqHandle> {
    arguments::handle(seq, "seq", "sequence").map(SeqHandle)
}
