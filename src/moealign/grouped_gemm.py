"""One product an expert over a block-aligned layout: what a layout is for.

On a GPU one launch of the kernels in ``backends/triton/gemm.py``; on a CPU, in float64, and where gradients are
wanted, one ``torch.mm`` an expert over rows packed by expert (``backends/packed.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import packed
from .backends.triton import experts as kernels
from .errors import BackendUnavailable, InvalidInput, InvalidType
from .layout import BlockLayout

__all__ = ["check_activation", "check_floats", "choose", "grouped_gemm"]

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
        and `bias`; the way there reads the layout on the host.

    Raises:
        InvalidInput, InvalidType: shapes, dtypes or devices that do not belong together.
        BackendUnavailable: the backend named cannot take this call.
    """
    floats = {"a": a, "b": b, "bias": bias}
    check_floats(floats, a, same_dtype=True)
    check_floats({"row_weights": row_weights}, a, same_dtype=False)
    if not isinstance(layout, BlockLayout):
        raise InvalidType(f"layout: expected a BlockLayout, got {type(layout).__name__}; moealign.align makes one")
    if layout.block_size < 1:
        raise InvalidInput("layout: expected its block_size, got none; BlockLayout(..., block_size=B) says it")
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
    width = columns // 2 if gated else columns
    gradients = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (a, b, bias, row_weights)
    )
    if out is not None:
        if list(out.shape) != [routes, width] or out.dtype is not a.dtype or not out.is_contiguous():
            raise InvalidInput(f"out: expected a contiguous [{routes}, {width}] of {a.dtype}, got {list(out.shape)}")
        if gradients:
            raise InvalidInput("out: expected no buffer where gradients are wanted, got one; use torch.no_grad()")
    chosen = choose(a, backend, gradients)
    if chosen == "packed":
        result = _packed(a, b, layout, top_k, row_weights, bias, name, gated, transposed, routes)
        return result if out is None else out.copy_(result)
    block_size = layout.block_size
    result = a.new_zeros(routes, width) if out is None else out.zero_()
    if routes and width:
        torch.ops.moealign.grouped_gemm.out(
            a,
            b,
            layout.sorted_token_ids,
            layout.expert_ids,
            layout.num_tokens_post_padded,
            top_k,
            block_size,
            row_weights,
            bias,
            name,
            gated,
            transposed,
            out=result,
        )
    return result


def _hint(b: Tensor) -> str:
    return "; transposed=True takes [E, K, N]" if b.shape[1] != b.shape[2] else ""


def check_floats(tensors: dict[str, Tensor | None], like: Tensor, *, same_dtype: bool) -> None:
    """Every tensor is a floating one of a known dtype, on the device of `like`, and of its dtype if so wanted."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise InvalidType(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in _FLOATS:
            raise InvalidType(f"{name}: expected bfloat16, float16, float32 or float64, got {tensor.dtype}")
        if same_dtype and tensor.dtype is not like.dtype:
            raise InvalidType(f"{name}: expected {like.dtype} like the rows, got {tensor.dtype}; convert one of them")
        if tensor.device != like.device:
            raise InvalidInput(f"{name}: expected a tensor on {like.device} like the rows, got {tensor.device}")


def check_activation(name: object, gated: bool) -> None:
    """`name` is one of :data:`packed.ACTIVATIONS`."""
    if (name, gated) not in packed.ACTIVATIONS:
        raise InvalidInput(
            f"activation: expected one of {packed.names(list(packed.ACTIVATIONS))}, got {name!r}; "
            "moealign.fused_moe also takes a callable on the rows of the first product"
        )


def choose(a: Tensor, backend: str | None, gradients: bool) -> str:
    """``triton`` where it runs, takes the dtype and no gradients are wanted; else ``packed``."""
    if backend is not None and backend not in BACKENDS:
        raise BackendUnavailable(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "packed":
        return backend
    reason = "it gives no gradients; call it under torch.no_grad()" if gradients else kernels.refuses(a)
    if reason is None:
        return "triton"
    if backend is not None:
        raise BackendUnavailable(f"backend: expected one that can take this call, got {backend!r}: {reason}")
    return "packed"


def _packed(
    a: Tensor,
    b: Tensor,
    layout: BlockLayout,
    top_k: int,
    row_weights: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    gated: bool,
    transposed: bool,
    routes: int,
) -> Tensor:
    order, ends = _compacted(layout, b.shape[0], routes)
    rows = a.index_select(0, order // top_k)
    product = packed.grouped_mm(rows, b, ends, transposed)
    if bias is not None:
        product = product + packed.bias_rows(bias, ends, len(order))
    if activation is not None:
        product = packed.ACTIVATIONS[activation, gated](product)
    if row_weights is not None:
        factor = row_weights.reshape(-1).index_select(0, order).unsqueeze(1)
        product = (product * factor).to(a.dtype)
    return product.new_zeros(routes, product.shape[1]).index_copy(0, order, product)


def _compacted(layout: BlockLayout, experts: int, routes: int) -> tuple[Tensor, Tensor]:
    """Routes without the padding, by ascending expert, and the ends of the experts' rows.  Reads the device."""
    size = layout.block_size
    sorted_ids = layout.sorted_token_ids
    used = min(int(layout.num_tokens_post_padded), sorted_ids.numel())
    owners = layout.expert_ids[: -(-used // size)].long().repeat_interleave(size)[:used]
    listed = sorted_ids[:used].long()
    kept = (listed >= 0) & (listed < routes) & (owners >= 0) & (owners < experts)
    listed, owners = listed[kept], owners[kept]
    by_expert = torch.argsort(owners, stable=True)
    ends = torch.bincount(owners, minlength=experts).cumsum(0).to(torch.int32)
    return listed[by_expert], ends


# ---- the operator --------------------------------------------------------------------------------------------------

_library = torch.library.Library("moealign", "FRAGMENT")
_library.define(
    "grouped_gemm.out(Tensor a, Tensor b, Tensor sorted_token_ids, Tensor expert_ids, Tensor num_tokens_post_padded, "
    "int top_k, int block_size, Tensor? row_weights, Tensor? bias, str? activation, bool gated, bool transposed, *, "
    "Tensor(a!) out) -> ()"
)


def _op_out(
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
    layout = BlockLayout(sorted_token_ids, expert_ids, num_tokens_post_padded, block_size=block_size)
    if kernels.refuses(a) is not None:  # traced for a GPU on which Triton turns out not to be installed
        routes = a.shape[0] * top_k
        out.copy_(_packed(a, b, layout, top_k, row_weights, bias, activation, gated, transposed, routes))
        return
    kernels.grouped_gemm(a, b, layout, top_k, row_weights, bias, activation, gated, transposed, out)


def _fake_out(*args: Any, **kwargs: Any) -> None:
    return None


_library.impl("grouped_gemm.out", _op_out, "CompositeExplicitAutograd")
torch.library.register_fake("moealign::grouped_gemm.out", _fake_out, lib=_library)
