"""Goals and what was measured, as Markdown; whatever misses its goal is **bold**, by comparison with the CSV's rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

import tables
from tables import HF, VLLM, Case, Row, cases_of

CUDA, TRITON, ALONE, CHAIN = "moealign-cuda", "moealign-triton", "moealign-cuda-align", "floor-chain"
CPU, ARGSORT, CPP, MEMCPY = "moealign-cpu", "torch-argsort", "cpp-counting-sort", "floor-memcpy"
PEER = "best peer"


def each(values: Iterable[float], least: float = -math.inf, most: float = math.inf, unit: str = "x") -> str:
    """`values` in a row, those out of bounds in bold."""
    said = []
    for value in values:
        digits = 2 if value < 10 else 1
        missed = not least <= value <= most
        while missed and least <= round(value, digits) <= most:
            digits += 1  # until the miss is seen
        text = f"{value:.{digits}f}{unit}"
        said.append(f"**{text}**" if missed else text)
    return ", ".join(said) or "not measured"


def span(values: Iterable[float], least: float = -math.inf, most: float = math.inf, unit: str = "x") -> str:
    """The least and the most of `values`, each bold if out of bounds."""
    found = sorted(values)
    ends = [each([end], least, most, unit) for end in found[:1] + found[-1:]]
    return " to ".join(dict.fromkeys(ends)) or each([])


def ratios(cases: Iterable[Case], slower: str, faster: str) -> list[float]:
    """How many times as long one takes as the other, in every case that has both."""
    pairs = [(tables.best_peer(t) if slower == PEER else t.get(slower), t.get(faster)) for t in cases]
    return [one / other for one, other in pairs if one and other]


def kinds(rows: Sequence[Row], bench: str, impl: str) -> list[Case]:
    """For each size the times of `impl` by what the name of the case ends with: ``three``, ``all six``."""
    found: dict[str, Case] = {}
    for row, times in cases_of(rows, bench):
        size, kind = row["case"].split(" ", 1)
        if impl in times:
            found.setdefault(size, {})[kind] = times[impl]
    return list(found.values())


def routes_said(routes: Sequence[int]) -> str:
    first, last = f"{routes[0]:,}", f"{routes[-1]:,}"
    return f"{first} routes" if first == last else f"{first} to {last} routes"


def table(seen: dict[str, str], rows: Sequence[Row], source: str) -> str:
    return f"{tables.made_on(rows, source)}\n\n{tables.markdown(['goal', 'seen'], list(seen.items()), left=2)}"


# ---- alignment -------------------------------------------------------------------------------------------------------

#: Routes to 256 experts, and how many times as fast as the best peer.
PEER_GOALS = (
    ((1, 8, 32), 2.5), ((64, 128, 256, 512), 2.1), ((1024,), 2.0), ((2048, 4096, 8192, 16_384), 2.0), ((32_768,), 4.0),
    ((65_536,), 6.0), ((131_072,), 9.0), ((262_144,), 16.0), ((524_288,), 25.0),
)  # fmt: skip


def by_routes(rows: Sequence[Row], experts: str = "256") -> dict[int, Case]:
    return {int(row["routes"]): times for row, times in cases_of(rows, "align") if row["num_experts"] == experts}


def cuda_goals(rows: Sequence[Row], source: str) -> str:
    wide, seen = by_routes(rows), {}
    for routes, least in PEER_GOALS:
        cases = [wide[n] for n in routes if n in wide]
        goal = f"{routes_said(routes)}: {least:g}x the best peer"
        seen[goal] = each(ratios(cases, PEER, CUDA), least)
        if routes[0] in (32_768, 65_536):
            seen[goal] += f"; over vLLM alone {each(ratios(cases, VLLM, CUDA))}"
    few = [wide[n] for n in sorted(wide) if n <= 32]
    seen["1 to 32 routes: at most 1.8x of load, barrier, store"] = each(ratios(few, CUDA, CHAIN), most=1.8)
    for experts, number, least in (("8", 64, 1.8), ("512", 320, 2.0)):
        case = by_routes(rows, experts).get(number, {})
        goal = f"{number} routes to {experts} experts: {least:g}x the best peer"
        seen[goal] = each(ratios([case], PEER, CUDA), least)
    batched = [times[CUDA] for _, times in cases_of(rows, "batched") if CUDA in times]
    seen["batched: at most 2.3 us"] = span(batched, most=2.3, unit=" us")
    extras = ratios(kinds(rows, "align-extras", CUDA), "all six", "three")
    seen["all extras: at most 1.3x of the three tensors"] = span(extras, most=1.3)
    skewed = kinds(rows, "align-skew", CUDA)
    others = sorted({kind for times in skewed for kind in times} - {"uniform"})
    found = [ratio for kind in others for ratio in ratios(skewed, kind, "uniform")]
    seen["skewed ids: within 1.5x of uniform ones"] = span(found, most=1.5)
    large = {int(row["num_experts"]): times for row, times in cases_of(rows, "large-e")}
    seen["twice the experts, from 1,024 to 65,536: at most 2x"] = each(steps(large, 2, CUDA), most=2.0)
    host = [times for row, times in cases_of(rows, "eager-host") if row["case"].endswith("drop-in")]
    seen["host time of an eager call: vLLM's wrapper takes 2x"] = each(ratios(host, VLLM, CUDA), 2.0)
    return table(seen, rows, source)


def steps(cases: dict[int, Case], factor: int, impl: str) -> list[float]:
    """How many times as long `impl` takes with `factor` times as many experts."""
    times = {n: case[impl] for n, case in sorted(cases.items()) if impl in case}
    return [times[factor * n] / times[n] for n in times if factor * n in times]


def triton_goals(rows: Sequence[Row], source: str) -> str:
    wide, seen = by_routes(rows), {}
    large = [wide[n] for n in sorted(wide) if n >= 16_384]
    seen["from 16,384 routes on: faster than vLLM"] = each(ratios(large, VLLM, TRITON), 1.0)
    for n, least in ((65_536, 2.5), (524_288, 6.0)):
        seen[f"{n:,} routes: {least:g}x vLLM"] = each(ratios([wide.get(n, {})], VLLM, TRITON), least)
    few = [wide[n] for n in sorted(wide) if n <= 512]
    seen["up to 512 routes: at most 2.5x of `cuda`"] = each(ratios(few, TRITON, CUDA), most=2.5)
    every = [times for bench in ("align", "large-e") for _, times in cases_of(rows, bench)]
    seen["never slower than a stable argsort in torch"] = span(ratios(every, ARGSORT, TRITON), 1.0)
    return table(seen, rows, source)


def cpu_goals(rows: Sequence[Row], source: str) -> str:
    cases, seen = cases_of(rows, "align"), {}
    sizes = {int(row["routes"]): times for row, times in cases if row["case"] == "routes"}
    experts = {int(row["num_experts"]): times for row, times in cases if row["case"] == "experts"}
    large = {n: times for n, times in sizes.items() if n >= 524_288}
    two, those = f"{CPU}-2t", ", ".join(f"{n:,}" for n in large)
    for n, least in ((8, 3.0), (65_536, 15.0), (524_288, 8.0)):
        goal = f"{n:,} routes: {least:g}x a stable argsort in torch"
        seen[goal] = each(ratios([sizes.get(n, {})], ARGSORT, CPU), least)
    seen["C++, over the routes: not faster"] = each(ratios(sizes.values(), CPP, CPU), 1.0)
    seen["C++, over the experts: not faster"] = each(ratios(experts.values(), CPP, CPU), 1.0)
    seen["two threads, from 524,288 routes on: 1.6x"] = each(ratios(large.values(), CPU, two), 1.6)
    seen["two threads, over the experts: 1.6x"] = each(ratios(experts.values(), CPU, two), 1.6)
    each_route = [1e3 * times[CPU] / n for n, times in large.items() if CPU in times]
    seen[f"linear growth: time a route at {those} routes"] = each(each_route, unit=" ns")
    fourfold = steps(experts, 4, CPU)
    seen["no cliff: the worst of four times as many experts"] = each([max(fourfold)] if fourfold else [])
    seen["a copy of the bytes of ids and outputs, at the same routes"] = each(ratios(large.values(), CPU, MEMCPY))
    return table(seen, rows, source)


# ---- experts and routers ---------------------------------------------------------------------------------------------

OURS = "moealign"


def experts_goals(rows: Sequence[Row], source: str) -> str:
    cases = [(tables.shape_of(row), times) for row, times in cases_of(rows, "experts")]
    every = [times for _, times in cases]
    one = [times for (tokens, _, experts, *_), times in cases if tokens == 1 and experts in (128, 256)]
    many = [times for (tokens, *_), times in cases if tokens == 4096]
    seen = {
        "vLLM: at least 1x everywhere": span(ratios(every, VLLM, OURS), 1.0),
        "the same against its tuned configurations": span(ratios(every, f"{VLLM}-tuned", OURS), 1.0),
        "vLLM: 1.2x at one token with 128 and 256 experts": each(ratios(one, VLLM, OURS), 1.2),
        "vLLM: 1.2x at 4,096 tokens": each(ratios(many, VLLM, OURS), 1.2),
        "HF: 1.6x in the geometric mean": each(mean_of(ratios(every, HF, OURS)), 1.6),
    }
    missed = [times for times in one if times[VLLM] < 1.2 * times[OURS]]
    if missed:
        would = ", ".join(f"{1.2 * times['floor'] / times[VLLM]:.0%}" for times in missed)
        seen["vLLM: 1.2x at one token with 128 and 256 experts"] += f"; 1.2x would be {would} of the floor"
    return table(seen, rows, source)


def mean_of(values: list[float]) -> list[float]:
    return [statistics.geometric_mean(values)] if values else []


def routing_goals(rows: Sequence[Row], source: str) -> str:
    found: dict[str, dict[int, list[Case]]] = {}
    for bench in ("routing", "routing-grouped"):
        for row, times in cases_of(rows, bench):
            top_k, experts, dtype = row["top_k"], row["num_experts"], row["case"].split()[-1]
            kind = f"softmax, top {top_k} of {experts}, {dtype}" if (top_k, experts) == ("8", "256") else "other sizes"
            kind = kind if bench == "routing" else "sigmoid with groups"
            found.setdefault(kind, {}).setdefault(int(row["routes"]) // int(top_k), []).append(times)
    seen = {}
    for kind, sizes in found.items():
        few = {tokens: cases for tokens, cases in sizes.items() if tokens <= 512}
        rest = {tokens: cases for tokens, cases in sizes.items() if tokens > 512}
        for goal, least, cases in (("2.5x vLLM's chain up to 512 tokens", 2.5, few), ("3x beyond", 3.0, rest)):
            every = [times for several in cases.values() for times in several]
            seen[f"{kind}: {goal}"] = span(ratios(every, VLLM, CUDA), least)
            lacking = [f"{tokens:,}" for tokens, several in cases.items() if any(CUDA not in t for t in several)]
            if lacking:
                seen[f"{kind}: {goal}"] += f"; **not measured at {', '.join(lacking)} tokens**"
        if kind.startswith("softmax"):
            decode = [times for tokens in (1, 4) for times in sizes.get(tokens, [])]
            goal = f"{kind}: at most 1.5x of our alignment alone at 1 and 4 tokens"
            seen[goal] = each(ratios(decode, CUDA, ALONE), most=1.5)
    return table(seen, rows, source)
