"""The wire of :mod:`moealign.parallel.wire` with rows in e4m3: about half the bytes of bfloat16.  For inference alone.

Each row has `pitch` bytes: `H` values of e4m3, then from a multiple of 4 on a float32 scale for each 128 columns.  The
arithmetic is that of :func:`moealign.experts.quantized.quantize_rows`: a scale is ``max(amax, 1e-10) / 448``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import modes
from ..experts import launch
from ..experts.quantized import GROUP, quantize_rows
from ..layout import cdiv, power_of_two
from .wire import HERE, Packed, Packing, Parts, Place, new_wire, picked_in_torch, routes_in_torch

__all__ = [
    "groups_of",
    "narrow_in_torch",
    "pack",
    "pack_in_torch",
    "pack_launch",
    "pitch_of",
    "size_of",
    "unpack",
    "unpack_in_torch",
    "unpack_launch",
    "widen_in_torch",
]


def size_of(hidden: int) -> int:
    """Bytes of `hidden` values and their scales."""
    return 4 * (cdiv(hidden, 4) + cdiv(hidden, GROUP))


def pitch_of(hidden: int) -> int:
    """Bytes of a row of `hidden` columns: a multiple of 16."""
    return 16 * cdiv(size_of(hidden), 16)


def groups_of(hidden: int) -> int:
    """Groups of columns for each program of a kernel."""
    return min(16, power_of_two(cdiv(hidden, GROUP)))


def narrow_in_torch(rows: Tensor) -> Tensor:
    """Rows ``[n, H]`` as bytes ``[n, size_of(H)]``, in torch's operations."""
    values, scales = quantize_rows(rows, "group")
    padded = F.pad(values.view(torch.uint8), (0, -values.shape[1] % 4))
    return torch.cat([padded, scales.contiguous().view(torch.uint8)], 1)


def widen_in_torch(data: Tensor, hidden: int, dtype: torch.dtype) -> Tensor:
    """What :func:`narrow_in_torch` gave, as rows of `dtype`; `data` may have more columns."""
    values = data[:, :hidden].contiguous().view(torch.float8_e4m3fn).to(torch.float32)
    scales = data[:, 4 * cdiv(hidden, 4) : size_of(hidden)].contiguous().view(torch.float32)
    return (values * scales.repeat_interleave(GROUP, 1)[:, :hidden]).to(dtype)


_library = torch.library.Library("moealign", "FRAGMENT")
_library.define(
    "pack_wire_fp8(Tensor rows, Tensor ids, Tensor slots, Tensor order, Tensor positions, Tensor offsets, "
    "SymInt top_k, SymInt capacity, SymInt header) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "unpack_wire_fp8(Tensor wire, SymInt ranks, SymInt capacity, SymInt hidden, ScalarType dtype) -> (Tensor, Tensor)"
)


# ---- packing ---------------------------------------------------------------------------------------------------------


def pack(rows: Tensor, *args: Any, error_word: Tensor | None = None, memory: Place | None = None) -> Packed:
    """:func:`moealign.parallel.wire.pack`, with a wire of uint8 ``[ranks * span, pitch]``; gives no gradients."""
    return _PACKING.pack(rows, args, error_word, memory)


def _new_wire(rows: Tensor, *args: Any, memory: Place | None = None) -> tuple[Packed, Parts]:
    return new_wire(rows, args[3], args[4], args[6] + args[7], pitch_of(rows.shape[1]), torch.uint8, memory)


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
    rows, wire = launch.row_major(rows), out[0]
    words, hidden = wire.view(torch.int16), rows.shape[1]
    routes, ranks, places = positions.shape[0], offsets.shape[0] - 1, 256
    groups = groups_of(hidden)
    return launch.GemmLaunch(
        "pack_wire_fp8",
        (ranks * (capacity + header) + cdiv(routes, places), cdiv(hidden, groups * GROUP)),
        (
            rows, launch.flat(ids), slots, order, positions, offsets, words, wire, wire.view(torch.float32),
            parts.shifts, *out[1:], error_word, routes, top_k, hidden, words.shape[1], launch.row_stride(rows),
            slots.shape[0], capacity, capacity + header, ranks,
        ),
        {"GROUPS": groups, "RANKS": power_of_two(ranks), "PLACES": places, "ALIGN": parts.align},
        4,
        1,
        False,
        "row_kernels",
    )  # fmt: skip


def pack_in_torch(rows: Tensor, *args: Any) -> Packed:
    """:func:`pack` in torch's operations."""
    offsets, top_k, capacity, header = args[4:]
    ranks, span, hidden = offsets.shape[0] - 1, capacity + header, rows.shape[1]
    wire = rows.new_zeros(ranks, span, pitch_of(hidden), dtype=torch.uint8)
    words = wire[:, capacity:].view(torch.int16).view(ranks, -1)
    listed, filled, routes, places = routes_in_torch(words, *args)
    picked = picked_in_torch(rows, listed // top_k, filled).flatten(0, 1)
    wire[:, :capacity, : size_of(hidden)] = narrow_in_torch(picked).view(ranks, capacity, -1)
    return wire.view(-1, wire.shape[2]), routes, places


# ---- unpacking -------------------------------------------------------------------------------------------------------


def unpack(wire: Tensor, ranks: int, capacity: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The rows ``[ranks * span, H]`` of `dtype` in a wire that has arrived, and their slots, int16 ``[rows, 1]``.

    Rows are undefined where the slot is -1.
    """
    if modes.watched(wire):
        result: tuple[Tensor, Tensor] = modes.call(
            torch.ops.moealign.unpack_wire_fp8, wire, ranks, capacity, hidden, dtype
        )
        return result
    return _unpack(wire, ranks, capacity, hidden, dtype)


def _unpack(wire: Tensor, ranks: int, capacity: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    out = _unpack_fake(wire, ranks, capacity, hidden, dtype)
    if launch.refuses(out[0]) is None:
        launch.run([unpack_launch(wire, ranks, capacity, out)], wire.device)
        return out
    return unpack_in_torch(wire, ranks, capacity, hidden, dtype)


def unpack_launch(wire: Tensor, ranks: int, capacity: int, out: tuple[Tensor, ...]) -> launch.GemmLaunch:
    """The launch that fills `out`, both results of :func:`unpack`."""
    words, hidden = wire.view(torch.int16), out[0].shape[1]
    groups = groups_of(hidden)
    return launch.GemmLaunch(
        "unpack_wire_fp8",
        (wire.shape[0], cdiv(hidden, groups * GROUP)),
        (words, wire, wire.view(torch.float32), *out, hidden, words.shape[1], capacity, wire.shape[0] // ranks),
        {"GROUPS": groups},
        4,
        1,
        False,
        "row_kernels",
    )


def unpack_in_torch(wire: Tensor, ranks: int, capacity: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """:func:`unpack` in torch's operations."""
    span = wire.shape[0] // ranks
    words = wire.view(torch.int16).view(ranks, -1)[:, capacity * wire.shape[1] // 2 :]
    return widen_in_torch(wire, hidden, dtype), words[:, :span].reshape(-1, 1)


def _unpack_fake(wire: Tensor, ranks: int, capacity: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    count = wire.shape[0]
    return wire.new_empty(count, hidden, dtype=dtype), wire.new_empty(count, 1, dtype=torch.int16)


_PACKING = Packing("pack_wire_fp8", 5, 6, _new_wire, pack_launch, pack_in_torch)
_PACKING.register(_library)
_library.impl("unpack_wire_fp8", _unpack, "CompositeExplicitAutograd")
torch.library.register_fake("moealign::unpack_wire_fp8", _unpack_fake, lib=_library)
