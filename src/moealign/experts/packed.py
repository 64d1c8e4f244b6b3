"""The ``packed`` path, in plain torch: rows sorted by expert without padding, and one product per expert.

It serves CPUs, float64 and every call that needs gradients, and is the reference for the kernels.  The packed order is
a layout with ``block_size=1``; its ``group_ends`` are the ends of the experts' rows.  The products are
``torch.nn.functional.grouped_mm`` where it is faster and does not synchronise, else one ``torch.mm`` per expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .. import modes
from ..errors import InvalidInput
from ..layout import BlockLayout
from . import quantized
from .activations import Rows, function_of
from .checks import check_accumulation
from .records import ExpertWeights, Product, Routes

__all__ = [
    "apply_callable",
    "bias_rows",
    "gather",
    "gather_rows",
    "grouped_mm",
    "grouped_mm_eager",
    "grouped_mm_weights_eager",
    "loops_over_experts",
    "named_routes",
    "pack_layout",
    "run_expert_by_expert",
    "run_layer",
    "run_product",
    "run_tokens",
    "run_training",
    "scatter",
    "scatter_rows",
    "spans",
    "weighted_sum",
]


# ---- a layer, a product ----------------------------------------------------------------------------------------------


def run_layer(
    hidden_states: Tensor,
    weights: ExpertWeights,
    routes: Routes,
    apply: Rows,
    output_rows: Rows | None = None,
    zero_dropped_rows: bool = False,
) -> Tensor:
    """A layer of experts, ``[T, H]``.

    Args:
        apply: the activation, from ``[rows, 2I]`` or ``[rows, I]`` to ``[rows, I]``.
        output_rows: applied to the rows of the second product, ``[rows, H]``.
        zero_dropped_rows: pass rows of dropped routes to the callables as zeros, as these may have parameters.
    """
    top_k, experts = routes.ids.shape[1], weights.experts()
    layout = routes.layout(1, experts, group_ends=True)
    ends, positions, order = layout.group_ends, layout.positions, layout.sorted_token_ids
    assert ends is not None
    assert positions is not None
    if routes.expert_map is not None and routes.expert_map.shape[0] > experts:
        # The map may name local experts that have no weights.
        positions = torch.where(positions < ends[experts - 1], positions, -1)
        has_weights = torch.arange(order.shape[0], device=order.device) < ends[experts - 1]
        order = torch.where(has_weights, order, order.shape[0])
    ends = ends[:experts]
    tensors = (hidden_states, weights.gate_up, weights.down, routes.weights, weights.gate_up_bias, weights.down_bias)
    present = [each for each in tensors if each is not None]
    by_expert = weights.quantized is None and not zero_dropped_rows
    if by_expert and loops_over_experts(order.shape[0], experts, *present):
        rows = run_expert_by_expert(hidden_states, weights, routes, order, ends, apply)
        return _sum(rows.view(*routes.ids.shape, rows.shape[1]), rows.dtype)
    rows = gather_rows(hidden_states, order, positions, top_k)
    rows = _multiply(rows, weights, 0, ends)
    if zero_dropped_rows:
        past = (torch.arange(order.shape[0], device=order.device) >= ends[-1]).unsqueeze(1)
        rows = rows.masked_fill(past, 0)
    if weights.gate_up_bias is not None:
        rows = rows + bias_rows(weights.gate_up_bias, ends, rows.shape[0])
    rows = apply_callable("activation", apply, rows, weights.inner())
    rows = _multiply(rows.to(hidden_states.dtype), weights, 1, ends)
    if zero_dropped_rows:
        rows = rows.masked_fill(past, 0)
    if weights.down_bias is not None:
        rows = rows + bias_rows(weights.down_bias, ends, rows.shape[0])
    if output_rows is not None:
        rows = apply_callable("output_rows", output_rows, rows, hidden_states.shape[1])
    result = weighted_sum(scatter_rows(rows, order, positions), routes.weights, positions)
    return result.to(hidden_states.dtype)


def _multiply(rows: Tensor, weights: ExpertWeights, which: int, ends: Tensor) -> Tensor:
    """The first (0) or the second (1) product of a layer, ``[R, N]``; float32 with quantised weights."""
    if weights.quantized is not None:
        return quantized.multiply(rows, weights.quantized[which], spans(ends, weights.experts(), rows.shape[0]))
    return grouped_mm(rows, (weights.gate_up, weights.down)[which], ends, weights.transposed)


def run_training(
    hidden_states: Tensor,
    weights: ExpertWeights,
    routes: Routes,
    apply: Rows,
    recompute: bool = False,
    gate_up_grad: Tensor | None = None,
    down_grad: Tensor | None = None,
    batch_invariant: bool = False,
    *options: Any,
) -> Tensor:
    """:func:`run_layer` or, if `batch_invariant`, :func:`run_tokens`.

    Its backward computes the rows again if `recompute`, and adds the gradients of the projections to `gate_up_grad` and
    `down_grad`.  While a call is traced, the compiler decides what is kept.
    """
    run = run_tokens if batch_invariant else run_layer
    if gate_up_grad is not None and down_grad is not None:
        into = (_AddToBuffer.apply(weights.gate_up, gate_up_grad), _AddToBuffer.apply(weights.down, down_grad))  # type: ignore[no-untyped-call]
        weights = weights._replace(gate_up=into[0], down=into[1])
    call = (hidden_states, weights, routes, apply, *options)
    if not recompute or not torch.is_grad_enabled() or modes.followed():
        return run(*call)
    result: Tensor = checkpoint(run, *call, use_reentrant=False, preserve_rng_state=False)
    return result


def run_tokens(hidden_states: Tensor, weights: ExpertWeights, routes: Routes, apply: Rows, *options: Any) -> Tensor:
    """:func:`run_layer` of one token after the other: how a matrix product rounds a row depends on the other rows."""
    tokens = routes.ids.shape[0]
    ids = routes.ids
    if routes.num_valid_tokens is not None:
        valid = torch.arange(tokens, device=ids.device) < routes.num_valid_tokens
        ids = torch.where(valid.unsqueeze(1), ids.to(torch.int64), -1)
    rows = [
        run_layer(
            hidden_states[token : token + 1],
            weights,
            Routes(routes.weights[token : token + 1], ids[token : token + 1], routes.expert_map),
            apply,
            *options,
        )
        for token in range(tokens)
    ]
    return torch.cat(rows) if rows else run_layer(hidden_states, weights, routes, apply, *options)


class _AddToBuffer(torch.autograd.Function):
    """The identity, whose backward adds the gradient to a buffer."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, buffer: Tensor) -> Tensor:
        ctx.buffer = buffer
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        check_accumulation(grad)
        ctx.buffer.add_(grad)
        return None, None


