//! The sequences that run, by stable row.
//!
//! A row is a place in `[0, max_num_seqs)` that a sequence keeps while it runs; a server keeps its per-sequence
//! arrays by row. Three orders are kept, each where it is cheap: *rows* are the lowest free numbers, *order* is the
//! line in which sequences are served and preempted, *lines* is the order in which they stand in a plan, which
//! changes as little as possible so that the plan's block table stays where it is.

use std::sync::Arc;

use crate::ids::SeqHandle;
use crate::policy::Rank;

/// What the step loop touches of each sequence: one cache line.
#[derive(Clone, Debug)]
#[repr(align(64))]
pub(crate) struct Row {
    /// Number of this assignment of the row, never used twice; 0 while the row is free.
    pub uid: u64,
    /// Slot of position p of the block being filled is `slot_base + p`. Valid while `computed < slots`.
    pub slot_base: i64,
    /// Tokens known.
    pub num_tokens: u32,
    /// Tokens whose keys and values are written.
    pub computed: u32,
    /// Positions below have a slot of their own.
    pub slots: u32,
    /// The manager is told of computed tokens when they reach this: the next end of a block.
    pub commit_at: u32,
    /// The sequence ends with "length" when it has this many tokens.
    pub limit: u32,
    /// The newest token.
    pub last_token: u32,
    /// Tokens in the step that is being planned or in flight.
    pub scheduled: u32,
    /// First entry of the block table that no plan has told yet; `u32::MAX` if all are told.
    pub changed: u32,
    /// Place in `lines`.
    pub line: u32,
    /// The line of the plan's table that has its blocks, but for what `changed` says; `u32::MAX` if none has.
    pub written_line: u32,
    /// The token that ends it, or `NO_TOKEN`.
    pub stop: u32,
    /// What kept it out of the last step that was planned.
    pub stall: Stall,
    /// Whether its request has more stop tokens than that.
    pub more_stops: bool,
    /// Whether this is the first sequence of a group that waits for its prompt (`Request::leading`).
    pub leads: bool,
    /// Whether a plan has told that the row was assigned.
    pub announced: bool,
}

const _: () = assert!(size_of::<Row>() == 64, "a row is one cache line");

/// Not a token: ids are below 2³¹.
pub(crate) const NO_TOKEN: u32 = u32::MAX;

/// Why a running sequence was left out of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Stall {
    /// It was not.
    #[default]
    None,
    /// The token budget went to sequences before it.
    TokenBudget,
    /// The plan had no room for its block table changes.
    TableUpdates,
    /// The source of a copy that it needs has as many references as can be counted.
    References,
    /// Too few blocks, and nobody behind it to preempt; `RowOwner::short` says how few.
    Blocks,
}

/// What is needed of a row at the ends of blocks, and of its assignment.
#[derive(Clone, Debug)]
pub(crate) struct RowOwner {
    pub rank: Rank,
    pub request: u32,
    pub index: u32,
    pub request_id: Arc<str>,
    /// The sequence; `None` for a sibling that is to fork when its prompt is computed.
    pub seq: Option<SeqHandle>,
    /// Tokens that the manager knows; the rest is in `Rows::recent`.
    pub known: u32,
    /// Computed tokens that the manager knows of.
    pub told: u32,
    /// Blocks needed and available when it last stalled for blocks.
    pub short: (u64, u64),
}

/// Tokens of a row that the manager is not given one by one: a group of this many positions at a time.
pub(crate) const RECENT: usize = 16;

/// All rows.
#[derive(Debug)]
pub(crate) struct Rows {
    hot: Vec<Row>,
    owners: Vec<Option<RowOwner>>,
    /// The newest tokens of each row: that of position p at p modulo `RECENT`.
    recent: Vec<[u32; RECENT]>,
    /// A bit for each free row.
    free: Vec<u64>,
    num_free: usize,
    /// Free rows that are promised to siblings of sequences that run.
    pub reserved: usize,
    next_uid: u64,
    /// Rows with a sequence, by (rank, index).
    pub order: Vec<u32>,
    /// The same rows in the order of the plan.
    pub lines: Vec<u32>,
}

