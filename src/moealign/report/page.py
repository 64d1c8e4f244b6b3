"""The page: the figures as SVGs, with their numbers as tables; it needs no network."""

from __future__ import annotations

import datetime
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import costs
from ..errors import InvalidInput
from .analysis import Study
from .figures import MAP_COLUMNS, Panel, block_map, map_cells, map_lines, map_text, panels, save_picture
from .summary import alignment_text, cards, context_lines
from .theme import ADAPTIVE, LIGHT, Theme, adaptive_svg, css_variables, drawing

__all__ = ["FORMATS", "document", "figure_section", "table_of", "write"]

FORMATS = (".html", ".png", ".svg")

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
ul { padding-left: 1.2em; margin: .3em 0 .7em }
.pair > * { min-width: 0 } .wide { overflow-x: auto } .wide.cut { border-right: 2px dashed var(--muted) }
.hint { display: none; color: var(--muted); font-size: .88em; margin: .2em 0 } .hint.cut { display: block }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92em }
th, td { text-align: right; padding: 3px 12px 3px 0; border-bottom: 1px solid var(--rule); white-space: nowrap }
.words td { white-space: normal; overflow-wrap: break-word; vertical-align: top }
.words td, .words th { text-align: left }
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
for (const map of maps) for (const kind of ["pointermove", "pointerdown"]) {
  map.addEventListener(kind, event => {
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


# Says that something can be scrolled where it can, in every figure and table.
_CUT = """
for (const wide of document.querySelectorAll(".wide")) new ResizeObserver(() => {
  if (!wide.clientWidth) return;
  for (const each of [wide, wide.closest("section, details").querySelector(".hint")])
    each.classList.toggle("cut", wide.scrollWidth > wide.clientWidth);
}).observe(wide);
"""

MAX_MAPS = 128  # layers whose blocks a page draws; each takes a third of a second
_HINT = '<p class="hint" aria-hidden="true">Swipe sideways to see all of it &rarr;</p>'


PIXELS_PER_INCH = 88, 120  # of a figure, at least and at most: its smallest text, of 7.5 points, has 9 pixels
_WIDE = ' class="wide" tabindex="0"'  # the keyboard scrolls what has the focus


def table_of(header: Sequence[str], rows: Sequence[Sequence[str]], name: str) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<details><summary>{html.escape(name)}</summary>{_HINT}<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></details>"
    )


def _svg(study: Any, panel: Panel) -> tuple[str, list[float]]:
    """An ``<svg>`` in the page's CSS variables, and its axes: left, top, right, bottom as fractions of the picture."""
    with drawing(ADAPTIVE, panel.name) as plt:
        figure, axis = plt.subplots(figsize=panel.size, layout="constrained")
        panel.draw(axis, study, ADAPTIVE)
        svg = adaptive_svg(figure)
        position = axis.get_position()
        plt.close(figure)
    least, most = (round(each * panel.size[0]) for each in PIXELS_PER_INCH)
    limits = f"min-width: {least}px; max-width: {most}px"
    svg = svg.replace("<svg ", f'<svg role="img" aria-labelledby="title-{panel.name}" style="{limits}" ', 1)
    return svg, [position.x0, 1 - position.y1, position.x1, 1 - position.y0]


def figure_section(study: Any, panel: Panel, text: str, table: str = "") -> str:
    svg, _ = _svg(study, panel)
    return (
        f'<section id="{panel.name}"><h2 id="title-{panel.name}">{html.escape(panel.title)}</h2><p>{text}</p>'
        f"{_HINT}<div{_WIDE}>{svg}</div>{table}</section>"
    )


def _mapped(layers: int, layer: int) -> list[int]:
    """The layers whose maps a page has: all of them, or `layer` and others at equal distances."""
    step = -(-layers // MAX_MAPS)
    return sorted({layer, *range(0, layers, step)})


def _maps(study: Study, layer: int) -> str:
    layers, axes, numbers = [], None, _mapped(len(study.loads), layer)
    for number in numbers:
        panel = block_map(study, number)
        svg, axes = _svg(study, panel)
        hidden = "" if number == layer else " hidden"
        heading = f'<h3 class="muted" id="title-{panel.name}" hidden>{panel.title}</h3>'
        layers.append(f'<div{_WIDE} data-layer="{number}"{hidden}>{heading}{svg}</div>')
    options = "".join(f'<option value="{n}"{" selected" if n == layer else ""}>layer {n}</option>' for n in numbers)
    part = f" The page has {len(numbers)} of {len(study.loads)} layers." if len(numbers) < len(study.loads) else ""
    data = {
        "maps": {n: map_cells(study, n) for n in numbers},
        "axes": axes,
        "across": MAP_COLUMNS,
        "lines": map_lines(study),
        "size": study.map_size,
    }
    return (
        f'<section id="map"><h2>Blocks of a layer: {map_text(study)}</h2>'
        "<p>A cell is a block, filled up to the routes it holds; each colour is an expert, "
        '<span class="key"></span> is padding. Point at a cell, or tap it, to read its numbers.'
        f"{part}</p>"
        f'<p><label>Show <select id="layer">{options}</select></label><output id="readout" for="layer"></output></p>'
        f"{_HINT}{''.join(layers)}</section>"
        f'<script type="application/json" id="data">{json.dumps(data, separators=(",", ":"))}</script>'
    )


def _answers(study: Study) -> str:
    """The main results, as cards at the top of the page."""
    boxes = "".join(f"<div><b>{value}</b><span>{html.escape(text)}</span></div>" for value, text in cards(study))
    return f'<div class="answers">{boxes}</div>'


_WHERE = """<code>moealign.fused_moe</code> chooses its block size itself; <code>moealign tune</code> finds out whether
another one is faster. vLLM and SGLang read block sizes from a file for each device and size of a layer:
<code>moealign report TRACE --engine-config DIR</code> writes it, and <code>VLLM_TUNED_CONFIG_FOLDER=DIR</code> or
<code>SGLANG_MOE_CONFIG_DIR=DIR</code> makes the engine read it.
<code>moealign report TRACE --placement FILE --ranks N</code> writes the balanced placement, for SGLang's
<code>--init-expert-location</code> and for <code>moealign.parallel.ExpertPlacement.load</code>."""


def _advice(study: Study) -> str:
    """The time of alignment, and where block sizes and placements are set."""
    if not study.advice:
        return ""
    times = "".join(f"<li>{html.escape(alignment_text(each, study.trace.layers))}</li>" for each in study.advice)
    return (
        f"<h2>What alignment costs</h2><ul>{times}</ul><h2>Where to set block sizes and placements</h2><p>{_WHERE}</p>"
    )


def _load_table(study: Study) -> str:
    summaries = [costs.summarize(loads) for loads in study.loads]
    rows = [
        [str(layer), f"{s.min:,}", f"{s.median:,}", f"{s.max:,}", f"{s.imbalance:.2f}", str(s.idle)]
        for layer, s in enumerate(summaries)
    ]
    header = ["layer", "min", "median", "max", "max / mean", "idle"]
    return table_of(header, rows, "Routes per layer, as numbers")


def _size_table(study: Study, total: list[costs.Padding]) -> str:
    rows = []
    for i, (padding, cost) in enumerate(zip(total, study.by_size, strict=True)):
        times = [f"{value:,.1f}" for value in (cost.memory, cost.cache, cost.matrix, cost.total)]
        time = study.measured[i] if study.measured else None
        measured = "-" if time is None else f"{time:,.1f}"
        rows.append([str(padding.block_size), f"{padding.blocks:,}", f"{100 * padding.wasted:.1f} %", *times, measured])
    header = ["block size", "blocks", "padding", "memory us", "cache us", "products us", "sum us", "measured us"]
    return table_of(header, rows, "Block sizes, as numbers")


def _token_table(study: Study) -> str:
    rows = []
    for row in study.by_tokens:
        wasted = row.wasted[study.sizes.index(row.block_size)]
        each = [f"{value:,.1f}" for value in row.costs]
        rows.append([f"{row.tokens:,}", str(row.block_size), f"{min(row.costs):,.1f}", f"{100 * wasted:.1f} %", *each])
    header = ["tokens", "choose", "us per layer", "padding", *(f"B = {size}" for size in study.sizes)]
    return table_of(header, rows, "Recommended block sizes, as numbers")


def _placement_table(study: Study) -> str:
    placements = ("linear", "round_robin", "balanced", "replicated", "informed")
    rows = [
        [str(g.ranks), *(f"{getattr(g, name):.3f}" for name in placements), f"{g.linear / g.balanced:.2f}x"]
        for g in study.gains
    ]
    header = ["ranks", "linear", "round robin", "balanced", "one more slot", "with hindsight", "linear / balanced"]
    return table_of(header, rows, "Placements, as numbers")


def _model_text(study: Study) -> str:
    machine = study.machine
    return html.escape(
        "For one layer, the model adds three times: reading from memory the activations and the weights of every "
        "expert that has a route; reading the weights again from the cache for each further block of an expert; and "
        "the products of all rows, padding included. It ignores overlap; its ranking of block sizes is better than its "
        f"times. Rates: {machine.memory / 1e12:.2f} TB/s memory, {machine.cache / 1e12:.2f} TB/s cache, "
        f"{machine.matrix / 1e12:,.0f} TFLOP/s."
    )


def _html(study: Study, layer: int) -> str:
    trace = study.trace
    by_name = {panel.name: panel for panel in panels(study)}
    total = [costs.padding(study.batches, size) for size in study.sizes]
    measured = (
        "Diamonds are the time of one layer in bf16 through <code>moealign.grouped_gemm</code>, measured on this GPU."
        if study.measured
        else f"Not measured: {html.escape(study.not_measured)}."
    )
    placement = "Placements are computed from the first half of the tokens and judged on the second half. "
    if study.gains:
        last = study.gains[-1]
        placement += (
            f"With a linear placement on {last.ranks} ranks, every rank waits for one that has {last.linear:.2f} times "
            "its share."
        )
    experts = f"experts of hidden size {study.experts.hidden:,} and intermediate size {study.experts.intermediate:,}"

    def section(name: str, text: str, table: str = "") -> str:
        return figure_section(study, by_name[name], text, table)

    parts = [
        "<h1>Routing report</h1>",
        f"<p>{html.escape(_origin(study))}</p>",
        f'<p class="muted">{trace.layers} layers, {trace.tokens:,} tokens, top {trace.top_k} of {trace.num_experts} '
        f"experts, {int(study.loads.sum()):,} routes. {html.escape(' '.join(context_lines(study)))}</p>",
        _answers(study),
        _advice(study),
        section(
            "loads",
            "Yellow experts are busy, dark ones idle; 1 is the mean of the layer.",
            _load_table(study),
        ),
        section(
            "imbalance",
            "1 is even. In each batch, the busiest expert has this many times the mean load.",
        ),
        _maps(study, layer),
        '<div class="pair">',
        section("padding", "Rows that are computed and discarded."),
        section("blocks", "Each block is a tile of the grouped GEMM and reads its expert's weights."),
        section("costs", f"Batches of {study.main_tokens:,} tokens, {experts}, mean of the layers. {measured}"),
        section("placement", placement, _placement_table(study)) if study.gains else "",
        "</div>",
        f'<p class="muted">{_model_text(study)}</p>',
        _size_table(study, total),
        section(
            "tokens",
            "Framed: the cheapest block size by the model for a batch of that many tokens, which has 1.00.",
            _token_table(study),
        ),
    ]
    return document(f"moealign report: {trace.model}", "\n".join(parts), _SCRIPT)


def _origin(study: Study) -> str:
    trace = study.trace
    parts = (trace.model, trace.source, f"revision {trace.revision}" if trace.revision else "")
    return "; ".join(filter(None, parts)) + "."


def document(title: str, body: str, script: str = "") -> str:
    """A page that needs no network."""
    from .. import __version__

    today = datetime.date.today().isoformat()
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title>"
        f"<style>{css_variables(':root')}{_CSS}</style></head><body>{body}"
        f'<p class="muted">moealign {__version__}, {today}.</p>'
        f"<script>{script}{_CUT}</script></body></html>\n"
    )


def write(study: Study, path: str | Path, *, layer: int = 0, theme: Theme = LIGHT) -> None:
    """Write the report; the ending of `path` decides: .html, .svg (both for light and dark), or .png (in `theme`).

    Args:
        study: from :func:`study`.
        path: the output file.
        layer: the layer whose blocks a page shows first, or a picture shows.
        theme: :data:`LIGHT` or :data:`DARK`, for a .png.

    Raises:
        InvalidInput: another ending, or no such layer.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise InvalidInput(f"{path}: expected a path that ends in {', '.join(FORMATS)}, got {path.suffix or 'none'}")
    if not 0 <= layer < len(study.loads):
        raise InvalidInput(f"layer: expected one below {len(study.loads)}, got {layer}")
    if path.suffix.lower() == ".html":
        path.write_text(_html(study, layer), encoding="utf-8")
    else:
        save_picture(study, path, layer, theme)
