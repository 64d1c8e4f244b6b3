"""Placements: every expert is somewhere, no rank holds one twice, and the busiest rank has as little as can be had."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moealign.errors import InvalidInput
from moealign.placement import _make_room, balanced, imbalance, linear, rank_loads, round_robin


def zipf(experts: int) -> np.ndarray:
    return np.random.default_rng(experts).permutation(1000.0 / np.arange(1, experts + 1))


def copies_of(placement: np.ndarray, experts: int) -> np.ndarray:
    return np.bincount(placement[placement >= 0], minlength=experts)


def test_linear_and_round_robin_by_example():
    assert linear(8, 4).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert linear(5, 2).tolist() == [[0, 1, 2], [3, 4, -1]]
    assert linear(2, 4).tolist() == [[0], [1], [-1], [-1]]
    assert round_robin(8, 4).tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert round_robin(5, 2).tolist() == [[0, 2, 4], [1, 3, -1]]


def test_loads_of_ranks_and_imbalance_by_example():
    loads = [4, 2, 1, 1]
    assert rank_loads(linear(4, 2), loads).tolist() == [6, 2]
    assert imbalance(linear(4, 2), loads) == 1.5
    replicated = np.array([[0, 1, -1], [0, 2, 3]])
    assert rank_loads(replicated, loads).tolist() == [4, 4]
    assert imbalance(replicated, loads) == 1
    assert imbalance(linear(4, 2), [0, 0, 0, 0]) == 1


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=24),
    st.integers(1, 9),
    st.integers(0, 12),
)
def test_what_every_placement_promises(loads, ranks, wanted):
    experts = len(loads)
    replicas = min(wanted, experts * (ranks - 1))
    placement = balanced(loads, ranks, replicas)
    assert placement.shape == (ranks, -(-(experts + replicas) // ranks))
    copies = copies_of(placement, experts)
    assert copies.min() >= 1
    assert copies.sum() == experts + replicas
    for held in placement:
        real = held[held >= 0]
        assert len(set(real.tolist())) == len(real), "no rank holds an expert twice"
    assert np.isclose(rank_loads(placement, loads).sum(), sum(loads))
    assert (balanced(loads, ranks, replicas) == placement).all()
    if not replicas:
        best = min(rank_loads(p(experts, ranks), loads).max() for p in (linear, round_robin))
        assert rank_loads(placement, loads).max() <= best


@pytest.mark.parametrize("seed", range(12))
def test_near_the_best_of_all_placements(seed):
    draw = np.random.default_rng(seed)
    loads = draw.integers(0, 30, size=8).astype(float)
    ranks = 2 + seed % 3
    slots = -(-8 // ranks)
    best = min(
        max(np.bincount(who, weights=loads, minlength=ranks))
        for who in itertools.product(range(ranks), repeat=8)
        if max(np.bincount(who, minlength=ranks)) <= slots
    )
    found = rank_loads(balanced(loads, ranks), loads).max()
    assert best <= found <= 1.1 * best


@pytest.mark.parametrize(("experts", "ranks"), [(256, 8), (256, 64), (896, 32), (60, 7)])
def test_it_gains_on_uneven_loads_and_replicas_gain_more(experts, ranks):
    loads = zipf(experts)
    plain, better = imbalance(linear(experts, ranks), loads), imbalance(balanced(loads, ranks), loads)
    copied = imbalance(balanced(loads, ranks, replicas=ranks), loads)
    assert better < plain
    assert copied < better
    slots = -(-experts // ranks)
    company = np.sort(loads)[: slots - 1 - (slots * ranks - experts)].sum()
    bound = max(1.0, float((loads.max() + company) / loads.mean() / experts * ranks))
    assert better < 1.01 * bound, "the busiest expert, in the lightest company that fills its rank, bounds it"


def test_even_loads_need_nothing():
    assert imbalance(balanced(np.ones(64), 8), np.ones(64)) == 1


def test_replicas_may_fill_every_rank():
    placement = balanced([5, 1, 1], 3, replicas=6)
    assert [sorted(row) for row in placement.tolist()] == [[0, 1, 2]] * 3


def test_room_is_made_where_every_rank_without_the_expert_is_full():
    # Two slots a rank; expert 3 is on rank 1, which has one free, and has to go to rank 0, which is full.
    there = np.array([[1, 1, 0, 0], [0, 0, 0, 1]], dtype=bool)
    filled, share = np.array([2, 1]), np.array([5.0, 1.0, 3.0, 2.0])
    total = np.array([6.0, 2.0])
    _make_room(there, filled, total, share, 3, 2)
    assert there.tolist() == [[True, False, False, False], [False, True, False, True]], "the lightest one went"
    assert (filled.tolist(), total.tolist()) == ([1, 2], [5.0, 3.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear(0, 2), "num_experts, ranks: expected at least 1 of each, got 0 and 2"),
        (lambda: round_robin(2, 0), "num_experts, ranks: expected at least 1 of each, got 2 and 0"),
        (lambda: balanced([1.0, 2.0], 0), "expected at least 1 of each, got 2 and 0"),
        (lambda: balanced([1.0, 2.0], 2, 3), "replicas: expected 0 to 2, as 2 ranks hold a copy of 2 experts at most"),
        (lambda: balanced([1.0, 2.0], 2, -1), "replicas: expected 0 to 2"),
        (lambda: balanced([[1.0]], 2), r"loads: expected \[num_experts\] with at least one expert, got shape \[1, 1\]"),
        (lambda: balanced([], 2), r"got shape \[0\]"),
        (lambda: balanced([1.0, float("nan")], 2), "loads: expected finite numbers that are not negative"),
        (lambda: balanced([1.0, -1.0], 2), "loads: expected finite numbers that are not negative"),
        (lambda: rank_loads(linear(4, 2), [1, 2, 3]), "placement: expected experts below 3, got 3"),
        (lambda: rank_loads(linear(3, 2), [1, 2, 3, 4]), "expected every expert somewhere, expert 3 is nowhere"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(InvalidInput, match=message):
        call()