def apply_callable(name: str, function: Rows, rows: Tensor, columns: int) -> Tensor:
    """``function(rows)``, ``[rows, columns]`` in the dtype of `rows`.

    Raises:
        InvalidInput: the callable returned another shape.
    """
    result = function(rows)
    if not isinstance(result, Tensor) or result.dim() != 2 or result.shape != (rows.shape[0], columns):
        got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise InvalidInput(f"{name}: expected [{rows.shape[0]}, {columns}] from the callable, got {got}")
    return result.to(rows.dtype)


def weighted_sum(rows: Tensor, weights: Tensor, positions: Tensor) -> Tensor:
    """``[T * k, H]`` rows times ``[T, k]`` weights, summed over k.  The weight of a dropped route may be NaN."""
    tokens, top_k = weights.shape
    weights = weights.masked_fill((positions < 0).view(tokens, top_k), 0)
    return _sum(rows.view(tokens, top_k, rows.shape[1]) * weights.unsqueeze(-1), rows.dtype)


def _sum(weighted: Tensor, dtype: torch.dtype) -> Tensor:
    """``[T, k, H]`` summed over k, at least in float32."""
    return weighted.sum(1, dtype=torch.promote_types(weighted.dtype, torch.float32)).to(dtype)


def run_product(product: Product) -> Tensor:
    """:func:`moealign.grouped_gemm`, ``[n, N]``."""
    a, b, transposed = product.a, product.b, product.transposed
    assert product.layout is not None
    order, positions, ends = pack_layout(product.layout, a.shape[0] * product.top_k, b.shape[0])
    rows = gather_rows(a, order, positions, product.top_k)
    if product.quantized is None:
        rows = grouped_mm(rows, b, ends, transposed)
    else:
        rows = quantized.multiply(rows, product.quantized, spans(ends, b.shape[0], rows.shape[0]))
    if product.bias is not None:
        rows = rows + bias_rows(product.bias, ends, order.shape[0])
    if product.activation is not None:
        rows = function_of(product.activation, product.gated)(rows)
    rows = scatter_rows(rows, order, positions)
    if product.row_weights is not None:
        factor = product.row_weights.reshape(-1).masked_fill(positions < 0, 0)
        rows = rows * factor.unsqueeze(1)
    return rows.to(a.dtype)


