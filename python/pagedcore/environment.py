"""What pagedcore reads from its surroundings: environment variables, and the facts `pagedcore info` prints.

Every variable is declared here, once, and read nowhere else, but for those of the build and the tests; the kernels ask
here too. A value that is not understood is an error, never a silent default: a typo in an environment variable must not
change what a benchmark measures.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagedcore.errors import InvalidArgumentError

LOG_LEVELS = ("debug", "info", "warning", "error")
CPU_ISAS = ("scalar", "avx2", "avx512", "avx512_bf16", "avx512_bf16_emulated")  # the last one is for tests


@dataclass(frozen=True)
class Variable:
    """An environment variable: its name, what it means, and the values it takes (empty: any text)."""

    name: str
    meaning: str
    choices: tuple[str, ...] = ()

    def read(self, environ: Mapping[str, str] | None = None) -> str | None:
        """Its value, or None where it is unset or empty. Raises InvalidArgumentError for a value it does not take."""
        value = (os.environ if environ is None else environ).get(self.name, "").strip()
        if not value:
            return None
        if self.choices and value.lower() not in self.choices:
            raise InvalidArgumentError(
                f"environment variable {self.name} is {value!r}",
                hint=f"use one of {', '.join(self.choices)}, or unset it",
                argument=self.name,
                got=value,
                expected=self.choices,
            )
        return value.lower() if self.choices else value


CPU_ISA = Variable("PAGEDCORE_CPU_ISA", "instruction set the CPU kernels use, instead of the best one", CPU_ISAS)
LOG_LEVEL = Variable("PAGEDCORE_LOG_LEVEL", "what the command line logs to stderr (default: warning)", LOG_LEVELS)
TEST_MODEL = Variable("PAGEDCORE_TEST_MODEL", "model directory or GGUF file that the tests of real text use")
VARIABLES = (CPU_ISA, LOG_LEVEL, TEST_MODEL)

#: Names with the prefix that are read elsewhere: by the build, and by the repository's own tests (seeds, sizes).
ELSEWHERE = (
    "PAGEDCORE_CUDA",
    "PAGEDCORE_MODEL_OPS",
    "PAGEDCORE_MODEL_SEED",
    "PAGEDCORE_SIM_SEED",
    "PAGEDCORE_SIM_SEEDS",
    "PAGEDCORE_TEST_DEVICE",
    "PAGEDCORE_TEST_SEED",
    "PAGEDCORE_TEST_SHIM",
    "PAGEDCORE_TEST_SHIM_LIBRARY",
)


def check(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Reads every variable; the ones that are set, by name. Raises InvalidArgumentError for the first bad value,
    and for a name with the prefix that does not exist; those read elsewhere are let through.
    """
    environ = os.environ if environ is None else environ
    known = {variable.name for variable in VARIABLES}
    for name in environ:
        if name.startswith("PAGEDCORE_") and name not in known and name not in ELSEWHERE:
            raise InvalidArgumentError(
                f"unknown environment variable {name}",
                hint=f"the ones there are: {', '.join(sorted(known))}",
                argument=name,
            )
    values = ((variable.name, variable.read(environ)) for variable in VARIABLES)
    return {name: value for name, value in values if value is not None}


# ---------------------------------------------------------------------------------------------------- the machine


def available_memory() -> int:
    """Bytes of host memory that can be taken now without swapping, within the limits of the control groups this process
    is in.
    """
    available = _proc_meminfo().get("MemAvailable")
    if available is None:  # not Linux: half of what is installed is the best guess that needs no dependency
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return min([available, *(group.room for group in control_groups())])


def total_memory() -> int:
    """Bytes of host memory installed, or the limit of the control group if that is lower."""
    total = _proc_meminfo().get("MemTotal", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min([total, *(group.limit for group in control_groups())])


@dataclass(frozen=True)
class ControlGroup:
    """A memory limit that this process is under, in bytes."""

    limit: int
    used: int
    reclaimable: int  # file pages among what is used: the group gives them up first

    @property
    def room(self) -> int:
        """What can still be taken. File pages count as used until somebody else needs them: a checkpoint just read
        would look like a full house.
        """
        return max(0, self.limit - self.used + self.reclaimable)


#: File names of a limit, what is used of it, and the reclaimable part of that in memory.stat: version 2, version 1.
_GROUP_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def control_groups(root: Path = Path("/sys/fs/cgroup"), own: str | None = None) -> list[ControlGroup]:
    """The memory limits of the control groups this process is in, parents included; either version.

    ``own`` is the text of /proc/self/cgroup. Where its paths are not visible, as inside a container, the groups at
    ``root`` itself are what holds.
    """
    groups = []
    for line in (_read_text("/proc/self/cgroup") if own is None else own).splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        controller = "" if number == "0" else "memory"
        if controller and controller not in controllers.split(","):
            continue
        limit_file, used_file, reclaimable = _GROUP_FILES[controller]
        top = root / controller
        for directory in (top / path.lstrip("/"), *(top / path.lstrip("/")).parents):
            if not directory.is_relative_to(top):
                break
            limit, used = _read_int(directory / limit_file), _read_int(directory / used_file)
            if limit is not None and used is not None:
                stat = dict(line.partition(" ")[::2] for line in _read_text(directory / "memory.stat").splitlines())
                groups.append(ControlGroup(limit, used, int(stat.get(reclaimable, 0))))
    return groups


def cpu_count() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """The processor's name as the system tells it."""
    for line in _read_text("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Installed versions of pagedcore and of what it works with; None for what is not installed. Imports none of
    them.
    """
    names = ("pagedcore", "numpy", "torch", "transformers", "tokenizers", "safetensors", "gguf")
    return {name: _version(name) for name in names} | {"cupy": next(filter(None, map(_version, _CUPY)), None)}


#: CuPy's wheels are named after the CUDA version that they are for.
_CUPY = ("cupy-cuda13x", "cupy-cuda12x", "cupy")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe() -> dict[str, Any]:
    """The facts that decide how pagedcore runs here, as plain JSON values. Memory in bytes. Does not import torch."""
    return {
        "versions": versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {"model": cpu_model(), "cores": cpu_count()},
        "kernels": _kernels(),
        "gpu": _gpu(),
        "memory": {"total": total_memory(), "available": available_memory()},
        "environment": check(),
        "executable": sys.executable,
    }


def _kernels() -> dict[str, Any]:
    """What the compiled kernels chose: instruction set, and the threads they run on."""
    from pagedcore import _kernels

    return {
        "cpu_isa": _kernels.cpu_isa(),
        "threads": _kernels.max_threads(),
        "thread_runtime": _kernels.thread_runtime(),
    }


def _gpu() -> dict[str, Any]:
    """What the GPU kernels were compiled for (None: they were not), the driver, and the devices it shows."""
    from pagedcore import _kernels

    return _kernels.gpu_facts()


def _proc_meminfo() -> dict[str, int]:
    fields = {}
    for line in _read_text("/proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        value = rest.split()
        if value and value[0].isdigit():
            fields[name] = int(value[0]) * 1024
    return fields


def _read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _read_int(path: str | Path) -> int | None:
    text = _read_text(path).strip()
    return int(text) if text.isdigit() else None
