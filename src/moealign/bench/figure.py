"""The figure of a run: time over routes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .names import PEER_KINDS, find_peer
from .rows import cases_of
from .tables import microseconds

#: By the beginning of an implementation's name: label, colour, line style.
LINES = {
    "torch-argsort": ("torch argsort", "#9a9a9a", "-"),
    "sglang-kernel": ("sglang-kernel", "#d98c2b", "-"),
    "vllm": ("vLLM", "#b5453c", "-"),
    "moealign-reference": ("moealign, reference", "#8fbf8f", "-"),
    "moealign-triton": ("moealign, Triton", "#7aa6d6", "-"),
    "moealign-cpu": ("moealign", "#1f5fa8", "-"),
    "moealign-cuda": ("moealign", "#1f5fa8", "-"),
    "floor-chain": ("load, barrier, store: one CTA", "#555555", "--"),
    "floor-bytes": ("bytes moved / bandwidth", "#555555", ":"),
}


def line_of(impl: str) -> tuple[str, str, str] | None:
    """Label, colour and line style of an implementation; a peer's label includes its version."""
    for start, (label, colour, style) in LINES.items():
        if impl == start or (start in PEER_KINDS and impl.startswith(f"{start}-")):
            return f"{label} {impl[len(start) + 1 :]}".strip(), colour, style
    return None


def draw(rows: Sequence[dict[str, Any]], target: Path, drawn: Sequence[str] = ()) -> None:
    """Draw time over routes at 256 experts and top-8, and the batched cases if there are any.

    Args:
        rows: as in the CSV.
        target: file to write; its suffix decides the format.
        drawn: implementations to draw; by default all that :data:`LINES` has.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = [
        (row, times)
        for row, times in cases_of(rows, "align")
        if (int(row["num_experts"]), int(row["top_k"])) == (256, 8)
    ]
    cases.sort(key=lambda case: int(case[0]["routes"]))
    batched = cases_of(rows, "batched")
    first = rows[0]
    on_cpu = first["gpu"] == "cpu"
    settings: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "moealign"}
    with plt.rc_context(settings):
        figure, (axes,) = plt.subplots(
            1,
            2 if batched else 1,
            figsize=(11 if batched else 7, 4.6),
            squeeze=False,
            width_ratios=(3, 2) if batched else (1,),
            layout="constrained",
        )
        left = axes[0]
        for start in LINES:
            for impl in sorted({impl for _, times in cases for impl in times}):
                if not (impl == start or impl.startswith(f"{start}-")) or (drawn and impl not in drawn):
                    continue
                line = line_of(impl)
                if line is None:
                    continue
                label, colour, style = line
                points = [(int(row["routes"]), times[impl]) for row, times in cases if impl in times]
                left.plot(
                    *zip(*points, strict=True),
                    style,
                    color=colour,
                    label=label,
                    linewidth=2.2 if impl in ("moealign-cuda", "moealign-cpu") else 1.2,
                    marker=None if impl.startswith("floor") else "o",
                    markersize=3.5,
                )
        left.set(
            yscale="log",
            xlabel="routes (tokens x 8, log scale), 256 experts",
            ylabel="microseconds per call (log scale)",
        )
        left.set_xscale("log", base=4)
        left.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        left.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        if not on_cpu:
            left.set_ylim(bottom=0.5)
        left.grid(alpha=0.25)
        figure.legend(frameon=False, loc="outside lower center", ncols=4 if batched else 3)
        left.set_title("moe_align_block_size", loc="left")
        if batched:
            _draw_batched(axes[1], batched)
        how = "wall time" if on_cpu else "CUDA graph replay"
        title = f"{how}, {first['gpu'].upper()}, torch {first['torch']}, {first['date']}"
        figure.suptitle(title, fontsize=9, color="#555555")
        target.parent.mkdir(parents=True, exist_ok=True)
        reproducible = {"Date": None} if target.suffix == ".svg" else {"Software": None}
        figure.savefig(target, dpi=160, metadata=reproducible)
        plt.close(figure)


def _draw_batched(axis: Any, batched: Sequence[tuple[dict[str, Any], dict[str, float]]]) -> None:
    """Bars of the batched cases: moealign, and vLLM if it was timed."""
    impls = sorted({impl for _, times in batched for impl in times})
    shown = [impl for impl in (find_peer(impls, "vllm"), "moealign-cuda") if impl]
    places = range(len(batched))
    for i, impl in enumerate(shown):
        line = line_of(impl)
        assert line is not None
        shift = 0.4 * i - 0.2 * (len(shown) - 1)
        bars = axis.barh(
            [place + shift for place in places],
            [times.get(impl, 0) for _, times in batched],
            0.38,
            color=line[1],
            label=line[0],
        )
        axis.bar_label(bars, [microseconds(times.get(impl)) for _, times in batched], padding=2, fontsize=8)
    axis.set_yticks(list(places), [f"{row['num_experts']} x {row['top_k']}, {row['block_size']}" for row, _ in batched])
    axis.margins(x=0.12)  # room for the labels
    axis.set(xlabel="microseconds per call", ylabel="batches x rows, block")
    axis.invert_yaxis()
    axis.set_title("batched_moe_align_block_size", loc="left")
