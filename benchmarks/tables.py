"""Tables of the measurements: rows of a tracked CSV in, Markdown out.  benchmarks/figures.py puts them on the pages."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence

from vllm_layer import naive

from moealign.bench import SGLANG, VLLM, cases_of, microseconds

PEERS = {VLLM: "vLLM 0.33.0", SGLANG: "sglang-kernel 0.4.4"}
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

Row = dict[str, str]
Case = dict[str, float]  # median microseconds by implementation


def best_peer(times: Case) -> float | None:
    return min((times[impl] for impl in PEERS if impl in times), default=None)


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *lines])


def sizes_of(row: Row) -> str:
    tokens = int(row["routes"]) // int(row["top_k"])
    return f"{tokens:,} x {row['top_k']}, {row['num_experts']}, {row['block_size']}"


def align_table(rows: Sequence[Row], own: str, others: Sequence[str]) -> str:
    cases = cases_of(rows, "align")
    shown = [own, *(impl for impl in others if any(impl in times for _, times in cases))]
    peers = any(best_peer(times) for _, times in cases)
    against = "best peer" if peers else "argsort"
    lines = []
    for row, times in cases:
        other = best_peer(times) if peers else times.get("torch-argsort")
        ratio = f"{other / times[own]:.1f}x" if other and own in times else "-"
        values = [microseconds(times.get(impl)) for impl in shown]
        lines.append([sizes_of(row), f"{int(row['routes']):,}", *values, ratio])
    return markdown(
        ["tokens x top-k, experts, block", "routes", *(TITLES[i] for i in shown), f"{against} / ours"], lines
    )


def batched_table(rows: Sequence[Row]) -> str:
    lines = []
    for row, times in cases_of(rows, "batched"):
        own, other = times.get("moealign-cuda"), best_peer(times)
        sizes = f"{row['num_experts']} x {int(row['top_k']):,}, {row['block_size']}"
        ratio = f"{other / own:.1f}x" if own and other else "-"
        lines.append([sizes, microseconds(own), microseconds(times.get(VLLM)), ratio])
    return markdown(["batches x rows, block", "**moealign**", "vLLM 0.33.0", "vLLM / ours"], lines)


def host_sentence(rows: Sequence[Row]) -> str:
    for row, times in cases_of(rows, "eager-host"):
        if row["case"] == "32x8-E256-B16 drop-in" and {"moealign-cuda", VLLM} <= set(times):
            return (
                f"Host time of one eager call with vLLM's signature (256 routes): {times['moealign-cuda']:.1f} us, "
                f"vLLM's wrapper {times[VLLM]:.1f} us."
            )
    return ""


def where_and_when(rows: Sequence[Row]) -> str:
    first = rows[0]
    return f"({first['gpu'].upper()}, torch {first['torch']}, {first['date']})"


def made_on(rows: Sequence[Row], source: str) -> str:
    first = rows[0]
    return f"{first['gpu'].upper()}, torch {first['torch']}, {first['date']}; `{source}`."


def caption(rows: Sequence[Row], how: str, source: str) -> str:
    return f"Microseconds per call, {how}, median; {made_on(rows, source)}"


def performance_table(rows: Sequence[Row], source: str) -> str:
    """Times of the aligned and the batched layout on a GPU."""
    parts = [
        caption(rows, "CUDA graph replay", source),
        align_table(rows, "moealign-cuda", (*PEERS, "torch-argsort", "floor-chain")),
    ]
    if cases_of(rows, "batched"):
        parts += ["The batched layout:", batched_table(rows)]
    parts.append(host_sentence(rows))
    return "\n\n".join(part for part in parts if part)


def scale_table(rows: Sequence[Row], source: str) -> str:
    """Times past a million routes, and how random shapes compare with the faster peer."""
    lines = []
    for row, times in cases_of(rows, "align-scale"):
        own, floor = times["moealign-cuda"], times["floor-bytes"]
        best = best_peer(times)
        spent = [microseconds(times.get(impl)) for impl in ("moealign-cuda", *PEERS, "torch-argsort", "floor-bytes")]
        ratios = [f"{best / own:.0f}x" if best else "-", f"{own / floor:.1f}x"]
        lines.append([f"{int(row['routes']):,}", f"{int(row['num_experts']):,}", *spent, *ratios])
    if not lines:
        return ""
    header = ["routes", "experts", "**moealign**", *PEERS.values(), "torch argsort", TITLES["floor-bytes"],
              "best peer / ours", "ours / bytes"]  # fmt: skip
    parts = [caption(rows, "CUDA graph replay", source), markdown(header, lines, left=0)]
    gains = [best_peer(times) / times["moealign-cuda"] for _, times in cases_of(rows, "align-random")]
    if gains:
        mean = statistics.geometric_mean(gains)
        parts.append(
            f"{len(gains)} random shapes of 1 to 262,144 routes: the faster peer takes {min(gains):.2f} to "
            f"{max(gains):.1f} times as long, {mean:.2f} in the geometric mean."
        )
    return "\n\n".join(parts)


def cpu_table(rows: Sequence[Row], source: str) -> str:
    """Times on a CPU by number of routes, without the sweeps of align_cpu.py."""
    shown = [row for row in rows if row["case"] not in ("experts", "one-expert")]
    others = ("moealign-cpu-2t", "cpp-counting-sort", "torch-argsort", "moealign-reference", "floor-memcpy")
    table = align_table(shown, "moealign-cpu", others)
    return f"{caption(rows, 'wall time on one thread', source)}\n\n{table}"


# ---- experts, routers, plug-ins --------------------------------------------------------------------------------------

HF = "transformers-grouped_mm"
SHAPE = re.compile(r"T(\d+)-k(\d+)-E(\d+)-H(\d+)-I(\d+)")


def shape_of(row: Row) -> tuple[int, ...]:
    """Tokens, top-k, experts, hidden and inner size of a layer."""
    match = SHAPE.match(row["case"])
    assert match is not None, row["case"]
    return tuple(map(int, match.groups()))


def ratio_to(times: Case, impl: str, own: str) -> str:
    """The time of `impl` as a multiple of that of `own`."""
    return f"{times[impl] / times[own]:.2f}x" if {impl, own} <= set(times) else "-"


def floor_rates(rows: Sequence[Row]) -> str:
    """The rates behind the floor.  At 256 tokens it is the reading of every expert's weights."""
    reading, computing = [0.0], [0.0]
    for row, times in cases_of(rows, "experts"):
        tokens, top_k, experts, hidden, inner = shape_of(row)
        if tokens == 256:
            reading.append(6 * experts * hidden * inner / times["floor"] / 1e6)
        computing.append(6 * tokens * top_k * hidden * inner / times["floor"] / 1e6)
    return f"The floor assumes {max(reading):.2f} TB/s and {max(computing):.0f} TFLOP/s."


