//! One buffer of the ring: sized once, written in place every step.

use super::layout::{ALIGN, ARRAYS, Array, DType, HEADER_BYTES, Header, place};
use super::view::StepPlan;
use crate::error::{Error, Expected, Result};

/// The most that a step can hold. Fixes the size of a [`PlanBuffer`] and the place of its block table.
#[derive(Clone, Copy, Debug)]
pub struct PlanLimits {
    /// Sequences in a step, and rows.
    pub max_num_seqs: usize,
    /// Tokens in a step.
    pub max_num_tokens: usize,
    /// Blocks of the longest sequence.
    pub max_blocks_per_seq: usize,
    /// Triples in `table_updates`.
    pub max_table_updates: usize,
    /// Pairs in `block_copies`.
    pub max_block_copies: usize,
    /// Blocks in `blocks_to_zero`.
    pub max_blocks_to_zero: usize,
    /// Slots in a block.
    pub block_size: usize,
}

impl PlanLimits {
    fn lens(&self) -> [usize; ARRAYS.len()] {
        PlanCounts {
            step: 0,
            num_seqs: self.max_num_seqs,
            num_tokens: self.max_num_tokens,
            num_samples: self.max_num_seqs,
            max_query_len: 0,
            max_seq_len: 0,
            width: 0,
            table_updates: self.max_table_updates,
            block_copies: self.max_block_copies,
            blocks_to_zero: self.max_blocks_to_zero,
        }
        .lens()
    }

    /// Bytes up to the block table, and of the block table.
    ///
    /// # Errors
    /// `InvalidArgument` if a plan of that size cannot be addressed with int32 counts or exceeds 16 GiB.
    fn bytes(&self) -> Result<(usize, usize)> {
        const LIMIT: u128 = 16 << 30;
        let widest = self
            .lens()
            .into_iter()
            .chain([self.max_blocks_per_seq, self.block_size])
            .max()
            .unwrap_or(0);
        let table = self.max_num_seqs as u128 * self.row_stride() as u128 * 4;
        let head = self
            .lens()
            .iter()
            .map(|&n| n as u128 * 12 + ALIGN as u128)
            .sum::<u128>()
            + HEADER_BYTES as u128;
        // The copies and zeroings there is room for are those of all blocks, however few the sequences.
        if self.max_block_copies as u128 * 8 + self.max_blocks_to_zero as u128 * 4 > LIMIT / 2 {
            let expected = Expected::That("so few that what a plan tells of them stays below 8 GiB, 12 bytes a block");
            return Err(Error::argument("num_blocks", self.max_block_copies, expected));
        }
        if widest > i32::MAX as usize || table + head > LIMIT {
            let expected = Expected::That("so few, for max_model_len and block_size, that a plan stays below 16 GiB");
            return Err(Error::argument("max_num_seqs", self.max_num_seqs, expected));
        }
        let (_, head) = place(self.lens(), 0, 0, 0);
        Ok((head, self.max_num_seqs * self.row_stride() * 4))
    }

    /// Entries from one line of the block table to the next: lines start at a multiple of 64 bytes.
    const fn row_stride(&self) -> usize {
        self.max_blocks_per_seq.next_multiple_of(ALIGN / 4)
    }
}

/// What one step holds, known before its arrays are written.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PlanCounts {
    pub step: u64,
    pub num_seqs: usize,
    pub num_tokens: usize,
    pub num_samples: usize,
    pub max_query_len: usize,
    pub max_seq_len: usize,
    /// Blocks of the longest sequence of the step.
    pub width: usize,
    pub table_updates: usize,
    pub block_copies: usize,
    pub blocks_to_zero: usize,
}

impl PlanCounts {
    fn lens(&self) -> [usize; ARRAYS.len()] {
        ARRAYS.map(|array| match array {
            Array::InputIds | Array::InputSources | Array::Positions | Array::SlotMapping => self.num_tokens,
            Array::QueryStartLoc => self.num_seqs + 1,
            Array::SeqLens | Array::Rows | Array::BlockTable => self.num_seqs,
            Array::LogitsIndices | Array::SampleSeqs => self.num_samples,
            Array::TableUpdates => self.table_updates,
            Array::BlockCopies => self.block_copies,
            Array::BlocksToZero => self.blocks_to_zero,
        })
    }
}

/// The arrays of a step while they are written. Vectors have exactly the lengths of [`PlanCounts`].
#[derive(Debug)]
pub(crate) struct PlanArrays<'a> {
    pub input_ids: &'a mut [i32],
    pub input_sources: &'a mut [i32],
    pub positions: &'a mut [i32],
    pub query_start_loc: &'a mut [i32],
    pub seq_lens: &'a mut [i32],
    pub rows: &'a mut [i32],
    pub logits_indices: &'a mut [i32],
    pub sample_seqs: &'a mut [i32],
    pub slot_mapping: &'a mut [i64],
    pub table_updates: &'a mut [i32],
    pub block_copies: &'a mut [i32],
    pub blocks_to_zero: &'a mut [i32],
    /// All lines, each `row_stride` entries long; they keep what earlier steps wrote.
    pub block_table: &'a mut [i32],
    pub row_stride: usize,
}

