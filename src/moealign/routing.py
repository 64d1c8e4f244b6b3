"""From router logits to weights, ids and the aligned layout; docs/routing.md has the equations."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import dispatch, modes
from .align import _align, _facts, _wanted, align
from .backends.reference_routing import TINY
from .checks import check_route
from .errors import InvalidType
from .layout import EXTRAS, BlockLayout, Problem, Routing

__all__ = ["route"]


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
    mean_probability: bool = False,
    backend: str | None = None,
    **layout: Any,
) -> tuple[Any, ...]:
    """Choose `top_k` experts a token and align the choices: ``(topk_weights, topk_ids, layout)``.

    Which model is which: Mixtral, Qwen3-MoE: the defaults.  OLMoE: ``renormalize=False``.  gpt-oss (softmax over the
    chosen): the defaults, which is the same.  Llama-4: ``scoring="sigmoid", renormalize=False``.  DeepSeek-V3,
    Kimi-K2, GLM-4.5: ``scoring="sigmoid"`` with `correction_bias`, `num_groups`, `topk_groups` and `scale`.

    Args:
        router_logits: ``[tokens, num_experts]``, float32, bfloat16 or float16; computed in float32.
        top_k: experts of a token, at most 32.  Of equal scores the lower expert is chosen; the best stands first.
        block_size: rows of a block of the layout.
        scoring: "softmax" or "sigmoid" of the logits.
        renormalize: weights of a token are divided by their sum.
        correction_bias: ``[num_experts]``, added to the sigmoid where experts are chosen, not to the weights.
        num_groups, topk_groups: experts are chosen from the `topk_groups` best of `num_groups` groups of neighbours.
            A group counts as much as its best expert, with a bias as the sum of its two best.
        scale: factor of all weights (``routed_scaling_factor``).
        num_valid_tokens: int32, one element, on the same device: rows from there on get ids -1 and weights 0.
        mean_probability: also return, as a fourth, the mean over valid tokens of each expert's share of the scores
            ``[num_experts]`` float32: with ``expert_counts`` what a load-balancing loss needs.
        backend: as in :func:`align`, for both parts.
        layout: further arguments of :func:`align`: ``expert_map``, extra outputs, and so on.

    Returns:
        ``topk_weights [tokens, top_k]`` float32, ``topk_ids [tokens, top_k]`` int32, and the
        :class:`BlockLayout` of the ids.  Gradients flow from the weights and the mean to the logits.

    Raises:
        InvalidInput, InvalidType, BackendUnavailable: as :func:`align`.
    """
    facts = (scoring, renormalize, correction_bias, num_groups, topk_groups, scale, num_valid_tokens)
    sizes = (top_k, num_groups, topk_groups, scale, scoring, renormalize, backend)
    if not isinstance(router_logits, Tensor) or _eager(
        router_logits, correction_bias, num_valid_tokens, *layout.values()
    ):
        key = (*sizes, _facts(router_logits), _facts(correction_bias), _facts(num_valid_tokens))
        try:
            plan = _plans.get(key)
        except TypeError:  # not hashable: refused below
            plan = None
        if layout:
            _check_options(layout)
        if plan is None or not type(top_k) is type(num_groups) is type(topk_groups) is int:
            plan = _plan(key, check_route(router_logits, top_k, *facts), backend)
        return _together(
            plan, router_logits, correction_bias, num_valid_tokens, mean_probability, block_size, backend, layout
        )
    routing = modes.checked(_check_watched, router_logits, top_k, *facts, backend, layout)
    if isinstance(routing, modes.Refusal):
        nothing: list[Any] = list(modes.refuse(routing, 6))
        aligned = BlockLayout(*nothing[3:])
        return (*nothing[:2], aligned, nothing[2]) if mean_probability else (*nothing[:2], aligned)
    weights, ids, mean = modes.call(
        torch.ops.moealign.route,
        router_logits,
        routing.top_k,
        scoring,
        routing.renormalize,
        correction_bias,
        routing.num_groups,
        routing.topk_groups,
        routing.scale,
        num_valid_tokens,
        bool(mean_probability),
        backend,
    )
    aligned = align(ids, block_size=block_size, num_experts=routing.num_experts, backend=backend, **layout)
    return (weights, ids, aligned, mean) if mean_probability else (weights, ids, aligned)


def _eager(router_logits: Tensor, *others: Any) -> bool:
    """Whether nothing but the values is wanted."""
    if router_logits.requires_grad and torch.is_grad_enabled():
        return False
    return not (modes.watched(router_logits, *others) or modes.forward_mode())


def _check_watched(router_logits: Tensor, top_k: int, *given: Any) -> Routing:
    *facts, backend, layout = given
    _check_options(layout)
    dispatch.check_name(backend)
    return check_route(router_logits, top_k, *facts)


def _check_options(layout: dict[str, Any]) -> None:
    unknown = layout.keys() - _OPTIONS
    if unknown:
        raise InvalidType(
            f"route: expected arguments of moealign.align besides its own, got {', '.join(sorted(unknown))}"
        )


# Eager, without gradients: not through the operator, whose dispatch costs more than a small call.

_MOST_PLANS = 4096
_plans: dict[Any, tuple[Routing, ModuleType]] = {}
_OPTIONS = {"expert_map", "pad_sorted_ids", "ignore_invalid_experts", "error_word", "out", *EXTRAS}


def _plan(key: Any, routing: Routing, backend: str | None) -> tuple[Routing, ModuleType]:
    plan = (routing, dispatch.choose_route(routing, backend))
    if len(_plans) >= _MOST_PLANS:
        _plans.clear()
    _plans[key] = plan
    return plan


def _together(
    plan: tuple[Routing, ModuleType],
    router_logits: Tensor,
    correction_bias: Tensor | None,
    num_valid_tokens: Tensor | None,
    mean_probability: bool,
    block_size: int,
    backend: str | None,
    layout: dict[str, Any],
) -> tuple[Any, ...]:
    routing, module = plan
    weights, ids, mean = _empty(router_logits, routing.top_k, mean_probability)
    given = (router_logits, correction_bias, num_valid_tokens, weights, ids, mean if mean_probability else None)
    fill: Callable[..., None] | None = None
    if hasattr(module, "route_align"):
        backend = module.__name__.rsplit(".", 1)[-1]

        def fill(problem: Problem, ids: Tensor, expert_map: Any, _: None, error_word: Any, out: BlockLayout) -> None:
            module.route_align(routing, problem, *given, expert_map, error_word, out)

    else:
        module.route(routing, *given)
    asked = layout.get
    aligned = _align(
        ids,
        block_size,
        routing.num_experts,
        asked("expert_map"),
        asked("pad_sorted_ids", False),
        asked("ignore_invalid_experts", False),
        None,
        asked("error_word"),
        _wanted(*(asked(name, False) for name in EXTRAS)) if layout else (),
        asked("out"),
        backend,
        fill,
        eager=True,
    )
    return (weights, ids, aligned, mean) if mean_probability else (weights, ids, aligned)


# The operator.  Its backward is a formula, so that it can be compiled too.

_library = torch.library.Library("moealign", "FRAGMENT")
_library.define(
    "route(Tensor router_logits, int top_k, str scoring, bool renormalize, Tensor? correction_bias, int num_groups, "
    "int topk_groups, float scale, Tensor? num_valid_tokens, bool mean_probability, str? backend) "
    "-> (Tensor, Tensor, Tensor)"
)


def _op(
    router_logits: Tensor,
    top_k: int,
    scoring: str,
    renormalize: bool,
    correction_bias: Tensor | None,
    num_groups: int,
    topk_groups: int,
    scale: float,
    num_valid_tokens: Tensor | None,
    mean_probability: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    facts = (scoring, renormalize, correction_bias, num_groups, topk_groups, scale, num_valid_tokens)
    routing = check_route(router_logits, top_k, *facts)
    weights, ids, mean = _empty(router_logits, top_k, mean_probability)
    dispatch.choose_route(routing, backend).route(
        routing, router_logits, correction_bias, num_valid_tokens, weights, ids, mean if mean_probability else None
    )
    return weights, ids, mean


def _empty(router_logits: Tensor, top_k: int, mean_probability: bool) -> tuple[Tensor, Tensor, Tensor]:
    tokens, experts = router_logits.shape
    weights = router_logits.new_empty((tokens, top_k), dtype=torch.float32)
    ids = router_logits.new_empty((tokens, top_k), dtype=torch.int32)
    return weights, ids, router_logits.new_empty(experts if mean_probability else 0, dtype=torch.float32)


def _fake(router_logits: Tensor, top_k: int, *facts: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(router_logits, top_k, facts[-2])


def _formula(
    router_logits: Tensor,
    top_k: int,
    scoring: str,
    renormalize: bool,
    correction_bias: Tensor | None,
    num_groups: int,
    topk_groups: int,
    scale: float,
    num_valid_tokens: Tensor | None,
    mean_probability: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator's choice, and from it weights and mean in torch's own operations."""
    with torch._C._AutoDispatchBelowAutograd():
        _, ids, _ = torch.ops.moealign.route(
            router_logits, top_k, scoring, renormalize, correction_bias, num_groups, topk_groups, scale,
            num_valid_tokens, False, backend,
        )  # fmt: skip
    x = router_logits.to(torch.float32)
    live = ids[:, :1] >= 0
    index = ids.clamp(min=0).to(torch.int64)
    picked = x.gather(1, index)
    if scoring == "softmax":
        weights = torch.softmax(picked, 1) if renormalize else torch.softmax(x, 1).gather(1, index)
    else:
        weights = torch.sigmoid(picked)
        if renormalize:
            weights = weights / (weights.sum(1, keepdim=True) + TINY)
    weights = torch.where(live, weights * scale, 0.0)
    if not mean_probability:
        return weights, ids, torch.zeros(0, dtype=torch.float32, device=x.device)
    every = torch.softmax(x, 1) if scoring == "softmax" else torch.sigmoid(x)
    shares = torch.where(live, every / every.sum(1, keepdim=True), 0.0)
    return weights, ids, shares.sum(0) / live.sum().clamp(min=1)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, ctx.scoring, ctx.renormalize, _, _, _, ctx.scale, _, ctx.wants_mean, _ = inputs
    ctx.save_for_backward(logits, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, of_weights: Tensor, of_ids: Tensor, of_mean: Tensor) -> tuple[Any, ...]:
    """Through w_i = scale * f(l_i) / sum f and the mean of the shares, with f = exp or the sigmoid."""
    logits, ids = ctx.saved_tensors
    x = logits.to(torch.float32)
    live = ids[:, :1] >= 0
    index = ids.clamp(min=0).to(torch.int64)
    picked = x.gather(1, index)
    given = torch.where(live, of_weights * ctx.scale, 0.0)
    if ctx.scoring == "softmax":
        if ctx.renormalize:
            share = torch.softmax(picked, 1)
            grad = torch.zeros_like(x).scatter(1, index, share * (given - (given * share).sum(1, keepdim=True)))
        else:
            p = torch.softmax(x, 1)
            share = p.gather(1, index)
            grad = torch.zeros_like(x).scatter(1, index, share * given) - p * (given * share).sum(1, keepdim=True)
    else:
        s = torch.sigmoid(picked)
        of_s = given
        if ctx.renormalize:
            total = s.sum(1, keepdim=True) + TINY
            of_s = (given - (given * s).sum(1, keepdim=True) / total) / total
        grad = torch.zeros_like(x).scatter(1, index, of_s * s * (1 - s))
    if ctx.wants_mean:
        share_of = of_mean / live.sum().clamp(min=1)
        if ctx.scoring == "softmax":
            p = torch.softmax(x, 1)
            through = p * (share_of - (share_of * p).sum(1, keepdim=True))
        else:
            s = torch.sigmoid(x)
            total = s.sum(1, keepdim=True)
            through = s * (1 - s) * (share_of - (share_of * s).sum(1, keepdim=True) / total) / total
        grad = grad + torch.where(live, through, 0.0)
    return grad.to(logits.dtype), *(None,) * 10


_library.impl("route", _op, "CompositeExplicitAutograd")
torch.library.register_fake("moealign::route", _fake, lib=_library)
modes.differentiable(_library, "route", _formula, _save, _backward)
modes.batched(_library, "route")
