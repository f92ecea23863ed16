"""pagedcore: a KV cache cut into blocks, for any LLM server.

Levels 0 to 3 (blocks, prefixes, sequences, steps) and the exceptions are here at once. What needs tensors or a model
(levels 4 and 5) is imported when it is first asked for, so that ``import pagedcore`` is quick and imports neither
NumPy nor torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pagedcore import errors
from pagedcore._core import (
    BlockPool,
    Commit,
    Explanation,
    KVCacheManager,
    KVGroup,
    PrefixCache,
    PrefixHit,
    Scheduler,
    SchedulerConfig,
    StepPlan,
    StepResult,
    __version__,
)
from pagedcore.errors import PagedCoreError

if TYPE_CHECKING:
    from pagedcore import layout, ops
    from pagedcore.async_engine import AsyncEngine
    from pagedcore.engine import Engine
    from pagedcore.layout import KVCacheLayout
    from pagedcore.llm import LLM
    from pagedcore.outputs import CompletionOutput, RequestOutput
    from pagedcore.params import SamplingParams

__all__ = [
    "LLM",
    "AsyncEngine",
    "BlockPool",
    "Commit",
    "CompletionOutput",
    "Engine",
    "Explanation",
    "KVCacheLayout",
    "KVCacheManager",
    "KVGroup",
    "PagedCoreError",
    "PrefixCache",
    "PrefixHit",
    "RequestOutput",
    "SamplingParams",
    "Scheduler",
    "SchedulerConfig",
    "StepPlan",
    "StepResult",
    "__version__",
    "errors",
    "layout",
    "ops",
]

# Where the names of levels 4 and 5 come from; a module stands for itself.
_LAZY = {
    "AsyncEngine": "pagedcore.async_engine",
    "CompletionOutput": "pagedcore.outputs",
    "Engine": "pagedcore.engine",
    "KVCacheLayout": "pagedcore.layout",
    "LLM": "pagedcore.llm",
    "RequestOutput": "pagedcore.outputs",
    "SamplingParams": "pagedcore.params",
    "layout": "pagedcore.layout",
    "ops": "pagedcore.ops",
}


def __getattr__(name: str) -> Any:
    """Imports a name of level 4 or 5 when it is first asked for."""
    try:
        module_name = _LAZY[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "pagedcore":
            raise
        message = f"pagedcore.{name} needs {error.name}, which is not installed: pip install 'pagedcore[engine]'"
        raise ModuleNotFoundError(message, name=error.name) from error
    value = module if module_name.endswith(f".{name}") else getattr(module, name)
    globals()[name] = value  # from now on found without this function
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
