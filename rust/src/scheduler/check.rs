//! The invariants of reliability.md that concern a scheduler, checked.

use super::Scheduler;
use super::rows::{RECENT, Row};
use crate::error::{Error, Result};
use crate::policy;
use crate::request::Request;

impl Scheduler {
    /// Checks every invariant of the scheduler and of the levels below. O(everything): for tests and debugging.
    ///
    /// # Errors
    /// `Corruption` naming the invariant, with what was found and what belongs there.
    pub fn check(&self) -> Result<()> {
        self.usable()?;
        self.manager.check()?;
        let mut reserved = 0;
        let mut rows = 0;
        let mut seated = 0;
        for (place, request) in self.requests.iter() {
            self.check_request(place, request)?;
            if request.running {
                reserved += request
                    .children
                    .iter()
                    .filter(|c| c.is_live() && c.row.is_none())
                    .count();
            }
            rows += request.children.iter().filter(|c| c.row.is_some()).count();
            let seats = request
                .children
                .iter()
                .filter_map(|c| c.row)
                .filter(|&row| self.rows.is_seated(row));
            seated += seats.count();
        }
        let sequences = |request: &Request| request.children.iter().filter(|child| child.seq.is_some()).count();
        let sequences: usize = self.requests.iter().map(|(_, request)| sequences(request)).sum();
        let running = self.requests.iter().filter(|(_, request)| request.running).count();
        let equal = [
            ("S9", "requests by id", self.by_id.len(), self.requests.len()),
            (
                "S6",
                "requests in the line",
                self.waiting.len(),
                self.requests.len() - running,
            ),
            // Whatever else holds blocks is somebody else's.
            ("L1", "sequences of requests", self.manager.num_claimed(), sequences),
            ("S8", "rows promised to siblings", self.rows.reserved, reserved),
            ("S7", "rows assigned", self.rows.num_assigned(), rows),
            ("S1", "rows in the order", self.rows.order.len(), seated),
            ("S1", "rows in the lines", self.rows.lines.len(), seated),
        ];
        for (invariant, what, found, expected) in equal {
            ensure(found == expected, invariant, what, 0, found, expected)?;
        }
        for (place, pair) in self.rows.order.windows(2).enumerate() {
            let [a, b] = [pair[0], pair[1]].map(|row| (self.rows.owner(row).rank, self.rows.owner(row).index));
            ensure(a < b, "S2", "the order of the sequences", place, 0, 1)?;
        }
        for (place, &row) in self.rows.lines.iter().enumerate() {
            let line = self.rows.get(row).line as usize;
            ensure(line == place, "S7", "the line of a row", row as usize, line, place)?;
            self.check_row(row, self.rows.get(row))?;
        }
        self.check_plan()?;
        self.check_idle()
    }

    /// A request is in the line and holds nothing, or runs as a whole; and it fits the pool alone.
    fn check_request(&self, place: u32, request: &Request) -> Result<()> {
        let at = place as usize;
        let live = request.children.iter().filter(|child| child.is_live()).count();
        ensure(
            live == request.live as usize && live > 0,
            "S8",
            "sequences that have not ended",
            at,
            live,
            request.live as usize,
        )?;
        let needed = policy::worst_case_blocks(
            request.prompt_len.into(),
            request.limit.into(),
            request.children.len() as u64,
            self.config.block_size as u64,
        );
        ensure(
            needed <= self.config.usable_blocks(),
            "S3",
            "the blocks of a request alone",
            at,
            needed,
            self.config.usable_blocks(),
        )?;
        let waits = self.waiting.get(&request.rank) == Some(&place);
        ensure(
            waits != request.running,
            "S6",
            "being in the line or running",
            at,
            usize::from(waits),
            usize::from(!request.running),
        )?;
        for (index, child) in request.children.iter().enumerate() {
            let owner = child.row.map(|row| self.rows.owner(row));
            let matches =
                owner.is_none_or(|o| o.request == place && o.index as usize == index && o.rank == request.rank);
            ensure(matches, "S8", "the owner of a row", at, 0, 1)?;
            if !request.running || !child.is_live() {
                ensure(
                    child.row.is_none(),
                    "S8",
                    "rows of a sequence that does not run",
                    at,
                    1,
                    0,
                )?;
            }
            let seated = child.row.is_some_and(|row| self.rows.is_seated(row));
            // A group runs as its lead, or all of it does.
            let expected = request.running && child.is_live() && (!request.leading || index == request.lead());
            ensure(
                seated == expected,
                "S8",
                "a sequence that runs",
                at,
                usize::from(seated),
                usize::from(expected),
            )?;
            if let (Some(seq), false) = (child.seq, seated) {
                let held = self.manager.table(seq)?.len();
                ensure(held == 0, "S2", "blocks of a sequence that does not run", at, held, 0)?;
            }
        }
        Ok(())
    }

