"""The steps around the alignment of LoRA adapters in plain torch; vllm_kernels runs each in one launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["segments", "virtual_ids"]


def _active(adapter_enabled: Tensor, lora_ids: Tensor, max_loras: int) -> Tensor:
    """bool ``[max_loras]``: slots that `lora_ids` names and that are enabled."""
    slots = torch.arange(max_loras, device=lora_ids.device)
    return (slots[:, None] == lora_ids[None, :]).any(1) & (adapter_enabled[:max_loras] != 0)


def virtual_ids(
    topk_ids: Tensor,
    token_lora_mapping: Tensor,
    adapter_enabled: Tensor,
    lora_ids: Tensor,
    expert_map: Tensor | None,
    num_experts: int,
    max_loras: int,
) -> Tensor:
    """int32 ``[tokens, top_k]``: ``slot * num_experts + expert``, -1 for a route that no active slot takes."""
    active = _active(adapter_enabled, lora_ids, max_loras)
    slot = token_lora_mapping[: topk_ids.shape[0], None].long()
    kept = (slot >= 0) & (slot < max_loras) & active[slot.clamp(0, max_loras - 1)]
    kept = kept & (topk_ids >= 0) & (topk_ids < num_experts)
    expert = topk_ids.clamp(0, num_experts - 1).long()
    if expert_map is not None:
        expert = expert_map.long()[expert]
        kept &= (expert >= 0) & (expert < num_experts)
    return torch.where(kept, slot * num_experts + expert, -1).int()


def segments(
    packed: Any,
    rows: Tensor,
    blocks: Tensor,
    totals: Tensor,
    num_experts: int,
    adapter_enabled: Tensor,
    lora_ids: Tensor,
) -> None:
    """Copy the part of each active slot from `packed` to its row of `rows` and `blocks`; tails are n and -1.

    `packed` is a layout over ``slots * num_experts`` bins; `totals` receives the number of rows of each slot.
    """
    slots = rows.shape[0]
    active = _active(adapter_enabled, lora_ids, slots)
    edges = packed.expert_offsets[::num_experts].long()  # [slots + 1]
    first, size = edges[:-1, None], (edges[1:] - edges[:-1])[:, None]
    totals[:slots] = torch.where(active, size[:, 0].int(), totals[:slots])
    for target, source, unit, empty in (
        (rows, packed.sorted_token_ids, 1, packed.num_routes),
        (blocks, packed.expert_ids, packed.block_size, -1),
    ):
        column = torch.arange(target.shape[1], device=target.device)[None, :]
        copied = torch.full_like(target, empty)
        if source.numel():
            copied = source[(first // unit + column).clamp(max=source.numel() - 1)]
        if target is blocks:
            copied = copied - torch.arange(slots, device=target.device)[:, None] * num_experts
        target.copy_(torch.where(active[:, None], torch.where(column < size // unit, copied, empty), target))
