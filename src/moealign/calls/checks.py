"""From the arguments of a call to its problem, or to a refusal: shapes, dtypes and devices; never a value."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidInput, InvalidType
from ..layout import (
    EXTRAS,
    INT32_MAX,
    OUTPUTS,
    REQUIRED,
    BlockLayout,
    Capacity,
    capacity,
    capacity_batched,
)
from ..problem import SCORINGS, AlignProblem, RouteProblem

__all__ = [
    "check_align",
    "check_align_batched",
    "check_index",
    "check_out",
    "check_plain",
    "check_route",
]

_INTEGERS = frozenset(
    (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
)


def check_plain(name: str, value: Any) -> None:
    """Refuse anything but a dense, strided tensor: DTensors, nested and sparse tensors."""
    if not isinstance(value, Tensor):
        raise InvalidType(f"{name}: expected a torch.Tensor, got {type(value).__name__}; use torch.as_tensor(...)")
    if type(value) is not Tensor and hasattr(value, "to_local"):  # a DTensor
        raise InvalidType(
            f"{name}: expected a plain tensor, got {type(value).__name__}; pass its local part, x.to_local(); "
            "moealign.parallel computes experts that are on several ranks"
        )
    if value.layout is not torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise InvalidType(f"{name}: expected a dense, strided tensor, got {kind}; convert it first")


def _integer_tensor(name: str, value: Any) -> None:
    check_plain(name, value)
    if value.dtype not in _INTEGERS:
        raise InvalidType(f"{name}: expected an integer dtype (int8 to uint64), got {value.dtype}; convert it first")


def check_index(name: str, value: Any, device: torch.device) -> None:
    """Refuse anything but a vector of integers on `device`."""
    _integer_tensor(name, value)
    if value.dim() != 1:
        raise InvalidInput(f"{name}: expected one axis, got shape {list(value.shape)}")
    if value.device != device:
        raise InvalidInput(f"{name}: expected a tensor on {device} like the rows, got {value.device}")


def _integer(name: str, value: Any, minimum: int) -> Any:
    """`value` as an int of at least `minimum`; symbolic ints stay symbolic."""
    if type(value) is not int and not isinstance(value, torch.SymInt):
        if isinstance(value, bool | Tensor) or not hasattr(value, "__index__"):
            raise InvalidType(
                f"{name}: expected an int, got {value!r} of type {type(value).__name__}; "
                "mind that block_size comes before num_experts in vLLM's signature"
            )
        value = operator.index(value)
    if value < minimum:
        raise InvalidInput(f"{name}: expected an int of at least {minimum}, got {value}")
    return value


def _within_int32(what: str, value: Any, remedy: str) -> None:
    if isinstance(value, torch.SymInt) or torch.compiler.is_compiling():
        return  # the operator checks the actual size
    if value > INT32_MAX:
        raise InvalidInput(f"{what}: expected at most 2**31 - 1 (outputs are int32), got {value}; {remedy}")


def _word(name: str, value: Any, device: torch.device, remedy: str) -> None:
    if not isinstance(value, Tensor):
        raise InvalidType(f"{name}: expected an int32 tensor with one element on {device}, got {type(value).__name__}")
    if value.dtype is not torch.int32:
        raise InvalidType(f"{name}: expected an int32 tensor with one element, got {value.dtype}; {remedy}")
    if value.numel() != 1:
        raise InvalidInput(f"{name}: expected one element, got shape {tuple(value.shape)}; {remedy}")
    if value.device != device:
        raise InvalidInput(f"{name}: expected a tensor on {device} like the input, got {value.device}; {remedy}")


def check_align(
    topk_ids: Tensor,
    block_size: int,
    num_experts: int,
    expert_map: Tensor | None,
    pad_sorted_ids: bool,
    ignore_invalid_experts: bool,
    num_valid_tokens: Tensor | None,
    error_word: Tensor | None,
    extras: tuple[str, ...],
) -> tuple[AlignProblem, Capacity]:
    """The problem of one :func:`moealign.align` call and the sizes of its outputs, or a refusal."""
    _integer_tensor("topk_ids", topk_ids)
    block_size = _integer("block_size", block_size, 1)
    num_experts = _integer("num_experts", num_experts, 1)
    device = topk_ids.device
    if expert_map is not None:
        _integer_tensor("expert_map", expert_map)
        if expert_map.dim() != 1 or expert_map.shape[0] != num_experts:
            raise InvalidInput(
                f"expert_map: expected shape [num_experts] = [{num_experts}], got {list(expert_map.shape)}; "
                "it maps every global expert to its local id, -1 for an expert of another rank"
            )
        if expert_map.device != device:
            raise InvalidInput(f"expert_map: expected a tensor on {device} like topk_ids, got {expert_map.device}")
        if "scatter_idx" in extras and not ignore_invalid_experts:
            raise InvalidInput(
                "scatter_idx: expected ignore_invalid_experts=True together with an expert_map, got False; "
                "without it the routes of other ranks are kept and the index would name them too"
            )
    if num_valid_tokens is not None:
        _word("num_valid_tokens", num_valid_tokens, device, "it is read on the device, by the kernel")
    if error_word is not None:
        _word("error_word", error_word, device, "moealign.new_error_word(device) makes one")
    routes = topk_ids.numel()
    top_k = topk_ids.shape[-1] if topk_ids.dim() > 1 else 1
    sizes = capacity(routes, block_size=block_size, num_experts=num_experts, pad_sorted_ids=pad_sorted_ids)
    _within_int32("block_size", block_size, "a block holds no more rows than there are")
    _within_int32("topk_ids and block_size", sizes.sorted_token_ids, "align fewer tokens at a time, or smaller blocks")
    _within_int32("topk_ids", routes, "align fewer tokens at a time")
    _within_int32("num_experts", num_experts + 1, "ids of experts do not fit")
    problem = AlignProblem(
        "align",
        device,
        topk_ids.dtype,
        routes,
        top_k,
        num_experts,
        block_size,
        None if expert_map is None else expert_map.dtype,
        ignore_invalid_experts,
        num_valid_tokens is not None,
        error_word is not None,
        extras,
    )
    return problem, sizes


def check_align_batched(
    expert_num_tokens: Tensor,
    max_tokens_per_batch: int,
    block_size: int,
    error_word: Tensor | None,
    extras: tuple[str, ...],
) -> tuple[AlignProblem, Capacity]:
    """The problem of one :func:`moealign.align_batched` call and the sizes of its outputs, or a refusal."""
    _integer_tensor("expert_num_tokens", expert_num_tokens)
    if expert_num_tokens.dim() != 1:
        raise InvalidInput(
            f"expert_num_tokens: expected shape [num_batches], got {list(expert_num_tokens.shape)}; flatten it"
        )
    max_tokens = _integer("max_tokens_per_batch", max_tokens_per_batch, 0)
    block_size = _integer("block_size", block_size, 1)
    device = expert_num_tokens.device
    if error_word is not None:
        _word("error_word", error_word, device, "moealign.new_error_word(device) makes one")
    batches = expert_num_tokens.shape[0]
    sizes = capacity_batched(max_tokens, block_size=block_size, num_batches=batches)
    _within_int32("block_size", block_size, "a block holds no more rows than there are")
    _within_int32("max_tokens_per_batch and block_size", sizes.sorted_token_ids, "align fewer batches at a time")
    _within_int32("max_tokens_per_batch", max_tokens, "batches are at most that long")
    problem = AlignProblem(
        "align_batched",
        device,
        expert_num_tokens.dtype,
        batches * max_tokens,
        max_tokens,
        batches,
        block_size,
        has_error_word=error_word is not None,
        extras=extras,
    )
    return problem, sizes


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_TOP_K = 32


def _float_tensor(name: str, value: Any) -> None:
    check_plain(name, value)
    if value.dtype not in _FLOATS:
        raise InvalidType(f"{name}: expected float32, bfloat16 or float16, got {value.dtype}; convert it first")


def check_route(
    router_logits: Tensor,
    top_k: int,
    scoring: str,
    renormalize: bool,
    correction_bias: Tensor | None,
    num_groups: int,
    topk_groups: int,
    scale: float,
    num_valid_tokens: Tensor | None,
    replay_ids: Tensor | None = None,
    expert_scale: Tensor | None = None,
    shared_experts: int = 0,
) -> RouteProblem:
    """The problem of one :func:`moealign.route` call, or a refusal."""
    _float_tensor("router_logits", router_logits)
    if router_logits.dim() != 2 or router_logits.shape[1] < 1:
        raise InvalidInput(
            f"router_logits: expected shape [tokens, num_experts], got {list(router_logits.shape)}; flatten the batch"
        )
    tokens, experts = router_logits.shape
    device = router_logits.device
    top_k = _integer("top_k", top_k, 1)
    if top_k > min(experts, MAX_TOP_K):
        raise InvalidInput(
            f"top_k: expected at most {min(experts, MAX_TOP_K)} (num_experts, and at most {MAX_TOP_K}), got {top_k}"
        )
    if scoring not in SCORINGS:
        raise InvalidInput(f"scoring: expected one of {', '.join(SCORINGS)}, got {scoring!r}")
    if correction_bias is not None:
        _float_tensor("correction_bias", correction_bias)
        if list(correction_bias.shape) != [experts]:
            raise InvalidInput(
                f"correction_bias: expected shape [num_experts] = [{experts}], got {list(correction_bias.shape)}"
            )
        if correction_bias.device != device:
            raise InvalidInput(
                f"correction_bias: expected a tensor on {device} like router_logits, got {correction_bias.device}"
            )
    num_groups, topk_groups = _integer("num_groups", num_groups, 1), _integer("topk_groups", topk_groups, 1)
    if experts % num_groups:
        raise InvalidInput(f"num_groups: expected a divisor of num_experts = {experts}, got {num_groups}")
    if topk_groups > num_groups or topk_groups * (experts // num_groups) < top_k:
        raise InvalidInput(
            f"topk_groups: expected at most {num_groups} groups that hold {top_k} experts together, got {topk_groups} "
            f"of {experts // num_groups} experts each"
        )
    if num_valid_tokens is not None:
        _word("num_valid_tokens", num_valid_tokens, device, "it is read on the device")
    _within_int32("router_logits", tokens * top_k, "route fewer tokens at a time")
    _check_options([tokens, top_k], experts, device, replay_ids, expert_scale)
    shared_experts = _integer("shared_experts", shared_experts, 0)
    _within_int32("shared_experts", tokens * (top_k + shared_experts), "route fewer tokens at a time")
    return RouteProblem(
        device,
        router_logits.dtype,
        tokens,
        experts,
        top_k,
        scoring,
        bool(renormalize),
        float(scale),
        num_groups,
        topk_groups,
        correction_bias is not None,
        num_valid_tokens is not None,
        shared_experts,
        None if expert_scale is None else expert_scale.dtype,
        None if replay_ids is None else replay_ids.dtype,
    )


def _check_options(
    choice: list[int], experts: int, device: torch.device, replay_ids: Tensor | None, expert_scale: Tensor | None
) -> None:
    """Refuse replayed ids of another shape than that of a `choice`, and factors that are not one for each expert."""
    if replay_ids is not None:
        _integer_tensor("replay_ids", replay_ids)
        if list(replay_ids.shape) != choice:
            raise InvalidInput(f"replay_ids: expected [tokens, top_k] = {choice}, got {list(replay_ids.shape)}")
    if expert_scale is not None:
        _float_tensor("expert_scale", expert_scale)
        if list(expert_scale.shape) != [experts]:
            raise InvalidInput(f"expert_scale: expected [num_experts] = {[experts]}, got {list(expert_scale.shape)}")
    for name, tensor in (("replay_ids", replay_ids), ("expert_scale", expert_scale)):
        if tensor is not None and tensor.device != device:
            raise InvalidInput(f"{name}: expected a tensor on {device} like router_logits, got {tensor.device}")


def check_out(
    out: BlockLayout | Mapping[str, Tensor],
    sizes: Capacity,
    extras: tuple[str, ...],
    inputs: tuple[Tensor | None, ...],
    overlap: bool = True,
) -> dict[str, Tensor]:
    """The caller's buffers by name: complete, of the right sizes, and, if `overlap` is checked, disjoint in memory."""
    if isinstance(out, BlockLayout):
        buffers = {name: getattr(out, name) for name in OUTPUTS if getattr(out, name) is not None}
    elif isinstance(out, Mapping):
        buffers = dict(out)
    else:
        raise InvalidType(f"out: expected a BlockLayout or a mapping of names to tensors, got {type(out).__name__}")
    for name in buffers:
        if name not in OUTPUTS:
            raise InvalidInput(f"out: expected names among {', '.join(OUTPUTS)}, got {name!r}")
        if name in EXTRAS and name not in extras:
            raise InvalidInput(f"out: expected buffers for requested outputs only, got {name} without {name}=True")
    device = next((tensor.device for tensor in inputs if tensor is not None), None)
    for name in REQUIRED + extras:
        tensor = buffers.get(name)
        if tensor is None:
            raise InvalidInput(f"out: expected a buffer for {name}, got none; moealign.capacity(...) gives its size")
        if not isinstance(tensor, Tensor):
            raise InvalidType(f"out: expected a tensor for {name}, got {type(tensor).__name__}")
        if tensor.dtype is not torch.int32:
            raise InvalidType(f"out: expected an int32 tensor for {name}, got {tensor.dtype}")
        size = getattr(sizes, name)
        shape = [size, 1] if name == "scatter_idx" else [size]
        if list(tensor.shape) != shape:
            raise InvalidInput(f"out: expected shape {shape} for {name}, got {list(tensor.shape)}; slice the buffer")
        if not tensor.is_contiguous():
            raise InvalidInput(f"out: expected a contiguous tensor for {name}, got strides {tensor.stride()}")
        if tensor.device != device:
            raise InvalidInput(f"out: expected {name} on {device} like the input, got {tensor.device}")
    if overlap:
        _refuse_overlap({name: buffers[name] for name in REQUIRED + extras}, inputs)
    return buffers


def _refuse_overlap(buffers: Mapping[str, Tensor], inputs: tuple[Tensor | None, ...]) -> None:
    """Buffers must not share memory with each other or with an input; inputs may share memory among themselves."""
    spans = []
    named: list[tuple[str | None, Tensor | None]] = [*buffers.items(), *((None, tensor) for tensor in inputs)]
    for name, tensor in named:
        if tensor is not None and tensor.numel():
            reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            start = tensor.data_ptr()
            spans.append((start, start + reach * tensor.element_size(), name))
    furthest: list[tuple[int, str | None]] = []  # the furthest end so far, of buffers and of inputs
    for start, end, name in sorted(spans, key=lambda span: span[0]):
        for reached, other in furthest:
            if start < reached and not (name is None and other is None):
                first, second = other or "an input", name or "an input"
                raise InvalidInput(f"out: expected buffers that share no memory, got {first} and {second} overlapping")
        furthest = [(e, o) for e, o in furthest if (o is None) != (name is None) or e > end] + [(end, name)]
