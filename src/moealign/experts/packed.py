"""Expert computation in plain torch, on any device and with gradients: rows packed by expert, one product an expert.

What CPUs use, what every call uses that needs gradients, and the reference for the kernels.  Rows of the packed order
are routes sorted by expert without padding: a layout with ``block_size=1``, its ``group_ends`` being the ends of the
experts' rows.  The products are ``torch.nn.functional.grouped_mm`` on an NVIDIA GPU in bfloat16, where it waits for
nothing, and on a CPU for a few rows an expert; elsewhere ``torch.mm``, one by one over the experts that have rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import modes

__all__ = [
    "ACTIVATIONS",
    "bias_rows",
    "expert_rows",
    "gather_rows",
    "grouped_mm",
    "names",
    "one_by_one",
    "scatter_rows",
]


def _gated(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def apply(rows: Tensor) -> Tensor:
        gate, up = rows.chunk(2, dim=-1)
        return function(gate) * up

    return apply


_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda rows: F.gelu(rows, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda rows: F.relu(rows).square(),
}

#: By name and by whether the first projection holds a gate beside the up part (gate first): rows to activated rows.
ACTIVATIONS: dict[tuple[str, bool], Callable[[Tensor], Tensor]] = {
    **{(name, False): function for name, function in _PLAIN.items()},
    **{(name, True): _gated(function) for name, function in _PLAIN.items()},
}


# ---- products ------------------------------------------------------------------------------------------------------


def grouped_mm(rows: Tensor, weights: Tensor, ends: Tensor, transposed: bool = False) -> Tensor:
    """``[R, K]`` rows times their expert's weights, ``[E, N, K]`` or if `transposed` ``[E, K, N]``: ``[R, N]``.

    Rows ``ends[e-1] .. ends[e]-1`` are of expert ``e``; what rows from ``ends[E-1]`` on hold afterwards is undefined.
    Differentiable in rows and weights.  One plain operator for torch.compile, and none where nobody needs one.
    """
    if _plain(rows, weights):
        return _mm(rows, weights, ends, transposed)
    result: Tensor = modes.call(torch.ops.moealign.grouped_mm, rows, weights, ends, transposed)
    return result


FEW_ROWS = 64  # rows an expert below which torch's own loop over experts is the faster one on a CPU


def _plain(*tensors: Tensor) -> bool:
    """Whether nothing but the values of these is wanted."""
    if modes.watched(*tensors) or modes.forward_mode() or modes.wants_gradient(*tensors):
        return False
    return not any(map(modes.is_batched_gradient, tensors))


def _grouped(left: Tensor, right: Tensor, *sizes: int) -> bool:
    """Whether torch's grouped product is to be had for these, and pays: rows and columns in multiples of 16 bytes."""
    if left.device.type == "cuda":
        if torch.version.hip is not None or left.dtype is not torch.bfloat16:
            return False
        if torch.cuda.get_device_capability(left.device) < (8, 0):
            return False
    elif left.device.type != "cpu" or left.dtype is torch.float64:
        return False
    even = all(size and size * left.element_size() % 16 == 0 for size in sizes)
    return even and left.data_ptr() % 16 == 0 and right.data_ptr() % 16 == 0


def _spans(ends: Tensor, experts: int, rows: int) -> list[tuple[int, int, int]]:
    """(expert, first row, end) of every expert that has some of `rows`.  Reads the device, if there are any."""
    if not rows:
        return []
    found, start = [], 0
    for expert, end in enumerate(ends.tolist()[:experts]):
        if end > start:
            found.append((expert, start, end))
        start = max(end, start)
    return found


def _mm(rows: Tensor, weights: Tensor, ends: Tensor, transposed: bool = False) -> Tensor:
    right = weights if transposed else weights.transpose(-2, -1)
    pays = rows.device.type == "cuda" or rows.shape[0] < FEW_ROWS * weights.shape[0]
    if rows.shape[0] and pays and _grouped(rows, right, *right.shape[-2:]):
        return F.grouped_mm(_dense(rows), _dense(right), offs=ends[: weights.shape[0]])
    out = rows.new_zeros(rows.shape[0], right.shape[-1])
    for expert, start, end in _spans(ends, weights.shape[0], rows.shape[0]):
        torch.mm(rows[start:end], right[expert], out=out[start:end])
    return out


