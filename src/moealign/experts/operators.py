"""The experts' operators ``torch.ops.moealign.*``: schemas, fakes, formulas, gradients and FLOPs.

On GPUs a gradient is computed by kernels, elsewhere by the formula: torch's gradients of the packed path's operators.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import modes
from ..layout import BlockLayout
from . import gradients, launch, packed, packed_operators  # noqa: F401  (registers its operators)
from .activations import function_of
from .checks import check_accumulation, select_path
from .records import ExpertWeights, Product, Routes, product_columns
from .tiles import BLOCK_SIZES, select_tiles

__all__ = [
    "fill_product",
    "is_empty",
    "layer_flops",
    "product_flops",
    "product_formula",
    "run_layer",
    "run_product",
]

_library = torch.library.Library("moealign", "FRAGMENT")


# ---- fused_moe -------------------------------------------------------------------------------------------------------

_LAYER = (
    "Tensor hidden_states, Tensor gate_up_proj, Tensor down_proj, Tensor topk_weights, Tensor topk_ids, "
    "Tensor? expert_map, Tensor? num_valid_tokens, str activation, Tensor? gate_up_bias, Tensor? down_bias, "
    "bool transposed, int? block_size"
)
_TRAINING = (
    "bool recompute=False, Tensor? gate_up_grad=None, Tensor? down_grad=None, bool batch_invariant=False, "
    "SymInt? expected_routes=None"
)
_library.define(f"fused_moe({_LAYER}, {_TRAINING}) -> Tensor")
_library.define(f"fused_moe_forward({_LAYER}, bool batch_invariant, SymInt? expected_routes) -> (Tensor, Tensor)")
_BACKWARD = f"Tensor grad, Tensor? before, {_LAYER}, bool batch_invariant, bool[] needed"
_library.define(f"fused_moe_backward({_BACKWARD}) -> Tensor[]")
_library.define(
    f"fused_moe_backward.accumulate({_BACKWARD}, Tensor(a!)? gate_up_grad, Tensor(b!)? down_grad) -> Tensor[]"
)


def is_empty(hidden_states: Tensor, weights: ExpertWeights, routes: Routes) -> bool:
    """Whether there is nothing to launch a kernel for."""
    sizes = (routes.ids.numel(), hidden_states.shape[1], weights.gate_up.numel(), weights.down.numel())
    return 0 in sizes


def run_layer(
    hidden_states: Tensor,
    weights: ExpertWeights,
    routes: Routes,
    activation: str,
    block_size: int | None,
    before: Tensor | None = None,
    batch_invariant: bool = False,
    out: Tensor | None = None,
    expected_routes: int | None = None,
) -> Tensor:
    """A layer of experts on plain tensors, ``[T, H]``; `before` receives the first product's rows.

    The result is `out` where kernels fill it.
    """
    if launch.refuses(hidden_states) is not None or is_empty(hidden_states, weights, routes):
        run = packed.run_tokens if batch_invariant else packed.run_layer
        return run(hidden_states, weights, routes, function_of(activation, weights.gated()))
    tiles = select_tiles(hidden_states, weights, routes, block_size, None, batch_invariant, expected_routes)
    layout = routes.layout(tiles.block_size, weights.experts()) if tiles.block_size else None
    return launch.run_layer(tiles, hidden_states, weights, routes, layout, activation, before, out)


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


def _training(args: tuple[Any, ...]) -> tuple[bool, Tensor | None, Tensor | None, bool, int | None]:
    """recompute, both buffers, batch_invariant and expected_routes from all arguments of the operator, which may leave
    them out."""
    defaults = (False, None, None, False, None)
    return (*args[12:], *defaults[len(args) - 12 :])  # type: ignore[return-value]


def _layer(*args: Any) -> Tensor:
    *_, batch_invariant, expected_routes = _training(args)
    return run_layer(*_records(*args[:12]), batch_invariant=batch_invariant, expected_routes=expected_routes)


def _layer_formula(*args: Any) -> Tensor:
    hidden_states, weights, routes, activation, _ = _records(*args[:12])
    return packed.run_training(
        hidden_states, weights, routes, function_of(activation, weights.gated()), *_training(args)[:4]
    )


def _layer_fake(hidden_states: Tensor, *args: object) -> Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


def layer_flops(rows: Any, gate_up: Any, down: Any, topk_weights: Any, *_: Any, **__: Any) -> int:
    """Two operations per weight of the expert of each route."""
    return 2 * int(math.prod(topk_weights) * (math.prod(gate_up[1:]) + math.prod(down[1:])))


def _before_like(hidden_states: Tensor, weights: ExpertWeights, routes: Routes) -> Tensor:
    outputs = weights.gate_up.shape[2 if weights.transposed else 1]
    return hidden_states.new_empty(routes.ids.shape[0] * routes.ids.shape[1], outputs)


def _layer_forward(*args: Any) -> tuple[Tensor, Tensor]:
    """The layer, and the rows of the first product before the activation, in the order of the routes."""
    hidden_states, weights, routes, activation, block_size = _records(*args[:12])
    before = _before_like(hidden_states, weights, routes)
    call = (hidden_states, weights, routes, activation, block_size, before, args[12])
    return run_layer(*call, expected_routes=args[13]), before


def _layer_forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    hidden_states, weights, routes, _, _ = _records(*args[:12])
    return _layer_fake(hidden_states), _before_like(hidden_states, weights, routes)


def _layer_kept(*args: Any) -> tuple[Tensor, Tensor | None]:
    """The result of the forward, and what it keeps for the backward beside its inputs."""
    recompute, _, _, *options = _training(args)
    if recompute:
        return torch.ops.moealign.fused_moe.default(*args[:12], False, None, None, *options), None
    result: tuple[Tensor, Tensor] = torch.ops.moealign.fused_moe_forward.default(*args[:12], *options)
    return result


#: The places of the floating inputs of a layer among the operator's arguments, in the order of `LayerGradients`.
_FLOATING = (0, 1, 2, 3, 8, 9)


def _layer_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
    tensors = [each if isinstance(each, Tensor) else None for each in inputs[:12]]
    ctx.options = [None if isinstance(each, Tensor) else each for each in inputs[:12]]
    _, *ctx.buffers, ctx.batch_invariant, _ = _training(inputs)
    ctx.arguments = len(inputs)
    ctx.save_for_backward(output[1], *tensors)


def _layer_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    before, *tensors = ctx.saved_tensors
    inputs = [option if each is None else each for each, option in zip(tensors, ctx.options, strict=True)]
    inputs.append(ctx.batch_invariant)
    needed = [ctx.needs_input_grad[place] for place in _FLOATING]
    if ctx.buffers[0] is None:
        if modes.is_batched_gradient(grad):  # of torch.autograd.grad(..., is_grads_batched=True)
            parts = _layer_backward_formula(grad, before, *inputs, needed)
        else:
            parts = torch.ops.moealign.fused_moe_backward.default(grad, before, *inputs, needed)
    else:
        check_accumulation(grad)
        parts = torch.ops.moealign.fused_moe_backward.accumulate(grad, before, *inputs, needed, *ctx.buffers)
        needed[1] = needed[2] = False
    result: list[Tensor | None] = [None] * ctx.arguments
    for place, part, wanted in zip(_FLOATING, parts, needed, strict=True):
        result[place] = part if wanted else None
    return tuple(result)


def _layer_gradients(grad: Tensor, before: Tensor | None, *args: Any) -> list[Tensor]:
    hidden_states, weights, routes, activation, _ = _records(*args[:12])
    batch_invariant, needed, *buffers = args[12:]
    if is_empty(hidden_states, weights, routes):  # without tokens: `_takes_layer` leaves empty weights to the formula
        return [each.zero_() for each in _layer_backward_fake(grad, before, *args)]
    call = (grad, before, hidden_states, weights, routes, activation, needed, tuple(buffers) or (None, None))
    parts = gradients.layer_gradients(*call, batch_invariant)
    return [grad.new_empty(0) if each is None else each for each in parts]


def _layer_backward_fake(grad: Tensor, before: Tensor | None, *args: Any) -> list[Tensor]:
    inputs, needed = [args[place] for place in _FLOATING], list(args[13])
    if args[14:] and args[14] is not None:
        needed[1] = needed[2] = False
    return [
        torch.empty_like(each, memory_format=torch.contiguous_format) if wanted else grad.new_empty(0)
        for each, wanted in zip(inputs, needed, strict=True)
    ]


def _layer_backward_formula(grad: Tensor, before: Tensor | None, *args: Any) -> list[Tensor]:
    """The gradients as torch's gradients of the formula: these can be differentiated again."""
    batch_invariant, needed = args[12:14]
    wanted = [args[place] for place, one in zip(_FLOATING, needed, strict=True) if one]
    with torch.enable_grad():
        out = _layer_formula(*args[:12], False, None, None, batch_invariant)
    parts = iter(torch.autograd.grad(out, wanted, grad, create_graph=True, materialize_grads=True))
    return [next(parts) if one else grad.new_empty(0) for one in needed]


