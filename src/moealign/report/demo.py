"""What `moealign demo` does with a layout besides checking it: time it and compute a layer of experts through it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..alignment import align

__all__ = ["expert_layer", "median_time"]


def median_time(function: Callable[[], object], device: torch.device, seconds: float = 0.2) -> float:
    """Median time of a call in microseconds, over at least five calls and at most `seconds`; one call to warm up."""

    def once() -> float:
        start = time.perf_counter_ns()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter_ns() - start) / 1000

    once()
    times = [once() for _ in range(5)]
    while sum(times) < seconds * 1e6 and len(times) < 1000:
        times.append(once())
    return statistics.median(times)


def expert_layer(topk_ids: Tensor, num_experts: int, block_size: int, seed: int = 0) -> tuple[float, int]:
    """Compute one layer of experts twice: block by block through the layout, and densely.

    Random float64 weights and hidden states, width 16.  Returns the largest difference of the two results, and the
    number of blocks.
    """
    width = 16
    draw = torch.Generator().manual_seed(seed)
    tokens, top_k = topk_ids.shape
    hidden = torch.randn(tokens, width, generator=draw, dtype=torch.float64)
    experts = torch.randn(num_experts, width, width, generator=draw, dtype=torch.float64)
    weights = torch.rand(tokens, top_k, generator=draw, dtype=torch.float64)

    layout = align(topk_ids, block_size=block_size, num_experts=num_experts)
    out = torch.zeros(tokens * top_k, width, dtype=torch.float64)
    blocks = int(layout.num_tokens_post_padded) // block_size
    for block, expert in enumerate(layout.expert_ids[:blocks].tolist()):
        rows = layout.sorted_token_ids[block * block_size : (block + 1) * block_size].long()
        rows = rows[rows < layout.num_routes]
        out[rows] = hidden[rows // top_k] @ experts[expert]
    through_blocks = (out.view(tokens, top_k, width) * weights.unsqueeze(-1)).sum(1)

    # Densely: every expert on every token, times the sum of the token's weights for that expert.
    gates = torch.zeros(tokens, num_experts, dtype=torch.float64).scatter_add_(1, topk_ids.long(), weights)
    dense = torch.zeros_like(hidden)
    for expert in range(num_experts):
        dense += gates[:, expert, None] * (hidden @ experts[expert])
    return float((through_blocks - dense).abs().max()), blocks
