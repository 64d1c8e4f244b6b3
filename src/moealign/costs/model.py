"""The cost model: what a layer, its alignment and its placement cost for given loads, without measuring anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .. import placement
from ..errors import InvalidInput
from ..trace import Trace
from .loads import Ints, blocks_of, loads_of, padding, piece_loads, typical_batches

__all__ = [
    "ALIGNMENT_US",
    "H200",
    "LAUNCH_US",
    "BatchCost",
    "Cost",
    "Experts",
    "Machine",
    "PlacementGain",
    "Recommendation",
    "advise",
    "alignment_us",
    "cost",
    "experts_of",
    "place",
    "placement_gain",
    "recommend",
    "recommend_by_tokens",
]


@dataclass(frozen=True)
class Machine:
    """The three rates of the cost model."""

    name: str
    memory: float  #: bytes a second from the device's memory
    cache: float  #: bytes a second from its last-level cache
    matrix: float  #: floating-point operations a second of a large bf16 product


#: The default without a GPU to measure.  Memory: a large copy in benchmarks/results/align_h200.csv (floor-bytes).
#: The rates of the cache and the products are assumptions, close to the published ones.
H200 = Machine("H200 (memory as measured, cache and products assumed)", memory=4.18e12, cache=5.5e12, matrix=790e12)

#: (routes, microseconds) of one alignment by the ``cuda`` backend on an H200, from benchmarks/results/align_h200.csv.
ALIGNMENT_US = (
    (8, 1.10), (128, 1.30), (512, 1.76), (4096, 2.52), (32768, 4.26), (131072, 5.52), (524288, 8.78)
)  # fmt: skip
LAUNCH_US = 0.57  #: microseconds of an empty kernel in a CUDA graph, from the same file (floor-empty)
_MAX_PLACED_EXPERTS = 2048  # computing placements of more takes too long for a report


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

    def __str__(self) -> str:
        return f"{self.hidden:,} x {self.intermediate:,}"

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


def experts_of(trace: Trace, hidden: int | None = None, intermediate: int | None = None) -> tuple[Experts, str]:
    """The sizes of one expert, and their source: "as given", "from the trace", or "assumed" if neither says.

    Args:
        trace: may hold ``hidden`` and ``intermediate`` in its metadata.
        hidden, intermediate: take precedence over the trace.
    """
    sizes = hidden or trace.hidden, intermediate or trace.intermediate
    defaults = Experts()
    known = sizes[0] is not None and sizes[1] is not None
    source = "assumed" if not known else "from the trace" if not hidden and not intermediate else "as given"
    return Experts(sizes[0] or defaults.hidden, sizes[1] or defaults.intermediate), source


@dataclass(frozen=True)
class Cost:
    """Microseconds of one layer by the model.  The three parts are added, as if nothing overlapped."""

    memory: float  #: weights of the experts that were hit, once, and the routes' activations
    cache: float  #: weights again for every further block of an expert
    matrix: float  #: products of all rows, padding included

    @property
    def total(self) -> float:
        return self.memory + self.cache + self.matrix


def cost(loads: Ints, block_size: int, experts: Experts, machine: Machine) -> Cost:
    """The model for one layer and batch, or the mean over them, of `loads` ``[..., num_experts]``.

    With ``W`` an expert's weight bytes, ``hit`` experts that have a route, ``n`` routes, ``b`` blocks of ``B`` rows::

        memory = (hit * W + n * row_bytes) / machine.memory
        cache  = (b - hit) * W / machine.cache
        matrix = b * B * 6 * hidden * intermediate / machine.matrix

    The first block of an expert reads its weights from memory, each further block reads them from the cache; padding
    rows are multiplied like any others.  The model ignores launches, waves and overlap.  It is meant to rank block
    sizes; at the layers and batches of benchmarks/results/experts_h200.csv its times are 0.8 to 1.7 times the measured.
    """
    per_layer = loads.reshape(-1, loads.shape[-1])
    layers = len(per_layer)
    blocks = int(blocks_of(per_layer, block_size).sum())
    hit, routes = int((per_layer > 0).sum()), int(per_layer.sum())
    scale = 1e6 / layers
    return Cost(
        memory=(hit * experts.weight_bytes + routes * experts.row_bytes) / machine.memory * scale,
        cache=(blocks - hit) * experts.weight_bytes / machine.cache * scale,
        matrix=blocks * block_size * experts.row_operations / machine.matrix * scale,
    )


@dataclass(frozen=True)
class Recommendation:
    """The cost and the padding of each block size for a number of tokens, and the cheapest size."""

    tokens: int
    costs: list[float]  #: microseconds per layer by the model, one for each block size
    wasted: list[float]  #: fraction of the rows that is padding
    block_size: int  #: the cheapest; the larger one where two cost the same
    observed: bool = False  #: whether these are whole calls of the model, not runs of neighbouring tokens


def recommend(
    loads: Ints, tokens: int, sizes: Sequence[int], experts: Experts, machine: Machine, observed: bool = False
) -> Recommendation:
    """The cheapest of `sizes` by the model for `loads` ``[..., num_experts]`` of `tokens` tokens each."""
    costs = [cost(loads, size, experts, machine).total for size in sizes]
    best = min(range(len(sizes)), key=lambda i: (costs[i], -sizes[i]))
    return Recommendation(tokens, costs, [padding(loads, size).wasted for size in sizes], sizes[best], observed)


def recommend_by_tokens(
    topk_ids: Tensor,
    num_experts: int,
    sizes: Sequence[int],
    experts: Experts,
    machine: Machine,
    max_pieces: int = 8,
    calls: Sequence[int] = (),
) -> list[Recommendation]:
    """One row each for 1, 2, 4, ... and the most tokens of a batch, and for the sizes of calls that occur most.

    Each is the mean over at most `max_pieces` batches, calls of the model if some have that size (``observed``), else
    runs of neighbouring tokens.
    """
    tokens = topk_ids.shape[1]
    longest = max(calls, default=tokens)
    counts = {min(2**i, longest) for i in range(longest.bit_length() + 1)}
    counts |= {*typical_batches(tokens, calls).values(), *(count for count, _ in Counter(calls).most_common(8))}
    rows = []
    for count in sorted(counts):
        loads, observed = piece_loads(topk_ids, num_experts, count, calls, max_pieces)
        rows.append(recommend(loads, count, sizes, experts, machine, observed))
    return rows


def alignment_us(routes: int) -> float:
    """Microseconds of one alignment, interpolated in :data:`ALIGNMENT_US`; beyond its ends, the first, and in
    proportion to the routes."""
    known, times = zip(*ALIGNMENT_US, strict=True)
    if routes > known[-1]:
        return float(times[-1] * routes / known[-1])
    return float(np.exp(np.interp(np.log(max(routes, 1)), np.log(known), np.log(times))))


@dataclass(frozen=True)
class BatchCost:
    """What a typical batch costs in one layer, at the block size that is cheapest for it."""

    kind: str  #: "decode" or "prefill"
    tokens: int
    observed: bool  #: whether the trace has such batches; otherwise runs of neighbouring tokens stand for them
    block_size: int
    wasted: float  #: fraction of the rows that is padding
    alignment: float  #: microseconds
    layer: float  #: microseconds of alignment and both products
    measured: bool  #: on this machine; otherwise both times are modelled

    @property
    def share(self) -> float:
        """Fraction of the layer's time that alignment takes."""
        return self.alignment / self.layer


