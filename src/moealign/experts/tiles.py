"""Which tiles the kernels use: rules by the rows per expert, and tuning files, which override them.

Tiles follow from shapes, dtype and device.  A tuning file is written by ``moealign tune`` or ships with the package.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backend.cache import cache_folder
from ..layout import cdiv
from .quantized import GROUP
from .records import ExpertWeights, Routes

__all__ = [
    "BLOCK_SIZES",
    "NO_LAYOUT_EXPERTS_PER_ROUTE",
    "LayerTiles",
    "Target",
    "Tile",
    "invariant_routes",
    "likely_routes",
    "parse_tuning",
    "select_block_size",
    "select_tiles",
    "target_of",
    "tiles_by_rule",
    "triton_release",
    "tuned",
    "tuning_key",
    "tuning_path",
    "with_block_size",
]

BLOCK_SIZES = (16, 32, 64, 128)
#: From this many experts per route on, two tokens are not aligned: each route is a tile.  One token never is.
NO_LAYOUT_EXPERTS_PER_ROUTE = 8
#: Rows per expert whose tiles a batch-invariant layer takes; where products are wgmma, the least.
PINNED_ROWS = 48
#: Shared memory for the stages of a tile with TMA; 227 KiB are available.
_STAGE_BYTES = 200 * 1024
_SHIPPED = Path(__file__).parents[1] / "data" / "tuned"


class Tile(NamedTuple):
    """The tile of one product and its launch options.  Tuning files store the fields in this order."""

    m: int  # rows: the block size of the layout
    n: int  # output columns; a gate doubles the rows of weights
    k: int  # depth of a step
    group: int  # blocks of rows that share a pass over the columns, for L2
    warps: int
    stages: int
    tma: int = 0  # 1: load weights by TMA; 2: also rows, where they are in layout order
    ctas: int = 0  # programs per SM of a persistent launch; 0: one program per tile
    swap: int = 0  # 1: weights are the left operand
    half_tile_rows: int = 0  # rows of the smaller tile for blocks with few routes; 0: one tile for all blocks


class LayerTiles(NamedTuple):
    """The tiles of a layer."""

    block_size: int  # of the layout; 0: no layout, each route is a tile
    first: Tile
    second: Tile

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> LayerTiles:
        """Read an entry of a tuning file."""
        first, second = (Tile(*map(int, values[name])) for name in ("first", "second"))
        return cls(int(values["block_size"]), first, second)

    def to_json(self) -> dict[str, Any]:
        """The entry of a tuning file."""
        return {"block_size": self.block_size, "first": list(self.first), "second": list(self.second)}


class Target(NamedTuple):
    """What the rules know about a device."""

    name: str
    multiprocessors: int
    hopper: bool  # has TMA and programmatic dependent launch
    fp8: bool = False  # multiplies e4m3
    wgmma: bool = False  # multiplies 16 bits or fewer by wgmma, from 64 rows on: every such tile rounds a product alike
    bandwidth: float = 0.0  # of memory, TB/s; 0: not known

    @property
    def slug(self) -> str:
        return self.name.replace(" ", "_").replace("/", "_")


def triton_release() -> tuple[int, ...]:
    """Major and minor version of the installed Triton."""
    return tuple(map(int, importlib.metadata.version("triton").split(".")[:2]))


@functools.lru_cache(maxsize=16)
def target_of(device: torch.device) -> Target:
    """The facts of `device`; under Triton's interpreter, those of a small GPU without TMA."""
    if device.type != "cuda":
        return Target("interpreter", 4, False)
    properties = torch.cuda.get_device_properties(device)
    # Small Blackwell GPUs have less shared memory.
    enough_memory = getattr(properties, "shared_memory_per_block_optin", 0) >= 227 * 1024
    hopper = torch.version.hip is None and properties.major >= 9 and enough_memory
    fp8 = torch.version.hip is None and (properties.major, properties.minor) >= (8, 9)
    if fp8 and properties.major >= 10:  # Triton before 3.7 stops at some e4m3 products for Blackwell
        fp8 = triton_release() >= (3, 7)
    clock, width = (getattr(properties, name, 0) for name in ("memory_clock_rate", "memory_bus_width"))  # kHz, bits
    bandwidth = 2 * clock * 1e3 * width / 8 / 1e12  # two transfers a cycle
    return Target(
        properties.name, properties.multi_processor_count, hopper, fp8, hopper and properties.major == 9, bandwidth
    )


