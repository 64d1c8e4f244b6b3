#!/usr/bin/env python3
"""The performance tables of the README and of docs/*.md, and docs/images/performance.png, from tracked CSV files alone.

    python benchmarks/figures.py            # write them
    python benchmarks/figures.py --check    # write nothing, fail if a table is not that of its CSV file

``benchmarks/results/align_<gpu>.csv`` fills the README between ``<!-- performance:begin -->`` and
``<!-- performance:end -->``, ``align_cpu.csv`` between ``<!-- performance-cpu:begin -->`` and its end.  In the same way
the pages of `PAGES` are filled, each marker from its file; the tables are in goals.py, those of parallel.md here, with
a model of more ranks.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

import goals  # noqa: E402
from goals import Row, best_peer, markdown  # noqa: E402

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


def read(path: Path) -> list[Row]:
    with path.open(newline="") as source:
        return list(csv.DictReader(source))


def gpu_results(folder: Path, gpu: str | None = None) -> Path | None:
    """The CSV of `gpu`; without a name that of the H200, or the first there is."""
    found = sorted(path for path in folder.glob("align_*.csv") if path.stem != "align_cpu")
    wanted = [path for path in found if path.stem == f"align_{gpu or 'h200'}"]
    return next(iter(wanted or ([] if gpu else found)), None)


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


# ---- expert parallelism ----------------------------------------------------------------------------------------------

NODE = 8  # ranks that NVLink joins
NETWORK_GB_S, NETWORK_US = (
    50.0,
    20.0,
)  # an assumption: one 400 Gb/s adapter a GPU, and what a message between nodes takes
MODEL_RANKS, MODEL_TOKENS = (8, 64, 512), (64, 4096)  # tokens of a rank
SHAPE = re.compile(r"T(\d+)-k(\d+)-E(\d+)-H(\d+)-I(\d+)")


def parallel_table(rows: Sequence[Row]) -> str:
    """Both modes on two GPUs, and the part of each that its collectives alone take."""
    lines = []
    for row, times in cases_of(rows, "parallel"):
        found = SHAPE.match(row["case"])
        assert found is not None
        tokens, top_k, experts, hidden, inner = map(int, found.groups())
        if tokens not in (1, 64, 1024, 4096):
            continue
        one, two, part = (times[f"{name}-graph"] for name in ("one-gpu", "replicated", "exchange-replicated"))
        eager, sent, moved = times["one-gpu"], times["dispatched"], times["exchange-dispatched"]
        lines.append([
            f"{experts}, {top_k}, {hidden}, {inner}", f"{tokens:,}", microseconds(one), microseconds(two),
            f"{one / two:.2f}x", f"{part / two:.0%}", microseconds(eager), microseconds(sent), f"{moved / sent:.0%}",
        ])  # fmt: skip
    return markdown(
        ["E, k, H, I", "tokens", "one GPU", "replicated", "gain", "exchange", "one GPU, eager", "dispatched, eager",
         "exchange"],
        lines,
    )  # fmt: skip


class Terms(NamedTuple):
    """What the model takes from the measurement, in microseconds and bytes a microsecond."""

    latency: float
    reduce_rate: float  # of an all-reduce: bytes that leave a rank
    exchange_rate: float  # of an all-to-all
    memory_rate: float  # at which a layer reads its weights
    flop_rate: float


def model_terms(rows: Sequence[Row], shape: tuple[int, int, int, int]) -> Terms:
    experts, top_k, hidden, inner = shape
    collective = {int(row["routes"]): times for row, times in cases_of(rows, "collective")}
    least, most = min(collective), max(collective)
    layer = {int(row["routes"]) // top_k: times for row, times in cases_of(rows, "parallel")
             if f"-E{experts}-H{hidden}-I{inner} " in row["case"]}  # fmt: skip
    weights = 3 * experts * hidden * inner * 2
    flops = 6 * 4096 * top_k * hidden * inner
    return Terms(
        latency=max(collective[least].values()),
        reduce_rate=most / collective[most]["all-reduce"],  # two ranks: half of the data goes each of two ways
        exchange_rate=most / 2 / collective[most]["all-to-all"],
        memory_rate=weights / layer[256]["one-gpu-graph"],
        flop_rate=flops / layer[4096]["one-gpu-graph"],
    )


def parallel_model(rows: Sequence[Row], shape: tuple[int, int, int, int] = (256, 8, 7168, 1024)) -> str:
    """Microseconds of a layer over many ranks by the equations of docs/parallel.md."""
    experts, top_k, hidden, inner = shape
    terms = model_terms(rows, shape)
    lines = []
    for ranks in MODEL_RANKS:
        nodes = max(ranks // NODE, 1)
        latency = terms.latency + (NETWORK_US if nodes > 1 else 0)
        slots = -(-experts // ranks)
        for tokens in MODEL_TOKENS:
            routes = tokens * top_k  # of a rank, which as many reach
            computing = max(
                3 * slots * hidden * inner * 2 / terms.memory_rate, 6 * routes * hidden * inner / terms.flop_rate
            )
            every = tokens * ranks * hidden * 2
            inside = min(ranks, NODE)
            near = (inside - 1) / inside / terms.reduce_rate
            far = (nodes - 1) / nodes / (NETWORK_GB_S * 1e3 * NODE)  # all adapters of a node together
            replicated = 2 * every * max(near, far) + 2 * latency
            sent = routes * hidden * 2
            near = sent * (inside - 1) / ranks / terms.exchange_rate
            far = sent * (ranks - inside) / ranks / (NETWORK_GB_S * 1e3)
            dispatched = 2 * max(near, far) + 3 * latency
            lines.append([
                f"{ranks}", f"{tokens:,}", f"{computing:,.0f}", f"{replicated:,.0f}", f"{dispatched:,.0f}",
                f"{dispatched / (computing + dispatched):.0%}",
            ])  # fmt: skip
    said = (
        f"Terms: latency {terms.latency:.0f} us, all-reduce {terms.reduce_rate / 1e3:.0f} GB/s, all-to-all "
        f"{terms.exchange_rate / 1e3:.0f} GB/s, weights read at {terms.memory_rate / 1e6:.1f} TB/s, "
        f"{terms.flop_rate / 1e6:.0f} TFLOP/s, all of the shape {', '.join(map(str, shape))} or of plain collectives."
    )
    header = ["ranks", "tokens a rank", "computing", "replicated exchange", "dispatched exchange", "of dispatched"]
    return f"{said}\n\n{markdown(header, lines)}"


def measured_parallel(rows: Sequence[Row]) -> str:
    how = "graph replay or wall time between barriers"
    return f"{caption(rows, how, 'benchmarks/results/parallel_h200.csv')}\n\n{parallel_table(rows)}"


# ---- pages -----------------------------------------------------------------------------------------------------------

TRIALS = ("cuda", "triton", "router", "cpu", "host", "experts")
#: page of docs/ -> marker -> (CSV file, what makes the text between its two comments of the rows)
PAGES: dict[str, dict[str, tuple[str, Callable[[Sequence[Row]], str]]]] = {
    "performance.md": {
        "goals-cuda": ("align_h200", goals.cuda),
        "goals-triton": ("align_h200", goals.triton),
        "goals-cpu": ("align_cpu", goals.cpu),
        **{f"trials-{part}": ("../trials", goals.trials(part)) for part in TRIALS},
    },
    "routing.md": {"routing": ("routing_h200", goals.routing), "goals-routing": ("routing_h200", goals.routing_goals)},
    "experts.md": {
        "experts": ("experts_h200", goals.experts),
        "goals-experts": ("experts_h200", goals.experts_goals),
        "transformers": ("transformers_h200", goals.transformers),
        "experts-cpu": ("experts_cpu", goals.experts_cpu),
    },
    "integrations.md": {"plugins": ("plugins_h200", goals.plugins)},
    "parallel.md": {
        "parallel": ("parallel_h200", measured_parallel),
        "parallel-model": ("parallel_h200", parallel_model),
    },
}


def page_with_tables(name: str, text: str, results: Path) -> str:
    """The page `name` of docs/ with the tables of the CSV files that are there."""
    for marker, (source, table) in PAGES[name].items():
        path = results / f"{source}.csv"
        if path.exists():
            text = replace_between(text, marker, table(read(path)))
    return text


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
    pages = {args.readme: fresh}
    if args.results == ROOT / "benchmarks" / "results":
        for name in PAGES:
            page = ROOT / "docs" / name
            pages[page] = page_with_tables(name, page.read_text(), args.results)
    if args.check:
        stale = [path for path, now in pages.items() if now != path.read_text()]
        for path in stale:
            print(f"{path}: its tables are not those of {args.results}; run benchmarks/figures.py")
        return int(bool(stale))
    for path, now in pages.items():
        path.write_text(now)
        print(f"{path}: tables written")
    if found is not None:
        draw(read(found), args.image, DRAWN)
        print(f"{args.image}: drawn from {found.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
