"""The router on the CPU, compiled by numba: reference_routing's arithmetic, operation for operation.

The choice.  A score becomes an integer of the same order (NaN lowest, -0 as +0) over the number of its expert counted
from the end, so that no two are equal and the greatest is the one to take.  They stand in rows of `LANES`; the greatest
of each lane is kept, and what is taken gives way to the next of its own lane alone: E + k (LANES + E / LANES)
comparisons, and no branch that depends on a score.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit, types

from ..reference import route as reference_routing
from ..reference.route import FAR, INVERSE_LN2, LN2_HIGH, LN2_LOW, POLYNOMIAL, TINY
from . import align_kernels as kernels
from .align_kernels import _PART, _add, _i32, _i64, _pointer_to, _wait, joins, kernel, text_of

__all__ = ["ARGUMENTS", "ARGUMENTS_AT", "route"]

LANES = 16  # a constant: the loops over it become vectors
ARGUMENTS_AT = 192  # bytes of three counters, a cache line each
ARGUMENTS = 14
_kernel = kernel(*(text_of(vars(module)) for module in (kernels, reference_routing)), text_of(globals()))
_f32, _f64 = _pointer_to(types.float32), _pointer_to(types.float64)
_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)
_FAR, _TINY = np.float32(FAR), np.float32(TINY)
_INVERSE_LN2, _LN2_HIGH, _LN2_LOW = np.float32(INVERSE_LN2), np.float32(LN2_HIGH), np.float32(LN2_LOW)
_C0, _C1, _C2, _C3, _C4, _C5 = (np.float32(c) for c in POLYNOMIAL)
_POWERS = np.ldexp(np.float32(1), np.arange(-126, 128)).astype(np.float32)
_LEAST = np.float32(-np.inf)
_TAKEN = np.int64(-(2**63))
_LOW = np.int64(2**32 - 1)


@njit(**_PART)
def _exp32_near(v, n):  # type: ignore[no-untyped-def]
    """exp(v) / 2**n, with n = floor(v / ln 2 + 1/2)."""
    r = v - n * _LN2_HIGH
    r = r - n * _LN2_LOW
    y = _C0 * r + _C1
    y = y * r + _C2
    y = y * r + _C3
    y = y * r + _C4
    y = y * r + _C5
    y = y * (r * r)
    y = y + r
    return y + _ONE


@njit(**_PART)
def _exp32(x):  # type: ignore[no-untyped-def]
    if x < -_FAR:
        return _ZERO
    n = np.floor(x * _INVERSE_LN2 + _HALF)
    return _exp32_near(x, n) * _POWERS[np.int64(n) + 126]


@njit(**_PART)
def _sigmoid32(x):  # type: ignore[no-untyped-def]
    if not x >= -_FAR:  # NaN too
        return _ZERO
    return _ONE / (_ONE + _exp32(-min(x, _FAR + _ONE)))


@_kernel
def _exp32_each(x, powers):  # type: ignore[no-untyped-def]
    """x[e] = _exp32(x[e]), NaN to 0, without a branch or a table, so that the loops become vectors; x is at most FAR.
    `powers` is room for as many int32."""
    for e in range(x.size):
        v = x[e]
        v = v if v > -_FAR else -_FAR
        v = v if v < _FAR else _FAR
        u = v * _INVERSE_LN2 + _HALF
        whole = np.int32(u)
        whole = whole - np.int32(np.float32(whole) > u)
        y = _exp32_near(v, np.float32(whole))
        powers[e] = (whole + np.int32(127)) << np.int32(23)
        x[e] = y if x[e] >= -_FAR else _ZERO
    power = powers.view(np.float32)
    for e in range(x.size):
        x[e] = x[e] * power[e]


@_kernel
def _sigmoid32_each(row, out, powers):  # type: ignore[no-untyped-def]
    """out[e] = _sigmoid32(row[e])."""
    for e in range(out.size):
        v = row[e]
        v = v if v < _FAR + _ONE else _FAR + _ONE
        out[e] = -v
    _exp32_each(out, powers)
    for e in range(out.size):
        out[e] = _ONE / (_ONE + out[e]) if row[e] >= -_FAR else _ZERO


@njit(**_PART)
def _softmax32_each(row, highest, out, powers):  # type: ignore[no-untyped-def]
    """out[e] = exp(row[e] - highest), NaN to 0."""
    for e in range(out.size):
        out[e] = row[e] - highest
    _exp32_each(out, powers)
    for e in range(out.size):
        out[e] = _ONE if row[e] == highest else out[e]


@njit(**_PART)
def _better(a, b):  # type: ignore[no-untyped-def]
    """Whether `a` comes before `b`: a number before NaN, equals not."""
    return a > b or (b != b and a == a)


@njit(**_PART)
def _insert(score, which, best, index, held, most):  # type: ignore[no-untyped-def]
    """Keep `which` among the `most` best, the first of equals first; returns how many are held."""
    if held == most and not _better(score, best[most - 1]):
        return held
    at = held if held < most else most - 1
    while at > 0 and _better(score, best[at - 1]):
        best[at] = best[at - 1]
        index[at] = index[at - 1]
        at -= 1
    best[at] = score
    index[at] = which
    return held + 1 if held < most else held


@njit(**_PART)
def _order(score, ordered, experts):  # type: ignore[no-untyped-def]
    """ordered[e]: the order of score[e] in the upper half, E - 1 - e in the lower."""
    bits = score.view(np.int32)
    for e in range(experts):
        x = score[e]
        key = bits[e] if x != _ZERO else np.int32(0)
        key = key ^ ((key >> np.int32(31)) & np.int32(0x7FFFFFFF))
        key = key if x == x else np.int32(-(2**31))
        ordered[e] = (np.int64(key) << np.int64(32)) | np.int64(experts - 1 - e)


@njit(**_PART)
def _take_best(ordered, lane_best, experts, k, index):  # type: ignore[no-untyped-def]
    """index[:k]: the experts of the k greatest; `ordered` is a whole number of rows, and loses them."""
    rows = ordered.size // LANES
    for j in range(LANES):
        lane_best[j] = ordered[j]
    for i in range(1, rows):
        for j in range(LANES):
            lane_best[j] = max(lane_best[j], ordered[i * LANES + j])
    for p in range(k):
        greatest = lane_best[0]
        for j in range(1, LANES):
            greatest = max(greatest, lane_best[j])
        e = experts - 1 - (greatest & _LOW)
        index[p] = e
        ordered[e] = _TAKEN
        j = e % LANES
        greatest = ordered[j]
        for i in range(1, rows):
            greatest = max(greatest, ordered[i * LANES + j])
        lane_best[j] = greatest


@njit(**_PART)
def _score_of(place, score, experts):  # type: ignore[no-untyped-def]
    x = score[experts - 1 - (place & _LOW)]
    return x if x == x else _LEAST


@njit(**_PART)
def _choose_groups(score, ordered, biased, num_groups, topk_groups, best, groups, chosen):  # type: ignore[no-untyped-def]
    """chosen[g]: whether group g is one of the `topk_groups` best."""
    experts = score.size
    size = experts // num_groups
    held = 0
    for g in range(num_groups):
        chosen[g] = False
        first = second = _TAKEN
        for e in range(g * size, (g + 1) * size):
            second = max(second, min(first, ordered[e]))
            first = max(first, ordered[e])
        of_group = _score_of(first, score, experts)
        if biased and size > 1:
            of_group = of_group + _score_of(second, score, experts)
        held = _insert(of_group, g, best, groups, held, topk_groups)
    for i in range(topk_groups):
        chosen[groups[i]] = True


@njit(**_PART)
def _room(experts, biased, k, num_groups, topk_groups):  # type: ignore[no-untyped-def]
    """What one thread works in."""
    return (
        np.empty(topk_groups, np.float32),
        np.empty(topk_groups, np.int64),
        np.empty(num_groups, np.bool_),
        np.empty(experts if biased else 0, np.float32),
        np.empty(experts, np.float32),
        np.empty(experts, np.int32),
        np.full((experts + LANES - 1) // LANES * LANES, _TAKEN, np.int64),
        np.empty(LANES, np.int64),
        np.empty(k, np.int64),
    )


@njit(**_PART)
def _rows(  # type: ignore[no-untyped-def]
    lo, hi, logits, bias, sigmoid, renormalize, scale, num_groups, topk_groups, valid, weights, ids, sums, room
):
    """Tokens [lo, hi).  Shares are added to sums [E], unless that is empty.  `room` is from :func:`_room`: with nothing
    to allocate, nothing here can fail."""
    experts = logits.shape[1]
    k = weights.shape[1]
    size = experts // num_groups
    best_groups, groups, chosen, biased, every, powers, ordered, lane_best, index = room
    for t in range(lo, min(hi, valid)):
        row = logits[t]
        score = row
        if bias.size > 0:
            _sigmoid32_each(row, biased, powers)
            for e in range(experts):
                biased[e] = biased[e] + bias[e] if row[e] == row[e] else row[e]
            score = biased
        _order(score, ordered, experts)
        if num_groups > 1:
            _choose_groups(score, ordered, bias.size > 0, num_groups, topk_groups, best_groups, groups, chosen)
            for g in range(num_groups):
                if not chosen[g]:
                    for e in range(g * size, (g + 1) * size):
                        ordered[e] = _TAKEN
        _take_best(ordered, lane_best, experts, k, index)

        total = np.float64(0)
        highest = _LEAST
        if sigmoid:
            for i in range(k):
                weights[t, i] = _sigmoid32(row[index[i]])
                total += weights[t, i]
            divisor = np.float32(total) + _TINY if renormalize else _ONE
        else:
            x = row[index[0]]  # without a bias the first is the highest
            highest = x if x == x else _LEAST
            for i in range(k):
                x = row[index[i]]
                weights[t, i] = _ONE if x == highest else _exp32(x - highest) if x == x else _ZERO
                total += weights[t, i]
            if sums.size > 0 or not renormalize:
                _softmax32_each(row, highest, every, powers)
            if not renormalize:
                total = 0.0
                for e in range(experts):
                    total += every[e]
            divisor = np.float32(total)
        for i in range(k):
            ids[t, i] = index[i]
            weights[t, i] = weights[t, i] / divisor * scale if divisor > _ZERO else _ZERO
        if sums.size > 0:
            if sigmoid:
                _sigmoid32_each(row, every, powers)
            total = 0.0
            for e in range(experts):
                total += every[e]
            if total > 0:
                for e in range(experts):
                    sums[e] += every[e] / total
    for t in range(max(lo, valid), hi):
        for i in range(k):
            ids[t, i] = -1
            weights[t, i] = _ZERO


@_kernel
def route(leader, address):  # type: ignore[no-untyped-def]
    """What every thread of a call runs: chunks of the tokens are taken from a counter until none is left.

    At `address` stand the number of the next chunk, how many are done and whether the leader has begun; from
    ARGUMENTS_AT on ARGUMENTS int64 and `scale` as float64.  The leader waits for the chunks that others have taken.  A
    mean has one chunk.  Memory is taken before a thread joins: whoever finds none has taken no chunk.
    """
    given = _i64(address + ARGUMENTS_AT)
    chunks, tokens, experts, k, valid = given[0], given[1], given[2], given[3], given[4]
    sigmoid, renormalize, num_groups, topk_groups = given[5] != 0, given[6] != 0, given[7], given[8]
    logits = carray(_f32(given[9]), (tokens, experts))
    bias = carray(_f32(given[10]), experts if given[10] != 0 else 0)
    weights = carray(_f32(given[11]), (tokens, k))
    ids = carray(_i32(given[12]), (tokens, k))
    mean = carray(_f32(given[13]), experts if given[13] != 0 else 0)
    scale = _f64(address + ARGUMENTS_AT + 8 * ARGUMENTS)[0]
    sums = np.zeros(mean.size, np.float64)
    room = _room(experts, bias.size > 0, k, num_groups, topk_groups)
    if not joins(address + 128, leader):
        return
    chunk = _add(address, 1)
    while chunk < chunks:
        _rows(
            tokens * chunk // chunks, tokens * (chunk + 1) // chunks,
            logits, bias, sigmoid, renormalize, scale, num_groups, topk_groups, valid, weights, ids, sums, room,
        )  # fmt: skip
        _add(address + 64, 1)
        chunk = _add(address, 1)
    if leader != 0:
        _wait(address + 64, chunks)
        for e in range(mean.size):
            mean[e] = sums[e] / max(valid, 1)
