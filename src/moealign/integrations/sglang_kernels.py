# mypy: disable-error-code="no-untyped-def"
"""The alignment of a single token in one launch.  Only a first call imports it."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .vllm_kernels import _current_device

__all__ = ["single_token"]

_ROWS = 256


# The number of choices is a model's; addresses change from call to call.
@triton.jit(do_not_specialize_on_alignment=["ids", "rows", "experts", "totals"])
def _single_token(
    ids, rows, experts, totals, top_k, block_size,
    PREFIX: tl.constexpr, ROUTES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A block for each route, by ascending id and then by choice.  Launch: one program.

    Input: `ids` [top_k].  Outputs: `rows` [top_k * block_size], `experts` [top_k], `totals` [1], with PREFIX [2].
    """
    at = tl.arange(0, ROUTES)
    inside = at < top_k
    own = tl.load(ids + at, mask=inside, other=-1).to(tl.int32)
    before = (own[None, :] < own[:, None]) | ((own[None, :] == own[:, None]) & (at[None, :] < at[:, None]))
    rank = tl.sum((before & inside[None, :]).to(tl.int32), axis=1)
    tl.store(experts + rank, own, mask=inside)
    tl.store(rows + rank * block_size, at, mask=inside)
    count = top_k * block_size
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        tl.store(rows + row, tl.zeros((ROWS,), tl.int32) + top_k, mask=(row < count) & (row % block_size != 0))
    tl.store(totals, count)
    if PREFIX:
        tl.store(totals + 1, tl.sum((inside & (own < 0)).to(tl.int32), axis=0))


def single_token(ids: Tensor, rows: Tensor, experts: Tensor, totals: Tensor, block_size: int) -> None:
    """Fill `rows`, `experts` and `totals`, of one element or two, for the `ids` ``[1, top_k]``."""
    top_k = ids.numel()
    with _current_device(ids):
        _single_token[(1,)](
            ids, rows, experts, totals, top_k, block_size,
            PREFIX=totals.numel() == 2, ROUTES=triton.next_power_of_2(max(top_k, 2)), ROWS=_ROWS, num_warps=1,
        )  # fmt: skip
