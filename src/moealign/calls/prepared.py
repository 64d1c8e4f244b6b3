"""Prepared calls: the work of one signature (shapes, dtypes, devices and arguments) is done once, cached, and reused.

One bounded cache serves all public functions.  Backends keep only compiled kernels beyond its lifetime.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backend import Prepared
from ..layout import OUTPUTS, REQUIRED, BlockLayout, Capacity, frozen
from ..problem import AlignProblem, RouteProblem
from .checks import check_align, check_align_batched, check_out, check_route
from .dispatch import check_name, select_backend, select_fusing

__all__ = ["PreparedCall", "align", "align_batched", "buffers_by_name", "cached", "outputs_of", "route", "signature"]

_MAX_ENTRIES = 4096


class PreparedCall(NamedTuple):
    """One alignment: the backend's part, and how its outputs are allocated."""

    problem: AlignProblem
    sizes: Capacity
    run: Callable[..., None]  # Prepared.run
    required: Callable[..., None] | None  # Prepared.required
    allocate: Callable[[int], Tensor]  # so many int32 elements
    elements: int  # of all outputs
    lengths: list[int]  # of each output
    separate: bool  # each output is an allocation of its own


class _PreparedRoute(NamedTuple):
    """A router with the layout of its ids."""

    columns: int  # of the weights and ids
    layout: PreparedCall
    run: Callable[..., None]  # PreparedRoute.run_with_layout


#: Signatures of public calls to what was prepared for them.
cached: dict[Any, Any] = {}
_COMPOSED: Any = object()  # prepared for a router whose options its backend does not fuse
_checked_buffers: dict[object, None] = {}


def _store(cache: dict[Any, Any], key: Any, value: Any) -> None:
    if len(cache) >= _MAX_ENTRIES:
        cache.clear()
    cache[key] = value


def _lookup(key: Any) -> Any:
    try:
        return cached.get(key)
    except TypeError:  # not hashable: the checks refuse it
        return None


def signature(tensor: Any) -> tuple[object, ...] | None:
    """All that a check may depend on."""
    return (tensor.shape, tensor.dtype, tensor.device) if isinstance(tensor, Tensor) else None if tensor is None else ()


def _prepare(problem: AlignProblem, sizes: Capacity, backend: str | None) -> PreparedCall:
    prepared: Prepared = select_backend(problem, backend).prepare(problem)
    return _with_outputs(problem, sizes, prepared)


def _with_outputs(problem: AlignProblem, sizes: Capacity, prepared: Prepared) -> PreparedCall:
    lengths = [getattr(sizes, name) for name in REQUIRED + problem.extras]
    # new_empty of an empty tensor costs a quarter less than torch.empty with a dtype and a device.
    allocate = torch.empty(0, dtype=torch.int32, device=problem.device).new_empty
    separate = problem.device.type == "cpu"
    return PreparedCall(problem, sizes, *prepared, allocate, sum(lengths), lengths, separate)


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
    """Run :func:`moealign.align` now; the arguments are checked at the first call of their signature."""
    key: tuple[object, ...] | None = None
    if type(block_size) is int and type(num_experts) is int and isinstance(topk_ids, Tensor):
        ids, flags = (topk_ids.shape, topk_ids.dtype, topk_ids.device), (pad_sorted_ids, ignore_invalid_experts)
        key = (*ids, block_size, num_experts, *flags, extras, backend)
        if expert_map is not None or num_valid_tokens is not None or error_word is not None:
            key = (*key, signature(expert_map), signature(num_valid_tokens), signature(error_word))
    call = _lookup(key)
    if call is None:
        arguments = (topk_ids, block_size, num_experts, expert_map, pad_sorted_ids, ignore_invalid_experts)
        call = _prepare(*check_align(*arguments, num_valid_tokens, error_word, extras), backend)
        if key is not None:
            _store(cached, key, call)
    layout = _outputs(call, out, (topk_ids, expert_map, num_valid_tokens, error_word))
    call.run(topk_ids, expert_map, num_valid_tokens, error_word, layout)
    return layout


