# mypy: disable-error-code="no-untyped-def"
"""The activations in the epilogue of a product, in Triton.  Imported at the first launch."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["activate", "gated", "tanh"]

# The activations, as `ACT` of a kernel.
NONE = tl.constexpr(0)
SILU = tl.constexpr(1)
GELU = tl.constexpr(2)
GELU_TANH = tl.constexpr(3)
RELU = tl.constexpr(4)
RELU2 = tl.constexpr(5)
SITU = tl.constexpr(6)
# The constants of a gate (activations.Gate), as `GATE` of a kernel: limit or None, whether that is of the activation's
# value, alpha, offset, beta, linear_beta or None, and whether gate and up are neighbouring columns instead of halves.
LIMIT = tl.constexpr(0)
LIMIT_AFTER = tl.constexpr(1)
ALPHA = tl.constexpr(2)
OFFSET = tl.constexpr(3)
BETA = tl.constexpr(4)
LINEAR_BETA = tl.constexpr(5)
INTERLEAVED = tl.constexpr(6)


@triton.jit
def tanh(x):
    """In float32, to a few units in the last place: a series near zero, where the formula cancels."""
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    far = tl.where(x < 0, -far, far)
    y = x * x
    series = 0.13333333333333333 + y * (-0.05396825396825397 + y * 0.0218694885361552)
    near = x + x * y * (-0.3333333333333333 + y * series)
    return tl.where(tl.abs(x) < 0.25, near, far)


@triton.jit
def activate(x, ACT: tl.constexpr, GATE: tl.constexpr):
    """The activation of a block of any shape, in float32."""
    if ACT == SILU:
        if GATE[ALPHA] == 1:
            x = x / (1 + tl.exp(-x))
        else:
            x = x / (1 + tl.exp(-GATE[ALPHA] * x))
    elif ACT == GELU:
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACT == GELU_TANH:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = x * (1 / (1 + tl.exp(-2 * inner)))  # (1 + tanh(y)) / 2
    elif ACT == RELU:
        x = tl.maximum(x, 0.0)
    elif ACT == RELU2:
        x = tl.maximum(x, 0.0)
        x = x * x
    elif ACT == SITU:
        x = GATE[BETA] * tanh(x / GATE[BETA]) / (1 + tl.exp(-x))
    return x


@triton.jit
def gated(x, up, ACT: tl.constexpr, GATE: tl.constexpr):
    """The activation of a gate, times its up part, in float32."""
    if GATE[LIMIT] is not None:
        if not GATE[LIMIT_AFTER]:
            x = tl.minimum(x, GATE[LIMIT], propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(up, -GATE[LIMIT], GATE[LIMIT], propagate_nan=tl.PropagateNan.ALL)
    x = activate(x, ACT, GATE)
    if GATE[LIMIT] is not None and GATE[LIMIT_AFTER]:
        x = tl.minimum(x, GATE[LIMIT], propagate_nan=tl.PropagateNan.ALL)
    if GATE[LINEAR_BETA] is not None:
        up = GATE[LINEAR_BETA] * tanh(up / GATE[LINEAR_BETA])
    if GATE[OFFSET] != 0:
        up += GATE[OFFSET]
    return x * up