def named_routes(layout: BlockLayout, routes: int, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of a padded layout: its route, the expert of its block, and whether these are a route below `routes`
    and an expert below `experts`."""
    listed, owners = layout.sorted_token_ids.to(torch.int64), layout.expert_ids.to(torch.int64)
    numbers = torch.arange(listed.shape[0], device=listed.device)
    if owners.shape[0]:
        owners = owners.index_select(0, (numbers // layout.block_size).clamp(max=owners.shape[0] - 1))
    else:
        owners = torch.full_like(listed, -1)
    kept = (numbers < layout.num_tokens_post_padded) & (listed >= 0) & (listed < routes)
    return listed, owners, kept & (owners >= 0) & (owners < experts)


def pack_layout(layout: BlockLayout, routes: int, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The packed order of a padded layout, by sizes that follow from shapes alone.

    Returns:
        Routes by expert, then ``n`` for those without one, ``[n]``; the packed row of each route, or -1, ``[n]``; the
        ends of the experts' rows, ``[E]``.
    """
    length = layout.sorted_token_ids.shape[0]
    listed, owners, kept = named_routes(layout, routes, experts)
    by_expert, at = torch.sort(torch.where(kept, owners, experts), stable=True)
    order = torch.where(by_expert < experts, listed.index_select(0, at), routes)
    if length < routes:  # routes that the layout does not list are dropped
        order = torch.cat([order, order.new_full((routes - length,), routes)])
    order = order[:routes]
    ends = torch.searchsorted(by_expert, torch.arange(experts, device=at.device), right=True).to(torch.int32)
    rows = torch.arange(order.shape[0], device=order.device)
    positions = torch.full((routes + 1,), -1, dtype=torch.int64, device=order.device).scatter(0, order, rows)
    return order, positions[:routes], ends


# ---- products --------------------------------------------------------------------------------------------------------

FEW_ROWS = 64  # on a CPU, torch's own loop over experts is faster below this many rows per expert


def grouped_mm(rows: Tensor, weights: Tensor, ends: Tensor, transposed: bool = False) -> Tensor:
    """Multiply ``[R, K]`` rows by their expert's weights, ``[E, N, K]`` or transposed ``[E, K, N]``: ``[R, N]``.

    Rows ``ends[e-1] .. ends[e]-1`` belong to expert ``e``; rows from ``ends[E-1]`` on are undefined in the result.
    Differentiable in rows and weights.  Calls the operator only when something traces the call or needs gradients.
    """
    if _is_eager(rows, weights):
        return grouped_mm_eager(rows, weights, ends, transposed)
    result: Tensor = modes.call(torch.ops.moealign.grouped_mm, rows, weights, ends, transposed)
    return result


def _is_eager(*tensors: Tensor) -> bool:
    """Whether only the values matter: nothing traces the call or needs gradients."""
    if modes.watched(*tensors) or modes.forward_mode() or modes.wants_gradient(*tensors):
        return False
    return not any(map(modes.is_batched_gradient, tensors))


def _takes_grouped_mm(left: Tensor, right: Tensor, *sizes: int) -> bool:
    """Whether ``F.grouped_mm`` supports these tensors: rows and columns must be multiples of 16 bytes."""
    if left.device.type == "cuda":
        if torch.version.hip is not None or left.dtype is not torch.bfloat16:
            return False
        if torch.cuda.get_device_capability(left.device) < (8, 0):
            return False
    elif left.device.type != "cpu" or left.dtype is torch.float64:
        return False
    even = all(size and size * left.element_size() % 16 == 0 for size in sizes)
    return even and left.data_ptr() % 16 == 0 and right.data_ptr() % 16 == 0


def spans(ends: Tensor, experts: int, rows: int) -> list[tuple[int, int, int]]:
    """(expert, first row, end) of each expert with rows.  Synchronises with the device unless `rows` is 0."""
    if not rows:
        return []
    result, start = [], 0
    for expert, end in enumerate(ends.tolist()[:experts]):
        if end > start:
            result.append((expert, start, end))
        start = max(end, start)
    return result


def grouped_mm_eager(rows: Tensor, weights: Tensor, ends: Tensor, transposed: bool = False) -> Tensor:
    """:func:`grouped_mm` on plain tensors."""
    right = weights if transposed else weights.transpose(-2, -1)
    faster = rows.device.type == "cuda" or rows.shape[0] < FEW_ROWS * weights.shape[0]
    if rows.shape[0] and faster and _takes_grouped_mm(rows, right, *right.shape[-2:]):
        return F.grouped_mm(_dense(rows), _dense(right), offs=ends[: weights.shape[0]])
    out = rows.new_zeros(rows.shape[0], right.shape[-1])
    for expert, start, end in spans(ends, weights.shape[0], rows.shape[0]):
        torch.mm(rows[start:end], right[expert], out=out[start:end])
    return out


def grouped_mm_weights_eager(grads: Tensor, rows: Tensor, ends: Tensor, experts: int) -> Tensor:
    """``grads.T @ rows`` over the rows of each expert, ``[E, N, K]``; zero for an expert without rows."""
    if rows.device.type == "cuda" and rows.shape[0] and _takes_grouped_mm(grads, rows, grads.shape[1], rows.shape[1]):
        product = F.grouped_mm(grads.contiguous().transpose(0, 1), rows.contiguous(), offs=ends[:experts])
        empty = torch.diff(ends[:experts], prepend=ends.new_zeros(1)) == 0
        return product.masked_fill_(empty.view(-1, 1, 1), 0)  # torch leaves the result of an empty group undefined
    out = rows.new_empty(experts, grads.shape[1], rows.shape[1])
    first = 0
    for expert, start, end in spans(ends, experts, rows.shape[0]):
        out[first:expert].zero_()  # those without rows
        torch.mm(grads[start:end].T, rows[start:end], out=out[expert])
        first = expert + 1
    out[first:].zero_()
    return out


def _dense(tensor: Tensor) -> Tensor:
    """`tensor`, copied unless one of its last two axes is contiguous: ``F.grouped_mm`` refuses expanded gradients."""
    rows, columns = tensor.shape[-2:]
    if tensor.stride(-1) == 1 and tensor.stride(-2) >= columns:
        return tensor
    if tensor.stride(-2) == 1 and tensor.stride(-1) >= rows:
        return tensor
    return tensor.contiguous()


# ---- one expert at a time --------------------------------------------------------------------------------------------


def loops_over_experts(rows: int, experts: int, *tensors: Tensor) -> bool:
    """Whether to use :func:`run_expert_by_expert`: on a CPU, with many rows per expert and no gradients."""
    if not _is_eager(*tensors):  # first, as a traced size must not be compared
        return False
    return rows >= FEW_ROWS * experts and all(tensor.device.type == "cpu" for tensor in tensors)


def run_expert_by_expert(
    hidden_states: Tensor, weights: ExpertWeights, routes: Routes, order: Tensor, ends: Tensor, apply: Rows
) -> Tensor:
    """The weighted output row of each route, ``[n, H]``; zero for a dropped route.

    The intermediate rows of one expert stay in the CPU's cache.  Those of all experts at once would be written to
    memory and read again five times.
    """
    top_k, factors = routes.weights.shape[1], routes.weights.reshape(-1)
    out = hidden_states.new_zeros(len(factors), hidden_states.shape[1])

    def multiply(rows: Tensor, right: Tensor, bias: Tensor | None, expert: int) -> Tensor:
        rows = torch.mm(rows, right[expert] if weights.transposed else right[expert].T)
        return rows if bias is None else rows.add_(bias[expert])

    for expert, start, end in spans(ends, weights.gate_up.shape[0], order.shape[0]):
        numbers = order[start:end].to(torch.int64)
        rows = hidden_states.index_select(0, numbers // top_k)
        rows = apply(multiply(rows, weights.gate_up, weights.gate_up_bias, expert))
        rows = multiply(rows, weights.down, weights.down_bias, expert)
        out.index_copy_(0, numbers, rows.mul_(factors[numbers].unsqueeze(1)))
    return out


# ---- rows ------------------------------------------------------------------------------------------------------------


def gather_rows(source: Tensor, routes: Tensor, positions: Tensor, top_k: int) -> Tensor:
    """``source[routes // top_k]``: ``[T, K]`` to ``[R, K]``.

    Rows of the sentinel ``n`` repeat the last token.  The gradient is gathered by `positions` ``[n]`` and summed over
    ``top_k``, without atomics: the same bits in every run.
    """
    if _is_eager(source):
        return gather(source, routes, positions, top_k)
    result: Tensor = modes.call(torch.ops.moealign.gather_rows, source, routes, positions, top_k, False)
    return result


def gather(source: Tensor, routes: Tensor, positions: Tensor, top_k: int) -> Tensor:
    """:func:`gather_rows` in torch's operations; without tokens, zeros."""
    if not source.shape[0]:
        return source.new_zeros(routes.shape[0], source.shape[1])
    return source.index_select(0, routes.clamp(max=positions.shape[0] - 1) // top_k)


def scatter_rows(rows: Tensor, routes: Tensor, positions: Tensor) -> Tensor:
    """``rows[positions]``, ``[n, K]``: from the packed order to the order of the routes; zero for dropped routes."""
    if _is_eager(rows):
        return scatter(rows, routes, positions)
    result: Tensor = modes.call(torch.ops.moealign.scatter_rows, rows, routes, positions)
    return result


def scatter(rows: Tensor, routes: Tensor, positions: Tensor) -> Tensor:
    """:func:`scatter_rows` on plain tensors."""
    gathered = rows.index_select(0, positions.clamp(min=0))
    return gathered.masked_fill_((positions < 0).unsqueeze(1), 0)


def bias_rows(bias: Tensor, ends: Tensor, rows: int) -> Tensor:
    """The bias of each packed row, ``[rows, N]``; zero past the last expert's rows, so that they get no gradient."""
    numbers = torch.arange(rows, dtype=ends.dtype, device=ends.device)
    owners = torch.searchsorted(ends[: bias.shape[0]].contiguous(), numbers, right=True)
    return torch.cat([bias, bias.new_zeros(1, bias.shape[1])]).index_select(0, owners)
