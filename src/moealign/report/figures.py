"""The figures of the report, drawn with matplotlib."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import costs
from ..terminal import escape
from .analysis import Study
from .summary import context_lines
from .theme import ADAPTIVE, Theme, drawing, save_adaptive

__all__ = ["Panel", "block_map", "draw_block_map", "map_cells", "map_text", "panels", "save_block_map", "save_picture"]

MAP_COLUMNS = 64  # blocks in a line of a block map
MAX_LAYERS_NAMED = 10  # with more layers, lines are grey and have no name


def _layer_style(theme: Theme, layers: int, layer: int) -> dict[str, Any]:
    if layers <= MAX_LAYERS_NAMED:
        return {"color": theme.series[layer % len(theme.series)], "label": f"layer {layer}", "linewidth": 1.4}
    return {"color": theme.muted, "alpha": 0.35, "linewidth": 0.8, "label": "one layer" if layer == 0 else None}


def _legend(axis: Any, theme: Theme, **options: Any) -> None:
    axis.legend(frameon=False, labelcolor=theme.ink, fontsize=8, **options)


def _legend_on_top(axis: Any, theme: Theme, ncols: int) -> None:
    """Above the axes, at the left."""
    _legend(axis, theme, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0, borderaxespad=0.2, ncols=ncols)


def draw_loads(axis: Any, study: Study, theme: Theme) -> None:
    """Heat map: load of each expert in each layer, relative to the mean of the layer."""
    mean = np.maximum(study.loads.mean(axis=1, keepdims=True), 1e-300)
    ratio = study.loads / mean
    # "none" keeps one pixel per expert in an SVG; the page scales it up without blurring.
    image = axis.imshow(ratio, aspect="auto", interpolation="none", cmap="viridis", vmin=0)
    axis.set(xlabel="expert", ylabel="layer")
    axis.grid(False)
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.xaxis.get_major_locator().set_params(integer=True)
    # Left and on top, as the legends: a phone shows the left part of a wide figure first.
    bar = axis.figure.colorbar(
        image, ax=axis, location="top", anchor=(0.0, 0.5), shrink=0.4, aspect=30, pad=0.02, fraction=0.08
    )
    bar.set_label("routes over the layer's mean", color=theme.ink, loc="left")
    bar.ax.tick_params(colors=theme.ink)
    bar.outline.set_visible(False)


def draw_imbalance(axis: Any, study: Study, theme: Theme) -> None:
    """Lines: load of the busiest expert over the mean, in each batch."""
    batches = study.imbalance.shape[1]
    at = np.arange(batches) * study.window if study.window else np.linspace(0, len(study.trace.calls) - 1, batches)
    layers = len(study.imbalance)
    for layer, values in enumerate(study.imbalance):
        axis.plot(at, values, **_layer_style(theme, layers, layer))
    if layers > 1:
        axis.plot(at, study.imbalance.mean(axis=0), color=theme.ink, linewidth=2, label="mean of the layers")
    begin = "token at which the run begins" if study.window else "call of the model"
    axis.set(xlabel=begin, ylabel="busiest expert / mean expert")
    axis.set_ylim(bottom=1)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _legend_on_top(axis, theme, ncols=3)


def _plot_over_sizes(axis: Any, study: Study, theme: Theme, values: Any, label: str) -> None:
    """The mean of the layers as a line, their range as a band: layers often lie on one another."""
    color = theme.series[0]
    axis.plot(study.sizes, values.mean(axis=0), marker="o", markersize=3.5, color=color, label="mean of the layers")
    if len(values) > 1:
        lowest, highest = values.min(axis=0), values.max(axis=0)
        axis.fill_between(
            study.sizes, lowest, highest, color=color, alpha=0.25, linewidth=0, label="range of the layers"
        )
    axis.set_xscale("log", base=2)
    axis.set_xticks(study.sizes, [str(size) for size in study.sizes])
    axis.minorticks_off()
    axis.set(xlabel="block size (rows, log scale)", ylabel=label)
    _legend(axis, theme)


def draw_padding(axis: Any, study: Study, theme: Theme) -> None:
    """Lines over block sizes: the fraction of the rows that is padding."""
    _plot_over_sizes(axis, study, theme, 100 * study.wasted, "padding (% of all rows)")
    axis.set_ylim(bottom=0)


def draw_block_counts(axis: Any, study: Study, theme: Theme) -> None:
    """Lines over block sizes: blocks of a layer."""
    blocks = study.blocks
    _plot_over_sizes(axis, study, theme, blocks, "blocks of a layer (log scale)")
    if blocks.all():  # a logarithm of none would be drawn nowhere
        axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.minorticks_off()


def draw_costs(axis: Any, study: Study, theme: Theme) -> None:
    """Stacked bars: the three parts of the cost model at each block size; measured times as points."""
    places = np.arange(len(study.sizes))
    bottom = np.zeros(len(places))
    parts = (
        ("first read of the weights, and activations: memory", [c.memory for c in study.by_size], 0),
        ("weights again for each further block: cache", [c.cache for c in study.by_size], 1),
        ("products, padding included", [c.matrix for c in study.by_size], 2),
    )
    for label, values, colour in parts:
        axis.bar(places, values, 0.62, bottom=bottom, label=label, color=theme.series[colour])
        bottom += values
    for place, total in zip(places, bottom, strict=True):
        axis.text(place, total, f"{total:,.0f}", ha="center", va="bottom", fontsize=8, color=theme.ink)
    if study.measured:
        known = [(place, time) for place, time in zip(places, study.measured, strict=True) if time is not None]
        axis.plot(*zip(*known, strict=True), "D", color=theme.ink, markersize=6, label="measured on this GPU")
        bottom = np.maximum(bottom, max(time for _, time in known))
    axis.set_xticks(places, [str(size) for size in study.sizes])
    axis.set(xlabel="block size (rows)", ylabel="microseconds per layer")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.grid(False, axis="x")
    axis.set_ylim(0, 1.5 * bottom.max() if bottom.max() else 1)
    _legend(axis, theme, loc="upper right")


def draw_recommendations(axis: Any, study: Study, theme: Theme) -> None:
    """Grid: for each number of tokens, the cost of each block size over the cheapest, which is framed."""
    from matplotlib.patches import Rectangle

    values = np.array([row.costs for row in study.by_tokens])
    cheapest = values.min(axis=1, keepdims=True)
    ratio = np.divide(values, cheapest, out=np.ones_like(values), where=cheapest > 0)
    image = axis.imshow(ratio.T, aspect="auto", cmap="cividis_r", vmin=1, vmax=2, origin="lower")
    for i, row in enumerate(study.by_tokens):
        for j in range(len(study.sizes)):
            shade = image.cmap(image.norm(ratio[i, j]))
            light = 0.299 * shade[0] + 0.587 * shade[1] + 0.114 * shade[2] > 0.5
            axis.text(i, j, f"{ratio[i, j]:.2f}", ha="center", va="center", fontsize=7.5,
                      color="#000000" if light else "#ffffff")  # fmt: skip
        best = study.sizes.index(row.block_size)
        axis.add_patch(Rectangle((i - 0.46, best - 0.46), 0.92, 0.92, fill=False, edgecolor="#d11149", linewidth=2))
    axis.set_xticks(range(len(study.by_tokens)), [f"{row.tokens:,}" for row in study.by_tokens], fontsize=8)
    axis.set_yticks(range(len(study.sizes)), [str(size) for size in study.sizes])
    axis.set(xlabel="tokens in a batch", ylabel="block size (rows)")
    axis.grid(False)


def draw_placement(axis: Any, study: Study, theme: Theme) -> None:
    """Lines over ranks: load of the busiest rank over the mean, under each placement."""
    ranks = [gain.ranks for gain in study.gains]
    lines = (
        ("linear", "linear", theme.muted, "-"),
        ("round_robin", "round robin", theme.series[6], "-"),
        ("balanced", "balanced", theme.series[0], "-"),
        ("replicated", "balanced, one more slot per rank", theme.series[2], "-"),
        ("informed", "balanced, with hindsight", theme.series[0], ":"),
    )
    for name, label, colour, dashes in lines:
        values = [getattr(gain, name) for gain in study.gains]
        axis.plot(ranks, values, dashes, marker="o", markersize=3.5, color=colour, label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(ranks, [str(n) for n in ranks])
    axis.minorticks_off()
    axis.set(xlabel="ranks (log scale)", ylabel="busiest rank / mean rank")
    axis.set_ylim(bottom=1)
    _legend(axis, theme)


Cells = Sequence[tuple[int, int]]


def map_text(study: Study) -> str:
    """Which tokens a block map shows, in blocks of how many rows."""
    which = f"{study.map_tokens:,} tokens of a call" if study.trace.calls else f"the first {study.map_tokens:,} tokens"
    return f"{which}, {study.map_size} rows per block"


def map_cells(study: Study, layer: int) -> list[tuple[int, int]]:
    """(expert, kept rows) of each block in the map of a layer, in the layout's order."""
    cells = []
    for expert, load in enumerate(study.map_loads[layer].tolist()):
        for first in range(0, load, study.map_size):
            cells.append((expert, min(study.map_size, load - first)))
    return cells


