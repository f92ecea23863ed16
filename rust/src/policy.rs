//! Who goes first, who gives way, and how much room an admission must leave: pure functions of numbers.
//!
//! The scheduler asks here and nowhere else, so that a policy can be read, tested and changed on one page.

/// Place of a request in the line. Smaller is served first: the smaller `priority`, then the earlier arrival.
///
/// It is fixed when the request is added and kept through preemptions, so a preempted request goes back to its
/// old place in the line, before everything that arrived later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank {
    /// As given by the user; a smaller number is more urgent.
    pub priority: i64,
    /// Counts the requests added; unique.
    pub arrival: u64,
}

/// Blocks of `tokens` tokens.
#[must_use]
pub const fn blocks_of(tokens: u64, block_size: u64) -> u64 {
    tokens.div_ceil(block_size)
}

/// The most blocks that a request ever holds when it runs alone: `n` sequences of up to `max_len` tokens that share
/// a prompt of `prompt_len`. The last token of a sequence is never fed back, so its slot is not counted.
///
/// The full blocks of the prompt are shared; from the block in which the prompt ends on, each sequence has its own.
/// While that block is copied its original is held for one step more, hence the extra block when `n > 1`.
#[must_use]
pub const fn worst_case_blocks(prompt_len: u64, max_len: u64, n: u64, block_size: u64) -> u64 {
    let longest = blocks_of(if max_len > prompt_len { max_len - 1 } else { prompt_len }, block_size);
    if n <= 1 {
        return longest;
    }
    let shared = prompt_len / block_size;
    let original = if prompt_len.is_multiple_of(block_size) { 0 } else { 1 };
    n.saturating_mul(longest - shared).saturating_add(shared + original)
}

/// Tokens by which every sequence that runs must be able to grow for a request to be admitted that was preempted
/// `preemptions` times before: one block at first, four times as many each time.
///
/// This is what bounds preemptions (S2). A request is only preempted when those before it in the line outgrow the
/// pool. Once the horizon reaches the longest sequence, admission means that all of them fit to their very end, so
/// the request is never preempted again by anything that was in the line before. That is at most
/// `2 + log4(max_model_len / block_size)` preemptions, as S2 says and the simulation checks (one to round the
/// logarithm up, and one to spare), plus those caused by more urgent newcomers and by groups that go back to their
/// place in the line because the caller ended their lead.
#[must_use]
pub const fn growth_horizon(preemptions: u32, block_size: u64) -> u64 {
    let shift = if preemptions > 20 { 40 } else { 2 * preemptions };
    block_size.saturating_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_smaller_priority_goes_first_then_the_earlier_arrival() {
        let rank = |priority, arrival| Rank { priority, arrival };
        assert!(rank(-1, 9) < rank(0, 1));
        assert!(rank(0, 1) < rank(0, 2));
    }

    #[test]
    fn worst_case_counts_each_slot_that_is_written() {
        // Prompt 5, one token to generate: the sixth token has no slot.
        assert_eq!(worst_case_blocks(5, 6, 1, 5), 1);
        assert_eq!(worst_case_blocks(5, 7, 1, 5), 2);
        assert_eq!(worst_case_blocks(1, 2, 1, 1), 1);
        // Four sequences share two full blocks; each has its own third block, and the original lives a step longer.
        assert_eq!(worst_case_blocks(9, 12, 4, 4), 2 + 1 + 4);
        assert_eq!(worst_case_blocks(8, 12, 4, 4), 2 + 4);
        assert_eq!(worst_case_blocks(8, 9, 4, 4), 2);
        assert_eq!(worst_case_blocks(10, 2_000_000_000, u64::MAX, 1), u64::MAX);
    }

    #[test]
    fn the_horizon_grows_to_cover_any_length() {
        assert_eq!(growth_horizon(0, 16), 16);
        assert_eq!(growth_horizon(2, 16), 256);
        assert!(growth_horizon(16, 1) > i32::MAX as u64);
        assert_eq!(growth_horizon(u32::MAX, u64::MAX), u64::MAX);
    }
}
