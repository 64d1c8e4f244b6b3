"""One product an expert over a block-aligned layout: what a layout is for.

On a GPU one launch of the kernels in ``backends/triton/gemm.py``; on a CPU, in float64, and where gradients are
wanted, one ``torch.mm`` an expert over rows packed by expert (``backends/packed.py``).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import modes
from ..calls.checks import check_align, check_index, check_plain
from ..errors import BackendUnavailable, InvalidInput, InvalidType
from ..layout import REQUIRED, BlockLayout
from . import launch as kernels
from . import packed

__all__ = ["check_activation", "check_floats", "check_ids", "choose", "grouped_gemm"]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
BACKENDS = ("triton", "packed")


def grouped_gemm(
    a: Tensor,
    b: Tensor,
    layout: BlockLayout,
    *,
    top_k: int,
    row_weights: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    transposed: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``out[i] = row_weights[i] * activation(b[e] @ a[i // top_k] + bias[e])`` for each route ``i`` of expert ``e``.

    Rows are gathered through the layout, products are accumulated in float32 (float64 for float64), and an output row
    that the layout does not name (a dropped route, or one of another rank's expert) is exactly zero.

    Args:
        a: ``[T, K]`` rows, ``T * top_k`` being the layout's number of routes; bfloat16, float16, float32, float64.
        b: ``[E, N, K]`` weights of the experts that ``layout.expert_ids`` names, same dtype; blocks named ``-1`` or
            beyond ``E`` give zeros.
        layout: from :func:`moealign.align`, :func:`moealign.align_batched` (then ``top_k=1``), or of the three tensors
            of vLLM's function, ``BlockLayout(*tensors, block_size=B)``.
        top_k: routes a row of `a`: route ``i`` reads row ``i // top_k``.
        row_weights: ``[n]`` or ``[T, top_k]`` factor of each output row, any floating dtype.
        bias: ``[E, N]``, added before the activation.
        activation: ``silu``, ``gelu``, ``gelu_tanh``, ``relu``, ``relu2`` on the columns, or with ``_mul`` behind it
            (``silu_mul``) on the first half of them, times the second: the output then has ``N / 2`` columns.
        transposed: `b` is ``[E, K, N]``.
        out: ``[n, N]`` contiguous buffer of a's dtype for the result; not together with gradients.
        backend: ``triton`` or ``packed``; by default the device, the dtype and whether gradients are wanted decide.

    Returns:
        ``[n, N]`` in the order of the routes, ``n`` being ``T * top_k``.  Differentiable in `a`, `b`, `row_weights`
        and `bias`.

    Raises:
        InvalidInput, InvalidType: shapes, dtypes or devices that do not belong together.
        BackendUnavailable: the backend named cannot take this call.
    """
    x, weights, added = modes.in_autocast_dtype(a, b, bias)
    facts = modes.checked(_check, x, weights, added, layout, top_k, row_weights, activation, transposed)
    if isinstance(facts, modes.Refusal):
        return modes.refuse(facts)[0]
    name, gated, routes, width = facts
    wanted = modes.forward_mode() or modes.wants_gradient(x, weights, added, row_weights)
    if out is not None:
        refusal = modes.checked(_check_out, out, a, routes, width, wanted)
        if isinstance(refusal, modes.Refusal):
            return modes.refuse(refusal)[0]
    chosen = choose(x, backend, wanted, layout.block_size)
    blocks = (layout.sorted_token_ids, layout.expert_ids, layout.num_tokens_post_padded)
    product = (x, weights, *blocks, top_k, layout.block_size, row_weights, added, name, gated, transposed)
    if modes.watched(x, weights, added, row_weights, *blocks):
        through = torch.ops.moealign.grouped_gemm
        result: Tensor = modes.call(_formula if backend == "packed" else through, *product)
    elif chosen == "packed":
        result = _formula(*product)
    elif out is not None and x is a:
        _fill(*product, out=out.zero_())
        return out
    else:
        result = _op(*product)
    if out is not None:
        return out.copy_(result)
    return result.to(a.dtype)