def align_batched(
    expert_num_tokens: Tensor,
    max_tokens_per_batch: int,
    block_size: int,
    error_word: Tensor | None,
    extras: tuple[str, ...],
    out: BlockLayout | Mapping[str, Tensor] | None,
    backend: str | None,
) -> BlockLayout:
    """Run :func:`moealign.align_batched` now."""
    key = None
    if type(block_size) is int and type(max_tokens_per_batch) is int:
        key = (signature(expert_num_tokens), max_tokens_per_batch, block_size, signature(error_word), extras, backend)
    call = _lookup(key)
    if call is None:
        arguments = (expert_num_tokens, max_tokens_per_batch, block_size, error_word, extras)
        call = _prepare(*check_align_batched(*arguments), backend)
        if key is not None:
            _store(cached, key, call)
    layout = _outputs(call, out, (expert_num_tokens, error_word))
    call.run(expert_num_tokens, error_word, layout)
    return layout


def route(
    router_logits: Tensor,
    facts: tuple[Any, ...],
    correction_bias: Tensor | None,
    num_valid_tokens: Tensor | None,
    mean_probability: bool,
    block_size: int,
    backend: str | None,
    expert_map: Tensor | None,
    pad_sorted_ids: bool,
    ignore_invalid_experts: bool,
    extras: tuple[str, ...],
    error_word: Tensor | None,
    out: BlockLayout | Mapping[str, Tensor] | None,
    options: tuple[Any, Any, Any] | None = None,
) -> tuple[Tensor, Tensor, BlockLayout, Tensor] | None:
    """Run :func:`moealign.route` now: ``(weights, ids, layout, mean)``; the mean is empty if it is not requested.

    `facts` are the arguments of :func:`check_route` that hold no tensor: ``(top_k, scoring, renormalize, num_groups,
    topk_groups, scale)``.  `options` are ``(replay_ids, expert_scale, shared_experts)``; with them nothing is run, and
    None returned, if the backend that takes the call has no kernel for them.
    """
    flags = (pad_sorted_ids, ignore_invalid_experts)
    tensors = (router_logits, correction_bias, num_valid_tokens, expert_map, error_word)
    key: Any = (*facts, block_size, *flags, extras, backend, *map(signature, tensors))
    top_k, scoring, renormalize, num_groups, topk_groups, scale = facts
    exact = type(block_size) is type(top_k) is type(num_groups) is type(topk_groups) is int  # as a key, True equals 1
    more: tuple[Any, ...] = ()
    if options is not None:
        more, shared_experts = options[:2], options[2]
        key = (*key, *map(signature, more), shared_experts)
        exact = exact and type(shared_experts) is int
    call = _lookup(key) if exact else None
    if call is None:
        if options is not None:
            check_name(backend)
        problem = check_route(
            router_logits,
            top_k,
            scoring,
            renormalize,
            correction_bias,
            num_groups,
            topk_groups,
            scale,
            num_valid_tokens,
            *(options or ()),
        )
        router = (select_backend if options is None else select_fusing)(problem, backend)
        if router is None:
            call = _COMPOSED
        else:
            layout = (block_size, expert_map, flags, error_word, extras)
            call = _prepare_route(router, problem, router_logits, *layout, backend)
        if exact:
            _store(cached, key, call)
    if call is _COMPOSED:
        return None
    weights, ids, mean = outputs_of(router_logits, call.columns, mean_probability)
    made = _outputs(call.layout, out, (ids, expert_map, None, error_word, *more))
    call.run(
        router_logits, correction_bias, num_valid_tokens, weights, ids, mean if mean_probability else None,
        expert_map, error_word, made, *more,
    )  # fmt: skip
    return weights, ids, made, mean


