//! One lock per core, and everything that can go wrong on the way to it.
//!
//! A core is shared by the Python objects that are views of it: `sched.manager.pool` and `sched` lock the same one.
//!
//! # Lock order
//! The lock is never held while waiting for the interpreter:
//! - A short call (it touches fewer than `LONG` blocks, nodes or tokens) keeps the interpreter attached if the lock is
//!   free at once, and detaches while it waits otherwise.
//! - A long call detaches first, then locks, and unlocks before it attaches again. Where the arguments do not tell
//!   which of the two a call is (a step's, one about a whole sequence), a short look at the core under the lock does.
//! - No Python code runs under the lock: closures get plain values and return plain values; arguments are read
//!   before, results are built after. So a finaliser, a signal handler or `__index__` that calls back finds it free.
//!
//! # Faults
//! A panic under the lock may have left the core between two states: it is caught, the core is marked broken, and
//! this and every later call raises `CorruptionError`. A child of `fork()` holds a copy of the core, perhaps in the
//! middle of another thread's call: its calls raise `ForkedProcessError` before they touch the lock.
//!
//! # Closing
//! `close()` of any object takes the core from all that share it: their later calls raise `ClosedError`, those of a
//! damaged core too. `closed` is true before the first of them is refused. Memory that NumPy arrays may still show,
//! which is that of a scheduler's plans, is kept until they are gone.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use pyo3::prelude::*;

use super::core::Core;
use super::errors::{self, Class};
use crate::error::{Error, Result};
use crate::guarded::{Damaged, Guarded};
use crate::plan::PlanBuffer;

/// Elements from which on a call is long (some 10 µs). Detaching for less would be slower, and with other Python
/// threads running much slower: attaching again waits for them to give way.
const LONG: usize = 2048;

/// How often this process was forked off; raised in each child. A core remembers the value of its birth.
static GENERATION: AtomicU64 = AtomicU64::new(0);

/// A core that several Python objects share.
pub struct Shared {
    /// None: closed.
    core: Guarded<Option<Core>>,
    closed: AtomicBool,
    /// What is left of a core that was closed: memory that arrays may still show.
    left: OnceLock<Option<PlanBuffer>>,
    generation: u64,
}

/// How Python objects hold a core.
pub type Handle = Arc<Shared>;

impl Shared {
    pub fn new(core: Core) -> Handle {
        Arc::new(Self {
            core: Guarded::new(Some(core)),
            closed: AtomicBool::new(false),
            left: OnceLock::new(),
            generation: GENERATION.load(Ordering::Relaxed),
        })
    }

    /// Runs a short call.
    pub fn call<R: Send>(&self, py: Python<'_>, f: impl FnOnce(&mut Core) -> Result<R> + Send) -> PyResult<R> {
        self.open(py)?;
        let outcome = match self.core.try_call(opened(f)) {
            Ok(outcome) => outcome,
            Err(f) => py.detach(|| self.core.call(f)),
        };
        self.told(py, outcome)
    }

    /// Runs a long call, other Python threads beside it.
    pub fn call_detached<R: Send>(&self, py: Python<'_>, f: impl FnOnce(&mut Core) -> Result<R> + Send) -> PyResult<R> {
        self.open(py)?;
        let outcome = py.detach(|| self.core.call(opened(f)));
        self.told(py, outcome)
    }

    /// Runs a long call that may put another core into the place of this one; the place of a closed one is empty.
    pub fn call_place<R: Send>(
        &self,
        py: Python<'_>,
        f: impl FnOnce(&mut Option<Core>) -> Result<R> + Send,
    ) -> PyResult<R> {
        self.open(py)?;
        let outcome = py.detach(|| self.core.call(f));
        self.told(py, outcome)
    }

