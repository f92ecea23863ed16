//! Counts for people who watch a scheduler.

use super::Scheduler;
use crate::request::EndReason;

/// Where the requests are, and totals since the scheduler was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SchedulerStats {
    /// Requests that have rows.
    pub running: usize,
    /// Requests in the line, preempted ones included.
    pub waiting: usize,
    /// Rows assigned.
    pub rows: usize,
    /// Requests added.
    pub added: u64,
    /// Sequences that ended with "stop".
    pub stopped: u64,
    /// Sequences that ended with "length".
    pub length: u64,
    /// Sequences that ended with "error".
    pub failed: u64,
    /// Sequences that were aborted.
    pub aborted: u64,
    /// Sequences that were finished for a reason of the caller's own.
    pub finished_by_caller: u64,
    /// Steps updated.
    pub steps: u64,
    /// Steps cancelled.
    pub cancelled_steps: u64,
    /// Tokens computed by the steps that were updated.
    pub scheduled_tokens: u64,
    /// Samples accepted.
    pub sampled_tokens: u64,
    /// Preemptions of requests.
    pub preemptions: u64,
    /// Tokens looked up in the prefix cache at admissions and resumptions.
    pub prefix_query_tokens: u64,
    /// Tokens of them that were found.
    pub prefix_hit_tokens: u64,
    /// Block copies in the steps that were updated: copy-on-write.
    pub block_copies: u64,
    /// Blocks zeroed in the steps that were updated.
    pub blocks_zeroed: u64,
}

impl SchedulerStats {
    pub(super) fn count_end(&mut self, reason: &EndReason) {
        *match reason {
            EndReason::Stop => &mut self.stopped,
            EndReason::Length => &mut self.length,
            EndReason::Error => &mut self.failed,
            EndReason::Abort => &mut self.aborted,
            EndReason::Other(_) => &mut self.finished_by_caller,
        } += 1;
    }
}

impl Scheduler {
    /// The counts of this moment. O(1).
    #[must_use]
    pub fn stats(&self) -> SchedulerStats {
        SchedulerStats {
            running: self.requests.len() - self.waiting.len(),
            waiting: self.waiting.len(),
            rows: self.rows.num_assigned(),
            ..self.stats
        }
    }
}