def _prepare_route(
    router: ModuleType,
    problem: RouteProblem,
    router_logits: Tensor,
    block_size: int,
    expert_map: Tensor | None,
    flags: tuple[bool, bool],
    error_word: Tensor | None,
    extras: tuple[str, ...],
    backend: str | None,
) -> _PreparedRoute:
    ids = router_logits.new_empty((problem.tokens, problem.columns), dtype=torch.int32)
    experts = problem.num_experts + problem.shared_experts
    aligned, sizes = check_align(ids, block_size, experts, expert_map, *flags, None, error_word, extras)
    prepared = router.prepare_route(problem, aligned)
    if prepared.run_with_layout is not None:
        # The backend of the router computes the layout too.
        layout = _with_outputs(aligned, sizes, Prepared(prepared.run_with_layout))
        return _PreparedRoute(problem.columns, layout, prepared.run_with_layout)
    layout = _prepare(aligned, sizes, backend)

    def in_turn(logits: Tensor, bias: Any, num_valid: Any, weights: Tensor, ids: Tensor, mean: Any, *rest: Any) -> None:
        prepared.run(logits, bias, num_valid, weights, ids, mean)
        expert_map, error_word, out = rest
        layout.run(ids, expert_map, None, error_word, out)

    return _PreparedRoute(problem.columns, layout, in_turn)


def outputs_of(router_logits: Tensor, columns: int, mean_probability: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised weights, ids and mean of a router; the mean is empty if it is not requested."""
    tokens, experts = router_logits.shape
    weights = router_logits.new_empty((tokens, columns), dtype=torch.float32)
    ids = router_logits.new_empty((tokens, columns), dtype=torch.int32)
    return weights, ids, router_logits.new_empty(experts if mean_probability else 0, dtype=torch.float32)


# ---- outputs of a layout ---------------------------------------------------------------------------------------------


def new_tensors(call: PreparedCall) -> Sequence[Tensor]:
    """New outputs.  On a GPU one allocation, split, costs half as much as one each; on a CPU one each is cheaper."""
    if call.separate:
        return list(map(call.allocate, call.lengths))
    # sorted_token_ids comes first, so it is aligned
    return call.allocate(call.elements).unsafe_split_with_sizes(call.lengths)  # type: ignore[no-any-return]


def new_layout(call: PreparedCall) -> BlockLayout:
    problem, tensors = call.problem, new_tensors(call)
    sizes = (problem.block_size, problem.num_experts, problem.routes, problem.map_dtype is not None)
    if not problem.extras:
        return frozen(tensors[0], tensors[1], tensors[2], None, None, None, None, None, None, *sizes)
    named = dict(zip(REQUIRED + problem.extras, tensors, strict=True))
    if "scatter_idx" in named:
        named["scatter_idx"] = named["scatter_idx"].view(-1, 1)
    return _as_layout(problem, named)


def _outputs(
    call: PreparedCall, out: BlockLayout | Mapping[str, Tensor] | None, inputs: tuple[Tensor | None, ...]
) -> BlockLayout:
    """New outputs, or the caller's buffers.  Whether those overlap `inputs` is checked once for their addresses."""
    if out is None:
        return new_layout(call)
    problem = call.problem
    if type(out) is not BlockLayout:
        return _as_layout(problem, check_out(out, call.sizes, problem.extras, inputs))
    buffers = [getattr(out, name) for name in OUTPUTS]
    key = (call.sizes, problem.extras, *map(_address_key, buffers), *map(_address_key, inputs))
    if key not in _checked_buffers:
        check_out(out, call.sizes, problem.extras, inputs)
        _store(_checked_buffers, key, None)
    return _as_layout(problem, buffers_by_name(out, problem.extras))


def buffers_by_name(out: BlockLayout | Mapping[str, Tensor], extras: tuple[str, ...]) -> dict[str, Tensor]:
    """The buffers of `out` by name."""
    if isinstance(out, BlockLayout):
        return {name: getattr(out, name) for name in REQUIRED + extras}
    return {name: out[name] for name in REQUIRED + extras}


def _address_key(tensor: Tensor | None) -> object:
    """All that the check of buffers depends on."""
    if not isinstance(tensor, Tensor):
        return None if tensor is None else type(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _as_layout(problem: AlignProblem, tensors: Mapping[str, Tensor]) -> BlockLayout:
    requested = REQUIRED + problem.extras
    values = (tensors[name] if name in requested else None for name in OUTPUTS)
    mapped = problem.map_dtype is not None
    return frozen(*values, problem.block_size, problem.num_experts, problem.routes, mapped)
