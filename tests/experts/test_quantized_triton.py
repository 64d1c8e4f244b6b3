"""The kernels for FP8 weights: interpreted, compiled ahead for GPUs that are not in this machine, and run on one."""

from __future__ import annotations

import functools
import importlib
import types

import pytest
import torch
from cases.experts import SCHEMES, quantized_loop, random_layer, random_quantized, relative_error
from helpers import TARGETS, WORKERS, assert_passes, compile_in_processes, compile_launch, compiled_here, kind_of
from sass import disassembler, spilled, touched_before_the_wait

import moealign
from moealign import Gate, QuantizedWeights, fused_moe, grouped_gemm
from moealign.experts import quantized, tiles
from moealign.experts.records import ExpertWeights, Routes
from moealign.layout import BlockLayout, capacity

pytest.importorskip("triton")
launch = importlib.import_module("moealign.experts.launch")

HOPPER = tiles.Target("NVIDIA H200", 132, True, True)
ADA = tiles.Target("NVIDIA L40S", 142, False, True)
A100 = tiles.Target("NVIDIA A100", 108, False, False)
B200 = tiles.Target("NVIDIA B200", 148, True, False)  # as a Triton before 3.7 compiles for it
NEW_TRITON = tiles.triton_release() >= (3, 7)
SHAPE = (16, 8, 2048, 768)  # experts, top_k, hidden, inner
ODD = (7, 3, 100, 77)
#: In bfloat16 the paths round the activated rows apart, and a rounding that falls on the other side of an e4m3 value's
#: boundary moves that value by up to an eighth.
MAX_ERROR = 2e-2
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def test_interpreted_they_equal_plain_loops():
    assert_passes(WORKERS / "quantized_interpret.py", interpreted=True)


@pytest.mark.targets
def test_compile_ahead_without_spills_on_every_target():
    assert_passes(__file__, interpreted=False)


# ---- launches --------------------------------------------------------------------------------------------------------

INTERLEAVED = Gate(limit=7.0, alpha=1.702, offset=1.0, interleaved=True)


def weights_of(count, outputs, depth, scheme=SCHEMES[0]):
    block, activations, each = scheme
    data = torch.empty(count, outputs, depth, dtype=torch.float8_e4m3fn)
    scales = torch.empty(quantized.scales_shape(data, block))
    return QuantizedWeights(
        data, scales, block, activations, torch.empty(count if each else 1) if activations == "static" else None
    )


def planned(shape, tokens, target=HOPPER, dtype=torch.bfloat16, scheme=SCHEMES[0], activation="silu", block_size=None):
    """The tiles of one call and its launches; nothing runs."""
    count, top_k, hidden, inner = shape
    x, ids = torch.empty(tokens, hidden, dtype=dtype), torch.empty(tokens, top_k, dtype=torch.int64)
    both = weights_of(count, 2 * inner, hidden, scheme), weights_of(count, hidden, inner, scheme)
    layer = ExpertWeights(both[0].data, both[1].data, None, None, False, both)
    routes = Routes(torch.empty(tokens, top_k), ids)
    selected = tiles.select_tiles(x, layer, routes, block_size, target)
    layout = None
    if selected.block_size:
        sizes = capacity(tokens * top_k, block_size=selected.block_size, num_experts=count)
        parts = [torch.empty(size, dtype=torch.int32) for size in (*sizes[:3], tokens * top_k)]
        layout = BlockLayout(*parts[:3], positions=parts[3], block_size=selected.block_size)
    launches, out = launch.layer_launches(selected, x, layer, routes, layout, activation, target)
    assert out.shape == x.shape
    assert out.dtype is dtype
    return selected, launches


def kernels(*args, **options):
    return [one.kernel for one in planned(*args, **options)[1]]


def test_a_pass_quantises_rows_unless_an_expert_has_its_own_scale():
    passed = ["quantize_rows", "gemm", "quantize_rows", "gemm", "sum_rows"]
    for scheme in SCHEMES:
        for tokens in (1, 40):
            alone = scheme[1] == "static" and scheme[2]
            assert kernels(SHAPE, tokens, scheme=scheme) == (["gemm", "gemm", "sum_rows"] if alone else passed)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_tiles_with_whole_groups_quantise_their_result(scheme):
    """One launch less.  A scale of a row is known when all its tiles are."""
    result = ["quantize_rows"] if scheme[1] == "row" else []
    want = ["quantize_rows", "gemm", *result, "gemm", "sum_rows"]
    if scheme[1] == "static" and scheme[2]:
        want = ["gemm", "gemm", "sum_rows"]
    assert kernels(SHAPE, 2000, scheme=scheme) == want


