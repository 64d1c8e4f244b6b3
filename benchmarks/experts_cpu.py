"""Times a whole layer of experts on a CPU: ours, and Transformers' eager loop, grouped_mm and batched_mm.

    PYTHONPATH=src python3 benchmarks/experts_cpu.py [--out benchmarks/results/experts_cpu.csv]

`moealign-grouped_mm` is ours with torch.nn.functional.grouped_mm in place of one torch.mm an expert: what was tried.
Everything is compared with float64 before it is timed; implementations take turns, shuffled; what counts is the ratio.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "src"), str(HERE)]

import align as bench  # noqa: E402  benchmarks/align.py: columns and CSV

from moealign import fused_moe  # noqa: E402
from moealign.experts import packed  # noqa: E402

SHAPES = [(64, 8, 512, 256), (128, 8, 2048, 768)]  # experts, top_k, hidden, inner
TOKENS = [1, 16, 256, 1024]
OURS, GROUPED = "moealign", "moealign-grouped_mm"


def eager(module: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The loop that Transformers' models carry."""
    out = torch.zeros_like(x)
    mask = F.one_hot(ids, num_classes=module.num_experts).permute(2, 1, 0)
    for expert in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero().flatten().tolist():
        choice, token = torch.where(mask[expert])
        gate, up = F.linear(x[token], module.gate_up_proj[expert]).chunk(2, dim=-1)
        rows = F.linear(F.silu(gate) * up, module.down_proj[expert]) * weights[token, choice, None]
        out.index_add_(0, token, rows.to(out.dtype))
    return out


def with_grouped_mm(call: Callable[[], Tensor]) -> Tensor:
    """Ours with torch's own grouped product."""
    original = packed.grouped_mm

    def product(rows: Tensor, weights: Tensor, ends: Tensor, transposed: bool = False) -> Tensor:
        return F.grouped_mm(rows, weights if transposed else weights.transpose(-2, -1), offs=ends)

    packed.grouped_mm = product
    try:
        return call()
    finally:
        packed.grouped_mm = original


def reference(module: Any, x: Tensor, ids: Tensor, weights: Tensor, most: int = 4) -> Tensor:
    inner = module.down_proj.shape[2]
    rows = []
    for token in range(min(most, x.shape[0])):
        total = torch.zeros(x.shape[1], dtype=torch.float64)
        for weight, expert in zip(weights[token].double(), ids[token].tolist(), strict=True):
            h = module.gate_up_proj[expert].double() @ x[token].double()
            total += weight * (module.down_proj[expert].double() @ (F.silu(h[:inner]) * h[inner:]))
        rows.append(total)
    return torch.stack(rows)


def implementations(module: Any, x: Tensor, ids: Tensor, weights: Tensor) -> dict[str, Callable[[], Tensor]]:
    def ours() -> Tensor:
        return fused_moe(x, module.gate_up_proj, module.down_proj, weights, ids)

    calls: dict[str, Callable[[], Tensor]] = {
        OURS: ours,
        GROUPED: lambda: with_grouped_mm(ours),
        "transformers-eager": lambda: eager(module, x, ids, weights),
    }
    try:
        from transformers.integrations import moe
    except ImportError as error:
        bench.say(f"transformers: left out, {error}")
        return calls
    module._apply_gate = types.MethodType(moe._default_apply_gate, module)
    calls["transformers-grouped_mm"] = lambda: moe.grouped_mm_experts_forward(module, x, ids, weights)
    if ids.numel() * module.gate_up_proj[0].numel() < 2**28:  # it copies the weights of every route
        calls["transformers-batched_mm"] = lambda: moe.batched_mm_experts_forward(module, x, ids, weights)
    return calls


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--shapes", default="0,1")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--threads", type=int, default=1, help="of torch; one is steadier where others are at work")
    parser.add_argument("--seconds", type=float, default=0.5, help="spent on one implementation in one case")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "experts_cpu.csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows, wrong = [], []
    order = random.Random(0)
    for shape in (SHAPES[int(one)] for one in args.shapes.split(",")):
        experts, top_k, hidden, inner = shape
        for dtype in (getattr(torch, name) for name in args.dtypes.split(",")):
            generator = torch.Generator().manual_seed(0)
            module = types.SimpleNamespace(
                num_experts=experts, has_gate=True, has_bias=False, is_transposed=False, act_fn=torch.nn.SiLU(),
                _is_expert_parallel=False, has_post_expert_norm=False,
                gate_up_proj=(torch.randn(experts, 2 * inner, hidden, generator=generator) * hidden**-0.5).to(dtype),
                down_proj=(torch.randn(experts, hidden, inner, generator=generator) * inner**-0.5).to(dtype),
            )  # fmt: skip
            for tokens in map(int, args.tokens.split(",")):
                x = torch.randn(tokens, hidden, generator=generator).to(dtype)
                scores, ids = torch.rand(tokens, experts, generator=generator).topk(top_k, 1)
                weights = scores.softmax(1).to(dtype)
                want = reference(module, x, ids, weights)
                calls = implementations(module, x, ids, weights)
                times: dict[str, list[float]] = {}
                with torch.no_grad():
                    for impl, call in calls.items():
                        error = float((call()[: len(want)].double() - want).norm() / want.norm())
                        if error < 1e-2:
                            times[impl] = []
                        else:
                            wrong.append(f"WRONG {shape} {dtype} {tokens} {impl}: {error:.3g}")
                    end = time.perf_counter() + args.seconds * len(times)
                    while time.perf_counter() < end or len(next(iter(times.values()))) < 3:
                        for impl in order.sample(list(times), len(times)):  # nobody always finds another's caches
                            start = time.perf_counter()
                            calls[impl]()
                            times[impl].append((time.perf_counter() - start) * 1e6)
                name = str(dtype).removeprefix("torch.")
                case = f"T{tokens}-k{top_k}-E{experts}-H{hidden}-I{inner} {name}"
                for impl, each in times.items():
                    size = (tokens, top_k, experts, 1)
                    rows.append(bench.row_of("experts-cpu", case, tokens * top_k, size, impl, each, "cpu", 1))
                mine = statistics.median(times[OURS])
                said = ", ".join(
                    f"{impl} {statistics.median(each) / mine:.2f} ({min(each) / min(times[OURS]):.2f})"
                    for impl, each in times.items()
                )
                bench.say(f"{case}: {mine:,.0f} us; over ours, medians (and least): {said}")
    bench.write_csv(rows, args.out)
    for line in wrong:
        bench.say(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
