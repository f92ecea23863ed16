"""The shim's builds as fixtures.

A run can be confined to one build: PAGEDCORE_TEST_SHIM names it (plain, races or address). test_shim_address.py starts
such a run in a process that has the sanitizer, and mutants.py starts them on builds with a fault, which
PAGEDCORE_TEST_SHIM_LIBRARY names. The name cuda runs tests of the plain build on a GPU instead.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gpus
import pytest
import shim_build
from cuda_gpu import OF_THE_SHIM, CudaGpu

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpus import ShimGpu

ONLY = os.environ.get("PAGEDCORE_TEST_SHIM")
LIBRARY = os.environ.get("PAGEDCORE_TEST_SHIM_LIBRARY")


def build(check: str) -> Path:
    if LIBRARY:
        return Path(LIBRARY)
    try:
        return shim_build.build(check)
    except shim_build.BuildError as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture(scope="session")
def plain_shim() -> Any:
    if ONLY == "cuda":
        return CudaGpu()
    return shim_build.load(build("none"))


@pytest.fixture(scope="session")
def race_shim() -> Any:
    return shim_build.load(build("races"))


@pytest.fixture(scope="session")
def address_library() -> Path:
    """Not loaded: that takes a process that has the sanitizer from its start."""
    return build("address")


@pytest.fixture(scope="session")
def address_shim(address_library: Path) -> Any:
    return shim_build.load(address_library)


FIXTURES = {"plain": "plain_shim", "races": "race_shim", "address": "address_shim"}


@pytest.fixture(params=[ONLY.replace("cuda", "plain")] if ONLY else ["plain", "races"])
def shim(request: pytest.FixtureRequest) -> Any:
    """The shim's module, in each of its builds."""
    return request.getfixturevalue(FIXTURES[request.param])


@pytest.fixture
def gpu(plain_shim: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[ShimGpu]:
    """What `pagedcore.ops` takes for a GPU."""
    from gpu_calls import make_gpu  # a run of the shim alone needs no package

    yield from make_gpu(plain_shim, gpus.WAYS[0], monkeypatch)


@pytest.fixture(params=gpus.WAYS)
def any_gpu(plain_shim: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[ShimGpu]:
    """The same with tensors of each way in which they come."""
    from gpu_calls import make_gpu

    yield from make_gpu(plain_shim, request.param, monkeypatch)


def runs(item: pytest.Item) -> bool:
    """Whether a test belongs to this run: its build is wanted, and has its head size."""
    fixtures = getattr(item, "fixturenames", ())
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    built = (
        parameters["shim"] if "shim" in parameters else next((b for b, f in FIXTURES.items() if f in fixtures), None)
    )
    wanted = "plain" if ONLY == "cuda" else ONLY
    # The sanitizer ends a process that it was not in from the start.
    if built != wanted if wanted else built == "address":
        return False
    if ONLY == "cuda" and (item.path.stem in OF_THE_SHIM or item.get_closest_marker("shim_only")):
        return False
    if ONLY == "cuda" and parameters.get("any_gpu", gpus.WAYS[0]) != gpus.WAYS[0]:
        return False  # a GPU's tensors come in one way
    tiled = parameters.get("head_dim") in shim_build.TILED_HEAD_DIMS
    return built not in ("races", "address") or not tiled or parameters["head_dim"] in shim_build.CHECKED_HEAD_DIMS


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    left_out = [item for item in items if here in item.path.parents and not runs(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
