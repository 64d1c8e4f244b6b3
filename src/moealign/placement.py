"""Placements of experts on ranks, computed from the experts' loads: numpy in, numpy out.

A placement is an int64 array ``[ranks, slots]`` of expert ids, ``-1`` for an empty slot.  It holds every expert at
least once; an expert in several slots is replicated, and its copies share its load evenly.

:func:`save` and :func:`load` exchange placements with serving engines, in the format of expert-parallel load balancers
(EPLB): a JSON object with one key, ``physical_to_logical_map``, of ``[layers, ranks * slots]`` expert ids.  Slot ``s``
of rank ``r`` is the physical expert ``r * slots + s``.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InvalidInput

__all__ = ["balanced", "imbalance", "linear", "load", "rank_loads", "rebalanced", "round_robin", "save", "spare_slots"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def linear(num_experts: int, ranks: int) -> Ints:
    """Consecutive experts together, as in most engines: rank 0 holds the first ``cdiv(num_experts, ranks)``, and so on.

    Returns:
        ``[ranks, cdiv(num_experts, ranks)]``; if `ranks` does not divide `num_experts`, the last slots hold -1.

    Raises:
        InvalidInput: `num_experts` or `ranks` below 1.
    """
    return _filled(num_experts, ranks).reshape(ranks, -1)


def round_robin(num_experts: int, ranks: int) -> Ints:
    """Expert ``e`` on rank ``e % ranks``.  Shape and errors as :func:`linear`."""
    return np.ascontiguousarray(_filled(num_experts, ranks).reshape(-1, ranks).T)


def balanced(loads: npt.ArrayLike, ranks: int, replicas: int = 0) -> Ints:
    """A placement with a low load on the busiest rank.

    Each of `replicas` copies goes to the expert whose copies carry the highest load.  Then all copies, heaviest first,
    go to the least loaded rank that has a free slot and does not hold the expert (longest processing time first, within
    4/3 of the optimum without the limit on slots: Graham, 1969).  Finally, experts of the busiest rank are swapped with
    lighter ones elsewhere as long as that helps.  Without replicas, the result is never worse than :func:`linear` and
    :func:`round_robin` for the same loads.

    Args:
        loads: ``[num_experts]`` routes, tokens or any other weight of each expert, finite and nonnegative.
        ranks: number of ranks; each gets ``cdiv(num_experts + replicas, ranks)`` slots.
        replicas: total number of copies beyond the first of each expert; an expert gets at most one copy per rank.

    Returns:
        ``[ranks, slots]`` expert ids, each row ascending, ``-1`` last.  The same loads give the same placement.

    Raises:
        InvalidInput: invalid loads, `ranks` below 1, `replicas` outside ``[0, num_experts * (ranks - 1)]``.
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
    # Among equals, experts with many copies first: they have the fewest ranks to choose from.
    for expert in np.lexsort((np.arange(experts), -copies, -share)).tolist():
        for _ in range(copies[expert]):
            if not ((filled < slots) & ~there[:, expert]).any():
                _make_room(there, filled, total, share, expert, slots)
            free = (filled < slots) & ~there[:, expert]
            candidates = np.where(free, total, np.inf)
            ties = np.flatnonzero(candidates == candidates.min())
            rank = ties[np.argmin(filled[ties])]
            there[rank, expert] = True
            filled[rank] += 1
            total[rank] += share[expert]
    _swap(there, share, slots)
    placement = np.full((ranks, slots), -1, dtype=np.int64)
    for rank in range(ranks):
        own = np.flatnonzero(there[rank])
        placement[rank, : len(own)] = own
    if replicas:
        return placement
    others = (linear(experts, ranks), round_robin(experts, ranks))
    return min((placement, *others), key=lambda p: float(rank_loads(p, weights).max()))


