"""What training adds to a router so that its experts share the load: three losses, and a bias without a loss.

Each works on what :func:`moealign.route` and :func:`moealign.align` return, never waits for the device, and can be
captured in a CUDA graph.  docs/training.md shows them in a training step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import InvalidInput, InvalidType
from .operators import score_of
from .problem import SCORINGS

__all__ = ["sequence_loss", "switch_loss", "update_correction_bias_", "z_loss"]


def switch_loss(mean_probability: Tensor, expert_counts: Tensor) -> Tensor:
    """``E * sum_e f_e * P_e``: the load-balancing loss of the Switch Transformer (arXiv 2101.03961, equation 4).

    ``P_e`` is the mean over tokens of the router's probability of expert ``e``, ``f_e`` the share of the routes that
    went to it.  The loss is 1 if both are uniform; multiply it with a coefficient such as 0.01.  Gradients flow through
    ``P`` alone.  Transformers' ``load_balancing_loss_func`` counts routes a token instead of shares: it is ``top_k``
    times this.

    Args:
        mean_probability: ``[E]``, floating: ``route(..., mean_probability=True)``.
        expert_counts: ``[E]``, integer: ``route(..., expert_counts=True)``.  Under data parallelism, the sum over ranks
            balances the global batch.

    Returns:
        A float32 scalar; 0 if no route was kept.

    Raises:
        InvalidInput, InvalidType: shapes or dtypes do not match.
    """
    _floating("mean_probability", mean_probability, 1)
    _integer("expert_counts", expert_counts, mean_probability.shape)
    total = expert_counts.sum().clamp(min=1)
    share = expert_counts.to(torch.float32) / total
    return mean_probability.shape[0] * (share * mean_probability.to(torch.float32)).sum()


def sequence_loss(
    router_logits: Tensor, topk_ids: Tensor, *, scoring: str = "sigmoid", valid: Tensor | None = None
) -> Tensor:
    """The sequence-wise balance loss of DeepSeek-V3 (arXiv 2412.19437, equations 17 to 20), without its coefficient.

    For one sequence of ``L`` tokens it is ``sum_e f_e * P_e`` with

        f_e = E / (k * L) * (number of its routes to expert e)        P_e = mean over its tokens of s_e / sum_j s_j

    where ``s`` are the scores.  The result is the mean over sequences; 1 if all are balanced.

    Args:
        router_logits: ``[S, L, E]``, floating; computed in float32.
        topk_ids: ``[S, L, k]``, integer.  Ids outside ``[0, E)`` count as no route.
        scoring: "sigmoid", "softmax" or "sqrtsoftplus" of the logits.
        valid: ``[S, L]`` bool, False for padding.  A sequence without valid tokens is left out.

    Returns:
        A float32 scalar.

    Raises:
        InvalidInput, InvalidType: shapes, dtypes or `scoring` do not match.
    """
    _floating("router_logits", router_logits, 3)
    sequences, length, experts = router_logits.shape
    if not isinstance(topk_ids, Tensor) or topk_ids.dim() != 3 or topk_ids.shape[:2] != router_logits.shape[:2]:
        raise InvalidInput(f"topk_ids: expected [{sequences}, {length}, k], got {_shape(topk_ids)}")
    _integer("topk_ids", topk_ids, topk_ids.shape)
    if scoring not in SCORINGS:
        raise InvalidInput(f"scoring: expected one of {', '.join(SCORINGS)}, got {scoring!r}")
    _mask(valid, router_logits)
    logits = router_logits.to(torch.float32)
    scores = logits.softmax(-1) if scoring == "softmax" else score_of(logits, scoring)
    share = scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    ids = topk_ids.to(torch.int64)
    kept = (ids >= 0) & (ids < experts)
    if valid is not None:
        share = share.masked_fill(~valid.unsqueeze(-1), 0)
        kept = kept & valid.unsqueeze(-1)
        lengths = valid.sum(1).to(torch.float32).unsqueeze(1)
    else:
        lengths = torch.full((sequences, 1), float(length), device=logits.device)
    # One more column takes the routes that do not count; integers, so that the order of the sums does not matter.
    flat = torch.where(kept, ids, experts).flatten(1)
    counts = torch.zeros(sequences, experts + 1, dtype=torch.int64, device=ids.device)
    counts = counts.scatter_add(1, flat, torch.ones_like(flat))[:, :experts]
    some = lengths.clamp(min=1)
    frequency = counts * (experts / topk_ids.shape[2]) / some
    losses = (frequency * (share.sum(1) / some)).sum(1)
    return losses.sum() / (lengths > 0).sum().clamp(min=1)


def z_loss(router_logits: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """``mean over tokens of (log sum_e exp(x_e))**2``: the router z-loss of ST-MoE (arXiv 2202.08906, equation 5).

    It keeps logits small, where float32 softmax is exact; multiply it with a coefficient such as 0.001.

    Args:
        router_logits: ``[..., E]``, floating; computed in float32.
        valid: ``[...]`` bool, False for padding.

    Returns:
        A float32 scalar; 0 without valid tokens.

    Raises:
        InvalidInput, InvalidType: shapes or dtypes do not match.
    """
    _floating("router_logits", router_logits, None)
    _mask(valid, router_logits)
    squares = router_logits.to(torch.float32).logsumexp(-1).square()
    if valid is None:
        return squares.sum() / max(squares.numel(), 1)
    return squares.masked_fill(~valid, 0).sum() / valid.sum().clamp(min=1)


@torch.no_grad()
def update_correction_bias_(correction_bias: Tensor, expert_counts: Tensor, rate: float) -> Tensor:
    """``b_e += rate * sign(mean(c) - c_e)``, in place: balancing without a loss (arXiv 2408.15664, algorithm 1).

    DeepSeek-V3 calls it after every step, with a rate of 0.001, on the `correction_bias` that its
    ``route(..., scoring="sigmoid", correction_bias=b)`` adds where experts are chosen.

    Args:
        correction_bias: ``[E]``, floating, such as a buffer of the model.
        expert_counts: ``[E]``, integer: the routes to each expert in the step, summed over its micro-batches and over
            data-parallel ranks.
        rate: the size of a step, finite and not negative.

    Returns:
        `correction_bias`.

    Raises:
        InvalidInput, InvalidType: shapes or dtypes do not match.
    """
    _floating("correction_bias", correction_bias, 1)
    _integer("expert_counts", expert_counts, correction_bias.shape)
    if isinstance(rate, bool) or not isinstance(rate, (int, float)):
        raise InvalidType(f"rate: expected a float, got {type(rate).__name__}")
    if not 0 <= rate < float("inf"):
        raise InvalidInput(f"rate: expected a finite number of at least 0, got {rate}")
    counts = expert_counts.to(torch.int64)
    below = torch.sign(counts.sum() - counts * counts.shape[0])  # exact, where a mean would be rounded
    return correction_bias.add_(below.to(correction_bias.dtype), alpha=rate)


def _shape(tensor: object) -> object:
    return list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__


def _floating(name: str, tensor: object, dimensions: int | None) -> None:
    if not isinstance(tensor, Tensor):
        raise InvalidType(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise InvalidType(f"{name}: expected a floating dtype, got {tensor.dtype}")
    if tensor.dim() != dimensions if dimensions is not None else not tensor.dim():
        expected = {1: "[E]", 3: "[S, L, E]", None: "[..., E]"}[dimensions]
        raise InvalidInput(f"{name}: expected {expected}, got {list(tensor.shape)}")


def _integer(name: str, tensor: object, shape: torch.Size) -> None:
    if not isinstance(tensor, Tensor):
        raise InvalidType(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool:
        raise InvalidType(f"{name}: expected an integer dtype, got {tensor.dtype}")
    if tensor.shape != shape:
        raise InvalidInput(f"{name}: expected {list(shape)}, got {list(tensor.shape)}")


def _mask(valid: Tensor | None, logits: Tensor) -> None:
    if valid is None:
        return
    if not isinstance(valid, Tensor) or valid.dtype is not torch.bool:
        got = valid.dtype if isinstance(valid, Tensor) else type(valid).__name__
        raise InvalidType(f"valid: expected a bool tensor, got {got}")
    if valid.shape != logits.shape[:-1]:
        raise InvalidInput(f"valid: expected {list(logits.shape[:-1])}, got {list(valid.shape)}")
