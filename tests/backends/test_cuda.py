"""What only a GPU can show of the CUDA backend: graphs, streams, devices, threads, every path against the oracle."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import pytest
import torch
from helpers import in_threads, run_python

import moealign
from moealign.calls import prepared
from moealign.layout import EXTRAS, OUTPUTS, BlockLayout, Capacity, capacity, capacity_batched
from moealign.testing import assert_same_layout, expected_layout, oracle_align, oracle_align_batched, poisoned

cuda = importlib.import_module("moealign.backend.cuda")

pytestmark = pytest.mark.skipif(cuda.unavailable() is not None, reason=str(cuda.unavailable()))

DEVICE = torch.device("cuda:0")
BATCHED_EXTRAS = ("expert_counts", "expert_offsets", "group_ends", "positions", "block_rows")
ALL = dict.fromkeys(BATCHED_EXTRAS, True)

#: Every path, and both sides of the sizes at which one takes over from another.
ROUTES = (1, 8, 63, 64, 65, 127, 128, 129, 1000, 5000, 7000, 8193, 16384, 16385, 32768, 32769, 200000)
EXPERTS = (8, 256, 512, 3000, 65536)
BATCHED = (
    (8, 128, 16),
    (32, 512, 64),
    (33, 7, 3),
    (64, 512, 64),
    (256, 256, 64),
    (257, 8, 4),
    (1024, 1, 1),
    (5000, 8, 4),
)


def some_ids(routes: int, experts: int, seed: int = 0, top_k: int = 1) -> torch.Tensor:
    """Ids from -2 to a little past the experts."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, experts + 2, (routes // top_k, top_k), generator=generator, dtype=torch.int32)


