"""The router on one CPU thread, compiled by numba: reference_routing's arithmetic, operation for operation."""

from __future__ import annotations

import numpy as np
from numba import njit

from ..reference_routing import FAR, INVERSE_LN2, LN2_HIGH, LN2_LOW, POLYNOMIAL, TINY

__all__ = ["route"]

_JIT = {"cache": True, "nogil": True, "error_model": "numpy"}
_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)
_FAR, _TINY = np.float32(FAR), np.float32(TINY)
_INVERSE_LN2, _LN2_HIGH, _LN2_LOW = np.float32(INVERSE_LN2), np.float32(LN2_HIGH), np.float32(LN2_LOW)
_C0, _C1, _C2, _C3, _C4, _C5 = (np.float32(c) for c in POLYNOMIAL)
_POWERS = np.ldexp(np.float32(1), np.arange(-126, 128)).astype(np.float32)
_LEAST = np.float32(-np.inf)


@njit(**_JIT)
def _exp32(x):  # type: ignore[no-untyped-def]
    if x < -_FAR:
        return _ZERO
    n = np.floor(x * _INVERSE_LN2 + _HALF)
    r = x - n * _LN2_HIGH
    r = r - n * _LN2_LOW
    y = _C0 * r + _C1
    y = y * r + _C2
    y = y * r + _C3
    y = y * r + _C4
    y = y * r + _C5
    y = y * (r * r)
    y = y + r
    y = y + _ONE
    return y * _POWERS[np.int64(n) + 126]


@njit(**_JIT)
def _sigmoid32(x):  # type: ignore[no-untyped-def]
    if not x >= -_FAR:  # NaN too
        return _ZERO
    return _ONE / (_ONE + _exp32(-min(x, _FAR + _ONE)))


@njit(**_JIT)
def _better(a, b):  # type: ignore[no-untyped-def]
    """Whether `a` comes before `b`: a number before NaN, equals not."""
    return a > b or (b != b and a == a)


@njit(**_JIT)
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


@njit(**_JIT)
def route(  # type: ignore[no-untyped-def]
    logits, bias, sigmoid, renormalize, scale, num_groups, topk_groups, valid, weights, ids, mean
):
    """logits [T, E], bias [E] or [0], weights and ids [T, K], mean [E] or [0]; `valid` rows count."""
    tokens, experts = logits.shape
    k = weights.shape[1]
    size = experts // num_groups
    best = np.empty(k, np.float32)
    index = np.empty(k, np.int64)
    best_groups = np.empty(topk_groups, np.float32)
    groups = np.empty(topk_groups, np.int64)
    score = np.empty(experts, np.float32)
    every = np.empty(experts, np.float32)
    sums = np.zeros(mean.size, np.float64)
    valid = min(max(valid, 0), tokens)
    for t in range(valid):
        row = logits[t]
        for e in range(experts):
            score[e] = row[e]
        if bias.size > 0:
            for e in range(experts):
                if row[e] == row[e]:
                    score[e] = _sigmoid32(row[e]) + bias[e]
        held = 0
        if num_groups == 1:
            for e in range(experts):
                held = _insert(score[e], e, best, index, held, k)
        else:
            held_groups = 0
            for g in range(num_groups):
                first = second = _LEAST
                for e in range(g * size, (g + 1) * size):
                    if score[e] > first:
                        second = first
                        first = score[e]
                    elif score[e] > second:
                        second = score[e]
                if bias.size > 0 and size > 1:
                    first = first + second
                held_groups = _insert(first, g, best_groups, groups, held_groups, topk_groups)
            groups.sort()
            for i in range(topk_groups):
                for e in range(groups[i] * size, (groups[i] + 1) * size):
                    held = _insert(score[e], e, best, index, held, k)

        total = np.float64(0)
        if sigmoid:
            for i in range(k):
                weights[t, i] = _sigmoid32(row[index[i]])
                total += weights[t, i]
            divisor = np.float32(total) + _TINY if renormalize else _ONE
        else:
            highest = _LEAST
            for e in range(experts):
                if row[e] > highest:
                    highest = row[e]
            for i in range(k):
                x = row[index[i]]
                weights[t, i] = _ONE if x == highest else _exp32(x - highest) if x == x else _ZERO
                total += weights[t, i]
            if not renormalize:
                total = 0.0
                for e in range(experts):
                    x = row[e]
                    total += _ONE if x == highest else _exp32(x - highest) if x == x else _ZERO
            divisor = np.float32(total)
        for i in range(k):
            ids[t, i] = index[i]
            weights[t, i] = weights[t, i] / divisor * scale if divisor > _ZERO else _ZERO
        if mean.size > 0:
            total = 0.0
            for e in range(experts):
                x = row[e]
                if sigmoid:
                    every[e] = _sigmoid32(x)
                else:
                    every[e] = _ONE if x == highest else _exp32(x - highest) if x == x else _ZERO
                total += every[e]
            if total > 0:
                for e in range(experts):
                    sums[e] += every[e] / total
    for t in range(valid, tokens):
        for i in range(k):
            ids[t, i] = -1
            weights[t, i] = _ZERO
    for e in range(mean.size):
        mean[e] = sums[e] / max(valid, 1)
