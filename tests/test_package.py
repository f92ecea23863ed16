"""What `import pagedcore` gives, and what it costs."""

from __future__ import annotations

import builtins
import re
import subprocess
import sys
from pathlib import Path

import pagedcore
import pytest

# Names of levels 0 to 3 that the documentation promises.
CORE = {"BlockPool", "PrefixCache", "KVCacheManager", "KVGroup", "Scheduler", "SchedulerConfig", "StepPlan"}


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_an_import_is_quick_and_light() -> None:
    measure = "import sys, time; t = time.perf_counter(); import pagedcore; print(time.perf_counter() - t); "
    seconds, heavy = run(
        measure + "print([m for m in ('numpy', 'torch', 'transformers', 'cupy') if m in sys.modules])"
    ).splitlines()
    assert heavy == "[]"
    assert float(seconds) < 0.3


def test_levels_0_to_2_need_no_numpy_until_they_give_an_array() -> None:
    run(
        "import sys, pagedcore; pool = pagedcore.BlockPool(8); pool.begin_step(); pool.stats();"
        "assert 'numpy' not in sys.modules; pool.allocate(1); assert 'numpy' in sys.modules"
    )


def test_every_exported_name_is_there() -> None:
    assert set(pagedcore.__all__) >= CORE
    for name in pagedcore.__all__:
        assert getattr(pagedcore, name) is not None
        assert name in dir(pagedcore)
    with pytest.raises(AttributeError, match="no_such_name"):
        pagedcore.no_such_name  # noqa: B018


def test_a_missing_extra_is_named() -> None:
    told = run(
        "import sys; sys.modules['torch'] = None\nimport pagedcore\n"
        "try: pagedcore.LLM\nexcept ImportError as error: print(error)"
    )
    assert told == "pagedcore.LLM needs torch, which is not installed: pip install 'pagedcore[engine]'"


def test_the_page_about_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    for code in blocks:
        exec(code, {})  # each by itself
    assert "needed 313 blocks, 63 can be had" in capsys.readouterr().out
    for name in re.findall(r"`(\w+Error)`", page):
        assert hasattr(pagedcore.errors, name) or name in dir(builtins), name


def test_everything_public_is_documented() -> None:
    for name in sorted(CORE | {"PrefixHit", "Commit", "StepResult", "Explanation"}):
        cls = getattr(pagedcore, name)
        assert cls.__doc__, name
        assert cls.__module__ == "pagedcore", name
        for member, value in vars(cls).items():
            if not member.startswith("_"):
                assert value.__doc__, f"{name}.{member}"
