//! A request: what the user asked for, and where its sequences are.

use std::fmt;
use std::sync::Arc;

use crate::content::ContentKeys;
use crate::ids::SeqHandle;
use crate::namespace::NamespaceKey;
use crate::policy::Rank;

/// How a request is to be served. `RequestParams::new(max_tokens)` fills in the rest.
#[derive(Clone, Debug)]
pub struct RequestParams {
    /// Tokens to generate for each sequence, at least 1. `max_model_len` may end it sooner.
    pub max_tokens: usize,
    /// A sequence that samples one of these ends with "stop"; the token is part of its output.
    pub stop_token_ids: Vec<u32>,
    /// Sequences that continue the prompt, each with samples of its own.
    pub n: usize,
    /// Smaller is more urgent; ties go to the earlier arrival.
    pub priority: i64,
    /// Whose prefixes may be reused.
    pub namespace: NamespaceKey,
    /// Positions whose content is not told by token ids.
    pub content_keys: ContentKeys,
    /// False: not scheduled while a sample of it is outstanding. With one step in flight none ever is.
    pub pipelined: bool,
}

impl RequestParams {
    /// One sequence of up to `max_tokens` tokens, no stop tokens, priority 0, the default namespace.
    #[must_use]
    pub fn new(max_tokens: usize) -> Self {
        Self {
            max_tokens,
            stop_token_ids: Vec::new(),
            n: 1,
            priority: 0,
            namespace: NamespaceKey::default(),
            content_keys: ContentKeys::default(),
            pipelined: true,
        }
    }
}

/// Why a sequence ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EndReason {
    /// It sampled a stop token.
    Stop,
    /// It has `max_tokens` tokens, or `max_model_len` with its prompt.
    Length,
    /// Its step failed: no sample could be drawn.
    Error,
    /// The caller gave it up.
    Abort,
    /// The caller's own word.
    Other(Arc<str>),
}

impl EndReason {
    /// The word that Python sees.
    #[must_use]
    pub fn as_str(&self) -> &str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Error => "error",
            Self::Abort => "abort",
            Self::Other(word) => word,
        }
    }
}

impl From<&str> for EndReason {
    fn from(word: &str) -> Self {
        match word {
            "stop" => Self::Stop,
            "length" => Self::Length,
            "error" => Self::Error,
            "abort" => Self::Abort,
            other => Self::Other(other.into()),
        }
    }
}

impl fmt::Display for EndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One of the `n` sequences of a request.
#[derive(Clone, Debug)]
pub(crate) struct Child {
    /// The manager's sequence; none before it runs for the first time.
    pub seq: Option<SeqHandle>,
    /// Its row while it runs, or is about to fork.
    pub row: Option<u32>,
    /// Tokens it had when it last stopped running; the prompt's before it first ran. 0 once it ended.
    pub num_tokens: u32,
}

impl Child {
    /// What is left of one that ended.
    pub const fn ended() -> Self {
        Self {
            seq: None,
            row: None,
            num_tokens: 0,
        }
    }

    pub const fn is_live(&self) -> bool {
        self.num_tokens > 0
    }
}

/// A request that has not ended.
#[derive(Debug)]
pub(crate) struct Request {
    pub id: Arc<str>,
    pub rank: Rank,
    /// The prompt until every sequence has it in the manager; empty from then on.
    pub prompt: Vec<u32>,
    pub prompt_len: u32,
    /// A sequence ends with "length" when it has this many tokens.
    pub limit: u32,
    /// In order, each once: there may be many, and every sample is looked up.
    pub stop: Box<[u32]>,
    pub namespace: NamespaceKey,
    pub content_keys: ContentKeys,
    pub children: Vec<Child>,
    /// Children that have not ended.
    pub live: u32,
    /// Has rows; else it is in the line.
    pub running: bool,
    /// Runs as its lead alone: the siblings have not forked yet.
    pub leading: bool,
    /// No sequence has a token of its own: the siblings take their first one from the lead's logits.
    pub fresh: bool,
    pub preemptions: u32,
    /// How often it was admitted.
    pub admissions: u32,
    /// Blocks of its prefix that others held when it was last looked up, and the turn of that.
    pub held_prefix: Option<(u64, u64)>,
}

impl Request {
    pub fn new(id: Arc<str>, rank: Rank, prompt: &[u32], limit: u32, params: RequestParams) -> Self {
        let prompt_len = u32::try_from(prompt.len()).expect("max_model_len is int32");
        let mut stop = params.stop_token_ids;
        stop.sort_unstable();
        stop.dedup();
        Self {
            id,
            rank,
            prompt: prompt.to_vec(),
            prompt_len,
            limit,
            stop: stop.into(),
            namespace: params.namespace,
            content_keys: params.content_keys,
            children: vec![
                Child {
                    num_tokens: prompt_len,
                    ..Child::ended()
                };
                params.n
            ],
            live: u32::try_from(params.n).expect("n is int32"),
            running: false,
            leading: false,
            fresh: true,
            preemptions: 0,
            admissions: 0,
            held_prefix: None,
        }
    }

    /// The first sequence that has not ended.
    ///
    /// # Panics
    /// If all have: then the request is gone.
    pub fn lead(&self) -> usize {
        self.children
            .iter()
            .position(Child::is_live)
            .expect("a sequence that has not ended")
    }

    /// The row of the lead while the request runs.
    pub fn lead_row(&self) -> u32 {
        self.children[self.lead()].row.expect("a running request has a row")
    }
}
