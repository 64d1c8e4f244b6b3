# mypy: disable-error-code="no-untyped-def"
"""The router in Triton.  Only a first call imports it; docs/routing.md has the equations.

Scores are compared by the arithmetic of ``reference/route.py``, operation for operation, so that every backend selects
the same experts.  That requires compilation without fused multiply-add (``enable_fp_fusion=False``).
"""

from __future__ import annotations

import triton
import triton.language as tl

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

__all__ = ["topk"]

_INVERSE_LN2, _LN2_HIGH, _LN2_LOW = tl.constexpr(INVERSE_LN2), tl.constexpr(LN2_HIGH), tl.constexpr(LN2_LOW)
_C0, _C1, _C2, _C3, _C4, _C5 = (tl.constexpr(each) for each in POLYNOMIAL)
_L0, _L1, _L2, _L3 = (tl.constexpr(each) for each in LOG1P)
_FAR, _TINY = tl.constexpr(FAR), tl.constexpr(TINY)
_MAX, _NEAR_ZERO, _UNIT = tl.constexpr(MAX), tl.constexpr(NEAR_ZERO), tl.constexpr(UNIT)
_INVERSE_UNIT = tl.constexpr(1 / UNIT)
_NEVER = tl.constexpr(-(2**63))  # the key of an expert that cannot be selected
_NAN = tl.constexpr(-(2**31))
_STEP = tl.constexpr(2**32)
_LOW = tl.constexpr(2**32 - 1)


@triton.jit
def _exp32(x):
    """``exp32`` of the reference."""
    inside = tl.minimum(tl.maximum(x, -_FAR), _FAR)
    n = tl.floor(inside * _INVERSE_LN2 + 0.5)
    r = inside - n * _LN2_HIGH
    r = r - n * _LN2_LOW
    y = r * _C0 + _C1
    y = y * r + _C2
    y = y * r + _C3
    y = y * r + _C4
    y = y * r + _C5
    y = y * (r * r)
    y = y + r
    y = y + 1.0
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < -_FAR, 0.0, y * power)


@triton.jit
def _sigmoid32(x):
    """``sigmoid32`` of the reference."""
    regular = x >= -_FAR  # False for NaN
    denominator = 1.0 + _exp32(tl.where(regular, -x, 0.0))
    return tl.where(regular, tl.div_rn(tl.full(x.shape, 1.0, tl.float32), denominator), 0.0)


@triton.jit
def _sqrtsoftplus32(x):
    """``sqrtsoftplus32`` of the reference."""
    regular = x >= -_FAR  # False for NaN
    inside = tl.minimum(tl.where(regular, x, 0.0), _MAX)
    t = _exp32(-tl.abs(inside))
    z = tl.div_rn(t, t + 2.0)
    w = z * z
    y = w * _L0 + _L1
    y = y * w + _L2
    y = y * w + _L3
    y = (z + z) + z * (w * y)
    y = tl.where(inside > 0, y + inside, y)
    return tl.where(regular, tl.sqrt_rn(y), 0.0)


@triton.jit
def _exponentials(x, highest):
    """exp(x - highest), 1 at the highest, which may be infinite, and 0 for NaN."""
    number = x == x
    return tl.where(x == highest, 1.0, tl.where(number, _exp32(tl.where(number, x - highest, 0.0)), 0.0))


@triton.jit
def _softmax32(x, inside):
    """``softmax32`` of the reference."""
    highest = tl.max(tl.where(inside & (x == x), x, float("-inf")), 0)
    parts = tl.where(inside, _exponentials(x, highest), 0.0)
    total = tl.sum((parts * _UNIT).to(tl.int64), 0)
    divisor = tl.full(x.shape, 1.0, tl.float32) * (total.to(tl.float32) * _INVERSE_UNIT)
    regular = parts >= _NEAR_ZERO
    return tl.where(regular, tl.div_rn(parts, tl.where(regular, divisor, 1.0)), 0.0)


@triton.jit
def _scores(x, inside, SCORING: tl.constexpr):
    """What a bias is added to."""
    if SCORING == "softmax":
        return _softmax32(x, inside)
    elif SCORING == "sigmoid":
        return _sigmoid32(x)
    else:
        return _sqrtsoftplus32(x)


