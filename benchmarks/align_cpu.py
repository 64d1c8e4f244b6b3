"""Times an alignment on the CPU, beside torch, C++ and a plain copy.

    python benchmarks/align_cpu.py [--quick] [--out benchmarks/results/align_cpu.csv]

Every row: int32 ids, uniform over the experts unless the case says otherwise, outputs allocated inside the timed call.
Bytes: an alignment reads 4 n bytes of ids and writes 4 (L + cdiv(L, B) + 1).  `floor-memcpy` copies half as many, so
that it reads and writes the same number together.
The implementations take turns in random order, so that a busy machine disturbs all alike; the median counts.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from common import RESULTS

import moealign
from moealign import bench
from moealign.testing import argsort_align, assert_same_layout, oracle_align
from moealign.timing import Times, host_in_turns, host_us

TOP_K, BLOCK = 8, 64
SIZES = (8, 64, 512, 4096, 65_536, 524_288, 4_194_304, 16_777_216)
EXPERTS = (8, 64, 256, 1024, 4096, 16_384, 65_536)
SWEEP_ROUTES = 524_288
MAX_REFERENCE_ROUTES = 4_194_304  # the vectorised reference is left out above

Align = Callable[[torch.Tensor, int], object]


class Case(NamedTuple):
    name: str
    ids: torch.Tensor
    num_experts: int


def build_cpp() -> Align | None:
    """counting_sort.cpp through ctypes, or None without a g++."""
    library = Path(tempfile.mkdtemp()) / "counting_sort.so"
    command = [
        "g++",
        "-O3",
        "-march=native",
        "-shared",
        "-fPIC",
        "-o",
        str(library),
        str(Path(__file__).with_name("counting_sort.cpp")),
    ]
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


def cpu(ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, ...]:
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
    """Compare every implementation with plain loops, at sizes that loops can handle."""
    for routes, num_experts in ((8, 256), (4096, 256), (262_144, 256), (65_536, 4096)):
        ids = torch.randint(num_experts, (routes // TOP_K, TOP_K), dtype=torch.int32)
        expected = oracle_align(ids, block_size=BLOCK, num_experts=num_experts)
        for name, function in implementations.items():
            if name != "floor-memcpy":
                set_threads(name)
                assert_same_layout(bench.by_name(tuple(function(ids, num_experts))), expected)  # type: ignore[arg-type]


def set_threads(name: str) -> None:
    """Of our backend, for the implementation of that name; torch always has one thread."""
    os.environ["MOEALIGN_NUM_THREADS"] = "2" if name.endswith("-2t") else "1"


def measure(case: Case, implementations: dict[str, Align], seconds: float) -> Times:
    """Microseconds a call; a turn is one call, or up to 200 short ones."""
    arguments = {}
    for name, function in implementations.items():
        set_threads(name)
        once = [(copy_source(case) if name == "floor-memcpy" else case.ids, case.num_experts)]
        function(*once[0])
        arguments[name] = once * max(1, min(200, int(1e3 / host_us(function, once))))
    return host_in_turns(
        implementations,
        arguments,
        min_turns=7,
        max_turns=300,
        seconds=seconds,
        order=random.Random(0),
        before=set_threads,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "align_cpu.csv")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each case, of at least 7 turns")
    parser.add_argument("--quick", action="store_true", help="leave out the two largest sizes")
    options = parser.parse_args()

    torch.set_num_threads(1)
    implementations: dict[str, Align] = {
        "moealign-cpu": cpu,
        "moealign-cpu-2t": cpu,
        "torch-argsort": argsort,
        "moealign-reference": reference,
        "floor-memcpy": memcpy,
    }
    cpp = build_cpp()
    if cpp is not None:
        implementations["cpp-counting-sort"] = cpp
    check(implementations)

    rows = []
    medians: list[tuple[Case, dict[str, float]]] = []
    for case in cases(options.quick):
        routes = case.ids.numel()
        timed = dict(implementations)
        if routes > MAX_REFERENCE_ROUTES:
            del timed["moealign-reference"]
        times = measure(case, timed, options.seconds)
        medians.append((case, {name: statistics.median(values) for name, values in times.items()}))
        size = (routes // TOP_K, TOP_K, case.num_experts, BLOCK)
        rows += [
            bench.row_of("align", case.name, routes, size, name, values, "cpu", 2) for name, values in times.items()
        ]
    print_table(medians)
    bench.write_csv(rows, options.out)
    return 0


def print_table(medians: list[tuple[Case, dict[str, float]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title="median us of a call of moe_align_block_size on one thread, and the others' times as multiples of it"
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
    sys.exit(main())
