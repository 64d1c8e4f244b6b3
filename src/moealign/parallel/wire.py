"""Rows between tokens and the fixed-size buffer of an exchange: one kernel each way on GPUs, torch elsewhere.

A *wire* is ``[ranks * span, H]`` with ``span = capacity + header``: `capacity` rows for each rank, then `header` rows
whose memory holds the slot of every row of that rank as int16, -1 where there is no route.  Rows and slots thus travel
in one collective of a size that no value decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import modes
from ..experts import launch, packed
from ..layout import PAST_CAPACITY, cdiv, power_of_two

__all__ = [
    "HERE",
    "Packed",
    "Packing",
    "Parts",
    "Place",
    "combine",
    "combine_in_torch",
    "combine_launch",
    "header_rows",
    "new_sums",
    "new_wire",
    "pack",
    "pack_launch",
    "picked_in_torch",
    "routes_in_torch",
    "rows_in_torch",
    "slots_of",
    "sums_in_torch",
]


class Parts(NamedTuple):
    """Where kernels find the parts of a wire, one for each rank."""

    shifts: Tensor | None  #: int64 ``[ranks]``, from the wire to each, in its rank's memory; None: they are the wire
    align: int  #: bytes in a unit of `shifts`

    @classmethod
    def between(cls, addresses: list[int], wire: int, device: torch.device) -> Parts:
        """Parts at `addresses`, for kernels on `device` that are given a wire at the address `wire`."""
        shifts = [each - wire for each in addresses]
        align = math.gcd(16, *shifts)
        return cls(torch.tensor([each // align for each in shifts], device=device), align)


HERE = Parts(None, 1)
#: Of rows, columns and a dtype, a wire's memory and its parts.
Place = Callable[[int, int, torch.dtype], tuple[Tensor, Parts]]
#: The results of :func:`pack`.
Packed = tuple[Tensor, Tensor, Tensor]


class Packing(NamedTuple):
    """How one kind of wire is filled.  The functions take the rows and then the arguments of its `pack`."""

    operator: str
    tensors: int  #: among the arguments, which come first; the last one is the offsets
    capacity: int  #: which of the arguments it is
    new: Callable[..., tuple[Packed, Parts]]  #: the results, uninitialised, in `memory`
    by_kernel: Callable[..., launch.GemmLaunch]  #: fills `out`, the wire in `parts`; notes an overflow in `error_word`
    in_torch: Callable[..., Packed]
    differentiable: bool = False

    def pack(self, rows: Tensor, args: tuple[Any, ...], error_word: Tensor | None, memory: Place | None) -> Packed:
        """The results, by the operator where something follows the call."""
        if modes.watched(rows, *args[: self.tensors]) or (self.differentiable and modes.wants_gradient(rows)):
            note_overflow(error_word, args[self.tensors - 1], args[self.capacity])
            result: Packed = modes.call(getattr(torch.ops.moealign, self.operator), rows, *args)
            return result
        return self.fill(rows, *args, error_word=error_word, memory=memory)

    def fill(self, rows: Tensor, *args: Any, error_word: Tensor | None = None, memory: Place | None = None) -> Packed:
        """The results, by a kernel where kernels run."""
        if launch.refuses(rows) is None:
            out, parts = self.new(rows, *args, memory=memory)
            launch.run([self.by_kernel(rows, *args, out=out, error_word=error_word, parts=parts)], rows.device)
            return out
        note_overflow(error_word, args[self.tensors - 1], args[self.capacity])
        return self.in_torch(rows, *args)

    def register(self, library: torch.library.Library) -> None:
        """Register the operator of `library`."""
        library.impl(self.operator, self.fill, "CompositeExplicitAutograd")
        torch.library.register_fake(f"moealign::{self.operator}", self.fake, lib=library)

    def fake(self, rows: Tensor, *args: Any) -> Packed:
        """The results of the operator without their values."""
        return self.new(rows, *args)[0]


def words_of(hidden: int, itemsize: int) -> int:
    """int16 words of a row."""
    return hidden * itemsize // 2


def header_rows(capacity: int, words: int) -> int:
    """The fewest rows of `words` words that hold a slot for each of `capacity` rows and for themselves."""
    return cdiv(capacity, words - 1)


def slots_of(wire: Tensor, ranks: int, capacity: int) -> Tensor:
    """The slot of each row of a wire that has arrived, int16 ``[rows, 1]``; -1 where there is no route."""
    words = wire.detach().view(torch.int16)
    span, width = wire.shape[0] // ranks, words.shape[1]
    return words.as_strided((ranks, span), (span * width, 1), capacity * width).reshape(-1, 1)


# ---- packing ---------------------------------------------------------------------------------------------------------

_library = torch.library.Library("moealign", "FRAGMENT")
_library.define(
    "pack_wire(Tensor rows, Tensor ids, Tensor slots, Tensor order, Tensor positions, Tensor offsets, SymInt top_k, "
    "SymInt capacity, SymInt header) -> (Tensor, Tensor, Tensor)"
)
_library.define("combine_wire(Tensor wire, Tensor weights, Tensor routes, Tensor places) -> Tensor")


def note_overflow(error_word: Tensor | None, offsets: Tensor, capacity: int) -> None:
    """Set the bit of an overflow in `error_word` if any of the ranks has more routes than `capacity`."""
    if error_word is not None:
        over = (offsets[1:] - offsets[:-1] > capacity).any()
        error_word.bitwise_or_(over.to(torch.int32) * PAST_CAPACITY)


def pack(rows: Tensor, *args: Any, error_word: Tensor | None = None, memory: Place | None = None) -> Packed:
    """The rows ``[T, H]`` of each route in a wire; differentiable in `rows`.

    Args:
        rows: ``[T, H]``, of a dtype of two bytes or more.
        args: ids ``[T, k]``, integer; slots int16 ``[E]``, that of each id; order ``[n]``, positions ``[n]`` and
            offsets ``[ranks + 1]`` of the routes by rank, a layout with blocks of one row; top_k, capacity and header.
        error_word: as of :func:`note_overflow`.
        memory: where kernels put the wire, of so many rows and columns of a dtype, and its parts; by default in new
            memory.

    Returns:
        The wire; int32 ``[ranks * span]``, the route of each of its rows or ``n``; int32 ``[n]``, the row of each
        route, or -1.
    """
    return _PACKING.pack(rows, args, error_word, memory)


def new_wire(
    rows: Tensor,
    positions: Tensor,
    offsets: Tensor,
    span: int,
    width: int,
    dtype: torch.dtype,
    memory: Place | None,
) -> tuple[Packed, Parts]:
    """The three results of :func:`pack`, uninitialised, with a wire of `width` columns of `dtype`; and its parts."""
    count = (offsets.shape[0] - 1) * span
    wire, parts = (rows.new_empty(count, width, dtype=dtype), HERE) if memory is None else memory(count, width, dtype)
    routes, places = (positions.new_empty(size, dtype=torch.int32) for size in (count, positions.shape[0]))
    return (wire, routes, places), parts


def _new_wire(rows: Tensor, *args: Any, memory: Place | None = None) -> tuple[Packed, Parts]:
    return new_wire(rows, args[3], args[4], args[6] + args[7], rows.shape[1], rows.dtype, memory)


def pack_launch(
    rows: Tensor,
    ids: Tensor,
    slots: Tensor,
    order: Tensor,
    positions: Tensor,
    offsets: Tensor,
    top_k: int,
    capacity: int,
    header: int,
    *,
    out: tuple[Tensor, ...],
    error_word: Tensor | None = None,
    parts: Parts = HERE,
) -> launch.GemmLaunch:
    """The launch that fills `out`, the three results of :func:`pack`, the wire in `parts`."""
    words = launch.row_major(rows).view(torch.int16)
    routes, ranks, width = positions.shape[0], offsets.shape[0] - 1, words.shape[1]
    block, places = min(2048, power_of_two(width)), 256
    return launch.GemmLaunch(
        "pack_wire",
        (ranks * (capacity + header) + cdiv(routes, places), cdiv(width, block)),
        (
            words, launch.flat(ids), slots, order, positions, offsets, out[0].view(torch.int16), parts.shifts,
            *out[1:], error_word, routes, top_k, width, launch.row_stride(words), slots.shape[0], capacity,
            capacity + header, ranks,
        ),
        {"BLOCK": block, "RANKS": power_of_two(ranks), "PLACES": places, "ALIGN": parts.align},
        4,
        1,
        False,
        "row_kernels",
    )  # fmt: skip


def pack_in_torch(
    rows: Tensor,
    ids: Tensor,
    slots: Tensor,
    order: Tensor,
    positions: Tensor,
    offsets: Tensor,
    top_k: int,
    capacity: int,
    header: int,
) -> Packed:
    """:func:`pack` in torch's operations."""
    ranks, span = offsets.shape[0] - 1, capacity + header
    wire = rows.new_zeros(ranks, span, rows.shape[1])
    words = wire.view(torch.int16)[:, capacity:].view(ranks, -1)
    listed, filled, routes, places = routes_in_torch(
        words, ids, slots, order, positions, offsets, top_k, capacity, header
    )
    wire[:, :capacity] = picked_in_torch(rows, listed // top_k, filled)
    return wire.view(-1, rows.shape[1]), routes, places


def picked_in_torch(rows: Tensor, tokens: Tensor, filled: Tensor) -> Tensor:
    """``rows[tokens]``, zeros where not `filled`: ``[*tokens.shape, columns]``."""
    if not rows.shape[0]:
        return rows.new_zeros(*tokens.shape, rows.shape[1])
    picked = rows.index_select(0, tokens.reshape(-1)).view(*tokens.shape, rows.shape[1])
    return picked.masked_fill_(~filled.unsqueeze(-1), 0)


def routes_in_torch(
    words: Tensor,
    ids: Tensor,
    slots: Tensor,
    order: Tensor,
    positions: Tensor,
    offsets: Tensor,
    top_k: int,
    capacity: int,
    header: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All but the rows of a wire, in torch's operations.

    Args:
        words: int16 ``[ranks, ...]``, the headers, to fill; the others as of :func:`pack`.

    Returns:
        int64 ``[ranks, capacity]``, the route of each row that may be sent, 0 where bool ``[ranks, capacity]`` tells
        that there is none; both maps of :func:`pack`.
    """
    listed, filled, routes, places = rows_in_torch(order, positions, offsets, capacity, header)
    words.fill_(-1)
    if positions.shape[0]:
        expert = ids.reshape(-1)[listed].long()
        known = filled & (expert >= 0) & (expert < slots.shape[0])
        words[:, :capacity] = torch.where(known, slots[torch.where(known, expert, 0)], -1)
    return listed, filled, routes, places


def rows_in_torch(
    order: Tensor, positions: Tensor, offsets: Tensor, capacity: int, header: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The results of :func:`routes_in_torch`."""
    count, ranks, span = positions.shape[0], offsets.shape[0] - 1, capacity + header
    routes = torch.full((ranks, span), count, dtype=torch.int32, device=positions.device)
    starts, ends = offsets[:-1].unsqueeze(1), offsets[1:].unsqueeze(1)
    at = starts + torch.arange(capacity, device=positions.device, dtype=torch.int32)
    listed, filled = torch.zeros_like(at, dtype=torch.int64), torch.zeros_like(at, dtype=torch.bool)
    if count:
        listed = order.index_select(0, at.clamp(0, count - 1).reshape(-1).long()).view(at.shape)
        filled = (at < ends) & (listed >= 0) & (listed < count)
        listed = torch.where(filled, listed, 0).long()
        routes[:, :capacity] = torch.where(filled, listed, count)
    rank = torch.searchsorted(offsets[1:].contiguous(), positions, right=True).clamp(max=ranks - 1)
    within = positions - offsets[rank]
    kept = (positions >= 0) & (positions < offsets[-1]) & (within >= 0) & (within < capacity)
    places = torch.where(kept, rank * span + within, -1).to(torch.int32)
    return listed, filled, routes.view(-1), places


def _pack_save(ctx: Any, inputs: tuple[Any, ...], output: Packed) -> None:
    ctx.top_k = inputs[6]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _pack_backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    routes, places = ctx.saved_tensors
    rows = packed.scatter_rows(grad, routes, places)
    return rows.view(-1, ctx.top_k, grad.shape[1]).sum(1), *(None,) * 8


_PACKING = Packing("pack_wire", 5, 6, _new_wire, pack_launch, pack_in_torch, differentiable=True)
_PACKING.register(_library)
modes.differentiable(_library, "pack_wire", pack_in_torch, _pack_save, _pack_backward)


# ---- combining -------------------------------------------------------------------------------------------------------


def combine(wire: Tensor, weights: Tensor, routes: Tensor, places: Tensor) -> Tensor:
    """``out[t] = sum_j weights[t, j] * wire[places[t * k + j]]``, over j in order; a place of -1 adds zero.

    Args:
        wire: ``[ranks * span, H]``.
        weights: ``[T, k]``, floating.
        routes, places: of :func:`pack`.

    Returns:
        ``[T, H]`` in the dtype of `wire`, summed in float32 at least.  Differentiable in `wire` and `weights`.
    """
    if modes.watched(wire, weights, routes, places) or modes.wants_gradient(wire, weights):
        result: Tensor = modes.call(torch.ops.moealign.combine_wire, wire, weights, routes, places)
        return result
    return _combine(wire, weights, routes, places)


def sums_in_torch(wire: Tensor, weights: Tensor) -> bool:
    """Whether :func:`combine` is not for kernels."""
    return launch.refuses(wire) is not None or weights.dtype is torch.float64 or not weights.numel()


def _combine(wire: Tensor, weights: Tensor, routes: Tensor, places: Tensor) -> Tensor:
    if sums_in_torch(wire, weights):
        return combine_in_torch(wire, weights, routes, places)
    out = new_sums(wire, weights)
    launch.run([combine_launch(wire, weights, places, out)], wire.device)
    return out


def new_sums(wire: Tensor, weights: Tensor, *_: Tensor) -> Tensor:
    """The result of :func:`combine`, uninitialised."""
    return wire.new_empty(weights.shape[0], wire.shape[1])


def combine_in_torch(wire: Tensor, weights: Tensor, routes: Tensor, places: Tensor) -> Tensor:
    """:func:`combine` in torch's operations."""
    return packed.weighted_sum(packed.scatter_rows(wire, routes, places), weights, places)


def combine_launch(
    wire: Tensor, weights: Tensor, places: Tensor, out: Tensor, parts: Parts = HERE
) -> launch.GemmLaunch:
    """The launch of :func:`combine` that fills `out`; the wire is in `parts`, each of as many rows."""
    width, ranks = wire.shape[1], 1 if parts.shifts is None else parts.shifts.shape[0]
    block = min(1024, power_of_two(width))
    return launch.GemmLaunch(
        "combine_wire",
        (out.shape[0], cdiv(width, block)),
        (wire, parts.shifts, places, weights, out, width, wire.shape[0] // ranks, wire.shape[0], *weights.stride()),
        {"TOP_K": weights.shape[1], "BLOCK": block, "ALIGN": parts.align},
        4,
        1,
        False,
        "row_kernels",
    )


_library.impl("combine_wire", _combine, "CompositeExplicitAutograd")
torch.library.register_fake("moealign::combine_wire", new_sums, lib=_library)
modes.differentiable(_library, "combine_wire", combine_in_torch)
