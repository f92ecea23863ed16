"""Requests in, tokens out: plan, forward, sample, update, once per step.

The engine is thin on purpose. Blocks, prefixes, order and preemption are the scheduler's; attention and copies are
the kernels'. What is left here: checking what comes in before anything is held for it, turning tokens into text, and
keeping a fault of one request away from the others.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import numpy as np

from pagedcore import models
from pagedcore._core import Scheduler, SchedulerConfig
from pagedcore.capacity import check_blocks, fit_blocks
from pagedcore.checks import check_options, check_params, check_request_id, check_tokens, prompt_tokens
from pagedcore.errors import (
    ClosedError,
    CorruptionError,
    DuplicateRequestError,
    InvalidArgumentError,
    RequestTooLargeError,
    StepError,
    UnknownRequestError,
    UnsupportedError,
)
from pagedcore.flight import Flight, at_once
from pagedcore.kv_format import check_scales, make_layout, set_scales
from pagedcore.outputs import EngineStats, RequestMetrics, RequestOutput
from pagedcore.params import SamplingParams
from pagedcore.request import News, Request, Sequence, changes_of_end, changes_of_step
from pagedcore.runner import make_runner
from pagedcore.sampling import Sampler, sample, sequence_key
from pagedcore.tokenizer import NO_TEXT, PROMPT_CONTEXT

if TYPE_CHECKING:
    import os
    from collections.abc import Collection, Container

    import torch

    from pagedcore._core import StepPlan
    from pagedcore.tokenizer import Tokenizer


#: Text, or token ids as a sequence or array of integers.
Prompt: TypeAlias = Any

logger = logging.getLogger(__name__)


class Engine:
    """Answers requests with one model, continuously batched, out of a KV cache cut into blocks.

    Args:
        model: Directory, hub name, GGUF file, or a `models.LoadedModel` to share.
        dtype: ``"auto"``, ``"float32"``, ``"float16"`` or ``"bfloat16"``; see `models.load`.
        block_size: Tokens in a block.
        num_blocks: Blocks of the pool, one of which is the null block. None: from ``kv_cache_memory``.
        kv_cache_memory: Bytes as an int, or a share of the device's available memory as a float in (0, 1). None:
            0.4, on a GPU 0.85, and no more than ``max_num_seqs`` sequences of full length need.
        max_num_seqs: Sequences that run at once.
        max_num_batched_tokens: Tokens of one step; longer prompts are computed in chunks.
        max_model_len: Tokens of a sequence, prompt and answer. None: what the model has positions for, and the pool
            blocks.
        enable_prefix_caching: Keep computed blocks findable for prompts that begin alike.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...; ``"auto"``: a GPU if there is one that can be used, else the
            CPU.
        kv_format: ``"auto"``: K and V are kept in the model's dtype. ``"fp8_e4m3"``: as 8-bit codes, half the bytes of
            a 16-bit dtype (docs/quantisation.md).
        scale_granularity: What a scale of codes is of: ``"token"`` (each token and head, the default), ``"head"`` or
            ``"tensor"``.
        kv_scales: For ``"head"`` and ``"tensor"``, the scales of K and of V, a pair: each
            ``[num_layers, num_kv_heads]`` or ``[num_layers]``.
        cuda_graphs: On a GPU, record decode steps when the engine is made, and replay them. A model that cannot be
            recorded runs without, after a warning.

    Not thread-safe: one thread adds requests and steps. Use as a context manager, or call `close`.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | models.LoadedModel,
        *,
        dtype: str | torch.dtype = "auto",
        block_size: int = 16,
        num_blocks: int | None = None,
        kv_cache_memory: float | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 512,
        max_model_len: int | None = None,
        enable_prefix_caching: bool = True,
        device: str = "auto",
        kv_format: str = "auto",
        scale_granularity: str | None = None,
        kv_scales: Any = None,
        cuda_graphs: bool = True,
    ) -> None:
        self._closed = True  # until everything below has worked
        check_options(
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            num_blocks=num_blocks,
            kv_cache_memory=kv_cache_memory,
            max_model_len=max_model_len,
        )
        self.model = model if isinstance(model, models.LoadedModel) else models.load(model, dtype=dtype, device=device)
        longest = self.model.max_model_len
        if max_model_len is not None:
            if max_model_len > longest:
                raise InvalidArgumentError(
                    f"max_model_len is {max_model_len}, but the model has {longest} positions",
                    argument="max_model_len",
                    got=max_model_len,
                    expected=longest,
                )
            longest = max_model_len
        layout = make_layout(self.model, num_blocks or 2, block_size, kv_format, scale_granularity)
        scales = check_scales(layout, kv_scales)
        if num_blocks is None:
            self.layout = fit_blocks(layout, kv_cache_memory, longest * max_num_seqs, self.model.device)
            num_blocks = self.layout.num_blocks
        else:
            self.layout = check_blocks(layout, self.model.device)
        self.max_model_len = min(longest, (num_blocks - 1) * block_size)
        config = SchedulerConfig(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=self.max_model_len,
            vocab_size=self.model.vocab_size,
            enable_prefix_caching=enable_prefix_caching,
        )
        self._scheduler = Scheduler(config)
        kv = self.layout.allocate(device=str(self.model.device))
        set_scales(kv, scales)
        self._runner = make_runner(self.model, kv, config, cuda_graphs=cuda_graphs)
        self._sampler = Sampler(max_num_seqs)
        self._detokenizer = None if self.model.tokenizer is None else self.model.tokenizer.detokenizer()
        self._requests: dict[str, Request] = {}
        self._rows: dict[int, Sequence] = {}  # who has which of the scheduler's rows, in [0, max_num_seqs)
        self._news: dict[str, News] = {}  # what no caller has been told yet
        self._flight: Flight | None = None  # a step, or an end of requests, that is not over
        self._pool = self._scheduler.manager.pool
        self._last_step_blocks = self._token_steps = self._slot_steps = 0
        self._closed = False
        logger.info(
            "KV cache: %d blocks of %d tokens, %s, %.1f MiB",
            num_blocks,
            block_size,
            self.layout.dtype if kv_format == "auto" else kv_format,
            num_blocks * self.layout.block_bytes / 2**20,
        )

    # ------------------------------------------------------------------------------------------------ requests

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        tenant: str = "",
        cache_salt: str = "",
    ) -> None:
        """Queues a prompt, text or token ids. It holds no block until it runs. O(prompt).

        Raises InvalidArgumentError (an empty prompt, a wrong type), TokenOutOfRangeError, DuplicateRequestError while
        the id is in use, RequestTooLargeError if it could never run, even alone, ClosedError. On an error nothing
        changes.
        """
        request = self.prepare(request_id, prompt, params)
        self.add_prepared(request, priority=priority, tenant=tenant, cache_salt=cache_salt)

    def prepare(self, request_id: str, prompt: Prompt, params: SamplingParams | None = None) -> Request:
        """Checks a request and tokenises its prompt; nothing is queued. Raises as `add_request` does."""
        self._check_open()
        check_request_id(request_id)
        self._check_unused(request_id)
        params = SamplingParams() if params is None else check_params(params)
        check_tokens(np.asarray(params.stop_token_ids, dtype=np.int64), self.model.vocab_size, "stop_token_ids")
        if params.stop and self._detokenizer is None:
            raise UnsupportedError(
                f"{self.model.name} has no tokenizer, so no text to stop at",
                hint="use stop_token_ids",
                argument="stop",
                got=params.stop,
            )
        tokens = prompt_tokens(prompt, self.model)
        if len(tokens) >= self.max_model_len:
            raise RequestTooLargeError(
                f"the prompt has {len(tokens)} tokens; with max_model_len {self.max_model_len} it can have at most "
                f"{self.max_model_len - 1}",
                needed=len(tokens) + 1,
                limit=self.max_model_len,
            )
        stop = set(params.stop_token_ids)
        if not params.ignore_eos:
            stop.update(self.model.stop_token_ids)
        request = Request(
            request_id=request_id,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_tokens=tokens,
            params=params,
            stop_token_ids=frozenset(stop),
            metrics=RequestMetrics(time.monotonic()),
        )
        seed = secrets.randbits(64) if params.seed is None else params.seed
        state = NO_TEXT if self._detokenizer is None else self._detokenizer.begin(tokens[-PROMPT_CONTEXT:])
        request.sequences += (
            Sequence(request, index, sequence_key(seed, index), detokenizer=self._detokenizer, state=state)
            for index in range(params.n)
        )
        return request

    def add_prepared(self, request: Request, *, priority: int = 0, tenant: str = "", cache_salt: str = "") -> None:
        """Queues what `prepare` returned. Raises as `add_request` does; on an error nothing changes."""
        self._check_open()
        self._settle()
        request_id = request.request_id
        self._check_unused(request_id)
        try:
            # Until the engine knows it, to settle is to take it out of the scheduler: a signal handler may raise as
            # the call into the scheduler returns, and that one would plan steps of a request that nobody has.
            self._flight = Flight(ended={request_id: "abort"}, changes=[])
            self._scheduler.add_request(
                request_id,
                request.prompt_tokens,
                max_tokens=request.params.max_tokens,
                stop_token_ids=sorted(request.stop_token_ids),
                n=request.params.n,
                priority=priority,
                tenant=tenant,
                cache_salt=cache_salt,
            )
            request.metrics.arrival_time = time.monotonic()
            self._requests[request_id] = request
            self._flight = None  # no call between these two, so no interrupt either
        except BaseException:
            self._settle()
            raise

    def abort(self, request_id: str) -> RequestOutput:
        """Ends a request; its blocks are free once no step reads them. Returns its final output, with what it has so
        far.

        Raises UnknownRequestError if no such request is waiting or running.
        """
        self._check_open()
        self._settle()
        request = self._requests.get(request_id)
        if request is None:
            raise UnknownRequestError(f"no request {request_id!r} is waiting or running", request_id=request_id)
        self._flight = Flight(ended={request_id: "abort"}, changes=changes_of_end(request, "abort"))
        self._settle()
        return self._tell([request_id])[0]

    def discard(self, request_id: str) -> None:
        """Aborts a request if it is still there, and forgets what was not told of it; for clean-up, where `abort`
        would raise.
        """
        if not self._closed:
            with contextlib.suppress(UnknownRequestError):
                self.abort(request_id)
            self._news.pop(request_id, None)

    def in_use(self, request_id: str) -> bool:
        """True while a request with this id waits or runs, or has ended and nobody was told: it cannot be added."""
        return request_id in self._requests or request_id in self._news

    @property
    def has_unfinished(self) -> bool:
        """True while a request waits or runs, or has ended and nobody was told: call `step`."""
        return bool(self._requests or self._news)

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self._requests)

    # ---------------------------------------------------------------------------------------------------- steps

    def step(self, only: Container[str] | None = None) -> list[RequestOutput]:
        """Computes one step. Returns the requests that got a token, or ended, in it; empty while prompts are being
        computed.

        With ``only``, a set of request ids, the others' news is kept, and returned by the next call that wants it. A
        call that has such news to return computes nothing.

        A request whose logits are not numbers ends with reason ``error``, and so do those of a step that raised; the
        others go on. An interrupt (KeyboardInterrupt) is raised, and loses nothing: the next call finishes the step,
        or begins it again.
        """
        self._check_open()
        if isinstance(only, str):  # a container too, of its parts
            raise InvalidArgumentError(f"only is {only!r}, not a set of request ids", argument="only", got=only)
        self._settle()
        if self._requests and not any(only is None or request_id in only for request_id in self._news):
            self._compute()
        return self._tell({request_id: None for request_id in self._news if only is None or request_id in only})

    def _compute(self) -> None:
        """Plans, runs, samples and updates one step. However it is left, `_settle` brings it to an end."""
        self._flight = flight = Flight()
        at_once(flight.plans, self._scheduler.schedule)
        plan = flight.plan
        if plan is None:
            raise CorruptionError(f"{len(self._requests)} requests are unfinished and none can run: {self._reasons()}")
        try:
            self._assign_rows(plan)
            self._measure(plan, flight)
            rows, positions = np.array(plan.sample_seqs), plan.positions[plan.logits_indices] + 1
            draws = self._sampler.draws(rows, positions)
            with self._runner.on_stream():
                logits, numbers = self._runner.execute(plan, draws.numbers)
                tokens, failed = sample(logits, draws, numbers)
            self._runner.check()
            flight.samples = [
                (self._rows[row], token, bad)
                for row, token, bad in zip(rows.tolist(), tokens.tolist(), failed.tolist(), strict=True)
            ]
            flight.time = time.monotonic()
            at_once(flight.results, self._scheduler.update, flight.step, tokens, None, failed)
        except Exception as error:
            if flight.results:
                raise
            logger.exception("step %d failed; its requests end with it", flight.step)
            # There is no telling which of them is at fault.
            flight.errors = dict.fromkeys(plan.request_ids, f"the step failed: {error!r}")
        finally:
            self._settle()

    def _assign_rows(self, plan: StepPlan) -> None:
        """Sequences that begin, or begin again after a preemption, take their row."""
        now = time.monotonic()
        for row, request_id, index in plan.started:
            request = self._requests[request_id]
            sequence = request.sequences[index]
            if request.metrics.first_scheduled_time is None:
                request.metrics.first_scheduled_time = now
            self._rows[row] = sequence
            self._sampler.assign(row, request.params, sequence.key, len(request.prompt_tokens))

    def _measure(self, plan: StepPlan, flight: Flight) -> None:
        """Notes how full the used blocks are (all but the end of each sequence's last block), and who was preempted."""
        block_size = self.layout.block_size
        self._last_step_blocks = self._pool.num_used
        slots = self._last_step_blocks * block_size
        held = slots - int((-plan.seq_lens % block_size).sum())
        flight.totals = (self._token_steps + held, self._slot_steps + slots)
        for request_id in plan.preempted:
            flight.preemptions[request_id] = self._requests[request_id].metrics.num_preemptions + 1

    def _settle(self) -> None:
        """Brings the step in flight, if there is one, to its end: a step whose samples the scheduler has is
        finished, any other is undone, and requests that are to end with it are ended.

        It may be interrupted itself, anywhere, and called again: each part of it can be repeated.
        """
        flight = self._flight
        if flight is None:
            return
        if flight.changes is None:
            self._decide(flight)
        for change in flight.changes or ():
            request = change.sequence.request
            self._news.setdefault(request.request_id, News(request)).note(change)
            change.apply()
            if change.tokens and request.metrics.first_token_time is None:
                request.metrics.first_token_time = flight.time
            if change.unasked:
                with contextlib.suppress(UnknownRequestError):
                    self._scheduler.finish(request.request_id, "stop", change.sequence.index)
        for request_id, reason in flight.ended.items():
            with contextlib.suppress(UnknownRequestError):
                self._scheduler.finish(request_id, reason)
        for request in dict.fromkeys(change.sequence.request for change in flight.changes or ()):
            request.error = flight.errors.get(request.request_id, request.error)
            if request.finished:
                request.metrics.finished_time = flight.time
                self._requests.pop(request.request_id, None)
        self._flight = None

    def _decide(self, flight: Flight) -> None:
        """What the step comes to. Afterwards nothing of it depends on the scheduler any more."""
        if flight.results:
            reasons = {(request_id, index): reason for request_id, index, reason in flight.results[0].finished}
            changes, errors = changes_of_step(flight.samples, reasons, self._requests)
            for request_id, count in flight.preemptions.items():
                self._requests[request_id].metrics.num_preemptions = count
            self._token_steps, self._slot_steps = flight.totals
        else:
            if flight.plan is not None:
                with contextlib.suppress(StepError):  # cancelled already
                    self._scheduler.cancel(flight.step)
            errors = flight.errors
            changes = [
                change for request_id in errors for change in changes_of_end(self._requests[request_id], "error")
            ]
        flight.errors, flight.ended = errors, dict.fromkeys(errors, "error")
        flight.changes = changes

    def _tell(self, request_ids: Collection[str]) -> list[RequestOutput]:
        """The outputs of requests that have news, which then is none any more."""
        outputs = [self._news[request_id].output() for request_id in request_ids]
        rest = {request_id: news for request_id, news in self._news.items() if request_id not in request_ids}
        self._news = rest  # no call from here on: an interrupt comes before this, or finds the caller with the outputs
        return outputs

    def _reasons(self) -> dict[str, Any]:
        return {request_id: self._scheduler.explain(request_id) for request_id in list(self._requests)[:8]}

    # ------------------------------------------------------------------------------------------------- lifecycle

    def stats(self) -> EngineStats:
        """Counters and gauges. O(1)."""
        self._check_open()
        scheduler = self._scheduler.stats()
        pool = self._pool.stats()
        return EngineStats(
            running=scheduler["running"],
            waiting=scheduler["waiting"],
            num_blocks=pool["num_blocks"] - 1,
            blocks_used=pool["num_used"],
            blocks_cached=pool["num_cached"],
            peak_blocks_used=pool["peak_used"],
            block_size=pool["block_size"],
            block_bytes=self.layout.block_bytes,
            last_step_blocks=self._last_step_blocks,
            token_steps=self._token_steps,
            slot_steps=self._slot_steps,
            steps=scheduler["steps"],
            computed_tokens=scheduler["scheduled_tokens"],
            sampled_tokens=scheduler["sampled_tokens"],
            preemptions=scheduler["preemptions"],
            prefix_query_tokens=scheduler["prefix_query_tokens"],
            prefix_hit_tokens=scheduler["prefix_hit_tokens"],
            block_copies=scheduler["block_copies"],
        )

    @property
    def scheduler(self) -> Scheduler:
        """Levels 0 to 3 of this engine: ``engine.scheduler.manager.pool`` and so on."""
        self._check_open()
        return self._scheduler

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, or None. Raises ClosedError."""
        self._check_open()
        return self.model.tokenizer

    @property
    def closed(self) -> bool:
        """True after `close`."""
        return self._closed

    def close(self) -> None:
        """Drops unfinished requests, the KV cache and the model. Idempotent; every other call raises ClosedError
        after it.
        """
        if self._closed:
            return
        self._closed = True
        self._requests.clear()
        self._rows.clear()
        self._news.clear()
        self._flight = None
        del self._runner, self._pool, self._scheduler, self.model

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this engine is closed")

    def _check_unused(self, request_id: str) -> None:
        if self.in_use(request_id):
            running = request_id in self._requests
            raise DuplicateRequestError(
                f"request {request_id!r} {'is still running' if running else 'has ended, and nobody was told'}",
                hint="use another id" if running else "use another id, or call step first",
                request_id=request_id,
            )
