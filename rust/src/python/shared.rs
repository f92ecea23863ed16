//! One lock per core, and everything that can go wrong on the way to it.
//!
//! A core is shared by the Python objects that are views of it: `sched.manager.pool` and `sched` lock the same one.
//!
//! # Lock order
//! The lock is never held while waiting for the interpreter:
//! - A short call (O(1), or O(blocks) of one sequence) keeps the interpreter attached if the lock is free at once, and
//!   detaches while it waits otherwise.
//! - A long call (O(prompt), O(pool)) detaches first, then locks, and unlocks before it attaches again.
//! - No Python code runs under the lock: closures get plain values and return plain values; arguments are read
//!   before, results are built after. So a finaliser, a signal handler or `__index__` that calls back finds it free.
//!
//! # Faults
//! A panic under the lock may have left the core between two states: it is caught, the core is marked broken, and
//! this and every later call raises `CorruptionError`. A child of `fork()` holds a copy of the core, perhaps in the
//! middle of another thread's call: its calls raise `ForkedProcessError` before they touch the lock.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, TryLockError};

use pyo3::prelude::*;

use super::core::Core;
use super::errors::{self, Class};
use crate::error::{Error, Result};

/// Elements from which on a call is long (some 10 µs). Detaching for less would be slower, and with other Python threads
/// running much slower: attaching again waits for them to give way.
const LONG: usize = 2048;

/// How often this process was forked off; raised in each child. A core remembers the value of its birth.
static GENERATION: AtomicU64 = AtomicU64::new(0);

/// A core that several Python objects share.
pub struct Shared {
    core: Mutex<Core>,
    generation: u64,
    /// Why the core cannot be used any more.
    broken: OnceLock<String>,
}

/// How Python objects hold a core.
pub type Handle = Arc<Shared>;

enum Failure {
    Refused(Error),
    Broken(String),
}

impl Shared {
    pub fn new(core: Core) -> Handle {
        Arc::new(Self {
            core: Mutex::new(core),
            generation: GENERATION.load(Ordering::Relaxed),
            broken: OnceLock::new(),
        })
    }

    /// Runs a short call.
    pub fn call<R: Send>(&self, py: Python<'_>, f: impl FnOnce(&mut Core) -> Result<R> + Send) -> PyResult<R> {
        self.usable(py)?;
        let outcome = match self.core.try_lock() {
            Ok(guard) => self.run(guard, f),
            Err(TryLockError::WouldBlock) => py.detach(|| self.wait(f)),
            Err(TryLockError::Poisoned(_)) => Err(Failure::Broken(POISONED.to_owned())),
        };
        outcome.map_err(|failure| self.raise(py, failure))
    }

    /// Runs a long call, other Python threads beside it.
    pub fn call_detached<R: Send>(&self, py: Python<'_>, f: impl FnOnce(&mut Core) -> Result<R> + Send) -> PyResult<R> {
        self.usable(py)?;
        py.detach(|| self.wait(f)).map_err(|failure| self.raise(py, failure))
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

    fn wait<R>(&self, f: impl FnOnce(&mut Core) -> Result<R>) -> Result<R, Failure> {
        match self.core.lock() {
            Ok(guard) => self.run(guard, f),
            Err(_) => Err(Failure::Broken(POISONED.to_owned())),
        }
    }

    fn run<R>(&self, mut guard: MutexGuard<'_, Core>, f: impl FnOnce(&mut Core) -> Result<R>) -> Result<R, Failure> {
        // Looked at again: another call may have broken the core while this one waited.
        if let Some(reason) = self.broken.get() {
            return Err(Failure::Broken(reason.clone()));
        }
        match catch_unwind(AssertUnwindSafe(|| f(&mut guard))) {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(Failure::Refused(error)),
            Err(panic) => {
                let reason = self.broken.get_or_init(|| panic_message(panic.as_ref()));
                Err(Failure::Broken(reason.clone()))
            }
        }
    }

    fn usable(&self, py: Python<'_>) -> PyResult<()> {
        if self.generation != GENERATION.load(Ordering::Relaxed) {
            return Err(errors::new(
                py,
                Class::ForkedProcess,
                "this core belongs to the parent of a forked process",
            )
            .hint("create it in the process that uses it, or start processes with the 'spawn' method")
            .into());
        }
        match self.broken.get() {
            Some(reason) => Err(corruption(py, reason)),
            None => Ok(()),
        }
    }

    fn raise(&self, py: Python<'_>, failure: Failure) -> PyErr {
        match failure {
            Failure::Broken(reason) => corruption(py, &reason),
            Failure::Refused(error) => {
                if let Error::Corruption { .. } = error {
                    // A core that found itself damaged stays refused, whatever the next call would find.
                    let _ = self.broken.set(error.to_string());
                }
                errors::from_core(py, &error)
            }
        }
    }
}

const POISONED: &str = "a call died while it held the lock";

fn corruption(py: Python<'_>, reason: &str) -> PyErr {
    errors::new(
        py,
        Class::Corruption,
        format!("the core is damaged and refuses every call: {reason}"),
    )
    .hint("this is a bug in pagedcore; create a new core, and report what led here")
    .into()
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("internal error: {}", text.unwrap_or("unknown"))
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
