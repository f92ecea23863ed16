//! Level 1 in Python: `PrefixCache`, `PrefixHit`, `Commit`.

use std::sync::Arc;

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyString, PyTuple};

use super::arguments::{self, Arg, items, type_name};
use super::core::Core;
use super::errors::{self, Class};
use super::pool::BlockPool;
use super::shared::Handle;
use super::{arrays, numpy::NewIds};
use crate::content::{ContentKey, ContentKeys};
use crate::ids::{BlockId, NamespaceHandle, NodeHandle};
use crate::namespace::{ExtraKey, NamespaceKey};
use crate::prefix::CacheStats;
use crate::tokens::Vocabulary;

/// Which blocks hold which tokens: a trie of full, computed blocks of a pool.
///
/// It registers itself with the pool as what can be reclaimed. It holds no reference: a published block that nobody
/// holds is cached, findable until the pool needs the space. A block is found by the blocks before it, its own tokens
/// (compared, not only hashed), its content keys and the namespace at the root.
///
/// `mgr.cache` is a cache like this one, over the same trie.
///
/// Args:
///     pool: the pool whose blocks are cached. It has at most one cache.
///
/// Raises:
///     InvalidArgumentError: the pool has a cache already.
#[pyclass(frozen, module = "pagedcore", name = "PrefixCache")]
pub struct PrefixCache {
    core: Handle,
    num_blocks: usize,
    block_size: usize,
    vocabulary: Vocabulary,
}

/// The longest cached prefix of some tokens. The caller holds one reference to each of its blocks.
#[pyclass(frozen, module = "pagedcore", name = "PrefixHit")]
pub struct PrefixHit {
    /// int32[num_tokens / block_size]: the blocks, in order.
    #[pyo3(get)]
    blocks: Py<PyAny>,
    /// Tokens covered: whole blocks.
    #[pyo3(get)]
    num_tokens: usize,
    /// The last block's node, where a commit goes on; None if nothing was found.
    #[pyo3(get)]
    node: Option<u64>,
}

#[pymethods]
impl PrefixHit {
    fn __repr__(&self) -> String {
        format!(
            "PrefixHit(num_tokens={}, node={})",
            self.num_tokens,
            shown_handle(self.node)
        )
    }
}

/// What a commit made of the caller's blocks.
#[pyclass(frozen, module = "pagedcore", name = "Commit")]
pub struct Commit {
    /// int32, as many as were given: the blocks to use from now on. Where one differs from the one given, the caller's
    /// reference has moved to it.
    #[pyo3(get)]
    blocks: Py<PyAny>,
    /// The last full block's node, where the next commit goes on; the parent if no block was full.
    #[pyo3(get)]
    node: Option<u64>,
}

#[pymethods]
impl Commit {
    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        Ok(format!(
            "Commit(num_blocks={}, node={})",
            self.blocks.bind(py).len()?,
            shown_handle(self.node)
        ))
    }
}

fn shown_handle(handle: Option<u64>) -> String {
    handle.map_or_else(|| "None".to_owned(), |handle| handle.to_string())
}

impl PrefixCache {
    pub fn view(core: &Handle, num_blocks: usize, block_size: usize, vocabulary: Vocabulary) -> Self {
        Self {
            core: Arc::clone(core),
            num_blocks,
            block_size,
            vocabulary,
        }
    }
}

#[pymethods]
impl PrefixCache {
    #[new]
    fn new(pool: &Bound<'_, PyAny>) -> PyResult<Self> {
        let py = pool.py();
        let owner = pool
            .cast::<BlockPool>()
            .map_err(|_| PyTypeError::new_err(format!("pool must be a BlockPool, not {}", type_name(pool))))?
            .get();
        let made = owner.core.call(py, Core::make_cache)?;
        if !made {
            return Err(errors::invalid(pool, "pool", "the pool has a prefix cache already")
                .hint("a manager's cache is mgr.cache; one made by PrefixCache(pool) lives as long as the pool")
                .into());
        }
        Ok(Self::view(
            &owner.core,
            owner.num_blocks,
            owner.block_size,
            Vocabulary::ALL,
        ))
    }

    /// The pool whose blocks are cached.
    #[getter]
    fn pool(&self) -> BlockPool {
        BlockPool::view(&self.core, self.num_blocks, self.block_size)
    }

    /// Tokens in a block.
    #[getter]
    fn block_size(&self) -> usize {
        self.block_size
    }

