//! The one error type of the core.
//!
//! Every variant carries its numbers, so that a caller can act on them without reading the text. A call that
//! returns an error has changed nothing. The variants stand one to one for the exception classes of
//! `pagedcore.errors`; [`Error::hint`] says what to do about it.

use std::fmt;

use crate::ids::{BlockId, HandleKind, Step};

/// `Result` with the core's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What an argument should have been.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// At least this number.
    AtLeast(u64),
    /// At most this number.
    AtMost(u64),
    /// From the first number to the second, both included.
    Between(u64, u64),
    /// Exactly this number.
    Exactly(u64),
    /// What cannot be said by a number.
    That(&'static str),
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtLeast(low) => write!(f, "at least {low}"),
            Self::AtMost(high) => write!(f, "at most {high}"),
            Self::Between(low, high) => write!(f, "{low} to {high}"),
            Self::Exactly(value) => write!(f, "{value}"),
            Self::That(what) => f.write_str(what),
        }
    }
}

/// What is wrong with a block id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockProblem {
    /// Not below `num_blocks`.
    OutOfRange,
    /// The null block, which is never allocated, written or freed.
    Null,
    /// Nobody holds it, or fewer references exist than the call gives back.
    NotHeld,
    /// It has as many references as a counter can count.
    TooManyReferences,
    /// The trie has it already, at another place.
    AlreadyPublished,
}

impl fmt::Display for BlockProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OutOfRange => "is out of range",
            Self::Null => "is the null block",
            Self::NotHeld => "is not held so many times",
            Self::TooManyReferences => "has too many references",
            Self::AlreadyPublished => "is already published at another place",
        })
    }
}

/// What is wrong with a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepProblem {
    /// It has not begun.
    NotBegun,
    /// It is complete already.
    AlreadyComplete,
}

impl fmt::Display for StepProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotBegun => "has not begun",
            Self::AlreadyComplete => "is complete already",
        })
    }
}

/// Why a call was refused. Nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// An argument has a value that the call does not take.
    InvalidArgument {
        /// Its name in the call.
        argument: &'static str,
        /// Its value.
        got: i128,
        /// What would do.
        expected: Expected,
    },
    /// A valid combination that this version does not do.
    Unsupported {
        /// Its name in the call.
        argument: &'static str,
        /// Its value.
        got: i128,
        /// What is supported.
        expected: Expected,
    },
    /// A token id outside the vocabulary.
    TokenOutOfRange {
        /// The token id.
        token: i64,
        /// Its index in the tokens given.
        position: usize,
        /// Token ids are below this.
        vocab_size: u64,
    },
    /// A request that could never run, even alone.
    RequestTooLarge {
        /// What it needs.
        needed: u64,
        /// What there can be at most.
        limit: u64,
        /// What both numbers count: "tokens", "blocks".
        unit: &'static str,
    },
    /// A request id that is still in use.
    DuplicateRequest {
        /// The id, as the caller wrote it.
        request_id: Box<str>,
    },
    /// No request with this id.
    UnknownRequest {
        /// The id, as the caller wrote it.
        request_id: Box<str>,
    },
    /// A handle that was given up, or never existed.
    StaleHandle {
        /// What it was a handle of.
        kind: HandleKind,
        /// Its raw value.
        handle: u64,
    },
    /// A block id that the call cannot take.
    Block {
        /// The block.
        block: BlockId,
        /// The size of the pool.
        num_blocks: u32,
        /// What is wrong with it.
        problem: BlockProblem,
    },
    /// Not enough blocks; nothing was allocated.
    OutOfBlocks {
        /// Blocks that the call needs.
        needed: u64,
        /// Blocks it could have had: free ones, and cached ones that can be evicted.
        free: u64,
    },
    /// Steps were begun, completed, updated or cancelled out of order.
    Step {
        /// The step named by the caller.
        step: Step,
        /// The newest step begun (not begun), or the one before which all are complete (already complete).
        expected: Step,
        /// What is wrong with it.
        problem: StepProblem,
    },
    /// The steps of this pool are begun and completed by its scheduler alone.
    ForeignStep,
    /// The core was closed.
    Closed,
    /// An invariant does not hold: a bug in pagedcore, or the caller gave back or committed blocks that were somebody
    /// else's.
    Corruption {
        /// The broken invariant's name, as the documentation lists it ("A3").
        invariant: &'static str,
        /// What was found, in words.
        what: &'static str,
        /// Where: the block, node, sequence or step.
        at: u64,
        /// The value found.
        found: u64,
        /// The value that belongs there.
        expected: u64,
        /// The error that showed it, if one did.
        cause: Option<Box<Error>>,
    },
    /// The core was used in a child of a forked process.
    ForkedProcess,
}

