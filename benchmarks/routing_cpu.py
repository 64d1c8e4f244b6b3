"""Times routers on a CPU: `moealign.route`, and the same steps in torch followed by our alignment.

    python benchmarks/routing_cpu.py [--out benchmarks/results/routing_cpu.csv]

Float32 logits, layout included.  The two are compared before they are timed.  They take turns in random order, on one
thread and on two (`-2t`); what counts is the ratio.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import RESULTS, finish, integers
from torch import Tensor

import moealign
from moealign import bench
from moealign.timing import NO_ARGUMENTS, Times, host_in_turns, host_us

BLOCK = 64
TOKENS = [1, 32, 512, 4096, 16_384]
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


def by_moealign(case: Case) -> Routed:
    _, top_k, options = ROUTERS[case.router]
    weights, ids, *_ = moealign.route(case.logits, top_k, block_size=BLOCK, correction_bias=case.bias, **options)
    return weights, ids


def by_torch(case: Case) -> Routed:
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


def close(one: Routed, other: Routed) -> bool:
    return torch.equal(one[1].long(), other[1].long()) and torch.allclose(one[0], other[0], rtol=1e-5, atol=1e-7)


def measure(calls: dict[str, Router], seconds: float, order: random.Random) -> Times:
    """Microseconds of a call; a turn is one call, or up to a hundred short ones."""
    arguments = {}
    for impl, call in calls.items():
        call()
        arguments[impl] = NO_ARGUMENTS * max(1, min(100, int(2e3 / host_us(call))))
    # The call before each turn sets the threads and warms the caches.
    return host_in_turns(calls, arguments, min_turns=7, seconds=seconds, order=order, before=lambda impl: calls[impl]())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--tokens", type=integers, default=TOKENS)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each case")
    parser.add_argument("--out", type=Path, default=RESULTS / "routing_cpu.csv")
    args = parser.parse_args()
    rows, failures = [], []
    order, generator = random.Random(0), torch.Generator().manual_seed(0)
    for router, (experts, top_k, options) in ROUTERS.items():
        for tokens in args.tokens:
            bias = torch.randn(experts, generator=generator) * 0.1 if "num_groups" in options else None
            case = Case(router, torch.randn(tokens, experts, generator=generator), bias)
            calls = {
                name + suffix: with_threads(count, call, case)
                for name, call in ((OURS, by_moealign), (TORCH, by_torch))
                for suffix, count in (("", 1), ("-2t", 2))
            }
            expected = calls[TORCH]()
            failures += [
                f"WRONG {router} {tokens} {impl}" for impl, call in calls.items() if not close(call(), expected)
            ]
            times = measure(calls, args.seconds, order)
            for impl, each in times.items():
                size = (tokens, top_k, experts, BLOCK)
                rows.append(
                    bench.row_of("routing-cpu", f"{router} float32", tokens * top_k, size, impl, each, "cpu", 1)
                )
            medians = ", ".join(f"{impl} {statistics.median(each):,.0f}" for impl, each in times.items())
            bench.log(f"{router}, {tokens:,} tokens, us: {medians}")
    return finish(rows, failures, args.out)


if __name__ == "__main__":
    sys.exit(main())