    /// The namespace of these keys, made if need be. Prompts share prefixes only inside a namespace.
    ///
    /// It is held until `drop_namespace` was called as often as this. O(length of the keys).
    ///
    /// Args:
    ///     tenant: whose tokens these are; blocks that change tenant are zeroed.
    ///     cache_salt: keeps prompts of one tenant apart.
    ///     extra_keys: str, bytes or int; whatever else changes what is computed, such as an adapter's id.
    ///
    /// Returns:
    ///     the namespace's handle.
    #[pyo3(
        signature = (tenant = Arg(None), cache_salt = Arg(None), extra_keys = Arg(None)),
        text_signature = "($self, tenant='', cache_salt='', extra_keys=())"
    )]
    fn namespace(&self, py: Python<'_>, tenant: Arg<'_>, cache_salt: Arg<'_>, extra_keys: Arg<'_>) -> PyResult<u64> {
        let key = namespace_key(&tenant, &cache_salt, &extra_keys)?;
        self.core.call(py, |core| Ok(core.cache()?.0.namespace(key).0))
    }

    /// Gives back one hold of a namespace; without holds and blocks it vanishes.
    ///
    /// Args:
    ///     purge: also withdraw its blocks: none can be found from now on. O(nodes) then, else O(1).
    ///
    /// Returns:
    ///     how many blocks were withdrawn.
    ///
    /// Raises:
    ///     StaleHandleError: the namespace has vanished.
    #[pyo3(signature = (ns, purge = Arg(None)), text_signature = "($self, ns, purge=False)")]
    fn drop_namespace(&self, ns: &Bound<'_, PyAny>, purge: Arg<'_>) -> PyResult<usize> {
        let py = ns.py();
        let ns = namespace_handle(ns)?;
        let purge = purge.or(false, |p| arguments::flag(p, "purge"))?;
        self.core.call_sized(py, if purge { usize::MAX } else { 0 }, |core| {
            let (cache, pool) = core.cache()?;
            cache.drop_namespace(pool, ns, purge)
        })
    }

    /// How many of the tokens are cached: whole blocks from the start. Leaves no trace. O(tokens).
    ///
    /// Args:
    ///     token_ids: the prompt. ns: its namespace.
    ///     max_tokens: the most to count. None: all.
    ///     content_keys: (start, stop, bytes) for positions whose content is not told by token ids.
    ///
    /// Raises:
    ///     StaleHandleError: the namespace has vanished.
    #[pyo3(
        signature = (token_ids, ns, max_tokens = None, content_keys = Arg(None)),
        text_signature = "($self, token_ids, ns, max_tokens=None, content_keys=())"
    )]
    fn probe(
        &self,
        token_ids: &Bound<'_, PyAny>,
        ns: &Bound<'_, PyAny>,
        max_tokens: Option<&Bound<'_, PyAny>>,
        content_keys: Arg<'_>,
    ) -> PyResult<usize> {
        let py = token_ids.py();
        let ns = namespace_handle(ns)?;
        let max_tokens = arguments::optional(max_tokens, |n| arguments::size(n, "max_tokens"))?;
        let content = read_content_keys(&content_keys)?;
        let tokens = arrays::token_ids(token_ids, "token_ids", self.vocabulary)?;
        self.core.call_sized(py, tokens.len(), |core| {
            core.cache()?.0.probe(&tokens, ns, max_tokens, &content)
        })
    }

    /// Takes the longest cached prefix: adds a reference to each of its blocks, which the caller releases. O(tokens).
    ///
    /// Args:
    ///     token_ids: the prompt. ns: its namespace.
    ///     max_tokens: the most to take. None: all. (At least one token of a prompt must be left to compute.)
    ///     content_keys: (start, stop, bytes) for positions whose content is not told by token ids.
    ///
    /// Raises:
    ///     StaleHandleError: the namespace has vanished.
    #[pyo3(
        signature = (token_ids, ns, max_tokens = None, content_keys = Arg(None)),
        text_signature = "($self, token_ids, ns, max_tokens=None, content_keys=())"
    )]
    fn acquire(
        &self,
        token_ids: &Bound<'_, PyAny>,
        ns: &Bound<'_, PyAny>,
        max_tokens: Option<&Bound<'_, PyAny>>,
        content_keys: Arg<'_>,
    ) -> PyResult<PrefixHit> {
        let py = token_ids.py();
        let ns = namespace_handle(ns)?;
        let max_tokens = arguments::optional(max_tokens, |n| arguments::size(n, "max_tokens"))?;
        let content = read_content_keys(&content_keys)?;
        let tokens = arrays::token_ids(token_ids, "token_ids", self.vocabulary)?;
        let most = tokens.len().min(max_tokens.unwrap_or(usize::MAX)) / self.block_size;
        let out = NewIds::new(py, most)?;
        let hit = self.core.call_sized(py, tokens.len(), |core| {
            let (cache, pool) = core.cache()?;
            cache.acquire(pool, &tokens, ns, max_tokens, &content)
        })?;
        Ok(PrefixHit {
            blocks: out.blocks(hit.blocks)?.unbind(),
            num_tokens: hit.num_tokens,
            node: hit.node.map(|node| node.0),
        })
    }

    /// Publishes full blocks after the step that computed them. O(tokens).
    ///
    /// Block i holds the i-th `block_size` tokens after `parent`. A tail shorter than a block is ignored; its block may
    /// stand at the end of `blocks`. Where the trie has an equal block, the caller's reference moves to that one and
    /// the caller's own block is released under the fence.
    ///
    /// Args:
    ///     token_ids: the tokens of these blocks. blocks: the blocks, held by the caller. ns: the namespace.
    ///     parent: the node of the block before the first one. None: this is the start of a prompt.
    ///     after_step: the last step that may read a duplicate. None: the newest step begun.
    ///     content_keys: (start, stop, bytes); positions count from the first of `token_ids`, negative ones lie before.
    ///
    /// Raises:
    ///     InvalidArgumentError: the number of blocks does not fit the tokens, or `parent` is of another namespace.
    ///     StaleHandleError, StepError, BlockError: a handle, step or block that cannot be taken. Nothing has changed.
    #[pyo3(
        signature = (token_ids, blocks, ns, parent = None, after_step = None, content_keys = Arg(None)),
        text_signature = "($self, token_ids, blocks, ns, parent=None, after_step=None, content_keys=())"
    )]
    fn commit(
        &self,
        token_ids: &Bound<'_, PyAny>,
        blocks: &Bound<'_, PyAny>,
        ns: &Bound<'_, PyAny>,
        parent: Option<&Bound<'_, PyAny>>,
        after_step: Option<&Bound<'_, PyAny>>,
        content_keys: Arg<'_>,
    ) -> PyResult<Commit> {
        let py = token_ids.py();
        let ns = namespace_handle(ns)?;
        let parent = arguments::optional(parent, |p| arguments::handle(p, "parent", "node").map(NodeHandle))?;
        let after_step = arguments::optional(after_step, |s| arguments::step(s, "after_step"))?;
        let content = read_content_keys(&content_keys)?;
        let tokens = arrays::token_ids(token_ids, "token_ids", self.vocabulary)?;
        let blocks = arrays::block_ids(blocks, "blocks", self.num_blocks)?;
        let blocks: Vec<_> = blocks.into_iter().map(BlockId).collect();
        let out = NewIds::new(py, blocks.len())?;
        let commit = self.core.call_sized(py, tokens.len(), |core| {
            let (cache, pool) = core.cache()?;
            cache.commit(pool, &tokens, &blocks, ns, parent, after_step, &content)
        })?;
        Ok(Commit {
            blocks: out.blocks(commit.blocks)?.unbind(),
            node: commit.node.map(|node| node.0),
        })
    }

    /// Evicts up to `n` cached blocks, least recently used first, children before parents. O(1) per block.
    ///
    /// Returns:
    ///     how many were evicted: fewer than `n` if the others are held, or read by a step in flight.
    fn evict(&self, n: &Bound<'_, PyAny>) -> PyResult<usize> {
        let py = n.py();
        let n = arguments::size(n, "n")?;
        self.core.call_sized(py, n, |core| {
            let (cache, pool) = core.cache()?;
            Ok(cache.evict(pool, n))
        })
    }

    /// Withdraws everything: no block can be found any more; blocks in use stay with their holders. O(nodes).
    ///
    /// Returns:
    ///     how many blocks were withdrawn.
    fn reset(&self, py: Python<'_>) -> PyResult<usize> {
        self.core.call_detached(py, |core| {
            let (cache, pool) = core.cache()?;
            Ok(cache.reset(pool))
        })
    }

    /// Counts at this moment, and totals since the cache was made. O(1).
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        cache_stats(py, &self.core.call(py, |core| Ok(core.cache()?.0.stats()))?)
    }

    /// Checks every invariant of the cache and its pool. O(num_blocks + nodes); for tests.
    ///
    /// Raises:
    ///     CorruptionError: one is broken; every later call raises it too.
    fn check(&self, py: Python<'_>) -> PyResult<()> {
        self.core.call_detached(py, Core::check)
    }

    /// Ends this cache and whatever shares its blocks: the pool, and the manager and scheduler over it. Idempotent.
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
        match self.core.call(py, |core| Ok(core.cache()?.0.stats())) {
            Ok(s) => format!(
                "PrefixCache(block_size={}, num_nodes={}, num_evictable={}, num_namespaces={})",
                self.block_size, s.num_nodes, s.num_evictable, s.num_namespaces
            ),
            Err(_) => format!("PrefixCache(block_size={}, unusable)", self.block_size),
        }
    }
}