@triton.jit
def _keys(score, index):
    """int64 keys in the order of the float32 scores, NaN lowest.  Of equal scores the first has the highest key."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(score == score, order, _NAN)
    return order.to(tl.int64) * _STEP + (index.to(tl.int64) ^ _LOW)


@triton.jit
def _index_of(key):
    return ((key & _LOW) ^ _LOW).to(tl.int32)


@triton.jit
def _parts(x, highest, SCORING: tl.constexpr):
    """Weights before their division by the total; 0 for NaN."""
    if SCORING == "softmax":
        return _exponentials(x, highest)
    elif SCORING == "sigmoid":
        return _sigmoid32(x)
    else:
        return _sqrtsoftplus32(x)


@triton.jit
def _allowed(
    score, experts, inside,
    BIAS: tl.constexpr, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, TOP_GROUPS: tl.constexpr,
    GROUPS_POW2: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Whether an expert's group is one of the TOP_GROUPS best."""
    group = experts // GROUP_SIZE
    numbers = tl.where(inside & (score == score), score, float("-inf"))
    which = tl.arange(0, GROUPS_POW2)
    keys = tl.full((GROUPS_POW2,), _NEVER, tl.int64)
    for g in range(GROUPS):
        mine = tl.where(group == g, numbers, float("-inf"))
        best = tl.max(mine, 0)
        if BIAS and GROUP_SIZE > 1:
            at = tl.min(tl.where((group == g) & (mine == best), experts, SIZE), 0)
            best = best + tl.max(tl.where(experts == at, float("-inf"), mine), 0)
        keys = tl.where(which == g, _keys(tl.full((GROUPS_POW2,), 0.0, tl.float32) + best, which), keys)
    allowed = experts < 0
    for _ in range(TOP_GROUPS):
        top = tl.max(keys, 0)
        allowed = allowed | (group == _index_of(top))
        keys = tl.where(keys == top, _NEVER, keys)
    return allowed


# The stride between rows is no constant, so the alignment of the first row says nothing about the others.
@triton.jit(
    do_not_specialize=["tokens", "row_stride", "scale"],
    do_not_specialize_on_alignment=["logits", "bias", "num_valid", "weights", "ids", "shares"],
)
def topk(
    logits, bias, num_valid, weights, ids, shares,
    tokens, row_stride, scale,
    SCORING: tl.constexpr, RENORM: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
    GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    EXPERTS_POW2: tl.constexpr, TOP_K_POW2: tl.constexpr, GROUPS_POW2: tl.constexpr,
):  # fmt: skip
    """The TOP_K experts of each token and their weights.  Launch: a program per token.

    Inputs: `logits` [tokens, EXPERTS], rows `row_stride` apart; `bias` float32 [EXPERTS] or None; `num_valid` int32 [1]
    or None.  Outputs: `weights` float32 and `ids` int32 [tokens, TOP_K]; `shares` float32 [tokens, EXPERTS] or None.
    Constants: those of a :class:`~moealign.problem.RouteProblem`, and the powers of two that hold EXPERTS, TOP_K and
    GROUPS.
    """
    token = tl.program_id(0).to(tl.int64)
    experts, choice = tl.arange(0, EXPERTS_POW2), tl.arange(0, TOP_K_POW2)
    inside = experts < EXPERTS
    row = logits + token * row_stride
    x = tl.load(row + experts, mask=inside, other=0.0).to(tl.float32)
    score = x
    if bias is not None:
        number = x == x
        base = _scores(x, inside, SCORING)
        score = tl.where(number, base + tl.load(bias + experts, mask=inside, other=0.0), float("nan"))
    if GROUPS > 1:
        size: tl.constexpr = EXPERTS // GROUPS
        allowed = inside & _allowed(
            score, experts, inside, bias is not None, GROUPS, size, TOP_GROUPS, GROUPS_POW2, EXPERTS_POW2
        )  # fmt: skip
    else:
        allowed = inside
    keys = tl.where(allowed, _keys(score, experts), _NEVER)
    chosen = tl.zeros((TOP_K_POW2,), tl.int32)
    for k in range(TOP_K):
        best = tl.max(keys, 0)
        chosen = tl.where(choice == k, _index_of(best), chosen)
        keys = tl.where(keys == best, _NEVER, keys)

    listed = choice < TOP_K
    highest = tl.max(tl.where(inside & (x == x), x, float("-inf")), 0)
    picked = tl.load(row + chosen, mask=listed, other=0.0).to(tl.float32)
    of_chosen = highest
    if bias is not None and RENORM:  # the highest logit may not be among the chosen
        of_chosen = tl.max(tl.where(listed & (picked == picked), picked, float("-inf")), 0)
    part = _parts(picked, of_chosen, SCORING)
    part = tl.where(listed, part, 0.0)
    total = tl.full((TOP_K_POW2,), 1.0, tl.float32)
    if RENORM:
        total = total * tl.sum(part, 0)
        if SCORING != "softmax":
            total = total + _TINY
    live = token < tokens
    if num_valid is not None:
        live = token < tl.load(num_valid)
    if (shares is not None) or (SCORING == "softmax" and not RENORM):
        parts = tl.where(inside, _parts(x, highest, SCORING), 0.0)
        sum_of_all = tl.sum(parts, 0)
        if SCORING == "softmax" and not RENORM:
            total = total * sum_of_all
        if shares is not None:
            share = tl.where(live & (sum_of_all > 0), parts / tl.where(sum_of_all > 0, sum_of_all, 1.0), 0.0)
            tl.store(shares + token * EXPERTS + experts, share, mask=inside)
    positive = total > 0
    weight = tl.where(positive, tl.div_rn(part, tl.where(positive, total, 1.0)) * scale, 0.0)
    tl.store(weights + token * TOP_K + choice, tl.where(live, weight, 0.0), mask=listed)
    tl.store(ids + token * TOP_K + choice, tl.where(live, chosen, -1), mask=listed)
