"""The gradients of a layer and of one product by kernels: which tiles, which launches, in which order.

Between forward and backward a layer keeps its inputs and the rows of the first product before the activation, ``2I`` or
``I`` elements a route, or not even these.  The backward aligns the routes again (some microseconds), because it takes
other blocks than the forward.  The largest tensors that it makes, in elements a route: the gradient of those rows and
the activated rows (``2I + I``), and beside them, for a while, the rows of the input's gradient (``H``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..alignment import align
from ..layout import BlockLayout, cdiv
from . import launch, packed
from .launch import GemmLaunch
from .records import ExpertWeights, Product, Routes
from .tiles import BLOCK_SIZES, Target, Tile, invariant_routes, target_of

__all__ = ["GradientTiles", "LayerGradients", "layer_gradients", "product_gradients", "select_gradient_tiles"]

_BIAS_ROWS, _BIAS_COLUMNS = 32, 128


class GradientTiles(NamedTuple):
    """The tiles of a backward.  All have the layout's blocks as rows, except `weights`: rows and columns of an expert's
    gradient, and the routes of a step as depth."""

    rows: Tile  # the second product's gradient for its rows
    inputs: Tile  # the first product's gradient for its rows
    weights: Tile


def select_gradient_tiles(
    target: Target, routes: int, experts: int, itemsize: int, batch_invariant: bool = False
) -> GradientTiles:
    """Tiles by the rows per expert, measured on an H100."""
    if batch_invariant:
        routes = invariant_routes(target, routes, experts, itemsize)
    each = routes / max(experts, 1)
    m = next((size for size in BLOCK_SIZES if each <= size * 0.75), 128)
    warps = 8 if m == 128 else 4
    if itemsize == 4 or not target.hopper:  # tiles that fit any shared memory, without TMA
        k = 32 if itemsize == 4 else 64
        rows = Tile(m, 64, k, 8, warps, 2)
        return GradientTiles(rows, rows, Tile(64, 64, min(m, 32), 8, 4, 2))
    wide = m == 128
    rows = Tile(128, 256, 64, 4, 8, 4, 1, 1) if wide else Tile(m, 128, 64, 8, warps, 4, 1, 1)
    if batch_invariant:  # a routing weight's gradient is summed by tiles of columns
        rows = rows._replace(n=128)
    inputs = Tile(m, 256 if wide else 128, 64, 8, warps, 4, 2, 1)
    weights = Tile(128, 256, 64, 8, 8, 3, 1) if each > 900 else Tile(128, 128, min(m, 64), 8, 4, 2, 1)
    return GradientTiles(rows, inputs, weights)


class LayerGradients(NamedTuple):
    """A gradient for each floating input of a layer; None where it was not asked for, or was added to a buffer."""

    hidden_states: Tensor | None
    gate_up: Tensor | None
    down: Tensor | None
    routing_weights: Tensor | None
    gate_up_bias: Tensor | None
    down_bias: Tensor | None


# ---- a layer ---------------------------------------------------------------------------------------------------------


def layer_gradients(
    grad: Tensor,
    before: Tensor | None,
    hidden_states: Tensor,
    weights: ExpertWeights,
    routes: Routes,
    activation: str,
    needed: LayerGradients | tuple[bool, ...],
    buffers: tuple[Tensor | None, Tensor | None] = (None, None),
    batch_invariant: bool = False,
    tiles: GradientTiles | None = None,
) -> LayerGradients:
    """The gradients of :func:`moealign.experts.launch.run_layer`.

    Args:
        grad: ``[T, H]``.
        before: what the forward kept, ``[T * k, 2I]`` or ``[T * k, I]``; None: computed again.
        needed: which gradients, in the order of the result.
        buffers: contiguous tensors, to which the gradients of the projections are added instead of being returned.
        batch_invariant: take tiles that give a token the same bits in every batch.
        tiles: those of the rule by default.
    """
    device, target = hidden_states.device, target_of(hidden_states.device)
    tokens, top_k = routes.ids.shape
    count, hidden, inner, experts = tokens * top_k, hidden_states.shape[1], weights.inner(), weights.experts()
    for_hidden, for_gate_up, for_down, for_routing, for_gate_up_bias, for_down_bias = needed
    tiles = tiles or select_gradient_tiles(target, count, experts, hidden_states.element_size(), batch_invariant)
    layout = routes.layout(tiles.rows.m, experts, ranges=True)
    assert layout.positions is not None
    new = hidden_states.new_empty
    grad, x = launch.row_major(grad), launch.row_major(hidden_states)
    outputs = 2 * inner if weights.gated() else inner
    if before is None:
        before = new(count, outputs)
        bias, transposed = weights.gate_up_bias, weights.transposed
        again = Product(x, weights.gate_up, layout, top_k, None, bias, None, False, transposed)
        launch.run([launch.gemm_launch(target, tiles.inputs, again, before, count)], device)
    rows = layout.expert_ids.numel() * tiles.rows.m
    activated, of_before = new(rows, inner), new(rows, outputs)
    sums = new(count, cdiv(inner, tiles.rows.n), dtype=torch.float32)
    kept = (before, activation, activated, of_before, sums)
    launch.run([_activation_launch(target, tiles.rows, grad, weights, routes, layout, *kept)], device)
    del before, kept  # a launch that is held would keep them

    # The gradients of weights come last, the larger one first: no more than what they read is held beside them.
    to_down = to_gate_up = to_hidden = to_routing = to_gate_up_bias = to_down_bias = None
    if for_hidden:
        of_rows, to_hidden = new(count, hidden), new(tokens, hidden)
        back = Product(of_before, weights.gate_up, layout, 1, None, None, None, False, not weights.transposed)
        launches = [
            launch.gemm_launch(target, tiles.inputs, back, of_rows, count, a_layout=True, transposed_tma=True),
            launch.sum_launch(target, of_rows, top_k, layout.positions, 2**31 - 1, to_hidden),
        ]
        launch.run(launches, device)
        del of_rows, back, launches
    dots = None
    if weights.down_bias is not None and (for_down_bias or for_routing):
        to_down_bias = torch.empty_like(weights.down_bias, memory_format=torch.contiguous_format)
        dots = hidden_states.new_zeros(count, cdiv(hidden, _BIAS_COLUMNS), dtype=torch.float32)
        factors = launch.flat(routes.weights)
        bias_of = (factors, launch.row_major(weights.down_bias), layout, to_down_bias, dots)
        launch.run([_bias_launch(grad, top_k, count, False, *bias_of)], device)
    if for_routing:
        to_routing = torch.empty_like(routes.weights, memory_format=torch.contiguous_format)
        launch.run([_routing_launch(sums, dots, layout.positions, to_routing)], device)
    if for_gate_up_bias:
        assert weights.gate_up_bias is not None
        to_gate_up_bias = torch.empty_like(weights.gate_up_bias, memory_format=torch.contiguous_format)
        launch.run([_bias_launch(of_before, 1, count, True, None, None, layout, to_gate_up_bias, None)], device)
    if for_gate_up:
        to_gate_up = _weights_result(weights.gate_up, buffers[0])
        strides = launch.strides_of(to_gate_up, not weights.transposed)
        into = (to_gate_up, strides, buffers[0] is not None)
        launch.run([_weights_launch(target, tiles.weights, x, top_k, of_before, True, layout, count, *into)], device)
    del of_before
    if for_down:
        to_down = _weights_result(weights.down, buffers[1])
        strides = launch.strides_of(to_down, weights.transposed)
        into = (to_down, strides, buffers[1] is not None)
        launch.run([_weights_launch(target, tiles.weights, grad, top_k, activated, True, layout, count, *into)], device)
    return LayerGradients(
        to_hidden,
        to_gate_up if buffers[0] is None else None,
        to_down if buffers[1] is None else None,
        to_routing,
        to_gate_up_bias,
        to_down_bias if for_down_bias else None,
    )


def _weights_result(weights: Tensor, buffer: Tensor | None) -> Tensor:
    return torch.empty_like(weights, memory_format=torch.contiguous_format) if buffer is None else buffer


# ---- one product -----------------------------------------------------------------------------------------------------


def product_gradients(
    grad: Tensor, rows: Tensor, layout: BlockLayout, top_k: int, experts: int, transposed: bool, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of :func:`moealign.grouped_gemm` for its weights, ``[E, N, K]``, and bias, ``[E, N]``.

    Args:
        grad: ``[n, N]``, in the order of the routes.
        rows: ``[T, K]``.
    """
    device, target = rows.device, target_of(rows.device)
    count, itemsize = grad.shape[0], rows.element_size()
    tile = select_gradient_tiles(target, count, experts, itemsize).weights
    grad, rows = launch.row_major(grad), launch.row_major(rows)
    ids = experts_of_routes(layout, count, experts)
    own = align(ids, block_size=tile.k, num_experts=experts, expert_counts=True, expert_offsets=True)
    shape = (experts, rows.shape[1], grad.shape[1]) if transposed else (experts, grad.shape[1], rows.shape[1])
    result = rows.new_empty(shape)
    into = (result, launch.strides_of(result, not transposed), False)
    launches = [_weights_launch(target, tile, rows, top_k, grad, False, own, count, *into)]
    bias = None
    if with_bias:
        bias = rows.new_empty(experts, grad.shape[1])
        launches.append(_bias_launch(grad, 1, count, False, None, None, own, bias, None))
    launch.run(launches, device)
    return result, bias


