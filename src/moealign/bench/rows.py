"""Measurements as rows of a CSV file."""

from __future__ import annotations

import csv
import datetime
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from .cases import Size
from .progress import log

# fmt: off
COLUMNS = ["bench", "case", "routes", "num_experts", "top_k", "block_size", "impl",
           "median_us", "min_us", "max_us", "gpu", "torch", "date"]
# fmt: on


def row_of(
    bench: str, case: str, routes: int, size: Size, impl: str, times: Sequence[float], gpu: str, digits: int = 3
) -> dict[str, Any]:
    """The values of `COLUMNS` from the `times` in microseconds of one implementation in one case."""
    _, top_k, num_experts, block_size = size
    return {
        "bench": bench,
        "case": case,
        "routes": routes,
        "num_experts": num_experts,
        "top_k": top_k,
        "block_size": block_size,
        "impl": impl,
        "median_us": f"{statistics.median(times):.{digits}f}",
        "min_us": f"{min(times):.{digits}f}",
        "max_us": f"{max(times):.{digits}f}",
        "gpu": gpu,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def write_csv(rows: Sequence[dict[str, Any]], path: Path, columns: Sequence[str] = COLUMNS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    log(f"{len(rows)} rows in {path}")


def cases_of(rows: Iterable[dict[str, Any]], bench: str) -> list[tuple[dict[str, Any], dict[str, float]]]:
    """For each case of a bench its first row, for the sizes, and the median in microseconds by implementation."""
    cases: dict[tuple[str, ...], tuple[dict[str, Any], dict[str, float]]] = {}
    for row in rows:
        if row["bench"] == bench:
            key = tuple(str(row[name]) for name in ("case", "routes", "num_experts", "top_k", "block_size"))
            cases.setdefault(key, (row, {}))[1][row["impl"]] = float(row["median_us"])
    return list(cases.values())