def experts_table(rows: Sequence[Row], source: str) -> str:
    lines, before = [], ""
    for row, times in cases_of(rows, "experts"):
        tokens, top_k, experts, hidden, inner = shape_of(row)
        layer = f"{experts}, {top_k}, {hidden}, {inner}"
        spent = [microseconds(times.get(impl)) for impl in ("moealign", VLLM, f"{VLLM}-tuned", HF, "floor")]
        ratios = [ratio_to(times, impl, "moealign") for impl in (VLLM, HF)]
        floor = f"{times['floor'] / times['moealign']:.0%}"
        lines.append([layer if layer != before else "", f"{tokens:,}", *spent, *ratios, floor])
        before = layer
    header = ["E, k, H, I", "tokens", "**moealign**", "vLLM", "tuned", "HF", "floor", "vLLM / ours", "HF / ours",
              "of the floor"]  # fmt: skip
    return f"{caption(rows, 'CUDA graph replay', source)} {floor_rates(rows)}\n\n{markdown(header, lines)}"


def invariance_sentence(rows: Sequence[Row], source: str) -> str:
    """What batch invariance costs a layer without gradients, at one token and from 64 tokens on."""
    ratios: dict[bool, list[float]] = {True: [], False: []}
    where = ""
    for row, times in cases_of(rows, "experts-invariant"):
        tokens = shape_of(row)[0]
        if tokens == 1 or tokens >= 64:
            ratios[tokens == 1].append(times["moealign-invariant"] / times["moealign"])
            where = made_on([row], source).rstrip(".")
    if not where:
        return ""
    return (
        f"With it, a layer takes {span(ratios[True], '.2f')} times as long at one token, and "
        f"{span(ratios[False], '.2f')} times as long from 64 tokens on ({where})."
    )


