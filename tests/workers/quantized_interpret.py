"""The experts' kernels with FP8 weights under Triton's interpreter against plain loops.

test_quantized_triton.py runs it in a process.

TRITON_INTERPRET=1 PYTHONPATH=src:tests python tests/workers/quantized_interpret.py
"""

from __future__ import annotations

import sys
from unittest import mock

import torch
from cases.experts import SCHEMES, quantized_loop, random_layer, random_quantized, relative_error
from helpers import failures, patch_interpreter

import moealign
from moealign import Gate, QuantizedWeights, fused_moe, grouped_gemm
from moealign.experts import launch, quantized
from moealign.experts.records import ExpertWeights, Routes
from moealign.experts.tiles import LayerTiles, Target, Tile

MAX_ERROR = 2e-6
TARGETS = (Target("interpreter", 4, False), Target("interpreter", 4, False, True))  # without and with e4m3


def layer(tokens, top_k=2, experts=4, hidden=144, inner=20, scheme=SCHEMES[0], gated=True):
    x, _, _, weights, ids, _ = random_layer(tokens, top_k, experts, hidden, inner, dtype=torch.float32)
    ids[-1, 0] = experts  # dropped
    gate_up = random_quantized(experts, (1 + gated) * inner, hidden, scheme, 1)
    return x, gate_up, random_quantized(experts, hidden, inner, scheme, 2, 2.0), weights, ids


def schemes(blocks=(16, 64)):
    """(what, relative error) of every scheme; rows are quantised on the way or, in blocks of 64, by a pass."""
    for scheme in SCHEMES:
        call = layer(5, scheme=scheme)
        want = quantized_loop(*call)
        for size in blocks:
            got = fused_moe(*call, backend="triton", block_size=size)
            yield f"{scheme}, blocks of {size}", relative_error(got, want)
        rows = call[0].clone()
        filled = fused_moe(rows, *call[1:], backend="triton", block_size=size, out=rows)
        yield f"{scheme} in place", float(filled is not rows or not torch.equal(rows, got))


def sizes():
    for tokens, experts, hidden, inner in ((1, 8, 1, 1), (2, 40, 256, 128), (5, 3, 130, 257), (37, 2, 127, 65)):
        call = layer(tokens, 2, experts, hidden, inner)
        yield f"{call[0].shape}", relative_error(fused_moe(*call, backend="triton"), quantized_loop(*call))
    call = layer(6, gated=False)
    got = fused_moe(*call, activation="relu2", backend="triton")
    yield "no gate", relative_error(got, quantized_loop(*call, activation="relu2"))


def options():
    x, gate_up, down, weights, _ = layer(24)
    ids = torch.randint(-1, 9, (24, 2), generator=torch.Generator().manual_seed(3))
    expert_map = torch.tensor([-1, 2, -1, 0, 3, -1, 1, 7])  # 7: a local expert without weights
    biases = random_layer(1, 1, 4, 144, 20, dtype=torch.float32, bias=True)[5]
    weights[ids == 0] = float("nan")
    x[19:] = float("nan")
    for gate in (Gate(limit=0.5, alpha=1.702, offset=1.0, interleaved=True), Gate("situ"), "silu"):
        kept = {"expert_map": expert_map, "activation": gate}
        given = {"num_valid_tokens": torch.tensor([19], dtype=torch.int32), "backend": "triton"}
        want = quantized_loop(x, gate_up, down, weights, ids, **kept, valid=19, bias=biases)
        for size in (16, 64) if gate == "silu" else (16,):
            got = fused_moe(
                x, gate_up, down, weights, ids, **kept, **given, block_size=size,
                gate_up_bias=biases[0], down_bias=biases[1],
            )  # fmt: skip
            yield f"{gate}, a map and biases, blocks of {size}", relative_error(got, want)


def tilings():
    """One layer under tiles that a rule might choose: persistent, halved, swapped."""
    call = layer(23, hidden=300, inner=140)
    want = quantized_loop(*call)
    x, gate_up, down, weights, ids = call
    records = ExpertWeights(gate_up.data, down.data, None, None, False, (gate_up, down)), Routes(weights, ids)
    for tiles in (
        LayerTiles(16, Tile(16, 16, 128, 1, 4, 2), Tile(16, 64, 128, 1, 4, 2)),
        LayerTiles(32, Tile(32, 16, 128, 2, 4, 2, 0, 1), Tile(32, 32, 128, 2, 4, 2, 0, 1, 0, 16)),
        LayerTiles(32, Tile(32, 16, 128, 2, 4, 2, 0, 0, 1), Tile(32, 128, 128, 8, 4, 2, 0, 2, 1)),
        LayerTiles(64, Tile(64, 128, 128, 2, 4, 2, 0, 0, 0, 16), Tile(64, 256, 128, 8, 4, 2)),
    ):
        layout = records[1].layout(tiles.block_size, 4)
        got = launch.run_layer(tiles, x, records[0], records[1], layout, "silu")
        yield str(tuple(tiles)), relative_error(got, want)


def bits(tensor):
    """Of every value; -1 for NaN, whose sign is free."""
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
    return tensor.contiguous().view(kind).int().masked_fill(tensor.float().isnan(), -1)


def stored(tiles, x, layer, routes, layout, activation):
    """The launches of a layer, what it returns, and the rows of the second product that have a route, with scales."""
    launches, out = launch.layer_launches(tiles, x, layer, routes, layout, activation, launch.target_of(x.device))
    launch.run(launches, x.device)
    second = [one for one in launches if one.kernel == "gemm"][1]
    rows = (layout.sorted_token_ids[: int(layout.num_tokens_post_padded)] < routes.ids.numel()).nonzero()[:, 0]
    values, scales = second.arguments[0][rows], second.arguments[-6]
    return len(launches), bits(out), bits(values), bits(scales if scales.numel() == 1 else scales[rows])


def epilogues():
    """Bits: tiles that quantise their result, and a pass over it."""
    whole, halved = Tile(32, 128, 128, 2, 4, 2), Tile(32, 128, 128, 2, 4, 2, 0, 0, 0, 16)
    looping, swapped, wide = whole._replace(ctas=1), whole._replace(m=16, swap=1), whole._replace(n=256)
    interleaved = Gate(limit=0.5, alpha=1.702, offset=1.0, interleaved=True)
    grouped, static, by_row, by_expert = SCHEMES[0], SCHEMES[5], SCHEMES[1], SCHEMES[2]
    for dtype, inner, tile, gate, (of_first, of_second) in (
        (torch.float32, 192, whole, "silu", (grouped, grouped)),
        (torch.bfloat16, 96, whole, "relu", (SCHEMES[4], SCHEMES[4])),  # zeros of both signs
        (torch.float16, 130, swapped, "gelu_tanh", (by_row, grouped)),
        (torch.bfloat16, 300, wide, Gate("situ").text, (by_expert, grouped)),
        (torch.bfloat16, 192, wide, interleaved.text, (grouped, grouped)),
        (torch.float16, 256, halved, "silu", (grouped, static)),
        (torch.float32, 140, looping, "relu2", (static, static)),
        (torch.bfloat16, 257, looping, "gelu", (static, grouped)),
    ):
        plain = gate == "relu2"
        x, _, _, weights, ids = layer(23, hidden=72, inner=1)
        ids[:5] = 0
        x[7], x[8] = 0, x[8] * 1e-12
        both = random_quantized(4, (2 - plain) * inner, 72, of_first, 1), random_quantized(4, 72, inner, of_second, 2)
        bias = random_layer(1, 1, 4, 72, inner, dtype=dtype, gated=not plain, bias=True)[5][0]
        records = ExpertWeights(both[0].data, both[1].data, bias, None, False, both)
        expert_map = torch.tensor([0, 2, -1, 7, 3])  # expert 1 is empty, and 7 has no weights
        for factor in (1, 300 if dtype is torch.float16 else 2e19):  # some activated values are infinite
            values = (x * factor).to(dtype)
            values[9, 1] = float("nan")
            routes = Routes(weights, ids, expert_map, torch.tensor([21], dtype=torch.int32))
            layout = routes.layout(tile.m, 4)
            call = (LayerTiles(tile.m, tile, tile), values, records, routes, layout, gate)
            count, *got = stored(*call)
            with mock.patch.object(launch, "quantizes_result", return_value=False):
                more, *want = stored(*call)
            same = all(map(torch.equal, got, want)) and count + 1 == more
            case = f"an epilogue, {dtype}, {inner} columns, {tile}, {gate}, {of_second[1]}, times {factor}"
            yield case, float(not same)


def products():
    x, gate_up, _, weights, ids = layer(11, 3)
    for size in (16, 64):
        layout = moealign.align(ids, block_size=size, num_experts=4)
        for activation in (None, "silu_mul"):
            given = {"row_weights": weights, "bias": torch.randn(4, 40), "activation": activation, "top_k": 3}
            got = grouped_gemm(x, gate_up, layout, **given, backend="triton")
            want = grouped_gemm(x, gate_up, layout, **given, backend="packed")
            yield f"grouped_gemm, blocks of {size}, {activation}", relative_error(got, want)
    expert_map = torch.tensor([-1, 0, 1, 2])  # blocks of expert 0 stay, and give zeros whatever is in the rows
    layout = moealign.align(ids, block_size=16, num_experts=4, expert_map=expert_map)
    x[ids.eq(0).any(1)] = float("nan")
    for scheme in SCHEMES[:5]:
        weights = random_quantized(3, 40, 144, scheme)
        weights.scales[0] = float("nan")
        got = grouped_gemm(x, weights, layout, top_k=3, backend="triton")
        want = grouped_gemm(x, weights, layout, top_k=3, backend="packed")
        kept = want.isfinite()
        same = torch.equal(got.isnan(), want.isnan()) and bool((got[ids.flatten() == 0] == 0).all())
        yield f"foreign blocks, {scheme}", relative_error(got[kept], want[kept]) if same else 1.0


def values():
    """Bits: every e4m3 value, every rounding, and what is not finite."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    data = torch.zeros(1, 256, 128).to(torch.float8_e4m3fn)
    data.view(torch.uint8)[0, :, 0] = codes.view(torch.uint8)
    weights = QuantizedWeights(data, torch.ones(1, 1, 1), (0, 0), "static", torch.ones(1))
    one, ids = torch.zeros(1, 128), torch.zeros(1, 1, dtype=torch.int64)
    one[0, 0] = 1
    layout = moealign.align(ids, block_size=16, num_experts=1)
    got = grouped_gemm(one, weights, layout, top_k=1, backend="triton")[0]
    yield "every value of e4m3", float(not torch.equal(got.nan_to_num(1e9), codes.float().nan_to_num(1e9)))
    finite = codes[:127].float()
    rows = torch.cat([finite, (finite[1:] + finite[:-1]) / 2, torch.rand(40) * 1e-2, torch.randn(70) * 200])
    rows = torch.cat([rows, -rows[:15], torch.tensor([1e30, -1e30, float("inf"), float("nan")])])[:, None]
    one_output = data[:, :1].clone()
    one_output[0, 0, 0] = 1.0
    weights = weights._replace(data=one_output)
    rows = torch.nn.functional.pad(rows, (0, 127))
    layout = moealign.align(torch.zeros(len(rows), 1, dtype=torch.int64), block_size=16, num_experts=1)
    got = grouped_gemm(rows, weights, layout, top_k=1, backend="triton")[:, 0].nan_to_num(1e9)
    want = quantized.quantize_rows(rows[:, :1], "static", torch.ones(1))[0].float()[:, 0].nan_to_num(1e9)
    yield "every rounding", float(not torch.equal(got, want))
    x = torch.randn(37, 300) * torch.logspace(-12, 6, 37)[:, None]
    x[3] = 0
    for activations in quantized.SCHEMES:
        static = torch.tensor([0.03]) if activations == "static" else None
        by = QuantizedWeights(x, x, (0, 0), activations, static)
        one, (data, scales, *_) = launch.quantize_launch(launch.target_of(x.device), x, by, None, 37)
        launch.run([one], x.device)
        want_data, want_scales = quantized.quantize_rows(x, activations, static)
        same = scales is None if static is not None else torch.equal(scales, want_scales)
        yield f"a pass, {activations}", float(not (same and torch.equal(data.float(), want_data.float())))


def batches():
    x, gate_up, down, weights, ids = layer(30)
    call = {"batch_invariant": True, "backend": "triton"}
    whole = fused_moe(x, gate_up, down, weights, ids, **call)
    part = fused_moe(x[7:12], gate_up, down, weights[7:12], ids[7:12], **call)
    yield "batch-invariant", float(not torch.equal(part, whole[7:12]))
    yield "batch-invariant, its values", relative_error(whole, quantized_loop(x, gate_up, down, weights, ids))
    act = lambda rows: torch.tanh(rows[:, ::2]) * rows[:, 1::2]  # noqa: E731
    got = fused_moe(x, gate_up, down, weights, ids, activation=act, backend="triton")
    yield "a callable", relative_error(got, quantized_loop(x, gate_up, down, weights, ids, activation=act))


def compared():
    """(what, its relative error or None) of every case; NaN is an error too."""
    without = (lambda: schemes((16,)), sizes, options, products, epilogues)
    for target, parts in zip(TARGETS, (without, (values, schemes, tilings, batches, epilogues)), strict=True):
        with mock.patch.object(launch, "target_of", lambda device, target=target: target):
            for part in parts:
                for name, error in part():
                    case = f"{'e4m3' if target.fp8 else 'float16'}, {name}"
                    yield case, None if error < MAX_ERROR else f"relative error {error}"


if __name__ == "__main__":
    patch_interpreter()
    sys.exit(failures(compared()))
