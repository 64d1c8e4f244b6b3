"""The report on a routing trace: one page without a network, or the same figures as one PNG or SVG.

Figures are matplotlib's.  For a page or an SVG they are drawn in placeholder colours, which become CSS variables: one
drawing is legible in light and in dark, whichever the reader prefers.
"""

from __future__ import annotations

import datetime
import html
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import costs
from .errors import InvalidInput
from .trace import Trace

__all__ = ["ADAPTIVE", "DARK", "FORMATS", "LIGHT", "Study", "Theme", "save_adaptive", "study", "style", "write"]

FORMATS = (".html", ".png", ".svg")
RANKS = (2, 4, 8, 16, 32, 64)
CELLS_ACROSS, MOST_CELLS = 64, 640  # of a block map
MOST_LAYERS_NAMED = 10
COLOURS = 10  # for experts: neighbours differ


@dataclass(frozen=True)
class Theme:
    """Colours as #rrggbb."""

    ink: str  # text and axes
    muted: str  # what is beside the point
    rule: str  # grid lines, edges of padding
    paper: str
    series: tuple[str, ...]  # lines, bars, experts


LIGHT = Theme(
    "#1b1f24", "#59636e", "#d5dae0", "#ffffff",
    ("#1f5fa8", "#c2571a", "#2a7d4f", "#8a4fbf", "#b5453c", "#0f7f8c", "#8a6d00", "#c0418c", "#5a6b1f", "#4a5a78"),
)  # fmt: skip
DARK = Theme(
    "#e6e9ee", "#a3adb8", "#3a424c", "#14181d",
    ("#6ea8e8", "#f0955c", "#63c08d", "#bd94ea", "#ee8077", "#4fc3d0", "#d9b945", "#ee86bf", "#a9bd5f", "#9db0d3"),
)  # fmt: skip
#: Colours that nothing else has, each to be replaced by a variable: what is drawn in them suits light and dark.
ADAPTIVE = Theme(
    "#010203", "#010204", "#010205", "#010206", tuple(f"#0103{i:02x}" for i in range(COLOURS))
)  # fmt: skip
_VARIABLES = {
    ADAPTIVE.ink: "--ink", ADAPTIVE.muted: "--muted", ADAPTIVE.rule: "--rule", ADAPTIVE.paper: "--paper",
    **{colour: f"--c{i}" for i, colour in enumerate(ADAPTIVE.series)},
}  # fmt: skip