def train_table(rows: Sequence[Row], source: str) -> str:
    """Milliseconds of a forward and a backward, and their memory."""
    impls = {"moealign": "**moealign**", "moealign-recompute": "recompute", "torch-grouped_mm": "torch",
             "liger-0.8.5": "Liger 0.8.5"}  # fmt: skip
    peaks = {(row["case"], row["impl"]): float(row["peak_mib"]) for row in rows}
    lines = []
    for where, how in (("train", "eager"), ("train-graph", "CUDA graph")):
        for row, times in cases_of(rows, where):
            tokens, top_k, experts, hidden, inner = shape_of(row)
            spent = [f"{times[impl] / 1e3:.2f}" if impl in times else "-" for impl in impls]
            ratios = [ratio_to(times, impl, "moealign") for impl in list(impls)[2:]]
            rate = 18 * tokens * top_k * hidden * inner / times["moealign"] / 1e6
            memory = [peaks.get((row["case"], impl)) for impl in ("moealign", "moealign-recompute", "torch-grouped_mm")]
            kept = [f"{each:,.0f}" if each else "-" for each in memory]
            named = f"{experts}, {top_k}, {hidden}, {inner}"
            lines.append([named, f"{tokens:,}, {how}", *spent, *ratios, f"{rate:,.0f}", *kept])
    header = ["E, k, H, I", "tokens", *impls.values(), "torch / ours", "Liger / ours", "TFLOP/s", "MiB", "recompute",
              "torch"]  # fmt: skip
    title = (
        f"Milliseconds of a forward and a backward, bfloat16, median; {made_on(rows, source)} MiB: the largest memory "
        "of a step, without the gradients of the projections."
    )
    return f"{title}\n\n{markdown(header, lines, 2)}"


def experts_cpu_table(rows: Sequence[Row], source: str) -> str:
    others = {"transformers-eager": "eager loop", HF: "grouped_mm", "transformers-batched_mm": "batched_mm"}
    lines = []
    for row, times in cases_of(rows, "experts-cpu"):
        tokens, top_k, experts, hidden, inner = shape_of(row)
        ratios = [ratio_to(times, impl, "moealign") for impl in others]
        lines.append([f"{experts}, {top_k}, {hidden}, {inner}", row["case"].split()[-1], f"{tokens:,}", *ratios])
    title = f"Time of each implementation over ours, one thread, medians; {made_on(rows, source)}"
    return f"{title}\n\n{markdown(['E, k, H, I', 'dtype', 'tokens', *others.values()], lines, 2)}"


def transformers_table(rows: Sequence[Row], source: str) -> str:
    """Tokens per second of a whole model."""
    impls = {"moealign": "**moealign**", "moealign-routers": "routers too", "grouped_mm": "grouped_mm",
             "batched_mm": "batched_mm"}  # fmt: skip
    lines = []
    for row, times in cases_of(rows, "transformers"):
        kind, named = row["case"].split()[:2]
        tokens = int(named.removeprefix("T"))
        for end, how in (("", "eager"), ("-graph", "CUDA graph")):
            spent = [times.get(impl + end) for impl in impls]
            if any(spent):
                rates = [f"{tokens / us * 1e6:,.0f}" if us else "-" for us in spent]
                gain = ratio_to(times, f"grouped_mm{end}", f"moealign{end}")
                lines.append([f"{kind}, {tokens:,} token{'s' * (tokens > 1)}, {how}", *rates, gain])
    shape = " ".join(rows[0]["case"].split()[2:])
    title = f"Tokens per second, {shape}, wall time, median; {made_on(rows, source)}"
    return f"{title}\n\n{markdown(['step', *impls.values(), 'ours / grouped_mm'], lines)}"


