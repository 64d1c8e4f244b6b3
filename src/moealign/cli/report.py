"""`moealign report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from .. import costs
from .. import placement as placements
from .. import report as pages
from ..errors import MoealignError
from ..report import DARK, LIGHT
from ..terminal import escape, paragraph
from . import checks

__all__ = ["report"]

MAX_RANKS = 4096  # and copies of experts: placements of more take minutes


def report(
    trace_paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="TRACE",
            show_default=False,
            help="A routing trace, or two traces to compare (default: the one that ships).",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="File to write: .html, .svg (light and dark) or .png (default: ./report.html; none with --json).",
        ),
    ] = None,
    block_size: checks.BlockSizes = checks.BLOCK_SIZES,
    layer: Annotated[int, typer.Option(min=0, help="Layer whose blocks are drawn, or shown first.")] = 0,
    map_block_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=checks.MAX_BLOCK_SIZE,
            help="Rows per block in the drawing of blocks (default: the recommended size).",
        ),
    ] = None,
    hidden: checks.Hidden = None,
    intermediate: checks.Intermediate = None,
    gpu: Annotated[bool | None, typer.Option(help="Measure on a GPU (default: if there is one).")] = None,
    dark: Annotated[bool, typer.Option("--dark", help="Draw a .png on a dark background.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all numbers as JSON instead of a summary.")] = False,
    engine_config: Annotated[
        Path | None, typer.Option(help="Folder for tile configurations of vLLM and SGLang with these block sizes.")
    ] = None,
    device_name: Annotated[
        str, typer.Option(help="The GPU that --engine-config is for (default: this one, or the trace's).")
    ] = "",
    placement: Annotated[
        Path | None, typer.Option(help="File for a balanced placement of the experts: JSON in EPLB's format.")
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, max=MAX_RANKS, help="Number of ranks for --placement.")] = 8,
    replicas: Annotated[
        int | None,
        typer.Option(
            min=0, max=MAX_RANKS, help="Extra copies of experts in --placement (default: as few as fill all ranks)."
        ),
    ] = None,
) -> None:
    """Write a page about a trace: block sizes, the alignment's share of a layer, loads, and placements."""
    sizes = checks.ints("--block-size", block_size, checks.MAX_BLOCK_SIZE)
    trace_paths = trace_paths or [checks.SHIPPED]
    if output is None and not as_json:
        output = Path("report.html")
    if output is not None:
        checks.output("--output", output, pages.FORMATS)
    if placement is not None:
        checks.output("--placement", placement)
    outputs = (("--output", output), ("--engine-config", engine_config), ("--placement", placement))
    checks.distinct([(option, path) for option, path in outputs if path is not None])
    if dark and (output is None or output.suffix.lower() != ".png"):
        checks.fail(f"--dark: expected an --output that ends in .png (others follow the reader's scheme), got {output}")
    if gpu and not torch.cuda.is_available():
        checks.fail("--gpu: expected a GPU that torch can use, found none")
    if len(trace_paths) > 2:
        checks.fail(f"TRACE: expected one trace, or two to compare, got {len(trace_paths)}")
    if len(trace_paths) == 2 and (engine_config or placement):
        checks.fail("--engine-config, --placement: expected a single trace, got two")
    traces = [checks.load(path) for path in trace_paths]
    for trace in traces:
        checks.layer_of(trace, layer)
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    device = device_name or here or (traces[0].device if traces[0].device != "cpu" else "")
    theme = DARK if dark else LIGHT
    files: list[Path] = [] if output is None else [output]
    try:
        experts_of = [costs.experts_of(trace, hidden, intermediate) for trace in traces]
        if engine_config is not None:
            pages.check_configuration(traces[0], sizes, experts_of[0][1], device)
            paths = pages.configuration_paths(traces[0], experts_of[0][0], engine_config, device)
            checks.files_in("--engine-config", engine_config, paths)
        placed = None if placement is None else costs.place(traces[0], ranks, replicas)  # first: it may refuse
        studies = [
            pages.study(trace, sizes, experts, experts_source=source, on_gpu=gpu, map_size=map_block_size)
            for trace, (experts, source) in zip(traces, experts_of, strict=True)
        ]
        if engine_config is not None:
            files += pages.write_configuration(studies[0], engine_config, device)
        if placement is not None and placed is not None:
            placements.save(placement, placed)
            files.append(placement)
        if len(studies) == 2:
            comparison = pages.compare(*studies)
            if output is not None:
                pages.write_comparison(comparison, output, theme)
            text, numbers = pages.comparison_lines(comparison), pages.comparison_json(comparison)
        else:
            if output is not None:
                pages.write(studies[0], output, layer=layer, theme=theme)
            text, numbers = pages.lines(studies[0]), pages.as_json(studies[0])
    except MoealignError as error:
        checks.fail(error)
    if as_json:
        print(json.dumps(numbers, indent=1))
        return
    for line in text:
        print(paragraph(escape(line), indent=2) if line else "")
    for path in files:
        print(paragraph(f"Written: {escape(path)}, {path.stat().st_size / 1024:,.0f} KiB"))
