"""The public router: logits to weights, ids and the aligned layout.  docs/routing.md has the equations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import modes
from .alignment import align, extras_of
from .calls import prepared
from .calls.checks import check_route
from .calls.dispatch import check_name
from .layout import BlockLayout
from .operators import replay
from .problem import RouteProblem

__all__ = ["RouteResult", "RouteResultWithMean", "route"]


class RouteResult(NamedTuple):
    """What :func:`route` returns."""

    topk_weights: Tensor  #: ``[tokens, top_k]`` float32
    topk_ids: Tensor  #: ``[tokens, top_k]`` int32
    layout: BlockLayout  #: of the ids


class RouteResultWithMean(NamedTuple):
    """What :func:`route` returns with ``mean_probability=True``."""

    topk_weights: Tensor  #: ``[tokens, top_k]`` float32
    topk_ids: Tensor  #: ``[tokens, top_k]`` int32
    layout: BlockLayout  #: of the ids
    mean_probability: Tensor  #: ``[num_experts]`` float32


@overload
def route(
    router_logits: Tensor,
    top_k: int,
    *,
    block_size: int,
    scoring: str = "softmax",
    renormalize: bool = True,
    correction_bias: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    scale: float = 1.0,
    num_valid_tokens: Tensor | None = None,
    replay_ids: Tensor | None = None,
    expert_scale: Tensor | None = None,
    shared_experts: int = 0,
    expert_map: Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    expert_counts: bool = False,
    expert_offsets: bool = False,
    group_ends: bool = False,
    positions: bool = False,
    block_rows: bool = False,
    scatter_idx: bool = False,
    error_word: Tensor | None = None,
    out: BlockLayout | Mapping[str, Tensor] | None = None,
    mean_probability: Literal[False] = False,
    backend: str | None = None,
) -> RouteResult: ...


@overload
def route(
    router_logits: Tensor,
    top_k: int,
    *,
    block_size: int,
    scoring: str = "softmax",
    renormalize: bool = True,
    correction_bias: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    scale: float = 1.0,
    num_valid_tokens: Tensor | None = None,
    replay_ids: Tensor | None = None,
    expert_scale: Tensor | None = None,
    shared_experts: int = 0,
    expert_map: Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    expert_counts: bool = False,
    expert_offsets: bool = False,
    group_ends: bool = False,
    positions: bool = False,
    block_rows: bool = False,
    scatter_idx: bool = False,
    error_word: Tensor | None = None,
    out: BlockLayout | Mapping[str, Tensor] | None = None,
    mean_probability: Literal[True],
    backend: str | None = None,
) -> RouteResultWithMean: ...


def route(
    router_logits: Tensor,
    top_k: int,
    *,
    block_size: int,
    scoring: str = "softmax",
    renormalize: bool = True,
    correction_bias: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    scale: float = 1.0,
    num_valid_tokens: Tensor | None = None,
    replay_ids: Tensor | None = None,
    expert_scale: Tensor | None = None,
    shared_experts: int = 0,
    expert_map: Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    expert_counts: bool = False,
    expert_offsets: bool = False,
    group_ends: bool = False,
    positions: bool = False,
    block_rows: bool = False,
    scatter_idx: bool = False,
    error_word: Tensor | None = None,
    out: BlockLayout | Mapping[str, Tensor] | None = None,
    mean_probability: bool = False,
    backend: str | None = None,
) -> RouteResult | RouteResultWithMean:
    """Choose `top_k` experts per token and align the choices: ``(topk_weights, topk_ids, layout)``.

    Settings by model.  Mixtral, Qwen3-MoE, gpt-oss: the defaults.  OLMoE: ``renormalize=False``.  Llama-4:
    ``scoring="sigmoid", renormalize=False``.  DeepSeek-V3, Kimi-K2, GLM-4.5: ``scoring="sigmoid"`` with
    `correction_bias`, `num_groups`, `topk_groups` and `scale`.  DeepSeek-V4: ``scoring="sqrtsoftplus"`` with
    `correction_bias` and `scale`.  ERNIE-4.5, LongCat-Flash: `correction_bias`.

    Args:
        router_logits: ``[tokens, num_experts]``, float32, bfloat16 or float16; computed in float32.
        top_k: experts of a token, at most 32, best first.  Among equal scores the lower expert comes first.
        block_size: rows of a block of the layout.
        scoring: "softmax", "sigmoid" or "sqrtsoftplus", ``sqrt(log(1 + exp(x)))``, of the logits.
        renormalize: weights of a token are divided by their sum.
        correction_bias: ``[num_experts]``, added to the scores where experts are chosen, not to the weights.
        num_groups, topk_groups: experts are chosen from the `topk_groups` best of `num_groups` groups of neighbours.
            A group's score is that of its best expert; with a bias, which may be zeros, the sum of its two best.
        scale: factor of all weights (``routed_scaling_factor``).
        num_valid_tokens: int32, one element, on the same device: rows from there on get ids -1 and weights 0.
        replay_ids: ``[tokens, top_k]`` integers, the choice of an earlier run: nothing is chosen, and the weights are
            those that these logits give to that choice.  Ids outside ``[0, num_experts)`` get -1 and weight 0.
        expert_scale: ``[num_experts]``, floating, a factor of each expert's weight, after renormalisation.
        shared_experts: experts that every valid token takes beside its `top_k`, with weight 1: their ids, from
            `num_experts` on, are appended, and the layout is of ``num_experts + shared_experts`` experts.
        mean_probability: also return, as a fourth, the mean over valid tokens of each expert's share of the scores
            ``[num_experts]`` float32: with ``expert_counts`` what a load-balancing loss needs.
        expert_map, pad_sorted_ids, ignore_invalid_experts: as in :func:`align`.
        expert_counts, expert_offsets, group_ends, positions, block_rows, scatter_idx, error_word, out: as in
            :func:`align`.
        backend: as in :func:`align`, for both parts.

    Returns:
        A named tuple ``(topk_weights, topk_ids, layout)``: ``[tokens, top_k + shared_experts]`` float32, the same in
        int32, and the :class:`BlockLayout` of the ids.  Gradients flow from the weights and the mean to the logits.

    Raises:
        InvalidInput, InvalidType, BackendUnavailable: as :func:`align`.
    """
    extras = extras_of(expert_counts, expert_offsets, group_ends, positions, block_rows, scatter_idx)
    options = None
    if replay_ids is not None or expert_scale is not None or shared_experts != 0:
        options = (replay_ids, expert_scale, shared_experts)
    eager = _eager(router_logits, correction_bias, num_valid_tokens, expert_map, error_word)
    if options is not None:
        eager = eager and not (modes.watched(replay_ids, expert_scale) or modes.wants_gradient(expert_scale))
    results = None
    if eager:
        facts = (top_k, scoring, renormalize, num_groups, topk_groups, scale)
        results = prepared.route(
            router_logits, facts, correction_bias, num_valid_tokens, mean_probability, block_size, backend, expert_map,
            pad_sorted_ids, ignore_invalid_experts, extras, error_word, out, options,
        )  # fmt: skip
    if results is not None:
        weights, ids, layout, mean = results
    else:
        arguments = (scoring, renormalize, correction_bias, num_groups, topk_groups, scale, num_valid_tokens)
        problem = modes.checked(_check, backend, router_logits, top_k, *arguments, *(options or ()))
        if isinstance(problem, modes.Refusal):
            weights, ids, mean, *nothing = modes.refuse(problem, 6)
            layout = BlockLayout(*nothing)  # type: ignore[arg-type]
        else:
            if replay_ids is None:
                weights, ids, mean = modes.call(
                    torch.ops.moealign.route,
                    router_logits, problem.top_k, scoring, problem.renormalize, correction_bias, problem.num_groups,
                    problem.topk_groups, problem.scale, num_valid_tokens, bool(mean_probability), backend,
                )  # fmt: skip
            else:
                how = (scoring, problem.renormalize, problem.scale)
                weights, ids, mean = replay(router_logits, replay_ids, how, num_valid_tokens, bool(mean_probability))
            if expert_scale is not None:
                factors = expert_scale.to(torch.float32)[ids.clamp(min=0).to(torch.int64)]
                weights = weights * torch.where(ids >= 0, factors, 0.0)  # no expert has the weight 0, not 0 * infinity
            if problem.shared_experts:
                more = (problem.num_experts, problem.shared_experts, num_valid_tokens)
                weights, ids = _with_shared(weights, ids, *more)
            layout = align(
                ids,
                block_size=block_size,
                num_experts=problem.num_experts + problem.shared_experts,
                expert_map=expert_map,
                pad_sorted_ids=pad_sorted_ids,
                ignore_invalid_experts=ignore_invalid_experts,
                error_word=error_word,
                out=out,
                backend=backend,
                **dict.fromkeys(extras, True),  # type: ignore[arg-type]
            )
    if mean_probability:
        return RouteResultWithMean(weights, ids, layout, mean)
    return RouteResult(weights, ids, layout)


def _eager(router_logits: Any, *others: Any) -> bool:
    """Whether only values are needed: no gradient, and nothing that follows the call."""
    if not isinstance(router_logits, Tensor):
        return True
    if router_logits.requires_grad and torch.is_grad_enabled():
        return False
    return not (modes.watched(router_logits, *others) or modes.forward_mode())


def _with_shared(
    weights: Tensor, ids: Tensor, num_experts: int, shared: int, num_valid_tokens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weights and ids with those of `shared` experts that every valid token takes."""
    tokens = ids.shape[0]
    more = torch.arange(num_experts, num_experts + shared, device=ids.device, dtype=ids.dtype).expand(tokens, shared)
    ones = torch.ones_like(more, dtype=weights.dtype)
    if num_valid_tokens is not None:
        live = torch.arange(tokens, device=ids.device).unsqueeze(1) < num_valid_tokens.reshape(())
        more, ones = torch.where(live, more, -1), torch.where(live, ones, 0.0)
    return torch.cat([weights, ones], 1), torch.cat([ids, more], 1)


def _check(backend: str | None, *arguments: Any) -> RouteProblem:
    check_name(backend)
    return check_route(*arguments)
