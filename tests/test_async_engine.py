"""Many tasks, one engine: every task gets its own answer, and who leaves takes its request along."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys

import pytest
from greedy import run_all
from models import save_tiny_model
from pagedcore import AsyncEngine, Engine, SamplingParams
from pagedcore import models as pagedcore_models
from pagedcore.errors import (
    ClosedError,
    CorruptionError,
    DuplicateRequestError,
    InvalidArgumentError,
    RequestTooLargeError,
    TokenOutOfRangeError,
    UnknownRequestError,
)

OPTIONS = {"num_blocks": 40, "max_num_seqs": 8, "max_num_batched_tokens": 32}
LONG = SamplingParams(max_tokens=400, ignore_eos=True)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return pagedcore_models.load(save_tiny_model("llama", tmp_path_factory.mktemp("llama")))


def run(scenario, loaded):
    async def main():
        async with AsyncEngine(loaded, **OPTIONS) as engine:
            await asyncio.wait_for(scenario(engine), 120)

    asyncio.run(main())


async def tokens_of(engine, prompt, params, **options):
    tokens = []
    async for output in engine.generate(prompt, params, **options):
        tokens += output.outputs[0].new_token_ids
    assert output.finished
    assert output.outputs[0].token_ids == tokens
    return tokens


async def until(engine, condition):
    while not condition(await engine.stats()):
        await asyncio.sleep(0.001)


def test_tasks_get_their_own_answers(loaded):
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    prompts = [[3 + i] * (1 + 5 * i) for i in range(12)]
    with Engine(loaded, **OPTIONS) as engine:
        expected = run_all(engine, {str(i): (prompt, params) for i, prompt in enumerate(prompts)})

    async def scenario(engine):
        answers = await asyncio.gather(*(tokens_of(engine, prompt, params) for prompt in prompts))
        assert answers == [expected[str(i)][0] for i in range(12)]
        assert (await engine.stats()).blocks_used == 0

    run(scenario, loaded)


def test_a_slow_consumer_loses_nothing(loaded):
    async def scenario(engine):
        outputs = []
        async for output in engine.generate([5, 6], SamplingParams(max_tokens=20, ignore_eos=True)):
            outputs.append(output.outputs[0].new_token_ids)
            if len(outputs) == 1:
                await until(engine, lambda stats: stats.running == 0)
        assert [len(new) for new in outputs] == [1] * 20

    run(scenario, loaded)


def test_who_leaves_takes_the_request_along(loaded):
    """A cancelled task, a loop that is left, a generator that is closed or forgotten: the blocks come back."""

    async def leave(engine):
        async for _ in engine.generate([5, 6, 7], LONG):
            break

    async def close(engine):
        stream = engine.generate([5, 6, 7], LONG)
        await anext(stream)
        await stream.aclose()

    async def forget(engine):
        stream = engine.generate([5, 6, 7], LONG)
        await anext(stream)
        del stream
        gc.collect()

    async def cancel(engine):
        task = asyncio.create_task(tokens_of(engine, [5, 6, 7], LONG))
        await until(engine, lambda stats: stats.running == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def cancel_at_once(engine):
        task = asyncio.create_task(tokens_of(engine, [5, 6, 7], LONG))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def scenario(engine):
        for way in (leave, close, forget, cancel, cancel_at_once):
            await way(engine)
            await until(engine, lambda stats: stats.running == stats.waiting == stats.blocks_used == 0)

    run(scenario, loaded)


def test_abort(loaded):
    async def scenario(engine):
        task = asyncio.create_task(tokens_of(engine, [5, 6, 7], LONG, request_id="mine"))
        await until(engine, lambda stats: stats.sampled_tokens > 3)
        await engine.abort("mine")
        assert len(await task) > 3
        for unknown in ("mine", "other"):
            with pytest.raises(UnknownRequestError):
                await engine.abort(unknown)

    run(scenario, loaded)


def test_bad_requests_reach_who_made_them(loaded):
    async def scenario(engine):
        running = asyncio.create_task(tokens_of(engine, [5, 6, 7], LONG, request_id="mine"))
        await until(engine, lambda stats: stats.running == 1)
        for prompt, options, error in (
            ([10_000], {}, TokenOutOfRangeError),
            ([5] * 1000, {}, RequestTooLargeError),
            ([5], {"request_id": "mine"}, DuplicateRequestError),
            ([5], {"request_id": ["mine"]}, InvalidArgumentError),  # no key of anything
            ([5], {"request_id": ""}, InvalidArgumentError),
        ):
            with pytest.raises(error):
                await tokens_of(engine, prompt, LONG, **options)
        assert not running.done(), "the refused namesake did not take it along"
        assert (await engine.stats()).running == 1
        running.cancel()

    run(scenario, loaded)


def test_ids_that_callers_chose(loaded):
    """Made-up ids pass over those in use."""

    async def scenario(engine):
        chosen = [asyncio.create_task(tokens_of(engine, [5, 6], LONG, request_id=f"async-{i}")) for i in (0, 1, 3)]
        await until(engine, lambda stats: stats.running == 3)
        for expected in ("async-2", "async-4"):
            async for output in engine.generate([5], SamplingParams(max_tokens=2, ignore_eos=True)):
                assert output.request_id == expected
        assert not any(task.done() for task in chosen)
        for task in chosen:
            task.cancel()

    run(scenario, loaded)


def test_a_loop_that_was_closed(loaded):
    """Nobody can read the answers of its tasks any more: they are not computed to their end."""

    async def others(engine):
        await until(engine, lambda stats: stats.running == stats.blocks_used == 0)
        tokens = (await engine.stats()).sampled_tokens
        assert len(await tokens_of(engine, [5], SamplingParams(max_tokens=3, ignore_eos=True))) == 3
        await engine.close()
        return tokens

    engine = AsyncEngine(loaded, **OPTIONS)
    closed = asyncio.new_event_loop()
    stream = engine.generate([5, 6, 7], LONG)
    assert closed.run_until_complete(anext(stream)).outputs[0].num_tokens == 1
    closed.close()
    assert asyncio.run(asyncio.wait_for(others(engine), 120)) < LONG.max_tokens


def test_close(loaded):
    async def main():
        engine = AsyncEngine(loaded, **OPTIONS)
        tasks = [asyncio.create_task(tokens_of(engine, [5, 6, 7 + i], LONG)) for i in range(3)]
        await until(engine, lambda stats: stats.running == 3)
        await asyncio.gather(engine.close(), engine.close())
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, ClosedError)
        for call in (engine.stats(), engine.abort("x"), engine.__aenter__(), tokens_of(engine, [5], LONG)):
            with pytest.raises(ClosedError):
                await call
        await engine.close()

    asyncio.run(main())


def test_a_broken_engine_is_told_to_all(loaded, monkeypatch):
    async def main():
        engine = AsyncEngine(loaded, **OPTIONS)

        def broken(self, only=None):
            raise CorruptionError("the books do not balance")

        monkeypatch.setattr(Engine, "step", broken)
        with pytest.raises(CorruptionError, match="the books"):
            await asyncio.wait_for(tokens_of(engine, [5], LONG), 60)
        with pytest.raises(ClosedError):
            await engine.stats()
        await engine.close()

    asyncio.run(main())


class Panic(BaseException):
    """What compiled code raises where it gives up, as tokenizers' Rust does: no Exception."""


