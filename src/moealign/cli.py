"""The command line: demo, inspect, check, info."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table
from rich.text import Text

from . import __version__, report
from .align import align, explain
from .dispatch import backends
from .errors import MoealignError
from .integrations.engines import ENGINES, told
from .layout import EXTRAS
from .testing import argsort_align, check_backend, difference, oracle_align
from .trace import Trace, example_trace, load_trace

__all__ = ["app"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Block-aligned layouts for Mixture-of-Experts kernels.",
)


def _console() -> Console:
    # Where the output goes to a file or a pipe, tables are as wide as they need to be.
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def _fail(message: object) -> NoReturn:
    print(f"moealign: {message}", file=sys.stderr)
    raise typer.Exit(2)


def _load(path: Path) -> Trace:
    try:
        return load_trace(path)
    except MoealignError as error:
        _fail(error)


def _devices(name: str) -> torch.device:
    return torch.device("cuda" if name in ("cuda", "triton") and torch.cuda.is_available() else "cpu")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Where the picture of one layer's blocks goes.")] = Path("blocks.png"),
    block_size: Annotated[int, typer.Option(min=1, help="Rows of a block.")] = 64,
    layer: Annotated[int, typer.Option(min=0, help="The layer that is computed and drawn.")] = 1,
) -> None:
    """Align a real routing trace on every backend: checked, timed, used and drawn."""
    console = _console()
    trace = _load(example_trace())
    if layer >= trace.layers:
        _fail(f"--layer: expected a layer below {trace.layers}, got {layer}")
    if not output.parent.is_dir():
        _fail(f"--output: expected a path in a folder that exists, got {output}")
    console.print(f"[bold]The trace[/]: {trace.model}")
    console.print(f"reading {trace.source}")
    routes = trace.tokens * trace.top_k
    console.print(
        f"{trace.layers} layers of {trace.tokens:,} tokens, each to {trace.top_k} of {trace.num_experts} experts: "
        f"{routes:,} routes, in blocks of {block_size} rows\n"
    )

    able = [name for name, reason in backends().items() if reason is None]
    table = Table(title="Every layer on every backend", title_justify="left")
    for name in ("layer", "backend"):
        table.add_column(name)
    for name in ("blocks", "padding", "time", "torch argsort", "speed-up"):
        table.add_column(name, justify="right")
    table.add_column("equals the oracle")
    wrong = 0
    sizes: dict[str, Any] = {"block_size": block_size, "num_experts": trace.num_experts}
    wanted: dict[str, Any] = dict.fromkeys(EXTRAS, True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("aligning", total=trace.layers * len(able))
        for number in range(trace.layers):
            expected = oracle_align(trace.topk_ids[number], **sizes)
            for name in able:
                device = _devices(name)
                ids = trace.topk_ids[number].to(device)
                found = difference(align(ids, **sizes, **wanted, backend=name), expected)  # type: ignore[arg-type]
                wrong += found is not None
                ours = report.median_time(lambda ids=ids, name=name: align(ids, **sizes, backend=name), device)  # type: ignore[misc]
                plain = report.median_time(lambda ids=ids: argsort_align(ids, block_size, trace.num_experts), device)  # type: ignore[misc]
                cost = report.padding(ids, trace.num_experts, block_size)
                table.add_row(
                    str(number),
                    name,
                    str(cost.blocks),
                    f"{cost.wasted:.1%}",
                    f"{ours:,.0f} us",
                    f"{plain:,.0f} us",
                    f"{plain / ours:.1f}x",
                    "[green]yes, all outputs[/]" if found is None else f"[red]no: {found}[/]",
                )
                progress.advance(bar)
    console.print(table)
    console.print(
        "padding: the part of all rows that holds no route. torch argsort: the same three tensors by a stable"
    )
    console.print(
        "argsort in torch on the same device. Times are medians on this machine, and tell little elsewhere.\n"
    )

    ids = trace.topk_ids[layer]
    worst, blocks = report.expert_layer(ids, trace.num_experts, block_size)
    verdict = "[green]equal[/]" if worst < 1e-9 else "[red]DIFFERENT[/]"
    wrong += worst >= 1e-9
    console.print(
        f"[bold]Used[/]: layer {layer} with random experts, {blocks} blocks one by one through the layout, against the "
        f"dense computation: {verdict} (largest difference {worst:.1e} in float64)"
    )
    part = ids[: min(trace.tokens, 1024)]
    layout = align(part, **sizes, block_rows=True)
    assert layout.block_rows is not None
    title = f"Layer {layer}, {part.shape[0]:,} tokens x {trace.top_k} experts, blocks of {block_size} rows"
    report.draw_blocks(layout, layout.block_rows, title, output)
    console.print(f"[bold]Drawn[/]: {output}, the blocks of the first {part.shape[0]:,} tokens of layer {layer}")
    if wrong:
        raise typer.Exit(1)


@app.command()
def inspect(
    trace_path: Annotated[Path, typer.Argument(metavar="TRACE", help="A .safetensors routing trace.")],
    block_size: Annotated[str, typer.Option(help="Block sizes to compare, joined by commas.")] = "16,32,64,128",
) -> None:
    """Load per expert, imbalance, blocks and padding of a trace, per layer and in all; and which block size to try."""
    console = _console()
    try:
        sizes = sorted({int(part) for part in block_size.split(",")})
        if sizes[0] < 1:
            raise ValueError
    except ValueError:
        _fail(f"--block-size: expected ints of at least 1 joined by commas, got {block_size!r}")
    trace = _load(trace_path)
    console.print(f"[bold]{trace_path}[/]: {trace.model}; {trace.source}; revision {trace.revision}")
    console.print(
        f"{trace.layers} layers, {trace.tokens:,} tokens, {trace.top_k} of {trace.num_experts} experts each\n"
    )

    loads = Table(title="Load per expert (routes)", title_justify="left")
    loads.add_column("layer")
    for name in ("least", "median", "most", "imbalance", "idle"):
        loads.add_column(name, justify="right")
    loads.add_column("experts, in order")
    costs = Table(title="Blocks, and the part of their rows that is padding", title_justify="left")
    costs.add_column("layer")
    for size in sizes:
        costs.add_column(f"B = {size}", justify="right")
    total: dict[int, report.Padding] = {}
    summed = [0] * trace.num_experts
    # The text column of loads is bars, which must not wrap.
    loads.columns[-1].no_wrap = True

    def add_load(name: str, load: report.LayerLoad) -> None:
        middle = sorted(load.counts)[len(load.counts) // 2]
        figures = (min(load.counts), middle, max(load.counts))
        loads.add_row(name, *map(str, figures), f"{load.imbalance:.2f}", str(load.idle), Text(load.bars()))

    steps = track(
        range(trace.layers),
        "inspecting",
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    for number in steps:
        ids = trace.topk_ids[number]
        load = report.layer_load(ids, trace.num_experts)
        summed = [a + b for a, b in zip(summed, load.counts, strict=True)]
        add_load(str(number), load)
        row = []
        for size in sizes:
            cost = report.padding(ids, trace.num_experts, size)
            total[size] = total[size] + cost if size in total else cost
            row.append(f"{cost.blocks:,}, {cost.wasted:.1%}")
        costs.add_row(str(number), *row)
    add_load("all", report.LayerLoad(summed))
    costs.add_row("all", *(f"{total[size].blocks:,}, {total[size].wasted:.1%}" for size in sizes), style="bold")
    console.print(loads)
    console.print("imbalance: the busiest expert's load over the mean. idle: experts without a route.\n")
    console.print(costs)
    choices = [total[size] for size in sizes]
    least = min(choices, key=lambda choice: (choice.wasted, -choice.block_size))
    chosen = report.recommend(choices)
    console.print(
        f"Least padding: blocks of {least.block_size} ({least.wasted:.1%}); a smaller block always pads less, but "
        "every block reads its expert's weights once."
    )
    console.print(
        f"[bold]Try first: blocks of {chosen.block_size}[/] ({chosen.wasted:.1%} padding, {chosen.blocks:,} blocks): "
        + (
            "the largest that wastes at most 20%."
            if chosen.wasted <= 0.2
            else "the one that wastes least; none stays below 20%."
        )
    )


@app.command()
def check(
    cases: Annotated[int, typer.Option(min=1, help="Random cases a backend.")] = 200,
    seed: Annotated[int, typer.Option(help="Where the random numbers start.")] = 0,
) -> None:
    """Is this installation right?  Every backend of this machine against the plain-loop oracle, in seconds."""
    console = _console()
    table = Table(title=f"moealign {__version__} against the oracle", title_justify="left")
    for name in ("backend", "device", "cases", "wrong", "verdict"):
        table.add_column(name)
    bad = 0
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for name, reason in backends().items():
            if reason is not None:
                table.add_row(name, "", "", "", Text(f"not here: {reason}"))
                continue
            device = _devices(name)
            wrong: list[str] = []
            bar = progress.add_task(name, total=cases)
            for said, found in check_backend(name, device, cases, seed):
                progress.advance(bar)
                if found is not None:
                    wrong.append(f"{said}: {found}")
            bad += len(wrong)
            verdict = Text("right", "green") if not wrong else Text(wrong[0], "red")
            table.add_row(name, str(device), str(cases), str(len(wrong)), verdict)
    console.print(table)
    if bad:
        raise typer.Exit(1)


@app.command()
def info() -> None:
    """Versions, devices, backends and why one is not available, and the environment variables."""
    console = _console()
    versions = Table("package", "version", title="Versions", title_justify="left")
    versions.add_row("moealign", __version__)
    versions.add_row("Python", platform.python_version())
    for name in ("torch", "numpy", "numba", "triton", "cuda-core", "transformers", "safetensors"):
        try:
            versions.add_row(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            versions.add_row(name, "not installed")
    console.print(versions)
    devices = Table("device", "what", title="Devices", title_justify="left")
    devices.add_row("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        devices.add_row(f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}")
    console.print(devices)
    table = Table("backend", "state", title="Backends, in the order in which a call tries them", title_justify="left")
    for name, reason in backends().items():
        if reason is not None:
            table.add_row(name, Text(f"not here: {reason}"))
            continue
        ids = torch.zeros(1, 8, dtype=torch.int32, device=_devices(name))
        note = explain(ids, block_size=16, num_experts=64, backend=name).note
        table.add_row(name, Text(f"ready; {note}" if note else "ready"))
    console.print(table)
    engines = Table("engine", "drop-in", title="Engines, in processes started from here", title_justify="left")
    for name in ENGINES:
        engines.add_row(name, Text(told(name)))
    console.print(engines)
    variables = Table("variable", "value", title="Environment", title_justify="left")
    for name in (
        "MOEALIGN_BACKEND",
        "MOEALIGN_NUM_THREADS",
        "MOEALIGN_CACHE_DIR",
        *(e.variable for e in ENGINES.values()),
    ):
        variables.add_row(name, Text(os.environ.get(name) or "not set"))
    console.print(variables)
