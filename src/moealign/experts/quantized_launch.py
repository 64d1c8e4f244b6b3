"""What a launch of the kernel `gemm` is given for FP8 weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layout import cdiv
from .quantized import GROUP, SCHEMES, QuantizedWeights
from .records import Product
from .tiles import Target, Tile

__all__ = ["QuantizedRows", "Scaling", "needs_pass", "quantizes_result", "scaling"]

#: What rows may be rounded to before they are quantised, as `RESULT_DTYPE` of a kernel.
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Scaling(NamedTuple):
    """Arguments of the kernel `gemm`."""

    weights: Tensor  #: [E, N, K]; bytes where the GPU has no e4m3
    arguments: tuple[Any, ...] = (None, None, None, 0, 0, 0)  #: scales of rows, weights and result, and strides
    constants: tuple[Any, ...] | None = None  #: `SCALING`


class QuantizedRows(NamedTuple):
    """Rows as a product with FP8 weights reads them."""

    values: Tensor  #: [rows, K], e4m3 or, where the GPU has none, float16
    scales: Tensor | None  #: float32 [rows, cdiv(K, 128)] or [rows, 1]; None with a static scale
    dtype: torch.dtype  #: of the rows that are quantised
    weights: QuantizedWeights  #: of that product

    @classmethod
    def empty(cls, target: Target, weights: QuantizedWeights, count: int, depth: int, like: Tensor) -> QuantizedRows:
        """Room for ``[count, depth]`` rows of the dtype of `like`, on its device."""
        values = like.new_empty(count, depth, dtype=torch.float8_e4m3fn if target.fp8 else torch.float16)
        scales = None
        if weights.activation_scale is None:
            groups = 1 if weights.activations == "row" else cdiv(depth, GROUP)
            scales = like.new_empty(count, groups, dtype=torch.float32)
        return cls(values, scales, like.dtype, weights)


def needs_pass(weights: QuantizedWeights | None) -> bool:
    """Whether rows are quantised before the product.  Only where an expert has its own static scale do tiles quantise
    what they load: a token's values then differ from expert to expert."""
    return weights is not None and (weights.activation_scale is None or weights.activation_scale.numel() == 1)


def quantizes_result(tile: Tile, weights: QuantizedWeights | None) -> bool:
    """Whether the tiles of a layer's first product quantise its result for the second product's `weights`, so that no
    pass does: those that hold whole groups."""
    return weights is not None and needs_pass(weights) and weights.activations != "row" and tile.n % GROUP == 0


def scaling(
    target: Target,
    product: Product,
    width: int,
    halves: bool,
    row_scales: Tensor | None,
    result: QuantizedRows | None = None,
) -> Scaling:
    """The arguments that follow from the weights of `product`.

    Args:
        width: columns of a product of tiles.
        halves: whether a tile is multiplied with two parts of an expert's weights, the gate's and the up part's.
        row_scales: those of quantised rows, ``[rows, cdiv(K, 128)]`` or ``[rows, 1]``; None with a static scale, and of
            other rows.
        result: what the tiles fill, if they quantise it.
    """
    quantized = product.quantized
    if quantized is None:
        return Scaling(product.b)
    outputs = product.b.shape[1]
    size = 0 if quantized.block[0] >= outputs else quantized.block[0]
    one_scale = size == 0 or (size % width == 0 and (not halves or outputs // 2 % width == 0))
    stride = 0 if row_scales is None else row_scales.shape[1]
    if quantized.activation_scale is not None:
        row_scales = quantized.activation_scale.reshape(-1).contiguous()
        stride = int(row_scales.numel() > 1)
    scales = quantized.scales.contiguous()
    by = SCHEMES.index(quantized.activations)
    result_scales, result_by, result_dtype = None, None, None
    if result is not None:
        result_scales = result.weights.activation_scale if result.scales is None else result.scales
        result_by, result_dtype = SCHEMES.index(result.weights.activations), _DTYPES.index(result.dtype)
    constants = (target.fp8, by, needs_pass(quantized), size, quantized.block[1] == GROUP, one_scale)
    return Scaling(
        product.b if target.fp8 else product.b.view(torch.uint8),
        (row_scales, scales, result_scales, stride, scales.stride(0), scales.stride(1)),
        (*constants, result_by, result_dtype),
    )