/// A cache's numbers by name.
pub fn cache_stats<'py>(py: Python<'py>, stats: &CacheStats) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("num_nodes", stats.num_nodes)?;
    dict.set_item("num_evictable", stats.num_evictable)?;
    dict.set_item("num_namespaces", stats.num_namespaces)?;
    dict.set_item("lookups", stats.lookups)?;
    dict.set_item("lookup_tokens", stats.lookup_tokens)?;
    dict.set_item("hit_tokens", stats.hit_tokens)?;
    dict.set_item("published", stats.published)?;
    dict.set_item("merged", stats.merged)?;
    dict.set_item("evicted", stats.evicted)?;
    Ok(dict)
}

fn namespace_handle(ns: &Bound<'_, PyAny>) -> PyResult<NamespaceHandle> {
    arguments::handle(ns, "ns", "namespace").map(NamespaceHandle)
}

/// The namespace that `tenant`, `cache_salt` and `extra_keys` name.
pub fn namespace_key(tenant: &Arg<'_>, cache_salt: &Arg<'_>, extra_keys: &Arg<'_>) -> PyResult<NamespaceKey> {
    let text = |arg: &Arg<'_>, name| {
        arg.or(Box::default(), |value| {
            arguments::text(value, name).map(String::into_boxed_str)
        })
    };
    Ok(NamespaceKey {
        tenant: text(tenant, "tenant")?,
        cache_salt: text(cache_salt, "cache_salt")?,
        extra_keys: extra_keys.or(Box::default(), |keys| {
            items(keys, "extra_keys", "of str, bytes or int")?
                .iter()
                .enumerate()
                .map(|(i, key)| extra_key(key, &format!("extra_keys[{i}]")))
                .collect()
        })?,
    })
}

