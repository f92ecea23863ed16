//! The format: names, types and places of a plan's arrays, and its header.

use crate::error::{Error, Expected, Result};

/// First word of a plan, "PCPL" when read as bytes on a little-endian machine.
const MAGIC: u32 = u32::from_le_bytes(*b"PCPL");
/// Raised whenever the meaning of a word changes.
const FORMAT: u32 = 1;
/// Every array starts at a multiple of this.
pub(super) const ALIGN: usize = 64;
/// Bytes of the header: 16 words about the step, then 8 words for each array, rounded up.
pub const HEADER_BYTES: usize = 512;
const HEADER_WORDS: usize = HEADER_BYTES / 4;
const ENTRY_WORDS: usize = 8;
const FIRST_ENTRY: usize = 16;

/// The arrays of a plan, in the order in which they lie in the buffer. `T` tokens, `S` sequences, `K` samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Array {
    /// `int32[T]`: token to embed, −1 where it is not known yet.
    InputIds,
    /// `int32[T]`: where `input_ids` is −1, the index into the previous plan's samples; else −1.
    InputSources,
    /// `int32[T]`: place of the token in its sequence.
    Positions,
    /// `int32[S + 1]`: tokens of sequence i are `query_start_loc[i]..query_start_loc[i + 1]`.
    QueryStartLoc,
    /// `int32[S]`: tokens of the sequence after this step, the ones of this step included.
    SeqLens,
    /// `int32[S]`: stable row of the sequence, in `[0, max_num_seqs)` while it runs.
    Rows,
    /// `int32[K]`: token index whose logits give sample k.
    LogitsIndices,
    /// `int32[K]`: stable row of the sequence that sample k belongs to.
    SampleSeqs,
    /// `int64[T]`: slot the token's keys and values are written to.
    SlotMapping,
    /// `int32[m, 3]`: (row, index, block) changes for a table kept on a device.
    TableUpdates,
    /// `int32[n, 2]`: (source, destination) blocks to copy, after zeroing and before writing.
    BlockCopies,
    /// `int32[z]`: blocks to zero first.
    BlocksToZero,
    /// `int32[S, width]`: blocks of each sequence of the plan, 0 after the last one.
    BlockTable,
}

/// Every array, in buffer order; `ARRAYS[a as usize] == a`.
pub const ARRAYS: [Array; 13] = [
    Array::InputIds,
    Array::InputSources,
    Array::Positions,
    Array::QueryStartLoc,
    Array::SeqLens,
    Array::Rows,
    Array::LogitsIndices,
    Array::SampleSeqs,
    Array::SlotMapping,
    Array::TableUpdates,
    Array::BlockCopies,
    Array::BlocksToZero,
    Array::BlockTable,
];

/// Element type of an array.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DType {
    /// Four bytes, signed.
    Int32,
    /// Eight bytes, signed.
    Int64,
}

impl DType {
    /// Bytes of one element.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::Int32 => 4,
            Self::Int64 => 8,
        }
    }

    const fn code(self) -> u32 {
        match self {
            Self::Int32 => 0,
            Self::Int64 => 1,
        }
    }
}

impl Array {
    /// Name of the attribute of `StepPlan` in Python.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::InputIds => "input_ids",
            Self::InputSources => "input_sources",
            Self::Positions => "positions",
            Self::QueryStartLoc => "query_start_loc",
            Self::SeqLens => "seq_lens",
            Self::Rows => "rows",
            Self::LogitsIndices => "logits_indices",
            Self::SampleSeqs => "sample_seqs",
            Self::SlotMapping => "slot_mapping",
            Self::TableUpdates => "table_updates",
            Self::BlockCopies => "block_copies",
            Self::BlocksToZero => "blocks_to_zero",
            Self::BlockTable => "block_table",
        }
    }

    /// Element type.
    #[must_use]
    pub const fn dtype(self) -> DType {
        match self {
            Self::SlotMapping => DType::Int64,
            _ => DType::Int32,
        }
    }

    /// Length of the second axis; 0 for a vector. The block table's is its width, which differs from step to step.
    const fn columns(self, width: usize) -> usize {
        match self {
            Self::TableUpdates => 3,
            Self::BlockCopies => 2,
            Self::BlockTable => width,
            _ => 0,
        }
    }
}

