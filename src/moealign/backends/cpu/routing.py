"""The router on the CPU: one pass over the logits, on several threads where they are many.

The mean share is a sum over the tokens in their order, which one thread adds."""

from __future__ import annotations

import torch
from torch import Tensor

from ...layout import Routing
from .threads import helpers, num_threads

__all__ = ["route"]

PARALLEL_LOGITS = 262_144  # fewer stay on one thread
MIN_LOGITS_A_THREAD = 65_536
CHUNKS_A_THREAD = 4
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

    tokens = routing.tokens
    given = (
        router_logits.detach().to(torch.float32).contiguous().numpy(),
        (_NONE if correction_bias is None else correction_bias.detach().to(torch.float32).contiguous()).numpy(),
        routing.scoring == "sigmoid",
        routing.renormalize,
        routing.scale,
        routing.num_groups,
        routing.topk_groups,
        tokens if num_valid_tokens is None else min(max(int(num_valid_tokens), 0), tokens),
        weights.numpy(),
        ids.numpy(),
    )
    mean = (_NONE if mean_probability is None else mean_probability).numpy()
    threads = 1
    if tokens * routing.num_experts >= PARALLEL_LOGITS and mean_probability is None:
        threads = min(num_threads(), tokens * routing.num_experts // MIN_LOGITS_A_THREAD, tokens)
    if threads <= 1:
        routing_kernels.route(1, 0, 1, *given, mean)
        return
    control = torch.zeros(routing_kernels.CONTROL, dtype=torch.int64)
    arguments = (control.data_ptr(), min(CHUNKS_A_THREAD * threads, tokens), *given, mean)
    helpers.ask(threads - 1, routing_kernels.route, (0, *arguments), control)
    routing_kernels.route(1, *arguments)
