"""Two requests at once on an engine of one's own, their text as it comes.

python docs/examples/stream.py MODEL
"""

from __future__ import annotations

import sys

from pagedcore import Engine, SamplingParams

PROMPTS = {"tale": "Once upon a time", "code": "def fibonacci(n):"}


def main(model: str) -> None:
    """Prints each piece of text with the request it belongs to, then how each request ended."""
    with Engine(model, kv_cache_memory=256 * 2**20) as engine:
        for request_id, prompt in PROMPTS.items():
            engine.add_request(request_id, prompt, SamplingParams(max_tokens=24))
        while engine.has_unfinished:
            for output in engine.step():
                completion = output.outputs[0]
                print(f"{output.request_id}: {completion.new_text!r}")
                if output.finished:
                    first = output.metrics.time_to_first_token
                    print(f"{output.request_id} ended ({completion.finish_reason}), first token after {first:.2f} s")


if __name__ == "__main__":
    main(sys.argv[1])
