"""What the sdist and the wheel are called, and what is in them."""

from __future__ import annotations

import base64
import hashlib
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VERSION = tomllib.loads((ROOT / "Cargo.toml").read_text())["package"]["version"]
PYTHON_TAG = f"cp{sys.version_info.major}{sys.version_info.minor}"


@pytest.fixture(scope="session")
def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


@pytest.fixture(scope="session")
def metadata(contents):
    return Parser().parsestr(contents[f"pagedcore-{VERSION}.dist-info/METADATA"].decode())


def test_sdist_holds_what_a_build_needs_and_nothing_compiled(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for needed in (
        "Cargo.toml",
        "Cargo.lock",
        "CMakeLists.txt",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "python/_build/pagedcore_build.py",
        "python/pagedcore/__init__.py",
        "python/pagedcore/py.typed",
        "rust/src/lib.rs",
    ):
        assert needed in names
    tracked_cpp = {str(path.relative_to(ROOT)) for path in (ROOT / "cuda").rglob("*") if path.is_file()}
    assert tracked_cpp <= names
    assert not [
        name for name in names if name.endswith((".so", ".pyc", ".o")) or name.startswith(("target/", "build/"))
    ]


def test_wheel_is_tagged_for_the_python_that_built_it(wheel, contents):
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"pagedcore-{VERSION}-{PYTHON_TAG}-{PYTHON_TAG}-{platform}.whl"
    tags = Parser().parsestr(contents[f"pagedcore-{VERSION}.dist-info/WHEEL"].decode())
    assert tags.get_all("Tag") == [f"{PYTHON_TAG}-{PYTHON_TAG}-{platform}"]
    assert tags["Root-Is-Purelib"] == "false"


def test_wheel_holds_both_extensions_once(contents):
    modules = sorted(name for name in contents if name.endswith(".so"))
    assert modules == ["pagedcore/_core.abi3.so", f"pagedcore/_kernels{sysconfig.get_config_var('EXT_SUFFIX')}"]


def test_wheel_holds_the_package_and_only_the_package(contents):
    tops = {name.split("/", 1)[0] for name in contents}
    assert tops == {"pagedcore", f"pagedcore-{VERSION}.dist-info"}
    sources = {
        str(path.relative_to(ROOT / "python"))
        for pattern in ("*.py", "*.pyi", "py.typed")
        for path in (ROOT / "python" / "pagedcore").rglob(pattern)
    }
    assert sources <= set(contents)
    assert not [name for name in contents if "__pycache__" in name]


def test_wheel_record_is_right_after_retagging(contents):
    lines = contents[f"pagedcore-{VERSION}.dist-info/RECORD"].decode().splitlines()
    record = {name: digest for name, digest, _size in (line.rsplit(",", 2) for line in lines)}
    assert record.keys() == contents.keys()
    for name, digest in record.items():
        if digest:
            algorithm, value = digest.split("=", 1)
            actual = base64.urlsafe_b64encode(hashlib.new(algorithm, contents[name]).digest())
            assert actual.decode().rstrip("=") == value, name


def test_metadata(metadata, contents):
    assert metadata["Name"] == "pagedcore"
    assert metadata["Version"] == VERSION
    assert metadata["License-Expression"] == "Apache-2.0"
    assert f"pagedcore-{VERSION}.dist-info/licenses/LICENSE" in contents
    assert b"pagedcore=pagedcore.cli:main" in contents[f"pagedcore-{VERSION}.dist-info/entry_points.txt"]


def test_base_dependency_is_numpy_alone(metadata):
    requirements = metadata.get_all("Requires-Dist")
    assert [line.split(">")[0] for line in requirements if "extra ==" not in line] == ["numpy"]
    assert set(metadata.get_all("Provides-Extra")) == {"torch", "engine", "cupy", "dev"}


def test_extensions_link_no_tensor_library(contents):
    """One wheel serves many torch versions: torch's and CUDA's libraries appear in no extension as a dependency."""
    for name, data in contents.items():
        if name.endswith(".so"):
            for library in (b"libtorch", b"libc10", b"libcudart", b"libpython"):
                assert library + b".so" not in data, f"{name} mentions {library.decode()}"
