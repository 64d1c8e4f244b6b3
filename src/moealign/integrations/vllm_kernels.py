# mypy: disable-error-code="no-untyped-def"
"""The steps around the alignment in vLLM's operators, one Triton launch each.  Only a first call imports it."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["globalize", "segments", "virtual_ids"]

_ROUTES = 256
_ROWS = 1024
_SLOTS = 32  # entries of lora_ids that are compared per step


# Sizes change from call to call, and addresses with them: neither may recompile a kernel.
@triton.jit(
    do_not_specialize=["routes"],
    do_not_specialize_on_alignment=["ids", "mapping", "enabled", "active", "expert_map", "out"],
)
def _virtual_ids(
    ids, mapping, enabled, active, expert_map, out, routes, top_k, num_experts, max_loras, num_active,
    MAP: tl.constexpr, ROUTES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The bin of each route among the experts of all adapters, -1 if dropped.  Launch: a program per ROUTES routes.

    Inputs: `ids` [routes]; `mapping`, the slot of each token; `enabled` [max_loras]; `active` [num_active], the slots
    in use; with MAP, `expert_map` [num_experts].  Output: `out` int32 [routes].
    """
    at = tl.program_id(0) * ROUTES + tl.arange(0, ROUTES)
    inside = at < routes
    expert = tl.load(ids + at, mask=inside, other=-1)
    slot = tl.load(mapping + at // top_k, mask=inside, other=-1)
    kept = inside & (expert >= 0) & (expert < num_experts) & (slot >= 0) & (slot < max_loras)
    kept = kept & (tl.load(enabled + slot, mask=kept, other=0) != 0)
    listed = tl.zeros((ROUTES,), tl.int32)
    for first in range(0, num_active, SLOTS):
        each = first + tl.arange(0, SLOTS)
        known = tl.load(active + each, mask=each < num_active, other=-1)
        listed += tl.sum((known[:, None] == slot[None, :]).to(tl.int32), axis=0)
    kept = kept & (listed > 0)
    expert = expert.to(tl.int32)
    if MAP:
        expert = tl.load(expert_map + expert, mask=kept, other=-1)
        kept = kept & (expert >= 0) & (expert < num_experts)
    tl.store(out + at, tl.where(kept, slot * num_experts + expert, -1), mask=inside)


@triton.jit(
    do_not_specialize=["length", "num_blocks", "routes"],
    do_not_specialize_on_alignment=[
        "packed_rows", "packed_experts", "offsets", "enabled", "active", "rows", "blocks", "totals",
    ],
)  # fmt: skip
def _segments(
    packed_rows, packed_experts, offsets, enabled, active, rows, blocks, totals, num_experts, block_size, length,
    num_blocks, routes, num_active,
    ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Copy the segment of each active slot from the packed layout to its own row, and fill the tails.  Launch: for each
    slot, a program per ROWS rows.

    Inputs: `packed_rows`, `packed_experts` and `offsets`, a layout over max_loras * num_experts bins; `enabled` and
    `active` as above.  Outputs of slot s: `rows` [s, length], `blocks` [s, num_blocks], `totals` [s].
    """
    slot, part = tl.program_id(0), tl.program_id(1)
    listed = tl.zeros((SLOTS,), tl.int32)
    for one in range(0, num_active, SLOTS):
        each = one + tl.arange(0, SLOTS)
        listed += (tl.load(active + each, mask=each < num_active, other=-1) == slot).to(tl.int32)
    if (tl.sum(listed, axis=0) == 0) | (tl.load(enabled + slot) == 0):
        return
    first = tl.load(offsets + slot * num_experts)
    size = tl.load(offsets + (slot + 1) * num_experts) - first
    if part == 0:
        tl.store(totals + slot, size)
    at = part * ROWS + tl.arange(0, ROWS)
    row = tl.load(packed_rows + first + at, mask=at < size, other=0)
    tl.store(rows + slot.to(tl.int64) * length + at, tl.where(at < size, row, routes), mask=at < length)
    used = size // block_size
    expert = tl.load(packed_experts + first // block_size + at, mask=at < used, other=0) - slot * num_experts
    tl.store(blocks + slot.to(tl.int64) * num_blocks + at, tl.where(at < used, expert, -1), mask=at < num_blocks)


@triton.jit(do_not_specialize=["routes"], do_not_specialize_on_alignment=["ids", "scatter_idx"])
def _globalize(ids, scatter_idx, offset, routes, ROWS: tl.constexpr):
    """Local `ids` [routes] to global ones in place, -1 if `scatter_idx` is.  Launch: a program per ROWS routes."""
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = at < routes
    local = tl.load(ids + at, mask=inside, other=0)
    kept = tl.load(scatter_idx + at, mask=inside, other=-1) >= 0
    tl.store(ids + at, tl.where(kept, local + offset, -1), mask=inside)


def _current_device(tensor: Tensor) -> Any:
    """Make the device of `tensor` current, since Triton launches on the current device."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def virtual_ids(
    topk_ids: Tensor,
    token_lora_mapping: Tensor,
    adapter_enabled: Tensor,
    lora_ids: Tensor,
    expert_map: Tensor | None,
    num_experts: int,
    max_loras: int,
) -> Tensor:
    """int32 ``[tokens, top_k]``: ``slot * num_experts + expert``, -1 for a route of no active slot."""
    out = torch.empty(topk_ids.shape, dtype=torch.int32, device=topk_ids.device)
    routes = topk_ids.numel()
    if routes:
        with _current_device(topk_ids):
            _virtual_ids[(triton.cdiv(routes, _ROUTES),)](
                topk_ids, token_lora_mapping, adapter_enabled, lora_ids, expert_map, out, routes, topk_ids.shape[1],
                num_experts, max_loras, lora_ids.numel(),
                MAP=expert_map is not None, ROUTES=_ROUTES, SLOTS=_SLOTS,
            )  # fmt: skip
    return out


def segments(
    packed: Any,
    rows: Tensor,
    blocks: Tensor,
    totals: Tensor,
    num_experts: int,
    adapter_enabled: Tensor,
    lora_ids: Tensor,
) -> None:
    """Copy the segment of each active slot from `packed` to its row of `rows` and `blocks`; tails are n and -1."""
    slots, length = rows.shape
    parts = max(1, triton.cdiv(max(length, blocks.shape[1]), _ROWS))
    with _current_device(rows):
        _segments[(slots, parts)](
            packed.sorted_token_ids, packed.expert_ids, packed.expert_offsets, adapter_enabled, lora_ids, rows, blocks,
            totals, num_experts, packed.block_size, length, blocks.shape[1], packed.num_routes, lora_ids.numel(),
            ROWS=_ROWS, SLOTS=_SLOTS,
        )  # fmt: skip


def globalize(topk_idx: Tensor, scatter_idx: Tensor, offset: int) -> None:
    """Add `offset` to the ids of kept routes and set the others to -1, in place."""
    routes = topk_idx.numel()
    if routes:
        with _current_device(topk_idx):
            _globalize[(triton.cdiv(routes, _ROWS),)](topk_idx, scatter_idx, offset, routes, ROWS=_ROWS)