def _mm_weights(grads: Tensor, rows: Tensor, ends: Tensor, experts: int) -> Tensor:
    """``[E, N, K]``: of each expert its rows' ``grads.T @ rows``; zero for an expert without any."""
    if rows.device.type == "cuda" and rows.shape[0] and _grouped(grads, rows, grads.shape[1], rows.shape[1]):
        product = F.grouped_mm(grads.contiguous().transpose(0, 1), rows.contiguous(), offs=ends[:experts])
        empty = torch.diff(ends[:experts], prepend=ends.new_zeros(1)) == 0
        return product.masked_fill_(empty.view(-1, 1, 1), 0)  # nothing says what an empty group gives
    out = rows.new_zeros(experts, grads.shape[1], rows.shape[1])
    for expert, start, end in _spans(ends, experts, rows.shape[0]):
        torch.mm(grads[start:end].T, rows[start:end], out=out[expert])
    return out


def _dense(tensor: Tensor) -> Tensor:
    """As it is if one of its last two axes is contiguous, else a copy: an expanded gradient is refused otherwise."""
    rows, columns = tensor.shape[-2:]
    if tensor.stride(-1) == 1 and tensor.stride(-2) >= columns:
        return tensor
    if tensor.stride(-2) == 1 and tensor.stride(-1) >= rows:
        return tensor
    return tensor.contiguous()


# ---- one expert at a time --------------------------------------------------------------------------------------------


def one_by_one(rows: int, experts: int, *tensors: Tensor) -> bool:
    """Whether :func:`expert_rows` takes these: on a CPU, many rows an expert, no gradient."""
    if not _plain(*tensors):  # first: a traced size must not be compared
        return False
    return rows >= FEW_ROWS * experts and all(tensor.device.type == "cpu" for tensor in tensors)


