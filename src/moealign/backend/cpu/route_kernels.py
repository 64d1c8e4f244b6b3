"""The router on the CPU, compiled by numba: the arithmetic of ``reference/route.py``, operation for operation.

Top-k: each score becomes an int64 key.  Its upper half orders as the score does (NaN lowest, -0 as +0); its lower half
is E - 1 - e for expert e, so no two keys are equal, and of equal scores the lower expert wins.  The keys lie in rows of
`LANES`, with the maximum of each lane kept aside.  Taking the maximum changes its own lane alone, which makes
E + k (LANES + E / LANES) comparisons without a branch that depends on a score.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from ..reference import route as reference
from ..reference.route import (
    FAR,
    INVERSE_LN2,
    LN2_HIGH,
    LN2_LOW,
    LOG1P,
    MAX,
    NEAR_ZERO,
    POLYNOMIAL,
    TINY,
    UNIT,
)
from .intrinsics import atomic_add, f32_ptr, f64_ptr, i32_ptr, i64_ptr, joins, kernel, subroutine, wait_for

__all__ = ["ARGUMENTS", "ARGUMENTS_AT", "route"]

LANES = 16  # a constant, so that loops over it are vectorised
ARGUMENTS_AT = 192  # bytes: behind three counters, each in a cache line of its own
ARGUMENTS = 14  # int64
_kernel = kernel(globals(), vars(reference))
_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)
_FAR, _TINY = np.float32(FAR), np.float32(TINY)
_INVERSE_LN2, _LN2_HIGH, _LN2_LOW = np.float32(INVERSE_LN2), np.float32(LN2_HIGH), np.float32(LN2_LOW)
_C0, _C1, _C2, _C3, _C4, _C5 = (np.float32(c) for c in POLYNOMIAL)
_L0, _L1, _L2, _L3 = (np.float32(c) for c in LOG1P)
_TWO, _MAX, _NEAR_ZERO = np.float32(2), np.float32(MAX), np.float32(NEAR_ZERO)
_UNIT, _HALF_UNIT = np.float32(UNIT), np.float32(UNIT**0.5)
_POWERS = np.ldexp(np.float32(1), np.arange(-126, 128)).astype(np.float32)
_MINUS_INF = np.float32(-np.inf)
_TAKEN = np.int64(-(2**63))
_LOW = np.int64(2**32 - 1)


@subroutine
def _exp32_near(v, n):
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


@subroutine
def _exp32(x):
    """``exp32`` of ``reference/route.py`` for one number."""
    if x < -_FAR:
        return _ZERO
    n = np.floor(x * _INVERSE_LN2 + _HALF)
    return _exp32_near(x, n) * _POWERS[np.int64(n) + 126]


@subroutine
def _sigmoid32(x):
    """``sigmoid32`` of ``reference/route.py`` for one number."""
    if not x >= -_FAR:  # NaN too
        return _ZERO
    return _ONE / (_ONE + _exp32(-min(x, _FAR + _ONE)))


@subroutine
def _sqrtsoftplus32_of(x, t):
    """``sqrtsoftplus32`` of ``reference/route.py`` for x >= -FAR, from t = exp32(-abs(x))."""
    z = t / (t + _TWO)
    w = z * z
    y = _L0 * w + _L1
    y = y * w + _L2
    y = y * w + _L3
    y = (z + z) + z * (w * y)
    return np.sqrt(y + x if x > _ZERO else y)


@subroutine
def _score32(scoring, x):
    """The score of one logit by itself."""
    if scoring == 1:
        return _sigmoid32(x)
    if not x >= -_FAR:
        return _ZERO
    return _sqrtsoftplus32_of(min(x, _MAX), _exp32(-abs(x)))


@_kernel
def _exp32_each(x, powers):
    """x[e] = _exp32(x[e]), NaN to 0, for x at most FAR.  Without a branch or a table, so that the loops are vectorised.
    `powers` is int32 scratch of the same size."""
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
def _sigmoid32_each(row, out, powers):
    """out[e] = _sigmoid32(row[e])."""
    for e in range(out.size):
        v = row[e]
        v = v if v < _FAR + _ONE else _FAR + _ONE
        out[e] = -v
    _exp32_each(out, powers)
    for e in range(out.size):
        out[e] = _ONE / (_ONE + out[e]) if row[e] >= -_FAR else _ZERO


@_kernel
def _sqrtsoftplus32_each(row, out, powers):
    """out[e] = sqrtsoftplus32(row[e])."""
    for e in range(out.size):
        v = row[e]
        out[e] = -abs(v)
    _exp32_each(out, powers)
    for e in range(out.size):
        v = row[e]
        v = v if v < _MAX else _MAX
        out[e] = _sqrtsoftplus32_of(v, out[e]) if row[e] >= -_FAR else _ZERO


@subroutine
def _scores32_each(scoring, row, out, powers):
    """out[e] = _score32(scoring, row[e])."""
    if scoring == 1:
        _sigmoid32_each(row, out, powers)
    else:
        _sqrtsoftplus32_each(row, out, powers)


@subroutine
def _highest(row):
    """The highest number; -inf if there is none."""
    highest = _MINUS_INF
    for e in range(row.size):
        highest = row[e] if row[e] > highest else highest
    return highest


@_kernel
def _softmax32_each(row, highest, out, powers):
    """``softmax32`` of ``reference/route.py``."""
    _exponentials_each(row, highest, out, powers)
    upper = lower = np.int64(0)  # of the sum, in units of 2**-20 and of 2**-40: int32 is vectorised
    for e in range(out.size):
        scaled = out[e] * _HALF_UNIT
        whole = np.int32(scaled)
        upper += np.int64(whole)
        lower += np.int64(np.int32((scaled - np.float32(whole)) * _HALF_UNIT))
    divisor = np.float32(np.float64((upper << np.int64(20)) + lower)) / _UNIT
    for e in range(out.size):
        out[e] = out[e] / divisor if out[e] >= _NEAR_ZERO else _ZERO


@subroutine
def _exponentials_each(row, highest, out, powers):
    """out[e] = exp(row[e] - highest), NaN to 0."""
    for e in range(out.size):
        out[e] = row[e] - highest
    _exp32_each(out, powers)
    for e in range(out.size):
        out[e] = _ONE if row[e] == highest else out[e]


@subroutine
def _better(a, b):
    """Whether `a` ranks before `b`: any number before NaN; False for equals."""
    return a > b or (b != b and a == a)


@subroutine
def _insert(score, which, best, index, size, max_size):
    """Insert `which` into the list of the `max_size` best, of equals the first first; returns the list's size."""
    if size == max_size and not _better(score, best[max_size - 1]):
        return size
    at = size if size < max_size else max_size - 1
    while at > 0 and _better(score, best[at - 1]):
        best[at] = best[at - 1]
        index[at] = index[at - 1]
        at -= 1
    best[at] = score
    index[at] = which
    return size + 1 if size < max_size else size


