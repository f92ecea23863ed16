//! The `pagedcore._core` extension module: the only place with `PyO3` in it.
//!
//! | file | what |
//! |---|---|
//! | `errors` | the core's errors as exceptions of `pagedcore.errors` |
//! | `arrays` | ids and counts in, `NumPy` arrays out |
//! | `core` | the state behind one lock: a bare pool, a manager, or a scheduler |
//! | `shared` | the lock; panics, forks, long and short calls |
//! | `pool`, `prefix`, `manager`, `scheduler` | levels 0 to 3, a class each, with the docstrings |

// Docstrings are Python's, `Arg` and the getters' receivers are what PyO3 makes of signatures, and a lifetime says that
// an object is the interpreter's.
#![allow(
    clippy::doc_markdown,
    clippy::elidable_lifetime_names,
    clippy::needless_pass_by_value,
    clippy::trivially_copy_pass_by_ref
)]

mod arrays;
mod core;
mod errors;
mod manager;
mod pool;
mod prefix;
mod shared;

use pyo3::prelude::*;

#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<pool::BlockPool>()?;
    module.add_class::<prefix::PrefixCache>()?;
    module.add_class::<prefix::PrefixHit>()?;
    module.add_class::<prefix::Commit>()?;
    module.add_class::<manager::KVGroup>()?;
    module.add_class::<manager::KVCacheManager>()?;
    shared::watch_forks(module)
}
