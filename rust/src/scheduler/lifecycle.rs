//! From the first call that names a request to its end: add, start, preempt, finish, abort.

use std::sync::Arc;

use super::rows::{RECENT, Row, RowOwner, Rows};
use super::update::Finished;
use super::{Reason, Scheduler};
use crate::error::{BlockProblem, Error, Expected, Result};
use crate::manager::KVCacheManager;
use crate::policy::{self, Rank};
use crate::request::{Child, EndReason, Request, RequestParams};

impl Scheduler {
    /// Adds a request at the end of the line of its priority. It takes no block before it is admitted.
    /// O(prompt + n + log waiting).
    ///
    /// # Errors
    /// Nothing has changed on any of these. `DuplicateRequest`; `InvalidArgument` for an empty prompt, `n` or
    /// `max_tokens` of 0, or `n` above `max_num_seqs`; `TokenOutOfRange` for a token of the prompt
    /// or a stop token outside the vocabulary; `RequestTooLarge` for a prompt of `max_model_len` tokens or more, and
    /// for a request that needs more blocks than the pool has when it runs alone to its end.
    pub fn add_request(&mut self, request_id: &str, prompt: &[u32], params: RequestParams) -> Result<()> {
        self.usable()?;
        let limit = self.validate(request_id, prompt, &params)?;
        let id: Arc<str> = request_id.into();
        let rank = Rank {
            priority: params.priority,
            arrival: self.arrivals,
        };
        self.arrivals += 1;
        let place = self
            .requests
            .insert(Request::new(Arc::clone(&id), rank, prompt, limit, params));
        self.by_id.insert(id, place);
        self.waiting.insert(rank, place);
        self.stats.added += 1;
        Ok(())
    }

    /// Checks a request against the configuration. Returns the length at which its sequences end.
    fn validate(&self, request_id: &str, prompt: &[u32], params: &RequestParams) -> Result<u32> {
        let config = &self.config;
        if self.by_id.contains_key(request_id) {
            return Err(Error::DuplicateRequest {
                request_id: request_id.into(),
            });
        }
        if prompt.is_empty() {
            return Err(Error::argument(
                "prompt_token_ids",
                0,
                Expected::That("one token or more"),
            ));
        }
        if params.max_tokens == 0 {
            return Err(Error::argument("max_tokens", 0, Expected::AtLeast(1)));
        }
        if params.n == 0 || params.n > config.max_num_seqs {
            return Err(Error::argument(
                "n",
                params.n,
                Expected::Between(1, config.max_num_seqs as u64),
            ));
        }
        if prompt.len() >= config.max_model_len {
            return Err(Error::RequestTooLarge {
                needed: prompt.len() as u64 + 1,
                limit: config.max_model_len as u64,
                unit: "tokens",
            });
        }
        self.vocabulary.check(prompt)?;
        self.vocabulary.check(&params.stop_token_ids)?;
        let limit = prompt.len().saturating_add(params.max_tokens).min(config.max_model_len);
        let needed = policy::worst_case_blocks(
            prompt.len() as u64,
            limit as u64,
            params.n as u64,
            config.block_size as u64,
        );
        if needed > config.usable_blocks() {
            return Err(Error::RequestTooLarge {
                needed,
                limit: config.usable_blocks(),
                unit: "blocks",
            });
        }
        Ok(u32::try_from(limit).expect("max_model_len is int32"))
    }

    /// Ends a request, or the sequence `index` of it, for a reason of the caller's own ("stop" for a stop string, say).
    /// Returns what ended; no later update tells it again. Blocks go at once, or when the step in flight completes.
    /// O(n + blocks given up + log waiting + rows).
    ///
    /// # Errors
    /// `UnknownRequest`; `InvalidArgument` if the request has no sequence `index`. One that ended before is no error,
    /// and nothing ends.
    pub fn finish(&mut self, request_id: &str, reason: &EndReason, index: Option<usize>) -> Result<Vec<Finished>> {
        self.usable()?;
        let place = self.find(request_id)?;
        let n = self.requests[place].children.len();
        if let Some(index) = index.filter(|&index| index >= n) {
            return Err(Error::argument("index", index, Expected::Between(0, n as u64 - 1)));
        }
        let mut ended = Vec::new();
        let result = self.end(place, index, reason, &mut ended);
        self.guard(result)?;
        Ok(ended)
    }