def test_the_width_of_a_tile_counts_as_it_is_launched():
    """Without TMA a tile of neighbouring gate and up columns is halved."""
    gate = Gate(interleaved=True).text
    for shape, width in ((SHAPE, 128), ((16, 8, 2040, 768), 64)):  # rows of 2040 bytes are no multiple of 16
        names, launches = kernels(shape, 2000, activation=gate), planned(shape, 2000, activation=gate)[1]
        assert launches[1].constants["BLOCK_N"] == width
        assert names.count("quantize_rows") == (1 if width == 128 else 2)
    for target in (ADA, A100):  # tiles of 32 columns
        assert kernels(SHAPE, 2000, target).count("quantize_rows") == 2


def test_a_pass_reads_a_token_once_and_halves_the_bytes():
    assert planned(SHAPE, 2000)[1][0].grid == (2000 * 2048 // 128 // 16,)
    _, launches = planned(SHAPE, 40)
    for one in (launches[0], launches[2]):
        assert [each.dtype for each in one.arguments[:2]] == [torch.bfloat16, torch.float8_e4m3fn]
    assert launches[2].arguments[4] is not None  # rows of the layout without a route are left out


def test_a_result_that_tiles_quantise_has_half_the_bytes():
    _, (_, first, second, _) = planned(SHAPE, 2000)
    out, scales = first.arguments[9], first.arguments[25]
    assert out.dtype is torch.float8_e4m3fn
    assert scales.shape == (out.shape[0], 768 // 128)
    assert second.arguments[0].base is out  # by TMA
    assert second.arguments[23] is scales


@pytest.mark.parametrize("block_size", tiles.BLOCK_SIZES)
def test_every_tile_steps_by_the_inputs_that_share_a_scale(block_size):
    for target in (HOPPER, ADA, A100):
        for tokens in (1, 40, 200, 600, 3000):
            for one in planned(SHAPE, tokens, target, block_size=block_size)[1]:
                if one.kernel == "gemm":
                    assert one.constants["BLOCK_K"] == quantized.GROUP
                    assert one.constants["BLOCK_M"] == block_size


def test_columns_share_a_scale_only_within_a_block():
    """One scale is read per tile only if every tile of both halves lies in one block of outputs."""

    def shares(inner, scheme):
        launches = planned((8, 2, 256, inner), 40, scheme=scheme)[1]
        return [one.constants["SCALING"][5] for one in launches if one.kernel == "gemm"]

    assert shares(256, SCHEMES[0]) == [True, True]
    assert shares(200, SCHEMES[0]) == [False, True]  # the up part begins within a block
    assert shares(256, ((1, 0), "group", False)) == [False, False]
    assert shares(256, ((0, 0), "group", False)) == [True, True]


# ---- compiling ahead -------------------------------------------------------------------------------------------------


def every_configuration():
    """Every rule on Hopper, Ada and before, every scheme, odd sizes, a gate with neighbouring columns."""
    for target in (HOPPER, ADA, A100):
        for tokens in (1, 16, 40, 70, 256, 3000):
            yield from ((target, one) for one in planned(SHAPE, tokens, target)[1][:-1])
        for size in (16, 128):
            yield from ((target, one) for one in planned(ODD, 50, target, torch.float16, block_size=size)[1][:-1])
    for scheme in SCHEMES[1:-1]:
        for tokens in (16, 256):
            yield from ((HOPPER, one) for one in planned(SHAPE, tokens, scheme=scheme)[1][:-1])
    for tokens in (1, 16, 256):
        yield from ((B200, one) for one in planned(SHAPE, tokens, B200)[1][:-1])
    for size in (16, 32):  # tiles with swapped operands that quantise their result
        yield from ((HOPPER, one) for one in planned(SHAPE, 3000, block_size=size)[1][1:2])
    for tokens in (16, 256):
        launches = planned(SHAPE, tokens, activation=INTERLEAVED.text)[1]
        yield HOPPER, next(one for one in launches if one.kernel == "gemm")
    yield A100, planned(ODD, 300, A100, torch.float32, SCHEMES[1])[1][0]


def targets_of(target):
    """Those of this run that are such a GPU."""
    return {
        HOPPER: [each for each in TARGETS if each[1] == 90 or (each[1] == 100 and NEW_TRITON)],
        B200: [each for each in TARGETS if each[1] == 100],
        ADA: [each for each in TARGETS if each[1] == 89],
        A100: [each for each in TARGETS if each[1] in (80, "gfx942")],
    }[target]


@functools.cache
def distinct():
    seen = {}
    for target, one in every_configuration():
        kinds = tuple((kind_of(a), isinstance(a, int) and (a == 1, a % 16 == 0)) for a in one.arguments)
        if targets_of(target):
            seen[target, one.kernel, kinds, tuple(one.constants.items()), one.num_warps, one.num_stages] = target, one
    return compiled_here(seen.values(), lambda each: each[1].kernel)


def compile_one(number):
    target, one = distinct()[number]
    function = getattr(importlib.import_module(f"moealign.experts.{one.module}"), one.kernel)
    for arch, binary in compile_launch(function, one, targets_of(target)):
        case = f"{one.kernel} {one.constants} on {arch}"
        odd = one.kernel == "gemm" and not one.constants["EVEN_K"]  # weights are then loaded byte by byte
        if arch in (80, 89, 90) and disassembler() and not odd:
            assert spilled(binary.asm["cubin"]) == 0, case
        if arch == 90 and one.kernel == "gemm" and (one.constants["BLOCK_M"] >= 64 or one.constants["SWAP"]):
            assert "wgmma.mma_async.sync.aligned" in binary.asm["ptx"], case
            assert "e4m3.e4m3" in binary.asm["ptx"], case
        if arch == 90 and one.pdl and disassembler():
            assert touched_before_the_wait(binary.asm["cubin"]) == [], case


# ---- on a GPU --------------------------------------------------------------------------------------------------------


def layer_of(tokens, top_k, count, hidden, inner, scheme=SCHEMES[0], dtype=torch.bfloat16, device="cuda"):
    """(x, gate_up, down, weights, ids) with a dropped route."""
    x, _, _, weights, ids, _ = random_layer(tokens, top_k, count, hidden, inner, dtype=dtype)
    ids[-1, 0] = count
    both = random_quantized(count, 2 * inner, hidden, scheme, 1), random_quantized(count, hidden, inner, scheme, 2, 2.0)

    def moved(each):
        return each.to(device) if isinstance(each, torch.Tensor) else each

    return x.to(device), *(QuantizedWeights(*map(moved, one)) for one in both), weights.to(device), ids.to(device)


@gpu
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(
    "size",
    [(1, 8, 64, 256, 128), (5, 2, 4, 256, 128), (60, 4, 4, 200, 72), (200, 4, 8, 384, 256), (700, 2, 4, 100, 77)],
)
def test_gpu_equals_the_arithmetic_in_torch(size, scheme):
    call = layer_of(*size, scheme)
    got, want = fused_moe(*call), fused_moe(*call, backend="packed")
    assert relative_error(got, want) < MAX_ERROR
    assert torch.equal(got, fused_moe(*call)), "the same bits every time"


@pytest.mark.parametrize(("capability", "release", "fp8"), [
    ((8, 0), "3.7.0", False), ((8, 9), "3.6.0", True), ((9, 0), "3.6.0", True), ((10, 0), "3.6.0", False),
    ((10, 0), "3.7.0", True), ((12, 0), "3.10.1", True),
])  # fmt: skip
def test_e4m3_products_are_for_those_that_compile_them(capability, release, fp8, monkeypatch):
    facts = {"name": "a GPU", "multi_processor_count": 1, "major": capability[0], "minor": capability[1]}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(**facts))
    monkeypatch.setattr(tiles.importlib.metadata, "version", lambda name: release)
    assert tiles.target_of.__wrapped__(torch.device("cuda", 0)).fp8 == fp8


@gpu
def test_gpu_equals_plain_loops():
    call = layer_of(9, 2, 4, 300, 140)
    on_cpu = layer_of(9, 2, 4, 300, 140, device="cpu")
    assert relative_error(fused_moe(*call).cpu(), quantized_loop(*on_cpu)) < MAX_ERROR


@gpu
@pytest.mark.parametrize("fp8", [True, False])
def test_gpu_with_and_without_its_fp8_products(fp8, monkeypatch):
    """A GPU without e4m3 computes the same."""
    known = launch.target_of(torch.device("cuda", 0))
    if fp8 and not known.fp8:
        pytest.skip("this GPU has no e4m3")
    monkeypatch.setattr(launch, "target_of", lambda device: known._replace(fp8=fp8, hopper=known.hopper and fp8))
    monkeypatch.setattr(tiles, "target_of", lambda device: known._replace(fp8=fp8, hopper=known.hopper and fp8))
    for tokens in (1, 20, 300):
        call = layer_of(tokens, 4, 8, 384, 256)
        assert relative_error(fused_moe(*call), fused_moe(*call, backend="packed")) < MAX_ERROR


@gpu
@pytest.mark.parametrize("activations", quantized.SCHEMES)
def test_gpu_a_pass_gives_the_bits_of_torch(activations):
    x = torch.randn(200, 1111, device="cuda") * torch.logspace(-12, 6, 200, device="cuda")[:, None]
    static = torch.tensor([0.03], device="cuda") if activations == "static" else None
    by = QuantizedWeights(x, x, (0, 0), activations, static)
    one, (data, scales, *_) = launch.quantize_launch(launch.target_of(x.device), x, by, None, 200)
    launch.run([one], x.device)
    for want_data, want_scales in (
        quantized.quantize_rows(x, activations, static),
        quantized.quantize_rows(x.cpu(), activations, None if static is None else static.cpu()),
    ):
        assert scales is None if static is not None else torch.equal(scales.cpu(), want_scales.cpu())
        assert torch.equal(data.float().cpu(), want_data.float().cpu())


@gpu
@pytest.mark.parametrize(
    ("scheme", "dtype", "activation"),
    [
        (SCHEMES[0], torch.bfloat16, "silu"),
        (SCHEMES[0], torch.float16, Gate("situ")),
        (SCHEMES[0], torch.float32, "relu"),
        (SCHEMES[4], torch.bfloat16, INTERLEAVED),
        (SCHEMES[5], torch.float16, INTERLEAVED),
    ],
    ids=str,
)
def test_gpu_tiles_quantise_their_result_as_a_pass_does(scheme, dtype, activation, monkeypatch):
    """The same bits of the result, also where activated values are zero, tiny, infinite or NaN."""
    x, *call = layer_of(700, 4, 8, 256, 192, scheme, dtype)
    x[:100] *= torch.logspace(-14, 5 if dtype is torch.float16 else 20, 100, device="cuda")[:, None].to(dtype)
    x[7], x[8, 3], x[9, 3] = 0, float("nan"), float("inf")
    for block_size in (None, 32, 128):
        options = {"activation": activation, "block_size": block_size}
        with monkeypatch.context() as patch:
            patch.setattr(launch, "quantizes_result", lambda *args: False)
            want = fused_moe(x, *call, **options)
        got = fused_moe(x, *call, **options)
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.nan_to_num(), want.nan_to_num())


