"""A whole Mixture-of-Experts layer behind its router: align, first product, activation, second product, sum over k.

Three ways, one result up to rounding:

``triton``  on GPUs: align (or none of it for a few routes), a product with the activation in its epilogue, a product
            with the routing weight in its epilogue, a sum over ``top_k`` in a fixed order.  No atomics, no wait for
            the device.
``packed``  on CPUs, in float64, and wherever gradients are wanted: rows packed by expert, one matrix product an
            expert, everything in between in torch; gathers and products are operators with gradients of their own.
a callable activation on a GPU runs between the two products, on rows in the order of the routes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import modes
from ..alignment import align
from ..errors import InvalidInput, InvalidType
from . import launch as kernels
from . import packed
from .gemm import check_activation, check_floats, check_ids, choose

__all__ = ["fused_moe"]

Rows = Callable[[Tensor], Tensor]


def fused_moe(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    expert_map: Tensor | None = None,
    num_valid_tokens: Tensor | None = None,
    activation: str | Rows = "silu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    transposed: bool = False,
    output_rows: Rows | None = None,
    block_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """``out[t] = sum_j topk_weights[t, j] * expert(topk_ids[t, j], hidden_states[t])``, summed in the order of ``j``.

    ``expert(e, x) = down_proj[e] @ act(gate_up_proj[e] @ x + gate_up_bias[e]) + down_bias[e]``

    A route that is dropped adds exactly zero: an id outside ``[0, E)`` (Transformers' sentinel ``E`` among them), an
    expert that `expert_map` sends elsewhere, a token past `num_valid_tokens`.

    Args:
        hidden_states: ``[T, H]``; bfloat16, float16, float32 or float64.
        gate_up_proj: ``[E, 2I, H]``, gate rows first, or ``[E, I, H]`` for experts without a gate.
        down_proj: ``[E, H, I]``.
        topk_weights: ``[T, k]``, any floating dtype.
        topk_ids: ``[T, k]``, any integer dtype.
        expert_map: ``[global experts]`` local expert of each global one, ``-1`` for another rank's; ids are global.
        num_valid_tokens: int32, one element, on the device: tokens from there on give zeros.
        activation: ``silu``, ``gelu``, ``gelu_tanh``, ``relu``, ``relu2``, applied to the gate half and multiplied by
            the other where there is a gate; or a callable from the rows of the first product ``[rows, 2I]`` to
            ``[rows, I]`` that treats each row by itself.
        gate_up_bias, down_bias: ``[E, 2I]`` and ``[E, H]``.
        transposed: weights are ``[E, H, 2I]`` and ``[E, I, H]``.
        output_rows: a callable on the rows of the second product ``[rows, H]``, before the routing weight.
        block_size: rows of a block on a GPU, a power of two from 16 to 128; by default a measured rule decides.
        backend: ``triton`` or ``packed``; by default the device, the dtype and whether gradients are wanted decide.

    Returns:
        ``[T, H]`` of the dtype of `hidden_states`, also under autocast, which computes the products in its own dtype.
        Differentiable in everything that floats, for no tokens too.  Safe in CUDA graphs where ``triton`` computes, and
        one graph under torch.compile.

    Raises:
        InvalidInput, InvalidType: shapes, dtypes or devices that do not belong together.
        BackendUnavailable: the backend named cannot take this call.
    """
    tensors = (hidden_states, gate_up_proj, down_proj, gate_up_bias, down_bias)
    x, *floats = modes.in_autocast_dtype(*tensors)
    gated = modes.checked(
        _check, x, *floats, topk_weights, topk_ids, expert_map, num_valid_tokens, activation, transposed, output_rows,
        block_size,
    )  # fmt: skip
    if isinstance(gated, modes.Refusal):
        return modes.refuse(gated)[0]
    gate_up_proj, down_proj, gate_up_bias, down_bias = floats
    wanted = modes.forward_mode() or modes.wants_gradient(x, *floats, topk_weights)
    watched = modes.watched(x, *floats, topk_weights, topk_ids, expert_map, num_valid_tokens)
    chosen = choose(x, backend, wanted)
    inputs = (x, gate_up_proj, down_proj, topk_weights, topk_ids, expert_map, num_valid_tokens)
    others = (gate_up_bias, down_bias, transposed)
    result: Tensor
    if isinstance(activation, str) and output_rows is None:
        if watched and backend != "packed":
            result = modes.call(torch.ops.moealign.fused_moe, *inputs, activation, *others, block_size)
        elif chosen == "triton":
            result = _op(*inputs, activation, *others, block_size)
        else:
            result = modes.call(_packed, *inputs, packed.ACTIVATIONS[activation, gated], *others, None, clean=False)
    else:
        apply = packed.ACTIVATIONS[activation, gated] if isinstance(activation, str) else activation
        if chosen == "triton" and not _nothing(x, gate_up_proj, down_proj, topk_ids):
            result = modes.call(_between, *inputs, apply, *others, output_rows, block_size)
        else:
            result = modes.call(_packed, *inputs, apply, *others, output_rows, clean=True)
    return result.to(hidden_states.dtype)


def _check(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    num_valid_tokens: Tensor | None,
    activation: str | Rows,
    transposed: bool,
    output_rows: Rows | None,
    block_size: int | None,
) -> bool:
    """Whether there is a named activation with a gate; every refusal of :func:`fused_moe` but the backend's."""
    floats = {
        "hidden_states": hidden_states,
        "gate_up_proj": gate_up_proj,
        "down_proj": down_proj,
        "gate_up_bias": gate_up_bias,
        "down_bias": down_bias,
    }
    check_floats(floats, hidden_states, same_dtype=True)
    check_floats({"topk_weights": topk_weights}, hidden_states, same_dtype=False)
    check_ids(topk_ids, gate_up_proj, expert_map, num_valid_tokens)
    if hidden_states.dim() != 2 or gate_up_proj.dim() != 3 or down_proj.dim() != 3:
        raise InvalidInput(
            "hidden_states, gate_up_proj, down_proj: expected [T, H], [E, 2I, H] and [E, H, I], got "
            f"{list(hidden_states.shape)}, {list(gate_up_proj.shape)} and {list(down_proj.shape)}"
        )
    tokens, hidden = hidden_states.shape
    experts = gate_up_proj.shape[0]
    last, first = (gate_up_proj.shape[1], gate_up_proj.shape[2]) if transposed else gate_up_proj.shape[:0:-1]
    inner, outer = (down_proj.shape[1], down_proj.shape[2]) if transposed else down_proj.shape[:0:-1]
    callable_ = None if isinstance(activation, str) else activation
    if last != hidden or outer != hidden or down_proj.shape[0] != experts:
        raise InvalidInput(
            f"gate_up_proj, down_proj: expected [E, 2I, {hidden}] and [E, {hidden}, I], got {list(gate_up_proj.shape)} "
            f"and {list(down_proj.shape)}; transposed=True takes [E, {hidden}, 2I] and [E, I, {hidden}]"
        )
    if callable_ is None and first not in (inner, 2 * inner):
        raise InvalidInput(
            f"gate_up_proj: expected 2I = {2 * inner} or I = {inner} outputs as down_proj takes {inner}, got {first}"
        )
    if callable_ is not None and not callable(callable_):
        raise InvalidType(f"activation: expected a name or a callable, got {type(activation).__name__}")
    if output_rows is not None and not callable(output_rows):
        raise InvalidType(f"output_rows: expected a callable, got {type(output_rows).__name__}")
    if topk_ids.dim() != 2 or topk_ids.shape[0] != tokens or topk_weights.shape != topk_ids.shape:
        raise InvalidInput(
            f"topk_ids, topk_weights: expected [{tokens}, k] both, got {list(topk_ids.shape)} and "
            f"{list(topk_weights.shape)}"
        )
    for name, bias, size in (("gate_up_bias", gate_up_bias, first), ("down_bias", down_bias, hidden)):
        if bias is not None and list(bias.shape) != [experts, size]:
            raise InvalidInput(f"{name}: expected [{experts}, {size}], got {list(bias.shape)}")
    gated = callable_ is None and first == 2 * inner
    if callable_ is None:
        check_activation(activation, gated)
    if block_size is not None and block_size not in kernels.BLOCK_SIZES:
        raise InvalidInput(f"block_size: expected one of {', '.join(map(str, kernels.BLOCK_SIZES))}, got {block_size}")
    return gated


def _packed(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    num_valid_tokens: Tensor | None,
    apply: Rows,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    transposed: bool,
    output_rows: Rows | None,
    clean: bool,
) -> Tensor:
    """`clean`: rows of dropped routes reach the callables as zeros, since they may have parameters of their own."""
    top_k = topk_ids.shape[1]
    experts = modes.checked(gate_up_proj.size, 0)
    layout = align(
        topk_ids,
        block_size=1,
        num_experts=experts if expert_map is None else modes.checked(expert_map.size, 0),
        expert_map=expert_map,
        ignore_invalid_experts=True,
        num_valid_tokens=num_valid_tokens,
        group_ends=True,
        positions=True,
    )
    ends, positions, order = layout.group_ends, layout.positions, layout.sorted_token_ids
    assert ends is not None
    assert positions is not None
    if expert_map is not None and expert_map.shape[0] > experts:  # a map may name local experts that have no weights
        positions = torch.where(positions < ends[experts - 1], positions, -1)
        rows_here = torch.arange(order.shape[0], device=order.device) < ends[experts - 1]
        order = torch.where(rows_here, order, order.shape[0])
    ends = ends[:experts]
    tensors = (hidden_states, gate_up_proj, down_proj, topk_weights, gate_up_bias, down_bias)
    if not clean and packed.one_by_one(order.shape[0], experts, *(each for each in tensors if each is not None)):
        rows = packed.expert_rows(
            hidden_states,
            gate_up_proj,
            down_proj,
            topk_weights,
            order,
            ends,
            apply,
            gate_up_bias,
            down_bias,
            transposed,
        )
        return _sum(rows.view(*topk_ids.shape, rows.shape[1]), rows.dtype)
    inner = down_proj.shape[1 if transposed else 2]
    rows = packed.gather_rows(hidden_states, order, positions, top_k)
    rows = packed.grouped_mm(rows, gate_up_proj, ends, transposed)
    if clean:
        past = (torch.arange(order.shape[0], device=order.device) >= ends[-1]).unsqueeze(1)
        rows = rows.masked_fill(past, 0)
    if gate_up_bias is not None:
        rows = rows + packed.bias_rows(gate_up_bias, ends, rows.shape[0])
    rows = packed.grouped_mm(_applied("activation", apply, rows, inner), down_proj, ends, transposed)
    if clean:
        rows = rows.masked_fill(past, 0)
    if down_bias is not None:
        rows = rows + packed.bias_rows(down_bias, ends, rows.shape[0])
    if output_rows is not None:
        rows = _applied("output_rows", output_rows, rows, hidden_states.shape[1])
    return _weighted_sum(packed.scatter_rows(rows, order, positions), topk_weights, positions)


def _between(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    num_valid_tokens: Tensor | None,
    apply: Rows,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    transposed: bool,
    output_rows: Rows | None,
    block_size: int | None,
) -> Tensor:
    """The kernels with a callable in between, on rows in the order of the routes."""
    top_k = topk_ids.shape[1]
    experts = modes.checked(gate_up_proj.size, 0)
    if block_size is None and (modes.traced() or torch.compiler.is_exporting()):
        size = 64  # one program for all numbers of tokens
    else:
        routes = topk_ids.numel()
        size = block_size or kernels.block_size_of(hidden_states, routes, gate_up_proj, down_proj, transposed)
    layout = align(
        topk_ids,
        block_size=size,
        num_experts=experts if expert_map is None else modes.checked(expert_map.size, 0),
        expert_map=expert_map,
        ignore_invalid_experts=True,
        num_valid_tokens=num_valid_tokens,
        positions=True,
    )

    blocks = (layout.sorted_token_ids, layout.expert_ids, layout.num_tokens_post_padded)

    def product(rows: Tensor, weights: Tensor, bias: Tensor | None, each: int) -> Tensor:
        result: Tensor = torch.ops.moealign.grouped_gemm(
            rows, weights, *blocks, each, size, None, bias, None, False, transposed
        )
        return result

    inner = down_proj.shape[1 if transposed else 2]
    rows = _applied("activation", apply, product(hidden_states, gate_up_proj, gate_up_bias, top_k), inner)
    rows = product(rows, down_proj, down_bias, 1)
    if output_rows is not None:
        rows = _applied("output_rows", output_rows, rows, hidden_states.shape[1])
    positions = layout.positions
    assert positions is not None
    rows = rows.masked_fill((positions < 0).unsqueeze(1), 0)  # what the callables made of rows of zeros
    return _weighted_sum(rows, topk_weights, positions)


def _applied(name: str, function: Rows, rows: Tensor, width: int) -> Tensor:
    """``function(rows)``, ``[rows, width]`` in the dtype of `rows`."""
    result = function(rows)
    if not isinstance(result, Tensor) or result.dim() != 2 or result.shape != (rows.shape[0], width):
        got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise InvalidInput(f"{name}: expected [{rows.shape[0]}, {width}] from the callable, got {got}")
    return result.to(rows.dtype)


def _weighted_sum(rows: Tensor, topk_weights: Tensor, positions: Tensor) -> Tensor:
    """``[T * k, H]`` times the weights, summed over k; a dropped route's weight may be anything, even NaN."""
    tokens, top_k = topk_weights.shape
    weights = topk_weights.masked_fill((positions < 0).view(tokens, top_k), 0)
    return _sum(rows.view(tokens, top_k, rows.shape[1]) * weights.unsqueeze(-1), rows.dtype)


def _sum(weighted: Tensor, dtype: torch.dtype) -> Tensor:
    """``[T, k, H]`` over k, in float32 at least."""
    return weighted.sum(1, dtype=torch.promote_types(weighted.dtype, torch.float32)).to(dtype)


# ---- the operator --------------------------------------------------------------------------------------------------

_library = torch.library.Library("moealign", "FRAGMENT")
_library.define(
    "fused_moe(Tensor hidden_states, Tensor gate_up_proj, Tensor down_proj, Tensor topk_weights, Tensor topk_ids, "
    "Tensor? expert_map, Tensor? num_valid_tokens, str activation, Tensor? gate_up_bias, Tensor? down_bias, "
    "bool transposed, int? block_size) -> Tensor"
)


def _op(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    num_valid_tokens: Tensor | None,
    activation: str,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    transposed: bool,
    block_size: int | None,
) -> Tensor:
    if kernels.refuses(hidden_states) is not None or _nothing(hidden_states, gate_up_proj, down_proj, topk_ids):
        return _formula(
            hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids, expert_map, num_valid_tokens, activation,
            gate_up_bias, down_bias, transposed, block_size,
        )  # fmt: skip
    plan = kernels.plan(
        hidden_states, gate_up_proj, down_proj, topk_ids, transposed, block_size, expert_map, num_valid_tokens
    )
    layout = None
    if plan.block_size:
        layout = align(
            topk_ids,
            block_size=plan.block_size,
            num_experts=gate_up_proj.shape[0] if expert_map is None else expert_map.shape[0],
            expert_map=expert_map,
            ignore_invalid_experts=True,
            num_valid_tokens=num_valid_tokens,
            positions=True,
        )
    return kernels.fused_moe(
        plan,
        hidden_states,
        gate_up_proj,
        down_proj,
        topk_weights,
        topk_ids,
        layout,
        activation,
        gate_up_bias,
        down_bias,
        transposed,
    )


def _nothing(hidden_states: Tensor, gate_up_proj: Tensor, down_proj: Tensor, topk_ids: Tensor) -> bool:
    """Whether there is nothing to launch a kernel for."""
    return 0 in (topk_ids.numel(), hidden_states.shape[1], gate_up_proj.numel(), down_proj.numel())


def _formula(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    num_valid_tokens: Tensor | None,
    activation: str,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    transposed: bool,
    block_size: int | None,
) -> Tensor:
    gated = gate_up_proj.shape[2 if transposed else 1] == 2 * down_proj.shape[1 if transposed else 2]
    return _packed(
        hidden_states,
        gate_up_proj,
        down_proj,
        topk_weights,
        topk_ids,
        expert_map,
        num_valid_tokens,
        packed.ACTIVATIONS[activation, gated],
        gate_up_bias,
        down_bias,
        transposed,
        None,
        clean=False,
    )


def _fake(hidden_states: Tensor, *args: object) -> Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


def _flops(rows: Any, first: Any, second: Any, weights: Any, *_: Any, **__: Any) -> int:
    """Two operations for each weight of the expert of each route."""
    return 2 * int(math.prod(weights) * (math.prod(first[1:]) + math.prod(second[1:])))


_library.impl("fused_moe", _op, "CompositeExplicitAutograd")
torch.library.register_fake("moealign::fused_moe", _fake, lib=_library)
modes.differentiable(_library, "fused_moe", _formula)
modes.batched(_library, "fused_moe")
modes.flops("fused_moe", _flops)
