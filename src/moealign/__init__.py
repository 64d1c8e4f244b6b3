"""Block-aligned layouts for Mixture-of-Experts kernels, on CPU and GPU; see docs/contract.md for every value."""

from . import startup  # noqa: F401  (first: before torch is imported)
from .alignment import (
    align,
    align_batched,
    batched_moe_align_block_size,
    explain,
    moe_align_block_size,
    new_error_word,
    raise_for_errors,
)
from .calls.dispatch import Explanation, backends
from .errors import BackendUnavailable, InvalidInput, InvalidType, MoealignError, RankFailed, TraceError
from .experts.activations import Gate
from .experts.gemm import grouped_gemm
from .experts.layer import fused_moe
from .experts.quantized import QuantizedWeights
from .layout import BlockLayout, Capacity, capacity, capacity_batched
from .lora import LoraLayout, align_lora
from .recorder import capture
from .routing import route

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "BlockLayout",
    "Capacity",
    "Explanation",
    "Gate",
    "InvalidInput",
    "InvalidType",
    "LoraLayout",
    "MoealignError",
    "QuantizedWeights",
    "RankFailed",
    "TraceError",
    "__version__",
    "align",
    "align_batched",
    "align_lora",
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
