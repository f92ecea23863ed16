"""What pagedcore reads of the system: limits of control groups, in both versions and inside a container; versions."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest
from pagedcore.environment import ControlGroup, available_memory, check, control_groups, total_memory, versions
from pagedcore.errors import InvalidArgumentError

ROOT = Path(__file__).resolve().parents[1]


def write(directory, limit, used, stat):
    directory.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if "total_inactive_file" not in stat else V1
    for name, value in zip(names, (limit, used), strict=True):
        (directory / name).write_text(f"{value}\n")
    (directory / "memory.stat").write_text(f"anon 5\n{stat}\n")


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def test_version_2(tmp_path):
    """A group's own limit and its parents' both hold; "max" is none."""
    write(tmp_path / "user" / "job", 1000, 400, "inactive_file 150")
    write(tmp_path / "user", 700, 600, "inactive_file 0")
    write(tmp_path, "max", 5000, "inactive_file 0")
    groups = control_groups(tmp_path, "0::/user/job\n")
    assert groups == [ControlGroup(1000, 400, 150), ControlGroup(700, 600, 0)]
    assert [group.room for group in groups] == [750, 100]


def test_version_1(tmp_path):
    write(tmp_path / "memory" / "docker" / "x", 1000, 900, "total_inactive_file 300")
    own = "12:cpu,cpuacct:/docker/x\n5:memory:/docker/x\n1:name=systemd:/docker/x\n0::/docker/x\n"
    assert control_groups(tmp_path, own) == [ControlGroup(1000, 900, 300)]


@pytest.mark.parametrize("own", ["0::/host/path/that/is/not/here\n", "0::/\n", "0::/../..\n"])
def test_inside_a_container(tmp_path, own):
    """Its own group is mounted as the root, whatever path it has outside."""
    write(tmp_path, 1000, 100, "inactive_file 0")
    assert ControlGroup(1000, 100, 0) in control_groups(tmp_path, own)


def test_no_limits(tmp_path):
    assert control_groups(tmp_path, "0::/a\n") == []
    assert control_groups(tmp_path, "") == []
    assert ControlGroup(10, 20, 3).room == 0


def test_what_tests_read_is_let_through():
    """Who replays a failure with the seed it printed gets the other tests as ever, also those of the command line."""
    read = re.compile(r"""(?:environ(?:\.get\(|\[)|number\()\s*"(PAGEDCORE_\w+)""")
    sources = [*ROOT.glob("tests/**/*.py"), *ROOT.glob("rust/tests/**/*.rs"), *ROOT.glob("bench/*.py")]
    names = {name for source in sources for name in read.findall(source.read_text(encoding="utf-8"))}
    assert {"PAGEDCORE_TEST_SEED", "PAGEDCORE_SIM_SEED"} <= names
    assert check(dict.fromkeys(names, "7")) == {}


def test_a_name_that_nobody_reads():
    with pytest.raises(InvalidArgumentError, match="unknown environment variable PAGEDCORE_TEST_SEDE") as caught:
        check({"PAGEDCORE_TEST_SEDE": "7"})
    assert "PAGEDCORE_CPU_ISA" in caught.value.hint


def test_this_machine():
    assert 0 < available_memory() <= total_memory()


def test_cupy_is_found_by_the_name_of_its_wheel(monkeypatch):
    def version(name):
        if name != "cupy-cuda13x":
            raise importlib.metadata.PackageNotFoundError(name)
        return "14.2"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert versions()["cupy"] == "14.2"
    assert versions()["torch"] is None