CHAIN = ("moealign-cuda", "moealign-cuda-align", "moealign-cuda-apart", "moealign-triton", VLLM)


def routing_table(rows: Sequence[Row], source: str) -> str:
    """A table for each kind of router and dtype of the logits."""
    header = ["tokens x top-k, experts, block", "**moealign**", "its alignment alone", "two plain launches",
              "moealign, Triton", "vLLM's chain", "vLLM / ours", "ours / alignment"]  # fmt: skip
    tables: dict[str, list[list[str]]] = {}
    for bench, router in (("routing", "Softmax"), ("routing-grouped", "Sigmoid with a bias and groups")):
        for row, times in cases_of(rows, bench):
            spent = [microseconds(times.get(impl)) for impl in CHAIN]
            ratios = [ratio_to(times, VLLM, CHAIN[0]), ratio_to(times, CHAIN[0], CHAIN[1])]
            table = tables.setdefault(f"{router}, {row['case'].split()[-1]} logits:", [])
            table.append([sizes_of(row), *spent, *ratios])
    parts = [f"{title}\n\n{markdown(header, lines)}" for title, lines in tables.items()]
    return "\n\n".join([caption(rows, "CUDA graph replay", source), *parts])


#: Routers of the bench `routing-options`: what is added to the name of the first, and the column.
ROUTERS = {
    "bias": "bias",
    "bias-groups": "bias, groups",
    "sqrtsoftplus": "sqrtsoftplus",
    "sqrtsoftplus-bias": "sqrtsoftplus, bias",
    "expert-scale": "factors",
    "shared-expert": "shared expert",
    "replay": "replay",
}


def routing_options_table(rows: Sequence[Row], source: str) -> str:
    """The time of softmax, and of each other router as a multiple of it."""
    lines = []
    for row, times in cases_of(rows, "routing-options"):
        shared = {impl: us / times[CHAIN[0]] for impl, us in times.items()}
        ratios = [shared.get(f"{CHAIN[0]}-{name}") for name in ROUTERS]
        lines.append(
            [sizes_of(row), microseconds(times[CHAIN[0]]), *(f"{each:.2f}x" if each else "-" for each in ratios)]
        )
    header = ["tokens x top-k, experts, block", "softmax", *ROUTERS.values()]
    return f"{caption(rows, 'CUDA graph replay', source)} Float32 logits.\n\n{markdown(header, lines)}"


def routing_cpu_table(rows: Sequence[Row], source: str) -> str:
    """`route` and the same steps in torch, on one thread and two."""
    lines = []
    for row, times in cases_of(rows, "routing-cpu"):
        spent = [microseconds(times.get(impl)) for impl in ("moealign-cpu", "torch", "moealign-cpu-2t", "torch-2t")]
        ratios = [ratio_to(times, f"torch{end}", f"moealign-cpu{end}") for end in ("", "-2t")]
        tokens = int(row["routes"]) // int(row["top_k"])
        named = f"{row['case'].split()[0]}, {row['top_k']} of {row['num_experts']}"
        lines.append([named, f"{tokens:,}", *spent[:2], ratios[0], *spent[2:], ratios[1]])
    header = ["router", "tokens", "**moealign**", "torch", "torch / ours", "two threads", "torch, two threads",
              "torch / ours"]  # fmt: skip
    return f"{caption(rows, 'wall time, layout included', source)}\n\n{markdown(header, lines)}"


