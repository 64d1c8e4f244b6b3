"""What tests of the experts' computation share: a reference in plain loops, and random layers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moealign import QuantizedWeights

PLAIN = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def expert_loop(
    x, gate_up, down, weights, ids, *, activation="silu", expert_map=None, valid=None, bias=None, transposed=False
) -> Tensor:
    """One token and one choice at a time, in the dtype of `x`: float64 for a reference."""
    out = torch.zeros_like(x)
    if transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    experts, inner = gate_up.shape[0], down.shape[2]
    for token in range(x.shape[0] if valid is None else min(max(valid, 0), x.shape[0])):
        for weight, expert in zip(weights[token].unbind(), ids[token].tolist(), strict=True):
            if expert_map is not None:
                expert = int(expert_map[expert]) if 0 <= expert < len(expert_map) else -1
            if not 0 <= expert < experts:
                continue
            h = gate_up[expert] @ x[token]
            if bias is not None:
                h = h + bias[0][expert]
            if callable(activation):  # moealign.Gate is one
                h = activation(h[None])[0]
            elif gate_up.shape[1] == 2 * inner:
                h = PLAIN[activation](h[:inner]) * h[inner:]
            else:
                h = PLAIN[activation](h)
            y = down[expert] @ h
            if bias is not None:
                y = y + bias[1][expert]
            out[token] = out[token] + weight * y
    return out


def random_layer(
    tokens, top_k, experts, hidden, inner, *, dtype=torch.float64, gated=True, bias=False, seed=0, transposed=False
):
    """(x, gate_up, down, weights, ids, biases or None), scaled so that outputs are near one."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape, scale=1.0):
        return (torch.randn(shape, generator=g, dtype=torch.float64) * scale).to(dtype)

    x = randn(tokens, hidden)
    gate_up = randn(experts, (2 if gated else 1) * inner, hidden, scale=hidden**-0.5)
    down = randn(experts, hidden, inner, scale=2 * inner**-0.5)
    if transposed:
        gate_up, down = gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    weights = torch.rand(tokens, top_k, generator=g, dtype=torch.float64).to(dtype)
    ids = torch.randint(0, experts, (tokens, top_k), generator=g)
    biases = (randn(experts, (2 if gated else 1) * inner), randn(experts, hidden)) if bias else None
    return x, gate_up, down, weights, ids, biases


class Near(NamedTuple):
    """What a result must be near to: each value, give or take its slack."""

    values: Tensor
    slack: Tensor


def relative_error(got: Tensor, want: Tensor | Near) -> float:
    """``|got - want| / |want|``, where a difference counts beyond its slack; NaN is infinitely wrong."""
    values = want.values if isinstance(want, Near) else want
    difference = got.double() - values.double()
    if isinstance(want, Near):
        difference = (difference.abs() - want.slack).clamp(min=0)  # NaN stays
    error = float(difference.norm() / values.double().norm().clamp(min=1e-30))
    return error if error == error else float("inf")


# ---- quantised weights -------------------------------------------------------------------------------------------

#: (block, activations, whether the static scale is of each expert) of a layer whose gate and up part have `I` columns.
SCHEMES = [
    ((128, 128), "group", False),
    ((128, 128), "row", False),
    ((128, 128), "static", True),
    ((1, 0), "row", False),
    ((1, 0), "group", False),
    ((0, 0), "static", False),
    ((0, 0), "row", False),
    ((20, 0), "static", True),
]


def random_quantized(experts, outputs, depth, scheme=SCHEMES[0], seed=0, scale=1.0) -> QuantizedWeights:
    """Weights with scales of very different sizes, whose products are near `scale`."""
    g = torch.Generator().manual_seed(seed)
    block, activations, of_experts = scheme
    data = (torch.randn(experts, outputs, depth, generator=g) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    shape = [experts, -(-outputs // (block[0] or outputs)), -(-depth // (block[1] or depth))]
    scales = (torch.rand(shape, generator=g) + 0.1) * (0.02 * scale * depth**-0.5)
    static = None
    if activations == "static":  # so small that some values are cut off
        static = torch.rand(experts if of_experts else 1, generator=g) * 0.003 + 0.004
    return QuantizedWeights(data, scales, block, activations, static)


def codes_of(values: Tensor, scale: Tensor, change: float = 0.0) -> Tensor:
    """The e4m3 values, as float64, of quotients that are larger by a factor ``1 + change``."""
    return (values / scale * (1 + change)).clamp(-448, 448).to(torch.float8_e4m3fn).double()


def quantized_product(row: Tensor, weights: QuantizedWeights, expert: int, rounding: float = 0.0) -> Near:
    """``[K]`` to ``[N]``, float64: quantise, multiply, apply the scales.

    A path that computed `row` up to a relative error of `rounding` may round a value to its neighbour in e4m3, a change
    of up to an eighth: the slack is what that can add up to.
    """
    data, scales, (outputs, inputs), activations, static = weights
    count, depth = data.shape[1:]
    columns = torch.arange(depth) // (inputs or depth)
    of_weights = scales[expert][torch.arange(count) // (outputs or count)][:, columns].double()
    width = 128 if activations == "group" else depth
    total, slack = torch.zeros(2, count, dtype=torch.float64)
    for start in range(0, depth, width):
        part = row[start : start + width].float()
        if static is not None:
            scale = static[expert if static.numel() > 1 else 0]
        else:
            scale = part.abs().max().clamp(min=1e-10) / 448
        kept = slice(start, start + width)
        matrix = data[expert, :, kept].double() * of_weights[:, kept] * scale.double()
        total += matrix @ codes_of(part, scale)
        if rounding:
            steps = codes_of(part, scale, rounding) - codes_of(part, scale, -rounding)
            slack += matrix.abs() @ steps.abs()
    return Near(total, slack)


#: How far apart, relatively, two paths may compute the activated rows of a layer, by the dtype of the rows.
ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def quantized_loop(
    x, gate_up, down, weights, ids, *, activation="silu", expert_map=None, valid=None, bias=None
) -> Near:
    """:func:`expert_loop` with quantised weights: ``[T, H]``, float64.  The activated rows have the dtype of `x`."""
    out, slack = torch.zeros(2, *x.shape, dtype=torch.float64)
    experts, inner = gate_up.data.shape[0], down.data.shape[2]
    for token in range(x.shape[0] if valid is None else valid):
        for weight, expert in zip(weights[token].double().unbind(), ids[token].tolist(), strict=True):
            if expert_map is not None:
                expert = int(expert_map[expert]) if 0 <= expert < len(expert_map) else -1
            if not 0 <= expert < experts:
                continue
            h = quantized_product(x[token], gate_up, expert).values
            if bias is not None:
                h = h + bias[0][expert].double()
            if callable(activation):
                h = activation(h[None])[0]
            elif len(h) == 2 * inner:
                h = PLAIN[activation](h[:inner]) * h[inner:]
            else:
                h = PLAIN[activation](h)
            y, near = quantized_product(h.to(x.dtype), down, expert, ROUNDING[x.dtype])
            if bias is not None:
                y = y + bias[1][expert].double()
            out[token] += weight * y
            slack[token] += weight.abs() * near
    return Near(out, slack)
