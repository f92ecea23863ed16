"""README.md says nothing that does not run, and no page links to nowhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [
    pytest.param(
        match[1], README.count("\n", 0, match.start(1)), id=f"line-{README.count(chr(10), 0, match.start(1)) + 1}"
    )
    for match in re.finditer(r"^```python\n(.*?)^```", README, re.M | re.S)
]


def test_readme_shows_every_level():
    assert len(BLOCKS) >= 6


@pytest.mark.parametrize(("code", "line"), BLOCKS)
def test_readme_block_runs(code, line, smollm2_gguf, monkeypatch):
    monkeypatch.chdir(ROOT)  # a block may name the model by the path that `make run` puts it at
    exec(compile("\n" * line + code, "README.md", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?:|#)([^)#]+)", README))))
def test_readme_link_leads_somewhere(link):
    assert (ROOT / link).exists()


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]