def rebalanced(placement: Ints, loads: npt.ArrayLike, max_imbalance: float = 1.05) -> Ints:
    """A placement for other loads that moves few experts of `placement`, and none if its imbalance is low enough.

    There are two candidates: `placement` with experts of its busiest rank swapped with lighter ones elsewhere until the
    imbalance is at most `max_imbalance`; and :func:`balanced` with as many copies, its rows given to those ranks that
    hold most of their experts already (an optimal assignment: Kuhn, 1955).  The one with fewer moves is taken among
    those below `max_imbalance`; if there is none, the one with the lower imbalance.

    Args:
        placement: ``[ranks, slots]``.
        loads: ``[num_experts]``, as for :func:`balanced`.
        max_imbalance: load of the busiest rank over the mean, at least 1.

    Returns:
        ``[ranks, slots]``.  An expert that stays on its rank stays in its slot.

    Raises:
        InvalidInput: invalid loads, an expert that is nowhere, or `max_imbalance` below 1.
    """
    weights = _loads(loads)
    before = imbalance(placement, weights)
    if not max_imbalance >= 1:
        raise InvalidInput(f"max_imbalance: expected a number of at least 1, got {max_imbalance}")
    same: Ints = placement.copy()
    if before <= max_imbalance:
        return same
    ranks, slots = placement.shape
    filled = placement >= 0
    here = np.zeros((ranks, len(weights)), dtype=bool)
    here[np.nonzero(filled)[0], placement[filled]] = True
    swapped = here.copy()
    _swap(swapped, weights / here.sum(axis=0), slots, max_imbalance * weights.sum() / ranks)
    anew = balanced(weights, ranks, int(filled.sum()) - len(weights))
    there = np.zeros_like(here)
    there[np.nonzero(anew >= 0)[0], anew[anew >= 0]] = True
    missing = there.sum(axis=1)[None, :] - here.astype(np.int64) @ there.T.astype(np.int64)
    candidates = [_in_place(placement, each) for each in (swapped, there[_assignment(missing)])]
    measures = [(imbalance(each, weights), int(((each != placement) & (each >= 0)).sum())) for each in candidates]
    good = [i for i, (after, _) in enumerate(measures) if after <= max_imbalance]
    best = min(good, key=lambda i: measures[i][1]) if good else min((0, 1), key=lambda i: measures[i])
    return candidates[best] if measures[best][0] < before else same


def rank_loads(placement: Ints, loads: npt.ArrayLike) -> Floats:
    """Load of each rank ``[ranks]``; the copies of an expert share its load evenly.

    Raises:
        InvalidInput: no rank holds some expert of `loads`, or an id is not below their number.
    """
    weights = _loads(loads)
    ids = placement[placement >= 0]
    if ids.size and int(ids.max()) >= len(weights):
        raise InvalidInput(f"placement: expected experts below {len(weights)}, got {int(ids.max())}")
    copies = np.bincount(ids, minlength=len(weights))
    if (copies == 0).any():
        raise InvalidInput(f"placement: expected every expert somewhere, expert {int(np.argmin(copies))} is nowhere")
    share = np.append(weights / copies, 0.0)  # -1 indexes the last
    return np.asarray(share[placement].sum(axis=1))


def imbalance(placement: Ints, loads: npt.ArrayLike) -> float:
    """Load of the busiest rank over the mean: 1 is even, and the result without any load.

    All ranks wait for the busiest one, so a layer takes this many times as long as with an even placement.
    """
    each = rank_loads(placement, loads)
    return float(each.max() / each.mean()) if each.any() else 1.0


def spare_slots(num_experts: int, ranks: int) -> int:
    """The smallest number of copies with which `ranks` ranks get equally many experts and no slot stays empty."""
    _check(num_experts, ranks)
    return -num_experts % ranks


def save(path: str | Path, placements: Sequence[Ints] | Ints) -> None:
    """Write the placement of each layer, ``[layers, ranks, slots]``, as a ``physical_to_logical_map``.

    Raises:
        InvalidInput: another shape, an empty slot (engines have none), or an expert that is nowhere.
    """
    tables = np.asarray(placements, dtype=np.int64)
    if tables.ndim != 3 or not tables.size:
        raise InvalidInput(f"placements: expected [layers, ranks, slots], got shape {list(tables.shape)}")
    if (tables < 0).any():
        raise InvalidInput(
            "placements: expected an expert in every slot, got empty slots; fill them with the replicas that "
            "spare_slots() counts"
        )
    maps = tables.reshape(len(tables), -1)
    _check_maps("placements", maps)
    Path(path).write_text(json.dumps({"physical_to_logical_map": maps.tolist()}) + "\n", encoding="utf-8")


