"""The figures behind the report: counted as the layout counts, and by the stated model."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from moealign import align, capacity, costs
from moealign.costs import H200, Experts, Machine
from moealign.errors import InvalidInput
from moealign.trace import Trace, example_trace, load_trace

TRACE = load_trace(example_trace())
EXPERTS = Path(__file__).parents[2] / "benchmarks" / "results" / "experts_h200.csv"
IDS = torch.tensor([[[0, 1], [0, 2], [0, -1]], [[3, 3], [3, 3], [1, 2]]])  # [2 layers, 3 tokens, 2]


def test_loads_by_example():
    assert costs.loads_of(IDS, 4).tolist() == [[3, 1, 1, 0], [0, 1, 1, 4]]
    assert costs.blocks_of(costs.loads_of(IDS, 4), 2).tolist() == [[2, 1, 1, 0], [0, 1, 1, 2]]


@pytest.mark.parametrize("size", [1, 16, 100, 256])
def test_loads_and_blocks_are_those_of_the_layout(size):
    loads = costs.loads_of(TRACE.topk_ids, TRACE.num_experts)
    blocks = costs.blocks_of(loads, size).sum(axis=1)
    for layer, ids in enumerate(TRACE.topk_ids):
        layout = align(ids, block_size=size, num_experts=TRACE.num_experts, expert_counts=True)
        assert layout.expert_counts.tolist() == loads[layer].tolist()
        assert layout.num_tokens_post_padded.item() == size * blocks[layer]


def test_the_memory_s_rate_is_the_tracked_one():
    with EXPERTS.with_name("align_h200.csv").open(newline="") as source:
        rows = [r for r in csv.DictReader(source) if (r["case"], r["impl"]) == ("65536x8-E256-B128", "floor-bytes")]
    routes = 524_288
    sizes = capacity(routes, block_size=128, num_experts=256)
    moved = 4 * (routes + sizes.sorted_token_ids + sizes.expert_ids + 1)
    assert H200.memory == pytest.approx(moved / (float(rows[0]["median_us"]) * 1e-6), rel=0.03)


def test_the_model_by_hand():
    experts, machine = (
        Experts(hidden=10, intermediate=5, bytes=2),
        Machine("m", memory=100.0, cache=50.0, matrix=1000.0),
    )
    assert (experts.weight_bytes, experts.row_bytes, experts.row_operations) == (300, 70, 300)
    # Loads 3 and 1 in blocks of two rows: three blocks for two experts that are hit, four routes.
    found = costs.cost(np.array([3, 0, 1]), 2, experts, machine)
    assert found.memory == pytest.approx((2 * 300 + 4 * 70) / 100 * 1e6)
    assert found.cache == pytest.approx((3 - 2) * 300 / 50 * 1e6)
    assert found.matrix == pytest.approx(3 * 2 * 300 / 1000 * 1e6)
    assert found.total == pytest.approx(found.memory + found.cache + found.matrix)
    twice = costs.cost(np.array([[3, 0, 1], [3, 0, 1]]), 2, experts, machine)
    assert twice.total == pytest.approx(found.total), "the mean over layers"
    assert costs.cost(np.zeros(3, dtype=int), 2, experts, machine).total == 0


def test_sizes_below_one_are_refused():
    with pytest.raises(InvalidInput, match="hidden, intermediate, bytes: expected at least 1 each, got 0, 5 and 2"):
        Experts(hidden=0, intermediate=5)


def test_summaries_by_example():
    assert costs.summarize(np.array([3, 1, 1, 0])) == costs.LoadSummary(0, 1, 3, 3 * 4 / 5, 1)
    assert costs.summarize(np.zeros(2, dtype=int)).imbalance == 1
    loads = costs.loads_of(IDS, 4)
    assert (costs.padding(loads, 2).rows, costs.padding(loads, 2).wasted) == (16, pytest.approx(5 / 16))
    assert costs.padding(np.zeros(2, dtype=int), 2).wasted == 0


def test_windows_by_example():
    found = costs.windows(IDS, 4, 2)  # tokens 0 and 1, then token 2
    assert found.tolist() == [[2.0, 4.0], [4.0, 2.0]]
    assert costs.windows(torch.full((1, 2, 2), -1), 4, 1).tolist() == [[1.0, 1.0]]
    even = torch.arange(8).reshape(1, 4, 2)
    assert costs.windows(even, 8, 4).tolist() == [[1.0]]


def test_more_tokens_want_larger_blocks():
    sizes = [16, 32, 64, 128, 256]
    found = costs.recommend_by_tokens(TRACE.topk_ids, TRACE.num_experts, sizes, Experts(), H200)
    assert [row.tokens for row in found] == [2**i for i in range(14)]
    chosen = [row.block_size for row in found]
    assert chosen == sorted(chosen)
    assert chosen[0] == 16
    assert chosen[-1] > 16
    for row in found:
        assert row.costs[sizes.index(row.block_size)] == min(row.costs)
        assert row.wasted == sorted(row.wasted)
    loads = costs.loads_of(TRACE.topk_ids, TRACE.num_experts)
    assert found[-1].costs == [costs.cost(loads, size, Experts(), H200).total for size in sizes]


@pytest.mark.skipif(not EXPERTS.exists(), reason="no experts_h200.csv is tracked")
def test_the_model_chooses_as_measurements_did():
    """The block sizes that were found fastest on the H200, at all the sizes that benchmarks/experts.py times."""
    with EXPERTS.open(newline="") as source:
        rows = [r for r in csv.DictReader(source) if r["impl"] == "moealign" and int(r["block_size"])]
    right, wrong = 0, []
    for row in rows:
        found = re.fullmatch(r"T(\d+)-k(\d+)-E(\d+)-H(\d+)-I(\d+)", row["case"])
        if not found:
            continue
        tokens, top_k, count, hidden, inner = map(int, found.groups())
        draw = torch.Generator().manual_seed(0)
        ids = torch.rand(1, tokens, count, generator=draw).topk(top_k, -1).indices
        sizes = [16, 32, 64, 128]
        chosen = costs.recommend_by_tokens(ids, count, sizes, Experts(hidden, inner), H200)[-1].block_size
        spent = min(costs.recommend_by_tokens(ids, count, sizes, Experts(hidden, inner), H200)[-1].costs)
        assert 0.75 < spent / float(row["median_us"]) < 1.75, "as the docstring of cost() says"
        right += chosen == int(row["block_size"])
        if not 0.5 <= chosen / int(row["block_size"]) <= 2:
            wrong.append((row["case"], chosen))
    assert right >= 0.8 * len(rows) >= 8, f"{right} of {len(rows)}"
    assert wrong == []


def test_alignment_is_interpolated_between_tracked_times():
    with EXPERTS.with_name("align_h200.csv").open(newline="") as source:
        rows = [r for r in csv.DictReader(source) if r["bench"] == "align" and r["num_experts"] == "256"]
    times = {int(r["routes"]): float(r["median_us"]) for r in rows if r["impl"] == "moealign-cuda"}
    assert {routes: times[routes] for routes, _ in costs.ALIGNMENT_US} == {
        routes: pytest.approx(spent, rel=0.1) for routes, spent in costs.ALIGNMENT_US
    }
    for routes, spent in times.items():
        assert costs.alignment_us(routes) == pytest.approx(spent, rel=0.25)
    assert costs.alignment_us(0) == costs.alignment_us(1) == costs.ALIGNMENT_US[0][1]
    assert costs.alignment_us(2**20) == pytest.approx(2 * costs.alignment_us(2**19))
    empty = [float(r["median_us"]) for r in rows if r["impl"] == "floor-empty"]
    assert np.median(empty) == pytest.approx(costs.LAUNCH_US, rel=0.1)


def test_typical_batches():
    assert costs.typical_batches(8192) == {"decode": 64, "prefill": 8192}
    assert costs.typical_batches(200) == {"decode": 64}
    assert costs.typical_batches(5) == {"decode": 5}
    assert costs.typical_batches(5 + 2 + 300 + 900, (5, 2, 300, 900)) == {"decode": 2, "prefill": 300}


def test_pieces_are_calls_where_there_are_some():
    assert costs.pieces(10, 2, (4, 2, 2, 2)) == ([4, 6, 8], True)
    assert costs.pieces(10, 3, (4, 2, 2, 2)) == ([0], False)
    assert costs.pieces(10, 2, (4, 2, 2, 2), max_pieces=2) == ([4, 8], True)
    assert costs.pieces(10, 4)[1] is False
    loads, whole = costs.piece_loads(IDS, 4, 1, (1, 2))
    assert (loads.shape, whole) == ((2, 1, 4), True)
    assert costs.batch_loads(IDS, 4, (1, 2)).tolist()[0] == [[1, 1, 0, 0], [2, 0, 1, 0]]
    assert costs.windows(IDS, 4, 0, (1, 2)).shape == (2, 2)


def test_the_sizes_of_an_expert_come_from_options_or_the_trace():
    bare = Trace(IDS, 4, "m", "s", "r")
    sized = Trace(IDS, 4, "m", "s", "r", {"hidden": 64, "intermediate": 16})
    assert costs.experts_of(bare) == (Experts(), "assumed")
    assert costs.experts_of(bare, 10) == (Experts(10), "assumed")
    assert costs.experts_of(bare, 10, 20) == (Experts(10, 20), "as given")
    assert costs.experts_of(sized) == (Experts(64, 16), "from the trace")
    assert costs.experts_of(sized, intermediate=20) == (Experts(64, 20), "as given")


def test_a_trace_of_an_odd_length_ends_with_all_its_tokens():
    found = costs.recommend_by_tokens(TRACE.topk_ids[:, :100], 64, [16], Experts(), H200)
    assert [row.tokens for row in found] == [1, 2, 4, 8, 16, 32, 64, 100]
    assert [row.tokens for row in costs.recommend_by_tokens(TRACE.topk_ids[:, :1], 64, [16], Experts(), H200)] == [1]


def test_a_placement_gains_where_busy_experts_stay_busy():
    draw = np.random.default_rng(0)
    weights = 1 / np.arange(1, 65) ** 0.7
    ids = torch.from_numpy(draw.choice(64, size=(3, 4000, 4), p=weights / weights.sum()))
    for gain in costs.placement_gain(ids, 64, [2, 8, 32]):
        assert 1 <= gain.informed <= gain.balanced + 1e-9
        assert gain.balanced < gain.linear
        assert gain.balanced < gain.round_robin
    assert gain.replicated < gain.balanced, "where one expert fills a rank only a copy helps"


def test_a_placement_is_judged_on_tokens_it_has_not_seen():
    # The first half, of loads 3, 2, 1, 0, puts experts 1 and 2 together; the second half has routes for these alone.
    ids = torch.tensor([0, 0, 0, 1, 1, 2, 1, 1, 1, 2, 2, 2]).reshape(1, 12, 1)
    (gain,) = costs.placement_gain(ids, 4, [2])
    assert (gain.linear, gain.balanced, gain.informed) == (1.0, 2.0, 1.0)
    (idle,) = costs.placement_gain(torch.full((1, 4, 1), -1), 4, [2])
    assert (idle.linear, idle.balanced) == (1.0, 1.0)


def dense(rows, weights, layout, *, top_k, activation=None):
    """A grouped GEMM in plain torch, a block at a time."""
    out = rows.new_zeros(layout.num_routes, weights.shape[1])
    used = layout.num_tokens_post_padded.item() // layout.block_size
    for block, expert in enumerate(layout.expert_ids[:used].tolist()):
        routes = layout.sorted_token_ids[block * layout.block_size : (block + 1) * layout.block_size].long()
        routes = routes[routes < layout.num_routes]
        out[routes] = rows[routes // top_k] @ weights[expert].T
    if activation is None:
        return out
    assert activation == "silu_mul"
    gate, up = out.chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


def test_a_measurement_runs_both_products_at_every_size():
    seen, ran = [], []

    def gemm(rows, weights, layout, **options):
        seen.append((layout.block_size, tuple(rows.shape), tuple(weights.shape), options["top_k"]))
        return dense(rows, weights, layout, **options)

    def timer(call):
        out = call()
        assert torch.isfinite(out).all()
        ran.append(tuple(out.shape))
        return 7.0

    ids = TRACE.topk_ids[:, :6]
    found = costs.measure(ids, 64, [16, 4], Experts(32, 16), gemm=gemm, timer=timer, device="cpu")
    assert found == [7.0, 7.0]
    assert ran == [(48, 32)] * 2
    first, second = ((6, 32), (64, 32, 32), 8), ((48, 16), (64, 32, 16), 1)
    assert seen == [(16, *first), (16, *second), (4, *first), (4, *second)]


def test_the_library_s_own_consumer_is_the_default():
    results = []

    def timer(call):
        results.append(call().float())
        return 1.0

    for gemm in (None, dense):
        costs.measure(TRACE.topk_ids[:, :6], 64, [4], Experts(32, 16), gemm=gemm, timer=timer, device="cpu")
    assert torch.allclose(*results, rtol=0.05, atol=2e-3), "both round to bfloat16"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_rates_of_this_gpu():
    machine = costs.measured_machine()
    print(machine)
    assert machine.cache > machine.memory > 1e11
    assert machine.matrix > 1e12


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_layer_is_measured_on_this_gpu():
    found = costs.measure(TRACE.topk_ids[:, :256], 64, [16, 64], Experts(256, 128))
    assert all(0 < spent < 1e5 for spent in found)
