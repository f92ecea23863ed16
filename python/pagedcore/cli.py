"""The command line: ``pagedcore generate`` and ``pagedcore info``. Data goes to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pagedcore import __version__, environment
from pagedcore.errors import PagedCoreError
from pagedcore.layout import FP8


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit status. 0: done, 1: pagedcore refused or failed, 2: wrong usage, 130:
    interrupted.
    """
    options = _parser().parse_args(arguments)
    try:
        level = environment.check().get(environment.LOG_LEVEL.name, "warning")
        logging.basicConfig(level=level.upper(), stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
        status: int = options.run(options)
        return status
    except PagedCoreError as error:
        print(f"pagedcore: {error}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(f"pagedcore: {error}. Text needs the engine extra: pip install 'pagedcore[engine]'", file=sys.stderr)
        return 1
    except MemoryError as error:
        print(f"pagedcore: out of memory: {error}. Give a smaller --kv-memory", file=sys.stderr)
        return 1
    except UnicodeDecodeError as error:
        print(f"pagedcore: stdin is not {error.encoding} text (byte {error.start})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("pagedcore: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout has gone, as in `pagedcore ... | head`
        sys.stderr.close()
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pagedcore", description="A KV cache cut into blocks, for any LLM server.")
    parser.add_argument("--version", action="version", version=f"pagedcore {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser(
        "generate",
        help="answer prompts with a Hugging Face model",
        description="Answers prompts with a Hugging Face model. Prompts are arguments, or the lines of stdin if "
        "there are none. Answers go to stdout in the order of the prompts.",
    )
    generate.add_argument("prompts", nargs="*", metavar="PROMPT", help="a prompt; none: every line of stdin is one")
    generate.add_argument("--model", required=True, help="directory, hub name or GGUF file")
    generate.add_argument(
        "--chat", action="store_true", help="put each prompt into the model's chat format, as the user's message"
    )
    generate.add_argument("--system", metavar="TEXT", help="system message before each prompt (implies --chat)")
    generate.add_argument("--n", type=int, default=1, help="answers to each prompt (default: %(default)s)")
    generate.add_argument(
        "--max-tokens", type=int, default=256, help="the most tokens of an answer (default: %(default)s)"
    )
    generate.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    generate.add_argument(
        "--top-k", type=int, default=0, help="sample from the k likeliest tokens; 0 is all (default: %(default)s)"
    )
    generate.add_argument(
        "--top-p", type=float, default=1.0, help="sample from this much probability (default: %(default)s)"
    )
    generate.add_argument("--seed", type=int, help="same seed, same answer")
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end an answer before this text; can be repeated"
    )
    generate.add_argument("--dtype", default="auto", help="auto, float32, float16 or bfloat16 (default: %(default)s)")
    generate.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: %(default)s)")
    generate.add_argument("--block-size", type=int, default=16, help="tokens in a KV block (default: %(default)s)")
    generate.add_argument(
        "--kv-memory",
        type=_memory,
        metavar="SIZE",
        help="KV cache: bytes, 512MiB, 2GiB, or a share of the free memory, 0.3",
    )
    generate.add_argument(
        "--kv-format",
        default="auto",
        choices=("auto", FP8),
        help="how the KV cache is kept: auto is the model's dtype; fp8_e4m3 is 8-bit codes, with a scale for each "
        "token and head (default: %(default)s)",
    )
    generate.add_argument("--max-num-seqs", type=int, default=64, help="answers written at once (default: %(default)s)")
    generate.add_argument("--json", action="store_true", help="one JSON object a line, with token ids and times")
    generate.set_defaults(run=_generate)

    info = commands.add_parser("info", help="what pagedcore sees here: versions, processor, memory, settings")
    info.add_argument("--json", action="store_true", help="as one JSON object")
    info.set_defaults(run=_info)
    return parser


def _memory(text: str) -> int | float:
    """Bytes as an int, or a share as a float."""
    for suffix, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if text.endswith(suffix):
            size = float(text.removesuffix(suffix)) * factor
            if not math.isfinite(size):
                raise ValueError(text)  # argparse says which argument
            return int(size)
    return int(text) if text.isdigit() else float(text)


def _generate(options: argparse.Namespace) -> int:
    from pagedcore.params import SamplingParams

    params = SamplingParams(  # first: a wrong value is told before torch is loaded, which takes seconds
        n=options.n,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        stop=tuple(options.stop),
    )
    prompts = options.prompts
    if not prompts and not sys.stdin.isatty():
        prompts = [line for line in sys.stdin.read().splitlines() if line.strip()]
    if not prompts:
        print("pagedcore generate: no prompts, neither as arguments nor on stdin", file=sys.stderr)
        return 2
    print(f"loading {options.model} ...", file=sys.stderr, flush=True)
    from transformers.utils import logging as transformers_logging

    from pagedcore.llm import LLM

    transformers_logging.disable_progress_bar()  # of loading: it is over in a second
    with LLM(
        options.model,
        dtype=options.dtype,
        device=options.device,
        block_size=options.block_size,
        kv_cache_memory=options.kv_memory,
        kv_format=options.kv_format,
        max_num_seqs=options.max_num_seqs,
    ) as llm:
        if options.chat or options.system:
            system = [{"role": "system", "content": options.system}] if options.system else []
            outputs = llm.chat([[*system, {"role": "user", "content": prompt}] for prompt in prompts], params)
        else:
            outputs = llm.generate(prompts, params)
    failed = False
    for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        failed |= output.error is not None
        if output.error is not None:
            print(f"pagedcore: prompt {number}: {output.error}", file=sys.stderr)
        if options.json:
            print(json.dumps(_as_json(number, prompt, output), ensure_ascii=False))
            continue
        for completion in output.outputs:
            if len(prompts) > 1 or options.n > 1:
                print(f"--- prompt {number}" + (f", answer {completion.index}" if options.n > 1 else ""))
            print(completion.text)
    return 1 if failed else 0


def _as_json(number: int, prompt: str, output: Any) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "index": number,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "time_to_first_token": output.metrics.time_to_first_token,
        "error": output.error,
        "outputs": [
            {"index": c.index, "text": c.text, "token_ids": c.token_ids, "finish_reason": c.finish_reason}
            for c in output.outputs
        ],
    }


