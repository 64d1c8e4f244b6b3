"""The packed path's operators ``torch.ops.moealign.*``: schemas, fakes, formulas, gradients and FLOPs.

Each is linear in every floating tensor, so its gradients are these operators again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import modes
from . import packed

__all__: list[str] = []

_library = torch.library.Library("moealign", "FRAGMENT")

_library.define("gather_rows(Tensor source, Tensor routes, Tensor positions, SymInt top_k, bool blank) -> Tensor")
_library.define("scatter_rows(Tensor rows, Tensor routes, Tensor positions) -> Tensor")
_library.define("grouped_mm(Tensor rows, Tensor weights, Tensor ends, bool transposed=False) -> Tensor")
_library.define("grouped_mm_weights(Tensor grads, Tensor rows, Tensor ends, SymInt experts) -> Tensor")


def _gather(source: Tensor, routes: Tensor, positions: Tensor, top_k: int, blank: bool) -> Tensor:
    """With `blank`, rows of the sentinel are zero."""
    rows = packed.gather(source, routes, positions, top_k)
    return rows.masked_fill_((routes >= positions.shape[0]).unsqueeze(1), 0) if blank else rows


def _gather_fake(source: Tensor, routes: Tensor, positions: Tensor, top_k: int, blank: bool) -> Tensor:
    return source.new_empty(routes.shape[0], source.shape[1])


def _gather_formula(source: Tensor, routes: Tensor, positions: Tensor, top_k: int, blank: bool) -> Tensor:
    """Rows of the sentinel are always zero: otherwise the last token would receive their gradients."""
    rows = packed.gather(source, routes, positions, top_k)
    return rows.masked_fill((routes >= positions.shape[0]).unsqueeze(1), 0)


def _gather_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    source, routes, positions, ctx.top_k, _ = inputs
    ctx.tokens = source.shape[0]
    ctx.save_for_backward(routes, positions)


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    routes, positions = ctx.saved_tensors
    rows = packed.scatter_rows(grad, routes, positions)
    if ctx.top_k != 1:
        rows = rows.view(ctx.tokens, ctx.top_k, grad.shape[1]).sum(1)
    return rows, None, None, None, None


def _scatter_fake(rows: Tensor, routes: Tensor, positions: Tensor) -> Tensor:
    return rows.new_empty(positions.shape[0], rows.shape[1])


def _scatter_formula(rows: Tensor, routes: Tensor, positions: Tensor) -> Tensor:
    return rows.index_select(0, positions.clamp(min=0)).masked_fill((positions < 0).unsqueeze(1), 0)


def _scatter_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    routes, positions = ctx.saved_tensors
    return modes.call(torch.ops.moealign.gather_rows, grad, routes, positions, 1, True), None, None


def _mm_fake(rows: Tensor, weights: Tensor, ends: Tensor, transposed: bool = False) -> Tensor:
    return rows.new_empty(rows.shape[0], weights.shape[2 if transposed else 1])


def _mm_formula(rows: Tensor, weights: Tensor, ends: Tensor, transposed: bool = False) -> Tensor:
    right = weights if transposed else weights.transpose(-2, -1)
    experts = weights.shape[0]
    if not modes.readable(ends):  # multiply every row by every expert
        masked = _rows_by_expert(rows, ends, experts)
        return torch.stack([masked[expert] @ right[expert] for expert in range(experts)]).sum(0)
    parts, last = [], 0
    for expert, start, end in packed.spans(ends, experts, rows.shape[0]):
        parts.append(rows[start:end] @ right[expert])
        last = end
    rest = torch.zeros(rows.shape[0] - last, right.shape[-1], dtype=rows.dtype, device=rows.device)
    return torch.cat([*parts, rest])


def _mm_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weights, ends, ctx.transposed = (*inputs, False)[:4]
    ctx.save_for_backward(rows, weights, ends)


def _mm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, weights, ends = ctx.saved_tensors
    grad = grad.contiguous()
    to_rows = to_weights = None
    if ctx.needs_input_grad[0]:
        to_rows = packed.grouped_mm(grad, weights, ends, not ctx.transposed)
    if ctx.needs_input_grad[1]:
        left, right = (rows, grad) if ctx.transposed else (grad, rows)
        to_weights = modes.call(torch.ops.moealign.grouped_mm_weights, left, right, ends, weights.shape[0])
    return to_rows, to_weights, None, None


def _mm_weights_fake(grads: Tensor, rows: Tensor, ends: Tensor, experts: int) -> Tensor:
    return rows.new_empty(experts, grads.shape[1], rows.shape[1])


def _mm_weights_formula(grads: Tensor, rows: Tensor, ends: Tensor, experts: int) -> Tensor:
    return torch.stack([masked.transpose(0, 1) @ rows for masked in _rows_by_expert(grads, ends, experts)])


def _mm_weights_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _mm_weights_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads, rows, ends = ctx.saved_tensors
    grad = grad.contiguous()
    to_grads = packed.grouped_mm(rows, grad, ends) if ctx.needs_input_grad[0] else None
    to_rows = packed.grouped_mm(grads, grad, ends, True) if ctx.needs_input_grad[1] else None
    return to_grads, to_rows, None, None


def _rows_by_expert(tensor: Tensor, ends: Tensor, experts: int) -> list[Tensor]:
    """A copy of `tensor` for each expert, with zeros in the rows of the others."""
    numbers = torch.arange(tensor.shape[0], dtype=ends.dtype, device=ends.device)
    copies, start = [], torch.zeros_like(ends[0])
    for expert in range(experts):
        end = ends[expert]
        copies.append(tensor.masked_fill(((numbers < start) | (numbers >= end)).unsqueeze(1), 0))
        start = end
    return copies


_OPERATORS: dict[str, tuple[Callable[..., Any], ...]] = {
    "gather_rows": (_gather, _gather_fake, _gather_formula, _gather_save, _gather_backward),
    "scatter_rows": (packed.scatter, _scatter_fake, _scatter_formula, _scatter_save, _scatter_backward),
    "grouped_mm": (packed.grouped_mm_eager, _mm_fake, _mm_formula, _mm_save, _mm_backward),
    "grouped_mm_weights": (
        packed.grouped_mm_weights_eager,
        _mm_weights_fake, _mm_weights_formula, _mm_weights_save, _mm_weights_backward,
    ),
}  # fmt: skip
for _name, (_kernel, _fake, _formula, _save, _backward) in _OPERATORS.items():
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moealign::{_name}", _fake, lib=_library)
    modes.differentiable(_library, _name, _formula, _save, _backward)
    modes.batched(_library, _name)

modes.flops("grouped_mm", lambda rows, weights, *_, **__: 2 * rows[0] * math.prod(weights[1:]))
modes.flops("grouped_mm_weights", lambda grads, rows, *_, **__: 2 * math.prod(grads) * rows[1])
