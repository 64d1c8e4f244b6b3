"""The command line: demo, inspect, report, bench, check, tune, info."""

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

from . import __version__, bench, costs, page, report
from .alignment import align, explain
from .calls.dispatch import backends
from .errors import MoealignError
from .experts import tune as tuning
from .experts.launch import target_of, tuning_path
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
    sizes = _sizes(block_size)
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


@app.command("report")
def write_report(
    trace_path: Annotated[Path, typer.Argument(metavar="TRACE", help="A .safetensors routing trace.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where to: .html, .svg (both for light and dark) or .png.")
    ] = Path("report.html"),
    block_size: Annotated[str, typer.Option(help="Block sizes to compare, joined by commas.")] = "16,32,64,128,256",
    layer: Annotated[int, typer.Option(min=0, help="The layer whose blocks are drawn, or shown first.")] = 0,
    map_block_size: Annotated[
        int | None, typer.Option(min=1, help="Rows of a block where blocks are drawn (default: the recommended)")
    ] = None,
    hidden: Annotated[int, typer.Option(min=1, help="Hidden size of the model, for the costs.")] = 2048,
    intermediate: Annotated[int, typer.Option(min=1, help="Width inside an expert, for the costs.")] = 768,
    gpu: Annotated[bool | None, typer.Option(help="Measure on a GPU too (default: if there is one)")] = None,
    dark: Annotated[bool, typer.Option("--dark", help="A .png on dark ground.")] = False,
) -> None:
    """One page about a trace: loads, imbalance, padding, blocks, costs, and what a better placement would gain."""
    sizes = _sizes(block_size)
    if output.suffix not in page.FORMATS:
        _fail(f"--output: expected a path that ends in {', '.join(page.FORMATS)}, got {output}")
    if not output.parent.is_dir():
        _fail(f"--output: expected a path in a folder that exists, got {output}")
    if gpu and not torch.cuda.is_available():
        _fail("--gpu: expected a GPU that torch can use, found none")
    trace = _load(trace_path)
    if layer >= trace.layers:
        _fail(f"--layer: expected a layer below {trace.layers}, got {layer}")
    console = _console()
    with console.status("computing and drawing", spinner="dots"):
        study = page.study(trace, sizes, costs.Experts(hidden, intermediate), on_gpu=gpu, map_size=map_block_size)
        page.write(study, output, layer=layer, theme=page.DARK if dark else page.LIGHT)
    table = Table(title="Block size to choose, by the cost model", title_justify="left")
    for name in ("tokens", "block size", "padding", "us a layer"):
        table.add_column(name, justify="right")
    for row in study.by_tokens:
        at = sizes.index(row.block_size)
        table.add_row(f"{row.tokens:,}", str(row.block_size), f"{row.wasted[at]:.1%}", f"{row.costs[at]:,.1f}")
    console.print(table)
    if study.measured is None:
        console.print(f"Not measured: {study.not_measured}.", markup=False)
    console.print(f"[bold]Written[/]: {output}, {output.stat().st_size / 1024:,.0f} KiB")


def _sizes(block_size: str) -> list[int]:
    try:
        sizes = sorted({int(part) for part in block_size.split(",")})
        if sizes[0] < 1:
            raise ValueError
    except ValueError:
        _fail(f"--block-size: expected ints of at least 1 joined by commas, got {block_size!r}")
    return sizes


