"""The experts' kernels under Triton's interpreter against plain loops.  test_experts_triton.py runs it in a process.

TRITON_INTERPRET=1 PYTHONPATH=src:tests python tests/workers/experts_interpret.py

In float32, as the interpreter's bfloat16 products are silently wrong.
"""

from __future__ import annotations

import sys

import torch
import torch._dynamo.testing
from cases.experts import expert_loop, random_layer, relative_error
from helpers import failures, patch_interpreter

import moealign
from moealign import fused_moe, grouped_gemm
from moealign.experts import launch
from moealign.experts.records import ExpertWeights, Routes
from moealign.experts.tiles import LayerTiles, Tile, target_of

MAX_ERROR = 2e-6


def layers():
    """(what, relative error) of whole layers: every rule for rows an expert, odd sizes, options."""
    for tokens, top_k, count, hidden, inner in (
        (1, 2, 8, 40, 24),  # one tile per route
        (2, 2, 40, 48, 16),  # the same for two tokens
        (5, 3, 7, 40, 24),  # blocks of 16
        (40, 2, 3, 33, 17),  # blocks of 32, odd sizes
        (70, 2, 2, 32, 16),  # blocks of 128
    ):
        x, gate_up, down, weights, ids, biases = random_layer(tokens, top_k, count, hidden, inner, bias=True)
        ids[-1, 0] = count  # dropped
        layer = [each.float() for each in (x, gate_up, down, weights)]
        extra = {"gate_up_bias": biases[0].float(), "down_bias": biases[1].float()}
        got = fused_moe(*layer, ids, **extra, backend="triton")
        yield f"{tokens} tokens", relative_error(got, expert_loop(x, gate_up, down, weights, ids, bias=biases))
        out = torch.full_like(layer[0], float("nan"))
        filled = fused_moe(*layer, ids, **extra, backend="triton", out=out)
        yield f"{tokens} tokens into a buffer", float(filled is not out or not torch.equal(out, got))
        filled = fused_moe(*layer, ids, **extra, backend="triton", out=layer[0])
        yield f"{tokens} tokens in place", float(filled is not layer[0] or not torch.equal(filled, got))
    for activation in ("gelu", "gelu_tanh", "relu", "relu2"):
        for gated in (True, False):
            x, gate_up, down, weights, ids, _ = random_layer(6, 2, 3, 16, 16, gated=gated)
            layer = [each.float() for each in (x, gate_up, down, weights)]
            got = fused_moe(*layer, ids, activation=activation, backend="triton")
            want = expert_loop(x, gate_up, down, weights, ids, activation=activation)
            yield f"{activation}, gate {gated}", relative_error(got, want)
    x, gate_up, down, weights, ids, biases = random_layer(6, 2, 3, 16, 16, bias=True, transposed=True)
    layer = [each.float() for each in (x, gate_up, down, weights)]
    extra = {"gate_up_bias": biases[0].float(), "down_bias": biases[1].float(), "transposed": True}
    want = expert_loop(x, gate_up, down, weights, ids, bias=biases, transposed=True)
    yield "transposed", relative_error(fused_moe(*layer, ids, **extra, backend="triton"), want)

    for tokens in (2, 40):  # a tile per route, blocks
        x, gate_up, down, weights, ids, _ = random_layer(tokens, 2, 8, 16, 16)
        layer = [each.float() for each in (x, gate_up, down)]
        for what, strided in (("column", (weights[:, :1], ids[:, :1])), ("expanded", (weights[:1], ids[:1]))):
            views = [each.expand(tokens, -1) for each in (strided[0].float(), strided[1])]
            got = fused_moe(*layer, *views, backend="triton")
            want = expert_loop(x, gate_up, down, *(each.contiguous() for each in views))
            yield f"{tokens} tokens, {what} of weights and ids", relative_error(got, want)
    x, gate_up, down, weights, ids, biases = random_layer(6, 2, 3, 16, 16, bias=True, transposed=True)
    layer = [each.float() for each in (x, gate_up, down, weights)]

    def odd(rows):
        return torch.tanh(rows[:, ::2]) * rows[:, 1::2]

    got = fused_moe(*layer, ids, activation=odd, output_rows=torch.sin, **extra, backend="triton")
    same = fused_moe(*layer, ids, activation=odd, output_rows=torch.sin, **extra, backend="packed")
    yield "callables between the products", relative_error(got, same)


def maps():
    x, gate_up, down, weights, _, _ = random_layer(24, 3, 4, 16, 16)
    ids = torch.randint(-1, 11, (24, 3), generator=torch.Generator().manual_seed(5))
    expert_map = torch.tensor([-1, 2, -1, 0, 3, -1, 1, 7, -1, -1])  # 7: a local expert without weights
    valid = torch.tensor([17], dtype=torch.int32)
    weights[ids == 0] = float("nan")  # of routes that are dropped
    x[17:] = float("nan")
    layer = [each.float() for each in (x, gate_up, down, weights)]
    got = fused_moe(*layer, ids, expert_map=expert_map, num_valid_tokens=valid, backend="triton")
    want = expert_loop(x, gate_up, down, weights, ids, expert_map=expert_map, valid=17)
    yield "map and valid count", relative_error(got, want)
    yield "tokens past the valid ones are zero", float(got[17:].abs().max())


def tilings():
    """The same layer with tiles that no rule selects for it."""
    x, gate_up, down, weights, ids, _ = random_layer(9, 2, 3, 32, 16)
    layer = [each.float() for each in (x, gate_up, down)]
    want = expert_loop(x, gate_up, down, weights, ids)
    routes = Routes(weights.float(), ids)
    target = target_of(torch.device("cpu"))
    bits = []
    for tiles in (
        LayerTiles(0, Tile(16, 16, 16, 1, 4, 2), Tile(16, 16, 16, 1, 4, 2)),
        LayerTiles(16, Tile(16, 16, 16, 1, 4, 2), Tile(16, 16, 16, 1, 4, 2)),
        LayerTiles(32, Tile(32, 16, 16, 2, 4, 2, 0, 1), Tile(32, 16, 16, 2, 4, 2, 0, 1, 0, 16)),
        LayerTiles(32, Tile(32, 16, 16, 2, 4, 2, 0, 0, 1), Tile(32, 16, 16, 8, 4, 2, 0, 2, 1)),
        LayerTiles(32, Tile(32, 16, 16, 2, 4, 2, 0, 0, 0, 16), Tile(32, 16, 16, 8, 4, 2)),
    ):
        layout = routes.layout(tiles.block_size, 3) if tiles.block_size else None
        got = launch.run_layer(tiles, layer[0], ExpertWeights(*layer[1:]), routes, layout, "silu")
        yield str(tuple(tiles)), relative_error(got, want)
        bits.append(got)
    yield "one tile per route, or aligned: the same bits", float(not torch.equal(bits[0], bits[1]))
    assert target.multiprocessors


def products():
    x, gate_up, _, weights, ids, biases = random_layer(11, 3, 5, 24, 20, bias=True)
    ids[4] = torch.tensor([-1, 5, 2])
    single = [each.float() for each in (x, gate_up)]
    for size in (16, 32):
        layout = moealign.align(ids, block_size=size, num_experts=5)
        for activation in (None, "silu_mul", "gelu"):
            options = {"row_weights": weights.float(), "bias": biases[0].float(), "activation": activation}
            got = grouped_gemm(*single, layout, top_k=3, **options, backend="triton")
            want = grouped_gemm(*single, layout, top_k=3, **options, backend="packed")
            yield f"grouped_gemm, blocks of {size}, {activation}", relative_error(got, want)
    layout = moealign.align(ids, block_size=16, num_experts=5)
    far = moealign.BlockLayout(
        layout.sorted_token_ids, layout.expert_ids, layout.num_tokens_post_padded * 10**6, block_size=16
    )
    got = grouped_gemm(*single, far, top_k=3, backend="triton")
    want = grouped_gemm(*single, layout, top_k=3, backend="packed")
    yield "grouped_gemm, a total past the end of the layout", relative_error(got, want)
    try:
        layout = moealign.align(ids, block_size=48, num_experts=5)
        grouped_gemm(*single, layout, top_k=3, backend="triton")
        yield "a block size that tiles do not have is refused", 1.0
    except moealign.BackendUnavailable as error:
        yield "a block size that tiles do not have is refused", float("these are of 48" not in str(error))


def compiled():
    """A traced call is one operator."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    layer = torch.compile(fused_moe, backend=counter, fullgraph=True, dynamic=True)
    for tokens in (3, 20):
        x, gate_up, down, weights, ids, _ = random_layer(tokens, 2, 4, 16, 16)
        got = layer(*(each.float() for each in (x, gate_up, down, weights)), ids)
        yield f"{tokens} tokens, compiled", relative_error(got, expert_loop(x, gate_up, down, weights, ids))
    nodes = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    yield "one operator", float("moealign.fused_moe" not in " ".join(nodes) or counter.frame_count != 1)


def compared():
    """(what, its relative error or None) of every case; NaN is an error too."""
    for part in (layers, maps, tilings, products, compiled):
        for name, error in part():
            yield name, None if error < MAX_ERROR else f"relative error {error}"


if __name__ == "__main__":
    patch_interpreter()
    sys.exit(failures(compared()))