def test_a_panic_of_one_request_reaches_who_made_it(loaded, monkeypatch):
    add_request = Engine.add_request

    def panicking(self, request_id, *arguments, **options):
        if request_id == "bad":
            raise Panic
        add_request(self, request_id, *arguments, **options)

    async def scenario(engine):
        running = asyncio.create_task(tokens_of(engine, [5, 6, 7], LONG, request_id="mine"))
        await until(engine, lambda stats: stats.running == 1)
        with pytest.raises(Panic):
            await tokens_of(engine, [5], LONG, request_id="bad")
        assert (await engine.stats()).running == 1
        assert not running.done()
        running.cancel()

    monkeypatch.setattr(Engine, "add_request", panicking)
    run(scenario, loaded)


def test_a_panic_of_the_engine_is_told_to_all(loaded, monkeypatch):
    """As an Exception: whoever waits for an answer has no reason to expect anything else."""

    async def main():
        engine = AsyncEngine(loaded, **OPTIONS)

        def panicking(self, only=None):
            raise Panic("at src/lib.rs")

        monkeypatch.setattr(Engine, "step", panicking)
        with pytest.raises(ClosedError, match="broken down: Panic"):
            await asyncio.wait_for(tokens_of(engine, [5], LONG), 60)
        with pytest.raises(ClosedError):
            await asyncio.wait_for(engine.stats(), 60)
        await engine.close()

    asyncio.run(main())


def test_a_forked_child_is_refused(tmp_path):
    """Also while a thread of the parent holds the engine's lock; and the parent's requests go on."""
    save_tiny_model("llama", tmp_path)
    program = (
        "import asyncio, os, sys, warnings\n"
        "from pagedcore import AsyncEngine, SamplingParams\n"
        "from pagedcore.errors import ForkedProcessError\n"
        "warnings.simplefilter('ignore')  # that a process with threads forks\n"
        "engine = AsyncEngine(sys.argv[1], num_blocks=40)\n"
        "async def refused(call):\n"
        "    try:\n"
        "        await asyncio.wait_for(call, 20)\n"
        "    except ForkedProcessError as error:\n"
        "        assert 'spawn' in error.hint\n"
        "        return True\n"
        "async def child():\n"
        "    calls = (anext(engine.generate([5])), engine.stats(), engine.abort('x'), engine.__aenter__())\n"
        "    refusals = [await refused(call) for call in calls]\n"
        "    await engine.close()\n"
        "    return all(refusals)\n"
        "async def parent():\n"
        "    async with engine:\n"
        "        async for output in engine.generate([5, 6], SamplingParams(max_tokens=5, ignore_eos=True)):\n"
        "            pass\n"
        "        return output.outputs[0].num_tokens\n"
        "with engine._lock:\n"
        "    pid = os.fork()\n"
        "if pid == 0:\n"
        "    os._exit(0 if asyncio.run(child()) else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), asyncio.run(parent()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "0 5\n"), done.stderr


def test_the_interpreter_ends_though_nobody_closed_it(tmp_path):
    save_tiny_model("llama", tmp_path)
    program = (
        "import asyncio, sys\n"
        "from pagedcore import AsyncEngine, SamplingParams\n"
        "async def main():\n"
        "    global engine\n"
        "    engine = AsyncEngine(sys.argv[1], num_blocks=40)\n"
        "    async for output in engine.generate([5, 6], SamplingParams(max_tokens=400, ignore_eos=True)):\n"
        "        break\n"
        "asyncio.run(main())\n"
        "print('end')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr
