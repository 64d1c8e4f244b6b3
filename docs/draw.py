#!/usr/bin/env python3
"""Draw the pictures of docs/ from layouts that the library computes, and fill in figures from the measurements.

    python docs/draw.py            # write docs/images/{layout,trace,report}*.svg and the figures on the pages
    python docs/draw.py --check    # write nothing; fail if a drawing or a figure is stale

The SVGs follow the reader's light or dark scheme.  Their numbers are the values of the tensors.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from moealign import BlockLayout, align, align_batched
from moealign.bench import microseconds
from moealign.report import ADAPTIVE, save_adaptive, study, style
from moealign.report import write as write_report
from moealign.report.figures import draw_block_map, map_cells, map_inches, map_lines
from moealign.trace import example_trace, load_trace

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
TOPK_IDS = torch.tensor([[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]])  # the example of docs/contract.md
ALL: dict[str, bool] = dict.fromkeys(
    ("expert_counts", "expert_offsets", "group_ends", "positions", "block_rows"), True
)  # fmt: skip
BLOCK = 4
WIDTH = 22.5  # cells of a drawing: at the width of a page, its smallest text has the size of a footnote
PER_LINE = 4  # blocks
REPORT_SIZES = (16, 32, 64, 128, 256)


def canvas(height: float, title: str) -> tuple[Any, Any]:
    """An empty drawing of `WIDTH` by `height` cells, y downwards."""
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(0.36 * WIDTH, 0.36 * height))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, WIDTH), ylim=(height, 0), aspect="equal")
    axis.axis("off")
    text(axis, 0.5, 0.8, title, weight="bold", ha="left", size=10)
    return figure, axis


def text(axis: Any, x: float, y: float, value: object, **options: Any) -> None:
    settings = {"ha": "center", "va": "center", "size": 9, "color": ADAPTIVE.ink, **options}
    axis.text(x, y, str(value), **settings)


def cell(axis: Any, x: float, y: float, value: object, colour: str | None, *, hatched: bool = False) -> None:
    """One element: filled with its expert's colour, hatched if it is padding, or empty if it is past the end."""
    from matplotlib.patches import Rectangle

    options: dict[str, Any] = {"linewidth": 0.8, "edgecolor": ADAPTIVE.muted}
    if hatched:
        options["hatch"] = "////"
    axis.add_patch(Rectangle((x + 0.04, y + 0.04), 0.92, 0.92, facecolor=colour or "none", **options))
    text(axis, x + 0.5, y + 0.53, value, size=8, color=ADAPTIVE.paper if colour and not hatched else ADAPTIVE.ink)


def colour_of(expert: int) -> str | None:
    return ADAPTIVE.series[expert] if expert >= 0 else None


