"""Loads, the number of routes of each expert; and batches, the runs of tokens that a layer computes at once."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = [
    "MAX_DECODE_TOKENS",
    "Floats",
    "Ints",
    "LoadSummary",
    "Padding",
    "batch_loads",
    "blocks_of",
    "loads_of",
    "padding",
    "piece_loads",
    "pieces",
    "summarize",
    "typical_batches",
    "windows",
]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

MAX_DECODE_TOKENS = 256  #: a batch of more tokens counts as prefill
_DECODE_TOKENS = 64  # of a decode batch, where the trace does not say
_MAX_LOADS = 2**24  # elements of a table of loads
_MAX_WINDOWS = 512


def loads_of(topk_ids: Tensor, num_experts: int) -> Ints:
    """Kept routes of each expert, ``[layers, num_experts]``, of `topk_ids` ``[layers, tokens, top_k]``."""
    flat = topk_ids.reshape(topk_ids.shape[0], -1).to("cpu", torch.int64).numpy()
    return np.stack([np.bincount(row[(row >= 0) & (row < num_experts)], minlength=num_experts) for row in flat])


def batch_loads(topk_ids: Tensor, num_experts: int, calls: Sequence[int] = ()) -> Ints:
    """Kept routes of each expert in each batch, ``[layers, batches, num_experts]``.

    Every call of the model is a batch; without `calls`, all tokens are one.  Of very many calls, only some are counted,
    evenly spread.
    """
    bounds = _bounds(topk_ids.shape[1], calls)
    chosen = _spread(bounds, max(1, _MAX_LOADS // (topk_ids.shape[0] * num_experts)))
    return np.stack([loads_of(topk_ids[:, first:last], num_experts) for first, last in chosen], axis=1)


def _bounds(tokens: int, calls: Sequence[int]) -> list[tuple[int, int]]:
    """The first token of each batch, and the one after its last."""
    ends = np.cumsum(calls or [tokens]).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _spread(values: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of `values`, evenly spread."""
    if len(values) <= count:
        return list(values)
    return [values[i] for i in np.linspace(0, len(values) - 1, count).astype(int)]


def blocks_of(loads: Ints, block_size: int) -> Ints:
    """Blocks of each expert, in the shape of `loads`: ``cdiv(loads, block_size)``."""
    return -(-loads // block_size)


@dataclass(frozen=True)
class LoadSummary:
    """How the routes of one layer spread over its experts."""

    min: int  #: routes of the idlest expert
    median: int
    max: int  #: routes of the busiest expert
    imbalance: float  #: max over mean: 1 is even; 1 without routes
    idle: int  #: experts without a route


def summarize(loads: Ints) -> LoadSummary:
    """The spread of one layer's `loads` ``[num_experts]``."""
    return LoadSummary(
        int(loads.min()), int(np.median(loads)), int(loads.max()), float(imbalance_of(loads)), int((loads == 0).sum())
    )


def imbalance_of(loads: Ints) -> Floats:
    """Busiest expert over the mean, over the last axis; 1 without routes."""
    routes = loads.sum(axis=-1)
    return np.where(routes == 0, 1.0, loads.max(axis=-1) * loads.shape[-1] / np.maximum(routes, 1))


@dataclass(frozen=True)
class Padding:
    """What one block size costs in rows."""

    block_size: int
    blocks: int
    routes: int

    @property
    def rows(self) -> int:
        """Rows that a grouped GEMM computes."""
        return self.blocks * self.block_size

    @property
    def wasted(self) -> float:
        """Fraction of these rows that is padding; 0 without rows."""
        return 1 - self.routes / self.rows if self.rows else 0.0


def padding(loads: Ints, block_size: int) -> Padding:
    """Blocks and padding of `loads` ``[..., num_experts]``, summed over layers and batches."""
    return Padding(block_size, int(blocks_of(loads, block_size).sum()), int(loads.sum()))


def windows(topk_ids: Tensor, num_experts: int, size: int, calls: Sequence[int] = ()) -> Floats:
    """Imbalance (busiest expert over the mean) of each call, or of each run of `size` tokens if there are no `calls`.

    Returns:
        ``[layers, batches]``; at most 512 batches, evenly spread.
    """
    tokens = topk_ids.shape[1]
    bounds = _spread(_bounds(tokens, calls or [min(size, tokens - s) for s in range(0, tokens, size)]), _MAX_WINDOWS)
    return np.stack([imbalance_of(loads_of(topk_ids[:, first:last], num_experts)) for first, last in bounds], axis=1)


def typical_batches(tokens: int, calls: Sequence[int] = ()) -> dict[str, int]:
    """Tokens of a typical ``decode`` and ``prefill`` batch: the median call of at most 256 tokens, and of more.

    Without `calls`: 64 tokens, and all of them.  A kind that does not occur is left out.
    """
    sizes = list(calls) or [min(_DECODE_TOKENS, tokens), tokens]
    kinds = {
        "decode": [size for size in sizes if size <= MAX_DECODE_TOKENS],
        "prefill": [size for size in sizes if size > MAX_DECODE_TOKENS],
    }
    return {kind: statistics.median_low(each) for kind, each in kinds.items() if each}


def pieces(tokens: int, count: int, calls: Sequence[int] = (), max_pieces: int = 8) -> tuple[list[int], bool]:
    """Where at most `max_pieces` batches of `count` tokens begin, and whether they are whole calls.

    If no call has exactly `count` tokens, runs of neighbouring tokens inside longer calls stand for batches.
    """
    whole = [first for first, last in _bounds(tokens, calls) if last - first == count]
    if calls and whole:
        return _spread(whole, max_pieces), True
    if not calls:
        return np.linspace(0, tokens - count, num=min(max_pieces, tokens // count), dtype=int).tolist(), False
    long = [(first, last) for first, last in _bounds(tokens, calls) if last - first > count]
    runs = [start for first, last in _spread(long, max_pieces) for start in range(first, last - count + 1, count)]
    return _spread(runs, max_pieces), False


def piece_loads(
    topk_ids: Tensor, num_experts: int, count: int, calls: Sequence[int] = (), max_pieces: int = 8
) -> tuple[Ints, bool]:
    """Loads ``[layers, pieces, num_experts]`` of the batches that :func:`pieces` finds, and whether they are calls."""
    starts, observed = pieces(topk_ids.shape[1], count, calls, max_pieces)
    loads = [loads_of(topk_ids[:, start : start + count], num_experts) for start in starts]
    return np.stack(loads, axis=1), observed
