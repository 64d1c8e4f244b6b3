"""Every refusal of :func:`moealign.fused_moe` and :func:`moealign.grouped_gemm`, and which path takes a call."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import modes
from ..calls.checks import check_align, check_index, check_plain
from ..errors import BackendUnavailable, InvalidInput, InvalidType
from ..layout import REQUIRED, BlockLayout
from . import launch
from .activations import PLAIN, Gate, names
from .quantized import GROUP, SCHEMES, QuantizedWeights, scales_shape
from .records import ExpertWeights, Product, Routes, product_columns
from .tiles import BLOCK_SIZES

__all__ = [
    "PATHS",
    "check_accumulation",
    "check_expected_routes",
    "check_inference",
    "check_layer",
    "check_out",
    "check_product",
    "check_quantized_layer",
    "check_training",
    "select_path",
]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
PATHS = ("triton", "packed")
_NO_GRADIENTS = (
    "it gives no gradients of callables, no forward-mode derivatives and no batch-invariant callables; call it under "
    "torch.no_grad() or leave backend out"
)


def select_path(rows: Tensor, backend: str | None, torch_only: bool, block_size: int | None = None) -> str:
    """``triton`` where it runs and takes the dtype and the blocks; else ``packed``.

    Args:
        torch_only: the call needs derivatives that the kernels do not give.

    Raises:
        BackendUnavailable: `backend` names no path, or one that cannot take this call.
    """
    if backend is not None and backend not in PATHS:
        raise BackendUnavailable(f"backend: expected one of {', '.join(PATHS)}, got {backend!r}")
    if backend == "packed":
        return backend
    reason = _NO_GRADIENTS if torch_only else launch.refuses(rows)
    if reason is None and block_size is not None and block_size not in BLOCK_SIZES:
        reason = f"it takes blocks of {', '.join(map(str, BLOCK_SIZES))} rows, these are of {block_size}"
    if reason is None:
        return "triton"
    if backend is not None:
        raise BackendUnavailable(f"backend: expected one that can take this call, got {backend!r}: {reason}")
    return "packed"


# ---- fused_moe -------------------------------------------------------------------------------------------------------


def check_layer(
    hidden_states: Tensor,
    weights: ExpertWeights,
    routes: Routes,
    activation: object,
    output_rows: object,
    block_size: int | None,
) -> bool:
    """Refuse what :func:`moealign.fused_moe` does not take; return whether a named activation has a gate."""
    gate_up, down, gate_up_bias, down_bias, transposed, quantized = weights
    floats = {"hidden_states": hidden_states, "gate_up_bias": gate_up_bias, "down_bias": down_bias}
    if quantized is None:
        floats |= {"gate_up_proj": gate_up, "down_proj": down}
    _check_floats(floats, hidden_states, same_dtype=True)
    for name, one in zip(("gate_up_proj", "down_proj"), quantized or (), strict=False):
        _check_quantized(name, one, hidden_states, transposed)
    _check_floats({"topk_weights": routes.weights}, hidden_states, same_dtype=False)
    _check_ids(routes, gate_up)
    if hidden_states.dim() != 2 or gate_up.dim() != 3 or down.dim() != 3:
        raise InvalidInput(
            "hidden_states, gate_up_proj, down_proj: expected [T, H], [E, 2I, H] and [E, H, I], got "
            f"{list(hidden_states.shape)}, {list(gate_up.shape)} and {list(down.shape)}"
        )
    tokens, hidden = hidden_states.shape
    experts = gate_up.shape[0]
    columns, depth = (gate_up.shape[2], gate_up.shape[1]) if transposed else gate_up.shape[1:]
    named = activation is None or isinstance(activation, (str, Gate))
    if depth != hidden or weights.hidden() != hidden or down.shape[0] != experts:
        raise InvalidInput(
            f"gate_up_proj, down_proj: expected [E, 2I, {hidden}] and [E, {hidden}, I], got {list(gate_up.shape)} "
            f"and {list(down.shape)}; transposed=True takes [E, {hidden}, 2I] and [E, I, {hidden}]"
        )
    inner = weights.inner()
    if named and columns not in (inner, 2 * inner):
        raise InvalidInput(
            f"gate_up_proj: expected 2I = {2 * inner} or I = {inner} outputs as down_proj takes {inner}, got {columns}"
        )
    if not named and not callable(activation):
        raise InvalidType(f"activation: expected a name, a Gate or a callable, got {type(activation).__name__}")
    if output_rows is not None and not callable(output_rows):
        raise InvalidType(f"output_rows: expected a callable, got {type(output_rows).__name__}")
    ids = routes.ids
    if ids.dim() != 2 or ids.shape[0] != tokens or routes.weights.shape != ids.shape:
        raise InvalidInput(
            f"topk_ids, topk_weights: expected [{tokens}, k] both, got {list(ids.shape)} and "
            f"{list(routes.weights.shape)}"
        )
    for name, bias, size in (("gate_up_bias", gate_up_bias, columns), ("down_bias", down_bias, hidden)):
        if bias is not None and list(bias.shape) != [experts, size]:
            raise InvalidInput(f"{name}: expected [{experts}, {size}], got {list(bias.shape)}")
    gated = named and weights.gated()
    if named:
        _check_activation(activation, gated)
    if block_size is not None and block_size not in BLOCK_SIZES:
        raise InvalidInput(f"block_size: expected one of {', '.join(map(str, BLOCK_SIZES))}, got {block_size}")
    return gated


def check_expected_routes(expected: object) -> None:
    """Refuse what :func:`moealign.fused_moe` does not take as `expected_routes`."""
    if isinstance(expected, bool) or not isinstance(expected, (int, torch.SymInt)):
        raise InvalidType(f"expected_routes: expected an int, got {type(expected).__name__}")
    if expected < 0:
        raise InvalidInput(f"expected_routes: expected 0 or more, got {expected}")


def check_training(
    weights: ExpertWeights,
    recompute: object,
    weight_grads: object,
    batch_invariant: object,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> None:
    """Refuse what :func:`moealign.fused_moe` does not take as these options.

    Args:
        dtypes: of both projections before autocast.
    """
    for name, value in (("recompute", recompute), ("batch_invariant", batch_invariant)):
        if not isinstance(value, bool):
            raise InvalidType(f"{name}: expected True or False, got {type(value).__name__}")
    if weight_grads is None:
        return
    if not isinstance(weight_grads, (tuple, list)) or len(weight_grads) != 2:
        raise InvalidType(f"weight_grads: expected two tensors, got {type(weight_grads).__name__}")
    for index, (buffer, like) in enumerate(zip(weight_grads, (weights.gate_up, weights.down), strict=True)):
        name = f"weight_grads[{index}]"
        if not isinstance(buffer, Tensor):
            raise InvalidType(f"{name}: expected a torch.Tensor, got {type(buffer).__name__}")
        if buffer.shape != like.shape or not buffer.is_contiguous() or buffer.device != like.device:
            raise InvalidInput(
                f"{name}: expected a contiguous {list(like.shape)} on {like.device} like the projection, got "
                f"{list(buffer.shape)} on {buffer.device}"
            )
        if buffer.dtype not in (torch.float32, dtypes[index]):
            raise InvalidType(f"{name}: expected float32 or {dtypes[index]} like the projection, got {buffer.dtype}")
        if buffer.requires_grad:
            raise InvalidInput(f"{name}: expected a buffer without a gradient of its own, got requires_grad=True")
    if modes.followed() or modes.forward_mode():
        raise InvalidInput(
            "weight_grads: expected an eager call, which can write to buffers in its backward, got one that is "
            "compiled, traced or transformed; leave it out there"
        )


def check_accumulation(grad: Tensor) -> None:
    """Refuse a backward that cannot add `grad` to a buffer."""
    if torch.is_grad_enabled() or modes.is_batched_gradient(grad):
        raise InvalidInput(
            "weight_grads: expected a plain backward, got one with create_graph=True or is_grads_batched=True; leave "
            "weight_grads out there"
        )


def _check_ids(routes: Routes, gate_up: Tensor) -> None:
    """Refuse ids on another device than `gate_up`, and those that :func:`moealign.align` refuses.

    An eager call without options leaves the second check to `align`, which it calls first.
    """
    ids, expert_map, num_valid_tokens = routes.ids, routes.expert_map, routes.num_valid_tokens
    if not isinstance(ids, Tensor) or ids.device != gate_up.device:
        check_plain("topk_ids", ids)
        raise InvalidInput(f"topk_ids: expected a tensor on {gate_up.device} like the rows, got {ids.device}")
    if expert_map is None and num_valid_tokens is None and not modes.watched(ids, gate_up):
        return
    experts = gate_up.shape[0] if gate_up.dim() else 0
    if isinstance(expert_map, Tensor) and expert_map.dim() == 1:
        experts = expert_map.shape[0]
    check_align(ids, 1, experts, expert_map, False, True, num_valid_tokens, None, ())
    if expert_map is not None and expert_map.shape[0] < gate_up.shape[0]:
        raise InvalidInput(
            f"expert_map: expected an entry for each global expert, at least the {gate_up.shape[0]} local ones, got "
            f"{expert_map.shape[0]}"
        )


# ---- grouped_gemm ----------------------------------------------------------------------------------------------------


def check_product(product: Product, activation: object) -> tuple[str | None, bool, int, int]:
    """Refuse what :func:`moealign.grouped_gemm` does not take.

    Returns:
        The activation without ``_mul``, whether it has a gate, the number of routes, the columns of the output.
    """
    a, b, bias, row_weights, top_k, layout = (
        product.a, product.b, product.bias, product.row_weights, product.top_k, product.layout,
    )  # fmt: skip
    if product.quantized is None:
        _check_floats({"a": a, "b": b, "bias": bias}, a, same_dtype=True)
    else:
        _check_floats({"a": a, "bias": bias}, a, same_dtype=True)
        _check_quantized("b", product.quantized, a, product.transposed)
    _check_floats({"row_weights": row_weights}, a, same_dtype=False)
    if not isinstance(layout, BlockLayout):
        raise InvalidType(f"layout: expected a BlockLayout, got {type(layout).__name__}; moealign.align makes one")
    if layout.block_size < 1:
        raise InvalidInput("layout: expected its block_size, got none; BlockLayout(..., block_size=B) says it")
    for field in REQUIRED:
        check_index("layout." + field, getattr(layout, field), a.device)
    if a.dim() != 2 or b.dim() != 3:
        raise InvalidInput(f"a, b: expected [T, K] and [E, N, K], got {list(a.shape)} and {list(b.shape)}")
    depth, columns = (b.shape[1], b.shape[2]) if product.transposed else (b.shape[2], b.shape[1])
    if a.shape[1] != depth:
        hint = "; transposed=True takes [E, K, N]" if b.shape[1] != b.shape[2] else ""
        raise InvalidInput(f"b: expected [E, N, {a.shape[1]}] as a has so many columns, got {list(b.shape)}{hint}")
    if type(top_k) is not int or top_k < 1:
        raise InvalidInput(f"top_k: expected an int of at least 1, got {top_k!r}")
    routes = a.shape[0] * top_k
    if layout.num_routes and layout.num_routes != routes:
        raise InvalidInput(
            f"top_k: expected {layout.num_routes} routes as in the layout, got {a.shape[0]} rows times top_k = {top_k}"
        )
    if layout.num_experts > b.shape[0] and not layout.mapped:
        raise InvalidInput(
            f"layout: expected at most {b.shape[0]} experts, for which b has weights, got {layout.num_experts}; an "
            "expert_map aligns for the experts of this rank"
        )
    if row_weights is not None and row_weights.numel() != routes:
        raise InvalidInput(f"row_weights: expected {routes} elements, one a route, got {list(row_weights.shape)}")
    if bias is not None and list(bias.shape) != [b.shape[0], columns]:
        raise InvalidInput(f"bias: expected [E, N] = [{b.shape[0]}, {columns}], got {list(bias.shape)}")
    name: str | None
    if isinstance(activation, Gate):
        name, gated = activation.text, True
    elif isinstance(activation, str):
        name, gated = activation.removesuffix("_mul"), activation.endswith("_mul")
        _check_activation(name, gated)
    else:
        name, gated = None, False
        if activation is not None:
            _check_activation(activation, gated)
    if gated and columns % 2:
        raise InvalidInput(f"activation: expected an even N for {activation}, got {columns}")
    return name, gated, routes, product_columns(b, gated, product.transposed)


def check_out(out: object, a: Tensor, routes: int, columns: int, gradients: bool) -> None:
    """Refuse a buffer that cannot hold the result ``[routes, columns]`` of a product or of a layer."""
    if not isinstance(out, Tensor):
        raise InvalidType(f"out: expected a torch.Tensor, got {type(out).__name__}")
    if list(out.shape) != [routes, columns] or out.dtype is not a.dtype or not out.is_contiguous():
        raise InvalidInput(f"out: expected a contiguous [{routes}, {columns}] of {a.dtype}, got {list(out.shape)}")
    if out.device != a.device:
        raise InvalidInput(f"out: expected a buffer on {a.device} like the rows, got {out.device}")
    if gradients:
        raise InvalidInput("out: expected no buffer where gradients are wanted, got one; use torch.no_grad()")
    if modes.transformed():
        raise InvalidInput("out: expected no buffer inside torch.func transforms, got one; leave it out")


# ---- both ------------------------------------------------------------------------------------------------------------


def _check_floats(tensors: dict[str, Tensor | None], rows: Tensor, *, same_dtype: bool) -> None:
    """Refuse anything but floating tensors on the device of `rows` and, if `same_dtype`, of its dtype."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        check_plain(name, tensor)
        if tensor.dtype not in _FLOATS:
            hint = (
                "; moealign.QuantizedWeights takes FP8 weights with their scales" if tensor.dtype.itemsize == 1 else ""
            )
            raise InvalidType(f"{name}: expected bfloat16, float16, float32 or float64, got {tensor.dtype}{hint}")
        if same_dtype and tensor.dtype is not rows.dtype:
            raise InvalidType(f"{name}: expected {rows.dtype} like the rows, got {tensor.dtype}; convert one of them")
        if tensor.device != rows.device:
            raise InvalidInput(f"{name}: expected a tensor on {rows.device} like the rows, got {tensor.device}")


