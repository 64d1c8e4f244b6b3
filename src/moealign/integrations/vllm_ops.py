"""The in-place operators of ``vllm._custom_ops`` on our kernels: into the caller's buffers, no wait for the device.

Parameters are vLLM's, name for name.  Each raises before it writes anything where it cannot take a call.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from ..alignment import align as _fill
from ..alignment import align_batched as _fill_batched
from ..calls.dispatch import backends
from ..errors import BackendUnavailable, InvalidInput, InvalidType
from ..layout import INT32_MAX, BlockLayout, capacity, cdiv

__all__ = ["align", "align_batched", "align_lora", "apart", "globalize_align", "require_kernels"]


@functools.cache
def _without_kernels(device_type: str) -> str | None:
    reasons = backends()
    if device_type == "cpu" or reasons["cuda"] is None or reasons["triton"] is None:
        return None
    return f"no kernels for {device_type}: {reasons['cuda']}; {reasons['triton']}"


def require_kernels(tensor: Tensor) -> None:
    """Refuse a device where our only backend would be plain torch: the engine's own kernels are faster there."""
    reason = _without_kernels(tensor.device.type)
    if reason is not None:
        raise BackendUnavailable(reason)


def apart(
    topk_ids: Tensor, block_size: int, num_experts: int, pad_sorted_ids: bool, scatter_idx: bool
) -> BlockLayout | None:
    """New outputs of ``moealign.align`` with an allocation each, so that all are aligned as the engine's own are.

    Its Triton kernels are compiled for the alignments they see; outputs cut from one allocation would change them from
    one number of tokens to the next.  None where outputs are apart anyway, or where the call is going to be refused.
    """
    plain = type(block_size) is type(num_experts) is int and block_size > 0 and num_experts > 0
    if not plain or topk_ids.device.type == "cpu" or torch.compiler.is_compiling():
        return None
    routes = topk_ids.numel()
    sizes = capacity(routes, block_size=block_size, num_experts=num_experts, pad_sorted_ids=pad_sorted_ids)
    if sizes.sorted_token_ids > INT32_MAX:
        return None
    new = torch.empty(0, dtype=torch.int32, device=topk_ids.device).new_empty
    layout = BlockLayout(new(sizes.sorted_token_ids), new(sizes.expert_ids), new(1))
    if scatter_idx:
        layout.scatter_idx = new((routes, 1))
    return layout


def _buffer(name: str, tensor: Tensor, least: int) -> None:
    if tensor.dtype is not torch.int32 or not tensor.is_contiguous():
        raise InvalidType(f"{name}: expected a contiguous int32 buffer, got {tensor.dtype}, strides {tensor.stride()}")
    if tensor.numel() < least:
        raise InvalidInput(f"{name}: expected room for {least} elements, the worst case, got {tensor.numel()}")


def align(
    topk_ids: Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: Tensor,
    experts_ids: Tensor,
    num_tokens_post_pad: Tensor,
    expert_map: Tensor | None = None,
    scatter_idx: Tensor | None = None,
) -> None:
    """``_custom_ops.moe_align_block_size``: a map chooses the bins; buffers of any length from the worst case on."""
    require_kernels(topk_ids)
    sizes = capacity(topk_ids.numel(), block_size=block_size, num_experts=num_experts)
    rows, blocks = sizes.sorted_token_ids, sizes.expert_ids
    _buffer("sorted_token_ids", sorted_token_ids, rows)
    reach = cdiv(sorted_token_ids.numel(), block_size)
    _buffer("experts_ids", experts_ids, reach)
    out = {
        "sorted_token_ids": sorted_token_ids[:rows],
        "expert_ids": experts_ids[:blocks],
        "num_tokens_post_padded": num_tokens_post_pad,
    }
    if scatter_idx is not None:
        out["scatter_idx"] = scatter_idx
    _fill(
        topk_ids,
        block_size=block_size,
        num_experts=num_experts,
        expert_map=expert_map,
        ignore_invalid_experts=True,
        scatter_idx=scatter_idx is not None,
        out=out,
    )
    if sorted_token_ids.numel() > rows:
        sorted_token_ids[rows:].fill_(topk_ids.numel())
    if reach > blocks:
        experts_ids[blocks:reach].fill_(-1)