impl Row {
    const FREE: Self = Self {
        uid: 0,
        slot_base: 0,
        num_tokens: 0,
        computed: 0,
        slots: 0,
        commit_at: 0,
        limit: 0,
        last_token: 0,
        scheduled: 0,
        changed: 0,
        line: u32::MAX,
        written_line: u32::MAX,
        stop: NO_TOKEN,
        stall: Stall::None,
        more_stops: false,
        leads: false,
        announced: false,
    };

    /// Tokens still to be computed.
    pub const fn pending(&self) -> u32 {
        self.num_tokens - self.computed
    }

    /// Notes that table entries from `index` on differ from what plans have told. An index beyond the table says
    /// that none does.
    pub fn table_changed(&mut self, index: usize, table_len: usize) {
        if index < table_len {
            self.changed = self
                .changed
                .min(u32::try_from(index).expect("a table is shorter than the pool"));
        }
    }
}

impl Rows {
    pub fn new(max_num_seqs: usize) -> Self {
        let mut free = vec![u64::MAX; max_num_seqs.div_ceil(64)];
        if let (Some(last), used @ 1..) = (free.last_mut(), max_num_seqs % 64) {
            *last = (1 << used) - 1;
        }
        Self {
            hot: vec![Row::FREE; max_num_seqs],
            owners: vec![None; max_num_seqs],
            recent: vec![[0; RECENT]; max_num_seqs],
            free,
            num_free: max_num_seqs,
            reserved: 0,
            next_uid: 1,
            order: Vec::with_capacity(max_num_seqs),
            lines: Vec::with_capacity(max_num_seqs),
        }
    }

    pub fn get(&self, row: u32) -> &Row {
        &self.hot[row as usize]
    }

    pub fn get_mut(&mut self, row: u32) -> &mut Row {
        &mut self.hot[row as usize]
    }

    /// The owner of a row that is not free.
    pub fn owner(&self, row: u32) -> &RowOwner {
        self.owners[row as usize].as_ref().expect("the row is assigned")
    }

    pub fn owner_mut(&mut self, row: u32) -> &mut RowOwner {
        self.owners[row as usize].as_mut().expect("the row is assigned")
    }

    /// The sequence of a row that takes part in steps.
    pub fn seq(&self, row: u32) -> SeqHandle {
        self.owner(row).seq.expect("rows in the order have a sequence")
    }

    /// Has the row a sequence?
    pub fn is_seated(&self, row: u32) -> bool {
        self.owner(row).seq.is_some()
    }

    /// The newest tokens of a row, up to the next multiple of `RECENT`.
    pub fn recent(&self, row: u32) -> &[u32; RECENT] {
        &self.recent[row as usize]
    }

    /// Appends a token to a live row. True if its group of positions is full, and the manager is to be given it.
    pub fn push(&mut self, row: u32, token: u32) -> bool {
        let r = &mut self.hot[row as usize];
        self.recent[row as usize][r.num_tokens as usize % RECENT] = token;
        r.num_tokens += 1;
        r.last_token = token;
        (r.num_tokens as usize).is_multiple_of(RECENT)
    }

    /// The owner of the last assignment, also after it ended; `None` if the row was never assigned.
    pub fn last_owner(&self, row: u32) -> Option<&RowOwner> {
        self.owners[row as usize].as_ref()
    }

    /// The row if it is still assigned as `uid` was.
    pub fn live(&mut self, row: u32, uid: u64) -> Option<&mut Row> {
        Some(&mut self.hot[row as usize]).filter(|r| r.uid == uid)
    }

    /// Rows that a newcomer can have.
    pub const fn available(&self) -> usize {
        self.num_free - self.reserved
    }

    /// Rows assigned.
    pub fn num_assigned(&self) -> usize {
        self.hot.len() - self.num_free
    }

