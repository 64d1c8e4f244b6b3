"""The FP8 weights of an engine's layer as :class:`moealign.QuantizedWeights`: views of what the engine holds."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..errors import InvalidInput
from ..experts.quantized import GROUP, QuantizedWeights

__all__ = ["refuses_scheme", "weights_of"]


def refuses_scheme(block_shape: Sequence[int] | None, by_row: bool, static: bool) -> str | None:
    """Why weights with these scales are the engine's; None if we have the same.

    Args:
        block_shape: outputs and inputs of weights that share a scale; None for a scale of an expert or of an output.
        by_row: each row of activations has a scale.
        static: activations have a scale from the checkpoint.
    """
    if block_shape is not None and list(block_shape) != [GROUP, GROUP]:
        return f"expected FP8 in blocks of {GROUP} x {GROUP}, got {' x '.join(map(str, block_shape))}"
    if block_shape is None and not by_row and not static:
        return "expected FP8 with static scales or scales of rows, got dynamic scales of a whole batch"
    return None


def weights_of(
    data: Tensor, scales: Tensor | None, static: Tensor | None, block_shape: Sequence[int] | None, by_row: bool
) -> QuantizedWeights:
    """The weights of one product.

    Args:
        data: ``[E, N, K]``, e4m3.
        scales: ``[E, cdiv(N, 128), cdiv(K, 128)]`` with a `block_shape`; else of each expert or of each output.
        static: the scale of activations from the checkpoint, if there is one.

    Raises:
        InvalidInput: the scheme is one that :func:`refuses_scheme` names, or `scales` do not fit `data`.
    """
    reason = refuses_scheme(block_shape, by_row, static is not None)
    if reason is not None:
        raise InvalidInput(reason)
    if scales is None:
        raise InvalidInput("scales: expected those of FP8 weights, got none")
    if block_shape is not None:
        return QuantizedWeights(data, scales)
    experts, outputs, _ = data.shape
    if scales.numel() not in (experts, experts * outputs):
        raise InvalidInput(f"scales: expected one an expert or one an output, got {list(scales.shape)}")
    of_outputs = scales.numel() > experts
    scheme = ("row", None) if by_row else ("static", static)
    return QuantizedWeights(data, scales.reshape(experts, -1, 1), (1, 0) if of_outputs else (0, 0), *scheme)
