"""How long an alignment takes on the CPU, beside torch, C++ and a plain copy.

Every row: int32 ids, uniform over the experts unless the case says otherwise, outputs allocated inside the timed call.
Bytes: an alignment reads 4 n bytes of ids and writes 4 (L + cdiv(L, B) + 1); `floor-memcpy` copies half as many, so
that what it reads and writes together is the same number.
The implementations take turns in a random order, so that a busy machine disturbs all alike; the median counts.

    python benchmarks/align_cpu.py [--quick] [--out benchmarks/results/align_cpu.csv]
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import datetime
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import moealign
from moealign.testing import argsort_align, assert_same_layout, oracle_align

HERE = Path(__file__).resolve().parent
COLUMNS = ["bench", "case", "routes", "num_experts", "top_k", "block_size", "impl", "median_us", "min_us", "max_us",
           "gpu", "torch", "date"]  # fmt: skip
TOP_K, BLOCK = 8, 64
SIZES = (8, 64, 512, 4096, 65_536, 524_288, 4_194_304, 16_777_216)
EXPERTS = (8, 64, 256, 1024, 4096, 16_384, 65_536)
SWEEP_ROUTES = 524_288
REFERENCE_MOST = 4_194_304  # the vectorised reference is left out above

Align = Callable[[torch.Tensor, int], object]


class Case(NamedTuple):
    name: str
    ids: torch.Tensor
    num_experts: int


def build_cpp() -> Align | None:
    """counting_sort.cpp through ctypes, or None without a g++."""
    library = Path(tempfile.mkdtemp()) / "counting_sort.so"
    command = ["g++", "-O3", "-march=native", "-shared", "-fPIC", "-o", str(library), str(HERE / "counting_sort.cpp")]
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as problem:
        print(f"without cpp-counting-sort: {problem}", file=sys.stderr)
        return None
    function = ctypes.CDLL(str(library)).counting_sort
    i32, i64, pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [pointer, i64, i32, i32, i64, pointer, pointer, pointer]
    function.restype = None

    def align(ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, ...]:
        routes = ids.numel()
        sizes = moealign.capacity(routes, block_size=BLOCK, num_experts=num_experts)
        rows = torch.empty(sizes.sorted_token_ids, dtype=torch.int32)
        experts = torch.empty(sizes.expert_ids, dtype=torch.int32)
        total = torch.empty(1, dtype=torch.int32)
        function(
            ids.data_ptr(), routes, num_experts, BLOCK, sizes.sorted_token_ids,
            rows.data_ptr(), experts.data_ptr(), total.data_ptr(),
        )  # fmt: skip
        return rows, experts, total

    return align


def one_thread(ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, ...]:
    return moealign.moe_align_block_size(ids, BLOCK, num_experts, backend="cpu")


def two_threads(ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, ...]:
    return moealign.moe_align_block_size(ids, BLOCK, num_experts, backend="cpu")


def reference(ids: torch.Tensor, num_experts: int) -> moealign.BlockLayout:
    return moealign.align(ids, block_size=BLOCK, num_experts=num_experts, backend="reference")


def argsort(ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, ...]:
    return argsort_align(ids, BLOCK, num_experts)


def memcpy(source: torch.Tensor, num_experts: int) -> torch.Tensor:
    return torch.empty_like(source).copy_(source)


def copy_source(case: Case) -> torch.Tensor:
    sizes = moealign.capacity(case.ids.numel(), block_size=BLOCK, num_experts=case.num_experts)
    return torch.zeros((case.ids.numel() + sizes.sorted_token_ids + sizes.expert_ids + 2) // 2, dtype=torch.int32)


def cases(quick: bool) -> list[Case]:
    generator = torch.Generator().manual_seed(0)

    def uniform(routes: int, num_experts: int) -> torch.Tensor:
        return torch.randint(num_experts, (routes // TOP_K, TOP_K), dtype=torch.int32, generator=generator)

    sizes = [Case("routes", uniform(n, 256), 256) for n in (SIZES[:6] if quick else SIZES)]
    sweep = [Case("experts", uniform(SWEEP_ROUTES, e), e) for e in EXPERTS]
    skew = [Case("one-expert", torch.full((n // TOP_K, TOP_K), 7, dtype=torch.int32), 256) for n in (65_536, 524_288)]
    return sizes + sweep + skew


def check(implementations: dict[str, Align]) -> None:
    """Every implementation against plain loops, in the regimes of the table that loops can follow."""
    for routes, num_experts in ((8, 256), (4096, 256), (262_144, 256), (65_536, 4096)):
        ids = torch.randint(num_experts, (routes // TOP_K, TOP_K), dtype=torch.int32)
        expected = oracle_align(ids, block_size=BLOCK, num_experts=num_experts)
        for name, function in implementations.items():
            if name == "floor-memcpy":
                continue
            use(name)
            rows, experts, total = function(ids, num_experts)  # type: ignore[misc]
            layout = {"sorted_token_ids": rows, "expert_ids": experts, "num_tokens_post_padded": total}
            assert_same_layout(layout, expected)


def use(name: str) -> None:
    """The threads that `name` stands for; torch itself has one throughout."""
    os.environ["MOEALIGN_NUM_THREADS"] = "2" if name.endswith("-2t") else "1"


def measure(case: Case, implementations: dict[str, Align], seconds: float) -> dict[str, list[float]]:
    """Microseconds a call, one number a turn."""
    inputs = {name: copy_source(case) if name == "floor-memcpy" else case.ids for name in implementations}
    calls: dict[str, int] = {}
    for name, function in implementations.items():
        use(name)
        function(inputs[name], case.num_experts)
        start = time.perf_counter_ns()
        function(inputs[name], case.num_experts)
        calls[name] = max(1, min(200, 1_000_000 // max(time.perf_counter_ns() - start, 1)))
    times: dict[str, list[float]] = {name: [] for name in implementations}
    until = time.monotonic() + seconds
    turns = 0
    order = random.Random(0)
    while turns < 7 or (time.monotonic() < until and turns < 300):
        for name, function in order.sample(list(implementations.items()), len(implementations)):
            use(name)
            given, experts, repeat = inputs[name], case.num_experts, calls[name]
            start = time.perf_counter_ns()
            for _ in range(repeat):
                function(given, experts)
            times[name].append((time.perf_counter_ns() - start) / 1000 / repeat)
        turns += 1
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "align_cpu.csv")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each case, at 7 turns at least")
    parser.add_argument("--quick", action="store_true", help="leave out the two largest sizes")
    options = parser.parse_args()

    torch.set_num_threads(1)
    implementations: dict[str, Align] = {
        "moealign-cpu": one_thread,
        "moealign-cpu-2t": two_threads,
        "torch-argsort": argsort,
        "moealign-reference": reference,
        "floor-memcpy": memcpy,
    }
    cpp = build_cpp()
    if cpp is not None:
        implementations["cpp-counting-sort"] = cpp
    check(implementations)

    rows: list[list[object]] = []
    date = datetime.date.today().isoformat()
    medians: list[tuple[Case, dict[str, float]]] = []
    for case in cases(options.quick):
        routes = case.ids.numel()
        taken = {
            name: function
            for name, function in implementations.items()
            if name != "moealign-reference" or routes <= REFERENCE_MOST
        }
        times = measure(case, taken, options.seconds)
        medians.append((case, {name: statistics.median(values) for name, values in times.items()}))
        for name, values in times.items():
            numbers = [f"{x:.2f}" for x in (statistics.median(values), min(values), max(values))]
            rows.append(["align", case.name, routes, case.num_experts, TOP_K, BLOCK, name, *numbers, "cpu",
                         torch.__version__, date])  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    show(medians)
    print(f"{len(rows)} rows in {options.out}")


def show(medians: list[tuple[Case, dict[str, float]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title="median us of a call of moe_align_block_size on one thread, and how many times as long the others take"
    )
    others = ["torch-argsort", "moealign-reference", "cpp-counting-sort", "moealign-cpu-2t", "floor-memcpy"]
    for column in ("case", "routes", "E", "moealign-cpu", *others):
        table.add_column(column, justify="right")
    for case, median in medians:
        own = median["moealign-cpu"]
        cells = [f"{median[name] / own:.2f}x" if name in median else "-" for name in others]
        table.add_row(case.name, f"{case.ids.numel():,}", f"{case.num_experts:,}", f"{own:,.1f}", *cells)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