def plugins_table(rows: Sequence[Row], source: str) -> str:
    """The time of vLLM's functions over that of ours: minimum and maximum over all sizes."""
    lines = []
    for bench, name in (("align", "alignment"), ("lora", "alignment with LoRA"), ("layer", "fused layer")):
        cells = []
        for where in (f"plugin-{bench}", f"plugin-{bench}-host"):
            ratios = sorted(t[VLLM] / t["moealign"] for _, t in cases_of(rows, where) if {VLLM, "moealign"} <= set(t))
            ends = dict.fromkeys(f"{ratio:.2f}x" for ratio in ratios[:1] + ratios[-1:])
            cells.append(" to ".join(ends) or "-")
        lines.append([name, *cells])
    title = f"Time of vLLM's function over ours, minimum to maximum over the sizes; {made_on(rows, source)}"
    return f"{title}\n\n{markdown(['vLLM / ours', 'on the device, CUDA graph', 'host time of an eager call'], lines)}"


#: What a user sets, what it replaces, and what it leaves alone; the gain is in between.
ENGINE_MODES = [
    ("`MOEALIGN_VLLM=1`", "the alignment of routes, in every layer that calls it",
     "routers, products, and layers that skip the alignment"),
    ("`MOEALIGN_VLLM=layer`", "the alignment, and whole layers of bfloat16, float16 and FP8 experts: `fused_moe`",
     "routers, all-to-all, shared experts, reductions; [other layers](#whole-layers)"),
    ("`MOEALIGN_SGLANG=1`", "the alignment, that of one token in Marlin layers included", "as for vLLM"),
    ("`MOEALIGN_SGLANG=layer`", "the alignment, and whole layers as for vLLM", "as for vLLM"),
]  # fmt: skip


def engine_gains(rows: Sequence[Row]) -> list[tuple[Row, float]]:
    """Each layer of vLLM's that was timed, and its time over that of ours."""
    both = ((row, times) for row, times in cases_of(rows, "engine-layer") if {VLLM, "moealign"} <= set(times))
    return [(row, times[VLLM] / times["moealign"]) for row, times in both]


def engines_table(rows: Sequence[Row], source: str) -> str:
    """The modes of the drop-ins; without rows, nothing was measured."""
    gains = [gain for _, gain in engine_gains(rows)]
    layer = "not measured"
    if gains:
        layer = f"layers in {statistics.geometric_mean(gains):.2f}x of vLLM's speed, {span(gains, '.2f')}"
    of = {"`MOEALIGN_VLLM=1`": "[the alignment's share](#performance)", "`MOEALIGN_VLLM=layer`": layer}
    lines = [[name, what, of.get(name, "not measured"), left] for name, what, left in ENGINE_MODES]
    return markdown(["you set", "what is replaced", "what it gains", "what is left alone"], lines, left=4)


def engine_layers_table(rows: Sequence[Row], source: str) -> str:
    """The time of vLLM's layer over that of ours, for each model's shape and number of tokens."""
    found = engine_gains(rows)
    gains = {(shape_of(row)[1:], shape_of(row)[0]): gain for row, gain in found}
    counts = sorted({tokens for _, tokens in gains})
    lines = []
    for shape in dict.fromkeys(shape for shape, _ in gains):
        top_k, experts, hidden, inner = shape
        cells = [f"{gains[shape, count]:.2f}x" if (shape, count) in gains else "-" for count in counts]
        lines.append([f"{experts}, {top_k}, {hidden:,}, {inner:,}", *cells])
    mean = statistics.geometric_mean(gain for _, gain in found)
    title = f"Time of vLLM's layer over ours, geometric mean {mean:.2f}x; {made_on(rows, source)}"
    return f"{title}\n\n{markdown(['experts, top-k, hidden, inner', *(f'{count:,}' for count in counts)], lines)}"


# ---- sentences of the first pages ------------------------------------------------------------------------------------


def span(values: Sequence[float], form: str) -> str:
    """Minimum and maximum of `values`, once if they read the same."""
    return " to ".join(dict.fromkeys(format(value, form) for value in (min(values), max(values))))


