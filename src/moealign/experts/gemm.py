"""The public :func:`grouped_gemm`: check, select a path, run."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import modes
from ..layout import BlockLayout
from . import operators, packed, quantized_operators
from .activations import Gate
from .checks import check_inference, check_out, check_product, select_path
from .quantized import QuantizedWeights, data_of
from .records import Product

__all__ = ["grouped_gemm"]


def grouped_gemm(
    a: Tensor,
    b: Tensor | QuantizedWeights,
    layout: BlockLayout,
    *,
    top_k: int,
    row_weights: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | Gate | None = None,
    transposed: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``out[i] = row_weights[i] * activation(b[e] @ a[i // top_k] + bias[e])`` for each route ``i`` of expert ``e``.

    Products are accumulated in float32 (float64 for float64).  An output row that the layout does not name, because
    its route is dropped or foreign, is exactly zero.

    Args:
        a: ``[T, K]`` rows in bfloat16, float16, float32 or float64; the layout has ``T * top_k`` routes.
        b: ``[E, N, K]`` weights of the experts that ``layout.expert_ids`` names, in the dtype of `a`.  Blocks of
            ``-1`` or of an expert beyond ``E`` give zeros.  Or :class:`moealign.QuantizedWeights`: FP8, for inference
            alone.
        layout: from :func:`moealign.align`; from :func:`moealign.align_batched`, with ``top_k=1``; or from the tensors
            of vLLM's function, ``BlockLayout(*tensors, block_size=B)``.
        top_k: routes per row of `a`: route ``i`` reads row ``i // top_k``.
        row_weights: ``[n]`` or ``[T, top_k]`` factor of each output row, in any floating dtype.
        bias: ``[E, N]``, added before the activation.
        activation: ``silu``, ``gelu``, ``gelu_tanh``, ``relu`` or ``relu2``.  With the suffix ``_mul`` (``silu_mul``)
            it applies to the first half of the columns, multiplied by the second; the output has ``N / 2`` columns.
            A :class:`moealign.Gate` is such a gate with constants.
        transposed: `b` is ``[E, K, N]``.
        out: contiguous ``[n, N]`` buffer in the dtype of `a` for the result; not if gradients are needed.
        backend: ``triton`` or ``packed``; by default chosen by the device, the dtype and whether gradients are needed.

    Returns:
        ``[n, N]`` in the order of the routes, with ``n = T * top_k``.  Differentiable in `a`, `b`, `row_weights` and
        `bias`.

    Raises:
        InvalidInput, InvalidType: shapes, dtypes or devices do not match.
        BackendUnavailable: `backend` cannot take this call.
    """
    quantized = b if isinstance(b, QuantizedWeights) else None
    x, weights, added = modes.in_autocast_dtype(a, data_of(b), bias)
    product = Product(x, weights, layout, top_k, row_weights, added, None, False, transposed, quantized)
    facts = modes.checked(check_product, product, activation)
    if isinstance(facts, modes.Refusal):
        return modes.refuse(facts)[0]
    name, gated, routes, columns = facts
    if quantized is not None:
        refusal = modes.checked(check_inference, False, None, False, x, added, row_weights, *quantized)
        if isinstance(refusal, modes.Refusal):
            return modes.refuse(refusal)[0]
    gradients = modes.forward_mode() or modes.wants_gradient(x, weights, added, row_weights)
    if out is not None:
        refusal = modes.checked(check_out, out, a, routes, columns, gradients)
        if isinstance(refusal, modes.Refusal):
            return modes.refuse(refusal)[0]
    result: Tensor
    path = select_path(x, backend, modes.forward_mode(), layout.block_size)
    product = product._replace(activation=name, gated=gated)
    blocks = (layout.sorted_token_ids, layout.expert_ids, layout.num_tokens_post_padded)
    if quantized is not None:
        result = quantized_operators.run_product(product, backend)
    elif modes.watched(x, weights, added, row_weights, *blocks) or (path == "triton" and gradients):
        operator = operators.product_formula if backend == "packed" else torch.ops.moealign.grouped_gemm
        options = (top_k, layout.block_size, row_weights, added, name, gated, transposed)
        result = modes.call(operator, x, weights, *blocks, *options)
    elif path == "packed":
        result = packed.run_product(product)
    elif out is not None and x is a:
        operators.fill_product(product, out.zero_())
        return out
    else:
        result = operators.run_product(product)
    if out is not None:
        return out.copy_(result)
    return result.to(a.dtype)
