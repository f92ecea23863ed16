"""Three tasks on one event loop, each with its own answer; one of them leaves early.

python docs/examples/async_stream.py MODEL
"""

from __future__ import annotations

import asyncio
import sys

from pagedcore import AsyncEngine, SamplingParams

PARAMS = SamplingParams(max_tokens=24)


async def tell(engine: AsyncEngine, name: str, prompt: str) -> None:
    """Prints an answer in pieces, as they come."""
    async for output in engine.generate(prompt, PARAMS):
        print(f"{name}: {output.outputs[0].new_text!r}")


async def leave_early(engine: AsyncEngine, prompt: str) -> None:
    """Has enough after three pieces: the request is aborted, and its blocks are free again."""
    pieces = 0
    async for _ in engine.generate(prompt, PARAMS):
        pieces += 1
        if pieces == 3:
            break
    print(f"gone: left after {pieces} pieces")


async def main(model: str) -> None:
    """Runs the three side by side and says what is left of them."""
    async with AsyncEngine(model, kv_cache_memory=256 * 2**20) as engine:
        await asyncio.gather(
            tell(engine, "tale", "Once upon a time"),
            tell(engine, "code", "def fibonacci(n):"),
            leave_early(engine, "The sea is"),
        )
        stats = await engine.stats()
        print(f"{stats.sampled_tokens} tokens in {stats.steps} steps, {stats.blocks_used} blocks in use")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
