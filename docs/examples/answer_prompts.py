"""Answers 64 prompts with a real model out of a KV cache cut into blocks, and compares that with padded batches.

    python docs/examples/answer_prompts.py --model PATH [--json FILE]

PATH is a model directory or a GGUF file, which is converted to a directory beside it the first time. The prompts are in
prompts.toml: half of them share a system prompt, which is computed once, and some ask for several answers, which share
their prompt's blocks until they differ. The KV cache is smaller than all requests together would need at once.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

import screen
from live_view import LiveView
from padded_batches import Figures, answer_in_padded_batches
from pagedcore import SamplingParams, environment, models
from pagedcore.engine import Engine
from pagedcore.outputs import RequestOutput

PROMPTS = Path(__file__).with_name("prompts.toml")
SHOWN = (0, 17, 37, 44)  # prompts whose answers are printed


@dataclass(frozen=True)
class Prompt:
    """One entry of prompts.toml, ready for the engine."""

    text: str
    system: str | None
    params: SamplingParams

    @property
    def messages(self) -> list[dict[str, str]]:
        """The prompt as a conversation."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.text}]


def read_prompts(path: Path, max_tokens: int) -> list[Prompt]:
    """The prompts of a file; no answer is longer than ``max_tokens``."""
    with path.open("rb") as file:
        content = tomllib.load(file)
    prompts = []
    for number, entry in enumerate(content["prompt"]):
        options = {name: entry[name] for name in ("n", "temperature", "top_k", "top_p", "seed") if name in entry}
        prompts.append(
            Prompt(
                text=entry["text"].strip(),
                system=content["system"].strip() if entry.get("system") else None,
                # Answers of different lengths, as in life: half, three quarters or all of the limit.
                params=SamplingParams(max_tokens=max(1, max_tokens * (2 + number % 3) // 4), **options),
            )
        )
    return prompts


def answer(engine: Engine, prompts: list[Prompt]) -> tuple[Figures, list[RequestOutput]]:
    """Adds all prompts, steps the engine until all are answered, and shows how it goes."""
    view = LiveView(len(prompts))
    finished: dict[str, RequestOutput] = {}
    started = time.monotonic()
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), engine.tokenizer.encode_chat(prompt.messages), prompt.params)
    while engine.has_unfinished:
        finished |= {output.request_id: output for output in engine.step() if output.finished}
        view.update(engine.stats(), len(finished))
    seconds = time.monotonic() - started
    stats = engine.stats()
    view.update(stats, len(finished), final=True)
    outputs = [finished[str(number)] for number in range(len(prompts))]
    figures = Figures(
        requests=len(outputs),
        prompt_tokens=sum(len(output.prompt_tokens) for output in outputs),
        output_tokens=sum(completion.num_tokens for output in outputs for completion in output.outputs),
        seconds=seconds,
        times_to_first_token=[output.metrics.time_to_first_token or seconds for output in outputs],
        kv_bytes=stats.peak_bytes_used,
        kv_share=stats.kv_utilization,
        prefix_hit_tokens=stats.prefix_hit_tokens,
        block_copies=stats.block_copies,
        preemptions=stats.preemptions,
    )
    return figures, outputs


def show_answers(prompts: list[Prompt], outputs: list[RequestOutput]) -> None:
    """Prints a few of the questions with their answers."""
    width = screen.columns()
    print("\nSome answers, the words of a small model; greedy ones are those that transformers gives:")
    for number in SHOWN:
        print("\n" + screen.shorten(f"[{number}] {screen.plain(prompts[number].text)}", width))
        several = len(outputs[number].outputs) > 1
        for completion in outputs[number].outputs:
            mark = f"({completion.index + 1}) " if several else ""
            end = " ..." if completion.finish_reason == "length" else ""
            print("\n".join(screen.wrap(mark + screen.plain(completion.text) + end, width, indent="    ")))


