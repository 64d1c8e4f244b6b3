# mypy: disable-error-code="no-untyped-def"
"""The router in Triton: a program a token.  Imported at a first call only; docs/routing.md has the equations.

What decides about an expert is reference_routing's arithmetic, operation for operation, so that every backend chooses
the same: it has to be compiled without fused multiply-add (``enable_fp_fusion=False``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..reference.route import FAR, INVERSE_LN2, LN2_HIGH, LN2_LOW, POLYNOMIAL, TINY

__all__ = ["choose"]

_INVERSE_LN2, _LN2_HIGH, _LN2_LOW = tl.constexpr(INVERSE_LN2), tl.constexpr(LN2_HIGH), tl.constexpr(LN2_LOW)
_C0, _C1, _C2, _C3, _C4, _C5 = (tl.constexpr(each) for each in POLYNOMIAL)
_FAR, _TINY = tl.constexpr(FAR), tl.constexpr(TINY)
_NEVER = tl.constexpr(-(2**63))  # the key of what cannot be chosen
_NAN = tl.constexpr(-(2**31))
_STEP = tl.constexpr(2**32)
_LOW = tl.constexpr(2**32 - 1)


@triton.jit
def _exp32(x):
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
    there = x >= -_FAR  # not NaN either
    below = 1.0 + _exp32(tl.where(there, -x, 0.0))
    return tl.where(there, tl.div_rn(tl.full(x.shape, 1.0, tl.float32), below), 0.0)


@triton.jit
def _keys(score, index):
    """int64 keys that sort as the float32 do, NaN below all; of equals the lower index is the greater."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(score == score, order, _NAN)
    return order.to(tl.int64) * _STEP + (index.to(tl.int64) ^ _LOW)


@triton.jit
def _index_of(key):
    return ((key & _LOW) ^ _LOW).to(tl.int32)


@triton.jit
def _parts(x, highest, SIGMOID: tl.constexpr):
    """Weights before they are divided."""
    if SIGMOID:
        return _sigmoid32(x)
    number = x == x
    return tl.where(x == highest, 1.0, tl.where(number, _exp32(tl.where(number, x - highest, 0.0)), 0.0))


@triton.jit
def _allowed(
    score, experts, there,
    BIAS: tl.constexpr, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, TOP_GROUPS: tl.constexpr,
    GROUP_ROOM: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Whether an expert's group is among the best."""
    group = experts // GROUP_SIZE
    numbers = tl.where(there & (score == score), score, float("-inf"))
    which = tl.arange(0, GROUP_ROOM)
    keys = tl.full((GROUP_ROOM,), _NEVER, tl.int64)
    for g in range(GROUPS):
        mine = tl.where(group == g, numbers, float("-inf"))
        best = tl.max(mine, 0)
        if BIAS and GROUP_SIZE > 1:
            at = tl.min(tl.where((group == g) & (mine == best), experts, SIZE), 0)
            best = best + tl.max(tl.where(experts == at, float("-inf"), mine), 0)
        keys = tl.where(which == g, _keys(tl.full((GROUP_ROOM,), 0.0, tl.float32) + best, which), keys)
    found = experts < 0
    for _ in range(TOP_GROUPS):
        top = tl.max(keys, 0)
        found = found | (group == _index_of(top))
        keys = tl.where(keys == top, _NEVER, keys)
    return found


# Rows lie a stride apart that no constant tells, so the address of the first is worth nothing either.
@triton.jit(
    do_not_specialize=["tokens", "row_stride", "scale"],
    do_not_specialize_on_alignment=["logits", "bias", "num_valid", "weights", "ids", "shares"],
)
def choose(
    logits, bias, num_valid, weights, ids, shares,
    tokens, row_stride, scale,
    SIGMOID: tl.constexpr, RENORM: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
    GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    SIZE: tl.constexpr, LIST: tl.constexpr, GROUP_ROOM: tl.constexpr,
):  # fmt: skip
    """SIZE, LIST and GROUP_ROOM: the powers of two that hold EXPERTS, TOP_K and GROUPS.  `shares` may be None."""
    token = tl.program_id(0).to(tl.int64)
    experts, place = tl.arange(0, SIZE), tl.arange(0, LIST)
    there = experts < EXPERTS
    row = logits + token * row_stride
    x = tl.load(row + experts, mask=there, other=0.0).to(tl.float32)
    score = x
    if bias is not None:
        score = tl.where(x == x, _sigmoid32(x) + tl.load(bias + experts, mask=there, other=0.0), float("nan"))
    if GROUPS > 1:
        size: tl.constexpr = EXPERTS // GROUPS
        may = there & _allowed(
            score, experts, there, bias is not None, GROUPS, size, TOP_GROUPS, GROUP_ROOM, SIZE
        )  # fmt: skip
    else:
        may = there
    keys = tl.where(may, _keys(score, experts), _NEVER)
    chosen = tl.zeros((LIST,), tl.int32)
    for k in range(TOP_K):
        best = tl.max(keys, 0)
        chosen = tl.where(place == k, _index_of(best), chosen)
        keys = tl.where(keys == best, _NEVER, keys)

    taken = place < TOP_K
    highest = tl.max(tl.where(there & (x == x), x, float("-inf")), 0)
    part = _parts(tl.load(row + chosen, mask=taken, other=0.0).to(tl.float32), highest, SIGMOID)
    part = tl.where(taken, part, 0.0)
    total = tl.full((LIST,), 1.0, tl.float32)
    if RENORM:
        total = total * tl.sum(part, 0)
        if SIGMOID:
            total = total + _TINY
    live = token < tokens
    if num_valid is not None:
        live = token < tl.load(num_valid)
    if (shares is not None) or (not SIGMOID and not RENORM):
        every = tl.where(there, _parts(x, highest, SIGMOID), 0.0)
        of_all = tl.sum(every, 0)
        if not SIGMOID and not RENORM:
            total = total * of_all
        if shares is not None:
            share = tl.where(live & (of_all > 0), every / tl.where(of_all > 0, of_all, 1.0), 0.0)
            tl.store(shares + token * EXPERTS + experts, share, mask=there)
    some = total > 0
    weight = tl.where(some, tl.div_rn(part, tl.where(some, total, 1.0)) * scale, 0.0)
    tl.store(weights + token * TOP_K + place, tl.where(live, weight, 0.0), mask=taken)
    tl.store(ids + token * TOP_K + place, tl.where(live, chosen, -1), mask=taken)
