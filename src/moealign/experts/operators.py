"""The experts' operators ``torch.ops.moealign.*``: schemas, fakes, formulas, gradients and FLOPs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import modes
from ..layout import BlockLayout
from . import launch, packed
from .checks import select_path
from .records import ExpertWeights, Product, Routes, product_columns
from .tiles import select_tiles

__all__ = ["fill_product", "is_empty", "product_formula", "run_layer", "run_product"]

_library = torch.library.Library("moealign", "FRAGMENT")


# ---- fused_moe -------------------------------------------------------------------------------------------------------

_library.define(
    "fused_moe(Tensor hidden_states, Tensor gate_up_proj, Tensor down_proj, Tensor topk_weights, Tensor topk_ids, "
    "Tensor? expert_map, Tensor? num_valid_tokens, str activation, Tensor? gate_up_bias, Tensor? down_bias, "
    "bool transposed, int? block_size) -> Tensor"
)


def is_empty(hidden_states: Tensor, weights: ExpertWeights, routes: Routes) -> bool:
    """Whether there is nothing to launch a kernel for."""
    sizes = (routes.ids.numel(), hidden_states.shape[1], weights.gate_up.numel(), weights.down.numel())
    return 0 in sizes


def run_layer(
    hidden_states: Tensor, weights: ExpertWeights, routes: Routes, activation: str, block_size: int | None
) -> Tensor:
    """A layer of experts on plain tensors, ``[T, H]``."""
    if launch.refuses(hidden_states) is not None or is_empty(hidden_states, weights, routes):
        return packed.run_layer(hidden_states, weights, routes, packed.ACTIVATIONS[activation, weights.gated])
    tiles = select_tiles(hidden_states, weights, routes, block_size)
    layout = routes.layout(tiles.block_size, weights.experts) if tiles.block_size else None
    return launch.run_layer(tiles, hidden_states, weights, routes, layout, activation)


def _records(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    num_valid_tokens: Tensor | None,
    activation: str,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    transposed: bool,
    block_size: int | None,
) -> tuple[Tensor, ExpertWeights, Routes, str, int | None]:
    """The arguments of :func:`run_layer` from those of the operator."""
    weights = ExpertWeights(gate_up_proj, down_proj, gate_up_bias, down_bias, transposed)
    return hidden_states, weights, Routes(topk_weights, topk_ids, expert_map, num_valid_tokens), activation, block_size


def _layer(*args: Any) -> Tensor:
    return run_layer(*_records(*args))


def _layer_formula(*args: Any) -> Tensor:
    hidden_states, weights, routes, activation, _ = _records(*args)
    return packed.run_layer(hidden_states, weights, routes, packed.ACTIVATIONS[activation, weights.gated])


def _layer_fake(hidden_states: Tensor, *args: object) -> Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


def _layer_flops(rows: Any, gate_up: Any, down: Any, topk_weights: Any, *_: Any, **__: Any) -> int:
    """Two operations per weight of the expert of each route."""
    return 2 * int(math.prod(topk_weights) * (math.prod(gate_up[1:]) + math.prod(down[1:])))


_library.impl("fused_moe", _layer, "CompositeExplicitAutograd")
torch.library.register_fake("moealign::fused_moe", _layer_fake, lib=_library)
modes.differentiable(_library, "fused_moe", _layer_formula)
modes.batched(_library, "fused_moe")
modes.flops("fused_moe", _layer_flops)


# ---- grouped_gemm ----------------------------------------------------------------------------------------------------

_PRODUCT = (
    "Tensor a, Tensor b, Tensor sorted_token_ids, Tensor expert_ids, Tensor num_tokens_post_padded, "
    "int top_k, int block_size, Tensor? row_weights, Tensor? bias, str? activation, bool gated, bool transposed"
)
_library.define(f"grouped_gemm({_PRODUCT}) -> Tensor")
_library.define(f"grouped_gemm.out({_PRODUCT}, *, Tensor(a!) out) -> ()")


def _product(
    a: Tensor,
    b: Tensor,
    sorted_token_ids: Tensor,
    expert_ids: Tensor,
    num_tokens_post_padded: Tensor,
    top_k: int,
    block_size: int,
    row_weights: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    gated: bool,
    transposed: bool,
) -> Product:
    layout = BlockLayout(sorted_token_ids, expert_ids, num_tokens_post_padded, block_size=block_size)
    return Product(a, b, layout, top_k, row_weights, bias, activation, gated, transposed)


def run_product(product: Product) -> Tensor:
    """One product on plain tensors, ``[n, N]``."""
    assert product.layout is not None
    if select_path(product.a, None, False, product.layout.block_size) == "packed":
        return packed.run_product(product)
    columns = product_columns(product.b, product.gated, product.transposed)
    out = product.a.new_zeros(product.a.shape[0] * product.top_k, columns)
    fill_product(product, out)
    return out


def fill_product(product: Product, out: Tensor) -> None:
    """One product on plain tensors, into the rows of a zeroed `out` that the layout names."""
    assert product.layout is not None
    if select_path(product.a, None, False, product.layout.block_size) == "packed" or not product.b.numel():
        out.copy_(packed.run_product(product))
    elif out.numel():
        launch.fill_product(product, out)


def _product_op(*args: Any) -> Tensor:
    return run_product(_product(*args))


def _product_op_out(*args: Any, out: Tensor) -> None:
    fill_product(_product(*args), out)


def product_formula(*args: Any) -> Tensor:
    """The operator `grouped_gemm` in differentiable operations."""
    return packed.run_product(_product(*args))


def _product_fake(a: Tensor, b: Tensor, *args: Any) -> Tensor:
    return a.new_empty(a.shape[0] * args[3], product_columns(b, args[8], args[9]))


def _product_fake_out(*args: Any, **kwargs: Any) -> None:
    return None


def _product_flops(a: Any, b: Any, ids: Any, experts: Any, total: Any, top_k: int, *_: Any, **__: Any) -> int:
    return 2 * int(a[0] * top_k * math.prod(b[1:]))


_library.impl("grouped_gemm", _product_op, "CompositeExplicitAutograd")
_library.impl("grouped_gemm.out", _product_op_out, "CompositeExplicitAutograd")
torch.library.register_fake("moealign::grouped_gemm", _product_fake, lib=_library)
torch.library.register_fake("moealign::grouped_gemm.out", _product_fake_out, lib=_library)
modes.differentiable(_library, "grouped_gemm", product_formula)
modes.batched(_library, "grouped_gemm")
modes.flops("grouped_gemm", _product_flops)


# ---- the packed path's operators -------------------------------------------------------------------------------------
#
# Each is linear in every floating tensor, so its gradients are these operators again.

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