def expert_rows(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    order: Tensor,
    ends: Tensor,
    apply: Callable[[Tensor], Tensor],
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    transposed: bool,
) -> Tensor:
    """``[n, H]``: each route's row through its expert, weighted; zero where it was dropped.

    Gathered, multiplied and put in its place expert by expert, so that what lies between stays in the cache: all
    experts' rows at once are written to memory and read again five times.
    """
    top_k, weights = topk_weights.shape[1], topk_weights.reshape(-1)
    spans = _spans(ends, gate_up_proj.shape[0], order.shape[0])
    out = hidden_states.new_zeros(len(weights), hidden_states.shape[1])

    def product(rows: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
        rows = torch.mm(rows, right if transposed else right.T)
        return rows if bias is None else rows.add_(bias)

    for expert, start, end in spans:
        routes = order[start:end].to(torch.int64)
        rows = hidden_states.index_select(0, routes // top_k)
        rows = apply(product(rows, gate_up_proj[expert], None if gate_up_bias is None else gate_up_bias[expert]))
        rows = product(rows, down_proj[expert], None if down_bias is None else down_bias[expert])
        out.index_copy_(0, routes, rows.mul_(weights[routes].unsqueeze(1)))
    return out


# ---- rows ----------------------------------------------------------------------------------------------------------


def gather_rows(source: Tensor, routes: Tensor, positions: Tensor, top_k: int) -> Tensor:
    """``source[routes // top_k]``: ``[T, K]`` to ``[R, K]``.

    Rows of the sentinel ``n`` repeat the last token and mean nothing.  The gradient is gathered too, by `positions`
    ``[n]``, and summed over ``top_k``: no atomics, the same bits every time.
    """
    if _plain(source):
        return _gather(source, routes, positions, top_k, False)
    result: Tensor = modes.call(torch.ops.moealign.gather_rows, source, routes, positions, top_k, False)
    return result


def scatter_rows(rows: Tensor, routes: Tensor, positions: Tensor) -> Tensor:
    """``rows[positions]``: from the packed order to that of the routes, ``[n, K]``; zero where a route was dropped."""
    if _plain(rows):
        return _scatter(rows, routes, positions)
    result: Tensor = modes.call(torch.ops.moealign.scatter_rows, rows, routes, positions)
    return result


def bias_rows(bias: Tensor, ends: Tensor, rows: int) -> Tensor:
    """The bias of each packed row, ``[rows, N]``; zero past the last expert's rows, whose gradients go nowhere."""
    numbers = torch.arange(rows, dtype=ends.dtype, device=ends.device)
    owners = torch.searchsorted(ends[: bias.shape[0]].contiguous(), numbers, right=True)
    return torch.cat([bias, bias.new_zeros(1, bias.shape[1])]).index_select(0, owners)


def names(values: Sequence[tuple[str, bool]]) -> str:
    """The activations that can be named, for messages."""
    return ", ".join(sorted({name for name, _ in values}))


# ---- the operators -------------------------------------------------------------------------------------------------
#
# Each is linear in every tensor that floats, so that its gradients are these operators again.

_library = torch.library.Library("moealign", "FRAGMENT")
_library.define("gather_rows(Tensor source, Tensor routes, Tensor positions, SymInt top_k, bool blank) -> Tensor")
_library.define("scatter_rows(Tensor rows, Tensor routes, Tensor positions) -> Tensor")
_library.define("grouped_mm(Tensor rows, Tensor weights, Tensor ends, bool transposed=False) -> Tensor")
_library.define("grouped_mm_weights(Tensor grads, Tensor rows, Tensor ends, SymInt experts) -> Tensor")


def _gather(source: Tensor, routes: Tensor, positions: Tensor, top_k: int, blank: bool) -> Tensor:
    """With `blank`, rows of the sentinel are zero."""
    taken = _taken(source, routes, positions, top_k)
    return taken.masked_fill_((routes >= positions.shape[0]).unsqueeze(1), 0) if blank else taken


def _taken(source: Tensor, routes: Tensor, positions: Tensor, top_k: int) -> Tensor:
    return source.index_select(0, routes.clamp(max=positions.shape[0] - 1) // top_k)


def _fake_gather(source: Tensor, routes: Tensor, positions: Tensor, top_k: int, blank: bool) -> Tensor:
    return source.new_empty(routes.shape[0], source.shape[1])


def _formula_gather(source: Tensor, routes: Tensor, positions: Tensor, top_k: int, blank: bool) -> Tensor:
    """Always blank: a gradient that a row of the sentinel got would be the last token's."""
    taken = _taken(source, routes, positions, top_k)
    return taken.masked_fill((routes >= positions.shape[0]).unsqueeze(1), 0)


def _save_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    source, routes, positions, ctx.top_k, _ = inputs
    ctx.tokens = source.shape[0]
    ctx.save_for_backward(routes, positions)


def _backward_gather(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    routes, positions = ctx.saved_tensors
    taken = scatter_rows(grad, routes, positions)
    if ctx.top_k != 1:
        taken = taken.view(ctx.tokens, ctx.top_k, grad.shape[1]).sum(1)
    return taken, None, None, None, None


def _scatter(rows: Tensor, routes: Tensor, positions: Tensor) -> Tensor:
    taken = rows.index_select(0, positions.clamp(min=0))
    return taken.masked_fill_((positions < 0).unsqueeze(1), 0)


def _fake_scatter(rows: Tensor, routes: Tensor, positions: Tensor) -> Tensor:
    return rows.new_empty(positions.shape[0], rows.shape[1])


def _formula_scatter(rows: Tensor, routes: Tensor, positions: Tensor) -> Tensor:
    taken = rows.index_select(0, positions.clamp(min=0))
    return taken.masked_fill((positions < 0).unsqueeze(1), 0)


def _save_scatter(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward_scatter(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    routes, positions = ctx.saved_tensors
    return modes.call(torch.ops.moealign.gather_rows, grad, routes, positions, 1, True), None, None


def _fake_mm(rows: Tensor, weights: Tensor, ends: Tensor, transposed: bool = False) -> Tensor:
    return rows.new_empty(rows.shape[0], weights.shape[2 if transposed else 1])


def _fake_mm_weights(grads: Tensor, rows: Tensor, ends: Tensor, experts: int) -> Tensor:
    return rows.new_empty(experts, grads.shape[1], rows.shape[1])


def _of_each(tensor: Tensor, ends: Tensor, experts: int) -> list[Tensor]:
    """`tensor` once for each expert, with zeros in the rows of all others."""
    numbers = torch.arange(tensor.shape[0], dtype=ends.dtype, device=ends.device)
    found, start = [], torch.zeros_like(ends[0])
    for expert in range(experts):
        end = ends[expert]
        found.append(tensor.masked_fill(((numbers < start) | (numbers >= end)).unsqueeze(1), 0))
        start = end
    return found


def _formula_mm(rows: Tensor, weights: Tensor, ends: Tensor, transposed: bool = False) -> Tensor:
    right = weights if transposed else weights.transpose(-2, -1)
    experts = weights.shape[0]
    if not modes.readable(ends):  # every row times every expert
        each = _of_each(rows, ends, experts)
        return torch.stack([each[expert] @ right[expert] for expert in range(experts)]).sum(0)
    parts, last = [], 0
    for expert, start, end in _spans(ends, experts, rows.shape[0]):
        parts.append(rows[start:end] @ right[expert])
        last = end
    rest = torch.zeros(rows.shape[0] - last, right.shape[-1], dtype=rows.dtype, device=rows.device)
    return torch.cat([*parts, rest])


def _formula_mm_weights(grads: Tensor, rows: Tensor, ends: Tensor, experts: int) -> Tensor:
    return torch.stack([each.transpose(0, 1) @ rows for each in _of_each(grads, ends, experts)])


def _save_mm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weights, ends, ctx.transposed = (*inputs, False)[:4]
    ctx.save_for_backward(rows, weights, ends)


def _backward_mm(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, weights, ends = ctx.saved_tensors
    grad = grad.contiguous()
    to_rows = to_weights = None
    if ctx.needs_input_grad[0]:
        to_rows = grouped_mm(grad, weights, ends, not ctx.transposed)
    if ctx.needs_input_grad[1]:
        left, right = (rows, grad) if ctx.transposed else (grad, rows)
        to_weights = modes.call(torch.ops.moealign.grouped_mm_weights, left, right, ends, weights.shape[0])
    return to_rows, to_weights, None, None


def _save_mm_weights(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _backward_mm_weights(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads, rows, ends = ctx.saved_tensors
    grad = grad.contiguous()
    to_grads = grouped_mm(rows, grad, ends) if ctx.needs_input_grad[0] else None
    to_rows = grouped_mm(grads, grad, ends, True) if ctx.needs_input_grad[1] else None
    return to_grads, to_rows, None, None


_OPERATORS: dict[str, tuple[Callable[..., Any], ...]] = {
    "gather_rows": (_gather, _fake_gather, _formula_gather, _save_gather, _backward_gather),
    "scatter_rows": (_scatter, _fake_scatter, _formula_scatter, _save_scatter, _backward_scatter),
    "grouped_mm": (_mm, _fake_mm, _formula_mm, _save_mm, _backward_mm),
    "grouped_mm_weights": (
        _mm_weights, _fake_mm_weights, _formula_mm_weights, _save_mm_weights, _backward_mm_weights,
    ),
}  # fmt: skip
for _name, (_real, _fake, _formula, _save, _backward) in _OPERATORS.items():
    _library.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moealign::{_name}", _fake, lib=_library)
    modes.differentiable(_library, _name, _formula, _save, _backward)
    modes.batched(_library, _name)

modes.flops("grouped_mm", lambda rows, weights, *_, **__: 2 * rows[0] * math.prod(weights[1:]))
modes.flops("grouped_mm_weights", lambda grads, rows, *_, **__: 2 * math.prod(grads) * rows[1])