def load(path: str | Path, ranks: int) -> Ints:
    """Read the placement of each layer, ``[layers, ranks, slots]``, from a file of :func:`save` or of an engine.

    Raises:
        InvalidInput: the file has no ``physical_to_logical_map`` of ids ``[layers, physical experts]``, their number is
            no multiple of `ranks`, or an expert is nowhere.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        maps = np.array(content["physical_to_logical_map"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidInput(
            f"{path}: expected JSON with the key physical_to_logical_map, got {type(error).__name__}: {error}"
        ) from None
    if maps.ndim != 2 or not maps.size or maps.dtype.kind != "i" or (maps < 0).any():
        raise InvalidInput(
            f"{path}: expected physical_to_logical_map to hold ids [layers, physical experts], got {maps.dtype} "
            f"{list(maps.shape)}"
        )
    if ranks < 1 or maps.shape[1] % ranks:
        raise InvalidInput(f"ranks: expected a divisor of {maps.shape[1]} physical experts, got {ranks}")
    _check_maps(str(path), maps)
    return maps.astype(np.int64).reshape(len(maps), ranks, -1)


def _check_maps(name: str, maps: Ints) -> None:
    """Refuse maps ``[layers, physical experts]`` in which an expert below the highest id is nowhere."""
    highest = int(maps.max())
    if highest >= maps.shape[1]:
        raise InvalidInput(f"{name}: expected ids below {maps.shape[1]}, the number of slots, got {highest}")
    for layer, row in enumerate(maps):
        missing = np.setdiff1d(np.arange(highest + 1), row)
        if missing.size:
            raise InvalidInput(f"{name}: expected every expert in layer {layer}, expert {int(missing[0])} is nowhere")


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
    """Copies of each expert: one, then `replicas` times one more for the expert with the highest load per copy."""
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
    """All ranks without `expert` are full: move the lightest expert of one of them to a rank with a free slot."""
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


def _in_place(placement: Ints, there: Any) -> Ints:
    """The table of the sets `there`, ``[ranks, num_experts]``: experts that stay keep their slots of `placement`."""
    result = np.full_like(placement, -1)
    for rank, (row, held) in enumerate(zip(placement, there, strict=True)):
        stays = (row >= 0) & held[row]
        result[rank, stays] = row[stays]
        came = np.setdiff1d(np.flatnonzero(held), row[stays])
        result[rank, np.flatnonzero(~stays)[: len(came)]] = came
    return result


def _assignment(cost: Ints) -> Ints:
    """The column for each row of a square matrix with the lowest sum: the Hungarian method with potentials."""
    size = len(cost)
    of_row, of_column = np.zeros(size + 1), np.zeros(size + 1)
    row_of = np.full(size + 1, -1)  # of each column; the last is where a new row enters
    for row in range(size):
        row_of[size], column = row, size
        least, came_from = np.full(size, np.inf), np.full(size, size)
        used = np.zeros(size + 1, dtype=bool)
        while row_of[column] >= 0:
            used[column] = True
            reduced = cost[row_of[column]] - of_row[row_of[column]] - of_column[:size]
            better = ~used[:size] & (reduced < least)
            least[better], came_from[better] = reduced[better], column
            following = int(np.argmin(np.where(used[:size], np.inf, least)))
            step = least[following]
            of_row[row_of[used]] += step
            of_column[used] -= step
            least[~used[:size]] -= step
            column = following
        while column != size:
            row_of[column] = row_of[came_from[column]]
            column = int(came_from[column])
    return np.argsort(row_of[:size])


def _swap(there: Any, share: Floats, slots: int, enough: float = 0.0) -> None:
    """While it lowers the load of the busiest rank, and that is above `enough`, swap one of its experts for another, or
    move one to a free slot."""
    ranks = len(there)
    rows = np.full((ranks, slots), -1, dtype=np.int64)
    for rank in range(ranks):
        ids = np.flatnonzero(there[rank])
        rows[rank, : len(ids)] = ids
    weight = np.append(share, 0.0)  # of a free slot, -1
    there_or_free = np.concatenate((there, np.zeros((ranks, 1), dtype=bool)), axis=1)
    total = weight[rows].sum(axis=1)
    for _ in range(4 * len(share)):
        busy = int(np.argmax(total))
        if total[busy] <= enough:
            break
        mine = rows[busy]
        moved = weight[mine][:, None, None] - weight[rows][None]  # [slots of the busiest, ranks, slots]
        gap = (total[busy] - total)[None, :, None]
        # Moving half the gap makes both loads equal; anything in (0, gap) lowers the higher one.
        helps = (moved > 1e-12 * total[busy]) & (moved < gap * (1 - 1e-12))
        helps &= ~there_or_free[:, mine].T[:, :, None]  # the other rank does not hold it,
        helps &= ~there_or_free[busy][rows][None]  # nor this rank what it gets in return
        if not helps.any():
            break
        choice = np.where(helps, np.abs(gap / 2 - moved), np.inf)
        own, rank, slot = (int(i) for i in np.unravel_index(int(np.argmin(choice)), choice.shape))
        gone, came = int(rows[busy, own]), int(rows[rank, slot])
        change = float(moved[own, rank, slot])
        rows[busy, own], rows[rank, slot] = came, gone
        there_or_free[busy, gone], there_or_free[rank, gone] = False, True
        if came >= 0:
            there_or_free[rank, came], there_or_free[busy, came] = False, True
        total[busy] -= change
        total[rank] += change
    there[:] = there_or_free[:, :-1]
