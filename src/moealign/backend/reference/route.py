"""The router in vectorised torch, on any device: the version to read; docs/routing.md has the equations.

The scores that select experts are float32 and have the same bits on every backend.  Without a bias they are the logits
themselves.  With one they are sums of the bias and :func:`sigmoid32`, which uses only additions, multiplications and
one division, each rounded separately.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...problem import RouteProblem

__all__ = ["TINY", "exp32", "order_of", "route", "sigmoid32"]

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
    score = x if correction_bias is None else _biased(x, correction_bias)
    keys = order_of(score)
    if routing.num_groups > 1:
        keys = torch.where(_allowed(routing, score), keys, EXCLUDED)
    # A stable sort: of equal scores the lower expert comes first.
    chosen = torch.sort(keys, dim=1, descending=True, stable=True).indices[:, :k]

    if routing.scoring == "softmax":
        highest = torch.where(x.isnan(), -torch.inf, x).amax(1, keepdim=True)
        parts = torch.where(x == highest, 1.0, exp32(x - highest))
        parts = torch.where(x.isnan(), 0.0, parts)
        picked = parts.gather(1, chosen)
        total = (picked if routing.renormalize else parts).sum(1, keepdim=True)
        result = torch.where(total > 0, picked / total, 0.0)
    else:
        parts = sigmoid32(x)
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


def _biased(x: Tensor, correction_bias: Tensor) -> Tensor:
    """The scores with a bias; NaN stays NaN, so that it is selected last."""
    return torch.where(x.isnan(), torch.nan, sigmoid32(x) + correction_bias.to(torch.float32))


def _allowed(routing: RouteProblem, score: Tensor) -> Tensor:
    """[tokens, experts]: whether the expert's group is one of the best."""
    groups, size = routing.num_groups, routing.num_experts // routing.num_groups
    scores = torch.where(score.isnan(), -torch.inf, score).view(-1, groups, size)
    best = scores.topk(min(2, size), dim=2).values
    of_group = best.sum(2) if routing.has_bias and size > 1 else best[:, :, 0]
    top = torch.sort(order_of(of_group), dim=1, descending=True, stable=True).indices[:, : routing.topk_groups]
    allowed = torch.zeros(scores.shape[:2], dtype=torch.bool, device=score.device).scatter_(1, top, True)
    return allowed.repeat_interleave(size, dim=1)