    /// `finish` with the reason "abort", for the whole request. O(n + blocks given up + log waiting + rows).
    ///
    /// # Errors
    /// `UnknownRequest`, also for one that has ended.
    pub fn abort(&mut self, request_id: &str) -> Result<Vec<Finished>> {
        self.finish(request_id, &EndReason::Abort, None)
    }

    /// Gives the request's first unfinished sequence its prefix hit and a row; or says why it cannot share
    /// the hit, and takes nothing.
    pub(super) fn start(&mut self, request: u32) -> Result<Option<Reason>> {
        let r = &mut self.requests[request];
        let lead = r.lead();
        let seq = match r.children[lead].seq {
            Some(seq) => self.manager.resume(seq).map(|_| seq),
            None => self.manager.add(&r.prompt, r.namespace.clone(), r.content_keys.clone()),
        };
        let seq = match seq {
            Err(error) if is_reference_limit(&error) => return Ok(Some(Reason::References)),
            seq => seq?,
        };
        if r.live > 1 && !self.manager.can_share(seq, r.live - 1)? {
            // The siblings could not fork: it would come back to the line each time that its prompt is computed.
            match r.children[lead].seq {
                Some(seq) => self.manager.preempt(seq, None)?,
                None => self.manager.free(seq, None)?,
            }
            return Ok(Some(Reason::References));
        }
        self.manager.claim(seq)?;
        if r.live == 1 {
            // From here on the manager keeps the tokens.
            r.prompt = Vec::new();
        }
        r.children[lead].seq = Some(seq);
        r.running = true;
        r.admissions = r.admissions.saturating_add(1);
        r.leading = r.live > 1;
        self.rows.reserved += r.live as usize - 1;
        self.waiting.remove(&r.rank);
        let row = self.take_row(request, lead);
        let hit = self.manager.num_computed_tokens(seq)?;
        self.rows.get_mut(row).leads = self.requests[request].leading;
        self.seat(row, hit)?;
        Ok(None)
    }

    /// Takes the blocks and the rows of a running request and puts it back into its place in the line.
    pub(super) fn preempt(&mut self, request: u32) -> Result<()> {
        self.stop_running(request)?;
        let r = &mut self.requests[request];
        r.preemptions += 1;
        self.in_flight.preempted.push(Arc::clone(&r.id));
        self.stats.preemptions += 1;
        Ok(())
    }

    /// Puts a running request back into its place in the line, without its blocks and rows. O(n + blocks).
    pub(super) fn stop_running(&mut self, request: u32) -> Result<()> {
        let r = &mut self.requests[request];
        for child in r.children.iter_mut().filter(|child| child.is_live()) {
            let Some(row) = child.row.take() else {
                self.rows.reserved -= 1;
                continue;
            };
            if self.rows.is_seated(row) {
                child.num_tokens = self.rows.get(row).num_tokens;
                tell_tokens(&mut self.manager, &mut self.rows, row)?;
                self.manager.preempt(self.rows.seq(row), None)?;
            }
            self.rows.release(row);
        }
        r.running = false;
        r.leading = false;
        r.held_prefix = None;
        self.waiting.insert(r.rank, request);
        Ok(())
    }

    /// Assigns a row to sequence `index` of a request.
    pub(super) fn take_row(&mut self, request: u32, index: usize) -> u32 {
        let r = &mut self.requests[request];
        let owner = RowOwner {
            rank: r.rank,
            request,
            index: u32::try_from(index).expect("n is int32"),
            request_id: Arc::clone(&r.id),
            seq: None,
            known: 0,
            told: 0,
            short: (0, 0),
        };
        let row = self.rows.assign(owner, r.limit, &r.stop);
        r.children[index].row = Some(row);
        row
    }

