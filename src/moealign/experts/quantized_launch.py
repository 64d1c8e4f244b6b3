"""What a launch of the kernel `gemm` is given for FP8 weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .quantized import GROUP, SCHEMES
from .records import Product
from .tiles import Target

__all__ = ["Scaling", "needs_pass", "scaling"]


class Scaling(NamedTuple):
    """Arguments of the kernel `gemm`."""

    weights: Tensor  #: [E, N, K]; bytes where the GPU has no e4m3
    arguments: tuple[Any, ...] = (None, None, 0, 0, 0)  #: scales of rows and weights, and their strides
    constants: tuple[Any, ...] | None = None  #: `SCALING`


def needs_pass(product: Product) -> bool:
    """Whether a pass quantises the rows before the product.  Only where an expert has its own static scale do tiles
    quantise what they load: a token's values then differ from expert to expert."""
    quantized = product.quantized
    return quantized is not None and (quantized.activation_scale is None or quantized.activation_scale.numel() == 1)


def scaling(target: Target, product: Product, width: int, halves: bool, row_scales: Tensor | None) -> Scaling:
    """The arguments that follow from the weights of `product`.

    Args:
        width: columns of a product of tiles.
        halves: whether a tile is multiplied with two parts of an expert's weights, the gate's and the up part's.
        row_scales: those of a pass, ``[rows, cdiv(K, 128)]`` or ``[rows, 1]``; None without one or with a static scale.
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
    return Scaling(
        product.b if target.fp8 else product.b.view(torch.uint8),
        (row_scales, scales, stride, scales.stride(0), scales.stride(1)),
        (target.fp8, by, needs_pass(product), size, quantized.block[1] == GROUP, one_scale),
    )
