"""pagedcore: a KV cache cut into blocks, for any LLM server.

Levels 0 to 3 (blocks, prefixes, sequences, steps) and the exceptions are here at once. What needs tensors or a model
(levels 4 and 5) is imported when it is first asked for, so that ``import pagedcore`` is quick and imports neither
NumPy nor torch.
"""

from __future__ import annotations

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

__all__ = [
    "BlockPool",
    "Commit",
    "Explanation",
    "KVCacheManager",
    "KVGroup",
    "PagedCoreError",
    "PrefixCache",
    "PrefixHit",
    "Scheduler",
    "SchedulerConfig",
    "StepPlan",
    "StepResult",
    "__version__",
    "errors",
]
