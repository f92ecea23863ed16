//! A plan as its readers see it: arrays by name, and the check of a plan that came from elsewhere.

use super::layout::{ALIGN, Array, ArrayInfo, Header, malformed};
use crate::error::Result;

/// One step, read only: a view of a buffer of the ring, or of bytes that another process sent.
#[derive(Clone, Debug)]
pub struct StepPlan<'a> {
    header: Header,
    /// The buffer up to `total_bytes`, at least.
    words: &'a [u64],
}

/// `int32[num_seqs, width]` with a row stride; row i belongs to sequence i of the plan.
#[derive(Clone, Copy, Debug)]
pub struct BlockTableView<'a> {
    data: &'a [i32],
    num_seqs: usize,
    width: usize,
    row_stride: usize,
}

impl<'a> BlockTableView<'a> {
    /// Blocks of sequence `i`, 0 after its last one.
    ///
    /// # Panics
    /// If `i` is not a sequence of the plan.
    #[must_use]
    pub fn row(&self, i: usize) -> &'a [i32] {
        assert!(i < self.num_seqs, "sequence {i} of {}", self.num_seqs);
        &self.data[i * self.row_stride..][..self.width]
    }

    /// Rows.
    #[must_use]
    pub const fn num_seqs(&self) -> usize {
        self.num_seqs
    }

    /// Blocks of the longest sequence of this step.
    #[must_use]
    pub const fn width(&self) -> usize {
        self.width
    }
}

impl<'a> StepPlan<'a> {
    /// Reads a plan that was written by this crate and trusted since; no check but debug ones.
    pub(super) const fn trusted(header: Header, words: &'a [u64]) -> Self {
        Self { header, words }
    }

    /// Reads a plan out of `buffer`, which may be longer than the plan. O(plan).
    ///
    /// Every shape and offset is checked, and every value that indexes something inside the plan: token ranges,
    /// positions, sequence lengths, logits, and slots against the table that they are written through. What indexes
    /// something outside is only known not to be negative, as a plan does not say how much there is: blocks and slots
    /// may lie beyond the reader's pool, `rows`, `sample_seqs` and `table_updates` beyond its rows, `input_sources`
    /// beyond the samples of the plan before, and token ids beyond its vocabulary.
    ///
    /// # Errors
    /// `InvalidArgument` if the buffer is not aligned to 8 bytes, is truncated, is not a plan of this format, or a
    /// value in it is out of range.
    pub fn from_buffer(buffer: &'a [u8]) -> Result<Self> {
        let whole = &buffer[..buffer.len() / 8 * 8];
        let words: &[u64] = bytemuck::try_cast_slice(whole)
            .map_err(|_| malformed(buffer.as_ptr() as usize % 8, "memory aligned to 8 bytes"))?;
        let header = Header::read(bytemuck::cast_slice(words), whole.len())?;
        let plan = Self { header, words };
        plan.check_values()?;
        Ok(plan)
    }

    /// Values that other code indexes with.
    fn check_values(&self) -> Result<()> {
        self.check_sequences()?;
        let tokens = to_i32(self.num_tokens())?;
        let below = |values: &[i32], low: i32, expected| match values.iter().find(|&&v| v < low) {
            Some(&value) => Err(malformed(value, expected)),
            None => Ok(()),
        };
        below(self.rows(), 0, "rows of 0 or more")?;
        below(self.sample_seqs(), 0, "sample_seqs of 0 or more")?;
        below(self.table_updates(), 0, "table_updates of 0 or more")?;
        below(self.block_copies(), 1, "block_copies that leave the null block alone")?;
        below(self.blocks_to_zero(), 1, "blocks_to_zero without the null block")?;
        for i in 0..self.num_seqs() {
            below(self.block_table().row(i), 0, "blocks of 0 or more in the table")?;
        }
        if let Some(&index) = self.logits_indices().iter().find(|index| !(0..tokens).contains(*index)) {
            return Err(malformed(index, "logits_indices that are tokens of the step"));
        }
        if let Some(copy) = self.block_copies().chunks_exact(2).find(|copy| copy[0] == copy[1]) {
            return Err(malformed(copy[0], "block copies between two blocks"));
        }
        for (&id, &source) in self.input_ids().iter().zip(self.input_sources()) {
            if (id >= 0) != (source == -1) || id < -1 || source < -1 {
                return Err(malformed(id, "either a token id, or -1 and the sample that gives it"));
            }
        }
        Ok(())
    }

    /// Each sequence has tokens, they end where it does, and are written where its table says.
    fn check_sequences(&self) -> Result<()> {
        let (starts, tokens) = (self.query_start_loc(), to_i32(self.num_tokens())?);
        let (width, block_size) = (to_i32(self.block_table().width())?, to_i32(self.block_size())?);
        if starts[0] != 0 || starts[self.num_seqs()] != tokens {
            return Err(malformed(starts[0], "query_start_loc from 0 to num_tokens"));
        }
        let (mut max_query_len, mut max_seq_len) = (0, 0);
        for (i, (bounds, &seq_len)) in starts.windows(2).zip(self.seq_lens()).enumerate() {
            // Rises from 0 to the number of tokens, so each bound is an index.
            let (Ok(start), Ok(stop)) = (usize::try_from(bounds[0]), usize::try_from(bounds[1])) else {
                return Err(malformed(bounds[0], "query_start_loc that rises"));
            };
            if start >= stop || stop > self.num_tokens() {
                return Err(malformed(bounds[1], "query_start_loc that rises"));
            }
            let query_len = bounds[1] - bounds[0];
            if seq_len < query_len || (seq_len - 1) / block_size >= width {
                return Err(malformed(
                    seq_len,
                    "seq_lens from the query length to what the block table holds",
                ));
            }
            let row = self.block_table().row(i);
            let placed = self.positions()[start..stop]
                .iter()
                .zip(&self.slot_mapping()[start..stop]);
            for ((&position, &slot), expected) in placed.zip(seq_len - query_len..) {
                if position != expected {
                    return Err(malformed(position, "positions that end at seq_lens"));
                }
                let block = row[usize::try_from(position / block_size).unwrap_or(usize::MAX)];
                if block <= 0 || slot != i64::from(block) * i64::from(block_size) + i64::from(position % block_size) {
                    return Err(malformed(slot, "slot_mapping as the block table says"));
                }
            }
            max_query_len = max_query_len.max(query_len);
            max_seq_len = max_seq_len.max(seq_len);
        }
        if (max_query_len, max_seq_len) != (to_i32(self.max_query_len())?, to_i32(self.max_seq_len())?) {
            return Err(malformed(
                max_query_len,
                "the longest query and sequence as the header says",
            ));
        }
        Ok(())
    }

