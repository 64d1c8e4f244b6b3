"""Which rank holds which experts, from their loads alone: numpy in, numpy out.

A placement is an int64 array ``[ranks, slots]`` of expert ids, ``-1`` for a slot that holds none.  Every expert is
somewhere; one that is in several slots is replicated, and its load is then shared evenly among its copies.
"""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InvalidInput

__all__ = ["balanced", "imbalance", "linear", "rank_loads", "round_robin"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def linear(num_experts: int, ranks: int) -> Ints:
    """Neighbours together, as most engines do: rank 0 holds the first ``cdiv(num_experts, ranks)`` experts, and so on.

    Returns:
        ``[ranks, cdiv(num_experts, ranks)]``; where `ranks` does not divide `num_experts`, the last slots hold -1.

    Raises:
        InvalidInput: `num_experts` or `ranks` below 1.
    """
    return _filled(num_experts, ranks).reshape(ranks, -1)


def round_robin(num_experts: int, ranks: int) -> Ints:
    """Expert ``e`` on rank ``e % ranks``.  Shape and errors as :func:`linear`."""
    return np.ascontiguousarray(_filled(num_experts, ranks).reshape(-1, ranks).T)


def balanced(loads: npt.ArrayLike, ranks: int, replicas: int = 0) -> Ints:
    """A placement whose busiest rank has little to do: copies for the busy, heaviest first, then swaps.

    First each of `replicas` copies goes to the expert whose copies carry most.  Then the copies, heaviest first, go to
    the least loaded rank with a free slot that does not hold that expert yet (longest processing time first, within
    4/3 of the best without the limit on slots: Graham, 1969).  Then experts of the busiest rank are swapped with
    lighter ones elsewhere as long as that helps.  Without replicas the result is never worse than :func:`linear` and
    :func:`round_robin` on the same loads.

    Args:
        loads: ``[num_experts]`` routes, tokens or any other weight of each expert, finite and not negative.
        ranks: number of ranks; each gets ``cdiv(num_experts + replicas, ranks)`` slots.
        replicas: copies beyond the first of each expert, in all; no expert gets more copies than there are ranks.

    Returns:
        ``[ranks, slots]`` expert ids, each row ascending, ``-1`` last.  The same loads give the same placement.

    Raises:
        InvalidInput: loads that are none, `ranks` below 1, `replicas` outside ``[0, num_experts * (ranks - 1)]``.
    """
    weights = _loads(loads)
    experts = len(weights)
    _check(experts, ranks)
    if not 0 <= replicas <= experts * (ranks - 1):
        raise InvalidInput(
            f"replicas: expected 0 to {experts * (ranks - 1)}, as {ranks} ranks hold a copy of {experts} experts at "
            f"most once each, got {replicas}"
        )
    copies = _copies(weights, ranks, replicas)
    share = weights / copies
    slots = -(-(experts + replicas) // ranks)
    there = np.zeros((ranks, experts), dtype=bool)
    filled, total = np.zeros(ranks, dtype=np.int64), np.zeros(ranks)
    # Widely copied experts first among equals: they have the fewest ranks left to go to.
    for expert in np.lexsort((np.arange(experts), -copies, -share)).tolist():
        for _ in range(copies[expert]):
            if not ((filled < slots) & ~there[:, expert]).any():
                _make_room(there, filled, total, share, expert, slots)
            free = (filled < slots) & ~there[:, expert]
            least = np.where(free, total, np.inf)
            ties = np.flatnonzero(least == least.min())
            rank = ties[np.argmin(filled[ties])]
            there[rank, expert] = True
            filled[rank] += 1
            total[rank] += share[expert]
    _swap(there, share, slots)
    placement = np.full((ranks, slots), -1, dtype=np.int64)
    for rank in range(ranks):
        held = np.flatnonzero(there[rank])
        placement[rank, : len(held)] = held
    if replicas:
        return placement
    others = (linear(experts, ranks), round_robin(experts, ranks))
    return min((placement, *others), key=lambda p: float(rank_loads(p, weights).max()))


def rank_loads(placement: Ints, loads: npt.ArrayLike) -> Floats:
    """Load of each rank ``[ranks]``, the copies of an expert sharing its load evenly.

    Raises:
        InvalidInput: an expert of `loads` that no rank holds, or an id past them.
    """
    weights = _loads(loads)
    held = placement[placement >= 0]
    if held.size and int(held.max()) >= len(weights):
        raise InvalidInput(f"placement: expected experts below {len(weights)}, got {int(held.max())}")
    copies = np.bincount(held, minlength=len(weights))
    if (copies == 0).any():
        raise InvalidInput(f"placement: expected every expert somewhere, expert {int(np.argmin(copies))} is nowhere")
    share = np.append(weights / copies, 0.0)  # -1 takes the last
    return np.asarray(share[placement].sum(axis=1))


def imbalance(placement: Ints, loads: npt.ArrayLike) -> float:
    """Load of the busiest rank over the mean: 1 is even, and with n every rank waits while one does n times its share.

    1 where there is no load at all.
    """
    each = rank_loads(placement, loads)
    return float(each.max() / each.mean()) if each.any() else 1.0


def _filled(num_experts: int, ranks: int) -> Ints:
    _check(num_experts, ranks)
    slots = -(-num_experts // ranks)
    ids = np.full(ranks * slots, -1, dtype=np.int64)
    ids[:num_experts] = np.arange(num_experts)
    return ids


def _check(num_experts: int, ranks: int) -> None:
    if num_experts < 1 or ranks < 1:
        raise InvalidInput(f"num_experts, ranks: expected at least 1 of each, got {num_experts} and {ranks}")


def _loads(loads: npt.ArrayLike) -> Floats:
    weights = np.asarray(loads, dtype=np.float64)
    if weights.ndim != 1 or not len(weights):
        raise InvalidInput(f"loads: expected [num_experts] with at least one expert, got shape {list(weights.shape)}")
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise InvalidInput("loads: expected finite numbers that are not negative, got others")
    return weights


def _copies(weights: Floats, ranks: int, replicas: int) -> Ints:
    """Copies of each expert: one, and one more for whichever carries most a copy, `replicas` times."""
    copies = np.ones(len(weights), dtype=np.int64)
    heap: list[Any] = [(-weight, e) for e, weight in enumerate(weights)]
    heapq.heapify(heap)
    for _ in range(replicas):
        _, expert = heapq.heappop(heap)
        copies[expert] += 1
        if copies[expert] < ranks:
            heapq.heappush(heap, (-weights[expert] / copies[expert], expert))
    return copies


def _make_room(there: Any, filled: Ints, total: Floats, share: Floats, expert: int, slots: int) -> None:
    """Where all ranks without `expert` are full, one of them sends its lightest expert to a rank that has room."""
    without = [r for r in np.argsort(total, kind="stable") if not there[r, expert]]
    for rank in without:
        for room in np.flatnonzero(filled < slots):
            movable = np.flatnonzero(there[rank] & ~there[room])
            if len(movable):
                moved = movable[np.argmin(share[movable])]
                there[rank, moved], there[room, moved] = False, True
                filled[rank] -= 1
                filled[room] += 1
                total[rank] -= share[moved]
                total[room] += share[moved]
                return
    raise AssertionError("more copies than slots")  # cdiv(copies, ranks) slots hold them all


def _swap(there: Any, share: Floats, slots: int) -> None:
    """While it makes the busiest rank lighter, swap one of its experts for another's, or move one to a free slot."""
    ranks = len(there)
    rows = np.full((ranks, slots), -1, dtype=np.int64)
    for rank in range(ranks):
        held = np.flatnonzero(there[rank])
        rows[rank, : len(held)] = held
    weight = np.append(share, 0.0)  # a free slot, -1, weighs nothing
    held_or_free = np.concatenate((there, np.zeros((ranks, 1), dtype=bool)), axis=1)
    total = weight[rows].sum(axis=1)
    for _ in range(4 * len(share)):
        busy = int(np.argmax(total))
        mine = rows[busy]
        moved = weight[mine][:, None, None] - weight[rows][None]  # [slots of the busy, ranks, slots]
        gap = (total[busy] - total)[None, :, None]
        # Half the gap would make the two equal; anything in (0, gap) lowers the higher of them.
        helps = (moved > 1e-12 * total[busy]) & (moved < gap * (1 - 1e-12))
        helps &= ~held_or_free[:, mine].T[:, :, None]  # it is not there yet,
        helps &= ~held_or_free[busy][rows][None]  # nor what comes back here
        if not helps.any():
            break
        choice = np.where(helps, np.abs(gap / 2 - moved), np.inf)
        own, rank, slot = (int(i) for i in np.unravel_index(int(np.argmin(choice)), choice.shape))
        gone, came = int(rows[busy, own]), int(rows[rank, slot])
        change = float(moved[own, rank, slot])
        rows[busy, own], rows[rank, slot] = came, gone
        held_or_free[busy, gone], held_or_free[rank, gone] = False, True
        if came >= 0:
            held_or_free[rank, came], held_or_free[busy, came] = False, True
        total[busy] -= change
        total[rank] += change
    there[:] = held_or_free[:, :-1]
