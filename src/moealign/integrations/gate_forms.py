"""Which :class:`moealign.Gate` an experts module's own ``_apply_gate`` computes, by a check on random rows.

Candidates are made of the numbers that the module and its activation hold.  One is taken if it gives the module's own
values and gradients on flat, ordinary and large rows; names of classes play no part.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..experts.activations import Gate

__all__ = ["fused_gate", "numbers_of"]

_COLUMNS = 16
_SCALES = (0.3, 3.0, 40.0)  # of the rows: within every limit, near it, past it
_TOLERANCE = 1e-5
_MOST = 64  # entries of the cache
_known: dict[Any, Gate | None] = {}


def fused_gate(module: Any, activation: str | None) -> Gate | None:
    """The gate that `module` computes, or None.  `activation` is the name of its ``act_fn``, if that has one.

    Inside torch.compile only gates are known that an eager call has found before.
    """
    own = vars(module).get("_apply_gate", getattr(type(module), "_apply_gate", None))
    numbers, interleaved = numbers_of(module), not getattr(module, "is_concatenated", True)
    key = (own, activation, numbers, interleaved)
    if key in _known or torch.compiler.is_compiling():
        return _known.get(key)
    if len(_known) >= _MOST:
        _known.clear()
    _known[key] = _find(module._apply_gate, _candidates(numbers, activation, interleaved))
    return _known[key]


def numbers_of(module: Any) -> tuple[tuple[str, float], ...]:
    """The positive finite numbers that `module` and the modules of its activation hold, by name."""
    function = vars(module).get("act_fn", None) or getattr(module, "act_fn", None)
    holders = [module, *(function.modules() if isinstance(function, nn.Module) else ())]
    found = []
    for holder in holders:
        for name, value in vars(holder).items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf:
                found.append((name, float(value)))
    return tuple(found)


def _candidates(numbers: tuple[tuple[str, float], ...], activation: str | None, interleaved: bool) -> Iterator[Gate]:
    def named(*parts: str) -> list[float]:
        return list(dict.fromkeys(value for name, value in numbers if any(part in name for part in parts)))

    limits: list[float | None] = [None, *named("limit", "clamp")]
    for limit, alpha, offset in itertools.product(limits, [1.0, *named("alpha")], (0.0, 1.0)):
        name = "silu" if alpha != 1 else activation or "silu"
        yield Gate(name, limit, False, alpha, offset, interleaved=interleaved)
        if limit is not None:
            yield Gate(name, limit, True, alpha, offset, interleaved=interleaved)
    caps = named("cap", "beta")
    for beta, linear_beta in itertools.product(caps, [None, *caps]):
        yield Gate("situ", beta=beta, linear_beta=linear_beta, interleaved=interleaved)


def _find(own: Any, candidates: Iterator[Gate]) -> Gate | None:
    """The first candidate with the values and gradients of `own`."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        noise = torch.Generator("cpu").manual_seed(11)
        rows = torch.cat([torch.randn(32, 2 * _COLUMNS, generator=noise, device="cpu") * scale for scale in _SCALES])
        factor = torch.randn(len(rows), _COLUMNS, generator=noise, device="cpu")
        try:
            want = _values(own, rows, factor)
        except Exception:  # its forward needs other rows, or the module's parameters
            return None
        if want is None:
            return None
        for gate in candidates:
            got = _values(gate, rows, factor)
            assert got is not None
            if all(_close(one, other) for one, other in zip(got, want, strict=True)):
                return gate
    return None


def _values(function: Any, rows: Tensor, factor: Tensor) -> tuple[Tensor, Tensor] | None:
    """The values of a gate and its gradient; None if it has others."""
    leaf = rows.clone().requires_grad_()
    out = function(leaf)
    if not isinstance(out, Tensor) or out.shape != factor.shape or not out.requires_grad:
        return None
    return out.detach(), torch.autograd.grad((out.float() * factor).sum(), leaf)[0]


def _close(got: Tensor, want: Tensor) -> bool:
    return bool(((got - want).abs() <= _TOLERANCE * (1 + want.abs())).all())