# ---- rules -----------------------------------------------------------------------------------------------------------


def tiles_by_rule(
    target: Target, routes: int, top_k: int, experts: int, hidden: int, inner: int, itemsize: int
) -> LayerTiles:
    """Tiles by the rows per expert, measured on an H200 and an H100 by benchmarks/sweep_experts.py."""
    rows = routes / max(experts, 1)
    no_layout = routes == top_k or (routes <= 2 * top_k and routes * NO_LAYOUT_EXPERTS_PER_ROUTE <= experts)
    if itemsize == 1:
        return _fp8_tiles(target.hopper, rows, no_layout, inner)
    if itemsize == 4 or not target.hopper:  # tiles that fit any shared memory, without TMA
        m = 16 if no_layout else next((size for size in BLOCK_SIZES if rows <= size * 0.75), 128)
        tile = Tile(m, 64, 32 if itemsize == 4 else 64, 8 if rows > 128 else 2, 8 if m == 128 else 4, 2)
        second = tile if itemsize == 4 or m == 128 else tile._replace(n=128)
        return LayerTiles(0 if no_layout else m, tile._replace(n=32 if m < 64 else 64), second)
    # So few experts that tiles of 128 columns would leave half of the multiprocessors without one.
    few = rows <= 10 and 2 * min(routes, experts) * cdiv(hidden, 128) <= target.multiprocessors
    if no_layout or few:
        deep, size = Tile(16, 64, 128, 1, 4, 6, 1, 0, 1), 0 if no_layout else 16
        return LayerTiles(size, Tile(16, 64, 128, 1, 4, 4), deep if inner > 4096 else Tile(16, 32, 256, 1, 4, 3))
    if rows <= 10:
        deep = Tile(16, 128, 128, 2, 4, 3, 1, 0, 1)
        first = Tile(16, 64, 128, 2, 4, 3, 1, 0, 1)
        return LayerTiles(16, first, deep if inner > 4096 else Tile(16, 128, 128, 1, 4, 3))
    if rows <= 24:
        first = Tile(32, 64, 128, 2, 4, 3, 1, 0, 1) if hidden > 2048 else Tile(32, 64, 64, 2, 4, 4)
        return LayerTiles(32, first, Tile(32, 128, 128, 1, 4, 3))
    if rows <= 48:
        return LayerTiles(64, Tile(64, 64, 128, 2, 4, 4, 1, 0, 1), Tile(64, 128, 64, 2, 4, 3, 1, 0, 1))
    # From here on either a persistent launch, whose loop has no condition, or a half tile, which needs one.  The former
    # pays once products and not weights take the time: from 158 rows on an H100, 108 on an H200.
    halved = Tile(128, 256, 64, 4, 8, 4, 2, 0, 0, 64)
    if rows <= max(96, min(4 * target.multiprocessors / (target.bandwidth or 4.9), 200)):
        return LayerTiles(128, Tile(128, 128, 64, 2, 8, 4, 1, 0, 0, 64), halved)
    if rows <= 200:
        return LayerTiles(128, Tile(128, 128, 64, 2, 8, 4, 1, 1), halved)
    return LayerTiles(128, Tile(128, 128, 64, 8, 8, 4, 1, 1), Tile(128, 256, 64, 8, 8, 4, 2, 1))