@subroutine
def _make_keys(score, keys, experts):
    """keys[e]: the order of score[e] in the upper half, E - 1 - e in the lower."""
    bits = score.view(np.int32)
    for e in range(experts):
        x = score[e]
        key = bits[e] if x != _ZERO else np.int32(0)
        key = key ^ ((key >> np.int32(31)) & np.int32(0x7FFFFFFF))
        key = key if x == x else np.int32(-(2**31))
        keys[e] = (np.int64(key) << np.int64(32)) | np.int64(experts - 1 - e)


@subroutine
def _top_k(keys, lane_best, experts, k, index):
    """index[:k]: the experts of the k greatest keys, which become _TAKEN; `keys` is a whole number of rows."""
    rows = keys.size // LANES
    for j in range(LANES):
        lane_best[j] = keys[j]
    for i in range(1, rows):
        for j in range(LANES):
            lane_best[j] = max(lane_best[j], keys[i * LANES + j])
    for p in range(k):
        greatest = lane_best[0]
        for j in range(1, LANES):
            greatest = max(greatest, lane_best[j])
        e = experts - 1 - (greatest & _LOW)
        index[p] = e
        keys[e] = _TAKEN
        j = e % LANES
        greatest = keys[j]
        for i in range(1, rows):
            greatest = max(greatest, keys[i * LANES + j])
        lane_best[j] = greatest


@subroutine
def _score_of(key, score, experts):
    """The score behind a key; -inf for NaN."""
    x = score[experts - 1 - (key & _LOW)]
    return x if x == x else _MINUS_INF


@subroutine
def _select_groups(score, keys, biased, num_groups, topk_groups, best, groups, selected):
    """selected[g]: whether group g is one of the `topk_groups` best."""
    experts = score.size
    size = experts // num_groups
    listed = 0
    for g in range(num_groups):
        selected[g] = False
        first = second = _TAKEN
        for e in range(g * size, (g + 1) * size):
            second = max(second, min(first, keys[e]))
            first = max(first, keys[e])
        of_group = _score_of(first, score, experts)
        if biased and size > 1:
            of_group = of_group + _score_of(second, score, experts)
        listed = _insert(of_group, g, best, groups, listed, topk_groups)
    for i in range(topk_groups):
        selected[groups[i]] = True


@subroutine
def _scratch(experts, biased, k, num_groups, topk_groups):
    """The arrays that one thread works in."""
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


