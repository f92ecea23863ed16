//! Groups (`n > 1`): the siblings of a lead get their rows, and fork when the prompt is computed.

use super::lifecycle::is_reference_limit;
use super::{Draft, Scheduler};
use crate::error::Result;

impl Scheduler {
    /// The lead's last chunk is in this step. If no sequence of the group has a token yet, each takes its first one
    /// from it, so each needs its row now. In a group that was preempted later only the lead samples.
    pub(super) fn seat_siblings(&mut self, lead_row: u32, draft: &mut Draft) {
        let request = self.rows.owner(lead_row).request;
        if !self.requests[request].fresh {
            return;
        }
        let lead = self.requests[request].lead();
        for index in lead + 1..self.requests[request].children.len() {
            let child = &self.requests[request].children[index];
            if !child.is_live() {
                continue;
            }
            // A row that a cancelled step has given stays.
            if child.row.is_none() {
                self.rows.reserved -= 1;
                self.take_row(request, index);
            }
            draft.num_samples += 1;
        }
    }

    /// Forks the siblings of a lead whose prompt is computed; those that had tokens when the group was preempted
    /// get them back. O(siblings · (blocks + tokens they had)).
    ///
    /// Where a block of the lead has too many references for all of them, or for the lead to be told (both are other
    /// owners' doing), the group goes back into the line: what it has computed is found again, and sampled then.
    pub(super) fn fork_siblings(&mut self, lead_row: u32) -> Result<()> {
        let request = self.rows.owner(lead_row).request;
        let lead = self.rows.owner(lead_row).index as usize;
        self.tell_computed(lead_row)?;
        let untold = self.rows.owner(lead_row).told < self.rows.get(lead_row).computed;
        let siblings = self.requests[request].live - 1;
        if untold || !self.manager.can_share(self.rows.seq(lead_row), siblings)? {
            return self.stop_running(request);
        }
        let r = self.rows.get_mut(lead_row);
        r.leads = false;
        // The lead's newest block is about to be shared: its next write has to ask for it.
        r.slots = r.computed;
        let computed = r.computed as usize;
        let lead_seq = self.rows.seq(lead_row);
        debug_assert!(computed >= self.requests[request].prompt_len as usize);
        let lead_request = &mut self.requests[request];
        lead_request.leading = false;
        // From here on the manager has the tokens of all.
        lead_request.fresh = false;
        lead_request.prompt = Vec::new();
        for index in 0..self.requests[request].children.len() {
            if index == lead || !self.requests[request].children[index].is_live() {
                continue;
            }
            let written = self.fork_sibling(request, index, lead_seq)?;
            let row = if let Some(row) = self.requests[request].children[index].row {
                row
            } else {
                self.rows.reserved -= 1;
                self.take_row(request, index)
            };
            self.seat(row, written)?;
        }
        Ok(())
    }

    /// Gives sequence `index` its blocks: those it had itself, if more than the prompt of them is still cached, else
    /// the prompt's from the lead. Returns how many of its tokens are written.
    fn fork_sibling(&mut self, request: u32, index: usize, lead_seq: crate::SeqHandle) -> Result<usize> {
        let r = &mut self.requests[request];
        let prompt_len = r.prompt_len as usize;
        let mut output = Vec::new();
        if let Some(seq) = r.children[index].seq {
            match self.manager.resume(seq) {
                Ok(hit) if hit >= prompt_len => return Ok(hit),
                Ok(_) => {}
                // Of its own, which others hold too often. It computes them again.
                Err(error) if is_reference_limit(&error) => {}
                Err(error) => return Err(error),
            }
            for position in prompt_len..self.manager.num_tokens(seq)? {
                output.push(self.manager.token(seq, position)?);
            }
            self.manager.free(seq, None)?;
        }
        let forked = self.manager.fork(lead_seq, 1)?;
        let seq = forked[0];
        r.children[index].seq = Some(seq);
        self.manager.claim(seq)?;
        // The lead may be past the prompt.
        self.manager.truncate(seq, prompt_len, None)?;
        self.manager.append(seq, &output)?;
        Ok(prompt_len)
    }
}
