"""Level 3 through Python: plans over tagged memory give each request what it gets alone, whatever else runs."""

from __future__ import annotations

import copy
import json
import pickle
from collections import defaultdict

import numpy as np
import pytest
from pagedcore import KVCacheManager, Scheduler, SchedulerConfig, StepPlan
from pagedcore.errors import (
    DuplicateRequestError,
    InvalidArgumentError,
    RequestTooLargeError,
    StepError,
    TokenOutOfRangeError,
    UnknownRequestError,
    UnsupportedError,
)
from tagged import TaggedModel, alone

VOCAB = 97


def config(**kwargs: int | bool) -> SchedulerConfig:
    sizes = {
        "num_blocks": 64,
        "block_size": 4,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
        "max_model_len": 64,
        "vocab_size": VOCAB,
    }
    return SchedulerConfig(**{**sizes, **kwargs})


class Server:
    """The loop of a server over the tagged model."""

    def __init__(self, config: SchedulerConfig, manager: KVCacheManager | None = None) -> None:
        self.scheduler = Scheduler(config, manager)
        width = -(-config.max_model_len // config.block_size)
        self.model = TaggedModel(config.num_blocks, config.block_size, config.max_num_seqs, width, VOCAB)
        self.rows: dict[int, tuple[str, int]] = {}
        self.output: dict[tuple[str, int], list[int]] = defaultdict(list)
        self.ended: dict[tuple[str, int], str] = {}
        self.prompts: dict[str, list[int]] = {}
        self.preempted = 0

    def add(self, name: str, prompt: list[int], max_tokens: int, **kwargs: object) -> None:
        self.scheduler.add_request(name, prompt, max_tokens, **kwargs)
        self.prompts[name] = list(prompt)

    def samples(self, plan: StepPlan) -> np.ndarray:
        for row, request_id, index in plan.started:
            self.rows[row] = (request_id, index)
        self.preempted += len(plan.preempted)
        ids = self.model.run(plan)
        for k, row in enumerate(plan.sample_seqs):
            request_id, index = self.rows[int(row)]
            first = not self.output[request_id, index]
            ids[k] = (ids[k] + (index if first else 0)) % VOCAB
        return ids

    def step(self) -> bool:
        plan = self.scheduler.schedule()
        if plan is None:
            return False
        result = self.scheduler.update(plan.step, self.samples(plan))
        for row, token in zip(result.rows, result.tokens, strict=True):
            self.output[self.rows[int(row)]].append(int(token))
        self.end(result.finished)
        return True

    def end(self, finished: list[tuple[str, int, str]]) -> None:
        for request_id, index, reason in finished:
            assert (request_id, index) not in self.ended, "told once"
            self.ended[request_id, index] = reason

    def drain(self, limit: int = 3000) -> None:
        for _ in range(limit):
            if not self.step():
                break
        assert not self.scheduler.has_unfinished
        self.scheduler.check()
        assert self.scheduler.manager.pool.num_used == 0
        assert self.scheduler.manager.stats()["num_sequences"] == 0


def test_a_request_gets_what_it_gets_alone() -> None:
    server = Server(config())
    prompt = [5, 6, 7, 8, 9]
    server.add("a", prompt, 6)
    server.drain()
    assert server.output["a", 0] == alone(prompt, 6, VOCAB)
    assert server.ended == {("a", 0): "length"}


def test_a_long_prompt_is_computed_in_chunks() -> None:
    server = Server(config(max_num_batched_tokens=8))
    prompt = [i % VOCAB for i in range(50)]
    server.add("a", prompt, 3)
    plan = server.scheduler.schedule()
    assert (plan.num_tokens, plan.num_samples, plan.max_query_len) == (8, 0, 8)
    server.scheduler.update(plan.step, server.samples(plan))
    server.drain()
    assert server.output["a", 0] == alone(prompt, 3, VOCAB)
    assert server.scheduler.stats()["steps"] == 7 + 2


@pytest.mark.parametrize("seed", range(12))
def test_a_storm_of_requests(seed: int) -> None:
    """Arrivals at any time, shared prefixes, n > 1, preemption, aborts, cancelled steps, steps that fail."""
    rng = np.random.default_rng(seed)
    small = config(
        num_blocks=int(rng.integers(24, 40)),
        block_size=int(rng.choice([1, 2, 4])),
        max_num_seqs=int(rng.integers(3, 9)),
        max_num_batched_tokens=int(rng.integers(9, 40)),
        max_model_len=32,
        enable_prefix_caching=bool(rng.integers(0, 4)),
    )
    server = Server(small)
    scheduler = server.scheduler
    common = rng.integers(0, VOCAB, 12).tolist()
    wanted: dict[tuple[str, int], list[int]] = {}
    given_up: set[str] = set()
    for turn in range(300):
        if turn < 200 and rng.random() < 0.3:
            name, n = f"r{turn}", int(rng.choice([1, 1, 1, 2, 3]))
            prompt = common[: int(rng.integers(0, 12))] + rng.integers(0, 3, int(rng.integers(1, 12))).tolist()
            max_tokens, stop = int(rng.integers(1, 12)), rng.integers(0, VOCAB, 3).tolist()
            tenant = str(rng.choice(["", "t"]))
            try:
                server.add(
                    name, prompt, max_tokens, n=n, stop_token_ids=stop, tenant=tenant, priority=int(rng.integers(0, 3))
                )
            except RequestTooLargeError:
                continue
            room = small.max_model_len - len(prompt)
            for index in range(n):
                wanted[name, index] = alone(prompt, min(max_tokens, room), VOCAB, index, stop)
        what = rng.random()
        if what < 0.05:
            plan = scheduler.schedule()
            if plan is not None:
                scheduler.cancel(plan.step)
        elif what < 0.1 and wanted:
            name = sorted(wanted)[int(rng.integers(len(wanted)))][0]
            try:
                server.end(scheduler.abort(name))
                given_up.add(name)
            except UnknownRequestError:
                pass
        elif what < 0.13:
            plan = scheduler.schedule()
            if plan is not None:
                ids, failed = server.samples(plan), np.zeros(plan.num_samples, bool)
                if plan.num_samples:
                    failed[rng.integers(plan.num_samples)] = True
                result = scheduler.update(plan.step, ids, failed=failed)
                for row, token in zip(result.rows, result.tokens, strict=True):
                    server.output[server.rows[int(row)]].append(int(token))
                server.end(result.finished)
                given_up |= {name for name, _, reason in result.finished if reason == "error"}
        else:
            server.step()
        scheduler.check()
    server.drain()
    assert set(server.ended) == set(wanted), "each sequence ends once"
    for key, tokens in wanted.items():
        if key[0] in given_up:
            assert tokens[: len(server.output[key])] == server.output[key]
        else:
            assert server.output[key] == tokens, key


def test_a_storm_preempts() -> None:
    """The storms above mean little if nobody is ever preempted."""
    server = Server(config(num_blocks=12, max_model_len=40))
    prompts = [[i, *range(10)] for i in range(4)]
    for i, prompt in enumerate(prompts):
        server.add(f"r{i}", prompt, 20)
    server.drain()
    assert server.preempted > 0
    assert server.scheduler.stats()["preemptions"] == server.preempted
    for i, prompt in enumerate(prompts):
        assert server.output[f"r{i}", 0] == alone(prompt, 20, VOCAB)


def test_a_group_shares_its_prompt() -> None:
    server = Server(config())
    prompt = list(range(10))
    server.add("g", prompt, 5, n=4)
    plan = server.scheduler.schedule()
    assert plan.logits_indices.tolist() == [9] * 4
    assert plan.sample_seqs.tolist() == [row for row, _, _ in plan.started]
    assert [(request_id, index) for _, request_id, index in plan.started] == [("g", i) for i in range(4)]
    server.scheduler.update(plan.step, server.samples(plan))
    plan = server.scheduler.schedule()
    assert plan.request_ids == ["g"] * 4
    assert len(plan.block_copies) == 3, "the block in which the prompt ends"
    assert server.scheduler.manager.pool.num_used == 2 + 4


def test_samples_come_in_any_form() -> None:
    torch = pytest.importorskip("torch")
    server = Server(config())
    server.add("a", [1, 2, 3], 5, n=2)
    forms = [list, tuple, np.asarray, torch.as_tensor, lambda values: np.repeat(values, 2)[::2]]
    for form in forms:
        plan = server.scheduler.schedule()
        ids, counts, failed = server.samples(plan).tolist(), [1, 1], [False, False]
        result = server.scheduler.update(plan.step, form(ids), num_sampled=form(counts), failed=form(failed))
        for row, token in zip(result.rows, result.tokens, strict=True):
            server.output[server.rows[int(row)]].append(int(token))
    assert not server.scheduler.has_unfinished
    assert [server.output["a", i] for i in range(2)] == [alone([1, 2, 3], 5, VOCAB, i) for i in range(2)]


def test_views_cost_no_copy() -> None:
    torch = pytest.importorskip("torch")
    server = Server(config())
    server.add("a", range(20), 2)
    plan = server.scheduler.schedule()
    memory = plan.buffer
    arrays = "input_ids input_sources positions query_start_loc seq_lens rows logits_indices sample_seqs slot_mapping"
    arrays += " block_table table_updates block_copies blocks_to_zero"
    for name in arrays.split():
        view = getattr(plan, name)
        assert view.dtype == (np.int64 if name == "slot_mapping" else np.int32)
        assert view.ctypes.data % 64 == 0
        assert view.size == 0 or np.shares_memory(view, memory)
        torch.from_numpy(view)  # without a warning
        assert np.array_equal(view, getattr(StepPlan.from_buffer(memory), name))
    assert plan.groups == (plan,)
    assert 512 < plan.head_bytes < len(memory)


def test_updates_are_refused_and_change_nothing() -> None:
    scheduler = Scheduler(config())
    with pytest.raises(StepError):
        scheduler.update(1, [])
    scheduler.add_request("a", [1, 2, 3], 5, n=2)
    plan = scheduler.schedule()
    assert scheduler.schedule() is None, "the step before is in flight"
    before = scheduler.stats()
    for call, error in [
        (lambda: scheduler.update(plan.step, [1]), InvalidArgumentError),
        (lambda: scheduler.update(plan.step, [1, VOCAB]), TokenOutOfRangeError),
        (lambda: scheduler.update(plan.step, [1, -1]), TokenOutOfRangeError),
        (lambda: scheduler.update(plan.step, [1, 1], num_sampled=[1, 2]), InvalidArgumentError),
        (lambda: scheduler.update(plan.step, [1, 1], failed=[True]), InvalidArgumentError),
        (lambda: scheduler.update(plan.step + 1, [1, 1]), StepError),
        (lambda: scheduler.cancel(plan.step + 1), StepError),
    ]:
        with pytest.raises(error):
            call()
        assert scheduler.stats() == before
        assert plan.input_ids.tolist() == [1, 2, 3]
    scheduler.update(plan.step, [1, 1])
    with pytest.raises(StepError, match="complete"):
        scheduler.update(plan.step, [1, 1])


def test_requests_that_can_never_run_are_refused() -> None:
    scheduler = Scheduler(config(num_blocks=5))
    for prompt, limit in [(range(64), 64), (range(17), 4)]:
        with pytest.raises(RequestTooLargeError) as caught:
            scheduler.add_request("big", prompt, 1)
        assert caught.value.limit == limit
        assert caught.value.needed > limit
    scheduler.add_request("a", [1], 1)
    with pytest.raises(DuplicateRequestError):
        scheduler.add_request("a", [1], 1)
    assert scheduler.stats()["added"] == 1


def test_every_waiting_request_has_a_reason() -> None:
    scheduler = Scheduler(config(num_blocks=8, max_num_seqs=2))
    assert scheduler.schedule() is None
    for name in "abc":
        scheduler.add_request(name, range(12), 8)
    assert (scheduler.explain("a").phase, scheduler.explain("a").reason) == ("waiting", "not_considered")
    plan = scheduler.schedule()
    assert str(scheduler.explain("a")) == "running"
    waiting = scheduler.explain("b")
    assert (waiting.phase, waiting.reason) == ("waiting", "blocks")
    assert waiting.needed > waiting.available
    assert str(waiting) == f"waiting: blocks (needed {waiting.needed}, available {waiting.available})"
    assert (scheduler.explain("c").reason, scheduler.explain("c").behind) == ("behind", "b")
    scheduler.update(plan.step, [1])
    for name in "ab":
        scheduler.abort(name)
    with pytest.raises(UnknownRequestError):
        scheduler.explain("a")


def test_a_cancelled_step_is_done_again() -> None:
    server = Server(config())
    server.add("a", range(6), 4, n=2)
    for _ in range(3):
        plan = server.scheduler.schedule()
        server.scheduler.cancel(plan.step)
        with pytest.raises(StepError):
            plan.input_ids  # noqa: B018
        server.scheduler.check()
        server.step()
    server.drain()
    for index in range(2):
        assert server.output["a", index] == alone(list(range(6)), 4, VOCAB, index)


def test_finishing_for_a_reason_of_ones_own() -> None:
    scheduler = Scheduler(config())
    scheduler.add_request("a", [1, 2, 3], 9, n=2)
    plan = scheduler.schedule()
    assert scheduler.finish("a", "stop_string", index=1) == [("a", 1, "stop_string")]
    assert scheduler.finish("a", "again", index=1) == []
    result = scheduler.update(plan.step, [5, 5])
    assert len(result.tokens) == 1
    assert scheduler.abort("a") == [("a", 0, "abort")]
    assert not scheduler.has_unfinished
    stats = scheduler.stats()
    assert (stats["finished_by_caller"], stats["aborted"]) == (1, 1)
    assert json.loads(json.dumps(stats)) == stats


def test_a_manager_of_ones_own() -> None:
    manager = KVCacheManager(64, 4, vocab_size=VOCAB)
    own = manager.add(range(9))
    manager.allocate_slots(own, 9)
    manager.commit(own, 9)
    manager.take_blocks_to_zero()
    server = Server(config(), manager)
    for i, slot in enumerate(manager.slot_mapping(own, 0, 9)):  # written by its owner
        server.model.slots.reshape(-1)[slot] = int(i) * 65_537 + i * 31 + 7
    server.add("a", list(range(9)), 3)
    plan = server.scheduler.schedule()
    assert plan.num_tokens == 1, "the owner's blocks are a prefix hit"
    server.scheduler.update(plan.step, server.samples(plan))
    theirs = next(handle for handle in range(2**32, 2**32 + 8) if handle != own and is_sequence(manager, handle))
    with pytest.raises(UnsupportedError):
        manager.free(theirs)
    for call in (manager.take_block_copies, manager.take_blocks_to_zero):
        with pytest.raises(StepError, match="numbered by its scheduler"):
            call()
    with pytest.raises(StepError):
        manager.pool.begin_step()
    with pytest.raises(InvalidArgumentError, match="scheduler already"):
        Scheduler(config(), manager)
    manager.free(own)
    while server.step():
        pass
    assert server.scheduler.manager.pool.num_used == 0
    with pytest.raises(InvalidArgumentError):
        Scheduler(config(), KVCacheManager(63, 4))


def is_sequence(manager: KVCacheManager, handle: int) -> bool:
    try:
        manager.num_tokens(handle)
    except KeyError:
        return False
    return True


def test_configurations_are_values() -> None:
    one = config()
    assert one == config() != config(num_blocks=65)
    assert len({one, config(), config(block_size=8)}) == 2
    again = eval(repr(one), {"SchedulerConfig": SchedulerConfig})
    assert again == one
    assert pickle.loads(pickle.dumps(one)) == copy.deepcopy(one) == one
    with pytest.raises(TypeError):
        SchedulerConfig(8)
    with pytest.raises(AttributeError):
        one.num_blocks = 5
    with pytest.raises(UnsupportedError) as caught:
        config(max_steps_in_flight=2)
    assert caught.value.argument == "max_steps_in_flight"
    with pytest.raises(UnsupportedError, match="clock"):
        Scheduler(one, clock=lambda: 0.0)