    /// Runs a call that touches `size` blocks, nodes or tokens: long or short accordingly.
    pub fn call_sized<R: Send>(
        &self,
        py: Python<'_>,
        size: usize,
        f: impl FnOnce(&mut Core) -> Result<R> + Send,
    ) -> PyResult<R> {
        if size < LONG {
            self.call(py, f)
        } else {
            self.call_detached(py, f)
        }
    }

    /// Runs a call that touches `size(core)` blocks, sequences or tokens, which is asked under the lock: long or short
    /// accordingly. `size` only reads counts: it takes far less than the call.
    pub fn call_weighed<R: Send>(
        &self,
        py: Python<'_>,
        size: impl FnOnce(&mut Core) -> usize,
        mut f: impl FnMut(&mut Core) -> Result<R> + Send,
    ) -> PyResult<R> {
        self.open(py)?;
        let short = self.core.try_call(|core| {
            let size = core.as_mut().map_or(0, size);
            (size < LONG).then(|| opened(&mut f)(core))
        });
        let outcome = match short {
            Ok(Ok(Some(result))) => Ok(result),
            Ok(Err(damaged)) => Err(damaged),
            Ok(Ok(None)) | Err(_) => py.detach(|| self.core.call(opened(f))),
        };
        self.told(py, outcome)
    }

    /// Ends the core, once the calls that run are done, and gives its memory back. Idempotent. O(its size).
    pub fn close(&self, py: Python<'_>) -> PyResult<()> {
        self.ours(py)?;
        // Before the core is taken: whoever does not find it any more finds this.
        self.closed.store(true, Ordering::Release);
        py.detach(|| {
            // Taken out first: nobody waits for the lock while the memory is given back.
            if let Some(core) = self.core.replace(None) {
                self.left.get_or_init(|| core.into_plan_memory());
            }
        });
        Ok(())
    }

    /// Whether the core was closed.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Can it be called at all? Asked before every call, and by what does not reach the core and yet makes no sense
    /// without it.
    pub fn open(&self, py: Python<'_>) -> PyResult<()> {
        self.ours(py)?;
        if self.is_closed() {
            return Err(errors::from_core(py, &Error::Closed));
        }
        Ok(())
    }

    /// Is it this process's?
    fn ours(&self, py: Python<'_>) -> PyResult<()> {
        if self.generation != GENERATION.load(Ordering::Relaxed) {
            return Err(errors::from_core(py, &Error::ForkedProcess));
        }
        Ok(())
    }

    fn told<R>(&self, py: Python<'_>, outcome: std::result::Result<Result<R>, Damaged>) -> PyResult<R> {
        match outcome {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => {
                if let Error::Corruption { .. } = error {
                    // A core that found itself damaged stays refused, whatever the next call would find.
                    self.core.condemn(error.to_string());
                }
                Err(errors::from_core(py, &error))
            }
            Err(Damaged(reason)) => {
                let message = format!("the core is damaged and refuses every call: {reason}");
                Err(errors::new(py, Class::Corruption, message)
                    .hint("create a new one; unless blocks of others were released or committed, report what led here")
                    .into())
            }
        }
    }
}

/// A call of a core that may have been closed while it waited.
fn opened<R>(f: impl FnOnce(&mut Core) -> Result<R>) -> impl FnOnce(&mut Option<Core>) -> Result<R> {
    |core| core.as_mut().ok_or(Error::Closed).and_then(f)
}

/// Called by Python in each forked child (`os.register_at_fork`).
#[pyfunction]
fn _after_fork_in_child() {
    GENERATION.fetch_add(1, Ordering::Relaxed);
}

/// Makes forked children known. A child that was forked by other means than Python's cannot go on in Python anyway.
pub fn watch_forks(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    let hook = wrap_pyfunction!(_after_fork_in_child, module)?;
    let os = py.import("os")?;
    if os.hasattr("register_at_fork")? {
        let kwargs = pyo3::types::PyDict::new(py);
        kwargs.set_item("after_in_child", hook)?;
        os.call_method("register_at_fork", (), Some(&kwargs))?;
    }
    Ok(())
}