@dataclass(frozen=True)
class Study:
    """What the report shows: figures about one trace, without any drawing."""

    trace: Trace
    sizes: tuple[int, ...]
    experts: costs.Experts
    machine: costs.Machine
    loads: npt.NDArray[np.int64]  # [layers, num_experts] kept routes
    window: int  # tokens
    imbalance: npt.NDArray[np.float64]  # [layers, windows]
    blocks: npt.NDArray[np.int64]  # [layers, sizes]
    by_size: list[costs.Cost]  # a layer's mean, all tokens, one for each size
    by_tokens: list[costs.Recommendation]
    gains: list[costs.PlacementGain]
    measured: list[float] | None  # microseconds of a layer, one for each size
    not_measured: str  # why there is no measurement, if there is none
    map_tokens: int  # tokens that a block map shows
    map_loads: npt.NDArray[np.int64]  # [layers, num_experts] routes among them
    map_size: int  # rows of a block in the maps

    @property
    def wasted(self) -> npt.NDArray[np.float64]:
        """Part of the rows that is padding, ``[layers, sizes]``."""
        rows = self.blocks * np.array(self.sizes)
        return np.asarray(1 - self.loads.sum(axis=1)[:, None] / np.maximum(rows, 1))

    @property
    def best_size(self) -> int:
        """The block size that the model finds cheapest for the whole trace."""
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
        trace: what was routed.
        sizes: block sizes to compare, each at least 1.
        experts: the sizes of one expert, which a trace does not hold.
        on_gpu: measure too; by default where torch can use a GPU.
        map_size: block size of the block maps; by default the one recommended for the whole trace.

    Raises:
        InvalidInput: no block size, or one below 1.
    """
    import torch

    wanted = tuple(sorted(set(sizes)))
    if not wanted or wanted[0] < 1 or (map_size is not None and map_size < 1):
        raise InvalidInput(f"sizes: expected block sizes of at least 1, got {list(sizes)} and {map_size}")
    experts = experts or costs.Experts()
    ids, count = trace.topk_ids, trace.num_experts
    machine, measured, reason = costs.H200, None, "no GPU that torch can use"
    if torch.cuda.is_available() if on_gpu is None else on_gpu:
        try:
            machine = costs.measured_machine()
            measured, reason = costs.measure(ids, count, wanted, experts), ""
        except Exception as error:  # the report is worth having without it, and says why it is not there
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__
    loads = costs.loads_of(ids, count)
    by_tokens = costs.recommend_by_tokens(ids, count, wanted, experts, machine)
    size = map_size or by_tokens[-1].block_size
    shown = trace.tokens
    while shown > 1 and costs.blocks_of(costs.loads_of(ids[:, :shown], count), size).sum(axis=1).max() > MOST_CELLS:
        shown = 2 ** ((shown - 1).bit_length() - 1)
    window = min(256, trace.tokens)
    return Study(
        trace=trace,
        sizes=wanted,
        experts=experts,
        machine=machine,
        loads=loads,
        window=window,
        imbalance=costs.windows(ids, count, window),
        blocks=np.stack([costs.blocks_of(loads, b).sum(axis=1) for b in wanted], axis=1),
        by_size=[costs.cost(loads, b, experts, machine) for b in wanted],
        by_tokens=by_tokens,
        gains=costs.placement_gain(ids, count, [n for n in RANKS if n <= max(2, count)]),
        measured=measured,
        not_measured=reason,
        map_tokens=shown,
        map_loads=costs.loads_of(ids[:, :shown], count),
        map_size=size,
    )


# ---- drawing -----------------------------------------------------------------------------------------------------


def _layer_style(theme: Theme, layers: int, layer: int) -> dict[str, Any]:
    if layers <= MOST_LAYERS_NAMED:
        return {"color": theme.series[layer % COLOURS], "label": f"layer {layer}", "linewidth": 1.4}
    return {"color": theme.muted, "alpha": 0.35, "linewidth": 0.8, "label": "a layer" if layer == 0 else None}


def _legend(axis: Any, theme: Theme, **options: Any) -> None:
    axis.legend(frameon=False, labelcolor=theme.ink, fontsize=8, **options)


def draw_loads(axis: Any, study: Study, theme: Theme) -> None:
    """Heat map: load of each expert in each layer, over the layer's mean."""
    mean = np.maximum(study.loads.mean(axis=1, keepdims=True), 1e-300)
    ratio = study.loads / mean
    # "none" leaves an SVG a pixel an expert, however many there are; the page scales it up without blurring.
    image = axis.imshow(ratio, aspect="auto", interpolation="none", cmap="viridis", vmin=0)
    axis.set(xlabel="expert", ylabel="layer")
    axis.grid(False)
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.xaxis.get_major_locator().set_params(integer=True)
    bar = axis.figure.colorbar(image, ax=axis, pad=0.01, fraction=0.05)
    bar.set_label("routes over the layer's mean", color=theme.ink)
    bar.ax.tick_params(colors=theme.ink)
    bar.outline.set_visible(False)


def draw_imbalance(axis: Any, study: Study, theme: Theme) -> None:
    """Lines: busiest expert over the mean in each run of tokens."""
    at = np.arange(study.imbalance.shape[1]) * study.window
    layers = len(study.imbalance)
    for layer, values in enumerate(study.imbalance):
        axis.plot(at, values, **_layer_style(theme, layers, layer))
    if layers > 1:
        axis.plot(at, study.imbalance.mean(axis=0), color=theme.ink, linewidth=2, label="mean of the layers")
    axis.set(xlabel="token at which the run begins", ylabel="busiest expert / mean expert")
    axis.set_ylim(bottom=1)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _legend(axis, theme, ncols=3)


