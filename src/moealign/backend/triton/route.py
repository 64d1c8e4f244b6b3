"""The router in Triton: the launcher of ``route_kernels.py``.  One launch; for the mean, torch then sums shares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...layout import power_of_two
from ...problem import RouteProblem
from .launch import on_device

__all__ = ["MAX_EXPERTS", "launch_of", "refuses", "route"]

MAX_EXPERTS = 4096  #: of one program


def refuses(routing: RouteProblem) -> str | None:
    """Why no kernel takes this router; None if one does."""
    if routing.num_experts > MAX_EXPERTS:
        return f"expected at most {MAX_EXPERTS} experts to route to, got {routing.num_experts}"
    return None


def launch_of(
    routing: RouteProblem,
    logits: Tensor,
    bias: Tensor | None,
    num_valid_tokens: Tensor | None,
    weights: Tensor,
    ids: Tensor,
    shares: Tensor | None,
) -> tuple[tuple[Any, ...], dict[str, Any], int]:
    """Arguments, constants and warps of the one launch."""
    size = power_of_two(routing.num_experts)
    constants = {
        "SCORING": routing.scoring, "RENORM": routing.renormalize, "EXPERTS": routing.num_experts,
        "TOP_K": routing.top_k, "GROUPS": routing.num_groups, "TOP_GROUPS": routing.topk_groups,
        "EXPERTS_POW2": size, "TOP_K_POW2": power_of_two(routing.top_k),
        "GROUPS_POW2": power_of_two(routing.num_groups),
    }  # fmt: skip
    arguments = (logits, bias, num_valid_tokens, weights, ids, shares, routing.tokens, logits.stride(0), routing.scale)
    return arguments, constants, 1 if size <= 512 else 4


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
    from . import route_kernels  # imports Triton

    logits = router_logits.detach()
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    bias = None if correction_bias is None else correction_bias.detach().to(torch.float32).contiguous()
    shares = None
    if mean_probability is not None:
        shares = torch.empty((routing.tokens, routing.num_experts), dtype=torch.float32, device=logits.device)
    arguments, constants, warps = launch_of(routing, logits, bias, num_valid_tokens, weights, ids, shares)
    if routing.tokens:
        with on_device(logits.device):
            route_kernels.topk[(routing.tokens,)](*arguments, **constants, num_warps=warps, enable_fp_fusion=False)
    if mean_probability is not None and shares is not None:
        torch.sum(shares, 0, out=mean_probability)
        if num_valid_tokens is None:
            mean_probability.div_(max(routing.tokens, 1))
        else:
            mean_probability.div_(num_valid_tokens.clamp(1, max(routing.tokens, 1)))
