"""A layout as other grouped GEMM kernels take it, and rows moved into a layout and back.

Nothing here waits for the device, and every shape follows from shapes alone.  docs/views.md states each output as an
equation and names the library that reads it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import modes
from .errors import InvalidInput, InvalidType
from .experts import packed
from .layout import BlockLayout

__all__ = ["Masked", "Tiles", "group_indices", "group_row_ends", "masked", "pack_topk", "permute", "tiles", "unpermute"]


class Masked(NamedTuple):
    """What :func:`masked` returns; all int32."""

    rows: Tensor  #: ``[E, max_rows]``, the route in each slot, ``n`` in empty ones
    masked_m: Tensor  #: ``[E]``, rows of each expert
    positions: Tensor  #: ``[n]``, the slot ``e * max_rows + j`` of each route, -1 if it has none


class Tiles(NamedTuple):
    """What :func:`tiles` returns; all int32, under the names of TensorRT-LLM's ``moe_sort``."""

    tile_idx_to_expert_idx: Tensor  #: ``[blocks]``
    tile_idx_to_mn_limit: Tensor  #: ``[blocks]``, the first row past the tile's routes
    expanded_idx_to_permuted_idx: Tensor  #: ``[n]``, the row of each route, -1 if it was dropped
    permuted_idx_to_expanded_idx: Tensor  #: ``[blocks * B]``, the route of each row, -1 for padding
    total_num_padded_tokens: Tensor  #: ``[1]``
    num_non_exiting_tiles: Tensor  #: ``[1]``


def group_indices(layout: BlockLayout) -> Tensor:
    """``m_indices[r] = expert_ids[r // B]``: the group of each row, int32 ``[blocks * B]``; -1 in unused blocks.

    What DeepGEMM's ``m_grouped_*_gemm_nt_contiguous`` takes as its grouped layout.  It needs blocks of
    ``get_mk_alignment_for_contiguous_layout()`` rows, 128 on Hopper: align with that block size.
    """
    _check(layout)
    return layout.expert_ids.repeat_interleave(layout.block_size)


def group_row_ends(layout: BlockLayout) -> Tensor:
    """``o[e] + c[e]``: the end of the rows of each group, int32 ``[E]``; a group begins at the next multiple of B.

    What DeepGEMM takes as its grouped layout with ``use_psum_layout=True``.

    Raises:
        InvalidInput: the layout has no ``expert_counts`` or no ``expert_offsets``.
    """
    counts, offsets = _check(layout, "expert_counts", "expert_offsets")
    return offsets[:-1] + counts


def masked(layout: BlockLayout, max_rows: int) -> Masked:
    """Every expert in a matrix of its own: ``rows[e, j] = sorted_token_ids[o[e] + j]`` for ``j < masked_m[e]``.

    ``masked_m[e] = min(c[e], max_rows)``.  What DeepGEMM's ``m_grouped_*_gemm_nt_masked`` takes; further routes of an
    expert have no slot, and ``positions`` says so.  ``permute(x, ..., rows=rows)`` fills the matrices.

    Args:
        max_rows: slots of an expert.

    Raises:
        InvalidInput: the layout has no ``expert_counts``, ``expert_offsets`` or ``positions``; `max_rows` is not
            positive.
    """
    counts, offsets, positions = _check(layout, "expert_counts", "expert_offsets", "positions")
    if type(max_rows) is not int or max_rows < 1:
        raise InvalidInput(f"max_rows: expected an int of at least 1, got {max_rows!r}")
    order, routes = layout.sorted_token_ids, positions.shape[0]
    counts = counts.clamp(max=max_rows)
    slots = torch.arange(max_rows, device=order.device, dtype=torch.int32)
    filled = slots < counts.unsqueeze(1)
    at = torch.where(filled, offsets[:-1].unsqueeze(1) + slots, 0)
    listed = order[at.long()] if order.shape[0] else torch.zeros_like(at)
    rows = torch.where(filled, listed, routes)
    # A route's expert is that whose rows its position lies in.
    experts = torch.searchsorted(offsets[1:].contiguous(), positions.clamp(min=0), right=True, out_int32=True)
    experts = experts.clamp(max=max(counts.shape[0] - 1, 0))
    inside = positions - (offsets[experts.long()] if counts.shape[0] else 0)
    kept = (positions >= 0) & (inside < max_rows)
    return Masked(rows, counts, torch.where(kept, experts * max_rows + inside, -1).to(torch.int32))


