"""The public :func:`fused_moe`: a Mixture-of-Experts layer behind its router.

There are three ways to the same result, up to rounding:

``triton``   on GPUs: align (except for very few routes), a product with the activation in its epilogue, a product with
             the routing weight in its epilogue, and a sum over ``top_k`` in a fixed order.  Gradients by kernels of
             the same kind.  No atomics, no synchronisation.
``packed``   on CPUs, in float64, and for gradients of callables: one matrix product per expert, in torch.
a callable   on GPUs runs between two ``triton`` products, on rows in the order of the routes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import modes
from . import operators, packed, quantized_operators
from .activations import Gate, Rows, function_of
from .checks import (
    check_expected_routes,
    check_inference,
    check_layer,
    check_out,
    check_quantized_layer,
    check_training,
    select_path,
)
from .quantized import QuantizedWeights, data_of
from .records import ExpertWeights, Product, Routes
from .tiles import select_block_size

__all__ = ["fused_moe"]

_NO_TRAINING = (False, None, None, False)  # recompute, both of weight_grads, batch_invariant


def fused_moe(
    hidden_states: Tensor,
    gate_up_proj: Tensor | QuantizedWeights,
    down_proj: Tensor | QuantizedWeights,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    expert_map: Tensor | None = None,
    num_valid_tokens: Tensor | None = None,
    activation: str | Gate | Rows = "silu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    transposed: bool = False,
    output_rows: Rows | None = None,
    block_size: int | None = None,
    recompute: bool = False,
    weight_grads: tuple[Tensor, Tensor] | None = None,
    batch_invariant: bool = False,
    expected_routes: int | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``out[t] = sum_j topk_weights[t, j] * expert(topk_ids[t, j], hidden_states[t])``, summed in the order of ``j``.

    ``expert(e, x) = down_proj[e] @ act(gate_up_proj[e] @ x + gate_up_bias[e]) + down_bias[e]``

    A dropped route adds exactly zero.  A route is dropped if its id is outside ``[0, E)`` (such as Transformers'
    sentinel ``E``), if `expert_map` names no local expert for it, or if its token is past `num_valid_tokens`.

    Args:
        hidden_states: ``[T, H]``; bfloat16, float16, float32 or float64.
        gate_up_proj: ``[E, 2I, H]``, gate rows first, or ``[E, I, H]`` for experts without a gate.
        down_proj: ``[E, H, I]``.  Both may be :class:`moealign.QuantizedWeights`: FP8, for inference alone.
        topk_weights: ``[T, k]``, any floating dtype.
        topk_ids: ``[T, k]``, any integer dtype.
        expert_map: ``[global experts]``, the local expert of each global one, or ``-1`` for another rank's; ids are
            then global.
        num_valid_tokens: int32, one element, on the device; later tokens give zeros.
        activation: ``silu``, ``gelu``, ``gelu_tanh``, ``relu`` or ``relu2``, applied to the gate and multiplied by the
            up part if there is a gate; or a :class:`moealign.Gate`, a gate with constants; or a callable from the rows
            of the first product ``[rows, 2I]`` to ``[rows, I]`` that treats each row by itself.
        gate_up_bias, down_bias: ``[E, 2I]`` and ``[E, H]``.
        transposed: weights are ``[E, H, 2I]`` and ``[E, I, H]``.
        output_rows: a callable on the rows of the second product ``[rows, H]``, before the routing weight.
        block_size: rows per block on a GPU, a power of two from 16 to 128; by default a measured rule decides.
        recompute: keep only the inputs for the backward, which computes the first product again, instead of ``2I``
            elements a route.
        weight_grads: contiguous buffers like `gate_up_proj` and `down_proj`, in their dtype or float32.  The backward
            adds the gradients of the projections to them, and leaves those of the projections themselves undefined
            (``.grad`` stays as it is): gradient accumulation without a second pass.  Eager calls only.
        batch_invariant: the bits of a token's output, and of its gradients, do not depend on the other tokens of the
            batch.  Kernels then take the same tiles for every batch; ``packed`` computes one token after the other.
        expected_routes: how many of the ``T * k`` routes are likely to have an expert here, where many have none, such
            as in the fixed room of an exchange: tiles are chosen for so many.  By default all, or with `expert_map` the
            share of the local experts.  It changes speed and rounding alone.
        out: contiguous ``[T, H]`` buffer in the dtype of `hidden_states` for the result, or `hidden_states` itself; it
            overlaps no other argument.  Not if gradients are needed.
        backend: ``triton`` or ``packed``; by default chosen by the device, the dtype and the derivatives needed.

    Returns:
        ``[T, H]``, `out` if given, in the dtype of `hidden_states`, also under autocast, which computes the products in
        its own dtype.  Differentiable in every floating tensor.  ``triton`` is safe in CUDA graphs; torch.compile gives
        one graph.

    Raises:
        InvalidInput, InvalidType: shapes, dtypes or devices do not match.
        BackendUnavailable: `backend` cannot take this call.
    """
    dtypes = (getattr(gate_up_proj, "dtype", None), getattr(down_proj, "dtype", None))
    both: Any = gate_up_proj, down_proj
    tensors = (hidden_states, *map(data_of, both), gate_up_bias, down_bias)
    x, gate_up, down, *biases = modes.in_autocast_dtype(*tensors)
    quantized = both if any(isinstance(each, QuantizedWeights) for each in both) else None
    weights = ExpertWeights(gate_up, down, biases[0], biases[1], transposed, quantized)
    routes = Routes(topk_weights, topk_ids, expert_map, num_valid_tokens)
    if expected_routes is not None:
        refusal = modes.checked(check_expected_routes, expected_routes)
        if isinstance(refusal, modes.Refusal):
            return modes.refuse(refusal)[0]
    if quantized is not None:
        options = (block_size, (recompute, weight_grads, batch_invariant), expected_routes, out, backend)
        return _quantized(hidden_states, x, weights, routes, activation, output_rows, *options)
    gated = modes.checked(check_layer, x, weights, routes, activation, output_rows, block_size)
    if isinstance(gated, modes.Refusal):
        return modes.refuse(gated)[0]
    training: tuple[Any, ...] = _NO_TRAINING
    if recompute is not False or weight_grads is not None or batch_invariant is not False:
        refusal = modes.checked(check_training, weights, recompute, weight_grads, batch_invariant, dtypes)
        if isinstance(refusal, modes.Refusal):
            return modes.refuse(refusal)[0]
        training = (recompute, *(weight_grads or (None, None)), batch_invariant)
    gradients = modes.wants_gradient(x, *weights, topk_weights)
    if out is not None:
        shape, derivatives = hidden_states.shape, gradients or modes.forward_mode()
        refusal = modes.checked(check_out, out, hidden_states, shape[0], shape[1], derivatives)
        if isinstance(refusal, modes.Refusal):
            return modes.refuse(refusal)[0]
    known = activation.text if isinstance(activation, Gate) else activation
    name = known if isinstance(known, str) and output_rows is None else None
    torch_only = modes.forward_mode() or (name is None and (gradients or batch_invariant))
    path = select_path(x, backend, torch_only)
    apply = function_of(activation, gated) if isinstance(activation, (str, Gate)) else activation
    if name is not None:
        watched = modes.watched(x, gate_up, down, *biases, *routes) and backend != "packed"
        if watched or (path == "triton" and gradients):
            options = (name, *biases, transposed, block_size, *training, expected_routes)
            result: Tensor = modes.call(torch.ops.moealign.fused_moe, x, gate_up, down, *routes, *options)
        elif path == "triton":
            buffer = out if x is hidden_states else None  # else the result is of autocast's dtype
            result = operators.run_layer(
                x, weights, routes, name, block_size, None, batch_invariant, buffer, expected_routes
            )
        else:
            result = modes.call(packed.run_training, x, weights, routes, apply, *training)
    elif path == "triton" and not operators.is_empty(x, weights, routes):
        rest = (output_rows, block_size, None, expected_routes)
        result = modes.call(_with_callable, x, weights, routes, apply, *rest)
    else:
        result = modes.call(packed.run_training, x, weights, routes, apply, *training, output_rows, True)
    return _returned(result, hidden_states, out)


