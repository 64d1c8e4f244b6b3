"""The steps around the alignment of LoRA adapters in plain torch; vllm_kernels runs each in one launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import lora

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
    mapping = token_lora_mapping[: topk_ids.shape[0]]
    return lora.virtual_ids(topk_ids, mapping, active, expert_map, num_experts, max_loras)


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
    parts = lora.segments(packed, slots, num_experts, rows.shape[1], blocks.shape[1])
    for target, part in zip((rows, blocks, totals[:slots]), parts, strict=True):
        mask = active if target.dim() == 1 else active[:, None]
        target.copy_(torch.where(mask, part, target))
