"""The in-place operators of ``vllm._custom_ops`` on our kernels: they fill the caller's buffers and never wait.

Parameters are vLLM's, name for name.  An operator that refuses a call raises before it writes anything.
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
from . import vllm_reference

__all__ = [
    "align",
    "align_batched",
    "align_lora",
    "globalize_align",
    "require_kernels",
    "separate_outputs",
    "uses_triton",
]


@functools.cache
def _without_kernels(device_type: str) -> str | None:
    reasons = backends()
    if device_type == "cpu" or reasons["cuda"] is None or reasons["triton"] is None:
        return None
    return f"no kernels for {device_type}: {reasons['cuda']}; {reasons['triton']}"


def require_kernels(tensor: Tensor) -> None:
    """Refuse a device on which only the plain-torch backend is available: the engine's own kernels are faster.

    Raises:
        BackendUnavailable: with the reasons of the GPU backends.
    """
    reason = _without_kernels(tensor.device.type)
    if reason is not None:
        raise BackendUnavailable(reason)


def separate_outputs(
    topk_ids: Tensor, block_size: int, num_experts: int, pad_sorted_ids: bool, scatter_idx: bool
) -> BlockLayout | None:
    """Outputs for ``moealign.align`` in separate allocations, as aligned in memory as the engine's own.

    The engine's Triton kernels are specialised on the alignment of their arguments, which would vary with the number of
    tokens if outputs shared one allocation.  None if outputs are separate anyway, or if `align` will refuse the call.
    """
    valid = type(block_size) is type(num_experts) is int and block_size > 0 and num_experts > 0
    if not valid or topk_ids.device.type == "cpu" or torch.compiler.is_compiling():
        return None
    routes = topk_ids.numel()
    sizes = capacity(routes, block_size=block_size, num_experts=num_experts, pad_sorted_ids=pad_sorted_ids)
    if sizes.sorted_token_ids > INT32_MAX:
        return None
    new = torch.empty(0, dtype=torch.int32, device=topk_ids.device).new_empty
    index = new((routes, 1)) if scatter_idx else None
    return BlockLayout(new(sizes.sorted_token_ids), new(sizes.expert_ids), new(1), scatter_idx=index)


def _check_buffer(name: str, tensor: Tensor, size: int) -> None:
    if tensor.dtype is not torch.int32 or not tensor.is_contiguous():
        raise InvalidType(f"{name}: expected a contiguous int32 buffer, got {tensor.dtype}, strides {tensor.stride()}")
    if tensor.numel() < size:
        raise InvalidInput(f"{name}: expected room for {size} elements, the worst case, got {tensor.numel()}")


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
    """``_custom_ops.moe_align_block_size``: bins by `expert_map`; buffers may be longer than the worst case."""
    require_kernels(topk_ids)
    sizes = capacity(topk_ids.numel(), block_size=block_size, num_experts=num_experts)
    rows, blocks = sizes.sorted_token_ids, sizes.expert_ids
    _check_buffer("sorted_token_ids", sorted_token_ids, rows)
    all_blocks = cdiv(sorted_token_ids.numel(), block_size)
    _check_buffer("experts_ids", experts_ids, all_blocks)
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
    if all_blocks > blocks:
        experts_ids[blocks:all_blocks].fill_(-1)


def align_batched(
    max_tokens_per_batch: int,
    block_size: int,
    expert_num_tokens: Tensor,
    sorted_ids: Tensor,
    expert_ids: Tensor,
    num_tokens_post_pad: Tensor,
) -> None:
    """``_custom_ops.batched_moe_align_block_size``: buffers of exactly the right sizes, as in vLLM."""
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
    """``_custom_ops.fused_globalize_align_block_size``: align the local ids of the first ``psum[-1]`` rows.

    Then make `topk_idx` global in place: ``id + rank_expert_offset`` for kept routes, ``-1`` for all others.
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
    if uses_triton(topk_idx):
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
    """``_custom_ops.moe_lora_align_block_size``: one segment for each adapter slot, the layout of its tokens.

    One stable alignment over ``max_loras * num_experts`` bins computes all segments, which are then copied to their
    slots.  A slot is active if it is among the first ``max_loras + 1`` of `lora_ids` and its `adapter_enabled` is not
    zero; inactive slots are not written.
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
    _check_buffer("sorted_token_ids", sorted_token_ids, max_loras * max_num_tokens_padded)
    _check_buffer("experts_ids", experts_ids, max_loras * max_num_m_blocks)
    _check_buffer("num_tokens_post_pad", num_tokens_post_pad, max_loras)
    for name, tensor, size in (
        ("token_lora_mapping", token_lora_mapping, topk_ids.shape[0]),
        ("adapter_enabled", adapter_enabled, max_loras),
        ("lora_ids", lora_ids, 0),
    ):
        _check_buffer(name, tensor, size)

    lora_ids = lora_ids[: max_loras + 1]
    steps: Any = _kernels() if uses_triton(topk_ids) else vllm_reference
    ids = steps.virtual_ids(topk_ids, token_lora_mapping, adapter_enabled, lora_ids, expert_map, num_experts, max_loras)
    packed = _fill(ids, block_size=block_size, num_experts=bins, expert_offsets=True)
    steps.segments(
        packed,
        sorted_token_ids[: max_loras * max_num_tokens_padded].view(max_loras, max_num_tokens_padded),
        experts_ids[: max_loras * max_num_m_blocks].view(max_loras, max_num_m_blocks),
        num_tokens_post_pad,
        num_experts,
        adapter_enabled,
        lora_ids,
    )


def uses_triton(tensor: Tensor) -> bool:
    """Whether steps around the alignment of `tensor` are Triton launches, not torch's operations."""
    return tensor.device.type != "cpu" and importlib.util.find_spec("triton") is not None


def _kernels() -> Any:
    from . import vllm_kernels

    return vllm_kernels