/// Memory of one plan, at one address for its whole life, so that it can be registered or pinned.
#[derive(Debug)]
pub(crate) struct PlanBuffer {
    /// Never grows after `new`. Starts a few words early, so that `base` can be aligned to 64 bytes.
    words: Vec<u64>,
    /// Index of the first aligned word.
    base: usize,
    /// Bytes before the block table.
    table_offset: usize,
    row_stride: usize,
    block_size: usize,
    header: Option<Header>,
}

impl PlanBuffer {
    /// Zeroed memory for the largest step; the pages are touched when they are first written.
    ///
    /// # Errors
    /// `InvalidArgument` if the limits exceed what a plan can address.
    pub fn new(limits: &PlanLimits) -> Result<Self> {
        let (table_offset, table_bytes) = limits.bytes()?;
        let len = (table_offset + table_bytes) / 8 + ALIGN / 8;
        // Zeroed pages cost no time until they are touched, but where there are none the process ends: so ask first.
        if Vec::<u64>::new().try_reserve_exact(len).is_err() {
            let expected = Expected::That("a plan (max_num_seqs * max_model_len) for which there is memory");
            return Err(Error::argument("max_num_seqs", limits.max_num_seqs, expected));
        }
        let mut words = vec![0_u64; len];
        // Only the address is taken, to know how far the first aligned word is.
        let base = (words.as_ptr() as usize).wrapping_neg() % ALIGN / 8;
        words.truncate(base + (table_offset + table_bytes) / 8);
        Ok(Self {
            words,
            base,
            table_offset,
            row_stride: limits.row_stride(),
            block_size: limits.block_size,
            header: None,
        })
    }

    /// Lays out a step, writes its header and lends its arrays. O(1) besides the writes of the caller.
    ///
    /// # Errors
    /// `Corruption` if a count exceeds the limits: the caller bounds them.
    pub fn begin(&mut self, counts: &PlanCounts) -> Result<PlanArrays<'_>> {
        let (arrays, head_bytes) = place(counts.lens(), counts.width, self.row_stride, self.table_offset);
        for (what, found, most) in [
            ("bytes of a plan", head_bytes, self.table_offset),
            ("blocks in a line of a plan", counts.width, self.row_stride),
        ] {
            if found > most {
                return Err(Error::corruption("S7", what, counts.step, found, most));
            }
        }
        let header = Header {
            step: counts.step,
            num_seqs: counts.num_seqs,
            num_tokens: counts.num_tokens,
            num_samples: counts.num_samples,
            max_query_len: counts.max_query_len,
            max_seq_len: counts.max_seq_len,
            block_size: self.block_size,
            head_bytes,
            total_bytes: self.table_offset + counts.num_seqs * self.row_stride * 4,
            arrays,
        };
        let (head, table) = self.words[self.base..].split_at_mut(self.table_offset / 8);
        let (first, mut rest) = head.split_at_mut(HEADER_BYTES / 8);
        header.write(bytemuck::cast_slice_mut(first));
        let mut take = |array: Array| -> &mut [u64] {
            let bytes = header.info(array).span() * array.dtype().size();
            let (taken, left) = std::mem::take(&mut rest).split_at_mut(bytes.next_multiple_of(ALIGN) / 8);
            rest = left;
            taken
        };
        let mut int32 = |array: Array| -> &mut [i32] {
            debug_assert_eq!(array.dtype(), DType::Int32);
            let words: &mut [i32] = bytemuck::cast_slice_mut(take(array));
            &mut words[..header.info(array).span()]
        };
        // In the order in which the arrays lie.
        let arrays = PlanArrays {
            input_ids: int32(Array::InputIds),
            input_sources: int32(Array::InputSources),
            positions: int32(Array::Positions),
            query_start_loc: int32(Array::QueryStartLoc),
            seq_lens: int32(Array::SeqLens),
            rows: int32(Array::Rows),
            logits_indices: int32(Array::LogitsIndices),
            sample_seqs: int32(Array::SampleSeqs),
            slot_mapping: &mut bytemuck::cast_slice_mut(take(Array::SlotMapping))[..counts.num_tokens],
            table_updates: &mut bytemuck::cast_slice_mut(take(Array::TableUpdates))[..counts.table_updates * 3],
            block_copies: &mut bytemuck::cast_slice_mut(take(Array::BlockCopies))[..counts.block_copies * 2],
            blocks_to_zero: &mut bytemuck::cast_slice_mut(take(Array::BlocksToZero))[..counts.blocks_to_zero],
            block_table: bytemuck::cast_slice_mut(table),
            row_stride: self.row_stride,
        };
        self.header = Some(header);
        Ok(arrays)
    }

    /// The step that was written last.
    ///
    /// # Panics
    /// If none ever was.
    pub fn plan(&self) -> StepPlan<'_> {
        let header = self.header.clone().expect("a plan was written");
        StepPlan::trusted(header, &self.words[self.base..])
    }

    /// Line `i` of the block table, as long as it can be.
    pub fn table_line(&self, i: usize) -> &[i32] {
        let table: &[i32] = bytemuck::cast_slice(&self.words[self.base + self.table_offset / 8..]);
        &table[i * self.row_stride..][..self.row_stride]
    }

    /// The memory that plans are written to, from its first aligned byte: for registering or pinning.
    pub fn memory(&self) -> &[u8] {
        bytemuck::cast_slice(&self.words[self.base..])
    }
}