    /// Lets the sequence of a row take part in steps, with its first `computed` tokens written.
    pub(super) fn seat(&mut self, row: u32, computed: usize) -> Result<()> {
        let owner = self.rows.owner(row);
        let child = &self.requests[owner.request].children[owner.index as usize];
        let seq = child.seq.expect("a sequence that runs");
        let num_tokens = child.num_tokens;
        let last_token = self.manager.token(seq, num_tokens as usize - 1)?;
        let block_size = self.config.block_size;
        let r: &mut Row = self.rows.get_mut(row);
        r.num_tokens = num_tokens;
        r.last_token = last_token;
        r.computed = u32::try_from(computed).expect("lengths are int32");
        // A block that is partly written may be shared: the first write asks for it.
        r.slots = r.computed;
        let told = r.computed;
        r.commit_at = u32::try_from((computed / block_size + 1) * block_size).unwrap_or(u32::MAX);
        let owner = self.rows.owner_mut(row);
        owner.seq = Some(seq);
        owner.known = num_tokens;
        owner.told = told;
        self.rows.enter(row);
        Ok(())
    }

    /// Ends one sequence of a request, or all of them; with the last one the request ends.
    pub(super) fn end(
        &mut self,
        request: u32,
        index: Option<usize>,
        reason: &EndReason,
        ended: &mut Vec<Finished>,
    ) -> Result<()> {
        let n = self.requests[request].children.len();
        // The lead takes the blocks along that its siblings are to fork from: those go back to the line, and the
        // next of them leads. Not when all of them end.
        let orphans =
            index.is_some_and(|index| self.requests[request].leading && index == self.requests[request].lead());
        for index in index.map_or(0..n, |index| index..index + 1) {
            let r = &mut self.requests[request];
            let child = &mut r.children[index];
            if !child.is_live() {
                continue;
            }
            let running = r.running;
            let Child { seq, row, .. } = std::mem::replace(child, Child::ended());
            r.live -= 1;
            ended.push(Finished {
                request_id: Arc::clone(&r.id),
                index,
                reason: reason.clone(),
            });
            self.stats.count_end(reason);
            match row {
                Some(row) => self.rows.release(row),
                None if running => self.rows.reserved -= 1,
                None => {}
            }
            if let Some(seq) = seq {
                self.manager.free(seq, None)?;
            }
        }
        if self.requests[request].live == 0 {
            let r = self.requests.remove(request);
            self.by_id.remove(&r.id);
            if !r.running {
                self.waiting.remove(&r.rank);
            }
            if self.blocked.as_ref().is_some_and(|(blocked, _)| *blocked == request) {
                self.blocked = None;
            }
        } else {
            // Another sequence leads, perhaps.
            self.requests[request].held_prefix = None;
            if orphans {
                self.stop_running(request)?;
            }
        }
        Ok(())
    }
}

/// Does the error say that a block has as many references as can be counted? Only other owners can bring that about.
/// The manager has changed nothing then, so whoever wanted one more goes without, and nothing is broken.
pub(super) const fn is_reference_limit(error: &Error) -> bool {
    matches!(
        error,
        Error::Block {
            problem: BlockProblem::TooManyReferences,
            ..
        }
    )
}

/// Gives the manager the tokens of a row that it does not know.
pub(super) fn tell_tokens(manager: &mut KVCacheManager, rows: &mut Rows, row: u32) -> Result<()> {
    let (known, num_tokens) = (rows.owner(row).known as usize, rows.get(row).num_tokens as usize);
    if known < num_tokens {
        // All in one group of positions: a full group is given at once.
        let start = known % RECENT;
        manager.append(rows.seq(row), &rows.recent(row)[start..start + num_tokens - known])?;
        rows.owner_mut(row).known = rows.get(row).num_tokens;
    }
    Ok(())
}