def advise(trace: Trace, sizes: Sequence[int], experts: Experts, machine: Machine = H200) -> list[BatchCost]:
    """The cheapest of `sizes` by the model for each kind of batch (:func:`typical_batches`), and what the batch costs.

    Without any route there is nothing to advise: [].
    """
    advice = []
    for kind, tokens in typical_batches(trace.tokens, trace.calls).items():
        loads, observed = piece_loads(trace.topk_ids, trace.num_experts, tokens, trace.calls)
        if loads.any():
            row = recommend(loads, tokens, sizes, experts, machine, observed)
            best = sizes.index(row.block_size)
            alignment = alignment_us(tokens * trace.top_k)
            layer = alignment + 2 * LAUNCH_US + row.costs[best]
            advice.append(
                BatchCost(kind, tokens, observed, row.block_size, row.wasted[best], alignment, layer, measured=False)
            )
    return advice


def place(trace: Trace, ranks: int, replicas: int | None = None) -> Ints:
    """A balanced placement of each layer for the loads of all tokens, ``[layers, ranks, slots]``, without empty slots.

    Args:
        trace: the routes.
        ranks: number of ranks.
        replicas: copies beyond the first of each expert; by default as few as leave no slot empty.

    Raises:
        InvalidInput: more than 2,048 experts, or `replicas` that leave a slot empty or that the ranks cannot hold.
    """
    spare = placement.spare_slots(trace.num_experts, ranks)
    copies = spare if replicas is None else replicas
    if trace.num_experts > _MAX_PLACED_EXPERTS:
        raise InvalidInput(f"trace: expected at most {_MAX_PLACED_EXPERTS} experts to place, got {trace.num_experts}")
    if (copies - spare) % ranks:
        raise InvalidInput(
            f"replicas: expected {spare} or a multiple of {ranks} more, which fills every slot of {ranks} ranks, got "
            f"{copies}"
        )
    loads = loads_of(trace.topk_ids, trace.num_experts)
    return np.stack([placement.balanced(layer, ranks, copies) for layer in loads])


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
    """Placements computed from the first half of the tokens and judged on the second half; [] beyond 2,048 experts.

    Every layer has its own placement.  A layer takes as long as its busiest rank, so the result for a model is the sum
    over layers of the busiest rank's load, divided by the sum of the mean loads.
    """
    tokens = topk_ids.shape[1]
    if num_experts > _MAX_PLACED_EXPERTS:
        return []
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
