"""The launches of ``kernels.py``, in order.  Triton is imported at the first launch."""

from __future__ import annotations

import functools
import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backend.triton.launch import interpreted, on_device, unavailable
from ..layout import BlockLayout, cdiv, power_of_two
from .activations import NO_CONSTANTS, Gate, parse
from .quantized import GROUP, SCHEMES, QuantizedWeights
from .quantized_launch import QuantizedRows, needs_pass, quantizes_result, scaling
from .records import ExpertWeights, Product, Routes, product_columns
from .tiles import LayerTiles, Target, Tile, target_of, tiles_by_rule, triton_release, with_block_size

__all__ = [
    "GemmLaunch",
    "activation_constants",
    "descriptor",
    "fill_product",
    "flat",
    "gemm_launch",
    "gemm_launches",
    "layer_launches",
    "precision",
    "product_launches",
    "refuses",
    "refuses_device",
    "row_major",
    "row_stride",
    "run",
    "run_layer",
    "strides_of",
    "sum_launch",
    "takes_tma",
    "weights_operand",
]

_ACTIVATIONS = {None: 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4, "relu2": 5, "situ": 6}
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _kind(argument: Any) -> Any:
    """What of a kernel's argument Triton compiles for."""
    if type(argument) is int:
        return (argument == 1) + 2 * (argument % 16 == 0) + 4 * (argument >= 2**31)
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return argument and (argument.base.dtype, *argument.block_shape)  # a descriptor or None


class GemmLaunch(NamedTuple):
    """A prepared launch.  Tests compile it ahead for GPUs that are not in the machine."""

    kernel: str
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    pdl: bool
    module: str = "kernels"  # of this package, with the kernel

    def options(self) -> dict[str, Any]:
        """Triton's options for the compilation and the launch."""
        options: dict[str, Any] = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.pdl:
            options["launch_pdl"] = True
        return options

    def key(self) -> tuple[Any, ...]:
        """All that Triton compiles for, but the device: launches of one key are of one compiled kernel."""
        kinds = tuple(map(_kind, self.arguments))
        return self.kernel, kinds, *self.constants.values(), self.num_warps, self.num_stages, self.pdl


def refuses(rows: Tensor) -> str | None:
    """Why the kernels do not take these rows; None if they do.  While tracing, the machine is not inspected."""
    refusal = refuses_device(rows.device)
    if refusal is None and rows.dtype not in _DTYPES:
        return f"expected bfloat16, float16 or float32, got {rows.dtype}"
    return refusal


def refuses_device(device: torch.device) -> str | None:
    """:func:`refuses`, whatever the dtype."""
    if device.type not in ("cuda", "xpu") and not (interpreted() and device.type == "cpu"):
        return f"expected tensors on a GPU, got tensors on {device}"
    return None if torch.compiler.is_compiling() else unavailable()


@functools.cache
def _kernel(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"{__package__}.{module}"), name)  # imports Triton


@functools.cache
def _descriptor_type() -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor


#: What Triton compiled, by device and key.  To find it, Triton itself takes longer than the launch.
_compiled: dict[tuple[Any, ...], Any] = {}


def run(launches: list[GemmLaunch], device: torch.device) -> None:
    """Launch the kernels on `device`."""
    with on_device(device):
        index = torch.cuda.current_device() if device.type == "cuda" else None
        for one in launches:
            key = index, one.key()
            known = _compiled.get(key)
            if known is not None:
                compiled, names = known
                compiled[(*one.grid, 1, 1)[:3]](*one.arguments, *map(one.constants.__getitem__, names))
                continue
            kernel = _kernel(one.module, one.kernel)
            compiled = kernel[one.grid](*one.arguments, **one.constants, **one.options())
            if index is not None and _launches_compiled():
                _compiled[key] = compiled, kernel.arg_names[len(one.arguments) :]


@functools.cache
def _launches_compiled() -> bool:
    """Whether what a launch returns can be launched again with the same arguments and constants.  On AMD GPUs Triton
    also compiles for the sizes of tensors, which a key does not tell."""
    return torch.version.hip is None and not interpreted() and (3, 6) <= triton_release() <= (3, 9)


# ---- one product -----------------------------------------------------------------------------------------------------