@subroutine
def _route_tokens(
    lo, hi, logits, bias, scoring, renormalize, scale, num_groups, topk_groups, valid, weights, ids, sums, scratch
):
    """Route the tokens [lo, hi), and add their shares to sums [E], unless that is empty.  `scratch` is from
    :func:`_scratch`: nothing is allocated here, so nothing can fail."""
    experts = logits.shape[1]
    k = weights.shape[1]
    size = experts // num_groups
    best_groups, groups, selected, biased, parts, powers, keys, lane_best, index = scratch
    for t in range(lo, min(hi, valid)):
        row = logits[t]
        score = row
        if bias.size > 0:
            if scoring == 0:
                _softmax32_each(row, _highest(row), biased, powers)
            else:
                _scores32_each(scoring, row, biased, powers)
            for e in range(experts):
                biased[e] = biased[e] + bias[e] if row[e] == row[e] else row[e]
            score = biased
        _make_keys(score, keys, experts)
        if num_groups > 1:
            _select_groups(score, keys, bias.size > 0, num_groups, topk_groups, best_groups, groups, selected)
            for g in range(num_groups):
                if not selected[g]:
                    for e in range(g * size, (g + 1) * size):
                        keys[e] = _TAKEN
        _top_k(keys, lane_best, experts, k, index)

        total = np.float64(0)
        highest = _MINUS_INF
        if scoring != 0:
            for i in range(k):
                weights[t, i] = _score32(scoring, row[index[i]])
                total += weights[t, i]
            divisor = np.float32(total) + _TINY if renormalize else _ONE
        else:
            x = row[index[0]]  # without a bias the first choice has the highest logit, unless it is NaN
            highest = x if x == x else _MINUS_INF
            base = highest  # of the weights
            if bias.size > 0:
                highest = base = _highest(row)
                if renormalize:
                    base = _MINUS_INF
                    for i in range(k):
                        x = row[index[i]]
                        base = x if x > base else base
            for i in range(k):
                x = row[index[i]]
                weights[t, i] = _ONE if x == base else _exp32(x - base) if x == x else _ZERO
                total += weights[t, i]
            if sums.size > 0 or not renormalize:
                _exponentials_each(row, highest, parts, powers)
            if not renormalize:
                total = 0.0
                for e in range(experts):
                    total += parts[e]
            divisor = np.float32(total)
        for i in range(k):
            ids[t, i] = index[i]
            weights[t, i] = weights[t, i] / divisor * scale if divisor > _ZERO else _ZERO
        if sums.size > 0:
            if scoring != 0:
                _scores32_each(scoring, row, parts, powers)
            total = 0.0
            for e in range(experts):
                total += parts[e]
            if total > 0:
                for e in range(experts):
                    sums[e] += parts[e] / total
    for t in range(max(lo, valid), hi):
        for i in range(k):
            ids[t, i] = -1
            weights[t, i] = _ZERO


@_kernel
def route(leader, address):
    """Route on every thread of a call: each runs this and takes chunks of the tokens until none is left.

    At `address` are three counters: the next chunk, the chunks done, and whether the leader has begun.  From
    ARGUMENTS_AT on follow ARGUMENTS int64, then `scale` as float64.  The leader waits for chunks that helpers took.
    Scratch is allocated before a thread joins, so a helper without memory has taken no chunk.  With a mean there is
    one chunk: shares are summed in the order of the tokens.
    """
    args = i64_ptr(address + ARGUMENTS_AT)
    chunks, tokens, experts, k, valid = args[0], args[1], args[2], args[3], args[4]
    scoring, renormalize, num_groups, topk_groups = args[5], args[6] != 0, args[7], args[8]
    logits = carray(f32_ptr(args[9]), (tokens, experts))
    bias = carray(f32_ptr(args[10]), experts if args[10] != 0 else 0)
    weights = carray(f32_ptr(args[11]), (tokens, k))
    ids = carray(i32_ptr(args[12]), (tokens, k))
    mean = carray(f32_ptr(args[13]), experts if args[13] != 0 else 0)
    scale = f64_ptr(address + ARGUMENTS_AT + 8 * ARGUMENTS)[0]
    sums = np.zeros(mean.size, np.float64)
    scratch = _scratch(experts, bias.size > 0, k, num_groups, topk_groups)
    if not joins(address + 128, leader):
        return
    chunk = atomic_add(address, 1)
    while chunk < chunks:
        _route_tokens(
            tokens * chunk // chunks, tokens * (chunk + 1) // chunks,
            logits, bias, scoring, renormalize, scale, num_groups, topk_groups, valid, weights, ids, sums, scratch,
        )  # fmt: skip
        atomic_add(address + 64, 1)
        chunk = atomic_add(address, 1)
    if leader != 0:
        wait_for(address + 64, chunks)
        for e in range(mean.size):
            mean[e] = sums[e] / max(valid, 1)