def _over_sizes(axis: Any, study: Study) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(study.sizes, [str(size) for size in study.sizes])
    axis.minorticks_off()
    axis.set_xlabel("block size (rows)")


def draw_padding(axis: Any, study: Study, theme: Theme) -> None:
    """Lines over block sizes: the part of the rows that is padding."""
    for layer, values in enumerate(study.wasted):
        axis.plot(study.sizes, 100 * values, marker="o", markersize=3, **_layer_style(theme, len(study.loads), layer))
    _over_sizes(axis, study)
    axis.set_ylabel("padding (% of all rows)")
    axis.set_ylim(bottom=0)
    _legend(axis, theme)


def draw_blocks(axis: Any, study: Study, theme: Theme) -> None:
    """Lines over block sizes: blocks of a layer."""
    for layer, values in enumerate(study.blocks):
        axis.plot(study.sizes, values, marker="o", markersize=3, **_layer_style(theme, len(study.loads), layer))
    _over_sizes(axis, study)
    axis.set_ylabel("blocks of a layer")
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.minorticks_off()


def draw_costs(axis: Any, study: Study, theme: Theme) -> None:
    """Stacked bars: the model's three parts at each block size, and the measured time as points."""
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
        axis.plot(places, study.measured, "D", color=theme.ink, markersize=6, label="measured on this GPU")
        bottom = np.maximum(bottom, study.measured)
    axis.set_xticks(places, [str(size) for size in study.sizes])
    axis.set(xlabel="block size (rows)", ylabel="microseconds a layer")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.grid(False, axis="x")
    axis.set_ylim(0, 1.5 * bottom.max() if bottom.max() else 1)
    _legend(axis, theme, loc="upper right")