@gpu
@pytest.mark.parametrize("block_size", tiles.BLOCK_SIZES)
def test_gpu_maps_valid_tokens_gates_and_nan(block_size):
    x, gate_up, down, weights, ids = layer_of(200, 4, 8, 256, 128)
    expert_map = torch.tensor([0, -1, 2, 3, 9, 1, -1, 4, 5, -1, 6, 7], device="cuda")
    x[190:] = float("nan")
    x[5, 3], x[6] = float("inf"), 0
    bias = {"gate_up_bias": torch.randn(8, 256).bfloat16().cuda(), "down_bias": torch.randn(8, 256).bfloat16().cuda()}
    options = {
        "expert_map": expert_map, "num_valid_tokens": torch.tensor([190], dtype=torch.int32, device="cuda"), **bias,
        "activation": INTERLEAVED,
    }  # fmt: skip
    got = fused_moe(x, gate_up, down, weights, ids, **options, block_size=block_size)
    want = fused_moe(x, gate_up, down, weights, ids, **options, backend="packed")
    assert not got[190:].any()
    assert torch.equal(got.isnan(), want.isnan())
    assert relative_error(got.nan_to_num(), want.nan_to_num()) < MAX_ERROR


@gpu
def test_gpu_graphs_torch_compile_batches_and_one_product():
    x, gate_up, down, weights, ids = layer_of(100, 4, 8, 256, 128)
    want = fused_moe(x, gate_up, down, weights, ids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fused_moe(x, gate_up, down, weights, ids)
    graph.replay()
    assert torch.equal(out, want)
    assert torch.equal(torch.compile(fused_moe, fullgraph=True)(x, gate_up, down, weights, ids), want)
    rows = x.clone()
    assert fused_moe(rows, gate_up, down, weights, ids, out=rows) is rows
    assert torch.equal(rows, want)
    whole = fused_moe(x, gate_up, down, weights, ids, batch_invariant=True)
    for part in (slice(0, 1), slice(3, 12), slice(40, 99)):
        some = fused_moe(x[part], gate_up, down, weights[part], ids[part], batch_invariant=True)
        assert torch.equal(some, whole[part])
    layout = moealign.align(ids, block_size=64, num_experts=8)
    options = {"top_k": 4, "row_weights": weights, "activation": "silu_mul"}
    got = grouped_gemm(x, gate_up, layout, **options)
    assert relative_error(got, grouped_gemm(x, gate_up, layout, **options, backend="packed")) < MAX_ERROR


if __name__ == "__main__":
    compile_in_processes(compile_one, distinct)
