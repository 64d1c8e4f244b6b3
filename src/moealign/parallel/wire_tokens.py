"""The wire of an exchange with one row for each token and rank: a row, its router weights and its slots together.

A *pair* is a token and a rank that has at least one of its experts; its number is that of the token's first route to
the rank.  A wire is uint8 ``[ranks * capacity, pitch]``.  Of each row, first come the values: as they are, or in e4m3
with scales as in :mod:`moealign.parallel.wire_fp8`; then `k` weights, float32 (float64 with rows of float64); then `k`
slots, int16, -1 for a choice that is not on the rank and where there is no pair.  For inference alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import modes
from ..experts import launch
from ..experts.quantized import GROUP
from ..layout import cdiv, power_of_two
from .wire import HERE, Packed, Packing, Parts, Place, new_wire, picked_in_torch, rows_in_torch
from .wire_fp8 import groups_of, narrow_in_torch, size_of, widen_in_torch

__all__ = [
    "first_in_torch",
    "first_launch",
    "first_of_ranks",
    "format_of",
    "pack",
    "pack_in_torch",
    "pack_launch",
    "unpack",
    "unpack_in_torch",
    "unpack_launch",
]

ALIGNED = 64  # bytes: 16 elements of float32, so that the experts' kernels read rows of any width in full vectors


class Format(NamedTuple):
    """Bytes of a row: its pitch, and where in it the weights and the slots start."""

    pitch: int
    weights: int
    slots: int


def format_of(hidden: int, dtype: torch.dtype, top_k: int, fp8: bool) -> Format:
    """The format of `hidden` columns of `dtype` and of `top_k` choices."""
    size = _weights_dtype(dtype).itemsize
    weights = size * cdiv(size_of(hidden) if fp8 else hidden * dtype.itemsize, size)
    slots = weights + size * top_k
    return Format(ALIGNED * cdiv(slots + 2 * top_k, ALIGNED), weights, slots)


def _weights_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _parts(wire: Tensor, hidden: int, dtype: torch.dtype, top_k: int, fp8: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Views of a wire: its values, ``[rows, H]`` or bytes, its weights and its slots, ``[rows, k]``."""
    form, kind = format_of(hidden, dtype, top_k, fp8), _weights_dtype(dtype)
    at, of = form.weights // kind.itemsize, form.slots // 2
    values = wire[:, : size_of(hidden)] if fp8 else wire.view(dtype)[:, :hidden]
    return values, wire.view(kind)[:, at : at + top_k], wire.view(torch.int16)[:, of : of + top_k]


_library = torch.library.Library("moealign", "FRAGMENT")
_library.define("first_of_ranks(Tensor ids, Tensor ranks) -> Tensor")
_library.define(
    "pack_tokens(Tensor rows, Tensor weights, Tensor ids, Tensor ranks, Tensor slots, Tensor order, Tensor positions, "
    "Tensor offsets, SymInt capacity, bool fp8) -> (Tensor, Tensor, Tensor)"
)
_library.define("unpack_tokens(Tensor wire, SymInt hidden, ScalarType dtype, SymInt top_k) -> (Tensor, Tensor, Tensor)")


# ---- pairs -----------------------------------------------------------------------------------------------------------


def first_of_ranks(ids: Tensor, ranks: Tensor) -> Tensor:
    """int32 ``[T, k]``: the rank of each route that is the first of its token there, -1 for others.

    Args:
        ids: ``[T, k]``, integer.
        ranks: int32 ``[E]``, the rank of each id, or -1.  An id that is neither in it nor -1 gives -2, which is no bin
            either, and an error of :func:`moealign.align`.
    """
    if modes.watched(ids, ranks):
        result: Tensor = modes.call(torch.ops.moealign.first_of_ranks, ids, ranks)
        return result
    return _first(ids, ranks)


def _new_first(ids: Tensor, ranks: Tensor) -> Tensor:
    return ids.new_empty(ids.shape, dtype=torch.int32)


def _first(ids: Tensor, ranks: Tensor) -> Tensor:
    if launch.refuses_device(ids.device) is not None or not ids.numel():
        return first_in_torch(ids, ranks)
    out = _new_first(ids, ranks)
    launch.run([first_launch(ids, ranks, out)], ids.device)
    return out


