"""Times many tiles for both products of a layer and prints the best: the source of the rules for the experts' tiles.

    python benchmarks/sweep_experts.py [--shape 0,1,2] [--tokens 1,16,...] [--top 3] [--budget 100] [--fp8]

Compiles first, in as many processes as there are cores.  Then times each product alone, in graph replay over several
inputs, so that L2 holds no weights from the call before.  A tile whose result differs from torch's is reported.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import (
    SHAPES,
    TOKENS,
    Shape,
    compile_launches,
    empty_layout,
    empty_quantized,
    in_blocks,
    in_processes,
    integers,
    random_inputs,
    random_weights,
    relative_error,
)

from moealign import align
from moealign.experts import launch
from moealign.experts.layer import fused_moe
from moealign.experts.records import ExpertWeights, Routes
from moealign.experts.tiles import NO_LAYOUT_EXPERTS_PER_ROUTE, LayerTiles, Target, Tile, target_of
from moealign.timing import graph_us

SHARED_MEMORY = 227 * 1024  # bytes
#: Relative errors that are accepted, in bfloat16 and FP8; there the paths round activated rows apart.
MAX_ERROR = (1e-2, 3e-2)
FEW = 24  # rows an expert below which whole layers are timed, and from which each product by itself


def fits(tile: Tile, gated: bool, fp8: bool) -> bool:
    memory = (tile.m * tile.k + tile.n * tile.k * (2 if gated else 1)) * (1 if fp8 else 2) * tile.stages
    accumulators = tile.m * tile.n * ((2 if gated else 1) + fp8) / (32 * tile.warps)  # one more for a step's sum
    most = 160 if tile.warps <= 8 else 104
    return memory <= SHARED_MEMORY - 4096 and accumulators <= most


def tiles_for(routes: int, experts: int, gated: bool, fp8: bool) -> list[Tile]:
    """Tiles worth timing for `routes` routes, for one product."""
    rows = routes / min(experts, routes)
    tiles: list[Tile] = []
    if fp8:
        for m, n, stages in product((16, 32, 64), (64, 128), (3, 4, 6)):
            if 0.5 * rows <= m <= max(16, 4 * rows):
                tiles.append(Tile(m, n, 128, 2, 4, stages, 1, 0, 1))
                if m == 64:
                    tiles.append(Tile(m, n, 128, 2, 4, stages, 1 if gated else 2))
        if rows > 24:
            by_tma, group = 1 if gated else 2, 8 if rows >= 200 else 2
            for m, ctas in product((64, 128), (0, 1, 2)):
                for n, warps, stages in product((64, 128), (4, 8), (3, 4, 5)):
                    tiles.append(Tile(m, n, 128, group, warps, stages, by_tma, ctas))
            if rows < 200:
                tiles += [Tile(128, n, 128, group, 8, stages, by_tma, 0, 0, 64) for n in (64, 128) for stages in (3, 4)]
        return [tile for tile in dict.fromkeys(tiles) if fits(tile, gated, fp8)]
    if rows <= 48:
        for m, n, k, stages in product((16, 32, 64), (64, 128), (64, 128), (3, 4)):
            if 0.5 * rows <= m <= 4 * rows:
                tiles.append(Tile(m, n, k, 2, 4, stages, 1, 0, 1))
                tiles.append(Tile(m, n, k, 2, 4, stages, 2 if m == 64 else 0))
    if rows > 24:
        for group, ctas, half in product((2, 8), (0, 1), (0, 64)):
            if group == 8 and rows < 200:
                continue
            for stages in (3, 4):
                if gated:
                    tiles.append(Tile(128, 128, 64, group, 8, stages, 1, ctas, 0, half))
                else:
                    tiles.append(Tile(128, 256, 64, group, 8, stages, 2, ctas, 0, half))
                    tiles.append(Tile(128, 128, 64, group, 8, stages, 2, ctas, 0, half))
            if not gated:
                tiles.append(Tile(128, 128, 64, group, 4, 3, 2, ctas, 0, half))
            # Two programs a multiprocessor: one's products beside the other's first loads and last stores.
            n, by_tma = (64, 1) if gated else (128, 2)
            for shared, warps in product((1, 2, 4) if rows < 200 else (4, 8), (4, 8)):
                tiles.append(Tile(128, n, 64, shared, warps, 3, by_tma, 2 * ctas, 0, half))
            if rows < 200 and not half:
                for n, warps in ((128, 4), (128, 8), (64, 4)) if gated else ((256, 8), (128, 4), (256, 4)):
                    tiles.append(Tile(64, n, 64, group, warps, 4 if n < 256 else 3, 1 if gated else 2, ctas))
    return [tile for tile in dict.fromkeys(tiles) if fits(tile, gated, fp8)]


def plans(shape: Shape, tokens: int, fp8: bool) -> list[LayerTiles]:
    """Whole layers worth timing for a few tokens."""
    routes = tokens * shape[1]
    chosen = []
    if fp8:
        alone = routes * NO_LAYOUT_EXPERTS_PER_ROUTE <= shape[0]
        for m in (16, 32, 64):
            if m != 16 and (alone or not 0.5 * routes / shape[0] <= m <= 6 * routes / shape[0]):
                continue
            for n, stages in ((32, 6), (64, 3), (64, 4), (64, 6), (128, 3), (128, 4)):
                if m == 16 or n >= 64:
                    one = Tile(m, n, 128, 1 if alone else 2, 4, stages, 1, 0, int(n >= 64))
                    chosen.append(LayerTiles(0 if alone else m, one, one))
            chosen.append(LayerTiles(0 if alone else m, chosen[-4].first, chosen[-1].first))
        return chosen
    if routes * NO_LAYOUT_EXPERTS_PER_ROUTE <= shape[0]:
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
        chosen += [LayerTiles(0, firsts[0], two) for two in seconds]
        chosen += [LayerTiles(0, one, seconds[0]) for one in firsts[1:]]
        chosen.append(LayerTiles(16, firsts[0], seconds[0]))
        return chosen
    rows = routes / shape[0]
    for m in (16, 32, 64):
        if not 0.5 * rows <= m <= max(16, 6 * rows):
            continue
        firsts = [Tile(m, 64, 128, 2, 4, 3, 1, 0, 1), Tile(m, 128, 64, 2, 4, 4, 1, 0, 1), Tile(m, 64, 64, 2, 4, 4)]
        seconds = [Tile(m, 128, 128, 2, 4, 3, 1, 0, 1), Tile(m, 128, 64, 2, 4, 3, 1, 0, 1), Tile(m, 128, 128, 1, 4, 3)]
        chosen += [LayerTiles(m, one, two) for one, two in zip(firsts, seconds, strict=True)]
        chosen.append(LayerTiles(m, firsts[0], seconds[2]))
    return chosen


def safe(tile: Tile, fp8: bool) -> Tile:
    """A tile for the product before the timed one."""
    return Tile(tile.m, 64, 128 if fp8 else 64, 1, 8 if fp8 and tile.m == 128 else 4, 2)


def compile_tile(job: tuple[Shape, int, Any, int, Target, bool]) -> str | None:
    """In a process of its own: compile one product (0 or 1), or a whole plan (-1), into Triton's cache."""
    shape, tokens, tile, product_index, target, fp8 = job
    experts, top_k, hidden, inner = shape
    torch.set_num_threads(1)
    try:
        if isinstance(tile, LayerTiles):
            plan = tile
        else:
            block_size = 0 if tokens * top_k * NO_LAYOUT_EXPERTS_PER_ROUTE <= experts else tile.m
            plan = (
                LayerTiles(block_size, safe(tile, fp8), tile) if product_index else LayerTiles(block_size, tile, tile)
            )
        x, gate_up, down = (
            torch.empty(size, dtype=torch.bfloat16)
            for size in ((tokens, hidden), (experts, 2 * inner, hidden), (experts, hidden, inner))
        )
        weights, ids = (torch.empty(tokens, top_k, dtype=dtype) for dtype in (torch.float32, torch.int32))
        layout = empty_layout(tokens, top_k, experts, plan.first.m) if plan.block_size else None
        layer, routes = ExpertWeights(gate_up, down), Routes(weights, ids)
        if fp8:
            quantized = empty_quantized(gate_up), empty_quantized(down)
            layer = ExpertWeights(quantized[0].data, quantized[1].data, quantized=quantized)
        launches, _ = launch.layer_launches(plan, x, layer, routes, layout, "silu", target)
        compile_launches(launches if product_index < 0 else launches_of(launches, product_index))
    except Exception as error:
        return f"{tile}: {type(error).__name__}: {str(error)[-120:]}"
    return None


