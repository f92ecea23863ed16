//! Copy-on-write pairs: held from the plan that tells them to its update, so that a cancelled plan loses none.

use super::Scheduler;
use super::update::HeldCopy;
use crate::error::Result;

impl Scheduler {
    /// Drops the copies of a cancelled step whose destination has been given up since, and may be somebody else's by
    /// now. To be called when blocks are given up while no step is in flight, and before the next step's copies are
    /// collected. O(copies).
    pub(super) fn drop_stale_copies(&mut self) -> Result<()> {
        if self.in_flight.step.is_some() || self.in_flight.copies.is_empty() {
            return Ok(());
        }
        let manager = &mut self.manager;
        let mut stale = Vec::new();
        self.in_flight.copies.retain(|copy| {
            let wanted = copy.owner.is_none_or(|(seq, index)| {
                manager
                    .table(seq)
                    .is_ok_and(|table| table.get(index) == Some(&copy.dst))
            });
            if !wanted {
                stale.push(copy.src);
            }
            wanted
        });
        let (pool, cache) = manager.parts_mut();
        pool.release(&stale, None, cache)
    }

    /// Collects the manager's copies for the step that has begun, beside those of a cancelled step. The sources are
    /// held until `release_copies`.
    pub(super) fn take_copies(&mut self) -> Result<()> {
        let pending = self.manager.pending_copies();
        if pending.is_empty() {
            return Ok(());
        }
        let sources: Vec<_> = pending.iter().map(|&(src, _)| src).collect();
        let copies = pending.iter().map(|&(src, dst)| HeldCopy { src, dst, owner: None });
        self.in_flight.copies.extend(copies);
        self.manager.parts_mut().0.retain(&sources)?;
        self.manager.take_block_copies(0)?;
        Ok(())
    }

    /// Lets the sources go: the copies were made.
    pub(super) fn release_copies(&mut self) -> Result<()> {
        if self.in_flight.copies.is_empty() {
            return Ok(());
        }
        let sources: Vec<_> = self.in_flight.copies.drain(..).map(|copy| copy.src).collect();
        let (pool, cache) = self.manager.parts_mut();
        pool.release(&sources, None, cache)
    }

    /// Finds whose the destinations of the new copies are. Each is the block that a sequence of the step is about to
    /// write first. O(sequences + copies), if there are any.
    pub(super) fn find_copy_owners(&mut self) {
        if self.in_flight.copies.iter().all(|copy| copy.owner.is_some()) {
            return;
        }
        for entry in &self.in_flight.entries {
            let Some(row) = self.rows.live(entry.row, entry.uid) else {
                continue;
            };
            let index = row.computed as usize / self.config.block_size;
            let seq = self.rows.seq(entry.row);
            let dst = self.manager.table(seq).ok().and_then(|table| table.get(index));
            let copies = self.in_flight.copies.iter_mut();
            for copy in copies.filter(|copy| Some(&copy.dst) == dst) {
                copy.owner = Some((seq, index));
            }
        }
    }
}
