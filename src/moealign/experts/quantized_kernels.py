# mypy: disable-error-code="no-untyped-def"
"""What the kernels of the experts do with FP8 weights: quantise rows, and multiply e4m3 values and apply their scales.

`quantize_rows`     a pass over rows; :func:`moealign.experts.kernels.product` only quantises by the scales of experts.
`quantize_result`   the same in the epilogue of a product, whose result another product with FP8 weights reads.

Machines without e4m3 (NATIVE is 0) multiply the same values in float16, which holds all of them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = [
    "factor_of",
    "quantize",
    "quantize_result",
    "quantize_rows",
    "scale_of",
    "scaled_dot",
    "scales_of_columns",
    "scales_of_rows",
    "widen",
]

# The constants of a product with FP8 weights, as `SCALING` of a kernel.
NATIVE = tl.constexpr(0)  # the GPU multiplies e4m3; otherwise rows are float16 and weights bytes
ROWS_BY = tl.constexpr(1)  # what of a row shares a scale: GROUP columns, the row, all rows by a static scale
QUANTIZED = tl.constexpr(2)  # whether rows are quantised already; otherwise loads are, by their expert's static scale
COLUMNS_BY = tl.constexpr(3)  # rows of weights that share a scale, 0 for all
DEEP = tl.constexpr(4)  # whether scales of weights are per GROUP inputs too
ONE_SCALE = tl.constexpr(5)  # whether the columns of every tile share their scale of weights
RESULT_BY = tl.constexpr(6)  # what of a row of the result shares a scale, GROUP or STATIC; None: it is not quantised
RESULT_DTYPE = tl.constexpr(7)  # what the result is rounded to before: BFLOAT16, FLOAT16 or nothing

GROUP = tl.constexpr(0)
ROW = tl.constexpr(1)
STATIC = tl.constexpr(2)
BFLOAT16 = tl.constexpr(0)
FLOAT16 = tl.constexpr(1)
WIDTH = tl.constexpr(128)  # columns of a group
MAX = tl.constexpr(448.0)
MIN_AMAX = tl.constexpr(1e-10)


@triton.jit
def scale_of(largest):
    """The scale of values whose largest absolute one is `largest`."""
    return tl.div_rn(tl.maximum(largest, MIN_AMAX), MAX)


@triton.jit
def quantize(x, scale, USE_E4M3: tl.constexpr):
    """``x / scale`` of float32 blocks that broadcast, as e4m3 or, without that, as float16 of the same values."""
    x, scale = tl.broadcast(x, scale)
    return rounded(tl.div_rn(x, scale), USE_E4M3)


@triton.jit
def rounded(x, USE_E4M3: tl.constexpr):
    """Quotients as e4m3 or, without that, as float16 of the same values."""
    x = tl.clamp(x, -MAX, MAX, propagate_nan=tl.PropagateNan.ALL)
    if USE_E4M3:
        x = x.to(tl.float8e4nv)
    else:
        # The last bit of 1.5 * 2^20 times the power of two below x, at least 2^-6, is that of x in e4m3: a sum rounds
        # there.
        power = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, 0x3C800000).to(tl.float32, bitcast=True)
        rounder = power * 1572864.0
        x = ((x + rounder) - rounder).to(tl.float16)
    return x


@triton.jit
def widen(x):
    """Bytes of e4m3 as float16 of the same value; e4m3 itself as it is."""
    if x.dtype == tl.uint8:
        bits = x.to(tl.int16)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)  # a 256th of the value, as float16's exponent has a bit more
        nan = tl.full(x.shape, float("nan"), tl.float16)
        x = tl.where((bits & 0x7F) == 0x7F, nan, half.to(tl.float16, bitcast=True) * 256.0).to(tl.float16)
    return x


@triton.jit
def scales_of_rows(scales, rows, kept, step):
    """The scales [BLOCK_M] of rows that a pass quantised by groups; `step`: which group."""
    return tl.load(scales[0] + rows * scales[1] + step, mask=kept, other=0.0)


@triton.jit
def scales_of_columns(scales, expert, column, columns, N, step, SCALING: tl.constexpr):
    """The scales of weights: of a product's columns [BLOCK_N], or one that all share.

    scales      of weights, see `product`
    columns     of the product, from `column` on; those from N on get the scale of another
    step        which GROUP of inputs
    """
    at = scales[2] + expert * scales[3]
    if SCALING[DEEP]:
        at += step
    if SCALING[COLUMNS_BY] != 0:
        if SCALING[ONE_SCALE]:
            at += column // SCALING[COLUMNS_BY] * scales[4]
        else:
            at += tl.where(columns < N, columns, 0) // SCALING[COLUMNS_BY] * scales[4]
    return tl.load(at)


@triton.jit
def factor_of(of_rows, of_columns, SWAP: tl.constexpr, SCALING: tl.constexpr):
    """What to multiply a product of e4m3 values by, ``[BLOCK_M, BLOCK_N]`` or with fewer elements."""
    if SCALING[COLUMNS_BY] == 0 or SCALING[ONE_SCALE]:
        factor = of_rows * of_columns
        factor = factor[None, :] if SWAP else factor[:, None]
    else:
        factor = of_columns[:, None] * of_rows[None, :] if SWAP else of_rows[:, None] * of_columns[None, :]
    return factor


@triton.jit
def scaled_dot(x, w, total, of_rows, of_columns, SWAP: tl.constexpr, SCALING: tl.constexpr):
    """`total` plus the product of a step: with its scales, unless these are the same for all steps."""
    w = widen(w)
    # Hopper sums e4m3 with fewer bits than float32 has, so each step is summed by itself.
    if SCALING[ROWS_BY] == GROUP or SCALING[DEEP]:
        part = tl.dot(w, x.T) if SWAP else tl.dot(x, w.T)
        total += part * factor_of(of_rows, of_columns, SWAP, SCALING)
    elif SWAP:
        total = tl.dot(w, x.T, total, max_num_imprecise_acc=WIDTH)
    else:
        total = tl.dot(x, w.T, total, max_num_imprecise_acc=WIDTH)
    return total


@triton.jit
def quotients(x, scale):
    """``x / scale`` of groups ``[., ., WIDTH]`` and their scales ``[., .]``, rounded as a division rounds.

    That would branch for every value.  Here a group takes one division, and a value two corrections by its remainder,
    after which the last bit is right (Markstein).  The last bits of what e4m3 has no value but zero for may differ.
    """
    inverse = tl.div_rn(tl.full(scale.shape, -1.0, tl.float32), scale)
    scale = tl.where(scale == float("inf"), 0.0, scale)  # then all quotients but that of infinity are zero
    x, scale = tl.broadcast(x * -1.0, scale[:, :, None])  # of both signs changed, zero keeps its own
    x, inverse = tl.broadcast(x, inverse[:, :, None])
    quotient = x * inverse
    for _ in tl.static_range(2):
        quotient = tl.fma(tl.fma(quotient, scale, x), inverse, quotient)
    return quotient


@triton.jit
def quantize_result(
    x, scales, rows, kept, column, N, SCALING: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """A tile ``[BLOCK_M, BLOCK_N]`` of a result as the pass over the stored rows would give it, bit by bit.

    scales      the last one: ``[rows, cdiv(N, WIDTH)]`` to fill, or the static scale
    rows, kept  [BLOCK_M]: the rows of the result, and which of them get scales
    column      the first one, where a group starts; those from N on count as zeros
    """
    if SCALING[RESULT_DTYPE] == BFLOAT16:
        x = x.to(tl.bfloat16).to(tl.float32)
    elif SCALING[RESULT_DTYPE] == FLOAT16:
        x = x.to(tl.float16).to(tl.float32)
    if SCALING[RESULT_BY] == STATIC:
        x = quantize(x, tl.load(scales[5]), SCALING[NATIVE])
    else:
        count: tl.constexpr = BLOCK_N // WIDTH
        x = tl.where((column + tl.arange(0, BLOCK_N) < N)[None, :], x, 0.0).reshape(BLOCK_M, count, WIDTH)
        scale = scale_of(tl.max(tl.abs(x), 2))
        groups = tl.cdiv(N, WIDTH)
        group = column // WIDTH + tl.arange(0, count)
        at = scales[5] + rows[:, None] * groups + group[None, :]
        tl.store(at, scale, mask=kept[:, None] & (group < groups)[None, :])
        x = rounded(quotients(x, scale), SCALING[NATIVE]).reshape(BLOCK_M, BLOCK_N)
    return x


# `total`, the ids and the static scale have one element per call, block or route, as in `gemm`.
@triton.jit(do_not_specialize=["count", "num_routes"], do_not_specialize_on_alignment=["static", "sorted_ids", "total"])
def quantize_rows(
    rows, out, scales, static, sorted_ids, total, count, num_routes, K, row_stride,
    BY: tl.constexpr, USE_E4M3: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Quantise rows by groups or a static scale, BLOCK groups of any rows a program, or by rows, a row a program.

    inputs      rows [count, K]; static: a scale or None; sorted_ids, total: of the layout in whose order the rows are,
                or None.  Rows without a route below num_routes are not read
    outputs     out [count, K], e4m3 or float16; scales [count, cdiv(K, WIDTH)] or [count], None with `static`
    tunable     BLOCK groups or, by rows, columns at a time
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if BY != ROW:
        groups = tl.cdiv(K, WIDTH)
        group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        row = group // groups
        kept = _has_route(row, sorted_ids, total, count, num_routes)
        columns = (group % groups * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
        mask = kept[:, None] & (columns < K)
        x = tl.load(rows + row[:, None] * row_stride + columns, mask=mask, other=0.0).to(tl.float32)
        if BY == STATIC:
            scale = tl.load(static) + tl.zeros((BLOCK,), dtype=tl.float32)
        else:
            scale = scale_of(tl.max(tl.abs(x), 1))
            tl.store(scales + group, scale, mask=kept)
        tl.store(out + row[:, None] * K + columns, quantize(x, scale[:, None], USE_E4M3), mask=mask)
    else:
        row = tl.program_id(0).to(tl.int64)
        end = tl.where(_has_route(row, sorted_ids, total, count, num_routes), K, 0)
        columns = tl.arange(0, BLOCK)
        largest = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, end, BLOCK):
            x = tl.load(rows + row * row_stride + start + columns, mask=start + columns < end, other=0.0)
            largest = tl.maximum(largest, tl.abs(x.to(tl.float32)))
        scale = scale_of(tl.max(largest, 0))
        for start in range(0, end, BLOCK):
            x = tl.load(rows + row * row_stride + start + columns, mask=start + columns < end, other=0.0)
            values = quantize(x.to(tl.float32), scale, USE_E4M3)
            tl.store(out + row * K + start + columns, values, mask=start + columns < end)
        if end > 0:
            tl.store(scales + row, scale)


@triton.jit
def _has_route(row, sorted_ids, total, count, num_routes):
    """Whether rows exist and, in a layout's order, belong to a route."""
    kept = row < count
    if sorted_ids is not None:
        kept = kept & (row < tl.load(total))
        route = tl.load(sorted_ids + row, mask=kept, other=-1)
        kept = (route >= 0) & (route < num_routes)
    return kept
