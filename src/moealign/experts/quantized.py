"""Weights in FP8: what they consist of, and their arithmetic in torch.

The arithmetic is that of ``docs/contract.md``: rows are quantised first, products of e4m3 values are summed in
float32, and scales are applied to the sums.  e4m3 holds ``+-448``, NaN and no infinity.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layout import cdiv

__all__ = ["GROUP", "SCHEMES", "QuantizedWeights", "data_of", "dequantize", "multiply", "quantize_rows", "scales_shape"]

#: The largest finite value of e4m3.
MAX = 448.0
#: A row whose values are all smaller than this is quantised as if its largest one were this.
MIN_AMAX = 1e-10
#: Columns of a row that share a scale with ``activations="group"``, and the only depth of a block of weights but all.
GROUP = 128
SCHEMES = ("group", "row", "static")


class QuantizedWeights(NamedTuple):
    """The weights of experts in FP8, and how their rows are quantised: what :func:`moealign.fused_moe` and
    :func:`moealign.grouped_gemm` take in place of a tensor.

    ``weight[e, n, k] = data[e, n, k] * scales[e, n // block[0], k // block[1]]``

    =====================================  ====================================================================
    ``block=(128, 128)``                   DeepSeek, Qwen and GLM checkpoints: ``weight`` and ``weight_scale_inv``
    ``block=(1, 0), activations="row"``    a scale per output channel
    ``block=(0, 0)``                       a scale per expert
    ``block=(I, 0)``                       of ``gate_up_proj``: one for the gate, one for the up part
    =====================================  ====================================================================

    Calls check the fields, as those of every other argument.

    Args:
        data: ``[E, N, K]``, ``torch.float8_e4m3fn``; K has stride 1.
        scales: float32, ``[E, cdiv(N, block[0]), cdiv(K, block[1])]``.
        block: outputs and inputs that share a scale; 0 stands for all of them.  The second is 128 or 0.
        activations: which values of a row share a scale: ``group``, 128 columns; ``row``, all; ``static``, all rows,
            by `activation_scale`.  The first two are the largest absolute value of the row or group divided by 448.
        activation_scale: float32 with one element, or ``[E]``; of ``static``.  Values beyond 448 times the scale are
            cut off there.
    """

    data: Tensor
    scales: Tensor
    block: tuple[int, int] = (128, 128)
    activations: str = "group"
    activation_scale: Tensor | None = None


def data_of(weights: Tensor | QuantizedWeights) -> Tensor:
    """The weights without their scales."""
    return weights.data if isinstance(weights, QuantizedWeights) else weights


def scales_shape(data: Tensor, block: tuple[int, int]) -> list[int]:
    """The shape of the scales of `data` ``[E, N, K]``."""
    experts, outputs, depth = data.shape
    return [experts, cdiv(outputs, block[0] or max(outputs, 1)), cdiv(depth, block[1] or max(depth, 1))]


def quantize_rows(rows: Tensor, activations: str, static: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``[R, K]`` rows as e4m3 ``[R, K]``, and their float32 scales ``[R, cdiv(K, 128)]`` or ``[R, 1]``.

    Args:
        static: the scale of ``static``, one element.
    """
    count, depth = rows.shape
    values = rows.to(torch.float32)
    width = GROUP if activations == "group" else max(depth, 1)
    if activations == "static":
        assert static is not None
        scales = static.reshape(1, 1).expand(count, 1)
    else:
        groups = cdiv(depth, width)
        parts = F.pad(values, (0, groups * width - depth)).view(count, groups, width)
        largest = parts.abs().amax(2).clamp(min=MIN_AMAX)
        scales = largest / torch.full_like(largest, MAX)  # CUDA multiplies by the inverse of a number
    quotients = values / _spread(scales, 1, width, depth)
    return quotients.clamp(-MAX, MAX).to(torch.float8_e4m3fn), scales


def dequantize(weights: QuantizedWeights, expert: int) -> Tensor:
    """The weights of one expert, float32 ``[N, K]``."""
    data = weights.data[expert].to(torch.float32)
    scales = weights.scales[expert]
    for axis, (size, length) in enumerate(zip(weights.block, data.shape, strict=True)):
        scales = _spread(scales, axis, size or max(length, 1), length)
    return data * scales


def _spread(scales: Tensor, axis: int, size: int, length: int) -> Tensor:
    """`scales` of blocks of `size` as scales of `length` elements along `axis`."""
    return scales.repeat_interleave(size, axis).narrow(axis, 0, length)


def multiply(rows: Tensor, weights: QuantizedWeights, spans: list[tuple[int, int, int]]) -> Tensor:
    """The product of ``[R, K]`` rows with their expert's weights, float32 ``[R, N]``; one expert at a time.

    Args:
        spans: (expert, first row, end) of each expert with rows; all other rows give zeros.
    """
    out = rows.new_zeros(rows.shape[0], weights.data.shape[1], dtype=torch.float32)
    width = GROUP if weights.activations == "group" else max(rows.shape[1], 1)
    for expert, start, end in spans:
        static = weights.activation_scale
        if static is not None and static.numel() > 1:
            static = static[expert]
        data, scales = quantize_rows(rows[start:end], weights.activations, static)
        left = data.to(torch.float32) * _spread(scales, 1, width, rows.shape[1])
        torch.mm(left, dequantize(weights, expert).T, out=out[start:end])
    return out
