"""The experts' kernels: interpreted, compiled ahead for GPUs that are not in this machine, and run on one that is."""

from __future__ import annotations

import functools
import importlib
import json

import pytest
import torch
from helpers import (
    TARGETS,
    WORKERS,
    assert_passes,
    compile_in_processes,
    compile_launch,
    compiled_here,
    cut,
    kind_of,
    specialisation,
)
from sass import disassembler, touched_before_the_wait

from moealign import Gate
from moealign.experts import tiles
from moealign.experts.records import ExpertWeights, Product, Routes
from moealign.layout import BlockLayout, capacity

pytest.importorskip("triton")
launch = importlib.import_module("moealign.experts.launch")
gradients = importlib.import_module("moealign.experts.gradients")

H200 = tiles.Target("NVIDIA H200", 132, True)
A100 = tiles.Target("NVIDIA A100", 108, False)
# (experts, top_k, hidden, inner)
SHAPES = [(128, 8, 2048, 768), (8, 2, 4096, 14336), (32, 4, 2880, 2880)]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def test_interpreted_they_equal_plain_loops():
    assert_passes(WORKERS / "experts_interpret.py", interpreted=True)


def test_interpreted_gradients_equal_those_of_plain_loops():
    assert_passes(WORKERS / "gradients_interpret.py", interpreted=True)


def test_interpreted_in_every_mode_of_pytorch():
    assert_passes(WORKERS / "modes_interpret.py", interpreted=True)


@pytest.mark.targets
def test_compile_ahead_within_every_targets_shared_memory():
    assert_passes(__file__, interpreted=False)


# ---- tiles -----------------------------------------------------------------------------------------------------------


def planned(shape, tokens, target=H200, dtype=torch.bfloat16, transposed=False, bias=False, **options):
    """The tiles of one call and its launches; nothing runs."""
    count, top_k, hidden, inner = shape
    new = lambda *size, dtype=dtype: torch.empty(size, dtype=dtype)  # noqa: E731
    x, ids = new(tokens, hidden), new(tokens, top_k, dtype=torch.int64)
    gate_up = new(count, hidden, 2 * inner) if transposed else new(count, 2 * inner, hidden)
    down = new(count, inner, hidden) if transposed else new(count, hidden, inner)
    weights = new(tokens, top_k, dtype=torch.float32)
    biases = (new(count, 2 * inner), new(count, hidden)) if bias else (None, None)
    layer, routes = ExpertWeights(gate_up, down, *biases, transposed), Routes(weights, ids, options.get("map"))
    selected = tiles.select_tiles(x, layer, routes, options.get("block_size"), target)
    layout = None
    if selected.block_size:
        sizes = capacity(tokens * top_k, block_size=selected.block_size, num_experts=count)
        parts = [new(size, dtype=torch.int32) for size in (*sizes[:3], tokens * top_k)]
        layout = BlockLayout(*parts[:3], positions=parts[3], block_size=selected.block_size)
    activation = options.get("activation", "silu")
    launches, out = launch.layer_launches(selected, x, layer, routes, layout, activation, target)
    assert out.shape == x.shape
    return selected, launches


def kernel_of(one):
    return getattr(importlib.import_module(f"moealign.experts.{one.module}"), one.kernel)


def planned_gradients(shape, tokens, target=H200, dtype=torch.bfloat16, transposed=False, bias=False, **options):
    """The launches of a backward; nothing runs."""
    count, top_k, hidden, inner = shape
    new = lambda *size, dtype=dtype: torch.empty(size, dtype=dtype)  # noqa: E731
    x, ids = new(tokens, hidden), torch.zeros(tokens, top_k, dtype=torch.int64)
    gate_up = new(count, hidden, 2 * inner) if transposed else new(count, 2 * inner, hidden)
    down = new(count, inner, hidden) if transposed else new(count, hidden, inner)
    biases = (new(count, 2 * inner), new(count, hidden)) if bias else (None, None)
    layer = ExpertWeights(gate_up, down, *biases, transposed)
    routes = Routes(new(tokens, top_k, dtype=torch.float32), ids)
    buffers = tuple(new(*each.shape, dtype=torch.float32) for each in (gate_up, down)) if options.get("buffers") else ()
    before = None if options.get("recompute") else new(tokens * top_k, 2 * inner)
    needed, launches = (True, True, True, True, bias, bias), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradients, "target_of", lambda device: target)
        patch.setattr(launch, "run", lambda some, device: launches.extend(some))
        activation = options.get("activation", "silu")
        gradients.layer_gradients(x, before, x, layer, routes, activation, needed, buffers or (None, None))
    return launches


def test_blocks_grow_with_rows_an_expert():
    sizes = [planned(SHAPES[0], tokens)[0].block_size for tokens in (1, 2, 16, 64, 256, 500, 1024, 4096)]
    assert sizes == [0, 0, 16, 16, 32, 64, 128, 128]