    /// What a row knows agrees with its sequence, and with what the plan's table holds.
    fn check_row(&self, id: u32, row: &Row) -> Result<()> {
        let at = id as usize;
        let seq = self.rows.seq(id);
        let owner = self.rows.owner(id);
        let table = self.manager.table(seq)?;
        let tokens = self.manager.num_tokens(seq)?;
        let known = owner.known as usize;
        ensure(tokens == known, "C2", "tokens that were told", at, tokens, known)?;
        let recent = (row.num_tokens as usize).checked_sub(known).filter(|&n| n < RECENT);
        ensure(
            recent.is_some(),
            "C2",
            "tokens of a row",
            at,
            row.num_tokens as usize,
            known,
        )?;
        ensure(
            row.computed < row.num_tokens,
            "S1",
            "a token to compute",
            at,
            row.computed,
            row.num_tokens,
        )?;
        ensure(
            row.num_tokens < row.limit,
            "S3",
            "tokens below the limit",
            at,
            row.num_tokens,
            row.limit,
        )?;
        let told = self.manager.num_computed_tokens(seq)?;
        ensure(
            told == owner.told as usize && told <= row.computed as usize,
            "P2",
            "computed tokens that were told",
            at,
            told,
            owner.told as usize,
        )?;
        ensure(
            row.computed <= row.slots,
            "A10",
            "slots of computed tokens",
            at,
            row.slots,
            row.computed,
        )?;
        let held = table.len() * self.config.block_size;
        ensure(
            row.slots as usize <= held,
            "A10",
            "slots that the table has",
            at,
            row.slots as usize,
            held,
        )?;
        let newest = row.num_tokens as usize - 1;
        let last = if newest < known {
            self.manager.token(seq, newest)?
        } else {
            self.rows.recent(id)[newest % RECENT]
        };
        ensure(
            row.last_token == last,
            "C2",
            "the newest token",
            at,
            row.last_token,
            last,
        )?;
        let line = self.lines.get(row.written_line as usize);
        ensure(
            line.is_none_or(|line| line.row == id),
            "C1",
            "the row of a line",
            at,
            0,
            1,
        )?;
        if let Some(line) = line.filter(|_| row.changed == u32::MAX) {
            let written = self.buffer.table_line(row.written_line as usize);
            ensure(
                line.entries == table.len(),
                "C1",
                "entries of a line",
                at,
                line.entries,
                table.len(),
            )?;
            for (index, block) in table.iter().enumerate() {
                let found = u32::try_from(written[index]).unwrap_or(u32::MAX);
                ensure(found == block.0, "C1", "an entry of a line", index, found, block.0)?;
            }
        }
        Ok(())
    }

    /// The step in flight is within its budgets.
    fn check_plan(&self) -> Result<()> {
        if self.in_flight.step.is_none() {
            return Ok(());
        }
        let budgets = [
            (
                "tokens of a step",
                self.in_flight.num_tokens,
                self.config.max_num_batched_tokens,
            ),
            (
                "sequences of a step",
                self.in_flight.entries.len(),
                self.config.max_num_seqs,
            ),
        ];
        for (what, found, limit) in budgets {
            ensure(found > 0 && found <= limit, "S7", what, 0, found, limit)?;
        }
        Ok(())
    }

    /// Idle means that every row is given back.
    fn check_idle(&self) -> Result<()> {
        if self.has_unfinished() {
            return Ok(());
        }
        let rows = self.rows.num_assigned();
        ensure(rows == 0, "L1", "rows of an idle scheduler", 0, rows, 0)
    }
}

fn ensure<T: TryInto<u64>>(
    ok: bool,
    invariant: &'static str,
    what: &'static str,
    at: usize,
    found: T,
    expected: T,
) -> Result<()> {
    if ok {
        Ok(())
    } else {
        Err(Error::corruption(invariant, what, at, found, expected))
    }
}