def rows(axis: Any, y: float, layout: BlockLayout, bins: Sequence[int], first: float = 4.5) -> float:
    """Draw sorted_token_ids block by block below expert_ids; return the y coordinate below them."""
    size, sentinel = layout.block_size, layout.num_routes
    used = layout.num_tokens_post_padded.item() // size
    ids = layout.sorted_token_ids.tolist()
    blocks = -(-len(ids) // size)
    for start in range(0, blocks, PER_LINE):
        text(axis, first - 0.4, y + 0.45, "expert_ids", ha="right", size=8)
        text(axis, first - 0.4, y + 1.5, "sorted_token_ids", ha="right", size=8)
        x = first
        for block in range(start, min(start + PER_LINE, blocks)):
            part = ids[block * size : (block + 1) * size]
            name = layout.expert_ids[block].item()
            text(axis, x + len(part) / 2, y + 0.45, name, size=9, weight="bold" if block < used else "normal")
            for i, route in enumerate(part):
                empty = route == sentinel
                colour = None if empty else colour_of(bins[block])
                cell(axis, x + i, y + 1, route, colour, hatched=empty and block < used)
            x += size + 0.35
        y += 2.7
    return y


def draw_routes() -> Any:
    """topk_ids and its layout."""
    layout = align(TOPK_IDS, block_size=BLOCK, num_experts=5)
    figure, axis = canvas(15.8, "Four tokens, three experts each, become blocks of four rows")
    text(axis, 4.5, 1.9, "topk_ids: the expert of each route", size=9, ha="left", color=ADAPTIVE.muted)
    text(axis, 13.5, 1.9, "the number of each route, token * 3 + k", size=9, ha="left", color=ADAPTIVE.muted)
    for token, experts in enumerate(TOPK_IDS.tolist()):
        text(axis, 4.1, 2.9 + token, f"token {token}", ha="right", size=8)
        for k, expert in enumerate(experts):
            cell(axis, 4.5 + k, 2.4 + token, expert, colour_of(expert))
            cell(axis, 13.5 + k, 2.4 + token, 3 * token + k, colour_of(expert))
    text(axis, 4.5, 7.5, "sorted by expert, in order, and padded to whole blocks", ha="left", color=ADAPTIVE.muted)
    bins = layout.expert_ids.tolist()
    y = rows(axis, 8.1, layout, bins)
    total = layout.num_tokens_post_padded.item()
    legend = f"num_tokens_post_padded = {total}; hatched: padding, {layout.num_routes}; empty: never read"
    text(axis, 4.5, y + 0.3, legend, ha="left", color=ADAPTIVE.muted)
    text(axis, 4.5, y + 1.3, "expert 0 has no routes, so it has no block", ha="left", color=ADAPTIVE.muted)
    return figure


def draw_extras() -> Any:
    """The optional outputs, below the layout they belong to."""
    layout = align(TOPK_IDS, block_size=BLOCK, num_experts=5, **ALL)  # type: ignore[arg-type]
    figure, axis = canvas(16.6, "More outputs from the same launch")
    below = rows(axis, 1.6, layout, layout.expert_ids.tolist()) + 0.4
    lines: list[tuple[str, list[int], Callable[[int], str | None]]] = [
        ("block_rows", layout.block_rows.tolist(), lambda i: colour_of(layout.expert_ids[i].item())),
        ("expert_counts", layout.expert_counts.tolist(), colour_of),
        ("expert_offsets", layout.expert_offsets.tolist(), lambda i: colour_of(i) if i < 5 else None),
        ("group_ends", layout.group_ends.tolist(), colour_of),
        ("positions", layout.positions.tolist(), lambda i: colour_of(TOPK_IDS.flatten()[i].item())),
    ]
    notes = (
        "kept rows of each block",
        "routes of each expert",
        "first row of each expert; the last value is the total",
        "end of each expert without padding: offs of grouped_mm",
        "the row of each route",
    )
    for i, ((name, values, colour), note) in enumerate(zip(lines, notes, strict=True)):
        y = below + 1.85 * i
        text(axis, 4.1, y + 0.5, name, ha="right", size=8)
        for j, value in enumerate(values):
            cell(axis, 4.5 + j, y, value, colour(j))
        text(axis, 4.5 + len(values) + 0.6, y + 0.5, note, ha="left", size=8.5, color=ADAPTIVE.muted)
    return figure


def draw_maps() -> Any:
    """Expert parallelism: the two ways to use an expert_map."""
    expert_map = torch.tensor([-1, -1, 0, -1, 1])
    figure, axis = canvas(15.6, "Experts 2 and 4 live here, as local 0 and 1: expert_map = [-1, -1, 0, -1, 1]")
    stays = align(TOPK_IDS, block_size=BLOCK, num_experts=5, expert_map=expert_map)
    everyone = align(TOPK_IDS, block_size=BLOCK, num_experts=5).expert_ids.tolist()
    text(axis, 4.5, 2.1, "default: blocks of other ranks stay in place, marked -1", ha="left", color=ADAPTIVE.muted)
    y = rows(axis, 2.7, stays, everyone) + 0.9
    goes = align(TOPK_IDS, block_size=BLOCK, num_experts=5, expert_map=expert_map, ignore_invalid_experts=True)
    text(axis, 4.5, y, "ignore_invalid_experts=True: their routes are dropped", ha="left", color=ADAPTIVE.muted)
    local = {0: 2, 1: 4, -1: -1}
    rows(axis, y + 0.6, goes, [local[e] for e in goes.expert_ids.tolist()])
    return figure


def draw_batched() -> Any:
    """The batched layout."""
    counts = torch.tensor([2, 3, 0, 6, 8])
    layout = align_batched(counts, max_tokens_per_batch=8, block_size=BLOCK)
    figure, axis = canvas(19.9, "Five batches of up to eight rows, holding 2, 3, 0, 6 and 8")
    for batch, count in enumerate(counts.tolist()):
        text(axis, 4.1, 2.5 + batch, f"batch {batch}", ha="right", size=8)
        for j in range(8):
            filled = j < count
            cell(axis, 4.5 + j, 2 + batch, 8 * batch + j if filled else "", colour_of(batch) if filled else None)
    y = rows(axis, 7.8, layout, layout.expert_ids.tolist())
    total = layout.num_tokens_post_padded.item()
    text(axis, 4.5, y + 0.3, f"num_tokens_post_padded = {total}; the sentinel is 40", ha="left", color=ADAPTIVE.muted)
    return figure


def draw_trace() -> Any:
    """The blocks of one layer of the example trace."""
    from matplotlib import pyplot

    shown = study(load_trace(example_trace()), (64,), on_gpu=False, map_size=64)
    width, height = map_inches(map_lines(shown))
    figure, axis = pyplot.subplots(figsize=(width, height + 0.3), layout="constrained")
    draw_block_map(axis, map_cells(shown, 1), shown.map_size, ADAPTIVE)
    axis.set_title(
        f"Layer 1 of the example trace: {shown.map_tokens:,} tokens x 8 of 64 experts, blocks of 64 rows", loc="left"
    )
    return figure


DRAWINGS: dict[str, tuple[Callable[[], Any], str]] = {
    "layout-routes": (draw_routes, "topk_ids and the block-aligned layout of the worked example"),
    "layout-extras": (draw_extras, "block_rows, expert_counts, expert_offsets, group_ends and positions"),
    "layout-maps": (draw_maps, "The layout under an expert map, with and without foreign routes"),
    "layout-batched": (draw_batched, "The batched layout"),
    "trace-blocks": (draw_trace, "Blocks of one layer of the example trace"),
}


# ---- figures in the text ---------------------------------------------------------------------------------------------

#: A figure on a page is a link to the tables.  Its title names the CSV, the case (with the number of routes if the case
#: has several) and the implementation.
FIGURE = re.compile(r'\[([\d.,]+)\]\((?:\.\./)?results\.md "(\w+): ([^",]+), ([^",]+)"\)')


def with_figures(text: str) -> str:
    """`text` with the current value of every figure.

    Raises:
        LookupError: a figure has no row, or several different ones.
    """

    def updated(figure: re.Match[str]) -> str:
        _, name, case, impl = figure.groups()
        with (ROOT / "benchmarks" / "results" / f"{name}.csv").open(newline="") as source:
            rows = [
                row
                for row in csv.DictReader(source)
                if row["impl"] == impl and case in (row["case"], f"{row['case']} {row['routes']}")
            ]
        if len({row["median_us"] for row in rows}) != 1:
            raise LookupError(f"{name}.csv: expected one row of {case}, {impl}, got {len(rows)}")
        return figure[0].replace(f"[{figure[1]}]", f"[{microseconds(float(rows[0]['median_us']))}]", 1)

    return FIGURE.sub(updated, text)


def updated_pages() -> dict[Path, str]:
    """Every page of docs/ with current figures."""
    pages = {path: path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))}
    return {path: with_figures(text) for path, text in pages.items()}