def _returned(result: Tensor, hidden_states: Tensor, out: Tensor | None) -> Tensor:
    """`result` in the dtype of `hidden_states`, or in `out`, which may hold it already."""
    if out is None:
        return result.to(hidden_states.dtype)
    return out if result is out else out.copy_(result)


def _quantized(
    hidden_states: Tensor,
    x: Tensor,
    weights: ExpertWeights,
    routes: Routes,
    activation: Any,
    output_rows: Rows | None,
    block_size: int | None,
    training: tuple[object, object, Any],
    expected_routes: int | None,
    out: Tensor | None,
    backend: str | None,
) -> Tensor:
    """:func:`fused_moe` with quantised weights; `x` is `hidden_states` in the dtype that autocast asks for."""
    named = isinstance(activation, (str, Gate)) and output_rows is None
    gated = modes.checked(check_layer, x, weights, routes, activation, output_rows, block_size)
    if isinstance(gated, modes.Refusal):
        return modes.refuse(gated)[0]
    refusal = modes.checked(check_quantized_layer, x, weights, routes, training, named)
    if isinstance(refusal, modes.Refusal):
        return modes.refuse(refusal)[0]
    if out is not None:
        refusal = modes.checked(check_out, out, hidden_states, *x.shape, modes.forward_mode())
        if isinstance(refusal, modes.Refusal):
            return modes.refuse(refusal)[0]
    select_path(x, backend, False)
    if named:
        name = activation.text if isinstance(activation, Gate) else activation
        buffer = out if x is hidden_states else None  # else the result is of autocast's dtype
        options = (training[2], buffer, backend, expected_routes)
        result = quantized_operators.run_layer(x, weights, routes, name, block_size, *options)
    else:
        apply = function_of(activation, gated) if isinstance(activation, (str, Gate)) else activation
        rest = (output_rows, block_size, backend, expected_routes)
        result = modes.call(_with_callable, x, weights, routes, apply, *rest)
    return _returned(result, hidden_states, out)