def align_batched(
    max_tokens_per_batch: int,
    block_size: int,
    expert_num_tokens: Tensor,
    sorted_ids: Tensor,
    expert_ids: Tensor,
    num_tokens_post_pad: Tensor,
) -> None:
    """``_custom_ops.batched_moe_align_block_size``: buffers of exactly the sizes, as vLLM's own demands."""
    require_kernels(expert_num_tokens)
    _fill_batched(
        expert_num_tokens,
        max_tokens_per_batch=max_tokens_per_batch,
        block_size=block_size,
        out={
            "sorted_token_ids": sorted_ids,
            "expert_ids": expert_ids,
            "num_tokens_post_padded": num_tokens_post_pad,
        },
    )


def globalize_align(
    topk_idx: Tensor,
    psum: Tensor,
    rank_expert_offset: int,
    global_num_experts: int,
    local_num_experts: int,
    block_size: int,
    sorted_ids: Tensor,
    expert_ids: Tensor,
    num_tokens_post_pad: Tensor,
    scatter_idx: Tensor | None = None,
) -> None:
    """``_custom_ops.fused_globalize_align_block_size``: local ids of the first ``psum[-1]`` rows are aligned.

    Then `topk_idx` is made global in place: ``id + rank_expert_offset`` of kept routes, ``-1`` of all others.
    """
    require_kernels(topk_idx)
    if rank_expert_offset + local_num_experts > global_num_experts:
        raise InvalidInput(
            f"local_num_experts: expected at most {global_num_experts - rank_expert_offset} from expert "
            f"{rank_expert_offset} on, got {local_num_experts}"
        )
    if not topk_idx.is_contiguous():
        raise InvalidInput(f"topk_idx: expected a contiguous tensor, got strides {topk_idx.stride()}")
    kept = scatter_idx if scatter_idx is not None else topk_idx.new_empty((topk_idx.numel(), 1), dtype=torch.int32)
    _fill(
        topk_idx,
        block_size=block_size,
        num_experts=local_num_experts,
        num_valid_tokens=psum[-1:],
        scatter_idx=True,
        out={
            "sorted_token_ids": sorted_ids,
            "expert_ids": expert_ids,
            "num_tokens_post_padded": num_tokens_post_pad,
            "scatter_idx": kept,
        },
    )
    if _triton(topk_idx):
        _kernels().globalize(topk_idx, kept, rank_expert_offset)
    else:
        topk_idx.add_(rank_expert_offset).masked_fill_(kept.view_as(topk_idx) < 0, -1)


def align_lora(
    topk_ids: Tensor,
    token_lora_mapping: Tensor,
    num_experts: int,
    block_size: int,
    max_loras: int,
    max_num_tokens_padded: int,
    max_num_m_blocks: int,
    sorted_token_ids: Tensor,
    experts_ids: Tensor,
    num_tokens_post_pad: Tensor,
    adapter_enabled: Tensor,
    lora_ids: Tensor,
    expert_map: Tensor | None = None,
) -> None:
    """``_custom_ops.moe_lora_align_block_size``: a segment per adapter slot, each the layout of that adapter's tokens.

    One alignment over ``max_loras * num_experts`` bins gives every segment its routes, stable, and its offsets; the
    segments are then copied to their slots.  A slot is active if it stands in the first ``max_loras + 1`` of `lora_ids`
    and `adapter_enabled` is not zero there; nothing is written to the others.
    """
    require_kernels(topk_ids)
    routes, bins = topk_ids.numel(), max_loras * num_experts
    if max_loras < 1 or topk_ids.dim() != 2:
        raise InvalidInput(
            f"expected ids [tokens, top_k] and a slot, got {tuple(topk_ids.shape)} and {max_loras} slots"
        )
    if not topk_ids.is_contiguous() or topk_ids.dtype not in (torch.int32, torch.int64):
        raise InvalidType(f"topk_ids: expected contiguous int32 or int64, got {topk_ids.dtype}, {topk_ids.stride()}")
    if expert_map is not None and (expert_map.numel() != num_experts or expert_map.dtype is not torch.int32):
        raise InvalidInput(f"expert_map: expected int32 [{num_experts}], got {expert_map.dtype} {expert_map.shape}")
    rows = capacity(routes, block_size=block_size, num_experts=num_experts).sorted_token_ids
    if max_num_tokens_padded < rows or max_num_m_blocks < cdiv(max_num_tokens_padded, block_size):
        raise InvalidInput(
            f"max_num_tokens_padded, max_num_m_blocks: expected at least {rows} and a block for each {block_size} of "
            f"them, got {max_num_tokens_padded} and {max_num_m_blocks}"
        )
    _buffer("sorted_token_ids", sorted_token_ids, max_loras * max_num_tokens_padded)
    _buffer("experts_ids", experts_ids, max_loras * max_num_m_blocks)
    _buffer("num_tokens_post_pad", num_tokens_post_pad, max_loras)
    for name, tensor, least in (
        ("token_lora_mapping", token_lora_mapping, topk_ids.shape[0]),
        ("adapter_enabled", adapter_enabled, max_loras),
        ("lora_ids", lora_ids, 0),
    ):
        _buffer(name, tensor, least)

    lora_ids = lora_ids[: max_loras + 1]
    step: Any = _kernels() if _triton(topk_ids) else _Plain
    ids = step.virtual_ids(topk_ids, token_lora_mapping, adapter_enabled, lora_ids, expert_map, num_experts, max_loras)
    packed = _fill(ids, block_size=block_size, num_experts=bins, expert_offsets=True)
    step.segments(
        packed,
        sorted_token_ids[: max_loras * max_num_tokens_padded].view(max_loras, max_num_tokens_padded),
        experts_ids[: max_loras * max_num_m_blocks].view(max_loras, max_num_m_blocks),
        num_tokens_post_pad,
        num_experts,
        adapter_enabled,
        lora_ids,
    )


