"""The tables that a run prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..terminal import paragraph, table
from .benches import BENCHES
from .names import ARGSORT, in_order, is_peer, short_name
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
        argsort = times.get(ARGSORT)
        line.append(f"{argsort / own:.2f}" if argsort and own else "-")
        line.append(f"{best / own:.2f}" if best and own else "-")
        if bench in BASE:
            base = cases.get(f"{case.split(' ')[0]} {BASE[bench]}", {}).get("moealign-cuda")
            line.append(f"{own / base:.2f}" if base and own else "-")
        lines.append(line)
    header = ["case", "routes", *(short_name(impl) for impl in impls), "x argsort", "x peer"]
    header += [f"of {BASE[bench]}"] if bench in BASE else []
    # A ratio that no case has would be a column of dashes.
    kept = [i for i, name in enumerate(header) if not name.startswith("x ") or any(line[i] != "-" for line in lines)]
    return [header[i] for i in kept], [[line[i] for i in kept] for line in lines]


def print_tables(rows: Sequence[dict[str, Any]]) -> None:
    """Microseconds by case and implementation; the main bench comes last, where truncated output still shows it."""
    for bench in reversed(BENCHES):
        if any(row["bench"] == bench for row in rows):
            header, lines = pivot(rows, bench)
            how = "median, one CPU thread" if rows[0]["gpu"] == "cpu" else "median"
            log("\n" + table(header, lines, title=f"{bench}: microseconds per call, {how}"))
    impls, legend = {row["impl"] for row in rows}, []
    if ARGSORT in impls:
        legend.append("argsort: the same tensors by a stable argsort in torch. x argsort: its time over ours.")
    if any(map(is_peer, impls)):
        legend.append("x peer: the fastest peer's time over ours.")
    if "moealign-reference" in impls:
        legend.append("reference: our backend in plain torch.")
    if legend:
        log(paragraph(" ".join(legend)))