@app.command("bench")
def run_bench(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The CSV to write (default: moealign_bench_DEVICE.csv)")
    ] = None,
    figure: Annotated[
        Path | None, typer.Option(help="The picture to draw, .png or .svg (default: moealign_bench_DEVICE.png)")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few sizes, fewer replays.")] = False,
    part: Annotated[list[str] | None, typer.Option("--bench", help="Only this part; may be repeated.")] = None,
    backend: Annotated[str, typer.Option(help="Of ours, joined by commas (default: all that run here)")] = "",
    peers: Annotated[
        Path | None, typer.Option(help="Folder of the peers' libraries (default: what is installed)")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu (default: cuda if there is one)")] = None,
    budget: Annotated[float, typer.Option(help="Seconds after which only the fast ones are timed.")] = 200.0,
) -> None:
    """Time moealign on this machine against what is installed beside it: a table, a CSV and a picture to keep."""
    if device not in (None, "cuda", "cpu"):
        _fail(f"--device: expected cuda or cpu, got {device!r}")
    if unknown := set(part or ()) - set(bench.BENCHES):
        _fail(f"--bench: expected one of {', '.join(bench.BENCHES)}, got {', '.join(sorted(unknown))}")
    if unknown := set(filter(None, backend.split(","))) - set(backends()):
        _fail(f"--backend: expected one of {', '.join(backends())}, got {', '.join(sorted(unknown))}")
    if peers is not None and not peers.is_dir():
        _fail(f"--peers: expected a folder, got {peers}")
    if figure is not None and figure.suffix not in (".png", ".svg"):
        _fail(f"--figure: expected a path that ends in .png or .svg, got {figure}")
    for name, path in (("--output", output), ("--figure", figure)):
        if path is not None and not path.parent.is_dir():
            _fail(f"{name}: expected a path in a folder that exists, got {path}")
    try:
        session = bench.measure(
            device=device,
            benches=part or (),
            quick=quick,
            names=[name for name in backend.split(",") if name],
            peers=peers,
            budget=budget,
        )
    except MoealignError as error:
        _fail(f"--device: {error}")
    stem = f"moealign_bench_{session.gpu}"
    status = bench.publish(session, output or Path(f"{stem}.csv"), figure or Path(f"{stem}.png"))
    if session.ended:
        raise session.ended
    if status:
        raise typer.Exit(status)


@app.command()
def tune(
    experts: Annotated[int, typer.Option(min=1, help="Experts of the layer.")],
    top_k: Annotated[int, typer.Option(min=1, help="Experts a token.")],
    hidden: Annotated[int, typer.Option(min=1, help="Columns of the hidden states.")],
    inner: Annotated[int, typer.Option(min=1, help="Columns of down_proj: a half of gate_up_proj's rows.")],
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, joined by commas.")] = "1,4,16,64,256,1024,4096",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    output: Annotated[Path | None, typer.Option(help="The file to add to; by default the one that is read.")] = None,
) -> None:
    """Find good tiles of fused_moe for a layer on this GPU, and keep them in a file that can be shipped."""
    console = _console()
    try:
        counts = [int(part) for part in tokens.split(",")]
        if min(counts) < 1:
            raise ValueError
    except ValueError:
        _fail(f"--tokens: expected ints of at least 1 joined by commas, got {tokens!r}")
    if dtype not in ("bfloat16", "float16", "float32"):
        _fail(f"--dtype: expected bfloat16, float16 or float32, got {dtype!r}")
    if top_k > experts:
        _fail(f"--top-k: expected at most --experts = {experts}, got {top_k}")
    shape = tuning.Shape(experts, top_k, hidden, inner, getattr(torch, dtype))
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    table = Table(title=shape.key, title_justify="left")
    for name in ("tokens", "plans tried", "rule", "best", "gain", "block", "first product", "second product"):
        table.add_column(name, justify="right" if name in ("tokens", "plans tried", "rule", "best", "gain") else "left")
    found = []
    try:
        for one in tuning.tune(shape, counts, device):
            found.append(one)
            times = (f"{one.by_rule:,.1f} us", f"{one.microseconds:,.1f} us", f"{one.by_rule / one.microseconds:.2f}x")
            tiles = (str(one.plan.block_size or "none"), str(list(one.plan.first)), str(list(one.plan.second)))
            table.add_row(str(one.tokens), str(one.tried), *times, *tiles)
            console.print(f"{one.tokens} tokens: {times[0]} by rule, {times[1]} at best")
    except MoealignError as error:
        _fail(error)
    target = target_of(device)
    path = output or tuning_path(target)
    tuning.write(path, shape, found, {"device": target.name, "torch": torch.__version__, "moealign": __version__})
    console.print(table)
    console.print(f"[bold]Kept[/] in {path}, which MOEALIGN_TUNING can name")


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
        "MOEALIGN_TUNING",
        *(e.variable for e in ENGINES.values()),
    ):
        variables.add_row(name, Text(os.environ.get(name) or "not set"))
    console.print(variables)
