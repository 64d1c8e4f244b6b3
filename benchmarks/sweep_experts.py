"""Try many tiles for both products of a layer, print the best: what the rules in backends/triton/experts.py are from.

    PYTHONPATH=src python3 benchmarks/sweep_experts.py [--shape 0,1,2] [--tokens 1,16,...] [--top 3] [--budget 100]

Compiles first, in as many processes as there are cores; then each product alone, in graph replay over several inputs,
so that no weights are left in L2 from the call before.  A tile whose result differs from torch's is reported.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from moealign import align
from moealign.experts import launch as rules
from moealign.experts.launch import Plan, Target, Tile
from moealign.experts.layer import fused_moe
from moealign.layout import BlockLayout, capacity

SHAPES = [(128, 8, 2048, 768), (8, 2, 4096, 14336), (256, 8, 7168, 1024)]  # experts, top_k, hidden, inner
TOKENS = [1, 16, 64, 256, 1024, 4096]
SHARED = 227 * 1024
SLOTS = 6
FEW = 24  # rows an expert up to which whole layers are tried, and from which on each product by itself


def fits(tile: Tile, gated: bool) -> bool:
    room = (tile.m * tile.k + tile.n * tile.k * (2 if gated else 1)) * 2 * tile.stages
    accumulators = tile.m * tile.n * (2 if gated else 1) / (32 * tile.warps)
    return room <= SHARED - 4096 and accumulators <= 160


def candidates(routes: int, experts: int, gated: bool) -> list[Tile]:
    """Tiles worth a try for so many rows an expert, each product by itself."""
    rows = routes / min(experts, routes)
    found: list[Tile] = []
    if rows <= 48:
        for m, n, k, stages in product((16, 32, 64), (64, 128), (64, 128), (3, 4)):
            if 0.5 * rows <= m <= 4 * rows:
                found.append(Tile(m, n, k, 2, 4, stages, 1, 0, 1))
                found.append(Tile(m, n, k, 2, 4, stages, 2 if m == 64 else 0))
    if rows > 24:
        for group, ctas, short in product((2, 8), (0, 1), (0, 64)):
            if group == 8 and rows < 200:
                continue
            for stages in (3, 4):
                if gated:
                    found.append(Tile(128, 128, 64, group, 8, stages, 1, ctas, 0, short))
                else:
                    found.append(Tile(128, 256, 64, group, 8, stages, 2, ctas, 0, short))
                    found.append(Tile(128, 128, 64, group, 8, stages, 2, ctas, 0, short))
            if not gated:
                found.append(Tile(128, 128, 64, group, 4, 3, 2, ctas, 0, short))
            if rows < 200 and not short:
                for n, warps in ((128, 4), (128, 8), (64, 4)) if gated else ((256, 8), (128, 4), (256, 4)):
                    found.append(Tile(64, n, 64, group, warps, 4 if n < 256 else 3, 1 if gated else 2, ctas))
    return [tile for tile in dict.fromkeys(found) if fits(tile, gated)]


def plans(shape: tuple[int, ...], tokens: int) -> list[Plan]:
    """Whole layers worth a try for a few tokens."""
    routes = tokens * shape[1]
    found = []
    if routes * rules.ALONE <= shape[0]:
        firsts = [
            Tile(16, 64, 128, 1, 4, 4),
            Tile(16, 64, 128, 1, 4, 4, 1, 0, 1),
            Tile(16, 32, 128, 1, 4, 4),
            Tile(16, 32, 256, 1, 4, 3),
            Tile(16, 16, 256, 1, 4, 4),
        ]
        seconds = [
            Tile(16, 64, 128, 1, 4, 3),
            Tile(16, 64, 128, 1, 4, 6, 1, 0, 1),
            Tile(16, 32, 128, 1, 4, 4),
            Tile(16, 32, 256, 1, 4, 3),
            Tile(16, 128, 128, 1, 4, 3),
        ]
        found += [Plan(0, firsts[0], two) for two in seconds]
        found += [Plan(0, one, seconds[0]) for one in firsts[1:]]
        found.append(Plan(16, firsts[0], seconds[0]))
        return found
    rows = routes / shape[0]
    for m in (16, 32, 64):
        if not 0.5 * rows <= m <= max(16, 6 * rows):
            continue
        firsts = [Tile(m, 64, 128, 2, 4, 3, 1, 0, 1), Tile(m, 128, 64, 2, 4, 4, 1, 0, 1), Tile(m, 64, 64, 2, 4, 4)]
        seconds = [Tile(m, 128, 128, 2, 4, 3, 1, 0, 1), Tile(m, 128, 64, 2, 4, 3, 1, 0, 1), Tile(m, 128, 128, 1, 4, 3)]
        found += [Plan(m, one, two) for one, two in zip(firsts, seconds, strict=True)]
        found.append(Plan(m, firsts[0], seconds[2]))
    return found


def safe(tile: Tile) -> Tile:
    """A tile for the product before the one that is timed."""
    return Tile(tile.m, 64, 64, 1, 4, 2)


def made(
    shape: tuple[int, ...], tokens: int, tile: Tile, device: str, which: int = 0
) -> tuple[Plan, dict[str, torch.Tensor]]:
    """A plan whose two products both have `tile`, and uninitialised tensors of the right kinds."""
    experts, top_k, hidden, inner = shape
    alone = tokens * top_k * rules.ALONE <= experts
    how = Plan(0 if alone else tile.m, safe(tile), tile, 0) if which else Plan(0 if alone else tile.m, tile, tile)
    empty = lambda *size, dtype=torch.bfloat16: torch.empty(size, dtype=dtype, device=device)  # noqa: E731
    tensors = {
        "hidden_states": empty(tokens, hidden),
        "gate_up_proj": empty(experts, 2 * inner, hidden),
        "down_proj": empty(experts, hidden, inner),
        "topk_weights": empty(tokens, top_k, dtype=torch.float32),
        "topk_ids": empty(tokens, top_k, dtype=torch.int32),
    }
    return how, tensors


def empty_layout(tokens: int, top_k: int, experts: int, size: int) -> BlockLayout:
    sizes = capacity(tokens * top_k, block_size=size, num_experts=experts)
    new = lambda count: torch.empty(count, dtype=torch.int32)  # noqa: E731
    return BlockLayout(
        new(sizes.sorted_token_ids), new(sizes.expert_ids), new(1), positions=new(tokens * top_k), block_size=size
    )


def warm(job: tuple[tuple[int, ...], int, Any, int, Target]) -> str | None:
    """In a process of its own: compile one product, or a whole plan, into Triton's cache."""
    shape, tokens, tile, which, target = job
    torch.set_num_threads(1)
    try:
        from moealign.experts import kernels as gemm

        if isinstance(tile, Plan):
            how, tensors = tile, made(shape, tokens, tile.first, "cpu")[1]
        else:
            how, tensors = made(shape, tokens, tile, "cpu", which)
        layout = empty_layout(tokens, shape[1], shape[0], how.first.m) if how.block_size else None
        planned, _ = rules.launches(
            how,
            *tensors.values(),
            layout,
            "silu",
            None,
            None,
            False,
            target,  # type: ignore[arg-type]
        )
        for one in planned if which < 0 else planned[which : which + 1]:
            options: dict[str, Any] = {"num_warps": one.num_warps, "num_stages": one.num_stages}
            if one.pdl:
                options["launch_pdl"] = True
            getattr(gemm, one.kernel).warmup(*one.arguments, **one.constants, **options, grid=one.grid)
    except Exception as error:
        return f"{tile}: {type(error).__name__}: {str(error)[-120:]}"
    return None