def descriptor(matrix: Tensor, rows: int, columns: int) -> Any:
    return _descriptor_type()(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


def takes_tma(matrix: Tensor) -> bool:
    pitch = matrix.stride(-2) * matrix.element_size()
    return matrix.stride(-1) == 1 and pitch % 16 == 0 and matrix.data_ptr() % 16 == 0 and matrix.numel() > 0


def activation_constants(activation: str | None, gated: bool) -> dict[str, Any]:
    """What kernels are compiled for: which activation, whether it has a gate, and the constants of that."""
    gate = None if activation is None else parse(activation)
    if isinstance(gate, Gate):
        return {"ACT": _ACTIVATIONS[gate.activation], "GATED": gated, "GATE": gate.constants}
    return {"ACT": _ACTIVATIONS[gate], "GATED": gated, "GATE": NO_CONSTANTS}


def weights_operand(b: Tensor, tile: Tile, tma: int, interleaved: bool = False) -> Any:
    """`b` or its descriptor, as `B_TMA` of the kernels says."""
    if tma == 0:
        return b
    columns = 2 * tile.n if interleaved else tile.n
    shape = (tile.k, columns) if tma == 2 else (columns, tile.k)
    return descriptor(b.view(-1, b.shape[2]), *shape)


def strides_of(matrices: Tensor, swapped: bool) -> tuple[int, int, int]:
    """Of ``[E, ., .]``; with `swapped` the last one before the middle one."""
    first, middle, last = matrices.stride()
    return (first, last, middle) if swapped else (first, middle, last)


def precision(rows: Tensor) -> str:
    """How kernels multiply these rows, in Triton's words."""
    return "ieee" if rows.dtype is torch.float32 else "tf32"


def row_stride(matrix: Tensor) -> int:
    """The distance of rows.  A single row's stride is arbitrary, and would compile another kernel."""
    return matrix.shape[1] if matrix.shape[0] == 1 else matrix.stride(0)


def _as_launched(
    target: Target, tile: Tile, product: Product, options: dict[str, Any], transposed_tma: bool = False
) -> tuple[Tile, int]:
    """The tile that the kernel takes with these constants of the activation, and how it loads weights: `B_TMA`."""
    b, tma = product.b, 0
    if tile.tma and target.hopper and b.is_contiguous() and takes_tma(b):
        if not product.transposed:
            tma = 1
        elif transposed_tma and b.shape[1] % tile.k == 0:
            tma = 2
    if not tma and product.gated and options["GATE"][-1]:
        # One accumulator of twice the columns: whole, it would not fit the registers.
        tile = tile._replace(n=max(tile.n // 2, 16))
    return tile, tma


def gemm_launch(
    target: Target,
    tile: Tile,
    product: Product,
    out: Tensor,
    routes: int,
    ids: Tensor | None = None,
    *,
    before: Tensor | None = None,
    a_layout: bool = False,
    out_layout: bool = False,
    transposed_tma: bool = False,
    row_scales: Tensor | None = None,
    result: QuantizedRows | None = None,
) -> GemmLaunch:
    """A launch of the kernel `gemm`.

    Args:
        out: ``[routes, N]``, or ``[rows of the layout, N]`` if `out_layout`.
        routes: number of routes, which differs from ``a``'s rows times ``top_k`` if `a_layout`.
        ids: the expert of each route, where there is no layout.
        before: ``[routes, outputs]`` for the rows before the activation.
        a_layout: rows of ``a`` are in layout order.
        out_layout: rows of `out` are in layout order.
        transposed_tma: load transposed weights by TMA too.  The rules for a layer's tiles were measured without.
        row_scales: of ``a``, if that is quantised.
        result: `out` and its scales, if tiles quantise it for the next product.
    """
    a, b, layout, top_k, weights, bias, activation, gated, transposed, _ = product
    experts = b.shape[0]
    outputs, depth = (b.shape[2], b.shape[1]) if transposed else (b.shape[1], b.shape[2])
    columns = product_columns(b, gated, transposed)
    strides = strides_of(b, transposed)
    options = activation_constants(activation, gated)
    tile, b_tma = _as_launched(target, tile, product, options, transposed_tma)
    interleaved = gated and options["GATE"][-1]
    width = 2 * tile.n if interleaved else tile.n
    b, scales, constants = scaling(target, product, width, bool(gated and not interleaved), row_scales, result)
    a_tma = bool(b_tma and tile.tma > 1 and a_layout and takes_tma(a))
    no_layout = layout is None
    if layout is None:
        rows: tuple[Tensor | None, ...] = (ids, None, None)
        blocks = max_blocks = routes
    else:
        rows = (layout.sorted_token_ids, layout.expert_ids, layout.num_tokens_post_padded)
        blocks = layout.expert_ids.numel()
        max_blocks = min(blocks, layout.sorted_token_ids.numel() // tile.m)
    bias = None if bias is None else row_major(bias)
    tiles = blocks * cdiv(columns, tile.n)
    half_rows = 0 if no_layout else tile.half_tile_rows
    persistent = bool(tile.ctas) and not no_layout
    return GemmLaunch(
        "gemm",
        (min(tiles, tile.ctas * target.multiprocessors) if persistent else tiles,),
        (
            descriptor(a, tile.m, tile.k) if a_tma else a,
            (descriptor(a, half_rows, tile.k) if a_tma else a) if half_rows else None,
            weights_operand(b, tile, b_tma, interleaved),
            bias, None if weights is None else flat(weights), *rows, before, out,
            routes, max_blocks, columns, depth, experts, outputs, top_k,
            row_stride(a), *strides, 0 if bias is None else bias.stride(0), row_stride(out), *scales,
        ),
        {
            **options, "A_LAYOUT": a_layout, "OUT_LAYOUT": out_layout,
            "A_TMA": a_tma, "B_TMA": b_tma, "EVEN_K": depth % tile.k == 0, "SWAP": bool(tile.swap),
            "HALF_ROWS": half_rows, "NO_LAYOUT": no_layout, "PDL": target.hopper,
            "PRECISION": precision(a),
            "PERSISTENT": persistent, "SCALING": constants,
            "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP_M": tile.group,
        },
        tile.warps,
        tile.stages,
        target.hopper,
    )  # fmt: skip


def gemm_launches(
    target: Target,
    tile: Tile,
    product: Product,
    out: Tensor,
    routes: int,
    ids: Tensor | None = None,
    *,
    rows: QuantizedRows | None = None,
    **options: Any,
) -> list[GemmLaunch]:
    """The launch of the kernel `gemm`, after one that quantises its rows if that needs a pass.

    Args:
        rows: those of `product`, if the launch before quantises them.
    """
    launches = []
    if rows is None and needs_pass(product.quantized):
        assert product.quantized is not None
        layout = product.layout if options.get("a_layout") else None
        one, rows = quantize_launch(target, product.a, product.quantized, layout, routes)
        launches.append(one)
    if rows is not None:
        product = product._replace(a=rows.values)
        options["row_scales"] = rows.scales
    return [*launches, gemm_launch(target, tile, product, out, routes, ids, **options)]


def quantize_launch(
    target: Target, rows: Tensor, quantized: QuantizedWeights, layout: BlockLayout | None, routes: int
) -> tuple[GemmLaunch, QuantizedRows]:
    """A launch of the kernel `quantize_rows`, and what it fills.

    Args:
        layout: in whose order `rows` are; then rows without one of the `routes` are left out.
    """
    count, depth = rows.shape
    by_row = quantized.activations == "row"
    filled = QuantizedRows.empty(target, quantized, count, depth, rows)
    block = max(min(power_of_two(depth), 4096), GROUP) if by_row else 16
    one = GemmLaunch(
        "quantize_rows",
        (count if by_row else cdiv(count * cdiv(depth, GROUP), block),),
        (
            rows, filled.values, filled.scales, quantized.activation_scale,
            *((None, None) if layout is None else (layout.sorted_token_ids, layout.num_tokens_post_padded)),
            count, routes, depth, row_stride(rows),
        ),
        {"BY": SCHEMES.index(quantized.activations), "USE_E4M3": target.fp8, "BLOCK": block, "PDL": target.hopper},
        4,
        3,
        target.hopper,
        "quantized_kernels",
    )  # fmt: skip
    return one, filled


def product_launches(product: Product, out: Tensor, target: Target) -> list[GemmLaunch]:
    """The launches of :func:`fill_product`."""
    a, b, layout = product.a, product.b, product.layout
    assert layout is not None
    routes = a.shape[0] * product.top_k
    depth = b.shape[1 if product.transposed else 2]
    itemsize = a.element_size() if product.quantized is None else 1
    tiles = tiles_by_rule(target, routes, 1, b.shape[0], depth, depth, itemsize)
    tiles = with_block_size(tiles, layout.block_size, itemsize)
    tile = tiles.first if product.gated else tiles.second
    return gemm_launches(target, tile, product._replace(a=row_major(a)), out, routes)


def row_major(rows: Tensor) -> Tensor:
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def flat(tensor: Tensor) -> Tensor:
    """`tensor` as kernels index it.  ``reshape`` alone keeps the stride of a column, or of an expanded tensor."""
    return tensor.reshape(-1).contiguous()


def fill_product(product: Product, out: Tensor) -> None:
    """Fill the rows of `out` that the layout names."""
    run(product_launches(product, out, target_of(product.a.device)), product.a.device)


# ---- a layer ---------------------------------------------------------------------------------------------------------


def layer_launches(
    tiles: LayerTiles,
    hidden_states: Tensor,
    weights: ExpertWeights,
    routes: Routes,
    layout: BlockLayout | None,
    activation: str,
    target: Target,
    before: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[list[GemmLaunch], Tensor]:
    """The launches of :func:`run_layer`, and the tensor ``[T, H]`` that they fill: `out`, or a new one."""
    tokens, top_k = routes.ids.shape
    count, hidden = tokens * top_k, hidden_states.shape[1]
    new = hidden_states.new_empty
    if layout is None:
        ids: Tensor | None = flat(routes.ids)
        assert ids is not None
        kept, limit, rows = ids, weights.experts(), count
    else:
        assert layout.positions is not None
        ids = None
        kept, limit, rows = layout.positions, 2**31 - 1, layout.expert_ids.numel() * tiles.first.m
    in_layout = layout is not None
    out, of_routes = new(tokens, hidden) if out is None else out, new(count, hidden)
    gate_up, down, gate_up_bias, down_bias, transposed, quantized = weights
    of_first, of_second = quantized or (None, None)
    x = row_major(hidden_states)
    first = Product(x, gate_up, layout, top_k, None, gate_up_bias, activation, weights.gated(), transposed, of_first)
    result = None
    if of_second is not None and in_layout:
        tile, _ = _as_launched(target, tiles.first, first, activation_constants(activation, first.gated))
        if quantizes_result(tile, of_second):
            result = QuantizedRows.empty(target, of_second, rows, weights.inner(), x)
    activated = new(rows, weights.inner()) if result is None else result.values
    second = Product(activated, down, layout, 1, routes.weights, down_bias, None, False, transposed, of_second)
    options: dict[str, Any] = {"before": before, "out_layout": in_layout, "result": result}
    launches = [
        *gemm_launches(target, tiles.first, first, activated, count, ids, **options),
        *gemm_launches(target, tiles.second, second, of_routes, count, ids, rows=result, a_layout=in_layout),
        sum_launch(target, of_routes, top_k, kept, limit, out),
    ]
    return launches, out


def sum_launch(target: Target, rows: Tensor, top_k: int, kept: Tensor, limit: int, out: Tensor) -> GemmLaunch:
    """A launch of the kernel `sum_rows`: ``[T * k, H]`` `rows` into ``[T, H]`` `out`."""
    tokens, hidden = out.shape
    block = min(1024, power_of_two(hidden))
    return GemmLaunch(
        "sum_rows",
        (tokens, cdiv(hidden, block)),
        (rows, kept, out, hidden, limit),
        {"TOP_K": top_k, "BLOCK": block, "PDL": target.hopper},
        4,
        3,
        target.hopper,
    )


def run_layer(
    tiles: LayerTiles,
    hidden_states: Tensor,
    weights: ExpertWeights,
    routes: Routes,
    layout: BlockLayout | None,
    activation: str,
    before: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """A layer of experts, ``[T, H]``.

    Args:
        layout: with blocks of ``tiles.block_size``, or None if that is 0.
        before: ``[T * k, 2I]`` or ``[T * k, I]`` for the first product's rows before the activation, in the order of
            the routes; those of dropped routes are not written.
        out: a buffer for the result.  It may be `hidden_states`: only the last launch writes it, and only the first
            reads them.
    """
    target = target_of(hidden_states.device)
    launches, out = layer_launches(tiles, hidden_states, weights, routes, layout, activation, target, before, out)
    run(launches, hidden_states.device)
    return out