def _with_callable(
    hidden_states: Tensor,
    weights: ExpertWeights,
    routes: Routes,
    apply: Rows,
    output_rows: Rows | None,
    block_size: int | None,
    backend: str | None,
    expected_routes: int | None,
) -> Tensor:
    """Run callables between and after the kernels, on rows in the order of the routes."""
    if block_size is None and (modes.traced() or torch.compiler.is_exporting()):
        size = 64  # one program for all numbers of tokens
    else:
        size = block_size or select_block_size(hidden_states, weights, routes, expected_routes)
    layout = routes.layout(size, weights.experts())
    blocks = (layout.sorted_token_ids, layout.expert_ids, layout.num_tokens_post_padded)
    first, second = weights.quantized or (None, None)

    def multiply(rows: Tensor, right: Tensor, quantized: Any, bias: Tensor | None, top_k: int) -> Tensor:
        if quantized is not None:
            check_inference(False, None, False, rows)  # a callable may have parameters
            product = Product(rows, right, layout, top_k, None, bias, None, False, False, quantized)
            return quantized_operators.run_product(product, backend)
        result: Tensor = torch.ops.moealign.grouped_gemm(
            rows, right, *blocks, top_k, size, None, bias, None, False, weights.transposed
        )
        return result

    rows = multiply(hidden_states, weights.gate_up, first, weights.gate_up_bias, routes.ids.shape[1])
    rows = packed.apply_callable("activation", apply, rows, weights.inner())
    rows = multiply(rows, weights.down, second, weights.down_bias, 1)
    if output_rows is not None:
        rows = packed.apply_callable("output_rows", output_rows, rows, hidden_states.shape[1])
    positions = layout.positions
    assert positions is not None
    rows = rows.masked_fill((positions < 0).unsqueeze(1), 0)  # callables may map zeros to anything
    return packed.weighted_sum(rows, routes.weights, positions)