def map_lines(study: Study) -> int:
    """Lines of the block maps: as many as the layer with the most blocks needs."""
    return _lines(int(costs.blocks_of(study.map_loads, study.map_size).sum(axis=1).max()))


def _lines(blocks: int) -> int:
    return max(1, -(-blocks // MAP_COLUMNS))


def map_inches(lines: int) -> tuple[float, float]:
    """Width and height of a block map."""
    return 11.0, 1.0 + 0.34 * lines


def draw_block_map(axis: Any, cells: Cells, block_size: int, theme: Theme, lines: int | None = None) -> None:
    """One cell per block, in order, line by line: filled in its expert's colour up to its routes, hatched above.

    Args:
        axis: a matplotlib Axes.
        cells: (expert, kept rows) of each block.
        block_size: rows of a block.
        theme: the colours.
        lines: lines to leave room for; by default those that `cells` needs.
    """
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Shape

    lines = lines or _lines(len(cells))
    colours = len(theme.series)
    filled: dict[int, list[Any]] = {}
    empty: list[Any] = []

    def box(x: float, bottom: float, top: float) -> list[tuple[float, float]]:
        return [(x + 0.04, bottom), (x + 0.96, bottom), (x + 0.96, top), (x + 0.04, top), (x + 0.04, bottom)]

    for i, (expert, rows) in enumerate(cells):
        x, y = i % MAP_COLUMNS, i // MAP_COLUMNS
        level = y + 0.92 - 0.84 * rows / block_size  # y grows downwards, a block fills from its foot
        filled.setdefault(expert % colours, []).append(box(x, y + 0.92, level))
        if rows < block_size:
            empty.append(box(x, level, y + 0.08))
    codes = [Shape.MOVETO, Shape.LINETO, Shape.LINETO, Shape.LINETO, Shape.CLOSEPOLY]

    def add(boxes: list[Any], **options: Any) -> None:
        if boxes:
            shape = Shape(np.concatenate([np.array(b) for b in boxes]), codes * len(boxes))
            axis.add_artist(PathPatch(shape, **options))  # add_patch looks for limits, which are set below

    for colour, boxes in sorted(filled.items()):
        add(boxes, facecolor=theme.series[colour], linewidth=0)
    add(empty, facecolor="none", edgecolor=theme.muted, hatch="//////", linewidth=0.4)
    axis.set_xlim(0, MAP_COLUMNS)
    axis.set_ylim(lines, 0)
    axis.set(xlabel=f"block, {MAP_COLUMNS} per line", ylabel="first block of the line")
    labelled = range(0, lines, max(1, lines // 8))
    axis.set_yticks([line + 0.5 for line in labelled], [f"{MAP_COLUMNS * line:,}" for line in labelled])
    axis.set_xticks([0.5, 16.5, 32.5, 48.5], ["0", "16", "32", "48"])
    axis.tick_params(length=0)
    axis.grid(False)
    for side in axis.spines.values():
        side.set_visible(False)


def save_block_map(cells: Cells, block_size: int, title: str, path: str | Path, theme: Theme) -> None:
    """Write a block map alone; the ending of `path` decides the format (.png, .svg, .pdf)."""
    width, height = map_inches(_lines(len(cells)))
    with drawing(theme, "blocks") as plt:
        figure, axis = plt.subplots(figsize=(width, height + 0.3), layout="constrained")
        draw_block_map(axis, cells, block_size, theme)
        axis.set_title(title, loc="left")
        figure.savefig(path, dpi=160, facecolor=theme.paper)
        plt.close(figure)


@dataclass(frozen=True)
class Panel:
    """One figure of the report."""

    name: str
    title: str
    draw: Callable[[Any, Study, Theme], None]  # onto a matplotlib Axes
    size: tuple[float, float]  # inches


def panels(study: Study) -> list[Panel]:
    """Every figure except the block maps."""
    heat = (11.0, float(np.clip(1.7 + 0.28 * len(study.loads), 2.6, 9.4)))
    grid = (11.0, 1.4 + 0.36 * len(study.sizes))
    over = f"tokens, in runs of {study.window:,}" if study.window else f"{len(study.trace.calls):,} calls"
    placement = [Panel("placement", "What a better placement gains", draw_placement, (5.4, 3.6))]
    return [
        Panel("loads", "Load per expert and layer", draw_loads, heat),
        Panel("imbalance", f"Imbalance over {over}", draw_imbalance, (11, 3.4)),
        Panel("padding", "Padding per block size", draw_padding, (5.4, 3.3)),
        Panel("blocks", "Blocks per block size", draw_block_counts, (5.4, 3.3)),
        Panel("costs", "What each block size costs", draw_costs, (5.4, 3.6)),
        *(placement if study.gains else []),
        Panel("tokens", "Cost of each block size relative to the cheapest, by tokens", draw_recommendations, grid),
    ]


def block_map(study: Study, layer: int) -> Panel:
    """The blocks of one layer."""
    title = f"Blocks of layer {layer}: {map_text(study)}"

    def draw(axis: Any, study: Study, theme: Theme) -> None:
        draw_block_map(axis, map_cells(study, layer), study.map_size, theme, map_lines(study))

    return Panel(f"map-{layer}", title, draw, map_inches(map_lines(study)))


def save_picture(study: Study, path: Path, layer: int, theme: Theme) -> None:
    """Write all figures, one below the other, as one PNG (in `theme`) or SVG (for both schemes)."""
    adaptive = path.suffix.lower() == ".svg"
    colours = ADAPTIVE if adaptive else theme
    with drawing(colours, "report") as plt:
        rows: list[list[Panel]] = []
        for panel in panels(study):
            if panel.size[0] < 8 and rows and rows[-1][0].size[0] < 8 and len(rows[-1]) == 1:
                rows[-1].append(panel)
            else:
                rows.append([panel])
        rows.insert(2, [block_map(study, layer)])
        heights = [row[0].size[1] for row in rows]
        figure = plt.figure(figsize=(11.4, sum(heights) + 1.2), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.14, h_pad=0.1)
        if not adaptive:
            figure.set_facecolor(theme.paper)
        parts = figure.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)[:, 0]
        bold: Any = {"fontsize": 10, "fontweight": "bold"}
        for part, row in zip(parts, rows, strict=True):
            part.set_facecolor("none")
            for axis, panel in zip(part.subplots(1, len(row), squeeze=False)[0], row, strict=True):
                panel.draw(axis, study, colours)
                if len(row) > 1:
                    axis.set_title(panel.title, loc="left", **bold)
            if len(row) == 1:  # above the legend
                part.suptitle(row[0].title, x=0.01, ha="left", **bold)
        trace = study.trace
        words = (
            f"{trace.model}; {trace.source}; {trace.layers} layers, {trace.tokens:,} tokens, top {trace.top_k} of "
            f"{trace.num_experts} experts. {' '.join(context_lines(study))}"
        )
        figure.suptitle(textwrap.fill(escape(words), 150), color=colours.muted, fontsize=8.5, parse_math=False)
        if adaptive:
            save_adaptive(figure, path, f"moealign report: {trace.model}")
        else:
            figure.savefig(path, dpi=130, facecolor=theme.paper, metadata={"Software": None})
        plt.close(figure)