/// Where one array lies: what a binding needs to make a view of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArrayInfo {
    /// Which array.
    pub array: Array,
    /// Bytes from the start of the buffer, a multiple of 64.
    pub offset: usize,
    /// Length of the first axis.
    pub len: usize,
    /// Length of the second axis, or 0 if the array is a vector.
    pub columns: usize,
    /// Elements from one row to the next; 1 for a vector.
    pub row_stride: usize,
}

impl ArrayInfo {
    /// Elements from the first to one past the last, gaps between rows included.
    #[must_use]
    pub fn span(&self) -> usize {
        match self.len {
            0 => 0,
            n => (n - 1) * self.row_stride + self.columns.max(1),
        }
    }
}

/// The header of a plan, decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub step: u64,
    pub num_seqs: usize,
    pub num_tokens: usize,
    pub num_samples: usize,
    pub max_query_len: usize,
    pub max_seq_len: usize,
    pub block_size: usize,
    pub head_bytes: usize,
    pub total_bytes: usize,
    pub arrays: [ArrayInfo; ARRAYS.len()],
}

impl Header {
    /// Writes the header into the first `HEADER_BYTES` of a plan.
    pub fn write(&self, words: &mut [u32]) {
        words[..HEADER_WORDS].fill(0);
        words[0] = MAGIC;
        words[1] = FORMAT;
        put_u64(&mut words[2..4], self.step);
        words[4] = word(self.num_seqs);
        words[5] = word(self.num_tokens);
        words[6] = word(self.num_samples);
        words[7] = word(self.max_query_len);
        words[8] = word(self.max_seq_len);
        words[9] = word(self.block_size);
        put_u64(&mut words[10..12], self.head_bytes as u64);
        put_u64(&mut words[12..14], self.total_bytes as u64);
        words[14] = word(ARRAYS.len());
        for (info, entry) in self
            .arrays
            .iter()
            .zip(words[FIRST_ENTRY..].chunks_exact_mut(ENTRY_WORDS))
        {
            entry[0] = info.array as u32;
            entry[1] = info.array.dtype().code();
            entry[2] = word(info.len);
            entry[3] = word(info.columns);
            entry[4] = word(info.row_stride);
            put_u64(&mut entry[6..8], info.offset as u64);
        }
    }