def tiles(layout: BlockLayout) -> Tiles:
    """Tile maps with row limits: ``mn_limit[b] = b * B + block_rows[b]`` in used blocks, 0 in the others.

    What TensorRT-LLM's and FlashInfer's kernels take from ``moe_sort(..., tile_tokens_dim=B)``.  Unused tiles have
    expert -1; kernels leave at ``num_non_exiting_tiles``.

    Raises:
        InvalidInput: the layout has no ``positions`` or no ``block_rows``.
    """
    positions, block_rows = _check(layout, "positions", "block_rows")
    block_size, order, total = layout.block_size, layout.sorted_token_ids, layout.num_tokens_post_padded
    blocks = torch.arange(block_rows.shape[0], device=order.device, dtype=torch.int32)
    limits = torch.where(block_rows > 0, blocks * block_size + block_rows, 0)
    padding = order.new_full((block_rows.shape[0] * block_size - order.shape[0],), positions.shape[0])
    order = torch.cat([order, padding])
    routes = torch.where(order < positions.shape[0], order, -1)
    return Tiles(layout.expert_ids, limits, positions, routes, total, total // block_size)


def pack_topk(topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
    """``(id << 16) | bits of the bfloat16 weight``, int32 of the shape of `topk_ids`.

    What FlashInfer's ``trtllm_*_routed_moe`` takes in place of ids and weights.  Ids are kept modulo ``2**16``, so -1
    stays -1.

    Args:
        topk_weights: floating, rounded to bfloat16.
        topk_ids: integer, of the same shape.

    Raises:
        InvalidInput, InvalidType: shapes or dtypes do not match.
    """
    if not (isinstance(topk_weights, Tensor) and topk_weights.is_floating_point()):
        raise InvalidType(f"topk_weights: expected a floating tensor, got {_kind(topk_weights)}")
    if not isinstance(topk_ids, Tensor) or topk_ids.is_floating_point() or topk_ids.dtype is torch.bool:
        raise InvalidType(f"topk_ids: expected an integer tensor, got {_kind(topk_ids)}")
    if topk_ids.shape != topk_weights.shape:
        raise InvalidInput(f"topk_ids: expected {list(topk_weights.shape)}, got {list(topk_ids.shape)}")
    bits = topk_weights.detach().to(torch.bfloat16).view(torch.int16).to(torch.int32)
    return (topk_ids.to(torch.int32) << 16) | (bits & 0xFFFF)


# ---- rows ------------------------------------------------------------------------------------------------------------


def permute(
    x: Tensor, layout: BlockLayout, *, top_k: int, rows: Tensor | None = None, scales: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """``out[r] = x[sorted_token_ids[r] // top_k]``: rows in the order of the layout, zero in padding.

    Args:
        x: ``[T, H]``, any dtype; differentiable if it floats.
        layout: with ``positions``.
        top_k: routes of a row of `x`.
        rows: the routes to gather instead of the layout's, such as those of :func:`masked`; the result is then
            ``[*rows.shape, H]``.
        scales: ``[T, S]``, such as the scales of a quantised `x`, gathered alike, 1 in padding.

    Returns:
        ``[L, H]`` in the dtype of `x`; with `scales`, also ``[L, S]``.  The gradient of `x` is gathered by
        ``positions`` and summed over `top_k` in order: no atomics, the same bits every time.

    Raises:
        InvalidInput, InvalidType: the layout has no ``positions``; shapes do not match.
    """
    (positions,) = _check(layout, "positions")
    _check_rows("x", x, 2)
    routes = positions.shape[0]
    if type(top_k) is not int or top_k < 1 or x.shape[0] * top_k != routes:
        raise InvalidInput(f"top_k: expected {routes} routes as in the layout, got {x.shape[0]} rows times {top_k!r}")
    if scales is not None:
        _check_rows("scales", scales, 2)
        if scales.shape[0] != x.shape[0]:
            raise InvalidInput(f"scales: expected {x.shape[0]} rows like x, got {scales.shape[0]}")
    order, places = layout.sorted_token_ids, positions
    if rows is not None:
        order = rows.reshape(-1)
        slots = torch.arange(order.shape[0], device=order.device)
        inside = torch.where(order < routes, order, routes).long()
        places = slots.new_full((routes + 1,), -1).scatter(0, inside, slots)[:routes]
    followed = modes.watched(x) or modes.forward_mode() or modes.wants_gradient(x) or modes.is_batched_gradient(x)
    if x.is_floating_point() and followed:
        out: Tensor = modes.call(torch.ops.moealign.gather_rows, x, order, places, top_k, True)
    else:
        out = _gather(x, order, routes, top_k, 0)
    shape = order.shape if rows is None else rows.shape
    out = out.view(*shape, x.shape[1])
    if scales is None:
        return out
    return out, _gather(scales, order, routes, top_k, 1).view(*shape, scales.shape[1])


def unpermute(rows: Tensor, positions: Tensor, *, top_k: int, weights: Tensor | None = None) -> Tensor:
    """``out[t] = sum_j weights[t, j] * rows[positions[t * top_k + j]]``, over j in order; dropped routes add zero.

    Args:
        rows: ``[R, H]``, floating, such as a product over the rows of :func:`permute`; matrices of :func:`masked` as
            ``rows.flatten(0, 1)``.
        positions: ``[n]``, integer, ``layout.positions`` or those of :func:`masked`; negative: dropped.
        top_k: routes of a token.
        weights: ``[T, top_k]``, floating; by default 1.

    Returns:
        ``[T, H]`` in the dtype of `rows`, summed in float32 at least.  Differentiable in `rows` and `weights`.

    Raises:
        InvalidInput, InvalidType: shapes or dtypes do not match.
    """
    _check_rows("rows", rows, 2)
    if not rows.is_floating_point():
        raise InvalidType(f"rows: expected a floating dtype, got {rows.dtype}")
    _check_rows("positions", positions, 1)
    routes = positions.shape[0]
    if type(top_k) is not int or top_k < 1 or routes % top_k:
        raise InvalidInput(f"top_k: expected a divisor of {routes} positions, got {top_k!r}")
    if weights is None:
        weights = torch.ones(routes // top_k, top_k, dtype=rows.dtype, device=rows.device)
    elif list(weights.shape) != [routes // top_k, top_k]:
        raise InvalidInput(f"weights: expected [{routes // top_k}, {top_k}], got {list(weights.shape)}")
    if not rows.shape[0]:
        return rows.new_zeros(routes // top_k, rows.shape[1])
    # The route in each row, for the gradient; n where there is none.
    numbers = torch.arange(routes, device=rows.device)
    kept = (positions >= 0) & (positions < rows.shape[0])
    at = torch.where(kept, positions, rows.shape[0]).long()
    order = numbers.new_full((rows.shape[0] + 1,), routes).scatter(0, at, numbers)[:-1]
    places = torch.where(kept, positions, -1)
    return packed.weighted_sum(packed.scatter_rows(rows, order, places), weights, places)


def _gather(source: Tensor, order: Tensor, routes: Tensor | int, top_k: int, fill: int) -> Tensor:
    """Rows of `source`, `fill` where there is no route; of any dtype, also those that torch cannot index."""
    dtype, width = source.dtype, source.shape[1]
    filled = torch.full((1, width), fill, device=source.device).to(dtype)
    if dtype.itemsize == 1:  # float8 dtypes move as bytes
        source, filled = source.contiguous().view(torch.uint8), filled.view(torch.uint8)
    if not source.shape[0]:
        return filled.expand(order.shape[0], width).contiguous().view(dtype)
    at = (order.long() // top_k).clamp(max=source.shape[0] - 1)
    result = torch.where((order < routes).unsqueeze(1), source.index_select(0, at), filled)
    return result.view(dtype)


def _check(layout: BlockLayout, *needed: str) -> list[Tensor]:
    if not isinstance(layout, BlockLayout):
        raise InvalidType(f"layout: expected a BlockLayout, got {type(layout).__name__}; moealign.align makes one")
    if layout.block_size < 1:
        raise InvalidInput("layout: expected its block_size, got none; BlockLayout(..., block_size=B) says it")
    found = [getattr(layout, name) for name in needed]
    missing = [name for name, each in zip(needed, found, strict=True) if each is None]
    if missing:
        options = ", ".join(f"{name}=True" for name in missing)
        raise InvalidInput(f"layout: expected {' and '.join(missing)}, got none; align(..., {options}) returns them")
    return found


def _check_rows(name: str, tensor: object, dimensions: int) -> None:
    if not isinstance(tensor, Tensor):
        raise InvalidType(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dim() != dimensions:
        raise InvalidInput(f"{name}: expected {dimensions} dimensions, got {list(tensor.shape)}")


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
