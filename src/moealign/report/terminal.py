"""Tables of `moealign inspect` for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from .. import costs
from ..terminal import MIN_BARS, bars, neighbours, paragraph, table, width

__all__ = ["load_table", "padding_table"]

MAX_BARS = 64


def load_table(loads: costs.Ints) -> str:
    """Routes per expert, one row for each layer of `loads` ``[layers, num_experts]`` and one for their sum.

    The bars take the room that the figures leave, and go where that is too little.
    """
    header = ["layer", "min", "median", "max", "imbalance", "idle"]
    parts = [*loads, loads.sum(axis=0)]
    rows = []
    for name, part in zip([*map(str, range(len(loads))), "all"], parts, strict=True):
        s = costs.summarize(part)
        rows.append([name, f"{s.min:,}", f"{s.median:,}", f"{s.max:,}", f"{s.imbalance:.2f}", str(s.idle)])
    notes = "imbalance: the busiest expert's load over the mean. idle: experts without a route."
    figures = sum(max(len(row[i]) for row in [header, *rows]) + 2 for i in range(len(header)))
    room = min(width() - figures, MAX_BARS, loads.shape[1])
    if room >= min(MIN_BARS, loads.shape[1]):
        header.append("experts")
        shared = neighbours(loads.shape[1], room)
        for row, part in zip(rows, parts, strict=True):
            row.append(bars(part.tolist(), room))
        longest = max(len("experts"), *(len(row[-1]) for row in rows))
        rows = [[*row[:-1], row[-1].ljust(longest)] for row in rows]
        notes += " experts: in order, " + (
            f"each bar the mean of {shared} neighbours." if shared > 1 else "a bar each."
        )
    return f"{table(header, rows, title='Load per expert (routes)')}\n{paragraph(notes)}"


def padding_table(loads: costs.Ints, sizes: Sequence[int]) -> str:
    """Blocks and padding at each block size, one row for each layer of `loads` ``[layers, ..., experts]`` and one for
    all layers."""
    rows = []
    for name, part in zip([*map(str, range(len(loads))), "all"], [*loads, loads], strict=True):
        paddings = [costs.padding(part, size) for size in sizes]
        rows.append([name, *(f"{each.blocks:,}, {each.wasted:.1%}" for each in paddings)])
    title = "Blocks of B rows, and the fraction of their rows that is padding"
    return table(["layer", *(f"B = {size}" for size in sizes)], rows, title=paragraph(title))
