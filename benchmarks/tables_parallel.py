"""Tables of the measurements of expert parallelism, and the model of more ranks made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from common import SHAPES, Shape
from tables import Case, Row, caption, markdown, shape_of

from moealign.bench import cases_of, microseconds

NODE = 8  # ranks connected by NVLink
NETWORK_GB_S = 50.0  # an assumption: one 400 Gb/s adapter for each GPU
NETWORK_US = 20.0  # an assumption: the latency of a message between nodes
MODEL_RANKS, MODEL_TOKENS = (8, 64, 512), (64, 4096)  # tokens of one rank
LARGEST = SHAPES[2]  # the layer of the model
GOAL = 1.25  # of half the layer of one GPU and the exchange, for a call in a graph
EAGER_GOAL = 900.0  # microseconds of an eager call at 64 tokens
SPARE = 1.25  # room of an exchange of fixed size, of the mean
FORMS = ("", "-tokens", "-direct", "-direct-tokens")  # of an exchange
FP8_BYTES = 0.516  # of the bytes of bfloat16, with a scale for each 128 columns


def sizes(row: Row) -> tuple[str, int]:
    tokens, top_k, experts, hidden, inner = shape_of(row)
    return f"{experts}, {top_k}, {hidden}, {inner}", tokens


def fastest(times: Case, call: str) -> float:
    """Time of the fastest exchange, of the calls `dispatched-graph` or `dispatched-capacity`."""
    return min(times[call + form] for form in FORMS if call + form in times)


def over_half(times: Case) -> float:
    """Time of the fastest exchange in a graph over half the layer of one GPU and both collectives in a graph."""
    return fastest(times, "dispatched-graph") / (times["one-gpu-graph"] / 2 + times["exchange-capacity-graph"])


def layers_of(rows: Sequence[Row]) -> list[tuple[Row, Case]]:
    """The cases with an exchange of fixed size."""
    return [(row, times) for row, times in cases_of(rows, "parallel") if "dispatched-graph" in times]


def measured(cases: list[tuple[Row, Case]], columns: dict[str, str]) -> dict[str, str]:
    """Those of the `columns`, an implementation and its title, that a file has."""
    return {name: title for name, title in columns.items() if any(name in times for _, times in cases)}


def graph_table(rows: Sequence[Row], source: str) -> str:
    """All modes in CUDA graphs."""
    cases, lines = layers_of(rows), []
    extra = measured(
        cases,
        {
            f"dispatched-graph-{SPARE}": f"{SPARE} x mean",
            "dispatched-graph-tokens": "row a token",
            "dispatched-graph-direct": "direct",
            "dispatched-graph-direct-tokens": "direct, row a token",
        },
    )
    names = ("one-gpu-graph", "replicated-graph", "dispatched-graph", *extra)
    for row, times in cases:
        shape, tokens = sizes(row)
        lines.append([
            shape, f"{tokens:,}", *(microseconds(times.get(name)) for name in names),
            f"{over_half(times):.2f}x",
        ])  # fmt: skip
    header = [
        "E, k, H, I",
        "tokens",
        "one GPU",
        "replicated",
        "exchange",
        *extra.values(),
        "fastest / (half + exchange)",
    ]
    return f"{caption(rows, 'CUDA graph replay', source)}\n\n{markdown(header, lines)}"


def eager_table(rows: Sequence[Row], source: str) -> str:
    """All modes called eagerly."""
    cases, lines = layers_of(rows), []
    extra = measured(
        cases,
        {
            "dispatched-capacity-tokens": "row a token",
            "dispatched-capacity-direct": "direct",
            "dispatched-capacity-direct-tokens": "direct, row a token",
        },
    )
    names = ("one-gpu", "replicated", "dispatched", "dispatched-capacity", *extra)
    for row, times in cases:
        shape, tokens = sizes(row)
        ratio = fastest(times, "dispatched-capacity") / times["replicated"]
        lines.append([shape, f"{tokens:,}", *(microseconds(times.get(name)) for name in names), f"{ratio:.2f}x"])
    header = ["E, k, H, I", "tokens", "one GPU", "replicated", "dispatched", "exchange", *extra.values(),
              "fastest / replicated"]  # fmt: skip
    return f"{caption(rows, 'wall time of eager calls after a barrier', source)}\n\n{markdown(header, lines)}"


def exchange_table(rows: Sequence[Row], source: str) -> str:
    """The collectives of the modes alone."""
    cases, lines = layers_of(rows), []
    extra = measured(cases, {"exchange-capacity-tokens-graph": "row a token"})
    names = ("exchange-replicated-graph", "exchange-dispatched-graph", "exchange-capacity-graph", *extra)
    for row, times in cases:
        shape, tokens = sizes(row)
        share = times[names[2]] / times["dispatched-graph"]
        lines.append([shape, f"{tokens:,}", *(microseconds(times.get(name)) for name in names), f"{share:.0%}"])
    header = ["E, k, H, I", "tokens", "all-reduce", "counts and rows", "fixed size", *extra.values(),
              "of the exchange's call"]  # fmt: skip
    return f"{caption(rows, 'CUDA graph replay', source)}\n\n{markdown(header, lines)}"


def goals(rows: Sequence[Row], source: str = "") -> str:
    """Which goals the measurements meet."""
    cases = layers_of(rows)
    ratios = {sizes(row): over_half(times) for row, times in cases}
    missed = {size: ratio for size, ratio in ratios.items() if ratio > GOAL}
    where = ", ".join(f"{ratio:.2f}x at {tokens:,} of {shape}" for (shape, tokens), ratio in missed.items())
    best = [
        (*sizes(row), row["num_experts"], fastest(times, "dispatched-graph") / times["replicated-graph"])
        for row, times in cases
    ]
    faster = [f"{tokens:,} of {shape}" for shape, tokens, _, ratio in best if ratio < 1]
    wins = f"at {', '.join(faster)}" if faster else "at no size"
    large = {tokens: ratio for _, tokens, experts, ratio in best if experts == "128" and tokens >= 1024}
    takes = " and ".join(f"{ratio:.2f}x their time at {tokens:,}" for tokens, ratio in large.items())
    eager = [
        (sizes(row)[0], fastest(times, "dispatched-capacity"), times["one-gpu"])
        for row, times in cases
        if sizes(row)[1] == 64
    ]
    lines = [
        f"- At most {GOAL}x of half the layer of one GPU plus both collectives, in a graph: the fastest exchange meets "
        f"it at {len(ratios) - len(missed)} of {len(ratios)} sizes{'; missed: ' + where if missed else ''}.",
        f"- Faster than replicated tokens from 1,024 tokens on with 128 experts: "
        f"{'missed' if any(ratio >= 1 for ratio in large.values()) else 'met'}; the faster exchange takes {takes}. "
        f"Of all sizes it is faster {wins}.",
        f"- Eager under {EAGER_GOAL:.0f} us at 64 tokens: "
        + "; ".join(f"{time:,.0f} us for {shape} (one GPU {one:,.0f})" for shape, time, one in eager)
        + f": {'met' if all(time < EAGER_GOAL for _, time, _ in eager) else 'missed'}.",
    ]
    return "\n".join(lines)


# ---- more ranks ------------------------------------------------------------------------------------------------------


class Terms(NamedTuple):
    """The measured terms of the model, in microseconds, and bytes or operations a microsecond."""

    latency: float
    reduce_rate: float  # of an all-reduce: bytes sent by one rank
    exchange_rate: float  # of an all-to-all
    memory_rate: float  # of a layer reading its weights
    flop_rate: float


def model_terms(rows: Sequence[Row], shape: Shape) -> Terms:
    experts, top_k, hidden, inner = shape
    collective = {int(row["routes"]): times for row, times in cases_of(rows, "collective")}
    smallest, largest = min(collective), max(collective)  # bytes
    layer = {int(row["routes"]) // top_k: times for row, times in cases_of(rows, "parallel")
             if f"-E{experts}-H{hidden}-I{inner} " in row["case"]}  # fmt: skip
    weights = 3 * experts * hidden * inner * 2
    flops = 6 * 4096 * top_k * hidden * inner
    return Terms(
        latency=max(collective[smallest].values()),
        reduce_rate=largest / collective[largest]["all-reduce"],  # with two ranks, half of the data goes each way
        exchange_rate=largest / 2 / collective[largest]["all-to-all"],
        memory_rate=weights / layer[256]["one-gpu-graph"],
        flop_rate=flops / layer[4096]["one-gpu-graph"],
    )


def parallel_model(rows: Sequence[Row], source: str = "", shape: Shape = LARGEST) -> str:
    """Microseconds of a layer on many ranks, by the equations of docs/parallel.md."""
    experts, top_k, hidden, inner = shape
    terms = model_terms(rows, shape)
    lines = []
    for ranks in MODEL_RANKS:
        nodes = max(ranks // NODE, 1)
        latency = terms.latency + (NETWORK_US if nodes > 1 else 0)
        slots = -(-experts // ranks)
        inside = min(ranks, NODE)

        def one_way(sent: float) -> float:
            """An all-to-all of `sent` bytes of a rank, for all ranks alike."""
            near = sent * (inside - 1) / ranks / terms.exchange_rate  # noqa: B023
            far = sent * (ranks - inside) / ranks / (NETWORK_GB_S * 1e3)  # noqa: B023
            return max(near, far)

        for tokens in MODEL_TOKENS:
            routes = tokens * top_k  # that a rank sends, and receives
            computing = max(
                3 * slots * hidden * inner * 2 / terms.memory_rate, 6 * routes * hidden * inner / terms.flop_rate
            )
            every = tokens * ranks * hidden * 2
            near = (inside - 1) / inside / terms.reduce_rate
            far = (nodes - 1) / nodes / (NETWORK_GB_S * 1e3 * NODE)  # over all adapters of a node
            sent = routes * hidden * 2
            spare = ranks * math.ceil(SPARE * routes / ranks) * hidden * 2
            whole = ranks * tokens * min(top_k, slots) * hidden * 2
            pairs = tokens * (1 - (1 - 1 / ranks) ** top_k)  # to one rank
            room = min(math.ceil(SPARE * pairs), tokens)
            ways: dict[str, float | None] = {
                "replicated": 2 * every * max(near, far) + 2 * latency,
                "dispatched": 2 * one_way(sent) + 3 * latency,
                f"{SPARE} x mean": 2 * one_way(spare) + 2 * latency,
                "row a token": 2 * one_way(ranks * room * hidden * 2) + 2 * latency,
                "direct": 2 * one_way(ranks * pairs * hidden * 2) + 2 * latency if nodes == 1 else None,
                "FP8": (1 + FP8_BYTES) * one_way(spare) + 2 * latency,
                "never full": 2 * one_way(whole) + 2 * latency,
            }
            choices = {name: time for name, time in ways.items() if name != "FP8" and time is not None}
            shown = ("-" if time is None else f"{time:,.0f}" for time in ways.values())
            choice = min(choices, key=choices.__getitem__)
            lines.append([f"{ranks}", f"{tokens:,}", f"{computing:,.0f}", *shown, choice])
    title = (
        f"Terms: latency {terms.latency:.0f} us, all-reduce {terms.reduce_rate / 1e3:.0f} GB/s, all-to-all "
        f"{terms.exchange_rate / 1e3:.0f} GB/s, weights read at {terms.memory_rate / 1e6:.1f} TB/s, "
        f"{terms.flop_rate / 1e6:.0f} TFLOP/s, all of the shape {', '.join(map(str, shape))} or of plain collectives; "
        f"`{source}`. Microseconds; all columns after computing are exchanges."
    )
    header = ["ranks", "tokens per rank", "computing", *ways, "choice"]
    return f"{title}\n\n{markdown(header, lines)}"
