//! Why a request is where it is, for people and for programs.

use std::fmt;
use std::sync::Arc;

use super::Scheduler;
use super::rows::Stall;
use crate::error::Result;

/// Where a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Has rows and takes part in steps.
    Running,
    /// Was never admitted.
    Waiting,
    /// Was admitted, lost its blocks, and waits to be resumed.
    Preempted,
}

/// What keeps a request from getting tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reason {
    /// The token budget of the last step went to others.
    TokenBudget,
    /// Fewer rows are free than it has sequences.
    Rows {
        /// Rows it needs.
        needed: usize,
        /// Rows that are free and not promised to siblings.
        available: usize,
    },
    /// Too few blocks: those that the running requests are still going to need are counted as needed.
    Blocks {
        /// Blocks needed; those of its prefix that others hold are deducted.
        needed: u64,
        /// Blocks that are free or can be evicted.
        available: u64,
    },
    /// Running requests were short of blocks in the last step, and come first.
    RunningShortOfBlocks,
    /// The last plan had no room for its block table; it has in one of the next.
    TableUpdates,
    /// A block that it would share has as many references as can be counted: other owners hold it 2³² − 1 times.
    References,
    /// Requests are admitted in order, and this one is next before it.
    Behind {
        /// The request just before it in the line.
        request_id: Arc<str>,
    },
    /// No step was planned since it arrived.
    NotConsidered,
}

/// Answer of [`Scheduler::explain`]. Its text is what Python shows: `"waiting: blocks (needed 12, available 7)"`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// Where the request is.
    pub phase: Phase,
    /// What holds it up; `None` for a request that was served in the last step.
    pub reason: Option<Reason>,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Running => "running",
            Self::Waiting => "waiting",
            Self::Preempted => "preempted",
        })
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TokenBudget => f.write_str("token budget"),
            Self::Rows { needed, available } => write!(f, "rows (needed {needed}, available {available})"),
            Self::Blocks { needed, available } => write!(f, "blocks (needed {needed}, available {available})"),
            Self::RunningShortOfBlocks => f.write_str("running requests are short of blocks"),
            Self::TableUpdates => f.write_str("table updates"),
            Self::References => f.write_str("references to a block it shares"),
            Self::Behind { request_id } => write!(f, "behind {request_id}"),
            Self::NotConsidered => f.write_str("next step"),
        }
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.reason {
            None => self.phase.fmt(f),
            Some(reason) => write!(f, "{}: {reason}", self.phase),
        }
    }
}

impl Scheduler {
    /// Says where a request is and what it waits for. O(log waiting + n).
    ///
    /// # Errors
    /// `UnknownRequest` if there is none with this id, or it has ended.
    pub fn explain(&self, request_id: &str) -> Result<Explanation> {
        let place = self.find(request_id)?;
        let request = &self.requests[place];
        if request.running {
            // A group is held up when all of its sequences are.
            let mut stalls = request
                .children
                .iter()
                .filter_map(|c| c.row)
                .filter(|&row| self.rows.is_seated(row))
                .map(|row| (self.rows.get(row).stall, self.rows.owner(row).short));
            let (stall, short) = stalls.next().unwrap_or_default();
            let others_served = stalls.any(|(stall, _)| stall == Stall::None);
            let reason = match stall {
                Stall::None => None,
                _ if others_served => None,
                Stall::TokenBudget => Some(Reason::TokenBudget),
                Stall::TableUpdates => Some(Reason::TableUpdates),
                Stall::References => Some(Reason::References),
                Stall::Blocks => Some(Reason::Blocks {
                    needed: short.0,
                    available: short.1,
                }),
            };
            return Ok(Explanation {
                phase: Phase::Running,
                reason,
            });
        }
        let phase = if request.admissions > 0 {
            Phase::Preempted
        } else {
            Phase::Waiting
        };
        let reason = match (self.waiting.range(..request.rank).next_back(), &self.blocked) {
            (Some((_, &before)), _) => Reason::Behind {
                request_id: Arc::clone(&self.requests[before].id),
            },
            (None, Some((blocked, reason))) if *blocked == place => reason.clone(),
            (None, _) => Reason::NotConsidered,
        };
        Ok(Explanation {
            phase,
            reason: Some(reason),
        })
    }
}
