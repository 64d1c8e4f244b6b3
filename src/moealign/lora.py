"""The layout of LoRA adapters: a segment per adapter, each the layout of the tokens that take it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import modes
from .alignment import align
from .calls.checks import check_plain
from .errors import InvalidInput, InvalidType
from .layout import INT32_MAX, BlockLayout, capacity

__all__ = ["LoraLayout", "adapters_of_requests", "align_lora"]


class LoraLayout(NamedTuple):
    """What :func:`align_lora` returns; tensors are int32.  Row ``s`` of each is the layout of adapter slot ``s``."""

    sorted_token_ids: Tensor  #: ``[S, L]``
    expert_ids: Tensor  #: ``[S, cdiv(L, B)]``
    num_tokens_post_padded: Tensor  #: ``[S]``
    block_size: int
    num_experts: int
    num_routes: int

    def adapter(self, slot: int) -> BlockLayout:
        """The layout of one adapter, such as :func:`moealign.grouped_gemm` takes with that adapter's weights."""
        return BlockLayout(
            self.sorted_token_ids[slot],
            self.expert_ids[slot],
            self.num_tokens_post_padded[slot : slot + 1],
            block_size=self.block_size,
            num_experts=self.num_experts,
            num_routes=self.num_routes,
        )


def align_lora(
    topk_ids: Tensor,
    token_lora_mapping: Tensor,
    *,
    max_loras: int,
    block_size: int,
    num_experts: int,
    adapter_enabled: Tensor | None = None,
    expert_map: Tensor | None = None,
    backend: str | None = None,
) -> LoraLayout:
    """For each adapter slot ``s``, the layout of the tokens with ``token_lora_mapping[t] == s``.

    Segment ``s`` is what :func:`moealign.align` returns for the ids of those tokens, with -1 for all others.  One
    alignment over ``max_loras * num_experts`` bins computes all segments.

    Args:
        topk_ids: ``[T, k]``, any integer dtype; ids outside ``[0, num_experts)`` are dropped.
        token_lora_mapping: ``[T]``, integer: the slot of each token, anything outside ``[0, max_loras)`` for none.
        max_loras: slots ``S``.
        block_size, num_experts, backend: as in :func:`moealign.align`.
        adapter_enabled: ``[S]``, bool or integer; tokens of a slot with 0 are dropped.
        expert_map: ``[num_experts]``, the local expert of each, -1 for another rank's, whose routes are dropped.

    Returns:
        Segments of ``L = capacity(T * k, ...)`` rows.  Every element is written; the host never waits.

    Raises:
        InvalidInput, InvalidType, BackendUnavailable: as :func:`moealign.align`.
    """
    refusal = modes.checked(_check, topk_ids, token_lora_mapping, max_loras, num_experts, adapter_enabled, expert_map)
    if isinstance(refusal, modes.Refusal):
        rows, blocks, totals = modes.refuse(refusal, 3)
        return LoraLayout(rows, blocks, totals, block_size, num_experts, 0)
    active = None if adapter_enabled is None else adapter_enabled != 0
    ids = virtual_ids(topk_ids, token_lora_mapping, active, expert_map, num_experts, max_loras)
    packed = align(
        ids, block_size=block_size, num_experts=max_loras * num_experts, expert_offsets=True, backend=backend
    )
    sizes = capacity(topk_ids.numel(), block_size=block_size, num_experts=num_experts)
    rows, blocks, totals = segments(packed, max_loras, num_experts, sizes.sorted_token_ids, sizes.expert_ids)
    return LoraLayout(rows, blocks, totals, block_size, num_experts, topk_ids.numel())


def adapters_of_requests(seg_indptr: Tensor, req_to_lora: Tensor, num_tokens: int) -> Tensor:
    """The `token_lora_mapping` of :func:`align_lora` from segments of tokens, a request each, as SGLang has them.

    Args:
        seg_indptr: ``[R + 1]``, integer, ascending: tokens ``seg_indptr[r] .. seg_indptr[r + 1] - 1`` are of request r.
        req_to_lora: ``[R]``, integer: the slot of each request.
        num_tokens: tokens ``T`` of the batch.

    Returns:
        int32 ``[T]``, -1 for tokens of no request.  The host never waits.

    Raises:
        InvalidInput, InvalidType: shapes, dtypes or devices do not match.
    """
    refusal = modes.checked(_check_requests, seg_indptr, req_to_lora, num_tokens)
    if isinstance(refusal, modes.Refusal):
        return modes.refuse(refusal)[0]
    tokens = torch.arange(num_tokens, device=seg_indptr.device)
    ends = seg_indptr.to(torch.int64)
    request = torch.searchsorted(ends, tokens, right=True) - 1  # that of the last segment that begins at or before it
    slots = torch.cat([req_to_lora.to(torch.int32), req_to_lora.new_full((1,), -1, dtype=torch.int32)])
    none = slots.shape[0] - 1
    return slots[torch.where((request >= 0) & (request < none), request, none)]


def _check_integers(name: str, tensor: object, booleans: bool = False) -> None:
    check_plain(name, tensor)
    assert isinstance(tensor, Tensor)
    if tensor.is_floating_point() or tensor.is_complex() or (tensor.dtype is torch.bool and not booleans):
        raise InvalidType(f"{name}: expected an integer dtype, got {tensor.dtype}")