def _fp8_tiles(hopper: bool, rows: float, no_layout: bool, inner: int) -> LayerTiles:
    """Tiles of FP8 weights by the rows per expert, measured on an H100 by ``benchmarks/sweep_experts.py --fp8``.  Steps
    are of 128, the inputs that share a scale.  A tile of a gate keeps three sums: two, and that of a step."""
    if not hopper:  # tiles that fit any shared memory, without TMA
        m = 16 if no_layout else next((size for size in BLOCK_SIZES if rows <= size * 0.75), 128)
        tile = Tile(m, 32, 128, 8 if rows > 128 else 2, 4 if m == 16 else 8, 2)
        # Warps are those without spilled registers where products are of float16.
        return LayerTiles(0 if no_layout else m, tile, tile._replace(n=64, warps=4 if m <= 32 else 8))
    if no_layout:
        return LayerTiles(0, Tile(16, 64, 128, 1, 4, 4, 1, 0, 1), Tile(16, 128, 128, 1, 4, 4, 1, 0, 1))
    if rows <= 24:
        m = 16 if rows <= 12 else 32
        return LayerTiles(m, Tile(m, 64, 128, 2, 4, 4, 1, 0, 1), Tile(m, 128, 128, 2, 4, 4, 1, 0, 1))
    if rows <= 96:
        return LayerTiles(64, Tile(64, 64, 128, 2, 4, 4, 1), Tile(64, 128, 128, 2, 4, 4, 2))
    group = 8 if rows > 128 else 2
    if rows > 200 and inner > 4096:
        return LayerTiles(128, Tile(128, 64, 128, group, 8, 4, 1, 2), Tile(128, 128, 128, group, 8, 4, 2, 1))
    return LayerTiles(64, Tile(64, 128, 128, group, 8, 4, 1), Tile(64, 128, 128, group, 4, 4, 2))