def launches_of(launches: list[Any], index: int) -> list[Any]:
    """Those of a product: the kernel `gemm`, and before it the pass that quantises its rows, if there is one."""
    at = [place for place, one in enumerate(launches) if one.kernel == "gemm"]
    return launches[at[0] + 1 if index else 0 : at[index] + 1]


def timed(calls: list[Any]) -> float:
    return graph_us(calls, warm_up=2, min_replays=3, max_replays=20, budget_us=2_000.0)


def inputs_of(shape: Shape, tokens: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    return random_inputs(shape, tokens, 6 if tokens <= 256 else 2)


def sweep_plans(shape: Shape, tokens: int, args: argparse.Namespace, layer: ExpertWeights) -> list[Any]:
    """Rows (-1, block size, microseconds, first tile) of whole layers."""
    inputs = inputs_of(shape, tokens)
    x, w, ids = inputs[0]
    both = layer.quantized or layer[:2]
    expected = fused_moe(x, *both, w, ids, backend="packed").float()
    measured = []
    for plan in plans(shape, tokens, args.fp8):
        if time.perf_counter() - args.started > args.budget:
            break

        def call(one: tuple[torch.Tensor, ...], plan: LayerTiles = plan) -> torch.Tensor:
            x, w, ids = one
            layout = None
            if plan.block_size:
                layout = align(ids, block_size=plan.block_size, num_experts=shape[0], positions=True)
            return launch.run_layer(plan, x, layer, Routes(w, ids), layout, "silu")

        try:
            error = relative_error(call(inputs[0]).float(), expected)
            micros = timed([lambda one=one: call(one) for one in inputs])
        except Exception as problem:
            print("failed", plan, f"{type(problem).__name__}: {str(problem)[:80]}", flush=True)
            continue
        if not error < MAX_ERROR[args.fp8]:
            print("WRONG", plan, error, flush=True)
            continue
        measured.append((micros, plan))
    measured.sort()
    for micros, plan in measured[: args.top * 4]:
        print(f"  layer {micros:9.1f} us  {[plan.block_size, list(plan.first), list(plan.second)]}", flush=True)
    return [(-1, plan.block_size, micros, plan.first) for micros, plan in measured]


def sweep(shape: Shape, tokens: int, args: argparse.Namespace, layer: ExpertWeights) -> list[Any]:
    """Rows (product, rows of a tile, microseconds, tile) of each product by itself."""
    experts, top_k, hidden, inner = shape
    inputs = inputs_of(shape, tokens)
    results = []
    target = target_of(torch.device("cuda", 0))
    measured: dict[tuple[int, int], list[tuple[float, Tile]]] = {}
    for index in (0, 1):
        expected: torch.Tensor | None = None
        layouts = {}
        for tile in tiles_for(tokens * top_k, experts, index == 0, args.fp8):
            if time.perf_counter() - args.started > args.budget:
                break
            if tile.m not in layouts:
                layouts[tile.m] = [align(i[2], block_size=tile.m, num_experts=experts, positions=True) for i in inputs]
            plan = LayerTiles(tile.m, safe(tile, args.fp8), tile) if index else LayerTiles(tile.m, tile, tile)
            calls, outs = [], []
            try:
                for (x, w, ids), layout in zip(inputs, layouts[tile.m], strict=True):
                    launches, _ = launch.layer_launches(plan, x, layer, Routes(w, ids), layout, "silu", target)
                    if index == 1:
                        launch.run(launches_of(launches, 0), x.device)
                    some = launches_of(launches, index)
                    outs.append(some[-1].arguments[9])
                    calls.append(lambda some=some: launch.run(some, torch.device("cuda", 0)))
                micros = timed(calls)
            except Exception as problem:
                print("failed", index, tuple(tile), f"{type(problem).__name__}: {str(problem)[:80]}", flush=True)
                continue
            out = outs[0]
            if index == 0:
                out = out[layouts[tile.m][0].positions.long()]
            if expected is None:
                expected = out.double()
            error = relative_error(out, expected)
            if not error < MAX_ERROR[args.fp8] / 2:
                print("WRONG", index, tuple(tile), error, flush=True)
                continue
            measured.setdefault((index, tile.m), []).append((micros, tile))
    for (index, m), tiles in sorted(measured.items()):
        tiles.sort()
        flops = 2 * tokens * top_k * hidden * inner * (2 if index == 0 else 1)
        for micros, tile in tiles[: args.top]:
            results.append((index, m, micros, tile))
            rate = f"{flops / micros / 1e6:6.0f} TFLOP/s"
            print(f"  gemm{index + 1} m{m:<4} {micros:9.1f} us {rate}  {list(tile)}", flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--shape", type=integers, default=[0, 1, 2])
    parser.add_argument("--tokens", type=integers, default=TOKENS)
    parser.add_argument("--top", type=int, default=3)
    parser.add_argument("--budget", type=float, default=100.0)
    parser.add_argument("--fp8", action="store_true", help="FP8 weights in blocks of 128 x 128")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.started = time.perf_counter()
    shapes = [SHAPES[index] for index in args.shape]
    target = target_of(torch.device("cuda", 0))
    jobs: dict[Any, Any] = {}
    for shape, count in product(shapes, args.tokens):
        if count * shape[1] < FEW * shape[0]:
            for plan in plans(shape, count, args.fp8):
                jobs[shape[1], plan] = (shape, count, plan, -1, target, args.fp8)
    for shape, count, index in product(shapes, args.tokens, (0, 1)):
        if count * shape[1] < FEW * shape[0]:
            continue
        for tile in tiles_for(count * shape[1], shape[0], index == 0, args.fp8):
            # Triton specialises a kernel on the divisibility of sizes only, so one shape compiles for several.
            key = (tile, index, shape[1] if index == 0 else 1, shape[2] % tile.k, shape[3] % tile.k)
            jobs.setdefault(key, (shape, count, tile, index, target, args.fp8))
    failed = in_processes(compile_tile, jobs.values(), chunksize=4)
    spent = time.perf_counter() - args.started
    print(f"{len(jobs)} kernels compiled in {spent:.0f} s; {len(failed)} failed: {failed[:3]}", flush=True)
    rows = []
    for shape in shapes:
        weights = random_weights(shape)
        layer = ExpertWeights(*weights)
        if args.fp8:
            gate_up, down = map(in_blocks, weights)
            layer = ExpertWeights(gate_up.data, down.data, quantized=(gate_up, down))
            del gate_up, down
        for count in args.tokens:
            print(f"{shape} {count} tokens, at {time.perf_counter() - args.started:.0f} s", flush=True)
            mode = sweep_plans if count * shape[1] < FEW * shape[0] else sweep
            for row in mode(shape, count, args, layer):
                rows.append({"shape": shape, "tokens": count, "gemm": row[0], "us": row[2], "tile": list(row[3])})
        del weights, layer
        torch.cuda.empty_cache()
    if args.out:
        args.out.write_text(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