def _check_requests(seg_indptr: object, req_to_lora: object, num_tokens: object) -> None:
    for name, tensor in (("seg_indptr", seg_indptr), ("req_to_lora", req_to_lora)):
        _check_integers(name, tensor)
    assert isinstance(seg_indptr, Tensor)
    assert isinstance(req_to_lora, Tensor)
    if seg_indptr.device != req_to_lora.device:
        raise InvalidInput(f"req_to_lora: expected a tensor on {seg_indptr.device}, got {req_to_lora.device}")
    if req_to_lora.dim() != 1 or list(seg_indptr.shape) != [req_to_lora.shape[0] + 1]:
        raise InvalidInput(
            f"seg_indptr, req_to_lora: expected [R + 1] and [R], got {list(seg_indptr.shape)} and "
            f"{list(req_to_lora.shape)}"
        )
    if not isinstance(num_tokens, (int, torch.SymInt)) or isinstance(num_tokens, bool) or num_tokens < 0:
        raise InvalidInput(f"num_tokens: expected an int of at least 0, got {num_tokens!r}")


def _check(
    topk_ids: object,
    token_lora_mapping: object,
    max_loras: object,
    num_experts: object,
    adapter_enabled: object,
    expert_map: object,
) -> None:
    for name, tensor, booleans in (
        ("topk_ids", topk_ids, False),
        ("token_lora_mapping", token_lora_mapping, False),
        ("adapter_enabled", adapter_enabled, True),
        ("expert_map", expert_map, False),
    ):
        if tensor is None and name in ("adapter_enabled", "expert_map"):
            continue
        _check_integers(name, tensor, booleans)
        assert isinstance(tensor, Tensor)
        assert isinstance(topk_ids, Tensor)
        if tensor.device != topk_ids.device:
            raise InvalidInput(f"{name}: expected a tensor on {topk_ids.device} like topk_ids, got {tensor.device}")
    assert isinstance(topk_ids, Tensor)
    assert isinstance(token_lora_mapping, Tensor)
    for name, value in (("max_loras", max_loras), ("num_experts", num_experts)):
        if type(value) is not int or value < 1:
            raise InvalidInput(f"{name}: expected an int of at least 1, got {value!r}")
    assert isinstance(max_loras, int)
    assert isinstance(num_experts, int)
    if max_loras * num_experts > INT32_MAX:
        raise InvalidInput(f"max_loras: expected at most {INT32_MAX // num_experts} slots, got {max_loras}")
    if topk_ids.dim() != 2:
        raise InvalidInput(f"topk_ids: expected [tokens, top_k], got {list(topk_ids.shape)}")
    for name, tensor, size in (
        ("token_lora_mapping", token_lora_mapping, topk_ids.shape[0]),
        ("adapter_enabled", adapter_enabled, max_loras),
        ("expert_map", expert_map, num_experts),
    ):
        if isinstance(tensor, Tensor) and list(tensor.shape) != [size]:
            raise InvalidInput(f"{name}: expected [{size}], got {list(tensor.shape)}")


def virtual_ids(
    topk_ids: Tensor,
    token_lora_mapping: Tensor,
    active: Tensor | None,
    expert_map: Tensor | None,
    num_experts: int,
    max_loras: int,
) -> Tensor:
    """int32 ``[T, k]``: ``slot * num_experts + expert``, -1 for a route that no slot takes that is `active`."""
    slot = token_lora_mapping.to(torch.int64).unsqueeze(1)
    kept = (slot >= 0) & (slot < max_loras)
    slot = torch.where(kept, slot, 0)
    if active is not None:
        kept = kept & active[slot]
    ids = topk_ids.to(torch.int64)
    kept = kept & (ids >= 0) & (ids < num_experts)
    expert = torch.where(kept, ids, 0)
    if expert_map is not None:
        expert = expert_map.to(torch.int64)[expert]
        kept = kept & (expert >= 0) & (expert < num_experts)
    return torch.where(kept, slot * num_experts + expert, -1).to(torch.int32)


def segments(
    packed: BlockLayout, slots: int, num_experts: int, rows: int, blocks: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The parts of a layout over ``slots * num_experts`` bins: ``[slots, rows]`` routes, n in the tail; ``[slots,
    blocks]`` experts, -1 in the tail; ``[slots]`` rows of each."""
    assert packed.expert_offsets is not None
    edges = packed.expert_offsets[::num_experts].to(torch.int64)  # [slots + 1]
    first, size = edges[:-1].unsqueeze(1), (edges[1:] - edges[:-1]).unsqueeze(1)

    def part(source: Tensor, unit: int, length: int, empty: int) -> Tensor:
        column = torch.arange(length, device=source.device)
        if not source.shape[0]:
            return torch.full((slots, length), empty, dtype=torch.int32, device=source.device)
        copied = source[(first // unit + column).clamp(max=source.shape[0] - 1)]
        return torch.where(column < size // unit, copied, empty)

    experts = part(packed.expert_ids, packed.block_size, blocks, -1)
    offsets = torch.arange(slots, device=experts.device, dtype=torch.int32).unsqueeze(1) * num_experts
    experts = torch.where(experts < 0, -1, experts - offsets)
    return part(packed.sorted_token_ids, 1, rows, packed.num_routes), experts, size.squeeze(1).to(torch.int32)
