"""The activations that kernels compute in a product's epilogue: what they are called, and what they are in torch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InvalidInput, InvalidType

__all__ = ["PLAIN", "Gate", "Rows", "function_of", "names", "parse"]

#: A function that treats each row by itself.
Rows = Callable[[Tensor], Tensor]

PLAIN: dict[str, Rows] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda rows: F.gelu(rows, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda rows: F.relu(rows).square(),
}


@dataclass(frozen=True)
class Gate:
    """A gate with constants: ``act(g) * (u + offset)`` of the gate ``g`` and the up part ``u`` of a row.

    ==================================================  ==============================================================
    ``Gate(limit=7.0)``                                 clamped SwiGLU: DeepSeek-V4, GLM-5, HunYuan-4
    ``Gate(limit=7.0, alpha=1.702, offset=1.0)``        MiniMax-M3; with ``interleaved=True`` gpt-oss
    ``Gate(limit=7.0, limit_after=True)``               Step-3.7
    ``Gate("situ")``                                    Kimi-K3
    ==================================================  ==============================================================

    Args:
        activation: ``silu``, which is ``x * sigmoid(alpha * x)``, ``gelu``, ``gelu_tanh``, ``relu``, ``relu2``, or
            ``situ``, which is ``beta * tanh(x / beta) * sigmoid(x)`` with ``linear_beta * tanh(u / linear_beta)`` in
            place of ``u``.
        limit: ``min(g, limit)`` in place of ``g``, and ``u`` clamped to ``[-limit, limit]``.
        limit_after: ``min(act(g), limit)`` instead of ``act(min(g, limit))``.
        alpha: of ``silu``.
        offset: added to the clamped ``u``.
        beta, linear_beta: of ``situ``; without `linear_beta`, ``u`` stays as it is.
        interleaved: columns ``2 j`` and ``2 j + 1`` are gate and up of column ``j``, instead of two halves.

    Raises:
        InvalidInput, InvalidType: a constant is not finite, not positive where it must be, or does not go with the
            activation.
    """

    activation: str = "silu"
    limit: float | None = None
    limit_after: bool = False
    alpha: float = 1.0
    offset: float = 0.0
    beta: float = 4.0
    linear_beta: float | None = 25.0
    interleaved: bool = False
    text: str = field(init=False, repr=False, compare=False, default="")  #: for operators, whose arguments are strings

    def __post_init__(self) -> None:
        if self.activation not in PLAIN and self.activation != "situ":
            raise InvalidInput(f"activation: expected one of {', '.join((*PLAIN, 'situ'))}, got {self.activation!r}")
        for name in ("limit", "alpha", "offset", "beta", "linear_beta"):
            value = getattr(self, name)
            if value is None and name in ("limit", "linear_beta"):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise InvalidType(f"{name}: expected a float, got {type(value).__name__}")
            if not math.isfinite(value) or (value <= 0 and name != "offset"):
                raise InvalidInput(f"{name}: expected a finite number{' above 0' * (name != 'offset')}, got {value}")
            object.__setattr__(self, name, float(value))
        for name in ("limit_after", "interleaved"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidType(f"{name}: expected True or False, got {type(getattr(self, name)).__name__}")
        if self.alpha != 1 and self.activation != "silu":
            raise InvalidInput(f"alpha: expected activation='silu' together with it, got {self.activation!r}")
        if self.limit_after and self.limit is None:
            raise InvalidInput("limit_after: expected a limit together with it, got none")
        object.__setattr__(self, "text", f"{_MARK}{self.activation};" + ";".join(map(repr, self.constants)))

    @property
    def constants(self) -> tuple[float | bool | None, ...]:
        """What kernels are compiled for, in the order of `GATE` in activation_kernels.py."""
        situ = self.activation == "situ"
        beta, linear_beta = (self.beta, self.linear_beta) if situ else (1.0, None)
        return (self.limit, self.limit_after, self.alpha, self.offset, beta, linear_beta, self.interleaved)

    def __call__(self, rows: Tensor) -> Tensor:
        """In torch: ``[rows, 2I]`` to ``[rows, I]``."""
        gate, up = (rows[..., ::2], rows[..., 1::2]) if self.interleaved else rows.chunk(2, dim=-1)
        if self.limit is not None:
            gate = gate if self.limit_after else gate.clamp(max=self.limit)
            up = up.clamp(min=-self.limit, max=self.limit)
        if self.activation == "situ":
            value = self.beta * torch.tanh(gate / self.beta) * torch.sigmoid(gate)
            if self.linear_beta is not None:
                up = self.linear_beta * torch.tanh(up / self.linear_beta)
        elif self.alpha != 1:
            value = gate * torch.sigmoid(self.alpha * gate)
        else:
            value = PLAIN[self.activation](gate)
        if self.limit is not None and self.limit_after:
            value = value.clamp(max=self.limit)
        return value * (up + self.offset) if self.offset else value * up


_MARK = "gate:"
#: `constants` of a plain activation.
NO_CONSTANTS: tuple[float | bool | None, ...] = (None, False, 1.0, 0.0, 1.0, None, False)


@functools.lru_cache(maxsize=64)
def parse(activation: str) -> str | Gate:
    """The activation that an operator was given: a plain name, or the gate with this `text`."""
    if not activation.startswith(_MARK):
        return activation
    name, *parts = activation.removeprefix(_MARK).split(";")
    values = [{"None": None, "True": True, "False": False}.get(part, part) for part in parts]
    limit, after, alpha, offset, beta, linear_beta, interleaved = (
        float(value) if isinstance(value, str) else value for value in values
    )
    options = {} if name != "situ" else {"beta": beta, "linear_beta": linear_beta}
    return Gate(name, limit, bool(after), alpha, offset, interleaved=bool(interleaved), **options)  # type: ignore[arg-type]


def function_of(activation: str | Gate, gated: bool) -> Rows:
    """An activation in torch: from ``[rows, 2I]`` or, without a gate, ``[rows, I]`` to ``[rows, I]``.

    Raises:
        KeyError: there is none of that name.
    """
    if isinstance(activation, str) and activation.startswith(_MARK):
        activation = parse(activation)
    if isinstance(activation, Gate):
        return activation
    return _GATED[activation] if gated else PLAIN[activation]


def _gated(function: Rows) -> Rows:
    def apply(rows: Tensor) -> Tensor:
        gate, up = rows.chunk(2, dim=-1)
        return function(gate) * up

    return apply


_GATED = {name: _gated(function) for name, function in PLAIN.items()}


def names() -> str:
    """The plain names, for messages."""
    return ", ".join(sorted(PLAIN))