impl Error {
    /// What to do about it, in one sentence; empty where the message says all.
    #[must_use]
    pub const fn hint(&self) -> &'static str {
        match self {
            Self::InvalidArgument { .. }
            | Self::Unsupported { .. }
            | Self::DuplicateRequest { .. }
            | Self::UnknownRequest { .. } => "",
            Self::TokenOutOfRange { .. } => "check that the tokenizer belongs to the model",
            Self::RequestTooLarge { .. } => "shorten the request, or make the pool larger",
            Self::StaleHandle { .. } => "a handle ends when what it stands for is freed, dropped or evicted",
            Self::Block { problem, .. } => match problem {
                BlockProblem::Null => "block 0 is the null block and belongs to nobody",
                BlockProblem::NotHeld => "each reference is given back once, and only by its holder",
                BlockProblem::AlreadyPublished => "a block is committed once, after the same parent",
                BlockProblem::OutOfRange | BlockProblem::TooManyReferences => "",
            },
            Self::OutOfBlocks { .. } => "free or preempt sequences, complete steps in flight, or make the pool larger",
            Self::Step { .. } => "a step is begun before its first read and completed once",
            Self::ForeignStep => "a step begins in schedule() and is complete after update() or cancel()",
            Self::Closed => "create a new one",
            Self::Corruption { .. } => {
                "unless blocks of others were released or committed, this is a bug: please report what led here"
            }
            Self::ForkedProcess => "create it in the process that uses it, or start processes with the 'spawn' method",
        }
    }

    /// Shorthand for [`Error::InvalidArgument`].
    pub(crate) fn argument(argument: &'static str, got: impl TryInto<i128>, expected: Expected) -> Self {
        // A value beyond i128 does not occur: the widest argument is a u64 or a usize.
        Self::InvalidArgument {
            argument,
            got: got.try_into().unwrap_or(i128::MAX),
            expected,
        }
    }

    /// Shorthand for [`Error::Corruption`].
    pub(crate) fn corruption(
        invariant: &'static str,
        what: &'static str,
        at: impl TryInto<u64>,
        found: impl TryInto<u64>,
        expected: impl TryInto<u64>,
    ) -> Self {
        Self::Corruption {
            invariant,
            what,
            at: at.try_into().unwrap_or(u64::MAX),
            found: found.try_into().unwrap_or(u64::MAX),
            expected: expected.try_into().unwrap_or(u64::MAX),
            cause: None,
        }
    }

    /// The corruption that an error stands for where none can be: inside an operation whose arguments were all
    /// checked, and which is left between two states.
    pub(crate) fn into_corruption(self) -> Self {
        if let Self::Corruption { .. } = self {
            return self;
        }
        Self::Corruption {
            invariant: "A6",
            what: "the number of errors inside a checked operation",
            at: 0,
            found: 1,
            expected: 0,
            cause: Some(Box::new(self)),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InvalidArgument {
                argument,
                got,
                expected,
            } => {
                write!(f, "{argument} is {got}, expected {expected}")
            }
            Self::Unsupported {
                argument,
                got,
                expected,
            } => {
                write!(f, "{argument} {got} is not supported, only {expected}")
            }
            Self::TokenOutOfRange {
                token,
                position,
                vocab_size,
            } => {
                write!(
                    f,
                    "token {token} at position {position} is outside 0 to {}",
                    vocab_size.saturating_sub(1)
                )
            }
            Self::RequestTooLarge { needed, limit, unit } => {
                write!(f, "the request needs {needed} {unit}, and there can be at most {limit}")
            }
            Self::DuplicateRequest { request_id } => {
                write!(f, "request {request_id} exists already")
            }
            Self::UnknownRequest { request_id } => write!(f, "there is no request {request_id}"),
            Self::StaleHandle { kind, handle } => {
                write!(f, "{kind} {handle:#x} does not exist, or not any more")
            }
            Self::Block {
                block,
                num_blocks,
                problem,
            } => {
                write!(f, "block {block} {problem} (the pool has {num_blocks} blocks)")
            }
            Self::OutOfBlocks { needed, free } => {
                write!(f, "needed {needed} blocks, {free} can be had")
            }
            Self::Step {
                step,
                expected,
                problem,
            } => {
                write!(f, "step {step} {problem}")?;
                match problem {
                    StepProblem::NotBegun => write!(f, " (the newest is {expected})"),
                    StepProblem::AlreadyComplete => write!(f, " (so are all before {expected})"),
                }
            }
            Self::ForeignStep => f.write_str("the steps of this pool are numbered by its scheduler"),
            Self::Closed => f.write_str("it was closed, or an object that shares its blocks was"),
            Self::Corruption {
                invariant,
                what,
                at,
                found,
                expected,
                cause,
            } => {
                write!(
                    f,
                    "invariant {invariant} broken: {what} at {at} is {found}, expected {expected}"
                )?;
                cause.as_ref().map_or(Ok(()), |cause| write!(f, " ({cause})"))
            }
            Self::ForkedProcess => f.write_str("this core belongs to the parent of a forked process"),
        }
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    /// What users read: lower case, with the numbers.
    #[test]
    fn messages_say_the_numbers() {
        let block = |problem| Error::Block {
            block: BlockId(9),
            num_blocks: 8,
            problem,
        };
        let step = |problem| Error::Step {
            step: 3,
            expected: 2,
            problem,
        };
        for (error, message) in [
            (
                Error::argument("n", 0, Expected::AtLeast(1)),
                "n is 0, expected at least 1",
            ),
            (
                Error::argument("n", -5, Expected::Between(1, 8)),
                "n is -5, expected 1 to 8",
            ),
            (
                Error::argument("n", u64::MAX, Expected::AtMost(8)),
                "n is 18446744073709551615, expected at most 8",
            ),
            (
                Error::Unsupported {
                    argument: "groups",
                    got: 2,
                    expected: Expected::That("one group"),
                },
                "groups 2 is not supported, only one group",
            ),
            (
                Error::TokenOutOfRange {
                    token: -1,
                    position: 4,
                    vocab_size: 100,
                },
                "token -1 at position 4 is outside 0 to 99",
            ),
            (
                Error::RequestTooLarge {
                    needed: 9,
                    limit: 7,
                    unit: "blocks",
                },
                "the request needs 9 blocks, and there can be at most 7",
            ),
            (
                Error::DuplicateRequest { request_id: "a".into() },
                "request a exists already",
            ),
            (
                Error::UnknownRequest { request_id: "a".into() },
                "there is no request a",
            ),
            (
                Error::StaleHandle {
                    kind: HandleKind::Sequence,
                    handle: 0x1_0000_0002,
                },
                "sequence 0x100000002 does not exist, or not any more",
            ),
            (
                block(BlockProblem::OutOfRange),
                "block 9 is out of range (the pool has 8 blocks)",
            ),
            (
                block(BlockProblem::Null),
                "block 9 is the null block (the pool has 8 blocks)",
            ),
            (
                block(BlockProblem::NotHeld),
                "block 9 is not held so many times (the pool has 8 blocks)",
            ),
            (
                block(BlockProblem::TooManyReferences),
                "block 9 has too many references (the pool has 8 blocks)",
            ),
            (
                block(BlockProblem::AlreadyPublished),
                "block 9 is already published at another place (the pool has 8 blocks)",
            ),
            (
                Error::OutOfBlocks { needed: 5, free: 3 },
                "needed 5 blocks, 3 can be had",
            ),
            (step(StepProblem::NotBegun), "step 3 has not begun (the newest is 2)"),
            (
                step(StepProblem::AlreadyComplete),
                "step 3 is complete already (so are all before 2)",
            ),
            (
                Error::ForeignStep,
                "the steps of this pool are numbered by its scheduler",
            ),
            (Error::Closed, "it was closed, or an object that shares its blocks was"),
            (
                Error::corruption("A1", "the number of used blocks", 0, 4, 5),
                "invariant A1 broken: the number of used blocks at 0 is 4, expected 5",
            ),
            (
                Error::ForkedProcess,
                "this core belongs to the parent of a forked process",
            ),
        ] {
            assert_eq!(error.to_string(), message);
            assert!(
                error.hint().is_empty() || !error.hint().ends_with('.'),
                "{}",
                error.hint()
            );
        }
    }
}