def first_launch(ids: Tensor, ranks: Tensor, out: Tensor) -> launch.GemmLaunch:
    """The launch of :func:`first_of_ranks` that fills `out`."""
    tokens, top_k = ids.shape
    choices = power_of_two(top_k)
    block = max(256 // choices, 1)
    return launch.GemmLaunch(
        "first_of_ranks",
        (cdiv(tokens, block),),
        (launch.flat(ids), ranks, out, tokens, top_k, ranks.shape[0]),
        {"CHOICES": choices, "TOKENS": block},
        4,
        1,
        False,
        "row_kernels",
    )


def first_in_torch(ids: Tensor, ranks: Tensor) -> Tensor:
    """:func:`first_of_ranks` in torch's operations."""
    known, expert = _known(ids, ranks)
    of = torch.where(known, ranks[expert], -1)
    repeated = (of.unsqueeze(2) == of.unsqueeze(1)).tril(-1).any(2)
    valid = known | (ids.to(torch.int64) == -1)
    return torch.where(valid, of.masked_fill(repeated, -1), -2).to(torch.int32)


def _known(ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Whether `table` has an entry for each id, and its index, else 0."""
    ids = ids.to(torch.int64)
    known = (ids >= 0) & (ids < table.shape[0])
    return known, torch.where(known, ids, 0)


# ---- packing ---------------------------------------------------------------------------------------------------------


def pack(rows: Tensor, *args: Any, error_word: Tensor | None = None, memory: Place | None = None) -> Packed:
    """The pairs of the tokens `rows` ``[T, H]`` in a wire; gives no gradients.

    Args:
        rows: ``[T, H]``, of a dtype of two bytes or more.
        args: weights ``[T, k]``, floating; ids ``[T, k]``, integer; ranks int32 and slots int16 ``[E]``, those of each
            id; order ``[n]``, positions ``[n]`` and offsets ``[ranks + 1]`` of the pairs by rank, a layout of
            :func:`first_of_ranks` with blocks of one row; capacity, and whether values are in e4m3.
        error_word, memory: as of :func:`moealign.parallel.wire.pack`.

    Returns:
        The wire; int32 ``[ranks * capacity]``, the pair in each of its rows or ``n``; int32 ``[n]``, the row of each
        pair, or -1.
    """
    return _PACKING.pack(rows, args, error_word, memory)


def _new_wire(rows: Tensor, weights: Tensor, *args: Any, memory: Place | None = None) -> tuple[Packed, Parts]:
    positions, offsets, capacity, fp8 = args[4:]
    form = format_of(rows.shape[1], rows.dtype, weights.shape[1], fp8)
    return new_wire(rows, positions, offsets, capacity, form.pitch, torch.uint8, memory)


def pack_launch(
    rows: Tensor,
    weights: Tensor,
    ids: Tensor,
    ranks: Tensor,
    slots: Tensor,
    order: Tensor,
    positions: Tensor,
    offsets: Tensor,
    capacity: int,
    fp8: bool,
    *,
    out: tuple[Tensor, ...],
    error_word: Tensor | None = None,
    parts: Parts = HERE,
) -> launch.GemmLaunch:
    """The launch that fills `out`, the three results of :func:`pack`, the wire in `parts`."""
    wire, count, top_k, hidden = out[0], offsets.shape[0] - 1, weights.shape[1], rows.shape[1]
    form = format_of(hidden, rows.dtype, top_k, fp8)
    rows = launch.row_major(rows) if fp8 else launch.row_major(rows).view(torch.int16)
    width, places = rows.shape[1], 256
    block = GROUP * groups_of(hidden) if fp8 else min(2048, power_of_two(width))
    return launch.GemmLaunch(
        "pack_tokens",
        (count * capacity + cdiv(positions.shape[0], places), cdiv(width, block)),
        (
            rows, weights, launch.flat(ids), ranks, slots, order, positions, offsets, wire.view(torch.int16), wire,
            wire.view(torch.float32), parts.shifts, *out[1:], error_word, positions.shape[0], top_k, width,
            form.pitch // 2, launch.row_stride(rows), *weights.stride(), ranks.shape[0], capacity, count,
            form.weights // 4, form.slots // 2,
        ),
        {
            "FP8": fp8, "BLOCK": block, "CHOICES": power_of_two(top_k), "RANKS": power_of_two(count), "PLACES": places,
            "ALIGN": parts.align,
        },
        4,
        1,
        False,
        "row_kernels",
    )  # fmt: skip


def pack_in_torch(
    rows: Tensor,
    weights: Tensor,
    ids: Tensor,
    ranks: Tensor,
    slots: Tensor,
    order: Tensor,
    positions: Tensor,
    offsets: Tensor,
    capacity: int,
    fp8: bool,
) -> Packed:
    """:func:`pack` in torch's operations."""
    count, (hidden, top_k) = offsets.shape[0] - 1, (rows.shape[1], ids.shape[1])
    listed, filled, routes, places = rows_in_torch(order, positions, offsets, capacity, 0)
    tokens = listed // top_k
    pitch = format_of(hidden, rows.dtype, top_k, fp8).pitch
    wire = rows.new_zeros(count * capacity, pitch, dtype=torch.uint8)
    values, factors, choices = _parts(wire, hidden, rows.dtype, top_k, fp8)
    picked = picked_in_torch(rows, tokens, filled).flatten(0, 1)
    values.copy_(narrow_in_torch(picked) if fp8 else picked)
    choices.fill_(-1)
    if positions.shape[0]:
        known, expert = _known(ids[tokens].flatten(0, 1), ranks)
        of = torch.arange(count, device=ids.device).repeat_interleave(capacity)
        here = known & filled.view(-1, 1) & (ranks[expert] == of.unsqueeze(1))
        factors.copy_(torch.where(here, weights[tokens].flatten(0, 1), 0))
        choices.copy_(torch.where(here, slots[expert], -1))
    return wire, routes, places


# ---- unpacking -------------------------------------------------------------------------------------------------------


def unpack(wire: Tensor, hidden: int, dtype: torch.dtype, top_k: int, fp8: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The rows ``[ranks * capacity, H]`` of `dtype` in a wire that has arrived, their weights and their int16 slots,
    ``[rows, k]``; views of the wire unless `fp8`.

    Rows are undefined where all slots are -1.
    """
    if not fp8:
        return _parts(wire, hidden, dtype, top_k, fp8)
    if modes.watched(wire):
        result: tuple[Tensor, Tensor, Tensor] = modes.call(torch.ops.moealign.unpack_tokens, wire, hidden, dtype, top_k)
        return result
    return _unpack(wire, hidden, dtype, top_k)


def _new_parts(wire: Tensor, hidden: int, dtype: torch.dtype, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    kinds = ((hidden, dtype), (top_k, _weights_dtype(dtype)), (top_k, torch.int16))
    return tuple(wire.new_empty(wire.shape[0], columns, dtype=kind) for columns, kind in kinds)  # type: ignore[return-value]


def _unpack(wire: Tensor, hidden: int, dtype: torch.dtype, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    out = _new_parts(wire, hidden, dtype, top_k)
    if launch.refuses(out[0]) is None:
        launch.run([unpack_launch(wire, out)], wire.device)
        return out
    return unpack_in_torch(wire, hidden, dtype, top_k)


def unpack_launch(wire: Tensor, out: tuple[Tensor, ...]) -> launch.GemmLaunch:
    """The launch that fills `out`, the three results of :func:`unpack` with `fp8`."""
    (rows, hidden), top_k = out[0].shape, out[1].shape[1]
    form, groups = format_of(hidden, out[0].dtype, top_k, True), groups_of(hidden)
    return launch.GemmLaunch(
        "unpack_tokens",
        (rows, cdiv(hidden, groups * GROUP)),
        (
            wire.view(torch.int16), wire, wire.view(torch.float32), *out, hidden, form.pitch // 2, top_k,
            form.weights // 4, form.slots // 2,
        ),
        {"GROUPS": groups, "CHOICES": power_of_two(top_k)},
        4,
        1,
        False,
        "row_kernels",
    )  # fmt: skip


def unpack_in_torch(wire: Tensor, hidden: int, dtype: torch.dtype, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`unpack` with `fp8`, in torch's operations."""
    data, weights, slots = _parts(wire, hidden, dtype, top_k, True)
    return widen_in_torch(data, hidden, dtype), weights.contiguous(), slots.contiguous()


_PACKING = Packing("pack_tokens", 7, 7, _new_wire, pack_launch, pack_in_torch)
_PACKING.register(_library)
for _name, _eager, _fake in (
    ("first_of_ranks", _first, _new_first),
    ("unpack_tokens", _unpack, _new_parts),
):
    _library.impl(_name, _eager, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moealign::{_name}", _fake, lib=_library)
