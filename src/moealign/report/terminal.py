"""Tables of `moealign inspect` for a terminal."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from .. import costs

__all__ = ["load_table", "padding_table"]


def load_table(loads: costs.Ints) -> Table:
    """Routes per expert, one row for each layer of `loads` ``[layers, num_experts]`` and one for their sum."""
    table = Table(title="Load per expert (routes)", title_justify="left")
    table.add_column("layer")
    for name in ("min", "median", "max", "imbalance", "idle"):
        table.add_column(name, justify="right")
    table.add_column("experts, in order", no_wrap=True)
    names = [*map(str, range(len(loads))), "all"]
    for name, row in zip(names, [*loads, loads.sum(axis=0)], strict=True):
        s = costs.summarize(row)
        numbers = (s.min, s.median, s.max, f"{s.imbalance:.2f}", s.idle)
        table.add_row(name, *map(str, numbers), Text(_bars(row.tolist())))
    return table


def padding_table(loads: costs.Ints, sizes: Sequence[int]) -> Table:
    """Blocks and padding at each block size, for each layer of `loads` ``[layers, ..., experts]`` and for all."""
    table = Table(title="Blocks, and the fraction of their rows that is padding", title_justify="left")
    table.add_column("layer")
    for size in sizes:
        table.add_column(f"B = {size}", justify="right")
    names = [*map(str, range(len(loads))), "all"]
    for name, part in zip(names, [*loads, loads], strict=True):
        paddings = [costs.padding(part, size) for size in sizes]
        cells = (f"{each.blocks:,}, {each.wasted:.1%}" for each in paddings)
        table.add_row(name, *cells, style="bold" if name == "all" else None)
    return table


def _bars(loads: Sequence[int], width: int = 32) -> str:
    """The loads as a line of bars; with more experts than `width`, each bar is the mean of several neighbours."""
    size = -(-len(loads) // width)
    means = [statistics.fmean(loads[i : i + size]) for i in range(0, len(loads), size)]
    top = max(means) or 1
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * mean / top))] for mean in means)