def _check(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    layout: BlockLayout,
    top_k: int,
    row_weights: Tensor | None,
    activation: str | None,
    transposed: bool,
) -> tuple[str | None, bool, int, int]:
    """The activation, whether it has a gate, routes and columns; every refusal but the backend's."""
    floats = {"a": a, "b": b, "bias": bias}
    check_floats(floats, a, same_dtype=True)
    check_floats({"row_weights": row_weights}, a, same_dtype=False)
    if not isinstance(layout, BlockLayout):
        raise InvalidType(f"layout: expected a BlockLayout, got {type(layout).__name__}; moealign.align makes one")
    if layout.block_size < 1:
        raise InvalidInput("layout: expected its block_size, got none; BlockLayout(..., block_size=B) says it")
    for field in REQUIRED:
        check_index("layout." + field, getattr(layout, field), a.device)
    if a.dim() != 2 or b.dim() != 3:
        raise InvalidInput(f"a, b: expected [T, K] and [E, N, K], got {list(a.shape)} and {list(b.shape)}")
    inner, columns = (b.shape[1], b.shape[2]) if transposed else (b.shape[2], b.shape[1])
    if a.shape[1] != inner:
        raise InvalidInput(f"b: expected [E, N, {a.shape[1]}] as a has so many columns, got {list(b.shape)}" + _hint(b))
    if type(top_k) is not int or top_k < 1:
        raise InvalidInput(f"top_k: expected an int of at least 1, got {top_k!r}")
    routes = a.shape[0] * top_k
    if layout.num_routes and layout.num_routes != routes:
        raise InvalidInput(
            f"top_k: expected {layout.num_routes} routes as in the layout, got {a.shape[0]} rows times top_k = {top_k}"
        )
    if row_weights is not None and row_weights.numel() != routes:
        raise InvalidInput(f"row_weights: expected {routes} elements, one a route, got {list(row_weights.shape)}")
    if bias is not None and list(bias.shape) != [b.shape[0], columns]:
        raise InvalidInput(f"bias: expected [E, N] = [{b.shape[0]}, {columns}], got {list(bias.shape)}")
    name, gated = (activation.removesuffix("_mul"), activation.endswith("_mul")) if activation else (None, False)
    if activation is not None:
        check_activation(name, gated)
    if gated and columns % 2:
        raise InvalidInput(f"activation: expected an even N for {activation}, got {columns}")
    return name, gated, routes, columns // 2 if gated else columns


def _check_out(out: Tensor, a: Tensor, routes: int, width: int, gradients: bool) -> None:
    if not isinstance(out, Tensor):
        raise InvalidType(f"out: expected a torch.Tensor, got {type(out).__name__}")
    if list(out.shape) != [routes, width] or out.dtype is not a.dtype or not out.is_contiguous():
        raise InvalidInput(f"out: expected a contiguous [{routes}, {width}] of {a.dtype}, got {list(out.shape)}")
    if out.device != a.device:
        raise InvalidInput(f"out: expected a buffer on {a.device} like the rows, got {out.device}")
    if gradients:
        raise InvalidInput("out: expected no buffer where gradients are wanted, got one; use torch.no_grad()")
    if modes.transformed():
        raise InvalidInput("out: expected no buffer inside torch.func transforms, got one; leave it out")


def _hint(b: Tensor) -> str:
    return "; transposed=True takes [E, K, N]" if b.shape[1] != b.shape[2] else ""


