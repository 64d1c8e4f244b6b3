"""`moealign demo`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import costs
from ..alignment import align
from ..calls.dispatch import backends
from ..diagnosis import device_of
from ..errors import how_to_install
from ..layout import EXTRAS
from ..report import LIGHT
from ..report.demo import expert_layer, times_in_turns
from ..report.figures import save_block_map
from ..terminal import escape, paragraph, table
from ..testing import argsort_align, difference, oracle_align
from . import checks

__all__ = ["demo"]

MAX_BLOCK_SIZE = 4096  # the oracle works on lists of Python ints
PICTURES = (".png", ".svg", ".pdf")


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Picture of one layer's blocks to write: .png, .svg or .pdf.")
    ] = Path("blocks.png"),
    block_size: Annotated[int, typer.Option(min=1, max=MAX_BLOCK_SIZE, help="Rows per block.")] = 64,
    layer: Annotated[int, typer.Option(min=0, help="Layer to compute and draw.")] = 1,
) -> None:
    """Align the example trace on every backend: check, time and use the layouts, and draw one to a file."""
    checks.output("--output", output, PICTURES)
    if importlib.util.find_spec("matplotlib") is None:
        checks.fail(f"demo draws with matplotlib, which is not installed: {how_to_install('report')}")
    trace = checks.load(checks.SHIPPED)
    checks.layer_of(trace, layer)
    print(paragraph(escape(f"Trace: {trace.model}, reading {trace.source}")))
    routes = trace.tokens * trace.top_k
    print(
        paragraph(
            f"{trace.layers} layers of {trace.tokens:,} tokens, each to {trace.top_k} of {trace.num_experts} experts: "
            f"{routes:,} routes, in blocks of {block_size} rows"
        )
    )

    available = [name for name, reason in backends().items() if reason is None]
    sizes: dict[str, Any] = {"block_size": block_size, "num_experts": trace.num_experts}
    extras: dict[str, Any] = dict.fromkeys(EXTRAS, True)
    rows, failures = [], []
    with checks.progress() as progress:
        bar = progress.add_task("aligning", total=trace.layers * len(available))
        for number in range(trace.layers):
            expected = oracle_align(trace.topk_ids[number], **sizes)
            for name in available:
                device = device_of(name)
                ids = trace.topk_ids[number].to(device)
                wrong = difference(align(ids, **sizes, **extras, backend=name), expected)
                if wrong is not None:
                    failures.append(f"layer {number} on {name}: {wrong}")
                times = times_in_turns(
                    {
                        "ours": lambda ids=ids, name=name: align(ids, **sizes, backend=name),  # type: ignore[misc]
                        "argsort": lambda ids=ids: argsort_align(ids, block_size, trace.num_experts),  # type: ignore[misc]
                    },
                    device,
                )
                ours, argsort = times["ours"], times["argsort"]
                verdict = "equal" if wrong is None else "WRONG"
                rows.append([str(number), name, verdict, f"{argsort.min / ours.min:.1f}x", str(ours), str(argsort)])
                progress.advance(bar)
    print()
    header = ["layer", "backend", "oracle", "ratio", "us", "argsort us"]
    print(table(header, rows, title="Every layer on every backend", left=3, repeat=2))
    print(paragraph("oracle: every output against the plain-loop definition."))
    print(paragraph("us: minimum..90th percentile of a call in microseconds, on one CPU thread or on the GPU."))
    print(paragraph("argsort us: the same three tensors by a stable argsort in torch, timed in turns with ours."))
    print(paragraph("ratio: argsort's minimum over ours.") + "\n")
    for failure in failures:
        print(paragraph(f"WRONG: {escape(failure)}"))

    paddings = [costs.padding(loads, block_size) for loads in costs.loads_of(trace.topk_ids, trace.num_experts)]
    per_layer = [[str(i), f"{each.blocks:,}", f"{each.wasted:.1%}"] for i, each in enumerate(paddings)]
    print(table(["layer", "blocks", "padding"], per_layer, title="Blocks, and the fraction of rows without a route"))
    print()

    on_cpu = "cpu" if "cpu" in available else "reference"
    ids = trace.topk_ids[layer]
    largest, blocks = expert_layer(ids, trace.num_experts, block_size, backend=on_cpu)
    if not largest < 1e-9:
        failures.append("the layer of experts")
    print(
        paragraph(
            f"Used: layer {layer} with random experts, {blocks} blocks one by one through the layout, against the "
            f"dense computation: {'equal' if largest < 1e-9 else 'WRONG'} (largest difference {largest:.1e} in float64)"
        )
    )
    part = ids[: min(trace.tokens, 1024)]
    layout = align(part, **sizes, block_rows=True, backend=on_cpu)
    assert layout.block_rows is not None
    blocks = int(layout.num_tokens_post_padded) // block_size
    cells = list(zip(layout.expert_ids[:blocks].tolist(), layout.block_rows[:blocks].tolist(), strict=True))
    title = (
        f"Layer {layer}, {part.shape[0]:,} tokens x {trace.top_k} experts, blocks of {block_size} rows "
        "(one colour per expert, padding hatched)"
    )
    save_block_map(cells, block_size, title, output, LIGHT)
    print(paragraph(f"Drawn: {escape(output)}, the blocks of the first {part.shape[0]:,} tokens of layer {layer}"))
    if failures:
        raise typer.Exit(1)
