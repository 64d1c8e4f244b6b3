"""Find fast tiles for a layer of experts on this GPU, and write them to the file that :func:`moealign.fused_moe` reads.

The search is greedy: the rule's tiles for this and for other numbers of rows per expert, then the neighbours of the two
best ones' first tile, then those of the best one's second tile.  A candidate is timed only if its result is right.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import BackendUnavailable
from ..timing import graph_us
from . import launch
from .layer import fused_moe
from .quantized import QuantizedWeights, scales_shape
from .records import ExpertWeights, Routes
from .tiles import LayerTiles, Target, Tile, target_of, tiles_by_rule, tuned, tuning_key

__all__ = ["Shape", "TuningResult", "neighbours", "search", "starting_tiles", "tune", "write"]

MAX_RELATIVE_ERROR = 2e-2  # against the packed path, in the layer's dtype
MAX_RELATIVE_ERROR_FP8 = 3e-2  # there the paths round activated rows apart
SLOTS = 4  # inputs that the calls of a graph use in turn, so that no weights stay in L2


class Shape(NamedTuple):
    """A layer of experts."""

    experts: int
    top_k: int
    hidden: int
    inner: int  # columns of down_proj; gate_up_proj has twice as many rows
    dtype: torch.dtype = torch.bfloat16  # of the weights: torch.float8_e4m3fn by blocks of 128 x 128

    @property
    def key(self) -> str:
        return tuning_key(*self)

    @property
    def fp8(self) -> bool:
        return self.dtype is torch.float8_e4m3fn

    @property
    def rows(self) -> torch.dtype:
        """The dtype of the hidden states."""
        return torch.bfloat16 if self.fp8 else self.dtype


class TuningResult(NamedTuple):
    """The best tiles for one number of tokens."""

    tokens: int
    tiles: LayerTiles
    microseconds: float
    by_rule: float  # microseconds of the rule's tiles
    tried: int


def starting_tiles(target: Target, shape: Shape, tokens: int) -> list[LayerTiles]:
    """The rule's tiles for this many tokens first, then those for fewer and for more."""
    sizes = (shape.top_k, shape.experts, shape.hidden, shape.inner, shape.dtype.itemsize)
    routes = tokens * shape.top_k
    candidates = [tiles_by_rule(target, routes, *sizes)]
    for factor in (0.25, 0.5, 2.0, 4.0):
        # At least three tokens: never one tile per route.
        candidates.append(tiles_by_rule(target, max(int(routes * factor), 3 * shape.top_k), *sizes))
    return list(dict.fromkeys(candidates))


