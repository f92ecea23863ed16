//! Block allocator, prefix cache, block tables and continuous-batching scheduler of pagedcore.
//!
//! Levels 0 to 3 of the package. Nothing here touches a tensor: every level returns data (which block to copy
//! where, which slot a token goes to). The `python` feature adds the `pagedcore._core` extension module; without
//! it the crate builds and tests with no Python installed.
#![forbid(unsafe_code)]

mod bitmap;
mod content;
mod copies;
mod error;
#[cfg(any(test, feature = "python"))]
mod guarded;
mod ids;
mod lru;
mod manager;
mod namespace;
mod plan;
mod policy;
mod pool;
mod prefix;
#[cfg(feature = "python")]
mod python;
mod request;
mod scheduler;
mod sequence;
mod tokens;
mod trie;
mod zeroing;

pub use content::{ContentKey, ContentKeys, MAX_CONTENT_DEPTH, MAX_KEY_BYTES};
pub use error::{BlockProblem, Error, Expected, Result, StepProblem};
pub use ids::{BlockId, HandleKind, NamespaceHandle, NodeHandle, NodeId, SeqHandle, Step};
pub use manager::{KVCacheManager, KVGroup, MAX_FORKS, ManagerConfig, ManagerStats};
pub use namespace::{ExtraKey, NamespaceKey};
pub use plan::{ARRAYS, Array, ArrayInfo, BlockTableView, DType, HEADER_BYTES, StepPlan};
pub use policy::Rank;
pub use pool::{BlockPool, BlockState, MAX_BLOCK_SIZE, MAX_BLOCKS, NoCache, PoolStats, Reclaim};
pub use prefix::{CacheStats, Commit, PrefixCache, PrefixHit};
pub use request::{EndReason, RequestParams};
pub use scheduler::{
    Explanation, Finished, Phase, PlannedStep, Reason, Scheduler, SchedulerConfig, SchedulerStats, Started, StepResult,
};