def timed(calls: list[Any], least_us: float = 2000.0) -> float:
    """Median microseconds a call in graph replay, the calls taking turns."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    spent = 0.0
    while len(times) < 3 or (spent < least_us and len(times) < 20):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
        spent += times[-1]
    return statistics.median(times) / len(calls)


def inputs_of(shape: tuple[int, ...], tokens: int) -> list[tuple[torch.Tensor, ...]]:
    experts, top_k, hidden, _ = shape
    generator = torch.Generator("cuda").manual_seed(tokens)
    inputs = []
    for _ in range(SLOTS if tokens <= 256 else 2):
        x = torch.randn(tokens, hidden, generator=generator, device="cuda").to(torch.bfloat16)
        values, ids = torch.rand(tokens, experts, generator=generator, device="cuda").topk(top_k, 1)
        inputs.append((x, values.softmax(1), ids.to(torch.int32)))
    return inputs


def sweep_plans(
    shape: tuple[int, ...], tokens: int, args: argparse.Namespace, weights: list[torch.Tensor]
) -> list[Any]:
    inputs = inputs_of(shape, tokens)
    x, w, ids = inputs[0]
    want = fused_moe(x, *weights, w, ids, backend="packed").float()
    found = []
    for how in plans(shape, tokens):
        if time.perf_counter() - args.started > args.budget:
            break

        def call(one: tuple[torch.Tensor, ...], how: Plan = how) -> torch.Tensor:
            x, w, ids = one
            layout = None
            if how.block_size:
                layout = align(ids, block_size=how.block_size, num_experts=shape[0], positions=True)
            return rules.fused_moe(how, x, *weights, w, ids, layout, "silu", None, None, False)

        try:
            wrong = float((call(inputs[0]).float() - want).norm() / want.norm())
            micros = timed([lambda one=one: call(one) for one in inputs])
        except Exception as error:
            print("failed", how, f"{type(error).__name__}: {str(error)[:80]}", flush=True)
            continue
        if not wrong < 1e-2:
            print("WRONG", how, wrong, flush=True)
            continue
        found.append((micros, how))
    found.sort()
    for micros, how in found[: args.top * 4]:
        flat = [how.block_size, list(how.first), list(how.second)]
        print(f"  layer {micros:9.1f} us  {flat}", flush=True)
    return [(-1, how.block_size, micros, how.first) for micros, how in found]


def sweep(shape: tuple[int, ...], tokens: int, args: argparse.Namespace, weights: list[torch.Tensor]) -> list[Any]:
    experts, top_k, hidden, inner = shape
    inputs = inputs_of(shape, tokens)
    results = []
    target = rules.target_of(torch.device("cuda", 0))
    best: dict[tuple[int, int], list[tuple[float, Tile]]] = {}
    for which in (0, 1):
        reference: torch.Tensor | None = None
        layouts = {}
        for tile in candidates(tokens * top_k, experts, which == 0):
            if time.perf_counter() - args.started > args.budget:
                break
            if tile.m not in layouts:
                layouts[tile.m] = [align(i[2], block_size=tile.m, num_experts=experts, positions=True) for i in inputs]
            how = Plan(tile.m, safe(tile), tile) if which else Plan(tile.m, tile, tile)
            calls, outs = [], []
            try:
                for (x, w, ids), layout in zip(inputs, layouts[tile.m], strict=True):
                    planned, _ = rules.launches(how, x, *weights, w, ids, layout, "silu", None, None, False, target)
                    if which == 1:
                        rules._run(planned[:1], x.device)
                    one = planned[which]
                    outs.append(one.arguments[8])
                    calls.append(lambda one=one: rules._run([one], torch.device("cuda", 0)))
                micros = timed(calls)
            except Exception as error:
                print("failed", which, tuple(tile), f"{type(error).__name__}: {str(error)[:80]}", flush=True)
                continue
            out = outs[0]
            if which == 0:
                out = out[layouts[tile.m][0].positions.long()]
            if reference is None:
                reference = out.float()
            wrong = float((out.float() - reference).norm() / reference.norm())
            if not wrong < 5e-3:
                print("WRONG", which, tuple(tile), wrong, flush=True)
                continue
            best.setdefault((which, tile.m), []).append((micros, tile))
    for (which, m), found in sorted(best.items()):
        found.sort()
        flops = 2 * tokens * top_k * hidden * inner * (2 if which == 0 else 1)
        for micros, tile in found[: args.top]:
            results.append((which, m, micros, tile))
            print(
                f"  gemm{which + 1} m{m:<4} {micros:9.1f} us {flops / micros / 1e6:6.0f} TFLOP/s  {list(tile)}",
                flush=True,
            )
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--shape", default="0,1,2")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--top", type=int, default=3)
    parser.add_argument("--budget", type=float, default=100.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.started = time.perf_counter()
    shapes = [SHAPES[int(one)] for one in args.shape.split(",")]
    tokens = [int(one) for one in args.tokens.split(",")]
    target = rules.target_of(torch.device("cuda", 0))
    jobs: dict[Any, Any] = {}
    for shape, count in product(shapes, tokens):
        if count * shape[1] < FEW * shape[0]:
            for how in plans(shape, count):
                jobs[shape[1], how] = (shape, count, how, -1, target)
    for shape, count, which in product(shapes, tokens, (0, 1)):
        if count * shape[1] < FEW * shape[0]:
            continue
        for tile in candidates(count * shape[1], shape[0], which == 0):
            # Sizes are no constants of a kernel beyond what Triton sees in them: one shape compiles for all alike.
            key = (tile, which, shape[1] if which == 0 else 1, shape[2] % tile.k, shape[3] % tile.k)
            jobs.setdefault(key, (shape, count, tile, which, target))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        failed = [said for said in pool.map(warm, jobs.values(), chunksize=4) if said]
    spent = time.perf_counter() - args.started
    print(f"{len(jobs)} kernels compiled in {spent:.0f} s; {len(failed)} failed: {failed[:3]}", flush=True)
    everything = []
    for shape in shapes:
        experts, _, hidden, inner = shape
        generator = torch.Generator("cuda").manual_seed(0)
        weights = [
            (torch.randn(size, generator=generator, device="cuda", dtype=torch.bfloat16) * size[2] ** -0.5)
            for size in ((experts, 2 * inner, hidden), (experts, hidden, inner))
        ]
        for count in tokens:
            print(f"{shape} {count} tokens, at {time.perf_counter() - args.started:.0f} s", flush=True)
            mode = sweep_plans if count * shape[1] < FEW * shape[0] else sweep
            for row in mode(shape, count, args, weights):
                everything.append({"shape": shape, "tokens": count, "gemm": row[0], "us": row[2], "tile": list(row[3])})
        del weights
        torch.cuda.empty_cache()
    if args.out:
        args.out.write_text(json.dumps(everything))
    return 0


if __name__ == "__main__":
    sys.exit(main())