def _check_quantized(name: str, weights: object, rows: Tensor, transposed: bool) -> None:
    """Refuse quantised weights that no path takes with these rows."""
    if not isinstance(weights, QuantizedWeights):
        raise InvalidType(
            f"{name}: expected QuantizedWeights like the other projection, got {type(weights).__name__}; quantise both "
            "or none"
        )
    if rows.dtype is torch.float64:
        raise InvalidType(f"{name}: expected rows in bfloat16, float16 or float32 for FP8 weights, got {rows.dtype}")
    if transposed:
        raise InvalidInput(f"{name}: expected transposed=False with quantised weights, which are [E, N, K], got True")
    data, scales, block, activations, static = weights
    dtypes = {"data": torch.float8_e4m3fn, "scales": torch.float32, "activation_scale": torch.float32}
    given = {"data": data, "scales": scales} | ({} if static is None else {"activation_scale": static})
    for field, tensor in given.items():
        check_plain(f"{name}.{field}", tensor)
        if tensor.dtype is not dtypes[field]:
            raise InvalidType(f"{name}.{field}: expected {dtypes[field]}, got {tensor.dtype}")
        if tensor.device != rows.device:
            raise InvalidInput(f"{name}.{field}: expected a tensor on {rows.device} like the rows, got {tensor.device}")
    if data.dim() != 3:
        raise InvalidInput(f"{name}.data: expected [E, N, K], got {list(data.shape)}")
    if data.shape[2] > 1 and data.stride(2) != 1:
        raise InvalidInput(
            f"{name}.data: expected a stride of 1 along K, got {data.stride(2)}; .contiguous() copies it"
        )
    if not isinstance(block, (tuple, list)) or len(block) != 2 or any(type(size) is not int for size in block):
        raise InvalidType(f"{name}.block: expected two ints, got {block!r}")
    if block[0] < 0 or block[1] not in (0, GROUP):
        raise InvalidInput(
            f"{name}.block: expected outputs of at least 1, or 0 for all, and inputs of {GROUP} or 0, got {block!r}"
        )
    if list(scales.shape) != scales_shape(data, block):
        raise InvalidInput(
            f"{name}.scales: expected {scales_shape(data, block)} for data of {list(data.shape)} in blocks of "
            f"{tuple(block)}, got {list(scales.shape)}"
        )
    if activations not in SCHEMES:
        raise InvalidInput(f"{name}.activations: expected one of {', '.join(SCHEMES)}, got {activations!r}")
    if (static is None) == (activations == "static"):
        got = "none" if static is None else f"one with activations={activations!r}"
        raise InvalidInput(f"{name}.activation_scale: expected one with activations='static' and only then, got {got}")
    if static is not None and static.numel() != 1 and list(static.shape) != [data.shape[0]]:
        raise InvalidInput(
            f"{name}.activation_scale: expected one element or [{data.shape[0]}], got {list(static.shape)}"
        )