def test_a_map_or_a_block_size_aligns_few_routes_too():
    assert planned(SHAPES[0], 1, map=torch.zeros(128))[0].block_size == 16
    assert planned(SHAPES[0], 1, block_size=64)[0].block_size == 64
    assert planned(SHAPES[0], 1, block_size=64)[0].second.m == 64


def test_tiles_of_a_requested_block_size_fit_shared_memory():
    for tokens in (1, 4, 16, 64, 180, 256, 500, 1024, 4096):
        for shape in SHAPES:
            for size in tiles.BLOCK_SIZES:
                for tile, products in zip(planned(shape, tokens, block_size=size)[0][1:], (2, 1), strict=True):
                    assert (tile.m, tile.half_tile_rows < size, tile.stages > 0) == (size, True, True)
                    assert tile.stages * (tile.m + products * tile.n) * tile.k * 2 <= 200 * 1024


def test_three_launches_and_no_more():
    for tokens in (1, 64, 4096):
        assert [one.kernel for one in planned(SHAPES[0], tokens)[1]] == ["gemm", "gemm", "sum_rows"]


def test_tma_needs_hopper_and_rows_of_16_bytes():
    def used(*args, **kwargs):
        return [one.constants["B_TMA"] for one in planned(*args, **kwargs)[1][:2]]

    assert used(SHAPES[0], 4096) == [True, True]
    assert used(SHAPES[0], 4096, target=A100) == [False, False]
    assert used((8, 2, 100, 77), 4096) == [False, False]
    assert used(SHAPES[0], 4096, transposed=True) == [False, False]


@pytest.fixture
def tuning_file(tmp_path, monkeypatch):
    """The path of a tuning file that calls read; it does not exist yet."""
    path = tmp_path / "mine.json"
    monkeypatch.setenv("MOEALIGN_TUNING", str(path))
    tiles.tuned.cache_clear()
    yield path
    tiles.tuned.cache_clear()


def test_a_tuning_file_overrides_the_rule(tuning_file):
    rule = planned(SHAPES[0], 64)[0]
    other = rule._replace(block_size=64, first=rule.first._replace(m=64), second=rule.second._replace(m=64))
    key = tiles.tuning_key(*SHAPES[0], torch.bfloat16)
    tuning_file.write_text(json.dumps({"plans": {key: {"64": other.to_json()}}}))
    tiles.tuned.cache_clear()
    assert planned(SHAPES[0], 64)[0] == other
    assert planned(SHAPES[1], 64)[0] != other


KEY = tiles.tuning_key(*SHAPES[0], torch.bfloat16)
ENTRY = tiles.LayerTiles(64, tiles.Tile(64, 64, 64, 2, 4, 3), tiles.Tile(64, 64, 64, 2, 4, 3)).to_json()
DAMAGED = {
    "empty": b"",
    "not UTF-8": b'{"plans": {}, "about": "\xff"}',
    "no plans": b"{}",
    "nested too deeply": b"[" * 100_000,
    "a list of plans": b'{"plans": []}',
    "a list of entries": json.dumps({"plans": {KEY: [ENTRY]}}).encode(),
    "no tokens": json.dumps({"plans": {KEY: {"64": ENTRY, "0": ENTRY}}}).encode(),
    "a tile of words": json.dumps({"plans": {KEY: {"64": {**ENTRY, "first": ["wide"] * 6}}}}).encode(),
}


