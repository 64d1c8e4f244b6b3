"""The facts of one call, without its tensors: what backends decide on and specialise kernels for."""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["SCORINGS", "AlignProblem", "RouteProblem"]

#: What a router makes of a logit; kernels know each by its place.
SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")


class AlignProblem(NamedTuple):
    """One call of :func:`moealign.align` or, where ``op`` says so, of :func:`moealign.align_batched`."""

    op: str  # "align" or "align_batched"
    device: torch.device
    dtype: torch.dtype  # of topk_ids, or of expert_num_tokens
    routes: int  # n; batched: number of batches * max_tokens_per_batch
    row_length: int  # top_k, routes a row of topk_ids; batched: max_tokens_per_batch
    num_experts: int  # E; batched: number of batches
    block_size: int  # B
    map_dtype: torch.dtype | None = None  # of expert_map, None without one
    ignore_invalid_experts: bool = False  # bins are local experts, routes of foreign ones are dropped
    has_num_valid_tokens: bool = False
    has_error_word: bool = False
    extras: tuple[str, ...] = ()  # of layout.EXTRAS, in that order


class RouteProblem(NamedTuple):
    """One call of :func:`moealign.route` before the layout: how experts are scored and chosen."""

    device: torch.device
    dtype: torch.dtype  # of router_logits
    tokens: int
    num_experts: int
    top_k: int
    scoring: str  # one of SCORINGS
    renormalize: bool
    scale: float  # of the weights
    num_groups: int  # 1: every expert may be chosen
    topk_groups: int
    has_bias: bool = False
    has_num_valid_tokens: bool = False
    shared_experts: int = 0  # that every valid token takes
    scale_dtype: torch.dtype | None = None  # of expert_scale, None without one
    replay_dtype: torch.dtype | None = None  # of replay_ids, None if experts are chosen

    @property
    def columns(self) -> int:
        """Of the weights and ids: the `top_k` and the shared experts."""
        return self.top_k + self.shared_experts
