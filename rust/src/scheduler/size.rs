//! How much a call is going to do, before it is made: what a caller needs to know who would let others run meanwhile.

use super::decide::HELD_PREFIX_TURNS;
use super::{Reason, Scheduler};

impl Scheduler {
    /// Tokens and blocks, about, that the next `schedule` looks at. O(log waiting).
    #[must_use]
    pub fn size_of_schedule(&self) -> usize {
        // A chunk of a prompt is followed by the next one.
        let running = self.in_flight.num_tokens;
        running
            .saturating_add(self.size_of_admissions())
            .saturating_add(self.size_of_victim())
    }

    /// Tokens of the requests that may be admitted.
    fn size_of_admissions(&self) -> usize {
        let Some((_, &head)) = self.waiting.first_key_value() else {
            return 0;
        };
        let r = &self.requests[head];
        let tokens = r.children[r.lead()].num_tokens as usize;
        if r.live as usize > self.rows.available() {
            return 0;
        }
        match &self.blocked {
            // Nothing was given back since it was refused, so it is refused again: at most its prefix is looked at.
            Some((blocked, Reason::Blocks { available, .. }))
                if *blocked == head && self.available_blocks() <= *available =>
            {
                match r.held_prefix {
                    Some((_, turn)) if self.turns + 1 < turn + HELD_PREFIX_TURNS => 0,
                    _ => tokens,
                }
            }
            // Each that can be admitted is as long as the first in line.
            _ => tokens.saturating_mul(self.waiting.len().min(self.rows.available())),
        }
    }

    /// Blocks of the sequence that is preempted first, if one is.
    fn size_of_victim(&self) -> usize {
        match self.rows.order.last() {
            Some(&last) if self.available_blocks() == 0 => {
                self.manager.table(self.rows.seq(last)).map_or(0, <[_]>::len)
            }
            _ => 0,
        }
    }

    /// Tokens and blocks, about, that the `update` or `cancel` of the step in flight looks at. O(1): no step is older,
    /// so the fences that pass are counted at once.
    #[must_use]
    pub fn size_of_update(&self) -> usize {
        let Some(step) = self.in_flight.step else { return 0 };
        let moved = self.in_flight.copies.len() + self.in_flight.blocks_to_zero.len();
        // Some of its sequences end and give up their blocks, perhaps the longest.
        self.in_flight.num_tokens + self.in_flight.width + moved + self.manager.pool().fences_up_to(step)
    }

    /// Blocks that a request gives up if it ends now; 0 for an unknown one. O(n).
    #[must_use]
    pub fn size_of_finish(&self, request_id: &str) -> usize {
        let children = self.find(request_id).map(|place| &self.requests[place].children);
        let sequences = children.into_iter().flatten().filter_map(|child| child.seq);
        sequences
            .filter_map(|seq| self.manager.table(seq).ok())
            .map(<[_]>::len)
            .sum()
    }
}
