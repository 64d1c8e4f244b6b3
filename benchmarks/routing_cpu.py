"""Times routers on a CPU: `route`, and the same steps in torch with our alignment behind them.

    PYTHONPATH=src python3 benchmarks/routing_cpu.py [--out benchmarks/results/routing_cpu.csv]

Float32 logits, layout included.  Both are compared before they are timed; they take turns, shuffled; on one thread and
on two (`-2t`).  What counts is the ratio.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "src"), str(HERE)]

import align as bench  # noqa: E402  benchmarks/align.py: columns and CSV

import moealign  # noqa: E402

BLOCK = 64
TOKENS = (1, 32, 512, 4096, 16_384)
GROUPED = {"scoring": "sigmoid", "num_groups": 8, "topk_groups": 4, "scale": 2.5}
#: By model: experts, top_k, arguments of `route`.
ROUTERS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "Qwen3-MoE": (128, 8, {}),
    "OLMoE": (64, 8, {"renormalize": False}),
    "DeepSeek-V3": (256, 8, GROUPED),
}
OURS, TORCH = "moealign-cpu", "torch"

Routed = tuple[Tensor, Tensor]  # weights, ids
Router = Callable[[], Routed]


class Case(NamedTuple):
    router: str
    logits: Tensor
    bias: Tensor | None


def ours(case: Case) -> Routed:
    _, top_k, options = ROUTERS[case.router]
    found: Routed = moealign.route(case.logits, top_k, block_size=BLOCK, correction_bias=case.bias, **options)[:2]
    return found


def in_torch(case: Case) -> Routed:
    """The steps of the models' own routers."""
    experts, top_k, options = ROUTERS[case.router]
    if case.bias is None:
        weights, ids = torch.softmax(case.logits, 1).topk(top_k, 1)
    else:
        scores = torch.sigmoid(case.logits)
        choice = scores + case.bias
        groups = choice.view(len(choice), options["num_groups"], -1).topk(2, 2).values.sum(2)
        best = groups.topk(options["topk_groups"], 1).indices
        allowed = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best, True)
        allowed = allowed.repeat_interleave(experts // options["num_groups"], 1)
        ids = choice.masked_fill(~allowed, -torch.inf).topk(top_k, 1).indices
        weights = scores.gather(1, ids)
    if options.get("renormalize", True):
        weights = weights / weights.sum(1, keepdim=True)
    weights = weights * options.get("scale", 1.0)
    moealign.align(ids, block_size=BLOCK, num_experts=experts)
    return weights, ids


def with_threads(count: int, call: Callable[[Case], Routed], case: Case) -> Router:
    def run() -> Routed:
        if torch.get_num_threads() != count:
            torch.set_num_threads(count)
        os.environ["MOEALIGN_NUM_THREADS"] = str(count)
        return call(case)

    return run


def alike(one: Routed, other: Routed) -> bool:
    return torch.equal(one[1].long(), other[1].long()) and torch.allclose(one[0], other[0], rtol=1e-5, atol=1e-7)


def measure(calls: dict[str, Router], seconds: float, order: random.Random) -> dict[str, list[float]]:
    """Microseconds of a call, by implementation; a turn of short calls is a hundred."""
    turns = {}
    for impl, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        turns[impl] = max(1, min(100, int(2e-3 / (time.perf_counter() - start))))
    times: dict[str, list[float]] = {impl: [] for impl in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[OURS]) < 7:
        for impl in order.sample(list(calls), len(calls)):
            calls[impl]()  # the threads are set, the caches warm
            start = time.perf_counter()
            for _ in range(turns[impl]):
                calls[impl]()
            times[impl].append((time.perf_counter() - start) * 1e6 / turns[impl])
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--seconds", type=float, default=4.0, help="for each case")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "routing_cpu.csv")
    args = parser.parse_args()
    rows, wrong = [], []
    order, generator = random.Random(0), torch.Generator().manual_seed(0)
    for router, (experts, top_k, options) in ROUTERS.items():
        for tokens in map(int, args.tokens.split(",")):
            bias = torch.randn(experts, generator=generator) * 0.1 if "num_groups" in options else None
            case = Case(router, torch.randn(tokens, experts, generator=generator), bias)
            calls = {
                name + end: with_threads(count, call, case)
                for name, call in ((OURS, ours), (TORCH, in_torch))
                for end, count in (("", 1), ("-2t", 2))
            }
            want = calls[TORCH]()
            wrong += [f"WRONG {router} {tokens} {impl}" for impl, call in calls.items() if not alike(call(), want)]
            times = measure(calls, args.seconds, order)
            for impl, each in times.items():
                size = (tokens, top_k, experts, BLOCK)
                rows.append(
                    bench.row_of("routing-cpu", f"{router} float32", tokens * top_k, size, impl, each, "cpu", 1)
                )
            said = ", ".join(f"{impl} {statistics.median(each):,.0f}" for impl, each in times.items())
            bench.say(f"{router}, {tokens:,} tokens, us: {said}")
    bench.write_csv(rows, args.out)
    for line in wrong:
        bench.say(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
