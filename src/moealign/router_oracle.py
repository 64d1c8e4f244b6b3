"""The router as plain loops: docs/contract.md as code, for ids; weights are computed in double."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["oracle_route"]


def _exp_by_contract(x: float) -> Any:
    """docs/contract.md, step by step, every operation rounded to float32."""
    f = np.float32
    if x < -87:
        return f(0)
    n = np.floor(f(f(x) * f(1.44269504)) + f(0.5))
    r = f(f(x) - n * f(0.693359375)) - n * f(-2.12194440e-4)
    y = f(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        y = f(y * r) + f(coefficient)
    y = f(y * f(r * r)) + r
    return f(f(y + f(1)) * f(2.0 ** int(n)))


def _scores_by_contract(scoring: str, row: list[float]) -> list[float]:
    """What a bias is added to; 0 for NaN."""
    f = np.float32
    if scoring == "softmax":
        highest = max((x for x in row if not math.isnan(x)), default=0.0)
        parts = [
            0.0 if math.isnan(x) else 1.0 if x == highest else _exp_by_contract(max(x - highest, -88)) for x in row
        ]
        divisor = f(sum(int(float(part) * 2**40) for part in parts)) / f(2**40)
        return [float(f(part) / divisor) if part >= 2.0**-100 else 0.0 for part in parts]
    scores = []
    for x in row:
        if not x >= -87:
            scores.append(0.0)
        elif scoring == "sigmoid":
            scores.append(float(f(1) / (f(1) + _exp_by_contract(-min(x, 88)))))
        else:
            t = _exp_by_contract(-min(abs(x), 88))
            z = f(t / f(f(2) + t))
            w = f(z * z)
            y = f(f(f(0.2802531123161316) * w) + f(0.2799898087978363))
            y = f(f(y * w) + f(0.40021708607673645))
            y = f(f(y * w) + f(0.6666641235351562))
            y = f(f(z + z) + f(z * f(w * y)))
            scores.append(float(np.sqrt(f(y + f(min(x, 3.4028234663852886e38))) if x > 0 else y)))
    return scores


def _exponentials(row: list[float]) -> list[float]:
    highest = max((x for x in row if not math.isnan(x)), default=0.0)
    return [0.0 if math.isnan(x) else 1.0 if x == highest else math.exp(x - highest) for x in row]


def _score(scoring: str, x: float) -> float:
    if scoring == "sigmoid":
        return 1 / (1 + math.exp(-x))
    return math.sqrt(math.log1p(math.exp(-abs(x))) + min(max(x, 0.0), 3.4028234663852886e38))


def oracle_route(
    router_logits: Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    renormalize: bool = True,
    correction_bias: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    scale: float = 1.0,
    num_valid_tokens: int | None = None,
    replay_ids: Tensor | None = None,
    expert_scale: Tensor | None = None,
    shared_experts: int = 0,
) -> tuple[list[list[int]], list[list[float]], list[float]]:
    """Ids, weights and mean shares of :func:`moealign.route`.  Ids are exact; weights are computed in double."""
    experts = router_logits.shape[1]
    bias = None if correction_bias is None else correction_bias.to(torch.float32).tolist()
    factors = [1.0] * experts if expert_scale is None else expert_scale.to(torch.float32).tolist()
    shared = list(range(experts, experts + shared_experts))
    valid = router_logits.shape[0] if num_valid_tokens is None else num_valid_tokens
    all_ids, all_weights, shares = [], [], [0.0] * experts

    def rank(score: float, place: int) -> tuple[bool, float, int]:
        return (math.isnan(score), 0.0 if math.isnan(score) else -score, place)  # NaN last, equals by their place

    for token, row in enumerate(router_logits.to(torch.float32).tolist()):
        if token >= valid:
            all_ids.append([-1] * (top_k + shared_experts))
            all_weights.append([0.0] * (top_k + shared_experts))
            continue
        scores = list(row)
        if bias is not None:
            for e, s in enumerate(_scores_by_contract(scoring, row)):
                if not math.isnan(row[e]):
                    scores[e] = float(np.float32(s) + np.float32(bias[e]))
        size = experts // num_groups
        groups = []
        for g in range(num_groups):
            part = sorted((-math.inf if math.isnan(x) else x for x in scores[g * size : (g + 1) * size]), reverse=True)
            both = bias is not None and size > 1
            groups.append(float(np.float32(part[0]) + np.float32(part[1])) if both else part[0])
        best = sorted(range(num_groups), key=lambda g: rank(groups[g], g))[:topk_groups]
        allowed = [e for e in range(experts) if e // size in best]
        chosen = sorted(allowed, key=lambda e: rank(scores[e], e))[:top_k]
        if replay_ids is not None:
            chosen = [e if 0 <= e < experts else -1 for e in replay_ids[token].tolist()]
        kept = [row[e] if e >= 0 else math.nan for e in chosen]  # what is no expert has no weight, as NaN

        if scoring == "softmax":
            every = _exponentials(row)
            listed = _exponentials(kept) if renormalize else [every[e] if e >= 0 else 0.0 for e in chosen]
            divisor = sum(listed if renormalize else every)
        else:
            every = [_score(scoring, x) if x >= -87 else 0.0 for x in row]
            listed = [every[e] if e >= 0 else 0.0 for e in chosen]
            divisor = sum(listed) + 1e-20 if renormalize else 1.0
        weights = [each / divisor * scale if divisor else 0.0 for each in listed]
        weights = [each * factors[e] if e >= 0 else 0.0 for each, e in zip(weights, chosen, strict=True)]
        all_ids.append(chosen + shared)
        all_weights.append(weights + [1.0] * shared_experts)
        total = sum(every)
        if total:
            shares = [old + new / total for old, new in zip(shares, every, strict=True)]
    return all_ids, all_weights, [share / max(min(valid, len(all_ids)), 1) for share in shares]
