"""The tables that a run prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .benches import BENCHES
from .names import in_order, is_peer, short_name
from .progress import log

BASE = {"align-extras": "three", "align-skew": "uniform"}  # the kind of case that the others of a bench are compared to


def microseconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def pivot(rows: Sequence[dict[str, Any]], bench: str) -> tuple[list[str], list[list[str]]]:
    """Header and lines of one bench: a line for each case, a column for each implementation, and the ratios."""
    cases: dict[str, dict[str, float]] = {}
    routes: dict[str, str] = {}
    for row in rows:
        if row["bench"] == bench:
            cases.setdefault(row["case"], {})[row["impl"]] = float(row["median_us"])
            routes[row["case"]] = f"{int(row['routes']):,}"
    impls = in_order(impl for times in cases.values() for impl in times)
    lines = []
    for case, times in cases.items():
        own = times.get("moealign-cuda", times.get("moealign-cpu"))
        best = min((spent for impl, spent in times.items() if is_peer(impl)), default=None)
        line = [case, routes[case], *(f"{times[impl]:.2f}" if impl in times else "-" for impl in impls)]
        line.append(f"{best / own:.2f}" if best and own else "-")
        if bench in BASE:
            base = cases.get(f"{case.split(' ')[0]} {BASE[bench]}", {}).get("moealign-cuda")
            line.append(f"{own / base:.2f}" if base and own else "-")
        lines.append(line)
    header = ["case", "routes", *(short_name(impl) for impl in impls), "x peer"]
    return header + ([f"of {BASE[bench]}"] if bench in BASE else []), lines


def print_tables(rows: Sequence[dict[str, Any]]) -> None:
    """Microseconds by case and implementation; the main bench comes last, where truncated output still shows it."""
    benches = [bench for bench in reversed(BENCHES) if any(row["bench"] == bench for row in rows)]
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for bench in benches:
            header, lines = pivot(rows, bench)
            widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
            log(f"\n{bench}")
            for first, *others in [header, *lines]:
                cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
                log("  ".join([first.ljust(widths[0]), *cells]))
        return
    console = Console(width=150, color_system=None, highlight=False, soft_wrap=True)
    for bench in benches:
        header, lines = pivot(rows, bench)
        table = Table(title=bench, title_justify="left", box=box.ASCII2, show_edge=False, padding=(0, 0))
        for i, name in enumerate(header):
            table.add_column(name, justify="right" if i else "left", no_wrap=True)
        for line in lines:
            table.add_row(*line)
        console.print(table)
