"""What is computed once: a long prefix that many prompts share, and one prompt with several answers.

python docs/examples/shared_prefix.py MODEL
"""

from __future__ import annotations

import sys

from pagedcore import LLM, SamplingParams

RULES = (
    "You are the help desk of a museum. " + "The museum opens at ten and closes at six, and is closed on Mondays. " * 12
)
QUESTIONS = ("When do you open?", "Are you open on Mondays?", "May I bring my dog?")


def main(model: str) -> None:
    """Asks three questions one after another, then one question three times, and says what the cache saved."""
    with LLM(model, kv_cache_memory=256 * 2**20) as llm:
        for question in QUESTIONS:
            before = llm.engine.stats()
            messages = [{"role": "system", "content": RULES}, {"role": "user", "content": question}]
            (output,) = llm.chat(messages, SamplingParams(max_tokens=24))
            found = llm.engine.stats().prefix_hit_tokens - before.prefix_hit_tokens
            print(f"{question} {len(output.prompt_token_ids)} prompt tokens, {found} of them found in the cache")
        params = SamplingParams(n=3, max_tokens=24, temperature=0.8, seed=1)
        (output,) = llm.chat([{"role": "user", "content": "Name a colour."}], params)
        print(f"{len(output.outputs)} answers, {llm.engine.stats().block_copies} blocks copied on write:")
        for completion in output.outputs:
            print(f"  {completion.text!r}")


if __name__ == "__main__":
    main(sys.argv[1])
