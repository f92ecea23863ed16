"""The examples that run an engine do what they say; the main job's view is readable in a terminal and without one."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pagedcore.outputs import EngineStats

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "docs" / "examples"


def run(name, *arguments):
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_stream(smollm2):
    out = run("stream.py", smollm2)
    assert "tale ended (length)" in out
    assert "code ended (" in out


def test_async_stream(smollm2):
    out = run("async_stream.py", smollm2)
    assert out.count("tale: ") > 10 < out.count("code: ")
    assert "gone: left after 3 pieces" in out
    assert "0 blocks in use" in out


def test_shared_prefix(smollm2):
    out = run("shared_prefix.py", smollm2)
    prompts = [(int(total), int(found)) for total, found in re.findall(r"(\d+) prompt tokens, (\d+) of them", out)]
    assert prompts[0][1] == 0
    assert all(found > 0.8 * total for total, found in prompts[1:])
    assert "3 answers, 2 blocks copied on write" in out


def test_answer_prompts(smollm2, tmp_path):
    """The main job on a few of its prompts: every figure is there, on the screen and in the file."""
    result = tmp_path / "result.json"
    out = run(
        "answer_prompts.py", "--model", smollm2, "--limit", 4, "--max-tokens", 16, "--baseline", 2, "--json", result
    )
    for row in ("output tokens/s", "time to first token, median", "share of it holding tokens", "copy-on-write"):
        assert row in out
    content = json.loads(result.read_text())
    ours, theirs = content["figures"]["pagedcore"], content["figures"]["padded batches"]
    assert (ours["requests"], theirs["requests"]) == (4, 2)
    assert ours["output_tokens_per_second"] > 0
    assert ours["prefix_hit_tokens"] > 500
    assert ours["block_copies"] == 1
    assert 0.8 < ours["kv_share_holding_tokens"] <= 1 > theirs["kv_share_holding_tokens"] > 0
    assert len(content["answers"]) == 4
    assert all(answers["answers"] for answers in content["answers"])


def test_own_model():
    out = run("own_model.py").splitlines()
    assert [line.partition(":")[0] for line in out] == ["short[0]", "long[0]", "twice[0]", "twice[1]"]
    assert all(line.endswith("]  as without a cache") for line in out)


def test_prompts():
    """64 prompts, half with the system prompt, of very different lengths."""
    answer_prompts = load("answer_prompts")
    prompts = answer_prompts.read_prompts(answer_prompts.PROMPTS, 80)
    assert len(prompts) == 64
    assert sum(prompt.system is not None for prompt in prompts) == 32
    assert sum(prompt.params.n > 1 for prompt in prompts) >= 4
    words = sorted(len(prompt.text.split()) for prompt in prompts)
    assert words[0] < 8
    assert words[-1] > 300


def load(name):
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(EXAMPLES))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def stats(**changes):
    fields = dict.fromkeys(EngineStats.__dataclass_fields__, 0)
    return EngineStats(**{**fields, "num_blocks": 400, "block_size": 16, **changes})


@pytest.mark.parametrize("color", [True, False])
def test_the_live_view_in_a_terminal(monkeypatch, color):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not color:
        monkeypatch.setenv("NO_COLOR", "1")
    out = Terminal()
    view = load("live_view").LiveView(64, out)
    view.update(stats(running=5, waiting=59, last_step_blocks=100, sampled_tokens=10), 3)
    first = out.getvalue()
    assert re.search(r"answered +3 of +64 ", first)
    assert "100 of 400" in first
    assert ("\x1b[1m" in first) == color
    view.update(stats(sampled_tokens=1), 4)
    assert out.getvalue() == first, "not redrawn more often than the eye can follow"
    view.update(stats(sampled_tokens=4000), 64, final=True)
    assert "\x1b[3F" in out.getvalue(), "redrawn in place"


def lines_of(text):
    """What a terminal shows, without what it obeys."""
    return [re.sub(r"\x1b\[[0-9]*[A-Za-z]", "", line) for line in text.splitlines()]


@pytest.mark.parametrize("width", [61, 80, 120, 200])
def test_no_line_of_the_live_view_is_broken(monkeypatch, width):
    """A line that the terminal breaks is two, and going up by the number of lines then leaves remains behind."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    out = Terminal()
    view = load("live_view").LiveView(64, out)
    view._started -= 1000
    busy = {"num_blocks": 99_999, "last_step_blocks": 99_999, "sampled_tokens": 10**5}
    view.update(stats(running=512, waiting=99_999, **busy), 64, final=True)
    assert max(map(len, lines_of(out.getvalue()))) < width


def test_a_narrow_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    out = Terminal()
    load("live_view").LiveView(64, out).update(stats(), 64, final=True)
    assert "\x1b" not in out.getvalue()


def test_wide_characters_and_what_a_terminal_obeys():
    screen = load("screen")
    assert screen.cells("日本語") == 6
    assert screen.cells("e\u0301") == 1
    assert screen.plain("a\x1b[2Jb\n c\x07") == "a\ufffd[2Jb c\ufffd"
    text = "東京" * 30 + " and some words " + "日本 " * 20 + "x" * 70
    lines = screen.wrap(text, 40, indent="    ")
    assert all(screen.cells(line) <= 40 for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert screen.cells(screen.shorten("東京" * 30, 40)) <= 40
    assert screen.shorten("short", 40) == "short"
    assert screen.wrap("", 40) == []
    assert screen.wrap("東", 1) == ["東"], "a screen too narrow for anything ends nevertheless"


def test_the_live_view_elsewhere():
    out = io.StringIO()
    view = load("live_view").LiveView(64, out)
    view.update(stats(running=5, waiting=59, last_step_blocks=100), 3)
    view.update(stats(), 64, final=True)
    assert "\x1b" not in out.getvalue()
    assert out.getvalue().count("\n") == 2
    assert "3/64 answered" in out.getvalue()
    assert "5 running, 59 waiting, 100 of 400 blocks in use" in out.getvalue()
