"""That the tests which run on a GPU ask it for no more than there is: without a GPU nothing else would tell."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from cuda_gpu import OF_THE_SHIM, CudaGpu

FILES = sorted(path for path in Path(__file__).parent.glob("test_shim*.py") if path.stem not in OF_THE_SHIM)
SHIM_ONLY = "shim_only"


def needs_the_shim(function: ast.FunctionDef) -> list[str]:
    """What a function uses that a GPU has not: of the shim's module, which `Attention` and `ShimGpu.shim` are about."""
    found = []
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            lacks = node.value.id in ("shim", "plain_shim") and not hasattr(CudaGpu, node.attr)
            if lacks or (node.value.id in ("gpu", "any_gpu") and node.attr == "shim"):
                found.append(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Attention":
            found.append("Attention")
    return found


def functions_of(path: Path) -> tuple[bool, dict[str, ast.FunctionDef]]:
    """Whether the whole file is for the shim alone, and its functions."""
    body = ast.parse(path.read_text()).body
    marks = [ast.unparse(node) for node in body if isinstance(node, ast.Assign)]
    whole = any(mark.startswith("pytestmark") and SHIM_ONLY in mark for mark in marks)
    return whole, {node.name: node for node in body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_needs_the_shim_is_marked(path: Path) -> None:
    """In tests, and in the functions of their file that they call."""
    whole, functions = functions_of(path)
    if whole:
        return
    for name, function in functions.items():
        if not name.startswith("test") or any(SHIM_ONLY in ast.unparse(mark) for mark in function.decorator_list):
            continue
        called = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)} & functions.keys()
        for used in (name, *called):
            if used != "make_gpu":  # which looks what it is given
                assert not needs_the_shim(functions[used]), f"{name} runs on a GPU, by {used}"
