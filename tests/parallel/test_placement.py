"""Placements: every expert is somewhere, no rank holds one twice, and the busiest rank has as little as can be had."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moealign.errors import InvalidInput
from moealign.placement import (
    _assignment,
    _make_room,
    balanced,
    imbalance,
    linear,
    rank_loads,
    rebalanced,
    round_robin,
)


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


def moves(old: np.ndarray, new: np.ndarray) -> int:
    return int(((new != old) & (new >= 0)).sum())


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=24),
    st.integers(1, 7),
    st.integers(0, 12),
    st.integers(0, 2),
    st.randoms(use_true_random=False),
)
def test_what_a_placement_for_other_loads_promises(loads, ranks, wanted, empty, random):
    experts = len(loads)
    old = balanced(loads, ranks, min(wanted, experts * (ranks - 1)))
    old = np.concatenate((old, np.full((ranks, empty), -1)), axis=1)
    loads = random.sample(loads, experts)
    new = rebalanced(old, loads, 1.2)
    assert (new >= 0).sum() == (old >= 0).sum()
    assert copies_of(new, experts).min() >= 1
    before, after = imbalance(old, loads), imbalance(new, loads)
    assert (after < before) if moves(old, new) else (after == before)
    assert moves(old, new) == 0 or before > 1.2
    for was, held in zip(old, new, strict=True):
        real = held[held >= 0].tolist()
        assert len(set(real)) == len(real), "no rank holds an expert twice"
        for slot, expert in enumerate(was):
            if expert >= 0 and expert in real:
                assert held[slot] == expert, "an expert that stays keeps its slot"
    assert (rebalanced(old, loads, 1.2) == new).all()


def test_other_loads_move_few_experts():
    loads = zipf(64)
    old = balanced(loads, 8, replicas=8)
    loads[:4] *= 2.0
    new = rebalanced(old, loads, max_imbalance=1.1)
    assert imbalance(old, loads) > 1.1 >= imbalance(new, loads)
    assert moves(old, new) < moves(old, balanced(loads, 8, replicas=8)) / 2
    shuffled = old[np.roll(np.arange(8), 1)]
    assert moves(shuffled, rebalanced(shuffled, loads, 1.1)) == moves(old, new), "ranks have no order"


@pytest.mark.parametrize("seed", range(8))
def test_the_assignment_is_the_cheapest(seed):
    cost = np.random.default_rng(seed).integers(0, 9, size=(5, 5))
    rows = np.arange(5)
    found = _assignment(cost)
    assert sorted(found) == list(rows)
    assert cost[rows, found].sum() == min(cost[rows, list(p)].sum() for p in itertools.permutations(range(5)))


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
        (
            lambda: rebalanced(linear(4, 2), [1, 2, 3, 4], 0.9),
            "max_imbalance: expected a number of at least 1, got 0.9",
        ),
        (lambda: rebalanced(linear(4, 2), [1, 2, 3]), "placement: expected experts below 3, got 3"),
        (lambda: rank_loads(linear(4, 2), [1, 2, 3]), "placement: expected experts below 3, got 3"),
        (lambda: rank_loads(linear(3, 2), [1, 2, 3, 4]), "expected every expert somewhere, expert 3 is nowhere"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(InvalidInput, match=message):
        call()