def neighbours(tile: Tile, fp8: bool = False) -> list[Tile]:
    """Tiles that differ from `tile` by one step, with the same number of rows and, with FP8 weights, the same depth."""
    tiles = [tile._replace(n=n) for n in (tile.n // 2, tile.n * 2) if 16 <= n <= 256]
    if fp8:  # the inputs that share a scale; the sum of a step needs registers
        tiles.append(tile._replace(warps=4 if tile.warps == 8 else 8))
    else:
        tiles += [tile._replace(k=k) for k in (tile.k // 2, tile.k * 2) if 32 <= k <= 256]
    tiles += [tile._replace(stages=stages) for stages in (tile.stages - 1, tile.stages + 1) if 2 <= stages <= 6]
    tiles.append(tile._replace(ctas=0) if tile.ctas else tile._replace(ctas=1, half_tile_rows=0))
    tiles.append(tile._replace(group=2 if tile.group > 2 else 8))
    if tile.m == 128:
        tiles.append(tile._replace(half_tile_rows=0 if tile.half_tile_rows else 64))
    return tiles


def search(
    start: Sequence[LayerTiles], measure: Callable[[LayerTiles], float], fp8: bool = False
) -> tuple[LayerTiles, float, float, int]:
    """Search from `start`; candidates that cannot run must measure as infinite.

    Returns:
        The best tiles, their time, the time of ``start[0]``, and the number of candidates measured.
    """
    times: dict[LayerTiles, float] = {}

    def best() -> list[LayerTiles]:
        return sorted(times, key=lambda candidate: times[candidate])

    def measure_all(candidates: Sequence[LayerTiles]) -> None:
        for candidate in candidates:
            if candidate not in times:
                times[candidate] = measure(candidate)

    measure_all(start)
    for candidate in best()[:2]:
        measure_all([candidate._replace(first=tile) for tile in neighbours(candidate.first, fp8)])
    measure_all([best()[0]._replace(second=tile) for tile in neighbours(best()[0].second, fp8)])
    winner = best()[0]
    return winner, times[winner], times[start[0]], len(times)


def tune(shape: Shape, tokens: Sequence[int], device: torch.device, seed: int = 0) -> Iterator[TuningResult]:
    """Search for each number of tokens in turn, on random weights of the layer's size.

    Raises:
        BackendUnavailable: the kernels do not run on `device`.
    """
    experts, top_k, hidden, inner, _ = shape
    dtype = shape.rows
    probe = torch.empty(0, dtype=dtype, device=device)
    reason = launch.refuses(probe) or (None if device.type == "cuda" else "times are taken on a GPU")
    if reason is not None:
        raise BackendUnavailable(f"tune: expected a device that the kernels run on, got {device}: {reason}")
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*size: int) -> Tensor:
        scale: float = size[-1] ** -0.5
        return torch.randn(size, generator=generator, device=device, dtype=dtype) * scale

    def quantized(*size: int) -> QuantizedWeights:
        data = torch.empty(size, dtype=torch.float8_e4m3fn, device=device)
        for expert in data:  # one at a time, for memory
            expert.copy_(randn(*size[1:]) * (100 * size[-1] ** 0.5))
        scales = torch.full(scales_shape(data, (128, 128)), size[-1] ** -0.5 / 100, device=device)
        return QuantizedWeights(data, scales, (128, 128))

    sizes = (experts, 2 * inner, hidden), (experts, hidden, inner)
    if shape.fp8:
        both = quantized(*sizes[0]), quantized(*sizes[1])
        weights = ExpertWeights(both[0].data, both[1].data, quantized=both)
    else:
        weights = ExpertWeights(randn(*sizes[0]), randn(*sizes[1]))
    for count in tokens:
        inputs = []
        for _ in range(SLOTS if count <= 512 else 1):
            scores = torch.rand(count, experts, generator=generator, device=device)
            values, ids = scores.topk(top_k, 1)
            inputs.append((randn(count, hidden) * hidden**0.5, Routes(values.softmax(1), ids.to(torch.int32))))
        measure = _measurement(weights, inputs)
        yield TuningResult(count, *search(starting_tiles(target_of(device), shape, count), measure, shape.fp8))


def _measurement(weights: ExpertWeights, inputs: Sequence[tuple[Tensor, Routes]]) -> Callable[[LayerTiles], float]:
    """A function that returns the microseconds of a layer with some tiles; infinite if they fail or are wrong."""
    x, routes = inputs[0]
    gate_up, down = weights.quantized or weights[:2]
    most = MAX_RELATIVE_ERROR if weights.quantized is None else MAX_RELATIVE_ERROR_FP8
    expected = fused_moe(x, gate_up, down, routes.weights, routes.ids, backend="packed").float()

    def run(tiles: LayerTiles, slot: int) -> Tensor:
        x, routes = inputs[slot]
        layout = routes.layout(tiles.block_size, weights.experts()) if tiles.block_size else None
        return launch.run_layer(tiles, x, weights, routes, layout, "silu")

    def measure(tiles: LayerTiles) -> float:
        try:
            error = float((run(tiles, 0).float() - expected).norm() / expected.norm())
            if not error < most:
                return float("inf")
            calls = [lambda slot=slot: run(tiles, slot) for slot in range(len(inputs))]  # type: ignore[misc]
            return graph_us(calls, warm_up=len(inputs), min_replays=5, max_replays=50, budget_us=5_000.0)
        except Exception:  # tiles that do not compile or launch are no candidates
            torch.cuda.synchronize(x.device)
            return float("inf")

    return measure


def write(path: Path, shape: Shape, results: Sequence[TuningResult], about: dict[str, str]) -> None:
    """Add the results to the file at `path`, keeping its entries of other layers and other numbers of tokens."""
    contents: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    entry = contents.setdefault("plans", {}).setdefault(shape.key, {})
    for one in results:
        entry[str(one.tokens)] = {**one.tiles.to_json(), "microseconds": round(one.microseconds, 1)}
    contents["about"] = about
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(contents, indent=1, sort_keys=True) + "\n")
    tuned.cache_clear()
