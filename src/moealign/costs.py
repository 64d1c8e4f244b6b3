"""What block sizes and placements cost on given routes: a stated model, and a measurement where there is a GPU.

Ids come in as one tensor ``[layers, tokens, top_k]``; everything is counted in numpy from the number of routes of each
expert, which decides blocks and padding alone.
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
    "Machine",
    "PlacementGain",
    "Recommendation",
    "blocks_of",
    "cost",
    "loads_of",
    "measure",
    "measured_machine",
    "placement_gain",
    "recommend_by_tokens",
    "windows",
]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Machine:
    """The three rates that the model divides by."""

    name: str
    memory: float  #: bytes a second from the device's memory
    cache: float  #: bytes a second from its last-level cache
    matrix: float  #: floating-point operations a second of a large bf16 product


#: Used where there is no GPU to measure.  Memory: a large copy in benchmarks/results/align_h200.csv (floor-bytes).  The
#: cache's rate and the products' are assumptions, near what is published for the chip.
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
        """Read and written for one route: hidden state in, gate and up out, their product in, result out."""
        return (2 * self.hidden + 3 * self.intermediate) * self.bytes

    @property
    def row_operations(self) -> int:
        return 6 * self.hidden * self.intermediate


@dataclass(frozen=True)
class Cost:
    """Microseconds of one layer by the model, part by part; they are taken not to overlap."""

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


def cost(loads: Ints, block_size: int, experts: Experts, machine: Machine) -> Cost:
    """The model, for one layer's `loads` ``[num_experts]`` (or the mean over layers, for ``[layers, num_experts]``).

    With ``W`` an expert's weight bytes, ``hit`` experts that have a route, ``n`` routes, ``b`` blocks of ``B`` rows::

        memory = (hit * W + n * row_bytes) / machine.memory
        cache  = (b - hit) * W / machine.cache
        matrix = b * B * 6 * hidden * intermediate / machine.matrix

    The first block of an expert reads its weights from memory, each further one from the cache; a padding row is
    multiplied like any other.  Launches, waves and what overlaps are left out: it ranks block sizes, it does not
    predict a time.
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
    tokens = topk_ids.shape[1]
    columns = []
    for first in range(0, tokens, size):
        loads = loads_of(topk_ids[:, first : first + size], num_experts)
        columns.append(loads.max(axis=1) / np.maximum(loads.mean(axis=1), 1e-300))
    return np.where(np.stack(columns, axis=1) == 0, 1.0, np.stack(columns, axis=1))


@dataclass(frozen=True)
class Recommendation:
    """For a number of tokens, what each block size costs and wastes, and which one is cheapest."""

    tokens: int
    costs: list[float]  #: microseconds a layer by the model, one for each block size
    wasted: list[float]  #: part of the rows that is padding
    block_size: int  #: the cheapest; the larger one where two cost the same


def recommend_by_tokens(
    topk_ids: Tensor, num_experts: int, sizes: Sequence[int], experts: Experts, machine: Machine, most: int = 8
) -> list[Recommendation]:
    """A row for 1, 2, 4, ... tokens and all of them: the mean over at most `most` pieces of that length."""
    tokens = topk_ids.shape[1]
    counts = sorted({min(2**i, tokens) for i in range(tokens.bit_length() + 1)})
    found = []
    for count in counts:
        starts = np.linspace(0, tokens - count, num=min(most, tokens // count), dtype=int)
        loads = np.concatenate([loads_of(topk_ids[:, s : s + count], num_experts) for s in starts])
        costs = [cost(loads, size, experts, machine).total for size in sizes]
        rows = [int(blocks_of(loads, size).sum()) * size for size in sizes]
        wasted = [1 - int(loads.sum()) / r if r else 0.0 for r in rows]
        best = min(range(len(sizes)), key=lambda i: (costs[i], -sizes[i]))
        found.append(Recommendation(count, costs, wasted, sizes[best]))
    return found


@dataclass(frozen=True)
class PlacementGain:
    """How uneven the ranks are under each placement: busiest rank over the mean, all layers together."""

    ranks: int
    linear: float
    round_robin: float
    balanced: float
    replicated: float  #: balanced with one more slot a rank
    informed: float  #: balanced by the very tokens it is judged on: what is to be had at the most, without copies


def placement_gain(topk_ids: Tensor, num_experts: int, ranks: Sequence[int]) -> list[PlacementGain]:
    """Placements made from the first half of the tokens, judged on the second half, which they have not seen.

    Every layer has a placement of its own.  A layer lasts as long as its busiest rank, so the figure for a model is
    the sum over layers of the busiest rank's load, over the sum of the mean loads.
    """
    tokens = topk_ids.shape[1]
    half = max(1, tokens // 2)
    seen, judged = loads_of(topk_ids[:, :half], num_experts), loads_of(topk_ids[:, tokens - half :], num_experts)

    def waiting(place: Callable[[Ints], Ints], known: Ints = seen) -> float:
        busiest = sum(float(placement.rank_loads(place(a), b).max()) for a, b in zip(known, judged, strict=True))
        return busiest * n / float(judged.sum()) if judged.any() else 1.0

    found = []
    for n in ranks:
        copies = min(n, num_experts * (n - 1))
        found.append(
            PlacementGain(
                n,
                linear=waiting(lambda loads, n=n: placement.linear(num_experts, n)),  # type: ignore[misc]
                round_robin=waiting(lambda loads, n=n: placement.round_robin(num_experts, n)),  # type: ignore[misc]
                balanced=waiting(lambda loads, n=n: placement.balanced(loads, n)),  # type: ignore[misc]
                replicated=waiting(lambda loads, n=n, c=copies: placement.balanced(loads, n, c)),  # type: ignore[misc]
                informed=waiting(lambda loads, n=n: placement.balanced(loads, n), judged),  # type: ignore[misc]
            )
        )
    return found


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
    """Microseconds a layer takes at each block size: align, both products with the activation between, in bf16.

    Args:
        topk_ids: ``[layers, tokens, top_k]``; the middle layer is measured.
        num_experts: experts, whose weights are random and all held on the device.
        sizes: block sizes.
        experts: the sizes of one.
        gemm: ``gemm(rows, weights, layout, top_k=..., activation=...)``, by default the library's grouped_gemm.
        timer: what times a call; by default a CUDA graph's replay.
        device: where.

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
    """The three rates, measured on `device` in a second: copies of 1 GiB and of 8 MiB, a product of 8,192 ** 3."""
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