def check_floats(tensors: dict[str, Tensor | None], like: Tensor, *, same_dtype: bool) -> None:
    """Every tensor is a floating one of a known dtype, on the device of `like`, and of its dtype if so wanted."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        check_plain(name, tensor)
        if tensor.dtype not in _FLOATS:
            raise InvalidType(f"{name}: expected bfloat16, float16, float32 or float64, got {tensor.dtype}")
        if same_dtype and tensor.dtype is not like.dtype:
            raise InvalidType(f"{name}: expected {like.dtype} like the rows, got {tensor.dtype}; convert one of them")
        if tensor.device != like.device:
            raise InvalidInput(f"{name}: expected a tensor on {like.device} like the rows, got {tensor.device}")


def check_ids(topk_ids: Tensor, weights: Tensor, expert_map: Tensor | None, num_valid_tokens: Tensor | None) -> None:
    """The ids of a layer whose first projection is `weights` lie beside it, and :func:`moealign.align` takes them.

    An eager call without options leaves the second to that function, which is the first thing it calls.
    """
    if not isinstance(topk_ids, Tensor) or topk_ids.device != weights.device:
        check_plain("topk_ids", topk_ids)
        raise InvalidInput(f"topk_ids: expected a tensor on {weights.device} like the rows, got {topk_ids.device}")
    if expert_map is None and num_valid_tokens is None and not modes.watched(topk_ids, weights):
        return
    experts = weights.shape[0] if weights.dim() else 0
    if isinstance(expert_map, Tensor) and expert_map.dim() == 1:
        experts = expert_map.shape[0]
    check_align(topk_ids, 1, experts, expert_map, False, True, num_valid_tokens, None, ())


def check_activation(name: object, gated: bool) -> None:
    """`name` is one of :data:`packed.ACTIVATIONS`."""
    if (name, gated) not in packed.ACTIVATIONS:
        raise InvalidInput(
            f"activation: expected one of {packed.names(list(packed.ACTIVATIONS))}, got {name!r}; "
            "moealign.fused_moe also takes a callable on the rows of the first product"
        )


def choose(a: Tensor, backend: str | None, gradients: bool, block_size: int | None = None) -> str:
    """``triton`` where it runs, takes the dtype and the blocks, and no gradients are wanted; else ``packed``."""
    if backend is not None and backend not in BACKENDS:
        raise BackendUnavailable(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "packed":
        return backend
    reason = "it gives no gradients; call it under torch.no_grad()" if gradients else kernels.refuses(a)
    if reason is None and block_size is not None and block_size not in kernels.BLOCK_SIZES:
        reason = f"it takes blocks of {', '.join(map(str, kernels.BLOCK_SIZES))} rows, these are of {block_size}"
    if reason is None:
        return "triton"
    if backend is not None:
        raise BackendUnavailable(f"backend: expected one that can take this call, got {backend!r}: {reason}")
    return "packed"


def _formula(
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
) -> Tensor:
    routes = a.shape[0] * top_k
    layout = (sorted_token_ids, expert_ids, num_tokens_post_padded)
    order, positions, ends = _compacted(*layout, block_size, b.shape[0], routes)
    product = packed.grouped_mm(packed.gather_rows(a, order, positions, top_k), b, ends, transposed)
    if bias is not None:
        product = product + packed.bias_rows(bias, ends, order.shape[0])
    if activation is not None:
        product = packed.ACTIVATIONS[activation, gated](product)
    product = packed.scatter_rows(product, order, positions)
    if row_weights is not None:
        factor = row_weights.reshape(-1).masked_fill(positions < 0, 0)
        product = (product * factor.unsqueeze(1)).to(a.dtype)
    return product


def _compacted(
    sorted_token_ids: Tensor,
    expert_ids: Tensor,
    num_tokens_post_padded: Tensor,
    block_size: int,
    experts: int,
    routes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The packed order of a layout: `order` ``[n]``, routes by expert and `n` behind them; the row of each route
    ``[n]``, -1 for one that no expert has; the ends of the experts' rows ``[E]``.  Sizes by shapes alone."""
    length = sorted_token_ids.shape[0]
    numbers = torch.arange(length, device=sorted_token_ids.device)
    owners = expert_ids.to(torch.int64)
    if owners.shape[0]:
        owners = owners.index_select(0, (numbers // block_size).clamp(max=owners.shape[0] - 1))
    listed = sorted_token_ids.to(torch.int64)
    kept = (numbers < num_tokens_post_padded) & (listed >= 0) & (listed < routes) & (owners >= 0) & (owners < experts)
    by_expert, at = torch.sort(torch.where(kept, owners, experts), stable=True)
    order = torch.where(by_expert < experts, listed.index_select(0, at), routes)
    if length < routes:  # fewer rows than routes: the rest are dropped
        order = torch.cat([order, order.new_full((routes - length,), routes)])
    order = order[:routes]
    ends = torch.searchsorted(by_expert, torch.arange(experts, device=at.device), right=True).to(torch.int32)
    rows = torch.arange(order.shape[0], device=order.device)
    positions = torch.full((routes + 1,), -1, dtype=torch.int64, device=order.device).scatter(0, order, rows)
    return order, positions[:routes], ends


# ---- the operator --------------------------------------------------------------------------------------------------

_library = torch.library.Library("moealign", "FRAGMENT")
_PRODUCT = (
    "Tensor a, Tensor b, Tensor sorted_token_ids, Tensor expert_ids, Tensor num_tokens_post_padded, "
    "int top_k, int block_size, Tensor? row_weights, Tensor? bias, str? activation, bool gated, bool transposed"
)
_library.define(f"grouped_gemm({_PRODUCT}) -> Tensor")
_library.define(f"grouped_gemm.out({_PRODUCT}, *, Tensor(a!) out) -> ()")


def _op(
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
) -> Tensor:
    layout = (sorted_token_ids, expert_ids, num_tokens_post_padded)
    options: tuple[Any, ...] = (top_k, block_size, row_weights, bias, activation, gated, transposed)
    if choose(a, None, False, block_size) == "packed":
        return _formula(a, b, *layout, *options)
    out = a.new_zeros(a.shape[0] * top_k, _width(b, gated, transposed))
    _fill(a, b, *layout, *options, out=out)
    return out


def _width(b: Tensor, gated: bool, transposed: bool) -> int:
    columns = b.shape[2 if transposed else 1]
    return columns // 2 if gated else columns


def _fill(
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
    *,
    out: Tensor,
) -> None:
    """Fill the rows of `out` that the layout names."""
    layout = (sorted_token_ids, expert_ids, num_tokens_post_padded)
    if choose(a, None, False, block_size) == "packed" or not b.numel():
        options: tuple[Any, ...] = (top_k, block_size, row_weights, bias, activation, gated, transposed)
        out.copy_(_formula(a, b, *layout, *options))
    elif out.numel():
        blocks = BlockLayout(*layout, block_size=block_size)
        kernels.grouped_gemm(a, b, blocks, top_k, row_weights, bias, activation, gated, transposed, out)


def _fake(a: Tensor, b: Tensor, *args: Any) -> Tensor:
    return a.new_empty(a.shape[0] * args[3], _width(b, args[8], args[9]))


def _fake_out(*args: Any, **kwargs: Any) -> None:
    return None


def _flops(a: Any, b: Any, sorted_ids: Any, expert_ids: Any, total: Any, top_k: int, *_: Any, **__: Any) -> int:
    return 2 * int(a[0] * top_k * math.prod(b[1:]))


_library.impl("grouped_gemm", _op, "CompositeExplicitAutograd")
_library.impl("grouped_gemm.out", _fill, "CompositeExplicitAutograd")
torch.library.register_fake("moealign::grouped_gemm", _fake, lib=_library)
torch.library.register_fake("moealign::grouped_gemm.out", _fake_out, lib=_library)
modes.differentiable(_library, "grouped_gemm", _formula)
modes.batched(_library, "grouped_gemm")
modes.flops("grouped_gemm", _flops)
