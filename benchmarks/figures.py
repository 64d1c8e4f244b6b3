#!/usr/bin/env python3
"""Every table of figures in docs/, and docs/images/performance.png, from the tracked CSV files alone.

    python benchmarks/figures.py            # write them
    python benchmarks/figures.py --check    # write nothing, fail if a table differs from its CSV file

A table stands between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``.  `PAGES` gives the tables of each page and
their CSV files; a missing file leaves its tables as they are.  benchmarks/tables.py and
tables_parallel.py make the tables.
"""

from __future__ import annotations

import argparse
import csv
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import tables
import tables_parallel
from common import ROOT

from moealign.bench import draw

DRAWN = ("torch-argsort", *tables.PEERS, "moealign-triton", "moealign-cuda", "floor-chain", "floor-bytes")

Maker = Callable[[Sequence[tables.Row], str], str]


def trials(*parts: str) -> list[tuple[str, str, Maker]]:
    return [(f"trials-{part}", "trials", functools.partial(tables.trials_table, part=part)) for part in parts]


#: The sentences of the first pages.
GAINS: list[tuple[str, str, Maker]] = [
    ("gain-layer", "results/plugins_{gpu}", tables.layer_sentence),
    ("gain-model", "results/transformers_{gpu}", tables.model_sentence),
    ("gain-align", "results/align_{gpu}", tables.align_sentence),
]

#: For each page: marker, CSV file, and the function that makes a table of its rows.
PAGES: dict[str, list[tuple[str, str, Maker]]] = {
    "README.md": [*GAINS, ("versions", "results/versions", tables.versions_table)],
    "docs/index.md": GAINS[:2],
    "docs/performance.md": [
        ("performance", "results/align_{gpu}", tables.performance_table),
        ("performance-scale", "results/align_{gpu}", tables.scale_table),
        ("performance-cpu", "results/align_cpu", tables.cpu_table),
    ],
    "docs/experts.md": [
        ("invariance", "results/experts_{gpu}", tables.invariance_sentence),
        ("experts", "results/experts_{gpu}", tables.experts_table),
        ("transformers", "results/transformers_{gpu}", tables.transformers_table),
        ("experts-cpu", "results/experts_cpu", tables.experts_cpu_table),
    ],
    "docs/training.md": [
        ("train", "results/train_{gpu}", tables.train_table),
        ("train-model", "results/transformers_{gpu}", tables.train_model_sentence),
    ],
    "docs/routing.md": [
        ("routing", "results/routing_{gpu}", tables.routing_table),
        ("routing-options", "results/routing_{gpu}", tables.routing_options_table),
        ("routing-cpu", "results/routing_cpu", tables.routing_cpu_table),
    ],
    "docs/integrations.md": [
        ("engines", "results/engines_{gpu}", tables.engines_table),
        ("engine-layers", "results/engines_{gpu}", tables.engine_layers_table),
        ("plugins", "results/plugins_{gpu}", tables.plugins_table),
    ],
    "docs/parallel.md": [
        ("parallel", "results/parallel_{gpu}", tables_parallel.graph_table),
        ("parallel-exchange", "results/parallel_{gpu}", tables_parallel.exchange_table),
        ("parallel-eager", "results/parallel_{gpu}", tables_parallel.eager_table),
        ("parallel-model", "results/parallel_{gpu}", tables_parallel.parallel_model),
    ],
    "docs/developers/experiments.md": [
        *trials("cuda", "triton", "router", "cpu", "host", "experts", "parallel"),
        ("parallel-goals", "results/parallel_{gpu}", tables_parallel.goals),
    ],
}


def read(path: Path) -> list[tables.Row]:
    with path.open(newline="") as source:
        return list(csv.DictReader(source))


def replace_between(text: str, marker: str, body: str) -> str:
    """`text` with `body` between the two comments of `marker`.

    Raises:
        ValueError: `text` does not contain each comment once, in order.
    """
    begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected {begin} and then {end}, once each, got {text.count(begin)} and {text.count(end)}")
    return f"{text[: text.index(begin)]}{begin}\n{body}\n{text[text.index(end) :]}"


def measured(benchmarks: Path, name: str, gpu: str | None) -> Path:
    """The CSV file `name` of `gpu`, or of the GPU that was measured last; it may not exist."""
    file = benchmarks / f"{name}.csv"
    if gpu is None:
        runs = [run for run in file.parent.glob(file.name.format(gpu="*")) if not run.stem.endswith("_cpu")]
        if "{gpu}" in name and runs:
            return max(runs, key=lambda run: (read(run)[-1]["date"], run.name))
    return file.with_name(file.name.format(gpu=gpu))


def with_tables(page: str, text: str, benchmarks: Path, gpu: str | None = None) -> str:
    """The `text` of `page` with the tables of the CSV files that exist."""
    for marker, name, table in PAGES[page]:
        path = measured(benchmarks, name, gpu)
        if path.exists():
            text = replace_between(text, marker, table(read(path), path.relative_to(benchmarks.parent).as_posix()))
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository, or a copy of its pages and CSV files")
    parser.add_argument("--gpu", help="as in the CSV files' names (default: of each kind of file the newest)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table is stale")
    args = parser.parse_args(arguments)

    benchmarks: Path = args.root / "benchmarks"
    aligned = measured(benchmarks, "results/align_{gpu}", args.gpu)
    if not aligned.exists() and not (benchmarks / "results" / "align_cpu.csv").exists():
        expected = f"align_{args.gpu or 'GPU'}.csv or align_cpu.csv"
        print(f"{aligned.parent}: expected {expected}, found neither; benchmarks/align.py writes the first")
        return 2
    stale = []
    for page in PAGES:
        path = args.root / page
        old = path.read_text()
        try:
            fresh = with_tables(page, old, benchmarks, args.gpu)
        except ValueError as error:
            print(f"{path}: {error}")
            return 2
        if fresh != old:
            stale.append(page)
            if not args.check:
                path.write_text(fresh)
    if args.check:
        for page in stale:
            print(f"{page}: its tables differ from benchmarks/; run benchmarks/figures.py")
        return int(bool(stale))
    print(f"written: {', '.join(stale) or 'nothing, all tables were up to date'}")
    if aligned.exists():
        image = args.root / "docs" / "images" / "performance.png"
        draw(read(aligned), image, DRAWN)
        print(f"{image}: drawn from {aligned.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
