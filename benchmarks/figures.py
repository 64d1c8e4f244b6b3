#!/usr/bin/env python3
"""The README's performance tables and docs/images/performance.png, from the tracked CSV files alone.

    python benchmarks/figures.py            # write them
    python benchmarks/figures.py --check    # write nothing, fail if the README's tables are not those of the CSV files

``benchmarks/results/align_<gpu>.csv`` fills the README between ``<!-- performance:begin -->`` and
``<!-- performance:end -->``, ``align_cpu.csv`` between ``<!-- performance-cpu:begin -->`` and its end.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PEERS = {"vllm-0.33.0": "vLLM 0.33.0", "sglang-kernel-0.4.4": "sglang-kernel 0.4.4"}
TITLES = {
    "moealign-cuda": "**moealign**",
    "moealign-triton": "moealign, Triton",
    "moealign-cpu": "**moealign**",
    "moealign-cpu-2t": "two threads",
    "moealign-reference": "moealign, reference",
    **PEERS,
    "torch-argsort": "torch argsort",
    "cpp-counting-sort": "C++ counting sort",
    "floor-memcpy": "copy of the bytes",
    "floor-chain": "load, barrier, store",
    "floor-bytes": "bytes / bandwidth",
}
LINES = {  # of the figure: label, colour, dashes
    "torch-argsort": ("torch argsort", "#9a9a9a", "-"),
    "sglang-kernel-0.4.4": ("sglang-kernel 0.4.4", "#d98c2b", "-"),
    "vllm-0.33.0": ("vLLM 0.33.0", "#b5453c", "-"),
    "moealign-triton": ("moealign, Triton", "#7aa6d6", "-"),
    "moealign-cuda": ("moealign", "#1f5fa8", "-"),
    "floor-chain": ("load, barrier, store: one CTA", "#555555", "--"),
    "floor-bytes": ("bytes moved / bandwidth", "#555555", ":"),
}

Row = dict[str, str]
Case = dict[str, float]  # median microseconds by implementation


def read(path: Path) -> list[Row]:
    with path.open(newline="") as source:
        return list(csv.DictReader(source))


def gpu_results(folder: Path, gpu: str | None = None) -> Path | None:
    """The CSV of `gpu`; without a name that of the H200, or the first there is."""
    found = sorted(path for path in folder.glob("align_*.csv") if path.stem != "align_cpu")
    wanted = [path for path in found if path.stem == f"align_{gpu or 'h200'}"]
    return next(iter(wanted or ([] if gpu else found)), None)


def cases_of(rows: Sequence[Row], bench: str) -> list[tuple[Row, Case]]:
    """For each case of a bench its first row, for the sizes, and the median of each implementation."""
    cases: dict[tuple[str, ...], tuple[Row, Case]] = {}
    for row in rows:
        if row["bench"] == bench:
            key = tuple(row[name] for name in ("case", "routes", "num_experts", "top_k", "block_size"))
            cases.setdefault(key, (row, {}))[1][row["impl"]] = float(row["median_us"])
    return list(cases.values())


def microseconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def best_peer(times: Case) -> float | None:
    return min((times[impl] for impl in PEERS if impl in times), default=None)


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *lines])


def sizes_of(row: Row) -> str:
    tokens = int(row["routes"]) // int(row["top_k"])
    return f"{tokens:,} x {row['top_k']}, {row['num_experts']}, {row['block_size']}"


def align_table(rows: Sequence[Row], mine: str, others: Sequence[str]) -> str:
    cases = cases_of(rows, "align")
    shown = [mine, *(impl for impl in others if any(impl in times for _, times in cases))]
    peers = any(best_peer(times) for _, times in cases)
    against = "best peer" if peers else "argsort"
    lines = []
    for row, times in cases:
        other = best_peer(times) if peers else times.get("torch-argsort")
        ratio = f"{other / times[mine]:.1f}x" if other and mine in times else "-"
        values = [microseconds(times.get(impl)) for impl in shown]
        lines.append([sizes_of(row), f"{int(row['routes']):,}", *values, ratio])
    return markdown(
        ["tokens x top-k, experts, block", "routes", *(TITLES[i] for i in shown), f"{against} / ours"], lines
    )


def batched_table(rows: Sequence[Row]) -> str:
    lines = []
    for row, times in cases_of(rows, "batched"):
        mine, other = times.get("moealign-cuda"), best_peer(times)
        sizes = f"{row['num_experts']} x {int(row['top_k']):,}, {row['block_size']}"
        ratio = f"{other / mine:.1f}x" if mine and other else "-"
        lines.append([sizes, microseconds(mine), microseconds(times.get("vllm-0.33.0")), ratio])
    return markdown(["batches x rows, block", "**moealign**", "vLLM 0.33.0", "vLLM / ours"], lines)


def host_sentence(rows: Sequence[Row]) -> str:
    for row, times in cases_of(rows, "eager-host"):
        if row["case"] == "32x8-E256-B16 drop-in" and {"moealign-cuda", "vllm-0.33.0"} <= set(times):
            return (
                f"Host time of one eager call with vLLM's signature (256 routes): {times['moealign-cuda']:.1f} us, "
                f"vLLM's wrapper {times['vllm-0.33.0']:.1f} us."
            )
    return ""


def caption(rows: Sequence[Row], how: str, source: str) -> str:
    first = rows[0]
    gpu = first["gpu"].upper()
    return f"Microseconds a call, {how}, median; {gpu}, torch {first['torch']}, {first['date']}; `{source}`."


def performance_table(rows: Sequence[Row], source: str = "benchmarks/results/align_h200.csv") -> str:
    """What stands between the README's performance markers."""
    parts = [
        caption(rows, "CUDA graph replay", source),
        align_table(rows, "moealign-cuda", ("vllm-0.33.0", "sglang-kernel-0.4.4", "torch-argsort", "floor-chain")),
    ]
    if cases_of(rows, "batched"):
        parts += ["The batched layout:", batched_table(rows)]
    parts.append(host_sentence(rows))
    return "\n\n".join(part for part in parts if part)