    /// Reads and checks a header against a buffer of `len` bytes: shapes, types, alignment, order and ranges.
    pub fn read(words: &[u32], len: usize) -> Result<Self> {
        if len < HEADER_BYTES || words.len() < HEADER_WORDS {
            return Err(malformed(len, "at least the 512 bytes of a header"));
        }
        if words[0] != MAGIC {
            return Err(malformed(words[0], "a step plan (its first word is the magic number)"));
        }
        if words[1] != FORMAT {
            return Err(malformed(words[1], "a step plan of format 1"));
        }
        if words[14] as usize != ARRAYS.len() {
            return Err(malformed(words[14], "a step plan with 13 arrays"));
        }
        let mut header = Self {
            step: get_u64(&words[2..4]),
            num_seqs: words[4] as usize,
            num_tokens: words[5] as usize,
            num_samples: words[6] as usize,
            max_query_len: words[7] as usize,
            max_seq_len: words[8] as usize,
            block_size: words[9] as usize,
            head_bytes: size(get_u64(&words[10..12]))?,
            total_bytes: size(get_u64(&words[12..14]))?,
            arrays: ARRAYS.map(|array| ArrayInfo {
                array,
                offset: 0,
                len: 0,
                columns: 0,
                row_stride: 1,
            }),
        };
        if header.total_bytes > len || header.head_bytes > header.total_bytes {
            return Err(malformed(len, "a whole step plan, of at least total_bytes"));
        }
        if header.num_seqs == 0 || header.num_tokens < header.num_seqs || header.block_size == 0 {
            return Err(malformed(
                header.num_tokens,
                "a step with a token for each of its sequences, of which there is one or more",
            ));
        }
        let mut end = HEADER_BYTES;
        for (info, entry) in header
            .arrays
            .iter_mut()
            .zip(words[FIRST_ENTRY..].chunks_exact(ENTRY_WORDS))
        {
            if entry[0] != info.array as u32 || entry[1] != info.array.dtype().code() {
                return Err(malformed(
                    entry[0],
                    "the arrays of a step plan in their order and types",
                ));
            }
            info.len = entry[2] as usize;
            info.columns = entry[3] as usize;
            info.row_stride = entry[4] as usize;
            info.offset = size(get_u64(&entry[6..8]))?;
            let expected = match info.array {
                Array::InputIds | Array::InputSources | Array::Positions | Array::SlotMapping => {
                    Some(header.num_tokens)
                }
                Array::QueryStartLoc => Some(header.num_seqs + 1),
                Array::SeqLens | Array::Rows | Array::BlockTable => Some(header.num_seqs),
                Array::LogitsIndices | Array::SampleSeqs => Some(header.num_samples),
                Array::TableUpdates | Array::BlockCopies | Array::BlocksToZero => None,
            };
            if expected.is_some_and(|expected| expected != info.len)
                || info.columns != info.array.columns(info.columns)
                || info.row_stride < info.columns.max(1)
                || (info.array != Array::BlockTable && info.row_stride != info.columns.max(1))
            {
                return Err(malformed(entry[2], "arrays as long as the step's counts say"));
            }
            // At most (2³² − 1)² elements of 8 bytes: the sums below are done in 128 bits.
            let span = match info.len as u128 {
                0 => 0,
                n => (n - 1) * info.row_stride as u128 + info.columns.max(1) as u128,
            };
            let stop = info.offset as u128 + span * info.array.dtype().size() as u128;
            let limit = if info.array == Array::BlockTable {
                header.total_bytes
            } else {
                header.head_bytes
            };
            if info.offset < end || info.offset % ALIGN != 0 || stop > limit as u128 {
                return Err(malformed(
                    info.offset,
                    "arrays at multiples of 64 bytes, one after the other, inside the buffer",
                ));
            }
            end = info.offset + info.span() * info.array.dtype().size();
        }
        Ok(header)
    }

    pub fn info(&self, array: Array) -> &ArrayInfo {
        &self.arrays[array as usize]
    }
}

/// Lays `counts` out one array after the other from the end of the header; the table goes to `table_offset`.
pub(super) fn place(
    lens: [usize; ARRAYS.len()],
    width: usize,
    row_stride: usize,
    table_offset: usize,
) -> ([ArrayInfo; ARRAYS.len()], usize) {
    let mut end = HEADER_BYTES;
    let arrays = ARRAYS.map(|array| {
        let columns = array.columns(width);
        let stride = if array == Array::BlockTable {
            row_stride
        } else {
            columns.max(1)
        };
        let mut info = ArrayInfo {
            array,
            offset: end,
            len: lens[array as usize],
            columns,
            row_stride: stride,
        };
        if array == Array::BlockTable {
            info.offset = table_offset;
        } else {
            end = (end + info.span() * array.dtype().size()).next_multiple_of(ALIGN);
        }
        info
    });
    (arrays, end)
}

/// The error of every malformed buffer: what was found, and what a plan has there.
pub(super) fn malformed(found: impl TryInto<i128>, expected: &'static str) -> Error {
    Error::argument("buffer", found, Expected::That(expected))
}

fn word(n: usize) -> u32 {
    u32::try_from(n).expect("plan limits are checked when the ring is made")
}

fn size(n: u64) -> Result<usize> {
    usize::try_from(n).map_err(|_| malformed(n, "a size that this machine can address"))
}

fn put_u64(words: &mut [u32], value: u64) {
    words.copy_from_slice(bytemuck::cast_slice(&[value]));
}

fn get_u64(words: &[u32]) -> u64 {
    bytemuck::cast::<[u32; 2], u64>([words[0], words[1]])
}
