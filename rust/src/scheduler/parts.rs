//! What a scheduler is put together from beside its manager: all of it that can be refused, made before the manager is
//! touched.

use super::config::SchedulerConfig;
use super::rows::Rows;
use super::write::Line;
use crate::error::{Error, Expected, Result};
use crate::manager::KVCacheManager;
use crate::plan::{PlanBuffer, PlanLimits};
use crate::tokens::Vocabulary;

/// A valid configuration that fits a manager, with the memory for its plans and rows.
pub(crate) struct Parts {
    pub(super) config: SchedulerConfig,
    pub(super) limits: PlanLimits,
    pub(super) vocabulary: Vocabulary,
    pub(super) buffer: PlanBuffer,
    pub(super) rows: Rows,
    pub(super) lines: Vec<Line>,
}

impl Parts {
    /// Checks all that `Scheduler::with_manager` refuses. O(size of a plan).
    pub fn new(config: SchedulerConfig, manager: &KVCacheManager) -> Result<Self> {
        config.validate()?;
        let vocabulary = config.vocabulary()?;
        fits(&config, vocabulary, manager)?;
        let limits = config.plan_limits();
        Ok(Self {
            buffer: PlanBuffer::new(&limits)?,
            limits,
            vocabulary,
            rows: Rows::new(config.max_num_seqs),
            lines: vec![Line::default(); config.max_num_seqs],
            config,
        })
    }
}

/// Is the manager one that the configuration describes, and nobody in the middle of a step of it?
fn fits(config: &SchedulerConfig, vocabulary: Vocabulary, manager: &KVCacheManager) -> Result<()> {
    let sizes = [
        (
            "num_blocks",
            config.num_blocks as u64,
            manager.pool().num_blocks() as u64,
        ),
        ("block_size", config.block_size as u64, manager.block_size() as u64),
        ("vocab_size", vocabulary.size(), manager.vocabulary().size()),
    ];
    for (argument, expected, got) in sizes {
        if got != expected {
            return Err(Error::argument(argument, got, Expected::Exactly(expected)));
        }
    }
    let caching = manager.cache().is_some();
    if caching != config.enable_prefix_caching {
        let expected = Expected::That(if config.enable_prefix_caching {
            "a manager with enable_prefix_caching=True, as in config"
        } else {
            "a manager with enable_prefix_caching=False, as in config"
        });
        return Err(Error::argument("enable_prefix_caching", u64::from(caching), expected));
    }
    // Without merging, a request pins blocks that it does not hold, and might not fit its own bound (S3).
    if !manager.merge_blocks() {
        let expected = Expected::That("a manager with merge_blocks=True");
        return Err(Error::argument("merge_blocks", 0, expected));
    }
    let steps = manager.pool().steps_in_flight();
    if steps > 0 {
        let expected = Expected::That("a manager without steps in flight");
        return Err(Error::argument("steps_in_flight", steps, expected));
    }
    Ok(())
}