def _layer_backward_flops(grad: Any, before: Any, *args: Any, **options: Any) -> int:
    """Twice the forward's products: one for rows, one for weights."""
    return 2 * layer_flops(*args[:4])


def _takes_layer(*args: Any) -> bool:
    """Whether the kernels give the gradients of the operator."""
    hidden_states, weights, routes, _, _ = _records(*args[:12])
    return launch.refuses(hidden_states) is None and not is_empty(hidden_states, weights, routes)


_library.impl("fused_moe", _layer, "CompositeExplicitAutograd")
_library.impl("fused_moe_forward", _layer_forward, "CompositeExplicitAutograd")
_library.impl("fused_moe_backward", _layer_gradients, "CompositeExplicitAutograd")
_library.impl("fused_moe_backward.accumulate", _layer_gradients, "CompositeExplicitAutograd")
torch.library.register_fake("moealign::fused_moe", _layer_fake, lib=_library)
torch.library.register_fake("moealign::fused_moe_forward", _layer_forward_fake, lib=_library)
torch.library.register_fake("moealign::fused_moe_backward", _layer_backward_fake, lib=_library)
torch.library.register_fake("moealign::fused_moe_backward.accumulate", _layer_backward_fake, lib=_library)
modes.differentiable(
    _library, "fused_moe", _layer_formula, _layer_save, _layer_backward, forward=_layer_kept, takes=_takes_layer
)
modes.differentiable(_library, "fused_moe_backward", _layer_backward_formula)
modes.batched(_library, "fused_moe")
modes.batched(_library, "fused_moe_backward")
modes.flops("fused_moe", layer_flops)
modes.flops("fused_moe_forward", layer_flops)
modes.flops("fused_moe_backward", _layer_backward_flops)