def cpu_table(rows: Sequence[Row], source: str = "benchmarks/results/align_cpu.csv") -> str:
    """What stands between the README's markers for the CPU: the sizes, without the sweeps of align_cpu.py."""
    shown = [row for row in rows if row["case"] not in ("experts", "one-expert")]
    others = ("moealign-cpu-2t", "cpp-counting-sort", "torch-argsort", "moealign-reference", "floor-memcpy")
    table = align_table(shown, "moealign-cpu", others)
    return f"{caption(rows, 'wall time on one thread', source)}\n\n{table}"


def replace_between(text: str, marker: str, body: str) -> str:
    """`text` with `body` between the two comments of `marker`.

    Raises:
        ValueError: `text` does not hold each of them once, in order.
    """
    begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected {begin} and then {end}, once each, got {text.count(begin)} and {text.count(end)}")
    return f"{text[: text.index(begin)]}{begin}\n{body}\n{text[text.index(end) :]}"


def readme_with_tables(text: str, results: Path, gpu: str | None = None) -> str:
    """`text` with the tables of the CSV files that are there; a missing file leaves its table as it is."""
    found = gpu_results(results, gpu)
    if found is not None:
        text = replace_between(text, "performance", performance_table(read(found), f"benchmarks/results/{found.name}"))
    cpu = results / "align_cpu.csv"
    if cpu.exists():
        text = replace_between(text, "performance-cpu", cpu_table(read(cpu)))
    return text


def draw(rows: Sequence[Row], target: Path) -> None:
    """Time over routes at 256 experts, top-8, and the six batched cases."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = [
        (row, times) for row, times in cases_of(rows, "align") if (row["num_experts"], row["top_k"]) == ("256", "8")
    ]
    cases.sort(key=lambda case: int(case[0]["routes"]))
    batched = cases_of(rows, "batched")
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), width_ratios=(3, 2), layout="constrained")
    left, right = axes
    for impl, (label, colour, dashes) in LINES.items():
        points = [(int(row["routes"]), times[impl]) for row, times in cases if impl in times]
        if points:
            mine = impl == "moealign-cuda"
            floor = impl.startswith("floor")
            left.plot(
                *zip(*points, strict=True),
                dashes,
                color=colour,
                label=label,
                linewidth=2.2 if mine else 1.2,
                marker=None if floor else "o",
                markersize=3.5,
            )
    left.set(yscale="log", xlabel="routes (tokens x 8), 256 experts", ylabel="microseconds a call")
    left.set_xscale("log", base=4)
    left.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    left.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    left.set_ylim(bottom=0.5)
    left.grid(alpha=0.25)
    figure.legend(frameon=False, loc="outside lower center", ncols=4)
    left.set_title("moe_align_block_size", loc="left")

    places = range(len(batched))
    for shift, impl in ((-0.2, "vllm-0.33.0"), (0.2, "moealign-cuda")):
        label, colour, _ = LINES[impl]
        bars = right.barh(
            [place + shift for place in places],
            [times.get(impl, 0) for _, times in batched],
            0.38,
            color=colour,
            label=label,
        )
        right.bar_label(bars, [microseconds(times.get(impl)) for _, times in batched], padding=2, fontsize=8)
    right.set_yticks(
        list(places), [f"{row['num_experts']} x {row['top_k']}, {row['block_size']}" for row, _ in batched]
    )
    right.set_xscale("log")
    right.set_xlim(left=1)
    right.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    right.xaxis.set_minor_formatter("")
    right.set(xlabel="microseconds a call", ylabel="batches x rows, block")
    right.invert_yaxis()
    right.set_title("batched_moe_align_block_size", loc="left")
    first = rows[0]
    figure.suptitle(
        f"CUDA graph replay, {first['gpu'].upper()}, torch {first['torch']}, {first['date']}",
        fontsize=9,
        color="#555555",
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=160, metadata={"Software": None})
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the CSV files")
    parser.add_argument("--gpu", help="as in the CSV's name (default: h200, else the first there is)")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--image", type=Path, default=ROOT / "docs" / "images" / "performance.png")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the README's tables are stale")
    args = parser.parse_args(arguments)

    found = gpu_results(args.results, args.gpu)
    if found is None and not (args.results / "align_cpu.csv").exists():
        print(
            f"{args.results}: expected align_<gpu>.csv or align_cpu.csv, found neither; benchmarks/align.py writes them"
        )
        return 2
    text = args.readme.read_text()
    try:
        fresh = readme_with_tables(text, args.results, args.gpu)
    except ValueError as error:
        print(f"{args.readme}: {error}")
        return 2
    if args.check:
        if fresh != text:
            print(f"{args.readme}: its tables are not those of {args.results}; run benchmarks/figures.py")
        return int(fresh != text)
    args.readme.write_text(fresh)
    print(f"{args.readme}: tables written")
    if found is not None:
        draw(read(found), args.image)
        print(f"{args.image}: drawn from {found.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