def with_block_size(tiles: LayerTiles, size: int, itemsize: int) -> LayerTiles:
    """`tiles` with another block size, and with as many stages as then fit into shared memory."""

    def resized(tile: Tile, products: int) -> Tile:
        n = min(tile.n, 128)
        stage = (size + products * n) * tile.k * itemsize
        return tile._replace(
            m=size,
            n=n,
            warps=8 if size >= 128 else 4,
            stages=max(min(tile.stages, _STAGE_BYTES // stage), 1),
            swap=int(bool(tile.tma) and size < 64),
            half_tile_rows=tile.half_tile_rows if tile.half_tile_rows < size else 0,
        )

    return LayerTiles(size, resized(tiles.first, 2), resized(tiles.second, 1))


# ---- tuning files ----------------------------------------------------------------------------------------------------


def tuning_key(experts: int, top_k: int, hidden: int, inner: int, dtype: torch.dtype) -> str:
    """The name of a layer in a tuning file; `dtype` of its weights."""
    return f"E={experts},k={top_k},H={hidden},I={inner},{str(dtype).removeprefix('torch.')}"


def tuning_path(target: Target) -> Path | None:
    """The file that ``moealign tune`` writes: $MOEALIGN_TUNING, else the device's file in the cache folder; None if
    that folder cannot be used."""
    path = os.environ.get("MOEALIGN_TUNING")
    if path:
        return Path(path)
    folder = cache_folder()
    return folder and folder / "tuned" / f"{target.slug}.json"


@functools.lru_cache(maxsize=16)
def tuned(target: Target) -> dict[str, dict[int, LayerTiles]]:
    """Tiles by layer and number of tokens.  The user's file overrides the one that ships."""
    result: dict[str, dict[int, LayerTiles]] = {}
    for path in (_SHIPPED / f"{target.slug}.json", tuning_path(target)):
        for key, entry in (_read(path) if path else {}).items():
            result.setdefault(key, {}).update(entry)
    return result


def _read(path: Path) -> dict[str, dict[int, LayerTiles]]:
    """The entries of a tuning file; none, after a warning, if it is damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return {}
    try:
        return parse_tuning(data)
    except ValueError as error:
        warnings.warn(f"{path}: expected a tuning file, got {error.__cause__!r}; rules are used instead", stacklevel=3)
        return {}


def parse_tuning(data: bytes) -> dict[str, dict[int, LayerTiles]]:
    """Tiles by layer and number of tokens.

    Raises:
        ValueError: `data` is no tuning file; its cause says why.
    """
    try:
        plans = json.loads(data.decode())["plans"]
        result = {
            key: {int(tokens): LayerTiles.from_json(one) for tokens, one in entry.items()}
            for key, entry in plans.items()
        }
        for key, entry in result.items():
            if min(entry, default=1) < 1:
                raise ValueError(f"{min(entry)} tokens in {key}")
            depths = {tile.k for one in entry.values() for tile in one[1:]}
            if key.endswith("float8_e4m3fn") and depths - {GROUP}:
                raise ValueError(f"steps of {max(depths - {GROUP})} in {key}, whose scales are of {GROUP}")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError("no tuning file") from error
    return result


# ---- the tiles of a call ---------------------------------------------------------------------------------------------


def select_tiles(
    hidden_states: Tensor,
    weights: ExpertWeights,
    routes: Routes,
    block_size: int | None = None,
    target: Target | None = None,
    batch_invariant: bool = False,
    expected_routes: int | None = None,
) -> LayerTiles:
    """The tiles of one call: those tuned for the nearest number of tokens, else those of the rule.

    With `batch_invariant`, those of the rule for :func:`invariant_routes`.

    Args:
        expected_routes: how many routes are likely to have an expert here; by default all, of `expert_map`'s experts.
    """
    target = target or target_of(hidden_states.device)
    top_k = routes.ids.shape[1]
    likely = likely_routes(weights, routes, expected_routes)
    itemsize = hidden_states.element_size() if weights.quantized is None else 1
    sizes = (weights.experts(), weights.hidden(), weights.inner())
    known = tuned(target)
    if batch_invariant:
        alike = invariant_routes(target, likely, sizes[0], itemsize)
        tiles = tiles_by_rule(target, alike, 0, *sizes, itemsize)
        return tiles if block_size is None else with_block_size(tiles, block_size, itemsize)
    entry = known and known.get(tuning_key(sizes[0], top_k, *sizes[1:], weights.gate_up.dtype))
    if entry and block_size is None:
        tiles = entry[min(entry, key=lambda count: abs(math.log(count * top_k / max(likely, 1))))]
    else:
        tiles = tiles_by_rule(target, likely, top_k, *sizes, itemsize)
        if block_size is not None:
            tiles = with_block_size(tiles, block_size, itemsize)
    no_layout = (
        tiles.block_size == 0
        and block_size is None
        and likely == routes.ids.numel()
        and routes.expert_map is None
        and routes.num_valid_tokens is None
        and routes.ids.dtype in (torch.int32, torch.int64)
    )
    return tiles if no_layout else tiles._replace(block_size=tiles.first.m)


def likely_routes(weights: ExpertWeights, routes: Routes, expected: int | None) -> int:
    """How many routes are likely to have an expert here: those `expected`, else all, of which `expert_map` leaves the
    share of the local experts.  All of one or two tokens, whose tiles were measured that way."""
    count = routes.ids.numel()
    if routes.ids.shape[0] <= 2:
        return count
    if expected is not None:
        return min(expected, count)
    if routes.expert_map is None:
        return count
    return cdiv(count * weights.experts(), max(routes.expert_map.numel(), weights.experts(), 1))


def invariant_routes(target: Target, routes: int, experts: int, itemsize: int) -> int:
    """The routes whose tiles a batch-invariant layer takes, forward and backward.

    Where products are wgmma, the sum of an output runs over the same 16 inputs at a time in every tile, so that a batch
    takes its own tiles from :data:`PINNED_ROWS` rows per expert on.  Elsewhere one tile serves all batches.
    """
    pinned = PINNED_ROWS * experts
    return max(routes, pinned) if target.wgmma and itemsize < 4 else pinned


def select_block_size(
    hidden_states: Tensor, weights: ExpertWeights, routes: Routes, expected_routes: int | None = None
) -> int:
    """The rule's block size for a layer with a callable between the products."""
    target = target_of(hidden_states.device)
    sizes = (weights.experts(), hidden_states.shape[1], weights.inner())
    itemsize = hidden_states.element_size() if weights.quantized is None else 1
    return tiles_by_rule(target, likely_routes(weights, routes, expected_routes), 1, *sizes, itemsize).first.m