# ---- grouped_gemm ----------------------------------------------------------------------------------------------------

_PRODUCT = (
    "Tensor a, Tensor b, Tensor sorted_token_ids, Tensor expert_ids, Tensor num_tokens_post_padded, "
    "int top_k, int block_size, Tensor? row_weights, Tensor? bias, str? activation, bool gated, bool transposed"
)
_library.define(f"grouped_gemm({_PRODUCT}) -> Tensor")
_library.define(f"grouped_gemm.out({_PRODUCT}, *, Tensor(a!) out) -> ()")
_library.define(
    "grouped_gemm_weights(Tensor grad, Tensor a, Tensor sorted_token_ids, Tensor expert_ids, "
    "Tensor num_tokens_post_padded, int top_k, int block_size, SymInt experts, bool transposed, bool with_bias) "
    "-> (Tensor, Tensor)"
)


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


def _product_for_gradients(*args: Any) -> Tensor:
    """The operator in differentiable operations: the product by kernels where they run, what follows it in torch."""
    product = _product(*args)
    if modes.transformed() or not _takes_product(product):
        return packed.run_product(product)
    options = (None, product.bias, None, False, product.transposed)
    rows: Tensor = torch.ops.moealign.grouped_gemm(*args[:7], *options)
    if product.activation is not None:
        rows = function_of(product.activation, product.gated)(rows)
    if product.row_weights is not None:
        assert product.layout is not None
        kept = gradients.experts_of_routes(product.layout, rows.shape[0], product.b.shape[0]) >= 0
        factor = product.row_weights.reshape(-1).masked_fill(~kept, 0)
        rows = (rows * factor.unsqueeze(1)).to(product.a.dtype)
    return rows


def _takes_product(product: Product) -> bool:
    """Whether the kernels take this product and give its gradients."""
    blocks = product.layout is not None and product.layout.block_size in BLOCK_SIZES
    return blocks and launch.refuses(product.a) is None and 0 not in (*product.a.shape, *product.b.shape)


def _is_plain_product(*args: Any) -> bool:
    """Whether the kernels give the gradients of the operator: nothing follows the product but its bias."""
    product = _product(*args)
    return product.activation is None and product.row_weights is None and _takes_product(product)


