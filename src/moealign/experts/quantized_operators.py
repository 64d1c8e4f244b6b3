"""Calls with quantised weights, and their operators ``torch.ops.moealign.*_quantized``: for inference alone."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import modes
from ..errors import InvalidInput
from ..layout import BlockLayout
from . import operators, packed
from .activations import function_of
from .checks import check_inference
from .quantized import QuantizedWeights
from .records import ExpertWeights, Product, Routes, product_columns

__all__ = ["run_layer", "run_product"]

_library = torch.library.Library("moealign", "FRAGMENT")
_WEIGHTS = "Tensor {0}, Tensor {0}_scales, int[] {0}_block, str {0}_activations, Tensor? {0}_activation_scale"
_library.define(
    f"fused_moe_quantized(Tensor hidden_states, {_WEIGHTS.format('gate_up')}, {_WEIGHTS.format('down')}, "
    "Tensor topk_weights, Tensor topk_ids, Tensor? expert_map, Tensor? num_valid_tokens, str activation, "
    "Tensor? gate_up_bias, Tensor? down_bias, int? block_size, bool batch_invariant, SymInt? expected_routes=None) "
    "-> Tensor"
)
_library.define(
    f"grouped_gemm_quantized(Tensor a, {_WEIGHTS.format('b')}, Tensor sorted_token_ids, Tensor expert_ids, "
    "Tensor num_tokens_post_padded, int top_k, int block_size, Tensor? row_weights, Tensor? bias, str? activation, "
    "bool gated) -> Tensor"
)


def _weights(data: Tensor, scales: Tensor, block: list[int], *scheme: Any) -> QuantizedWeights:
    return QuantizedWeights(data, scales, (block[0], block[1]), *scheme)


# ---- fused_moe -------------------------------------------------------------------------------------------------------


def run_layer(
    hidden_states: Tensor,
    weights: ExpertWeights,
    routes: Routes,
    activation: str,
    block_size: int | None,
    batch_invariant: bool,
    out: Tensor | None,
    backend: str | None,
    expected_routes: int | None,
) -> Tensor:
    """A layer with quantised weights whose arguments are checked, ``[T, H]``: `out` where kernels fill it."""
    assert weights.quantized is not None
    first, second = weights.quantized
    biases = weights.gate_up_bias, weights.down_bias
    if backend == "packed":
        run = packed.run_tokens if batch_invariant else packed.run_layer
        return run(hidden_states, weights, routes, function_of(activation, weights.gated()))
    if modes.watched(hidden_states, *first, *second, *biases, *routes):
        options = (activation, *biases, block_size, batch_invariant, expected_routes)
        call = torch.ops.moealign.fused_moe_quantized
        result: Tensor = modes.call(call, hidden_states, *first, *second, *routes, *options)
        return result
    plain = (hidden_states, weights, routes, activation, block_size)
    return operators.run_layer(*plain, None, batch_invariant, out, expected_routes)


def _layer(hidden_states: Tensor, *args: Any) -> Tensor:
    both = _weights(*args[:5]), _weights(*args[5:10])
    activation, gate_up_bias, down_bias, block_size, batch_invariant, expected_routes = (*args[14:], None)[:6]
    weights = ExpertWeights(both[0].data, both[1].data, gate_up_bias, down_bias, False, both)
    routes = Routes(*args[10:14])
    plain = (hidden_states, weights, routes, activation, block_size)
    return operators.run_layer(*plain, None, batch_invariant, None, expected_routes)


def _layer_fake(hidden_states: Tensor, *args: object) -> Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


# ---- grouped_gemm ----------------------------------------------------------------------------------------------------


def run_product(product: Product, backend: str | None) -> Tensor:
    """A product with quantised weights whose arguments are checked, ``[n, N]``."""
    assert product.quantized is not None
    assert product.layout is not None
    blocks = tuple(product.layout)
    if backend == "packed":
        return packed.run_product(product)
    if modes.watched(product.a, *product.quantized, *blocks, product.row_weights, product.bias):
        options = (product.row_weights, product.bias, product.activation, product.gated)
        facts = (*blocks, product.top_k, product.layout.block_size)
        call = torch.ops.moealign.grouped_gemm_quantized
        result: Tensor = modes.call(call, product.a, *product.quantized, *facts, *options)
        return result
    return operators.run_product(product)


def _product(a: Tensor, *args: Any) -> Tensor:
    weights = _weights(*args[:5])
    ids, experts, total, top_k, block_size, row_weights, bias, activation, gated = args[5:]
    layout = BlockLayout(ids, experts, total, block_size=block_size)
    product = Product(a, weights.data, layout, top_k, row_weights, bias, activation, gated, False, weights)
    return operators.run_product(product)


def _product_fake(a: Tensor, b: Tensor, *args: Any) -> Tensor:
    return a.new_empty(a.shape[0] * args[7], product_columns(b, args[12], False))


# ---- both ------------------------------------------------------------------------------------------------------------


def _refuse_gradients(*args: Any) -> NoReturn:
    """What autograd and transforms call in place of an operator."""
    check_inference(False, None, False, *args)
    raise InvalidInput(
        "expected a call outside torch.func transforms, as quantised weights give no gradients, got one inside; "
        "torch.vmap alone is fine"
    )


def _layer_flops(rows: Any, gate_up: Any, *args: Any, **_: Any) -> int:
    return operators.layer_flops(rows, gate_up, args[4], args[9])


def _product_flops(a: Any, b: Any, *args: Any, **_: Any) -> int:
    return operators.product_flops(a, b, None, None, None, args[7])


_library.impl("fused_moe_quantized", _layer, "CompositeExplicitAutograd")
_library.impl("grouped_gemm_quantized", _product, "CompositeExplicitAutograd")
torch.library.register_fake("moealign::fused_moe_quantized", _layer_fake, lib=_library)
torch.library.register_fake("moealign::grouped_gemm_quantized", _product_fake, lib=_library)
for _name, _count in (("fused_moe_quantized", _layer_flops), ("grouped_gemm_quantized", _product_flops)):
    modes.differentiable(_library, _name, _refuse_gradients)
    modes.batched(_library, _name)
    modes.flops(_name, _count)
