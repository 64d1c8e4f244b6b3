"""The command line: demo, inspect, report, bench, check, tune, info."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from . import __version__, bench, costs, report
from . import placement as placements
from .alignment import align, explain
from .calls.dispatch import backends
from .errors import MoealignError
from .experts import tune as tuning
from .experts.tiles import target_of, tuning_path
from .integrations.engines import ENGINES, status
from .layout import EXTRAS
from .report import DARK, LIGHT, terminal
from .report.demo import expert_layer, median_time
from .report.figures import save_block_map
from .report.summary import advice_text
from .testing import argsort_align, check_backend, difference, oracle_align
from .trace import Trace, example_trace, load_trace

__all__ = ["app"]

BLOCK_SIZES = "16,32,64,128,256"
TracePath = Annotated[Path, typer.Argument(metavar="TRACE", help="A .safetensors routing trace.")]
BlockSizes = Annotated[str, typer.Option(help="Block sizes to compare, separated by commas.")]
Hidden = Annotated[int | None, typer.Option(min=1, help="Hidden size of the model, for the costs.")]
Intermediate = Annotated[int | None, typer.Option(min=1, help="Width inside an expert, for the costs.")]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Block-aligned layouts for Mixture-of-Experts kernels.",
)


def _console() -> Console:
    # A file or a pipe has no width of its own.
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def _fail(message: object) -> NoReturn:
    print(f"moealign: {message}", file=sys.stderr)
    raise typer.Exit(2)


def _load(path: Path) -> Trace:
    try:
        return load_trace(path)
    except MoealignError as error:
        _fail(error)


def _check_folder(option: str, path: Path) -> None:
    if not path.parent.is_dir():
        _fail(f"{option}: expected a path in a folder that exists, got {path}")


def _ints(option: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
        if min(numbers) < 1:
            raise ValueError
    except ValueError:
        _fail(f"{option}: expected ints of at least 1, separated by commas, got {text!r}")
    return numbers


def _device_of(name: str) -> torch.device:
    return torch.device("cuda" if name in ("cuda", "triton") and torch.cuda.is_available() else "cpu")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Picture of one layer's blocks to write.")] = Path("blocks.png"),
    block_size: Annotated[int, typer.Option(min=1, help="Rows of a block.")] = 64,
    layer: Annotated[int, typer.Option(min=0, help="Layer to compute and draw.")] = 1,
) -> None:
    """Align a real routing trace on every backend: check, time, use and draw the layout."""
    console = _console()
    trace = _load(example_trace())
    if layer >= trace.layers:
        _fail(f"--layer: expected a layer below {trace.layers}, got {layer}")
    _check_folder("--output", output)
    console.print(f"[bold]Trace[/]: {trace.model}")
    console.print(f"reading {trace.source}")
    routes = trace.tokens * trace.top_k
    console.print(
        f"{trace.layers} layers of {trace.tokens:,} tokens, each to {trace.top_k} of {trace.num_experts} experts: "
        f"{routes:,} routes, in blocks of {block_size} rows\n"
    )

    available = [name for name, reason in backends().items() if reason is None]
    table = Table(title="Every layer on every backend", title_justify="left")
    for name in ("layer", "backend"):
        table.add_column(name)
    for name in ("blocks", "padding", "time", "torch argsort", "speed-up"):
        table.add_column(name, justify="right")
    table.add_column("equals the oracle")
    failures = 0
    sizes: dict[str, Any] = {"block_size": block_size, "num_experts": trace.num_experts}
    extras: dict[str, Any] = dict.fromkeys(EXTRAS, True)
    paddings = [costs.padding(loads, block_size) for loads in costs.loads_of(trace.topk_ids, trace.num_experts)]
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("aligning", total=trace.layers * len(available))
        for number, padding in enumerate(paddings):
            expected = oracle_align(trace.topk_ids[number], **sizes)
            for name in available:
                device = _device_of(name)
                ids = trace.topk_ids[number].to(device)
                wrong = difference(align(ids, **sizes, **extras, backend=name), expected)  # type: ignore[arg-type]
                failures += wrong is not None
                ours = median_time(lambda ids=ids, name=name: align(ids, **sizes, backend=name), device)  # type: ignore[misc]
                argsort = median_time(lambda ids=ids: argsort_align(ids, block_size, trace.num_experts), device)  # type: ignore[misc]
                table.add_row(
                    str(number),
                    name,
                    str(padding.blocks),
                    f"{padding.wasted:.1%}",
                    f"{ours:,.0f} us",
                    f"{argsort:,.0f} us",
                    f"{argsort / ours:.1f}x",
                    "[green]yes, all outputs[/]" if wrong is None else f"[red]no: {wrong}[/]",
                )
                progress.advance(bar)
    console.print(table)
    console.print("padding: the fraction of all rows that holds no route.")
    console.print("torch argsort: the same three tensors by a stable argsort in torch, on the same device.")
    console.print("Times are medians on this machine.\n")

    ids = trace.topk_ids[layer]
    largest, blocks = expert_layer(ids, trace.num_experts, block_size)
    verdict = "[green]equal[/]" if largest < 1e-9 else "[red]DIFFERENT[/]"
    failures += largest >= 1e-9
    console.print(
        f"[bold]Used[/]: layer {layer} with random experts, {blocks} blocks one by one through the layout, against the "
        f"dense computation: {verdict} (largest difference {largest:.1e} in float64)"
    )
    part = ids[: min(trace.tokens, 1024)]
    layout = align(part, **sizes, block_rows=True)
    assert layout.block_rows is not None
    blocks = int(layout.num_tokens_post_padded) // block_size
    cells = list(zip(layout.expert_ids[:blocks].tolist(), layout.block_rows[:blocks].tolist(), strict=True))
    title = (
        f"Layer {layer}, {part.shape[0]:,} tokens x {trace.top_k} experts, blocks of {block_size} rows "
        "(one colour per expert, padding hatched)"
    )
    save_block_map(cells, block_size, title, output, LIGHT)
    console.print(f"[bold]Drawn[/]: {output}, the blocks of the first {part.shape[0]:,} tokens of layer {layer}")
    if failures:
        raise typer.Exit(1)


@app.command()
def inspect(
    trace_path: TracePath,
    block_size: BlockSizes = BLOCK_SIZES,
    hidden: Hidden = None,
    intermediate: Intermediate = None,
) -> None:
    """Print load per expert, imbalance, blocks and padding of a trace, and the block size to try first."""
    console = _console()
    sizes = sorted(set(_ints("--block-size", block_size)))
    trace = _load(trace_path)
    console.print(f"[bold]{trace_path}[/]: {trace.model}; {trace.source}; revision {trace.revision}")
    console.print(
        f"{trace.layers} layers, {trace.tokens:,} tokens, {trace.top_k} of {trace.num_experts} experts each\n"
    )
    batches = costs.batch_loads(trace.topk_ids, trace.num_experts, trace.calls)
    console.print(terminal.load_table(batches.sum(axis=1)))
    console.print("imbalance: the busiest expert's load over the mean. idle: experts without a route.\n")
    console.print(terminal.padding_table(batches, sizes))
    experts, source = costs.experts_of(trace, hidden, intermediate)
    advice = costs.advise(trace, sizes, experts)
    if not advice:
        console.print("The trace has no routes, so there is nothing to recommend.")
        return
    console.print("[bold]Block size[/]:")
    for each in advice:
        console.print(f"  {advice_text(each)}", markup=False)
    console.print(f"By the cost model for {costs.H200.name}; experts of {experts}, {source}.", markup=False)
    console.print("Smaller blocks pad less, but every block reads its expert's weights once.")


@app.command()
def check(
    cases: Annotated[int, typer.Option(min=1, help="Random cases per backend.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the random cases.")] = 0,
) -> None:
    """Check every backend of this machine against the plain-loop oracle; takes seconds."""
    console = _console()
    table = Table(title=f"moealign {__version__} against the oracle", title_justify="left")
    for name in ("backend", "device", "cases", "wrong", "verdict"):
        table.add_column(name)
    failures = 0
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for name, reason in backends().items():
            if reason is not None:
                table.add_row(name, "", "", "", Text(f"unavailable: {reason}"))
                continue
            device = _device_of(name)
            wrong: list[str] = []
            bar = progress.add_task(name, total=cases)
            for case, problem in check_backend(name, device, cases, seed):
                progress.advance(bar)
                if problem is not None:
                    wrong.append(f"{case}: {problem}")
            failures += len(wrong)
            verdict = Text("right", "green") if not wrong else Text(wrong[0], "red")
            table.add_row(name, str(device), str(cases), str(len(wrong)), verdict)
    console.print(table)
    if failures:
        raise typer.Exit(1)


@app.command("report")
def write_report(
    trace_paths: Annotated[
        list[Path], typer.Argument(metavar="TRACE [TRACE]", help="A routing trace, or two traces to compare.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="File to write: .html, .svg (light and dark) or .png (default: report.html; none with --json)",
        ),
    ] = None,
    block_size: BlockSizes = BLOCK_SIZES,
    layer: Annotated[int, typer.Option(min=0, help="Layer whose blocks are drawn, or shown first.")] = 0,
    map_block_size: Annotated[
        int | None, typer.Option(min=1, help="Rows of a block in the drawing of blocks (default: the recommended size)")
    ] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help="Hidden size, for the costs (default: the trace's)")] = None,
    intermediate: Annotated[
        int | None, typer.Option(min=1, help="Columns of down_proj, for the costs (default: the trace's)")
    ] = None,
    gpu: Annotated[bool | None, typer.Option(help="Measure on a GPU (default: if there is one)")] = None,
    dark: Annotated[bool, typer.Option("--dark", help="Draw a .png on a dark background.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all numbers as JSON instead of a summary.")] = False,
    engine_config: Annotated[
        Path | None, typer.Option(help="Folder for tile configurations of vLLM and SGLang with these block sizes.")
    ] = None,
    device_name: Annotated[
        str, typer.Option(help="The GPU that --engine-config is for (default: this one, or the trace's)")
    ] = "",
    placement: Annotated[
        Path | None, typer.Option(help="File for a balanced placement of the experts: JSON, as EPLB has it.")
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks of --placement.")] = 8,
    replicas: Annotated[
        int | None, typer.Option(min=0, help="Copies of experts in --placement (default: as few as fill all ranks)")
    ] = None,
) -> None:
    """Write a page about a trace: block sizes, the alignment's share of a layer, loads, and placements."""
    sizes = sorted(set(_ints("--block-size", block_size)))
    if output is None and not as_json:
        output = Path("report.html")
    if output is not None and output.suffix.lower() not in report.FORMATS:
        _fail(f"--output: expected a path that ends in {', '.join(report.FORMATS)}, got {output}")
    for option, path in (("--output", output), ("--placement", placement)):
        if path is not None:
            _check_folder(option, path)
    if gpu and not torch.cuda.is_available():
        _fail("--gpu: expected a GPU that torch can use, found none")
    if len(trace_paths) > 2:
        _fail(f"TRACE: expected one trace, or two to compare, got {len(trace_paths)}")
    if len(trace_paths) == 2 and (engine_config or placement):
        _fail("--engine-config, --placement: expected a single trace, got two")
    traces = [_load(path) for path in trace_paths]
    if layer >= traces[0].layers:
        _fail(f"--layer: expected a layer below {traces[0].layers}, got {layer}")
    theme = DARK if dark else LIGHT
    files: list[Path] = [] if output is None else [output]
    try:
        studies = []
        for trace in traces:
            experts, source = costs.experts_of(trace, hidden, intermediate)
            study = report.study(trace, sizes, experts, experts_source=source, on_gpu=gpu, map_size=map_block_size)
            studies.append(study)
        if engine_config is not None:
            here = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
            traced = traces[0].device if traces[0].device != "cpu" else ""
            files += report.write_configuration(studies[0], engine_config, device_name or here or traced)
        if placement is not None:
            placements.save(placement, costs.place(traces[0], ranks, replicas))
            files.append(placement)
        if len(studies) == 2:
            comparison = report.compare(*studies)
            if output is not None:
                report.write_comparison(comparison, output, theme)
            text, numbers = report.comparison_lines(comparison), report.comparison_json(comparison)
        else:
            if output is not None:
                report.write(studies[0], output, layer=layer, theme=theme)
            text, numbers = report.lines(studies[0]), report.as_json(studies[0])
    except MoealignError as error:
        _fail(error)
    if as_json:
        print(json.dumps(numbers, indent=1))
        return
    print("\n".join(text))
    for path in files:
        print(f"Written: {path}, {path.stat().st_size / 1024:,.0f} KiB")