def _product_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, *blocks = inputs[:5]
    ctx.top_k, ctx.block_size, ctx.has_bias, ctx.transposed = *inputs[5:7], inputs[8] is not None, inputs[11]
    ctx.save_for_backward(a, b, *blocks)


def _product_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, b, *blocks = ctx.saved_tensors
    grad = grad.contiguous()
    result: list[Tensor | None] = [None] * 12
    if ctx.needs_input_grad[0]:
        options = (1, ctx.block_size, None, None, None, False, not ctx.transposed)
        rows = modes.call(torch.ops.moealign.grouped_gemm, grad, b, *blocks, *options)
        result[0] = rows if ctx.top_k == 1 else rows.view(a.shape[0], ctx.top_k, a.shape[1]).sum(1)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[8]:
        facts = (ctx.top_k, ctx.block_size, b.shape[0], ctx.transposed, ctx.needs_input_grad[8])
        result[1], result[8] = modes.call(torch.ops.moealign.grouped_gemm_weights, grad, a, *blocks, *facts)
        if not ctx.has_bias:
            result[8] = None
    return tuple(result)


def _product_weights(
    grad: Tensor,
    a: Tensor,
    sorted_token_ids: Tensor,
    expert_ids: Tensor,
    num_tokens_post_padded: Tensor,
    top_k: int,
    block_size: int,
    experts: int,
    transposed: bool,
    with_bias: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of a product for its weights and, if `with_bias`, its bias; else that is empty."""
    layout = BlockLayout(sorted_token_ids, expert_ids, num_tokens_post_padded, block_size=block_size)
    weights, bias = gradients.product_gradients(grad, a, layout, top_k, experts, transposed, with_bias)
    return weights, grad.new_empty(0) if bias is None else bias


def _product_weights_fake(grad: Tensor, a: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    experts, transposed, with_bias = args[5:]
    columns = (a.shape[1], grad.shape[1]) if transposed else (grad.shape[1], a.shape[1])
    return a.new_empty(experts, *columns), a.new_empty((experts, grad.shape[1]) if with_bias else 0)


def _product_weights_formula(grad: Tensor, a: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    ids, owners, total, top_k, block_size, experts, transposed, with_bias = args
    layout = BlockLayout(ids, owners, total, block_size=block_size)
    order, positions, ends = packed.pack_layout(layout, grad.shape[0], experts)
    gather = torch.ops.moealign.gather_rows
    grads, rows = gather(grad, order, positions, 1, True), gather(a, order, positions, top_k, True)
    left, right = (rows, grads) if transposed else (grads, rows)
    weights = torch.ops.moealign.grouped_mm_weights(left, right, ends, experts)
    if not with_bias:
        return weights, grad.new_zeros(0)
    experts_of = torch.searchsorted(ends, torch.arange(order.shape[0], device=ends.device), right=True)
    return weights, (experts_of == torch.arange(experts, device=ends.device).unsqueeze(1)).to(grads.dtype) @ grads


def _product_fake(a: Tensor, b: Tensor, *args: Any) -> Tensor:
    return a.new_empty(a.shape[0] * args[3], product_columns(b, args[8], args[9]))


def _product_fake_out(*args: Any, **kwargs: Any) -> None:
    return None


def product_flops(a: Any, b: Any, ids: Any, experts: Any, total: Any, top_k: int, *_: Any, **__: Any) -> int:
    return 2 * int(a[0] * top_k * math.prod(b[1:]))


_library.impl("grouped_gemm", _product_op, "CompositeExplicitAutograd")
_library.impl("grouped_gemm.out", _product_op_out, "CompositeExplicitAutograd")
torch.library.register_fake("moealign::grouped_gemm", _product_fake, lib=_library)
torch.library.register_fake("moealign::grouped_gemm.out", _product_fake_out, lib=_library)
modes.differentiable(
    _library, "grouped_gemm", _product_for_gradients, _product_save, _product_backward, takes=_is_plain_product
)
modes.batched(_library, "grouped_gemm")
modes.flops("grouped_gemm", product_flops)
_library.impl("grouped_gemm_weights", _product_weights, "CompositeExplicitAutograd")
torch.library.register_fake("moealign::grouped_gemm_weights", _product_weights_fake, lib=_library)
modes.differentiable(_library, "grouped_gemm_weights", _product_weights_formula)
modes.batched(_library, "grouped_gemm_weights")
modes.flops("grouped_gemm_weights", lambda grad, a, *args, **_: 2 * math.prod(grad) * a[1])
