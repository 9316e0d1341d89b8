"""Native Sparse Attention (arXiv 2502.11089): exact, fast, drop-in attention for decoder-only Transformers.

Start reading at `nsa.attention`; the specification is `nsa.ops.reference`. Names are imported when first used, so that
`import nsa` needs nothing and `import nsa.geometry` no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nsa.attention import NSAAttention as NSAAttention
    from nsa.cache import NSACache as NSACache
    from nsa.geometry import BlockGeometry as BlockGeometry
    from nsa.ops.api import (
        compressed_attention as compressed_attention,
        mean_pool as mean_pool,
        nsa_attention as nsa_attention,
        nsa_decode as nsa_decode,
        select_blocks as select_blocks,
        selected_attention as selected_attention,
        window_attention as window_attention,
    )
    from nsa.ops.cache_view import PagedView as PagedView
    from nsa.ops.paged import paged_decode as paged_decode

__version__ = "0.1.0"

_MODULES = {
    "BlockGeometry": "nsa.geometry",
    "NSAAttention": "nsa.attention",
    "NSACache": "nsa.cache",
    "nsa_attention": "nsa.ops.api",
    "mean_pool": "nsa.ops.api",
    "compressed_attention": "nsa.ops.api",
    "select_blocks": "nsa.ops.api",
    "selected_attention": "nsa.ops.api",
    "window_attention": "nsa.ops.api",
    "nsa_decode": "nsa.ops.api",
    "PagedView": "nsa.ops.cache_view",
    "paged_decode": "nsa.ops.paged",
}

__all__ = [*_MODULES, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'nsa' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
