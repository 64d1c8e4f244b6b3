"""What `moealign demo` does with a layout besides checking it: time it and compute a layer of experts through it."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..alignment import align
from ..timing import NO_ARGUMENTS, host_in_turns, one_thread

__all__ = ["Spread", "expert_layer", "times_in_turns"]


class Spread(NamedTuple):
    """Microseconds of a call over all turns."""

    min: float
    high: float  # 90 of 100 turns took no longer

    def __str__(self) -> str:
        return f"{self.min:,.0f}..{self.high:,.0f}"


def times_in_turns(
    calls: dict[str, Callable[[], object]], device: torch.device, seconds: float = 0.3
) -> dict[str, Spread]:
    """Time `calls` in turns, in a random order each turn and after one call each to warm up, on one CPU thread."""

    def finished(call: Callable[[], object]) -> Callable[[], None]:
        def timed() -> None:
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return timed

    timed = {name: finished(call) for name, call in calls.items()}
    with one_thread():
        for call in timed.values():
            call()
        times = host_in_turns(
            timed,
            dict.fromkeys(timed, NO_ARGUMENTS),
            min_turns=10,
            max_turns=1000,
            seconds=seconds,
            order=random.Random(0),
        )
    return {name: Spread(min(each), statistics.quantiles(each, n=10)[-1]) for name, each in times.items()}


def expert_layer(
    topk_ids: Tensor, num_experts: int, block_size: int, seed: int = 0, backend: str | None = None
) -> tuple[float, int]:
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

    layout = align(topk_ids, block_size=block_size, num_experts=num_experts, backend=backend)
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