def show_table(columns: dict[str, Figures]) -> None:
    """Prints one row a figure and one column a way of answering."""

    def megabytes(figures: Figures) -> str:
        return f"{figures.kv_bytes / 2**20:,.1f} MiB"

    rows = [
        ("requests", lambda f: f"{f.requests}"),
        ("prompt / output tokens", lambda f: f"{f.prompt_tokens:,} / {f.output_tokens:,}"),
        ("time", lambda f: f"{f.seconds:.1f} s"),
        ("output tokens/s", lambda f: f"{f.tokens_per_second:.0f}"),
        ("time to first token, median", lambda f: f"{f.first_token(50):.2f} s"),
        ("time to first token, p90", lambda f: f"{f.first_token(90):.2f} s"),
        ("KV memory used, peak", megabytes),
        ("  share of it holding tokens", lambda f: f"{100 * f.kv_share:.1f} %"),
        ("prefix hits, tokens", lambda f: f"{f.prefix_hit_tokens:,}"),
        ("copy-on-write block copies", lambda f: f"{f.block_copies}"),
        ("preemptions", lambda f: f"{f.preemptions}"),
    ]
    width = max(18, *(len(name) + 2 for name in columns))
    print("\n" + " " * 30 + "".join(f"{name:>{width}}" for name in columns))
    for name, show in rows:
        print(f"{name:30}" + "".join(f"{show(figures):>{width}}" for figures in columns.values()))
    if len({figures.requests for figures in columns.values()}) > 1:
        print("\nThe columns are of different numbers of requests: compare rates and shares.")
        print("All prompts of a padded batch get their first token at once, when the longest has been computed.")


def main() -> int:
    """Runs the job; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="model directory, or GGUF file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures and all answers to FILE")
    parser.add_argument("--max-tokens", type=int, default=64, help="longest answer (default: %(default)s)")
    parser.add_argument("--max-num-seqs", type=int, default=32, help="answers written at once (default: %(default)s)")
    parser.add_argument("--num-blocks", type=int, default=400, help="KV blocks (default: %(default)s)")
    parser.add_argument("--block-size", type=int, default=16, help="tokens in a block (default: %(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N prompts")
    parser.add_argument(
        "--baseline",
        type=int,
        default=8,
        metavar="N",
        help="prompts for the padded batches, 0 for none (default: %(default)s)",
    )
    options = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")  # what a model writes need not be in the terminal's character set
    import transformers

    transformers.utils.logging.disable_progress_bar()
    directory = options.model
    if directory.is_file():
        if not directory.with_suffix("").is_dir():
            print(f"converting {directory.name} to safetensors, once (half a minute)", flush=True)
        directory = models.convert_gguf(directory)
    model = models.load(directory)
    prompts = read_prompts(PROMPTS, options.max_tokens)[: options.limit]
    with Engine(
        model, block_size=options.block_size, num_blocks=options.num_blocks, max_num_seqs=options.max_num_seqs
    ) as engine:
        kv_bytes_per_token = engine.layout.block_bytes // engine.layout.block_size
        print(
            f"{len(prompts)} prompts for {directory.name} in {engine.layout.dtype}, {options.max_num_seqs} at once\n"
            f"KV cache of {engine.layout.total_bytes / 2**20:.0f} MiB in blocks of {options.block_size} tokens\n",
            flush=True,
        )
        figures, outputs = answer(engine, prompts)
    if options.limit is None:
        show_answers(prompts, outputs)
    columns = {"pagedcore": figures}
    if options.baseline:
        step = max(1, len(prompts) // options.baseline)
        chosen = range(0, len(prompts), step)[: options.baseline]
        print(f"\n{len(chosen)} of the prompts in padded batches of 8, by transformers' generate", flush=True)
        columns["padded batches"], _ = answer_in_padded_batches(
            directory,
            [outputs[i].prompt_token_ids for i in chosen],
            [prompts[i].params.max_tokens for i in chosen],
            batch_size=8,
            dtype=model.dtype,
            kv_bytes_per_token=kv_bytes_per_token,
            on_progress=lambda seconds, steps: print(f"{seconds:5.1f} s  {steps} tokens each", flush=True),
        )
    show_table(columns)
    if options.json:
        result = {
            "schema": 1,
            "environment": environment.describe(),
            "command": " ".join(sys.argv),
            "figures": {name: column.as_json() for name, column in columns.items()},
            "answers": [
                {"prompt": prompt.text, "answers": [completion.text for completion in output.outputs]}
                for prompt, output in zip(prompts, outputs, strict=True)
            ],
        }
        options.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return 1 if any(output.error for output in outputs) else 0


if __name__ == "__main__":
    sys.exit(main())
