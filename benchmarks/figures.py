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
sys.path.insert(0, str(ROOT / "src"))

from moealign.bench import cases_of, draw, microseconds  # noqa: E402

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
DRAWN = ("torch-argsort", *PEERS, "moealign-triton", "moealign-cuda", "floor-chain", "floor-bytes")

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
        draw(read(found), args.image, DRAWN)
        print(f"{args.image}: drawn from {found.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