def experts_of_routes(layout: BlockLayout, routes: int, experts: int) -> Tensor:
    """The expert of each route that `layout` names, ``[n]``; -1 for the others, and where it is outside ``[0, E)``."""
    listed, owners, kept = packed.named_routes(layout, routes, experts)
    at = torch.where(kept, listed, routes)
    ids = torch.full((routes + 1,), -1, dtype=torch.int32, device=listed.device)
    return ids.scatter(0, at, torch.where(kept, owners, -1).to(torch.int32))[:routes]


# ---- launches --------------------------------------------------------------------------------------------------------


def _launch(
    kernel: str,
    programs: int,
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    warps: int = 4,
    stages: int = 2,
) -> GemmLaunch:
    return GemmLaunch(kernel, (programs,), arguments, constants, warps, stages, False, "gradient_kernels")


def _activation_launch(
    target: Target,
    tile: Tile,
    grad: Tensor,
    weights: ExpertWeights,
    routes: Routes,
    layout: BlockLayout,
    before: Tensor,
    activation: str,
    activated: Tensor,
    out: Tensor,
    sums: Tensor,
) -> GemmLaunch:
    """A launch of the kernel `activation_gradient`."""
    b, inner = weights.down, weights.inner()
    count, hidden = routes.ids.numel(), grad.shape[1]
    # The weights from the inner columns to H, read from H to the inner columns.
    strides = launch.strides_of(b, not weights.transposed)
    even = hidden % tile.k == 0
    by_tma = tile.tma and target.hopper and b.is_contiguous() and launch.takes_tma(b) and (weights.transposed or even)
    tma = (1 if weights.transposed else 2) if by_tma else 0
    blocks = layout.expert_ids.numel()
    tiles = blocks * cdiv(inner, tile.n)
    return _launch(
        "activation_gradient",
        min(tiles, tile.ctas * target.multiprocessors) if tile.ctas else tiles,
        (
            grad, launch.weights_operand(b, tile, tma), before, launch.flat(routes.weights), layout.sorted_token_ids,
            layout.expert_ids, layout.num_tokens_post_padded, activated, out, sums,
            count, min(blocks, layout.sorted_token_ids.numel() // tile.m), inner, hidden, weights.experts(),
            out.shape[1], routes.ids.shape[1], launch.row_stride(grad), *strides,
        ),
        {
            **launch.activation_constants(activation, weights.gated()), "B_TMA": tma, "EVEN_K": even,
            "PRECISION": launch.precision(grad),
            "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP_M": tile.group,
        },
        tile.warps,
        tile.stages,
    )  # fmt: skip


def _weights_launch(
    target: Target,
    tile: Tile,
    gathered: Tensor,
    top_k: int,
    other: Tensor,
    in_layout: bool,
    layout: BlockLayout,
    count: int,
    out: Tensor,
    strides: tuple[int, int, int],
    accumulate: bool,
) -> GemmLaunch:
    """A launch of the kernel `weights_gradient`.  `other` is in layout order, or in that of the routes."""
    m, n = gathered.shape[1], other.shape[1]
    tma = bool(tile.tma and target.hopper and in_layout and launch.takes_tma(other))
    assert layout.expert_offsets is not None
    assert layout.expert_counts is not None
    return _launch(
        "weights_gradient",
        out.shape[0] * cdiv(m, tile.m) * cdiv(n, tile.n),
        (
            gathered, launch.descriptor(other, tile.k, tile.n) if tma else other, layout.sorted_token_ids,
            layout.expert_offsets, layout.expert_counts, out,
            count, layout.sorted_token_ids.numel(), m, n,
            launch.row_stride(gathered), launch.row_stride(other), *strides,
        ),
        {
            "TOP_K": top_k, "OTHER_LAYOUT": in_layout, "OTHER_TMA": tma, "ACCUMULATE": accumulate,
            "PRECISION": launch.precision(gathered),
            "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP_M": tile.group,
        },
        tile.warps,
        tile.stages,
    )  # fmt: skip


def _routing_launch(sums: Tensor, dots: Tensor | None, positions: Tensor, out: Tensor) -> GemmLaunch:
    """A launch of the kernel `routing_gradient`."""
    count, block = positions.shape[0], 128
    return _launch(
        "routing_gradient",
        cdiv(count, block),
        (sums, dots, positions, out, count, sums.shape[1], 0 if dots is None else dots.shape[1]),
        {"BLOCK": block},
    )


def _bias_launch(
    rows: Tensor,
    top_k: int,
    count: int,
    in_layout: bool,
    weights: Tensor | None,
    bias: Tensor | None,
    layout: BlockLayout,
    out: Tensor,
    sums: Tensor | None,
) -> GemmLaunch:
    """A launch of the kernel `bias_gradient`."""
    columns = rows.shape[1]
    return _launch(
        "bias_gradient",
        out.shape[0] * cdiv(columns, _BIAS_COLUMNS),
        (
            rows, weights, bias, layout.sorted_token_ids, layout.expert_offsets, layout.expert_counts, out, sums,
            count, layout.sorted_token_ids.numel(), columns, top_k, launch.row_stride(rows),
            0 if bias is None else bias.stride(0),
        ),
        {"IN_LAYOUT": in_layout, "BLOCK_M": _BIAS_ROWS, "BLOCK_N": _BIAS_COLUMNS},
    )  # fmt: skip