def _triton(tensor: Tensor) -> bool:
    return tensor.device.type != "cpu" and importlib.util.find_spec("triton") is not None


def _kernels() -> Any:
    from . import vllm_kernels

    return vllm_kernels


class _Plain:
    """The two steps around the alignment of adapters in torch, to be read; vllm_kernels has each in one launch."""

    @staticmethod
    def active(adapter_enabled: Tensor, lora_ids: Tensor, max_loras: int) -> Tensor:
        """bool ``[max_loras]``"""
        slots = torch.arange(max_loras, device=lora_ids.device)
        return (slots[:, None] == lora_ids[None, :]).any(1) & (adapter_enabled[:max_loras] != 0)

    @staticmethod
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
        active = _Plain.active(adapter_enabled, lora_ids, max_loras)
        slot = token_lora_mapping[: topk_ids.shape[0], None].long()
        kept = (slot >= 0) & (slot < max_loras) & active[slot.clamp(0, max_loras - 1)]
        kept = kept & (topk_ids >= 0) & (topk_ids < num_experts)
        expert = topk_ids.clamp(0, num_experts - 1).long()
        if expert_map is not None:
            expert = expert_map.long()[expert]
            kept &= (expert >= 0) & (expert < num_experts)
        return torch.where(kept, slot * num_experts + expert, -1).int()

    @staticmethod
    def segments(
        packed: Any,
        rows: Tensor,
        blocks: Tensor,
        totals: Tensor,
        num_experts: int,
        adapter_enabled: Tensor,
        lora_ids: Tensor,
    ) -> None:
        """Copy each active slot's part of `packed` to its row of `rows` and `blocks`, the tails with n and -1."""
        slots = rows.shape[0]
        active = _Plain.active(adapter_enabled, lora_ids, slots)
        edges = packed.expert_offsets[::num_experts].long()  # [slots + 1]
        first, size = edges[:-1, None], (edges[1:] - edges[:-1])[:, None]
        totals[:slots] = torch.where(active, size[:, 0].int(), totals[:slots])
        for target, source, unit, empty in (
            (rows, packed.sorted_token_ids, 1, packed.num_routes),
            (blocks, packed.expert_ids, packed.block_size, -1),
        ):
            at = torch.arange(target.shape[1], device=target.device)[None, :]
            taken = torch.full_like(target, empty)
            if source.numel():
                taken = source[(first // unit + at).clamp(max=source.numel() - 1)]
            if target is blocks:
                taken = taken - torch.arange(slots, device=target.device)[:, None] * num_experts
            target.copy_(torch.where(active[:, None], torch.where(at < size // unit, taken, empty), target))
