"""The numbers of the report, without any drawing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .. import costs
from ..errors import InvalidInput
from ..trace import Trace

__all__ = ["Study", "study"]

RANKS = (2, 4, 8, 16, 32, 64)
MAX_MAP_BLOCKS = 640  # of a layer in a block map


@dataclass(frozen=True)
class Study:
    """What the report shows about one trace."""

    trace: Trace
    sizes: tuple[int, ...]
    experts: costs.Experts
    machine: costs.Machine
    loads: npt.NDArray[np.int64]  # [layers, num_experts] kept routes
    window: int  # tokens
    imbalance: npt.NDArray[np.float64]  # [layers, windows]
    by_size: list[costs.Cost]  # mean over the layers, all tokens, one for each size
    by_tokens: list[costs.Recommendation]
    gains: list[costs.PlacementGain]
    measured: list[float] | None  # microseconds of a layer, one for each size
    not_measured: str  # why there is no measurement
    map_tokens: int  # tokens that a block map shows
    map_loads: npt.NDArray[np.int64]  # [layers, num_experts] routes of these tokens
    map_size: int  # rows of a block in the maps

    @property
    def blocks(self) -> npt.NDArray[np.int64]:
        """Blocks of each layer, ``[layers, sizes]``."""
        return np.stack([costs.blocks_of(self.loads, size).sum(axis=1) for size in self.sizes], axis=1)

    @property
    def wasted(self) -> npt.NDArray[np.float64]:
        """Fraction of the rows that is padding, ``[layers, sizes]``."""
        return np.array([[costs.padding(load, size).wasted for size in self.sizes] for load in self.loads])

    @property
    def best_size(self) -> int:
        """The cheapest block size by the cost model, for the whole trace."""
        return self.by_tokens[-1].block_size


def study(
    trace: Trace,
    sizes: Sequence[int],
    experts: costs.Experts | None = None,
    *,
    on_gpu: bool | None = None,
    map_size: int | None = None,
) -> Study:
    """Compute everything that the report shows.

    Args:
        trace: the routes.
        sizes: block sizes to compare, each at least 1.
        experts: the sizes of one expert, which a trace does not hold.
        on_gpu: also measure; by default if torch can use a GPU.
        map_size: block size of the block maps; by default the one recommended for the whole trace.

    Raises:
        InvalidInput: no block size, or one below 1.
    """
    import torch

    compared = tuple(sorted(set(sizes)))
    if not compared or compared[0] < 1 or (map_size is not None and map_size < 1):
        raise InvalidInput(f"sizes: expected block sizes of at least 1, got {list(sizes)} and {map_size}")
    experts = experts or costs.Experts()
    ids, count = trace.topk_ids, trace.num_experts
    machine, measured, reason = costs.H200, None, "no GPU that torch can use"
    if torch.cuda.is_available() if on_gpu is None else on_gpu:
        try:
            machine = costs.measured_machine()
            measured, reason = costs.measure(ids, count, compared, experts), ""
        except Exception as error:  # the report is useful without the measurement, and says why it is missing
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__
    loads = costs.loads_of(ids, count)
    by_tokens = costs.recommend_by_tokens(ids, count, compared, experts, machine)
    size = map_size or by_tokens[-1].block_size
    shown = trace.tokens
    while shown > 1 and costs.blocks_of(costs.loads_of(ids[:, :shown], count), size).sum(axis=1).max() > MAX_MAP_BLOCKS:
        shown = 2 ** ((shown - 1).bit_length() - 1)
    window = min(256, trace.tokens)
    return Study(
        trace=trace,
        sizes=compared,
        experts=experts,
        machine=machine,
        loads=loads,
        window=window,
        imbalance=costs.windows(ids, count, window),
        by_size=[costs.cost(loads, b, experts, machine) for b in compared],
        by_tokens=by_tokens,
        gains=costs.placement_gain(ids, count, [n for n in RANKS if n <= max(2, count)]),
        measured=measured,
        not_measured=reason,
        map_tokens=shown,
        map_loads=costs.loads_of(ids[:, :shown], count),
        map_size=size,
    )