def draw_recommendations(axis: Any, study: Study, theme: Theme) -> None:
    """A grid: for each number of tokens, each block size's cost over the cheapest one's, which has a frame."""
    from matplotlib.patches import Rectangle

    values = np.array([row.costs for row in study.by_tokens])
    least = values.min(axis=1, keepdims=True)
    ratio = np.divide(values, least, out=np.ones_like(values), where=least > 0)
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
    """Lines over ranks: busiest rank over the mean, under each placement."""
    ranks = [gain.ranks for gain in study.gains]
    lines = (
        ("linear", "neighbours together (linear)", theme.muted, "-"),
        ("round_robin", "round robin", theme.series[6], "-"),
        ("balanced", "balanced", theme.series[0], "-"),
        ("replicated", "balanced, one more slot a rank", theme.series[2], "-"),
        ("informed", "balanced, had it known these tokens", theme.series[0], ":"),
    )
    for name, label, colour, dashes in lines:
        values = [getattr(gain, name) for gain in study.gains]
        axis.plot(ranks, values, dashes, marker="o", markersize=3.5, color=colour, label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(ranks, [str(n) for n in ranks])
    axis.minorticks_off()
    axis.set(xlabel="ranks", ylabel="busiest rank / mean rank")
    axis.set_ylim(bottom=1)
    _legend(axis, theme)


def draw_map(axis: Any, study: Study, theme: Theme, layer: int) -> None:
    """A cell a block, in order, row by row: filled with its expert's colour as far as it has routes, then hatched."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Shape

    cells = map_cells(study, layer)
    filled: dict[int, list[Any]] = {}
    empty: list[Any] = []

    def box(x: float, bottom: float, top: float) -> list[tuple[float, float]]:
        return [(x + 0.04, bottom), (x + 0.96, bottom), (x + 0.96, top), (x + 0.04, top), (x + 0.04, bottom)]

    for i, (expert, rows) in enumerate(cells):
        x, y = i % CELLS_ACROSS, i // CELLS_ACROSS
        level = y + 0.92 - 0.84 * rows / study.map_size  # y grows downwards, a block fills from its foot
        filled.setdefault(expert % COLOURS, []).append(box(x, y + 0.92, level))
        if rows < study.map_size:
            empty.append(box(x, level, y + 0.08))
    codes = [Shape.MOVETO, Shape.LINETO, Shape.LINETO, Shape.LINETO, Shape.CLOSEPOLY]

    def add(boxes: list[Any], **style: Any) -> None:
        if boxes:
            shape = Shape(np.concatenate([np.array(b) for b in boxes]), codes * len(boxes))
            axis.add_patch(PathPatch(shape, **style))

    for colour, boxes in sorted(filled.items()):
        add(boxes, facecolor=theme.series[colour], linewidth=0)
    add(empty, facecolor="none", edgecolor=theme.muted, hatch="//////", linewidth=0.4)
    axis.set_xlim(0, CELLS_ACROSS)
    axis.set_ylim(map_lines(study), 0)
    axis.set(xlabel=f"block, {CELLS_ACROSS} a line", ylabel="first block of the line")
    lines = range(0, map_lines(study), max(1, map_lines(study) // 8))
    axis.set_yticks([line + 0.5 for line in lines], [f"{CELLS_ACROSS * line:,}" for line in lines])
    axis.set_xticks([0.5, 16.5, 32.5, 48.5], ["0", "16", "32", "48"])
    axis.tick_params(length=0)
    axis.grid(False)
    for side in axis.spines.values():
        side.set_visible(False)


def map_cells(study: Study, layer: int) -> list[tuple[int, int]]:
    """(expert, kept rows) of each block in the map of a layer, in the layout's order."""
    cells = []
    for expert, load in enumerate(study.map_loads[layer].tolist()):
        for first in range(0, load, study.map_size):
            cells.append((expert, min(study.map_size, load - first)))
    return cells


def map_lines(study: Study) -> int:
    most = int(costs.blocks_of(study.map_loads, study.map_size).sum(axis=1).max())
    return max(1, -(-most // CELLS_ACROSS))


Drawing = Callable[[Any, Study, Theme], None]


@dataclass(frozen=True)
class Panel:
    name: str
    title: str
    draw: Drawing
    size: tuple[float, float]  # inches


def panels(study: Study) -> list[Panel]:
    """Every figure but the block maps."""
    heat = (11.0, float(np.clip(1.3 + 0.28 * len(study.loads), 2.2, 9.0)))
    grid = (11.0, 1.4 + 0.36 * len(study.sizes))
    return [
        Panel("loads", "Load per expert and layer", draw_loads, heat),
        Panel("imbalance", f"Imbalance over tokens, in runs of {study.window:,}", draw_imbalance, (11, 3.2)),
        Panel("padding", "Padding per block size", draw_padding, (5.4, 3.3)),
        Panel("blocks", "Blocks per block size", draw_blocks, (5.4, 3.3)),
        Panel("costs", "What each block size costs", draw_costs, (5.4, 3.6)),
        Panel("placement", "What a better placement gains", draw_placement, (5.4, 3.6)),
        Panel("tokens", "Cost of each block size over the cheapest one's, by tokens", draw_recommendations, grid),
    ]


def style(theme: Theme, salt: str) -> dict[str, Any]:
    """matplotlib's settings for figures in `theme`; `salt` keeps the ids of two pictures on one page apart."""
    return {
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.color": theme.rule, "grid.linewidth": 0.6, "axes.axisbelow": True,
        "text.color": theme.ink, "axes.labelcolor": theme.ink, "axes.edgecolor": theme.muted,
        "xtick.color": theme.ink, "ytick.color": theme.ink, "hatch.color": theme.muted, "hatch.linewidth": 0.5,
        "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
        "svg.fonttype": "none", "svg.hashsalt": salt,
    }  # fmt: skip


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _svg(study: Study, name: str, size: tuple[float, float], draw: Callable[[Any, Theme], None]) -> tuple[str, Any]:
    """An <svg> in the page's variables, and where its axes lie: left, top, right, bottom as parts of the picture."""
    pyplot = _pyplot()
    with pyplot.rc_context(style(ADAPTIVE, name)):
        figure, axis = pyplot.subplots(figsize=size, layout="constrained")
        draw(axis, ADAPTIVE)
        sink = io.StringIO()
        figure.savefig(sink, format="svg", metadata={"Date": None})
        place = axis.get_position()
        pyplot.close(figure)
    svg = _themed(sink.getvalue()).replace("<svg ", f'<svg role="img" aria-labelledby="title-{name}" ', 1)
    return svg, [place.x0, 1 - place.y1, place.x1, 1 - place.y0]


def _themed(svg: str) -> str:
    svg = svg[svg.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.S)
    # Ids are unique to a picture but for matplotlib's own plain ones, which nothing refers to.
    svg = re.sub(
        r' id="(?:figure|axes|patch|text|line2d|matplotlib\.axis|xtick|ytick|legend|PathCollection)_\d+"', "", svg
    )
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    return re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 system-ui, sans-serif", svg)


def save_adaptive(figure: Any, path: Path, title: str) -> None:
    """Write a figure drawn in :data:`ADAPTIVE` as an SVG that is light or dark as its reader prefers."""
    sink = io.StringIO()
    figure.savefig(sink, format="svg", metadata={"Date": None})
    ground = "svg { background: var(--paper); font-family: system-ui, sans-serif } image { image-rendering: pixelated }"
    head = f"<title>{html.escape(title)}</title><style>{_variables_css('svg')} {ground}</style><defs>"
    svg = _themed(sink.getvalue()).replace("<defs>", head, 1).replace("<svg ", '<svg role="img" ', 1)
    path.write_text(f'<?xml version="1.0" encoding="utf-8"?>\n{svg}', encoding="utf-8")


def _picture(study: Study, path: Path, layer: int, theme: Theme) -> None:
    """All figures one below the other, in one PNG or SVG."""
    pyplot = _pyplot()
    adaptive = path.suffix == ".svg"
    colours = ADAPTIVE if adaptive else theme
    with pyplot.rc_context(style(colours, "report")):
        shown = panels(study)
        rows: list[list[Panel]] = []
        for panel in shown:
            if panel.size[0] < 8 and rows and rows[-1][0].size[0] < 8 and len(rows[-1]) == 1:
                rows[-1].append(panel)
            else:
                rows.append([panel])
        block_map = Panel("map", _map_title(study, layer), lambda a, s, t: draw_map(a, s, t, layer), _map_size(study))
        rows.insert(2, [block_map])
        heights = [row[0].size[1] for row in rows]
        figure = pyplot.figure(figsize=(11.4, sum(heights) + 0.9), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.14, h_pad=0.1)
        if not adaptive:
            figure.set_facecolor(theme.paper)
        parts = figure.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)[:, 0]
        for part, row in zip(parts, rows, strict=True):
            part.set_facecolor("none")
            for axis, panel in zip(part.subplots(1, len(row), squeeze=False)[0], row, strict=True):
                panel.draw(axis, study, colours)
                axis.set_title(panel.title, loc="left", fontsize=10, fontweight="bold")
        trace = study.trace
        figure.suptitle(
            f"{trace.model}; {trace.source}\n{trace.layers} layers, {trace.tokens:,} tokens, top {trace.top_k} of "
            f"{trace.num_experts} experts",
            color=colours.muted,
        )
        if adaptive:
            save_adaptive(figure, path, f"moealign report: {trace.model}")
        else:
            figure.savefig(path, dpi=130, facecolor=theme.paper, metadata={"Software": None})
        pyplot.close(figure)


# ---- the page ----------------------------------------------------------------------------------------------------


def _map_size(study: Study) -> tuple[float, float]:
    return 11.0, 1.0 + 0.34 * map_lines(study)


def _map_title(study: Study, layer: int) -> str:
    return f"Blocks of layer {layer}: the first {study.map_tokens:,} tokens, {study.map_size} rows a block"


def _variables_css(selector: str) -> str:
    def block(theme: Theme) -> str:
        pairs = {"ink": theme.ink, "muted": theme.muted, "rule": theme.rule, "paper": theme.paper}
        pairs.update({f"c{i}": colour for i, colour in enumerate(theme.series)})
        return " ".join(f"--{name}: {value};" for name, value in pairs.items())

    dark = f"@media (prefers-color-scheme: dark) {{ {selector} {{ {block(DARK)} }} }}"
    return f"{selector} {{ color-scheme: light dark; {block(LIGHT)} }} {dark}"


_CSS = """
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1180px; padding: 24px 20px 60px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5em; margin: 0 0 .2em } h2 { font-size: 1.12em; margin: 2.2em 0 .3em }
p { margin: .3em 0 .7em; max-width: 78ch } .muted { color: var(--muted) }
svg { width: 100%; height: auto; display: block } svg image { image-rendering: pixelated }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 0 28px }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 20px 0 8px }
.answers div { border: 1px solid var(--rule); border-radius: 8px; padding: 10px 14px }
.answers b { display: block; font-size: 1.5em; line-height: 1.25 }
.answers span { color: var(--muted); font-size: .88em }
.wide { overflow-x: auto } .wide svg { min-width: 640px }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92em }
th, td { text-align: right; padding: 3px 12px 3px 0; border-bottom: 1px solid var(--rule); white-space: nowrap }
th { font-weight: 600 } td:first-child, th:first-child { text-align: left }
details { margin: .4em 0 } summary { cursor: pointer; color: var(--muted) }
select { font: inherit; color: inherit; background: var(--paper); border: 1px solid var(--muted); border-radius: 6px;
  padding: 3px 8px }
output { margin-left: 14px; color: var(--muted) } code { font-size: .93em } [hidden] { display: none !important }
.key { display: inline-block; width: 1.1em; height: .8em; border: 1px solid var(--muted); vertical-align: -1px;
  background: repeating-linear-gradient(-45deg, transparent 0 2px, var(--muted) 2px 3px) }
"""

_SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent);
const chosen = document.getElementById("layer"), readout = document.getElementById("readout");
const maps = [...document.querySelectorAll("[data-layer]")];
function show() {
  for (const map of maps) map.hidden = map.dataset.layer !== chosen.value;
  readout.textContent = `${data.maps[chosen.value].length} blocks`;
}
chosen.addEventListener("change", show);
for (const map of maps) {
  map.addEventListener("pointermove", event => {
    const box = map.querySelector("svg").getBoundingClientRect(), [left, top, right, bottom] = data.axes;
    const x = (event.clientX - box.left) / box.width, y = (event.clientY - box.top) / box.height;
    const column = Math.floor((x - left) / (right - left) * data.across);
    const line = Math.floor((y - top) / (bottom - top) * data.lines);
    const inside = column >= 0 && column < data.across && line >= 0, block = line * data.across + column;
    const blocks = data.maps[map.dataset.layer], cell = inside && blocks[block];
    readout.textContent = cell
      ? `block ${block}: expert ${cell[0]}, ${cell[1]} of ${data.size} rows`
      : `${blocks.length} blocks`;
  });
}
show();
"""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], name: str) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<details><summary>{html.escape(name)}</summary><div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></details>"
    )


def _section(study: Study, panel: Panel, text: str, table: str = "") -> str:
    svg, _ = _svg(study, panel.name, panel.size, lambda axis, theme: panel.draw(axis, study, theme))
    wide = ' class="wide"' if panel.size[0] > 8 else ""
    return (
        f'<section id="{panel.name}"><h2 id="title-{panel.name}">{html.escape(panel.title)}</h2><p>{text}</p>'
        f"<div{wide}>{svg}</div>{table}</section>"
    )


def _maps(study: Study, layer: int) -> str:
    layers, axes = [], None
    for number in range(len(study.loads)):
        svg, axes = _svg(
            study,
            f"map-{number}",
            _map_size(study),
            lambda axis, theme, n=number: draw_map(axis, study, theme, n),  # type: ignore[misc]
        )
        hidden = "" if number == layer else " hidden"
        heading = f'<h3 class="muted" id="title-map-{number}" hidden>{_map_title(study, number)}</h3>'
        layers.append(f'<div class="wide" data-layer="{number}"{hidden}>{heading}{svg}</div>')
    options = "".join(
        f'<option value="{n}"{" selected" if n == layer else ""}>layer {n}</option>' for n in range(len(study.loads))
    )
    data = {
        "maps": [map_cells(study, n) for n in range(len(study.loads))],
        "axes": axes,
        "across": CELLS_ACROSS,
        "lines": map_lines(study),
        "size": study.map_size,
    }
    return (
        f'<section id="map"><h2>Blocks of a layer: the first {study.map_tokens:,} tokens, {study.map_size} rows a block'
        "</h2><p>A cell is a block, filled as far as it holds routes; a colour is an expert, "
        '<span class="key"></span> is padding. Point at a cell to read it.</p>'
        f'<p><label>Show <select id="layer">{options}</select></label><output id="readout" for="layer"></output></p>'
        f"{''.join(layers)}</section>"
        f'<script type="application/json" id="data">{json.dumps(data, separators=(",", ":"))}</script>'
    )


def _html(study: Study, layer: int) -> str:
    trace, machine, experts = study.trace, study.machine, study.experts
    by_name = {panel.name: panel for panel in panels(study)}
    overall = 1 - study.loads.sum() / np.maximum(study.blocks.sum(axis=0) * np.array(study.sizes), 1)
    best = study.sizes.index(study.best_size)
    last = study.gains[-1]
    gained = max(study.gains, key=lambda gain: gain.linear / gain.balanced)
    answers = [
        (str(study.best_size), f"rows a block are cheapest for all {trace.tokens:,} tokens at once, by the model"),
        (
            f"{100 * overall[best]:.1f} %",
            f"of the rows are padding then, in {int(study.blocks[:, best].sum()):,} blocks",
        ),
        (
            f"{study.imbalance.mean():.2f}",
            f"times the mean expert's load is on the busiest one, in {study.window} tokens",
        ),
        (f"{gained.linear / gained.balanced:.2f}x", f"less waiting by a balanced placement over {gained.ranks} ranks"),
        (f"{int((study.loads == 0).sum()):,}", f"of {study.loads.size:,} experts never have a route"),
    ]
    cards = "".join(f"<div><b>{value}</b><span>{html.escape(text)}</span></div>" for value, text in answers)
    load_rows = [
        [str(n), f"{row.min():,}", f"{int(np.median(row)):,}", f"{row.max():,}",
         f"{row.max() / max(row.mean(), 1e-300):.2f}", str(int((row == 0).sum()))]
        for n, row in enumerate(study.loads)
    ]  # fmt: skip
    size_rows = [
        [str(size), f"{int(study.blocks[:, i].sum()):,}", f"{100 * overall[i]:.1f} %", f"{c.memory:,.1f}",
         f"{c.cache:,.1f}", f"{c.matrix:,.1f}", f"{c.total:,.1f}",
         f"{study.measured[i]:,.1f}" if study.measured else "-"]
        for i, (size, c) in enumerate(zip(study.sizes, study.by_size, strict=True))
    ]  # fmt: skip
    token_rows = [
        [f"{row.tokens:,}", str(row.block_size), f"{min(row.costs):,.1f}",
         f"{100 * row.wasted[study.sizes.index(row.block_size)]:.1f} %", *(f"{value:,.1f}" for value in row.costs)]
        for row in study.by_tokens
    ]  # fmt: skip
    names = ("linear", "round_robin", "balanced", "replicated", "informed")
    gain_rows = [
        [str(g.ranks), *(f"{getattr(g, n):.3f}" for n in names), f"{g.linear / g.balanced:.2f}x"] for g in study.gains
    ]
    measured = (
        "Diamonds are the time of one layer in bf16 through <code>moealign.grouped_gemm</code>, measured on this GPU."
        if study.measured
        else f"Not measured: {html.escape(study.not_measured)}."
    )
    model = (
        "The model, for one layer: the weights of every expert that is hit once from memory, with the activations; the "
        "weights once more from the cache for each further block of an expert; the products of all rows, padding "
        "included. The three are added: nothing is taken to overlap, so it ranks block sizes and predicts no time. "
        f"Experts of {experts.hidden:,} x {experts.intermediate:,} with a gate, {experts.bytes} bytes a weight; "
        f"{html.escape(machine.name)}: {machine.memory / 1e12:.2f} TB/s memory, {machine.cache / 1e12:.2f} TB/s cache, "
        f"{machine.matrix / 1e12:,.0f} TFLOP/s."
    )
    parts = [
        f"<h1>Where the routes of {html.escape(trace.model)} go</h1>",
        f'<p class="muted">{html.escape(trace.source)}; revision {html.escape(trace.revision)}. {trace.layers} layers, '
        f"{trace.tokens:,} tokens, top {trace.top_k} of {trace.num_experts} experts, "
        f"{int(study.loads.sum()):,} routes kept.</p>",
        f'<div class="answers">{cards}</div>',
        _section(
            study, by_name["loads"], "Yellow experts are busy, dark ones idle; 1 is the mean of the layer.",
            _table(["layer", "least", "median", "most", "most / mean", "idle"], load_rows,
                   "Routes per layer, as numbers"),
        ),
        _section(
            study, by_name["imbalance"],
            "1 would be even. Where a batch is one run of tokens, this is how much longer the busiest expert works.",
        ),
        _maps(study, layer),
        '<div class="pair">',
        _section(study, by_name["padding"], "Rows that are computed and thrown away."),
        _section(study, by_name["blocks"], "Each block is a tile of the grouped GEMM, and reads its expert's weights."),
        _section(
            study, by_name["costs"], f"All {trace.tokens:,} tokens at once, mean of the layers. {measured}",
        ),
        _section(
            study, by_name["placement"],
            "Placements are made from the first half of the tokens and judged on the second, which they have not seen. "
            f"With {last.ranks} ranks every rank waits for one that has {last.linear:.2f} times its share.",
            _table(["ranks", "linear", "round robin", "balanced", "one more slot", "had it known", "linear / balanced"],
                   gain_rows, "Placements, as numbers"),
        ),
        "</div>",
        f'<p class="muted">{model}</p>',
        _table(["block size", "blocks", "padding", "memory us", "cache us", "products us", "sum us", "measured us"],
               size_rows, "Block sizes, as numbers"),
        _section(
            study, by_name["tokens"],
            "Framed: the block size to choose for a batch of that many tokens, by the model. 1.00 is the cheapest.",
            _table(["tokens", "choose", "us a layer", "padding", *(f"B = {size}" for size in study.sizes)],
                   token_rows, "Recommended block sizes, as numbers"),
        ),
    ]  # fmt: skip
    from . import __version__

    today = datetime.date.today().isoformat()
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>moealign report: {html.escape(trace.model)}</title>"
        f"<style>{_variables_css(':root')}{_CSS}</style></head><body>"
        + "\n".join(parts)
        + f'<p class="muted">moealign {__version__}, {today}.</p><script>{_SCRIPT}</script></body></html>\n'
    )


def write(study: Study, path: str | Path, *, layer: int = 0, theme: Theme = LIGHT) -> None:
    """Write the report; the ending of `path` decides: .html, .svg (both light and dark), or .png (in `theme`).

    Args:
        study: from :func:`study`.
        path: where to.
        layer: the layer whose blocks are shown first, in a picture alone.
        theme: :data:`LIGHT` or :data:`DARK`, for a .png.

    Raises:
        InvalidInput: another ending, or a layer that is not there.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise InvalidInput(f"{path}: expected a path that ends in {', '.join(FORMATS)}, got {path.suffix or 'none'}")
    if not 0 <= layer < len(study.loads):
        raise InvalidInput(f"layer: expected one below {len(study.loads)}, got {layer}")
    if path.suffix == ".html":
        path.write_text(_html(study, layer), encoding="utf-8")
    else:
        _picture(study, path, layer, theme)
