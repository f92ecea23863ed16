"""pagedcore: a KV cache cut into blocks, for any LLM server."""

from __future__ import annotations

__version__ = "0.1.0"
