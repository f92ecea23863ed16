"""The shim itself: right kernels run, and each planted fault is found, by the build that can see it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import planted
import pytest
import shim_build
import test_shim_address

# What is found in any build, and with which words. The rest are races, which only the race check sees for certain.
FAULTS = {
    "missing wait": None,  # NaN until the wait
    "overwritten copy": None,
    "divergent barrier": "divergent barrier",
    "early return": "has returned",
    "divergent collective": "divergent warp collective",
    "misaligned copy": "misaligned",
    "out of bounds": "invalid memory access",
    "unfinished copy": "never waited for",
}
EXACT = tuple(test_shim_address.FAULTS)
RACES = ("missing barrier", "missing warp barrier", "missing fence", "missing acquire", "overwritten copy")


def test_every_planted_fault_is_in_one_of_the_lists(plain_shim: Any) -> None:
    assert set(plain_shim.faulty_kernels()) == {"none", *FAULTS, *RACES, *EXACT}


@pytest.mark.parametrize("seed", range(20))
def test_a_right_kernel_runs_in_every_order(shim: Any, seed: int) -> None:
    shim.set_seed(seed)
    assert shim.run_faulty("none") == 0


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_in_every_build(shim: Any, fault: str) -> None:
    words = FAULTS[fault]
    found = 0
    for seed in range(10):
        shim.set_seed(seed)
        try:
            found += shim.run_faulty(fault) != 0  # NaN is not 0
        except shim.KernelFault as error:
            found += words is None or words in str(error)
    assert found > 0


@pytest.mark.parametrize("race", RACES)
def test_a_race_is_found_whatever_the_order(race_shim: Any, race: str) -> None:
    for seed in range(10):
        race_shim.set_seed(seed)
        with pytest.raises(race_shim.KernelFault, match="race: "):
            race_shim.run_faulty(race)


def test_a_fault_leaves_the_shim_usable(shim: Any) -> None:
    with pytest.raises(shim.KernelFault):
        shim.run_faulty("out of bounds")
    assert shim.run_faulty("none") == 0


def test_device_memory_cannot_be_read_by_the_host(plain_shim: Any) -> None:
    code = (
        "import ctypes, importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('_shim', sys.argv[1])\n"
        "shim = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(shim)\n"
        "address = shim.allocate(4)\n"
        "print('reading', flush=True)\n"
        "ctypes.c_int.from_address(address).value\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, plain_shim.__file__], capture_output=True, text=True, check=False
    )
    assert result.stdout == "reading\n"
    assert result.returncode < 0  # killed by the fault


def test_memory_is_checked(plain_shim: Any) -> None:
    address = plain_shim.allocate(8)
    with pytest.raises(IndexError, match="not 9 bytes"):
        plain_shim.copy_to_host(address, address, 9)
    plain_shim.release(address)
    with pytest.raises(IndexError, match="not the start"):
        plain_shim.release(address)


@pytest.mark.parametrize("mutant", planted.MUTANTS, ids=lambda mutant: mutant.name)
def test_planted_faults_have_their_place(mutant: planted.Mutant) -> None:
    """`make shim-mutants` is not run with the tests; that it can run is checked here."""
    assert (shim_build.GPU / mutant.file).read_text().count(mutant.old) == 1
    file, _, test = mutant.test.partition("::")
    assert f"def {test}(" in (Path(__file__).parent / file).read_text()