@pytest.mark.parametrize("contents", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_tuning_file_warns_once_and_the_rule_is_used(contents, tuning_file):
    rule = planned(SHAPES[0], 64)[0]
    tuning_file.write_bytes(contents)
    tiles.tuned.cache_clear()
    with pytest.warns(UserWarning, match="expected a tuning file") as warned:
        assert [planned(SHAPES[0], 64)[0] for _ in range(2)] == [rule, rule]
    assert len(warned) == 1


# ---- what is compiled ------------------------------------------------------------------------------------------------


def layouts_of(tokens, top_k, count, block_size):
    """(ids, weights, layout) at every alignment: slices of one allocation, as in a call on a GPU, and shifted."""
    sizes = capacity(tokens * top_k, block_size=block_size, num_experts=count)
    for shift in range(4):
        parts = cut(*sizes[:3], tokens * top_k, shift=shift)
        ids, weights = (each.view(tokens, top_k) for each in cut(tokens * top_k, tokens * top_k, shift=3 - shift))
        yield ids, weights.view(torch.float32), BlockLayout(*parts[:3], positions=parts[3], block_size=block_size)


@pytest.mark.parametrize("shape", [*SHAPES, (60, 6, 100, 77)], ids=str)
@pytest.mark.parametrize("target", [H200, A100], ids=lambda target: target.name)
def test_neither_tokens_nor_alignments_of_their_tensors_compile_anything(shape, target):
    """Only tiles do: one kernel per tile, for all numbers of tokens and all alignments of small tensors."""
    from moealign.experts import kernels

    count, top_k, hidden, inner = shape
    gate_up = torch.empty(count, 2 * inner, hidden, dtype=torch.bfloat16)
    layer = ExpertWeights(gate_up, torch.empty(count, hidden, inner, dtype=torch.bfloat16))
    keys, tilings = set(), set()
    for tokens in (1, 2, *range(16, 41)):
        x = torch.empty(tokens, hidden, dtype=torch.bfloat16)
        for block_size in (None, 64):
            ids = torch.empty(tokens, top_k, dtype=torch.int32)
            selected = tiles.select_tiles(x, layer, Routes(ids, ids), block_size, target)
            for ids, weights, layout in layouts_of(tokens, top_k, count, selected.block_size or 16):
                call = (x, layer, Routes(weights, ids), layout if selected.block_size else None)
                planned, _ = launch.layer_launches(selected, *call, "silu", target)
                out = torch.empty(tokens * top_k, 2 * inner, dtype=torch.bfloat16)
                product = Product(x, gate_up, layout, top_k, weights, None, None, False, False)
                planned += launch.product_launches(product, out, target)
                for one in planned:
                    keys.add(specialisation(getattr(kernels, one.kernel), one))
                    which = tuple(each is None for each in one.arguments), one.arguments[-1] == one.arguments[-2]
                    tilings.add((one.kernel, one.num_warps, one.num_stages, which, widths(one), *one.constants.items()))
    assert len(keys) == len(tilings)


@pytest.mark.parametrize("target", [H200, A100], ids=lambda target: target.name)
def test_the_stride_of_a_single_row_compiles_nothing(target):
    """It is arbitrary: that of a slice of wider rows, or what an expanded tensor had."""
    from moealign.experts import kernels

    layer = ExpertWeights(torch.empty(8, 256, 128), torch.empty(8, 128, 128))
    ids, weights = torch.empty(1, 2, dtype=torch.int32), torch.empty(1, 2)
    layout = BlockLayout(*(torch.empty(size, dtype=torch.int32) for size in (32, 2, 1)), block_size=16)
    keys = set()
    for stride in (0, 1, 37, 128, 4096):
        x, out = (torch.empty(4096).as_strided((1, columns), (stride, 1)) for columns in (128, 256))
        selected = tiles.select_tiles(x, layer, Routes(weights, ids), None, target)
        one_layer, _ = launch.layer_launches(selected, x, layer, Routes(weights, ids), None, "silu", target)
        product = Product(x, layer.gate_up, layout, 1, None, None, None, False, False)
        launches = (*one_layer, *launch.product_launches(product, out, target))
        keys.add(tuple(specialisation(getattr(kernels, one.kernel), one) for one in launches))
    assert len(keys) == 1


def widths(one):
    """Of a product: columns, depth, top_k and strides; of a sum: columns."""
    return one.arguments[12:14] + one.arguments[16:] if one.kernel == "gemm" else one.arguments[3]


@pytest.mark.parametrize("shape", [(16, 8, 128, 64), (60, 6, 100, 77)], ids=str)
@pytest.mark.parametrize("target", [H200, A100], ids=lambda target: target.name)
def test_numbers_of_tokens_compile_no_gradient(shape, target):
    keys, tilings = set(), set()
    for tokens in (1, 2, *range(16, 100, 3)):
        tiles_of = gradients.select_gradient_tiles(target, tokens * shape[1], shape[0], 2)
        tilings.add(tiles_of)
        launches = planned_gradients(shape, tokens, target=target, bias=True, recompute=True)
        keys.update((tiles_of, index, specialisation(kernel_of(one), one)) for index, one in enumerate(launches))
    assert len(keys) == len(tilings) * len(launches)


def test_neither_tokens_nor_alignments_compile_a_router():
    from moealign.backend.triton import route as routing
    from moealign.backend.triton import route_kernels as routing_kernels
    from moealign.problem import RouteProblem

    keys = set()
    for tokens in range(1, 41):
        facts = RouteProblem(torch.device("cpu"), torch.float32, tokens, 60, 4, "softmax", True, 1.0, 1, 1)
        for shift in range(4):
            logits, bias, weights, ids, valid = cut(tokens * 60, 60, tokens * 4, tokens * 4, 1, shift=shift)
            floats = (each.view(torch.float32) for each in (logits.view(tokens, 60), bias, weights))
            logits, bias, weights = floats
            arguments, constants, warps = routing.launch_of(facts, logits, bias, valid, weights, ids, None)
            one = launch.GemmLaunch("topk", (tokens,), arguments, constants, warps, 3, False)
            keys.add(specialisation(routing_kernels.topk, one))
    assert len(keys) == 1


def test_launches_of_one_key_are_one_kernel_with_the_same_constants():
    """What was compiled for a key is launched for every other launch of that key."""
    compiled = {}
    launches = [*every_configuration(), *planned_gradients(SHAPES[2], 64, bias=True)]
    for tokens in (1, 2, 16, 17, 100, 4096):
        for dtype in (torch.bfloat16, torch.float32):
            launches += planned(SHAPES[0], tokens, dtype=dtype)[1] + planned_gradients(SHAPES[0], tokens, dtype=dtype)
    for one in launches:
        function = kernel_of(one)
        assert sorted(function.arg_names[len(one.arguments) :]) == sorted(one.constants)
        for shift in (0, 1):  # the same launch with a tensor at another address
            tensors = [place for place, each in enumerate(one.arguments) if isinstance(each, torch.Tensor)]
            for place in tensors if shift else tensors[:1]:
                arguments = list(one.arguments)
                arguments[place] = torch.empty(8 + shift, dtype=arguments[place].dtype)[shift:]
                moved = one._replace(arguments=tuple(arguments))
                kernel = specialisation(function, moved)
                assert compiled.setdefault(moved.key(), kernel) == kernel
    assert len(compiled) > 100


@pytest.mark.parametrize("itemsize", [1, 2, 4])
def test_a_batch_invariant_layer_varies_its_tiles_only_where_products_are_wgmma(itemsize):
    hopper = H200._replace(fp8=True, wgmma=True)
    for target in (hopper, H200, A100):
        kept = [tiles.invariant_routes(target, 64 * rows, 64, itemsize) for rows in (0, 1, 48, 64, 500)]
        chosen = {tiles.tiles_by_rule(target, routes, 0, 64, 2048, 768, itemsize) for routes in kept}
        varies = target.wgmma and itemsize < 4
        assert (len(chosen) > 1) is varies
        assert all(layer.block_size for layer in chosen)
        if varies:  # a left operand of at least 64 rows
            assert all((tile.n if tile.swap else tile.m) >= 64 for layer in chosen for tile in layer[1:])
        for_rows = {gradients.select_gradient_tiles(target, 64 * rows, 64, itemsize, True).rows.n for rows in (1, 500)}
        assert len(for_rows) == 1  # as many partial sums for a routing weight


@pytest.mark.parametrize("quantized", [False, True])
def test_tiles_are_of_the_routes_that_are_likely_to_have_an_expert_here(quantized):
    """One of eight ranks that each send 64 tokens: with all experts, in the fixed room of an exchange, with a map."""
    target = H200._replace(fp8=True, wgmma=True)
    dtype = torch.float8_e4m3fn if quantized else torch.bfloat16
    gate_up, down = (torch.empty(32, *size, dtype=dtype, device="meta") for size in ((2048, 7168), (7168, 1024)))
    layer = ExpertWeights(gate_up, down, quantized=(None, None) if quantized else None)

    def selected(rows, top_k, experts_here=None, ids=torch.int16, **options):
        new = functools.partial(torch.empty, device="meta")
        local = None if experts_here is None else new(experts_here, dtype=torch.int32)
        routes = Routes(new(rows, top_k), new(rows, top_k, dtype=ids), local)
        x = new(rows, 7168, dtype=torch.bfloat16)
        return tiles.select_tiles(x, layer, routes, target=target, **options)

    likely = selected(64, 8)
    assert selected(8 * 64 * 8, 1) != likely
    assert selected(8 * 64 * 8, 1, expected_routes=64 * 8) == likely
    assert selected(8 * 64, 8, 256) == likely
    assert selected(8 * 64, 8, 256, expected_routes=8 * 64 * 8) == selected(8 * 64, 8)
    assert selected(64, 8, expected_routes=10**9) == likely
    assert selected(8 * 64 * 8, 1, expected_routes=0).block_size == 16
    assert selected(1, 8, 256).first == selected(1, 8).first  # measured with all experts
    assert selected(8, 1, ids=torch.int32, expected_routes=1).block_size == 16  # never a tile for each of the rows
    assert selected(1, 8, ids=torch.int32, expected_routes=1) == selected(1, 8, ids=torch.int32)
    pinned = {"batch_invariant": True}
    assert selected(8 * 64 * 8, 1, expected_routes=64 * 8, **pinned) == selected(64, 8, **pinned)


def test_a_faster_memory_makes_launches_persistent_at_fewer_rows():
    """Where products take the time, not weights: benchmarks/trials.csv has the measurements."""
    cards = {name: H200._replace(bandwidth=rate) for name, rate in (("H100", 3.35), ("H200", 4.9), ("unknown", 0.0))}
    from_rows = {}
    for name, target in cards.items():
        chosen = {rows: tiles.tiles_by_rule(target, 64 * rows, 8, 64, 4096, 1024, 2) for rows in range(49, 300)}
        assert all(bool(each.first.ctas) != bool(each.first.half_tile_rows) for each in chosen.values())
        from_rows[name] = min(rows for rows, each in chosen.items() if each.first.ctas)
        assert all(bool(each.first.ctas) == (rows >= from_rows[name]) for rows, each in chosen.items())
    assert from_rows == {"H100": 158, "H200": 108, "unknown": 108}


def test_the_tiles_of_very_few_routes_leave_few_multiprocessors_without_work():
    few, more = (tiles.tiles_by_rule(H200, routes, 1, 4, 4096, 14336, 2) for routes in (2, 3))
    assert (few.block_size, few.second.n, more.second.n) == (16, 64, 128)
    assert few[1:] == tiles.tiles_by_rule(H200, 2, 2, 8, 4096, 14336, 2)[1:]  # those of one token
    assert tiles.tiles_by_rule(H200, 1000, 1, 1, 2048, 1024, 2).block_size == 128  # one expert with many rows


@gpu
def test_gpu_its_bandwidth_is_known():
    target = tiles.target_of(torch.device("cuda", 0))
    assert 0.1 < target.bandwidth < 20
    if target.name.startswith("NVIDIA H"):
        assert 2 < target.bandwidth < 6


def test_a_layer_without_experts_or_tokens_has_tiles():
    for shape, tokens in (((0, 2, 64, 32), 3), ((0, 2, 64, 32), 0), ((8, 2, 64, 32), 0), ((8, 2, 64, 0), 3)):
        for target in (H200, A100):
            selected, launches = planned(shape, tokens, target=target)
            assert selected.first.m in tiles.BLOCK_SIZES
            assert len(launches) == 3


# ---- compiling ahead -------------------------------------------------------------------------------------------------


#: gpt-oss, and every other operation that a gate may have.
GATES = [Gate(limit=7.0, alpha=1.702, offset=1.0, interleaved=True), Gate("situ"), Gate(limit=7.0, limit_after=True)]


def every_configuration():
    """Every rule on Hopper and before, every dtype, sizes that tiles do not divide, transposed weights, biases."""
    for tokens in (1, 16, 256, 512, 1024, 4096):
        yield from planned(SHAPES[0], tokens)[1]
    yield from planned(SHAPES[1], 1)[1][:2]
    for tokens in (1, 256, 4096):
        yield from planned(SHAPES[0], tokens, target=A100)[1][:2]
    yield from planned(SHAPES[2], 64, transposed=True, bias=True)[1][:2]
    yield from planned(SHAPES[2], 300, dtype=torch.float32)[1]
    yield from planned((7, 3, 100, 77), 50, dtype=torch.float16)[1]
    yield from planned((7, 3, 100, 77), 50, dtype=torch.float16, target=A100, bias=True)[1]
    for tokens, size in ((4, 128), (180, 128), (200, 64), (200, 16), (4000, 64)):
        yield product_with_blocks(tokens, size, gated=True)
    yield from planned(SHAPES[0], 512, block_size=128)[1][:2]
    yield from planned(SHAPES[1], 1, block_size=128)[1][:2]
    for target in (H200, A100):
        for tokens in (16, 512, 4096):
            yield from planned_gradients(SHAPES[0], tokens, target=target)
        yield from planned_gradients(SHAPES[2], 600, target=target, transposed=True, bias=True, recompute=True)
        yield from planned_gradients((7, 3, 100, 77), 500, target=target, dtype=torch.float16, bias=True)
    for gate in GATES:
        for tokens in (256, 4096):
            yield planned(SHAPES[2], tokens, bias=True, activation=gate.text)[1][0]
        yield planned(SHAPES[2], 300, target=A100, transposed=True, bias=True, activation=gate.text)[1][0]
        yield planned_gradients(SHAPES[2], 600, activation=gate.text)[0]
    yield planned(SHAPES[2], 300, transposed=True, bias=True, activation=GATES[0].text)[1][0]
    yield from planned_gradients(SHAPES[0], 4096, buffers=True)
    yield from planned_gradients((7, 3, 100, 77), 50, dtype=torch.float32, bias=True)


def product_with_blocks(tokens, size, gated):
    """What grouped_gemm launches over a layout of blocks of `size`."""
    count, top_k, hidden, inner = 16, 4, 128, 64
    new = lambda *size, dtype=torch.bfloat16: torch.empty(size, dtype=dtype)  # noqa: E731
    parts = [new(each, dtype=torch.int32) for each in capacity(tokens * top_k, block_size=size, num_experts=count)[:3]]
    layout = BlockLayout(*parts, block_size=size)
    a, b, out = new(tokens, hidden), new(count, 2 * inner, hidden), new(tokens * top_k, inner if gated else 2 * inner)
    weights = new(tokens, top_k, dtype=torch.float32)
    name = "silu" if gated else None
    return launch.product_launches(Product(a, b, layout, top_k, weights, None, name, gated, False), out, H200)[0]


def targets_of(one):
    """Those of this run that may launch it."""
    if one.module == "gradient_kernels" and one.num_stages == 2:
        return TARGETS
    hopper = one.pdl or one.module == "gradient_kernels"
    return [each for each in TARGETS if hopper == (each[0] == "cuda" and each[1] >= 90)]


@functools.cache
def distinct():
    seen = {}
    for one in every_configuration():
        kinds = tuple((kind_of(a), isinstance(a, int) and (a == 1, a % 16 == 0)) for a in one.arguments)
        if targets_of(one):
            seen[one.kernel, kinds, tuple(one.constants.items()), one.num_warps, one.num_stages] = one
    return compiled_here(seen.values(), lambda one: one.kernel)


def compile_one(number):
    """Compile one configuration for its targets; it waits for the previous kernel before it accesses memory."""
    one = distinct()[number]
    for arch, binary in compile_launch(kernel_of(one), one, targets_of(one)):
        if arch == 90 and one.constants.get("B_TMA") and (one.constants["BLOCK_M"] >= 64 or one.constants.get("SWAP")):
            assert "wgmma.mma_async" in binary.asm["ptx"], "Hopper's matrix instruction is used"
        if arch == 90 and one.pdl and disassembler():
            assert touched_before_the_wait(binary.asm["cubin"]) == [], f"{one.kernel} {one.constants}"


# ---- on a GPU --------------------------------------------------------------------------------------------------------


def layer_of(tokens, top_k, count, hidden, inner, seed=0, bias=False):
    from cases.experts import random_layer

    *layer, ids, biases = random_layer(tokens, top_k, count, hidden, inner, dtype=torch.bfloat16, seed=seed, bias=bias)
    biases = [each.cuda() for each in biases] if bias else [None, None]
    return [each.cuda() for each in layer], ids.cuda(), {"gate_up_bias": biases[0], "down_bias": biases[1]}


def reference(layer, ids, extra, **options):
    """The packed path, in float64."""
    from moealign import fused_moe

    wide = {name: None if each is None else each.double() for name, each in extra.items()}
    return fused_moe(*(each.double() for each in layer), ids, **wide, **options, backend="packed")


GPU_SIZES = [
    (1, 8, 64, 256, 128),  # one tile per route
    (2, 2, 40, 128, 64),
    (16, 8, 64, 256, 128),
    (100, 4, 16, 200, 72),  # sizes that tiles do not divide, still in multiples of 16 bytes
    (100, 4, 16, 100, 77),  # not even that
    (300, 4, 32, 256, 128),
    (1000, 2, 8, 256, 128),
    (3000, 2, 8, 512, 256),
]


@gpu
@pytest.mark.parametrize("size", GPU_SIZES)
@pytest.mark.parametrize("bias", [False, True])
def test_gpu_equals_float64(size, bias):
    from cases.experts import relative_error

    from moealign import fused_moe

    layer, ids, extra = layer_of(*size, bias=bias)
    ids[-1, 0] = size[2]
    got = fused_moe(*layer, ids, **extra)
    assert relative_error(got, reference(layer, ids, extra)) < 1e-2
    assert torch.equal(got, fused_moe(*layer, ids, **extra)), "the same bits every time"


@gpu
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_gpu_block_sizes_maps_and_callables(block_size):
    from cases.experts import relative_error

    from moealign import fused_moe

    layer, ids, extra = layer_of(200, 4, 8, 128, 64, bias=True)
    expert_map = torch.tensor([0, -1, 2, 3, 9, 1, -1, 4, 5, -1, 6, 7], device="cuda")
    layer[0][190:] = float("nan")
    options = {"expert_map": expert_map, "num_valid_tokens": torch.tensor([190], dtype=torch.int32, device="cuda")}
    got = fused_moe(*layer, ids, **extra, **options, block_size=block_size)
    assert relative_error(got, reference(layer, ids, extra, **options)) < 1e-2
    assert not got[190:].any()

    def gate(rows):
        return torch.tanh(rows[:, ::2]) * rows[:, 1::2]

    got = fused_moe(*layer, ids, **extra, **options, activation=gate, block_size=block_size)
    assert relative_error(got, reference(layer, ids, extra, **options, activation=gate)) < 1e-2


@gpu
def test_gpu_one_tile_per_route_gives_the_bits_of_the_aligned_path():
    import moealign

    layer, ids, _ = layer_of(2, 8, 256, 512, 256)
    weights, routes = ExpertWeights(*layer[1:3]), Routes(layer[3], ids)
    selected = tiles.select_tiles(layer[0], weights, routes)
    assert selected.block_size == 0
    layout = moealign.align(ids, block_size=16, num_experts=256, positions=True)
    got = [launch.run_layer(selected, layer[0], weights, routes, each, "silu") for each in (None, layout)]
    assert torch.equal(*got)


@gpu
@pytest.mark.parametrize("size", [(2, 8, 64, 256, 128), (300, 4, 16, 256, 128)])
def test_gpu_in_a_graph_and_without_a_wait(size):
    from moealign import fused_moe

    layer, ids, _ = layer_of(*size)
    fused_moe(*layer, ids)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused_moe(*layer, ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fused_moe(*layer, ids)
    for seed in range(3):
        other, new_ids, _ = layer_of(*size, seed=seed)
        layer[0].copy_(other[0])
        ids.copy_(new_ids)
        graph.replay()
        assert torch.equal(out, fused_moe(*layer, ids))


@gpu
def test_gpu_a_server_that_is_warm_compiles_nothing():
    """After one number of tokens, others with the same tiles compile nothing, however their tensors are aligned."""
    from moealign import fused_moe
    from moealign.experts import kernels

    def compiled():
        return sum(len(each[0]) for one in (kernels.gemm, kernels.sum_rows) for each in one.device_caches.values())

    layer, _, _ = layer_of(40, 8, 128, 256, 128)
    plans, before = set(), compiled()
    for tokens in range(16, 41):
        ids = torch.stack([torch.randperm(128, device="cuda")[:8] for _ in range(tokens)]).int()
        call = (layer[0][:tokens], *layer[1:3], layer[3][:tokens], ids)
        plans.add(tiles.select_tiles(call[0], ExpertWeights(*call[1:3]), Routes(call[3], ids)))
        fused_moe(*call)
        torch.cuda.synchronize()
        assert compiled() - before <= 3 * len(plans), tokens


def gradients_of(inputs, ids, cast=torch.bfloat16, **options):
    """The gradients of a layer's inputs, None for biases that there are not."""
    from moealign import fused_moe

    leaves = [None if each is None else each.detach().to(cast).requires_grad_() for each in inputs]
    out = fused_moe(*leaves[:4], ids, gate_up_bias=leaves[4], down_bias=leaves[5], **options)
    (out * torch.linspace(-1, 1, out.shape[1], device=out.device, dtype=cast)).sum().backward()
    return [None if each is None else each.grad for each in leaves]


@gpu
@pytest.mark.parametrize("size", GPU_SIZES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gpu_gradients_against_float64(size, bias, dtype):
    from cases.experts import relative_error

    layer, ids, extra = layer_of(*size, bias=bias)
    ids[-1, 0] = size[2]
    inputs = [*layer, *extra.values()]
    got, want = gradients_of(inputs, ids, dtype), gradients_of(inputs, ids, torch.float64)
    for one, other in zip(got, want, strict=True):
        assert other is None or relative_error(one, other) < (1e-5 if dtype is torch.float32 else 2e-2)
    for one, other in zip(got, gradients_of(inputs, ids, dtype), strict=True):
        assert other is None or torch.equal(one, other), "the same bits every time"
    again = gradients_of(inputs, ids, dtype, recompute=True)
    for one, other in zip(again, want, strict=True):
        assert other is None or relative_error(one, other) < (1e-5 if dtype is torch.float32 else 2e-2)


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gpu_gradients_are_added_to_buffers(dtype):
    from cases.experts import relative_error

    layer, ids, extra = layer_of(300, 4, 16, 256, 128)
    inputs = [*layer, *extra.values()]
    buffers = tuple(torch.ones_like(each, dtype=dtype) for each in layer[1:3])
    got, want = gradients_of(inputs, ids, weight_grads=buffers), gradients_of(inputs, ids, torch.float64)
    assert got[1] is None
    assert got[2] is None
    for buffer, one in zip(buffers, want[1:3], strict=True):
        assert relative_error(buffer, one + 1) < 2e-2


@gpu
@pytest.mark.parametrize("size", [(2, 8, 64, 256, 128), (300, 4, 16, 256, 128)])
def test_gpu_a_training_step_in_a_graph(size):
    """Forward, backward and optimiser are captured, replayed with other routes, and equal the eager step."""
    from moealign import fused_moe

    def start():
        layer, ids, _ = layer_of(*size)
        layer = [each.requires_grad_() for each in layer]
        return layer, ids, torch.optim.SGD(layer[1:3], lr=0.1, foreach=False)

    def step(layer, ids, optimiser):
        for each in layer:
            each.grad = None
        fused_moe(*layer, ids).square().mean().backward()
        optimiser.step()

    captured, eager = start(), start()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(*captured)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(*captured)
    step(*eager)  # the warm-up; capturing computes nothing
    for seed in range(3):
        other, ids, _ = layer_of(*size, seed=seed)
        for each, _, _ in (captured, eager):
            each[0].data.copy_(other[0])
        captured[1].copy_(ids)
        eager[1].copy_(ids)
        graph.replay()
        step(*eager)
        for one, same in zip(captured[0], eager[0], strict=True):
            assert torch.equal(one, same)
            assert torch.equal(one.grad, same.grad)


@gpu
@pytest.mark.parametrize("tokens", [1, 2, 64, 4096])
def test_gpu_a_buffer_and_the_rows_in_place_get_the_same_bits(tokens):
    from moealign import fused_moe

    (x, *rest), ids, _ = layer_of(tokens, 4, 16, 256, 128)
    want = fused_moe(x, *rest, ids)
    for _ in range(20):
        out, rows = torch.full_like(x, float("nan")), x.clone()
        assert fused_moe(x, *rest, ids, out=out) is out
        assert fused_moe(rows, *rest, ids, out=rows) is rows
        assert torch.equal(out, want)
        assert torch.equal(rows, want)


@gpu
@pytest.mark.parametrize("tokens", [500, 6000])  # tiles of 128 rows, halved and not, and of 64 for the parts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gpu_a_token_does_not_depend_on_its_batch(dtype, tokens):
    from moealign import fused_moe

    layer, ids, _ = layer_of(tokens, 4, 16, 256, 600)
    x, gate_up, down, weights = (each.to(dtype) for each in layer)
    grad = torch.randn_like(x)

    def step(rows):
        leaves = [x[rows].clone().requires_grad_(), weights[rows].clone().requires_grad_()]
        out = fused_moe(leaves[0], gate_up, down, leaves[1], ids[rows], batch_invariant=True)
        return [out, *torch.autograd.grad(out, leaves, grad[rows])]

    whole = step(torch.arange(tokens, device="cuda"))
    for size in (1, 2, 9, 64, 300):
        for rows in torch.randperm(tokens, device="cuda").split(size)[:5]:
            for one, every in zip(step(rows), whole, strict=True):
                assert torch.equal(one, every[rows])


@gpu
@pytest.mark.parametrize("shape", [(300, 8, 64, 2048, 768), (300, 2, 8, 4096, 2048), (100, 8, 16, 7168, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gpu_every_tile_of_a_batch_invariant_layer_gives_the_same_bits(shape, dtype, monkeypatch):
    from moealign import fused_moe
    from moealign.experts import operators

    layer, ids, _ = layer_of(*shape)
    layer = [each.to(dtype) for each in layer]
    whole = fused_moe(*layer, ids, batch_invariant=True)
    target = tiles.target_of(whole.device)
    for rows in (48, 60, 100, 150, 250, 1000):
        routes = tiles.invariant_routes(target, rows * shape[2], shape[2], 2)
        chosen = tiles.tiles_by_rule(target, routes, 0, *shape[2:], 2)
        monkeypatch.setattr(operators, "select_tiles", lambda *_, chosen=chosen, **__: chosen)
        assert torch.equal(fused_moe(*layer, ids), whole)


@gpu
def test_gpu_a_training_step_keeps_one_tensor():
    layer, ids, _ = layer_of(300, 4, 16, 256, 128)
    inputs, own, kept = [each.requires_grad_() for each in layer], {each.data_ptr() for each in (*layer, ids)}, []

    def pack(tensor):
        kept.extend([tuple(tensor.shape)] if tensor.data_ptr() not in own else [])
        return tensor

    from moealign import fused_moe

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each):
        fused_moe(*inputs, ids)
        assert kept == [(1200, 256)]
        kept.clear()
        fused_moe(*inputs, ids, recompute=True)
        assert not kept


@gpu
def test_gpu_a_compiled_training_step_is_one_graph():
    from cases.experts import relative_error

    from moealign import fused_moe

    layer, ids, extra = layer_of(300, 4, 16, 256, 128, bias=True)
    inputs = [*layer, *extra.values()]
    leaves = [each.detach().requires_grad_() for each in inputs]
    compiled = torch.compile(fused_moe, fullgraph=True)
    out = compiled(*leaves[:4], ids, gate_up_bias=leaves[4], down_bias=leaves[5])
    (out * torch.linspace(-1, 1, out.shape[1], device=out.device, dtype=out.dtype)).sum().backward()
    for one, other in zip(leaves, gradients_of(inputs, ids, torch.float64), strict=True):
        assert relative_error(one.grad, other) < 2e-2


@gpu
def test_gpu_one_product_and_torch_compile():
    from cases.experts import relative_error

    import moealign
    from moealign import fused_moe, grouped_gemm

    layer, ids, extra = layer_of(200, 4, 16, 128, 64, bias=True)
    layout = moealign.align(ids, block_size=64, num_experts=16)
    options = {"top_k": 4, "row_weights": layer[3], "bias": extra["gate_up_bias"], "activation": "silu_mul"}
    wide = {name: each.double() if isinstance(each, torch.Tensor) else each for name, each in options.items()}
    got = grouped_gemm(layer[0], layer[1], layout, **options)
    want = grouped_gemm(layer[0].double(), layer[1].double(), layout, **wide)
    assert relative_error(got, want) < 1e-2
    compiled = torch.compile(fused_moe, fullgraph=True)
    assert torch.equal(compiled(*layer, ids, **extra), fused_moe(*layer, ids, **extra))


if __name__ == "__main__":
    compile_in_processes(compile_one, distinct)
