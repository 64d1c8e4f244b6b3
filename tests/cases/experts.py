"""What tests of the experts' computation share: a reference in plain loops, and random layers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

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


def relative_error(got: Tensor, want: Tensor) -> float:
    """``|got - want| / |want|``; NaN is infinitely wrong."""
    error = float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))
    return error if error == error else float("inf")