def write(folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    write_report(study(load_trace(example_trace()), REPORT_SIZES, on_gpu=False), folder / "report.svg", layer=1)
    from matplotlib import pyplot

    for name, (draw, title) in DRAWINGS.items():
        with pyplot.rc_context({**style(ADAPTIVE, name), "axes.grid": False}):
            figure = draw()
            save_adaptive(figure, folder / f"{name}.svg", title)
            pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a drawing or a figure is stale")
    args = parser.parse_args(arguments)
    if not args.check:
        write(IMAGES)
        for path, text in updated_pages().items():
            path.write_text(text)
        print(f"{IMAGES}: wrote {len(DRAWINGS)} drawings, and the figures on the pages")
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch))
        stale = [n for n in (*DRAWINGS, "report") if _text(IMAGES / f"{n}.svg") != _text(Path(scratch) / f"{n}.svg")]
    for name in stale:
        print(f"{IMAGES / name}.svg: stale; run docs/draw.py")
    old = [path for path, text in updated_pages().items() if text != path.read_text()]
    for path in old:
        print(f"{path.relative_to(ROOT)}: its figures are not those of benchmarks/results; run docs/draw.py")
    return int(bool(stale or old))


def _text(path: Path) -> list[str]:
    """The text of a drawing, which does not depend on the version of matplotlib."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text()) if path.exists() else []


if __name__ == "__main__":
    sys.exit(main())
