"""The operators ``torch.ops.moealign.*`` of the alignment and of the router: schemas, fakes and gradients.

Compilers, tracers, transforms and modes see these in the place of a call.  Sizes of outputs follow from shapes alone
(:func:`moealign.capacity`), so the fakes need nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import modes
from .backend.reference.route import FAR, MAX, TINY
from .calls import prepared
from .calls.checks import check_align, check_align_batched, check_out, check_route
from .calls.dispatch import check_name, select_backend
from .calls.prepared import buffers_by_name, outputs_of
from .errors import InvalidInput
from .layout import EXTRAS, REQUIRED, BlockLayout, Capacity
from .problem import AlignProblem

__all__ = ["align", "align_batched", "replay"]


def align(
    topk_ids: Tensor,
    block_size: int,
    num_experts: int,
    expert_map: Tensor | None,
    pad_sorted_ids: bool,
    ignore_invalid_experts: bool,
    num_valid_tokens: Tensor | None,
    error_word: Tensor | None,
    extras: tuple[str, ...],
    out: BlockLayout | Mapping[str, Tensor] | None,
    backend: str | None,
) -> BlockLayout:
    """:func:`moealign.align` as one operator."""
    flags = (pad_sorted_ids, ignore_invalid_experts)
    checked = modes.checked(
        _check, check_align, (topk_ids, expert_map, num_valid_tokens), error_word, out, extras, backend,
        topk_ids, block_size, num_experts, expert_map, *flags, num_valid_tokens, error_word, extras,
    )  # fmt: skip
    if isinstance(checked, modes.Refusal):
        return _refused(checked, extras)
    problem, capacity = checked
    sizes = (problem.block_size, problem.num_experts)
    if out is None and error_word is not None:  # an operator that changes an argument returns nothing
        out = _new_buffers(capacity, extras, topk_ids)
    if out is None:
        results = modes.call(
            torch.ops.moealign.align,
            topk_ids, *sizes, expert_map, *flags, num_valid_tokens, ",".join(extras), backend,
        )  # fmt: skip
        filled = dict(zip(REQUIRED + extras, results, strict=True))
    else:
        filled = buffers_by_name(out, extras)
        modes.call(
            torch.ops.moealign.align.out,
            topk_ids, *sizes, expert_map, *flags, num_valid_tokens, error_word, backend, **filled,
        )  # fmt: skip
    mapped = problem.map_dtype is not None
    return BlockLayout(**filled, block_size=sizes[0], num_experts=sizes[1], num_routes=problem.routes, mapped=mapped)


def align_batched(
    expert_num_tokens: Tensor,
    max_tokens_per_batch: int,
    block_size: int,
    error_word: Tensor | None,
    extras: tuple[str, ...],
    out: BlockLayout | Mapping[str, Tensor] | None,
    backend: str | None,
) -> BlockLayout:
    """:func:`moealign.align_batched` as one operator."""
    checked = modes.checked(
        _check, check_align_batched, (expert_num_tokens,), error_word, out, extras, backend,
        expert_num_tokens, max_tokens_per_batch, block_size, error_word, extras,
    )  # fmt: skip
    if isinstance(checked, modes.Refusal):
        return _refused(checked, extras)
    problem, capacity = checked
    sizes = (problem.row_length, problem.block_size)
    if out is None and error_word is not None:
        out = _new_buffers(capacity, extras, expert_num_tokens)
    if out is None:
        results = modes.call(torch.ops.moealign.align_batched, expert_num_tokens, *sizes, ",".join(extras), backend)
        filled = dict(zip(REQUIRED + extras, results, strict=True))
    else:
        filled = buffers_by_name(out, extras)
        modes.call(torch.ops.moealign.align_batched.out, expert_num_tokens, *sizes, error_word, backend, **filled)
    return BlockLayout(**filled, block_size=sizes[1], num_experts=problem.num_experts, num_routes=problem.routes)


def _check(
    check: Callable[..., tuple[AlignProblem, Capacity]],
    inputs: tuple[Tensor | None, ...],
    error_word: Tensor | None,
    out: BlockLayout | Mapping[str, Tensor] | None,
    extras: tuple[str, ...],
    backend: str | None,
    *args: Any,
) -> tuple[AlignProblem, Capacity]:
    """The checks of an eager call, except for overlapping buffers, which the operator checks when it runs."""
    problem, capacity = check(*args)
    check_name(backend)
    if out is not None:
        check_out(out, capacity, extras, (*inputs, error_word), overlap=False)
    if modes.transformed() and (out is not None or error_word is not None):
        raise InvalidInput(
            "out, error_word: expected none inside torch.func transforms, got one; nothing can be written there"
        )
    return problem, capacity


def _refused(refusal: modes.Refusal, extras: tuple[str, ...]) -> BlockLayout:
    names = REQUIRED + extras
    outputs: dict[str, Any] = dict(zip(names, modes.refuse(refusal, len(names)), strict=True))
    return BlockLayout(**outputs)


# ---- the alignment ---------------------------------------------------------------------------------------------------

# Library.define and impl rather than custom_op: a quarter of the cost a call.

_EXTRA_BUFFERS = ", ".join(f"Tensor({letter}!)? {name}=None" for letter, name in zip("efghij", EXTRAS, strict=True))
_BUFFERS = f"Tensor(b!) sorted_token_ids, Tensor(c!) expert_ids, Tensor(d!) num_tokens_post_padded, {_EXTRA_BUFFERS}"
_ALIGN = (
    "Tensor topk_ids, int block_size, int num_experts, Tensor? expert_map=None, bool pad_sorted_ids=False, "
    "bool ignore_invalid_experts=False, Tensor? num_valid_tokens=None"
)
_BATCHED = "Tensor expert_num_tokens, int max_tokens_per_batch, int block_size"
_ERROR = "Tensor(a!)? error_word=None"

_library = torch.library.Library("moealign", "FRAGMENT")
_library.define(f"align({_ALIGN}, str extras='', str? backend=None) -> Tensor[]")
_library.define(f"align.out({_ALIGN}, {_ERROR}, str? backend=None, *, {_BUFFERS}) -> ()")
_library.define(f"align_batched({_BATCHED}, str extras='', str? backend=None) -> Tensor[]")
_library.define(f"align_batched.out({_BATCHED}, {_ERROR}, str? backend=None, *, {_BUFFERS}) -> ()")


def _op_align(
    topk_ids: Tensor,
    block_size: int,
    num_experts: int,
    expert_map: Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    num_valid_tokens: Tensor | None = None,
    extras: str = "",
    backend: str | None = None,
) -> list[Tensor]:
    flags = (pad_sorted_ids, ignore_invalid_experts)
    names = _split(extras)
    _, sizes = check_align(topk_ids, block_size, num_experts, expert_map, *flags, num_valid_tokens, None, names)
    buffers = _new_buffers(sizes, names, topk_ids)
    prepared.align(
        topk_ids, block_size, num_experts, expert_map, *flags, num_valid_tokens, None, names, buffers, backend
    )
    return list(buffers.values())


def _op_align_out(
    topk_ids: Tensor,
    block_size: int,
    num_experts: int,
    expert_map: Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    num_valid_tokens: Tensor | None = None,
    error_word: Tensor | None = None,
    backend: str | None = None,
    **buffers: Tensor | None,
) -> None:
    out = {name: tensor for name, tensor in buffers.items() if tensor is not None}
    extras = tuple(name for name in EXTRAS if name in out)
    prepared.align(
        topk_ids, block_size, num_experts, expert_map, pad_sorted_ids, ignore_invalid_experts, num_valid_tokens,
        error_word, extras, out, backend,
    )  # fmt: skip


def _op_align_batched(
    expert_num_tokens: Tensor,
    max_tokens_per_batch: int,
    block_size: int,
    extras: str = "",
    backend: str | None = None,
) -> list[Tensor]:
    names = _split(extras)
    _, sizes = check_align_batched(expert_num_tokens, max_tokens_per_batch, block_size, None, names)
    buffers = _new_buffers(sizes, names, expert_num_tokens)
    prepared.align_batched(expert_num_tokens, max_tokens_per_batch, block_size, None, names, buffers, backend)
    return list(buffers.values())


def _op_align_batched_out(
    expert_num_tokens: Tensor,
    max_tokens_per_batch: int,
    block_size: int,
    error_word: Tensor | None = None,
    backend: str | None = None,
    **buffers: Tensor | None,
) -> None:
    out = {name: tensor for name, tensor in buffers.items() if tensor is not None}
    extras = tuple(name for name in EXTRAS if name in out)
    prepared.align_batched(expert_num_tokens, max_tokens_per_batch, block_size, error_word, extras, out, backend)


def _split(extras: str) -> tuple[str, ...]:
    """The names in a comma-separated list, in order; operator schemas have no lists of strings."""
    names = extras.split(",") if extras else []
    for name in names:
        if name not in EXTRAS:
            raise InvalidInput(f"extras: expected names among {', '.join(EXTRAS)} joined by commas, got {name!r}")
    return tuple(name for name in EXTRAS if name in names)


def _new_buffers(sizes: Capacity, extras: tuple[str, ...], like: Tensor) -> dict[str, Tensor]:
    """A buffer for every output; the results of an operator must not share memory."""
    shapes = {name: (getattr(sizes, name),) for name in (*REQUIRED, *extras)}
    if "scatter_idx" in shapes:
        shapes["scatter_idx"] = (sizes.scatter_idx, 1)  # type: ignore[assignment]
    return {name: like.new_empty(shape, dtype=torch.int32) for name, shape in shapes.items()}


def _fake_align(
    topk_ids: Tensor,
    block_size: int,
    num_experts: int,
    expert_map: Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    num_valid_tokens: Tensor | None = None,
    extras: str = "",
    backend: str | None = None,
) -> list[Tensor]:
    flags = (pad_sorted_ids, ignore_invalid_experts)
    names = _split(extras)
    _, sizes = check_align(topk_ids, block_size, num_experts, expert_map, *flags, num_valid_tokens, None, names)
    return list(_new_buffers(sizes, names, topk_ids).values())


def _fake_align_batched(
    expert_num_tokens: Tensor,
    max_tokens_per_batch: int,
    block_size: int,
    extras: str = "",
    backend: str | None = None,
) -> list[Tensor]:
    names = _split(extras)
    _, sizes = check_align_batched(expert_num_tokens, max_tokens_per_batch, block_size, None, names)
    return list(_new_buffers(sizes, names, expert_num_tokens).values())


def _fake_out(*args: object, **buffers: object) -> None:
    return None


for _name, _real, _fake in (
    ("align", _op_align, _fake_align),
    ("align.out", _op_align_out, _fake_out),
    ("align_batched", _op_align_batched, _fake_align_batched),
    ("align_batched.out", _op_align_batched_out, _fake_out),
):
    _library.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moealign::{_name}", _fake, lib=_library)
modes.batched(_library, "align")
modes.batched(_library, "align_batched")


# ---- the router; its backward is a formula, so that it can be compiled too -------------------------------------------

_library.define(
    "route(Tensor router_logits, int top_k, str scoring, bool renormalize, Tensor? correction_bias, int num_groups, "
    "int topk_groups, float scale, Tensor? num_valid_tokens, bool mean_probability, str? backend) "
    "-> (Tensor, Tensor, Tensor)"
)


def _route(
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
    problem = check_route(router_logits, top_k, *facts)
    weights, ids, mean = outputs_of(router_logits, top_k, mean_probability)
    router = select_backend(problem, backend).prepare_route(problem)
    router.run(router_logits, correction_bias, num_valid_tokens, weights, ids, mean if mean_probability else None)
    return weights, ids, mean


def _fake_route(router_logits: Tensor, top_k: int, *facts: Any) -> tuple[Tensor, Tensor, Tensor]:
    return outputs_of(router_logits, top_k, facts[-2])


def _route_formula(
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
    """The ids by the operator; weights and mean from them in torch's own operations."""
    with torch._C._AutoDispatchBelowAutograd():
        _, ids, _ = torch.ops.moealign.route(
            router_logits, top_k, scoring, renormalize, correction_bias, num_groups, topk_groups, scale,
            num_valid_tokens, False, backend,
        )  # fmt: skip
    weights, mean = weights_of(
        router_logits, ids, ids >= 0, ids[:, :1] >= 0, (scoring, renormalize, scale), mean_probability
    )
    return weights, ids, mean


