"""What block sizes and placements cost for the routes of a trace: a stated model, and a measurement on a GPU.

Input is one tensor of ids ``[layers, tokens, top_k]``.  Everything follows from the loads, the number of routes of each
expert: they alone decide blocks and padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import placement
from .alignment import align
from .errors import BackendUnavailable, InvalidInput
from .experts.gemm import grouped_gemm
from .layout import BlockLayout
from .timing import graph_us

__all__ = [
    "H200",
    "Cost",
    "Experts",
    "LoadSummary",
    "Machine",
    "Padding",
    "PlacementGain",
    "Recommendation",
    "blocks_of",
    "cost",
    "loads_of",
    "measure",
    "measured_machine",
    "padding",
    "placement_gain",
    "recommend",
    "recommend_by_tokens",
    "summarize",
    "windows",
]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Machine:
    """The three rates of the cost model."""

    name: str
    memory: float  #: bytes a second from the device's memory
    cache: float  #: bytes a second from its last-level cache
    matrix: float  #: floating-point operations a second of a large bf16 product


#: The default without a GPU to measure.  Memory: a large copy in benchmarks/results/align_h200.csv (floor-bytes).
#: The rates of the cache and the products are assumptions, close to the published ones.
H200 = Machine("H200, memory as measured, cache and products assumed", memory=4.18e12, cache=5.5e12, matrix=790e12)


@dataclass(frozen=True)
class Experts:
    """The sizes of one expert: gate, up and down projections of a gated layer."""

    hidden: int = 2048
    intermediate: int = 768
    bytes: int = 2  #: of one weight or activation

    def __post_init__(self) -> None:
        if self.hidden < 1 or self.intermediate < 1 or self.bytes < 1:
            raise InvalidInput(
                f"hidden, intermediate, bytes: expected at least 1 each, got {self.hidden}, {self.intermediate} and "
                f"{self.bytes}"
            )

    @property
    def weight_bytes(self) -> int:
        return 3 * self.hidden * self.intermediate * self.bytes

    @property
    def row_bytes(self) -> int:
        """Bytes read and written for one route: hidden state in, gate and up out, their product in, result out."""
        return (2 * self.hidden + 3 * self.intermediate) * self.bytes

    @property
    def row_operations(self) -> int:
        return 6 * self.hidden * self.intermediate


@dataclass(frozen=True)
class Cost:
    """Microseconds of one layer by the model.  The three parts are added, as if nothing overlapped."""

    memory: float  #: weights of the experts that were hit, once, and the routes' activations
    cache: float  #: weights again for every further block of an expert
    matrix: float  #: products of all rows, padding included

    @property
    def total(self) -> float:
        return self.memory + self.cache + self.matrix


def loads_of(topk_ids: Tensor, num_experts: int) -> Ints:
    """Kept routes of each expert, ``[layers, num_experts]``, of `topk_ids` ``[layers, tokens, top_k]``."""
    flat = topk_ids.reshape(topk_ids.shape[0], -1).to("cpu", torch.int64).numpy()
    return np.stack([np.bincount(row[(row >= 0) & (row < num_experts)], minlength=num_experts) for row in flat])


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
        int(loads.min()), int(np.median(loads)), int(loads.max()), float(_imbalance(loads)), int((loads == 0).sum())
    )


def _imbalance(loads: Ints) -> Floats:
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
    """Blocks and padding of `loads`, of one layer ``[num_experts]`` or several ``[layers, num_experts]``."""
    return Padding(block_size, int(blocks_of(loads, block_size).sum()), int(loads.sum()))


def cost(loads: Ints, block_size: int, experts: Experts, machine: Machine) -> Cost:
    """The model, for one layer's `loads` ``[num_experts]`` (or the mean over layers, for ``[layers, num_experts]``).

    With ``W`` an expert's weight bytes, ``hit`` experts that have a route, ``n`` routes, ``b`` blocks of ``B`` rows::

        memory = (hit * W + n * row_bytes) / machine.memory
        cache  = (b - hit) * W / machine.cache
        matrix = b * B * 6 * hidden * intermediate / machine.matrix

    The first block of an expert reads its weights from memory, each further block reads them from the cache; padding
    rows are multiplied like any others.  The model ignores launches, waves and overlap: it ranks block sizes and
    predicts no time.
    """
    per_layer = np.atleast_2d(loads)
    layers = len(per_layer)
    blocks = int(blocks_of(per_layer, block_size).sum())
    hit, routes = int((per_layer > 0).sum()), int(per_layer.sum())
    scale = 1e6 / layers
    return Cost(
        memory=(hit * experts.weight_bytes + routes * experts.row_bytes) / machine.memory * scale,
        cache=(blocks - hit) * experts.weight_bytes / machine.cache * scale,
        matrix=blocks * block_size * experts.row_operations / machine.matrix * scale,
    )


def windows(topk_ids: Tensor, num_experts: int, size: int) -> Floats:
    """Imbalance of each run of `size` tokens, ``[layers, cdiv(tokens, size)]``: busiest expert over the mean."""
    starts = range(0, topk_ids.shape[1], size)
    runs = [_imbalance(loads_of(topk_ids[:, start : start + size], num_experts)) for start in starts]
    return np.stack(runs, axis=1)


@dataclass(frozen=True)
class Recommendation:
    """The cost and the padding of each block size for a number of tokens, and the cheapest size."""

    tokens: int
    costs: list[float]  #: microseconds a layer by the model, one for each block size
    wasted: list[float]  #: fraction of the rows that is padding
    block_size: int  #: the cheapest; the larger one where two cost the same


def recommend(loads: Ints, tokens: int, sizes: Sequence[int], experts: Experts, machine: Machine) -> Recommendation:
    """The cheapest of `sizes` by the model for `loads` ``[layers, num_experts]`` of `tokens` tokens each."""
    costs = [cost(loads, size, experts, machine).total for size in sizes]
    best = min(range(len(sizes)), key=lambda i: (costs[i], -sizes[i]))
    return Recommendation(tokens, costs, [padding(loads, size).wasted for size in sizes], sizes[best])


def recommend_by_tokens(
    topk_ids: Tensor, num_experts: int, sizes: Sequence[int], experts: Experts, machine: Machine, most: int = 8
) -> list[Recommendation]:
    """One row each for 1, 2, 4, ... and all tokens: the mean over at most `most` pieces of that length."""
    tokens = topk_ids.shape[1]
    rows = []
    for count in sorted({min(2**i, tokens) for i in range(tokens.bit_length() + 1)}):
        starts = np.linspace(0, tokens - count, num=min(most, tokens // count), dtype=int)
        loads = np.concatenate([loads_of(topk_ids[:, s : s + count], num_experts) for s in starts])
        rows.append(recommend(loads, count, sizes, experts, machine))
    return rows


@dataclass(frozen=True)
class PlacementGain:
    """Imbalance of the ranks under each placement: busiest rank over the mean, over all layers."""

    ranks: int
    linear: float
    round_robin: float
    balanced: float
    replicated: float  #: balanced, with one more slot on each rank
    informed: float  #: balanced by the tokens it is judged on: the best possible without copies


def placement_gain(topk_ids: Tensor, num_experts: int, ranks: Sequence[int]) -> list[PlacementGain]:
    """Placements computed from the first half of the tokens and judged on the second half.

    Every layer has its own placement.  A layer takes as long as its busiest rank, so the result for a model is the sum
    over layers of the busiest rank's load, divided by the sum of the mean loads.
    """
    tokens = topk_ids.shape[1]
    half = max(1, tokens // 2)
    known, judged = loads_of(topk_ids[:, :half], num_experts), loads_of(topk_ids[:, tokens - half :], num_experts)

    def imbalance(place: Callable[[Ints], Ints], known: Ints = known) -> float:
        busiest = sum(float(placement.rank_loads(place(a), b).max()) for a, b in zip(known, judged, strict=True))
        return busiest * n / float(judged.sum()) if judged.any() else 1.0

    gains = []
    for n in ranks:
        copies = min(n, num_experts * (n - 1))
        gains.append(
            PlacementGain(
                n,
                linear=imbalance(lambda loads, n=n: placement.linear(num_experts, n)),  # type: ignore[misc]
                round_robin=imbalance(lambda loads, n=n: placement.round_robin(num_experts, n)),  # type: ignore[misc]
                balanced=imbalance(lambda loads, n=n: placement.balanced(loads, n)),  # type: ignore[misc]
                replicated=imbalance(lambda loads, n=n, c=copies: placement.balanced(loads, n, c)),  # type: ignore[misc]
                informed=imbalance(lambda loads, n=n: placement.balanced(loads, n), judged),  # type: ignore[misc]
            )
        )
    return gains


# ---- on a GPU ----------------------------------------------------------------------------------------------------

GroupedGemm = Callable[..., Tensor]


def median_graph_us(call: Callable[[], object], replays: int = 15, calls: int = 5) -> float:
    """Median device time of a call in microseconds: a CUDA graph of `calls` calls, after two calls to warm up."""
    return graph_us([call] * calls, warm_up=2, min_replays=replays, max_replays=replays, untimed_replays=0)


def measure(
    topk_ids: Tensor,
    num_experts: int,
    sizes: Sequence[int],
    experts: Experts,
    gemm: GroupedGemm | None = None,
    timer: Callable[[Callable[[], object]], float] = median_graph_us,
    device: torch.device | str = "cuda",
) -> list[float]:
    """Microseconds of a layer at each block size: alignment, both products and the activation between, in bf16.

    Args:
        topk_ids: ``[layers, tokens, top_k]``; the middle layer is measured.
        num_experts: number of experts; their random weights must all fit on the device.
        sizes: block sizes.
        experts: the sizes of one expert.
        gemm: ``gemm(rows, weights, layout, top_k=..., activation=...)``, by default :func:`moealign.grouped_gemm`.
        timer: returns the microseconds of a call; by default from replays of a CUDA graph.
        device: the device to measure.

    Raises:
        BackendUnavailable: too little free memory for the weights.
    """
    product = gemm if gemm is not None else grouped_gemm
    device = torch.device(device)
    weights = num_experts * experts.weight_bytes
    if device.type == "cuda" and weights > 0.6 * torch.cuda.mem_get_info(device)[0]:
        raise BackendUnavailable(f"the experts' weights take {weights / 2**30:.1f} GiB, more than 0.6 of what is free")
    ids = topk_ids[topk_ids.shape[0] // 2].to(device, torch.int32).contiguous()
    tokens, top_k = ids.shape
    draw = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device=device, dtype=torch.bfloat16).mul_(shape[-1] ** -0.5)

    hidden = random(tokens, experts.hidden)
    gate_up = random(num_experts, 2 * experts.intermediate, experts.hidden)
    down = random(num_experts, experts.hidden, experts.intermediate)
    times = []
    for size in sizes:

        def layer(size: int = size) -> Tensor:
            layout: BlockLayout = align(ids, block_size=size, num_experts=num_experts)
            inner = product(hidden, gate_up, layout, top_k=top_k, activation="silu_mul")
            return product(inner, down, layout, top_k=1)

        with torch.no_grad():
            times.append(timer(layer))
    return times


def measured_machine(device: torch.device | str = "cuda") -> Machine:
    """The three rates, measured on `device` within a second: copies of 1 GiB and 8 MiB, a product of 8,192 ** 3."""
    device = torch.device(device)

    def copied(elements: int, calls: int) -> float:
        source = torch.zeros(elements, dtype=torch.int32, device=device)
        target = torch.empty_like(source)
        return 8 * elements / median_graph_us(lambda: target.copy_(source), calls=calls) * 1e6

    side = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    out: Any = torch.empty_like(side)
    return Machine(
        f"{torch.cuda.get_device_name(device)}, measured here",
        memory=copied(2**28, calls=2),
        cache=copied(2**21, calls=100),
        matrix=2 * 8192**3 / median_graph_us(lambda: torch.mm(side, side.T, out=out), calls=3) * 1e6,
    )
