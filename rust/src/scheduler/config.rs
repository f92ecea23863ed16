//! What a scheduler is made of, validated once.

use crate::error::{Error, Expected, Result};
use crate::manager::ManagerConfig;
use crate::plan::PlanLimits;
use crate::pool::{MAX_BLOCK_SIZE, MAX_BLOCKS};
use crate::tokens::Vocabulary;

/// Sizes and limits of a [`Scheduler`](super::Scheduler). `SchedulerConfig::new(num_blocks)` fills in the rest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// Blocks of the pool, the null block included.
    pub num_blocks: usize,
    /// Slots in a block.
    pub block_size: usize,
    /// Sequences that run at the same time: the number of rows.
    pub max_num_seqs: usize,
    /// Tokens in one step, over all sequences.
    pub max_num_batched_tokens: usize,
    /// Tokens of one sequence, prompt and output.
    pub max_model_len: usize,
    /// Token ids are below this, if it is given.
    pub vocab_size: Option<usize>,
    /// Whether computed blocks are kept for later requests with the same prefix.
    pub enable_prefix_caching: bool,
    /// Steps that may be scheduled before the first of them is updated. This version: 1.
    pub max_steps_in_flight: usize,
}

/// Positions, slots in a row and rows are int32 in a plan.
const MAX_INT32: u64 = i32::MAX as u64;

/// Rows are made when the scheduler is, some hundred bytes each: a typing error must not exhaust the machine's memory.
const MAX_ROWS: u64 = 1 << 16;

impl SchedulerConfig {
    /// Blocks of 16 tokens, 64 sequences, 2048 tokens a step, sequences of up to 4096 tokens, prefix caching on.
    #[must_use]
    pub const fn new(num_blocks: usize) -> Self {
        Self {
            num_blocks,
            block_size: 16,
            max_num_seqs: 64,
            max_num_batched_tokens: 2048,
            max_model_len: 4096,
            vocab_size: None,
            enable_prefix_caching: true,
            max_steps_in_flight: 1,
        }
    }

    /// Checks every field against its own range, and against the others.
    ///
    /// # Errors
    /// `InvalidArgument`, or `Unsupported` for more than one step in flight; both name the field.
    pub fn validate(&self) -> Result<()> {
        let ranges = [
            ("num_blocks", self.num_blocks, 2, MAX_BLOCKS as u64),
            ("block_size", self.block_size, 1, MAX_BLOCK_SIZE as u64),
            ("max_num_seqs", self.max_num_seqs, 1, MAX_ROWS),
            ("max_num_batched_tokens", self.max_num_batched_tokens, 1, MAX_INT32),
            // A prompt of one token and one to generate.
            ("max_model_len", self.max_model_len, 2, MAX_INT32),
            ("max_steps_in_flight", self.max_steps_in_flight, 1, MAX_INT32),
        ];
        for (argument, value, low, high) in ranges {
            if !(low..=high).contains(&(value as u64)) {
                return Err(Error::argument(argument, value, Expected::Between(low, high)));
            }
        }
        self.vocabulary()?;
        if self.max_steps_in_flight > 1 {
            return Err(Error::Unsupported {
                argument: "max_steps_in_flight",
                got: self.max_steps_in_flight as i128,
                expected: Expected::Exactly(1),
            });
        }
        Ok(())
    }

    pub(super) fn vocabulary(&self) -> Result<Vocabulary> {
        Vocabulary::new(self.vocab_size)
    }

    /// Blocks that requests can have: all but the null block.
    pub(crate) const fn usable_blocks(&self) -> u64 {
        self.num_blocks as u64 - 1
    }

    /// Blocks of the longest sequence there can be. Sequences share blocks, but none holds one twice.
    const fn max_blocks_per_seq(&self) -> usize {
        let longest = self.max_model_len.div_ceil(self.block_size);
        if longest < self.num_blocks - 1 {
            longest
        } else {
            self.num_blocks - 1
        }
    }

    /// The manager of a scheduler that makes its own.
    pub(crate) fn manager_config(&self) -> ManagerConfig {
        ManagerConfig {
            enable_prefix_caching: self.enable_prefix_caching,
            vocab_size: self.vocab_size,
            ..ManagerConfig::new(self.num_blocks, self.block_size)
        }
    }

    /// The size of a plan. Expects a valid configuration.
    pub(crate) fn plan_limits(&self) -> PlanLimits {
        let width = self.max_blocks_per_seq();
        // Each sequence begins at most one block it does not fill, and copies at most one.
        let blocks_written = self.max_num_batched_tokens / self.block_size + 2 * self.max_num_seqs;
        PlanLimits {
            max_num_seqs: self.max_num_seqs,
            max_num_tokens: self.max_num_batched_tokens,
            max_blocks_per_seq: width,
            // Room for some newcomers that bring a whole table each; a sequence whose changes do not fit waits for
            // the next step (`decide`). One that brings a whole table always fits.
            max_table_updates: 4 * width + blocks_written,
            // Sequences of other owners add theirs, as many as they like. But no block is copied to, or zeroed, twice.
            max_block_copies: self.num_blocks,
            max_blocks_to_zero: self.num_blocks,
            block_size: self.block_size,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_field_is_refused_by_name() {
        type Set = fn(&mut SchedulerConfig, usize);
        let fields: [(&str, Set); 7] = [
            ("num_blocks", |c, v| c.num_blocks = v),
            ("block_size", |c, v| c.block_size = v),
            ("max_num_seqs", |c, v| c.max_num_seqs = v),
            ("max_num_batched_tokens", |c, v| c.max_num_batched_tokens = v),
            ("max_model_len", |c, v| c.max_model_len = v),
            ("vocab_size", |c, v| c.vocab_size = Some(v)),
            ("max_steps_in_flight", |c, v| c.max_steps_in_flight = v),
        ];
        for (name, set) in fields {
            // What the pool does not take is refused here, before anything is made.
            let beyond = if name == "block_size" {
                MAX_BLOCK_SIZE + 1
            } else {
                (1 << 31) + 1
            };
            for value in [0, beyond, usize::MAX] {
                let mut config = SchedulerConfig::new(8);
                set(&mut config, value);
                match config.validate() {
                    Err(Error::InvalidArgument { argument, got, .. }) => {
                        assert_eq!((argument, got), (name, value as i128));
                    }
                    other => panic!("{name} = {value}: {other:?}"),
                }
            }
        }
        SchedulerConfig::new(2).validate().unwrap();
        let coarse = SchedulerConfig {
            block_size: MAX_BLOCK_SIZE,
            ..SchedulerConfig::new(2)
        };
        crate::Scheduler::new(coarse).unwrap();
    }

    #[test]
    fn more_steps_in_flight_are_refused_as_unsupported() {
        let config = SchedulerConfig {
            max_steps_in_flight: 2,
            ..SchedulerConfig::new(8)
        };
        assert!(matches!(
            config.validate(),
            Err(Error::Unsupported {
                argument: "max_steps_in_flight",
                got: 2,
                ..
            })
        ));
    }
}
