"""Block-aligned layouts for Mixture-of-Experts kernels, on CPU and GPU; see docs/contract.md for every value."""

from .align import (
    align,
    align_batched,
    batched_moe_align_block_size,
    explain,
    moe_align_block_size,
    new_error_word,
    raise_for_errors,
)
from .capture import capture
from .dispatch import Explanation, backends
from .errors import BackendUnavailable, InvalidInput, InvalidType, MoealignError, RankFailed, TraceError
from .fused_moe import fused_moe
from .grouped_gemm import grouped_gemm
from .layout import BlockLayout, Capacity, capacity, capacity_batched
from .routing import route

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "BlockLayout",
    "Capacity",
    "Explanation",
    "InvalidInput",
    "InvalidType",
    "MoealignError",
    "RankFailed",
    "TraceError",
    "__version__",
    "align",
    "align_batched",
    "backends",
    "batched_moe_align_block_size",
    "capacity",
    "capacity_batched",
    "capture",
    "explain",
    "fused_moe",
    "grouped_gemm",
    "moe_align_block_size",
    "new_error_word",
    "raise_for_errors",
    "route",
]
