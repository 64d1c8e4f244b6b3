"""Times a whole layer of experts on a CPU: moealign, and Transformers' eager loop, grouped_mm and batched_mm.

    python benchmarks/experts_cpu.py [--out benchmarks/results/experts_cpu.csv]

`moealign-grouped_mm` is moealign with torch.nn.functional.grouped_mm in place of one torch.mm for each expert.
Every implementation is compared with float64 before it is timed.  They take turns in random order; what counts is
the ratio.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Shape, finish, float64_rows, integers, layer_name, relative_error
from torch import Tensor
from torch.nn import functional as F

from moealign import bench, fused_moe
from moealign.experts import packed
from moealign.timing import NO_ARGUMENTS, host_in_turns

SHAPES: list[Shape] = [(64, 8, 512, 256), (128, 8, 2048, 768)]
TOKENS = [1, 16, 256, 1024]
OURS, GROUPED = "moealign", "moealign-grouped_mm"


def eager(module: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The loop in Transformers' models."""
    out = torch.zeros_like(x)
    mask = F.one_hot(ids, num_classes=module.num_experts).permute(2, 1, 0)
    for expert in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero().flatten().tolist():
        choice, token = torch.where(mask[expert])
        gate, up = F.linear(x[token], module.gate_up_proj[expert]).chunk(2, dim=-1)
        rows = F.linear(F.silu(gate) * up, module.down_proj[expert]) * weights[token, choice, None]
        out.index_add_(0, token, rows.to(out.dtype))
    return out


def with_grouped_mm(call: Callable[[], Tensor]) -> Tensor:
    """`call` with torch's grouped product in place of ours."""
    original = packed.grouped_mm

    def product(rows: Tensor, weights: Tensor, ends: Tensor, transposed: bool = False) -> Tensor:
        return F.grouped_mm(rows, weights if transposed else weights.transpose(-2, -1), offs=ends)

    packed.grouped_mm = product
    try:
        return call()
    finally:
        packed.grouped_mm = original


def implementations(module: Any, x: Tensor, ids: Tensor, weights: Tensor) -> dict[str, Callable[[], Tensor]]:
    def moealign() -> Tensor:
        return fused_moe(x, module.gate_up_proj, module.down_proj, weights, ids)

    calls: dict[str, Callable[[], Tensor]] = {
        OURS: moealign,
        GROUPED: lambda: with_grouped_mm(moealign),
        "transformers-eager": lambda: eager(module, x, ids, weights),
    }
    try:
        from transformers.integrations import moe
    except ImportError as error:
        bench.log(f"transformers: left out, {error}")
        return calls
    module._apply_gate = types.MethodType(moe._default_apply_gate, module)
    calls["transformers-grouped_mm"] = lambda: moe.grouped_mm_experts_forward(module, x, ids, weights)
    if ids.numel() * module.gate_up_proj[0].numel() < 2**28:  # it copies the weights of every route
        calls["transformers-batched_mm"] = lambda: moe.batched_mm_experts_forward(module, x, ids, weights)
    return calls


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--shapes", type=integers, default=[0, 1])
    parser.add_argument("--tokens", type=integers, default=TOKENS)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--threads", type=int, default=1, help="of torch; one is steadier on a shared machine")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each implementation in each case")
    parser.add_argument("--out", type=Path, default=RESULTS / "experts_cpu.csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows, failures = [], []
    order = random.Random(0)
    for shape in (SHAPES[index] for index in args.shapes):
        experts, top_k, hidden, inner = shape
        for name in args.dtypes.split(","):
            dtype = getattr(torch, name)
            generator = torch.Generator().manual_seed(0)
            module = types.SimpleNamespace(
                num_experts=experts, has_gate=True, has_bias=False, is_transposed=False, act_fn=torch.nn.SiLU(),
                _is_expert_parallel=False, has_post_expert_norm=False,
                gate_up_proj=(torch.randn(experts, 2 * inner, hidden, generator=generator) * hidden**-0.5).to(dtype),
                down_proj=(torch.randn(experts, hidden, inner, generator=generator) * inner**-0.5).to(dtype),
            )  # fmt: skip
            for tokens in args.tokens:
                x = torch.randn(tokens, hidden, generator=generator).to(dtype)
                scores, ids = torch.rand(tokens, experts, generator=generator).topk(top_k, 1)
                weights = scores.softmax(1).to(dtype)
                some = range(min(4, tokens))
                expected = float64_rows(some, x, module.gate_up_proj, module.down_proj, weights, ids)
                right = {}
                with torch.no_grad():
                    for impl, call in implementations(module, x, ids, weights).items():
                        error = relative_error(call()[: len(some)], expected)
                        if error < 1e-2:
                            right[impl] = call
                        else:
                            failures.append(f"WRONG {shape} {dtype} {tokens} {impl}: {error:.3g}")
                    times = host_in_turns(
                        right,
                        dict.fromkeys(right, NO_ARGUMENTS),
                        min_turns=3,
                        seconds=args.seconds * len(right),
                        order=order,
                    )
                case = f"{layer_name(shape, tokens)} {name}"
                for impl, each in times.items():
                    size = (tokens, top_k, experts, 1)
                    rows.append(bench.row_of("experts-cpu", case, tokens * top_k, size, impl, each, "cpu", 1))
                median, least = statistics.median(times[OURS]), min(times[OURS])
                ratios = ", ".join(
                    f"{impl} {statistics.median(each) / median:.2f} ({min(each) / least:.2f})"
                    for impl, each in times.items()
                )
                bench.log(f"{case}: {median:,.0f} us; over ours, medians (and minima): {ratios}")
    return finish(rows, failures, args.out)


if __name__ == "__main__":
    sys.exit(main())
