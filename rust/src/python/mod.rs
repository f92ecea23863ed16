//! The `pagedcore._core` extension module: the only place with `PyO3` in it.
//!
//! | file | what |
//! |---|---|
//! | `errors` | the core's errors as exceptions of `pagedcore.errors` |
//! | `arguments`, `arrays` | single values in; arrays of ids in, without an object per id |
//! | `numpy` | arrays out, and views |
//! | `core` | the state behind one lock: a bare pool, a manager, or a scheduler |
//! | `shared` | the lock; panics, forks, long and short calls |
//! | `pool`, `prefix`, `manager`, `config`, `scheduler`, `plan` | the classes of levels 0 to 3, with their docstrings |

// Docstrings are Python's, `Arg` and the getters' receivers are what PyO3 makes of signatures, and a lifetime says that
// an object is the interpreter's.
#![allow(
    clippy::doc_markdown,
    clippy::elidable_lifetime_names,
    clippy::needless_pass_by_value,
    clippy::trivially_copy_pass_by_ref
)]

mod arguments;
mod arrays;
mod config;
mod core;
mod errors;
mod manager;
mod numpy;
mod plan;
mod pool;
mod prefix;
mod scheduler;
mod shared;

use pyo3::prelude::*;

#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<pool::BlockPool>()?;
    module.add_class::<prefix::PrefixCache>()?;
    module.add_class::<prefix::PrefixHit>()?;
    module.add_class::<prefix::Commit>()?;
    module.add_class::<config::KVGroup>()?;
    module.add_class::<manager::KVCacheManager>()?;
    module.add_class::<config::SchedulerConfig>()?;
    module.add_class::<scheduler::Scheduler>()?;
    module.add_class::<scheduler::StepResult>()?;
    module.add_class::<scheduler::Explanation>()?;
    module.add_class::<plan::StepPlan>()?;
    shared::watch_forks(module)
}
