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
from pagedcore.checks import check_count, check_memory, check_params, check_request_id, token_array
from pagedcore.errors import (
    ClosedError,
    CorruptionError,
    DuplicateRequestError,
    InvalidArgumentError,
    RequestTooLargeError,
    TokenOutOfRangeError,
    UnknownRequestError,
    UnsupportedError,
)
from pagedcore.layout import KVCacheLayout
from pagedcore.outputs import EngineStats, RequestMetrics, RequestOutput
from pagedcore.request import Request, Sequence
from pagedcore.runner import ModelRunner
from pagedcore.sampling import Sampler, SamplingParams, sequence_key

if TYPE_CHECKING:
    import os

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
        kv_cache_memory: Bytes as an int, or a share of the available memory as a float in (0, 1). None: 0.4, and no
            more than ``max_num_seqs`` sequences of full length need.
        max_num_seqs: Sequences that run at once.
        max_num_batched_tokens: Tokens of one step; longer prompts are computed in chunks.
        max_model_len: Tokens of a sequence, prompt and answer. None: what the model has positions for, and the pool
        blocks.
        enable_prefix_caching: Keep computed blocks findable for prompts that begin alike.
        device: ``"auto"`` or ``"cpu"``.

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
    ) -> None:
        self._closed = True  # until everything below has worked
        for name, value in (
            ("block_size", block_size),
            ("max_num_seqs", max_num_seqs),
            ("max_num_batched_tokens", max_num_batched_tokens),
        ):
            check_count(name, value, 1)
        if num_blocks is not None:
            check_count("num_blocks", num_blocks, 2)
            if kv_cache_memory is not None:
                raise InvalidArgumentError(
                    "num_blocks and kv_cache_memory are both given", hint="give one of them", argument="num_blocks"
                )
        if max_model_len is not None:
            check_count("max_model_len", max_model_len, 2)
        check_memory(kv_cache_memory)
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
        if num_blocks is None:
            self.layout = fit_blocks(self._layout(2, block_size), kv_cache_memory, longest * max_num_seqs)
            num_blocks = self.layout.num_blocks
        else:
            self.layout = check_blocks(self._layout(num_blocks, block_size))
        self.max_model_len = min(longest, (num_blocks - 1) * block_size)
        self._scheduler = Scheduler(
            SchedulerConfig(
                num_blocks=num_blocks,
                block_size=block_size,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                max_model_len=self.max_model_len,
                vocab_size=self.model.vocab_size,
                enable_prefix_caching=enable_prefix_caching,
            )
        )
        self._runner = ModelRunner(self.model, self.layout.allocate(device="cpu"))
        self._sampler = Sampler(max_num_seqs)
        self._requests: dict[str, Request] = {}
        self._rows: dict[int, Sequence] = {}  # who has which of the scheduler's rows, in [0, max_num_seqs)
        self._pool = self._scheduler.manager.pool
        self._last_step_blocks = self._token_steps = self._slot_steps = 0
        self._closed = False
        logger.info(
            "KV cache: %d blocks of %d tokens, %.1f MiB",
            num_blocks,
            block_size,
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
        if request_id in self._requests:
            raise DuplicateRequestError(f"request {request_id!r} is still running", request_id=request_id)
        params = SamplingParams() if params is None else check_params(params)
        self._check_tokens(np.asarray(params.stop_token_ids, dtype=np.int64), "stop_token_ids")
        token_ids = self._prompt_token_ids(prompt)
        if len(token_ids) >= self.max_model_len:
            raise RequestTooLargeError(
                f"the prompt has {len(token_ids)} tokens; with max_model_len {self.max_model_len} it can have at most "
                f"{self.max_model_len - 1}",
                needed=len(token_ids) + 1,
                limit=self.max_model_len,
            )
        stop = set(params.stop_token_ids)
        if not params.ignore_eos:
            stop.update(self.model.stop_token_ids)
        request = Request(
            request_id=request_id,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=token_ids.tolist(),
            params=params,
            stop_token_ids=frozenset(stop),
            metrics=RequestMetrics(time.monotonic()),
        )
        seed = secrets.randbits(64) if params.seed is None else params.seed
        for index in range(params.n):
            sequence = Sequence(request, index, sequence_key(seed, index))
            if self.model.tokenizer is not None:
                sequence.detokenizer = self.model.tokenizer.detokenizer(request.prompt_token_ids)
            request.sequences.append(sequence)
        return request

    def add_prepared(self, request: Request, *, priority: int = 0, tenant: str = "", cache_salt: str = "") -> None:
        """Queues what `prepare` returned. Raises as `add_request` does; on an error nothing changes."""
        self._check_open()
        self._scheduler.add_request(
            request.request_id,
            np.asarray(request.prompt_token_ids, dtype=np.int32),
            max_tokens=request.params.max_tokens,
            stop_token_ids=sorted(request.stop_token_ids),
            n=request.params.n,
            priority=priority,
            tenant=tenant,
            cache_salt=cache_salt,
        )
        request.metrics.arrival_time = time.monotonic()
        self._requests[request.request_id] = request

    def abort(self, request_id: str) -> RequestOutput:
        """Ends a request; its blocks are free once no step reads them. Returns its final output, with what it has so
        far.

        Raises UnknownRequestError if no such request is waiting or running.
        """
        self._check_open()
        if request_id not in self._requests:
            raise UnknownRequestError(f"no request {request_id!r} is waiting or running", request_id=request_id)
        request = self._requests[request_id]
        self._scheduler.abort(request_id)
        return self._end(request, "abort").output()

    def discard(self, request_id: str) -> None:
        """Aborts a request if it is still there; for clean-up, where `abort` would raise."""
        if not self._closed and request_id in self._requests:
            self.abort(request_id)

    @property
    def has_unfinished(self) -> bool:
        """True while a request waits or runs: call `step`."""
        return bool(self._requests)

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self._requests)

    # ---------------------------------------------------------------------------------------------------- steps

    def step(self) -> list[RequestOutput]:
        """Computes one step. Returns the requests that got a token, or ended, in it; empty while prompts are being
        computed.

        A request whose logits are not numbers ends with reason ``error``, and so do those of a step that raised; the
        others go on. An interrupt (KeyboardInterrupt) undoes the step and is raised; the engine can step again.
        """
        self._check_open()
        if not self._requests:
            return []
        plan = self._scheduler.schedule()
        if plan is None:
            raise CorruptionError(f"{len(self._requests)} requests are unfinished and none can run: {self._reasons()}")
        step = plan.step
        try:
            self._assign_rows(plan)
            self._measure(plan)
            rows = np.array(plan.sample_seqs)  # a copy: the plan's arrays end with the update
            logits = self._runner.execute(plan)
            tokens, failed = self._sampler.sample(logits, rows)
        except Exception as error:
            logger.exception("step %d failed; its requests end with it", step)
            return self._fail_step(plan, error)
        except BaseException:
            self._scheduler.cancel(step)
            raise
        result = self._scheduler.update(step, tokens, failed=failed)
        self._sampler.advance(rows)
        return self._collect(rows, tokens, failed, result.finished)

    def _assign_rows(self, plan: StepPlan) -> None:
        """Sequences that begin, or begin again after a preemption, take their row."""
        for request_id in plan.preempted:
            self._requests[request_id].metrics.num_preemptions += 1
        now = time.monotonic()
        for row, request_id, index in plan.started:
            request = self._requests[request_id]
            sequence = request.sequences[index]
            if request.metrics.first_scheduled_time is None:
                request.metrics.first_scheduled_time = now
            self._rows[row] = sequence
            self._sampler.assign(row, request.params, sequence.key, len(sequence.answer.token_ids))

    def _measure(self, plan: StepPlan) -> None:
        """Adds up how full the used blocks are: all but the end of each sequence's last block."""
        block_size = self.layout.block_size
        self._last_step_blocks = self._pool.num_used
        slots = self._last_step_blocks * block_size
        self._slot_steps += slots
        self._token_steps += slots - int((-plan.seq_lens % block_size).sum())

    def _collect(
        self, rows: np.ndarray, tokens: np.ndarray, failed: np.ndarray, finished: list[tuple[str, int, str]]
    ) -> list[RequestOutput]:
        """Adds the tokens to their answers and makes the outputs."""
        now = time.monotonic()
        changed: dict[str, list[Sequence]] = {}
        requests: dict[str, Request] = {}
        broken: dict[str, str] = {}
        reasons = {(request_id, index): reason for request_id, index, reason in finished}
        for row, token, bad in zip(rows.tolist(), tokens.tolist(), failed.tolist(), strict=True):
            sequence = self._rows[row]
            request, answer = sequence.request, sequence.answer
            answer.finish_reason = reasons.pop((request.request_id, sequence.index), None)
            if bad:
                request.error = "the model's logits are not finite numbers"
            else:
                answer.token_ids.append(token)
                if request.metrics.first_token_time is None:
                    request.metrics.first_token_time = now
            try:
                self._add_text(sequence, None if bad else token)
            except Exception as error:  # a decoder of somebody else's; the other requests go on
                logger.exception("detokenising request %r failed", request.request_id)
                broken[request.request_id] = f"detokenising failed: {error!r}"
            requests[request.request_id] = request
            changed.setdefault(request.request_id, []).append(sequence)
        for (request_id, index), reason in reasons.items():  # ended without a sample in this step
            requests[request_id] = request = self._requests[request_id]
            request.sequences[index].answer.finish_reason = reason
            self._flush(request.sequences[index])
            changed.setdefault(request_id, []).append(request.sequences[index])
        outputs = []
        for request_id, sequences in changed.items():
            request = requests[request_id]
            if request_id in broken:
                if not request.finished:
                    self._scheduler.finish(request_id, "error")
                request.error = broken[request_id]
                outputs.append(self._end(request, "error").output())
                continue
            if request.finished:
                request.metrics.finished_time = now
                self._requests.pop(request_id, None)
            outputs.append(request.output(sequences))
        return outputs

    def _add_text(self, sequence: Sequence, token: int | None) -> None:
        """Adds a token's text to its answer; at the end of the answer also what the detokeniser held back."""
        answer = sequence.answer
        stopped = answer.finish_reason == "stop" and token in sequence.request.stop_token_ids
        if sequence.detokenizer is not None and token is not None and not stopped:
            text = sequence.detokenizer.push(token)
            if text:
                answer.pieces.append(text)
        if answer.finish_reason is not None:
            self._flush(sequence)

    def _flush(self, sequence: Sequence) -> None:
        """Gives out what the detokeniser held back of an answer that has ended."""
        text = "" if sequence.detokenizer is None else sequence.detokenizer.flush()
        if text:
            sequence.answer.pieces.append(text)

    def _fail_step(self, plan: StepPlan, error: Exception) -> list[RequestOutput]:
        """Undoes a step whose forward pass raised and ends its requests: there is no telling which of them is at
        fault.
        """
        request_ids = list(dict.fromkeys(plan.request_ids))
        self._scheduler.cancel(plan.step)
        outputs = []
        for request_id in request_ids:
            request = self._requests[request_id]
            request.error = f"the step failed: {error!r}"
            self._scheduler.finish(request_id, "error")
            outputs.append(self._end(request, "error").output())
        return outputs

    def _end(self, request: Request, reason: str) -> Request:
        """Forgets a request that the scheduler no longer has."""
        for sequence in request.sequences:
            if sequence.answer.finish_reason is None:
                sequence.answer.finish_reason = reason
                with contextlib.suppress(Exception):  # a decoder that fails has been told of already
                    self._flush(sequence)
        request.metrics.finished_time = time.monotonic()
        self._requests.pop(request.request_id, None)
        return request

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
        del self._runner, self._pool, self._scheduler, self.model

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this engine is closed")

    # ---------------------------------------------------------------------------------------------------- checks

    def _prompt_token_ids(self, prompt: Prompt) -> np.ndarray:
        """The prompt as int64 ids, every one in the vocabulary, at least one."""
        if isinstance(prompt, str):
            if self.model.tokenizer is None:
                raise UnsupportedError(f"{self.model.name} has no tokenizer", hint="give token ids", argument="prompt")
            try:
                ids = np.asarray(self.model.tokenizer.encode(prompt), dtype=np.int64)
            except (TypeError, UnicodeError) as error:  # lone surrogates
                raise InvalidArgumentError(
                    f"the prompt is not text that can be encoded: {error}", argument="prompt"
                ) from error
        else:
            ids = token_array(prompt)
        if ids.size == 0:
            raise InvalidArgumentError(
                "the prompt is empty: 0 tokens", hint="at least one token is needed", argument="prompt", got=0
            )
        self._check_tokens(ids, "prompt")
        return ids

    def _check_tokens(self, ids: np.ndarray, argument: str) -> None:
        outside = np.flatnonzero((ids < 0) | (ids >= self.model.vocab_size))
        if outside.size:
            position = int(outside[0])
            token = int(ids[position])
            raise TokenOutOfRangeError(
                f"{argument}: token {token} at position {position} is outside the vocabulary "
                f"[0, {self.model.vocab_size})",
                argument=argument,
                token=token,
                position=position,
                vocab_size=self.model.vocab_size,
            )

    def _layout(self, num_blocks: int, block_size: int) -> KVCacheLayout:
        shape = self.model.layers[0]
        return KVCacheLayout(
            num_blocks,
            block_size,
            len(self.model.layers),
            shape.num_kv_heads,
            shape.head_dim,
            str(self.model.dtype).removeprefix("torch."),
        )