fn extra_key(key: &Bound<'_, PyAny>, argument: &str) -> PyResult<ExtraKey> {
    if key.is_instance_of::<PyString>() {
        return Ok(ExtraKey::Text(arguments::text(key, argument)?.into_boxed_str()));
    }
    if let Ok(bytes) = key.cast::<PyBytes>() {
        return Ok(ExtraKey::Bytes(bytes.as_bytes().into()));
    }
    match arguments::int(key, argument, i64::MIN, i64::MAX) {
        Err(error) if error.is_instance_of::<PyTypeError>(key.py()) => Err(PyTypeError::new_err(format!(
            "{argument} must be str, bytes or int, not {}",
            type_name(key)
        ))),
        other => other.map(ExtraKey::Int),
    }
}

/// `content_keys`: tuples (start, stop, bytes), see `ContentKeys::new` for what is refused.
pub fn read_content_keys(keys: &Arg<'_>) -> PyResult<ContentKeys> {
    let Some(keys) = &keys.0 else {
        return Ok(ContentKeys::default());
    };
    let mut read = Vec::new();
    for (i, entry) in items(keys, "content_keys", "of (start, stop, bytes)")?
        .iter()
        .enumerate()
    {
        let wrong = || {
            let got = type_name(entry);
            PyTypeError::new_err(format!(
                "content_keys[{i}] must be a tuple (start, stop, bytes), not {got}"
            ))
        };
        let entry = entry.cast::<PyTuple>().map_err(|_| wrong())?;
        if entry.len() != 3 {
            let message = format!(
                "content_keys[{i}] has {} items, expected (start, stop, bytes)",
                entry.len()
            );
            return Err(errors::new(keys.py(), Class::InvalidArgument, message)
                .with("argument", "content_keys")
                .with("got", entry.len())
                .with("expected", 3)
                .into());
        }
        let position = |at: usize| {
            arguments::int(
                &entry.get_item(at)?,
                &format!("content_keys[{i}][{at}]"),
                i64::MIN,
                i64::MAX,
            )
        };
        let key = entry.get_item(2)?;
        let key = key.cast::<PyBytes>().map_err(|_| {
            PyTypeError::new_err(format!("content_keys[{i}][2] must be bytes, not {}", type_name(&key)))
        })?;
        read.push(ContentKey {
            start: position(0)?,
            stop: position(1)?,
            key: key.as_bytes().into(),
        });
    }
    ContentKeys::new(read).map_err(|error| errors::from_core(keys.py(), &error))
}
