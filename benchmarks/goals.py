"""The tables of docs/*.md, from rows of the CSV files: what was to be reached, what was seen, what was tried.

A goal that was missed is set in bold by comparing numbers, never by hand.  figures.py puts the tables into the pages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from moealign.bench import cases_of, microseconds

Row = dict[str, str]
Case = dict[str, float]  # median microseconds by implementation

OURS, VLLM, SGLANG = "moealign-cuda", "vllm-0.33.0", "sglang-kernel-0.4.4"
PEERS = (VLLM, SGLANG)


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *lines])


def caption(rows: Sequence[Row], how: str, source: str) -> str:
    first = rows[0]
    return f"{how}; {first['gpu'].upper()}, torch {first['torch']}, {first['date']}; `benchmarks/results/{source}.csv`."


def times_x(value: float, digits: int = 1) -> str:
    return f"{value:.{digits}f}x"


def each(values: Iterable[float], digits: int = 1) -> str:
    return ", ".join(times_x(value, digits) for value in values)


def span(values: Sequence[float], digits: int = 2) -> str:
    least, most = times_x(min(values), digits), times_x(max(values), digits)
    return least if least == most else f"{least} to {most}"


def seen(text: str, reached: bool) -> str:
    return text if reached else f"**{text}**"


def goals_table(lines: Sequence[tuple[str, str, bool]]) -> str:
    return markdown(["goal", "seen"], [[goal, seen(text, reached)] for goal, text, reached in lines], left=2)


def best_peer(times: Case) -> float | None:
    return min((times[impl] for impl in PEERS if impl in times), default=None)


def over(times: Case, impl: str = OURS) -> float:
    """How many times as long the best peer takes."""
    peer = best_peer(times)
    assert peer is not None
    return peer / times[impl]


# ---- alignment on a GPU ----------------------------------------------------------------------------------------------


def by_routes(rows: Sequence[Row], experts: int = 256) -> dict[int, Case]:
    return {int(row["routes"]): times for row, times in cases_of(rows, "align") if row["num_experts"] == str(experts)}


def relative(rows: Sequence[Row], bench: str, base: str) -> list[float]:
    """Ours in every kind of a case over ours in its kind `base`, the last word of the case."""
    found: dict[str, dict[str, float]] = {}
    for row, times in cases_of(rows, bench):
        size, _, kind = row["case"].partition(" ")
        found.setdefault(size, {})[kind] = times[OURS]
    return [value / kinds[base] for kinds in found.values() for kind, value in kinds.items() if kind != base]


def cuda(rows: Sequence[Row]) -> str:
    """Issue by issue what the CUDA backend was to reach."""
    at = by_routes(rows)
    eight = next(times for row, times in cases_of(rows, "align") if row["case"] == "32x2-E8-B16")
    many = next(times for row, times in cases_of(rows, "align") if row["case"] == "32x10-E512-B16")
    few = [at[n] for n in (1, 8, 32)]
    chain = max(times[OURS] / times["floor-chain"] for times in few)
    lines = [
        (
            "1 to 32 routes: 2.5x the best peer, at most 1.8x of load-barrier-store",
            f"{times_x(min(map(over, few)))}; at most {times_x(chain)}",
            min(map(over, few)) >= 2.5 and chain <= 1.8,
        )
    ]
    for sizes, least in (
        ((64, 128, 256, 512), (2.1,) * 4),
        ((1024,), (2.0,)),
        ((2048, 4096, 8192, 16384), (2.0,) * 4),
        ((32768, 65536), (4.0, 6.0)),
        ((131072, 262144, 524288), (9.0, 16.0, 25.0)),
    ):
        ratios = [over(at[n]) for n in sizes]
        reached = all(ratio >= goal for ratio, goal in zip(ratios, least, strict=True))
        text = each(ratios)
        if not reached:
            text += f"; over vLLM alone {each(at[n][VLLM] / at[n][OURS] for n in sizes)}"
        wanted = " / ".join(dict.fromkeys(f"{goal:g}x" for goal in least))
        lines.append((f"{' / '.join(f'{n:,}' for n in sizes)}: {wanted}", text, reached))
    lines.append(
        (
            "E = 8, 64 routes: 1.8x; E = 512, 320 routes: 2x",
            each((over(eight), over(many))),
            over(eight) >= 1.8 and over(many) >= 2,
        )
    )
    batched = [times[OURS] for _, times in cases_of(rows, "batched")]
    lines.append(("batched: at most 2.3 us", f"{min(batched):.1f} to {max(batched):.1f} us", max(batched) <= 2.3))
    extras = relative(rows, "align-extras", "three")
    lines.append(("all extras: at most 1.3x of the three tensors", span(extras), max(extras) <= 1.3))
    skew = relative(rows, "align-skew", "uniform")
    lines.append(("skewed input: within 1.5x of uniform", f"at most {times_x(max(skew), 2)}", max(skew) <= 1.5))
    large = [times[OURS] for _, times in cases_of(rows, "large-e")]
    steps = [after / before for before, after in pairwise(large)]
    lines.append(("a doubling of E, from 1,024 to 65,536: at most 2x", span(steps), max(steps) <= 2))
    host = {row["case"]: times for row, times in cases_of(rows, "eager-host")}
    ratios = [times[VLLM] / times[OURS] for case, times in host.items() if case.endswith("drop-in")]
    lines.append(("host time of an eager call: half of vLLM's wrapper", f"{span(ratios, 1)} less", min(ratios) >= 2))
    return goals_table(lines)


def triton(rows: Sequence[Row]) -> str:
    """The same of the Triton backend."""
    name = "moealign-triton"
    at = {n: times for n, times in by_routes(rows).items() if name in times}
    large = {n: times[VLLM] / times[name] for n, times in at.items() if n >= 16384}
    small = {n: times[name] / times[OURS] for n, times in at.items() if n <= 1024}
    torch = [times["torch-argsort"] / times[name] for times in at.values() if "torch-argsort" in times]
    shown = ", ".join(f"{times_x(ratio)} at {n:,}" for n, ratio in large.items())
    near = ", ".join(f"{times_x(ratio)} at {n:,}" for n, ratio in small.items())
    reached = min(large.values()) > 1 and large[65536] >= 2.5 and large[524288] >= 6
    return goals_table(
        [
            ("from 16,384 routes on faster than vLLM; 2.5x at 65,536, 6x at 524,288", shown, reached),
            ("at decode within 2.5x of `cuda`", near, max(small.values()) <= 2.5),
            ("never slower than the argsort formulation in torch", f"{span(torch, 1)} faster", min(torch) >= 1),
        ]
    )


# ---- alignment on a CPU ----------------------------------------------------------------------------------------------


def cpu(rows: Sequence[Row]) -> str:
    mine, cpp, two = "moealign-cpu", "cpp-counting-sort", "moealign-cpu-2t"
    cases = cases_of(rows, "align")
    at = {int(row["routes"]): times for row, times in cases if row["case"] not in ("experts", "one-expert")}
    sweep = {int(row["num_experts"]): times for row, times in cases if row["case"] == "experts"}
    argsort = [at[n]["torch-argsort"] / at[n][mine] for n in (8, 65536, 524288)]
    parity, over_e = ([times[cpp] / times[mine] for times in found.values()] for found in (at, sweep))
    large = [n for n in at if n >= 524288]
    threads = [at[n][mine] / at[n][two] for n in large]
    growth = [f"{at[n][mine] * 1e3 / n:.1f}" for n in large]
    steps = [sweep[4 * e][mine] / sweep[e][mine] for e in sweep if 4 * e in sweep]
    copies = [at[n][mine] / at[n]["floor-memcpy"] for n in large]
    names = ", ".join(f"{n:,}" for n in large)
    return goals_table(
        [
            (
                "argsort formulation over ours, one thread: 3x at 8 routes, 15x at 65,536, 8x at 524,288",
                each(argsort),
                argsort[0] >= 3 and argsort[1] >= 15 and argsort[2] >= 8,
            ),
            (
                "C++ over ours: 1.0x",
                f"{span(parity)} over routes, {span(over_e)} over E",
                min(parity + over_e) >= 0.995,
            ),
            (f"two threads over one: 1.6x at {names}", each(threads, 2), min(threads) >= 1.6),
            ("linear growth", f"{', '.join(growth)} ns a route at {names}", True),
            ("no cliff in E up to 65,536", f"a fourfold E costs at most {times_x(max(steps))}", max(steps) <= 4),
            ("a memcpy of the bytes of ids and outputs", f"ours takes {each(copies)} as long at {names}", True),
        ]
    )


# ---- routing ---------------------------------------------------------------------------------------------------------


def routing(rows: Sequence[Row]) -> str:
    lines = []
    for bench, words in (("routing", "softmax"), ("routing-grouped", "sigmoid, bias, 8 groups")):
        for row, times in cases_of(rows, bench):
            tokens = int(row["routes"]) // int(row["top_k"])
            chain, alone = times[VLLM] / times[OURS], times[OURS] / times["moealign-cuda-align"]
            values = [times[i] for i in (OURS, "moealign-cuda-align", "moealign-cuda-apart", "moealign-triton", VLLM)]
            kind = f"{words}, {row['case'].split()[-1]}"
            sizes = f"{tokens:,} x {row['top_k']}, {row['num_experts']}"
            lines.append([kind, sizes, *map(microseconds, values), times_x(chain), times_x(alone, 2)])
    header = ["router", "tokens x top-k, experts", "**moealign**", "our alignment alone", "two plain launches",
              "Triton", "vLLM", "vLLM / ours", "ours / alignment"]  # fmt: skip
    return f"{caption(rows, 'Microseconds, CUDA graph replay, median', 'routing_h200')}\n\n{markdown(header, lines, 2)}"


def routing_goals(rows: Sequence[Row]) -> str:
    lines = []
    for dtype in ("bfloat16", "float32"):
        at = {
            int(row["routes"]) // 8: times
            for row, times in cases_of(rows, "routing")
            if (row["num_experts"], row["top_k"]) == ("256", "8") and row["case"].endswith(dtype)
        }
        chain = {tokens: times[VLLM] / times[OURS] for tokens, times in at.items()}
        alone = {tokens: times[OURS] / times["moealign-cuda-align"] for tokens, times in at.items()}
        few, many = ([ratio for tokens, ratio in chain.items() if (tokens <= 512) == small] for small in (True, False))
        lines += [
            (f"{dtype}: vLLM's chain 2.5x up to 512 tokens", span(few), min(few) >= 2.5),
            (f"{dtype}: 3x beyond", span(many), min(many) >= 3),
            (
                f"{dtype}: at most 1.5x of our alignment alone at one token",
                f"{times_x(alone[1], 2)}; {times_x(alone[8], 2)} at 8 tokens, {times_x(alone[64], 2)} at 64",
                alone[1] <= 1.5,
            ),
        ]
    return goals_table(lines)


# ---- experts ---------------------------------------------------------------------------------------------------------

SHAPE = re.compile(r"T(\d+)-k(\d+)-E(\d+)-H(\d+)-I(\d+)")
HF, TUNED = "transformers-grouped_mm", "vllm-0.33.0-tuned"


def shape_of(row: Row) -> tuple[int, ...]:
    """(tokens, top_k, experts, hidden, inner) of a case."""
    found = SHAPE.match(row["case"])
    assert found is not None, row["case"]
    return tuple(map(int, found.groups()))


def experts(rows: Sequence[Row]) -> str:
    lines, last = [], None
    for row, times in cases_of(rows, "experts"):
        tokens, top_k, count, hidden, inner = shape_of(row)
        shape, mine = f"{count}, {top_k}, {hidden}, {inner}", times["moealign"]
        values = [mine, times[VLLM], times.get(TUNED), times[HF], times["floor"]]
        ratios = [times_x(times[VLLM] / mine, 2), times_x(times[HF] / mine, 2), f"{times['floor'] / mine:.0%}"]
        lines.append(
            ["" if shape == last else shape, f"{tokens:,}", *(f"{v:,.1f}" if v else "-" for v in values), *ratios]
        )
        last = shape
    header = ["E, k, H, I", "tokens", "**moealign**", "vLLM", "tuned", "HF", "floor", "vLLM / ours", "HF / ours",
              "of the floor"]  # fmt: skip
    return f"{caption(rows, 'Microseconds, CUDA graph replay, median', 'experts_h200')}\n\n{markdown(header, lines)}"


def experts_goals(rows: Sequence[Row]) -> str:
    cases = [(shape_of(row), times) for row, times in cases_of(rows, "experts")]
    ratios = [times[VLLM] / times["moealign"] for _, times in cases]
    tuned = [times[TUNED] / times["moealign"] for _, times in cases if TUNED in times]
    one = [times for shape, times in cases if shape[0] == 1 and shape[2] >= 128]
    single = [times[VLLM] / times["moealign"] for times in one]
    most = max(times["floor"] / (times[VLLM] / 1.2) for times in one)
    large = [times[VLLM] / times["moealign"] for shape, times in cases if shape[0] == 4096]
    mean = 1.0
    for _, times in cases:
        mean *= (times[HF] / times["moealign"]) ** (1 / len(cases))
    said = each(single, 2) + (f"; 1.2x would be {most:.0%} of the floor" if min(single) < 1.2 else "")
    return goals_table(
        [
            (
                "vLLM: at least 1.0x everywhere",
                f"{span(ratios)}; against its tuned configurations {span(tuned)}",
                min(ratios) >= 0.995,
            ),
            ("vLLM: 1.2x at one token with 128 and 256 experts", said, min(single) >= 1.2),
            ("vLLM: 1.2x at 4,096 tokens", each(large, 2), min(large) >= 1.2),
            ("HF: 1.6x in the geometric mean", times_x(mean, 2), mean >= 1.6),
        ]
    )


def transformers(rows: Sequence[Row]) -> str:
    """Tokens a second; the better of eager and graph is what a user gets, so both are shown."""
    names = {"grouped_mm": "grouped_mm", "batched_mm": "batched_mm", "moealign": "**moealign**",
             "moealign-routers": "**and its routers**"}  # fmt: skip
    lines = []
    for row, times in cases_of(rows, "transformers"):
        kind, number, *_ = row["case"].split()
        tokens = int(number[1:])
        for suffix, how in (("", "eager"), ("-graph", "CUDA graph")):
            if f"moealign{suffix}" in times:
                rates = [times.get(name + suffix) for name in names]
                lines.append(
                    [
                        f"{kind}, {tokens:,} token{'s' if tokens > 1 else ''}",
                        how,
                        *(f"{tokens / t * 1e6:,.0f}" if t else "-" for t in rates),
                    ]
                )
    said = caption(rows, f"Tokens a second, wall time, median; {row['case'].split(' ', 2)[2]}", "transformers_h200")
    return f"{said}\n\n{markdown(['', 'how', *names.values()], lines, 2)}"


def experts_cpu(rows: Sequence[Row]) -> str:
    others = {"transformers-eager": "eager loop", HF: "grouped_mm", "transformers-batched_mm": "batched_mm"}
    lines = []
    for row, times in cases_of(rows, "experts-cpu"):
        tokens, top_k, count, hidden, inner = shape_of(row)
        ratios = [times_x(times[i] / times["moealign"], 2) if i in times else "-" for i in others]
        lines.append([f"{count}, {top_k}, {hidden}, {inner}", row["case"].split()[-1], f"{tokens:,}", *ratios])
    said = caption(rows, "How many times as long as ours the others take, one thread, medians", "experts_cpu")
    return f"{said}\n\n{markdown(['E, k, H, I', 'dtype', 'tokens', *others.values()], lines, 2)}"


# ---- the drop-in -----------------------------------------------------------------------------------------------------


def plugins(rows: Sequence[Row]) -> str:
    """Without the drop-in over with it, by kind of call."""
    names = {"align": "`moe_align_block_size`", "lora": "`moe_lora_align_block_size`", "layer": "its fused layer"}
    lines = []
    for bench, said in names.items():
        device, host = (
            [times[VLLM] / times["moealign"] for _, times in cases_of(rows, f"plugin-{bench}{on}")]
            for on in ("", "-host")
        )
        lines.append([said, span(device), span(host)])
    table = markdown(["vLLM's, without the drop-in over with it", "device", "host, eager"], lines)
    return f"{caption(rows, 'Medians', 'plugins_h200')}\n\n{table}"


# ---- trials ----------------------------------------------------------------------------------------------------------


def trials(part: str) -> Callable[[Sequence[Row]], str]:
    """The table of what was tried in one part."""

    def table(rows: Sequence[Row]) -> str:
        lines = [[row[name] for name in ("tried", "expected", "seen", "kept")] for row in rows if row["part"] == part]
        return markdown(["tried", "expected", "seen", "kept"], lines, left=4)

    return table