@app.command("bench")
def run_bench(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="CSV to write (default: moealign_bench_DEVICE.csv)")
    ] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Picture to write, .png or .svg (default: moealign_bench_DEVICE.png)")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few sizes, few replays.")] = False,
    part: Annotated[list[str] | None, typer.Option("--bench", help="Run only this part; may be repeated.")] = None,
    backend: Annotated[
        str, typer.Option(help="Backends of moealign, separated by commas (default: all that are available)")
    ] = "",
    peers: Annotated[
        Path | None, typer.Option(help="Folder of the peers' libraries (default: the installed ones)")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu (default: cuda if there is one)")] = None,
    budget: Annotated[float, typer.Option(help="Seconds after which only fast candidates are timed.")] = 200.0,
) -> None:
    """Time moealign on this machine against the peers installed beside it; writes a table, a CSV and a picture."""
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
        if path is not None:
            _check_folder(name, path)
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
    top_k: Annotated[int, typer.Option(min=1, help="Experts per token.")],
    hidden: Annotated[int, typer.Option(min=1, help="Columns of the hidden states.")],
    inner: Annotated[int, typer.Option(min=1, help="Columns of down_proj: half of the rows of gate_up_proj.")],
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, separated by commas.")] = "1,4,16,64,256,1024,4096",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    output: Annotated[Path | None, typer.Option(help="File to add to (default: the one that fused_moe reads).")] = None,
) -> None:
    """Find fast tiles of fused_moe for a layer on this GPU, and write them to a file that can be shipped."""
    console = _console()
    counts = _ints("--tokens", tokens)
    if dtype not in ("bfloat16", "float16", "float32"):
        _fail(f"--dtype: expected bfloat16, float16 or float32, got {dtype!r}")
    if top_k > experts:
        _fail(f"--top-k: expected at most --experts = {experts}, got {top_k}")
    shape = tuning.Shape(experts, top_k, hidden, inner, getattr(torch, dtype))
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    table = Table(title=shape.key, title_justify="left")
    for name in ("tokens", "plans tried", "rule", "best", "gain", "block", "first product", "second product"):
        table.add_column(name, justify="right" if name in ("tokens", "plans tried", "rule", "best", "gain") else "left")
    results = []
    target = target_of(device)
    path = output or tuning_path(target)
    if path is None:
        _fail("--output: expected a file, as the cache folder cannot be used; pass one or set MOEALIGN_TUNING")
    try:
        for one in tuning.tune(shape, counts, device):
            results.append(one)
            times = (f"{one.by_rule:,.1f} us", f"{one.microseconds:,.1f} us", f"{one.by_rule / one.microseconds:.2f}x")
            tiles = (str(one.tiles.block_size or "none"), str(list(one.tiles.first)), str(list(one.tiles.second)))
            table.add_row(str(one.tokens), str(one.tried), *times, *tiles)
            console.print(f"{one.tokens} tokens: {times[0]} by the rule, {times[1]} at best")
    except MoealignError as error:
        _fail(error)
    tuning.write(path, shape, results, {"device": target.name, "torch": torch.__version__, "moealign": __version__})
    console.print(table)
    console.print(f"[bold]Written[/]: {path}; set MOEALIGN_TUNING to its path to use it elsewhere")


@app.command()
def info() -> None:
    """Print versions, devices, backends (and why one is unavailable), engines and environment variables."""
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
            table.add_row(name, Text(f"unavailable: {reason}"))
            continue
        ids = torch.zeros(1, 8, dtype=torch.int32, device=_device_of(name))
        note = explain(ids, block_size=16, num_experts=64, backend=name).note
        table.add_row(name, Text(f"ready; {note}" if note else "ready"))
    console.print(table)
    engines = Table("engine", "drop-in", title="Engines, in processes started from here", title_justify="left")
    for name in ENGINES:
        engines.add_row(name, Text(status(name)))
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