def _gpu_lines(gpu: dict[str, Any]) -> list[str]:
    if gpu["images"] is None:
        return ["GPU kernels not in this build (no nvcc, or PAGEDCORE_CUDA=OFF)"]
    lines = [f"GPU kernels {gpu['images']}"]
    if gpu["problem"]:
        lines.append(f"GPUs        none: {gpu['problem']}")
    for number, device in enumerate(gpu["devices"]):
        memory = f"{device['memory'] / 2**30:.0f} GiB"
        facts = f"compute capability {device['capability']}, {device['multiprocessors']} multiprocessors, {memory}"
        lines.append(f"GPU {number}       {device['name']}, {facts}")
    return lines


def _info(options: argparse.Namespace) -> int:
    facts = environment.describe()
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    versions = facts["versions"]
    print(f"pagedcore {__version__} in {Path(__file__).parent}")
    print(f"  python      {facts['python']} on {facts['platform']}")
    packages = (f"{name} {version or 'missing'}" for name, version in versions.items() if name != "pagedcore")
    print(f"  packages    {', '.join(packages)}")
    print(f"  processor   {facts['cpu']['model']}, {facts['cpu']['cores']} cores")
    kernels = facts["kernels"]
    print(f"  CPU kernels {kernels['cpu_isa']}, {kernels['threads']} threads ({kernels['thread_runtime']})")
    for line in _gpu_lines(facts["gpu"]):
        print(f"  {line}")
    memory = facts["memory"]
    print(f"  memory      {memory['available'] / 2**30:.1f} GiB available of {memory['total'] / 2**30:.1f} GiB")
    print("environment")
    for variable in environment.VARIABLES:
        value = facts["environment"].get(variable.name)
        print(f"  {variable.name:22} {value if value is not None else '(not set)':12} {variable.meaning}")
    return 0