def layer_sentence(rows: Sequence[Row], source: str) -> str:
    """The share of the alignment in vLLM's fused layer, and what the drop-in makes of the layer.

    vLLM does not align the smallest batches; their layers count for the second figure only.
    """
    aligned = {
        (int(row["routes"]), int(row["num_experts"])): times[VLLM]
        for row, times in cases_of(rows, "plugin-align")
        if not row["case"].endswith("mapped")
    }
    shares, gains, tokens = [], [], []
    for row, times in cases_of(rows, "plugin-layer"):
        count, _, experts, *_ = shape_of(row)
        gains.append(times[VLLM] / times["moealign"])
        if not naive(int(row["routes"]), experts):
            shares.append(aligned[int(row["routes"]), experts] / times[VLLM])
            tokens.append(count)
    return (
        f"**vLLM**: the alignment takes {span(shares, '.1%')} of a fused layer of {PEERS[VLLM]} at {min(tokens):,} to "
        f"{max(tokens):,} tokens, and the layer runs {span(gains, '.2f')} times as fast with moealign "
        f"{where_and_when(rows)}."
    )


def model_sentence(rows: Sequence[Row], source: str) -> str:
    """Tokens per second of a Transformers model, as a multiple of those with ``grouped_mm``."""
    steps = [times for _, times in cases_of(rows, "transformers")]
    graph, eager = (
        span(
            [times[f"grouped_mm{end}"] / times[f"moealign{end}"] for times in steps if f"moealign{end}" in times], ".2f"
        )
        for end in ("-graph", "")
    )
    return (
        f"**Transformers**: {graph} times the tokens per second of `grouped_mm` when decoding in a CUDA graph, {eager} "
        f"times in eager decoding and prefill {where_and_when(rows)}."
    )


def train_model_sentence(rows: Sequence[Row], source: str) -> str:
    """Tokens per second of a forward and a backward of a Transformers model."""
    for row, times in cases_of(rows, "transformers-train"):
        tokens = int(row["case"].split()[1].removeprefix("T"))
        own, other = (tokens / times[impl] * 1e6 for impl in ("moealign", "grouped_mm"))
        return (
            f"Forward and backward of a Transformers model ({' '.join(row['case'].split()[2:])}), {tokens:,} tokens, "
            f"eager: {own:,.0f} tokens per second, with `grouped_mm` {other:,.0f}, {own / other:.2f}x "
            f"{where_and_when(rows)}."
        )
    return ""


def align_sentence(rows: Sequence[Row], source: str) -> str:
    """The alignment alone against the faster peer, for the fewest and the most routes of 256 experts, top 8."""
    cases = [
        (row, times) for row, times in cases_of(rows, "align") if (row["num_experts"], row["top_k"]) == ("256", "8")
    ]
    cases.sort(key=lambda case: int(case[0]["routes"]))
    parts = []
    for row, times in (cases[0], cases[-1]):
        best = best_peer(times)
        assert best is not None
        own = times["moealign-cuda"]
        parts.append(f"{best / own:.1f} times as fast at {int(row['routes']):,} routes ({microseconds(own)} us)")
    return (
        f"The alignment alone, against the faster of {' and '.join(PEERS.values())}: {' and '.join(parts)} "
        f"{where_and_when(rows)}."
    )


# ---- trials ----------------------------------------------------------------------------------------------------------


def trials_table(rows: Sequence[Row], source: str, part: str) -> str:
    """What was tried in one part of the library."""
    lines = [[row[name] for name in ("idea", "expected", "seen", "kept")] for row in rows if row["part"] == part]
    return f"From `{source}`:\n\n{markdown(['idea', 'expected', 'seen', 'kept'], lines, left=4)}"


def versions_table(rows: Sequence[Row], source: str) -> str:
    """Test results under other releases; tests/commands/versions.py writes the rows."""
    columns = ("name", "python", "torch", "transformers", "triton", "numba", "numpy", "passed", "failed", "skipped")
    lines = [[row[name] for name in columns] for row in rows]
    dates = sorted({row["date"] for row in rows})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"`make test-versions`, {when}; `{source}`.\n\n{markdown(columns, lines)}"
