"""The router on the CPU: one pass over the logits, on one thread."""

from __future__ import annotations

import torch
from torch import Tensor

from ...layout import Routing

__all__ = ["route"]

_NONE = torch.empty(0)


def route(
    routing: Routing,
    router_logits: Tensor,
    correction_bias: Tensor | None,
    num_valid_tokens: Tensor | None,
    weights: Tensor,
    ids: Tensor,
    mean_probability: Tensor | None,
) -> None:
    """Fill `weights` and `ids` ``[tokens, top_k]``, and `mean_probability` ``[num_experts]`` where it is wanted."""
    from . import routing_kernels  # numba, at the first call

    routing_kernels.route(
        router_logits.detach().to(torch.float32).contiguous().numpy(),
        (_NONE if correction_bias is None else correction_bias.detach().to(torch.float32).contiguous()).numpy(),
        routing.scoring == "sigmoid",
        routing.renormalize,
        routing.scale,
        routing.num_groups,
        routing.topk_groups,
        routing.tokens if num_valid_tokens is None else int(num_valid_tokens),
        weights.numpy(),
        ids.numpy(),
        (_NONE if mean_probability is None else mean_probability).numpy(),
    )