def replay(
    router_logits: Tensor,
    replay_ids: Tensor,
    facts: tuple[str, bool, float],
    num_valid_tokens: Tensor | None,
    mean_probability: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, ids and mean of choices made before; `facts` are scoring, renormalize and scale."""
    ids = replay_ids.to(torch.int64)
    live = torch.ones_like(ids[:, :1], dtype=torch.bool)
    if num_valid_tokens is not None:
        live = torch.arange(ids.shape[0], device=ids.device).unsqueeze(1) < num_valid_tokens.reshape(())
    kept = (ids >= 0) & (ids < router_logits.shape[1]) & live
    ids = torch.where(kept, ids, -1).to(torch.int32)
    weights, mean = weights_of(router_logits, ids, kept, live, facts, mean_probability)
    return weights, ids, mean


def weights_of(
    router_logits: Tensor, ids: Tensor, kept: Tensor, live: Tensor, facts: tuple[str, bool, float], mean: bool
) -> tuple[Tensor, Tensor]:
    """The weights of `ids` ``[tokens, k]``, 0 unless `kept`, and the mean share over `live` tokens if `mean`, else an
    empty tensor, in torch's differentiable operations."""
    scoring, renormalize, scale = facts
    x = router_logits.to(torch.float32)
    index = ids.clamp(min=0).to(torch.int64)
    picked = x.gather(1, index)
    if scoring == "softmax":
        if renormalize:
            weights = softmax_of(picked, kept)
        else:
            weights = softmax_of(x).gather(1, index)
    else:
        weights = score_of(picked, scoring).masked_fill(~kept, 0)
        if renormalize:
            weights = weights / (weights.sum(1, keepdim=True) + TINY)
    weights = torch.where(kept, weights * scale, 0.0)
    if not mean:
        return weights, torch.zeros(0, dtype=torch.float32, device=x.device)
    every = softmax_of(x) if scoring == "softmax" else score_of(x, scoring)
    total = every.sum(1, keepdim=True)
    shares = torch.where(live, every / torch.where(total > 0, total, 1.0), 0.0)
    return weights, shares.sum(0) / live.sum().clamp(min=1)


def softmax_of(x: Tensor, kept: Tensor | None = None) -> Tensor:
    """The softmax of each row's numbers that are `kept`: infinite ones share it evenly, and what is left out has 0."""
    left_out = x.isnan() if kept is None else x.isnan() | ~kept
    finite = x.clamp(-MAX, MAX)
    return torch.softmax(finite.masked_fill(left_out, -torch.inf), 1).masked_fill(left_out, 0.0)


def score_of(x: Tensor, scoring: str) -> Tensor:
    """The score of each logit by itself: its sigmoid, or the square root of its softplus; 0 for NaN."""
    if scoring == "sigmoid":
        return torch.where(x >= -FAR, torch.sigmoid(x), 0.0)
    root = torch.nn.functional.softplus(x.clamp(-FAR, MAX)).sqrt()
    return torch.where(x >= -FAR, root, 0.0)


def _slope(x: Tensor, score: Tensor, scoring: str) -> Tensor:
    """The derivative of :func:`score_of`, from its value."""
    if scoring == "sigmoid":
        return score * (1 - score)
    return torch.where(score > 0, torch.sigmoid(x) / (2 * torch.where(score > 0, score, 1.0)), 0.0)


def _save_route(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, ctx.scoring, ctx.renormalize, _, _, _, ctx.scale, _, ctx.wants_mean, _ = inputs
    ctx.save_for_backward(logits, output[1])
    ctx.mark_non_differentiable(output[1])


def _route_backward(ctx: Any, of_weights: Tensor, of_ids: Tensor, of_mean: Tensor) -> tuple[Any, ...]:
    """Through w_i = scale * f(l_i) / sum f and the mean of the shares, with f = exp or the score."""
    logits, ids = ctx.saved_tensors
    x = logits.to(torch.float32)
    live = ids[:, :1] >= 0
    index = ids.clamp(min=0).to(torch.int64)
    picked = x.gather(1, index)
    upstream = torch.where(live, of_weights * ctx.scale, 0.0)
    if ctx.scoring == "softmax":
        if ctx.renormalize:
            share = torch.softmax(picked, 1)
            grad = torch.zeros_like(x).scatter(1, index, share * (upstream - (upstream * share).sum(1, keepdim=True)))
        else:
            p = torch.softmax(x, 1)
            share = p.gather(1, index)
            grad = torch.zeros_like(x).scatter(1, index, share * upstream) - p * (upstream * share).sum(1, keepdim=True)
    else:
        s = score_of(picked, ctx.scoring)
        of_s = upstream
        if ctx.renormalize:
            total = s.sum(1, keepdim=True) + TINY
            of_s = (upstream - (upstream * s).sum(1, keepdim=True) / total) / total
        grad = torch.zeros_like(x).scatter(1, index, of_s * _slope(picked, s, ctx.scoring))
    if ctx.wants_mean:
        share_of = of_mean / live.sum().clamp(min=1)
        if ctx.scoring == "softmax":
            p = torch.softmax(x, 1)
            through = p * (share_of - (share_of * p).sum(1, keepdim=True))
        else:
            s = score_of(x, ctx.scoring)
            total = s.sum(1, keepdim=True)
            through = _slope(x, s, ctx.scoring) * (share_of - (share_of * s).sum(1, keepdim=True) / total) / total
        grad = grad + torch.where(live, through, 0.0)
    return grad.to(logits.dtype), *(None,) * 10


_library.impl("route", _route, "CompositeExplicitAutograd")
torch.library.register_fake("moealign::route", _fake_route, lib=_library)
modes.differentiable(_library, "route", _route_formula, _save_route, _route_backward)
modes.batched(_library, "route")
