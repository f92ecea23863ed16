//! How much a call is going to do, before it is made: what a caller needs to know who would let others run meanwhile.

use super::Scheduler;

impl Scheduler {
    /// Tokens and blocks, about, that the next `schedule` looks at. O(log waiting).
    #[must_use]
    pub fn size_of_schedule(&self) -> usize {
        // A chunk of a prompt is followed by the next one.
        let running = self.in_flight.num_tokens;
        // Each that can be admitted is as long as the first in line.
        let admitted = self.waiting.first_key_value().map_or(0, |(_, &request)| {
            let r = &self.requests[request];
            let tokens = r.children[r.lead()].num_tokens as usize;
            tokens.saturating_mul(self.waiting.len().min(self.rows.available()))
        });
        running.saturating_add(admitted)
    }

    /// Tokens and blocks, about, that the `update` of the step in flight looks at. O(1).
    #[must_use]
    pub fn size_of_update(&self) -> usize {
        // Some of its sequences end and give up their blocks, perhaps the longest.
        self.in_flight.num_tokens + self.in_flight.width
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