    /// The step's number; steps count from 1.
    #[must_use]
    pub const fn step(&self) -> u64 {
        self.header.step
    }

    /// Sequences in this step, at least 1.
    #[must_use]
    pub const fn num_seqs(&self) -> usize {
        self.header.num_seqs
    }

    /// Tokens in this step.
    #[must_use]
    pub const fn num_tokens(&self) -> usize {
        self.header.num_tokens
    }

    /// Samples wanted, the length of `logits_indices`; 0 if all there is are chunks inside prompts.
    #[must_use]
    pub const fn num_samples(&self) -> usize {
        self.header.num_samples
    }

    /// Most tokens that one sequence has in this step.
    #[must_use]
    pub const fn max_query_len(&self) -> usize {
        self.header.max_query_len
    }

    /// Largest of `seq_lens`.
    #[must_use]
    pub const fn max_seq_len(&self) -> usize {
        self.header.max_seq_len
    }

    /// Slots in a block.
    #[must_use]
    pub const fn block_size(&self) -> usize {
        self.header.block_size
    }

    /// Bytes of everything but the block table, from the start of the buffer.
    #[must_use]
    pub const fn head_bytes(&self) -> usize {
        self.header.head_bytes
    }

    /// The whole plan as bytes: what is broadcast, and what `from_buffer` reads. Aligned to 64 bytes in the ring.
    #[must_use]
    pub fn buffer(&self) -> &'a [u8] {
        &bytemuck::cast_slice(self.words)[..self.header.total_bytes]
    }

    /// Where an array lies in `buffer`.
    #[must_use]
    pub fn info(&self, array: Array) -> ArrayInfo {
        debug_assert_eq!(self.header.info(array).offset % ALIGN, 0);
        *self.header.info(array)
    }

    fn int32(&self, array: Array) -> &'a [i32] {
        let info = self.header.info(array);
        let all: &[i32] = bytemuck::cast_slice(self.words);
        &all[info.offset / 4..][..info.span()]
    }

    /// See [`Array::InputIds`].
    #[must_use]
    pub fn input_ids(&self) -> &'a [i32] {
        self.int32(Array::InputIds)
    }

    /// See [`Array::InputSources`].
    #[must_use]
    pub fn input_sources(&self) -> &'a [i32] {
        self.int32(Array::InputSources)
    }

    /// See [`Array::Positions`].
    #[must_use]
    pub fn positions(&self) -> &'a [i32] {
        self.int32(Array::Positions)
    }

    /// See [`Array::QueryStartLoc`].
    #[must_use]
    pub fn query_start_loc(&self) -> &'a [i32] {
        self.int32(Array::QueryStartLoc)
    }

    /// See [`Array::SeqLens`].
    #[must_use]
    pub fn seq_lens(&self) -> &'a [i32] {
        self.int32(Array::SeqLens)
    }

    /// See [`Array::Rows`].
    #[must_use]
    pub fn rows(&self) -> &'a [i32] {
        self.int32(Array::Rows)
    }

    /// See [`Array::LogitsIndices`].
    #[must_use]
    pub fn logits_indices(&self) -> &'a [i32] {
        self.int32(Array::LogitsIndices)
    }

    /// See [`Array::SampleSeqs`].
    #[must_use]
    pub fn sample_seqs(&self) -> &'a [i32] {
        self.int32(Array::SampleSeqs)
    }

    /// See [`Array::SlotMapping`].
    #[must_use]
    pub fn slot_mapping(&self) -> &'a [i64] {
        let info = self.header.info(Array::SlotMapping);
        let all: &[i64] = bytemuck::cast_slice(self.words);
        &all[info.offset / 8..][..info.len]
    }

    /// See [`Array::TableUpdates`]; three numbers for each.
    #[must_use]
    pub fn table_updates(&self) -> &'a [i32] {
        self.int32(Array::TableUpdates)
    }

    /// See [`Array::BlockCopies`]; two numbers for each.
    #[must_use]
    pub fn block_copies(&self) -> &'a [i32] {
        self.int32(Array::BlockCopies)
    }

    /// See [`Array::BlocksToZero`].
    #[must_use]
    pub fn blocks_to_zero(&self) -> &'a [i32] {
        self.int32(Array::BlocksToZero)
    }

    /// See [`Array::BlockTable`].
    #[must_use]
    pub fn block_table(&self) -> BlockTableView<'a> {
        let info = self.header.info(Array::BlockTable);
        BlockTableView {
            data: self.int32(Array::BlockTable),
            num_seqs: info.len,
            width: info.columns,
            row_stride: info.row_stride,
        }
    }
}

fn to_i32(n: usize) -> Result<i32> {
    i32::try_from(n).map_err(|_| malformed(n, "lengths of int32"))
}