def check_inference(recompute: object, weight_grads: object, batch_invariant: object, *tensors: object) -> None:
    """Refuse what needs gradients, which calls with quantised weights do not give."""
    if not isinstance(batch_invariant, bool):
        raise InvalidType(f"batch_invariant: expected True or False, got {type(batch_invariant).__name__}")
    for name, given in (("recompute", recompute is not False), ("weight_grads", weight_grads is not None)):
        if given:
            raise InvalidInput(f"{name}: expected none with quantised weights, which give no gradients, got one")
    if modes.forward_mode() or modes.wants_gradient(*tensors):
        raise InvalidInput(
            "expected a call without gradients, as quantised weights give none, got one that needs them; call it under "
            "torch.no_grad(), or dequantise the weights for training"
        )


def check_quantized_layer(
    rows: Tensor, weights: ExpertWeights, routes: Routes, training: tuple[object, object, object], named: bool
) -> None:
    """Refuse what a layer with quantised weights does not do; `named`: its functions are no callables."""
    scales = [each for one in weights.quantized or () for each in one]
    check_inference(*training, rows, *weights, routes.weights, *scales)
    if training[2] and not named:
        raise InvalidInput("batch_invariant: expected no callable with quantised weights, got one; leave one out")


def _check_activation(name: object, gated: bool) -> None:
    if isinstance(name, Gate):
        if not gated:
            raise InvalidInput("activation: expected gate_up_proj with a gate, [E, 2I, H], for a Gate, got [E, I, H]")
    elif name not in PLAIN:
        raise InvalidInput(
            f"activation: expected one of {names()}, got {name!r}; moealign.Gate is a gate with constants, and "
            "moealign.fused_moe also takes a callable on the rows of the first product"
        )
