"""The kernels under AddressSanitizer and UBSan: an access that is off by one element is found exactly.

The sanitizer has to be in a process from its start, so everything here runs in processes of its own.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import shim_build

# What only this build sees: the bytes next to an allocation are mapped, and the rest of shared memory's page too.
FAULTS = {
    "past the end": "AddressSanitizer: use-after-poison",
    "before the start": "AddressSanitizer: use-after-poison",
    "past shared memory": "AddressSanitizer: use-after-poison",
    "overflow": "runtime error: signed integer overflow",
}
RUN = (
    "import sys, shim_build\n"
    "shim = shim_build.load(shim_build.Path(sys.argv[1]))\n"
    "for seed in range(3):\n"
    "    shim.set_seed(seed)\n"
    "    assert shim.run_faulty(sys.argv[2]) == 0\n"
)


@pytest.fixture(scope="module")
def library(address_library: Any) -> str:
    return str(address_library)


def run_faulty(library: str, name: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN, library, name],
        cwd=shim_build.ROOT / "tests" / "shim",
        env=shim_build.address_environment(),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("fault", FAULTS)
def test_an_exact_fault_is_found(library: str, fault: str) -> None:
    done = run_faulty(library, fault)
    assert done.returncode != 0
    assert FAULTS[fault] in done.stderr
    assert "faulty.cu" in done.stderr  # the report names the kernel's source


@pytest.mark.parametrize("fault", FAULTS)
def test_other_builds_do_not_see_it(plain_shim: Any, fault: str) -> None:
    """Else this build would not be needed for it."""
    assert plain_shim.run_faulty(fault) == 0


def test_a_right_kernel_runs(library: str) -> None:
    done = run_faulty(library, "none")
    assert done.returncode == 0, done.stderr


def test_the_kernels_touch_nothing_but_their_own(library: str) -> None:
    """All tests that every build of the shim runs, at the head sizes of the slow builds."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(shim_build.ROOT / "tests" / "shim")],
        cwd=shim_build.ROOT,
        env={**shim_build.address_environment(), "PAGEDCORE_TEST_SHIM": "address"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert " passed" in done.stdout
