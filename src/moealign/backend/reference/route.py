"""The router in vectorised torch, on any device: the version to read; docs/routing.md has the equations.

The scores that select experts are float32 and have the same bits on every backend.  Without a bias they are the logits
themselves.  With one they are sums of the bias and :func:`sigmoid32`, :func:`sqrtsoftplus32` or :func:`softmax32`,
which use only additions, multiplications, divisions and a square root, each rounded separately, and a sum of integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...problem import RouteProblem

__all__ = [
    "FAR",
    "INVERSE_LN2",
    "LN2_HIGH",
    "LN2_LOW",
    "LOG1P",
    "MAX",
    "NEAR_ZERO",
    "POLYNOMIAL",
    "TINY",
    "UNIT",
    "exp32",
    "exponentials",
    "order_of",
    "route",
    "sigmoid32",
    "softmax32",
    "sqrtsoftplus32",
]

# exp(x) = 2**n * exp(r): n = floor(x / ln 2 + 1/2), r = x - n ln 2 with ln 2 in two parts, exp(r) by a polynomial
# (Cephes' expf).  Every constant is a float32.
INVERSE_LN2 = 1.4426950216293335
LN2_HIGH, LN2_LOW = 0.693359375, -2.1219444170128554e-4
POLYNOMIAL = (
    1.9875691214110702e-4,
    1.3981999363750219e-3,
    8.333452045917511e-3,
    4.166579619050026e-2,
    0.16666665673255920,
    0.5,
)
FAR = 87.0  # below -FAR exp32 is 0, and no result is a subnormal number
# log(1 + t) = 2 artanh z = 2 z + z**3 Q(z**2) with z = t / (2 + t): Q by a polynomial, for t in [0, 1].
LOG1P = (0.2802531123161316, 0.2799898087978363, 0.40021708607673645, 0.6666641235351562)
MAX = 3.4028234663852886e38  # the highest float32, which stands for inf: a weight is no quotient of infinities
UNIT = 2.0**40  # exponentials are summed as whole numbers of 1 / UNIT, so their sum has no order
NEAR_ZERO = 2.0**-100  # lower exponentials count as 0: no probability is a subnormal number
TINY = 1e-20
EXCLUDED = -(2**40)


def exp32(x: Tensor) -> Tensor:
    """exp of float32 `x` <= FAR, to two units in the last place; 0 below -FAR."""
    inside = x.clamp(-FAR, FAR)
    n = torch.floor(inside * INVERSE_LN2 + 0.5)
    r = inside - n * LN2_HIGH
    r = r - n * LN2_LOW
    y = torch.full_like(r, POLYNOMIAL[0])
    for coefficient in POLYNOMIAL[1:]:
        y = y * r
        y = y + coefficient
    y = y * (r * r)
    y = y + r
    y = y + 1.0
    power = ((n.to(torch.int32) + 127) << 23).view(torch.float32)
    return torch.where(x < -FAR, 0.0, y * power)


def sigmoid32(x: Tensor) -> Tensor:
    """1 / (1 + exp32(-x)); 0 below -FAR and for NaN."""
    return torch.where(x >= -FAR, 1.0 / (1.0 + exp32(-x)), 0.0)


def sqrtsoftplus32(x: Tensor) -> Tensor:
    """sqrt(log(1 + exp(x))); 0 below -FAR and for NaN."""
    inside = x.clamp(max=MAX)
    t = exp32(-inside.abs())
    z = t / (t + 2.0)
    w = z * z
    y = torch.full_like(w, LOG1P[0])
    for coefficient in LOG1P[1:]:
        y = y * w
        y = y + coefficient
    y = z * (w * y)
    y = (z + z) + y
    y = torch.where(inside > 0, inside + y, y)
    root = y.to(torch.float64).sqrt().to(torch.float32)  # torch's own in float32 is not rounded to the nearest
    return torch.where(x >= -FAR, root, 0.0)


def softmax32(x: Tensor) -> Tensor:
    """exp(x) / sum(exp(x)) along the last dimension, 0 for NaN: :func:`exponentials` by their sum of whole numbers."""
    parts = exponentials(x)
    total = (parts * UNIT).to(torch.int64).sum(-1, keepdim=True)
    divisor = total.to(torch.float64).to(torch.float32) / UNIT
    return torch.where(parts >= NEAR_ZERO, parts / divisor, 0.0)


def exponentials(x: Tensor) -> Tensor:
    """exp(x - max x) along the last dimension, 1 at the maximum, which may be infinite, and 0 for NaN."""
    highest = torch.where(x.isnan(), -torch.inf, x).amax(-1, keepdim=True)
    parts = torch.where(x == highest, 1.0, exp32(x - highest))
    return torch.where(x.isnan(), 0.0, parts)


_SCORES = {"softmax": softmax32, "sigmoid": sigmoid32, "sqrtsoftplus": sqrtsoftplus32}


def order_of(x: Tensor) -> Tensor:
    """int64 keys that sort as the float32 do, with -0 equal to +0, and NaN below everything."""
    bits = (x + 0.0).view(torch.int32).to(torch.int64)
    keys = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    return torch.where(x.isnan(), -(2**32), keys)


def route(
    routing: RouteProblem,
    router_logits: Tensor,
    correction_bias: Tensor | None,
    num_valid_tokens: Tensor | None,
    weights: Tensor,
    ids: Tensor,
    mean_probability: Tensor | None,
) -> None:
    """Fill `weights` and `ids` ``[tokens, top_k]``, and `mean_probability` ``[num_experts]`` unless that is None."""
    x = router_logits.to(torch.float32)
    tokens, k = routing.tokens, routing.top_k
    score = x if correction_bias is None else _biased(routing, x, correction_bias)
    keys = order_of(score)
    if routing.num_groups > 1:
        keys = torch.where(_allowed(routing, score), keys, EXCLUDED)
    # A stable sort: of equal scores the lower expert comes first.
    chosen = torch.sort(keys, dim=1, descending=True, stable=True).indices[:, :k]

    if routing.scoring == "softmax":
        parts = exponentials(x)
        if not routing.renormalize:
            picked, total = parts.gather(1, chosen), parts.sum(1, keepdim=True)
        else:
            # With a bias, the highest logit may not be among the chosen.
            picked = exponentials(x.gather(1, chosen)) if routing.has_bias else parts.gather(1, chosen)
            total = picked.sum(1, keepdim=True)
        result = torch.where(total > 0, picked / total, 0.0)
    else:
        parts = _SCORES[routing.scoring](x)
        picked = parts.gather(1, chosen)
        result = picked / (picked.sum(1, keepdim=True) + TINY) if routing.renormalize else picked

    live = torch.ones(tokens, 1, dtype=torch.bool, device=x.device)
    if num_valid_tokens is not None:
        live = torch.arange(tokens, device=x.device)[:, None] < num_valid_tokens.reshape(())
    weights.copy_(torch.where(live, result * routing.scale, 0.0))
    ids.copy_(torch.where(live, chosen, -1))
    if mean_probability is not None:
        total = parts.sum(1, keepdim=True)
        shares = torch.where(live & (total > 0), parts / total, 0.0)
        mean_probability.copy_(shares.sum(0) / live.sum().clamp(min=1))


def _biased(routing: RouteProblem, x: Tensor, correction_bias: Tensor) -> Tensor:
    """The scores with a bias; NaN stays NaN, so that it is selected last."""
    return torch.where(x.isnan(), torch.nan, _SCORES[routing.scoring](x) + correction_bias.to(torch.float32))


def _allowed(routing: RouteProblem, score: Tensor) -> Tensor:
    """[tokens, experts]: whether the expert's group is one of the best."""
    groups, size = routing.num_groups, routing.num_experts // routing.num_groups
    scores = torch.where(score.isnan(), -torch.inf, score).view(-1, groups, size)
    best = scores.topk(min(2, size), dim=2).values
    of_group = best.sum(2) if routing.has_bias and size > 1 else best[:, :, 0]
    top = torch.sort(order_of(of_group), dim=1, descending=True, stable=True).indices[:, : routing.topk_groups]
    allowed = torch.zeros(scores.shape[:2], dtype=torch.bool, device=score.device).scatter_(1, top, True)
    return allowed.repeat_interleave(size, dim=1)