    /// Gives the lowest free row to a sequence. It takes part in steps only after `enter`.
    ///
    /// # Panics
    /// If no row is free: the caller counts.
    pub fn assign(&mut self, owner: RowOwner, limit: u32, stops: &[u32]) -> u32 {
        let (word, bits) = self
            .free
            .iter_mut()
            .enumerate()
            .find(|(_, bits)| **bits != 0)
            .expect("a free row");
        let bit = bits.trailing_zeros();
        *bits &= *bits - 1;
        self.num_free -= 1;
        let row = u32::try_from(word * 64).expect("rows are int32") + bit;
        self.hot[row as usize] = Row {
            uid: self.next_uid,
            limit,
            stop: stops.first().copied().unwrap_or(NO_TOKEN),
            more_stops: stops.len() > 1,
            ..Row::FREE
        };
        self.owners[row as usize] = Some(owner);
        self.next_uid += 1;
        row
    }

    /// Lets a row with a sequence take part in steps. O(rows) moves of four bytes.
    pub fn enter(&mut self, row: u32) {
        let at = self.position(row);
        self.order.insert(at, row);
        let line = u32::try_from(self.lines.len()).expect("rows are int32");
        self.hot[row as usize].line = line;
        self.lines.push(row);
    }

    /// Ends the assignment of a row. O(rows) moves of four bytes.
    pub fn release(&mut self, row: u32) {
        let line = self.hot[row as usize].line as usize;
        if line < self.lines.len() {
            let at = self.position(row);
            debug_assert_eq!(self.order[at], row);
            self.order.remove(at);
            self.lines.swap_remove(line);
            if let Some(&moved) = self.lines.get(line) {
                self.hot[moved as usize].line = u32::try_from(line).expect("rows are int32");
            }
        }
        self.hot[row as usize] = Row::FREE;
        self.free[row as usize / 64] |= 1 << (row % 64);
        self.num_free += 1;
    }

    /// Where the row stands in `order`, or would.
    pub fn position(&self, row: u32) -> usize {
        let key = |row: u32| {
            let owner = self.owner(row);
            (owner.rank, owner.index)
        };
        self.order.partition_point(|&other| key(other) < key(row))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(priority: i64, arrival: u64, index: u32) -> RowOwner {
        RowOwner {
            rank: Rank { priority, arrival },
            request: 0,
            index,
            request_id: "r".into(),
            seq: None,
            known: 0,
            told: 0,
            short: (0, 0),
        }
    }

    #[test]
    fn rows_are_the_lowest_free_numbers() {
        let mut rows = Rows::new(65);
        for expected in 0..65 {
            assert_eq!(rows.assign(owner(0, u64::from(expected), 0), 9, &[]), expected);
        }
        assert_eq!(rows.available(), 0);
        rows.release(64);
        rows.release(3);
        assert_eq!(rows.available(), 2);
        assert_eq!(rows.assign(owner(0, 70, 0), 9, &[]), 3);
        assert_eq!(rows.assign(owner(0, 71, 0), 9, &[]), 64);
    }

    #[test]
    fn order_follows_rank_and_lines_move_as_little_as_possible() {
        let mut rows = Rows::new(4);
        let a = rows.assign(owner(0, 1, 0), 9, &[]);
        let b = rows.assign(owner(0, 2, 1), 9, &[]);
        let c = rows.assign(owner(-1, 3, 0), 9, &[]);
        let d = rows.assign(owner(0, 2, 0), 9, &[]);
        for row in [a, b, c, d] {
            rows.enter(row);
        }
        assert_eq!(rows.order, [c, a, d, b]);
        assert_eq!(rows.lines, [a, b, c, d]);
        rows.release(a);
        assert_eq!(rows.order, [c, d, b]);
        assert_eq!(rows.lines, [d, b, c], "only the last line moved");
        assert_eq!(rows.get(d).line, 0);
    }

    #[test]
    fn an_assignment_is_told_apart_from_the_next_one() {
        let mut rows = Rows::new(1);
        let row = rows.assign(owner(0, 1, 0), 9, &[]);
        let uid = rows.get(row).uid;
        assert!(rows.live(row, uid).is_some());
        rows.release(row);
        assert!(rows.live(row, uid).is_none());
        rows.assign(owner(0, 2, 0), 9, &[]);
        assert!(rows.live(row, uid).is_none());
    }
}