def some_map(experts: int) -> torch.Tensor:
    """Every other expert is on this rank."""
    return torch.where(torch.arange(experts) % 2 == 0, torch.arange(experts) // 2, -1).to(torch.int32)


def tensors(layout: BlockLayout) -> list[torch.Tensor]:
    return [getattr(layout, name) for name in OUTPUTS if getattr(layout, name) is not None]


# --------------------------------------------------------------------------------------------------------- the oracle


@pytest.mark.parametrize("routes", ROUTES)
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("mapped", ["plain", "map", "ignore"])
def test_every_path_is_the_oracles(routes, experts, mapped):
    ids = some_ids(routes, experts)
    options: dict[str, object] = {"block_size": 16, "num_experts": experts}
    if mapped != "plain":
        options |= {"expert_map": some_map(experts), "ignore_invalid_experts": mapped == "ignore"}
    expected = oracle_align(ids, **options)
    extras = {**ALL, "scatter_idx": mapped != "map"}
    options = {key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    for chosen in (extras, {}):
        word = moealign.new_error_word(DEVICE)
        layout = moealign.align(ids.to(DEVICE), **options, **chosen, error_word=word, backend="cuda")
        assert_same_layout(layout, expected)
        assert word.tolist() == expected["error_word"]


@pytest.mark.parametrize("routes", [12001, 40000, 200003])
@pytest.mark.parametrize("experts", [1, 8, 256, 600, 2048, 4096])
@pytest.mark.parametrize("mapped", ["plain", "map", "ignore"])
@pytest.mark.parametrize("shared", [99, 227], ids="{} KiB".format)
def test_tiles_are_the_oracles(routes, experts, mapped, shared, monkeypatch):
    """The path of more routes than fit the grid, at sizes that a loop in Python can check."""
    align_ = sys.modules["moealign.backend.cuda.align"]
    path_of, taken = align_.path_of, []

    def smaller(problem, multiprocessors, max_shared, max_cluster):
        taken.append(path_of(problem, multiprocessors, min(max_shared, 1024 * shared), max_cluster))
        return taken[-1]

    monkeypatch.setattr(prepared, "cached", {})
    monkeypatch.setattr(align_, "path_of", smaller)
    monkeypatch.setattr(align_, "_independent", lambda *facts: None)
    monkeypatch.setattr(align_, "_grid", lambda *facts: None)
    dtype, poison = (torch.int64, -7) if mapped == "ignore" else (torch.int32, 123456)
    ids = some_ids(routes, experts).to(dtype)
    options: dict[str, object] = {"block_size": 16, "num_experts": experts}
    if mapped != "plain":
        options |= {"expert_map": some_map(experts), "ignore_invalid_experts": mapped == "ignore"}
        options |= {"num_valid_tokens": torch.tensor([routes - routes // 5], dtype=torch.int32)}
    expected = oracle_align(ids, **options)
    options = {key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    for chosen in ({**ALL, "scatter_idx": mapped != "map"}, {}):
        word = moealign.new_error_word(DEVICE)
        sizes = capacity(routes, block_size=16, num_experts=experts)
        out = poisoned(sizes, tuple(name for name, wanted in chosen.items() if wanted), DEVICE, poison)
        layout = moealign.align(ids.to(DEVICE), **options, **chosen, error_word=word, out=out, backend="cuda")
        assert_same_layout(layout, expected)
        assert word.tolist() == expected["error_word"]
    holds = 4096 if shared == 227 else 2048
    assert {path.name for path in taken} == {"tiles" if experts <= holds else "radix"}


@pytest.mark.parametrize("routes", [2**19 + 8, 2**20, 2**20 + 8, 3_000_000])
@pytest.mark.parametrize("experts", [8, 255, 256, 512, 1024, 4096])
def test_millions_of_routes_are_the_fast_oracles(routes, experts):
    ids = some_ids(routes, experts, top_k=8)
    layout = moealign.align(ids.to(DEVICE), block_size=64, num_experts=experts, **ALL, backend="cuda")
    expected = expected_layout(
        ids.flatten().numpy(), block_size=64, num_experts=experts, length=layout.sorted_token_ids.numel()
    )
    for name in ("sorted_token_ids", "expert_ids", "num_tokens_post_padded", *BATCHED_EXTRAS):
        assert torch.equal(getattr(layout, name).cpu().long(), torch.from_numpy(expected[name]).long()), name


@pytest.mark.parametrize("routes", [1000, 4096, 5000, 12000, 12001, 40000])
@pytest.mark.parametrize("experts", [8, 256, 5000])
def test_devices_without_clusters_have_paths_of_their_own(routes, experts, monkeypatch):
    """What sm_80 and sm_89 take, run here: the same source, the same sizes, no cluster anywhere."""
    align_ = sys.modules["moealign.backend.cuda.align"]
    taken = []
    path_of = align_.path_of
    monkeypatch.setattr(align_, "_cluster_sizes", lambda major: (1,))
    monkeypatch.setattr(prepared, "cached", {})
    monkeypatch.setattr(align_, "path_of", lambda *facts: taken.append(path_of(*facts)) or taken[-1])
    ids = some_ids(routes, experts)
    layout = moealign.align(ids.to(DEVICE), block_size=16, num_experts=experts, **ALL, backend="cuda")
    assert_same_layout(layout, oracle_align(ids, block_size=16, num_experts=experts))
    assert [path.cluster for path in taken] == [1]


@pytest.mark.parametrize(("batches", "slots", "block_size"), BATCHED)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8], ids=str)
def test_batched_is_the_oracles(batches, slots, block_size, dtype):
    counts = torch.randint(-3 if dtype.is_signed else 0, min(slots + 3, 255), (batches,)).to(dtype)
    expected = oracle_align_batched(counts, max_tokens_per_batch=slots, block_size=block_size)
    for poison, chosen in ((-7, ALL), (123456, {})):
        word = moealign.new_error_word(DEVICE)
        sizes = capacity_batched(slots, block_size=block_size, num_batches=batches)
        out = poisoned(sizes, tuple(chosen), DEVICE, poison)
        layout = moealign.align_batched(
            counts.to(DEVICE),
            max_tokens_per_batch=slots,
            block_size=block_size,
            **chosen,
            error_word=word,
            out=out,
            backend="cuda",
        )
        assert_same_layout(layout, expected)
        assert word.tolist() == expected["error_word"]


@pytest.mark.parametrize("batches", [8, 64])
def test_another_number_of_slots_compiles_nothing(batches):
    launch = importlib.import_module("moealign.backend.cuda.launch")
    counts = torch.randint(0, 40, (batches,), dtype=torch.int32)

    def call(slots: int) -> None:
        layout = moealign.align_batched(
            counts.to(DEVICE), max_tokens_per_batch=slots, block_size=8, **ALL, backend="cuda"
        )
        assert_same_layout(layout, oracle_align_batched(counts, max_tokens_per_batch=slots, block_size=8))

    call(32)
    compiled = len(launch._kernels)
    for slots in (1, 2, 3, 7, 31, 33, 64, 100, 1000):
        call(slots)
    assert len(launch._kernels) == compiled


def test_batched_rows_up_to_the_last_of_int32():
    slots = 2**31 - 1
    if torch.cuda.mem_get_info(DEVICE)[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB")
    counts = torch.tensor([slots - 1], device=DEVICE)
    layout = moealign.align_batched(counts, max_tokens_per_batch=slots, block_size=1, backend="cuda")
    assert layout.num_tokens_post_padded.tolist() == [slots - 1]
    assert layout.sorted_token_ids[-100:].tolist() == [*range(slots - 100, slots - 1), slots]
    assert layout.expert_ids[-100:].tolist() == [0] * 99 + [-1]


def test_the_largest_blocks_where_there_is_no_row():
    for block_size in (2**30, 2**31 - 1):
        layout = moealign.align(
            some_ids(0, 64).to(DEVICE), block_size=block_size, num_experts=64, expert_offsets=True, backend="cuda"
        )
        assert layout.num_tokens_post_padded.tolist() == [0]
        assert layout.expert_offsets.tolist() == [0] * 65
        counts = torch.zeros(5, dtype=torch.int32, device=DEVICE)
        layout = moealign.align_batched(
            counts, max_tokens_per_batch=0, block_size=block_size, expert_offsets=True, backend="cuda"
        )
        assert layout.num_tokens_post_padded.tolist() == [0]
        assert layout.expert_offsets.tolist() == [0] * 6


# ------------------------------------------------------------------------------------------------------------- graphs


@pytest.mark.parametrize("routes", [8, 64, 1024, 8192, 40000])
def test_a_graph_replays_with_other_ids_and_another_valid_count(routes):
    ids = some_ids(routes, 64, top_k=8).to(DEVICE)
    valid = torch.tensor([routes // 8], dtype=torch.int32, device=DEVICE)
    arguments = {"block_size": 16, "num_experts": 64, "num_valid_tokens": valid, "backend": "cuda"}
    moealign.align(ids, **arguments, **ALL)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layout = moealign.align(ids, **arguments, **ALL)
    for seed, count in ((1, routes // 8), (2, routes // 16), (3, 0), (4, routes), (5, -1)):
        ids.copy_(some_ids(routes, 64, seed, top_k=8))
        valid.fill_(count)
        graph.replay()
        expected = oracle_align(ids.cpu(), block_size=16, num_experts=64, num_valid_tokens=count)
        assert_same_layout(layout, expected)


def test_a_batched_graph_replays_with_other_counts():
    counts = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    arguments = {"max_tokens_per_batch": 32, "block_size": 16, "backend": "cuda"}
    moealign.align_batched(counts, **arguments, **ALL)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layout = moealign.align_batched(counts, **arguments, **ALL)
    for seed in range(5):
        torch.manual_seed(seed)
        counts.copy_(torch.randint(0, 40, (64,), dtype=torch.int32))
        graph.replay()
        assert_same_layout(layout, oracle_align_batched(counts.cpu(), max_tokens_per_batch=32, block_size=16))


IN_A_NEW_PROCESS = """
import torch, moealign
from moealign.testing import assert_same_layout, oracle_align, oracle_align_batched
ids = torch.randint(0, 61, ({routes} // 8, 8), dtype=torch.int32, device="cuda")
counts = torch.tensor([3, 0, 8], dtype=torch.int32, device="cuda")
{body}
torch.cuda.synchronize()
assert_same_layout(layout, oracle_align(ids.cpu(), block_size=16, num_experts=61))
assert_same_layout(batched, oracle_align_batched(counts.cpu(), max_tokens_per_batch=8, block_size=4))
"""
CALLS = """
    layout = moealign.align(ids, block_size=16, num_experts=61, positions=True, backend="cuda")
    batched = moealign.align_batched(counts, max_tokens_per_batch=8, block_size=4, backend="cuda")
"""
CAPTURE_FIRST = f"graph = torch.cuda.CUDAGraph()\nwith torch.cuda.graph(graph):{CALLS}\ngraph.replay()"
THREAD_FIRST = f"""
import threading
def work():
    global layout, batched
    with torch.cuda.stream(torch.cuda.Stream()):{CALLS.replace(chr(10) + "    ", chr(10) + "        ")}
torch.cuda.synchronize()
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


@pytest.mark.parametrize("routes", [64, 1024, 10000, 40000])
@pytest.mark.parametrize("body", [CAPTURE_FIRST, THREAD_FIRST], ids=["capture", "thread"])
@pytest.mark.parametrize("cache", ["cold", "warm"])
def test_the_very_first_call(routes, body, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("MOEALIGN_CACHE_DIR", str(tmp_path / "cache"))
    for _ in range(1 if cache == "cold" else 2):
        run_python(IN_A_NEW_PROCESS.format(routes=routes, body=body))


# ------------------------------------------------------------------------------------- streams, threads and devices


@pytest.mark.parametrize("routes", [64, 1024, 10000, 40000])
def test_two_streams_at_once(routes):
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    ids = [some_ids(routes, 64, seed).to(DEVICE) for seed in range(2)]
    expected = [oracle_align(each.cpu(), block_size=16, num_experts=64) for each in ids]
    torch.cuda.synchronize()
    layouts: list[list[BlockLayout]] = [[], []]
    for _ in range(50):
        for which, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                layout = moealign.align(ids[which], block_size=16, num_experts=64, **ALL, backend="cuda")
                layouts[which].append(layout)
    torch.cuda.synchronize()
    for which in range(2):
        assert_same_layout(layouts[which][0], expected[which])
        for layout in layouts[which][1:]:
            assert all(torch.equal(a, b) for a, b in zip(tensors(layout), tensors(layouts[which][0]), strict=True))


def test_threads():
    def work(seed: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for routes in (16, 100, 2000, 20000):
                ids = some_ids(routes, 32, seed)
                expected = oracle_align(ids, block_size=8, num_experts=32)
                on_gpu = ids.to(DEVICE)
                for _ in range(5):
                    layout = moealign.align(on_gpu, block_size=8, num_experts=32, **ALL, backend="cuda")
                    assert_same_layout(layout, expected)

    in_threads(work, 4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
@pytest.mark.parametrize("routes", [64, 1024, 10000, 40000])
def test_a_device_that_is_not_the_current_one(routes):
    ids = some_ids(routes, 64)
    counts = torch.tensor([3, 0, 8], dtype=torch.int32)
    with torch.cuda.device(0):
        layout = moealign.align(ids.to("cuda:1"), block_size=16, num_experts=64, **ALL, backend="cuda")
        batched = moealign.align_batched(counts.to("cuda:1"), max_tokens_per_batch=8, block_size=4, backend="cuda")
        assert torch.cuda.current_device() == 0
    assert layout.sorted_token_ids.device == torch.device("cuda:1")
    assert_same_layout(layout, oracle_align(ids, block_size=16, num_experts=64))
    assert_same_layout(batched, oracle_align_batched(counts, max_tokens_per_batch=8, block_size=4))


IN_A_PART = """
import torch, moealign
from torch.cuda.green_contexts import GreenContext

def call(tokens, experts):
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(0, experts, (tokens, 8), generator=generator, dtype=torch.int32)
    asked = dict(block_size=128, num_experts=experts, positions=True, expert_offsets=True)
    layout = moealign.align(ids.cuda(), **asked, backend="cuda")
    torch.cuda.synchronize()
    expected = moealign.align(ids, **asked, backend="reference")
    for name in ("sorted_token_ids", "expert_ids", "num_tokens_post_padded", "positions", "expert_offsets"):
        assert torch.equal(getattr(layout, name).cpu(), getattr(expected, name)), (tokens, experts, name)

def route(tokens):
    generator = torch.Generator().manual_seed(tokens)
    logits = torch.randn(tokens, 128, generator=generator)
    asked = dict(block_size=128, mean_probability=True)
    _, ids, layout, mean = moealign.route(logits.cuda(), 8, **asked, backend="cuda")
    torch.cuda.synchronize()
    _, expected_ids, expected, expected_mean = moealign.route(logits, 8, **asked, backend="reference")
    assert torch.equal(ids.cpu(), expected_ids)
    assert torch.equal(layout.sorted_token_ids.cpu(), expected.sorted_token_ids)
    assert torch.allclose(mean.cpu(), expected_mean, rtol=1e-4, atol=1e-7)

def run():
    for tokens in (1, 16, 64, 1024, 4096, 8192, 65536, 131072):
        call(tokens, 256)
    call(1024, 65536)
    for tokens in (1, 64, 20000):
        route(tokens)

parts = [GreenContext.create(num_sms=sms, device_id=0) for sms in (32, 16)]
def run_in_a_part():
    for part in parts:
        part.set_context()
        try:
            run()
        finally:
            part.pop_context()
"""
GREEN = importlib.util.find_spec("torch.cuda.green_contexts") is not None and hasattr(torch._C, "_CUDAGreenContext")


@pytest.mark.skipif(not GREEN, reason="this torch has no green contexts")
@pytest.mark.parametrize("order", ["run(); run_in_a_part(); run()", "run_in_a_part(); run(); run_in_a_part()"])
def test_a_part_of_the_gpu_takes_every_size(order):
    run_python(f"{IN_A_PART}\n{order}")


@pytest.mark.skipif(not GREEN, reason="this torch has no green contexts")
def test_a_stream_of_a_part_takes_every_size():
    """The green context is the stream's alone; the current one has the whole device."""
    if not hasattr(torch._C._CUDAGreenContext, "Stream"):
        pytest.skip("this torch makes no streams of green contexts")
    run_python(f"{IN_A_PART}\nfor part in parts:\n    with torch.cuda.stream(part.Stream()):\n        run()\nrun()")


TWO_GRIDS = """
import torch, moealign
ids = [torch.randint(0, 256, (2**17 + 8, 8), device="cuda", dtype=torch.int32) for _ in range(2)]
call = lambda which: moealign.moe_align_block_size(ids[which], 128, 256, backend="cuda")
expected = [moealign.moe_align_block_size(each.cpu(), 128, 256, backend="reference") for each in ids]
streams = [torch.cuda.Stream() for _ in ids]
call(0)
torch.cuda.synchronize()
"""
ON_STREAMS = """
found = [None, None]
for i in range(500):
    with torch.cuda.stream(streams[i % 2]):
        found[i % 2] = call(i % 2)
torch.cuda.synchronize()
"""
IN_GRAPHS = """
graphs, found = [torch.cuda.CUDAGraph() for _ in ids], []
for which, graph in enumerate(graphs):
    with torch.cuda.graph(graph):
        found.append(call(which))
for i in range(500):
    with torch.cuda.stream(streams[i % 2]):
        graphs[i % 2].replay()
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("body", [ON_STREAMS, IN_GRAPHS], ids=["streams", "graphs"])
def test_two_grids_that_each_want_the_whole_gpu_end(body):
    """Above 524,288 routes a CTA takes a multiprocessor: two such grids are never there at once."""
    code = "for got, want in zip(found, expected, strict=True):\n"
    code += "    assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True))"
    run_python(TWO_GRIDS + body + code)


# -------------------------------------------------------------------------------------------- order, bounds and waits


@pytest.mark.parametrize("routes", [64, 1024, 10000, 40000])
def test_a_thousand_runs_are_identical(routes):
    ids = some_ids(routes, 64).to(DEVICE)
    first = moealign.align(ids, block_size=16, num_experts=64, **ALL, backend="cuda")
    same = torch.ones((), dtype=torch.bool, device=DEVICE)
    for _ in range(1000):
        again = moealign.align(ids, block_size=16, num_experts=64, **ALL, backend="cuda")
        for a, b in zip(tensors(first), tensors(again), strict=True):
            same &= (a == b).all()
    assert same.item()


def with_canaries(sizes: Capacity, wanted: tuple[str, ...], shift: int) -> tuple[BlockLayout, list[torch.Tensor]]:
    """Buffers for ``out=`` with 64 words on each side; `shift` moves them off their 16-byte alignment."""
    wide, inner = [], {}
    for name in ("sorted_token_ids", "expert_ids", "num_tokens_post_padded", *wanted):
        size = getattr(sizes, name)
        whole = torch.full((64 + size + 64,), 0x5A5A5A5A, dtype=torch.int32, device=DEVICE)
        view = whole[64 + shift : 64 + shift + size]
        inner[name] = view.view(-1, 1) if name == "scatter_idx" else view
        wide.append(whole)
    return BlockLayout(**inner), wide


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("call", [1, 64, 100, 1024, 4097, 8192, 40000, "few", "many"], ids=str)
def test_canaries_around_the_outputs_live(call, shift):
    if isinstance(call, int):
        ids = some_ids(call, 61).to(DEVICE)
        sizes = capacity(call, block_size=16, num_experts=61)
        out, wide = with_canaries(sizes, EXTRAS, shift)
        wanted = dict.fromkeys(EXTRAS, True)
        moealign.align(ids, block_size=16, num_experts=61, out=out, **wanted, backend="cuda")
        expected = oracle_align(ids.cpu(), block_size=16, num_experts=61)
    else:
        counts = torch.randint(-9, 99, (9 if call == "few" else 300,), device=DEVICE)
        sizes = capacity_batched(50, block_size=8, num_batches=counts.numel())
        out, wide = with_canaries(sizes, BATCHED_EXTRAS, shift)
        moealign.align_batched(counts, max_tokens_per_batch=50, block_size=8, out=out, **ALL, backend="cuda")
        expected = oracle_align_batched(counts.cpu(), max_tokens_per_batch=50, block_size=8)
    assert_same_layout(out, expected)
    for whole in wide:
        assert (whole[: 64 + shift] == 0x5A5A5A5A).all()
        assert (whole[whole.numel() - 64 + shift :] == 0x5A5A5A5A).all()


@pytest.mark.parametrize("routes", [64, 1024, 10000, 40000])
def test_no_call_waits_for_the_gpu(routes):
    ids = some_ids(routes, 64).to(DEVICE)
    valid = torch.tensor([5], dtype=torch.int32, device=DEVICE)
    counts = torch.tensor([3, 0, 8], dtype=torch.int32, device=DEVICE)
    word = moealign.new_error_word(DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):  # a first call compiles
            moealign.align(
                ids, block_size=16, num_experts=64, num_valid_tokens=valid, error_word=word, **ALL, backend="cuda"
            )
            moealign.align_batched(counts, max_tokens_per_batch=8, block_size=4, backend="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_failed_launch_says_what_failed():
    launch = importlib.import_module("moealign.backend.cuda.launch")
    batched = importlib.import_module("moealign.backend.cuda.batched")
    kernel = launch.kernel(batched.SOURCE, *batched.specialise(torch.int32, 4, 4, True), 0)
    with pytest.raises(
        RuntimeError, match=r"batched_few on cuda:0 with 1 CTAs of 4096 threads.*CUDA_ERROR_INVALID_VALUE"
    ):
        kernel.launch(1, 4096, 0, *[0] * 15)


# --------------------------------------------------------------------------------------------------- arithmetic alone

_ARITHMETIC = """
extern "C" __global__ void wrong(u64 *counts, i64 seed) {
    // Every reciprocal and every root that a router may need; quotients of random numbers.
    u32 reciprocals = 0, roots = 0, quotients = 0, random = (u32)seed + blockIdx.x * 1024u + threadIdx.x;
    for (u64 i = blockIdx.x * 1024ull + threadIdx.x; i < 0x7f800000ull; i += gridDim.x * 1024ull) {
        const float x = __uint_as_float((u32)i);
        if (x >= 1.f && x < __uint_as_float((127 + 126) << 23))
            reciprocals += __float_as_uint(reciprocal(x)) != __float_as_uint(__fdiv_rn(1.f, x));
        if (i >= 0x00800000ull) roots += __float_as_uint(root(x)) != __float_as_uint(__fsqrt_rn(x));
        random = random * 747796405u + 2891336453u;
        const u32 word = ((random >> ((random >> 28) + 4)) ^ random) * 277803737u;
        const float y = __uint_as_float((127u + (word >> 28) % 13u) << 23 | (word & 0x7fffff));
        if (x >= __uint_as_float((127 - 100) << 23) && x <= 1.f && y <= 4096.f)
            quotients += __float_as_uint(quotient(x, y, reciprocal(y))) != __float_as_uint(__fdiv_rn(x, y));
        const float t = exp32(-x), d = __fadd_rn(t, 2.f);
        quotients += __float_as_uint(quotient(t, d, reciprocal(d))) != __float_as_uint(__fdiv_rn(t, d));
    }
    atomicAdd(counts, (u64)reciprocals), atomicAdd(counts + 1, (u64)roots), atomicAdd(counts + 2, (u64)quotients);
}
"""


def test_the_router_divides_and_takes_roots_as_the_reference_does():
    compiler = importlib.import_module("moealign.backend.cuda.compile")
    launch = importlib.import_module("moealign.backend.cuda.launch")
    _, _, defines = next(importlib.import_module("moealign.backend.cuda.route").specialisations(9))
    major, minor = torch.cuda.get_device_capability(DEVICE)
    code = compiler.build(compiler.source("router.cuh") + _ARITHMETIC, "wrong", defines, f"sm_{major}{minor}")
    counts = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    launch.Kernel(code, "wrong", 0).launch(1024, 1024, 0, counts.data_ptr(), 1)
    assert counts.tolist() == [0, 0, 0]
