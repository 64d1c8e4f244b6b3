"""Router calls that several tests share: every kind of router, and logits that are hard to order."""

from __future__ import annotations

import math

import pytest
import torch

import moealign
from moealign.layout import OUTPUTS

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

ROUTERS = ("reference", "cpu", "triton", "cuda")
KINDS = {
    "softmax": {},
    "softmax, not renormalized": {"renormalize": False},
    "softmax, groups": {"num_groups": 4, "topk_groups": 2},
    "sigmoid": {"scoring": "sigmoid"},
    "sigmoid, not renormalized": {"scoring": "sigmoid", "renormalize": False, "scale": 0.5},
    "sigmoid, bias": {"scoring": "sigmoid", "correction_bias": True, "scale": 2.5},
    "sigmoid, bias, groups": {"scoring": "sigmoid", "correction_bias": True, "num_groups": 4, "topk_groups": 2},
    "sigmoid, bias, groups of one": {"scoring": "sigmoid", "correction_bias": True, "num_groups": 0, "topk_groups": 0},
    "softmax, bias": {"correction_bias": True, "scale": 1.5},
    "softmax, bias, not renormalized": {"correction_bias": True, "renormalize": False},
    "softmax, groups by two best": {"correction_bias": None, "num_groups": 4, "topk_groups": 2},
    "softmax, bias, groups of one": {"correction_bias": True, "num_groups": 0, "topk_groups": 0},
    "sqrtsoftplus": {"scoring": "sqrtsoftplus"},
    "sqrtsoftplus, not renormalized": {"scoring": "sqrtsoftplus", "renormalize": False, "scale": 0.5},
    "sqrtsoftplus, bias": {"scoring": "sqrtsoftplus", "correction_bias": True, "scale": 2.5},
    "sqrtsoftplus, bias, groups": {
        "scoring": "sqrtsoftplus", "correction_bias": True, "num_groups": 4, "topk_groups": 2,
    },
}  # fmt: skip


def device_of(backend):
    return "cuda" if backend in ("triton", "cuda") and torch.cuda.is_available() else "cpu"


def routed(logits, top_k, *, backend, **given):
    """:func:`moealign.route` of CPU tensors on the device of `backend`, its results on the CPU."""
    device = device_of(backend)
    given = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    if backend == "cuda" and given.get("num_groups", 1) > 32 and given.get("replay_ids") is None:
        with pytest.raises(moealign.BackendUnavailable, match="at most 32 groups"):
            moealign.route(logits.to(device), top_k, **given, backend=backend)
        pytest.skip("the reference takes so many groups")
    weights, ids, layout, *mean = moealign.route(logits.to(device), top_k, **given, backend=backend)
    return weights.cpu(), ids.cpu(), layout, *(each.cpu() for each in mean)


def arguments(kind: str, experts: int, top_k: int, generator: torch.Generator) -> dict[str, object]:
    found: dict[str, object] = dict(KINDS[kind])
    if "correction_bias" in found:
        spread = {None: 0.0, True: 1.0 if "scoring" in found else 2.0 / experts}[found["correction_bias"]]
        found["correction_bias"] = (torch.rand(experts, generator=generator) - 0.5) * spread
    if found.get("num_groups") == 0:
        found |= {"num_groups": experts, "topk_groups": max(top_k, experts // 2)}
    elif found.get("topk_groups") == 2 and 2 * (experts // 4) < top_k:
        found["topk_groups"] = 4
    return found


SCORES = {
    "softmax": lambda x: x.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda x: torch.nn.functional.softplus(x).sqrt(),
}


def close_calls(scoring: str, experts: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a token and a bias that makes all scores equal but for their last bits, which then decide."""
    logits = torch.randn(1, experts, generator=generator) * 2
    scores = SCORES[scoring](logits)[0]
    return logits, scores.max() - scores


def awkward(tokens: int, experts: int, generator: torch.Generator) -> torch.Tensor:
    """Rows of ties, NaN, infinities and great distances among ordinary ones."""
    x = torch.randn(tokens, experts, generator=generator) * 3
    kinds = [
        lambda row: row.zero_(),
        lambda row: row.fill_(math.nan),
        lambda row: row[::2].fill_(math.nan),
        lambda row: row[experts // 2].fill_(math.inf),
        lambda row: row[1:].fill_(math.inf),
        lambda row: row.fill_(-math.inf),
        lambda row: row[:-1].fill_(-math.inf),
        lambda row: row.round_(),
        lambda row: row.mul_(1000),
        lambda row: row[::3].fill_(-0.0),
        lambda row: row[1::3].fill_(0.0),
    ]
    for row, change in zip(x[1:], kinds, strict=False):
        change(row)
    return x


def assert_alike(ours, want, rtol: float = 2e-6) -> None:
    """Two results of route: ids and layouts to the bit, weights within `rtol`."""
    assert torch.equal(ours[1], want[1])
    torch.testing.assert_close(ours[0], want[0], rtol=rtol, atol=1e-9)
    for name in OUTPUTS:
        one, other = getattr(ours[2], name), getattr(want[2], name)
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other), name
    for one, other in zip(ours[3:], want[3:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)
