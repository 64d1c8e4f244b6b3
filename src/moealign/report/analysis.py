"""The numbers of the report, without any drawing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from .. import costs
from ..errors import InvalidInput
from ..experts.tiles import BLOCK_SIZES
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
    experts_source: str  # "from the trace", "as given" or "assumed"
    machine: costs.Machine
    batches: npt.NDArray[np.int64]  # [layers, batches, num_experts] kept routes
    window: int  # tokens of a batch in the figure of imbalance; 0: the calls of the trace
    imbalance: npt.NDArray[np.float64]  # [layers, windows]
    advice: list[costs.BatchCost]  # one for each kind of batch; [] without any route
    main_tokens: int  # of the largest kind of batch, for which `by_size` and `measured` are
    by_size: list[costs.Cost]  # mean over the layers, one for each size
    measured: list[float | None] | None  # microseconds of a layer, one for each size
    by_tokens: list[costs.Recommendation]
    gains: list[costs.PlacementGain]  # [] with too many experts
    not_measured: str  # why there is no measurement
    map_tokens: int  # tokens that a block map shows
    map_loads: npt.NDArray[np.int64]  # [layers, num_experts] routes of these tokens
    map_size: int  # rows of a block in the maps

    @property
    def loads(self) -> npt.NDArray[np.int64]:
        """Kept routes of each expert in all batches, ``[layers, num_experts]``."""
        total: npt.NDArray[np.int64] = self.batches.sum(axis=1)
        return total

    @property
    def blocks(self) -> npt.NDArray[np.int64]:
        """Blocks of each layer in all batches, ``[layers, sizes]``."""
        return np.stack([costs.blocks_of(self.batches, size).sum(axis=(1, 2)) for size in self.sizes], axis=1)

    @property
    def wasted(self) -> npt.NDArray[np.float64]:
        """Fraction of the rows that is padding, ``[layers, sizes]``."""
        return np.array([[costs.padding(load, size).wasted for size in self.sizes] for load in self.batches])

    @property
    def best_size(self) -> int | None:
        """The block size for the largest kind of batch; None without any route."""
        return self.advice[-1].block_size if self.advice else None


def study(
    trace: Trace,
    sizes: Sequence[int],
    experts: costs.Experts | None = None,
    *,
    experts_source: str = "as given",
    on_gpu: bool | None = None,
    map_size: int | None = None,
) -> Study:
    """Compute everything that the report shows.

    Args:
        trace: the routes.
        sizes: block sizes to compare, each at least 1.
        experts: the sizes of one expert; by default those of the trace, or assumed ones.
        experts_source: where `experts` come from, as :func:`moealign.costs.experts_of` puts it.
        on_gpu: measure; by default if torch can use a GPU.
        map_size: block size of the block maps; by default the one advised for the largest kind of batch.

    Raises:
        InvalidInput: no block size, or one below 1.
    """
    compared = tuple(sorted(set(sizes)))
    if not compared or compared[0] < 1 or (map_size is not None and map_size < 1):
        raise InvalidInput(f"sizes: expected block sizes of at least 1, got {list(sizes)} and {map_size}")
    if experts is None:
        experts, experts_source = costs.experts_of(trace)
    ids, count, calls = trace.topk_ids, trace.num_experts, trace.calls
    main = list(costs.typical_batches(trace.tokens, calls).values())[-1]
    machine, measured, reason = costs.H200, None, "no GPU that torch can use"
    advice = costs.advise(trace, compared, experts)
    if torch.cuda.is_available() if on_gpu is None else on_gpu:
        try:
            machine = costs.measured_machine()
            advice = costs.advise(trace, compared, experts, machine)
            advice, measured = _measured(trace, compared, experts, advice)
            reason = "" if measured else f"no block size that the GPU kernel takes ({', '.join(map(str, BLOCK_SIZES))})"
        except Exception as error:  # the report is useful without the measurement, and says why it is missing
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__
    size = map_size or (advice[-1].block_size if advice else compared[0])
    batch = ids[:, costs.pieces(trace.tokens, main, calls)[0][0] :]
    shown = main
    while (
        shown > 1 and costs.blocks_of(costs.loads_of(batch[:, :shown], count), size).sum(axis=1).max() > MAX_MAP_BLOCKS
    ):
        shown = 2 ** ((shown - 1).bit_length() - 1)
    window = 0 if calls else min(256, trace.tokens)
    main_loads, _ = costs.piece_loads(ids, count, main, calls)
    return Study(
        trace=trace,
        sizes=compared,
        experts=experts,
        experts_source=experts_source,
        machine=machine,
        batches=costs.batch_loads(ids, count, calls),
        window=window,
        imbalance=costs.windows(ids, count, window, calls),
        advice=advice,
        main_tokens=main,
        by_size=[costs.cost(main_loads, b, experts, machine) for b in compared],
        measured=measured,
        by_tokens=costs.recommend_by_tokens(ids, count, compared, experts, machine, calls=calls),
        gains=costs.placement_gain(ids, count, [n for n in RANKS if n <= max(2, count)]),
        not_measured=reason,
        map_tokens=shown,
        map_loads=costs.loads_of(batch[:, :shown], count),
        map_size=size,
    )


def _measured(
    trace: Trace, sizes: Sequence[int], experts: costs.Experts, advice: Sequence[costs.BatchCost]
) -> tuple[list[costs.BatchCost], list[float | None] | None]:
    """`advice` by what a layer takes on this GPU, and the times of the largest kind of batch at each size."""
    results: list[costs.BatchCost] = []
    times: list[float | None] | None = None
    for each in advice:
        starts, _ = costs.pieces(trace.tokens, each.tokens, trace.calls)
        ids = trace.topk_ids[:, starts[len(starts) // 2] :][:, : each.tokens]
        times = costs.measure(ids, trace.num_experts, sizes, experts)
        known = {size: time for size, time in zip(sizes, times, strict=True) if time is not None}
        if not known:
            results.append(each)
            continue
        size = min(known, key=lambda size: known[size])
        loads, _ = costs.piece_loads(trace.topk_ids, trace.num_experts, each.tokens, trace.calls)
        results.append(
            dataclasses.replace(
                each,
                block_size=size,
                wasted=costs.padding(loads, size).wasted,
                alignment=costs.measure_alignment(ids, trace.num_experts, size),
                layer=known[size],
                measured=True,
            )
        )
    return results, times if times and any(time is not None for time in times) else None
